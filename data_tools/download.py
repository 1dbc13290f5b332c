"""Fetches the videos that a manifest's clips are spans of, each once and whole, with yt-dlp. Nothing else calls it.

    python -m data_tools.download MANIFEST.parquet --out VIDEOS [--height 720] [--sleep-s 5] [--limit 100] [--again]

VIDEOS/ID.mp4 are the videos without sound, VIDEOS/ledger.jsonl what became of each: ok, gone, private, blocked or failed, with
time and message. The same command again goes on where it was stopped, half a file included; it asks again for what failed or was
blocked, not for what is gone or private unless --again says so. Then `python -m data_tools.ingest ... --files VIDEOS` finds them.
yt-dlp is not among the requirements (pip install yt-dlp). Whether you may fetch and use a video is between you, its owner and the
site; the lists of open sets pass on names alone for that reason.
"""

import argparse
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools import manifest
from data_tools.manifest import Row
from latte.clips import VIDEO_SUFFIXES
from latte.command import command

STATES = ("ok", "gone", "private", "blocked", "failed")
FINAL = ("gone", "private")  # not asked for again
# What sites and yt-dlp say, the first that fits
WORDS = (("private", r"private video|video is private|members-only|join this channel"),
         ("blocked", r"in your country|not available from your location|geo.?restrict|not a bot|HTTP Error 4(03|29)"
                     r"|too many requests|rate.?limit|confirm your age|sign in"),
         ("gone", r"video (is )?(unavailable|not available)|no longer available|been removed|been terminated|does not exist"
                  r"|HTTP Error 4(04|10)"))


@dataclass(frozen=True)
class Settings:
    """How videos are fetched."""

    height: int = 720  # pixels, at most
    sleep_s: float = 5.0  # between two videos, so as not to be a burden
    blocks: int = 5  # videos that are blocked one after the other before it stops
    timeout_s: float = 3600.0  # for one video
    program: str = ""  # command to call; empty: yt-dlp

    def __post_init__(self):
        """Raises ValueError naming what is out of range."""
        for key in ("height", "blocks", "timeout_s"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}: must be above 0, got {getattr(self, key)}")
        if self.sleep_s < 0:
            raise ValueError(f"sleep_s: must not be negative, got {self.sleep_s}")


def program(settings: Settings) -> list[str]:
    """The command that fetches. Raises ValueError where there is none."""
    if settings.program:
        return shlex.split(settings.program)
    if shutil.which("yt-dlp"):
        return ["yt-dlp"]
    if importlib.util.find_spec("yt_dlp"):
        return [sys.executable, "-m", "yt_dlp"]
    raise ValueError("yt-dlp is not installed: pip install yt-dlp, or give --program")


def videos(rows: Iterable[Row]) -> dict[str, str]:
    """The videos that live clips and clips without a file are spans of: id -> url, in the order of the rows."""
    found: dict[str, str] = {}
    for row in rows:
        if row["video"] and row["url"] and row["dropped"] in (None, "no file"):
            found.setdefault(row["video"], row["url"])
    return found


def ledger(path: Path) -> dict[str, dict[str, Any]]:
    """The last entry of each video. A line that was not written to its end is passed over."""
    entries = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            entries[entry["video"]] = entry
        except (ValueError, KeyError, TypeError):
            continue
    return entries


def download(wanted: dict[str, str], out: Path, settings: Settings, again: bool = False, limit: int = 0,
             wait: Callable[[float], None] = time.sleep) -> Counter:
    """Fetches videos, id -> url, into `out`; gives how many there are of each state now, and how many are left.

    limit: videos that are asked for this time; 0: all. Raises ValueError where there is no program, or where it is blocked again
    and again.
    """
    command, out = program(settings), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    known = ledger(out / "ledger.jsonl")
    todo = [name for name in wanted if not _settled(known.get(name), out, again)]
    blocked = 0
    for number, name in enumerate(tqdm(todo[:limit or None], desc="download", unit=" videos", disable=None)):
        if number:
            wait(settings.sleep_s)
        known[name] = _fetch(command, name, wanted[name], out, settings)
        _note(out / "ledger.jsonl", known[name])
        blocked = blocked + 1 if known[name]["state"] == "blocked" else 0
        if blocked == settings.blocks:
            raise ValueError(f"blocked {blocked} times, the last time with: {known[name]['message']}. Go on later, or more slowly "
                             "(--sleep-s)")
    return Counter(known[name]["state"] if name in known else "left" for name in wanted)


def _settled(entry: dict[str, Any] | None, out: Path, again: bool) -> bool:
    if entry is None:
        return False
    return (out / entry["file"]).is_file() if entry["state"] == "ok" else entry["state"] in FINAL and not again


def _fetch(command: list[str], name: str, url: str, out: Path, settings: Settings) -> dict[str, Any]:
    """Fetches one video; gives its entry in the ledger."""
    entry = {"video": name, "url": url, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    if not re.fullmatch(r"[\w.-]{1,200}", name) or name.startswith(".") or not re.match(r"https?://", url):
        return entry | {"state": "failed", "message": "no name for a file, or no http(s) address"}
    wanted = "/".join(kind.format(settings.height) for kind in ("bv[height<=?{}][ext=mp4]", "bv[height<=?{}]", "b[height<=?{}]"))
    target = str(out / name).replace("%", "%%") + ".%(ext)s"
    options = ["--ignore-config", "--no-playlist", "--no-progress", "--no-mtime", "--no-overwrites", "--continue", "--retries", "3"]
    try:
        done = subprocess.run([*command, *options, "--format", wanted, "--output", target, "--", url], capture_output=True,
                              text=True, errors="replace", timeout=settings.timeout_s, check=False)
        message, failed = done.stderr.strip(), done.returncode != 0
    except subprocess.TimeoutExpired:
        message, failed = f"took longer than {settings.timeout_s:g} s", True
    except OSError as error:
        raise ValueError(f"{command[0]}: cannot be run ({error.strerror})") from None
    file = next((out / f"{name}{suffix}" for suffix in VIDEO_SUFFIXES if (out / f"{name}{suffix}").is_file()), None)
    if failed or file is None:
        message = next((line for line in reversed(message.splitlines()) if "ERROR" in line), message) or "no file came"
        return entry | {"state": _state(message), "message": message[-500:]}
    digest = manifest.sha256_of(file)
    return entry | {"state": "ok", "message": "", "file": file.name, "sha256": digest, "bytes": file.stat().st_size}


def _state(message: str) -> str:
    return next((state for state, words in WORDS if re.search(words, message, re.IGNORECASE)), "failed")


def _note(path: Path, entry: dict[str, Any]) -> None:
    """Adds a line to the ledger, on a line of its own even where the one before it was cut off."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(f"{json.dumps(entry, ensure_ascii=False)}\n".encode())


def _rows(path: Path) -> Iterator[Row]:
    for rows in manifest.batches(path):
        yield from rows


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.download", description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path, help="whose clips' videos are wanted")
    parser.add_argument("--out", type=Path, required=True, help="folder for videos and ledger")
    parser.add_argument("--again", action="store_true", help="ask again for what is gone or private too")
    parser.add_argument("--limit", type=int, default=0, help="ask for so many this time; 0: all")
    for name, meaning in (("height", "pixels, at most"), ("sleep_s", "seconds between two videos"),
                          ("blocks", "blocked videos in a row before it stops"), ("timeout_s", "seconds for one video"),
                          ("program", "command to call in place of yt-dlp")):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=meaning)
    args = parser.parse_args(argv)
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    states = download(videos(_rows(args.manifest)), args.out, settings, args.again, args.limit)
    told = ", ".join(f"{states[state]} {state}" for state in (*STATES, "left") if states[state])
    print(f"{args.out}: {told or 'no video is wanted'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

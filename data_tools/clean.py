"""Cleans videos: every stage in its order, on one file, on a folder or on a manifest's clips.

    python -m data_tools.clean IN.mp4 --out OUT.mp4 --report R.json
    python -m data_tools.clean FOLDER_OR_MANIFEST.parquet --out FOLDER --workers 2

The order: fields and cadences, what time and tape did, bars, tickers, burned text, a user's network. Each repair proves itself or
is not made. A clip with nothing to do keeps its own file. A clip that cannot be cleaned keeps its row, with the reason in
`dropped`; it never stops the others. The same command again goes on where it was stopped: what is done is found in OUT/rows and
not done twice, and the result is the same to the byte.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as Overdue
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from pebble import ProcessExpired, ProcessPool  # of the extra [data]; a worker that dies or hangs costs one clip
from tqdm import tqdm

from data_tools import bars, ingest, manifest, networks, overlay, probe, restore, stage, ticker
from data_tools import film as films
from data_tools.deinterlace import deinterlace
from data_tools.film import Film
from data_tools.manifest import Job, Row
from data_tools.repair import fill
from data_tools.stage import VERSION, Outcome
from latte import video
from latte.clips import VIDEO_SUFFIXES
from latte.command import command


@dataclass(frozen=True)
class Settings:
    """How to clean; part of what makes a result the same."""

    grade: str = "fast"  # of de-interlacing: fast, fine or best
    rate: str = "frame"  # what de-interlacing gives: frame or field
    overlays: bool = True  # look for bars, tickers and burned text
    text: str = "drop"  # a clip whose burned text can be neither cropped nor filled, or leave it, where a stretch is yet to be cut
    network: str = ""  # a user's network, module:function or a command: see data_tools.networks
    crf: int = 14  # quality of written clips
    held_mib: int = 600  # decoded pictures that may be kept, twice

    def __post_init__(self):
        """Raises ValueError for what no clip can be cleaned with: once, not once for each clip."""
        for name, known in (("grade", fill.GRADES), ("rate", fill.RATES), ("text", ("drop", "leave"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; it is one of {', '.join(known)}")
        if self.held_mib < 0:
            raise ValueError(f"held_mib: {self.held_mib} MiB of pictures cannot be kept; 0 keeps none")
        films.check_crf(self.crf)
        if self.grade == "best":
            fill.sidecar()


def clean(film: Film, settings: Settings, scratch: Path | None = None) -> Outcome:
    """Runs all stages. The verdict is de-interlacing's; edits, notes and findings are of all stages in turn.

    scratch: a folder for a film that is dear to make and too long for memory.
    """
    done = Outcome(film, "progressive", 0.0)

    def run(name: str, step: Callable[..., Outcome], /, *arguments: Any, **options: Any) -> Outcome:
        outcome = step(done.film, *arguments, **options)
        done.edits += outcome.edits
        done.notes += [f"{name}: {note}" for note in outcome.notes]
        done.found[name] = outcome.found | {"verdict": outcome.verdict, "confidence": outcome.confidence}
        done.dropped = done.dropped or outcome.dropped
        if outcome.film is not done.film:
            spill = scratch / f"{name}.mp4" if scratch and settings.grade != "fast" else None
            done.film = films.held(outcome.film, settings.held_mib, spill)
        return outcome

    fields = run("deinterlace", deinterlace, grade=settings.grade, rate=settings.rate)
    done.verdict, done.confidence = fields.verdict, fields.confidence
    run("restore", restore.restore, _shot(fields))
    if settings.overlays:
        run("bars", bars.bars)
        run("ticker", ticker.ticker)
        burned = run("overlay", overlay.overlay)
        if settings.text == "leave" and burned.dropped:
            done.dropped = None
    if settings.network:
        kind = "function" if re.fullmatch(r"[\w.]+:\w+", settings.network) else "command"
        run("network", networks.networks, **{kind: settings.network})
    if not done.edits and done.dropped is None:
        done.notes.append("nothing to do")
    return done


def _shot(fields: Outcome) -> tuple[int, ...]:
    """Which lines of a film that was de-interlaced as a whole, in one order, were shot: see dropout.Watch."""
    if len(fields.found["segments"]) != 1 or [edit.step for edit in fields.edits] != ["deinterlace"]:
        return ()
    first = 0 if fields.edits[0].settings["order"] == "tff" else 1
    return (first,) if fields.edits[0].settings["rate"] == "frame" else (first, 1 - first)


@contextmanager
def cleaned(source: Path, settings: Settings, start_s: float = 0.0, end_s: float = math.inf) -> Iterator[tuple[Film, Outcome]]:
    """The film of a file, or of a span of it, and what cleaning made of it; both can be gone through inside the block."""
    started = stage.watched(films.held(films.read(source, start_s, end_s), settings.held_mib), source.name)
    with tempfile.TemporaryDirectory(prefix="latte-clean-") as scratch:
        yield started, clean(started, settings, Path(scratch))


def clean_rows(rows: list[dict[str, Any]], folder: Path, out: Path, settings: Settings, workers: int = 1,
               timeout_s: float = 3600, job: Callable[..., None] | None = None) -> list[dict[str, Any]]:
    """Cleans the clips of a manifest whose paths start at `folder`; gives its rows as they are for a manifest in `out`.

    out/clips/ID.mp4 are the repaired clips, out/rows/ID.json what became of every clip that was looked at, with its report.
    job: what a worker does with a row; `clean_row` unless given. Raises ValueError for less than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers: {workers} cannot do any work; give 1 or more")
    for name in ("clips", "rows"):
        (out / name).mkdir(parents=True, exist_ok=True)
    key = _key(settings)
    todo = [row for row in rows if not row.get("dropped") and _finished(row, out, key, timeout_s) is None]
    todo.sort(key=lambda row: -_length(row, folder))  # else the last worker may be left alone with a long one
    context = multiprocessing.get_context("forkserver")  # threads of this process would not survive a plain fork
    context.set_forkserver_preload(["data_tools.clean"])
    pool = ProcessPool(max_workers=workers, max_tasks=64, initializer=_one_thread, context=context)
    try:
        with tqdm(total=len(rows), initial=len(rows) - len(todo), desc="clean", unit=" clips", disable=None) as bar:
            jobs = [(row, pool.schedule(job or clean_row, (row, folder, out, settings, key), timeout=timeout_s)) for row in todo]
            for row, job in jobs:
                try:
                    job.result()
                except Overdue:
                    dropped = {"dropped": f"cleaning took longer than {timeout_s:g} s"}
                    _finish(row, out, key, _moved(row, folder, out) | dropped, {"limit_s": timeout_s})
                except ProcessExpired as error:
                    dropped = {"dropped": f"cleaning ended its process (code {error.exitcode})"}
                    _finish(row, out, key, _moved(row, folder, out) | dropped)
                bar.update()
        pool.close()
    finally:
        pool.stop()
        pool.join()
    return [row | (_moved(row, folder, out) if row.get("dropped") else _finished(row, out, key)["row"]) for row in rows]


def work(rows: list[Row], job: Job) -> list[Row]:
    """The stage of data_tools.run: each row's clip, clean, in clips/ID.mp4 if anything was repaired, else where it was."""
    key = _key(job.settings)
    for row in rows:
        if _finished(row, job.out, key) is None:
            clean_row(row, job.out, job.out, job.settings, key)
    return [row | _finished(row, job.out, key)["row"] for row in rows]


def listed(folder: Path) -> list[dict[str, Any]]:
    """A row for every video file below `folder`, with what data_tools.ingest finds beside it for a caption; not looked into."""
    rows = []
    for name, about in ingest.videos(folder):
        told = about if isinstance(about, dict) else {}  # words that cannot be read are no reason to leave a film uncleaned
        caption = str(told.get("caption") or told.get("text") or "").strip()
        digest = manifest.sha256_of(folder / name) if (folder / name).is_file() else None
        rows.append({"id": hashlib.sha256(f"{digest} {name}".encode()).hexdigest(), "source": folder.resolve().name,
                     "source_id": name, "path": digest and name, "caption": caption or None, "edits": [], "scores": {},
                     "caption_source": "file" if caption else None, "sha256": digest, "dropped": None if digest else "no file"})
    return rows


def _key(settings: Settings) -> str:
    return hashlib.sha256(repr((VERSION, settings)).encode()).hexdigest()[:16]


def _length(row: dict[str, Any], folder: Path) -> float:
    """How much there is to clean: seconds where the row tells them, else bytes of the file."""
    if row.get("end_s") is not None:
        return row["end_s"] - (row.get("start_s") or 0.0)
    path = folder / row["path"]
    return path.stat().st_size if path.is_file() else 0


def _one_thread() -> None:
    """Processes are the parallelism here; more threads wait for each other, and could change sums."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def clean_row(row: dict[str, Any], folder: Path, out: Path, settings: Settings, key: str) -> None:
    """Cleans one clip and leaves its record in out/rows. Never raises for what the clip holds."""
    source = folder / row["path"]
    start, end = row.get("start_s") or 0.0, row.get("end_s")
    span = (start, end) if end is not None and not _whole(row) else (0.0, math.inf)
    changed, report = _moved(row, folder, out), {}
    try:
        changed["origin"] = row.get("origin") or {
            **changed, "sha256": row.get("sha256") or manifest.sha256_of(source), "start_s": span[0],
            "end_s": span[1] if span[1] < math.inf else None}
        if span == (0.0, math.inf):
            seen = probe.probe(source)
            report = {"probe": seen.report()}
            if seen.unreadable:
                raise ValueError(seen.unreadable)
            changed |= {"start_s": 0.0, "end_s": seen.duration_s, "frames": seen.pictures, "fps": seen.rate, **_shown(source)}
        with cleaned(source, settings, *span) as (_, outcome):
            report |= outcome.report()
            edits = [asdict(edit) | {"settings": json.dumps(edit.settings, sort_keys=True, default=float)}
                     for edit in outcome.edits]
            order = row.get("field_order") if row.get("edits") else outcome.verdict  # of the source, not of what was mended
            changed |= {"field_order": order, "edits": (row.get("edits") or []) + edits, "dropped": outcome.dropped}
            if edits and outcome.dropped is None:
                changed |= _written(out, f"clips/{row['id']}.mp4", outcome.film, settings)
    except Exception as error:  # whatever a broken file does to a decoder or a detector costs this clip alone
        changed["dropped"] = f"cannot be cleaned ({str(error).removeprefix(f'{source}: ')})"
        if not isinstance(error, ValueError | OSError):  # a mistake of ours, to be found by its trace
            changed["dropped"] = f"cleaning failed ({type(error).__name__}: {error})"
            report = {"trace": traceback.format_exc().splitlines()}
    _finish(row, out, key, changed, report)


def _moved(row: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """Where the row's own file is, seen from `out`; nothing where it has none."""
    return {"path": Path(os.path.relpath((folder / row["path"]).resolve(), out.resolve())).as_posix()} if row.get("path") else {}


def _whole(row: dict[str, Any]) -> bool:
    """Whether a row that has start_s and end_s is of all pictures of its file."""
    length = row["frames"] / row["fps"] if row.get("frames") and row.get("fps") else math.inf
    return not row.get("start_s") and row["end_s"] >= 0.999 * length


def _shown(path: Path) -> dict[str, Any]:
    info = video.probe(path)
    return {"width": info.shown_width, "height": info.shown_height}


def _written(out: Path, name: str, film: Film, settings: Settings) -> dict[str, Any]:
    frames = films.write(out / name, film, settings.crf)
    seen = probe.probe(out / name)
    return {"path": name, "sha256": manifest.sha256_of(out / name), "start_s": 0.0, "end_s": seen.duration_s, "frames": frames,
            "fps": seen.rate, **_shown(out / name)}


def _finish(row: dict[str, Any], out: Path, key: str, changed: dict[str, Any], report: dict[str, Any] | None = None) -> None:
    stage.write_json(out / "rows" / f"{row['id']}.json", {"key": key, "row": changed, "report": report})


def _finished(row: dict[str, Any], out: Path, key: str, timeout_s: float = 0.0) -> dict[str, Any] | None:
    """What an earlier run with the same settings left of this clip, if it did; one that took too long has another chance."""
    path = out / "rows" / f"{row['id']}.json"
    held = json.loads(path.read_text()) if path.is_file() else {}
    short = ((held.get("report") or {}).get("limit_s") or math.inf) < timeout_s
    return held if held.get("key") == key and not short else None


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.clean", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a video file, a folder of videos, or a manifest (.parquet)")
    parser.add_argument("--out", type=Path, help="of a file: the clean film, .mp4; else a folder for clips, rows, manifest")
    parser.add_argument("--report", type=Path, help="of a file: what was found and done, .json; printed if not given")
    parser.add_argument("--workers", type=int, default=1, help="processes; each keeps up to twice --held-mib of pictures")
    parser.add_argument("--timeout-s", type=float, default=3600, help="a clip that takes longer is dropped")
    for name, meaning in (("grade", "of de-interlacing: fast, fine or best"), ("rate", "what de-interlacing gives: frame or field"),
                          ("text", "drop a clip whose burned text cannot be mended, or leave it there"),
                          ("network", "module:function or a command, see data_tools.networks"), ("crf", "quality of written clips"),
                          ("held_mib", "pictures kept in memory, MiB")):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=meaning)
    parser.add_argument("--no-overlays", dest="overlays", action="store_false", help="look for no bars, tickers or burned text")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    if args.source.is_dir() or args.source.suffix == ".parquet":
        return _many(args, settings)
    with cleaned(args.source, settings) as (started, outcome):
        stage.finish(args.source, outcome, started, args.out, args.report, settings.crf)
    if args.report is None:
        print(json.dumps(outcome.report(), indent=1, default=float))
    return 0


def _many(args: argparse.Namespace, settings: Settings) -> int:
    if args.out is None:
        raise ValueError("--out: name the folder for the clean clips and their manifest")
    is_folder = args.source.is_dir()
    rows = listed(args.source) if is_folder else manifest.read(args.source)
    if not rows:
        raise ValueError(f"{args.source}: holds no " + (f"video ({', '.join(VIDEO_SUFFIXES)})" if is_folder else "row"))
    rows = clean_rows(rows, args.source if is_folder else args.source.parent, args.out, settings, args.workers, args.timeout_s)
    manifest.write(args.out / "manifest.parquet", rows)
    dropped = [row for row in rows if row.get("dropped")]
    for row in dropped:
        print(f"dropped {row.get('source_id') or row['id']}: {row['dropped']}")
    steps = Counter(edit["step"] for row in rows for edit in row.get("edits") or [])
    repaired = sum(bool(row.get("edits")) for row in rows)
    print(f"{args.out / 'manifest.parquet'}: {len(rows)} clips, {len(dropped)} dropped, {repaired} repaired"
          + "".join(f", {n} times {step}" for step, n in steps.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

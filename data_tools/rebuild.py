"""Makes a published set again from its manifest and the sources, and compares every clip by its hash.

    python -m data_tools.rebuild MANIFEST.parquet --sources FOLDER --out OUT [--workers 2]

A row tells the source file with its hash, the span that was cleaned, the files that were joined, and the times of the frames; the
settings of the run lie in the manifest. Sources are found below FOLDER by their names, wherever there, and used where their hash is
the recorded one: what is gone or altered is listed with the clips that need it, and stops nothing. Clips go to OUT/clips, and what
became of each to OUT/rebuild.json. The same command again goes on where it was stopped.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import TimeoutError as Overdue
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch
from pebble import ProcessExpired, ProcessPool  # of the extra [data]
from tqdm import tqdm

from data_tools import clean, cut, manifest, stitch
from data_tools import film as films
from data_tools.manifest import Row
from data_tools.stage import write_json
from latte.command import command

VERDICTS = {"equal": "the same bytes as published", "different": "other bytes than published", "gone": "a source is not there",
            "altered": "a source is not the one that was used", "failed": "could not be made"}

SCRATCH = "making-"


class Source(NamedTuple):
    """A file that clips were made from, and the span that was cleaned, if it was."""

    path: str  # as the run knew it
    sha256: str
    cleaned: bool = False
    start_s: float = 0.0
    end_s: float | None = None  # null: its end


class Recipe(NamedTuple):
    """How the film came about that clips were cut from."""

    sources: tuple[Source, ...]
    stitch: str = ""  # the settings of the join, JSON; "" for one file


def recipe(row: Row) -> Recipe:
    """What a published row says about its making. Raises ValueError when it does not say enough."""
    told = {edit["step"]: edit["settings"] for edit in row.get("edits") or []}
    if "cut" not in told:
        raise ValueError("its row names no picked frames (data_tools.cut did not make it)")
    if "stitch" in told:
        pieces = json.loads(told["stitch"])["pieces"]
        return Recipe(tuple(_source(piece["path"], piece["sha256"], piece["origin"]) for piece in pieces), told["stitch"])
    origin = row.get("origin")
    if not origin or not origin.get("sha256"):
        raise ValueError("its row names no source")
    return Recipe((Source(origin["path"], origin["sha256"]) if json.loads(told["cut"])["of_source"] else
                   _source("", "", origin),))


def _source(path: str, sha256: str, origin: dict[str, Any] | None) -> Source:
    """The source of a file: itself, or what it was cleaned from."""
    if origin is None or origin["path"] == path:
        return Source(path, sha256)
    return Source(origin["path"], origin["sha256"], True, origin["start_s"] or 0.0, origin["end_s"])


class Sources:
    """The files below a folder, found by name and told apart by hash."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(f"--sources: {folder} is not a folder")
        self._named: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._named[path.name].append(path)

    def find(self, source: Source) -> Path | str:
        """The file, or "gone" or "altered"."""
        named = self._named[Path(source.path).name]
        return next((path for path in named if stitch.source_digest(path) == source.sha256), "altered" if named else "gone")


def rebuild(path: Path, sources: Path, out: Path, workers: int = 1, timeout_s: float = 3600) -> dict[str, Any]:
    """Makes the clips of a manifest again; gives the report. Raises ValueError naming what cannot be used."""
    if workers < 1:
        raise ValueError(f"--workers: {workers} cannot do any work; give 1 or more")
    if (out / "clips").resolve() == (path.parent / "clips").resolve():
        raise ValueError(f"--out: {out} holds the published clips; give another folder")
    rows = [row for row in manifest.read(path) if not row["dropped"]]
    about, found = manifest.about(path), Sources(sources)
    settings = _clean_settings(about)
    verdicts: dict[str, Verdict] = {}
    lost: dict[str, str] = {}
    work: dict[Recipe, list[Row]] = defaultdict(list)
    for row in rows:
        try:
            work[recipe(row)].append(row)
        except (ValueError, KeyError, TypeError) as error:
            verdicts[row["id"]] = ("failed", str(error))
    for left in out.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    calls = []
    for how, members in tqdm(work.items(), desc="sources", unit=" films", disable=None):
        files = [found.find(source) for source in how.sources]
        missing = {source.path: file for source, file in zip(how.sources, files, strict=True) if isinstance(file, str)}
        lost |= missing
        if missing:
            verdict = "gone" if "gone" in missing.values() else "altered"
            verdicts |= {row["id"]: (verdict, ", ".join(sorted(missing))) for row in members}
        else:
            calls.append((how, files, members))
    for members, done in _made(calls, out, settings, workers, timeout_s):
        verdicts |= {row["id"]: done.get(row["id"], ("failed", "not made")) for row in members}
    counts = Counter(verdict for verdict, _ in verdicts.values())
    return {"manifest": path.name, "clips": len(rows), "counts": {name: counts[name] for name in VERDICTS},
            "sources": dict(sorted(lost.items())), "versions": _versions(about),
            "rows": [{"id": key, "verdict": verdict, "why": why} for key, (verdict, why) in sorted(verdicts.items())
                     if verdict != "equal"]}


Call = tuple[Recipe, list[Path], list[Row]]  # how, the files of the sources, the clips
Verdict = tuple[str, str]  # one of VERDICTS, and why


def _made(calls: list[Call], out: Path, settings: clean.Settings | None, workers: int,
          timeout_s: float) -> Iterator[tuple[list[Row], dict[str, Verdict]]]:
    """What became of the rows of each call, as workers are done with it."""
    context = multiprocessing.get_context("forkserver")  # threads of this process would not survive a plain fork
    context.set_forkserver_preload(["data_tools.clean"])
    total = sum(len(members) for _, _, members in calls)
    pool = ProcessPool(max_workers=workers, max_tasks=64, initializer=_one_thread, context=context)
    with pool, tqdm(total=total, desc="rebuild", unit=" clips", disable=None) as bar:
        jobs = [(members, pool.schedule(make, (how, files, members, out, settings), timeout=timeout_s))
                for how, files, members in calls]
        for members, job in jobs:
            try:
                yield members, job.result()
            except Overdue:
                yield members, {row["id"]: ("failed", f"took longer than {timeout_s:g} s") for row in members}
            except ProcessExpired as error:
                yield members, {row["id"]: ("failed", f"ended its process (code {error.exitcode})") for row in members}
            bar.update(len(members))


def _one_thread() -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def make(how: Recipe, files: list[Path], rows: list[Row], out: Path, settings: clean.Settings | None) -> dict[str, Verdict]:
    """Makes the clips of one film; gives id -> verdict and why."""
    verdicts = {row["id"]: ("equal", "") for row in rows if _digest(out, row) == row["sha256"]}  # by an earlier run
    todo = [row for row in rows if row["id"] not in verdicts]
    if not todo:
        return verdicts
    (out / "clips").mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=out) as scratch:
            film = _film(how, files, Path(scratch), settings)
            for row in todo:
                told = next(json.loads(edit["settings"]) for edit in row["edits"] if edit["step"] == "cut")
                cut.write(out / "clips" / f"{row['id']}.mp4", film, told)
                same = _digest(out, row) == row["sha256"]
                verdicts[row["id"]] = ("equal", "") if same else ("different", "")
    except Exception as error:  # what a file does to a decoder costs its own clips alone
        verdicts |= {row["id"]: ("failed", f"{type(error).__name__}: {error}") for row in todo if row["id"] not in verdicts}
    return verdicts


def _digest(out: Path, row: Row) -> str | None:
    path = out / "clips" / f"{row['id']}.mp4"
    return manifest.sha256_of(path) if path.is_file() else None


def _film(how: Recipe, files: list[Path], scratch: Path, settings: clean.Settings | None) -> Path:
    """The file that clips were cut from, made again."""
    made = []
    for number, (source, file) in enumerate(zip(how.sources, files, strict=True)):
        if source.cleaned:
            if settings is None:
                raise ValueError("the manifest tells of no stage clean, or of several, and it was cleaned")
            with clean.cleaned(file, settings, source.start_s, math.inf if source.end_s is None else source.end_s) as (_, outcome):
                file = scratch / f"{number}.mp4"
                films.write(file, outcome.film, settings.crf)
        made.append(file)
    if not how.stitch:
        return made[0]
    told = json.loads(how.stitch)
    pieces = [stitch.Piece(**piece | {"path": str(file.resolve())}) for piece, file in zip(told["pieces"], made, strict=True)]
    films.write(scratch / "joined.mp4", stitch.joined(pieces, scratch), told["crf"])
    return scratch / "joined.mp4"


def _clean_settings(about: dict[str, Any]) -> clean.Settings | None:
    told = [settings for name, settings, _ in about.get("stages", []) if name.partition("-")[0] == "clean"]
    return clean.Settings(**told[0]) if len(told) == 1 else None


def _versions(about: dict[str, Any]) -> dict[str, list[str]]:
    """Packages that were of another version then: name -> [then, now]."""
    now = {}
    for name in about.get("versions", {}):
        try:
            now[name] = version(name)
        except PackageNotFoundError:
            now[name] = "none"
    return {name: [then, now[name]] for name, then in about.get("versions", {}).items() if then != now[name]}


def show(report: dict[str, Any]) -> None:
    """Prints the report as a table."""
    for name, meaning in VERDICTS.items():
        count = report["counts"][name]
        print(f"{name:10s} {count:8d}  {count / max(report['clips'], 1):7.2%}  {meaning}")
    for path, state in report["sources"].items():
        print(f"{state}: {path}")
    for row in report["rows"]:
        print(f"{row['verdict']}: {row['id'][:16]} {row['why']}")
    for name, (then, now) in report["versions"].items():
        print(f"{name} was {then} and is {now}: pixels may differ")


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.rebuild", description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path, help="a published manifest")
    parser.add_argument("--sources", type=Path, required=True, help="a folder with the source videos, anywhere below")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the clips and the report")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--timeout-s", type=float, default=3600, help="a film that takes longer is given up")
    args = parser.parse_args(argv)
    report = rebuild(args.manifest, args.sources, args.out, args.workers, args.timeout_s)
    write_json(args.out / "rebuild.json", report)
    show(report)
    return int(report["counts"]["different"] + report["counts"]["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())

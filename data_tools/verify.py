"""Checks a published set: every hash, span and frame count of its shards and its manifest.

    python -m data_tools.verify FOLDER [--report R.json]

FOLDER holds manifest.parquet, and shards and SHA256SUMS as data_tools.shard writes them. Without shards the clips' own files are
checked. Says what is wrong, file by file and clip by clip: missing, altered, cut off, not in the manifest, another number of
frames, no true span. Ends with 1 if anything is.
"""

import argparse
import hashlib
import io
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
from tqdm import tqdm

from data_tools import manifest
from data_tools.manifest import Row, sha256_of
from data_tools.shard import text
from data_tools.stage import write_json
from latte.command import command

SUFFIXES = ("json", "mp4", "txt")  # of a clip in a shard
SHOWN = 50  # problems of a kind that are printed


class Problem(NamedTuple):
    """What is wrong with a file or a clip."""

    kind: str  # missing, altered, cut off, unknown, doubled, frames, span, row
    place: str  # the file, and the clip in it
    told: str


class _Wanted(NamedTuple):
    """What is kept of a live row, of which there may be millions."""

    id: str
    sha256: str | None
    frames: int | None
    seconds: float | None  # of the file; None where the clip is a span of a longer one, or nobody knows
    told: str  # hash of its JSON


def verify(folder: Path) -> Iterator[Problem]:
    """All that is wrong with a set. Raises ValueError naming a manifest that cannot be read."""
    wanted: dict[str, dict[str, _Wanted]] = {}  # shard -> name in it -> row
    alone: dict[str, list[_Wanted]] = {}  # a clip's own file, where it is in no shard -> rows
    seen: set[str] = set()
    for rows in manifest.batches(folder / "manifest.parquet"):
        for row in rows:
            if row["id"] in seen:
                yield Problem("doubled", row["id"], "two rows of the manifest have this id")
            seen.add(row["id"])
            if row["dropped"]:
                if row["shard"]:
                    yield Problem("row", row["id"], f"is dropped ({row['dropped']}) and yet in {row['shard']}")
                continue
            yield from _row(row)
            whole = not row["start_s"] and row["end_s"] is not None
            told = _Wanted(row["id"], row["sha256"], row["frames"], row["end_s"] if whole else None,
                           hashlib.sha256(text(row).encode()).hexdigest())
            if row["shard"]:
                place, _, name = row["shard"].rpartition("/")
                wanted.setdefault(place, {})[name] = told
            else:
                alone.setdefault(row["path"], []).append(told)
    yield from _sums(folder, set(wanted))
    with tqdm(total=sum(map(len, (*wanted.values(), *alone.values()))), desc="verify", unit=" clips", disable=None) as bar:
        for place, rows in sorted(wanted.items()):
            if (folder / place).is_file():
                yield from _shard(folder, place, rows)
            bar.update(len(rows))
        for place, rows in sorted(alone.items()):
            yield from _file(folder, place, rows)
            bar.update(len(rows))


def _row(row: Row) -> Iterator[Problem]:
    """What is wrong with a live row by itself."""
    def span(start: str, end: str) -> float | None:
        return None if row[start] is None or row[end] is None else row[end] - row[start]

    for start, end in (("start_s", "end_s"), ("from_s", "to_s")):
        length = span(start, end)
        if length is not None and (length <= 0 or row[start] < 0):
            yield Problem("span", row["id"], f"{start} {row[start]:g} to {end} {row[end]:g} s is no span")
    length, frames, fps = span("start_s", "end_s"), row["frames"], row["fps"]
    if length and frames and fps and abs(length * fps - frames) > 0.5:
        yield Problem("span", row["id"], f"{length:g} s at {fps:g} fps are not {frames} frames")
    if row["picked"] and frames != len(row["picked"]):
        yield Problem("frames", row["id"], f"{len(row['picked'])} frames were picked, {frames} are told")
    if any(later <= earlier for earlier, later in zip(row["picked"] or (), (row["picked"] or ())[1:], strict=False)):
        yield Problem("span", row["id"], "the times of the picked frames do not rise")


def _sums(folder: Path, wanted: set[str]) -> Iterator[Problem]:
    """What is wrong with whole files, by SHA256SUMS. wanted: the shards that the manifest names."""
    path, known = folder / "SHA256SUMS", set()
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    if wanted and not lines:
        yield Problem("missing", "SHA256SUMS", "there are shards, and no sums of them")
    for line in tqdm(lines, desc="sums", unit=" files", disable=None):
        digest, _, name = line.partition("  ")
        known.add(name)
        if not (folder / name).is_file():
            yield Problem("missing", name, "SHA256SUMS names it")
        elif sha256_of(folder / name) != digest:
            yield Problem("altered", name, "its bytes are not those of SHA256SUMS")
    for name in sorted(wanted - known):
        yield Problem("unknown" if (folder / name).is_file() else "missing", name, "the manifest names it, SHA256SUMS does not")
    for name in sorted({f"shards/{file.name}" for file in (folder / "shards").glob("*.tar")} - known - wanted):
        yield Problem("unknown", name, "neither SHA256SUMS nor the manifest names it")


def _shard(folder: Path, place: str, rows: dict[str, _Wanted]) -> Iterator[Problem]:
    """What is wrong inside a shard that should hold `rows`."""
    found: Counter = Counter()
    try:
        with tarfile.open(folder / place, "r:") as tar:
            for member in tar:
                found[member.name] += 1
                clip, _, suffix = member.name.partition(".")
                row = rows.get(f"{clip}.mp4")
                if row is None or suffix not in SUFFIXES:
                    yield Problem("unknown", f"{place}/{member.name}", "the manifest does not name it")
                elif suffix == "mp4":
                    yield from _clip(tar.extractfile(member).read(), f"{place}/{member.name}", row)
                elif suffix == "json" and hashlib.sha256(tar.extractfile(member).read()).hexdigest() != row.told:
                    yield Problem("altered", f"{place}/{member.name}", "is not its row of the manifest")
    except (tarfile.TarError, OSError) as error:
        yield Problem("cut off", place, f"cannot be read to its end ({error})")
    for member in (name.removesuffix("mp4") + suffix for name in rows for suffix in SUFFIXES):
        if not found[member]:
            yield Problem("missing", f"{place}/{member}", "the manifest names it")
        elif found[member] > 1:
            yield Problem("doubled", f"{place}/{member}", f"is there {found[member]} times")


def _clip(data: bytes, place: str, row: _Wanted) -> Iterator[Problem]:
    if hashlib.sha256(data).hexdigest() != row.sha256:
        yield Problem("altered", place, "its bytes are not those of its row")
    yield from _frames(io.BytesIO(data), place, row)


def _file(folder: Path, place: str, rows: list[_Wanted]) -> Iterator[Problem]:
    """What is wrong with a file that clips lie in."""
    if not (folder / place).is_file():
        yield Problem("missing", place, f"the row {rows[0].id} names it")
        return
    if {row.sha256 for row in rows} - {None, sha256_of(folder / place)}:
        yield Problem("altered", place, f"its bytes are not those of the row {rows[0].id}")
    for row in rows:
        with open(folder / place, "rb") as file:
            yield from _frames(file, place, row)


def _frames(file: BinaryIO, place: str, row: _Wanted) -> Iterator[Problem]:
    """Compares a clip's packets, one a frame, with its row. Nothing is decoded: that these are the bytes that were once decoded is
    what the hash says."""
    if row.frames is None or row.seconds is None:
        return
    try:
        with av.open(file, metadata_errors="replace") as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size and packet.pts is not None]
            times = sorted(float(packet.pts * packet.time_base) for packet in packets)
            lasts = float(1 / (stream.average_rate or stream.guessed_rate or 25))
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        yield Problem("cut off", place, f"cannot be read as a video ({error})")
        return
    if len(times) != row.frames:
        yield Problem("frames", place, f"has {len(times)} frames, its row says {row.frames}")
    elif abs(times[-1] - times[0] + lasts - row.seconds) > 1.5 * lasts:
        yield Problem("span", place, f"lasts {times[-1] - times[0] + lasts:.3f} s, its row says {row.seconds:.3f} s")


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.verify", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the set: manifest.parquet, shards, SHA256SUMS")
    parser.add_argument("--report", type=Path, help="all that is wrong, .json")
    args = parser.parse_args(argv)
    kinds: Counter = Counter()
    problems = []
    for problem in verify(args.folder):
        kinds[problem.kind] += 1
        problems.append(problem._asdict())
        if kinds[problem.kind] <= SHOWN:
            tqdm.write(f"{problem.kind}: {problem.place}: {problem.told}")
    if args.report:
        write_json(args.report, {"counts": kinds, "problems": problems})
    print(f"{args.folder}: " + (", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "all is as it was made"))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

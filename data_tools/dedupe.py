"""Finds clips that are there twice, in the whole set: the same bytes or span, and pictures that look alike.

    python -m data_tools.dedupe IN.parquet OUT.parquet [--bits 8] [--alike 3] [--keep SCORE]

Looks are compared by the 64-bit perceptual hashes of four pictures, at 1/8, 3/8, 5/8 and 7/8 of each clip, that data_tools.score
leaves in tags["phash"]: no file is opened. Of clips that are alike, directly or by others between them, the best one stays.
Found: re-encodes, other sizes and brightness, mirrored pictures, crops of 5%, most logos and subtitles. Not found: crops of 10%
and more, added bars, the same scene from another start on.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools import manifest
from data_tools.manifest import Row
from latte.command import command

VERSION = "1"  # raised when other rows are dropped than before
PICTURES = 4  # hashes of a clip
# Bits of the odd horizontal frequencies, which change their sign where a picture is mirrored: see data_tools.score.hash_of
MIRROR = np.uint64(0xAAAAAAAAAAAAAAAA)
CROWD = 256  # rows with an equal part of a hash; in a larger crowd each is compared with its nearest in the hashes' order
NEAREST = 32


@dataclass(frozen=True)
class Settings:
    """Which clips count as equal, and which of them stays."""

    bits: int = 8  # of 64 in which the hashes of two pictures that are alike may differ; -1 looks for equal files and spans alone
    alike: int = 3  # of the four pictures that must be alike
    keep: str = ""  # the score whose greatest stays; empty: the longest clip, then the first id
    same_video: bool = True  # clips of one video are compared too; false keeps all of a long shot that hardly changes
    least_change: int = 0  # bits by which some picture of a clip must differ from its first one; 0 asks for none

    def __post_init__(self):
        """Raises ValueError naming what is out of range."""
        if not -1 <= self.bits <= 16:
            raise ValueError(f"bits: {self.bits} is out of range; 0 to 16 of 64 bits may differ, -1 compares no looks")
        if not 2 <= self.alike <= PICTURES:
            raise ValueError(f"alike: {self.alike} is out of range; 2 to {PICTURES} pictures must be alike")
        if not 0 <= self.least_change <= 64:
            raise ValueError(f"least_change: {self.least_change} is out of range; 0 to 64 bits")


def work(rows: list[Row], job: manifest.Job) -> list[Row]:
    """All live rows of a set, each twin with `dropped` set; every member of a cluster has its best one's id in tags["cluster"].

    The result depends on the rows alone, not on their order. It is a stage over the whole set: one call with all rows.
    """
    settings: Settings = job.settings
    order = sorted(range(len(rows)), key=lambda i: _rank(rows[i], settings.keep))  # the best first
    ranked = [rows[i] for i in order]
    same, near = _Sets(len(rows)), _Sets(len(rows))
    for members in _equal(ranked):
        for other in members[1:]:
            same.join(members[0], other)
            near.join(members[0], other)
    hashes, known = _hashes(ranked)
    video = _videos(ranked)
    for one, other in _alike(hashes, known, settings):
        compared = settings.same_video | (video[one] != video[other])
        near.join_all(one[compared], other[compared])
    sizes = np.bincount([near.of(i) for i in range(len(rows))], minlength=len(rows))
    dropped = list(rows)
    for i, row in enumerate(ranked):
        best, twin = near.of(i), same.of(i)
        change = int(np.bitwise_count(hashes[i] ^ hashes[i, 0]).max()) if known[i] else 64
        why = (f"duplicate (of {ranked[twin]['id']})" if twin != i else
               f"near-duplicate (of {ranked[best]['id']})" if best != i else
               f"unchanging ({change} bits)" if change < settings.least_change else None)
        tags = (row.get("tags") or {}) | ({"cluster": ranked[best]["id"]} if sizes[best] > 1 else {})
        dropped[order[i]] = row | {"tags": tags, "dropped": why}
    return dropped


def _rank(row: Row, score: str) -> tuple:
    """What sorts the better row first; a row without the score comes last."""
    value = (row.get("scores") or {}).get(score)
    length = (row.get("end_s") or 0.0) - (row.get("start_s") or 0.0)
    return (value is None, -(value or 0.0), -length, row["id"])


class _Sets:
    """Disjoint sets of numbers; the least member of a set stands for it (union-find with path halving)."""

    def __init__(self, count: int):
        self._parent = list(range(count))

    def of(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        i, j = self.of(i), self.of(j)
        self._parent[max(i, j)] = min(i, j)

    def join_all(self, ones: np.ndarray, others: np.ndarray) -> None:
        for i, j in zip(ones.tolist(), others.tolist(), strict=True):
            self.join(i, j)


def _equal(rows: list[Row]) -> Iterator[list[int]]:
    """Numbers of rows that are the same span: of equal files, of one file, or of one whole video, whichever lists named it."""
    places: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        for key in _spans(row):
            places.setdefault(key, []).append(i)
    return (members for members in places.values() if len(members) > 1)


def _spans(row: Row) -> Iterator[tuple]:
    def ms(key: str) -> int | None:
        return None if row.get(key) is None else round(1000 * row[key])

    chosen = tuple(round(1000 * at) for at in row.get("picked") or ())
    if row.get("sha256"):
        yield "file", row["sha256"], ms("start_s") or 0, ms("end_s"), chosen
    elif row.get("path"):
        yield "path", row["path"], ms("start_s") or 0, ms("end_s"), chosen
    if row.get("video") and row.get("from_s") is not None:
        tube = re.fullmatch(r"[\w-]{11}", row["video"])  # these ids mean the same video in every list
        yield "video", None if tube else row.get("source"), row["video"], ms("from_s"), ms("to_s"), len(chosen)


def _videos(rows: list[Row]) -> np.ndarray:
    """A number for each row, [n]; clips of one whole video have the same."""
    numbers: dict[tuple, int] = {}
    return np.array([numbers.setdefault((row.get("source"), row.get("video") or row["id"]), len(numbers)) for row in rows], int)


def _hashes(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """tags["phash"] of all rows as uint64 [n 4], and which rows have it [n]."""
    hashes, known = np.zeros((len(rows), PICTURES), np.uint64), np.zeros(len(rows), bool)
    for i, row in enumerate(rows):
        words = ((row.get("tags") or {}).get("phash") or "").split(",")
        if len(words) == PICTURES:
            try:
                hashes[i] = [int(word, 16) for word in words]
                known[i] = True
            except (ValueError, OverflowError):  # of another tool
                continue
    return hashes, known


def _alike(hashes: np.ndarray, known: np.ndarray, settings: Settings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows that look alike, as they are or mirrored, as two arrays of numbers; some pairs come more than once.

    Candidates are rows with an equal 16-bit part of a hash in the same place: with three pictures of four alike there are twelve
    parts, so pairs that differ in up to eleven bits of these are always found, and most of those that differ in more. (Banding:
    Manku, Jain, Das Sarma, "Detecting near-duplicates for web crawling", 2007.)
    """
    if settings.bits < 0 or not known.any():
        return
    numbers = np.flatnonzero(known)
    order = numbers[np.lexsort(hashes[numbers].T)]
    same = (hashes[order[1:]] == hashes[order[:-1]]).all(1)
    yield order[:-1][same], order[1:][same]
    single = order[np.concatenate([[True], ~same])]  # one of each kind, so that equal rows make no crowd
    looks = np.concatenate([hashes[single], hashes[single] ^ MIRROR])
    for picture in range(PICTURES):
        # Within a crowd the order is that of the other pictures' hashes, so that neighbours are likely alike.
        rest = [looks[:, (picture + k) % PICTURES] for k in (3, 2, 1, 0)]
        for shift in range(0, 64, 16):
            part = (looks[:, picture] >> np.uint64(shift)) & np.uint64(0xFFFF)
            for one, other in _near(np.lexsort((*rest, part)), part, looks, settings):
                yield single[one % len(single)], single[other % len(single)]


def _near(order: np.ndarray, part: np.ndarray, looks: np.ndarray, settings: Settings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The alike pairs among looks [n 4] of equal `part` [n], which lie together in `order` [n]: each with the step-th after it."""
    part = part[order]
    starts = np.flatnonzero(np.concatenate([[True], part[1:] != part[:-1]]))
    sizes = np.diff(np.append(starts, len(part)))
    size, last = np.repeat(sizes, sizes), np.repeat(starts + sizes, sizes)
    reach = np.where(size <= CROWD, size - 1, NEAREST)
    at = np.arange(len(part))
    for step in range(1, int(reach.max()) + 1):
        at = at[(reach[at] >= step) & (at + step < last[at])]
        one, other = order[at], order[at + step]
        plain = np.minimum(one, other) < len(looks) // 2  # two that are mirrored are also there as they are
        one, other = one[plain], other[plain]
        alike = (np.bitwise_count(looks[one] ^ looks[other]) <= settings.bits).sum(1) >= settings.alike
        yield one[alike], other[alike]


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.dedupe", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a manifest with tags[\"phash\"]")
    parser.add_argument("out", type=Path, help="the manifest, .parquet")
    for name, meaning in (("bits", "of 64 that may differ in pictures that are alike; -1 compares no looks"),
                          ("alike", "of four pictures that must be alike"), ("keep", "the score whose greatest stays"),
                          ("least_change", "bits by which a clip's pictures must differ; 0 asks for none")):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=meaning)
    parser.add_argument("--other-videos", dest="same_video", action="store_false", help="compare no clips of one video")
    args = parser.parse_args(argv)
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    rows = list(manifest.placed(manifest.read(args.source), args.source.parent, args.out.parent))
    live = [i for i, row in enumerate(rows) if not row["dropped"]]
    for i, row in zip(live, work([rows[i] for i in live], manifest.Job(args.out.parent, settings)), strict=True):
        rows[i] = row
    manifest.write(args.out, rows)
    print(f"{args.out}: {len(live)} clips, {sum(bool(rows[i]['dropped']) for i in live)} of them there twice")
    return 0


if __name__ == "__main__":
    sys.exit(main())

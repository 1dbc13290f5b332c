"""Puts pieces of one video together again, and picks clips for training in what comes of it.

    python -m data_tools.stitch IN.parquet OUT.parquet             joins files, cuts shots, picks frames
    python -m data_tools.stitch IN.parquet OUT.parquet --gather    only makes one row of spans that touch in one file

Gathering is for whole videos: listed spans of one file that touch or overlap become one longer row, a stretch, before anything
looks at pixels. Stitching is for what lies in files of its own: neighbours by their times become one file where data_tools.join
finds that the one goes on in the other, and never where it does not. Every row is then cut at transitions and where pictures are
missing, and what is left is filled with clips of 128, then 64, 32 and 16 frames at 8 fps: pictures of the film nearest in time, no
repeat, none mixed of two. Captions of the listed clips are merged in their order, with their times in captions.events.
"""

import argparse
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools import film as films
from data_tools import join, manifest, shots
from data_tools.film import TICKS, Film, Picture
from data_tools.manifest import Job, Row
from data_tools.repair import timing
from data_tools.stage import Edit
from latte.command import command
from latte.video import EPS_S

VERSION = "2"
SPOKEN_S = 2.0  # a listed clip with so much, or half of itself or of the clip, in a picked clip lends it its caption
EVEN_S = 0.001  # by which times in a file may be rounded
AROUND_S = 2.0  # of a joined film around a join where changes of shot are looked for: each file holds but a half of them
ROOM_S = 0.2  # by which files that touch may be listed apart


@dataclass(frozen=True)
class GatherSettings:
    """Which listed spans of a whole video become one row."""

    gap_s: float = 0.05  # seconds between spans that still touch: rounding and one picture; no caption speaks of a longer gap
    longest_s: float = 600.0  # seconds of a stretch that is not lengthened any more, so that a worker's clip has an end

    def __post_init__(self):
        if self.gap_s < 0:
            raise ValueError(f"gap_s: must not be negative, got {self.gap_s}")
        if self.longest_s <= 0:
            raise ValueError(f"longest_s: must be above 0, got {self.longest_s}")


@dataclass(frozen=True)
class Settings:
    """Which files become one, and which clips are picked."""

    fps: float = 8.0  # frames a second of a clip
    frames: tuple[int, ...] = (128, 64, 32, 16)  # of clips; the longer ones are placed first
    jitter: float = 0.5  # most that a frame may be off its time, in steps of the source's pictures
    join: bool = True  # neighbouring files are looked at
    crf: int = 8  # quality of joined files, 0 is lossless; they are an intermediate
    detector: str = "cascade"  # of changes of shot around a join, as of data_tools.shots

    def __post_init__(self):
        if not 0 < self.fps <= 240:
            raise ValueError(f"fps: must be above 0 and at most 240, got {self.fps}")
        if not self.frames or min(self.frames) < 2 or list(self.frames) != sorted(set(self.frames), reverse=True):
            raise ValueError(f"frames: name numbers of 2 and more, the greatest first, got {list(self.frames)}")
        if not 0 < self.jitter <= 2:
            raise ValueError(f"jitter: must be above 0 and at most 2 steps, got {self.jitter}")
        films.check_crf(self.crf)
        shots.Settings(self.detector)


def group(row: Row) -> str:
    """Rows of one video come together."""
    return f"{row['source']} {row['video']}" if row.get("video") else row["id"]


# Whole videos

def gather(rows: list[Row], job: Job) -> list[Row]:
    """Spans of one file that touch become one row, a stretch with `parts`; its members are dropped as joined."""
    out, spans = [], {}
    for row in rows:
        listed = row.get("start_s") is not None and row.get("end_s") is not None and row.get("from_s") is not None
        if listed and not row.get("edits"):
            spans.setdefault((group(row), row["path"], row.get("licence")), []).append(row)
        else:
            out.append(row)
    for members in spans.values():
        members.sort(key=lambda row: (row["start_s"], row["end_s"], row["id"]))
        for stretch in _stretches(members, job.settings):
            out += stretch if len(stretch) == 1 else [_stretch(stretch), *_within(stretch, _stretch_id(stretch))]
    return sorted(out, key=lambda row: row["id"])


def _stretches(members: list[Row], settings: GatherSettings) -> Iterator[list[Row]]:
    held, end = [], 0.0
    for row in members:
        if held and (row["start_s"] > end + settings.gap_s or end - held[0]["start_s"] >= settings.longest_s):
            yield held
            held = []
        end = max(end, row["end_s"]) if held else row["end_s"]
        held.append(row)
    yield held


def _stretch_id(members: list[Row]) -> str:
    return hashlib.sha256(" ".join(["stretch", *(row["id"] for row in members)]).encode()).hexdigest()


def _stretch(members: list[Row]) -> Row:
    """The row of a span of a file that holds several listed ones."""
    spans = {"start_s": min(row["start_s"] for row in members), "end_s": max(row["end_s"] for row in members)}
    return _merged(members) | spans | {"id": _stretch_id(members), "path": members[0]["path"], "sha256": members[0].get("sha256")}


def _merged(members: list[Row]) -> Row:
    """What rows of one video have in common, with their captions in order."""
    first, parts = members[0], [part for row in members for part in _parts(row)]
    scores = [row.get("scores") or {} for row in members]
    tags = [row.get("tags") or {} for row in members]
    start, end = min(row["from_s"] for row in members), max(row["to_s"] for row in members)
    return dict.fromkeys(manifest.SCHEMA.names) | {
        name: first.get(name) for name in ("source", "video", "url", "width", "height", "fps", "licence", "caption_source",
                                           "field_order")} | {
        "source_id": f"{first['video']}_{start}_{end}", "from_s": start, "to_s": end, "parts": parts,
        "scores": {name: min(held[name] for held in scores) for name in scores[0] if all(name in held for held in scores)},
        "tags": {name: tags[0][name] for name in tags[0] if all(held.get(name) == tags[0][name] for held in tags)},
        "edits": [], **_told(parts, start, end)}


def _parts(row: Row) -> list[dict[str, Any]]:
    """The listed clips that a row is made of: itself, if of no others."""
    return row.get("parts") or [{name: row.get(name) for name in ("id", "from_s", "to_s", "caption")}]


def _within(members: list[Row], key: str) -> list[Row]:
    return [row | {"dropped": f"joined: in a longer clip ({key[:16]})"} for row in members]


# Captions

def _told(parts: list[dict[str, Any]], start: float, end: float) -> Row:
    """Caption and events of a span of a video, by the listed clips that it holds enough of."""
    said: list[list] = []  # [caption, from, to]
    for part in parts:
        first, last = max(part["from_s"], start), min(part["to_s"], end)
        enough = min(SPOKEN_S, (part["to_s"] - part["from_s"]) / 2, (end - start) / 2)
        caption = " ".join((part["caption"] or "").split())
        if not caption or last - first < enough - EPS_S:
            continue
        if said and _plain(said[-1][0]) == _plain(caption) and first <= said[-1][2] + SPOKEN_S:
            said[-1][2] = max(said[-1][2], last)
        else:
            said.append([caption, first, last])
    once = list({_plain(caption): caption for caption, _, _ in reversed(said)}.values())[::-1]
    events = "; ".join(f"{first - start:.1f}-{last - start:.1f} s: {caption.rstrip('.')}" for caption, first, last in said)
    return {"caption": _in_order(once) or None, "captions": {"events": events or None}}


def _plain(caption: str) -> str:
    return caption.casefold().rstrip(" .!")


def _in_order(captions: list[str]) -> str:
    """"A man walks.", "A dog runs" -> "A man walks. Then a dog runs."; one alone stays as it is."""
    if len(captions) < 2:
        return captions[0] if captions else ""
    first, *others = (caption if caption[-1] in ".!?" else f"{caption}." for caption in captions)
    return " ".join([first, *(f"Then {_as_a_middle(caption)}" for caption in others)])


def _as_a_middle(caption: str) -> str:
    return caption[0].lower() + caption[1:] if caption.split()[0] in ("A", "An", "The") else caption


# Files

@dataclass(frozen=True)
class Piece:
    """The pictures of a file that a joined one takes: times in seconds of that file, shift_s makes them those of the joined one."""

    id: str  # of its row
    path: str
    sha256: str
    start_s: float
    end_s: float | None  # null: its end
    shift_s: float
    origin: dict[str, Any] | None  # of its row: what the file was made from, if it was cleaned


def source_digest(path: Path) -> str:
    """The hash of a file's bytes, looked up where the file's size and time of change are as they were before."""
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, changed_ns: int) -> str:
    return manifest.sha256_of(path)


def joined(pieces: list[Piece], folder: Path) -> Film:
    """The film of the pieces in a row, at their times; paths start at `folder`."""
    first = films.read(folder / pieces[0].path)

    def pictures() -> Iterator[Picture]:
        for piece in pieces:
            end = math.inf if piece.end_s is None else piece.end_s
            for picture in films.read(folder / piece.path, piece.start_s, end, from_zero=False):
                yield picture._replace(at_s=round((picture.at_s + piece.shift_s) * TICKS) / TICKS)

    return replace(first, pictures=pictures)


def _chains(rows: list[Row], job: Job) -> Iterator[tuple[list[Row], list[join.Join]]]:
    """Rows in runs of those that go on in each other, with how they do."""
    chain: list[Row] = []
    joins: list[join.Join] = []
    for row in sorted(rows, key=lambda row: (row["from_s"], row["to_s"], row["id"])):
        found = _joins(chain[-1], row, job.out) if chain else None
        usable = found and not found.reason and (not joins or found.end_s > joins[-1].start_s)
        if chain and not usable:
            yield chain, joins
            chain, joins = [], []
        chain, joins = [*chain, row], [*joins, found] if usable else []
    if chain:
        yield chain, joins


def _joins(before: Row, after: Row, folder: Path) -> join.Join | None:
    """How one row's film goes on in the other's; None where their times do not meet or a file cannot be read."""
    if before["path"] == after["path"] or after["to_s"] <= before["to_s"] or after["from_s"] > before["to_s"] + ROOM_S:
        return None
    spans = ((folder / row["path"], row.get("start_s") or 0.0, row.get("end_s") or math.inf) for row in (before, after))
    try:
        return join.between(*spans, after["from_s"] - before["from_s"])
    except (ValueError, OSError):  # which of the two it is, is said when its own frames are looked for
        return None


def _joined(chain: list[Row], joins: list[join.Join], job: Job) -> tuple[Row, Film]:
    """The row of a chain's film, and the film, which is not written yet."""
    pieces, shift = [], -(chain[0].get("start_s") or 0.0)
    for number, row in enumerate(chain):
        shift += joins[number - 1].shift_s if number else 0.0
        start = joins[number - 1].start_s if number else row.get("start_s") or 0.0
        end = joins[number].end_s if number < len(joins) else row.get("end_s")
        pieces.append(Piece(row["id"], row["path"], source_digest(job.out / row["path"]), start, end, shift, row.get("origin")))
    settings = {"crf": job.settings.crf, "pieces": [asdict(piece) for piece in pieces]}
    edit = Edit("stitch", settings, min(found.confidence for found in joins))
    key = hashlib.sha256(json.dumps(["stitch", VERSION, settings], sort_keys=True).encode()).hexdigest()
    changes = [shots.Segment(**change) for row, piece in zip(chain, pieces, strict=True) for change in _moved(row, piece)]
    changes = [asdict(change) for change in shots.merged(changes + _across(pieces, job))]
    looked = all(row.get("transitions") is not None for row in chain)
    end = chain[-1].get("end_s")
    row = _merged(chain) | {"id": key, "path": f"clips/{key}.mp4", "transitions": changes if looked else None, "start_s": 0.0,
                            "end_s": None if end is None else end + shift,
                            "edits": [edit for row in chain for edit in row.get("edits") or []] + [written(edit)]}
    return row, joined(pieces, job.out)


def _moved(row: Row, piece: Piece) -> list[dict[str, Any]]:
    """The transitions of what a piece takes of its file, at the joined film's times."""
    return [change | {name: change[name] + piece.shift_s for name in ("from_s", "to_s")} for change in row.get("transitions") or []
            if change["to_s"] > piece.start_s and change["from_s"] < (piece.end_s or math.inf)]


def _across(pieces: list[Piece], job: Job) -> list[shots.Segment]:
    """The changes of shot that show where both sides of a join are seen."""
    found = []
    for before, after in itertools.pairwise(pieces):
        end = after.start_s + AROUND_S
        near = [replace(before, start_s=max(before.start_s, before.end_s - AROUND_S)),
                replace(after, end_s=end if after.end_s is None else min(after.end_s, end))]
        with shots.one_thread():
            found += shots.analyse(joined(near, job.out), job.settings.detector)
    return found


def written(edit: Edit) -> dict[str, Any]:
    """An edit as the manifest holds it."""
    return asdict(edit) | {"settings": json.dumps(edit.settings, sort_keys=True, default=float)}


# Frames

def work(rows: list[Row], job: Job) -> list[Row]:
    """Joins, cuts and picks; every row comes back, dropped, with the rows of its clips."""
    out, together = [], {}
    for row in rows:
        together.setdefault(group(row), []).append(row)
    for members in together.values():
        timed = [row for row in members if row.get("from_s") is not None and row.get("to_s") is not None and job.settings.join]
        for chain, joins in _chains(timed, job):
            out += _from_chain(chain, joins, job) if joins else _from_row(chain[0], job)
        for row in members:
            if row not in timed:
                out += _from_row(row, job)
    return sorted(out, key=lambda row: row["id"])


def _from_row(row: Row, job: Job) -> list[Row]:
    path, start, end = job.out / row["path"], row.get("start_s") or 0.0, row.get("end_s") or math.inf
    try:
        film = films.read(path, start, end, from_zero=False)
        clips, why = _clips(row, film, job.settings)
    except (ValueError, OSError) as error:
        clips, why = [], f"cannot be read ({str(error).removeprefix(f'{path}: ')})"
    return [row | {"dropped": f"cut: into {len(clips)} clips" if clips else why}, *clips]


def _from_chain(chain: list[Row], joins: list[join.Join], job: Job) -> list[Row]:
    """The clips of files that are one film, which is written if it has any."""
    try:
        row, film = _joined(chain, joins, job)
        clips, why = _clips(row, film, job.settings)
        if clips and not (job.out / row["path"]).exists():
            films.write(job.out / row["path"], film, job.settings.crf)
    except (ValueError, OSError):  # a piece is damaged: each on its own, which says so
        return [made for member in chain for made in _from_row(member, job)]
    key = manifest.sha256_of(job.out / row["path"]) if clips else None
    row |= {"dropped": f"cut: into {len(clips)} clips" if clips else why, "sha256": key, "path": row["path"] if clips else None}
    return [*_within(chain, row["id"]), row, *(clip | {"sha256": key} for clip in clips)]


def _clips(row: Row, film: Film, settings: Settings) -> tuple[list[Row], str]:
    """The rows of the clips in a row's film, whose times are those of its file; or why there is none."""
    if row.get("transitions") is None:
        return [], "transitions were not looked for"
    found = timing.analyse(film)
    at, clips, longest = found.at_s, [], 0.0
    for shot in _shots(row["transitions"], at, [jump.number for jump in found.jumps]):
        true = at[shot][~found.duplicate[shot]]
        step = float(np.median(np.diff(true))) if len(true) > 1 else 0.0
        longest = max(longest, at[shot][-1] - at[shot][0] + step)
        for picked, off in picks(true, settings.frames, settings.fps, settings.jitter * step + EVEN_S):
            end = min(picked[0] + len(picked) / settings.fps, at[shot][-1] + step)
            inside = int(((at >= picked[0] - EPS_S) & (at < end - EPS_S)).sum())
            clips.append(_clip(row, picked, end, off, inside, settings))
    least = (settings.frames[-1] - 1) / settings.fps
    return clips, f"too short ({longest:.1f} s)" if longest <= least else f"no even frames at {settings.fps:g} fps"


def _shots(transitions: list[dict[str, Any]], at: np.ndarray, jumps: list[int]) -> Iterator[np.ndarray]:
    """Numbers of the pictures between transitions and jumps, a shot at a time; those within a transition are left out."""
    inside, shot = np.zeros(len(at), bool), np.zeros(len(at), int)
    for change in transitions:
        inside |= (at > change["from_s"] + EPS_S) & (at < change["to_s"] - EPS_S)
        shot += at >= change["to_s"] - EPS_S
    for number in jumps:
        shot += np.arange(len(at)) >= number
    for one in np.unique(shot):
        chosen = np.flatnonzero((shot == one) & ~inside)
        if len(chosen):
            yield chosen


def picks(at: np.ndarray, sizes: tuple[int, ...], fps: float, off: float) -> list[tuple[np.ndarray, float]]:
    """Clips in pictures shown at times `at` [f], which rise: the times of the chosen ones, and how far off even times they are.

    Each clip is of one of `sizes` frames, the first ones placed first, each as early as one fits in what is still free. No frame is
    more than `off` seconds from its time, none is chosen twice, and no clip begins before 1 / fps after the one before.
    """
    free, found = [(0, len(at))], []
    for size in sizes:
        left = []
        for first, last in free:
            start = first
            while start < last and at[last - 1] - at[start] >= (size - 1) / fps - off:
                index, worst = _nearest(at[start:last], size, fps)
                if worst > off or (np.diff(index) < 1).any():
                    start += 1
                    continue
                found.append((at[start + index], worst))
                left.append((first, start))
                over = at[start] + size / fps - off  # where the next one's first frame may be
                first = start = max(start + int(index[-1]) + 1, int(np.searchsorted(at, over)))
            left.append((first, last))
        free = left
    return sorted(found, key=lambda clip: clip[0][0])


def _nearest(at: np.ndarray, size: int, fps: float) -> tuple[np.ndarray, float]:
    """Numbers [size] of the pictures nearest to even times from the first one on, and the largest distance, in seconds."""
    wanted = at[0] + np.arange(size) / fps
    after = np.clip(np.searchsorted(at, wanted), 1, len(at) - 1)
    index = np.where(wanted - at[after - 1] <= at[after] - wanted + EPS_S, after - 1, after)
    return index, float(np.abs(at[index] - wanted).max())


def _clip(row: Row, picked: np.ndarray, end: float, off: float, frames: int, settings: Settings) -> Row:
    """The row of a clip of a row's file."""
    key = hashlib.sha256(json.dumps([row["id"], settings.fps, [round(float(time), 6) for time in picked]]).encode()).hexdigest()
    start = float(picked[0])
    zero = (row.get("from_s") or 0.0) - (row.get("start_s") or 0.0)  # of the file, in the whole video
    spans = {"start_s": start, "end_s": float(end), "from_s": zero + start, "to_s": zero + float(end)}
    told = {"parts": _parts(row)}
    if row.get("parts"):
        told["parts"] = [part for part in row["parts"] if part["from_s"] < spans["to_s"] and part["to_s"] > spans["from_s"]]
        told |= _told(told["parts"], spans["from_s"], spans["to_s"])
    scores = (row.get("scores") or {}) | {"jitter_s": round(off, 6)}
    return row | spans | told | {"id": key, "picked": [float(time) for time in picked], "frames": frames, "scores": scores}


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.stitch", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a manifest")
    parser.add_argument("out", type=Path, help="the manifest to write, in the same folder; files go to clips beside it")
    parser.add_argument("--gather", action="store_true", help="only make one row of spans that touch in one file")
    for name, meaning in (("fps", "frames a second"), ("jitter", "most that a frame may be off, in steps of the source"),
                          ("crf", "quality of joined files, 0 is lossless"), ("detector", "of shots around joins")):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=meaning)
    parser.add_argument("--frames", type=int, nargs="+", default=list(Settings.frames), help="of clips, the greatest first")
    parser.add_argument("--no-join", dest="join", action="store_false", help="look at no neighbouring files")
    args = parser.parse_args(argv)
    if args.out.resolve().parent != args.source.resolve().parent:
        raise ValueError(f"--out: name a manifest in {args.source.resolve().parent}, where the paths of its rows start")
    settings = Settings(args.fps, tuple(args.frames), args.jitter, args.join, args.crf, args.detector)
    rows = manifest.read(args.source)
    live, done = [row for row in rows if not row["dropped"]], [row for row in rows if row["dropped"]]
    if args.gather:
        done += gather(live, Job(args.out.parent, GatherSettings()))
    else:
        groups = itertools.groupby(sorted(live, key=group), group)
        for _, members in tqdm(groups, desc="stitch", unit=" videos", disable=None):
            done += work(list(members), Job(args.out.parent, settings))
    manifest.write(args.out, done, manifest.about(args.source))
    print(f"{args.out}: {len(live)} clips in, {sum(not row['dropped'] for row in done)} out")
    return 0


if __name__ == "__main__":
    sys.exit(main())

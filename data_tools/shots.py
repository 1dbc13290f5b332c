"""Where one shot ends and the next begins: cuts, dissolves, fades and wipes as segments of time, in one pass over a film.

    python -m data_tools.shots IN.mp4 --report R.json        one file; the report is printed if no name is given
    python -m data_tools.shots IN.parquet --out OUT.parquet  a manifest: fills `transitions`, in seconds from a file's first frame

Every picture is shrunk to 48x27. A cheap distance, blind to small motion, finds where nothing happens and what is surely a cut; the
rest is shown to TransNetV2 (data_tools.transnet). Rules of our own (data_tools.shot_rules) find fades through a flat colour, plain
dissolves and wipes, and take back what is no change: a flash, something that crosses the picture, a camera that is swung.
Detectors: cascade (that), transnet (the network sees every picture), rules (no network, no torch).
Shape letters: n pictures, h w lines and columns.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data_tools import film as films
from data_tools import manifest, stage
from data_tools.film import Film
from data_tools.shot_rules import Block, Change, fades, guessed, kept, ruled, runs, shrunk
from latte import video
from latte.command import command

VERSION = "1"
FASTEST = 32.0  # pictures a second that are looked at; of faster films every second, third, ... one
OWN, MARGIN = 400, 100  # pictures that a block decides on, and those that it sees before and after them
POINT, SPAN = 0.4, 0.3  # how sure the network has to be of the middle of a change, and of a part of one
BESIDE = 12  # pictures before and after a doubt that the network is shown; it was trained on 25


@dataclass(frozen=True)
class Settings:
    """How to look for changes of shot; part of what makes a result the same."""

    detector: str = "cascade"  # cascade, transnet or rules: see the top of this file

    def __post_init__(self):
        """Raises ValueError for a detector that is unknown, or whose package is not installed: once, not once for each clip."""
        _detector(self.detector)


@dataclass(frozen=True)
class Segment:
    """A change from one shot to the next; nothing from from_s up to, and without, to_s belongs to one shot alone."""

    kind: str  # cut, dissolve, fade, wipe; gradual where the network is sure and no rule knows which
    from_s: float  # when the last picture before it is shown, in seconds from the film's first; the first picture's, where none is
    to_s: float  # when the first picture after it is shown
    confidence: float  # 0 to 1


def analyse(film: Film, detector: str = "cascade") -> list[Segment]:
    """The changes of shot of a film in order. Holds some hundred shrunk pictures, however long it is.

    Raises ValueError for a detector that is unknown or not installed, and as reading the film does.
    """
    find, found = _detector(detector), []
    for block in blocks(film):
        found += [_timed(block, change) for change in block.own(find(block))]
    return merged(found)


def merged(segments: list[Segment]) -> list[Segment]:
    """In order, those that overlap as one: of the longer one's kind, as sure as the surer."""
    out: list[Segment] = []
    for segment in sorted(segments, key=lambda segment: (segment.from_s, segment.to_s)):
        if out and segment.from_s < out[-1].to_s - video.EPS_S:
            one, other = out.pop(), segment
            kind = max((one, other), key=lambda each: each.to_s - each.from_s).kind
            segment = Segment(kind, one.from_s, max(one.to_s, other.to_s), max(one.confidence, other.confidence))
        out.append(segment)
    return out


def _timed(block: Block, change: Change) -> Segment:
    kind, first, last, confidence = change
    at = block.at_s
    return Segment(kind, float(at[max(first - 1, 0)]), float(at[min(last, len(at) - 1)]), round(float(confidence), 2))


def blocks(film: Film) -> Iterator[Block]:
    """A film in overlapping blocks, each of which owns OWN pictures and sees MARGIN more on either side."""
    thumbs: list[np.ndarray] = []
    times: list[float] = []
    step, before = max(1, math.ceil(film.kind.rate / FASTEST)), 0
    for i, picture in enumerate(film):
        if i % step:
            continue
        thumbs.append(shrunk(picture))
        times.append(picture.at_s)
        if len(thumbs) == before + OWN + MARGIN:
            yield Block(np.stack(thumbs), np.array(times), before, before + OWN)
            gone = max(0, before + OWN - MARGIN)
            thumbs, times, before = thumbs[gone:], times[gone:], before + OWN - gone
    if len(thumbs) > before:
        yield Block(np.stack(thumbs), np.array(times), before, len(thumbs))


# Detectors: a block's changes in order of kind, not of time

def cascade(block: Block) -> list[Change]:
    """Rules where they are sure, the network where something happens that no rule is sure of."""
    changes, doubts = ruled(block)
    for first, last in doubts:
        changes += kept(block, answered(block, first, last, BESIDE))
    return changes


def transnet(block: Block) -> list[Change]:
    """The network on every picture, and the rule for fades."""
    return kept(block, answered(block, 0, len(block), 25)) + fades(block)


def rules(block: Block) -> list[Change]:
    """Rules alone; of what they are not sure, a guess."""
    changes, doubts = ruled(block)
    return changes + kept(block, [change for doubt in doubts for change in guessed(block, *doubt, changes)])


DETECTORS: dict[str, Callable[[Block], list[Change]]] = {"cascade": cascade, "transnet": transnet, "rules": rules}


def _detector(name: str) -> Callable[[Block], list[Change]]:
    if name not in DETECTORS:
        raise ValueError(f"detector: {name!r} is unknown; it is one of {', '.join(DETECTORS)}")
    if name in ("cascade", "transnet"):
        from data_tools import transnet as network  # torch, which the others do without

        network.network()
    return DETECTORS[name]


def answered(block: Block, first: int, last: int, beside: int) -> list[Change]:
    """The changes that the network sees in pictures first .. last - 1, when it is shown so many more before and after them."""
    from data_tools import transnet as network

    sure = network.seen(rgb(block.thumbs), first, last, beside)
    out = []
    for a, b in runs((sure[:, 0] > POINT) | (sure[:, 1] > SPAN), 3):
        a, b, confidence = first + a, first + b, sure[a:b].max()
        if confidence < POINT:
            continue
        if b - a <= 3:  # it marks the last picture before a cut
            steps = block.steps[a:b + 2]
            at = a + int(np.argmax(steps))
            if steps.max() > 2 * np.delete(steps, np.argmax(steps)).max(initial=0) or b - a == 1:
                out.append(Change("cut", at, at, confidence))
                continue
        out.append(Change("gradual", a, b, confidence))
    return out


def rgb(thumbs: np.ndarray) -> np.ndarray:
    """Pictures in limited-range YUV of BT.709, uint8 [n 27 48 3], in RGB."""
    y, u, v = np.moveaxis(thumbs.astype(np.float32), 3, 0)
    y, u, v = (y - 16) * (255 / 219), (u - 128) * (255 / 224), (v - 128) * (255 / 224)
    planes = y + 1.5748 * v, y - 0.1873 * u - 0.4681 * v, y + 1.8556 * u
    return np.clip(np.rint(np.stack(planes, 3)), 0, 255).astype(np.uint8)


# The stage

def work(rows: list[manifest.Row], job: manifest.Job) -> list[manifest.Row]:
    """The rows with their `transitions`; one whose film cannot be read is dropped."""
    _detector(job.settings.detector)  # loads torch, if it is needed, before its threads are counted
    return [row | looked(job.out / row["path"], row, job.settings) for row in rows]


def looked(path: Path, row: manifest.Row, settings: Settings) -> manifest.Row:
    """What becomes of a row: transitions inside its span, in seconds from the file's first frame, or the reason to drop it."""
    try:
        start = row.get("start_s") or 0.0
        end = row["end_s"] if row.get("end_s") is not None else math.inf
        with one_thread():
            found = analyse(films.read(path, start, end, from_zero=False), settings.detector)
        return {"transitions": [asdict(each) for each in found]}
    except Exception as error:  # whatever a broken file does to a decoder or a rule costs this clip alone
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        return {"dropped": f"shots cannot be found ({kind}{str(error).removeprefix(f'{path}: ')})"}


@contextmanager
def one_thread() -> Iterator[None]:
    """Processes are the parallelism of a run; more threads wait for each other, and could change sums."""
    torch = sys.modules.get("torch")
    before = cv2.getNumThreads(), torch.get_num_threads() if torch else 1
    cv2.setNumThreads(1)
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        if torch:
            torch.set_num_threads(before[1])


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.shots", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a video file or a manifest (.parquet)")
    parser.add_argument("--out", type=Path, help="of a manifest: the one to write, beside it")
    parser.add_argument("--report", type=Path, help="of a file: the changes found, .json; printed if not given")
    parser.add_argument("--detector", default=Settings.detector, help=f"one of {', '.join(DETECTORS)}")
    args = parser.parse_args(argv)
    settings = Settings(args.detector)
    if args.source.suffix == ".parquet":
        return _many(args, settings)
    found = analyse(stage.watched(films.read(args.source), args.source.name), settings.detector)
    report = {"detector": settings.detector, "version": VERSION, "transitions": [asdict(each) for each in found]}
    if args.report is None:
        print(json.dumps(report, indent=1))
    else:
        stage.write_json(args.report, report)
    return 0


def _many(args: argparse.Namespace, settings: Settings) -> int:
    folder = args.source.parent
    if args.out is None or args.out.resolve().parent != folder.resolve():
        raise ValueError(f"--out: name a manifest in {folder}, where the rows' paths start")
    rows = manifest.read(args.source)
    job = manifest.Job(folder, settings)
    rows = [row if row.get("dropped") else work([row], job)[0] for row in tqdm(rows, desc="shots", unit=" clips", disable=None)]
    manifest.write(args.out, rows)
    live = [row for row in rows if not row.get("dropped")]
    counts = [len(row["transitions"]) for row in live]
    print(f"{args.out}: {len(rows)} clips, {len(rows) - len(live)} dropped, {sum(counts)} changes of shot in "
          f"{sum(map(bool, counts))} clips")
    return 0


if __name__ == "__main__":
    sys.exit(main())

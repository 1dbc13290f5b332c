"""Looks at a video file by decoding all of it: what it really holds, and what is odd about it. Headers are only a prior.

    python -m data_tools.probe IN.mp4 --report R.json

Oddities have fixed names, so that tables can count them: see ODDITIES. Levels are judged by ITU-R BT.601 and BT.709, whose
limited range keeps luma within 16 to 235.
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange
from tqdm import tqdm

from data_tools import film
from data_tools.stage import write_json
from latte.video import opened

ODDITIES = {
    "damaged": "parts of the file cannot be decoded",
    "missing pictures": "times leave gaps of a picture and more",
    "variable rate": "intervals between pictures differ by more than a tenth, gaps apart",
    "times fall": "times that do not rise, or pictures without any",
    "header count": "the header promises another number of pictures",
    "header rate": "the header's rate is not that of the times",
    "bad metadata": "text in the file is not UTF-8",
    "changing size": "pictures differ in size",
    "full range": "levels use the full range though the file does not say so",
    "narrow range": "levels keep to the limited range though the file says full",
    "interlaced flags": "pictures are flagged as interlaced",
    "mixed flags": "some pictures are flagged as interlaced and some are not, or the flagged order changes",
    "deep": "more than 8 bits",
    "rotated": "the file asks to be turned for display",
    "odd size": "an odd number of lines or columns",
    "oblong pixels": "pixels are not square",
    "one picture": "there is only one",
    "cover": "the video is the picture that goes with a sound file",
}
FIELD_ORDERS = {0: "", 1: "progressive", 2: "tff", 3: "bff", 4: "tff", 5: "bff"}  # FFmpeg's numbers of the flag


@dataclass
class Probe:
    """What was found. Sizes in pixels as stored, times in seconds."""

    codec: str = ""
    pixels: str = ""  # the pixel format
    width: int = 0
    height: int = 0
    pictures: int = 0  # decoded, with times that rise
    duration_s: float = 0.0
    rate: float = 0.0  # pictures a second, by the median interval
    flagged: float = 0.0  # share of pictures that are flagged as interlaced
    flagged_order: str = ""  # progressive, tff, bff or "": the container's word
    levels: tuple[int, int] = (0, 0)  # of luma, leaving out 0.1 % at either end
    oddities: dict[str, str] = field(default_factory=dict)  # name of ODDITIES -> the particulars
    unreadable: str | None = None  # why no picture can be had from the file

    def report(self) -> dict:
        """As JSON takes it."""
        verdict = "unreadable" if self.unreadable else "odd" if self.oddities else "fine"
        return {"verdict": verdict, "confidence": 1.0, "edits": [], **asdict(self)}


def probe(path: str | Path) -> Probe:
    """Decodes the file. A file that gives no picture does not raise: see `unreadable`."""
    found = Probe()
    try:
        _look(Path(path), found)
    except (ValueError, OSError, av.error.FFmpegError) as error:
        found.unreadable = str(error).removeprefix(f"{path}: ")
    return found


def _look(path: Path, found: Probe) -> None:
    with opened(path) as container:
        stream = container.streams.video[0]
        promised, header_rate, base = stream.frames, float(stream.average_rate or 0), float(stream.time_base or 0)
        aspect, cover = stream.sample_aspect_ratio or 1, bool(stream.disposition & av.stream.Disposition.attached_pic)
        found.flagged_order = FIELD_ORDERS.get(int(stream.codec_context.field_order or 0), "")
    problems: Counter = Counter()
    histogram, sizes, flags, times = np.zeros(256, np.int64), Counter(), [], []
    last = None
    bar = tqdm(film.frames(path, problems), desc=f"probe {path.name}", unit=" pictures", disable=None, leave=False)
    for count, frame in enumerate(bar):
        sizes[frame.width, frame.height] += 1
        flags.append(frame.interlaced_frame)
        if frame.pts is None or (times and frame.pts <= times[-1]):
            problems["time that does not rise"] += 1
        else:
            times.append(frame.pts)
        if count % 8 == 0:
            histogram += np.bincount(film.picture_of(frame, 0.0).y[::4, ::4].ravel(), minlength=256)
        last = frame
    if last is None:
        raise ValueError(f"no picture of it can be decoded{_counted(problems)}")
    found.codec, found.pixels, found.pictures = stream.codec_context.name, last.format.name, sum(sizes.values())
    (found.width, found.height), _ = sizes.most_common(1)[0]
    share = np.cumsum(histogram) / histogram.sum()
    found.levels = int(np.searchsorted(share, 0.001)), int(np.searchsorted(share, 0.999))
    found.flagged = float(np.mean(flags))
    steps = np.diff(times) * base
    step = float(np.median(steps)) if len(steps) else 1 / (header_rate or 25)
    found.rate, found.duration_s = 1 / step if step else 0.0, float(steps.sum()) + step
    gaps = steps[steps > 1.5 * step]
    uneven = steps[(steps <= 1.5 * step) & (np.abs(steps - step) > max(0.1 * step, 1.5 * base))]
    falls = problems.pop("time that does not rise", 0)
    full = last.color_range == ColorRange.JPEG or found.pixels.startswith("yuvj") or last.format.is_rgb
    deep = max(component.bits for component in last.format.components)
    order_changes = sum(a != b for a, b in itertools.pairwise(flags))
    for name, seen, particulars in (
            ("damaged", problems, _counted(problems).strip(" ()")),
            ("missing pictures", len(gaps), f"{round(float((gaps / step - 1).sum()))} in {len(gaps)} gaps"),
            ("variable rate", len(uneven) > 0.01 * len(steps), f"{len(uneven)} of {len(steps)} intervals"),
            ("times fall", falls, f"{falls} pictures"),
            ("header count", promised and promised != found.pictures, f"{promised} promised, {found.pictures} there"),
            ("header rate", header_rate and len(steps) > 1 and abs(header_rate - found.rate) > 0.02 * found.rate,
             f"{header_rate:.3f} promised, {found.rate:.3f} by the times"),
            ("bad metadata", not _decodes(path), "not UTF-8"),
            ("changing size", len(sizes) > 1, ", ".join(f"{w}x{h}: {n}" for (w, h), n in sizes.most_common())),
            ("full range", not full and (found.levels[0] < 10 or found.levels[1] > 245), f"levels {found.levels}"),
            ("narrow range", full and not last.format.is_rgb and found.levels[0] in (15, 16, 17) and 224 < found.levels[1] < 237,
             f"levels {found.levels}"),
            ("interlaced flags", found.flagged, f"{found.flagged:.0%} of the pictures, order {found.flagged_order or 'unknown'}"),
            ("mixed flags", 0 < found.flagged < 1, f"{order_changes} changes"),
            ("deep", deep > 8, f"{deep} bits"),
            ("rotated", last.rotation % 360, f"{last.rotation} degrees"),
            ("odd size", found.width % 2 or found.height % 2, f"{found.width}x{found.height}"),
            ("oblong pixels", aspect != 1, f"{aspect}"),
            ("one picture", found.pictures == 1, ""),
            ("cover", cover, "")):
        if seen:
            found.oddities[name] = particulars


def _decodes(path: Path) -> bool:
    try:
        av.open(str(path)).close()
    except UnicodeDecodeError:
        return False
    return True


def _counted(problems: Counter) -> str:
    return f" ({', '.join(f'{count} times {what}' for what, count in problems.most_common(5))})" if problems else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.probe", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a video file")
    parser.add_argument("--report", type=Path, help="what was found, .json; printed if not given")
    args = parser.parse_args(argv)
    found = probe(args.source)
    if args.report:
        write_json(args.report, found.report())
    else:
        print(json.dumps(found.report(), indent=1))
    if found.unreadable:
        print(f"error: {args.source}: {found.unreadable}", file=sys.stderr)
    return int(found.unreadable is not None)


if __name__ == "__main__":
    sys.exit(main())

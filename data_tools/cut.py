"""Writes clips for training: a file of exactly the frames that were picked, at an even rate.

    python -m data_tools.cut IN.parquet OUT.parquet [--height H --width W]

Frames go from the film's own planes into the file, never through RGB and never mixed, and the same frames give the same bytes. What
is needed to make a clip again is in its row: `origin`, the source file's span, and the edits in their order, of which the last one
holds the times of the frames in the film that the others made.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from data_tools import film as films
from data_tools import manifest, stitch
from data_tools.film import Film, Picture
from data_tools.manifest import Job, Row
from data_tools.stage import Edit
from latte import video
from latte.command import command
from latte.video import EPS_S

VERSION = "1"


@dataclass(frozen=True)
class Settings:
    """How clips are written."""

    fps: float = 8.0  # frames a second, those that data_tools.stitch picked for
    height: int = 0  # lines of the clips, which are scaled until they cover it and cut to their centre; 0: as the source
    width: int = 0  # columns
    crf: int = 12  # quality: 0 is lossless, 12 hardly to be told from it

    def __post_init__(self):
        if not 0 < self.fps <= 240:
            raise ValueError(f"fps: must be above 0 and at most 240, got {self.fps}")
        for key in ("height", "width"):
            size = getattr(self, key)
            if size < 0 or size % 2 or bool(self.height) != bool(self.width):
                raise ValueError(f"{key}: give both sides as even numbers, or 0 for the source's, got {size}")
        films.check_crf(self.crf)


def work(rows: list[Row], job: Job) -> list[Row]:
    """Every row with its clip in a file of its own. One that has no picked frames, or cannot be read, is dropped."""
    return [_row(row, job) for row in rows]


def _row(row: Row, job: Job) -> Row:
    if not row.get("picked"):
        return row | {"dropped": "no frames were picked"}
    path, source = f"clips/{row['id']}.mp4", job.out / row["path"]
    origin, stitched = row.get("origin"), any(edit["step"] == "stitch" for edit in row.get("edits") or [])
    of_source = not stitched and (not origin or origin["path"] == row["path"])  # not of a film that was cleaned or joined
    settings = asdict(job.settings) | {"picked": row["picked"], "of_source": of_source}
    try:
        if of_source:
            key = (origin or row).get("sha256") or stitch.source_digest(source)
            origin = {"path": row["path"], "sha256": key, "start_s": row["start_s"], "end_s": row["end_s"]}
        write(job.out / path, source, settings)
        shown = video.probe(job.out / path)
    except (ValueError, OSError) as error:
        return row | {"dropped": f"cannot be cut ({str(error).removeprefix(f'{source}: ')})"}
    edits = [*(row.get("edits") or []), stitch.written(Edit("cut", settings, 1.0, VERSION))]
    count, fps = len(row["picked"]), job.settings.fps
    return row | {"path": path, "sha256": manifest.sha256_of(job.out / path), "origin": origin, "edits": edits, "transitions": [],
                  "frames": count, "fps": fps, "start_s": 0.0, "end_s": count / fps, "picked": [i / fps for i in range(count)],
                  "width": shown.shown_width, "height": shown.shown_height}


def write(path: Path, source: Path, settings: dict[str, Any]) -> None:
    """Writes the pictures that `source` shows at the times settings["picked"]; the other settings are those of `Settings`.

    Raises ValueError naming the source if it has no picture at one of these times.
    """
    films.write(path, chosen(source, settings), settings["crf"], "medium")


def chosen(source: Path, settings: dict[str, Any]) -> Film:
    """The film of the picked pictures of a file at an even rate; see `write`."""
    times, rate = settings["picked"], Fraction(settings["fps"]).limit_denominator(1001)
    film = films.read(source, times[0], times[-1] + 10 * EPS_S, from_zero=False)
    kind = replace(film.kind, rate=rate)
    if settings["height"]:
        kind = replace(kind, width=settings["width"], height=settings["height"], aspect=Fraction(1), turns=0)

    def pictures() -> Iterator[Picture]:
        count = 0
        for picture in film:
            if count < len(times) and abs(picture.at_s - times[count]) <= 2 * EPS_S:
                sized = fitted(picture, film.kind, settings["height"], settings["width"]) if settings["height"] else picture
                yield sized._replace(at_s=float(count / rate))
                count += 1
        if count < len(times):
            raise ValueError(f"{source}: shows no picture at {times[count]:.6f} s")

    return replace(film, kind=kind, pictures=pictures)


def fitted(picture: Picture, kind: films.Kind, height: int, width: int) -> Picture:
    """The upright picture in square pixels, scaled (by area where it shrinks) until it covers height x width, its centre."""
    upright = picture.each(lambda plane: np.rot90(plane, kind.turns))
    h, w = upright.y.shape
    shown = w / float(kind.aspect) if kind.turns % 2 else w * float(kind.aspect)  # columns of square pixels
    scale = max(height / h, width / shown)
    large = (max(height, round(h * scale / 2) * 2), max(width, round(shown * scale / 2) * 2))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC

    def sized(plane: np.ndarray, part: int) -> np.ndarray:
        rows, columns = large[0] // part, large[1] // part
        plane = cv2.resize(np.ascontiguousarray(plane), (columns, rows), interpolation=how)
        top, left = (rows - height // part) // 2, (columns - width // part) // 2
        return plane[top:top + height // part, left:left + width // part]

    return Picture(sized(upright.y, 1), sized(upright.u, 2), sized(upright.v, 2), picture.at_s)


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.cut", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a manifest with picked frames")
    parser.add_argument("out", type=Path, help="the manifest to write, in the same folder; files go to clips beside it")
    for name, meaning in (("fps", "frames a second"), ("height", "lines, 0 as the source"), ("width", "columns, 0 as the source"),
                          ("crf", "quality, 0 is lossless")):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=meaning)
    args = parser.parse_args(argv)
    if args.out.resolve().parent != args.source.resolve().parent:
        raise ValueError(f"--out: name a manifest in {args.source.resolve().parent}, where the paths of its rows start")
    job = Job(args.out.parent, Settings(args.fps, args.height, args.width, args.crf))
    rows = tqdm(manifest.read(args.source), desc="cut", unit=" clips", disable=None)
    done = [row if row["dropped"] else _row(row, job) for row in rows]
    manifest.write(args.out, done, manifest.about(args.source))
    dropped = sum(bool(row["dropped"]) for row in done)
    print(f"{args.out}: {len(done) - dropped} clips, {dropped} rows dropped")
    return 0


if __name__ == "__main__":
    sys.exit(main())

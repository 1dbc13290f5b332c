"""Where clips come from: the embedded world, video files, and latents cached before.

A source tells which clips a shape can have (`pool`) and makes one of them (`clip`). What a clip looks like is a function of (seed,
clip, variant): variants are its different starts, rates, crops and flips. Sources have no state: any process may ask for any clip.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from latte import keyed, video
from latte.codec import to_tensor
from latte.config import DataConfig, ShapeConfig
from latte.world.caption import caption
from latte.world.render import render
from latte.world.scene import Scene, sample_scene

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Clip:
    x: Tensor  # pixels [f 3 h w] in [-1, 1], or cached latents [f c h w]
    fps: float
    caption: str
    std: Tensor | None = None  # [f c h w] cached: spread of the VAE's posterior, where it is to be sampled
    states: Tensor | None = None  # [l d] cached: of the caption


@dataclass(frozen=True)
class Pool:
    """The clips that a shape can have: numbers from 0 to size - 1, or any number where size is 0."""

    size: int
    dropped: Counter = field(default_factory=Counter)  # reason -> clips that the shape cannot have


class Source(Protocol):
    classes: list[str]  # of a class-conditional data set, sorted
    variants: int  # different variants of each clip; 0 = without end
    dropped: dict[str, str]  # file or row that no shape can have -> reason

    def pool(self, shape: ShapeConfig) -> Pool: ...

    def clip(self, shape: ShapeConfig, index: int, variant: int) -> Clip:
        """Clip `index` of the shape's pool. Raises ValueError naming the file if it cannot be read."""

    def image(self, shape: ShapeConfig, index: int, variant: int, draw: np.random.Generator) -> Clip:
        """A frame, drawn by `draw`, of clip `index`."""


class WorldClips:
    """Clips of the embedded world: scene, caption and pixels are functions of (seed, index). Variants differ in their rate
    alone."""

    def __init__(self, cfg: DataConfig, seed: int):
        self.cfg, self.seed, self.classes, self.variants, self.dropped = cfg, seed, [], cfg.variants, {}

    def pool(self, shape: ShapeConfig) -> Pool:
        return Pool(self.cfg.clips)

    def clip(self, shape: ShapeConfig, index: int, variant: int) -> Clip:
        fps = _rate(shape, self.seed, index, variant)
        return self._clip(shape, index, np.arange(shape.frames) / fps, fps)

    def image(self, shape: ShapeConfig, index: int, variant: int, draw: np.random.Generator) -> Clip:
        fps = _rate(shape, self.seed, index, variant)
        return self._clip(shape, index, np.array([draw.integers(shape.frames) / fps]), fps)

    def _clip(self, shape: ShapeConfig, index: int, times: np.ndarray, fps: float) -> Clip:
        rng = keyed.rng(self.seed, "scene", index)
        scene = sample_scene(rng, self.cfg.world, "train", shape.frames / fps, shape.width / shape.height)
        frames = render(scene, shape.height, shape.width, times)
        return Clip(to_tensor(frames)[0], fps, caption(scene, self._words(scene, index), "train"))

    def _words(self, scene: Scene, index: int) -> np.random.Generator:
        """What the caption draws from: with data.wordings, scenes that differ in their starts alone share so many captions."""
        if not self.cfg.wordings:
            return keyed.rng(self.seed, "caption", index)
        told = [replace(obj, start=(0.0, 0.0)) for obj in scene.objects]
        return keyed.rng(self.seed, "wording", index % self.cfg.wordings, repr((told, scene.camera)))


@dataclass(frozen=True)
class _File:
    """A span of a video file, or a folder of images that are the frames of a clip."""

    id: str  # what its draws are keyed by: no path of a machine, so that a moved folder trains the same
    path: Path
    caption: str
    frames: int = 0
    fps: float = 0.0
    start_s: float = 0.0
    width: int = 0  # upright, in square pixels; 0 = not known
    height: int = 0
    images: tuple[Path, ...] = ()

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


class FileClips:
    """Clips of a folder or a manifest. data.layout says how clips and captions lie in a folder:

    captions  videos anywhere below, `name.txt` beside `name.mp4`, or captions.csv with columns file and caption
    videos    videos anywhere below, without captions (FaceForensics)
    classes   a folder for each class with its videos below; the class's name is the caption (UCF101)
    frames    folders of images, each one clip at base_fps, in the order of the last number in their names (SkyTimelapse, Taichi-HD)

    A manifest is a Parquet file with a row a clip (data_tools.manifest has its schema); rows with `dropped` set are left out.
    data.clip_rule says which frames make a clip of n:

    time      those nearest in time to a start + i / fps, at one of the shape's rates
    stride    every frame_interval-th frame of a window of n * frame_interval
    linspace  n frames evenly over such a window, the last one included, indices rounded down

    A source shorter than a window takes all of it under linspace and is left out under the other rules. The rules and layouts of
    the published recipes are those of Ma et al. (arXiv 2401.03048). Of shapes with equal frame counts, a clip belongs to the one
    that crops it least, if to any (data.max_crop). Raises ValueError naming the folder when no usable clip is in it. `dropped` maps
    each file that no shape can use to the reason.
    """

    def __init__(self, cfg: DataConfig, seed: int, shapes: list[ShapeConfig]):
        self.cfg, self.seed, self.shapes, self.variants = cfg, seed, shapes, cfg.variants
        self.dropped = {}
        found = list((self._manifest if cfg.source == "manifest" else self._folder)(Path(cfg.path)))
        self._pools = {shape_key(shape): self._sorted_out(found, shape) for shape in shapes}
        used = {file.id for files, _ in self._pools.values() for file in files}
        for file in found:
            if file.id not in used:
                self.dropped[file.id] = "; ".join(dict.fromkeys(self._misfit(file, shape) for shape in shapes))
        if not used:
            reasons = "".join(f"\n  {name}: {why}" for name, why in list(self.dropped.items())[:10])
            hint = "; put name.txt beside name.mp4, or a captions.csv with columns file and caption" if (
                cfg.source == "folder" and cfg.layout == "captions") else ""
            raise ValueError(f"data.path: {cfg.path} holds no usable clip for data.source = {cfg.source} and data.layout = "
                             f"{cfg.layout}{hint}{reasons}")
        self.classes = sorted({file.caption for file in found}) if cfg.layout == "classes" else []

    def pool(self, shape: ShapeConfig) -> Pool:
        files, dropped = self._pools[shape_key(shape)]
        return Pool(len(files), dropped)

    def clip(self, shape: ShapeConfig, index: int, variant: int) -> Clip:
        file = self._pools[shape_key(shape)][0][index]
        times, fps = self._times(file, shape, variant)
        return Clip(self._read(file, times, shape, variant), fps, file.caption)

    def image(self, shape: ShapeConfig, index: int, variant: int, draw: np.random.Generator) -> Clip:
        file = self._pools[shape_key(shape)][0][index]
        times, fps = self._times(file, shape, variant)
        return Clip(self._read(file, [times[int(draw.integers(len(times)))]], shape, variant), fps, file.caption)

    def _folder(self, folder: Path) -> Iterator[_File]:
        if not folder.is_dir():
            raise ValueError(f"data.path: {folder} is not a folder")
        listed = {"captions": _captioned, "videos": _uncaptioned, "classes": _classes, "frames": _frame_folders}[self.cfg.layout]
        for path, text, images in listed(folder):
            name = path.relative_to(folder).as_posix()
            if self.cfg.layout in ("captions", "classes") and not text.strip():
                self.dropped[name] = "no caption"
            elif images:
                yield _File(name, path, text.strip(), len(images), self.cfg.base_fps, images=tuple(images))
            else:
                try:
                    info = video.probe(path)
                except ValueError as error:
                    self.dropped[name] = str(error)
                    continue
                if not (info.frames and info.fps):
                    self.dropped[name] = "its header tells neither a rate nor a length"
                    continue
                yield _File(name, path, text.strip(), info.frames, info.fps, width=info.shown_width, height=info.shown_height)

    def _manifest(self, path: Path) -> Iterator[_File]:
        for number, row in enumerate(_rows(path)):
            try:
                if row["dropped"]:
                    self.dropped[row["id"] or f"row {number}"] = row["dropped"]
                    continue
                seconds = float(row["end_s"]) - float(row["start_s"])
                fps = float(row["fps"])
                if not (seconds > 0 and fps > 0 and row["start_s"] >= 0 and row["id"] and row["path"]):
                    raise ValueError("needs id, path, fps > 0 and 0 <= start_s < end_s")
                yield _File(row["id"], path.parent / row["path"], (row["caption"] or "").strip(), round(seconds * fps), fps,
                            float(row["start_s"]), int(row["width"] or 0), int(row["height"] or 0))
            except (TypeError, ValueError, OverflowError) as error:  # the last one of an infinite length
                self.dropped[f"row {number}"] = f"unreadable manifest row ({error})"

    def _sorted_out(self, found: list[_File], shape: ShapeConfig) -> tuple[list[_File], Counter]:
        files, dropped = [], Counter()
        for file in found:
            why = self._misfit(file, shape)
            if why:
                dropped[why] += 1
            else:
                files.append(file)
        return files, dropped

    def _misfit(self, file: _File, shape: ShapeConfig) -> str | None:
        """Why a shape cannot have this file, or None."""
        if self.cfg.clip_rule == "time":
            needed = (shape.frames - 1) / min(shape.fps)
            if file.seconds - 1 / file.fps - needed < -0.5 / file.fps:
                return f"shorter than the {needed:g} s it needs"
        elif self.cfg.clip_rule == "stride" and file.frames < shape.frames * self.cfg.frame_interval:
            return f"fewer than {shape.frames * self.cfg.frame_interval} frames"
        lost = _lost(file, shape)
        if lost > self.cfg.max_crop:
            return f"would lose more than {self.cfg.max_crop:.0%} of its picture"
        rivals = [other for other in self.shapes if other.frames == shape.frames]
        best = min(rivals, key=lambda other: (_lost(file, other), -other.height * other.width))
        if _lost(file, best) < lost:
            return "fits another shape better"
        return None

    def _times(self, file: _File, shape: ShapeConfig, variant: int) -> tuple[list[float], float]:
        """Seconds of the frames that make a clip, from the file's first frame, and its rate."""
        draw = keyed.rng(self.seed, "start", file.id, variant)
        fps = _rate(shape, self.seed, file.id, variant)
        if self.cfg.clip_rule == "time":
            spare = max(file.seconds - 1 / file.fps - (shape.frames - 1) / fps, 0.0)
            start = file.start_s + draw.uniform(0, spare)
            return [start + i / fps for i in range(shape.frames)], fps
        window = shape.frames * self.cfg.frame_interval
        start = int(draw.integers(max(0, file.frames - window - 1) + 1))
        end = min(start + window, file.frames)
        index = (np.arange(start, end, self.cfg.frame_interval) if self.cfg.clip_rule == "stride" else
                 np.linspace(start, end - 1, shape.frames).astype(int))
        return [file.start_s + i / file.fps for i in index], fps

    def _read(self, file: _File, times: list[float], shape: ShapeConfig, variant: int) -> Tensor:
        where = keyed.rng(self.seed, "crop", file.id, variant).random() if self.cfg.crop == "random" else 0.5
        if file.images:
            chosen = [file.images[min(round(time * file.fps), file.frames - 1)] for time in times]
            frames = video.read_images(chosen, shape.height, shape.width, crop=where)
        else:
            frames = video.read_at(file.path, times, shape.height, shape.width, crop=where, backend=self.cfg.decoder)
        mirrored = self.cfg.flip and keyed.rng(self.seed, "flip", file.id, variant).random() < 0.5
        return to_tensor(frames[:, :, ::-1] if mirrored else frames)[0]


def left_out(dropped: dict[str, str], most: int = 20) -> list[str]:
    """Lines that name clips that are not used; of more than `most`, how many there are for each reason, as it begins."""
    if len(dropped) <= most:
        return [f"left out {name}: {why}" for name, why in dropped.items()]
    reasons = Counter(re.split(r"[:;(]", why)[0].strip() for why in dropped.values())
    return [f"left out {count}: {why}" for why, count in reasons.most_common(most)]


def shape_key(shape: ShapeConfig) -> tuple:
    """Shapes with equal keys share their clips."""
    return shape.frames, shape.height, shape.width, tuple(shape.fps)


def _rate(shape: ShapeConfig, seed: int, clip: int | str, variant: int) -> float:
    return shape.fps[int(keyed.rng(seed, "fps", clip, variant).integers(len(shape.fps)))]


def _lost(file: _File, shape: ShapeConfig) -> float:
    """Share of the picture that a crop to the shape's aspect takes away."""
    if not file.width or not file.height:
        return 0.0
    ratio = (file.width / file.height) / (shape.width / shape.height)
    return 1 - min(ratio, 1 / ratio)


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise ValueError(f"data.path: {path}: no such manifest")
    try:
        import pyarrow  # of the extra [data]
        import pyarrow.parquet
    except ImportError:
        raise ValueError("data.source: a manifest is read with pyarrow, which is not installed: pip install pyarrow") from None
    columns = ["id", "path", "start_s", "end_s", "fps", "width", "height", "caption", "dropped"]
    try:
        return pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"data.path: {path}: not a Parquet manifest with the columns {', '.join(columns)} ({error})") from None


Listed = Iterator[tuple[Path, str, list[Path]]]  # file or folder, caption, images


def _captioned(folder: Path) -> Listed:
    table = folder / "captions.csv"
    if table.is_file():
        with open(table, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not {"file", "caption"} <= set(rows.fieldnames or ()):
                raise ValueError(f"{table}: needs the columns file and caption, has {rows.fieldnames}")
            for row in rows:
                yield folder / row["file"], row["caption"] or "", []
        return
    for path in _videos(folder):
        beside = path.with_suffix(".txt")
        yield path, beside.read_text(encoding="utf-8") if beside.is_file() else "", []


def _uncaptioned(folder: Path) -> Listed:
    for path in _videos(folder):
        yield path, "", []


def _classes(folder: Path) -> Listed:
    for path in _videos(folder):
        parts = path.relative_to(folder).parts
        yield path, parts[0] if len(parts) > 1 else "", []


def _frame_folders(folder: Path) -> Listed:
    for place in sorted({path.parent for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES}):
        images = [path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        yield place, "", sorted(images, key=lambda path: (int((re.findall(r"\d+", path.stem) or ["0"])[-1]), path.name))


def _videos(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)

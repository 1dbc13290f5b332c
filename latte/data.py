"""Clips and their captions in batches, in an order that is a function of (seed, stages, step) alone.

Sample `position` p counts the samples of the whole run, over all stages. Sources give the clip of a position; the batch of an
update is a range of positions, and each process takes its slice. Nothing here has a state: to resume, start at a step.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from latte import keyed, video
from latte.codec import to_tensor
from latte.config import DataConfig, StageConfig
from latte.world.caption import caption
from latte.world.render import render
from latte.world.scene import Scene, sample_scene

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Batch:
    step: int  # the update this batch is for, from 0
    stage: int
    positions: list[int]
    frames: torch.Tensor  # [b f+images 3 h w] in [-1, 1]
    fps: torch.Tensor  # [b] frames per second of each clip
    captions: list[list[str]]  # [b][1+images] of the clip and of each image; empty where dropped


class WorldClips:
    """Clips of the embedded world: scene, caption and pixels are functions of (seed, position)."""

    def __init__(self, cfg: DataConfig, seed: int):
        self.cfg, self.seed, self.classes = cfg, seed, []

    def clip(self, position: int, stage: StageConfig, fps: float) -> tuple[np.ndarray, str]:
        """Frames uint8 [f h w 3] and the caption."""
        scene_id = _shuffled(position, self.cfg.clips, self.seed) if self.cfg.clips else position
        seconds = stage.frames / fps
        scene = sample_scene(keyed.rng(self.seed, "scene", scene_id), self.cfg.world, "train", seconds, stage.width / stage.height)
        frames = render(scene, stage.height, stage.width, np.arange(stage.frames) / fps)
        return frames, caption(scene, self._words(scene, scene_id), "train")

    def image(self, position: int, number: int, stage: StageConfig) -> tuple[np.ndarray, str]:
        """A frame uint8 [1 h w 3] of another scene, and its caption."""
        scene_id = int(keyed.rng(self.seed, "image", position, number).integers(2**62))
        scene = sample_scene(keyed.rng(self.seed, "scene", scene_id), self.cfg.world, "train", 0.0625, stage.width / stage.height)
        return render(scene, stage.height, stage.width, np.zeros(1)), caption(scene, self._words(scene, scene_id), "train")

    def _words(self, scene: Scene, scene_id: int) -> np.random.Generator:
        """What the caption draws from: with data.wordings, scenes that differ in their starts alone share so many captions."""
        if not self.cfg.wordings:
            return keyed.rng(self.seed, "caption", scene_id)
        told = [replace(obj, start=(0.0, 0.0)) for obj in scene.objects]
        return keyed.rng(self.seed, "wording", scene_id % self.cfg.wordings, repr((told, scene.camera)))


@dataclass(frozen=True)
class _Source:
    """A video file, or a folder of images that are the frames of a clip."""

    path: Path
    caption: str
    frames: int
    fps: float
    images: tuple[Path, ...] = ()


class FolderClips:
    """Clips of a folder; data.layout says how they and their captions lie in it:

    captions  videos anywhere below, `name.txt` beside `name.mp4`, or captions.csv with columns file and caption
    videos    videos anywhere below, without captions (FaceForensics)
    classes   a folder for each class with its videos below; the class's name is the caption (UCF101)
    frames    folders of images, each one clip at base_fps, in the order of the last number in their names (SkyTimelapse, Taichi-HD)

    data.clip_rule says which frames make a clip of n:

    time      those nearest in time to a start + i / fps, at one of the stage's rates
    stride    every frame_interval-th frame of a window of n * frame_interval
    linspace  n frames evenly over such a window, the last one included, indices rounded down

    The start, and with data.flip whether the clip is mirrored, are drawn for each position. A source shorter than a window takes
    all of it under linspace and is left out under the other rules. The rules and layouts of the published recipes are those of
    Ma et al. (arXiv 2401.03048).
    Raises ValueError naming the folder when no usable clip is in it. `dropped` maps each file that was left out to the reason.
    """

    def __init__(self, cfg: DataConfig, seed: int, stages: list[StageConfig]):
        self.cfg, self.seed, self.dropped = cfg, seed, {}
        if not Path(cfg.path).is_dir():
            raise ValueError(f"data.path: {cfg.path} is not a folder")
        self.needed_s = max((stage.frames - 1) / min(stage.fps) for stage in stages)
        self.needed_frames = max(stage.frames for stage in stages) * cfg.frame_interval
        listed = {"captions": _captioned, "videos": _uncaptioned, "classes": _classes, "frames": _frame_folders}[cfg.layout]
        found = [self._probe(path, text, images) for path, text, images in listed(Path(cfg.path))]
        self.clips = [source for source in found if source]
        if not self.clips:
            reasons = "".join(f"\n  {path}: {why}" for path, why in list(self.dropped.items())[:10])
            raise ValueError(f"data.path: {cfg.path} holds no usable video with a caption; put name.txt beside name.mp4, or a "
                             f"captions.csv with columns file and caption{reasons}" if cfg.layout == "captions" else
                             f"data.path: {cfg.path} holds no usable clip for data.layout = {cfg.layout}{reasons}")
        self.classes = sorted({source.caption for source in self.clips}) if cfg.layout == "classes" else []

    def _probe(self, path: Path, text: str, images: list[Path]) -> _Source | None:
        if self.cfg.layout in ("captions", "classes") and not text.strip():
            self.dropped[path] = "no caption"
            return None
        if images:
            source = _Source(path, text.strip(), len(images), self.cfg.base_fps, tuple(images))
        else:
            try:
                info = video.probe(path)
            except ValueError as error:
                self.dropped[path] = str(error)
                return None
            source = _Source(path, text.strip(), info.frames, info.fps)
        long, needed = source.frames / source.fps, self.needed_s
        if self.cfg.clip_rule == "time" and long - 1 / source.fps - needed < -0.5 / source.fps:
            self.dropped[path] = f"{long:.2f} s long, the stages need {needed:.2f} s"
            return None
        if self.cfg.clip_rule == "stride" and source.frames < self.needed_frames:
            self.dropped[path] = f"{source.frames} frames long, the stages need {self.needed_frames}"
            return None
        return source

    def clip(self, position: int, stage: StageConfig, fps: float) -> tuple[np.ndarray, str]:
        """Frames uint8 [f h w 3] from a start drawn for this position, and the caption."""
        source = self.clips[_shuffled(position, len(self.clips), self.seed)]
        draw = keyed.rng(self.seed, "start", position)
        if self.cfg.clip_rule == "time":
            spare = max(source.frames / source.fps - 1 / source.fps - self.needed_s, 0.0)
            start = draw.uniform(0, spare)
            times = [start + i / fps for i in range(stage.frames)]
        else:
            window = stage.frames * self.cfg.frame_interval
            start = int(draw.integers(max(0, source.frames - window - 1) + 1))
            end = min(start + window, source.frames)
            index = (np.arange(start, end, self.cfg.frame_interval) if self.cfg.clip_rule == "stride" else
                     np.linspace(start, end - 1, stage.frames).astype(int))
            times = [i / source.fps for i in index]
        return self._mirrored(self._read(source, times, stage), position), source.caption

    def image(self, position: int, number: int, stage: StageConfig) -> tuple[np.ndarray, str]:
        """One frame uint8 [1 h w 3] drawn from all clips for the `number`-th image of a position, and its clip's caption."""
        draw = keyed.rng(self.seed, "image", position, number)
        source = self.clips[int(draw.integers(len(self.clips)))]
        times = [int(draw.integers(source.frames)) / source.fps]
        return self._read(source, times, stage), source.caption

    def _read(self, source: _Source, times: list[float], stage: StageConfig) -> np.ndarray:
        if source.images:
            chosen = [source.images[min(round(time * source.fps), source.frames - 1)] for time in times]
            return video.read_images(chosen, stage.height, stage.width)
        return video.read_at(source.path, times, stage.height, stage.width)

    def _mirrored(self, frames: np.ndarray, position: int) -> np.ndarray:
        flipped = self.cfg.flip and keyed.rng(self.seed, "flip", position).random() < 0.5
        return frames[:, :, ::-1] if flipped else frames


def open_clips(cfg: DataConfig, seed: int, stages: list[StageConfig]) -> WorldClips | FolderClips:
    return WorldClips(cfg, seed) if cfg.source == "world" else FolderClips(cfg, seed, stages)


def make_loader(clips: WorldClips | FolderClips, cfg: DataConfig, stages: list[StageConfig], seed: int,
                start_step: int = 0, rank: int = 0, ranks: int = 1) -> DataLoader:
    """Batches for every update from `start_step` to the last stage's end; rank r of n gets the r-th slice of each.

    Raises ValueError naming the stage whose batch size does not divide by the number of processes.
    """
    for index, stage in enumerate(stages):
        if stage.batch_size % ranks:
            raise ValueError(f"stages.{index}.batch_size: {stage.batch_size} does not divide by the {ranks} processes")
    steps = _Steps(stages, start_step, rank, ranks)
    return DataLoader(_Samples(clips, cfg, stages, seed), batch_sampler=steps, num_workers=cfg.workers, collate_fn=_collate)


class _Steps(Sampler):
    """Yields for each update the list of (step, stage, position) that this process loads."""

    def __init__(self, stages: list[StageConfig], start_step: int, rank: int, ranks: int):
        self.stages, self.start_step, self.rank, self.ranks = stages, start_step, rank, ranks

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        step = position = 0
        for index, stage in enumerate(self.stages):
            share = stage.batch_size // self.ranks
            for _ in range(stage.steps):
                if step >= self.start_step:
                    first = position + self.rank * share
                    yield [(step, index, first + i) for i in range(share)]
                step += 1
                position += stage.batch_size

    def __len__(self) -> int:
        return max(sum(stage.steps for stage in self.stages) - self.start_step, 0)


class _Samples(Dataset):
    def __init__(self, clips: WorldClips | FolderClips, cfg: DataConfig, stages: list[StageConfig], seed: int):
        self.clips, self.cfg, self.stages, self.seed = clips, cfg, stages, seed

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        step, index, position = key
        stage = self.stages[index]
        fps = stage.fps[keyed.rng(self.seed, "fps", position).integers(len(stage.fps))]
        clips = [self.clips.clip(position, stage, fps)]
        clips += [self.clips.image(position, number, stage) for number in range(stage.image_frames)]
        frames = np.concatenate([frames for frames, _ in clips])  # [f+images h w 3]
        captions = [self._kept(text, position, number) for number, (_, text) in enumerate(clips)]
        return Batch(step, index, [position], to_tensor(frames), torch.tensor([fps]), [captions])

    def _kept(self, text: str, position: int, number: int) -> str:
        key = ("caption dropout", position) if number == 0 else ("caption dropout", position, number)
        return "" if keyed.rng(self.seed, *key).random() < self.cfg.caption_dropout else text


def _collate(samples: list[Batch]) -> Batch:
    return Batch(samples[0].step, samples[0].stage, [s.positions[0] for s in samples], torch.cat([s.frames for s in samples]),
                 torch.cat([s.fps for s in samples]), [s.captions[0] for s in samples])


def _shuffled(position: int, size: int, seed: int) -> int:
    """The clip at a position when `size` clips are gone through in a new order each epoch."""
    epoch, index = divmod(position, size)
    return int(keyed.rng(seed, "order", epoch).permutation(size)[index])


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

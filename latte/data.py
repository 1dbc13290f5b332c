"""Clips and their captions in batches, in an order that is a function of (seed, stages, step) alone.

Sample `position` p counts the samples of the whole run, over all stages. Sources give the clip of a position; the batch of an
update is a range of positions, and each process takes its slice. Nothing here has a state: to resume, start at a step.
"""

import csv
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


@dataclass(frozen=True)
class Batch:
    step: int  # the update this batch is for, from 0
    stage: int
    positions: list[int]
    frames: torch.Tensor  # [b f 3 h w] in [-1, 1]
    fps: torch.Tensor  # [b] frames per second of each clip
    captions: list[str]  # empty where dropped


class WorldClips:
    """Clips of the embedded world: scene, caption and pixels are functions of (seed, position)."""

    def __init__(self, cfg: DataConfig, seed: int):
        self.cfg, self.seed = cfg, seed

    def clip(self, position: int, stage: StageConfig, fps: float) -> tuple[np.ndarray, str]:
        """Frames uint8 [f h w 3] and the caption."""
        scene_id = _shuffled(position, self.cfg.clips, self.seed) if self.cfg.clips else position
        seconds = stage.frames / fps
        scene = sample_scene(keyed.rng(self.seed, "scene", scene_id), self.cfg.world, "train", seconds, stage.width / stage.height)
        frames = render(scene, stage.height, stage.width, np.arange(stage.frames) / fps)
        return frames, caption(scene, self._words(scene, scene_id), "train")

    def _words(self, scene: Scene, scene_id: int) -> np.random.Generator:
        """What the caption draws from: with data.wordings, scenes that differ in their starts alone share so many captions."""
        if not self.cfg.wordings:
            return keyed.rng(self.seed, "caption", scene_id)
        told = [replace(obj, start=(0.0, 0.0)) for obj in scene.objects]
        return keyed.rng(self.seed, "wording", scene_id % self.cfg.wordings, repr((told, scene.camera)))


class FolderClips:
    """Videos of a folder with a caption each: `name.txt` beside `name.mp4`, or captions.csv with columns file and caption.

    Raises ValueError naming the folder when no usable clip is in it. `dropped` maps each file that was left out to the reason.
    """

    def __init__(self, cfg: DataConfig, seed: int, stages: list[StageConfig]):
        self.seed, self.dropped = seed, {}
        self.needed_s = max((stage.frames - 1) / min(stage.fps) for stage in stages)
        self.clips = [entry for entry in (self._probe(path, text) for path, text in _captioned(Path(cfg.path))) if entry]
        if not self.clips:
            reasons = "".join(f"\n  {path}: {why}" for path, why in list(self.dropped.items())[:10])
            raise ValueError(f"data.path: {cfg.path} holds no usable video with a caption; put name.txt beside name.mp4, or a "
                             f"captions.csv with columns file and caption{reasons}")

    def _probe(self, path: Path, text: str) -> tuple[Path, str, float] | None:
        if not text.strip():
            self.dropped[path] = "no caption"
            return None
        try:
            info = video.probe(path)
        except ValueError as error:
            self.dropped[path] = str(error)
            return None
        spare = info.frames / info.fps - 1 / info.fps - self.needed_s
        if spare < -0.5 / info.fps:
            self.dropped[path] = f"{info.frames / info.fps:.2f} s long, the stages need {self.needed_s:.2f} s"
            return None
        return path, text.strip(), max(spare, 0.0)

    def clip(self, position: int, stage: StageConfig, fps: float) -> tuple[np.ndarray, str]:
        """Frames uint8 [f h w 3] from a start drawn for this position, and the caption."""
        path, text, spare = self.clips[_shuffled(position, len(self.clips), self.seed)]
        start = keyed.rng(self.seed, "start", position).uniform(0, spare)
        return video.read(path, start, stage.frames, fps, stage.height, stage.width), text


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
        frames, text = self.clips.clip(position, stage, fps)
        if keyed.rng(self.seed, "caption dropout", position).random() < self.cfg.caption_dropout:
            text = ""
        return Batch(step, index, [position], to_tensor(frames), torch.tensor([fps]), [text])


def _collate(samples: list[Batch]) -> Batch:
    return Batch(samples[0].step, samples[0].stage, [s.positions[0] for s in samples], torch.cat([s.frames for s in samples]),
                 torch.cat([s.fps for s in samples]), [s.captions[0] for s in samples])


def _shuffled(position: int, size: int, seed: int) -> int:
    """The clip at a position when `size` clips are gone through in a new order each epoch."""
    epoch, index = divmod(position, size)
    return int(keyed.rng(seed, "order", epoch).permutation(size)[index])


def _captioned(folder: Path) -> list[tuple[Path, str]]:
    if not folder.is_dir():
        raise ValueError(f"data.path: {folder} is not a folder")
    table = folder / "captions.csv"
    if table.is_file():
        with open(table, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not {"file", "caption"} <= set(rows.fieldnames or ()):
                raise ValueError(f"{table}: needs the columns file and caption, has {rows.fieldnames}")
            return [(folder / row["file"], row["caption"] or "") for row in rows]
    videos = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    return [(p, p.with_suffix(".txt").read_text(encoding="utf-8") if p.with_suffix(".txt").is_file() else "") for p in videos]

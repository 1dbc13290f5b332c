"""Which clips an update sees, in what batches: functions of (seed, stages, step), so that nothing here has a state to save.

Sample `position` p counts the samples of the whole run, over all stages and buckets; it keys the noise, the timestep and the
dropped captions of a sample. `draw` counts those of one clip shape; it tells which clip comes, in an order that is new in every
epoch. The batch of an update is a range of both, and each process takes its slice. To resume, start at a step.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from latte import keyed
from latte.cached import CachedClips
from latte.clips import Clip, FileClips, Source, WorldClips, shape_key
from latte.config import DataConfig, ShapeConfig, StageConfig

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, fill the unit interval evenly however many there are
MAX_UNREADABLE = 8  # clips in a row; a disk that went away is not a damaged file


@dataclass(frozen=True)
class Batch:
    step: int  # the update this batch is for, from 0
    stage: int
    bucket: int
    positions: list[int]
    x: torch.Tensor  # [b f+images c h w] pixels in [-1, 1], or cached latents
    fps: torch.Tensor  # [b] frames per second of each clip
    captions: list[list[str]]  # [b][1+images] of the clip and of each image; empty where dropped
    std: torch.Tensor | None = None  # like x, cached: the spread of the VAE's posterior
    states: list[list[torch.Tensor]] | None = None  # [b][1+images] of [l d], cached: of the captions
    notes: tuple[str, ...] = ()  # what was read instead of what, and why

    def part(self, cut: slice) -> "Batch":
        """The samples of a slice."""
        return Batch(self.step, self.stage, self.bucket, self.positions[cut], self.x[cut], self.fps[cut], self.captions[cut],
                     None if self.std is None else self.std[cut], None if self.states is None else self.states[cut], self.notes)


@dataclass(frozen=True)
class Turn:
    """What an update takes: `count` samples from `position` and `draw` on."""

    step: int
    stage: int
    bucket: int
    position: int
    draw: int
    count: int


class Schedule:
    """The turns of all updates. A stage's buckets come in the order of a low-discrepancy sequence, so that after any number of
    updates each has had its share to within a few updates."""

    def __init__(self, stages: list[StageConfig], seed: int):
        self.stages = stages
        which, stage_of, counts = [], [], []
        for index, stage in enumerate(stages):
            ends = np.cumsum(stage.shares)
            first = keyed.rng(seed, "buckets", index).random()
            chosen = np.searchsorted(ends[:-1], (first + GOLDEN * np.arange(stage.steps)) % 1.0, side="right")
            which.append(chosen)
            stage_of.append(np.full(stage.steps, index))
            counts.append(np.array([shape.batch_size for shape in stage.shapes])[chosen])
        self.bucket, self.stage, self.count = (np.concatenate(parts) for parts in (which, stage_of, counts))
        self.position = np.cumsum(self.count) - self.count
        self.draw = np.zeros_like(self.count)
        kinds: dict[tuple, int] = {}
        kind = np.array([kinds.setdefault(shape_key(stages[s].shapes[b]), len(kinds))
                         for s, b in zip(self.stage, self.bucket, strict=True)])
        for number in range(len(kinds)):
            mine = kind == number
            self.draw[mine] = np.cumsum(self.count[mine]) - self.count[mine]

    def __len__(self) -> int:
        return len(self.stage)

    def turn(self, step: int) -> Turn:
        return Turn(step, *(int(values[step]) for values in (self.stage, self.bucket, self.position, self.draw, self.count)))


def open_clips(cfg: DataConfig, seed: int, stages: list[StageConfig]) -> Source:
    """The source that data.source names. Raises ValueError naming data.path when there is nothing usable."""
    if cfg.source == "world":
        return WorldClips(cfg, seed)
    shapes = [shape for stage in stages for shape in stage.shapes]
    return CachedClips(cfg, seed, shapes) if cfg.source == "cache" else FileClips(cfg, seed, shapes)


def table(clips: Source, stages: list[StageConfig]) -> str:
    """What each bucket holds and leaves out, as text. Raises ValueError naming a bucket that holds nothing."""
    lines = ["stage bucket  shape                                  updates  batch      clips  left out"]
    for index, stage in enumerate(stages):
        for number, (shape, share) in enumerate(zip(stage.shapes, stage.shares, strict=True)):
            pool = clips.pool(shape)
            reasons = "; ".join(f"{count} {why}" for why, count in pool.dropped.most_common())
            if pool.size == 0 and not isinstance(clips, WorldClips):
                key = f"stages.{index}" + (f".buckets.{number}" if stage.buckets else "")
                raise ValueError(f"{key}: no clip fits this bucket of {shape} ({reasons or 'the source is empty'})")
            held = pool.size or "endless"
            lines.append(f"{index:5d} {number:6d}  {shape!s:38s} {round(stage.steps * share):7d} {shape.batch_size:6d} {held:>10}  "
                         f"{reasons or '-'}")
    return "\n".join(lines)


def make_loader(clips: Source, cfg: DataConfig, stages: list[StageConfig], seed: int,
                start_step: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """Batches for every update from `start_step` to the last stage's end; rank r of n gets the r-th slice of each.

    Loader processes are replaced after data.recycle_batches batches, the next ones started before the old ones end.
    Raises ValueError naming the stage whose batch size does not divide by the number of processes.
    """
    for index, stage in enumerate(stages):
        for shape in stage.shapes:
            if shape.batch_size % ranks:
                raise ValueError(f"stages.{index}.batch_size: {shape.batch_size} does not divide by the {ranks} processes")
    schedule = Schedule(stages, seed)
    return _batches(_Samples(clips, cfg, stages, seed), cfg, schedule, start_step, rank, ranks)


def _batches(samples: "_Samples", cfg: DataConfig, schedule: Schedule, start: int, rank: int, ranks: int) -> Iterator[Batch]:
    recycled = cfg.workers and cfg.recycle_batches and cfg.source != "cache"  # nothing leaks there, and a new process hashes anew
    span = cfg.recycle_batches if recycled else len(schedule)

    def load(first: int) -> Iterator[Batch]:
        turns = _Turns(schedule, range(first, min(first + span, len(schedule))), rank, ranks)
        return iter(DataLoader(samples, batch_sampler=turns, num_workers=cfg.workers, collate_fn=_collate, worker_init_fn=_apart,
                               prefetch_factor=cfg.prefetch if cfg.workers else None))

    coming = load(start) if start < len(schedule) else iter(())
    ready = cfg.workers * cfg.prefetch
    for first in range(start, len(schedule), span):
        current, coming = coming, None
        last = min(first + span, len(schedule))
        for step in range(first, last):
            if step == max(last - ready, first) and last < len(schedule):
                coming = load(last)
            yield next(current)


class _Turns(Sampler):
    """Yields for each update the samples that this process loads."""

    def __init__(self, schedule: Schedule, steps: range, rank: int, ranks: int):
        self.schedule, self.steps, self.rank, self.ranks = schedule, steps, rank, ranks

    def __iter__(self) -> Iterator[list[tuple[Turn, int]]]:
        for step in self.steps:
            turn = self.schedule.turn(step)
            share = turn.count // self.ranks
            yield [(turn, self.rank * share + i) for i in range(share)]

    def __len__(self) -> int:
        return len(self.steps)


class _Samples(Dataset):
    def __init__(self, clips: Source, cfg: DataConfig, stages: list[StageConfig], seed: int):
        self.clips, self.cfg, self.stages, self.seed = clips, cfg, stages, seed

    def __getitem__(self, key: tuple[Turn, int]) -> Batch:
        turn, number = key
        shape = self.stages[turn.stage].shapes[turn.bucket]
        position = turn.position + number
        size, notes = self.clips.pool(shape).size, []
        index, variant = self._order(shape, size, turn.draw + number, position)
        clips = [self._readable(position, size, index, notes, lambda i: self.clips.clip(shape, i, variant))]
        for image in range(shape.image_frames):
            draw = keyed.rng(self.seed, "image", position, image)
            other = int(draw.integers(size or 2**62))
            turns = int(draw.integers(self.clips.variants or 2**31))
            frame = int(draw.integers(2**31))
            clips.append(self._readable(position, size, other, notes, lambda i, t=turns, f=frame: self.clips.image(
                shape, i, t, keyed.rng(self.seed, "frame", f))))
        kept = [self._kept(position, image) for image in range(len(clips))]
        cached = clips[0].states is not None
        empty = self.clips.null if cached else None
        return Batch(
            turn.step, turn.stage, turn.bucket, [position], torch.cat([clip.x for clip in clips])[None],
            torch.tensor([clips[0].fps]), [[clip.caption if keep else "" for clip, keep in zip(clips, kept, strict=True)]],
            torch.cat([clip.std for clip in clips])[None] if clips[0].std is not None else None,
            [[clip.states if keep else empty for clip, keep in zip(clips, kept, strict=True)]] if cached else None, tuple(notes))

    def _order(self, shape: ShapeConfig, size: int, draw: int, position: int) -> tuple[int, int]:
        """Clip and variant of a draw: all clips are gone through in a new order each epoch."""
        if size == 0:
            return position, 0
        epoch, index = divmod(draw, size)
        variant = epoch % self.clips.variants if self.clips.variants else epoch
        return int(_permutation(self.seed, repr(shape_key(shape)), epoch, size)[index]), variant

    def _readable(self, position: int, size: int, index: int, notes: list[str], read) -> Clip:
        """The clip, or, where it cannot be read, the next one that can: the same for every process and after a restart."""
        for further in range(MAX_UNREADABLE):
            chosen = (index + further) % size if size else index + further
            try:
                return read(chosen)
            except (ValueError, OSError) as error:
                notes.append(f"position {position}: {error}; took the clip after it")
                if size and further + 1 >= size:
                    break
        raise ValueError(f"data.path: {len(notes)} clips in a row cannot be read, the last one: {notes[-1]}")

    def _kept(self, position: int, image: int) -> bool:
        key = ("caption dropout", position) if image == 0 else ("caption dropout", position, image)
        return keyed.rng(self.seed, *key).random() >= self.cfg.caption_dropout


def _collate(samples: list[Batch]) -> Batch:
    one = samples[0]
    return Batch(one.step, one.stage, one.bucket, [s.positions[0] for s in samples], torch.cat([s.x for s in samples]),
                 torch.cat([s.fps for s in samples]), [s.captions[0] for s in samples],
                 None if one.std is None else torch.cat([s.std for s in samples]),
                 None if one.states is None else [s.states[0] for s in samples],
                 tuple(note for s in samples for note in s.notes))


def _apart(_worker: int) -> None:
    """A process group of its own: Slurm and terminals signal whole groups, and a batch must still come for the update to end."""
    os.setpgid(0, 0)


@lru_cache(maxsize=8)
def _permutation(seed: int, key: str, epoch: int, size: int) -> np.ndarray:
    return keyed.rng(seed, "order", key, epoch).permutation(size)

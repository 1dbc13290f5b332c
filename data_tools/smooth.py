"""Small repairs of tone: flicker, and the edges of a codec's blocks.

Flicker is a gain that changes from picture to picture. The gain between two pictures is the median of the ratios of their parts, so
that what moves does not count; its running product, less what is slow in it, is the flicker. Fades are slow, cuts begin afresh, and
a flash is too rare to be flicker. Blocks are found by the steps at every eighth column and line, beside those in between, and
softened by a ramp over six pixels where the picture is flatter at both sides than the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from data_tools.film import Film, Picture

PARTS = (32, 18)  # columns and rows that a picture is averaged to for its gain
BLACK = 16  # the level that a gain leaves where it is
SLOW = 5.0  # pictures: changes slower than about this are the film's own
SPREAD = 0.012  # of the log gain, robust: the least that is flicker
RESTLESS = -0.2  # most that steps of the flicker may correlate with the ones before: real changes of light go on for a while
SHORTEST = 16  # pictures of a shot that can be judged
STRONGEST = 0.35  # log gain between two pictures; more is a cut
BLOCK = 8  # pixels
BLOCKY = 1.35  # steps at the edges of blocks over those inside, from which on edges are softened
FELT = 0.5  # levels that they must be higher by
CONTOUR = 30.0  # levels: higher steps are the picture's own
RAMP = (1 / 16, 0.15, 0.375, -0.375, -0.15, -1 / 16)  # of the step that the pixels beside an edge are moved by


@dataclass(frozen=True)
class Flicker:
    """The gain of every picture, in a natural logarithm [f]; 0 where there is no flicker."""

    log_gain: np.ndarray
    confidence: float


class FlickerWatch:
    """Measures the gains of a film's pictures in order. Memory: a few numbers a picture."""

    def __init__(self):
        self.last, self.steps, self.cuts = None, [], []

    def add(self, plane: np.ndarray) -> None:
        """The next picture's luma [h w] uint8."""
        small = cv2.resize(plane, PARTS, interpolation=cv2.INTER_AREA).astype(np.float32) - BLACK
        step, cut = 0.0, self.last is None
        if self.last is not None:
            lit = (small > 8) & (self.last > 8) & (small < 210) & (self.last < 210)
            if lit.sum() > 0.2 * lit.size:
                ratio = np.log(small[lit] / self.last[lit])
                step = float(np.median(ratio))
                cut = abs(step) > STRONGEST or float(np.median(np.abs(ratio - step))) > 0.12
        self.last = small
        self.steps.append(0.0 if cut else step)
        self.cuts.append(cut)

    def fast(self) -> np.ndarray:
        """The log gains [f] less what is slow in them, in each shot that is long enough to tell; else 0."""
        steps, out = np.array(self.steps), np.zeros(len(self.steps))
        for first, last in self._shots():
            level = np.cumsum(steps[first:last])
            out[first:last] = level - _slow(level)
        return out

    def _shots(self) -> list[tuple[int, int]]:
        starts = [*np.flatnonzero(self.cuts), len(self.steps)]
        return [(int(first), int(last)) for first, last in pairwise(starts) if last - first >= SHORTEST]

    def found(self) -> Flicker | None:
        """The flicker of the pictures so far, or None when no shot has any."""
        fast, sure = self.fast(), []
        log_gain = np.zeros(len(fast))
        for first, last in self._shots():
            gain = fast[first:last]
            spread = 1.4826 * float(np.median(np.abs(gain)))
            step = np.diff(gain)
            restless = float((step[1:] * step[:-1]).sum() / max(np.square(step).sum(), 1e-9))
            if spread >= SPREAD and restless <= RESTLESS:
                log_gain[first:last] = np.where(np.abs(gain) < 5 * spread, gain, 0)
                sure.append(1 - 0.5 * SPREAD / spread)
        return Flicker(log_gain, round(float(np.mean(sure)), 3)) if sure else None


def _slow(level: np.ndarray) -> np.ndarray:
    """The slow part of numbers [f]: means under a bell of SLOW pictures, of a straight line's continuation at both ends."""
    reach = int(3 * SLOW)
    at = np.arange(len(level))
    weight = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / SLOW))
    slope, start = np.polyfit(at, level, 1)
    rest = np.convolve(level - slope * at - start, weight, "same") if len(level) >= len(weight) else \
        np.convolve(np.pad(level - slope * at - start, reach), weight, "valid")
    return slope * at + start + rest / np.convolve(np.ones(len(level)), weight, "full")[reach:reach + len(level)]


def steadied(film: Film, flicker: Flicker) -> Film:
    """The film with the flicker's gains taken out of its luma."""
    def lit(pictures: Iterator[Picture]) -> Iterator[Picture]:
        levels = np.arange(256, dtype=np.float32) - BLACK
        for picture, gain in zip(pictures, flicker.log_gain, strict=True):
            if gain == 0:
                yield picture
            else:
                table = np.clip(np.rint(BLACK + levels * np.exp(-gain)), 0, 255).astype(np.uint8)
                yield picture._replace(y=cv2.LUT(picture.y, table))

    return film.through(lit)


@dataclass(frozen=True)
class Blocks:
    """Edges of blocks: how high steps there are over those inside, and at which column and line the first ones are."""

    score: float
    column: int
    line: int
    step: float  # levels by which the steps are higher


class BlockWatch:
    """Measures the steps at the edges of blocks in the pictures of a film in order. every: how many pictures apart it looks."""

    def __init__(self, every: int = 8):
        self.every, self.seen = every, 0
        self.sums = np.zeros((2, BLOCK))  # of steps along a line and along a column, by place in the block
        self.counts = np.zeros((2, BLOCK))

    def add(self, plane: np.ndarray) -> None:
        """The next picture's luma [h w] uint8."""
        if self.seen % self.every == 0 and min(plane.shape) >= 4 * BLOCK:
            for axis, view in enumerate((plane[::2], plane[:, ::2].T)):
                step = cv2.absdiff(np.ascontiguousarray(view[:, 1:]), np.ascontiguousarray(view[:, :-1]))
                step[step > CONTOUR] = 0  # contours say nothing about blocks
                mean = step.mean(0)
                place = np.arange(1, view.shape[1]) % BLOCK
                self.sums[axis] += np.bincount(place, mean, BLOCK)
                self.counts[axis] += np.bincount(place, minlength=BLOCK)
        self.seen += 1

    def found(self) -> Blocks | None:
        """The blocks of the pictures so far, or None when their edges hardly show."""
        blocks = self.measured()
        return blocks if blocks is not None and blocks.score >= BLOCKY and blocks.step >= FELT else None

    def measured(self) -> Blocks | None:
        """The same however little they show; None before the first picture that is large enough."""
        if not self.counts.any():
            return None
        means = self.sums / np.maximum(self.counts, 1)
        column, line = means.argmax(1)
        edge = float(means.max(1).mean())
        inside = float(np.median(means, 1).mean())
        return Blocks(edge / max(inside, 0.05), int(column), int(line), edge - inside)


def deblocked(film: Film, blocks: Blocks) -> Film:
    """The film with the steps at the edges of its blocks turned into ramps, in luma, where they exceed what is around them."""
    def soft(pictures: Iterator[Picture]) -> Iterator[Picture]:
        for picture in pictures:
            y = picture.y.astype(np.float32)
            _ramped(y, blocks.column)
            _ramped(y.T, blocks.line)
            yield picture._replace(y=np.clip(np.rint(y), 0, 255).astype(np.uint8))

    return film.through(soft)


def _ramped(plane: np.ndarray, first: int) -> None:
    """Softens, in place, the steps between the columns first + 8 k - 1 and first + 8 k of a float plane."""
    at = np.arange(first if first >= 4 else first + BLOCK, plane.shape[1] - 3, BLOCK)
    pixels = [plane[:, at + k] for k in range(-4, 4)]
    step = pixels[4] - pixels[3]
    inside = sum(np.abs(pixels[k + 1] - pixels[k]) for k in (0, 1, 2, 4, 5, 6)) / 6
    edge = (np.abs(step) < CONTOUR) & (inside < CONTOUR / 4)
    excess = np.where(edge, np.sign(step) * np.maximum(np.abs(step) - inside, 0), 0)
    for k, share in enumerate(RAMP, -3):
        plane[:, at + k] += share * excess

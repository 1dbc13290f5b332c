"""Small repairs: flicker, the edges of a codec's blocks, and noise.

Flicker is a gain that changes from picture to picture. The gain between two pictures is the median of the ratios of their parts, so
that what moves does not count; its running product, less what is slow in it, is the flicker. Fades are slow, cuts begin afresh, and
a flash is too rare to be flicker. Blocks are found by the steps at every eighth column and line, beside those in between, and
softened by a ramp over six pixels where the picture is flatter at both sides than the step. Noise is what changes in the calmest
blocks of the picture, if it changes anew each time (successive differences correlate by -1/2) and from pixel to pixel: no codec
leaves such noise. It is averaged with the neighbours in time along motion, as far as they differ by no more than noise does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from data_tools.film import Film, Picture, around

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
NOISY = 5.0  # levels: the least deviation that is noise; less is the film's grain
ANEW, GRAINED = -0.35, 0.25  # most correlation of noise from difference to difference, and from pixel to pixel
WHITE, MUCH = 0.1, 1.15  # most correlation from pixel to pixel of what is taken away, and most of its deviation over the noise's
CALM = 20  # percentile of the blocks that show the noise alone
BESIDE = 2  # pictures before and after that are averaged
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


@dataclass(frozen=True)
class Noise:
    """White noise: its deviation in levels, and how its differences correlate in time and from pixel to pixel."""

    level: float
    anew: float
    grain: float


class NoiseWatch:
    """Measures the noise of a film's pictures in order. every: how many pictures apart it looks. Memory: two pictures."""

    def __init__(self, every: int = 6):
        self.every, self.seen, self.recent, self.looks = every, 0, [], []

    def add(self, plane: np.ndarray) -> None:
        """The next picture's luma [h w] uint8."""
        self.recent = [*self.recent[-2:], plane]
        self.seen += 1
        if self.seen % self.every == 3 and min(plane.shape) >= 4 * BLOCK and self.recent[0].shape == plane.shape:
            self.looks += _noise_of(*(part.astype(np.float32) for part in self.recent))

    def found(self) -> Noise | None:
        """The noise of the pictures so far, or None when it is little, or not in all of them."""
        noise = self.measured()
        clear = noise is not None and noise.level >= NOISY and noise.anew <= ANEW and noise.grain <= GRAINED
        return noise if clear and np.percentile([look.level for look in self.looks], 10) >= NOISY / 2 else None

    def measured(self) -> Noise | None:
        """The same however little it is; None before the first look."""
        if not self.looks:
            return None
        level, anew, grain = np.median([(look.level, look.anew, look.grain) for look in self.looks], 0)
        return Noise(round(float(level), 2), round(float(anew), 3), round(float(grain), 3))


def _noise_of(before: np.ndarray, now: np.ndarray, after: np.ndarray) -> list[Noise]:
    """The noise of three pictures, float32 [h w]; [] when too few blocks are lit."""
    def mean(values):
        h, w = values.shape[0] // BLOCK, values.shape[1] // BLOCK
        return cv2.resize(values[:h * BLOCK, :w * BLOCK], (w, h), interpolation=cv2.INTER_AREA)

    first, second = now - before, after - now
    beside = np.concatenate([first[:, 1:], first[:, -1:]], 1)
    level, energy = mean(now), mean(first * first)
    deviation = np.sqrt(np.maximum(energy - np.square(mean(first)), 0))
    lit = (level > 24) & (level < 220)
    if lit.sum() < 0.05 * lit.size:
        return []
    calm = lit & (deviation <= np.percentile(deviation[lit], 1.5 * CALM))
    total = float(energy[calm].sum()) + 1e-6
    anew = float(mean(first * second)[calm].sum()) / np.sqrt(total * (float(mean(second * second)[calm].sum()) + 1e-6))
    return [Noise(float(np.percentile(deviation[lit], CALM)) / 2**0.5, anew, float(mean(first * beside)[calm].sum()) / total)]


def denoised(film: Film, noise: Noise) -> Film:
    """The film with its luma averaged along motion over BESIDE pictures before and after; where they differ by more, it stays."""
    def calmed(pictures: Iterator[Picture]) -> Iterator[Picture]:
        flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        soft = ((picture, cv2.GaussianBlur(picture.y, (0, 0), 1.5)) for picture in pictures)  # motion is found with less noise
        for (picture, blurred), held in around(soft, BESIDE):
            others = [(other.y, flow.calc(blurred, there, None)) for other, there in held
                      if other is not picture and other.y.shape == picture.y.shape]
            yield picture._replace(y=_averaged(picture.y, others, noise.level))

    return film.through(calmed)


def _averaged(plane: np.ndarray, others: list[tuple[np.ndarray, np.ndarray]], level: float) -> np.ndarray:
    """A plane averaged with others [h w], each with the motion [h w 2] to it, by how well they agree but for noise of `level`."""
    h, w = plane.shape
    x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
    own = plane.astype(np.float32)
    total, weights = own.copy(), np.ones_like(own)
    for other, motion in others:
        moved = cv2.remap(other, motion[..., 0] + x, motion[..., 1] + y, cv2.INTER_CUBIC,
                          borderMode=cv2.BORDER_REPLICATE).astype(np.float32)
        excess = cv2.blur(np.square(moved - own), (7, 7)) / (2 * level**2)  # 1 where only noise differs
        weight = np.exp(-4 * np.maximum(excess - 1, 0))
        total += weight * moved
        weights += weight
    return np.clip(np.rint(total / weights), 0, 255).astype(np.uint8)


def prove_noise(film: Film, repaired: Film, noise: Noise) -> str:
    """Why what was taken away is not that noise alone, or "": edges and textures correlate from pixel to pixel, and are more."""
    energy = beside = pixels = 0.0
    for given, made in zip(film, repaired, strict=True):
        taken = cv2.subtract(given.y, made.y, dtype=cv2.CV_32F)
        energy += float(np.square(taken, dtype=np.float64).sum())
        beside += float((taken[:, 1:] * taken[:, :-1]).sum(dtype=np.float64))
        pixels += taken.size
    deviation, alike = (energy / pixels)**0.5, beside / max(energy, 1e-9)
    if alike > WHITE or deviation > MUCH * noise.level:
        return f"what is taken away has a deviation of {deviation:.1f} and correlates by {alike:.2f} from pixel to pixel"
    return ""

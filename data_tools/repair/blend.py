"""Pictures that a rate conversion mixed, and how to get the pictures before it back.

A converter from 24 to 30 pictures a second, say, gives y_j = (1 - w) x_i + w x_{i+1} where i + w = phase + ratio j and ratio = 24
/ 30: in matrices y = W x. There are more y than x, so some combinations N' y of pictures (N spans what is orthogonal to the
columns of W) are 0 for the right ratio and phase, whatever the film shows, and only for these. That is the whole detector: over
windows of pictures, the energy tr(N' G N) of these combinations, G being the inner products of the pictures' moving pixels, for
each ratio and phase; a true one falls far below the other phases of its ratio. Still pictures, repeats, ghosts and fades give no
such fall; motion that slows down may. So the same is asked of every place where two pictures are mixed half and half: quick
changes are missing there, and must be there both a while before and a while after.
The repair is the best linear estimate of x (least squares with a little shrinking), which is well conditioned: mixes near a clean
picture are unmixed with it, and half-and-half mixes from both sides.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import cv2
import numpy as np

from data_tools.film import Film, Picture

_NTSC = Fraction(1000, 1001)
RATIOS = {"24/30": Fraction(4, 5), "24/25": Fraction(24, 25), "25/30": Fraction(5, 6), "24/29.97": Fraction(4, 5) / _NTSC,
          "25/29.97": Fraction(5, 6) / _NTSC, "23.976/25": Fraction(24, 25) * _NTSC, "18/24": Fraction(3, 4),
          "18/25": Fraction(18, 25), "16/24": Fraction(2, 3), "16/25": Fraction(16, 25), "15/24": Fraction(5, 8),
          "15/25": Fraction(3, 5)}
WINDOW, LEAST = 52, 24  # pictures that are judged together, from every half of it on; fewer than the second cannot be
PHASES, FINE = 16, 256  # steps of the phase when looking for it, and in the end
SAMPLES, MOVING = 40_000, 0.1  # pixels of the shrunk pictures, about; the share of them that counts: where most moves
STILL = 2.0  # levels squared: below this the pixels that move most hardly do
FALL, FEW = 4.0, 3  # how far the energy of the right phase lies below that of others, and the more for few combinations
AGREE = 0.8  # the share of windows with motion in which it has to
REACH = 13  # pictures around one that is half and half
ROUNDING = 0.1  # levels squared: what 8 bits leave of nothing, in the means of some pixels
EVIDENCE = 4.0  # sum over such places of the log of how far their energy lies below that before and after
SHRINK = 0.01  # noise over signal, for the estimate; a mix of less than CLEAN of another picture is taken as it is
CLEAN = 1 / 128


@dataclass(frozen=True)
class Found:
    """The law of a conversion."""

    name: str  # source rate / rate, as in RATIOS
    phase: float  # the place of picture 0 among the source's, 0 to 1
    fall: float  # how many times the energy of what must be 0 lies below that of wrong phases
    confidence: float  # the share of windows with motion that agree

    @property
    def ratio(self) -> Fraction:
        """Source pictures a picture, below 1."""
        return RATIOS[self.name]

    def shares(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each of `count` pictures, the number of the earlier source picture [f] and the share of the later one [f]."""
        return _mix(float(self.ratio), self.phase, np.arange(count))


def _mix(ratio: float, phase: float, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    place = phase + ratio * numbers
    index = np.floor(place + 1e-6).astype(int)
    return index, np.clip(place - index, 0, 1)


def _matrix(ratio: float, phase: float, numbers: np.ndarray) -> tuple[np.ndarray, int]:
    """W of some pictures, and the source picture of its first column."""
    index, share = _mix(ratio, phase, numbers)
    rows, first = np.arange(len(numbers)), int(index[0])
    mix = np.zeros((len(numbers), index[-1] + 2 - first))
    mix[rows, index - first] = 1 - share
    mix[rows, index - first + 1] += share
    return mix, first


# Detection

def analyse(film: Film) -> Found | None:
    """The law by which pictures were mixed, or None: of one conversion that goes through the whole film, to a higher rate.

    Goes through the film once and keeps WINDOW numbers a picture.
    """
    grams = list(_grams(film))
    moving = [(start, gram) for start, gram in grams if np.trace(gram) / len(gram) > STILL]
    if not moving:
        return None
    falls = {}  # mean log of the fall over windows, of each ratio and phase
    for name, ratio in RATIOS.items():
        each = np.mean([_falls(gram, float(ratio), start) for start, gram in moving], 0)
        falls[name] = each if np.isfinite(each).all() else np.full(PHASES, -np.inf)
    name = max(falls, key=lambda key: falls[key].max())
    ratio, phase = float(RATIOS[name]), float(falls[name].argmax()) / PHASES
    for step in (1 / 32, 1 / 64, 1 / 128, 1 / FINE):
        near = [phase - step, phase, phase + step]
        phase = near[int(np.argmin([sum(math.log(_energy(gram, ratio, place + ratio * start) + 1e-3) for start, gram in moving)
                                    for place in near]))]
    usual = [np.median([_energy(gram, ratio, i / PHASES) for i in range(PHASES)]) for _, gram in moving]
    right = [_energy(gram, ratio, phase + ratio * start) for start, gram in moving]
    local = [_local(gram, ratio, phase + ratio * start) for start, gram in moving]
    each = np.minimum(usual, local) / (np.array(right) + 1e-3)
    fall, agree = float(np.exp(np.mean(np.log(each)))), float(np.mean(each > FALL))
    count = sum(_empty(ratio, 0.0, len(gram)).shape[1] for _, gram in moving)  # fewer combinations may be small by chance
    if fall < FALL * (1 + FEW / max(count, 1)) or agree < AGREE or sum(_dips(moving, ratio, phase).values()) < EVIDENCE:
        return None
    return Found(name, phase % 1.0, fall, agree)


def _grams(film: Film) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first picture, inner products [n n] of the moving pixels, a pixel) of windows; the last one may overlap."""
    held: deque[np.ndarray] = deque(maxlen=WINDOW)
    count, last = 0, 0
    for picture in film:
        h, w = picture.y.shape
        part = max(1, math.isqrt(h * w // SAMPLES))  # mixed pictures stay so when shrunk, and a codec's noise grows less
        size = max(1, w // part), max(1, h // part)
        held.append(cv2.resize(picture.y.astype(np.float32), size, interpolation=cv2.INTER_AREA).ravel())
        count += 1
        if len(held) == WINDOW and count - last >= WINDOW // 2:
            yield count - WINDOW, _gram(held)
            last = count
    if count > last and len(held) >= LEAST:
        yield count - len(held), _gram(held)


def _gram(planes: deque[np.ndarray]) -> np.ndarray:
    pixels = np.stack(planes)
    activity = np.abs(np.diff(pixels, axis=0)).mean(0)
    pixels = pixels[:, activity >= np.quantile(activity, 1 - MOVING)]
    pixels -= pixels.mean(0)
    return (pixels @ pixels.T / pixels.shape[1]).astype(np.float64)


@lru_cache(4096)
def _empty(ratio: float, phase: float, count: int) -> np.ndarray:
    """N [count k], orthonormal: the combinations of pictures that the law makes 0."""
    mix, _ = _matrix(ratio, phase, np.arange(count))
    mix = mix[:, mix.sum(0) > 1e-3]
    basis, _ = np.linalg.qr(mix, mode="complete")
    return basis[:, mix.shape[1]:]


def _energy(gram: np.ndarray, ratio: float, phase: float) -> float:
    """What the combinations that ought to be 0 hold, levels squared; nan when there is none."""
    empty = _empty(ratio, round(phase * FINE) % FINE / FINE, len(gram))
    return float((empty * (gram @ empty)).sum() / empty.shape[1]) if empty.shape[1] else math.nan


def _local(gram: np.ndarray, ratio: float, phase: float) -> float:
    """What second differences of pictures hold where these combinations have their weight: little in quiet passages, as theirs."""
    empty = _empty(ratio, round(phase * FINE) % FINE / FINE, len(gram))
    bend = np.array([1, -2, 1])
    curve = np.array([bend @ gram[i - 1:i + 2, i - 1:i + 2] @ bend / 6 for i in range(1, len(gram) - 1)])
    weight = np.square(empty[1:-1]).sum(1)
    return float(weight @ curve / max(weight.sum(), 1e-6))


def _dips(moving: list[tuple[int, np.ndarray]], ratio: float, phase: float) -> dict[int, float]:
    """By the number of the picture that is mixed half and half, as it is once in 1 / (1 - ratio) pictures: log of how far the
    energy of what must be 0 around it lies below that of the same combinations some pictures before and after, the lesser one."""
    found, nearest = {}, {}
    aside = next(k for k in range(1, 1000) if 0.3 <= k * (1 - ratio) % 1 <= 0.7)  # from there on pictures are clean again
    for start, gram in moving:
        place = (phase + ratio * start) % 1.0
        for turn in range(math.ceil(len(gram) * (1 - ratio)) + 1):
            at = round((turn - 0.5 + place) / (1 - ratio))
            first = at - REACH // 2
            if first < aside or first + aside + REACH > len(gram):
                continue
            empty = _nearly_empty(ratio, round((place + ratio * first) * FINE) % FINE / FINE)
            right, before, after = (((gram[i:i + REACH, i:i + REACH] @ empty) * empty).sum() / empty.shape[1]
                                    for i in (first, first - aside, first + aside))
            middle = abs(at - len(gram) / 2)
            if middle < nearest.get(start + at, math.inf):  # of two windows, the one that shows it in its middle
                nearest[start + at] = middle
                found[start + at] = math.log((min(before, after) + ROUNDING) / (right + ROUNDING))
    return found


@lru_cache(4096)
def _nearly_empty(ratio: float, phase: float) -> np.ndarray:
    """N [REACH k], orthonormal: the combinations of a few pictures that the law makes nearly 0, at least one."""
    basis, values, _ = np.linalg.svd(_matrix(ratio, phase, np.arange(REACH))[0])
    small = int((values < 0.05).sum()) + max(0, REACH - len(values))
    return basis[:, -max(small, 1):]


def _falls(gram: np.ndarray, ratio: float, start: int) -> np.ndarray:
    """By the phase of picture 0 [PHASES]: log of how far the energy lies below the median over phases."""
    by_phase = np.log([_energy(gram, ratio, i / PHASES) + 1e-3 for i in range(PHASES)])
    own = np.rint((np.arange(PHASES) / PHASES + ratio * start) % 1.0 * PHASES).astype(int) % PHASES
    return np.median(by_phase) - by_phase[own]


# Repair

def repair(film: Film, found: Found) -> Film:
    """The source's pictures at its rate, from the one nearest to the film's first picture on. Holds some 30 pictures."""
    return film.through(lambda pictures: _unmixed(pictures, found), rate=film.kind.rate * found.ratio)


def _unmixed(pictures: Iterator[Picture], found: Found) -> Iterator[Picture]:
    ratio, phase = float(found.ratio), found.phase
    reach = min(16, math.ceil(0.6 / (1 - ratio)) + 3)  # source pictures whose mixes help
    held: deque[Picture] = deque()
    start, wanted, ended = 0, math.ceil(phase - 0.5), False
    while not ended or held:
        while not ended and phase + ratio * (start + len(held) - 1) < wanted + reach:
            picture = next(pictures, None)
            if picture is None:
                ended = True
            else:
                held.append(picture)
        if not held or wanted > phase + ratio * (start + len(held) - 1) + 0.5:
            return
        while phase + ratio * start < wanted - reach:
            held.popleft()
            start += 1
        yield _estimate(held, start, wanted, ratio, phase)
        wanted += 1


def _estimate(held: deque[Picture], start: int, wanted: int, ratio: float, phase: float) -> Picture:
    """Source picture number `wanted` out of pictures start, start + 1, ..."""
    numbers = np.arange(start, start + len(held))
    at = max((wanted - phase) / ratio - start, 0.0)  # its place among those held
    before = max(min(math.floor(at), len(held) - 2), 0)
    at_s = held[before].at_s + (at - before) * (held[min(before + 1, len(held) - 1)].at_s - held[before].at_s)
    mix, first = _matrix(ratio, phase, numbers)
    clean = np.flatnonzero(mix[:, wanted - first] > 1 - CLEAN)
    if len(clean):
        return held[clean[0]]._replace(at_s=at_s)
    kin = np.eye(mix.shape[1]) + 1e4  # what is known of x beforehand: pictures around a common mean
    weights = np.linalg.solve(mix @ kin @ mix.T + SHRINK * np.eye(len(numbers)), mix @ kin[:, wanted - first])
    used = np.flatnonzero(np.abs(weights) > 0.01)
    weights = weights[used] / weights[used].sum()

    def combined(plane: int) -> np.ndarray:
        total = np.zeros(held[0][plane].shape, np.float32)
        for i, weight in zip(used, weights, strict=True):
            total = cv2.addWeighted(total, 1, held[i][plane], float(weight), 0, dtype=cv2.CV_32F)
        return np.clip(np.rint(total), 0, 255).astype(np.uint8)

    return Picture(*(combined(plane) for plane in range(3)), at_s)


def check(film: Film, found: Found) -> tuple[float, float]:
    """The gate: mean squared error of the luma, levels squared, of the repaired film mixed again by the law, and that of the source
    pictures taken as they are, the nearer one each. The repair fits when the first is well below the second."""
    ratio, phase = float(found.ratio), found.phase
    sources = iter(repair(film, found))
    first = math.ceil(phase - 0.5)
    pair: deque[tuple[int, Picture]] = deque(maxlen=2)
    again, nearest, count = 0.0, 0.0, 0
    for number, picture in enumerate(film):
        (index,), (share,) = _mix(ratio, phase, np.array([number]))
        while len(pair) < 2 or pair[1][0] < index + 1:
            source = next(sources, None)
            if source is None:
                return again / max(count, 1), nearest / max(count, 1)
            pair.append((pair[-1][0] + 1 if pair else first, source))
        if pair[0][0] != index or not CLEAN < share < 1 - CLEAN:
            continue
        a, b = (source.y.astype(np.float32) for _, source in pair)
        again += float(np.square(cv2.addWeighted(a, 1 - share, b, share, 0) - picture.y).mean())
        nearest += float(np.square((a if share < 0.5 else b) - picture.y).mean())
        count += 1
    return again / max(count, 1), nearest / max(count, 1)

"""Ghosts: trails and echoes that recorders, converters and temporal noise reduction leave behind what moves; found and taken back.

A trail is y_t = (1 - a) x_t + a y_{t-1}, an echo y_t = (x_t + b x_{t-1}) / (1 + b). Both are undone exactly once a (or b) is known.
How it is found: where the true picture x stands still along the motion v for three pictures, the differences
E = y_{t-1}(p) - y_{t-2}(p - v), D = y_t(p) - y_{t-1}(p - v) and F = y_{t+1}(p) - y_t(p - v) are in the proportion 1 : a : a^2 for
a trail, 1 : b : 0 for an echo and 1 : 0 : 0 without a ghost, whatever moved away there and whatever the picture shows. So the
points (D/E, F/E) of all places with a strong E heap up at one spot of the plane, on a bed of places that do not stand still. A
ghost comes after what it is of, while blur, blends, fades and a codec's noise look alike forward and backward in time: so the heap
of the film backwards is the bed. Of every second picture a trail has the share a^2 and its differences are larger, which shows
strong trails better. The method is our own; the heap is read as a Hough transform's. All of it is linear, so it holds on shrunken
pictures too, where a codec's noise is small.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np

from data_tools.film import Film, Picture

LOW, HIGH, BINS = -0.3, 1.3, 80  # of the ratios D/E and F/E
STEP = (HIGH - LOW) / BINS
TILES = 3  # the picture is looked at in 3 x 3 parts, because a may change over it
WEAKEST, STRONGEST = 0.08, 0.82  # of a and b: below, a ghost cannot be seen; above, it is a dissolve
DISTANT = 0.4  # least share that is measured on each second picture
ALIKE = 0.12  # shares that may be one, seen at two strides
SIGNAL, SIGNAL_CHROMA = 12.0, 5.0  # levels from which on a difference E counts
STRIDES = 1, 2  # pictures from one to the next: of each second picture a trail has the share a^2, and moves more
CLEAR = {"trail": 1.4, "echo": 1.4}  # excess from which on it may be a ghost
BOTH = 0.85  # the same where both strides show it: on average
PHASES = 15  # evidence is kept apart by the picture's number, so that what comes in cycles of 3 or 5 pictures shows
NOISE = 0.3  # levels^2: what rounding leaves in a difference of two pictures
LEFT_OVER = 2.0  # levels^2: the most by which a proved repair differs from the film after the ghost was laid over it again
RETURNED = 0.85  # least heap at (0, 0) of a repaired film, over its bed
FALL = 0.75  # most excess elsewhere, beside what it was
CUT = 20.0  # levels between pictures, on average, from which on there may be a cut
GRID = np.arange(0.0, 0.9, 0.01)


@dataclass(frozen=True)
class Found:
    """A ghost: share a (trail) or b (echo) in the middle of the luma, its change over the width and the height."""

    kind: str  # trail or echo
    share: float
    across: float = 0.0
    down: float = 0.0
    chroma: bool = True  # whether u and v have it too
    excess: float = 2.0  # of its heap over that of the film backwards; see `_excess`
    confidence: float = 1.0

    def weight(self, height: int, width: int) -> np.ndarray | np.float32:
        """The share at every place of a plane, [h w], or one number where it is the same everywhere."""
        if not (self.across or self.down):
            return np.float32(self.share)
        x, y = (np.arange(n, dtype=np.float32) / n + 0.5 / n - 0.5 for n in (width, height))
        return np.clip(self.share + self.across * x + self.down * y[:, None], 0, 0.9).astype(np.float32)


class Watch:
    """Collects the evidence for ghosts from the pictures of a film in order: `add` each plane, then ask `found`.

    every: how many pictures apart evidence is taken; signal: levels from which on a difference counts. Memory: seven shrunken
    pictures and the counts.
    """

    def __init__(self, every: int = 2, signal: float = SIGNAL):
        self.every, self.signal, self.seen, self.recent = every, signal, 0, []
        self.heap = np.zeros((len(STRIDES), 2, PHASES, TILES * TILES, BINS, BINS), np.float32)  # 2: as it runs, and backwards
        self.flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)

    def add(self, plane: np.ndarray) -> None:
        """The next picture's plane [h w] uint8."""
        self.recent = [*self.recent[-3 * STRIDES[-1]:], shrunk(plane)]
        if self.recent[0].shape != self.recent[-1].shape:
            self.recent = self.recent[-1:]
        if self.seen % self.every == 0 and min(plane.shape) >= 24:
            for heap, stride in zip(self.heap, STRIDES, strict=True):
                if len(self.recent) > 3 * stride:
                    self._look(heap[:, self.seen // self.every % PHASES], *self.recent[-1 - 3 * stride::stride])
        self.seen += 1

    def _look(self, heap: np.ndarray, before: np.ndarray, last: np.ndarray, now: np.ndarray, after: np.ndarray) -> None:
        """Adds four pictures to `heap` [2 tiles bins bins], where the ground is followed and where the picture stands."""
        still, moved = last - before, self._motion(last, now)
        if moved is not None:
            first = last - _followed(before, moved)
            self._count(heap[0], first, now - _followed(last, moved), after - _followed(now, moved))
            self._count(heap[1], now - _followed(after, -moved), last - _followed(now, -moved), before - _followed(last, -moved))
            if (np.abs(first) > self.signal).sum() < 0.25 * (np.abs(still) > self.signal).sum():
                return  # nothing stands still here, and what slides along may heap up anywhere
        self._count(heap[0], still, now - last, after - now)
        self._count(heap[1], now - after, last - now, before - last)

    def _motion(self, last: np.ndarray, now: np.ndarray, cell: int = 12) -> np.ndarray | None:
        """How far from each place of `now` [h w 2] its ground was in `last`: coarse, so as not to follow what crosses it."""
        flow = self.flow.calc(now.astype(np.uint8), last.astype(np.uint8), None)
        h, w = now.shape
        rows, columns = h // cell, w // cell
        cells = flow[:rows * cell, :columns * cell].reshape(rows, cell, columns, cell, 2).transpose(0, 2, 1, 3, 4)
        coarse = np.median(cells.reshape(rows, columns, -1, 2), axis=2).astype(np.float32)
        return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_LINEAR) if np.abs(coarse).max() >= 0.1 else None

    def _count(self, heap: np.ndarray, first: np.ndarray, second: np.ndarray, third: np.ndarray) -> None:
        strong = np.abs(first) > self.signal
        strong[:2] = strong[-2:] = strong[:, :2] = strong[:, -2:] = False  # motion leads out of the picture there
        places = np.flatnonzero(strong)
        e = first.ravel()[places]
        if not 0 < len(places) < 0.5 * strong.size or abs(e.sum()) > 0.8 * np.abs(e).sum():
            return  # all of it changes, or all one way: a cut, a fade or a flash says nothing
        i = np.floor((second.ravel()[places] / e - LOW) / STEP).astype(np.int32)
        j = np.floor((third.ravel()[places] / e - LOW) / STEP).astype(np.int32)
        inside = (i >= 0) & (i < BINS) & (j >= 0) & (j < BINS)
        h, w = first.shape
        tile = places // w * TILES // h * TILES + places % w * TILES // w
        worth = np.clip((np.abs(e) - self.signal) / 10, 0, 4) ** 2 / 4
        index = ((tile * BINS + i) * BINS + j)[inside]
        heap += np.bincount(index, worth[inside], heap.size).reshape(heap.shape)

    def found(self) -> list[Found]:
        """The ghosts that the pictures so far may show, at most one of each kind, the likelier one first; to be proved."""
        return [self._described(peak) for peak in self._peaks() if peak.clear and self._steady(peak)]

    def at_rest(self) -> float:
        """How far the heap at (0, 0) stands out: of what shows no ghost."""
        heap, place = self.heap[0, 0].sum((0, 1)), np.int32((0.0 - LOW) / STEP)
        near, far = (cv2.GaussianBlur(heap, (0, 0), width)[place, place] for width in (2, 8))
        return float((near + 1e-3) / (far + 1e-3))

    def _peaks(self) -> list["Peak"]:
        heaps = self.heap.sum((2, 3))
        return sorted((_peak(heaps, kind) for kind in ("trail", "echo")), key=lambda peak: -peak.excess / CLEAR[peak.kind])

    def _described(self, peak: "Peak") -> Found:
        across, down = _slopes(self.heap.sum(2).swapaxes(1, 2).swapaxes(0, 1), peak)
        confidence = 1 - 0.5 * np.exp(-max(peak.excess - CLEAR[peak.kind], 0))
        return Found(peak.kind, round(peak.share, 3), round(across, 3), round(down, 3), True, round(peak.excess, 2),
                     round(float(confidence), 3))

    def _steady(self, best: "Peak") -> bool:
        """Whether the ghost is in every picture: blends of a rate conversion have one in every fifth, or third."""
        heaps = self.heap[best.stride - 1].sum(2)
        parts = [heaps[:, phase::cycle].sum(1) for cycle in (3, 5) for phase in range(cycle)]
        return all(_excess(part, best.kind, best.stride)[_at(best.share)] > 0
                   for part in parts if part.sum() > 0.1 * heaps.sum())

    def trace(self) -> dict[str, float]:
        """What was measured, for the report: the strongest share and how far its heap stands out."""
        best = self._peaks()[0]
        return {"share": round(best.share, 3), "excess": round(best.excess, 2), "at_rest": round(self.at_rest(), 2)}


@dataclass(frozen=True)
class Peak:
    """The highest heap along the curve of one kind."""

    kind: str
    share: float
    excess: float  # over its bed
    stride: int = 1  # of the pictures that show it best
    both: float = 0.0  # the mean excess of the strides near this share

    @property
    def clear(self) -> bool:
        return self.excess >= CLEAR[self.kind] or self.both >= BOTH


def shrunk(plane: np.ndarray) -> np.ndarray:
    """A plane about 160 columns wide, of means of square cells: float32 [h/k w/k]."""
    k = max(1, min(round(plane.shape[1] / 176), plane.shape[0] // 24))
    h, w = plane.shape[0] // k, plane.shape[1] // k
    small = plane[:h * k, :w * k]
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_AREA).astype(np.float32) if k > 1 else small.astype(np.float32)


def _followed(plane: np.ndarray, motion: np.ndarray) -> np.ndarray:
    h, w = plane.shape
    x, y = motion[..., 0] + np.arange(w, dtype=np.float32), motion[..., 1] + np.arange(h, dtype=np.float32)[:, None]
    return cv2.remap(plane, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def _at(share: float) -> int:
    return int(np.argmin(np.abs(GRID - share)))


def _along(heap: np.ndarray, kind: str, stride: int, width: float) -> np.ndarray:
    """A heap [bins bins], blurred by `width` bins, along the curve of the shares of GRID."""
    share = GRID ** stride
    x = ((share - LOW) / STEP - 0.5).astype(np.float32)
    y = (((share**2 if kind == "trail" else 0 * share) - LOW) / STEP - 0.5).astype(np.float32)
    return cv2.remap(cv2.GaussianBlur(heap, (0, 0), width), y[None], x[None], cv2.INTER_LINEAR)[0]


def _excess(heaps: np.ndarray, kind: str, stride: int = 1) -> np.ndarray:
    """How far the heap [0] of a film stands above that of the film backwards [1], over their bed, for the shares of GRID."""
    little = heaps.sum() * 1e-5 + 0.3
    bed = _along(heaps[0] + heaps[1], kind, stride, 8) / 2
    return _along(heaps[0] - heaps[1], kind, stride, 3) / (bed + little)


def _peak(heaps: np.ndarray, kind: str) -> Peak:
    """The highest peak of heaps [stride 2 bins bins]; where another stride shows the same share, their mean weighted by excess."""
    peaks = [_top(heap, kind, stride) for heap, stride in zip(heaps, STRIDES[:None if kind == "trail" else 1], strict=False)]
    best = max(peaks, key=lambda peak: peak.excess)
    if kind == "echo" or best.excess <= 0:
        return best
    alike = [peak for peak in peaks if abs(peak.share - best.share) < ALIKE and peak.excess > best.excess / 2]
    share = sum(peak.share * peak.excess for peak in alike) / sum(peak.excess for peak in alike)
    mean = sum(_excess(heap, kind, stride) for heap, stride in zip(heaps, STRIDES, strict=True)) / len(STRIDES)
    near = (np.abs(GRID - share) <= ALIKE / 2) & (GRID >= DISTANT)
    return replace(best, share=share, both=float(mean[near].max(initial=0)))


def _top(heap: np.ndarray, kind: str, stride: int) -> Peak:
    """The highest peak of one stride's heap [2 bins bins]; that of longer strides begins where it is clear of (0, 0)."""
    curve = _excess(heap, kind, stride)
    inner = np.flatnonzero((curve[1:-1] >= curve[:-2]) & (curve[1:-1] > curve[2:])) + 1
    inner = inner[(GRID[inner] >= (WEAKEST if stride == 1 else DISTANT)) & (GRID[inner] <= STRONGEST)]
    if not len(inner) or heap[0].sum() < 100:
        return Peak(kind, 0.0, 0.0, stride)
    top = inner[np.argmax(curve[inner])]
    near = range(max(top - 6, 1), min(top + 7, len(GRID) - 1))
    narrow = _along(heap[0] - heap[1], kind, stride, 1.5)  # not drawn aside by what lies around
    at = max(near, key=lambda k: narrow[k])
    left, middle, right = narrow[at - 1:at + 2]
    bend = left - 2 * middle + right
    finer = 0.5 * (left - right) / bend if bend < 0 and middle >= max(left, right) else 0.0
    return Peak(kind, float(GRID[at] + 0.01 * finer), float(curve[top]), stride)


def _slopes(heaps: np.ndarray, whole: Peak) -> tuple[float, float]:
    """How the share changes over the width and the height, from the parts of the picture that show it; 0 when it does not."""
    shares = np.full(TILES * TILES, np.nan)
    for k, heap in enumerate(heaps):
        peak = _peak(heap, whole.kind)
        if peak.clear and heap.sum() > 0.02 * heaps.sum() and abs(peak.share - whole.share) < 0.25:
            shares[k] = peak.share
    good = np.isfinite(shares)
    if good.sum() < 6 or np.ptp(shares[good]) < 0.12:
        return 0.0, 0.0
    row, column = np.divmod(np.arange(TILES * TILES), TILES)
    plane = np.stack([np.ones(len(row)), (column + 0.5) / TILES - 0.5, (row + 0.5) / TILES - 0.5], 1)
    fit = np.linalg.lstsq(plane[good], shares[good], rcond=None)[0]
    left_over = shares[good] - plane[good] @ fit
    return (float(fit[1]), float(fit[2])) if left_over.std() < 0.4 * shares[good].std() else (0.0, 0.0)


def analyse(film: Film, every: int = 1) -> list[Found]:
    """The ghosts that a film may have, the likelier one first; see `Watch`."""
    watch = Watch(every)
    for picture in film:
        watch.add(picture.y)
    return watch.found()


def in_chroma(film: Film, found: Found) -> bool:
    """Whether u and v have the ghost of the luma too; True when they do not show it."""
    watches = [Watch(1, SIGNAL_CHROMA) for _ in range(2)]
    for picture in film:
        for watch, plane in zip(watches, (picture.u, picture.v), strict=True):
            watch.add(plane)
    forward = sum(watch.heap[0, 0].sum((0, 1)) for watch in watches)
    curve = _excess(np.stack([forward, np.zeros_like(forward)]), found.kind)
    return bool(curve[_at(found.share)] > curve[0] - 0.04)


def repair(film: Film, found: Found) -> Film:
    """The film without the ghost: the same pictures at the same times."""
    undo = {"trail": _untrailed, "echo": _unechoed}[found.kind]
    return film.through(lambda pictures: undo(pictures, found))


def _weights(picture: Picture, found: Found) -> list[np.ndarray | np.float32]:
    """The share for every plane; 0 where chroma has no ghost."""
    shares = [found.weight(*plane.shape) for plane in picture[:3]]
    return shares if found.chroma else [shares[0], np.float32(0), np.float32(0)]


def _untrailed(pictures: Iterator[Picture], found: Found) -> Iterator[Picture]:
    """x_t = y_t + a / (1 - a) (y_t - y_{t-1}), by as much as the difference stands above what rounding leaves.

    Across a cut only if the trail goes across it, which the picture after the cut shows: edited footage begins afresh.
    """
    before = None
    for picture, after in ahead(pictures):
        if before is None or _begins(before, picture, after, found.share):
            yield picture
        else:
            planes = (_sharpened(y, last, share / (1 - share)) if np.any(share) else y
                      for y, last, share in zip(picture[:3], before[:3], _weights(picture, found), strict=True))
            yield Picture(*planes, picture.at_s)
        before = picture


def _unechoed(pictures: Iterator[Picture], found: Found) -> Iterator[Picture]:
    """x_t = (1 + b) y_t - b x_{t-1}, from a first picture that is taken as it is; see `_untrailed` for cuts."""
    before = state = None
    for picture, after in ahead(pictures):
        shares = _weights(picture, found)
        if before is None or _begins(before, picture, after, found.share / (1 + found.share)):
            state = [plane.astype(np.float32) for plane in picture[:3]]
            yield picture
        else:
            state = [np.clip((1 + share) * y - share * x, 0, 255) for y, x, share in zip(picture[:3], state, shares, strict=True)]
            yield Picture(*(np.rint(plane).astype(np.uint8) for plane in state), picture.at_s)
        before = picture


def ahead(pictures: Iterable[Picture]) -> Iterator[tuple[Picture, Picture | None]]:
    """Each picture with the one after it; the last with None."""
    last = None
    for picture in pictures:
        if last is not None:
            yield last, picture
        last = picture
    if last is not None:
        yield last, None


def _sharpened(plane: np.ndarray, last: np.ndarray, gain: np.ndarray | np.float32) -> np.ndarray:
    difference = cv2.subtract(plane, last, dtype=cv2.CV_32F)
    energy = cv2.GaussianBlur(cv2.multiply(difference, difference), (0, 0), 1)
    worth = cv2.max(energy - NOISE, 0) / (energy + 1e-3)
    return cv2.add(plane, worth * difference * gain, dtype=cv2.CV_8U)


def _begins(before: Picture, picture: Picture, after: Picture | None, share: float) -> bool:
    """Whether a new shot without the trail of the one before begins here."""
    first = shrunk(picture.y) - shrunk(before.y)
    if np.abs(first).mean() < CUT:
        return False
    if after is None:
        return True
    second = shrunk(after.y) - shrunk(picture.y)
    return float((first * second).sum() / (first * first).sum()) < share / 2


def prove(film: Film, repaired: Film, found: Found) -> str:
    """Why the repair does not fit the film, or "".

    The ghost laid over the repaired film must give the film back. And the repaired film must show neither what is left of the ghost
    nor its reverse (a share taken too large): its heap must sit where a film without a ghost has it.
    """
    watch, state, wrong, count, before, last = Watch(1), None, 0.0, 0, None, None
    for given, made in zip(film, repaired, strict=True):
        watch.add(made.y)
        share = found.weight(*made.y.shape)
        if state is None or np.abs(shrunk(given.y) - shrunk(before)).mean() >= CUT:
            state = given.y.astype(np.float32)
        else:
            state = (1 - share) * made.y + share * state if found.kind == "trail" else (made.y + share * last) / (1 + share)
        wrong, count = wrong + float(np.square(state - given.y).mean()), count + 1
        before, last = given.y, made.y
    if wrong / max(count, 1) > LEFT_OVER:
        return f"laying it over the repaired film again leaves a squared error of {wrong / count:.2f} levels"
    rest = watch.trace()
    if rest["at_rest"] < RETURNED or rest["excess"] > FALL * found.excess:
        return f"the repaired film would show a share of {rest['share']:.2f} itself"
    return ""

"""Pictures that are shown twice, and places where pictures are missing.

Two pictures of a moving film differ by the motion of one step: a repeat by less than that, a place where pictures are missing by
more. How much less or more is judged beside the steps around, on pictures shrunk to 160 columns, where codec noise is averaged
out, in cells of 4x4 of their pixels, of which those that usually move count most. A repeat shows in three ways: its change is
small; its picture does not lie midway between the one before and the one after, as any motion has it, be it fast or slow, but at
one of them; and it has no share in the change from some pictures before to some after. Repeats are found first; jumps then
between the pictures that are left, as steps whose change stands out from those on both sides, by about what a double step adds
and by more than these differ among themselves: motion of an uneven pace has such steps too. Where motion is steady, optical flow
tells its pace, in which repeats that a codec made to half steps stand apart, and double steps. Rather a jump is missed than one
suspected where there is none. What a codec turned into motion altogether, as bidirectional prediction does with repeats in quiet
passages at low rates, is none for us either.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np

from data_tools.film import Film, Picture, around

WIDTH, CELL = 160, 4  # columns of the shrunk pictures; their pixels a cell is wide and high
NEAR, BESIDE = 4, 3  # steps before and after that a step is compared with, for repeats and for jumps
FAR = 12  # steps before and after that the pace of a repeat is compared with
REACH = 3  # steps on both sides that a longer way has
NOISE = 0.06  # levels, mean of a picture: a change below it says nothing
FLOOR = 0.05  # ratios below this say no more
FLOWN = 32  # lines of a shrunk picture from which on flow is looked for
SLOW = 0.07  # pixels a step, of shrunk pictures: motion below it cannot be told from the coder's
BLUR, SPREAD, FASTEST = 0.1, 0.15, 4.0  # paces and the spread of their logs say no more below these, nor paces above the third
APART = {-1: (2.75, -0.5), 1: (1.5, 0.0)}  # spreads by which pace may lie apart by chance, least log odds: of repeats, of jumps
MOST = 5.0  # log odds that pace may give
# Weights of the log odds, tuned on procedural scenes and films that the bench does not test with
# Change where usually most is, in most cells, in all; place between the pictures around; change along a longer way; to exceed
REPEAT = (3.1, -0.8, 1.2, 2.8, 1.1, 2.3)
JUMP = (2.7, 1.6, 2.0, 5.8)  # change beside the next ones, in double steps; beside all, by their unevenness; that; to exceed
ENOUGH = 1.2  # double steps: more of a change than one says no more
EVEN = 0.1  # log: steps differ by so much in the evenest motion
GAP, SURER = 1.5, 2.0  # a time step so many times the usual one is a gap, and makes a jump surer by so much
DOUBLE = (0.3, 0.6)  # log of how much more two steps change than one, at least and most
CUT = 1.6  # a change so many times that of any two steps around is a new shot


class Jump(NamedTuple):
    """A place where pictures are missing."""

    number: int  # of the picture after it
    at_s: float
    missing: int  # pictures, likely
    confidence: float  # 0 to 1


@dataclass(frozen=True)
class Found:
    """What is wrong with the times of a film's pictures."""

    at_s: np.ndarray  # [f] seconds, as given
    duplicate: np.ndarray  # bool [f]: shows nothing new
    score: np.ndarray  # [f] log odds of that
    jumps: list[Jump] = field(default_factory=list)


@dataclass(eq=False)
class _Small:
    """A shrunk picture."""

    number: int
    at_s: float
    grey: np.ndarray  # uint8 [h w]
    plane: np.ndarray  # the same, float32
    detail: np.ndarray  # [n] squared mean slope of each cell
    came: tuple[int, np.ndarray] | None = None  # the number of another picture, and each cell's motion from it on


@dataclass(eq=False)
class _Step:
    """From a picture to the next one that is looked at."""

    to: _Small
    span_s: float  # from the picture before
    first: bool  # there is no picture before: the change is 0
    cells: np.ndarray  # [n] mean absolute change
    two: np.ndarray  # the same from the picture two before
    motion: np.ndarray  # [n 3] of each cell: across, down and how far, pixels
    pace: float = 1.0  # how far things move, beside the steps around: 1 is as far as usual
    steady: float = 0.0  # 0 to 1, how far the steps around move things the same way
    along: float = 1.0  # the change along that of a longer way around: 1 is an even share of it, 0 nothing

    @cached_property
    def change(self) -> float:
        return float(self.cells.mean()) + NOISE

    @cached_property
    def change_two(self) -> float:
        return float(self.two.mean()) + NOISE


def analyse(film: Film) -> Found:
    """Goes through the film once; holds some thirty shrunk pictures and gives two numbers a picture.

    Runs of more than NEAR repeats, and pictures that do not move, are taken for what the film shows.
    """
    at_s, scores = [], []

    def kept() -> Iterator[_Small]:
        for step, near in around(_paced(_shared(_steps(_shrunk(film)))), FAR):
            at_s.append(step.to.at_s)
            scores.append(_repeat_odds(step, near))
            if scores[-1] <= 0:
                yield step.to

    jumps = []
    for step, near in around(_paced(_steps(kept())), BESIDE):
        odds, missing = _jump_odds(step, near)
        if odds > 0:
            jumps.append(Jump(step.to.number, step.to.at_s, missing, float(1 / (1 + np.exp(-odds)))))
    return Found(np.array(at_s), np.array(scores) > 0, np.array(scores), jumps)


def repair(film: Film, found: Found) -> Film:
    """The film without the repeats; what is left keeps its times."""
    def kept(pictures: Iterator[Picture]) -> Iterator[Picture]:
        return (picture for picture, twice in zip(pictures, found.duplicate, strict=False) if not twice)

    return film.through(kept)


def _shrunk(pictures: Iterable[Picture]) -> Iterator[_Small]:
    for number, picture in enumerate(pictures):
        h, w = picture.y.shape
        grey = cv2.resize(picture.y, (WIDTH, max(CELL, round(WIDTH * h / w / CELL) * CELL)), interpolation=cv2.INTER_AREA)
        slopes = (cv2.convertScaleAbs(cv2.Sobel(grey, cv2.CV_16S, *axis)) for axis in ((1, 0), (0, 1)))
        yield _Small(number, picture.at_s, grey, grey.astype(np.float32), np.square(_mean(cv2.add(*slopes)).astype(np.float32)))


def _steps(smalls: Iterable[_Small]) -> Iterator[_Step]:
    """The step to each picture; the first one's is from itself."""
    before: list[_Small] = []
    for small in smalls:
        last, two = (before[-1], before[0]) if before else (small, small)
        yield _Step(small, small.at_s - last.at_s, not before, _mean(cv2.absdiff(small.plane, last.plane)),
                    _mean(cv2.absdiff(small.plane, two.plane)), _motion(small, last))
        before = [*before[-1:], small]


def _mean(values: np.ndarray) -> np.ndarray:
    """Of each cell, [n] or [n channels]."""
    h, w = values.shape[:2]
    return cv2.resize(values, (w // CELL, h // CELL), interpolation=cv2.INTER_AREA).reshape(-1, *values.shape[2:])


def _motion(small: _Small, before: _Small) -> np.ndarray:
    """Mean optical flow of each cell [n 3] (DIS: Kroeger et al., arXiv 1603.03590); kept with the picture for the next to ask."""
    if len(small.grey) < FLOWN:
        return np.zeros((small.detail.size, 3), np.float32)
    if small.came is None or small.came[0] != before.number:
        search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        search.setFinestScale(1)
        flow = _mean(search.calc(small.grey, before.grey, None))
        small.came = before.number, np.column_stack([flow, np.linalg.norm(flow, axis=1)])
    return small.came[1]


def _paced(steps: Iterable[_Step]) -> Iterator[_Step]:
    """Steps with their pace and how steady it is, by where and how far things move in those before and after."""
    for step, near in around(steps, NEAR):
        others = [other.motion for other in near if other is not step and not other.first]
        across, down, far = np.median(others or [step.motion], 0).T
        detail = step.to.detail / (step.to.detail.sum() + NOISE)
        speed = float(detail @ np.square(far)) + 1e-6  # squared
        step.pace = float(detail @ (step.motion[:, 2] * far)) / speed
        step.steady = float(detail @ (np.square(across) + np.square(down))) / speed * min(1.0, np.sqrt(speed) / SLOW)
        yield step


def _square(a: _Step, b: _Step) -> float:
    """Mean squared difference of two steps' pictures."""
    return float(cv2.norm(a.to.plane, b.to.plane, cv2.NORM_L2SQR)) / a.to.plane.size


def _log(ratio: float) -> float:
    return float(np.log(max(ratio, 0.0) + FLOOR))


def _quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """The value below which this share of the weight lies."""
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][min(np.searchsorted(total, share * total[-1]), len(values) - 1)])


def _by_pace(step: _Step, others: list[_Step], sign: int) -> float:
    """What pace adds to the log odds of a repeat (sign -1) or a jump (1): by how many spreads of the others' it is less or more.

    It says much where motion is steady and nothing where it turns. Flow that loses its way in a double step speaks against no jump.
    """
    if step.first or len(others) < 4:
        return 0.0
    here, *rest = (sign * np.log(min(other.pace, FASTEST) + BLUR) for other in (step, *others))
    usual = np.sort(rest)[:len(rest) - len(rest) // 4]  # without those that are repeats or jumps themselves
    apart = (here - usual.mean()) / (usual.std() + SPREAD)
    chance, least = APART[sign]
    return float(np.clip(apart * min(1.0, step.steady)**2 - chance, least, MOST))


# Repeats

def _shared(steps: Iterable[_Step]) -> Iterator[_Step]:
    for step, near in around(steps, REACH + 1):
        step.along = _along([other.to.plane for other in near], near.index(step))
        yield step


def _along(planes: list[np.ndarray], here: int) -> float:
    """The change into plane `here`, projected onto that from REACH steps before to as many after, by the share of one step.

    A codec's noise in the step has no part in the longer way, so that slow motion shows beside it.
    """
    first, last = max(0, here - 1 - REACH), min(len(planes) - 1, here + REACH)
    if here == 0 or last - first < 3:
        return 1.0
    way = cv2.subtract(planes[last], planes[first]).ravel()
    share = float(cv2.subtract(planes[here], planes[here - 1]).ravel() @ way) / (float(way @ way) + way.size * NOISE**2)
    return share * (last - first)


def _repeat_odds(step: _Step, near: list[_Step]) -> float:
    """Log odds that a step shows nothing new: by its change beside the usual one, the place between pictures, and its pace."""
    here = near.index(step)
    pace = _by_pace(step, [other for other in near if other is not step and not other.first], -1)
    near = near[max(0, here - NEAR):here + NEAR + 1]
    others = [other for other in near if other is not step and not other.first]
    if step.first or len(others) < 3:
        return -np.inf
    here = near.index(step)
    usual = np.median([other.cells for other in others], 0)
    weights = usual * usual + NOISE**2
    weighed = (step.cells @ usual + NOISE**2) / weights.sum()
    most = _quantile((step.cells + NOISE) / (usual + NOISE), weights, 0.8)
    whole = step.change / float(np.median([other.change for other in others]))
    before, after = near[here - 1], near[min(here + 1, len(near) - 1)]
    ahead = behind = 0.5
    if after is not step:
        ahead = _place(_square(before, step), _square(before, after), _square(step, after))
    if here > 1:
        behind = _place(_square(before, step), _square(near[here - 2], step), _square(near[here - 2], before))
    along = step.along / max(float(np.median([other.along for other in others])), 0.2)
    values = (_log(weighed), _log(most), _log(whole), ahead + behind, np.clip(along, -0.3, 1.3), 1.0)
    return pace - float(np.dot(REPEAT, values))


def _place(near: float, whole: float, far: float) -> float:
    """How far along the way between two pictures a third one lies, 0 to 1, from its squared distances to them and theirs."""
    return float(np.clip((near + whole - far + NOISE**2) / (2 * whole + 2 * NOISE**2), -0.5, 1.5))


# Jumps

def _jump_odds(step: _Step, near: list[_Step]) -> tuple[float, int]:
    """Log odds that pictures are missing before a step's picture, and how many likely are."""
    others = [other for other in near if other is not step and not other.first]
    if step.first or len(others) < 4:
        return -np.inf, 0
    here, beside, beyond = near.index(step), [], []
    if step.change > CUT * max(other.change_two for i, other in enumerate(near) if i not in (here, here + 1)):
        return -np.inf, 0
    for side in (-1, 1):
        pair = [near[here + side * k] for k in (1, 2) if 0 <= here + side * k < len(near) and not near[here + side * k].first]
        if len(pair) == 2:
            one, two = (pair[0].change + pair[1].change) / 2, pair[side > 0].change_two
            double = np.clip(np.log(two / one), *DOUBLE)  # what a double step would add: little in fast motion
            beside.append(np.log(step.change / pair[0].change) / double)
            beyond.append((step.change - one) / max(two - one, 0.05 * one))
    uneven = float(np.std([np.log(other.change) for other in others]))
    close = max(other.change for other in others if abs(near.index(other) - here) < BESIDE)
    apart = np.clip(np.log(step.change / close) / (uneven + EVEN), -4, 6)
    usually = float(np.median([other.span_s for other in others]))
    doubles = np.clip(np.mean(beside), -1, ENOUGH)
    odds = JUMP[0] * doubles + JUMP[1] * apart + JUMP[2] * uneven - JUMP[3] + SURER * (step.span_s > GAP * usually)
    return float(odds) + _by_pace(step, others, 1), max(1, round(float(np.mean(beyond))))

"""Whether one film goes on where another ends: the same pictures in both, or the next one, with nothing lost between.

Two files cut from one video may overlap: then the same pictures are in both, but for coding noise, which is looked for around the
place where their times put it. Or they touch: then the first picture of the second must follow the last one of the first as
pictures follow each other within each. Optical flow (Kroeger et al., arXiv 1603.03590, DIS) between the pictures around the join
tells by how many steps of the motion it goes on (1; more where pictures are missing, 0 where one is held), how far the flow
differs from that around it (a camera that is set anew), and what is left when the motion is taken out: of structure at a cut, of
level and colour at a change of exposure. A join is made on all of this evidence only; doubt is a no.
"""

from collections import deque
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from data_tools import film as films
from data_tools.film import Picture

WIDTH, CELL = 320, 16  # columns of the shrunk pictures, at most; pixels a side of the cells whose differences are looked at
SIDE, BESIDE = 6, 3  # pictures on each side of a join whose motion is looked at; steps on each side that the join's must resemble
HEAD = 24  # pictures of the second film that are looked for in the first
SLACK_S, ROOM_S = 0.5, 1.0  # by which listed times may be wrong; what is read besides
# Limits, chosen on spans that the bench does not test with. A difference is that of the cells that differ most, in levels.
SAME = 0.6  # the same picture twice differs by less than this share of what neighbours do
TIE, CODING = 1.25, 9.0  # where nothing moves, the listed place may differ by so much more than the best, and by so many levels
NEAR = 2.5  # steps that pieces may be listed apart, or over each other, without the same picture in both
UNEVEN = 0.7  # steps, deviation of those beside the join: more tells nothing
STEPS = 0.42  # steps of the motion that a join may be more or less than one
STILL = 0.04  # pixels a step: below, motion tells nothing
HELD = 0.15  # steps: a picture that moves by less, beside others that move, is held
QUIVER = 0.05  # variance of flow, pixels squared, that codecs make of nothing
LEFT = (1.15, 2.6)  # difference when the motion is taken out: times the most around, and levels
APART = (1.3, 1.0)  # distance of the flow from that around: times the most around, and pixels
LEVEL = (1.3, 1.3)  # change of level or colour beside those around: times their range, and levels
SAME_LEVEL = 2.2  # levels that the same pictures may be apart


class Edge(NamedTuple):
    """Shrunk pictures in a row: luma uint8 [f h w], times [f] in seconds; levels [f 4]: means of luma and chroma, contrast."""

    y: np.ndarray
    levels: np.ndarray
    at_s: np.ndarray


class Join(NamedTuple):
    """How two films go together, or why they do not. Times are those of the files, in seconds."""

    reason: str  # why they are not one film; "" if they are
    end_s: float = 0.0  # the first film is used up to there
    start_s: float = 0.0  # and the second one from here on
    shift_s: float = 0.0  # added to the second one's times
    confidence: float = 0.0  # 0.5 to 1
    measures: dict[str, float] | None = None  # value / limit: of a join that is made, all below 1


Span = tuple[Path, float, float]  # a file, from, to, in seconds of it


def between(before: Span, after: Span, later_s: float) -> Join:
    """Whether the film of one span goes on in that of another, and where.

    later_s: how long after the first span's beginning the second one begins by what was listed, right to SLACK_S. Raises
    ValueError naming a file that cannot be read.
    """
    path, start, end = before
    begins = start + later_s
    last = edge(films.read(path, max(start, begins - SLACK_S - ROOM_S), end, from_zero=False))
    path, start, end = after
    first = edge(films.read(path, start, min(end, start + SLACK_S + ROOM_S), from_zero=False))
    step = float(np.median(np.diff(last.at_s))) if len(last.at_s) > 1 else 0.0
    return judge(last, first, last.at_s[-1] + step - begins)


def edge(pictures: Iterable[Picture], limit: int | None = None) -> Edge:
    """The last `limit` of the pictures, or all of them, shrunk. Raises ValueError when there is none."""
    held = deque((_shrunk(picture) for picture in pictures), maxlen=limit)
    if not held:
        raise ValueError("no picture at this end of the film")
    return Edge(*(np.stack(part) for part in zip(*held, strict=True)))


def _shrunk(picture: Picture) -> tuple[np.ndarray, np.ndarray, float]:
    h, w = picture.y.shape
    width = min(WIDTH, w)
    small = cv2.resize(picture.y, (width, max(CELL, round(h * width / w))), interpolation=cv2.INTER_AREA)
    levels = [cv2.mean(plane)[0] for plane in picture[:3]]
    return small, np.array([*levels, 50 * np.log(small.std() + 1)]), picture.at_s  # a fiftieth more contrast is one level


def judge(before: Edge, after: Edge, overlap_s: float) -> Join:
    """The verdict on the last pictures of a film and the first ones of another.

    overlap_s: how much of the first one should be in the second, below 0 for a gap; right to SLACK_S.
    """
    if before.y.shape[1:] != after.y.shape[1:]:
        return Join("pictures of another size")
    if min(len(before.y), len(after.y)) < SIDE + 1:
        return Join("too few pictures")
    step = float(np.median(np.concatenate([np.diff(before.at_s), np.diff(after.at_s)])))
    same = _same(before, after, overlap_s / step)
    if same is not None:
        return same
    if abs(overlap_s) > NEAR * step:
        return Join("no picture is in both")
    tried = [_next(before, after, first, step) for first in (0, 1)]
    return next((found for found in tried if not found.reason), tried[0])


# The same pictures

def _same(before: Edge, after: Edge, overlap: float) -> Join | None:
    """The join where the first pictures of `after` are found in `before`, whose last `overlap` ones they should be; None if not."""
    n, m = len(before.y), min(HEAD, len(after.y))
    half = [edge.y[:, ::2, ::2] for edge in (before, after)]
    table = np.array([[_differs(a, b) for b in half[1][:m]] for a in half[0]])
    usual = np.median([_differs(*pair) for pair in [*pairwise(half[0][-m:]), *pairwise(half[1][:m])]])
    places = np.arange(n)
    mean = np.array([np.diagonal(table, -k)[:min(m, n - k)].mean() for k in places])
    listed = round(n - overlap)
    near = np.abs(places - listed) <= round(SLACK_S * n / max(before.at_s[-1] - before.at_s[0], 1e-6))
    if not near.any():
        return None
    best = int(places[near][np.argmin(mean[near])])
    clear = mean[best] <= SAME * usual and _stands_out(mean, best, 1, max)
    if mean[best] <= CODING:  # slow motion shows over longer ways
        clear |= any(best + far < n and _stands_out(mean, best, far, min) for far in (2, 4))
    if not clear:
        if not (0 <= listed < n and mean[listed] <= min(CODING, TIE * mean[best] + 1)):
            return None
        best = listed
    count = min(m, n - best)
    apart = np.abs(before.levels[best:best + count] - after.levels[:count]).max(1)
    measures = {"same": mean[best] / max(CODING, SAME * usual), "level": np.median(apart) / SAME_LEVEL,
                "worst": np.diagonal(table, -best)[:count].max() / (2 * mean[best] + CODING)}
    at = count // 2 if count < m else m // 2
    return _verdict("the same pictures differ", measures, (before.at_s[best + at] + before.at_s[min(best + at + 1, n - 1)]) / 2,
                    after.at_s[at + 1], before.at_s[best + at] - after.at_s[at])


def _stands_out(mean: np.ndarray, best: int, far: int, of: Callable[[float, float], float]) -> bool:
    """Whether the difference at a place is small beside those `far` pictures before and after it."""
    first, last = mean[max(best - far, 0)], mean[min(best + far, len(mean) - 1)]
    return mean[best] <= SAME * of(first, last)


def _differs(a: np.ndarray, b: np.ndarray) -> float:
    """Difference of two pictures in the cells that differ most, in levels."""
    return _most(cv2.absdiff(a, b), CELL // 2)


def _most(difference: np.ndarray, side: int) -> float:
    return float(np.quantile(_in_cells(difference, side), 0.95))


def _in_cells(values: np.ndarray, side: int = CELL) -> np.ndarray:
    """Means of cells of [h w] or [h w c]."""
    h, w = values.shape[:2]
    return cv2.resize(values[:h // side * side, :w // side * side], (w // side, h // side), interpolation=cv2.INTER_AREA)


# The next picture

class _Step(NamedTuple):
    """From a picture to a later one."""

    flow: np.ndarray  # [h w 2] pixels
    left: float  # difference when the motion is taken out, in the cells that differ most
    level: float  # mean of it, with its sign


def _next(before: Edge, after: Edge, first: int, step_s: float) -> Join:
    """The join where picture `first` of `after` follows the last one of `before`."""
    y = [*before.y[-SIDE:], *after.y[first:first + SIDE]]
    flows = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    steps = [_step(flows, *pair) for pair in pairwise(y)]
    gone = _gone(steps, SIDE - 1, y)
    near = slice(SIDE - 1 - BESIDE, SIDE + BESIDE)
    steps, gone, here = steps[near], gone[near], BESIDE
    others, beside = steps[:here] + steps[here + 1:], np.delete(gone, here)
    levels = np.concatenate([before.levels[-SIDE:], after.levels[first:first + SIDE]])[near.start:near.stop + 1]
    change = np.column_stack([[step.level for step in steps], np.diff(levels[:, 1:], axis=0)])
    around = np.delete(change, here, 0)
    usual = np.mean([step.flow for step in others], 0)
    measures = {
        "level": (np.abs(change[here] - around.mean(0)) / (LEVEL[0] * np.ptp(around, axis=0) + LEVEL[1])).max(),
        "left": _share(steps[here].left, [step.left for step in others], LEFT),
        "apart": _share(_apart(steps[here], usual), [_apart(step, usual) for step in others], APART)}
    if np.mean([_apart(step, np.zeros(2)) for step in others]) > STILL:
        measures |= {"held": HELD / max(beside.min(), 1e-3), "uneven": beside.std() / UNEVEN, "steps": abs(gone[here] - 1) / STEPS}
    return _verdict("does not go on", measures, before.at_s[-1] + step_s / 2, after.at_s[first],
                    before.at_s[-1] + step_s - after.at_s[first])


def _gone(steps: list[_Step], here: int, y: list[np.ndarray]) -> np.ndarray:
    """How many times the usual motion each step goes [steps], by the cells whose flow is to be believed: those that hold texture
    and move evenly. Over a join of slow and coded pictures a plain mean is out by a step as often as not."""
    cells = np.array([_in_cells(step.flow) for step in steps])  # [steps h w 2]
    around = np.delete(cells, here, 0)
    usual = around.mean(0)
    texture = np.mean([_in_cells(sum(map(np.abs, cv2.spatialGradient(one)))) for one in y], 0)
    sure = np.sqrt(texture / (around.var(0).sum(2) + QUIVER))[..., None]
    return (sure * cells * usual).sum((1, 2, 3)) / ((sure * usual * usual).sum() + 1e-9)


def _step(flows: cv2.DISOpticalFlow, a: np.ndarray, b: np.ndarray) -> _Step:
    flow = flows.calc(a, b, None)
    h, w = a.shape
    x, y = flow[..., 0] + np.arange(w, dtype=np.float32), flow[..., 1] + np.arange(h, dtype=np.float32)[:, None]
    inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
    back = cv2.remap(b.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    difference = (back - a) * inside
    return _Step(flow, _most(np.abs(difference), CELL), float(difference.sum() / max(inside.sum(), 1)))


def _apart(step: _Step, usual: np.ndarray) -> float:
    """Rms distance of a flow from another, in pixels."""
    return float(np.sqrt(np.square(step.flow - usual).sum(2).mean()))


def _share(value: float, around: list[float], limit: tuple[float, float]) -> float:
    return value / (limit[0] * max(around) + limit[1])


def _verdict(no: str, measures: dict[str, float], end_s: float, start_s: float, shift_s: float) -> Join:
    measures = {name: round(float(value), 4) for name, value in measures.items()}
    worst = max(measures, key=measures.get)
    reason = f"{no} ({worst} {measures[worst]:.1f})" if measures[worst] > 1 else ""
    return Join(reason, float(end_s), float(start_s), float(shift_s), max(0.0, 1 - measures[worst] / 2), measures)

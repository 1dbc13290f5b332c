"""Inverse telecine: film pictures out of fields that hold each of them for two or three fields in turn.

Seen as one row of fields, every pulldown cuts that row into runs of fields that show the same film picture, and a run of two or
more fields holds both parities of it: finding the runs matches fields and leaves out repeats in one step. The runs are found by the
Viterbi algorithm over a small hidden Markov model: its states are the places in the cycles of the known pulldowns, a step to the
next place is free and any other one (an edit after the pulldown) costs BREAK; what is seen of a field is how combed it looks with
the field before it, and how much it differs from the one two before. Both are taken on blocks, because one combed corner is a
combed picture, and beside what the same block shows in the fields around, so that still detail does not count.
(Field matching as a choice among neighbours by a comb measure: J. Cloutier's and T. Gritzan's published filters; G. Forney, "The
Viterbi Algorithm", Proc. IEEE 1973.)
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

from data_tools.film import Picture, around
from data_tools.repair.fill import deinterlace

Fill = Callable[[Iterator[Picture], str, str], Iterator[Picture]]  # (pictures, order, rate): as fill.deinterlace

CYCLES = {"2:3": (2, 3), "2:3:3:2": (2, 3, 3, 2), "2:2": (2,), "euro": (2,) * 11 + (3,)}  # fields a picture is held, in turn
TOP = 100  # a comb counts by the mean of the greatest 1 / TOP of its blocks
BREAK = 3.0  # cost of leaving the cadence; a wrong link or a wrong cut costs at most 1
LAG = 24  # fields that are seen before one is decided
REACH = 5  # fields before and after whose motion gives the scale of a comb
BLOCK = (16, 8)  # columns and lines of a field
COMBED, FINE = 18.0, 1.0  # a block is combed above so many levels plus so many times its own fine detail
NOISE = 1.5  # levels of comb, mean of a block, that say nothing


@dataclass
class Tally:
    """What `inverse` saw and did, counted while its result is gone through."""

    fields: int = 0
    pictures: int = 0
    breaks: int = 0  # places where the cadence was left
    lone: int = 0  # film pictures of which one field is left: filled
    combed: int = 0  # pictures with combed blocks after matching: filled there
    repeated: int = 0  # fields beyond the first of their parity in a run: what re-telecining has to give back
    unlike: int = 0  # of these, the ones that differ from that first one as motion does, not as coding does
    cadence: Counter = field(default_factory=Counter)  # fields by the pulldown they are of

    @property
    def fits(self) -> float:
        """0 to 1, the gate: the share of pictures whose fields are what the pulldown makes of one film picture."""
        return max(0.0, 1 - (self.unlike + self.combed + self.lone + self.breaks) / max(self.pictures, 1))


@dataclass
class _Field:
    """One field, and what is seen of it. Blocks' values are means of levels."""

    number: int
    picture: Picture
    parity: int  # 0: lines 0, 2, ...
    at_s: float
    step_s: float  # to the next field
    comb: np.ndarray  # of each block, woven with the field before: how far lines lie outside the two around them
    fine: np.ndarray  # of each block: the same among the field's own lines, which is fine detail
    change: np.ndarray  # of each block: difference from the field two before
    teeth: float = 0.0  # comb beyond what the block shows around in time, in the blocks where it is greatest
    moved: float = 0.0  # change, in the blocks where it is greatest
    weights: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # cost of link, cut, same, other: see _weighed


class _Run(NamedTuple):
    """Fields that show one film picture, in order of time."""

    fields: list[_Field]
    at_s: float  # when the film shows it, by the cadence


def inverse(pictures: Iterable[Picture], order: str, fill: Fill | None = None, cadence: str | None = None,
            tally: Tally | None = None) -> Iterator[Picture]:
    """The film pictures of one run of telecined ones, each once, at the film's own times; some 20 pictures are held.

    order: tff or bff. fill: as fill.deinterlace, gives the pictures of which one field is left, and the blocks that stay combed,
    such as a title that moves with the fields; None: bwdif. cadence: the name of the pulldown in CYCLES that is likely
    from the start. tally: is counted up. Repeated fields are averaged, which takes away some of the noise of coding. Times are
    even where the cadence is unbroken, and the first picture keeps its own. Raises ValueError for another order or cadence.
    """
    if order not in ("tff", "bff"):
        raise ValueError(f"order: {order!r} is neither tff nor bff")
    if cadence is not None and cadence not in CYCLES:
        raise ValueError(f"cadence: {cadence!r} is none of {', '.join(CYCLES)}")
    tally, fill = tally or Tally(), fill or deinterlace
    shift, last = None, -np.inf
    for run, near in around(_runs(_decided(_weighed(_measured(pictures, order)), cadence, tally)), 1):
        picture = _rendered(run, near, order, fill, tally)
        if shift is None:
            shift = run.fields[0].picture.at_s - run.at_s
        last = max(run.at_s + shift, last + run.fields[0].step_s)
        yield picture._replace(at_s=last)



# What is seen of the fields

def _blocks(levels: np.ndarray, lines: int) -> np.ndarray:
    """Means of blocks of what is known of a field of so many lines, be it without its outermost ones."""
    size = max(1, levels.shape[1] // BLOCK[0]), max(1, lines // BLOCK[1])
    return cv2.resize(levels.astype(np.float32), size, interpolation=cv2.INTER_AREA)


def _greatest(blocks: np.ndarray) -> float:
    """Mean of the greatest 1 / TOP of the blocks."""
    count = max(1, blocks.size // TOP)
    return float(np.partition(blocks.ravel(), -count)[-count:].mean())


def _outside(lines: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """How far each value lies outside the range of the two around it, levels."""
    return cv2.add(cv2.subtract(lines, cv2.max(above, below)), cv2.subtract(cv2.min(above, below), lines))


def _combs(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """How combed two fields look when woven."""
    n = len(bottom)
    return _blocks(cv2.add(_outside(bottom[:n - 1], top[:n - 1], top[1:n]), _outside(top[1:n], bottom[:n - 1], bottom[1:])), n)


def _measured(pictures: Iterable[Picture], order: str) -> Iterator[_Field]:
    """The fields in order of time."""
    first, number, step, before = ("tff", "bff").index(order), 0, 0.0, deque(maxlen=2)
    for picture, near in around(pictures, 1):
        step = near[-1].at_s - picture.at_s if near[-1] is not picture else step
        for parity in (first, 1 - first):
            lines = picture.y[parity::2]
            fine = _blocks(_outside(lines[1:-1], lines[:-2], lines[2:]), picture.y.shape[0] // 2)
            comb = np.zeros_like(fine)
            if before:
                comb = _combs(before[-1], lines) if parity else _combs(lines, before[-1])
            change = _blocks(cv2.absdiff(lines, before[0]), picture.y.shape[0] // 2) if len(before) == 2 else np.zeros_like(fine)
            yield _Field(number, picture, parity, picture.at_s + number % 2 * step / 2, step / 2, comb, fine, change)
            before.append(lines)
            number += 1


def _weighed(fields: Iterable[_Field]) -> Iterator[_Field]:
    """Fields with the costs, 0 to 1, of showing (link) or not showing (cut) the film picture of the field before, and of showing
    (same) or not showing (other) that of the field two before. What moves around in time is the scale; without motion they are 0.
    """
    def toothed():
        for item, near in around(fields, 2):
            combs = np.sort([other.comb for other in near if other.number] or [item.comb], 0)
            film = combs[min(1, len(combs) - 1)] <= COMBED + FINE * item.fine  # else combed with every field: a title of its own
            item.teeth, item.moved = _greatest((item.comb - combs[0]) * film), _greatest(item.change * film)
            yield item

    for item, near in around(toothed(), REACH):
        teeth, moved = (max(getattr(other, name) for other in near) for name in ("teeth", "moved"))
        combed, changed = item.teeth / max(teeth, 1e-6), item.moved / max(moved, 1e-6)
        sure, surely = teeth / (teeth + NOISE), moved / (moved + NOISE)
        item.weights = combed * sure, (1 - combed) * sure, changed * surely, (1 - changed) * surely
        yield item


# Runs

def _places() -> list[tuple[str, int, int, float]]:
    """The states: (cadence, which picture of the cycle, which field of it, fields by which its film time comes later)."""
    out = []
    for name, held in CYCLES.items():
        start, each = 0, sum(held) / len(held)
        for i, count in enumerate(held):
            out += [(name, i, k, i * each - start - k) for k in range(count)]
            start += count
    return out


PLACES = _places()
CADENCE = np.array([list(CYCLES).index(name) for name, *_ in PLACES])
FIRST = np.array([k == 0 for _, _, k, _ in PLACES])
THIRD = np.array([k == 2 for _, _, k, _ in PLACES])
BEFORE = np.array([i - 1 if i and CADENCE[i - 1] == CADENCE[i] else max(np.flatnonzero(CADENCE[i] == CADENCE))
                   for i in range(len(PLACES))])


def _decided(fields: Iterable[_Field], cadence: str | None, tally: Tally) -> Iterator[tuple[_Field, bool, float]]:
    """Each field, whether it starts a run, and by how many fields the film time of its run comes after it. Viterbi, LAG behind."""
    cost = np.array([0.0 if cadence in (None, name) else BREAK for name, *_ in PLACES])
    held: deque[tuple[_Field, np.ndarray, np.ndarray, np.ndarray]] = deque()  # field, place before, starts a run, is a break

    def oldest(count: int) -> Iterator[tuple[_Field, bool, float]]:
        """The first `count` of those held, by the best path as it stands."""
        place, out = int(cost.argmin()), []
        for item, came, starts, broken in reversed(held):
            out.append((item, bool(starts[place]), PLACES[place][3], bool(broken[place]), PLACES[place][0]))
            place = came[place]
        for item, starts, late, broken, name in out[:-count - 1:-1]:
            tally.fields += 1
            tally.breaks += broken
            tally.cadence[name] += 1
            held.popleft()
            yield item, starts, late

    for item in fields:
        link, cut, same, other = item.weights
        on = cost[BEFORE] + np.where(FIRST, cut, link) + np.where(THIRD, same, other)
        best = int(cost.argmin())
        off = cost[best] + BREAK + np.where(FIRST | (cut <= link), cut, link)
        broken = (off < on) & (item.number > 0)
        cost = np.where(broken, off, on)
        cost -= cost.min()
        starts = np.where(broken, FIRST | (cut <= link), FIRST) | (item.number == 0)
        held.append((item, np.where(broken, best, BEFORE), starts, broken))
        if len(held) > LAG:
            yield from oldest(1)
    yield from oldest(len(held))


def _runs(decided: Iterable[tuple[_Field, bool, float]]) -> Iterator[_Run]:
    run: list[_Field] = []
    at = 0.0
    for item, starts, late in decided:
        if starts and run:
            yield _Run(run, at)
            run = []
        if not run:
            at = item.at_s + late * item.step_s
        run.append(item)
    if run:
        yield _Run(run, at)


# Pictures

def _rendered(run: _Run, near: list[_Run], order: str, fill: Fill, tally: Tally) -> Picture:
    """The film picture of a run, woven of the means of its fields; what one field lacks, and what stays combed, is filled."""
    fields = run.fields
    tally.pictures += 1
    if len(fields) == 1:
        tally.lone += 1
        return _filled(fields[0], near, order, fill)
    if len(fields) > 2:
        alike = [item for i, item in enumerate(fields) if i < 2 or item.weights[2] < 0.5]
        tally.repeated += len(fields) - 2
        tally.unlike += len(fields) - len(alike)
        fields = alike
    woven = Picture(*(_woven(fields, plane) for plane in range(3)), run.at_s)
    combed = fields[1].comb > COMBED + FINE * np.maximum(fields[0].fine, fields[1].fine)
    if not combed.any():
        return woven
    tally.combed += 1
    whole = _filled(fields[0], near, order, fill)
    wide = cv2.dilate(combed.astype(np.uint8), np.ones((3, 3), np.uint8))
    return Picture(*(np.where(cv2.resize(wide, plane.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0, other, plane)
                     for plane, other in zip(woven[:3], whole[:3], strict=True)), run.at_s)


def _woven(fields: list[_Field], plane: int) -> np.ndarray:
    """One plane: each parity's lines are the mean of that parity's fields."""
    out = fields[0].picture[plane].copy()
    for parity in (0, 1):
        lines = [item.picture[plane][parity::2] for item in fields if item.parity == parity]
        out[parity::2] = lines[0] if len(lines) == 1 else np.rint(np.mean(lines, 0, np.float32))
    return out


def _filled(item: _Field, runs: list[_Run], order: str, fill: Fill) -> Picture:
    """The picture of one field by a de-interlacer, which sees the pictures before and after where they are at hand."""
    near = {other.number // 2: other.picture for run in runs for other in run.fields}
    here = item.number // 2
    numbers = [n for n in (here - 1, here, here + 1) if n in near]
    shown = list(fill((near[n] for n in numbers), order, "field"))
    return shown[2 * numbers.index(here) + item.number % 2]

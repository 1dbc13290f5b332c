"""Dropouts: parts of one to three lines lost to white, black, noise or the line above; found, and filled along motion.

A lost part of a line looks like nothing a camera gives: a run of one extreme level or of noise from column to column, that
contradicts the picture before, the one after and the lines above and below. A cheap test of each picture looks for such runs; only
where it fires is the motion from both sides computed, the runs measured against what motion predicts, and the lost places filled
from both sides and from the lines around, each by how well it fits around the loss. Nothing outside the mask changes, and a run
that motion explains is left alone. Players that hide a dropout show the line above again: such a part repeats it to the level, amid
lines that differ, so it is found before a codec touches it. That both neighbours in time contradict what is lost is Kokaram's test
(Motion Picture Restoration, 1998).
"""

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np

from data_tools.film import Film, Picture

STANDS_OUT = 18  # levels by which lost places differ from their neighbours in time and from the lines above and below
REACH = 3  # lines: a lost part is not higher
SHORTEST = 20  # columns of a lost run at 640 columns, and in proportion
DARK, LIGHT = 26, 225  # levels of a lost run that is black or white
ROUGH = 30  # levels from column to column, on average, of a run that is noise
CLEAR, FAINT = 0.5, 0.3  # share of a run's places that stand out, where one is looked for and where its extent is
SAME = 3  # levels: of a run that is all white or black, what a codec makes of it
HELD = 48  # columns of a held run: codecs copy lines downwards in blocks of 16, of which few are alike in a row
HELD_OFF = 4  # levels by which a held line differs from its neighbours in time, and from what is made for it, and lines around do
GAP = 9  # columns: where noise hits the right level by chance
STRAYS = 0.8  # most by which places above and below a run stand out, as a share of what the run does: more is motion not followed
MARGIN = 8  # lines around a lost run on which predictions are compared
RARE = 0.05  # share of a picture's places that can be lost at most: more is something else
FEWEST = 3  # lost parts, in two pictures, that make a verdict


class Mended(NamedTuple):
    """A picture with its lost parts filled, and the mask [h w] bool of them, or None."""

    picture: Picture
    mask: np.ndarray | None


class Watch:
    """Counts lost parts in the pictures of a film in order. Memory: four pictures.

    shot: of a de-interlaced film, the first of every other line that was shot, picture by picture in turn: (0,) at frame rate with
    the top field first, (0, 1) at field rate. The lines between were made up and look odd often; a tape lost none of them.
    """

    def __init__(self, shot: tuple[int, ...] = ()):
        self.recent, self.flow, self.planes, self.shot = [], _flow(), _planes(shot), shot
        self.looked = self.damaged = self.parts = 0

    def add(self, plane: np.ndarray) -> None:
        """The next picture's luma [h w] uint8."""
        self.recent = [*self.recent[-3:], self.planes(plane)]
        if len(self.recent) == 4:
            _, _, parts = _lost(*self.recent, self.flow)
            self.looked, self.damaged, self.parts = self.looked + 1, self.damaged + (parts > 0), self.parts + parts

    def found(self) -> bool:
        """Whether the film has dropouts."""
        return self.parts >= FEWEST and self.damaged > 1

    def trace(self) -> dict[str, float]:
        """What was measured, for the report: pictures looked at and with damage, and lost parts."""
        return {"looked": self.looked, "damaged": self.damaged, "parts": self.parts}


def repair(film: Film, shot: tuple[int, ...] = ()) -> Film:
    """The film with its lost parts filled; shot as in Watch."""
    return film.through(lambda pictures: (each.picture for each in mended(pictures, shot)))


def mended(pictures: Iterator[Picture], shot: tuple[int, ...] = ()) -> Iterator[Mended]:
    """Fills the lost parts of every picture; films of less than three are left alone. Memory: four pictures."""
    flow, held = _flow(), []  # pictures and their planes: the one before, the one at hand and two after
    planes = _planes(shot[-1:] + shot[:-1])  # one picture is put before the first
    head = list(itertools.islice(pictures, 3))
    if len(head) < 3:
        yield from (Mended(picture, None) for picture in head)
        return
    for picture in _mirrored(head, pictures):
        held.append((picture, planes(picture.y)))
        if len(held) == 4:
            mask, fill, _ = _lost(*(plane for _, plane in held), flow)
            del held[0]
            if mask is not None:
                whole = np.where(mask, fill, held[0][0].y)
                held[0] = held[0][0]._replace(y=whole), Plane(whole, held[0][1].shot)
            yield Mended(held[0][0], mask)


def _mirrored(head: list[Picture], rest: Iterator[Picture]) -> Iterator[Picture]:
    """A film with one picture more before it and two after it, so that the first and the last have neighbours too."""
    yield head[2]
    yield from head
    for picture in rest:
        yield picture
        head = [*head[1:], picture]
    yield head[0]
    yield head[0]


class Plane:
    """A luma plane, and where it is like nothing a camera gives; computed when asked for."""

    def __init__(self, y: np.ndarray, shot: int | None = None):
        self.y, self.shot = np.ascontiguousarray(y), shot  # the search for motion takes no views of larger pictures

    @cached_property
    def unnatural(self) -> np.ndarray:
        return _unnatural(self.y)

    @cached_property
    def odd(self) -> np.ndarray:
        places = cv2.bitwise_and(self.unnatural, _apart_from_lines(self.y))
        if self.shot is not None:
            places[1 - self.shot::2] = 0
        return places


def _planes(shot: tuple[int, ...]) -> Callable[[np.ndarray], Plane]:
    """Makes planes of luma, which know the lines that were shot."""
    turn = itertools.cycle(shot or (None,))
    return lambda y: Plane(y, next(turn))


def _flow():
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)


def _lost(before: Plane, now: Plane, after: Plane, later: Plane, flow) -> tuple[np.ndarray | None, np.ndarray | None, int]:
    """The mask [h w] of lost places, a plane to fill them with, and how many parts they surely are; None, None, 0 without any.

    Sure are parts near which the pictures before and after look natural: white text that scrolls does not.
    """
    nothing = None, None, 0
    y, (h, w) = now.y, now.y.shape
    length = max(8, SHORTEST * w // 640)
    if min(h, w) < 48 or not before.y.shape == y.shape == after.y.shape == later.y.shape:
        return nothing
    held = _held(y, max(length, HELD), before.y, after.y)
    odd = _runs_of(now.odd, length)
    if cv2.minMaxLoc(odd)[1] <= CLEAR * length and not held.any():
        return nothing
    following = np.where(_runs_of(after.odd, length) > CLEAR * length, later.y, after.y)  # a tape may lose one place twice
    late = cv2.max(cv2.subtract(y, cv2.max(before.y, following)), cv2.subtract(cv2.min(before.y, following), y))
    late = cv2.threshold(late, STANDS_OUT, 1, cv2.THRESH_BINARY)[1]
    sure = _runs_of(cv2.bitwise_and(late, now.odd), length)
    if cv2.minMaxLoc(sure)[1] <= CLEAR * length and not held.any():
        return nothing
    close = cv2.dilate((sure > CLEAR * length).astype(np.uint8), np.ones((2 * REACH + 1, 4 * length + 1), np.uint8))
    across = np.ones((1, length), np.uint8)
    likely = cv2.dilate((_runs_of(cv2.bitwise_and(late, now.unnatural), length) > FAINT * length).astype(np.uint8), across) & close
    held &= 1 - close  # what is lost makes lines beside it look held
    likely = cv2.max(likely, held)
    if likely.mean() > RARE:
        return nothing
    motions = None
    for _ in range(2):  # again without what the first round has shown to be lost
        guess = cv2.inpaint(y, likely, 3, cv2.INPAINT_NS)
        motions = motions or [flow.calc(guess, other, None) for other in (before.y, following)]
        mask, fill = _measured(now, likely, held, guess, (before.y, following), motions, length)
        if not mask.any():
            return nothing
        likely = cv2.dilate(mask.astype(np.uint8), across)
        held &= likely
    if mask.mean() > RARE:
        return nothing
    beside = cv2.max(_runs_of(before.odd, length), _runs_of(after.odd, length)) > CLEAR * length
    alone = cv2.dilate(beside.astype(np.uint8), np.ones((4 * REACH + 5, 4 * length + 1), np.uint8)) == 0
    middles = cv2.connectedComponentsWithStats(mask.astype(np.uint8))[3][1:]
    return mask, fill, sum(bool(alone[int(row), int(column)]) for column, row in middles)


def _measured(now, likely, held, guess, others, motions, length) -> tuple[np.ndarray, np.ndarray]:
    """Mask and fill, band by band of lines around what is likely lost."""
    y = now.y
    mask, fill = np.zeros(y.shape, bool), y.copy()
    rows = np.flatnonzero(cv2.reduce(likely, 1, cv2.REDUCE_MAX)[:, 0])
    for band in np.split(rows, np.flatnonzero(np.diff(rows) > 2 * MARGIN) + 1):
        lines = slice(max(band[0] - MARGIN, 0), band[-1] + 1 + MARGIN)
        plane, known = y[lines].astype(np.float32), (1 - likely[lines]).astype(np.float32)
        sides = [_followed(other, motion, lines) for other, motion in zip(others, motions, strict=True)]
        made = _combined(plane, known, sides, guess[lines].astype(np.float32))
        mask[lines] = _judged(plane, made, sides, likely[lines], now.odd[lines], length)
        mask[lines] |= _repeated(plane, made, sides, held[lines])
        fill[lines] = np.clip(np.rint(made), 0, 255)
    return mask, fill


def _unnatural(plane: np.ndarray) -> np.ndarray:
    """Places [h w] (0 or 1) at an extreme level, or amid noise from column to column."""
    extreme = cv2.bitwise_or(cv2.threshold(plane, DARK, 1, cv2.THRESH_BINARY_INV)[1],
                             cv2.threshold(plane, LIGHT - 1, 1, cv2.THRESH_BINARY)[1])
    return cv2.bitwise_or(extreme, cv2.threshold(cv2.blur(_steps_along(plane), (GAP, 1)), ROUGH, 1, cv2.THRESH_BINARY)[1])


def _apart_from_lines(plane: np.ndarray) -> np.ndarray:
    """Places [h w] (0 or 1) above or below both of the lines REACH away; at the rim, the one there is."""
    above = np.concatenate([plane[REACH:2 * REACH], plane[:-REACH]])
    below = np.concatenate([plane[REACH:], plane[-2 * REACH:-REACH]])
    off = cv2.max(cv2.subtract(plane, cv2.max(above, below)), cv2.subtract(cv2.min(above, below), plane))
    return cv2.threshold(off, STANDS_OUT, 1, cv2.THRESH_BINARY)[1]


def _runs_of(places: np.ndarray, length: int) -> np.ndarray:
    """How many of the `length` columns around each place are set."""
    return cv2.boxFilter(places, -1, (length, 1), normalize=False, borderType=cv2.BORDER_CONSTANT)


def _followed(other: np.ndarray, motion: np.ndarray, lines: slice) -> np.ndarray:
    """These lines of the other picture moved onto this one, float32."""
    x = motion[lines, :, 0] + np.arange(other.shape[1], dtype=np.float32)
    y = motion[lines, :, 1] + np.arange(other.shape[0], dtype=np.float32)[lines, None]
    return cv2.remap(other, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE).astype(np.float32)


def _combined(plane, known, sides, guess) -> np.ndarray:
    """Both sides and the guess from the lines around, weighted by the inverse square of their energy of error around each place.

    The sides are first moved by most of what they miss of the lines around: light changes, and motion is never quite followed."""
    def around(square):
        return cv2.boxFilter(square, -1, (9, 9))

    def soft(values):
        return cv2.GaussianBlur(values, (0, 0), 1.5)

    count, close = around(known) + 1e-3, soft(known) + 1e-3
    sides = [side + 0.8 * soft((plane - side) * known) / close for side in sides]
    energies = [around(np.square(side - plane) * known) / count for side in sides]
    energies.append(3 * around(np.square(guess - cv2.blur(guess, (1, 5)))))
    weights = [1 / np.square(energy + 4) for energy in energies]
    return sum(weight * part for weight, part in zip(weights, (*sides, guess), strict=True)) / sum(weights)


def _judged(plane, made, sides, likely, odd, length) -> np.ndarray:
    """Which places are lost, [h w] bool, by runs that what was made for them does not explain."""
    off = np.abs(plane - made)
    spread = np.minimum(np.abs(sides[0] - made), np.abs(sides[1] - made))
    out = ((off > np.maximum(0.7 * STANDS_OUT, 1.5 * spread)) & (likely > 0)).astype(np.uint8)
    closed = cv2.morphologyEx(out, cv2.MORPH_CLOSE, np.ones((1, GAP), np.uint8))
    lines = cv2.morphologyEx(closed, cv2.MORPH_OPEN, np.ones((1, length), np.uint8))
    mask = np.zeros(plane.shape, bool)
    ends = np.diff(np.pad(lines, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    for row, left, right in zip(*np.nonzero(ends > 0), np.nonzero(ends < 0)[1], strict=True):
        run = np.s_[row, left:right]
        beside = [r for r in (row - REACH - 2, row - REACH - 1, row + REACH + 1, row + REACH + 2) if 0 <= r < len(plane)]
        if off[beside, left:right].mean() < STRAYS * off[run].mean() and out[run].mean() > 0.5:
            near, lost = slice(max(left - GAP, 0), right + GAP), odd[row] > 0
            lost[near] |= off[row, near] > STANDS_OUT  # farther away, this may be motion not followed
            mask[row, slice(*_grown(plane[row], lost, left, right))] = True
    return mask


def _held(y, length, before, after) -> np.ndarray:
    """Places [h w] (0 or 1) of up to REACH lines that repeat the line above to the level, as none near do, and change in time."""
    same = np.zeros_like(y)
    cv2.threshold(cv2.absdiff(y[1:], y[:-1]), 0, 1, cv2.THRESH_BINARY_INV, same[1:])
    textured = cv2.morphologyEx(cv2.min(_steps_along(y), 1), cv2.MORPH_CLOSE, np.ones((1, GAP // 2), np.uint8))
    whole = cv2.morphologyEx(same & textured, cv2.MORPH_OPEN, np.ones((1, length), np.uint8))
    if not whole.any():
        return whole
    reach = np.array([1] * REACH + [0] * (REACH + 1), np.uint8)[:, None]
    steps = np.zeros_like(y)
    cv2.absdiff(y[1:], y[:-1], steps[1:])
    lively = cv2.blur(steps, (length, 1))
    change = cv2.blur(cv2.min(cv2.absdiff(y, before), cv2.absdiff(y, after)), (length, 1))
    amid = cv2.min(cv2.dilate(lively, reach), cv2.dilate(lively, reach[::-1]))
    return whole & cv2.threshold(cv2.min(amid, change), HELD_OFF - 1, 1, cv2.THRESH_BINARY)[1]


def _steps_along(plane: np.ndarray) -> np.ndarray:
    """How far each place is from the one before it in its line; 0 in the first column."""
    steps = np.zeros_like(plane)
    cv2.absdiff(plane[:, 1:], plane[:, :-1], steps[:, 1:])
    return steps


def _repeated(plane, made, sides, held) -> np.ndarray:
    """Which places are lost, [h w] bool, by runs of held lines that differ from what was made for them, as lines beside do not."""
    off, spread = np.abs(plane - made), np.abs(sides[0] - sides[1])
    mask = np.zeros(plane.shape, bool)
    ends = np.diff(np.pad(held, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    for row, left, right in zip(*np.nonzero(ends > 0), np.nonzero(ends < 0)[1], strict=True):
        beside = [r for r in (row - REACH - 1, row - REACH, row + REACH, row + REACH + 1) if 0 <= r < len(plane)]
        wrong, strays, doubt = (part.mean() for part in (off[row, left:right], off[beside, left:right], spread[row, left:right]))
        mask[row, left:right] = wrong > max(HELD_OFF, 2 * strays, doubt)
    return mask


def _grown(line, lost, left, right) -> tuple[int, int]:
    """A run's ends moved to the last lost places that hang together with it: by gaps below GAP, or by the level of the run."""
    level = np.median(line[left:right])
    alike = lost | ((np.abs(line - level) <= SAME) & (not DARK < level < LIGHT))
    closed = cv2.morphologyEx(alike[None].astype(np.uint8), cv2.MORPH_CLOSE, np.ones((1, GAP), np.uint8))[0]
    apart = np.flatnonzero(closed == 0)
    reach = slice(apart[apart < left].max(initial=-1) + 1, apart[apart >= right].min(initial=len(line)))
    ends = np.flatnonzero(lost[reach]) + reach.start
    return min(left, ends.min(initial=left)), max(right, ends.max(initial=right - 1) + 1)

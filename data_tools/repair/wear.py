"""Wear of film and tape: upright scratches that wander, the torn lines at the foot of a tape's picture, and colour that drops out.

A scratch is a ridge of a few columns and of one level from top to bottom whose place goes to and fro from picture to picture; a
line that stands still, or moves one way as the scene does, is the scene's. The lines below the place where a helical-scan machine
changes heads are far rougher from column to column than those above, in every picture, and nothing of the scene can be had back.
Colour drops out where a few pictures, or parts of them, are grey between coloured ones of which luma goes on unchanged.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from data_tools.film import Film, Picture, around

STANDS_OUT = 12  # levels of a scratch over or under the columns BESIDE away
BESIDE = 3  # columns; a scratch is narrower
UPRIGHT, LEVEL = 0.6, 8.0  # least share of the lines at which a scratch stands out; most spread of its levels
LEAST, SEEN = 12, 0.8  # pictures that a scratch lasts; share of them in which it is seen
FORGET = 400  # pictures after which a ridge that did not wander is followed afresh
WANDER = 0.1  # least share of the pictures between which it goes left, and as much right
REACH = 4  # columns that it moves at most between two pictures
ROUGHER = 2.5  # lines at the foot over those above, by how rough they are from column to column, and ROUGH_LEVELS more
ROUGH_LEVELS = 6.0
RESTLESS = 0.4  # least change of the foot from look to look, as a share of how rough it is: letters stay
BANDS = 16  # of lines, in which colour is measured
GREY, COLOURED = 3.0, 9.0  # levels from grey, on average, at most where colour dropped out, and at least before and after
LIKE = 1.5  # the most that the colour before and after may differ, as a ratio
STEADY = 16.0  # levels that luma changes at most from picture to picture meanwhile
LONGEST = 4  # pictures without colour
FOOT = 1 / 16  # share of the lines that the foot can be at most


@dataclass(frozen=True)
class Scratch:
    """Where a scratch is: its first column and the one after its last, by the number of the picture."""

    columns: dict[int, tuple[int, int]]


class ScratchWatch:
    """Follows ridges through the pictures of a film in order. Memory: a few numbers for each ridge and picture."""

    def __init__(self):
        self.seen, self.open, self.closed = 0, [], []

    def add(self, plane: np.ndarray) -> None:
        """The next picture's luma [h w] uint8."""
        ridges = _ridges(plane)
        for track in self.open:
            last = track[max(track)]
            near = [ridge for ridge in ridges if abs(ridge[0] - last[0]) <= REACH]
            if near:
                track[self.seen] = min(near, key=lambda ridge: abs(ridge[0] - last[0]))
                ridges.remove(track[self.seen])
        self.open += [{self.seen: ridge} for ridge in ridges]
        self.closed += [track for track in self.open if max(track) < self.seen - LEAST and _wanders(track)]
        self.open = [track for track in self.open if max(track) >= self.seen - LEAST]
        for track in self.open:
            if len(track) > FORGET and not _wanders(track):  # a line of the scene: the past does not matter
                for number in sorted(track)[:-LEAST]:
                    del track[number]
        self.seen += 1

    def found(self) -> list[Scratch]:
        """The scratches of the pictures so far."""
        return [Scratch(track) for track in (*self.closed, *self.open) if _wanders(track)]


def _ridges(plane: np.ndarray) -> list[tuple[int, int]]:
    """Groups of at most BESIDE columns that stand out along the height: pairs of the first column and the one after the last."""
    out = []
    left, mid, right = plane[:, :-2 * BESIDE], plane[:, BESIDE:-BESIDE], plane[:, 2 * BESIDE:]
    if not mid.size:
        return out
    for off in (cv2.subtract(mid, cv2.max(left, right)), cv2.subtract(cv2.min(left, right), mid)):
        share = cv2.reduce(cv2.threshold(off, STANDS_OUT, 1, cv2.THRESH_BINARY)[1], 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[0]
        columns = np.flatnonzero(share >= UPRIGHT * len(plane)) + BESIDE
        for group in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1):
            if 0 < len(group) <= BESIDE and float(plane[:, group[len(group) // 2]].std()) <= LEVEL:
                out.append((int(group[0]), int(group[-1]) + 1))
    return out


def _wanders(track: dict[int, tuple[int, int]]) -> bool:
    first, last = min(track), max(track)
    steps = np.diff([sum(track[k]) for k in sorted(track)])
    return last - first + 1 >= LEAST and len(track) >= SEEN * (last - first + 1) and \
        min((steps > 0).mean(), (steps < 0).mean()) >= WANDER


def unscratched(film: Film, scratches: list[Scratch]) -> Film:
    """The film with scratches filled, in luma, by a ramp between the columns at both sides."""
    def filled(pictures: Iterator[Picture]) -> Iterator[Picture]:
        for number, picture in enumerate(pictures):
            places = [scratch.columns[number] for scratch in scratches if number in scratch.columns]
            if places:
                y = picture.y.copy()
                for first, last in places:
                    left, right = max(first - 1, 0), min(last, y.shape[1] - 1)
                    ramp = np.linspace(0, 1, right - left + 1, dtype=np.float32)[1:-1]
                    ends = y[:, [left, right]].astype(np.float32)
                    y[:, left + 1:right] = np.rint(ends[:, :1] * (1 - ramp) + ends[:, 1:] * ramp)
                picture = picture._replace(y=y)
            yield picture

    return film.through(filled)


class FootWatch:
    """Measures how rough the lowest lines of a film's pictures are. every: how many pictures apart. Memory: some numbers a look."""

    def __init__(self, every: int = 8):
        self.every, self.seen, self.rough, self.change, self.last = every, 0, [], [], None

    def add(self, plane: np.ndarray) -> None:
        """The next picture's luma [h w] uint8."""
        if self.seen % self.every == 0 and min(plane.shape) >= 32:
            lines = plane[-max(int(4 * FOOT * len(plane)), 8):].astype(np.int16)
            self.rough.append(np.abs(2 * lines[:, 1:-1] - lines[:, :-2] - lines[:, 2:]).mean(1, dtype=np.float32))
            if self.last is not None and self.last.shape == lines.shape:
                self.change.append(np.abs(lines - self.last).mean(1, dtype=np.float32))
            self.last = lines
        self.seen += 1

    def found(self) -> int:
        """How many lines at the foot are torn; 0 when none are."""
        if len(self.rough) < 3 or len(self.change) != len(self.rough) - 1:
            return 0
        rough = np.percentile(self.rough, 20, axis=0)  # nearly all pictures have to show it
        most = len(rough) // 4
        base = float(np.median(rough[:len(rough) // 2]))
        torn = (rough > ROUGHER * base + ROUGH_LEVELS) & (np.percentile(self.change, 20, axis=0) > RESTLESS * rough)
        count = len(torn) if torn.all() else int(np.argmin(torn[::-1]))
        above = np.percentile(self.rough, 80, axis=0)[:len(rough) - count][-2:]
        return count if 2 <= count <= most and (above < ROUGHER * base + ROUGH_LEVELS).all() else 0


def footless(film: Film, lines: int) -> Film:
    """The film without its lowest lines, an even number of them."""
    gone = lines + lines % 2
    height = film.kind.height

    def cut(pictures: Iterator[Picture]) -> Iterator[Picture]:
        return (picture.each(lambda plane: plane[:-(-len(plane) * (height - gone) // height)]) for picture in pictures)

    return film.through(cut, height=height - gone)


class ColourWatch:
    """Measures the colour of a film's pictures in order. Memory: a few numbers a picture."""

    def __init__(self):
        self.colour, self.steps, self.last = [], [], None

    def add(self, picture: Picture) -> None:
        """The next picture."""
        def bands(plane):
            return cv2.resize(plane, (1, BANDS), interpolation=cv2.INTER_AREA)[:, 0]

        far = (np.abs(plane[:, ::4].astype(np.int16) - 128).astype(np.uint8) for plane in (picture.u, picture.v))
        self.colour.append(sum(bands(plane).astype(np.float32) for plane in far))
        small = cv2.resize(picture.y[:, ::4], (2 * BANDS, BANDS), interpolation=cv2.INTER_AREA).astype(np.float32)
        self.steps.append(np.abs(small - (small if self.last is None else self.last)).mean(1))
        self.last = small

    def found(self) -> list[int]:
        """The numbers of the pictures that lost colour, in all their lines or in some."""
        out: set[int] = set()
        colour, steps = np.array(self.colour), np.array(self.steps)
        for band in range(BANDS if len(colour) else 0):
            grey = colour[:, band] <= GREY
            ends = np.flatnonzero(np.diff(np.pad(grey, 1).astype(np.int8)))
            for first, last in zip(ends[::2], ends[1::2], strict=True):
                if first > 0 and last < len(grey) and last - first <= LONGEST:
                    least, most = sorted((colour[first - 1, band], colour[last, band]))
                    if least >= COLOURED and most <= LIKE * least and steps[first:last + 1, band].max() <= STEADY:
                        out.update(range(int(first), int(last)))
        return sorted(out)


def coloured(film: Film, grey: list[int]) -> Film:
    """The film with the lines without colour of these pictures filled from the nearest ones before and after, along motion."""
    def filled(pictures: Iterator[Picture]) -> Iterator[Picture]:
        flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        for (number, picture), held in around(enumerate(pictures), LONGEST):
            good = [each for each in held if each[0] not in grey]
            nearest = [max((each for each in good if each[0] < number), default=None, key=lambda each: each[0]),
                       min((each for each in good if each[0] > number), default=None, key=lambda each: each[0])]
            if number in grey and None not in nearest:
                picture = _recoloured(picture, [other for _, other in nearest], flow)
            yield picture

    return film.through(filled)


def _recoloured(picture: Picture, others: list[Picture], flow) -> Picture:
    """A picture with the chroma of others in its grey lines."""
    h, w = picture.u.shape
    x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
    sides, weights = [], []
    for other in others:
        motion = cv2.resize(flow.calc(picture.y, other.y, None), (w, h), interpolation=cv2.INTER_AREA)
        motion *= np.float32([w / picture.y.shape[1], h / picture.y.shape[0]])
        place = motion[..., 0] + x, motion[..., 1] + y
        luma, u, v = (cv2.remap(part, *place, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).astype(np.float32)
                      for part in (cv2.resize(other.y, (w, h), interpolation=cv2.INTER_AREA), other.u, other.v))
        off = luma - cv2.resize(picture.y, (w, h), interpolation=cv2.INTER_AREA)
        weights.append(1 / (cv2.blur(off * off, (7, 7)) + 4))
        sides.append((u, v))
    made = [sum(weight * side[k] for weight, side in zip(weights, sides, strict=True)) / sum(weights) for k in (0, 1)]

    def by_line(planes):
        return sum(np.abs(np.asarray(plane, np.float32) - 128).mean(1) for plane in planes)

    grey = (by_line(picture[1:3]) <= np.maximum(GREY, 0.15 * by_line(made)))[:, None]
    u, v = (np.where(grey, np.rint(plane).astype(np.uint8), given) for plane, given in zip(made, picture[1:3], strict=True))
    return picture._replace(u=u, v=v)

"""Wear of film and tape that stays: upright scratches that wander, and the torn lines at the foot of a tape's picture.

A scratch is a ridge of a few columns and of one level from top to bottom whose place goes to and fro from picture to picture; a
line that stands still, or moves one way as the scene does, is the scene's. The lines below the place where a helical-scan machine
changes heads are far rougher from column to column than those above, in every picture, and nothing of the scene can be had back.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from data_tools.film import Film, Picture

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

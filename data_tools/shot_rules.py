"""Rules for shot changes: what can be told of shrunk pictures without a network, and what only looks like a change.

The distance behind all of them is blind to small motion: a pixel counts by what it lies outside the range of the pixels around its
place in the other picture. Within a shot it is close to 0, whatever moves; between two shots it is large.
Shape letters: f n pictures, h w lines and columns of 27x48, 3 planes.
"""

import math
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np

from data_tools.film import Picture

SIDES = 27, 48  # lines and columns of the shrunk pictures

# Distances are in levels of 0 to 255, summed over luma and two chroma planes: see Block.far
STEADY = 3.0  # below it from one picture to the next, and STEADY_FAR over GAP pictures, nothing happens
STEADY_FAR = 7.0
GAP = 12  # pictures
CUT = 8.0  # a sure cut is at least so far, and RATIO times as far as any step beside it; or a quarter of it, and twice RATIO times
RATIO = 4.0
FLASH = 8  # pictures that the longest flash lasts
SAME = 0.4  # before and after are one shot where they differ less than so much of what lies between
FLAT = 5.0  # spread of luma, in levels, of a picture that shows one colour


class Change(NamedTuple):
    """A change by the numbers of pictures in a block: first .. last - 1 show neither shot alone; first == last for a cut."""

    kind: str
    first: int
    last: int
    confidence: float


# Shrunk pictures

def shrunk(picture: Picture) -> np.ndarray:
    """The picture's planes as one array, uint8 [27 48 3]."""
    return cv2.merge([_shrunk(plane) for plane in picture[:3]])


def _shrunk(plane: np.ndarray) -> np.ndarray:
    h, w = plane.shape
    part = min(h // SIDES[0], w // SIDES[1])
    if part > 1:  # whole parts first: ten times as fast
        h, w = h // part, w // part
        plane = cv2.resize(plane[:h * part, :w * part], (w, h), interpolation=cv2.INTER_AREA)
    return cv2.resize(plane, SIDES[::-1], interpolation=cv2.INTER_AREA)


class Block:
    """Shrunk pictures [n 27 48 3] in YUV, their times [n], and which of them (begin up to end) this block decides on."""

    def __init__(self, thumbs: np.ndarray, at_s: np.ndarray, begin: int, end: int):
        self.thumbs, self.at_s, self.begin, self.end = thumbs, at_s, begin, end
        self.flat = self.spread < FLAT

    def __len__(self) -> int:
        return len(self.thumbs)

    def own(self, changes: list[Change]) -> list[Change]:
        """Those whose middle is this block's to decide; of a fade, the part that is, for it may be longer than any block."""
        out = []
        for kind, first, last, confidence in changes:
            if kind == "fade":
                first, last = max(first, self.begin), min(last, self.end)
                if first < last:
                    out.append(Change(kind, first, last, confidence))
            elif self.begin <= (first + last) // 2 < self.end:
                out.append(Change(kind, first, last, confidence))
        return out

    @cached_property
    def spread(self) -> np.ndarray:
        """The standard deviation of luma of each picture [n], in levels."""
        return self.thumbs[..., 0].reshape(len(self), -1).std(1)

    @cached_property
    def near(self) -> tuple[np.ndarray, np.ndarray]:
        return _envelope(self.thumbs, 5)

    @cached_property
    def wide(self) -> tuple[np.ndarray, np.ndarray]:
        return _envelope(self.thumbs, 9)

    def far(self, one: np.ndarray, other: np.ndarray, envelope: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """How far pictures `one` are from pictures `other` (numbers [k]), in levels: float [k].

        A pixel counts by what it lies outside the range of the pixels around its place in the other picture, so that what moves
        less than that counts nothing. Low contrast is made up for, as in a dark scene.
        """
        low, high = envelope
        one, other = np.asarray(one), np.asarray(other)
        total = np.zeros(len(one))
        if not len(one):
            return total
        for a, b in ((one, other), (other, one)):
            outside = cv2.subtract(self.thumbs[b], high[a]) + cv2.subtract(low[a], self.thumbs[b])
            total += outside.reshape(len(a), -1).mean(1, dtype=np.float32) * 3 / 2
        return total * 48 / np.clip(np.maximum(self.spread[one], self.spread[other]), 16, 48)

    @cached_property
    def steps(self) -> np.ndarray:
        """How far each picture is from the one before [n]; 0 for the first."""
        places = np.arange(1, len(self))
        return np.concatenate([[0.0], self.far(places - 1, places, self.near)])


def _envelope(thumbs: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest value around each pixel, in a square of that side: two arrays like `thumbs`."""
    square = np.ones((side, side), np.uint8)
    return np.stack([cv2.erode(thumb, square) for thumb in thumbs]), np.stack([cv2.dilate(thumb, square) for thumb in thumbs])


# What is sure

def ruled(block: Block) -> tuple[list[Change], list[tuple[int, int]]]:
    """What rules are sure of, and the spans of pictures (first up to last) where something happens that they are not sure of.

    Only such spans are given whose middle the block decides on.
    """
    cuts, odd = sudden(block)
    changes = [Change("cut", at, at, 1.0) for at in cuts] + fades(block)
    known = np.zeros(len(block), bool)  # pictures and steps into them that are accounted for
    known[cuts], known[odd] = True, True
    for _, first, last, _ in changes:
        known[first:last + 1] = True
    gaps = _gaps(block, known)
    busy = (gaps > STEADY_FAR) & ~known | (block.steps > STEADY) & ~known
    doubts = []
    for first, last in runs(busy, 6):
        while last > first:
            middle = first + int(np.argmax(gaps[first:last]))
            low, high = max(_bound(known, middle, -1), middle - GAP - 4), min(_bound(known, middle, 1), middle + GAP + 4)
            change = mixture(block, low, high) or wipe(block, low, high)
            if change is None:
                doubts.append((first, last))
                break
            changes.append(change)
            doubts += [(first, change.first - GAP)] if change.first - GAP - first > GAP else []
            first = max(change.last + GAP, middle + 1)
    return changes, [(a, b) for a, b in doubts if block.begin <= (a + b) // 2 < block.end]


def sudden(block: Block) -> tuple[list[int], list[int]]:
    """Sure cuts, each the number of the first picture of a shot; and what belongs to flashes: their pictures, and the one after."""
    steps, n = block.steps, len(block)
    cuts, odd, at = [], [], 1
    while at < n:
        if steps[at] < CUT / 4 or steps[at] < steps[max(1, at - 2):at + 3].max():
            at += 1
            continue
        after = np.arange(at + 1, min(at + 1 + FLASH, n))
        back = np.flatnonzero(block.far(np.full(len(after), at - 1), after, block.near) < SAME * steps[at])
        if len(back):
            odd += range(at, int(after[back[0]]) + 1)
            at = int(after[back[0]]) + 1
            continue
        beside = max(np.r_[steps[max(1, at - 3):at], steps[at + 1:at + 4]].max(initial=0), 0.25)
        if steps[at] >= RATIO * beside * (1 if steps[at] >= CUT else 2) and _lasts(block, at) and _broad(block, at):
            cuts.append(at)
        at += 1
    return cuts, odd


def _lasts(block: Block, at: int) -> bool:
    """Whether the two pictures before `at` are about as far from the two after as the step itself."""
    pairs = [(a, b) for a in (at - 2, at - 1) for b in (at, at + 1) if a >= 0 and b < len(block)]
    return bool(block.far(*np.array(pairs).T, block.near).min() > 0.5 * block.steps[at])


def _broad(block: Block, at: int) -> bool:
    """Whether the step into `at` changes most of the picture, not a caption or a sign alone."""
    low, high = block.near
    outside = cv2.subtract(block.thumbs[at], high[at - 1]) + cv2.subtract(low[at - 1], block.thumbs[at])
    cells = cv2.resize(outside.sum(2, dtype=np.float32), (4, 3), interpolation=cv2.INTER_AREA)
    return bool(np.median(cells) > 0.25 * cells.mean())


def fades(block: Block) -> list[Change]:
    """Runs of pictures of one colour, with what fades into them and out of them."""
    out, spread = [], block.spread
    for first, last in runs(block.flat, 0):
        short = last - first <= FLASH
        first, last = _ramp(spread, first, -1), _ramp(spread, last - 1, 1) + 1
        if short and first > 0 and last < len(block) and _same(block, first, last):
            continue  # a flash, or pictures that were lost
        out.append(Change("fade", first, last, 1.0))
    return out


def _ramp(spread: np.ndarray, at: int, way: int) -> int:
    """The last picture from `at` on, going `way`, before contrast stops growing."""
    start, last = at, len(spread) - 1
    while 0 <= at + way <= last and spread[at + way] > 1.01 * spread[at] and (
            spread[min(max(at + 3 * way, 0), last)] > 1.02 * spread[at]):
        at += way
    return at if at == start else at - way  # the one at which it stopped is whole


def _same(block: Block, first: int, last: int) -> bool:
    """Whether the pictures before and after first .. last - 1 are of one shot, and what lies between is not."""
    inside = np.arange(first, last)
    away = block.far(np.full(len(inside), first - 1), inside, block.near).max()
    return block.far([first - 1], [last], block.near)[0] < SAME * away and block.far([first - 1], [last], block.wide)[0] < CUT / 2


def _gaps(block: Block, known: np.ndarray) -> np.ndarray:
    """How far the pictures GAP before and GAP after each one are apart [n], as near to it as what is known leaves."""
    n = len(block)
    place = np.arange(n)
    behind = np.maximum.accumulate(np.where(known, place, 0))  # the last known place up to each
    ahead = np.minimum.accumulate(np.where(known, place, n)[::-1])[::-1] - 1
    behind, ahead = np.minimum(behind, place), np.maximum(ahead, place)
    return block.far(np.maximum(place - GAP, behind), np.minimum(place + GAP, ahead), block.wide)


def _bound(known: np.ndarray, at: int, way: int) -> int:
    """The farthest picture that can be reached from `at` without crossing what is known."""
    if way < 0:
        return int(np.flatnonzero(known[:at + 1])[-1]) if known[:at + 1].any() else 0
    return at + int(np.flatnonzero(known[at:])[0]) - 1 if known[at:].any() else len(known) - 1


def runs(flags: np.ndarray, bridge: int) -> list[tuple[int, int]]:
    """Runs (first, last + 1) of true flags; those no more than `bridge` places apart are one."""
    places = np.flatnonzero(flags)
    if not len(places):
        return []
    ends = np.flatnonzero(np.diff(places) > bridge + 1)
    return [(int(a), int(b) + 1) for a, b in zip(places[np.r_[0, ends + 1]], places[np.r_[ends, len(places) - 1]], strict=True)]


def mixture(block: Block, low: int, high: int) -> Change | None:
    """A dissolve between pictures low and high, if one is plain: each picture is a mixture of those two, by a share that rises."""
    if high - low < 6:
        return None
    pictures = np.stack([cv2.blur(thumb, (5, 5)).ravel() for thumb in block.thumbs[low:high + 1]]).astype(np.float32)
    start, way = pictures[0], pictures[-1] - pictures[0]
    length = float(way @ way)
    if length == 0 or _alike(pictures[0, ::3], pictures[-1, ::3]) > 0.8:
        return None  # one scene, darker or lighter
    share = (pictures - start) @ way / length
    rest = np.linalg.norm(pictures - start - share[:, None] * way, axis=1) / math.sqrt(length)
    middle = int(np.argmin(np.abs(share - 0.5)))
    ends = (pictures[0, ::3].std() + pictures[-1, ::3].std()) / 2
    mixed = (pictures[0, ::3] + pictures[-1, ::3]).std() / 2
    if mixed > 0.93 * ends or pictures[middle, ::3].std() > (mixed + ends) / 2:
        return None  # a mixture of two scenes has less contrast than either; what moves keeps it
    return _risen(block, low, share, rest < 0.3, "dissolve")


def _alike(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of two pictures, whatever their brightness and contrast; 1 where one of them is flat."""
    return 1.0 if one.std() == 0 or other.std() == 0 else float(np.corrcoef(one, other)[0, 1])


def wipe(block: Block, low: int, high: int) -> Change | None:
    """A wipe between pictures low and high, if one is plain: each pixel is like one or like the other, by areas that grow."""
    if high - low < 6:
        return None
    away = [_outside(block, low, high, end).max(3) for end in (low, high)]  # f h w, levels
    apart = np.minimum(away[0][-1], away[1][0]) > 8  # pixels by which the shots can be told
    if apart.mean() < 0.2:
        return None
    later = away[1] < away[0]
    share = (later & apart).sum((1, 2)) / apart.sum()
    neither = ((np.minimum(*away) > 12) & apart).sum((1, 2)) / apart.sum()
    both = apart[:, 1:] & apart[:, :-1], apart[1:] & apart[:-1]
    torn = ((later[:, :, 1:] != later[:, :, :-1]) & both[0]).sum((1, 2)) + ((later[:, 1:] != later[:, :-1]) & both[1]).sum((1, 2))
    torn = torn / (both[0].sum() + both[1].sum())
    return _risen(block, low, share, (neither < 0.12) & (torn < 0.12), "wipe")


def _outside(block: Block, low: int, high: int, end: int) -> np.ndarray:
    """By how many levels the pixels of pictures low .. high lie outside what is around them in picture `end`: uint8 [f h w 3]."""
    least, most = block.wide
    pictures = block.thumbs[low:high + 1]
    return np.stack([cv2.subtract(picture, most[end]) + cv2.subtract(least[end], picture) for picture in pictures])


def _risen(block: Block, low: int, share: np.ndarray, fits: np.ndarray, kind: str) -> Change | None:
    """The change over which `share` rises from 0 to 1 evenly, with every picture of it fitting; else None."""
    done = np.flatnonzero(share > 0.96)
    first = int(np.flatnonzero(share[:done[0]] < 0.04)[-1]) + 1 if len(done) and (share[:done[0]] < 0.04).any() else 0
    last = int(done[0]) if len(done) else 0
    if first < 1 or last - first < 3 or last >= len(share):
        return None
    climb = np.diff(share[first - 1:last + 1])
    if not fits[first:last].all() or climb.max() > max(0.3, 2.5 / (last - first + 1)) or climb.min() < -0.03:
        return None
    if block.far([low + first - 1], [low + last], block.wide)[0] < CUT:
        return None
    return Change(kind, low + first, low + last, 0.9)


# What is not

def guessed(block: Block, first: int, last: int, known: list[Change]) -> list[Change]:
    """What a span with something in it most likely is, without the network: a change where another scene is before than after."""
    at = first + int(np.argmax(block.steps[first:last]))
    beside = np.r_[block.steps[max(0, at - 2):at], block.steps[at + 1:at + 3]].max(initial=0)
    if block.steps[at] > max(CUT, 2 * beside):
        return [Change("cut", at, at, 0.5)]
    begin = max([0, *(change[2] for change in known if change[2] <= first)])  # of the shot, as far as is known
    end = min([len(block), *(change[1] for change in known if change[1] >= last)]) - 1
    middle = np.array([at]) if block.steps[at] > CUT else np.arange(first, last)
    low, high = np.maximum(middle - GAP, begin), np.minimum(middle + GAP, end)
    gaps = block.far(low, high, block.wide)
    low, high = low[np.argmax(gaps)], high[np.argmax(gaps)]
    within = block.far([max(low - 2 * GAP, begin), high], [low, min(high + 2 * GAP, end)], block.wide)  # as far without a change
    alike = _alike(*(cv2.blur(block.thumbs[i, ..., 0], (5, 5)).ravel() for i in (low, high)))
    sure = gaps.max() > 2 * within.max() or block.steps[at] > CUT
    return [Change("gradual", int(low), int(high), 0.5)] if sure and gaps.max() > 2 * CUT and alike < 0.5 else []


def kept(block: Block, changes: list[Change]) -> list[Change]:
    """Without those that are flashes and the like, and with the kind by name where a rule knows it."""
    out = []
    for kind, first, last, confidence in changes:
        if first > 0 and last < len(block):
            if last > first and (_same(block, first, last) or panned(block, first, last)):
                continue
            after = np.arange(last + 1, min(last + 1 + FLASH, len(block)))
            before = np.arange(max(0, first - 1 - FLASH), first - 1)
            if last == first and (
                    (block.far(np.full(len(after), first - 1), after, block.near) < SAME * block.steps[first]).any()
                    or (block.far(before, np.full(len(before), first), block.near) < SAME * block.steps[first]).any()):
                continue
        if kind == "gradual":
            low, high = max(0, first - 3), min(len(block) - 1, last + 2)
            known = mixture(block, low, high) or wipe(block, low, high)
            kind = known[0] if known else kind
        out.append(Change(kind, first, last, confidence))
    return out


def panned(block: Block, first: int, last: int) -> bool:
    """Whether pictures first .. last - 1 are of a camera that was swung: in the middle of it each is the one before, moved far."""
    moves = [_moved(block.thumbs[at - 1, ..., 0], block.thumbs[at, ..., 0]) for at in range(first, last + 1)]
    swung = [i for i, (_, way) in enumerate(moves) if abs(way) > 3]
    if len(swung) < 3 or abs(sum(moves[i][1] for i in swung)) < max(SIDES[1] / 2, sum(abs(moves[i][1]) for i in swung)):
        return False  # hardly moved, or to and fro
    aside = (swung[-1] - swung[0] + 3) // 4  # where it starts and stops, blur changes
    return all(moves[i][0] < 0.6 * max(block.spread[first + i], 4.0) for i in range(swung[0] + aside, swung[-1] + 1 - aside))


def _moved(one: np.ndarray, other: np.ndarray) -> tuple[float, int]:
    """The mean difference, in levels, of luma [27 48] to the picture before at the best sideways move, and that move in columns."""
    one, other = one.astype(np.int16), other.astype(np.int16)
    width, found = one.shape[1], []
    for way in range(-width * 5 // 8, width * 5 // 8 + 1):
        a, b = (one[:, way:], other[:, :width - way]) if way >= 0 else (one[:, :way], other[:, -way:])
        found.append((float(np.abs(a - b).mean()), way))
    return min(found)

"""Bars around the picture: black, coloured, or padded with the picture's own blurred copy. Found over the whole film, then cut off.

    python -m data_tools.bars IN.mp4 --out OUT.mp4 --report R.json

A flat bar has one colour at every place and time, and ends along a straight line on whose other side the picture differs from it
for nearly all of its length. Dark scenes, night skies and letters on black do not: their borders are ragged or fade.
A padded bar ends in a step that stays in place; it is believed only when the inside, enlarged and blurred, explains it
(the usual recipe of converters to another shape: scale to cover, blur, dim, lay the picture over it).
What fits neither stays. Bars are found on interlaced films too: cut them after de-interlacing, or in steps of 4 lines.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from data_tools.film import Film, Picture
from data_tools.stage import Edit, Outcome, main

EVERY = 5  # one picture in so many is looked at
SEGMENTS = 32  # parts of a line (or column) that are told apart
KEPT = 32  # thumbnails at most
SHRINK = 8  # of a thumbnail
LEAST = 4  # lines: a thinner rim is left alone
DEEPEST = 0.45  # of the side that one bar may take
DEEPEST_PADDED = 0.36  # an upright phone's picture in a wide frame leaves 0.34
SPREAD = 0.4  # share of a padded bar's border that has to be a step
EXPLAINED = 0.8  # share of a padded bar's variance that the blurred picture has to explain


class Box(NamedTuple):
    """What is left of a picture without its bars: lines top .. bottom - 1 and columns left .. right - 1, in luma pixels."""

    top: int
    left: int
    bottom: int
    right: int
    kind: str = "black"  # of the bars: black, coloured, blurred
    confidence: float = 1.0  # 0 to 1


def bars(film: Film) -> Outcome:
    """Cuts bars off. Verdict: `nothing to do`, or `black`, `coloured` or `blurred` after the kind of bars."""
    box = find(film)
    if box is None:
        return Outcome(film, "nothing to do", 1.0)
    place = {"top": box.top, "left": box.left, "bottom": box.bottom, "right": box.right}
    edit = Edit("crop bars", {**place, "kind": box.kind}, box.confidence)
    return Outcome(crop(film, box), box.kind, box.confidence, [edit], found=place)


def find(film: Film, step: int = 2) -> Box | None:
    """The box inside bars that are there for the whole film, or None.

    step: the sides are whole multiples of it, inwards: 2 for 4:2:0, 4 as long as such a film is interlaced.
    """
    seen = _look(film)
    if seen is None:
        return None
    box = _flat(seen) or _padded(seen)
    if box is None:
        return None
    h, w = seen.height, seen.width
    top, left = (-(-side // step) * step for side in (box.top, box.left))
    bottom, right = top + (box.bottom - top) // step * step, left + (box.right - left) // step * step
    if bottom == h // step * step and box.bottom == h:  # an odd last line is no bar
        bottom = h
    if right == w // step * step and box.right == w:
        right = w
    return box._replace(top=top, left=left, bottom=bottom, right=right)


def crop(film: Film, box: Box) -> Film:
    """The film inside a box. Raises ValueError when the box does not lie in the picture or splits a chroma pixel."""
    kind = film.kind
    if not (0 <= box.top < box.bottom <= kind.height and 0 <= box.left < box.right <= kind.width):
        raise ValueError(f"box {tuple(box[:4])} does not lie in a picture of {kind.width}x{kind.height}; "
                         "give top < bottom and left < right inside it")

    def cut(pictures: Iterator[Picture]) -> Iterator[Picture]:
        for picture in pictures:
            yield picture.each(lambda plane, luma=picture.y: _inside(plane, luma, box))

    return film.through(cut, width=box.right - box.left, height=box.bottom - box.top)


def _inside(plane: np.ndarray, luma: np.ndarray, box: Box) -> np.ndarray:
    """The part of a plane that lies in a box of luma pixels."""
    down, across = (-(-luma.shape[k] // plane.shape[k]) for k in (0, 1))
    if box.top % down or box.left % across:
        raise ValueError(f"box {tuple(box[:4])} starts inside a chroma pixel; "
                         f"its top must be a multiple of {down}, its left of {across}")
    return np.ascontiguousarray(plane[box.top // down:-(-box.bottom // down), box.left // across:-(-box.right // across)])


# What is looked at

class _Axis(NamedTuple):
    """Along one direction, n lines of s segments in 3 planes: over time, mean and deviation [n s 3].

    step [n s]: luma's mean difference from the line before.
    """

    mean: np.ndarray
    deviation: np.ndarray
    step: np.ndarray


class _Seen(NamedTuple):
    height: int
    width: int
    rows: _Axis
    columns: _Axis
    points: np.ndarray  # samples of luma [f h/8 w/8], nearest
    thumbs: np.ndarray  # luma shrunk by means [f h/8 w/8]


def _look(film: Film) -> _Seen | None:
    """Goes through the film once and keeps sums. None when pictures are too small for bars."""
    sums, count, stride, kept = {}, 0, 1, []
    for i, picture in enumerate(film):
        if i % EVERY:
            continue
        y = picture.y
        if min(y.shape) < 8 * LEAST:
            return None
        for name, profile in (("rows", _profile(picture, False)), ("columns", _profile(picture, True))):
            if count == 0:
                sums[name] = [np.zeros(profile.shape), np.zeros(profile.shape), np.zeros(profile.shape[:2])]
            total, squares, steps = sums[name]
            total += profile
            squares += np.square(profile)
            steps[1:] += np.abs(profile[1:, :, 0] - profile[:-1, :, 0])
        if count % stride == 0:
            size = (-(-y.shape[1] // SHRINK), -(-y.shape[0] // SHRINK))
            kept.append(tuple(cv2.resize(y, size, interpolation=how) for how in (cv2.INTER_NEAREST, cv2.INTER_AREA)))
            if len(kept) == KEPT:
                kept, stride = kept[::2], stride * 2
        count += 1
    if count == 0:
        return None
    axes = {}
    for name, (total, squares, steps) in sums.items():
        mean = total / count
        axes[name] = _Axis(mean, np.sqrt(np.maximum(squares / count - np.square(mean), 0)), steps / count)
    points, thumbs = (np.stack(part) for part in zip(*kept, strict=True))
    return _Seen(film.kind.height, film.kind.width, axes["rows"], axes["columns"], points, thumbs)


def _profile(picture: Picture, turned: bool) -> np.ndarray:
    """Means of the segments of every line, or column when turned: float32 [n s 3], chroma repeated to luma's lines."""
    n = picture.y.shape[turned]
    out = []
    for plane in picture[:3]:
        size = (plane.shape[1], SEGMENTS) if turned else (SEGMENTS, plane.shape[0])
        small = cv2.resize(plane, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        small = small.T if turned else small
        out.append(small if len(small) == n else small.repeat(-(-n // len(small)), 0)[:n])
    return np.stack(out, -1)


# Flat bars

def _flat(seen: _Seen) -> Box | None:
    """The box inside bars of one colour."""
    rows, columns = _differs(seen.rows), _differs(seen.columns)
    (top, bottom), (left, right) = _sides(seen.rows, rows), _sides(seen.columns, columns)
    if not any((top, bottom, left, right)):
        return None
    box = Box(top, left, seen.height - bottom, seen.width - right)
    colours = [axis.mean[at].mean(0) for axis, at, size in
               ((seen.rows, 0, top), (seen.rows, -1, bottom), (seen.columns, 0, left), (seen.columns, -1, right)) if size]
    if np.ptp(colours, axis=0).max() > 4 or not _lively(seen, box, colours[0][0]):
        return None
    black = colours[0][0] < 24 and np.abs(colours[0][1:] - 128).max() < 6
    return box._replace(kind="black" if black else "coloured")


def _differs(axis: _Axis) -> np.ndarray:
    """Whether a segment [n s] of a line differs, at any time, from the colour of the edge that is nearer to it."""
    out = np.empty(axis.mean.shape[:2], bool)
    half = len(out) // 2
    for part, edge in ((slice(0, half), slice(0, 2)), (slice(half, None), slice(-2, None))):
        colour = np.median(axis.mean[edge], (0, 1))
        noise = np.median(axis.deviation[edge], (0, 1))
        out[part] = ((np.abs(axis.mean[part] - colour) > 1.5 + noise) | (axis.deviation[part] > 1 + 2 * noise)).any(-1)
    return out


def _sides(axis: _Axis, differs: np.ndarray) -> tuple[int, int]:
    """Lines of bar at the start and the end of an axis, 0 where there is none."""
    live = differs.mean(0) > 0.15  # the other segments lie in bars of the other direction
    if live.sum() < SEGMENTS // 6:
        return 0, 0
    mean, share = axis.mean[:, live], differs[:, live].mean(1)
    deviation, step = axis.deviation[:, live], axis.step.mean(1)
    after = np.append(step[1:], 0)
    first, last = _depth(deviation, share, step), _depth(deviation[::-1], share[::-1], after[::-1])
    if first and last:
        return first, last
    # one bar alone may be a wall or a roof: only a thin black rim is cut
    black = [mean[at, :, 0].mean() < 20 for at in (0, -1)]
    thin = 0.05 * len(mean)
    return (first if black[0] and first <= thin else 0), (last if black[1] and last <= thin else 0)


def _depth(deviation: np.ndarray, share: np.ndarray, step: np.ndarray) -> int:
    """Lines before the first one that differs in most segments, if it is a sharp and straight border of a flat area; else 0."""
    n = int(np.argmax(share > 0.5)) if (share > 0.5).any() else 0
    if not LEAST <= n <= DEEPEST * len(share):
        return 0
    if share[n:n + 8].max() < 0.75 or share[:n - 2].mean() > 0.3 or share[max(n - 4, 0)] > 0.4:
        return 0
    if np.median(deviation[:2], (0, 1)).max() > 3:  # whatever is at the edge, it is not still
        return 0
    around = step[n - 1:n + 9]  # codecs carry the picture over the border
    return n - 1 + int(np.argmax(around > 0.6 * around.max()))


def _lively(seen: _Seen, box: Box, level: float) -> bool:
    """Whether most of the box differs from the bars at least a quarter of the time, as pictures do and letters do not."""
    inside = np.zeros(seen.points.shape[1:], bool)
    inside[-(-box.top // SHRINK):box.bottom // SHRINK, -(-box.left // SHRINK):box.right // SHRINK] = True
    if not inside.any():
        return False
    away = np.abs(seen.points - np.float32(level))
    noise = np.median(away[:, ~inside]) if not inside.all() else 0.0
    if np.percentile((away[:, inside] > 3 + 3 * noise).mean(1), 75) <= 0.5:
        return False
    return all(_fills(seen.points, box, turned) for turned in (False, True))


def _fills(points: np.ndarray, box: Box, turned: bool) -> bool:
    """Whether the inside differs from each bar along their border, as pictures do and a block of text with margins does not.

    turned: the bars are beside the picture, not above and below it."""
    first, last, start, end = ((box.left, box.right, box.top, box.bottom) if turned else
                               (box.top, box.bottom, box.left, box.right))
    across = points.swapaxes(1, 2) if turned else points  # lines of it lie along the bars
    across = across[:, :, -(-start // SHRINK):max(end // SHRINK, 1)].astype(np.float32)
    for k, lines in ((-(-first // SHRINK), across), (len(across[0]) - last // SHRINK, across[:, ::-1])):
        if k < 2:  # no bar, or one too thin to know its level
            continue
        bar, near = lines[:, :k - 1], lines[:, k:k + 2]
        level = np.median(bar, (0, 1))
        noise = float(np.median(np.abs(bar - level)))
        if np.percentile((np.abs(near - level) > 3 + 3 * noise).mean((1, 2)), 75) <= 0.4:
            return False
    return True


# Padded bars

def _padded(seen: _Seen) -> Box | None:
    """The box inside bars that are a blurred copy of what is in it."""
    best, strongest = None, 0.0
    for y, strength_y in _steps(seen.rows.step):
        for x, strength_x in _steps(seen.columns.step):
            if strength_y + strength_x > strongest:
                box = Box(y, x, seen.height - y, seen.width - x, "blurred")
                share = _explained(seen.thumbs, box)
                if share > EXPLAINED and _smooth(seen, box):
                    best, strongest = box._replace(confidence=share), strength_y + strength_x
    return best


def _steps(steps: np.ndarray) -> list[tuple[int, float]]:
    """Depths of equal bars at both ends [n s] where both end in a step that stands out, and how far; first (0, 0), no bars."""
    n = len(steps)
    lines = np.ascontiguousarray(steps.T, np.float32)
    wide = np.stack([cv2.medianBlur(line[None], 5)[0] for line in lines], 1)  # a step of one line vanishes in the median
    spread = (steps > 1.3 * (wide + 0.5)).mean(1)  # over the length of the border: a line of text is not
    step = steps.mean(1)
    stands = np.where(spread > SPREAD, step / (cv2.medianBlur(step.astype(np.float32)[None], 5)[0] + 0.5), 0)
    depth = np.arange(LEAST, int(DEEPEST_PADDED * n))
    paired = np.minimum(stands[depth], np.max([stands[n - depth + k] for k in (-1, 0, 1)], 0))
    chosen = np.argsort(-paired, kind="stable")[:4]
    return [(0, 0.0)] + [(int(depth[k]), float(paired[k])) for k in chosen if paired[k] > 1.5]


def _smooth(seen: _Seen, box: Box) -> bool:
    """Whether the bars hold nothing but noise and smooth areas: letters make a few points differ much from their surroundings."""
    outside = np.ones(seen.points.shape[1:], bool)
    outside[max(box.top // SHRINK - 1, 0):-(-box.bottom // SHRINK) + 1,
            max(box.left // SHRINK - 1, 0):-(-box.right // SHRINK) + 1] = False
    rough = cv2.absdiff(seen.points, seen.thumbs)[:, outside]
    return bool(outside.any() and np.percentile(rough, 97) <= 5 * np.median(rough) + 14)


def _explained(thumbs: np.ndarray, box: Box) -> float:
    """Share of the bars' variance that the enlarged and blurred inside explains by one gain; the best of usual blurs.

    The worse of the two halves of the bars, the upper or the lower, counts.
    """
    f, h, w = thumbs.shape
    outside = np.ones((h, w), bool)
    rows, columns = ((np.arange(n) + 0.5) * side / n for n, side in ((h, box.top + box.bottom), (w, box.left + box.right)))
    outside[np.ix_((rows > box.top - SHRINK) & (rows < box.bottom + SHRINK),
                   (columns > box.left - SHRINK) & (columns < box.right + SHRINK))] = False
    if outside.sum() < 8:
        return 0.0
    half = outside.sum() // 2
    weight = cv2.GaussianBlur(outside.astype(np.float32), (0, 0), 2)[outside]

    def smooth(picture):  # of the bars alone, against noise
        return cv2.GaussianBlur(np.where(outside, picture, 0).astype(np.float32), (0, 0), 2)[outside] / weight

    best, wanted = 0.0, np.stack([smooth(thumb) for thumb in thumbs])
    for cover in (True, False):
        large = [_enlarged(thumb, box, cover) for thumb in thumbs]
        for sigma in (h / 40, h / 24, h / 12):
            soft = np.stack([smooth(cv2.GaussianBlur(picture, (0, 0), sigma)) for picture in large])
            best = max(best, min(_fit(soft[:, part], wanted[:, part]) for part in (slice(0, half), slice(half, None))))
    return best


def _enlarged(thumb: np.ndarray, box: Box, cover: bool) -> np.ndarray:
    """A thumbnail's inside enlarged to the whole, float32 [h w]: keeping its shape until it covers it, or stretched."""
    maps = []
    grow = max((box.top + box.bottom) / (box.bottom - box.top), (box.left + box.right) / (box.right - box.left))
    for n, first, last in ((thumb.shape[0], box.top, box.bottom), (thumb.shape[1], box.left, box.right)):
        pixel = (first + last) / n  # bars are equal, so this is the side of the picture over that of the thumbnail
        at = (np.arange(n) + 0.5 - n / 2) * pixel / (grow if cover else (first + last) / (last - first)) + (first + last) / 2
        maps.append(np.clip(at, first + pixel / 2, last - pixel / 2) / pixel - 0.5)
    y, x = (part.astype(np.float32) for part in np.meshgrid(*maps, indexing="ij"))
    return cv2.remap(thumb.astype(np.float32), x, y, cv2.INTER_LINEAR)


def _fit(given: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the variance within each picture [f n] that gain * given explains with a gain of 0.3 to 1.2; 0 when it has none."""
    for trial in range(2):
        x, y = given - given.mean(1, keepdims=True), wanted - wanted.mean(1, keepdims=True)  # a fade explains nothing
        gain = float((x * y).mean() / max(float(np.square(x).mean()), 1e-6))
        left = np.square(y - gain * x)
        if trial == 0:  # again without the worst places: a logo
            keep = np.argsort(left.mean(0), kind="stable")[:max(int(0.85 * left.shape[1]), 1)]
            given, wanted = given[:, keep], wanted[:, keep]
    power = float(np.square(y).mean())
    return 1 - float(left.mean()) / power if power >= 0.1 and 0.3 <= gain <= 1.2 else 0.0


if __name__ == "__main__":
    sys.exit(main(bars, argparse.ArgumentParser(description="Find bars around the picture and cut them off")))

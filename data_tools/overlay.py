"""Burned text, subtitles and logos of letters: found by what stays while the scene moves behind it, then cut off or filled.

    python -m data_tools.overlay IN.mp4 --out OUT.mp4 --report R.json

Looks at windows of pictures. In their mean the moving scene is smeared, and with it all text that belongs to it; what was drawn
over it stays sharp, and is found and read there by OCR (PP-OCR through rapidocr). Text counts as burned in when the scene moves
between its strokes and they do not, or when it comes or goes while the scene around it stays: a sign on a wall does neither.
Then, whichever is possible first: cut off an edge (CUT of the picture at most), or fill the strokes (A. Telea, An image inpainting
technique, 2004). How wrong filling is can be measured: the same strokes are laid over areas beside the text, whose truth is known,
and filled there. Text that hides no more than that (see-through logos) stays as it is, with a note. Text that covers too much, or
can still be read after filling, drops the clip. Needs rapidocr and onnxruntime.
"""

import argparse
import itertools
import sys
from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

from data_tools import bars
from data_tools.film import Film, Picture
from data_tools.stage import Edit, Outcome, main

LENGTH, SPACING, EVERY = 24, 48, 3  # pictures of a window, from one to the next, and one in so many of it is looked at
WIDTH = 640  # columns that pictures are shrunk to, at most
EDGE = 3  # pixels of the shrunk picture around what the detector boxes
STROKE = 15  # pixels of the shrunk picture: what is wider is no stroke
CONTRAST = 24  # levels between strokes and what is around them
MOVES = 3.5  # levels of deviation over time, at least, of a scene that moves between the strokes
STILL = 0.65  # of it that the strokes may show
READ, SHORTEST = 0.8, 3  # score of a reading, and its letters
CUT = 0.2  # share of the picture that may be cut off
OFTEN = 0.2  # share of the windows that must show text before the whole film is cut for it
REACH = (2, 5, 9)  # pictures before and after one that may show what its text hides
AROUND = 32  # pixels around the text by which pictures are aligned
FITS = 10.0  # levels by which they may differ there
LARGEST = 0.25  # share of the picture whose strokes may be filled
PROOF = 24  # pictures of a text's beginning on which filling is proved
WORTH = 3.0  # what filling changes, in squared levels, over how wrong it is beside the text; 2 would be even, 3 is 3 dB


class Box(NamedTuple):
    """Lines top .. bottom - 1 and columns left .. right - 1."""

    top: int
    left: int
    bottom: int
    right: int

    def area(self) -> int:
        return max(self.bottom - self.top, 0) * max(self.right - self.left, 0)

    def of(self, plane: np.ndarray) -> np.ndarray:
        """What a plane [h w] shows there."""
        return plane[self.top:self.bottom, self.left:self.right]

    def grown(self, by: int, h: int, w: int) -> "Box":
        """The box with `by` pixels more on each side, as far as the picture goes."""
        return Box(max(self.top - by, 0), max(self.left - by, 0), min(self.bottom + by, h), min(self.right + by, w))

    def shared(self, other: "Box") -> float:
        """Intersection over union."""
        both = Box(max(self.top, other.top), max(self.left, other.left), min(self.bottom, other.bottom),
                   min(self.right, other.right)).area()
        return both / max(self.area() + other.area() - both, 1)


class Track(NamedTuple):
    """Text that was drawn over the film, in pixels of the film."""

    box: Box
    text: str
    score: float  # of the reading, 0 to 1
    kind: str  # subtitle, logo or caption
    first: int  # picture
    last: int
    strokes: np.ndarray  # contrast of the text [h w] of the box, shrunk, uint8
    drawn: np.ndarray  # where the scene is hidden, bool, as large


def overlay(film: Film) -> Outcome:
    """Removes burned text. Verdict: `nothing to do`, `cropped`, `filled`, `left` or `dropped`; ValueError without an OCR engine."""
    tracks, windows = find(film)
    if not tracks:
        return Outcome(film, "nothing to do", 1.0)
    confidence = float(np.mean([track.score for track in tracks]))
    found = {"texts": [{"text": track.text, "kind": track.kind, "score": round(track.score, 3), "box": list(track.box),
                        "first": track.first, "last": track.last} for track in tracks]}
    box = _cut(film, tracks, windows)
    if box is not None:
        place = {"top": box.top, "left": box.left, "bottom": box.bottom, "right": box.right}
        return Outcome(bars.crop(film, bars.Box(*box)), "cropped", confidence, [Edit("crop text", place, confidence)], found=found)
    if max(track.box.area() for track in tracks) > LARGEST * film.kind.width * film.kind.height:
        reason = "burned text covers too much to be filled"
        return Outcome(film, "dropped", confidence, notes=[reason], found=found, dropped=reason)
    worth = _worth(film, tracks)
    for text, share in zip(found["texts"], worth, strict=True):
        text["worth"] = round(share, 2)
    notes = [f"burned text {track.text!r} stays: filling it could not be shown to be better"
             for track, share in zip(tracks, worth, strict=True) if share < WORTH]
    sure = [track for track, share in zip(tracks, worth, strict=True) if share >= WORTH]
    if not sure:
        return Outcome(film, "left", confidence, notes=notes, found=found)
    filled = film.through(lambda pictures: _filled(pictures, sure))
    left = [track.text for track in find(filled)[0] if any(track.box.shared(old.box) > 0.3 for old in sure)]
    if left:
        reason = f"burned text stays readable after filling ({left[0]!r})"
        return Outcome(film, "dropped", confidence, notes=[reason], found=found, dropped=reason)
    settings = {"texts": [{"box": list(track.box), "first": track.first, "last": track.last} for track in sure]}
    return Outcome(filled, "filled", confidence, [Edit("fill text", settings, confidence)], notes, found)


# Windows

class _Window(NamedTuple):
    """Pictures first .. last of the film, shrunk: their mean, deviation over time and contrast of strokes in the mean [h w]."""

    first: int
    last: int
    mean: np.ndarray  # uint8
    deviation: np.ndarray  # float32
    contrast: np.ndarray  # uint8


def _shrink(y: np.ndarray) -> np.ndarray:
    scale = min(WIDTH / y.shape[1], 1.0)
    size = (round(y.shape[1] * scale), round(y.shape[0] * scale))
    return y if scale == 1.0 else cv2.resize(y, size, interpolation=cv2.INTER_AREA)


def _contrast(y: np.ndarray) -> np.ndarray:
    """How much brighter or darker than what surrounds it a pixel in a stroke is: white and black top hat, uint8 [h w]."""
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (STROKE, STROKE))
    return cv2.max(cv2.morphologyEx(y, cv2.MORPH_TOPHAT, kernel), cv2.morphologyEx(y, cv2.MORPH_BLACKHAT, kernel))


def _windows(film: Film) -> Iterator[_Window]:
    total = squares = None
    count, first, last = 0, 0, -1

    def window():
        mean = total / count
        deviation = cv2.sqrt(cv2.max(squares / count - mean * mean, 0))
        mean = np.rint(mean).astype(np.uint8)
        return _Window(first, last, mean, deviation, _contrast(mean))

    for i, picture in enumerate(film):
        if i % SPACING == LENGTH and count:
            yield window()
            count = 0
        if i % SPACING >= LENGTH or i % SPACING % EVERY:
            continue
        y = _shrink(picture.y).astype(np.float32)
        if count == 0:
            total, squares, first = np.zeros_like(y), np.zeros_like(y), i
        cv2.accumulate(y, total)
        cv2.accumulateSquare(y, squares)
        count, last = count + 1, i
    if count >= 4:
        yield window()


def find(film: Film) -> tuple[list[Track], int]:
    """Text drawn over the film, and the number of windows that were looked at. Raises ValueError when there is no OCR engine."""
    tracks: list[Track] = []
    near: deque[_Window | None] = deque([None], maxlen=3)
    count = 0
    for window in itertools.chain(_windows(film), [None]):
        near.append(window)
        if len(near) == 3:
            count += 1
            _extend(tracks, *near, film.kind.width)
    return [track._replace(kind=_kind(track, film, count)) for track in tracks], count


def _extend(tracks: list[Track], before: _Window | None, window: _Window, after: _Window | None, width: int) -> None:
    """Adds what one window shows to the tracks."""
    scale = width / window.mean.shape[1]
    for box in _detected(window.mean):
        box = box.grown(EDGE, *window.mean.shape)
        drawn = _drawn(box, window, before, after)
        if drawn is None:
            continue
        strokes = box.of(window.contrast)
        large = Box(*(round(side * scale) for side in box))
        known = next((k for k, track in enumerate(tracks) if track.last >= window.first - SPACING - EVERY
                      and track.box.shared(large) > 0.5 and _alike(track.strokes, strokes) > 0.5), None)
        if known is not None:
            tracks[known] = tracks[known]._replace(last=window.last)
            continue
        text, score = _read(box.of(window.mean))
        if score >= READ and sum(letter.isalnum() for letter in text) >= SHORTEST:
            tracks.append(Track(large, text, score, "", window.first, window.last, strokes.copy(), drawn))


def _drawn(box: Box, window: _Window, before: _Window | None, after: _Window | None) -> np.ndarray | None:
    """Where in a box something was drawn over the scene, by either of the two signs: bool [h w]; None when nothing was."""
    contrast, deviation = box.of(window.contrast), box.of(window.deviation)
    core = contrast > max(CONTRAST, 0.4 * np.percentile(contrast, 98))
    if core.sum() < 20 or core.all():
        return None
    scene = float(np.percentile(deviation[~core], 75))
    strokes = float(np.percentile(deviation[core], 40))
    for other in (before, after):
        if other is not None:
            change = cv2.absdiff(box.of(window.mean), box.of(other.mean))
            stays = np.median(change[~core]) <= 5 and np.percentile(change[~core], 80) <= 12
            if stays and np.median(box.of(other.contrast)[core]) < 0.4 * np.median(contrast[core]):
                return change > 8
    if scene < MOVES or np.median(deviation[core]) > STILL * scene:
        return None
    return (contrast > CONTRAST / 2) & (deviation < strokes + 0.3 * (scene - strokes))


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two pictures, the second brought to the size of the first."""
    b = cv2.resize(b, a.shape[::-1]).astype(np.float32)
    a, b = a - a.mean(dtype=np.float32), b - b.mean()
    return float((a * b).mean() / (a.std() * b.std() + 1e-6))


def _kind(track: Track, film: Film, windows: int) -> str:
    h, w = film.kind.height, film.kind.width
    y, x = (track.box.top + track.box.bottom) / 2 / h, (track.box.left + track.box.right) / 2 / w
    whole = track.last - track.first >= 0.8 * (windows - 1) * SPACING
    if whole and (y < 0.25 or y > 0.75) and (x < 0.35 or x > 0.65):
        return "logo"
    return "subtitle" if y > 0.6 and 0.3 < x < 0.7 else "caption"


# Reading

@cache
def _engine():
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ValueError("finding burned text needs rapidocr: pip install rapidocr onnxruntime") from error
    # Without the arena, each call's buffer (24 MiB) could land above the last one's place: the heap grew, up to 150 MiB.
    runtime = {"intra_op_num_threads": 1, "inter_op_num_threads": 1, "enable_cpu_mem_arena": True}
    return RapidOCR(params={"Global.log_level": "error", "Det.limit_side_len": 320,
                            **{f"EngineConfig.onnxruntime.{name}": value for name, value in runtime.items()}})


def _detected(y: np.ndarray) -> list[Box]:
    """Boxes of text in a picture [h w]."""
    found = _engine()(np.repeat(y[..., None], 3, 2), use_det=True, use_cls=False, use_rec=False)
    out = []
    for corners in found.boxes if found.boxes is not None else []:
        left, top = np.floor(corners.min(0)).astype(int)
        right, bottom = np.ceil(corners.max(0)).astype(int)
        out.append(Box(max(int(top), 0), max(int(left), 0), min(int(bottom), y.shape[0]), min(int(right), y.shape[1])))
    return [box for box in out if box.area() > 0]


def _read(y: np.ndarray) -> tuple[str, float]:
    """What a box [h w] says, and the reading's score."""
    found = _engine()(np.repeat(y[..., None], 3, 2), use_det=False, use_cls=False, use_rec=True)
    return (found.txts[0], float(found.scores[0])) if found.txts else ("", 0.0)


# Repairs

def _cut(film: Film, tracks: list[Track], windows: int) -> Box | None:
    """What is left of the picture when the edges with text go, or None when that is too much or the text shows too seldom."""
    h, w = film.kind.height, film.kind.width
    shown = sum(track.last - track.first + 1 for track in tracks)
    if shown < OFTEN * ((windows - 1) * SPACING + LENGTH):
        return None
    sides = [0, 0, h, w]
    for track in sorted(tracks, key=lambda track: -track.box.area()):
        box = track.box
        cuts = [(box.bottom * w, 0, box.bottom), (box.right * h, 1, box.right),
                ((h - box.top) * w, 2, box.top), ((w - box.left) * h, 3, box.left)]
        if box.bottom <= sides[0] or box.right <= sides[1] or box.top >= sides[2] or box.left >= sides[3]:
            continue
        _, side, at = min(cuts)
        sides[side] = max(sides[side], at) if side < 2 else min(sides[side], at)
    margin = 2 * max(round(h / 360), 1)  # codecs smear letters
    top, left = ((side + margin + 1) // 2 * 2 if side else 0 for side in sides[:2])
    bottom, right = ((side - margin) // 2 * 2 if side < full else side for side, full in zip(sides[2:], (h, w), strict=True))
    box = Box(top, left, bottom, right)
    return box if box.area() >= (1 - CUT) * h * w else None


def _worth(film: Film, tracks: list[Track]) -> list[float]:
    """For each track, the squared change that filling makes over its squared error in areas beside the text; 0 without such areas.

    With strokes d away from the truth and a fill that is e away from it, independently, the change is d + e and a gain means d > e.
    The areas are filled in the film whose text is filled already, so that it leads nothing astray there.
    Where all of them are smoother than what is around the text, their error is taken to grow as the detail does.
    """
    filled = film.through(lambda pictures: _filled(pictures, tracks))
    changed, errors = _changes(film, filled, tracks), [[] for _ in tracks]
    beside = [_beside(track, tracks, film) for track in tracks]
    for k in range(4):
        at = [i for i, places in enumerate(beside) if k < len(places)]
        trial = [beside[i][k] for i in at]
        if trial:
            tried = _changes(filled, filled.through(lambda pictures, trial=trial: _filled(pictures, trial)), trial)
            for i, error in zip(at, tried, strict=True):
                errors[i].append(error)
    detail = iter(_detail(film, [one for track, places in zip(tracks, beside, strict=True) for one in (track, *places)]))
    worth = []
    for change, error in zip(changed, errors, strict=True):
        here, there = next(detail), max([next(detail) for _ in error], default=0.0)
        worth.append(change / max(float(np.mean(error)) * max(here / max(there, 1.0), 1.0), 1.0) if error else 0.0)
    return worth


def _detail(film: Film, tracks: list[Track]) -> list[float]:
    """Mean squared difference of luma from its blur in each track's box, away from the strokes, over its first PROOF pictures."""
    total, count = np.zeros(len(tracks)), np.zeros(len(tracks))
    last = [min(track.last, track.first + PROOF - 1) for track in tracks]
    for i, picture in enumerate(itertools.islice(film, max(last) + 1)):
        for k, track in enumerate(tracks):
            mask = _mask(picture.y, i, [track]) if track.first <= i <= last[k] else None
            if mask is not None:
                y = track.box.of(picture.y).astype(np.float32)
                away = cv2.dilate(track.box.of(mask), np.ones((5, 5), np.uint8)) == 0
                total[k] += float(np.square(y - cv2.blur(y, (7, 7)))[away].sum())
                count[k] += away.sum()
    return [float(mean) for mean in total / np.maximum(count, 1)]


def _beside(track: Track, tracks: list[Track], film: Film) -> list[Track]:
    """The track moved to the places above, below, left and right of it that lie in the picture and show no text."""
    h, w = film.kind.height, film.kind.width
    box, gap = track.box, 8
    down, across = ((side + gap + 1) // 2 * 2 for side in (box.bottom - box.top, box.right - box.left))
    moved = [Box(box.top + y, box.left + x, box.bottom + y, box.right + x)
             for y, x in ((-down, 0), (down, 0), (0, -across), (0, across))]
    free = [one for one in moved if one.top >= 0 and one.left >= 0 and one.bottom <= h and one.right <= w
            and all(one.shared(other.box.grown(gap // 2, h, w)) == 0 for other in tracks)]
    return [track._replace(box=one) for one in free]


def _changes(film: Film, other: Film, tracks: list[Track]) -> list[float]:
    """Mean squared difference of two films' luma within the strokes of each track, over its first PROOF pictures."""
    total, count = np.zeros(len(tracks)), np.zeros(len(tracks))
    last = [min(track.last, track.first + PROOF - 1) for track in tracks]
    for i, (picture, changed) in enumerate(itertools.islice(zip(film, other, strict=True), max(last) + 1)):
        for k, track in enumerate(tracks):
            mask = _mask(picture.y, i, [track]) if track.first <= i <= last[k] else None
            if mask is not None:
                there = mask > 0
                total[k] += float(np.square(picture.y[there].astype(np.float32) - changed.y[there]).sum())
                count[k] += there.sum()
    return [float(mean) for mean in total / np.maximum(count, 1)]


class _Marked(NamedTuple):
    """A picture, the mask [h w] of text in it (0 and 255) or None, and the picture with that filled from the mask's borders."""

    picture: Picture
    mask: np.ndarray | None
    smooth: Picture


def _filled(pictures: Iterator[Picture], tracks: list[Track]) -> Iterator[Picture]:
    """Pictures with the strokes of all tracks filled where they show; holds 2 * REACH[-1] + 1 of them."""
    marked = (_marked(picture, _mask(picture.y, i, tracks)) for i, picture in enumerate(pictures))
    held = deque(itertools.islice(marked, REACH[-1] + 1))
    at = 0
    while at < len(held):
        others = [held[at + k] for step in REACH for k in (-step, step) if 0 <= at + k < len(held)]
        yield held[at].picture if held[at].mask is None else _whole(held[at], others)
        at += 1
        held.extend(itertools.islice(marked, 1))
        if at > REACH[-1]:
            held.popleft()
            at -= 1


def _marked(picture: Picture, mask: np.ndarray | None) -> _Marked:
    if mask is None:
        return _Marked(picture, None, picture)
    part, planes = _part(mask, 8), [plane.copy() for plane in picture[:3]]
    for plane in planes:
        box = _scaled(part, plane, mask)
        box.of(plane)[:] = cv2.inpaint(box.of(plane), _covers(part.of(mask), box), 3, cv2.INPAINT_TELEA)
    return _Marked(picture, mask, Picture(*planes, picture.at_s))


def _part(mask: np.ndarray, around: int) -> Box:
    """The box of a mask's true pixels and `around` more, at even places."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    h, w = mask.shape
    return Box(int(max(rows[0] - around, 0)) // 2 * 2, int(max(columns[0] - around, 0)) // 2 * 2,
               min(int(rows[-1] + around) // 2 * 2, h), min(int(columns[-1] + around) // 2 * 2, w))


def _mask(y: np.ndarray, i: int, tracks: list[Track]) -> np.ndarray | None:
    """Where the strokes of tracks and their edges are in picture i: uint8 [h w] of 0 and 255; None when it shows none of them."""
    mask = None
    for track in tracks:
        if not track.first - SPACING <= i <= track.last + SPACING:
            continue
        here = _contrast(cv2.resize(track.box.of(y), track.strokes.shape[::-1], interpolation=cv2.INTER_AREA))
        if not track.first <= i <= track.last and _alike(track.strokes, here) < 0.3:
            continue
        if mask is None:
            mask = np.zeros(y.shape, np.uint8)
        size = (track.box.right - track.box.left, track.box.bottom - track.box.top)
        track.box.of(mask)[:] |= cv2.resize(track.drawn.astype(np.uint8) * 255, size, interpolation=cv2.INTER_NEAREST)
    if mask is not None:
        grow = 2 * round(max(y.shape[0] / 360, 1)) + 1
        mask = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (grow, grow)))
    return mask


def _whole(marked: _Marked, others: list[_Marked]) -> Picture:
    """The filled picture, with what other pictures show where they fit along the motion of what surrounds the text."""
    part = _part(marked.mask, AROUND)
    hidden, smooth = part.of(marked.mask), np.ascontiguousarray(part.of(marked.smooth.y))
    known = (hidden == 0).astype(np.float32)
    weight = np.maximum(cv2.blur(known, (AROUND * 2 + 1, AROUND * 2 + 1)), 1e-3)
    planes = [plane.copy() for plane in marked.smooth[:3]]
    finder = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    y, x = np.mgrid[:hidden.shape[0], :hidden.shape[1]].astype(np.float32)
    least = np.full(hidden.shape, FITS, np.float32)
    for other in others:
        flow = finder.calc(smooth, np.ascontiguousarray(part.of(other.smooth.y)), None)
        flow = cv2.blur(flow * known[..., None], (AROUND * 2 + 1, AROUND * 2 + 1)) / weight[..., None]
        there = np.zeros_like(hidden) if other.mask is None else part.of(other.mask)
        to = x + flow[..., 0], y + flow[..., 1]
        seen = cv2.remap(there, *to, cv2.INTER_LINEAR, borderValue=255) == 0
        moved = cv2.remap(part.of(other.picture.y), *to, cv2.INTER_LINEAR)
        both = seen * known
        error = cv2.blur(cv2.absdiff(moved, smooth).astype(np.float32) * both, (AROUND + 1, AROUND + 1))
        error /= np.maximum(cv2.blur(both, (AROUND + 1, AROUND + 1)), 0.02)
        better = seen & (hidden > 0) & (error < least)
        least[better] = error[better]
        for plane, given in zip(planes, other.picture[:3], strict=True):
            box = _scaled(part, plane, marked.mask)
            down, across = hidden.shape[0] // (box.bottom - box.top), hidden.shape[1] // (box.right - box.left)
            at = [np.ascontiguousarray(axis[::down, ::across] / size) for axis, size in zip(to, (across, down), strict=True)]
            put = better[::down, ::across]
            box.of(plane)[put] = cv2.remap(box.of(given), *at, cv2.INTER_LINEAR)[put]
    return Picture(*planes, marked.picture.at_s)


def _scaled(box: Box, plane: np.ndarray, luma: np.ndarray) -> Box:
    """A box of even luma pixels in a plane's own."""
    down, across = -(-luma.shape[0] // plane.shape[0]), -(-luma.shape[1] // plane.shape[1])
    return Box(box.top // down, box.left // across, box.bottom // down, box.right // across)


def _covers(hidden: np.ndarray, box: Box) -> np.ndarray:
    """A luma mask in a plane's own pixels: where any of a pixel is hidden, uint8 of 0 and 255."""
    size = (box.right - box.left, box.bottom - box.top)
    if hidden.shape[::-1] == size:
        return hidden
    return (cv2.resize(hidden, size, interpolation=cv2.INTER_AREA) > 0).astype(np.uint8) * 255


if __name__ == "__main__":
    sys.exit(main(overlay, argparse.ArgumentParser(description="Find burned text and remove it")))

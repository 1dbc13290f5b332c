"""Damage with known truth: what old, broadcast and transcoded footage suffers, as pure functions of clips, settings and a seed.

Every function takes a film.Clip (uint8 planes y [f h w], u and v [f h' w'], times [f] in seconds) and gives the damaged one, beside
what a detector should find where the settings do not say it. Nothing here changes its input.
Ghosts are the trails of recursive temporal noise reduction, y_t = (1 - a) x_t + a y_{t-1}, as recorders and converters do it.
"""

import io
from fractions import Fraction
from typing import NamedTuple

import av
import cv2
import numpy as np

from data_tools.film import Clip, Kind, Picture, frame_of, picture_of
from latte import keyed
from latte.video import REPEATABLE

ORDERS = ("tff", "bff")  # which field is shown first: the one of lines 0, 2, ... (top) or the other


# Scenes

def synth(seed: int, frames: int = 120, height: int = 360, width: int = 640, rate: float = 25.0, still: bool = False) -> Clip:
    """A procedural clip: a texture that pans by a fraction of a pixel, a turning wheel, a moving box and a scrolling line of text.

    The seed draws texture, speeds, sizes and colours. still: nothing moves but a small clock hand.
    """
    rng = keyed.rng(seed, "synth")
    t = np.arange(frames)
    scale = 0.0 if still else 1.0
    vx, vy = scale * rng.uniform(-3, 3), scale * rng.uniform(-1.5, 1.5)
    turn, spokes = rng.uniform(0.02, 0.12) * rng.choice((-1, 1)), int(rng.integers(5, 12))
    knots = rng.normal(0, 1, (64, 64)).astype(np.float32)
    big = cv2.resize(knots, (1024, 1024), interpolation=cv2.INTER_CUBIC) * 22
    fine = cv2.GaussianBlur(rng.normal(0, 1, (1024, 1024)).astype(np.float32), (0, 0), rng.uniform(1.1, 2.2))
    lines = 10 * np.sin(np.arange(1024) * rng.uniform(0.3, 1.3))[:, None] * (big > 0)
    texture = np.clip(115 + big + fine / fine.std() * 10 + lines, 16, 235).astype(np.float32)
    tint = cv2.resize(rng.normal(0, 26, (9, 9, 2)).astype(np.float32), (1024, 1024), interpolation=cv2.INTER_CUBIC)
    text = np.zeros((48, 2400), np.uint8)
    words = " ".join("".join(rng.choice(list("ABCDEFGHIKLMNOPRSTUVWXYZ"), rng.integers(3, 9))) for _ in range(14))
    cv2.putText(text, words, (4, 34), cv2.FONT_HERSHEY_SIMPLEX, 1.0, 255, 2, cv2.LINE_AA)
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    cx, cy, radius = width * rng.uniform(0.3, 0.7), height * rng.uniform(0.35, 0.6), height * rng.uniform(0.16, 0.26)
    angle, away = np.arctan2(yy - cy, xx - cx), np.hypot(xx - cx, yy - cy)
    disc = np.clip(radius - away + 0.5, 0, 1)
    box = np.array([rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height])
    speed = scale * rng.uniform(-5, 5, 2)
    level, colour = rng.uniform(30, 220), rng.integers(60, 196, 2)
    scroll = scale * rng.uniform(2, 7)
    y = np.empty((frames, height, width), np.uint8)
    u, v = (np.empty((frames, height // 2, width // 2), np.uint8) for _ in range(2))
    for i in t:
        map_x, map_y = xx + np.float32(190 + vx * i), yy + np.float32(300 + vy * i)
        picture = cv2.remap(texture, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
        chroma = 128 + cv2.remap(tint, map_x[::2, ::2], map_y[::2, ::2], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        wheel = 128 + 90 * np.clip(np.sin(spokes * (angle + turn * i)) * away / 4, -1, 1)
        picture = picture * (1 - disc) + wheel * disc
        at = np.abs((box + speed * i) % (2 * np.array([width, height])) - np.array([width, height]))  # bounces
        inside = np.clip(height * 0.09 - np.abs(xx - at[0]) + 0.5, 0, 1) * np.clip(height * 0.07 - np.abs(yy - at[1]) + 0.5, 0, 1)
        picture = picture * (1 - inside) + level * inside
        chroma = chroma * (1 - inside[::2, ::2, None]) + colour * inside[::2, ::2, None]
        shift = np.float32([[1, 0, width * 0.6 - scroll * i], [0, 1, height - 54]])
        mask = cv2.warpAffine(text, shift, (width, height), flags=cv2.INTER_LINEAR).astype(np.float32) / 255
        picture = picture * (1 - mask) + 235 * mask
        y[i] = np.clip(np.rint(picture), 16, 235)
        u[i], v[i] = (np.clip(np.rint(chroma[:height // 2, :width // 2, c]), 16, 240) for c in (0, 1))
    return Clip(y, u, v, t / rate)


# Interlace

def lowpassed(clip: Clip, kind: str = "121") -> Clip:
    """The vertical filter of a broadcast camera before its fields are taken: none, 121 ([1 2 1] / 4) or soft ([1 4 6 4 1] / 16)."""
    taps = {"none": [1], "121": [1, 2, 1], "soft": [1, 4, 6, 4, 1]}[kind]
    kernel = np.array(taps, np.float32)[:, None] / sum(taps)

    def filtered(planes):
        soft = (cv2.filter2D(plane.astype(np.float32), -1, kernel, borderType=cv2.BORDER_REPLICATE) for plane in planes)
        return np.stack([np.rint(plane).astype(np.uint8) for plane in soft])

    return clip if kind == "none" else clip.each(filtered)


def weave(clip: Clip, order: str = "tff", lowpass: str = "none") -> Clip:
    """Pictures 2i and 2i + 1 as the two fields of picture i, in luma and chroma: half as many pictures at half the rate.

    The truth of its field 2i + k is picture 2i + k of the clip.
    """
    clip = lowpassed(clip, lowpass)
    n = len(clip.y) // 2
    first = 0 if order == "tff" else 1  # the lines of the field that is shown first

    def woven(planes):
        out = planes[0:2 * n:2].copy()
        out[:, 1 - first::2] = planes[1:2 * n:2, 1 - first::2]
        return out

    return clip.each(woven)._replace(at_s=clip.at_s[0:2 * n:2])


def fields(clip: Clip, pattern: list[tuple[int, int]]) -> Clip:
    """Any pulldown: one picture a pair (number of the picture that lends its top lines, and its bottom lines), one a second."""
    top, bottom = (np.array(side) for side in zip(*pattern, strict=True))

    def woven(planes):
        out = planes[top].copy()
        out[:, 1::2] = planes[bottom, 1::2]
        return out

    return clip.each(woven)._replace(at_s=np.arange(len(pattern), dtype=float))


PULLDOWNS = {"2:3": (2, 3), "3:2": (3, 2), "2:3:3:2": (2, 3, 3, 2), "2:2": (2,), "euro": (2,) * 11 + (3,)}


class Pulldown(NamedTuple):
    clip: Clip
    pairs: list[tuple[int, int]]  # of each picture, the numbers of the film pictures that its top and bottom lines are of


def telecine(clip: Clip, pattern: str = "2:3", phase: int = 0, order: str = "tff", cuts: tuple[tuple[int, int], ...] = (),
             rate: float | None = None) -> Pulldown:
    """Film pictures held for as many fields as `pattern` says in turn, one of PULLDOWNS; euro is 24 -> 25 by a field more in 12.

    phase: how many fields are left off at the start; 1 shifts 2:2 by a field. cuts: pairs (field, k) delete k fields there, as an
    edit after the pulldown does, and break the cadence. The result has 5/4 of the rate for 2:3, unless `rate` is given.
    """
    held = PULLDOWNS[pattern]
    sequence = [i for i in range(len(clip.y)) for _ in range(held[i % len(held)])][phase:]
    for at, k in sorted(cuts, reverse=True):
        del sequence[at:at + k]
    pairs = [(a, b) if order == "tff" else (b, a) for a, b in zip(sequence[0::2], sequence[1::2], strict=False)]
    mean = sum(held) / len(held) / 2
    return Pulldown(fields(clip, pairs).timed(rate or clip.rate * mean), pairs)


def rescaled(clip: Clip, scale: float, how: str = "bicubic", offset: float = 0.0) -> Clip:
    """Every picture resized by `scale` in both directions, to even sides, as a careless transcoder does to woven ones.

    how: area, bilinear, bicubic or lanczos. offset: lines that the picture is moved down before it, which may be a fraction.
    """
    interpolation = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC,
                     "lanczos": cv2.INTER_LANCZOS4}[how]
    f, h, w = clip.y.shape
    to_h, to_w = round(h * scale / 2) * 2, round(w * scale / 2) * 2

    def resized(planes):
        sub_h, sub_w = h // planes.shape[1], w // planes.shape[2]
        out = []
        for plane in planes:
            if offset:
                move = np.float32([[1, 0, 0], [0, 1, offset / sub_h]])
                plane = cv2.warpAffine(plane, move, plane.shape[::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
            size = (to_w // sub_w, to_h // sub_h)
            if scale < 1 and how in ("bicubic", "lanczos", "bilinear"):  # a proper scaler widens its kernel when it shrinks
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(plane), format="gray")
                out.append(_plane_of(frame.reformat(width=size[0], height=size[1], interpolation=how.upper(), threads=1)))
            else:
                out.append(cv2.resize(plane, size, interpolation=interpolation))
        return np.stack(out)

    return clip.each(resized)


def _plane_of(frame) -> np.ndarray:
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:plane.height, :plane.width].copy()


# Time

def blended(clip: Clip, rate: float, source_rate: float | None = None) -> tuple[Clip, np.ndarray]:
    """A rate conversion that mixes the two nearest pictures; of each, [f 2]: the earlier one's number, the later one's share."""
    source = source_rate or clip.rate
    count = int((len(clip.y) - 1) * rate / source)
    place = np.arange(count) * source / rate
    index, share = np.floor(place + 1e-9).astype(int), place - np.floor(place + 1e-9)

    def mixed(planes):
        w = share[:, None, None].astype(np.float32)
        return np.rint(planes[index] * (1 - w) + planes[np.minimum(index + 1, len(planes) - 1)] * w).astype(np.uint8)

    return clip.each(mixed).timed(rate), np.stack([index, share], 1)


def mistimed(clip: Clip, seed: int, repeats: float = 0.12, drops: float = 0.05, run: int = 1,
             honest: bool = False) -> tuple[Clip, np.ndarray]:
    """Pictures repeated and left out at random: the clip, and the number [f] of the picture that is shown at each place.

    A repeat shows the picture before it for `run` places more; a drop leaves out one or two. Times are steady, unless honest.
    """
    rng, shown, i = keyed.rng(seed, "time"), [], 0
    while i < len(clip.y):
        chance = rng.random()
        if shown and chance < repeats / run:
            shown += [shown[-1]] * run
        elif len(shown) > 2 and chance < repeats / run + drops:
            i += int(rng.integers(1, 3))
        else:
            shown.append(i)
            i += 1
    shown = np.array(shown)
    out = clip.take(shown).timed(clip.rate)
    return (out._replace(at_s=clip.at_s[shown]) if honest else out), shown


class Join(NamedTuple):
    """Where one shot becomes the next, or a flash that is none: pictures first .. last - 1 show neither shot alone."""

    kind: str  # of JOINS
    first: int
    last: int  # equal to first for a cut, which lies before picture `first`


JOINS = ("cut", "dissolve", "fade", "wipe", "whip", "flash")


def edited(shots: list[Clip], kinds: list[str], seed: int) -> tuple[Clip, list[Join]]:
    """Shots of one size in a row; kinds[i], one of JOINS, says how shot i becomes the next. And where.

    A dissolve takes 6 to 24 pictures of both shots, a fade to black and back 12 to 30, a wipe 8 to 20, a whip 5 to 9: the first
    shot is swept aside, blurred, and the second one in. A flash whitens two pictures some time before a cut. Raises ValueError
    for a shot that is too short.
    """
    rng, joins = keyed.rng(seed, "edit"), []
    out = shots[0]
    for shot, kind in zip(shots[1:], kinds, strict=True):
        least, most = {"dissolve": (6, 24), "fade": (12, 30), "wipe": (8, 20), "whip": (5, 9)}.get(kind, (0, 0))
        n = int(rng.integers(least, most + 1))
        if min(len(out.y), len(shot.y)) < n + 12:
            raise ValueError(f"a {kind} of {n} pictures needs shots of {n + 12} and more, got {len(shot.y)}")
        end = len(out.y)
        if kind == "flash":
            at = end - 10 - int(rng.integers(0, 3))
            out = out._replace(y=out.y.copy())
            out.y[at:at + 2] = np.minimum(out.y[at:at + 2].astype(np.int16) + 150, 235)
            joins += [Join("flash", at, at + 2), Join("cut", end, end)]
        elif kind in ("dissolve", "wipe"):
            out, shot = _mixed(out, shot, n, kind), shot.take(slice(n, None))
            joins.append(Join(kind, end - n, end))
        elif kind in ("fade", "whip"):
            half = n // 2
            out, shot = _left(out, half, kind), _left(shot, half, kind, entering=True)
            joins.append(Join(kind, end - half, end + half))
        else:
            joins.append(Join("cut", end, end))
        out = Clip(*(np.concatenate(parts) for parts in zip(out[:3], shot[:3], strict=True)), np.empty(0))
    return out._replace(at_s=np.arange(len(out.y)) / shots[0].rate), joins


def _mixed(before: Clip, after: Clip, n: int, kind: str) -> Clip:
    """`before`, whose last n pictures turn into the first n of `after`."""
    share = ((np.arange(n) + 1) / (n + 1)).astype(np.float32)[:, None, None]

    def joined(first, second):
        weight = share
        if kind == "wipe":
            weight = np.arange(first.shape[2])[None, None] < share * first.shape[2]
        mixed = first[-n:] * (1 - weight) + second[:n] * weight
        return np.concatenate([first[:-n], np.rint(mixed).astype(np.uint8)])

    return Clip(*(joined(*planes) for planes in zip(before[:3], after[:3], strict=True)), np.empty(0))


def _left(clip: Clip, n: int, kind: str, entering: bool = False) -> Clip:
    """A clip that fades to black or is swept aside over its last n pictures, or comes so over its first n."""
    away = (np.arange(n) + 1) / n  # 1 is gone

    def gone(planes, dark):
        chosen = planes[:n] if entering else planes[-n:]
        out = []
        for plane, share in zip(chosen, away[::-1] if entering else away, strict=True):
            if kind == "fade":
                out.append(np.rint(dark + (plane.astype(np.float32) - dark) * (1 - share)).astype(np.uint8))
            else:
                swept = np.roll(plane, int((1 if entering else -1) * share * 0.6 * plane.shape[1]), 1)
                out.append(cv2.blur(swept, (int(share * plane.shape[1] / 6) * 2 + 1, 1)))
        return np.concatenate([np.stack(out), planes[n:]] if entering else [planes[:-n], np.stack(out)])

    return Clip(*(gone(planes, dark) for planes, dark in zip(clip[:3], (16, 128, 128), strict=True)), np.empty(0))


# Tape

def ghosted(clip: Clip, a: float | np.ndarray, chroma: bool = True) -> Clip:
    """Trails y_t = (1 - a) x_t + a y_{t-1}; a: 0 to 0.8, or a map [h w] of it."""
    def trailed(planes):
        weight = np.asarray(a, np.float32)
        if weight.ndim:
            weight = cv2.resize(weight, planes.shape[:0:-1])
        out, state = [], planes[0].astype(np.float32)
        for plane in planes:
            state = (1 - weight) * plane + weight * state
            out.append(np.clip(np.rint(state), 0, 255).astype(np.uint8))
        return np.stack(out)

    return clip.each(trailed) if chroma else clip._replace(y=trailed(clip.y))


def echoed(clip: Clip, b: float, shift: int = 0) -> Clip:
    """An echo of the picture before, y_t = (x_t + b x_{t-1}) / (1 + b), or of itself `shift` columns to the right."""
    def mixed(planes):
        if shift:
            step = shift * planes.shape[2] // clip.y.shape[2]
            other = np.concatenate([planes[:, :, :1].repeat(step, 2), planes[:, :, :-step]], 2)
        else:
            other = np.concatenate([planes[:1], planes[:-1]])
        return np.rint((planes + np.float32(b) * other) / (1 + np.float32(b))).astype(np.uint8)

    return clip.each(mixed)


def dropouts(clip: Clip, seed: int, segments: tuple[int, int] = (2, 6), share: float = 1.0,
             held: bool = False) -> tuple[Clip, np.ndarray]:
    """Line segments of 1 to 3 lines lost to noise (0.4), white (0.3) or black (0.3), and the mask [f h w] of what is lost.

    segments: least and most in a picture; share: the share of pictures that have any. held: the line above is shown instead, as
    players with a dropout compensator do.
    """
    rng, y = keyed.rng(seed, "dropout"), clip.y.copy()
    f, h, w = y.shape
    mask = np.zeros(y.shape, bool)
    for i in range(f):
        if rng.random() >= share:
            continue
        for _ in range(int(rng.integers(segments[0], segments[1] + 1))):
            rows, length = int(rng.integers(1, 4)), int(rng.integers(w // 16, w // 2))
            top, left = int(rng.integers(0, h - rows)), int(rng.integers(0, w - length))
            area = np.s_[i, top:top + rows, left:left + length]
            kind = rng.random()
            y[area] = rng.integers(16, 236, (rows, length)) if kind < 0.4 else 235 if kind < 0.7 else 16
            if held:
                y[area] = clip.y[i, max(top - 1, 0), left:left + length]
            mask[area] = True
    return clip._replace(y=y), mask


def discoloured(clip: Clip, seed: int, share: float = 0.08) -> tuple[Clip, np.ndarray]:
    """Colour lost for 1 to 3 pictures at a time, as where a tape's colour burst is: in all lines or in a part of them (0.5).

    share: of the pictures at which a loss begins, never the first or last four. Also gives the mask [f h'] of chroma lines lost.
    """
    rng, (f, h) = keyed.rng(seed, "colour"), clip.u.shape[:2]
    lost = np.zeros((f, h), bool)
    k = 4
    while k < f - 7:
        count, part = int(rng.integers(1, 4)), rng.random() < 0.5
        top, height = int(rng.integers(0, h // 2)), int(rng.integers(h // 3, h // 2))
        if rng.random() < share:
            lost[k:k + count, top if part else 0:top + height if part else h] = True
            k += count + 3
        k += 1
    u, v = (np.where(lost[:, :, None], np.uint8(128), planes) for planes in (clip.u, clip.v))
    return clip._replace(u=u, v=v), lost


def head_switch(clip: Clip, seed: int, lines: int = 8) -> tuple[Clip, int]:
    """The band at the bottom where a helical-scan head is switched: lines pulled aside and noisy. Gives its height in lines too."""
    rng, y = keyed.rng(seed, "head"), clip.y.copy()
    for plane in y:
        for k in range(lines):
            plane[-1 - k] = np.roll(plane[-1 - k], int(12 + 3 * (lines - k) + rng.integers(0, 6)))
        plane[-lines:] = np.clip(plane[-lines:] + rng.normal(0, 25, plane[-lines:].shape), 16, 235).astype(np.uint8)
    return clip._replace(y=y), lines


def flicker(clip: Clip, seed: int, strength: float = 0.08) -> tuple[Clip, np.ndarray]:
    """Luma times a gain that changes from picture to picture; and the gains [f]."""
    gains = 1 + strength * keyed.rng(seed, "flicker").uniform(-1, 1, len(clip.y))
    y = 16 + (clip.y.astype(np.float32) - 16) * gains[:, None, None].astype(np.float32)
    return clip._replace(y=np.clip(np.rint(y), 0, 255).astype(np.uint8)), gains


def tape(clip: Clip, seed: int, noise: float = 4.0, chroma_noise: float = 8.0, chroma_shift: int = 2, jitter: float = 0.8) -> Clip:
    """Noise in luma and, smeared along lines, in chroma; chroma moved to the right; lines that start at a wandering place."""
    rng = keyed.rng(seed, "tape")

    def noisy(planes, strength, smear, shift):
        out = []
        for plane in planes:
            grain = cv2.GaussianBlur(rng.normal(0, 1, plane.shape).astype(np.float32), (0, 0), smear) if smear else \
                rng.normal(0, 1, plane.shape).astype(np.float32)
            moved = np.roll(plane, shift, 1).astype(np.float32)
            if jitter:
                start = cv2.GaussianBlur(rng.normal(0, 1, (len(plane), 1)).astype(np.float32), (0, 0), 2)[:, 0] * jitter * 3
                columns = np.arange(plane.shape[1], dtype=np.float32) + start[:, None] * plane.shape[1] / clip.y.shape[2]
                moved = cv2.remap(moved, columns, np.repeat(np.arange(len(plane), dtype=np.float32)[:, None], plane.shape[1], 1),
                                  cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            out.append(np.clip(np.rint(moved + strength * grain / grain.std()), 0, 255).astype(np.uint8))
        return np.stack(out)

    u, v = (noisy(planes, chroma_noise, 2, chroma_shift) for planes in (clip.u, clip.v))
    return Clip(noisy(clip.y, noise, 0, 0), u, v, clip.at_s)


def scratched(clip: Clip, seed: int, scratches: int = 2, dust: float = 2.0) -> tuple[Clip, np.ndarray]:
    """Film damage: upright scratches that wander, and `dust` specks a picture that last one picture; and the mask [f h w]."""
    rng, y = keyed.rng(seed, "film"), clip.y.copy()
    f, h, w = y.shape
    mask = np.zeros(y.shape, bool)
    lanes = rng.uniform(0.1, 0.9, scratches) * w
    for i in range(f):
        lanes = np.clip(lanes + rng.normal(0, 0.7, scratches), 2, w - 3)
        for lane in lanes.astype(int):
            y[i, :, lane:lane + 2] = 225
            mask[i, :, lane:lane + 2] = True
        for _ in range(rng.poisson(dust)):
            spot = np.zeros((h, w), np.uint8)
            cv2.circle(spot, (int(rng.integers(w)), int(rng.integers(h))), int(rng.integers(1, 5)), 1, -1)
            y[i][spot > 0] = rng.choice((20, 230))
            mask[i] |= spot > 0
    return clip._replace(y=y), mask


# Codecs

def coded(clip: Clip, crf: int = 23, codec: str = "libx264", interlaced: str = "", bit_rate: int = 0) -> Clip:
    """What a codec leaves: libx264 at `crf`, or mpeg2video at `bit_rate` bit/s. interlaced: "", or coded as tff or bff."""
    held = io.BytesIO()
    encode(clip, held, crf, codec, interlaced, bit_rate)
    held.seek(0)
    with av.open(held) as container:
        pictures = [picture_of(frame, 0.0) for frame in container.decode(video=0)]
    assert len(pictures) == len(clip.y), (len(pictures), len(clip.y))
    return Clip(*(np.stack([picture[k] for picture in pictures]) for k in range(3)), clip.at_s)


def encode(clip: Clip, out, crf: int = 23, codec: str = "libx264", interlaced: str = "", bit_rate: int = 0,
           form: str = "matroska", pixels: str = "yuv420p", **options: str) -> None:
    """Writes a clip with its times to a path or a file object; see `coded`. options: the codec's own."""
    kind = Kind(width=clip.y.shape[2], height=clip.y.shape[1], rate=Fraction(clip.rate).limit_denominator(1001))
    with av.open(out, "w", format=form) as container:
        chosen = dict(options)
        if codec == "libx264":
            fields = f":{interlaced}=1" if interlaced else ""
            chosen = {"crf": str(crf), "preset": "veryfast", "x264-params": REPEATABLE + fields} | chosen
        stream = container.add_stream(codec, rate=kind.rate, options=chosen)
        stream.width, stream.height, stream.pix_fmt = kind.width, kind.height, pixels
        stream.codec_context.thread_count = 1
        if bit_rate:
            stream.bit_rate = bit_rate
        if interlaced and codec != "libx264":
            stream.codec_context.flags |= av.codec.context.Flags.interlaced_dct | av.codec.context.Flags.interlaced_me
        steady = np.allclose(np.diff(clip.at_s), 1 / float(kind.rate), atol=1e-3) if len(clip.at_s) > 1 else True
        base = 1 / kind.rate if steady else Fraction(1, 90_000)
        if not steady:
            stream.codec_context.time_base = stream.time_base = base
        for i, (y, u, v, at) in enumerate(zip(*clip, strict=True)):
            frame = frame_of(Picture(y, u, v, 0.0), kind)
            if pixels != "yuv420p":
                frame = frame.reformat(format=pixels, threads=1)
            frame.pts, frame.time_base = i if steady else round(float(at) / float(base)), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# Overlays

BARS = ("black", "coloured", "blurred")


def barred(clip: Clip, kind: str = "black", top: int = 0, left: int = 0, level: int = 16) -> tuple[Clip, tuple[int, int, int, int]]:
    """Bars of `top` lines above and below and `left` columns at both sides (even numbers) drawn over the picture; and the box (top,
    left, bottom, right) that is left. blurred: they hold the picture itself, enlarged until it fills the frame, blurred, dimmed."""
    f, h, w = clip.y.shape
    assert top % 2 == 0 and left % 2 == 0
    colours = {"black": (level, 128, 128), "coloured": (90, 160, 100)}

    def drawn(planes, k):
        sub_h, sub_w = h // planes.shape[1], w // planes.shape[2]
        t, l = top // sub_h, left // sub_w
        box = np.s_[t:planes.shape[1] - t, l:planes.shape[2] - l]
        out = np.empty_like(planes)
        for i, plane in enumerate(planes):
            inner = plane[box]
            if kind == "blurred":
                grow = max(plane.shape[0] / inner.shape[0], plane.shape[1] / inner.shape[1])
                big = cv2.resize(inner, tuple(int(np.ceil(side * grow)) for side in inner.shape[::-1]))
                y0, x0 = (big.shape[0] - plane.shape[0]) // 2, (big.shape[1] - plane.shape[1]) // 2
                soft = cv2.GaussianBlur(big[y0:, x0:][:plane.shape[0], :plane.shape[1]], (0, 0), plane.shape[0] / 24)
                out[i] = soft if k else np.rint(16 + (soft.astype(np.float32) - 16) * 0.75)
            else:
                out[i] = colours[kind][k]
            out[i][box] = inner
        return out

    return Clip(*(drawn(planes, k) for k, planes in enumerate(clip[:3])), clip.at_s), (top, left, h - top, w - left)


def ticker(clip: Clip, text: str, speed: float, height: int = 36, bottom: int = 8,
           x0: float | None = None) -> tuple[Clip, np.ndarray]:
    """A band with text that runs to the left at `speed` pixels a picture (may be a fraction); and the strip [height W] it shows."""
    f, h, w = clip.y.shape
    size = height / 36
    (length, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 2)
    strip = np.full((height, length + 16), 40, np.uint8)
    cv2.putText(strip, text, (8, int(height * 0.72)), cv2.FONT_HERSHEY_SIMPLEX, size, 225, 2, cv2.LINE_AA)
    start = float(w) if x0 is None else x0
    out = Clip(clip.y.copy(), clip.u.copy(), clip.v.copy(), clip.at_s)
    top = h - bottom - height
    for i in range(f):
        move = np.float32([[1, 0, start - speed * i], [0, 1, 0]])
        out.y[i, top:top + height] = cv2.warpAffine(strip, move, (w, height), flags=cv2.INTER_LINEAR, borderValue=40)
    for plane in (out.u, out.v):
        plane[:, top // 2:(top + height) // 2] = 128
    return out, strip


def captioned(clip: Clip, text: str, first: int = 0, last: int | None = None, top: float = 0.82, size: float = 1.0,
              alpha: float = 1.0) -> tuple[Clip, tuple[int, int, int, int]]:
    """White text with a dark edge burned into pictures first .. last - 1, centred; and its box (top, left, bottom, right).

    alpha below 1 and the whole length make a see-through logo."""
    f, h, w = clip.y.shape
    scale = size * h / 360
    (tw, th), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 2)
    left, bottom = max((w - tw) // 2, 0), int(top * h) + th
    edge, fill = (np.zeros((h, w), np.uint8) for _ in range(2))
    cv2.putText(edge, text, (left, bottom), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 6, cv2.LINE_AA)
    cv2.putText(fill, text, (left, bottom), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 2, cv2.LINE_AA)
    out = Clip(clip.y.copy(), clip.u.copy(), clip.v.copy(), clip.at_s)
    shown = np.s_[first:last]
    for planes, dark, light in ((out.y, 16, 235), (out.u, 128, 128), (out.v, 128, 128)):
        size_of = planes.shape[:0:-1]
        e, m = (alpha * cv2.resize(x, size_of, interpolation=cv2.INTER_AREA).astype(np.float32) / 255 for x in (edge, fill))
        mixed = (planes[shown] * (1 - e) + dark * e) * (1 - m) + light * m
        planes[shown] = np.rint(mixed).astype(np.uint8)
    return out, (bottom - th - 3, left - 3, bottom + base + 3, min(left + tw + 3, w))

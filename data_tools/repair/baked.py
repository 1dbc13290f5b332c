"""Baked combs: woven pictures that were rescaled and coded as progressive, so that fields have no lines of their own any more.

A picture woven of fields A and B is m + c d with m = (A + B) / 2, d = (A - B) / 2 and the carrier c = 1, -1, 1, ...
Rescaled by s, the carrier is a wave of 0.5 / s cycles a line, folded into 0 .. 0.5, of one phase in all pictures. What it
carries, d, follows the motion: its sign is that of the difference between the picture before and the picture after. Texture has no
such bond, nor have blocks, noise and the picture of a clean rescale. So the finder multiplies the fine vertical structure of moving
pixels with that difference, adds up along lines and over pictures, and looks for one sharp line in the spectrum of the sums
(synchronous detection). Around it, and at some others, it measures what a small logistic head weighs (train_baked.py).

The repair takes the scale back by the Wiener estimate of the woven picture, lets a small network tell the two fields apart,
scales what it changed, and adds that to the picture: where nothing combs, nothing changes.

Letters: h w lines and columns as they are, H lines of the woven original, m lines of a field of it.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from data_tools.film import Film, Picture

WEIGHTS = Path(__file__).parent / "weights"
KERNELS = ("area", "bilinear", "bicubic", "lanczos")
BINS = 4096  # of the spectrum over lines
LEAST_LINES = 48  # of a film, and columns: fewer tell no carrier from a picture
LOWEST = 0.055  # cycles a line: below, a carrier drowns in the picture
MOMENTS = 24  # of a film, at least, when it is long enough; at most twice as many
CLOSE = 12  # of these are looked at closely
TRIALS = 4  # of these are repaired on trial, where a comb was found
CERTAIN = 2.5  # score of a comb that is one even if no repair of it fits
LEAST_SLOPE = 0.0015  # levels carried for a level of change: below, it may be a remainder of what unevenly sharp lines carry
LEAST_OWN = 0.3  # share of change that upright motion does not explain: rolling text has less, and carries it like a comb
PARTS = 6  # of a picture, side by side, that are asked whether they agree
LEAST_UP = 0.245  # cycles a line: below, a carrier can only be that of a picture that was shrunk
HOME, AT_HOME = 1.5, 0.06  # log odds that speak for a comb whose picture was moved by at most so many lines: few ever were moved
CODEC = 1.25  # by how much codecs and uneven motion make a comb seem weaker, typically
COLUMNS = 240  # at most, of a moment: means of neighbours


@dataclass(frozen=True)
class Found:
    """A baked comb: how sure it is, and how the woven picture became this one."""

    score: float  # log odds, less what one clean clip in a hundred passes
    confidence: float  # 0 to 1
    scale: float  # lines now / lines of the woven original
    height: int  # of the woven original, lines
    order: str  # tff or bff: of a woven original that was moved by `offset`
    kernel: str  # of the rescale, the likeliest of KERNELS
    offset: float  # lines of the original that it was moved down by before the rescale, -0.5 to 0.5
    left: float = 0.0  # share of the comb that a repair leaves, tried on some moments; below 0 when it adds more than a codec left
    misfit: float = 0.0  # squared error of the repaired fields, woven and rescaled again, against the film, by that of the change

    @property
    def fits(self) -> bool:
        """The gate: whether a repair takes most of the comb away, and what it makes explains the film.

        Codecs weaken a comb more than they mix the fields, so that a repair which adds thrice what is left of it still helps.
        """
        return -2 < self.left < 0.75 and self.misfit < 0.2


# Detection

def analyse(film: Film) -> Found | None:
    """The baked comb of a film, or None where there is none or nothing moves.

    Fields that still lie on lines of their own (scale 1) are no baked comb. Goes through the film once.
    """
    return scored(film)[0]


def scored(film: Film) -> tuple[Found | None, float]:
    """What `analyse` gives, and the score behind it: at most 0 where that is None, -20 for fields on lines of their own."""
    if film.kind.height < LEAST_LINES or film.kind.width < LEAST_LINES:
        return None, -20.0
    kept = moments(film)
    looks = [Look.of(moment) for moment in kept]
    place, value = chosen(candidates(looks), film.kind.height, _heads()["comb"])
    if place is None:
        return None, value
    combs = []
    for likelier in (True, False) if place >= LEAST_UP else (True,):  # shrunk or enlarged: where that does not fit, the other may
        comb = located(kept, looks, place, value, likelier)
        if comb.score >= 0:
            left, misfit = tried(kept[::-(-len(kept) // TRIALS)], place, comb)
            combs.append(replace(comb, left=left, misfit=misfit))
            if combs[-1].fits:
                return combs[-1], comb.score
    return (combs[0], combs[0].score) if value > CERTAIN else (None, min(value, 0.0))


class Moment(NamedTuple):
    """What is kept of three pictures in a row, luma."""

    before: np.ndarray  # uint8 [h w'], w' <= COLUMNS columns, means of neighbours
    now: np.ndarray
    after: np.ndarray
    rows: np.ndarray  # uint8 [h / 4, w]: every fourth line of the middle picture


def moments(film: Film, most: int = MOMENTS) -> list[Moment]:
    """Lively moments spread over the film, each the liveliest of a stretch of pictures.

    Stretches double when there would be more than 2 * most of them, so that a film of any length keeps that many.
    """
    kept: list[tuple[float, Moment]] = []
    stretch, run, best = 1, 0, (0.002, None)
    window: list[tuple[np.ndarray, ...]] = []  # thinned for the look at motion, as it is kept, every fourth line
    for picture in film:
        window = [*window[-2:], (picture.y[4::8, 2::4].astype(np.int16), _folded(picture.y), picture.y[::4].copy())]
        if len(window) < 3:
            continue
        a, b, c = (item[0] for item in window)
        lively = min(float((np.abs(b - a) > 10).mean()), float((np.abs(c - b) > 10).mean()))  # a cut is lively on one side only
        if lively > best[0]:
            best = lively, Moment(*(item[1] for item in window), window[1][2])
        run += 1
        if run == stretch:
            kept += [best] if best[1] is not None else []
            run, best = 0, (0.002, None)
            if len(kept) == 2 * most:
                kept = [max(kept[i:i + 2], key=lambda item: item[0]) for i in range(0, 2 * most, 2)]
                stretch *= 2
    kept += [best] if best[1] is not None else []
    return [moment for _, moment in kept]


def _folded(plane: np.ndarray) -> np.ndarray:
    """At most COLUMNS columns, means of neighbours."""
    fold = -(-plane.shape[1] // COLUMNS)
    return cv2.resize(plane, (plane.shape[1] // fold, plane.shape[0]), interpolation=cv2.INTER_AREA)


def _smooth(planes: np.ndarray, sigma: float) -> np.ndarray:
    """Gauss along lines' order (axis 0) only."""
    return cv2.GaussianBlur(planes, (1, 2 * int(3 * sigma) + 1), sigmaX=0.01, sigmaY=sigma, borderType=cv2.BORDER_REFLECT)


@dataclass(frozen=True)
class Look:
    """What is looked at in a moment, float32 [h w']."""

    fine: np.ndarray  # vertical structure of the middle picture, levels
    even: np.ndarray  # the finest of it, of equal strength everywhere
    change: np.ndarray  # the picture after less the picture before, smooth over lines
    smooth: np.ndarray  # the middle picture, smooth over lines

    @staticmethod
    def of(moment: Moment) -> "Look":
        before, now, after = (plane.astype(np.float32) for plane in moment[:3])
        finest = now - _smooth(now, 1.0)
        even = finest / (cv2.blur(np.abs(finest), (9, 9)) + 1.5)
        return Look(np.clip(now - _smooth(now, 2.5), -30, 30), even, _smooth(after - before, 2.0), now - finest)

    @property
    def lines(self) -> int:
        return len(self.fine)


@dataclass(frozen=True)
class Evidence:
    """What speaks for a carrier at one place of the spectrum."""

    place: float  # cycles a line, 0 to 0.5
    line: float  # height of the spectral line over what is around it
    bond: float  # correlation of what the carrier carries with the change between pictures, given the other causes
    lock: float  # share of its energy that has one phase, or the opposite one, where something moves
    still_lock: float  # the same where nothing moves; 0 where everything does
    accord: float  # how far the parts of pictures agree about the phase
    slope: float  # levels carried for a level of change
    own: float  # share of the change's squares that differences between lines are not behind
    excess: float  # log of the energy at the place over that beside it, moving pixels against still ones
    near: float  # 1 at 0.5 cycles a line, where a picture cannot tell phases, 0 some lines away
    moving: float  # log of the moving pixels a picture

    def features(self) -> np.ndarray:
        """[10] what the head weighs."""
        return np.array([min(math.log(self.line + 0.1), 2.3), math.log(self.bond + 0.02), math.log(self.lock + 0.05),
                         -math.log(1.03 - self.accord), math.log(self.slope + 0.002), self.excess, self.still_lock, self.near,
                         self.moving, self.place])


def spectrum(looks: list[Look]) -> tuple[np.ndarray, np.ndarray]:
    """Places in cycles a line and the height there of the summed product of fine structure and change, over the local median."""
    total = energy = 0
    for look in looks:
        product = look.even * np.where(np.abs(look.change) > 5, np.clip(look.change, -60, 60), 0)
        total, energy = total + product.sum(1), energy + np.square(product).sum(1)
    height = np.abs(np.fft.rfft(total / np.sqrt(energy + 0.02 * energy.mean() + 1e-6), BINS))
    centres = np.arange(0, len(height), 32)
    around = np.interp(np.arange(len(height)), centres, [np.median(height[max(0, i - 250):i + 251]) for i in centres])
    places = np.arange(len(height)) / BINS
    return places, np.where(places < LOWEST, 0, height / (1.2 * around + 1e-6))


def candidates(looks: list[Look], count: int = 3) -> list[Evidence]:
    """Evidence at the highest lines of the spectrum."""
    if not looks:
        return []
    places, height = spectrum(looks)
    close = looks[::-(-len(looks) // CLOSE)]
    causes, out = [Causes.of(look) for look in close], []
    for _ in range(count):
        top = int(np.argmax(height))
        out.append(_evidence(close, causes, float(places[top]), float(height[top])))
        height[np.abs(places - places[top]) < 1.5 / looks[0].lines] = 0
    return out


def carried(plane: np.ndarray, place: float) -> tuple[np.ndarray, np.ndarray]:
    """What a carrier at `place` cycles a line carries, smooth over lines: real and imaginary part, float32 [h w']."""
    angle = (2 * np.pi * place * np.arange(len(plane)))[:, None]
    return _smooth(plane * np.cos(angle).astype(np.float32), 3.0), _smooth(plane * -np.sin(angle).astype(np.float32), 3.0)


class Causes(NamedTuple):
    """What may be behind what a carrier carries: the change between pictures, or lines that a rescale left unevenly sharp.

    Such lines carry differences between lines, still or moving; of pictures that move upright these look like changes.
    """

    weight: np.ndarray  # float32 [h w']: fine structure counts less where there is much of it
    table: np.ndarray  # float32 [PARTS 4 n]: weighed change, and differences of lines: smooth ones, second ones, fine ones
    products: np.ndarray  # [PARTS 4 4] of the rows of the table

    @staticmethod
    def of(look: Look) -> "Causes":
        smooth = _smooth(look.smooth, 1.7)
        weight = 1 / (cv2.blur(np.abs(look.fine), (9, 9)) + 1.5)
        slope = np.gradient(smooth, axis=0)
        change = np.where(np.abs(look.change) > 4, np.clip(look.change, -40, 40), 0)
        rows = (change, np.clip(slope, -20, 20), np.clip(np.gradient(slope, axis=0), -10, 10),
                np.clip(np.gradient(look.smooth, axis=0) - slope, -20, 20))
        table = np.stack([_parts(row * weight) for row in rows], 1)
        return Causes(weight, table, table @ table.transpose(0, 2, 1))


def _parts(plane: np.ndarray) -> np.ndarray:
    """[PARTS n] of a plane [h w'], without the outermost lines."""
    inside = plane[4:-4, :plane.shape[1] // PARTS * PARTS]
    return inside.reshape(len(inside), PARTS, -1).transpose(1, 0, 2).reshape(PARTS, -1)


def _evidence(looks: list[Look], causes: list[Causes], place: float, line: float) -> Evidence:
    sums = np.zeros((2, 6))  # of moving and of still pixels: energy, energy beside, phase (2), energies it is of, count
    carries, energies = [], 0.0  # what the carrier carries times its causes, and squared; weighed
    for look, cause in zip(looks, causes, strict=True):
        re, im = carried(look.fine, place)
        weighed_ = np.stack([_parts(plane * cause.weight) for plane in (re, im)], 2)
        carries.append(cause.table @ weighed_)
        energies += float(np.square(weighed_).sum())
        energy, beside = re * re + im * im, sum(np.square(part) for part in carried(look.fine, place - 0.06))
        weight = 1 / (np.sqrt(energy) + 0.5)
        size = np.abs(look.change)
        moves, still = (size > 6).astype(np.float32), (size < 2).astype(np.float32)
        stack = (energy, beside, (re * re - im * im) * weight, 2 * re * im * weight, energy * weight)
        for k, where in enumerate((moves, still)):
            sums[k] += [*(np.vdot(plane, where) for plane in stack), where.sum()]
    energy, beside, lock_re, lock_im, locked, count = sums.T
    lock, above = np.hypot(lock_re, lock_im) / (locked + 1), np.log((np.sqrt(energy / (count + 1)) + 0.1)
                                                                    / (np.sqrt(beside / (count + 1)) + 0.1))
    some_still = count[1] > 0.02 * count.sum()
    slope, own, bond, accord = _of_change(np.concatenate([cause.products for cause in causes]), np.concatenate(carries), energies)
    return Evidence(place, line, bond=bond, lock=float(lock[0]), still_lock=float(lock[1]) if some_still else 0.0, accord=accord,
                    slope=slope, own=own, excess=float(above[0] - above[1]) if some_still else 0.0,
                    near=max(0.0, 1 - (0.5 - place) * looks[0].lines / 6), moving=math.log(count[0] / len(looks) + 1))


def _of_change(products: np.ndarray, carries: np.ndarray, energies: float) -> tuple[float, float, float, float]:
    """Slope, own, bond and accord of `Evidence`: of what is carried, by least squares, that which change alone can be behind.

    Of each part of each look: products [n 4 4] of the causes, change first, and carries [n 4 2] of the causes and the carrier's two
    parts, whose squares sum up to `energies`.
    """
    whole = products.sum(0, dtype=float)
    whole += 1e-3 * np.diag(np.diag(whole) + 1)
    both = carries.sum(0)
    shares = np.linalg.solve(whole, both)
    slope, own = float(np.hypot(*shares[0])), 1 / np.linalg.inv(whole)[0, 0]  # own: squares of change that nothing else has
    left = max(energies - float((both * shares).sum()), 1e-6)
    others = np.linalg.solve(whole[1:, 1:], np.column_stack([both[1:], whole[1:, 0]]))  # behind the carrier, and behind change
    only = np.append(1, -others[:, 2])
    agree = (only @ carries - (only @ products)[:, 1:] @ others[:, :2]) @ np.array([1, 1j])
    bond = float(slope * math.sqrt(own / (left + slope**2 * own)))
    return slope, float(own / whole[0, 0]), bond, float(abs(agree.sum()) / (np.abs(agree).sum() + 1e-6))


def native(place: float, lines: int) -> bool:
    """Whether a carrier is that of fields on lines of their own: within a line of 0.5 cycles a line."""
    return place > 0.5 - 1 / lines


@cache
def _heads() -> dict:
    return json.loads((WEIGHTS / "baked.json").read_text())


def chosen(found: list[Evidence], lines: int, head: dict) -> tuple[float | None, float]:
    """The place of the likeliest comb's carrier and its log odds by a head; None for the place where there is no hope of a comb.

    Log odds are at most -HOME then, and -20 for fields on lines of their own.
    """
    carriers = []
    for evidence in found:
        odds = float(weighed(evidence.features(), head))
        fair = evidence.slope > LEAST_SLOPE and evidence.own > LEAST_OWN
        carriers.append((evidence.slope, evidence.place, odds if fair else min(odds, -HOME)))
    likely = [item for item in carriers if item[2] > 0]  # of a carrier and its harmonics, the one that carries most
    if likely and native(max(likely)[1], lines):
        return None, -20.0
    others = [item for item in carriers if not native(item[1], lines)]
    _, place, value = max(likely) if likely else max(others, key=lambda item: item[2], default=(0.0, 0.0, -20.0))
    return (place if value > -HOME else None), value


def weighed(features: np.ndarray, head: dict) -> np.ndarray:
    """Log odds [...] of features [... d] by a logistic head."""
    return (features - np.array(head["mean"])) / np.array(head["spread"]) @ np.array(head["weights"]) + head["bias"]


# Where the comb comes from

def located(kept: list[Moment], looks: list[Look], place: float, value: float, likelier: bool = True) -> Found:
    """The scale, offset, order and kernel behind a carrier near `place` cycles a line, whose log odds are `value`.

    likelier: whether of the two scales that such a carrier may come from, below 1 and above, it is the one that more speaks for.
    Woven pictures have an even number of lines; of those that the carrier allows, that is taken which was moved least.
    """
    lines, sums = looks[0].lines, envelope(looks, place)
    exact, first = carrier(sums, place)
    strength = amplitude(kept, exact, first)
    sure = 2.0 if exact < 0.3 else 0.0  # a scale of 2/3 taken for one of 2 does harm, the reverse does not
    up = (exact >= LEAST_UP and upscaled(kept, exact, strength) > sure) == likelier
    near = round((exact if up else 1 - exact) * lines)
    options = []
    for half in range(max(1, near - 1), near + 2):
        folded = half / lines if up else 1 - half / lines
        peak = (np.exp(-2j * np.pi * (folded - place) * np.arange(lines)) * sums).sum()
        offset = half / lines - 0.5 + (-1 if up else 1) * float(np.angle(peak)) / math.pi
        options.append((abs(peak), 2 * half, offset - 2 * round(offset / 2)))
    highest = max(options)[0]
    _, height, offset = min((option for option in options if option[0] > 0.9 * highest),
                            key=lambda option: abs(option[2] - round(option[2])))
    top_first = abs(offset) <= 0.5
    offset = round(offset if top_first else offset - math.copysign(1, offset), 2)
    value += HOME if abs(offset) <= AT_HOME else 0
    return Found(score=value, confidence=1 / (1 + math.exp(-value)), scale=lines / height, height=height,
                 order="tff" if top_first else "bff", kernel=_likeliest(kept, lines, height, offset, strength), offset=offset)


def envelope(looks: list[Look], place: float) -> np.ndarray:
    """Complex [h]: what a carrier at `place` carries in each line, summed with the sign that it has in the first field.

    The field that is shown first looks more like the picture before than like the one after.
    """
    sums = np.zeros(looks[0].lines, complex)
    for look in looks:
        change = np.where(np.abs(look.change) > 6, np.clip(look.change, -40, 40), 0)
        re, im = (np.einsum("hw,hw->h", part, change) for part in carried(look.fine, place))
        sums -= re + 1j * im
    return sums


def carrier(sums: np.ndarray, place: float) -> tuple[float, float]:
    """The place of a carrier, to a small part of a line of the whole picture, and its phase at line 0, from its envelope."""
    shifts = np.linspace(-1.5, 1.5, 301) / len(sums)
    heights = np.exp(-2j * np.pi * shifts[:, None] * np.arange(len(sums))) @ sums
    best = int(np.argmax(np.abs(heights)))
    return place + float(shifts[best]), float(np.angle(heights[best]))


def amplitude(kept: list[Moment], place: float, first: float) -> float:
    """How much of the comb the rescale and the codec left, about 0 to 1.

    With even motion the two fields of a picture differ as much as its second field does from the next picture's first. Of both
    only the fields' mean m and what the carrier has, g d, are seen; g follows from equal sums of squares of 2 d and of the change
    of m - d to m + d.
    """
    means = cross = both = own = 0.0
    for moment in kept[::-(-len(kept) // CLOSE)]:
        mean, comb = [], []
        for plane in (plane.astype(np.float32) for plane in moment[:3]):
            re, im = carried(np.clip(plane - _smooth(plane, 2.5), -30, 30), place)
            comb.append(cv2.blur(2 * (re * math.cos(first) + im * math.sin(first)), (5, 1)))
            mean.append(cv2.blur(_smooth(plane, 3.0), (5, 1)))
        for i in (0, 1):
            step, total = mean[i] - mean[i + 1], comb[i] + comb[i + 1]
            where = np.abs(step) > 3
            means += float(np.square(step[where]).sum())
            cross += float((step * total)[where].sum())
            both += float(np.square(total[where]).sum())
            own += float(2 * (np.square(comb[i]) + np.square(comb[i + 1]))[where].sum())
    squares = both - own
    root = cross * cross - squares * means  # of squares / g^2 - 2 cross / g + means = 0
    inverse = means / (cross + math.sqrt(root)) if root > 0 and cross > 0 else math.inf
    return float(np.clip(1 / inverse if inverse > 0 else 1, 0.01, 2))


def upscaled(kept: list[Moment], place: float, strength: float) -> float:
    """Log odds that the picture was enlarged: a carrier at one place is that of a scale above 1, or, folded, of one below."""
    return float(weighed(spread(kept, place, strength), _heads()["upscaled"]))


def spread(kept: list[Moment], place: float, strength: float) -> np.ndarray:
    """[5] what tells enlarged pictures from shrunk ones: little beyond the carrier's place, across as well, and a strong comb."""
    some = kept[::-(-len(kept) // 6)]
    across = np.concatenate([moment.rows for moment in some]).T.astype(np.float32)
    upright = np.concatenate([moment.now for moment in some], 1).astype(np.float32)
    drops = []
    for planes in (upright, across):
        fine = (planes - _smooth(planes, 4.0)) * np.hanning(len(planes))[:, None].astype(np.float32)
        power = np.square(np.abs(np.fft.rfft(fine, axis=0))).mean(1) + 1e-3
        at = np.arange(len(power)) / len(planes)
        below, under, beyond = (power[(at > a) & (at <= b)].mean() for a, b in
                                ((place - 0.2, place - 0.1), (place - 0.1, place - 0.03), (min(place + 0.03, 0.47), 0.5)))
        drops += [math.log(under / beyond), math.log(below / under)]
    return np.array([place, drops[0], drops[2], drops[3], math.log(strength)])


# Scales, and taking them back

def resize_matrix(kernel: str, height: int, lines: int, offset: float = 0.0) -> np.ndarray:
    """[lines, height] of a rescale of columns of `height` lines that were moved down by `offset` lines before it.

    A scaler that shrinks widens its kernel by 1 / scale. area: the mean of what a new line covers; bilinear: a triangle; bicubic:
    Keys 1981 with a = -0.6; lanczos: three lobes.
    """
    scale = lines / height
    centre = (np.arange(lines)[:, None] + 0.5) / scale - 0.5 - offset
    source = np.arange(-8, height + 8)
    x = np.abs(centre - source)
    if kernel == "area":
        half = max(0.5 / scale, 0.5)
        weights = np.clip(np.minimum(centre + half, source + 0.5) - np.maximum(centre - half, source - 0.5), 0, None)
    else:
        weights = {"bilinear": _bilinear, "bicubic": _bicubic, "lanczos": _lanczos}[kernel](x * min(1.0, scale))
    out = np.zeros((lines, height))
    np.add.at(out.T, np.clip(source, 0, height - 1), weights.T / weights.sum(1))
    return out


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.clip(1 - x, 0, None)


def _bicubic(x: np.ndarray, a: float = -0.6) -> np.ndarray:
    return np.where(x < 1, ((a + 2) * x - (a + 3)) * x * x + 1, np.where(x < 2, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a, 0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)


def undo_matrix(resize: np.ndarray, noise: float = 1.5, comb: float = 0.3) -> np.ndarray:
    """[height, lines]: the Wiener estimate of woven columns of which `resize` [lines, height] made what is seen.

    The columns are a mean of the fields with a spectrum that falls with the square of frequency, of 40 levels, and a carrier of 0.5
    cycles a line that carries slow changes, of `comb` times as many; what is seen has white noise of `noise` levels.
    """
    lines, height = resize.shape
    place = np.abs(np.fft.fftfreq(4 * height))
    mean, slow = 1 / np.square(0.01 + place), np.exp(-0.5 * np.square(place / 0.06)) + 0.02
    apart = np.subtract.outer(np.arange(height), np.arange(height))
    sign = (-1.0) ** np.arange(height)
    prior = (40**2 * np.fft.ifft(mean / mean.mean()).real[apart]
             + (40 * comb)**2 * np.fft.ifft(slow / slow.mean()).real[apart] * sign[:, None] * sign)
    seen = resize @ prior
    undo = np.linalg.solve(seen @ resize.T + noise**2 * np.eye(lines), seen).T
    return undo / undo.sum(1, keepdims=True)


def passed(resize: np.ndarray) -> float:
    """The share of a comb that a rescale leaves, about 0 to 1."""
    return float(math.sqrt(2) * np.std(resize[8:-8] @ (-1.0) ** np.arange(resize.shape[1])))


def _likeliest(kept: list[Moment], lines: int, height: int, offset: float, strength: float) -> str:
    """The kernel that passes as much of the comb as is seen, for shrunk pictures; else that whose pictures these could be."""
    matrices = {kernel: resize_matrix(kernel, height, lines, offset) for kernel in KERNELS}
    if lines < height:
        return min(KERNELS, key=lambda kernel: abs(math.log((passed(matrices[kernel]) + 0.01) / strength / CODEC)))
    some = np.concatenate([moment.now for moment in kept[::-(-len(kept) // 6)]], 1).astype(np.float32)
    left = {}
    for kernel, resize in matrices.items():
        back = np.linalg.solve(resize.T @ resize + 1e-3 * np.eye(height), resize.T @ some)
        left[kernel] = float(np.square(some - resize @ back)[8:-8].mean()) * (1.12 if kernel == "lanczos" else 1)
    return min(left, key=left.get)


# Repair

class Splitter(nn.Module):
    """Tells the fields of an estimated woven picture apart: 16 k weights, three pictures seen, at the lines of a field.

    Input [b 7 m w]: first and second field of the picture before, of this and of the next one, as levels / 64 - 2, and the share
    of the comb that the rescale passed. Output [b 2 m w]: what to add, in 64 levels, to the lines of the first and of the second
    field so that both show the moment of the first.
    """

    def __init__(self, width: int = 20):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(7, width, 3, padding=1), nn.ReLU()]
        for reach in (1, (1, 2), (1, 3), 1):
            layers += [nn.Conv2d(width, width, 3, padding=reach, dilation=reach), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 2, 3, padding=1))
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@cache
def _splitter() -> Splitter:
    network = Splitter().eval()
    network.load_state_dict(load_file(WEIGHTS / "baked.safetensors"))
    return network


@dataclass(frozen=True)
class Way:
    """How a plane became what it is, and the estimated way back."""

    resize: np.ndarray  # float32 [h H]
    undo: np.ndarray  # float32 [H h]
    passed: float
    top_first: bool

    @staticmethod
    @cache
    def of(kernel: str, height: int, lines: int, offset: float, top_first: bool) -> "Way":
        resize = resize_matrix(kernel, height, lines, offset)
        return Way(resize.astype(np.float32), undo_matrix(resize).astype(np.float32), passed(resize), top_first)

    def fields(self, woven: np.ndarray) -> np.ndarray:
        """[2 m w] of [H w]: lines of the first field and of the second, from above or, when the bottom one is first, from below."""
        woven = np.concatenate([woven, woven[-1:]]) if len(woven) % 2 else woven
        woven = woven if self.top_first else woven[::-1]
        return np.stack([woven[0::2], woven[1::2]])

    def woven(self, fields: np.ndarray) -> np.ndarray:
        """[H w] of [2 m w], the inverse of `fields`."""
        out = fields.transpose(1, 0, 2).reshape(-1, fields.shape[2])
        return (out if self.top_first else out[::-1])[:self.resize.shape[1]]

    def reversed(self) -> "Way":
        """The same for time that runs backwards."""
        return replace(self, top_first=not self.top_first)

    def change(self, before: np.ndarray, now: np.ndarray, after: np.ndarray) -> np.ndarray:
        """[H w] what to add to the woven estimate of `now` so that it shows the moment of its first field; arguments are woven."""
        seen = np.concatenate([self.fields(plane) for plane in (before, now, after)]) / 64 - 2
        seen = np.concatenate([seen, np.full_like(seen[:1], self.passed)])
        with torch.inference_mode():
            out = _splitter()(torch.from_numpy(np.ascontiguousarray(seen))[None])[0].numpy()
        return self.woven(out * 64)


def tried(kept: list[Moment], place: float, found: Found) -> tuple[float, float]:
    """`left` and `misfit` of a repair of some moments."""
    lines = len(kept[0].now)
    way = Way.of(found.kernel, found.height, lines, found.offset, found.order == "tff")
    place, first = carrier(envelope([Look.of(moment) for moment in kept], place), place)
    bonds, error, changed = np.zeros(2), 0.0, 1e-6
    for moment in kept:
        seen = [way.undo @ plane.astype(np.float32) for plane in moment[:3]]
        early, late = way.change(*seen), way.reversed().change(*seen[::-1])
        again = way.resize @ way.woven(np.stack([way.fields(early)[0], way.fields(late)[1]]))  # what reweaving adds; 0 is the film
        repaired = way.resize @ early
        error, changed = error + float(np.square(again).sum()), changed + float(np.square(repaired).sum())
        change = Look.of(moment).change
        change = np.where(np.abs(change) > 6, np.clip(change, -40, 40), 0)
        for k, plane in enumerate((moment.now.astype(np.float32), moment.now + repaired)):
            re, im = carried(np.clip(plane - _smooth(plane, 2.5), -30, 30), place)
            bonds[k] -= float(np.vdot(re * math.cos(first) + im * math.sin(first), change))
    return float(bonds[1] / bonds[0]) if bonds[0] > 0 else 1.0, error / changed


def repair(film: Film, found: Found, rate: str = "frame") -> Film:
    """The film with its fields told apart: pictures of the moments of their first fields, or of both at rate "field".

    The very film when `found.fits` is false. Memory: three pictures. Raises ValueError for another rate.
    """
    if rate not in ("frame", "field"):
        raise ValueError(f"rate {rate!r} is unknown; it is frame or field")
    if not found.fits:
        return film
    changes = {"rate": film.kind.rate * 2} if rate == "field" else {}
    return film.through(lambda pictures: _repaired(pictures, found, rate), **changes)


def _repaired(pictures: Iterator[Picture], found: Found, rate: str) -> Iterator[Picture]:
    window: list[tuple[Picture, tuple[np.ndarray, ...]]] = []  # with the woven estimates of the planes
    step = 0.0

    def ways(picture):
        lines = len(picture.y)
        for plane in picture[:3]:
            share = len(plane) / lines
            yield Way.of(found.kernel, round(found.height * share), len(plane), found.offset * share, found.order == "tff")

    def shown(now, before, after):
        planes = [], []
        for k, way in enumerate(ways(now[0])):
            around = [side[1][k] if _same_shot(side[0].y, now[0].y) else now[1][k] for side in (before, after)]
            woven = around[0], now[1][k], around[1]
            for out, way_, order in zip(planes, (way, way.reversed()), (woven, woven[::-1]), strict=True):
                if out is planes[0] or rate == "field":
                    change = way.resize @ way_.change(*order)
                    if k:  # small changes of colour are rather noise than a comb
                        change -= np.clip(change, -0.75, 0.75)
                    out.append(_levels(now[0][k] + change))
        yield Picture(*planes[0], now[0].at_s)
        if rate == "field":
            yield Picture(*planes[1], now[0].at_s + step / 2)

    for picture in pictures:
        item = picture, tuple(way.undo @ plane.astype(np.float32) for way, plane in zip(ways(picture), picture[:3], strict=True))
        window = [*window[-2:], item] if window else [item, item]
        if len(window) == 3:
            step = window[2][0].at_s - window[1][0].at_s
            yield from shown(window[1], window[0], window[2])
    if window:
        yield from shown(window[-1], window[-2], window[-1])


def _levels(plane: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(plane), 0, 255).astype(np.uint8)


def _same_shot(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two pictures are so alike that one can tell something of the other."""
    return float(np.abs(a[4::8, 4::8].astype(np.int16) - b[4::8, 4::8]).mean()) < 30

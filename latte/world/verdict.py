"""What is in a clip of the embedded world, from its frames alone, and how that compares with a scene.

`observe` says what is in a clip, in the scene's own words; how it sees is in vision.py. `judge` matches what was seen to what
was asked for by attributes alone, because a caption tells no positions, and compares. Lengths are frame heights, times seconds,
the camera removed, as in scene.py.
"""

import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from latte.world.render import GREY
from latte.world.scene import (
    COLOURS,
    DIRECTIONS,
    GROWTH_FACTOR,
    RADII,
    SHAPES,
    SPEEDS,
    TURNS,
    Camera,
    Object,
    Phase,
    Scene,
    heading,
    stage,
    visible,
)
from latte.world.vision import (
    PALETTE,
    REST,
    Leg,
    Measured,
    follow,
    measure,
    name_camera,
    register,
    rolling,
    segment,
    track,
)

SLACK_S = 0.75  # seconds by which an event may be off
MOST = 0.75  # share of each phase's time in which the motion must be the wanted one
KEPT = 0.8  # share of an object's time in which it must have the wanted shape, colour and size
SIZE_STEP = 0.22  # in log radius: about half way to the next size
CLUTTER = 0.01  # share of pixels: half of a small object
UNREST = 8.0  # levels; two different backgrounds are about 9 apart
# What an object gains in the matching by each right attribute.
WEIGHTS = {"shape": 1.0, "colour": 1.0, "size": 0.6, "motion": 0.8, "speed": 0.2, "events": 0.3, "growth": 0.3}
# Steadiness from which on a flaw no longer counts; softness, noise and small sizes cost true clips some of it.
FLOORS = {"presence": 0.97, "shape": 0.9, "colour": 0.6, "size": 0.6, "pace": 0.8}


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIE-Lab [k 3] of RGB levels [k 3]."""
    return cv2.cvtColor((rgb[None] / 255).astype(np.float32), cv2.COLOR_RGB2Lab)[0]


PALETTE_LAB = _lab(PALETTE)
GROUND_LAB = _lab(np.full((1, 3), GREY))[0]


# ---- what is seen


@dataclass(frozen=True)
class Seen:
    """An object as observed: its attributes in the scene's own words, and what they were frame by frame.

    Arrays have one row a frame of the clip. Where the object was not seen they hold the nearest frame's value, and its path is
    drawn straight.
    """

    told: Object
    legs: tuple[Leg, ...]
    seen: np.ndarray  # [f] bool
    hidden: np.ndarray  # [f] bool: not seen, but another object passes there
    path: np.ndarray  # [f 2] centre in the world
    straight: np.ndarray  # [f 2] the same with its bounces undone
    signs: np.ndarray  # [f 2] -1 where `straight` is mirrored
    leg: np.ndarray  # [f] index in `legs`
    radius: np.ndarray  # [f] in the world, as of the shape that it is on the whole
    lab: np.ndarray  # [f 3] CIE-Lab
    colours: np.ndarray  # [f] index in COLOURS
    shapes: np.ndarray  # [f] index in SHAPES, over a second or so

    @property
    def there(self) -> np.ndarray:
        return self.seen | self.hidden


@dataclass(frozen=True)
class Observation:
    objects: tuple[Seen, ...]
    camera: Camera
    view: np.ndarray  # [f 3] as of Camera.view()
    count: np.ndarray  # [f] objects in view, over a second or so
    unrest: np.ndarray  # [f] levels by which the background differs from its middle frame, the camera undone
    clutter: float  # share of pixels that look like objects and are of none
    fps: float
    height: int  # pixels

    def to_json(self) -> dict:
        """What was observed, without the arrays."""
        objects = [asdict(one.told) | {"vanish_s": min(one.told.vanish_s, len(one.seen) / self.fps)} for one in self.objects]
        return {"objects": objects, "camera": {"kind": self.camera.kind, "amount": self.camera.amount}}


def observe(frames: np.ndarray, fps: float = 8, seconds: float | None = None) -> Observation:
    """Reads a clip, uint8 [f h w 3]. `seconds` is the length of the scene it is the beginning of, by default the clip's own.

    ValueError if the frames are not such an array.
    """
    frames = np.ascontiguousarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 [f h w 3] with at least one frame, got {frames.dtype} {list(frames.shape)}")
    f, h, w, _ = frames.shape
    seconds = seconds or f / fps
    labels = segment(frames)
    view, rest, explained = register(frames, labels)
    camera, view = name_camera(view, explained, fps, seconds)
    measured = [measure(frames, labels, one) for one in track(frames, labels, fps)]
    objects = [_describe(one, view, camera, (f, h, w), fps, seconds) for one in measured]
    objects = [_hide(one, [other for other in objects if other is not one]) for one in objects]
    count = np.sum([one.there for one in objects], 0) if objects else np.zeros(f)
    count = rolling(count, round(fps) | 1, 50).round().astype(int)
    clutter = np.mean(labels > 0) - sum(one.pixels.sum() for one in measured) / labels.size
    return Observation(tuple(objects), camera, view, count, rest, float(clutter), fps, h)


def _describe(m: Measured, view: np.ndarray, camera: Camera, size: tuple[int, int, int], fps: float, seconds: float) -> Seen:
    """Names what was measured."""
    (f, h, w), k = size, len(m.index)
    clear = m.clear if m.clear.sum() >= max(2, 0.2 * k) else np.ones(k, bool)
    shape = int(m.misfit[clear].mean(0).argmin())
    window = min(k - 1, round(fps)) | 1
    misfit = np.pad(m.misfit * clear[:, None], ((window // 2, window // 2), (0, 0)))
    misfit = np.lib.stride_tricks.sliding_window_view(misfit, window, 0).sum(-1)  # [k shapes]
    shapes = np.where(misfit.any(1), misfit.argmin(1), shape)
    lab = _lab(m.colour)
    colours = np.linalg.norm(lab[:, None] - PALETTE_LAB, axis=-1).argmin(1)

    radius = m.radius[:, shape] / h / view[m.index, 2]
    s = m.index / fps / seconds
    slope, first = np.polyfit(s[clear], radius[clear], 1) if clear.sum() >= 4 else (0.0, 1.0)
    ratio = math.log(max(first + slope, 1e-3) / max(first, 1e-3))  # of the last radius to the first
    little = abs(ratio) < 0.2 or abs(ratio) * (s[-1] - s[0]) < 0.08  # of a short clip, the noise
    growth = "none" if little else "grow" if ratio > 0 else "shrink"
    base = np.median((radius / _scale(growth, s))[clear])
    size_name = min(RADII, key=lambda name: abs(math.log(RADII[name] / base)))

    middle = np.array([w / h / 2, 0.5])
    place = middle + view[m.index, :2] + (m.centre / h - middle) / view[m.index, 2:]
    frame = np.arange(m.index[0], m.index[-1] + 1)
    path = np.stack([np.interp(frame, m.index[m.whole], place[m.whole, axis]) for axis in range(2)], -1)
    margin = RADII[size_name] * max(1.0, GROWTH_FACTOR[growth])
    low, high = stage(camera, w / h)
    straight, signs, legs = follow(path, fps, np.stack([low + margin, high - margin]))
    start_s, end_s = frame[0] / fps, (frame[-1] + 1) / fps
    told = Object(SHAPES[shape], COLOURS[np.bincount(colours).argmax()], size_name, (float(path[0, 0]), float(path[0, 1])),
                  tuple(_tell(leg, signs[leg.first], float(start_s + leg.first / fps)) for leg in legs),
                  0.0 if start_s <= SLACK_S / 2 else float(start_s),
                  math.inf if end_s >= f / fps - SLACK_S / 2 else float(end_s), growth)
    row = np.abs(np.arange(f)[:, None] - m.index).argmin(1)
    spread = np.clip(np.arange(f) - frame[0], 0, len(frame) - 1)
    leg = np.searchsorted([leg.first for leg in legs], spread, "right") - 1
    seen = np.zeros(f, bool)
    seen[m.index] = True
    return Seen(told, tuple(legs), seen, np.zeros(f, bool), path[spread], straight[spread], signs[spread], leg, radius[row],
                lab[row], colours[row], shapes[row])


def _scale(growth: str, s: np.ndarray) -> np.ndarray:
    """Radius over first radius at the share `s` of the scene's length."""
    return 1 + (GROWTH_FACTOR[growth] - 1) * np.clip(s, 0, 1)


def _tell(leg: Leg, signs: np.ndarray, start_s: float) -> Phase:
    """A leg of the unfolded world as a phase of the real one, in the directions of its first frame, where `signs` [2] hold."""
    if leg.motion == "still":
        return Phase(start_s, "still")
    if leg.motion == "circle":
        return Phase(start_s, "circle", TURNS[0] if leg.velocity[0] * signs.prod() > 0 else TURNS[1], leg.speed)  # y is down
    angle = math.atan2(leg.velocity[1] * signs[1], leg.velocity[0] * signs[0])
    return Phase(start_s, "linear", DIRECTIONS[round(angle / (math.pi / 4)) % 8], leg.speed)


def _hide(one: Seen, others: list[Seen]) -> Seen:
    """Marks the frames in which an object that comes back is behind another."""
    hidden = np.zeros_like(one.seen)
    for other in others:
        hidden |= other.seen & (np.linalg.norm(one.path - other.path, axis=1) < one.radius + other.radius)
    first, last = np.flatnonzero(one.seen)[[0, -1]]
    hidden[:first] = hidden[last:] = False
    return replace(one, hidden=hidden & ~one.seen)


# ---- the verdict


@dataclass(frozen=True)
class Verdict:
    """What a clip is worth against a scene.

    Scores are in [0, 1]: `count`, `camera` and `background` (nothing but a background, and one that lasts) are right or not,
    the others the share of objects, wanted or seen, that are right. `joint` = every score is 1. Steadiness is in [0, 1] too:
    the mean over matched objects of how they keep what they are; an object is `steady` if none of it falls below its floor.
    """

    scores: dict[str, float]  # count, shape, colour, size, motion, speed, events, growth, steady, camera, background
    steadiness: dict[str, float]  # presence, shape, colour, size, pace
    worst: dict[str, float]  # the same, of the least steady object
    joint: bool
    velocity_error: float  # pixels a frame, mean over matched objects and time, bounces undone; nan if nothing matches
    permanence: tuple[float, ...]  # [f] share of wanted objects that kept identity, colour and size up to each frame
    count: tuple[int, ...]  # [f] objects in view
    drift: dict[str, float]  # first to last quarter: colour (CIE-Lab), size (ratio - 1); background (levels, to the middle)
    pairs: tuple[tuple[int, int], ...]  # (index among the scene's objects that the clip reaches, index in observed objects)
    observed: dict  # Observation.to_json()

    def to_json(self) -> dict:
        """Plain lists and dicts; numbers rounded to 4 places, None for nan and inf."""
        return _plain(asdict(self))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def judge(frames: np.ndarray, scene: Scene, fps: float = 8) -> Verdict:
    """Scores a clip, uint8 [f h w 3], against a scene; positions and the background's texture do not count.

    A clip shorter than the scene is judged as its beginning. ValueError if the frames are not such an array.
    """
    return compare(observe(frames, fps, scene.seconds), scene)


def compare(seen: Observation, scene: Scene) -> Verdict:
    """Scores what was seen in a clip against a scene."""
    f = len(seen.view)
    clip_s = f / seen.fps
    wanted = [one for one in scene.objects if one.appear_s < max(clip_s - SLACK_S, 1e-6)]  # later ones may not be out yet
    looks = [[_look(want, one, seen.fps, scene.seconds) for one in seen.objects] for want in wanted]
    pairs = match([[look.right for look in row] for row in looks])
    matched = [looks[i][j] for i, j in pairs]
    scores = {"count": same_count(wanted, seen.count, len(seen.objects), seen.fps),
              **tally([look.right for look in matched], len(wanted), len(seen.objects)),
              "steady": float(np.mean([look.is_steady for look in matched])) if matched else float(not wanted),
              "camera": float(seen.camera.kind == scene.camera.kind),
              "background": float(seen.clutter <= CLUTTER and seen.unrest.mean() <= UNREST)}
    errors = [look.velocity_error for look in matched if math.isfinite(look.velocity_error)]
    steady = {name: [look.steady[name] for look in matched] or [1.0] for name in FLOORS}
    kept = np.sum([look.kept for look in matched], 0) / len(wanted) if matched else np.full(f, float(not wanted))
    drift = {name: float(np.mean([look.drift[name] for look in matched])) if matched else 0.0 for name in ("colour", "size")}
    return Verdict(
        scores=scores,
        steadiness={name: float(np.mean(values)) for name, values in steady.items()},
        worst={name: min(values) for name, values in steady.items()},
        joint=all(score == 1 for score in scores.values()),
        velocity_error=float(np.mean(errors)) * seen.height / seen.fps if errors else math.nan,
        permanence=tuple(kept.tolist()),
        count=tuple(seen.count.tolist()),
        drift=drift | {"background": float(np.mean(np.append(*np.array_split(seen.unrest, 4)[::3])))},
        pairs=tuple(pairs), observed=seen.to_json())


def same_count(wanted: list[Object], count: np.ndarray, objects: int, fps: float) -> float:
    """1 if as many objects were seen as wanted, and at almost any time [f] as many at once; else 0."""
    t = (np.arange(len(count)) + 0.5) / fps
    expected = np.sum([visible(one, t) for one in wanted], 0) if wanted else np.zeros(len(t))
    return float(len(wanted) == objects and (count == expected).mean() >= 0.85)


def tally(rights: list[dict[str, bool]], wanted: int, seen: int) -> dict[str, float]:
    """Share of objects, wanted or seen, that are right in each attribute, from those of the matched pairs."""
    most = max(wanted, seen)
    return {name: sum(right[name] for right in rights) / most if most else 1.0 for name in WEIGHTS}


def match(right: list[list[dict[str, bool]]]) -> list[tuple[int, int]]:
    """Pairs wanted with seen objects so that the weighted sum of right attributes is greatest (Kuhn 1955)."""
    if not right or not right[0]:
        return []
    gain = np.array([[sum(WEIGHTS[name] for name, ok in cell.items() if ok) for cell in row] for row in right])
    return [(int(i), int(j)) for i, j in zip(*linear_sum_assignment(-gain), strict=True)]


@dataclass(frozen=True)
class Look:
    """One wanted object held against one seen."""

    right: dict[str, bool]
    steady: dict[str, float]
    kept: np.ndarray  # [f] bool: identity, colour and size kept so far
    velocity_error: float  # frame heights a second
    drift: dict[str, float]

    @property
    def is_steady(self) -> bool:
        return all(self.steady[name] >= floor for name, floor in FLOORS.items())


def _look(want: Object, one: Seen, fps: float, seconds: float) -> Look:
    f, told = len(one.seen), one.told
    clip_s, t = f / fps, (np.arange(f) + 0.5) / fps
    until = min(want.vanish_s, clip_s)
    there = (t > want.appear_s) & (t < until) & one.there
    if not there.any():
        nothing = {"colour": 0.0, "size": 0.0}
        return Look(dict.fromkeys(WEIGHTS, False), dict.fromkeys(FLOORS, 0.0), np.zeros(f, bool), math.nan, nothing)
    right, pace, velocity_error = _moves(want, one, there, fps)
    right["events"] &= same_time(told.appear_s, want.appear_s, clip_s) and same_time(told.vanish_s, want.vanish_s, clip_s)

    log_radius = _settled(np.log(one.radius / _scale(want.growth, t / seconds)), fps)
    shaped, coloured = one.shapes == SHAPES.index(want.shape), one.colours == COLOURS.index(want.colour)
    sized = np.abs(log_radius - math.log(RADII[want.size])) < SIZE_STEP
    for name, frames in (("shape", shaped), ("colour", coloured), ("size", sized)):
        right[name] = getattr(told, name) == getattr(want, name) and bool(frames[there].mean() >= KEPT)
    right["growth"] = told.growth == want.growth or clip_s < seconds / 2  # in less it cannot be told

    # by the slack of events, it should be in view for sure
    surely = (t > want.appear_s + SLACK_S * (want.appear_s > 0)) & (t < until - SLACK_S * (want.vanish_s < clip_s))
    shade = _settled(_apart(one.lab, np.median(one.lab[there], 0)), fps)
    stretch = np.abs(log_radius - np.median(log_radius[there]))
    steady = {"presence": float(one.there[surely].mean()) if surely.any() else 1.0,
              "shape": float((one.shapes == SHAPES.index(told.shape))[there].mean()),
              "colour": float(1 - min(1, np.percentile(shade[there], 95) / 25)),
              "size": float(1 - min(1, np.percentile(stretch[there], 95) / 0.25)),
              "pace": pace}
    lost = surely & ~(one.there & shaped & coloured & sized)
    lost = np.convolve(lost, np.ones(3), "same") >= 3  # a frame or two is a flicker, which presence counts
    first, last = np.array_split(np.flatnonzero(there), 4)[0], np.flatnonzero(there)[-max(1, there.sum() // 4):]
    drift = {"colour": float(np.linalg.norm(one.lab[first].mean(0) - one.lab[last].mean(0))),
             "size": math.exp(log_radius[last].mean() - log_radius[first].mean()) - 1}
    return Look(right, steady, ~np.maximum.accumulate(lost), velocity_error, drift)


def _moves(want: Object, one: Seen, there: np.ndarray, fps: float) -> tuple[dict[str, bool], float, float]:
    """Holds a path against the wanted phases, bounces undone.

    Returns what is right of motion, speed and the times of the phases; the share of time at an even pace; and the mean error of
    the velocity in frame heights a second (of its size alone, while circling).
    """
    f = len(there)
    t = (np.arange(f) + 0.5) / fps
    velocity = np.gradient(one.straight, 1 / fps, axis=0) if f > 1 else np.zeros((f, 2))
    velocity = cv2.blur(velocity, (1, 2 * max(1, round(fps / 2)) + 1), borderType=cv2.BORDER_REPLICATE)
    pace = np.hypot(*velocity.T)
    leg_speed = np.array([leg.speed for leg in one.legs])[one.leg]
    agree, speeds, even, errors, read = [], [], [], [], []
    for phase, end_s in zip(want.phases, [*(p.start_s for p in want.phases[1:]), want.vanish_s], strict=True):
        inner = np.flatnonzero(there & (t > phase.start_s + 0.4) & (t < min(end_s, f / fps) - 0.4))
        if len(inner) < 2:
            continue
        # long steps, so that wobbling is not taken for haste; on a circle short ones, which are about as long as their arc
        lag = max(1, min(round((1 if phase.motion == "circle" else 2) * fps), len(inner) // 2))
        steps = np.hypot(*(one.straight[inner[lag:]] - one.straight[inner[:-lag]]).T) * fps / lag
        signs = one.signs[inner[0]]
        read.append((phase, signs))
        agree.append(np.array([_agrees(leg, phase, signs) for leg in one.legs])[one.leg[inner]].mean())
        if phase.motion == "still":
            even.append(steps < 1.5 * REST)
            errors.append(pace[inner])
            continue
        speed = float(np.median(leg_speed[inner]))
        asked = phase.speed or min(SPEEDS.values(), key=lambda known: abs(known - speed))
        speeds.append(abs(math.log(max(speed, 1e-6) / asked)) < math.log(SPEEDS["fast"] / SPEEDS["slow"]) / 2)
        even.append(np.abs(np.log(np.maximum(steps, 1e-6) / max(np.median(steps), 1e-6))) < 0.3)
        if phase.motion == "linear":
            errors.append(np.hypot(*(velocity[inner] - heading(phase.direction) * signs * asked).T))
        else:
            errors.append(np.abs(pace[inner] - asked))
    changes = [(leg.first + np.argmax(one.seen)) / fps for leg in one.legs[1:]]
    timed = all(_runs_into(*before, *after) or any(abs(change - after[0].start_s) <= SLACK_S for change in changes)
                for before, after in pairwise(read))
    right = {"motion": bool(min(agree, default=0.0) >= MOST), "speed": all(speeds), "events": timed}
    if not read:
        return right, 1.0, math.nan
    return right, float(np.concatenate(even).mean()), float(np.concatenate(errors).mean())


def _agrees(leg: Leg, phase: Phase, signs: np.ndarray) -> bool:
    """Whether a leg goes the way that a phase wants, which began where `signs` held."""
    if leg.motion != phase.motion:
        return False
    if leg.motion == "circle":
        return leg.velocity[0] * signs.prod() * (1 if phase.direction == TURNS[0] else -1) > 0
    return leg.motion == "still" or leg.velocity @ (heading(phase.direction) * signs) > math.cos(math.pi / 8) * leg.speed


def _runs_into(phase: Phase, signs: np.ndarray, after: Phase, after_signs: np.ndarray) -> bool:
    """Whether the change from one phase to the next cannot be seen: a turn that looks like a bounce, or none."""
    both = phase.motion == after.motion == "linear"
    return both and np.allclose(heading(phase.direction) * signs, heading(after.direction) * after_signs)


def same_time(one_s: float, other_s: float, clip_s: float) -> bool:
    """Whether two events fall together; what lies beyond the clip's end is all the same."""
    return abs(min(one_s, clip_s) - min(other_s, clip_s)) <= SLACK_S


def _settled(values: np.ndarray, fps: float) -> np.ndarray:
    """Running median of [f] over half a second."""
    return rolling(values, round(fps / 2) | 1, 50)


def _apart(lab: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Distance [f] of colours from the usual one, blind to a little background in them: thin shapes have no pure pixel."""
    ray = usual - GROUND_LAB
    share = np.clip((lab - GROUND_LAB) @ ray / max(float(ray @ ray), 1e-6), 0.65, 1.15)
    return np.linalg.norm(lab - GROUND_LAB - share[:, None] * ray, axis=1)

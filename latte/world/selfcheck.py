"""How far the judge can be trusted: true clips, wrong scenes and twelve planted faults. `python -m latte.world.judge --selfcheck`.

- True renders of the default world must pass.
- A clip of another scene must score at chance. The chance of an attribute is what the judge's rules give to the truths of two
  scenes drawn independently, an expectation over the sampler's distribution in which no pixel and no vision takes part.
- A fault planted into a true clip must lower its own score below what passes.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from latte import keyed
from latte.config import WorldConfig
from latte.world.render import coverage, render
from latte.world.scene import (
    COLOURS,
    RGB,
    SHAPES,
    SPEEDS,
    Object,
    Phase,
    Scene,
    centres,
    radii,
    sample_scene,
    stage,
    visible,
)
from latte.world.verdict import (
    FLOORS,
    KEPT,
    MOST,
    SIZE_STEP,
    SLACK_S,
    WEIGHTS,
    Verdict,
    compare,
    judge,
    match,
    observe,
    same_count,
    same_time,
    tally,
)

FPS = 8.0


# ---- faults: a clip is played again with parts that do not keep to the scene


@dataclass
class Part:
    """What an object does in a clip; arrays have one row a frame."""

    of: Object
    shapes: tuple[str, str]
    blend: np.ndarray  # [f] from the first shape (0) to the second (1)
    rgb: np.ndarray  # [f 3]
    centre: np.ndarray  # [f 2] in the world
    radius: np.ndarray  # [f] in the world
    seen: np.ndarray  # [f] bool

    @property
    def moves(self) -> bool:
        return any(phase.motion != "still" for phase in self.of.phases)


def _part(obj: Object, scene: Scene, times: np.ndarray) -> Part:
    return Part(obj, (obj.shape, obj.shape), np.zeros(len(times)), np.tile(np.float32(RGB[obj.colour]), (len(times), 1)),
                centres(obj, scene, times), radii(obj, times, scene.seconds), visible(obj, times))


@dataclass
class Play:
    scene: Scene
    times: np.ndarray
    parts: list[Part]
    rng: np.random.Generator

    @classmethod
    def of(cls, scene: Scene, times: np.ndarray, rng: np.random.Generator) -> "Play":
        return cls(scene, times, [_part(o, scene, times) for o in scene.objects], rng)

    def pick(self, which: Callable[[Part], bool] = lambda part: True) -> Part | None:
        """One of the parts of which this is true, if any."""
        fit = [part for part in self.parts if which(part)]
        return fit[self.rng.integers(len(fit))] if fit else None

    def render(self, height: int, width: int) -> np.ndarray:
        """Frames [f h w 3]."""
        frames = render(replace(self.scene, objects=()), height, width, self.times).astype(np.float32)
        view = self.scene.camera.view(self.times, self.scene.seconds)
        middle = np.array([self.scene.aspect / 2, 0.5])
        for part in self.parts:
            centre = (middle + (part.centre - middle - view[:, :2]) * view[:, 2:]) * height
            radius = (part.radius * view[:, 2] * height).astype(np.float32)[:, None, None]
            x = (np.arange(width) + 0.5 - centre[:, :1]).astype(np.float32)[:, None]  # [f 1 w]
            y = (np.arange(height) + 0.5 - centre[:, 1:]).astype(np.float32)[:, :, None]  # [f h 1]
            first, second = (coverage(shape, x, y, radius) for shape in part.shapes)
            cover = (first + part.blend[:, None, None] * (second - first)) * part.seen[:, None, None]
            frames += cover[..., None] * (part.rgb[:, None, None] - frames)
        return np.rint(frames).astype(np.uint8)


# Each fault changes a play and returns whether it could: some need two objects, or one that moves.


def _progress(play: Play) -> np.ndarray:
    return play.times / play.scene.seconds


def _lasts(part: Part) -> bool:
    return part.seen.mean() > 0.5


def _flicker(play: Play) -> bool:
    part = play.pick()
    if part:
        part.seen &= play.rng.random(len(play.times)) > 0.2
    return part is not None


def _colour_swap(play: Play) -> bool:
    half = _progress(play) >= 0.5
    both = [part for part in play.parts if part.seen[half].sum() > 24 and part.seen[~half].sum() > 24]
    if len(both) < 2:
        return False
    one, other = both[0], both[1]
    one.rgb[half], other.rgb[half] = other.rgb[half].copy(), one.rgb[half].copy()
    return True


def _freeze(play: Play) -> bool:
    part = play.pick(lambda part: part.moves and len(part.of.phases) == 1)
    if part:
        at = np.flatnonzero(part.seen)
        part.centre[at[len(at) // 2]:] = part.centre[at[len(at) // 2]]
    return part is not None


def _merge(play: Play) -> bool:
    whole = [part for part in play.parts if part.seen.all()]
    if len(whole) < 2:
        return False
    one, other = whole[0], whole[1]
    share = np.clip((_progress(play) - 0.4) / 0.1, 0, 1)[:, None]
    other.centre += share * (one.centre - other.centre)
    other.seen &= share[:, 0] < 1
    return True


def _vanish(play: Play) -> bool:
    part = play.pick(lambda part: part.seen[-1])
    if part:
        part.seen &= _progress(play) < 0.6
    return part is not None


def _hue_drift(play: Play) -> bool:
    part = play.pick(_lasts)
    if part and part.of.colour == "white":  # which has no hue to turn
        part.rgb += (0.8 * _progress(play))[:, None] * (np.float32(RGB["yellow"]) - part.rgb)
    elif part:
        angle = _progress(play) * math.radians(100) * play.rng.choice([-1, 1])
        grey = part.rgb.mean(1, keepdims=True)
        chroma = part.rgb - grey  # turned about the grey axis (Rodrigues' formula)
        across = np.cross(np.full(3, 3**-0.5), chroma)
        part.rgb = (grey + np.cos(angle)[:, None] * chroma + np.sin(angle)[:, None] * across).clip(0, 255)
    return part is not None


def _speed_change(play: Play) -> bool:
    part = play.pick(lambda part: part.moves and len(part.of.phases) == 1 and _lasts(part))
    if part:
        middle = play.times[part.seen].mean()
        later = play.times + np.maximum(play.times - middle, 0)  # twice as fast from here on
        part.centre = centres(part.of, play.scene, later)
    return part is not None


def _wrong_direction(play: Play) -> bool:
    part = play.pick(lambda part: part.moves)
    if part:  # mirrored in the stage: each direction becomes its opposite, each turn the other one
        circles = any(phase.motion == "circle" for phase in part.of.phases)
        low, high = stage(play.scene.camera, play.scene.aspect)
        part.centre = np.where([True, not circles], low + high - part.centre, part.centre)
    return part is not None


def _extra_object(play: Play) -> bool:
    used = {part.of.colour for part in play.parts}
    low, high = stage(play.scene.camera, play.scene.aspect)
    spots = play.rng.uniform(low + 0.1, high - 0.1, (64, 2))
    gaps = [np.linalg.norm(part.centre - spots[:, None], axis=-1) - part.radius for part in play.parts]  # each [64 f]
    spot = spots[np.min([gap.min(1) for gap in gaps], 0).argmax()] if gaps else spots[0]
    colour = play.rng.choice([c for c in COLOURS if c not in used])
    extra = Object(play.rng.choice(SHAPES), colour, "small", tuple(spot), (Phase(0.0, "still"),))
    play.parts.append(_part(extra, play.scene, play.times))
    return True


def _shape_morph(play: Play) -> bool:
    part = play.pick(_lasts)
    if part:
        part.shapes = (part.of.shape, play.rng.choice([s for s in SHAPES if s != part.of.shape]))
        s = np.cumsum(part.seen) / part.seen.sum()
        part.blend = np.clip((s - 0.35) / 0.3, 0, 1)
    return part is not None


def _size_drift(play: Play) -> bool:
    part = play.pick(_lasts)
    if part:
        s = np.cumsum(part.seen) / part.seen.sum()
        part.radius = part.radius * 1.4 ** (s * play.rng.choice([-1, 1]))
    return part is not None


def _time_reversal(play: Play) -> bool:
    """Only where the reversed clip is not a true one of the same caption: a path that bounced once ends as it began."""
    def tells(part: Part) -> bool:
        if len(part.of.phases) > 1 or not part.moves:
            return False
        path = part.centre[part.seen]
        return part.of.phases[0].motion == "circle" or (path[1] - path[0]) @ (path[-1] - path[-2]) > 0

    if not any(tells(part) for part in play.parts):
        return False
    play.times = play.times[::-1].copy()
    for part in play.parts:
        part.centre, part.radius, part.seen = part.centre[::-1], part.radius[::-1], part.seen[::-1]
    return True


# Fault -> how to plant it, and its own score: an attribute, "steady.X" for the steadiness of X, or the last permanence.
FAULTS: dict[str, tuple[Callable[[Play], bool], str]] = {
    "flicker": (_flicker, "steady.presence"),
    "colour swap": (_colour_swap, "colour"),
    "freeze": (_freeze, "motion"),
    "merge": (_merge, "count"),
    "vanish": (_vanish, "permanence"),
    "hue drift": (_hue_drift, "steady.colour"),
    "speed change": (_speed_change, "steady.pace"),
    "wrong direction": (_wrong_direction, "motion"),
    "extra object": (_extra_object, "count"),
    "shape morph": (_shape_morph, "steady.shape"),
    "size drift": (_size_drift, "steady.size"),
    "time reversal": (_time_reversal, "motion"),
}


def plant(fault: str, scene: Scene, size: int, frames: int, rng: np.random.Generator) -> np.ndarray | None:
    """A clip [f size size 3] of the scene at 8 fps with one of FAULTS in it; None if this scene cannot have it."""
    play = Play.of(scene, np.arange(frames) / FPS, rng)
    return play.render(size, size) if FAULTS[fault][0](play) else None


def own_score(verdict: Verdict, fault: str) -> float:
    """The score that a fault should lower."""
    name = FAULTS[fault][1]
    if name == "permanence":
        return verdict.permanence[-1]
    return verdict.steadiness[name.removeprefix("steady.")] if name.startswith("steady.") else verdict.scores[name]


def caught(verdict: Verdict, fault: str) -> bool:
    """Whether the fault's own score does not pass; of steadiness, that of the worst object."""
    name = FAULTS[fault][1]
    if name.startswith("steady."):
        return verdict.worst[name.removeprefix("steady.")] < FLOORS[name.removeprefix("steady.")]
    return own_score(verdict, fault) < 1


# ---- chance


def truth_scores(scene: Scene, other: Scene, frames: int) -> dict[str, float]:
    """What the judge's rules give to a perfectly seen clip of another scene of the same length."""
    t = (np.arange(frames) + 0.5) / FPS
    rights = [[_truth_right(want, one, t) for one in other.objects] for want in scene.objects]
    pairs = match(rights)
    count = np.sum([visible(one, t) for one in other.objects], 0) if other.objects else np.zeros(frames)
    return {"count": same_count(list(scene.objects), count, len(other.objects), FPS),
            **tally([rights[i][j] for i, j in pairs], len(scene.objects), len(other.objects)),
            "camera": float(scene.camera.kind == other.camera.kind)}


def _truth_right(want: Object, one: Object, t: np.ndarray) -> dict[str, bool]:
    """Which attributes of one true object are those of another, by the rules of the judge."""
    clip_s = len(t) / FPS
    there = visible(want, t) & visible(one, t)
    if not there.any():
        return dict.fromkeys(WEIGHTS, False)
    right = {name: getattr(want, name) == getattr(one, name) for name in ("shape", "colour", "size", "growth")}
    stretch = np.log(radii(one, t, clip_s) / radii(want, t, clip_s))[there]
    right["size"] &= (np.abs(stretch) < SIZE_STEP).mean() >= KEPT
    now = np.searchsorted([phase.start_s for phase in one.phases], t, "right") - 1
    agree, speeds = [], []
    for i, phase in enumerate(want.phases):
        end_s = want.phases[i + 1].start_s if i + 1 < len(want.phases) else min(want.vanish_s, clip_s)
        inner = there & (t > phase.start_s + 0.4) & (t < end_s - 0.4)
        if inner.any():
            same = np.array([(phase.motion, phase.direction) == (p.motion, p.direction) for p in one.phases])
            agree.append(same[now[inner]].mean())
            if phase.motion != "still":
                speed = np.median(np.array([p.speed for p in one.phases])[now[inner]])
                speeds.append(abs(math.log(max(speed, 1e-6) / phase.speed)) < math.log(SPEEDS["fast"] / SPEEDS["slow"]) / 2)
    right["motion"], right["speed"] = min(agree, default=0.0) >= MOST, all(speeds)
    right["events"] = same_time(one.appear_s, want.appear_s, clip_s) and same_time(one.vanish_s, want.vanish_s, clip_s)
    right["events"] &= all(any(abs(p.start_s - phase.start_s) <= SLACK_S for p in one.phases[1:]) for phase in want.phases[1:])
    return right


# ---- the report


def selfcheck(n: int, seed: int = 0, size: int = 64, frames: int = 128) -> dict:
    """Judges n true renders of the default world (each from its own key), wrong scenes and planted faults; plain data.

    Faults go into the first tenth of the scenes, and at least the first ten; wrong scenes are the three next of each clip.
    ValueError if n is below 2.
    """
    if n < 2:
        raise ValueError(f"a self-check needs at least 2 clips, got {n}")
    cfg, times = WorldConfig(), np.arange(frames) / FPS
    scenes = [sample_scene(keyed.rng(seed, "selfcheck", i), cfg) for i in range(n)]
    verdicts, observations, seconds = [], [], []
    for i, scene in enumerate(scenes):
        clip = render(scene, size, size, times)
        begun = time.process_time()
        observations.append(observe(clip, FPS, scene.seconds))
        verdicts.append(compare(observations[-1], scene))
        seconds.append(time.process_time() - begun)
        _say(f"true clip {i + 1} of {n}: {sum(v.joint for v in verdicts)} pass")
    wrong = [[compare(observations[(i + k) % n], scene).scores for k in range(1, min(4, n))] for i, scene in enumerate(scenes)]
    return {
        "clips": n, "seed": seed, "frames": frames, "size": size,
        "seconds_per_clip": {name: _round(f(seconds)) for name, f in (("mean", np.mean), ("median", np.median), ("max", np.max))},
        "joint_pass": _round(np.mean([v.joint for v in verdicts])),
        "failed": [{"clip": i, "scores": {k: _round(x) for k, x in v.scores.items() if x < 1}}
                   for i, v in enumerate(verdicts) if not v.joint],
        "scores": {name: _round(np.mean([v.scores[name] for v in verdicts])) for name in verdicts[0].scores},
        "steadiness": {name: _round(np.mean([v.steadiness[name] for v in verdicts])) for name in FLOORS},
        "permanence": _round(np.mean([v.permanence[-1] for v in verdicts])),
        "velocity_error": _round(np.nanmean([v.velocity_error for v in verdicts])),
        "faults": _fault_table(scenes[: max(10, n // 10)], verdicts, seed, size, frames),
        "chance": chance_table(wrong, seed, frames, pool=min(1000, 20 * n)),
    }


def _fault_table(scenes: list[Scene], clean: list[Verdict], seed: int, size: int, frames: int) -> dict:
    table = {}
    for fault in FAULTS:
        rows = []
        for i, scene in enumerate(scenes):
            clip = plant(fault, scene, size, frames, keyed.rng(seed, "fault", fault, i))
            if clip is not None:
                rows.append((clean[i], judge(clip, scene, FPS)))
        _say(f"fault {fault}: {sum(caught(after, fault) for _, after in rows)} of {len(rows)} caught")
        if rows:
            falls = {name: np.mean([before.scores[name] - after.scores[name] for before, after in rows])
                     for name in rows[0][0].scores}
            table[fault] = {"own_score": FAULTS[fault][1], "planted": len(rows),
                            "caught": _round(np.mean([caught(after, fault) for _, after in rows])),
                            "before": _round(np.mean([own_score(before, fault) for before, _ in rows])),
                            "after": _round(np.mean([own_score(after, fault) for _, after in rows])),
                            "joint_after": _round(np.mean([after.joint for _, after in rows])),
                            "all_that_fall": {name: _round(fall) for name, fall in falls.items() if fall > 0.02}}
    return table


def chance_table(wrong: list[list[dict]], seed: int, frames: int, pool: int) -> dict:
    """Holds what wrong scenes scored, [clips][comparisons], against the mean over ten pairs a scene of `pool` truths."""
    cfg = WorldConfig()
    truths = [sample_scene(keyed.rng(seed, "chance", i), cfg) for i in range(pool)]
    rng = keyed.rng(seed, "pairs")
    expected = [truth_scores(truths[a], truths[b], frames)
                for a, b in (rng.choice(pool, 2, replace=False) for _ in range(10 * pool))]
    _say("chance: done", last=True)
    table = {}
    for name in expected[0]:
        chance = [row[name] for row in expected]
        measured = [np.mean([row[name] for row in rows]) for rows in wrong]
        # every scene is in several pairs, so scenes are counted for the error, not pairs
        error = math.hypot(np.std(chance) / math.sqrt(pool), np.std(measured) / math.sqrt(len(measured)))
        table[name] = {"analytic": _round(np.mean(chance)), "measured": _round(np.mean(measured)), "standard_error": _round(error)}
    return table


def _round(value: float) -> float:
    return round(float(value), 4)


def _say(text: str, last: bool = False) -> None:
    print(f"\r{text:<60}", end="\n" if last else "", file=sys.stderr, flush=True)

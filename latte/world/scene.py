"""Scenes: the exact truth behind a clip of the embedded world, and where every object and the camera is at any time.

Units: lengths are in frame heights (the frame is 1 high and `aspect` wide, x to the right, y down, origin top left),
times in seconds. A scene knows nothing of pixels or frame rates, so one scene renders at any size, length and rate.
Positions, radii and directions are of the world; the camera maps world to frame (see `Camera.view`). Objects live on
the stage, the part of the world that stays in view for the whole clip, and bounce off its walls.
"""

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np

from latte import keyed
from latte.config import WorldConfig

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
# At least 25 apart in CIE-Lab from one another and from every grey of the background (a test measures it).
RGB = {"red": (214, 34, 46), "orange": (250, 138, 24), "yellow": (250, 226, 40), "green": (38, 168, 62),
       "cyan": (64, 214, 226), "blue": (34, 84, 226), "purple": (168, 64, 200), "white": (248, 248, 248)}
SIZES = ("small", "medium", "large")
RADII = {"small": 0.08, "medium": 0.125, "large": 0.19}  # circumscribed radius in frame heights, at scale 1
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")  # 45 degree steps, y down
TURNS = ("clockwise", "counter-clockwise")
MOTIONS = ("linear", "circle", "still")
CAMERAS = ("static", "pan-left", "pan-right", "tilt-up", "tilt-down", "zoom-in", "zoom-out", "shake")
GROWTH = ("none", "grow", "shrink")
GROWTH_FACTOR = {"none": 1.0, "grow": 1.5, "shrink": 1 / 1.5}  # last / first radius
SPLITS = ("train", "test")
# Frame heights per second. At 64 pixels and 8 fps: 0.4 and 0.8 px a frame, far above what a tracker confuses with rest or
# with each other, yet only 0.8 and 1.6 heights in 16 s: one or two and two or three bounces on the full stage, counted in
# each direction; at most six, for a large fast object under a pan or tilt.
SPEEDS = {"slow": 0.05, "fast": 0.1}
# Camera.amount is drawn between these, by the first word of the kind.
CAMERA_AMOUNTS = {"static": (0.0, 0.0), "pan": (0.25, 0.35), "tilt": (0.25, 0.35), "zoom": (1.3, 1.5), "shake": (0.03, 0.04)}
ORBIT = 0.12  # radius of circling, in frame heights: 7.5 s a turn when fast, 15 s when slow
HELD_OUT = 0.1  # share of attribute combinations that only the test split has
CLEARANCE = 0.03  # up to three objects stay this far apart, 2 px at 64 pixels; more of them merely do not overlap
MIN_LEG = 0.12  # a linear phase goes at least this far (or its whole way) before its first bounce: its direction can be seen


@dataclass(frozen=True)
class Phase:
    """One stretch of an object's motion, from `start_s` to the next phase's start (or the end of the clip)."""

    start_s: float
    motion: str  # of MOTIONS
    direction: str = ""  # of DIRECTIONS for linear, of TURNS for circle, "" for still
    speed: float = 0.0  # frame heights per second, along the path; 0 for still, and where a parsed caption tells no speed


@dataclass(frozen=True)
class Object:
    shape: str
    colour: str
    size: str
    start: tuple[float, float]  # centre when the first phase begins
    phases: tuple[Phase, ...]  # the first begins when the object appears; the next one begins where the last one ended
    appear_s: float = 0.0  # visible in [appear_s, vanish_s)
    vanish_s: float = math.inf
    growth: str = "none"  # of GROWTH: the radius goes linearly from 1 to GROWTH_FACTOR over the scene's length


@dataclass(frozen=True)
class Camera:
    kind: str = "static"  # of CAMERAS
    amount: float = 0.0  # pan, tilt: total travel in frame heights; zoom: largest / smallest magnification; shake: bound
    seed: int = 0  # shake only

    def view(self, times: np.ndarray, seconds: float) -> np.ndarray:
        """What the camera sees at `times` [f] of a clip of `seconds`: [f 3] = (x, y, magnification).

        With c the middle of the frame, frame = c + (world - c - (x, y)) * magnification. Pans and zooms are centred on the
        clip's middle (offset 0, magnification 1), so that apparent sizes stay on their own side of the size classes.
        """
        times = np.asarray(times, np.float64)
        s = np.clip(times / seconds, 0, 1) - 0.5
        view = np.zeros((len(times), 3))
        view[:, 2] = 1
        if self.kind in ("pan-left", "pan-right"):
            view[:, 0] = self.amount * s * (1 if self.kind == "pan-right" else -1)
        elif self.kind in ("tilt-up", "tilt-down"):
            view[:, 1] = self.amount * s * (1 if self.kind == "tilt-down" else -1)
        elif self.kind in ("zoom-in", "zoom-out"):
            view[:, 2] = self.amount ** (s if self.kind == "zoom-in" else -s)
        elif self.kind == "shake":  # a few sines of random pitch: smooth, never repeating, at most `amount` off
            rng = keyed.rng(self.seed, "shake")
            hertz, phase = rng.uniform(0.6, 2.6, (3, 2)), rng.uniform(0, 2 * math.pi, (3, 2))
            view[:, :2] = self.amount * np.sin(2 * math.pi * hertz * times[:, None, None] + phase).mean(1)
        return view


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    camera: Camera = Camera()
    background: int = 0  # seed of the texture
    seconds: float = 16.0
    aspect: float = 1.0


# ---- kinematics: pure functions of time


def heading(direction: str) -> np.ndarray:
    """The unit vector [2] of one of DIRECTIONS."""
    angle = DIRECTIONS.index(direction) * math.pi / 4
    return np.array([math.cos(angle), math.sin(angle)])


def stage(camera: Camera, aspect: float = 1.0) -> np.ndarray:
    """The world region in view during the whole clip: [2 2] = ((left, top), (right, bottom))."""
    middle = np.array([aspect / 2, 0.5])
    half = middle.copy()
    if camera.kind.startswith("pan"):
        half[0] -= camera.amount / 2
    elif camera.kind.startswith("tilt"):
        half[1] -= camera.amount / 2
    elif camera.kind.startswith("zoom"):
        half /= math.sqrt(camera.amount)
    elif camera.kind == "shake":
        half -= camera.amount
    return np.stack([middle - half, middle + half])


def radii(obj: Object, times: np.ndarray, seconds: float) -> np.ndarray:
    """Circumscribed radius [f] in frame heights, before the camera."""
    s = np.clip(np.asarray(times, np.float64) / seconds, 0, 1)
    return RADII[obj.size] * (1 + (GROWTH_FACTOR[obj.growth] - 1) * s)


def visible(obj: Object, times: np.ndarray) -> np.ndarray:
    """Whether the object is there: bool [f]."""
    times = np.asarray(times, np.float64)
    return (times >= obj.appear_s) & (times < obj.vanish_s)


def centres(obj: Object, scene: Scene, times: np.ndarray) -> np.ndarray:
    """Centre [f 2] in the world."""
    return _paths(np.array([obj.start]), obj, _room(obj, scene.camera, scene.aspect), np.asarray(times, np.float64))[0]


def on_screen(obj: Object, scene: Scene, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre [f 2] and radius [f] in the frame, after the camera, in frame heights."""
    view = scene.camera.view(times, scene.seconds)
    middle = np.array([scene.aspect / 2, 0.5])
    centre = middle + (centres(obj, scene, times) - middle - view[:, :2]) * view[:, 2:]
    return centre, radii(obj, times, scene.seconds) * view[:, 2]


def bounces(obj: Object, scene: Scene) -> int:
    """How often the object meets a wall while it is visible."""
    room, starts, hits = _room(obj, scene.camera, scene.aspect), np.array([obj.start]), 0
    for phase, end in _stretches(obj, scene.seconds):
        if phase.motion == "linear":
            straight = starts[0] + heading(phase.direction) * phase.speed * (end - phase.start_s)
            hits += int(np.abs(np.floor((straight - room[0]) / (room[1] - room[0]))).sum())
        starts = _advance(starts, phase, np.array([end - phase.start_s]), room)[:, 0]
    return hits


def _stretches(obj: Object, seconds: float) -> list[tuple[Phase, float]]:
    """The phases, each with its end."""
    return list(zip(obj.phases, [*(p.start_s for p in obj.phases[1:]), min(obj.vanish_s, seconds)], strict=True))


def _room(obj: Object, camera: Camera, aspect: float) -> np.ndarray:
    """Where the centre may be, [2 2]: the stage less the object's largest radius."""
    margin = RADII[obj.size] * max(1.0, GROWTH_FACTOR[obj.growth])
    low, high = stage(camera, aspect)
    return np.stack([low + margin, np.maximum(high - margin, low + margin + 1e-6)])


def _fold(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Reflects a straight path between two walls: a bounce."""
    width = high - low
    return high - np.abs((x - low) % (2 * width) - width)


def _advance(start: np.ndarray, phase: Phase, elapsed: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Centres [k f 2] of one phase from `start` [k 2], `elapsed` [f] seconds into it."""
    if phase.motion == "linear":
        path = start[:, None] + heading(phase.direction) * (phase.speed * elapsed)[:, None]
        return _fold(path, room[0], room[1])
    if phase.motion == "circle":
        arm = start - _pivot(start, room)  # [k 2]
        angle = phase.speed / ORBIT * elapsed * (1 if phase.direction == "clockwise" else -1)  # y is down
        cos, sin = np.cos(angle), np.sin(angle)
        turned = np.stack([arm[:, :1] * cos - arm[:, 1:] * sin, arm[:, :1] * sin + arm[:, 1:] * cos], -1)
        return (start - arm)[:, None] + turned
    return np.repeat(start[:, None], len(elapsed), 1)


def _pivot(start: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Centre [k 2] of a circling that begins at `start` [k 2]: towards the middle of the stage."""
    inward = room.mean(0) - start
    length = np.linalg.norm(inward, axis=-1, keepdims=True)
    return start + ORBIT * np.where(length > 1e-6, inward / np.maximum(length, 1e-6), [0.0, 1.0])


def _paths(starts: np.ndarray, obj: Object, room: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Centres [k f 2] of an object for each of several starts [k 2]; before its first phase an object rests there."""
    path = np.repeat(starts[:, None], len(times), 1)
    for i, phase in enumerate(obj.phases):
        if i:
            last = obj.phases[i - 1]
            starts = _advance(starts, last, np.array([phase.start_s - last.start_s]), room)[:, 0]
        now = times >= phase.start_s  # what a later phase changes, it overwrites
        path[:, now] = _advance(starts, phase, times[now] - phase.start_s, room)
    return path


# ---- sampling


def held_out(obj: Object) -> bool:
    """Whether this combination of shape, colour, size and motion belongs to the test split only."""
    motion = "/".join(f"{p.motion} {p.direction}" for p in obj.phases)
    digest = hashlib.blake2b(f"{obj.shape}|{obj.colour}|{obj.size}|{motion}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELD_OUT * 2**64


def sample_scene(rng: np.random.Generator, cfg: WorldConfig, split: str = "train", seconds: float = 16.0,
                 aspect: float = 1.0) -> Scene:
    """Draws a scene of the world that `cfg` describes.

    No object of a train scene has a held-out combination of attributes; every test scene with objects has one at least.
    Objects keep clear of one another where the stage has room for it: starts, looks and motions are drawn again until they
    do. That makes large objects rarer beside others than alone. ValueError names a setting that the world does not know.
    """
    for key, names in (("motions", (*MOTIONS, "stop-go", "sequence")), ("cameras", CAMERAS), ("speeds", tuple(SPEEDS))):
        asked = getattr(cfg, key)
        if not asked or not set(asked) <= set(names):
            raise ValueError(f"data.world.{key}: must be some of {', '.join(names)}; got {asked}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return _Sampler(rng, cfg, split, seconds, aspect).scene()


def even_starts(count: int, seconds: float) -> list[float]:
    """When the phases of a sequence begin where its caption tells no times: even parts, on whole seconds."""
    return [_on_tick(i * seconds / count, seconds) for i in range(count)]


def _on_tick(time: float, seconds: float) -> float:
    """Events fall on whole seconds, or on sixteenths of a short clip, so that a caption can tell them exactly."""
    tick = 1.0 if seconds >= 8 else seconds / 16
    return tick * round(time / tick)


class _Sampler:
    def __init__(self, rng: np.random.Generator, cfg: WorldConfig, split: str, seconds: float, aspect: float):
        self.rng, self.cfg, self.split, self.seconds, self.aspect = rng, cfg, split, seconds, aspect
        self.times = np.arange(0, seconds, seconds / 64)  # when objects are checked for touching
        kind = self.pick(cfg.cameras)
        amount = float(rng.uniform(*CAMERA_AMOUNTS[kind.split("-")[0]]))
        self.camera = Camera(kind, amount, int(rng.integers(2**31)) if kind == "shake" else 0)
        self.count = int(rng.integers(cfg.min_objects, cfg.max_objects + 1))
        self.sizes = SIZES if self.count <= 3 else SIZES[:2] if self.count <= 5 else SIZES[:1]
        self.clearance = CLEARANCE if self.count <= 3 else 0.0

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def moment(self, low: float, high: float) -> float:
        """A time for an event, between two shares of the clip."""
        return _on_tick(self.rng.uniform(low, high) * self.seconds, self.seconds)

    def scene(self) -> Scene:
        best, widest = [], -math.inf
        for _ in range(4):  # a crowded stage is set up anew a few times
            objects, gap = self.objects()
            if gap > widest:
                best, widest = objects, gap
            if widest >= self.clearance:
                break
        order = self.rng.permutation(self.count)
        background = int(self.rng.integers(self.cfg.backgrounds or 2**31))
        return Scene(tuple(best[i] for i in order), self.camera, background, self.seconds, self.aspect)

    def objects(self) -> tuple[list[Object], float]:
        """The objects of a scene and the narrowest gap between any two."""
        objects: list[Object] = []
        narrowest = math.inf
        others = [COLOURS[i] for i in self.rng.permutation(len(COLOURS))]
        for i in range(self.count):
            obj, gap = self.place(COLOURS if i == 0 else others[(i - 1) % len(others):][:1], objects)
            if i == 0:  # colours are distinct, as long as they last
                others = [c for c in others if c != obj.colour] + [obj.colour]
            objects.append(obj)
            narrowest = min(narrowest, gap)
        return objects, narrowest

    def place(self, colours, others: list[Object]) -> tuple[Object, float]:
        """An object clear of the others, or after 40 draws the clearest that was met; and its gap to the nearest."""
        times, seconds = self.times, self.seconds
        placed = [(_paths(np.array([o.start]), o, _room(o, self.camera, self.aspect), times)[0], radii(o, times, seconds),
                   visible(o, times)) for o in others]
        best, widest, draws = None, -math.inf, 0
        shape = size = colour = ""
        while best is None or (widest < self.clearance and draws < 40):
            if not shape or draws % 4 == 0:  # a new look now and then; until then, the same look on another path
                colour = self.pick(colours)
                twins = {o.shape for o in others if o.colour == colour}
                shape, size = self.pick([s for s in SHAPES if s not in twins]), self.pick(self.sizes)
            obj = self.draw(shape, colour, size)
            # the first object of a test scene is the one that must be held out
            if held_out(obj) if self.split == "train" else not others and not held_out(obj):
                shape = ""
                continue
            draws += 1
            room = _room(obj, self.camera, self.aspect)
            starts = self.rng.uniform(room[0], room[1], (24, 2))
            starts = starts[_legible(starts, obj, room, seconds)]
            if not len(starts):
                continue
            gaps = np.full(len(starts), math.inf)
            path, radius, seen = _paths(starts, obj, room, times), radii(obj, times, seconds), visible(obj, times)
            for other_path, other_radius, other_seen in placed:
                apart = path - other_path
                gap = np.hypot(apart[..., 0], apart[..., 1]) - radius - other_radius  # [k f]
                gaps = np.minimum(gaps, np.where(seen & other_seen, gap, math.inf).min(-1))
            chosen = int(np.argmax(np.minimum(gaps, self.clearance)))  # the first that is clear enough, or the clearest
            if gaps[chosen] > widest:
                best, widest = replace(obj, start=tuple(float(v) for v in starts[chosen])), float(gaps[chosen])
        return best, widest

    def draw(self, shape: str, colour: str, size: str) -> Object:
        """One object of the world, its start still open."""
        motion, speed = self.pick(self.cfg.motions), SPEEDS[self.pick(self.cfg.speeds)]
        appear, vanish, growth = 0.0, math.inf, "none"
        single = motion in MOTIONS
        growing = self.cfg.growth and not self.camera.kind.startswith("zoom")  # one change of scale at a time
        extras = ["visibility"] * (self.cfg.visibility and single) + ["growth"] * growing
        extra = self.pick(extras) if extras and self.rng.random() < 0.35 else ""
        if extra == "visibility":
            sort = self.pick(("appear", "vanish", "both"))
            appear = self.moment(0.15, 0.4) if sort != "vanish" else 0.0
            vanish = self.moment(0.6, 0.85) if sort != "appear" else math.inf
        elif extra == "growth":
            growth = {"small": "grow", "medium": self.pick(("grow", "shrink")), "large": "shrink"}[size]
        if single:
            phases = (self.phase(appear, motion, speed),)
        elif motion == "stop-go":
            go = self.phase(0.0, "linear", speed)
            phases = (go, Phase(self.moment(0.22, 0.38), "still"), replace(go, start_s=self.moment(0.55, 0.7)))
        else:
            phases = self.sequence(speed)
        return Object(shape, colour, size, (0.0, 0.0), phases, appear, vanish, growth)

    def phase(self, start_s: float, motion: str, speed: float) -> Phase:
        if motion == "still":
            return Phase(start_s, "still")
        return Phase(start_s, motion, self.pick(DIRECTIONS if motion == "linear" else TURNS), speed)

    def sequence(self, speed: float) -> tuple[Phase, ...]:
        """Two or three phases, each unlike the one before; half of the time evenly long."""
        starts = even_starts(int(self.rng.integers(2, 4)), self.seconds)
        if self.rng.random() < 0.5:
            starts = [0.0, self.moment(0.3, 0.7)] if len(starts) == 2 else [0.0, self.moment(0.25, 0.4), self.moment(0.6, 0.75)]
        phases: list[Phase] = []
        while len(phases) < len(starts):
            phase = self.phase(starts[len(phases)], self.pick(("linear", "linear", "circle", "still")), speed)
            if not phases or (phase.motion, phase.direction) != (phases[-1].motion, phases[-1].direction):
                phases.append(phase)
        return tuple(phases)


def _legible(starts: np.ndarray, obj: Object, room: np.ndarray, seconds: float) -> np.ndarray:
    """Which starts [k 2] show every phase as what it is: a first leg long enough to see, a circle inside the stage."""
    ok = np.ones(len(starts), bool)
    for phase, end in _stretches(obj, seconds):
        if phase.motion == "linear":
            reached = starts + heading(phase.direction) * min(MIN_LEG, phase.speed * (end - phase.start_s))
            ok &= ((reached >= room[0]) & (reached <= room[1])).all(-1)
        elif phase.motion == "circle":
            pivot = _pivot(starts, room)
            ok &= ((pivot - ORBIT >= room[0]) & (pivot + ORBIT <= room[1])).all(-1)
        starts = _advance(starts, phase, np.array([end - phase.start_s]), room)[:, 0]
    return ok

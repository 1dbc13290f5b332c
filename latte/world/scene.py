"""Scenes: the exact truth behind a clip of the embedded world, and where every object and the camera is at any time.

Units: lengths are in frame heights (the frame is 1 high and `aspect` wide, x to the right, y down, origin top left),
times in seconds. A scene knows nothing of pixels or frame rates, so one scene renders at any size, length and rate.
Positions, radii and directions are of the world; the camera maps world to frame (see `Camera.view`).
"""

import math
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES = ("small", "medium", "large")
RADII = {"small": 0.08, "medium": 0.125, "large": 0.19}  # circumscribed radius in frame heights, at scale 1
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")  # 45 degree steps, y down
TURNS = ("clockwise", "counter-clockwise")
MOTIONS = ("linear", "circle", "still")
CAMERAS = ("static", "pan-left", "pan-right", "tilt-up", "tilt-down", "zoom-in", "zoom-out", "shake")
GROWTH = ("none", "grow", "shrink")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Phase:
    """One stretch of an object's motion, from `start_s` to the next phase's start (or the end of the clip)."""

    start_s: float
    motion: str  # of MOTIONS
    direction: str = ""  # of DIRECTIONS for linear, of TURNS for circle, "" for still
    speed: float = 0.0  # frame heights per second, along the path


@dataclass(frozen=True)
class Object:
    shape: str
    colour: str
    size: str
    start: tuple[float, float]  # centre when the first phase begins
    phases: tuple[Phase, ...]
    appear_s: float = 0.0  # visible in [appear_s, vanish_s)
    vanish_s: float = math.inf
    growth: str = "none"  # of GROWTH: the radius goes linearly from 1 to GROWTH_FACTOR over the scene's length


@dataclass(frozen=True)
class Camera:
    kind: str = "static"  # of CAMERAS
    amount: float = 0.0  # pan, tilt: total travel in frame heights; zoom: final / first magnification; shake: amplitude
    seed: int = 0  # shake only


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    camera: Camera = Camera()
    background: int = 0  # seed of the texture
    seconds: float = 16.0
    aspect: float = 1.0

"""Renders scenes to frames: vectorised numpy, anti-aliased, sub-pixel exact at any size, length and rate.

The background is a random cubic B-spline surface, a smooth function of the world that is evaluated where the camera
looks; objects are drawn in their bounding boxes alone, all frames of an object at once.
"""

import math

import numpy as np

from latte import keyed
from latte.world.scene import RGB, Scene, on_screen, visible

GREY = 63  # mean level of the background
TINT = np.array((0, 3, 9), np.uint8)  # added to the level in R, G, B: slate
WORLD = 8.0  # side of the textured square in frame heights; beyond it the background is flat
OCTAVES = ((0.36, 24.0), (0.12, 16.0))  # (knot distance in frame heights, strength): the level stays in GREY +- 40


def render(scene: Scene, height: int, width: int, times: np.ndarray) -> np.ndarray:
    """Frames [f h w 3], uint8 RGB, of a scene at `times` [f] in seconds."""
    times = np.asarray(times, np.float64)
    frames = _background(scene, height, width, times)
    for obj in scene.objects:
        seen = np.flatnonzero(visible(obj, times))
        if len(seen):
            centre, radius = on_screen(obj, scene, times[seen])
            _draw(frames, seen, obj.shape, RGB[obj.colour], centre * (width / scene.aspect, height), radius * height)
    return frames


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape covers, in [0, 1].

    x, y: the pixel's offset from the shape's centre; radius: the circumscribed one; all in pixels, broadcastable.
    The measures bring the areas together (2.3, 2.0, 1.3, 2.0, 1.9, 1.4 radius^2 in the order of SHAPES) and put the centre
    of mass of every shape at its centre. Squares and crosses are exact; the others are the distance to the edge, clipped
    to a ramp of one pixel.
    """
    if shape == "circle":
        return _ramp(np.sqrt(x * x + y * y) - 0.86 * radius)
    if shape == "ring":
        away = np.sqrt(x * x + y * y)
        return _ramp(away - 0.94 * radius) - _ramp(away - 0.53 * radius)
    if shape == "square":
        half = math.sqrt(0.5) * radius
        return _ramp(np.abs(x) - half) * _ramp(np.abs(y) - half)
    if shape == "cross":
        long_x, long_y = _ramp(np.abs(x) - 0.95 * radius), _ramp(np.abs(y) - 0.95 * radius)
        short_x, short_y = _ramp(np.abs(x) - 0.31 * radius), _ramp(np.abs(y) - 0.31 * radius)
        return long_x * short_y + short_x * long_y - short_x * short_y
    if shape == "triangle":  # equilateral, one corner up
        return _ramp(np.maximum(math.sqrt(0.75) * np.abs(x) - 0.5 * y, y) - 0.5 * radius)
    assert shape == "star", shape  # five points, one up: mirror the plane onto one half of a point, whose edge is straight
    sin, cos = math.sin(math.pi / 5), math.cos(math.pi / 5)
    x, y = np.abs(x), -y
    for side in (1, -1):
        over = 2 * np.maximum(side * cos * x - sin * y, 0)
        x, y = x - over * side * cos, y + over * sin
    inner = 0.46  # radius of the five inner corners
    length = math.hypot(1 - inner * cos, inner * sin)
    return _ramp(((1 - inner * cos) * np.abs(x) + inner * sin * (y - radius)) / length)


def _ramp(distance: np.ndarray) -> np.ndarray:
    """Coverage of a pixel by a half-plane whose edge is `distance` pixels away (below 0 = inside)."""
    return np.clip(0.5 - distance, 0, 1)


def _draw(frames: np.ndarray, index: np.ndarray, shape: str, rgb, centre: np.ndarray, radius: np.ndarray) -> None:
    """Blends a shape into frames [f h w 3] at `index` [k]; centre [k 2] and radius [k] in pixels."""
    h, w = frames.shape[1:3]
    side = int(2 * radius.max()) + 3
    corner = np.floor(centre - side / 2 + 0.5).astype(np.int64)
    step = np.arange(side)
    column, row = corner[:, 0, None, None] + step, corner[:, 1, None, None] + step[:, None]  # [k 1 side], [k side 1]
    x, y = column + 0.5 - centre[:, 0, None, None], row + 0.5 - centre[:, 1, None, None]
    alpha = coverage(shape, x.astype(np.float32), y.astype(np.float32), radius.astype(np.float32)[:, None, None])
    drawn = (alpha > 0) & (column >= 0) & (column < w) & (row >= 0) & (row < h)
    place = ((index[:, None, None] * h + row) * w + column)[drawn]
    pixels = frames.reshape(-1, 3)
    under = pixels[place].astype(np.float32)
    pixels[place] = np.rint(under + alpha[drawn][:, None] * (np.array(rgb, np.float32) - under))


def _background(scene: Scene, height: int, width: int, times: np.ndarray) -> np.ndarray:
    """Frames [f h w 3], uint8, of the texture alone."""
    view = scene.camera.view(times, scene.seconds)
    moving = scene.camera.kind != "static"
    looks = view if moving else view[:1]
    # where the pixels lie in the world, from its middle: [f h] and [f w]
    y = ((np.arange(height) + 0.5) / height - 0.5) / looks[:, 2:] + looks[:, 1:2]
    x = ((np.arange(width) + 0.5) / width - 0.5) * scene.aspect / looks[:, 2:] + looks[:, :1]
    # half the height and width that the camera ever sees: a bound of the scene, so that a frame never depends on others
    amount, zooms = scene.camera.amount, scene.camera.kind.startswith("zoom")
    seen = [half * math.sqrt(amount) if zooms else half + amount for half in (0.5, scene.aspect / 2)]
    level = np.float32(GREY + 0.5)
    for octave, (knot, strength) in enumerate(OCTAVES):
        span = math.ceil(WORLD / 2 / knot)
        rows, columns = (min(span, math.ceil(half / knot) + 1) for half in seen)
        knots = keyed.rng(scene.background, "background", octave).uniform(-strength, strength, (2 * span + 1, 2 * span + 1))
        knots = knots[span - rows:span + rows + 1, span - columns:span + columns + 1].astype(np.float32)
        level = level + _spline(y / knot, rows) @ knots @ _spline(x / knot, columns).swapaxes(1, 2)
    level = level.astype(np.uint8)
    frames = np.empty((*level.shape, 3), np.uint8)
    for c in range(3):
        frames[..., c] = level + TINT[c]
    return frames if moving else np.repeat(frames, len(times), 0)


def _spline(position: np.ndarray, reach: int) -> np.ndarray:
    """Cubic B-spline weights [f p knots] of positions [f p] over the knots -reach..reach."""
    away = np.abs(position[..., None] - np.arange(-reach, reach + 1)).astype(np.float32)
    near, far = np.maximum(1 - away, 0), np.maximum(2 - away, 0)
    return (far * far * far - 4 * near * near * near) / 6

"""How the judge sees: classical vision from frames to tracks, shapes, the camera's view and legs of motion.

Pixels are labelled by hue and brightness, connected components are linked to tracks, each track is measured against the
renderer's own shapes, the background is registered to follow the camera, and paths are unfolded at the walls and cut into
legs. numpy, OpenCV and scipy; nothing is learned.

Units are pixels where a name says so, else those of scene.py: frame heights and seconds.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from latte.world.render import GREY, coverage
from latte.world.scene import CAMERA_AMOUNTS, COLOURS, ORBIT, RADII, RGB, SHAPES, SPEEDS, Camera

# ---- labels and tracks

CHROMA = np.array([[1, -1, 0], [1, 1, -2]], np.float32) / np.sqrt([[2], [6]]).astype(np.float32)  # blind to grey
CROWD = 24  # no more things than this are told apart in a frame, or followed through a clip
SOLID = 0.36  # coverage from which a pixel is labelled an object's
WHITE = len(COLOURS)  # labels: 0 = background, 1 + index in COLOURS
PALETTE = np.array([RGB[c] for c in COLOURS], np.float32)
HUES = PALETTE[:-1] @ CHROMA.T  # [7 2]


def _label_table() -> np.ndarray:
    """Label of each colour with 5 bits a channel: [32768] uint8."""
    level = np.arange(32, dtype=np.float32) * 8 + 4
    rgb = np.stack(np.meshgrid(level, level, level, indexing="ij"), -1).reshape(-1, 3)
    chroma = rgb @ CHROMA.T
    unit = HUES / np.linalg.norm(HUES, axis=1, keepdims=True)
    nearest = (chroma @ unit.T).argmax(1)
    share = (chroma * HUES[nearest]).sum(1) / (HUES[nearest] ** 2).sum(1)  # how much of the pixel the object covers
    white = rgb.min(1) > GREY + SOLID * (PALETTE[-1].min() - GREY)
    return np.where(share > SOLID, 1 + nearest, np.where(white, WHITE, 0)).astype(np.uint8)


LABELS = _label_table()


def segment(frames: np.ndarray) -> np.ndarray:
    """Label of every pixel [f h w] uint8: 0 = background, else 1 + index in COLOURS, by hue and brightness alone."""
    code = (frames >> 3).astype(np.uint16)
    return LABELS[(code[..., 0] << 10) | (code[..., 1] << 5) | code[..., 2]]


@dataclass
class Track:
    """One thing followed through the clip; arrays have one row a frame, meaningless where it was not seen."""

    seen: np.ndarray  # [f] bool
    label: np.ndarray  # [f] of segment()
    box: np.ndarray  # [f 4] left, top, width, height in pixels


def _components(frame: np.ndarray, labels: np.ndarray, least: float) -> list[tuple]:
    """The largest connected components of one frame, of at least `least` pixels: (label, x, y, area, box).

    A thing whose hue lies between two labels is speckled with both: what touches a component and is too small to stand alone,
    or has its hue, takes its label in `labels` [h w].
    """
    found, maps = _connected(labels)
    areas = {(one[0], one[5]): one[3] for one in found}
    changed = False
    for label, _, _, area, (x, y, w, h), i in found:
        window = slice(max(y - 1, 0), y + h + 1), slice(max(x - 1, 0), x + w + 1)
        now = labels[window]  # a view: earlier turns of the loop show
        own = (maps[label][window] == i) & (now == label)
        if area < least or not own.any() or not ((now > 0) & (now != label)).any():
            continue
        near = (cv2.dilate(own.view(np.uint8), np.ones((3, 3), np.uint8)) > 0) & (now > 0) & (now != label)
        pieces = {(other, maps[other][window][near & (now == other)][0]) for other in np.unique(now[near])}
        for other, j in pieces:
            piece = maps[other] == j
            size = areas.get((other, j), 0)
            if size < area and (size < least or _alike(frame[window][own], frame[piece])):
                labels[piece] = label
                changed = True
    if changed:
        found, _ = _connected(labels)
    return [one[:5] for one in found if one[3] >= least]


def _connected(labels: np.ndarray) -> tuple[list[tuple], dict[int, np.ndarray]]:
    """Components (label, x, y, area, box, index) of a frame's labels, the CROWD largest, and the map of indices by label."""
    found, maps = [], {}
    for label in np.flatnonzero(np.bincount(labels.ravel(), minlength=WHITE + 1)[1:]) + 1:
        _, maps[label], stats, centres = cv2.connectedComponentsWithStats((labels == label).view(np.uint8), connectivity=8)
        largest = 1 + np.argsort(-stats[1:, 4], kind="stable")[:CROWD]
        found += [(int(label), *centres[i], int(stats[i, 4]), stats[i, :4], int(i)) for i in largest]
    return sorted(found, key=lambda one: -one[3])[:CROWD], maps


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether pixels [n 3] and [m 3] are of one hue, in whatever shade: the nearest two of COLOURS are 24 degrees apart."""
    one, other = one.mean(0) @ CHROMA.T, other.mean(0) @ CHROMA.T
    length, other_length = np.linalg.norm(one), np.linalg.norm(other)
    return bool(min(length, other_length) > 20 and one @ other > math.cos(math.radians(12)) * length * other_length)


def track(frames: np.ndarray, labels: np.ndarray, fps: float) -> list[Track]:
    """Links the components of labels [f h w] into tracks: the nearest of like colour and size, across any gap.

    Smooths `labels` where one thing bears several.
    """
    f, h, _ = labels.shape
    least = max(2.0, 0.6 * (0.8 * RADII["small"] * h) ** 2)  # half of the smallest shape, seen from as far as a zoom goes
    tracks: list[Track] = []
    last: list[tuple] = []  # where each track was seen last: (frame, label, x, y, area)
    for t in range(f):
        found, used = _components(frames[t], labels[t], least), set()
        if tracks and found:
            cost = np.array([[_link_cost(old, new, t, h, fps) for new in found] for old in last])
            cost += np.array([one.seen.sum() < 0.5 * fps for one in tracks])[:, None]  # a splinter must not outbid its whole
            for i, j in zip(*linear_sum_assignment(cost), strict=True):
                if cost[i, j] < 10:
                    used.add(j)
                    _extend(tracks[i], t, found[j])
                    last[i] = (t, *found[j][:4])
        for j, new in enumerate(found):
            if j in used or any(_fragment(new, found[k]) for k in used):
                continue
            tracks.append(Track(np.zeros(f, bool), np.zeros(f, np.uint8), np.zeros((f, 4), int)))
            _extend(tracks[-1], t, new)
            last.append((t, *new[:4]))
            used.add(j)
    # what is seen for half a second only, or seldom, is noise
    lasting = [one for one in tracks if one.seen.sum() >= max(min(2, f), 0.03 * f, 0.35 * np.ptp(np.flatnonzero(one.seen)))]
    return sorted(lasting, key=lambda one: -one.seen.sum())[:CROWD]


def _extend(one: Track, t: int, new: tuple) -> None:
    one.seen[t], one.label[t], one.box[t] = True, new[0], new[4]


def _link_cost(old: tuple, new: tuple, t: int, h: int, fps: float) -> float:
    """How badly a component continues a track; 10 or more = it does not.

    Things keep their colour and move little in a frame. Another colour in the same place costs less than a leap of the same
    colour: what changes its colour stays itself.
    """
    far = math.hypot(new[1] - old[2], new[2] - old[3]) / h
    steps = t - old[0]
    reach = 0.03 + 2 * SPEEDS["fast"] * min(steps / fps, 1)
    ratio = abs(math.log(new[3] / old[4]))
    if new[0] == old[1]:
        return far / reach + ratio if far < 3 * reach else 10 + far
    return 2 + far / reach + ratio if far < reach and ratio < 0.7 and steps / fps <= 0.5 else 20 + far


def _fragment(new: tuple, whole: tuple) -> bool:
    """Whether a component is a piece cut off another of its colour, by noise or by what passes in front."""
    (x, y, w, h), (u, v, s, t) = new[4], whole[4]
    return new[0] == whole[0] and max(x - u - s, u - x - w, y - v - t, v - y - h) <= 2


# ---- measures

BLURS = (0.0, 0.6, 0.9, 1.2)  # pixels; a generated clip may be softer than a render


@dataclass
class Measured:
    """A track measured against the renderer's shapes; arrays have one row for each frame in `index` [k]."""

    index: np.ndarray  # frames where it was seen
    centre: np.ndarray  # [k 2] pixels, sub-pixel
    pixels: np.ndarray  # [k] that bear its label
    radius: np.ndarray  # [k shapes] pixels, if it were each of the shapes
    colour: np.ndarray  # [k 3] RGB of its inside
    misfit: np.ndarray  # [k shapes] squared difference to each shape of the same area, in areas
    whole: np.ndarray  # [k] bool: as large as in the frames around it
    clear: np.ndarray  # [k] bool: whole and touched by nothing else


def measure(frames: np.ndarray, labels: np.ndarray, one: Track) -> Measured:
    """Position, area, colour and shape of a track by soft coverage, in all its frames at once."""
    h, w = labels.shape[1:]
    index = np.flatnonzero(one.seen)
    box = one.box[index]
    side = int(min(box[:, 2:].max(), np.median(box[:, 2:].max(1)) * 1.8)) + 8
    corner = np.floor(box[:, :2] + box[:, 2:] / 2 - side / 2 + 0.5).astype(np.int64)
    step = np.arange(side)
    column, row = corner[:, 0, None, None] + step, corner[:, 1, None, None] + step[:, None]
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)  # [k side side]
    place = ((index[:, None, None] * h + row.clip(0, h - 1)) * w + column.clip(0, w - 1))
    pixels = frames.reshape(-1, 3)[place].astype(np.float32)
    found = np.where(inside, labels.reshape(-1)[place], 0)
    label = one.label[index][:, None, None]
    own = found == label
    reach, other = _widen(own, 2), _widen((found > 0) & ~own, 1)
    support = reach & inside & ~((found > 0) & ~own)

    hue = (pixels @ CHROMA.T * np.append(HUES, [[0, 0]], 0)[label - 1]).sum(-1)  # along the hue, or brightness if white
    signal = np.where(label == WHITE, pixels.min(-1), hue)
    around = inside & ~reach & (found == 0)
    ground = (signal * around).sum((1, 2)) / np.maximum(around.sum((1, 2)), 1)
    signal = (signal - ground[:, None, None]) * support
    level = inside_level(signal, own)
    level = np.maximum(rolling(level, 17, 75), 1e-3)
    alpha = np.clip(signal / level[:, None, None], 0, 1)
    area = alpha.sum((1, 2))

    core = own & (alpha > 0.85)
    core |= own & ~core.any((1, 2), keepdims=True)
    colour = (pixels * core[..., None]).sum((1, 2)) / core.sum((1, 2))[:, None]
    centre_x = (alpha * (column + 0.5)).sum((1, 2)) / area
    centre_y = (alpha * (row + 0.5)).sum((1, 2)) / area
    whole = area > 0.9 * rolling(area, 33, 75)  # neither behind something nor cut by the frame
    clear = whole & ~(other & reach).any((1, 2))
    x = (column + 0.5 - centre_x[:, None, None]).astype(np.float32)
    y = (row + 0.5 - centre_y[:, None, None]).astype(np.float32)

    def misfits(rows: np.ndarray, blur: float) -> np.ndarray:
        misfit = np.empty((len(rows), len(SHAPES)))
        for i, shape in enumerate(SHAPES):
            model = drawn(shape, x[rows], y[rows], radius_of(area[rows], i, blur), blur)
            misfit[:, i] = (((model - alpha[rows]) * inside[rows]) ** 2).sum((1, 2)) / area[rows]
        return misfit

    some = np.flatnonzero(clear if clear.any() else whole)
    some = some[:: max(1, len(some) // 12)]
    blur = min(BLURS, key=lambda sigma: misfits(some, sigma).mean(0).min())
    radius = np.stack([radius_of(area, i, blur) for i in range(len(SHAPES))], -1)
    return Measured(index, np.stack([centre_x, centre_y], -1), own.sum((1, 2)), radius, colour,
                    misfits(np.arange(len(index)), blur), whole, clear)


def drawn(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, blur: float) -> np.ndarray:
    """Coverage [k side side] of a shape as `measure` would see it: blurred, and relative to its own inside."""
    cover = coverage(shape, x, y, radius[:, None, None].astype(np.float32))
    if blur:
        k, side, _ = cover.shape
        room = math.ceil(3 * blur)
        wide = np.pad(cover, ((0, 0), (room, room), (0, 0))).reshape(-1, side)
        wide = cv2.GaussianBlur(wide, (2 * room + 1, 2 * room + 1), blur, borderType=cv2.BORDER_CONSTANT)
        cover = wide.reshape(k, side + 2 * room, side)[:, room:-room]
    level = inside_level(cover, cover > SOLID)
    return np.minimum(cover / np.maximum(level, 0.2)[:, None, None], 1)


def inside_level(signal: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Strength [k] of a thing inside, from the strongest third of its pixels: thin shapes have few pure ones."""
    top = -np.sort(-np.where(own, signal, 0).reshape(len(own), -1), 1)
    count = np.maximum(own.sum((1, 2)) // 3, 1)
    return np.take_along_axis(np.cumsum(top, 1), count[:, None] - 1, 1)[:, 0] / count


@lru_cache
def _areas(shape: int, blur: float) -> tuple[np.ndarray, np.ndarray]:
    """What area `measure` finds in a shape of given radius, both in pixels: (radii, areas), rising."""
    radii = np.geomspace(1.2, 24, 28)
    step = np.arange(-34, 35, dtype=np.float32)
    shifts = np.float32([(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5), (0.25, 0.25)])  # where the centre may lie in its pixel
    areas = [drawn(SHAPES[shape], step + dx, step[:, None] + dy, radii, blur).sum((1, 2)) for dx, dy in shifts]
    return radii, np.maximum.accumulate(np.mean(areas, 0))


def radius_of(area: np.ndarray, shape: int, blur: float) -> np.ndarray:
    """Radius [k] in pixels of a shape of which `measure` finds the area [k]."""
    radii, areas = _areas(shape, blur)
    small = np.exp(np.interp(np.log(np.maximum(area, 1e-3)), np.log(areas), np.log(radii)))
    return np.where(area > areas[-1], np.sqrt(area / areas[-1]) * radii[-1], small)


def _widen(mask: np.ndarray, by: int) -> np.ndarray:
    """Dilates each [side side] of a stack of masks by `by` pixels, without leaking from one into the next."""
    k, side, _ = mask.shape
    wide = np.pad(mask, ((0, 0), (by, by), (by, by))).reshape(-1, side + 2 * by).view(np.uint8)
    wide = cv2.dilate(wide, np.ones((2 * by + 1, 2 * by + 1), np.uint8))
    return wide.reshape(k, side + 2 * by, -1)[:, by:-by, by:-by].view(bool)


def rolling(values: np.ndarray, window: int, percentile: float) -> np.ndarray:
    """Running percentile of [k], the ends repeated."""
    half = min(window, len(values)) // 2
    padded = np.pad(values, half, mode="edge")
    return np.percentile(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), percentile, axis=1)


# ---- the camera


def register(frames: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Follows the camera by the background, directly on intensities (Lucas and Kanade 1981; Baker and Matthews 2004).

    Each frame is aligned with the middle one by shift, magnification and a change of brightness, from its neighbour's answer.
    Returns the view [f 3] as of Camera.view(), relative to the middle frame; what remains, root mean square [f] in levels; and
    the share of the squared difference to the middle frame that the view explains.
    """
    f, h, w, _ = frames.shape
    grey = frames.mean(-1, dtype=np.float32)
    ground = (labels == 0).astype(np.uint8)
    scale = min(1.0, 64 / min(h, w))
    size = (round(w * scale), round(h * scale))
    grey = np.stack([cv2.GaussianBlur(cv2.resize(g, size, interpolation=cv2.INTER_AREA), (3, 3), 0) for g in grey])
    ground = np.stack([cv2.resize(g, size, interpolation=cv2.INTER_NEAREST) for g in ground])
    ground = np.stack([cv2.erode(g, np.ones((5, 5), np.uint8)) for g in ground])  # soft edges belong to the objects
    h, w = grey.shape[1:]
    x = ((np.arange(w) + 0.5) / h - w / h / 2).astype(np.float32)
    y = ((np.arange(h) + 0.5) / h - 0.5).astype(np.float32)[:, None]
    middle = f // 2
    still, solid = grey[middle], ground[middle].astype(np.float32)
    view, rest, unmoved = np.zeros((f, 3)), np.zeros(f), np.zeros(f)
    for t in (*range(middle + 1, f), *range(middle - 1, -1, -1)):
        guess = view[t - 1 if t > middle else t + 1].copy()  # x, y, log magnification
        for _ in range(5):
            zoom = math.exp(-guess[2])
            shift = [(guess[i] + (0.5 / h - half) * zoom + half) * h - 0.5 for i, half in enumerate((w / h / 2, 0.5))]
            warp = np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
            seen = cv2.warpAffine(still, warp, (w, h), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
            known = cv2.warpAffine(solid, warp, (w, h), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
            use = (cv2.erode(known, np.ones((3, 3), np.uint8)) > 0.99) & (ground[t] > 0)  # slopes reach one pixel further
            if use.sum() < 32:
                break
            right, down = (cv2.Sobel(seen, cv2.CV_32F, *way, scale=h / zoom / 8) for way in ((1, 0), (0, 1)))
            slopes = np.stack([right[use], down[use], (-zoom * (x * right + y * down))[use], np.ones(use.sum(), np.float32)], -1)
            left = (grey[t] - seen)[use]
            step = np.linalg.solve(slopes.T @ slopes + np.diag([400, 400, 400, 1]), slopes.T @ left)
            guess += step[:3]
            rest[t] = math.sqrt(max(float(left @ left - step @ (slopes.T @ left)), 0) / len(left))
            if np.abs(step[:3]).max() < 3e-4:
                break
        view[t] = guess
        change = (grey[t] - still)[(ground[t] > 0) & (solid > 0)]
        unmoved[t] = change.std() if len(change) else 0
    view[:, 2] = np.exp(view[:, 2])
    return view, rest, float(1 - (rest**2).sum() / max((unmoved**2).sum(), 1e-6))


def name_camera(view: np.ndarray, explained: float, fps: float, seconds: float) -> tuple[Camera, np.ndarray]:
    """The kind of camera that took a view [f 3] relative to any of its frames, and that view on the scene's own terms.

    A view that explains little of what changes is noise.
    """
    t = np.arange(len(view)) / fps
    rows = np.append(view[:, :2], np.log(view[:, 2:]), 1)
    line = np.polyfit(t / seconds, rows, 1) if len(t) > 1 else np.zeros((2, 3))
    wobble = (rows - np.outer(t / seconds, line[0]) - line[1])[:, :2].std(0)
    least = {"pan": CAMERA_AMOUNTS["pan"][0], "tilt": CAMERA_AMOUNTS["tilt"][0], "zoom": math.log(CAMERA_AMOUNTS["zoom"][0]),
             "shake": CAMERA_AMOUNTS["shake"][0] / math.sqrt(6)}  # a mean of three sines
    moved = {"pan": line[0, 0], "tilt": line[0, 1], "zoom": line[0, 2], "shake": np.hypot(*wobble) / math.sqrt(2)}
    kind = max(least, key=lambda name: abs(moved[name]) / least[name])
    if abs(moved[kind]) < 0.5 * least[kind] or explained < 0.3:
        camera = Camera()
    elif kind == "shake":
        camera = Camera("shake", float(np.abs(rows[:, :2] - rows[:, :2].mean(0)).max()))
    else:
        forward, backward = {"pan": ("right", "left"), "tilt": ("down", "up"), "zoom": ("in", "out")}[kind]
        amount = abs(float(moved[kind]))
        camera = Camera(f"{kind}-{forward if moved[kind] > 0 else backward}", math.exp(amount) if kind == "zoom" else amount)
    if camera.kind == "static":
        return camera, camera.view(t, seconds)
    ideal = camera.view(t, seconds) if kind != "shake" else np.array([[0.0, 0.0, 1.0]])
    rows += np.append(ideal[:, :2], np.log(ideal[:, 2:]), 1).mean(0) - rows.mean(0)
    rows[:, [0, 1] if kind == "zoom" else [2]] = 0  # what this camera does not do
    return camera, np.append(rows[:, :2], np.exp(rows[:, 2:]), 1)


# ---- paths: unfolding at the walls, and legs

PLAIN = 20.0  # how much better (in squared noise) a model must be for each degree of freedom more
CUT = 200.0  # what a further stretch costs, likewise
NOISE = 0.0015  # frame heights: no path is taken to be truer than this
EVEN = 0.1  # weight of uneven turning in the misfit of a circle: a dot at rest also lies on one
REST = 0.02  # frame heights a second: slower is standing still


@dataclass(frozen=True)
class Leg:
    """A stretch of one motion of an unfolded path."""

    first: int  # frame
    motion: str  # of MOTIONS
    velocity: np.ndarray  # [2] frame heights a second; for a circle (turn in rad/s, radius)

    @property
    def speed(self) -> float:
        return float(abs(self.velocity[0]) * self.velocity[1] if self.motion == "circle" else np.hypot(*self.velocity))


@dataclass(frozen=True)
class Bounce:
    frame: int  # the last before it
    axis: int
    wall: float  # where the path turns round
    sure: bool


def bounces(path: np.ndarray, fps: float, room: np.ndarray) -> list[Bounce]:
    """Where a path [k 2] (one row a frame) turns round at the walls of `room` [2 2], by time.

    A bounce is a kink near a wall that turns one component of the velocity round and keeps its size. It is sure if it stands
    out of the noise and the other component keeps its size too, which it does not where a circling begins, nor where another
    bounce follows at once.
    """
    k, window = len(path), max(3, round(1.25 * fps))
    at = np.arange(1, k - 2)  # a bounce between frames at and at + 1; two frames at least on either side
    if not len(at):
        return []
    t = np.arange(1 - window, window + 1)
    frame = at[:, None] + t  # [p 2 window]
    there = (frame >= 0) & (frame < k)
    rows = path[frame.clip(0, k - 1)]  # [p 2 window, 2]
    lines = [[_line(rows[..., axis], t, there & side) for side in (t <= 0, t > 0)] for axis in range(2)]
    found = []
    for axis in range(2):
        (before, level, miss_before), (after, _, miss_after) = lines[axis]
        (across_before, *_), (across_after, *_) = lines[1 - axis]
        miss = miss_before + miss_after
        wall = np.where(before > 0, room[1, axis], room[0, axis])
        near = np.abs(path[at + 1, axis] + path[at, axis] - 2 * wall) / 2 < 0.05 + 0.5 * np.abs(before)
        slow, fast = np.minimum(np.abs(before), np.abs(after)), np.maximum(np.abs(before), np.abs(after))
        smooth = _parabola_miss(rows[..., axis], t, there)
        kink = near & (before * after < 0) & (slow > 0.35 * fast) & (slow * fps > 0.4 * SPEEDS["slow"]) & (miss < 1.3 * smooth)
        blur = np.sqrt(12 * miss / (2 * window)) / window**1.5  # of a slope, by what the lines leave
        kept = np.abs(np.abs(across_after) - np.abs(across_before)) < 0.4 * np.hypot(fast, across_before)
        kept &= (slow > 0.6 * fast) & (miss < smooth) & (slow > 8 * blur)
        run = np.flatnonzero(kink)
        for group in np.split(run, np.flatnonzero(np.diff(run) > window) + 1):
            if len(group):
                best = group[miss[group].argmin()]
                later = there[best] & (t > 0)  # the wall is half way between the path and where it would have run on
                turn = (level[best] + before[best] * t + rows[best, :, axis])[later].mean() / 2
                found.append(Bounce(int(at[best]), axis, float(turn), bool(kept[best])))
    return sorted(found, key=lambda b: b.frame)


def unfold(path: np.ndarray, turns: list[Bounce]) -> tuple[np.ndarray, np.ndarray]:
    """Undoes bounces: mirrors what follows each, so that the path [k 2] runs on; and 1 or -1 for each frame's axes, [k 2]."""
    straight, signs = path.copy(), np.ones(path.shape)
    for one in turns:
        later = slice(one.frame + 1, None)
        wall = straight[one.frame, one.axis] + signs[one.frame, one.axis] * (one.wall - path[one.frame, one.axis])
        straight[later, one.axis] = 2 * wall - straight[later, one.axis]
        signs[later, one.axis] *= -1
    return straight, signs


def follow(path: np.ndarray, fps: float, room: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Leg]]:
    """Unfolds a path [k 2] and cuts it into legs: (unfolded [k 2], signs [k 2], legs).

    A bounce that is not sure, or any where there is more than one leg, is taken back if that makes the legs plainer: the
    outermost point of a circling near a wall looks like one.
    """
    turns = bounces(path, fps, room)
    straight, signs = unfold(path, turns)
    found, cost = legs(straight, fps)
    for one in [turn for turn in turns if len(found) > 1 or not turn.sure]:
        fewer = [turn for turn in turns if turn is not one]
        other = unfold(path, fewer)
        other_found, other_cost = legs(other[0], fps)
        if other_cost < cost:
            turns, (straight, signs), found, cost = fewer, other, other_found, other_cost
    return straight, signs, found


def _line(x: np.ndarray, t: np.ndarray, use: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares slope, level at t = 0 and squared residual [p] of rows x [p w] over t [w], where `use` [p w] says."""
    n = use.sum(1)
    mean_t, mean_x = (use * t).sum(1) / n, (use * x).sum(1) / n
    dt, dx = use * (t - mean_t[:, None]), use * (x - mean_x[:, None])
    slope = (dt * dx).sum(1) / (dt * dt).sum(1)
    return slope, mean_x - slope * mean_t, ((dx - slope[:, None] * dt) ** 2).sum(1)


def _parabola_miss(x: np.ndarray, t: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Squared residual [p] of the best parabola through rows x [p w], where `use` says."""
    basis = np.vander(t / len(t), 3) * use[..., None]  # [p w 3]
    weights = np.linalg.solve(basis.swapaxes(1, 2) @ basis, basis.swapaxes(1, 2) @ x[..., None])
    return ((use * x - (basis @ weights)[..., 0]) ** 2).sum(1)


def _smooth(path: np.ndarray) -> np.ndarray:
    """Running mean of [k 2] over 5 frames, ends repeated."""
    padded = np.pad(path, ((2, 2), (0, 0)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, 5, 0).mean(-1)


class Fits:
    """Least-squares fits of rest, straight motion and circling to any stretch of a path [k 2], from running sums."""

    def __init__(self, path: np.ndarray, fps: float):
        self.path, self.fps = path, fps
        t = np.arange(len(path)) / fps
        x, y = (path - path.mean(0)).T
        q = x * x + y * y
        ahead = np.gradient(_smooth(path), axis=0) if len(path) > 1 else path
        s = np.unwrap(np.arctan2(ahead[:, 1], ahead[:, 0])) * ORBIT  # heading, as a way on a circle
        terms = np.stack([np.ones_like(t), t, x, y, t * t, t * x, t * y, x * x, x * y, y * y, q * x, q * y, q * q,
                          s, s * t, s * s], -1)
        self.sums = np.concatenate([np.zeros((1, terms.shape[1])), np.cumsum(terms, 0)])

    def costs(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Squared residuals [p 3] of (still, linear, circle) over frames i..j-1, for index arrays i, j [p]."""
        n, t, x, y, tt, tx, ty, xx, xy, yy, qx, qy, qq, s, st, ss = (self.sums[j] - self.sums[i]).T
        mx, my, mt = x / n, y / n, t / n
        still = xx - n * mx * mx + yy - n * my * my
        vt, cx, cy = tt - n * mt * mt, tx - n * mt * mx, ty - n * mt * my
        linear = still - (cx * cx + cy * cy) / np.maximum(vt, 1e-9)
        # Kasa's circle: x^2 + y^2 = 2 a x + 2 b y + c by least squares, about the stretch's own middle for stability
        sxx, sxy, syy = xx - n * mx * mx, xy - n * mx * my, yy - n * my * my
        q = xx + yy
        sqx, sqy, sqq = qx - q * mx, qy - q * my, qq - q * q / n
        det = np.maximum(sxx * syy - sxy * sxy, 1e-14)
        a, b = (sqx * syy - sqy * sxy) / det, (sqy * sxx - sqx * sxy) / det  # twice the centre
        radius2 = q / n - a * mx - b * my + (a * a + b * b) / 4
        circle = (sqq - a * sqx - b * sqy) / np.maximum(4 * radius2, 1e-9)  # algebraic residual / (2 r)
        cs = st - mt * s
        circle += EVEN * (ss - s * s / n - cs * cs / np.maximum(vt, 1e-9))  # turning evenly
        possible = (radius2 > (0.6 * ORBIT) ** 2) & (radius2 < (1.7 * ORBIT) ** 2)
        return np.stack([still, linear, np.where(possible, np.maximum(circle, 0), np.inf)], -1)

    def centre(self, i: int, j: int) -> tuple[np.ndarray, float]:
        """Centre [2] and radius of the circle fitted to frames i..j-1."""
        part = self.path[i:j]
        system = np.concatenate([2 * part, np.ones((len(part), 1))], 1)
        a, b, c = np.linalg.lstsq(system, (part**2).sum(1), rcond=None)[0]
        return np.array([a, b]), float(np.sqrt(max(c + a * a + b * b, 1e-12)))

    def best(self, i: int, j: int, noise: float) -> tuple[str, np.ndarray]:
        """The motion of frames i..j-1 and its velocity [2] (for a circle: turn in rad/s and radius), in the unfolded world."""
        if j - i < 3:
            return "still", np.zeros(2)
        cost = self.costs(np.array([i]), np.array([j]))[0] + np.array([0, 2, 4]) * noise**2 * PLAIN
        t = np.arange(j - i) / self.fps
        velocity = np.polyfit(t, self.path[i:j], 1)[0]
        if cost[2] < min(cost[0], cost[1]):
            middle, radius = self.centre(i, j)
            angle = np.unwrap(np.arctan2(*(self.path[i:j] - middle).T[::-1]))
            turn = np.polyfit(t, angle, 1)[0]
            if abs(turn) * (j - i) / self.fps > 0.5:
                return "circle", np.array([turn, radius])
        return ("still" if np.hypot(*velocity) < REST else "linear"), velocity


def _runs_on(one: Leg, other: Leg) -> bool:
    """Whether two neighbouring legs are one motion, cut by noise."""
    if one.motion != other.motion or (one.motion == "circle" and one.velocity[0] * other.velocity[0] < 0):
        return False
    return one.motion != "linear" or np.hypot(*(one.velocity - other.velocity)) < 0.35 * max(one.speed, other.speed)


def _noise(path: np.ndarray, window: int) -> float:
    """How far a path [k 2] strays from parabolas over `window` frames: root mean square of the median stretch."""
    starts = np.arange(0, max(1, len(path) - window), max(1, window // 4))
    window = min(window, len(path))
    if window < 5:
        return NOISE
    t, use = np.arange(window), np.ones((len(starts), window), bool)
    miss = sum(_parabola_miss(path[starts[:, None] + t, axis], t, use) for axis in range(2))
    return max(NOISE, 1.4 * math.sqrt(np.median(miss) / 2 / (window - 3)))


def legs(straight: np.ndarray, fps: float) -> tuple[list[Leg], float]:
    """Cuts an unfolded path [k 2] into rest, straight motion and circling by dynamic programming; also its cost."""
    k = len(straight)
    least = max(3, round(0.9 * fps))
    fits = Fits(straight, fps)
    noise = _noise(straight, round(2 * fps))
    if k < 2 * least:
        return [Leg(0, *fits.best(0, k, noise))], 0.0
    stride = 2 if fps >= 6 else 1
    nodes = np.append(np.arange(0, k - least + 1, stride), k)
    i, j = np.meshgrid(np.arange(len(nodes)), np.arange(len(nodes)), indexing="ij")
    pair = nodes[j] - nodes[i] >= least
    i, j = i[pair], j[pair]
    cost = (fits.costs(nodes[i], nodes[j]) / noise**2 + np.array([0, 2, 4]) * PLAIN).min(1)
    table = np.full((len(nodes), len(nodes)), np.inf)
    table[i, j] = cost + CUT
    best, came = np.full(len(nodes), np.inf), np.zeros(len(nodes), int)
    best[0] = 0
    for node in range(1, len(nodes)):
        total = best[:node] + table[:node, node]
        came[node] = total.argmin()
        best[node] = total[came[node]]
    cuts = [len(nodes) - 1]
    while cuts[-1]:
        cuts.append(came[cuts[-1]])
    cuts = nodes[cuts[::-1]]
    found: list[Leg] = []
    for a, b in pairwise(cuts):
        new = Leg(int(a), *fits.best(a, b, noise))
        if found and _runs_on(found[-1], new):
            a = found.pop().first
            new = Leg(a, *fits.best(a, b, noise))
        found.append(new)
    return found, float(best[-1])

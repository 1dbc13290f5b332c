"""Scores: measures every clip once, so that thresholds can change later without looking at a picture again.

    python -m data_tools.score IN.mp4 [--report R.json]
    python -m data_tools.score IN.parquet --out OUT.parquet [--scores motion sharpness ...]

SCORES says what there is and in which units. Some are read from the row alone, and where only these are wanted no file is opened.
The others come from one pass over the clip, which keeps a few numbers a picture and a bounded sample of pictures, and from
networks on a few pictures (data_tools.nets). A score that cannot be computed is named in tags["not_computed"] with the reason and
drops no clip. Scores that an earlier run computed from the same file, span and settings stay (tags["scored"] is their key).
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from av.video.frame import PictureType
from scipy.signal import savgol_filter
from tqdm import tqdm

from data_tools import film as films
from data_tools import manifest, nets
from data_tools.film import Clip, Kind, Picture
from data_tools.manifest import Job, Row
from data_tools.repair import baked, fields
from latte import video
from latte.command import command
from latte.video import EPS_S

VERSION = "1"
SCORES = {
    "length_s": "seconds",
    "caption_words": "words of the caption",
    "language": "of the caption, two letters, in tags where the source gives none; und = cannot be told",
    "repaired_share": "share of the clip's pixels that cleaning made anew, 0 to 1",
    "repair_confidence": "least confidence of a repair, 0 to 1; 1 without any",
    "motion": "mean speed over the picture, % of its width a second; by the codec's motion vectors where it has them",
    "camera_shake": "rms distance of the picture from its own smoothed path, % of its width",
    "sharpness": "strength of the finest octave of detail over that of the next one; 0.4 is blurred or enlarged, 0.6 sharp",
    "exposure": "mean luma, 0 = black, 1 = white",
    "clipped_dark": "share of pixels at black",
    "clipped_bright": "share of pixels at white",
    "flicker": "typical change of brightness from picture to picture that its neighbours do not share, %",
    "freeze": "share of pictures that show nothing new",
    "residual_comb": "certainty that the lines of two fields are still mixed, woven or rescaled, 0 to 1",
    "logos": "share of the picture, in its corners, with strokes that stay while the edges around them move",
    "text_area": "share of the picture that boxes of text cover, drawn over or filmed",
    "faces": "faces in the picture that shows most of them",
    "nsfw": "certainty that a picture is not safe for work, 0 to 1",
    "aesthetics": "what the function in the settings says",
    "phash": "no number: perceptual hashes of four pictures, 16 hex digits each, in tags",
}
LOOKS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # of the span: pictures that are hashed and that networks see
IN_A_ROW = 10  # pictures from each of them on that are looked at for combs
IN_A_ROW_MIB = 64  # that these may take
WIDTH = 160  # columns of the pictures that motion is measured in
EVERY_S = 0.25 # from one picture to the next that sharpness, exposure and logos are measured in
LOGO_WIDTH = 320  # columns for logos


@dataclass(frozen=True)
class Settings:
    """What to compute."""

    scores: tuple[str, ...] = tuple(SCORES)  # names of SCORES
    aesthetics: str = ""  # "module:function" of yours: list of RGB pictures uint8 [h w 3] -> a number; "" computes none

    def __post_init__(self):
        """Raises ValueError naming the key."""
        object.__setattr__(self, "scores", tuple(self.scores))
        unknown = sorted(set(self.scores) - set(SCORES))
        if unknown:
            raise ValueError(f"scores: there is no {', '.join(unknown)}; there are {', '.join(SCORES)}")
        if self.aesthetics and not all(self.aesthetics.partition(":")):
            raise ValueError(f"aesthetics: {self.aesthetics!r} is not of the form module:function")


class Unknown(Exception):
    """Why a score cannot be computed for a clip."""


# The stage

def work(rows: list[Row], job: Job) -> list[Row]:
    """The rows with their scores; see data_tools.manifest.Job. A clip whose file cannot be read at all is dropped."""
    return [scored(row, job.out, job.settings) for row in rows]


def rows_alone(settings: Settings) -> bool:
    """Whether no file has to be opened."""
    return set(settings.scores) <= set(OF_ROW)


def scored(row: Row, folder: Path, settings: Settings) -> Row:
    """A row with its scores; `folder` is where its path starts. Never raises for what the clip holds."""
    tags, scores = dict(row.get("tags") or {}), dict(row.get("scores") or {})
    found: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, function in OF_ROW.items():
        if name in settings.scores and name not in tags:  # a language that the source gives stays
            _compute(name, function, row, found, problems)
    pixels = [name for name in settings.scores if name not in OF_ROW]
    dropped = _from_pixels(row, folder / row["path"], pixels, settings, scores, tags, found, problems) if pixels else None
    for name, value in found.items():
        if isinstance(value, str):
            tags[name] = value
        else:
            scores[name] = round(value, 6)
    tags.pop("not_computed", None)
    if problems:
        tags["not_computed"] = "; ".join(f"{name}: {why}" for name, why in problems.items())
    return row | {"scores": scores, "tags": tags} | ({"dropped": dropped} if dropped else {})


def _from_pixels(row: Row, path: Path, names: list[str], settings: Settings, scores: dict[str, float], tags: dict[str, str],
                 found: dict[str, Any], problems: dict[str, str]) -> str | None:
    """Adds what is not there yet to `found`; gives why the clip is dropped, if its file cannot be read."""
    key = _key(row, settings)
    todo = names if tags.get("scored") != key else [name for name in names if name not in scores and name not in tags]
    for name in todo:  # what is there is of another file or span, or is a measure of the source's own
        scores.pop(name, None)
        tags.pop(name, None)
    try:
        if todo:
            found |= of_file(path, row.get("start_s") or 0.0, row.get("end_s"), todo, settings, problems)
            tags["scored"] = key
    except Exception as error:  # whatever a broken file does to a decoder costs this clip alone
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        return f"cannot be read ({kind}{str(error).removeprefix(f'{path}: ')})"
    return None


def _key(row: Row, settings: Settings) -> str:
    """Stands for all that the scores from pixels depend on."""
    about = (VERSION, row.get("sha256") or row.get("path"), row.get("start_s"), row.get("end_s"), settings.aesthetics)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def _compute(name: str, function: Callable[..., Any], given: Any, found: dict[str, Any], problems: dict[str, str]) -> None:
    """Adds function(given) to `found`, or to `problems` why it gives nothing."""
    try:
        value = function(given)
        if not isinstance(value, str) and not math.isfinite(value):
            raise Unknown("no finite number came of it")
        found[name] = value
    except (Unknown, ValueError) as error:
        problems[name] = str(error)
    except Exception as error:  # what a picture does to a network costs this score alone
        problems[name] = f"failed ({type(error).__name__}: {str(error).splitlines()[0]})"


# From the row

def _length(row: Row) -> float:
    for first, last in (("start_s", "end_s"), ("from_s", "to_s")):
        if row.get(first) is not None and row.get(last) is not None:
            return float(row[last] - row[first])
    if row.get("frames") and row.get("fps"):
        return row["frames"] / row["fps"]
    raise Unknown("the row has no times")


def _language(row: Row) -> str:
    if not row.get("caption"):
        raise Unknown("no caption")
    language, certainty = _identifier().classify(row["caption"])
    return language if certainty >= CERTAIN else "und"


CERTAIN = 0.25  # of a language
# Languages of some tens of millions and more: among all 139 that the model knows, short captions are taken for small ones
LANGUAGES = ("ar bg bn ca cs da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv ml mr ms nl no pa pl pt ro ru sk sl sr "
             "sv sw ta te th tl tr uk ur vi zh")


@cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError("language needs py3langid: pip install py3langid") from None
    found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    found.set_languages(LANGUAGES.split())
    return found


NOTHING_NEW = {"crop bars", "crop text", "repeats", "telecine", "reweave", "foot", "stitch"}  # steps that make no pixels
LINES = {"deinterlace": 0.5}  # share of pixels that a step makes, where it is not all


def _repaired(row: Row) -> float:
    """Of all edits, as if each chose its pixels independently. A step that does not say where it worked counts as everywhere."""
    kept = 1.0
    for edit in row.get("edits") or ():
        if edit["step"] not in NOTHING_NEW:
            kept *= 1 - _made_by(edit["step"], json.loads(edit.get("settings") or "{}"), row)
    return 1 - kept


def _made_by(step: str, settings: dict[str, Any], row: Row) -> float:
    frames = max(row.get("frames") or 1, 1)
    size = max((row.get("width") or 1) * (row.get("height") or 1), 1)
    if step == "fill text":
        return min(sum((bottom - top) * (right - left) / size * min((text["last"] - text["first"] + 1) / frames, 1)
                       for text in settings["texts"] for top, left, bottom, right in [text["box"]]), 1.0)
    if step == "scratches":
        columns = sum(len(scratch) > 0 for scratch in settings.get("columns", []))
        return min(3 * columns / max(row.get("width") or 1, 1), 1.0)
    if step == "dropouts":  # a part is some lines high and less than a line's half long
        return min(settings.get("parts", 0) * 2 * (row.get("width") or 1) / 4 / (size * frames), 1.0)
    share = LINES.get(step, 1.0)
    if settings.get("last") is not None and settings.get("first") is not None:
        share *= min((settings["last"] - settings["first"] + 1) / frames, 1)
    return share


OF_ROW: dict[str, Callable[[Row], Any]] = {
    "length_s": _length,
    "caption_words": lambda row: float(len((row.get("caption") or "").split())),
    "language": _language,
    "repaired_share": _repaired,
    "repair_confidence": lambda row: min([float(edit.get("confidence") or 0) for edit in row.get("edits") or []], default=1.0),
}


# One pass over the clip

@dataclass
class Trace:
    """What is kept of a clip: numbers for every picture, sums, and a bounded sample of pictures."""

    kind: Kind
    length_s: float  # of the span, as the row says
    at_s: list[float] = field(default_factory=list)
    level: list[float] = field(default_factory=list)  # mean luma, levels above black
    change: list[float] = field(default_factory=list)  # mean difference to the picture before, levels; 0 for the first
    speed: list[float] = field(default_factory=list)  # mean displacement since the picture before by flow, % of the width
    pan: list[tuple[float, float]] = field(default_factory=list)  # displacement of the scene, the same way
    coded: list[float] = field(default_factory=list)  # mean displacement a picture by the codec's vectors, % of the width; or nan
    sharp: list[float] = field(default_factory=list)
    clipped: list[tuple[float, float]] = field(default_factory=list)  # shares of dark and bright pixels
    looks: list[Picture] = field(default_factory=list)  # at LOOKS
    in_a_row: list[np.ndarray] = field(default_factory=list)  # luma, from each of LOOKS on
    logo: "LogoWatch | None" = None


def trace(path: Path, start_s: float, end_s: float | None, wanted: list[str]) -> Trace:
    """Goes through a span of a file once. Raises ValueError naming a file that cannot be read."""
    codec = CodecMotion()
    film = films.read(path, start_s, math.inf if end_s is None else end_s, vectors=codec.see if "motion" in wanted else None)
    length = video.probe(path).duration_s - start_s if end_s is None else end_s - start_s
    found = Trace(film.kind, length, logo=LogoWatch())
    flows, last, sparse, left = _Flow(), None, 0.0, 0
    black, white = (0, 255) if film.kind.full_range else (16, 235)
    for picture in film:
        at = picture.at_s
        small = _small(picture.y, WIDTH)
        found.at_s.append(at)
        found.level.append(float(cv2.mean(small)[0]) - black)
        found.change.append(cv2.norm(small, last, cv2.NORM_L1) / small.size if last is not None else 0.0)
        found.coded.append(codec.latest(film.kind.width))
        if last is not None and {"motion", "camera_shake"} & set(wanted):
            speed, pan = flows.between(last, small)
            found.speed.append(speed)
            found.pan.append(pan)
        if at >= sparse - EPS_S:
            sparse += EVERY_S * (1 + math.floor((at - sparse) / EVERY_S + EPS_S))
            if "sharpness" in wanted:
                found.sharp.append(sharpness_of(picture.y))
            thin = picture.y[::4, ::4]
            found.clipped.append((float((thin <= black + 1).mean()), float((thin >= white - 1).mean())))
            if "logos" in wanted:
                found.logo.see(picture.y)
        if len(found.looks) < len(LOOKS) and at >= LOOKS[len(found.looks)] * length - EPS_S:
            found.looks.append(picture)
            left = max(2, min(IN_A_ROW, int(IN_A_ROW_MIB * 2**20 / len(LOOKS) / picture.y.size)))
        if left and "residual_comb" in wanted:
            found.in_a_row.append(picture.y)
            left -= 1
        last, latest = small, picture
    found.looks += [latest] * (len(LOOKS) - len(found.looks))  # the file ends before the span does
    return found


def _small(y: np.ndarray, width: int) -> np.ndarray:
    height = round(y.shape[0] * width / y.shape[1])  # of a sane shape: OpenCV's flow crashes on pictures of few lines
    return cv2.resize(y, (width, min(max(height, 64), 4 * width)), interpolation=cv2.INTER_AREA)


class _Flow:
    """Displacements between small pictures (T. Kroeger et al., Fast optical flow using dense inverse search, 2016)."""

    def __init__(self):
        self._dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    def between(self, before: np.ndarray, now: np.ndarray) -> tuple[float, tuple[float, float]]:
        """Mean length of the displacements and that of the scene, the median where there is detail; % of the width."""
        flow = self._dis.calc(before, now, None)[2:-2:4, 2:-2:4]
        detail = cv2.absdiff(before, cv2.blur(before, (5, 5)))[2:-2:4, 2:-2:4]
        across, down = np.sort(flow[detail >= max(detail.mean(), 2)], 0).T
        pan = (across[len(across) // 2], down[len(down) // 2]) if len(down) else (0.0, 0.0)
        return float(np.hypot(flow[..., 0], flow[..., 1]).mean()) / WIDTH * 100, tuple(float(step) / WIDTH * 100 for step in pan)


class CodecMotion:
    """Motion vectors of P pictures: these point to the P or I picture before, so that their distance in time is known."""

    def __init__(self):
        self._since, self._latest = 0, math.nan

    def see(self, frame) -> None:
        """Takes in a decoded frame; frames come in the order of presentation."""
        self._since, self._latest = self._since + 1, math.nan
        if frame.pict_type not in (PictureType.I, PictureType.P):
            return
        given = next((data for data in frame.side_data if data.type.name == "MOTION_VECTORS"), None)
        if frame.pict_type == PictureType.P and given is not None:
            vectors = given.to_ndarray()
            area = vectors["w"].astype(np.float32) * vectors["h"]
            scale = np.maximum(vectors["motion_scale"], 1)
            lengths = np.hypot(vectors["motion_x"] / scale, vectors["motion_y"] / scale)
            self._latest = float((lengths * area).sum() / max(area.sum(), 1)) / self._since
        self._since = 0

    def latest(self, width: int) -> float:
        """Mean length for one picture of what came last, % of the width; nan where nothing is known."""
        return self._latest / width * 100


class LogoWatch:
    """Sums over time of the slopes of shrunk pictures, [h w]: edges that stay add up, those of a moving scene do not."""

    def __init__(self):
        self.count, self._sums = 0, []

    def see(self, y: np.ndarray) -> None:
        """Takes in a picture's luma."""
        small = _small(y, LOGO_WIDTH).astype(np.float32)
        across, down = (cv2.Sobel(small, cv2.CV_32F, *way, scale=1 / 4) for way in ((1, 0), (0, 1)))
        now = [across, down, across * across + down * down]
        self._sums = [a + b for a, b in zip(self._sums, now, strict=True)] if self.count else now
        self.count += 1

    def measured(self) -> tuple[np.ndarray, np.ndarray]:
        """The slope of the mean picture, and the rms slope; [h w], levels a pixel."""
        across, down, slopes = (each / self.count for each in self._sums)
        return cv2.magnitude(across, down), cv2.sqrt(slopes)


# Scores from the pass

def motion(seen: Trace) -> float:
    """By the codec's vectors when a tenth of the pictures have them, by flow otherwise."""
    if len(seen.at_s) < 2:
        raise Unknown("one picture only")
    step = (seen.at_s[-1] - seen.at_s[0]) / (len(seen.at_s) - 1)
    coded = np.array(seen.coded)
    known = np.isfinite(coded)
    if known.sum() >= max(0.1 * len(coded), 2):
        return float(coded[known].mean()) / step
    return float(np.mean(seen.speed)) / step


SMOOTH_S = 0.6  # the path of a steady hand is a parabola for so long


def camera_shake(seen: Trace) -> float:
    """The path of the scene less its own smooth part (A. Savitzky, M. Golay, Analytical Chemistry 36, 1964)."""
    path = np.cumsum(np.array(seen.pan).reshape(-1, 2), 0)
    if len(path) < 5:
        raise Unknown("too few pictures")
    rate = len(path) / max(seen.at_s[-1] - seen.at_s[0], EPS_S)
    window = min(max(int(SMOOTH_S * rate) // 2 * 2 + 1, 5), (len(path) - 1) // 2 * 2 + 1)
    return float(np.sqrt(np.square(path - savgol_filter(path, window, 2, axis=0)).sum(1).mean()))


def sharpness_of(y: np.ndarray) -> float:
    """Two levels of a Laplacian pyramid (P. Burt, E. Adelson, 1983): natural detail has about as much in each octave, and what was
    blurred or enlarged lacks the finest one."""
    plane = y[:y.shape[0] // 4 * 4, :y.shape[1] // 4 * 4].astype(np.float32)
    strength = []
    for _ in range(2):
        half = cv2.resize(plane, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        strength.append(float((plane - cv2.resize(half, plane.shape[::-1])).std()))
        plane = half
    return strength[0] / strength[1] if strength[1] > 0.05 else 0.0


def flicker(seen: Trace) -> float:
    """Robust spread of how much a picture's level misses the mean of both neighbours'."""
    level = np.array(seen.level)
    if len(level) < 5:
        raise Unknown("too few pictures")
    around = (level[:-2] + level[2:]) / 2
    missed = (level[1:-1] - around) / np.maximum(around, 8)
    return float(np.median(np.abs(missed))) / 0.6745 / math.sqrt(1.5) * 100


STILL = 0.06  # mean change, levels, below which a picture shows nothing new
BESIDE = 0.2  # the same as a share of the clip's usual change


def freeze(seen: Trace) -> float:
    """Pictures whose change is next to nothing, in itself or beside the usual change of the clip."""
    change = np.array(seen.change[1:])
    if not len(change):
        raise Unknown("one picture only")
    usual = float(np.median(change[change > STILL])) if (change > STILL).any() else 0.0
    return float((change <= max(STILL, BESIDE * usual)).mean())


def residual_comb(seen: Trace) -> float:
    """The more certain of two signs: fields on lines of their own (repair.fields), and a rescaled comb (repair.baked)."""
    if len(seen.in_a_row) < 8:
        raise Unknown("too few pictures")
    planes = np.stack(seen.in_a_row)
    sample = films.from_clip(Clip(planes, planes[:, :1, :1], planes[:, :1, :1], np.arange(len(planes)) / 25.0))
    verdict = fields.analyse(sample)
    woven = verdict.confidence if verdict.verdict not in ("progressive", "unknown") else 0.0
    rescaled = 1 / (1 + math.exp(-baked.scored(sample)[1]))
    return max(float(woven), rescaled)


EDGE = 8.0  # rms slope, levels a shrunk pixel, from which on there is an edge
STAYS, MOVES = 0.95, 0.6  # the slope of the mean over the rms slope: above an edge stays, below it moves
STANDS = 0.15  # share of edges that nearly stay, above which the scene does, and logos cannot be told from it
AROUND, MOVING = 61, 0.7  # pixels around a logo, and the share of their edges that has to move
CORNER = 0.3, 0.35  # of the height and width, where logos lie
LEAST = 30  # pixels of a logo


def logos(seen: Trace) -> float:
    """Edges that stay in every picture while those around them move (after T. Dekel et al., On the effectiveness of visible
    watermarks, 2017, who find watermarks as what slopes have in common)."""
    if seen.logo.count < 6:
        raise Unknown("too few pictures")
    slope, rms = seen.logo.measured()
    edges, kept = rms > EDGE, slope / np.maximum(rms, 1e-3)
    if (edges & (kept > 0.85)).sum() > STANDS * edges.sum() or not edges.any():
        raise Unknown("much of the scene stands still")
    strokes, loose = edges & (kept > STAYS), edges & (kept < MOVES)
    staying, moving = (cv2.blur(mask.astype(np.float32), (AROUND, AROUND)) for mask in (strokes, loose))
    strokes &= (moving > MOVING * (moving + staying)) & (moving > 0.05)
    h, w = strokes.shape
    strokes[round(CORNER[0] * h):h - round(CORNER[0] * h)] = False
    strokes[:, round(CORNER[1] * w):w - round(CORNER[1] * w)] = False
    whole = cv2.morphologyEx(strokes.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    areas = cv2.connectedComponentsWithStats(whole)[2][1:, cv2.CC_STAT_AREA]
    return float(areas[areas >= LEAST].sum() / whole.size)


def phash(seen: Trace) -> str:
    """64 bits for each of four pictures: whether each of the 8x8 lowest frequencies but the mean is above their median."""
    return ",".join(f"{hash_of(picture.y):016x}" for picture in seen.looks)


def hash_of(y: np.ndarray) -> int:
    """Of one picture [h w]; a flat one gives 0."""
    waves = cv2.dct(cv2.resize(y, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32))[1:9, 1:9]
    bits = waves.ravel() > max(float(np.median(waves)), 0.5 if np.abs(waves).max() < 8 else -math.inf)
    return int("".join("01"[bit] for bit in bits.astype(int)), 2)


OF_TRACE: dict[str, Callable[[Trace], Any]] = {
    "motion": motion, "camera_shake": camera_shake, "flicker": flicker, "freeze": freeze, "residual_comb": residual_comb,
    "logos": logos, "phash": phash,
    "sharpness": lambda seen: float(np.median(seen.sharp)),
    "exposure": lambda seen: float(np.mean(seen.level)) / (255 if seen.kind.full_range else 219),
    "clipped_dark": lambda seen: float(np.mean(seen.clipped, 0)[0]),
    "clipped_bright": lambda seen: float(np.mean(seen.clipped, 0)[1]),
}
NETWORKS: dict[str, Callable[[Settings, list[np.ndarray]], float]] = {
    "text_area": lambda _, images: nets.text_area(images[1::2]),  # the dearest of the networks: two pictures of the four
    "faces": lambda _, images: nets.faces(images),
    "nsfw": lambda _, images: nets.nsfw(images),
    "aesthetics": lambda settings, images: nets.aesthetics(images, settings.aesthetics),
}


def of_file(path: Path, start_s: float, end_s: float | None, names: list[str], settings: Settings,
            problems: dict[str, str]) -> dict[str, Any]:
    """Scores from the pixels of a span by name; a text goes into tags. Adds to `problems` why others could not be computed.

    Raises ValueError naming a file that cannot be read.
    """
    found: dict[str, Any] = {}
    seen = trace(path, start_s, end_s, names)
    images = [rgb(picture, seen.kind) for picture in seen.looks] if set(names) & set(NETWORKS) else []
    for name in names:
        if name in OF_TRACE:
            _compute(name, OF_TRACE[name], seen, found, problems)
        else:
            _compute(name, partial(NETWORKS[name], settings), images, found, problems)
    return found


def rgb(picture: Picture, kind: Kind) -> np.ndarray:
    """A picture as RGB, uint8 [h w 3], upright."""
    frame = films.frame_of(picture, kind)
    frame.colorspace = kind.matrix
    frame.color_range = 2 if kind.full_range else 1
    return frame.to_ndarray(format="rgb24", threads=1)


# Command line

@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.score", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a video file, or a manifest (.parquet)")
    parser.add_argument("--out", type=Path, help="of a manifest: the one to write, in the same folder")
    parser.add_argument("--report", type=Path, help="of a file: its scores, .json; printed if not given")
    parser.add_argument("--scores", nargs="+", default=list(SCORES), help=f"of {', '.join(SCORES)}; all if not given")
    parser.add_argument("--aesthetics", default="", help="module:function of yours")
    args = parser.parse_args(argv)
    cv2.setNumThreads(1)
    settings = Settings(tuple(args.scores), args.aesthetics)
    if args.source.suffix == ".parquet":
        return _many(args, settings)
    row = {"id": args.source.name, "path": args.source.name}
    row = scored(row, args.source.parent, settings)
    if row.get("dropped"):
        raise ValueError(f"{args.source}: {row['dropped']}")
    report = json.dumps({"scores": row["scores"], "tags": row["tags"]}, indent=1)
    if args.report is None:
        print(report)
    else:
        with video.renamed_when_whole(args.report) as part:
            part.write_text(report + "\n")
    return 0


def _many(args: argparse.Namespace, settings: Settings) -> int:
    if args.out is None or args.out.resolve().parent != args.source.resolve().parent:
        raise ValueError(f"--out: name a manifest in {args.source.resolve().parent}, where the paths of its rows start")

    def rows() -> Iterator[Row]:
        for batch in manifest.batches(args.source):
            for row in tqdm(batch, desc="score", unit=" clips", disable=None, leave=False):
                yield row if row.get("dropped") else scored(row, args.source.parent, settings)

    count = manifest.write(args.out, rows(), manifest.about(args.source))
    print(f"{args.out}: {count} clips")
    return 0


if __name__ == "__main__":
    sys.exit(main())

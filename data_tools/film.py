"""Films: pictures as a decoder gives them, in luma and chroma planes, for stages that repair pixels.

A film is read as often as a stage needs it and holds no more than a few pictures in memory. Levels stay as they are stored
(limited range stays limited: an RGB detour would move them), and chroma keeps the file's own number of lines, because the lines of
an interlaced picture must not be mixed before its fields are apart. Shape letters: f pictures, h w lines and columns.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.codec.context import Flags2
from av.video.reformatter import ColorRange

from latte.video import EPS_S, REPEATABLE, opened, renamed_when_whole

TICKS = 90_000  # a second, in written files: exact for every usual rate


class Picture(NamedTuple):
    """One picture: uint8 planes [h w] of luma and two of chroma, and its time in seconds from the film's first one."""

    y: np.ndarray
    u: np.ndarray
    v: np.ndarray
    at_s: float

    def each(self, function: Callable[[np.ndarray], np.ndarray]) -> "Picture":
        """The same function on every plane."""
        return Picture(function(self.y), function(self.u), function(self.v), self.at_s)


@dataclass(frozen=True)
class Kind:
    """What all pictures of a film share."""

    width: int  # pixels as stored
    height: int
    rate: Fraction  # pictures a second, nominal
    aspect: Fraction = Fraction(1)  # width of a stored pixel / its height
    turns: int = 0  # quarter turns counter-clockwise that make it upright
    matrix: int = 1  # of YUV, in ITU-T H.273's numbers; 1 is BT.709, 2 is unknown
    full_range: bool = False
    coded: str = ""  # codec and pixel format of the file, for reports


@dataclass(frozen=True)
class Film:
    """Pictures that can be gone through again and again: iterating starts over."""

    kind: Kind
    pictures: Callable[[], Iterator[Picture]]
    problems: Counter = field(default_factory=Counter)  # what decoding ran into, by kind, of the last time through

    def __iter__(self) -> Iterator[Picture]:
        return self.pictures()

    def through(self, function: Callable[[Iterator[Picture]], Iterator[Picture]], **changes: Any) -> "Film":
        """The film that a generator makes of this one; `changes` are fields of `kind` that differ then."""
        return replace(self, kind=replace(self.kind, **changes), pictures=lambda: function(iter(self)))


class Clip(NamedTuple):
    """A short film in memory: uint8 planes y [f h w], u and v [f h' w'], and times [f] in seconds."""

    y: np.ndarray
    u: np.ndarray
    v: np.ndarray
    at_s: np.ndarray

    @property
    def rate(self) -> float:
        return float(1 / np.median(np.diff(self.at_s))) if len(self.at_s) > 1 else 25.0

    def each(self, function: Callable[[np.ndarray], np.ndarray]) -> "Clip":
        """The same function on every stack of planes."""
        return Clip(function(self.y), function(self.u), function(self.v), self.at_s)

    def take(self, index) -> "Clip":
        """The pictures of a slice or of a list of numbers, with their times."""
        return Clip(*(part[index] for part in self))

    def timed(self, rate: float) -> "Clip":
        """The same pictures at a steady rate from 0 s on."""
        return self._replace(at_s=np.arange(len(self.y)) / float(rate))


def from_clip(clip: Clip) -> Film:
    """A film of the pictures in memory."""
    f, h, w = clip.y.shape
    kind = Kind(width=w, height=h, rate=Fraction(clip.rate).limit_denominator(1001))
    return Film(kind, lambda: (Picture(y, u, v, float(at)) for y, u, v, at in zip(*clip, strict=True)))


def to_clip(pictures: Iterable[Picture], limit: int | None = None) -> Clip:
    """Pictures of a film, at most `limit` of them, in memory. Raises ValueError when there is none."""
    chosen = list(itertools.islice(pictures, limit))
    if not chosen:
        raise ValueError("no picture to keep: the film is empty")
    return Clip(*(np.stack(part) for part in zip(*chosen, strict=True)))


def around(items: Iterable, reach: int) -> Iterator[tuple[Any, list]]:
    """Each item, and the list of those up to `reach` places before and after it, itself among them."""
    held, at = [], -reach
    for item in items:
        held.append(item)
        if at >= 0:
            yield held[at], held
        at += 1
        if at > reach:
            held, at = held[1:], at - 1
    for i in range(max(at, 0), len(held)):
        yield held[i], held[max(0, i - reach):i + reach + 1]


def read(path: str | Path, start_s: float = 0.0, end_s: float = math.inf, from_zero: bool = True,
         vectors: Callable[[av.VideoFrame], Any] | None = None) -> Film:
    """The film in a file, or its span from start_s up to end_s, whose first picture is then at 0 s, unless from_zero is false.

    What cannot be decoded is left out and counted in `problems`. vectors: is shown every decoded frame of the span, with the
    codec's motion vectors, just before its picture comes.

    Pictures of more than 8 bits are rounded to 8; RGB becomes YUV 4:4:4; the number of chroma lines stays. Pictures whose size
    differs from the first one's are left out. Times rise strictly: a picture without a time follows the one before it by
    1 / rate, and one that does not come later is left out. Raises ValueError naming the file when it is missing, holds no video,
    no picture of it can be decoded or none lies in the span.
    """
    problems: Counter = Counter()
    first = next(frames(path, problems), None)
    if first is None:
        raise ValueError(f"{path}: no picture of it can be decoded")
    with opened(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        aspect, codec = stream.sample_aspect_ratio or Fraction(1), stream.codec_context.name
        origin, base = first.pts, stream.time_base
    if not Fraction(1, 10) <= rate <= 1000:
        rate = Fraction(25)
    full = first.color_range == ColorRange.JPEG or first.format.name.startswith("yuvj")
    matrix = int(first.colorspace) if not first.format.is_rgb and first.colorspace is not None else 1
    kind = Kind(width=first.width, height=first.height, rate=Fraction(rate), aspect=Fraction(aspect),
                turns=first.rotation // 90 % 4, matrix=matrix, full_range=full, coded=f"{codec} {first.format.name}")

    def pictures():
        problems.clear()
        last, begun = -math.inf, None
        near = origin + math.floor(start_s / base) if start_s > 5 and origin is not None else None
        for frame in frames(path, problems, near, vectors is not None):
            if (frame.width, frame.height) != (kind.width, kind.height):
                problems["picture of another size"] += 1
                continue
            timed = frame.pts is not None and origin is not None
            at = float((frame.pts - origin) * base) if timed else max(last, -float(1 / kind.rate)) + float(1 / kind.rate)
            if at <= last:
                problems["time that does not rise"] += 1
                continue
            last = at
            if at >= end_s - EPS_S:
                return
            if at >= start_s - EPS_S:
                begun = at if begun is None else begun
                if vectors is not None:
                    vectors(frame)
                yield picture_of(frame, at - begun if from_zero else at)

    film = Film(kind, pictures, problems)
    if start_s > 0 and next(iter(film), None) is None:
        raise ValueError(f"{path}: no picture of it lies between {start_s:g} and {end_s:g} s")
    return film


def held(film: Film, mib: float = 600, spill: Path | None = None) -> Film:
    """The same film, made but once if all its pictures fit into so many MiB: they are kept then.

    One that does not fit is made anew each time, or, with `spill`, written losslessly to that file the first time, in YUV 4:2:0.
    """
    kept: list[Picture] = []
    state = {"whole": False, "fits": True}

    def kept_or_made():
        if state["whole"]:
            return iter(kept)
        if state["fits"] and not kept:
            return keeping()
        return iter(film)

    def keeping():
        used = 0
        try:
            for picture in film:
                if state["fits"]:
                    used += sum(plane.nbytes for plane in picture[:3])
                    state["fits"] = used <= mib * 2**20
                    kept.append(picture) if state["fits"] else kept.clear()
                yield picture
            state["whole"] = state["fits"]
        finally:
            if not state["whole"]:
                kept.clear()

    def spilled():
        if not state["fits"] and not spill.exists():
            write(spill, film, crf=0, preset="ultrafast")
        return read(spill).pictures() if spill.exists() else kept_or_made()

    return replace(film, pictures=spilled if spill else kept_or_made)


def write(path: str | Path, film: Film, crf: int = 14, preset: str = "veryfast") -> int:
    """Writes a film as an H.264 yuv420p mp4 with its own times, upright; an odd last line or column is left off.

    crf 0 is lossless. The same film gives the same bytes. The file appears under its name when it is whole. Returns the number of
    pictures. Raises ValueError when there is none, the sides are below 2 pixels, crf is none, or no mp4 can hold the times.
    """
    check_crf(crf)
    try:
        return _written(Path(path), film, crf, preset)
    except av.error.PatchWelcomeError:  # what FFmpeg's muxer says of them
        raise ValueError(f"{Path(path).name}: an mp4 cannot hold times so far apart") from None


def _written(path: Path, film: Film, crf: int, preset: str) -> int:
    kind, count, stream = film.kind, 0, None
    aspect = 1 / kind.aspect if kind.turns % 2 else kind.aspect
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with renamed_when_whole(path) as part, av.open(str(part), "w", format="mp4", options=options) as container:
        for picture in film:
            frame = frame_of(picture, kind)
            if stream is None:
                if min(frame.width, frame.height) < 2:
                    raise ValueError(f"{path}: a video needs sides of 2 pixels and more, got {frame.width}x{frame.height}")
                chosen = {"crf": str(crf), "preset": preset, "x264-params": REPEATABLE}
                stream = container.add_stream("libx264", rate=kind.rate, options=chosen)
                stream.codec_context.thread_count = 1
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
                stream.codec_context.time_base = stream.time_base = Fraction(1, TICKS)
                stream.sample_aspect_ratio = aspect
                stream.codec_context.colorspace = kind.matrix
                stream.codec_context.color_range = ColorRange.JPEG if kind.full_range else ColorRange.MPEG
            frame.pts, frame.time_base = round(picture.at_s * TICKS), Fraction(1, TICKS)
            container.mux(stream.encode(frame))
            count += 1
        if stream is None:
            raise ValueError(f"{path}: there is no picture to write")
        container.mux(stream.encode())
    return count


def check_crf(crf: int) -> None:
    """Raises ValueError for what x264 knows no quality by."""
    if not 0 <= crf <= 51:
        raise ValueError(f"crf: {crf} is out of range; 0 is lossless, 14 close to it, 51 the worst")


def frames(path: str | Path, problems: Counter, near: int | None = None, vectors: bool = False) -> Iterator[av.VideoFrame]:
    """What can be decoded, in order of presentation; damaged packets are passed over and counted in `problems`.

    near: a time in the stream's units; decoding may start at the key frame before it. Raises ValueError as `read` does."""
    with opened(path) as container:
        stream = container.streams.video[0]
        if vectors:
            stream.codec_context.flags2 |= Flags2.export_mvs
        if near is not None:
            with suppress(av.error.FFmpegError):
                container.seek(near, stream=stream)
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                decoded = packet.decode()
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, ValueError) as error:
                problems[f"damaged data ({getattr(error, 'strerror', None) or error})"] += 1
                if sum(problems.values()) > 10_000:  # a demuxer that stands still
                    return
                continue
            for frame in decoded:
                if frame.is_corrupt:
                    problems["picture marked as damaged by the decoder"] += 1
                yield frame


# How pixel formats keep their chroma: the name's part -> the 8-bit format with as many chroma lines
_FORMATS = {"420": "yuv420p", "nv12": "yuv420p", "nv21": "yuv420p", "p010": "yuv420p", "410": "yuv420p", "440": "yuv444p",
            "422": "yuv422p", "411": "yuv422p", "uyvy": "yuv422p", "yuyv": "yuv422p", "nv16": "yuv422p", "gray": "gray"}


def picture_of(frame: av.VideoFrame, at_s: float) -> Picture:
    """A decoded frame's planes; see `read` for what is kept."""
    name = frame.format.name
    wanted = next((target for part, target in _FORMATS.items() if part in name), "yuv444p")
    if name.removeprefix("yuvj").removeprefix("yuv") != wanted.removeprefix("yuv"):
        full = frame.color_range == ColorRange.JPEG
        ranges = dict(src_color_range=ColorRange.JPEG, dst_color_range=ColorRange.JPEG) if full and not frame.format.is_rgb else {}
        frame = frame.reformat(format=wanted, threads=1, **ranges)
    y = _plane(frame.planes[0])
    if wanted == "gray":
        u = v = np.full(((y.shape[0] + 1) // 2, (y.shape[1] + 1) // 2), 128, np.uint8)
    else:
        u, v = _plane(frame.planes[1]), _plane(frame.planes[2])
    return Picture(y, u, v, at_s)


def _plane(plane) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:plane.height, :plane.width].copy()


def frame_of(picture: Picture, kind: Kind) -> av.VideoFrame:
    """The upright yuv420p frame of a picture."""
    y, u, v = picture.y, picture.u, picture.v
    h, w = y.shape[0] // 2 * 2, y.shape[1] // 2 * 2
    if u.shape[0] >= y.shape[0] > 1:  # progressive by now, so chroma lines may be averaged
        u, v = _halved(u, 0), _halved(v, 0)
    if u.shape[1] >= y.shape[1] > 1:
        u, v = _halved(u, 1), _halved(v, 1)
    planes = [np.ascontiguousarray(np.rot90(plane, kind.turns)) for plane in (y[:h, :w], u[:h // 2, :w // 2], v[:h // 2, :w // 2])]
    frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], "yuv420p")
    for target, plane in zip(frame.planes, planes, strict=True):
        np.frombuffer(target, np.uint8).reshape(-1, target.line_size)[:target.height, :target.width] = plane
    return frame


def _halved(plane: np.ndarray, axis: int) -> np.ndarray:
    """Means of pairs of lines (axis 0) or columns (axis 1)."""
    n = plane.shape[axis] // 2 * 2
    wide = np.take(plane, range(n), axis).astype(np.uint16)
    first, second = (wide[0::2], wide[1::2]) if axis == 0 else (wide[:, 0::2], wide[:, 1::2])
    return ((first + second + 1) >> 1).astype(np.uint8)

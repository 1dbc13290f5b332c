"""Read, probe and write video files. Frames are uint8 RGB arrays [f h w 3]; times are seconds from the first frame.

Frames are chosen by presentation timestamp, never by index, so a source may have any frame rate, also a variable one.
PyAV brings its own FFmpeg: nothing has to be installed beside it. decord and torchcodec can decode in its place.
"""

import itertools
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image

BACKENDS = ("pyav", "decord", "torchcodec")  # the default first; benchmarks/decode.py says why
# x264's macroblock tree reads memory that nobody wrote where the height is no multiple of 16: equal frames give unequal files.
REPEATABLE = "mbtree=0"
EPS_S = 1e-6  # a time this close to the middle of two frames belongs to the earlier one, whatever the rounding


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. `frames` and `duration_s` are the header's word unless the file was decoded to count them."""

    width: int  # pixels as stored, before any rotation
    height: int
    shown_width: int  # pixels of the upright picture in square pixels
    shown_height: int
    fps: float  # average
    duration_s: float
    frames: int
    codec: str


def probe(path: str | Path, count: bool = False) -> VideoInfo:
    """Size, rate, length and codec of a video file; count=True decodes all of it, because a header may lie.

    Raises ValueError naming the file if it is missing, damaged or holds no video.
    """
    with opened(path) as container:
        stream = container.streams.video[0]
        width, height, codec = stream.codec_context.width, stream.codec_context.height, stream.codec_context.name
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        duration = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / av.time_base
        frames = stream.frames or round(duration * fps)
    if count:
        ends = [shown.end for shown in _decode(path)]
        if not ends:
            raise ValueError(f"{path}: no frame of it can be decoded")
        frames, duration = len(ends), ends[-1]
        fps = frames / duration
    first = next(_decode(path), None)  # only a frame tells the rotation
    upright = (round(width * first.aspect), height) if first else (width, height)
    upright = upright[::-1] if first and first.turns % 2 else upright
    return VideoInfo(width=width, height=height, shown_width=upright[0], shown_height=upright[1], fps=fps, duration_s=duration,
                     frames=frames, codec=codec)


def read(path: str | Path, start_s: float = 0.0, frames: int = 128, fps: float = 8.0,
         height: int | None = None, width: int | None = None, backend: str = "pyav") -> np.ndarray:
    """The frames nearest in time to start_s + i / fps, i = 0 .. frames - 1, as uint8 [f h w 3].

    With height and width, the upright picture in square pixels is scaled until it covers that size and cut to its
    centre. Decoding starts at the key frame before start_s. Raises ValueError naming the file if it is missing or
    damaged, or if the video ends before the last wanted time. Every one of BACKENDS chooses the same frames; a ValueError
    naming the back-end says that it cannot be loaded or cannot decode the file.
    """
    if frames < 1 or fps <= 0 or start_s < 0:
        raise ValueError(f"{path}: cannot read {frames} frames at {fps} fps from {start_s} s; "
                         "frames and fps must be above 0 and the start not below")
    return read_at(path, [start_s + i / fps for i in range(frames)], height, width, backend)


def read_at(path: str | Path, wanted: list[float], height: int | None = None, width: int | None = None,
            backend: str = "pyav", crop: float = 0.5) -> np.ndarray:
    """The frames nearest to the wanted times in seconds, which rise, as uint8 [f h w 3]; sizes and errors as in `read`.

    crop: where the cut to height and width lies on the side that is too long, 0 to 1; 0.5 is the centre.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{path}: there is no decoding back-end {backend!r}; there are {', '.join(BACKENDS)}")
    if (height is None) != (width is None):
        raise ValueError(f"{path}: give both height and width, or neither")
    chosen = _nearest(path, _decode(path, wanted[0]), wanted) if backend == "pyav" else _fetched(path, wanted, backend)
    picked: list[np.ndarray] = []
    for shown, count in chosen:
        picked += [_picture(shown.frame, height, width, shown.aspect, shown.turns, crop)] * count
    return np.stack(picked)


def read_images(paths: list[Path], height: int | None = None, width: int | None = None, crop: float = 0.5) -> np.ndarray:
    """Image files as the frames of a clip, uint8 [f h w 3]; scaled and cut as in `read_at`. ValueError naming a damaged one."""
    frames = []
    for path in paths:
        try:
            with Image.open(path) as image:
                frame = av.VideoFrame.from_ndarray(np.asarray(image.convert("RGB")), format="rgb24")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as an image ({error})") from None
        frames.append(_picture(frame, height, width, crop=crop))
    return np.stack(frames)


def write(path: str | Path, frames: np.ndarray, fps: float = 8.0, scale: int = 1) -> None:
    """Writes frames [f h w 3] uint8 as an H.264 yuv420p mp4 that browsers play, with exactly f frames at fps.

    scale > 1 repeats every pixel, so that a small clip can be looked at. The file appears under its name when it is
    whole. Raises ValueError if the sides are odd, which yuv420p cannot hold.
    """
    frames = _checked(frames)
    f, h, w, _ = frames.shape
    if h * scale % 2 or w * scale % 2:
        raise ValueError(f"{path}: H.264 in yuv420p needs even sides, got {w * scale}x{h * scale}")
    rate = Fraction(fps).limit_denominator(1001)
    options = {"movflags": "+faststart"}  # the index in front, so that a browser starts before it has the whole file
    with renamed_when_whole(path) as part, av.open(str(part), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "x264-params": REPEATABLE})
        stream.width, stream.height, stream.pix_fmt = w * scale, h * scale, "yuv420p"
        # Saying which matrix was used stops players, and read(), from guessing it by the size of the picture.
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU709, ColorRange.MPEG
        stream.codec_context.color_primaries = stream.codec_context.color_trc = 1  # BT.709
        for i, image in enumerate(frames):
            image = np.ascontiguousarray(image.repeat(scale, axis=0).repeat(scale, axis=1))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=Interpolation.AREA)
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def animate(path: str | Path, frames: np.ndarray, fps: float = 8.0, scale: int = 1) -> None:
    """Writes frames [f h w 3] uint8 as an endless animated .gif or .webp, for pages that show pictures but no videos."""
    images = [Image.fromarray(np.ascontiguousarray(image.repeat(scale, axis=0).repeat(scale, axis=1)))
              for image in _checked(frames)]
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in ("gif", "webp"):
        raise ValueError(f"{path}: an animated picture ends in .gif or .webp")
    with renamed_when_whole(path) as part:
        images[0].save(part, format=kind, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def grid(clips: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Clips [k f h w 3] side by side in rows of `columns`, white lines between them: uint8 [f H W 3]."""
    k, f, h, w, _ = clips.shape
    rows = math.ceil(k / columns)
    sheet = np.full((f, rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, dtype=np.uint8)
    for i, clip in enumerate(clips):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        sheet[:, top:top + h, left:left + w] = clip
    return sheet


def contact_sheet(frames: np.ndarray, path: str | Path, columns: int = 8, rows: int = 4) -> None:
    """Writes a PNG of rows x columns frames, chosen evenly from [f h w 3], the first and the last among them."""
    frames = _checked(frames)
    count = min(len(frames), rows * columns)
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    sheet = grid(frames[chosen][:, None], min(columns, count))[0]
    with renamed_when_whole(path) as part:
        Image.fromarray(sheet).save(part, format="png")


def _checked(frames: np.ndarray) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 [f h w 3] with at least one frame, got {frames.dtype} {list(frames.shape)}")
    return frames


@contextmanager
def renamed_when_whole(path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` if the block ends well and is removed if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def opened(path: str | Path) -> av.container.InputContainer:
    """A container whose first video stream decodes on one thread. Raises ValueError naming a file that holds no video."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such video file")
    try:
        # Old files carry metadata that is not UTF-8; nobody needs it here, so it must not stop the reading.
        container = av.open(str(path), metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: cannot be opened as a video ({error.strerror})") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path}: holds no video")
    if container.streams.video[0].codec_context is None:  # a header that was cut off before it names the codec
        container.close()
        raise ValueError(f"{path}: holds video of an unknown kind")
    # Data workers are the parallelism here: more threads show the same pictures and wait for each other on busy cores.
    container.streams.video[0].codec_context.thread_count = 1
    return container


class _Shown(NamedTuple):
    start: float  # seconds from the first frame of the file
    end: float
    frame: av.VideoFrame | int  # its number until it is fetched
    aspect: float  # width of a stored pixel / its height
    turns: int  # quarter turns counter-clockwise that make it upright


def _nearest(path, frames: Iterable[_Shown], wanted: list[float]) -> Iterator[tuple[_Shown, int]]:
    """Every frame that is the nearest to a wanted time, and to how many of them. No other place chooses frames."""
    left, shown = list(wanted), None
    for coming in itertools.chain(frames, [None]):
        if shown:
            # A frame is the nearest until half-way to the next one; the last frame lasts until its end.
            until = (shown.start + coming.start) / 2 + EPS_S if coming else shown.end - EPS_S
            count = sum(at <= until for at in left)
            if count:
                yield shown, count
            left = left[count:]
        if not left:
            return
        if coming:
            shown = coming
    has = shown.end if shown else 0.0
    raise ValueError(f"{path}: has {has:.2f} s of video, too little for the {len(wanted)} frames from {wanted[0]:g} s "
                     f"to {wanted[-1]:g} s")


def _decode(path, start_s: float = 0.0) -> Iterator[_Shown]:
    """Frames in order of presentation, from the key frame at or before start_s, or from the first if seeking fails."""
    end = 0.0
    try:
        with opened(path) as container:
            stream = container.streams.video[0]
            origin = stream.start_time or 0
            step = float(1 / (stream.guessed_rate or stream.average_rate or 25))
            aspect = float(stream.sample_aspect_ratio or 1)
            usable = start_s == 0 or _seek(container, stream, origin + math.floor(start_s / stream.time_base))
            decoded = container.decode(stream) if usable else ()
            usable = start_s == 0
            for frame in decoded:
                start = end if frame.pts is None else float((frame.pts - origin) * stream.time_base)
                usable = usable or (frame.pts is not None and start <= start_s)
                if not usable:
                    break
                end = start + (float(frame.duration * stream.time_base) if frame.duration else step)
                yield _Shown(start, end, frame, aspect, frame.rotation // 90 % 4)
        if not usable:
            yield from _decode(path)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: damaged after {end:.2f} s ({error.strerror})") from error


def _seek(container, stream, timestamp: int) -> bool:
    try:
        container.seek(timestamp, stream=stream)
    except av.error.FFmpegError:
        return False
    return True


def _times(path, backend: str) -> list[_Shown]:
    """When every frame is shown, by the packets of the file; one frame is decoded, for only a frame tells the rotation."""
    spans, turns = [], None
    try:
        with opened(path) as container:
            stream = container.streams.video[0]
            base, origin, aspect = stream.time_base, stream.start_time or 0, float(stream.sample_aspect_ratio or 1)
            step = float(1 / (stream.guessed_rate or stream.average_rate or 25))
            for packet in container.demux(stream):
                if turns is None:
                    turns = next((frame.rotation // 90 % 4 for frame in packet.decode()), None)
                if packet.size and not packet.is_discard:
                    if packet.pts is None:
                        raise ValueError(f"{path}: has no timestamps, which {backend} needs; the back-end pyav can read it")
                    spans.append((packet.pts, packet.duration))
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: damaged after {len(spans)} frames ({error.strerror})") from error
    times = [(float((pts - origin) * base), float(duration * base) if duration else step) for pts, duration in sorted(spans)]
    return [_Shown(start, start + lasts, i, aspect, turns or 0) for i, (start, lasts) in enumerate(times)]


def _fetched(path, wanted: list[float], backend: str) -> Iterator[tuple[_Shown, int]]:
    """The frames of `_nearest` with the pictures of decord or torchcodec.

    Both turn a picture upright; here it is turned back, so that it is scaled and cut as PyAV's is.
    """
    module, needs, reader = _OTHERS[backend]
    try:
        library = import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"the decoding back-end {backend} cannot be loaded; it needs {needs} ({_line(error)})") from error
    frames = _times(path, backend)
    chosen = list(_nearest(path, frames, wanted))  # a video that is too short is refused before any of it is decoded
    try:
        count, fetch = reader(library, str(path))
        for shown, times in chosen:
            image, start = fetch(shown.frame)
            # decord's times are float32. It numbers frames that an edit list hides, and then shows the wrong ones.
            if count != len(frames) or abs(start - shown.start) > 0.002:
                raise ValueError(f"it finds {count} frames, number {shown.frame} at {start:.3f} s, where the file "
                                 f"has {len(frames)}, that one at {shown.start:.3f} s")
            image = np.ascontiguousarray(np.rot90(image, -shown.turns))
            yield shown._replace(frame=av.VideoFrame.from_ndarray(image, format="rgb24")), times
    except Exception as error:  # each of the libraries has its own kinds
        raise ValueError(f"{path}: {backend} cannot decode it ({_line(error)})") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _decord(decord, path: str) -> tuple[int, Callable]:
    # A reader that is opened in a parent hangs in a forked worker, so it lives no longer than one call.
    reader = decord.VideoReader(path, num_threads=1)
    return len(reader), lambda i: (reader[i].asnumpy(), float(reader.get_frame_timestamp([i])[0, 0]))


def _torchcodec(decoders, path: str) -> tuple[int, Callable]:
    decoder = decoders.VideoDecoder(path, dimension_order="NHWC", device="cpu")
    origin = decoder.metadata.begin_stream_seconds_from_header or 0.0

    def fetch(i):
        frame = decoder.get_frame_at(i)
        return frame.data.numpy(), frame.pts_seconds - origin

    return len(decoder), fetch


# back-end -> module, what it needs, and what gives its count of frames and: number -> (upright RGB picture, its time in s)
_OTHERS = {
    "decord": ("decord", "pip install decord==0.6.0", _decord),
    "torchcodec": ("torchcodec.decoders", "pip install torchcodec==0.13.0 and FFmpeg's shared libraries", _torchcodec),
}


def _picture(frame: av.VideoFrame, height: int | None, width: int | None, aspect: float = 1.0, turns: int = 0,
             crop: float = 0.5) -> np.ndarray:
    if height is None:
        return np.rot90(frame.to_ndarray(format="rgb24", threads=1), turns)
    if turns % 2:
        height, width = width, height
    scale = max(height / frame.height, width / (frame.width * aspect))
    h = max(height, round(frame.height * scale))
    w = max(width, round(frame.width * aspect * scale))
    interpolation = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    image = frame.reformat(width=w, height=h, format="rgb24", interpolation=interpolation, threads=1).to_ndarray()
    top, left = int((h - height) * crop), int((w - width) * crop)
    return np.rot90(image[top:top + height, left:left + width], turns)

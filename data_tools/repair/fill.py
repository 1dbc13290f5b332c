"""The missing lines of interlaced pictures: two fields in, full pictures out, in three grades.

    fast  bwdif of FFmpeg (Weston 3 field filter within the bounds of yadif), by PyAV's filter graph
    fine  a network of under 40,000 weights that weighs, pixel by pixel, bwdif's line, the lines above and below, and the lines of
          the neighbouring fields as they are and moved along optical flow, and adds a small correction
    best  QTGMC of VapourSynth, lossless, in a Python of its own that LATTE_QTGMC_PYTHON names

The lines of the field that is shown come out bit for bit in every grade. Every plane is filled from its own fields, because the
chroma lines of an interlaced 4:2:0 picture belong to the two fields in turn, as its luma lines do.
Letters: h w lines and columns of a plane, m its missing lines (h / 2), k channels.
"""

import collections
import itertools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from data_tools.film import Picture

ORDERS, RATES, GRADES = ("tff", "bff"), ("frame", "field"), ("fast", "fine", "best")
WEIGHTS = Path(__file__).parent / "weights/fill.safetensors"
MULTIPLE = 16  # sides of luma that the side-car is given
STEP_S = 1 / 25  # between pictures, when a run of one picture cannot tell
SEARCHED = 32  # lines and columns that the search for motion needs at least
SCALE = 16.0  # levels; the network sees differences divided by it


def deinterlace(pictures: Iterator[Picture], order: str, rate: str = "frame", grade: str = "fast") -> Iterator[Picture]:
    """Progressive pictures of a run of interlaced ones.

    order: the field that is shown first, tff (lines 0, 2, ...) or bff. rate: frame gives the picture of the first field of each,
    field gives both, the second one half a step later. The first and the last picture stand in for those beyond them. Raises
    ValueError for an unknown option, and for the grade best when it is not set up.
    """
    for name, value, known in (("order", order, ORDERS), ("rate", rate, RATES), ("grade", grade, GRADES)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown; it is one of {', '.join(known)}")
    if grade == "best":
        return _best(pictures, order, rate, sidecar())
    return (_fast if grade == "fast" else _fine)(pictures, order, rate)


# fast

def _fast(pictures: Iterator[Picture], order: str, rate: str) -> Iterator[Picture]:
    """bwdif on each plane by itself, which fits every chroma format and odd sides."""
    pictures = iter(pictures)
    first = next(pictures, None)
    if first is None:
        return
    graphs = [_Bwdif(plane.shape, order, rate) for plane in first[:3]]
    times: collections.deque[float] = collections.deque()
    step = STEP_S
    for picture in itertools.chain([first], pictures):
        if times:
            step = picture.at_s - times[-1]
        times.append(picture.at_s)
        for graph, plane in zip(graphs, picture[:3], strict=True):
            graph.push(plane)
        yield from _shown(graphs, times, step)
    for graph in graphs:
        graph.end()
    yield from _shown(graphs, times, step)


def _shown(graphs: list["_Bwdif"], times: collections.deque, step: float) -> Iterator[Picture]:
    """What the graphs of all planes have ready, with times; `times` loses those that are used up."""
    while all(graph.ready for graph in graphs):
        at = times.popleft()
        for k in range(graphs[0].each):
            yield Picture(*(graph.ready.popleft() for graph in graphs), at + k * step / 2)


class _Bwdif:
    """FFmpeg's bwdif on the planes of one run; what comes out gathers in `ready`, `each` planes a plane."""

    def __init__(self, shape: tuple[int, int], order: str, rate: str):
        self.shape, self.each = shape, 2 if rate == "field" else 1
        self.ready: collections.deque[np.ndarray] = collections.deque()
        h, w = max(shape[0], 4), max(shape[1], 3)  # it takes no fewer lines and columns
        self.graph = av.filter.Graph()
        self.graph.threads = 1
        source = self.graph.add_buffer(width=w, height=h, format="gray", time_base="1/25")
        bwdif = self.graph.add("bwdif", f"mode=send_{rate}:parity={order}:deint=all")
        sink = self.graph.add("buffersink")
        source.link_to(bwdif)
        bwdif.link_to(sink)
        self.graph.configure()
        self.grow = (h - shape[0], w - shape[1])

    def push(self, plane: np.ndarray) -> None:
        if any(self.grow):
            plane = np.pad(plane, [(0, more) for more in self.grow], "reflect")
        self.graph.push(av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(plane), format="gray"))
        self._pull()

    def end(self) -> None:
        self.graph.push(None)
        self._pull()

    def _pull(self) -> None:
        while True:
            try:
                plane = self.graph.pull().planes[0]
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            view = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            self.ready.append(view[:self.shape[0], :self.shape[1]].copy())


# fine

CANDIDATES = 8  # differences to bwdif's line: fields -1, +1 as they are; pictures -1, +1, -2, +2 moved; lines above, below
INPUTS = CANDIDATES + 10  # and: misfit of the four moved pictures on known lines, change over two fields, places between lines


class Fill(nn.Module):
    """Differences to bwdif's lines [b k m w], in units of SCALE, to the difference [b m w] of better ones.

    Pairs of columns are seen as channels, which doubles the reach to the sides. The last layer gives each pixel the weights of a
    mean of candidates, bwdif's among them, and a correction; a fresh network's correction is 0.
    """

    def __init__(self, width: int = 32, depth: int = 3):
        super().__init__()
        self.size = {"width": width, "depth": depth}
        self.first = nn.Conv2d(2 * INPUTS, width, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth - 1))
        self.last = nn.Conv2d(width, 2 * (CANDIDATES + 2), 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, k, m, w = x.shape
        y = x.view(b, k, m, w // 2, 2).permute(0, 4, 1, 2, 3).reshape(b, 2 * k, m, w // 2)  # b 2k m w/2
        y = functional.softsign(y.contiguous(memory_format=torch.channels_last))  # cuts and fast motion stay within bounds
        y = functional.relu(self.first(y))
        for layer in self.inner:
            y = y + functional.relu(layer(y))
        y = self.last(y).view(b, 2, CANDIDATES + 2, m, w // 2).permute(0, 2, 3, 4, 1).reshape(b, CANDIDATES + 2, m, w)
        weights = y[:, :CANDIDATES + 1].softmax(1)[:, 1:]  # what is left of 1 is bwdif's
        return (weights * x[:, :CANDIDATES]).sum(1) + y[:, -1]  # b m w


class Evidence(NamedTuple):
    """What the network is told of the missing lines of one plane: all uint8 but the places, which are signed."""

    base: np.ndarray  # [m w] bwdif's lines
    known: np.ndarray  # [m w] the lines of this field, each above the missing one of the same number
    fields: np.ndarray  # [2 m w] fields -1 and +1, which hold the missing lines at their own times
    moved: np.ndarray  # [4 m w] missing lines of the bwdif pictures of fields -1, +1, -2, +2, moved to this field's time
    moved_known: np.ndarray  # [4 m w] known lines of the same
    same: np.ndarray  # [2 m w] fields -2 and +2, which hold the known lines at their own times
    places: np.ndarray  # int8 [4 m w], 127 where a moved line was a line of its field, -127 where it lay between two

    def inputs(self) -> torch.Tensor:
        """float32 [k m w]; see CANDIDATES and INPUTS."""
        base, known = self.base.astype(np.float32), self.known.astype(np.float32)
        below = np.concatenate([known[1:], known[-1:]])
        x = np.concatenate([self.fields - base, self.moved - base, (known - base)[None], (below - base)[None],
                            self.moved_known - known, self.same - known])
        return torch.from_numpy(np.concatenate([x / np.float32(SCALE), self.places / np.float32(127)]))


def flows(bobs: list[np.ndarray], shrink: int = 1) -> list[np.ndarray]:
    """Where each pixel of the middle one of five luma pictures [h w] is in those at -1, +1, -2 and +2: float32 [h' w' 2] each.

    Dense inverse search (Kroeger et al., 2016). shrink: 2 searches at half the size, in a quarter of the time.
    """
    h, w = (max(side // shrink, SEARCHED) for side in bobs[2].shape)
    small = [np.ascontiguousarray(bob) if bob.shape == (h, w) else cv2.resize(bob, (w, h), interpolation=cv2.INTER_AREA)
             for bob in bobs]
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return [search.calc(small[2], small[i], None) for i in (1, 3, 0, 4)]


def evidence(bobs: list[np.ndarray], flow: list[np.ndarray], top: bool) -> Evidence:
    """Of the middle one of five bwdif pictures [h w], even h; top: its known lines are 0, 2, ... Else all is upside down."""
    h, w = bobs[2].shape
    known, missing = (np.s_[0::2], np.s_[1::2]) if top else (np.s_[::-2], np.s_[-2::-2])
    columns, lines = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    moved, places = [], []
    for i, vectors in zip((1, 3, 0, 4), flow, strict=True):
        grow = np.float32([w / vectors.shape[1], h / vectors.shape[0]])
        vectors = cv2.resize(vectors, (w, h), interpolation=cv2.INTER_LINEAR)
        dx, dy = vectors[..., 0] * grow[0], vectors[..., 1] * grow[1]
        moved.append(cv2.remap(bobs[i], columns + dx, lines + dy, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE))
        places.append(np.cos(np.pi * (dy[missing] + (i % 2 == 0))) * 127)
    moved = np.stack(moved)
    fields, same = np.stack([bobs[i][missing] for i in (1, 3)]), np.stack([bobs[i][known] for i in (0, 4)])
    return Evidence(bobs[2][missing], bobs[2][known], fields, moved[:, missing], moved[:, known], same,
                    np.stack(places).astype(np.int8))


def _fine(pictures: Iterator[Picture], order: str, rate: str) -> Iterator[Picture]:
    """The network runs twice: on bwdif's pictures for drafts of the neighbouring fields, then with these for what is shown."""
    network = _network()
    for before, now, after in _neighbours(_drafted(pictures, order, rate, network)):
        near, drafts = ([*before[i], *now[i], *after[i]] for i in (0, 1))
        for k in (0, 1) if rate == "field" else (0,):
            top = (order == "tff") == (k == 0)
            luma = [near[k].y, drafts[k + 1], near[k + 2].y, drafts[k + 3], near[k + 4].y]
            flow = flows(luma)
            chroma = (filled([bob[i] for bob in near[k:k + 5]], flow, top, network) for i in (1, 2))
            yield Picture(filled(luma, flow, top, network), *chroma, near[k + 2].at_s)


def _drafted(pictures: Iterator[Picture], order: str, rate: str,
             network: Fill) -> Iterator[tuple[tuple[Picture, Picture], list[np.ndarray | None]]]:
    """bwdif's pictures of each two fields and drafts of their luma; none of first fields at frame rate, which does without."""
    bobs = _fast(pictures, order, "field")
    for before, now, after in _neighbours(zip(bobs, bobs, strict=True)):
        luma = [bob.y for bob in (*before, *now, *after)]
        wanted = (0, 1) if rate == "field" else (1,)
        yield now, [draft(luma[k:k + 5], (order == "tff") == (k == 0), network) if k in wanted else None for k in (0, 1)]


def draft(bobs: list[np.ndarray], top: bool, network: Fill) -> np.ndarray:
    """The middle one of bwdif's luma pictures of five fields with better lines, by rough motion."""
    return filled(bobs, flows(bobs, shrink=2), top, network)


def _neighbours(things: Iterator) -> Iterator[tuple]:
    """Each thing with the ones before and after it; at the ends with itself in their place."""
    before = now = next(things, None)
    for after in things:
        yield before, now, after
        before, now = now, after
    if now is not None:
        yield before, now, now


def filled(planes: list[np.ndarray], flow: list[np.ndarray], top: bool, network: Fill) -> np.ndarray:
    """The middle one of the planes of five fields [h w] with better lines where its field has none; top: it has lines 0, 2, ..."""
    h, w = planes[2].shape
    found = evidence([_even(plane) for plane in planes], flow, top)
    with torch.inference_mode():
        change = network(found.inputs()[None])[0].numpy() * np.float32(SCALE)
    lines = np.clip(np.rint(found.base + change), 0, 255).astype(np.uint8)
    out = planes[2].copy()
    out[1 if top else 0::2] = (lines if top else lines[::-1])[:(h + 1 - top) // 2, :w]
    return out


def _even(plane: np.ndarray) -> np.ndarray:
    """The plane, or where a side is odd the plane and a line or column more: the last but one once again, which is of its field."""
    h, w = plane.shape
    return np.pad(plane, [(0, h % 2), (0, w % 2)], "reflect") if h % 2 or w % 2 else plane


@cache
def _network() -> Fill:
    """The trained network. Raises ValueError when the file of its weights is missing."""
    if not WEIGHTS.exists():
        raise ValueError(f"{WEIGHTS} is missing; python -m data_tools.repair.train_fill makes it")
    return load(WEIGHTS)


def load(path: Path) -> Fill:
    """A network of the weights that `save` wrote; their shapes tell its size."""
    weights = load_file(path)
    net = Fill(len(weights["first.bias"]), 1 + sum(name.startswith("inner") for name in weights) // 2)
    net.load_state_dict(weights)
    return net.eval().to(memory_format=torch.channels_last)


# best

# Runs in the side-car's Python. Arguments: a file of raw planes, sides, chroma subsampling as powers of two, number of pictures,
# order; raw planes of twice as many pictures go to standard output. TWICE_REFINED is source match, POSTSMOOTH true lossless mode.
SIDECAR = """
import sys
import numpy as np
import vapoursynth as vs
from vsdeinterlace import QTempGaussMC

path, w, h, sub_w, sub_h, count, order = sys.argv[1], *map(int, sys.argv[2:7]), sys.argv[7]
shapes = [(h, w)] + [(h >> sub_h, w >> sub_w)] * 2
sizes = [a * b for a, b in shapes]
planes = np.memmap(path, np.uint8, "r").reshape(count, sum(sizes))
form = vs.core.query_video_format(vs.YUV, vs.INTEGER, 8, sub_w, sub_h)

def fill(n, f):
    out, start = f.copy(), 0
    for k, (shape, size) in enumerate(zip(shapes, sizes)):
        np.copyto(np.asarray(out[k]), planes[n, start:start + size].reshape(shape))
        start += size
    return out

blank = vs.core.std.BlankClip(None, w, h, form.id, length=count, fpsnum=25, fpsden=1, keep=True)
clip = blank.std.ModifyFrame(blank, fill).std.SetFieldBased(2 if order == "tff" else 1)
qtgmc = QTempGaussMC().source_match(mode=QTempGaussMC.SourceMatchMode.TWICE_REFINED)
clip = qtgmc.lossless(mode=QTempGaussMC.LosslessMode.POSTSMOOTH).bob(clip, tff=order == "tff")
for frame in clip.frames(close=True):
    for k in range(3):
        sys.stdout.buffer.write(np.asarray(frame[k]).tobytes())
"""


def sidecar() -> str:
    """The interpreter of grade best; ValueError when the environment names none."""
    name = os.environ.get("LATTE_QTGMC_PYTHON")
    if not name or shutil.which(name) is None:
        raise ValueError(f"grade 'best' runs QTGMC in a Python of its own: LATTE_QTGMC_PYTHON is {name!r} and should name the "
                         "interpreter of an environment with vapoursynth and vsjetpack[deinterlace]")
    return name


def _best(pictures: Iterator[Picture], order: str, rate: str, interpreter: str) -> Iterator[Picture]:
    """The run goes into a temporary file, as a VapourSynth script may ask for any picture at any time, and comes back by a pipe."""
    with tempfile.TemporaryDirectory() as folder:
        raw, errors = Path(folder) / "run.raw", Path(folder) / "errors.txt"
        times, shapes = _spooled(pictures, raw)
        if not times:
            return
        grown = _grown(shapes)
        sub_h, sub_w = (round(math.log2(a / b)) for a, b in zip(*grown[:2], strict=True))
        command = [interpreter, "-c", SIDECAR, raw, *map(str, (grown[0][1], grown[0][0], sub_w, sub_h, len(times), order))]
        with open(raw, "rb") as woven, open(errors, "wb") as log, \
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
            try:
                for i, at in enumerate(times):
                    step = times[i + 1] - at if i + 1 < len(times) else at - times[i - 1] if i else STEP_S
                    known = [_received(woven, shape, errors) for shape in grown]
                    for k in (0, 1):
                        planes = [_received(process.stdout, shape, errors) for shape in grown]
                        if k and rate == "frame":
                            continue
                        first = 0 if (order == "tff") == (k == 0) else 1
                        for plane, lines in zip(planes, known, strict=True):
                            plane[first::2] = lines[first::2]
                        yield Picture(*(plane[:h, :w] for plane, (h, w) in zip(planes, shapes, strict=True)), at + k * step / 2)
            finally:
                process.kill()


def _spooled(pictures: Iterator[Picture], raw: Path) -> tuple[list[float], list[tuple[int, int]]]:
    """Writes the planes of all pictures, grown to sides that the side-car takes; gives the times and the shapes of the planes."""
    times, shapes = [], []
    with open(raw, "wb") as file:
        for picture in pictures:
            shapes = [plane.shape for plane in picture[:3]]
            for plane, (h, w) in zip(picture[:3], _grown(shapes), strict=True):
                file.write(np.pad(plane, [(0, h - plane.shape[0]), (0, w - plane.shape[1])], "reflect"))
            times.append(picture.at_s)
    return times, shapes


def _grown(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The least sides of luma that two fields of halved chroma divide, and those of chroma as the subsampling then wants them."""
    luma = [-(-side // MULTIPLE) * MULTIPLE for side in shapes[0]]
    halved = [round(a / b) for a, b in zip(*shapes[:2], strict=True)]
    chroma = tuple(side // part for side, part in zip(luma, halved, strict=True))
    return [tuple(luma), chroma, chroma]


def _received(pipe, shape: tuple[int, int], errors: Path) -> np.ndarray:
    """The next plane of a stream. Raises ValueError with the side-car's last words when it has ended."""
    data = pipe.read(shape[0] * shape[1])
    if len(data) < shape[0] * shape[1]:
        said = errors.read_text(errors="replace").strip().splitlines()
        raise ValueError(f"the QTGMC side-car ended too early: {said[-1] if said else 'it said nothing'}")
    return np.frombuffer(bytearray(data), np.uint8).reshape(shape)

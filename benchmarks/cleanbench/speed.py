"""How long cleaning takes, and how it shares work between processes.

Times are of this machine at this moment: every figure is the median of runs that take turns.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path

from cleanbench.common import Bench, Row
from data_tools import degrade, film

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
    env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": ".", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", ONE, str(source), str(out), str(held_mib)], capture_output=True, text=True,
                          check=True, env=env)
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
            took = statistics.median(one["process_s"] for one in rounds)
            done = ", ".join(rounds[0]["edits"]) or "nothing done"
            rows.append(Row("speed", f"{seconds} s of 640x360 at 25, {name} ({done}), one core", "s", took, f"<= {seconds}", None,
                            len(rounds)))
        clips = folder / "clips"
        clips.mkdir()
        for i in range(8 if not bench.quick else 4):
            degrade.encode(degrade.weave(degrade.synth(i, 200 if bench.quick else 600, rate=50)), str(clips / f"{i}.mkv"), crf=20)
        walls: dict[int, list[float]] = {1: [], 2: []}
        for turn, workers in enumerate((2, 1) if bench.quick else (2, 1, 2)):
            before = time.monotonic()
            subprocess.run([sys.executable, "-m", "data_tools.clean", str(clips), "--out", str(folder / f"out{turn}"), "--workers",
                            str(workers)], check=True, capture_output=True)
            walls[workers].append(time.monotonic() - before)
        one, two = (statistics.median(walls[n]) for n in (1, 2))
        rows.append(Row("speed", "woven clips of 12 s, 2 workers", "times as quick as 1", one / two, ">= 1.8", None,
                        len(list(clips.iterdir()))))
    return rows

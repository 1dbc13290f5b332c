"""How long cleaning takes, how it shares work between processes, and that its memory does not grow with the film.

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
from pathlib import Path

from cleanbench.common import Bench, Row
from data_tools import degrade, film

ONE = """
import json, resource, sys, time
from pathlib import Path
import cv2, torch
from data_tools import clean, stage
cv2.setNumThreads(1); torch.set_num_threads(1)
before, wall = time.process_time(), time.monotonic()
with clean.cleaned(Path(sys.argv[1]), clean.Settings()) as (started, outcome):
    stage.finish(Path(sys.argv[1]), outcome, started, Path(sys.argv[2]), Path(sys.argv[2] + ".json"))
print(json.dumps({"process_s": time.process_time() - before, "wall_s": time.monotonic() - wall,
                  "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                  "edits": [edit.step for edit in outcome.edits]}))
"""


def film_of(seconds: int, path: Path, woven: bool) -> None:
    """A film of 640x360 at 25 pictures a second, scenes of 20 s, as it is or woven of twice as many pictures."""
    def pictures() -> Iterator[film.Picture]:
        for start in range(0, seconds, 20):
            clip = degrade.synth(start // 20 % 3, 1000 if woven else 500, rate=50 if woven else 25)
            for picture in film.from_clip(degrade.weave(clip) if woven else clip):
                yield picture._replace(at_s=picture.at_s + start)

    film.write(path, film.Film(film.Kind(width=640, height=360, rate=Fraction(25)), pictures), crf=20)


def run(source: Path, out: Path) -> dict:
    """Cleans one file in a fresh process on one thread."""
    done = subprocess.run([sys.executable, "-c", ONE, str(source), str(out)], capture_output=True, text=True, check=True,
                          env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": ".", "PATH": "/usr/bin:/bin"})
    return json.loads(done.stdout.splitlines()[-1])


def score(bench: Bench) -> list[Row]:
    seconds, long = (60, 600) if not bench.quick else (20, 40)
    rows = []
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        for woven in (False, True):
            name = "woven" if woven else "clean"
            film_of(seconds, folder / f"{name}.mp4", woven)
            rounds = [run(folder / f"{name}.mp4", folder / "out.mp4") for _ in range(1 if bench.quick else 3)]
            took = statistics.median(one["process_s"] for one in rounds)
            done = ", ".join(rounds[0]["edits"]) or "nothing done"
            rows.append(Row("speed", f"{seconds} s of 640x360 at 25, {name} ({done}), one core", "s", took, f"<= {seconds}", None,
                            len(rounds)))
        film_of(long, folder / "long.mp4", True)
        short_peak, long_peak = (run(folder / f"{name}.mp4", folder / "out.mp4")["peak_mib"] for name in ("woven", "long"))
        rows.append(Row("speed", f"woven film of {long} s against {seconds} s", "peak memory, ratio", long_peak / short_peak, "1",
                        {"MiB": long_peak}, 2))
        clips = folder / "clips"
        clips.mkdir()
        for i in range(8 if not bench.quick else 4):
            degrade.encode(degrade.weave(degrade.synth(i, 200, rate=50)), str(clips / f"{i}.mkv"), crf=20)
        walls: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(1 if bench.quick else 2):
            for workers in (1, 2):
                before = time.monotonic()
                subprocess.run([sys.executable, "-m", "data_tools.clean", str(clips), "--out", str(folder / f"out{workers}{turn}"),
                                "--workers", str(workers)], check=True, capture_output=True)
                walls[workers].append(time.monotonic() - before)
        one, two = (statistics.median(walls[n]) for n in (1, 2))
        rows.append(Row("speed", "woven clips of 4 s, 2 workers", "times as quick as 1", one / two, ">= 1.8", None,
                        len(list(clips.iterdir()))))
    return rows

"""Memory does not grow with the film: the peak of a process that cleans a film of ten minutes, beside one of a minute."""

import tempfile
from pathlib import Path

from cleanbench.common import Bench, Row
from cleanbench.speed import film_of, run

HEIGHT, HELD_MIB = 144, 20  # lines of the films; pictures kept: fewer than either film has, so that each stage decodes it again


def score(bench: Bench) -> list[Row]:
    short, long = (60, 600) if not bench.quick else (20, 40)
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for length in (short, long):
            film_of(length, Path(folder) / "in.mp4", woven=True, height=HEIGHT)
            peaks.append(run(Path(folder) / "in.mp4", Path(folder) / "out.mp4", HELD_MIB)["peak_mib"])
    return [Row("memory", f"woven film of {long} s against {short} s, {HEIGHT * 16 // 9}x{HEIGHT}, {HELD_MIB} MiB of pictures kept",
                "peak memory, ratio", peaks[1] / peaks[0], "<= 1.02", {"MiB": peaks[1], f"MiB at {short} s": peaks[0]}, 2)]

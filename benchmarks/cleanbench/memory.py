"""Memory does not grow with the film: the peak of a process that cleans a film of ten minutes, beside one of a minute."""

import tempfile
from pathlib import Path

from cleanbench.common import Bench, Row
from cleanbench.speed import film_of, run


def score(bench: Bench) -> list[Row]:
    short, long = (60, 600) if not bench.quick else (20, 40)
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for length in (short, long):  # more pictures than may be kept, so that the films are decoded again for each stage
            film_of(length, Path(folder) / "in.mp4", woven=True, height=180)
            peaks.append(run(Path(folder) / "in.mp4", Path(folder) / "out.mp4", held_mib=40)["peak_mib"])
    return [Row("memory", f"woven film of {long} s against {short} s, 320x180, 40 MiB of pictures kept", "peak memory, ratio",
                peaks[1] / peaks[0], "1", {"MiB": peaks[1]}, 2)]

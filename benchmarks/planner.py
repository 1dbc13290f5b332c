"""The planner against really allocated memory, and its plans for XL/2 on cards of five sizes.

    python benchmarks/planner.py [--predicted] [--out FILE.json]

measured   Two whole updates by train.py's own code on a CPU, with cached latents, clipping, AdamW, the average and the report; of
           what torch allocates from the start on, the most that is there at once, by the profiler's memory events. Beside it the
           plan's figure for the same config, which computes nothing.
predicted  Levers and peak that memory.auto chooses for Latte XL/2 from text at 128 frames in bf16 autocast, one clip a pass, for
           16 to 141 GiB, of uncompiled blocks. Predictions, as is their time, from assumed shares of an H200's data sheet whatever
           the capacity.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from latte import checkpoint, config, lora, memory, plan, trace
from latte.codec import VideoCodec
from latte.data import Batch
from latte.guard import Guard
from latte.health import Window
from latte.model import Latte
from latte.optim import EMA, make_optimizer

ROOT = Path(__file__).parent.parent
SMALL = ["model.layers=4", "model.heads=4", "model.head_dim=32", "model.in_channels=4", "model.out_channels=4",
         "model.patch_size=2", "text.max_tokens=20", "data.source=cache", "data.path=none", "preview.count=0"]
CLIPS = "stages=[{{frames: {}, height: {}, width: {}, batch_size: {}}}]"
BF16 = "train.mixed_precision=bf16"
MEASURED = {  # what it is: settings over configs/tiny.yaml; heights and widths are those of latents
    "plain, 16 frames": [CLIPS.format(16, 16, 16, 2)],
    "plain, 128 frames, bf16": [CLIPS.format(128, 16, 16, 1), BF16],
    "inputs only, 32 frames": [CLIPS.format(32, 16, 16, 2), "memory.activations=0"],
    "half, 64 frames, bf16": [CLIPS.format(64, 16, 16, 1), BF16, "memory.activations=0.5"],
    "tiles, 128 frames, bf16": [CLIPS.format(128, 16, 16, 1), BF16, "memory.tile_tokens=2048"],
    "quarter, MLP in 4, 32 frames": [CLIPS.format(32, 16, 16, 2), "memory.activations=0.25", "memory.mlp_chunks=4"],
    "offload, 32 frames, bf16": [CLIPS.format(32, 16, 16, 2), BF16, "memory.offload=true", "memory.activations=0"],
    "wide, 8-bit moments, bf16 weights": [CLIPS.format(4, 16, 16, 1), BF16, "model.heads=8", "model.head_dim=64",
                                          "memory.optimizer_states=int8", "memory.weights=bf16"],
    "wide, update in the backward pass": [CLIPS.format(4, 16, 16, 1), "model.heads=8", "model.head_dim=64", "optim.grad_clip=0",
                                          "memory.optimizer_in_backward=true", "memory.activations=0"],
    "adapters, 16 frames, bf16": [CLIPS.format(16, 16, 16, 2), BF16, "init.weights=none", "init.lora_rank=8"],
    "deterministic, 4 units, inputs only": [CLIPS.format(16, 16, 16, 4), "train.deterministic=true", "memory.activations=0"],
    "12 pairs, 2 micro-batches, bf16": [CLIPS.format(16, 16, 16, 4), BF16, "model.layers=12", "train.micro_batches=2"],
    "no text, learned variance, 3 images": [
        "stages=[{frames: 13, image_frames: 3, height: 16, width: 16, batch_size: 2}]", "model.conditioning=none",
        "model.modulation=block", "model.out_channels=8", "diffusion={kind: ddpm, prediction: eps, loss: eps}", BF16],
}


def load(settings: list[str]) -> config.Config:
    return config.load(ROOT / "configs" / "tiny.yaml", [*SMALL, *settings])


def allocated(cfg: config.Config) -> int:
    """Most bytes there at once during two updates of the config's first clip shape, of zeros, on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()  # what goes during the measurement must have come during it
    shape = cfg.stages[0].shapes[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        _updates(cfg, shape)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _updates(cfg: config.Config, shape: config.ShapeConfig) -> None:
    autocast = "no" if cfg.train.mixed_precision == "fp32" else cfg.train.mixed_precision
    accelerator = Accelerator(mixed_precision=autocast, cpu=True)
    raw = Latte(cfg.model)
    if cfg.init.lora_rank:
        lora.add(raw, cfg.init)
    optimizer, ema = make_optimizer(raw, cfg.optim, cfg.memory, cfg.seed), EMA(raw, cfg.optim.ema_decay, cfg.memory.ema)
    memory.apply(raw, cfg.memory)
    model = raw if cfg.train.deterministic else accelerator.prepare(raw)
    optimizer = accelerator.prepare(optimizer, device_placement=[False])
    run = train._Run(cfg, accelerator, raw, model, optimizer, ema, None, VideoCodec(cfg.codec), Guard(cfg.guard))
    window, size, rows = Window(accelerator.device, 1e12), shape.batch_size, 1 + shape.image_frames
    for step in range(2):
        x = torch.zeros(size, shape.frames + shape.image_frames, cfg.model.in_channels, shape.height, shape.width)
        states = [[torch.zeros(cfg.text.max_tokens, cfg.model.text_channels)] * rows for _ in range(size)]
        batch = Batch(step, 0, 0, list(range(size)), x, torch.full((size,), 8.0), [[""] * rows] * size, None, states)
        run.update(batch, True, window)
    run.close()


def planned(cfg: config.Config) -> int:
    """The plan's figure for the same."""
    shape = cfg.stages[0].shapes[0]
    clips = cfg.train.unit_clips if cfg.train.deterministic else shape.batch_size // cfg.train.micro_batches
    latents = (shape.frames + shape.image_frames, cfg.model.in_channels, shape.height, shape.width)
    cost = trace.update(cfg, latents, shape.image_frames, clips, shape.batch_size // clips, gpu=False)
    return plan.with_sums(cfg, cost, shape.batch_size // clips, 1)


def xl2(side: int, clip: bool) -> plan._Planner:
    """Of XL/2 at 128 frames of `side` pixels; its limit is still to be set."""
    cfg = config.from_dict({"data": {"source": "cache", "path": "none"}, "text": {"max_tokens": 120}, "model": {"out_channels": 4},
                            "train": {"mixed_precision": "bf16"}, "optim": {"grad_clip": float(clip)}, "memory": {"auto": True},
                            "stages": [{"frames": 128, "height": side // 8, "width": side // 8, "batch_size": 1}]})
    codec = VideoCodec(cfg.codec)
    codec.latent_shape = lambda frames, height, width: (frames, 4, height, width)  # sizes above are those of latents
    return plan._Planner(cfg, codec, torch.device("cpu"), 1, "H200")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "planner.json"))
    parser.add_argument("--predicted", action="store_true", help="predict alone; what was measured stays as it is in the file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if args.predicted:
        result = json.loads(Path(args.out).read_text())
    else:
        result = {"command": " ".join(["python", "benchmarks/planner.py", *sys.argv[1:]]), "commit": commit,
                  "versions": checkpoint.versions(), "measured": measure()}
    result |= {"predicted_commit": commit, "predicted": predict()}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(abs(row["error"]) <= 0.05 for row in result["measured"]) else 1


def measure() -> list[dict]:
    """The plan's figure beside what was allocated, a row a configuration."""
    measured = []
    print("| configuration | planned MiB | allocated MiB | error | traced in |\n|---|---|---|---|---|")
    for name, settings in MEASURED.items():
        cfg = load(settings)
        started = time.perf_counter()
        told = planned(cfg)
        seconds = time.perf_counter() - started
        real = allocated(cfg)
        measured.append({"configuration": name, "settings": settings, "planned": told, "allocated": real,
                         "error": round(told / real - 1, 5), "traced_seconds": round(seconds, 2)})
        print(f"| {name} | {told / 2**20:.1f} | {real / 2**20:.1f} | {told / real - 1:+.2%} | {seconds:.1f} s |", flush=True)
    return measured


def predict() -> list[dict]:
    """The levers that memory.auto chooses for XL/2, a row a capacity."""
    predicted = []
    print("\nPredictions, nothing measured:\n\n| XL/2, 128 frames | GiB | levers | peak GiB | s/update |\n|---|---|---|---|---|")
    for side in (256, 512):
        planners = {clip: xl2(side, clip) for clip in (True, False)}  # what was traced for one size serves the next
        for gib in (141, 80, 48, 24, 16):
            for clip, planner in planners.items():
                planner.limit = gib * 2**30
                started = time.perf_counter()
                found = plan._plan(planner)
                row = found.worst
                fits = row.peak <= plan.SURE * planner.limit
                predicted.append({"pixels": side, "gib": gib, "gradients clipped": clip, "levers": plan.told(found.memory),
                                  "fits": fits, "peak_gib": round(row.peak / 2**30, 2), "seconds": round(row.seconds, 2),
                                  "why": found.why, "planning_seconds": round(time.perf_counter() - started, 1)})
                name = f"{side}x{side}" + ("" if clip else ", grad_clip=0")
                levers = plan.told(found.memory) if fits else f"{plan.told(found.memory)}: {found.why}"
                print(f"| {name} | {gib} | {levers} | {row.peak / 2**30:.2f} | {row.seconds:.2f} |", flush=True)
                if fits:
                    break  # the update may wait for the whole gradient
    return predicted


if __name__ == "__main__":
    sys.exit(main())

"""Speed of one training step of Latte (forward, backward, AdamW, EMA) on random latents.

    python benchmarks/train_step.py [--preset xl|small|tiny] [--frames 128] [--size 256] [--batch 1] [--compile] [--checkpointing]

Counts matrix products by latte.model.flops (backward = 2 forwards; recomputation is not counted as work) and writes one JSON
with medians, spread, peak memory, commit, hardware and versions. Presets: xl is Latte-1's shape, tiny is for trying this on a CPU.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from latte import checkpoint
from latte.config import ModelConfig, OptimConfig
from latte.memory import checkpoint_blocks
from latte.model import Latte, flops
from latte.optim import EMA, make_optimizer

ROOT = Path(__file__).parent.parent
PRESETS = {
    "xl": dict(layers=28, heads=16, head_dim=72, text_channels=4096, sample_size=64),
    "small": dict(layers=12, heads=6, head_dim=64, text_channels=4096, sample_size=64),
    "tiny": dict(layers=2, heads=2, head_dim=32, text_channels=384, sample_size=64),
}
TEXT_TOKENS = 120


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="pixels; latents have an eighth of it")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="recompute every block in the backward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out")
    args = parser.parse_args()

    cfg, device = ModelConfig(**PRESETS[args.preset]), torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = Latte(cfg).to(device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    optimizer, ema = make_optimizer(model, OptimConfig()), EMA(model, 0.999)
    if args.checkpointing:
        checkpoint_blocks(model)
    if args.compile:
        for block in [*model.spatial, *model.temporal]:
            block.compile()
    side = args.size // 8
    x = torch.randn(args.batch, args.frames, cfg.in_channels, side, side, device=device)
    text = torch.randn(args.batch, TEXT_TOKENS, cfg.text_channels, device=device)
    mask = torch.ones(args.batch, TEXT_TOKENS, device=device)
    t = torch.full((args.batch,), 500.0, device=device)

    seconds = []
    for step in range(args.steps + 2):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            out = model(x, t, text, mask)
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model, step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    seconds = seconds[2:]  # the first two warm up and compile
    work = 3 * args.batch * flops(cfg, args.frames, side, side, TEXT_TOKENS)
    median = statistics.median(seconds)
    tokens = args.batch * args.frames * (side // cfg.patch_size) ** 2
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result = {
        "command": " ".join(["python", "benchmarks/train_step.py", *sys.argv[1:]]), "commit": commit,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(), "versions": checkpoint.versions(),
        "seconds_median": median, "seconds": [round(s, 4) for s in seconds],
        "tokens_per_s": tokens / median, "tflop_per_step": work / 1e12, "tflop_per_s": work / 1e12 / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    text_out = json.dumps(result, indent=1)
    print(text_out)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text_out + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

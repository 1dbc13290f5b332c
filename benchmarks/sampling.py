"""Time, memory and work of one clip of 16 seconds (128 frames), by the number of sampling steps: this model, plain and in tiles,
and diffusers' transformer with the same weights under the same sampler.

    python benchmarks/sampling.py [--preset tiny|S|M2|L|XL] [--frames 128] [--size 64] [--steps 4 10 25] [--sampler ddim]
        [--guidance 7.5] [--tile-tokens 4096] [--dtype fp32|bf16] [--compile] [--alone] [--rounds 3] [--out FILE.json]

Latents only: text encoder and VAE are left out. With guidance each step calls the model once on two clips. The arms take turns,
in reversed order from round to round; told are medians with ranges, and the ratios reference : arm of the rounds. Peak is what
sampling takes beyond weights: on a CPU the most that torch's profiler saw allocated, on a GPU max_memory_allocated. Work is that of
latte.model.flops. --compile compiles the blocks of the reference and of the plain arm.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import peer
from latte import memory
from latte.config import DiffusionConfig, MemoryConfig, ModelConfig, SamplerConfig
from latte.model import flops
from latte.sampler import guidance, sample

DIFFUSION = DiffusionConfig(kind="ddpm", prediction="eps", loss="eps")


def arms(args: argparse.Namespace, cfg: ModelConfig) -> dict[str, torch.nn.Module]:
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    plain = peer.ours(cfg, args.device, dtype)
    reference = None if args.alone else peer.theirs(plain, args.frames)
    tiled = peer.ours(cfg, args.device, dtype)
    if args.compile:
        for model in (plain, reference):
            for block in peer.blocks(model) if model else []:
                block.compile()
    memory.apply(tiled, MemoryConfig(tile_tokens=args.tile_tokens))
    found = {"peer": reference, "plain": plain, f"tiles of {args.tile_tokens}": tiled}
    return {name: model.eval() for name, model in found.items() if model is not None}


def clip(model: torch.nn.Module, args: argparse.Namespace, cfg: ModelConfig, steps: int) -> Tensor:
    """Latents [1 f c h w] after so many steps."""
    noise, _, text = peer.inputs(cfg, args.frames, args.size // 8, 1, args.device)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32

    def model_fn(x, t, cond):
        return peer.call(model, x.to(dtype), t, cond["text"])

    guided = guidance(model_fn, {"text": torch.zeros_like(text, dtype=dtype)}, args.guidance)
    tokens = args.frames * (args.size // 8 // cfg.patch_size) ** 2
    return sample(guided, noise, {"text": text.to(dtype)}, DIFFUSION, SamplerConfig(name=args.sampler, steps=steps), tokens)


def timed(run: Callable[[], Tensor], device: str) -> float:
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak(run: Callable[[], Tensor], device: str) -> int:
    """Bytes beyond what is there before."""
    if device == "cpu":
        return peer.allocated_peak(run)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=peer.PRESETS, default="tiny")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--size", type=int, default=64, help="pixels; latents have an eighth of it")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 10, 25])
    parser.add_argument("--sampler", choices=["euler", "heun", "ddim", "dpmpp_2m"], default="ddim")
    parser.add_argument("--guidance", type=float, default=7.5, help="1 = none")
    parser.add_argument("--tile-tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--alone", action="store_true", help="without the reference")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=str(peer.ROOT / "benchmarks" / "results" / "sampling.json"))
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    cfg, side = ModelConfig(**peer.PRESETS[args.preset]), args.size // 8
    calls = {"heun": 2}.get(args.sampler, 1)
    models = arms(args, cfg)
    first = next(iter(models))
    peaks, differences, expected = {}, {}, None
    for name, model in models.items():
        out = clip(model, args, cfg, 2)  # warms up, compiles
        peaks[name] = peak(lambda model=model: clip(model, args, cfg, 1), args.device)
        expected = out if expected is None else expected
        differences[name] = ((out - expected).abs().max() / expected.abs().max()).item()
    result, rows = {}, []
    for steps in args.steps:
        taken: dict[str, list[float]] = {name: [] for name in models}
        for number in range(args.rounds):
            for name in list(models)[::1 if number % 2 else -1]:
                taken[name].append(timed(lambda name=name, steps=steps: clip(models[name], args, cfg, steps), args.device))
        evaluations = steps * calls - (calls - 1)  # heun's last step is one of euler
        work = evaluations * (2 if args.guidance != 1 else 1) * flops(cfg, args.frames, side, side, peer.TEXT_TOKENS)
        for name in models:
            row = {"steps": steps, "arm": name, "seconds": peer.spread(taken[name]), "peak_mib": round(peaks[name] / 2**20, 1),
                   "tflop": round(work / 1e12, 4), "tflop_per_s": round(work / 1e12 / statistics.median(taken[name]), 3)}
            if "peer" in models and name != "peer":
                row["ratio peer : arm"] = peer.spread([a / b for a, b in zip(taken["peer"], taken[name], strict=True)])
            result[f"{steps} steps, {name}"] = row
            ratio = peer.told(row["ratio peer : arm"]) if "ratio peer : arm" in row else ""
            rows.append([f"{steps} steps, {name}", peer.told(row["seconds"]), ratio,
                         *(row[key] for key in ("peak_mib", "tflop", "tflop_per_s"))])
    notes = [] if "peer" in models or args.alone else ["diffusers is not installed: this model alone"]
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    peer.write(args.out, {**peer.facts(), "settings": settings, "notes": notes,
                          f"largest relative difference from {first} after 2 steps": differences, "clips": result})
    print(peer.table(["one clip", "seconds", "peer : arm", "peak MiB", "TFLOP", "TFLOP/s"], rows), *notes, sep="\n")
    print(f"largest relative difference from {first} after 2 steps: "
          + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

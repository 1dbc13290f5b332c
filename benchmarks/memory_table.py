"""What each memory lever saves: the most memory of a whole training update, beside what the planner foretells for it.

    python benchmarks/memory_table.py [--preset tiny|S|M2|L|XL] [--frames 16 128] [--sizes 256 512] [--cap-gib 24]
        [--levers memory.key=value,memory.key=value ...] [--no-tiny] [--again] [--out FILE.json]

The update is train.py's on zeros: loss, backward pass, norm of the gradient, AdamW, average and report, of one clip and uncompiled.
The peak counts weights and all: on a CPU the most that torch's profiler saw allocated, on a GPU max_memory_allocated of the second
update. --cap-gib bounds what the process may allocate on a GPU. The prediction is latte.trace.update's. Without a GPU the shapes
are small, unless --no-tiny. Lines that the JSON already holds are not run again without --again, as long as preset, precision,
device and cap are the same. A line that does not fit says so.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import peer
from latte import checkpoint, config, diffusion, hardware, memory, optim, trace
from latte.health import Step
from latte.model import Latte

# every lever alone, then together: from what costs least to what saves most
LEVERS = [
    "",
    "memory.activations=0.5", "memory.activations=0", "memory.offload=true", "memory.tile_tokens=8192", "memory.mlp_chunks=8",
    "memory.ema=host", "memory.optimizer_in_backward=true", "memory.optimizer_states=bf16", "memory.optimizer_states=int8",
    "memory.weights=bf16",
    "memory.activations=0,memory.mlp_chunks=8", "memory.activations=0,memory.offload=true",
    "memory.tile_tokens=8192,memory.offload=true,memory.ema=host",
    "memory.tile_tokens=8192,memory.offload=true,memory.ema=host,memory.optimizer_in_backward=true",
    "memory.tile_tokens=8192,memory.offload=true,memory.ema=host,memory.optimizer_in_backward=true,memory.optimizer_states=int8,"
    "memory.weights=bf16",
]
TINY = {"frames": [4, 16], "sizes": [64, 128], "tile": "memory.tile_tokens=64"}


def run_config(preset: str, levers: str, frames: int, size: int, precision: str) -> config.Config:
    """A run of one clip a pass with these levers; the norm of the gradient is not clipped, which one lever could not do."""
    return config.from_dict(
        {"model": {**peer.PRESETS[preset], "out_channels": 4}, "optim": {"grad_clip": 0.0}, "train": {"mixed_precision": precision},
         "text": {"max_tokens": peer.TEXT_TOKENS}, "stages": [{"frames": frames, "height": size, "width": size, "batch_size": 1}]},
        [part for part in levers.split(",") if part])


def latents(cfg: config.Config) -> tuple[int, int, int, int]:
    shape = cfg.stages[0]
    return shape.frames, cfg.model.in_channels, shape.height // 8, shape.width // 8


def predicted(cfg: config.Config, device: str) -> tuple[int, int]:
    """Bytes that the planner foretells: the most at once, and those that go to the host during an update."""
    cost = trace.update(cfg, latents(cfg), 0, 1, 1, gpu=device != "cpu")
    return cost.peak, int(cost.sent / 2)


def updates(cfg: config.Config, device: str) -> Callable[[], None]:
    """A run like train.py's at the size of one clip, on zeros: call it for an update with the report of it."""
    with torch.device(device):
        model = Latte(cfg.model)
        x, text = torch.zeros(1, *latents(cfg)), torch.zeros(1, cfg.text.max_tokens, cfg.model.text_channels)
        cond = {"text": text, "text_mask": torch.ones(text.shape[:2])}
        noise, times = torch.zeros_like(x), torch.full((1,), 0.5)
    optimizer = optim.make_optimizer(model, cfg.optim, cfg.memory)
    ema, trained = optim.EMA(model, cfg.optim.ema_decay, cfg.memory.ema), checkpoint.trained(model)
    early = optim.InBackward(model, optimizer) if cfg.memory.optimizer_in_backward else None
    memory.apply(model, cfg.memory)

    def model_fn(x, t, cond):
        with torch.autocast(device, torch.bfloat16, enabled=cfg.train.mixed_precision == "bf16"):
            return model(x, t, **cond).float()

    def update() -> None:
        loss = diffusion.training_loss(model_fn, x, cond, noise, times, cfg.diffusion).loss.sum()
        ema.wait()
        if early:
            early.begin(loss, measure=True)
        loss.backward()
        if not early:
            norm = torch.stack(torch._foreach_norm([p.grad for p in trained.values()])).norm()
            move = Step(trained)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = norm.isfinite()
        else:
            done = loss.isfinite()
        ema.update(model, 0, done)
        if not early:
            move.ratios()

    return update


def measured(cfg: config.Config, device: str) -> dict:
    """Bytes that a run's second update takes at most, with all that is there before it, and its seconds on a GPU."""
    if device == "cpu":
        def twice():
            update = updates(cfg, device)
            update()
            update()
        return {"bytes": peer.allocated_peak(twice)}
    torch.cuda.empty_cache()
    update = updates(cfg, device)
    update()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    update()
    torch.cuda.synchronize()
    return {"bytes": torch.cuda.max_memory_allocated(), "seconds": round(time.perf_counter() - started, 4)}


def line(cfg: config.Config, device: str) -> dict:
    """One line of the table; `failed` says why there is none."""
    gc.collect()
    foretold, sent = predicted(cfg, device)
    on_host, room = foretold if device == "cpu" else sent, hardware.available(torch.device("cpu"))
    if on_host > room:  # no error would come: the process would be killed
        return {"predicted": foretold, "failed": f"{on_host / 2**30:.1f} GiB foretold in host memory, {room / 2**30:.1f} free"}
    try:
        row = measured(cfg, device)
    except torch.OutOfMemoryError:
        return {"predicted": foretold, "failed": f"out of memory, {foretold / 2**30:.1f} GiB foretold"}
    return {**row, "predicted": foretold, "error": round(foretold / row["bytes"] - 1, 5)}


def summary(rows: dict[str, dict], lines: list[tuple[str, int, int]]) -> str:
    """One markdown table: memory measured and foretold, by levers and clip shape."""
    shapes = list(dict.fromkeys((frames, size) for _, frames, size in lines))
    table, (name, unit) = [], ("GiB", 2**30) if any(row["predicted"] > 2**30 for row in rows.values()) else ("MiB", 2**20)
    for levers in dict.fromkeys(levers for levers, *_ in lines):
        cells = []
        for frames, size in shapes:
            row = rows.get(key(levers, frames, size), {})
            seconds = f", {row['seconds']:.3g} s" if "seconds" in row else ""
            cells.append(row.get("failed") or (
                f"{row['bytes'] / unit:.4g} / {row['predicted'] / unit:.4g} ({row['error']:+.1%}){seconds}" if row else ""))
        table.append([levers.replace("memory.", "").replace(",", " ") or "none", *cells])
    return peer.table([f"{name} measured / foretold", *(f"{frames} frames, {size} px" for frames, size in shapes)], table)


def key(levers: str, frames: int, size: int) -> str:
    return f"{frames} frames, {size} pixels, {levers or 'no lever'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--preset", choices=peer.PRESETS, default="XL" if on_gpu else "tiny")
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="pixels; latents have an eighth of it")
    parser.add_argument("--levers", nargs="+", default=LEVERS, metavar="memory.x=y,memory.z=w")
    parser.add_argument("--tiny", action=argparse.BooleanOptionalAction, default=not on_gpu,
                        help=f"frames {TINY['frames']} and pixels {TINY['sizes']}; the default without a GPU")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="bf16: autocast")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--cap-gib", type=float, default=0.0, help="on a GPU, let a process have no more than so much; 0 = all")
    parser.add_argument("--again", action="store_true", help="measure lines again that the JSON already holds")
    parser.add_argument("--out", default=str(peer.ROOT / "benchmarks" / "results" / "memory_table.json"))
    args = parser.parse_args()
    if args.cap_gib and args.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(args.cap_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    frames, sizes, levers = args.frames, args.sizes, args.levers
    if args.tiny:
        frames, sizes = TINY["frames"], TINY["sizes"]
        levers = [text.replace("memory.tile_tokens=8192", TINY["tile"]) for text in levers]
    lines = [(text, f, size) for f in frames for size in sizes for text in levers]
    out, same = Path(args.out), {"preset": args.preset, "precision": args.precision, "device": args.device, "cap_gib": args.cap_gib}
    rows = {}
    if out.is_file() and not args.again:
        old = json.loads(out.read_text())
        rows = old["lines"] if {name: old.get(name) for name in same} == same else {}
    for text, f, size in lines:
        if key(text, f, size) not in rows:
            rows[key(text, f, size)] = line(run_config(args.preset, text, f, size, args.precision), args.device)
            peer.write(out, {**peer.facts(), **same, "lines": rows})  # after every line: a job may be stopped
    print(summary(rows, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

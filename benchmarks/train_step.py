"""Time and memory of a step: this model and diffusers' LatteTransformer3DModel with the same weights, taking turns in one process.

    python benchmarks/train_step.py [--preset tiny|S|M2|L|XL] [--frames 16] [--size 64] [--batch 1] [--dtype fp32|autocast|bf16]
        [--mode train|forward] [--checkpointing] [--compile] [--peer eager-checkpointed] [--cap-gib 16] [--rounds 5]
        [memory.key=value ...]

forward: one pass without gradients. train: forward, backward, AdamW and the average of the weights, in both models by this
project's optimizer. --checkpointing recomputes every block of both, --compile compiles the blocks of both, unless --peer says
otherwise for the reference; none leaves it out, as do machines without diffusers. memory.key=value is for this model alone. The
order is reversed from round to round. Told are medians, and the median and range of the rounds' ratios reference : ours, in
wall-clock and, on a CPU, in process time; on a GPU, CUDA events time each step.

Memory on a CPU is measured in a process of each model's own, where Linux tells the most resident memory since a moment: what a
step takes beyond inputs, weights, moments and average; then the same by the allocations that torch's profiler saw. On a GPU it
is max_memory_allocated from before the model is made, so with weights and all. --cap-gib bounds what it may be.

Work is counted by latte.model.flops, a training step as three forward passes whatever is recomputed; its share of the peak is
that of latte.hardware.peak_flops. Weights are bf16 with --dtype bf16, and float32 under autocast to bf16 with --dtype autocast.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._functorch import config as compiler

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import peer
from latte import hardware, memory, parallel
from latte.config import MemoryConfig, ModelConfig, OptimConfig
from latte.model import Latte, flops
from latte.optim import EMA, InBackward, make_optimizer


class Arm:
    """One model that makes one step after another."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, given: tuple[Tensor, Tensor, Tensor]):
        mine = isinstance(model, Latte)
        levers = peer.memory(",".join(args.overrides)) if mine else MemoryConfig()
        if args.dtype == "bf16":
            levers = replace(levers, weights="bf16")
        same = mine or args.peer == "same"
        compiled = args.compile if same else "compiled" in args.peer
        if args.checkpointing if same else "checkpointed" in args.peer:
            levers = replace(levers, activations=0.0)
        self.model, self.given, self.args, self.number = model, given, args, 0
        if args.mode == "train":
            self.optimizer = make_optimizer(model, OptimConfig(), levers)
            self.ema = EMA(model, 0.999, levers.ema)
            self.early = InBackward(model, self.optimizer) if levers.optimizer_in_backward else None
        elif levers.weights == "bf16":
            model.to(torch.bfloat16)
        compiler.activation_memory_budget = 1.0  # what one model's compilation sets must not bind the other's
        if compiled and mine and args.mode == "train":
            levers = parallel.compile_blocks(model, levers)
        elif compiled:
            for block in peer.blocks(model):
                block.compile()
        if mine:
            memory.apply(model, levers)
        elif levers.activations == 0:
            model.enable_gradient_checkpointing()

    def __call__(self) -> None:
        autocast = torch.autocast(self.given[0].device.type, torch.bfloat16, enabled=self.args.dtype == "autocast")
        if self.args.mode == "forward":
            with torch.no_grad(), autocast:
                peer.call(self.model, *self.given)
            return
        with autocast:
            out = peer.call(self.model, *self.given)
        loss = out.float().square().mean()
        self.ema.wait()
        if self.early:
            self.early.begin(loss, measure=False)
        loss.backward()
        if not self.early:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, self.number, loss.new_ones(()))
        self.number += 1

    def timed(self) -> dict[str, float]:
        """Seconds of one step by the clock, of the process and, on a GPU, between two events on it, where a step before it gives
        the allocator back what the other model made it take."""
        on_gpu = self.given[0].is_cuda
        if on_gpu:
            self()
            torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        wall, process = time.perf_counter(), time.process_time()
        if on_gpu:
            marks[0].record()
        self()
        if on_gpu:
            marks[1].record()
            torch.cuda.synchronize()
        taken = {"wall": time.perf_counter() - wall, "process": time.process_time() - process}
        return {**taken, "gpu": marks[0].elapsed_time(marks[1]) / 1000} if on_gpu else taken


def settings(args: argparse.Namespace) -> tuple[ModelConfig, tuple[Tensor, Tensor, Tensor]]:
    cfg, dtype = ModelConfig(**peer.PRESETS[args.preset]), torch.bfloat16 if args.dtype == "bf16" else torch.float32
    return cfg, peer.inputs(cfg, args.frames, args.size // 8, args.batch, args.device, dtype)


def make(name: str, cfg: ModelConfig, args: argparse.Namespace, given: tuple[Tensor, Tensor, Tensor]) -> Arm | None:
    """An arm, or None for a reference that is not installed."""
    model = peer.ours(cfg, args.device)
    if name == "peer":
        model = peer.theirs(model, args.frames)
    return model and Arm(model, args, given)


def resident(key: str) -> int:
    """Bytes of this process's resident memory, now (VmRSS) or at most (VmHWM)."""
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def memory_on_cpu(name: str, args: argparse.Namespace) -> dict:
    """In a process of its own: what a step takes."""
    cfg, given = settings(args)
    arm = make(name, cfg, args, given)
    arm()
    found = {}
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is there now
        before = resident("VmRSS")
        arm()
        most = resident("VmHWM")
        found = {"resident_mib": round(most / 2**20, 1), "resident_over_start_mib": round((most - before) / 2**20, 1)}
    except OSError:
        pass  # no Linux: the allocations alone
    return {**found, "allocated_over_start_mib": round(peer.allocated_peak(arm) / 2**20, 1)}


def memory_in_a_child(name: str) -> dict:
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--memory-of", name], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr.strip().splitlines()[-1:]}


def compare(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """Everything measured, and what there is to say beside the numbers."""
    cfg, given = settings(args)
    on_gpu, notes, arms, found = given[0].is_cuda, [], {}, {}
    for name in ("ours",) if args.peer == "none" else ("ours", "peer"):
        gc.collect()
        before = 0
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        arm = None
        try:
            arm = make(name, cfg, args, given)
            if arm is None:
                notes.append("diffusers is not installed: this model alone")
                continue
            started = time.perf_counter()
            arm()
            if on_gpu:
                torch.cuda.synchronize()
            found[name] = {"first_step_s": round(time.perf_counter() - started, 2)}
            arm()
            arms[name] = arm
        except torch.OutOfMemoryError as error:
            notes.append(f"{name}: out of memory ({str(error).splitlines()[0][:160]})")
            found[name], arm = {"out_of_memory": True}, None
            continue
        if on_gpu:
            found[name]["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
        else:
            found[name].update(memory_in_a_child(name))
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for number in range(args.rounds):
        for name in list(arms)[::1 if number % 2 else -1]:
            taken[name].append(arms[name].timed())
    side = args.size // 8
    work = (3 if args.mode == "train" else 1) * args.batch * flops(cfg, args.frames, side, side, peer.TEXT_TOKENS)
    tokens = args.batch * args.frames * (side // cfg.patch_size) ** 2
    peak = hardware.peak_flops(given[0].device, torch.float32 if args.dtype == "fp32" else torch.bfloat16)
    clock = "gpu" if on_gpu else "wall"
    for name in arms:
        for kind in taken[name][0]:
            found[name][f"{kind}_s"] = peer.spread([one[kind] for one in taken[name]])
        median = found[name][f"{clock}_s"]["median"]
        found[name] |= {"tflop_per_s": round(work / median / 1e12, 3), "share_of_peak": round(work / median / peak, 4),
                        "tokens_per_s": round(tokens / median, 1)}
    if len(arms) == 2:
        found["ratio peer : ours"] = {kind: peer.spread([theirs[kind] / ours[kind] for theirs, ours in zip(
            taken["peer"], taken["ours"], strict=True)]) for kind in taken["ours"][0]}
    return {"tflop": work / 1e12, "tokens": tokens, "peak_tflop_per_s": round(peak / 1e12, 2), **found}, notes


def summary(result: dict, args: argparse.Namespace) -> str:
    """One markdown table."""
    names = [name for name in ("peer", "ours") if name in result]
    rows = []
    for key in dict.fromkeys(key for name in names for key in result[name]):
        values = [result[name].get(key, "") for name in names]
        rows.append([key, *(peer.told(v) if isinstance(v, dict) else v for v in values), ""])
        kind = key.removesuffix("_s")
        if kind in result.get("ratio peer : ours", {}):
            rows[-1][-1] = peer.told(result["ratio peer : ours"][kind])
        elif len(names) == 2 and "over_start" in key and all(isinstance(v, float) and v for v in values):
            rows[-1][-1] = round(values[0] / values[1], 3)
    title = f"{args.preset}, {args.frames} frames, {args.size} pixels, {args.mode}, {args.dtype}"
    return peer.table([title, *names, "peer : ours"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=peer.PRESETS, default="tiny")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="pixels; latents have an eighth of it")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mode", choices=["train", "forward"], default="train")
    parser.add_argument("--dtype", choices=["fp32", "autocast", "bf16"], default="fp32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute every block in the backward pass")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--peer", default="same", help="how the reference runs, if at all and not as this model does",
                        choices=["same", "none", "eager", "compiled", "eager-checkpointed", "compiled-checkpointed"])
    parser.add_argument("--cap-gib", type=float, default=0.0, help="on a GPU, let this process have no more than so much; 0 = all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--out", default="")
    parser.add_argument("overrides", nargs="*", metavar="memory.key=value")
    args = parser.parse_intermixed_args()
    try:
        peer.memory(",".join(args.overrides))
    except ValueError as error:
        parser.error(str(error))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.memory_of:
        print(json.dumps(memory_on_cpu(args.memory_of, args)))
        return 0
    if args.cap_gib and args.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(args.cap_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    result, notes = compare(args)
    result = {**peer.facts(), "settings": {key: value for key, value in vars(args).items() if key not in ("out", "memory_of")},
              "notes": notes, **result}
    print(summary(result, args), *notes, sep="\n")
    if args.out:
        peer.write(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

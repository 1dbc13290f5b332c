"""Saving memory from outside a finished model, without changing its numbers, and telling what memory something will take."""

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from latte.config import MemoryConfig, ModelConfig
from latte.model import Latte

# dense bfloat16 operations a second, of the vendor's data sheets; longer names first
DENSE_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
               "RTX 4090": 165e12, "RTX 3090": 71e12, "A10": 125e12}


def apply(model: Latte, cfg: MemoryConfig) -> None:
    """Keeps only the input of each block for the backward pass and computes the block again there (Chen et al., arXiv 1604.06174).

    Of a layer pair, 2 * width values a token stay instead of about 43 * width, for a third more arithmetic.
    """
    if cfg.activations == 1:
        return
    for block in [*model.spatial, *model.temporal]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def training_peak(cfg: ModelConfig, frames: int, height: int, width: int, clips: int, text_tokens: int, autocast: bool,
                  checkpointed: bool, trained: int) -> int:
    """Most bytes that a training step on `clips` latents [f c h w] takes at once: weights, gradients, activations, and of `trained`
    parameters the two moments and the average. Nothing is computed and no memory taken.

    Traced on fake tensors with one and with two layer pairs, between which memory grows by the same amount for each further pair.
    On a CPU it is the profiler's count to the byte without block checkpointing, and up to an eighth above it with.
    """
    def traced(layers: int) -> int:
        def make():
            model = Latte(replace(cfg, layers=layers))
            if checkpointed:
                apply(model, MemoryConfig(activations=0))
            x, t = torch.zeros(clips, frames, cfg.in_channels, height, width), torch.zeros(clips)
            given = {"text": torch.zeros(clips, text_tokens, cfg.text_channels)} if cfg.conditioning == "text" else {}

            def run():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    y = model(x, t, **given)
                y.float().square().mean().backward()

            return run, (model, x, t, *given.values())

        return peak(make, torch.float32, backward=True)

    one, two = traced(1), traced(2)
    return one + (cfg.layers - 1) * (two - one) + 12 * trained


def pair_seconds(cfg: ModelConfig, frames: int, height: int, width: int, clips: list[int], text_tokens: int, device: torch.device,
                 dtype: torch.dtype) -> list[float]:
    """Seconds of a forward and backward pass of one layer pair on so many latents [f c h w], for each number in `clips`: the best
    of four, taken by turns.

    Of clips larger than 8192 tokens in all, only so many frames are timed, and the time scaled up.
    """
    timed = max(1, min(frames, 8192 // (height * width // cfg.patch_size**2 * max(clips))))
    model = Latte(replace(cfg, layers=1)).to(device)
    best, words = [math.inf] * len(clips), [text_tokens, cfg.text_channels]
    for _ in range(4):
        for index, number in enumerate(clips):
            x, t = torch.zeros(number, timed, cfg.in_channels, height, width, device=device), torch.zeros(number, device=device)
            given = {"text": torch.zeros(number, *words, device=device)} if cfg.conditioning == "text" else {}
            started = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                y = model(x, t, **given)
            y.float().square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[index] = min(best[index], (time.perf_counter() - started) * frames / timed)
    return best


def available(device: torch.device) -> int:
    """Bytes of memory that a new process can have on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    facts = Path("/proc/meminfo")
    if facts.is_file():  # counts what the file cache would give back
        limits = [int(line.split()[1]) * 1024 for line in facts.read_text().splitlines() if line.startswith("MemAvailable")]
    bound, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if bound.is_file() and used.is_file() and bound.read_text().strip().isdigit():
        facts = Path("/sys/fs/cgroup/memory.stat")
        cached = dict(line.split() for line in facts.read_text().splitlines()) if facts.is_file() else {}
        files = int(cached.get("inactive_file", 0)) + int(cached.get("active_file", 0))
        limits.append(int(bound.read_text()) - int(used.read_text()) + files)
    return min(limits)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on this device: what model FLOPs utilisation is a share of.

    The vendor's dense figure where the device's name tells it, else the best of a few products of 1024 x 1024 matrices.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [rates for part, rates in DENSE_FLOPS.items() if part in name]
    if known:
        return known[0] if dtype != torch.float32 else known[0] / 2  # TF32
    a = torch.ones(1024, 1024, dtype=dtype, device=device)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(seconds)


def peak(make: Callable[[], tuple[Callable[[], object], Iterable]], dtype: torch.dtype, backward: bool = False) -> int:
    """Most bytes alive while a function runs, without gradients unless `backward`. Nothing is computed and no memory taken: tensors
    are fake.

    make() returns the function and the modules and tensors that are there before it runs; what it makes is of `dtype` where
    nothing else is asked for. Attention counts as a CPU runs it; fused kernels of a GPU need no more.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(backward):
            run, held = make()
            tracker = MemTracker()
            tracker.track_external(*held)
            with tracker:
                run()
            return max(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    finally:
        torch.set_default_dtype(before)

"""What the device at hand has to give: free memory and speed."""

import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from latte.config import ModelConfig
from latte.model import Latte

# dense bfloat16 operations a second, of the vendor's data sheets; longer names first
DENSE_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
               "RTX 4090": 165e12, "RTX 3090": 71e12, "A10": 125e12}


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

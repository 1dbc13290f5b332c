"""What the device at hand has to give: free memory and speed."""

import math
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from latte.config import ModelConfig
from latte.model import Latte


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet."""

    gib: float  # of memory
    flops: float  # dense bfloat16 operations a second
    memory: float  # bytes a second
    link: float  # bytes a second to or from the host


CARDS = {
    "H200": Card(140, 989e12, 4.8e12, 50e9), "H100 PCIe": Card(79, 756e12, 2.0e12, 50e9), "H100": Card(79, 989e12, 3.35e12, 50e9),
    "B200": Card(179, 2250e12, 8.0e12, 50e9), "A100": Card(79, 312e12, 2.0e12, 25e9),
    "A100 40GB": Card(39, 312e12, 1.55e12, 25e9), "L40S": Card(45, 362e12, 0.86e12, 25e9),
    "L4": Card(22, 121e12, 0.3e12, 25e9), "RTX 4090": Card(24, 165e12, 1.0e12, 25e9), "RTX 4080": Card(16, 97e12, 0.72e12, 25e9),
    "RTX 3090": Card(24, 71e12, 0.94e12, 25e9), "A10": Card(22, 125e12, 0.6e12, 25e9)}
BESIDE = {"nvidia", "geforce", "gpu", "sxm4", "sxm5", "pcie", "hbm3", "80gb"}  # words of devices' names that change no figure
REACHED = 0.55  # share of a data sheet's operations that large products reach: an assumption, like the next
MOVED = 0.7  # and of its memory's speed


@dataclass(frozen=True)
class Speed:
    """What a device does in a second."""

    flops: float  # operations of matrix products
    memory: float  # bytes read and written
    link: float  # bytes to or from the host
    told_by: str  # where the numbers come from


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


def card(name: str) -> Card:
    """The card of a name, such as H200. Raises ValueError with those that are known."""
    found = _known(name)
    if not found:
        raise ValueError(f"--card: knows {', '.join(CARDS)}, got {name!r}; for any other, memory.limit_gib tells its memory")
    return found


def _known(name: str) -> Card | None:
    """The card of a device's name, by whole words; the longest name where several fit. Further words make it another card."""
    words = set(re.findall("[a-z0-9]+", name.lower()))
    found = [card for card in CARDS if (own := set(card.lower().split())) <= words and words - own <= BESIDE]
    return CARDS[max(found, key=len)] if found else None


def speed(device: torch.device, dtype: torch.dtype, name: str = "") -> Speed:
    """Of the card `name`, or else of this device: assumed shares of the data sheet for a known card, measured for any other."""
    name = name or (torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    if known := _known(name):
        flops = known.flops if dtype != torch.float32 else known.flops / 2  # TF32
        return Speed(REACHED * flops, MOVED * known.memory, known.link,
                     f"assumed: {REACHED:.0%} of the data sheet's operations, {MOVED:.0%} of its memory's speed")
    here, there = (torch.ones(2**24, device=device) for _ in range(2))
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        there.copy_(here)
        there[-1].item()
        seconds.append(time.perf_counter() - started)
    return Speed(peak_flops(device, dtype), 2 * here.nbytes / min(seconds), 25e9, "measured here")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on this device: what model FLOPs utilisation is a share of.

    The vendor's dense figure where the device's name tells it, else the best of a few products of 1024 x 1024 matrices.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if known := _known(name):
        return known.flops if dtype != torch.float32 else known.flops / 2  # TF32
    a = torch.ones(1024, 1024, dtype=dtype, device=device)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(seconds)

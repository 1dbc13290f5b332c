"""What the programs here share: model shapes, the reference with the same weights, and what a result says about itself.

The reference is LatteTransformer3DModel of diffusers. Where diffusers is not installed, programs measure this project alone and
say so. It is called without a mask: its own only takes an undocumented bias for each frame.
"""

import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from latte import checkpoint, config, keyed, published
from latte.config import MemoryConfig, ModelConfig
from latte.model import Latte

ROOT = Path(__file__).parent.parent
TEXT_TOKENS = 120  # as published Latte is trained
# Shapes of the model: S and L train on a CPU in seconds a step at 16 frames, M2 at 128; XL is Latte-1's; tiny is for trying.
PRESETS = {
    "tiny": dict(layers=2, heads=2, head_dim=32, text_channels=384),
    "S": dict(layers=12, heads=6, head_dim=64),
    "M2": dict(layers=2, heads=6, head_dim=64),
    "L": dict(layers=4, heads=16, head_dim=72),
    "XL": dict(layers=28, heads=16, head_dim=72),
}


def ours(cfg: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Latte:
    """A model every weight of which is drawn with a standard deviation of 0.02, so that no branch is zero."""
    with torch.device(device):
        model = Latte(cfg).to(dtype)
    for number, p in enumerate(model.parameters()):
        nn.init.normal_(p, std=0.02, generator=torch.Generator(device).manual_seed(number))
    return model


def theirs(model: Latte, frames: int) -> nn.Module | None:
    """The reference with the model's weights, on its device and of its type, or None where diffusers is not installed."""
    try:
        from diffusers import LatteTransformer3DModel
    except ImportError:
        return None
    cfg, weight = model.cfg, model.out.weight
    with torch.device(weight.device):
        peer = LatteTransformer3DModel(
            sample_size=cfg.sample_size, num_layers=cfg.layers, patch_size=cfg.patch_size, attention_head_dim=cfg.head_dim,
            num_attention_heads=cfg.heads, caption_channels=cfg.text_channels, in_channels=cfg.in_channels,
            out_channels=cfg.out_channels, cross_attention_dim=cfg.width, video_length=frames, **published.EXPECTED)
    peer.load_state_dict(published.published_state(model, "latte"))
    return peer if weight.dtype == torch.float32 else peer.to(weight.dtype)


def call(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Either model on latents [b f c h w], timesteps [b] and text [b l d]; the latents come back with the frames second."""
    if isinstance(model, Latte):
        return model(x, t, text)
    return model(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)


def inputs(cfg: ModelConfig, frames: int, side: int, batch: int = 1, device: torch.device | str = "cpu",
           dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [b f c h w], timesteps [b] and text [b l d], standard normal."""
    x, text = (torch.from_numpy(keyed.normal(shape, 0, name)).to(device, dtype) for name, shape in (
        ("latents", (batch, frames, cfg.in_channels, side, side)), ("text", (batch, TEXT_TOKENS, cfg.text_channels))))
    return x, torch.full((batch,), 500, device=device), text


def gradients(model: nn.Module, cfg: ModelConfig) -> dict[str, Tensor]:
    """Gradients of either model by this project's names and in its shapes."""
    found = {name: p.grad for name, p in model.named_parameters()}
    if not isinstance(model, Latte):
        found = {name: torch.cat([found[key] for key in keys]) for name, keys in published.names("latte", cfg).items()}
    return {name: value.flatten(1) if name == "patch.weight" else value for name, value in found.items()}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of either model."""
    if isinstance(model, Latte):
        return [*model.spatial, *model.temporal]
    return [*model.transformer_blocks, *model.temporal_transformer_blocks]


def memory(levers: str) -> MemoryConfig:
    """The section `memory` that comma-separated overrides memory.key=value describe. Raises ValueError like config.load, and for
    any other section."""
    parts = [part for part in levers.split(",") if part]
    for part in parts:
        if not part.startswith("memory."):
            raise ValueError(f"{part}: a lever looks like memory.key=value")
    others = {"model": {"out_channels": 4}, "optim": {"grad_clip": 0}, "train": {"mixed_precision": "bf16"}}  # as some levers want
    return config.from_dict(others, parts).memory


def allocated_peak(run: Callable[[], object]) -> int:
    """Most bytes that torch has allocated on the CPU at once during run(), beyond what was there, by its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "lowest": round(min(values), 4), "highest": round(max(values), 4)}


def told(value: dict[str, float]) -> str:
    return f"{value['median']} ({value['lowest']} to {value['highest']})"


def facts() -> dict:
    """What every result holds: the command, the commit, versions and hardware, and the number of threads."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    command = ["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]
    return {"command": " ".join(command), "commit": commit, "versions": checkpoint.versions(), "threads": torch.get_num_threads()}


def write(path: str | Path, result: dict) -> None:
    """A result as JSON, beside its name first, so that none is ever half there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def table(header: list[str], rows: list[list]) -> str:
    """A markdown table; the first column is text, the others are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)

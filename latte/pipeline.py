"""From prompts to frames: model, text encoder, codec and sampler as one callable, for sampling, previews and evaluation.

A pipeline comes from a checkpoint of this project or from a published Latte folder (see latte.published).
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from latte import checkpoint, config, keyed, lora, memory, published, sampler, trace
from latte.codec import VideoCodec, to_frames
from latte.config import (
    CodecConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    InitConfig,
    MemoryConfig,
    SamplerConfig,
    StageConfig,
    TextConfig,
)
from latte.model import Latte, frame_times
from latte.text import TextEncoder, padded, weight_bytes

Condition = dict[str, torch.Tensor]
PARTS = ("model_index.json", "transformer/*", "vae/*", "tokenizer/*", "text_encoder/*", "scheduler/*")
SCHEDULE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "prediction_type": "epsilon",
            "num_train_timesteps": 1000}


@dataclass
class Pipeline:
    """Everything that turns text into frames. `model` is Latte or any wrapper with its forward."""

    cfg: Config
    model: nn.Module
    text: TextEncoder | None
    codec: VideoCodec
    device: torch.device | str = "cpu"
    kept: dict[tuple[str, ...], tuple[Condition, Condition]] = field(default_factory=dict)  # of prompts encoded before

    @torch.no_grad()
    def __call__(self, prompts: list[str], seeds: list[int], frames: int, height: int, width: int, fps: float = 8.0,
                 settings: SamplerConfig | None = None, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Frames uint8 [b f h w 3], one clip a prompt.

        All noise of a clip is a function of its seed, so a clip is the same alone or in any batch (up to rounding).
        `settings` default to the checkpoint's; `progress(done, steps)` is called after every sampler step.
        """
        settings = settings or self.cfg.sampler
        shape = self.codec.latent_shape(frames, height, width)  # [f c h w]

        def noise(*key: int | str) -> torch.Tensor:
            return torch.from_numpy(np.stack([keyed.normal(shape, seed, *key) for seed in seeds])).to(self.device)

        times = frame_times(self.cfg.model, shape[0], self.codec.time_factor * self.cfg.data.base_fps / fps).to(self.device)  # [f]
        cond, null = self.condition(prompts)
        model_fn = sampler.guidance(self._model_fn(times), null, settings.guidance if cond else 1.0)
        tokens = shape[0] * shape[2] * shape[3] // self.cfg.model.patch_size ** 2
        latents = sampler.sample(model_fn, noise("sample"), cond, self.cfg.diffusion, settings, tokens,
                                 noise_fn=lambda step: noise("ancestral", step), progress=progress)
        return to_frames(self.codec.decode(latents, frames))

    def condition(self, prompts: list[str]) -> tuple[Condition, Condition]:
        """What the model is told of the prompts, and of no prompt; kept, so that the text encoder may go after it."""
        key = tuple(prompts)
        if key not in self.kept:
            if self.text is not None:
                pair = [{"text": states.to(self.device), "text_mask": mask.to(self.device)}
                        for states, mask in self.text.pair(prompts)]
            else:
                pair = [conditions(self.cfg, None, [[prompt] for prompt in which], self.device) for which in (prompts, [""])]
            self.kept[key] = (pair[0], pair[1])
        return self.kept[key]

    def _model_fn(self, frame_times: torch.Tensor) -> Callable:
        """The model as samplers call it, in the precision that it was trained in."""
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.cfg.train.mixed_precision)

        self.model.to(self.device)  # as late as this: until here the text encoder may have had the memory

        def model_fn(x, t, cond):
            with torch.autocast(x.device.type, precision, enabled=precision is not None):
                return self.model(x, t, frame_times=frame_times, **cond)

        return model_fn


def conditions(cfg: Config, text: TextEncoder | None, captions: list[list[str]], device: torch.device | str,
               cached: list[list[torch.Tensor]] | None = None) -> Condition:
    """What Latte.forward takes for captions [b][1+images]: text and mask, labels, or nothing. "" means no caption, no class.

    cached: states [l d] of the captions, in place of the encoder's.
    A class is told by its name in data.class_names or by its number. Raises ValueError naming one that there is not.
    """
    rows = len(captions[0])
    if cfg.model.conditioning == "none":
        return {}
    if cfg.model.conditioning == "class":
        labels = torch.tensor([[_label(cfg, name) for name in row] for row in captions], device=device)  # [b rows]
        return {"labels": labels[:, 0] if rows == 1 else labels}
    if cached is None:
        states, mask = text.encode([caption for row in captions for caption in row])  # [(b rows) l d], [(b rows) l]
    else:
        states, mask = padded([one for row in cached for one in row])
    if rows > 1:
        states, mask = states.unflatten(0, (-1, rows)), mask.unflatten(0, (-1, rows))
    return {"text": states.to(device), "text_mask": mask.to(device)}


def _label(cfg: Config, name: str) -> int:
    if not name:
        return cfg.model.classes
    if name in cfg.data.class_names:
        return cfg.data.class_names.index(name)
    if name.isdigit() and int(name) < cfg.model.classes:
        return int(name)
    known = f", or one of {', '.join(cfg.data.class_names[:8])} ..." if cfg.data.class_names else ""
    raise ValueError(f"{name!r} is no class of this model; give a number from 0 to {cfg.model.classes - 1}{known}")


def build(cfg: Config) -> tuple[Latte, list[str]]:
    """The model that training starts from: fresh or with the weights and adapters of cfg.init; and what there is to say of it.

    Raises ValueError naming init.weights where they do not fit cfg.model.
    """
    model, notes = Latte(cfg.model), []
    if cfg.init.weights:
        try:
            if checkpoint.is_checkpoint(cfg.init.weights):
                checkpoint.load_weights(model, checkpoint.read(cfg.init.weights))
            else:
                notes = published.fill(model, published.read(cfg.init.weights))
        except ValueError as error:
            raise ValueError(f"init.weights: {error}") from None
    if cfg.init.lora_rank:
        lora.add(model, cfg.init)
    return model, [f"{cfg.init.weights}: {note}" for note in notes]


def load(path: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, adapters: str = "",
         adapter_scale: float = 1.0, overrides: list[str] = ()) -> Pipeline:
    """The pipeline of a checkpoint folder or a run's newest checkpoint, with its EMA weights, or of a published Latte folder.

    dtype: of all weights; in float32 the model runs in the precision that it was trained in. adapters: a folder of low-rank
    adapters to add to the weights. overrides: settings of the config to change, such as text.quantize=4bit.
    Raises ValueError naming the path when there is nothing to load, it is damaged, or it does not fit its own config.
    """
    if checkpoint.is_checkpoint(path):
        found = checkpoint.read(path)
        cfg = config.from_dict(config.to_dict(found.config), overrides)
        model, _ = build(cfg) if cfg.init.lora_rank else (Latte(cfg.model), [])
        checkpoint.load_weights(model, found)
    else:
        place = published.local(path, PARTS)
        found = published.read(place)
        cfg = _published_config(place, found, overrides)
        model = Latte(cfg.model)
        for note in published.fill(model, found):
            warnings.warn(f"{path}: {note}", stacklevel=2)
    if adapters:
        lora.merge(model, adapters, adapter_scale)
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        cfg = config.from_dict(config.to_dict(cfg), ["train.mixed_precision=fp32", f"text.dtype={name}", f"codec.dtype={name}"])
    memory.apply(model, MemoryConfig(tile_tokens=tile_tokens(cfg, device)))
    text = TextEncoder(cfg.text, device) if cfg.model.conditioning == "text" else None
    return Pipeline(cfg, model.eval().to(dtype), text, VideoCodec(cfg.codec, device), device)


def tile_tokens(cfg: Config, device: torch.device | str) -> int:
    """Tokens that blocks work on at a time while sampling, 0 for whole clips: on a CPU, tiles are faster besides."""
    return cfg.memory.tile_tokens or (memory.CPU_TILE if torch.device(device).type == "cpu" else 0)


def plan(cfg: Config, frames: int, height: int, width: int, guidance: float, dtype: torch.dtype,
         device: torch.device | str = "cuda") -> dict[str, int]:
    """Peak bytes of each phase of sampling one clip, from the configs alone: nothing is loaded or computed.

    The text encoder, of which the weights alone are counted, is gone before the model comes (see sample.py); the VAE stays.
    What a GPU's libraries take comes on top.
    """
    name = str(dtype).removeprefix("torch.")
    cfg = config.from_dict(config.to_dict(cfg), [f"text.dtype={name}", f"codec.dtype={name}"])
    shape = VideoCodec(cfg.codec, weights=False).latent_shape(frames, height, width)  # [f c h w]
    batch = 1 if guidance == 1 or cfg.model.conditioning == "none" else 2

    def denoise():
        model = Latte(cfg.model)
        memory.apply(model, MemoryConfig(tile_tokens=tile_tokens(cfg, device)))
        x, t = torch.zeros(batch, *shape), torch.zeros(batch)
        text = torch.zeros(batch, cfg.text.max_tokens, cfg.model.text_channels)
        cond = {"text": text} if cfg.model.conditioning == "text" else {}
        return lambda: model(x, t, **cond), (model, x, t, text)

    def decode():
        codec = VideoCodec(cfg.codec, weights=False)
        f, c, *sides = shape
        f = min(f, max(1, cfg.codec.chunk_frames // cfg.codec.fold)) if codec.by_frame else f
        h, w = (min(side, cfg.codec.tile_size // codec.factor or side) for side in sides)
        z = torch.zeros(1, f, c, h, w)  # one chunk of one tile: they follow one another
        return lambda: codec.decode(z), (z, *([codec.vae] if codec.vae is not None else []))

    with torch.device("meta"):
        parts = {"latte": Latte(cfg.model), "vae": VideoCodec(cfg.codec, weights=False).vae}
    sizes = {part: dtype.itemsize * sum(p.numel() for p in module.parameters()) if module is not None else 0
             for part, module in parts.items()}
    phases = {"text": weight_bytes(cfg.text) + sizes["vae"]} if cfg.model.conditioning == "text" else {}
    pixels = 2 * 4 * 3 * frames * height * width  # of the whole clip in float32, in pieces and joined
    return phases | {"denoising": trace.peak(denoise, dtype) + sizes["vae"],
                     "decoding": trace.peak(decode, dtype) + sizes["latte"] + pixels}


def configure(path: str, overrides: list[str] = ()) -> Config:
    """The config that `load` would sample with, without loading any weights. ValueErrors as in `load`."""
    if checkpoint.is_checkpoint(path):
        return config.from_dict(config.to_dict(checkpoint.read(path).config), overrides)
    place = published.local(path, PARTS)
    return _published_config(place, published.read(place, weights=False), overrides)


def _published_config(place: Path, found: published.Found, overrides: list[str]) -> Config:
    """A config that samples published weights: those of a pipeline folder as the folder's own pipeline would.

    Weights without a pipeline around them take the VAE that their authors sampled with, and text encoder and tokenizer of Latte-1;
    codec.path and text.encoder change that.
    """
    schedule = place / "scheduler" / "scheduler_config.json"
    if schedule.is_file():
        facts = json.loads(schedule.read_text())
        wrong = {key: facts[key] for key, value in SCHEDULE.items() if facts.get(key, value) != value}
        if wrong:
            raise ValueError(f"{schedule}: {wrong} is not the noise schedule of Latte, {SCHEDULE}")
    shape = published.model_config(found)
    text, whole = shape.conditioning == "text", (place / "vae").is_dir()
    side = 8 * shape.sample_size
    cfg = Config(
        model=shape,
        text=TextConfig(encoder=str(place) if whole else "maxin-cn/Latte-1", subfolder="text_encoder", max_tokens=120),
        codec=CodecConfig(kind="autoencoder", path=str(place) if whole else "stabilityai/sd-vae-ft-ema",
                          subfolder="vae" if whole else "", chunk_frames=4),
        diffusion=DiffusionConfig(kind="ddpm", prediction="eps", loss="eps"),
        sampler=SamplerConfig(name="ddim", steps=50, guidance=7.5) if text else SamplerConfig(name="ddpm", steps=250, guidance=7.0),
        data=DataConfig(source="folder", path="-", layout="captions" if text else "classes"),
        stages=[StageConfig(frames=found.facts.get("video_length", published.PUBLISHED_FRAMES), height=side, width=side)],
        init=InitConfig(weights=str(place)))
    return config.from_dict(config.to_dict(cfg), overrides)

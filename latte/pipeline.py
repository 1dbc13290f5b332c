"""From prompts to frames: model, text encoder, codec and sampler as one callable, for sampling, previews and evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from latte import checkpoint, keyed, sampler
from latte.codec import VideoCodec, to_frames
from latte.config import Config, SamplerConfig
from latte.model import Latte
from latte.text import TextEncoder


@dataclass
class Pipeline:
    """Everything that turns text into frames. `model` is Latte or any wrapper with its forward."""

    cfg: Config
    model: nn.Module
    text: TextEncoder
    codec: VideoCodec
    device: torch.device | str = "cpu"

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

        times = torch.arange(shape[0], device=self.device) * (self.codec.time_factor * self.cfg.data.base_fps / fps)  # [f]
        model_fn = sampler.guidance(self._model_fn(times), self.condition([""]), settings.guidance)
        tokens = shape[0] * shape[2] * shape[3] // self.cfg.model.patch_size ** 2
        latents = sampler.sample(model_fn, noise("sample"), self.condition(prompts), self.cfg.diffusion, settings, tokens,
                                 noise_fn=lambda step: noise("ancestral", step), progress=progress)
        return to_frames(self.codec.decode(latents, frames))

    def condition(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        states, mask = self.text.encode(prompts)
        return {"text": states.to(self.device), "text_mask": mask.to(self.device)}

    def _model_fn(self, frame_times: torch.Tensor) -> Callable:
        """The model as samplers call it, in the precision that it was trained in."""
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.cfg.train.mixed_precision)

        def model_fn(x, t, cond):
            with torch.autocast(x.device.type, precision, enabled=precision is not None):
                return self.model(x, t, frame_times=frame_times, **cond)

        return model_fn


def load(path: str, device: torch.device | str = "cpu") -> Pipeline:
    """The pipeline of a checkpoint folder or a run's newest checkpoint, with its EMA weights.

    Raises ValueError naming the path when there is no checkpoint, it is damaged, or it does not fit its own config.
    """
    found = checkpoint.read(path)
    model = Latte(found.config.model)
    checkpoint.load_weights(model, found)
    return Pipeline(found.config, model.eval().to(device), TextEncoder(found.config.text, device),
                    VideoCodec(found.config.codec, device), device)

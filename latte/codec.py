"""VideoCodec: pixels <-> latents. Owns the scale of the latents, and how a clip is cut up to fit into memory.

Letters: b batch, f frames, c channels, h w height and width. Pixels are [b f 3 h w] in [-1, 1].
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from latte.config import CodecConfig


def to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 frames [b f h w 3], or one clip [f h w 3], -> float32 pixels [b f 3 h w] in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(frames))
    x = x if x.ndim == 5 else x[None]
    return rearrange(x, "b f h w c -> b f c h w").float() / 127.5 - 1


def to_frames(x: Tensor) -> np.ndarray:
    """Pixels [b f 3 h w] in [-1, 1] -> uint8 frames [b f h w 3], rounded, and clamped where they are outside."""
    x = (x.float() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(x, "b f c h w -> b f h w c").cpu().numpy()


class VideoCodec:
    """A frozen codec: kind "pixels" is the identity; "autoencoder" is a VAE of diffusers, by hub id or folder.

    The class of the VAE comes from the folder's own config: image VAEs (AutoencoderKL), the temporal decoder of Stable
    Video Diffusion, and causal video VAEs (Wan, CogVideoX, HunyuanVideo, LTX).

    channels     of a latent
    factor       pixels per latent in height and in width
    time_factor  frames per latent in time, 1 for VAEs that see single frames. A causal video VAE turns 1 + k * time_factor
                 frames into 1 + k latents.
                 With cfg.fold above 1 it is that: k * fold frames become k latents, of cfg.waves times the VAE's channels: the
                 slowest terms of the cosine transform of its latents along time (Ahmed et al., 1974). Two keep motion that is
                 even over a fold in the space of the latents. cfg.gains multiply them: what has a twentieth of the spread has a
                 four hundredth of a diffusion's loss, and is not learnt.

    What cutting a clip up (cfg.chunk_frames, cfg.tile_size) does to the numbers:
    - Frames of an image VAE are independent: chunks of frames change nothing but float rounding.
    - A causal video VAE carries its own state along time: all frames go in at once, and chunk_frames is not used.
    - The temporal decoder normalises over all frames that it gets: a clip longer than chunk_frames is decoded in windows
      that overlap by a quarter and are blended, so it has no seams but differs slightly from a decode in one piece.
    - Tiles overlap by a quarter. The outer quarter of an overlap is thrown away and the middle half blended, so tiling
      changes nothing for layers that reach no further than tile_size / 16 pixels. Attention and group norm see the whole
      tile: with them a tiled picture has no seams but differs slightly from an untiled one. A frame no larger than a tile
      is never cut.
    """

    def __init__(self, cfg: CodecConfig, device: str | torch.device = "cpu", weights: bool = True):
        """weights=False reads the VAE's config alone and leaves its weights random: enough to plan with."""
        self.cfg = cfg
        self.vae = None
        self.channels, self.factor, self.time_factor = 3, 1, 1
        if cfg.kind == "pixels":
            return
        self.vae = _load_vae(cfg, weights).eval()
        if weights:
            self.vae.requires_grad_(False).to(device)
        config, facts = self.vae.config, vars(self.vae)  # each class of VAE has its own names for the same few numbers
        self.channels = _first(config.get("latent_channels"), config.get("z_dim"))
        self.factor = facts.get("spatial_compression_ratio") or 2 ** (len(config["block_out_channels"]) - 1)
        self.time_factor = int(_first(facts.get("temporal_compression_ratio"), config.get("temporal_compression_ratio"),
                                      config.get("scale_factor_temporal"), 1))
        if cfg.fold > 1:
            if self.time_factor > 1:
                raise ValueError(f"codec.fold: must be 1 for a VAE that codes {self.time_factor} frames together, got {cfg.fold}")
            self.channels, self.time_factor = self.channels * cfg.waves, cfg.fold
            cosines = _cosines(cfg.fold, cfg.waves, device)
            gains = torch.tensor(cfg.gains or [1.0] * cfg.waves, device=device)[:, None]
            self.waves, self.back = cosines * gains, cosines * (cfg.fold / cfg.waves) / gains  # [waves fold], orthogonal rows
        if cfg.tile_size % (4 * self.factor):
            raise ValueError(f"codec.tile_size: must be a multiple of {4 * self.factor}, four latents of this VAE, "
                             f"got {cfg.tile_size}")
        # Models are trained on (z - mean) * scale, which has about unit variance. Some VAEs keep one number for all
        # channels, others one for each.
        buffers = dict(self.vae.named_buffers())
        mean = _first(buffers.get("latents_mean"), config.get("latents_mean"), config.get("shift_factor"), 0.0)
        std = _first(buffers.get("latents_std"), config.get("latents_std"), 1.0)
        self.mean = torch.as_tensor(mean, dtype=torch.float32, device=device).reshape(-1, 1, 1)  # [c 1 1]
        self.scale = _first(config.get("scaling_factor"), 1.0) / torch.as_tensor(
            std, dtype=torch.float32, device=device).reshape(-1, 1, 1)  # [c 1 1]

    @classmethod
    def told(cls, cfg: CodecConfig, cache) -> "VideoCodec":
        """A codec without a VAE, which only knows the shapes of a cache's latents: of its channels, factor and time_factor."""
        codec = cls.__new__(cls)
        codec.cfg, codec.vae = cfg, None
        codec.channels, codec.factor, codec.time_factor = cache.channels, cache.factor, cache.time_factor
        return codec

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[f c h w] of the latents of a clip. Raises ValueError if the size does not divide by the factor."""
        if height % self.factor or width % self.factor:
            raise ValueError(f"height and width must be multiples of {self.factor}, the codec's pixels per latent, "
                             f"got {height}x{width}")
        latents = -(-frames // self.cfg.fold) if self.by_frame else 1 + -(-(frames - 1) // self.time_factor)
        return latents, self.channels, height // self.factor, width // self.factor

    @property
    def by_frame(self) -> bool:
        """Whether the VAE codes each frame by itself."""
        return self.time_factor == self.cfg.fold

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels [b f 3 h w] in [-1, 1] -> scaled latents [b f' c h' w'] float32, see latent_shape.

        The mean of the VAE's posterior, or, with noise (standard normal, shaped like the latents), a sample of it.
        The last frame is repeated until the number of frames fits a causal video VAE, or the fold.
        """
        if self.vae is None:
            return x
        mean, std = self.posterior(x)
        return mean if noise is None else mean + std * noise

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread of the VAE's posterior of pixels [b f 3 h w], scaled as latents are: [b f' c h' w'] float32 each."""
        x = x.contiguous()  # other layouts in memory have other kernels, which round differently
        b, f, _, h, w = x.shape
        latents, _, _, _ = self.latent_shape(f, h, w)
        if self.by_frame:
            pieces = rearrange(x, "b f c h w -> (b f) c h w").split(self.cfg.chunk_frames)
        else:
            padding = 1 + (latents - 1) * self.time_factor - f
            x = torch.cat([x, x[:, -1:].expand(-1, padding, -1, -1, -1)], dim=1)
            pieces = rearrange(x, "b f c h w -> b c f h w").split(1)
        moments = torch.cat([_tiled(self._moments, piece, self.cfg.tile_size, self.factor) for piece in pieces])
        if self.by_frame:
            moments = rearrange(moments, "(b f) c h w -> b f c h w", b=b)
        else:
            moments = rearrange(moments, "b c f h w -> b f c h w")
        mean, std = moments.chunk(2, dim=2)  # [b f' c h' w'] each
        mean, std = (mean - self.mean) * self.scale, std * self.scale
        if self.cfg.fold > 1:
            mean, std = self._folded(mean, self.waves), self._folded(std**2, self.waves**2).sqrt()
        return mean, std

    def _folded(self, z: Tensor, waves: Tensor) -> Tensor:
        """[b f c h w] -> [b f/fold (waves c) h w]: sums of each fold, weighted by waves [waves fold]."""
        z = torch.cat([z, z[:, -1:].expand(-1, -z.shape[1] % self.cfg.fold, -1, -1, -1)], dim=1)
        return torch.einsum("kt,bftchw->bfkchw", waves, z.unflatten(1, (-1, self.cfg.fold))).flatten(2, 3)

    def _unfolded(self, z: Tensor) -> Tensor:
        """[b f (waves c) h w] -> [b (f fold) c h w]."""
        return torch.einsum("kt,bfkchw->bftchw", self.back, z.unflatten(2, (len(self.back), -1))).flatten(1, 2)

    @torch.no_grad()
    def decode(self, z: Tensor, frames: int | None = None) -> Tensor:
        """Scaled latents [b f' c h' w'] -> pixels [b f 3 h w] float32, about [-1, 1]; only the first `frames` if given."""
        if self.vae is None:
            return z[:, :frames]
        b, z = z.shape[0], z.float()
        if self.cfg.fold > 1:
            z = self._unfolded(z)
        z = z / self.scale + self.mean
        tile = self.cfg.tile_size // self.factor
        if not self.by_frame:
            pieces = rearrange(z, "b f c h w -> b c f h w").split(1)
            x = torch.cat([_tiled(self._pixels, piece, tile) for piece in pieces])
            x = rearrange(x, "b c f h w -> b f c h w")
        elif self._decoder_sees_time():
            x = torch.stack([_windows(lambda part: _tiled(self._pixels, part, tile), clip, 0, self.cfg.chunk_frames)
                             for clip in z])
        else:
            pieces = rearrange(z, "b f c h w -> (b f) c h w").split(self.cfg.chunk_frames)
            x = torch.cat([_tiled(self._pixels, piece, tile) for piece in pieces])
            x = rearrange(x, "(b f) c h w -> b f c h w", b=b)
        return x[:, :frames]

    def _decoder_sees_time(self) -> bool:
        return type(self.vae).__name__ == "AutoencoderKLTemporalDecoder"

    def _moments(self, x: Tensor) -> Tensor:
        encoded = self.vae.encode(x.to(self.vae.dtype))
        if "latent_dist" in encoded:
            return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1).float()
        (z,) = encoded.values()  # a VAE without a posterior (AutoencoderTiny, AutoencoderDC): its spread is 0
        return torch.cat([z, torch.zeros_like(z)], dim=1).float()

    def _pixels(self, z: Tensor) -> Tensor:
        frames = {"num_frames": len(z)} if self._decoder_sees_time() else {}
        return self.vae.decode(z.to(self.vae.dtype), **frames).sample.float()


def _load_vae(cfg: CodecConfig, weights: bool):
    import diffusers  # takes seconds to import, and pixels do without it

    where = repr(cfg.path) + (f" (subfolder {cfg.subfolder!r})" if cfg.subfolder else "")
    place = {"subfolder": cfg.subfolder} if cfg.subfolder else {}
    try:
        facts = diffusers.AutoencoderKL.load_config(cfg.path, **place)
        name = facts.get("_class_name", "")
        if not name.startswith("Autoencoder") or not hasattr(diffusers, name):
            raise ValueError(f"its config names the class {name!r}")
        if not weights:
            return getattr(diffusers, name).from_config(facts)
        return getattr(diffusers, name).from_pretrained(cfg.path, torch_dtype=getattr(torch, cfg.dtype), **place)
    except (OSError, ValueError) as error:
        raise ValueError(f"codec.path: {where} is neither a folder nor a hub id of a diffusers VAE ({error})") from error


def _cosines(fold: int, waves: int, device: str | torch.device) -> Tensor:
    """The first rows [waves fold] of the type-II cosine transform, of length sqrt(waves / fold): what a still clip becomes has
    the mean square that it had."""
    rows = torch.cos(math.pi / fold * (torch.arange(fold, device=device) + 0.5) * torch.arange(waves, device=device)[:, None])
    return rows * math.sqrt(waves / fold) / rows.norm(dim=1, keepdim=True)


def _first(*values):
    return next(value for value in values if value is not None)


def _tiled(run: Callable[[Tensor], Tensor], x: Tensor, tile: int, unit: int = 1) -> Tensor:
    """run(x) for x [... h w], in tiles of that side; 0 = whole."""
    if tile == 0:
        return run(x)
    return _windows(lambda rows: _windows(run, rows, x.ndim - 1, tile, unit), x, x.ndim - 2, tile, unit)


def _windows(run: Callable[[Tensor], Tensor], x: Tensor, axis: int, size: int, unit: int = 1) -> Tensor:
    """run(x) from windows of x along an axis, which overlap by a quarter and are blended; run may scale the axis.

    Windows start at multiples of `unit`. Near a border that is not x's own a window knows too little: the outer quarter
    of an overlap gets no weight, and the weight rises linearly over its middle half.
    """
    length = x.shape[axis]
    if length <= size:
        return run(x)
    overlap = size // 4 // unit * unit
    starts = [*range(0, length - size, size - overlap), length - size]
    total, weights = None, None
    for start in starts:
        y = run(x.narrow(axis, start, size))
        n = y.shape[axis]
        if total is None:
            shape = list(y.shape)
            shape[axis] = length * n // size
            total, weights = y.new_zeros(shape), y.new_zeros(shape[axis])
        ramp = n * overlap // size
        rise = ((torch.arange(ramp, device=y.device) + 0.5) / ramp * 2 - 0.5).clamp(0, 1) if ramp else y.new_zeros(0)
        weight = y.new_ones(n)
        if start > 0:
            weight[:ramp] = rise
        if start + size < length:
            weight[n - ramp:] = rise.flip(0)
        along = [-1 if i == axis else 1 for i in range(y.ndim)]
        total.narrow(axis, start * n // size, n).add_(y * weight.reshape(along))
        weights.narrow(0, start * n // size, n).add_(weight)
    return total / weights.reshape(along)

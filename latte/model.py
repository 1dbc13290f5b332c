"""Latte: a transformer over video that alternates attention within frames and attention along time.

Ma et al., "Latte: Latent Diffusion Transformer for Video Generation" (arXiv 2401.03048), variant 1, in both families:
text-to-video has one timestep modulation for all blocks (adaLN-single) and text cross-attention in the spatial blocks, as
in PixArt-alpha (Chen et al., arXiv 2310.00426); class-to-video and unconditional video have a modulation of each block
(adaLN-Zero), as in DiT (Peebles and Xie, arXiv 2212.09748).

Letters: b batch, f frames, c channels, h w height and width, n tokens per frame, d width, l text tokens; in reshapes also
p q the sides of a patch and k the channels of one head.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from latte.attention import attention, rope, rotate, sincos, sincos_2d
from latte.config import ModelConfig
from latte.ops import EPS, add_gated, autocast_dtype, modulate, norm_linear

TIMESTEP_CHANNELS = 256
MLP_RATIO = 4
MASKED = -10000.0  # logit of a masked text token; finite, so that a clip whose text is masked altogether stays finite


def six(mod: Tensor) -> Tensor:
    """[b f 1 (6 d)] -> [b f 1 6 d]: a block's two shifts, scales and gates."""
    return mod.unflatten(-1, (6, -1))


class HeadNorm(nn.Module):
    """RMS norm of queries and keys over the channels of each head; without model.qk_norm it passes them on."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.q = nn.Parameter(torch.ones(cfg.head_dim)) if cfg.qk_norm else None
        self.k = nn.Parameter(torch.ones(cfg.head_dim)) if cfg.qk_norm else None

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q is None:
            return q, k
        q, k = (F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS).to(x.dtype) for x, weight in ((q, self.q), (k, self.k)))
        return q, k


class SelfAttention(nn.Module):
    """Attention among the tokens of one frame ("space") or among the frames at one position ("time"), added to the residual
    stream."""

    def __init__(self, cfg: ModelConfig, along: str):
        super().__init__()
        self.heads, self.backend = cfg.heads, cfg.attention
        self.rows = {"space": "(b f) h n k", "time": "(b n) h f k"}[along]
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.norm = HeadNorm(cfg)
        self.out = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [b f n d]; shift, scale and gate [b 1|f 1 d]; turn: cosines and sines [b|1 f 1 1 k/2] of rotary positions."""
        qkv = norm_linear(x, shift, scale, self.qkv)
        q, k, v = rearrange(qkv, "b f n (three h k) -> three b f n h k", three=3, h=self.heads)
        q, k = self.norm(q, k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        q, k, v = (rearrange(y, f"b f n h k -> {self.rows}") for y in (q, k, v))
        y = attention(q, k, v, backend=self.backend)
        return add_gated(x, gate, rearrange(y, f"{self.rows} -> b f n (h k)", b=len(x)), self.out)


class CrossAttention(nn.Module):
    """Attention from video tokens to text. Keys and values are computed once a clip, never once a frame."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads, self.backend = cfg.heads, cfg.attention
        self.q = nn.Linear(cfg.width, cfg.width)
        self.kv = nn.Linear(cfg.width, 2 * cfg.width)
        self.norm = HeadNorm(cfg)
        self.out = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
        """x [b f n d]; text [b r l d] and bias [b r l]: r = 1 row for all frames, or one for the video and one an image."""
        images = text.shape[1] - 1
        q = rearrange(self.q(x), "b f n (h k) -> b f n h k", h=self.heads)
        k, v = rearrange(self.kv(text), "b r l (two h k) -> two b r l h k", two=2, h=self.heads)
        q, k = self.norm(q, k)
        out = []
        for row, q_row in enumerate(q.split([x.shape[1] - images] + [1] * images, dim=1)):
            q_row = rearrange(q_row, "b f n h k -> b h (f n) k")
            k_row, v_row = (rearrange(y[:, row], "b l h k -> b h l k") for y in (k, v))
            bias_row = None if bias is None else rearrange(bias[:, row], "b l -> b 1 1 l")
            y = attention(q_row, k_row, v_row, bias_row, self.backend)
            out.append(rearrange(y, "b h (f n) k -> b f n (h k)", n=x.shape[2]))
        return self.out(torch.cat(out, dim=1) if images else out[0])


class MLP(nn.Sequential):
    """Two linears with GELU between them, added to the residual stream."""

    def __init__(self, cfg: ModelConfig):
        wide = MLP_RATIO * cfg.width
        super().__init__(nn.Linear(cfg.width, wide), nn.GELU(approximate="tanh"), nn.Linear(wide, cfg.width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """x [b f n d]; shift, scale and gate [b 1|f 1 d]."""
        return add_gated(x, gate, norm_linear(x, shift, scale, self[0]), self[2], gelu=True)


class Block(nn.Module):
    """Self-attention, in spatial blocks also attention to the text, and an MLP, each added to the residual stream.

    Shift, scale and gate are a table of the block plus what the timestep gives to all blocks alike ("shared"), or the block's
    own projection of the timestep ("block"). The attention to the text has none of them, and no norm: its queries are the
    residual stream itself.
    """

    def __init__(self, cfg: ModelConfig, along: str):
        super().__init__()
        if cfg.modulation == "shared":
            self.table = nn.Parameter(torch.zeros(6, cfg.width))
        else:
            self.modulation = nn.Linear(cfg.width, 6 * cfg.width)
        self.attn = SelfAttention(cfg, along)
        self.cross = CrossAttention(cfg) if along == "space" and cfg.conditioning == "text" else None
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, mod: Tensor, text: Tensor | None = None, bias: Tensor | None = None,
                turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [b f n d]; mod from the timestep: [b 1|f 1 6 d], or [b 1|f 1 d] for a modulation of the block's own; text and bias as
        in CrossAttention; turn as in SelfAttention."""
        mod = self.table + mod if hasattr(self, "table") else six(self.modulation(mod))
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(-2)                 # each [b 1|f 1 d]
        x = self.attn(x, shift1, scale1, gate1, turn)                                 # [b f n d]
        if text is not None:
            x = x + self.cross(x, text, bias)                                         # [b f n d]
        return self.mlp(x, shift2, scale2, gate2)                                     # [b f n d]


class Latte(nn.Module):
    """Latte from text, from a class or from nothing, for any patch, frame size and number of frames.

    A fresh model returns exactly 0 and each of its blocks is the identity: the tables, the last linear of the timestep, the
    output of every attention to the text and the last linear start at zero. The other linears are Xavier-uniform, with a
    fused projection drawn part by part. Published weights replace all of it.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, d, patch = cfg, cfg.width, cfg.patch_size**2
        self.patch = nn.Linear(patch * cfg.in_channels, d)
        self.timestep = nn.Sequential(nn.Linear(TIMESTEP_CHANNELS, d), nn.SiLU(), nn.Linear(d, d))
        if cfg.modulation == "shared":
            self.modulation = nn.Linear(d, 6 * d)
            self.table = nn.Parameter(torch.zeros(2, d))
        else:
            self.final = nn.Linear(d, 2 * d)
        if cfg.conditioning == "text":
            self.text = nn.Sequential(nn.Linear(cfg.text_channels, d), nn.GELU(approximate="tanh"), nn.Linear(d, d))
        elif cfg.conditioning == "class":
            self.label = nn.Embedding(cfg.classes + 1, d)  # the last one means no class
        self.spatial = nn.ModuleList(Block(cfg, "space") for _ in range(cfg.layers))
        self.temporal = nn.ModuleList(Block(cfg, "time") for _ in range(cfg.layers))
        self.out = nn.Linear(d, patch * cfg.out_channels)
        self.known_places: dict[tuple, Tensor] = {}
        self.initialise()

    def initialise(self) -> None:
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                for part in layer.weight.data.chunk({"qkv": 3, "kv": 2}.get(name.rpartition(".")[2], 1)):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(layer.bias)
            if isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
            if name.endswith(("modulation", "final", "cross.out")) or layer is self.out:
                nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None,
                labels: Tensor | None = None, image_frames: int = 0, frame_times: Tensor | None = None) -> Tensor:
        """One denoising pass over x [b f c h w] at timesteps t, [b] or [b f] for one a frame. Returns [b f out h w].

        text [b l d], text_mask [b l] with 1 = keep; without text the blocks attend to none.
        labels [b], whole numbers from 0 to cfg.classes, for conditioning = class; without them no sample has a class.
        image_frames: so many frames at the end are independent images, which the temporal blocks leave alone. Text may then
        be [b 1+image_frames l d], row 0 for the video and one for each image, with a mask [b 1+image_frames l]; labels then
        may be [b 1+image_frames].
        frame_times: [f] or [b f], one for each video frame, in frames at the base rate (default 0, 1, 2, ...). A single video
        frame has no position in time, whatever its frame_times.
        Raises ValueError for shapes that do not fit, and for a condition that this model does not take.
        """
        cfg, p, dtype = self.cfg, self.cfg.patch_size, self.out.weight.dtype
        if autocast_dtype(x.device.type):
            dtype = torch.float32  # of the residual stream, also where the weights are bf16
        _check(cfg, x, t, text, text_mask, labels, image_frames, frame_times)
        video = x.shape[1] - image_frames
        h, w = x.shape[3] // p, x.shape[4] // p

        x = rearrange(x.to(dtype), "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=p)
        x = self.patch(x) + self.places(h, w, x.device, dtype)                          # [b f n d]

        e = self.timestep(timestep_sinusoid(t if t.ndim == 2 else t[:, None]).to(dtype))  # [b 1|f d]
        if cfg.conditioning == "class":
            e = e + self.label_states(labels, len(x), video, image_frames)              # [b 1|f d]
        mod = F.silu(e)[:, :, None]                                                     # [b 1|f 1 d]
        if cfg.modulation == "shared":
            mod = six(self.modulation(mod))                                             # [b 1|f 1 6 d]

        bias = None
        if text is not None:
            text = self.text((text if text.ndim == 4 else text[:, None]).to(dtype))     # [b r l d]
            if text_mask is not None:
                bias = MASKED * (1 - text_mask.to(dtype).view(text.shape[:3]))          # [b r l]

        place, turn = None, None
        if video > 1:
            times = torch.arange(video, device=x.device) if frame_times is None else frame_times
            times = times.view(-1, video)                                               # [b|1 f]
            if cfg.temporal_positions == "rope":
                turn = tuple(y[:, :, None, None] for y in rope(times, cfg.head_dim))    # each [b|1 f 1 1 k/2]
            else:
                place = sincos(times, cfg.width)[:, :, None].to(dtype)                  # [b|1 f 1 d]

        for i, (spatial, temporal) in enumerate(zip(self.spatial, self.temporal, strict=True)):
            x = spatial(x, mod, text, bias)                                             # [b f n d]
            clip, images = x[:, :video], x[:, video:]
            if i == 0 and place is not None:
                clip = clip + place
            if video:
                clip = temporal(clip, mod[:, :video], turn=turn)                        # [b video n d]
            x = torch.cat([clip, images], dim=1) if image_frames else clip

        if cfg.modulation == "shared":
            shift, scale = (self.table + e[:, :, None, None]).unbind(-2)                # each [b 1|f 1 d]
        else:
            shift, scale = self.final(F.silu(e))[:, :, None].chunk(2, dim=-1)           # each [b 1|f 1 d]
        x = self.out(modulate(x, shift, scale))                                         # [b f n (p q out)]
        return rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", h=h, p=p, q=p)

    def places(self, h: int, w: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """spatial_positions, kept for the next time."""
        key = h, w, device, dtype
        if key not in self.known_places:
            table = spatial_positions(self.cfg, h, w, device).to(dtype)
            if type(table) is not Tensor:  # without values, of a plan
                return table
            self.known_places[key] = table
        return self.known_places[key]

    def label_states(self, labels: Tensor | None, b: int, video: int, images: int) -> Tensor:
        """Embedded labels [b 1|f d] of labels [b] or [b 1+images]."""
        if labels is None:
            labels = torch.full((b,), self.cfg.classes, device=self.label.weight.device)
        states = self.label(labels)
        if labels.ndim == 1:
            return states[:, None]
        return torch.cat([states[:, :1].expand(-1, video, -1), states[:, 1:]], dim=1)


def frame_times(cfg: ModelConfig, frames: int, step: float | Tensor) -> Tensor:
    """Positions in time of a clip's frames, [f] or [b f] for steps [b], for Latte.forward.

    step: frames at the base rate from one frame of the clip to the next; 1 at the base rate itself, 2 at half of it. With
    model.temporal_spacing = time, positions count frames at the base rate: clips of different rates share one table. With
    frame, they count the clip's own frames, whatever its rate, as published Latte does. With stretch, a clip longer than
    known_frames is spread over the positions that those took. A clip of at most known_frames at the base rate takes 0, 1, 2, ...
    in all three.
    """
    i = torch.arange(frames)
    if cfg.temporal_spacing == "time":
        return i * (step[:, None] if isinstance(step, Tensor) else step)
    return i * min(1.0, cfg.known_frames / frames) if cfg.temporal_spacing == "stretch" else i


def spatial_positions(cfg: ModelConfig, h: int, w: int, device: torch.device) -> Tensor:
    """Table [(h w) d] of a grid of patches. Any grid is stretched over positions 0 to side, as in PixArt-alpha: of a model of
    sample_size 64 and patches of 2, side is 32, so latents of 64 take 0, 1, ..., 31 and those of 32 take 0, 2, ..., 30.
    From sample_size 128 on, side stays about 64 / patch_size, so that neighbours come closer."""
    side = cfg.sample_size // cfg.patch_size / max(cfg.sample_size // 64, 1)
    return sincos_2d(torch.arange(h, device=device) * side / h, torch.arange(w, device=device) * side / w, cfg.width)


def timestep_sinusoid(t: Tensor) -> Tensor:
    """Cosines, then sines, [... 256] in float32 of timesteps t [...], whole or not."""
    half = TIMESTEP_CHANNELS // 2
    rates = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def flops(cfg: ModelConfig, frames: int, height: int, width: int, text_tokens: int) -> int:
    """Floating-point operations of one forward pass of one clip: its matrix products, two operations a multiply-add."""
    d, l, patch = cfg.width, text_tokens, cfg.patch_size**2
    n = height * width // patch
    m = frames * n
    mlp = 4 * MLP_RATIO * m * d**2
    if cfg.conditioning != "text":
        l = 0
    cross = 4 * m * d**2 + 4 * m * l * d + 4 * l * d**2 if l else 0
    space = 8 * m * d**2 + 4 * m * n * d + cross + mlp
    time = 8 * m * d**2 + 4 * m * frames * d + mlp
    ends = 2 * m * patch * (cfg.in_channels + cfg.out_channels) * d
    modulations = 6 if cfg.modulation == "shared" else 2 * cfg.layers * 6 + 2
    conditions = 2 * l * (cfg.text_channels * d + d**2) + 2 * (TIMESTEP_CHANNELS * d + d**2 + modulations * d**2)
    return cfg.layers * (space + time) + ends + conditions


def _check(cfg: ModelConfig, x: Tensor, t: Tensor, text: Tensor | None, text_mask: Tensor | None, labels: Tensor | None,
           image_frames: int, frame_times: Tensor | None) -> None:
    b, f, c, height, width = x.shape
    for name, given, needed in (("text", text, "text"), ("labels", labels, "class")):
        if given is not None and cfg.conditioning != needed:
            raise ValueError(f"{name}: model.conditioning is {cfg.conditioning}, so the model takes none")
    if labels is not None and labels.shape not in ((b,), (b, 1 + image_frames)):
        raise ValueError(f"labels must be [{b}] or [{b} {1 + image_frames}], one for the video and one for each image, "
                         f"got {list(labels.shape)}")
    if labels is not None and labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) <= cfg.classes:
        raise ValueError(f"labels must be 0 to {cfg.classes} (= no class), got {int(labels.min())} to {int(labels.max())}")
    if c != cfg.in_channels:
        raise ValueError(f"x has {c} channels, but model.in_channels is {cfg.in_channels}")
    if height % cfg.patch_size or width % cfg.patch_size:
        raise ValueError(f"x is {height}x{width}; both sides must divide by model.patch_size = {cfg.patch_size}")
    if not 0 <= image_frames <= f:
        raise ValueError(f"image_frames must be 0 to the {f} frames of x, got {image_frames}")
    if t.shape not in ((b,), (b, f)):
        raise ValueError(f"t must be [{b}] or [{b} {f}], one for a clip or for a frame, got {list(t.shape)}")
    if text is not None and text.shape[-1] != cfg.text_channels:
        raise ValueError(f"text has {text.shape[-1]} channels, but model.text_channels is {cfg.text_channels}")
    if text is not None and text.shape[:-2] not in ((b,), (b, 1 + image_frames)):
        raise ValueError(f"text must be [{b} l d] or [{b} {1 + image_frames} l d], one row for the video and one for each "
                         f"image, got {list(text.shape)}")
    if text is not None and text_mask is not None and text_mask.shape != text.shape[:-1]:
        raise ValueError(f"text_mask must be {list(text.shape[:-1])} as the text is, got {list(text_mask.shape)}")
    video = f - image_frames
    if frame_times is not None and frame_times.shape not in ((video,), (b, video)):
        raise ValueError(f"frame_times must be [{video}] or [{b} {video}], one for each video frame, "
                         f"got {list(frame_times.shape)}")

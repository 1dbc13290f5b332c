"""Latte: a transformer over video that alternates attention within frames and attention along time.

Ma et al., "Latte: Latent Diffusion Transformer for Video Generation" (2024), variant 1, text-to-video: adaLN-single
modulation and text cross-attention in the spatial blocks, as in PixArt-alpha (Chen et al., 2023).

Letters: b batch, f frames, c channels, h w height and width, n tokens per frame, d width, l text tokens,
p q the two sides of a patch, k channels of one attention head.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from latte.attention import attention, rope, rotate, sincos, sincos_2d
from latte.config import ModelConfig

TIME_CHANNELS = 256  # of the timestep's sinusoid
MLP_RATIO = 4
EPS = 1e-6
MASKED = -10000.0  # added to the logits of masked text; finite, so that a caption with no token at all stays finite


class SelfAttention(nn.Module):
    """Attention among the tokens of one frame (along = "space") or among the frames at one position (along = "time")."""

    def __init__(self, cfg: ModelConfig, along: str):
        super().__init__()
        self.heads, self.backend = cfg.heads, cfg.attention
        self.group = {"space": "(b f) h n k", "time": "(b n) h f k"}[along]
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.norm_q = nn.RMSNorm(cfg.head_dim, eps=EPS) if cfg.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(cfg.head_dim, eps=EPS) if cfg.qk_norm else nn.Identity()
        self.out = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        b, f = x.shape[:2]
        q, k, v = rearrange(self.qkv(x), "b f n (three h k) -> three b f n h k", three=3, h=self.heads)
        q, k = self.norm_q(q), self.norm_k(k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        q, k, v = (rearrange(y.to(v.dtype), f"b f n h k -> {self.group}") for y in (q, k, v))
        y = attention(q, k, v, backend=self.backend)
        return self.out(rearrange(y, f"{self.group} -> b f n (h k)", b=b, **({"f": f} if "f)" in self.group else {})))


class CrossAttention(nn.Module):
    """Attention from video tokens to text. Keys and values are computed once a clip, never once a frame."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads, self.backend = cfg.heads, cfg.attention
        self.q = nn.Linear(cfg.width, cfg.width)
        self.kv = nn.Linear(cfg.width, 2 * cfg.width)
        self.norm_q = nn.RMSNorm(cfg.head_dim, eps=EPS) if cfg.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(cfg.head_dim, eps=EPS) if cfg.qk_norm else nn.Identity()
        self.out = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
        """x [b f n d]; text [b r l d] and bias [b r l], where r is 1 (for all frames) or 1 + images (row 0 for the video)."""
        b, f = x.shape[:2]
        images = text.shape[1] - 1
        q = rearrange(self.q(x), "b f n (h k) -> b f n h k", h=self.heads)
        k, v = rearrange(self.kv(text), "b r l (two h k) -> two b r l h k", two=2, h=self.heads)
        q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        y = self.attend(q[:, :f - images], k[:, :1], v[:, :1], None if bias is None else bias[:, :1])
        if images:
            q, k, v = (rearrange(z, "b r n h k -> (b r) 1 n h k") for z in (q[:, f - images:], k[:, 1:], v[:, 1:]))
            bias = None if bias is None else rearrange(bias[:, 1:], "b r l -> (b r) 1 l")
            y = torch.cat([y, rearrange(self.attend(q, k, v, bias), "(b r) 1 n d -> b r n d", b=b)], dim=1)
        return self.out(y)  # [b f n d]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        f = q.shape[1]
        q, k, v = (rearrange(z, "b f n h k -> b h (f n) k") for z in (q, k, v))
        bias = None if bias is None else rearrange(bias, "b 1 l -> b 1 1 l")
        return rearrange(attention(q, k, v, bias, self.backend), "b h (f n) k -> b f n (h k)", f=f)


class Block(nn.Module):
    """Self-attention, in spatial blocks text cross-attention, and an MLP, each added to the residual stream.

    Shift, scale and gate are a table of the block plus what the timestep gives to all blocks (adaLN-single).
    """

    def __init__(self, cfg: ModelConfig, along: str):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, cfg.width))
        self.attn = SelfAttention(cfg, along)
        self.cross = CrossAttention(cfg) if along == "space" else None
        self.mlp = nn.Sequential(nn.Linear(cfg.width, MLP_RATIO * cfg.width), nn.GELU(approximate="tanh"),
                                 nn.Linear(MLP_RATIO * cfg.width, cfg.width))

    def forward(self, x: Tensor, time: Tensor, text: Tensor | None = None, bias: Tensor | None = None,
                turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [b f n d]; time [b 1 1 6 d] or [b f 1 6 d]; text [b r l d] and bias [b r l] for space; turn for time."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + time).unbind(-2)  # each [b 1|f 1 d]
        x = torch.addcmul(x, gate1, self.attn(modulate(x, shift1, scale1), turn))      # [b f n d]
        if text is not None:
            x = x + self.cross(x, text, bias)                                          # [b f n d]
        return torch.addcmul(x, gate2, self.mlp(modulate(x, shift2, scale2)))          # [b f n d]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


class Latte(nn.Module):
    """The text-to-video Latte of any size, patch, length and frame count.

    A fresh model returns exactly 0 and every block of it is the identity: the tables, the timestep's last linear, the
    output of the cross-attention and the last linear start at zero. All other linears are Xavier-uniform, a fused
    projection as if its parts were separate. Published weights replace all of it.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, d, p = cfg, cfg.width, cfg.patch_size
        self.patch = nn.Linear(p * p * cfg.in_channels, d)
        self.time = nn.Sequential(nn.Linear(TIME_CHANNELS, d), nn.SiLU(), nn.Linear(d, d))
        self.time_blocks = nn.Linear(d, 6 * d)
        self.text = nn.Sequential(nn.Linear(cfg.text_channels, d), nn.GELU(approximate="tanh"), nn.Linear(d, d))
        self.spatial = nn.ModuleList(Block(cfg, "space") for _ in range(cfg.layers))
        self.temporal = nn.ModuleList(Block(cfg, "time") for _ in range(cfg.layers))
        self.table = nn.Parameter(torch.zeros(2, d))
        self.out = nn.Linear(d, p * p * cfg.out_channels)
        self.initialise()

    def initialise(self) -> None:
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                parts = {"qkv": 3, "kv": 2}.get(name.rpartition(".")[2], 1)
                for part in layer.weight.detach().chunk(parts):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(layer.bias)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.time_blocks, self.out, *(block.cross.out for block in self.spatial)):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None,
                labels: Tensor | None = None, image_frames: int = 0, frame_times: Tensor | None = None) -> Tensor:
        """Denoise: x [b f c h w] at timesteps t ([b], or [b f]: one for each frame) -> [b f out h w].

        text [b l d], text_mask [b l] with 1 = keep. Without text the cross-attention is left out.
        image_frames: the last so many frames are independent images, which the temporal blocks pass by; text may then be
        [b 1+image_frames l d], and its mask [b 1+image_frames l], with row 0 for the video's frames.
        frame_times: [f] or [b f] of the video's frames, in frames at the base rate; default 0, 1, 2, ... One video frame
        alone has no temporal position.
        Raises ValueError for shapes that do not fit the model, and for labels, which this model does not take.
        """
        cfg = self.cfg
        b, f, _, height, width = x.shape
        video = f - image_frames
        check(cfg, x, t, text, text_mask, labels, image_frames, frame_times)
        h, w, p, dtype = height // cfg.patch_size, width // cfg.patch_size, cfg.patch_size, self.table.dtype

        place = sincos_2d(h, w, cfg.sample_size // p, cfg.width, x.device, scale=max(cfg.sample_size // 64, 1))
        x = rearrange(x.to(dtype), "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=p)
        x = self.patch(x) + place.to(dtype)                                            # [b f n d]

        t = t[:, None] if t.ndim == 1 else t                                           # [b 1] or [b f]
        e = self.time(timestep_sinusoid(t).to(dtype))                                  # [b 1|f d]
        time = rearrange(self.time_blocks(F.silu(e)), "b f (six d) -> b f 1 six d", six=6)

        bias = None
        if text is not None:
            text = self.text(text.to(dtype))
            text = text if text.ndim == 4 else text[:, None]                           # [b r l d]
        if text_mask is not None:
            bias = (1 - text_mask.to(dtype)) * MASKED
            bias = bias if bias.ndim == 3 else bias[:, None]                           # [b r l]

        when, turn = None, None
        if video > 1:
            if frame_times is None:
                frame_times = torch.arange(video, device=x.device)
            frame_times = frame_times if frame_times.ndim == 2 else frame_times[None]  # [b|1 f]
            if cfg.temporal_positions == "rope":
                turn = tuple(y[:, :, None, None] for y in rope(frame_times, cfg.head_dim))  # [b|1 f 1 1 k/2]
            else:
                when = sincos(frame_times, cfg.width).to(dtype)[:, :, None]            # [b|1 f 1 d]

        for i, (spatial, temporal) in enumerate(zip(self.spatial, self.temporal)):
            x = spatial(x, time, text, bias)
            clip = x[:, :video]
            if i == 0 and when is not None:
                clip = clip + when
            clip = temporal(clip, time[:, :video], turn=turn)
            x = torch.cat([clip, x[:, video:]], dim=1) if image_frames else clip

        shift, scale = (self.table + e[:, :, None, None]).unbind(-2)                   # each [b 1|f 1 d]
        x = self.out(modulate(x, shift, scale))                                        # [b f n (p q c)]
        return rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", h=h, p=p, q=p)


def timestep_sinusoid(t: Tensor) -> Tensor:
    """Cosines then sines [... 256] in float32 of timesteps t [...], wavelengths 2 pi to 20000 pi."""
    half = TIME_CHANNELS // 2
    rate = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[..., None] * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def check(cfg, x, t, text, text_mask, labels, image_frames, frame_times) -> None:
    b, f, c, height, width = x.shape
    p = cfg.patch_size
    if labels is not None:
        raise ValueError("labels: this model is conditioned on text only; pass text instead")
    if c != cfg.in_channels:
        raise ValueError(f"x has {c} channels; model.in_channels is {cfg.in_channels}")
    if height % p or width % p:
        raise ValueError(f"x is {height}x{width}; both must divide by model.patch_size = {p}")
    if not 0 <= image_frames <= f:
        raise ValueError(f"image_frames must be 0 to the number of frames, {f}, got {image_frames}")
    if t.shape not in ((b,), (b, f)):
        raise ValueError(f"t must be [{b}] or [{b} {f}], one for each clip or for each frame, got {list(t.shape)}")
    if text is not None:
        if text.shape[-1] != cfg.text_channels:
            raise ValueError(f"text has {text.shape[-1]} channels; model.text_channels is {cfg.text_channels}")
        if text.shape[:-2] not in ((b,), (b, 1), (b, 1 + image_frames)):
            raise ValueError(f"text must be [{b} l d], or [{b} {1 + image_frames} l d] with one row for the video and one for "
                             f"each image, got {list(text.shape)}")
        if text_mask is not None and text_mask.shape != text.shape[:-1]:
            raise ValueError(f"text_mask must be {list(text.shape[:-1])} to fit the text, got {list(text_mask.shape)}")
    if frame_times is not None and frame_times.shape not in ((f - image_frames,), (b, f - image_frames)):
        raise ValueError(f"frame_times must be [{f - image_frames}] or [{b} {f - image_frames}], one for each video frame, "
                         f"got {list(frame_times.shape)}")


def flops(cfg: ModelConfig, frames: int, height: int, width: int, text_tokens: int) -> int:
    """Floating-point operations of one forward pass of one clip: matrix products only, two a multiply-add."""
    d, p, l = cfg.width, cfg.patch_size, text_tokens
    n = (height // p) * (width // p)
    m = frames * n
    space = 8 * m * d * d + 4 * m * n * d + 4 * m * d * d + 4 * l * d * d + 4 * m * l * d
    time = 8 * m * d * d + 4 * m * frames * d
    mlp = 4 * MLP_RATIO * m * d * d
    ends = 2 * m * d * p * p * (cfg.in_channels + cfg.out_channels)
    conditions = 2 * l * (cfg.text_channels * d + d * d) + 2 * (TIME_CHANNELS * d + d * d + 6 * d * d)
    return cfg.layers * (space + time + 2 * mlp) + ends + conditions

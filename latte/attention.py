"""attention(q, k, v, bias) on one of five back-ends, and the positions that go with it.

The choice of back-end lives here only. Every back-end computes the same formula and is tested against it.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def _math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [b heads n l]
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1).to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if bias is not None:
        # Its kernels want the whole bias, in rows that start on a multiple of 8 elements.
        b, heads, n, _ = q.shape
        l = k.shape[-2]
        bias = F.pad(bias, (0, -l % 8)).expand(b, heads, n, -1).contiguous()[..., :l]
    q, k, v = (rearrange(x, "b heads n k -> b n heads k") for x in (q, k, v))
    return rearrange(memory_efficient_attention(q, k, v, attn_bias=bias), "b n heads k -> b heads n k")


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_func

    if bias is not None:  # the package takes no bias; only text masks have one, and their keys are few
        return _sdpa(q, k, v, bias)
    q, k, v = (rearrange(x, "b heads n k -> b n heads k") for x in (q, k, v))
    return rearrange(flash_attn_func(q, k, v), "b n heads k -> b heads n k")


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    score_mod = None
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])

        def score_mod(score, b, head, n, l):
            return score + bias[b, head, n, l]

    return _compiled_flex()(q, k, v, score_mod=score_mod)


BACKENDS = {"sdpa": _sdpa, "math": _math, "xformers": _xformers, "flash": _flash, "flex": _flex}


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v  (Vaswani et al., 2017).

    q [b heads n d], k and v [b heads l d]; bias broadcasts to [b heads n l] and has no gradient. Returns [b heads n d].
    Raises ValueError when the back-end cannot run on this device, type and head size.
    """
    if backend not in ("sdpa", "math") and not torch.compiler.is_compiling():
        require(backend, q.device.type, q.dtype, q.shape[-1], torch.is_grad_enabled() and q.requires_grad)
    return BACKENDS[backend](q, k, v, None if bias is None else bias.to(q.dtype))


def require(backend: str, device: str, dtype: torch.dtype, head_dim: int, backward: bool = True) -> None:
    """Raise ValueError unless one small real call of the back-end works here."""
    reason = _why_not(backend, device, dtype, head_dim, backward)
    if reason:
        raise ValueError(f"model.attention: {backend!r} cannot run here ({device}, {dtype}, head_dim {head_dim}): {reason}. "
                         "Use sdpa, which runs everywhere.")


@functools.cache
def _why_not(backend: str, device: str, dtype: torch.dtype, head_dim: int, backward: bool) -> str:
    with torch.enable_grad():
        q, k, v = (torch.randn(1, 2, 128, head_dim, device=device, dtype=dtype, requires_grad=backward) for _ in range(3))
        try:
            out = BACKENDS[backend](q, k, v, None)
            if backward:
                out.sum().backward()
        except Exception as error:  # a package may refuse with any type of its own
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return ""


def sincos(positions: Tensor, width: int) -> Tensor:
    """Sine-cosine table [... width] in float64 for positions [...]: sines first, wavelengths 2 pi to 20000 pi."""
    rate = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64, device=positions.device) / (width // 2))
    angle = positions.double()[..., None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def sincos_2d(height: int, width: int, base: int, dim: int, device: torch.device, scale: float = 1.0) -> Tensor:
    """Table [(height width) dim] in float64 of a grid of patches; the column fills the first half of dim, the row the second.

    Any grid is stretched over the positions 0 .. base / scale that a base x base grid has, as in PixArt-alpha.
    """
    column = torch.arange(width, device=device) * (base / width / scale)
    row = torch.arange(height, device=device) * (base / height / scale)
    table = torch.cat([sincos(column, dim // 2).expand(height, width, -1),
                       sincos(row, dim // 2)[:, None].expand(height, width, -1)], dim=-1)
    return rearrange(table, "h w d -> (h w) d")


def rope(times: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [... head_dim/2] in float32 of the angles by which rotate() turns at times [...] (Su et al., 2021)."""
    sin, cos = sincos(times, head_dim).float().chunk(2, dim=-1)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + d/2) of the last axis of x [... d] by its angle, so that q . k depends on time differences only."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

"""attention(q, k, v, bias) on one of five back-ends, and the positions that go with it.

The choice of back-end lives here only. Every back-end computes the same formula and is tested against it.
Letters: b batch, n queries, l keys, k channels of one head.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

PLAIN_LOGITS = 256 * 256  # of one head; up to here the plain formula replaces the fused kernel for bfloat16 on a CPU


def _math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)  # [b heads n l]
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    # In bfloat16 on a CPU, forward and backward, torch 2.13's fused kernel takes 7 to 10 times as long as the formula for 16
    # tokens, 2.6 to 3.8 times for 128 and about as long for 1024. The batch has no say, or it would change a sample's numbers.
    if q.device.type == "cpu" and q.dtype != torch.float32 and q.shape[-2] * k.shape[-2] <= PLAIN_LOGITS:
        return _math(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if bias is not None:  # it takes no bias that broadcasts by itself, and wants rows that start on a multiple of 8 elements
        n, l = q.shape[-2], k.shape[-2]
        bias = F.pad(bias, (0, -l % 8))[..., :l].expand(*q.shape[:2], n, l)
    q, k, v = (rearrange(x, "b heads n k -> b n heads k") for x in (q, k, v))
    return rearrange(memory_efficient_attention(q, k, v, attn_bias=bias), "b n heads k -> b heads n k")


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_func

    if bias is not None:  # flash_attn takes no bias; only masked text needs one, and its keys are few
        return _sdpa(q, k, v, bias)
    q, k, v = (rearrange(x, "b heads n k -> b n heads k") for x in (q, k, v))
    return rearrange(flash_attn_func(q, k, v), "b n heads k -> b heads n k")


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    score_mod = None
    if bias is not None:
        bias = bias.expand(*q.shape[:-1], k.shape[-2])

        def score_mod(score, b, head, n, l):
            return score + bias[b, head, n, l]

    # Its kernel exists only compiled, and only for GPUs with a backward pass; on a CPU it runs unfused, for tests.
    if q.device.type != "cpu" and not torch.compiler.is_compiling():
        return _compiled(flex_attention)(q, k, v, score_mod=score_mod)
    return flex_attention(q, k, v, score_mod=score_mod)


_compiled = functools.cache(torch.compile)

BACKENDS = {"sdpa": _sdpa, "math": _math, "xformers": _xformers, "flash": _flash, "flex": _flex}


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(k) + bias) v  (Vaswani et al., 2017).

    q [b heads n k], k and v [b heads l k]; bias broadcasts to [b heads n l] and gets no gradient. Returns [b heads n k].
    Of a single key and no bias, as a frame that is one token has it, the softmax is 1 and nothing is computed.
    Raises ValueError when the back-end cannot run here.
    """
    if backend not in ("sdpa", "math") and not torch.compiler.is_compiling():
        require(backend, q.device.type, q.dtype, q.shape[-1], q.requires_grad)
    if k.shape[-2] == 1 and bias is None:
        return v.expand_as(q) + (q[..., :0].sum() + k[..., :0].sum())  # of nothing: gradients of 0 for what made q and k
    return BACKENDS[backend](q, k, v, None if bias is None else bias.to(q.dtype))


def require(backend: str, device: str, dtype: torch.dtype, head_dim: int, backward: bool) -> None:
    """Raise ValueError, naming model.attention, unless a small real call of the back-end works."""
    reason = _why_not(backend, device, dtype, head_dim, backward)
    if reason:
        raise ValueError(f"model.attention: {backend} cannot run here ({device}, {dtype}, head_dim {head_dim}"
                         f"{', with gradients' if backward else ''}): {reason}. Use sdpa, which runs everywhere")


@functools.cache
def _why_not(backend: str, device: str, dtype: torch.dtype, head_dim: int, backward: bool) -> str:
    q, k, v = (torch.zeros(1, 2, 128, head_dim, device=device, dtype=dtype, requires_grad=backward) for _ in range(3))
    try:
        with torch.enable_grad():
            out = BACKENDS[backend](q, k, v, None)
            if backward:
                out.sum().backward()
    except Exception as error:  # a package may refuse with any type of its own
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def sincos(positions: Tensor, width: int) -> Tensor:
    """Sine-cosine table [... width] in float64 of positions [...]: all sines, then all cosines (Vaswani et al., 2017)."""
    rates = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64, device=positions.device) / (width // 2))
    angles = positions.double()[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Table [(h w) width] in float64 of rows [h] and columns [w]: first half of width from the column, second from the row."""
    row, column = sincos(rows, width // 2), sincos(columns, width // 2)
    shape = (len(rows), len(columns), width // 2)
    return torch.cat([column.expand(shape), row[:, None].expand(shape)], dim=-1).flatten(0, 1)


def rope(times: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [... head_dim/2] in float32 of the angles by which rotate() turns at times [...] (Su et al., 2021)."""
    sin, cos = sincos(times, head_dim).float().chunk(2, dim=-1)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + k/2) of the last axis of x [... k] by its angle: q . k then depends on time differences."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

"""A block's forward pass on a CPU in as few passes over memory as it takes, for sampling: no gradients, one clip at a time.

The numbers are the plain block's up to rounding. Shift and scale are the norm's own bias and weight; gates are folded into the
weights of the linear before them; GELU and residual sums are part of oneDNN's matrix product. What it works on is meant to be a
tile small enough for the processor's cache and for memory that the allocator has at hand (see latte.memory.apply).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.attention import attention, rotate
from latte.model import Block, CrossAttention, SelfAttention
from latte.ops import EPS, autocast_dtype

FEW_KEYS = 256
_linear = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None


def fits(block: Block, x: Tensor, mod: Tensor, text: Tensor | None) -> bool:
    """Whether this block's forward pass on x [b f n d] can take the short way."""
    if x.dtype == torch.bfloat16 and _linear is not None and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return not (torch.is_grad_enabled() or autocast_dtype("cpu") or _linear is None or x.device.type != "cpu"
                or mod.shape[1] > 1 or (text is not None and text.shape[1] > 1) or x.dtype not in (torch.float32, torch.bfloat16)
                or any(type(m) is not nn.Linear for m in (block.attn.qkv, block.attn.out, block.mlp[0], block.mlp[2])))


class Clip:
    """What a block needs of one clip, whatever the tile: modulation [6 d], weights with the gates in them, keys and values."""

    def __init__(self, block: Block, mod: Tensor, text: Tensor | None, bias: Tensor | None):
        """mod [1 1 6 d] or [1 1 d], text [1 1 l d], bias [1 1 l]."""
        mod = block.table + mod if hasattr(block, "table") else block.modulation(mod).unflatten(-1, (6, -1))
        mod = mod.view(6, -1)
        self.block = block
        self.shift1, _, gate1, self.shift2, _, gate2 = mod.unbind()
        self.scale1, self.scale2 = (1 + mod[1::3]).unbind()
        self.out, self.fc2 = (_gated(linear, gate) for linear, gate in ((block.attn.out, gate1), (block.mlp[2], gate2)))
        if block.cross is not None and text is not None:
            heads = (2, block.cross.heads, -1)
            k, v = block.cross.kv(text[0, 0]).unflatten(-1, heads).permute(1, 2, 0, 3)[:, None]    # each [1 h l k]
            self.k, self.v = k, v
            self.bias = None if bias is None else bias.view(1, 1, 1, -1)

    def __call__(self, x: Tensor, axis: int, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [f n d], attention within each frame (axis 1) or along time (axis 2); turn as in SelfAttention. Returns [f n d]."""
        if axis == 2:
            turn = None if turn is None else tuple(y.view(len(x), 1, -1) for y in turn)
            return self._rows(x.transpose(0, 1).contiguous(), turn).transpose(0, 1)
        return self._rows(x, None)

    def _rows(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [g r d], self-attention among the r tokens of each of g rows; turn: cosines and sines [r 1 k/2]."""
        block, width = self.block, x.shape[-1:]
        h = F.layer_norm(x, width, self.scale1, self.shift1, EPS)
        x = _add_linear(x, _self(block.attn, h, turn), *self.out)
        if hasattr(self, "k"):
            y = _cross(block.cross, x, self.k, self.v, self.bias)
            x = _add_linear(x, y, block.cross.out.weight, block.cross.out.bias)
        h = F.layer_norm(x, width, self.scale2, self.shift2, EPS)
        h = _linear(h, block.mlp[0].weight, block.mlp[0].bias, "gelu", [], "tanh")
        return _add_linear(x, h, *self.fc2)


def _add_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x + linear(y), in one pass."""
    if type(x) is not Tensor:  # a tensor without values, by which memory is planned: the fused product has no rule for those
        return torch.addmm(x.flatten(0, 1), y.flatten(0, 1), weight.t()).view_as(x)
    return _linear.binary(y, x, weight, bias, "add")


def _gated(linear: nn.Linear, gate: Tensor) -> tuple[Tensor, Tensor]:
    return linear.weight * gate[:, None], linear.bias * gate


def _self(attn: SelfAttention, h: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    q, k, v = attn.qkv(h).unflatten(-1, (3, attn.heads, -1)).unbind(2)                             # each [g r h k]
    q, k = attn.norm(q, k)
    if turn is not None:
        q, k = rotate(q, *turn), rotate(k, *turn)
    y = _attention(*(y.transpose(1, 2) for y in (q, k, v)), None, attn.backend)                    # [g h r k]
    return y.transpose(1, 2).flatten(2)


def _cross(cross: CrossAttention, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    q = cross.q(x).flatten(0, 1).unflatten(-1, (cross.heads, -1))                                  # [(g r) h k]
    q, k = cross.norm(q, k)
    q = q.transpose(0, 1)[None]                                                                     # [1 h (g r) k]
    return _attention(q, k, v, bias, cross.backend)[0].transpose(0, 1).reshape(x.shape)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """As latte.attention.attention; among few keys in bfloat16 by two batched products, which beats the fused kernel there."""
    if backend != "sdpa" or q.dtype == torch.float32 or k.shape[-2] > FEW_KEYS:
        return attention(q, k, v, bias, backend)
    bias = q.new_zeros(1, 1, 1) if bias is None else bias.to(q.dtype).flatten(0, 1)
    rows, keys, values = (y.flatten(0, 1) for y in (q, k, v))
    logits = torch.baddbmm(bias, rows, keys.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(logits.softmax(-1), values).unflatten(0, q.shape[:2])

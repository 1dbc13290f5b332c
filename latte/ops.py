"""The two operations of a block around attention and MLP, keeping as little as possible for the backward pass.

Both are exact: their gradients, of the first order, are those of the plain formula, to which they fall back where a clip has
several timesteps, where a linear has adapters, in float16, and in compiled code, which fuses the formula by itself. Of 43 * width
values a token that a layer pair keeps by the formulas, 23 * width are left, without computing any matrix product again: norms and
GELU are computed again from their inputs, and the gradient of a gate comes from the product that is needed for the weight's
gradient anyway.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPS = 1e-6


def autocast_dtype(device: str) -> torch.dtype | None:
    """The precision of matrix products that autocast asks for on a kind of device, if it is on."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift  (Peebles and Xie, arXiv 2212.09748); x [b f n d], the others [b 1|f 1|n d]."""
    if shift.shape[:2] == (1, 1) and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return F.layer_norm(x, x.shape[-1:], (1 + scale).flatten().to(x.dtype), shift.flatten().to(x.dtype), EPS)  # in one pass
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def norm_linear(x: Tensor, shift: Tensor, scale: Tensor, linear: nn.Linear) -> Tensor:
    """linear(modulate(x, shift, scale)): x [b f n d], shift and scale [b 1|f 1 d]. Returns [b f n out]."""
    if not _short(linear, x, shift):
        return linear(modulate(x, shift, scale))
    weights = _cast(linear, x)
    with torch.autocast(x.device.type, enabled=False) if autocast_dtype(x.device.type) else nullcontext():
        return _NormLinear.apply(x, shift, 1 + scale, *weights)


def add_gated(x: Tensor, gate: Tensor, y: Tensor, linear: nn.Linear, gelu: bool = False) -> Tensor:
    """x + gate * linear(y), or linear(GELU(y)) with the tanh form of GELU: x [b f n d], gate [b 1|f 1 d], y [b f n in]."""
    if not _short(linear, x, gate) or x.shape[1] * x.shape[2] < linear.in_features:  # a product for each clip would cost more
        return torch.addcmul(x, gate, linear(F.gelu(y, approximate="tanh") if gelu else y))
    weights = _cast(linear, x)
    with torch.autocast(x.device.type, enabled=False) if autocast_dtype(x.device.type) else nullcontext():
        change = _GatedLinear.apply(gate, y, *weights, gelu)
        with torch.no_grad():
            y = y.to(weights[0].dtype)
            out = torch.addcmul(x, gate.to(x.dtype), F.linear(F.gelu(y, approximate="tanh") if gelu else y, *weights))
        return _Sum.apply(x, change, out)


def _short(linear: nn.Module, x: Tensor, row: Tensor) -> bool:
    if type(linear) is not nn.Linear:
        return False
    half = torch.float16 in (autocast_dtype(x.device.type), linear.weight.dtype)  # whose sums without the gate might overflow
    return (torch.is_grad_enabled() and row.shape[1] == 1 and not half
            and not torch.compiler.is_compiling())


def _cast(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias in the precision of the product."""
    dtype = autocast_dtype(x.device.type) or linear.weight.dtype
    return linear.weight.to(dtype), linear.bias.to(dtype)


def _normed(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """layer_norm(x) * scale + shift in `dtype`, and mean and 1 / deviation of the norm."""
    d = x.shape[-1]
    if len(x) == 1:  # one clip: they are the norm's own weight and bias
        h, mean, rstd = torch.native_layer_norm(x, (d,), scale.to(x.dtype).view(d), shift.to(x.dtype).view(d), EPS)
    else:
        h, mean, rstd = torch.native_layer_norm(x, (d,), None, None, EPS)
        h = torch.addcmul(shift.to(x.dtype), h, scale.to(x.dtype))
    return h.to(dtype), mean, rstd


class _NormLinear(torch.autograd.Function):
    """Keeps x alone; its norm is computed again."""

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, shift, scale, weight)
        return F.linear(_normed(x, shift, scale, weight.dtype)[0], weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, shift, scale, weight = ctx.saved_tensors
        d = x.shape[-1]
        h, mean, rstd = _normed(x, shift, scale, weight.dtype)
        rows = dy.reshape(-1, dy.shape[-1])
        dweight = rows.t() @ h.reshape(-1, d) if ctx.needs_input_grad[3] else None
        dbias = rows.sum(0) if ctx.needs_input_grad[4] else None
        del h
        dh = (rows @ weight).view(x.shape).to(x.dtype)
        if len(x) == 1:
            dx, dscale, dshift = torch.ops.aten.native_layer_norm_backward(
                dh, x, (d,), mean, rstd, scale.to(x.dtype).view(d), shift.to(x.dtype).view(d), (True, True, True))
        else:
            dshift = dh.sum((1, 2))
            dscale = (dh * ((x - mean) * rstd)).sum((1, 2))
            dx, _, _ = torch.ops.aten.native_layer_norm_backward(
                dh * scale.to(x.dtype), x, (d,), mean, rstd, None, None, (True, False, False))
        return dx, dshift.view(shift.shape).to(shift.dtype), dscale.view(scale.shape).to(scale.dtype), dweight, dbias


class _Sum(torch.autograd.Function):
    """x + change, already known as `out`."""

    @staticmethod
    def forward(ctx, x: Tensor, change: Tensor, out: Tensor) -> Tensor:
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        return dout, dout, None


class _GatedLinear(torch.autograd.Function):
    """gate * linear(y), of which only the gradient is computed here: keeping y comes before the product, so that a block which is
    computed again for the backward pass can stop without the MLP's second product. The result has no values.

    The gate's gradient, token by token dx * linear(y), comes from P = dx^T y, whose rows times the gate are the weight's gradient:
    it is the sum of P * weight along the rows, plus bias times the sum of dx.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, y, weight, bias)
        ctx.gelu = gelu
        return torch.zeros((), dtype=torch.promote_types(gate.dtype, y.dtype), device=y.device).expand(*y.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor):
        gate, y, weight, bias = ctx.saved_tensors
        rows = dx.reshape(len(dx), -1, dx.shape[-1]).to(weight.dtype)                               # [b m d]
        gates = gate.view(len(gate), -1)                                                            # [b d]
        dgate = dweight = dbias = dy = None
        if any(ctx.needs_input_grad[i] for i in (0, 2, 3)):
            z = y.to(weight.dtype)
            z = (F.gelu(z, approximate="tanh") if ctx.gelu else z).reshape(len(y), -1, y.shape[-1])  # [b m in]
            product = (rows.transpose(1, 2) @ z).to(gates.dtype)                                    # [b d in]
            del z
            total = rows.sum(1, dtype=gates.dtype)                                                  # [b d]
            dgate = ((product * weight).sum(2) + bias * total).view(gate.shape)
            dweight = torch.einsum("bd,bdi->di", gates, product).to(weight.dtype)
            dbias = (gates * total).sum(0).to(bias.dtype)
        if ctx.needs_input_grad[1]:
            dy = (rows @ (gates[:, :, None] * weight).to(weight.dtype)).view(y.shape)               # [b m in]
            if ctx.gelu:
                dy = torch.ops.aten.gelu_backward(dy, y.to(dy.dtype), approximate="tanh")
            dy = dy.to(y.dtype)
        return dgate, dy, dweight, dbias, None

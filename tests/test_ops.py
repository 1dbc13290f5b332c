"""The operations around attention and MLP against their plain formulas, forward and backward, and what they keep."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latte import ops


def formula(name, x, shift, scale, linear):
    if name == "norm_linear":
        return linear(ops.modulate(x, shift, scale))
    return torch.addcmul(x, scale, linear(F.gelu(shift, approximate="tanh") if name == "gelu" else shift))


def operation(name, x, shift, scale, linear):
    return ops.norm_linear(x, shift, scale, linear) if name == "norm_linear" else (
        ops.add_gated(x, scale, shift, linear, gelu=name == "gelu"))


def given(name, clips, rows, dtype=torch.float64, width=8, wide=12):
    """x, then shift and scale of a norm, or what goes through the linear and a gate."""
    torch.manual_seed(3)
    x, row = torch.randn(clips, 3, 5, width), (clips, rows, 1, width)
    shape = row if name == "norm_linear" else (clips, 3, 5, wide)
    linear = nn.Linear(width, wide) if name == "norm_linear" else nn.Linear(wide, width)
    values = [x, torch.randn(shape), torch.randn(row)]
    return [y.to(dtype).requires_grad_() for y in values], linear.to(dtype)


NAMES = ("norm_linear", "add_gated", "gelu")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_formula_s(name, clips, rows):
    """In float64, with numerical derivatives as a second witness."""
    values, linear = given(name, clips, rows)
    parameters = list(linear.parameters())
    mine, plain = operation(name, *values, linear), formula(name, *values, linear)
    torch.testing.assert_close(mine, plain, atol=1e-12, rtol=1e-12)
    seed = torch.randn_like(plain)
    grads = [torch.autograd.grad(y, [*values, *parameters], seed) for y in (mine, plain)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    assert torch.autograd.gradcheck(lambda *v: operation(name, *v, linear), values)


@pytest.mark.parametrize("name", NAMES)
def test_in_autocast_and_bfloat16(name):
    """Rounding apart: each is as near to float64 as the formula is."""
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        values, linear = given(name, 2, 1, dtype, 16, 15)
        exact = [y.detach().double().requires_grad_() for y in values]
        true = nn.Linear(linear.in_features, linear.out_features).double()
        true.load_state_dict({key: y.double() for key, y in linear.state_dict().items()})
        wanted = torch.autograd.grad(formula(name, *exact, true).square().sum(), [*exact, *true.parameters()])
        far = []
        for run in (operation, formula):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = run(name, *values, linear)
            grads = torch.autograd.grad(y.float().square().sum(), [*values, *linear.parameters()])
            assert [g.dtype for g in grads] == [v.dtype for v in (*values, *linear.parameters())]
            far.append(max(((a - b).norm() / b.norm()).item() for a, b in zip(grads, wanted, strict=True)))
        assert far[0] < 1.5 * far[1] + 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_only_inputs_are_kept(name):
    values, linear = given(name, 1, 1)
    known, more = {y.untyped_storage().data_ptr() for y in (*values, *linear.parameters())}, []

    def pack(y):
        if y.untyped_storage().data_ptr() not in known and y.numel() >= values[0].numel():
            more.append(tuple(y.shape))
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        operation(name, *values, linear)
    assert not more


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_get_no_gradient(name):
    values, linear = given(name, 2, 1)
    linear.requires_grad_(False)
    values[2].requires_grad_(False)
    operation(name, *values, linear).sum().backward()
    assert values[0].grad is not None and values[1].grad is not None and linear.weight.grad is None


@pytest.mark.parametrize("name", ["add_gated", "gelu"])
def test_float16_takes_the_formula(name):
    """A small gate keeps sums of large scaled gradients finite there, if it comes before them."""
    values, linear = given(name, 1, 1, torch.float16)
    values[2] = (values[2].detach() * 1e-3).requires_grad_()
    seed = torch.full_like(values[0], 6e4)
    grads = torch.autograd.grad(operation(name, *values, linear), [values[1], *linear.parameters()], seed)
    assert all(g.isfinite().all() for g in grads)


def test_a_layer_with_adapters_takes_the_formula():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    values, _ = given("norm_linear", 1, 1)
    adapted = Adapted(8, 12).double()
    torch.testing.assert_close(operation("norm_linear", *values, adapted), formula("norm_linear", *values, adapted))

"""Every attention back-end against the plain formula, forward and backward; positions against their definitions."""

import math
import sys
import types

import pytest
import torch
from diffusers.models import embeddings

from latte import attention as module
from latte.attention import BACKENDS, attention, require, rope, rotate, sincos, sincos_2d

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
MASKED = -10000.0


def tensors(n, l, device="cpu", dtype=torch.float32, head_dim=16, grad=True):
    generator = torch.Generator().manual_seed(n + 100 * l)
    shapes = [(2, 3, n, head_dim), (2, 3, l, head_dim), (2, 3, l, head_dim)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad) for shape in shapes]


def text_bias(l, device="cpu"):
    keep = torch.ones(2, 1, 1, l, device=device)
    keep[0, ..., l // 2:] = 0
    return MASKED * (1 - keep)


def formula(q, k, v, bias=None):
    """In float64 and written without the module's help; returns the output and the gradients of a fixed weighted sum."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    logits = torch.einsum("bhnk,bhlk->bhnl", q, k) / math.sqrt(q.shape[-1]) + (0 if bias is None else bias.double())
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    y = torch.einsum("bhnl,bhlk->bhnk", weights, v)
    return y.detach(), torch.autograd.grad((y * ramp(y)).sum(), (q, k, v))


def ramp(y):
    return torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)


@pytest.fixture
def fresh_probes():
    module._why_not.cache_clear()
    yield
    module._why_not.cache_clear()


# ---- back-ends ----


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n, l", [(5, 7), (16, 16), (40, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_the_formula(backend, n, l, masked, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    close = dict(rtol=1e-5, atol=2e-6) if device == "cpu" else dict(rtol=3e-2, atol=3e-2)
    backward = not (backend == "flex" and device == "cpu")  # flex_attention itself has no backward pass on a CPU
    q, k, v = tensors(n, l, device, dtype, head_dim=32, grad=backward)
    try:
        require(backend, device, dtype, 32, backward)
    except ValueError as error:
        pytest.skip(str(error))
    bias = text_bias(l, device) if masked else None
    expected, gradients = formula(q, k, v, bias)
    y = attention(q, k, v, bias, backend)
    assert y.dtype == dtype and y.shape == q.shape
    torch.testing.assert_close(y.double(), expected, **close)
    if backward:
        for mine, theirs in zip(torch.autograd.grad((y * ramp(y)).sum(), (q, k, v)), gradients, strict=True):
            torch.testing.assert_close(mine.double(), theirs, **close)


@pytest.mark.parametrize("n", [1, 5])
def test_of_a_single_key_nothing_is_computed_and_all_have_gradients(n):
    q, k, v = tensors(n, 1)
    expected, gradients = formula(q, k, v)
    y = attention(q, k, v)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-7)
    for mine, theirs in zip(torch.autograd.grad((y * ramp(y)).sum(), (q, k, v)), gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [0, 256 * 256])
def test_bfloat16_on_a_cpu_equals_the_formula_either_way(monkeypatch, limit):
    monkeypatch.setattr(module, "PLAIN_LOGITS", limit)
    q, k, v = tensors(16, 20, dtype=torch.bfloat16)
    expected, gradients = formula(q, k, v, text_bias(20))
    y = attention(q, k, v, text_bias(20))
    assert torch.equal(y, attention(q, k, v, text_bias(20), "math")) == (limit > 0)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(torch.autograd.grad((y * ramp(y)).sum(), (q, k, v)), gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-2, atol=2e-2)


def test_text_that_is_masked_altogether_gives_finite_numbers():
    q, k, v = tensors(4, 6)
    for backend in ("sdpa", "math"):
        y = attention(q, k, v, torch.full((2, 1, 1, 6), MASKED), backend)  # as without a mask, but for rounding at 10,000
        torch.testing.assert_close(y.double(), formula(q, k, v)[0], rtol=1e-2, atol=1e-2)


def packages(monkeypatch):
    """Stand-ins for flash_attn and xformers with their layout [b n heads k] and their rules, computed by the formula."""

    def flash_attn_func(q, k, v):
        return torch.einsum("bhnl,blhk->bnhk", (torch.einsum("bnhk,blhk->bhnl", q, k) / math.sqrt(q.shape[-1])).softmax(-1), v)

    def memory_efficient_attention(q, k, v, attn_bias=None):
        logits = torch.einsum("bnhk,blhk->bhnl", q, k) / math.sqrt(q.shape[-1])
        if attn_bias is not None:
            assert attn_bias.shape == logits.shape and attn_bias.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
            logits = logits + attn_bias
        return torch.einsum("bhnl,blhk->bnhk", logits.softmax(-1), v)

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["flash", "xformers"])
def test_layout_handed_to_the_packages(monkeypatch, fresh_probes, backend, masked):
    packages(monkeypatch)
    q, k, v = tensors(5, 7)
    bias = text_bias(7) if masked else None
    torch.testing.assert_close(attention(q, k, v, bias, backend).double(), formula(q, k, v, bias)[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend, missing", [("flash", "flash_attn"), ("xformers", "xformers.ops")])
def test_a_missing_package_is_named(monkeypatch, fresh_probes, backend, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"model\.attention: {backend} cannot run here \(cpu.*{missing}.*sdpa"):
        attention(*tensors(4, 4), backend=backend)


def test_a_backend_that_is_there_but_refuses_is_named(monkeypatch, fresh_probes):
    def refuse(q, k, v, bias):
        raise NotImplementedError("no kernel for this\ndetails")

    monkeypatch.setitem(BACKENDS, "xformers", refuse)
    with pytest.raises(ValueError, match=r"model\.attention: xformers .* NotImplementedError: no kernel for this\. Use sdpa"):
        attention(*tensors(4, 4), backend="xformers")


def test_the_probe_goes_backward_where_the_call_would(monkeypatch, fresh_probes):
    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return module._math(q, k, v, None)

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no way back")

    monkeypatch.setitem(BACKENDS, "flash", lambda q, k, v, bias: ForwardOnly.apply(q, k, v))
    assert attention(*tensors(4, 4, grad=False), backend="flash").shape == (2, 3, 4, 16)
    with pytest.raises(ValueError, match="with gradients.*no way back"):
        attention(*tensors(4, 4), backend="flash")


def test_flex_says_that_it_cannot_train_on_a_cpu():
    with pytest.raises(ValueError, match=r"model\.attention: flex .* with gradients.*backward"):
        attention(*tensors(4, 4), backend="flex")


# ---- positions ----


def test_sincos_is_the_published_table():
    table = sincos(torch.arange(128), 24)
    assert table.dtype == torch.float64 and table.shape == (128, 24)
    theirs = embeddings.get_1d_sincos_pos_embed_from_grid(24, torch.arange(128).double(), output_type="pt")
    torch.testing.assert_close(table, theirs.double(), rtol=0, atol=1e-6)
    assert table[5, 0] == math.sin(5) and table[5, 12] == math.cos(5) and table[3, 1] == math.sin(3 * 10000 ** (-1 / 12))


def test_sincos_of_every_eighth_frame_is_every_eighth_row():
    assert torch.equal(sincos(torch.arange(0, 128, 8.0), 24), sincos(torch.arange(128), 24)[::8])


def test_sincos_2d_has_the_column_first():
    table = sincos_2d(torch.arange(3), torch.arange(5), 16).view(3, 5, 16)
    assert torch.equal(table[1, 2], torch.cat([sincos(torch.tensor(2), 8), sincos(torch.tensor(1), 8)]))
    theirs = embeddings.get_2d_sincos_pos_embed(16, (4, 4), base_size=4, output_type="pt")
    torch.testing.assert_close(sincos_2d(torch.arange(4), torch.arange(4), 16), theirs.double(), rtol=0, atol=1e-6)


def test_rotary_products_depend_on_time_differences_only():
    q, k = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()

    def product(time_q, time_k):
        turned = [rotate(x, *rope(torch.tensor([t]), 12)) for x, t in ((q, time_q), (k, time_k))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(3, 10), product(103, 110), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(0, 0), (q * k).sum())
    assert (product(3, 10) - product(3, 12)).abs() > 0.1
    torch.testing.assert_close(rotate(q, *rope(torch.tensor([77.5]), 12)).norm(), q.norm())


def test_rotary_pairs_turn_by_their_own_rate():
    cos, sin = rope(torch.tensor([2.0]), 4)
    torch.testing.assert_close(cos, torch.tensor([[math.cos(2), math.cos(0.02)]]))
    torch.testing.assert_close(sin, torch.tensor([[math.sin(2), math.sin(0.02)]]))
    turned = rotate(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), cos, sin)
    torch.testing.assert_close(turned, torch.tensor([[math.cos(2), -math.sin(0.02), math.sin(2), math.cos(0.02)]]))

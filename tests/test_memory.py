"""Saving memory changes no numbers: every lever against the plain model, forward and backward."""

import copy
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latte import lean, memory
from latte.config import MemoryConfig, ModelConfig
from latte.model import Latte

SHAPE = {"layers": 2, "heads": 2, "head_dim": 32, "text_channels": 24, "sample_size": 16}
MODELS = {
    "plain": {}, "rope and query-key norm": {"temporal_positions": "rope", "qk_norm": True},
    "modulation of each block": {"modulation": "block"}, "without text": {"conditioning": "none"},
}
INPUTS = {"clips": (0, False), "images joined": (2, False), "a timestep a frame": (0, True), "both": (2, True)}
LEVERS = {
    "block inputs": {"activations": 0}, "half": {"activations": 0.5}, "most": {"activations": 0.9},
    "tiles": {"tile_tokens": 100}, "tiles that divide": {"tile_tokens": 192}, "one frame or position at a time": {"tile_tokens": 1},
    "chunks": {"mlp_chunks": 3}, "block inputs on the host": {"activations": 0, "offload": True},
    "half, inputs on the host": {"activations": 0.5, "offload": True},
    "all": {"tile_tokens": 130, "offload": True, "mlp_chunks": 2},
}


def model_of(levers=None, seed=1, **changes):
    torch.manual_seed(seed)
    model = Latte(ModelConfig(**{**SHAPE, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    memory.apply(model, MemoryConfig(**(levers or {})))
    return model


def run(model, images, each, grad, dtype=torch.float32, autocast=False, clips=2):
    """Output, and with `grad` all gradients, of clips with different text and positions in time."""
    torch.manual_seed(2)
    frames = 6 + images
    x = torch.randn(clips, frames, 4, 16, 16, dtype=dtype, requires_grad=grad)
    t = torch.rand(clips, frames) * 900 if each else torch.rand(clips) * 900
    given = {}
    if model.cfg.conditioning == "text":
        text = torch.randn(clips, *[1 + images] * bool(images), 9, 24, dtype=dtype)
        mask = torch.ones(text.shape[:-1])
        mask[0, ..., 6:] = 0
        given = {"text": text, "text_mask": mask}
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x, t, image_frames=images, frame_times=torch.rand(clips, 6) * 9, **given)
    if not grad:
        return [y]
    y.float().square().mean().backward()
    return [y.detach(), x.grad] + [p.grad for p in model.parameters()]


def furthest(mine, plain):
    pairs = [(a.float(), b.float()) for a, b in zip(mine, plain, strict=True)]
    return max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs)


@pytest.mark.parametrize(("kind", "inputs"), [(kind, "clips") for kind in MODELS] + [("plain", i) for i in INPUTS if i != "clips"])
@pytest.mark.parametrize("name", LEVERS)
def test_a_lever_changes_no_number(name, kind, inputs, monkeypatch):
    monkeypatch.setattr(memory, "OFFLOADED_FROM", 1000)
    images, each = INPUTS[inputs]
    for grad in (True, False):
        plain = run(model_of(**MODELS[kind]), images, each, grad)
        mine = run(model_of(LEVERS[name], **MODELS[kind]), images, each, grad)
        assert furthest(mine, plain) < 2e-6
        if name in ("block inputs", "half", "most"):  # the same arithmetic on the same shapes
            assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


@pytest.mark.parametrize(("kind", "clips"), [("plain", 2), ("modulation of each block", 1)])
@pytest.mark.parametrize("name", LEVERS)
def test_in_bfloat16_too(name, kind, clips, monkeypatch):
    monkeypatch.setattr(memory, "OFFLOADED_FROM", 1000)
    for autocast, half in ((True, False), (False, True), (True, True)):  # and which weights are bfloat16
        plain, mine = (model_of(levers, **MODELS[kind]) for levers in (None, LEVERS[name]))
        if half:
            plain, mine = plain.bfloat16(), mine.bfloat16()
        dtype = torch.float32 if autocast else torch.bfloat16
        for grad in (True, False):
            exact = run(model_of(**MODELS[kind]), 0, False, grad, clips=clips)
            base = run(plain, 0, False, grad, dtype, autocast, clips)
            # gradients of bfloat16 weights add up in bfloat16, tile by tile
            factor = 4 if half and name.startswith("one") else 1.5
            assert furthest(run(mine, 0, False, grad, dtype, autocast, clips), exact) < factor * furthest(base, exact) + 1e-3


def saved(model, clips=1):
    """Bytes kept for the backward pass, parameters and the model's own inputs apart, and matrix operations of an update."""
    kept = {}

    def pack(y):
        if not isinstance(y, torch.nn.Parameter):
            kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    x, t, text = torch.randn(clips, 16, 4, 16, 16), torch.rand(clips) * 900, torch.randn(clips, 9, 24)
    model(x, t, text)  # the first time that it sees a shape it looks at what each product costs
    with FlopCounterMode(display=False) as work, torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        model(x, t, text).square().mean().backward()
    return sum(kept.values()), work.get_total_flops()


def test_what_stays_grows_with_the_share_and_the_work_falls():
    work = [saved(model_of({"activations": share}))[1] for share in (0, 0.3, 0.6, 0.9, 1)]
    assert work == sorted(work, reverse=True) and work[0] > 1.2 * work[-1]


def test_most_of_the_activations_cost_little_work():
    """The last tenths of the room save least."""
    whole, most = saved(model_of())[1], saved(model_of({"activations": 0.8}))[1]
    assert most <= 1.05 * whole


def test_many_products_are_chosen_among_in_no_time():
    """Chunks, adapters and images make dozens of products a block."""
    costs = tuple((1000 + 7 * i % 13, 100 + 11 * i % 17) for i in range(40))
    kept = memory._dearest(costs, 0.5)
    assert sum(costs[i][1] for i in kept) <= 0.5 * sum(size for _, size in costs)
    assert sum(costs[i][0] for i in kept) > 0.5 * sum(cost for cost, _ in costs)
    assert memory._dearest(((10, 1), (6, 1), (6, 1), (1, 1)), 0.5) == {0, 1}


def test_the_last_product_is_not_kept():
    """It is not computed again, so keeping it would save nothing."""
    model = model_of({"activations": 0.9})
    x, t, text = torch.randn(1, 16, 4, 16, 16), torch.rand(1) * 900, torch.randn(1, 9, 24)
    model(x, t, text)
    for block, products in ((model.spatial[0], 9), (model.temporal[0], 5)):
        kept, = block.forward.args[1].chosen.values()
        assert kept and products - 1 not in kept


def test_what_waits_on_the_host_goes_with_the_graph(monkeypatch):
    """A forward pass whose gradients nobody asks for leaves nothing behind, and two passes do not mix."""
    monkeypatch.setattr(memory, "OFFLOADED_FROM", 1000)
    model, plain = model_of({"activations": 0, "offload": True}), model_of()
    sent, real = weakref.WeakSet(), memory._Away.__init__
    monkeypatch.setattr(memory._Away, "__init__", lambda self, *args: real(self, *args) or sent.add(self))
    given = [(torch.randn(1, 6, 4, 16, 16), torch.rand(1) * 900, torch.randn(1, 9, 24)) for _ in range(2)]
    model(*given[0])
    assert not sent
    losses = [model(*one).square().mean() for one in given]
    losses[0].backward()
    losses[1].backward()
    assert sum(plain(*one).square().mean() for one in given).backward() is None
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)
    del losses
    assert not sent


def test_the_short_way_is_taken_where_it_fits(monkeypatch):
    """On a CPU, in one precision, for one timestep a clip; and never with gradients."""
    taken = []
    real = lean.Clip.__call__
    monkeypatch.setattr(lean.Clip, "__call__", lambda self, *args: taken.append(1) or real(self, *args))
    model = model_of({"tile_tokens": 128})
    run(model, 0, False, True)
    run(model, 0, True, False)
    run(model, 0, False, False, autocast=True)
    assert not taken
    run(model, 0, False, False)
    assert taken


def test_a_wrapped_model_can_be_copied():
    """Previews copy the model and change the copy's weights."""
    model = model_of({"tile_tokens": 100, "offload": True, "mlp_chunks": 2})
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.zero_()
    assert run(other, 0, False, False)[0].abs().max() == 0 and run(model, 0, False, False)[0].abs().max() > 0

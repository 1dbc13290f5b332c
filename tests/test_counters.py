"""What the model computes, writes and keeps, counted on a small clip against the reference with the same weights.

The figures of the size that is published come from benchmarks/counters.py; here a smaller one stands guard over them.
"""

import pytest
import torch
from torch import nn

from benchmarks import counters, peer
from latte.config import ModelConfig
from latte.model import Latte, flops

# 64 tokens a frame, as many as at the smaller published size: the share of the repeated text keys and values depends on it.
CFG = ModelConfig(layers=4, heads=2, head_dim=32, text_channels=48)
FRAMES, SIDE = 16, 16

# Reached, and in the comment the goal of the published size and what holds the rest.
REACHED = {
    "flops of a forward pass": 0.91,  # 0.97
    "ops of a forward pass": 0.77,  # 0.5; as many as at the published size
    "bytes of a forward pass": 0.69,  # 0.5
}
SAVED = 12.2  # 12 elements (tokens x width) a block; the ends and the text weigh more in this small clip


@pytest.fixture(scope="module")
def found():
    return counters.compare(CFG, FRAMES, SIDE, ["", "memory.activations=0"])


def test_the_output_and_every_gradient_equal_the_reference(found):
    for name in ("plain", "memory.activations=0"):
        assert 0 < found[name]["largest relative difference of the output"] < counters.EQUAL_GOAL, name
        assert found[name]["largest relative difference of a gradient"] < counters.EQUAL_GOAL, name


@pytest.mark.parametrize("counter", REACHED)
def test_the_model_does_less_than_the_reference(found, counter):
    assert found["plain"][counter] <= REACHED[counter] * found["peer"][counter]


def test_what_waits_for_the_backward_pass(found):
    assert found["plain"]["saved, tokens x width a block"] <= SAVED < found["peer"]["saved, tokens x width a block"]
    # the input of every block, and the ends
    assert found["memory.activations=0"]["saved, tokens x width a block"] < 2.5


def test_checkpointed_blocks_compute_their_forward_pass_twice(found):
    plain, again = found["plain"], found["memory.activations=0"]
    extra = (again["flops of a forward and backward pass"] - plain["flops of a forward and backward pass"]) \
        / plain["flops of a forward pass"]
    assert 0.5 < extra <= 1


# ---- the counters themselves ----


def test_flops_are_those_of_the_formula(found):
    assert found["plain"]["flops of a forward pass"] == flops(CFG, FRAMES, SIDE, SIDE, peer.TEXT_TOKENS)


def test_views_and_allocations_write_nothing_and_writes_count_once():
    x = torch.ones(4, 6)
    with counters.Count() as count:
        x.view(24).unflatten(0, (2, 12)).transpose(0, 1)
        torch.empty(5)
    assert not count.ops
    with counters.Count() as count:
        y = x + 1
        y.mul_(2)
        torch.add(x, 1, out=y)
        y.t().contiguous()
    assert dict(count.ops) == {("ends", "aten.add"): 2, ("ends", "aten.mul_"): 1, ("ends", "aten.clone"): 1}
    assert sum(count.bytes.values()) == 4 * 24 * 4


def test_flops_of_attention_on_a_cpu_are_counted_forward_and_backward():
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    with counters.Count() as count:
        out = nn.functional.scaled_dot_product_attention(q, q, q)
    product = 2 * 2 * 16 * 16 * 8
    assert count.flops == 2 * product
    with counters.Count() as count:
        out.sum().backward()
    assert count.flops == 5 * product  # of them one for the logits, which are computed again


def test_what_lives_is_what_autograd_says_it_saved():
    model = Latte(CFG)
    nn.init.normal_(model.spatial[0].table)
    x, t, text = peer.inputs(CFG, 4, 8)
    model(x, t, text)  # it keeps its table of positions
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), counters.Count() as count:
        out = model(x, t, text)
    given = {y.untyped_storage().data_ptr() for y in (*model.parameters(), x, t, text, out)}
    assert sum(count.alive(out).values()) == sum(size for place, size in kept.items() if place not in given)

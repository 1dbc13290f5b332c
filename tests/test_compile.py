"""Compiled blocks: one graph a kind of block and clip shape for all layers, none after warm-up, and the plain model's numbers."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch._functorch import config as compiler

from latte.config import MemoryConfig, ModelConfig
from latte.model import Latte, frame_times
from latte.parallel import compile_blocks

SHAPES = [(4, 8), (6, 8), (4, 12)]  # frames and side of the latents of three buckets
TEXT_TOKENS = [(5, 16, 30), (17, 1, 9), (2, 33, 16)]  # of the longest caption, for each bucket, three times round


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before counts, and what a test sets for the compiler ends with it."""
    torch._dynamo.reset()
    counters.clear()
    with (torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256),
          compiler.patch(activation_memory_budget=1.0)):
        yield
    torch._dynamo.reset()


@pytest.fixture
def captured_only(monkeypatch):
    """Graphs are captured and their backward passes cut out as ever, but run operation by operation: seconds, not minutes."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **settings: whole(f, backend="aot_eager", **settings))


def twins(**changes):
    cfg = ModelConfig(**{"layers": 4, "heads": 2, "head_dim": 16, "text_channels": 24, "sample_size": 8, **changes})
    torch.manual_seed(0)
    plain = Latte(cfg)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return plain, copy.deepcopy(plain)


def run(model, frames, side, tokens, images=0, autocast=False, batch=2):
    """The loss of one batch; its gradients are added to the model's."""
    draw = torch.Generator().manual_seed(frames + 100 * side + 10000 * tokens)
    x, t = torch.randn(batch, frames + images, 4, side, side, generator=draw), 999 * torch.rand(batch, generator=draw)
    given = {}
    if model.cfg.conditioning == "text":
        rows = [1 + images] if images else []
        given["text"] = torch.randn(batch, *rows, tokens, 24, generator=draw)
        lengths = torch.tensor([tokens, max(1, tokens // 2)]).view(batch, *[1 for _ in rows], 1)
        given["text_mask"] = (torch.arange(tokens) < lengths).expand(batch, *rows, tokens)
    places = frame_times(model.cfg, frames, torch.tensor([1.0, 2.0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x, t, image_frames=images, frame_times=places, **given)
    loss = y.float().square().mean()
    loss.backward()
    return loss.item()


def gradient_gap(one, other):
    """The largest relative difference of a parameter's gradient."""
    return max(((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in zip(one.parameters(), other.parameters(), strict=True)
               if q.grad is not None and q.grad.norm() > 0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_generated_code_gives_the_plain_numbers():
    plain, compiled = twins()
    compile_blocks(compiled, MemoryConfig())
    for tokens in (5, 33):
        assert run(compiled, 4, 8, tokens) == pytest.approx(run(plain, 4, 8, tokens), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 2
    assert gradient_gap(compiled, plain) < 1e-5


@pytest.mark.parametrize(("changes", "shapes", "images", "autocast", "graphs"), [
    ({}, 3, 0, False, 2),
    ({"conditioning": "none", "modulation": "block"}, 2, 0, False, 2),
    ({"temporal_positions": "rope", "qk_norm": True}, 1, 0, True, 2),
    ({}, 1, 2, False, 3),
], ids=["text", "own modulation", "rope in bf16", "image frames"])
def test_every_layer_and_caption_length_shares_a_graph(captured_only, changes, shapes, images, autocast, graphs):
    plain, compiled = twins(**changes)
    compile_blocks(compiled, MemoryConfig())
    given = {"images": images, "autocast": autocast}
    for tokens in TEXT_TOKENS:
        for (frames, side), length in zip(SHAPES[:shapes], tokens, strict=False):
            assert run(compiled, frames, side, length, **given) == pytest.approx(run(plain, frames, side, length, **given),
                                                                               rel=1e-3 if autocast else 1e-5)
        assert counters["stats"]["unique_graphs"] == graphs * shapes  # from the first time round on
    assert not counters["graph_break"]
    assert gradient_gap(compiled, plain) < (2e-2 if autocast else 1e-5)


def test_more_shapes_than_torch_would_keep(captured_only):
    plain, compiled = twins(layers=1, conditioning="none")
    with torch._dynamo.config.patch(recompile_limit=2):
        compile_blocks(compiled, MemoryConfig())
        for _ in range(2):
            for frames in (2, 3):
                run(compiled, frames, 4, 0)
    assert counters["stats"]["unique_graphs"] == 4


def test_padded_text_changes_nothing_but_rounding():
    plain, padded = (latte.double() for latte in twins())
    compile_blocks(padded, MemoryConfig())
    for block in [*padded.spatial, *padded.temporal]:
        del block.forward  # uncompiled again: the padding alone is left
    for tokens in (1, 7, 16):
        assert run(padded, 4, 8, tokens) == pytest.approx(run(plain, 4, 8, tokens), rel=1e-12)
    assert gradient_gap(padded, plain) < 1e-12


def test_a_share_of_the_activations_becomes_the_compilers_budget(captured_only):
    kept = {}
    for share in (1.0, 0.5, 0.0):
        plain, compiled = twins(layers=1, conditioning="none")
        torch._dynamo.reset()
        assert compile_blocks(compiled, MemoryConfig(activations=share)).activations == 1
        size = 0

        def note(x):
            nonlocal size
            size += 0 if isinstance(x, torch.nn.Parameter) else x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            run(compiled, 4, 8, 16)
        run(plain, 4, 8, 16)
        assert gradient_gap(compiled, plain) < 1e-5
        kept[share] = size
    assert 0.35 * kept[1.0] < kept[0.5] < 0.65 * kept[1.0]
    assert kept[0.0] < 0.2 * kept[1.0]


def test_without_gradients_nothing_is_compiled():
    plain, compiled = twins(layers=1)
    compile_blocks(compiled, MemoryConfig())
    x, t, text = torch.randn(1, 2, 4, 8, 8), torch.zeros(1), torch.randn(1, 3, 24)
    with torch.no_grad():
        assert torch.equal(compiled(x, t, text), copy.deepcopy(compiled)(x, t, text))
        assert torch.equal(compiled(x, t, text), plain(x, t, text))
    assert counters["stats"]["unique_graphs"] == 0

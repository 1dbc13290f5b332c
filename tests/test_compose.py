"""Levers of memory, compiled blocks and sharding together: the plain model's loss and gradients, whatever is combined."""

import os

import pytest
import torch
import torch.distributed as dist
from torch._functorch import config as compiler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from latte import memory, parallel
from latte.config import MemoryConfig, ModelConfig
from latte.model import Latte

LEVERS = {"none": {}, "recompute": {"activations": 0.0}, "half": {"activations": 0.5}, "offload": {"offload": True},
          "tiles": {"tile_tokens": 48}, "chunks": {"mlp_chunks": 3},
          "half, chunks, offload": {"activations": 0.5, "mlp_chunks": 3, "offload": True},
          "tiles, offload": {"tile_tokens": 48, "offload": True}}
SAME_ARITHMETIC = ("recompute", "half", "offload")
COMPILED = ("none", "offload", "tiles, offload", "half, chunks, offload")  # capturing graphs takes seconds each


@pytest.fixture(autouse=True)
def small_tensors_move_too(monkeypatch):
    monkeypatch.setattr(memory, "OFFLOADED_FROM", 1024)


@pytest.fixture
def captured_only(monkeypatch):
    _capture_only()
    yield
    torch.compile = WHOLE
    torch._dynamo.reset()
    compiler.activation_memory_budget = 1.0


WHOLE = torch.compile


def _capture_only():
    """Graphs are captured and their backward passes cut out as ever, but run operation by operation, without a C++ compiler."""
    torch.compile = lambda f, **settings: WHOLE(f, backend="aot_eager", **settings)


def model(levers, compiled):
    torch.manual_seed(0)
    made = Latte(ModelConfig(layers=2, heads=2, head_dim=16, text_channels=24, sample_size=8))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.05)
    cfg = MemoryConfig(**levers)
    memory.apply(made, parallel.compile_blocks(made, cfg) if compiled else cfg)
    return made


def run(latte, halves=(0, 1)):
    """Mean loss of two clips, or of one of them, whose gradients are added to the model's."""
    draw = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 5, 4, 8, 8, generator=draw), 999 * torch.rand(2, generator=draw)
    text, mask = torch.randn(2, 7, 24, generator=draw), torch.arange(7) < torch.tensor([[7], [3]])
    some = list(halves)
    loss = latte(x[some], t[some], text=text[some], text_mask=mask[some]).square().mean()
    loss.backward()
    return loss.detach()


def gradients(latte):
    return {name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone() for name, p in latte.named_parameters()}


def gap(found, wanted):
    assert found.keys() == wanted.keys()
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)


@pytest.fixture(scope="module")
def plain():
    latte = model({}, False)
    return run(latte), gradients(latte)


@pytest.mark.parametrize("name", LEVERS)
def test_levers_keep_loss_and_gradients(plain, name):
    latte = model(LEVERS[name], False)
    loss = run(latte)
    assert loss.item() == pytest.approx(plain[0].item(), rel=1e-5)
    assert gap(gradients(latte), plain[1]) < 1e-5
    if name in SAME_ARITHMETIC:
        assert torch.equal(loss, plain[0])
        assert all(torch.equal(grad, plain[1][key]) for key, grad in gradients(latte).items())


@pytest.mark.parametrize("name", COMPILED)
def test_levers_keep_loss_and_gradients_of_compiled_blocks(captured_only, plain, name):
    latte = model(LEVERS[name], True)
    assert run(latte).item() == pytest.approx(plain[0].item(), rel=1e-5)
    assert gap(gradients(latte), plain[1]) < 1e-5


def test_levers_and_compiled_blocks_keep_loss_and_gradients_of_a_sharded_model(plain, tmp_path):
    torch.save({"loss": plain[0], **plain[1]}, tmp_path / "plain.pt")
    torch.multiprocessing.spawn(_sharded, (str(tmp_path),), nprocs=2)
    found = [line for rank in range(2) for line in (tmp_path / f"{rank}.txt").read_text().splitlines()]
    assert len(found) == 2 * (len(LEVERS) + 1)
    wrong = [line for line in found if max(map(float, line.split("\t")[1:])) > 1e-5]
    assert not wrong, wrong


def _sharded(rank, folder):
    """One of two processes: each has one of the two clips and half of every block."""
    torch.set_num_threads(1)
    memory.OFFLOADED_FROM = 1024
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    wanted = torch.load(f"{folder}/plain.pt")
    loss = wanted.pop("loss")
    mesh = init_device_mesh("cpu", (2,))
    _capture_only()
    cases = [(name, False) for name in LEVERS] + [(name, True) for name in COMPILED[3:]]
    with open(f"{folder}/{rank}.txt", "w") as said:
        for name, compiled in cases:
            latte = model(LEVERS[name], compiled)
            for part in (*latte.spatial, *latte.temporal, latte):
                fully_shard(part, mesh=mesh)
            mean = parallel.total(run(latte, [rank])).item() / 2
            print(f"{name}, compiled: {compiled}", abs(mean / loss.item() - 1), gap(gradients(latte), wanted), sep="\t", file=said)
            torch._dynamo.reset()
    dist.destroy_process_group()

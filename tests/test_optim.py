"""The optimizer: moments and weights in fewer bits, rounding that keeps the mean, updates in the backward pass, the average."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import fully_shard

from latte import checkpoint, config
from latte.config import MemoryConfig, OptimConfig
from latte.optim import EMA, PART, SMALL, EightBits, InBackward, make_optimizer, rounded, state_bytes

TINY = Path(__file__).parent.parent / "configs" / "tiny.yaml"
KINDS = [{"optimizer_states": states, "weights": weights} for states in ("fp32", "bf16", "int8") for weights in ("fp32", "bf16")]
IDS = ["-".join(kind.values()) for kind in KINDS]
SETTINGS = OptimConfig(learning_rate=1e-2, weight_decay=0.01)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the same on a CPU is tested above")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 300), nn.GELU(), nn.Linear(300, 30))


def lesson(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(128, 30)
    return x.to(device), (2 * torch.sin(x @ torch.randn(30, 30) / 5)).to(device)


def loss_of(model: nn.Module, device: str = "cpu") -> torch.Tensor:
    x, y = lesson(device)
    with torch.autocast(device, torch.bfloat16, enabled=model[0].weight.dtype == torch.bfloat16):
        return (model(x) - y).float().square().mean()


def trained(model: nn.Module, memory: MemoryConfig, updates: int = 4, seed: int = 0, first: int = 0):
    optimizer = make_optimizer(model, SETTINGS, memory, seed)
    for update in range(first, first + updates):
        optimizer.begin(update, 1e-2 * (1 - update / 100))
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def everything(model: nn.Module, optimizer) -> list[torch.Tensor]:
    return [*model.state_dict().values(), *(value for p in model.parameters() for _, value in sorted(optimizer.state[p].items()))]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_full_precision_is_the_fused_kernel_of_torch():
    mine, plain = network(), network()
    trained(mine, MemoryConfig())
    matrices, others = [p for p in plain.parameters() if p.ndim > 1], [p for p in plain.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
                                  betas=tuple(SETTINGS.betas), eps=SETTINGS.eps, fused=True)
    for update in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - update / 100)
        loss_of(plain).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(mine.parameters(), plain.parameters())


def test_rounding_keeps_the_mean_and_what_needs_none():
    x = torch.tensor([1.001, -1.001, 3.14159, 1e-30, -7e5]).repeat(20000, 1)
    seen = rounded(x, torch.Generator().manual_seed(3))
    assert seen.dtype == torch.bfloat16
    ulp = 2.0 ** (x[0].abs().log2().floor() - 7)
    assert ((seen.double() - x.double()).abs() < ulp).all()
    assert ((seen.double().mean(0) - x[0].double()).abs() < 4 * 0.5 * ulp / 20000**0.5).all()
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(rounded(exact.float(), torch.Generator().manual_seed(0)), exact)
    assert rounded(torch.tensor([torch.inf, -torch.inf, 0.0]), torch.Generator()).tolist() == [torch.inf, -torch.inf, 0.0]


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_a_neighbouring_code_and_keep_the_mean(signed):
    bits = EightBits(signed, torch.device("cpu"))
    assert len(bits.values) == 255 and bits.values.diff().min() > 0 and bits.values[-1] == 1
    assert bits.values[0] == -1 and 0 in bits.values if signed else 0 < bits.values[0] < 1e-6
    torch.manual_seed(0)
    x = torch.randn(7, 111).exp().pow(2) * (torch.randn(7, 111).sign() if signed else 1)
    codes, scales = bits.encode(x, torch.Generator().manual_seed(0))
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and len(scales) == 4
    scale = scales.repeat_interleave(256)[:x.numel()].view_as(x)
    below = (torch.bucketize(x / scale, bits.values, right=True) - 1).clamp(0, 253)
    assert ((codes == below) | (codes == below + 1)).all()
    low, high = bits.values[below] * scale, bits.values[below + 1] * scale
    chance = ((x - low) / (high - low)).clamp(0, 1)  # a root smaller than the smallest code is raised to it
    draws = torch.stack([bits.decode(*bits.encode(x, torch.Generator().manual_seed(i))) for i in range(800)]).double().mean(0)
    error = (draws - torch.maximum(x, low)).abs() / (high - low)
    assert (error <= 5 * (chance * (1 - chance) / 800).sqrt() + 3 / 800).all()
    kept = bits.decode(codes, scales)
    assert torch.equal(bits.encode(kept, torch.Generator())[1], scales)
    zeros = bits.decode(*bits.encode(torch.zeros(5), torch.Generator()))
    assert zeros.tolist() == [0] * 5


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_it_learns_as_in_full_precision(kind):
    def end(memory):
        model = network()
        trained(model, memory, updates=90)
        return loss_of(model.float()).item()

    assert loss_of(network()).item() > 1.5
    assert end(MemoryConfig(**kind)) == pytest.approx(end(MemoryConfig()), rel=0.05)


def test_updates_far_below_a_step_of_bf16_move_its_weights():
    p = nn.Parameter(torch.ones(256, 256))
    optimizer = make_optimizer(nn.ParameterList([p]), OptimConfig(), MemoryConfig(weights="bf16"))
    for update in range(50):
        optimizer.begin(update, 1e-5)  # a step of bf16 below 1 is 4e-3
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(1 - 50 * 1e-5, abs=2e-5)
    assert torch.tensor(1 - 1e-5).bfloat16() == 1  # to nearest, they would stay where they are


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_a_slow_average_of_squares_is_followed(states):
    """Of 0.999 and a gradient that falls by a tenth; rounded to nearest it would stand still."""
    p = nn.Parameter(torch.zeros(128, 128))
    optimizer = make_optimizer(nn.ParameterList([p]), OptimConfig(betas=[0.9, 0.999]), MemoryConfig(optimizer_states=states))
    expected = 0.0
    for update in range(600):
        optimizer.begin(update, 1e-4)
        size = 1.0 if update < 300 else 0.9
        p.grad = torch.full_like(p, size)
        expected = 0.999 * expected + 0.001 * size**2
        optimizer.step()
    assert optimizer._unpacked(optimizer.state[p], "exp_avg_sq").mean().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_an_update_that_is_not_done_changes_nothing(kind):
    model = network()
    optimizer = trained(model, MemoryConfig(**kind))
    before = [value.clone() for value in everything(model, optimizer)]
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert same(before, everything(model, optimizer))
    optimizer.found_inf = torch.zeros(())
    loss_of(model).backward()
    for p in model.parameters():
        p.grad.nan_to_num_(0)
    optimizer.step()
    assert not same(before, everything(model, optimizer))


@pytest.mark.parametrize("kind", KINDS[1:], ids=IDS[1:])
def test_random_bits_are_keyed(kind):
    def run(seed, noise, first=0):
        model = network()
        torch.manual_seed(noise)
        return everything(model, trained(model, MemoryConfig(**kind), seed=seed, first=first))

    assert same(run(0, noise=1), run(0, noise=2))
    assert not same(run(0, noise=1), run(1, noise=1))
    model = network()
    optimizer = trained(model, MemoryConfig(**kind))
    seeds = set()
    for update, p, number in itertools.product(range(3), model.parameters(), range(3)):
        optimizer.begin(update, 1e-2)
        seeds.add(optimizer._generator(p, number).initial_seed())
    assert len(seeds) == 3 * 4 * 3


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("ema", ["device", "host"])
def test_the_plan_of_bytes_is_that_of_real_tensors(kind, ema):
    memory = MemoryConfig(**kind, ema=ema)
    model = nn.ParameterList([nn.Parameter(torch.randn(*shape)) for shape in [(500, 401), (3000,), (900, 900), (7, 9), (63, 64)]])
    with torch.device("meta"):
        told = state_bytes([torch.empty_like(p) for p in model], memory)
    optimizer, average = make_optimizer(model, OptimConfig(), memory), EMA(model, 0.9, ema)
    for p in model:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert told["weights"] == sum(p.nbytes for p in model)
    assert told["gradients"] == sum(p.grad.nbytes for p in model)
    assert told["moments"] == sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert told[f"average on {ema}"] == sum(value.nbytes for value in average.weights.values())
    assert told["average on host" if ema == "device" else "average on device"] == 0
    matrices = sum(p.numel() for p in model if p.numel() >= SMALL)
    share = {"fp32": 8, "bf16": 4, "int8": 2 * (1 + 4 / 256)}[kind["optimizer_states"]]
    assert told["moments"] <= share * matrices + 8 * (3000 + 63 + 64 * 63) + 4 * 5 + 2 * 4 * 3


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_an_update_takes_no_more_than_copies_of_a_few_tensors(kind):
    """By the profiler's count: none in full precision, and not more for twelve matrices than for eight."""
    def most(matrices: int) -> int:
        model = nn.ParameterList([nn.Parameter(torch.randn(PART // 4)) for _ in range(matrices)])
        optimizer = make_optimizer(model, OptimConfig(), MemoryConfig(**kind))
        for p in model:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            optimizer.step()
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))

    if kind == KINDS[0]:
        assert most(2) < 1000
    else:
        assert 8 * PART <= most(8) <= 17 * PART and most(12) <= most(8) + 1000


@pytest.mark.parametrize("before", KINDS[::2], ids=["fp32", "bf16", "int8"])
@pytest.mark.parametrize("after", KINDS, ids=IDS)
def test_a_checkpoint_of_one_kind_loads_into_another(tmp_path, before, after):
    model = network()
    optimizer, ema = trained(model, MemoryConfig(**before)), EMA(model, 0.9)
    writer = checkpoint.Writer(tmp_path, 1)
    writer.save(4, config.load(TINY), model, ema, optimizer)
    writer.finish()
    other = network(seed=1)
    second = make_optimizer(other, SETTINGS, MemoryConfig(**after))
    assert checkpoint.load(checkpoint.read(tmp_path), other, EMA(other, 0.9), second) == 4
    loose = {"fp32": 1e-6, "bf16": 2**-7, "int8": 0.15}
    rel = max(loose[before["optimizer_states"]], loose[after["optimizer_states"]])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert q.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[after["weights"]]
        assert torch.equal(p.to(q.dtype), q)
        assert second.state[q]["step"] == 4
        fresh = second._fresh(q)
        assert {k: (v.dtype, v.shape) for k, v in second.state[q].items()} == {k: (v.dtype, v.shape) for k, v in fresh.items()}
        for slot in ("exp_avg", "exp_avg_sq"):
            a, b = optimizer._unpacked(optimizer.state[p], slot), second._unpacked(second.state[q], slot)
            assert (a - b).norm() <= rel * a.norm()
            if before["optimizer_states"] == after["optimizer_states"]:
                assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5]], ids=[IDS[0], IDS[5]])
def test_updates_in_the_backward_pass_are_the_same_updates(kind):
    plain, early = network(), network()
    usual = trained(plain, MemoryConfig(**kind), updates=5)
    optimizer = make_optimizer(early, SETTINGS, MemoryConfig(**kind))
    at_once = InBackward(early, optimizer)
    for update in range(5):
        optimizer.begin(update, 1e-2 * (1 - update / 100))
        before = [p.detach().float().clone() for p in early.parameters()]
        loss = loss_of(early)
        reference = torch.autograd.grad(loss, list(early.parameters()), retain_graph=True)
        at_once.begin(loss, measure=True)
        loss.backward()
        assert all(p.grad is None for p in early.parameters())
        optimizer.step()  # finds nothing to do
    assert same(everything(plain, usual), everything(early, optimizer))
    for (name, p), old, grad in zip(early.named_parameters(), before, reference, strict=True):
        assert at_once.norms[name].item() == pytest.approx(grad.float().norm().item(), rel=1e-5)
        change, size = at_once.moved[name].tolist()
        assert change == pytest.approx((p.float() - old).norm().item(), rel=5e-3)
        assert size == pytest.approx(p.float().norm().item(), rel=1e-5)
    at_once.close()
    loss_of(early).backward()
    assert all(p.grad is not None for p in early.parameters())


def test_in_the_backward_pass_a_gradient_that_is_not_finite_leaves_its_weight_alone():
    model = network()
    optimizer = make_optimizer(model, SETTINGS)
    at_once = InBackward(model, optimizer)
    start = copy.deepcopy(model)
    loss = loss_of(model)
    at_once.begin(loss * torch.nan, measure=False)
    loss.backward()
    assert same(model.parameters(), start.parameters())
    model[0].weight.register_hook(lambda grad: grad * torch.inf)
    loss = loss_of(model)
    at_once.begin(loss, measure=False)
    loss.backward()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True)]
    assert moved == [False, True, True, True]
    assert [norm.isfinite().item() for norm in at_once.norms.values()].count(False) == 1
    assert optimizer.state[model[0].weight]["step"] == 0 and optimizer.state[model[2].weight]["step"] == 1
    with pytest.raises(AssertionError, match="its gradient came in parts"):
        loss_of(model).backward()


def test_in_the_backward_pass_gradients_do_not_pile_up():
    """By torch's own count of what is alive: of eight layers never two gradients, of which a plain step has all eight."""
    def most(early: bool) -> int:
        model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(8)))
        optimizer = make_optimizer(model, SETTINGS)
        at_once = InBackward(model, optimizer) if early else None
        x = torch.randn(4, 128)
        for _ in range(2):  # the first makes the moments
            tracker = MemTracker()
            tracker.track_external(model, x, *(value for state in optimizer.state.values() for value in state.values()))
            with tracker:
                loss = model(x).square().mean()
                if early:
                    at_once.begin(loss, measure=False)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return max(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())

    layer = 4 * 128 * 128
    saved = most(False) - most(True)
    assert 6 * layer <= saved <= 8 * layer


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_the_average_is_the_same_on_the_host(weights):
    model = network()
    optimizer = make_optimizer(model, SETTINGS, MemoryConfig(weights=weights))
    there, here = EMA(model, 0.9), EMA(model, 0.9, "host")
    for update in range(4):
        optimizer.begin(update, 1e-2)
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        for ema in (there, here):
            ema.wait()
            ema.update(model, update, torch.tensor(float(update != 2)))
    assert same(there.weights.values(), here.weights.values())
    assert all(value.dtype == torch.float32 for value in here.weights.values())
    assert not same(there.weights.values(), [p.float() for p in model.parameters()])


def test_each_process_keeps_the_moments_of_its_shard(tmp_path):
    torch.multiprocessing.spawn(_sharded, (str(tmp_path),), nprocs=2)
    wanted = network()
    trained(wanted, MemoryConfig())
    start = dict(network().named_parameters())
    for kind, name in zip(KINDS, IDS, strict=True):
        found, moments = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert moments == 2 * (300 * 30 // 2) * {"fp32": 4, "bf16": 2, "int8": 1}[kind["optimizer_states"]]
        for key, p in wanted.named_parameters():
            error = (found[key].float() - p).norm() / (p - start[key]).norm()
            assert error < {"fp32": 0.03 if kind["optimizer_states"] == "int8" else 1e-2, "bf16": 0.2}[kind["weights"]], (name, key)
            assert error < 1e-4 or name != "fp32-fp32"


def _sharded(rank: int, folder: str) -> None:
    """The lesson on two processes, each with half of every parameter (fully_shard)."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for kind, name in zip(KINDS, IDS, strict=True):
        model = network()
        if kind["weights"] == "bf16":
            model.bfloat16()
        fully_shard(model, mesh=mesh)
        optimizer = trained(model, MemoryConfig(**kind))
        whole = {key: p.full_tensor() for key, p in model.named_parameters()}
        own = optimizer.state[model[0].weight]
        if rank == 0:
            torch.save((whole, own["exp_avg"].nbytes + own["exp_avg_sq"].nbytes), f"{folder}/{name}.pt")
    torch.distributed.destroy_process_group()


@needs_gpu
def test_the_average_is_the_same_on_the_host_of_a_gpu():
    model = network().cuda()
    optimizer = make_optimizer(model, SETTINGS)
    there, here = EMA(model, 0.9), EMA(model, 0.9, "host")
    for update in range(20):
        loss_of(model, "cuda").backward()
        here.wait()
        optimizer.step()
        optimizer.zero_grad()
        for ema in (there, here):
            ema.update(model, update, torch.ones((), device="cuda"))
    assert all(value.is_pinned() for value in here.weights.values())
    assert same([value.cpu() for value in there.weights.values()], here.weights.values())


@needs_gpu
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_it_learns_on_a_gpu(kind):
    model = network().cuda()
    optimizer = make_optimizer(model, SETTINGS, MemoryConfig(**kind))
    for update in range(90):
        optimizer.begin(update, 1e-2 * (1 - update / 100))
        optimizer.found_inf = torch.zeros((), device="cuda")
        loss_of(model, "cuda").backward()
        optimizer.step()
        optimizer.zero_grad()
    reference = network()
    trained(reference, MemoryConfig(), updates=90)
    assert loss_of(model.cpu().float()).item() == pytest.approx(loss_of(reference).item(), rel=0.05)


@pytest.mark.parametrize(("overrides", "said"), [
    (["memory.weights=bf16"], "memory.weights: bf16 needs train.mixed_precision=bf16, got fp32"),
    (["memory.optimizer_in_backward=true"], "memory.optimizer_in_backward: .* it needs optim.grad_clip=0, got 1.0"),
    (["memory.optimizer_in_backward=true", "optim.grad_clip=0", "train.micro_batches=2"], "train.micro_batches=1, got 2"),
    (["memory.optimizer_in_backward=true", "optim.grad_clip=0", "train.deterministic=true"], "train.deterministic=False, got True"),
    (["memory.optimizer_in_backward=true", "optim.grad_clip=0", "guard.spike=skip"], "guard.spike=ignore, got skip"),
    (["memory.optimizer_in_backward=true", "optim.grad_clip=0", "train.mixed_precision=fp16"],
     "train.mixed_precision=fp32 or bf16, got fp16"),
    (["memory.optimizer_states=int4"], "memory.optimizer_states"),
])
def test_what_cannot_go_together_is_one_error(overrides, said):
    with pytest.raises(ValueError, match=said):
        config.load(TINY, overrides)

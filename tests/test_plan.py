"""The planner: its memory against that of real updates, the levers it chooses, and that a run keeps them."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState

import train
from latte import attention, config, diffusion, hardware, plan, trace
from latte.codec import VideoCodec
from latte.config import MemoryConfig

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
SHORT = ["stages.0.steps=2", "stages.1.steps=2", "preview.count=0", "train.log_every_steps=1"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("planner", ROOT / "benchmarks" / "planner.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.use_deterministic_algorithms(False)


FOUR = "model.layers=4"  # one more than are traced


@pytest.mark.parametrize("settings", [
    [FOUR, "stages=[{frames: 16, height: 16, width: 16, batch_size: 2}]", "memory.activations=0"],
    [FOUR, "stages=[{frames: 16, height: 16, width: 16, batch_size: 2}]", "memory.activations=0.5", "train.mixed_precision=bf16"],
    ["model.layers=1", "stages=[{frames: 12, height: 16, width: 16, batch_size: 1}]", "memory.tile_tokens=128"],
    ["model.layers=2", "stages=[{frames: 2, height: 16, width: 16, batch_size: 1}]", "optim.grad_clip=0", "model.head_dim=64",
     "memory.optimizer_in_backward=true"],
    ["model.layers=2", "stages=[{frames: 4, height: 16, width: 16, batch_size: 4}]", "train.deterministic=true"],
], ids=["inputs", "half-bf16", "tiles", "in-backward", "deterministic"])
def test_planned_memory_is_within_a_twentieth_of_a_real_update(benchmark, settings):
    """By train.py's own code: forward, backward, clipping, AdamW, average and report. benchmarks/planner.py has more of it."""
    cfg = benchmark.load(settings)
    assert benchmark.planned(cfg) == pytest.approx(benchmark.allocated(cfg), rel=0.05)


def test_a_trace_leaves_no_fake_tables_behind():
    cfg = config.load(TINY, ["diffusion={kind: ddpm, prediction: eps, loss: eps, timesteps: 37}",
                             "memory.optimizer_states=int8", "model.head_dim=64"])
    assert trace.update(cfg, (2, 3, 16, 16), 0, 1, 1, False).peak > 0
    assert type(diffusion.alpha_bars(37)) is torch.Tensor and float(diffusion.alpha_bars(37)[0]) == pytest.approx(1 - 1e-4)


def test_host_memory_counts_on_a_cpu_and_not_on_a_gpu():
    cfg = config.load(TINY, ["model.layers=2", "memory.offload=true", "memory.ema=host", "model.head_dim=64"])
    here, there = (trace.update(cfg, (32, 3, 64, 64), 0, 4, 1, gpu) for gpu in (False, True))
    average = 4 * sum(p.numel() for p in trace.outline(cfg).parameters())
    assert here.held - there.held == average
    assert here.peak - there.peak > average + 2**20
    assert there.sent > 2 * 2**20 and here.sent == 0


def test_attention_on_a_gpu_is_the_fused_kernel():
    """A CPU takes the plain formula for short sequences in bfloat16, and keeps its logits."""
    cfg = config.load(TINY, ["model.layers=1", "train.mixed_precision=bf16", "model.patch_size=2"])
    before = attention.PLAIN_LOGITS
    here, there = (trace.update(cfg, (128, 3, 32, 32), 0, 1, 1, gpu) for gpu in (False, True))
    logits = 2 * cfg.model.heads * 256 * 128**2  # bytes, of the temporal block
    assert here.peak - there.peak > 0.9 * logits and here.held == there.held
    assert before == attention.PLAIN_LOGITS


def test_the_work_of_levers_is_counted():
    cfg = config.load(TINY, ["model.layers=4"])

    def cost(**levers):
        return trace.update(replace(cfg, memory=MemoryConfig(**levers)), (8, 3, 32, 32), 0, 2, 1, False)

    kept, half, inputs = cost(), cost(activations=0.5), cost(activations=0.0)
    assert kept.flops < half.flops < inputs.flops < 1.4 * kept.flops
    assert kept.peak > half.peak > inputs.peak


GIB = 2**30


@pytest.fixture
def easy(monkeypatch):
    """Costs by a rule, in place of traces, of a run that takes 20 GiB: 4 for weights and moments, 1 each for average and gradients,
    and 14 for activations."""
    def update(cfg, latents, images, clips, passes, gpu):
        levers = cfg.memory
        kept = 0.0 if levers.tile_tokens else levers.activations
        activations = (13 * kept * (not (levers.offload and gpu)) + 1 / levers.mlp_chunks) * (0.5 if levers.tile_tokens else 1)
        held = {"fp32": 5.0, "bf16": 4.0, "int8": 3.0}[levers.optimizer_states]
        flops = 4 - kept + (0.2 if levers.mlp_chunks > 1 else 0) + (0.3 if levers.tile_tokens else 0)
        peak = held + (0 if levers.optimizer_in_backward else 1) + activations
        return trace.Cost(peak=int(peak * GIB), held=int(held * GIB), flops=flops * 1e14, moved=0.0,
                          sent=2 * 13 * kept * GIB * levers.offload)

    monkeypatch.setattr(trace, "update", update)
    monkeypatch.setattr(hardware, "pair_seconds", lambda *_: [1.0])
    monkeypatch.setattr(plan, "resident", lambda *_: 0)


def auto(limit: float, *overrides: str) -> config.Config:
    return config.load(TINY, ["memory.auto=true", f"memory.limit_gib={limit}", *overrides])


@pytest.mark.parametrize(("limit", "levers"), [
    (40.0, "no lever"),                                                  # 25 GiB: a CPU holds a checkpoint's copy as well
    (25.0, "activations=0.75"),
    (17.0, "activations=0.25"),
    (12.3, "tile_tokens=8192"),
    (11.8, "tile_tokens=8192, mlp_chunks=4"),
])
def test_the_cheapest_levers_that_fit_are_chosen(easy, limit, levers):
    found = plan.plan(auto(limit), CPU)
    assert plan.told(found.memory) == levers and not found.memory.auto and found.memory.limit_gib == limit
    assert found.worst.peak <= plan.SURE * found.limit


def test_what_rounds_is_told_and_not_chosen(easy):
    found = plan.plan(auto(10.6), CPU)
    assert found.worst.peak > plan.SURE * found.limit
    assert "memory.optimizer_states=bf16, which round, 9.12 GiB: fits" in found.why
    assert found.memory.optimizer_states == "fp32"


def test_levers_of_the_config_stay(easy):
    found = plan.plan(auto(40.0, "memory.activations=0", "memory.optimizer_states=bf16"), CPU)
    assert found.memory.activations == 0 and found.memory.optimizer_states == "bf16"
    found = plan.plan(auto(11.0, "memory.activations=0.5", "memory.optimizer_states=bf16"), CPU)
    assert found.memory.activations == 0 and found.memory.optimizer_states == "bf16"


def test_a_card_by_name_has_its_memory_and_a_host(easy):
    found = plan.plan(auto(0), CPU, card="H200")
    assert found.limit == 140 * GIB and plan.told(found.memory) == "no lever"
    found = plan.plan(auto(8), CPU, card="H200")  # kept on the host in the time that the card works
    assert plan.told(found.memory) == "offload=true"
    with pytest.raises(ValueError, match="--card: knows H200, .* got 'abacus'"):
        plan.plan(auto(0), CPU, card="abacus")


def test_updates_in_the_backward_pass_only_where_they_are_allowed(easy):
    assert not any(levers.optimizer_in_backward for levers, _, _ in plan.plan(auto(1), CPU).tried)
    assert any(levers.optimizer_in_backward for levers, _, _ in plan.plan(auto(1, "optim.grad_clip=0"), CPU).tried)


def test_a_run_chooses_once_and_keeps_its_choice(tmp_path, monkeypatch, capsys):
    wanted = [*SHORT, f"run={tmp_path / 'run'}", "memory.auto=true"]
    chosen = MemoryConfig(activations=0.25)
    row = plan.Row("stages.1", (8, 3, 32, 32), 128, 4, 2**20, 1.0, 1)
    monkeypatch.setattr(plan, "_plan", lambda planner: plan.Plan(chosen, planner.limit, [row], "as the test wants it"))
    assert train.train(config.load(TINY, [*wanted, "train.save_every_steps=2"])) == 0
    assert "memory: activations=0.25, as the test wants it" in capsys.readouterr().out
    assert config.load(tmp_path / "run" / "config.yaml").memory == chosen
    shutil.rmtree(sorted((tmp_path / "run").glob("step-*"))[-1])
    monkeypatch.setattr(plan, "_plan", None)  # a later launch does not plan
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train.train(config.load(TINY, wanted)) == 0
    assert "memory: activations=0.25, as at this run's first launch" in capsys.readouterr().out


@pytest.fixture
def launched(tmp_path, easy):
    """resolve() for a run whose first launch chose activations=0.25 for 17 GiB."""
    def resolve(*overrides):
        cfg = auto(17.0, f"run={tmp_path}", *overrides)
        return plan.resolve(cfg, VideoCodec(cfg.codec, weights=False), CPU, 0, 1)

    (tmp_path / "config.yaml").write_text(config.to_yaml(replace(auto(17.0), memory=resolve()[0])))
    return resolve


def test_a_later_launch_adds_what_its_config_says(launched):
    assert launched() == (MemoryConfig(activations=0.25, limit_gib=17), "memory: activations=0.25, as at this run's first launch")
    levers, said = launched("memory.optimizer_states=int8", "memory.ema=host", "memory.activations=0.5", "optim.grad_clip=0",
                            "memory.optimizer_in_backward=true")
    assert levers == MemoryConfig(activations=0.25, ema="host", optimizer_in_backward=True, optimizer_states="int8", limit_gib=17)
    assert said.endswith(", as at this run's first launch (activations=0.25) and in the config")


def test_a_choice_that_no_longer_fits_is_made_again(launched, easy, monkeypatch):
    cost = trace.update

    def larger(*given):
        there = cost(*given)
        return replace(there, peak=there.peak + 2 * GIB)

    monkeypatch.setattr(trace, "update", larger)
    levers, said = launched("stages.1.batch_size=4096")  # too large to be sure without a trace
    assert levers.activations == 0
    assert "activations=0.25, as at this run's first launch, no longer serves: 17.25 GiB of 17.00 GiB" in said


def test_levers_that_the_config_no_longer_allows_are_chosen_again(launched, tmp_path):
    kept = MemoryConfig(activations=0.25, optimizer_in_backward=True, limit_gib=17)
    (tmp_path / "config.yaml").write_text(config.to_yaml(replace(auto(17.0, "optim.grad_clip=0"), memory=kept)))
    levers, said = launched("optim.grad_clip=1")
    assert levers == MemoryConfig(activations=0.25, limit_gib=17)
    assert "no longer serves: memory.optimizer_in_backward: the norm of the whole gradient is known too late" in said


def test_the_choice_of_an_older_version_is_read(launched, tmp_path):
    older = config.to_dict(auto(17.0))
    older.pop("memory")
    older["train"]["checkpoint_blocks"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    assert launched("memory.limit_gib=0")[0] == MemoryConfig(activations=0.0)
    with pytest.raises(ValueError, match="train.checkpoint_blocks: unknown key"):
        config.load(tmp_path / "config.yaml")


def test_nothing_fits_is_said_before_anything_is_built(tmp_path, easy):
    with pytest.raises(ValueError, match=r"memory\.auto: memory: .* nothing that rounds nothing fits.*train\.refuse_misfit=false"):
        train.train(config.load(TINY, [*SHORT, f"run={tmp_path / 'run'}", "memory.auto=true", "memory.limit_gib=0.001"]))


def test_the_dry_run_prints_the_plan(capsys):
    assert train.main([str(TINY), "--dry-run", "--card", "RTX 4090", "memory.auto=true"]) == 0
    said = capsys.readouterr().out
    assert "memory: no lever (fits as it is); 24.00 GiB to fit into on RTX 4090; speed assumed: 55% of the data sheet's" in said
    assert "auto: false" in said and "stages.1" in said
    assert train.main([str(TINY), "--dry-run", "--card", "abacus"]) == 1


def test_a_refusal_does_not_advise_what_was_tried(tmp_path, easy, capsys):
    tight = [str(TINY), "--dry-run", "memory.limit_gib=0.001", f"run={tmp_path}"]
    assert train.main([*tight, "memory.auto=true"]) == train.main([*tight, "train.compile=true"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("would be refused", "memory: "))]
    assert "uncompiled" not in said[0] and "; try more train.micro_batches" in said[1]
    assert "plan of uncompiled blocks" in said[2] and "; try memory.auto=true, more train.micro_batches" in said[3]
    assert "a process with uncompiled blocks" in said[3]


@pytest.mark.parametrize(("name", "card"), [
    ("L40S", "L40S"), ("nvidia l4", "L4"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("A100 40GB", "A100 40GB"),
    ("NVIDIA A100 80GB PCIe", "A100"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"),
])
def test_a_card_is_known_by_whole_words(name, card):
    assert hardware.card(name) is hardware.CARDS[card]


@pytest.mark.parametrize("name", ["L40", "RTX A1000", "A10G", "RTX 4090 Laptop GPU", "A100 20GB", "GH200"])
def test_another_card_of_a_similar_name_is_not_known(name):
    with pytest.raises(ValueError, match=f"--card: knows .*A100 40GB.* got '{name}'"):
        hardware.card(name)


def test_a_card_is_only_planned_for(capsys):
    assert train.main([str(TINY), "--card", "H200"]) == 1
    assert capsys.readouterr().err == "error: --card: plans for a card that is not at hand; it needs --dry-run\n"

"""TF32 and fp8: what is set, which linears are chosen, when fp8 is off by itself, and what its rounding does to training."""

import copy
from importlib.util import find_spec

import pytest
import torch

from latte import precision
from latte.config import ModelConfig, TrainConfig
from latte.model import Latte

CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
FP8 = TrainConfig(mixed_precision="bf16", compile=True, fp8=True)


@pytest.fixture(autouse=True)
def restore():
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def on_meta(**changes):
    with torch.device("meta"):
        return Latte(ModelConfig(**changes))


@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_what_the_config_says(on):
    model = on_meta(layers=1)
    assert precision.apply(model, TrainConfig(tf32=on), CPU) == "precision: fp32, other products in float32"
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is on
    if not torch.cuda.is_available():
        return
    a = torch.rand(512, 512, device="cuda") - 0.5
    gap = (a @ a - (a.double() @ a.double())).abs().max() / a.double().mm(a.double()).abs().max()
    assert (gap > 1e-5) == (on and torch.cuda.get_device_capability() >= (8, 0))


def test_fp8_takes_the_linears_that_are_large_enough():
    names = precision.fp8_layers(on_meta())  # the published width, 1152
    assert names == {f"{kind}.{layer}.{part}" for kind in ("spatial", "temporal") for layer in range(28)
                     for part in ("attn.qkv", "mlp.0", "mlp.2")}
    assert precision.fp8_layers(on_meta(heads=12, head_dim=64)) == set()
    wide = {name.split(".", 2)[2] for name in precision.fp8_layers(on_meta(heads=16, head_dim=128))}
    assert wide == {"attn.qkv", "attn.out", "cross.q", "cross.out", "mlp.0", "mlp.2"}
    assert precision.fp8_layers(on_meta(layers=1, heads=25, head_dim=52)) == set()  # 1300 does not divide by 16


def test_fp8_is_off_by_itself_and_says_so(monkeypatch):
    model = on_meta(layers=1)
    assert "fp8: off, this device has none" in precision.apply(model, FP8, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "fp8: off, this device has none" in precision.apply(model, FP8, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "fp8: off, at width 768" in precision.apply(on_meta(heads=12, head_dim=64), FP8, torch.device("cuda"))
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="train.fp8.*torchao.*pip install"):
        precision.apply(model, FP8, torch.device("cuda"))
    assert all(type(layer).__name__ != "Float8Linear" for layer in model.modules())


@pytest.mark.parametrize("changes", [{"mixed_precision": "fp32"}, {"compile": False}])
def test_fp8_without_what_it_needs_is_refused(changes):
    with pytest.raises(ValueError, match="train.fp8.*train.mixed_precision=bf16 and train.compile=true"):
        TrainConfig(**{"mixed_precision": "bf16", "compile": True, "fp8": True, **changes})


@needs_torchao
def test_fp8_rounding_keeps_the_loss(monkeypatch):
    monkeypatch.setattr(precision, "FP8_FROM", 40)
    losses = {}
    for fp8 in (False, True):
        torch.manual_seed(0)
        model = Latte(ModelConfig(layers=2, heads=2, head_dim=32, text_channels=24, sample_size=8, out_channels=4))
        names = list(model.state_dict())
        if fp8:
            assert precision.use_fp8(model, CPU, emulate=True) == "fp8: 12 linears, of each block attn.qkv, mlp.0, mlp.2"
            assert sum(type(layer).__name__ == "Float8Linear" for layer in model.modules()) == 12
            assert list(model.state_dict()) == names
            copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        draw, seen = torch.Generator().manual_seed(1), []
        target = torch.randn(4, 3, 4, 8, 8, generator=draw)
        text, mask = torch.randn(4, 5, 24, generator=draw), torch.ones(4, 5, dtype=torch.bool)
        for _ in range(150):
            noise = torch.randn(4, 3, 4, 8, 8, generator=draw)
            t = torch.rand(4, generator=draw)
            mix = t.view(4, 1, 1, 1, 1)
            with torch.autocast("cpu", torch.bfloat16):
                y = model((1 - mix) * target + mix * noise, 999 * t, text, mask)
            loss = (y.float() - (noise - target)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        losses[fp8] = sum(seen[-20:]) / 20
        assert losses[fp8] < 0.75 * seen[0]
    print(f"loss in bf16 {losses[False]:.5f}, in fp8 {losses[True]:.5f}, gap {losses[True] / losses[False] - 1:+.3%}")
    assert losses[True] == pytest.approx(losses[False], rel=5e-3)

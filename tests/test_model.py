"""The model against the reference (forward, gradients, golden outputs), and what its structure promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LatteTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from latte.attention import attention, rope, rotate
from latte.config import MemoryConfig, ModelConfig
from latte.memory import apply
from latte.model import Block, CrossAttention, Latte, flops
from latte.ops import modulate
from latte.published import names

GOLDEN = Path(__file__).parent / "golden/latte_t2v.npz"
SMALL = dict(sample_size=8, layers=2, heads=3, head_dim=8, text_channels=32)  # the golden model's shape


def small(**changes) -> Latte:
    """A small model whose every weight is random, so that no path is silent."""
    model = Latte(ModelConfig(**{**SMALL, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return model


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs():
    """A clip of 5 frames, timesteps and text for the small model, two of each."""
    return random(2, 5, 4, 8, 8), torch.tensor([999, 3]), random(2, 7, 32, seed=1)


def reference(**changes) -> LatteTransformer3DModel:
    cfg = dict(sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
               in_channels=4, out_channels=8, cross_attention_dim=24, attention_bias=True, activation_fn="gelu-approximate",
               num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
               video_length=5)
    model = LatteTransformer3DModel(**{**cfg, **changes}).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return model


def translate(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Tensors under the published names, weights or gradients, as this model's. Every key of both sides must be used once."""
    table = names("latte", ModelConfig(**{**SMALL, "layers": layers}))
    used = [key for keys in table.values() for key in keys]
    assert sorted(used) == sorted(state)
    mine = {name: torch.cat([state[key] for key in keys]) for name, keys in table.items()}
    mine["patch.weight"] = mine["patch.weight"].flatten(1)
    return mine


def pair(**changes) -> tuple[LatteTransformer3DModel, Latte]:
    theirs = reference(**changes)
    mine = Latte(ModelConfig(**{**SMALL, **{key: changes[key] for key in ("sample_size", "patch_size") if key in changes}}))
    mine.load_state_dict(translate(theirs.state_dict(), 2))
    return theirs, mine


def call(theirs, x, t, text, mask=None):
    """The reference called with this model's layout; its mask is an additive bias for each frame."""
    if mask is not None:
        mask = ((1 - mask) * -10000.0).repeat_interleave(x.shape[1], 0)[:, None]
    return theirs(x.transpose(1, 2), t, text, encoder_attention_mask=mask, return_dict=False)[0].transpose(1, 2)


def assert_same(mine, theirs, atol=1e-5):
    torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


# ---- the reference ----

MASK = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
CASES = {
    "clip": dict(shape=(2, 5, 4, 8, 8)),
    "one frame": dict(shape=(2, 1, 4, 8, 8)),
    "rectangular": dict(shape=(2, 5, 4, 12, 4)),
    "larger": dict(shape=(1, 5, 4, 24, 24)),
    "masked": dict(shape=(2, 5, 4, 8, 8), mask=MASK),
    "fractional timestep": dict(shape=(2, 5, 4, 8, 8), t=torch.tensor([500.25, 3.5])),
    "three frames": dict(shape=(2, 3, 4, 8, 8), video_length=3),
    "patch 4": dict(shape=(2, 5, 4, 8, 16), patch_size=4),
    "sample size 16": dict(shape=(2, 5, 4, 8, 8), sample_size=16),
    "sample size 128": dict(shape=(2, 5, 4, 8, 8), sample_size=128),
    "batch of 3": dict(shape=(3, 5, 4, 8, 8), t=torch.tensor([999, 3, 500])),
    "128 frames": dict(shape=(1, 128, 4, 4, 4), video_length=128),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_the_reference(case):
    case = dict(CASES[case])
    shape, mask, t = case.pop("shape"), case.pop("mask", None), case.pop("t", torch.tensor([999, 3]))
    theirs, mine = pair(**case)
    x, text = random(*shape), random(shape[0], 7, 32, seed=1)
    with torch.no_grad():
        expected = call(theirs, x, t[:shape[0]], text, mask)
        assert expected.std() > 0.5
        assert_same(mine(x, t[:shape[0]], text, mask), expected)


def test_without_temporal_attention_it_equals_the_reference():
    theirs, mine = pair()
    x, t, text = inputs()
    with torch.no_grad():
        expected = theirs(x.transpose(1, 2), t, text, enable_temporal_attentions=False, return_dict=False)[0].transpose(1, 2)
        assert_same(mine(x, t, text, image_frames=x.shape[1]), expected)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_every_gradient_equals_the_reference(checkpointed):
    theirs, mine = pair()
    if checkpointed:
        theirs.enable_gradient_checkpointing()
        apply(mine, MemoryConfig(activations=0))
    x, t, text = inputs()
    target = random(2, 5, 8, 8, 8, seed=2)
    (call(theirs, x, t, text, MASK) - target).square().mean().backward()
    (mine(x, t, text, MASK) - target).square().mean().backward()
    expected = translate({name: p.grad for name, p in theirs.named_parameters()}, 2)
    for name, p in mine.named_parameters():
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def golden():
    """The golden tensors, with the frame axis where this project has it, and the model with the golden weights."""
    data = np.load(GOLDEN)
    config = json.loads(str(data["config"]))
    assert (config["sample_size"], config["num_layers"], config["num_attention_heads"], config["attention_head_dim"],
            config["caption_channels"]) == tuple(SMALL.values())
    tensors = {key: torch.from_numpy(data[key]) for key in data.files if key != "config"}
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    del weights["caption_projection.y_embedding"]  # a buffer that the original keeps and never reads
    model = Latte(ModelConfig(**SMALL))
    model.load_state_dict(translate(weights, 2))
    return model, {key: value.transpose(1, 2) if value.ndim == 5 else value for key, value in tensors.items()}


GOLDEN_CALLS = {
    "out_base": lambda m, g: m(g["x"], g["t"], g["text"]),
    "out_one_frame": lambda m, g: m(g["x"][:, :1], g["t"], g["text"]),
    "out_masked": lambda m, g: m(g["x"], g["t"], g["text"], g["mask"]),
    "out_rectangular": lambda m, g: m(g["x_rectangular"], g["t"], g["text"]),
    "out_no_temporal": lambda m, g: m(g["x"], g["t"], g["text"], image_frames=5),  # without time, frames are images
    "joint_out": lambda m, g: m(g["joint_x"], g["t"], g["joint_text"], g["joint_mask"], image_frames=int(g["joint_images"])),
}


@torch.no_grad()
@pytest.mark.parametrize("name", GOLDEN_CALLS)
def test_golden_output(golden, name):
    model, tensors = golden
    assert_same(GOLDEN_CALLS[name](model, tensors), tensors[name])


def test_the_published_shape_has_the_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in Latte(ModelConfig()).parameters()) == 1_057_246_880


# ---- cost ----


@pytest.mark.parametrize("cfg, frames, height, width, text_tokens", [
    (ModelConfig(), 16, 32, 32, 120),
    (ModelConfig(layers=2, heads=2, head_dim=8, in_channels=3, out_channels=6, patch_size=8, text_channels=384), 128, 32, 64, 20),
])
def test_flops_are_those_counted(cfg, frames, height, width, text_tokens):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x, text = torch.empty(1, frames, cfg.in_channels, height, width), torch.empty(1, text_tokens, cfg.text_channels)
        Latte(cfg)(x, torch.empty(1), text)
    assert counter.get_total_flops() == flops(cfg, frames, height, width, text_tokens)


def test_flops_are_the_reference_s_but_for_keys_and_values_once_a_clip():
    # The reference computes them once a frame: 28 layers, 4 l d^2 each, for 15 frames too many.
    assert flops(ModelConfig(), 16, 32, 32, 120) + 28 * 4 * 15 * 120 * 1152**2 == pytest.approx(8.409e12, rel=1e-4)


def test_keys_and_values_are_computed_once_a_clip():
    model, rows = small(), []  # rows: how many tokens each kv projection is given
    for module in model.modules():
        if isinstance(module, CrossAttention):
            module.kv.register_forward_hook(lambda layer, args, out: rows.append(out.shape[:-1].numel()))
    model(*inputs())
    assert rows == [2 * 7] * 2


# ---- decoupling ----


def changed(block, x, index, **kwargs):
    """Where the block's output changes, [f n] of the second clip, when its input changes at one index of it."""
    other = x.clone()
    other[index] += 1
    with torch.no_grad():
        difference = (block(x, **kwargs) - block(other, **kwargs)).abs().amax(-1)  # [b f n]
    assert not difference[0].any()
    return difference[1] > 0


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_spatial_block_keeps_frames_apart(qk_norm):
    block = small(qk_norm=qk_norm).spatial[0]
    where = changed(block, random(2, 4, 6, 24), (1, 2, 3), mod=random(2, 1, 1, 6, 24, seed=1), text=random(2, 1, 7, 24, seed=2))
    assert where[2].all() and not where[[0, 1, 3]].any()


@pytest.mark.parametrize("turning", [False, True])
def test_a_temporal_block_keeps_positions_apart(turning):
    block = small().temporal[0]
    turn = tuple(y[None, :, None, None] for y in rope(torch.arange(4), 8)) if turning else None
    where = changed(block, random(2, 4, 6, 24), (1, 2, 3), mod=random(2, 1, 1, 6, 24, seed=1), turn=turn)
    assert where[:, 3].all() and not where[:, [0, 1, 2, 4, 5]].any()


@torch.no_grad()
def test_images_and_video_of_a_joint_batch_do_not_see_each_other():
    model, x, t, text = small(), random(2, 7, 4, 8, 8), torch.tensor([999, 3]), random(2, 3, 7, 32, seed=1)
    mask = torch.stack([(torch.arange(7) < keep).float().expand(2, 7) for keep in (7, 3, 5)], dim=1)  # [b 1+images l]
    joint = model(x, t, text, mask, image_frames=2)
    assert_same(joint[:, :5], model(x[:, :5], t, text[:, 0]))
    for image, keep in ((1, 3), (2, 5)):
        alone = model(x[:, [4 + image]], t, text[:, image, :keep], image_frames=1)
        assert_same(joint[:, [4 + image]], alone)
    shared = model(x, t, text[:, 0], image_frames=2)  # one text for all
    assert_same(shared[:, :5], joint[:, :5])
    assert_same(shared[:, 5:6], model(x[:, 5:6], t, text[:, 0], image_frames=1))


# ---- text ----


@torch.no_grad()
def test_masked_text_is_trimmed_text():
    model, (x, t, text) = small(), inputs()
    assert_same(model(x, t, text, MASK)[:1], model(x[:1], t[:1], text[:1, :3]))
    assert torch.equal(model(x, t, text, MASK.bool()), model(x, t, text, MASK))
    garbage = text.clone()
    garbage[0, 3:] = 1e3
    assert torch.equal(model(x, t, garbage, MASK), model(x, t, text, MASK))
    assert model(x, t, text, torch.zeros(2, 7)).isfinite().all()


@torch.no_grad()
def test_text_matters_and_may_be_left_out():
    model, (x, t, text) = small(), inputs()
    assert (model(x, t, text) - model(x, t)).abs().max() > 0.1


# ---- timesteps ----


@torch.no_grad()
@pytest.mark.parametrize("images", [0, 2])
def test_equal_timesteps_for_each_frame_are_one_for_the_clip(images):
    model, (x, _, text) = small(), inputs()
    t = torch.tensor([999.0, 3.25])
    assert_same(model(x, t[:, None].expand(2, 5), text, image_frames=images), model(x, t, text, image_frames=images))


@torch.no_grad()
def test_a_frame_s_timestep_acts_on_that_frame_where_frames_are_apart():
    model, (x, _, text) = small(), inputs()
    t = torch.full((2, 5), 400)
    other = t.clone()
    other[1, 3] = 900
    moved = (model(x, t, text, image_frames=5) - model(x, other, text, image_frames=5)).abs().amax((2, 3, 4)) > 0
    assert moved.tolist() == [[False] * 5, [False, False, False, True, False]]
    moved = (model(x, t, text) - model(x, other, text)).abs().amax((2, 3, 4)) > 0  # along time it reaches all of the clip
    assert moved.tolist() == [[False] * 5, [True] * 5]


# ---- positions in time ----


@torch.no_grad()
@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_frame_times(positions):
    model, (x, t, text) = small(temporal_positions=positions), inputs()
    plain, every_eighth = model(x, t, text), torch.arange(0, 40, 8)
    assert torch.equal(model(x, t, text, frame_times=torch.arange(5.0)), plain)
    assert (model(x, t, text, frame_times=every_eighth) - plain).abs().max() > 0.01
    each = model(x, t, text, frame_times=torch.stack([torch.arange(5), every_eighth]))
    assert_same(each[:1], plain[:1])
    assert_same(each[1:], model(x, t, text, frame_times=every_eighth)[1:])
    shifted = (model(x, t, text, frame_times=torch.arange(5) + 50) - plain).abs().max()
    assert shifted < 1e-4 if positions == "rope" else shifted > 0.01  # rotary positions are relative
    one = model(x[:, :1], t, text)
    assert torch.equal(model(x[:, :1], t, text, frame_times=torch.tensor([7.0])), one)  # one frame has no position
    assert_same(model(x[:, :3], t, text, image_frames=2, frame_times=torch.tensor([7.0]))[:, :1], one)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_frames_are_told_apart_by_their_times_only(positions):
    model, (x, t, text) = small(temporal_positions=positions), inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_same(model(x[:, order], t, text, frame_times=order), model(x, t, text)[:, order])
    assert (model(x[:, order], t, text) - model(x, t, text)[:, order]).abs().max() > 0.01


@torch.no_grad()
def test_300_frames_run():
    model = small(layers=1)
    y = model(random(1, 300, 4, 4, 4), torch.tensor([500]), random(1, 7, 32))
    assert y.shape == (1, 300, 8, 4, 4) and y.isfinite().all()


# ---- norm of queries and keys ----


@torch.no_grad()
def test_queries_and_keys_are_normalised_before_they_are_turned():
    attn = small(qk_norm=True, temporal_positions="rope").temporal[0].attn
    x, turn = random(2, 5, 3, 24), tuple(y[None, :, None, None] for y in rope(torch.arange(5), 8))
    shift, scale, gate = (random(2, 1, 1, 24) for _ in range(3))
    q, k, v = attn.qkv(modulate(x, shift, scale)).view(2, 5, 3, 3, 3, 8).unbind(3)  # each [b f n heads k]

    def norm(y, weight):
        return weight * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    q, k = rotate(norm(q, attn.norm.q), *turn), rotate(norm(k, attn.norm.k), *turn)
    y = attention(*(z.permute(0, 2, 3, 1, 4).flatten(0, 1) for z in (q, k, v)))  # [(b n) heads f k]
    y = attn.out(y.view(2, 3, 3, 5, 8).permute(0, 3, 1, 2, 4).flatten(3))
    assert_same(attn(x, shift, scale, gate, turn), x + gate * y, atol=1e-6)


@torch.no_grad()
def test_with_the_norm_the_size_of_queries_and_keys_does_not_matter():
    for qk_norm in (True, False):
        model, (x, t, text) = small(qk_norm=qk_norm), inputs()
        before = model(x, t, text)
        for block in (*model.spatial, *model.temporal):
            for layer, part in ((block.attn.qkv, slice(0, 48)), *([(block.cross.q, slice(None))] if block.cross else [])):
                layer.weight[part] *= 30
                layer.bias[part] *= 30
        difference = (model(x, t, text) - before).abs().max()
        assert difference < 1e-3 if qk_norm else difference > 0.1


# ---- training from scratch ----


@torch.no_grad()
def test_a_fresh_model_is_zero_and_its_blocks_are_the_identity():
    model, x, text = Latte(ModelConfig(**SMALL)), random(2, 5, 6, 24), random(2, 1, 7, 24, seed=1)
    for t in (torch.tensor([999, 3]), torch.rand(2, 5) * 1000):
        assert not model(random(2, 5, 4, 8, 8), t, random(2, 7, 32)).any()
    mod = model.modulation(random(2, 24)).view(2, 1, 1, 6, 24)
    for block in (*model.spatial, *model.temporal):
        assert isinstance(block, Block) and torch.equal(block(x, mod, text if block.cross else None), x)


def test_fused_projections_start_as_if_they_were_separate():
    block = Latte(ModelConfig(heads=4, head_dim=32, layers=1, text_channels=64)).spatial[0]
    for weight in (*block.attn.qkv.weight.chunk(3), *block.cross.kv.weight.chunk(2), block.attn.out.weight):
        assert weight.abs().max().item() == pytest.approx((6 / 256) ** 0.5, rel=0.01)
        assert weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "temporal_positions": "rope"}])
def test_training_from_scratch_reaches_every_parameter(changes):
    torch.manual_seed(0)
    model = Latte(ModelConfig(**SMALL, **changes))
    start = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    target, losses = random(2, 5, 8, 8, 8, seed=2), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (model(*inputs()) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [name for name, p in model.named_parameters() if not (p - start[name]).abs().max() > 1e-4] == []


# ---- number types and compilation ----


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "temporal_positions": "rope"}])
def test_bfloat16(changes):
    model, (x, t, text) = small(**changes), inputs()
    for p in model.parameters():
        p.data = p.bfloat16().float()
    y = model(x, t, text, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, text, MASK)
    assert (mixed - y).norm() / y.norm() < 2e-2
    low = model.bfloat16()(x, t, text, MASK)  # inputs in float32 are taken as they come
    assert low.dtype == torch.bfloat16 and (low - y).norm() / y.norm() < 5e-2


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "temporal_positions": "rope"}])
def test_compiles_into_one_graph(changes):
    model, (x, t, text) = small(layers=1, **changes), inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, text, MASK), model(x, t, text, MASK), rtol=0, atol=1e-6)


# ---- what users get wrong ----


@pytest.mark.parametrize("changes, message", [
    (dict(labels=torch.tensor([1, 2])), "labels: model.conditioning is text"),
    (dict(x=torch.zeros(2, 5, 3, 8, 8)), r"3 channels.*model\.in_channels is 4"),
    (dict(x=torch.zeros(2, 5, 4, 8, 7)), r"8x7.*model\.patch_size = 2"),
    (dict(t=torch.zeros(3)), r"t must be \[2\] or \[2 5\].*\[3\]"),
    (dict(t=torch.zeros(2, 4)), r"t must be \[2\] or \[2 5\].*\[2, 4\]"),
    (dict(text=torch.zeros(2, 7, 31)), r"31 channels.*model\.text_channels is 32"),
    (dict(text=torch.zeros(1, 7, 32)), r"text must be \[2 l d\]"),
    (dict(text=torch.zeros(2, 2, 7, 32), image_frames=2), r"\[2 3 l d\].*\[2, 2, 7, 32\]"),
    (dict(text_mask=torch.ones(2, 6)), r"text_mask must be \[2, 7\].*\[2, 6\]"),
    (dict(image_frames=6), r"image_frames must be 0 to the 5 frames"),
    (dict(frame_times=torch.arange(4)), r"frame_times must be \[5\] or \[2 5\].*\[4\]"),
    (dict(frame_times=torch.arange(5), image_frames=1), r"frame_times must be \[4\] or \[2 4\].*\[5\]"),
])
def test_inputs_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small()(**{**dict(zip(("x", "t", "text"), inputs(), strict=True)), **changes})

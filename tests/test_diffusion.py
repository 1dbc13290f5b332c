"""Schedules, conversions and losses against golden numbers, other implementations and what the definitions promise."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from latte import diffusion
from latte.config import DiffusionConfig

KINDS = {"flow": ("eps", "x0", "v", "velocity"), "ddpm": ("eps", "x0", "v")}
CONFIGS = [DiffusionConfig(kind=kind, prediction=p, loss=q) for kind, names in KINDS.items() for p in names for q in names]


def name(cfg):
    return f"{cfg.kind}-{cfg.prediction}-{cfg.loss}"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(cfg, *values):
    """Times given as fractions of the way to noise."""
    t = torch.tensor(values, dtype=torch.float64)
    return t if cfg.kind == "flow" else (t * (cfg.timesteps - 1)).round().long()


def ddpm(prediction="eps", **kwargs):
    return DiffusionConfig(kind="ddpm", prediction=prediction, loss=prediction, **kwargs)


# ---- schedules ----


def test_alpha_bar_has_the_published_values():
    bars = diffusion.alpha_bars(1000)
    assert bars.dtype == torch.float64 and bars.shape == (1000,)
    assert bars[0].item() == pytest.approx(0.9999, abs=1e-12)
    assert bars[999].item() == pytest.approx(4.0358e-05, rel=1e-5)
    torch.testing.assert_close(bars.float(), DDPMScheduler(beta_end=2e-2).alphas_cumprod, rtol=2e-5, atol=0)


def test_ddpm_keeps_the_variance_and_its_clean_end():
    alpha, sigma = diffusion.alpha_sigma(torch.tensor([-1, 0, 500, 999]), ddpm())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(4, dtype=torch.float64))
    assert (alpha[0], sigma[0]) == (1, 0)


def test_add_noise_equals_reference_schedulers():
    x0, noise = random(3, 2, 4, 5, 5).float(), random(3, 2, 4, 5, 5, seed=1).float()
    t = torch.tensor([0, 400, 999])
    reference = DDPMScheduler(beta_end=2e-2)
    torch.testing.assert_close(diffusion.add_noise(x0, noise, t, ddpm()), reference.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5)
    flow = FlowMatchEulerDiscreteScheduler()
    t = flow.timesteps[[10, 500, 990]]
    ours = diffusion.add_noise(x0, noise, t / 1000, DiffusionConfig())
    torch.testing.assert_close(ours, flow.scale_noise(x0, t, noise))
    torch.testing.assert_close(diffusion.model_time(t / 1000, DiffusionConfig()), t)


# ---- the four predictions ----


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_come_back_exactly(kind):
    cfg = DiffusionConfig(kind=kind, prediction="eps", loss="eps")
    x0, noise = random(4, 3, 2, 4, 4), random(4, 3, 2, 4, 4, seed=1)
    alpha, sigma = (diffusion.expand(f, x0) for f in diffusion.alpha_sigma(times(cfg, 0.1, 0.3, 0.6, 0.9), cfg))
    x_t = alpha * x0 + sigma * noise
    for source, target in product(KINDS["flow"], repeat=2):
        value, want = (diffusion.combine(x0, noise, alpha, sigma, kind) for kind in (source, target))
        there = diffusion.convert(value, x_t, alpha, sigma, source, target)
        torch.testing.assert_close(there, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(diffusion.convert(there, x_t, alpha, sigma, target, source), value, rtol=1e-9, atol=1e-9)


def test_velocity_is_the_time_derivative_and_v_the_angular_one():
    x0, noise = random(5), random(5, seed=1)
    t = torch.tensor(0.3, dtype=torch.float64)
    one = torch.ones_like(t)
    _, slope = torch.func.jvp(lambda t: (1 - t) * x0 + t * noise, (t,), (one,))
    torch.testing.assert_close(diffusion.combine(x0, noise, 1 - t, t, "velocity"), slope)
    _, slope = torch.func.jvp(lambda t: t.cos() * x0 + t.sin() * noise, (t,), (one,))
    torch.testing.assert_close(diffusion.combine(x0, noise, t.cos(), t.sin(), "v"), slope)


def test_v_equals_the_reference_scheduler():
    x0, noise, t = random(2, 1, 1, 2, 2).float(), random(2, 1, 1, 2, 2, seed=1).float(), torch.tensor([3, 800])
    alpha, sigma = (diffusion.expand(f, x0) for f in diffusion.alpha_sigma(t, ddpm()))
    reference = DDPMScheduler(beta_end=2e-2).get_velocity(x0, noise, t)
    torch.testing.assert_close(diffusion.combine(x0, noise, alpha, sigma, "v"), reference, rtol=1e-5, atol=1e-5)


def test_an_unknown_prediction_is_refused():
    x = torch.ones(1)
    with pytest.raises(ValueError, match="diffusion.prediction.*'score'"):
        diffusion.convert(x, x, x, x, "score", "x0")
    with pytest.raises(ValueError, match="diffusion.loss.*'score'"):
        diffusion.convert(x, x, x, x, "x0", "score")


# ---- times ----


def test_shift_moves_the_log_odds_of_time_by_log_shift():
    cfg = DiffusionConfig(shift_base_tokens=100, logit_mean=0.2, logit_std=0.7)
    uniform = torch.linspace(0.001, 0.999, 201, dtype=torch.float64)
    normal = torch.special.ndtri(uniform)
    for tokens, shift in ((10, 1), (100, 1), (400, 2), (2500, 5)):
        t = diffusion.draw_times(cfg, uniform, tokens)
        assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
        torch.testing.assert_close(torch.logit(t.double()), 0.2 + 0.7 * normal + math.log(shift), rtol=1e-4, atol=1e-4)


def test_shift_equals_the_reference_and_keeps_the_ends():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = diffusion.shift_time(t, 9 * 256, DiffusionConfig())
    reference = FlowMatchEulerDiscreteScheduler(shift=3.0)
    reference.set_timesteps(sigmas=t[1:].flip(0).tolist())
    torch.testing.assert_close(shifted.flip(0).float(), reference.sigmas)
    assert shifted[0] == 0 and shifted[-1] == 1


def test_ddpm_times_are_uniform_integers():
    t = diffusion.draw_times(ddpm(timesteps=10), torch.arange(1000, dtype=torch.float64).view(100, 10) / 1000, 256)
    assert t.dtype == torch.int64 and t.shape == (100, 10)
    assert t.flatten().bincount().tolist() == [100] * 10


# ---- losses ----


@pytest.mark.parametrize("model", ["class_conditional", "unconditional"])
def test_learned_variance_loss_equals_the_original(model):
    """The outputs are those of the original networks, with random weights, on add_noise(x, noise, t); t = 0 and 777."""
    golden = np.load(Path(__file__).parent / "golden" / "ddpm_loss.npz")
    x, noise, t, out, *want = (torch.from_numpy(golden[f"{model}/{k}"]) for k in ("x", "noise", "t", "out", "loss", "mse", "vb"))
    seen = []

    def model_fn(x_t, time, cond):
        seen.append(time)
        return out

    got = diffusion.training_loss(model_fn, x, None, noise, t, ddpm())
    torch.testing.assert_close([got.loss, got.mse, got.vb], want, rtol=3e-6, atol=1e-7)
    assert seen[0].tolist() == [0, 777]


@pytest.mark.parametrize("cfg", CONFIGS, ids=name)
def test_loss_is_the_squared_error_of_the_converted_prediction(cfg):
    x0, noise, off = (random(3, 2, 2, 4, 4, seed=s) for s in range(3))
    t = times(cfg, 0.2, 0.4, 0.7)
    alpha, sigma = (diffusion.expand(f, x0) for f in diffusion.alpha_sigma(t, cfg))
    x_t = diffusion.add_noise(x0, noise, t, cfg)
    right = diffusion.combine(x0, noise, alpha, sigma, cfg.prediction)
    wrong = right + off
    error = diffusion.convert(wrong, x_t, alpha, sigma, cfg.prediction, cfg.loss)
    error = error - diffusion.combine(x0, noise, alpha, sigma, cfg.loss)
    got = diffusion.training_loss(lambda x, t, cond: wrong, x0, None, noise, t, cfg)
    torch.testing.assert_close(got.mse, (error**2).mean((1, 2, 3, 4)))
    assert got.vb is None and torch.equal(got.loss, got.mse)
    assert diffusion.training_loss(lambda x, t, cond: right, x0, None, noise, t, cfg).loss.abs().max() == 0


def test_the_divisor_of_the_loss_has_a_floor():
    cfg = DiffusionConfig(prediction="x0", loss="velocity")
    x0, t = random(3, 1, 1, 2, 2), torch.tensor([0.0, 0.01, 0.2], dtype=torch.float64)
    loss = diffusion.training_loss(lambda x, t, cond: x0 + 1, x0, None, random(*x0.shape, seed=1), t, cfg).loss
    torch.testing.assert_close(loss, torch.tensor([400.0, 400.0, 25.0], dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_time_for_each_frame_is_each_frame_on_its_own(kind):
    cfg = DiffusionConfig(kind=kind, prediction="x0", loss="eps")
    channels = 3 if kind == "flow" else 6
    x0, noise = random(2, 3, 3, 4, 4), random(2, 3, 3, 4, 4, seed=1)
    t = times(cfg, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0).view(2, 3)

    def model_fn(x, time, cond):
        return torch.cat([x, x], 2)[:, :, :channels] * 0.5 + time.view(*time.shape, *[1] * (x.dim() - time.dim())) / 5000

    both = diffusion.training_loss(model_fn, x0, None, noise, t, cfg)
    frames = [diffusion.training_loss(model_fn, x0[:, i:i + 1], None, noise[:, i:i + 1], t[:, i], cfg) for i in range(3)]
    torch.testing.assert_close(both.loss, torch.stack([f.loss for f in frames]).mean(0))
    alone = diffusion.training_loss(model_fn, x0[1:], None, noise[1:], t[1:], cfg)
    torch.testing.assert_close(both.loss[1:], alone.loss)


def test_the_bound_is_the_kl_of_the_two_posteriors():
    cfg, t = ddpm("x0"), torch.tensor([400])
    x0, noise, out = random(1, 1, 2, 3, 3), random(1, 1, 2, 3, 3, seed=1), random(1, 1, 4, 3, 3, seed=2)
    got = diffusion.training_loss(lambda x, t, cond: out, x0, None, noise, t, cfg)
    bars = diffusion.alpha_bars(1000)
    bar, before = bars[400], bars[399]
    beta = 1 - bar / before
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise

    def mean(x0):  # arXiv 2006.11239, eq. 7
        return (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - bar)

    variance = beta * (1 - before) / (1 - bar)
    learned = (variance.log() + (out[:, :, 2:] + 1) / 2 * (beta.log() - variance.log())).exp()
    q, p = torch.distributions.Normal(mean(x0), variance.sqrt()), torch.distributions.Normal(mean(out[:, :, :2]), learned.sqrt())
    torch.testing.assert_close(got.vb, (torch.distributions.kl_divergence(q, p) / math.log(2)).mean().view(1))


def test_the_bound_teaches_the_variance_and_mse_the_mean():
    x0, noise, t = random(2, 1, 2, 3, 3), random(2, 1, 2, 3, 3, seed=1), torch.tensor([0, 500])
    for part, reaches in (("mse", (True, False)), ("vb", (False, True))):
        out = random(2, 1, 4, 3, 3, seed=2).requires_grad_()
        getattr(diffusion.training_loss(lambda x, t, cond, out=out: out, x0, None, noise, t, ddpm()), part).sum().backward()
        assert (out.grad[:, :, :2].abs().min() > 0, out.grad[:, :, 2:].abs().max() > 0) == reaches


def test_likelihoods_of_all_8_bit_levels_sum_to_one():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_scale in ((0.1, -3.0), (-0.98, -2.0), (2.0, 0.0)):
        log_p = diffusion._log_likelihood(levels, torch.full_like(levels, mean), torch.full_like(levels, log_scale))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
        assert levels[log_p[1:-1].argmax() + 1].item() == pytest.approx(min(mean, 1), abs=0.02)


def test_loss_refuses_a_wrong_number_of_channels():
    x = random(1, 1, 2, 3, 3)
    for cfg, channels in ((ddpm(), 3), (DiffusionConfig(), 4)):
        t = times(cfg, 0.5)
        with pytest.raises(ValueError, match="model.out_channels"):
            diffusion.training_loss(lambda x, t, cond, n=channels: random(1, 1, n, 3, 3), x, None, x, t, cfg)

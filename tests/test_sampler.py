"""Samplers against exact answers (Gaussian and mixture data, whose best network is known) and against reference schedulers."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from latte.config import DiffusionConfig, SamplerConfig
from latte.diffusion import alpha_sigma, combine, posterior
from latte.sampler import SAMPLERS, guidance, sample, time_grid

ODE = ("euler", "heun", "ddim", "dpmpp_2m")
PREDICTIONS = [("flow", p) for p in ("eps", "x0", "v", "velocity")] + [("ddpm", p) for p in ("eps", "x0", "v")]
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
MEAN, STD = 0.5, 0.3


def config(kind, prediction="x0", **kwargs):
    return DiffusionConfig(kind=kind, prediction=prediction, loss=prediction, **kwargs)


def column(*values):
    """A batch of one-pixel clips [b 1 1 1 1]."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1, 1)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factors(time, cfg):
    """alpha and sigma at the time that a network is told."""
    return alpha_sigma(time[:1].double() / 1000 if cfg.kind == "flow" else time[:1].long(), cfg)


def gaussian_x0(x, alpha, sigma, mean=MEAN, std=STD):
    """E[x0 | x_t] of data N(mean, std^2)."""
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)


def exact(cfg, best_x0):
    """The network that knows best_x0(x, alpha, sigma) and says it as cfg.prediction."""
    def model_fn(x, time, cond):
        alpha, sigma = factors(time, cfg)
        x0 = best_x0(x, alpha, sigma)
        return combine(x0, (x - alpha * x0) / sigma, alpha, sigma, cfg.prediction)
    return model_fn


def smooth(channels):
    """Some network, neither linear nor exact, whose output depends on x and time."""
    def model_fn(x, time, cond):
        time = time.view(-1, 1, 1, 1, 1).to(x.dtype) / 1000
        out = torch.tanh(x.roll(1, -1) * 0.7 - x.mean((3, 4), keepdim=True) + time)
        return torch.cat([out, torch.sin(3 * x + 5 * time)], 2)[:, :, :channels]
    return model_fn


# ---- grids ----


def test_the_ddpm_grid_is_the_published_one():
    golden = np.load(Path(__file__).parent / "golden" / "ddpm_loss.npz")["timestep_map_250"]
    grid = time_grid(config("ddpm"), SamplerConfig(name="ddpm", steps=250), 1)
    assert grid.times.flip(0).tolist() == golden.tolist()
    assert (grid.alpha[-1], grid.sigma[-1]) == (1, 0)


def test_the_ddim_grid_is_the_published_one():
    grid = time_grid(config("ddpm"), SamplerConfig(name="ddim", steps=50), 1)
    assert grid.times.tolist() == list(range(980, -1, -20))


def test_flow_times_are_shifted_by_the_clip_s_tokens():
    grid = time_grid(config("flow"), SamplerConfig(steps=4), 4 * 256)
    assert grid.times.tolist() == pytest.approx([1, 6 / 7, 2 / 3, 2 / 5])  # shift 2


# ---- exact answers ----


@pytest.mark.parametrize("kind, prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ODE)
def test_gaussian_data_come_out_with_their_mean_and_variance(name, kind, prediction):
    """These samplers are affine in the noise here, so two samples tell mean and standard deviation."""
    cfg = config(kind, prediction)
    out = sample(exact(cfg, gaussian_x0), column(0, 1), None, cfg, SamplerConfig(name=name, steps=200), 256).flatten()
    error = {"euler": 0.01, "ddim": 0.01, "heun": 0.002, "dpmpp_2m": 0.003}[name]
    if kind == "flow" and prediction == "eps":
        error += 0.002  # its first step divides by the floor of alpha
    assert out[0].item() == pytest.approx(MEAN, abs=error)
    assert (out[1] - out[0]).item() == pytest.approx(STD, abs=error)


@pytest.mark.parametrize("steps", [5, 40])
@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_ancestral_sampling_with_the_right_variance_is_exact_in_any_number_of_steps(kind, steps):
    """The network also knows Var(x_s | x_t). The result is then E[x0 | x_t] at the last time, spread over x_t exactly."""
    cfg, settings = config(kind), SamplerConfig(name="ddpm", steps=steps)
    grid = time_grid(cfg, settings, 256)
    calls = iter(range(steps))

    def model_fn(x, time, cond):
        i = next(calls)
        alpha, sigma = grid.alpha[i], grid.sigma[i]
        if i == steps - 1:  # adds no noise
            fraction = torch.zeros_like(x)
        else:
            q = posterior(alpha, sigma, grid.alpha[i + 1], grid.sigma[i + 1])
            hidden = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # Var(x0 | x_t)
            weight = ((q.variance + q.of_x0**2 * hidden) / q.variance).log() / (q.transition / q.variance).log()
            fraction = torch.full_like(x, 2 * weight - 1)
        return torch.cat([gaussian_x0(x, alpha, sigma), fraction], 2)

    # Sample 0 sees no noise at all, sample 1 the first number only, sample 2 + i only that of step i: an exact variance.
    one_hot = torch.eye(steps + 2, dtype=torch.float64)
    out = sample(model_fn, column(*one_hot[1]), None, cfg, settings, 256, noise_fn=lambda i: column(*one_hot[2 + i])).flatten()
    alpha, sigma = grid.alpha[-2], grid.sigma[-2]
    want = STD**2 - STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
    assert out[0].item() == pytest.approx(MEAN, abs=2e-3 if kind == "ddpm" else 1e-9)  # ddpm's x_999 is not quite N(0, 1)
    assert ((out[1:] - out[0]) ** 2).sum().item() == pytest.approx(want.item(), abs=1e-4 if kind == "ddpm" else 1e-9)


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_ancestral_sampling_without_a_learned_variance_tends_to_the_exact_one(kind):
    cfg, errors = config(kind), []
    for steps in (50, 100, 200):
        one_hot = torch.eye(steps + 2, dtype=torch.float64)
        out = sample(exact(cfg, gaussian_x0), column(*one_hot[1]), None, cfg, SamplerConfig(name="ddpm", steps=steps), 256,
                     noise_fn=lambda i, one_hot=one_hot: column(*one_hot[2 + i])).flatten()
        assert out[0].item() == pytest.approx(MEAN, abs=2e-3)
        errors.append(abs(((out[1:] - out[0]) ** 2).sum().sqrt().item() - STD))
    assert errors[0] < 0.1 and errors[1] < 0.65 * errors[0] and errors[2] < 0.65 * errors[1]


@pytest.mark.parametrize("name, order", [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_the_error_falls_at_the_promised_order(kind, name, order):
    """On an even grid of log(alpha / sigma), against the exact solution of the ODE between its ends."""
    errors, std = [], column(0.2, 0.5, 1.5)
    for steps in (40, 80, 160):
        ratio = torch.linspace(-2, 2, steps + 1, dtype=torch.float64).exp()
        sigma = 1 / ((1 + ratio**2).sqrt() if kind == "ddpm" else 1 + ratio)
        alpha = ratio * sigma

        def predict(x, i, alpha=alpha, sigma=sigma):
            x0 = gaussian_x0(x, alpha[i], sigma[i], std=std)
            return x0, (x - alpha[i] * x0) / sigma[i], None

        x = column(-1, 0.3, 2)
        first, last = ((alpha[i]**2 * std**2 + sigma[i]**2).sqrt() for i in (0, -1))
        want = alpha[-1] * MEAN + last / first * (x - alpha[0] * MEAN)
        errors.append((SAMPLERS[name](predict, x, alpha, sigma, iter(range(steps)), None) - want).abs().max().item())
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.15), errors


def test_two_modes_come_out_in_their_shares():
    cfg, modes, std = config("flow", "velocity"), column(-1.0, 1.0), 0.05

    def best_x0(x, alpha, sigma):
        spread = alpha**2 * std**2 + sigma**2
        weights = torch.stack([0.3 * (-(x - alpha * modes[0])**2 / (2 * spread)).exp(),
                               0.7 * (-(x - alpha * modes[1])**2 / (2 * spread)).exp()])
        beliefs = torch.stack([gaussian_x0(x, alpha, sigma, mode, std) for mode in modes])
        return (weights * beliefs).sum(0) / weights.sum(0)

    quantiles = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    for name in (*ODE, "ddpm"):
        noises = random(50, 2000, seed=1)
        out = sample(exact(cfg, best_x0), column(*quantiles), None, cfg, SamplerConfig(name=name, steps=50), 256,
                     noise_fn=lambda i, noises=noises: noises[i].view(-1, 1, 1, 1, 1)).flatten()
        assert (out > 0).double().mean().item() == pytest.approx(0.7, abs=0.03), name
        assert (out.abs() - 1).abs().quantile(0.99) < 0.2, name


# ---- reference schedulers ----


@pytest.mark.parametrize("prediction", TYPES)
def test_ddim_equals_the_reference(prediction):
    """The whole published recipe: 50 steps, 8 channels of which the last 4 are dropped."""
    cfg = config("ddpm", prediction)
    model_fn, noise = smooth(8), random(2, 2, 4, 4, 4, dtype=torch.float32)
    ours = sample(model_fn, noise, None, cfg, SamplerConfig(name="ddim", steps=50), 256)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, prediction_type=TYPES[prediction])
    scheduler.set_timesteps(50)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model_fn(x, t.repeat(2), None)[:, :, :4], t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5 * x.abs().max().item())


@pytest.mark.parametrize("variance, channels", [("fixed_small", 4), ("learned_range", 8)])
def test_ddpm_equals_the_reference(variance, channels):
    cfg = config("ddpm", "v")
    model_fn, noise = smooth(channels), random(2, 2, 4, 4, 4, dtype=torch.float32)
    settings, generator = SamplerConfig(name="ddpm", steps=20), torch.Generator().manual_seed(5)
    drawn = [torch.randn(noise.transpose(1, 2).shape, generator=generator).transpose(1, 2) for _ in range(20)]
    ours = sample(model_fn, noise, None, cfg, settings, 256, noise_fn=drawn.__getitem__)
    scheduler = DDPMScheduler(**BETAS, clip_sample=False, variance_type=variance, prediction_type="v_prediction")
    scheduler.set_timesteps(timesteps=time_grid(cfg, settings, 256).times.tolist())
    x, generator = noise.transpose(1, 2), torch.Generator().manual_seed(5)  # it wants channels second
    for t in scheduler.timesteps:
        out = model_fn(x.transpose(1, 2), t.repeat(2), None).transpose(1, 2)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    torch.testing.assert_close(ours, x.transpose(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [6, 20])
def test_dpmpp_2m_equals_the_reference(steps):
    cfg = config("ddpm", "v")
    model_fn, noise = smooth(4), random(2, 2, 4, 4, 4)
    scheduler = DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model_fn(x, t.repeat(2), None), t, x).prev_sample

    alpha, sigma = alpha_sigma(scheduler.timesteps, cfg)

    def predict(x, i):
        out = model_fn(x, scheduler.timesteps[i].repeat(2), None)
        return alpha[i] * x - sigma[i] * out, None, None

    ends = torch.cat([alpha, torch.ones(1)]), torch.cat([sigma, torch.zeros(1)])
    torch.testing.assert_close(SAMPLERS["dpmpp_2m"](predict, noise, *ends, iter(range(steps)), None), x, rtol=1e-4, atol=1e-4)


def test_flow_euler_equals_the_reference_with_its_shift():
    cfg = config("flow", "velocity")
    model_fn, noise = smooth(4), random(2, 2, 4, 4, 4, dtype=torch.float32)
    ours = sample(model_fn, noise, None, cfg, SamplerConfig(name="euler", steps=12), 9 * 256)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model_fn(x, t.repeat(2), None), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_flow_heun_equals_the_reference():
    model_fn, noise = smooth(4), random(2, 2, 4, 4, 4, dtype=torch.float32)
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(10)
    x = noise
    for t in scheduler.timesteps:  # every inner time comes twice
        x = scheduler.step(model_fn(x, t.repeat(2), None), t, x).prev_sample

    sigma = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()  # its own times

    def predict(x, i):
        out = model_fn(x, (sigma[i] * 1000).float().repeat(2), None)
        return x - sigma[i] * out, x + (1 - sigma[i]) * out, None

    ours = SAMPLERS["heun"](predict, noise, 1 - sigma, sigma, iter(range(10)), None)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


# ---- what every sampler keeps ----


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_a_sample_is_the_same_alone_and_in_a_batch(kind, name):
    cfg = config(kind)
    settings = SamplerConfig(name=name, steps=6)
    noise, steps = random(3, 2, 3, 4, 4, dtype=torch.float32), random(6, 3, 2, 3, 4, 4, seed=1, dtype=torch.float32)
    together = sample(smooth(3), noise, None, cfg, settings, 256, noise_fn=lambda i: steps[i])
    for j in range(3):
        alone = sample(smooth(3), noise[j:j + 1], None, cfg, settings, 256, noise_fn=lambda i, j=j: steps[i, j:j + 1])
        torch.testing.assert_close(alone, together[j:j + 1], rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_network_s_belief_and_the_times_are_the_process_s(name):
    seen, done = [], []

    def model_fn(x, time, cond):
        seen.append(time.tolist())
        return x * 0.5 + cond

    noise = random(2, 1, 1, 2, 2)
    out = sample(model_fn, noise, 3.0, config("flow"), SamplerConfig(name=name, steps=1), 256, noise_fn=lambda i: noise,
                 progress=lambda *a: done.append(a))
    torch.testing.assert_close(out, noise * 0.5 + 3)
    assert seen == [[1000.0, 1000.0]] and done == [(1, 1)]


@pytest.mark.parametrize("name", ODE)
def test_ode_samplers_drop_a_learned_variance_and_keep_the_dtype(name):
    cfg, noise = config("ddpm", "eps"), random(1, 2, 3, 4, 4, dtype=torch.float32)
    settings = SamplerConfig(name=name, steps=4)
    out = sample(smooth(6), noise, None, cfg, settings, 256)
    torch.testing.assert_close(out, sample(smooth(3), noise, None, cfg, settings, 256))
    low = sample(lambda *a: smooth(3)(*a).bfloat16(), noise, None, cfg, settings, 256)
    assert torch.equal(low, sample(lambda *a: smooth(3)(*a).bfloat16().float(), noise, None, cfg, settings, 256))


def test_heun_calls_the_network_twice_a_step_but_in_the_last():
    calls = []
    cfg = config("flow")
    heun = SamplerConfig(name="heun", steps=3)
    sample(lambda x, t, c: calls.append(t[0].item()) or x, random(1, 1, 1, 2, 2), None, cfg, heun, 256)
    assert calls == pytest.approx([1000, 2000 / 3, 2000 / 3, 1000 / 3, 1000 / 3])


def test_settings_that_cannot_work_are_refused():
    noise = random(1, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="sampler.steps: must be at most diffusion.timesteps .1000., got 1001"):
        sample(None, noise, None, config("ddpm"), SamplerConfig(name="ddim", steps=1001), 256)
    with pytest.raises(ValueError, match="sampler.name: ddpm .* needs noise_fn"):
        sample(None, noise, None, config("ddpm"), SamplerConfig(name="ddpm", steps=10), 256)


# ---- guidance ----


def text_model(x, time, cond):
    """Reads its text as a masked mean, as a network with masked attention would."""
    mask = cond["text_mask"].to(x.dtype)
    text = (cond["text"] * mask[..., None]).sum((1, 2)) / mask.sum(1)
    out = x * text.view(-1, 1, 1, 1, 1) + (cond["labels"] * (time + 1)).view(-1, 1, 1, 1, 1)
    return torch.cat([out, 2 * out], 2)


def text_cond(b, l, seed):
    return {"text": random(b, l, 3, seed=seed), "text_mask": torch.ones(b, l, dtype=torch.long), "labels": torch.arange(b) + seed}


@pytest.mark.parametrize("null_length, null_batch", [(2, 3), (5, 3), (7, 1)])
def test_guidance_is_the_formula_in_one_call(null_length, null_batch):
    x, time, cond, null = random(3, 2, 4, 2, 2), torch.full((3,), 500.0), text_cond(3, 5, 1), text_cond(null_batch, null_length, 2)
    calls = []

    def counted(x, time, cond):
        calls.append(len(x))
        return text_model(x, time, cond)

    guided = guidance(counted, null, 7.5)(x, time, cond)
    one, other = text_model(x, time, cond), text_model(x, time, null)
    torch.testing.assert_close(guided[:, :, :4], (other + 7.5 * (one - other))[:, :, :4])
    torch.testing.assert_close(guided[:, :, 4:], one[:, :, 4:])
    assert calls == [6]


def test_guidance_of_one_is_the_model_itself_and_of_none_the_null():
    assert guidance(text_model, text_cond(1, 2, 0), 1.0) is text_model
    x, time, null = random(2, 1, 2, 2, 2), torch.zeros(2), text_cond(2, 3, 4)
    got = guidance(text_model, null, 0.0)(x, time, text_cond(2, 3, 1))
    torch.testing.assert_close(got[:, :, :2], text_model(x, time, null)[:, :, :2])


def test_guidance_of_gaussians_moves_the_mean_by_the_formula():
    """Two Gaussians of one width: the guided score is that of the same Gaussian around null + scale (cond - null)."""
    cfg = config("flow", "velocity")

    def model_fn(x, time, cond):
        return exact(cfg, lambda x, a, s: gaussian_x0(x, a, s, cond["mean"].view(-1, 1, 1, 1, 1)))(x, time, cond)

    null, cond = {"mean": torch.tensor([0.2], dtype=torch.float64)}, {"mean": torch.tensor([0.5, 0.5], dtype=torch.float64)}
    out = sample(guidance(model_fn, null, 3.0), column(0, 1), cond, cfg, SamplerConfig(name="heun", steps=50), 256).flatten()
    assert out.tolist() == pytest.approx([0.2 + 3 * 0.3, 0.2 + 3 * 0.3 + STD], abs=5e-3)

"""Samplers over a model function, with one signature for all, and guidance around it.

Every sampler works for both processes of latte.diffusion. It walks down a grid of times; at each the network's output is
turned into its belief about the data and the noise, x = alpha x0 + sigma eps, whatever the network predicts. The last
point of every grid is clean data: alpha = 1, sigma = 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latte.config import DiffusionConfig, SamplerConfig
from latte.diffusion import alpha_sigma, learned_log_variance, model_time, posterior, shift_time, x0_eps

# eps says nothing about x0 at t = 1 of flow, where alpha = 0; the least alpha of 1000-step ddpm is 0.0063.
ALPHA_FLOOR = 0.005


@dataclass(frozen=True)
class Grid:
    """The times at which the model is called, from noise to data, and alpha, sigma there and at the clean end; float64."""

    times: Tensor  # [steps]
    alpha: Tensor  # [steps + 1]
    sigma: Tensor  # [steps + 1]


def time_grid(cfg: DiffusionConfig, sampler: SamplerConfig, tokens: int) -> Grid:
    """The grid of a sampler; `tokens`, those of the whole clip, set the shift of flow times.

    flow: t = 1 ... 0 evenly, then shifted. ddpm: evenly from the noisiest step to 0, rounded (250 steps of 1000 give 999,
    995, ... 4, 0); ddim takes multiples of timesteps // steps instead (50 give 980, 960, ... 0), as published Latte does: with
    very few steps it begins well below full noise.
    """
    if cfg.kind == "flow":
        times = shift_time(torch.linspace(1, 0, sampler.steps + 1, dtype=torch.float64), tokens, cfg)[:-1]
    elif sampler.steps > cfg.timesteps:
        raise ValueError(f"sampler.steps: must be at most diffusion.timesteps ({cfg.timesteps}), got {sampler.steps}")
    elif sampler.name == "ddim":
        times = torch.arange(sampler.steps).flip(0) * (cfg.timesteps // sampler.steps)
    else:
        times = torch.linspace(cfg.timesteps - 1, 0, sampler.steps, dtype=torch.float64).round().long()
    alpha, sigma = alpha_sigma(times, cfg)
    return Grid(times, torch.cat([alpha, alpha.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)]))


@torch.no_grad()
def sample(model_fn, noise: Tensor, cond, cfg: DiffusionConfig, sampler: SamplerConfig, tokens: int,
           noise_fn: Callable[[int], Tensor] | None = None, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Data [b f c h w] from standard normal `noise` of that shape.

    model_fn(x, time [b], cond) returns c channels or 2c; a learned variance is used by ddpm and dropped by the others.
    noise_fn(i) gives the standard normal numbers [b f c h w] of step i of ddpm: key them by sample, and a sample is the
    same alone and in any batch. progress(done, steps) is called after each step. ValueError for a setting out of range.
    """
    grid = time_grid(cfg, sampler, tokens)
    channels = noise.shape[2]
    if sampler.name == "ddpm" and noise_fn is None:
        raise ValueError("sampler.name: ddpm adds noise at every step and needs noise_fn")

    def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """x0, eps and the fraction of the learned variance (no channels if there is none) at point i of the grid."""
        time = model_time(grid.times[i], cfg).to(x.device).expand(len(x))
        out = model_fn(x, time, cond).to(x.dtype)
        x0, eps = x0_eps(out[:, :, :channels], x, grid.alpha[i], grid.sigma[i], cfg.prediction, ALPHA_FLOOR)
        return x0, eps, out[:, :, channels:]

    def steps() -> Iterator[int]:
        for i in range(sampler.steps):
            yield i
            if progress is not None:
                progress(i + 1, sampler.steps)

    return SAMPLERS[sampler.name](predict, noise, grid.alpha, grid.sigma, steps(), noise_fn)


def euler(predict, x: Tensor, alpha: Tensor, sigma: Tensor, steps: Iterator[int], noise_fn) -> Tensor:
    """Euler's method for the probability-flow ODE dx = x0 d(alpha) + eps d(sigma); flow: dx = velocity dt (arXiv 2209.03003)."""
    for i in steps:
        x0, eps, _ = predict(x, i)
        x = x + (alpha[i + 1] - alpha[i]) * x0 + (sigma[i + 1] - sigma[i]) * eps
    return x


def heun(predict, x: Tensor, alpha: Tensor, sigma: Tensor, steps: Iterator[int], noise_fn) -> Tensor:
    """Heun's method for the same ODE, two model calls a step but one in the last (Karras et al., arXiv 2206.00364, algorithm 1)."""
    for i in steps:
        d_alpha, d_sigma = alpha[i + 1] - alpha[i], sigma[i + 1] - sigma[i]
        x0, eps, _ = predict(x, i)
        slope = d_alpha * x0 + d_sigma * eps
        if sigma[i + 1] > 0:
            x0, eps, _ = predict(x + slope, i + 1)
            slope = (slope + d_alpha * x0 + d_sigma * eps) / 2
        x = x + slope
    return x


def ddim(predict, x: Tensor, alpha: Tensor, sigma: Tensor, steps: Iterator[int], noise_fn) -> Tensor:
    """Deterministic DDIM (Song et al., arXiv 2010.02502, eq. 12 with eta = 0)."""
    for i in steps:
        x0, eps, _ = predict(x, i)
        x = alpha[i + 1] * x0 + sigma[i + 1] * eps
    return x


def ddpm(predict, x: Tensor, alpha: Tensor, sigma: Tensor, steps: Iterator[int], noise_fn) -> Tensor:
    """Ancestral sampling (Ho et al., arXiv 2006.11239, algorithm 2), with the posterior's variance or the learned one."""
    for i in steps:
        x0, _, fraction = predict(x, i)
        q = posterior(alpha[i], sigma[i], alpha[i + 1], sigma[i + 1])
        x = q.of_xt * x + q.of_x0 * x0
        if sigma[i + 1] > 0:
            learned = fraction.shape[2] > 0
            log_variance = learned_log_variance(fraction, q.transition, q.variance) if learned else q.variance.log()
            x = x + (log_variance / 2).exp() * noise_fn(i)
    return x


def dpmpp_2m(predict, x: Tensor, alpha: Tensor, sigma: Tensor, steps: Iterator[int], noise_fn) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2), first order in the first and the last step.

    From pure noise (flow) the first step spans an infinite lambda, so the second is first order as well.
    """
    half_log_snr = alpha.log() - sigma.log()  # lambda of the paper: -inf at pure noise, +inf at clean data
    last = None
    for i in steps:
        x0, _, _ = predict(x, i)
        h = half_log_snr[i + 1] - half_log_snr[i]
        d = x0
        if last is not None and sigma[i + 1] > 0:
            r = (half_log_snr[i] - half_log_snr[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * d
        last = x0
    return x


SAMPLERS = {"euler": euler, "heun": heun, "ddim": ddim, "ddpm": ddpm, "dpmpp_2m": dpmpp_2m}


def guidance(model_fn, null_cond: dict[str, Tensor], scale: float):
    """A model function that moves the prediction away from `null_cond`'s (Ho and Salimans, arXiv 2207.12598), by `scale`.

    guided = null + scale (cond - null), from one call on twice the batch. Conditions are dicts of tensors with the batch
    first, null_cond's with a batch of 1 or of the sample's; the shorter text is filled up with zeros, and so is its mask.
    A learned variance stays the conditional one: ODE samplers drop it, and for ddpm the published models do the same.
    scale = 1 is model_fn itself.
    """
    if scale == 1:
        return model_fn

    def guided(x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        channels = x.shape[2]
        both = {key: _stack(null_cond[key], cond[key]) for key in cond}
        null, kept = model_fn(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        mean = null[:, :, :channels] + scale * (kept[:, :, :channels] - null[:, :, :channels])
        return torch.cat([mean, kept[:, :, channels:]], 2)

    return guided


def _stack(null: Tensor, cond: Tensor) -> Tensor:
    """Both along the batch, [2b ...]; dimension 1 of the shorter is filled up with zeros."""
    null = null.expand(len(cond), *null.shape[1:])
    if cond.dim() == 1:
        return torch.cat([null, cond])
    length = max(null.shape[1], cond.shape[1])
    return torch.cat([_fill(null, length), _fill(cond, length)])


def _fill(x: Tensor, length: int) -> Tensor:
    return torch.cat([x, x.new_zeros(len(x), length - x.shape[1], *x.shape[2:])], 1)

"""The two noising processes and their training losses, as pure functions.

Both processes add noise as x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, 1) and differ only in alpha and sigma:

    flow   rectified flow (Liu et al., arXiv 2209.03003): t in [0, 1], alpha = 1 - t, sigma = t
    ddpm   Ho et al., arXiv 2006.11239: integer t in 0 .. timesteps - 1, alpha^2 = prod(1 - beta), sigma^2 = 1 - alpha^2

A network may predict any of four quantities; at a given x_t each of them determines the other three:

    eps    x0    v = alpha eps - sigma x0 (Salimans and Ho, arXiv 2202.00512)    velocity = eps - x0 (flow: dx_t/dt)

Nothing here draws a random number: noise and times come in as arguments, so the caller can key them by sample and step.
Letters: b batch, f frames, c channels, h w height and width. A time t is [b], or [b f] for one time for each frame.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from latte.config import DiffusionConfig

# When an error in x0 (eps) is measured as an error in another quantity it is divided by sigma (alpha), which is 0 at one end.
# The divisor of the loss is kept above this, as in Li and He, arXiv 2511.13720.
LOSS_FLOOR = 0.05


@dataclass(frozen=True)
class Loss:
    """Losses of a batch, each sample on its own: loss = mse (+ vb)."""

    loss: Tensor  # [b] what to minimise
    mse: Tensor  # [b] squared error in the quantity cfg.loss
    vb: Tensor | None  # [b] variational bound in bits per element, where the variance is learned


@dataclass(frozen=True)
class Posterior:
    """q(x_s | x_t, x0) = N(of_xt x_t + of_x0 x0, variance) for a time s before t."""

    of_xt: Tensor
    of_x0: Tensor
    variance: Tensor
    transition: Tensor  # Var(x_t | x_s): ddpm's beta for neighbouring steps


# ---- the processes ----


@lru_cache
def alpha_bars(timesteps: int, device: torch.device | str = "cpu") -> Tensor:
    """prod(1 - beta) for linear betas from 1e-4 to 2e-2, float64 [timesteps] (arXiv 2006.11239, section 4)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 2e-2, timesteps, dtype=torch.float64), 0).to(device)


def alpha_sigma(t: Tensor, cfg: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """The factors of data and noise at times t, float64 and shaped like t. For ddpm t = -1 means clean data."""
    if cfg.kind == "flow":
        return 1 - t.double(), t.double()
    squared = torch.where(t < 0, 1.0, alpha_bars(cfg.timesteps, t.device)[t.clamp(min=0)])
    return squared.sqrt(), (1 - squared).sqrt()


def model_time(t: Tensor, cfg: DiffusionConfig) -> Tensor:
    """What a network is told about t: a float32 between 0 and about 1000 for both processes."""
    return (t * 1000 if cfg.kind == "flow" else t).float()


def expand(factor: Tensor, x: Tensor) -> Tensor:
    """A factor for each sample [b] or frame [b f], shaped and typed so that it multiplies x [b f c h w]."""
    return factor.to(x.dtype).reshape(factor.shape + (1,) * (x.dim() - factor.dim()))


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, cfg: DiffusionConfig) -> Tensor:
    """x_t [b f c h w] at times t [b] or [b f]."""
    alpha, sigma = alpha_sigma(t, cfg)
    return expand(alpha, x0) * x0 + expand(sigma, x0) * noise


def posterior(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Posterior:
    """The step back from t to an earlier s, for any alpha and sigma (Kingma et al., arXiv 2107.00630, appendix A)."""
    ratio = alpha_t / alpha_s
    transition = sigma_t**2 - ratio**2 * sigma_s**2
    return Posterior(
        of_xt=ratio * sigma_s**2 / sigma_t**2,
        of_x0=alpha_s * transition / sigma_t**2,
        variance=transition * sigma_s**2 / sigma_t**2,
        transition=transition,
    )


# ---- the four predictions ----


def x0_eps(value: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, source: str, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """(x0, eps) that a prediction of kind `source` at x_t stands for; alpha and sigma broadcast against x_t.

    Exact, but for `floor`: a divisor alpha is not taken below it. eps says nothing about x0 where alpha = 0 (flow at t = 1).
    """
    if source == "x0":
        return value, (x_t - alpha * value) / sigma
    if source == "eps":
        return (x_t - sigma * value) / alpha.clamp(min=floor), value
    if source == "v":
        norm = alpha**2 + sigma**2  # 1 for ddpm, not for flow
        return (alpha * x_t - sigma * value) / norm, (sigma * x_t + alpha * value) / norm
    if source == "velocity":
        norm = alpha + sigma  # 1 for flow
        return (x_t - sigma * value) / norm, (x_t + alpha * value) / norm
    raise ValueError(f"diffusion.prediction: must be eps, x0, v or velocity, got {source!r}")


def combine(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, target: str) -> Tensor:
    """The quantity `target` (eps, x0, v or velocity) of known data and noise."""
    if target == "x0":
        return x0
    if target == "eps":
        return eps
    if target == "v":
        return alpha * eps - sigma * x0
    if target == "velocity":
        return eps - x0
    raise ValueError(f"diffusion.loss: must be eps, x0, v or velocity, got {target!r}")


def convert(value: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, source: str, target: str) -> Tensor:
    """A prediction at x_t, of kind `source`, as one of kind `target`; alpha and sigma broadcast against x_t."""
    return value if source == target else combine(*x0_eps(value, x_t, alpha, sigma, source), alpha, sigma, target)


# ---- training ----


def shift_time(t: Tensor, tokens: int, cfg: DiffusionConfig) -> Tensor:
    """Move flow times towards noise, as longer and larger clips need (Esser et al., arXiv 2403.03206, section 5.3.2).

    More tokens of a smooth signal average more noise away, so the same t destroys less. `tokens`: of the whole clip.
    """
    shift = max(1.0, math.sqrt(tokens / cfg.shift_base_tokens))
    return shift * t / (1 + (shift - 1) * t)


def draw_times(cfg: DiffusionConfig, uniform: Tensor, tokens: int) -> Tensor:
    """Training times from the caller's uniform numbers in [0, 1), float64 [b] or [b f], shaped like them.

    flow: logit-normal (arXiv 2403.03206, section 3.1), then shifted; float32. ddpm: uniform on 0 .. timesteps - 1; int64.
    """
    if cfg.kind == "flow":
        normal = torch.special.ndtri(uniform)
        return shift_time(torch.sigmoid(cfg.logit_mean + cfg.logit_std * normal), tokens, cfg).float()
    return (uniform * cfg.timesteps).long()


def loss_weight(alpha: Tensor, sigma: Tensor, cfg: DiffusionConfig) -> Tensor:
    """|d loss quantity / d predicted quantity| at fixed x_t: by how much an error grows from one into the other.

    At fixed x_t all four quantities are affine in x0, with slopes 1, -alpha/sigma, -(alpha^2+sigma^2)/sigma and
    -(alpha+sigma)/sigma; times sigma they stay finite. x0 prediction scored as velocity in flow: 1 / max(t, LOSS_FLOOR).
    """
    if cfg.prediction == cfg.loss:
        return torch.ones_like(sigma)
    slope = {"x0": sigma, "eps": alpha, "v": alpha**2 + sigma**2, "velocity": alpha + sigma}
    return slope[cfg.loss] / slope[cfg.prediction].clamp(min=LOSS_FLOOR)


def training_loss(model_fn, x0: Tensor, cond, noise: Tensor, t: Tensor, cfg: DiffusionConfig) -> Loss:
    """Loss of model_fn(x_t, time, cond) at x0 and noise [b f c h w] and times t [b] or [b f].

    The network returns c channels, or 2c under ddpm: then the second half is the learned variance of Nichol and Dhariwal
    (arXiv 2102.09672), and its bound `vb` is added. ValueError for any other number of channels.
    """
    channels = x0.shape[2]
    alpha, sigma = alpha_sigma(t, cfg)
    a, s = expand(alpha, x0), expand(sigma, x0)
    x_t = a * x0 + s * noise                                          # [b f c h w]
    out = model_fn(x_t, model_time(t, cfg), cond).to(x0.dtype)        # [b f c h w] or [b f 2c h w]
    if out.shape[2] not in ((channels,) if cfg.kind == "flow" else (channels, 2 * channels)):
        raise ValueError(f"model.out_channels: must be {channels} (or {2 * channels}, a learned variance, with "
                         f"diffusion.kind = ddpm), got {out.shape[2]} with {cfg.kind}")
    prediction, fraction = out[:, :, :channels], out[:, :, channels:]
    error = prediction - combine(x0, noise, a, s, cfg.prediction)
    mse = _mean((expand(loss_weight(alpha, sigma, cfg), x0) * error) ** 2)
    if fraction.shape[2] == 0:
        return Loss(loss=mse, mse=mse, vb=None)
    # Detached: the bound teaches the variance only, the mean learns from mse alone (arXiv 2102.09672, section 3.3).
    x0_hat, _ = x0_eps(prediction.detach(), x_t, a, s, cfg.prediction)
    vb = _mean(_bound(x0, x0_hat, x_t, fraction, t, cfg))
    return Loss(loss=mse + vb, mse=mse, vb=vb)


def learned_log_variance(fraction: Tensor, transition: Tensor, variance: Tensor) -> Tensor:
    """The network's fraction in [-1, 1] places log Var between the posterior's and the transition's (arXiv 2102.09672, eq. 15)."""
    weight = (fraction + 1) / 2
    return weight * transition.log().to(fraction.dtype) + (1 - weight) * variance.log().to(fraction.dtype)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)                                       # [b]


def _bound(x0: Tensor, x0_hat: Tensor, x_t: Tensor, fraction: Tensor, t: Tensor, cfg: DiffusionConfig) -> Tensor:
    """Terms of the variational bound in bits for each element [b f c h w]: KL for t > 0, likelihood of the data at t = 0."""
    def step_back(t):
        return posterior(*alpha_sigma(t, cfg), *alpha_sigma(t - 1, cfg))

    q = step_back(t)
    variance = step_back(t.clamp(min=1)).variance                     # at t = 0 it would be 0: the next one stands in
    log_q = expand(variance.log(), x0)
    log_p = learned_log_variance(fraction, expand(q.transition, x0), expand(variance, x0))
    of_xt, of_x0 = expand(q.of_xt, x0), expand(q.of_x0, x0)
    mean_q, mean_p = of_x0 * x0 + of_xt * x_t, of_x0 * x0_hat + of_xt * x_t
    kl = 0.5 * (log_p - log_q - 1 + (log_q - log_p).exp() + (mean_q - mean_p) ** 2 * (-log_p).exp())
    return torch.where(expand(t == 0, x0).bool(), -_log_likelihood(x0, mean_p, 0.5 * log_p), kl) / math.log(2)


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log probability of x under a Gaussian cut into bins of 1/127.5, as wide as the 8-bit levels of [-1, 1], the outermost
    open-ended (arXiv 2006.11239, section 3.3).

    The normal's distribution function is the tanh approximation that published losses of this family were computed with.
    """
    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centred, precision = x - mean, (-log_scale).exp()
    upper = torch.where(x > 0.999, 1.0, cdf(precision * (centred + 1 / 255)))
    lower = torch.where(x < -0.999, 0.0, cdf(precision * (centred - 1 / 255)))
    return (upper - lower).clamp(min=1e-12).log()

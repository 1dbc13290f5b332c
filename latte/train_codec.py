"""Trains a codec for frames that no published VAE suits, such as the embedded world's small ones.

    python -m latte.train_codec configs/NAME.yaml [section.key=value ...]

A deep-compression autoencoder (Chen et al., arXiv 2410.10733, diffusers' AutoencoderDC) learns the frames of data and stages, as
the section autoencoder says. RUN/vae is then a folder for codec.path. The same command again goes on from the newest checkpoint.
"""

import argparse
import contextlib
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from latte import checkpoint, config, keyed
from latte.command import Stop, command
from latte.config import AutoencoderConfig, Config
from latte.data import make_loader, open_clips, table
from latte.optim import EMA, lr_at, make_optimizer
from latte.runlog import RunLog

MEASURED = 32  # batches that tell the spread of the latents


def build(cfg: AutoencoderConfig) -> torch.nn.Module:
    """An autoencoder: the first stage only halves the picture, each other one has a residual block. New, or that of decoder_of.

    Raises ValueError if there is no such VAE there.
    """
    from diffusers import AutoencoderDC  # takes seconds to import

    stages = len(cfg.widths)
    layers, plain = (0, *[1] * (stages - 1)), ((),) * stages
    vae = AutoencoderDC(
        latent_channels=cfg.latent_channels, encoder_block_out_channels=tuple(cfg.encoder_widths or cfg.widths),
        encoder_layers_per_block=layers, encoder_qkv_multiscales=plain, decoder_block_out_channels=tuple(cfg.widths),
        decoder_layers_per_block=layers, decoder_qkv_multiscales=plain)
    if cfg.decoder_of:
        try:
            old = AutoencoderDC.from_pretrained(cfg.decoder_of)
            vae.load_state_dict(old.state_dict())
        except (OSError, ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"autoencoder.decoder_of: {cfg.decoder_of} is no folder of a VAE of these widths ({why})") from None
        vae.encoder.requires_grad_(False)
        vae.register_to_config(scaling_factor=old.config.scaling_factor)
    return vae


def losses(vae: torch.nn.Module, x: Tensor, noise: Tensor, cfg: AutoencoderConfig) -> tuple[Tensor, Tensor]:
    """The loss of clips [b f 3 h w] in [-1, 1] and the mean squared error of their pixels.

    Absolute and squared error, where frames differ from their mean weighs more: most pixels of most clips are background. With
    cfg.straight, frames are decoded from the mean of the latents before and after them as well: what moves evenly in pixels then
    does so in latents (Henaff et al., Perceptual straightening of natural videos, 2019), and diffusion has smoother paths to learn.
    noise: standard normal [b f c h' w'] like the latents, or twice as many with cfg.straight, [b 2f c h' w'].
    """
    (b, f), frames = x.shape[:2], _flat(x)
    usual = frames.mean(0)

    def fit(z: Tensor, noise: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        off = vae.decode(z + cfg.noise * noise).sample.float() - wanted
        weight = 1 + cfg.foreground * (wanted - usual).abs().amax(1, keepdim=True)
        return (weight * (off.abs() + off.square())).mean(), off.square().mean()

    z = vae.encode(frames).latent.float()
    loss, error = fit(z, noise[:, :f].flatten(0, 1), frames)
    loss = loss + cfg.latent_weight / 2 * z.square().mean()
    if cfg.straight:
        z = z.unflatten(0, (b, f))
        between = (z[:, :-2] + z[:, 2:]) / 2
        loss = loss + cfg.straight * fit(between.flatten(0, 1), noise[:, f:-2].flatten(0, 1), _flat(x[:, 1:-1]))[0]
    return loss, error


def _flat(x: Tensor) -> Tensor:
    """Clips [b f 3 h w] as pictures [b*f 3 h w] in the layout that convolutions like."""
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def train(cfg: Config, stop: Stop | None = None) -> Path | None:
    """Trains or resumes; gives the folder of the autoencoder. Raises ValueError or OSError with the cause.

    When a signal came to stop, the update under way is the last, its state is saved and None is returned.
    """
    if cfg.data.source == "cache":
        raise ValueError("data.source: a cache holds latents already; give what they are made of: world, folder or manifest")
    autocast = "no" if cfg.train.mixed_precision == "fp32" else cfg.train.mixed_precision
    accelerator = Accelerator(mixed_precision=autocast, log_with=cfg.train.trackers or None, project_dir=cfg.run)
    if accelerator.num_processes > 1:
        raise ValueError("the autoencoder is trained by one process; run it without accelerate launch")
    with checkpoint.lock(cfg.run):
        return _train(cfg, accelerator, stop)


def _train(cfg: Config, accelerator: Accelerator, stop: Stop | None) -> Path | None:
    clips = open_clips(cfg.data, cfg.seed, cfg.stages)
    held = table(clips, cfg.stages)
    torch.manual_seed(cfg.seed)  # initial weights only
    vae = build(cfg.autoencoder).to(accelerator.device, memory_format=torch.channels_last)
    factor = vae.spatial_compression_ratio
    for key, shape in cfg.shapes():
        if cfg.autoencoder.straight and shape.frames < 3:
            raise ValueError(f"{key}.frames: autoencoder.straight needs clips of 3 frames or more, got {shape.frames}")
        if shape.height % factor or shape.width % factor:
            raise ValueError(f"{key}.height: height and width must divide by {factor}, the pixels a latent, got {shape}")
    optimizer, ema = make_optimizer(vae, cfg.optim, seed=cfg.seed), EMA(vae, cfg.optim.ema_decay)
    found, wrong = checkpoint.newest_good(cfg.run)
    start = checkpoint.load(found, vae, ema, optimizer) if found else 0
    writer = checkpoint.Writer(cfg.run, cfg.train.keep_checkpoints, cfg.train.keep_every_steps)
    with contextlib.closing(RunLog(cfg, accelerator, start)) as log, contextlib.closing(writer):
        log.say(f"{cfg.run}: from update {start} to {cfg.total_steps}, {sum(p.numel() for p in vae.parameters()):,} weights")
        log.say(held)
        for why in wrong:
            log.event("checkpoint", start, f"passed over a damaged checkpoint: {why}")
        done = torch.ones((), device=accelerator.device)
        for batch in make_loader(clips, cfg.data, cfg.stages, cfg.seed, start):
            x, step = batch.x.to(accelerator.device), batch.step
            optimizer.begin(step, lr_at(step, cfg.optim, cfg.total_steps, cfg.stages[batch.stage].learning_rate))
            b, f, _, h, w = x.shape
            shape = (b, f * (2 if cfg.autoencoder.straight else 1), cfg.autoencoder.latent_channels, h // factor, w // factor)
            noise = torch.from_numpy(keyed.normal(shape, cfg.seed, "latent noise", step)).to(x)
            with accelerator.autocast():
                loss, error = losses(vae, x, noise, cfg.autoencoder)
            accelerator.backward(loss)
            if cfg.optim.grad_clip:
                torch.nn.utils.clip_grad_norm_(vae.parameters(), cfg.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(vae, step, done)
            log.step(batch.stage)
            final = step + 1 == cfg.total_steps
            if final or (step + 1) % cfg.train.log_every_steps == 0:
                log.metrics(step + 1, {"stage": batch.stage, "loss": loss.item(), "psnr_db": 10 * math.log10(4 / error.item())})
            if final or stop or (step + 1) % cfg.train.save_every_steps == 0:
                writer.save(step + 1, cfg, vae, ema, optimizer)
            writer.check()
            if stop and not final:
                writer.finish()
                log.event("signal", step + 1, f"interrupted after update {step + 1}; saved, the same command goes on from there")
                return None
        writer.finish()
    with torch.no_grad():
        for name, value in checkpoint.trained(vae).items():
            value.copy_(ema.weights[name])
    return _publish(vae, cfg, (batch.x.to(accelerator.device) for batch in make_loader(clips, cfg.data, cfg.stages, cfg.seed)))


@torch.no_grad()
def _publish(vae: torch.nn.Module, cfg: Config, frames) -> Path:
    """Writes RUN/vae, whose scaling factor gives latents a standard deviation of 1."""
    if not cfg.autoencoder.decoder_of:
        values = torch.cat([vae.encode(_flat(x)).latent.flatten() for _, x in zip(range(MEASURED), frames, strict=False)])
        vae.register_to_config(scaling_factor=1 / values.std().item())
    folder = Path(cfg.run) / "vae"
    part = folder.with_name(f".vae.{os.getpid()}.part")
    vae.to(memory_format=torch.contiguous_format).save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    stop = Stop()
    folder = train(config.load(args.config, args.overrides), stop)
    if folder is None:
        return stop.code
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

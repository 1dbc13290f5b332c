"""Trains Latte from a config:  accelerate launch train.py configs/NAME.yaml [section.key=value ...] [--dry-run]

The same command again resumes from the run's newest checkpoint. What an update sees (clips, order, noise, timesteps, dropped
captions) is a function of the config and the update's number, so a resumed run ends in the weights of an uninterrupted one.
Letters: b batch, f frames, c channels, h w height and width, l text tokens, d width.
"""

import argparse
import contextlib
import copy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from latte import checkpoint, config, diffusion, keyed, lora, memory, pipeline, video
from latte.codec import VideoCodec
from latte.data import Batch, FolderClips, make_loader, open_clips
from latte.model import Latte, flops, frame_times
from latte.optim import EMA, lr_at, make_optimizer
from latte.runlog import RunLog
from latte.text import TextEncoder
from latte.world.caption import caption
from latte.world.judge import judge
from latte.world.scene import sample_scene

INTERRUPTED = 130  # exit code after a signal: the state was saved, run the same command again


def train(cfg: config.Config) -> int:
    """Runs or resumes the training that `cfg` describes. Returns the exit code; raises ValueError or OSError with the cause."""
    precision = "no" if cfg.train.mixed_precision == "fp32" else cfg.train.mixed_precision  # accelerate's word for it
    accelerator = Accelerator(mixed_precision=precision, log_with=cfg.train.trackers or None, project_dir=cfg.run)
    device, rank, ranks = accelerator.device, accelerator.process_index, accelerator.num_processes

    clips = open_clips(cfg.data, cfg.seed, cfg.stages)
    text = TextEncoder(cfg.text, device) if cfg.model.conditioning == "text" else None
    codec = VideoCodec(cfg.codec, device)
    _check_fit(cfg, clips, text, codec)
    torch.manual_seed(cfg.seed)  # initial weights only; training draws keyed numbers
    model, notes = pipeline.build(cfg)
    model.to(device)
    optimizer, ema = make_optimizer(model, cfg.optim), EMA(model, cfg.optim.ema_decay)

    start, changed = 0, []
    if checkpoint.latest(cfg.run):
        found = checkpoint.read(cfg.run)
        start = checkpoint.load(found, model, ema, optimizer)
        before, now = config.to_dict(found.config), config.to_dict(cfg)
        changed = [key for key in now if key not in ("run", "train", "preview") and now[key] != before[key]]
    raw, raw_optimizer = model, optimizer
    if cfg.train.checkpoint_blocks:
        memory.checkpoint_blocks(raw)
    if cfg.train.compile:
        for block in [*raw.spatial, *raw.temporal]:
            block.compile()
    model, optimizer = accelerator.prepare(model, optimizer)

    with contextlib.closing(RunLog(cfg, accelerator, start)) as log:
        log.say(f"{cfg.run}: from update {start} to {cfg.total_steps} on {ranks} process(es), {device.type}")
        for note in notes if start == 0 else []:
            log.say(note)
        if changed:
            log.say(f"warning: not the settings that this run began with: {', '.join(changed)}")
        if isinstance(clips, FolderClips):
            log.say(f"{len(clips.clips)} clips" + "".join(f"\nleft out {path}: {why}" for path, why in clips.dropped.items()))
        stop = _Stop()
        window = _Window(device)

        for batch in make_loader(clips, cfg.data, cfg.stages, cfg.seed, start, rank, ranks):
            window.waited()
            stage, step = cfg.stages[batch.stage], batch.step
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, cfg.optim, cfg.total_steps)
            for index, part in enumerate(_split(batch, cfg.train.micro_batches)):
                last = index == cfg.train.micro_batches - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    losses = _losses(part, cfg, model, text, codec, device)
                    # the sum over all parts and processes is the mean over the batch: DDP averages, so ranks multiply
                    accelerator.backward(losses.sum() * (ranks / stage.batch_size))
                    window.loss += losses.detach().sum() * (ranks / stage.batch_size)
            clipped = cfg.optim.grad_clip and step >= cfg.optim.clip_from_step
            norm = accelerator.clip_grad_norm_(model.parameters(), cfg.optim.grad_clip if clipped else float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not accelerator.optimizer_step_was_skipped:
                ema.update(raw, step)
            window.count(stage.batch_size, stage.batch_size * stage.frames)
            log.step(batch.stage)

            done, final = step + 1, step + 1 == cfg.total_steps
            signalled = _anywhere(stop.signalled, accelerator)
            save = final or signalled or done % cfg.train.save_every_steps == 0 or cfg.stage_at(done) != batch.stage
            if save or done == 1 or done % cfg.train.log_every_steps == 0:
                values = window.close(accelerator)
                if not np.isfinite(values["loss"]):
                    raise ValueError(f"the loss is {values['loss']} at update {done}; {cfg.run} keeps the checkpoints before it")
                log.metrics(done, {"stage": batch.stage, **values, "grad_norm": norm.item(), "lr": group["lr"]})
            if save:
                if accelerator.is_main_process:
                    checkpoint.save(cfg.run, done, cfg, raw, ema, raw_optimizer, cfg.train.keep_checkpoints)
                accelerator.wait_for_everyone()
            if cfg.preview.count and (final or (cfg.preview.every_steps and done % cfg.preview.every_steps == 0)):
                if accelerator.is_main_process:
                    log.metrics(done, preview(cfg, raw, ema, text, codec, device, done, batch.stage, log))
                accelerator.wait_for_everyone()
            if signalled and not final:
                log.say(f"interrupted after update {done}; saved, the same command goes on from there")
                return INTERRUPTED

    if accelerator.is_main_process:
        if cfg.init.lora_rank and cfg.model.conditioning == "text":
            print(f"adapters: {lora.save(raw, ema.weights, cfg.init, Path(cfg.run) / 'adapters')}")
        digest = checkpoint.weights_sha256(checkpoint.trained(raw))
        (Path(cfg.run) / "parameters.sha256").write_text(digest + "\n")
        print(f"parameters sha256: {digest}")
    return 0


def _check_fit(cfg: config.Config, clips, text: TextEncoder | None, codec: VideoCodec) -> None:
    """Settings that only the data, the text encoder and the codec can tell. Raises ValueError naming the key."""
    needed = {"in_channels": codec.channels} | ({"text_channels": text.width} if text else {})
    if cfg.model.conditioning == "class":
        cfg.data.class_names = cfg.data.class_names or clips.classes
        needed["classes"] = len(cfg.data.class_names)
        strange = sorted(set(clips.classes) - set(cfg.data.class_names))
        if strange:
            raise ValueError(f"data.class_names: lacks {', '.join(strange[:6])}, folders of {cfg.data.path}")
    for key, value in needed.items():
        if getattr(cfg.model, key) != value:
            raise ValueError(f"model.{key}: must be {value} for this text encoder, codec and data, got {getattr(cfg.model, key)}")
    if codec.time_factor > 1 and any(stage.image_frames for stage in cfg.stages):
        raise ValueError("stages.image_frames: this VAE codes frames together, so images cannot join a clip")


def _losses(part: Batch, cfg: config.Config, model: torch.nn.Module, text: TextEncoder | None, codec: VideoCodec, device):
    """Loss of every sample of a part of the batch, [b]; all randomness is keyed by (seed, position, purpose)."""
    def normal(purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        draws = [keyed.normal(shape, cfg.seed, purpose, p) for p in part.positions]
        return torch.from_numpy(np.stack(draws)).to(device)

    images = len(part.captions[0]) - 1
    with torch.no_grad():
        _, frames, _, height, width = part.frames.shape
        shape = codec.latent_shape(frames, height, width)
        x0 = codec.encode(part.frames.to(device), normal("posterior", shape) if cfg.codec.posterior == "sample" else None)
        cond = pipeline.conditions(cfg, text, part.captions, device)
    tokens = (shape[0] - images) * shape[2] * shape[3] // cfg.model.patch_size ** 2
    draws = [keyed.rng(cfg.seed, "time", p).random() for p in part.positions]
    times = diffusion.draw_times(cfg.diffusion, torch.tensor(draws, dtype=torch.float64), tokens).to(device)  # [b]
    places = frame_times(cfg.model, shape[0] - images, codec.time_factor * cfg.data.base_fps / part.fps).to(device)  # [f] or [b f]

    def model_fn(x, t, cond):
        return model(x, t, frame_times=places, image_frames=images, **cond)

    return diffusion.training_loss(model_fn, x0, cond, normal("noise", tuple(x0.shape[1:])), times, cfg.diffusion).loss


@torch.no_grad()
def preview(cfg: config.Config, trained: Latte, ema: EMA, text: TextEncoder | None, codec: VideoCodec, device, done: int,
            stage_index: int, log: RunLog) -> dict[str, float]:
    """Samples preview videos from the EMA weights into the run's folder; returns judge scores for the embedded world."""
    stage = cfg.stages[stage_index]
    frames, fps = cfg.preview.frames or stage.frames, max(stage.fps)
    model = copy.deepcopy(trained).eval()
    for name, p in checkpoint.trained(model).items():
        p.copy_(ema.weights[name])
    pipe = pipeline.Pipeline(cfg, model, text, codec, device)
    scores: dict[str, list[float]] = {}
    for index in range(cfg.preview.count):
        scene, prompt = None, cfg.preview.prompts[index] if index < len(cfg.preview.prompts) else None
        if prompt is None and cfg.data.source == "folder":
            prompt = str(index % cfg.model.classes) if cfg.model.conditioning == "class" else ""
        elif prompt is None:
            rng = keyed.rng(cfg.seed, "preview", index)
            scene = sample_scene(rng, cfg.data.world, "test", frames / fps, stage.width / stage.height)
            prompt = caption(scene, rng, "test")
        clip = pipe([prompt], [index], frames, stage.height, stage.width, fps)[0]
        path = Path(cfg.run) / "previews" / f"step-{done:08d}-{index}.mp4"
        path.parent.mkdir(exist_ok=True)
        video.write(path, clip, fps)
        path.with_suffix(".txt").write_text(prompt + "\n")
        if scene is not None and frames > 1:
            verdict = judge(clip, scene, fps)
            for name, value in {**verdict.scores, "joint": verdict.joint}.items():
                scores.setdefault(f"judge/{name}", []).append(float(value))
    log.say(f"{cfg.preview.count} previews after update {done} in {Path(cfg.run) / 'previews'}")
    return {name: float(np.mean(values)) for name, values in scores.items()}


def plan(cfg: config.Config) -> str:
    """What a run would do, as text: resolved config, model size, work and memory of each stage."""
    with torch.device("meta"):
        model = Latte(cfg.model)
        if cfg.init.lora_rank:
            lora.add(model, cfg.init)
    size, tuned = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in checkpoint.trained(model).values())
    codec = VideoCodec(cfg.codec, weights=False)
    lines = [config.to_yaml(cfg), f"parameters: {size / 1e6:.2f} M, of which trained: {tuned / 1e6:.2f} M",
             f"training state: {(4 * size + 16 * tuned) / 2**30:.2f} GiB (float32 weights, gradients, two AdamW moments, EMA)", "",
             "stage   steps  frames  height  width  batch  tokens/clip  GFLOP/update (forward + backward)  GiB/clip for backward"]
    total = 0.0
    for index, stage in enumerate(cfg.stages):
        f, _, h, w = codec.latent_shape(stage.frames, stage.height, stage.width)
        f += stage.image_frames
        passes = 4 if cfg.train.checkpoint_blocks else 3
        work = passes * stage.batch_size * flops(cfg.model, f, h, w, cfg.text.max_tokens) / 1e9
        total += work * stage.steps
        tokens = f * h * w // cfg.model.patch_size ** 2
        kept = memory.kept_for_backward(cfg.model, tokens, cfg.train.checkpoint_blocks, cfg.train.mixed_precision != "fp32")
        lines.append(f"{index:5d} {stage.steps:7d} {stage.frames:7d} {stage.height:7d} {stage.width:6d} {stage.batch_size:6d}"
                     f" {tokens:12d} {work:35.1f} {kept / 2**30:26.2f}")
    lines.append(f"all stages: {cfg.total_steps} updates, {total / 1e6:.3f} PFLOP with {cfg.text.max_tokens} text tokens; "
                 f"{total / 400e3 / 3600:.1f} device hours at 400 TFLOP/s")
    return "\n".join(lines)


def _split(batch: Batch, parts: int) -> list[Batch]:
    size = -(-len(batch.positions) // parts)
    cuts = [slice(i, i + size) for i in range(0, len(batch.positions), size)]
    return [Batch(batch.step, batch.stage, batch.positions[c], batch.frames[c], batch.fps[c], batch.captions[c]) for c in cuts]


def _anywhere(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set on any process: all must leave the loop at the same update."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())


class _Stop:
    """Remembers that SIGINT or SIGTERM came, so that the loop can end after a whole update. A second SIGINT ends at once."""

    def __init__(self):
        self.signalled = False
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
                signal.signal(number, self._note)

    def _note(self, number, _frame):
        self.signalled = True
        signal.signal(number, signal.SIG_DFL)


class _Window:
    """Sums over the updates since the last line of metrics."""

    def __init__(self, device):
        self.device = device
        self._open()

    def _open(self):
        self.loss = torch.zeros((), device=self.device)
        self.updates = self.clips = self.frames = 0
        self.wait = 0.0
        self.started = self.ready = time.perf_counter()

    def waited(self):
        self.wait += time.perf_counter() - self.ready

    def count(self, clips: int, frames: int):
        self.updates, self.clips, self.frames = self.updates + 1, self.clips + clips, self.frames + frames
        self.ready = time.perf_counter()

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        values = {"loss": accelerator.reduce(self.loss, "mean").item() / self.updates, "seconds": seconds / self.updates,
                  "frames_per_s": self.frames / seconds, "loader_wait": self.wait / seconds}
        self._open()
        return values


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, then exit")
    args = parser.parse_args(argv)
    try:
        cfg = config.load(args.config, args.overrides)
        if args.dry_run:
            print(plan(cfg))
            return 0
        return train(cfg)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

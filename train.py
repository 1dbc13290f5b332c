"""Trains Latte from a config:  accelerate launch train.py configs/NAME.yaml [section.key=value ...] [--dry-run]

The same command again resumes from the run's newest checkpoint. What an update sees (clips, order, noise, timesteps, dropped
captions) is a function of the config and the update's number, so a resumed run ends in the weights of an uninterrupted one.
Letters: b batch, f frames, c channels, h w height and width, l text tokens, d width.
"""

import argparse
import contextlib
import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from latte import cached, checkpoint, config, diffusion, hardware, keyed, lora, memory, parallel, pipeline, plan, precision, video
from latte.clips import left_out
from latte.codec import VideoCodec
from latte.command import Stop, command
from latte.data import Batch, make_loader, open_clips, table
from latte.guard import Guard
from latte.health import Step, Window, by_group, ratios
from latte.model import Latte, flops, frame_times
from latte.optim import EMA, InBackward, lr_at, make_optimizer
from latte.runlog import RunLog
from latte.text import TextEncoder
from latte.world.caption import caption
from latte.world.judge import judge
from latte.world.scene import sample_scene


def train(cfg: config.Config) -> int:
    """Runs or resumes the training that `cfg` describes. Returns the exit code; raises ValueError or OSError with the cause."""
    autocast = "no" if cfg.train.mixed_precision == "fp32" else cfg.train.mixed_precision  # accelerate's word for it
    accelerator = Accelerator(mixed_precision=autocast, log_with=cfg.train.trackers or None, project_dir=cfg.run)
    with checkpoint.lock(cfg.run) if accelerator.is_main_process else contextlib.nullcontext():
        return _train(cfg, accelerator)


def _train(cfg: config.Config, accelerator: Accelerator) -> int:
    device, rank, ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
    if cfg.train.deterministic:
        parallel.make_deterministic(device)
    clips = open_clips(cfg.data, cfg.seed, cfg.stages)
    buckets = table(clips, cfg.stages)
    text, codec = _components(cfg, clips, device)
    _check_fit(cfg, clips, text, codec, ranks)
    cfg.memory, levers = plan.resolve(cfg, codec, device, rank, ranks)
    needs = plan.check_room(cfg, codec, device, ranks)
    torch.manual_seed(cfg.seed)  # initial weights only; training draws keyed numbers
    raw, notes = pipeline.build(cfg)
    raw.to(device)
    raw_optimizer = make_optimizer(raw, cfg.optim, cfg.memory, cfg.seed)
    ema = EMA(raw, cfg.optim.ema_decay, cfg.memory.ema)

    found, wrong = checkpoint.newest_good(cfg.run)
    start, guard, changed = 0, Guard(cfg.guard), []
    if found:
        start = checkpoint.load(found, raw, ema, raw_optimizer)
        guard = Guard(cfg.guard, found.extra.get("guard"))
        if accelerator.scaler is not None and found.extra.get("scaler"):
            accelerator.scaler.load_state_dict(found.extra["scaler"])
        before, now = config.to_dict(found.config), config.to_dict(cfg)
        changed = [key for key in now if key not in ("run", "train", "preview") and now[key] != before.get(key)]
    formats = precision.apply(raw, cfg.train, device)
    memory.apply(raw, parallel.compile_blocks(raw, cfg.memory) if cfg.train.compile else cfg.memory)
    # The optimizer's state is where it belongs: accelerate would bring it there in the weights' dtype.
    if cfg.train.deterministic:  # its gradients are added up by FixedOrder, not by DDP
        model, optimizer = raw, accelerator.prepare(raw_optimizer, device_placement=[False])
    else:
        model, optimizer = accelerator.prepare(raw, raw_optimizer, device_placement=[True, False])
    run = _Run(cfg, accelerator, raw, model, optimizer, ema, text, codec, guard)
    del model, optimizer  # run.close() must hold the last of them
    writer = checkpoint.Writer(cfg.run, cfg.train.keep_checkpoints, cfg.train.keep_every_steps) if rank == 0 else None

    with (contextlib.closing(RunLog(cfg, accelerator, start)) as log, contextlib.closing(run),
          contextlib.closing(writer) if writer else contextlib.nullcontext()):
        log.say(f"{cfg.run}: from update {start} to {cfg.total_steps} on {ranks} process(es), {device.type}")
        log.say(formats)
        for why in wrong:
            log.event("checkpoint", start, f"passed over a damaged checkpoint: {why}")
        for note in notes if start == 0 else []:
            log.say(note)
        if changed:
            log.say(f"warning: not the settings that this run began with: {', '.join(changed)}")
        for key in ("optimizer_states", "weights") if found else ():
            before, now = getattr(found.config.memory, key), getattr(cfg.memory, key)
            if before != now:
                log.say(f"memory.{key}: the checkpoint's {before} were converted to {now}")
        log.say(buckets)
        for line in left_out(clips.dropped):
            log.say(line)
        log.say(needs)
        if levers:
            log.say(levers)
        stop = Stop()
        window = Window(device, hardware.peak_flops(device, run.dtype))
        saved_at = time.monotonic()

        while start < cfg.total_steps:
            pending, back = None, None
            for batch in window.timed(make_loader(clips, cfg.data, cfg.stages, cfg.seed, start, rank, ranks)):
                step, done = batch.step, batch.step + 1
                final = done == cfg.total_steps
                for note in batch.notes:
                    log.event("clip", done, note)
                report = final or done == 1 or done % cfg.train.log_every_steps == 0
                if step in run.guard.left_out:
                    log.event("left out", done, f"update {done} is left out: a spike came of it before")
                    launched = None
                else:
                    launched = run.update(batch, report, window)
                log.step(batch.stage)
                if writer:
                    writer.check()

                # What came of the update before is read only now, when the device has the next one to do.
                back = run.settle(pending, log)
                due = rank == 0 and 0 < cfg.train.save_every_minutes * 60 <= time.monotonic() - saved_at
                signalled, due = run.agree(bool(stop), due)
                at_save = done % cfg.train.save_every_steps == 0 or cfg.stage_at(done) != batch.stage
                save = final or signalled or due or at_save
                pending = launched
                if back is None and (save or report):
                    back, pending = run.settle(pending, log), None
                if back is not None:
                    break
                if save or report:
                    log.metrics(done, {"stage": batch.stage, **window.close(ranks, writer.waited if writer else 0.0), **run.last})
                if save:
                    saved_at = time.monotonic()
                    if writer:
                        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                        writer.save(done, cfg, raw, ema, raw_optimizer, {"guard": run.guard.state(), "scaler": scaler})
                if cfg.preview.count and (final or (cfg.preview.every_steps and done % cfg.preview.every_steps == 0)):
                    if rank == 0:
                        try:
                            log.metrics(done, preview(cfg, raw, ema, text, codec, device, done, batch.stage, log))
                        except ValueError as error:  # a cache trains where the VAE and the text encoder are not
                            if cfg.data.source != "cache":
                                raise
                            log.event("preview", done, f"no previews: {error}")
                    accelerator.wait_for_everyone()
                if signalled and not final:
                    if writer:
                        writer.finish()
                    accelerator.wait_for_everyone()
                    log.event("signal", done, f"interrupted after update {done}; saved, the same command goes on from there")
                    return stop.code
            else:
                break
            start = run.roll_back(back, writer, log)
            log.rewind(start)
            window.restart()
        if writer:
            writer.finish()

    if rank == 0:
        if cfg.init.lora_rank and cfg.model.conditioning == "text":
            print(f"adapters: {lora.save(raw, ema.weights, cfg.init, Path(cfg.run) / 'adapters')}")
        digest = checkpoint.weights_sha256(checkpoint.trained(raw))
        (Path(cfg.run) / "parameters.sha256").write_text(digest + "\n")
        print(f"parameters sha256: {digest}")
    return 0


@dataclass
class _Pending:
    """An update that the device may still be working on."""

    batch: Batch
    key: str
    rate: float
    values: torch.Tensor  # [3] loss, gradient norm, whether it was done
    norms: torch.Tensor  # [k] of the gradients of the parameters `names`
    names: list[str]
    losses: torch.Tensor  # [b] of this process's samples
    times: torch.Tensor  # [b] in [0, 1]
    moved: dict[str, float] | None


class _Run:
    """What an update needs and changes."""

    def __init__(self, cfg, accelerator, raw, model, optimizer, ema, text, codec, guard):
        self.cfg, self.accelerator, self.raw, self.model, self.optimizer = cfg, accelerator, raw, model, optimizer
        self.ema, self.text, self.codec, self.guard = ema, text, codec, guard
        self.device, self.ranks = accelerator.device, accelerator.num_processes
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.train.mixed_precision, torch.float32)
        self.fixed = parallel.FixedOrder(list(raw.parameters()), accelerator.process_index, self.ranks) if (
            cfg.train.deterministic) else None
        self.inner = getattr(optimizer, "optimizer", optimizer)
        self.early = InBackward(raw, self.inner) if cfg.memory.optimizer_in_backward else None
        self.text_tokens = 0  # of the longest caption of the batch at hand
        self.last: dict[str, float] = {}  # of the update that was settled last, for the metrics

    def close(self) -> None:
        """Lets go of the wrapped model before the process group ends: DDP, were it to hold the group last, would wait in its
        destructor for a thread of the group that waits for the interpreter."""
        self.model = self.optimizer = self.inner = None
        if self.early:
            self.early.close()
            self.early = None
        self.accelerator.free_memory()

    def update(self, batch: Batch, report: bool, window: Window) -> _Pending:
        """One update, or, where the guard says so on the device, none. Its result is not read here: see settle."""
        cfg, shape = self.cfg, self.cfg.stages[batch.stage].shapes[batch.bucket]
        key = f"{batch.stage}.{batch.bucket}"
        rate = lr_at(batch.step, cfg.optim, cfg.total_steps, cfg.stages[batch.stage].learning_rate)
        self.inner.begin(batch.step, rate)
        loss, losses, times = self._gradients(batch, shape.batch_size, report)
        if self.early:  # the weights have moved
            names = [name for name, _ in self.raw.named_parameters() if name in self.early.norms]
            norms = torch.stack([self.early.norms[name] for name in names])
            norm = norms.norm()
            done = norm.isfinite() & loss.isfinite()
            moved = ratios(names, *torch.stack([self.early.moved[name] for name in names], 1)) if report else None
        else:
            names, norms, norm, done, moved = self._step(batch.step, key, loss, report)
        self.ema.update(self.raw, batch.step, done)
        f, c, h, w = self.codec.latent_shape(shape.frames, shape.height, shape.width)
        f += shape.image_frames
        work = 3 * shape.batch_size * flops(cfg.model, f, h, w, self.text_tokens)
        window.count(loss, done, losses, times, shape.frames, shape.batch_size,
                     shape.batch_size * f * h * w // cfg.model.patch_size**2, work)
        return _Pending(batch, key, rate, torch.stack([loss, norm, done.float()]), norms, names, losses, times, moved)

    def _step(self, step: int, key: str, loss: torch.Tensor, report: bool
              ) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor, dict[str, float] | None]:
        """Moves the weights by their gradients, which then go. Returns the names of the weights and the norms [k] of their
        gradients, the norm of all, whether the update was done, and for a report how far it moved each kind of layer."""
        cfg = self.cfg
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        trained = {name: p for name, p in self.raw.named_parameters() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm([p.grad for p in trained.values()], dtype=torch.float32))
        norm = norms.norm()
        most_loss, most_norm = self.guard.limits(step, key)
        done = norm.isfinite() & loss.isfinite() & (loss <= most_loss) & (norm <= most_norm)
        if cfg.optim.grad_clip and step >= cfg.optim.clip_from_step:
            torch.nn.utils.clip_grads_with_norm_(trained.values(), cfg.optim.grad_clip, norm)
        self.ema.wait()
        move = Step(checkpoint.trained(self.raw)) if report else None
        if self.accelerator.scaler is None:  # a scaler leaves out by itself what is not finite
            self.inner.found_inf = (~done).float()  # the optimizer then changes nothing
        self.optimizer.step()
        self.inner.found_inf = None
        self.optimizer.zero_grad(set_to_none=True)
        return list(trained), norms, norm, done, move.ratios() if move else None

    def _gradients(self, batch: Batch, size: int, report: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Leaves the gradient of the mean loss over the whole batch, or has moved the weights by it (memory.optimizer_in_backward).
        Returns that loss, and this process's losses [b] and times [b]."""
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def backward(part: Batch, factor: float) -> torch.Tensor:
            losses, times = self._losses(part)
            if self.early:
                self.ema.wait()
                self.early.begin(losses.sum(), report)
            self.accelerator.backward(losses.sum() * factor)
            seen.append((losses.detach(), times))
            return losses.detach().sum() / size

        if self.fixed:
            loss = self.fixed.backward(_split(batch, self.cfg.train.unit_clips), lambda unit: backward(unit, 1 / size))
        else:
            parts = _split(batch, -(-len(batch.positions) // self.cfg.train.micro_batches))
            loss = torch.zeros((), device=self.device)
            for number, part in enumerate(parts):
                with contextlib.nullcontext() if number == len(parts) - 1 else self.accelerator.no_sync(self.model):
                    loss = loss + backward(part, self.ranks / size)  # DDP takes the mean over processes
            loss = parallel.total(loss)
        return loss, torch.cat([losses for losses, _ in seen]), torch.cat([times for _, times in seen])

    def _losses(self, part: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and time in [0, 1] of every sample of a part of the batch, [b] each; all randomness is keyed by (seed, position,
        purpose)."""
        cfg, device = self.cfg, self.device

        def normal(purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
            draws = [keyed.normal(shape, cfg.seed, purpose, p) for p in part.positions]
            return torch.stack([torch.from_numpy(draw) for draw in draws]).to(device)

        images = len(part.captions[0]) - 1
        x0 = part.x.to(device).float()
        with torch.no_grad():
            if cfg.data.source == "cache":
                if part.std is not None:
                    x0 = x0 + part.std.to(device).float() * normal("posterior", tuple(x0.shape[1:]))
            else:
                shape = self.codec.latent_shape(x0.shape[1], *x0.shape[3:])
                x0 = self.codec.encode(x0, normal("posterior", shape) if cfg.codec.posterior == "sample" else None)
            cond = pipeline.conditions(cfg, self.text, part.captions, device, part.states)
            self.text_tokens = cond["text"].shape[-2] if "text" in cond else 0
        tokens = (x0.shape[1] - images) * x0.shape[3] * x0.shape[4] // cfg.model.patch_size**2
        draws = [keyed.rng(cfg.seed, "time", p).random() for p in part.positions]
        times = diffusion.draw_times(cfg.diffusion, torch.tensor(draws, dtype=torch.float64), tokens).to(device)  # [b]
        step = self.codec.time_factor * cfg.data.base_fps / part.fps
        places = frame_times(cfg.model, x0.shape[1] - images, step).to(device)  # [f] or [b f]

        def model_fn(x, t, cond):
            with self.accelerator.autocast():
                return self.model(x, t, frame_times=places, image_frames=images, **cond)

        losses = diffusion.training_loss(model_fn, x0, cond, normal("noise", tuple(x0.shape[1:])), times, cfg.diffusion).loss
        return losses, times / (cfg.diffusion.timesteps if cfg.diffusion.kind == "ddpm" else 1)

    def settle(self, pending: _Pending | None, log: RunLog) -> int | None:
        """Reads what came of an update. Returns its number if the run has to go back to before it."""
        if pending is None:
            return None
        loss, norm, done = pending.values.tolist()
        step = pending.batch.step
        self.last = {"grad_norm": norm, "lr": pending.rate,
                     **{f"grad_norm/{group}": value for group, value in by_group(pending.names, pending.norms).items()},
                     **{f"update_ratio/{group}": value for group, value in (pending.moved or {}).items()}}
        limits = self.guard.limits(step, pending.key)
        failed = None
        try:
            why = self.guard.note(step, pending.key, loss, norm, bool(done))
        except ValueError as error:
            why, failed = "the last of too many skipped updates", error
        if why is not None:
            self._explain(pending, why, loss, norm, limits, log)
        if failed:
            raise failed
        return step if why == "spike" and self.cfg.guard.spike == "rollback" else None

    def _explain(self, pending: _Pending, why: str, loss: float, norm: float, limits: tuple[float, float], log: RunLog) -> None:
        """Names the samples of a skipped update, the worst first, in the log and in a report."""
        batch, done = pending.batch, pending.batch.step + 1
        mine = [{"position": position, "time": t, "loss": value, "caption": row[0][:200]} for position, t, value, row in zip(
            batch.positions, pending.times.tolist(), pending.losses.tolist(), batch.captions, strict=True)]
        samples = sorted(parallel.gathered(mine), key=lambda s: s["loss"] if np.isfinite(s["loss"]) else np.inf, reverse=True)
        worst = ", ".join(f"{s['position']} (t = {s['time']:.3f}, loss {s['loss']:.4g})" for s in samples[:4])
        path = log.report(f"update-{done:08d}", {
            "update": done, "why": why, "stage": batch.stage, "bucket": batch.bucket, "lr": pending.rate, "loss": loss,
            "grad_norm": norm, "loss_limit": limits[0], "grad_norm_limit": limits[1],
            "grad_norm_of": by_group(pending.names, pending.norms), "samples": samples})
        # in the backward pass, weights have moved before the first gradient that is not finite was there
        what = "skipped" if not self.early or not np.isfinite(loss) else "skipped for weights whose gradient is not finite"
        log.event(why, done, f"update {done} {what}, {why}: loss {loss:.4g}, gradient norm {norm:.4g}; samples {worst}; "
                             f"see {path}",
                  positions=[s["position"] for s in samples], times=[s["time"] for s in samples])

    def agree(self, signalled: bool, due: bool) -> tuple[bool, bool]:
        """Whether any process got a signal, and whether the main one's clock says that it is time to save."""
        if self.ranks == 1:
            return signalled, due
        flags = parallel.total(torch.tensor([float(signalled), float(due)], device=self.device)).tolist()
        return flags[0] > 0, flags[1] > 0

    def roll_back(self, step: int, writer: checkpoint.Writer | None, log: RunLog) -> int:
        """Takes the weights of the last whole checkpoint before an update, which is left out from now on. Returns its number."""
        if writer:
            writer.finish()
        self.accelerator.wait_for_everyone()
        found, wrong = checkpoint.newest_good(self.cfg.run, step - self.cfg.guard.rollback_updates + 1)
        for why in wrong:
            log.event("checkpoint", step + 1, f"passed over a damaged checkpoint: {why}")
        self.guard.roll_back(step)
        if found is None:
            raise ValueError(f"guard.spike: update {step + 1} is a spike, and no checkpoint from before what is to be left "
                             "out is there; raise train.keep_checkpoints, lower guard.rollback_updates, or set guard.spike=skip")
        count, left_out = self.guard.rollbacks, self.guard.left_out
        self.guard = Guard(self.cfg.guard, {**found.extra.get("guard", {}), "rollbacks": count, "left_out": sorted(left_out)})
        log.event("rollback", step + 1, f"back to update {found.step} because of the spike at update {step + 1}; "
                                        f"rollback {count} of {self.cfg.guard.rollbacks}")
        return checkpoint.load(found, self.raw, self.ema, getattr(self.optimizer, "optimizer", self.optimizer))


def _components(cfg: config.Config, clips, device: torch.device) -> tuple[TextEncoder | None, VideoCodec]:
    """Text encoder and codec; for training on a cache neither is in memory, and the codec only tells shapes."""
    if cfg.data.source == "cache":
        cached.check(cfg.data.path, cfg.codec, cfg.text if cfg.model.conditioning == "text" else None)
        return None, VideoCodec.told(cfg.codec, clips)
    return TextEncoder(cfg.text, device) if cfg.model.conditioning == "text" else None, VideoCodec(cfg.codec, device)


def _check_fit(cfg: config.Config, clips, text: TextEncoder | None, codec: VideoCodec, ranks: int) -> None:
    """Settings that only the data, the text encoder, the codec and the launcher can tell. Raises ValueError naming the key."""
    needed = {"in_channels": codec.channels}
    if cfg.model.conditioning == "text":
        needed["text_channels"] = text.width if text else clips.null.shape[-1]
    if cfg.model.conditioning == "class":
        cfg.data.class_names = cfg.data.class_names or clips.classes
        needed["classes"] = len(cfg.data.class_names)
        strange = sorted(set(clips.classes) - set(cfg.data.class_names))
        if strange:
            raise ValueError(f"data.class_names: lacks {', '.join(strange[:6])}, folders of {cfg.data.path}")
    for key, value in needed.items():
        if getattr(cfg.model, key) != value:
            raise ValueError(f"model.{key}: must be {value} for this text encoder, codec and data, got {getattr(cfg.model, key)}")
    if cfg.memory.optimizer_in_backward and ranks > 1:
        raise ValueError(f"memory.optimizer_in_backward: needs one process, as gradients are exchanged together; got {ranks}")
    for key, shape in cfg.shapes():
        if codec.time_factor > 1 and shape.image_frames:
            raise ValueError(f"{key}.image_frames: this VAE codes frames together, so images cannot join a clip")
        if cfg.train.deterministic and shape.batch_size % (ranks * cfg.train.unit_clips):
            raise ValueError(f"{key}.batch_size: must divide by {ranks} processes times train.unit_clips "
                             f"({cfg.train.unit_clips}), got {shape.batch_size}")


@torch.no_grad()
def preview(cfg: config.Config, trained: Latte, ema: EMA, text: TextEncoder | None, codec: VideoCodec, device, done: int,
            stage_index: int, log: RunLog) -> dict[str, float]:
    """Samples preview videos from the EMA weights into the run's folder; returns judge scores for the embedded world."""
    stage = cfg.stages[stage_index].shapes[0]
    frames, fps = cfg.preview.frames or stage.frames, max(stage.fps)
    if cfg.data.source == "cache":  # training on a cache has neither in memory
        text, codec = TextEncoder(cfg.text, device) if cfg.model.conditioning == "text" else None, VideoCodec(cfg.codec, device)
    model = copy.deepcopy(trained).eval().float()  # as the average is, whatever the weights are
    for name, p in checkpoint.trained(model).items():
        p.copy_(ema.weights[name])
    pipe = pipeline.Pipeline(cfg, model, text, codec, device)
    scores: dict[str, list[float]] = {}
    for index in range(cfg.preview.count):
        scene, prompt = None, cfg.preview.prompts[index] if index < len(cfg.preview.prompts) else None
        if prompt is None and cfg.data.source != "world":
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


def _split(batch: Batch, size: int) -> list[Batch]:
    return [batch.part(slice(i, i + size)) for i in range(0, len(batch.positions), size)]


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, then exit")
    parser.add_argument("--card", default="", help="with --dry-run: plan for this card, such as H200, instead of this machine")
    args = parser.parse_intermixed_args(argv)
    if args.card and not args.dry_run:
        raise ValueError("--card: plans for a card that is not at hand; it needs --dry-run")
    cfg = config.load(args.config, args.overrides)
    if args.dry_run:
        print(plan.describe(cfg, args.card))
        return 0
    return train(cfg)


if __name__ == "__main__":
    sys.exit(main())

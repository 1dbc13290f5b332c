"""What a run would take, before it takes it: buckets, work, memory, disk and time, and whether it fits."""

import math
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from latte import checkpoint, config, hardware, lora, trace
from latte.codec import VideoCodec
from latte.data import open_clips, table
from latte.model import Latte, flops


def describe(cfg: config.Config) -> str:
    """What a run would do, as text: resolved config, model size, buckets, and work, memory and time of each bucket on this
    machine."""
    device = Accelerator().device
    clips = open_clips(cfg.data, cfg.seed, cfg.stages)
    with torch.device("meta"):
        model = Latte(cfg.model)
        if cfg.init.lora_rank:
            lora.add(model, cfg.init)
        codec = VideoCodec.told(cfg.codec, clips) if cfg.data.source == "cache" else VideoCodec(cfg.codec, weights=False)
    size, trained = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in checkpoint.trained(model).values())
    lines = [config.to_yaml(cfg), f"parameters: {size / 1e6:.2f} M, of which trained: {trained / 1e6:.2f} M", table(clips,
    cfg.stages),
             *(f"left out {name}: {why}" for name, why in clips.dropped.items()), "",
             "key                      latents          tokens/clip  clips/pass  GFLOP/update  peak GiB  s/update"]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.train.mixed_precision, torch.float32)
    passes, again = _passes(cfg, codec, 1), 4 / 3 if cfg.memory.activations == 0 else 1
    seconds, work = {}, {}
    for (key, tokens, together, latents), (_, shape) in zip(passes, cfg.shapes(), strict=True):
        f, _, h, w = latents
        work[key] = 3 * again * shape.batch_size * flops(cfg.model, f, h, w, cfg.text.max_tokens)
        pair, = hardware.pair_seconds(cfg.model, f, h, w, [together], cfg.text.max_tokens, device, dtype)
        seconds[key] = pair * again * cfg.model.layers * shape.batch_size / together
        lines.append(f"{key:24s} {'x'.join(map(str, latents)):16s} {tokens:11d} {together:11d} {work[key] / 1e9:13.1f} "
                     f"{_peak(cfg, latents, together, trained) / 2**30:9.2f} {seconds[key]:9.3f}")
    hours = flop = 0.0
    for index, stage in enumerate(cfg.stages):
        for number, share in enumerate(stage.shares):
            key = f"stages.{index}" + (f".buckets.{number}" if stage.buckets else "")
            hours += stage.steps * share * seconds[key] / 3600
            flop += stage.steps * share * work[key]
    lines.append(f"all stages: {cfg.total_steps} updates, {flop / 1e15:.3f} PFLOP with {cfg.text.max_tokens} text tokens; about "
                 f"{hours:.2f} h on one {device.type}, from one layer pair timed here, without loading, encoding and the optimizer")
    pools = {(clips.pool(shape).size, latents) for (_, _, _, latents), (_, shape) in zip(passes, cfg.shapes(), strict=True)}
    cache = sum(size * 4 * np.prod(latents) * max(1, cfg.data.variants) for size, latents in pools)
    if cache and cfg.data.source != "cache":
        lines.append(f"data_tools.cache would take {cache / 2**30:.2f} GiB for the latents, and more for the text states")
    if cfg.train.deterministic:
        key, _, together, (f, _, h, w) = passes[-1]
        batch = cfg.shapes()[-1][1].batch_size
        alone, whole = hardware.pair_seconds(cfg.model, f, h, w, [together, batch], cfg.text.max_tokens, device, dtype)
        more = alone * batch / together / whole - 1
        lines.append(f"deterministic mode: {more:+.1%} time for {key}, in units of {together} instead of {batch}")
    try:
        lines.append(check_room(cfg, codec, device, 1))
    except ValueError as error:
        lines.append(f"would be refused: {error}")
    return "\n".join(lines)


def check_room(cfg: config.Config, codec: VideoCodec, device: torch.device, ranks: int) -> str:
    """What the run takes of memory and disk beside what there is. Raises ValueError when it cannot fit (train.refuse_misfit)."""
    with torch.device("meta"):
        raw = Latte(cfg.model)
        if cfg.init.lora_rank:
            lora.add(raw, cfg.init)
    size, trained = sum(p.numel() for p in raw.parameters()), sum(p.numel() for p in checkpoint.trained(raw).values())
    free, place = hardware.available(device), Path(cfg.run)
    if device.type == "cpu":
        free //= ranks
    while not place.exists():
        place = place.parent
    kept = cfg.train.keep_checkpoints + 1 + (cfg.total_steps // cfg.train.keep_every_steps if cfg.train.keep_every_steps else 0)
    # what the run's own checkpoints take already is theirs
    own = sum(file.stat().st_size for file in Path(cfg.run).glob("step-*/*"))
    disk, room = 16 * trained * kept, shutil.disk_usage(place).free + own
    # an upper bound first: most runs fit by far, and tracing takes seconds
    peaks = {key: 20 * size + 4 * 2 * 43 * cfg.model.width * cfg.model.layers * tokens * clips
             for key, tokens, clips, _ in _passes(cfg, codec, ranks)}
    key, peak = max(peaks.items(), key=lambda pair: pair[1])
    if peak > free / 2:
        key, peak = max(((key, _peak(cfg, shape, clips, trained)) for key, _, clips, shape in _passes(cfg, codec, ranks)),
                        key=lambda pair: pair[1])
    peak = max(peak, 28 * trained)  # beside an update of which a report is made: weights, gradients, moments, average, two copies
    if cfg.train.deterministic:  # sums of gradients on the way up the tree, and what is sent and received
        units = max(shape.batch_size // (ranks * cfg.train.unit_clips) for _, shape in cfg.shapes())
        peak += 4 * trained * (math.ceil(math.log2(units)) + (2 if ranks > 1 else 0))
    if device.type == "cpu":  # the copy that a checkpoint is written from
        peak += 16 * trained
    need, have, files, left = (f"{value / 2**30:.1f} GiB" for value in (peak, free, disk, room))
    text = f"needs at most {need} of memory a process ({key}; {have} free) and {files} of disk for {kept} checkpoints ({left} free)"
    if cfg.train.refuse_misfit and (peak > free or disk > room):
        hint = "try memory.auto=true, more train.micro_batches or a smaller batch" if peak > free else (
            "keep fewer checkpoints")
        raise ValueError(f"{key if peak > free else 'train.keep_checkpoints'}: the run {text}; {hint}, or start it anyway with "
                         "train.refuse_misfit=false")
    return text


def _passes(cfg: config.Config, codec: VideoCodec, ranks: int) -> list[tuple[str, int, int, tuple[int, int, int, int]]]:
    """Of each clip shape its key, tokens a clip, clips in one pass of one process, and latents [f c h w]."""
    found = []
    for key, shape in cfg.shapes():
        f, c, h, w = codec.latent_shape(shape.frames, shape.height, shape.width)
        f += shape.image_frames
        clips = cfg.train.unit_clips if cfg.train.deterministic else -(-shape.batch_size // (ranks * cfg.train.micro_batches))
        found.append((key, f * h * w // cfg.model.patch_size**2, clips, (f, c, h, w)))
    return found


def _peak(cfg: config.Config, shape: tuple[int, int, int, int], clips: int, trained: int) -> int:
    f, _, h, w = shape
    return trace.training_peak(cfg.model, f, h, w, clips, cfg.text.max_tokens, cfg.train.mixed_precision != "fp32",
                                cfg.memory.activations == 0, trained)

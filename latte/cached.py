"""Latents and text states that data_tools.cache made: a source of clips that needs neither the VAE nor the text encoder.

    index.json                          settings, shapes, and size and SHA-256 of every file below; written last
    entries-KEY.safetensors             fps.K and caption.K: rate and caption number of every entry of shape K; -1 = left out
    16x64x64-00000-KEY.safetensors      x [n f c h w], and std; entry number = clip * variants + variant
    captions-00000-KEY.safetensors      n captions and their states, one behind the other; caption 0 is the empty one

Beside each shard lies a .json with which data_tools.cache goes on after an interruption; it is not read here.
"""

import hashlib
import json
import os
from collections import Counter, OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latte.clips import Clip, Pool, shape_key
from latte.config import CodecConfig, DataConfig, ShapeConfig, TextConfig

FORMAT = 1
INDEX = "index.json"
OPEN_SHARDS = 64  # mapped at once in a process
TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARY = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json", "merges.txt")


class CachedClips:
    """The clips of a cache, with the numbers and draws of the source that it was made from: x are latents (float32), and states and
    std are set where the cache has them.

    `channels`, `factor` and `time_factor` are those of the codec, `text_width` that of the states (0 = no text).
    Raises ValueError naming the setting in which the run and the cache differ, or the file that is missing or damaged.
    """

    def __init__(self, cfg: DataConfig, seed: int, shapes: list[ShapeConfig]):
        self.folder, self._index = Path(cfg.path), read_index(cfg.path)
        wanted = settings(cfg, seed, self._index["source"])
        if not cfg.clips:  # as many as there are
            wanted.pop("data.clips", None)
        _compare(self.folder, self._index["settings"], wanted)
        self._stored = self._index["variants"]
        if cfg.variants > self._stored:
            raise ValueError(f"data.variants: the cache {self.folder} holds {self._stored} of each clip, not {cfg.variants}; "
                             f"set data.variants={self._stored} or run data_tools.cache again")
        self.variants = cfg.variants or self._stored
        self.classes, self.dropped = self._index["classes"], self._index["dropped"]
        self.channels, self.factor, self.time_factor, self.text_width = (
            self._index[name] for name in ("channels", "factor", "time_factor", "text_width"))
        self._held = {(*held["shape"][:3], tuple(held["shape"][3])): held for held in self._index["shapes"]}
        _check_shapes(self.folder, list(self._held), shapes, self._index["source"], self.time_factor)
        self._skipped = {(lost["shape"], lost["entry"]): f"{lost['clip']}: {lost['reason']}" for lost in self._index["skipped"]}
        self._handles: OrderedDict[str, Any] = OrderedDict()
        self._owner, self._sound = os.getpid(), set()
        for name, facts in self._index["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{path}: missing from the cache; run data_tools.cache again")
            if path.stat().st_size != facts["bytes"]:
                raise ValueError(f"{path}: damaged, it has {path.stat().st_size} bytes of {facts['bytes']}; "
                                 "delete it and run data_tools.cache again")
        entries = self._open(self._index["entries"])
        self._rates, self._captions = ([entries.get_tensor(f"{name}.{k}").numpy().copy() for k in range(len(self._held))]
                                       for name in ("fps", "caption"))
        self.null = self._told(0)[1]  # [l d] of the empty caption

    def pool(self, shape: ShapeConfig) -> Pool:
        held = self._held[shape_key(shape)]
        return Pool(held["size"], Counter(held["dropped"]))

    def clip(self, shape: ShapeConfig, index: int, variant: int) -> Clip:
        return self._entry(shape, index, variant, slice(None))

    def image(self, shape: ShapeConfig, index: int, variant: int, draw: np.random.Generator) -> Clip:
        frame = int(draw.integers(shape.frames))
        return self._entry(shape, index, variant, slice(frame, frame + 1))

    def _entry(self, shape: ShapeConfig, index: int, variant: int, frames: slice) -> Clip:
        held = self._held[shape_key(shape)]
        k, entry = held["number"], index * self._stored + variant
        if self._captions[k][entry] < 0:
            raise ValueError(f"{self._skipped[k, entry]} (left out of the cache)")
        shard, slot = divmod(entry, held["per_shard"])
        file = self._open(held["shards"][shard])
        x, std = (file.get_slice(name)[slot, frames].to(torch.float32, copy=True) if name in held["tensors"] else None
                  for name in ("x", "std"))
        caption, states = self._told(int(self._captions[k][entry]))
        return Clip(x, float(self._rates[k][entry]), caption, std, states)

    def _told(self, number: int) -> tuple[str, Tensor | None]:
        """A caption and its states [l d]."""
        shard, slot = divmod(number, self._index["captions"]["per_shard"])
        return read_caption(self._open(self._index["captions"]["shards"][shard]), slot, bool(self.text_width))

    def _open(self, name: str):
        """A mapped file, which was read and hashed once before. Every process maps its own."""
        if self._owner != os.getpid():
            self._handles, self._owner = OrderedDict(), os.getpid()
        if name not in self._handles:
            path = self.folder / name
            if name not in self._sound and sha256(path) != self._index["files"][name]["sha256"]:
                raise ValueError(f"{path}: damaged, its SHA-256 is not the one in {INDEX}; delete it and run data_tools.cache "
                                 "again")
            self._sound.add(name)
            try:
                self._handles[name] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: cannot be read ({error})") from None
            if len(self._handles) > OPEN_SHARDS:
                self._handles.popitem(last=False)
        self._handles.move_to_end(name)
        return self._handles[name]

    def __getstate__(self) -> dict:
        return {**vars(self), "_handles": OrderedDict()}  # what is mapped cannot be sent to another process


def check(folder: str | Path, codec: CodecConfig, text: TextConfig | None) -> None:
    """Raises ValueError naming the dotted key in which a run's codec or text encoder differs from that of a cache.

    text=None: of a run without text. A VAE or an encoder that is on this machine is compared by its files, wherever it lies; one
    that is not, by its settings.
    """
    index = read_index(folder)
    parts = [("codec", codec_settings(codec), codec_fingerprint(codec), ("codec.path", "codec.subfolder"))]
    if text is not None:
        if index["text"] is None:
            raise ValueError(f"model.conditioning: the cache {folder} holds no text states, which text needs; "
                             "run data_tools.cache again with this config")
        parts.append(("text", text_settings(text), text_fingerprint(text), ("text.encoder", "text.subfolder")))
    for part, wanted, found, places in parts:
        stored = index[part]
        _compare(folder, stored["settings"], {key: value for key, value in wanted.items() if not (found and key in places)})
        if found and found != stored["fingerprint"]:
            raise ValueError(f"{places[0]}: the files of {wanted[places[0]]} are not those that the cache {folder} was made with, "
                             f"from {stored['settings'][places[0]]}; name the same ones or run data_tools.cache again")


def read_index(folder: str | Path) -> dict[str, Any]:
    """The index of a finished cache. Raises ValueError naming data.path when there is none or it cannot be read."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = index["format"]
    except FileNotFoundError:
        raise ValueError(f"data.path: {folder} is no finished cache, it has no {INDEX}; run data_tools.cache (again)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data.path: {path} is damaged ({error!r}); run data_tools.cache again") from None
    if found != FORMAT:
        raise ValueError(f"data.path: {folder} is a cache of format {found}, not {FORMAT}; run data_tools.cache again")
    return index


def settings(cfg: DataConfig, seed: int, source: str) -> dict[str, Any]:
    """What decides which clips a source of that kind has and what is in them, by dotted key."""
    if source == "world":
        return {"seed": seed, "data.clips": cfg.clips, "data.wordings": cfg.wordings,
                **{f"data.world.{name}": value for name, value in vars(cfg.world).items()}}
    found = {"seed": seed, "data.layout": cfg.layout, "data.clip_rule": cfg.clip_rule, "data.flip": cfg.flip, "data.crop": cfg.crop,
             "data.max_crop": cfg.max_crop, "data.decoder": cfg.decoder}
    if cfg.clip_rule != "time":
        found["data.frame_interval"] = cfg.frame_interval
    if cfg.layout == "frames":
        found["data.base_fps"] = cfg.base_fps
    return found


def codec_settings(cfg: CodecConfig) -> dict[str, Any]:
    """What decides the latents, by dotted key; chunk_frames changes their rounding alone and is left to the run."""
    if cfg.kind == "pixels":
        return {"codec.kind": cfg.kind}
    return {"codec.kind": cfg.kind, "codec.posterior": cfg.posterior, "codec.dtype": cfg.dtype, "codec.tile_size": cfg.tile_size,
            "codec.fold": cfg.fold, "codec.waves": cfg.waves, "codec.gains": cfg.gains, "codec.path": cfg.path,
            "codec.subfolder": cfg.subfolder}


def text_settings(cfg: TextConfig) -> dict[str, Any]:
    return {"text.max_tokens": cfg.max_tokens, "text.dtype": cfg.dtype, "text.quantize": cfg.quantize, "text.encoder": cfg.encoder,
            "text.subfolder": cfg.subfolder}


def codec_fingerprint(cfg: CodecConfig) -> str | None:
    """Hash of what latents depend on: kind, posterior, dtype, tiles, and the VAE's config and weights, wherever they lie.

    None if the VAE is not on this machine.
    """
    facts: list[Any] = [cfg.kind]
    if cfg.kind == "autoencoder":
        root = _root(cfg.path, cfg.subfolder)
        weights = root and _weights(root / cfg.subfolder, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        if not weights:
            return None
        facts += [cfg.posterior, cfg.dtype, cfg.tile_size, _facts(root / cfg.subfolder), weights]
        facts += [cfg.fold, cfg.waves, *map(float, cfg.gains)] if cfg.fold > 1 else []
    return digest(facts)


def text_fingerprint(cfg: TextConfig) -> str | None:
    """Hash of what text states depend on: dtype, quantization, longest caption, and the encoder's config, weights and tokenizer.

    None if the encoder is not on this machine.
    """
    from latte.text import _minilm_folder  # transformers takes seconds to import

    try:
        path = str(_minilm_folder()) if cfg.encoder == "minilm" else cfg.encoder
    except ValueError:
        return None
    subfolder = "text_encoder" if (Path(path) / "text_encoder").is_dir() else cfg.subfolder
    root = _root(path, subfolder)
    weights = root and _weights(root / subfolder, "model.safetensors", "pytorch_model.bin")
    if not weights:
        return None
    words = root / "tokenizer" if subfolder else root
    whole = (words / "tokenizer.json").is_file()
    files = {name: sha256(words / name) for name in (*TOKENIZER, *(("tokenizer.json",) if whole else VOCABULARY))
             if (words / name).is_file()}
    return digest([cfg.dtype, cfg.quantize, cfg.max_tokens, _facts(root / subfolder), weights, files])


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=64)
def _unchanged(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path)  # an encoder of 20 GB is hashed once a process


def pack_captions(captions: list[str], states: list[Tensor] | None) -> dict[str, Tensor]:
    """Tensors of a captions shard: UTF-8 bytes and states [l d], each behind the one before, and where they begin and end."""
    raw = [caption.encode() for caption in captions]
    packed = {"text": torch.tensor(list(b"".join(raw)), dtype=torch.uint8), "text_at": _bounds(map(len, raw))}
    return packed if states is None else packed | {"states": torch.cat(states), "states_at": _bounds(map(len, states))}


def read_caption(file, slot: int, states: bool) -> tuple[str, Tensor | None]:
    """A caption, and its states [l d] float32, of an opened captions shard."""
    def part(name: str) -> Tensor:
        start, end = file.get_slice(f"{name}_at")[slot:slot + 2].tolist()
        return file.get_slice(name)[start:end]

    return bytes(part("text").tolist()).decode(), part("states").to(torch.float32, copy=True) if states else None


def _bounds(lengths) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64))


def _compare(folder: str | Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if key not in stored or stored[key] != value:
            was = stored.get(key, "another setting")
            raise ValueError(f"{key}: is {value} here, but the cache {folder} was made with {was}; set {key}={was} "
                             "or run data_tools.cache again")


def _check_shapes(folder: Path, held: list[tuple], shapes: list[ShapeConfig], source: str, time_factor: int) -> None:
    for shape in shapes:
        key = shape_key(shape)
        if key not in held:
            nearest = min(held, key=lambda other: sum(a != b for a, b in zip(other, key, strict=True)))
            name = next(name for name, a, b in zip(("frames", "height", "width", "fps"), nearest, key, strict=True) if a != b)
            known = "; ".join(str(ShapeConfig(frames=f, height=h, width=w, fps=list(fps))) for f, h, w, fps in held)
            raise ValueError(f"stages.{name}: the cache {folder} has no clips of {shape}, only {known}; run data_tools.cache again")
        if shape.image_frames and time_factor > 1:
            raise ValueError("stages.image_frames: this VAE codes frames together, so its latents hold no single images")
        # Which clips a shape has depends on the shapes that it shares them with: on their aspects alone, see FileClips._misfit.
        rivals, cached = ({w / h for f, h, w, _ in keys if f == shape.frames} for keys in (map(shape_key, shapes), held))
        if source != "world" and rivals != cached:
            raise ValueError(f"stages: the cache {folder} shared its clips of {shape.frames} frames out among other aspects "
                             f"(width/height {sorted(cached)}) than this run's {sorted(rivals)}; run data_tools.cache again")


def _root(path: str, subfolder: str) -> Path | None:
    """Where a folder or the files downloaded from a hub id lie, or None."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(path, f"{subfolder}/config.json" if subfolder else "config.json")
    except ValueError:  # a path, not a hub id
        return None
    return Path(found).parents[1 if subfolder else 0] if isinstance(found, str) else None


def _weights(folder: Path, *names: str) -> list[str] | None:
    """SHA-256 of the weights files that a library would load from a folder, or None."""
    def hashed(path: Path) -> str:
        about = path.stat()
        return _unchanged(path, about.st_size, about.st_mtime_ns)

    for name in names:
        index = folder / f"{name}.index.json"
        parts = [name] if (folder / name).is_file() else (
            sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [])
        if parts and all((folder / part).is_file() for part in parts):
            return [hashed(folder / part) for part in parts]
    return None


def _facts(folder: Path) -> dict[str, Any]:
    """A model's config without what tells who saved it."""
    found = json.loads((folder / "config.json").read_text())
    for key in ("_name_or_path", "_diffusers_version", "transformers_version"):
        found.pop(key, None)
    return found

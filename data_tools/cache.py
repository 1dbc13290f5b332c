"""Makes latents and text states once, so that training needs neither the VAE nor the text encoder.

    python -m data_tools.cache CONFIG OUT [section.key=value ...] [--processes N] [--dtype bfloat16] [--shard-mib 256] [--dry-run]

CONFIG is that of the training: every shape of its stages, clip and variant of its source is cached (data.variants tells how many,
the world needs data.clips too). Then train with data.source=cache data.path=OUT and the rest as it is. latte.cached has the format.

The same command again goes on after any interruption. Shards are written beside their place and renamed; their names and bytes
depend on the settings and the data alone. After a change of either, entries that it does not touch are taken over from the shards
that are there; the old cache stays whole until the new index is written. Clips that cannot be read are left out, named, and tried
again by the next such command.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from latte import cached, config
from latte.cached import digest
from latte.clips import FileClips, Source, WorldClips, shape_key
from latte.codec import VideoCodec
from latte.command import command
from latte.config import Config, ShapeConfig

OURS = re.compile(r".+-[0-9a-f]{16}\.(safetensors|json)")
POOL_ONLY = ("data.clips", "data.layout", "data.max_crop")  # which clips there are, not what is in them
MANY_CAPTIONS = 65536  # in a shard without states


@dataclass(frozen=True)
class Shard:
    name: str
    keys: list[str]  # of its entries
    first: int  # number of its first entry, or caption
    shape: int = 0


class Maker:
    """Makes single entries. It is sent to every worker process, which loads its own codec and text encoder when first needed."""

    def __init__(self, cfg: Config, source: Source, shapes: list[ShapeConfig], dtype: str):
        self.cfg, self.source, self.shapes, self.dtype = cfg, source, shapes, getattr(torch, dtype)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @functools.cached_property
    def codec(self) -> VideoCodec:
        return VideoCodec(self.cfg.codec, self.device)

    @functools.cached_property
    def text(self):
        from latte.text import TextEncoder  # takes seconds to import

        return TextEncoder(self.cfg.text, self.device)

    @property
    def spread(self) -> bool:
        return self.cfg.codec.kind == "autoencoder" and self.cfg.codec.posterior == "sample"

    def clip(self, job: tuple[int, int, int]) -> dict[str, Any]:
        """Of (shape, index, variant): x [f c h w] and std as bytes, fps and caption; or only why it cannot be read."""
        shape, index, variant = job
        try:
            clip = self.source.clip(self.shapes[shape], index, variant)
        except (ValueError, OSError) as error:
            return {"why": str(error)}
        x = clip.x[None].to(self.device)
        parts = dict(zip(("x", "std"), self.codec.posterior(x), strict=True)) if self.spread else {"x": self.codec.encode(x)}
        if not parts["x"].isfinite().all():
            raise ValueError(f"codec.dtype: the VAE's latents of clip {index} are not finite in {self.cfg.codec.dtype}; "
                             "use float32 or bfloat16")
        latents = {name: _raw(part[0].cpu().to(self.dtype)) for name, part in parts.items()}
        return {"fps": clip.fps, "caption": clip.caption, **latents}

    def states(self, caption: str) -> np.ndarray:
        """States [l d] of a caption, as bytes."""
        return _raw(self.text.encode([caption])[0][0].cpu().to(self.dtype))


def build(cfg: Config, out: Path, dtype: str = "float32", shard_mib: int = 256, processes: int = 1, dry_run: bool = False) -> None:
    """Makes or completes the cache `out` of a training config. Raises ValueError or OSError with the cause."""
    source = _source(cfg)
    shapes = list({shape_key(shape): shape for _, shape in cfg.shapes()}.values())
    maker, text = Maker(cfg, source, shapes, dtype), cfg.model.conditioning == "text"
    latents = [maker.codec.latent_shape(shape.frames, shape.height, shape.width) for shape in shapes]
    bytes_each = [int(np.prod(size)) * maker.dtype.itemsize * (2 if maker.spread else 1) for size in latents]
    sizes = [source.pool(shape).size for shape in shapes]
    _refuse_empty(source, shapes, sizes)
    variants = cfg.data.variants
    per_shard = [max(1, shard_mib * 2**20 // size) for size in bytes_each]
    if dry_run:
        entries = [size * variants for size in sizes]
        _say(maker, out, latents, entries, sum(map(int.__mul__, entries, bytes_each)), _present(out), processes)
        return

    out.mkdir(parents=True, exist_ok=True)
    lock = _lock(out)
    try:
        for left in out.glob("*.writing"):
            left.unlink()
        kept = _Kept(out)
        fingerprint, text_fingerprint = _fingerprints(maker, text)
        shards = _planned(maker, shapes, sizes, per_shard, fingerprint, out)
        todo = [(shard, kept.lacks(shard)) for shard in shards if not kept.whole(shard)]
        missing = [sum(len(slots) for shard, slots in todo if shard.shape == k) for k in range(len(shapes))]
        if todo:
            _say(maker, out, latents, missing, sum(bytes_each[shard.shape] * len(shard.keys) for shard, _ in todo), 0, processes)
        _clip_shards(maker, todo, kept, latents, processes)
        skipped = _skipped(shards, kept, source, shapes, variants)
        if len(skipped) == sum(sizes) * variants:
            raise ValueError(f"data.path: no clip of {cfg.data.path} can be read, the first one: {skipped[0]['reason']}")
        captions, numbers = _captions(shards, kept, source, shapes, variants)
        words, per_words = _caption_shards(maker, captions, kept, shard_mib, processes, text_fingerprint)

        arrays = {}
        for k in range(len(shapes)):
            mine = [kept.facts[shard.name] for shard in shards if shard.shape == k]
            arrays[f"fps.{k}"] = torch.tensor([fps for facts in mine for fps in facts["fps"]], dtype=torch.float64)
            arrays[f"caption.{k}"] = torch.tensor(numbers[k], dtype=torch.int64)
        entries = "entries-" + digest({name: array.tolist() for name, array in arrays.items()})[:16]
        kept.write(entries, arrays, {})
        index = {
            "format": cached.FORMAT, "source": cfg.data.source, "dtype": dtype, "variants": variants, "classes": source.classes,
            "dropped": source.dropped,
            "settings": cached.settings(cfg.data, cfg.seed, cfg.data.source),
            "codec": {"settings": cached.codec_settings(cfg.codec), "fingerprint": fingerprint},
            "text": {"settings": cached.text_settings(cfg.text), "fingerprint": text_fingerprint} if text else None,
            "channels": maker.codec.channels, "factor": maker.codec.factor, "time_factor": maker.codec.time_factor,
            "text_width": kept.facts[words[0].name].get("width", 0),
            "shapes": [{
                "number": k, "shape": shape_key(shape), "size": sizes[k], "dropped": source.pool(shape).dropped,
                "latents": latents[k], "tensors": ["x", "std"] if maker.spread else ["x"], "per_shard": per_shard[k],
                "shards": [f"{shard.name}.safetensors" for shard in shards if shard.shape == k],
            } for k, shape in enumerate(shapes)],
            "captions": {"count": len(captions), "per_shard": per_words,
                         "shards": [f"{shard.name}.safetensors" for shard in words]},
            "entries": f"{entries}.safetensors", "skipped": skipped,
            "files": {f"{name}.safetensors": {part: kept.facts[name][part] for part in ("bytes", "sha256")}
                      for name in (*(shard.name for shard in (*shards, *words)), entries)},
        }
        _place(out / cached.INDEX, lambda path: path.write_text(json.dumps(index, indent=1), encoding="utf-8"))
        for path in out.iterdir():  # of former settings
            if OURS.fullmatch(path.name) and f"{path.stem}.safetensors" not in index["files"]:
                path.unlink()
    finally:
        os.close(lock)
    total = sum(facts["bytes"] for facts in index["files"].values())
    print(f"{out}: {sum(sizes) * variants - len(skipped)} entries of {sum(sizes)} clips, {len(captions)} captions, {_size(total)}, "
          f"{len(index['files'])} files; {len(skipped)} entries left out")
    for lost in skipped:
        print(f"left out {lost['clip']}, variant {lost['variant']}, of {shapes[lost['shape']]}: {lost['reason']}")


class _Kept:
    """The finished shards of a cache folder, each told by the .json beside it, which is written after it."""

    def __init__(self, out: Path):
        self.out, self.facts = out, {}
        self.places: dict[str, tuple[str, int]] = {}  # key of an entry -> shard, slot
        self.sound: set[str] = set()
        for path in sorted(out.glob("*.json")):
            whole = path.with_suffix(".safetensors")
            if OURS.fullmatch(path.name) and whole.is_file():
                facts = json.loads(path.read_text(encoding="utf-8"))
                if whole.stat().st_size == facts["bytes"]:
                    self._add(path.stem, facts)

    def _add(self, name: str, facts: dict[str, Any]) -> None:
        self.facts[name] = facts
        for slot, key in enumerate(facts.get("keys", ())):
            if str(slot) not in facts.get("skipped", ()):
                self.places[key] = (name, slot)

    def whole(self, shard: Shard) -> bool:
        return shard.name in self.facts and not self.facts[shard.name].get("skipped")

    def lacks(self, shard: Shard) -> list[int]:
        """Slots of a shard whose entries are nowhere."""
        return [slot for slot, key in enumerate(shard.keys) if key not in self.places]

    def open(self, key: str):
        """The facts and the opened file of the shard that holds an entry, and its slot there."""
        name, slot = self.places[key]
        path = self.out / f"{name}.safetensors"
        if name not in self.sound and cached.sha256(path) != self.facts[name]["sha256"]:
            raise ValueError(f"{path}: damaged, its SHA-256 is not the one beside it; delete it and run the same command again")
        self.sound.add(name)
        return self.facts[name], safe_open(path, "pt"), slot

    def write(self, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Writes a shard and, when it is whole, the facts beside it."""
        path = self.out / f"{name}.safetensors"
        if name in self.facts:  # made whole now; the index that has its old hash would call it damaged
            (self.out / cached.INDEX).unlink(missing_ok=True)
        facts = _place(path, lambda beside: save_file(tensors, beside)) | facts
        _place(path.with_suffix(".json"), lambda beside: beside.write_text(json.dumps(facts), encoding="utf-8"))
        self._add(name, facts)


def _clip_shards(maker: Maker, todo: list[tuple[Shard, list[int]]], kept: _Kept, latents: list[tuple], processes: int) -> None:
    variants = maker.cfg.data.variants
    jobs = [(shard.shape, *divmod(shard.first + slot, variants)) for shard, slots in todo for slot in slots]
    world = isinstance(maker.source, WorldClips)
    with contextlib.closing(_each(maker, "clip", jobs, processes, "clips")) as results:
        for shard, slots in todo:
            count = len(shard.keys)
            parts = {name: torch.zeros(count, *latents[shard.shape], dtype=maker.dtype)
                     for name in (("x", "std") if maker.spread else ("x",))}
            # A file's caption is its source's to tell, and may change while its latents stay.
            facts = {"keys": shard.keys, "fps": [0.0] * count, "captions": [""] * count if world else [], "skipped": {}}
            for slot in slots:
                made = next(results)
                if "why" in made:
                    facts["skipped"][str(slot)] = made["why"]
                    continue
                facts["fps"][slot] = made["fps"]
                if world:
                    facts["captions"][slot] = made["caption"]
                for name, part in parts.items():
                    part[slot] = torch.from_numpy(made[name]).view(maker.dtype).reshape(part[slot].shape)
            if shard.name in kept.facts and len(facts["skipped"]) == len(slots):
                continue  # what could not be read before still cannot
            for slot in sorted(set(range(count)) - set(slots)):
                old, file, place = kept.open(shard.keys[slot])
                facts["fps"][slot] = old["fps"][place]
                if world:
                    facts["captions"][slot] = old["captions"][place]
                for name, part in parts.items():
                    part[slot] = file.get_slice(name)[place]
            kept.write(shard.name, parts, facts)


def _caption_shards(maker: Maker, captions: list[str], kept: _Kept, shard_mib: int, processes: int,
                    text: str | None) -> tuple[list[Shard], int]:
    """Shards of all captions, with their states where the encoder's fingerprint is given, and how many captions one has."""
    common, per_shard = "", MANY_CAPTIONS
    if text:
        common = digest([cached.FORMAT, text, str(maker.dtype)])
        width = next((facts["width"] for facts in kept.facts.values() if facts.get("common") == common), 0) or maker.text.width
        per_shard = max(1, shard_mib * 2**20 // (maker.cfg.text.max_tokens * width * maker.dtype.itemsize))
    shards = []
    for first in range(0, len(captions), per_shard):
        keys = [digest([common, caption]) for caption in captions[first:first + per_shard]]
        shards.append(Shard(f"captions-{len(shards):05d}-{digest(keys)[:16]}", keys, first))
    todo = [(shard, kept.lacks(shard)) for shard in shards if shard.name not in kept.facts]
    jobs = [captions[shard.first + slot] for shard, slots in todo for slot in slots] if text else []
    with contextlib.closing(_each(maker, "states", jobs, processes, "captions")) as results:
        for shard, slots in todo:
            told, states = captions[shard.first:shard.first + len(shard.keys)], None
            if text:
                fresh = {slot: torch.from_numpy(next(results)).view(maker.dtype).reshape(-1, width) for slot in slots}
                states = [fresh[slot] if slot in fresh else _old_states(kept, key).to(maker.dtype)
                          for slot, key in enumerate(shard.keys)]
            kept.write(shard.name, cached.pack_captions(told, states),
                       {"keys": shard.keys, **({"width": width, "common": common} if text else {})})
    return shards, per_shard


def _old_states(kept: _Kept, key: str) -> Tensor:
    _, file, slot = kept.open(key)
    return cached.read_caption(file, slot, states=True)[1]


def _planned(maker: Maker, shapes: list[ShapeConfig], sizes: list[int], per_shard: list[int], fingerprint: str,
             out: Path) -> list[Shard]:
    """Every shard of clips. A shard's name tells the keys of its entries, and these tell all that the entries depend on."""
    cfg, found = maker.cfg, []
    decides = {key: value for key, value in cached.settings(cfg.data, cfg.seed, cfg.data.source).items() if key not in POOL_ONLY}
    contents = _contents(maker.source, shapes, out) if isinstance(maker.source, FileClips) else {}
    for k, shape in enumerate(shapes):
        common = digest([cached.FORMAT, cfg.data.source, decides, shape_key(shape), fingerprint, cfg.codec.chunk_frames,
                         str(maker.dtype)])
        files = _files(maker.source, shape)
        told = [f"{file.id} {contents[file.path]} {file.start_s!r} {file.frames} {file.fps!r}" for file in files]
        keys = [hashed for index in range(sizes[k]) for hashed in (
            digest([common, told[index] if files else index, variant]) for variant in range(cfg.data.variants))]
        for number, first in enumerate(range(0, len(keys), per_shard[k])):
            mine = keys[first:first + per_shard[k]]
            found.append(Shard(f"{shape.frames}x{shape.height}x{shape.width}-{number:05d}-{digest(mine)[:16]}", mine, first, k))
    return found


def _files(source: Source, shape: ShapeConfig) -> list:
    return source._pools[shape_key(shape)][0] if isinstance(source, FileClips) else []


def _contents(source: FileClips, shapes: list[ShapeConfig], out: Path) -> dict[Path, str]:
    """SHA-256 of every file of the source; of a folder of images, of theirs. sources.jsonl keeps them until a file changes."""
    wanted = {file.path: file.images for shape in shapes for file in _files(source, shape)}
    memo, path = {}, out / "sources.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            name, stamp, hashed = json.loads(line)
            memo[name] = (stamp, hashed)
        except ValueError:  # cut short when the writer was killed
            continue

    def content(path: Path) -> str:
        try:
            about = path.stat()
            stamp = [about.st_size, about.st_mtime_ns]
            if memo.get(str(path), (None,))[0] != stamp:
                memo[str(path)] = (stamp, cached.sha256(path))
                print(json.dumps([str(path), *memo[str(path)]]), file=notes, flush=True)
            return memo[str(path)][1]
        except OSError as error:  # it will be named as unreadable
            return f"unreadable ({error})"

    with open(path, "a", encoding="utf-8") as notes, ThreadPoolExecutor(8) as pool:
        files = [file for path, images in wanted.items() for file in images or [path]]
        hashed = iter(list(tqdm(pool.map(content, files), "hashing sources", len(files), unit="file", leave=False)))
    return {path: digest([next(hashed) for _ in images]) if images else next(hashed) for path, images in wanted.items()}


def _captions(shards: list[Shard], kept: _Kept, source: Source, shapes: list[ShapeConfig],
              variants: int) -> tuple[list[str], list[list[int]]]:
    """All different captions, the empty one first, and the number of each entry's, -1 for those left out."""
    found, numbers = {"": 0}, [[] for _ in shapes]
    for shard in shards:
        facts, files = kept.facts[shard.name], _files(source, shapes[shard.shape])
        for slot in range(len(shard.keys)):
            if str(slot) in facts["skipped"]:
                numbers[shard.shape].append(-1)
                continue
            caption = files[(shard.first + slot) // variants].caption if files else facts["captions"][slot]
            numbers[shard.shape].append(found.setdefault(caption, len(found)))
    return list(found), numbers


def _skipped(shards: list[Shard], kept: _Kept, source: Source, shapes: list[ShapeConfig], variants: int) -> list[dict[str, Any]]:
    lost = []
    for shard in shards:
        for slot, why in sorted(kept.facts[shard.name]["skipped"].items(), key=lambda item: int(item[0])):
            entry = shard.first + int(slot)
            index, variant = divmod(entry, variants)
            files = _files(source, shapes[shard.shape])
            lost.append({"shape": shard.shape, "entry": entry, "clip": files[index].id if files else f"scene {index}",
                         "variant": variant, "reason": why})
    return lost


def _fingerprints(maker: Maker, text: bool) -> tuple[str, str | None]:
    """Those of the codec, which is loaded, and of the text encoder, which is loaded, and so downloaded, if it has to be."""
    codec = cached.codec_fingerprint(maker.cfg.codec)
    words = cached.text_fingerprint(maker.cfg.text) or (maker.text and cached.text_fingerprint(maker.cfg.text)) if text else None
    for key, found, wanted in (("codec.path", codec, True), ("text.encoder", words, text)):
        if wanted and not found:
            raise ValueError(f"{key}: no config and weights found where they are expected, so it cannot be told from others")
    return codec, words


def _say(maker: Maker, out: Path, latents: list[tuple], missing: list[int], data: int, present: int, processes: int) -> None:
    """Prints what is to be made, how large it is and how long it takes. Raises ValueError if the disk is too small for it.

    missing = entries of each shape; data = bytes of their shards; present = bytes of former shards, which may serve again.
    """
    seconds, told = 0.0, []
    for k, (shape, count) in enumerate(zip(maker.shapes, missing, strict=True)):
        each, caption = _probe(maker, k) if count else (0.0, None)
        seconds += each * count
        told += [] if caption is None else [caption]
        print(f"{shape}: {maker.source.pool(shape).size} clips, {maker.cfg.data.variants} of each; {count} entries to make, "
              f"latents of {' x '.join(map(str, latents[k]))}" + (f", about {each:.3g} s each" if count else ""))
    different = {file.caption for shape in maker.shapes for file in _files(maker.source, shape)}
    captions, states = len(different) or sum(missing), 0
    if told and maker.cfg.model.conditioning == "text":
        maker.states("")
        began = time.perf_counter()
        states = round(np.mean([maker.states(caption).nbytes for caption in told]) * captions)
        seconds += (time.perf_counter() - began) / len(told) * captions
    free = shutil.disk_usage(next(place for place in (out, *out.absolute().parents) if place.exists())).free
    seconds /= min(processes, os.cpu_count() or 1)
    print(f"latents: {data} bytes ({_size(data)}); text states: about {_size(states)} for up to {captions} captions; free disk: "
          f"{_size(free)}\nexpected time: {seconds / 3600:.2f} h ({seconds:.0f} s), {processes} process(es), {maker.device}")
    needed = round((data + states) * 1.01) - present
    if needed > free:
        raise ValueError(f"{out}: the cache needs {_size(needed)} more, and {_size(free)} of the disk are free; "
                         "give another folder, --dtype bfloat16, or fewer data.variants")


def _probe(maker: Maker, shape: int) -> tuple[float, str | None]:
    """Seconds that an entry of a shape takes, and its caption: of the first clip that can be read; the second time counts."""
    for index in range(min(8, maker.source.pool(maker.shapes[shape]).size)):
        made = maker.clip((shape, index, 0))
        if "why" not in made:
            began = time.perf_counter()
            maker.clip((shape, index, 0))
            return time.perf_counter() - began, made["caption"]
    return 0.0, None


_worker: Maker | None = None


def _start(maker: Maker) -> None:
    global _worker
    _worker = maker
    _one_thread()
    parent = multiprocessing.parent_process()
    # A parent that is killed cannot end its workers; they must not outlive it.
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _in_worker(what: str, job: Any) -> Any:
    return getattr(_worker, what)(job)


def _each(maker: Maker, what: str, jobs: list, processes: int, unit: str) -> Iterator[Any]:
    """Results of maker.WHAT(job) in the order of the jobs, with a progress line."""
    with tqdm(total=len(jobs), unit=f" {unit}", disable=not jobs) as bar:
        for result in _computed(maker, what, jobs, processes):
            bar.update()
            yield result


def _computed(maker: Maker, what: str, jobs: list, processes: int) -> Iterator[Any]:
    if processes == 1 or len(jobs) < 2:
        yield from map(getattr(maker, what), jobs)
        return
    context = multiprocessing.get_context("forkserver")  # of a process that imported all and started nothing yet
    context.set_forkserver_preload(["data_tools.cache"] + ["latte.text"] * (maker.cfg.model.conditioning == "text"))
    plain = Maker(maker.cfg, maker.source, maker.shapes, str(maker.dtype).removeprefix("torch."))
    pool = ProcessPoolExecutor(min(processes, len(jobs)), context, _start, (plain,))
    try:
        waiting = deque()
        for job in jobs:
            waiting.append(pool.submit(_in_worker, what, job))
            if len(waiting) > 4 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a worker process died, perhaps for lack of memory; use fewer --processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _source(cfg: Config) -> Source:
    if cfg.data.source == "cache":
        raise ValueError("data.source: is a cache already; give the source that it is to be made from: world, folder or manifest")
    if not cfg.data.variants:
        raise ValueError("data.variants: a cache holds a fixed number of variants of each clip; set it to 1 or more")
    if cfg.data.source == "world":
        if not cfg.data.clips:
            raise ValueError("data.clips: a cache holds a fixed number of clips; set it to 1 or more")
        return WorldClips(cfg.data, cfg.seed)
    return FileClips(cfg.data, cfg.seed, [shape for _, shape in cfg.shapes()])


def _refuse_empty(source: Source, shapes: list[ShapeConfig], sizes: list[int]) -> None:
    for shape, size in zip(shapes, sizes, strict=True):
        if not size:
            reasons = "; ".join(f"{count} {why}" for why, count in source.pool(shape).dropped.most_common())
            raise ValueError(f"stages: no clip fits {shape} ({reasons or 'the source is empty'})")


def _lock(out: Path) -> int:
    """A handle that keeps other writers out of a folder until it is closed or this process ends."""
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ValueError(f"{out}: another data_tools.cache is at work on it") from None
    return handle


def _place(path: Path, write: Callable[[Path], Any]) -> dict[str, Any]:
    """Writes a file beside its place, then renames it. Returns its size and SHA-256; raises OSError with the path."""
    beside = path.with_name(f"{path.name}.writing")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.chmod(0o644)  # safetensors lets nobody else read its files
        facts = {"bytes": beside.stat().st_size, "sha256": cached.sha256(beside)}
        os.rename(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error}); the same command goes on from here") from error
    return facts


def _present(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("*.safetensors")) if out.is_dir() else 0


def _raw(x: Tensor) -> np.ndarray:
    return x.contiguous().view(torch.uint8).numpy().reshape(-1)


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _one_thread() -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # sums of other numbers of threads may round differently


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.cache", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="the YAML of the training")
    parser.add_argument("out", type=Path, help="the cache's folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--processes", type=int, default=1, help="each with its own codec and, for captions, text encoder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is stored")
    parser.add_argument("--shard-mib", type=int, default=256, help="size of a file")
    parser.add_argument("--dry-run", action="store_true", help="only say how large it gets and how long it takes")
    args = parser.parse_intermixed_args(argv)
    _one_thread()
    if args.processes < 1 or args.shard_mib < 1:
        raise ValueError("--processes and --shard-mib must be at least 1")
    build(config.load(args.config, args.overrides), args.out, args.dtype, args.shard_mib, args.processes, args.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Published weights: read into this project's Latte, and handed back in the formats that others read.

    python -m latte.published show PATH                                   what a file or folder holds
    python -m latte.published export CHECKPOINT FOLDER [--base LATTE]     a folder for diffusers.LattePipeline, or FILE.pt

The kind of weights is found from their names:

    latte        text-to-video Latte: diffusers folders (Latte-1) and the original t2v.pt; the names are the same
    latte-class  class-to-video and unconditional Latte: original .pt files of S, B, L and XL
    pixart       PixArt-alpha, by diffusers' names: all but the temporal blocks of text-to-video Latte
    pixart-orig  PixArt-alpha, by its authors' names
    dit          DiT: all but the classes of class-to-video Latte; its blocks are taken by turns as spatial and temporal

Nothing in a .pt file can run code: only tensors are unpickled.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latte import checkpoint, config
from latte.attention import sincos
from latte.command import command
from latte.config import DiffusionConfig, ModelConfig
from latte.model import Latte, spatial_positions

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width, of the published sizes S, B, L, XL; the names do not tell them
IGNORED = ("caption_projection.y_embedding", "pos_embed.pos_embed", "temp_pos_embed")  # tables that nothing learns
TABLES = ("pos_embed", "temp_embed", "time_embed")  # of latte-class and dit: constants, checked against ours
PUBLISHED_FRAMES = 16
# What a config.json of diffusers must say for its numbers to be those of this project's Latte.
EXPECTED = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_single", "norm_eps": 1e-6,
            "norm_elementwise_affine": False, "num_embeds_ada_norm": 1000, "dropout": 0.0}


@dataclass(frozen=True)
class Found:
    """Weights as published: `state` by their own names, and what a config.json beside them says."""

    path: str
    kind: str
    state: dict[str, Tensor]
    facts: dict


def load(path: str | os.PathLike, **changes) -> Latte:
    """The Latte of published weights, in float32 on the CPU.

    path: a pipeline folder of diffusers, a transformer's folder, a .safetensors, .pt or .pth file or a hub id.
    changes: fields of ModelConfig, such as heads where neither a config.json nor the width tells them, or temporal_positions.
    Weights of images (pixart, dit) lack the temporal blocks or the classes; a warning lists by name what starts afresh.
    Raises ValueError naming the path when it is missing, damaged, of no known kind, would run code or does not fit.
    """
    found = read(path)
    model = Latte(model_config(found, **changes))
    for note in fill(model, found):
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return model


def read(path: str | os.PathLike, weights: bool = True) -> Found:
    """Opens published weights without building a model; weights=False reads names and shapes alone. ValueErrors as in `load`."""
    place = local(str(path))
    facts = {}
    if place.is_dir():
        place = place / "transformer" if (place / "transformer").is_dir() else place
        facts = _json(place / "config.json") if (place / "config.json").is_file() else {}
        state = {}
        for file in _weight_files(place):
            state |= _tensors(file, weights)
    else:
        state = _tensors(place, weights)
    state = {key: value for key, value in state.items() if key not in IGNORED}
    return Found(str(path), _kind(str(path), state), state, facts)


def model_config(found: Found, **changes) -> ModelConfig:
    """The ModelConfig that published weights need. Raises ValueError where it cannot be told from them."""
    state, facts, text = found.state, found.facts, found.kind in ("latte", "pixart", "pixart-orig")
    wrong = {key: facts[key] for key, value in EXPECTED.items() if facts.get(key, value) != value}
    if wrong:
        raise ValueError(f"{found.path}: config.json asks for {wrong}, which this Latte does not have; it has "
                         f"{ {key: EXPECTED[key] for key in wrong} }")
    patch = state["pos_embed.proj.weight" if found.kind in ("latte", "pixart") else "x_embedder.proj.weight"]
    width, p = patch.shape[0], patch.shape[2]
    heads = changes.pop("heads", None) or facts.get("num_attention_heads") or HEADS.get(width)
    if not heads or width % heads:
        raise ValueError(f"{found.path}: its width is {width}, and nothing tells its number of heads; give heads=..., a divisor")
    out = state["proj_out.weight" if found.kind in ("latte", "pixart") else "final_layer.linear.weight"]
    values = {"in_channels": patch.shape[1], "out_channels": out.shape[0] // p**2, "patch_size": p, "heads": heads,
              "head_dim": width // heads}
    if text:
        blocks = "transformer_blocks" if found.kind != "pixart-orig" else "blocks"
        caption = "caption_projection.linear_1" if found.kind != "pixart-orig" else "y_embedder.y_proj.fc1"
        values |= {"layers": _count(state, blocks), "text_channels": state[f"{caption}.weight"].shape[1],
                   "sample_size": facts.get("sample_size", 64), "temporal_spacing": "frame"}
    else:
        labels = state.get("y_embedder.embedding_table.weight")
        grid = round(state["pos_embed"].shape[1] ** 0.5) if "pos_embed" in state else 16
        values |= {"layers": _count(state, "blocks") // 2, "modulation": "block", "sample_size": grid * p,
                   "conditioning": "none" if labels is None else "class", "temporal_spacing": "frame",
                   "classes": 0 if labels is None else len(labels) - 1}
    return ModelConfig(**values | changes)


@torch.no_grad()
def fill(model: Latte, found: Found) -> list[str]:
    """Copies published weights into a model of their shape. Returns what was left out or starts afresh, in words.

    Raises ValueError listing by name what is missing, left over or of another shape.
    """
    table, own = names(found.kind, model.cfg), dict(model.named_parameters())
    state, notes = dict(found.state), []
    for key in TABLES:
        if key in state:
            _check_table(found.path, key, state.pop(key), model.cfg)
    fresh = {name for name in own if name not in table}
    if found.kind == "dit" and "y_embedder.embedding_table.weight" in state:
        labels = state["y_embedder.embedding_table.weight"]
        if "label.weight" not in own or labels.shape != own["label.weight"].shape:
            state.pop("y_embedder.embedding_table.weight")
            table.pop("label.weight", None)
            fresh |= {"label.weight"} & set(own)
            notes.append("its classes are not those of this model and were left out")
    missing = sorted(key for name, keys in table.items() for key in keys if key not in state)
    left = sorted(set(state) - {key for keys in table.values() for key in keys})
    if missing or left:
        raise ValueError(f"{found.path}: does not fit; missing: {_listed(missing)}; left over: {_listed(left)}")
    for name, keys in table.items():
        value = torch.cat([state[key] for key in keys])
        value = value.flatten(1) if name == "patch.weight" else value
        if value.shape != own[name].shape:
            raise ValueError(f"{found.path}: {', '.join(keys)} make {list(value.shape)}, but the model's {name} is "
                             f"{list(own[name].shape)}")
        own[name].copy_(value)
    if any(name.startswith("temporal.") for name in fresh):
        # Their gates come from the image model's modulation and are open, so their last layers start at zero: a single frame
        # is the image model's picture at first. (A clip's frames differ from it by the positions in time that they get.)
        for block in model.temporal:
            for layer in (block.attn.out, block.mlp[2]):
                nn.init.zeros_(layer.weight)
        notes.append(f"fresh, adding nothing at first: {len(fresh)} tensors, {_listed(sorted(fresh))}")
    elif fresh:
        notes.append(f"fresh: {_listed(sorted(fresh))}")
    return notes


def names(kind: str, cfg: ModelConfig) -> dict[str, list[str]]:
    """This model's parameter -> the published tensors that it joins along dimension 0, for one kind of weights."""
    if kind in ("latte", "pixart"):
        modules, tables = _latte_names(cfg.layers, temporal=kind == "latte")
    elif kind == "pixart-orig":
        modules, tables = _pixart_names(cfg.layers)
    else:
        modules, tables = _class_names(cfg.layers), {}
        if cfg.conditioning == "class":
            tables["label.weight"] = ["y_embedder.embedding_table.weight"]
    joined = {f"{mine}.{part}": [f"{x}.{part}" for x in theirs] for mine, theirs in modules.items() for part in ("weight", "bias")}
    return tables | joined


def _latte_names(layers: int, temporal: bool) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    modules = {"patch": ["pos_embed.proj"], "timestep.0": ["adaln_single.emb.timestep_embedder.linear_1"],
               "timestep.2": ["adaln_single.emb.timestep_embedder.linear_2"], "modulation": ["adaln_single.linear"],
               "text.0": ["caption_projection.linear_1"], "text.2": ["caption_projection.linear_2"], "out": ["proj_out"]}
    tables = {"table": ["scale_shift_table"]}
    for i in range(layers):
        for mine, theirs in [(f"spatial.{i}", f"transformer_blocks.{i}")] + \
                [(f"temporal.{i}", f"temporal_transformer_blocks.{i}")] * temporal:
            tables[f"{mine}.table"] = [f"{theirs}.scale_shift_table"]
            modules |= {f"{mine}.attn.qkv": [f"{theirs}.attn1.to_{x}" for x in "qkv"],
                        f"{mine}.attn.out": [f"{theirs}.attn1.to_out.0"],
                        f"{mine}.mlp.0": [f"{theirs}.ff.net.0.proj"], f"{mine}.mlp.2": [f"{theirs}.ff.net.2"]}
        theirs = f"transformer_blocks.{i}.attn2"
        modules |= {f"spatial.{i}.cross.q": [f"{theirs}.to_q"], f"spatial.{i}.cross.kv": [f"{theirs}.to_k", f"{theirs}.to_v"],
                    f"spatial.{i}.cross.out": [f"{theirs}.to_out.0"]}
    return modules, tables


def _pixart_names(layers: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    modules = {"patch": "x_embedder.proj", "timestep.0": "t_embedder.mlp.0", "timestep.2": "t_embedder.mlp.2",
               "modulation": "t_block.1", "text.0": "y_embedder.y_proj.fc1", "text.2": "y_embedder.y_proj.fc2",
               "out": "final_layer.linear"}
    tables = {"table": ["final_layer.scale_shift_table"]}
    for i in range(layers):
        mine, theirs = f"spatial.{i}", f"blocks.{i}"
        tables[f"{mine}.table"] = [f"{theirs}.scale_shift_table"]
        modules |= {f"{mine}.attn.qkv": f"{theirs}.attn.qkv", f"{mine}.attn.out": f"{theirs}.attn.proj",
                    f"{mine}.cross.q": f"{theirs}.cross_attn.q_linear", f"{mine}.cross.kv": f"{theirs}.cross_attn.kv_linear",
                    f"{mine}.cross.out": f"{theirs}.cross_attn.proj",
                    f"{mine}.mlp.0": f"{theirs}.mlp.fc1", f"{mine}.mlp.2": f"{theirs}.mlp.fc2"}
    return {mine: [theirs] for mine, theirs in modules.items()}, tables


def _class_names(layers: int) -> dict[str, list[str]]:
    modules = {"patch": "x_embedder.proj", "timestep.0": "t_embedder.mlp.0", "timestep.2": "t_embedder.mlp.2",
               "final": "final_layer.adaLN_modulation.1", "out": "final_layer.linear"}
    for i in range(2 * layers):
        mine, theirs = f"{'temporal' if i % 2 else 'spatial'}.{i // 2}", f"blocks.{i}"
        modules |= {f"{mine}.attn.qkv": f"{theirs}.attn.qkv", f"{mine}.attn.out": f"{theirs}.attn.proj",
                    f"{mine}.mlp.0": f"{theirs}.mlp.fc1", f"{mine}.mlp.2": f"{theirs}.mlp.fc2",
                    f"{mine}.modulation": f"{theirs}.adaLN_modulation.1"}
    return {mine: [theirs] for mine, theirs in modules.items()}


# ---- handing back


def published_state(model: Latte, kind: str) -> dict[str, Tensor]:
    """The model's weights by the published names of "latte" or "latte-class", contiguous, sharing no memory."""
    p, own, state = model.cfg.patch_size, dict(model.named_parameters()), {}
    for name, keys in names(kind, model.cfg).items():
        value = own[name].detach()
        if name == "patch.weight":
            value = value.unflatten(1, (-1, p, p))
        state |= {key: part.clone().contiguous() for key, part in zip(keys, value.chunk(len(keys)), strict=True)}
    return state


def export(model: Latte, target: str | os.PathLike, frames: int = PUBLISHED_FRAMES, diffusion: DiffusionConfig | None = None,
           base: str = "", record: str = "") -> Path:
    """Writes the model where others read it, beside `target` first, and returns the path.

    target: a folder for diffusers.LattePipeline.from_pretrained, or a file ending in .pt as the original repository reads it.
    frames: the clip length that the folder is for; diffusers' class takes no other, save single frames.
    diffusion: how the model was trained, None for the published way.
    base: a Latte pipeline's folder or hub id whose tokenizer, text encoder and VAE go with it; without one they have to be given
    to from_pretrained. record: text for the model card, such as how it was trained.
    Raises ValueError saying what about the model the format cannot hold, and OSError when it cannot be written.
    """
    target, kind = Path(target), "latte" if model.cfg.conditioning == "text" else "latte-class"
    cannot = _not_held(model.cfg, diffusion, kind, frames, target)
    if cannot:
        raise ValueError(f"{target}: this format cannot hold the model: {'; '.join(cannot)}")
    beside = target.with_name(f"{target.name}.writing")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".pt":
            torch.save({"ema": published_state(model, kind) | _tables(model.cfg, frames, kind)}, beside)
        else:
            shutil.rmtree(beside, ignore_errors=True)
            _write_pipeline(model, beside, frames, base, record)
            shutil.rmtree(target, ignore_errors=True)
        os.replace(beside, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"{target}: could not be written ({error})") from error
    return target


def _not_held(cfg: ModelConfig, diffusion: DiffusionConfig | None, kind: str, frames: int, target: Path) -> list[str]:
    """Why published formats cannot hold a model, one clause a reason."""
    reasons = []
    if target.suffix != ".pt" and kind == "latte-class":
        reasons.append("diffusers has no Latte without text; give a file ending in .pt")
    if cfg.modulation != ("shared" if kind == "latte" else "block"):
        reasons.append(f"model.modulation is {cfg.modulation} with conditioning {cfg.conditioning}")
    if cfg.temporal_positions != "sincos":
        reasons.append("its temporal positions are rotary, and the format has sine-cosine tables only")
    if cfg.temporal_spacing == "stretch" and frames > cfg.known_frames:
        reasons.append("its temporal positions are stretched, and the format counts frames")
    if cfg.qk_norm:
        reasons.append("it normalises queries and keys")
    if cfg.out_channels == cfg.in_channels and kind == "latte-class":
        reasons.append("it does not predict a variance")
    if diffusion is not None and (diffusion.kind, diffusion.prediction, diffusion.timesteps) != ("ddpm", "eps", 1000):
        reasons.append(f"it was trained by {diffusion.kind} to predict {diffusion.prediction}, and the format's schedulers want "
                       "ddpm with 1000 timesteps and eps")
    return reasons


def _write_pipeline(model: Latte, folder: Path, frames: int, base: str, record: str) -> None:
    import diffusers  # takes seconds to import

    cfg = model.cfg
    facts = {**EXPECTED, "_class_name": "LatteTransformer3DModel", "_diffusers_version": diffusers.__version__,
             "sample_size": cfg.sample_size, "num_layers": cfg.layers, "patch_size": cfg.patch_size,
             "num_attention_heads": cfg.heads, "attention_head_dim": cfg.head_dim, "in_channels": cfg.in_channels,
             "out_channels": cfg.out_channels, "caption_channels": cfg.text_channels, "cross_attention_dim": cfg.width,
             "video_length": frames}
    (folder / "transformer").mkdir(parents=True)
    _dump(folder / "transformer" / "config.json", facts)
    save_file(published_state(model, "latte"), folder / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    diffusers.DDIMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False,
                            timestep_spacing="leading").save_pretrained(folder / "scheduler")
    index = {"_class_name": "LattePipeline", "_diffusers_version": diffusers.__version__,
             "scheduler": ["diffusers", "DDIMScheduler"], "transformer": ["diffusers", "LatteTransformer3DModel"]}
    parts = ("tokenizer", "text_encoder", "vae")
    if base:
        source = local(base, [f"{part}/*" for part in parts] + ["model_index.json"])
        known = _json(source / "model_index.json")
        for part in parts:
            if part not in known or not (source / part).is_dir():
                raise ValueError(f"{base}: no {part} in this pipeline")
            index[part] = known[part]
            shutil.copytree(source / part, folder / part, copy_function=_link)
    else:
        index |= {part: [None, None] for part in parts}
    _dump(folder / "model_index.json", index)
    (folder / "README.md").write_text(_card(cfg, frames, record), encoding="utf-8")


def _card(cfg: ModelConfig, frames: int, record: str) -> str:
    return f"""---
library_name: diffusers
pipeline_tag: text-to-video
tags: [latte, text-to-video]
---

# Latte, {frames} frames

A text-to-video Latte (Ma et al., arXiv 2401.03048) for clips of {frames} frames. Load it with
`diffusers.LattePipeline.from_pretrained(...)` and call it with `video_length={frames}`.

## Training record

{record.strip() or "None was given."}

## Model

```json
{json.dumps(asdict(cfg), indent=1)}
```
"""


def push(folder: Path, repo: str) -> str:
    """Uploads an exported folder to a hub repository, made if it is new; returns its address. Needs a login of huggingface_hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    return str(api.upload_folder(folder_path=folder, repo_id=repo))


# ---- reading files


def local(path: str, patterns: Iterable[str] = ("transformer/*", "*.json")) -> Path:
    """A local file or folder, or the downloaded files of a hub id."""
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith(".") or Path(path).suffix in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"{path}: no such file or folder; expected a checkpoint, published weights or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are OSErrors
        raise ValueError(f"{path}: neither a local path nor a hub id that can be downloaded "
                         f"({_why(error)})") from None


def _weight_files(folder: Path) -> list[Path]:
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth"):
        found = sorted(folder.glob(pattern))
        plain = [file for file in found if ".fp16." not in file.name]  # diffusers' half-precision twin of the same weights
        if found:
            return plain or found
    raise ValueError(f"{folder}: no weights here (*.safetensors, *.bin, *.pt)")


def _tensors(path: Path, weights: bool) -> dict[str, Tensor]:
    """The tensors of one file by name, without `weights` on the meta device.

    Of a .pt, those under "ema", else "model" or "state_dict", where it has such.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path) if weights else _shapes(path)
        read = torch.load(path, map_location="cpu" if weights else "meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: not opened, because it holds more than tensors and could run code "
                         f"({_why(error)})") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"{path}: damaged, or no file of weights ({_why(error)})") from None
    for key in ("ema", "model", "state_dict"):
        if isinstance(read, dict) and isinstance(read.get(key), dict):
            read = read[key]
            break
    if not isinstance(read, dict) or not read or not all(isinstance(value, Tensor) for value in read.values()):
        raise ValueError(f"{path}: holds no dictionary of tensors, nor one under ema, model or state_dict")
    return {key.removeprefix("module."): value for key, value in read.items()}


def _shapes(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118


def _kind(path: str, state: dict[str, Tensor]) -> str:
    if "temporal_transformer_blocks.0.attn1.to_q.weight" in state:
        return "latte"
    if "transformer_blocks.0.scale_shift_table" in state:
        return "pixart"
    if "t_block.1.weight" in state:
        return "pixart-orig"
    if "blocks.0.adaLN_modulation.1.weight" in state:
        return "latte-class" if {"temp_embed", "time_embed"} & set(state) else "dit"
    raise ValueError(f"{path}: not a Latte, PixArt-alpha or DiT; its tensors have names such as {_listed(sorted(state))}")


def _tables(cfg: ModelConfig, frames: int, kind: str) -> dict[str, Tensor]:
    """The constants that original files carry."""
    if kind == "latte":
        return {"caption_projection.y_embedding": torch.zeros(120, cfg.text_channels)}
    side = cfg.sample_size // cfg.patch_size
    return {"pos_embed": spatial_positions(cfg, side, side, torch.device("cpu"))[None].float(),
            "temp_embed": sincos(torch.arange(frames), cfg.width)[None].float()}


def _check_table(path: str, key: str, table: Tensor, cfg: ModelConfig) -> None:
    if key == "pos_embed":
        side = round(table.shape[1] ** 0.5)
        expected = spatial_positions(cfg, side, side, torch.device("cpu"))
    else:
        expected = sincos(torch.arange(table.shape[1]), cfg.width)
    if table[0].shape != expected.shape or (table[0].double() - expected).abs().max() > 1e-3:
        raise ValueError(f"{path}: its {key} is not the sine-cosine table that this model computes")


def _why(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _count(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith(f"{prefix}."))


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "") if keys else "none"


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None


def _dump(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _link(source: str, target: str) -> None:
    """A hard link where the file system allows it: a text encoder of 19 GB is not copied in vain."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="kind, config and size of published weights")
    show.add_argument("path")
    out = commands.add_parser("export", help="write a checkpoint's EMA weights in a published format")
    out.add_argument("checkpoint", help="a checkpoint folder or a run's folder")
    out.add_argument("target", help="a folder for diffusers, or a file ending in .pt")
    out.add_argument("--base", default="", help="a Latte pipeline's folder or hub id to take tokenizer, text encoder and VAE from")
    out.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the hub")
    args = parser.parse_args(argv)
    if args.command == "show":
        found = read(args.path, weights=False)
        size = sum(value.numel() for value in found.state.values())
        print(json.dumps({"kind": found.kind, "tensors": len(found.state), "parameters": size,
                          "model": asdict(model_config(found))}, indent=1))
        return 0
    found = checkpoint.read(args.checkpoint)
    model = Latte(found.config.model)
    checkpoint.load_weights(model, found)
    record = (f"{found.step} updates with this resolved config:\n\n```yaml\n{config.to_yaml(found.config)}```\n\nVersions: "
              f"{json.dumps(checkpoint.versions())}\n")
    target = export(model, args.target, found.config.stages[-1].frames, found.config.diffusion, args.base, record)
    print(target)
    if args.push:
        print(push(target, args.push))
    return 0


if __name__ == "__main__":
    sys.exit(main())

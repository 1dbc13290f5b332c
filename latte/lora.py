"""Low-rank adapters (Hu et al., arXiv 2106.09685) by peft, and their files in peft's format for diffusers' Latte.

This model fuses projections that the published one keeps apart. An adapter of a fused projection has one A and a B for all parts,
so it is exactly an adapter of each part: the same A, and the part's rows of B. Back, adapters of the parts add up to one change of
the fused weight.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latte.config import InitConfig
from latte.model import Latte
from latte.published import names

TARGETS = ("attn.qkv", "attn.out", "cross.q", "cross.kv", "cross.out", "mlp.0", "mlp.2")  # linears of the blocks
PUBLISHED_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]  # their names in diffusers' class
PREFIXES = ("base_model.model.", "transformer.")


def add(model: Latte, cfg: InitConfig) -> None:
    """Puts fresh adapters on all linears of all blocks and freezes everything else. A fresh adapter changes nothing."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    wanted = LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=list(TARGETS), lora_dropout=0.0)
    inject_adapter_in_model(wanted, model)


def save(model: Latte, weights: dict[str, Tensor], cfg: InitConfig, folder: str | os.PathLike) -> Path:
    """Writes adapters as peft does for diffusers' LatteTransformer3DModel: adapter_config.json, adapter_model.safetensors.

    weights: the adapters' tensors by parameter name of `model`, such as the EMA's. ValueError for a model without text, for
    which no other class exists.
    """
    if model.cfg.conditioning != "text":
        raise ValueError("init.lora_rank: adapters have a published format for text-to-video Latte only")
    from peft import LoraConfig

    state = {}
    for name, keys in names("latte", model.cfg).items():
        module = name.removesuffix(".weight")
        a, b = (weights.get(f"{module}.lora_{side}.default.weight") for side in "AB")  # [r in], [out r]
        if a is None or b is None:
            continue
        for key, rows in zip(keys, b.chunk(len(keys)), strict=True):
            place = f"base_model.model.{key.removesuffix('.weight')}"
            state |= {f"{place}.lora_A.weight": a.clone(), f"{place}.lora_B.weight": rows.clone().contiguous()}
    folder = Path(folder)
    beside = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=PUBLISHED_TARGETS,
               base_model_name_or_path=cfg.weights).save_pretrained(beside)
    save_file(state, beside / "adapter_model.safetensors", {"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    return folder


@torch.no_grad()
def merge(model: Latte, folder: str | os.PathLike, scale: float = 1.0) -> None:
    """Adds adapters of diffusers' Latte, in peft's or diffusers' naming, to the weights of a model, `scale` times.

    Raises ValueError naming the folder when it holds none, is damaged or does not fit.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / "adapter_config.json").read_text())
        found = load_file(folder / "adapter_model.safetensors")
        factor = scale * facts["lora_alpha"] / facts["r"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder}: no usable adapters (adapter_config.json, adapter_model.safetensors): {error}") from None
    for prefix in PREFIXES:
        found = {key.removeprefix(prefix): value for key, value in found.items()}
    own, used = dict(model.named_parameters()), set()
    for name, keys in names("latte", model.cfg).items():
        if not name.endswith(".weight") or own[name].ndim != 2:
            continue
        parts = []
        for key, weight in zip(keys, own[name].chunk(len(keys)), strict=True):
            pair = [f"{key.removesuffix('.weight')}.lora_{side}.weight" for side in "AB"]
            if pair[0] not in found or pair[1] not in found:
                parts.append(torch.zeros_like(weight))
                continue
            change = found[pair[1]].float() @ found[pair[0]].float()
            if change.shape != weight.shape:
                raise ValueError(f"{folder}: {pair[0]} is for {list(change.shape)}, the model's weight is {list(weight.shape)}")
            parts.append(factor * change)
            used |= set(pair)
        if used & {f"{key.removesuffix('.weight')}.lora_A.weight" for key in keys}:
            own[name] += torch.cat(parts).to(own[name])
    if set(found) - used or not used:
        raise ValueError(f"{folder}: does not fit this model; left over: {', '.join(sorted(set(found) - used)[:6]) or 'none'}, "
                         f"used: {len(used)} tensors")

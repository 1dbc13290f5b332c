"""Number formats of matrix products beside autocast's: TF32 for what is float32, fp8 for the linears that are large enough."""

from importlib.util import find_spec

import torch
from torch import nn

from latte.config import TrainConfig
from latte.model import Latte

FP8_CAPABILITY = (8, 9)  # CUDA compute capability from which on there are fp8 products
FP8_LAYERS = ("attn.qkv", "attn.out", "cross.q", "cross.out", "mlp.0", "mlp.2")  # of a block: those that work on all video tokens
# In fp8, the three products of a linear [in -> out] save about half of 6 in out operations a token and cost about 10 (in + out)
# bytes of casting. At 790 TFLOP/s and 4.3 TB/s, an H200's, that breaks even at in out / (in + out) = 612; a margin comes on top.
# Of width 1152 this takes qkv and the MLP and leaves the square ones; of width 768 it takes none.
FP8_FROM = 700


def apply(model: Latte, cfg: TrainConfig, device: torch.device) -> str:
    """Sets the process's float32 products as cfg.tf32 says, and the model's large linears to fp8 where cfg.fp8 says so. Returns
    what was set, in one line. ValueErrors as in use_fp8."""
    # torch's newer setting, fp32_precision, stops the compiler, which reads this one
    torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = cfg.tf32
    said = f"precision: {cfg.mixed_precision}, other products in {'TF32' if cfg.tf32 and device.type == 'cuda' else 'float32'}"
    return f"{said}; {use_fp8(model, device)}" if cfg.fp8 else said


def use_fp8(model: Latte, device: torch.device, emulate: bool = False) -> str:
    """Makes the products of a model's large linears, forward and backward, fp8 with one scale a tensor, found anew each time
    (Micikevicius et al., arXiv 2209.05433, by torchao). Parameters and their names stay. Goes before compile_blocks, without which
    it is slower than bfloat16. Returns what was done, in one line: nothing where the device has no fp8 products or no linear is
    large enough.

    emulate: the same rounding with products in float32, on any device.
    Raises ValueError naming train.fp8 when torchao is missing.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY):
        return f"fp8: off, this device has none; GPUs of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} have"
    chosen = fp8_layers(model)
    if not chosen:
        return f"fp8: off, at width {model.cfg.width} every linear is too small to gain from it"
    if find_spec("torchao") is None:
        raise ValueError("train.fp8: needs the package torchao, which is not installed: pip install .[gpu]")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # takes seconds to import

    settings = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)  # a number of tokens need not divide by 16
    convert_to_float8_training(model, config=settings, module_filter_fn=lambda _, name: name in chosen)
    return f"fp8: {len(chosen)} linears, of each block {', '.join(sorted({name.split('.', 2)[2] for name in chosen}))}"


def fp8_layers(model: Latte) -> set[str]:
    """Names of the linears that gain from fp8."""
    return {name for name, layer in model.named_modules() if type(layer) is nn.Linear and name.split(".", 2)[-1] in FP8_LAYERS and (
        _pays(layer.in_features, layer.out_features))}


def _pays(inputs: int, outputs: int) -> bool:
    return inputs % 16 == outputs % 16 == 0 and inputs * outputs / (inputs + outputs) >= FP8_FROM

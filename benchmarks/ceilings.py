"""What the device at hand can do at most, at the shapes of this model: matrix products, copies, attention.

    python benchmarks/ceilings.py [--preset XL] [--frames 128] [--sizes 256 512] [--rounds 20] [--tiny] [--out FILE.json]

products   x [tokens d] times the five kinds of weight of a block (qkv d -> 3 d, out d -> d, fc1 d -> 4 d, fc2 4 d -> d, and the
           text's keys and values [text tokens d] -> 2 d), forward, and the two products of its backward pass; bf16, float32 with
           TF32, and on a GPU float8 (torch._scaled_mm, one scale a tensor) where it runs
copy       bytes read and written a second, of a tensor as large as one of activations [tokens 4 d]
attention  forward and backward of each back-end of torch's SDPA that takes the shape: head sizes 64, 72 and 128, sequences of 128,
           256 and 1024 tokens, as many rows as a 128-frame clip has; inputs with the heads' axis before the tokens' in memory
           (contiguous) and as views of the output of the fused projection (strided). Work: 4 and 10 x rows x tokens^2 x width

Each figure is the best and the median of the rounds, by CUDA events on a GPU. --tiny is for trying on a CPU, its default.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import peer
from latte.config import ModelConfig

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "math": SDPBackend.MATH}
MATH_LIMIT = 2**33  # bytes of logits, past which the unfused formula is left out


def seconds(run: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Of each round, after two to warm up."""
    for _ in range(2):
        run()
    if device == "cpu":
        taken = []
        for _ in range(rounds):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
        return taken
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]


def random(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal: products of zeros or ones take less power, and so run faster than real ones."""
    return torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))


def rate(work: float, taken: list[float], unit: float) -> dict:
    return {"median": round(work / statistics.median(taken) / unit, 3), "best": round(work / min(taken) / unit, 3),
            "milliseconds": round(1000 * statistics.median(taken), 4)}


def products(cfg: ModelConfig, tokens: int, text: int, device: str, rounds: int) -> dict[str, dict]:
    """TFLOP/s of the five products and of those of their backward pass."""
    d, found = cfg.width, {}
    shapes = {"qkv": (tokens, d, 3 * d), "out": (tokens, d, d), "fc1": (tokens, d, 4 * d), "fc2": (tokens, 4 * d, d),
              "text kv": (text, d, 2 * d)}
    for name, (m, k, n) in shapes.items():
        for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            x, w, g = (random(shape, device, dtype) for shape in ((m, k), (n, k), (m, n)))
            cases = {"forward": lambda x=x, w=w: x @ w.t(), "to the input": lambda g=g, w=w: g @ w,
                     "to the weight": lambda g=g, x=x: g.t() @ x}
            for case, run in cases.items():
                found[f"{name} [{m} {k}] x [{k} {n}], {case}, {kind}"] = rate(2 * m * n * k, seconds(run, device, rounds), 1e12)
            del x, w, g, cases
        if device == "cuda":
            found[f"{name} [{m} {k}] x [{k} {n}], forward, fp8"] = float8(m, k, n, rounds)
    return found


def float8(m: int, k: int, n: int, rounds: int) -> dict:
    """TFLOP/s of a product of e4m3 numbers with one scale a tensor, alone and with the scaling of its bf16 input."""
    try:
        x, one, kind = random((m, k), "cuda"), torch.ones((), device="cuda"), torch.float8_e4m3fn
        w, x8 = random((n, k), "cuda").to(kind).t(), x.to(kind)

        def product(a: Tensor, scale: Tensor) -> Tensor:
            return torch._scaled_mm(a, w, scale_a=scale, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

        def alone():
            return product(x8, one)

        def scaled():
            scale = torch.finfo(kind).max / x.abs().amax().float()
            return product((x * scale).to(kind), 1 / scale)

        return {**rate(2 * m * n * k, seconds(alone, "cuda", rounds), 1e12),
                "with scaling": rate(2 * m * n * k, seconds(scaled, "cuda", rounds), 1e12)}
    except (RuntimeError, AttributeError, TypeError) as error:  # cards before Ada have none
        return {"failed": str(error).splitlines()[0][:120]}


def copy(elements: int, device: str, rounds: int) -> dict:
    x = random((elements,), device)
    y = torch.empty_like(x)
    return rate(2 * x.nbytes, seconds(lambda: y.copy_(x), device, rounds), 1e9)


def attention(rows: int, heads: int, tokens: int, head_dim: int, backend: str, strided: bool, device: str, rounds: int) -> dict:
    """TFLOP/s of attention [rows heads tokens head_dim] in bf16, forward and forward with backward."""
    if strided:
        x = random((rows, tokens, 3, heads, head_dim), device).requires_grad_()
        q, k, v = (y.transpose(1, 2) for y in x.unbind(2))
    else:
        q, k, v = (random((rows, heads, tokens, head_dim), device).requires_grad_() for _ in range(3))
    grad = random((rows, tokens, heads, head_dim), device).transpose(1, 2)
    product = 2 * rows * heads * tokens**2 * head_dim
    kernels = [BACKENDS[backend]] if device == "cuda" else list(BACKENDS.values())

    def forward():
        return F.scaled_dot_product_attention(q, k, v)

    def both():
        torch.autograd.grad(forward(), (q, k, v), grad)

    with sdpa_kernel(kernels), torch.no_grad():
        found = {"forward": rate(2 * product, seconds(forward, device, rounds), 1e12)}
    with sdpa_kernel(kernels):
        return {**found, "forward and backward": rate(7 * product, seconds(both, device, rounds), 1e12)}


def attentions(cfg: ModelConfig, tokens_in_all: int, device: str, lengths: list[int], rounds: int) -> dict[str, dict]:
    found = {}
    for head_dim in (64, 72, 128):
        heads = max(1, cfg.width // head_dim)
        for length in lengths:
            number = tokens_in_all // length
            for backend in BACKENDS if device == "cuda" else ("cpu",):
                for strided in (False, True):
                    layout = "strided" if strided else "contiguous"
                    name = f"{number} x {heads} heads x {head_dim}, {length} tokens, {backend}, {layout}"
                    if backend == "math" and 4 * number * heads * length**2 > MATH_LIMIT:
                        continue
                    try:
                        found[name] = attention(number, heads, length, head_dim, backend, strided, device, rounds)
                    except RuntimeError as error:  # this kernel does not take this shape; out of memory
                        found[name] = {"failed": str(error).splitlines()[0][:120]}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--preset", choices=peer.PRESETS, default="XL" if on_gpu else "tiny")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="pixels; latents have an eighth of it")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiny", action=argparse.BooleanOptionalAction, default=not on_gpu, help="the default without a GPU")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", default=str(peer.ROOT / "benchmarks" / "results" / "ceilings.json"))
    args = parser.parse_args()
    frames, sizes, rounds, lengths = args.frames, args.sizes, args.rounds, [128, 256, 1024]
    if args.tiny:
        frames, sizes, rounds, lengths = 8, [64], 3, [16, 64]
    torch.backends.cuda.matmul.allow_tf32 = True
    cfg, result = ModelConfig(**peer.PRESETS[args.preset]), {"products": {}, "copy": {}, "attention": {}}
    for size in sizes:
        tokens = frames * (size // 8 // cfg.patch_size) ** 2
        result["products"] |= products(cfg, tokens, peer.TEXT_TOKENS, args.device, rounds)
        result["copy"][f"[{tokens} {4 * cfg.width}] bf16"] = copy(tokens * 4 * cfg.width, args.device, rounds)
    result["attention"] = attentions(cfg, frames * (sizes[0] // 8 // cfg.patch_size) ** 2, args.device, lengths, rounds)
    peer.write(args.out, {**peer.facts(), "preset": args.preset, "frames": frames, "sizes": sizes, **result})
    rows = [[f"{name} (TFLOP/s)", row.get("median", ""), row.get("best", row.get("failed", ""))]
            for name, row in result["products"].items()]
    rows += [[f"copy {name} (GB/s)", row["median"], row["best"]] for name, row in result["copy"].items()]
    for name, row in result["attention"].items():
        rows += [[f"{name}, {case} (TFLOP/s)", part["median"], part["best"]] for case, part in row.items() if case != "failed"] or [
            [name, "", row["failed"]]]
    print(peer.table(["", "median", "best"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

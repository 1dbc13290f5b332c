"""What a training step does and keeps, counted operation by operation: this model and diffusers' with the same weights.

    python benchmarks/counters.py [--frames 128] [--sides 16 32] [--levers memory.activations=0.5,memory.tile_tokens=4096 ...]

The counts are those of a CPU in float32 and do not depend on its speed or load. Of a forward and backward pass:

flops        matrix products, convolutions and attention, by torch's own formulas (torch.utils.flop_counter), with those of
             its fused attention and linear registered for the CPU's kernels too; what is computed again counts again
ops          calls of ATen operators that write memory: those that return a tensor in a storage which none of their arguments has,
             and those that write into an argument (in place or out=). Views, reads of a size or a number, and allocations that
             write nothing (aten.empty and its kin) are none
bytes        what those calls write: the size of every such tensor. Scratch memory inside a kernel is not seen
saved        storages made in the forward pass that still live when it has ended, but for its output's: what waits for the
             backward pass, however it is kept, and so without parameters and inputs. In units of (tokens of the clip) x (width)
             elements a block, the two ends of the model included

The passes without gradients and with them are counted apart. Also told: the largest relative differences of output and
gradients, each divided by the largest element of the tensor it belongs to.
"""

import argparse
import gc
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import peer
from latte import memory
from latte.config import MemoryConfig, ModelConfig
from latte.model import Latte

SHAPE = dict(layers=4, heads=4, head_dim=64)
LEVERS = ["memory.tile_tokens=4096", "memory.activations=0"]
# counter -> what of the reference's it should be at most; saved: elements (tokens x width) a block, not a ratio
GOALS = {"flops of a forward pass": 0.97, "ops of a forward pass": 0.5, "bytes of a forward pass": 0.5}
SAVED_GOAL, EXTRA_FLOPS_GOAL, EQUAL_GOAL = 12, 1.05, 1e-5

aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape),
}
if torch.backends.mkldnn.is_available():  # oneDNN's linear with what follows it
    FLOPS[torch.ops.mkldnn._linear_pointwise] = lambda x, *_, out_val, **__: 2 * x.numel() * out_val.shape[-1]


def _tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Count(TorchDispatchMode):
    """Counts what runs inside it. `place` says where in the model it runs, for the figures of each operator."""

    def __init__(self):
        super().__init__()
        self.flops, self.place = 0, "ends"
        self.ops: Counter = Counter()  # (place, operator) -> calls that write
        self.bytes: Counter = Counter()  # (place, operator) -> bytes written
        self.made: list[tuple[StorageWeakRef, int, tuple[str, str]]] = []  # a storage, its bytes, who made it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, packet, arguments = func(*args, **kwargs), func.overloadpacket, func._schema.arguments
        who = self.place, str(packet)
        if packet in FLOPS:
            self.flops += FLOPS[packet](*args, **kwargs, out_val=out)
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        new = [x for x in _tensors(out) if x.untyped_storage()._cdata not in given]
        values = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        changed = _tensors([values.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write])
        size = sum(x.numel() * x.element_size() for x in changed + (new if packet not in ALLOCATIONS else []))
        if size:
            self.ops[who] += 1
            self.bytes[who] += size
        self.made += [(StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes(), who) for x in new]
        return out

    def alive(self, *outputs: Tensor) -> Counter:
        """(place, operator) -> bytes of the storages made so far that still live, without those of `outputs`."""
        gc.collect()
        left, seen = Counter(), {x.untyped_storage()._cdata for x in outputs}
        for reference, size, who in self.made:
            if not reference.expired() and reference.cdata not in seen:
                seen.add(reference.cdata)
                left[who] += size
        return left


def blocks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The spatial and the temporal blocks of either model."""
    if isinstance(model, Latte):
        return {"spatial": model.spatial, "temporal": model.temporal}
    return {"spatial": model.transformer_blocks, "temporal": model.temporal_transformer_blocks}


def watch(model: nn.Module, count: Count) -> list:
    """Tells `count` when a block runs; returns handles to remove."""
    def enter(place):
        return lambda *_: setattr(count, "place", place)

    return [handle for kind, members in blocks(model).items() for block in members for handle in (
        block.register_forward_pre_hook(enter(kind)), block.register_forward_hook(enter("ends")))]


def by_operator(counts: Counter, layers: int, unit: int = 1) -> dict[str, dict[str, float]]:
    """Counts of one spatial block, one temporal block (the mean of `layers`) and the two ends, in `unit`s, largest first."""
    found: dict[str, dict[str, float]] = {}
    for (place, operator), value in counts.most_common():
        found.setdefault(place, {})[operator] = round(value / unit / (1 if place == "ends" else layers), 3)
    return found


def measure(model: nn.Module, cfg: ModelConfig, given: tuple[Tensor, Tensor, Tensor]) -> tuple[dict, Tensor, dict[str, Tensor]]:
    """The counters of one model, its output and its gradients."""
    x, t, text = given
    unit = x.shape[0] * x.shape[1] * x.shape[3] * x.shape[4] // cfg.patch_size**2 * cfg.width
    model.train()
    model.zero_grad(set_to_none=True)
    peer.call(model, x, t, text)  # the first pass is where levers choose what they keep
    with torch.no_grad(), Count() as forward:
        handles = watch(model, forward)
        peer.call(model, x, t, text)
    for handle in handles:
        handle.remove()
    with Count() as training:
        handles = watch(model, training)
        out = peer.call(model, x, t, text)
    for handle in handles:
        handle.remove()
    saved = training.alive(out)
    with Count() as backward:
        out.backward(out.detach())  # as of half the sum of squares, whose own operations would be counted
    element = x.element_size()
    return {
        "flops of a forward pass": forward.flops,
        "ops of a forward pass": sum(forward.ops.values()),
        "bytes of a forward pass": sum(forward.bytes.values()),
        "ops of a forward pass that keeps gradients": sum(training.ops.values()),
        "bytes of a forward pass that keeps gradients": sum(training.bytes.values()),
        "flops of a forward and backward pass": training.flops + backward.flops,
        "ops of a forward and backward pass": sum(training.ops.values()) + sum(backward.ops.values()),
        "bytes of a forward and backward pass": sum(training.bytes.values()) + sum(backward.bytes.values()),
        "saved, tokens x width a block": sum(saved.values()) / (2 * cfg.layers * unit * element),
        "detail": {
            "ops of a forward pass": by_operator(forward.ops, cfg.layers),
            "bytes of a forward pass, in tokens x width elements": by_operator(forward.bytes, cfg.layers, unit * element),
            "saved, tokens x width": by_operator(saved, cfg.layers, unit * element),
        },
    }, out.detach(), peer.gradients(model, cfg)


def differs(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors as a share of the largest element of the second."""
    return ((a - b).abs().max() / b.abs().max()).item()


def compare(cfg: ModelConfig, frames: int, side: int, levers: list[str]) -> dict:
    """Counters of the reference and of this model under each of `levers`, on one clip of latents [frames c side side]."""
    given = peer.inputs(cfg, frames, side)
    model = peer.ours(cfg)
    reference = peer.theirs(model, frames)
    del model
    found, expected = {}, None
    if reference is not None:
        counts, *expected = measure(reference, cfg, given)
        found["peer"] = counts
        del reference
    for name in levers:
        model = peer.ours(cfg)
        settings = peer.memory(name)
        if settings != MemoryConfig():
            memory.apply(model, settings)
        counts, out, grads = measure(model, cfg, given)
        expected = expected or (out, grads)  # without the reference, the first of ours
        counts["largest relative difference of the output"] = differs(out, expected[0])
        counts["largest relative difference of a gradient"] = max(differs(grads[key], expected[1][key]) for key in grads)
        found[name or "plain"] = counts
        del model, out, grads
        gc.collect()
    return found


def summary(found: dict, side: int, frames: int) -> str:
    """One markdown table: every counter of the reference and of each of ours with its ratio, and the goal."""
    rows, reference = [], found.get("peer")
    first = reference or found["plain"]
    for counter in [key for key in first if key != "detail"] + ["largest relative difference of the output",
                                                                "largest relative difference of a gradient"]:
        row = [counter]
        for name, counts in found.items():
            value = counts.get(counter)
            if value is None:
                row.append("")
            elif "difference" in counter:
                row.append(f"{value:.1e}")
            elif counter.startswith("saved"):
                row.append(f"{value:.2f}")
            else:
                against = f" ({value / first[counter]:.3f})" if name != "peer" else ""
                unit = "" if counter.startswith("ops") else " G"
                row.append((f"{value / 1e9:.4g}" if unit else str(value)) + unit + against)
        if counter in GOALS:
            row.append(f"<= {GOALS[counter]} x")
        elif counter.startswith("saved"):
            row.append(f"<= {SAVED_GOAL} at <= {EXTRA_FLOPS_GOAL} x the plain flops")
        else:
            row.append(f"<= {EQUAL_GOAL:.0e}" if "difference" in counter else "")
        rows.append(row)
    note = "" if reference else " (diffusers is not installed: ratios are against plain)"
    return f"{frames} frames, latents {side} x {side}{note}\n\n" + peer.table(["counter", *found, "goal"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32], help="of the latents")
    parser.add_argument("--levers", nargs="*", default=LEVERS, metavar="memory.x=y,memory.z=w",
                        help="each is one way of training beside the plain one")
    parser.add_argument("--out", default=str(peer.ROOT / "benchmarks" / "results" / "counters.json"))
    args = parser.parse_args()
    cfg, result = ModelConfig(**SHAPE), {**peer.facts(), "model": SHAPE, "text_tokens": peer.TEXT_TOKENS}
    for side in args.sides:
        found = compare(cfg, args.frames, side, ["", *args.levers])
        result[f"{args.frames} frames, latents {side}x{side}"] = found
        print(summary(found, side, args.frames) + "\n")
    peer.write(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Saving memory from outside a finished model: what its blocks keep for the backward pass, and how much they work on at a time.

Nothing here changes numbers: frames are independent of one another in spatial blocks, positions in temporal ones and tokens in
MLPs, and what is computed again is the same arithmetic.
"""

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from latte import lean
from latte.config import MemoryConfig
from latte.model import Block, Latte
from latte.ops import autocast_dtype

CPU_TILE = 4096  # tokens that sampling on a CPU works on at a time, whose tensors the cache and the allocator have at hand
OFFLOADED_FROM = 2**20  # bytes; smaller tensors stay on the device
ROOM = 4096  # parts that the room for kept activations is divided into, to choose what goes there
ATTENTION_COST = 3  # an operation of attention takes about as long as so many of a matrix product


def apply(model: Latte, cfg: MemoryConfig) -> "_HostStore | None":
    """Makes a model's blocks work as cfg.activations, offload, tile_tokens and mlp_chunks say. Compile the blocks before this.

    Of the some 23 * width values a token that a layer pair keeps for the backward pass, activations = 0 leaves 2 * width, for a
    quarter more arithmetic (Chen et al., arXiv 1604.06174; a block's last product need not be repeated, see latte.ops).
    Returns where offloaded tensors wait.
    """
    store = _HostStore() if cfg.offload else None
    for blocks, axis in ((model.spatial, 1), (model.temporal, 2)):
        keep = _Selective(cfg.activations)
        for block in blocks:
            if cfg.mlp_chunks > 1:
                block.mlp.forward = partial(_in_chunks, block.mlp.forward, cfg.mlp_chunks)
            if cfg.tile_tokens:
                block.forward = partial(_in_tiles, block, block.forward, axis, cfg.tile_tokens)
            elif cfg.activations < 1:
                block.forward = partial(_recomputed, block.forward, keep)
            if store:
                block.forward = partial(store.around, block.forward)
    return store


def _recomputed(forward: Callable[..., Tensor], keep: "_Selective | None", *args: Tensor, **kwargs: Tensor) -> Tensor:
    """forward(...) that keeps its inputs, and of what is in between only what `keep` says, for the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    device = args[0].device.type
    # Without autocast's cache, casts are computed again like the rest, and tiles' gradients add up in the weights' own precision.
    dtype = autocast_dtype(device)
    with torch.autocast(device, dtype, cache_enabled=False) if dtype else contextlib.nullcontext():
        context = {"context_fn": keep.contexts(forward, *args, **kwargs)} if keep is not None and keep.share > 0 else {}
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **context, **kwargs)


def _in_chunks(mlp: Callable[..., Tensor], chunks: int, x: Tensor, *mods: Tensor) -> Tensor:
    """mlp(x [b f n d], *mods [b 1|f 1 d]) on one share of the frames after the other."""
    parts = x.chunk(chunks, dim=1)
    sizes = [part.shape[1] for part in parts]
    rows = zip(*(mod.split(sizes, dim=1) if mod.shape[1] > 1 else [mod] * len(parts) for mod in mods), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([_recomputed(mlp, None, part, *row) for part, row in zip(parts, rows, strict=True)], dim=1)
    out = torch.empty_like(x)
    for part, row, into in zip(parts, rows, out.split(sizes, dim=1), strict=True):
        into.copy_(mlp(part, *row))
    return out


def _in_tiles(block: Block, forward: Callable[..., Tensor], axis: int, tokens: int, x: Tensor, mod: Tensor,
              text: Tensor | None = None, bias: Tensor | None = None, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The block's forward pass, clip by clip, on whole frames (axis 1) or positions (axis 2) of `tokens` tokens together.

    With gradients, each tile keeps its input alone. Arguments are those of Block.forward.
    """
    size = max(1, tokens // x.shape[3 - axis])
    if torch.is_grad_enabled():
        clips = [torch.cat([_recomputed(forward, None, x_tile, *given) for x_tile, *given in tiles], dim=axis)
                 for tiles in _tiles(x, mod, text, bias, turn, axis, size)]
        return torch.cat(clips) if len(clips) > 1 else clips[0]
    short = lean.fits(block, x, mod, text)
    if short and len(x) == 1 and size >= x.shape[axis]:
        return lean.Clip(block, mod, text, bias)(x[0], axis, turn)[None].contiguous()
    out = torch.empty_like(x)
    for clip, tiles in enumerate(_tiles(x, mod, text, bias, turn, axis, size)):
        prepared, start = None, 0
        for x_tile, mod_tile, *words, turns in tiles:
            into = out[clip:clip + 1].narrow(axis, start, x_tile.shape[axis])
            start += x_tile.shape[axis]
            if short:
                prepared = prepared or lean.Clip(block, mod_tile, *words)
                into[0].copy_(prepared(x_tile[0], axis, turns))
            else:
                into.copy_(forward(x_tile, mod_tile, *words, turns))
    return out


def _tiles(x: Tensor, mod: Tensor, text: Tensor | None, bias: Tensor | None, turn: tuple[Tensor, Tensor] | None, axis: int,
           size: int) -> Iterator[Iterator[tuple]]:
    """Of each clip, each tile's share of the arguments of Block.forward."""
    images = 0 if text is None else text.shape[1] - 1
    sizes = [size] * (x.shape[axis] - images >= size) * ((x.shape[axis] - images) // size)
    rest = x.shape[axis] - images - sum(sizes)
    sizes += [rest] * (rest > 0) + [1] * images
    for clip, x_clip in enumerate(x.split(1)):
        own = slice(clip, clip + 1)
        turns = None if turn is None else tuple(y if len(y) == 1 else y[own] for y in turn)

        def tiles(own=own, x_clip=x_clip, turns=turns):
            start = 0
            for number, x_tile in enumerate(x_clip.split(sizes, dim=axis)):
                here = slice(start, start + x_tile.shape[axis])
                start = here.stop
                row = max(0, number - (len(sizes) - images) + 1)
                rows = slice(row, row + 1)
                mod_tile = mod[own] if mod.shape[1] == 1 or axis == 2 else mod[own, here]
                words = None if text is None else text[own, rows], None if bias is None else bias[own, rows]
                yield x_tile.contiguous(), mod_tile, *words, turns

        yield tiles()


class _Selective:
    """Which results of matrix products and attention a block keeps, beside its input: those that cost most to compute again for
    the room that they take, up to a share of the room of all. Everything else is computed again.

    As selective activation checkpointing in Korthikanti et al., arXiv 2205.05198, with the choice by operation.
    """

    def __init__(self, share: float):
        self.share = share
        self.chosen: dict[tuple, frozenset[int]] = {}  # numbers of the kept products, by the shapes of the inputs

    def contexts(self, forward: Callable[..., Tensor], *args: Tensor, **kwargs: Tensor) -> Callable:
        tensors = [y for y in tree_leaves((args, kwargs)) if isinstance(y, Tensor)]
        key = (tuple(y.shape for y in tensors), tensors[0].dtype, autocast_dtype(tensors[0].device.type))
        if key not in self.chosen:
            found = _Products()
            with found, torch.autograd.graph.saved_tensors_hooks(found.keep, lambda y: y):
                forward(*args, **kwargs)
            self.chosen[key] = _dearest(tuple(found.costs[:found.needed]), self.share)
        kept = self.chosen[key]

        def contexts():
            seen = {False: 0, True: 0}

            def policy(ctx, op, *_args, **_kwargs):
                if not _is_product(op):
                    return CheckpointPolicy.PREFER_RECOMPUTE
                number = seen[ctx.is_recompute]
                seen[ctx.is_recompute] += 1
                return CheckpointPolicy.MUST_SAVE if number in kept else CheckpointPolicy.PREFER_RECOMPUTE

            return create_selective_checkpoint_contexts(policy)

        return contexts


def _is_product(op) -> bool:
    return op.overloadpacket in flop_registry or op is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class _Products(TorchDispatchMode):
    """Notes of each matrix product and attention its operations and the bytes of its result, and how many there are before the last
    value that the backward pass needs: what comes after it is not computed again."""

    def __init__(self):
        super().__init__()
        self.costs: list[tuple[int, int]] = []
        self.needed = 0

    def keep(self, x: Tensor) -> Tensor:
        self.needed = len(self.costs)
        return x

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if _is_product(op):
            size = sum(y.numel() * y.itemsize for y in tree_leaves(result) if isinstance(y, Tensor))
            if "scaled_dot_product" in op.name():
                q, k = args[:2]
                cost = ATTENTION_COST * 4 * q.numel() * k.shape[-2]
            else:
                cost = flop_registry[op.overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.costs.append((cost, size))
        return result


@functools.lru_cache(maxsize=256)
def _dearest(costs: tuple[tuple[int, int], ...], share: float) -> frozenset[int]:
    """Of products with (operations, bytes), the numbers of those that together save most operations in a share of all the room,
    told in parts of the room (the knapsack problem, by dynamic programming)."""
    room, unit = int(share * ROOM), sum(size for _, size in costs) / ROOM
    best: list[tuple[int, frozenset[int]]] = [(0, frozenset())] * (room + 1)  # operations saved in so much room, and by what
    for number, (cost, size) in enumerate(costs):
        parts = math.ceil(size / unit)
        for there in range(room, parts - 1, -1):
            saved, kept = best[there - parts]
            if saved + cost > best[there][0]:
                best[there] = saved + cost, kept | {number}
    return best[room][1]


class _HostStore:
    """What blocks keep for the backward pass waits in host memory; copies run beside the computation, on a stream of their own.

    On the way back, the tensor needed next is fetched while the one at hand is used (as in Rhu et al., arXiv 1602.08124).
    """

    def __init__(self):
        self.stream: torch.cuda.Stream | None = None
        self.last: weakref.ref | None = None  # of what was sent; each knows the one before, so that the graph alone keeps them

    def __deepcopy__(self, memo):
        return self

    def around(self, forward: Callable[..., Tensor], *args: Tensor, **kwargs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))  # as they will come back
        with torch.autograd.graph.saved_tensors_hooks(self._send, self._fetch):
            return forward(*args, **kwargs)

    def _send(self, x: Tensor) -> "Tensor | _Away":
        if x.nbytes < OFFLOADED_FROM or isinstance(x, torch.nn.Parameter) or _of_one_leaf(x):
            return x
        away = _Away(x, self.last, self._side(x))
        self.last = weakref.ref(away)
        return away

    def _fetch(self, away: "Tensor | _Away") -> Tensor:
        if isinstance(away, Tensor):
            return away
        x, before = away.back(), away.before and away.before()
        if before is not None:
            before.start()
        return x

    def _side(self, x: Tensor) -> "torch.cuda.Stream | None":
        if x.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(x.device)
        return self.stream


def _of_one_leaf(x: Tensor) -> bool:
    """Whether x is a cast or a view of one weight, which is on the device anyway or soon made again."""
    node = x.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return node is not None and not node.next_functions


class _Away:
    """One tensor in host memory. `before`: the one sent before it, which the backward pass needs after it."""

    def __init__(self, x: Tensor, before: "weakref.ref | None", stream: "torch.cuda.Stream | None"):
        self.device, self.before, self.stream, self.x = x.device, before, stream, None
        self.host = torch.empty_like(x, device="cpu", pin_memory=stream is not None)  # in x's layout: compiled code counts on it
        if stream is None:
            self.host.copy_(x)
            return
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not reused before the copy is done

    def start(self) -> None:
        """Begins to bring it back."""
        if self.x is None:
            if self.stream is None:
                self.x = self.host.to(self.device, copy=True)
                return
            with torch.cuda.stream(self.stream):
                self.x = self.host.to(self.device, non_blocking=True)

    def back(self) -> Tensor:
        self.start()
        if self.stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.stream)
            self.x.record_stream(now)
        x, self.x = self.x, None
        return x

"""How a finished model runs: compiled, and on several processes, with gradients whose bits do not depend on how many they are."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as compiler

from latte.config import MemoryConfig
from latte.model import Block, Latte

GRAPHS = 1024  # of the blocks; past so many, torch would go on uncompiled without a word
TEXT_STEP = 16  # text tokens; GPU kernels want the rows of a bias to start on such a multiple


def compile_blocks(model: Latte, levers: MemoryConfig) -> MemoryConfig:
    """Compiles the blocks for training: one graph for all spatial layers and one for all temporal ones, of each clip shape.

    The shape of the video is fixed in a graph, the number of text tokens is not: captions are padded, masked, to the next
    multiple of TEXT_STEP, and the graphs take any such number. Once a bucket was seen, it compiles nothing again. Image frames
    make a third graph, as the first temporal block then gets another layout than the others. Without gradients the blocks run
    uncompiled.

    The share levers.activations of what they would keep for the backward pass becomes the budget of the compiler's own choice
    between keeping and computing again (torch's memory budget: a knapsack over the graph). Returns the levers without it, for
    latte.memory.apply, which comes after this.
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = 2 * GRAPHS
    compiler.activation_memory_budget = 1.0 if levers.tile_tokens else levers.activations  # tiles keep their input
    compiled = torch.compile(Block.forward, dynamic=False)  # of the class: layers differ in their weights only, which are inputs
    for block in [*model.spatial, *model.temporal]:
        block.forward = partial(_compiled, compiled, block)
    model.register_forward_pre_hook(_pad_text, with_kwargs=True)
    return replace(levers, activations=1.0)


def _compiled(compiled: Callable[..., Tensor], block: Block, x: Tensor, mod: Tensor, text: Tensor | None = None,
              bias: Tensor | None = None, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
    if not torch.is_grad_enabled():
        return Block.forward(block, x, mod, text, bias, turn)
    for words in (text, bias):
        if words is not None:
            torch._dynamo.mark_dynamic(words, 2)
    return compiled(block, x, mod, text, bias, turn)


def _pad_text(_model: Latte, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Latte.forward's arguments with text and text_mask on a multiple of TEXT_STEP tokens."""
    text, mask = kwargs.get("text"), kwargs.get("text_mask")
    if text is None or not torch.is_grad_enabled():
        return args, kwargs
    if mask is None:
        mask = torch.ones(text.shape[:-1], dtype=torch.bool, device=text.device)
    more = -text.shape[-2] % TEXT_STEP
    return args, {**kwargs, "text": F.pad(text, (0, 0, 0, more)), "text_mask": F.pad(mask, (0, more))}


def make_deterministic(device: torch.device) -> None:
    """The same kernels and order of sums in every process: on a CPU one thread each, on a GPU no autotuned or racing kernels.

    On a GPU, cuBLAS wants CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment besides, and says so.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes all memory once more
    torch.backends.cudnn.benchmark = False
    if device.type == "cpu":
        torch.set_num_threads(1)


class FixedOrder:
    """The gradient of a batch as a sum over its units in one fixed order, whatever the number of processes.

    A unit is a few clips whose gradient is computed together. The units of the global batch are the leaves of a binary tree that
    halves it again and again. Each of 1, 2, 4, ... processes holds a whole subtree, whose sum has the same bits anywhere; then
    processes add theirs pairwise up the tree, both sides of a pair computing the same sum. Beside DDP's all-reduce this sends
    log2(ranks) instead of 2 (ranks - 1) / ranks gradients, and keeps log2(units) of them.
    Raises ValueError when `ranks` is no power of two.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rank: int, ranks: int):
        if ranks & (ranks - 1):
            raise ValueError(f"train.deterministic: needs 1, 2, 4, 8, ... processes, got {ranks}")
        self.parameters, self.rank, self.ranks = [p for p in parameters if p.requires_grad], rank, ranks

    def backward(self, units: Sequence, run: Callable[[object], Tensor]) -> Tensor:
        """Calls run(unit), which computes gradients and returns the unit's loss, for each of this process's units. Leaves the sum
        over all units of all processes in the parameters' .grad and returns the summed loss."""
        total = self._subtree(units, run)
        level = 1
        while level < self.ranks:
            _add(total, _exchange(total, self.rank ^ level))
            level *= 2
        *grads, loss = total
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        return loss

    def _subtree(self, units: Sequence, run: Callable[[object], Tensor]) -> list[Tensor]:
        if len(units) == 1:
            for parameter in self.parameters:
                parameter.grad = None
            loss = run(units[0])
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters] + [loss.detach().float()]
        total = self._subtree(units[:len(units) // 2], run)
        _add(total, self._subtree(units[len(units) // 2:], run))
        return total


def _add(total: list[Tensor], other: list[Tensor]) -> None:
    torch._foreach_add_(total, other)


def _exchange(mine: list[Tensor], peer: int) -> list[Tensor]:
    """What `peer` holds in tensors of these shapes, which gets these in turn."""
    flat = torch.cat([value.reshape(-1).float() for value in mine])
    theirs = torch.empty_like(flat)
    for request in dist.batch_isend_irecv([dist.P2POp(dist.isend, flat, peer), dist.P2POp(dist.irecv, theirs, peer)]):
        request.wait()
    parts = theirs.split([value.numel() for value in mine])
    return [part.view_as(value) for part, value in zip(parts, mine, strict=True)]


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each of them."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gathered(values: list) -> list:
    """The lists of all processes, one after the other, on each of them."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return values
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]

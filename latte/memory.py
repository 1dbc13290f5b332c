"""Saving memory from outside a finished model, without changing its numbers, and telling what memory something will take."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from latte.config import ModelConfig
from latte.model import Latte


def checkpoint_blocks(model: Latte) -> None:
    """Keeps only the input of each block for the backward pass and computes the block again there (Chen et al., arXiv 1604.06174).

    Of a layer pair, 2 * width values a token stay instead of about 43 * width, for a third more arithmetic.
    """
    for block in [*model.spatial, *model.temporal]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def kept_for_backward(cfg: ModelConfig, tokens: int, checkpointed: bool, autocast: bool) -> int:
    """Bytes of a clip's activations that the backward pass needs, estimated: no text, no embeddings.

    A layer pair keeps 23 * width values a token in its spatial block and 20 * width in the temporal one; checkpointed, its two
    inputs, and one spatial block at a time is computed again. Under autocast about 30 % more, because norms and residuals stay
    float32; the inputs are float32 altogether.
    """
    wide = 2 if autocast else 4
    if checkpointed:
        return tokens * cfg.width * (2 * 4 * cfg.layers + 23 * wide)
    return round(tokens * cfg.width * 43 * wide * cfg.layers * (1.3 if autocast else 1.0))


def peak(make: Callable[[], tuple[Callable[[], object], Iterable]], dtype: torch.dtype) -> int:
    """Most bytes alive while a function runs without gradients. Nothing is computed and no memory taken: tensors are fake.

    make() returns the function and the modules and tensors that are there before it runs; what it makes is of `dtype` where
    nothing else is asked for. Attention counts as a CPU runs it; fused kernels of a GPU need no more.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            run, held = make()
            tracker = MemTracker()
            tracker.track_external(*held)
            with tracker:
                run()
            return max(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    finally:
        torch.set_default_dtype(before)

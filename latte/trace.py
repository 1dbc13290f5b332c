"""How much memory something would take, told by running it on tensors without values: nothing is computed, no memory taken."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from latte.config import MemoryConfig, ModelConfig
from latte.memory import apply
from latte.model import Latte


def training_peak(cfg: ModelConfig, frames: int, height: int, width: int, clips: int, text_tokens: int, autocast: bool,
                  checkpointed: bool, trained: int) -> int:
    """Most bytes that a training step on `clips` latents [f c h w] takes at once: weights, gradients, activations, and of `trained`
    parameters the two moments and the average. Nothing is computed and no memory taken.

    Traced on fake tensors with one and with two layer pairs, between which memory grows by the same amount for each further pair.
    On a CPU it is the profiler's count to the byte without block checkpointing, and up to an eighth above it with.
    """
    def traced(layers: int) -> int:
        def make():
            model = Latte(replace(cfg, layers=layers))
            if checkpointed:
                apply(model, MemoryConfig(activations=0))
            x, t = torch.zeros(clips, frames, cfg.in_channels, height, width), torch.zeros(clips)
            given = {"text": torch.zeros(clips, text_tokens, cfg.text_channels)} if cfg.conditioning == "text" else {}

            def run():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    y = model(x, t, **given)
                y.float().square().mean().backward()

            return run, (model, x, t, *given.values())

        return peak(make, torch.float32, backward=True)

    one, two = traced(1), traced(2)
    return one + (cfg.layers - 1) * (two - one) + 12 * trained


def peak(make: Callable[[], tuple[Callable[[], object], Iterable]], dtype: torch.dtype, backward: bool = False) -> int:
    """Most bytes alive while a function runs, without gradients unless `backward`. Nothing is computed and no memory taken: tensors
    are fake.

    make() returns the function and the modules and tensors that are there before it runs; what it makes is of `dtype` where
    nothing else is asked for. Attention counts as a CPU runs it; fused kernels of a GPU need no more.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(backward):
            run, held = make()
            tracker = MemTracker()
            tracker.track_external(*held)
            with tracker:
                run()
            return max(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    finally:
        torch.set_default_dtype(before)

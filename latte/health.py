"""What tells whether a run is well: norms of the gradient by kind of layer, the size of the updates beside that of the weights, the
loss by timestep and by clip length, speed, waiting and memory. Everything stays on the device until a line of metrics is
written."""

import re
import resource
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from latte import parallel

TIME_BINS = 10


def group_of(name: str) -> str:
    """The kind of layer that a parameter belongs to: spatial.3.attn.qkv.weight -> spatial.attn, out.bias -> out."""
    return re.sub(r"^(\w+)\.\d+\.(\w+).*", r"\1.\2", name) if re.match(r"\w+\.\d+\.", name) else name.partition(".")[0]


def by_group(names: Iterable[str], norms: Tensor) -> dict[str, float]:
    """Norms of each kind of layer from norms [k] of the parameters with these names."""
    sums: dict[str, float] = defaultdict(float)
    for name, square in zip(names, norms.double().square().tolist(), strict=True):
        sums[group_of(name)] += square
    return {group: value**0.5 for group, value in sums.items()}


def ratios(names: Iterable[str], change: Tensor, size: Tensor) -> dict[str, float]:
    """Norm of the change over norm of the weights, for each kind of layer, from both norms [k] of the parameters `names`."""
    moved, size = by_group(names, change), by_group(names, size)
    return {group: moved[group] / max(size[group], 1e-12) for group in moved}


class Step:
    """How far one update moves the weights: made before the optimizer's step, asked after it. Holds a copy of the weights
    meanwhile."""

    @torch.no_grad()
    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters
        self.before = [p.detach().clone() for p in parameters.values()]

    @torch.no_grad()
    def ratios(self) -> dict[str, float]:
        """Norm of the change over norm of the weights, for each kind of layer."""
        now = [p.detach() for p in self.parameters.values()]
        change = torch.stack([torch._foreach_norm([new - old], dtype=torch.float32)[0]  # one by one: all would be another copy
                              for new, old in zip(now, self.before, strict=True)])
        return ratios(self.parameters, change, torch.stack(torch._foreach_norm(now, dtype=torch.float32)))


class Window:
    """Sums over the updates since the last line of metrics."""

    def __init__(self, device: torch.device, peak_flops: float):
        """peak_flops: operations a second of one device at its best, see latte.hardware.peak_flops."""
        self.device, self.peak_flops, self.waited_for_checkpoints = device, peak_flops, 0.0
        self.restart()

    def restart(self) -> None:
        """Forgets the updates so far."""
        self.loss = torch.zeros(2, device=self.device)  # sum, updates
        self.bins = torch.zeros(2, TIME_BINS, device=self.device)  # sum, samples
        self.lengths: dict[int, Tensor] = {}  # clip length -> sum, samples
        self.updates = self.frames = self.tokens = 0
        self.flops = self.wait = 0.0
        self.started = time.perf_counter()

    def timed(self, loader: Iterable) -> Iterator:
        """The loader's batches; how long they take to come is counted."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.wait += time.perf_counter() - asked
            yield batch

    def count(self, loss: Tensor, done: Tensor, losses: Tensor, times: Tensor, length: int, clips: int, tokens: int, work: float
              ) -> None:
        """Takes in an update: the batch's loss and whether it was done (scalars), this process's losses [b] and times [b] in [0,
        1], and of the whole batch its clips, their length in frames, tokens and operations."""
        self.loss += torch.stack([torch.where(done, loss, 0), done.float()])
        kept = torch.stack([losses.float(), torch.ones_like(losses, dtype=torch.float32)])  # [2 b]
        kept = torch.where(done, kept, 0)
        place = (times.float() * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        self.bins += kept @ (place[:, None] == torch.arange(TIME_BINS, device=self.device)).float()
        self.lengths[length] = self.lengths.get(length, 0) + kept.sum(1)
        self.updates, self.frames = self.updates + 1, self.frames + clips * length
        self.tokens, self.flops = self.tokens + tokens, self.flops + work

    def close(self, ranks: int, waited_for_checkpoints: float) -> dict[str, float]:
        """The means and speeds of the window; all processes must call it at the same update.

        waited_for_checkpoints: seconds since the start of the run.
        """
        seconds = time.perf_counter() - self.started
        loss, done = self.loss.tolist()
        bins = parallel.total(self.bins).tolist()
        values = {"loss": loss / max(done, 1), "skipped": self.updates - done, "seconds": seconds / max(self.updates, 1),
                  "frames_per_s": self.frames / seconds, "tokens_per_s": self.tokens / seconds,
                  "mfu": self.flops / seconds / ranks / self.peak_flops, "loader_wait": self.wait / seconds,
                  "checkpoint_wait": (waited_for_checkpoints - self.waited_for_checkpoints) / seconds, "memory_gib": self._memory()}
        self.waited_for_checkpoints = waited_for_checkpoints
        for place, (total, samples) in enumerate(zip(*bins, strict=True)):
            if samples:
                values[f"loss_at_time/{place / TIME_BINS:.1f}"] = total / samples
        for length in sorted(self.lengths):
            total, samples = parallel.total(self.lengths[length]).tolist()
            if samples:
                values[f"loss_of_frames/{length}"] = total / samples
        self.restart()
        return values

    def _memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""AdamW with parameter groups, states and weights in fewer bits, updates inside the backward pass, the learning rate as a function
of the step, and the moving average of the weights.

What is stored in fewer bits than it is computed with is rounded stochastically: up or down at random, so that the mean is the value
itself (Gupta et al., arXiv 1502.02551). Rounding to nearest would lose each change that is smaller than half a step, which most
updates of a bf16 weight and of an average of squares are. The random bits are a function of (seed, update, parameter) alone.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from latte import keyed
from latte.config import MemoryConfig, OptimConfig

SMALL = 4096  # elements; the moments of a smaller tensor stay float32, as they weigh nothing
BLOCK = 256  # elements that share a scale
PART = 2**22  # elements that are updated together, which bounds the float32 copies of what is stored in fewer bits
MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, cfg: OptimConfig, memory: MemoryConfig | None = None, seed: int = 0) -> "AdamW":
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); only matrices decay, biases and tables do not.

    memory.weights=bf16 makes the model's trained parameters bf16 here, so that everything else must come after it.
    """
    memory = memory or MemoryConfig()
    trained = [p for p in model.parameters() if p.requires_grad]
    if memory.weights == "bf16":
        for p in trained:
            p.data = p.data.bfloat16()
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], cfg, memory.optimizer_states, seed)


def rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bf16, stochastically: a number between two neighbours becomes the upper one as often as it is near to it."""
    noise = torch.empty_like(x, dtype=torch.int32).random_(0, 2**16, generator=generator)
    noise += x.view(torch.int32)  # below bf16's last bit; carries into it with the right probability
    noise &= -2**16
    return noise.view(torch.float32).to(torch.bfloat16)


class EightBits:
    """Dynamic codes of 8 bits, blocks of which share a scale (Dettmers et al., arXiv 2110.02861, section 2).

    From 1 downwards each power of ten has half as many codes as the one above, so that large numbers are precise and small ones
    are there. Signed ones have 127 from 3e-6 to 1, as many negative ones, and 0. Unsigned ones have 255 from 3e-7 to 1, to which
    smaller numbers are raised, for what is divided by. Different from the paper, -1 is there as well as 1, and rounding is
    stochastic.
    """

    def __init__(self, signed: bool, device: torch.device):
        self.signed, levels = signed, 6 if signed else 7
        edges = [10.0**-level * torch.linspace(0.1, 1, 2 ** (levels - level) + 1, dtype=torch.float64) for level in range(levels)]
        middles = torch.cat([(edge[1:] + edge[:-1]) / 2 for edge in edges])
        self.table = torch.cat([middles, torch.tensor([0.0, 1.0] if signed else [1.0])]).float().sort().values.to(device)
        self.values = torch.cat([-self.table.flip(0)[:-1], self.table]) if signed else self.table  # of all codes
        self.gaps = self.table.diff()
        # The code at or below each bf16 number from 0 to 1, by its bits: no two codes are nearer than two such numbers.
        grid = torch.arange(2**7 * 127 + 1, dtype=torch.int16, device=device).view(torch.bfloat16).float()
        self.places = torch.bucketize(grid, self.table, out_int32=True, right=True).sub_(1).clamp_(0, len(self.gaps) - 1)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Codes, uint8 of any shape, and scales [blocks] to float32."""
        values = _blocks(self.values.index_select(0, codes.flatten().int())).mul_(scales[:, None])
        return values.flatten()[:codes.numel()].view_as(codes)

    def encode(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """float32 of any shape, finite, and if unsigned not below 0, to codes and scales."""
        blocks = _blocks(x.abs().flatten())
        scales = blocks.amax(1)
        y = blocks.div_(scales.clamp(min=1e-30)[:, None]).flatten()[:x.numel()]
        code = self.places.index_select(0, y.view(torch.int32) >> 16)
        code += y >= self.table.index_select(0, code + 1)  # its bf16 number may lie below a code, and y above
        code.clamp_(max=len(self.gaps) - 1)
        y -= self.table.index_select(0, code)
        code += y > self.gaps.index_select(0, code).mul_(torch.rand(y.shape, generator=generator, device=y.device))
        if self.signed:
            code = torch.where(x.flatten() < 0, -code, code).add_(len(self.gaps))
        return code.to(torch.uint8).view_as(x), scales


def _blocks(x: Tensor) -> Tensor:
    """[n] -> [blocks BLOCK], the last one filled up with zeros."""
    return (F.pad(x, (0, -len(x) % BLOCK)) if len(x) % BLOCK else x).view(-1, BLOCK)


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose moments may be stored in bf16 or 8 bits and whose weights may be bf16; it computes in float32.

    With states = fp32 and float32 weights it is the fused kernel and nothing else. As that does, it changes nothing, moments and
    count of steps included, where `found_inf`, a scalar on the device, is not 0. Of sharded parameters each process has the
    moments of its shard, as plain tensors; bf16 ones have to be bf16 before they are sharded.
    """

    def __init__(self, groups: list[dict], cfg: OptimConfig, states: str, seed: int):
        super().__init__(groups, lr=cfg.learning_rate, betas=tuple(cfg.betas), eps=cfg.eps, fused=True)
        self.states, self.seed = states, seed
        self.eight_bits: dict[tuple[str, torch.device], EightBits] = {}
        self.number = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        self.begin(0, cfg.learning_rate)

    def begin(self, update: int, rate: float) -> None:
        """Sets the learning rate of an update and the random bits that it rounds with."""
        self.bits = int(keyed.rng(self.seed, "rounding", update).integers(2**62))
        for group in self.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for part in _parts([p for p in group["params"] if p.grad is not None], self.states):
                self.update(part, group, getattr(self, "found_inf", None))

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], group: dict, found_inf: Tensor | None) -> None:
        """Updates some parameters of a group."""
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(self._fresh(p))
        states = [self.state[p] for p in parameters]
        weights = [_local(p).float() for p in parameters]  # p itself where it is float32
        moments = {slot: [self._unpacked(state, slot) for state in states] for slot in MOMENTS}
        beta1, beta2 = group["betas"]
        gradients, steps = [_local(p.grad).float() for p in parameters], [state["step"] for state in states]
        adamw(weights, gradients, *moments.values(), [], steps, fused=True, found_inf=found_inf, amsgrad=False, maximize=False,
              beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"])
        del gradients
        for i, (p, state) in enumerate(zip(parameters, states, strict=True)):
            for number, slot in enumerate(MOMENTS):
                value = moments[slot].pop(0)
                if value is not state[slot]:
                    self._pack(state, slot, value, self._generator(p, number), found_inf)
            if p.dtype != torch.float32:
                _local(p).copy_(rounded(weights[i], self._generator(p, len(MOMENTS))))
            weights[i] = None

    @torch.no_grad()
    def restore(self, p: Tensor, stored: dict[str, Tensor]) -> None:
        """Takes the state of a parameter out of a checkpoint, converting moments that were stored in another number of bits."""
        state, stored = self._fresh(p), {key: value.to(p.device) for key, value in stored.items()}
        state["step"] = stored["step"]
        for number, slot in enumerate(MOMENTS):
            if stored[slot].dtype == state[slot].dtype:
                state.update({key: stored[key] for key in (slot, f"{slot}_scale") if key in stored})
            elif state[slot].dtype == torch.float32:
                state[slot] = self._unpacked(stored, slot)
            else:
                self._pack(state, slot, self._unpacked(stored, slot), self._generator(p, number))
        self.state[p] = state

    def _unpacked(self, state: dict[str, Tensor], slot: str) -> Tensor:
        """A moment as float32; the tensor itself where it is stored so."""
        if state[slot].dtype != torch.uint8:
            return state[slot].float()
        value = self._codes(slot, state[slot].device).decode(state[slot], state[f"{slot}_scale"])
        return value if slot == "exp_avg" else value.square_()

    def _pack(self, state: dict[str, Tensor], slot: str, value: Tensor, generator: torch.Generator, found_inf: Tensor | None = None
              ) -> None:
        """Stores a moment, or, where found_inf is not 0, leaves it to the bit.

        Of the second moment 8 bits hold the root, whose range is half as wide and which the update divides by.
        """
        if state[slot].dtype == torch.bfloat16:
            state[slot].copy_(rounded(value, generator))  # a bf16 number that did not change is not rounded
            return
        value = value if slot == "exp_avg" else value.sqrt_()
        for key, new in zip((slot, f"{slot}_scale"), self._codes(slot, value.device).encode(value, generator), strict=True):
            state[key].copy_(new if found_inf is None else torch.where(found_inf != 0, state[key], new))

    def _codes(self, slot: str, device: torch.device) -> EightBits:
        if (slot, device) not in self.eight_bits:
            self.eight_bits[slot, device] = EightBits(slot == "exp_avg", device)
        return self.eight_bits[slot, device]

    def _fresh(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first update."""
        state = {"step": torch.zeros((), device=p.device)}
        for slot in MOMENTS:
            own = _local(p)
            state[slot] = torch.zeros_like(own, dtype=_stored(own, self.states), memory_format=torch.contiguous_format)
            if state[slot].dtype == torch.uint8:
                state[f"{slot}_scale"] = torch.zeros(-(-own.numel() // BLOCK), device=p.device)
        return state

    def _generator(self, p: Tensor, number: int) -> torch.Generator:
        """Seeded anew for each tensor of each update: it has no state that a checkpoint would have to hold."""
        return torch.Generator(p.device).manual_seed(self.bits + (len(MOMENTS) + 1) * self.number[p] + number)


class InBackward:
    """Updates each weight in the backward pass as soon as its gradient is complete, which then goes (Lv et al., arXiv 2306.09782).

    There is never more than a layer's gradient, and no norm of the whole one before the first weight has moved: a gradient that is
    not finite leaves its own weight alone, not the others.
    `norms` and `moved` hold what an update's backward pass met, by name: the norm of the gradient and, where asked for, those of
    the change and of the weights after it.
    """

    def __init__(self, model: nn.Module, optimizer: AdamW):
        self.optimizer = optimizer
        self.groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self.norms: dict[str, Tensor] = {}
        self.moved: dict[str, Tensor] = {}  # [2] each
        self.hooks = [p.register_post_accumulate_grad_hook(functools.partial(self._update, name))
                      for name, p in model.named_parameters() if p.requires_grad]

    def begin(self, loss: Tensor, measure: bool) -> None:
        """Before an update's only backward pass: of a loss that is not finite it moves nothing."""
        self.finite, self.measure = loss.detach().isfinite(), measure
        self.norms, self.moved = {}, {}

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def _update(self, name: str, p: Tensor) -> None:
        assert name not in self.norms, f"{name}: its gradient came in parts, and the first has moved it already"
        norm, = torch._foreach_norm([p.grad], dtype=torch.float32)
        self.norms[name] = norm
        before = p.detach().clone() if self.measure else None
        self.optimizer.update([p], self.groups[p], (~(self.finite & norm.isfinite())).float())
        p.grad = None
        if before is not None:
            self.moved[name] = torch.stack(torch._foreach_norm([p.detach() - before, p.detach()], dtype=torch.float32))


def _local(p: Tensor) -> Tensor:
    """What this process holds of a parameter or its gradient: its shard, in the same memory, or the tensor itself."""
    p = p.detach()
    return p.to_local() if isinstance(p, DTensor) else p


def _stored(p: Tensor, states: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}[states] if p.numel() >= SMALL else torch.float32


def _parts(parameters: Sequence[Tensor], states: str) -> Iterator[list[Tensor]]:
    """Neighbours of at most PART elements together, or a larger one alone; those that are updated where they are do not count."""
    part: list[Tensor] = []
    size = 0
    for p in parameters:
        more = p.numel() if p.dtype != torch.float32 or _stored(p, states) != torch.float32 else 0
        if part and size + more > PART:
            yield part
            part, size = [], 0
        part.append(p)
        size += more
    if part:
        yield part


def state_bytes(parameters: Iterable[Tensor], cfg: MemoryConfig) -> dict[str, int]:
    """Bytes that training holds for these trained parameters, beside activations; only their shapes are read.

    weights; gradients, all of them, or the largest one with cfg.optimizer_in_backward; moments, with the count of steps; and the
    average, on the device or, with cfg.ema=host, on the host. Weights, moments and average make a checkpoint.
    """
    parameters = list(parameters)
    sizes, width = [p.numel() for p in parameters], 2 if cfg.weights == "bf16" else 4
    stored = [_stored(p, cfg.optimizer_states) for p in parameters]
    blocks = sum(-(-n // BLOCK) for n, dtype in zip(sizes, stored, strict=True) if dtype == torch.uint8)
    moments = 4 * len(sizes) + 2 * (sum(n * dtype.itemsize for n, dtype in zip(sizes, stored, strict=True)) + 4 * blocks)
    return {"weights": width * sum(sizes), "moments": moments,
            "gradients": width * (max(sizes, default=0) if cfg.optimizer_in_backward else sum(sizes)),
            "average on device": 4 * sum(sizes) * (cfg.ema == "device"), "average on host": 4 * sum(sizes) * (cfg.ema == "host")}


def lr_at(step: int, cfg: OptimConfig, total_steps: int, rate: float = 0.0) -> float:
    """Learning rate of update `step` (from 0), `rate` or else cfg.learning_rate at its height: linear warm-up, then constant,
    linear to 0, half a cosine to 0, or constant with a linear end (warm-up, stable, decay: Hu et al., arXiv 2404.06395)."""
    rate = rate or cfg.learning_rate
    if step < cfg.warmup_steps:
        return rate * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)),
             "wsd": min(1.0, (1 - step / total_steps) / cfg.decay_share)}
    return rate * max(shape[cfg.schedule], 0.0)


class EMA:
    """Exponential moving average of a model's trained parameters in float32, `weights` by name.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that early averages forget the random start.
    place = "host" keeps it in host memory. The device then fetches, updates and returns it a few tensors at a time, on a stream of
    its own beside the training: the same numbers, and nothing waits. 8 bytes a parameter cross the bus at each update.
    """

    def __init__(self, model: nn.Module, decay: float, place: str = "device"):
        self.decay = decay
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self._weights = {name: p.to(torch.device("cpu") if place == "host" else p.device, torch.float32, copy=True)
                         for name, p in trained.items()}
        devices = [p.device for p in trained.values() if p.is_cuda]
        self._stream = None
        if place == "host" and devices:
            self._weights = {name: value.pin_memory() for name, value in self._weights.items()}
            self._stream = torch.cuda.Stream(devices[0])

    @property
    def weights(self) -> dict[str, Tensor]:
        """The average after all updates asked for so far."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._weights

    def wait(self) -> None:
        """Before the weights change again: lets the device finish what the average still reads of them. The host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, done: Tensor) -> None:
        """Takes in the parameters after update `step` (from 0) where `done`, a scalar there, is 1, and nothing where it is 0."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            done.record_stream(self._stream)
        with torch.cuda.stream(self._stream):  # None: where it is
            weight = (1 - min(self.decay, (1 + step) / (10 + step))) * done
            parameters, averages = [p.detach() for p in model.parameters() if p.requires_grad], list(self._weights.values())
            for i in range(0, len(averages), 8):  # a few at a time, or the changes would be as large as the model
                now, kept = parameters[i:i + 8], averages[i:i + 8]
                here = [value.to(p.device, non_blocking=True) for value, p in zip(kept, now, strict=True)]
                change = torch._foreach_sub([p.float() for p in now], here)
                torch._foreach_mul_(change, weight)
                torch._foreach_add_(here, change)
                for value, new in zip(kept, here, strict=True):
                    if value is not new:
                        value.copy_(new, non_blocking=True)

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
from torch.optim.adamw import adamw

from latte import keyed
from latte.config import MemoryConfig, OptimConfig

SMALL = 4096  # elements; the moments of a smaller tensor stay float32, as they weigh nothing
BLOCK = 256  # elements that share a scale
PART = 2**22  # elements that are updated together, which bounds the float32 copies of what is stored in fewer bits
MOMENTS = ("exp_avg", "exp_avg_sq")
ROUNDING = {"fp32": 0, "bf16": 6, "int8": 20}  # bytes an element that rounding a tensor takes at most


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


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose moments may be stored in bf16 or 8 bits and whose weights may be bf16; it computes in float32.

    With states = fp32 and float32 weights it is the fused kernel and nothing else. As that does, it changes nothing, moments and
    count of steps included, where `found_inf`, a scalar on the device, is not 0.
    """

    def __init__(self, groups: list[dict], cfg: OptimConfig, states: str, seed: int):
        super().__init__(groups, lr=cfg.learning_rate, betas=tuple(cfg.betas), eps=cfg.eps, fused=True)
        self.states, self.seed = states, seed
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
        weights = [p.detach().float() for p in parameters]  # p itself where it is float32
        moments = {slot: [unpacked(state, slot) for state in states] for slot in MOMENTS}
        beta1, beta2 = group["betas"]
        adamw(weights, [p.grad.float() for p in parameters], *moments.values(), [], [state["step"] for state in states], fused=True,
              found_inf=found_inf, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=False)
        for i, (p, state) in enumerate(zip(parameters, states, strict=True)):
            for number, slot in enumerate(MOMENTS):
                _pack(state, slot, moments[slot].pop(0), self._generator(p, number), found_inf)
            if p.dtype != torch.float32:
                p.copy_(rounded(weights[i], self._generator(p, len(MOMENTS))))
            weights[i] = None

    def restore(self, p: Tensor, stored: dict[str, Tensor]) -> None:
        """Takes the state of a parameter out of a checkpoint, converting what is stored in another number of bits."""
        state = self._fresh(p)
        for number, slot in enumerate(MOMENTS):
            if stored[slot].dtype == state[slot].dtype:
                state.update({key: value.to(p.device) for key, value in stored.items() if key in (slot, f"{slot}_scale")})
            else:
                value = unpacked(stored, slot).to(p.device)
                if state[slot].dtype == torch.float32:
                    state[slot] = value
                else:
                    _pack(state, slot, value, self._generator(p, number))
        state["step"] = stored["step"].to(p.device)
        self.state[p] = state

    def _fresh(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first update."""
        state = {"step": torch.zeros((), device=p.device)}
        for slot in MOMENTS:
            state[slot] = torch.zeros_like(p, dtype=_stored(p, self.states), memory_format=torch.contiguous_format)
            if state[slot].dtype == torch.uint8:
                state[f"{slot}_scale"] = torch.zeros(-(-p.numel() // BLOCK), device=p.device)
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


def rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bf16, stochastically: a number between two neighbours becomes the upper one as often as it is near to it."""
    noise = torch.empty_like(x, dtype=torch.int32).random_(0, 2**16, generator=generator)
    noise += x.view(torch.int32)  # below bf16's last bit; carries into it with the right probability
    noise &= -2**16
    return noise.view(torch.float32).to(torch.bfloat16)


@functools.cache
def codes(signed: bool, device: torch.device) -> Tensor:
    """The numbers that 8 bits stand for, times a block's scale, float32 in rising order: [128] from 0 to 1, to which a sign is
    added, or [255] from 3e-7 to 1, which are never 0.

    Dynamic codes (Dettmers et al., arXiv 2110.02861, section 2.2): each power of ten has half as many as the one above, so that
    large numbers are precise and small ones are there. Different from the paper, -1 is there as well as 1, and a root is never 0.
    """
    levels = 6 if signed else 7
    edges = [10.0**-level * torch.linspace(0.1, 1, 2 ** (levels - level) + 1, dtype=torch.float64) for level in range(levels)]
    middles = torch.cat([(edge[1:] + edge[:-1]) / 2 for edge in edges])
    return torch.cat([middles, torch.tensor([0.0, 1.0] if signed else [1.0])]).float().sort().values.to(device)


@functools.cache
def _places(signed: bool, device: torch.device) -> Tensor:
    """The code at or below each bf16 number from 0 to 1, by its bits, int32. No two codes are nearer than two such numbers."""
    grid = torch.arange(2**7 * 127 + 1, dtype=torch.int16).view(torch.bfloat16).float()
    table = codes(signed, torch.device("cpu"))
    return torch.bucketize(grid, table, out_int32=True, right=True).sub_(1).clamp_(0, len(table) - 2).to(device)


def unpacked(state: dict[str, Tensor], slot: str) -> Tensor:
    """A moment as float32, in the parameter's shape; the tensor itself where it is stored so."""
    stored = state[slot]
    if stored.dtype != torch.uint8:
        return stored.float()
    signed = slot == "exp_avg"
    table = codes(signed, stored.device)
    if signed:
        table = torch.cat([-table.flip(0)[:-1], table])
    values = _blocks(table.index_select(0, stored.flatten().int())).mul_(state[f"{slot}_scale"][:, None])
    values = values.flatten()[:stored.numel()].view_as(stored)
    return values if signed else values.square_()


def _pack(state: dict[str, Tensor], slot: str, value: Tensor, generator: torch.Generator, found_inf: Tensor | None = None) -> None:
    """Stores a moment, or, where found_inf is not 0, leaves it to the bit. `value` is used up.

    Of the second moment 8 bits hold the root, whose range is half as wide and which the update divides by.
    """
    if value is state[slot]:
        return
    if state[slot].dtype == torch.bfloat16:
        state[slot].copy_(rounded(value, generator))  # a bf16 number that did not change is not rounded
        return
    signed = slot == "exp_avg"
    table = codes(signed, value.device)
    negative = value < 0
    x = _blocks(value.abs_().flatten() if signed else value.sqrt_().flatten())
    scale = x.amax(1)
    x = x.div_(scale.clamp(min=1e-30)[:, None]).flatten()[:value.numel()]
    code = _places(signed, x.device).index_select(0, x.view(torch.int32) >> 16)
    code += x >= table.index_select(0, code + 1)  # its bf16 number may lie below the next code, and x above
    code.clamp_(max=len(table) - 2)
    x -= table.index_select(0, code)
    gap = table.diff().index_select(0, code)
    code += x > gap.mul_(torch.rand(x.shape, generator=generator, device=x.device))
    if signed:
        code = torch.where(negative.flatten(), -code, code).add_(len(table) - 1)
    code = code.to(torch.uint8).view_as(state[slot])
    if found_inf is not None:
        code, scale = (torch.where(found_inf != 0, state[key], new) for key, new in ((slot, code), (f"{slot}_scale", scale)))
    state[slot].copy_(code)
    state[f"{slot}_scale"].copy_(scale)


def _blocks(x: Tensor) -> Tensor:
    """[n] -> [blocks BLOCK], the last one filled up with zeros."""
    return (F.pad(x, (0, -len(x) % BLOCK)) if len(x) % BLOCK else x).view(-1, BLOCK)


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
    """Bytes that training holds for these trained parameters, beside activations. Shapes and dtypes are read, meta tensors will do.

    weights; gradients, all of them, or the largest one with cfg.optimizer_in_backward; moments, with the count of steps; average,
    on the device or, with cfg.ema=host, on the host; and what an update takes on top of it at most.
    """
    dtype = torch.bfloat16 if cfg.weights == "bf16" else torch.float32
    shapes = [torch.empty(p.shape, dtype=dtype, device="meta") for p in parameters]
    sizes = [p.nbytes for p in shapes]
    moments, average = 4 * len(shapes), 4 * sum(p.numel() for p in shapes)
    for p in shapes:
        stored = _stored(p, cfg.optimizer_states)
        moments += 2 * (p.numel() * stored.itemsize + (4 * -(-p.numel() // BLOCK) if stored == torch.uint8 else 0))

    def copies(part: list[Tensor]) -> int:
        """float32 weights, gradients and moments beside what is stored in fewer bits, and what rounds one tensor."""
        lossy = [p.numel() for p in part if _stored(p, cfg.optimizer_states) != torch.float32]
        small = [p.numel() for p in part if p.dtype != torch.float32]
        rounding = max(max(lossy, default=0) * ROUNDING[cfg.optimizer_states], max(small, default=0) * ROUNDING["bf16"])
        return 8 * sum(lossy) + 8 * sum(small) + rounding

    parts = [[p] for p in shapes] if cfg.optimizer_in_backward else _parts(shapes, cfg.optimizer_states)
    return {"weights": sum(sizes), "gradients": max(sizes, default=0) if cfg.optimizer_in_backward else sum(sizes),
            "moments": moments, "average on device": average if cfg.ema == "device" else 0,
            "average on host": average if cfg.ema == "host" else 0, "update": max(map(copies, parts), default=0)}


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

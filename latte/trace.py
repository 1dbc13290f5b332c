"""What memory and work something would take, told by running it on tensors without values: nothing is computed, no memory taken."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from latte import attention, checkpoint, diffusion, lora, memory, optim, parallel
from latte.config import Config
from latte.health import Step
from latte.model import Latte


@dataclass(frozen=True)
class Cost:
    """Of an update on one device."""

    peak: int  # most bytes there at once
    held: int  # bytes between updates: weights, moments, average
    flops: float  # operations of matrix products and attention
    moved: float  # bytes that everything else reads and writes
    sent: float  # bytes to the host and back


class Tracker(TorchDispatchMode):
    """Counts bytes alive, each storage once, the most of them in each phase, and the work done."""

    def __init__(self):
        super().__init__()
        self.now, self.phase, self.alive, self.here = 0, "", {}, True
        self.most: dict[str, int] = {}
        self.work: Counter[str] = Counter()

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.most[phase] = max(self.most.get(phase, 0), self.now)

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What begins to live meanwhile is not on the device, and crosses over to it and back."""
        self.here = False
        try:
            yield
        finally:
            self.here = True

    def add(self, values: object) -> bool:
        """Counts the tensors among nested lists and dictionaries. Returns whether any was new."""
        new = False
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                new = True
                self.alive[key] = weakref.ref(storage, partial(self._gone, key, size if self.here else 0))
                if self.here:
                    self.now += size
                else:
                    self.work["sent"] += 2 * size
        self.most[self.phase] = max(self.most.get(self.phase, 0), self.now)
        return new

    def _gone(self, key: int, size: int, _reference) -> None:
        del self.alive[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        new = self.add(result)
        if "scaled_dot_product" in func.name():  # two products forward, five backward
            q, k = args[1:3] if "backward" in func.name() else args[:2]
            self.work["flops"] += 2 * q.numel() * k.shape[-2] * (5 if "backward" in func.name() else 2)
        elif func.overloadpacket in flop_registry:
            self.work["flops"] += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        elif new or func._schema.is_mutable:
            self.work["moved"] += sum(value.nbytes for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor))
        return result


def update(cfg: Config, latents: tuple[int, int, int, int], images: int, clips: int, passes: int, gpu: bool) -> Cost:
    """What a training update takes that sees `clips` latents [f c h w], the last `images` frames of which are images, in each of so
    many passes; with what its report needs. On a GPU, host memory does not count.

    Traced with two and with three layer pairs at most. With each further pair every phase of the update grows by what it grew from
    two to three: the forward pass, the backward pass of the last, of an inner and of the first pair, and the optimizer's step. In
    the same way a clip of many tiles is drawn out from one of two and one of four.
    The trace follows the rules of a CPU, but for a GPU attention is always the fused kernel, which keeps its output and the
    logarithms of its sums.
    """
    (f, c, h, w), pairs, traced = latents, cfg.model.layers, min(passes, 2)  # a third pass is like the second
    tile = max(1, cfg.memory.tile_tokens // (h * w // cfg.model.patch_size**2))  # frames

    def at(layers: int, frames: int) -> dict[str, float]:
        part = replace(cfg, model=replace(cfg.model, layers=layers))
        return _traced(part, (frames, c, h, w), images, clips, traced, gpu)

    def drawn_out(layers: int) -> dict[str, float]:
        if not cfg.memory.tile_tokens or f <= 4 * tile or images:
            return at(layers, f)
        return _line(at(layers, 2 * tile), at(layers, 4 * tile), f / (2 * tile) - 2)

    if pairs <= 3:
        found = drawn_out(pairs)
    else:
        two, three = drawn_out(2), drawn_out(3)
        found = _line(two, three, pairs - 3)
        grown = max(three[phase] - two[phase] for phase in ("first pair", "last pair"))
        found["inner pair"] = three["inner pair"] + (pairs - 3) * grown  # it may be the neighbour of either
    held, work = found.pop("held"), {kind: found.pop(kind) * passes / traced for kind in ("flops", "moved", "sent")}
    return Cost(peak=int(max(found.values())), held=int(held), **work)


def _line(a: dict[str, float], b: dict[str, float], steps: float) -> dict[str, float]:
    """b, and so many times what it has more than a."""
    return {key: value + steps * (value - a.get(key, value)) for key, value in b.items()}


def _traced(cfg: Config, latents: tuple[int, int, int, int], images: int, clips: int, passes: int, gpu: bool) -> dict[str, float]:
    """Most bytes in each phase of an update, bytes `held` before it, and its work without that of the optimizer."""
    _forget()
    model = outline(cfg)
    plain = attention.PLAIN_LOGITS
    try:
        attention.PLAIN_LOGITS = 0 if gpu else plain
        with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker:
            for module in model.modules():
                for name, p in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
            on_host = tracker.elsewhere if gpu else contextlib.nullcontext
            run = rehearsal(model, cfg, latents, images, clips, passes, tracker, on_host)
            held = tracker.now
            if 0 < cfg.memory.activations < 1:
                run()  # the first update finds out what to keep
            tracker.most.clear()
            tracker.work.clear()
            run()
    finally:
        attention.PLAIN_LOGITS = plain
        _forget()
    return {**tracker.most, "held": held, **{kind: tracker.work[kind] for kind in ("flops", "moved", "sent")}}


def _forget() -> None:
    """Tables that functions keep for their next call must not be fake ones from here on."""
    for table in (*vars(diffusion).values(), *vars(optim).values()):
        if hasattr(table, "cache_clear"):
            table.cache_clear()


def outline(cfg: Config) -> Latte:
    """The model that a run trains, of meta tensors."""
    attention = "math" if cfg.model.attention == "math" else "sdpa"  # all fused ones keep the same
    with torch.device("meta"):
        model = Latte(replace(cfg.model, attention=attention))
        if cfg.init.lora_rank:
            lora.add(model, cfg.init)
    return model


def rehearsal(model: Latte, cfg: Config, latents: tuple[int, int, int, int], images: int, clips: int, passes: int,
              tracker: Tracker, on_host: Callable[[], contextlib.AbstractContextManager]) -> Callable[[], None]:
    """An update as train.py makes it, on zeros. What is made inside of on_host() belongs to the host."""
    optimizer = optim.make_optimizer(model, cfg.optim, cfg.memory, cfg.seed)
    with on_host() if cfg.memory.ema == "host" else contextlib.nullcontext():
        ema = optim.EMA(model, cfg.optim.ema_decay, cfg.memory.ema)
    trained = checkpoint.trained(model)
    for p in trained.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the moments
    optimizer.zero_grad(set_to_none=True)
    early = optim.InBackward(model, optimizer) if cfg.memory.optimizer_in_backward else None
    store = memory.apply(model, cfg.memory)
    if store:
        store._send = partial(_sent, store._send, on_host)
    last = cfg.model.layers - 1
    for i, block in enumerate(model.temporal):
        phase = "last pair" if i == last else "inner pair" if i else "first pair"
        block.register_forward_hook(lambda _block, _given, out, phase=phase: (
            out.register_hook(lambda _: tracker.enter(phase)) and None if out.requires_grad else None))
    fixed = parallel.FixedOrder(list(model.parameters()), 0, 1) if cfg.train.deterministic else None
    x = [torch.zeros(clips, *latents) for _ in range(passes)]
    rows = [clips, 1 + images] if images else [clips]
    text = [torch.zeros(*rows, cfg.text.max_tokens, cfg.model.text_channels) for _ in range(passes)]
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.train.mixed_precision)

    def one_pass(number: int) -> Tensor:
        tracker.enter("forward")
        cond = {"text": text[number], "text_mask": torch.ones(text[number].shape[:-1])} if cfg.model.conditioning == "text" else {}
        times = torch.zeros(clips, dtype=torch.long if cfg.diffusion.kind == "ddpm" else torch.float32)

        def model_fn(x, t, cond):
            with torch.autocast(x.device.type, precision, enabled=precision is not None):
                return model(x, t, image_frames=images, **cond).float()

        losses = diffusion.training_loss(model_fn, x[number], cond, torch.zeros(clips, *latents), times, cfg.diffusion).loss
        if early:
            early.begin(losses.sum(), measure=True)
        losses.sum().backward()
        return losses.detach().sum()

    def step() -> None:
        tracker.enter("step")
        if not early:
            norm = torch.stack(torch._foreach_norm([p.grad for p in trained.values()], dtype=torch.float32)).norm()
            if cfg.optim.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(trained.values(), cfg.optim.grad_clip, norm)
            move = Step(trained)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(model, 0, torch.ones(()))
        if not early:
            for p, before in zip(trained.values(), move.before, strict=True):  # as its ratios() does
                p.detach() - before

    def run() -> None:
        if fixed:
            fixed.backward(range(passes), one_pass)
        else:
            for number in range(passes):
                one_pass(number)
        work = tracker.work.copy()
        step()
        tracker.work = work

    return run


def _sent(send: Callable[[Tensor], object], on_host: Callable[[], contextlib.AbstractContextManager], x: Tensor) -> object:
    with on_host():
        return send(x)


def peak(make: Callable[[], tuple[Callable[[], object], Iterable[nn.Module | Tensor]]], dtype: torch.dtype) -> int:
    """Most bytes alive while a function runs without gradients.

    make() returns the function and the modules and tensors that are there before it runs; what it makes is of `dtype` where
    nothing else is asked for. Attention counts as a CPU runs it; fused kernels of a GPU need no more.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            run, held = make()
            with Tracker() as tracker:
                for value in held:
                    tracker.add([*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else value)
                run()
        return max(tracker.most.values())
    finally:
        torch.set_default_dtype(before)

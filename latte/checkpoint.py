"""Checkpoints: folders of safetensors and one state.json, written beside their place and renamed into it.

    step-00000500/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json

state.json holds the step (which is the data position too: order and randomness are functions of it), the resolved config,
library versions, the small states of guard and loss scale, the SHA-256 of every other file and its own. A checkpoint to share holds
ema.safetensors and state.json alone.
Nothing in a checkpoint can run code when it is loaded.
    python -m latte.checkpoint RUN OUT [sampler.key=value ...]     makes one to share from a run's newest checkpoint
"""

import copy
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from latte import config
from latte.command import command
from latte.optim import EMA, AdamW

FORMAT = 1
VAE = "vae"  # the folder of a checkpoint's own autoencoder, and codec.path where there is one


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int  # updates done
    config: config.Config
    files: dict[str, str]  # name -> SHA-256
    extra: dict = field(default_factory=dict)  # small states as plain values: of the guard, and of fp16's loss scale


class Writer:
    """Writes a run's checkpoints beside the training: an update waits only while its tensors are copied in host memory.

    The newest `keep` checkpoints stay, and those at multiples of keep_every steps (0 = none). One checkpoint is written at a time.
    `waited` counts the seconds that the training waited for it.
    """

    def __init__(self, run: str | Path, keep: int, keep_every: int = 0):
        """Removes what a killed writer left half-written."""
        self.run, self.keep, self.keep_every = Path(run), keep, keep_every
        self.waited = 0.0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        for left in self.run.glob("step-*.writing"):
            shutil.rmtree(left, ignore_errors=True)

    def save(self, step: int, cfg: config.Config, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer,
             extra: dict | None = None) -> None:
        """Begins to write run/step-XXXXXXXX. Raises OSError of this or an earlier one as soon as it is known."""
        self.finish()
        started = time.perf_counter()
        staged = {name: {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()} for name, tensors in (
            ("model.safetensors", trained(model)), ("ema.safetensors", ema.weights),
            ("optimizer.safetensors", _optimizer_tensors(model, optimizer)))}
        self._thread = threading.Thread(target=self._write, args=(step, copy.deepcopy(cfg), staged, extra), name="checkpoint")
        self._thread.start()
        self.waited += time.perf_counter() - started

    def check(self) -> None:
        """Raises the OSError of a checkpoint that could not be written, as soon as that is known."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Waits until the checkpoint under way is written. Raises OSError with its path when it could not be."""
        started = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.waited += time.perf_counter() - started
        self.check()

    def close(self) -> None:
        """Lets the checkpoint under way be written whole, also when the training ends in an error, which stays the one to tell."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, step: int, cfg: config.Config, tensors: dict[str, dict[str, torch.Tensor]], extra: dict | None) -> None:
        try:
            write(self.run / f"step-{step:08d}", step, cfg, tensors, extra)
            for old in self._superfluous(step):
                shutil.rmtree(old, ignore_errors=True)  # one that cannot go does no harm
        except Exception as error:  # the training must hear of it, whatever it is
            self._error = error

    def _superfluous(self, step: int) -> list[Path]:
        """Checkpoints to delete after that of a step: old ones, and later ones, which the run went back from."""
        numbered = [(int(path.name.removeprefix("step-")), path) for path in _all(self.run)]
        later = [path for number, path in numbered if number > step]
        older = [path for number, path in numbered if number <= step and not (self.keep_every and number % self.keep_every == 0)]
        newest = {path for number, path in [pair for pair in numbered if pair[0] <= step][-self.keep:]}
        return later + [path for path in older if path not in newest]


def write(path: Path, step: int, cfg: config.Config, tensors: dict[str, dict[str, torch.Tensor]],
          extra: dict | None = None, vae: Path | None = None) -> Path:
    """Writes a checkpoint folder of the given safetensors files, beside `path` first. Replaces what is there.

    vae: a folder of an autoencoder, which is copied in; `read` finds it there.

    state.json, which names the others and their hashes, is written last. Raises OSError with the path when it cannot be written;
    other checkpoints are then untouched.
    """
    beside = path.with_name(f"{path.name}.writing")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, values in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, beside / name)
        if vae is not None:
            shutil.copytree(vae, beside / VAE)
        files = sorted(file.relative_to(beside).as_posix() for file in beside.rglob("*") if file.is_file())
        state = {"format": FORMAT, "step": step, "files": {name: _sha256(beside / name) for name in files},
                 "config": config.to_dict(cfg), "versions": versions(), "extra": extra or {}}
        (beside / "state.json").write_text(json.dumps(state | {"sha256": _digest(state)}, indent=1))
        for file in beside.rglob("*"):
            _sync(file)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(beside, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"{path}: the checkpoint could not be written ({error}); earlier checkpoints are untouched") from error
    return path


def latest(run: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's folder, or None."""
    found = [path for path in _all(Path(run)) if (path / "state.json").is_file()]
    return found[-1] if found else None


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a checkpoint of this project or a run's folder with one in it, whole or damaged."""
    return (Path(path) / "state.json").is_file() or latest(path) is not None


def read(path: str | Path) -> Checkpoint:
    """Opens a checkpoint folder, or the newest checkpoint of a run's folder, and checks its files' hashes.

    Raises ValueError naming the path when there is none or a file is missing or damaged.
    """
    path = Path(path)
    if not (path / "state.json").is_file():
        newest = latest(path)
        if newest is None:
            raise ValueError(f"{path}: no checkpoint here; expected a folder with state.json, or a run's folder with step-* in it")
        path = newest
    try:
        state = json.loads((path / "state.json").read_text())
        if state.pop("sha256", None) not in (None, _digest(state)):  # early checkpoints have none
            raise ValueError("it does not have its own SHA-256")
        step, files, values, extra = state["step"], state["files"], state["config"], state.get("extra", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / 'state.json'}: damaged checkpoint ({error!r})") from None
    for name, digest in files.items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name}: missing from the checkpoint")
        if _sha256(path / name) != digest:
            raise ValueError(f"{path / name}: damaged, its SHA-256 is not the one in state.json")
    cfg = config.from_dict(config.upgraded(values))
    if cfg.codec.path == VAE and (path / VAE).is_dir():
        cfg.codec.path = str(path / VAE)
    return Checkpoint(path, step, cfg, files, extra)


def newest_good(run: str | Path, up_to: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that is whole (of at most `up_to` updates), and what is wrong with those after it.

    None for a run that has none. Raises ValueError when it has some and none is whole: starting anew would lose them.
    """
    wrong = []
    for path in reversed(_all(Path(run))):
        if up_to is None or int(path.name.removeprefix("step-")) <= up_to:
            try:
                return read(path), wrong
            except (ValueError, OSError) as error:
                wrong.append(str(error))
    if wrong:
        raise ValueError(f"{run}: none of its {len(wrong)} checkpoints is whole; move them away to start anew: " + "; ".join(wrong))
    return None, []


def lock(run: str | Path) -> IO:
    """Claims a run's folder for this process, until the returned file is closed or the process ends, however it ends.

    Raises ValueError when another process trains there, OSError when the folder cannot be written.
    """
    Path(run).mkdir(parents=True, exist_ok=True)
    file = open(Path(run) / "lock", "w")  # noqa: SIM115, the caller closes it
    try:
        # a record lock: kept by the kernel, gone with the process, and not handed to loader workers as flock's would be
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(f"{run}: another process trains here; wait for it or choose another run=FOLDER") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # file systems without locks go without
            file.close()
            raise
    return file


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Checkpoint, name: str = "ema.safetensors") -> None:
    """Copies one weights file into a model, converting to its dtype. Raises ValueError when names or shapes differ.

    Of a model with adapters, only these are in the file: its other weights are frozen and stay as they are.
    """
    _copy(trained(model), _tensors(checkpoint, name), checkpoint.path / name)


@torch.no_grad()
def load(checkpoint: Checkpoint, model: nn.Module, ema: EMA, optimizer: AdamW) -> int:
    """Restores a training state in place and returns the number of updates done. Raises ValueError when it does not fit.

    Weights and moments stored in another number of bits than they now have are converted.
    """
    load_weights(model, checkpoint, "model.safetensors")
    _copy(ema.weights, _tensors(checkpoint, "ema.safetensors"), checkpoint.path / "ema.safetensors")
    names = {id(p): n for n, p in model.named_parameters()}
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in _tensors(checkpoint, "optimizer.safetensors").items():
        name, _, slot = key.rpartition("/")
        stored.setdefault(name, {})[slot] = value
    for group in optimizer.param_groups:
        for p in group["params"]:
            if names[id(p)] in stored:
                optimizer.restore(p, stored[names[id(p)]])
            else:
                optimizer.state.pop(p, None)
    return checkpoint.step


def publish(source: str | Path, out: str | Path, overrides: list[str] = ()) -> Path:
    """A checkpoint to share from a whole one: its EMA weights in float16, enough to sample, a tenth of the size.

    `overrides` change its config, such as the sampler's defaults, which are best chosen after training. An autoencoder that lies
    in a folder comes with it; one of the hub stays there.
    """
    found = read(source)
    cfg = config.from_dict(config.to_dict(found.config), overrides)
    vae = Path(cfg.codec.path, cfg.codec.subfolder)
    vae = vae if cfg.codec.kind == "autoencoder" and vae.is_dir() else None
    if vae:
        cfg.codec.path, cfg.codec.subfolder = VAE, ""
    weights = {name: value.half() for name, value in _tensors(found, "ema.safetensors").items()}
    return write(Path(out), found.step, cfg, {"ema.safetensors": weights}, vae=vae)


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """One hash of named tensors: of names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.ndim else value.numpy().tobytes())
    return digest.hexdigest()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name: a checkpoint holds these."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def versions() -> dict[str, str]:
    """Hardware and versions, on which the numbers of a run depend."""
    cpu = f"{os.cpu_count()} CPUs, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    found = {"python": platform.python_version(), "hardware": hardware}
    for package in ("latte", "torch", "numpy", "diffusers", "transformers", "accelerate", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _all(run: Path) -> list[Path]:
    return sorted(path for path in Path(run).glob("step-*") if path.name.removeprefix("step-").isdigit())


def _tensors(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    if name not in checkpoint.files:
        raise ValueError(f"{checkpoint.path}: holds no {name}; training resumes only from a whole checkpoint of a run")
    return load_file(checkpoint.path / name)


def _copy(target: dict[str, torch.Tensor], source: dict[str, torch.Tensor], path: Path) -> None:
    wrong = sorted(set(target) ^ set(source)) or sorted(n for n in target if target[n].shape != source[n].shape)
    if wrong:
        raise ValueError(f"{path}: does not fit this model; {len(wrong)} tensors differ in name or shape, first {wrong[0]}")
    for name, value in source.items():
        target[name].copy_(value)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {f"{names[id(p)]}/{slot}": torch.as_tensor(value)
            for p, slots in optimizer.state.items() for slot, value in slots.items()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@command
def main() -> int:
    if len(sys.argv) < 3:
        raise ValueError("usage: python -m latte.checkpoint RUN OUT [sampler.key=value ...]")
    print(publish(sys.argv[1], sys.argv[2], sys.argv[3:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

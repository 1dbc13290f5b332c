"""A run's record: its folder, metrics.jsonl, the progress line and the trackers (wandb, tensorboard)."""

import json
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from latte import config


class RunLog:
    """Writes what happens in a run; every process may call it, the main one writes.

    `metrics.jsonl` gets one JSON object a line; lines of updates at or after the resumed one are dropped, so that an
    interrupted and resumed run leaves the record of an uninterrupted one.
    """

    def __init__(self, cfg: config.Config, accelerator: Accelerator, start_step: int):
        self.folder, self.accelerator = Path(cfg.run), accelerator
        self.main = accelerator.is_main_process
        self.started, self.start_step = time.perf_counter(), start_step
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(config.to_yaml(cfg))
            self._metrics = self._open_metrics(start_step)
        if cfg.train.trackers:
            shown = None if "tensorboard" in cfg.train.trackers else config.to_dict(cfg)  # tensorboard takes flat settings only
            accelerator.init_trackers(cfg.train.project, shown, {"wandb": {"dir": str(self.folder), "name": self.folder.name}})
        self.bar = tqdm(total=cfg.total_steps, initial=start_step, unit="step", disable=not self.main, mininterval=1.0)

    def _open_metrics(self, start_step: int):
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start_step]
        path.write_text("".join(line + "\n" for line in kept))
        return open(path, "a", buffering=1)

    def step(self, stage: int) -> None:
        """One update is done; moves the progress line."""
        self.bar.set_description(f"stage {stage}", refresh=False)
        self.bar.update(1)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Records values after update number `step` (from 1) in metrics.jsonl and the trackers."""
        if self.main:
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")
            if "loss" in values:
                self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    def say(self, text: str) -> None:
        if self.main:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
        if self.main:
            self._metrics.close()
        self.accelerator.end_training()

"""A run's record: its folder, metrics.jsonl, the progress line and the trackers (wandb, tensorboard)."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from latte import config


class RunLog:
    """Writes what happens in a run; every process may call it, the main one writes.

    `metrics.jsonl` gets one JSON object a line; lines of updates at or after the resumed one are dropped, so that an
    interrupted and resumed run leaves the record of an uninterrupted one. A last line that was cut off by a kill is dropped too.
    `events.jsonl` keeps what went wrong or was done about it.
    """

    def __init__(self, cfg: config.Config, accelerator: Accelerator, start_step: int):
        self.folder, self.accelerator = Path(cfg.run), accelerator
        self.main = accelerator.is_main_process
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
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start_step]
        part = path.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept))
        part.replace(path)
        return open(path, "a", buffering=1)

    def rewind(self, step: int) -> None:
        """The run goes back to an earlier update: forgets the metrics after it."""
        if self.main:
            self._metrics.close()
            self._metrics = self._open_metrics(step)
        self.bar.n = step
        self.bar.refresh()

    def event(self, kind: str, step: int, text: str, **facts: Any) -> None:
        """Says that something out of the ordinary happened, and adds a line to events.jsonl, which is never cut.

        What only one process knows, such as a file that it could not read, is written by that process.
        """
        if self.main or kind == "clip":
            now = datetime.now(UTC).isoformat(timespec="seconds")
            with open(self.folder / "events.jsonl", "a") as file:
                file.write(json.dumps(_plain({"time": now, "event": kind, "step": step, "text": text, **facts})) + "\n")
        self.say(text)

    def report(self, name: str, facts: dict[str, Any]) -> Path:
        """Writes reports/NAME.json of the run's folder."""
        path = self.folder / "reports" / f"{name}.json"
        if self.main:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(_plain(facts), indent=1) + "\n")
        return path

    def step(self, stage: int) -> None:
        """One update is done; moves the progress line."""
        self.bar.set_description(f"stage {stage}", refresh=False)
        self.bar.update(1)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Records values after update number `step` (from 1) in metrics.jsonl and the trackers."""
        if self.main:
            self._metrics.write(json.dumps(_plain({"step": step, **values})) + "\n")
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


def _plain(value: Any) -> Any:
    """The same with "nan" and "inf" as texts: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)

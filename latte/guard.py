"""Which updates to leave out: those whose loss or gradient is not finite, and spikes.

A spike is a loss or a gradient norm whose logarithm lies further above the median of the last updates of its bucket than so many
robust standard deviations (1.4826 times the median absolute deviation: Hampel, 1974). Going back to a checkpoint and leaving the
offending batches out is what Chowdhery et al. did (PaLM, arXiv 2204.02311, section 5.1).

What is decided about update n depends on the updates before n - 1 alone, because the values of n - 1 may still be on their way from
the device: so nothing waits for them, and a stop between the two changes nothing.
"""

import math
from collections import defaultdict, deque

import numpy as np

from latte.config import GuardConfig

LEAST_DEVIATION = 0.1  # of a logarithm: however even the last updates were, one that is a tenth larger is no spike


class Guard:
    """Remembers past updates. `key` names what an update is compared with: its stage and bucket."""

    def __init__(self, cfg: GuardConfig, state: dict | None = None):
        state = state or {}
        self.cfg = cfg
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.rollbacks = state.get("rollbacks", 0)
        self.left_out = set(state.get("left_out", ()))  # updates not to do at all
        self._past = defaultdict(lambda: deque(maxlen=cfg.window + 1))
        for key, rows in state.get("past", {}).items():
            self._past[key].extend(tuple(row) for row in rows)

    def state(self) -> dict:
        """All of it as plain values, for a checkpoint."""
        return {"skipped_in_a_row": self.skipped_in_a_row, "rollbacks": self.rollbacks, "left_out": sorted(self.left_out),
                "past": {key: [list(row) for row in rows] for key, rows in self._past.items()}}

    def limits(self, step: int, key: str) -> tuple[float, float]:
        """Largest loss and gradient norm that update `step` may have; infinite while too little is known."""
        past = [row[1:] for row in self._past[key] if row[0] < step - 1][-self.cfg.window:]
        if self.cfg.spike == "ignore" or len(past) < self.cfg.window // 4:
            return math.inf, math.inf
        logs = np.log(np.maximum(np.array(past), 1e-30))  # [window 2]
        middle = np.median(logs, axis=0)
        deviation = np.maximum(1.4826 * np.median(abs(logs - middle), axis=0), LEAST_DEVIATION)
        loss, norm = np.exp(middle + self.cfg.spike_deviations * deviation)
        return float(loss), float(norm)

    def note(self, step: int, key: str, loss: float, norm: float, done: bool) -> str | None:
        """Takes in what came of an update. Returns why it was not done: "non-finite", "spike" or None.

        Raises ValueError when too many in a row were not done.
        """
        if done:
            self.skipped_in_a_row = 0
            self._past[key].append((step, loss, norm))
            return None
        self.skipped_in_a_row += 1
        why = "spike" if math.isfinite(loss) and math.isfinite(norm) else "non-finite"
        if self.skipped_in_a_row >= self.cfg.max_skipped:
            raise ValueError(f"guard.max_skipped: {self.skipped_in_a_row} updates in a row were skipped, the last one ({why}) was "
                             f"update {step + 1} with loss {loss:g} and gradient norm {norm:g}; try a lower "
                             "optim.learning_rate or bf16")
        return why

    def roll_back(self, step: int) -> None:
        """Leaves out the updates up to `step` from now on. Raises ValueError when the run has gone back too often."""
        if self.rollbacks >= self.cfg.rollbacks:
            raise ValueError(f"guard.rollbacks: update {step + 1} is a spike after {self.rollbacks} rollbacks; see the reports")
        self.rollbacks += 1
        self.left_out |= set(range(max(0, step - self.cfg.rollback_updates + 1), step + 1))

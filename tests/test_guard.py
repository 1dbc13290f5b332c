"""What the guard lets through, and that its memory survives a checkpoint."""

import json
import math

import numpy as np
import pytest

from latte.config import GuardConfig
from latte.guard import Guard


def fed(cfg, updates, key="0.0", seed=0):
    guard, draw = Guard(cfg), np.random.default_rng(seed)
    for step in range(updates):
        guard.note(step, key, *np.exp(draw.normal(0, 0.2, 2)), True)
    return guard


def test_a_spike_is_far_above_the_median_and_ordinary_updates_pass():
    cfg = GuardConfig(spike="skip", window=128)
    guard = fed(cfg, 128)
    loss, norm = guard.limits(129, "0.0")
    # a normal logarithm of deviation 0.2: the limit is at 8 of them, whatever the outliers
    assert math.log(loss) == pytest.approx(1.6, abs=0.5) and math.log(norm) == pytest.approx(1.6, abs=0.5)
    for step in range(128, 140):  # a tenth of outliers does not move a median
        guard.note(step, "0.0", 1e3, 1e3, True)
    assert guard.limits(141, "0.0")[0] < 12
    draw = np.random.default_rng(5)
    assert np.mean(np.exp(draw.normal(0, 0.2, 10000)) > loss) == 0


def test_nothing_is_a_spike_while_little_is_known_or_spikes_are_ignored():
    cfg = GuardConfig(spike="skip", window=32)
    assert fed(cfg, 7).limits(8, "0.0") == (math.inf, math.inf)
    assert fed(cfg, 9).limits(10, "0.0")[0] < math.inf
    assert fed(cfg, 30).limits(31, "1.0") == (math.inf, math.inf)  # another bucket is another story
    assert fed(GuardConfig(spike="ignore"), 128).limits(129, "0.0") == (math.inf, math.inf)


def test_an_update_is_judged_by_those_before_the_last_and_a_checkpoint_changes_nothing():
    """The value of the update before may still be on the device: known or not, the decision is the same."""
    cfg = GuardConfig(spike="skip", window=8)
    whole, draw = Guard(cfg), np.random.default_rng(1)
    rows = [tuple(map(float, np.exp(draw.normal(0, 0.3, 2)))) for _ in range(60)]
    limits = []
    for step, row in enumerate(rows):
        limits.append(whole.limits(step, "a"))  # all before it are known
        whole.note(step, "a", *row, True)
    late = Guard(cfg)
    for step in range(60):
        if step >= 2:
            late.note(step - 2, "a", *rows[step - 2], True)  # the one before is not known yet
        if step == 31:
            late = Guard(cfg, json.loads(json.dumps(late.state())))
        assert late.limits(step, "a") == limits[step]


def test_skipped_updates_are_counted_and_do_not_move_the_median():
    cfg = GuardConfig(spike="skip", window=8, max_skipped=3)
    guard = fed(cfg, 20)
    before = guard.limits(25, "0.0")
    assert guard.note(20, "0.0", math.nan, 1.0, False) == "non-finite"
    assert guard.note(21, "0.0", 1e9, 1.0, False) == "spike"
    assert guard.limits(25, "0.0") == before
    guard.note(22, "0.0", 1.0, 1.0, True)
    guard.note(23, "0.0", 1.0, math.inf, False)
    guard.note(24, "0.0", 1.0, math.inf, False)
    with pytest.raises(ValueError, match=r"guard\.max_skipped: 3 updates in a row.*update 26 with loss 1 and gradient norm inf"):
        guard.note(25, "0.0", 1.0, math.inf, False)


def test_a_rollback_leaves_out_the_updates_up_to_the_spike():
    guard = Guard(GuardConfig(spike="rollback", rollbacks=2, rollback_updates=3))
    guard.roll_back(10)
    guard.roll_back(1)
    assert guard.left_out == {0, 1, 8, 9, 10}
    with pytest.raises(ValueError, match=r"guard\.rollbacks: update 31 is a spike after 2 rollbacks"):
        guard.roll_back(30)

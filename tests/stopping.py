"""The training program with a stop built in:  python tests/stopping.py WHERE NUMBER SIGNAL CONFIG [overrides]

Sends itself a signal at the NUMBER-th time that it comes to a place: `step` after an update, `loader` while a clip is made,
`write` before a file of a checkpoint is written, `hash` before one is hashed, `rename` between a checkpoint's files and its name,
`prune` before an old checkpoint is deleted. Counts are of this process; a loader process that is hit takes its parent with it.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from latte import checkpoint, data, runlog

PLACES = {"step": (runlog.RunLog, "step"), "loader": (data._Samples, "__getitem__"), "write": (checkpoint, "save_file"),
          "hash": (checkpoint, "_sha256"), "rename": (checkpoint.os, "rename"), "prune": (shutil, "rmtree")}


def arm(where: str, number: int, name: str) -> None:
    owner, attribute = PLACES[where]
    real, main, count = getattr(owner, attribute), os.getpid(), [0]

    def counted(*args, **kwargs):
        count[0] += 1
        if count[0] == number:
            if os.getpid() != main and name == "SIGKILL":
                os.kill(main, signal.SIGKILL)
            os.kill(os.getpid(), getattr(signal, name))
        return real(*args, **kwargs)

    setattr(owner, attribute, counted)


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    sys.exit(train.main(sys.argv[4:]))

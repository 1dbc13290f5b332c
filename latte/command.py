"""How a command of this project ends: with an exit code, and at most one line of what went wrong."""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable

SAVED = 75  # exit code after SIGTERM or SIGUSR1: EX_TEMPFAIL, try again. Slurm can requeue on it, torchrun restarts on any but 0
INTERRUPTED = 130  # exit code after SIGINT; the state was saved as well


class Stop:
    """Remembers which signal came, so that a training can end after a whole update. A second SIGINT ends at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
                signal.signal(number, self._note)

    def __bool__(self) -> bool:
        return bool(self.number)

    @property
    def code(self) -> int:
        """What a program that was stopped and has saved exits with."""
        return INTERRUPTED if self.number == signal.SIGINT else SAVED

    def _note(self, number, _frame):
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates the main of a program whose errors are told, not raised: after ValueError or OSError one line and exit code 1,
    after an interrupt 130. What a stopped program has kept, its own text says."""
    @functools.wraps(main)
    def told(*args, **options) -> int:
        try:
            return main(*args, **options)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130

    return told

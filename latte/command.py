"""How a command of this project ends: with an exit code, and at most one line of what went wrong."""

import functools
import sys
from collections.abc import Callable


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

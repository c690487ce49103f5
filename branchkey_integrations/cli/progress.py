"""Lines that stay, and one line that lives."""

from __future__ import annotations

import sys
import time

#: Where output goes to a file or a pipe, a sign of life comes as a whole line, and so less often.
_QUIET_S = 5.0
_TICK_S = 0.5
_WIDTH = 110


class Progress:
    """Print at once; between lines show that something is going on."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._shown = False
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._shown:
            sys.stdout.write("\r\x1b[K")
            self._shown = False
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        self._last = time.monotonic()

    def alive(self, text: str) -> None:
        """Show what is being waited for, unless something was shown a moment ago."""
        now = time.monotonic()
        if now - self._last < (_TICK_S if self._live else _QUIET_S):
            return
        if self._live:
            sys.stdout.write("\r\x1b[K" + text[:_WIDTH])
            self._shown = True
        else:
            sys.stdout.write(text + "\n")
        sys.stdout.flush()
        self._last = now

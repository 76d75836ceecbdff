"""Being asked to stop: SIGTERM from a scheduler, Ctrl-C from a user."""

from __future__ import annotations

import signal
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Signals:
    """Remembers SIGTERM and Ctrl-C until the step is done; a second Ctrl-C ends the process at once."""

    def __init__(self):
        self._number, self._before = 0, {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: Any) -> None:
        if self._number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number

    def stopped(self) -> int:
        """The signal that came, or 0; all processes stop after the same step."""
        if jax.process_count() == 1:
            return self._number
        return int(multihost_utils.process_allgather(np.array(self._number)).max())

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

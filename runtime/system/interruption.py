"""Stopping on SIGINT, SIGTERM and SIGHUP without losing work."""
import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# SIGHUP comes when the terminal is closed or the connection to it breaks. Not all systems have it.
TERMINATION_SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]


class Interrupted(SystemExit):
    """The end of the program by a signal. Code of the user's may end by a plain SystemExit, which is an error."""


@contextlib.contextmanager
def signals_handled_by(handler: Callable[[int, Any], object] | signal.Handlers,
                       signals: Sequence[int] = TERMINATION_SIGNALS) -> Iterator[None]:
    """While entered, SIGINT, SIGTERM and SIGHUP, or other signals, are handled so; those that the process ignores, as in background jobs
    of a script and under nohup, stay ignored."""
    before = {number: signal.getsignal(number) for number in signals}
    for number, earlier_handler in before.items():
        if earlier_handler != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier_handler in before.items():
            signal.signal(number, earlier_handler)


class Interruption(contextlib.ExitStack):
    """While entered, the first SIGINT, SIGTERM or SIGHUP is recorded in `signal`; another SIGINT or SIGTERM ends at once.

    Another SIGHUP is ignored: the shell and the system may both send one when a terminal is closed.
    """

    def __init__(self):
        super().__init__()
        self.signal = None   # its number
        self.agreed = False  # whether all workers know that one of them was interrupted

    def agree(self) -> None:
        """Records that some worker was interrupted; all workers learn so after the same iteration."""
        self.agreed, self.signal = True, self.signal or signal.SIGTERM

    def __enter__(self) -> 'Interruption':
        self.enter_context(signals_handled_by(self._record))
        return self

    def _record(self, number, frame):
        self.signal = number
        for ending in TERMINATION_SIGNALS:
            if signal.getsignal(ending) != signal.SIG_IGN:
                signal.signal(ending, signal.SIG_DFL if ending in (signal.SIGINT, signal.SIGTERM) else signal.SIG_IGN)
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b'\nFinishing the current iteration and saving it; a second signal ends the program at once.\n')

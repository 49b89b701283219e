"""Stopping on SIGINT, SIGTERM and SIGHUP without losing work."""
import contextlib
import os
import signal

# SIGHUP comes when the terminal is closed or the connection to it breaks. Not all systems have it.
TERMINATION_SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]


class Interruption:
    """While entered, the first SIGINT, SIGTERM or SIGHUP is recorded in `signal`; another SIGINT or SIGTERM ends at once.

    Another SIGHUP is ignored: the shell and the system may both send one when a terminal is closed.
    Signals that the process ignores stay ignored (in background jobs of a script and under nohup, for example).

    Attributes:
        signal: number of the signal, or None.
        agreed: whether all workers know that one of them was interrupted.
    """

    def __init__(self):
        self.signal, self.agreed = None, False

    def agree(self) -> None:
        """Records that some worker was interrupted; all workers learn so after the same iteration."""
        self.agreed, self.signal = True, self.signal or signal.SIGTERM

    def __enter__(self) -> 'Interruption':
        self._before = {number: signal.getsignal(number) for number in TERMINATION_SIGNALS}
        self._handle(self._record)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, handler):
        for number, before in self._before.items():
            if before != signal.SIG_IGN:
                signal.signal(number, handler)

    def _record(self, number, frame):
        self.signal = number
        self._handle(signal.SIG_DFL)
        for hangup in set(TERMINATION_SIGNALS) - {signal.SIGINT, signal.SIGTERM}:
            signal.signal(hangup, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b'\nFinishing the current iteration and saving it; a second signal ends the program at once.\n')

"""Stopping on SIGINT and SIGTERM without losing work."""
import contextlib
import os
import signal


class Interruption:
    """While entered, the first SIGINT or SIGTERM is recorded in `signal`, and the second ends the process at once.

    Signals that the process ignores stay ignored (in background jobs of a script, for example).

    Attributes:
        signal: number of the signal, or None.
        agreed: whether all workers know that one of them was interrupted.
    """

    def __init__(self):
        self.signal, self.agreed = None, False

    def agree(self) -> None:
        """Records that some worker was interrupted; all workers learn so after the same iteration."""
        self.agreed, self.signal = True, self.signal or signal.SIGTERM

    def __enter__(self):
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._handle(self._record)
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, handler):
        for number, before in self._before.items():
            if before != signal.SIG_IGN:
                signal.signal(number, handler)

    def _record(self, number, frame):
        self.signal = number
        self._handle(signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b'\nFinishing the iteration in hand and saving it; a second signal ends the program at once.\n')

"""The progress bar of a training or an evaluation."""
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm


class Progress(tqdm):
    """Iterations per second and remaining time, from `start` to `total`: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, start: int, total: int, shown: bool = True, unit: str = 'it', **others: Any):
        interval = 0.5 if sys.stderr.isatty() else 30
        super().__init__(initial=start, total=total, unit=unit, mininterval=interval, maxinterval=interval, dynamic_ncols=True,
                         disable=not shown, **others)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        with contextlib.suppress(OSError):  # a closed terminal or a full disk must not stop training
            if self.fp.isatty():
                super().display(msg, pos)
            else:
                print(msg or str(self), file=self.fp, flush=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()

    def announce(self, what: str) -> None:
        """Says on a terminal what the next iteration waits for."""
        self.set_description(what, refresh=not self.disable and self.fp.isatty())

    def advance(self, iterations: int, tasks_per_iteration: int, metrics: Sequence[Sequence[float]]) -> None:
        """Counts finished iterations; shows tasks per second and the last of metrics, [before, after adaptation]."""
        if self.disable:
            return
        self.set_description(refresh=False)
        state = self.format_dict
        rate = state['rate'] or (state['n'] + iterations - state['initial']) / max(state['elapsed'], 1e-9)
        tasks = rate * tasks_per_iteration
        latest = [f'{before:.3g} -> {after:.3g}' for before, after, *_ in metrics[-1:]]
        self.set_postfix_str(', '.join([f'{tasks:.{0 if tasks > 10 else 1}f} tasks/s', *latest]), refresh=False)
        self.update(iterations)

    def log(self, line: str) -> None:
        """Prints a line above the bar, if it can be printed."""
        if self.disable:
            return
        with contextlib.suppress(OSError):
            if self.fp.isatty():
                self.write(line)
            else:
                print(line, flush=True)

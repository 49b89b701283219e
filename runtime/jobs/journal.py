"""What a training leaves for reading: console.log, all that it prints, and metrics.csv, the metrics of its console lines."""
import contextlib
import csv
import os
import re
import sys
from typing import Any, TextIO

from runtime.system.console import Console
from runtime.system.files import open_regular, require_regular_file, write_atomically

CONSOLE, METRICS = 'console.log', 'metrics.csv'
_COLUMNS = ['iteration', 'phase', 'before', 'after']


class _Both:
    """A stream that also writes to a file; what cannot be written to the file is left out."""

    def __init__(self, stream: TextIO, file: TextIO):
        self._stream, self._file = stream, Console(file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._file.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._file.flush()
        self._stream.flush()


class Journal(contextlib.ExitStack):
    """While entered, all that is printed goes to console.log too, and `write` adds lines to metrics.csv. Nothing of it is an error."""

    def __init__(self, directory: str, enabled: bool, iteration: int):
        """Of a run that goes on from an iteration: later lines of metrics.csv, which will come again, are removed."""
        super().__init__()
        self._directory, self._enabled, self._iteration, self._metrics = directory, enabled, iteration, None

    def __enter__(self) -> 'Journal':
        if self._enabled:
            with contextlib.suppress(OSError):
                self._keep_until(self._iteration)
                self._metrics = self._open(METRICS)
            with contextlib.suppress(OSError):
                self.enter_context(contextlib.redirect_stdout(_Both(sys.stdout, self._open(CONSOLE))))
        return self

    def _open(self, name):
        path = os.path.join(self._directory, name)
        if os.path.exists(path):
            require_regular_file(path)
        file = open(path, 'a', encoding='utf-8', errors='backslashreplace', newline='', buffering=1)
        self.callback(self._close, file)
        return file

    def _close(self, file):
        with contextlib.suppress(OSError):
            file.close()

    def _keep_until(self, iteration):
        path, rows = os.path.join(self._directory, METRICS), []
        if os.path.exists(path):
            with open_regular(path, encoding='utf-8', errors='replace') as file:  # not by csv, which refuses some damaged files
                lines = (line.rstrip('\n').split(',') for line in file)
                rows = [row for row in lines
                        if len(row) == len(_COLUMNS) and re.fullmatch('[0-9]{1,15}', row[0]) and int(row[0]) <= iteration]
        write_atomically(path, ''.join(','.join(row) + '\n' for row in (_COLUMNS, *rows)).encode())

    def write(self, iteration: int, phase: str, before: float, after: float) -> None:
        """Adds the metric before and after adaptation: in training a mean since the last such line, or of a validation ('metaval')."""
        if self._metrics:
            with contextlib.suppress(OSError):
                csv.writer(self._metrics, lineterminator='\n').writerow([iteration, phase, f'{before:.7g}', f'{after:.7g}'])

"""The standard output and error of the program: errors of output never stop it, file names cannot control the terminal, and what ends
the program is one sentence."""
import contextlib
import os
import signal
import sys
import unicodedata
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from absl.flags import Error

from runtime.system.errors import UserError
from runtime.system.interruption import TERMINATION_SIGNALS, Interrupted

ASCII = str.maketrans({'±': '+-', '→': '->'})  # what to print where an encoding lacks these


def printable(text: str) -> str:
    """The text with escapes, like \\x1b, for control and invalid characters; lines are kept.

    A carriage return at the beginning is kept too: with it a progress bar returns to the beginning of its line.
    """
    if text.isprintable():
        return text
    kept = '\r' if text.startswith('\r') else ''
    return kept + ''.join(character if character.isprintable() or character == '\n' or unicodedata.category(character) == 'Zs'
                          else character.encode('unicode_escape').decode() for character in text[len(kept):])


class Console:
    """A text stream on which what cannot be written is left out: on a full disk, a closed terminal, in another encoding.

    Only a closed pipe is reported, by BrokenPipeError.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._left_out():
            self._stream.write(self._encodable(printable(text)))
        return len(text)

    def flush(self) -> None:
        with self._left_out():
            self._stream.flush()

    @contextlib.contextmanager
    def _left_out(self):
        try:
            yield
        except BrokenPipeError:
            raise
        except (OSError, ValueError):  # ValueError: the stream is closed
            pass

    def _encodable(self, text):
        encoding = self._stream.encoding or 'utf-8'
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            return text.translate(ASCII).encode(encoding, 'backslashreplace').decode(encoding)
        return text


def protect() -> None:
    """Makes sys.stdout and sys.stderr Consoles, and gives file descriptors to standard streams that were closed.

    Else the next file that is opened would get the descriptor of the closed one, and with it what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for number, name in (1, 'stdout'), (2, 'stderr'):
        stream = getattr(sys, name) or open(number, 'w', closefd=False)
        setattr(sys, name, Console(stream))


def run(main: Callable[[list[str]], None], name: str) -> None:
    """Calls the main of a program of that name with its arguments. What ends it is one sentence and a status: 1, or that of a signal."""
    protect()
    for ending in TERMINATION_SIGNALS:
        if ending != signal.SIGINT and signal.getsignal(ending) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(ending, _end)
    try:
        main(sys.argv)
        sys.stdout.flush()
    except (UserError, Error) as error:
        sys.exit(f'{name}: ' + str(error).replace('\n', ' '))
    except MemoryError as error:
        sys.exit(f'{name}: there is not enough memory for what the flags ask for ({error})')
    except KeyboardInterrupt:
        print('Interrupted.', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        end_of_pipe()
    except OSError as error:
        sys.exit(f'{name}: {error}')


def _end(number, _):
    raise Interrupted(128 + number)  # so that unfinished files are removed


def end_of_pipe() -> NoReturn:
    """Ends a program whose reader has closed its output, as `head` does, with the status of SIGPIPE."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python must not try to write the rest
    sys.exit(128 + 13)

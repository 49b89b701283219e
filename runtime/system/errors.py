"""The one exception for mistakes that a user can correct. It is raised where the mistake is found and printed by main.py. And words for
its messages."""
import re
from collections.abc import Sequence


class UserError(Exception):
    """A mistake that the user can correct. The message is one sentence: what is wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without TensorFlow's decoration; of Keras's, which names the layer first, with the next."""
    text = re.sub('\x1b\\[\\d*m', '', str(error)) or type(error).__name__
    text = re.sub(r'^Exception encountered when calling (.*)\.\n+', r'in \1: ', text)
    return re.sub(r'\{\{.*?\}\} ?| ?\[Op:.*', '', text.splitlines()[0]).strip()


def counted(number: int, name: str) -> str:
    """Text: '1 file', '2 files'."""
    return f'{number} {name}{"" if number == 1 else "s"}'


def listing(texts: Sequence[str], shown: int, separator: str = '; ') -> str:
    """Text: the first of some texts, and how many more there are."""
    return separator.join([*texts[:shown], *([f'and {len(texts) - shown} more'] if len(texts) > shown else [])])

"""Declaring, parsing and documenting flags.

main.py declares each flag once. A flag that changes what is learnt is declared with a `Learning`, from which follow the identity
of a run (what it can be resumed with), the name of its directory and the page docs/flags.md. `only` says what a flag is for,
keys of request.PURPOSES: given for anything else, it is refused.
"""
import dataclasses
import functools
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from runtime.system.errors import UserError
from runtime.system.files import open_regular

FLAGS = flags.FLAGS
GROUPS: dict[str, list[str]] = {}           # {title: names of flags}
BUILT_IN_NETWORKS = 'norm', 'norm_scale', 'num_filters', 'conv', 'max_pool', 'hidden'  # flags that say nothing with --network
LEARNING: dict[str, 'Learning'] = {}        # {name: declaration} of flags that change what is learnt
ONLY: dict[str, list[str]] = {}             # {name: purposes} of flags that are not for everything
REMOVED = 'train_num_classes', 'train_inner_batch', 'train_query_norm', 'train_datasource'  # flags of earlier versions
REFERENCE_ORDER = ('num_filters', 'max_pool', 'stop_grad', 'baseline', 'norm')  # of labels in the reference's directory names
flags.disclaim_key_flags()  # main.py's flags are its own, although they are declared by functions of this module


@dataclasses.dataclass(frozen=True)
class Learning:
    """How a flag that changes what is learnt identifies a run."""
    # What a value other than the default adds to the directory's name, {} being the value; or a function of the value; or
    # {value: text}, which applies to the default too. '': nothing.
    label: str | Mapping[str, str] | Callable[[Any], str] = ''
    # The networks that differ by it, whose weights fit no others: 'all', or a key of request.PURPOSES; None: it says how they are
    # trained.
    network: str | None = None


class CommandLine(NamedTuple):
    """A parsed command line."""
    values: dict[str, Any]      # of all flags of this program
    given: frozenset[str]       # the names of those that it has
    rest: list[str]             # arguments that are not flags


def _declare(define, name, default, text, learning=None, only='', **options):
    define(name, default, help=text, **options)
    GROUPS[next(reversed(GROUPS))].append(name)
    if learning:
        LEARNING[name] = learning
    if only:
        ONLY[name] = only.split(', ')


def number(name: str, default: int, text: str, at_least: int, learning: Learning | None = None, only: str = '') -> None:
    """Declares a flag that takes a whole number."""
    _declare(flags.DEFINE_integer, name, default, text, learning, only, lower_bound=at_least, upper_bound=2 ** 31 - 1)


def choice(name: str, default: str, values: Iterable[str], text: str, learning: Learning | None = None, only: str = '') -> None:
    """Declares a flag that takes one of some values."""
    _declare(flags.DEFINE_enum, name, default, text, learning, only, enum_values=list(values))


real, boolean, string, strings = (functools.partial(_declare, define) for define in (
    flags.DEFINE_float, flags.DEFINE_bool, flags.DEFINE_string, flags.DEFINE_multi_string))


def group(title: str) -> None:
    """Puts the flags declared from here on under a title."""
    GROUPS[title] = []


def names() -> list[str]:
    """The names of this program's flags, sorted; without --help, and without those that libraries define."""
    return sorted(set().union(*GROUPS.values()) - {'help'})


def default(name: str) -> Any:
    """The default of a flag; None if there is no such flag."""
    return FLAGS[name].default if name in FLAGS else None


def parse(argv: Sequence[str]) -> CommandLine:
    """Parses a command line, whose first argument is the program's name; raises UserError or absl.flags.Error for what is wrong."""
    FLAGS.unparse_flags()
    try:
        _refuse_pipes('\n'.join(argv), set())
        rest = FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        if error.flagname not in REMOVED:
            raise
        raise UserError(f'--{error.flagname} is no longer a flag: write --run=DIR, which knows what the model was trained with, and the '
                        'flag without train_ for the evaluation') from error
    except flags.IllegalFlagValueError as error:
        raise UserError(_plain(str(error))) from error
    except OSError as error:
        raise UserError(f'--flagfile={error.filename} cannot be read: {error.strerror}') from error
    except RecursionError as error:  # absl looks for similar names
        raise UserError('a flag has a name of thousands of characters; write --name=value, one a line in a --flagfile') from error
    except UnicodeDecodeError as error:
        raise UserError('--flagfile is not a text file; it should have one --name=value a line, as those in configs/') from error
    except ValueError as error:  # absl's, of --noname=value
        raise UserError(str(error)) from error
    return CommandLine({name: FLAGS[name].value for name in [*names(), 'help']},
                       frozenset(name for name in names() if FLAGS[name].present), rest)


def _refuse_pipes(arguments, seen):
    """Refuses what is not a regular file among the files of flags in a text of arguments, one a line, and those that they name:
    reading it could block."""
    for path in map(os.path.expanduser, re.findall(r'^\s*--?flagfile[=\n](.*\S)', arguments, re.M)):
        if path.startswith(('/dev/fd/', '/dev/stdin')) or path in seen:  # a shell's <(...) is a pipe, but somebody writes into it
            continue
        seen.add(path)
        with open_regular(path, encoding='utf-8') as file:
            text = file.read()
        if re.search(r'^([ \t]+--?flagfile\b|--?flagfile[ \t]*$)', text, re.M):  # which absl ignores
            raise UserError(f'{path}: a --flagfile in a file of flags must be written as --flagfile=NAME, at the beginning of its line')
        _refuse_pipes(text, seen)


def _plain(message):
    """absl's message on a flag's value, without Python's own message within it."""
    for theirs, ours in (("\\('Non-boolean argument.*", 'it must be True or False'),
                         ('invalid literal.*', 'it must be a whole number'),
                         ('could not convert.*', 'it must be a number')):
        message = re.sub(theirs, ours, message)
    return message


def help_text(usage: str) -> str:
    """The usage and, by groups, every flag with its default and meaning."""
    width = min(shutil.get_terminal_size((118, 24)).columns, 118)
    lines = [usage + '\nFlags, and their defaults:']
    for title, members in GROUPS.items():
        lines += ['', f'  {title}', '']
        for flag in map(FLAGS.__getitem__, members):
            head = f'--{flag.name}' + ('' if flag.default is None or flag.name == 'help' else f'={flag.default}')
            lines += textwrap.wrap(flag.help, width=max(width, 70), initial_indent=f'    {head:32}  ',
                                   subsequent_indent=' ' * 38, break_on_hyphens=False)
    return '\n'.join(lines)


# What follows from the declarations ---------------------------------------------------------------------------------

def labels(values: Mapping[str, Any]) -> str:
    """The part of a run directory's name that the labels of flags make: the reference's first, in its order."""
    ordered = [*REFERENCE_ORDER, *(name for name in LEARNING if name not in REFERENCE_ORDER)]
    return ''.join(_label(LEARNING[name].label, values[name], FLAGS[name].default) for name in ordered)


def _label(label, value, default):
    if isinstance(label, Mapping):
        return label.get(value, '')
    if value in (default, 'None'):
        return ''
    return label(value) if callable(label) else label.format(re.sub(r'[^\w.+-]', '-', str(value))[:60])

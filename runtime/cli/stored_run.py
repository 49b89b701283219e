"""What a training writes into its directory for --run=DIR: the flags that describe it, and the columns of its tables."""
import glob
import math
import os
from collections.abc import Mapping
from typing import Any

from absl import flags

from runtime.cli.flags import GROUPS, default, parse
from runtime.cli.network_file import NetworkFile, write_copy
from runtime.datasets.lists import list_paths
from runtime.datasets.tables import Columns, write_columns
from runtime.system.errors import UserError, counted, first_line
from runtime.system.files import write_atomically

FLAG_FILE = 'run.flags'
SHOWN_RUNS = 12  # of a folder that holds several
_GROUPS = 'Data', 'Training', 'Method', 'Network'  # the groups of flags that FLAG_FILE holds
_PATHS = 'data_path', 'load_from'  # written as absolute ones, for they are read in other folders too


def describing_flags() -> list[str]:
    """The names of the flags that describe a run."""
    return [*(name for group in _GROUPS for name in GROUPS[group] if name != 'method'), 'test_updates', 'load_from']


def description(values: Mapping[str, Any]) -> str:
    """The contents of FLAG_FILE: a line for each flag that is not at its default."""
    paths = {name: os.path.abspath(os.path.expanduser(values[name])) for name in _PATHS if values[name]}
    if values['split_file']:
        paths['split_file'] = ','.join(map(os.path.abspath, list_paths(values['split_file'])))
    return ''.join(f'--{name}={paths.get(name, values[name])}\n' for name in describing_flags() if values[name] != default(name))


def write(directory: str, text: str, columns: Columns | None, network: NetworkFile | None) -> None:
    """Writes a `description` and comments, or reports that it cannot; and the columns of tables and a network of one's own, or raises
    UserError: they are part of the model."""
    if network:
        write_copy(directory, network)
    if columns:
        try:
            write_columns(directory, columns)
        except OSError as error:
            raise UserError(f'the columns cannot be written to {directory}: {error.strerror}') from error
    path = os.path.join(directory, FLAG_FILE)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        print(f'{path}, for --run, cannot be written: {error.strerror}')


def find(name: str) -> str:
    """The experiment directory that --run=name means: that folder itself, or the only run in it; raises UserError if there is none."""
    directory = os.path.expanduser(name)
    if os.path.isfile(os.path.join(directory, FLAG_FILE)):
        return os.path.normpath(directory)
    if not os.path.isdir(directory):
        raise UserError(f'--run={name}: there is no such folder')
    runs = sorted(entry.path for entry in os.scandir(directory) if os.path.isfile(os.path.join(entry.path, FLAG_FILE)))
    if len(runs) == 1:
        return os.path.normpath(runs[0])
    runs = [os.path.basename(run) for run in runs] or sorted(
        os.path.dirname(path) for path in glob.glob(os.path.join('*', '*', FLAG_FILE), root_dir=directory))
    shown = ', '.join(runs[:SHOWN_RUNS]) + (', ...' if len(runs) > SHOWN_RUNS else '')
    problem = f'holds {counted(len(runs), "run")} ({shown}): name one' if runs else (
        f'holds no {FLAG_FILE}, which trainings write: give the flags of the training instead')
    raise UserError(f'--run={name} {problem}')


def read(directory: str) -> dict[str, Any]:
    """{flag: value} of all flags that describe the run in a directory; raises UserError if its FLAG_FILE cannot be read."""
    path = os.path.join(directory, FLAG_FILE)
    try:
        with open(path, encoding='utf-8') as file:
            line = parse([path, *(text for text in file.read().split('\n') if text.strip() and not text.startswith('#'))])
        values = {name: line.values[name] for name in describing_flags()}
        if line.rest or line.given - values.keys() or any(isinstance(value, float) and not math.isfinite(value)
                                                          for value in values.values()):
            raise ValueError('it has something else than flags that describe a run')
        return values
    except (OSError, ValueError, UserError, flags.Error) as error:
        raise UserError(f'{path} cannot be read, or no training wrote it ({first_line(error)}); give the flags of the training '
                        'instead of --run') from error

"""The files of an evaluation, and its table."""
import codecs
import contextlib
import csv
import io
import json
import os
import pickle

import filelock
import numpy as np

from runtime.errors import UserError
from runtime.files import refuse_no_file, write_atomically
from runtime.statistics import UNITS, bootstrap, statistics

FILE = 'results.json'
SPLIT_TITLES = {'val': 'meta-validation', 'test': 'meta-test'}


def table(evaluations: dict[str, np.ndarray], metric: str) -> str:
    """Text: for each number of updates the mean and its 95% interval.

    Args:
        evaluations: {label: values [tasks, 1 + updates]}, one column each; the label of a single one is not shown.
        metric: one of UNITS.
    """
    title, factor, digits = UNITS[metric]
    lines = [f'  updates  {title}, with its 95% interval']
    if len(evaluations) > 1:
        lines.append(' ' * 11 + ''.join(f'{label:24}' for label in evaluations))
    columns = [[f'{mean * factor:8.{digits}f} ± {half * factor:.{digits}f}' for mean, _, half in zip(*statistics(values))]
               for values in evaluations.values()]
    for updates, cells in enumerate(zip(*columns)):
        lines.append(f'  {updates:7d}  ' + ''.join(f'{cell:24}' for cell in cells).rstrip())
    lines.append('  (0: support examples, before adaptation)')
    for label, values in evaluations.items():
        diverged = np.sum(~np.isfinite(values).all(axis=1))
        if diverged:
            where = f', {label}' if len(evaluations) > 1 else ''
            lines.append(f'Adaptation diverged on {diverged} of {len(values)} tasks{where}: lower --update_lr')
    return '\n'.join(lines)


def write(directory: str, name: str, values: np.ndarray, facts: dict) -> None:
    """Writes an evaluation to <name>.csv and <name>.pkl, as the reference does, and adds it to results.json.

    Args:
        name: of the csv file (header update0,update1,..., rows mean, std, ci95) and of the pickle ({'mses': values}).
        values: [tasks, 1 + updates], as returned by `evaluation.task_metrics`.
        facts: what was evaluated and how. `facts['tasks']` says on which tasks; evaluations on the same tasks can be compared.

    Raises:
        OSError: a file cannot be written.
        UserError: there is a results.json that cannot be read.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([f'update{updates}' for updates in range(values.shape[1])])
    writer.writerows(statistics(values))
    write_atomically(os.path.join(directory, name + '.csv'), text.getvalue().encode())
    write_atomically(os.path.join(directory, name + '.pkl'), lambda file: pickle.dump({'mses': values}, file))

    columns = zip(*(statistic.tolist() for statistic in statistics(values)), bootstrap(values).tolist())
    updates = [dict(zip(('mean', 'std', 'ci95', 'bootstrap95'), column)) for column in columns]
    path = os.path.join(directory, FILE)
    entry = {f'{name}, {facts["tasks"]["split"]}': {**facts, 'updates': updates, 'scores': values.tolist()}}
    with _lock(directory):  # evaluations that end together must not lose each other's entries
        entries = {**existing(directory), **entry}
        # Piece by piece: the text of many tasks' figures is larger in memory than the figures.
        write_atomically(path, lambda file: json.dump(entries, codecs.getwriter('ascii')(file), indent=1))


@contextlib.contextmanager
def _lock(directory: str):
    """Keeps other processes from changing results.json while entered."""
    lock = filelock.FileLock(os.path.join(directory, '.results.lock'))
    with contextlib.suppress(NotImplementedError):  # file systems without locks
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def existing(directory: str) -> dict[str, dict]:
    """The entries of a directory's results.json; {} if there is none. Raises UserError as `read`."""
    path = os.path.join(directory, FILE)
    return read(path) if os.path.exists(path) else {}


def read(path: str) -> dict[str, dict]:
    """{evaluation: its facts and figures} of a results.json.

    Raises:
        UserError: it cannot be read, or is malformed.
    """
    try:
        refuse_no_file(path)
        with open(path, encoding='utf-8') as file:
            results = json.load(file)
        for entry in results.values():
            if not isinstance(entry['tasks'], dict) or np.ndim(np.array(entry['scores'], float)) != 2:
                raise ValueError('an entry is not that of an evaluation')
            entry['checkpoint'] = str(entry['checkpoint'])
            UNITS[entry['score']], entry['tasks']['split'], entry['tasks']['datasource']  # raises KeyError if missing
        return results
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f'{path} cannot be read, or no evaluation wrote it ({type(error).__name__}); remove it and evaluate '
                        'again') from error

"""The files of an evaluation, and its table."""
import codecs
import contextlib
import csv
import errno
import io
import json
import os
import pickle
import zlib

import numpy as np

from runtime.results.statistics import UNITS, bootstrap, number, statistics
from runtime.system.errors import UserError
from runtime.system.files import locked, require_regular_file, write_atomically

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
    columns = [[f'{number(mean * factor, digits):>8} ± {number(half * factor, digits)}' for mean, _, half in zip(*statistics(values))]
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


def write(directory: str, name: str, values: np.ndarray, facts: dict) -> tuple[str, str]:
    """Writes an evaluation to <file>.csv and <file>.pkl, as the reference does, and adds it to results.json.

    The csv file has the header update0,update1,... and the rows mean, std, ci95; the pickle holds {'mses': values}. Nothing of
    another evaluation is overwritten: the files of another split or of other images keep their names, and those of an earlier
    checkpoint that was evaluated under this name get a name that ends with the checkpoint's.

    Args:
        name: of the evaluation.
        values: [tasks, 1 + updates], as returned by `evaluation.task_metrics`.
        facts: what was evaluated and how. `facts['tasks']` says on which tasks; evaluations on the same tasks can be compared.

    Returns:
        The name that the evaluation got, and that of its files. They are `name`, unless another evaluation has it.

    Raises:
        OSError: a file cannot be written.
        UserError: there is a results.json that cannot be read.
    """
    columns = zip(*(statistic.tolist() for statistic in statistics(values)), bootstrap(values).tolist())
    updates = [dict(zip(('mean', 'std', 'ci95', 'bootstrap95'), column)) for column in columns]
    if not os.path.isdir(directory):  # the lock would make it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory)
    with locked(os.path.join(directory, '.results.lock')):  # evaluations that end together must not lose each other's entries
        entries = existing(directory)
        name, file = _claim(entries, name, facts)
        _keep_earlier(directory, entries, name, facts)
        entries[_key(name, facts)] = {'file': file, **facts, 'updates': updates, 'scores': values.tolist()}
        _write_files(os.path.join(directory, file), values)
        # Piece by piece: the text of many tasks' figures is larger in memory than the figures.
        write_atomically(os.path.join(directory, FILE), lambda file: json.dump(entries, codecs.getwriter('ascii')(file), indent=1))
    return name, file


def _write_files(path: str, values: np.ndarray) -> None:
    """Writes <path>.csv and <path>.pkl of an evaluation."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([f'update{updates}' for updates in range(values.shape[1])])
    writer.writerows(statistics(values))
    write_atomically(path + '.csv', text.getvalue().encode())
    write_atomically(path + '.pkl', lambda file: pickle.dump({'mses': values}, file))


def _key(name, facts):
    return f'{name}, {facts["tasks"]["split"]}'


def _file(key, entry):
    return entry.get('file', key.removesuffix(_key('', entry)))


def _claim(entries: dict[str, dict], name: str, facts: dict) -> tuple[str, str]:
    """Names for an evaluation and for its files that no other evaluation among `entries` has."""
    def source(entry):
        return [entry['tasks'], entry.get('flags', {}).get('load_from')]

    holder = entries.get(_key(name, facts), facts)
    if source(holder) != source(facts):  # other images, or weights from elsewhere
        name += f'_{zlib.crc32(json.dumps(source(facts), sort_keys=True).encode()):08x}'
    taken = {_file(key, entry) for key, entry in entries.items() if key != _key(name, facts)}
    return name, f'{name}_{facts["tasks"]["split"]}' if name in taken else name


def _keep_earlier(directory: str, entries: dict[str, dict], name: str, facts: dict) -> None:
    """If another checkpoint was evaluated under a name, renames that evaluation and its pictures, and writes its files anew.

    They are not renamed: if the program was killed after it had written the files of this evaluation, and before results.json,
    they are not those of the earlier one.
    """
    earlier = entries.get(_key(name, facts))
    if earlier is None or _weights(earlier) == _weights(facts):
        return
    checkpoint = '_'.join(map(str, _weights(earlier)))
    file, split = _file(_key(name, facts), earlier), facts['tasks']['split']
    other, other_file = _claim(entries, f'{name}_{checkpoint}', earlier)
    _write_files(os.path.join(directory, other_file), np.array(earlier['scores']))
    for suffix in '.csv', '.pkl':
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(directory, file + suffix))
    renamed = [(f'{name}_{split}_{picture}', f'{other}_{split}_{picture}')
               for picture in ('updates.png', 'updates.pdf', 'updates.svg', 'tasks.png', 'tasks.pdf', 'tasks.svg')]
    for old, new in renamed:
        with contextlib.suppress(FileNotFoundError):
            os.replace(os.path.join(directory, old), os.path.join(directory, new))
    del entries[_key(name, facts)]
    entries[_key(other, facts)] = {**earlier, 'file': other_file}


def _weights(entry):
    """The checkpoint that was evaluated, and the iterations of the others that made an ensemble with it."""
    return [os.path.basename(entry['checkpoint']), *entry.get('ensemble', [])[1:]]


def existing(directory: str) -> dict[str, dict]:
    """The entries of a directory's results.json; {} if there is none. Raises UserError as `read`."""
    path = os.path.join(directory, FILE)
    return read(path) if os.path.exists(path) else {}


def read(path: str) -> dict[str, dict]:
    """{evaluation: its description and figures} of a results.json.

    Raises:
        UserError: it cannot be read, or is malformed.
    """
    try:
        require_regular_file(path)
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

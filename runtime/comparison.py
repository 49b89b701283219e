"""Evaluations of several runs side by side."""
import glob
import json
import os
import string
import sys
from collections.abc import Sequence

import numpy as np

from runtime.errors import UserError
from runtime.results import FILE, SPLIT_TITLES, read
from runtime.statistics import UNITS, interval, p_value

# Flags that do not influence the figures of an evaluation, or that the method's name tells.
NOT_COMPARED = {'logdir', 'data_path', 'resume', 'log', 'plot', 'save_interval', 'skip_nonfinite', 'engine', 'task_chunk',
                'strategy', 'train', 'baseline', 'stop_grad', 'pretrain_iterations', 'metatrain_iterations', 'run'}


def compare(folders: Sequence[str], plot: bool = False) -> str:
    """Text: the evaluations of several runs side by side, as far as they were made on the same tasks.

    The difference of two runs is that of their values on each task, averaged. Its interval, and the p-value of a paired t-test,
    are narrower than those of the runs by themselves, because a task that is hard for one run is hard for the other.

    Args:
        folders: experiment directories, or folders of such.
        plot: also draw the values against updates, into comparison.png in the first folder.

    Raises:
        UserError: there are no results, or no two evaluations were made on the same tasks.
    """
    groups = _groups(folders)
    comparable = [group for group in groups if len(group) > 1]
    single = '; '.join(f'{label} on {_describe(entry["tasks"])}'
                       for group in groups if len(group) == 1 for label, entry in group.items())
    if not comparable:
        raise UserError(f'there is only one evaluation, {single}; evaluate another run on the same tasks' if len(groups) == 1
                        else f'no two evaluations were made on the same tasks: {single}')
    text = [_side_by_side(group) for group in comparable]
    if single:
        text.append(f'Left out, for nothing else was evaluated on the same tasks: {single}')
    for number, group in enumerate(comparable if plot else (), start=1):
        from runtime import plots  # imported late: matplotlib is slow to import, and only --plot needs it
        path = os.path.join(folders[0], f'comparison{number if len(comparable) > 1 else ""}.png')
        values = {label: np.array(entry['scores'], float) for label, entry in zip(_short(group), group.values())}
        plots.save(plots.curves(values, next(iter(group.values()))['score']), path)
        text.append(f'Drawn: {path}')
    return '\n\n'.join(text)


def _groups(folders: Sequence[str]) -> list[dict[str, dict]]:
    """The evaluations in the folders, as [{label: entry}], those on the same tasks together."""
    groups, without = {}, []
    for folder in folders:
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), FILE))
                       + glob.glob(os.path.join(glob.escape(folder), '*', FILE)))
        without += [] if paths else [folder]
        for path in paths:
            for name, entry in read(path).items():
                name = os.path.join(os.path.dirname(path), name.removesuffix(f', {entry["tasks"]["split"]}'))
                label = f'{name}, {os.path.basename(entry["checkpoint"])}'
                groups.setdefault(json.dumps([entry['tasks'], entry['score']], sort_keys=True), {})[label] = entry
    if without:
        missing = f'there is no {FILE} in {", ".join(without)} or a folder in it; evaluate first, with --train=False'
        if len(without) == len(folders):
            raise UserError(missing)
        print(f'Warning: {missing}', file=sys.stderr)
    return list(groups.values())


def _describe(tasks):
    way = f'{tasks["num_classes"]}-way ' if tasks.get('num_classes') else ''
    return (f'{tasks.get("count")} tasks of {tasks["datasource"]}, {SPLIT_TITLES.get(tasks["split"], tasks["split"])}, '
            f'{way}{tasks.get("update_batch_size")}-shot, {tasks.get("query_shots")} query, '
            f'seed {tasks.get("seed")}')


def _side_by_side(entries):
    """The table of {label: entry} on the same tasks."""
    first = next(iter(entries.values()))
    title, factor, digits = UNITS[first['score']]
    scores = [np.array(entry['scores'], float) * factor for entry in entries.values()]
    letters = _letters(entries)
    lines = [f'{_describe(first["tasks"])}: {title}', '']
    lines += [f'  {letter}  {label}' for letter, label in zip(letters, entries)]
    lines += ['', '  updates' + ''.join(f'{letter:>18}' for letter in letters)
              + ''.join(f'{f"{letter} - A":>18}{"p":>9}' for letter in letters[1:])]
    for updates in range(min(values.shape[1] for values in scores)):
        columns = [values[:, updates] for values in scores]
        row = f'  {updates:7d}' + ''.join(f'{interval(column, digits):>18}' for column in columns)
        for column in columns[1:]:
            row += f'{interval(column - columns[0], digits):>18}{p_value(column, columns[0]):9.2g}'
        lines.append(row)
    return '\n'.join(lines)


def _letters(entries):
    return [string.ascii_uppercase[number] if number < 26 else str(number) for number in range(len(entries))]


def _short(entries):
    """For each of {label: entry} its letter, and its method if only that differs, or those parts of the label's path that do."""
    labels, methods = list(entries), [entry.get('method') for entry in entries.values()]
    flags = [entry.get('flags', {}) for entry in entries.values()]
    differing = {name for name in set().union(*flags) - NOT_COMPARED if len({str(one.get(name)) for one in flags}) > 1}
    if len(set(methods)) == len(methods) and not differing:
        return [f'{letter}: {method}' for letter, method in zip(_letters(labels), methods)]
    columns = list(zip(*(os.path.normpath(label).split(os.sep)[::-1] for label in labels)))[::-1]
    paths = list(zip(*(column for column in columns if len(set(column)) > 1))) or list(zip(*columns))
    return [f'{letter}: {os.sep.join(parts)[-80:]}' for letter, parts in zip(_letters(labels), paths)]

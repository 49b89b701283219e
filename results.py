"""What an evaluation found: a table, files of it, and runs side by side."""
import csv
import glob
import io
import json
import os
import pickle
import string
import sys

import numpy as np
from scipy import stats

from data_generator import UserError, write_aside

FILE = 'results.json'
RESAMPLES = 2000
UNITS = {'accuracy': ('accuracy in %', 100, 2), 'loss': ('mean squared error', 1, 4)}  # {score: (title, factor, digits)}
# Flags that make no difference to what an evaluation finds, or are told by the method's name.
UNSAID = {'logdir', 'data_path', 'resume', 'log', 'plot', 'save_interval', 'skip_nonfinite', 'engine', 'task_chunk', 'strategy',
          'train', 'baseline', 'stop_grad', 'pretrain_iterations', 'metatrain_iterations'}
SPLITS = {'val': 'meta-validation', 'test': 'meta-test'}


def statistics(values):
    """Mean, standard deviation and half-width of the 95% interval of the mean over tasks.

    Args:
        values: [tasks, columns].

    Returns:
        Three arrays [columns]; the standard deviation divides by the number of tasks, the last is 1.96 * std / sqrt(tasks).
    """
    with np.errstate(invalid='ignore', over='ignore'):  # of tasks on which adaptation diverged
        std = values.std(axis=0)
        return values.mean(axis=0), std, 1.96 * std / np.sqrt(len(values))


def bootstrap(values):
    """95% interval of the mean over tasks by the percentile bootstrap (Efron & Tibshirani, 1993, chapter 13).

    Args:
        values: [tasks, columns].

    Returns:
        Array [columns, 2] of its ends; the same ones each time.
    """
    if len(values) < 2:
        return np.repeat(values.T, 2, axis=1)
    with np.errstate(invalid='ignore', over='ignore'):
        interval = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method='percentile', batch=100,
                                   random_state=np.random.default_rng(0)).confidence_interval
    return np.stack([interval.low, interval.high], axis=1)


def table(evaluations, score):
    """Text: for each number of updates the mean and its 95% interval.

    Args:
        evaluations: {label: values [tasks, 1 + updates]}, a column each; a single one needs no label.
        score: one of UNITS.
    """
    title, factor, digits = UNITS[score]
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


def write(directory, name, values, facts):
    """Writes what an evaluation found to <name>.csv and <name>.pkl, as the reference does, and adds it to results.json.

    Args:
        name: of the csv file (header update0,update1,..., rows mean, std, ci95) and of the pickle ({'mses': values}).
        values: [tasks, 1 + updates], as returned by `evaluation.task_scores`.
        facts: dict of what was evaluated and how. `facts['tasks']` says which tasks; evaluations on the same can be compared.

    Raises:
        OSError: a file cannot be written.
        UserError: there is a results.json that cannot be read.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([f'update{updates}' for updates in range(values.shape[1])])
    writer.writerows(statistics(values))
    write_aside(os.path.join(directory, name + '.csv'), lambda file: file.write(text.getvalue().encode()))
    write_aside(os.path.join(directory, name + '.pkl'), lambda file: pickle.dump({'mses': values}, file))

    columns = zip(*(statistic.tolist() for statistic in statistics(values)), bootstrap(values).tolist())
    updates = [dict(zip(('mean', 'std', 'ci95', 'bootstrap95'), column)) for column in columns]
    path = os.path.join(directory, FILE)
    results = {**(_read(path) if os.path.exists(path) else {}),
               f'{name}, {facts["tasks"]["split"]}': {**facts, 'updates': updates, 'scores': values.tolist()}}
    write_aside(path, lambda file: file.write(json.dumps(results, indent=1).encode()))


def _read(path):
    """{evaluation: dict} of a results.json."""
    try:
        with open(path, encoding='utf-8') as file:
            results = json.load(file)
        for entry in results.values():
            if not isinstance(entry['tasks'], dict) or np.ndim(np.array(entry['scores'], float)) != 2:
                raise ValueError('an entry is not that of an evaluation')
            entry['checkpoint'] = str(entry['checkpoint'])
            UNITS[entry['score']], entry['tasks']['split'], entry['tasks']['datasource']  # are there
        return results
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{path} cannot be read, or no evaluation wrote it ({type(error).__name__}); remove it and evaluate '
                        'again') from error


def compare(folders, plot=False):
    """Text: the evaluations of several runs side by side, as far as they were made on the same tasks.

    The difference of two runs is that of their scores on each task, averaged; its interval, and the p-value of a paired t-test,
    are narrower than those of the runs by themselves, for a task that is hard for one is hard for the other.

    Args:
        folders: experiment directories, or folders of such.
        plot: draw the scores against updates as well, into comparison.png in the first folder.

    Raises:
        UserError: there are no results, or no two evaluations were made on the same tasks.
    """
    groups, without = {}, []
    for folder in folders:
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), FILE))
                       + glob.glob(os.path.join(glob.escape(folder), '*', FILE)))
        without += [] if paths else [folder]
        for path in paths:
            for name, entry in _read(path).items():
                name = os.path.join(os.path.dirname(path), name.removesuffix(f', {entry["tasks"]["split"]}'))
                label = f'{name}, {os.path.basename(entry["checkpoint"])}'
                groups.setdefault(json.dumps(entry['tasks'], sort_keys=True), {})[label] = entry
    if without:
        missing = f'there is no {FILE} in {", ".join(without)} or a folder in it; evaluate first, with --train=False'
        if len(without) == len(folders):
            raise UserError(missing)
        print(f'main.py: {missing}', file=sys.stderr)
    comparable = [group for group in groups.values() if len(group) > 1]
    single = '; '.join(f'{label} on {_describe(entry["tasks"])}'
                       for group in groups.values() if len(group) == 1 for label, entry in group.items())
    if not comparable:
        raise UserError(f'there is only one evaluation, {single}; evaluate another run on the same tasks' if len(groups) == 1
                        else f'no two evaluations were made on the same tasks: {single}')
    text = [_side_by_side(group) for group in comparable]
    if single:
        text.append(f'Left out, for nothing else was evaluated on the same tasks: {single}')
    for number, group in enumerate(comparable if plot else (), start=1):
        import pictures
        path = os.path.join(folders[0], f'comparison{number if len(comparable) > 1 else ""}.png')
        entries = {label: np.array(entry['scores'], float) for label, entry in zip(_short(group), group.values())}
        pictures.save(pictures.curves(entries, next(iter(group.values()))['score']), path)
        text.append(f'Drawn: {path}')
    return '\n\n'.join(text)


def _describe(tasks):
    way = f'{tasks["num_classes"]}-way ' if tasks.get('num_classes') else ''
    return (f'{tasks.get("count")} tasks of {tasks["datasource"]}, {SPLITS.get(tasks["split"], tasks["split"])}, '
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
        row = f'  {updates:7d}' + ''.join(f'{_interval(column, digits):>18}' for column in columns)
        for column in columns[1:]:
            row += f'{_interval(column - columns[0], digits):>18}{_p_value(column, columns[0]):9.2g}'
        lines.append(row)
    return '\n'.join(lines)


def _letters(entries):
    return [string.ascii_uppercase[number] if number < 26 else str(number) for number in range(len(entries))]


def _short(entries):
    """For each of {label: entry} its letter, and its method if only that differs, or those parts of the label's path that do."""
    labels, methods = list(entries), [entry.get('method') for entry in entries.values()]
    flags = [entry.get('flags', {}) for entry in entries.values()]
    differing = {name for name in set().union(*flags) - UNSAID if len({str(one.get(name)) for one in flags}) > 1}
    if len(set(methods)) == len(methods) and not differing:
        return [f'{letter}: {method}' for letter, method in zip(_letters(labels), methods)]
    columns = list(zip(*(os.path.normpath(label).split(os.sep)[::-1] for label in labels)))[::-1]
    paths = list(zip(*(column for column in columns if len(set(column)) > 1))) or list(zip(*columns))
    return [f'{letter}: {os.sep.join(parts)[-80:]}' for letter, parts in zip(_letters(labels), paths)]


def _interval(column, digits):
    mean, _, half = statistics(column[:, None])
    return f'{mean[0]:.{digits}f} ± {half[0]:.{digits}f}'


def _p_value(one, other):
    """Of a two-sided paired t-test; 1 where there is no difference at all."""
    return 1.0 if np.array_equal(one, other) else stats.ttest_rel(one, other).pvalue

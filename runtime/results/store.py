"""results.json: the store of every evaluation of a run, and the table that an evaluation prints.

The evaluations that ship with a run are in shipped_results.json, which is only read, so that evaluating a shipped run changes no file
that git tracks. The dataclasses below are the schema of both files.
"""
import codecs
import contextlib
import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.results.provenance import Provenance
from runtime.results.statistics import UNITS, bootstrap, figure, statistics
from runtime.system.errors import UserError, first_line
from runtime.system.files import STALE_SECONDS, locked, read_json, remove_parts, write_atomically, write_csv
from runtime.system.schema import checked

FILE, SHIPPED_FILE = 'results.json', 'shipped_results.json'
VERSION = 2
QUERY_WITHOUT_UPDATES = '0 query'  # the title of a column
SPLIT_TITLES = {'val': 'meta-validation', 'test': 'meta-test'}


@dataclasses.dataclass(frozen=True)
class Training:
    """What was trained."""
    method: str                 # its name, for tables
    pretrain_iterations: int
    metatrain_iterations: int
    flags: dict[str, str | int | float | bool | None]  # all flags that determine what is learnt
    provenance: Provenance | None = None  # None: not known, as of weights that an earlier version saved
    newest: int | None = None   # iterations of the run's newest checkpoint; the best is the best of those up to it


@dataclasses.dataclass(frozen=True)
class EvaluationTasks:
    """Everything that draws the tasks of an evaluation: where all of it is equal, evaluations can be compared task by task."""
    datasource: str
    split: str                  # 'val' | 'test'
    num_classes: int | None     # None in regression
    update_batch_size: int      # shots
    query_shots: int
    seed: int
    count: int
    data: int | None            # checksum of the images or tables; None for functions
    facts: dict[str, Any]       # what else changes tasks of this source, such as their image_shape


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a checkpoint was evaluated, beside the tasks."""
    query_norm: str
    update_lr: float
    inner_batch: int
    test_updates: int           # inner updates
    headline_updates: int       # the number of updates at which the method is reported
    load_from: str | None       # absolute prefix of the checkpoint, if it is not one of the run's own
    head: str = 'own'           # the model's 'own' last layer, or in its place the 'nearest class mean' or the 'nearest neighbour'
    permutations: int = 1       # orders of a task's labels
    orders: str = ''            # if there are several: the 'mean' of their accuracies, or that of their 'averaged' outputs
    adapted_by: str = ''        # 'flag=value, ...' of how weights of another run were adapted, where it was otherwise than in training

    @property
    def orders_text(self) -> str:
        """Text: how several orders were taken together; '' if there is one."""
        return f'{self.orders} over {self.permutations} orders' if self.orders else ''


@dataclasses.dataclass(frozen=True)
class Figures:
    """Statistics over tasks after some number of updates, in the unit of the scores."""
    mean: float
    std: float
    ci95: float                 # half-width of the 95% interval of the mean
    bootstrap95: list[float]    # ends of the percentile bootstrap interval
    spread: float | None = None  # of a mean over orders of the labels: their standard deviation, averaged over tasks


@dataclasses.dataclass(frozen=True)
class Entry:
    """An evaluation."""
    checkpoint: str             # name, such as model60000; of an ensemble: the best of its checkpoints
    iterations: int | None      # of the checkpoint; None if not known
    is_best: bool               # this checkpoint had done best on meta-validation when it was evaluated
    ensemble: list[int]         # iterations of the checkpoints whose mean outputs were evaluated; []: of one checkpoint
    training: Training
    tasks: EvaluationTasks
    setting: Setting
    known_classes: list[str]    # classes that the model was trained on, or of another source with the names of such
    metric: str                 # 'accuracy' (a fraction) | 'loss' | 'return'
    seconds: float
    versions: dict[str, str]    # of Python, libraries and this program, and the arithmetic of the evaluation
    figures: list[Figures]      # of each column of `scores`
    scores: list[list[float]]   # [tasks, columns], see `column_titles`
    checksum: int | None = None  # of the checkpoint
    data_path: str | None = None  # absolute, of data of the user's own

    @property
    def headline_column(self) -> int:
        """The column of `scores` at which the method is reported; without updates the last, of query rows or of the only episodes."""
        return self.setting.headline_updates if self.setting.test_updates else len(self.figures) - 1

    def is_after(self, iteration: int) -> bool:
        """Whether a checkpoint of its own run that is newer than that was evaluated."""
        return self.setting.load_from is None and max([self.iterations or 0, *self.ensemble]) > iteration

    @property
    def key(self) -> str:
        """Equal for evaluations of the same checkpoint in the same setting, of which the later replaces the earlier."""
        return json.dumps([self.checkpoint, self.ensemble, self.tasks, self.setting], sort_keys=True, default=_written)


def _written(part: Any) -> dict[str, Any]:
    """The fields of a part of an entry as files have them: those that were added to the schema later only if they say something."""
    return {field.name: value for field in dataclasses.fields(part) if (value := getattr(part, field.name)) != field.default}


def column_titles(test_updates: int) -> list[str]:
    """Of the scores of an evaluation: of support rows before adaptation, and of query rows after each inner update; without updates of
    support rows and of query rows."""
    return [str(updates) for updates in range(test_updates + 1)] if test_updates else ['0', QUERY_WITHOUT_UPDATES]


def figures_of(values: np.ndarray, spread: np.ndarray | None = None) -> list[Figures]:
    """The figures of an Entry, given its scores [tasks, columns], and their spread over orders of the labels, if there are several."""
    spreads = [None] * values.shape[1] if spread is None else spread.mean(axis=0).tolist()
    return [Figures(*column) for column in zip(*(statistic.tolist() for statistic in statistics(values)),
                                               bootstrap(values).tolist(), spreads)]


def table(evaluations: dict[str, np.ndarray], metric: str, without_updates: bool = False) -> str:
    """Text: for each number of updates the mean and its 95% interval, a column for each of {label: values [tasks, columns]},
    whose label is not shown if there is one only. `metric` is one of UNITS; `without_updates`: these are evaluations without
    inner updates."""
    lines = [f'  updates  {UNITS[metric].title}, with its 95% interval']
    width = max(24, *(2 + len(label) for label in evaluations)) if len(evaluations) > 1 else 24
    if len(evaluations) > 1:
        lines.append(' ' * 11 + ''.join(f'{label:{width}}' for label in evaluations))
    columns = [[figure(mean, half, metric).rjust(16) for mean, _, half in zip(*statistics(values))] for values in evaluations.values()]
    titles = column_titles(0 if without_updates else len(columns[0]) - 1)
    for updates, cells in zip(titles, zip(*columns)):
        lines.append(f'  {updates:>7}  ' + ''.join(f'{cell:{width}}' for cell in cells).rstrip())
    lines.append(f'  (0: {"support examples, " if UNITS[metric].starts_with_support else ""}before adaptation)')
    return '\n'.join(lines)


def add(directory: str, entry: Entry, check: Callable[[], None] = lambda: None) -> None:
    """Adds an evaluation to the results.json of a run, in the place of an earlier one of the same key. `check` is called before;
    it raises an error if what was evaluated is gone. Raises OSError if the file cannot be written, UserError if there is one that
    cannot be read."""
    path = os.path.join(directory, FILE)
    with changing(directory):
        check()
        remove_parts(directory, STALE_SECONDS)  # of killed evaluations
        write(path, _last_of_each_key([*_read_if_present(path), entry]))


def changing(directory: str) -> contextlib.AbstractContextManager:
    """While entered, nobody else changes the results of a run: evaluations that end together must not lose each other's entries."""
    return locked(os.path.join(directory, '.results.lock'))


def move_later(directory: str, iteration: int, folder: Callable[[], str]) -> None:
    """Moves the evaluations of checkpoints after an iteration to files of the same names in a folder, which is called for if there are
    any."""
    for name in SHIPPED_FILE, FILE:
        path = os.path.join(directory, name)
        entries = _read_if_present(path)
        later = [entry for entry in entries if entry.is_after(iteration)]
        if later:
            write(os.path.join(folder(), name), later)
            write(path, [entry for entry in entries if not entry.is_after(iteration)])


def write(path: str, entries: list[Entry]) -> None:
    """Writes a results.json; raises OSError if it cannot."""
    content = {'version': VERSION, 'evaluations': entries}
    # Piece by piece: the text of many tasks' figures is larger in memory than the figures.
    write_atomically(path, lambda file: json.dump(content, codecs.getwriter('ascii')(file), indent=1, default=_written))


@np.errstate(over='ignore')  # adaptation diverged on some tasks
def write_reference_files(stem: str, values: np.ndarray) -> None:
    """Writes values [tasks, 1 + updates] to <stem>.csv and <stem>.pkl as the reference does; raises OSError if it cannot. The csv
    file has the header update0,update1,... and the rows mean, std, ci95; the pickle holds {'mses': values}."""
    write_csv(stem + '.csv', [[f'update{updates}' for updates in range(values.shape[1])],
                              *np.float32(statistics(values))])  # float32 is written with the digits it has
    write_atomically(stem + '.pkl', lambda file: pickle.dump({'mses': values}, file))


def entries_of(directory: str) -> list[Entry]:
    """The evaluations of a run, those that shipped with it first, each replaced by one's own of the same key; errors as of
    `read`."""
    paths = [os.path.join(directory, name) for name in (SHIPPED_FILE, FILE)]
    return _last_of_each_key(entry for path in paths for entry in _read_if_present(path))


def _last_of_each_key(entries):
    return list({entry.key: entry for entry in entries}.values())


def _read_if_present(path):
    return read(path) if os.path.exists(path) else []


def read(path: str) -> list[Entry]:
    """The entries of a results.json, every field checked; raises UserError, which names file and field, if it cannot be read, or
    a field has another type than the schema says."""
    try:
        content = read_json(path)
        version = content.get('version', 1) if isinstance(content, dict) else None
        if version != VERSION:
            raise ValueError(f'version is {version!r:.40}, and this program reads version {VERSION}')
        entries = checked(list[Entry], content.get('evaluations'), 'evaluations')
        for index, entry in enumerate(entries):
            _check_consistency(entry, f'evaluations[{index}]')
        return entries
    except (OSError, ValueError, OverflowError, RecursionError) as error:  # of a file nested so deeply that its values cannot be shown
        raise UserError(f'{path} cannot be read: {first_line(error)}; remove it and evaluate again') from error


def _check_consistency(entry, field):
    """Raises ValueError for values that are of the right type and still make no sense."""
    columns = len(entry.figures)
    for name, holds in {
            'metric': entry.metric in UNITS, 'tasks.split': entry.tasks.split in SPLIT_TITLES,
            'scores': len(entry.scores) == entry.tasks.count > 0 and columns > 0 and all(len(row) == columns for row in entry.scores),
            'setting.headline_updates': entry.setting.headline_updates >= 0 and entry.headline_column < columns}.items():
        if not holds:
            raise ValueError(f'{field}.{name} is not that of an evaluation')

"""The evaluations of several runs, as their results.json files have them."""
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.cli.flags import default
from runtime.results.statistics import UNITS
from runtime.results.store import FILE, SPLIT_TITLES, read
from runtime.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An entry of a results.json."""
    directory: str
    name: str           # of the evaluation, within the directory
    given: str | None   # what the user calls it: --compare given=DIR
    entry: dict

    @property
    def path(self) -> str:
        """Text: directory, name and checkpoint."""
        return f'{os.path.join(self.directory, self.name)}, {os.path.basename(self.entry["checkpoint"])}'

    @property
    def tasks_key(self) -> str:
        """Equal for evaluations on the same tasks: all that draws them."""
        return json.dumps(self.entry['tasks'], sort_keys=True)

    @property
    def values(self) -> np.ndarray:
        """[tasks, 1 + updates], in the unit that is shown."""
        return np.array(self.entry['scores'], float) * UNITS[self.entry['score']][1]

    @property
    def own_updates(self) -> int:
        """The method's own number of updates in an evaluation."""
        asked = self.entry.get('own_updates', self.flag('num_updates'))
        return min(asked if isinstance(asked, int) else 1, len(self.entry['scores'][0]) - 1)

    @property
    def trained_on(self) -> str:
        """The source that the model was trained on."""
        return self.entry.get('trained_on') or self.flag('train_datasource') or self.entry['tasks']['datasource']

    @property
    def elsewhere(self) -> bool:
        """Whether the tasks are those of another source than the training's."""
        return self.trained_on != self.entry['tasks']['datasource']

    @property
    def chosen_as_best(self) -> set[bool]:
        """Whether it is of the checkpoint, or of the ensemble, that did best on meta-validation: {True, False} if that was the newest, too."""
        return {True} if 'ensemble' in self.entry else self.entry.get('chosen_as_best', {bool(self.flag('test_best'))})

    def flag(self, name: str) -> Any:
        """The value of a flag; where the evaluation is older than the flag, its default."""
        return self.entry.get('flags', {}).get(name, default(name))


def read_evaluations(named: Sequence[tuple[str | None, str]]) -> list[Evaluation]:
    """The evaluations in some folders, [(what the user calls its runs, folder)].

    Raises:
        UserError: no folder has any.
    """
    found, without = {}, []
    for given, folder in named:
        directories = result_directories(folder)
        without += [] if directories else [folder]
        for directory in directories:
            for name, entry in read(os.path.join(directory, FILE)).items():
                # A checkpoint that was evaluated as the newest and by its number as well is one evaluation.
                key = os.path.realpath(directory), json.dumps([entry['checkpoint'], entry['tasks'], entry['scores']], sort_keys=True)
                one = Evaluation(directory, name.removesuffix(f', {entry["tasks"]["split"]}'), given, entry)
                if key in found:
                    found[key].entry['chosen_as_best'] = found[key].chosen_as_best | one.chosen_as_best
                else:
                    found[key] = one
    if without:
        missing = f'there is no {FILE} in {", ".join(without)} or a folder in it; evaluate first, with --train=False'
        if len(without) == len(named):
            raise UserError(missing)
        print(f'Warning: {missing}', file=sys.stderr)
    return list(found.values())


def result_directories(folder: str, name: str = FILE) -> list[str]:
    """The folder, and folders below it at any depth, that hold results, or another file; without what --resume=False and --test_iter
    moved aside."""
    found, seen = [], set()
    for directory, below, files in os.walk(folder, followlinks=True):
        if os.path.realpath(directory) in seen:  # links may lead round in a circle
            below.clear()
            continue
        seen.add(os.path.realpath(directory))
        below[:] = sorted(one for one in below if not re.fullmatch(r'earlier\d+', one))
        found += [directory] if name in files else []
    return found


def describe_tasks(tasks: dict) -> str:
    """Text: which tasks these are."""
    way = f'{tasks["num_classes"]}-way ' if tasks.get('num_classes') else ''
    return (f'{tasks.get("count")} tasks of {tasks["datasource"]}, {SPLIT_TITLES.get(tasks["split"], tasks["split"])}, '
            f'{way}{tasks.get("update_batch_size")}-shot, {tasks.get("query_shots")} query, '
            f'seed {tasks.get("seed")}')


def differing_parts(paths: Sequence[str]) -> list[str]:
    """The components of each path in which it differs from another, compared from the end."""
    columns = list(itertools.zip_longest(*(os.path.normpath(path).split(os.sep)[::-1] for path in paths), fillvalue=''))[::-1]
    parts = list(zip(*(column for column in columns if len(set(column)) > 1))) or list(zip(*columns))
    return [os.sep.join(filter(None, one)) for one in parts]


def split_name(argument: str) -> tuple[str | None, str]:
    """'name=folder' -> (name, folder); 'folder' -> (None, folder)."""
    name, equals, folder = argument.partition('=')
    return (name, folder) if equals and name and not os.path.exists(argument) else (None, argument)


def free_path(stem: str, suffix: str) -> str:
    """A path that does not exist yet: <stem>.<suffix>, or <stem>-2.<suffix> and so on."""
    numbers = itertools.chain([''], (f'-{number}' for number in itertools.count(2)))
    return next(path for path in (f'{stem}{number}.{suffix}' for number in numbers) if not os.path.exists(path))


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return re.sub(r'([&%$#_{}])', r'\\\1', text.replace('\\', '/')).replace('~', r'\textasciitilde{}').replace('^', r'\^{}')

"""A task that the user has put into two csv files: rows to learn from, and rows to predict for."""
from typing import NamedTuple

import numpy as np

from runtime.datasets.tables import CLASS, Sheet, each, numbers, read_sheet
from runtime.datasets.tasks import Source, TaskBatch
from runtime.system.errors import UserError


class UserTables(NamedTuple):
    """A task made from two csv files."""
    batch: TaskBatch     # of this one task; query_y is 0 where it is not known
    classes: list[str]   # their names, in the order of the labels; [] in regression
    queries: Sheet
    known: bool          # whether the queries have the column of classes, or those of targets


def read_user_tables(source: Source, support_csv: str, query_csv: str) -> UserTables:
    """Reads the rows of two files, standardised as in training.

    Args:
        support_csv: has the columns of the training; in classification also one called class.
        query_csv: has the features; where it has the targets or classes too, predictions are compared with them.

    Raises:
        UserError: a file cannot be used.
    """
    columns = source.files.columns
    support, queries = each(read_sheet, [support_csv, query_csv])
    targets, classes = list(columns.targets), []
    known = set(targets or [CLASS]) <= set(queries.columns)
    wanted = [(support, targets), (queries, targets if known else [])]
    values = each(lambda pair: columns.standardise(numbers(pair[0], [*columns.features, *pair[1]])), wanted)
    (support_x, support_y), (query_x, query_y) = (np.split(rows, [len(columns.features)], axis=1) for rows in values)
    if not targets:
        if CLASS not in support.columns:
            raise UserError(f'{support_csv} has no column {CLASS}, the class of each row')
        named = [_classes(sheet) for sheet in (support, queries)]
        classes = sorted(set(named[0]))
        if len(classes) < 2 or '' in classes:
            raise UserError(f'the column {CLASS} of {support_csv} ' + ('is empty in a row' if '' in classes else f'names only {classes[0]}; it '
                                                                       'must name two classes or more'))
        support_y, query_y = (_one_hot(names, classes) for names in named)
    elif not known:
        query_y = np.zeros((len(query_x), len(targets)), np.float32)
    return UserTables(TaskBatch(*(rows[None] for rows in (support_x, support_y, query_x, query_y))), classes, queries, known)


def _classes(sheet: Sheet) -> list[str]:
    """The class of each row; '' if it is not known."""
    return [row[sheet.columns.index(CLASS)].strip() if CLASS in sheet.columns else '' for row in sheet.rows]


def _one_hot(names, classes):
    """float32 [rows, classes]; 0 where a name is none of the classes."""
    return np.array([[float(name == one) for one in classes] for name in names], np.float32)

"""A task that the user has put into two csv files: rows to learn from, and rows to predict for."""
import itertools

import numpy as np

from runtime.datasets.tables import (
    CLASS,
    Columns,
    Sheet,
    map_collecting_errors,
    read_sheet,
    report_numbers,
    sheet_values,
    with_decimal_commas,
)
from runtime.datasets.tasks import Source, TaskBatch, UserTask, one_hot, task_name
from runtime.system.errors import UserError


def read_user_tables(source: Source, support_csv: str, query_csv: str) -> UserTask:
    """Reads the rows of two files, standardised as in training. Raises UserError if a file cannot be used.

    Args:
        support_csv: has the columns of the training; in classification also one called class, or like the column of labels of the
            training.
        query_csv: has the features; in rows that have the targets or the class too, predictions are compared with them.
    """
    columns, classes = source.files.columns, []
    names = [*columns.features, *columns.targets]
    support, queries = with_decimal_commas(map_collecting_errors(read_sheet, [support_csv, query_csv]), names.__contains__)
    report_numbers([support, queries], [])
    has_answer, features = _has_targets(queries, columns), len(columns.features)
    answered = queries._replace(rows=list(itertools.compress(queries.rows, has_answer)),
                                lines=list(itertools.compress(queries.lines, has_answer)))
    support_rows, query_x = map_collecting_errors(lambda part: columns.standardise(sheet_values(*part)),
                                                  [(support, names), (queries, names[:features])])
    support_x, support_y = np.split(support_rows, [features], axis=1)
    query_y = np.zeros((len(query_x), len(columns.targets)), np.float32)
    if has_answer.any():
        query_y[has_answer] = columns.standardise(sheet_values(answered, names))[:, features:]
    if not columns.targets:
        column = source.files.group_column or CLASS
        classes = _classes(support, column)
        support_y, query_y = (one_hot(_class_column(sheet, column), classes) for sheet in (support, queries))
        has_answer = query_y.any(axis=1)
    return UserTask(TaskBatch(*(rows[None] for rows in (support_x, support_y, query_x, query_y))), classes, has_answer, 'row',
                    f'--support_csv={support_csv}', task_name(support_csv, query_csv), [f'line {number}' for number in queries.lines],
                    queries.columns, queries.rows)


def _has_targets(queries: Sheet, columns: Columns) -> np.ndarray:
    """Whether each row has all targets of the model, bool [rows]; an empty cell is not known."""
    has_columns = bool(columns.targets) and set(columns.targets) <= set(queries.columns)
    places = [queries.columns.index(name) for name in columns.targets] if has_columns else []
    return np.array([has_columns and all(row[place].strip() for place in places) for row in queries.rows])


def _classes(support: Sheet, column: str) -> list[str]:
    """The names of the classes, sorted; raises UserError if there are fewer than two, or a row has none."""
    if column not in support.columns:
        raise UserError(f'{support.path} has no column {column}, the class of each row')
    classes = sorted(set(_class_column(support, column)))
    if '' in classes:
        raise UserError(f'the column {column} of {support.path} is empty in a row')
    if len(classes) < 2:
        raise UserError(f'the column {column} of {support.path} names only {classes[0]}; it must name two classes or more')
    return classes


def _class_column(sheet: Sheet, column: str) -> list[str]:
    """The class of each row; '' if it is not known."""
    return [cell.strip() for cell in sheet.column(column)] if column in sheet.columns else [''] * len(sheet.rows)

"""A task that the user has put into two csv files: rows to learn from, and rows to predict for."""
import numpy as np

from runtime.datasets.tables import CLASS, Sheet, map_collecting_errors, read_sheet, report_numbers, sheet_values
from runtime.datasets.tasks import Source, TaskBatch, UserTask, one_hot, task_name
from runtime.system.errors import UserError


def read_user_tables(source: Source, support_csv: str, query_csv: str) -> UserTask:
    """Reads the rows of two files, standardised as in training. Raises UserError if a file cannot be used.

    Args:
        support_csv: has the columns of the training; in classification also one called class, or like the column of labels of the
            training.
        query_csv: has the features; where it has the targets or classes too, predictions are compared with them.
    """
    columns = source.files.columns
    support, queries = map_collecting_errors(read_sheet, [support_csv, query_csv])
    report_numbers([support, queries], [])
    targets, classes = list(columns.targets), []
    has_answer = np.full(len(queries.rows), bool(targets) and set(targets) <= set(queries.columns))
    columns_of = [(support, targets), (queries, targets if has_answer.all() else [])]
    values = map_collecting_errors(lambda pair: columns.standardise(sheet_values(pair[0], [*columns.features, *pair[1]])), columns_of)
    (support_x, support_y), (query_x, query_y) = (np.split(rows, [len(columns.features)], axis=1) for rows in values)
    if not targets:
        column = source.files.group_column or CLASS
        classes = _classes(support, column)
        support_y, query_y = (one_hot(_class_column(sheet, column), classes) for sheet in (support, queries))
        has_answer = query_y.any(axis=1)
    elif not has_answer.all():
        query_y = np.zeros((len(query_x), len(targets)), np.float32)
    return UserTask(TaskBatch(*(rows[None] for rows in (support_x, support_y, query_x, query_y))), classes, has_answer, 'row',
                    f'--support_csv={support_csv}', task_name(support_csv, query_csv), [f'line {number}' for number in queries.lines],
                    queries.columns, queries.rows)


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
    return [row[sheet.columns.index(column)].strip() if column in sheet.columns else '' for row in sheet.rows]

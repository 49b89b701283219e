"""Tables of numbers: csv files in folders train, val and test, one file for each task (regression) or for each class; or files with
a column that says which task or class each line is of.

The first line of a file names its columns; all files have the same ones, in any order. Numbers are standardised: each column has
mean 0 and standard deviation 1 over the rows of all files in train.
"""
import collections
import csv
import dataclasses
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np

from runtime.datasets import splits
from runtime.datasets.tasks import SPLITS, Examples
from runtime.system.errors import UserError, counted, first_line, listing
from runtime.system.files import delimiter_of, open_regular, read_json, write_atomically
from runtime.system.schema import checked

COLUMNS_FILE = 'columns.json'  # in a run's directory: the columns, and what standardises them
CLASS = 'class'                # the column of a table to predict for that holds the names of classes
LAYOUT = ('it must hold folders train, val and test, each with one csv file per task (regression, with --targets) or per class; or be a '
          'csv file with a column that says it, --task_column or --label_column')
THOUSANDS = re.compile(r'[+-]?[1-9]\d{0,2},\d{3}')  # or numbers with a decimal comma and three digits after it
SHOWN = 10                     # bad tables, or columns, by name in a message
Result = TypeVar('Result')


class Sheet(NamedTuple):
    """A csv file as it is."""
    path: str
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]     # in the file, of each row
    delimiter: str       # of cells
    decimal_comma: bool = False  # whether numbers are written as 1,5; see `with_decimal_commas`

    def column(self, name: str) -> list[str]:
        """The cells of a column."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of tables, and what standardises them: {name: (mean, standard deviation)}."""
    features: dict[str, tuple[float, float]]
    targets: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def standardise(self, values: np.ndarray) -> np.ndarray:
        """Features, and targets if there are any, [rows, columns], as float32 of mean 0 and deviation 1.
        Raises UserError if a number is too large."""
        scales = np.array([*self.features.values(), *self.targets.values()])[:values.shape[1]]
        with np.errstate(over='ignore', invalid='ignore'):
            standardised = ((values - scales[:, 0]) / scales[:, 1]).astype(np.float32)
        bad = np.argwhere(~np.isfinite(standardised))
        if len(bad):
            raise UserError(f'the numbers in the column {[*self.features, *self.targets][bad[0, 1]]} are too large or too far apart')
        return standardised

    @property
    def text(self) -> str:
        """What is predicted from what."""
        return ' → '.join(listing(list(names), SHOWN, ', ') for names in (self.features, self.targets) if names)

    def restore_targets(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `standardise` for targets only."""
        mean, deviation = np.array(list(self.targets.values())).T
        return values * deviation + mean


@dataclasses.dataclass(frozen=True)
class Tables(splits.Splitting):
    """The csv files below a folder."""
    root: str = ''
    target_names: tuple[str, ...] = ()      # the columns to predict; (): there are none, and each file is a class
    trained_columns: Columns | None = None  # those that a run was trained with; None: those of the files in train
    group_column: str | None = None         # which says of which task or class each line is; None: its file does
    split_ratios: tuple[int, int, int] = dataclasses.field(default=(64, 16, 20), kw_only=True)  # of tasks or classes of one csv file

    def too_few_hint(self, num_classes: int) -> str:
        """What to do if a split has fewer than num_classes classes."""
        by_proportions = os.path.isfile(self.root) and not self.split_file
        return 'lower it, or ' + (f'change {splits.split_flag(self.split_ratios)}' if by_proportions else f'add {self._what} to that split')

    @property
    def _what(self):
        """Text: what is split."""
        return 'tasks' if self.target_names else 'classes'

    @cached_property
    def _values(self) -> tuple[list[str], dict[str, dict[str, np.ndarray]]]:
        """The names of the columns, and {split: {table: numbers [rows, columns]}}; all splits are read, to find what is wrong at once."""
        sheets = self._sheets
        every = [sheet for tables in sheets.values() for sheet in tables.values()]
        if not every:
            raise UserError(f'{self.root} holds no csv files in folders train, val and test; {LAYOUT}')
        # Those of most are right, so that an odd one is blamed and not all others.
        counts = collections.Counter(frozenset(sheet.columns) for sheet in every)
        model = max(every, key=lambda sheet: counts[frozenset(sheet.columns)])
        names = self._names(model)
        like = 'the training' if self.trained_columns else model.path
        values = map_tables(lambda sheet: sheet_values(sheet, names, like), sheets)
        report_numbers(every, names)
        return names, values

    @cached_property
    def _sheets(self) -> dict[str, dict[str, Sheet]]:
        """{split: {table: sheet}}."""
        if os.path.isfile(self.root):
            return self._divided(self._groups(self._as_written([read_sheet(self.root)])))
        tables = map_tables(read_sheet, self._paths())
        sheets = iter(self._as_written([sheet for members in tables.values() for sheet in members.values()]))
        tables = {split: {name: next(sheets) for name in members} for split, members in tables.items()}
        return {split: self._groups(list(members.values())) for split, members in tables.items()} if self.group_column else tables

    def _paths(self) -> dict[str, dict[str, str]]:
        """{split: {table: path of its csv file}}, of a folder."""
        if not os.path.isdir(self.root):
            raise UserError(f'there is no folder {self.root}; {LAYOUT}')
        files, folders = splits.split_entries(self.root, '.csv'), splits.split_entries(self.root)
        if (self.split_given or self.split_file) and (files or folders):
            flag = '--split_file' if self.split_file else splits.split_flag(self.split_ratios)
            raise UserError(f'{self.root} says which {self._what} are for train, val and test; leave out {flag}')
        if self.group_column and files:
            return {split: {files[split]: os.path.join(self.root, files[split])} if split in files else {} for split in SPLITS}
        return {split: table_files(os.path.join(self.root, folders.get(split, split))) for split in SPLITS}

    def _as_written(self, sheets: list[Sheet]) -> list[Sheet]:
        return with_decimal_commas(sheets, lambda name: name != self.group_column)

    def _groups(self, sheets: Sequence[Sheet]) -> dict[str, Sheet]:
        """The lines of each task or class of some sheets, {name: sheet} in the order of names."""
        if not self.group_column:
            raise UserError(f'{self.root} is a file with the columns {", ".join(sheets[0].columns)}: --label_column names the one with the '
                            'class of each line, or --task_column the one with its task')
        groups: dict[str, Sheet] = {}
        columns = [name for name in sheets[0].columns if name != self.group_column] if sheets else []
        for sheet in sheets:
            if self.group_column not in sheet.columns:
                raise UserError(f'{sheet.path} has no column {self.group_column}; it has {", ".join(sheet.columns)}')
            index = sheet.columns.index(self.group_column)
            _check_columns(sheet, [*columns, self.group_column], sheets[0].path)
            order = [sheet.columns.index(name) for name in columns]
            for row, line in zip(sheet.rows, sheet.lines):
                name = row[index].strip()
                if not name:
                    raise UserError(f'the column {self.group_column} of {sheet.path} is empty in line {line}')
                group = groups.setdefault(name, sheet._replace(columns=columns, rows=[], lines=[]))
                if group.decimal_comma != sheet.decimal_comma:
                    raise UserError(f'{group.path} and {sheet.path} have lines of {name}, and only one of them has decimal commas; write '
                                    'both alike')
                group.rows.append([row[place] for place in order])
                group.lines.append(line)
        return dict(sorted(groups.items()))

    def _divided(self, groups: dict[str, Sheet]) -> dict[str, dict[str, Sheet]]:
        """The tasks or classes of one file, by split."""
        manifest = self._manifest()
        classes = self.classes_listed(manifest, folders=False) if manifest else self._in_proportions(groups)
        missing = [name for name in splits.names_of(classes) if name not in groups]
        if missing:
            raise UserError(f'{manifest} lists {listing(missing, 1, ", ")}, which the column {self.group_column} of {self.root} '
                            'does not have; restore these, or remove them from that file')
        unlisted = sorted(groups.keys() - set(splits.names_of(classes)))
        if unlisted:
            print(f'Ignored values of the column {self.group_column} not listed in {manifest}: {listing(unlisted, 1, ", ")}')
        return {split: {name: groups[name] for name in names} for split, names in classes.items()}

    def _manifest(self):
        return self.split_file or (self.kept if self.kept and os.path.exists(self.kept) else None)

    def _in_proportions(self, names):
        return splits.split_classes(list(names), self.split_ratios, f'the column {self.group_column} of {self.root}',
                                    self._what)

    def record_split(self, loaded: Mapping[str, list[str]]) -> None:
        """Writes the split of the tasks or classes of one file into the run's directory, if it is not written anywhere yet.
        Raises UserError if it cannot be written."""
        if self.group_column and self.kept_manifest and os.path.isfile(self.root) and not self._manifest():
            splits.keep_split(self._in_proportions([name for groups in self._sheets.values() for name in groups]), [self.kept_manifest],
                              f'values of {self.group_column}')

    def _names(self, sheet: Sheet) -> list[str]:
        """The names of the columns, features before targets."""
        if self.trained_columns:
            return [*self.trained_columns.features, *self.trained_columns.targets]
        missing = [name for name in self.target_names if name not in sheet.columns]
        if missing:
            raise UserError(f'--targets={",".join(self.target_names)}: there is no column {missing[0]} in {sheet.path}, which has '
                            f'{", ".join(sheet.columns)}')
        features = [name for name in sheet.columns if name not in self.target_names]
        if not features:
            raise UserError(f'--targets={",".join(self.target_names)} names all columns of {sheet.path}, which leaves nothing to predict '
                            'from')
        if not self.target_names and not self.group_column and CLASS in features:
            raise UserError(f'{sheet.path} has a column {CLASS}, but each csv file is a class; remove that column, or name it by '
                            f'--label_column={CLASS}, or the columns to predict by --targets')
        return [*features, *self.target_names]

    @cached_property
    def columns(self) -> Columns:
        """The columns, with the means and deviations of the split train if there are no others.
        Raises UserError if the files cannot be used."""
        if self.trained_columns:
            return self.trained_columns
        names, values = self._values
        if not values['train']:
            raise UserError(f'{os.path.join(self.root, "train")} holds no csv files; {LAYOUT}' if not self.group_column else
                            f'the train split of {self.root} is empty, and there is no trained model that says how its columns are scaled')
        rows = np.concatenate(list(values['train'].values()))
        scales = {name: _scale(name, column) for name, column in zip(names, rows.T)}
        features = {name: scales[name] for name in names if name not in self.target_names}
        return Columns(features, {name: scales[name] for name in self.target_names})

    def load(self, split: str) -> Examples:
        """The rows of a split. Raises UserError if the split or a column is missing, or files cannot be used."""
        tables = self._values[1][split]
        if not tables:
            raise splits.EmptySplit(f'{os.path.join(self.root, split)} holds no csv files; {LAYOUT}' if not self.group_column else
                                    f'the {split} split of {self.root} is empty')
        if split == 'train' and (self.group_column or not self.target_names):
            splits.report_names(self._values[1], self.root, 'task' if self.target_names else 'class')
        values = np.concatenate(list(tables.values()))
        checksum = zlib.crc32(repr(self.columns).encode(), zlib.crc32(values.tobytes()))
        return Examples.grouped(self.columns.standardise(values), {name: len(rows) for name, rows in tables.items()}, checksum)


def _scale(name: str, column: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation, the same on every machine: sums are exact. Of a constant column the deviation is 1."""
    if column.min() == column.max():  # a rounded mean may differ from it
        return float(column[0]), 1.0
    try:
        mean = math.fsum(column) / len(column)
        deviation = math.sqrt(math.fsum((column - mean) ** 2) / len(column))
    except OverflowError:
        mean = deviation = math.inf
    if not math.isfinite(mean + deviation):
        raise UserError(f'the numbers in the column {name} are too large or too far apart')
    return mean, deviation or 1.0  # which may underflow


def map_collecting_errors(function: Callable[[object], Result], arguments: Iterable[object]) -> list[Result]:
    """What a function returns for each argument; all its UserErrors together are raised as one."""
    results, errors = [], []
    for argument in arguments:
        try:
            results.append(function(argument))
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError((f'{len(errors)} tables cannot be used: ' if len(errors) > 1 else '') + listing(errors, SHOWN))
    return results


def map_tables(function: Callable[[Any], Result], tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Result]]:
    """{split: {table: what a function returns}} of {split: {table: argument}}; raises UserError as `map_collecting_errors`."""
    results = iter(map_collecting_errors(function, [argument for members in tables.values() for argument in members.values()]))
    return {split: {table: next(results) for table in members} for split, members in tables.items()}


def table_files(folder: str) -> dict[str, str]:
    """{table: path of its csv file} of a folder, sorted; {} if it does not exist. Hidden files and others are ignored.
    Raises UserError if two tables have the same name."""
    tables = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        table, suffix = os.path.splitext(name)
        if suffix.lower() != '.csv' or name.startswith('.'):
            continue
        path = os.path.join(folder, name)
        if table in tables:
            raise UserError(f'{path} and {os.path.basename(tables[table])} are two tables of one name; rename one')
        tables[table] = path
    return tables


def read_sheet(path: str) -> Sheet:
    """Reads a csv file: names of columns in the first line, then rows of as many cells. Empty lines are ignored.
    Raises UserError if it cannot be read, or is not of this form."""
    try:
        with open_regular(path, newline='', encoding='utf-8-sig') as file:
            reader = csv.reader(file, strict=True, delimiter=delimiter_of(file), skipinitialspace=True)
            lines = [(reader.line_num, row) for row in reader if row]
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} cannot be read as a csv file in UTF-8: {first_line(error)}') from error
    if len(lines) < 2:
        raise UserError(f'{path} {"has no rows below the names of its columns" if lines else "is empty"}')
    sheet = Sheet(path, [name.strip() for name in lines[0][1]], [row for _, row in lines[1:]], [number for number, _ in lines[1:]],
                  reader.dialect.delimiter)
    _check_form(sheet)
    return sheet


def _check_form(sheet):
    """Raises UserError if columns have no names of their own, or rows another number of cells."""
    columns = sheet.columns
    if '' in columns or len(set(columns)) < len(columns) or all(math.isfinite(as_number(name)) for name in columns):
        raise UserError(f'the first line of {sheet.path} must name each column, all differently, and is {",".join(columns)[:100]}')
    ragged = [(number, len(row)) for number, row in zip(sheet.lines, sheet.rows) if len(row) != len(columns)]
    if ragged:
        raise UserError(f'{sheet.path} has {len(columns)} columns and {counted(len(ragged), "line")} with another number of cells, first '
                        f'line {ragged[0][0]} with {ragged[0][1]}')


def sheet_values(sheet: Sheet, names: Sequence[str], like: str | None = None) -> np.ndarray:
    """The numbers in some columns, float64 [rows, names].

    `like` names what has these columns and no others; None: the sheet may have others too. Raises UserError if there are
    other columns, or cells that are not finite numbers.
    """
    _check_columns(sheet, names, like)
    indices = [sheet.columns.index(name) for name in names]
    values = np.array([[as_number(row[index], sheet.decimal_comma) for index in indices] for row in sheet.rows])
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        cell = sheet.rows[row][indices[column]].strip()
        what = 'is not a finite number' if len(bad) == 1 else 'are not finite numbers'
        hint = '; write 1,500 as 1500 or 1.500, for it may be either' if THOUSANDS.fullmatch(cell) and sheet.delimiter != ',' else ''
        raise UserError(f'{sheet.path} has {counted(len(bad), "cell")} that {what}, first {repr(cell[:40]) if cell else "an empty one"} in '
                        f'column {names[column]}, line {sheet.lines[row]}{hint}')
    return values


def _check_columns(sheet, names, like):
    """Raises UserError if columns are missing, or, compared with another file, there are more."""
    missing = [name for name in names if name not in sheet.columns]
    if missing:
        raise UserError(f'{sheet.path} has no column {missing[0]}, which {f"{like} has" if like else "the model was trained with"}')
    others = [name for name in sheet.columns if name not in names]
    if others and like:
        raise UserError(f'{sheet.path} has a column {others[0]}, which {like} lacks')


def with_decimal_commas(sheets: Sequence[Sheet], has_numbers: Callable[[str], bool]) -> list[Sheet]:
    """Some sheets, read alike: if the numbers of one have decimal commas, so have those of others that do not show it. `has_numbers` says
    which columns count."""
    commas = [sheet.delimiter != ',' and _has_decimal_commas(cell for row in sheet.rows for name, cell in zip(sheet.columns, row)
                                                             if has_numbers(name)) for sheet in sheets]
    return [sheet._replace(decimal_comma=any(commas) if comma is None else comma) for sheet, comma in zip(sheets, commas)]


def _has_decimal_commas(cells: Iterable[str]) -> bool | None:
    """Whether numbers that commas do not separate are written as 1,5; not if some are written as 1.5. None: they do not show it, because
    all of them may be thousands like 1,500."""
    written = [cell.strip() for cell in cells if not math.isfinite(as_number(cell)) or '.' in cell]
    numbers = [cell for cell in written if math.isfinite(as_number(cell, True))]
    if any('.' in cell for cell in numbers):
        return False
    return any(',' in cell and not THOUSANDS.fullmatch(cell) for cell in numbers) or None


def report_numbers(sheets: Sequence[Sheet], names: Sequence[str]) -> None:
    """Prints how numbers were read where that is not obvious."""
    commas = sorted({sheet.path for sheet in sheets if sheet.decimal_comma})
    if commas:
        print(f'Note: numbers are read with a decimal comma, 1,5 as 1.5, in {commas[0]}'
              + (f' and {len(commas) - 1} more files' if len(commas) > 1 else ''))
    rounded = [(sheet, name) for sheet in sheets for name in names if any(map(_is_rounded, sheet.column(name)))]
    if rounded:
        sheet, name = rounded[0]
        print(f'Note: the column {name} of {sheet.path} has whole numbers beyond 2^53, of which neighbours cannot be told apart; if it '
              'numbers the rows, remove it')


def _is_rounded(cell):
    """Whether a cell is a whole number that changes as a floating-point number."""
    return len(cell) > 15 and re.fullmatch(r'\s*[+-]?\d{16,300}\s*', cell) and int(cell) != int(float(cell))


def as_number(text: str, decimal_comma: bool = False) -> float:
    """A cell as a number; nan if it is none."""
    if decimal_comma:
        text = text if '.' in text else text.replace(',', '.', 1)
    try:
        return float(text) if '_' not in text else math.nan  # Python takes 1_000 for a number
    except ValueError:
        return math.nan


def write_columns(directory: str, columns: Columns) -> None:
    """Writes the columns of a run into its directory; raises OSError if that cannot be done."""
    write_atomically(os.path.join(directory, COLUMNS_FILE), json.dumps(vars(columns), indent=1).encode())


def read_columns(directory: str) -> Columns | None:
    """The columns of the run in a directory; None if there are none. Raises UserError if the file is damaged."""
    path = os.path.join(directory, COLUMNS_FILE)
    try:
        columns = checked(Columns, read_json(path), 'columns')
        if not columns.features or not all(deviation > 0 and math.isfinite(mean + deviation)
                                           for mean, deviation in [*columns.features.values(), *columns.targets.values()]):
            raise ValueError('columns')
        return columns
    except FileNotFoundError:
        return None
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f'{path} cannot be read, or no training wrote it ({first_line(error)}); remove it to have the columns of '
                        '--data_path') from error

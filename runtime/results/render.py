"""Tables of results as text for a terminal, csv, or LaTeX."""
import csv
import dataclasses
import io
import re
import sys
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Table:
    """What is shown, whatever the format."""
    title: str
    columns: list[str]                      # the first is that of the labels
    rows: list[list[str | int | float]]     # a label, then numbers, or their texts; '' where there is none
    legend: Sequence[str] = ()              # lines above the table
    notes: Sequence[str] = ()               # lines below it


def output(style: str, tables: Sequence[Table], records: Table, remarks: Sequence[str]) -> str:
    """Tables in one of the formats.

    Args:
        style: 'text', 'csv' or 'latex'.
        tables: for text and LaTeX.
        records: for csv: a row for each evaluation and number of updates.
        remarks: lines for the user; added to the text, in the other styles printed to stderr.
    """
    if style == 'text':
        return '\n\n'.join([*map(as_text, tables), *(['\n'.join(remarks)] if remarks else [])])
    for line in remarks:
        print(line, file=sys.stderr)
    return as_csv(records) if style == 'csv' else '\n\n'.join(map(as_latex, tables))


def as_text(table: Table) -> str:
    """For a terminal."""
    cells = [table.columns, *([str(cell) or '-' for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ['  '.join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
             for row in cells]
    legend = [*(f'  {line}' for line in table.legend), ''] if table.legend else []
    return '\n'.join([table.title, '', *legend, *(f'  {line}' for line in lines), *(f'  ({note})' for note in table.notes)])


def as_csv(table: Table) -> str:
    """Header and rows; floating-point numbers with six digits: single precision has no more that are not noise."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(table.columns)
    writer.writerows([f'{cell:.6g}' if isinstance(cell, float) else cell for cell in row] for row in table.rows)
    return text.getvalue().rstrip('\n')


def as_latex(table: Table) -> str:
    """A tabular environment, below comments with the title, the legend and the notes."""
    lines = [f'% {line}' for line in [table.title, *table.legend, *table.notes]]
    lines += [rf'\begin{{tabular}}{{l{"r" * (len(table.columns) - 1)}}}', r'\hline', _latex_row(map(_escaped, table.columns)), r'\hline']
    lines += [_latex_row([_escaped(str(label)), *(_formula(str(number)) for number in numbers)]) for label, *numbers in table.rows]
    return '\n'.join([*lines, r'\hline', r'\end{tabular}'])


def _latex_row(cells):
    return ' & '.join(cells) + r' \\'


def _escaped(text):
    """Text with LaTeX's special characters escaped."""
    return re.sub(r'([&%$#_{}])', r'\\\1', text.replace('\\', '/')).replace('~', r'\textasciitilde{}').replace('^', r'\^{}')


def _mark(match):
    """Marks after a number, raised; in LaTeX, what is raised cannot follow what is."""
    after_power = '{}' if match.string[:match.start()].endswith('}') else ''
    return f'{after_power}^{match[0]}' if len(match[0]) == 1 else f'{after_power}^{{{match[0]}}}'


def _formula(text):
    """A number, or what else a cell holds: 57.40 ± 1.83+, 1.3e-13, inf."""
    if text in ('', '-'):
        return text
    for pattern, replacement in ((r'(?<=\d)e([+-])0*(\d+)', lambda match: rf' \times 10^{{{match[1].strip("+")}{match[2]}}}'),
                                 ('±', r'\\pm'), (r'[*+]+$', _mark),
                                 ('inf', r'\\infty'), ('nan', r'\\mathrm{nan}')):
        text = re.sub(pattern, replacement, text)
    return f'${text}$'

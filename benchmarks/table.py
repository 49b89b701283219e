"""Trains and evaluates every row of the table of results, one after the other, and writes the table to docs/results.md.

    make table                                   (or: nice python benchmarks/table.py)
    python benchmarks/table.py --only fc100      rows whose name contains that
    python benchmarks/table.py --write           only writes the table, from what is there

A row is a file of configs/ and further flags. Rows are trained in order, each to its end; what is trained already is not trained again.
It can be interrupted (Ctrl-C) and started again at any time: trainings continue exactly. A second one is refused while one runs.
Trainings run at the lowest priority. Then the newest checkpoint and the one that did best on meta-validation are evaluated on 600
meta-test tasks. Rows whose data are not prepared are left out, and said to be.
"""
import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import filelock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)  # directories of runs are named relative to it, in results.json too

import main  # noqa: E402
from runtime import checkpoints, results  # noqa: E402
from runtime.errors import UserError  # noqa: E402
from runtime.files import locked, write_atomically  # noqa: E402
from runtime.methods import apply_method  # noqa: E402
from runtime.run import data_from_flags, experiment_name  # noqa: E402
from runtime.statistics import UNITS, number  # noqa: E402

PASSED_ON = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
TIMES = 'training_time.json'  # in a run's directory: {machine: seconds of training}
BEGIN, END = '<!-- the table: written by benchmarks/table.py -->', '<!-- end of the table -->'


class Row(NamedTuple):
    """A run, and what others report for it, with the source."""
    config: str                 # a file of configs/, without suffix
    title: str
    paper: str = ''
    reference: str = ''
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ' '.join([self.config, *self.flags])

    @property
    def arguments(self) -> list[str]:
        return [f'--flagfile=configs/{self.config}.flags', *self.flags]


ROWS = [
    Row('sinusoid_10shot', 'sinusoid 10-shot', '(only plotted)', '0.358 ± 0.036'),
    Row('omniglot_5way1shot', 'Omniglot 5-way 1-shot', '98.7 ± 0.4'),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot', '58.9 ± 1.9 (R2D2)', '56.8 ± 1.9 (a fork)'),
    Row('fc100_5way1shot', 'FC100 5-way 1-shot', '38.1 ± 1.7 (T-NAS)'),
    Row('omniglot_20way1shot', 'Omniglot 20-way 1-shot', '95.8 ± 0.3'),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot, ANIL', '56.19 ± 3.39 (PaddleFSL)', flags=('--method=anil',)),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot, Meta-SGD', flags=('--method=metasgd',)),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot, BOIL', '58.03 ± 0.43', flags=('--method=boil', '--num_filters=64')),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot, first order', '57.06 ± 3.83 (PaddleFSL)', flags=('--method=fomaml',)),
    *(Row('sinusoid_10shot', f'sinusoid 10-shot, seed {seed}', flags=(f'--seed={seed}',)) for seed in range(1, 5)),
    Row('omniglot_5way1shot', 'Omniglot 5-way 1-shot, no convolutions', '89.7 ± 1.1', flags=('--conv=False', '--logdir=logs/omniglot5way_dense/')),
    Row('miniimagenet_5way1shot', 'MiniImagenet 5-way 1-shot', '48.70 ± 1.84'),
    Row('miniimagenet_5way5shot', 'MiniImagenet 5-way 5-shot', '63.11 ± 0.92'),
]


class State(NamedTuple):
    """How far a row is."""
    directory: str
    wanted: int             # iterations
    newest: int             # iterations of the newest checkpoint; 0: none
    prepared: str           # '' or why its data cannot be used


def state_of(row: Row) -> State:
    main.FLAGS.unparse_flags()
    main.parse(['main.py', *row.arguments])
    values = main.FLAGS
    apply_method(values)
    directory = os.path.join(values.logdir, experiment_name(values, pretrain_only=False))
    try:
        source, tasks = data_from_flags(values)
        if source.image_shape:
            source.folders(tasks.data_path).names('train')
        missing = ''
    except UserError as error:
        missing = str(error)
    return State(directory, values.metatrain_iterations, max(checkpoints.iterations(directory), default=0), missing)


def run(arguments: list[str]) -> int:
    """main.py at the lowest priority; SIGINT, SIGTERM and SIGHUP are passed on, so that it saves. Returns its status."""
    # In a session of its own: else Ctrl-C would reach it twice, from the terminal and from here, and the second ends it unsaved.
    process = subprocess.Popen([sys.executable, 'main.py', *arguments], preexec_fn=lambda: os.nice(19), start_new_session=True)
    handlers = {one: signal.signal(one, lambda received, _: process.send_signal(received)) for one in PASSED_ON}
    try:
        return process.wait()
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)


def times(directory: str) -> dict[str, float]:
    try:
        with open(os.path.join(directory, TIMES), encoding='utf-8') as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def train(row: Row, state: State) -> None:
    """Trains a row to its end, and adds the seconds to what is known of it. Ends the program if it is interrupted."""
    started = time.monotonic()
    status = run(row.arguments)
    spent, machine = times(state.directory), f'{os.cpu_count()} cores, {platform.machine()}'
    spent[machine] = spent.get(machine, 0) + time.monotonic() - started
    if os.path.isdir(state.directory):
        write_atomically(os.path.join(state.directory, TIMES), json.dumps(spent).encode())
    if status:
        sys.exit(f'the training of {row.name} ended with status {status}; start this again to continue')


def evaluate(row: Row, state: State) -> None:
    """Evaluates the newest and the best checkpoint on meta-test, unless results.json has them."""
    for more in [], ['--test_best']:
        entries = results.existing(state.directory).values()
        best = checkpoints.find(state.directory, checkpoints.BEST if more else None)
        done = any(os.path.basename(entry['checkpoint']) == os.path.basename(best.prefix) and belongs(entry) for entry in entries)
        if not done and run([*row.arguments, '--train=False', '--test_set=True', *more]):
            sys.exit(f'the evaluation of {row.name} failed')


def belongs(entry: dict) -> bool:
    """Whether an evaluation is one that the table shows."""
    return entry['tasks']['split'] == 'test' and entry['tasks']['count'] == 600 and entry.get('query_norm') == 'batch'


def figure(entry: dict, updates: int) -> str:
    _, factor, digits = UNITS[entry['score']]
    found = entry['updates'][updates]
    return f'{number(found["mean"] * factor, digits)} ± {number(found["ci95"] * factor, digits)}'


def line(row: Row) -> str:
    """A row of the table, in Markdown."""
    state = state_of(row)
    cells = {'own': '', 'ten': '', 'best': ''}
    for entry in results.existing(state.directory).values():
        if not belongs(entry):
            continue
        own = entry.get('own_updates', entry['flags']['num_updates'])
        if entry['iterations'] == state.newest:
            cells['own'], cells['ten'] = f'{figure(entry, own)} ({own})', figure(entry, 10)
        else:
            cells['best'] = f'{figure(entry, 10)} (model{entry["iterations"]})'
    hours = ', '.join(f'{seconds / 3600:.1f} h on {machine}' for machine, seconds in times(state.directory).items())
    return (f'| {row.title} | {row.paper} | {row.reference} | {cells["own"]} | {cells["ten"]} | {cells["best"]} | '
            f'{state.newest:,} of {state.wanted:,} | {hours} |')


def write_table() -> None:
    """Writes the table between its two marks in docs/results.md."""
    table = '\n'.join(['| run | published | reference | this program, after (updates) | after 10 | best on meta-validation, after 10 | iterations | '
                       'training |', '| --- ' * 8 + '|', *map(line, ROWS)])
    path = os.path.join('docs', 'results.md')
    with open(path, encoding='utf-8') as file:
        before, rest = file.read().split(BEGIN)
    write_atomically(path, f'{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}'.encode())
    print(f'Written: {path}')


def remaining(states: list[State]) -> str:
    """Text: the hours that unfinished rows will take, as far as their speed is known."""
    hours, unknown = 0.0, 0
    for state in states:
        left, seconds = state.wanted - state.newest, sum(times(state.directory).values())
        if left > 0 and seconds and state.newest:
            hours += left * seconds / state.newest / 3600
        else:
            unknown += left > 0
    return f'about {hours:.1f} hours' + (f', and {unknown} rows of unknown speed' if unknown else '')


def main_loop(rows: list[Row]) -> None:
    for count, row in enumerate(rows, start=1):
        states = [state_of(other) for other in rows[count - 1:]]
        state = states[0]
        title = f'{count} of {len(rows)}: {row.name}, {state.newest:,} of {state.wanted:,} iterations'
        if state.prepared and state.newest < state.wanted:
            print(f'{title}: left out, {state.prepared}', flush=True)
            continue
        print(f'{title}; left in the queue: {remaining(states)}', flush=True)
        if state.newest < state.wanted:
            train(row, state)
        if not state.prepared:
            evaluate(row, state)
        write_table()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='rows whose name contains this')
    parser.add_argument('--write', action='store_true', help='only write the table')
    options = parser.parse_args()
    if options.write:
        write_table()
    else:
        chosen = [row for row in ROWS if re.search(re.escape(options.only), row.name)]
        if not chosen:
            sys.exit(f'no row has {options.only!r} in its name; there are: ' + '; '.join(row.name for row in ROWS))
        try:
            with locked(os.path.join('logs', '.table.lock'), wait=False):
                main_loop(chosen)
        except filelock.Timeout:
            sys.exit('another queue is running; wait for it, or stop it (Ctrl-C there)')

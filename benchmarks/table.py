"""Trains and evaluates every row of the table of results, one after the other, and writes the table to docs/results.md.

    make table                                   (or: nice python benchmarks/table.py)
    python benchmarks/table.py --only fc100      rows whose name contains that
    python benchmarks/table.py --until 10000     trains no row beyond that many iterations
    python benchmarks/table.py --evaluate        trains nothing: evaluates the checkpoints so far, and writes the table
    python benchmarks/table.py --write           only writes the table, from existing results

A row is a file of configs/ and further flags. Rows are trained in order, each to its end; finished trainings are not repeated.
It can be interrupted (Ctrl-C) and started again at any time: trainings continue exactly. A second one is refused while one runs.
Trainings run at the lowest priority. Then the newest checkpoint and the one that did best on meta-validation are evaluated on 600
meta-test tasks. Rows whose data are not prepared are skipped with a message.
"""
import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import filelock
from absl.flags import FlagValues

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)  # directories of runs are named relative to it, in results.json too

from run_files import CONSOLE, TIMES  # noqa: E402

import main  # noqa: E402
from runtime.cli.startup import import_tensorflow  # noqa: E402

import_tensorflow()
from runtime.cli.methods import apply_method  # noqa: E402
from runtime.cli.run import data_from_flags, experiment_name, headline_updates, missing_classes  # noqa: E402
from runtime.datasets.tasks import TaskConfig  # noqa: E402
from runtime.jobs import checkpoints  # noqa: E402
from runtime.results import store as results  # noqa: E402
from runtime.results.collect import Evaluation  # noqa: E402
from runtime.results.statistics import figure  # noqa: E402
from runtime.system.errors import UserError  # noqa: E402
from runtime.system.files import locked, write_atomically  # noqa: E402

PASSED_ON = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
POLL = 1  # seconds between checks of a training's progress
PAGE = os.path.join('docs', 'results.md')
LOCK = os.path.join('logs', '.table.lock')
NOTE = '''<details><summary>The commands of each row</summary>

The first trains a row; in a clone it continues the shipped run, unless another `--logdir` is given. The second evaluates its newest
checkpoint; for MAML++, the five best together. Add `--test_best` for the checkpoint that did best on meta-validation, `--ensemble=1`
for the newest of MAML++, or both for the best of MAML++.'''
EVALUATION = '--train=False', '--test_set=True'
HEADS = ('run', 'published', 'reference', 'newest checkpoint, after updates', 'best on meta-validation', 'iterations', 'training',
         'best peer')
BEGIN, END = '<!-- the table: written by benchmarks/table.py -->', '<!-- end of the table -->'


class Row(NamedTuple):
    """A run, and the figures published for it, with their sources."""
    config: str                 # a file of configs/, without suffix
    title: str
    paper: str = ''
    reference: str = ''         # by the reference's code
    flags: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()  # further flags of its evaluations
    peer: str = ''              # the best by another program's authors

    @property
    def name(self) -> str:
        """The part of the command that identifies the row: what --only looks for."""
        return ' '.join([self.config, *self.flags])

    @property
    def arguments(self) -> list[str]:
        """The flags of the training."""
        return [f'--flagfile=configs/{self.config}.flags', *self.flags]


ROWS = [
    Row('sinusoid_10shot', 'sinusoid 10-shot', '(only plotted)', '0.358 ± 0.036 after 1'),
    Row('omniglot_5way1shot', 'Omniglot 5-way 1-shot', '98.7 ± 0.4 (MAML)', peer='99.1 (learn2learn)'),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot', '58.9 ± 1.9 (R2D2)', '56.8 ± 1.9 (a fork)', peer='57.06 ± 3.83 (PaddleFSL)'),
    Row('fc100_5way1shot', 'FC100 5-way 1-shot', '38.1 ± 1.7 (T-NAS)', peer='37.63 ± 2.23 (PaddleFSL)'),
    Row('omniglot_20way1shot', 'Omniglot 20-way 1-shot', '95.8 ± 0.3 (MAML)', peer='94.5 (haebeom-lee/maml)'),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot, ANIL', peer='56.19 ± 3.39 (PaddleFSL)', flags=(
        '--method=anil', '--logdir=logs/cifarfs1shot_anil/')),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot, first order', peer='57.06 ± 3.83 (PaddleFSL)', flags=(
        '--method=fomaml', '--logdir=logs/cifarfs1shot_fomaml/')),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot, Meta-SGD', flags=(
        '--method=metasgd', '--num_updates=1', '--logdir=logs/cifarfs1shot_metasgd/')),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot, BOIL', '58.03 ± 0.43 (BOIL)', flags=(
        '--method=boil', '--num_updates=1', '--update_lr=0.5', '--num_filters=64', '--metatrain_iterations=30000',
        '--logdir=logs/cifarfs1shot_boil/')),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot, MAML++', flags=(
        '--method=maml++', '--num_filters=48', '--metatrain_iterations=50000', '--logdir=logs/cifarfs1shot_mamlpp/'), evaluation=('--test_query=1',)),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 1-shot, Reptile', flags=(
        '--method=reptile', '--update_batch_size=15', '--num_updates=8', '--meta_batch_size=5', '--update_lr=0.001',
        '--metatrain_iterations=100000', '--logdir=logs/cifarfs1shot_reptile/'), evaluation=(
        '--update_batch_size=1', '--train_update_batch_size=15', '--inner_batch=5', '--train_inner_batch=10')),
    *(Row('sinusoid_10shot', f'sinusoid 10-shot, seed {seed}', flags=(f'--seed={seed}', '--logdir=logs/sine_seeds/'))
      for seed in range(1, 5)),
    Row('omniglot_5way1shot', 'Omniglot 5-way 5-shot', '99.9 ± 0.1 (MAML)', peer='99.23 ± 0.40 (PaddleFSL)', flags=(
        '--update_batch_size=5', '--logdir=logs/omniglot5way5shot/')),
    Row('cifarfs_5way1shot', 'CIFAR-FS 5-way 5-shot', '71.5 ± 1.0 (R2D2)', '70.8 ± 0.9 (a fork)', peer='73.6 (learn2learn)', flags=(
        '--update_batch_size=5', '--logdir=logs/cifarfs5shot/')),
    Row('fc100_5way1shot', 'FC100 5-way 5-shot', '50.4 ± 1.0 (T-NAS)', peer='49.14 ± 1.58 (PaddleFSL)', flags=(
        '--update_batch_size=5', '--logdir=logs/fc1005shot/')),
    Row('omniglot_5way1shot', 'Omniglot 5-way 1-shot, no convolutions', '89.7 ± 1.1 (MAML)', peer='88.9 (learn2learn)', flags=(
        '--conv=False', '--logdir=logs/omniglot5way_dense/')),
    Row('doublemnist_5way1shot', 'DoubleMNIST 5-way 1-shot', '97.05 (MultiDigitMNIST)'),
    Row('doublemnist_20way1shot', 'DoubleMNIST 20-way 1-shot', '85.46 (MultiDigitMNIST)'),
    Row('miniimagenet_5way1shot', 'MiniImagenet 5-way 1-shot', '48.70 ± 1.84 (MAML)', '47.9 ± 1.9 (its weights)', peer='49.81 ± 1.78 (PaddleFSL)'),
    Row('miniimagenet_5way5shot', 'MiniImagenet 5-way 5-shot', '63.11 ± 0.92 (MAML)', peer='65.4 (learn2learn)'),
]


class State(NamedTuple):
    """The progress of a row."""
    directory: str
    wanted: int             # iterations
    newest: int             # iterations of the newest checkpoint; 0: none
    ranking: list[int]      # iterations of the checkpoints that did best on meta-validation
    missing: str            # '', or the reason why its data cannot be used
    ensemble: int           # checkpoints of the method's ensemble; 1: it has none
    tasks: TaskConfig       # of its evaluations
    inner: tuple            # of these: step size, support rows of a step, number of updates


def parse(arguments: list[str]) -> FlagValues:
    """The flags after a command line."""
    main.FLAGS.unparse_flags()
    main.parse(['main.py', *arguments])
    apply_method(main.FLAGS)
    return main.FLAGS


def state_of(row: Row) -> State:
    """Reads it from the row's directory."""
    values = parse([*row.arguments, *row.evaluation, *EVALUATION])
    _, tasks = data_from_flags(values)
    inner = values.update_lr, values.inner_batch, headline_updates(values.num_updates, values.test_updates)
    values = parse(row.arguments)
    directory = os.path.join(values.logdir, experiment_name(values, pretrain_only=False))
    missing = missing_classes(values, 'train')
    there = checkpoints.iterations(directory)
    record = checkpoints.find(directory, None).record if there else {'iteration': 0, 'best': None}
    ranking = [entry['iteration'] for entry in checkpoints.ranking_of(record)
               if entry['iteration'] in there]  # a shipped run may have its newest checkpoint only
    return State(directory, values.metatrain_iterations, record['iteration'], ranking, missing, values.ensemble, tasks, inner)


def lowest_priority() -> None:
    """Gives this process the lowest priority, and on Linux its session too, because priorities apply per session there."""
    os.nice(19)
    with contextlib.suppress(OSError), open('/proc/self/autogroup', 'w', encoding='ascii') as file:
        file.write('19')


def run(arguments: list[str], log: str = os.devnull, enough: Callable[[], bool] = lambda: False) -> int:
    """main.py at the lowest priority; SIGINT, SIGTERM and SIGHUP are passed on, so that it saves. Returns its status.

    Args:
        log: a file to which what main.py prints is appended.
        enough: called repeatedly; once it returns True, main.py is stopped by SIGTERM, and the status is 0.
    """
    # In a new session: else Ctrl-C would reach it twice, from the terminal and from here, and the second ends it unsaved.
    process = subprocess.Popen([sys.executable, '-u', 'main.py', *arguments], preexec_fn=lowest_priority, start_new_session=True,
                               stdout=subprocess.PIPE, text=True, errors='replace')
    handlers = {one: signal.signal(one, lambda received, _: process.send_signal(received)) for one in PASSED_ON}
    copying = threading.Thread(target=copy_lines, args=(process.stdout, log))
    copying.start()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(POLL)
            if enough():
                process.send_signal(signal.SIGTERM)
                process.wait()
                return 0
    finally:
        copying.join()
        for one, handler in handlers.items():
            signal.signal(one, handler)


def copy_lines(lines: Iterable[str], log: str) -> None:
    """Prints lines as they come, and adds them to a file, as soon as its folder exists."""
    waiting = ''
    for one in lines:
        print(one, end='', flush=True)
        waiting += one
        with contextlib.suppress(OSError), open(log, 'a', encoding='utf-8') as file:
            file.write(waiting)
            waiting = ''


def processor() -> str:
    """The name of this machine's processor, or if the system does not tell, its architecture."""
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
        names = [line.partition(':')[2].strip() for line in file if line.startswith('model name')]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def times(directory: str) -> dict[str, dict]:
    """{machine: {'seconds', 'iterations'} of training} as recorded for a run; {} if nothing is."""
    try:
        with open(os.path.join(directory, TIMES), encoding='utf-8') as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def train(row: Row, state: State, until: int) -> None:
    """Trains a row, and adds seconds and iterations to its recorded time. Ends the program if it is interrupted.

    Args:
        until: iterations; at the first checkpoint of that many, the training is stopped.
    """
    def newest():
        return max(checkpoints.iterations(state.directory), default=0)

    started = time.monotonic()
    status = run(row.arguments, os.path.join(state.directory, CONSOLE), lambda: newest() >= until)
    recorded, machine = times(state.directory), f'{os.cpu_count()} cores, {processor()}'
    done = {'seconds': time.monotonic() - started, 'iterations': newest() - state.newest}
    earlier = recorded.get(machine, {})
    recorded[machine] = {name: earlier.get(name, 0) + more for name, more in done.items()}
    if os.path.isdir(state.directory):
        write_atomically(os.path.join(state.directory, TIMES), json.dumps(recorded).encode())
    if status:
        sys.exit(f'the training of {row.name} ended with status {status}; start this again to continue')


def evaluate(row: Row, state: State) -> None:
    """Evaluates the newest and the best checkpoint on meta-test, and the ensemble if the method has one, unless results.json has them."""
    wanted = {'newest': (state.newest, ['--ensemble=1'])}
    if state.ranking:
        wanted['best'] = state.ranking[0], ['--ensemble=1', '--test_best']
    if len(state.ranking) >= state.ensemble > 1:
        wanted['ensemble'] = state.ranking[:state.ensemble], []
    for what, (of, more) in wanted.items():
        if of not in evaluated(state).values() and run([*row.arguments, *row.evaluation, *EVALUATION, *more]):
            sys.exit(f'the evaluation of {row.name} ({what}) failed')


def evaluated(state: State) -> dict[str, int | list[int]]:
    """{name of an evaluation that the table shows: the iterations of its checkpoint, or of its ensemble}."""
    return {name: entry.get('ensemble', entry['iterations'])
            for name, entry in results.existing(state.directory).items() if belongs(entry, state)}


def belongs(entry: dict, state: State) -> bool:
    """Whether an evaluation is one that the table shows: of the run's own checkpoints, as the row wants, on 600 meta-test tasks."""
    tasks, evaluation, config = entry['tasks'], Evaluation('', '', None, entry), state.tasks
    inner = evaluation.flag('update_lr'), evaluation.flag('inner_batch'), evaluation.own_updates
    wanted = {'split': 'test', 'count': 600, 'update_batch_size': config.update_batch_size, 'query_shots': config.query_shots,
              'seed': config.seed, 'num_classes': tasks['num_classes'] and config.num_classes}
    return (all(tasks[name] == value for name, value in wanted.items()) and entry.get('query_norm') == 'batch'
            and inner == state.inner and not evaluation.elsewhere and not evaluation.flag('load_from'))


def cells(row: Row, state: State) -> tuple[str, ...]:
    """The cells of a row of the table, one for each of HEADS."""
    entries, found = results.existing(state.directory), evaluated(state)
    shown = [', '.join(scores(entries[name]) for name in found if found[name] == wanted)
             for wanted in (state.newest, state.ranking[0] if state.ranking else None, state.ranking[:state.ensemble])]
    best = shown[1] and f'{shown[1]} (model{state.ranking[0]})'
    ensemble = shown[2] and f'; {state.ensemble} best together: {shown[2]}'
    spent = times(state.directory)
    hours = ', '.join(f'{one["seconds"] / 3600:.2g} h on {machine}' for machine, one in spent.items())
    timed = sum(one['iterations'] for one in spent.values())
    hours += f' for {timed:,} of them' if hours and timed != state.newest else ''
    return (row.title, row.paper, row.reference, shown[0], best + ensemble, f'{state.newest:,} of {state.wanted:,}', hours, row.peer)


def scores(entry: dict) -> str:
    """The scores of an evaluation after the method's default number of updates, and after 10."""
    numbers = dict.fromkeys([Evaluation('', '', None, entry).own_updates, 10])
    return ', '.join(f'{figure(one["mean"], one["ci95"], entry["score"])} after {updates}'
                     for updates in numbers for one in entry['updates'][updates:updates + 1])


def commands(row: Row, state: State) -> str:
    """Text: the commands that train and evaluate a row."""
    return '\n'.join([f'# {row.title}', ' '.join(['python main.py', *row.arguments]),
                      ' '.join([f'python main.py --run={state.directory}', *row.evaluation, *EVALUATION])])


def write_table() -> None:
    """Writes the table and the commands of its rows between two marks in docs/results.md."""
    states = [state_of(row) for row in ROWS]
    table = '\n'.join(f'| {" | ".join(one)} |' for one in [HEADS, ['---'] * len(HEADS), *map(cells, ROWS, states)])
    listing = '\n'.join(map(commands, ROWS, states))
    with open(PAGE, encoding='utf-8') as file:
        before, rest = file.read().split(BEGIN)
    write_atomically(PAGE, f'{before}{BEGIN}\n\n{table}\n\n{NOTE}\n\n```\n{listing}\n```\n\n</details>\n\n{END}{rest.split(END)[1]}'.encode())
    print(f'Written: {PAGE}')


def remaining(states: list[State], until: int) -> str:
    """Text: the hours that unfinished rows will take, as far as their speed is known."""
    hours, unknown = 0.0, 0
    for state in states:
        left = max(min(state.wanted, until) - state.newest, 0) if not state.missing else 0
        spent = times(state.directory).values()
        iterations = sum(one['iterations'] for one in spent)
        if iterations:
            hours += left * sum(one['seconds'] for one in spent) / iterations / 3600
        else:
            unknown += left > 0
    return f'about {hours:.1f} hours' + (f', and {unknown} rows of unknown speed' if unknown else '')


def main_loop(rows: list[Row], until: int) -> None:
    """Trains each row to its end, or to `until` iterations if that is less, and evaluates it."""
    for count, row in enumerate(rows, start=1):
        states = [state_of(other) for other in rows[count - 1:]]
        state = states[0]
        title = f'{count} of {len(rows)}: {row.name}, {state.newest:,} of {state.wanted:,} iterations'
        unfinished = state.newest < min(state.wanted, until)
        if state.missing and unfinished:
            print(f'{title}: left out, {state.missing}', flush=True)
            continue
        print(f'{title}; left in the queue: {remaining(states, until)}', flush=True)
        if unfinished:
            train(row, state, until)
            state = state_of(row)
        if state.newest and not state.missing:
            evaluate(row, state)
        write_table()


def command_line(arguments: list[str] | None = None) -> None:
    """Runs the queue, as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='rows whose name contains this')
    parser.add_argument('--until', type=int, default=sys.maxsize, metavar='N', help='train no row beyond N iterations')
    parser.add_argument('--evaluate', dest='until', action='store_const', const=0,
                        help='train nothing: evaluate the checkpoints so far')
    parser.add_argument('--write', action='store_true', help='only write the table')
    options = parser.parse_args(arguments)
    chosen = [row for row in ROWS if options.only in row.name]
    if not chosen:
        sys.exit(f'no row has {options.only!r} in its name; there are: ' + '; '.join(row.name for row in ROWS))
    try:
        if options.write:
            write_table()
        else:
            with locked(LOCK, wait=False):
                main_loop(chosen, options.until)
    except filelock.Timeout:
        sys.exit('another queue is running; wait for it, or stop it (Ctrl-C there)')
    except UserError as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    command_line()

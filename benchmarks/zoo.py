"""The trained models in logs/: evaluates them again, and copies what ships of a training.

    make zoo                                              (or: python benchmarks/zoo.py check)
    python benchmarks/zoo.py check logs/sine logs/fc1001shot
    python benchmarks/zoo.py pack ../training/logs/fc1001shot logs/fc1001shot

check repeats every evaluation in the results.json and shipped_results.json files of some folders and compares its figures, as they are
printed, with those that are recorded. The folders stay as they are. Evaluations whose data are not there are left out. On another kind of
processor, which rounds differently, some figures may be nearly the same: by a twentieth of the half-width of their interval. Exit status:
1 if a figure differs by more, if an evaluation fails, or if there was none.

pack copies runs: their newest checkpoint, from which the training can continue; those that did best on meta-validation, without
the state of the optimizer, which makes them a fifth as large; the evaluations of these; and the flags, console log, metrics and times. What
an earlier pack left at the destination is replaced.
"""
import argparse
import collections
import os
import shutil
import subprocess
import sys
import tempfile

from run_files import MAIN, ROOT, TIMES, missing_classes, request_of

from runtime.cli.startup import import_tensorflow

import_tensorflow()
from runtime.cli.network_file import FOLDER as NETWORK  # noqa: E402
from runtime.cli.stored_run import FLAG_FILE  # noqa: E402
from runtime.datasets.splits import MANIFEST  # noqa: E402
from runtime.datasets.tables import COLUMNS_FILE  # noqa: E402
from runtime.jobs import checkpoints  # noqa: E402
from runtime.jobs.journal import CONSOLE, METRICS  # noqa: E402
from runtime.results import store  # noqa: E402
from runtime.results.collect import RunEntry, read_evaluations, result_directories  # noqa: E402
from runtime.results.statistics import figure  # noqa: E402
from runtime.system.errors import UserError  # noqa: E402

COPIED = FLAG_FILE, COLUMNS_FILE, MANIFEST, CONSOLE, METRICS, TIMES, NETWORK
SAME, CLOSE, DIFFERENT, LEFT_OUT = 'the same', 'nearly the same', 'different', 'left out'
# Processors of another kind round differently, which changes the outputs for a query example in some thousand.
TOLERANCE = 0.05  # CLOSE: means differ by no more than this part of the half-width of their interval


def flags_of(entry: store.Entry) -> list[str]:
    """The flags that repeat an evaluation with --run."""
    tasks, setting, trained = entry.tasks, entry.setting, entry.training.flags
    values = {'update_batch_size': tasks.update_batch_size, 'test_query': tasks.query_shots, 'test_seed': tasks.seed,
              'num_test_tasks': tasks.count, 'test_set': tasks.split == 'test', 'query_norm': setting.query_norm,
              'update_lr': setting.update_lr, 'inner_batch': setting.inner_batch, 'test_updates': setting.test_updates}
    values |= {'permutations': setting.permutations} if setting.permutations > 1 else {}
    values |= {'head': 'nearest'} if setting.head != 'own' else {}
    values |= {'num_classes': tasks.num_classes} if tasks.num_classes else {}
    values |= {'datasource': tasks.datasource, 'resize': True} if tasks.datasource != trained['datasource'] else {}
    values |= {'ensemble': len(entry.ensemble)} if entry.ensemble else {'ensemble': 1, 'test_iter': entry.iterations}
    return ['--train=False', '--log=False', *(f'--{name}={value}' for name, value in values.items())]


def evaluate_again(evaluation: RunEntry, flags: list[str]) -> store.Entry:
    """The entry of results.json that the same evaluation makes now, in a temporary copy of the run; raises
    subprocess.CalledProcessError if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        for name in os.listdir(evaluation.directory):
            if checkpoints.iteration_of(name) is not None or name in COPIED:
                os.symlink(os.path.abspath(os.path.join(evaluation.directory, name)), os.path.join(folder, name))
        subprocess.run([sys.executable, MAIN, f'--run={folder}', *flags], check=True,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        again = {(entry.setting.head, entry.setting.orders): entry for entry in store.read(os.path.join(folder, store.FILE))}
        return again[evaluation.entry.setting.head, evaluation.entry.setting.orders]


def missing_data(evaluation: RunEntry, flags: list[str]) -> str:
    """'', or why the data or the network of a run cannot be used here."""
    try:
        return missing_classes(request_of([f'--run={evaluation.directory}', *flags]), evaluation.entry.tasks.split)
    except UserError as error:
        return str(error)


def repeat(evaluation: RunEntry) -> tuple[str, str]:
    """Evaluates again; returns SAME, CLOSE, DIFFERENT or LEFT_OUT, and why."""
    entry = evaluation.entry
    if entry.setting.load_from:
        return LEFT_OUT, "not the run's own weights"
    flags = flags_of(entry)
    if missing := missing_data(evaluation, flags):
        return LEFT_OUT, missing
    try:
        again = evaluate_again(evaluation, flags)
    except subprocess.CalledProcessError as error:
        return DIFFERENT, ' '.join(['evaluation failed:', *error.output.strip().splitlines()[-1:]])
    if again.tasks != entry.tasks:
        return LEFT_OUT, 'the data here are not those of the recorded evaluation'
    recorded, now = ([figure(figures.mean, figures.ci95, entry.metric) for figures in each.figures] for each in (entry, again))
    if recorded == now:
        return SAME, f'{recorded[entry.headline_column]} after {evaluation.headline_updates}'
    changed = [updates for updates, (before, after) in enumerate(zip(recorded, now)) if before != after]  # an interval may have no width
    close = len(recorded) == len(now) and all(
        abs(getattr(entry.figures[updates], name) - getattr(again.figures[updates], name)) <= TOLERANCE * entry.figures[updates].ci95
        for updates in changed for name in ('mean', 'ci95'))
    return (CLOSE if close else DIFFERENT,
            ', '.join(f'{recorded[updates]} recorded and {now[updates]} now after {updates}' for updates in changed))


def check(folders: list[str]) -> bool:
    """Repeats all evaluations in some folders and prints a line about each; returns whether all repeated ones were at least
    nearly the same. Raises UserError if there are no evaluations, or a file of a run cannot be read."""
    counts = collections.Counter()
    directories = dict.fromkeys(evaluation.directory for evaluation in read_evaluations(folders))
    files = [(directory, os.path.join(directory, name)) for directory in directories for name in (store.SHIPPED_FILE, store.FILE)]
    # Of both files: read_evaluations has one's own in the place of those that shipped.
    evaluations = (RunEntry(directory, None, entry) for directory, path in files if os.path.exists(path) for entry in store.read(path))
    for evaluation in evaluations:
        outcome, why = repeat(evaluation)
        counts[outcome] += 1
        print(f'{evaluation.path}: {outcome}, {why}', flush=True)
    print(', '.join(f'{counts[outcome]} {outcome}' for outcome in (SAME, CLOSE, DIFFERENT, LEFT_OUT)))
    return counts[SAME] + counts[CLOSE] > 0 and not counts[DIFFERENT]


def pack(source: str, destination: str) -> None:
    """Copies all runs in a folder; raises UserError if there is none, one cannot be copied, or one of the folders is in the
    other."""
    paths = [os.path.realpath(source), os.path.realpath(destination)]
    if paths[0] != paths[1] and os.path.commonpath(paths) in paths:
        raise UserError(f'one of {source} and {destination} is in the other; name a folder elsewhere')
    runs = result_directories(source, [FLAG_FILE])
    if not runs:
        raise UserError(f'there is no run (a folder with {FLAG_FILE}) in {source}')
    for directory in runs:
        pack_run(directory, os.path.normpath(os.path.join(destination, os.path.relpath(directory, source))))


def pack_run(directory: str, destination: str) -> None:
    """Copies one run, and prints what is there now. If that fails, the destination stays as it was. Raises UserError if it has no
    checkpoint, something in it cannot be read, or source and destination are one; or if the destination has what no pack wrote,
    or a process trains there."""
    if os.path.realpath(directory) == os.path.realpath(destination):
        raise UserError(f'{directory} cannot be copied to itself')
    saved = checkpoints.iterations(directory)
    if not saved:
        raise UserError(f'there is no checkpoint in {directory}')
    ranking = checkpoints.ranking_of(checkpoints.load(checkpoints.path(directory, saved[-1])).record)
    best = [entry['iteration'] for entry in ranking if entry['iteration'] in saved[:-1]]
    entries = [entry for entry in store.entries_of(directory)
               if {0, saved[-1], *best}.issuperset(entry.ensemble or [entry.iterations]) and not entry.setting.load_from]
    refuse_other_files(destination)
    parent = os.path.dirname(destination) or '.'
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = os.path.join(temporary, 'run')
        write_run(directory, folder, saved[-1], best, entries)
        if os.path.exists(destination):
            earlier = os.path.join(temporary, 'earlier')
            with checkpoints.exclusive(destination):
                os.replace(destination, earlier)
                try:
                    os.replace(folder, destination)
                except BaseException:
                    os.replace(earlier, destination)
                    raise
        else:
            os.replace(folder, destination)
    size = sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(destination) for name in names)
    print(f'{destination}: {", ".join(f"model{iteration}" for iteration in [saved[-1], *best])}; evaluations: {len(entries)}; '
          f'{size / 2 ** 20:.1f} MB')


def refuse_other_files(destination: str) -> None:
    """Raises UserError if there is a folder that holds what no pack writes, for it is going to be replaced."""
    locks = '.lock', '.results.lock'
    others = [name for name in sorted(os.listdir(destination) if os.path.lexists(destination) else [])
              if name not in (*COPIED, *locks, store.SHIPPED_FILE) and checkpoints.iteration_of(name) is None]
    if others:
        raise UserError(f'{destination} would be replaced, and holds {others[0]}, which does not ship with a run; name another folder')


def write_run(directory: str, folder: str, newest: int, best: list[int], entries: list[store.Entry]) -> None:
    """Writes a new folder with what ships of a run: its newest checkpoint as it is, the best without the state of the optimizer."""
    os.mkdir(folder)
    for iteration in best:
        checkpoint = checkpoints.load(checkpoints.path(directory, iteration))
        checkpoints.save(checkpoints.path(folder, iteration), checkpoints.without_optimizer(checkpoint.arrays), checkpoint.record)
    for name in os.listdir(directory):
        if name in COPIED or checkpoints.iteration_of(name) == newest:
            path = os.path.join(directory, name)
            if os.path.isdir(path):
                shutil.copytree(path, os.path.join(folder, name))
            else:
                shutil.copy(path, folder)
    if entries:
        store.write(os.path.join(folder, store.SHIPPED_FILE), entries)


def command_line(arguments: list[str] | None = None) -> None:
    """Checks or packs, as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest='command')
    checking = commands.add_parser('check', help='evaluate the models again')
    checking.add_argument('folders', nargs='*', default=[os.path.join(ROOT, 'logs')], help='of runs; without any: logs')
    packing = commands.add_parser('pack', help='copy what ships of a run')
    packing.add_argument('source', help='a folder with runs')
    packing.add_argument('destination', help='a folder')
    options = parser.parse_args(arguments)
    try:
        if options.command == 'pack':
            pack(options.source, options.destination)
        elif not check(options.folders):
            sys.exit(1)
    except (UserError, OSError) as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    command_line()

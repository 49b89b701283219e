"""The trained models in logs/: evaluates them again, and copies what ships of a training.

    make zoo                                              (or: python benchmarks/zoo.py check)
    python benchmarks/zoo.py check logs/sine logs/fc1001shot
    python benchmarks/zoo.py pack ../training/logs/fc1001shot logs/fc1001shot

check repeats every evaluation in the results.json files of some folders and compares its figures, as they are printed, with those
that are recorded. It leaves the folders as they are. Evaluations whose data are not prepared are left out. The exit status is 1 if
a figure is another one.

pack copies runs: their newest checkpoint, from which the training can be continued; those that did best on meta-validation, without
the state of the optimizer, a third of the size; the evaluations of these in results.json; and the flags, console log and hours.
"""
import argparse
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from run_files import CONSOLE, TIMES  # noqa: E402

import main  # noqa: E402
from runtime.startup import import_tensorflow  # noqa: E402

import_tensorflow()
from runtime import checkpoints, results  # noqa: E402
from runtime.errors import UserError  # noqa: E402
from runtime.evaluations import result_directories  # noqa: E402
from runtime.files import write_atomically  # noqa: E402
from runtime.run import FLAG_FILE, data_from_flags  # noqa: E402
from runtime.statistics import UNITS, number  # noqa: E402

ALSO = FLAG_FILE, CONSOLE, TIMES  # files that are copied as they are
NOT_REPEATED = 'run', 'logdir', 'method', 'test_best', 'test_iter', 'log', 'plot'  # flags; those of the method are recorded too


def flags_of(entry: dict) -> list[str]:
    """The flags of an evaluation that are not at their defaults, without those that say where the run is."""
    return [f'--{name}={value}' for name, value in entry['flags'].items()
            if name in main.FLAGS and name not in NOT_REPEATED and value != main.FLAGS[name].default]


def missing_data(arguments: list[str]) -> str:
    """'', or why the data of an evaluation with these flags cannot be used."""
    main.FLAGS.unparse_flags()
    main.parse(['main.py', *arguments])
    try:
        source, tasks = data_from_flags(main.FLAGS)
        if source.image_shape:
            source.folders(tasks.data_path).names('test' if main.FLAGS.test_set else 'val')
    except UserError as error:
        return str(error)
    return ''


def figures(entry: dict) -> list[str]:
    """The figures of an evaluation after 0, 1, ... updates, as they are printed."""
    _, factor, digits = UNITS[entry['score']]
    return [f'{number(one["mean"] * factor, digits)} ± {number(one["ci95"] * factor, digits)}' for one in entry['updates']]


def evaluate_again(directory: str, entry: dict, flags: list[str]) -> dict:
    """The entry of results.json that the same evaluation makes now, in a temporary copy of the run.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as logs:
        copy = os.path.join(logs, os.path.basename(os.path.abspath(directory)))
        os.mkdir(copy)
        for path in glob.glob(os.path.join(glob.escape(directory), 'model*')):
            os.symlink(os.path.abspath(path), os.path.join(copy, os.path.basename(path)))
        which = [] if 'ensemble' in entry else [f'--test_iter={entry["iterations"]}']
        subprocess.run([sys.executable, os.path.join(ROOT, 'main.py'), *flags, f'--logdir={logs}', *which], check=True,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found, = results.read(os.path.join(copy, results.FILE)).values()
        return found


def check(folders: list[str]) -> bool:
    """Repeats all evaluations in some folders, and prints a line about each. Returns whether all gave the recorded figures."""
    done, different, left_out = 0, 0, 0
    for directory in (directory for folder in folders for directory in result_directories(folder)):
        for name, entry in results.read(os.path.join(directory, results.FILE)).items():
            title, flags = f'{directory}: {name}, {os.path.basename(entry["checkpoint"])}', ['--log=False', *flags_of(entry)]
            missing = missing_data(flags)
            if missing:
                left_out += 1
                print(f'{title}: left out, {missing}', flush=True)
                continue
            try:
                before, after = figures(entry), figures(evaluate_again(directory, entry, flags))
                others = [f'{there} recorded and {here} now after {updates} updates'
                          for updates, (there, here) in enumerate(zip(before, after, strict=True)) if there != here]
                said = ', '.join(others) or f'the same, {before[min(entry.get("own_updates", 1), len(before) - 1)]}'
            except subprocess.CalledProcessError as error:
                others = [error.output.strip().splitlines()[-1] if error.output.strip() else f'status {error.returncode}']
                said = f'could not be evaluated: {others[0]}'
            done, different = done + 1, different + bool(others)
            print(f'{title}: {said}', flush=True)
    print(f'{done} evaluations repeated, {different} of them with another outcome; {left_out} left out for lack of data')
    return done > 0 and not different


def pack(source: str, destination: str) -> None:
    """Copies a run, or all runs in a folder; what an earlier packing left at the destination is replaced.

    Raises:
        UserError: there is no run, or a checkpoint cannot be read.
    """
    runs = [os.path.dirname(path) for path in glob.glob(os.path.join(glob.escape(source), '**', FLAG_FILE), recursive=True)]
    if not runs:
        raise UserError(f'there is no run (a folder with {FLAG_FILE}) in {source}')
    for directory in sorted(runs):
        pack_run(directory, os.path.join(destination, os.path.relpath(directory, source)))


def pack_run(directory: str, destination: str) -> None:
    """Copies one run; prints what is there now."""
    newest = checkpoints.find(directory, None)
    iteration, there = newest.record['iteration'], checkpoints.iterations(directory)
    best = {one['iteration']: checkpoints.find(directory, one['iteration']) for one in newest.record.get('ranking', [])
            if one['iteration'] in there and one['iteration'] != iteration}
    os.makedirs(destination, exist_ok=True)
    for path in glob.glob(os.path.join(glob.escape(destination), 'model*')):
        os.remove(path)
    checkpoints.save(checkpoints.path(destination, iteration), newest.arrays, newest.record)
    for other, checkpoint in best.items():
        checkpoints.save(checkpoints.path(destination, other), checkpoints.without_optimizer(checkpoint.arrays), checkpoint.record)
    shipped = {iteration, *best}
    entries = {name: entry for name, entry in results.existing(directory).items()
               if shipped.issuperset(entry.get('ensemble', [entry['iterations']]))}
    if entries:
        write_atomically(os.path.join(destination, results.FILE), json.dumps(entries, indent=1).encode())
    for name in ALSO:
        if os.path.exists(os.path.join(directory, name)):
            shutil.copyfile(os.path.join(directory, name), os.path.join(destination, name))
    size = sum(os.path.getsize(path) for path in glob.glob(os.path.join(glob.escape(destination), '*')))
    print(f'{destination}: model{iteration}{"".join(f", model{one}" for one in best)}; {len(entries)} evaluations; {size / 2 ** 20:.1f} MB')


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
    except UserError as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    command_line()

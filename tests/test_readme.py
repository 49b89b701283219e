"""The README's commands: the same as main.py's own, and working as printed, on a few iterations."""
import ast
import os
import pathlib
import re
import shlex
import shutil
import textwrap

import numpy as np
import pytest

import main
from conftest import ROOT, an_entry, run_ok, run_process
from runtime.cli import flags
from runtime.cli.request import resolve
from runtime.results import store

README = pathlib.Path(ROOT, 'README.md').read_text(encoding='utf-8')
PAGES = {path.name: path.read_text(encoding='utf-8') for path in pathlib.Path(ROOT, 'docs').glob('*.md')}
COMMANDS = re.findall(r'^python (main\.py --datasource=.*)$', README + PAGES['evaluation.md'], re.M)
TRAINING = [command for command in COMMANDS if '--train=False' not in command]
PREDICTION = sorted(set(re.findall(r'^python (main\.py .*--predict --support_dir.*)$', README + PAGES['evaluation.md'], re.M)))


def test_usage_text_and_readme_agree():
    assert [line.strip()[len('python '):] for line in main.USAGE.splitlines() if 'python main.py --' in line] == TRAINING


def test_evaluation_commands_are_training_commands_with_two_flags():
    for command in set(COMMANDS) - set(TRAINING):
        assert '--load_from' in command or command.removesuffix(' --train=False --test_set=True') in TRAINING


def test_runs_that_the_readme_evaluates_are_of_its_trainings():
    made = {os.path.normpath(resolve(main.parse(shlex.split(command))).directory) for command in TRAINING}
    named = re.findall(r'--run=(\S+/cls_\S+)', README)
    assert len(TRAINING) > 8 and named and set(map(os.path.normpath, named)) <= made


def test_flags_in_the_readme_exist():
    folders = [pathlib.Path(ROOT, folder) for folder in ('data', 'benchmarks')]
    scripts = ''.join(path.read_text() for folder in folders for path in folder.glob('**/*.py'))
    # Of docs/changing-the-algorithm.md, of a group of flags, of absl, and of --no-crop.
    example = {'head_init', 'flagfile', 'no'}
    text = re.sub('```bash.*?```', '', README + ''.join(PAGES.values()), flags=re.S)  # without SLURM's flags
    for name in re.findall(r'--([a-z]\w+)', text):
        assert name in flags.FLAGS or f"'--{name}'" in scripts or name in example, name


def test_commands_of_the_docs_parse(monkeypatch):
    """Flags, their values and files of configs/ in every command of this program that is printed in full."""
    monkeypatch.chdir(ROOT)
    commands = re.findall(r'^ *python (main\.py [^$\n]*)$', README + ''.join(PAGES.values()), re.M)
    for command in commands:
        if '...' not in command:
            main.parse(shlex.split(command))
    assert len(commands) > 80 and PREDICTION


@pytest.mark.parametrize('command', [
    pytest.param(command, marks=pytest.mark.slow) if command != TRAINING[0] else command
    for command in TRAINING])
def test_training_commands_run(command, small_data, tmp_path, few_tasks):
    """Two iterations of whichever phase the command asks for, of a small network and one inner update, then its evaluation on few tasks."""
    flags = [re.sub(r'^(--\w+_iterations)=[1-9]\d*$', r'\1=2', flag) for flag in shlex.split(command)[1:]] + [
        f'--logdir={tmp_path}']
    source = flags[0].removeprefix('--datasource=')
    flags += ['--num_updates=1'] * ('--num_updates' in command)
    flags += ['--meta_batch_size=2', '--update_batch_size=2'] * (source == 'navigation')
    if source in small_data:
        flags += [f'--data_path={small_data[source]}', '--num_filters=2', '--meta_batch_size=2']
    assert 'The last checkpoint is' in run_ok(*flags)
    assert 'meta-test, 40 tasks' in run_ok(*flags, '--train=False', '--test_set=True')


@pytest.mark.slow
@pytest.mark.parametrize('command', PREDICTION)
def test_prediction_command(command, small_omniglot, tmp_path):
    """As printed, of the shipped model, in a folder with examples and images of characters."""
    for number in range(3):
        for folder, image in (f'my_characters/{number}', '00.png'), ('my_drawings', '01.png'):
            os.makedirs(tmp_path / folder, exist_ok=True)
            shutil.copy(small_omniglot / 'alphabet' / f'test{number:02d}' / image, tmp_path / folder / f'{number}.png')
    shutil.copytree(os.path.join(ROOT, 'logs', 'omniglot5way'), tmp_path / 'logs' / 'omniglot5way')
    process = run_process(*shlex.split(command)[1:], cwd=tmp_path)
    assert process.returncode == 0 and 'predict_my_characters_my_drawings.csv and .png' in process.stdout, process.stderr


@pytest.mark.slow
def test_comparison_command(tmp_path):
    command, = re.findall(r'^python main\.py (--compare .*)$', README, re.M)
    for method in 'MAML', 'first-order MAML':
        folder = tmp_path / 'logs' / 'sine' / method
        folder.mkdir(parents=True)
        scores = np.random.default_rng(len(method)).random((5, 3))
        store.write(str(folder / store.FILE), [an_entry(scores, training={'method': method})])
    process = run_process(*command.split(), cwd=tmp_path)
    assert process.returncode == 0 and 'Drawn: logs/sine/comparison.png' in process.stdout, process.stderr


def test_the_functions_shown_are_those_of_the_program():
    """The README's listings are the code of maml.py, without type hints and docstrings."""
    listings = [ast.parse(textwrap.dedent(listing)).body[0] for listing in re.findall(r'```python\n(.*?)```', README, re.S)
                if 'def ' in listing]
    program = {node.name: node for node in ast.parse(pathlib.Path(ROOT, 'maml.py').read_text(encoding='utf-8')).body
               if isinstance(node, ast.FunctionDef)}
    assert [listing.name for listing in listings] == ['inner_step', 'meta_gradient']
    for listing in listings:
        function = program[listing.name]
        assert [argument.arg for argument in function.args.args] == [argument.arg for argument in listing.args.args]
        assert list(map(ast.dump, function.body[1:])) == list(map(ast.dump, listing.body))  # body[0] is the docstring

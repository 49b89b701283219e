"""The README's commands: the same as main.py's own, and working as printed, on a few iterations."""
import os
import pathlib
import re
import shlex

import pytest

import main
from conftest import ROOT, run_ok, run_process

with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as file:
    README = file.read()
COMMANDS = re.findall(r'^python (main\.py --datasource=.*)$', README, re.M)
TRAINING = [command for command in COMMANDS if '--train=False' not in command]


def test_usage_text_and_readme_agree():
    assert [line.strip()[len('python '):] for line in main.__doc__.splitlines() if 'python main.py --' in line] == TRAINING


def test_evaluation_commands_are_training_commands_with_two_flags():
    for command in set(COMMANDS) - set(TRAINING):
        assert '--load_from' in command or command.removesuffix(' --train=False --test_set=True') in TRAINING


def test_flags_in_the_readme_exist():
    folders = [pathlib.Path(ROOT, folder) for folder in ('data', 'benchmarks')]
    scripts = ''.join(path.read_text() for folder in folders for path in folder.glob('**/*.py'))
    for name in re.findall(r'--([a-z]\w+)', README):
        assert name in main.FLAGS or f"'--{name}'" in scripts, name


@pytest.mark.parametrize('command', TRAINING)
def test_training_commands_run(command, small_data, tmp_path, few_tasks):
    """Two iterations of whichever phase the command asks for, of a small network, then its evaluation on few tasks."""
    flags = [re.sub(r'^(--\w+_iterations)=[1-9]\d*$', r'\1=2', flag) for flag in shlex.split(command)[1:]] + [
        f'--logdir={tmp_path}']
    source = flags[0].removeprefix('--datasource=')
    if source in small_data:
        flags += [f'--data_path={small_data[source]}', '--num_filters=2', '--meta_batch_size=2']
    assert 'The last checkpoint is' in run_ok(*flags)
    assert 'meta-test, 40 tasks' in run_ok(*flags, '--train=False', '--test_set=True')


def test_a_command_as_printed(tmp_path):
    """In a process of its own, and all of its evaluation."""
    flags = [*shlex.split(TRAINING[0])[1:], f'--logdir={tmp_path}', '--metatrain_iterations=2']
    for more, words in ([], 'The last checkpoint is'), (['--train=False', '--test_set=True'], 'meta-test, 600 tasks'):
        process = run_process(*flags, *more)
        assert process.returncode == 0 and words in process.stdout, process.stderr

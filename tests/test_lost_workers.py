"""Several processes: no hang when one of them is gone, and none when they are not alike."""
import glob
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest

from clusters import PATIENCE, SINUSOID, checkpoint, finish, run, start
from conftest import ROOT, error_of, run_ok
from runtime.cli import workers
from runtime.system.errors import UserError


def wait_for_checkpoint(logdir, processes):
    until = time.monotonic() + PATIENCE
    while not glob.glob(f'{logdir}/*/model*.index'):
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The flags of a training of two workers, and what it ends with undisturbed."""
    flags, logdir = [*SINUSOID, '--metatrain_iterations=500'], tmp_path_factory.mktemp('whole')
    run('main', *flags, f'--logdir={logdir}', workers=2)
    return flags, checkpoint(logdir, 500)


@pytest.mark.slow
@pytest.mark.parametrize('victim, number', [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_worker_that_is_gone(victim, number, whole, tmp_path):
    """The others end within a minute with a message; all started again end as if nothing had happened, bit for bit."""
    flags, undisturbed = whole
    processes = start('main', *flags, f'--logdir={tmp_path}/killed', workers=2)
    wait_for_checkpoint(tmp_path / 'killed', processes)
    processes[victim].send_signal(number)
    before = time.monotonic()
    found = finish(processes)
    assert time.monotonic() - before < 60
    survivor = found[1 - victim]
    if number == signal.SIGKILL:
        assert found[victim][0] == -number
        assert survivor[0] == 1 and 'another worker has stopped' in survivor[2] and 'Traceback (' not in survivor[2], survivor
    else:  # both stop after the same iteration, and the chief saves that
        assert [status for status, *_ in found] == [143, 143]
        stopped = [re.findall(r'Stopped by SIGTERM after iteration (\d+);', errors) for *_, errors in found]
        assert stopped[0] == stopped[1] != [], found
    run('main', *flags, f'--logdir={tmp_path}/killed', workers=2)
    killed = checkpoint(tmp_path / 'killed', 500)
    for name in undisturbed.keys() - {'record'}:
        np.testing.assert_array_equal(killed[name], undisturbed[name], err_msg=name)


@pytest.mark.slow
def test_workers_that_are_not_alike(tmp_path):
    """In training and evaluation, by flags or by checkpoints: refused by all."""
    for folder, iterations in (0, 100), (1, 200):
        run_ok(*SINUSOID, f'--logdir={tmp_path}/{folder}', f'--metatrain_iterations={iterations}')
    folders = [f'--logdir={tmp_path}/{folder}' for folder in (0, 1)]
    shared = f'--logdir={tmp_path}/new'
    for flags, own in (
            (['--train=False'], folders),
            (['--metatrain_iterations=300'], [f'--logdir={tmp_path}/empty{worker}' for worker in (0, 1)]),
            ([shared], ['--seed=1', '--seed=2']),
            ([shared], [f'--load_from={glob.glob(f"{tmp_path}/{folder}/*/model{folder + 1}00.index")[0]}' for folder in (0, 1)])):
        for status, _, errors in finish(start('main', *SINUSOID, *flags, workers=2, own=own)):
            assert status == 1 and errors.startswith('main.py: the workers differ in their flags, images, checkpoints or'), errors


@pytest.mark.slow
def test_workers_with_other_code(tmp_path):
    """A program that differs by a comment is another program."""
    other = tmp_path / 'other'
    shutil.copytree(os.path.join(ROOT, 'runtime'), other / 'runtime')
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(path, other)
    with open(other / 'utils.py', 'a', encoding='utf-8') as file:
        file.write('# changed\n')
    for status, _, errors in finish(start('main', *SINUSOID, f'--logdir={tmp_path}/new', workers=2, roots=[ROOT, other])):
        assert status == 1 and 'or versions of this program' in errors, errors


@pytest.mark.slow
def test_a_worker_that_waits_can_be_stopped(tmp_path):
    first, second = start('main', *SINUSOID, f'--logdir={tmp_path}', workers=2)
    second.kill()
    first.stdout.readline()  # that it waits
    time.sleep(8)            # for TensorFlow to be imported
    first.send_signal(signal.SIGINT)  # TensorFlow handles SIGTERM itself meanwhile, and goes on waiting
    assert first.wait(timeout=20) in (-signal.SIGINT, 130)
    finish([first, second])


@pytest.mark.parametrize('text', ['', 'nonsense', '[]', '{}', '{"cluster": {"worker": ["a:1"]}}',
                                  '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
                                  '{"cluster": {"worker": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
                                  '{"cluster": {"worker": [1, 2]}, "task": {"type": "worker", "index": 0}}',
                                  '{"cluster": {"worker": ["a", "b"]}, "task": {"type": "worker", "index": 0}}',
                                  '{"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}',
                                  '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}'])
def test_a_configuration_that_makes_no_sense(text, monkeypatch):
    monkeypatch.setenv('TF_CONFIG', text)
    error = error_of('--strategy=multiworker')
    assert 'TF_CONFIG' in error and '"index": 0' in error


def test_cluster(monkeypatch):
    monkeypatch.setenv('TF_CONFIG', '{"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]}, '
                                    '"task": {"type": "worker", "index": 1}}')
    assert workers.cluster_from_environment('auto') == (3, 2)
    assert workers.cluster_from_environment('one') == workers.cluster_from_environment('mirrored') == (1, 0)
    monkeypatch.delenv('TF_CONFIG')
    assert workers.cluster_from_environment('auto') == (1, 0)


def test_a_classifier_needs_all_of_its_batch():
    with pytest.raises(UserError, match='cannot be spread over 2 replicas; add --strategy=one'):
        workers.check_classifier('classes', 20, 2)
    for harmless in ('tasks', 20, 2), ('classes', 0, 2), ('classes', 20, 1):
        workers.check_classifier(*harmless)


@pytest.mark.parametrize('tasks, replicas, words', [(25, 2, 'are 24 and 26'), (3, 8, 'is 8'), (33, 32, 'are 32 and 64')])
def test_tasks_that_cannot_be_divided(tasks, replicas, words):
    with pytest.raises(UserError, match=words):
        workers.check_meta_batch(tasks, 0, replicas)
    workers.check_meta_batch(replicas * 3, 0, replicas)


@pytest.mark.slow
def test_strategies_that_are_refused(tmp_path):
    found = finish(start('main', '--strategy=mirrored', '--meta_batch_size=25', f'--logdir={tmp_path}', devices=2))
    assert found[0][0] == 1 and 'the nearest that can are 24 and 26' in found[0][2]
    assert '--predict runs on one device' in error_of('--datasource=omniglot', '--predict', '--support_dir=.', '--query_dir=.',
                                                      '--strategy=mirrored')

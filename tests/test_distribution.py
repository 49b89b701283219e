"""Several devices and several processes: the same numbers as one, and no hang when one of them is gone."""
import glob
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import filelock
import numpy as np
import pytest
import tensorflow as tf

from conftest import ROOT, error_of, run_ok
from runtime.cli import workers
from runtime.system.errors import UserError

SINUSOID = ['--norm=None', '--update_batch_size=10', '--meta_batch_size=4', '--save_interval=100']
PATIENCE = 480  # seconds after which a process hangs


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for number in sockets:
        number.bind(('localhost', 0))
    ports = [number.getsockname()[1] for number in sockets]
    for number in sockets:
        number.close()
    return ports


def start(task, *arguments, workers=1, devices=1, own=(), roots=()):
    """Processes of main.py (task 'main') or tests/replicas.py, one for each worker; `own`: a further flag, `roots`: the program of each."""
    hosts = [f'localhost:{port}' for port in free_ports(workers)]
    script = ['main.py'] if task == 'main' and devices == 1 else ['tests/replicas.py', str(devices), task]
    processes = []
    for index in range(workers):
        environment = dict(os.environ)
        if workers > 1:
            environment['TF_CONFIG'] = json.dumps({'cluster': {'worker': hosts}, 'task': {'type': 'worker', 'index': index}})
        processes.append(subprocess.Popen([sys.executable, *script, *arguments, *own[index:index + 1]], text=True,
                                          cwd=roots[index] if roots else ROOT,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment))
    return processes


def finish(processes):
    """[(status, stdout, stderr)]; kills what hangs."""
    try:
        outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def run(*arguments, **where):
    found = finish(start(*arguments, **where))
    assert [status for status, *_ in found] == [0] * len(found), found
    return found


@pytest.fixture(scope='module')
def of_one(tmp_path_factory):
    """Computed once, also if several processes run the tests."""
    folder = tmp_path_factory.getbasetemp()
    path = str((folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder) / 'one.npz')
    with filelock.FileLock(f'{path}.lock'):
        if not os.path.exists(path):
            run('gradients', path)
    return np.load(path)


@pytest.mark.slow
@pytest.mark.parametrize('where', [{'devices': 2}, {'devices': 4}, {'workers': 2}, {'workers': 4}], ids=str)
def test_gradients_and_training_are_those_of_one_device(where, of_one, tmp_path):
    """Meta-gradients of a meta-batch to 1e-6, weights after 100 steps to 1e-4, relative to a tensor's largest number.

    The networks for images hold the latter by being the same to the last bit: from a single one on, ReLUs near zero part them.
    See runtime.compute.engine.SUM_DTYPE.
    """
    path = str(tmp_path / 'found.npz')
    run('gradients', path, **where)
    found, worst = np.load(path), {}
    assert found.files == of_one.files
    for name in found.files:
        what = ' '.join(name.split()[:2])
        scale = np.abs(of_one[name]).max() or 1
        worst[what] = max(worst.get(what, 0), np.abs(found[name] - of_one[name]).max() / scale)
    for what, deviation in worst.items():
        assert deviation < (1e-4 if 'trained' in what else 1e-6), worst


def variables(prefix):
    return {name: tf.train.load_variable(prefix, name) for name, _ in tf.train.list_variables(prefix)}


def checkpoint(logdir, iteration):
    path, = glob.glob(f'{logdir}/*/model{iteration}.index')
    return variables(path.removesuffix('.index'))


@pytest.mark.slow
def test_whole_runs(tmp_path):
    """Trained and evaluated by two processes: what one prints and writes, and only the chief does so."""
    flags = [*SINUSOID, '--metatrain_iterations=300', '--num_test_tasks=25']
    alone = run_ok(*flags, f'--logdir={tmp_path}/one') + run_ok(*flags, f'--logdir={tmp_path}/one', '--train=False')
    shown = []
    for more in [], ['--train=False']:
        (_, chief, _), (_, other, errors) = run('main', *flags, f'--logdir={tmp_path}/two', *more, workers=2)
        assert other.startswith('Worker 1 waits for the other 1') and other.count('\n') == 1 and 'Traceback' not in errors
        shown.append(chief)
    tables = [[float(number) for line in text.splitlines() if re.match(r' +\d+ +\d', line)
               for number in re.findall(r'[\d.]+', line)] for text in (alone, ''.join(shown))]
    assert len(tables[0]) == 33
    np.testing.assert_allclose(*tables, rtol=1e-3)
    one, two = checkpoint(tmp_path / 'one', 300), checkpoint(tmp_path / 'two', 300)
    for name in one.keys() - {'record'}:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-4 * np.abs(one[name]).max())
    assert len(glob.glob(f'{tmp_path}/two/*/events*')) == 1
    # What several have begun, one can go on with.
    assert 'Resuming from' in run_ok(*flags, f'--logdir={tmp_path}/two', '--metatrain_iterations=400')


@pytest.mark.slow
def test_nothing_is_compiled_for_each_step(tmp_path, monkeypatch):
    """Neither for each iteration of a call, nor for each inner step of an evaluation: once for each shape of tasks."""
    monkeypatch.setenv('TF_CPP_MIN_LOG_LEVEL', '0')
    monkeypatch.setenv('TF_CPP_VMODULE', 'device_compilation_profiler=1')
    (_, _, log), = run('main', *SINUSOID, '--strategy=mirrored', '--learn_lr=step', '--metatrain_iterations=20', f'--logdir={tmp_path}',
                       devices=2)
    compiled = re.findall(r'Compiled (\S+) (\d+) times', log)
    assert len(compiled) > 3 and max(int(times) for _, times in compiled) <= 2, compiled


def wait_for_checkpoint(logdir, processes):
    until = time.monotonic() + PATIENCE
    while not glob.glob(f'{logdir}/*/model*.index'):
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize('victim, number', [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_worker_that_is_gone(victim, number, tmp_path):
    """The others end within a minute with a message; all started again end as if nothing had happened, bit for bit."""
    flags = [*SINUSOID, '--metatrain_iterations=1500']
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
    run('main', *flags, f'--logdir={tmp_path}/whole', workers=2)
    killed, whole = checkpoint(tmp_path / 'killed', 1500), checkpoint(tmp_path / 'whole', 1500)
    for name in whole.keys() - {'record'}:
        np.testing.assert_array_equal(killed[name], whole[name], err_msg=name)


@pytest.mark.slow
def test_workers_that_are_not_alike(tmp_path):
    """In training and evaluation, by flags or by checkpoints: refused by all."""
    for folder, iterations in (0, 100), (1, 200):
        run_ok(*SINUSOID, f'--logdir={tmp_path}/{folder}', f'--metatrain_iterations={iterations}')
    folders = [f'--logdir={tmp_path}/{folder}' for folder in (0, 1)]
    shared = f'--logdir={tmp_path}/new'
    for flags, own in (
            (['--metatrain_iterations=300'], folders), (['--train=False'], folders),
            (['--metatrain_iterations=300'], [f'--logdir={tmp_path}/empty{worker}' for worker in (0, 1)]),
            ([shared], ['--seed=1', '--seed=2']), ([shared], ['--log=True', '--log=False']),
            ([shared], ['--save_interval=100', '--save_interval=50']),
            ([shared], [f'--load_from={path}' for path in glob.glob(f'{tmp_path}/*/*/model[12]00.index')[:2]])):
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


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason='processes in the background ignore Ctrl-C')
def test_a_worker_that_waits_can_be_stopped(tmp_path):
    first, second = start('main', *SINUSOID, f'--logdir={tmp_path}', workers=2)
    second.kill()
    first.stdout.readline()  # that it waits
    time.sleep(8)            # for TensorFlow to be imported
    first.send_signal(signal.SIGINT)  # TensorFlow handles SIGTERM itself meanwhile, and goes on waiting
    assert first.wait(timeout=20) != 0
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

"""Several devices and several processes: the same numbers as one."""
import glob
import os
import re

import filelock
import numpy as np
import pytest
from replicas import NETWORKS

from clusters import SINUSOID, checkpoint, run
from conftest import run_ok


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
    """Meta-gradients of a meta-batch to 1e-6, weights after training steps to 1e-4, relative to a tensor's largest number.

    The networks for images hold the latter by being the same to the last bit: from a single one on, ReLUs near zero part them.
    See runtime.compute.engine.SUM_DTYPE.
    """
    path = str(tmp_path / 'found.npz')
    run('gradients', path, **where)
    found, worst = np.load(path), {}
    assert found.files == [name for name in of_one.files if name.split()[0] in NETWORKS[max(where.values())]]
    for name in found.files:
        what = ' '.join(name.split()[:2])
        scale = np.abs(of_one[name]).max() or 1
        worst[what] = max(worst.get(what, 0), np.abs(found[name] - of_one[name]).max() / scale)
    for what, deviation in worst.items():
        assert deviation < (1e-4 if 'trained' in what else 1e-6), worst


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
    (_, _, log), = run('main', *SINUSOID, '--engine=vmap', '--strategy=mirrored', '--learn_lr=step', '--metatrain_iterations=20',
                       f'--logdir={tmp_path}', devices=2)
    compiled = re.findall(r'Compiled (\S+) (\d+) times', log)
    assert len(compiled) > 3 and max(int(times) for _, times in compiled) <= 2, compiled

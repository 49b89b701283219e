"""Interrupted runs lose nothing, runs that diverge or cannot save say so, and other flags than before are refused."""
import contextlib
import dataclasses
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow as tf

import kills
from conftest import ROOT, SINUSOID, directory_of, error_of, run_ok, run_process, write_image_tree
from data_generator import SOURCES, TaskBatch
from maml import MAML, ModelConfig
from runtime.jobs import checkpoints, saving
from runtime.jobs import train as training
from runtime.system.errors import UserError
from runtime.system.progress import Progress
from utils import Metrics


def saved(logdir):
    return checkpoints.iterations(str(directory_of(logdir)))


@contextlib.contextmanager
def running(*command):
    """A process and what it writes to either output; killed at the end, if it is still there."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in the background
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_until(process, beginning):
    """What a process writes up to and with a line of that beginning."""
    lines = []
    while not (lines and lines[-1].startswith(beginning)):
        lines.append(process.stdout.readline())
        assert lines[-1], ''.join(lines)
    return ''.join(lines)


# Interruption

@pytest.mark.slow
def test_killed_runs_end_like_undisturbed_ones(tmp_path):
    """The script that the README tells of, on few kills; its figures there are of many."""
    training = kills.Training(str(tmp_path), [*kills.SINUSOID, '--meta_batch_size=4', '--engine=map'], 2000)
    met, failures = kills.kill_repeatedly(training, 3, random.Random(0))
    assert met > 0 and not failures and training.runs > 1


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals(number, tmp_path):
    """The iteration in hand is finished and saved, the exit status is the customary one, and the run can go on."""
    flags = [*SINUSOID, f'--logdir={tmp_path}', '--log=False']
    with running(os.path.join(ROOT, 'main.py'), *flags, '--metatrain_iterations=10000000') as process:
        read_until(process, 'Iteration 1000:')
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and 'Traceback' not in output
    iteration, = re.findall(rf'Stopped by {number.name} after iteration (\d+); the newest checkpoint is .*/model\1\. '
                            'Run the same command to resume', output)
    assert int(iteration) == saved(tmp_path)[-1] and int(iteration) % 100 == 0
    assert f'model{iteration}' in run_ok(*flags, f'--metatrain_iterations={int(iteration) + 100}')


@pytest.fixture
def sigint():
    """Restores how this process takes SIGINT; runs in the background begin with ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_signal_ends_at_once(sigint):
    with training.Interruption() as interruption:
        assert interruption.signal is None
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_signals_that_are_ignored_stay_so(sigint):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with training.Interruption():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.slow
def test_console_means_survive(tmp_path, monkeypatch):
    """A line's mean covers the iterations before an interruption as well."""
    lines = {}
    for name, ends in ('whole', [1000]), ('parts', [300, 700, 1000]):
        for end in ends:
            output = run_ok(*SINUSOID, f'--logdir={tmp_path / name}', f'--metatrain_iterations={end}')
        lines[name] = re.findall('^Iteration 1000: .*$', output, re.M)
    assert lines['whole'] == lines['parts'] and len(lines['whole']) == 1


def test_save_interval(tmp_path):
    run_ok(*SINUSOID, f'--logdir={tmp_path}', '--metatrain_iterations=900', '--save_interval=250')
    assert saved(tmp_path) == [250, 500, 750, 900]


@pytest.mark.slow
def test_a_resume_within_pre_training_and_after_it(tmp_path, few_tasks):
    """Both phases in one run end with the same bits, whichever checkpoint they continue from."""
    flags = [*SINUSOID, f'--logdir={tmp_path}', '--pretrain_iterations=5', '--metatrain_iterations=5', '--save_interval=2']
    run_ok(*flags)
    last = checkpoints.path(str(directory_of(tmp_path)), 10)
    whole = checkpoints.load(last).arrays
    for start in 8, 6, 4, 2:
        assert f'model{start}' in run_ok(*flags, f'--test_iter={start}')
        again = checkpoints.load(last).arrays
        assert whole.keys() == again.keys() and all(np.array_equal(array, again[name]) for name, array in whole.items()), start


# Flags that contradict a checkpoint

@pytest.mark.slow
def test_contradictions_are_spelt_out(tmp_path):
    run_ok(*SINUSOID, f'--logdir={tmp_path}', '--metatrain_iterations=100')
    on = [*SINUSOID, f'--logdir={tmp_path}', '--metatrain_iterations=200']
    for other in '.metalr0.01', '.metalr0.01.seed3', '.seed3.metalr0.01':  # runs of these flags would have directories of their own
        shutil.copytree(next(tmp_path.glob('*nonorm')), f'{next(tmp_path.glob("*nonorm"))}{other}')
    error = error_of(*on, '--meta_lr=0.01', '--seed=3')
    assert 'model100 was made with --seed=0, --meta_lr=0.001, and not with --seed=3, --meta_lr=0.01; give the flags' in error
    assert '--resume=False' in error
    assert 'made with --pretrain_iterations=0, and not with --pretrain_iterations=50' in error_of(*on, '--pretrain_iterations=50')
    os.rename(tmp_path, f'{tmp_path}_moved')
    output = run_ok(*on, f'--logdir={tmp_path}_moved', '--save_interval=50', '--log=False', '--num_filters=64')
    assert 'Resuming from' in output


@pytest.mark.slow
def test_an_evaluation_without_the_pretraining_of_its_run_is_refused(tmp_path, few_tasks):
    """And a training goes on without ranking checkpoints that are gone."""
    flags = [*SINUSOID, f'--logdir={tmp_path}', '--pretrain_iterations=1', '--log=False']
    run_ok(*flags, '--metatrain_iterations=1')
    assert 'made with --pretrain_iterations=1, and not with --pretrain_iterations=0' in error_of(
        *flags, '--pretrain_iterations=0', '--train=False')
    assert '40 tasks' in run_ok(*flags, '--train=False')
    run = str(directory_of(tmp_path))
    prefix, arrays, record, _ = checkpoints.load(checkpoints.path(run, 2))
    best = {'iteration': 1, 'score': -1.0}
    checkpoints.save(prefix, arrays, {**record, 'best': best, 'ranking': [best]})
    assert 'model3 did best' in run_ok(*flags, '--metatrain_iterations=2')


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
def test_schedules_are_those_of_meta_training(schedule):
    """Pre-training has the first step size throughout, however many of its iterations are computed in one call."""
    config = ModelConfig(1, 1, 'mse', 5, 0.01, norm='None', meta_lr=0.01, metatrain_iterations=3, dim_hidden=(4,))
    batches = TaskBatch(*np.random.default_rng(0).normal(size=(4, 6, 2, 5, 1)).astype(np.float32))
    plain, scheduled = (MAML(dataclasses.replace(config, **more)) for more in ({}, {'meta_lr_schedule': schedule}))
    for model in plain, scheduled:
        model.train_steps('pretrain', batches)
    for name, weights in plain.parameters().items():
        np.testing.assert_array_equal(weights, scheduled.parameters()[name])


@pytest.mark.slow
def test_other_images_are_refused(tmp_path, few_tasks):
    """A run on images that have changed since is another run."""
    write_image_tree(tmp_path / 'data', [f'class{number:02d}' for number in range(8)], images=3, size=(20, 20, 3))
    flags = ['--datasource=folder', f'--data_path={tmp_path}/data', '--image_size=20', '--num_classes=2', '--update_batch_size=1',
             '--conv=False', '--hidden=4', '--engine=map', '--meta_batch_size=2', f'--logdir={tmp_path}/logs', '--split=4/2/2']
    run_ok(*flags, '--metatrain_iterations=2')
    os.rename(tmp_path / 'data', tmp_path / 'moved')
    flags[1] = f'--data_path={tmp_path}/moved'
    run_ok(*flags, '--metatrain_iterations=3')
    train = (tmp_path / 'moved' / 'splits.csv').read_text().splitlines()
    changed, = [line.split(',')[1] for line in train if line.startswith('train,')][:1]
    os.remove(tmp_path / 'moved' / changed / '00.png')
    error = error_of(*flags, '--metatrain_iterations=4')
    assert 'the images of the train split are not those that the checkpoint' in error
    assert 'Training' in run_ok(*flags, '--metatrain_iterations=4', '--resume=False')


def test_starting_anew_puts_the_summaries_aside(tmp_path):
    for _ in range(2):
        output = run_ok(*SINUSOID, f'--logdir={tmp_path}', '--metatrain_iterations=100', '--resume=False')
    assert f'Later checkpoints were moved to {directory_of(tmp_path)}/earlier1' in output
    for path in directory_of(tmp_path).glob('model*'):
        path.unlink()
    output = run_ok(*SINUSOID, f'--logdir={tmp_path}', '--metatrain_iterations=100', '--resume=False')
    assert 'Summaries and results that were there before this training were moved to' in output
    assert len(list(directory_of(tmp_path).glob('events*'))) == len(list(directory_of(tmp_path).glob('earlier1/events*'))) == 1


def test_checkpoints_are_ranked_by_as_many_tasks_as_asked(tmp_path, monkeypatch):
    counts, evaluate_tasks = [], training.evaluate_tasks
    monkeypatch.setattr(training, 'evaluate_tasks',
                        lambda model, tasks, count, *more: counts.append(count) or evaluate_tasks(model, tasks, count, *more))
    output = run_ok(*SINUSOID, f'--logdir={tmp_path}', '--metatrain_iterations=4', '--save_interval=2', '--validation_tasks=7')
    assert counts == [7, 7] and re.search(r'did best \(--test_best\), with a loss of [\d.]+ on 7 tasks', output)
    assert '--validation_tasks=7' in (directory_of(tmp_path) / 'run.flags').read_text()
    monkeypatch.setattr(training, 'ranked', lambda run, ranking, *_: ranking)  # the earlier ones stay best
    output = run_ok(*SINUSOID, f'--logdir={tmp_path}', '--metatrain_iterations=6', '--save_interval=2', '--validation_tasks=9')
    assert 'Note: earlier checkpoints were ranked on 7 tasks of meta-validation, later ones are ranked on 9' in output
    assert re.search(r'did best \(--test_best\), with a loss of [\d.]+ on 7 tasks', output)


def test_a_validation_task_that_diverged_counts_as_wrong(monkeypatch):
    """It must not hide what the others say."""
    metrics = Metrics(np.zeros(4), np.zeros([1, 4]), np.full(4, 0.25), np.array([[1, np.nan, 1, 0]]))
    monkeypatch.setattr(training, 'evaluate_tasks', lambda *_: metrics)
    nothing = types.SimpleNamespace(write=lambda *_: None, log=lambda _: None)
    run = types.SimpleNamespace(metric='accuracy', plot=False, validation_tasks=4, model=types.SimpleNamespace(num_updates=1),
                                source=types.SimpleNamespace(validation_updates=1, print_interval=100))
    assert training.validate(run, None, None, 500, False, nothing, nothing) == (0.25, 0.5)


def test_a_score_that_is_no_number_is_not_the_best():
    def ranked(count, *scores, metric='loss'):
        ranking, run = [], types.SimpleNamespace(metric=metric, ensemble=count, validation_tasks=300)
        for iteration, score in enumerate(scores):
            ranking = training.ranked(run, ranking, iteration, score)
        return [entry['iteration'] for entry in ranking]

    assert ranked(1, math.nan) == [] and ranked(1, 0.5, math.nan) == [0]
    assert ranked(1, 0.5, 0.4) == [1] and ranked(1, 0.5, 0.6) == [0] and ranked(1, 0.5, 0.5) == [0]
    assert ranked(3, 0.5, 0.4, math.inf, 0.5, 0.6) == [1, 0, 3] and ranked(2, 0.5, 0.4, 0.6, metric='accuracy') == [2, 0]


@pytest.mark.slow
def test_another_network_is_refused(small_data, tmp_path, few_tasks):
    """Also where all weights have the same shapes."""
    flags = ['--datasource=omniglot', '--update_batch_size=1', '--num_filters=4', '--meta_batch_size=2', '--stop_grad', '--log=False',
             f'--data_path={small_data["omniglot"]}', f'--logdir={tmp_path}']
    run_ok(*flags, '--metatrain_iterations=2', '--max_pool')
    prefix = str(directory_of(tmp_path) / 'model2')
    for train in '--train=True', '--train=False':
        error = error_of(*flags, train, '--metatrain_iterations=4', f'--load_from={prefix}.index')
        assert f'{prefix} was made with --max_pool=True, and not with --max_pool=False' in error


# Numbers that go wrong

def test_divergence_stops_the_run(tmp_path):
    error = error_of(*SINUSOID, f'--logdir={tmp_path}', '--update_lr=1e30', '--metatrain_iterations=200')
    assert re.search(r'diverged: in iteration 1 the loss is [\d.]+ before and (inf|nan) after', error)
    assert 'nothing was saved yet' in error and '--update_lr' in error and '--skip_nonfinite' in error
    assert saved(tmp_path) == []


def test_skipping(tmp_path, capsys):
    """Where no iteration counted, nothing was learnt, and the training fails."""
    error = error_of(*SINUSOID, f'--logdir={tmp_path}', '--update_lr=1e30', '--metatrain_iterations=1000', '--skip_nonfinite')
    output = capsys.readouterr().out
    assert 'Iteration 1000: nan, nan\nSkipped 1000 iterations so far (non-finite loss or gradient)' in output
    assert '1000 of 1000 iterations were skipped' in output and 'nothing was learnt: no iteration had a finite loss' in error
    again = [*SINUSOID, f'--logdir={tmp_path}', '--update_lr=1e30', '--metatrain_iterations=1000', '--skip_nonfinite']
    assert 'nothing was learnt' in error_of(*again) and 'nothing was learnt' in error_of(*again, '--train=False')
    checkpoint = checkpoints.newest(str(directory_of(tmp_path)))
    assert checkpoint.record['skipped'] == 1000 and checkpoint.arrays['metatrain/adam/step'] == 0


def test_an_infinite_gradient_of_a_finite_loss_changes_nothing():
    """A bound would make it finite."""
    from data_generator import TaskBatch
    model = MAML(ModelConfig(1, 1, 'mse', 1, 0.1, norm='None', dim_hidden=(), stop_grad=True, clip=1.0))
    model.weights['w1'].assign([[0.]])
    zero = np.zeros([1, 1, 1], np.float32)
    step = model.metatrain_step(TaskBatch(zero, zero, zero + np.float32(1e30), zero + np.float32(1e10)))
    assert np.isfinite(step['post_loss']) and not step['finite'] and model.weights['w1'].numpy() == 0


@pytest.mark.parametrize('image_shape', [pytest.param(None, marks=pytest.mark.slow), (8, 8, 1)])
def test_a_step_that_is_not_finite_changes_nothing(image_shape):
    config = ModelConfig(dim_input=64, dim_output=3, loss='xent', update_batch_size=2, update_lr=0.1, image_shape=image_shape,
                         num_filters=4, dim_hidden=(5,), clip=1.0)
    rng = np.random.default_rng(0)
    from data_generator import TaskBatch
    batches = TaskBatch(*(rng.random((3, 2, 6, columns), np.float32) for columns in (64, 3, 64, 3)))
    batches.query_x[1, 0, 0, 0] = np.nan
    with_it, without = MAML(config), MAML(config)
    assert with_it.train_steps('metatrain', batches)['finite'].numpy().tolist() == [True, False, True]
    without.train_steps('metatrain', TaskBatch(*(array[::2] for array in batches)))
    for name, variable in with_it.state().items():
        np.testing.assert_array_equal(variable, without.state()[name], err_msg=name)


def test_infinite_weights_are_not_saved(tmp_path):
    model = MAML(ModelConfig(dim_input=1, dim_output=1, loss='mse', update_batch_size=2, update_lr=0.1))
    model.weights['w2'].assign(tf.fill([40, 40], np.inf))
    run = types.SimpleNamespace(directory=str(tmp_path), skip_nonfinite=False, source=SOURCES['sinusoid'], model=model.config)
    with pytest.raises(UserError, match='w2 contains NaN or infinity after iteration 7; nothing was saved yet'):
        saving.Saver(run, model, {}, 0, print).save(saving.TrainState(iteration=7), [])
    assert not any(tmp_path.iterdir())


def test_a_signal_at_the_end_tries_to_save_once_more(tmp_path, monkeypatch):
    """The disk was full, and is not any more."""
    saves, full = [], iter([OSError('No space left on device'), None])

    def save(prefix, *_):
        saves.append(prefix)
        if error := next(full):
            raise error
    monkeypatch.setattr(checkpoints, 'save', save)
    run = types.SimpleNamespace(directory=str(tmp_path), replicas=types.SimpleNamespace(chief=True), learning_flags={},
                                last_phase='metatrain', pretrain_iterations=0)
    saver, state = saving.Saver(run, types.SimpleNamespace(state=dict), {}, 0, print), saving.TrainState(iteration=7)
    saver.save(state, [])
    assert saver.iteration == 0
    saver.finish(state, [], types.SimpleNamespace(signal=15))
    assert saver.iteration == 7 and len(saves) == 2


# Saving that fails

def test_a_full_disk(tmp_path, monkeypatch):
    """It is said, training goes on, and saving is tried again until it works, also after the last iteration."""
    save, attempts = checkpoints.save, []

    def sometimes(prefix, state, record):
        attempts.append(record['iteration'])
        if len(attempts) <= 3:
            raise OSError(28, 'No space left on device')
        save(prefix, state, record)

    monkeypatch.setattr(checkpoints, 'save', sometimes)
    monkeypatch.setattr(saving, 'RETRY_SECONDS', 0.01)
    output = run_ok(*SINUSOID, f'--logdir={tmp_path}', '--metatrain_iterations=200', '--save_interval=100')
    assert output.count('No space left on device') == 3 and 'Training continues' in output
    assert attempts == [100, 200, 200, 200] and saved(tmp_path) == [200]
    assert 'Saving works again' in output and checkpoints.newest(str(directory_of(tmp_path))).record['best']['iteration'] == 200


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """The system's own limit on the size of files stands in for it; the summaries fail as well."""
    limit = 'import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); ' \
            'sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
    with running('-c', limit, os.path.join(ROOT, 'main.py'), *SINUSOID, f'--logdir={tmp_path}',
                 '--metatrain_iterations=1000000') as process:
        output = read_until(process, 'Iteration 3000:')
        process.terminate()
        output += process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM and 'Traceback' not in output, output
    assert re.search(r'Saving .*model1000 failed \([^{]*\)\. Training', output) and 'nothing is saved' in output
    assert saved(tmp_path) == [] and not (directory_of(tmp_path) / '.saving').exists()


@pytest.mark.slow
def test_a_second_process_is_refused(tmp_path):
    run_ok(*SINUSOID, f'--logdir={tmp_path}', '--metatrain_iterations=100')
    with checkpoints.exclusive(str(directory_of(tmp_path))):
        process = run_process(*SINUSOID, f'--logdir={tmp_path}', '--metatrain_iterations=200')
        assert process.returncode == 1 and 'another process is training in' in process.stderr
        assert 'meta-validation' in run_ok(*SINUSOID, f'--logdir={tmp_path}', '--train=False')


def test_a_log_file_on_a_full_disk(monkeypatch):
    """What cannot be printed during training is lost, and nothing else."""
    with Progress(0, 10) as progress:
        for stream in 'stdout', 'stderr':
            with monkeypatch.context() as patch:
                patch.setattr(sys, stream, open('/dev/full', 'w', buffering=1))
                with pytest.raises(OSError):
                    print('a line', file=getattr(sys, stream), flush=True)
                progress.fp = sys.stderr
                progress.log('a line')
                progress.display()


def test_output_that_nobody_reads():
    command = ['bash', '-c', 'set -o pipefail; "$0" "$1" --help | true', sys.executable, f'{ROOT}/main.py']
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 141 and process.stderr == ''

"""benchmarks/study.py: a list of runs, trained and evaluated one after the other; and the script for SLURM in docs/study.md."""
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import run_files

import study
from conftest import ROOT, an_entry
from runtime.results import store
from runtime.system.errors import UserError

SINUSOID = os.path.join(ROOT, 'configs', 'sinusoid_10shot.flags')


def runs_of(tmp_path, *varied):
    return study.runs_of([SINUSOID], varied, [f'--logdir={tmp_path}', '--metatrain_iterations=5'])


def test_runs_are_the_combinations_of_values(tmp_path):
    runs = runs_of(tmp_path, 'method=maml,anil', 'seed=0,1')
    assert [run.arguments[-2:] for run in runs] == [
        [f'--method={method}', f'--seed={seed}'] for method in ('maml', 'anil') for seed in (0, 1)]
    assert len({run.training.directory for run in runs}) == 4 and all(run.evaluation.test_set and not run.evaluation.train for run in runs)


def test_a_run_that_starts_from_weights_is_evaluated_itself(tmp_path):
    run, = study.runs_of([SINUSOID], (), [f'--logdir={tmp_path}', '--load_from=/elsewhere/model5', '--num_test_tasks=7'])
    assert (run.training.load_from, run.evaluation.load_from) == ('/elsewhere/model5', None)
    assert set(run.evaluation_arguments) == {
        f'--run={run.training.directory}', '--num_test_tasks=7', *study.EVALUATION, '--test_iter=70000', '--test_query=-1', '--test_seed=0',
        '--query_norm=batch', '--ensemble=1', '--test_updates=-1'}, 'also what the training may have recorded for its evaluations'


def test_the_ensemble_of_an_earlier_study_is_not_that_of_a_longer_one(tmp_path):
    run, = study.runs_of([SINUSOID], (), [f'--logdir={tmp_path}', '--ensemble=2', '--metatrain_iterations=5'])
    os.makedirs(run.training.directory)
    tasks = {'split': 'test', 'update_batch_size': 10, 'query_shots': 10, 'count': 600}
    for number in 1, 3, 5:
        pathlib.Path(run.training.directory, f'model{number}.index').touch()
    for members, is_evaluated in ([3, 1], False), ([5, 3, 1], False), ([5, 1], True):
        store.add(run.training.directory, an_entry(np.ones([600, 11]), tasks=tasks, checkpoint=f'model{members[0]}',
                                                   iterations=members[0], ensemble=members, training={'newest': members[0]}))
        assert run.is_evaluated == is_evaluated
    alone, = study.runs_of([SINUSOID], (), [f'--logdir={tmp_path}', '--metatrain_iterations=5'])
    assert not alone.is_evaluated


def test_an_ensemble_of_a_longer_training_is_refused_and_the_other_runs_are_made(tmp_path, monkeypatch, capsys):
    """Nor does a file of results that cannot be read end the study."""
    calls = []
    monkeypatch.setattr(study, 'call', lambda arguments: calls.append(arguments) or 0)
    runs = study.runs_of([SINUSOID], ['seed=0,1,2'], [f'--logdir={tmp_path}', '--ensemble=2', '--metatrain_iterations=5'])
    for run, numbers in zip(runs, ([3, 5, 9], [3, 5], [3, 5])):
        os.makedirs(run.training.directory)
        for number in numbers:
            pathlib.Path(run.training.directory, f'model{number}.index').touch()
    pathlib.Path(runs[1].training.directory, store.FILE).write_text('damaged')
    assert study.make(runs) == [run.name for run in runs[:2]] and calls == [runs[2].evaluation_arguments]
    printed = capsys.readouterr().out
    assert 'was trained for longer than 5 iterations, and an ensemble is of the whole training' in printed and 'cannot be read' in printed


def test_an_evaluation_on_other_data_is_not_the_one_asked_for(tmp_path):
    for name in 'mine', 'other':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'rows.csv').write_text('x,y,label\n' + ''.join(f'{row},{row},{row % 9}\n' for row in range(180)))
    flags = ['--datasource=table', f'--data_path={tmp_path / "mine"}', '--label_column=label', '--split=5/2/2', '--num_classes=2',
             '--norm=None', f'--logdir={tmp_path}/logs']
    request = run_files.request_of([*flags, *run_files.EVALUATION])
    tasks = {'datasource': 'table', 'split': 'test', 'num_classes': 2, 'update_batch_size': 5, 'query_shots': 5, 'count': 600}
    for folder, count in ('other', 0), ('mine', 1):
        entry = dataclasses.replace(an_entry(np.ones([600, 11]), tasks=tasks), data_path=str(tmp_path / folder))
        store.add(str(tmp_path), entry)
        assert len(run_files.evaluations_asked(str(tmp_path), request)) == count


def test_a_training_on_other_data_or_from_other_weights_is_not_the_one_asked_for(tmp_path):
    """The directory's name is the same; main.py then refuses to go on with it."""
    linear = '--meta_lr_schedule=linear\n--meta_lr_final=0\n'
    for recorded, asked, is_trained in (
            ('', [], True), (f'--load_from={tmp_path}/model3', [], False), (f'--data_path={tmp_path}', [], False),
            ('--pretrain_iterations=2\n--metatrain_iterations=3', [], False), ('--metatrain_iterations=9', [], True),
            (f'{linear}--metatrain_iterations=9', linear.split(), False), (f'{linear}--metatrain_iterations=5', linear.split(), True)):
        run, = study.runs_of([SINUSOID], (), [f'--logdir={tmp_path}', '--metatrain_iterations=5', *asked])
        os.makedirs(run.training.directory, exist_ok=True)
        pathlib.Path(run.training.directory, 'model5.index').touch()
        pathlib.Path(run.training.directory, 'run.flags').write_text(f'--norm=None\n{recorded}\n')
        assert run.is_trained == is_trained


def test_a_run_whose_data_moved_is_not_evaluated_again(tmp_path, monkeypatch):
    """main.py finds that they are the same, and has nothing to do."""
    calls = []
    monkeypatch.setattr(study, 'call', calls.append)
    run, = runs_of(tmp_path)
    os.makedirs(run.training.directory)
    pathlib.Path(run.training.directory, 'model5.index').touch()
    pathlib.Path(run.training.directory, 'run.flags').write_text(f'--norm=None\n--data_path={tmp_path}\n')
    store.add(run.training.directory, an_entry(np.ones([600, 11]), tasks={'split': 'test', 'update_batch_size': 10, 'query_shots': 10,
                                                                         'count': 600}))
    assert study.make([run]) == [] and calls == [run.arguments]


def test_all_mistakes_are_reported_before_the_first_run(tmp_path):
    with pytest.raises(UserError) as error:
        runs_of(tmp_path, 'max_pool=True,False', 'update_lr=1,x', 'test_seed=1,2')
    sentence = str(error.value)
    assert 'is for images' in sentence and '--update_lr=x' in sentence and 'have one directory' in sentence


def test_images_that_are_not_prepared_are_reported_once_before_the_first_run(tmp_path):
    config = os.path.join(ROOT, 'configs', 'fc100_5way1shot.flags')
    with pytest.raises(UserError, match=r'--seed=0, and 1 more: the train split in .* has no classes') as error:
        study.runs_of([config], ['seed=0,1'], [f'--data_path={tmp_path}', f'--logdir={tmp_path}'])
    assert str(error.value).count('has no classes') == 1


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(study, 'call', lambda arguments: calls.append(arguments) or '--seed=1' in arguments)
    first, second, third = runs = runs_of(tmp_path, 'seed=0,1,2')
    for run in first, third:
        os.makedirs(run.training.directory)
        pathlib.Path(run.training.directory, 'model5.index').touch()
    tasks = {'split': 'test', 'update_batch_size': 10, 'query_shots': 10, 'count': 600}
    for changes in ({'tasks': {**tasks, 'seed': 1}}, {'iterations': 4}, {'setting': {'head': 'nearest neighbour'}},
                    {'setting': {'permutations': 3, 'orders': 'mean'}}, {'setting': {'update_lr': 0.5}}):
        store.add(third.training.directory, an_entry(np.ones([600, 11]), **{'tasks': tasks, **changes}))
    store.add(first.training.directory, an_entry(np.ones([600, 11]), tasks=tasks))
    assert study.make(runs) == [second.name]
    assert calls == [second.arguments, [*third.arguments, *study.EVALUATION, '--test_iter=5']]


@pytest.mark.slow
def test_the_script_for_slurm_continues_after_a_signal(tmp_path):
    """With stand-ins for srun and scontrol."""
    script, = re.findall(r'```bash\n(.*?)```', pathlib.Path(ROOT, 'docs', 'study.md').read_text(encoding='utf-8'), re.S)
    command, = re.findall(r'srun --ntasks=1 (.*) &', script)
    mine = (f'{sys.executable} {ROOT}/benchmarks/study.py {SINUSOID} --vary seed=0 --metatrain_iterations=8000 --save_interval=1000 '
            f'--num_test_tasks=5 --logdir=logs/')
    (tmp_path / 'job').write_text(script.replace(command, mine))
    (tmp_path / 'srun').write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tmp_path / 'scontrol').write_text('#!/bin/sh\necho "$@" >> asked\n')
    for name in 'srun', 'scontrol':
        (tmp_path / name).chmod(0o755)

    def start():
        environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '42'}
        return subprocess.Popen(['bash', 'job'], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    job, deadline = start(), time.monotonic() + 100
    while not list(tmp_path.glob('logs/*/model*.index')):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=100)[0]
    assert 'Stopped by SIGTERM after iteration' in output and (tmp_path / 'asked').read_text() == 'requeue 42\n', output
    assert not list(tmp_path.glob('logs/*/model8000.index'))
    job = start()
    output = job.communicate(timeout=200)[0]
    assert job.returncode == 0 and 'Resuming from' in output and 'All 1 runs are trained and evaluated' in output, output
    assert (tmp_path / 'asked').read_text() == 'requeue 42\n'

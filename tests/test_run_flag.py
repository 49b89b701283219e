"""--run=DIR: the flags of a training, without repeating them."""
import os
import shutil

import pytest

from conftest import ROOT, error_of, results_of, run_ok, run_process

TRAINED = ['--norm=None', '--update_batch_size=3', '--metatrain_iterations=2', '--meta_batch_size=2', '--num_updates=2']


@pytest.fixture(scope='module')
def training(tmp_path_factory):
    """The log directory of a short training."""
    logdir = tmp_path_factory.mktemp('training')
    run_ok(*TRAINED, f'--logdir={logdir}')
    return logdir


@pytest.fixture
def trained(training, tmp_path):
    """The log directory and the experiment directory of a copy of it."""
    shutil.copytree(training, tmp_path / 'logs')
    directory, = (tmp_path / 'logs').iterdir()
    return tmp_path / 'logs', directory


def evaluation(directory):
    return results_of(directory)[-1]


@pytest.mark.slow
def test_the_flags_of_a_training_are_written_down(trained):
    assert [line for line in (trained[1] / 'run.flags').read_text().splitlines() if not line.startswith('# ')] == [
        '--metatrain_iterations=2', '--meta_batch_size=2', '--update_batch_size=3', '--num_updates=2', '--norm=None']


@pytest.mark.slow
def test_evaluation_by_run_is_that_by_all_flags(trained):
    logdir, directory = trained
    run_ok(*TRAINED, f'--logdir={logdir}', '--train=False', '--num_test_tasks=5')
    by_flags = evaluation(directory).scores
    for named in directory, logdir:
        assert '3-shot sinusoid' in run_ok(f'--run={named}', '--train=False', '--num_test_tasks=5')
        assert evaluation(directory).scores == by_flags


@pytest.mark.slow
def test_training_goes_on_where_it_was_renamed_to(trained):
    logdir, directory = trained
    directory = directory.rename(logdir / 'another name')
    assert 'Nothing to do' in run_ok(f'--run={directory}')
    assert 'Resuming from' in run_ok(f'--run={directory}', '--metatrain_iterations=4')
    assert sorted(path.name for path in directory.glob('*.index')) == ['model2.index', 'model4.index']
    assert '--metatrain_iterations=4' in (directory / 'run.flags').read_text()


def test_other_tasks_than_in_training(trained):
    """The evaluation is told the shot and the step size of the training."""
    output = run_ok(f'--run={trained[0]}', '--train=False', '--update_batch_size=7', '--update_lr=0.1', '--num_test_tasks=5')
    assert ('7-shot sinusoid' in output and evaluation(trained[1]).tasks.update_batch_size == 7
            and evaluation(trained[1]).setting.update_lr == 0.1)


def test_initial_weights_of_a_run_that_started_from_others(trained):
    with open(trained[1] / 'run.flags', 'a', encoding='utf-8') as file:
        file.write('--load_from=/elsewhere/model3\n')
    sentence = error_of(f'--run={trained[1]}', '--train=False', '--test_iter=0')
    assert 'did not start from initial weights; evaluate those that it started from by --load_from=/elsewhere/model3' in sentence


def test_what_was_learnt_cannot_be_contradicted(trained):
    error = error_of(f'--run={trained[0]}', '--num_updates=3', '--norm=batch_norm', '--meta_lr=0.1')
    assert '--num_updates=3 contradicts --num_updates=2' in error and '--norm=batch_norm contradicts --norm=None' in error
    assert '--meta_lr=0.1 contradicts --meta_lr=0.001' in error
    assert 'Nothing to do' in run_ok(f'--run={trained[0]}', '--baseline=None')
    assert '--norm=layer_norm contradicts' in error_of(f'--run={trained[0]}', '--train=False', '--norm=layer_norm')
    assert '--update_lr=0.1 contradicts' in error_of(f'--run={trained[0]}', '--update_lr=0.1')
    assert 'leave out --logdir' in error_of(f'--run={trained[0]}', '--logdir=elsewhere')


@pytest.mark.parametrize('content', [b'', b'\xff\xfe', b'norm=None\n', b'--norm=group_norm\n', b'--update_lr=nan\n', b'--train=False\n',
                                     b'--nonsense=1\n', b'--num_updates=x\n', b'--num_updates=\n', b'\0' * 100])
def test_a_damaged_file_of_flags(trained, content):
    (trained[1] / 'run.flags').write_bytes(content)
    if content:
        assert 'run.flags cannot be read, or no training wrote it' in error_of(f'--run={trained[1]}', '--train=False')
    else:  # all defaults: another network than that of the checkpoint
        assert 'was made with --norm=None' in error_of(f'--run={trained[1]}', '--train=False')


def test_a_pre_training_does_not_become_a_meta_training(tmp_path):
    """Its directory says that it is one, and its checkpoints could not be evaluated with those that follow."""
    (tmp_path / 'run.flags').write_text('--norm=None\n--pretrain_iterations=5\n--metatrain_iterations=0\n')
    error = error_of(f'--run={tmp_path}', '--metatrain_iterations=7')
    assert 'is of pre-training only' in error and f'--load_from={tmp_path}/model5' in error


def test_folders_that_are_no_run(trained, tmp_path):
    assert 'there is no such folder' in error_of(f'--run={tmp_path}/nowhere')
    (tmp_path / 'empty').mkdir()
    assert 'holds no run.flags' in error_of(f'--run={tmp_path}/empty')
    shutil.copytree(trained[1], trained[0] / 'twin')
    assert 'holds 2 runs' in error_of(f'--run={trained[0]}') and 'twin' in error_of(f'--run={trained[0]}')


@pytest.mark.slow
def test_files_of_flags(tmp_path):
    path = tmp_path / 'x.flags'
    path.write_text('# a comment\n--norm=None\n--metatrain_iterations=2\n--meta_batch_size=2\n')
    assert '2 iterations of 2 tasks' in run_ok(f'--flagfile={path}', f'--logdir={tmp_path}/logs')
    assert '2 iterations of 3 tasks' in run_ok(f'--flagfile={path}', '--meta_batch_size=3', f'--logdir={tmp_path}/logs')
    for content in b'\xff\xfe\x00', os.urandom(500) + b'\xff':
        path.write_bytes(content)
        process = run_process(f'--flagfile={path}')
        assert process.returncode == 1 and process.stderr.startswith('main.py: ') and process.stderr.count('\n') == 1
    (tmp_path / 'indented').write_text(f'  --flagfile={path}\n')
    assert 'at the beginning of its line' in error_of(f'--flagfile={tmp_path}/indented')
    assert '--noconv=True' in error_of('--noconv=True')
    assert f'--flagfile={tmp_path}/nowhere cannot be read' in error_of(f'--flagfile={tmp_path}/nowhere')
    path.write_text('--n' + '[' * 3000)
    assert 'a name of thousands of characters' in error_of(f'--flagfile={path}')


@pytest.mark.slow
def test_the_shipped_sinusoid(tmp_path):
    """As the README prints it, in a copy."""
    shutil.copytree(os.path.join(ROOT, 'logs', 'sine'), tmp_path / 'logs' / 'sine')
    process = run_process('--run=logs/sine', '--train=False', '--test_set=True', '--num_test_tasks=20', cwd=tmp_path)
    assert process.returncode == 0 and '10-shot sinusoid, meta-test' in process.stdout, process.stderr


@pytest.mark.slow
def test_a_run_of_an_earlier_version_resumes(tmp_path):
    """The shipped sinusoid, in a copy."""
    shutil.copytree(os.path.join(ROOT, 'logs', 'sine'), tmp_path / 'sine')
    output = run_ok(f'--run={tmp_path / "sine"}', '--metatrain_iterations=70001')
    directory, = (tmp_path / 'sine').iterdir()
    assert f'Resuming from {directory / "model70000"}' in output and 'The last checkpoint is' in output
    assert (directory / 'model70001.index').exists() and '--metatrain_iterations=70001' in (directory / 'run.flags').read_text()

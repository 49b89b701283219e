"""main.py as users run it: training, resuming, evaluating, and refusing what makes no sense."""
import csv
import dataclasses
import glob
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf

import main
from conftest import directory_of, error_of, results_of, run_ok, run_process, write_image_tree
from data_generator import SOURCES, TaskConfig
from maml import MAML
from runtime.cli.flags import FLAGS
from runtime.cli.request import resolve
from runtime.cli.run import make_run
from runtime.cli.run_data import source_and_tasks
from runtime.jobs import checkpoints
from runtime.jobs import evaluate as evaluation
from runtime.jobs import train as training

SMALL = ['--num_filters=4', '--meta_batch_size=2', '--max_pool=True', '--update_batch_size=1', '--update_lr=0.01']
DENSE = ['--conv=False', '--hidden=4', '--engine=map', '--meta_batch_size=2', '--update_batch_size=1']  # where the network does not matter
# A short run of every source that can be trained, on tiny data. One without an entry fails test_every_source_has_a_run.
RUNS = {
    'sinusoid': ['--datasource=sinusoid', '--update_batch_size=10', '--norm=None', '--meta_batch_size=4'],
    **{name: [f'--datasource={name}', '--update_batch_size=10', '--norm=None', '--meta_batch_size=4']
       for name in ('sinusoid_line', 'harmonic')},
    'omniglot': ['--datasource=omniglot', '--update_batch_size=1', '--update_lr=0.4', '--num_filters=4',
                 '--meta_batch_size=4', '--num_classes=5'],
    'miniimagenet': ['--datasource=miniimagenet', *SMALL],
    'cifarfs': ['--datasource=cifarfs', *SMALL],
    'fc100': ['--datasource=fc100', *SMALL],
    'tieredimagenet': ['--datasource=tieredimagenet', *SMALL],
    'doublemnist': ['--datasource=doublemnist', *SMALL],
    'triplemnist': ['--datasource=triplemnist', *SMALL],
    'table': ['--datasource=table', '--update_batch_size=1', '--update_lr=0.1'],
    'folder': ['--datasource=folder', *SMALL, '--image_size=20', '--num_classes=2', '--rotations'],
}


@pytest.fixture
def arguments(request, small_data, tmp_path):
    """Flags of a source's run, with a log directory of its own."""
    data = small_data.get(request.param)
    return RUNS[request.param] + [f'--logdir={tmp_path}'] + ([f'--data_path={data}'] if data else [])


def every_source(function):
    """The slow ones differ from these in their entries of SOURCES only."""
    sources = [name if name == 'sinusoid' else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
    return pytest.mark.parametrize('arguments', sources, indirect=True)(function)


def of(source):
    return pytest.mark.parametrize('arguments', [source], indirect=True)


def test_every_source_has_a_run():
    """Navigation's is in test_navigation.py; sources of photographs that differ by their folders only share one."""
    names = {name for name, source in SOURCES.items() if source.supervised and not getattr(source, 'test_only', False)}
    assert RUNS.keys() <= names
    for name in names - RUNS.keys():
        of_tiered = {field: getattr(SOURCES['tieredimagenet'], field) for field in ('folder', 'script')}
        assert dataclasses.replace(SOURCES[name], **of_tiered) == SOURCES['tieredimagenet'], name


@pytest.mark.slow
def test_a_source_for_meta_test_only(small_data, tmp_path, few_tasks):
    """A model of another one is evaluated on it; results.json says how its images were chosen, where the preparation did."""
    data = shutil.copytree(small_data['gtsrb'], tmp_path / 'data')
    (data / '.prepared.json').write_text('{"recipe": "", "complete": true, "facts": {"split": "chen"}}')
    run_ok(*RUNS['cifarfs'], f'--data_path={small_data["cifarfs"]}', '--metatrain_iterations=2', f'--logdir={tmp_path / "source"}')
    flags = ['--datasource=gtsrb', *SMALL, f'--data_path={data}', f'--logdir={tmp_path / "source"}']
    evaluate = ['--train=False', '--test_set=True']
    run = directory_of(tmp_path / 'source')
    transfer = [f'--run={run}', *evaluate, '--datasource=gtsrb', f'--data_path={data}']
    output = run_ok(*transfer)
    assert 'meta-test, 40 tasks' in output and 'gtsrb' in output and re.findall(r' \d+ +[\d.]+ ± .*', output) != []
    entry, = results_of(run)
    assert entry.tasks.datasource == 'gtsrb' and entry.training.flags['datasource'] == 'cifarfs'
    assert entry.tasks.facts['preparation'] == {'split': 'chen'} and not list(run.glob('test_*.csv'))
    assert 'was made with --datasource=cifarfs, and not with --datasource=gtsrb' in error_of(*flags, *evaluate)
    assert 'both must be sources of images' in error_of(f'--run={run}', '--train=False', '--datasource=sinusoid')
    assert '--datasource=fc100 contradicts --datasource=cifarfs' in error_of(f'--run={run}', '--datasource=fc100')
    assert 'which a prediction needs' in error_of(f'--run={run}', '--predict', '--datasource=fc100', '--support_dir=a', '--query_dir=b')
    # Omniglot's head on a folder of images, which are resized.
    run_ok(*RUNS['omniglot'], f'--data_path={small_data["omniglot"]}', '--metatrain_iterations=2', f'--logdir={tmp_path / "omniglot"}')
    assert 'a model of omniglot (28x28x1) cannot be evaluated on gtsrb (32x32x3)' in error_of(
        f'--run={directory_of(tmp_path / "omniglot")}', *transfer[1:])
    assert 'meta-test, 40 tasks' in run_ok(
        f'--run={directory_of(tmp_path / "omniglot")}', *evaluate, '--datasource=folder', f'--data_path={small_data["folder"]}',
        '--image_size=28', '--image_channels=1')
    pairs = [f'--run={directory_of(tmp_path / "omniglot")}', *evaluate, '--datasource=doublemnist',
             f'--data_path={small_data["doublemnist"]}']
    assert '--resize makes those of doublemnist fit' in error_of(*pairs)
    assert 'meta-test, 40 tasks' in run_ok(*pairs, '--resize', '--plot')
    assert '--resize is for the evaluation of a model of another source' in error_of(*RUNS['omniglot'], '--train=False', '--resize')
    # Models against sources.
    run_ok(f'--run={directory_of(tmp_path / "source")}', *evaluate, f'--data_path={small_data["cifarfs"]}')
    table = run_ok(f'--across={tmp_path / "source"}', str(tmp_path / 'omniglot'), '--plot')
    assert re.search(r'after the updates of each method; meta-test, .*40 tasks.*\n\n'
                     r' +model +updates +cifarfs +doublemnist +folder +gtsrb\n', table)
    assert (re.search(r'MAML, source\S+ +\d+ +[\d.]+ ± [\d.]+\* +- +- +[\d.]+ ± [\d.]+\n', table)
            and os.path.getsize(tmp_path / 'source/across.png') > 5000)
    assert len(list(csv.DictReader(run_ok(f'--across={tmp_path}', '--format=csv').splitlines()))) == 4
    latex = run_ok(f'--across={tmp_path}', '--format=latex')
    assert r'model & updates & cifarfs & doublemnist & folder & gtsrb \\' in latex and '^*$' in latex and r'$^*' not in latex
    assert '--across shows models that were evaluated on several sources' in error_of(f'--compare={tmp_path / "source"}')
    assert '--datasource=gtsrb has no classes to train on' in error_of(*flags)
    assert '--datasource=gtsrb has classes for meta-test only: add --test_set=True' in error_of(*flags, '--train=False')


def test_classes_that_the_model_has_met_in_another_source(small_data, tmp_path, few_tasks):
    """A folder with two classes of these names to test on does not hold new classes only."""
    write_image_tree(tmp_path / 'own', [f'test/{name}' for name in ('train00', 'train01', 'val00', 'no_cifar', '00')], 4, (32, 32, 3))
    run_ok('--datasource=cifarfs', *DENSE, f'--data_path={small_data["cifarfs"]}', '--metatrain_iterations=2',
           f'--logdir={tmp_path / "logs"}')
    run = directory_of(tmp_path / 'logs')
    output = run_ok(f'--run={run}', '--train=False', '--test_set=True', '--datasource=folder', f'--data_path={tmp_path / "own"}',
                    '--image_size=32')
    assert 'Note: 2 of the 5 classes were seen in training (same name or images), such as train00\n' in output
    entry, = results_of(run)
    assert entry.known_classes == ['train00', 'train01']
    table = run_ok(f'--across={run}')
    assert re.search(r'± [\d.]+\+\n', table) and '(+: some of the classes, or classes of the same names, were seen in training' in table
    assert '^+$' in run_ok(f'--across={run}', '--format=latex')
    row, = csv.DictReader(run_ok(f'--across={run}', '--format=csv').splitlines())
    assert row['known_classes'] == '2'


@pytest.mark.slow
def test_fewer_classes_to_validate_on_than_to_train_on(small_data, tmp_path, few_tasks):
    """DoubleMNIST's published split is trained 20-way and has 16 classes to validate on: validation is 16-way, and says so."""
    flags = [*RUNS['doublemnist'], f'--data_path={small_data["doublemnist"]}', f'--logdir={tmp_path}', '--num_classes=6', '--stop_grad',
             '--metatrain_iterations=2']
    output = run_ok(*flags, '--plot')
    assert 'val: 5 classes, 30 images, so that validation is 5-way' in output
    validated, = re.findall(r'Validation of model2: \S+, (\S+)', output)
    record = checkpoints.find(str(directory_of(tmp_path)), None).record
    assert record['ranking'][0]['score'] == pytest.approx(float(validated), abs=1e-5)
    # The figure is that of an evaluation on the same tasks by the first five outputs.
    table = run_ok(f'--run={directory_of(tmp_path)}', f'--data_path={small_data["doublemnist"]}', '--train=False', '--num_classes=5',
                   '--num_test_tasks=10')
    assert f'{100 * float(validated):.2f} ±' in re.search(r'\n +1 .*', table)[0]
    assert '--num_classes=6 asks for more classes than the 5 of the val split' in error_of(*flags, '--train=False')
    own = [flag.replace('doublemnist', 'folder') for flag in flags if 'data_path' not in flag]
    assert 'asks for more classes than' in error_of(*own, f'--data_path={small_data["folder"]}', '--num_classes=12')


def variables(prefix):
    return {name: tf.train.load_variable(str(prefix), name) for name, _ in tf.train.list_variables(str(prefix))}


def iteration_lines(output):
    return re.findall(r'^(?:Pretrain )?Iteration (\d+): ([-\d.e]+), ([-\d.e]+)$', output, re.M)


def test_what_the_loop_trains_on_and_prints(tmp_path, monkeypatch):
    """Iteration i of a run has its tasks i; each phase counts its own iterations; lines have the losses before and after adaptation."""
    calls, train_steps = [], MAML.train_steps

    def spy(model, phase, batches, iteration, *more):
        found = train_steps(model, phase, batches, iteration, *more)
        calls.append((phase, iteration, batches, found))
        return found

    monkeypatch.setattr(MAML, 'train_steps', spy)
    monkeypatch.setitem(vars(SOURCES['sinusoid']), 'print_interval', 1)
    lines = iteration_lines(run_ok('--datasource=sinusoid', '--update_batch_size=10', '--norm=None', '--meta_batch_size=4', '--log=False',
                                   f'--logdir={tmp_path}', '--pretrain_iterations=2', '--metatrain_iterations=3', '--save_interval=1',
                                   '--validation_tasks=2'))
    assert [call[:2] for call in calls] == [('pretrain', 0), ('pretrain', 1), ('metatrain', 0), ('metatrain', 1), ('metatrain', 2)]
    tasks = SOURCES['sinusoid'].tasks(TaskConfig(5, 10, 10, seed=0), 'train')
    for number, ((*_, batches, found), line) in enumerate(zip(calls, lines, strict=True)):
        for ours, drawn in zip(batches, tasks.draw(4 * number, 4)):
            np.testing.assert_array_equal(ours[0], drawn)
        np.testing.assert_allclose([float(text) for text in line[1:]], [found['pre_loss'][0], found['post_loss'][0]], rtol=1e-5)


@every_source
def test_train_resume_evaluate(arguments, tmp_path, request, monkeypatch):
    """An interrupted and resumed run ends with the very numbers of an uninterrupted one, and can be evaluated."""
    source = arguments[0].split('=')[1]
    is_function = source in ('sinusoid', 'sinusoid_line', 'harmonic')
    if not is_function:
        request.getfixturevalue('few_tasks')
    if is_function or source == 'omniglot':
        first, last = 200, 210
        monkeypatch.setitem(vars(SOURCES[source]), 'print_interval', 100)
        monkeypatch.setattr(training, 'PRINTS_PER_VALIDATION', 1)
    else:
        first, last = 2, 4  # blocks of two iterations, which are compiled once
    arguments = [*arguments, f'--save_interval={first}', '--meta_batch_size=2']
    whole = run_ok(*arguments, f'--metatrain_iterations={last}')
    directory = directory_of(tmp_path)
    assert {path.name for path in directory.glob('*.index')} == {f'model{first}.index', f'model{last}.index'}
    numbers = variables(directory / f'model{last}')

    other = [flag for flag in arguments if '--logdir' not in flag] + [f'--logdir={tmp_path / "resumed"}']
    run_ok(*other, f'--metatrain_iterations={first}')
    resumed = run_ok(*other, f'--metatrain_iterations={last}')
    assert 'Resuming from' in resumed and f'model{first}' in resumed
    again = variables(directory_of(tmp_path / 'resumed') / f'model{last}')
    assert numbers.keys() == again.keys() and {'record', 'metatrain/adam/step', 'pretrain/adam/step'} <= numbers.keys()
    for name in numbers:
        np.testing.assert_array_equal(numbers[name], again[name], err_msg=name)
    assert 'Nothing to do' in run_ok(*other, f'--metatrain_iterations={last}')

    # The reference's console lines.
    shown = iteration_lines(whole)
    interval = SOURCES[source].print_interval
    assert [int(line[0]) for line in shown] == list(range(interval, last + 1, interval))
    validated = re.findall(r'^Validation results: [\d.]+, [\d.]+$', whole, re.M)
    assert len(validated) == (2 if source == 'omniglot' else 0)

    # Evaluation: a table, csv and pickle.
    default_tasks = FLAGS['num_test_tasks'].default
    output = run_ok(*arguments, '--train=False', '--test_set=True')
    assert f'meta-test, {default_tasks} tasks' in output and f'model{last} ({last} iterations)' in output
    path, = directory.glob('test_ubs*_stepsize*.csv')
    with open(path.with_suffix('.pkl'), 'rb') as file:
        values = pickle.load(file)['mses']
    assert values.shape == (600 if is_function else 40, 11)
    with open(path, newline='') as file:
        header, *rows = csv.reader(file)
    assert header == [f'update{j}' for j in range(11)]
    mean, std, ci95 = np.array(rows, float)
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, values.std(axis=0), rtol=1e-6)
    np.testing.assert_allclose(ci95, 1.96 * std / np.sqrt(len(values)), rtol=1e-6)
    table = re.findall(r'^ +(\d+) +([\d.]+) ± ([\d.]+)', output, re.M)
    scale = 1 if SOURCES[source].loss == 'mse' else 100
    np.testing.assert_allclose([float(row[1]) for row in table], scale * mean, atol=0.0051)
    assert [int(row[0]) for row in table] == list(range(11))


def test_validations_adapt_as_often_as_trainings():
    """On images that the reference does not have. Reference behaviour: ten times on Omniglot, five times on the sinusoid."""
    assert {name for name, source in SOURCES.items() if source.validation_updates != 1} == {
        'omniglot', 'table', 'sinusoid', 'sinusoid_line', 'harmonic'}
    assert (SOURCES['omniglot'].validation_updates, SOURCES['sinusoid'].validation_updates) == (10, 5)


@pytest.mark.slow
@of('omniglot')
def test_learning_shows(arguments, tmp_path):
    """Chance before adaptation, much more after it."""
    run_ok(*arguments, '--metatrain_iterations=400', '--log=False')
    run_ok(*arguments, '--train=False', '--test_set=True')
    with open(glob.glob(f'{tmp_path}/*/*.pkl')[0], 'rb') as file:
        values = pickle.load(file)['mses']
    # 600 tasks of 5 rows: the standard error of chance is 0.4 / sqrt(3000) = 0.0073.
    assert abs(values[:, 0].mean() - 0.2) < 0.03
    assert values[:, 1].mean() > 0.5
    assert not glob.glob(f'{tmp_path}/*/events*')


@pytest.mark.slow
@of('sinusoid')
def test_checkpoints_that_can_be_asked_for(arguments, tmp_path):
    run_ok(*arguments, '--metatrain_iterations=12000')
    directory = directory_of(tmp_path)
    kept = sorted(int(path.stem[5:]) for path in directory.glob('model*.index'))
    assert kept == list(range(3000, 12001, 1000))
    evaluate = [*arguments, '--train=False']
    assert 'model12000 (12000 iterations)' in run_ok(*evaluate)
    assert 'model5000 (5000 iterations)' in run_ok(*evaluate, '--test_iter=5000')
    assert re.search(r'/model\d+000 \(\d+000 iterations\)', run_ok(*evaluate, '--test_best'))
    error = error_of(*evaluate, '--test_iter=1000')
    assert 'no checkpoint model1000 in' in error and 'there are model3000, model4000,' in error

    # Going back: the later checkpoints are kept aside, and the run ends with the same numbers.
    end = variables(directory / 'model12000')
    output = run_ok(*arguments, '--metatrain_iterations=12000', '--test_iter=11000')
    assert 'Later checkpoints were moved to' in output
    for name, value in variables(directory / 'model12000').items():
        np.testing.assert_array_equal(value, end[name], err_msg=name)
    assert 'moved' in run_ok(*arguments, '--metatrain_iterations=100', '--resume=False')
    assert [path.name for path in directory.glob('model*.index')] == ['model100.index']

    (directory / 'model100.index').write_bytes(b'')
    assert 'model100 cannot be read' in error_of(*evaluate, '--test_iter=100')


@pytest.mark.slow
@of('sinusoid')
def test_baselines_and_pretraining_have_directories_of_their_own(arguments, tmp_path):
    arguments, pretrain = [*arguments, '--engine=map'], ['--pretrain_iterations=1000', '--metatrain_iterations=0']
    output = run_ok(*arguments, *pretrain)
    assert output.count('Pretrain Iteration 1000: ') == 1
    run_ok(*arguments, *pretrain, '--baseline=oracle')
    run_ok(*arguments, '--metatrain_iterations=100')
    both = run_ok(*arguments, '--pretrain_iterations=1000', '--metatrain_iterations=2000', '--stop_grad')
    assert [line[0] for line in iteration_lines(both)] == ['1000', '1000', '2000']
    base = 'cls_5.mbs_4.ubs_10.numstep1.updatelr0.001'
    assert {path.name for path in tmp_path.iterdir()} == {
        base + 'nonormpretrain', base + 'oraclenonorm', base + 'nonorm', base + 'stopgradnonorm'}
    # Pre-training leaves Adam's other state alone, and the oracle's input is three wide.
    state = variables(tmp_path / (base + 'oraclenonorm') / 'model1000')
    assert state['w1'].shape == (3, 40) and state['pretrain/adam/step'] == 1000 and state['metatrain/adam/step'] == 0
    # The oracle is trained jointly even when it is asked for as meta-training.
    assert 'Nothing to do' in run_ok(*arguments, '--metatrain_iterations=1000', '--baseline=oracle')
    assert 'Nothing to do' in run_ok(*arguments, '--metatrain_iterations=500', '--baseline=oracle', '--test_iter=0')
    # Pure pre-training is evaluated, like MAML, whatever number of iterations the command states.
    run_ok(*arguments, '--baseline=oracle', '--metatrain_iterations=500', '--train=False', '--num_test_tasks=5')
    # A checkpoint knows its regime.
    os.rename(tmp_path / (base + 'nonormpretrain'), tmp_path / (base + 'stopgradnonormpretrain'))
    for path in (tmp_path / (base + 'nonorm')).glob('model*'):
        path.unlink()
    for path in (tmp_path / (base + 'stopgradnonormpretrain')).glob('model*'):
        path.rename(tmp_path / (base + 'nonorm') / path.name)
    assert 'comes from pretraining, and the flags describe metatraining' in error_of(*arguments, '--train=False')


@of('sinusoid')
def test_summaries(arguments, tmp_path):
    run_ok(*arguments, '--metatrain_iterations=1000', '--num_updates=2', '--engine=map')
    events, = glob.glob(f'{tmp_path}/*/events*')
    seen = {}
    for event in tf.compat.v1.train.summary_iterator(events):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == 'scalars':
                seen.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    assert seen.keys() == {'metatrain_Gradient norm, median', 'metatrain_Gradient norm, largest',
                           'metatrain_Pre-update loss', 'metatrain_Post-update loss, step 1',
                           'metatrain_Post-update loss, step 2', 'metaval_Pre-update loss',
                           *(f'metaval_Post-update loss, step {step}' for step in range(1, 6))}
    assert list(seen['metatrain_Pre-update loss']) == list(range(0, 1000, 100))
    assert list(seen['metaval_Pre-update loss']) == [1000]
    assert 0 < seen['metatrain_Gradient norm, median'][1000] < seen['metatrain_Gradient norm, largest'][1000]


@of('omniglot')
@pytest.mark.parametrize('flags, name', [
    (['--conv=False', '--engine=map'], 'cls_5.mbs_4.ubs_1.numstep1.updatelr0.4hidden4batchnorm'),
    pytest.param(['--max_pool', '--norm=layer_norm'],
                 'cls_5.mbs_4.ubs_1.numstep1.updatelr0.4hidden4maxpoollayernorm', marks=pytest.mark.slow),
    pytest.param(['--num_classes=20', '--num_updates=2', '--stop_grad=True', '--norm=None', '--update_lr=0.1'],
                 'cls_20.mbs_4.ubs_1.numstep2.updatelr0.1hidden4stopgradnonorm', marks=pytest.mark.slow),
])
def test_networks(arguments, flags, name, tmp_path, few_tasks):
    run_ok(*arguments, *flags, '--metatrain_iterations=2')
    assert directory_of(tmp_path).name == name
    # Evaluated with another shot and step size than trained with; the results say which.
    output = run_ok(*arguments, *flags, '--train=False', '--update_batch_size=2', '--update_lr=0.05',
                    '--train_update_batch_size=1', f'--train_update_lr={0.1 if "cls_20" in name else 0.4}')
    assert '2-shot omniglot, meta-validation' in output
    assert (directory_of(tmp_path) / 'test_ubs2_stepsize0.05.csv').exists(), 'named after the shot and the step size of the evaluation'


@of('sinusoid')
def test_the_seed_fixes_everything_and_nothing_else_does(arguments, tmp_path):
    def weights(name, *flags):
        logdir = tmp_path / name
        run_ok(*arguments, '--metatrain_iterations=100', f'--logdir={logdir}', *flags)
        return variables(directory_of(logdir) / 'model100')

    one, same, other = weights('one'), weights('same', '--log=False'), weights('other', '--seed=1')
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one['w2'], other['w2'])


@pytest.mark.slow
@of('omniglot')
def test_engines_train_alike(arguments, tmp_path, few_tasks):
    """Whole runs of each engine, in chunks too, see the same gradients to rounding, and can be evaluated by the other."""
    results = []
    for engine, chunk in ('map', 0), ('vmap', 1):
        flags = [*arguments, f'--logdir={tmp_path / engine}{chunk}', '--metatrain_iterations=1', '--conv=False', '--hidden=4',
                 f'--engine={engine}', f'--task_chunk={chunk}']
        run_ok(*flags)
        results.append(variables(directory_of(tmp_path / f'{engine}{chunk}') / 'model1'))
    for other in results[1:]:
        for name in (f'metatrain/adam/m/{weights}' for weights in ('w1', 'w2', '0/beta')):
            np.testing.assert_allclose(other[name], results[0][name], atol=1e-5 * np.max(np.abs(results[0][name])))
    assert 'meta-test, 40 tasks' in run_ok(*flags, '--train=False', '--test_set=True', '--engine=map', '--task_chunk=0')


@pytest.mark.parametrize('flags, words', [
    (['--nonsense=1'], ['nonsense']),
    (['--updatelr=1'], ['Did you mean', 'update_lr']),
    (['train'], ["'train' is not a flag"]),
    (['--max_pool', 'True'], ["'True' is not a flag", '--name=value']),
    (['--datasource=imagenet'], ['--datasource=imagenet', 'omniglot']),
    (['--norm=group_norm'], ['--norm=group_norm', 'batch_norm']),
    (['--baseline=maml'], ['--baseline=maml', 'oracle']),
    (['--datasource=omniglot', '--baseline=oracle'], ['oracle', 'omniglot']),
    (['--data_path=/tmp'], ['--data_path', 'sinusoid']),
    (['--num_updates=0'], ['--num_updates=0']),
    (['--num_updates=1.5'], ['--num_updates=1.5']),
    (['--update_lr=-0.1'], ['--update_lr=-0.1']),
    (['--update_lr=nan'], ['--update_lr', 'finite']),
    (['--meta_lr=-1'], ['--meta_lr=-1']),
    (['--meta_lr=inf'], ['--meta_lr', 'finite']),
    (['--meta_batch_size=0'], ['--meta_batch_size=0']),
    (['--update_batch_size=0'], ['--update_batch_size=0']),
    (['--num_classes=0'], ['--num_classes=0']),
    (['--datasource=omniglot', '--num_classes=1'], ['--num_classes=1', 'at least 2']),
    (['--num_filters=0'], ['--num_filters=0']),
    (['--metatrain_iterations=-5'], ['--metatrain_iterations=-5']),
    (['--metatrain_iterations=0'], ['nothing to train']),
    (['--train_update_batch_size=0'], ['--train_update_batch_size']),
    (['--train_update_lr=-3'], ['--train_update_lr']),
    *(([f'--train_{name}=5'], [f'--train_{name} is no longer a flag', '--run=DIR'])
      for name in ('num_classes', 'inner_batch', 'query_norm', 'datasource')),
    (['--seed=-1'], ['--seed=-1']),
    (['--test_iter=-2'], ['--test_iter=-2']),
    (['--train=False', '--test_best', '--test_iter=3'], ['--test_best', '--test_iter']),
    (['--test_best'], ['--test_best', '--train=False']),
    (['--train=False', '--load_from=x', '--test_iter=3'], ['--test_iter', '--load_from']),
    (['--test_query=0'], ['--test_query']),
    (['--image_size=20'], ['--image_size', '--datasource=folder']),
    (['--datasource=cifarfs', '--rotations'], ['--rotations', '--datasource=folder']),
    (['--datasource=folder', '--data_path=.', '--split=80/20'], ['--split=80/20', '64/16/20']),
    (['--datasource=folder', '--data_path=.', '--split=0/0/0'], ['--split=0/0/0', '64/16/20']),
    (['--datasource=folder', '--data_path=.', '--image_size=15', '--max_pool'], ['--image_size=15', '16']),
    (['--datasource=folder', '--data_path=.', '--image_size=100000'], ['--image_size=100000', 'do not fit in memory']),
    (['--datasource=folder', '--data_path=.', '--image_channels=4'], ['--image_channels=4']),
    (['--train=perhaps'], ['--train=perhaps', 'True or False']),
    (['--engine=fast'], ['--engine=fast', 'vmap']),
    (['--task_chunk=2'], ['--task_chunk=2', '--meta_batch_size=25']),
    (['--task_chunk=-1'], ['--task_chunk=-1']),
    (['--save_interval=0'], ['--save_interval=0']),
    (['--logdir='], ['--logdir']),
    (['--logdir=\udcff'], ['--logdir', 'UTF-8']),
    (['--resume=False', '--test_iter=3'], ['--resume=False', '--test_iter']),
    (['--meta_batch_size=2000000000', '--update_batch_size=2000000000'], ['--meta_batch_size', 'memory']),
    (['--train_update_batch_size=3'], ['--train_update_batch_size=3', 'contradicts --update_batch_size=5']),
    (['--train_update_lr=0.1'], ['--train_update_lr=0.1', 'contradicts --update_lr=0.001']),
    (['--train=False', '--learn_lr=weight', '--update_lr=0.1', '--train_update_lr=0.01'], ['--update_lr=0.1', 'are learned']),
    (['--load_from='], ['--load_from must name a checkpoint']),
    (['--datasource=omniglot', '--method=r2d2', '--logits=cosine'], ['--logits=cosine', 'would learn nothing']),
    (['--plot', '--log=False'], ['--plot', '--log=False', 'leave out one']),
    (['--stop_grad', '--first_order_iterations=5'], ['--stop_grad', '--first_order_iterations=5', 'leave out one']),
    (['--baseline=oracle', '--meta_lr_schedule=linear'], ['--meta_lr_schedule=linear', 'leave it out']),
    (['--pretrain_iterations=5', '--metatrain_iterations=0', '--meta_lr_schedule=cosine'], ['--meta_lr_schedule=cosine', 'leave it out']),
    (['--pretrain_iterations=5', '--metatrain_iterations=0', '--multi_step_loss=5', '--learn_lr=step', '--first_order_iterations=1'],
     ['--multi_step_loss=5', '--learn_lr=step', '--first_order_iterations=1', 'leave it out']),
])
def test_flags_that_make_no_sense_are_refused(flags, words, tmp_path):
    error = error_of(f'--logdir={tmp_path}', *flags)
    assert all(word in error for word in words), error
    assert not any(tmp_path.iterdir())


@of('omniglot')
@pytest.mark.parametrize('flags, words', [
    (['--num_classes=22'], ['--num_classes=22', 'val', '21']),
    (['--update_batch_size=4'], ['8 images', 'has 6']),
    (['--data_path=/nowhere'], ['there is no folder /nowhere', 'resize_images.py']),
    (['--train=False'], ['there is no checkpoint in', 'holds nothing', 'Train first']),
])
def test_data_and_checkpoints_that_are_not_there(arguments, flags, words):
    error = error_of(*arguments, '--metatrain_iterations=10', *flags)
    assert all(word in error for word in words), error


@pytest.mark.parametrize('flags', [['--nonsense=1'], ['--num_updates=0'], ['--test_best'],
                                   pytest.param(['--train=False'], marks=pytest.mark.slow)])
def test_refusal(flags, tmp_path):
    """A refusal is one line on the standard error, and exit status 1."""
    process = run_process(f'--logdir={tmp_path}', *flags)
    assert process.returncode == 1 and process.stdout == ''
    assert process.stderr.startswith('main.py: ') and process.stderr.count('\n') == 1


@of('folder')
def test_your_own_images_need_a_place(arguments):
    without = [flag for flag in arguments if '--data_path' not in flag]
    assert '--datasource=folder needs --data_path' in error_of(*without)


@pytest.mark.slow
@of('cifarfs')
def test_query_images_in_evaluation(arguments, tmp_path, few_tasks):
    """--test_query=Q evaluates with Q query images of a class, which is not what the reference writes to files; training is as ever."""
    run_ok(*arguments, '--metatrain_iterations=2', '--test_query=3')
    run_ok(*arguments, '--train=False', '--test_query=3')
    directory = directory_of(tmp_path)
    assert not list(directory.glob('test_*.csv'))
    entry, = results_of(directory)
    hits = np.array(entry.scores)[:, 1] * 15
    np.testing.assert_allclose(hits, np.round(hits), atol=1e-4)  # of 15 rows
    assert 'a task needs 21 images of a class (1 support, 20 query)' in error_of(*arguments, '--train=False', '--test_query=20')


@pytest.mark.slow
@of('cifarfs')
def test_load_from(arguments, tmp_path, few_tasks):
    """Weights of this program and of the reference's TensorFlow 1 checkpoints, evaluated and trained on."""
    run_ok(*arguments, '--metatrain_iterations=3', '--num_updates=2')
    ours = directory_of(tmp_path) / 'model3'
    weights = {name: value for name, value in variables(ours).items() if '/adam/' not in name and name != 'record'}
    theirs = {'conv1': 'model/conv1', 'b1': 'model/Variable', 'b2': 'model/Variable_1', 'b3': 'model/Variable_2',
              'b4': 'model/Variable_3', 'w5': 'model/w5', 'b5': 'model/b5', '3/beta': 'model/3/beta'}
    reference = {theirs.get(name, f'model/{name}'): value for name, value in weights.items()}
    reference |= {'model/conv1/Adam': weights['conv1'], 'beta1_power': np.float32(0.5)}
    prefix = str(tmp_path / 'model59')
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=list(reference), shape_and_slices=[''] * len(reference),
                      tensors=[tf.constant(value) for value in reference.values()])

    for flags in [], [f'--load_from={prefix}'], [f'--load_from={ours}']:
        run_ok(*arguments, '--num_updates=2', '--train=False', *flags)
    own, loaded, again = results_of(ours.parent)
    assert [entry.setting.load_from for entry in (own, loaded, again)] == [None, prefix, str(ours)]
    assert own.scores == loaded.scores == again.scores
    run_ok(*arguments, '--num_updates=2', '--train=False', '--stop_grad', f'--load_from={ours}')
    elsewhere, = results_of(next(tmp_path.glob('*stopgrad*')))
    assert elsewhere.training.method == 'MAML' and not elsewhere.training.flags['stop_grad'], 'as these weights were trained'
    run_ok(*arguments, '--num_updates=2', '--train=False', f'--logdir={tmp_path}/off', '--metatrain_iterations=9', f'--load_from={ours}')
    off, = results_of(next(tmp_path.glob('off/*')))
    assert (off.training.pretrain_iterations, off.training.metatrain_iterations) == (0, 3), 'and not as the flags of the evaluation say'

    # Trained on: from these weights, with fresh optimizers; and then resumed like any other run.
    elsewhere = [*arguments, f'--logdir={tmp_path}/on', '--metatrain_iterations=2', '--meta_lr=0', f'--load_from={prefix}']
    assert 'Starting from the weights of' in run_ok(*elsewhere)
    trained = variables(directory_of(tmp_path / 'on') / 'model2')
    assert trained['metatrain/adam/step'] == 2
    for name, value in weights.items():
        np.testing.assert_array_equal(trained[name], value)
    assert 'Resuming from' in run_ok(*elsewhere, '--metatrain_iterations=3')

    assert '3-way' in run_ok(*arguments, '--train=False', f'--load_from={prefix}', '--num_classes=3'), 'by the first three outputs'
    error = error_of(*arguments, '--train=False', f'--load_from={prefix}', '--num_filters=5')
    assert '1/beta is float32[4] there and float32[5] here, 2/beta is float32[4] there and float32[5] here, and 10 more' in error
    error = error_of(*arguments, '--train=False', f'--load_from={prefix}', '--norm=None')
    assert '0/beta is float32[4] there and missing here' in error
    error = error_of(*arguments, '--train=False', f'--load_from={tmp_path}/model60')
    assert f'there is no checkpoint {tmp_path}/model60' in error and 'holds model59' in error
    (tmp_path / 'model59.index').write_bytes(b'not a checkpoint')
    assert 'cannot be read' in error_of(*arguments, '--train=False', f'--load_from={prefix}')


def test_unwritable_logdir(tmp_path):
    (tmp_path / 'file').touch()
    error = error_of(f'--logdir={tmp_path}/file', '--metatrain_iterations=10')
    assert 'cannot be written to' in error and '--logdir' in error


def test_help_explains_every_flag():
    output = run_process('--help').stdout
    assert 'Usage:' in output
    for flag in FLAGS.get_key_flags_for_module('main'):
        assert len(re.findall(rf'^    --{flag.name}[= ]', output, re.M)) == 1, flag.name
        assert flag.help


def test_console_is_free_of_noise(tmp_path):
    process = run_process(f'--logdir={tmp_path}', '--metatrain_iterations=1000', '--norm=None')
    assert process.returncode == 0
    assert [line for line in process.stderr.splitlines() if line and 'it/s' not in line] == []
    assert re.search(r'1000/1000 \[.*it/s, \d+ tasks/s, [\d.]+ -> [\d.]+\]', process.stderr)
    assert [line.split(' ')[0] for line in process.stdout.splitlines()] == ['Training', '', '', '', 'Iteration', 'The']


def test_batched_evaluation_changes_no_figure(small_omniglot):
    """Evaluating 12 tasks at once, or one at a time."""
    from maml import MAML
    request = resolve(main.parse(['main.py', *RUNS['omniglot'], f'--data_path={small_omniglot}']))
    run = make_run(request, *source_and_tasks(request))
    tasks, model = run.source.tasks(run.tasks, 'test'), MAML(run.model)
    counted = []
    at_once = evaluation.task_metrics(evaluation.evaluate_tasks(model, tasks, 12, 3, counted.append))
    assert counted == [12]
    evaluation.evaluate_tasks(model.variant(task_chunk=5), tasks, 12, 1, counted.append)
    assert counted == [12, 4, 4, 4]
    one_by_one = np.concatenate([evaluation.task_metrics(model.evaluate(tasks.draw(task, 1), 3)) for task in range(12)])
    np.testing.assert_array_equal(at_once, one_by_one)

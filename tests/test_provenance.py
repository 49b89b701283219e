"""What a model was made from: recorded, compared, said; and never averaged where it differs."""
import csv
import dataclasses
import glob
import json
import os
import re
import shutil
import types

import numpy as np
import pytest
import tensorflow as tf

from conftest import an_entry, error_of, results_of, run_ok, write_image_tree
from runtime.jobs import bundle, checkpoints
from runtime.jobs import evaluate as evaluation
from runtime.jobs import train as training
from runtime.results import provenance, store
from runtime.results.provenance import Provenance, Weights
from runtime.system.errors import UserError

SINUSOID = ['--norm=None', '--update_batch_size=2', '--meta_batch_size=2', '--log=False']
IMAGES = ['--datasource=folder', '--image_size=16', '--image_channels=1', '--num_classes=2', '--update_batch_size=1', '--hidden=4',
          '--conv=False', '--meta_batch_size=2', '--log=False', '--num_test_tasks=3', '--split=6/3/3']
NAMES = ['00', '01', *(f'class{number}' for number in range(10))]


@pytest.fixture(autouse=True)
def quickly(few_tasks):
    """On few tasks."""


def train(*flags, iterations=1, logdir):
    """Trains; returns the directory of the run."""
    run_ok(*flags, f'--metatrain_iterations={iterations}', f'--logdir={logdir}')
    directory, = logdir.glob('cls_*')
    return directory


@pytest.fixture
def images(tmp_path):
    """A folder of twelve classes, two of them with numbers for names."""
    write_image_tree(tmp_path / 'data', NAMES, images=4, size=(16, 16))
    return tmp_path / 'data'


def manifest(folder):
    """{class: split}"""
    with open(folder / 'splits.csv', newline='', encoding='utf-8') as file:
        return {row['class']: row['split'] for row in csv.DictReader(file)}


# The record

@pytest.mark.slow
def test_what_is_recorded(images, tmp_path, monkeypatch):
    """In the checkpoint, in run.flags and in results.json; paths are absolute, whatever was given."""
    first = train(*SINUSOID, logdir=tmp_path / 'first')
    monkeypatch.chdir(tmp_path)
    flags = [*IMAGES, '--data_path=data']
    run = train(*flags, logdir=tmp_path / 'logs')
    recorded = checkpoints.load(str(run / 'model1')).record['provenance']
    assert recorded.data_path == str(images) and f'--data_path={images}\n' in (run / 'run.flags').read_text()
    assert recorded.classes.keys() == {name for name, split in manifest(images).items() if split == 'train'}
    assert recorded.weights is None and recorded.arithmetic[0]['oneDNN'] in ('on', 'off') and recorded.arithmetic[0]['instructions']
    run_ok(f'--run={run}', '--train=False')
    entry, = results_of(run)
    assert entry.training.provenance == recorded.without_classes and entry.training.newest == 1
    assert entry.checksum == checkpoints.checksum(str(run / 'model1')) and entry.versions['oneDNN'] and entry.versions['program']
    second = train(*SINUSOID, f'--load_from={os.path.relpath(first)}/model1', logdir=tmp_path / 'second')
    weights = checkpoints.load(str(second / 'model1')).record['provenance'].weights
    assert weights == Weights(str(first / 'model1'), checkpoints.checksum(str(first / 'model1')))
    assert f'--load_from={first}/model1' in (second / 'run.flags').read_text()
    assert re.search(rf'\n# weights: .*{weights.checksum}.*\n# arithmetic: .*oneDNN', (second / 'run.flags').read_text())


@pytest.mark.slow
def test_the_data_of_a_run_are_found_from_elsewhere(images, tmp_path, monkeypatch):
    """Another folder of the same name where the program is started is not taken for them."""
    monkeypatch.chdir(tmp_path)
    run = train(*IMAGES, '--data_path=data', logdir=tmp_path / 'logs')
    write_image_tree(tmp_path / 'elsewhere' / 'data', NAMES, images=4, size=(16, 16), seed=1)
    evaluated = run_ok(f'--run={run}', '--train=False')
    monkeypatch.chdir(tmp_path / 'elsewhere')
    again = run_ok(f'--run={run}', '--train=False')
    assert re.findall('± .*', again) == re.findall('± .*', evaluated) and not (tmp_path / 'elsewhere' / 'data' / 'splits.csv').exists()


def test_a_line_break_makes_no_flag_of_its_own(tmp_path):
    for flag in '--data_path=a\n--seed=3', '--load_from=a\r', '--targets=a\nb':
        assert f'{flag.partition("=")[0]} contains a line break' in error_of(*SINUSOID, flag, f'--logdir={tmp_path}')


@pytest.mark.slow
def test_an_earlier_run_loads_and_is_compared(tmp_path):
    """Its checkpoint has the checksums of the data only, and results.json no provenance; what is not known is taken to be alike."""
    runs = [train(*SINUSOID, f'--seed={seed}', logdir=tmp_path / str(seed)) for seed in (0, 1)]
    prefix, arrays, record, _ = checkpoints.load(str(runs[0] / 'model1'))
    old = {**record, 'data': record['provenance'].data}
    del old['provenance']
    checkpoints.save(prefix, arrays, old)
    assert checkpoints.load(prefix).record['provenance'] == Provenance({'train': None, 'val': None})
    for run in runs:
        run_ok(f'--run={run}', '--train=False', '--num_test_tasks=3')
    content = json.loads((runs[0] / 'results.json').read_text())
    for name in 'provenance', 'newest':
        del content['evaluations'][0]['training'][name]
    (runs[0] / 'results.json').write_text(json.dumps(content))
    assert 'over seeds' in run_ok(f'--compare={tmp_path}')
    assert 'Resuming' in run_ok(f'--run={runs[0]}', '--metatrain_iterations=2')


# Two runs that differ in one thing

def changed(images):
    """An image of a class to train on, and of one to validate on, is another."""
    for split in 'train', 'val':
        name = next(name for name, where in manifest(images).items() if where == split)
        shutil.copy(images / 'class0' / '00.png', images / name / '03.png')
        shutil.copy(images / 'class1' / '00.png', images / name / '02.png')


def split_again(images):
    """The classes are split the other way round."""
    splits = manifest(images)
    order = [split for split in splits.values()][::-1]
    (images / 'splits.csv').write_text('split,class\n' + ''.join(f'{split},{name}\n' for name, split in zip(splits, order)))


@pytest.mark.parametrize('thing, change, more, refused, said', [
    ('nothing', None, [], '', ''),
    ('data', changed, [], 'the images of the train and val split are not those that the checkpoint',
     'Note: the images of the val split are not those that the model was trained on'),
    ('split', split_again, [], 'the images of the train and val split are not those that the checkpoint',
     'classes were seen in training, such as'),
    ('weights', None, ['--load_from={other}'], 'was trained from random weights, and --load_from={other} holds others', None),
])
def test_what_a_run_says_when_something_else_is_there(thing, change, more, refused, said, images, tmp_path):
    """Resuming refuses what would make another model; evaluation says it."""
    flags = [*IMAGES, f'--data_path={images}']
    run = train(*flags, logdir=tmp_path / 'logs')
    other = train(*flags, '--seed=1', logdir=tmp_path / 'other') / 'model1'
    if change:
        change(images)
    on = [f'--run={run}', '--metatrain_iterations=2', *(flag.format(other=other) for flag in more)]
    if refused:
        assert refused.format(other=other) in error_of(*on)
    else:
        output = run_ok(*on)
        assert 'Resuming' in output and 'Note' not in output
    if said is not None:
        notes = [line for line in run_ok(f'--run={run}', '--train=False').splitlines() if line.startswith('Note')]
        assert any(said in line for line in notes) if said else not notes


def test_seen_classes_of_the_same_source(images, tmp_path):
    """Under their names, as numbers too, under other names, and elsewhere; in the table of models a mark."""
    flags = [*IMAGES, f'--data_path={images}']
    run = train(*flags, logdir=tmp_path / 'logs')
    trained = [name for name, split in manifest(images).items() if split == 'train']
    images = images.rename(tmp_path / 'moved')
    (images / 'class9').rename(images / 'renamed')
    rows = [('train' if number < 4 else 'val' if number < 6 else 'test', name)
            for number, name in enumerate(sorted(set(NAMES) - {'class9'} | {'renamed'}))]
    (images / 'splits.csv').write_text('split,class\n' + ''.join(f'{split},{name}\n' for split, name in rows))
    output = run_ok(f'--run={run}', f'--data_path={images}', '--train=False', '--test_set=True')
    entry, = results_of(run)
    assert entry.known_classes == [name for split, name in rows if split == 'test' and name.replace('renamed', 'class9') in trained]
    assert f'Note: {len(entry.known_classes)} of the 6 classes were seen in training, such as' in output
    table = run_ok(f'--across={run}')
    assert re.search(r'± [\d.]+\+', table) and '*' not in table, 'own data may be any'
    # Classes of one number in two folders are two classes; their pictures tell.
    write_image_tree(tmp_path / 'numbers', [f'{split}/{number}' for split in ('train', 'val', 'test') for number in range(2)], 4, (16, 16))
    flags = [*(flag for flag in IMAGES if not flag.startswith('--split')), f'--data_path={tmp_path / "numbers"}']
    run = train(*flags, logdir=tmp_path / 'more')
    assert 'Note' not in run_ok(f'--run={run}', '--train=False', '--test_set=True')


def test_classes_of_weights_that_an_earlier_version_saved():
    """Only the published classes of the source are known."""
    class Tasks(evaluation.ClassTasks):
        def __init__(self):
            pass

        def class_checksums(self):
            return {'apple': 1, 'no_cifar': 2}

    restored = types.SimpleNamespace(provenance=Provenance({'train': 3}), trained_on='cifarfs')
    assert evaluation.known_classes(types.SimpleNamespace(datasource='folder'), restored, Tasks()) == ['apple']
    assert evaluation.known_classes(types.SimpleNamespace(datasource='cifarfs'), restored, Tasks()) == []


KNOWN = Provenance({'train': 1, 'val': 2}, '/data', None, [{'tensorflow': '2.21.0', 'oneDNN': 'on'}])
OTHER = {'data': {'data': {'train': 5, 'val': 2}}, 'weights': {'weights': Weights('/a/model1', 7)},
         'arithmetic': {'arithmetic': [{'tensorflow': '2.21.0', 'oneDNN': 'off'}]}, 'iterations': {}, 'nothing': {}, 'split': {}}


@pytest.mark.parametrize('thing, averaged, said', [
    ('nothing', True, 'seed=1'), ('data', False, 'training data=00000005 00000002'), ('weights', False, 'starting weights=00000007'),
    ('iterations', False, 'model500'), ('arithmetic', True, 'trained with different oneDNN: numbers are rounded differently'),
    ('split', None, 'no two evaluations were made on the same tasks')])
def test_what_comparisons_say(thing, averaged, said, tmp_path):
    """Two seeds that differ in one thing more; the best checkpoint is that of 500 iterations, in the third case of shorter trainings."""
    other = dataclasses.replace(KNOWN, **OTHER[thing])
    for seed, made in (0, KNOWN), (1, other):
        newest = 500 if thing == 'iterations' and seed else 1000
        os.makedirs(tmp_path / str(seed))
        store.add(str(tmp_path / str(seed)), an_entry(
            np.arange(9.).reshape(3, 3) + seed, 'accuracy', f'model{newest if thing == "iterations" else 500}', 500, is_best=True,
            seed=seed, training={'provenance': made, 'newest': newest}, tasks={'data': 9 if thing == 'split' and seed else 8},
            known_classes=['a'] if thing == 'split' and seed else []))
    if averaged is None:
        assert said in error_of(f'--compare={tmp_path}')
    else:
        output = run_ok(f'--compare={tmp_path}')
        assert said in output and ('over seeds' in output) == averaged
    table = run_ok(f'--across={tmp_path}')
    assert len(re.findall(r'^  MAML', table, re.M)) == 2 and ('*+' in table) == (thing == 'split'), table


@pytest.mark.parametrize('one, other', [(500, 1000), (1000, 500)])
def test_the_best_of_unequally_many_checkpoints(one, other, tmp_path):
    """Chosen from 500 and 1,000 iterations, by coincidence the same checkpoint: not averaged."""
    for seed, newest in enumerate((one, other)):
        os.makedirs(tmp_path / str(seed))
        store.add(str(tmp_path / str(seed)), an_entry(np.ones([3, 2]), checkpoint='model500', iterations=500, is_best=True, seed=seed,
                                                      training={'newest': newest}))
    assert 'over seeds' not in run_ok(f'--compare={tmp_path}')


# Resuming

def test_an_older_numpy_names_the_instructions(monkeypatch):
    """NumPy before 1.25, which TensorFlow 2.12 needs, cannot return its configuration."""
    def show_config():
        raise AssertionError('called without mode, it prints')

    monkeypatch.setattr(np, 'show_config', show_config)
    monkeypatch.setattr(np, 'core', types.SimpleNamespace(_multiarray_umath=types.SimpleNamespace(
        __cpu_features__={'SSE2': True, 'AVX512F': False, 'AVX2': True})), raising=False)
    assert provenance.arithmetic('map', 1)['instructions'].split()[:2] == ['SSE2', 'AVX2']


@pytest.mark.slow
def test_another_arithmetic_is_said_and_recorded(tmp_path, monkeypatch):
    run = train(*SINUSOID, logdir=tmp_path)
    as_it_was = provenance.arithmetic
    monkeypatch.setattr(training, 'arithmetic', lambda *arguments: {**as_it_was(*arguments), 'oneDNN': 'otherwise'})
    output = run_ok(f'--run={run}', '--metatrain_iterations=2')
    assert re.search(r'Note: the checkpoint \S+ was computed with other software, hardware or settings \(oneDNN o(n|ff), now otherwise\)\n'
                     r' +From here on', output)
    assert len(checkpoints.load(str(run / 'model2')).record['provenance'].arithmetic) == 2
    assert 'Note' not in run_ok(f'--run={run}', '--metatrain_iterations=3')
    before = provenance.program()
    for iterations in '4', '5':  # with the second part nothing is new
        monkeypatch.setattr(training, 'program', lambda: 'another')
        output = run_ok(f'--run={run}', f'--metatrain_iterations={iterations}')
        assert (f'model3 was trained by another version of this program ({before}, now another)\n' in output) == (iterations == '4')
        assert ('results may no longer be bit-identical' in output) == (iterations == '4')
    assert checkpoints.load(str(run / 'model5')).record['provenance'].program == f'{before}, another'


@pytest.mark.slow
def test_starting_weights_of_a_resumed_run(tmp_path):
    """The same again, moved ones and the same from elsewhere go on; others are refused."""
    one, other = (train(*SINUSOID, f'--seed={seed}', logdir=tmp_path / f'start{seed}') / 'model1' for seed in (0, 1))
    run = train(*SINUSOID, f'--load_from={one}', logdir=tmp_path / 'logs')
    again = [*SINUSOID, f'--logdir={tmp_path / "logs"}']
    assert 'Note' not in run_ok(*again, f'--load_from={one}', '--metatrain_iterations=2')
    assert f'--load_from={one}\n' in (run / 'run.flags').read_text(), 'also after a command that went on without it'
    assert f'was trained from the weights of {one}, and --load_from={other} holds others; leave out --load_from' in error_of(
        *again, f'--load_from={other}', '--metatrain_iterations=3')
    shutil.copytree(one.parent, tmp_path / 'copy')
    assert 'Note' not in run_ok(*again, f'--load_from={tmp_path}/copy/model1', '--metatrain_iterations=3')
    checkpoints.save(str(one), checkpoints.load(str(other)).arrays, checkpoints.load(str(one)).record)
    assert f'Note: --load_from={one} has changed since' in run_ok(*again, f'--load_from={one}', '--metatrain_iterations=4')
    shutil.rmtree(one.parent)
    assert 'Note' not in run_ok(f'--run={run}', '--metatrain_iterations=5')


def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path):
    """--run starts it from the weights that it began with; an evaluation is of the run's own checkpoints."""
    start = train(*SINUSOID, logdir=tmp_path / 'start') / 'model1'
    run = train(*SINUSOID, f'--load_from={start}', logdir=tmp_path / 'logs')
    expected = checkpoints.load(str(run / 'model1')).arrays
    for path in run.glob('model*'):
        path.unlink()
    assert f'Starting from the weights of {start}' in run_ok(f'--run={run}')
    assert all(np.array_equal(value, expected[name]) for name, value in checkpoints.load(str(run / 'model1')).arrays.items())
    assert f'{run}/model1 (1 iterations)' in run_ok(f'--run={run}', '--train=False', '--num_test_tasks=3')


@pytest.mark.slow
def test_fewer_classes_than_the_starting_weights(images, tmp_path):
    """The first outputs, as an evaluation takes them, in training and evaluation."""
    flags = [*IMAGES, f'--data_path={images}']
    five = train(*flags, '--num_classes=3', logdir=tmp_path / 'three') / 'model1'
    two = train(*flags, f'--load_from={five}', '--meta_lr=0', logdir=tmp_path / 'two')
    wide, few = (checkpoints.load(str(prefix)).arrays for prefix in (five, two / 'model1'))
    for name in few.keys() - {name for name in few if '/adam/' in name}:
        assert np.array_equal(few[name], wide[name][..., :2] if name in ('w2', 'b2') else wide[name]), name
    run_ok(*flags, f'--load_from={five}', '--train=False', f'--logdir={tmp_path / "two"}', '--meta_lr=0')
    run_ok(f'--run={five.parent}', '--train=False', '--num_classes=2', '--num_test_tasks=3')
    assert results_of(two)[0].scores == results_of(five.parent)[0].scores
    assert 'b2 is float32[2] there and float32[3] here' in error_of(
        *flags, '--num_classes=3', f'--load_from={two}/model1', f'--logdir={tmp_path}/more')


@pytest.mark.slow
def test_a_ranking_is_kept(tmp_path):
    """A training that goes on without --ensemble keeps the checkpoints that one with it had ranked."""
    run = train(*SINUSOID, '--ensemble=3', '--save_interval=1', iterations=3, logdir=tmp_path)
    output = run_ok(*SINUSOID, f'--logdir={tmp_path}', '--metatrain_iterations=15', '--save_interval=1')
    assert 'Resuming' in output and len(checkpoints.newest(str(run)).record['ranking']) == 3
    evaluate = [f'--run={run}', '--train=False', '--ensemble=3', '--num_test_tasks=3']
    assert '3 tasks' in run_ok(*evaluate)
    worst = checkpoints.newest(str(run)).record['ranking'][-1]['iteration']
    os.remove(run / f'model{worst}.index')
    os.remove(run / f'model{worst}.data-00000-of-00001')
    assert 'only 2 checkpoints were validated and kept; all are used' in run_ok(*evaluate)


def test_whose_run_is_continued_in_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'default', lambda name: f'{tmp_path}/data')
    train(*SINUSOID, logdir=tmp_path / 'data')
    output = run_ok(*SINUSOID, f'--logdir={tmp_path}/data', '--metatrain_iterations=2')
    assert re.search(r'Resuming from \S+/model1, which you saved on \d{4}-\d\d-\d\d \d\d:\d\d\. '
                     r'--logdir=\S+/data is the default and shared', output)


# Results of checkpoints that have gone

@pytest.mark.slow
def test_results_go_with_their_checkpoints(tmp_path):
    run = train(*SINUSOID, '--save_interval=1', iterations=3, logdir=tmp_path)
    evaluate = [f'--run={run}', '--train=False', '--num_test_tasks=40', '--update_lr=0.001']
    shutil.copytree(run, tmp_path / 'other')
    for more in ['--test_iter=2'], ['--plot'], [f'--load_from={tmp_path}/other/model3', '--plot']:
        run_ok(*evaluate, *more)
    assert (run / 'test_ubs2_stepsize0.001.csv').exists()
    run_ok(f'--run={run}', '--test_iter=2', '--metatrain_iterations=3', '--meta_lr=0.001')
    assert [(entry.iterations, bool(entry.setting.load_from)) for entry in results_of(run)] == [(2, False), (3, True)]
    aside = {path.name for path in (run / 'earlier1').iterdir()}
    assert {'results.json', 'test_ubs2_stepsize0.001.csv', 'evaluation_val_model3_updates.png', 'model3.index', 'run.flags'} <= aside
    assert not any('_of_other_' in name for name in aside) and glob.glob(f'{run}/evaluation_val_model3_of_other_*_updates.png')
    entry, = results_of(run / 'earlier1')
    assert entry.checkpoint == 'model3'


def test_an_evaluation_that_could_not_be_saved_does_not_begin(tmp_path, monkeypatch):
    run = train(*SINUSOID, logdir=tmp_path)
    (run / '.results.lock').unlink()
    (run / '.results.lock').mkdir()
    monkeypatch.setattr(evaluation, 'evaluate_tasks', None)
    assert f'the results cannot be written to {run}' in error_of(f'--run={run}', '--train=False', '--num_test_tasks=3')


def test_results_have_the_length_of_the_training(tmp_path):
    """Also where the flags of an evaluation, which do not change the name of the directory, state another one."""
    flags = [*SINUSOID, '--meta_lr_schedule=linear', f'--logdir={tmp_path}']
    run = train(*flags, iterations=2, logdir=tmp_path)
    run_ok(*flags, '--train=False', '--num_test_tasks=3')
    entry, = results_of(run)
    assert entry.training.metatrain_iterations == entry.training.flags['metatrain_iterations'] == 2


def test_an_evaluation_of_a_checkpoint_that_is_replaced_meanwhile(tmp_path, monkeypatch):
    run = train(*SINUSOID, logdir=tmp_path)
    measure = evaluation.evaluate_tasks

    def start_anew(*arguments):
        monkeypatch.setattr(evaluation, 'evaluate_tasks', measure)
        shutil.copy(train(*SINUSOID, '--seed=1', logdir=tmp_path / 'other') / 'model1.index', run / 'model1.index')
        return measure(*arguments)

    monkeypatch.setattr(evaluation, 'evaluate_tasks', start_anew)
    assert 'model1 was deleted, moved or replaced while it was evaluated' in error_of(f'--run={run}', '--train=False', '--num_test_tasks=3')
    assert not (run / 'results.json').exists()


@pytest.mark.slow
def test_one_relative_path_from_two_folders(tmp_path, monkeypatch):
    """Two checkpoints, two evaluations."""
    for seed in 0, 1:
        shutil.copytree(train(*SINUSOID, f'--seed={seed}', logdir=tmp_path / f'logs{seed}'), tmp_path / str(seed))
        monkeypatch.chdir(tmp_path / str(seed))
        run_ok(*SINUSOID, '--train=False', '--num_test_tasks=3', '--load_from=model1', f'--logdir={tmp_path}/results')
    assert len(results_of(next(tmp_path.glob('results/*')))) == 2


# What a run leaves for reading

@pytest.mark.slow
def test_a_run_keeps_its_own_log(tmp_path, monkeypatch):
    """metrics.csv of an interrupted run is that of one that was not; nobody needs to keep the console's output."""
    from data_generator import SOURCES
    monkeypatch.setattr(type(SOURCES['sinusoid']), 'print_interval', 2)
    flags = [*SINUSOID, '--save_interval=2']
    whole = train(*flags, iterations=20, logdir=tmp_path / 'whole')
    parts = train(*flags, iterations=10, logdir=tmp_path / 'parts')
    with open(parts / 'metrics.csv', 'a', encoding='utf-8') as file:
        file.write('x' * 200_000 + '\0\n' + '1' * 5000 + ',a,1,1\n')  # of a damaged disk
        file.write('12,metatrain,1,1\n14,metatrai')  # of a process that was killed
    run_ok(f'--run={parts}', '--metatrain_iterations=20', '--save_interval=2', '--log=False')
    assert (whole / 'metrics.csv').read_bytes() == (parts / 'metrics.csv').read_bytes()
    rows = [list(csv.reader((run / 'metrics.csv').read_text().splitlines())) for run in (whole, parts)]
    assert (rows[0] == rows[1] and len(rows[0]) == 21 and rows[0][0] == ['iteration', 'phase', 'before', 'after']
            and ['metatrain', 'metaval'] == sorted({row[1] for row in rows[0][1:]}))
    log = (parts / 'console.log').read_text()
    assert log.count('Training 2-shot sinusoid') == 2 and [f'Iteration {number}:' in log for number in range(2, 21, 2)] == [True] * 10


# Odd checkpoints

def forged(tmp_path, **changes):
    """A checkpoint whose record has other values; ... removes one."""
    variables = {'w': tf.Variable([1.0, 2.0]), 'metatrain/adam/step': tf.Variable(7, dtype=tf.int64)}
    record = {'iteration': 5, 'best': None, 'unprinted': [], 'skipped': 0, 'flags': {}, 'regime': 'metatrain', 'pretrain_iterations': 0,
              'provenance': Provenance({'train': 3})}
    checkpoints.save(str(tmp_path / 'model5'), variables, {**record, **changes})
    return str(tmp_path / 'model5')


ODD = ['a text', -1, 100.5, None, [], [1], {}, {'iteration': 1}, True, [[1, 2, 3]], [{'iteration': 'x', 'score': 1.0}], 10 ** 400]


@pytest.mark.parametrize('name', ['iteration', 'best', 'ranking', 'unprinted', 'skipped', 'flags', 'regime', 'pretrain_iterations',
                                  'provenance'])
def test_odd_records_are_refused_in_a_sentence(name, tmp_path):
    refused = 0
    for value in ODD:
        try:
            record = checkpoints.load(forged(tmp_path, **{name: value})).record
            checkpoints.ranking_of(record)
        except checkpoints.Damaged as error:
            refused += 'cannot be read' in str(error)
    assert refused >= 8


def test_a_renamed_checkpoint_is_refused(tmp_path):
    forged(tmp_path)
    for path in list(tmp_path.glob('model5*')):
        path.rename(path.with_name(path.name.replace('model5', 'model7')))
    with pytest.raises(UserError, match='model7 was saved after 5 iterations, and its name has another number'):
        checkpoints.find(str(tmp_path), 7)


def corrupt(path, change):
    """Rewrites the index of a bundle, a table of one block without checksums that are right, with another entry."""
    entries = {name: bundle.BundleEntryProto.FromString(value) for name, value in bundle._entries(path.read_bytes()) if name}
    header = next(value for name, value in bundle._entries(path.read_bytes()) if not name)
    change(entries[b'w'])
    data = b''.join(bytes([0, len(name)]) + number(len(value)) + name + value for name, value in sorted(
        {b'': header, **{name: entry.SerializeToString() for name, entry in entries.items()}}.items()))
    block = data + b'\0\0\0\0\1\0\0\0'
    handle = b'\0' + number(len(block))
    index = bytes([0, 1, len(handle)]) + b'~' + handle + b'\0\0\0\0\1\0\0\0'
    place = number(len(block) + 5) + number(len(index))
    path.write_bytes(block + b'\0' * 5 + index + b'\0' * 5 + (b'\0\0' + place).ljust(40, b'\0') + bundle._MAGIC)


def number(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + number(value >> 7)


def shape(*sizes):
    def change(entry):
        del entry.shape.dim[:]
        for size in sizes:
            entry.shape.dim.add(size=size)
    return change


def field(**values):
    return lambda entry: [setattr(entry, name, value) for name, value in values.items()]


@pytest.mark.parametrize('change', [
    shape(-1), shape(2 ** 62, 2 ** 62), shape(*[1] * 300), shape(3), shape(2, 0), field(dtype=0), field(dtype=99), field(dtype=2),
    field(offset=10 ** 6), field(offset=-8), field(size=4), field(size=-8), field(shard_id=3),
    lambda entry: setattr(entry.shape, 'unknown_rank', True), lambda entry: entry.slices.add(), field(dtype=7, size=1)])
def test_forged_shapes_and_types_are_refused(change, tmp_path):
    """TensorFlow would end the process."""
    prefix = forged(tmp_path)
    corrupt(tmp_path / 'model5.index', lambda entry: None)
    bundle.check(f'{prefix}.index', f'{prefix}.data-00000-of-00001')  # the table itself is one
    corrupt(tmp_path / 'model5.index', change)
    for read in checkpoints.load, checkpoints.load_any:
        with pytest.raises(checkpoints.Damaged, match='w has the (type|shape)'):
            read(prefix)


def test_an_index_of_any_bytes(tmp_path):
    """No abort, no traceback, no hang; and what is read is what was written."""
    prefix = forged(tmp_path)
    content = (tmp_path / 'model5.index').read_bytes()
    rng, refused, written = np.random.default_rng(0), 0, checkpoints.load(prefix).arrays
    for case in range(400):
        corrupted = bytearray(content)
        for at in rng.integers(len(content) - 8, size=rng.integers(1, 6)):
            corrupted[at] = rng.integers(256)
        (tmp_path / 'model5.index').write_bytes(corrupted[rng.integers(0, 2) * rng.integers(len(content)):] if case % 4 == 0 else corrupted)
        try:
            arrays = checkpoints.load(prefix).arrays
        except checkpoints.Damaged:
            refused += 1
        else:
            assert arrays.keys() == written.keys() and all(np.array_equal(array, written[name]) for name, array in arrays.items())
    assert refused > 200

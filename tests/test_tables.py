"""--datasource=table: csv files of numbers, one for each task of regression or for each class."""
import csv
import os
import re

import numpy as np
import pytest

import main
from conftest import ROOT, error_of, results_of, run_ok
from data_generator import TableSource, TaskConfig
from maml import MAML
from runtime.cli.request import resolve
from runtime.datasets.tables import Columns, Tables, read_columns, write_columns
from runtime.jobs.train import description
from runtime.system.errors import UserError

COUNTS = {'train': 6, 'val': 3, 'test': 3}
REGRESSION = ['--datasource=table', '--targets=y', '--norm=None', '--update_batch_size=5', '--meta_batch_size=4', '--hidden=20,20',
              '--update_lr=0.1', '--engine=map']
CLASSES = ['--datasource=table', '--update_batch_size=2', '--meta_batch_size=4', '--num_classes=3', '--hidden=20,20', '--update_lr=0.1',
           '--engine=map']
EVALUATE = ['--train=False', '--test_set=True', '--num_test_tasks=20']


def write(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture
def regression(tmp_path):
    """Tables of y = slope x + 7 z, a slope each, in units far from 1."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number in range(count):
            x, z, slope = rng.normal(50, 10, 30), rng.normal(0, 1e-3, 30), rng.uniform(-1000, 1000)
            rows = np.stack([x, slope * (x - 50) + 1e6 * z, z], axis=1)
            write(tmp_path / 'data' / split / f'{split}{number}.csv', ['x', 'y', 'z'], rows.tolist())
    return tmp_path / 'data'


@pytest.fixture
def classes(tmp_path):
    """Tables of classes, each around a place of its own; columns in another order in every second one."""
    rng = np.random.default_rng(1)
    for split, count in COUNTS.items():
        for number in range(count):
            rows, order = rng.normal(rng.uniform(-100, 100, 2), 1, (12, 2)), [0, 1] if number % 2 else [1, 0]
            write(tmp_path / 'classes' / split / f'{split}{number}.csv', ['width', 'height'] if number % 2 else ['height', 'width'],
                  rows[:, order].tolist())
    return tmp_path / 'classes'


def run_name(*flags):
    return resolve(main.parse(['main.py', *flags])).experiment_name


def source(data, targets=(), known=None):
    return TableSource(Tables(str(data), targets, known))


def raw(data, split, columns):
    """{table: its numbers}, as Python's own csv module reads them."""
    found = {}
    for path in sorted((data / split).glob('*.csv')):
        with open(path, newline='', encoding='utf-8') as file:
            found[path.stem] = np.array([[float(row[name]) for name in columns] for row in csv.DictReader(file)])
    return found


def test_tasks_are_standardised_rows_of_one_table(regression):
    tasks = source(regression, ('y',)).tasks(TaskConfig(5, 4, 6, seed=3), 'val')
    batch = tasks.draw(10, 5)
    assert batch.support_x.shape == (5, 4, 2) and batch.support_y.shape == (5, 4, 1) and batch.query_y.shape == (5, 6, 1)
    rows = np.concatenate(list(raw(regression, 'train', 'xzy').values()))
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    for task in range(5):
        name, = tasks.class_names(10 + task)
        wanted = (raw(regression, 'val', 'xzy')[name] - mean) / deviation
        drawn = np.concatenate([np.concatenate(batch[:2], axis=-1)[task], np.concatenate(batch[2:], axis=-1)[task]])
        nearest = [np.abs(wanted - row).max(axis=1) for row in drawn]
        assert max(one.min() for one in nearest) < 1e-5 and len({one.argmin() for one in nearest}) == 10  # different rows
    again = source(regression, ('y',)).tasks(TaskConfig(5, 4, 6, seed=3), 'val').draw(12, 1)
    np.testing.assert_array_equal(again.query_x[0], batch.query_x[2])
    assert len({tasks.class_names(task)[0] for task in range(50)}) == 3


def test_classes_are_tables(classes):
    found = source(classes)
    tasks = found.tasks(TaskConfig(3, 2, 4, seed=0), 'train')
    batch, values = tasks.draw(0, 3), raw(classes, 'train', ['height', 'width'])
    mean, deviation = (function(np.concatenate(list(values.values())), axis=0) for function in (np.mean, np.std))
    assert found.dim_input(tasks.config) == 2 and found.dim_output(tasks.config) == 3 and found.loss == 'xent'
    for task in range(3):
        for x, y in zip(batch.query_x[task], batch.query_y[task]):
            table = values[tasks.class_names(task)[int(y.argmax())]]
            assert np.abs((table - mean) / deviation - x).max(axis=1).min() < 1e-5
        assert (batch.query_y[task].reshape(4, 3, 3).sum(axis=1) == 1).all()  # each shot has every class once


def test_constant_columns_and_blank_lines(tmp_path):
    for split in COUNTS:
        path = tmp_path / split / 'a.CSV'
        path.parent.mkdir()
        path.write_text('\ufeffx, constant ,y\n1,5,2\n\n2,5,3\n3,5,5\n', encoding='utf-8')
    batch = source(tmp_path, ('y',)).tasks(TaskConfig(5, 1, 2, seed=0), 'train').draw(0, 1)
    assert (batch.query_x[..., 1] == 0).all() and np.isfinite(batch.query_x).all()


@pytest.mark.parametrize('constant', [0.1, 0.7, -3e-300, 1e300])
def test_a_constant_column_stays_as_it_is(constant, tmp_path, capsys):
    """Its mean, a sum divided by a number, may differ from it by a rounding error."""
    for split in COUNTS:
        for name in 'a', f'{split}b':
            write(tmp_path / split / f'{name}.csv', ['x', 'constant'], [[number, constant] for number in range(24)])
    assert source(tmp_path).load('train').values[:, 1].tolist() == [0.0] * 48
    assert source(tmp_path).folders().columns.features['constant'] == (constant, 1.0)
    assert 'has a class a in train and in val, and 2 more such names' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('flags, data', [(REGRESSION, 'regression'), (CLASSES, 'classes')])
def test_a_run(flags, data, tmp_path, few_tasks, request):
    """It learns; evaluation repeats exactly although the split train has changed since; --run needs no flags."""
    data = request.getfixturevalue(data)
    flags = [*flags, f'--data_path={data}', f'--logdir={tmp_path / "logs"}', '--metatrain_iterations=300']
    output = run_ok(*flags)
    assert 'train: 6 ' in output and ('x, z → y' in output or 'height, width' in output)
    first = run_ok(*flags, *EVALUATE)
    run, = (tmp_path / 'logs').iterdir()
    entry, = results_of(run)
    before, after = entry.figures[0].mean, entry.figures[-1].mean
    assert after < 0.7 * before if '--targets=y' in flags else after > 0.8
    columns = ['x', 'y', 'z'] if '--targets=y' in flags else ['width', 'height']
    write(data / 'train' / 'more.csv', columns, [[1e4, -1e5, 1][:len(columns)]] * 12)
    again = run_ok(f'--run={run}', *EVALUATE, '--plot')
    assert [line for line in first.splitlines() if '±' in line] == [line for line in again.splitlines() if '±' in line] != []
    assert 'Drawn: ' in again and bool(list(run.glob('*_tasks.png'))) == ('--targets=y' in flags)
    assert 'the data of the train split are not those' in error_of(f'--run={run}', '--metatrain_iterations=301')


def test_prediction_of_targets(regression, tmp_path, few_tasks):
    """In the unit of the file, with its columns, and without the training's data."""
    run_ok(*REGRESSION, f'--data_path={regression}', f'--logdir={tmp_path / "logs"}', '--metatrain_iterations=400')
    run, = (tmp_path / 'logs').iterdir()
    support, query = tmp_path / 'support.csv', tmp_path / 'query.csv'
    x = np.linspace(30, 70, 15)
    write(support, ['z', 'y', 'x'], [[0, 500 * (one - 50), one] for one in x])
    write(query, ['name', 'x', 'z'], [['a', 40, 0], ['b', 60, 0]])
    regression.rename(tmp_path / 'away')
    output = run_ok('--predict', f'--run={run}', f'--support_csv={support}', f'--query_csv={query}')
    with open(run / 'predict_support_query.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert [row['name'] for row in rows] == ['a', 'b'] and 'Root mean squared error' not in output
    low, high = (float(row['predicted y']) for row in rows)
    assert low < -1500 and high > 1500, rows  # truly -5000 and 5000; the network is small and little trained
    write(query, ['x', 'z', 'y'], [[40, 0, -5000], [60, 0, 5000]])
    error = float(run_ok('--predict', f'--run={run}', f'--support_csv={support}', f'--query_csv={query}').split('error: y ')[1].split()[0])
    assert error == pytest.approx(np.sqrt(((low + 5000) ** 2 + (high - 5000) ** 2) / 2), rel=1e-4)
    write(query, ['x', 'z', 'y'], [[40, 0, ''], [60, 0, 5000]])
    output = run_ok('--predict', f'--run={run}', f'--support_csv={support}', f'--query_csv={query}')
    error = float(output.split('Root mean squared error of the 1 row with targets: y ')[1].split()[0])
    assert error == pytest.approx(abs(high - 5000), rel=1e-4)


def test_prediction_of_classes(classes, tmp_path, few_tasks):
    run_ok(*CLASSES, f'--data_path={classes}', f'--logdir={tmp_path / "logs"}', '--metatrain_iterations=200')
    run, = (tmp_path / 'logs').iterdir()
    support, query = tmp_path / 'support.csv', tmp_path / 'query.csv'
    write(support, ['class', 'width', 'height'], [['near', 0, 0], ['near', 1, 0], ['far', 90, 90], ['far', 91, 90]])
    write(query, ['width', 'height', 'class'], [[1, 1, 'near'], [89, 91, 'far'], [0, 1, 'unknown']])
    flags = ['--predict', f'--run={run}', f'--support_csv={support}', f'--query_csv={query}']
    output = run_ok(*flags)
    assert '2 of 2 labelled rows classified correctly' in output
    with open(run / 'predict_support_query.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert [row['predicted'] for row in rows] == ['near', 'far', 'near']
    assert all(float(row['probability of near']) + float(row['probability of far']) == pytest.approx(1, abs=2e-4) for row in rows)
    write(support, ['class', 'width', 'height'], [[str(number), number, 0] for number in range(4)])
    assert f'--support_csv={support} holds 4 classes, and the network has 3 outputs' in error_of(*flags)
    write(support, ['class', 'width', 'height'], [['a', 1, 1]])
    assert 'names only a; it must name two classes or more' in error_of(*flags)
    write(support, ['width', 'height'], [[1, 1]])
    assert 'has no column class' in error_of(*flags)
    write(support, ['width', 'class'], [[1, 'a']])
    write(query, ['width', 'height'], [['', 1]])
    sentence = error_of(*flags)
    assert sentence.startswith('2 tables cannot be used: ') and 'has no column height, which the model was trained with' in sentence
    assert 'an empty one in column width, line 2' in sentence


DAMAGE = {
    'missing values': (b'x,y,z\n1,2,3\n,5,6\n4,,6\n', "has 2 cells that are not finite numbers, first an empty one in column x, line 3"),
    'text': (b'x,y,z\n1,2,3\n4,n/a,6\n', "has 1 cell that is not a finite number, first 'n/a' in column y, line 3"),
    'nan': (b'x,y,z\n1,2,nan\n', "first 'nan' in column z, line 2"),
    'infinity': (b'x,y,z\n1,2,1e999\n', "first '1e999' in column z, line 2"),
    'a number as only Python writes it': (b'x,y,z\n1,2,1_000\n', "first '1_000'"),
    'ragged': (b'x,y,z\n1,2,3\n4,5\n6,7,8,9\n', 'has 3 columns and 2 lines with another number of cells, first line 3 with 2'),
    'other columns': (b'x,y,w\n1,2,3\n', 'has no column z, which '),
    'one column more': (b'x,y,z,w\n1,2,3,4\n', 'has a column w, which '),
    'one column less': (b'x,y\n1,2\n', 'has no column z, which '),
    'bars': (b'x|y|z\n1|2|3\n', 'has no column x, which '),
    'twice the same column': (b'x,y,y\n1,2,3\n', 'must name each column, all differently, and is x,y,y'),
    'no header': (b'1,2,3\n4,5,6\n', 'must name each column, all differently, and is 1,2,3'),
    'empty': (b'', 'is empty'),
    'a header only': (b'x,y,z\n', 'has no rows below the names of its columns'),
    'not UTF-8': (b'x,y,z\n1,2,3\xff\n', 'cannot be read as a csv file in UTF-8'),
    'zero bytes': (b'x,y,z\n1,2,\x003\n', 'test1.csv'),
    'an open quote': (b'x,y,z\n1,2,"3\n', 'cannot be read as a csv file in UTF-8'),
    'a number beyond float32': (b'x,y,z\n' + b'1e300,2,3\n' * 12, 'the numbers in the column x are too large or too far apart'),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_hostile_tables(name, regression, tmp_path):
    """One sentence that names the file, before anything is written; those of the test split stop a training too."""
    content, words = DAMAGE[name]
    (regression / 'test' / 'test1.csv').write_bytes(content)
    training = name != 'a number beyond float32'  # only train's numbers decide there
    sentence = error_of(*REGRESSION, f'--data_path={regression}', f'--logdir={tmp_path / "logs"}', *([] if training else EVALUATE))
    assert words in sentence and not (tmp_path / 'logs').exists(), sentence


def test_all_bad_tables_are_named_at_once(regression, tmp_path):
    for number in range(5):
        (regression / 'train' / f'bad{number}.csv').write_text('x,y,z\n1,2,?\n')
    (regression / 'val' / 'bad.csv').mkdir()
    sentence = error_of(*REGRESSION, f'--data_path={regression}', f'--logdir={tmp_path / "logs"}')
    assert 'val/bad.csv cannot be read: not a regular file' in sentence
    (regression / 'val' / 'bad.csv').rmdir()
    sentence = error_of(*REGRESSION, f'--data_path={regression}', f'--logdir={tmp_path / "logs"}')
    assert sentence.startswith('5 tables cannot be used: ') and all(f'bad{number}.csv' in sentence for number in range(5))


def test_refused_data(regression, tmp_path):
    flags = [f'--data_path={regression}', f'--logdir={tmp_path / "logs"}']
    for more, words in (['--targets=w'], '--targets=w: there is no column w in '), (['--targets=x,y,z'], 'names all columns of '), (
            ['--targets=y', '--update_batch_size=20'], 'a task needs 40 rows of a table (20 support, 20 query), but '):
        assert words in error_of(*REGRESSION, *flags, *more)
    assert 'holds no csv files' in error_of(*REGRESSION, f'--data_path={tmp_path}')
    assert 'there is no folder ' in error_of(*REGRESSION, f'--data_path={tmp_path / "nowhere"}')
    (regression / 'train').rename(tmp_path / 'away')
    assert 'holds no csv files' in error_of(*REGRESSION, *flags)


def test_refused_classes(classes, tmp_path):
    flags = [*CLASSES, f'--data_path={classes}', f'--logdir={tmp_path / "logs"}']
    assert '--num_classes=7 asks for more classes than the 6 of the train split' in error_of(*flags, '--num_classes=7')
    assert 'a task needs 14 rows of a class' in error_of(*flags, '--update_batch_size=7')
    for path in classes.rglob('*.csv'):
        path.write_text('class,width,height\n' + '1,2,3\n' * 9)
    assert 'has a column class, but each csv file is a class' in error_of(*flags)


@pytest.mark.parametrize('flags, words', [
    (['--datasource=table'], '--datasource=table needs --data_path'),
    (['--datasource=sinusoid', '--targets=y'], '--targets is for --datasource=table'),
    (['--datasource=table', '--data_path=.', '--targets=y,y'], '--targets=y,y must name columns, separated by commas, each once'),
    (['--datasource=table', '--data_path=.', '--targets=y,'], '--targets=y, must name columns'),
    (['--datasource=table', '--data_path=.', '--hidden=40,0'], '--hidden=40,0 must be sizes of layers'),
    (['--datasource=omniglot', '--hidden=40'], '--hidden is for fully connected networks: add --conv=False'),
    (['--datasource=table', '--data_path=.', '--num_classes=1'], 'a task needs at least 2 classes'),
    (['--datasource=table', '--data_path=.', '--targets=y', '--mean_loss'], '--mean_loss is for classification'),
    (['--datasource=table', '--predict'], '--predict needs --support_csv, a csv file; --predict needs --query_csv, a csv file'),
    (['--datasource=table', '--predict', '--support_csv=a', '--query_csv=b', '--support_dir=c'], '--support_dir is for images'),
    (['--datasource=table', '--data_path=.', '--support_csv=a'], '--support_csv is for --predict'),
    (['--datasource=sinusoid', '--predict'], '--predict is for images and tables, and --datasource=sinusoid has none'),
])
def test_nonsense(flags, words):
    assert words in error_of(*flags)


@pytest.mark.slow
@pytest.mark.parametrize('config', ['table_regression', 'table_classes'])
def test_commands_of_the_configs(config, regression, classes, tmp_path, few_tasks):
    flags = [f'--flagfile={ROOT}/configs/{config}.flags', f'--data_path={regression if config == "table_regression" else classes}',
             f'--logdir={tmp_path / "logs"}', '--metatrain_iterations=2', '--num_classes=3', '--num_updates=1', '--engine=map']
    assert 'The last checkpoint is' in run_ok(*flags) and 'meta-test, 20 tasks' in run_ok(*flags, *EVALUATE)


def test_damaged_columns_of_a_run(regression, tmp_path, few_tasks):
    flags = [*REGRESSION, f'--data_path={regression}', f'--logdir={tmp_path / "logs"}', '--metatrain_iterations=2']
    run_ok(*flags)
    run, = (tmp_path / 'logs').iterdir()
    for content in ('', '{', '[]', '{"features": {"x": [0, 0]}, "targets": {}}', '{"features": {"x": [NaN, 1]}, "targets": {}}',
                    '{"features": 3}'):
        (run / 'columns.json').write_text(content)
        assert 'columns.json cannot be read, or no training wrote it' in error_of(*flags, *EVALUATE)
    (run / 'columns.json').unlink()
    assert 'meta-test, 20 tasks' in run_ok(*flags, *EVALUATE)  # the data are those of the training


def test_columns_are_those_of_the_model(regression, tmp_path, few_tasks):
    """Of one that --load_from names too; and not those of a training that was stopped before its first checkpoint."""
    flags = [*REGRESSION, f'--data_path={regression}', '--metatrain_iterations=2']
    run = tmp_path / 'logs' / run_name(*flags)
    stale = Columns({'x': (5.0, 2.0), 'z': (0.0, 1.0)}, {'y': (1.0, 3.0)})
    os.makedirs(run)
    write_columns(str(run), stale)
    run_ok(*flags, f'--logdir={tmp_path / "logs"}')
    assert read_columns(str(run)) != stale
    for path in regression.glob('*/*.csv'):
        with open(path, newline='', encoding='utf-8') as file:
            rows = [[z, x, 2 * float(y) if y != 'y' else y] for x, y, z in csv.reader(file)]
        write(path, rows[0], rows[1:])
    there = run_ok(*flags, *EVALUATE, f'--logdir={tmp_path / "logs"}')
    elsewhere = [*flags, *EVALUATE, f'--logdir={tmp_path / "other"}', f'--load_from={run / "model2"}']
    assert re.findall(' .* ± .*', there) == re.findall(' .* ± .*', run_ok(*elsewhere)) != []
    path = sorted(regression.glob('val/*'))[0]
    write(path, ['z', 'w', 'y'], [[1, 2, 3]] * 20)
    assert f'{path} has no column x, which the training has' in error_of(*flags, *EVALUATE, f'--logdir={tmp_path / "logs"}')
    os.rename(run / 'columns.json', tmp_path / 'columns.json')
    assert f'there is no columns.json in {run}, which says' in error_of(*elsewhere)


def test_two_files_of_one_table(regression):
    (regression / 'val' / 'val1.CSV').write_bytes((regression / 'val' / 'val1.csv').read_bytes())
    with pytest.raises(UserError, match='val1.csv and val1.CSV are two tables of one name'):
        source(regression, ['y']).load('train')


def test_hidden_layers(tmp_path):
    """In the network and in the directory's name; the default leaves both as they were."""
    for more, layers, end in ([], '40-40', ''), (['--hidden=7,5,3'], '7-5-3', '.layers7-5-3'):
        run, data = main.run_and_data(main.parse(['main.py', '--norm=None', f'--logdir={tmp_path}', *more]))
        assert f'fully connected, {layers},' in description(run, data, MAML(run.model))
        assert os.path.basename(run.directory) == 'cls_5.mbs_25.ubs_5.numstep1.updatelr0.001nonorm' + end


def test_standardising_is_undone():
    columns = Columns({'a': (1.0, 2.0)}, {'b': (-3.0, 0.5), 'c': (0.0, 10.0)})
    values = np.array([[1.0, -3.0, 5.0], [3.0, -2.0, -10.0]])
    found = columns.standardise(values)
    np.testing.assert_array_equal(found, np.array([[0, 0, 0.5], [1, 2, -1]], np.float32))
    np.testing.assert_array_equal(columns.restore_targets(found[:, 1:]), values[:, 1:])
    with pytest.raises(UserError):
        columns.standardise(np.array([[1e300]]))

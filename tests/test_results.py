"""What evaluations leave behind: results.json, comparisons of runs, and pictures."""
import json
import os

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import main
from conftest import error_of, run_ok
from runtime import comparison, results, statistics
from runtime.errors import UserError

SINUSOID = ['--datasource=sinusoid', '--update_batch_size=10', '--norm=None', '--meta_batch_size=4']
IMAGES = ['--datasource=omniglot', '--update_batch_size=1', '--num_filters=4', '--meta_batch_size=2', '--update_lr=0.4']


def directory_of(logdir):
    directory, = (path for path in logdir.iterdir() if path.is_dir())
    return directory


@pytest.fixture(scope='module')
def two_runs(tmp_path_factory):
    """Two runs that differ in their seeds of training, evaluated on the same tasks."""
    root = tmp_path_factory.mktemp('runs')
    for name, iterations in ('short', 100), ('long', 2000):
        flags = [*SINUSOID, f'--logdir={root / name}', f'--metatrain_iterations={iterations}']
        run_ok(*flags)
        run_ok(*flags, '--train=False', '--num_test_tasks=50')
    return directory_of(root / 'short'), directory_of(root / 'long')


def test_results_hold_all_that_a_paper_needs(two_runs):
    directory = two_runs[0]
    (name, entry), = json.loads((directory / 'results.json').read_text()).items()
    assert name == 'test_ubs10_stepsize0.001_tasks50, val'
    scores = np.array(entry['scores'])
    assert scores.shape == (50, 11) and len(entry['updates']) == 11
    for column, said in zip(scores.T, entry['updates']):
        assert said['mean'] == pytest.approx(column.mean(), rel=1e-6) and said['std'] == pytest.approx(column.std(), rel=1e-6)
        assert said['ci95'] == pytest.approx(1.96 * column.std() / np.sqrt(50), rel=1e-6)
        low, high = said['bootstrap95']
        # Of the same width as the normal interval, about, and around the mean.
        assert low < said['mean'] < high and 0.7 < (high - low) / (2 * said['ci95']) < 1.3
    assert entry['iterations'] == 100 and entry['checkpoint'].endswith('model100')
    assert entry['tasks'] == {'datasource': 'sinusoid', 'split': 'val', 'num_classes': None, 'update_batch_size': 10,
                              'query_shots': 10, 'seed': 0, 'count': 50, 'data': None}
    assert entry['flags']['norm'] == 'None' and entry['flags']['num_test_tasks'] == 50 and 'tensorflow' in entry['versions']
    assert set(main.names()) == entry['flags'].keys() and entry['tasks_per_second'] > 0


def test_further_evaluations_are_added(tmp_path, small_omniglot):
    flags = [*IMAGES, f'--data_path={small_omniglot}', f'--logdir={tmp_path}', '--metatrain_iterations=2', '--num_test_tasks=7']
    run_ok(*flags)
    for more in [], ['--test_set=True'], ['--test_query=2'], []:
        run_ok(*flags, '--train=False', *more)
    entries = json.loads((directory_of(tmp_path) / 'results.json').read_text())
    assert list(entries) == ['test_ubs1_stepsize0.4_tasks7, val', 'test_ubs1_stepsize0.4_tasks7, test',
                             'test_ubs1_stepsize0.4_query2_tasks7, val']
    (directory_of(tmp_path) / 'results.json').write_text('{"x": 3}')
    assert 'results.json cannot be read' in error_of(*flags, '--train=False')


def test_comparison(two_runs, tmp_path, capsys):
    short, long = two_runs
    output = run_ok(f'--compare={short}', str(long))
    assert f'A  {short}/test_ubs10_stepsize0.001_tasks50, model100' in output
    assert '50 tasks of sinusoid, meta-validation' in output and 'B - A' in output
    a, b = (np.array(next(iter(json.loads((path / 'results.json').read_text()).values()))['scores']) for path in two_runs)
    row = [line.split() for line in output.splitlines() if line.split()[:1] == ['5']][0]
    assert row[1:4] == [f'{a[:, 5].mean():.4f}', '±', f'{1.96 * a[:, 5].std() / np.sqrt(50):.4f}']
    assert row[7] == f'{(b - a)[:, 5].mean():.4f}'
    assert float(row[10]) == pytest.approx(stats.ttest_rel(b[:, 5], a[:, 5]).pvalue, rel=0.1)
    # A folder of runs stands for them all.
    both = run_ok('--compare', str(short.parent), str(long.parent), str(tmp_path), '--plot')
    assert f'there is no results.json in {tmp_path}' in capsys.readouterr().err
    assert 'B - A' in both and 'Left out' not in both and os.path.getsize(short.parent / 'comparison.png') > 5000


def test_what_cannot_be_compared(two_runs, tmp_path):
    assert f'there is no results.json in {tmp_path}' in error_of(f'--compare={tmp_path}')
    assert 'there is only one evaluation' in error_of(f'--compare={two_runs[0]}')
    assert 'B - A' in run_ok(*(f'--compare={directory}' for directory in two_runs))
    assert '--seed means nothing to --compare' in error_of(f'--compare={two_runs[0]}', '--seed=1')
    for content in '', '[]', '{"a": {}}', '{"a": {"tasks": {}, "scores": [[1]], "score": "x", "checkpoint": "y"}}':
        (tmp_path / 'results.json').write_text(content)
        assert 'results.json cannot be read' in error_of(f'--compare={tmp_path}')


def test_labels_in_pictures_say_what_differs():
    def labels(*paths, methods=('MAML', 'MAML'), flags=({}, {})):
        return comparison._short({path: {'method': method, 'flags': flag} for path, method, flag in zip(paths, methods, flags)})
    assert labels('a/run1/x, model5', 'a/run2/x, model5') == ['A: run1', 'B: run2']
    assert labels('/deep/a/run/x, model5', 'a/run/x, model6') == ['A: x, model5', 'B: x, model6']
    assert labels('a/run1/x', 'a/run2/x', methods=('oracle', 'MAML')) == ['A: oracle', 'B: MAML']
    same, other = {'baseline': 'oracle', 'num_updates': 1}, {'baseline': None, 'num_updates': 5}
    assert labels('a/run1/x', 'a/run2/x', methods=('oracle', 'MAML'), flags=(same, {**other, 'num_updates': 1})) == [
        'A: oracle', 'B: MAML']
    assert labels('a/run1/x', 'a/run2/x', methods=('oracle', 'MAML'), flags=(same, other)) == ['A: run1', 'B: run2']


def test_a_difference_that_is_none():
    assert statistics.p_value(np.arange(3.), np.arange(3.)) == 1
    assert statistics.bootstrap(np.ones([1, 2])).tolist() == [[1, 1], [1, 1]]


def test_bootstrap_covers():
    """Of 200 intervals about 190 hold the true mean."""
    rng, covered = np.random.default_rng(3), 0
    for _ in range(200):
        low, high = statistics.bootstrap(rng.exponential(size=(60, 1)))[0]
        covered += low < 1 < high
    assert 175 <= covered <= 199


def size_of(path):
    with Image.open(path) as image:
        image.load()
        return image.size


def test_pictures_of_sinusoids(two_runs):
    logdir = two_runs[1].parent
    flags = [*SINUSOID, f'--logdir={logdir}', '--metatrain_iterations=2000', '--train=False', '--num_test_tasks=50', '--plot']
    output = run_ok(*flags)
    drawn = [line.removeprefix('Drawn: ') for line in output.splitlines() if line.startswith('Drawn: ')]
    assert [os.path.basename(path) for path in drawn] == [f'test_ubs10_stepsize0.001_tasks50_val_{what}.png'
                                                          for what in ('updates', 'tasks')]
    assert all(min(size_of(path)) > 300 for path in drawn)
    os.mkdir(drawn[0] + 'x')
    os.remove(drawn[0])
    os.rename(drawn[0] + 'x', drawn[0])
    assert 'cannot be written' in error_of(*flags)


@pytest.mark.parametrize('source', ['omniglot', 'folder'])
def test_pictures_of_images(source, small_data, tmp_path):
    flags = {'omniglot': IMAGES, 'folder': ['--datasource=folder', '--update_batch_size=1', '--num_filters=4', '--image_size=20',
                                            '--meta_batch_size=2', '--num_classes=3']}[source]
    flags = [*flags, f'--data_path={small_data[source]}', f'--logdir={tmp_path}', '--metatrain_iterations=2']
    run_ok(*flags)
    run_ok(*flags, '--train=False', '--num_test_tasks=5', '--plot')
    sheet, = directory_of(tmp_path).glob('*_val_tasks.png')
    assert min(size_of(sheet)) > 300


def test_a_task_names_its_classes(small_omniglot):
    """The images that class_names promises are those that are drawn."""
    import dataclasses

    from data_generator import SOURCES, TaskConfig
    source = dataclasses.replace(SOURCES['omniglot'], rotations=False, invert=False)
    tasks = source.tasks(TaskConfig(5, 1, 1, seed=0, data_path=str(small_omniglot)), 'val')
    batch = tasks.draw(3, 1)
    for label, name in enumerate(tasks.class_names(3)):
        row, = np.flatnonzero(batch.support_y[0, :, label])
        images = [np.asarray(Image.open(path).convert('L')).ravel() / 255 for path in (small_omniglot / name).iterdir()]
        assert any(np.allclose(batch.support_x[0, row], image) for image in images)


def test_grid_is_the_curve_of_the_task():
    from data_generator import SOURCES, TaskConfig
    tasks = SOURCES['sinusoid'].tasks(TaskConfig(5, 10, 10, seed=0, baseline='oracle'), 'val')
    x, y = tasks.grid(2, 3)
    amplitude, phase = tasks.parameters(2, 3)
    assert x.shape == (3, 200, 3) and (x[:, 0, 0] == -5).all() and (x[:, -1, 0] == 5).all()
    np.testing.assert_allclose(y, amplitude * np.sin(x[..., :1] - phase), atol=1e-5)
    np.testing.assert_allclose(tasks.draw(2, 3).support_x[:, 0, 1], amplitude[:, 0, 0], rtol=1e-6)


def test_results_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError):
        results.write(str(tmp_path / 'nowhere'), 'x', np.ones([3, 2]), {'tasks': {'split': 'val'}})
    with pytest.raises(UserError):
        comparison.compare([str(tmp_path)])

"""What evaluations leave behind: results.json, comparisons of runs, and pictures."""
import csv
import json
import os
import pickle
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import main
from conftest import error_of, run_ok
from runtime.cli.flags import LEARNING
from runtime.cli.request import resolve
from runtime.results import collect as evaluations
from runtime.results import compare as comparison
from runtime.results import plots, statistics
from runtime.results import store as results
from runtime.system.errors import UserError

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
    assert {*LEARNING, 'test_query', 'test_seed', 'load_from'} <= entry['flags'].keys() and entry['tasks_per_second'] > 0


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
    assert '--seed cannot be combined with --compare' in error_of(f'--compare={two_runs[0]}', '--seed=1')
    for content in '', '[]', '{"a": {}}', '{"a": {"tasks": {}, "scores": [[1]], "score": "x", "checkpoint": "y"}}':
        (tmp_path / 'results.json').write_text(content)
        assert 'results.json cannot be read' in error_of(f'--compare={tmp_path}')


def evaluation(path, method='MAML', given=None, checkpoint='model5', scores=((1., 2.), (3., 5.)), **flags):
    directory, name = os.path.split(path)
    return comparison.Evaluation(directory, name, given, {
        'method': method, 'flags': flags, 'checkpoint': checkpoint, 'scores': scores, 'score': 'loss',
        'tasks': {'datasource': 'sinusoid', 'split': 'val', 'count': 2}})


def test_labels_say_what_differs():
    def labels(*evaluations):
        return comparison.what_differs(evaluations)
    assert labels(evaluation('a/run1/x'), evaluation('a/run2/x')) == ['run1', 'run2']
    assert labels(evaluation('/deep/a/run/x'), evaluation('a/run/x', checkpoint='model6')) == ['model5', 'model6']
    assert labels(evaluation('a/run1/x', 'oracle', baseline='oracle'), evaluation('a/run2/x', baseline=None)) == ['oracle', 'MAML']
    assert labels(evaluation('a/run1/x', num_updates=1), evaluation('a/run2/x', num_updates=5)) == ['num_updates=1', 'num_updates=5']
    assert labels(evaluation('a', seed=0), evaluation('b')) == ['a, model5', 'b, model5'], 'an evaluation older than a flag has its default'
    assert labels(evaluation('a', given='old'), evaluation('b', given='new', norm='None')) == ['old', 'new']
    assert labels(evaluation('a', given='m', seed=0), evaluation('b', given='m', seed=1)) == ['m, seed=0', 'm, seed=1']
    assert labels(evaluation('a', 'MAML++, ensemble of 5', 'MAML++', ensemble=5), evaluation('a', 'MAML++', 'MAML++', ensemble=1)) == [
        'MAML++, ensemble of 5', 'MAML++'], 'neither the name nor the ensemble is said twice'


def test_each_at_its_own_number_of_updates():
    """The paired test of methods that are meant at different numbers of updates."""
    scores = np.random.default_rng(0).normal(size=[2, 9, 4])
    pair = [evaluation('a', num_updates=1, scores=scores[0].tolist()), evaluation('b', num_updates=3, scores=scores[1].tolist())]
    own = comparison.Comparison(pair).rows()[-1]
    assert own.title == 'own'
    np.testing.assert_array_equal(own.values, [scores[0, :, 1], scores[1, :, 3]])
    text = comparison.as_text(comparison.Comparison(pair))
    p = stats.ttest_rel(scores[1, :, 3], scores[0, :, 1]).pvalue
    assert f'{p:.2g}' in text.splitlines()[-2] and '(own: each at its own number of updates, A 1, B 3)' in text
    alike = comparison.Comparison([evaluation('a', num_updates=1), evaluation('b', num_updates=1)])
    assert [row.title for row in alike.rows()] == ['0', '1']


def test_runs_that_differ_by_seed_only_are_averaged():
    scores = np.random.default_rng(0).normal(size=[4, 9, 2])
    runs = [evaluation(f'run{seed}', seed=seed, scores=one.tolist()) for seed, one in enumerate(scores[:3])]
    found = comparison.Comparison([*runs, evaluation('other', seed=0, num_updates=5, scores=scores[3].tolist())])
    assert found.seed_groups() == [[0, 1, 2]]
    means = scores[:3, :, 1].mean(axis=1)
    assert comparison.over_seeds(found.rows()[1], [0, 1, 2]) == pytest.approx((means.mean(), means.std(ddof=1)))
    text = comparison.as_text(found)
    assert 'ABC over seeds' in text and f'{means.mean():.4f} ({means.std(ddof=1):.4f})' in text
    assert 'std' in comparison.as_latex(found)


def test_seeds_of_runs_that_differ_in_more_are_not_averaged(tmp_path):
    scores = np.random.default_rng(0).normal(size=[2, 9, 2]).tolist()
    runs = [evaluation(f'run{seed}', seed=seed, scores=one, pretrain_iterations=seed) for seed, one in enumerate(scores)]
    assert comparison.Comparison(runs).seed_groups() == []
    assert comparison.what_differs(runs) == ['pretrain_iterations=0, seed=0', 'pretrain_iterations=1, seed=1']
    alike = [evaluation(f'run{seed}', seed=seed, scores=one, verify=bool(seed)) for seed, one in enumerate(scores)]
    found = comparison.Comparison(alike)
    rows = list(csv.DictReader(comparison.as_csv(found).splitlines()))
    together, = (row for row in rows if row['run'] == 'AB' and row['updates'] == '1')
    assert together['seed'] == '0 1' and float(together['mean']) == pytest.approx(np.mean(scores, axis=(0, 1))[1])


@pytest.mark.filterwarnings('error')
def test_nothing_is_warned_of_where_all_runs_diverged(tmp_path):
    bad = [[1., np.inf, np.nan, 1e300]] * 5
    runs = [evaluation(f'run{seed}', seed=seed, scores=bad) for seed in range(3)]
    for style in comparison.as_text, comparison.as_csv, comparison.as_latex:
        assert 'inf' in style(comparison.Comparison(runs))
    plots.save(plots.curves({'a': np.array(bad), 'b': np.ones((5, 4))}, 'loss', 'heading'), str(tmp_path / 'a.png'))


def test_runs_behind_links_are_compared_once(tmp_path):
    (tmp_path / 'there' / 'run').mkdir(parents=True)
    (tmp_path / 'there' / 'run' / 'results.json').write_text('{}')
    (tmp_path / 'here').mkdir()
    (tmp_path / 'here' / 'link').symlink_to(tmp_path / 'there')
    (tmp_path / 'there' / 'circle').symlink_to(tmp_path / 'here')
    assert evaluations.result_directories(str(tmp_path / 'here')) == [str(tmp_path / 'here' / 'link' / 'run')]


def test_tables_of_other_programs(two_runs, capsys):
    short, long = two_runs
    rows = list(csv.DictReader(run_ok('--compare', f'brief={short}', f'long={long}', '--format=csv').splitlines()))
    entry, = json.loads((long / 'results.json').read_text()).values()
    row, = (row for row in rows if row['label'] == 'long' and row['updates'] == '5')
    assert float(row['mean']) == pytest.approx(np.mean(entry['scores'], axis=0)[5]) and row['seed'] == '0'
    assert len(rows) == 22 and float(row['difference']) < 0 and 0 < float(row['p']) < 1
    latex = run_ok('--compare', f'a_b={short}', f'long={long}', '--format=latex', '--plot')
    assert latex.count(r'\\') == 3 and r'a\_b' in latex and r'\pm' in latex and 'Drawn' not in latex
    assert 'Drawn: ' in capsys.readouterr().err
    assert '--format is for --compare' in error_of('--format=csv')


def test_comparisons_look_at_every_level_and_overwrite_no_picture(two_runs, tmp_path):
    shutil.copytree(two_runs[0], tmp_path / 'a' / 'deep' / 'down' / 'short')
    shutil.copytree(two_runs[1], tmp_path / 'b' / 'long')
    shutil.copytree(two_runs[1], tmp_path / 'b' / 'long' / 'earlier1')
    output = run_ok(f'--compare={tmp_path}', '--plot')
    assert 'B - A' in output and 'C - A' not in output and 'earlier' not in output
    (tmp_path / 'comparison.png').write_text('mine')
    assert 'comparison-2.svg' not in run_ok(f'--compare={tmp_path}', '--plot', '--plot_format=svg')
    assert 'Drawn: ' + str(tmp_path / 'comparison-2.png') in run_ok(f'--compare={tmp_path}', '--plot')
    assert (tmp_path / 'comparison.png').read_text() == 'mine' and (tmp_path / 'comparison.svg').read_text().startswith('<?xml')


def test_evaluations_live_side_by_side(tmp_path):
    """Of the newest and of other checkpoints, of other tasks and of both splits."""
    flags = [*SINUSOID, f'--logdir={tmp_path}', '--num_test_tasks=5', '--save_interval=2', '--metatrain_iterations=4']
    run_ok(*flags)
    flags += ['--train=False']
    name = 'test_ubs10_stepsize0.001_tasks5'
    for more in [], ['--test_set=True'], ['--test_iter=2'], ['--test_iter=4'], ['--test_seed=1'], ['--test_best']:
        run_ok(*flags, *more)
    directory = directory_of(tmp_path)
    entries = json.loads((directory / 'results.json').read_text())
    assert {f'{name}, val', f'{name}, test', f'{name}_model2, val', f'{name}_seed1, val'} == set(entries)
    files = [entry['file'] for entry in entries.values()]
    assert len(set(files)) == 4 and files[0] == name
    for entry in entries.values():
        with open(directory / f'{entry["file"]}.pkl', 'rb') as file:
            assert pickle.load(file)['mses'].tolist() == entry['scores']
    assert entries[f'{name}_seed1, val']['tasks']['seed'] == 1
    # Training goes on: what was the newest gets the name of its checkpoint.
    before = entries[f'{name}, val']
    run_ok(*flags[:-2], '--metatrain_iterations=6')
    run_ok(*flags[:-2], '--metatrain_iterations=6', '--train=False')
    entries = json.loads((directory / 'results.json').read_text())
    assert entries[f'{name}_model4, val']['scores'] == before['scores'] and entries[f'{name}, val']['iterations'] == 6
    with open(directory / f'{name}_model4.pkl', 'rb') as file:
        assert pickle.load(file)['mses'].tolist() == before['scores']
    assert 'C - A' in run_ok(f'--compare={directory}')


def test_other_images_do_not_overwrite_results(tmp_path, small_omniglot):
    flags = [*IMAGES, f'--logdir={tmp_path}', '--metatrain_iterations=2', '--num_test_tasks=3']
    run_ok(*flags, f'--data_path={small_omniglot}')
    shutil.copytree(small_omniglot, tmp_path / 'other', ignore=shutil.ignore_patterns('.cache', '00.png'))
    for path in small_omniglot, tmp_path / 'other':
        run_ok(*flags, f'--data_path={path}', '--train=False')
    entries = json.loads(next(tmp_path.glob('cls*/results.json')).read_text())
    assert len(entries) == 2 and len({entry['file'] for entry in entries.values()}) == 2


def test_seeds_are_evaluated_on_the_same_tasks(tmp_path):
    flags = [*SINUSOID, f'--logdir={tmp_path}', '--num_test_tasks=5', '--metatrain_iterations=2']
    for seed in 0, 1, 2:
        run_ok(*flags, f'--seed={seed}')
        run_ok(*flags, f'--seed={seed}', '--train=False')
    assert sorted(path.name.rpartition('nonorm')[2] for path in tmp_path.iterdir()) == ['', '.seed1', '.seed2']
    assert 'ABC over seeds' in run_ok(f'--compare={tmp_path}')


def directory_name(*flags):
    return resolve(main.parse(['main.py', *flags])).experiment_name


def test_what_makes_a_run_is_in_its_name():
    assert directory_name('--meta_lr=0.01', '--norm=None').endswith('nonorm.metalr0.01')
    assert directory_name('--seed=3') == directory_name() + '.seed3'
    assert directory_name('--datasource=folder', '--data_path=x', '--split=8/1/1', '--image_size=20', '--rotations',
                          '--image_channels=1').endswith('batchnorm.size20.channels1.rotations.split8-1-1')
    assert directory_name('--datasource=folder', '--split=64/16/20', '--seed=0', '--meta_lr=0.001') == directory_name()


def test_numbers_of_runs_that_diverged():
    huge = np.array([[1., 1e18], [2., np.inf], [3., np.nan]])
    pair = comparison.Comparison([evaluation('a', scores=huge.tolist()), evaluation('b', scores=np.ones([3, 2]).tolist())])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        text = comparison.as_text(pair)
    assert '1000000000000' not in text and max(map(len, text.splitlines())) < 120
    assert statistics.number(451142711936811008.0, 4) == '4.51e+17' and statistics.number(3.25, 4) == '3.2500'


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


@pytest.mark.parametrize('source', ['omniglot', pytest.param('folder', marks=pytest.mark.slow)])
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

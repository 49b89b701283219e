"""What evaluations leave behind: results.json, comparisons of runs, and pictures."""
import csv
import dataclasses
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import main
from conftest import ROOT, SINUSOID, an_entry, directory_of, error_of, results_of, run_ok
from runtime.cli.flags import FLAGS, LEARNING, labels
from runtime.cli.request import resolve
from runtime.results import collect, compare, plots, render, statistics, store
from runtime.system.errors import UserError

IMAGES = ['--update_batch_size=1', '--conv=False', '--hidden=4', '--engine=map', '--meta_batch_size=2', '--metatrain_iterations=2']


@pytest.fixture(scope='module')
def two_runs(tmp_path_factory):
    """Two runs that differ in their seeds of training, evaluated on the same tasks."""
    root = tmp_path_factory.mktemp('runs')
    for name, iterations in ('short', 100), ('long', 2000):
        flags = [*SINUSOID, f'--logdir={root / name}', f'--metatrain_iterations={iterations}']
        run_ok(*flags)
        run_ok(*flags, '--train=False', '--num_test_tasks=50')
    return directory_of(root / 'short'), directory_of(root / 'long')


@pytest.mark.slow
def test_results_hold_all_that_a_paper_needs(two_runs):
    directory = two_runs[0]
    content = json.loads((directory / 'results.json').read_text())
    assert content['version'] == 2
    entry, = content['evaluations']
    scores = np.array(entry['scores'])
    assert scores.shape == (50, 11) and len(entry['figures']) == 11
    for column, said in zip(scores.T, entry['figures']):
        assert said['mean'] == pytest.approx(column.mean(), rel=1e-6) and said['std'] == pytest.approx(column.std(), rel=1e-6)
        assert said['ci95'] == pytest.approx(1.96 * column.std() / np.sqrt(50), rel=1e-6)
        low, high = said['bootstrap95']
        # Of the same width as the normal interval, about, and around the mean.
        assert low < said['mean'] < high and 0.7 < (high - low) / (2 * said['ci95']) < 1.3
    assert entry['iterations'] == 100 and entry['checkpoint'] == 'model100' and entry['ensemble'] == [] and entry['is_best'] is True
    assert entry['tasks'] == {'datasource': 'sinusoid', 'split': 'val', 'num_classes': None, 'update_batch_size': 10,
                              'query_shots': 10, 'seed': 0, 'count': 50, 'data': None, 'facts': {}}
    assert entry['setting'] == {'query_norm': 'batch', 'update_lr': 0.001, 'inner_batch': 0, 'test_updates': 10, 'headline_updates': 1,
                                'load_from': None}
    assert entry['training']['method'] == 'MAML' and entry['training']['metatrain_iterations'] == 100
    assert entry['training']['flags']['norm'] == 'None' and entry['training']['flags']['seed'] == 0
    assert 'tensorflow' in entry['versions'] and entry['seconds'] > 0


def test_comparison(two_runs, tmp_path, capsys):
    short, long = two_runs
    output = run_ok(f'--compare={short}', str(long))
    assert f'A  {short}/model100  (' in output
    assert '50 tasks of sinusoid, meta-validation' in output and 'B - A' in output
    a, b = (np.array(results_of(path)[0].scores) for path in two_runs)
    row = [line.split() for line in output.splitlines() if line.split()[:1] == ['5']][0]
    assert row[1:4] == [f'{a[:, 5].mean():.4f}', '±', f'{1.96 * a[:, 5].std() / np.sqrt(50):.4f}']
    assert row[7] == f'{(b - a)[:, 5].mean():.4f}'
    assert float(row[10]) == pytest.approx(stats.ttest_rel(b[:, 5], a[:, 5]).pvalue, rel=0.1)
    # A folder of runs stands for them all.
    both = run_ok('--compare', str(short.parent), str(long.parent), str(tmp_path), '--plot')
    assert f'there is no results.json in {tmp_path}' in capsys.readouterr().err
    assert 'B - A' in both and 'Left out' not in both and os.path.getsize(short.parent / 'comparison.png') > 5000


def test_what_cannot_be_compared(two_runs, tmp_path):
    assert f'there is no folder {tmp_path}/nowhere' in error_of(f'--compare={two_runs[0]}', f'{tmp_path}/nowhere')
    assert f'there is no results.json in {tmp_path}' in error_of(f'--compare={tmp_path}')
    assert 'there is only one evaluation' in error_of(f'--compare={two_runs[0]}')
    assert 'B - A' in run_ok(*(f'--compare={directory}' for directory in two_runs))
    assert '--seed cannot be combined with --compare' in error_of(f'--compare={two_runs[0]}', '--seed=1')
    for content in '', '[]', '{"a": {}}', '{"version": 2}', '{"version": 2, "evaluations": [{}]}':
        (tmp_path / 'results.json').write_text(content)
        assert 'results.json cannot be read' in error_of(f'--compare={tmp_path}')


@pytest.mark.parametrize('path, value', [
    ('checkpoint', 5), ('iterations', 'ten'), ('iterations', True), ('is_best', 1), ('ensemble', [1, 'b']), ('training', []),
    ('training.method', None), ('training.flags.seed', []), ('tasks.split', 'all'), ('tasks.count', 2.5), ('tasks.facts', None),
    ('setting.update_lr', 'x'), ('setting.headline_updates', 11), ('setting.headline_updates', -1), ('known_classes', 'a'),
    ('metric', 'speed'), ('figures', []), ('figures.0.mean', None), ('scores', []), ('scores.1', [1.0]), ('scores.1.0', '1'),
    ('scores.0.0', 10 ** 400)])
def test_a_field_of_another_type_is_named(path, value, tmp_path):
    store.write(str(tmp_path / 'results.json'), [an_entry(np.ones([3, 2]))])
    content = json.loads((tmp_path / 'results.json').read_text())
    *parents, last = [int(name) if name.isdigit() else name for name in path.split('.')]
    place = content['evaluations'][0]
    for name in parents:
        place = place[name]
    place[last] = value
    (tmp_path / 'results.json').write_text(json.dumps(content))
    sentence = error_of(f'--compare={tmp_path}')
    assert sentence.startswith(f'{tmp_path}/results.json cannot be read: ') and 'remove it and evaluate again' in sentence
    named = re.sub(r'\.(\d+)', r'[\1]', path)
    assert f'evaluations[0].{named}' in sentence or path.startswith(('scores', 'figures')), sentence


def test_a_field_that_is_missing_is_named(tmp_path):
    store.write(str(tmp_path / 'results.json'), [an_entry(np.ones([3, 2]))])
    for name in [field.name for field in dataclasses.fields(store.Entry) if field.default is dataclasses.MISSING]:
        content = json.loads((tmp_path / 'results.json').read_text())
        del content['evaluations'][0][name]
        (tmp_path / 'other.json').write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf'evaluations\[0\].{name} is missing'):
            store.read(str(tmp_path / 'other.json'))


def evaluation(path, method='MAML', user_label=None, scores=((1., 2.), (3., 5.)), setting=None, training=None, **more):
    return collect.RunEntry(path, user_label, an_entry(scores, setting=setting, training={'method': method, **(training or {})}, **more))


def test_labels_say_what_differs():
    def labels(*evaluations):
        return compare.what_differs(evaluations)
    assert labels(evaluation('a/run1'), evaluation('a/run2')) == ['run1', 'run2']
    assert labels(evaluation('/deep/a/run'), evaluation('a/run', checkpoint='model6')) == ['model5', 'model6']
    assert labels(evaluation('a/run1', 'oracle', baseline='oracle'), evaluation('a/run2', baseline=None)) == ['oracle', 'MAML']
    assert labels(evaluation('a/run1', num_updates=1), evaluation('a/run2', num_updates=5)) == ['num_updates=1', 'num_updates=5']
    assert labels(evaluation('a'), evaluation('b', adapt_norm=False)) == ['a', 'b'], 'an evaluation older than a flag has its default'
    assert labels(evaluation('a', user_label='old'), evaluation('b', user_label='new', norm='None')) == ['old', 'new']
    assert labels(evaluation('a', user_label='m', seed=0), evaluation('b', user_label='m', seed=1)) == ['m, seed=0', 'm, seed=1']
    assert labels(evaluation('a', 'MAML++', 'MAML++', ensemble=[3, 2, 1, 4, 5]), evaluation('a', 'MAML++', 'MAML++')) == [
        'MAML++, ensemble of 5', 'MAML++'], 'neither the name nor the ensemble is said twice'
    assert labels(evaluation('a', num_filters=32), evaluation('b', 'ANIL', num_filters=32), evaluation('c', 'BOIL', num_filters=64)) == [
        'MAML', 'ANIL', 'BOIL, num_filters=64'], 'what is usual is not stated'
    assert labels(evaluation('a', norm='None', hidden='40,40'), evaluation('b', norm='batch_norm', network='f.py:f')) == [
        'network=None', 'network=f.py:f'], 'what a network of one\'s own does not have is not stated'
    assert labels(evaluation('a', num_updates=5), evaluation('b', num_updates=5, update_lr=0.2),
                  evaluation('c', 'BOIL', update_lr=0.5)) == ['MAML', 'MAML, update_lr=0.2', 'BOIL'], 'nor what the name of the method says'
    assert labels(evaluation('a', setting={'update_lr': 0.5}), evaluation('a')) == ['evaluation update_lr=0.5', 'MAML']


def test_each_at_its_own_number_of_updates():
    """The paired test of methods that are meant at different numbers of updates."""
    scores = np.random.default_rng(0).normal(size=[2, 9, 4])
    pair = [evaluation('a', num_updates=1, scores=scores[0].tolist()), evaluation('b', num_updates=3, scores=scores[1].tolist())]
    title, values = list(compare.Comparison(pair).rows.items())[-1]
    assert title == 'own'
    np.testing.assert_array_equal(values, [scores[0, :, 1], scores[1, :, 3]])
    text = render.as_text(compare.update_table(compare.Comparison(pair)))
    p = stats.ttest_rel(scores[1, :, 3], scores[0, :, 1]).pvalue
    assert f'{p:.2g}' in text.splitlines()[-3] and '(own: each at its own number of updates, A 1, B 3)' in text
    alike = compare.Comparison([evaluation('a', num_updates=1), evaluation('b', num_updates=1)])
    assert list(alike.rows) == ['0', '1']


def test_p_values_are_corrected_for_their_number():
    """Holm's steps by hand, nan not counted; in tables only where there are several; what was done is said."""
    np.testing.assert_allclose(statistics.holm(np.array([[0.01, 0.04, np.nan], [0.03, 0.005, 0.9]])),
                               [[0.04, 0.09, np.nan], [0.09, 0.025, 0.9]])
    scores = np.random.default_rng(0).normal(size=[3, 20, 3]) + np.arange(3)[:, None, None]
    runs = [evaluation(name, num_filters=number, scores=scores[number].tolist()) for number, name in enumerate('abc')]
    table = compare.update_table(compare.Comparison(runs))
    assert table.columns[4:] == ['B - A', 'p', 'Holm', 'C - A', 'p', 'Holm'] and table.notes == [
        "p: a paired t-test; Holm: corrected for the table's 6 tests"]
    tests = [float(row[column]) for row in table.rows for column in (5, 8)]
    corrected = [float(row[column]) for row in table.rows for column in (6, 9)]
    np.testing.assert_allclose(corrected, statistics.holm(np.array(tests)), rtol=0.1)
    assert compare.headline_table(compare.Comparison(runs[:2])).columns[-1] == 'p'
    assert compare.headline_table(compare.Comparison(runs)).columns[-1] == 'Holm'


def test_a_signed_rank_test_where_differences_are_far_from_normal():
    rng = np.random.default_rng(0)
    base, normal, heavy = rng.normal(size=50), rng.normal(size=50), rng.standard_cauchy(size=50)
    assert statistics.paired_test(base + normal, base) == (stats.ttest_rel(base + normal, base).pvalue, False)
    assert statistics.paired_test(heavy, np.zeros(50)) == (stats.wilcoxon(heavy, zero_method='pratt').pvalue, True)
    tied = np.float32([0.8, 0.2, 0.6, 0.4, 0.4] * 20 + [9.0, -9.0, 8.0])  # the differences are 0.2, but for rounding
    others = np.float32([0.6, 0.4, 0.4, 0.2, 0.4] * 20 + [0.0, 0.0, 0.0])
    exact = np.array([0.2, -0.2, 0.2, 0.2, 0.0] * 20 + [9.0, -9.0, 8.0])
    p, is_signed_rank = statistics.paired_test(tied.astype(float), others.astype(float))
    assert is_signed_rank and p == stats.wilcoxon(exact, zero_method='pratt').pvalue
    lower, far = 0.7 * np.abs(base), np.abs(base).copy()
    lower[0] = far[0] = 1e9  # a task on which one of both nearly diverged
    far[0] = 1
    assert statistics.paired_test(lower, far)[0] < 1e-6, 'the sizes of the other differences still count'
    assert statistics.paired_test(base, base) == (1.0, False) and np.isnan(statistics.paired_test(np.full(50, np.inf), base)[0])
    pair = [evaluation('a', scores=np.zeros([50, 2]).tolist()),
            evaluation('b', num_filters=3, scores=np.stack([normal, heavy], axis=1).tolist())]
    table = compare.update_table(compare.Comparison(pair))
    assert [row[4].endswith('*') for row in table.rows] == [False, True] and 'with * a signed-rank test' in table.notes[-1]


def test_runs_that_differ_by_seed_only_are_averaged():
    scores = np.random.default_rng(0).normal(size=[4, 9, 2])
    runs = [evaluation(f'run{seed}', seed=seed, scores=one.tolist()) for seed, one in enumerate(scores[:3])]
    averaged = compare.Comparison([*runs, evaluation('other', seed=0, num_updates=5, scores=scores[3].tolist())])
    together, = averaged.groups
    assert together.indices == (0, 1, 2)
    means = scores[:3, :, 1].mean(axis=1)
    assert averaged.figures([together], [averaged.rows['1']])[0][0][:2] == pytest.approx((means.mean(), means.std(ddof=1)))
    text = render.as_text(compare.update_table(averaged))
    assert 'ABC over seeds' in text and f'{means.mean():.4f} ({means.std(ddof=1):.4f})' in text
    assert r'MAML, num\_updates=1 & $3$ & $1$ &' in render.as_latex(compare.method_table(averaged))


def test_seeds_at_other_numbers_of_updates_are_not_averaged():
    """One was evaluated with --test_updates, at which it is then reported; a sweep shows the number."""
    scores = np.random.default_rng(0).normal(size=[4, 9, 4]).tolist()
    runs = [evaluation(f'run{seed}', seed=seed, scores=one, setting={'headline_updates': 1 + 2 * (seed == 0)})
            for seed, one in enumerate(scores[:3])]
    group, = compare.Comparison(runs).groups
    assert group.indices == (1, 2)
    swept = [evaluation(f'{lr}{seed}', seed=seed, scores=one, update_lr=lr, setting={'headline_updates': 1 + 2 * (seed == 0)})
             for (lr, seed), one in zip(itertools.product([0.1, 0.2], [0, 1]), scores)]
    assert sorted(compare.sweep_of(compare.Comparison(swept), 'update_lr')) == ['updates=1', 'updates=3']


@pytest.mark.parametrize('text, formula', [
    ('1.83+', '$1.83^+$'), ('1.6e-79*', r'$1.6 \times 10^{-79}{}^*$'), ('57.40 ± 1.83*+', r'$57.40 \pm 1.83^{*+}$'),
    ('1e+05', r'$1 \times 10^{5}$'), ('-', '-'), ('inf', r'$\infty$')])
def test_numbers_in_latex(text, formula):
    """TeX refuses x^{a}^b."""
    assert render._formula(text) == formula


def test_runs_of_different_names_are_not_averaged():
    """Of one name, a seed twice is no group either."""
    scores = np.random.default_rng(0).normal(size=[4, 9, 2]).tolist()
    names = [('old', 1), ('old', 2), ('new', 1), ('new', 2)]
    runs = [evaluation(f'{name}{seed}', user_label=name, seed=seed, scores=one) for (name, seed), one in zip(names, scores)]
    old, new = compare.Comparison(runs).groups
    assert (old.label, old.indices, new.label, new.indices) == ('old', (0, 1), 'new', (2, 3))
    curves, _ = compare.curves_of(compare.Comparison(runs))
    assert [*curves] == ['AB: old, 2 seeds', 'CD: new, 2 seeds']


def test_methods_are_compared_over_tasks_and_seeds():
    """The difference is paired by task and seed; seeds of one method only do not count."""
    rng = np.random.default_rng(0)
    hard = rng.normal(size=50)  # tasks
    scores = {(method, seed): np.stack([hard, hard + (method == 'ANIL') + rng.normal(size=50) / 10], axis=1)
              for method, seed in [('MAML', 0), ('MAML', 1), ('MAML', 2), ('ANIL', 1), ('ANIL', 2), ('ANIL', 3)]}
    runs = [evaluation(f'{method}{seed}', method, seed=seed, scores=values) for (method, seed), values in scores.items()]
    comparison = compare.Comparison(runs)
    (_, *first), (label, seeds, updates, mean, difference, p) = compare.method_table(comparison).rows
    assert compare.method_table(comparison).notes[-1] == 'ANIL: the difference is over the 2 seeds that both have'
    assert first[3:] == ['', ''] and (label, seeds, updates) == ('ANIL', 3, 1)
    pairs = np.stack([scores['ANIL', seed][:, 1] - scores['MAML', seed][:, 1] for seed in (1, 2)])
    half = np.hypot(stats.t.ppf(0.975, 1) * pairs.mean(axis=1).std(ddof=1) / 2 ** 0.5,
                    stats.t.ppf(0.975, 49) * pairs.mean(axis=0).std(ddof=1) / 50 ** 0.5)
    assert difference == f'{pairs.mean():.4f} ± {half:.4f}' and float(p) < 0.05 and float(mean.split(' ± ')[1]) > half
    rows = list(csv.DictReader(render.as_csv(compare.records([comparison])).splitlines()))
    row, = (row for row in rows if row['label'] == 'ANIL, over seeds' and row['updates'] == '1')
    assert float(row['difference']) == pytest.approx(pairs.mean()) and float(row['difference_ci95']) == pytest.approx(half)
    assert [line.split(' & ')[0] for line in render.as_latex(compare.method_table(comparison)).splitlines() if ' & ' in line] == [
        'method', 'MAML', 'ANIL']
    curves, _ = compare.curves_of(comparison)
    assert [values.shape for values in curves.values()] == [(3, 50, 2), (3, 50, 2)], 'a line for each method'


def test_intervals_cover_tasks_and_seeds():
    """Of 95% intervals for a mean, 95% or more hold it, and the p-value says the same; values without a difference have none."""
    rng = np.random.default_rng(1)
    for seeds, of_seeds, of_tasks, of_both in (2, 1, 1, 1), (4, 3, 0.5, 1), (4, 0.1, 3, 1), (5, 1, 1, 1):
        values = (of_seeds * rng.normal(size=(4000, seeds, 1)) + of_tasks * rng.normal(size=(4000, 1, 30))
                  + of_both * rng.normal(size=(4000, seeds, 30)))
        mean, half, p = statistics.over_tasks_and_seeds(values.transpose(1, 2, 0))
        assert 0.94 < (np.abs(mean) <= half).mean() < 0.998
        np.testing.assert_array_equal(np.abs(mean) <= half, p >= 0.05)
    mean, half, p = statistics.over_tasks_and_seeds(np.zeros((2, 3, 1)))
    assert (mean, half) == (0, 0) and p == pytest.approx(1)


def test_seeds_of_runs_that_differ_in_more_are_not_averaged(tmp_path):
    scores = np.random.default_rng(0).normal(size=[2, 9, 2]).tolist()
    runs = [evaluation(f'run{seed}', seed=seed, scores=one, training={'pretrain_iterations': seed}) for seed, one in enumerate(scores)]
    assert compare.Comparison(runs).groups == []
    assert compare.what_differs(runs) == ['seed=0, pretrain_iterations=0', 'seed=1, pretrain_iterations=1']
    alike = [evaluation(f'run{seed}', seed=seed, scores=one) for seed, one in enumerate(scores)]
    rows = list(csv.DictReader(render.as_csv(compare.records([compare.Comparison(alike)])).splitlines()))
    together, = (row for row in rows if row['run'] == 'AB' and row['updates'] == '1')
    assert together['seed'] == '0 1' and float(together['mean']) == pytest.approx(np.mean(scores, axis=(0, 1))[1])


@pytest.mark.filterwarnings('error')
def test_nothing_is_warned_of_where_all_runs_diverged(tmp_path):
    bad = [[1., np.inf, np.nan, 1e300]] * 5
    runs = [evaluation(f'run{seed}', seed=seed, scores=bad) for seed in range(3)]
    together = compare.Comparison(runs)
    for text in (render.as_text(compare.update_table(together)), render.as_csv(compare.records([together])),
                 render.as_latex(compare.headline_table(together))):
        assert 'inf' in text
    plots.save(plots.curves({'a': np.array(bad), 'b': np.ones((5, 4))}, 'loss', 'heading'), str(tmp_path / 'a.png'))


def test_runs_behind_links_are_compared_once(tmp_path):
    (tmp_path / 'there' / 'run').mkdir(parents=True)
    (tmp_path / 'there' / 'run' / 'results.json').touch()
    (tmp_path / 'here').mkdir()
    (tmp_path / 'here' / 'link').symlink_to(tmp_path / 'there')
    (tmp_path / 'there' / 'circle').symlink_to(tmp_path / 'here')
    assert collect.result_directories(str(tmp_path / 'here')) == [str(tmp_path / 'here' / 'link' / 'run')]


def test_results_nested_too_deeply_are_refused(tmp_path):
    """Just deeply enough to be read, but not to be shown in a message, too."""
    path = tmp_path / 'results.json'
    store.write(str(path), [an_entry([[1, 2.0]])])
    for depth in range(900, 1000):
        content = json.loads(path.read_text())
        content['evaluations'][0]['figures'][0]['mean'] = 'here'
        (tmp_path / 'nested.json').write_text(json.dumps(content).replace('"here"', '[' * depth + ']' * depth))
        with pytest.raises(UserError, match='cannot be read'):
            store.read(str(tmp_path / 'nested.json'))


def test_evaluations_of_one_checkpoint_have_a_row_each(tmp_path):
    """--across keeps what differs in the last layer, or in the orders of the labels, apart."""
    settings = [{}, {'head': 'nearest class mean'}, {'head': 'nearest neighbour'}, {'permutations': 3, 'orders': 'mean'},
                {'permutations': 3, 'orders': 'averaged'}]
    store.write(str(tmp_path / 'results.json'), [an_entry([[number, 2.0], [number, 3.0]], setting=setting)
                                                 for number, setting in enumerate(settings)])
    table = run_ok(f'--across={tmp_path}')
    for detail in 'nearest class mean', 'nearest neighbour', 'mean over 3 orders', 'averaged over 3 orders':
        assert f'MAML, {detail}' in table, table
    assert len(list(csv.DictReader(run_ok(f'--across={tmp_path}', '--format=csv').splitlines()))) == 5


def test_some_checkpoints_of_each_run(tmp_path):
    """--checkpoints leaves out the others."""
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        store.write(str(tmp_path / str(seed) / 'results.json'), [
            an_entry([[1, 2.0], [2, 3.0]], checkpoint=f'model{iterations}', iterations=iterations, is_best=iterations == 4 + seed,
                     seed=seed)
            for iterations in (4, 5, 6)])

    def shown(*flags):
        rows = csv.DictReader(run_ok(f'--compare={tmp_path}', '--format=csv', *flags).splitlines())
        return [os.path.relpath(row['path'], tmp_path) for row in rows if row['updates'] == '1' and row['path']]

    assert len(shown()) == len(shown('--checkpoints=all')) == 6
    assert shown('--checkpoints=newest') == ['0/model6', '1/model6'] and shown('--checkpoints=best') == ['0/model4', '1/model5']
    assert 'best checkpoint of each seed' in run_ok(f'--compare={tmp_path}', '--checkpoints=best')
    assert run_ok(f'--across={tmp_path}', '--checkpoints=newest').count('MAML, ') == 2
    assert '--checkpoints is for --compare and --across' in error_of('--checkpoints=best')
    only_together = [an_entry([[1, 2.0], [2, 3.0]], checkpoint='model3', iterations=3, ensemble=[3, newest], is_best=True,
                              training={'newest': newest}) for newest in (4, 8)]
    foreign = an_entry([[1, 2.0], [2, 3.0]], checkpoint='model99', iterations=99, setting={'load_from': '/elsewhere/model99'})
    store.write(str(tmp_path / '0' / 'results.json'), [*only_together, foreign])
    chosen = {which: collect.choose(collect.read_evaluations([str(tmp_path / '0')]), which)[0] for which in ('newest', 'best')}
    assert all([evaluation.entry.ensemble for evaluation in of_which] == [[3, 8]] for of_which in chosen.values()), 'the latest'
    store.write(str(tmp_path / '0' / 'results.json'), [an_entry([[1, 2.0], [2, 3.0]])])
    assert 'no such checkpoint was evaluated' in error_of(f'--compare={tmp_path / "0"}', '--checkpoints=best')


def test_runs_whose_best_checkpoint_was_not_evaluated_are_named(tmp_path, capsys):
    """The other seeds are not averaged without them: which of them are there is chance."""
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        store.write(str(tmp_path / str(seed) / 'results.json'), [an_entry([[1, 2.0], [2, 3.0]], is_best=seed < 2, seed=seed)])
    text = run_ok(f'--compare={tmp_path}', '--checkpoints=best')
    assert f'(--checkpoints=best) is in {tmp_path}/2, which is left out' in capsys.readouterr().err and 'over seeds' not in text
    assert 'over seeds' in run_ok('--compare', f'{tmp_path}/0', f'{tmp_path}/1', '--checkpoints=best')
    on_other_tasks = an_entry([[1, 2.0]], is_best=True, seed=2, tasks={'split': 'test'})
    store.write(f'{tmp_path}/2/results.json', [an_entry([[1, 2.0], [2, 3.0]], checkpoint='model6', iterations=6, seed=2), on_other_tasks])
    assert 'over seeds' not in run_ok(f'--compare={tmp_path}', '--checkpoints=best')


def test_ensembles_are_averaged_only_if_all_seeds_have_one():
    """Another one of the seeds was evaluated, but at its newest checkpoint only."""
    runs = [evaluation(f'run{seed}', seed=seed, is_best=True, ensemble=[5, 3], training={'newest': 5}) for seed in range(2)]
    other = evaluation('run2', seed=2, training={'newest': 5})
    assert compare.seed_groups(runs) == [(0, 1)] and compare.seed_groups(runs, [other]) == compare.seed_groups([*runs, other]) == []


def test_all_evaluations_of_the_best_checkpoint_are_shown():
    """Also one that was made before the number of the newest checkpoint was recorded."""
    entries = [an_entry([[1, 2.0]], is_best=True, setting={'query_norm': norm}, training={'newest': newest})
               for norm, newest in (('batch', None), ('support', 8))]
    older = an_entry([[1, 2.0]], checkpoint='model3', iterations=3, is_best=True, training={'newest': 4})
    together = an_entry([[1, 2.0]], ensemble=[5, 3], is_best=True, training={'newest': 8})
    evaluations = [collect.RunEntry('a', None, entry) for entry in (together, *entries, older)]
    assert [evaluation.entry for evaluation in collect.choose(evaluations, 'best')[0]] == [*entries, together]


def test_data_that_are_described_alike():
    """What differs is said: where one's own data are, or their settings."""
    paths = [collect.RunEntry('a', None, dataclasses.replace(
        an_entry([[1, 2.0]], tasks={'datasource': 'table', 'data': number}), data_path=f'/data/{number}')) for number in (1, 2)]
    sizes = [evaluation('b', tasks={'facts': {'image_shape': [size, size, 3]}}) for size in (32, 84)]
    texts = [[*collect.descriptions(pair).values()] for pair in (paths, sizes)]
    ends = 'data /data/1 00000001', 'data /data/2 00000002', 'image_shape [32, 32, 3]', 'image_shape [84, 84, 3]'
    assert all(text.endswith(f', {end}') for text, end in zip([*texts[0], *texts[1]], ends)), texts
    assert [*collect.descriptions(sizes[:1]).values()] == [collect.describe_tasks(sizes[0].entry.tasks)]


def test_names_of_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert collect.split_name('mine=~/a') == ('mine', f'{tmp_path}/a') and collect.split_name('logs/lr=0.1/a') == (None, 'logs/lr=0.1/a')
    assert 'there is no folder mine=' in error_of('--compare', 'mine=', str(tmp_path))
    for name in 'a', 'b':
        (tmp_path / name).mkdir()
        store.write(str(tmp_path / name / 'results.json'), [an_entry([[1, 2.0], [2, 3.0]])])
    assert [evaluation.user_label for evaluation in collect.read_evaluations([str(tmp_path), f'mine={tmp_path}/b'])] == [None, 'mine']
    for name in 'a', 'b':
        (tmp_path / name / 'results.json').write_text('{')
    error = error_of(f'--compare={tmp_path}')
    assert f'{tmp_path}/a/results.json cannot be read' in error and f'{tmp_path}/b/results.json cannot be read' in error


def test_tables_of_other_programs(two_runs, capsys):
    short, long = two_runs
    rows = list(csv.DictReader(run_ok('--compare', f'brief={short}', f'long={long}', '--format=csv').splitlines()))
    entry, = results_of(long)
    row, = (row for row in rows if row['label'] == 'long' and row['updates'] == '5')
    assert float(row['mean']) == pytest.approx(np.mean(entry.scores, axis=0)[5]) and row['seed'] == '0'
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


@pytest.mark.slow
def test_evaluations_live_side_by_side(tmp_path, few_tasks):
    """An entry for each checkpoint and setting; the reference's files are of the last standard evaluation of the newest checkpoint."""
    flags = [*SINUSOID, f'--logdir={tmp_path}', '--save_interval=2']
    run_ok(*flags, '--metatrain_iterations=4')
    evaluate = [*flags, '--train=False', '--metatrain_iterations=4']
    for more in [], ['--test_set=True'], ['--test_iter=2'], ['--test_iter=4'], ['--test_seed=1'], ['--test_best'], ['--num_test_tasks=7']:
        run_ok(*evaluate, *more)
    directory = directory_of(tmp_path)
    entries = results_of(directory)
    assert [(entry.checkpoint, entry.tasks.split, entry.tasks.seed, entry.tasks.count) for entry in entries] == [
        ('model4', 'val', 0, 40), ('model4', 'test', 0, 40), ('model2', 'val', 0, 40), ('model4', 'val', 1, 40), ('model4', 'val', 0, 7)]
    assert sum(entry.is_best for entry in entries) in (1, 4), 'of one checkpoint'
    assert sorted(path.name for path in directory.glob('*_*')) == [
        'test_ubs10_stepsize0.001.csv', 'test_ubs10_stepsize0.001.pkl'], 'no other file but these'

    def reference_scores():
        with open(directory / 'test_ubs10_stepsize0.001.pkl', 'rb') as file:
            return pickle.load(file)['mses'].tolist()

    run_ok(*evaluate, '--test_set=True')
    assert reference_scores() == entries[1].scores
    run_ok(*evaluate)
    assert reference_scores() == entries[0].scores
    # Training goes on: the entry of what was the newest stays, the files are those of the new one.
    run_ok(*flags, '--metatrain_iterations=6')
    run_ok(*flags, '--metatrain_iterations=6', '--train=False')
    *earlier, last = results_of(directory)
    assert [entry.scores for entry in earlier] == [entry.scores for entry in entries]
    assert last.checkpoint == 'model6' and reference_scores() == last.scores
    assert 'C - A' in run_ok(f'--compare={directory}')


def test_other_images_do_not_overwrite_results(tmp_path, small_omniglot):
    flags = ['--datasource=omniglot', *IMAGES, f'--logdir={tmp_path}', '--num_test_tasks=3']
    run_ok(*flags, f'--data_path={small_omniglot}')
    shutil.copytree(small_omniglot, tmp_path / 'other', ignore=shutil.ignore_patterns('.cache', '00.png'))
    for path in small_omniglot, tmp_path / 'other':
        run_ok(*flags, f'--data_path={path}', '--train=False')
    first, second = results_of(next(tmp_path.glob('cls*')))
    assert first.tasks.data != second.tasks.data


def test_evaluations_of_a_shipped_run_change_no_file_that_ships(tmp_path):
    """They are compared with what shipped, which they replace where checkpoint and setting are the same."""
    name = 'sine/cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm'
    run = tmp_path / 'run'
    shutil.copytree(os.path.join(ROOT, 'logs', name), run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert 'meta-test, 600 tasks' in run_ok(f'--run={run}', '--train=False', '--test_set=True')
    run_ok(f'--run={run}', '--train=False', '--test_set=True', '--test_iter=68000', '--test_updates=2')
    assert {name: (run / name).read_bytes() for name in before} == before
    shipped, own = store.read(str(run / 'shipped_results.json')), results_of(run)
    assert [entry.checkpoint for entry in own] == ['model70000', 'model68000']
    both = store.entries_of(str(run))
    assert [entry.key for entry in both] == [*(entry.key for entry in shipped), own[1].key] and both[0] == own[0]
    table = run_ok(f'--compare={run}')
    assert 'C - A' in table and 'D - A' not in table and table.count('model68000  (') == 2
    ignored = subprocess.run(['git', 'check-ignore', *(f'logs/{name}/{new.name}' for new in run.iterdir() if new.name not in before)],
                             cwd=ROOT, capture_output=True, text=True, check=False)
    if os.path.exists(os.path.join(ROOT, '.git')):
        assert len(ignored.stdout.splitlines()) == len(list(run.iterdir())) - len(before) >= 3


@pytest.mark.slow
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


def test_no_two_flags_name_a_directory_alike():
    defaults = {name: FLAGS[name].default for name in LEARNING}
    others = [(name, value) for name in LEARNING for value in getattr(FLAGS[name].parser, 'enum_values', []) if value != defaults[name]]
    names = [labels({**defaults, name: value}) for name, value in others if name != 'datasource']  # whose experiments share a directory
    assert len(names) > 15 and len(names) == len(set(names))


def test_numbers_of_runs_that_diverged():
    huge = np.array([[1., 1e18], [2., np.inf], [3., np.nan]])
    pair = compare.Comparison([evaluation('a', scores=huge), evaluation('b', scores=np.ones([3, 2]))])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        text = render.as_text(compare.update_table(pair))
    assert '1000000000000' not in text and max(map(len, text.splitlines())) < 120
    assert statistics.plus_minus(0.0000213, 0.0000018, 4) == '0.0000213 ± 0.0000018'
    assert statistics.plus_minus(99.5, 0.12, 2) == '99.50 ± 0.12'
    assert statistics.plus_minus(2e-12, 3e-13, 4) == '2.00e-12 ± 3.00e-13' and statistics.plus_minus(0.5, 1e-17, 4) == '0.5000 ± 0.0000'
    assert statistics.number(451142711936811008.0, 4) == '4.51e+17' and statistics.number(3.25, 4) == '3.2500'


def test_a_difference_that_is_none():
    assert statistics.paired_test(np.arange(3.), np.arange(3.)) == (1, False)
    assert statistics.bootstrap(np.ones([1, 2])).tolist() == [[1, 1], [1, 1]]


def test_differences_by_rounding_alone_are_none():
    """Nor is there a test without a spread, or an interval of one task."""
    scores = np.random.default_rng(0).uniform(1, 2, 20)
    rounded = scores.astype(np.float32) * (1 + np.float32(1.2e-7))
    assert statistics.paired_test(rounded, scores)[0] == 1 and not statistics.difference(rounded, scores).any()
    assert np.isnan(statistics.paired_test(scores + 0.5, scores)[0]) and statistics.paired_test(scores * 1.01, scores)[0] < 1e-9
    mean, _, half = statistics.statistics(np.array([[0.25, 0.5]]))
    assert mean.tolist() == [0.25, 0.5] and np.isnan(half).all() and statistics.figure(0.25, half[0], 'accuracy') == '25.00'
    assert statistics.figure(np.nan, np.nan, 'loss') == 'nan ± nan'
    assert re.findall(r'\d\.\d+', store.table({'x': np.array([[0.25, 0.5]])}, 'loss')) == ['0.2500', '0.5000']


def test_statistics_do_not_depend_on_the_order_in_memory():
    values = np.random.default_rng(0).uniform(size=(601, 11)).astype(np.float32)
    for one, other in zip(statistics.statistics(values), statistics.statistics(np.asfortranarray(values))):
        assert one.dtype == np.float64 and one.tolist() == other.tolist()


def test_csv_has_no_noise():
    table = render.Table('', ['a', 'b'], [['x', 100 * float(np.mean(np.float32([0.6, 0.8, 0.4, 0.87])))]])
    assert render.as_csv(table).splitlines()[1] == 'x,66.75'


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
    assert [os.path.basename(path) for path in drawn] == [f'evaluation_val_model2000_50tasks_{what}.png' for what in ('updates', 'tasks')]
    assert all(min(size_of(path)) > 300 for path in drawn)
    os.mkdir(drawn[0] + 'x')
    os.remove(drawn[0])
    os.rename(drawn[0] + 'x', drawn[0])
    assert 'cannot be written' in error_of(*flags)


def test_pictures_of_another_evaluation_have_another_name(two_runs):
    logdir = two_runs[1].parent
    output = run_ok(*SINUSOID, f'--logdir={logdir}', '--metatrain_iterations=2000', '--train=False', '--num_test_tasks=5', '--plot',
                    '--test_seed=3', '--update_batch_size=4', '--train_update_batch_size=10', '--test_updates=3', '--test_query=7',
                    '--update_lr=0.5', '--train_update_lr=0.001')
    assert 'evaluation_val_model2000_3updates_7query_updatelr0.5_5tasks_4shot_seed3_updates.png' in output
    output = run_ok(*SINUSOID, f'--logdir={logdir.parent}/other', '--train=False', '--num_test_tasks=5', '--plot',
                    f'--load_from={two_runs[1]}/model2000')
    assert re.search(f'evaluation_val_model2000_of_{two_runs[1].name}_[0-9a-f]{{8}}_5tasks_updates.png', output)


@pytest.mark.slow
def test_pictures_of_images(small_data, tmp_path):
    flags = ['--datasource=folder', *IMAGES, '--image_size=20', '--num_classes=3', f'--data_path={small_data["folder"]}',
             f'--logdir={tmp_path}']
    run_ok(*flags)
    run_ok(*flags, '--train=False', '--num_test_tasks=5', '--plot')
    sheet, = directory_of(tmp_path).glob('evaluation_val_*_tasks.png')
    assert min(size_of(sheet)) > 300


def sweep(tmp_path, *runs):
    """Writes the results of runs, (method, seed, update_lr, further flags)."""
    rng = np.random.default_rng(0)
    for number, (method, seed, update_lr, flags) in enumerate(runs):
        (tmp_path / str(number)).mkdir()
        store.write(str(tmp_path / str(number) / 'results.json'), [
            an_entry(rng.uniform(size=(9, 3)), metric='accuracy', training={'method': method}, seed=seed, update_lr=update_lr, **flags)])
    return tmp_path


def test_a_sweep_is_drawn_against_its_flag(tmp_path, monkeypatch):
    """A line for each method; several seeds are one point."""
    runs = [('MAML', seed, rate, {}) for seed in (0, 1) for rate in (0.001, 0.01, 0.1)]
    folder = sweep(tmp_path, *runs, ('ANIL', 0, 0.01, {'inner_weights': 'head'}), ('ANIL', 0, 0.1, {'inner_weights': 'head'}))
    drawn = []
    draw = plots.sweep
    monkeypatch.setattr(plots, 'sweep', lambda *arguments: drawn.append((draw(*arguments), *arguments)) or drawn[-1][0])
    assert 'Drawn: ' in run_ok('--compare', str(folder), '--plot', '--against=update_lr')
    (figure, lines, flag, metric, _), = drawn
    assert {label: {value: values.shape for value, values in line.items()} for label, line in lines.items()} == {
        'MAML': dict.fromkeys((0.001, 0.01, 0.1), (2, 9)), 'ANIL': dict.fromkeys((0.01, 0.1), (1, 9))}
    axes, = figure.axes
    assert (flag, metric, axes.get_xlabel(), axes.get_xscale()) == ('update_lr', 'accuracy', '--update_lr', 'log')
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['MAML, 2 seeds', 'ANIL']
    for flags, words in ((['--plot', '--against=num_updates'], 'do not differ in it'),
                         (['--against=update_lr'], 'is for --compare with --plot'),
                         (['--plot', '--against=logdir'], 'is no flag of a training')):
        assert words in error_of('--compare', str(folder), *flags)
    twice = [evaluation('run', update_lr=rate, checkpoint=checkpoint)
             for rate, checkpoint in ((0.1, 'model5'), (0.1, 'model6'), (0.2, 'model6'))]
    with pytest.raises(UserError, match='add --checkpoints=newest'):
        compare.sweep_of(compare.Comparison(twice), 'update_lr')


def test_a_sweep_of_a_switch_keeps_the_name_of_the_method():
    runs = [evaluation(f'run{number}', 'MAML' + f' with inner_batch={number}' * bool(number), inner_batch=number) for number in (0, 2, 4)]
    assert list(compare.sweep_of(compare.Comparison(runs), 'inner_batch')) == ['MAML']
    assert list(compare.sweep_of(compare.Comparison(runs), 'inner_batch')['MAML']) == [0, 2, 4]


def test_curves_can_be_told_apart():
    """More than five, and the mark at 0 is explained where there is one."""
    assert len({tuple(style.values()) for style in plots.STYLES}) == len(plots.STYLES) == 84
    marked = plots.curves({'a': np.array([[1., 1.1], [1.2, 1.3]])}, 'loss', 'x')
    unmarked = plots.curves({str(index): np.array([[0.1, 0.7], [0.1, 0.8]]) for index in range(7)}, 'accuracy', 'x')
    assert [('the mark at 0' in figure.axes[0].get_xlabel()) for figure in (marked, unmarked)] == [True, False]
    returns = plots.curves({'oracle': np.array([[-0.5], [-0.6]])}, 'return', 'x', ['oracle']).axes[0]
    (x,), (low, high) = returns.lines[0].get_xdata(), returns.get_xlim()
    assert x == 0 and low < x < high, 'a return without an update is at 0'


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
    (tmp_path / 'file').touch()
    with pytest.raises(OSError):
        store.add(str(tmp_path / 'file'), an_entry(np.ones([3, 2])))
    with pytest.raises(UserError, match='there is no results.json'):
        compare.compare([str(tmp_path)])

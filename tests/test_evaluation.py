"""Questions asked of a trained model: with whose statistics, on other ways and shots; and the answers in TensorBoard."""
import dataclasses
import glob
import os

import numpy as np
import pytest
import tensorflow as tf

from conftest import error_of, results_of, run_ok
from data_generator import TaskBatch
from maml import MAML, ModelConfig

CONV = ModelConfig(dim_input=12 * 12, dim_output=3, loss='xent', update_batch_size=2, update_lr=0.3, image_shape=(12, 12, 1),
                   num_filters=4, head='mean', engine='map')
DENSE = dataclasses.replace(CONV, image_shape=None, dim_hidden=(8, 8), engine='vmap')
POOLED = dataclasses.replace(CONV, image_shape=(16, 16, 1), dim_input=16 * 16, max_pool=True, head='flatten')


def noise(config, query_rows=7, tasks=2):
    rng = np.random.default_rng(0)
    rows = config.dim_output * config.update_batch_size
    labels = np.tile(np.eye(config.dim_output, dtype=np.float32), (tasks, config.update_batch_size, 1))
    return TaskBatch(rng.random((tasks, rows, config.dim_input), np.float32), labels,
                     rng.random((tasks, query_rows, config.dim_input), np.float32),
                     np.repeat(labels[:, :1], query_rows, axis=1))


@pytest.mark.slow
@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('config', [CONV, POOLED, DENSE], ids=['conv', 'pooled', 'dense'])
def test_support_statistics(config):
    """Each query row is answered by itself, and as the support row that it may be; under 'batch' that is not so."""
    transductive = MAML(config, seed=1)
    model, batch = transductive.variant(query_norm='support'), noise(config)
    together = model.predict(batch, 2).post.numpy()

    def only(row):
        return batch._replace(query_x=batch.query_x[:, [row]], query_y=batch.query_y[:, [row]])

    alone = np.concatenate([model.predict(only(row), 2).post for row in range(7)], axis=2)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together - transductive.predict(batch, 2).post).max() > 1e-2

    again = batch._replace(query_x=batch.support_x, query_y=batch.support_y)
    np.testing.assert_allclose(model.predict(again, 0).post[0], model.predict(again, 1).pre, atol=1e-5)
    first = again._replace(query_x=again.query_x[:, :2], query_y=again.query_y[:, :2])
    np.testing.assert_allclose(model.predict(first, 2).post, model.predict(again, 2).post[:, :, :2], atol=1e-5)
    # With the very rows of the support, both ways agree.
    np.testing.assert_allclose(model.predict(again, 2).post, transductive.predict(again, 2).post, atol=1e-4)


def test_fewer_outputs():
    """The first outputs of the network, and the same features."""
    model = MAML(CONV, seed=1)
    few = model.variant(dim_output=2)
    batch = noise(dataclasses.replace(CONV, dim_output=2))
    wide = batch._replace(query_y=np.pad(batch.query_y, [(0, 0), (0, 0), (0, 1)]))
    np.testing.assert_allclose(few.predict(batch, 0).post, model.predict(wide, 0).post[..., :2], atol=1e-6)
    assert few.predict(batch, 1).post.shape == (1, 2, 7, 2)


FLAGS = ['--datasource=omniglot', '--update_batch_size=1', '--conv=False', '--hidden=4', '--engine=map', '--meta_batch_size=2',
         '--update_lr=0.4', '--metatrain_iterations=2', '--num_test_tasks=10']


@pytest.fixture(scope='module')
def trained(small_omniglot, tmp_path_factory):
    """Flags of a trained 5-way Omniglot network, and its directory."""
    logdir = tmp_path_factory.mktemp('trained')
    flags = [*FLAGS, f'--data_path={small_omniglot}', f'--logdir={logdir}']
    run_ok(*flags)
    directory, = logdir.iterdir()
    return flags, directory


@pytest.mark.slow
def test_both_norms_in_one_table(trained):
    flags, directory = trained
    output = run_ok(*flags, '--train=False', '--query_norm=both', '--plot')
    assert output.count('_updates.png') == 1
    row, = (line.split() for line in output.splitlines() if line.split()[:1] == ['10'])
    entries = results_of(directory)
    assert [entry.setting.query_norm for entry in entries] == ['batch', 'support']
    expected = [100 * entry.figures[10].mean for entry in entries]
    assert [float(row[1]), float(row[4])] == pytest.approx(expected, abs=0.01)
    assert row[1] != row[4]
    usual = run_ok(*flags, '--train=False')
    assert row[1] == [line.split() for line in usual.splitlines() if line.split()[:1] == ['10']][0][1]
    assert [entry.setting for entry in results_of(directory)] == [entry.setting for entry in entries]
    assert 'B - A' in run_ok('--compare', str(directory))


def test_other_ways_and_shots(trained):
    flags, directory = trained
    evaluation = [f'--run={directory}', '--train=False', '--num_test_tasks=10']
    output = run_ok(*evaluation, '--num_classes=3')
    assert '3-way 1-shot omniglot' in output
    # Both columns of figures are those of 3 classes: a third, about, before adaptation.
    entry = results_of(directory)[-1]
    assert entry.tasks.num_classes == 3
    hits = np.array(entry.scores) * 3
    np.testing.assert_allclose(hits, np.round(hits), atol=1e-5)
    output = run_ok(*evaluation, '--num_classes=2', '--update_batch_size=2', '--load_from', str(directory / 'model2'))
    assert '2-way 2-shot omniglot' in output
    entry = results_of(directory)[-1]
    assert entry.setting.load_from == str(directory / 'model2') and (entry.tasks.num_classes, entry.tasks.update_batch_size) == (2, 2)
    assert not list(directory.glob('test_*.csv')), 'not what the reference evaluates'


@pytest.mark.parametrize('more, words', [
    (['--train=False', '--num_classes=3'], ['there is no checkpoint', '--run=DIR']),
    (['--train=False', '--norm=layer_norm', '--query_norm=both'], ['--query_norm is for batch norm', 'layer_norm']),
    (['--train=False', '--support_dir=x'], ['--support_dir is for --predict']),
])
def test_what_the_network_does_not_allow(trained, more, words):
    flags, _ = trained
    error = error_of(*flags, *more)
    assert all(word in error for word in words), error


def test_more_classes_than_outputs(trained):
    flags, directory = trained
    data = next(flag for flag in flags if flag.startswith('--data_path'))
    assert 'trained with --num_classes=5 and has no more outputs' in error_of(
        f'--run={directory}', '--train=False', data, '--num_classes=6')
    assert '--num_classes=6 contradicts --num_classes=5' in error_of(f'--run={directory}', '--num_classes=6')


def seen(folder):
    """{tag: plugin} of a folder's summaries."""
    paths = glob.glob(os.path.join(glob.escape(str(folder)), 'events*'))
    return {value.tag: value.metadata.plugin_data.plugin_name for path in paths
            for event in tf.compat.v1.train.summary_iterator(path) for value in event.summary.value}


@pytest.mark.slow
@pytest.mark.parametrize('source', ['sinusoid', 'omniglot'])
def test_tensorboard_gets_pictures_and_hyper_parameters(source, small_data, tmp_path):
    data = [] if source == 'sinusoid' else [f'--data_path={small_data[source]}', '--conv=False', '--hidden=4']
    flags = [f'--datasource={source}', '--update_batch_size=1', '--meta_batch_size=2', '--num_test_tasks=5', '--plot',
             '--metatrain_iterations=2', '--engine=map', f'--logdir={tmp_path}', *data]
    run_ok(*flags)
    directory, = tmp_path.iterdir()
    tags = seen(directory)
    assert tags['_hparams_/session_start_info'] == 'hparams'
    assert tags['metaval_updates'] == tags['metaval_tasks'] == 'images'
    run_ok(*flags, '--train=False', '--test_set=True')
    tags = seen(directory / 'evaluation_test_model2_5tasks')
    assert tags['test_updates'] == tags['test_tasks'] == 'images' and tags['_hparams_/session_start_info'] == 'hparams'
    assert tags[f'test_Post-update {"loss" if source == "sinusoid" else "accuracy"}, step 10'] == 'scalars'

"""Last layers that are computed for each task: their fixtures, closed forms, any number of classes, and the program with them."""
import dataclasses
import itertools

import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from test_methods import Fixture, fixtures, relative

from conftest import error_of, fixture_files, results_of, run_ok, write_image_tree
from data_generator import SOURCES, TaskBatch
from maml import MAML, ModelConfig
from networks import classifier_outputs, initial_head, network_of
from runtime.cli import methods
from runtime.datasets.tasks import TaskConfig
from runtime.jobs import checkpoints
from runtime.jobs.ensemble import Permuted
from runtime.jobs.evaluate import load_weights
from runtime.jobs.learner import load
from runtime.system.errors import UserError
from utils import accuracy

FIXTURES = fixture_files('golden_heads', 'MAML_GOLDEN_HEADS')


def assert_agrees(name, dtype, tolerance, **changes):
    fixture = Fixture(FIXTURES[name])
    model, batch = fixture.model(dtype, **changes), fixture.batch(np.dtype(dtype))
    assert relative(model.meta_gradients(batch), fixture.group('metagrad')) < tolerance
    numbers = 0, fixture.updates
    losses = np.concatenate([model.evaluate(batch, updates).post_losses for updates in numbers])
    outputs = np.concatenate([model.predict(batch, updates).post for updates in numbers])
    np.testing.assert_allclose(losses, fixture.arrays['losses'], rtol=tolerance)
    np.testing.assert_allclose(outputs, fixture.arrays['outputs'], rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('name', fixtures(['protonet_conv', 'ridge_conv_1shot'], FIXTURES))
def test_fixtures_in_double_precision(name):
    assert_agrees(name, 'float64', 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize('name, engine', [
    ('ridge_conv_1shot', 'map'), ('unicorn_fc', 'vmap'), ('ridge_conv_5shot', 'vmap'), ('protomaml_conv', 'map')])
def test_fixtures_in_single_precision(name, engine):
    assert_agrees(name, 'float32', 1e-4, engine=engine)


# Closed forms ---------------------------------------------------------------------------------------------------------

DENSE = ModelConfig(dim_input=5, dim_output=3, loss='xent', update_batch_size=2, update_lr=0.1, num_updates=0, dim_hidden=(4,), norm='None',
                    dtype='float64', ridge_lambda=0.7, ridge_scale=3.0)


def random_batch(way=3, shots=2, inputs=5):
    rng = np.random.default_rng(0)
    y = np.tile(np.eye(way), (shots, 1))[None]
    return TaskBatch(rng.normal(size=(1, way * shots, inputs)), y, rng.normal(size=(1, way * shots, inputs)), y)


def random_model(config):
    """A model with random weights, but for the scalars of the ridge regression."""
    model, rng = MAML(config), np.random.default_rng(1)
    for name, variable in model.weights.items():
        if not name.startswith('head/'):
            variable.assign(rng.normal(size=variable.shape))
    return model


def features_of(model, x):
    return network_of(model.config).features(model.shared.weights | model.shared.norm_params, tf.constant(x)).numpy()


@pytest.mark.usefixtures('eager')
def test_prototypes_are_minus_squared_distances():
    """Up to a constant of the row: ProtoNet."""
    model, batch = random_model(dataclasses.replace(DENSE, head_init='prototypes')), random_batch()
    support, query = (features_of(model, x[0]) for x in (batch.support_x, batch.query_x))
    means = np.stack([support[label::3].mean(axis=0) for label in range(3)])
    distances = np.square(query[:, None] - means).sum(axis=-1)
    found = model.predict(batch, 0).post[0, 0].numpy() + distances
    np.testing.assert_allclose(found, np.broadcast_to(found[:, :1], found.shape), rtol=1e-12)
    assert model.weights.keys() == {'w1', 'b1'}


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('shots', [1, 5])
def test_ridge_regression_minimises_its_objective(shots):
    """At the solution the gradient of |Xw - Y|^2 / rows + lambda |w|^2 is 0, with fewer rows than columns and with more."""
    model, batch = random_model(dataclasses.replace(DENSE, head_init='ridge')), random_batch(shots=shots)
    x, y = np.pad(features_of(model, batch.support_x[0]), ((0, 0), (0, 1)), constant_values=1), batch.support_y[0]
    assert (len(x) <= x.shape[1]) == (shots == 1)
    model.weights['head/bias'].assign(0.2)
    head = initial_head(model.config, model.weights, tf.constant(x[:, :-1]), tf.constant(y))
    w = np.concatenate([head['w2'], head['b2'][None] - 0.2]) / 3
    np.testing.assert_allclose(x.T @ (x @ w - y) / len(x) + np.float32(0.7) * w, 0, atol=1e-12)


@pytest.mark.usefixtures('eager')
def test_a_ridge_regression_of_what_is_not_finite_is_not_finite():
    """TensorFlow would end the program: a training that diverges shall say so itself."""
    config, batch = dataclasses.replace(DENSE, head_init='ridge'), random_batch()
    model = random_model(config)
    model.weights['w1'].assign(np.full([5, 4], np.nan))
    assert np.isnan(model.evaluate(batch, 0).post_losses).all() and np.isnan(model.meta_gradients(batch)['head/scale'])


@pytest.mark.parametrize('head_init', ['prototypes', 'ridge'])
def test_one_graph_compiled_by_xla_is_one_task_at_a_time(head_init):
    batch = random_batch()
    found, alone = (random_model(dataclasses.replace(DENSE, head_init=head_init, engine=engine)).meta_gradients(batch)
                    for engine in ('vmap', 'map'))
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, alone[name], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures('eager')
def test_the_nearest_neighbour_is_that_of_a_search():
    """Of a model with another last layer, which it does not need; as ProtoNet's logits, of the nearest row instead of the mean."""
    trained, batch = random_model(DENSE), random_batch(way=4, shots=3)
    model = trained.variant(dim_output=4, head_init='neighbours')
    support, query = (features_of(trained, x[0]) for x in (batch.support_x, batch.query_x))
    distances = np.square(query[:, None] - support).sum(axis=-1)
    nearest = np.stack([distances[:, label::4].min(axis=1) for label in range(4)], axis=1)
    found = model.predict(batch, 0).post[0, 0].numpy() + nearest
    np.testing.assert_allclose(found, np.broadcast_to(found[:, :1], found.shape), rtol=1e-12)


HEADS = {'shared': dict(num_updates=2, learn_lr='weight'), 'prototypes': dict(num_updates=1, inner_weights='head', learn_lr='step'),
         'ridge': dict(num_updates=1, inner_weights='body')}


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('head_init', HEADS)
def test_any_number_of_classes(head_init):
    """More than trained with or fewer; and the order of the classes does not matter."""
    model = random_model(dataclasses.replace(DENSE, head_init=head_init, **HEADS[head_init]))
    for way in 2, 5:
        batch, order = random_batch(way), np.random.default_rng(0).permutation(way)
        permuted = batch._replace(support_y=batch.support_y[..., order], query_y=batch.query_y[..., order])
        found, other = (model.variant(dim_output=way).predict(each, 2).post for each in (batch, permuted))
        assert found.shape == (2, 1, 2 * way, way)
        np.testing.assert_allclose(other, found.numpy()[..., order], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures('eager')
def test_orders_of_labels():
    """All orders of three labels, one after the other; a shared column makes no difference between them."""
    batch, logits = random_batch(shots=4), []
    model = random_model(dataclasses.replace(DENSE, num_updates=1))
    for order in map(list, itertools.permutations(range(3))):
        permuted = batch._replace(support_y=batch.support_y[..., order], query_y=batch.query_y[..., order])
        logits.append(model.predict(permuted, 1).post[-1, 0].numpy()[:, np.argsort(order)])
    accuracies = np.mean(np.argmax(logits, axis=2) == np.argmax(batch.query_y[0], axis=1), axis=1)
    found = Permuted(model, 6).evaluate(batch, 1)
    np.testing.assert_allclose([found.mean[-1, 0], found.spread[-1, 0]], [np.mean(accuracies), np.std(accuracies)], rtol=1e-12)
    assert found.averaged[-1, 0] == np.mean(np.argmax(np.mean(logits, axis=0), axis=1) == np.argmax(batch.query_y[0], axis=1))
    shared = Permuted(random_model(dataclasses.replace(DENSE, num_updates=1, head_init='shared')), 6).evaluate(batch, 1)
    assert found.spread[-1, 0] > 0 and not shared.spread[1:].any()


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('logits', ['linear', 'cosine'])
def test_the_classifier_of_pre_training(logits):
    """Its loss is the mean cross-entropy over all classes, in which the last layer of tasks has no part."""
    config = dataclasses.replace(DENSE, num_updates=1, head_init='new', inner_weights='head', pretrain_classes=4, logits=logits,
                                 mean_loss=True)
    model, x, labels = random_model(config), np.random.default_rng(0).normal(size=(1, 7, 5)), np.eye(4)[[0, 1, 2, 3, 3, 1, 0]]
    assert model.weights.keys() == {'w1', 'b1', 'head/classifier/w2', 'head/classifier/b2'}
    features, matrix, bias = features_of(model, x[0]), *(model.weights[f'head/classifier/{name}'].numpy() for name in ('w2', 'b2'))
    outputs = features @ matrix + bias if logits == 'linear' else 2 * (features / np.linalg.norm(features, axis=1, keepdims=True)) @ (
        matrix / np.linalg.norm(matrix, axis=0))
    made = classifier_outputs(model.config, dict(model.weights), tf.constant(x[0]))
    np.testing.assert_allclose(made, outputs, rtol=1e-10)
    towards = (scipy.special.softmax(outputs, axis=1) - labels) / 7
    found = model.pretrain_gradients(TaskBatch(x, labels[None], x, labels[None]))
    np.testing.assert_allclose(found['head/classifier/b2'], towards.sum(axis=0) * (logits == 'linear'), atol=1e-12)
    if logits == 'linear':
        np.testing.assert_allclose(found['head/classifier/w2'], features.T @ towards, rtol=1e-10)
    assert np.any(found['w1']) and model.evaluate(random_batch(way=5), 2).post_losses.shape == (2, 1)


# The program ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def trained(small_data, tmp_path_factory):
    """The directories of a ProtoNet, trained with 8 classes of 6 in meta-validation, and of a MAML."""
    root = tmp_path_factory.mktemp('heads')
    flags = ['--datasource=cifarfs', f'--data_path={small_data["cifarfs"]}', '--update_batch_size=1', '--num_filters=4', '--max_pool',
             '--meta_batch_size=2', '--metatrain_iterations=2', '--update_lr=0.1', '--log=False', '--validation_tasks=10']
    output = run_ok(*flags, '--method=protonet', '--num_classes=6', f'--logdir={root / "protonet"}')
    assert 'so that validation is 5-way' in output
    run_ok(*flags, f'--logdir={root / "maml"}', '--stop_grad')
    return [next(path for path in (root / name).iterdir() if path.is_dir()) for name in ('protonet', 'maml')]


@pytest.mark.slow
def test_protonet_of_the_program(trained, tmp_path):
    """Trained with more classes than it is tested with; evaluated without inner updates and with some; compared with MAML."""
    protonet, maml = trained
    assert '.numstep0.' in protonet.name and protonet.name.endswith('batchnorm.prototypes.meanloss')
    evaluation = ['--train=False', '--num_test_tasks=3', '--num_classes=3', '--test_set=True']
    output = run_ok(f'--run={protonet}', *evaluation, '--plot')
    assert '\n  0 query  ' in output and '\n        1  ' not in output
    run_ok(f'--run={protonet}', *evaluation, '--test_updates=2')
    without, with_updates = results_of(protonet)
    assert without.training.method == 'ProtoNet' and (without.setting.test_updates, without.setting.headline_updates) == (0, 0)
    assert np.shape(without.scores) == (3, 2) and without.headline_column == 1 and np.shape(with_updates.scores) == (3, 3)
    run_ok(f'--run={maml}', *evaluation)
    run_ok(f'--run={maml}', *evaluation, '--test_updates=0')
    table = run_ok('--compare', str(protonet), str(maml), '--plot')
    assert 'own: each at its own number of updates' in table, table


@pytest.mark.slow
def test_the_nearest_of_the_program(trained):
    """Nearest class mean and nearest neighbour on the features of a MAML, of more classes than it has outputs too; beside its own
    results."""
    maml = trained[1]
    evaluation = [f'--run={maml}', '--train=False', '--num_test_tasks=5']
    output = run_ok(*evaluation, '--head=nearest', '--plot', '--num_classes=4')
    assert '--query_norm=batch, nearest class mean' in output and '--query_norm=batch, nearest neighbour' in output and '0 query' in output
    run_ok(*evaluation, '--num_classes=4')
    entries = {entry.setting.head: entry for entry in results_of(maml) if entry.tasks.num_classes == 4}
    assert set(entries) == {'own', 'nearest class mean', 'nearest neighbour'} and not list(maml.glob('test_*.csv'))
    one_shot = [entries[name].scores for name in ('nearest class mean', 'nearest neighbour')]
    assert one_shot[0] == one_shot[1] and np.shape(one_shot[0]) == (5, 2)  # of a single support example a class
    assert 'head=nearest neighbour' in run_ok('--compare', str(maml))
    assert 'averaged over orders' in run_ok(*evaluation, '--permutations=3', '--num_classes=3')
    mean, averaged = (entry for entry in results_of(maml) if entry.setting.permutations == 3)
    assert (mean.setting.orders, averaged.setting.orders) == ('mean', 'averaged') and averaged.figures[1].spread is None
    assert all(0 <= figures.spread < 1 for figures in mean.figures)
    assert 'labels=averaged over 3 orders' in run_ok('--compare', str(maml))
    assert '--permutations=7: the labels of --num_classes=3' in error_of(*evaluation, '--permutations=7', '--num_classes=3')
    assert '--head=nearest is without inner updates' in error_of(*evaluation, '--head=nearest', '--test_updates=3')
    assert '--head is for evaluation' in error_of(
        f'--run={maml}', '--predict', '--head=nearest', '--support_dir=a', '--query_dir=b')


@pytest.mark.slow
def test_a_prediction_of_more_classes_than_trained(trained, tmp_path):
    names = [f'class {number}' for number in range(8)]
    for seed, name in enumerate(('support', 'query')):
        write_image_tree(tmp_path / name, names, images=2, size=(32, 32, 3), seed=seed)
    predict = ['--predict', f'--support_dir={tmp_path / "support"}', f'--query_dir={tmp_path / "query"}']
    assert 'of 8 classes by 0 updates' in run_ok(f'--run={trained[0]}', *predict)
    assert 'holds 8 classes, and the network has 5 outputs' in error_of(f'--run={trained[1]}', *predict)
    predictor = load(trained[0]).adapt(np.zeros([9, 32, 32, 3], np.uint8), [*range(9)])
    assert predictor(np.zeros([2, 32, 32, 3], np.uint8)).shape == (2, 9)


@pytest.mark.slow
def test_a_pre_trained_classifier_of_the_program(tmp_path, small_data):
    """Trained on all classes, resumed to the bit, adapted by a new last layer; a meta-training starts from its body."""
    flags = ['--datasource=cifarfs', f'--data_path={small_data["cifarfs"]}', '--update_batch_size=1', '--num_filters=4', '--max_pool',
             '--meta_batch_size=8', '--metatrain_iterations=0']
    for name, steps in ('whole', [4]), ('parts', [2, 4]):
        for last in steps:
            run_ok(*flags, '--method=baseline', f'--pretrain_iterations={last}', f'--logdir={tmp_path / name}')
    whole, parts = (next((tmp_path / name).glob('*/model4.index')).with_suffix('') for name in ('whole', 'parts'))
    names = [name for name, _ in tf.train.list_variables(str(whole)) if name != 'record']
    assert 'head/classifier/w5' in names and 'w5' not in names
    assert all(np.array_equal(tf.train.load_variable(str(whole), name), tf.train.load_variable(str(parts), name)) for name in names)
    run_ok(f'--run={whole.parent}', '--train=False', '--num_test_tasks=3', '--test_updates=4', '--num_classes=4')
    entry, = results_of(whole.parent)
    assert entry.training.method == 'Baseline' and np.shape(entry.scores) == (3, 5)
    start = [*flags[:-1], '--metatrain_iterations=1', '--meta_lr=0', '--stop_grad', '--log=False', '--validation_tasks=10',
             f'--logdir={tmp_path / "maml"}', f'--load_from={whole}']
    assert 'Starting from the weights' in run_ok(*start)
    found = next((tmp_path / 'maml').glob('*/model1.index')).with_suffix('')
    assert np.array_equal(tf.train.load_variable(str(found), 'conv3'), tf.train.load_variable(str(whole), 'conv3'))
    assert 'add --pretrain_iterations' in error_of(*flags[:-1], '--method=baseline++')


@pytest.mark.slow
@pytest.mark.parametrize('method, updates', [('r2d2', 0), ('protomaml', 6), ('unicorn', 5)])
def test_methods_as_programs(method, updates, tmp_path, small_data, few_tasks):
    """Resumed to the bit, with what their last layers learn; evaluated after the number of updates of their preset."""
    flags = ['--datasource=cifarfs', f'--data_path={small_data["cifarfs"]}', f'--method={method}', '--update_batch_size=1', '--conv=False',
             '--hidden=4', '--meta_batch_size=2', '--engine=map', '--save_interval=2']
    for name, steps in ('whole', [4]), ('parts', [2, 4]):
        for last in steps:
            run_ok(*flags, f'--metatrain_iterations={last}', f'--logdir={tmp_path / name}')
    whole, parts = (checkpoints.load(str(next((tmp_path / name).glob('*/model4.index')).with_suffix(''))) for name in ('whole', 'parts'))
    assert whole.arrays.keys() == parts.arrays.keys()
    assert all(np.array_equal(array, parts.arrays[name]) for name, array in whole.arrays.items())
    run_ok(f'--run={tmp_path / "whole"}', '--train=False', '--num_test_tasks=3')
    entry, = results_of(next((tmp_path / 'whole').iterdir()))
    assert entry.training.method == methods.PRESETS[method].title and entry.setting.headline_updates == updates
    assert np.shape(entry.scores) == (3, max(updates, 1) + 1)  # of support rows, and of query rows after each update


def test_examples_of_all_classes(small_data):
    """Labelled by their class among all; the same whatever the size of the draws."""
    source = SOURCES['cifarfs']
    tasks = source.tasks(TaskConfig(5, 1, 1, seed=3, data_path=str(small_data['cifarfs'])), 'train')
    batch, again = tasks.draw_examples(10, 30), tasks.draw_examples(20, 20)
    assert np.array_equal(batch.support_x[:, 10:], again.support_x) and len(set(np.argmax(batch.support_y[0], axis=1))) == 6
    for row, label in zip(batch.support_x[0], np.argmax(batch.support_y[0], axis=1)):
        first = tasks.classes.starts[label]
        images = source.preprocess(tasks.classes.values[first:first + tasks.classes.counts[label]][None])[0]
        assert (images == row).all(axis=1).any()


@pytest.mark.slow
def test_weights_of_a_model_with_another_last_layer(trained, tmp_path, small_data):
    """A body is evaluated with another last layer, and a training starts from it; but not with a last layer that nobody has trained."""
    protonet, maml = trained
    flags = ['--datasource=cifarfs', f'--data_path={small_data["cifarfs"]}', '--update_batch_size=1', '--num_filters=4', '--max_pool',
             '--meta_batch_size=2', f'--logdir={tmp_path}', '--num_test_tasks=3', '--log=False']
    evaluation = ['--train=False', '--head_init=ridge', '--num_updates=0', f'--load_from={maml}/model2']
    assert 'Note: adapted with --head_init=ridge, and trained with --head_init=learned' in run_ok(*flags, *evaluation)
    entry, = results_of(next(tmp_path.glob('*ridge*')))
    assert entry.setting.adapted_by == 'head_init=ridge' and entry.training.method == 'first-order MAML' and len(entry.figures) == 2
    assert 'w5 is missing there' in error_of(*flags, '--train=False', f'--load_from={protonet}/model2')
    run_ok(*flags, '--metatrain_iterations=1', '--meta_lr=0', '--stop_grad', '--validation_tasks=10', f'--load_from={protonet}/model2')
    found, = tmp_path.glob('*/model1.index')
    assert np.array_equal(tf.train.load_variable(str(found)[:-6], 'conv2'), tf.train.load_variable(f'{protonet}/model2', 'conv2'))


@pytest.mark.parametrize('first, second', [('learned', 'shared'), ('shared', 'learned')])
def test_a_body_of_a_last_layer_of_another_shape(first, second):
    """A training starts from it; an evaluation would be of a last layer that nobody has trained."""
    saved, model = (MAML(dataclasses.replace(DENSE, num_updates=1, head_init=init), seed=seed) for seed, init in enumerate((first, second)))
    arrays = {name: variable.numpy() for name, variable in saved.parameters().items()}
    checkpoint = checkpoints.Checkpoint('model3', arrays, {'iteration': 3, 'flags': {'head_init': first}}, 0)
    with pytest.raises(UserError, match='does not fit the network'):
        checkpoints.restore_weights(checkpoint, model.parameters(), {}, ['w2', 'b2'], starts=False, head_init=second)
    fresh = model.weights['w2'].numpy()
    with pytest.raises(UserError, match='does not fit the network'):
        checkpoints.restore_weights(checkpoint._replace(record={}), model.parameters(), {}, ['w2', 'b2'], starts=True, head_init=second)
    checkpoints.restore_weights(checkpoint, model.parameters(), {}, ['w2', 'b2'], starts=True, head_init=second)
    assert np.array_equal(model.weights['w1'], saved.weights['w1']) and np.array_equal(model.weights['w2'], fresh)


def test_a_body_of_more_classes_starts_another_kind_of_last_layer(tmp_path):
    saved = MAML(dataclasses.replace(DENSE, num_updates=1))
    model = MAML(dataclasses.replace(DENSE, num_updates=1, dim_output=2, head_init='shared'), seed=1)
    record = {'iteration': 3, 'best': None, 'unprinted': [], 'skipped': 0, 'flags': {'num_classes': 3, 'head_init': 'learned'},
              'regime': 'metatrain', 'pretrain_iterations': 0, 'provenance': {'data': {}}}
    checkpoints.save(str(tmp_path / 'model3'), saved.state(), record)
    before = {name: variable.numpy() for name, variable in model.weights.items()}
    load_weights(str(tmp_path / 'model3'), model, {'num_classes': 2}, starts=True)
    assert np.array_equal(model.weights['w1'], saved.weights['w1'])
    own = [name for name in before if name not in saved.weights or model.weights[name].shape != saved.weights[name].shape]
    assert own and all(np.array_equal(model.weights[name], before[name]) for name in own), 'as the seed made it'


@pytest.mark.parametrize('first, second, starts', [('learned', 'shared', True), ('shared', 'learned', True), ('shared', 'shared', False)])
def test_a_body_of_fewer_classes_goes_to_a_last_layer_of_more(first, second, starts, tmp_path):
    """Where the last layer is replaced, or one column serves all classes."""
    saved, model = (MAML(dataclasses.replace(DENSE, num_updates=1, head_init=init, dim_output=way), seed=way)
                    for init, way in ((first, 2), (second, 4)))
    record = {'iteration': 3, 'best': None, 'unprinted': [], 'skipped': 0, 'flags': {'num_classes': 2, 'head_init': first},
              'regime': 'metatrain', 'pretrain_iterations': 0, 'provenance': {'data': {}}}
    checkpoints.save(str(tmp_path / 'model3'), saved.state(), record)
    load_weights(str(tmp_path / 'model3'), model, {'num_classes': 4}, starts=starts)
    assert np.array_equal(model.weights['w1'], saved.weights['w1'])


def test_a_last_layer_that_is_called_head_is_not_made_up():
    variables = {'head/kernel': tf.Variable(tf.zeros([2, 3])), 'head/lambda': tf.Variable(1.0)}
    with pytest.raises(UserError, match='head/kernel is missing there'):
        checkpoints.restore_weights(checkpoints.Checkpoint('model3', {}, {'iteration': 3}, 0), variables, {}, ['head/kernel'], starts=False,
                                    head_init='learned')


def test_ridge_regression_replaces_a_last_layer_that_is_called_head():
    """Which has a tensor of the same name as what ridge regression learns."""
    arrays = {'w1': np.ones([2, 2]), 'head/kernel': np.ones([2, 3]), 'head/bias': np.ones(3)}
    variables = {name: tf.Variable(value, dtype=tf.float64) for name, value in
                 {'w1': [[0., 0.], [0., 0.]], 'head/lambda': 50., 'head/scale': 10., 'head/bias': 0.}.items()}
    for starts in False, True:
        checkpoint = checkpoints.Checkpoint('model3', dict(arrays), {'iteration': 3, 'flags': {'head_init': 'learned'}}, 0)
        checkpoints.restore_weights(checkpoint, variables, {}, ['head/kernel', 'head/bias'], starts=starts, head_init='ridge')
        assert variables['head/bias'].numpy() == 0 and np.array_equal(variables['w1'], arrays['w1'])


def test_accuracy_where_adaptation_diverged():
    """The largest of numbers that are not finite is no answer; other tasks keep theirs."""
    outputs = np.zeros([3, 2, 2], np.float32)
    outputs[0, 0], outputs[1, 1] = (1, 0), (np.nan, 0)
    np.testing.assert_array_equal(accuracy(outputs, np.float32([[[1, 0], [0, 1]]] * 3)), [0.5, np.nan, 0.5])


@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
def test_the_classifier_of_a_pre_training_is_restored(optimizer, tmp_path):
    config = dataclasses.replace(DENSE, pretrain_classes=7, meta_optimizer=optimizer)
    saved, resumed, evaluated = MAML(config), MAML(config, seed=1), MAML(dataclasses.replace(config, pretrain_classes=0), seed=1)
    record = {'iteration': 3, 'best': None, 'unprinted': [], 'skipped': 0, 'flags': {}, 'regime': 'pretrain', 'pretrain_iterations': 3,
              'provenance': {'data': {}}}
    checkpoints.save(str(tmp_path / 'model3'), saved.state(), record)
    checkpoint = checkpoints.load(str(tmp_path / 'model3'))
    checkpoints.restore(checkpoint, resumed.state())
    checkpoints.restore(checkpoint, evaluated.parameters())
    for name, variable in resumed.state().items():
        assert np.array_equal(variable, saved.state()[name]), name
    assert np.array_equal(evaluated.weights['w1'], saved.weights['w1'])


@pytest.mark.parametrize('flags, words', [
    (['--head_init=shared', '--inner_weights=body'], '--inner_weights=body keeps them equal'),
    (['--head_init=new', '--inner_weights=body'], '--head_init=new starts with equal outputs for all classes'),
    (['--pretrain_iterations=9', '--metatrain_iterations=0', '--norm_per_step'], '--norm_per_step=True is about meta-training'),
    (['--pretrain_iterations=9', '--norm_per_step'], 'it would train the offsets and scales of the first one only'),
    (['--num_updates=0'], '--num_updates=0 needs a last layer'), (['--num_updates=0', '--head_init=shared'], '--num_updates=0 needs'),
    (['--method=protonet', '--stop_grad'], '--stop_grad is about the inner updates of the training'),
    (['--method=protonet', '--learn_lr=layer'], '--learn_lr is about the inner updates'),
    (['--method=r2d2', '--outer=reptile'], 'is not shared: leave out one'),
    (['--method=reptile', '--pretrain_iterations=9'], 'leave out --pretrain_iterations'),
    (['--method=r2d2', '--pretrain_iterations=1'], 'needs a last layer that tasks share'),
    (['--ridge_scale=2'], '--ridge_scale is for --head_init=ridge'),
    (['--method=r2d2', '--ridge_lambda=0'], '--ridge_lambda must be positive'),
    (['--datasource=sinusoid', '--head_init=prototypes'], '--head_init=prototypes is for classification')])
def test_what_means_nothing_is_refused(flags, words):
    assert words in error_of('--datasource=omniglot', *flags)

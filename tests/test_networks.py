"""Networks of one's own: fixtures, exact second derivatives of layers, identity of a run, and what is refused."""
import dataclasses
import functools
import os
import random
import re
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from test_methods import Fixture, fixtures, relative

import layer_table
import main
import maml
import stock_keras
from conftest import ROOT, error_of, fixture_files, module_at, run_ok
from maml import MAML, ModelConfig, inner_loop, objective
from networks import network_of
from runtime.cli import methods, network_file
from runtime.cli.methods import PRESETS
from runtime.cli.request import resolve
from runtime.datasets.tasks import TaskBatch
from runtime.jobs import checkpoints, learner, network_check
from runtime.jobs import train as training
from runtime.system.errors import UserError
from runtime.system.interruption import Interrupted
from special_grads import exact_statistics

FIXTURES = fixture_files('golden_networks', 'MAML_GOLDEN_NETWORKS')
GOLDEN = module_at(os.path.join(ROOT, 'tests', 'golden_networks', 'networks.py'))


class NetworkFixture(Fixture):
    """A fixture whose names of tensors are those of Keras."""
    ours = staticmethod(str)

    def __init__(self, name):
        super().__init__(FIXTURES[name])
        self.function = getattr(module_at(os.path.join(os.path.dirname(FIXTURES[name]), 'networks.py')), self.flags['network'])


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('name', fixtures(['attention', 'group_norm_boil', 'mlp_skip_meta_sgd', 'residual_anil',
                                           'residual_support_norm'], FIXTURES))
def test_fixtures_in_double_precision(name):
    fixture = NetworkFixture(name)
    model, batch = fixture.model('float64'), fixture.batch(np.float64)
    assert model.norm_params.keys() == set(fixture.flags['norm_params'])
    assert set(network_of(model.config).head_names) == set(fixture.flags['head'])
    assert relative(model.meta_gradients(batch), fixture.group('metagrad')) < 1e-7
    metrics = model.evaluate(batch, fixture.flags['num_updates_evaluated'])
    np.testing.assert_allclose(metrics.pre_loss, fixture.arrays['pre_loss'], rtol=1e-7)
    np.testing.assert_allclose(metrics.post_losses, fixture.arrays['post_losses'], rtol=1e-7)


@pytest.mark.parametrize('name', fixtures(['mlp_skip_regression'], sorted(FIXTURES.keys() - {'residual_anil', 'residual_first_order'})))
def test_fixtures_in_single_precision(name):
    """As a training computes: compiled, tasks mapped over cores."""
    fixture = NetworkFixture(name)
    gradients = fixture.model('float32').meta_gradients(fixture.batch(np.float32))
    assert relative(gradients, fixture.group('metagrad')) < 1e-4


# A small network, with a choice of what is in it ------------------------------------------------------------------------

def a_network(*parts):
    """A function that makes a network of layers, given as functions without arguments, and a linear one."""
    def function(input_shape, outputs):
        x = inputs = keras.Input(input_shape)
        for part in parts:
            x = part()(x)
        return keras.Model(inputs, layers.Dense(outputs, name='head')(layers.Flatten()(x)))
    return function


def dropout(input_shape, outputs):
    return keras.Sequential([keras.Input(input_shape), layers.Dense(8, 'tanh'), layers.Dropout(0.5), layers.Dense(outputs)])


def a_config(input_shape=(5,), **changes):
    size = int(np.prod(input_shape))
    return ModelConfig(**{'dim_input': size, 'dim_output': 3, 'loss': 'xent', 'update_batch_size': 2, 'update_lr': 0.1, 'num_updates': 2,
                          'input_shape': input_shape, **changes})


def a_batch(config, tasks=2, dtype=np.float32, seed=0):
    rng, rows = np.random.default_rng(seed), 2 * config.dim_output
    x, y = (rng.uniform(size=[tasks, 2 * rows, config.dim_input]), np.tile(np.eye(config.dim_output), [tasks, 4, 1]))
    return TaskBatch(*(array.astype(dtype) for array in (x[:, :rows], y[:, :rows], x[:, rows:], y[:, rows:])))


def test_flags_of_normalisation_that_change_nothing_are_noted():
    note, = training.notes(a_config(network=dropout, norm_per_step=True))
    assert 'dropout has no offsets and scales of normalisation' in note
    assert not training.notes(a_config(network=dropout))


def test_initial_weights_follow_from_the_seed_alone():
    config = a_config()
    state = random.getstate(), np.random.get_state()[1].tolist(), keras.config.floatx()
    first = MAML(config, seed=3, network=GOLDEN.mlp_skip)
    assert state == (random.getstate(), np.random.get_state()[1].tolist(), keras.config.floatx())
    keras.utils.set_random_seed(99)
    layers.Dense(1)  # layers without a name are numbered
    same, other = (MAML(config, seed=seed, network=GOLDEN.mlp_skip) for seed in (3, 4))
    for name, variable in first.weights.items():
        assert np.array_equal(variable, same.weights[name])
    assert not np.array_equal(first.weights['head/kernel'], other.weights['head/kernel'])
    assert list(MAML(config, network=dropout).weights) == [f'sequential/{name}' for name in (
        'dense/kernel', 'dense/bias', 'dense_1/kernel', 'dense_1/bias')]


def test_tensorflow_is_left_as_it_was():
    original, inside, outside = tf.nn.moments, threading.Event(), threading.Event()
    x = tf.random.stateless_normal([6, 3], [0, 1])

    def enter():
        with exact_statistics(6):
            inside.set()
            outside.wait()

    thread = threading.Thread(target=enter)
    thread.start()
    inside.wait()
    with exact_statistics(6, stats_rows=4):
        np.testing.assert_allclose(tf.nn.moments(x, 0)[0], tf.reduce_mean(x[:4], 0), rtol=1e-6)
        folded = tf.random.stateless_normal([12, 3], [0, 2])  # two parts of each row, as a layer may make of it
        np.testing.assert_allclose(tf.nn.moments(folded, [0])[0], tf.reduce_mean(folded[:8], 0), rtol=1e-5)
        with exact_statistics(6):
            np.testing.assert_allclose(tf.nn.moments(x, [0], keepdims=True)[1], original(x, [0], keepdims=True)[1], rtol=1e-6)
    assert tf.nn.moments is not original
    np.testing.assert_allclose(tf.nn.moments(x, [0])[0], original(x, [0])[0])  # as in a thread that is not concerned
    outside.set()
    thread.join()
    assert tf.nn.moments is original
    with pytest.raises(ZeroDivisionError), exact_statistics(6):
        raise ZeroDivisionError
    assert tf.nn.moments is original


@pytest.mark.usefixtures('eager')
def test_masks_follow_from_seed_iteration_and_step():
    config = a_config()
    batch = a_batch(config, tasks=1)
    model, other = (MAML(config, seed=seed, network=dropout) for seed in (1, 2))
    other.copy_parameters(model)

    def gradient(model, iteration):
        return model.meta_gradients(batch, iteration)['sequential/dense/kernel'].numpy()

    assert np.array_equal(gradient(model, 7), gradient(model, 7))
    assert not np.array_equal(gradient(model, 7), gradient(model, 8))
    assert not np.array_equal(gradient(model, 7), gradient(other, 7))
    np.testing.assert_allclose(gradient(model.variant(recompute=True), 7), gradient(model, 7), rtol=1e-4, atol=1e-6)
    values, task = model.shared, TaskBatch(*(array[0] for array in batch))
    outputs = [maml.support_outputs(model.config, values, task, maml.initial_state(model.config, values, task, 7), step) for step in (0, 1)]
    assert not np.array_equal(*outputs)
    evaluations = [evaluated.evaluate(batch, 2).post_losses for evaluated in (model, model, other)]
    assert np.array_equal(evaluations[0], evaluations[1]) and np.array_equal(evaluations[0], evaluations[2])


@pytest.mark.usefixtures('fresh_models')
@pytest.mark.parametrize('function, fixed', [(GOLDEN.mlp_skip, True), (dropout, False)])
def test_the_features_of_anil_are_computed_once(function, fixed, monkeypatch):
    """But with random layers, which draw again in each step."""
    config = dataclasses.replace(a_config(inner_weights='head', num_updates=3), network=function)
    network, calls = network_of(config), []
    original = network.features
    monkeypatch.setattr(network, 'features', lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    model, batch = MAML(config), a_batch(config)
    model.meta_gradients(batch)
    assert len(calls) == (2 if fixed else 4)


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('logits', ['linear', 'cosine'])
def test_a_classifier_of_all_classes(logits):
    """Baseline: its last layer has more outputs than tasks have."""
    config = a_config(pretrain_classes=7, head_init='new', inner_weights='head', logits=logits, num_updates=1)
    model, labels = MAML(config, network=GOLDEN.mlp_skip), np.eye(7, dtype=np.float32)[None]
    x = np.random.default_rng(0).uniform(size=(1, 7, 5)).astype(np.float32)
    before = {name: variable.numpy() for name, variable in model.weights.items()}
    model.pretrain_step(TaskBatch(x, labels, x, labels))
    changed = {name for name, variable in model.weights.items() if not np.array_equal(variable, before[name])}
    assert any('classifier' in name for name in changed) and any('classifier' not in name for name in changed)


@pytest.mark.parametrize('function, changes', [
    (dropout, {'recompute': True}), (None, {'head_init': 'new', 'inner_weights': 'head', 'logits': 'cosine', 'engine': 'map'})])
def test_random_numbers_do_not_depend_on_who_compiles(function, changes):
    config = a_config(**{name: value for name, value in changes.items() if name not in ('recompute', 'engine')})
    models = [MAML(each, network=function) for each in (config, dataclasses.replace(config, **changes))]
    for model in models:
        model.metatrain_step(a_batch(config), 3)
    for name, variable in models[0].weights.items():
        np.testing.assert_allclose(variable, models[1].weights[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_description_is_of_the_given_network():
    assert MAML(a_config(), network=dropout).description == MAML(a_config(network=dropout)).description


@pytest.mark.usefixtures('eager')
def test_fewer_outputs():
    config = a_config()
    model = MAML(config, seed=1, network=GOLDEN.mlp_skip)
    fewer = model.variant(dim_output=2)
    assert fewer.weights['head/kernel'].shape == (7, 2) and fewer.config.network is GOLDEN.mlp_skip
    x = a_batch(config, tasks=1).query_x
    batch = TaskBatch(x, np.eye(3, dtype=np.float32)[[[0, 1] * 3]], x, np.eye(3, dtype=np.float32)[[[0, 1] * 3]])
    two = TaskBatch(x, batch.support_y[..., :2], x, batch.query_y[..., :2])
    np.testing.assert_allclose(fewer.predict(two, 0).post, model.predict(batch, 0).post[..., :2], rtol=1e-6)


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('parts, same', [
    ([lambda outputs: layers.Dense(3 * outputs), lambda outputs: layers.Reshape((3, outputs)),
      lambda outputs: layers.Lambda(lambda x: tf.reduce_sum(x, axis=1))], False),
    ([lambda outputs: layers.Dense(2 * outputs), layers.Dense], False), ([layers.Dense, layers.Dense], False),
    ([lambda outputs: layers.Dense(outputs, name=f'logits{outputs}')], False),
    ([lambda outputs: layers.Dense(4), layers.Dense, lambda outputs: layers.Lambda(lambda x: 2 * x)], True)])
def test_fewer_outputs_of_a_network_whose_width_depends_on_them(parts, same):
    config = a_config()
    model = MAML(config, seed=1, network=sequential(*parts))
    if same:
        batch = a_batch(config, tasks=1)
        fewer = batch._replace(support_y=batch.support_y[..., :2], query_y=batch.query_y[..., :2])
        np.testing.assert_allclose(model.variant(dim_output=2).predict(fewer, 0).post, model.predict(batch, 0).post[..., :2], rtol=1e-6)
    else:
        with pytest.raises(UserError, match='made with 2 outputs instead of the 3 that it was trained with'):
            model.variant(dim_output=2)


@pytest.mark.usefixtures('eager')
def test_a_shared_column_needs_features_that_do_not_depend_on_the_outputs():
    with pytest.raises(UserError, match='depend on the number of outputs'):
        MAML(a_config(head_init='shared'), network=sequential(lambda outputs: layers.Dense(2 * outputs), layers.Dense))


@pytest.mark.usefixtures('eager')
def test_more_outputs_than_in_training():
    """Where the last layer is computed, the others must be the same."""
    config = a_config(head_init='prototypes')
    assert MAML(config, network=sequential(lambda outputs: layers.Dense(4), layers.Dense)).variant(dim_output=5).config.dim_output == 5
    with pytest.raises(UserError, match='made with 5 outputs instead of the 3'):
        MAML(config, network=sequential(lambda outputs: layers.Lambda(lambda x: outputs * x), layers.Dense)).variant(dim_output=5)


@pytest.mark.usefixtures('eager')
def test_fewer_outputs_with_a_normalisation_of_each_step():
    model = MAML(a_config(norm_per_step=True, num_updates=2), network=sequential(lambda outputs: layers.BatchNormalization(), layers.Dense))
    fewer = model.variant(dim_output=2)
    assert {name: value.shape for name, value in fewer.norm_params.items()} == {
        name: value.shape for name, value in model.norm_params.items()}


class Conditional(layers.BatchNormalization):
    """A batch norm that gets more than rows."""

    def call(self, inputs, condition, training=None):
        return super().call(inputs, training=training) * condition


@pytest.mark.usefixtures('eager')
def test_a_batch_norm_with_another_argument():
    def network(input_shape, outputs):
        x = inputs = keras.Input(input_shape)
        return keras.Model(inputs, layers.Dense(outputs)(Conditional()(x, layers.Dense(x.shape[-1])(x))))
    config = dataclasses.replace(a_config(), network=network)
    network_check.check(config)
    assert len(network_of(MAML(config).config).initial_norm_params()) == 2


class Positions(layers.Layer):
    """Adds learned numbers, which it looks up."""

    def __init__(self):
        super().__init__()
        self.table = self.add_weight(shape=(9, 1), name='table')

    def call(self, x):
        return x + tf.gather(self.table, [3, 1, 3, 0])[:, 0]


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('changes', [{}, {'stop_grad': True}, {'outer': 'reptile'}, {'learn_lr': 'weight'}])
def test_weights_that_are_looked_up(changes):
    """Whose gradients TensorFlow has as slices: they are those of the same sum written as a product."""
    class Product(Positions):
        def call(self, x):
            return x + (tf.one_hot([3, 1, 3, 0], 9, dtype=x.dtype) @ self.table)[:, 0]

    results = []
    for layer in Positions, Product:
        network = sequential(lambda outputs: layers.Dense(4, 'tanh'), lambda outputs, layer=layer: layer(), layers.Dense)
        config = dataclasses.replace(a_config(), network=network, num_updates=2, dtype='float64', **changes)
        network_check.check(config)
        model = MAML(config, seed=1)
        assert bool(network_of(model.config)._gathered) == (layer is Positions)
        for number, value in enumerate(model.weights.values()):
            value.assign(tf.random.stateless_normal(value.shape, [number, 0], dtype=tf.float64))
        batch = TaskBatch(*(tf.cast(part, tf.float64) for part in a_batch(config)))
        results.append([*model.meta_gradients(batch).values()])
        model.metatrain_step(batch)
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


class Plain(layers.BatchNormalization):
    def call(self, inputs, training=None):
        return super().call(inputs, training=training)


@pytest.mark.usefixtures('eager')
def test_a_batch_norm_of_ones_own_is_one():
    network = network_of(MAML(a_config(), network=sequential(lambda outputs: Plain(), layers.Dense)).config)
    assert {name.split('/')[-1] for name in network.initial_norm_params()} == {'gamma', 'beta'}


class Wrapped(layers.BatchNormalization):
    def call(self, inputs, **kwargs):
        return 2 * super().call(inputs, **kwargs)


class OfTheBatch(layers.BatchNormalization):
    def call(self, inputs):
        return super().call(inputs, training=True)


class OfEarlierBatches(layers.BatchNormalization):
    def call(self, inputs):
        return super().call(inputs)


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('norm', [layers.BatchNormalization, Plain, Wrapped, OfTheBatch])
def test_a_batch_norm_takes_the_statistics_of_the_current_rows(norm):
    model = MAML(a_config(num_updates=0), network=a_network(norm))
    batch = a_batch(model.config, tasks=1)
    others = batch._replace(query_x=np.concatenate([batch.query_x[:, :1], batch.query_x[:, 1:] + 3 * batch.support_x[:, 1:]], axis=1))
    assert not np.allclose(*(model.predict(each, 0).post[0, 0] for each in (batch, others)), rtol=1e-3)


class NormalisingHead(layers.Layer):
    def __init__(self, outputs):
        super().__init__()
        self.norm, self.linear = layers.BatchNormalization(center=False, scale=False), layers.Dense(outputs)

    def call(self, x):
        return 3 * self.linear(self.norm(x))


@pytest.mark.usefixtures('eager')
def test_a_last_layer_that_normalises_has_the_statistics_of_the_query_norm():
    network = sequential(lambda outputs: layers.Dense(4), NormalisingHead)
    network_check.check(dataclasses.replace(a_config(), network=network))
    assert network_of(MAML(a_config(), network=network).config).head_names == ()
    with pytest.raises(UserError, match='normalises or is random'):
        MAML(a_config(inner_weights='head'), network=network)


@pytest.mark.usefixtures('eager')
def test_recurrent_layers_without_dropout_are_not_random():
    def lstm(dropout):
        return sequential(lambda outputs: layers.Reshape((5, 1)), lambda outputs: layers.LSTM(4, dropout=dropout), layers.Dense)
    assert [network_of(MAML(a_config(), network=lstm(dropout)).config).random for dropout in (0, 0.5)] == [False, True]


def meta_objective(config, parameters, task):
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        _, states = inner_loop(config, parameters, task, 0)
        loss = objective(config, parameters, task, states, 0)[0]
    return loss, tape.gradient(loss, parameters.trained(), unconnected_gradients='zero')


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('method', [pytest.param(name, marks=[] if name == 'metasgd' else pytest.mark.slow)
                                    for name, preset in PRESETS.items() if name != 'reptile' and not preset.flags.get('stop_grad')])
def test_methods_by_finite_differences(method):
    """The residual network, along a random direction in all that is trained. First order has no such derivative; Reptile follows none."""
    flags = {'num_updates': 2, **{name: value for name, value in PRESETS[method].flags.items()
                                  if name in {field.name for field in dataclasses.fields(ModelConfig)}}}
    flags |= {'num_updates': min(flags['num_updates'], 2), 'first_order_iterations': 0, 'update_lr': 0.1}
    config = a_config((9, 9, 3), update_batch_size=1, dtype='float64', network=GOLDEN.residual, **flags)
    batch = a_batch(config, tasks=1, dtype=np.float64)
    task = TaskBatch(*(tf.constant(array[0]) for array in batch))
    parameters = tf.nest.map_structure(lambda value: tf.cast(value, tf.float64), maml.initial_parameters(config, 0))
    rng = np.random.default_rng(0)
    direction = tf.nest.map_structure(lambda value: tf.constant(0.1 * rng.normal(size=value.shape)), parameters)
    _, gradients = meta_objective(config, parameters, task)
    step = 1e-7
    ahead, behind = (meta_objective(config, tf.nest.map_structure(lambda value, move, side=side: value + side * step * move,
                                                                  parameters, direction), task)[0] for side in (1, -1))
    expected = (ahead - behind) / (2 * step)
    found = sum(tf.reduce_sum(gradient * direction.trained()[name]) for name, gradient in gradients.items())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# What is tested at the start of a training, and refused -------------------------------------------------------------------

CONV = functools.partial(layers.Conv2D, 3, 3, padding='same', activation='tanh')


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('parts, words', [
    ([CONV, layers.BatchNormalization, functools.partial(layers.GroupNormalization, 3), functools.partial(layers.MaxPooling2D, 2)], None),
    ([CONV, functools.partial(layers.UpSampling2D, 2, interpolation='bilinear'), CONV],
     ['in the layer up_sampling2d (UpSampling2D)', 'is wrong by', '--check_network=False']),
    ([CONV, functools.partial(layers.Resizing, 7, 7, 'bicubic'), CONV], ['in the layer resizing', 'no second derivative (LookupError']),
    ([CONV, functools.partial(layers.Lambda, lambda x: x * tf.stop_gradient(x), name='half')], ['in the layer half (Lambda)']),
    ([functools.partial(layers.Dense, 3, dtype='float32')],
     ['tested in float64, in which this network cannot compute', '--check_network=False']),
    ([functools.partial(layers.Dense, 3, lora_rank=2)], ['is of float32, and not of float64', '--check_network=False'])])
def test_second_derivatives_are_tested(parts, words):
    config = dataclasses.replace(a_config((6, 6, 2)), network=a_network(*parts))
    if words is None:
        network_check.check(config)
        return
    with pytest.raises(UserError) as error:
        network_check.check(config)
    assert all(word in str(error.value) for word in words), error.value
    network_check.check(dataclasses.replace(config, stop_grad=True))
    network_check.check(dataclasses.replace(config, num_updates=0))


class Sums(keras.Model):
    """Makes a layer in its call."""

    def __init__(self, outputs):
        super().__init__()
        self.one, self.other, self.last = layers.Dense(4, 'tanh'), layers.Dense(4), layers.Dense(outputs)

    def call(self, x):
        return self.last(layers.add([self.one(x), self.other(x)]))


@pytest.mark.usefixtures('eager')
def test_layers_that_are_made_in_a_call_have_the_dtype_of_the_network():
    """Whatever was computed before, and nothing of it stays."""
    before = keras.config.dtype_policy().name
    for dtype in 'float32', 'float64', 'float32':
        config = a_config(network=lambda shape, outputs: Sums(outputs), dtype=dtype)
        network, x = network_of(config), tf.constant(np.random.default_rng(0).uniform(size=[4, 5]), dtype)
        assert network.features({name: tf.cast(value, dtype) for name, value in network.initial_weights(0).items()}, x).dtype == dtype
    network_check.check(config)
    assert keras.config.dtype_policy().name == before


class StateOfItsOwn(keras.Model):
    def __init__(self, outputs):
        super().__init__()
        self.scale, self.linear = tf.Variable(2.), layers.Dense(outputs)

    def call(self, x):
        return self.linear(x) * self.scale


class Twins(keras.Model):
    def __init__(self, outputs):
        super().__init__()
        self.one, self.other = layers.Dense(4, name='same'), layers.Dense(outputs, name='same')

    def call(self, x):
        return self.other(self.one(x))


class Tied(keras.Model):
    def __init__(self, outputs):
        super().__init__()
        self.linear = layers.Dense(outputs)

    def call(self, x):
        return self.linear(self.linear(x[:, :3]))


class Counting(layers.Layer):
    def __init__(self):
        super().__init__()
        self.count = self.add_weight(shape=(), initializer='zeros', trainable=False, name='count')

    def call(self, x):
        self.count.assign_add(1.)
        return x * self.count


ONE_MODEL = []


def the_same_model(input_shape, outputs):
    ONE_MODEL[:] = ONE_MODEL or [a_network()(input_shape, outputs)]
    return ONE_MODEL[0]


def sequential(*parts):
    return lambda input_shape, outputs: keras.Sequential([keras.Input(input_shape), *(part(outputs) for part in parts)])


def by_hand(function):
    """A network of code that Keras calls with tensors only."""
    class ByHand(keras.Model):
        def __init__(self, outputs):
            super().__init__()
            self.linear = layers.Dense(outputs)

        def call(self, x):
            return self.linear(function(x))

    return lambda input_shape, outputs: ByHand(outputs)


def hidden_head(input_shape, outputs):
    x = inputs = keras.Input(input_shape)
    return keras.Model(inputs, layers.Dense(outputs, name='logits')(layers.Dense(4, name='head')(x)))


@tf.function
def noise(x):
    return x + tf.random.normal([1])


class Compiled(layers.Layer):
    """A dense layer in a function that TensorFlow compiles once, with the weights that it has then."""

    def __init__(self):
        super().__init__()
        self.linear = layers.Dense(4)

    @tf.function
    def call(self, x):
        return self.linear(x)


class CompiledModel(keras.Model):
    def __init__(self, outputs):
        super().__init__()
        self.linear = layers.Dense(outputs)

    @tf.function
    def call(self, x, training=None):
        return self.linear(x)


class TwoViews(keras.Model):
    """A network that keeps the logits of a second view."""

    def __init__(self, outputs):
        super().__init__()
        self.body, self.last = layers.Dense(5, 'tanh'), layers.Dense(outputs, name='head')

    def call(self, x):
        outputs = self.last(self.body(x))
        self.other_view = self.last(self.body(0.9 * x))
        return outputs


class Described(TwoViews):
    """A network whose features depend on the weights of the last layer, without a gradient."""

    def __init__(self, outputs):
        super().__init__(outputs)
        self.last.build([None, 5])

    def call(self, x):
        return self.last(self.body(x) * tf.stop_gradient(tf.reduce_mean(tf.square(self.last.kernel))))


class NoiseInTraining(layers.Layer):
    def call(self, x, training=None):
        return x + tf.random.normal([1]) if training else x


class Sharp(layers.Layer):
    """Computes something else in training, without random numbers."""

    def call(self, x, training=None):
        return 2 * x if training else x


class Recomputed(Compiled):
    def build(self, input_shape):
        self.linear.build(input_shape)

    def call(self, x):
        return tf.recompute_grad(self.linear)(x)


class StandardizedWeights(layers.Layer):
    """A dense layer, the kernel of which is shifted and scaled."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 5), name='kernel')

    def call(self, x):
        mean, variance = tf.nn.moments(tf.convert_to_tensor(self.kernel), [0])
        return x @ ((self.kernel - mean) / tf.sqrt(variance + 1e-3))


class StandardizedRows(StandardizedWeights):
    def __init__(self, outputs):
        super().__init__()

    def call(self, x):
        mean, variance = tf.nn.moments(x, [0])
        return ((x - mean) / tf.sqrt(variance + 1e-3)) @ self.kernel[:, :3]


class Scaled(StandardizedWeights):
    def __init__(self, outputs):
        super().__init__(name='scaled')
        self.linear = layers.Dense(outputs)

    def build(self, input_shape):
        self.linear.build(input_shape)

    def call(self, x, scale=1):
        return scale * self.linear(x)


class WithAnOption(keras.Model):
    def __init__(self, outputs):
        super().__init__()
        self.last = Scaled(outputs)

    def call(self, x):
        return self.last(x, scale=2)


def frozen_bias(input_shape, outputs):
    model = a_network()(input_shape, outputs)
    model.layers[-1].bias.trainable = False
    return model


class Needing(layers.Dense):
    def call(self, x, training):
        return super().call(x)


class EndsInNeeding(keras.Model):
    def __init__(self, outputs):
        super().__init__()
        self.last = Needing(outputs)

    def call(self, x):
        return self.last(x, training=True)


class HalfPrecise(keras.Model):
    def __init__(self, outputs):
        super().__init__(dtype='float16')
        self.linear = layers.Dense(outputs, dtype='float32')

    def call(self, x):
        return self.linear(x)


class SoftmaxInEvaluations(layers.Layer):
    def call(self, x, training=None):
        return x if training else tf.nn.softmax(x)


class Windows(layers.Layer):
    """A convolution, whose name does not say so."""

    def __init__(self):
        super().__init__()
        self.windows = self.add_weight(shape=(3, 1, 2), name='windows')

    def call(self, x):
        return keras.ops.conv(x, self.windows, padding='same')


def decoder(input_shape, outputs):
    """Ends in a recurrent layer that starts in a state which the network makes."""
    x = inputs = keras.Input(input_shape)
    return keras.Model(inputs, layers.GRU(outputs)(layers.Reshape((5, 1))(x), initial_state=layers.Dense(outputs)(x)))


def masked(input_shape, outputs):
    """The statistics of batch norm depend on which rows are masked; nothing of it is seen behind zeros."""
    x = inputs = keras.Input(input_shape)
    x = layers.BatchNormalization()(layers.Masking()(layers.Reshape((5, 1))(x)))
    return keras.Model(inputs, layers.Dense(outputs, kernel_initializer='zeros')(layers.GlobalAveragePooling1D()(x)))


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('function, changes, words', [
    (lambda shape, outputs: 3, {}, 'returns a int, and must return a keras.Model'),
    (lambda shape, outputs: 1 / 0, {}, 'raises ZeroDivisionError: division by zero'),
    (lambda shape: 3, {}, 'raises TypeError'),
    (lambda shape, outputs: exit(3), {}, 'raises SystemExit'),
    (lambda shape, outputs: a_network()(shape, outputs + 1), {}, 'makes [4, 4] of 4 rows, and must make [4, 3]'),
    (lambda shape, outputs: Twins(outputs), {}, 'two of its weights are named twins/same/kernel'),
    (lambda shape, outputs: StateOfItsOwn(outputs), {}, 'it keeps state in'),
    (the_same_model, {}, 'uses layers again that it has used before'),
    (a_network(Counting), {}, 'it changes counting/count while it computes'),
    (a_network(functools.partial(layers.Dense, 4, dtype='float16')), {}, 'computes in float16'),
    (a_network(functools.partial(layers.Dense, 4, kernel_regularizer='l2')), {}, 'losses of its own'),
    (a_network(functools.partial(layers.Dense, 4, kernel_constraint='non_neg')), {}, 'has a constraint'),
    (a_network(functools.partial(layers.Lambda, lambda x: x + tf.random.normal([1]))), {}, 'RandomStandardNormal'),
    (by_hand(noise), {}, 'RandomStandardNormal'),
    (by_hand(lambda x: x if tf.reduce_mean(x) > 100 else 2 * x), {}, ' where training=True: '),
    (by_hand(lambda x: x + x.numpy().mean()), {}, 'raises AttributeError where training=True'),
    (a_network(Recomputed), {}, 'no gradient reaches it: leave out tf.recompute_grad'),
    (a_network(StandardizedWeights), {'query_norm': 'support'}, 'over the first axis of something else than rows'),
    (masked, {'query_norm': 'support'}, 'depend on other rows in another way than by batch norm without masks'),
    (decoder, {'inner_weights': 'head'}, 'gru, has several inputs'),
    (lambda shape, outputs: WithAnOption(outputs), {'inner_weights': 'head'}, 'scaled, has several inputs'),
    (sequential(lambda outputs: layers.Dense(4), StandardizedRows), {'inner_weights': 'head'}, 'normalises or is random'),
    (lambda shape, outputs: TwoViews(outputs), {'inner_weights': 'head'}, 'head, is called several times'),
    (lambda shape, outputs: Described(outputs), {'inner_weights': 'head'}, 'head, shares its weights'),
    (a_network(NoiseInTraining), {}, 'RandomStandardNormal'),
    (a_network(OfEarlierBatches), {}, 'of_earlier_batches normalises by moving averages, which stay as they are here'),
    (lambda shape, outputs: EndsInNeeding(outputs), {}, 'raises TypeError where its last layer is run by itself'),
    (lambda shape, outputs: HalfPrecise(outputs), {}, 'half_precise computes in float16'),
    (sequential(layers.Dense, lambda outputs: SoftmaxInEvaluations()), {}, 'must make logits'),
    (a_network(functools.partial(layers.Reshape, (5, 1)), Windows), {'engine': 'vmap'}, 'cannot vectorise the convolutions'),
    (a_network(functools.partial(layers.Reshape, (5, 1)), functools.partial(layers.GRU, 2)), {'engine': 'vmap'}, 'cannot vectorise'),
    (a_network(functools.partial(layers.Dense, 4, activation=lambda x: x.nothing)), {}, "has no attribute 'nothing'"),
    (frozen_bias, {'head_init': 'prototypes'}, 'ends in a Dense layer with a bias'),
    (hidden_head, {'head_init': 'ridge'}, 'head/bias is a name that --head_init=ridge uses itself'),
    (a_network(functools.partial(layers.BatchNormalization, renorm=True)), {}, 'renorm'),
    (a_network(functools.partial(layers.Dense, 4, name='lr')), {}, 'a name that this program uses itself'),
    (sequential(lambda outputs: layers.Dense(outputs, 'softmax')), {}, 'must make logits'),
    (sequential(lambda outputs: layers.Lambda(lambda x: x[:, :outputs])), {}, 'no weights to train'),
    (sequential(layers.Dense, lambda outputs: layers.Lambda(lambda x: 2 * x)), {'inner_weights': 'head'}, 'lambda, has no weights'),
    (lambda shape, outputs: Tied(outputs), {'inner_weights': 'body'}, 'is called several times'),
    (a_network(functools.partial(layers.Reshape, (5, 1)), functools.partial(layers.Conv1D, 2, 3)), {'engine': 'vmap'}, 'cannot vectorise'),
])
def test_what_cannot_be_used(function, changes, words):
    with pytest.raises(UserError) as error:
        MAML(a_config(**changes), network=function)
    assert words in str(error.value) and '\n' not in str(error.value), error.value


def test_the_outputs_of_a_network_whose_last_layer_cannot_be_run_by_itself():
    """They are those of the network: its last layer is not run a second time."""
    for kind in TwoViews, Described:
        network = network_of(a_config(network=lambda shape, outputs, kind=kind: kind(outputs)))
        weights, x = network.initial_weights(0), tf.constant(np.random.default_rng(0).uniform(size=[4, 5]), tf.float32)
        outputs = network.head(weights, network.features(weights, x))
        with network.with_tensors(weights, 4):
            np.testing.assert_array_equal(outputs, network.model(x))


class Tempered(layers.Dense):
    def call(self, x, training=None):
        return super().call(x) * (1. if training else 4.)


class Tail(layers.Layer):
    def call(self, x, training=None):
        return x if training else 2. * x


@pytest.mark.parametrize('parts', [[Tempered], [layers.Dense, lambda outputs: Tail()]])
def test_outputs_of_a_last_layer_that_depend_on_training(parts):
    """They are those of the network; the layer is none that can be run by itself."""
    network = network_of(a_config(network=sequential(*parts)))
    weights, x = network.initial_weights(0), tf.constant(np.random.default_rng(0).uniform(size=[4, 5]), tf.float32)
    for iteration in 3, None:
        tensors = {**weights, **maml.masks(a_config(network=sequential(*parts)), iteration)}
        outputs = network.head(weights, network.features(tensors, x))
        with network.with_tensors(weights, 4):
            np.testing.assert_array_equal(outputs, network.model(x, training=iteration is not None))
    assert not network.head_names


def test_a_layer_that_computes_something_else_in_training():
    """It does so in the iterations of a training, and not in an evaluation."""
    config = a_config(network=a_network(Sharp))
    network = network_of(config)
    weights, x = network.initial_weights(0), tf.constant(np.random.default_rng(0).uniform(size=[4, 5]), tf.float32)
    training, evaluation = (network.features({**weights, **maml.masks(config, iteration)}, x) for iteration in (3, None))
    assert network.random
    np.testing.assert_allclose(training, 2 * evaluation)


def test_functions_that_keep_the_weights_of_their_first_call():
    """One of a function without weights is nothing else than code."""
    for network in a_network(Compiled), lambda input_shape, outputs: CompiledModel(outputs):
        with pytest.raises(UserError, match='it has a @tf.function'):
            MAML(a_config(), network=network)
    double = tf.function(lambda x: 2 * x)
    MAML(a_config(), network=a_network(functools.partial(layers.Dense, 4, activation=double)))


def test_a_signal_is_not_an_error_of_the_network():
    def ended(input_shape, outputs):
        raise Interrupted(143)
    with pytest.raises(Interrupted):
        MAML(a_config(), network=ended)


@pytest.mark.usefixtures('eager')
def test_a_layer_without_weights_may_be_the_last():
    function = sequential(layers.Dense, lambda outputs: layers.Lambda(lambda x: 2 * x))
    model = MAML(a_config(), network=function)
    assert network_of(model.config).head_names == ()
    assert model.evaluate(a_batch(model.config), 1).post_losses.shape == (1, 2)


# The command line ---------------------------------------------------------------------------------------------------------

CODE = '''
import keras
from keras import layers
from sizes import WIDTH


def net(input_shape, outputs):
    return keras.Sequential([keras.Input(input_shape), layers.Dense(WIDTH, 'tanh'), layers.Dropout(0.2), layers.Dense(outputs)])


number = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with net.py and what it imports; and flags of a training with it."""
    monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'state'))
    (tmp_path / 'net.py').write_text(CODE)
    (tmp_path / 'sizes.py').write_text('WIDTH = 6\n')
    return tmp_path, [f'--network={tmp_path}/net.py:net', '--metatrain_iterations=4', '--meta_batch_size=2', '--save_interval=2',
                      '--log=False', f'--logdir={tmp_path}/logs']


@pytest.mark.usefixtures('few_tasks')
def test_a_run_keeps_its_network(own, monkeypatch):
    """Trained with Dropout, interrupted, resumed bit for bit; evaluated when the file has gone; another file is refused."""
    folder, flags = own
    run_ok(*flags)
    directory = next((folder / 'logs').iterdir())
    assert directory.name.endswith('.net-net') and 'norm' not in directory.name  # its normalisation is the user's
    straight = checkpoints.load(str(directory / 'model4')).arrays
    copied = (directory / 'network' / 'net.py').stat().st_mtime_ns
    run_ok(*flags, '--test_iter=2')
    assert (directory / 'network' / 'net.py').stat().st_mtime_ns == copied, 'the only copy is not written again'
    resumed = checkpoints.load(str(directory / 'model4')).arrays
    assert straight.keys() == resumed.keys() and all(np.array_equal(straight[name], resumed[name]) for name in straight)
    assert (directory / 'earlier1' / 'network' / 'net.py').exists()

    (folder / 'sizes.py').write_text('WIDTH = 7\n')
    assert '--network=net.py:net@' in (sentence := error_of(*flags, '--metatrain_iterations=6')) and 'and not with' in sentence
    assert 'contradicts' in error_of(f'--run={directory}', flags[0], '--train=False')
    (folder / 'net.py').unlink()
    assert 'meta-validation' in run_ok(f'--run={directory}', '--train=False', '--log=False')

    predictor = learner.load(directory).adapt([[0.], [1.], [2.]], [0., 1., 2.])
    assert predictor([[0.], [1.]]).shape == (2, 1)
    predictor.save(folder / 'predictor.npz')
    with pytest.raises(UserError, match='network='):
        learner.load_predictor(folder / 'predictor.npz')
    function = network_file.load(network_file.read(f'{directory}/network/net.py:net'))
    np.testing.assert_array_equal(learner.load_predictor(folder / 'predictor.npz', network=function)([[0.]]), predictor([[0.]]))

    monkeypatch.setenv('XDG_STATE_HOME', str(folder / 'of_somebody_else'))
    assert '--trust_network' in error_of(f'--run={directory}', '--train=False')
    assert 'meta-validation' in run_ok(f'--run={directory}', '--train=False', '--trust_network', '--log=False')
    (directory / 'network' / 'sizes.py').write_text('WIDTH = 5\n')
    assert 'it is not the code' in error_of(f'--run={directory}', '--train=False', '--trust_network')


def test_presets_set_nothing_of_the_built_in_networks(own):
    """So that weights of a plain run of the network fit."""
    flags = ['main.py', *own[1], '--datasource=cifarfs']
    plain, preset = resolve(main.parse(flags)), resolve(main.parse([*flags, '--method=maml++']))
    assert preset.dropped == {'num_filters': 48, 'norm_scale': True} and preset.network_flags == plain.network_flags
    assert methods.name(preset.trained, False) == 'MAML++'


def test_files_that_are_no_networks(own):
    folder, flags = own
    (folder / 'broken.py').write_text('def net(:\n')
    for name in 'my.net', 'time', 'os':
        (folder / f'{name}.py').write_text('def net(shape, outputs):\n    pass\n')
        assert f'Python cannot import a file called {name}.py' in error_of(*flags[1:], f'--network={folder}/{name}.py:net')
    (folder / 'raises.py').write_text('raise RuntimeError("no such luck")\n')
    for value, words in [('net', 'must be FILE.py:FUNCTION'), ('missing.py:net', 'No such file'),
                         ('broken.py:net', 'invalid syntax in line 1'),
                         ('raises.py:net', 'raises RuntimeError when it is imported: no such luck'),
                         ('net.py:other', 'defines no function other; it has net'), ('net.py:number', 'defines no function number')]:
        assert words in error_of(*flags[1:], f'--network={folder}/{value}')
    for others, words in [(['--num_filters=8'], '--num_filters is for'), (['--input_shape=2,x'], 'sizes separated by commas'),
                          (['--input_shape=2,3'], 'is 6 numbers, and a row has 1')]:
        assert words in error_of(*flags, *others)
    assert '--check_network is for a network of your own' in error_of('--check_network=False')


# The examples -------------------------------------------------------------------------------------------------------------

with open(os.path.join(ROOT, 'docs', 'networks.md'), encoding='utf-8') as page:
    COMMANDS = re.findall(r'`python (main\.py [^`]*--network=[^`]*)`', page.read())
assert len(COMMANDS) == 7


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
    """Folders of tables with as many columns as each --input_shape asks for: files are classes; or, in 'y', tasks with a target y."""
    root, rng = tmp_path_factory.mktemp('tables'), np.random.default_rng(0)
    for columns, counts in {'64,1': 64, '6,3': 18, 'y': 3}.items():
        names = [f'c{number}' for number in range(counts - (columns == 'y'))] + ['y'] * (columns == 'y')
        for split in ('train', 'val', 'test'):
            (root / columns / split).mkdir(parents=True)
            for number in range(6):
                np.savetxt(root / columns / split / f'{split}{number}.csv', rng.normal(number, 1, [12, counts]), delimiter=',',
                           header=','.join(names), comments='')
    return root


@pytest.mark.slow
@pytest.mark.parametrize('command', [pytest.param(command, id=re.search(r'--network=\S*:(\w+)', command)[1]) for command in COMMANDS])
def test_examples_as_printed(command, tables, small_data, tmp_path, monkeypatch, few_tasks):
    """One iteration of each, with two tasks of images of 32 pixels and one inner step, and its evaluation."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'state'))
    flags = dict(re.findall(r'--(\w+)=(\S+)', command))
    flags['datasource'] = flags['datasource'].replace('miniimagenet', 'cifarfs')
    shape = flags.get('input_shape', flags.get('targets'))
    flags |= {'data_path': tables / shape if shape else small_data[flags['datasource']], 'logdir': tmp_path, 'metatrain_iterations': 1,
              'meta_batch_size': 2, 'num_updates': 1, 'update_batch_size': 1, 'num_test_tasks': 2, 'log': False,
              'check_network': ':wide' not in command}  # whose layers are those of narrow
    given = [f'--{name}={value}' for name, value in flags.items()]
    assert 'The last checkpoint is' in run_ok(*given)
    assert 'meta-test, 2 tasks' in run_ok(*given, '--train=False', '--test_set=True', '--test_updates=1')


def test_tables_from_omniglot(small_omniglot, tmp_path):
    example = module_at(os.path.join(ROOT, 'examples', 'omniglot_tables.py'))
    example.write_tables(str(small_omniglot), str(tmp_path))
    glyphs, pixels = (np.loadtxt(tmp_path / name, int, delimiter=',', skiprows=1) for name in ('glyphs.csv', 'pixels.csv'))
    assert glyphs.shape == (67 * 6, 101) and np.array_equal(np.unique(glyphs[:, 0], return_counts=True), [range(67), [6] * 67])
    assert pixels.shape == (67 * 100, 4)
    assert np.array_equal(pixels[:100, 3], glyphs[0, 1:]) and np.array_equal(pixels[123], [1, 2, 3, glyphs[6, 24]])
    with pytest.raises(SystemExit, match='prepare Omniglot first'):
        example.write_tables(str(tmp_path), str(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('name, millions', [('narrow', 8.0), ('wide_dropblock', 12.43)])
def test_sizes_of_resnet12(name, millions):
    """With the last layer for five classes."""
    function = network_file.load(network_file.read(os.path.join(ROOT, 'examples', f'resnet12.py:{name}')))
    side = 84 if name == 'narrow' else 32
    network = network_of(a_config((side, side, 3), dim_output=5, network=function))
    weights = {**network.initial_weights(0), **network.initial_norm_params()}
    assert round(sum(value.shape.num_elements() for value in weights.values()) / 1e6, 2) == millions
    assert network.random == (name == 'wide_dropblock')


def test_dropblock_drops_its_rate():
    """Of all numbers, in squares, also where one covers the whole image; and what is kept is scaled up."""
    keras.utils.set_random_seed(0)
    drop = module_at(os.path.join(ROOT, 'examples', 'resnet12.py')).DropBlock(0.1, 5)
    for side, lowest, highest in (5, 0.08, 0.12), (4, 0.08, 0.12), (10, 0.08, 0.1):  # squares overlap in the larger image
        x = np.ones([40, side, side, 100], np.float32)
        dropped = drop(x, training=True).numpy()
        assert lowest < np.mean(dropped == 0) < highest, side
        assert abs(dropped.mean() - 1) < 1e-3 and np.array_equal(drop(x), x)


ACTIVATION = 'relu'


def with_a_global(input_shape, outputs):
    return keras.Sequential([keras.Input(input_shape), layers.Dense(4, activation=ACTIVATION), layers.Dense(outputs)])


def with_a_class_of_its_own(input_shape, outputs):
    class Half(layers.Layer):
        def call(self, x):
            return x / 2
    return keras.Sequential([keras.Input(input_shape), Half(), layers.Dense(outputs, activation=lambda x: x + 0)])


@pytest.mark.usefixtures('eager')
def test_a_function_that_makes_another_model_than_before(monkeypatch):
    """As in a notebook, after a change of what the function uses: the network that was made before would be trained."""
    config = a_config((5,))
    network_of(dataclasses.replace(config, network=with_a_global)).initial_weights(1)
    network_of(dataclasses.replace(config, network=with_a_class_of_its_own)).initial_weights(1)
    monkeypatch.setitem(globals(), 'ACTIVATION', 'tanh')
    with pytest.raises(UserError, match='with_a_global makes another model than before; define the function again'):
        MAML(config, network=with_a_global)
    with pytest.raises(UserError, match='takes a function .* that makes a keras.Model, and this is such a model'):
        MAML(config, network=a_network()((5,), 3))


@pytest.mark.slow
@pytest.mark.usefixtures('eager')
def test_conv4_in_keras_is_the_built_in_one():
    assert max(stock_keras.errors(updates=2, alphas=[0.05])[1]) < 1e-10


@pytest.mark.slow
def test_the_table_of_layers():
    """Each kind is exact or refused."""
    errors = {kind: layer_table.error_of(kind, enough=1e-6) for kind in layer_table.kinds()}
    assert len(errors) == 39
    refused = {kind for kind, error in errors.items() if isinstance(error, str)}
    assert refused <= {'SpectralNormalization', 'UpSampling2D, bilinear', 'Resizing, bicubic'}
    assert all(error < 1e-6 for kind, error in errors.items() if kind not in refused), errors

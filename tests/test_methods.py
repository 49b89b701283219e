"""The methods of the family: their fixtures, closed forms on a tiny net, and what must hold whatever the numbers."""
import dataclasses
import functools
import glob
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import main
import maml
import runtime.compute.engine
from clusters import checkpoint
from conftest import ROOT, error_of, fixture_files, results_of, run_ok
from data_generator import TaskBatch
from maml import MAML, ModelConfig, inner_loop, objective, weights_at
from networks import network_of
from runtime.cli import flags, methods, rules, startup, workers
from runtime.cli.request import resolve
from runtime.compute.schedules import meta_lr, multi_step_weights, next_change
from runtime.jobs.ensemble import Ensemble
from runtime.jobs.learner import load
from runtime.system.errors import UserError
from utils import rows_of_step

FIXTURES = fixture_files('golden_methods', 'MAML_GOLDEN_METHODS')
FIELDS = {field.name for field in dataclasses.fields(ModelConfig)} - {'network'}


class Fixture:
    function = None  # that makes the network, if it is one's own
    ours = staticmethod(lambda name: name.replace('_', '/'))  # this program's name of a tensor: '0_beta' is '0/beta'

    def __init__(self, path):
        self.arrays = np.load(path)
        self.flags = flags = json.loads(str(self.arrays['config']))
        flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
        self.config = ModelConfig(**{name: value for name, value in flags.items() if name in FIELDS})
        self.updates, self.iteration = flags['num_updates_evaluated'], flags.get('iteration', 0)

    def group(self, name):
        return {self.ours(key.removeprefix(name + '/')): self.arrays[key] for key in self.arrays.files if key.startswith(name + '/')}

    def batch(self, dtype):
        x, y, rows = self.arrays['x'].astype(dtype), self.arrays['y'].astype(dtype), self.flags['support_rows']
        return TaskBatch(x[:, :rows], y[:, :rows], x[:, rows:], y[:, rows:])

    def model(self, dtype, **changes):
        model = MAML(dataclasses.replace(self.config, dtype=dtype, **changes), network=self.function)
        variables = {name: variable for name, variable in model.parameters().items() if not name.startswith('inner/')}
        initial = self.group('init')
        assert variables.keys() == initial.keys()
        for name, variable in variables.items():
            variable.assign(tf.cast(initial[name], dtype))
        return model


def relative(found, expected):
    """Norm of the difference over norm of the expected, over {name: array} with the same names."""
    assert found.keys() == expected.keys()
    difference = sum(np.sum(np.square(np.asarray(found[name], np.float64) - expected[name])) for name in expected)
    return np.sqrt(difference / sum(np.sum(np.square(value)) for value in expected.values()))


def fixtures(quick, among=FIXTURES):
    """Those that `quick` names, and the others marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in among]


def assert_agrees_in_double_precision(name, engine):
    fixture = Fixture(FIXTURES[name])
    model, batch = fixture.model('float64', engine=engine), fixture.batch(np.float64)
    assert relative(model.meta_gradients(batch, fixture.iteration), fixture.group('metagrad')) < 1e-8
    if fixture.config.outer == 'reptile':  # recorded are the weights only
        return
    metrics, outputs = model.evaluate(batch, fixture.updates), model.predict(batch, fixture.updates)
    np.testing.assert_allclose(metrics.pre_loss, fixture.arrays['pre_loss'], rtol=1e-8)
    np.testing.assert_allclose(metrics.post_losses, fixture.arrays['post_losses'], rtol=1e-8)
    np.testing.assert_allclose(outputs.post, fixture.arrays['post_outputs'], rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('name', fixtures(['anil_conv', 'boil_conv_adapt_norm_scale', 'first_order_step_rates', 'layer_rates_fc',
                                           'maml_plus_plus', 'meta_sgd_conv', 'meta_sgd_mse', 'train_support_norm',
                                           'reptile_adam_carried', 'reptile_adam_mse', 'reptile_sgd']))
def test_fixtures_in_double_precision(name):
    assert_agrees_in_double_precision(name, 'map')


@pytest.mark.parametrize('name', fixtures(['reptile_adam_mse']))
def test_fixtures_in_one_graph(name):
    assert_agrees_in_double_precision(name, 'vmap')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['anil_conv', 'maml_plus_plus', 'reptile_adam_carried', 'train_support_norm'])
@pytest.mark.usefixtures('fresh_models')
def test_the_graph_of_a_gpu(name, monkeypatch):
    """All tasks in one graph, compiled by XLA: what a GPU gets, here compiled for the CPU; by `benchmarks/gpu.py` every fixture."""
    monkeypatch.setattr(runtime.compute.engine, 'has_gpu', lambda: True)
    assert_agrees_in_double_precision(name, 'vmap')


@pytest.mark.parametrize('name', fixtures(['anil_conv', 'reptile_adam_mse']))
def test_fixtures_in_single_precision(name):
    fixture = Fixture(FIXTURES[name])
    model, batch = fixture.model('float32'), fixture.batch(np.float32)
    assert relative(model.meta_gradients(batch, fixture.iteration), fixture.group('metagrad')) < 1e-4
    if fixture.config.outer == 'reptile':
        return
    np.testing.assert_allclose(model.evaluate(batch, fixture.updates).post_losses, fixture.arrays['post_losses'], rtol=1e-4)


# A net small enough for closed forms ----------------------------------------------------------------------------------

TINY = ModelConfig(dim_input=1, dim_output=1, loss='mse', update_batch_size=2, update_lr=0.1, num_updates=2, norm='None',
                   dim_hidden=(1,), dtype='float64')
BATCH = TaskBatch(*(np.array(column, np.float64).reshape(1, 2, 1) for column in ([1, 2], [1, 0.5], [0.5, 1.5], [0, 1])))
START = {'w1': 0.8, 'b1': 0.1, 'w2': 0.5, 'b2': -0.2}
# The meta-gradients of w1, b1, w2, b2, by exact rational arithmetic.
CLOSED_FORMS = {
    'MAML': ({}, [-0.04935390594854663, 0.011270038080525187, -0.06550347767356007, 0.05870000134383024]),
    'first order': ({'stop_grad': True}, [-0.24096524074332326, -0.09049252658980939, -0.3880067206701206, -0.16627080635418767]),
    'ANIL': ({'inner_weights': 'head'}, [-0.099821119608, -0.030297835976, -0.1133673946, 0.00435902648]),
    'BOIL': ({'inner_weights': 'body'}, [-0.239743134765625, -0.1356553369140625, -0.5023239228515625, -0.271310673828125])}
RATES = {0: [-0.016893880965656024, -0.00007882476285184622, -0.04841165264999912, 0.01308151560397497],
         1: [0.002658427331629047, -0.0147972194027558, -0.008721755719659214, -0.05016307092302665]}
FIRST_ORDER_RATES = [-0.051558751835618685, -0.041944977379698614, -0.17168457840110984, -0.14992555473553926]


def tiny(**changes):
    model = MAML(dataclasses.replace(TINY, **changes))
    for name, value in START.items():
        model.weights[name].assign(np.full(model.weights[name].shape, value))
    return model


def numbers(gradients, prefix=''):
    return [np.asarray(gradients[prefix + name]).ravel() for name in START]


@pytest.mark.parametrize('name', CLOSED_FORMS)
def test_closed_forms(name):
    changes, expected = CLOSED_FORMS[name]
    np.testing.assert_allclose(np.ravel(numbers(tiny(**changes).meta_gradients(BATCH))), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures('eager')
def test_the_closed_form_of_the_multi_step_loss():
    """Weights 0.3 and 0.7 of the query losses after two updates: E = 10, iteration 4."""
    model = tiny(multi_step_loss=10)
    np.testing.assert_allclose([float(weight) for weight in multi_step_weights(model.config, 4)], [0.3, 0.7], rtol=1e-12)
    expected = [-0.07138273895773264, -0.006781976449882369, -0.09686054221274205, 0.034676179853181166]
    np.testing.assert_allclose(np.ravel(numbers(model.meta_gradients(BATCH, 4))), expected, rtol=1e-12)
    np.testing.assert_allclose(np.ravel(tiny().evaluate(BATCH, 2).post_losses), [0.09209862053125, 0.0833517432024749], rtol=1e-12)


@pytest.mark.usefixtures('eager')
def test_closed_forms_of_learned_rates():
    steps = np.array(numbers(tiny(learn_lr='step').meta_gradients(BATCH), 'lr/'))
    np.testing.assert_allclose(steps, np.array([RATES[0], RATES[1]]).T, rtol=1e-11, atol=1e-12)
    for kind in 'layer', 'weight':  # in this net every tensor is one number
        found = np.ravel(numbers(tiny(learn_lr=kind).meta_gradients(BATCH), 'lr/'))
        np.testing.assert_allclose(found, steps.sum(axis=1), rtol=1e-11)
        first_order = tiny(learn_lr=kind, stop_grad=True).meta_gradients(BATCH)
        np.testing.assert_allclose(np.ravel(numbers(first_order, 'lr/')), FIRST_ORDER_RATES, rtol=1e-11)


REPTILE = {'SGD': [0.8106983795, 0.1231759345, 0.522123918125, -0.15491525],  # the new weights, with an outer step size of 0.5
           'Adam': [0.8185723493242056, 0.11945181255031903, 0.5187452948074742, -0.180652040994804],  # phi after two steps
           'Adam, carried': [0.8262276390381755, 0.11761754014784642, 0.5254752456812526, -0.18246813614980834]}
REVERSED = TaskBatch(*BATCH[2:], *BATCH[:2])  # support and query rows change places


@pytest.mark.usefixtures('eager')
def test_reptile_with_inner_gradient_descent():
    model = tiny(outer='reptile', meta_optimizer='sgd', meta_lr=0.5)
    model.metatrain_step(BATCH)
    np.testing.assert_allclose(np.ravel(numbers(model.weights)), REPTILE['SGD'], rtol=1e-12)


@pytest.mark.usefixtures('eager')
def test_reptile_with_inner_adam_goes_on_with_its_moments():
    """Two tasks in one meta-batch, or in two iterations without an outer step: the second task starts from the moments of the first."""
    changes = dict(outer='reptile', inner_optimizer='adam', update_lr=0.01, meta_optimizer='sgd', meta_lr=0.0)
    start = np.array(list(START.values()))
    np.testing.assert_allclose(start - np.ravel(numbers(tiny(**changes).meta_gradients(BATCH))), REPTILE['Adam'], rtol=1e-12)
    both = TaskBatch(*map(np.concatenate, zip(BATCH, REVERSED)))
    mean = (np.array(REPTILE['Adam']) + REPTILE['Adam, carried']) / 2
    np.testing.assert_allclose(start - np.ravel(numbers(tiny(**changes).meta_gradients(both))), mean, rtol=1e-12)
    model = tiny(**changes)
    model.metatrain_step(BATCH)
    assert float(model.state()['inner/t']) == 2
    np.testing.assert_allclose(start - np.ravel(numbers(model.meta_gradients(REVERSED))), REPTILE['Adam, carried'], rtol=1e-12)
    assert float(model.state()['inner/t']) == 2  # asking for the gradient changes nothing
    found = model.predict(REVERSED, 2).post[-1]  # an evaluation starts from the trained moments, and leaves them
    again = tiny(**{**changes, 'outer': 'gradient', 'inner_optimizer': 'sgd'})
    for name, value in zip(START, REPTILE['Adam, carried']):
        again.weights[name].assign(np.full(again.weights[name].shape, value))
    np.testing.assert_allclose(found, again.predict(REVERSED, 0).post[0], rtol=1e-12)
    assert float(model.state()['inner/t']) == 2


@pytest.mark.slow
def test_reptile_is_what_the_official_program_computes():
    """Five meta-steps, second moments and both ways to evaluate: tests/golden_reptile/record.py, which ran that program."""
    golden = np.load(os.path.join(ROOT, 'tests', 'golden_reptile', 'official.npz'))
    flags = json.loads(str(golden['config']))
    # The official loss is the sum over rows: here with K = 1.
    model = MAML(ModelConfig(dim_input=golden['x'].shape[-1], dim_output=flags['way'], loss='xent', update_batch_size=1,
                             update_lr=flags['update_lr'], num_updates=flags['num_updates'], dim_hidden=tuple(flags['dim_hidden']),
                             outer='reptile', inner_optimizer='adam', adapt_norm=True, norm_scale=True, meta_optimizer='sgd',
                             meta_lr=flags['meta_lr'], dtype='float64'))
    parameters = {**model.weights, **model.norm_params}
    for name, variable in parameters.items():
        if name not in ('b1', 'b2'):  # biases before batch norm, which it does not have
            variable.assign(golden[f'init/{name}'])
    names = [name for name in parameters if f'init/{name}' in golden]
    eye = np.eye(flags['way'])
    for step, (x, labels) in enumerate(zip(golden['x'], golden['labels']), start=1):
        model.metatrain_step(TaskBatch(x, eye[labels], x, eye[labels]))
        for name in names if f'after{step}/w1' in golden else ():
            np.testing.assert_allclose(parameters[name], golden[f'after{step}/{name}'], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(model.state()[f'inner/v/{name}'], golden[f'moments{step}/{name}'], rtol=1e-9, atol=1e-12)
    for norm in 'batch', 'each':
        evaluated = model.variant(query_norm=norm)
        support_y, query_y = (eye[golden[f'{norm}/{part}_labels']][None] for part in ('support', 'query'))
        batch = TaskBatch(golden[f'{norm}/support_x'][None], support_y, golden[f'{norm}/query_x'][None], query_y)
        found = evaluated.predict(batch, flags['evaluated_updates']).post[-1][0]
        np.testing.assert_allclose(found, golden[f'{norm}/logits'], rtol=1e-8)


@pytest.mark.usefixtures('eager')
def test_reptile_with_one_step_is_joint_training():
    """With one step of inner SGD, theta - phi is the gradient of the support loss times the step size."""
    model = tiny(outer='reptile', num_updates=1)
    found, joint = model.meta_gradients(BATCH), model.pretrain_gradients(BATCH)
    np.testing.assert_allclose(numbers(found), 0.1 * np.array(numbers(joint)), rtol=1e-12)


def test_rows_of_inner_steps():
    """Passes over all rows, each in an order of its own, cut into parts without gaps."""
    for rows, size in (6, 4), (6, 6), (5, 10), (7, 3):
        stream = np.concatenate([rows_of_step(rows, size, step, 3) for step in range(6 * rows)])
        passes = stream[:len(stream) // rows * rows].reshape(-1, rows)
        assert np.array_equal(np.sort(passes, axis=1), np.tile(np.arange(rows), (len(passes), 1)))
        assert len({tuple(order) for order in passes}) > len(passes) / 2
        in_a_graph = tf.function(rows_of_step)(rows, size, tf.constant(2, tf.int64), tf.constant(3, tf.int64))
        assert np.array_equal(in_a_graph, rows_of_step(rows, size, 2, 3))
        compiled = tf.function(rows_of_step, jit_compile=True)(rows, size, tf.constant(2, tf.int64), tf.constant(3, tf.int64))
        assert np.array_equal(compiled, rows_of_step(rows, size, 2, 3))
    assert not np.array_equal(*([rows_of_step(30, 30, 0, iteration) for iteration in (0, 1)]))


def test_rows_are_those_of_earlier_versions():
    """Which sorted random floats; TensorFlow makes them of 23 random bits."""
    for rows, iteration in (10, 7), (75, 12345):
        floats = np.argsort(tf.random.stateless_uniform([rows], [iteration, 0]), kind='stable')
        assert np.array_equal(rows_of_step(rows, rows, 0, iteration), floats)


@pytest.mark.slow
@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('kind', ['no', 'layer'])
def test_parts_of_the_support_rows(kind):
    """Parts that hold all rows, in whatever order and however often, are the whole; smaller ones are not."""
    model = MAML(ModelConfig(dim_input=3, dim_output=2, loss='xent', update_batch_size=2, update_lr=0.1, num_updates=3, dtype='float64',
                             dim_hidden=(4,), learn_lr=kind, engine='map'))
    rng = np.random.default_rng(0)
    batch = TaskBatch(rng.normal(size=(2, 4, 3)), np.eye(2)[[[0, 1, 0, 1]] * 2], rng.normal(size=(2, 4, 3)), np.eye(2)[[[0, 1, 1, 0]] * 2])
    whole = model.meta_gradients(batch), model.evaluate(batch, 4)
    for size, same in (4, True), (8, True), (2, False):
        part = model.variant(inner_batch=size)
        found = part.meta_gradients(batch), part.evaluate(batch, 4)
        np.testing.assert_allclose(found[1].pre_loss, whole[1].pre_loss, rtol=1e-12)
        close = [np.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(tf.nest.flatten(found), tf.nest.flatten(whole))]
        assert all(close) if same else not all(close)


@pytest.mark.slow
def test_each_query_row_by_itself():
    """With query_norm='each', a query row's output is that in a batch with the support rows, whatever other query rows there are."""
    fixture = Fixture(FIXTURES['train_support_norm'])
    model, batch = fixture.model('float64', query_norm='each'), fixture.batch(np.float64)
    outputs = model.predict(batch, 2).post
    for row in range(batch.query_x.shape[1]):
        one = batch._replace(query_x=batch.query_x[:, row:row + 1], query_y=batch.query_y[:, row:row + 1])
        np.testing.assert_allclose(model.predict(one, 2).post, outputs[:, :, row:row + 1], rtol=1e-10)
    task, values = TaskBatch(*(tf.constant(array[0]) for array in batch)), tf.nest.map_structure(tf.constant, model.shared)
    config = dataclasses.replace(model.config, num_updates=2)
    state, network = inner_loop(config, values, task)[1][-1], network_of(config)
    together = tf.concat([task.support_x, task.query_x[3:4]], axis=0)
    tensors = weights_at(config, values, state.fast, 1)
    logits = network.head(tensors, network.features(tensors, together))
    np.testing.assert_allclose(outputs[-1, 0, 3], logits[-1], rtol=1e-10)


RECOMPUTED = ['anil_conv', 'maml_plus_plus', 'meta_sgd_mse', 'layer_rates_fc', 'reptile_adam_mse', 'step_rates_conv']


@pytest.mark.slow
@pytest.mark.parametrize('name', RECOMPUTED)
def test_recomputed_steps_give_the_same(name):
    fixture = Fixture(FIXTURES[name])
    found = fixture.model('float64', recompute=True).meta_gradients(fixture.batch(np.float64), fixture.iteration)
    assert relative(found, fixture.group('metagrad')) < 1e-8


def test_the_graph_does_not_grow_with_recomputed_steps():
    def operations(updates, recompute):
        model = tiny(num_updates=updates, recompute=recompute)
        graph = tf.function(lambda: model.meta_gradients(BATCH)).get_concrete_function().graph
        return len(graph.as_graph_def().node) + sum(len(one.node_def) for one in graph.as_graph_def().library.function)

    assert operations(4, True) == operations(40, True) and operations(8, False) > operations(4, False) * 1.2


# Identities -----------------------------------------------------------------------------------------------------------

def test_weights_of_the_multi_step_loss():
    """The table of MAML++'s program, E = 10 epochs and T = 5 updates."""
    config = dataclasses.replace(TINY, num_updates=5, multi_step_loss=5000, schedule_interval=500)
    for epoch, expected in (0, [0.2] * 5), (1, [0.18] * 4 + [0.28]), (5, [0.1] * 4 + [0.6]), (9, [0.02] * 4 + [0.92]):
        for iteration in 500 * epoch, 500 * epoch + 499:
            found = [float(weight) for weight in multi_step_weights(config, iteration)]
            np.testing.assert_allclose(found, expected, rtol=1e-12)
            assert sum(found) == pytest.approx(1)


@pytest.mark.usefixtures('eager')
def test_schedules_end_where_they_should():
    config = dataclasses.replace(TINY, multi_step_loss=7500, first_order_iterations=5500, schedule_interval=500)
    assert [next_change(config, iteration) for iteration in (0, 5499, 5500, 7499)] == [5500, 5500, 7500, 7500]
    assert next_change(config, 7500) == next_change(TINY, 0) == np.inf
    model, plain = tiny(multi_step_loss=10, first_order_iterations=20), tiny()
    np.testing.assert_array_equal(numbers(model.meta_gradients(BATCH, 20)), numbers(plain.meta_gradients(BATCH)))
    np.testing.assert_array_equal(numbers(model.meta_gradients(BATCH, 19)), numbers(tiny(stop_grad=True).meta_gradients(BATCH)))
    assert not np.allclose(numbers(model.meta_gradients(BATCH, 9)), numbers(model.meta_gradients(BATCH, 10)))


@pytest.mark.parametrize('kind', ['layer', 'step', 'weight'])
def test_equal_rates_are_one_rate(kind):
    """MAML with learned rates that are all alpha is MAML; the sum of their gradients is the derivative by alpha."""
    model = tiny(learn_lr=kind)
    found = model.meta_gradients(BATCH)
    np.testing.assert_allclose(numbers(found), numbers(tiny().meta_gradients(BATCH)), rtol=1e-12)

    def loss_at(rate):
        return float(np.mean(tiny(update_lr=rate).evaluate(BATCH, 2).post_losses[-1]))
    derivative = (loss_at(0.1 + 1e-6) - loss_at(0.1 - 1e-6)) / 2e-6
    assert sum(map(np.sum, numbers(found, 'lr/'))) == pytest.approx(derivative, rel=1e-6)


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('moved', ['head', 'body'])
def test_what_the_inner_loop_leaves_alone(moved):
    """The other tensors stay as they are to the last bit inside, and are trained by the outer loop."""
    fixture = Fixture(FIXTURES['anil_conv'])
    model, batch = fixture.model('float64', inner_weights=moved), fixture.batch(np.float64)
    gradients = model.meta_gradients(batch)
    task, parameters = TaskBatch(*(tf.constant(array[0]) for array in batch)), model.shared
    state = inner_loop(model.config, parameters, task)[1][-1]
    for name, variable in model.weights.items():
        same = np.array_equal(weights_at(model.config, parameters, state.fast, 0)[name], variable)
        assert same == (name not in state.fast) or name.startswith('b'), name
        if name in ('w5', 'b5'):
            assert same == (moved == 'body'), name
        elif name.startswith('conv'):
            assert same == (moved == 'head') and np.abs(gradients[name]).max() > 0, name


@pytest.mark.usefixtures('fresh_models', 'eager')
def test_features_that_stay_are_computed_once_or_again(monkeypatch):
    """ANIL with features computed once is ANIL with features computed in every step."""
    fixture = Fixture(FIXTURES['anil_conv'])
    batch, found = fixture.batch(np.float64), fixture.model('float64')
    once = found.evaluate(batch, 4), found.meta_gradients(batch)
    monkeypatch.setattr(maml, 'has_fixed_features', lambda config: False)
    again = fixture.model('float64')
    for one, other in zip(tf.nest.flatten(once), tf.nest.flatten((again.evaluate(batch, 4), again.meta_gradients(batch)))):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-14)


@pytest.mark.slow
@pytest.mark.usefixtures('eager')
def test_equal_norm_sets_are_one_set():
    fixture = Fixture(FIXTURES['norm_scale_stride'])
    shared, batch = fixture.model('float64'), fixture.batch(np.float64)
    sets = MAML(dataclasses.replace(shared.config, norm_per_step=True))
    for group in 'weights', 'norm_params':
        for name, variable in getattr(shared, group).items():
            getattr(sets, group)[name].assign(tf.broadcast_to(variable, getattr(sets, group)[name].shape))
    one, other = shared.meta_gradients(batch), sets.meta_gradients(batch)
    for name, gradient in one.items():
        np.testing.assert_allclose(gradient, tf.reduce_sum(other[name], axis=0) if '/' in name else other[name], rtol=1e-9, atol=1e-14)
    for mine, theirs in zip(shared.evaluate(batch, 4), sets.evaluate(batch, 4)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


def test_adapted_normalisation_of_each_step():
    """An evaluation, and gradient checkpointing, look up the offsets of a step whose number is a tensor."""
    config = ModelConfig(dim_input=4, dim_output=3, dim_hidden=(5,), loss='xent', update_batch_size=1, update_lr=0.5, num_updates=2,
                         adapt_norm=True, norm_per_step=True)
    model, rng = MAML(config), np.random.default_rng(0)
    batch = TaskBatch(*(array.astype(np.float32) for _ in range(2) for array in (rng.random((2, 3, 4)), np.eye(3)[None].repeat(2, axis=0))))
    tasks = [TaskBatch(*(tf.constant(array[number]) for array in batch)) for number in range(2)]
    states = [inner_loop(config, model.shared, task)[1] for task in tasks]
    losses = [objective(config, model.shared, task, state, 0)[0] for task, state in zip(tasks, states)]
    np.testing.assert_allclose(model.evaluate(batch, 2).post_losses[-1], losses, rtol=1e-5)
    others = MAML(dataclasses.replace(config, recompute=True)).meta_gradients(batch)
    for name, gradient in model.meta_gradients(batch).items():
        np.testing.assert_allclose(gradient, others[name], rtol=1e-4, atol=1e-7)


SWITCHES = {
    'ANIL with learned rates': dict(inner_weights='head', learn_lr='step'),
    'BOIL with a multi-step loss': dict(inner_weights='body', adapt_norm=True, norm_scale=True, multi_step_loss=10),
    'first-order Meta-SGD': dict(learn_lr='weight', stop_grad=True, num_updates=1),
    'all at once': dict(learn_lr='step', adapt_norm=True, norm_scale=True, norm_per_step=True, mean_loss=True, multi_step_loss=10,
                        query_norm='support'),
    'ANIL, adapting norms': dict(inner_weights='head', adapt_norm=True),
    'layer norm, adapted': dict(norm='layer_norm', adapt_norm=True, norm_per_step=True),
    'each query row by itself': dict(query_norm='each', norm_scale=True),
    'parts of the support rows': dict(inner_batch=2, learn_lr='layer', num_updates=3),
    'recomputed': dict(recompute=True, learn_lr='step', adapt_norm=True, multi_step_loss=10),
    'the solution of a ridge regression': dict(head_init='ridge', num_updates=0, ridge_lambda=0.7, ridge_scale=3.0),
    'ridge regression and BOIL, recomputed': dict(head_init='ridge', inner_weights='body', recompute=True, ridge_lambda=0.7),
    'ProtoMAML with ANIL, learned rates and support statistics': dict(head_init='prototypes', inner_weights='head', learn_lr='weight',
                                                                      query_norm='support'),
    'a shared column, multi-step loss': dict(head_init='shared', learn_lr='step', norm_per_step=True, multi_step_loss=10)}

QUICK_SWITCHES = 'ANIL with learned rates', 'all at once', 'recomputed', 'the solution of a ridge regression'


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('switches', [
    pytest.param(switches, id=name, marks=[] if name in QUICK_SWITCHES else pytest.mark.slow) for name, switches in SWITCHES.items()])
def test_finite_differences_through_switches(switches):
    """Central differences of the objective along random directions, in every parameter, learned rates included."""
    config = ModelConfig(**{**dict(dim_input=196, dim_output=3, loss='xent', update_batch_size=1, update_lr=0.1, num_updates=2,
                                   dtype='float64', image_shape=(14, 14, 1), num_filters=4), **switches})
    rng = np.random.default_rng(0)
    model = MAML(config)
    parameters = tf.nest.map_structure(lambda v: v.numpy() + 0.3 * rng.normal(size=v.shape), model.shared)
    x, y = rng.random((1, 9, 196)), np.eye(3)[np.tile(np.arange(3), 3)][None]
    batch = TaskBatch(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])
    task = TaskBatch(*(tf.constant(array[0]) for array in batch))

    def assign(values):
        tf.nest.map_structure(lambda variable, value: variable.assign(value), model.shared, values)

    def objective_at(values):
        values = tf.nest.map_structure(tf.constant, values)
        _, states = inner_loop(model.config, values, task, 3)
        return float(objective(model.config, values, task, states, 3)[0])

    assign(parameters)
    exact = model.meta_gradients(batch, 3)
    for _ in range(2):
        direction = tf.nest.map_structure(lambda value: rng.normal(size=np.shape(value)), parameters)
        if config.stop_grad:  # the gradient is that of the objective with respect to learned rates only
            direction = tf.nest.map_structure(np.zeros_like, direction)._replace(learning_rates=direction.learning_rates)
        at = [objective_at(tf.nest.map_structure(lambda value, along, size=size: value + size * along, parameters, direction))
              for size in (1e-7, -1e-7)]
        slope = sum(float(np.sum(exact[name] * along)) for group in direction for name, along in group.items())
        assert (at[0] - at[1]) / 2e-7 == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_the_outer_step_size_moves():
    config = dataclasses.replace(TINY, meta_lr=0.1, meta_lr_final=0.02, metatrain_iterations=1000, schedule_interval=100)
    for kind, expected in ('linear', {0: 0.1, 99: 0.1, 100: 0.092, 500: 0.06, 1000: 0.02, 2000: 0.02}), (
            'cosine', {0: 0.1, 250: 0.02 + 0.04 * (1 + np.cos(0.2 * np.pi)), 500: 0.06, 1000: 0.02}):
        moving = dataclasses.replace(config, meta_lr_schedule=kind)
        for iteration, rate in expected.items():
            assert float(meta_lr(moving, iteration)) == pytest.approx(rate, rel=1e-12), (kind, iteration)
    assert meta_lr(config, 5) == 0.1
    assert float(meta_lr(dataclasses.replace(config, meta_lr_schedule='linear', meta_lr_final=0.0), 1000)) == 0


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('schedule, factor', [('constant', 1), ('linear', 0.75)])
def test_plain_gradient_descent_outside(schedule, factor):
    """The weights move by the step size of the iteration times the meta-gradient."""
    model = tiny(meta_optimizer='sgd', meta_lr=0.5, meta_lr_schedule=schedule, metatrain_iterations=40)
    gradients = model.meta_gradients(BATCH)
    before = {name: variable.numpy() for name, variable in model.weights.items()}
    model.metatrain_step(BATCH, 10)
    for name, variable in model.weights.items():
        np.testing.assert_allclose(variable, before[name] - 0.5 * factor * gradients[name], rtol=1e-12)
    assert set(model.state()) == set(before)


# The program ----------------------------------------------------------------------------------------------------------

SINUSOID = ['--datasource=sinusoid', '--update_batch_size=5', '--norm=None', '--meta_batch_size=2', '--engine=map']
IMAGES = ['--datasource=omniglot', '--update_batch_size=1', '--num_filters=4', '--meta_batch_size=2', '--update_lr=0.4']


@pytest.mark.slow
def test_schedules_and_learned_rates_resume_to_the_bit(tmp_path):
    """An interruption within a stage and at its end; the first stage ends within what is one call else."""
    flags = [*SINUSOID, '--num_updates=2', '--learn_lr=step', '--multi_step_loss=5', '--first_order_iterations=2']
    run_ok(*flags, f'--logdir={tmp_path / "whole"}', '--metatrain_iterations=6')
    for last in 1, 2, 5, 6:
        run_ok(*flags, f'--logdir={tmp_path / "parts"}', f'--metatrain_iterations={last}')
    whole, parts = checkpoint(tmp_path / 'whole', 6), checkpoint(tmp_path / 'parts', 6)
    assert whole.keys() == parts.keys() and 'lr/w1' in whole and not np.array_equal(whole['lr/w1'], [0.001, 0.001])
    for name in whole.keys() - {'record'}:  # it says which checkpoint was best, and there are more of them
        assert np.array_equal(whole[name], parts[name]), name


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    pytest.param(['--num_updates=2', '--norm=batch_norm', '--norm_scale', '--norm_per_step', '--adapt_norm', '--learn_lr=weight'],
                 id='norms'),
    pytest.param(['--method=reptile', '--norm=batch_norm', '--num_updates=3', '--inner_batch=2'], id='reptile')])
def test_norm_sets_and_moments_resume_to_the_bit(flags, tmp_path):
    """Offsets and scales of each step; second moments and their count that Reptile's tasks hand on, and its schedule."""
    flags = [*SINUSOID, '--metatrain_iterations=6', *flags]
    run_ok(*flags, f'--logdir={tmp_path / "whole"}', '--save_interval=3')
    shutil.copytree(tmp_path / 'whole', tmp_path / 'parts')
    for path in tmp_path.glob('parts/*/model6.*'):
        path.unlink()
    assert 'model3' in run_ok(*flags, f'--logdir={tmp_path / "parts"}', '--save_interval=3')
    whole, parts = checkpoint(tmp_path / 'whole', 6), checkpoint(tmp_path / 'parts', 6)
    assert whole.keys() == parts.keys() and len(whole) > 9
    for name in whole:
        assert np.array_equal(whole[name], parts[name]), name


def test_a_run_with_another_end_is_another_run(tmp_path):
    """Where the outer step size depends on the last iteration, that is part of the run."""
    flags = [*SINUSOID, f'--logdir={tmp_path}', '--meta_lr_schedule=cosine', '--meta_optimizer=sgd']
    run_ok(*flags, '--metatrain_iterations=2')
    assert 'made with --metatrain_iterations=2, and not with' in error_of(*flags, '--metatrain_iterations=4')


@pytest.mark.slow
def test_a_plain_checkpoint_starts_a_run_with_more(tmp_path, small_omniglot):
    """Learned rates start at --update_lr, scales at 1, and each inner step's offsets at the trained ones."""
    data = [*IMAGES, f'--data_path={small_omniglot}', f'--logdir={tmp_path}']
    run_ok(*data, '--metatrain_iterations=2')
    prefix = next(tmp_path.glob('*/model2.index')).with_suffix('')
    more = [*data, '--metatrain_iterations=1', '--num_updates=2', '--learn_lr=step', '--norm_scale', '--norm_per_step', '--meta_lr=0']
    assert 'Starting from the weights' in run_ok(*more, f'--load_from={prefix}')
    found, = tmp_path.glob('*normscale*/model1.index')
    read = functools.partial(tf.train.load_variable, str(found.with_suffix('')))
    plain = tf.train.load_variable(str(prefix), '0/beta')
    assert np.array_equal(read('0/beta'), [plain, plain]) and np.array_equal(read('0/gamma'), np.ones([2, 4]))
    assert np.allclose(read('lr/conv1'), 0.4) and np.array_equal(read('conv1'), tf.train.load_variable(str(prefix), 'conv1'))


@pytest.mark.slow
@pytest.mark.parametrize('method, name, label', [
    ('anil', 'ANIL', '.innerhead'), ('boil', 'BOIL', 'updatelr0.5hidden4batchnorm.innerbody.adaptnorm.normscale.meanloss'),
    ('metasgd', 'Meta-SGD', '.learnlrweight'),
    ('reptile', 'Reptile', '.adaptnorm.normscale.linear.final0.0.sgd.reptile.inneradam.batch10')])
def test_presets_of_the_program(method, name, label, tmp_path, small_omniglot):
    data = [flag for flag in IMAGES if 'update_lr' not in flag] + [f'--data_path={small_omniglot}', f'--logdir={tmp_path}']
    flags = [*data, f'--method={method}', '--metatrain_iterations=2']
    run_ok(*flags)
    directory, = (path for path in tmp_path.iterdir() if path.is_dir())
    assert directory.name.endswith(label)
    run_ok(*flags, '--train=False', '--num_test_tasks=3')
    run_ok(f'--run={directory}', '--train=False', '--num_test_tasks=4', '--test_updates=2')
    entries = results_of(directory)
    assert [entry.training.method for entry in entries] == [name, name]
    assert len(entries[1].figures) == 3 and entries[1].setting.headline_updates == 2
    assert '--run names a run, whose method is known' in error_of(f'--run={directory}', '--method=maml', '--train=False')


@pytest.mark.slow
def test_maml_plus_plus_of_the_program(tmp_path, small_omniglot):
    """Through first-order, multi-step and last stages; then the best checkpoints together, one of them, and too many."""
    data = [flag for flag in IMAGES if 'update_lr' not in flag] + [f'--data_path={small_omniglot}', f'--logdir={tmp_path}']
    flags = [*data, '--method=maml++', '--num_filters=4', '--multi_step_loss=3', '--first_order_iterations=1', '--schedule_interval=1',
             '--num_updates=2', '--ensemble=2', '--test_query=1']
    run_ok(*flags, '--metatrain_iterations=4', '--save_interval=1')
    evaluation = [*flags, '--train=False', '--num_test_tasks=3']
    assert 'mean outputs of model' in run_ok(*evaluation)
    run_ok(*evaluation, '--ensemble=1', '--test_best')
    directory, = (path for path in tmp_path.iterdir() if path.is_dir())
    together, best = results_of(directory)
    assert len(together.ensemble) == 2 and together.ensemble[0] == best.iterations and best.ensemble == []
    assert (together.is_best and best.is_best and together.setting.headline_updates == 5
            and together.training.method.startswith('MAML++ with'))
    assert '--ensemble=3: only 2 checkpoints were validated and kept' in run_ok(*evaluation, '--ensemble=3')
    assert '--test_best name different checkpoints' in error_of(*evaluation, '--test_best')
    assert '--load_from names one' in error_of(*evaluation, f'--load_from={directory}/model4')
    assert isinstance(load(directory).model, Ensemble)
    chosen = load(directory, checkpoint=2)
    assert os.path.basename(chosen.checkpoint) == 'model2' and not isinstance(chosen.model, Ensemble)


@pytest.mark.slow
@pytest.mark.usefixtures('eager')
def test_an_ensemble_of_one_checkpoint_is_that_checkpoint():
    """Several times the same; two different ones are the mean of their outputs; with fewer outputs too."""
    fixture = Fixture(FIXTURES['layer_rates_fc'])
    batch, model = fixture.batch(np.float64), fixture.model('float64', engine='map')
    member = {name: variable.numpy() for name, variable in model.parameters().items()}
    other = {name: value * 1.1 for name, value in member.items()}
    alone = model.evaluate(batch, 3)
    for mine, theirs in zip(Ensemble(fixture.model('float64', engine='map'), [member] * 5).evaluate(batch, 3), alone):
        if theirs is not None:
            np.testing.assert_allclose(mine, theirs, rtol=1e-12)
    both = Ensemble(fixture.model('float64', engine='map'), [member, other])
    found, first = both.predict(batch, 3), model.predict(batch, 3)
    for name, variable in model.parameters().items():
        variable.assign(other[name])
    second = model.predict(batch, 3)
    np.testing.assert_allclose(found.post, (first.post + second.post) / 2, rtol=1e-12)
    np.testing.assert_allclose(both.variant(num_updates=7).predict(batch, 3).post, found.post, rtol=1e-12)
    np.testing.assert_allclose(found.pre, (first.pre + second.pre) / 2, rtol=1e-12)


@pytest.mark.slow
def test_norms_of_query_rows_in_training(tmp_path):
    """A directory of its own, found by the same command with --train=False; --run=DIR evaluates otherwise than it was trained."""
    flags = [flag for flag in SINUSOID if 'norm' not in flag] + [f'--logdir={tmp_path}']
    run_ok(*flags, '--query_norm=support', '--metatrain_iterations=2')
    directory, = (path for path in tmp_path.iterdir() if path.is_dir())
    assert directory.name.endswith('batchnorm.querynormsupport')
    evaluation = [*flags, '--train=False', '--num_test_tasks=3']
    assert str(directory) in run_ok(*evaluation, '--query_norm=support')
    assert 'there is no checkpoint' in error_of(*evaluation)
    run_ok(f'--run={directory}', '--train=False', '--num_test_tasks=3')
    run_ok(f'--run={directory}', '--train=False', '--num_test_tasks=3', '--query_norm=both')
    run_ok(f'--run={directory}', '--train=False', '--num_test_tasks=3', '--query_norm=each')
    assert sorted(entry.setting.query_norm for entry in results_of(directory)) == ['batch', 'each', 'support']
    run_ok(*flags, '--metatrain_iterations=2')
    plain, = (path for path in tmp_path.iterdir() if path.is_dir() and path != directory)
    assert str(directory) in run_ok(*evaluation, '--query_norm=support')
    assert str(plain) in run_ok(*evaluation, '--query_norm=both')
    assert str(plain) in run_ok(f'--run={plain}', '--train=False', '--num_test_tasks=3', '--query_norm=support')


@pytest.mark.slow
def test_parts_of_the_support_rows_in_evaluation(tmp_path):
    """An evaluation may take parts of another size; the flags of the training name the run."""
    flags = [*SINUSOID, f'--logdir={tmp_path}', '--inner_batch=2']
    run_ok(*flags, '--metatrain_iterations=2')
    directory, = (path for path in tmp_path.iterdir() if path.is_dir())
    assert directory.name.endswith('.batch2')
    assert str(directory) in run_ok(*flags, '--train=False', '--num_test_tasks=3')
    assert str(directory) in run_ok(f'--run={directory}', '--inner_batch=3', '--train=False', '--num_test_tasks=3')
    assert sorted(entry.setting.inner_batch for entry in results_of(directory)) == [2, 3]


def preset(*flags):
    return resolve(main.parse(['main.py', '--datasource=omniglot', *flags])).values


def title(*flags):
    return methods.title(preset(*flags))


def test_presets_are_the_table_and_flags_override_them():
    assert not any(preset(f'--method={name}')[flag] != value
                   for name, entry in methods.PRESETS.items() for flag, value in entry.flags.items())
    assert preset('--method=boil', '--update_lr=0.1')['update_lr'] == 0.1
    assert title('--method=fomaml') == title('--stop_grad') == 'first-order MAML' and title() == 'MAML'
    assert title('--method=anil', '--learn_lr=step') == 'ANIL with learn_lr=step'
    assert title('--learn_lr=layer', '--mean_loss') == 'MAML with learn_lr=layer, mean_loss'
    assert title('--method=boil', '--adapt_norm=False') == 'BOIL with adapt_norm=False'
    assert all(title(f'--method={name}') == entry.title for name, entry in methods.PRESETS.items())


@pytest.mark.parametrize('flags, words', [
    (['--norm=layer_norm', '--norm_scale'], '--norm_scale is for batch norm'),
    (['--norm=None', '--adapt_norm'], '--adapt_norm is for networks with a normalisation'),
    (['--norm=None', '--norm_per_step'], '--norm_per_step is for networks with'), (['--mean_loss'], '--mean_loss is for classification'),
    (['--schedule_interval=5'], '--schedule_interval needs a schedule'), (['--meta_lr_final=0.1'], 'needs --meta_lr_schedule'),
    (['--meta_lr_schedule=linear', '--meta_lr_final=-2'], 'must not be negative'),
    (['--train_update_batch_size=3'], '--train_update_batch_size=3 contradicts --update_batch_size=5'),
    (['--train_update_lr=0.5'], '--train_update_lr=0.5 contradicts --update_lr=0.001'),
    (['--method=matchingnet'], 'method'), (['--inner_optimizer=adam'], 'needs --outer=reptile'),
    (['--outer=reptile', '--stop_grad'], '--stop_grad is about a gradient through the inner loop'),
    (['--outer=reptile', '--multi_step_loss=5'], '--multi_step_loss is about a gradient'),
    (['--outer=reptile', '--learn_lr=step'], '--learn_lr is about a gradient'),
    (['--outer=reptile', '--first_order_iterations=5'], '--first_order_iterations is about a gradient'),
    (['--outer=reptile', '--query_norm=support'], 'learns from support examples alone'),
    (['--query_norm=both'], '--query_norm=both is for evaluation'), (['--recompute', '--engine=wide'], 'leave out --engine=wide'),
    (['--recompute', '--engine=vmap'], 'leave out --engine=vmap'),
    (['--ensemble=2', '--train=False', '--test_iter=5'], 'name different checkpoints')])
def test_what_means_nothing_is_refused(flags, words):
    assert words in error_of(*flags)


@pytest.mark.parametrize('flags, hint', [
    (['--method=maml++', '--datasource=omniglot', '--outer=reptile'],
     ' (--method=maml++ sets --learn_lr=step and --multi_step_loss=7500 and --first_order_iterations=5500; a flag on'),
    (['--method=reptile', '--meta_lr_schedule=constant'], ' (--method=reptile sets --meta_lr_final=0.0; '),
    (['--method=fomaml', '--stop_grad', '--num_updates=0'], '')])
def test_a_flag_that_a_preset_sets_is_named(flags, hint):
    sentence = error_of(*flags)
    assert hint in sentence and ('--method' in sentence) == bool(hint)


@pytest.mark.parametrize('given, dropped', [
    (['--method=maml++'], ['num_filters', 'mean_loss']), (['--method=boil', '--norm=None'], ['mean_loss', 'adapt_norm', 'norm_scale']),
    (['--method=maml++', '--datasource=omniglot'], []),
    (['--method=boil', '--datasource=omniglot', '--norm=layer_norm'], ['norm_scale']),
    (['--method=protomaml', '--datasource=omniglot', '--norm=None'], ['query_norm'])])
def test_a_preset_drops_what_has_no_meaning(given, dropped):
    """For the source, or the network; the same flag is refused where the user gives it."""
    request = resolve(main.parse(['main.py', *given]))
    assert set(request.dropped) == set(dropped) and all(request.values[name] == flags.default(name) for name in dropped)
    rules.check_flags(request)
    for name in dropped:
        assert f'--{name} is for ' in error_of(*given, f'--{name}={request.dropped[name]}')


def test_what_a_preset_drops_is_said(capsys, monkeypatch):
    monkeypatch.setattr(startup, 'import_tensorflow', lambda *_: startup.Replicas())
    startup.run_and_data(main.parse(['main.py', '--method=boil', '--norm=None']))
    assert capsys.readouterr().out == ('--method=boil without --adapt_norm=True, --norm_scale=True, --mean_loss=True: the source or the '
                                       'network has no use for them\n')


@pytest.mark.parametrize('given, note', [
    ('--method=boil --num_updates=5 --test_query=3',
     'Note: --method=boil has --num_updates=1; the command line or its --flagfile has --num_updates=5, which is used\n'),
    ('--method=boil --num_updates=1', ''), ('--method=fomaml --stop_grad --update_lr=0.1', ''), ('--num_updates=7', '')])
def test_what_overrides_a_preset_is_said(given, note, small_omniglot, capsys, monkeypatch):
    """It may come from a --flagfile, which is for another method."""
    monkeypatch.setattr(startup, 'import_tensorflow', lambda *_: startup.Replicas())
    source = ['--datasource=omniglot', '--update_batch_size=1', f'--data_path={small_omniglot}']
    startup.run_and_data(main.parse(['main.py', *source, *given.split()]))
    assert capsys.readouterr().out == note


def test_moments_that_tasks_hand_on_need_one_device():
    with pytest.raises(UserError, match='--inner_optimizer=adam .* 2 replicas'):
        workers.check_one_after_the_other('adam', 2)
    workers.check_one_after_the_other('adam', 1)
    workers.check_one_after_the_other('sgd', 2)


@pytest.mark.slow
def test_a_run_is_evaluated_with_the_updates_of_its_method(tmp_path):
    """Reptile's 50 updates, with --run as with the whole command; and what updates beyond the trained ones use is said."""
    flags = [*SINUSOID, '--method=reptile', '--norm=batch_norm', '--num_updates=2', '--inner_batch=2', '--metatrain_iterations=1']
    run_ok(*flags, f'--logdir={tmp_path}', '--save_interval=1')
    run, = tmp_path.iterdir()
    output = run_ok(f'--run={run}', '--train=False', '--num_test_tasks=3')
    entry, = results_of(run)
    assert entry.setting.headline_updates == 50 and len(entry.figures) == 51 and 'beyond' not in output
    steps = [*SINUSOID, '--learn_lr=step', '--num_updates=2', f'--logdir={tmp_path / "steps"}']
    run_ok(*steps, '--metatrain_iterations=1')
    assert '(updates after number 2 use its step sizes' in run_ok(*steps, '--train=False', '--num_test_tasks=3')
    assert 'beyond' not in run_ok(*steps, '--train=False', '--num_test_tasks=3', '--test_updates=2')


EXAMPLES = {'inner_momentum': "norm='None', inner_momentum=0.9"}
EXAMPLE = """
import numpy as np, tensorflow as tf, main
from runtime.cli.startup import import_tensorflow
import_tensorflow()
from data_generator import TaskBatch
from maml import MAML, ModelConfig
rng = np.random.default_rng(0)
labels = np.eye(2)[[[0, 1, 1, 0]]]
batch = TaskBatch(rng.normal(size=(1, 4, 3)), labels, rng.normal(size=(1, 4, 3)), labels)
gradients = []
for more in {}, {'engine': 'map'}, {'recompute': True}:
    model = MAML(ModelConfig(dim_input=3, dim_output=2, loss='xent', update_batch_size=2, update_lr=0.1, num_updates=2,
                             dim_hidden=(4,), dtype='float64', CHANGES, **more))
    rng = np.random.default_rng(1)
    for variable in model.parameters().values():
        variable.assign(rng.normal(size=variable.shape))
    gradients.append(model.meta_gradients(batch))
for name, gradient in gradients[0].items():
    for other in gradients[1:]:
        np.testing.assert_allclose(gradient, other[name], rtol=1e-10)
direction = {name: rng.normal(size=v.shape) for name, v in model.weights.items()}
def loss(size):
    for name, variable in model.weights.items():
        variable.assign_add(size * direction[name])
    return float(model.evaluate(batch, 2).post_losses[-1, 0])
above = loss(1e-6)
below = loss(-2e-6)
slope = sum(float(np.sum(gradient * direction[name])) for name, gradient in gradients[0].items())
assert abs((above - below) / 2e-6 - slope) < 1e-6 * abs(slope), ((above - below) / 2e-6, slope)
assert 'FLAG' in main.parse(['main.py']).values and np.any(gradients[0]['w1'])
plain = MAML(ModelConfig(dim_input=3, dim_output=2, loss='xent', update_batch_size=2, update_lr=0.1, num_updates=2, norm='None',
                         dim_hidden=(4,), dtype='float64'))
plain.copy_parameters(model)
assert abs(float(plain.evaluate(batch, 2).post_losses[-1, 0]) - float(model.evaluate(batch, 2).post_losses[-1, 0])) > 1e-3
"""


@pytest.mark.slow
@pytest.mark.parametrize('flag, changes', EXAMPLES.items(), ids=EXAMPLES)
def test_the_examples_of_methods_work(flag, changes, tmp_path):
    """docs/changing-the-algorithm.md: the printed lines in a copy of the program, in both engines and recomputed; finite differences."""
    with open(os.path.join(ROOT, 'docs', 'changing-the-algorithm.md'), encoding='utf-8') as file:
        diff, = (diff for diff in re.findall(r'```diff\n(.*?)```', file.read(), re.S) if flag in diff)
    shutil.copytree(os.path.join(ROOT, 'runtime'), tmp_path / 'runtime')
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(path, tmp_path)
    for name, hunk in re.findall(r'@@ (\S+)\n(.*?)(?=^@@|\Z)', diff, re.S | re.M):
        lines = hunk.splitlines(keepends=True)
        before, after = (''.join(line[1:] for line in lines if line[0] != sign) for sign in '+-')
        text = (tmp_path / name).read_text()
        assert text.count(before) == 1, before
        (tmp_path / name).write_text(text.replace(before, after))
    program = EXAMPLE.replace('CHANGES', changes).replace("'FLAG'", repr(flag))
    process = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


def test_the_page_of_methods_lists_the_presets():
    with open(os.path.join(ROOT, 'docs', 'methods.md'), encoding='utf-8') as file:
        page = file.read()
    for name, entry in methods.PRESETS.items():
        flags = ' '.join(f'--{flag}' if value is True else f'--{flag}={value}' for flag, value in entry.flags.items())
        assert f'| `{name}` | {entry.title} | ' in page and (not flags or f'`{flags}`' in page), name

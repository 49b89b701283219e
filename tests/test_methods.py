"""The methods of the family: their fixtures, closed forms on a tiny net, and what must hold whatever the numbers; see also
test_methods_as_programs.py."""
import dataclasses
import json
import os
from typing import get_args, get_type_hints

import numpy as np
import pytest
import tensorflow as tf

import maml
import runtime.compute.engine
from conftest import ROOT, fixture_files
from data_generator import TaskBatch
from maml import MAML, ModelConfig, inner_loop, objective, weights_at
from networks import HEADS, network_of
from runtime.compute.optimizers import bounded, outer_optimizers, outer_updates
from runtime.compute.schedules import config_at, meta_lr, multi_step_weights, next_change
from runtime.jobs.ensemble import Ensemble
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


def assert_agrees_in_double_precision(name, engine, predict=True):
    fixture = Fixture(FIXTURES[name])
    model, batch = fixture.model('float64', engine=engine), fixture.batch(np.float64)
    assert relative(model.meta_gradients(batch, fixture.iteration), fixture.group('metagrad')) < 1e-8
    if fixture.config.outer == 'reptile':  # recorded are the weights only
        return
    metrics = model.evaluate(batch, fixture.updates)
    np.testing.assert_allclose(metrics.pre_loss, fixture.arrays['pre_loss'], rtol=1e-8)
    np.testing.assert_allclose(metrics.post_losses, fixture.arrays['post_losses'], rtol=1e-8)
    if predict:
        outputs = model.predict(batch, fixture.updates)
        np.testing.assert_allclose(outputs.post, fixture.arrays['post_outputs'], rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('name', fixtures(['anil_conv', 'boil_conv_adapt_norm_scale', 'first_order_step_rates', 'layer_rates_fc',
                                           'maml_plus_plus', 'meta_sgd_conv', 'meta_sgd_mse', 'train_support_norm',
                                           'reptile_adam_carried', 'reptile_adam_mse', 'reptile_sgd']))
def test_fixtures_in_double_precision(name):
    assert_agrees_in_double_precision(name, 'map')


# What these add is vectorised in maml_plus_plus and norm_scale_stride.
ALIKE_IN_ONE_GRAPH = {'norm_per_step_scale_pool', 'step_rates_conv', 'mean_loss', 'multi_step_loss', 'multi_step_loss_over'}


@pytest.mark.parametrize('name', fixtures(['reptile_adam_mse'], [name for name in FIXTURES if name not in ALIKE_IN_ONE_GRAPH]))
def test_fixtures_in_one_graph(name):
    assert_agrees_in_double_precision(name, 'vmap')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['anil_conv', 'maml_plus_plus', 'reptile_adam_carried', 'train_support_norm'])
@pytest.mark.usefixtures('fresh_models')
def test_the_graph_of_a_gpu(name, monkeypatch):
    """All tasks in one graph, compiled by XLA: what a GPU gets, here compiled for the CPU; by `benchmarks/gpu.py` every fixture."""
    monkeypatch.setattr(runtime.compute.engine, 'has_gpu', lambda: True)
    assert_agrees_in_double_precision(name, 'vmap', predict=False)  # an evaluation compiles the same steps


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


RECOMPUTED = ['anil_conv', 'maml_plus_plus', 'meta_sgd_mse', 'layer_rates_fc', 'reptile_adam_mse']


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


def test_schedules_change_at_their_intervals():
    """Where they end within an interval, they hold until its end."""
    config = dataclasses.replace(TINY, first_order_iterations=7, multi_step_loss=12, schedule_interval=5)
    assert [next_change(config, iteration) for iteration in (0, 9, 10, 14, 15)] == [10, 10, 15, 15, np.inf]
    for iteration in range(20):
        assert config_at(config, iteration).stop_grad == (iteration < 10)
        assert bool(config_at(config, iteration).multi_step_loss) == (iteration < 15)


@pytest.mark.usefixtures('eager')
def test_the_rows_of_each_inner_step():
    """With `inner_batch`, a step is one on the rows of its number and iteration."""
    model, task = tiny(), TaskBatch(*(tf.constant(array[0]) for array in BATCH))
    parameters, seen = model.shared, set()
    for iteration in range(6):
        states = inner_loop(dataclasses.replace(TINY, inner_batch=1), parameters, task, iteration)[1]
        state = maml.initial_state(TINY, parameters, task)
        for step, after in enumerate(states):
            rows = rows_of_step(2, 1, step, iteration)
            seen.add((step, int(rows[0])))
            part = task._replace(support_x=tf.gather(task.support_x, rows), support_y=tf.gather(task.support_y, rows))
            state, _ = maml.inner_step(TINY, parameters, part, state, step)
            for name, value in state.fast.items():
                np.testing.assert_allclose(after.fast[name], value, rtol=1e-12)
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_what_is_bounded_and_what_is_not():
    """Numbers of weights first, then the norm of all; neither in pre-training nor with Reptile."""
    config = dataclasses.replace(TINY, clip=0.5, clip_norm=1.0, meta_optimizer='sgd', meta_lr=1.0)
    found = bounded(config, {'w': tf.constant([3., -0.1]), 'lr/w': tf.constant([2.])})
    expected = np.array([0.5, -0.1, 2.0])
    np.testing.assert_allclose([*found['w'], *found['lr/w']], expected / np.linalg.norm(expected), rtol=1e-6)
    for phase, outer in ('pretrain', 'gradient'), ('metatrain', 'reptile'):
        variables = {'w': tf.Variable([0.])}
        other = dataclasses.replace(config, outer=outer)
        outer_updates(other, outer_optimizers(other, variables))[phase]({'w': tf.constant([5.])}, 0)
        assert variables['w'].numpy() == -5


def test_what_a_step_reports():
    """The metrics of the tasks before the step, as an evaluation has them."""
    config = ModelConfig(dim_input=4, dim_output=3, dim_hidden=(5,), loss='xent', update_batch_size=1, update_lr=0.5, num_updates=2)
    rng, labels = np.random.default_rng(0), np.tile(np.eye(3, dtype=np.float32), (4, 1, 1))
    batch = TaskBatch(*(rng.normal(size=[4, 3, 4]).astype(np.float32) if number % 2 == 0 else labels for number in range(4)))
    model = MAML(config)
    for step in model.pretrain_step, model.metatrain_step:
        expected, found = model.evaluate(batch, 2).reported(), step(batch)
        for name in 'loss', 'accuracy':
            before, *_, after = np.mean(expected[name], axis=1)
            np.testing.assert_allclose([found[f'pre_{name}'], found[f'post_{name}']], [before, after], rtol=1e-5)


@pytest.mark.usefixtures('eager')
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


@pytest.mark.slow
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


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('share, factor', [(0.2, 0.2), (5, 1)])
def test_the_norm_of_the_meta_gradient_is_bounded(share, factor):
    """That of all tensors together, to a share of it; a smaller one is followed as it is, to the bit. What it was is reported."""
    gradients = tiny().meta_gradients(BATCH)
    norm = float(np.sqrt(sum(np.sum(np.square(gradient)) for gradient in gradients.values())))
    free, model = (tiny(meta_optimizer='sgd', meta_lr=0.5, clip_norm=bound) for bound in (0, share * norm))
    before = {name: variable.numpy() for name, variable in model.parameters().items()}
    for each in (free, model):
        np.testing.assert_allclose(each.metatrain_step(BATCH)['gradient_norm'], norm, rtol=1e-12)
    for name, variable in model.parameters().items():
        np.testing.assert_allclose(variable, before[name] - 0.5 * factor * gradients[name], rtol=1e-12)
        assert factor < 1 or np.array_equal(variable, free.parameters()[name])


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


# Configs from Python ------------------------------------------------------------------------------------------------

REGRESSION = ModelConfig(dim_input=3, dim_output=2, loss='mse', update_batch_size=4, update_lr=0.1, dim_hidden=(4,), norm='None')
TASKS = TaskBatch(*(np.random.default_rng(number).normal(size=[4, 4, size]).astype(np.float32) for number, size in enumerate((3, 2, 3, 2))))


@pytest.mark.parametrize('changes, words', [
    (dict(norm='batchnorm'), "norm='batchnorm' must be one of 'batch_norm', 'layer_norm', 'None'"),
    (dict(learn_lr=None, query_norm='both'), "learn_lr=None must be one of .*; query_norm='both' must be one of"),
    (dict(head_init='shared', inner_weights='body'), "head_init=shared starts with equal outputs for all classes"),
    (dict(inner_optimizer='adam'), "inner_optimizer='adam' needs outer='reptile'"),
    (dict(num_updates=0, head_init='ridge', multi_step_loss=3), 'multi_step_loss is about inner updates'),
    (dict(num_updates=0, head_init='ridge', norm_per_step=True), 'norm_per_step is about inner updates')])
def test_configs_that_make_no_sense(changes, words):
    with pytest.raises(UserError, match=words):
        MAML(dataclasses.replace(REGRESSION, **changes))


def test_each_head_is_a_choice():
    assert set(get_args(get_type_hints(ModelConfig)['head_init'])) == set(HEADS)


@pytest.mark.usefixtures('fresh_models')
def test_lists_are_taken_for_tuples_and_the_seed_is_that_of_random_layers():
    config = dataclasses.replace(REGRESSION, dim_hidden=[3, 3])
    assert MAML(config).config.dim_hidden == (3, 3)
    assert MAML(config, seed=np.int64(4)).config.mask_seed == 4 == MAML(dataclasses.replace(config, mask_seed=4)).variant().config.mask_seed


@pytest.mark.parametrize('ours, theirs', [('float64', np.float32), ('float32', np.float64)])
def test_batches_of_another_dtype_are_cast(ours, theirs):
    model = MAML(dataclasses.replace(REGRESSION, dtype=ours))
    same, other = (TaskBatch(*(np.asarray(array, dtype) for array in TASKS)) for dtype in (np.float32, theirs))
    for compute in (lambda batch: model.meta_gradients(batch), lambda batch: model.evaluate(batch, 1)._asdict(),
                    lambda batch: model.predict(batch, 1)._asdict()):
        for first, second in zip(*(filter(tf.is_tensor, tf.nest.flatten(compute(batch))) for batch in (same, other))):
            assert first.dtype == second.dtype == ours
            np.testing.assert_array_equal(first, second)
    assert model.metatrain_step(other)['finite'] and model.pretrain_step(other, iteration=3)['finite']


@pytest.mark.parametrize('kept, changes', [(dict(learn_lr='step'), {}), (dict(norm_per_step=True, norm='batch_norm'), {}),
                                           (dict(norm='batch_norm'), dict(norm_per_step=True))])
def test_a_variant_with_other_steps_adapts_as_before(kept, changes):
    """What each step has is kept; further steps have what the last one has. So evaluations are the same, which do this too."""
    model = MAML(dataclasses.replace(REGRESSION, **{'num_updates': 2, **kept}))
    rng = np.random.default_rng(0)
    for variable in model.parameters().values():
        variable.assign(variable + rng.normal(0, 0.05, variable.shape))
    expected = model.evaluate(TASKS, 3).post_losses
    np.testing.assert_allclose(model.variant(num_updates=3, **changes).evaluate(TASKS, 3).post_losses, expected, rtol=1e-5)
    np.testing.assert_allclose(model.variant(num_updates=1, **changes).evaluate(TASKS, 1).post_losses, expected[:1], rtol=1e-5)


def test_chunks_fit_a_smaller_batch():
    model = MAML(dataclasses.replace(REGRESSION, task_chunk=4))
    first, whole = TaskBatch(*(array[:2] for array in TASKS)), MAML(REGRESSION)
    for found, expected in zip(model.meta_gradients(first).values(), whole.meta_gradients(first).values()):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)

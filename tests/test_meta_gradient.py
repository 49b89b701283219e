"""The meta-gradient is the derivative of what is trained: by hand on a tiny problem, by finite differences elsewhere."""
import dataclasses
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import maml
from conftest import ROOT
from data_generator import TaskBatch
from maml import MAML, ModelConfig, Parameters, inner_loop, loss_of
from networks import network_of
from runtime.compute.optimizers import Adam
from special_grads import batch_standardize, standardize
from utils import conv2d

IMAGE = dict(dim_input=64, dim_output=3, loss='xent', update_batch_size=2, update_lr=0.1, num_updates=2,
             image_shape=(8, 8, 1), num_filters=4)
DENSE = dict(dim_input=2, dim_output=1, loss='mse', update_batch_size=4, update_lr=0.05, num_updates=2,
             dim_hidden=(5, 4))
NETS = {
    'strided': IMAGE,
    'strided, flattened': dict(IMAGE, head='flatten'),
    'max pool': dict(IMAGE, image_shape=(16, 16, 1), dim_input=256, max_pool=True),
    'dense': DENSE,
    'dense, classifying': dict(DENSE, dim_output=3, loss='xent', update_batch_size=2),
}


def problem(config, seed=0):
    """Random weights and one random task, in float64."""
    rng = np.random.default_rng(seed)
    draw = lambda value: tf.constant(np.asarray(value) + 0.7 * rng.normal(size=np.shape(value)))
    weights = {name: draw(value) for name, value in network_of(config).initial_weights(seed).items()}
    norm_params = {name: draw(value) for name, value in network_of(config).initial_norm_params().items()}
    rows = config.update_batch_size * (config.dim_output if config.loss == 'xent' else 1)
    x = lambda: tf.constant(rng.random((rows, config.dim_input)))
    if config.loss == 'xent':
        y = lambda: tf.constant(np.eye(config.dim_output)[rng.permutation(rows) % config.dim_output])
    else:
        y = lambda: tf.constant(rng.normal(size=(rows, config.dim_output)))
    return weights, norm_params, TaskBatch(x(), y(), x(), y())


def objective(config, task, weights, norm_params):
    parameters = Parameters(weights, norm_params)
    _, states = inner_loop(config, parameters, task)
    return maml.objective(config, parameters, task, states, 0)[0]


def gradient(config, task, parameters):
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        loss = objective(config, task, *parameters)
    return tape.gradient(loss, parameters, unconnected_gradients='zero')


def inner(left, right):
    return sum(float(tf.reduce_sum(a * b)) for a, b in zip(tf.nest.flatten(left), tf.nest.flatten(right)))


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize('norm', ['batch_norm', 'layer_norm', 'None'])
@pytest.mark.parametrize('net', NETS)
def test_finite_differences(net, norm):
    """Along random directions, central differences in float64 agree to 1e-6; the first-order gradient is another."""
    config = ModelConfig(norm=norm, **NETS[net])
    *parameters, task = problem(config)
    exact, first_order = (gradient(dataclasses.replace(config, stop_grad=stop), task, parameters) for stop in (False, True))
    difference = tf.nest.map_structure(lambda a, b: a - b, exact, first_order)
    assert inner(difference, difference) > 1e-6 * inner(exact, exact)
    rng = np.random.default_rng(1)
    for _ in range(2):
        direction = tf.nest.map_structure(lambda value: tf.constant(rng.normal(size=value.shape)), parameters)
        at = lambda size, direction=direction: float(objective(config, task, *tf.nest.map_structure(
            lambda value, along: value + size * along, parameters, direction)))
        step = 1e-6
        difference = (at(step) - at(-step)) / (2 * step)
        assert abs(difference - inner(exact, direction)) < 1e-6 * max(1, abs(difference))


def test_one_weight_by_hand():
    """f(x) = w x + b with one point each: (w x - y)^2, one inner step, worked out on paper."""
    config = ModelConfig(dim_input=1, dim_output=1, loss='mse', update_batch_size=1, update_lr=0.1, norm='None',
                         dim_hidden=())
    w, b, x, y, query_x, query_y = 1.5, 0.5, 2.0, 1.0, -1.0, 3.0
    column = lambda value: tf.constant([[value]], tf.float64)
    task = TaskBatch(column(x), column(y), column(query_x), column(query_y))
    weights = {'w1': column(w), 'b1': tf.constant([b], tf.float64)}

    error = w * x + b - y                                     # 2.5
    fast_w, fast_b = w - 0.2 * error * x, b - 0.2 * error     # gradient step: d(error^2) = 2 error (x, 1)
    query_error = fast_w * query_x + fast_b - query_y
    # d fast_w = (1 - 0.2 x^2) dw - 0.2 x db;  d fast_b = -0.2 x dw + (1 - 0.2) db
    by_w = 2 * query_error * ((1 - 0.2 * x * x) * query_x - 0.2 * x)
    by_b = 2 * query_error * (-0.2 * x * query_x + 0.8)

    support_outputs, ((fast, *_),) = inner_loop(config, Parameters(weights, {}), task)
    np.testing.assert_allclose([support_outputs[0, 0], fast['w1'][0, 0], fast['b1'][0]], [w * x + b, fast_w, fast_b])
    gradients, _ = gradient(config, task, (weights, {}))
    np.testing.assert_allclose([gradients['w1'][0, 0], gradients['b1'][0]], [by_w, by_b])

    first_order, _ = gradient(dataclasses.replace(config, stop_grad=True), task, (weights, {}))
    np.testing.assert_allclose([first_order['w1'][0, 0], first_order['b1'][0]], [2 * query_error * query_x, 2 * query_error])


def test_classification_loss_is_summed_and_divided_by_the_shots():
    config = ModelConfig(dim_input=1, dim_output=4, loss='xent', update_batch_size=2, update_lr=0.1)
    rows = tf.zeros([12, 4]), tf.one_hot(np.arange(12) % 4, 4)
    np.testing.assert_allclose(loss_of(config, *rows), 12 * np.log(4) / 2, rtol=1e-6)


@pytest.mark.usefixtures('eager')
def test_meta_gradient_is_clipped_elementwise():
    """Adam does not see the scale of a gradient, so look at its first moment: 0.1 times the clipped gradient."""
    config = ModelConfig(norm='None', **dict(DENSE, update_lr=0.001))
    *_, task = problem(config)
    batch = TaskBatch(*(100 * tf.cast(array, tf.float32)[None] for array in task))
    free, clipped = MAML(config), MAML(dataclasses.replace(config, clip=0.5))
    gradients = free.meta_gradients(batch)
    assert max(float(tf.reduce_max(tf.abs(value))) for value in gradients.values()) > 0.5
    clipped.metatrain_step(batch)
    for name, value in gradients.items():
        moment = clipped.state()[f'metatrain/adam/m/{name}']
        np.testing.assert_allclose(moment, 0.1 * np.clip(value, -0.5, 0.5), rtol=1e-4, atol=1e-7)


def test_adam_against_its_formula():
    """Two steps worked out with the bias corrections of the paper (Kingma & Ba, algorithm 1)."""
    variable, gradients = tf.Variable([1.0]), [0.5, -2.0]
    adam = Adam({'w': variable}, learning_rate=lambda iteration: 0.1)
    value, mean, square = 1.0, 0.0, 0.0
    for step, g in enumerate(gradients, start=1):
        adam.apply({'w': tf.constant([g])})
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        value -= 0.1 * (mean / (1 - 0.9 ** step)) / np.sqrt(square / (1 - 0.999 ** step))
        np.testing.assert_allclose(variable, [value], rtol=1e-5)


@pytest.mark.slow
def test_steps_in_one_call_equal_single_steps():
    config = ModelConfig(norm='None', engine='map', **DENSE)
    batches = [problem(config, seed)[2] for seed in range(6)]
    stacked = TaskBatch(*(np.stack([np.asarray(field, np.float32) for field in fields]).reshape(3, 2, *fields[0].shape)
                          for fields in zip(*batches)))
    one, many = MAML(config), MAML(config)
    for phase, step in (('pretrain', one.pretrain_step), ('metatrain', one.metatrain_step)):
        losses = [step(TaskBatch(*(field[i] for field in stacked)))['post_loss'] for i in range(3)]
        np.testing.assert_allclose(many.train_steps(phase, stacked)['post_loss'], losses, rtol=1e-6)
    for name, variable in one.state().items():
        np.testing.assert_allclose(many.state()[name], variable, rtol=1e-5, atol=1e-8, err_msg=name)


def test_initial_weights_depend_on_seed_and_follow_the_stated_distributions():
    config = ModelConfig(dim_input=784, dim_output=5, loss='xent', update_batch_size=1, update_lr=0.4,
                         image_shape=(28, 28, 1))
    weights, again, other = (network_of(config).initial_weights(seed) for seed in (3, 3, 4))
    assert all(np.array_equal(weights[name], again[name]) for name in weights)
    assert not np.array_equal(weights['conv2'], other['conv2'])
    limit = np.sqrt(6 / (9 * 128))
    assert 0.99 * limit < np.max(np.abs(weights['conv2'])) < limit
    assert 0.8 < np.std(weights['w5']) < 1.2
    dense = network_of(dataclasses.replace(config, image_shape=None, dim_hidden=(256, 128, 64, 64))).initial_weights(3)
    assert np.max(np.abs(dense['w1'])) < 0.0201 and 0.008 < np.std(dense['w1']) < 0.01
    assert not any(np.any(weights[name]) for name in weights if name.startswith('b'))


@pytest.mark.parametrize('norm', ['batch_norm', 'layer_norm', 'None'])
def test_output_shapes(norm):
    for net in NETS.values():
        config = ModelConfig(norm=norm, **net)
        network = network_of(config)
        tensors = {**network.initial_weights(0), **network.initial_norm_params()}
        outputs = network.head(tensors, network.features(tensors, tf.zeros([7, config.dim_input])))
        assert outputs.shape == (7, config.dim_output)


def twice(function, x, first, second):
    """A function's value, its gradient along `first`, and the gradient of that along `second`, with respect to x and first."""
    with tf.GradientTape() as outer:
        outer.watch((x, first))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        gradient = tape.gradient(y, x, first)
    return [y, gradient, *outer.gradient(gradient, (x, first), second)]


@pytest.mark.parametrize('shape', [(3, 4, 6, 2), (2, 5, 7, 3)])
@pytest.mark.parametrize('pool', [False, True])
def test_batch_standardize_is_the_plain_formula(pool, shape):
    """Value and both derivatives, as automatic differentiation finds them; odd sizes too."""
    rng = np.random.default_rng(0)
    x, direction = tf.constant(3 + rng.normal(size=shape)), tf.constant(rng.normal(size=shape))
    upstream = tf.constant(rng.normal(size=(shape[0], shape[1] // 2, shape[2] // 2, shape[3]) if pool else shape))

    def plain(x):
        x = standardize(x, [0, 1, 2], 1e-3)
        return tf.nn.max_pool2d(x, 2, 2, 'VALID') if pool else x
    for ours, expected in zip(twice(lambda x: batch_standardize(x, 1e-3, pool), x, upstream, direction),
                              twice(plain, x, upstream, direction)):
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_of_equal_corners_one_is_taken():
    """The gradient of a window's largest goes to one corner, though all are equal."""
    x = tf.concat([tf.ones([1, 2, 2, 1]), tf.zeros([1, 2, 2, 1])], axis=0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = batch_standardize(x, 1e-3, pool=True)
    gradient = tape.gradient(y, x, tf.constant([1., 0.], shape=[2, 1, 1, 1])).numpy().ravel()
    assert len(set(gradient[1:4])) == 1 and gradient[0] > gradient[1] + 0.5


def test_tapes_make_no_derivatives_of_compiled_loops():
    """For these the tapes of the inner and the outer loop would have functions compiled that return all intermediate values too."""
    image, pooled = tf.TensorSpec([2, 4, 4, 1]), tf.TensorSpec([2, 2, 2, 1])
    function = tf.function(lambda x, g, w: twice(lambda x: batch_standardize(x, 1e-3, pool=True), x, g, w), autograph=False)
    library = function.get_concrete_function(image, pooled, image).graph.as_graph_def().library.function
    loops = {re.sub(r'_\d+$', '', definition.signature.name) for definition in library}
    assert loops == {f'__inference__{name}' for name in ('row_mean_of_squares', 'shift_and_scale', 'winner_and_mean', 'first',
                                                         'pick_and_means', 'second')}


@pytest.mark.parametrize('pool', [False, True])
def test_normalisation_within_vectorized_map(pool):
    """tf.vectorized_map drops custom gradients; tapes around it then differentiate the operations, as those of --query_norm=each do."""
    images, weights = (tf.constant(np.random.default_rng(0).random(shape))
                       for shape in ([3, 2, 5, 5, 1], [2, 2, 2, 1] if pool else [2, 5, 5, 1]))
    gradients = []
    for mapped in tf.vectorized_map, lambda function, values: tf.stack([function(value) for value in values]):
        with tf.GradientTape() as tape:
            tape.watch(images)
            total = tf.reduce_sum(mapped(lambda x: batch_standardize(x, 1e-3, pool), images) * weights)
        gradients.append(tape.gradient(total, images))
    np.testing.assert_allclose(*gradients, atol=1e-10)
    assert np.abs(gradients[0]).max() > 0.1


def test_third_derivatives_are_refused():
    x = tf.ones([2, 4, 4, 1], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(x)
        *_, second, _ = twice(lambda x: batch_standardize(x, 1e-3), x, x, x)
    with pytest.raises(LookupError, match='third derivative'):
        tape.gradient(second, x)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [4, 7])
def test_convolution_as_matmul(size, stride):
    """The same as TensorFlow's, and so are the derivatives with respect to images and kernel."""
    rng = np.random.default_rng(0)
    x, kernel = tf.constant(rng.normal(size=(2, size, size + 1, 3))), tf.constant(rng.normal(size=(3, 3, 3, 5)))
    results = []
    for function in conv2d, lambda x, kernel, stride, **_: tf.nn.conv2d(x, kernel, stride, 'SAME'):
        with tf.GradientTape() as tape:
            tape.watch((x, kernel))
            y = function(x, kernel, stride, as_matmul=True)
            loss = tf.reduce_sum(tf.sin(y))
        results.append([y, *tape.gradient(loss, (x, kernel))])
    for ours, expected in zip(*results):
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('factor, small', [(1, True), (1.01, False)])
def test_the_check_of_gradients_sees_a_wrong_one(factor, small):
    """Of sin(w) + v^2, whose derivatives are known."""
    from gradient_check import errors_of_differences
    at = {'w': np.array(0.3), 'v': np.array([1.0, -2.0])}
    loss = lambda offsets: np.sin(at['w'] + offsets['w']) + np.sum(np.square(at['v'] + offsets['v']))
    errors = errors_of_differences({'w': np.cos(at['w']), 'v': factor * 2 * at['v']}, loss, np.random.default_rng(0))
    assert (max(errors) < 1e-5) == small


@pytest.mark.slow
def test_gradients_of_a_shipped_model():
    printed = subprocess.run([sys.executable, os.path.join(ROOT, 'benchmarks', 'gradient_check.py'), 'logs/sine', '--tasks=1'], cwd=ROOT,
                             check=True, capture_output=True, text=True).stdout
    single, double = (float(re.search(rf'{against} +(\S+)', printed)[1]) for against in ('float64', 'differences'))
    assert single < 1e-5 and double < 1e-5


@pytest.mark.slow
def test_the_largest_gradient_of_a_training(capsys):
    """On the shipped sinusoid: it is right, and the norm of the mean over tasks is not above that of the largest task."""
    from gradient_check import examine_norms
    examine_norms(os.path.join(ROOT, 'logs', 'sine'), 3, 70000)
    text = capsys.readouterr().out
    (_, largest), (_, of_task) = re.findall(r'(\S+) \(median\), (\S+) \(largest', text)
    single, double = map(float, re.search(r'float64 (\S+), float64 against central differences (\S+);', text).groups())
    before, after = map(float, re.search(r'support losses (\S+), (\S+)\n', text).groups())
    assert 0 < float(largest) <= float(of_task) and single < 1e-5 and double < 1e-5 and after < before


@pytest.mark.slow
def test_a_training_in_both_precisions(capsys):
    """On the shipped sinusoid: rounding does not change a few steps."""
    from gradient_check import train_in_both
    train_in_both(os.path.join(ROOT, 'logs', 'sine'), 3)
    text = capsys.readouterr().out
    single, double = map(float, re.search(r'to iteration 70003: float32 (\S+), float64 (\S+)', text).groups())
    after_single, after_double = map(float, re.findall(r'trained in float\d+: (\S+)', text))
    assert 0 < single == pytest.approx(double, rel=1e-3) and 0 < after_single == pytest.approx(after_double, rel=1e-3)

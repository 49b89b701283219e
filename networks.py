"""What a network is, the reference's two, any Keras model, and where the last layer of a task comes from.

A network is pure: it owns no variables, its tensors are an argument. So the inner loop can run it with a task's fast weights.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import random
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context  # for the state of the random numbers, which has no public name

from runtime.system.errors import UserError, first_line, listing
from runtime.system.interruption import Interrupted
from special_grads import exact_statistics
from utils import at_step, conv_block, dense_block, glorot_uniform, truncated_normal, with_dense_gradient

if TYPE_CHECKING:
    from maml import ModelConfig

CONV_LAYERS = (1, 2, 3, 4)
MASKS = 'masks'  # the name of the tensor from which random layers draw: [seed, iteration], at an inner step [seed, iteration, step]
ROWS = 4  # that a model is tried on
FLOATS = {'float16', 'bfloat16', 'float32', 'float64'}
RANDOM_OPERATIONS = {'RandomUniform', 'RandomUniformInt', 'RandomStandardNormal', 'TruncatedNormal', 'RandomShuffle', 'Multinomial',
                     'RandomGamma'}
HEAD_PREFIX = 'head/'  # of the names of what last layers have besides the network's tensors
CLASSIFIER = f'{HEAD_PREFIX}classifier/'  # of the tensors of a last layer for all classes of meta-training
RIDGE_SCALARS = f'{HEAD_PREFIX}lambda', f'{HEAD_PREFIX}scale', f'{HEAD_PREFIX}bias'  # what `ridge_regression` learns
NEIGHBOURS = f'{HEAD_PREFIX}features', f'{HEAD_PREFIX}labels'  # the support rows of `nearest_neighbour`
LOOPS = {'While', 'StatelessWhile'}  # as of recurrent layers
LEAST_GRADIENT = 1e-4  # of outputs with respect to a weight on which they depend
COSINE_SCALE = 2.0  # of logits, the number of Chen et al. (2019)
Tensors = dict[str, tf.Tensor]


class Network(Protocol):
    """Rows [rows, dim_input] -> features [rows, features] -> outputs [rows, dim_output], given its tensors {name: tensor}.

    Attributes:
        head_names: names of the last layer's matrix, [features, dim_output], and bias, [dim_output].
        convolutional: whether it has convolutions: such networks are not compiled by XLA on a CPU (runtime/compute/engine.py).
        loops: whether it has loops, as recurrent layers have.
        vectorizes: whether all tasks can be computed in one graph.
        random: whether it computes something else in training, such as by the masks of dropout.
        description: text for the console.
    """
    head_names: Sequence[str]
    convolutional: bool
    loops: bool
    vectorizes: bool
    random: bool
    description: str

    def initial_weights(self, seed: int) -> Tensors:
        """All weights, float32; a function of the seed."""

    def initial_norm_params(self) -> Tensors:
        """Offsets and scales of normalisation, float32. Their names differ from those of the weights."""

    def features(self, tensors: Tensors, x: tf.Tensor, stats_rows: int | None = None) -> tf.Tensor:
        """The input of the last layer. With batch norm it depends on the rows that provide the statistics.

        Args:
            tensors: weights and norm parameters; in training also MASKS, if the network is `random`.
            x: float [rows, dim_input]; images in [0, 1], flattened.
            stats_rows: batch norm takes its statistics from the first `stats_rows` rows; None: from all.
        """

    def head(self, tensors: Tensors, features: tf.Tensor) -> tf.Tensor:
        """The last layer: features [rows, features] -> outputs [rows, dim_output]."""
        matrix, bias = self.head_names
        return features @ tensors[matrix] + tensors[bias]


@functools.cache
def network_of(config: ModelConfig) -> Network:
    """The network that a config describes. Raises UserError if it is one's own and cannot be used with that config."""
    if config.network:
        shape = config.input_shape or config.image_shape or (config.dim_input,)
        network = _keras_network(config.network, shape, config.dim_output, config.dtype)
        network.check(config)
        return network
    return ConvNet(config) if config.image_shape else DenseNet(config)


class DenseNet(Network):
    """Fully connected layers `dim_hidden`, each normalised and rectified, and a linear one.

    Weights `w1 b1 w2 b2 ...`: [inputs, units] by `truncated_normal`, biases [units] 0, as in the reference.
    """
    convolutional, loops, vectorizes, random = False, False, True, False

    def __init__(self, config: ModelConfig):
        self._config, last = config, len(config.dim_hidden) + 1
        self.head_names = f'w{last}', f'b{last}'
        # Reference behaviour: there is no scope 1.
        self._scopes = {layer: '0' if layer == 1 else str(layer) for layer in range(1, last)}
        self.description = f'fully connected, {"-".join(map(str, config.dim_hidden))}, norm {config.norm}'

    def initial_weights(self, seed: int) -> Tensors:
        config = self._config
        sizes = config.dim_input, *config.dim_hidden, config.dim_output
        return _drawn(seed, ((f'w{layer}', truncated_normal, shape) for layer, shape in enumerate(zip(sizes, sizes[1:]), start=1)))

    def initial_norm_params(self) -> Tensors:
        return _initial_norm_params(self._config, zip(self._scopes.values(), self._config.dim_hidden))

    def features(self, tensors: Tensors, x: tf.Tensor, stats_rows: int | None = None) -> tf.Tensor:
        for layer, scope in self._scopes.items():
            x = dense_block(x, tensors[f'w{layer}'], tensors[f'b{layer}'], self._config.norm, scope, tensors, stats_rows)
        return x


class ConvNet(Network):
    """Four blocks of 3x3 convolution, normalisation and ReLU that halve the image, and a linear layer.

    Weights `conv1 b1 ... conv4 b4 w5 b5`: convolutions [3, 3, channels, num_filters] by `glorot_uniform`; w5 [features,
    dim_output] by it after flattening, standard normal after averaging over space; biases 0; as in the reference.
    """
    convolutional, loops, vectorizes, random = True, False, True, False
    head_names = 'w5', 'b5'

    def __init__(self, config: ModelConfig):
        self._config = config
        self.description = (f'4 convolutions of {config.num_filters} filters, {"max pooling" if config.max_pool else "stride 2"}, '
                            f'norm {config.norm}')

    def initial_weights(self, seed: int) -> Tensors:
        config, (height, width, channels) = self._config, self._config.image_shape
        for _ in CONV_LAYERS:
            height, width = (size // 2 if config.max_pool else -(-size // 2) for size in (height, width))
        inputs = [channels] + [config.num_filters] * (len(CONV_LAYERS) - 1)
        features, distribution = ((config.num_filters, tf.random.stateless_normal) if config.head == 'mean' else
                                  (height * width * config.num_filters, glorot_uniform))
        return _drawn(seed, [*((f'conv{layer}', glorot_uniform, (3, 3, size, config.num_filters))
                               for layer, size in zip(CONV_LAYERS, inputs)), ('w5', distribution, (features, config.dim_output))])

    def initial_norm_params(self) -> Tensors:
        return _initial_norm_params(self._config, ((str(layer - 1), self._config.num_filters) for layer in CONV_LAYERS))

    def features(self, tensors: Tensors, x: tf.Tensor, stats_rows: int | None = None) -> tf.Tensor:
        config = self._config
        x = tf.reshape(x, [-1, *config.image_shape])
        for layer in CONV_LAYERS:
            x = conv_block(x, tensors[f'conv{layer}'], tensors[f'b{layer}'], config.norm, str(layer - 1), tensors,
                           config.max_pool, config.engine == 'vmap', stats_rows)
        return tf.reduce_mean(x, axis=[1, 2]) if config.head == 'mean' else tf.reshape(x, [-1, math.prod(x.shape[1:])])


class KerasNetwork:
    """A `keras.Model` made by a function of one's own: see docs/networks.md.

    The names of its tensors are Keras's `variable.path`; norm parameters are the weights of normalisation layers; the head is the
    layer that makes the outputs. Means and variances are those of the current rows, and exact in both derivatives. Random layers
    draw from MASKS, and do nothing without. All else that is not trainable is constant.
    """
    vectorizes = False

    def __init__(self, function: Callable, input_shape: Sequence[int], outputs: int, dtype: str):
        """
        Args:
            function: (input_shape, outputs) -> keras.Model.
            input_shape: of a row, as the model gets it.
            outputs: numbers that it makes of each row.
            dtype: in which it computes.

        Raises:
            UserError: the function does not make such a model, or it has state, losses or dtypes that are not swapped or used.
        """
        self.name = getattr(function, '__name__', type(function).__name__)
        self._function, self._input_shape, self._outputs, self._dtype = function, tuple(input_shape), outputs, dtype
        self._keras = _keras()
        self._seen = threading.local()  # `features`: the input of the last layer in this thread's call
        self.model = model = self._build(0)
        self.layers = list(model._flatten_layers(include_self=False))
        self._weights = {variable.path: variable for variable in model.trainable_variables}
        self._seeds = list(filter(_is_seed, model.non_trainable_variables))
        self._constants = [(variable, tf.identity(variable.value)) for variable in model.non_trainable_variables if not _is_seed(variable)]
        self._norms = [layer for layer in self.layers if isinstance(layer, self._keras.layers.BatchNormalization)]
        self._norm_names = {weight.path for layer in self.layers if self._normalises(layer) for weight in layer._trainable_variables}
        self.convolutional = any('Conv' in type(layer).__name__ for layer in self.layers)
        self.random = True  # until `_probe` knows
        for layer in self._norms:  # whose argument says too whether random layers draw
            layer.call = functools.partial(_with_current_statistics, layer.call)
        self._refuse_unusable()
        # Of the last layer, until `_find_head` has found it:
        self.head_names, self._unused_head = (), {}
        self._head, self._has_linear_head, self._no_head = None, False, ''
        self._gathered = set()  # names of weights of which only some rows are used, as an Embedding's
        self._find_head(*self._called(self._probe, ' where training=True'))
        self._unused_head = {name: tf.identity(self._weights[name].value) for name in self.head_names}
        self.description = f'{self.name}, a Keras model of {len(self.layers)} layers'

    @property
    def head_inputs(self) -> dict[str, tuple[int, ...]]:
        """{name: shape without the outputs} of the tensors of the last layer."""
        return {name: tuple(self._weights[name].shape[:-1]) for name in self.head_names}

    def _normalises(self, layer):
        return any(kind.__name__.endswith('Normalization') for kind in type(layer).__mro__)

    def _normalises_or_draws(self, layer):
        """Whether a layer, or one in it, normalises, or the network is random and the layer has seeds."""
        draws = self.random and any(map(_is_seed, layer.variables))
        return draws or any(map(self._normalises, layer._flatten_layers()))

    def check(self, config: ModelConfig) -> None:
        """Raises UserError if the network cannot be used with a config."""
        if config.inner_weights != 'all' and not self.head_names:
            raise UserError(f'--inner_weights={config.inner_weights} (of ANIL and BOIL) needs a last layer, and {self.name} has none: '
                            f'{self._no_head}')
        if (config.head_init != 'learned' or config.logits != 'linear' or config.pretrain_classes) and not self._has_linear_head:
            raise UserError('--head_init, --logits and --pretrain_labels=classes need a network that ends in a Dense layer with a bias and '
                            f'without activation, applied to vectors; {self.name} does not')
        if taken := ({*HEADS[config.head_init].extra} & self._weights.keys()).difference(self.head_names):
            raise UserError(f'{min(taken)} is a name that --head_init={config.head_init} uses itself: rename that layer of {self.name}')
        if config.engine in ('vmap', 'wide') and (self.convolutional or self.loops):
            raise UserError(f'--engine={config.engine}: TensorFlow cannot vectorise the convolutions or loops of {self.name}: leave it out')
        if config.loss == 'xent' and self._normalised:
            raise UserError(f'{self.name} makes probabilities, and must make logits: leave out the softmax at its end')
        if config.query_norm != 'batch' and self._mixes_rows:
            raise UserError(f'--query_norm={config.query_norm}: in {self.name} {self._mixes_rows}; give --query_norm=batch')

    def initial_weights(self, seed: int) -> Tensors:
        model = self._build(seed)
        if model is self.model:
            raise UserError(f'{self.name} returns the same model again; it must make a new one at each call')
        initial = {variable.path: variable for variable in model.trainable_variables}
        if {name: value.shape for name, value in initial.items()} != {name: value.shape for name, value in self._weights.items()}:
            raise UserError(f'{self.name} makes a model with other weights at each call')
        return {name: tf.cast(value, tf.float32) for name, value in initial.items() if name not in self._norm_names}

    def initial_norm_params(self) -> Tensors:
        return {name: tf.cast(value, tf.float32) for name, value in self._weights.items() if name in self._norm_names}

    def features(self, tensors: Tensors, x: tf.Tensor, stats_rows: int | None = None) -> tf.Tensor:
        # The outputs are not used: a last layer that is computed for the task may not be there yet, or have another shape.
        with self.tensors_in_place({**tensors, **self._unused_head}, x.shape[0], stats_rows):
            outputs = self._call(x, self.random and MASKS in tensors)
        return self._seen.features if self.head_names else outputs

    def head(self, tensors: Tensors, features: tf.Tensor) -> tf.Tensor:
        if not self.head_names:
            return features
        values = self._in_place(tensors, self.head_names)
        with exact_statistics(features.shape[0]), _floatx(self._keras, self._dtype), self._keras.StatelessScope(values):
            return self._head(features)

    def _call(self, x, training):
        return self.model(tf.reshape(x, [-1, *self._input_shape]), training=training)

    @contextlib.contextmanager
    def tensors_in_place(self, tensors, rows, stats_rows=None, sizes=None):
        """While entered, the model computes with the tensors; its own variables are neither read nor changed. The last arguments are those
        of `exact_statistics`."""
        seeds = _seed_states(tensors[MASKS], len(self._seeds)) if MASKS in tensors else [tf.zeros([2], tf.int64)] * len(self._seeds)
        values = [*self._in_place(tensors, self._weights), *self._constants, *zip(self._seeds, seeds)]
        with exact_statistics(rows, stats_rows, sizes), _floatx(self._keras, self._dtype), self._keras.StatelessScope(
                values, collect_losses=True) as scope:
            yield scope

    def _in_place(self, tensors, names):
        """(variable, what stands for it) of some weights."""
        return [(self._weights[name], with_dense_gradient(tensors[name]) if name in self._gathered else tensors[name]) for name in names]

    def _build(self, seed):
        """A new model that has been called; its weights are a function of the seed."""
        def make():
            model = self._function(self._input_shape, self._outputs)
            if isinstance(model, self._keras.Model):
                outputs = model(tf.zeros([ROWS, *self._input_shape], self._dtype))
                if not tf.is_tensor(outputs) or outputs.shape != (ROWS, self._outputs):
                    shape = list(outputs.shape) if tf.is_tensor(outputs) else f'a {type(outputs).__name__}'
                    raise UserError(f'the model of {self.name} makes {shape} of {ROWS} rows, and must make {[ROWS, self._outputs]}')
            return model

        model = self._called(lambda: _isolated(make, self._keras, seed, self._dtype))
        if not isinstance(model, self._keras.Model):
            raise UserError(f'{self.name} returns a {type(model).__name__}, and must return a keras.Model')
        return model

    def _called(self, function, where=''):
        """What a function returns that runs code of the user's."""
        try:
            return function()
        except (UserError, Interrupted):
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f'{self.name}({self._input_shape}, {self._outputs}) raises {type(error).__name__}{where}: '
                            f'{first_line(error)}') from error

    def _refuse_unusable(self):
        """Refuses what the rest of the program cannot name, average or save."""
        paths = [variable.path for variable in self.model.trainable_variables]
        problems = [] if paths else ['it has no weights to train']
        problems += [f'two of its weights are named {path}' for path in sorted(set(paths)) if paths.count(path) > 1]
        problems += [f'{path} is a name that this program uses itself' for path in paths
                     if path.startswith(('lr/', 'inner/', CLASSIFIER)) or '/adam/' in path]
        problems += [f'layer {layer.name} computes in {layer.compute_dtype} with weights in {layer.variable_dtype}, and not in '
                     f'{self._dtype}' for layer in self.layers if {layer.compute_dtype, layer.variable_dtype} & FLOATS - {self._dtype}]
        problems += [f'layer {layer.name} takes statistics over all replicas' for layer in self._norms if layer.synchronized]
        for path, weight in self._weights.items():
            if weight.dtype != self._dtype:
                problems.append(f'{path} is of {weight.dtype}, and not of {self._dtype}')
            if weight.constraint:
                problems.append(f'{path} has a constraint, which is not kept here')
        self._refuse(problems)

    def _refuse(self, problems):
        if problems:
            raise UserError(f'the model of {self.name} cannot be used: {listing(problems, 3)}')

    def _probe(self):
        """Runs the model once and refuses state that is not swapped, and losses.

        Returns its outputs, the calls of its layers, inner ones first, tensors near those of the model, these, and the rows.
        """
        x = tf.constant(np.random.default_rng(0).uniform(size=[ROWS + 2, math.prod(self._input_shape)]), self._dtype)
        tensors = {name: tf.identity(weight.value) for name, weight in self._weights.items()}
        training = {**tensors, MASKS: tf.zeros([3], tf.float64)}
        with watched(self.layers) as calls, tf.GradientTape() as tape:
            tape.watch(tensors)
            with self.tensors_in_place(training, len(x)) as scope:
                before = [scope.get_current_value(seed) for seed in self._seeds]
                outputs = self._call(x, True)
                draws = any(scope.get_current_value(seed) is not value for seed, value in zip(self._seeds, before))
                has_losses = bool(self.model.losses)
        function = tf.function(lambda tensors: self.features(tensors, x), autograph=False)
        graph = function.get_concrete_function(training).graph
        kinds = _kinds_of_operations(graph)
        self.loops = not LOOPS.isdisjoint(kinds)
        problems = self._problems_of_graph(graph, kinds)
        if has_losses:
            problems.append('it has losses of its own (add_loss, regularizers), which are not used here')
        gradients = tape.gradient(outputs, tensors)
        self._gathered = {name for name, gradient in gradients.items() if isinstance(gradient, tf.IndexedSlices)}
        self._refuse(problems + [f'it changes {path} while it computes' for path in self._changed(scope, tensors)])
        random = np.random.default_rng(0)  # weights of zeros would hide what depends on what
        moved = {name: nearby(value, random) for name, value in tensors.items()}
        self._refuse_hidden_weights(graph, gradients, moved, tensors, x)
        self.random = draws or not _alike(self._outputs_with(moved, x), self._outputs_with(moved, x, training=True))
        self._mixes_rows = self._mixing_of_rows(moved, x)
        self._normalised = self._outputs > 1 and np.allclose(tf.reduce_sum(outputs, axis=1), 1, atol=1e-5) and np.all(outputs >= 0)
        return outputs, calls, moved, tensors, x

    def _refuse_hidden_weights(self, graph, gradients, moved, tensors, x):
        """Refuses code that computes with weights which it does not get from here, or hides what it computes from a gradient."""
        unreached = [name for name, gradient in gradients.items() if gradient is None]
        reached = [name for name in gradients.keys() - set(unreached)
                   if np.any(np.abs(tf.convert_to_tensor(gradients[name])) > LEAST_GRADIENT)]
        calls = [operation for operation in graph.get_operations() if operation.type.endswith('PartitionedCall') and operation.inputs]
        # A function that is made anew at each call, as by Keras for grouped convolutions, computes with the present weights.
        if calls and (unreached or not all(self._reads(name, moved, tensors, x) for name in reached)):
            what = f', and no gradient reaches {unreached[0]}' if unreached else ''
            self._refuse([f'it has a @tf.function{what}: leave it out, for it would compute with the weights of its first call'])
        self._refuse([f'the outputs depend on {name}, but no gradient reaches it: leave out tf.recompute_grad, keras.RematScope or a '
                      'custom gradient around it; or if it is not to be trained, make it by add_weight(trainable=False)'
                      for name in unreached if self._depends_on(name, moved, tensors, x)])

    def _reads(self, *arguments):
        """As `_depends_on`, where a function may have kept a tensor of a graph that is gone."""
        try:
            return self._depends_on(*arguments)
        except (TypeError, ValueError, tf.errors.OpError):
            return False

    def _depends_on(self, name, moved, tensors, x):
        return not _alike(*(self._outputs_with(values, x) for values in (moved, {**moved, name: tensors[name]})))

    def _outputs_with(self, tensors, x, training=False, **options):
        with self.tensors_in_place(tensors, len(x), **options):
            return self._call(x, training)

    def _mixing_of_rows(self, tensors, x):
        """How the outputs for a row depend on other rows, in a way that statistics of the first rows do not account for; '' if not."""
        sizes, fewer = (self._sizes_of_statistics(tensors, rows, lambda rows: self._call(rows, False)) for rows in (x, x[:-1]))
        if [size * (len(x) - 1) for size in sizes] != [size * len(x) for size in fewer]:
            return 'statistics are taken over the first axis of something else than rows'
        pair = [self._outputs_with(tensors, tf.concat([x[:-1], last], axis=0), stats_rows=ROWS)[:-1] for last in (x[-1:], x[-1:] + 1)]
        return '' if _alike(*pair) else (
            'the outputs for one row depend on other rows in another way than by batch norm without masks')

    def _sizes_of_statistics(self, tensors, x, call):
        """The sizes of the first axes over which a call of rows takes means and variances."""
        sizes = []
        with self.tensors_in_place(tensors, len(x), sizes=sizes):
            call(x)
        return sizes

    def _problems_of_graph(self, graph, kinds):
        return ['it draws random numbers by keras.random without a seed: give it a SeedGenerator, an attribute of a layer'
                if 'seed_generator_state' in variable.name else
                f'it keeps state in {variable.name}, which is no weight of one of its layers: make it one by add_weight, or an attribute '
                'of a layer' for variable in graph.variables] + [
                f'it draws random numbers by {kind}: use keras.random with a SeedGenerator'
                for kind in sorted(kinds & RANDOM_OPERATIONS)]

    def _changed(self, scope, tensors):
        """The paths of variables that a call assigned to, without the moving averages of batch norm, which nothing reads."""
        moving = {id(variable) for layer in self._norms for variable in (layer.moving_mean, layer.moving_variance)}
        before = [*self._constants, *((weight, tensors[name]) for name, weight in self._weights.items())]
        return [variable.path for variable, value in before
                if id(variable) not in moving and scope.get_current_value(variable) is not value]

    def _find_head(self, outputs, calls, moved, tensors, x):
        """Finds the layer that makes the outputs, whose input are the features, or says why there is none."""
        makers = [call for call in calls if call[-1] is outputs]
        if not makers:
            self._no_head = 'its outputs are made by its own code, not by a layer'
            return
        layer, arguments, options, _ = makers[0]
        reason = self._no_head_because(layer, arguments, options, moved, tensors, x)
        if [call[0] for call in calls].count(layer) > 1:
            reason = 'is called several times'
        if reason:
            self._no_head = f'the layer that makes its outputs, {layer.name}, {reason}'
            return
        self.head_names, self._head = tuple(weight.path for weight in layer.trainable_variables), layer
        self._has_linear_head = (type(layer) is self._keras.layers.Dense and layer.activation is self._keras.activations.linear
                                 and len(arguments[0].shape) == 2
                                 and [weight.name for weight in layer.trainable_variables] == ['kernel', 'bias'])
        layer.call = functools.partial(_remembering_input, self._seen, layer.call)

    def _no_head_because(self, layer, arguments, options, moved, tensors, x):
        """Why a layer that was called so cannot be run by itself; '' if it can."""
        if not layer.trainable_variables:
            return 'has no weights'
        if len(arguments) != 1 or not tf.is_tensor(arguments[0]) or any(
                value is not None for name, value in options.items() if name != 'training'):
            return 'has several inputs, or one that is given by name'
        features = arguments[0]
        if self._normalises_or_draws(layer):
            return 'normalises or is random'
        sizes, fewer = (self._sizes_of_statistics(tensors, rows, layer) for rows in (features, features[:-1]))
        if sizes != fewer:
            return 'normalises or is random'
        own = {weight.path: tensors[weight.path] for weight in layer.trainable_variables}
        inputs = [self._input_of(layer, values, x) for values in (moved, {**moved, **own})]
        return '' if _alike(*inputs) else 'shares its weights with another'

    def _input_of(self, layer, tensors, x):
        """What a layer is called with, first."""
        with watched([layer]) as calls:
            self._outputs_with(tensors, x)
        return calls[0][1][0]


def _alike(first, second):
    """Whether two tensors differ by rounding only."""
    return np.allclose(first, second, rtol=1e-4, atol=1e-5)


def _is_seed(variable):
    """Whether a variable of Keras is the state of a generator of random numbers."""
    return variable.name == 'seed_generator_state'


def nearby(value: tf.Tensor, random: np.random.Generator) -> tf.Tensor:
    """A tensor near the given one, so that nothing is zero."""
    return value + 0.1 * random_like(value, random)


def random_like(value: tf.Tensor, random: np.random.Generator) -> tf.Tensor:
    """A random tensor as large as the given one; of standard deviation 1 if that is zero."""
    size = float(tf.sqrt(tf.reduce_mean(tf.square(value)))) or 1.
    return tf.constant(size * random.normal(size=value.shape), value.dtype)


_keras_network = functools.cache(KerasNetwork)


def _keras():
    """The module; raises UserError if it is another Keras than this program knows."""
    try:
        import keras
    except ImportError as error:
        raise UserError(f'a network of your own needs Keras 3, which cannot be imported ({first_line(error)}): install TensorFlow 2.16 or '
                        'newer') from error
    if keras.__version__.startswith(('1.', '2.')):
        raise UserError(f'a network of your own needs Keras 3, and Keras {keras.__version__} is installed: install TensorFlow 2.16 or '
                        'newer')
    if keras.backend.backend() != 'tensorflow':
        raise UserError(f'Keras computes by {keras.backend.backend()} here: set KERAS_BACKEND=tensorflow in the environment')
    return keras


def _isolated(function, keras, seed, dtype):
    """What a function returns where all random numbers follow from a seed, layers are numbered from the first, and compute in a dtype;
    nothing of that stays in this process."""
    def call():  # in a thread of its own, where Keras has no layers yet
        keras.config.set_dtype_policy(dtype)
        keras.utils.set_random_seed(seed)
        return function()

    eager = context.context()
    numbers = random.getstate(), np.random.get_state(), eager._seed, getattr(eager, '_rng', None)
    try:
        with _floatx(keras, dtype), ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        eager._seed, eager._rng = numbers[2:]


@contextlib.contextmanager
def _floatx(keras, dtype):
    """While entered, what code leaves to Keras is of a dtype."""
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)


def masks(config: ModelConfig, iteration: int | tf.Tensor | None) -> Tensors:
    """What random layers draw from in an iteration of a training; {} in evaluation, and if there are none. In float64, for a state of
    gradient checkpointing is differentiated."""
    if iteration is None or not network_of(config).random:
        return {}
    return {MASKS: tf.stack([tf.cast(number, tf.float64) for number in (config.mask_seed, iteration)])}


def mask_at(own: Tensors, step: int | tf.Tensor) -> Tensors:
    """MASKS of a task's own tensors at an inner step; {} if there are none."""
    return {MASKS: tf.concat([own[MASKS], tf.cast([step], tf.float64)], axis=0)} if MASKS in own else {}


def _seed_states(masks, count):
    """States for `count` generators of random numbers, each a function of its number and of masks, [seed, iteration, step]."""
    masks = tf.cast(masks, tf.int64)
    key = tf.stack([masks[0], 0])
    for number in tf.unstack(masks[1:]):
        key = tf.random.fold_in(key, number)
    return tf.unstack(tf.cast(tf.random.stateless_uniform([count, 2], key, None, None, tf.int32), tf.int64)) if count else []


@contextlib.contextmanager
def watched(layers: Sequence[Any]) -> Iterator[list[tuple[Any, tuple, dict, Any]]]:
    """While entered, each call of a Keras layer is added to the list: (layer, args, kwargs, outputs), inner layers first."""
    calls, before = [], [layer.call for layer in layers]

    def watch(layer, call):
        def watched_call(*args, **kwargs):
            outputs = call(*args, **kwargs)
            calls.append((layer, args, kwargs, outputs))
            return outputs
        return watched_call

    for layer, call in zip(layers, before):
        layer.call = watch(layer, call)
    try:
        yield calls
    finally:
        for layer, call in zip(layers, before):
            layer.call = call


def _kinds_of_operations(graph):
    """The kinds of the operations in a graph, and in the functions that it calls."""
    functions = graph.as_graph_def().library.function
    return {operation.type for operation in graph.get_operations()} | {node.op for function in functions for node in function.node_def}


def _with_current_statistics(call, *args, **kwargs):
    """A call of Keras's batch norm, or of a subclass with further arguments, as in training, where it takes the statistics of the current
    rows."""
    signature = inspect.signature(call)
    if 'training' not in signature.parameters:
        return call(*args, **{**kwargs, 'training': True})
    given = signature.bind(*args, **kwargs)
    given.arguments['training'] = True
    return call(*given.args, **given.kwargs)


def _remembering_input(seen, call, inputs, **kwargs):
    seen.features = inputs
    return call(inputs, **kwargs)


def _drawn(seed: int, layers: Iterable[tuple[str, Callable, Sequence[int]]]) -> Tensors:
    """Weights of (name, distribution, shape), each a function of (seed, name) only, and a bias of zeros for each."""
    tensors = {}
    for name, distribution, shape in layers:
        tensors[name] = distribution(shape, [seed, zlib.crc32(name.encode())])
        tensors[re.sub('conv|w', 'b', name)] = tf.zeros([shape[-1]])
    return tensors


def _initial_norm_params(config: ModelConfig, scopes: Iterable[tuple[str, int]]) -> Tensors:
    """Offsets (beta, 0) and scales (gamma, 1) of (scope, channels): {'<scope>/beta': [channels], ...}.

    Batch norm has scales if `norm_scale` says so, layer norm always.
    """
    params, scaled = {}, config.norm == 'layer_norm' or config.norm_scale
    for scope, channels in scopes if config.norm != 'None' else ():
        params[f'{scope}/beta'] = tf.zeros([channels])
        if scaled:
            params[f'{scope}/gamma'] = tf.ones([channels])
    return params


# Where the last layer of a task comes from --------------------------------------------------------------------------

def shared_weights(config: ModelConfig, seed: int) -> Tensors:
    """What tasks share before training, float32: the network's weights, where a last layer that is computed for each task is replaced by
    what its entry of `HEADS` learns; and the weights of the classifier of pre-training, if there is one."""
    network = network_of(config)
    weights = network.initial_weights(seed)
    if config.head_init != 'learned':
        body = {name: value for name, value in weights.items() if name not in network.head_names}
        weights = {**body, **HEADS[config.head_init].learned(config, seed)}
    classifier = last_layer(config, seed, config.pretrain_classes) if config.pretrain_classes else {}
    return {**weights, **{CLASSIFIER + name: value for name, value in classifier.items()}}


def layers(config: ModelConfig, weights: Tensors) -> Tensors:
    """The shared weights that are the network's own, without those that only a head of `HEADS` or the classifier of pre-training has.
    A network of one's own may have a layer called head."""
    others = {*HEADS[config.head_init].extra}.difference(network_of(config).head_names)
    return {name: value for name, value in weights.items() if name not in others and not name.startswith(CLASSIFIER)}


def classifier_outputs(config: ModelConfig, tensors: Tensors, x: tf.Tensor) -> tf.Tensor:
    """The outputs of the classifier of pre-training (Baseline and Baseline++: Chen et al., 2019), [rows, pretrain_classes]."""
    network = network_of(config)
    own = {name: tensors[CLASSIFIER + name] for name in network.head_names}
    config_of_classifier = dataclasses.replace(config, dim_output=config.pretrain_classes)
    return outputs_of(config_of_classifier, {**tensors, **own}, network.features(tensors, x))


def initial_head(config: ModelConfig, weights: Tensors, features: tf.Tensor, support_y: tf.Tensor) -> Tensors:
    """A task's last layer before its first inner step, computed as `head_init` says, one of `HEADS`; differentiable.

    Args:
        weights: the shared ones.
        features: of the support rows, [rows, features].
        support_y: [rows, dim_output].

    Returns:
        {name of the matrix: [features, dim_output], name of the bias: [dim_output]}; of a head with outputs of its own its `extra`.
    """
    head = HEADS[config.head_init]
    names = head.extra if head.outputs else network_of(config).head_names
    return dict(zip(names, head.compute(config, weights, features, support_y)))


def outputs_of(config: ModelConfig, tensors: Tensors, features: tf.Tensor) -> tf.Tensor:
    """The outputs for rows with features [rows, features]: of the last layer, or with 'cosine' logits of its matrix without the bias, or
    as the head says; [rows, outputs]."""
    head = HEADS[config.head_init]
    if head.outputs:
        return head.outputs(tensors, features)
    if config.logits == 'linear':
        return network_of(config).head(tensors, features)
    matrix = tensors[network_of(config).head_names[0]]
    return COSINE_SCALE * tf.matmul(tf.math.l2_normalize(features, axis=1), tf.math.l2_normalize(matrix, axis=0))


def narrowed(config: ModelConfig, variables: Tensors, wider: ModelConfig, tensors: Tensors) -> Tensors:
    """A model's parameters, {name: tensor}, from those of another, which may have more outputs: then the first are taken; or fewer, if the
    last layer is computed for each task.

    Raises UserError if a network of one's own with another number of outputs would compute something else.
    """
    values = {name: tensors[name] if variable.shape == tensors[name].shape else tensors[name][..., :variable.shape[-1]]
              for name, variable in variables.items()}
    if config.network and config.dim_output != wider.dim_output and not (
            all(values[name].shape == variable.shape for name, variable in variables.items())
            and _makes_the_first(config, values, wider, tensors)):
        raise UserError(f'{network_of(config).name} computes something different when it is made with {config.dim_output} outputs instead '
                        f'of the {wider.dim_output} that it was trained with: use tasks of {wider.dim_output} classes')
    return values


def _makes_the_first(config, values, wider, tensors):
    """Whether a network with other outputs makes the first of those of the wider one, or where the last layer is computed, has the
    same features."""
    def of_first_step(network, tensors):
        per_step = network.initial_norm_params().keys() if config.norm_per_step else ()
        return {name: at_step(tf.convert_to_tensor(value), 0) if name in per_step else tf.convert_to_tensor(value)
                for name, value in tensors.items()}

    x = tf.constant(np.random.default_rng(0).uniform(size=[ROWS, config.dim_input]), config.dtype)
    models = [(network_of(each), of_first_step(network_of(each), own)) for each, own in ((config, values), (wider, tensors))]
    made = [network.features(tensors, x) for network, tensors in models]
    if config.head_init == 'learned':
        made = [network.head(tensors, features)[:, :config.dim_output] for (network, tensors), features in zip(models, made)]
    return made[0].shape == made[1].shape and _alike(*made)


def last_layer(config: ModelConfig, seed: int, outputs: int) -> Tensors:
    """The last layer of a network with so many outputs, initially: [features, outputs] and [outputs]."""
    network = network_of(dataclasses.replace(config, dim_output=outputs))
    weights = network.initial_weights(seed)
    if config.network and network.head_inputs != network_of(config).head_inputs:
        raise UserError(f'the features of {network.name} depend on the number of outputs, so its last layer cannot have another number')
    return {name: weights[name] for name in network.head_names}


def repeated_column(config, weights, features, support_y):
    """The shared column for each class (UNICORN-MAML: Ye & Chao, 2022, section 5)."""
    return [tf.repeat(weights[name], support_y.shape[-1], axis=-1) for name in network_of(config).head_names]


def new_layer(config, weights, features, support_y):
    """A layer that has learned nothing: zeros, or for cosines, which zeros do not have, random numbers."""
    shape = [features.shape[-1], support_y.shape[-1]]
    with tf.init_scope():  # XLA would draw other numbers
        matrix = (tf.zeros(shape, features.dtype) if config.logits == 'linear' else
                  tf.random.stateless_normal(shape, [0, 0], dtype=features.dtype))
    return matrix, tf.zeros(shape[1:], features.dtype)


def prototypes(config, weights, features, support_y):
    """2 c_k and -|c_k|^2, where c_k is the mean of the features f of class k: the outputs are minus the squared distances |f - c_k|^2,
    but for |f|^2, which is the same for all classes (ProtoNet: Snell et al., 2017, equation 8; ProtoMAML: Triantafillou et al.,
    2020, section 3)."""
    means = tf.matmul(features, support_y / tf.reduce_sum(support_y, axis=0), transpose_a=True)
    return 2 * means, -tf.reduce_sum(tf.square(means), axis=0)


def ridge_scalars(config: ModelConfig, seed: int) -> Tensors:
    """What `ridge_regression` learns, initially: scalars."""
    return dict(zip(RIDGE_SCALARS, map(tf.constant, (config.ridge_lambda, config.ridge_scale, 0.0))))


def ridge_regression(config, weights, features, support_y):
    """The ridge regression of y on the features and a column of ones, in closed form, scaled (R2-D2: Bertinetto et al., 2019, equations
    4 to 6). With X and Y divided by the root of the number of rows it is X'(XX' + lambda)^-1 Y, or where there are more rows than
    columns (X'X + lambda)^-1 X'Y."""
    penalty, scale, bias = (weights[name] for name in RIDGE_SCALARS)
    root = math.sqrt(features.shape[0])
    x = tf.concat([features, tf.ones_like(features[:, :1])], axis=1) / root
    y = support_y / root

    def solve(gram, right):
        gram += penalty * tf.eye(gram.shape[0], dtype=gram.dtype)
        # TensorFlow ends the program if it cannot solve; where training diverged, the result shall be nan, as elsewhere.
        gram = tf.where(tf.reduce_all(tf.math.is_finite(gram)), gram, tf.eye(gram.shape[0], dtype=gram.dtype))
        return tf.linalg.solve(gram, right)

    if x.shape[0] <= x.shape[1]:
        solution = tf.matmul(x, solve(tf.matmul(x, x, transpose_b=True), y), transpose_a=True)
    else:
        solution = solve(tf.matmul(x, x, transpose_a=True), tf.matmul(x, y, transpose_a=True))
    solution *= scale
    return solution[:-1], solution[-1] + bias


def nearest_neighbour(tensors, features):
    """For each class minus the squared distance to its nearest support row, but for a constant of the row."""
    support, labels = (tensors[name] for name in NEIGHBOURS)
    closeness = 2 * tf.matmul(features, support, transpose_b=True) - tf.reduce_sum(tf.square(support), axis=1)
    return tf.reduce_max(tf.where(labels[None] > 0, closeness[:, :, None], closeness.dtype.min), axis=1)


class Head(NamedTuple):
    """A way to compute the last layer of a task."""
    # Function of the arguments of `initial_head`: matrix and bias, or with `outputs` the `extra`.
    compute: Callable[..., Iterable[tf.Tensor]] | None  # None: it is not computed
    learned: Callable[[ModelConfig, int], Tensors] = lambda config, seed: {}  # the shared weights that it needs, initially
    extra: tuple[str, ...] = ()                  # names of the tensors that it has besides the network's
    outputs: Callable[[Tensors, tf.Tensor], tf.Tensor] | None = None  # of tensors and features; None: those of the network's last layer


HEADS = {'learned': Head(None),
         'shared': Head(repeated_column, functools.partial(last_layer, outputs=1)), 'new': Head(new_layer),
         'prototypes': Head(prototypes), 'ridge': Head(ridge_regression, ridge_scalars, RIDGE_SCALARS),
         'neighbours': Head(lambda config, weights, *examples: examples, extra=NEIGHBOURS, outputs=nearest_neighbour)}

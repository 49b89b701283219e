"""Any `keras.Model` as a network: `KerasNetwork` runs it with tensors that are arguments, and refuses what cannot be run so.

docs/networks.md says what that is.
"""
from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import random
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context  # for the state of the random numbers, which has no public name

from runtime.system.errors import UserError, first_line, listing
from runtime.system.interruption import Interrupted
from special_grads import exact_statistics
from utils import with_dense_gradient

if TYPE_CHECKING:
    from maml import ModelConfig

MASKS = 'masks'  # the name of the tensor from which random layers draw: [seed, iteration], at an inner step [seed, iteration, step]
ROWS = 4  # that a model is tried on
FLOATS = {'float16', 'bfloat16', 'float32', 'float64'}
RANDOM_OPERATIONS = {'RandomUniform', 'RandomUniformInt', 'RandomStandardNormal', 'TruncatedNormal', 'RandomShuffle', 'Multinomial',
                     'RandomGamma'}
LOOPS = {'While', 'StatelessWhile'}  # as of recurrent layers
LEAST_GRADIENT = 1e-4  # of outputs with respect to a weight on which they depend
HEAD_PREFIX = 'head/'  # of the names of what last layers have besides the network's tensors
CLASSIFIER = f'{HEAD_PREFIX}classifier/'  # of the tensors of a last layer for all classes of meta-training
RESERVED = 'lr/', 'inner/', CLASSIFIER  # what names of tensors begin with that are no network's
Tensors = dict[str, tf.Tensor]


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
        if isinstance(function, self._keras.Model):
            raise UserError('network= takes a function (input_shape, outputs) that makes a keras.Model, and this is such a model')
        self._seen = threading.local()  # `features`: the input of the last layer in this thread's call
        self.model = model = self._build(0)
        self._blueprint = _blueprint(model)
        self.layers = list(model._flatten_layers(include_self=False))
        self._weights = {variable.path: variable for variable in model.trainable_variables}
        self._seeds = list(filter(_is_seed, model.non_trainable_variables))
        self._constants = [(variable, tf.identity(variable.value)) for variable in model.non_trainable_variables if not _is_seed(variable)]
        self._norms = [layer for layer in self.layers if isinstance(layer, self._keras.layers.BatchNormalization)]
        self._norm_names = {weight.path for layer in self.layers if self._normalises(layer) for weight in layer._trainable_variables}
        self.random = True  # until `_probe` knows
        for layer in self.layers:
            if getattr(layer, 'use_cudnn', False):
                layer.use_cudnn = False  # its kernels, which are for GPUs, have no second derivative
        for layer in self._norms:  # whose argument says too whether random layers draw
            layer.call = functools.partial(_with_current_statistics, layer.call)
        self._refuse_unusable()
        # Of the last layer, until `_find_head` has found it:
        self.head_names, self._unused_head = (), {}
        self._head, self._has_linear_head, self._no_head = None, False, ''
        self._gathered = set()  # names of weights of which only some rows are used, as an Embedding's
        probed = self._call_user_code(self._probe, ' where training=True')
        self._call_user_code(lambda: self._find_head(*probed), ' where its last layer is run by itself')
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

    def check(self, config: ModelConfig, of_head: Collection[str]) -> None:
        """Raises UserError if the network cannot be used with a config, whose last layers have tensors `of_head` besides the network's."""
        if config.inner_weights != 'all' and not self.head_names:
            raise UserError(f'--inner_weights={config.inner_weights} (of ANIL and BOIL) needs a last layer, and {self.name} has none: '
                            f'{self._no_head}')
        if (config.head_init != 'learned' or config.logits != 'linear' or config.pretrain_classes) and not self._has_linear_head:
            raise UserError('--head_init, --head=nearest, --logits and --pretrain_labels=classes need a network that ends in a Dense layer '
                            f'with a bias and without activation, applied to vectors; {self.name} does not')
        if taken := (set(of_head) & self._weights.keys()).difference(self.head_names):
            raise UserError(f'{min(taken)} is a name that --head_init={config.head_init} uses itself: rename that layer of {self.name}')
        if config.engine in ('vmap', 'wide') and (self.convolutional or self.loops):
            raise UserError(f'--engine={config.engine}: TensorFlow cannot vectorise the convolutions or loops of {self.name}: leave it out')
        if config.loss == 'xent' and self._normalised:
            raise UserError(f'{self.name} makes probabilities, and must make logits: leave out the softmax at its end')
        if config.query_norm == 'support' and self._mixes_rows:
            raise UserError(f'--query_norm=support: in {self.name} {self._mixes_rows}; give --query_norm=batch or each')

    def initial_weights(self, seed: int) -> Tensors:
        model = self._build(int(seed))
        if {*map(id, model.variables)} & {*map(id, self.model.variables)}:
            raise UserError(f'{self.name} uses layers again that it has used before; it must make a new model, of new layers, at each call')
        initial = {variable.path: variable for variable in model.trainable_variables}
        if _blueprint(model) != self._blueprint:  # as in a notebook, after a change of what the function uses
            raise UserError(f'{self.name} makes another model than before; define the function again, so that it is a new network')
        return {name: tf.cast(value, tf.float32) for name, value in initial.items() if name not in self._norm_names}

    def initial_norm_params(self) -> Tensors:
        return {name: tf.cast(value, tf.float32) for name, value in self._weights.items() if name in self._norm_names}

    def features(self, tensors: Tensors, x: tf.Tensor, stats_rows: int | None = None) -> tf.Tensor:
        # The outputs are not used: a last layer that is computed for the task may not be there yet, or have another shape.
        with self.with_tensors({**tensors, **self._unused_head}, x.shape[0], stats_rows):
            outputs = self._call(x, self.random and MASKS in tensors)
        return self._seen.features if self.head_names else outputs

    def head(self, tensors: Tensors, features: tf.Tensor) -> tf.Tensor:
        if not self.head_names:
            return features
        values = self._substitutes(tensors, self.head_names)
        with exact_statistics(features.shape[0]), _floatx(self._keras, self._dtype), self._keras.StatelessScope(values):
            return self._head(features)

    def _call(self, x, training):
        return self.model(tf.reshape(x, [-1, *self._input_shape]), training=training)

    @contextlib.contextmanager
    def with_tensors(self, tensors, rows, stats_rows=None, sizes=None):
        """While entered, the model computes with the tensors; its own variables are neither read nor changed. The last arguments are those
        of `exact_statistics`."""
        seeds = _seed_states(tensors[MASKS], len(self._seeds)) if MASKS in tensors else [tf.zeros([2], tf.int64)] * len(self._seeds)
        values = [*self._substitutes(tensors, self._weights), *self._constants, *zip(self._seeds, seeds)]
        with exact_statistics(rows, stats_rows, sizes), _floatx(self._keras, self._dtype), self._keras.StatelessScope(
                values, collect_losses=True) as scope:
            yield scope

    def _substitutes(self, tensors, names):
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

        model = self._call_user_code(lambda: _isolated(make, self._keras, seed, self._dtype))
        if not isinstance(model, self._keras.Model):
            raise UserError(f'{self.name} returns a {type(model).__name__}, and must return a keras.Model')
        return model

    def _call_user_code(self, function, where=''):
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
                     if path.startswith(RESERVED) or '/adam/' in path]
        problems += [f'layer {layer.name} computes in {layer.compute_dtype} with weights in {layer.variable_dtype}, and not in '
                     f'{self._dtype}' for layer in (self.model, *self.layers)
                     if {layer.compute_dtype, layer.variable_dtype} & FLOATS - {self._dtype}]
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
            with self.with_tensors(training, len(x)) as scope:
                before = [scope.get_current_value(seed) for seed in self._seeds]
                outputs = self._call(x, True)
                draws = any(scope.get_current_value(seed) is not value for seed, value in zip(self._seeds, before))
                has_losses = bool(self.model.losses)
        function = tf.function(lambda tensors: self.features(tensors, x), autograph=False)
        graph = function.get_concrete_function(training).graph
        kinds = _kinds_of_operations(graph)
        self.loops, self.convolutional = not LOOPS.isdisjoint(kinds), any('Conv' in kind for kind in kinds)
        problems = self._problems_of_graph(graph, kinds)
        if has_losses:
            problems.append('it has losses of its own (add_loss, regularizers), which are not used here')
        gradients = tape.gradient(outputs, tensors)
        self._gathered = {name for name, gradient in gradients.items() if isinstance(gradient, tf.IndexedSlices)}
        self._refuse(problems + self._problems_of_state(scope, tensors, calls))
        random = np.random.default_rng(0)  # weights of zeros would hide what depends on what
        moved = {name: perturbed(value, random) for name, value in tensors.items()}
        self._refuse_hidden_weights(graph, gradients, moved, tensors, x)
        self.random = draws or not almost_equal(self._outputs_with(moved, x), self._outputs_with(moved, x, training=True))
        self._mixes_rows = self._mixing_of_rows(moved, x)
        self._normalised = self._outputs > 1 and any(np.allclose(tf.reduce_sum(made, axis=1), 1, atol=1e-5) and np.all(made >= 0)
                                                     for made in (outputs, self._outputs_with(tensors, x)))
        return outputs, calls, moved, tensors, x

    def _refuse_hidden_weights(self, graph, gradients, moved, tensors, x):
        """Refuses code that computes with weights which it does not get from here, or hides what it computes from a gradient."""
        unreached = [name for name, gradient in gradients.items() if gradient is None]
        reached = [name for name in gradients.keys() - set(unreached)
                   if np.any(np.abs(tf.convert_to_tensor(gradients[name])) > LEAST_GRADIENT)]
        calls = [operation for operation in graph.get_operations() if operation.type.endswith('PartitionedCall') and operation.inputs]
        # A function that is made anew at each call, as by Keras for grouped convolutions, computes with the present weights.
        if calls and (unreached or not all(self._computes_with(name, moved, tensors, x) for name in reached)):
            what = f', and no gradient reaches {unreached[0]}' if unreached else ''
            self._refuse([f'it has a @tf.function{what}: leave it out, for it would compute with the weights of its first call'])
        self._refuse([f'the outputs depend on {name}, but no gradient reaches it: leave out tf.recompute_grad, keras.RematScope or a '
                      'custom gradient around it; or if it is not to be trained, make it by add_weight(trainable=False)'
                      for name in unreached if self._depends_on(name, moved, tensors, x)])

    def _computes_with(self, *arguments):
        """As `_depends_on`, where a function may have kept a tensor of a graph that is gone."""
        try:
            return self._depends_on(*arguments)
        except (TypeError, ValueError, tf.errors.OpError):
            return False

    def _depends_on(self, name, moved, tensors, x):
        return not almost_equal(*(self._outputs_with(values, x) for values in (moved, {**moved, name: tensors[name]})))

    def _outputs_with(self, tensors, x, training=False, **options):
        with self.with_tensors(tensors, len(x), **options):
            return self._call(x, training)

    def _mixing_of_rows(self, tensors, x):
        """How the outputs for a row depend on other rows, in a way that statistics of the first rows do not account for; '' if not."""
        sizes, fewer = (self._sizes_of_statistics(tensors, rows, lambda rows: self._call(rows, False)) for rows in (x, x[:-1]))
        if [size * (len(x) - 1) for size in sizes] != [size * len(x) for size in fewer]:
            return 'statistics are taken over the first axis of something else than rows'
        pair = [self._outputs_with(tensors, tf.concat([x[:-1], last], axis=0), stats_rows=ROWS)[:-1] for last in (x[-1:], x[-1:] + 1)]
        return '' if almost_equal(*pair) else (
            'the outputs for one row depend on other rows in another way than by batch norm without masks')

    def _sizes_of_statistics(self, tensors, x, call):
        """The sizes of the first axes over which a call of rows takes means and variances."""
        sizes = []
        with self.with_tensors(tensors, len(x), sizes=sizes):
            call(x)
        return sizes

    def _problems_of_graph(self, graph, kinds):
        return ['it draws random numbers by keras.random without a seed: give it a SeedGenerator, an attribute of a layer'
                if 'seed_generator_state' in variable.name else
                f'it keeps state in {variable.name}, which is no weight of one of its layers: make it one by add_weight, or an attribute '
                'of a layer' for variable in graph.variables] + [
                f'it draws random numbers by {kind}: use keras.random with a SeedGenerator'
                for kind in sorted(kinds & RANDOM_OPERATIONS)]

    def _problems_of_state(self, scope, tensors, calls):
        """A call may assign to moving averages of batch norm, which nothing reads, and to no other variable."""
        before = [*self._constants, *((weight, tensors[name]) for name, weight in self._weights.items())]
        changed = {id(variable): variable.path for variable, value in before if scope.get_current_value(variable) is not value}
        called, moving = ({id(layer) for layer, *_ in calls},
                          {id(variable) for layer in self._norms for variable in (layer.moving_mean, layer.moving_variance)})
        return [f'it changes {path} while it computes' for number, path in changed.items() if number not in moving] + [
            f'layer {layer.name} normalises by moving averages, which stay as they are here: its call needs an argument training, or must '
            "give training=True to Keras's" for layer in self._norms
            if layer.trainable and id(layer) in called and id(layer.moving_mean) not in changed]

    def _find_head(self, outputs, calls, moved, tensors, x):
        """Finds the layer that makes the outputs, whose input are the features, or says why there is none."""
        makers = [call for call in calls if call[-1] is outputs]
        if not makers:
            self._no_head = 'its outputs are made by its own code, not by a layer'
            return
        layer, arguments, options, _ = makers[0]
        reason = self._why_no_head(layer, arguments, options, moved, tensors, x)
        if [call[0] for call in calls].count(layer) > 1:
            reason = 'is called several times'
        if reason:
            self._no_head = f'the layer that makes its outputs, {layer.name}, {reason}'
            return
        self.head_names, self._head = tuple(weight.path for weight in layer.trainable_variables), layer
        self._has_linear_head = (type(layer) is self._keras.layers.Dense and layer.activation is self._keras.activations.linear
                                 and len(arguments[0].shape) == 2
                                 and [weight.name for weight in layer.trainable_variables] == ['kernel', 'bias'])
        layer.call = functools.partial(_remember_input, self._seen, layer.call)

    def _why_no_head(self, layer, arguments, options, moved, tensors, x):
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
        inputs = [self._input_and_outputs(layer, values, x)[0] for values in (moved, {**moved, **own})]
        if not almost_equal(*inputs):
            return 'shares its weights with another'
        same = all(self._is_last(layer, moved, x, training) for training in (False, True))
        return '' if same else 'computes something else in training than in evaluations, or something may follow it'

    def _is_last(self, layer, tensors, x, training):
        """Whether a layer that is run by itself makes the outputs."""
        features, outputs = self._input_and_outputs(layer, tensors, x, training)
        with self.with_tensors(tensors, len(x)):
            return almost_equal(layer(features), outputs)

    def _input_and_outputs(self, layer, tensors, x, training=False):
        """What a layer is called with, first, and the model's outputs."""
        with watched([layer]) as calls:
            outputs = self._outputs_with(tensors, x, training)
        return calls[0][1][0], outputs


def almost_equal(first, second):
    """Whether two tensors differ by rounding only."""
    return np.allclose(first, second, rtol=1e-4, atol=1e-5)


def _blueprint(model):
    """What models of equal code and settings have in common: shapes of weights, settings of layers, and the code of their classes."""
    layers = [model, *model._flatten_layers(include_self=False)]
    return ({variable.path: tuple(variable.shape) for variable in model.trainable_variables}, [_settings(layer) for layer in layers],
            [{name: value.__code__ for kind in type(layer).__mro__ for name, value in vars(kind).items() if hasattr(value, '__code__')}
             for layer in layers])


def _settings(layer):
    """The config of a Keras layer as text; '' if it has none, as layers of one's own need not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Keras warns of a lambda, which is not going to be stored here
            config = layer.get_config()
        return json.dumps(config, sort_keys=True, skipkeys=True, default=lambda value: type(value).__name__)
    except Exception:  # whatever the user's code raises
        return ''


def _is_seed(variable):
    """Whether a variable of Keras is the state of a generator of random numbers."""
    return variable.name == 'seed_generator_state'


def perturbed(value: tf.Tensor, random: np.random.Generator) -> tf.Tensor:
    """A tensor near the given one, so that nothing is zero."""
    return value + 0.1 * random_like(value, random)


def random_like(value: tf.Tensor, random: np.random.Generator) -> tf.Tensor:
    """A random tensor as large as the given one; of standard deviation 1 if that is zero."""
    size = float(tf.sqrt(tf.reduce_mean(tf.square(value)))) or 1.
    return tf.constant(size * random.normal(size=value.shape), value.dtype)


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
        keras.utils.set_random_seed(seed)
        with _floatx(keras, dtype):
            return function()

    eager = context.context()
    numbers = random.getstate(), np.random.get_state(), eager._seed, getattr(eager, '_rng', None)
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        eager._seed, eager._rng = numbers[2:]


@contextlib.contextmanager
def _floatx(keras, dtype):
    """While entered, what code leaves to Keras is of a dtype: numbers, and in this thread layers."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


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
    """A call of Keras's batch norm, or of a subclass with other arguments, as in training, where it takes the statistics of the current
    rows."""
    signature = inspect.signature(call)
    if 'training' not in signature.parameters:
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
        return call(*args, **{**kwargs, **({'training': True} if takes_any else {})})
    given = signature.bind(*args, **kwargs)
    given.arguments['training'] = True
    return call(*given.args, **given.kwargs)


def _remember_input(seen, call, inputs, **kwargs):
    seen.features = inputs
    return call(inputs, **kwargs)

"""Model-Agnostic Meta-Learning (Finn, Abbeel & Levine, ICML 2017, arXiv:1703.03400).

Read from the top. `inner_step` is one step of gradient descent on a task's support set (line 6 of algorithm 1), `inner_loop` takes
several. `objective` is the query loss after them, `meta_gradient` its exact gradient with respect to what all tasks share (line 8).
`MAML` averages it over a meta-batch and updates. The other functions say where the methods of the family differ; the first case of
each is plain MAML. All are about one task; runtime/compute/engine.py maps them over meta-batches.
"""
from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tensorflow as tf

from networks import classifier_outputs, initial_head, last_layer, layers, mask_at, masks, narrowed, network_of, outputs_of, shared_weights
from runtime.compute import engine
from runtime.compute.config import checked
from runtime.compute.distribution import Replicas
from runtime.compute.optimizers import outer_optimizers, outer_updates
from runtime.compute.schedules import config_at, multi_step_weights
from special_grads import recomputing_loop
from utils import Metrics, adam_step, at_step, loss_of, map_rows, metric_functions, rows_of_step, stack_metrics

if TYPE_CHECKING:
    from runtime.datasets.tasks import TaskBatch

Step, Tensors = int | tf.Tensor, dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the model is and how it learns. Fields are named like the flags; the others come from the data source."""
    dim_input: int                          # numbers per row
    dim_output: int                         # targets per row; the way N in classification
    loss: Literal['mse', 'xent', 'return']  # 'return': of navigation.py
    update_batch_size: float                # K, by which 'xent' divides
    update_lr: float                        # inner step size, alpha
    num_updates: int = 1                    # inner updates of a training step
    meta_lr: float = 0.001                  # step size of the outer loop, beta
    norm: Literal['batch_norm', 'layer_norm', 'None'] = 'batch_norm'
    image_shape: tuple[int, int, int] | None = None  # (height, width, channels); None: fully connected net
    network: Callable | None = None         # (input_shape, outputs) -> keras.Model, instead of this program's own networks
    input_shape: tuple[int, ...] | None = None  # of a row, as that model gets it; None: image_shape, or [dim_input]
    mask_seed: int = 0                      # of that model's random layers
    dim_hidden: tuple[int, ...] = (40, 40)  # fully connected layer sizes
    num_filters: int = 64                   # channels of each convolution
    max_pool: bool = False                  # pool after each block, instead of convolutions of stride 2
    head: Literal['mean', 'flatten', None] = 'mean'  # what conv nets do before the last layer
    stop_grad: bool = False                 # first-order approximation
    inner_weights: Literal['all', 'head', 'body'] = 'all'  # that the inner loop adapts; 'head': the last layer, 'body': the others
    head_init: Literal['learned', 'shared', 'new', 'prototypes', 'ridge', 'neighbours'] = 'learned'  # one of networks.HEADS
    logits: Literal['linear', 'cosine'] = 'linear'  # what it computes
    pretrain_classes: int = 0               # classes that pre-training tells apart by a last layer of their own; 0: those of tasks
    ridge_lambda: float = 50.0              # of 'ridge': its penalty, from which it is learned
    ridge_scale: float = 10.0               # the same of what its outputs are multiplied by
    adapt_norm: bool = False                # the inner loop adapts offsets and scales of normalisation too
    norm_scale: bool = False                # batch norm has a scale
    norm_per_step: bool = False             # offsets and scales of each inner step
    learn_lr: Literal['no', 'layer', 'step', 'weight'] = 'no'  # learned step sizes: per tensor, per tensor and step, per number
    mean_loss: bool = False                 # 'xent' divides by the number of rows
    multi_step_loss: int = 0                # iterations in which the objective includes the loss after each inner update
    first_order_iterations: int = 0         # first iterations, computed as if with stop_grad
    meta_optimizer: Literal['adam', 'sgd'] = 'adam'  # of the outer loop
    meta_lr_schedule: Literal['constant', 'linear', 'cosine'] = 'constant'  # how the outer step size moves to meta_lr_final
    meta_lr_final: float = 0.0              # step size of the outer loop after the last iteration
    metatrain_iterations: int = 0           # when meta_lr_final is reached; unused if constant
    schedule_interval: int = 1              # iterations between changes of the schedules
    query_norm: Literal['batch', 'support', 'each'] = 'batch'  # statistics for query rows, see `query_features`
    outer: Literal['gradient', 'reptile'] = 'gradient'  # what the outer step follows: the meta-gradient, or the adapted weights
    inner_optimizer: Literal['sgd', 'adam'] = 'sgd'  # 'adam' with 'reptile' only
    inner_batch: int = 0                    # support rows of an inner step; 0: all
    recompute: bool = False                 # gradient checkpointing over inner steps
    clip: float | None = None               # elementwise bound of the meta-gradient
    clip_norm: float = 0.0                  # bound of its Euclidean norm; 0: none
    engine: Literal['auto', 'map', 'vmap', 'tasks', 'wide'] = 'auto'  # 'map': one task per core; 'vmap': all tasks in one graph
    jit: bool = False                       # compile that by XLA; not a setting: it follows from the engine and the network
    task_chunk: int | None = None           # tasks whose gradients are computed at a time; a divisor of the meta-batch
    dtype: Literal['float32', 'float64'] = 'float32'  # in which everything is computed; batches are cast to it


class Parameters(NamedTuple):
    """What all tasks share, {name: tensor} each."""
    weights: Tensors                     # where the inner loop starts from
    norm_params: Tensors                 # offsets and scales of normalisation
    learning_rates: Tensors = {}         # {'lr/<name>': step size} of tensors that the inner loop adapts, if they are learned
    inner_optimizer_state: Tensors = {}  # passed from task to task (Reptile's Adam); {} if there is none

    def trained(self) -> Tensors:
        """{name: tensor} of what the outer loop trains."""
        return {**self.weights, **self.norm_params, **self.learning_rates}


class TaskState(NamedTuple):
    """A task while it is adapted. All that is not here is read from the shared parameters."""
    fast: Tensors            # fast weights: the task's own values of the tensors that the inner loop adapts
    optimizer: Tensors = {}  # the state of the inner optimizer, if it has one
    features: Tensors = {}   # {'support': [N*K, features], 'query': [N*Q, features]} if no inner step changes them (ANIL)
    own: Tensors = {}        # the last layer, if it is computed for the task; in training, what random layers draw from


class Outputs(NamedTuple):
    """The network's outputs for a task; from `MAML.predict` for a meta-batch."""
    pre: tf.Tensor   # [N*K, dim_output]  support rows, before adaptation
    post: tf.Tensor  # [N*Q, dim_output]  query rows, after it


Trajectory = tuple[tf.Tensor, list[TaskState]]  # support outputs before adaptation, [N*K, dim_output]; states after each inner step
TaskGradient = tuple[Tensors, Outputs, Tensors]  # {name: gradient} of what is trained; outputs; the inner optimizer's next state


# Learning one task: the inner loop ----------------------------------------------------------------------------------

def inner_step(config: ModelConfig, parameters: Parameters, task: TaskBatch, state: TaskState, step: Step,
               iteration: Step = 0) -> tuple[TaskState, tf.Tensor]:
    """One step of gradient descent on a task's support loss: fast <- fast - alpha * gradient (line 6 of algorithm 1).

    `step` counts from 0; `iteration` is of meta-training. Returns the state after the step, differentiable with respect to the
    parameters, and the support outputs *before* it, [N*K, dim_output].
    """
    with tf.GradientTape() as tape:
        tape.watch(state.fast)
        loss, outputs = support_loss(config, parameters, task, state, step, iteration)
    gradients = tape.gradient(loss, state.fast, unconnected_gradients='zero')
    direction, optimizer = descent_direction(config, gradients, state.optimizer)
    alpha = step_sizes(config, parameters.learning_rates, state.fast, step)
    fast = {name: value - alpha[name] * direction[name] for name, value in state.fast.items()}
    return state._replace(fast=fast, optimizer=optimizer), outputs


def inner_loop(config: ModelConfig, parameters: Parameters, task: TaskBatch, iteration: Step = 0) -> Trajectory:
    """Adapts to a task by `num_updates` inner steps; without any, the state is the initial one."""
    if config.recompute and config.num_updates:
        return recomputed_loop(config, parameters, task, iteration)
    state, states, outputs = initial_state(config, parameters, task, iteration), [], []
    for step in range(config.num_updates):
        state, before = inner_step(config, parameters, task, state, step, iteration)
        states.append(state)
        outputs.append(before)
    return (outputs[0], states) if states else (support_outputs(config, parameters, task, state, 0), [state])


def recomputed_loop(config: ModelConfig, parameters: Parameters, task: TaskBatch, iteration: Step = 0) -> Trajectory:
    """`inner_loop` with gradient checkpointing; without `multi_step_loss`, the last state only, so that the graph stays small."""
    initial = initial_state(config, parameters, task, iteration)
    states = recomputing_loop(lambda number, state, parameters: inner_step(config, parameters, task, state, number, iteration)[0],
                              config.num_updates, initial, parameters)
    first = 0 if config.multi_step_loss else config.num_updates - 1
    return (support_outputs(config, parameters, task, initial, 0),
            [tf.nest.map_structure(lambda values, index=index: values[index], states) for index in range(first, config.num_updates)])


# Learning to learn: the outer loop ----------------------------------------------------------------------------------

def objective(config: ModelConfig, parameters: Parameters, task: TaskBatch, states: Sequence[TaskState],
              iteration: Step) -> tuple[tf.Tensor, tf.Tensor]:
    """What meta-training minimises: the query loss after the last inner step (line 8 of algorithm 1); with `multi_step_loss` a
    weighted mean of those after each (MAML++).

    Returns:
        The loss, a scalar divided as by `utils.loss_of`, and the query outputs after the last step, [N*Q, dim_output].
    """
    outputs = query_outputs(config, parameters, task, states[-1], config.num_updates - 1)
    loss = loss_of(config, outputs, task.query_y)
    if config.multi_step_loss:
        *weights, last_weight = multi_step_weights(config, iteration)
        others = (query_outputs(config, parameters, task, states[step], step) for step in range(len(weights)))
        loss = last_weight * loss + sum(weight * loss_of(config, outputs, task.query_y) for weight, outputs in zip(weights, others))
    return loss, outputs


def meta_gradient(config: ModelConfig, parameters: Parameters, iteration: Step, task: TaskBatch) -> TaskGradient:
    """The exact gradient of a task's objective, through its inner loop (line 8 of algorithm 1, equation 1)."""
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        pre, states = inner_loop(config, parameters, task, iteration)
        loss, post = objective(config, parameters, task, states, iteration)
    gradients = tape.gradient(loss, parameters.trained(), unconnected_gradients='zero')
    return gradients, Outputs(pre, post), parameters.inner_optimizer_state


def joint_gradient(config: ModelConfig, parameters: Parameters, iteration: Step, task: TaskBatch) -> TaskGradient:
    """The gradient of the support loss before adaptation: pre-training, on all tasks jointly."""
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        pre, states = inner_loop(config, parameters, task, iteration)
        loss = loss_of(config, pre, task.support_y)
    gradients = tape.gradient(loss, parameters.trained(), unconnected_gradients='zero')
    post = query_outputs(config, parameters, task, states[-1], config.num_updates - 1)
    return gradients, Outputs(pre, post), parameters.inner_optimizer_state


def classifier_gradient(config: ModelConfig, parameters: Parameters, iteration: Step, task: TaskBatch) -> TaskGradient:
    """The gradient of the loss of a classifier of all classes, for a 'task' of examples of all of them (Baseline: Chen et al., 2019)."""
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        outputs = classifier_outputs(config, weights_at(config, parameters, masks(config, iteration), 0), task.support_x)
        loss = loss_of(config, outputs, task.support_y)
    gradients = tape.gradient(loss, parameters.trained(), unconnected_gradients='zero')
    return gradients, Outputs(outputs, outputs), parameters.inner_optimizer_state


def reptile_gradient(config: ModelConfig, parameters: Parameters, iteration: Step, task: TaskBatch) -> TaskGradient:
    """The shared tensors minus the adapted ones, used by Reptile as the gradient (Nichol, Achiam & Schulman, 2018, algorithm 1)."""
    pre, (*_, last) = inner_loop(config, parameters, task, iteration)
    post = query_outputs(config, parameters, task, last, config.num_updates - 1)
    gradients = {name: value - last.fast.get(name, value) for name, value in parameters.trained().items()}
    return gradients, Outputs(pre, post), last.optimizer


@functools.cache
def task_gradient(config: ModelConfig, phase: str) -> Callable:
    """What the outer loop follows in a phase, 'metatrain' or 'pretrain'. Cached: TensorFlow compiles each function object again."""
    if phase == 'pretrain':
        return functools.partial(classifier_gradient if config.pretrain_classes else joint_gradient, config)
    return functools.partial({'gradient': meta_gradient, 'reptile': reptile_gradient}[config.outer], config)


# Where the methods differ -------------------------------------------------------------------------------------------

def adapted(config: ModelConfig, parameters: Parameters) -> Tensors:
    """The tensors that the inner loop adapts: all of the network (MAML), the last layer (ANIL) or the others (BOIL); see `adapt_norm`."""
    weights, head = layers(config, parameters.weights), network_of(config).head_names
    names = {'all': weights.keys(), 'head': {*head}, 'body': weights.keys() - head}[config.inner_weights]
    weights = {name: value for name, value in weights.items() if name in names}
    return {**weights, **parameters.norm_params} if config.adapt_norm else weights


def initial_state(config: ModelConfig, parameters: Parameters, task: TaskBatch, iteration: Step | None = None) -> TaskState:
    """A task before its first inner step: at the shared parameters, but for a last layer that is computed for it."""
    head, features, random = {}, {}, masks(config, iteration)
    fixed, tensors = has_fixed_features(config) and not random, weights_at(config, parameters, random, 0)
    if fixed or config.head_init != 'learned':
        support = network_of(config).features(tensors, task.support_x)
    if config.head_init != 'learned':
        head = initial_head(config, parameters.weights, support, task.support_y)
    if fixed:
        features = {'support': support, 'query': query_features(config, task, tensors)}
    own = parameters._replace(weights={**parameters.weights, **head})
    return TaskState(adapted(config, own), parameters.inner_optimizer_state, features, {**head, **random})


def has_fixed_features(config: ModelConfig) -> bool:
    """Whether the last layer's input is the same in every inner step (ANIL), so that it can be computed once per task."""
    return config.inner_weights == 'head' and not (config.adapt_norm or config.norm_per_step or config.inner_batch)


def weights_at(config: ModelConfig, parameters: Parameters, own: Tensors, step: Step) -> Tensors:
    """The network's tensors at an inner step: the task's own, or the shared ones; with `norm_per_step`, offsets and scales of that step."""
    tensors = {**parameters.weights, **parameters.norm_params, **own}
    norm_params = {name: at_step(tensors[name], step) for name in parameters.norm_params} if config.norm_per_step else {}
    return {**tensors, **norm_params, **mask_at(own, step)}


def support_outputs(config: ModelConfig, parameters: Parameters, task: TaskBatch, state: TaskState, step: Step) -> tf.Tensor:
    """The network's outputs for a task's support rows at an inner step, [N*K, dim_output]."""
    network, tensors = network_of(config), weights_at(config, parameters, {**state.own, **state.fast}, step)
    return outputs_of(config, tensors, state.features['support'] if state.features else network.features(tensors, task.support_x))


def query_outputs(config: ModelConfig, parameters: Parameters, task: TaskBatch, state: TaskState, step: Step) -> tf.Tensor:
    """The network's outputs for a task's query rows at an inner step, [N*Q, dim_output]."""
    tensors = weights_at(config, parameters, {**state.own, **state.fast}, step)
    return outputs_of(config, tensors, state.features['query'] if state.features else query_features(config, task, tensors))


def query_features(config: ModelConfig, task: TaskBatch, tensors: Tensors) -> tf.Tensor:
    """The last layer's input for a task's query rows, [N*Q, features].

    Under batch norm, query rows are normalised by their own statistics (Reference behaviour: so evaluation is transductive), or each
    by itself: with `query_norm='support'` by those of the support rows, with 'each' by those of the support rows and itself (Reptile).
    """
    features = network_of(config).features
    if config.query_norm == 'batch':
        return features(tensors, task.query_x)
    if config.query_norm == 'each':
        return map_rows(lambda row: features(tensors, tf.concat([task.support_x, row[None]], axis=0))[-1], task.query_x, not config.network)
    rows, support_rows = tf.concat([task.support_x, task.query_x], axis=0), task.support_x.shape[0]
    return features(tensors, rows, stats_rows=support_rows)[support_rows:]


def support_loss(config: ModelConfig, parameters: Parameters, task: TaskBatch, state: TaskState, step: Step,
                 iteration: Step) -> tuple[tf.Tensor, tf.Tensor]:
    """The loss that an inner step descends: of all support rows, or with `inner_batch` of some; and all outputs, [N*K, dim_output]."""
    outputs = support_outputs(config, parameters, task, state, step)
    if not config.inner_batch:
        return loss_of(config, outputs, task.support_y), outputs
    rows = rows_of_step(task.support_x.shape[0], config.inner_batch, step, iteration)
    part = task._replace(support_x=tf.gather(task.support_x, rows), support_y=tf.gather(task.support_y, rows))
    config_of_part = dataclasses.replace(config, update_batch_size=config.inner_batch / config.dim_output)  # keeps the loss's scale
    return loss_of(config_of_part, support_outputs(config, parameters, part, state, step), part.support_y), outputs


def descent_direction(config: ModelConfig, gradients: Tensors, optimizer: Tensors) -> tuple[Tensors, Tensors]:
    """What an inner step subtracts, before the step size, and the inner optimizer's next state: the gradients themselves; as
    constants in first-order MAML; divided by their root mean square with Reptile's Adam."""
    if config.stop_grad:
        gradients = {name: tf.stop_gradient(gradient) for name, gradient in gradients.items()}
    return (gradients, optimizer) if config.inner_optimizer == 'sgd' else adam_step(gradients, optimizer)


def step_sizes(config: ModelConfig, learning_rates: Tensors, fast: Tensors, step: Step) -> dict[str, Any]:
    """{name: step size} of an inner step: alpha, or the learned one, a scalar or shaped like the tensor."""
    if config.learn_lr == 'no':
        return dict.fromkeys(fast, config.update_lr)
    rates = {name: learning_rates[f'lr/{name}'] for name in fast}
    return {name: at_step(rate, step) for name, rate in rates.items()} if config.learn_lr == 'step' else rates


def initial_parameters(config: ModelConfig, seed: int) -> Parameters:
    """What all tasks share before training; a function of config and seed.

    With `norm_per_step`, offsets and scales are [num_updates, channels]. Learned step sizes start at alpha: scalars for
    `learn_lr='layer'`, [num_updates] for 'step', shaped like the tensor (a column of a computed last layer) for 'weight'. An inner
    Adam's state starts at 0.
    """
    weights, norm_params = shared_weights(config, seed), network_of(config).initial_norm_params()
    if config.norm_per_step:
        norm_params = {name: tf.repeat(value[None], config.num_updates, axis=0) for name, value in norm_params.items()}
    column = last_layer(config, seed, outputs=1) if config.head_init != 'learned' else {}
    fast = adapted(config, Parameters({**weights, **column}, norm_params))
    shapes = {'layer': [], 'step': [config.num_updates]}
    rates = {f'lr/{name}': tf.fill(shapes.get(config.learn_lr, value.shape), tf.constant(config.update_lr, config.dtype))
             for name, value in fast.items() if config.learn_lr != 'no'}
    squares = {f'inner/v/{name}': tf.zeros_like(value) for name, value in fast.items()}
    optimizer = {'inner/t': tf.zeros([]), **squares} if config.inner_optimizer == 'adam' else {}
    return Parameters(weights, norm_params, rates, optimizer)


# The model ----------------------------------------------------------------------------------------------------------

def adapt_and_predict(config: ModelConfig, parameters: Parameters, step: Step,
                      task_and_state: tuple[TaskBatch, TaskState]) -> tuple[Outputs, TaskState]:
    """Inner step number `step` of a task: Outputs, and its state after it."""
    task, state = task_and_state
    state, pre = inner_step(config, parameters, task, state, step)
    return Outputs(pre, query_outputs(config, parameters, task, state, step)), state


def predict_without_adapting(config: ModelConfig, parameters: Parameters, step: Step,
                            task_and_state: tuple[TaskBatch, TaskState]) -> tuple[Outputs, TaskState]:
    """Outputs of a task without an inner step, and its unchanged state."""
    task, state = task_and_state
    return Outputs(*(outputs(config, parameters, task, state, step) for outputs in (support_outputs, query_outputs))), state


class MAML:
    """The shared parameters, and what is done with them on meta-batches: TaskBatches of arrays [tasks, rows, dim].

    Attributes:
        weights: {'conv1': tf.Variable, ...}, the reference's names.
        norm_params: {'0/beta': tf.Variable, ...}, offsets and scales of normalisation.
        learning_rates: {name: tf.Variable} of learned inner step sizes; {} if they are fixed.
        shared: all of them, as Parameters.
        steps_per_call: training steps per compiled call: 100 for small networks, where call overhead dominates, else 1.
    """

    def __init__(self, config: ModelConfig, seed: int | None = None, replicas: Replicas | None = None, network: Callable | None = None):
        """The initial weights are a function of config and seed (None: 0), which is also the mask_seed, if given; `network` is that of the
        config (docs/networks.md). With several replicas, meta-batches are what `Replicas.distribute` makes, except for `predict`. Raises
        UserError if the config makes no sense."""
        config = checked(config, seed, network)
        self.replicas, self.description = replicas or Replicas(), network_of(config).description
        self.config = config = engine.resolve(config, network_of(config))
        self.shared = tf.nest.map_structure(lambda value: tf.Variable(tf.cast(value, config.dtype)), initial_parameters(config, seed or 0))
        self.weights, self.norm_params, rates, inner_optimizer_state = self.shared
        self.learning_rates = {name.removeprefix('lr/'): variable for name, variable in rates.items()}
        trained = self.shared.trained()
        self.steps_per_call = 100 if sum(math.prod(v.shape) for v in trained.values()) < 10_000 else 1
        self._optimizers = outer_optimizers(config, trained)
        self._updates = outer_updates(config, self._optimizers)
        self._engine = engine.Engine(config, self.replicas, self.shared, metric_functions(config))
        self._gradient_structure = dict.fromkeys(trained), Outputs(0, 0), dict.fromkeys(inner_optimizer_state)
        # Made once: TensorFlow compiles each function object again.
        self._predictions = [functools.partial(function, config) for function in (predict_without_adapting, adapt_and_predict)]
        self._initial_state = lambda parameters, _, task: tf.nest.map_structure(  # tf.vectorized_map needs an operation
            tf.identity, initial_state(config, parameters, task))

    def parameters(self) -> dict[str, tf.Variable]:
        """{name: variable} of all that tasks share; 'lr/<name>' for learned step sizes."""
        return {name: variable for group in self.shared for name, variable in group.items()}

    def state(self) -> dict[str, tf.Variable]:
        """{name: variable}: everything that a training run needs to continue."""
        metatrain, pretrain = (optimizer.state(f'{phase}/adam/') for phase, optimizer in self._optimizers.items())
        return {**self.parameters(), **metatrain, **pretrain}

    def variant(self, **changes: Any) -> MAML:
        """A MAML with the same weights, another config and a fresh optimizer. With a smaller `dim_output` n it has the first n outputs: all
        are equivalent, for a task's labels are in random order."""
        other = MAML(dataclasses.replace(self.config, **changes), replicas=self.replicas)
        other.copy_parameters(self)
        return other

    def copy_parameters(self, other: MAML) -> None:
        """Copies weights and all other parameters from another MAML, which may have more outputs; see `variant`."""
        variables = self.parameters()
        for name, value in narrowed(self.config, variables, other.config, other.parameters()).items():
            variables[name].assign(value)

    def train_steps(self, phase: str, batches: TaskBatch, iteration: int = 0, stopping: bool = False) -> Tensors:
        """Updates the shared parameters with meta-batches [steps, tasks, rows, dim], one after the other.

        `phase` is 'metatrain' or 'pretrain'; `iteration` that of the first step, `schedules.config_at` must be the same in all;
        `stopping` whether this process is about to stop. Returns, each [steps], what `metric_functions` measures before a step (means over
        tasks), 'gradient_norm' before bounds, 'finite' (if not, the step changed nothing) and 'stopping' of any process.
        """
        function = task_gradient(config_at(self.config, iteration) if phase == 'metatrain' else self.config, phase)
        return self._engine.train(function, self._gradient_structure, self._updates[phase], batches,
                                  tf.constant(iteration, tf.int64), tf.cast(stopping, self.config.dtype))

    def metatrain_step(self, batch: TaskBatch, iteration: int = 0, phase: str = 'metatrain') -> Tensors:
        """One outer update with a meta-batch; scalars named as by `train_steps`. Schedules and random layers follow the iteration."""
        steps = self.train_steps(phase, self.replicas.add_leading_axis(batch), iteration)
        return {name: values[0] for name, values in steps.items()}

    def pretrain_step(self, batch: TaskBatch, iteration: int = 0) -> Tensors:
        """`metatrain_step` of joint training."""
        return self.metatrain_step(batch, iteration, 'pretrain')

    def meta_gradients(self, batch: TaskBatch, iteration: int = 0, phase: str = 'metatrain') -> Tensors:
        """`task_gradient` of a phase, averaged over tasks, before clipping: {name: tensor}."""
        function = task_gradient(config_at(self.config, iteration), phase)
        return self._engine.means(function, self._gradient_structure, batch, tf.constant(iteration, tf.int64))

    def pretrain_gradients(self, batch: TaskBatch) -> Tensors:
        """`meta_gradients` of pre-training: of the support loss before adaptation."""
        return self.meta_gradients(batch, phase='pretrain')

    def evaluate(self, batch: TaskBatch, num_updates: int) -> Metrics:
        """Metrics of a meta-batch, each [tasks] or [num_updates, tasks]; no task's figures depend on another's.

        num_updates = 0: `post_losses` and `post_accuracies` have one row, of the query rows without an inner step.
        """
        state, rows = self._engine.map_on_replicas(self._initial_state, batch, tf.constant(0, tf.int64)), []
        for step in tf.range(max(num_updates, 1), dtype=tf.int64):
            row, state = self._engine.map_and_measure(self._predictions[num_updates > 0], Outputs(0, 0), batch, state, step)
            rows.append(row)
        return stack_metrics(rows)

    def predict(self, batch: TaskBatch, num_updates: int) -> Outputs:
        """Outputs for support rows before adaptation, [tasks, N*K, dim_output], and for query rows after each update,
        [num_updates, tasks, N*Q, dim_output]; for num_updates = 0 without an inner step, [1, tasks, N*Q, dim_output]."""
        state, rows = self._engine.map(self._initial_state, batch, tf.constant(0, tf.int64)), []
        for step in tf.range(max(num_updates, 1), dtype=tf.int64):
            row, state = self._engine.map(self._predictions[num_updates > 0], (batch, state), step)
            rows.append(row)
        return Outputs(rows[0].pre, tf.stack([row.post for row in rows]))

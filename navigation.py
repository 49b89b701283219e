"""The paper's third domain: 2-D navigation by policy gradients (Finn, Abbeel & Levine, ICML 2017, section 5.3, figure 4).

Read from the top. A task is a goal in the plane: `rollouts` walks a point towards it under a Gaussian policy. `adapt` is one step of
policy gradient on a task's episodes (line 6 of algorithm 3), `surrogate_and_kl` what the outer loop minimises and bounds after it
(line 10), `trpo_step` one constrained update by conjugate gradients and a line search; `iteration` has all of them in their order.

Arrays have a leading axis of tasks. Episodes are padded: mask is 1 while an episode runs, and padding counts in no sum or mean. Parameters
are {name: tensor}, those of all tasks; a policy of each task has [tasks, ...]. All functions are pure, in the dtype of their arguments.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import tensorflow as tf

if TYPE_CHECKING:
    from maml import ModelConfig
    from runtime.datasets.goals import GoalBatch

HORIZON, DISCOUNT, GAE_LAMBDA = 100, 0.99, 1.0
LARGEST_MOVE, GOAL_RADIUS, MIN_LOG_STD = 0.1, 0.01, math.log(1e-6)
KL_BOUND, DAMPING, CG_STEPS, CG_TOLERANCE = 0.01, 1e-5, 10, 1e-10
BACKTRACKING, LINE_SEARCH_STEPS = 0.8, 15
BASELINE_RIDGE = 1e-5
Tensors = dict[str, tf.Tensor]


class Trajectories(NamedTuple):
    """Episodes of a meta-batch."""
    observations: tf.Tensor  # [tasks, rollouts, steps, 2], the position before the move; for the oracle 4 numbers: the goal too
    actions: tf.Tensor       # [tasks, rollouts, steps, 2], before they are clipped
    rewards: tf.Tensor       # [tasks, rollouts, steps], minus the distance to the goal after the move
    mask: tf.Tensor          # [tasks, rollouts, steps], 1 while the episode runs


Batch = tuple[Trajectories, tf.Tensor]  # episodes, and their advantages


# The robot and its policy -------------------------------------------------------------------------------------------

def policy(parameters: Tensors, observations: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean, [tasks, rows, 2], and log standard deviation, [tasks, 1, 2] or of the shared policy [1, 2], of the actions at observations
    [tasks, rows, numbers]."""
    hidden = observations
    for layer in range(1, _layers(parameters)):
        hidden = tf.nn.relu(hidden @ parameters[f'w{layer}'] + parameters[f'b{layer}'][..., None, :])
    log_std = tf.maximum(parameters['log_std'], tf.constant(MIN_LOG_STD, hidden.dtype))
    return hidden @ parameters[f'w{_layers(parameters)}'] + parameters[f'b{_layers(parameters)}'][..., None, :], log_std[..., None, :]


def log_likelihood(parameters: Tensors, trajectories: Trajectories) -> tf.Tensor:
    """log pi(a|o) of each action, [tasks, rollouts, steps]."""
    mean, log_std = policy(parameters, _rows(trajectories.observations))
    deviation = (_rows(trajectories.actions) - mean) * tf.exp(-log_std)
    log_density = -tf.square(deviation) / 2 - log_std - math.log(2 * math.pi) / 2
    return tf.reshape(tf.reduce_sum(log_density, axis=-1), trajectories.rewards.shape)


def moved(positions: tf.Tensor, actions: tf.Tensor) -> tf.Tensor:
    """Positions after a move: by clip(0.1 a, -0.1, 0.1)."""
    return positions + tf.clip_by_value(LARGEST_MOVE * actions, -LARGEST_MOVE, LARGEST_MOVE)


def rollouts(parameters: Tensors, goals: tf.Tensor, noise: tf.Tensor, sees_goal: bool = False) -> Trajectories:
    """Episodes of at most as many steps as there is noise for, each from (0, 0); an episode ends when the goal is nearer than 0.01
    in x and in y.

    Args:
        goals: [tasks, 2].
        noise: standard normal, [steps, tasks, rollouts, 2].
        sees_goal: observations have the goal too (the oracle).
    """
    goals = tf.broadcast_to(goals[:, None], noise.shape[1:])

    def observe(position):
        return tf.concat([position, goals], axis=-1) if sees_goal else position

    def move(state, noise):
        position, running = state[0], state[-1]
        observation = observe(position)
        mean, log_std = policy(parameters, observation)
        action = mean + tf.exp(log_std) * noise
        after = moved(position, action)
        arrived = tf.reduce_all(tf.abs(after - goals) < GOAL_RADIUS, axis=-1)
        return after, observation, action, running, tf.where(arrived, tf.zeros_like(running), running)

    zeros, ones = tf.zeros_like(noise[0]), tf.ones_like(noise[0, ..., 0])
    steps = tf.scan(move, noise, (zeros, observe(zeros), zeros, ones, ones))
    after, observations, actions, mask, _ = map(_rollouts_first, steps)
    return Trajectories(observations, actions, -tf.norm(after - goals[:, :, None], axis=-1) * mask, mask)


def average_return(trajectories: Trajectories) -> tf.Tensor:
    """The sum of an episode's rewards, not discounted, averaged over episodes, [tasks]."""
    rewards, mask = trajectories.rewards * trajectories.mask, trajectories.mask
    return tf.reduce_sum(rewards, axis=[1, 2]) / tf.reduce_sum(mask[..., 0], axis=1)


def first_episodes(trajectories: Trajectories, steps: int) -> Trajectories:
    """The first episodes of each task that have at least this many steps together; the mask of later ones is 0."""
    lengths = tf.reduce_sum(trajectories.mask, axis=-1)
    kept = tf.cast(tf.cumsum(lengths, axis=1, exclusive=True) < steps, lengths.dtype)
    return trajectories._replace(mask=trajectories.mask * kept[..., None])


# Advantages ---------------------------------------------------------------------------------------------------------

def discounted_sums(values: tf.Tensor, discount: float) -> tf.Tensor:
    """sum over s >= t of discount^(s - t) values[s], at each step t; [..., steps]."""
    steps = tf.range(values.shape[-1], dtype=values.dtype)
    later = steps[:, None] - steps
    weights = tf.where(later < 0, tf.zeros_like(later), tf.constant(discount, values.dtype) ** tf.maximum(later, 0))
    return tf.linalg.matvec(weights, values, transpose_a=True)


def baseline(trajectories: Trajectories, returns: tf.Tensor) -> tf.Tensor:
    """A linear prediction of returns, fitted to a task's episodes by ridge regression, [tasks, rollouts, steps]; 0 where mask is 0.

    Features are o and o^2 with o clipped to 10, and t, t^2, t^3, 1 with t the step / 100. Solved in double precision: they are
    nearly dependent.
    """
    observations, mask = (tf.cast(values, tf.float64) for values in (trajectories.observations, trajectories.mask[..., None]))
    clipped = tf.clip_by_value(observations, -10, 10)
    time = tf.broadcast_to(tf.range(mask.shape[2], dtype=tf.float64)[:, None] / 100, mask.shape)
    features = _rows(tf.concat([clipped, clipped ** 2, time, time ** 2, time ** 3, tf.ones_like(time)], axis=-1) * mask)
    squares = tf.matmul(features, features, transpose_a=True) + BASELINE_RIDGE * tf.eye(features.shape[-1], dtype=tf.float64)
    projections = tf.matmul(features, _rows(tf.cast(returns, tf.float64)[..., None]), transpose_a=True)
    values = features @ tf.linalg.cholesky_solve(tf.linalg.cholesky(squares), projections)
    return tf.cast(tf.reshape(values, returns.shape), returns.dtype)


def advantages(trajectories: Trajectories, discount: float, gae_lambda: float) -> tf.Tensor:
    """Generalised advantage estimates (Schulman et al., 2016), [tasks, rollouts, steps], normalised over all steps of a task: minus their
    mean, divided by their standard deviation + 1e-8. The value after an episode's last step is 0."""
    rewards, mask = trajectories.rewards * trajectories.mask, trajectories.mask
    values = baseline(trajectories, discounted_sums(rewards, discount))
    following = tf.concat([values[..., 1:], tf.zeros_like(values[..., :1])], axis=-1)
    estimates = discounted_sums(rewards + discount * following - values, discount * gae_lambda) * mask
    deviations = (estimates - _mean_of_steps(estimates, mask)) * mask
    return deviations / (tf.sqrt(_mean_of_steps(deviations ** 2, mask)) + 1e-8)


# Algorithm 3 --------------------------------------------------------------------------------------------------------

def adapt(parameters: Tensors, trajectories: Trajectories, advantages: tf.Tensor, update_lr: float, stop_grad: bool = False) -> Tensors:
    """One step of policy gradient from the shared parameters, or each task's own, {name: [tasks, ...]} (line 6 of algorithm 3).

    A task's loss is minus the mean over its steps of log pi(a|o) * advantage. The result is differentiable with respect to the
    parameters; with `stop_grad` the gradient is a constant.
    """
    tasks = advantages.shape[0]
    fast = {name: value + tf.zeros([tasks] + [1] * _rank(name), value.dtype) for name, value in parameters.items()}
    with tf.GradientTape() as tape:
        tape.watch(fast)
        weighted = log_likelihood(fast, trajectories) * advantages
        loss = -tf.reduce_sum(_mean_of_steps(weighted, trajectories.mask))  # of all tasks: each depends on its own weights
    gradients = tape.gradient(loss, fast)
    if stop_grad:
        gradients = tf.nest.map_structure(tf.stop_gradient, gradients)
    return {name: value - update_lr * gradients[name] for name, value in fast.items()}


def kl_divergence(old: tuple[tf.Tensor, tf.Tensor], new: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
    """KL(old || new) of Gaussians, (mean, log standard deviation) each, summed over the action's numbers, [tasks, rows]."""
    (old_mean, old_log_std), (mean, log_std) = old, new
    old_variance, variance = tf.exp(2 * old_log_std), tf.exp(2 * log_std)
    return tf.reduce_sum(((old_mean - mean) ** 2 + old_variance - variance) / (2 * variance + 1e-8) + log_std - old_log_std, axis=-1)


def surrogate_and_kl(parameters: Tensors, before: Batch, after: Batch, sampled_by: Tensors, update_lr: float,
                     stop_grad: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
    """What the outer step minimises, and what it bounds: two scalars, for policies adapted from `parameters` (line 10 of algorithm 3).

    The surrogate is minus the mean over a task's steps of ratio * advantage, averaged over tasks; ratio is that of the likelihoods under
    the adapted policy and the one that sampled. The KL divergence is from the latter to the former, averaged over all steps.

    Args:
        before: the episodes that policies are adapted to.
        after: the episodes of the adapted policies, sampled by `sampled_by`, {name: [tasks, ...]}.
    """
    sampled_by = tf.nest.map_structure(tf.stop_gradient, sampled_by)  # in pre-training these are the parameters
    adapted = adapt(parameters, *before, update_lr, stop_grad)
    trajectories, weights = after
    ratio = tf.exp((log_likelihood(adapted, trajectories) - log_likelihood(sampled_by, trajectories)) * trajectories.mask)
    surrogate = -tf.reduce_mean(_mean_of_steps(ratio * weights, trajectories.mask))
    observations, mask = _rows(trajectories.observations), _rows(trajectories.mask[..., None])[..., 0]
    divergence = kl_divergence(policy(sampled_by, observations), policy(adapted, observations))
    return surrogate, tf.reduce_sum(divergence * mask) / tf.reduce_sum(mask)


def surrogate_gradient(parameters: Tensors, before: Batch, after: Batch, sampled_by: Tensors, update_lr: float,
                       stop_grad: bool = False) -> tuple[tf.Tensor, Tensors]:
    """The surrogate and its exact gradient, through the inner step; arguments as of `surrogate_and_kl`."""
    parameters = tf.nest.map_structure(tf.convert_to_tensor, parameters)
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        surrogate, _ = surrogate_and_kl(parameters, before, after, sampled_by, update_lr, stop_grad)
    return surrogate, tape.gradient(surrogate, parameters)


def kl_hessian_product(parameters: Tensors, vector: Tensors, before: Batch, after: Batch, sampled_by: Tensors, update_lr: float,
                       stop_grad: bool = False) -> Tensors:
    """The Hessian of the mean KL divergence times a vector, exact: the gradient of its slope in that direction; other arguments as of
    `surrogate_and_kl`."""
    parameters = tf.nest.map_structure(tf.convert_to_tensor, parameters)
    with tf.GradientTape() as outer:
        outer.watch(parameters)
        with tf.GradientTape() as tape:
            tape.watch(parameters)
            _, divergence = surrogate_and_kl(parameters, before, after, sampled_by, update_lr, stop_grad)
        slope = _dot(tape.gradient(divergence, parameters), vector)
    return outer.gradient(slope, parameters)


class TrpoStep(NamedTuple):
    """What `trpo_step` did."""
    parameters: Tensors
    divergence: tf.Tensor  # mean KL divergence of the accepted step, 0 if none was
    taken: tf.Tensor       # bool, whether a step was accepted
    finite: tf.Tensor      # bool, whether the gradient and the direction were finite


def trpo_step(parameters: Tensors, before: Batch, after: Batch, sampled_by: Tensors, update_lr: float, stop_grad: bool = False) -> TrpoStep:
    """One update by trust-region policy optimisation (Schulman et al., 2015): the longest step along the natural gradient, of lengths
    that fall by 0.8, by which the surrogate falls and the mean KL divergence is at most KL_BOUND; none if the first 15 fail.

    Arguments are those of `surrogate_and_kl`.
    """
    problem = before, after, sampled_by, update_lr, stop_grad
    surrogate, gradient = surrogate_gradient(parameters, *problem)

    def curvature(vector):
        product = kl_hessian_product(parameters, vector, *problem)
        return {name: product[name] + DAMPING * value for name, value in vector.items()}

    direction, residual = conjugate_gradients(curvature, gradient)
    longest = tf.sqrt(2 * KL_BOUND / (_dot(direction, _plus(gradient, -1, residual)) + 1e-8))

    def attempt(number, *_):
        length = longest * BACKTRACKING ** tf.cast(number, longest.dtype)
        candidate = {name: value - length * direction[name] for name, value in parameters.items()}
        after, divergence = surrogate_and_kl(candidate, *problem)
        return number + 1, candidate, divergence, (after < surrogate) & (divergence <= KL_BOUND)

    _, candidate, divergence, taken = tf.while_loop(
        lambda number, *others: ~others[-1] & (number < LINE_SEARCH_STEPS),
        attempt, (tf.constant(0), parameters, tf.zeros_like(surrogate), tf.constant(False)))
    chosen = {name: tf.where(taken, candidate[name], value) for name, value in parameters.items()}
    return TrpoStep(chosen, tf.where(taken, divergence, tf.zeros_like(divergence)), taken, tf.math.is_finite(longest + surrogate))


def conjugate_gradients(product: Callable[[Tensors], Tensors], target: Tensors) -> tuple[Tensors, Tensors]:
    """x with product(x) near target, after CG_STEPS steps of conjugate gradients from 0, or fewer if the squared residual is small; and
    the residual, target - product(x)."""
    def step(number, solution, residual, direction, squared):
        image = product(direction)
        length = squared / _dot(direction, image)
        solution, residual = _plus(solution, length, direction), _plus(residual, -length, image)
        squared_after = _dot(residual, residual)
        return number + 1, solution, residual, _plus(residual, squared_after / squared, direction), squared_after

    start = (tf.constant(0), tf.nest.map_structure(tf.zeros_like, target), target, target, _dot(target, target))
    return tf.while_loop(lambda number, *others: (number < CG_STEPS) & (others[-1] > CG_TOLERANCE), step, start)[1:3]


def _dot(first, second):
    return tf.add_n([tf.reduce_sum(value * second[name]) for name, value in first.items()])


def _plus(values, factor, others):
    return {name: value + factor * others[name] for name, value in values.items()}


def _layers(parameters):
    return len(parameters) // 2  # a weight and a bias each, and the log standard deviation


def _rank(name):
    """Axes of a parameter of the shared policy."""
    return 2 if name.startswith('w') else 1


def _rows(values):
    """[tasks, rollouts, steps, numbers] -> [tasks, rollouts * steps, numbers]."""
    return tf.reshape(values, [values.shape[0], values.shape[1] * values.shape[2], values.shape[3]])


def _rollouts_first(values):
    """[steps, tasks, rollouts, ...] -> [tasks, rollouts, steps, ...]."""
    return tf.transpose(values, [1, 2, 0, *range(3, len(values.shape))])


def _mean_of_steps(values, mask):
    """Means over the steps of a task's running episodes, [tasks, 1, 1]."""
    return tf.reduce_sum(values * mask, axis=[1, 2], keepdims=True) / tf.reduce_sum(mask, axis=[1, 2], keepdims=True)


# An iteration -------------------------------------------------------------------------------------------------------

def walk(config: ModelConfig, parameters: Tensors, goals: tf.Tensor, keys: tf.Tensor,
         offset: tf.Tensor | tuple[int, int] = (0, 0)) -> Trajectories:
    """Episodes of a policy; a function of keys, int32 [tasks, rollouts, 2], to which an offset [2] is added for other random numbers."""
    noise = tf.map_fn(lambda key: tf.random.stateless_normal([HORIZON, 2], key, dtype=config.dtype, alg='philox'),
                      tf.reshape(keys + tf.cast(offset, tf.int32), [-1, 2]), fn_output_signature=tf.as_dtype(config.dtype))
    noise = tf.transpose(tf.reshape(noise, [*keys.shape[:2], HORIZON, 2]), [2, 0, 1, 3])
    return rollouts(parameters, tf.cast(goals, config.dtype), noise, sees_goal=config.dim_input > 2)


def with_advantages(trajectories: Trajectories) -> Batch:
    """Episodes, and their advantages with the paper's constants."""
    return trajectories, advantages(trajectories, DISCOUNT, GAE_LAMBDA)


def iteration(config: ModelConfig, phase: str, parameters: Tensors, batch: GoalBatch) -> tuple[Tensors, Tensors]:
    """An iteration of algorithm 3: episodes of each task, the inner step, episodes after it, the outer step. In pre-training, joint
    training on all goals, the outer step is for the shared policy: without an inner step, on its own episodes.

    Returns the new parameters, and scalars to report.
    """
    before = with_advantages(walk(config, parameters, batch.goals, batch.support_keys))
    adapted = adapt(parameters, *before, config.update_lr, config.stop_grad)
    after = with_advantages(walk(config, adapted, batch.goals, batch.query_keys))
    if phase == 'metatrain':
        step = trpo_step(parameters, before, after, adapted, config.update_lr, config.stop_grad)
    else:
        step = trpo_step(parameters, before, before, parameters, 0.0, True)
    returns = {f'{when}_return': tf.reduce_mean(average_return(episodes[0])) for when, episodes in (('pre', before), ('post', after))}
    return step.parameters, {**returns, 'kl': step.divergence, 'taken': step.taken, 'finite': step.finite}


def evaluation_update(config: ModelConfig, parameters: Tensors, episodes: Trajectories, number: tf.Tensor) -> Tensors:
    """Each task's policy after the update `number`, from 0, on its episodes. The reference's step size is alpha in the first update, half
    of it in others."""
    update_lr = tf.constant(config.update_lr, config.dtype)
    update_lr = tf.where(number == 0, update_lr, update_lr / 2)

    def update(task):  # one after the other: many short episodes are long arrays
        parameters, episodes = tf.nest.map_structure(lambda value: value[None], task)
        return tf.nest.map_structure(lambda value: value[0], adapt(parameters, *with_advantages(episodes), update_lr))

    signature = {name: tf.TensorSpec(value.shape[1:], value.dtype) for name, value in parameters.items()}
    return tf.map_fn(update, (parameters, episodes), fn_output_signature=signature, parallel_iterations=2)

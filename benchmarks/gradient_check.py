"""How exact the meta-gradient of a trained model is: training's, in float32, against float64, and that against central differences.

    python benchmarks/gradient_check.py logs/omniglot20way
    python benchmarks/gradient_check.py logs/omniglot20way --steps 500
    python benchmarks/gradient_check.py logs/omniglot20way --norms 200 --test_iter 30001

With the flags and the newest checkpoint of the run, on the first meta-batch of meta-validation. With --steps, it shows what rounding does
to a training instead: the run goes on in float32 and in float64, on the same meta-batches. With --norms, the run goes on as it would, and
the largest of its meta-gradients is examined: which task it comes from, and whether it is right. Nothing is saved.
"""
import argparse
import dataclasses
import sys

import numpy as np
import run_files  # noqa: F401  (puts the program on the path)

from main import parse, run_and_data
from runtime.cli.flags import default
from runtime.system.errors import UserError

DIRECTIONS = 3
STEP = 1e-9  # short: where a ReLU of the inner loop changes its state, the loss jumps


def relative_error(gradients: dict, exact: dict) -> float:
    """|gradients - exact| / |exact|, Euclidean, over all tensors together."""
    return norm({name: np.asarray(gradients[name], float) - exact[name] for name in exact}) / norm(exact)


def norm(gradients: dict) -> float:
    """The Euclidean norm of {name: array}, all together."""
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(value, float))) for value in gradients.values())))


def errors_of_differences(gradients: dict, loss_at, rng: np.random.Generator) -> list[float]:
    """|difference - derivative| / |derivative| along random directions; `loss_at({name: array})` is the loss at these offsets."""
    errors = []
    for _ in range(DIRECTIONS):
        along = {name: rng.normal(size=value.shape) for name, value in gradients.items()}
        derivative = sum(np.sum(np.asarray(gradients[name]) * along[name]) for name in along)
        ahead, behind = (loss_at({name: sign * STEP * value for name, value in along.items()}) for sign in (1, -1))
        errors.append(abs((ahead - behind) / (2 * STEP) - derivative) / abs(derivative))
    return errors


class DoubleModel:
    """A MAML's objective for single tasks, all in float64, at its present parameters."""

    def __init__(self, model, iteration: int):
        import tensorflow as tf

        from runtime.compute.schedules import config_at
        self._config, self._iteration = dataclasses.replace(config_at(model.config, iteration), dtype='float64'), iteration
        self._parameters = tf.nest.map_structure(lambda value: tf.cast(value, tf.float64), model.shared)

    def gradient(self, task) -> dict:
        """{name: meta-gradient}."""
        from maml import meta_gradient
        return meta_gradient(self._config, self._parameters, self._iteration, task)[0]

    def loss_at(self, task, offsets: dict) -> float:
        """The objective where the parameters are moved by {name: offset}."""
        from maml import inner_loop, objective
        moved = type(self._parameters)(*({name: value + offsets[name] for name, value in group.items()} for group in self._parameters))
        _, states = inner_loop(self._config, moved, task, self._iteration)
        return float(objective(self._config, moved, task, states, self._iteration)[0])

    def support_losses(self, task) -> list[float]:
        """Before the inner updates, and after each; the last offsets and scales of normalisation stay in force."""
        from maml import initial_state, inner_loop, support_loss
        last = self._config.num_updates - 1
        states = [initial_state(self._config, self._parameters, task, self._iteration),
                  *inner_loop(self._config, self._parameters, task, self._iteration)[1]]
        return [float(support_loss(self._config, self._parameters, task, state, min(step, last), self._iteration)[0])
                for step, state in enumerate(states)]

    def errors(self, task, gradient: dict, rng: np.random.Generator) -> list[float]:
        """`errors_of_differences` of a task's gradient."""
        return errors_of_differences(gradient, lambda offsets: self.loss_at(task, offsets), rng)


def double_tasks(batch) -> list:
    """The tasks of a meta-batch, of tensors of float64."""
    import tensorflow as tf
    return [type(batch)(*arrays) for arrays in zip(*(tf.unstack(tf.cast(array, tf.float64)) for array in batch))]


def refuse_other_methods(directory: str, model, iteration: int) -> None:
    """Raises UserError unless the method follows a derivative from an iteration on."""
    from runtime.compute.schedules import config_at
    config = config_at(model.config, iteration)
    if config.stop_grad or config.outer != 'gradient' or config.inner_optimizer != 'sgd':
        raise UserError(f'{directory}: its method does not follow a derivative; give a run of a second-order method')


def opened(directory: str, *flags: str):
    """A run, with further flags, and its {split: tasks}; raises UserError unless it learns from examples."""
    run, data = run_and_data(parse(['gradient_check.py', f'--run={directory}', *flags]))
    if not run.source.supervised:
        raise UserError(f'{directory} learns from episodes; give a run that learns from examples')
    return run, data


def check(directory: str, differences: int) -> None:
    """Prints how exact the meta-gradient of the newest checkpoint is."""
    run, data = opened(directory, '--train=False', '--ensemble=1')
    from runtime.jobs.evaluate import restore
    model, prefix, iterations, *_ = restore(run)
    refuse_other_methods(directory, model, iterations)
    double, rng = DoubleModel(model, iterations), np.random.default_rng(0)
    batch = data[run.split].draw(0, run.learning_flags['meta_batch_size'])
    tasks = double_tasks(batch)
    each = list(map(double.gradient, tasks))
    errors = [error for task, gradient in zip(tasks[:differences], each) for error in double.errors(task, gradient, rng)]
    mean = {name: np.mean([gradients[name] for gradients in each], axis=0) for name in each[0]}
    print(f'{prefix}, {len(tasks)} tasks, relative errors of the meta-gradient:')
    print(f'float32, as in training, against float64  {relative_error(model.meta_gradients(batch, iterations), mean):.1e}')
    print(f'float64 against central differences       {np.median(errors):.1e} (median), {max(errors):.1e} (largest of {len(errors)})')


def examine_norms(directory: str, steps: int, checkpoint: int) -> None:
    """Prints the norms of the meta-gradients of further training steps, and where the largest comes from."""
    run, data = opened(directory, f'--test_iter={checkpoint}')
    from maml import MAML
    from runtime.jobs import checkpoints
    from runtime.jobs.train import draw
    found, model = checkpoints.find(run.directory, run.checkpoint), MAML(run.model, run.tasks.seed)
    checkpoints.restore(found, model.state())
    first, norms, metrics = found.record['iteration'], [], []
    refuse_other_methods(directory, model, first)
    for iteration in range(first, first + steps):
        batch = draw(data['train'], run, iteration, replica=0)
        parameters = {name: variable.numpy() for name, variable in model.parameters().items()}
        step = model.metatrain_step(batch, iteration)
        norms.append(float(step['gradient_norm']))
        metrics.append(float(step[f'post_{run.metric}']))
        if norms[-1] == max(norms):
            largest = iteration, batch, parameters
    iteration, batch, parameters = largest
    print(f'{found.prefix}, {steps} more iterations: the norm of the meta-gradient is {np.median(norms):.3g} (median), {max(norms):.4g} '
          f'(largest, in iteration {iteration + 1})')
    before, after = (metrics[max(iteration - first + start, 0):iteration - first + start + 10] for start in (-9, 1))
    print(f'{run.metric} in the ten iterations to that one {np.mean(before):.3f}, in the next ten {np.mean(after or [np.nan]):.3f}')

    for name, variable in model.parameters().items():
        variable.assign(parameters[name])
    tasks, double = double_tasks(batch), DoubleModel(model, iteration)
    each = list(map(double.gradient, tasks))
    sizes = list(map(norm, each))
    number = int(np.argmax(sizes))
    task, gradient = tasks[number], each[number]
    single = model.meta_gradients(type(batch)(*(array[number:number + 1] for array in batch)), iteration)
    print(f'its tasks one by one: {np.median(sizes):.3g} (median), {max(sizes):.4g} (largest)')
    print(f'that task: float32 against float64 {relative_error(single, gradient):.1e}, float64 against central differences '
          f'{max(double.errors(task, gradient, np.random.default_rng(0))):.1e}; support losses '
          f'{", ".join(f"{loss:.3g}" for loss in double.support_losses(task))}')


def train_in_both(directory: str, steps: int) -> None:
    """Prints the mean accuracy, or loss, of each 100 training steps, and that of meta-validation at the end."""
    run, data = opened(directory)
    import tensorflow as tf

    from maml import MAML
    from runtime.jobs import checkpoints
    from runtime.jobs.evaluate import evaluate_tasks, task_metrics
    from runtime.jobs.train import draw, model_for
    checkpoint = checkpoints.find(run.directory, None)
    count = default('num_test_tasks')
    models = {dtype: MAML(dataclasses.replace(run.model, dtype=dtype), run.tasks.seed) for dtype in ('float32', 'float64')}
    for model in models.values():
        for name, variable in model.state().items():
            variable.assign(tf.cast(checkpoint.arrays[name], variable.dtype))
    first, measured = checkpoint.record['iteration'], {dtype: [] for dtype in models}
    print(f'{checkpoint.prefix}, {steps} more iterations, {run.metric} after adaptation:')
    for iteration in range(first, first + steps):
        batch = draw(data['train'], run, iteration, replica=0)
        for dtype, model in models.items():
            metrics = model.metatrain_step(batch, iteration)
            measured[dtype].append(float(metrics[f'post_{run.metric}']))
        if (iteration + 1 - first) % 100 == 0 or iteration + 1 == first + steps:
            means = ', '.join(f'{dtype} {np.mean(values[-100:]):.4f}' for dtype, values in measured.items())
            print(f'meta-training to iteration {iteration + 1}: {means}', flush=True)
    single = models['float32']
    for dtype, model in models.items() if 'val' in data else ():
        for name, variable in single.parameters().items():
            variable.assign(tf.cast(model.parameters()[name], tf.float32))
        validated = model_for(run, data['val'], single)  # whose classes may be fewer
        values = task_metrics(evaluate_tasks(validated, data['val'], count, run.model.num_updates))[:, -1]
        print(f'meta-validation, {count} tasks, trained in {dtype}: {values.mean():.4f}')


def positive(text: str) -> int:
    """A number from 1 on; raises ValueError for others."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='directory of a run')
    parser.add_argument('--tasks', type=int, default=4, choices=range(1, 33), metavar='N',
                        help='of the meta-batch, to compare with differences (default: %(default)s)')
    parser.add_argument('--steps', type=positive, metavar='N', help='train on for N iterations in both precisions')
    parser.add_argument('--norms', type=positive, metavar='N', help='train on for N iterations, and examine the largest meta-gradient')
    parser.add_argument('--test_iter', type=int, default=-1, metavar='I', help='with --norms: from this checkpoint, not from the newest')
    args = parser.parse_args()
    try:
        if args.norms:
            examine_norms(args.run, args.norms, args.test_iter)
        elif args.steps:
            train_in_both(args.run, args.steps)
        else:
            check(args.run, args.tasks)
    except UserError as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()

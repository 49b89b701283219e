"""How exact the meta-gradient of a trained model is: training's, in float32, against float64, and that against central differences.

    python benchmarks/gradient_check.py logs/omniglot20way
    python benchmarks/gradient_check.py logs/omniglot20way --steps 500

With the flags and the newest checkpoint of the run, on the first meta-batch of meta-validation. With --steps, it shows what rounding does
to a training instead: the run goes on in float32 and in float64, on the same meta-batches. Nothing is saved.
"""
import argparse
import dataclasses
import functools
import sys

import numpy as np
import run_files  # noqa: F401  (puts the program on the path)

from main import parse, run_and_data
from runtime.system.errors import UserError

DIRECTIONS = 3
STEP = 1e-9  # short: where a ReLU of the inner loop changes its state, the loss jumps


def relative_error(gradients: dict, exact: dict) -> float:
    """|gradients - exact| / |exact|, Euclidean, over all tensors together."""
    vector, exact_vector = (np.concatenate([np.ravel(values[name]) for name in exact]) for values in (gradients, exact))
    return np.linalg.norm(vector - exact_vector) / np.linalg.norm(exact_vector)


def errors_of_differences(gradients: dict, loss_at, rng: np.random.Generator) -> list[float]:
    """|difference - derivative| / |derivative| along random directions; `loss_at({name: array})` is the loss at these offsets."""
    errors = []
    for _ in range(DIRECTIONS):
        along = {name: rng.normal(size=value.shape) for name, value in gradients.items()}
        derivative = sum(np.sum(np.asarray(gradients[name]) * along[name]) for name in along)
        ahead, behind = (loss_at({name: sign * STEP * value for name, value in along.items()}) for sign in (1, -1))
        errors.append(abs((ahead - behind) / (2 * STEP) - derivative) / abs(derivative))
    return errors


def check(directory: str, differences: int) -> None:
    run, data = run_and_data(parse(['gradient_check.py', f'--run={directory}', '--train=False']))
    import tensorflow as tf

    from maml import Parameters, inner_loop, meta_gradient, objective
    from runtime.compute.schedules import config_at
    from runtime.jobs.evaluate import restore
    model, prefix, iterations, *_ = restore(run)
    config = config_at(model.config, iterations)
    if config.stop_grad or config.outer != 'gradient' or config.inner_optimizer != 'sgd':
        raise UserError(f'{directory}: its method does not follow a derivative; give a run of a second-order method')
    double = lambda value: tf.cast(value, tf.float64)
    parameters = Parameters(*(tf.nest.map_structure(double, group) for group in (model.weights, model.norm_params, model.learning_rates)))
    count = run.learning_flags['meta_batch_size']
    batch = data[run.split].draw(0, count)
    tasks = [type(batch)(*(double(values[task]) for values in batch)) for task in range(count)]

    def loss_at(task, offsets):
        moved = Parameters(*({name: value + offsets[name] for name, value in group.items()} for group in parameters))
        _, states = inner_loop(config, moved, task, iterations)
        return float(objective(config, moved, task, states, iterations)[0])

    rng, each = np.random.default_rng(0), [meta_gradient(config, parameters, iterations, task)[0] for task in tasks]
    errors = [error for task, gradients in zip(tasks[:differences], each)
              for error in errors_of_differences(gradients, functools.partial(loss_at, task), rng)]
    mean = {name: np.mean([gradients[name] for gradients in each], axis=0) for name in each[0]}
    print(f'{prefix}, {len(tasks)} tasks, relative errors of the meta-gradient:')
    print(f'float32, as in training, against float64  {relative_error(model.meta_gradients(batch, iterations), mean):.1e}')
    print(f'float64 against central differences       {np.median(errors):.1e} (median), {max(errors):.1e} (largest of {len(errors)})')


def train_in_both(directory: str, steps: int) -> None:
    """Prints the mean accuracy, or loss, of each 100 training steps, and that of meta-validation at the end."""
    run, data = run_and_data(parse(['gradient_check.py', f'--run={directory}']))
    import tensorflow as tf

    from maml import MAML
    from runtime.jobs import checkpoints
    from runtime.jobs.evaluate import TEST_TASKS, evaluate_tasks, task_metrics
    from runtime.jobs.train import draw
    checkpoint = checkpoints.find(run.directory, None)
    models = {dtype: MAML(dataclasses.replace(run.model, dtype=dtype), run.tasks.seed) for dtype in ('float32', 'float64')}
    for model in models.values():
        for name, variable in model.state().items():
            variable.assign(tf.cast(checkpoint.arrays[name], variable.dtype))
    first, measured = checkpoint.record['iteration'], {dtype: [] for dtype in models}
    print(f'{checkpoint.prefix}, {steps} more iterations, {run.metric} after adaptation:')
    for iteration in range(first, first + steps):
        batch = draw(data['train'], run, iteration, replica=0)
        for dtype, model in models.items():
            metrics = model.metatrain_step(type(batch)(*(tf.cast(array, dtype) for array in batch)), iteration)
            measured[dtype].append(float(metrics[f'post_{run.metric}']))
        if (iteration + 1 - first) % 100 == 0 or iteration + 1 == first + steps:
            means = ', '.join(f'{dtype} {np.mean(values[-100:]):.4f}' for dtype, values in measured.items())
            print(f'meta-training to iteration {iteration + 1}: {means}', flush=True)
    single = models['float32']
    for dtype, model in models.items():
        for name, variable in single.parameters().items():
            variable.assign(tf.cast(model.parameters()[name], tf.float32))
        values = task_metrics(evaluate_tasks(single, data['val'], TEST_TASKS, run.model.num_updates))[:, -1]
        print(f'meta-validation, {TEST_TASKS} tasks, trained in {dtype}: {values.mean():.4f}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='directory of a run')
    parser.add_argument('--tasks', type=int, default=4, choices=range(1, 33), metavar='N',
                        help='of the meta-batch, to compare with differences (default: %(default)s)')
    parser.add_argument('--steps', type=int, metavar='N', help='train on for N iterations in both precisions')
    args = parser.parse_args()
    try:
        train_in_both(args.run, args.steps) if args.steps else check(args.run, args.tasks)
    except UserError as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()

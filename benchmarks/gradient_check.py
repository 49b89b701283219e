"""How exact the meta-gradient of a trained model is: training's, in float32, against float64, and that against central differences.

    python benchmarks/gradient_check.py logs/omniglot20way

With the flags and the newest checkpoint of the run, on the first meta-batch of meta-validation.
"""
import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='directory of a run')
    parser.add_argument('--tasks', type=int, default=4, choices=range(1, 33), metavar='N',
                        help='of the meta-batch, to compare with differences (default: %(default)s)')
    args = parser.parse_args()
    try:
        check(args.run, args.tasks)
    except UserError as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()

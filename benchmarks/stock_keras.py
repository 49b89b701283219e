"""How wrong MAML on stock Keras layers is: python benchmarks/stock_keras.py writes docs/images/stock_keras.png and prints its numbers.

The relative error of the meta-gradient of Conv-4 with batch norm against the inner step size, in float64: with Keras as it is, whose
`tf.nn.moments` stops a gradient at the mean, and as this program runs it. The truth is this program's own Conv-4 with the same weights,
which central differences confirm (tests/test_meta_gradient.py).
"""
import contextlib
import os
import sys
from collections.abc import Sequence
from unittest import mock

import numpy as np
from matplotlib.figure import Figure
from run_files import ROOT

from runtime.cli import startup

sys.path.insert(0, os.path.join(ROOT, 'examples'))

ALPHAS = 0.01, 0.05, 0.2, 0.5
FILTERS, SIZE = 8, 32


def own_names(name: str) -> str:
    """The name that a tensor of the built-in Conv-4 has in examples/conv4.py."""
    layer = ''.join(filter(str.isdigit, name))
    if '/' in name:
        return f'sequential/norm{int(layer) + 1}/{name.partition("/")[2]}'
    kind = 'bias' if name.startswith('b') else 'kernel'
    return f'sequential/head/{kind}' if layer == '5' else f'sequential/conv{layer}/{kind}'


def errors(updates: int, alphas: Sequence[float]) -> tuple[list[float], list[float]]:
    """Relative errors of the meta-gradient for each inner step size: of stock Keras, and of Keras in this program."""
    import conv4

    from maml import MAML, ModelConfig
    from runtime.datasets.tasks import TaskBatch
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=[1, 20, SIZE * SIZE * 3]), np.tile(np.eye(5), [1, 4, 1])
    batch = TaskBatch(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])

    def network(input_shape, outputs):
        return conv4.conv4(input_shape, outputs, FILTERS)

    def gradient(alpha, network, exact=True):
        config = ModelConfig(dim_input=x.shape[-1], dim_output=5, loss='xent', update_batch_size=1, update_lr=alpha, num_updates=updates,
                             image_shape=(SIZE, SIZE, 3), num_filters=FILTERS, max_pool=True, head='flatten', dtype='float64')
        own = MAML(config, seed=1)
        model = MAML(config, seed=1, network=network) if network else own
        for name, variable in own.parameters().items():
            model.parameters()[own_names(name) if network else name].assign(variable)
        with contextlib.nullcontext() if exact else mock.patch('keras_network.exact_statistics', lambda *_: contextlib.nullcontext()):
            gradients = model.meta_gradients(batch)
        return np.concatenate([np.ravel(gradients[own_names(name) if network else name]) for name in own.parameters()])

    rows = []
    for alpha in alphas:
        truth = gradient(alpha, None)
        rows.append([np.linalg.norm(gradient(alpha, network, exact) - truth) / np.linalg.norm(truth) for exact in (False, True)])
    return tuple(map(list, zip(*rows)))


def main() -> None:
    startup.import_tensorflow()
    import tensorflow as tf
    tf.config.run_functions_eagerly(True)  # each gradient is computed once
    figure = Figure(figsize=(6, 3.6), dpi=100)
    axes = figure.subplots()
    for updates, marker in ((1, 'o'), (5, 's')):
        stock, ours = errors(updates, ALPHAS)
        for label, values, colour, style in (('Keras as it is', stock, '#d55e00', '-'), ('in this program', ours, '#0072b2', '--')):
            axes.loglog(ALPHAS, values, style, marker=marker, color=colour, label=f'{label}, {updates} step{"s" if updates > 1 else ""}')
            print(f'{label}, {updates} steps:', ', '.join(f'{alpha}: {value:.2g}' for alpha, value in zip(ALPHAS, values)))
    axes.set(xlabel='inner step size α', ylabel='relative error of the meta-gradient')
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(os.path.join(ROOT, 'docs', 'images', 'stock_keras.png'))


if __name__ == '__main__':
    main()

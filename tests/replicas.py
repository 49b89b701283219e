"""A process on several replicas, for clusters.py: python tests/replicas.py DEVICES (gradients FILE | main FLAGS...)

DEVICES: that many CPU devices, as if they were so many GPUs, for --strategy=mirrored; 1: what the environment says.

gradients: the meta-gradients of a meta-batch, and the weights after some training steps, of networks of the shapes that sinusoid,
Omniglot and miniImageNet have, the last with all of MAML++, and of one of Keras with Dropout, are written to FILE by the chief. On several
replicas, of some of them: each replica compiles its own graph.
"""
import dataclasses
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import main  # noqa: E402
from runtime.cli import startup, workers  # noqa: E402

TASKS, STEPS = 4, {'sinusoid': 100}  # of the networks for images 10, for the first would show a difference
NETWORKS = {1: ('sinusoid', 'omniglot', 'mini', 'keras'), 2: ('sinusoid', 'mini', 'keras'), 4: ('sinusoid', 'omniglot')}


def shapes():
    """{name: (ModelConfig, function that draws count tasks from the first on)}."""
    from data_generator import SOURCES, TaskBatch, TaskConfig
    from maml import ModelConfig
    sinusoid = ModelConfig(dim_input=1, dim_output=1, loss='mse', update_batch_size=10, update_lr=0.001, norm='None')
    omniglot = ModelConfig(dim_input=28 * 28, dim_output=5, loss='xent', update_batch_size=1, update_lr=0.4, head='mean',
                           image_shape=(28, 28, 1), num_filters=4)
    mini = dataclasses.replace(omniglot, dim_input=84 * 84 * 3, image_shape=(84, 84, 3), num_filters=2, max_pool=True,
                               head='flatten', update_lr=0.01, num_updates=2, clip=10.0, learn_lr='step', norm_scale=True,
                               norm_per_step=True, multi_step_loss=50)
    own = dataclasses.replace(omniglot, update_lr=0.1, num_updates=2, network=a_network)

    def images(config):
        def draw(first, count):
            tasks = []
            for task in range(first, first + count):
                rng = np.random.default_rng(task)
                classes = rng.random((5, config.dim_input), np.float32)
                x = classes + 0.3 * rng.random((2, 5, config.dim_input), np.float32)
                tasks.append([x[0], np.eye(5, dtype=np.float32), x[1], np.eye(5, dtype=np.float32)])
            return TaskBatch(*map(np.stack, zip(*tasks)))
        return draw

    points = SOURCES['sinusoid'].tasks(TaskConfig(5, 10, 10, seed=0), 'train')
    return {'sinusoid': (sinusoid, points.draw), 'omniglot': (omniglot, images(omniglot)), 'mini': (mini, images(mini)),
            'keras': (own, images(own))}


def a_network(input_shape, outputs):
    from keras import Sequential, layers
    return Sequential([layers.Conv2D(4, 3, strides=3), layers.BatchNormalization(), layers.Activation('tanh'), layers.Dropout(0.2),
                       layers.GlobalAveragePooling2D(), layers.Dense(outputs)])


def gradients(replicas, path):
    from maml import MAML
    share, found = TASKS // replicas.count, {}
    for name, (config, draw) in ((name, shapes()[name]) for name in NETWORKS[replicas.count]):
        def batch(step, draw=draw):
            return replicas.distribute(lambda replica: draw(step * TASKS + replica * share, share))

        model = MAML(config, seed=3, replicas=replicas)
        metrics = model.evaluate(batch(0), 2)
        found[f'{name} metrics'] = np.stack([metrics.pre_loss, *metrics.post_losses])
        for step in range(STEPS.get(name, 10)):
            model.metatrain_step(batch(step), step)
            if step == 0:  # Adam's first moment is a tenth of the gradient, for which `meta_gradients` would compile a second graph
                found |= {f'{name} gradient {weights}': variable.numpy() for weights, variable in model.state().items()
                          if weights.startswith('metatrain/adam/m/')}
        found |= {f'{name} trained {weights}': variable.numpy() for weights, variable in model.parameters().items()}
    if replicas.chief:
        np.savez(path, **found)


if __name__ == '__main__':
    devices, task, *arguments = sys.argv[1:]
    if int(devices) > 1:
        os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
        import tensorflow as tf
        cpu, = tf.config.list_physical_devices('CPU')
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(devices))
    if task == 'main':
        main.main(['main.py', *arguments])
    else:
        strategy = 'mirrored' if int(devices) > 1 else 'auto'
        gradients(startup.import_tensorflow(strategy, workers.cluster_from_environment(strategy)), *arguments)

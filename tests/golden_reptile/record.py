"""Records what OpenAI's program computes: python tests/golden_reptile/record.py CHECKOUT OUT.npz

CHECKOUT is a copy of github.com/openai/supervised-reptile (8f2b71c). Its class Reptile runs unchanged, on TensorFlow's first version as
contained in the second; the network and the tasks are made here, in double precision: fully connected with batch norm, no images.
"""
import json
import random
import sys

import numpy as np
import tensorflow

tf = tensorflow.compat.v1
WAY, SHOTS, DIM, HIDDEN, TASKS, STEPS, META_STEPS, RATE, EPSILON = 3, 2, 4, (6, 5), 3, 4, 5, 0.01, 0.5


class Rows:
    """A class of the data set."""

    def __init__(self, rows, rng):
        self.rows, self.rng = rows, rng

    def sample(self, count):
        return self.rng.permutation(self.rows)[:count]


def arrays_of(pairs):
    """Rows and labels of (row, label) pairs."""
    return np.array([row for row, _ in pairs]), np.array([label for _, label in pairs])


def recorded(function, calls):
    """The function, which appends what it returns to calls."""
    def wrapper(*arguments):
        result = function(*arguments)
        calls.append(result if isinstance(result, (tuple, np.ndarray)) else list(result))
        return calls[-1]
    return wrapper


def network(x, initial):
    """Logits, and {our name: variable}."""
    variables = {name: tf.Variable(value, dtype=tf.float64) for name, value in initial.items()}
    for layer, scope in (1, '0'), (2, '2'):
        x = x @ variables[f'w{layer}']
        mean, variance = tf.nn.moments(x, [0])
        x = (x - mean) / tf.sqrt(variance + 1e-3) * variables[f'{scope}/gamma'] + variables[f'{scope}/beta']
        x = tf.nn.relu(x)
    return x @ variables['w3'] + variables['b3'], variables


def main(checkout, out):
    tf.disable_v2_behavior()
    sys.path.insert(0, checkout)
    sys.modules['tensorflow'] = tf  # the program says `import tensorflow as tf`
    from supervised_reptile import reptile
    sys.modules['tensorflow'] = tensorflow
    drawn, split = [], []
    reptile._sample_mini_dataset = recorded(reptile._sample_mini_dataset, drawn)
    reptile._split_train_test = recorded(reptile._split_train_test, split)
    random.seed(0)

    rng = np.random.default_rng(0)
    sizes = (DIM, *HIDDEN, WAY)
    initial = {f'w{layer}': rng.normal(size=shape) / 2 for layer, shape in enumerate(zip(sizes, sizes[1:]), start=1)}
    initial |= {'b3': rng.normal(size=WAY)}
    for scope, units in zip('02', HIDDEN):
        initial |= {f'{scope}/beta': rng.normal(size=units) / 4, f'{scope}/gamma': rng.uniform(0.5, 1.5, units)}
    x_ph, y_ph = tf.placeholder(tf.float64, [None, DIM]), tf.placeholder(tf.int64, [None])
    logits, variables = network(x_ph, initial)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y_ph, logits=logits)  # a vector, as theirs
    # Python numbers would be rounded to float32.
    optimizer = tf.train.AdamOptimizer(*(tf.constant(number, tf.float64) for number in (RATE, 0, 0.999, 1e-8)))
    minimize = optimizer.minimize(loss)
    classes = [Rows(rng.normal(size=(8, DIM)) + label, rng) for label in range(6)]

    arrays = {f'init/{name}': value for name, value in initial.items()}
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        learner = {mode: reptile.Reptile(session, transductive=mode) for mode in (True, False)}
        for step in range(META_STEPS):
            learner[True].train_step(classes, x_ph, y_ph, minimize, WAY, SHOTS, WAY * SHOTS, STEPS, False, EPSILON, TASKS)
            if step in (0, META_STEPS - 1):
                arrays |= {f'after{step + 1}/{name}': session.run(variable) for name, variable in variables.items()}
                arrays |= {f'moments{step + 1}/{name}': session.run(optimizer.get_slot(variable, 'v'))
                           for name, variable in variables.items()}
        tasks = [arrays_of(pairs) for pairs in drawn]
        arrays |= {'x': np.reshape([x for x, _ in tasks], (META_STEPS, TASKS, -1, DIM)),
                   'labels': np.reshape([labels for _, labels in tasks], (META_STEPS, TASKS, -1))}
        for transductive, name in (True, 'batch'), (False, 'each'):
            logits_of = []
            learner[transductive]._test_predictions = recorded(
                lambda *asked, own=learner[transductive]._test_predictions: np.array(own(*asked)), logits_of)
            learner[transductive].evaluate(classes, x_ph, y_ph, minimize, logits, WAY, SHOTS, WAY * SHOTS, 2 * STEPS, False)
            (support_x, support_y), (query_x, query_y) = map(arrays_of, split[-1])
            arrays |= {f'{name}/support_x': support_x, f'{name}/support_labels': support_y, f'{name}/query_x': query_x,
                       f'{name}/query_labels': query_y, f'{name}/logits': logits_of[0]}
    arrays['config'] = json.dumps({'way': WAY, 'update_batch_size': SHOTS, 'update_lr': RATE, 'num_updates': STEPS, 'meta_lr': EPSILON,
                                   'dim_hidden': HIDDEN, 'evaluated_updates': 2 * STEPS})
    np.savez(out, **arrays)


if __name__ == '__main__':
    main(*sys.argv[1:])

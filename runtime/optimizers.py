"""Optimizers of the outer loop."""

import tensorflow as tf

ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Adam (Kingma & Ba, 2015), with epsilon added to the uncorrected root as TensorFlow 1 did (end of its section 2)."""

    def __init__(self, variables: dict[str, tf.Variable], learning_rate: float, clip: float | None = None):
        """
        Args:
            variables: {name: tf.Variable}, updated in place.
            clip: elementwise bound of the gradients of weights, not of learned step sizes; None: none.
        """
        def zeros():
            return {name: tf.Variable(tf.zeros_like(v), trainable=False) for name, v in variables.items()}

        self.variables, self.learning_rate, self.clip = variables, learning_rate, clip
        self.step, self.means, self.squares = tf.Variable(0, dtype=tf.int64, trainable=False), zeros(), zeros()

    def apply(self, gradients: dict[str, tf.Tensor]) -> None:
        """One update of every variable by {name: gradient}."""
        step = tf.cast(self.step.assign_add(1), next(iter(self.variables.values())).dtype)
        rate = self.learning_rate * tf.sqrt(1 - ADAM_BETA2 ** step) / (1 - ADAM_BETA1 ** step)
        for name, variable in self.variables.items():
            gradient, mean, square = gradients[name], self.means[name], self.squares[name]
            if self.clip is not None and not name.startswith('lr/'):
                gradient = tf.clip_by_value(gradient, -self.clip, self.clip)
            mean.assign(ADAM_BETA1 * mean + (1 - ADAM_BETA1) * gradient)
            square.assign(ADAM_BETA2 * square + (1 - ADAM_BETA2) * tf.square(gradient))
            variable.assign_sub(rate * mean / (tf.sqrt(square) + ADAM_EPSILON))

    def state(self, prefix: str = '') -> dict[str, tf.Variable]:
        """{prefix + name: variable}: what must be saved to go on."""
        state = {'step': self.step, **{f'm/{name}': v for name, v in self.means.items()},
                 **{f'v/{name}': v for name, v in self.squares.items()}}
        return {prefix + name: variable for name, variable in state.items()}

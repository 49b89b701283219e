"""Families of functions of one number, and regression tasks drawn from them.

A family, such as `Sinusoid`, builds each function from `num_uniforms` uniform random numbers, and each of its inputs from one
more. All arrays are [tasks, rows, 1]; parameters are tuples of arrays [tasks, 1, 1].
"""
import math

import numpy as np

from runtime.datasets.tasks import SPLITS, TaskBatch, TaskConfig, split_rows

Parameters = tuple[np.ndarray, ...]


class Sinusoid:
    """y = amplitude * sin(x - phase) with amplitude U[0.1, 5], phase U[0, pi], x U[-5, 5] (section 5.1 of the paper)."""
    num_uniforms = 2  # uniform random numbers per function
    AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)

    def parameters(self, uniform: np.ndarray) -> Parameters:
        """Of functions, from numbers in [0, 1), [tasks, num_uniforms, 1]."""
        return _between(self.AMPLITUDES, uniform[:, 0:1]), _between(self.PHASES, uniform[:, 1:2])

    def inputs(self, parameters: Parameters, uniform: np.ndarray) -> np.ndarray:
        """x, from numbers in [0, 1), [tasks, points, 1]."""
        return _between(self.INPUTS, uniform)

    def plot_range(self, parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
        """The ends of the x over which the functions are drawn, [tasks, 1] each."""
        low, high = self.INPUTS
        return np.full(parameters[0].shape[:2], low), np.full(parameters[0].shape[:2], high)

    def values(self, parameters: Parameters, x: np.ndarray) -> np.ndarray:
        """y at each x."""
        amplitude, phase = parameters
        return amplitude * np.sin(x - phase)

    def describe(self, parameters: Parameters) -> str:
        """The parameters of one function, for the title of its picture."""
        amplitude, phase = parameters
        return f'amplitude {amplitude.item():.2f}, phase {phase.item():.2f} rad'


class SinusoidOrLine(Sinusoid):
    """With probability 1/2 a sinusoid, else a line y = slope * x + offset with slope and offset U[-3, 3].

    After Finn, Xu & Levine (2018), without their noise.
    """
    num_uniforms = 3
    COEFFICIENTS = (-3.0, 3.0)

    def parameters(self, uniform: np.ndarray) -> Parameters:
        """Whether it is a line; amplitude or slope; phase or offset."""
        line = uniform[:, 0:1] >= 0.5
        curves, lines = super().parameters(uniform[:, 1:]), [_between(self.COEFFICIENTS, uniform[:, at:at + 1]) for at in (1, 2)]
        return line, *(np.where(line, on_line, on_curve) for on_line, on_curve in zip(lines, curves))

    def values(self, parameters: Parameters, x: np.ndarray) -> np.ndarray:
        line, first, second = parameters
        return np.where(line, first * x + second, super().values((first, second), x))

    def describe(self, parameters: Parameters) -> str:
        line, first, second = parameters
        return f'slope {first.item():.2f}, offset {second.item():.2f}' if line.item() else super().describe((first, second))


class Harmonic:
    """y = a1 sin(w x + b1) + a2 sin(2 w x + b2) with a1, a2 N(0, 1), w U[5, 7], b1, b2 U[0, 2 pi].

    Each function is sampled around a random centre: x N(m, 1) with m U[-4, 4]. After Lacoste et al. (2018), without noise.
    """
    num_uniforms = 6
    FREQUENCIES, PHASES, PLACES = (5.0, 7.0), (0.0, 2 * math.pi), (-4.0, 4.0)

    def parameters(self, uniform: np.ndarray) -> Parameters:
        """a1, a2, w, b1, b2, m."""
        first, second, frequency, phase, other_phase, place = np.split(uniform, self.num_uniforms, axis=1)
        return (_normal(first), _normal(second), _between(self.FREQUENCIES, frequency), _between(self.PHASES, phase),
                _between(self.PHASES, other_phase), _between(self.PLACES, place))

    def inputs(self, parameters: Parameters, uniform: np.ndarray) -> np.ndarray:
        return parameters[-1] + _normal(uniform)

    def plot_range(self, parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
        place = parameters[-1][:, 0]
        return place - 2, place + 2

    def values(self, parameters: Parameters, x: np.ndarray) -> np.ndarray:
        first, second, frequency, phase, other_phase, _ = parameters
        return first * np.sin(frequency * x + phase) + second * np.sin(2 * frequency * x + other_phase)

    def describe(self, parameters: Parameters) -> str:
        first, second, frequency = (parameter.item() for parameter in parameters[:3])
        return f'amplitudes {first:.2f} and {second:.2f}, frequency {frequency:.2f}'


Family = Sinusoid | Harmonic


def _between(bounds, uniform):
    low, high = bounds
    return low + (high - low) * uniform


def _normal(uniform):
    """Standard normal numbers from numbers in [0, 1)."""
    from scipy.special import ndtri  # imported late: it is slow to import, and few sources need it
    return ndtri(np.maximum(uniform, 2.0 ** -54))


class FunctionTasks:
    """Functions of a family, each sampled at K + Q random inputs.

    Inputs are x, or with the oracle baseline x and the function's parameters.
    """

    def __init__(self, family: Family, config: TaskConfig, split: str):
        self.family, self.config = family, config
        self._key = np.random.SeedSequence([config.seed, SPLITS.index(split)]).generate_state(2, np.uint64)
        self._points = config.update_batch_size + config.query_shots
        self.fingerprint = None
        # Philox makes four numbers for each value of its counter; a task owns a block of counter values.
        self._counts_per_task = -(-(family.num_uniforms + self._points) // 4)

    def draw(self, start: int, count: int) -> TaskBatch:
        """Tasks start to start + count - 1: K support and Q query rows each; there are no classes."""
        return split_rows(*self._examples(*self._functions(start, count)), self.config.update_batch_size)

    def parameters(self, start: int, count: int) -> tuple[np.ndarray, ...]:
        """The parameters of these tasks' functions, each [count, 1, 1]."""
        return self._functions(start, count)[0]

    def grid(self, start: int, count: int, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of these tasks at equally spaced x over the whole range: [count, points, dim] each."""
        parameters = self.parameters(start, count)
        return self._examples(parameters, np.linspace(*self.family.plot_range(parameters), points, axis=1))

    def _functions(self, start, count):
        """Parameters and x, [count, points, 1], of these tasks."""
        stream = np.random.Philox(key=self._key, counter=start * self._counts_per_task)
        uniform = np.random.Generator(stream).random((count, 4 * self._counts_per_task, 1))
        count = self.family.num_uniforms
        parameters = self.family.parameters(uniform[:, :count])
        return parameters, self.family.inputs(parameters, uniform[:, count:count + self._points])

    def _examples(self, parameters, x):
        y = self.family.values(parameters, x)
        if self.config.baseline == 'oracle':
            x = np.concatenate([x, *(np.broadcast_to(parameter, x.shape) for parameter in parameters)], axis=-1)
        return x.astype(np.float32), y.astype(np.float32)

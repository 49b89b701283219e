"""Shows where the time of a meta-training step goes. Nothing else should run meanwhile.

    python benchmarks/step_profile.py
    python benchmarks/step_profile.py --workloads mini1 --steps 8

For each workload: the time in which a core worked on operations of each kind, by TensorFlow's profiler, as shares of their sum over
all cores. Then, where there is max pooling, the rate on one core of each convolution of a task, of its gradient for the kernel and of
that for its input, as shares of the rate of a matrix product by TensorFlow.
"""
import argparse
import collections
import functools
import glob
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import run_files  # noqa: F401  (puts the program on the path)

from runtime.cli.startup import import_tensorflow
from step import seconds_of_step
from workloads import WORKLOADS, Workload, processor

import_tensorflow()
import tensorflow as tf  # noqa: E402

KINDS = {  # {title: pattern of the names of operations}; what waits for others is no work
    'convolutions and products': r'Conv2D|MatMul',
    'compiled loops': r'fusion|reduce-window|wrapped',
    'launching': r'^(Start|Done|Process|ExecuteAsyncOnStream|BlockUntilReady|ExecutorDoneCallback|FunctionRun|train)$',
    'sums': r'^(Sum|Mean)$',
    'elementwise': r'^(Mul|Sub|AddV|AddN|Neg|Relu|ReluGrad|Square|SquaredDifference|_UnaryOpsComposition)$',
    'copies': r'Gather|Concat|TensorList|Tile|Slice'}
WAITING = 'Run'


def own_times(path: str) -> Iterator[tuple[str, float]]:
    """The names of the operations in a profile, and their seconds without those of the operations in them."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2
    space = xplane_pb2.XSpace()
    with open(path, 'rb') as file:
        space.ParseFromString(file.read())
    for plane in (plane for plane in space.planes if plane.name == '/host:CPU'):
        for line in plane.lines:
            running = []  # [name, end, seconds]
            for event in sorted(line.events, key=lambda event: (event.offset_ps, -event.duration_ps)):
                while running and running[-1][1] <= event.offset_ps:
                    yield running[-1][0], running.pop()[2]
                if running:
                    running[-1][2] -= event.duration_ps / 1e12
                name = re.sub(r'[_.\d]+$', '', plane.event_metadata[event.metadata_id].name.split(':')[-1])
                running.append([name, event.offset_ps + event.duration_ps, event.duration_ps / 1e12])
            yield from ((name, seconds) for name, _, seconds in running)


def shares(workload: Workload, steps: int) -> tuple[dict[str, float], float]:
    """{kind: share}, and the seconds of a step over all cores."""
    step = functools.partial(seconds_of_step, workload.model(), workload.batch(), workload.iteration)
    for _ in range(2):  # the first compiles
        step()
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            for _ in range(steps):
                step()
        path, = glob.glob(os.path.join(folder, '**', '*.xplane.pb'), recursive=True)
        seconds = collections.Counter(dict.fromkeys(KINDS, 0.0))
        for name, duration in own_times(path):
            if name != WAITING:
                seconds[next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), 'other')] += duration
    total = sum(seconds.values())
    return {kind: duration / total for kind, duration in seconds.items()}, total / steps


def rate(flops: float, function: Callable, *arguments: tf.Tensor, **others: object) -> float:
    """FLOP/s of a function of these arguments: the median of some calls."""
    seconds = []
    while len(seconds) < 5 or sum(seconds) < 0.2:
        start = time.perf_counter()
        function(*arguments, **others)
        seconds.append(time.perf_counter() - start)
    return flops / statistics.median(seconds)


def convolutions(workload: Workload) -> Iterator[tuple[str, dict[str, float]]]:
    """Text, and {what: FLOP/s} of a convolution and its gradients, for each layer and set of rows of a task."""
    side, _, channels = workload.image_shape
    for layer in range(4):
        for shots in sorted({workload.update_batch_size, workload.query_shots}):
            rows, kernel = shots * workload.num_classes, tf.random.normal([3, 3, channels, workload.num_filters])
            x, y = (tf.random.normal([rows, side, side, size]) for size in (channels, workload.num_filters))
            flops = 2 * rows * side * side * 9 * channels * workload.num_filters
            rate_of = functools.partial(rate, flops, strides=[1, 1, 1, 1], padding='SAME')
            rates = {'forward': rate_of(tf.raw_ops.Conv2D, input=x, filter=kernel),
                     'kernel': rate_of(tf.raw_ops.Conv2DBackpropFilter, input=x, filter_sizes=kernel.shape, out_backprop=y)}
            if layer:  # the images themselves have no gradient
                rates['input'] = rate_of(tf.raw_ops.Conv2DBackpropInput, input_sizes=x.shape, filter=kernel, out_backprop=y)
            yield f'{rows} images of {side}x{side}, {channels} channels', rates
        side, channels = side // 2, workload.num_filters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workloads', nargs='+', choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument('--steps', type=int, default=4, help='steps that are profiled')
    args = parser.parse_args()
    matrix = tf.random.normal([2048, 2048])
    product = rate(2 * 2048 ** 3, tf.matmul, matrix, matrix)
    print(f'{processor()}, {os.cpu_count()} cores; a matrix product on one: {product / 1e9:.0f} GFLOP/s')
    for name in args.workloads:
        time_by_kind, seconds = shares(WORKLOADS[name], args.steps)
        print(f'{name}: {seconds:.3f} core seconds a step: {_listed(time_by_kind)}', flush=True)
        for text, rates in convolutions(WORKLOADS[name]) if WORKLOADS[name].max_pool else ():
            print(f'  {text}: {_listed({what: call_rate / product for what, call_rate in rates.items()})}', flush=True)


def _listed(shares):
    return ', '.join(f'{title} {share:.0%}' for title, share in shares.items())


if __name__ == '__main__':
    main()

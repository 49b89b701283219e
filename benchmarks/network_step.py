"""The step of a CIFAR-FS training with Conv-4 in Keras against the built-in Conv-4, in turns: python benchmarks/network_step.py [ROUNDS]"""
import functools
import os
import sys

import numpy as np

from step import measure_in_turn
from workloads import WORKLOADS

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'examples'))


def main() -> None:
    from runtime.cli.startup import import_tensorflow
    import_tensorflow()
    import conv4
    workload = WORKLOADS['cifarfs1']
    batch = workload.batch()
    models = workload.model(), workload.model(network=functools.partial(conv4.conv4, filters=workload.num_filters))
    seconds = np.median(measure_in_turn([(model, batch, 0) for model in models], int(sys.argv[1]) if len(sys.argv) > 1 else 5), axis=0)
    print(f'built-in {seconds[0]:.3f} s, Keras {seconds[1]:.3f} s: {seconds[1] / seconds[0]:.2f} times')


if __name__ == '__main__':
    main()

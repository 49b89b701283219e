"""The cost of many inner updates: seconds to the first step, seconds per step, and peak memory, with and without --recompute.

    python benchmarks/inner_updates.py
    python benchmarks/inner_updates.py --updates 5 200 --limit 600

Every case runs in a separate process, one after the other; one that takes longer than --limit seconds is stopped and reported.
"""
import argparse
import dataclasses
import json
import subprocess
from typing import Any

from workloads import WORKLOADS, in_process, measure


def sinusoid() -> tuple[Any, Any]:
    """The paper's 10-shot sinusoid: (ModelConfig, a meta-batch of 25 tasks)."""
    from data_generator import SOURCES, TaskConfig
    from maml import ModelConfig
    tasks = SOURCES['sinusoid'].tasks(TaskConfig(num_classes=1, update_batch_size=10, query_shots=10, seed=0), 'train')
    return ModelConfig(dim_input=1, dim_output=1, loss='mse', update_batch_size=10, update_lr=1e-3, norm='None'), tasks.draw(0, 25)


def cifarfs() -> tuple[Any, Any]:
    """The 5-way 1-shot CIFAR-FS step: (ModelConfig, a meta-batch of 4 tasks of noise)."""
    return WORKLOADS['cifarfs1'].model_config(), WORKLOADS['cifarfs1'].batch()


SHAPES = {'sinusoid': sinusoid, 'cifarfs': cifarfs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--updates', nargs='+', type=int, default=[5, 20, 50, 200])
    parser.add_argument('--shapes', nargs='+', choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument('--limit', type=float, default=300, help='seconds for a case')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        from runtime.cli.startup import import_tensorflow
        import_tensorflow()
        shape, updates, recompute = args.measure.split()
        config, batch = SHAPES[shape]()
        print(json.dumps(measure(dataclasses.replace(config, num_updates=int(updates), recompute=recompute == 'True'), batch, steps=3)))
        return
    print(f'{"shape":10}{"updates":>8}{"recompute":>11}{"first step":>12}{"a step":>10}{"memory":>10}')
    for shape in args.shapes:
        for updates in args.updates:
            for recompute in False, True:
                head = f'{shape:10}{updates:8}{"yes" if recompute else "no":>11}'
                try:
                    case = in_process(__file__, '--measure', f'{shape} {updates} {recompute}', timeout=args.limit)
                    print(f'{head}{case["first"]:10.1f} s{case["seconds"]:8.3f} s{case["megabytes"]:7.0f} MB', flush=True)
                except subprocess.TimeoutExpired:
                    print(f'{head}  not within {args.limit:g} s', flush=True)


if __name__ == '__main__':
    main()

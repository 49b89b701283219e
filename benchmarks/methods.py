"""Times a meta-training step of each method against MAML's, on the same tasks, network and number of inner updates.

    python benchmarks/methods.py
    python benchmarks/methods.py --workloads cifarfs1 --rounds 21

All methods of a workload are compiled in one process; then each takes a few steps per round. Printed are the medians, and the median
over rounds of the ratio to MAML's steps of the same round. Nothing else should run meanwhile.
"""
import argparse
import dataclasses
import subprocess
import sys

import numpy as np

from workloads import WORKLOADS, measure_in_turn

MULTI_STEP = {'learn_lr': 'step', 'norm_scale': True, 'norm_per_step': True, 'mean_loss': True, 'multi_step_loss': 1000}
METHODS = {  # {title: (changes from MAML, iteration)}
    'MAML': ({}, 0),
    'first-order MAML': ({'stop_grad': True}, 0),
    'ANIL': ({'inner_weights': 'head'}, 0),
    'BOIL': ({'inner_weights': 'body', 'adapt_norm': True, 'norm_scale': True}, 0),
    'Meta-SGD': ({'learn_lr': 'weight'}, 0),
    'a rate per layer': ({'learn_lr': 'layer'}, 0),
    'MAML++, multi-step loss': (MULTI_STEP, 0),
    'MAML++, afterwards': (MULTI_STEP, 1000),
    'MAML, one update': ({'num_updates': 1}, 0),
    'Meta-SGD, one update': ({'learn_lr': 'weight', 'num_updates': 1}, 0),
    'Reptile, inner SGD': ({'outer': 'reptile', 'adapt_norm': True, 'norm_scale': True}, 0),
    'Reptile': ({'outer': 'reptile', 'inner_optimizer': 'adam', 'adapt_norm': True, 'norm_scale': True}, 0)}


def measure(name: str, rounds: int, only: str) -> None:
    """Prints the table of a workload."""
    from runtime.cli.startup import import_tensorflow
    import_tensorflow()
    from maml import MAML
    workload = WORKLOADS[name]
    batch = workload.batch()
    contenders = {title: (MAML(dataclasses.replace(workload.model_config(), **changes)), batch, iteration)
                  for title, (changes, iteration) in METHODS.items() if title == 'MAML' or only in title}
    times = measure_in_turn(list(contenders.values()), rounds)
    print(f'{name}, {workload.num_updates} inner updates, {rounds} rounds')
    for title, seconds, ratio in zip(contenders, np.median(times, axis=0), np.median(times / times[:, :1], axis=0)):
        print(f'  {title:26}{seconds:8.3f} s{ratio:8.2f} of MAML', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workloads', nargs='+', choices=list(WORKLOADS), default=['cifarfs1', 'omniglot20', 'omniglot5'])
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--only', default='', help='besides MAML, methods whose name contains this')
    parser.add_argument('--measure', choices=list(WORKLOADS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.rounds, args.only)
        return
    for name in args.workloads:  # a process each, so that none inherits another's memory
        subprocess.run([sys.executable, __file__, '--measure', name, '--rounds', str(args.rounds), '--only', args.only], check=True)


if __name__ == '__main__':
    main()

"""Times a meta-training step of standard workloads. Nothing else should run meanwhile.

    python benchmarks/step.py                               against the arithmetic floor of this machine
    python benchmarks/step.py --peer 'torch=/venv/bin/python torch_peer.py {} loop'     and against other programs
    python benchmarks/step.py --vary methods --workloads cifarfs1 omniglot20            each method against MAML
    python benchmarks/step.py --vary sizes --workloads cifarfs1 --plot sweep.png        other meta-batches, shots, updates and filters
    python benchmarks/step.py --vary networks --workloads cifarfs1 mini1                Conv-4 in Keras against the built-in one
    python benchmarks/step.py --updates 5 20 50 200         many inner updates, with and without --recompute
    python benchmarks/step.py --processes --workloads omniglot5 mini1       two processes on two cores

Against the floor, in each round every contender runs every workload once, in separate processes, one after the other; the GEMM
rate that sets the floor is measured in between, by numpy on all cores. There variables such as OPENBLAS_CORETYPE are not set: they
can halve that rate. The output names the kernel that numpy's OpenBLAS chose. Medians over the rounds are printed. A peer is any
command in which {} stands for the workload, whose last output line ends in '<number> s a step'.

With --vary, all variants of a workload are compiled in one process; then each takes a few steps per round. Printed are the
medians, and the median over rounds of the ratio to the first variant's steps of the same round.

With --updates, every case runs in a separate process; one that takes longer than --limit seconds is stopped and reported.

With --processes, a whole meta-batch and half of it are computed by one process on one core, and the whole by two processes, a core
each. The bytes that a step has to send are computed, 8 for each weight and score. Linux only.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import re
import resource
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workloads import SINUSOID, WORKLOADS, Workload, in_process, processor

STARTED = time.perf_counter()
MULTI_STEP = {'learn_lr': 'step', 'norm_scale': True, 'norm_per_step': True, 'mean_loss': True, 'multi_step_loss': 1000}
METHODS: dict[str, dict[str, Any]] = {  # {title: changes of a workload}
    'MAML': {},
    'first-order MAML': {'changes': {'stop_grad': True}},
    'ANIL': {'changes': {'inner_weights': 'head'}},
    'BOIL': {'changes': {'inner_weights': 'body', 'adapt_norm': True, 'norm_scale': True}},
    'Meta-SGD': {'changes': {'learn_lr': 'weight'}},
    'a rate per layer': {'changes': {'learn_lr': 'layer'}},
    'ProtoNet': {'changes': {'head_init': 'prototypes'}, 'num_updates': 0},
    'R2-D2': {'changes': {'head_init': 'ridge'}, 'num_updates': 0},
    'ProtoMAML': {'changes': {'head_init': 'prototypes', 'stop_grad': True}},
    'ProtoMAML, second order': {'changes': {'head_init': 'prototypes'}},
    'UNICORN-MAML': {'changes': {'head_init': 'shared', 'stop_grad': True}},
    'MAML++, multi-step loss': {'changes': MULTI_STEP},
    'MAML++, afterwards': {'changes': MULTI_STEP, 'iteration': 1000},
    'MAML, one update': {'num_updates': 1},
    'Meta-SGD, one update': {'changes': {'learn_lr': 'weight'}, 'num_updates': 1},
    'Reptile, inner SGD': {'changes': {'outer': 'reptile', 'adapt_norm': True, 'norm_scale': True}},
    'Reptile': {'changes': {'outer': 'reptile', 'inner_optimizer': 'adam', 'adapt_norm': True, 'norm_scale': True}}}
SIZES = {
    'meta_batch_size': (2, 4, 8, 16, 32),
    'update_batch_size': (1, 2, 5, 10),
    'num_updates': (1, 2, 3, 5, 10),
    'num_filters': (8, 16, 32, 64, 128)}


def seconds_of_step(model: Any, batch: Any, iteration: int) -> float:
    """Seconds of one meta-training step, its metrics fetched."""
    start = time.perf_counter()
    for value in model.metatrain_step(batch, iteration).values():
        float(value)
    return time.perf_counter() - start


def measure(workload: Workload, steps: int) -> dict[str, float]:
    """Seconds of a step (median), seconds from process start to the end of the first one, peak memory in MB, and KiB to send a
    step. If TF_CONFIG says so, it is a step of several processes, of which each has such a workload."""
    from runtime.cli.startup import import_tensorflow
    from runtime.cli.workers import cluster_from_environment
    replicas = import_tensorflow('auto', cluster_from_environment('auto'))
    model, batch = workload.model(replicas=replicas), replicas.distribute(lambda replica: workload.batch())
    seconds_of_step(model, batch, workload.iteration)
    first = time.perf_counter() - STARTED
    seconds = statistics.median(seconds_of_step(model, batch, workload.iteration) for _ in range(steps))
    weights = sum(int(variable.shape.num_elements()) for variable in (*model.weights.values(), *model.norm_params.values()))
    return {'seconds': seconds, 'first': first, 'megabytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            'sent': 8 * (weights + 5) / 1024}


def measure_alone(workload: Workload, steps: int, limit: float | None = None) -> dict[str, float]:
    """`measure` in a process of its own; raises subprocess.TimeoutExpired if it takes longer."""
    return in_process(__file__, '--measure', json.dumps(dataclasses.asdict(workload)), '--steps', steps, timeout=limit)


def measure_on_cores(workload: Workload, steps: int, processes: int) -> dict[str, float]:
    """`measure` in the first of some processes that share a step, each with such a workload and a core."""
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(socket.socket()) for _ in range(processes)]
        for port in ports:
            port.bind(('localhost', 0))
        hosts = [f'localhost:{port.getsockname()[1]}' for port in ports]
    arguments, running = ['--measure', json.dumps(dataclasses.asdict(workload)), '--steps', str(steps)], []
    for index, core in zip(range(processes), sorted(os.sched_getaffinity(0))):
        cluster = json.dumps({'cluster': {'worker': hosts}, 'task': {'type': 'worker', 'index': index}})
        running.append(subprocess.Popen(['taskset', '-c', str(core), sys.executable, __file__, *arguments], stdout=subprocess.PIPE,
                                        text=True, env=os.environ | {'TF_CONFIG': cluster} if processes > 1 else None))
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit('step.py: a measurement failed')
    return json.loads(outputs[0].splitlines()[-1])


def measure_in_turn(contenders: Sequence[tuple[Any, Any, int]], rounds: int) -> np.ndarray:
    """Median seconds of a step, [rounds, contenders], of models, their batches and the iterations at which they are. The first
    step of each turn, which finds another's data in the caches, does not count."""
    def turn(contender):
        return statistics.median([seconds_of_step(*contender) for _ in range(4)][1:])

    for contender in contenders:
        turn(contender)
    return np.array([[turn(contender) for contender in contenders] for _ in range(rounds)])


def gemm_rate(n: int = 2048, repeats: int = 9) -> float:
    """FLOP/s of the fastest of some float32 matrix products of size n, by numpy on all cores."""
    a = np.random.default_rng(0).random((n, n), np.float32)

    def seconds():
        start = time.perf_counter()
        a @ a
        return time.perf_counter() - start
    return 2 * n ** 3 / min(seconds() for _ in range(1 + repeats))


def blas_kernel() -> str:
    """The kernel with which numpy's OpenBLAS computes, such as 'OpenBLAS SkylakeX'; 'kernel unknown' of another BLAS."""
    library = ctypes.CDLL(np.linalg._umath_linalg.__file__)  # and what it is linked with
    for name in 'scipy_openblas_get_corename64_', 'scipy_openblas_get_corename', 'openblas_get_corename64_', 'openblas_get_corename':
        if corename := getattr(library, name, None):
            corename.restype = ctypes.c_char_p
            return f'OpenBLAS {corename().decode()}'
    return 'kernel unknown'


def measure_gemm() -> dict[str, Any]:
    """{'rate': FLOP/s, 'kernel'} of a process in which OpenBLAS chooses its kernel, block sizes and threads for this processor."""
    limits = [name for name in os.environ if name.startswith('OPENBLAS_') or name.endswith('_NUM_THREADS')]
    return in_process(__file__, '--gemm', environment={name: os.environ[name] for name in os.environ.keys() - limits})


def measure_peer(command: str, name: str) -> float | None:
    """Seconds of a step, or None if the peer fails."""
    process = subprocess.run(shlex.split(command.replace('{}', name)), capture_output=True, text=True)
    match = re.search(r'(?:^|\s)([\d.]+(?:e[+-]?\d+)?) s a step\s*$', process.stdout)
    return float(match[1]) if match and process.returncode == 0 else None


def against_the_floor(names: Sequence[str], peers: Mapping[str, str], rounds: int, steps: int) -> None:
    """Prints a row for each workload; `peers` is {name: command}."""
    gemms, ours = [], {name: [] for name in names}
    theirs = {(peer, name): [] for peer in peers for name in names}
    for _ in range(rounds):
        for name in names:
            gemms.append(measure_gemm())
            ours[name].append(measure_alone(WORKLOADS[name], steps))
            for peer, command in peers.items():
                theirs[peer, name].append(measure_peer(command, name))
    rate = statistics.median(gemm['rate'] for gemm in gemms)
    print(f'GEMM {rate / 1e9:.0f} GFLOP/s ({gemms[0]["kernel"]}) on {os.cpu_count()} cores, {processor()}; '
          f'medians of {rounds} rounds, seconds per step')
    print(f'{"workload":12}{"floor":>8}{"this":>8}{"of floor":>10}{"tasks/s":>9}{"MB":>7}{"first step":>12}'
          + ''.join(f'{peer:>15}' for peer in peers))
    for name in names:
        print(row(name, rate, ours[name], [theirs[peer, name] for peer in peers]), flush=True)


def row(name: str, rate: float, ours: Sequence[Mapping[str, float]], theirs: Sequence[Sequence[float | None]]) -> str:
    """Text: the medians of a workload, of this program and of each peer."""
    median = {key: statistics.median(run[key] for run in ours) for key in ours[0]}
    floor = WORKLOADS[name].flops() / rate
    text = (f'{name:12}{floor:8.3f}{median["seconds"]:8.3f}{floor / median["seconds"]:10.0%}'
            f'{WORKLOADS[name].meta_batch_size / median["seconds"]:9.0f}{median["megabytes"]:7.0f}{median["first"]:12.1f}')
    for times in theirs:
        peer = statistics.median(times) if None not in times else None
        text += f'{peer:9.3f} {peer / median["seconds"]:4.1f}x' if peer else f'{"-":>15}'
    return text


def vary(workload: Workload, variants: Mapping[str, dict[str, Any]], rounds: int) -> np.ndarray:
    """Prints the variants of a workload, {title: changes}; returns seconds a step of each."""
    workloads = [dataclasses.replace(workload, **changes) for changes in variants.values()]
    times = measure_in_turn([(each.model(), each.batch(), each.iteration) for each in workloads], rounds)
    medians = np.median(times, axis=0)
    for title, seconds, ratio in zip(variants, medians, np.median(times / times[:, :1], axis=0)):
        print(f'  {title:26}{seconds:8.3f} s{ratio:8.2f} of {next(iter(variants))}', flush=True)
    return medians


def networks(workload: Workload) -> dict[str, dict[str, Any]]:
    """The built-in network of a workload with max pooling, and the same in Keras, as variants."""
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'examples'))
    from conv4 import conv4
    return {'built-in': {}, 'Keras': {'changes': {'network': functools.partial(conv4, filters=workload.num_filters)}}}


def draw(seconds: Mapping[str, np.ndarray], workload: Workload, path: str) -> None:
    """Writes a picture of {quantity: seconds a step of its values in SIZES}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3.2 * len(seconds), 3.2), layout='constrained')
    panels = figure.subplots(1, len(seconds))
    for axes, quantity in zip(panels, seconds):
        axes.plot(SIZES[quantity], seconds[quantity], marker='o', color='black')
        axes.set(xlabel=quantity, ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.axvline(getattr(workload, quantity), color='grey', linestyle=':')
    panels[0].set_ylabel('seconds per step')
    figure.savefig(path, dpi=120)


def many_updates(updates: Sequence[int], steps: int, limit: float) -> None:
    """Prints first step, a step and memory of the sinusoid and of CIFAR-FS with these numbers of inner updates."""
    print(f'{"shape":10}{"updates":>8}{"recompute":>11}{"first step":>12}{"a step":>10}{"memory":>10}')
    for name, workload in {'sinusoid': SINUSOID, 'cifarfs': WORKLOADS['cifarfs1']}.items():
        for number in updates:
            for recompute in False, True:
                head = f'{name:10}{number:8}{"yes" if recompute else "no":>11}'
                case = dataclasses.replace(workload, num_updates=number, changes={**workload.changes, 'recompute': recompute})
                try:
                    result = measure_alone(case, steps, limit)
                    print(f'{head}{result["first"]:10.1f} s{result["seconds"]:8.3f} s{result["megabytes"]:7.0f} MB', flush=True)
                except subprocess.TimeoutExpired:
                    print(f'{head}  not within {limit:g} s', flush=True)


def scaling(name: str, rounds: int, steps: int) -> None:
    """Prints the gain of a second process."""
    workload, tasks = WORKLOADS[name], WORKLOADS[name].meta_batch_size
    part = dataclasses.replace(workload, meta_batch_size=tasks // 2)
    results = [[measure_on_cores(workload, steps, 1), measure_on_cores(part, steps, 1), measure_on_cores(part, steps, 2)]
               for _ in range(rounds)]
    whole, half, two = (statistics.median(result['seconds'] for result in column) for column in zip(*results))
    print(f'{name}: {results[0][0]["sent"]:.0f} KiB to send per step\n'
          f'  {tasks} tasks: {whole:.3f} s in one process; {two:.3f} s in two, {tasks // 2} tasks and a core each: '
          f'{half / two:.0%} efficient (one process with {tasks // 2} tasks takes {half:.3f} s)', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workloads', nargs='+', choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=10, help='steps timed in each process')
    parser.add_argument('--peer', action='append', default=[], metavar='NAME=COMMAND')
    parser.add_argument('--vary', choices=['methods', 'sizes', 'networks'])
    parser.add_argument('--plot', metavar='FILE', help='draw the curves of --vary sizes')
    parser.add_argument('--updates', nargs='+', type=int, help='numbers of inner updates')
    parser.add_argument('--limit', type=float, default=300, help='seconds for a case of --updates')
    parser.add_argument('--processes', action='store_true', help='compare one process with two')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    parser.add_argument('--gemm', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Workload(**json.loads(args.measure)), args.steps)))
    elif args.gemm:
        print(json.dumps({'rate': gemm_rate(), 'kernel': blas_kernel()}))
    elif args.updates:
        many_updates(args.updates, args.steps, args.limit)
    elif args.processes:
        for name in args.workloads:
            scaling(name, args.rounds, args.steps)
    elif args.vary:
        from runtime.cli.startup import import_tensorflow
        import_tensorflow()
        for name in args.workloads:
            print(f'{name}, {args.rounds} rounds')
            if args.vary != 'sizes':
                vary(WORKLOADS[name], METHODS if args.vary == 'methods' else networks(WORKLOADS[name]), args.rounds)
                continue
            seconds = {quantity: vary(WORKLOADS[name], {f'{quantity}={value}': {quantity: value} for value in values}, args.rounds)
                       for quantity, values in SIZES.items()}
            if args.plot:
                draw(seconds, WORKLOADS[name], args.plot)
    else:
        against_the_floor(args.workloads, dict(peer.split('=', 1) for peer in args.peer), args.rounds, args.steps)


if __name__ == '__main__':
    main()

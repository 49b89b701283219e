"""The gain of a second process: measured steps of one process and of two.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --only omniglot5

A meta-training step of a whole meta-batch and of half of it in one process on one core; and of two processes, a core each, that share the
meta-batch. The bytes that a step has to send are computed, 8 for each weight and score. Linux only, on a machine with two cores or more;
nothing else should run meanwhile.
"""
import argparse
import contextlib
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time

from workloads import WORKLOADS

ROUNDS, STEPS = 3, 8


def measure(name: str, tasks: int) -> tuple[float, int]:
    """Median seconds of a step on this process's tasks, and the bytes that it has to send."""
    from runtime.cli import workers
    from runtime.cli.startup import import_tensorflow
    replicas = import_tensorflow('auto', workers.cluster_from_environment('auto'))
    from runtime.compute.engine import SUM_DTYPE
    workload = dataclasses.replace(WORKLOADS[name], meta_batch_size=tasks)
    model, batch = workload.model(replicas), workload.batch()
    batches = replicas.distribute(lambda replica: type(batch)(*(array[None] for array in batch)))

    def step():
        start = time.perf_counter()
        {key: value.numpy() for key, value in model.train_steps('metatrain', batches).items()}
        return time.perf_counter() - start

    step()
    numbers = sum(int(variable.shape.num_elements()) for variable in (*model.weights.values(), *model.norm_params.values()))
    return statistics.median(step() for _ in range(STEPS)), SUM_DTYPE.size * (numbers + 5)


def processes(count: int, name: str, tasks: int) -> list[float]:
    """The result of `measure` in the first of `count` processes with `tasks` tasks each, each on its own core."""
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(socket.socket()) for _ in range(count)]
        for port in ports:
            port.bind(('localhost', 0))
        hosts = [f'localhost:{port.getsockname()[1]}' for port in ports]
    cores, running = sorted(os.sched_getaffinity(0)), []
    for index in range(count):
        cluster = {'TF_CONFIG': json.dumps({'cluster': {'worker': hosts}, 'task': {'type': 'worker', 'index': index}})} if count > 1 else {}
        running.append(subprocess.Popen([sys.executable, __file__, '--measure', name, str(tasks)], env=os.environ | cluster, text=True,
                                        stdout=subprocess.PIPE,
                                        preexec_fn=lambda index=index: os.sched_setaffinity(0, {cores[index]})))
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit('scaling.py: a measurement failed')
    return json.loads(outputs[0].splitlines()[-1])


def report(name: str) -> None:
    """Measures a workload and prints the medians."""
    tasks, times = WORKLOADS[name].meta_batch_size, []
    for _ in range(ROUNDS):
        whole, half = processes(1, name, tasks)[0], processes(1, name, tasks // 2)[0]
        two, size = processes(2, name, tasks // 2)
        times.append((whole, half, two))
    whole, half, two = map(statistics.median, zip(*times))
    print(f'{name}: {size / 1024:.0f} KiB to send per step\n'
          f'  {tasks} tasks: {whole:.3f} s in one process; {two:.3f} s in two, {tasks // 2} tasks and a core each: '
          f'{half / two:.0%} efficient (one process with {tasks // 2} tasks takes {half:.3f} s)', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=list(WORKLOADS), default=['omniglot5', 'mini1'])
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], int(args.measure[1]))))
        return
    for name in args.only:
        report(name)


if __name__ == '__main__':
    main()

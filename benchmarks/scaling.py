"""The gain of several machines: measured steps of one and of two processes, and an extrapolation to more.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --only omniglot5 --bandwidth 25 --latency 20

Measured: a meta-training step of one task and of a whole meta-batch, in one process on one core; and of two processes, a core
each, that share the meta-batch over the loopback interface. The bytes that a step sends are computed, 8 for each weight and
score, and beside them those that the two processes really send, by the interface's own count.

From these: a replica needs a + b * tasks seconds, and a ring all-reduce of that many bytes between R replicas sends
2 (R - 1) / R times as many over each link in 2 (R - 1) messages. Efficiency is the share of a step that is not spent on these.
Linux only, on a machine with two cores or more; nothing else should run meanwhile.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time

from workloads import WORKLOADS

REPLICAS = 8, 64, 512
ROUNDS, STEPS = 3, 8
ENOUGH = 0.8  # efficiency, for which the smallest meta-batch is reported


def measure(name: str, tasks: int) -> tuple[float, int, float]:
    """Median seconds of a step on this process's tasks, the bytes that it sends, and those on the loopback interface."""
    from runtime.cli import workers
    from runtime.cli.startup import import_tensorflow
    replicas = import_tensorflow('auto', workers.cluster_from_environment('auto'))
    from maml import MAML
    from runtime.compute.engine import SUM_DTYPE
    workload = dataclasses.replace(WORKLOADS[name], meta_batch_size=tasks)
    model = MAML(workload.model_config(), replicas=replicas)
    batch = workload.batch()
    batches = replicas.distribute(lambda replica: type(batch)(*(array[None] for array in batch)))

    def step():
        start = time.perf_counter()
        {key: value.numpy() for key, value in model.train_steps('metatrain', batches).items()}
        return time.perf_counter() - start

    step()
    numbers = sum(int(variable.shape.num_elements()) for variable in (*model.weights.values(), *model.norm_params.values()))
    before = loopback_bytes()
    seconds = statistics.median(step() for _ in range(STEPS))
    return seconds, SUM_DTYPE.size * (numbers + 5), (loopback_bytes() - before) / STEPS


def loopback_bytes() -> int:
    """Bytes that the loopback interface has received."""
    with open('/proc/net/dev') as file:
        return next(int(line.split()[1]) for line in file if line.split()[0] == 'lo:')


def processes(count: int, name: str, tasks: int) -> list[float]:
    """The result of `measure` in the first of `count` processes with `tasks` tasks each, each on its own core."""
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(socket.socket()) for _ in range(count)]
        for port in ports:
            port.bind(('localhost', 0))
        hosts = [f'localhost:{port.getsockname()[1]}' for port in ports]
    cores, running = sorted(os.sched_getaffinity(0)), []
    for index in range(count):
        environment = dict(os.environ)
        if count > 1:
            environment['TF_CONFIG'] = json.dumps({'cluster': {'worker': hosts}, 'task': {'type': 'worker', 'index': index}})
        running.append(subprocess.Popen([sys.executable, __file__, '--measure', name, str(tasks)], env=environment, text=True,
                                        stdout=subprocess.PIPE,
                                        preexec_fn=lambda index=index: os.sched_setaffinity(0, {cores[index]})))
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit('scaling.py: a measurement failed')
    return json.loads(outputs[0].splitlines()[-1])


def report(name: str, bandwidth: float, latency: float) -> None:
    """Measures a workload and prints its table, for links of `bandwidth` bytes per second and messages of `latency` seconds."""
    tasks = WORKLOADS[name].meta_batch_size
    found = {key: [] for key in ('task', 'half', 'all', 'two')}
    for _ in range(ROUNDS):
        for key, (count, share) in {'task': (1, 1), 'half': (1, tasks // 2), 'all': (1, tasks), 'two': (2, tasks // 2)}.items():
            seconds, size, sent = processes(count, name, share)  # the last time, of two
            found[key].append(seconds)
    task, half, whole, two = (statistics.median(values) for values in found.values())
    b = (whole - task) / (tasks - 1)
    a = max(task - b, 0)

    def sending(replicas):
        return 2 * (replicas - 1) / replicas * size / bandwidth + 2 * (replicas - 1) * latency

    print(f'\n{name}: {size / 1024:.0f} KiB to send per step; two processes send {sent / 1024:.0f} KiB in all\n'
          f'  on one core a step of n tasks takes {a:.3f} + {b:.4f} n seconds\n'
          f'  measured, {tasks} tasks: {whole:.3f} s in one process; {two:.3f} s in two, {tasks // 2} tasks and a core each: '
          f'{half / two:.0%} efficient (one process with {tasks // 2} tasks takes {half:.3f} s)')
    print(f'  {"replicas":>10}{"all-reduce":>14}{"1 task each":>14}{f"{tasks} each":>12}   {ENOUGH:.0%} from')
    for replicas in REPLICAS:
        seconds = sending(replicas)
        share = max(math.ceil((seconds * ENOUGH / (1 - ENOUGH) - a) / b), 1)
        print(f'  {replicas:10}{seconds * 1000:11.1f} ms{task / (task + seconds):14.0%}{whole / (whole + seconds):12.0%}'
              f'   T = {share * replicas:,}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=list(WORKLOADS), default=['omniglot5', 'mini1'])
    parser.add_argument('--bandwidth', type=float, default=10, help='of each link, Gbit/s')
    parser.add_argument('--latency', type=float, default=50, help='of each message, microseconds')
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], int(args.measure[1]))))
        return
    print(f'assumed: {args.bandwidth:g} Gbit/s per link, {args.latency:g} microseconds per message')
    for name in args.only:
        report(name, args.bandwidth * 1e9 / 8, args.latency * 1e-6)


if __name__ == '__main__':
    main()

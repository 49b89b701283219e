"""Processes of one training, and what they have saved, for test_distribution.py and test_lost_workers.py."""
import glob
import json
import os
import signal
import socket
import subprocess
import sys

import tensorflow as tf

from conftest import ROOT

SINUSOID = ['--norm=None', '--update_batch_size=10', '--meta_batch_size=4', '--save_interval=100', '--engine=map']
PATIENCE = 900  # seconds after which a process hangs


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for number in sockets:
        number.bind(('localhost', 0))
    ports = [number.getsockname()[1] for number in sockets]
    for number in sockets:
        number.close()
    return ports


def start(task, *arguments, workers=1, devices=1, own=(), roots=()):
    """Processes of main.py (task 'main') or tests/replicas.py, one for each worker; `own`: a further flag, `roots`: the program of each."""
    hosts = [f'localhost:{port}' for port in free_ports(workers)]
    script = ['main.py'] if task == 'main' and devices == 1 else ['tests/replicas.py', str(devices), task]
    processes = []
    for index in range(workers):
        environment = dict(os.environ)
        if workers > 1:
            environment['TF_CONFIG'] = json.dumps({'cluster': {'worker': hosts}, 'task': {'type': 'worker', 'index': index}})
        processes.append(subprocess.Popen([sys.executable, *script, *arguments, *own[index:index + 1]], text=True,
                                          cwd=roots[index] if roots else ROOT,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
                                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)))  # in the background, too
    return processes


def finish(processes):
    """[(status, stdout, stderr)]; kills what hangs."""
    try:
        outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def run(*arguments, **where):
    found = finish(start(*arguments, **where))
    assert [status for status, *_ in found] == [0] * len(found), found
    return found


def variables(prefix):
    return {name: tf.train.load_variable(prefix, name) for name, _ in tf.train.list_variables(prefix)}


def checkpoint(logdir, iteration):
    path, = glob.glob(f'{logdir}/*/model{iteration}.index')
    return variables(path.removesuffix('.index'))

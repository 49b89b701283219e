"""Watches the memory and the open files of a long sinusoid run.

    python benchmarks/growth.py

Prints the process's own resident memory (not that of libraries, whose unused pages the system reclaims) and the number of its
open files, after 5,000 and then every 20,000 of 100,000 iterations. Linux only.
"""
import os
import re
import subprocess
import sys
import tempfile

from workloads import anonymous_megabytes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ITERATIONS, FIRST, EVERY = 100_000, 5_000, 20_000


def main() -> None:
    with tempfile.TemporaryDirectory() as logdir:
        # Some more iterations than are measured, so that the process is still running.
        command = [sys.executable, os.path.join(ROOT, 'main.py'), '--datasource=sinusoid', '--norm=None',
                   '--update_batch_size=10', f'--metatrain_iterations={ITERATIONS + FIRST}', f'--logdir={logdir}']
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
        first = None
        for line in process.stdout:
            iteration = int((re.match(r'Iteration (\d+):', line) or [0, 0])[1])
            if iteration == FIRST or iteration and iteration % EVERY == 0:
                megabytes, files = anonymous_megabytes(process.pid), len(os.listdir(f'/proc/{process.pid}/fd'))
                first = first or megabytes
                print(f'{iteration:7} iterations: {megabytes:6.1f} MB ({megabytes / first - 1:+.1%}), {files} open files',
                      flush=True)
        sys.exit(process.wait())


if __name__ == '__main__':
    main()

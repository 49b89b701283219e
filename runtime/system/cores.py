"""The processor cores that this process may use."""
import os


def usable_cores() -> int:
    """How many there are: fewer than the machine has where a scheduler (as in SLURM) or taskset has bound the process to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1

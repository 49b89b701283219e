"""Names of the files that the queue adds to the directory of a run."""
CONSOLE = 'console.log'         # what its training printed
TIMES = 'training_time.json'    # {machine: {'seconds', 'iterations'} of training}

"""What the scripts share that run the program; it puts the program on the path, so that they import it first."""
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MAIN = os.path.join(ROOT, 'main.py')
EVALUATION = '--train=False', '--test_set=True'
TIMES = 'training_time.json'    # {machine: {'seconds', 'iterations'} of training}
sys.path.insert(0, ROOT)


def run_main(arguments: Sequence[str], **options: Any) -> tuple[int, list[int]]:
    """main.py in a process of its own, with further options of Popen: its status, and the signals that this process got
    meanwhile, each of which was passed on, so that main.py saves."""
    from runtime.system.interruption import signals_handled_by
    # In a session of its own: else Ctrl-C would reach it twice, from the terminal and from here, and the second ends it unsaved.
    process = subprocess.Popen([sys.executable, '-u', MAIN, *arguments], start_new_session=True, **options)
    received = []

    def pass_on(number, _):
        received.append(number)
        process.send_signal(number)

    with signals_handled_by(pass_on):
        return process.wait(), received


def request_of(arguments: Sequence[str]):
    """What a command line asks for, a runtime.cli.request.Request; raises UserError or absl.flags.Error if flags are wrong."""
    import main
    from runtime.cli.request import resolve
    return resolve(main.parse(['main.py', *arguments]))


def evaluations_asked(directory: str, request) -> list:
    """The entries of a run's results.json that are evaluations of its own checkpoints, of any iteration, on the meta-test tasks
    and with the inner updates of a request for an evaluation. `request` is a runtime.cli.request.Request; raises UserError if the
    data or the file cannot be read."""
    from runtime.cli.request import same_folder
    from runtime.cli.run import evaluation_updates, headline_updates
    from runtime.cli.run_data import source_and_tasks
    from runtime.results import store
    _, config = source_and_tasks(request)
    tasks = (request.datasource, 'test', config.update_batch_size, config.query_shots, config.seed, request.num_test_tasks)
    updates = evaluation_updates(request), headline_updates(request)
    setting = (request.query_norm, request.update_lr, request.inner_batch, *updates, 'own', '', None)

    def is_asked(entry):
        drawn, how = entry.tasks, entry.setting
        return (tasks == (drawn.datasource, drawn.split, drawn.update_batch_size, drawn.query_shots, drawn.seed, drawn.count)
                and drawn.num_classes in (None, config.num_classes)
                and (entry.data_path is None or same_folder(entry.data_path, config.data_path))
                and setting == (how.query_norm, how.update_lr, how.inner_batch, how.test_updates, how.headline_updates, how.head,
                                how.orders, how.load_from))

    return [entry for entry in store.entries_of(directory) if is_asked(entry)]


def missing_classes(request, split: str) -> str:
    """'', or why a split's classes of images cannot be listed, as where the data are not prepared; reads no image. `request` is a
    runtime.cli.request.Request."""
    from runtime.cli.run_data import source_and_tasks
    from runtime.system.errors import UserError
    try:
        source, tasks = source_and_tasks(request)
        if source.image_shape:
            source.folders(tasks.data_path).names(split)
    except UserError as error:
        return str(error)
    return ''

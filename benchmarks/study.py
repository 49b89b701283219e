"""Trains and evaluates a list of runs, one after the other: files of flags, times the values of the flags that vary.

    python benchmarks/study.py configs/cifarfs_5way1shot.flags --vary method=maml,anil --vary seed=0,1 --logdir=logs/study/

trains four runs. All further flags are main.py's, for every run. Each run is trained to its end, and its last checkpoint (with an
--ensemble its best ones) is evaluated on meta-test. It can be interrupted (Ctrl-C, SIGTERM) and started again by the same command:
trainings continue exactly, and what is done is not done again. Mistakes in the flags of any run, and images that are not prepared,
are reported before the first starts; a run that fails later is reported, and the next one starts.
"""
import argparse
import dataclasses
import glob
import itertools
import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags as absl_flags
from run_files import EVALUATION, evaluations_asked, missing_classes, request_of, run_main

from runtime.cli import stored_run
from runtime.cli.flags import GROUPS
from runtime.cli.request import Request
from runtime.cli.rules import check_flags
from runtime.system.errors import UserError, listing

RECORDED = 'test_query', 'test_seed', 'query_norm', 'ensemble', 'test_updates'  # flags of evaluations that a training writes for --run


class StudyRun(NamedTuple):
    """A run of a study."""
    arguments: list[str]    # of its training
    training: Request
    evaluation: Request

    @property
    def name(self) -> str:
        return ' '.join(self.arguments)

    @property
    def is_trained(self) -> bool:
        """Whether there is the last checkpoint, and as far as is known of a training on the same data, from the same weights, and with the
        same iterations of its phases and schedule, of which the directory's name says nothing."""
        directory, asked = self.training.directory, self.training.values
        if not os.path.exists(os.path.join(directory, f'model{sum(self.training.iterations)}.index')):
            return False
        try:
            made = stored_run.read(directory)
        except UserError:
            return True
        names = ['data_path', 'split_file', 'load_from']
        if self.training.iterations[1]:  # one that only pre-trains may have been trained for longer
            names += ['pretrain_iterations'] + (['metatrain_iterations'] if 'metatrain_iterations' in self.training.learning_flags else [])
        return stored_run.description({**made, **{name: asked[name] for name in names}}) == stored_run.description(made)

    @property
    def is_evaluated(self) -> bool:
        """Whether results.json has the evaluation that the study makes; raises UserError if it cannot be read, or that evaluation cannot be
        made any more."""
        directory, total, asked = self.training.directory, sum(self.training.iterations), self.evaluation.ensemble
        saved = [int(number) for name in glob.glob('model*.index', root_dir=directory) for number in re.findall(r'^model(\d+)\.', name)]
        if asked > 1 and max(saved, default=0) > total:
            raise UserError(f'{directory} was trained for longer than {total} iterations, and an ensemble is of the whole training; give '
                            'another --logdir')
        members = min(asked, len(saved)) if asked > 1 else 0  # or as many as there are
        return any(len(entry.ensemble) == members and (entry.training.newest if members else entry.iterations) == total
                   for entry in evaluations_asked(directory, self.evaluation))

    @property
    def evaluation_arguments(self) -> list[str]:
        """By --test_iter, because the run may have been trained for longer before; by --run where the training starts from the weights
        of --load_from: an evaluation would be of those."""
        which = () if self.evaluation.ensemble > 1 or {'test_iter', 'test_best'} & self.evaluation.given else (
            f'--test_iter={sum(self.training.iterations)}',)
        if not self.training.load_from:
            return [*self.arguments, *EVALUATION, *which]
        given = sorted(self.evaluation.given & {*GROUPS['Evaluation']} - {'load_from', 'run', 'train', 'test_set'} | {*RECORDED})
        return [f'--run={self.training.directory}', *(f'--{name}={self.evaluation.values[name]}' for name in given), *EVALUATION, *which]


def runs_of(files: Sequence[str], varied: Sequence[str], others: Sequence[str]) -> list[StudyRun]:
    """The runs of a study: each file with each combination of the values in `varied`, 'name=value,value' for each flag that
    varies, and with the `others`, flags of all runs. Raises UserError if flags are wrong, images are not prepared, or two runs would
    have one directory; all of these."""
    choices = [[f'--{name}={value}' for value in values.split(',')] for name, _, values in (text.partition('=') for text in varied)]
    runs, problems = [], {}  # {what is wrong: the runs of which it is}
    for file, *values in itertools.product(files, *choices):
        arguments = [f'--flagfile={file}', *others, *values]
        try:
            requests = [request_of([*arguments, *more]) for more in ((), EVALUATION)]
            requests[1] = dataclasses.replace(requests[1], values={**requests[1].values, 'load_from': None})
            for request, split in zip(requests, ('train', 'test')):
                check_flags(request)
                if missing := missing_classes(requests[0], split):  # by the split that the training has, or will make
                    raise UserError(missing)
            runs.append(StudyRun(arguments, *requests))
        except (UserError, absl_flags.Error) as error:
            problems.setdefault(str(error), []).append(' '.join(arguments))
    sentences = [f'{listing(names, 1, ", ")}: {problem}' for problem, names in problems.items()]
    directories = {}
    for run in runs:
        directories.setdefault(run.training.directory, []).append(run.name)
    sentences += [f'{" and ".join(names)} have one directory, {directory}: give a --logdir to each'
                  for directory, names in directories.items() if len(names) > 1]
    if sentences:
        raise UserError('; '.join(sentences))
    return runs


def call(arguments: Sequence[str]) -> int:
    """main.py, to which signals are passed on, so that it saves; returns its status. Ends the program if it was interrupted."""
    status, received = run_main(arguments)
    if received:
        print('Interrupted; the same command continues.', flush=True)
        sys.exit(128 + received[0])
    return status


def make(runs: Sequence[StudyRun]) -> list[str]:
    """Trains and evaluates what is not yet; returns the names of the runs that failed."""
    failed = []
    for number, run in enumerate(runs, start=1):
        print(f'\n{number} of {len(runs)}: {run.name}', flush=True)
        try:
            if not run.is_trained and call(run.arguments):
                failed.append(run.name)
            elif run.is_evaluated:
                print('done', flush=True)
            elif call(run.evaluation_arguments):
                failed.append(run.name)
        except UserError as error:
            print(f'study.py: {error}', flush=True)
            failed.append(run.name)
    return failed


def command_line(arguments: Sequence[str] | None = None) -> None:
    """Makes the study that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('files', nargs='+', metavar='FILE', help='files of flags, such as those in configs/')
    parser.add_argument('--vary', action='append', default=[], metavar='NAME=VALUE,...', help='a flag, and the values that it takes')
    options, others = parser.parse_known_args(arguments)
    try:
        runs = runs_of(options.files, options.vary, others)
        failed = make(runs)
    except (UserError, OSError) as error:
        sys.exit(f'study.py: {error}')
    if failed:
        sys.exit(f'study.py: {len(failed)} of {len(runs)} runs failed; see above: {"; ".join(failed)}')
    folders = ' '.join(dict.fromkeys(os.path.normpath(os.path.dirname(run.training.directory)) for run in runs))
    print(f'\nAll {len(runs)} runs are trained and evaluated: python main.py --compare {folders} --checkpoints=newest --plot')


if __name__ == '__main__':
    command_line()

"""What a training run saves: its state and its checkpoints, even if saving fails temporarily."""
import contextlib
import dataclasses
import time
from collections.abc import Callable

import numpy as np

from runtime.cli.run import Training
from runtime.jobs import checkpoints
from runtime.jobs.models import Model
from runtime.results.provenance import Provenance
from runtime.system.errors import UserError
from runtime.system.interruption import Interruption

RETRY_SECONDS = 30  # between attempts to save after a failure


@dataclasses.dataclass
class TrainState:
    """The progress of a run. With the model's variables, all that it needs to continue as if it had never been interrupted."""
    iteration: int = 0              # finished iterations
    ranking: list[checkpoints.Score] = dataclasses.field(default_factory=list)  # of the checkpoints best on meta-validation
    unprinted: list = dataclasses.field(default_factory=list)  # [pre, post, others reported] of each iteration since the last console line
    norms: list[float] = dataclasses.field(default_factory=list)  # of the meta-gradients of those iterations
    idle: int = 0                   # iterations in a row in which an outer step was sought and none taken
    skipped: int = 0                # iterations that changed nothing, because their losses or gradients were not finite

    @property
    def best(self) -> checkpoints.Score | None:
        """That of the checkpoint best on meta-validation."""
        return self.ranking[0] if self.ranking else None

    @classmethod
    def from_record(cls, record: checkpoints.Record) -> 'TrainState':
        """The state that a checkpoint's record holds."""
        return cls(record['iteration'], checkpoints.ranking_of(record), record['unprinted'], record.get('norms', []),
                   record.get('idle', 0), record['skipped'])


class Saver:
    """Saves checkpoints; after a failure it reports the error and retries every RETRY_SECONDS."""

    def __init__(self, run: Training, model: Model, provenance: Provenance, iteration: int, log: Callable[[str], None]):
        """`iteration` is that of the newest checkpoint, an attribute too; 0: there is none. `log` shows the user a line."""
        self.iteration, self._run, self._model, self._log, self._provenance = iteration, run, model, log, provenance
        self._failed_at = None

    def is_due(self, saving: bool) -> bool:
        """Whether to save now: if a checkpoint is due (`saving`), or after a failure if it is time to retry."""
        return saving if self._failed_at is None else time.monotonic() - self._failed_at > RETRY_SECONDS

    def save(self, state: TrainState, ranking: list[checkpoints.Score]) -> None:
        """Saves the model and the state of the run with a new ranking, which the state gets only if that worked: an interrupted saving
        must not change what is best. Raises UserError if weights are not finite."""
        run, variables = self._run, self._model.state()
        broken = [name for name, variable in variables.items() if not np.all(np.isfinite(variable.numpy()))]
        if broken:
            raise diverged(run, state.iteration - 1, f'{broken[0]} contains NaN or infinity after iteration {state.iteration}')
        if state.iteration == self.iteration or not run.replicas.chief:
            self.iteration, state.ranking = state.iteration, ranking
            return
        prefix, saved = checkpoints.path(run.directory, state.iteration), dataclasses.replace(state, ranking=ranking)
        record = {**dataclasses.asdict(saved), 'best': saved.best, 'flags': run.learning_flags, 'regime': run.last_phase,
                  'pretrain_iterations': run.pretrain_iterations, 'provenance': self._provenance}
        try:
            checkpoints.save(prefix, variables, record)
        except OSError as error:
            self._failed_at = time.monotonic()
            self._log(f'Saving {prefix} failed ({error}). Training continues; retrying every {RETRY_SECONDS} s')
            return
        if self._failed_at is not None:
            self._log(f'Saving works again: {prefix}')
        self.iteration, self._failed_at, state.ranking = state.iteration, None, ranking
        with contextlib.suppress(OSError):  # the next save will prune
            checkpoints.prune(run.directory, [entry['iteration'] for entry in state.ranking])

    def finish(self, state: TrainState, ranking: list[checkpoints.Score], interruption: Interruption) -> None:
        """Saves the last state; retries until that works, at an interruption for the last time."""
        while self.iteration < state.iteration and not interruption.signal:
            time.sleep(1)
            if self.is_due(True):
                self.save(state, ranking)
        if self.iteration < state.iteration:
            self.save(state, ranking)


def classifies(run: Training, iteration: int) -> bool:
    """Whether an iteration trains a classifier of all classes."""
    return run.model.pretrain_classes > 0 and iteration < run.pretrain_iterations


def diverged(run: Training, iteration: int, what: str, how: str = 'diverged') -> UserError:
    """The error for a training that cannot go on in an iteration, counted from 0: `what` was found, the last checkpoint, and what may help.
    `how` is what to say of the training."""
    saved = checkpoints.iterations(run.directory)
    newest = f'the last checkpoint is {checkpoints.path(run.directory, saved[-1])}' if saved else 'nothing was saved yet'
    skipping = '' if run.skip_nonfinite or not run.source.supervised else ', or skip such iterations by --skip_nonfinite'
    # Joint training of what learns from episodes has no inner step; that of others reports one, which must be finite too.
    has_inner_steps = run.model.num_updates > 0 and not classifies(run, iteration) and (
        run.source.supervised or iteration >= run.pretrain_iterations)
    flags = [name for name, matters in (('--update_lr', has_inner_steps), ('--meta_lr', run.source.supervised)) if matters]
    return UserError(f'training {how}: {what}; {newest}' + (f'. Lower {" or ".join(flags)}{skipping}' if flags else ''))

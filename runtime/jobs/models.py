"""Which class learns from what."""
import dataclasses
from typing import Any

from maml import MAML
from navigation import Navigator
from runtime.cli.run import Run

LEARNERS = {'mse': MAML, 'xent': MAML, 'return': Navigator}  # {what is learnt from, as the source says: class}


def new_model(run: Run, seed: int, **changes: Any) -> MAML | Navigator:
    """A model as the run describes it, but for some fields of its config; its initial weights are a function of the seed."""
    return LEARNERS[run.model.loss](dataclasses.replace(run.model, **changes), seed, run.replicas)

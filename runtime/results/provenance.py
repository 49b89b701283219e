"""What a model was made from, beside its flags: data, starting weights, arithmetic and program. Written into each checkpoint and
results.json; runs that differ in it are other runs, and `differences` says so."""
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NOT_KNOWN = 'not known'  # instead of a commit
LIMITS = 'ONEDNN_MAX_CPU_ISA', 'XLA_FLAGS'  # environment variables that change which instructions are used


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint that a training started from."""
    checkpoint: str             # its absolute prefix at that time
    checksum: int | None        # `checkpoints.checksum`; None: it could not be read


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a model was made from. Only `data` is known of runs of earlier versions: their `arithmetic` is []."""
    data: dict[str, int | None]     # {'train' | 'val': checksum of the examples and the names of classes}; None: functions
    data_path: str | None = None    # absolute, as it was; None: the source's own folder
    weights: Weights | None = None  # that training started from; None: random ones
    arithmetic: list[dict[str, str]] = dataclasses.field(default_factory=list)  # as `arithmetic`, of each part of the training
    program: str = ''               # as `program`; of a training in parts, those of its parts, in order and separated by commas
    # {class: CRC-32 of its first examples} that these weights were trained on, in an earlier training too; not in results.json.
    classes: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        """Whether more than the data is known."""
        return bool(self.arithmetic)

    @property
    def last_program(self) -> str:
        """That of the last part of the training."""
        return self.program.split(', ')[-1]

    @property
    def without_classes(self) -> 'Provenance':
        """Their names are many, and the checksum of the data covers them."""
        return dataclasses.replace(self, classes={})

    @property
    def comments(self) -> str:
        """Lines for a file of flags that say it."""
        return ''.join(f'# {name}: {json.dumps(value, default=vars)}\n' for name, value in vars(self).items() if name != 'classes')

    def continued(self, now: 'Provenance') -> 'Provenance':
        """That of a model whose training goes on now."""
        arithmetic = self.arithmetic if self.arithmetic[-1:] == now.arithmetic else self.arithmetic + now.arithmetic
        program = self.program if self.last_program == now.program else ', '.join(filter(None, [self.program, now.program]))
        return dataclasses.replace(now, weights=self.weights, arithmetic=arithmetic, program=program,
                                   classes={**self.classes, **now.classes})


def differences(then: Provenance, now: Provenance, model: str, examples: str = 'data') -> dict[str, str]:
    """{'data' | 'weights' | 'weights changed' | 'arithmetic' | 'program': a sentence about what differs now from when a model was trained}.

    What is not known now or then is not compared: `now` of an evaluation has data of its split only. Nor are weights if none are named.
    `model` and `examples` are what to call the model and its data.
    """
    sentences = {}
    compared = then.data.keys() | now.data.keys() if now.is_known else then.data.keys() & now.data.keys()
    splits = [split for split in sorted(compared) if then.data.get(split) != now.data.get(split)]
    if splits:
        moved = (f' (then in {then.data_path}, now in {now.data_path})'
                 if None not in {then.data_path, now.data_path} and then.data_path != now.data_path else '')
        sentences['data'] = f'the {examples} of the {" and ".join(splits)} split are not those that {model} was trained on{moved}'
    if then.is_known and now.weights:
        sentences.update(_weights_differ(then.weights, now.weights, model))
    if then.is_known and now.is_known:
        before, after = then.arithmetic[-1], now.arithmetic[-1]
        what = '; '.join(f'{name} {before.get(name, "not known")}, now {after.get(name, "not known")}'
                         for name in differing([before, after]))
        if what:
            sentences['arithmetic'] = f'{model} was computed with other software, hardware or settings ({what})'
        if then.last_program != now.program and not {then.last_program, now.program} & {'', NOT_KNOWN}:
            sentences['program'] = f'{model} was trained by another version of this program ({then.last_program}, now {now.program})'
    return sentences


def differing(kinds: Sequence[Mapping[str, str]]) -> list[str]:
    """The names in which several `arithmetic` differ. Where `recompute` is not recorded, as by earlier versions, it is not compared."""
    names = sorted(set().union(*kinds))
    return [name for name in names if len({kind.get(name) for kind in kinds} - ({None} if name == 'recompute' else set())) > 1]


def _weights_differ(then, given, model):
    """Of the weights that a training started from, and those that --load_from names now; a file that is gone cannot differ."""
    if then and then.checksum == given.checksum:
        return {}
    if then and then.checkpoint == given.checkpoint:
        return {'weights changed': f'--load_from={given.checkpoint} has changed since {model} started from it'} if given.checksum else {}
    origin = f'from the weights of {then.checkpoint}' if then else 'from random weights'
    return {'weights': f'{model} was trained {origin}, and --load_from={given.checkpoint} holds others'}


def identity(provenance: Provenance | None) -> dict[str, Any]:
    """{name: value} by which models of equal flags differ; None where it is not known. Arithmetic is not of them: it differs by
    rounding."""
    if provenance is None:
        return {'training data': None, 'starting weights': None}
    weights = provenance.weights
    start = f'{weights.checksum or 0:08x}' if weights else 'random'
    return {'training data': ' '.join(f'{checksum:08x}' for checksum in provenance.data.values() if checksum is not None) or 'functions',
            'starting weights': start if provenance.is_known else None}


def arithmetic(engine: str, replicas: int, recompute: bool = False) -> dict[str, str]:
    """What decides how numbers are rounded: with all of it equal, and on a CPU, the same computation has the same result bit for bit."""
    import tensorflow as tf
    from tensorflow.python.util import _pywrap_util_port
    devices = tf.config.list_physical_devices('GPU')
    names = [tf.config.experimental.get_device_details(device).get('device_name', 'GPU') for device in devices]
    instructions = [*_instructions(), *(f'{name}={os.environ[name]}' for name in LIMITS if name in os.environ)]
    return {'tensorflow': tf.__version__, 'device': ', '.join(names) or 'CPU', 'instructions': ' '.join(instructions),
            'oneDNN': 'on' if _pywrap_util_port.IsMklEnabled() else 'off', 'engine': engine, 'replicas': str(replicas),
            'recompute': 'on' if recompute else 'off'}


def _instructions() -> list[str]:
    """The extensions of the instruction set that the processor has, as far as NumPy knows them."""
    try:
        simd: Mapping[str, list[str]] = np.show_config(mode='dicts')['SIMD Extensions']  # type: ignore[call-overload, index, assignment]
    except TypeError:  # NumPy before 1.25
        return [name for name, present in np.core._multiarray_umath.__cpu_features__.items() if present]  # type: ignore[attr-defined]
    return [*simd.get('baseline', []), *simd.get('found', [])]


@functools.cache
def program() -> str:
    """This program's commit, with -dirty if files differ from it; outside of a git checkout its version."""
    if os.path.exists(os.path.join(ROOT, '.git')):  # else git would find a repository around it
        # Without locks, which would be in the way of the user's own git commands.
        command = ['git', '--no-optional-locks', '-C', ROOT, 'status', '--porcelain=v2', '--branch', '--untracked-files=no']
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit, *others = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
            return commit.split()[-1] + ('-dirty' if any(not line.startswith('#') for line in others) else '')
    try:
        return importlib.metadata.version('maml')
    except importlib.metadata.PackageNotFoundError:
        return NOT_KNOWN

"""Checks what a ModelConfig says, for callers in Python; the command line has refused more by then (runtime/cli/rules.py)."""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from runtime.system.errors import UserError

if TYPE_CHECKING:
    from maml import ModelConfig
    from runtime.cli.request import Request

OF_BUILT_IN_NETWORKS = 'norm', 'head'  # fields that mean nothing with a network of one's own


def outputs_stay_equal(settings: ModelConfig | Request) -> bool:
    """Whether the outputs for all classes start equal, and the inner loop keeps them so."""
    starts_equal = settings.head_init == 'shared' or settings.head_init == 'new' and settings.logits == 'linear'
    return settings.inner_weights == 'body' and starts_equal


# (whether a config is refused, the message, with {field} for the values of fields)
COMBINATIONS: list[tuple[Callable[[ModelConfig], bool], str]] = [
    (outputs_stay_equal,
     "head_init={head_init} starts with equal outputs for all classes, which inner_weights='body' keeps equal"),
    (lambda c: c.inner_optimizer == 'adam' and c.outer != 'reptile',
     "inner_optimizer='adam' needs outer='reptile': there is no gradient through Adam"),
    (lambda c: c.num_updates == 0 and c.multi_step_loss > 0, 'multi_step_loss is about inner updates, and num_updates=0 takes none'),
    (lambda c: c.num_updates == 0 and c.norm_per_step, 'norm_per_step is about inner updates, and num_updates=0 takes none')]


def checked(config: ModelConfig, seed: int | None = None, network: Callable | None = None) -> ModelConfig:
    """The config, with tuples where it has lists, and with a seed as its mask_seed and a network, if they are given. Raises UserError,
    which names all of them, for values that a field cannot have, and for fields that cannot be combined."""
    config = dataclasses.replace(config, mask_seed=config.mask_seed if seed is None else int(seed), network=network or config.network)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    unused = OF_BUILT_IN_NETWORKS if config.network else ()
    problems = [f'{name}={values[name]!r} must be one of {", ".join(map(repr, choices))}'
                for name, choices in _choices(type(config)).items() if values[name] not in choices and name not in unused]
    problems += [message.format(**values) for is_refused, message in COMBINATIONS if is_refused(config)]
    if problems:
        raise UserError(f'ModelConfig: {"; ".join(problems)}')
    return dataclasses.replace(config, **{name: tuple(value) for name, value in values.items() if isinstance(value, list)})


@functools.cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """{field: its values} of the fields of a dataclass that are Literals."""
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}

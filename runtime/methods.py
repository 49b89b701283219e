"""The methods of the family: each is a set of flags. --method names one; a flag that is given as well overrides it."""
from typing import Any, NamedTuple

from absl import flags

from runtime.flags import GROUPS


class Preset(NamedTuple):
    """What --method stands for."""
    title: str              # in tables and pictures
    flags: dict[str, Any]   # {flag: value} of what differs from MAML


PRESETS = {
    'maml': Preset('MAML', {}),
    'fomaml': Preset('first-order MAML', {'stop_grad': True}),
    'anil': Preset('ANIL', {'inner_weights': 'head'}),
    'boil': Preset('BOIL', {'inner_weights': 'body', 'adapt_norm': True, 'norm_scale': True, 'mean_loss': True, 'update_lr': 0.5,
                            'num_updates': 1}),
    'metasgd': Preset('Meta-SGD', {'learn_lr': 'weight', 'num_updates': 1}),
}


def _switches() -> list[str]:
    """The flags that tell methods apart. Those of a preset that do not, such as the step size, are settings of the method."""
    return ['stop_grad', *(name for name in GROUPS['Method'] if name != 'method')]


def apply_method(values: flags.FlagValues) -> None:
    """Sets the flags that --method stands for, but for those on the command line."""
    for name, value in PRESETS[values.method].flags.items():
        if not values[name].present:
            values[name].value = value


def title(values: flags.FlagValues) -> str:
    """The name of the method that the flags make: a preset's, or 'MAML with' what differs from it."""
    changed = {name: values[name].value for name in _switches() if values[name].value != values[name].default}
    for preset in PRESETS.values():
        if changed == {name: value for name, value in preset.flags.items() if name in _switches()}:
            return preset.title
    return 'MAML with ' + ', '.join(name if value is True else f'{name}={value}' for name, value in changed.items())

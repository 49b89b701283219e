"""The methods of the family: each is a set of flags. --method names one; flags on the command line, and in a --flagfile, override it."""
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from runtime.cli.flags import BUILT_IN_NETWORKS, GROUPS, LEARNING, default


class Preset(NamedTuple):
    """The flags that a --method sets."""
    title: str              # in tables and pictures
    flags: dict[str, Any]   # {flag: value} of what differs from MAML


PRESETS = {
    'maml': Preset('MAML', {}),
    'protomaml': Preset('ProtoMAML', {'head_init': 'prototypes', 'stop_grad': True, 'mean_loss': True, 'query_norm': 'support',
                                      'num_updates': 6, 'update_lr': 0.0054, 'test_updates': 6}),
    'protonet': Preset('ProtoNet', {'head_init': 'prototypes', 'num_updates': 0, 'mean_loss': True}),
    'unicorn': Preset('UNICORN-MAML', {'head_init': 'shared', 'stop_grad': True, 'mean_loss': True, 'num_updates': 5, 'update_lr': 0.1,
                                       'test_updates': 5}),
    'r2d2': Preset('R2-D2', {'head_init': 'ridge', 'num_updates': 0, 'mean_loss': True, 'meta_lr': 0.005}),
    'baseline': Preset('Baseline', {'pretrain_labels': 'classes', 'head_init': 'new', 'inner_weights': 'head', 'mean_loss': True,
                                    'num_updates': 10, 'update_lr': 0.01, 'test_updates': 100}),
    'baseline++': Preset('Baseline++', {'pretrain_labels': 'classes', 'logits': 'cosine', 'head_init': 'new', 'inner_weights': 'head',
                                        'mean_loss': True, 'num_updates': 10, 'update_lr': 0.01, 'test_updates': 100}),
    'fomaml': Preset('first-order MAML', {'stop_grad': True}),
    'anil': Preset('ANIL', {'inner_weights': 'head'}),
    'boil': Preset('BOIL', {'inner_weights': 'body', 'adapt_norm': True, 'norm_scale': True, 'mean_loss': True, 'update_lr': 0.5,
                            'num_updates': 1}),
    'metasgd': Preset('Meta-SGD', {'learn_lr': 'weight', 'num_updates': 1}),
    'maml++': Preset('MAML++', {'mean_loss': True, 'learn_lr': 'step', 'num_updates': 5, 'multi_step_loss': 7500,
                                'first_order_iterations': 5500, 'norm_per_step': True, 'norm_scale': True, 'schedule_interval': 500,
                                'num_filters': 48, 'ensemble': 5, 'test_query': 15, 'test_updates': 5, 'meta_batch_size': 4,
                                'update_lr': 0.01}),
    'reptile': Preset('Reptile', {'outer': 'reptile', 'inner_optimizer': 'adam', 'inner_batch': 10, 'num_updates': 8,
                                  'meta_optimizer': 'sgd', 'meta_lr': 1.0, 'meta_lr_final': 0.0, 'meta_lr_schedule': 'linear',
                                  'adapt_norm': True, 'norm_scale': True, 'test_updates': 50}),
}


def switches() -> list[str]:
    """The flags that distinguish methods. Others in a preset, such as the step size, are settings of the method."""
    return ['stop_grad', *(name for name in GROUPS['Method'] if name not in ('method', 'ensemble'))]


def settings(method: str, values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """{flag: value} that --method stands for, without those `given` on the command line, whose values are among `values`. A preset that is
    evaluated after as many updates as it trains with leaves that to --num_updates, if another is given."""
    flags = PRESETS[method].flags
    is_other = 'num_updates' in given and values['num_updates'] != flags.get('num_updates')
    free = {'test_updates'} if is_other and flags.get('test_updates') == flags.get('num_updates') else set()
    return {name: value for name, value in flags.items() if name not in free.union(given)}


def overridden(method: str, values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """{flag: value} of what --method stands for where other values were given, of flags that change what is learnt."""
    return {name: value for name, value in PRESETS[method].flags.items() if name in given and name in LEARNING and values[name] != value}


def preset_hint(method: str, values: Mapping[str, Any], given: Collection[str], sentence: str) -> str:
    """Text to add to a refusal: which of the flags that it names were not given, but come from --method; '' if none."""
    preset = settings(method, values, given)
    own = ' and '.join(f'--{name}={value}' for name, value in preset.items() if re.search(rf'--{name}\b', sentence))
    return f' (--method={method} sets {own}; a flag on the command line overrides it)' if own else ''


def name(values: Mapping[str, Any], only_pretrains: bool) -> str:
    """What a training with these flags is called: 'oracle', 'pre-training', or the `title` of a method."""
    if values.get('baseline') == 'oracle':
        return 'oracle'
    return 'pre-training' if only_pretrains and values['pretrain_labels'] == 'tasks' else title(values)


def title(values: Mapping[str, Any]) -> str:
    """The name of the method that flags describe: that of the nearest preset, with the switches in which they differ from it."""
    def differing(preset):
        flags = {**{name: default(name) for name in [*switches(), 'num_updates']}, **preset.flags}
        none = [] if bool(values['num_updates']) == bool(flags['num_updates']) else ['num_updates']  # without or with inner updates
        return [name for name in switches() if values[name] != flags[name] and name not in meaningless] + none

    meaningless = [*(BUILT_IN_NETWORKS if values.get('network') else []), *(['query_norm'] if values.get('norm') != 'batch_norm' else [])]
    nearest = min(PRESETS.values(), key=lambda preset: len(differing(preset)))  # of several the first: MAML
    others = [name if values[name] is True else f'{name}={values[name]}' for name in differing(nearest)]
    return nearest.title + (f' with {", ".join(others)}' if others else '')


def preset_flags(method_title: str) -> dict[str, Any]:
    """{flag: value} that the name of a method stands for; {} for other names."""
    return {preset.title: preset.flags for preset in PRESETS.values()}.get(method_title, {})

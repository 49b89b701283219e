"""Models of the same configuration are compiled once in each process of the tests, where most of the time went into compiling."""
import collections
import dataclasses
import heapq
import itertools
import weakref

from maml import MAML

make_model = MAML.__init__
KEPT = 24  # configurations: a compiled model takes up to hundreds of megabytes
_free = collections.OrderedDict()  # {`compiled_part`: heap of (number, attributes) of models that no test has any more}, the latest last
_numbers = itertools.count()


def compiled_part(config):
    """A configuration without what decides nothing in it: models that differ only in that have the same graphs."""
    unused = {} if config.network else {'mask_seed': 0}
    if config.meta_lr_schedule == 'constant':
        unused |= {'metatrain_iterations': 0, 'meta_lr_final': 0.0}
    return dataclasses.replace(config, **unused)


def make_or_reuse_model(model, config, *args, **kwargs):
    """`MAML.__init__`, but with the variables and compiled functions of an earlier model that is gone, if there is one.

    The variables get the values that a new model has; the earlier `config` stays, by which `maml.task_gradient` is cached. Of several
    earlier models, the oldest is taken, so that models that are made in the same order, such as a trained one and its variants, get
    what was compiled for their kind.
    """
    make_model(model, config, *args, **kwargs)
    if model.replicas.count > 1:
        return
    key = compiled_part(model.config)
    free = _free.setdefault(key, [])
    _free.move_to_end(key)
    if len(_free) > KEPT:
        _free.popitem(last=False)
    if free:
        initial = model.state()
        number, model.__dict__ = heapq.heappop(free)
        for name, variable in model.state().items():
            variable.assign(initial[name])
    else:
        number = next(_numbers)
    weakref.finalize(model, heapq.heappush, free, (number, dict(model.__dict__)))


MAML.__init__ = make_or_reuse_model

"""Models of the same configuration are compiled once in each process of the tests, where most of the time went into compiling."""
import collections
import heapq
import itertools
import weakref

from maml import MAML

make_model = MAML.__init__
KEPT = 24  # configurations: a compiled model takes up to hundreds of megabytes
_free = collections.OrderedDict()  # {configuration: heap of (number, attributes) of models that no test has any more}, the latest last
_numbers = itertools.count()


def make_or_reuse_model(model, config, *args, **kwargs):
    """`MAML.__init__`, but with the variables and compiled functions of an earlier model that is gone, if there is one.

    The variables get the values that a new model has. Of several earlier models, the oldest is taken, so that models that are
    made in the same order, such as a trained one and its variants, get what was compiled for their kind.
    """
    make_model(model, config, *args, **kwargs)
    if model.replicas.count > 1:
        return
    free = _free.setdefault(model.config, [])
    _free.move_to_end(model.config)
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

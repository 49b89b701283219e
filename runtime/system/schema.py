"""Values of JSON files, checked against a schema: dataclasses or typed dictionaries, and the types of their fields."""
import dataclasses
import types
import typing
from typing import Any


def checked(kind: Any, value: Any, field: str) -> Any:
    """A value as the annotation `kind` says; raises ValueError, which names the field.

    Of a dataclass, fields without a default must be there, and others than its fields are left out; a typed dictionary keeps what it does
    not know, and must have its required fields.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or type(value) is kind:
        return value
    if origin is types.UnionType:
        return _checked_union(arguments, value, field)
    if (kind, type(value)) == (float, int):
        return float(value)
    if (origin, type(value)) == (list, list):
        return [checked(arguments[0], item, f'{field}[{index}]') for index, item in enumerate(value)]
    if (origin, type(value)) == (tuple, list) and len(arguments) == len(value):
        return tuple(checked(argument, item, f'{field}[{index}]') for index, (argument, item) in enumerate(zip(arguments, value)))
    if (origin, type(value)) == (dict, dict):
        return {name: checked(arguments[1], item, f'{field}.{name}') for name, item in value.items()}
    if _is_structure(kind) and type(value) is dict:
        return _checked_structure(kind, value, field)
    raise ValueError(f'{field} is {value!r:.40}, and should be of type {getattr(kind, "__name__", kind)}')


def _is_structure(kind):
    return dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)


def _checked_union(kinds, value, field):
    """As `checked`, of several plain types and one structure at most."""
    if type(value) in kinds:
        return value
    structures = [kind for kind in kinds if _is_structure(kind)]
    if structures:
        return checked(structures[0], value, field)
    raise ValueError(f'{field} is {value!r:.40}, and should be of type {" | ".join(kind.__name__ for kind in kinds)}')


def _checked_structure(kind, values, field):
    fields = {name: checked(hint, values[name], f'{field}.{name}') for name, hint in typing.get_type_hints(kind).items() if name in values}
    required = kind.__required_keys__ if typing.is_typeddict(kind) else [
        member.name for member in dataclasses.fields(kind) if member.default is member.default_factory is dataclasses.MISSING]
    for name in required:
        if name not in values:
            raise ValueError(f'{field}.{name} is missing')
    return {**values, **fields} if typing.is_typeddict(kind) else kind(**fields)

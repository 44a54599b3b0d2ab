"""Whether the values of a configuration have the types that a class's constructor declares.

A configuration comes from a JSON file that anybody may have edited. Without this check, `"num_layers": "30"` is a
TypeError from deep inside torch, and `"cross_attn_norm": "no"` is true.
"""

import inspect
import types
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin


def check_setting_types(settings: Mapping[str, Any], component_class: type) -> None:
    """
    Compare settings with the annotations of the constructor that takes them.

    JSON has neither tuples nor whole floats: a list is taken for a tuple, and a whole number for a float. Types other
    than numbers, strings, booleans, None, and lists and tuples of them are not checked.

    Args:
        settings: The settings by name. Names that the constructor does not know are not checked.
        component_class: The class of a model, a scheduler or a pipeline.

    Raises:
        ValueError: If a value has another type than the constructor declares; the message names all such settings.
    """
    parameters = inspect.signature(component_class.__init__).parameters
    problems = [
        f"{name} has to be {_describe(parameters[name].annotation)}, got {value!r}"
        for name, value in settings.items()
        if name in parameters and not _matches(value, parameters[name].annotation)
    ]
    if problems:
        raise ValueError(f"{component_class.__name__}: {'; '.join(problems)}.")


def _matches(value: Any, expected: Any) -> bool:
    return any(_is_a(value, kind) for kind in _alternatives(expected))


def _alternatives(expected: Any) -> Iterator[Any]:
    """Yield the members of a union; of any other type, the type itself."""
    if get_origin(expected) in (Union, types.UnionType):
        for member in get_args(expected):
            yield from _alternatives(member)
    else:
        yield type(None) if expected is None else expected


def _is_a(value: Any, kind: Any) -> bool:
    origin, members = get_origin(kind), get_args(kind)
    if kind is bool or kind is str or kind is type(None):
        return isinstance(value, kind)
    if kind is int or kind is float:
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind in (list, tuple):
        return isinstance(value, (list, tuple))
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        of_any_length = origin is list or Ellipsis in members
        wanted = [members[0]] * len(value) if of_any_length else members
        return len(wanted) == len(value) and all(map(_matches, value, wanted))
    return True  # an object, or no annotation: what it is, its class knows


def _describe(expected: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    parts = []
    for kind in _alternatives(expected):
        origin, members = get_origin(kind), get_args(kind)
        if origin is tuple and Ellipsis not in members:
            parts.append(f"a list of {len(members)} ({', '.join(_describe(member) for member in members)})")
        elif origin in (list, tuple):
            parts.append(f"a list of ({_describe(members[0])})")
        else:
            parts.append(names.get(kind, str(kind)))
    return " or ".join(parts)

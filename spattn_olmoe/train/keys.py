"""Every key and plain value of a nested dictionary checked against OLMo-core's config classes, before one is built.

OLMo-core's own decoder names neither the key nor what would be right.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from enum import Enum
from typing import Any, Union

from olmo_core.config import Config, Registrable

from ..errors import nearest
from ..trust import config_class


def check_keys(data: Any, expected: Any, where: str = "") -> None:
    """Raise at the first key of ``data`` that the type ``expected`` has no field for, naming the nearest field."""
    cls = _config_class(data, expected, where)
    if cls is not None and isinstance(data, dict):
        hints = _field_types(cls)
        for key, value in data.items():
            if key in (Config.CLASS_NAME_FIELD, "type") and key not in hints:
                continue
            full = f"{where}.{key}" if where else str(key)
            if key not in hints:
                raise ValueError(f"{full} is not a key of {cls.__name__}{nearest(str(key), hints)}")
            check_keys(value, hints[key], full)
        return
    inner = _element_type(expected)
    if inner is None or not isinstance(data, (dict, list, tuple)):
        _check_value(data, expected, where)
    elif isinstance(data, dict):
        for key, value in data.items():
            check_keys(value, inner, f"{where}.{key}")
    else:
        for i, value in enumerate(data):
            check_keys(value, inner, f"{where}[{i}]")


def _check_value(value: Any, expected: Any, where: str) -> None:
    """Raise where a field of plain values holds another kind of value."""
    allowed = []
    for option in _options(expected):
        if isinstance(option, type) and issubclass(option, Enum):
            if value in [member.value for member in option]:
                return
            allowed += [str(member.value) for member in option]
        elif option in _PLAIN:
            kinds, name = _PLAIN[option]
            if isinstance(value, kinds) and (option is bool or not isinstance(value, bool)):
                return
            allowed.append(name)
        elif (origin := typing.get_origin(option) or option) in _CONTAINERS or dataclasses.is_dataclass(origin):
            kinds, name = _CONTAINERS.get(origin, _CONTAINERS[dict])
            if isinstance(value, kinds):
                return
            allowed.append(name)
        else:
            return  # a class of its own: the decoder knows
    raise ValueError(f"{where}={value!r}: must be {' or '.join(allowed)}")


_PLAIN: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "text"),
    type(None): (type(None), "null"),
}


_CONTAINERS: dict[Any, tuple[Any, str]] = {
    dict: (dict, "a mapping"),
    list: ((list, tuple), "a list"),
    tuple: ((list, tuple), "a list"),
}


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a name that is imported for type checkers only: the field's own keys go unchecked
        hints = {}
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.init}


def _options(expected: Any) -> tuple[Any, ...]:
    """The alternatives of a Union, or the type alone."""
    if typing.get_origin(expected) in (Union, types.UnionType):
        return typing.get_args(expected)
    return (expected,)


def _config_class(data: Any, expected: Any, where: str) -> type | None:
    """The config class that a mapping stands for, by ``_CLASS_``, by registered ``type``, or by the field it is in."""
    if not isinstance(data, dict):
        return None
    named = data.get(Config.CLASS_NAME_FIELD)
    if named is not None:
        return config_class(named, where)
    for option in _options(expected):
        cls = typing.get_origin(option) or option
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            if issubclass(cls, Registrable) and "type" in data:
                return _registered(cls, data["type"], where)
            return cls
    return None


def _registered(base: type[Registrable], name: str, where: str) -> type:
    if name == base.registered_name:
        return base
    known = base.get_registered_names()
    if name not in known:
        raise ValueError(
            f"{where}.type={name!r} is not a {base.__name__}{nearest(str(name), known)} (known: {', '.join(sorted(known))})"
        )
    return base.get_registered_class(name)


def _element_type(expected: Any) -> Any:
    """The type of the values of a list or mapping field, or None."""
    for option in _options(expected):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if origin in (dict, typing.Dict) and len(args) == 2:  # noqa: UP006 - OLMo-core writes both
            return args[1]
        if origin in (list, tuple, typing.List, typing.Tuple) and args:  # noqa: UP006
            return args[0]
    return None

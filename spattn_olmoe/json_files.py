"""JSON of strangers and JSON for strangers: read with its size, depth and structure checked, written without NaN."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from .files import regular_file

MAX_BYTES = 2**28
"""The largest file that is read as one JSON value: a manifest of a hundred thousand shards is a tenth of it."""
MAX_DEPTH = 100


def read_json(path: str | Path, shape: Any = object) -> Any:
    """The value of a JSON file.

    :param shape: what it must be, see :func:`check_shape`.
    :raises FileNotFoundError: there is none.
    :raises ValueError: it is no regular file, too large, nested too deeply, no JSON, or of another structure.
    """
    if regular_file(path).st_size > MAX_BYTES:
        raise ValueError(f"{path}: is larger than {MAX_BYTES >> 20} MiB")
    return parse_json(Path(path).read_bytes(), str(path), shape)


def parse_json(data: bytes | str, where: str, shape: Any = object) -> Any:
    """The value of a JSON text; ``where`` names it in errors.

    :raises ValueError: as :func:`read_json`.
    """
    try:
        value = json.loads(data)
        deep = _deeper_than(value, MAX_DEPTH)
    except RecursionError:
        deep = True
    except ValueError as error:  # no JSON, no UTF-8, or an integer of too many digits
        raise ValueError(f"{where}: is no valid JSON ({error})") from None
    if deep:
        raise ValueError(f"{where}: is nested more than {MAX_DEPTH} deep")
    check_shape(value, shape, where)
    return value


def check_shape(value: Any, shape: Any, where: str, key: str = "") -> None:
    """Raise unless a JSON value has a structure.

    :param shape: a type (``int`` is no bool, ``float`` any finite number, ``object`` anything), a tuple of alternatives
        with None for null, ``[shape]`` for a list, ``{str: shape}`` for a mapping of any keys, or a mapping of keys that
        must be there; others may be.
    :param key: the place inside the file so far.
    """
    if isinstance(shape, tuple):
        for option in shape:
            try:
                return check_shape(value, option, where, key)
            except ValueError:
                continue
        raise ValueError(_message(value, shape, where, key))
    if isinstance(shape, list) and isinstance(value, list):
        for i, item in enumerate(value):
            check_shape(item, shape[0], where, f"{key}[{i}]")
    elif isinstance(shape, dict) and isinstance(value, dict):
        named = dict.fromkeys(value, shape[str]) if str in shape else shape
        for name, inner in named.items():
            full = f"{key}.{name}" if key else str(name)
            if name not in value:
                raise ValueError(f"{where}: has no {full!r}")
            check_shape(value[name], inner, where, full)
    elif not _is(value, shape):
        raise ValueError(_message(value, shape, where, key))
    return None


def to_json(value: Any, **options: Any) -> str:
    """JSON as RFC 8259 has it: numbers that are not finite become null, which JSON has no other word for."""
    return json.dumps(_finite(value), allow_nan=False, **options)


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
}


def _is(value: Any, shape: Any) -> bool:
    if shape is object:
        return True
    if shape is None:
        return value is None
    if shape is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and -sys.float_info.max <= value <= sys.float_info.max  # an int of 400 digits is no float
    if shape is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(shape, type) and isinstance(value, shape)


def _message(value: Any, shape: Any, where: str, key: str) -> str:
    options = shape if isinstance(shape, tuple) else (shape,)
    named = [
        "null" if option is None else _NAMES[option if isinstance(option, type) else type(option)] for option in options
    ]
    found = repr(value)
    return f"{where}: {key or 'the whole'} is {found[:60]}{'...' if len(found) > 60 else ''}, not {' or '.join(named)}"


def _deeper_than(value: Any, depth: int) -> bool:
    level: list[Any] = [value]
    for _ in range(depth):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value

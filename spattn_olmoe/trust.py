"""What files may make this process do: import modules of this package and OLMo-core, and nothing else unless asked.

A config or a checkpoint may come from anyone. The names in it (``_CLASS_``, ``attention.type``) are looked at before
anything is imported; ``--trust NAME`` on the command line allows a module of one's own, ``--trust env`` the environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from typing import Any

ENVIRONMENT = "env"
"""``--trust env``: ``${oc.env:NAME}`` in YAML may read environment variables."""

CLASS_FIELD = "_CLASS_"
"""The key by which OLMo-core's configs name their class."""

_trusted = {"spattn_olmoe", "olmo_core"}


def trust(name: str) -> None:
    """Allow files to name a module and those below it, or the environment (:data:`ENVIRONMENT`), in this process."""
    _trusted.add(name)


def is_trusted(name: str) -> bool:
    """Whether files may name a module."""
    return any(name == known or name.startswith(f"{known}.") for known in _trusted)


def check_import(module: str, where: str) -> None:
    """Raise unless a file may make this process import a module.

    One that is imported already is no new code: a program that uses this package as a library has chosen it.

    :param where: the key and value that name it.
    :raises ValueError: it is not trusted.
    """
    if module not in sys.modules and not is_trusted(module):
        raise ValueError(
            f"{where}: would import {module!r}, which is neither of this package nor of OLMo-core: if that code is yours, "
            f"say --trust {module or 'MODULE'}"
        )


class Trust(argparse.Action):
    """``--trust NAME`` of a command line: takes effect as it is parsed; ``args.trust`` lists the names."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        trust(values)
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


def add_argument(parser: argparse.ArgumentParser) -> None:
    """``--trust`` for a command that opens files of others."""
    parser.add_argument(
        "--trust",
        action=Trust,
        default=[],
        metavar="NAME",
        help="let files import this module of yours, or (env) read environment variables; may be given several times",
    )


def config_class(name: Any, where: str) -> type:
    """The dataclass that a ``_CLASS_`` names.

    :raises ValueError: it is not trusted, there is none, or it is no dataclass.
    """
    module, _, attribute = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if not module or not is_trusted(module):
        raise ValueError(
            f"{where}._CLASS_={name!r}: is neither of this package nor of OLMo-core: if that code is yours, "
            f"say --trust {module or 'MODULE'}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"{where}._CLASS_={name!r}: there is no such class") from None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"{where}._CLASS_={name!r}: is not a config class")
    return found


def check_classes(data: Any, where: str) -> None:
    """Raise unless every ``_CLASS_`` in nested mappings and lists, however deep, may be built; see :func:`config_class`."""
    if isinstance(data, dict):
        if CLASS_FIELD in data:
            config_class(data[CLASS_FIELD], where)
        for key, value in data.items():
            check_classes(value, f"{where}.{key}" if where else str(key))
    elif isinstance(data, (list, tuple)):
        for i, value in enumerate(data):
            check_classes(value, f"{where}[{i}]")

"""Experiments as YAML: OLMo-core's own config classes, section by section, and ``attention:``.

``extends:`` names a base file, a file holds only what differs, and ``key=value`` on the command line comes last. Keys are
checked against the config classes before anything is built, so that a typo is met with the nearest key that exists.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union

from olmo_core.config import Config, Registrable
from olmo_core.data import NumpyDataLoaderConfig, NumpyDatasetConfig
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.train import TrainerConfig
from olmo_core.train.train_module import TransformerTrainModuleConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import nearest
from ..model.section import AttentionPlan, attach, plan_attention


@dataclass
class ExperimentConfig(Config):
    """One training run. Sections are OLMo-core's classes; see their documentation for their keys.

    :param attention: the attention type and its options, see :func:`spattn_olmoe.model.section.plan_attention`.
    :param model: the model. Its attention is replaced as ``attention`` says.
    :param name: what the run is called; part of its save folder in the shipped configs.
    :param init_seed: seed of data order aside, everything random: initial weights first of all.
    :param allow_attention_change: load a checkpoint that was trained with another attention type.
    """

    attention: dict[str, Any]
    model: TransformerConfig
    dataset: NumpyDatasetConfig
    data_loader: NumpyDataLoaderConfig
    train_module: TransformerTrainModuleConfig
    trainer: TrainerConfig
    name: str = "run"
    init_seed: int = 12536
    allow_attention_change: bool = False

    @property
    def sequence_length(self) -> int:
        """Tokens per training sequence."""
        return getattr(self.dataset, "sequence_length", None) or self.train_module.max_sequence_length

    @property
    def ranks_per_layer(self) -> int:
        """How many ranks share the heads of a layer: the degrees of tensor and context parallelism, multiplied."""
        parts = (self.train_module.tp_config, self.train_module.cp_config)
        return math.prod(part.degree for part in parts if part is not None)

    def as_config_dict(self) -> dict[str, Any]:
        """The experiment as JSON can hold it. Unlike OLMo-core's own, with nulls: a null may stand for a default."""
        return self.as_dict(
            exclude_private_fields=True,
            include_class_name=True,
            include_registered_name=True,
            json_safe=True,
            recurse=True,
        )

    def plan(self) -> AttentionPlan:
        """The attention section, checked."""
        return plan_attention(self.attention, band_length=self.sequence_length, ranks=self.ranks_per_layer)

    def model_with_attention(self) -> TransformerConfig:
        """The model config with its attention patterns in it."""
        return attach(self.model, self.plan())


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment from YAML.

    :param path: a YAML file, which may extend others.
    :param overrides: ``key=value`` items, dots for nesting: ``train_module.optim.lr=1e-4``.
    :raises ValueError: with one line that names the file or key, and what would be right.
    """
    return decode_experiment(read_yaml(path, overrides))


def show(path: str | Path, overrides: Sequence[str], key: str) -> Any:
    """One value of a resolved config, by its dotted key.

    :raises ValueError: there is no such key, or the config is wrong.
    """
    value: Any = read_yaml(path, overrides)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"--show {key}: there is no such key{nearest(part, value)}")
        value = value[part]
    return value


def decode_experiment(data: dict[str, Any]) -> ExperimentConfig:
    """An experiment from a nested dictionary, every key checked."""
    check_keys(data, ExperimentConfig)
    try:
        config = ExperimentConfig.from_dict(data)
    except OLMoConfigurationError as error:
        raise ValueError(_first_line(error)) from error
    except Exception as error:  # the decoder raises types of its own for values that fit no field
        raise ValueError(f"config: {_first_line(error)}") from error
    return config


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file with its bases below it and overrides on top, interpolations resolved."""
    merged = _read_with_bases(Path(path), ())
    for item in overrides:
        if "=" not in item or item.startswith("-"):
            raise ValueError(f"argument {item!r} is not of the form key=value")
    try:
        complete = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        data = OmegaConf.to_container(complete, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_first_line(error)}") from error
    return typing.cast(dict[str, Any], data)


def _read_with_bases(path: Path, extending: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in extending:
        raise ValueError(f"{path} extends itself: {' -> '.join(p.name for p in (*extending, path))}")
    if not path.is_file():
        by = f", which {extending[-1]} extends," if extending else ""
        raise ValueError(f"config file {path}{by} does not exist")
    try:
        config = typing.cast(DictConfig, OmegaConf.load(path))
    except Exception as error:  # YAML errors, encoding errors and OmegaConf's own have no common type
        raise ValueError(f"{path} is not valid YAML: {_first_line(error)}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} must hold a mapping of sections")
    base = config.pop("extends", None)
    if base is None:
        return config
    if not isinstance(base, str):
        raise ValueError(f"{path}: extends={base} must be the name of one file")
    below = _read_with_bases(path.parent / base, (*extending, path))
    return typing.cast(DictConfig, OmegaConf.merge(below, config))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# ---- keys ------------------------------------------------------------------------------------------------------------


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
        return _import_class(named, where)
    for option in _options(expected):
        cls = typing.get_origin(option) or option
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            if issubclass(cls, Registrable) and "type" in data:
                return _registered(cls, data["type"], where)
            return cls
    return None


def _import_class(name: str, where: str) -> type:
    module, _, attribute = str(name).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"{where}._CLASS_={name!r}: there is no such class") from None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"{where}._CLASS_={name!r}: is not a config class")
    return cls


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

"""Experiments as YAML: OLMo-core's own config classes, section by section, and ``attention:``.

``extends:`` names a base file, a file holds only what differs, and ``key=value`` on the command line comes last. Keys are
checked against the config classes before anything is built, so that a typo is met with the nearest key that exists.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmo_core.config import Config
from olmo_core.data import NumpyDataLoaderConfig, NumpyDatasetConfig
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.train import TrainerConfig
from olmo_core.train.train_module import TransformerTrainModuleConfig

from ..errors import nearest
from ..model.section import attach
from ..model.stack import DDPOptions, Stack
from ..settings import first_line, read
from ..trust import check_classes
from .degrees import Degrees
from .keys import check_keys
from .ranges import check_ranges


@dataclass
class ExperimentConfig(Config):
    """One training run. Sections are OLMo-core's classes; see their documentation for their keys.

    :param attention: the attention type and its options, see :func:`spattn_olmoe.model.section.attach`.
    :param model: the model. Its attention is replaced as ``attention`` states.
    :param stack: which of OLMo-core's stacks trains it, ``v1`` or ``ddp``; both compute the same function.
    :param ddp: what only the stack ``ddp`` knows.
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
    stack: Stack = Stack.v1
    ddp: DDPOptions = field(default_factory=DDPOptions)
    name: str = "run"
    init_seed: int = 12536
    allow_attention_change: bool = False

    @property
    def sequence_length(self) -> int:
        """Tokens per training sequence."""
        return getattr(self.dataset, "sequence_length", None) or self.train_module.max_sequence_length

    @property
    def ranks_per_layer(self) -> int:
        """How many ranks share the heads of a layer."""
        return Degrees.of(self.train_module).heads

    def as_config_dict(self) -> dict[str, Any]:
        """The experiment as JSON can hold it. Unlike OLMo-core's own, with nulls: a null may stand for a default."""
        return self.as_dict(
            exclude_private_fields=True,
            include_class_name=True,
            include_registered_name=True,
            json_safe=True,
            recurse=True,
        )

    def model_with_attention(self) -> TransformerConfig:
        """The model config with its attention patterns in it, made once: change a config by ``replace``, not in place."""
        return self._model_with_attention

    @functools.cached_property
    def _model_with_attention(self) -> TransformerConfig:
        return attach(self.model, self.attention, band_length=self.sequence_length, ranks=self.ranks_per_layer)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment from YAML.

    :param path: a YAML file, which may extend others.
    :param overrides: ``key=value`` items, dots for nesting: ``train_module.optim.lr=1e-4``.
    :raises ValueError: with one line that names the file or key, and what would be right.
    """
    return decode_experiment(read(path, overrides))


def show(path: str | Path, overrides: Sequence[str], key: str) -> Any:
    """One value of a resolved config, by its dotted key.

    :raises ValueError: there is no such key, or the config is wrong.
    """
    value: Any = read(path, overrides)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"--show {key}: there is no such key{nearest(part, value)}")
        value = value[part]
    return value


def decode_experiment(data: dict[str, Any]) -> ExperimentConfig:
    """An experiment from a nested dictionary, every key checked."""
    check_classes(data, "")
    check_keys(data, ExperimentConfig)
    check_ranges(data)
    try:
        config = ExperimentConfig.from_dict(data)
    except OLMoConfigurationError as error:
        raise ValueError(first_line(error)) from error
    except Exception as error:  # the decoder raises types of its own for values that fit no field
        raise ValueError(f"config: {first_line(error)}") from error
    return config

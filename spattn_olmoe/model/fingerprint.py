"""What a checkpoint records about its attention.

All attention types have the same parameters, so no loader can notice the wrong one. Every checkpoint therefore carries
``attention.json``: the pattern of every layer and the shape of the model. It is checked before anything is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..json_files import read_json
from ..patterns import build_pattern

if TYPE_CHECKING:
    from olmo_core.nn.transformer import TransformerConfig

FILE_NAME = "attention.json"
_LAYER = {"name": str, "n_heads": int, "band_length": int}
_SHAPE = ("d_model", "n_layers", "vocab_size")


@dataclass(frozen=True)
class Fingerprint:
    """The attention of a model, layer by layer, and the numbers that give its weights their shapes."""

    layers: tuple[dict[str, Any], ...]
    shape: dict[str, int]

    @classmethod
    def of(cls, model: TransformerConfig) -> Fingerprint:
        """The fingerprint of a model config with attention patterns."""
        from .section import layer_patterns

        return cls(
            layers=tuple(pattern.to_config() for pattern in layer_patterns(model)),
            shape={key: getattr(model, key) for key in _SHAPE},
        )

    def to_json(self) -> str:
        """As it is written beside a checkpoint."""
        return json.dumps({"layers": list(self.layers), "shape": self.shape}, indent=1)

    @classmethod
    def read(cls, checkpoint: str) -> Fingerprint | None:
        """The fingerprint of a checkpoint, or else of the run it lies in, local or at a URL; None where there is none."""
        for folder in (checkpoint, str(checkpoint).rstrip("/").rpartition("/")[0]):
            path = f"{str(folder).rstrip('/')}/{FILE_NAME}"
            try:
                data = read_json(_local(path), {"layers": [_LAYER], "shape": dict.fromkeys(_SHAPE, int)})
            except FileNotFoundError:
                continue
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}): restore it") from None
            found = cls(
                layers=tuple(_completed(layer) for layer in data["layers"]),
                shape={key: data["shape"][key] for key in _SHAPE},
            )
            if len(found.layers) != found.shape["n_layers"]:
                raise ValueError(f"{path} is damaged ({len(found.layers)} layers): restore it")
            return found
        return None


def _local(path: str) -> Path:
    """A file here; one at a URL is fetched first.

    :raises FileNotFoundError: there is none.
    """
    if "://" not in path:
        return Path(path)
    from cached_path import cached_path

    return Path(cached_path(path))


def _completed(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's pattern with the options that did not exist yet when it was written, at their defaults."""
    try:
        return build_pattern(**layer).to_config()
    except (ValueError, TypeError):  # of a type or with an option that is not known here: it stays as recorded
        return layer


def check_checkpoint(checkpoint: str, model: TransformerConfig, *, allow_attention_change: bool) -> str | None:
    """Raise unless a checkpoint's attention and shape are those of ``model``.

    :param allow_attention_change: let another attention type pass; the returned text names what changed.
    :raises ValueError: they differ, or the checkpoint does not say.
    """
    here, there = Fingerprint.of(model), Fingerprint.read(checkpoint)
    remedy = "set allow_attention_change=true to load it all the same"
    if there is None:
        message = f"checkpoint {checkpoint} does not say what attention it was trained with ({FILE_NAME} is missing)"
        if not allow_attention_change:
            raise ValueError(f"{message}: {remedy}")
        return message
    for key, value in there.shape.items():
        if here.shape.get(key) != value:
            raise ValueError(
                f"checkpoint {checkpoint} has model.{key}={value} but this config has {here.shape.get(key)}: "
                "use the checkpoint's config, or another trainer.save_folder"
            )
    for layer, (mine, its) in enumerate(zip(here.layers, there.layers, strict=True)):
        if mine != its:
            message = (
                f"checkpoint {checkpoint} was trained with attention {its} in layer {layer} but this config has {mine}"
            )
            if not allow_attention_change:
                raise ValueError(f"{message}: use that type, another trainer.save_folder, or {remedy}")
            return message
    return None

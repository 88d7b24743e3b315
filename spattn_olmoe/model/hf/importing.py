"""A published OLMoE as a checkpoint of OLMo-core, read and written one tensor at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from olmo_core.nn.transformer import TransformerConfig

from ...data.tokenizer import parse_tokenizer, vocab_size
from ...files import complete_or_absent
from ..checkpoint import TOKENIZER_FILE
from ..checkpoint_files import write_checksums
from ..fingerprint import FILE_NAME, Fingerprint
from ..lazy_save import described, save_lazily
from ..section import BASELINE, with_attention
from ..stack_weights import require_weights
from .config import hf_config, require_same_model
from .export import Published, read_config
from .weights import Shape


def import_published(
    source: str | Path, to: str | Path, experiment: dict[str, Any], model: TransformerConfig, *, yaml: str
) -> TransformerConfig:
    """Write the weights of a folder in transformers' format as a checkpoint with dense attention.

    The checkpoint holds weights, ``config.json``, ``attention.json``, the folder's ``tokenizer.json`` and checksums; no state
    of an optimiser and no step. The folder is complete or not there.

    :param source: a folder of safetensors, sharded or not, experts one by one or fused.
    :param to: a folder that does not exist yet.
    :param experiment: what the checkpoint's ``config.json`` holds besides the model.
    :param model: the model that the weights must be of; its attention is taken as dense.
    :param yaml: where ``model`` comes from, for messages.
    :returns: the model as the checkpoint has it.
    :raises ValueError: another architecture, a key, a weight or a shape that does not fit, or no room.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"--from {source}: there is no such folder")
    length, tokenizer = experiment["dataset"]["sequence_length"], experiment["dataset"]["tokenizer"]
    dense = with_attention(model, band_length=length, type=BASELINE)
    wanted = hf_config(
        dense,
        max_length=length,
        eos_token_id=tokenizer["eos_token_id"],
        pad_token_id=tokenizer["pad_token_id"],
        dtype="float32",
    )
    require_same_model(read_config(source / "config.json"), wanted, str(source / "config.json"), yaml)
    shape, weights = Shape.of(wanted), Published(source)
    fused = any(name.endswith("experts.gate_up_proj") for name in weights.shapes)
    require_weights(weights.shapes, shape.published(fused), str(source))
    _check_dtypes(weights)
    _check_tokenizer(source, dense.vocab_size)
    with complete_or_absent(to, sum(path.stat().st_size for path in source.glob("*.safetensors"))) as folder:
        _save(folder, shape, weights, fused)
        (folder / "config.json").write_text(
            json.dumps(experiment | {"model": _json(dense), "attention": {"type": BASELINE}})
        )
        (folder / FILE_NAME).write_text(Fingerprint.of(dense).to_json())
        shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        write_checksums(folder, rank=0, ranks=1)
    return dense


def _check_dtypes(weights: Published) -> None:
    first, *others = sorted(weights.dtypes, key=lambda name: name != "model.norm.weight")
    dtype = weights.dtypes[first]
    for name in others:
        if weights.dtypes[name] != dtype:
            raise ValueError(f"{weights.folder}: {name} is {weights.dtypes[name]} but {first} is {dtype}")
    if dtype not in ("F32", "BF16", "F16"):
        raise ValueError(f"{weights.folder}: weights are {dtype}: give those that were not quantized")


def _json(model: TransformerConfig) -> dict[str, Any]:
    return model.as_dict(
        exclude_private_fields=True, include_class_name=True, include_registered_name=True, json_safe=True, recurse=True
    )


def _check_tokenizer(source: Path, n_ids: int) -> None:
    path = source / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint needs the tokenizer that the weights know")
    if (size := vocab_size(parse_tokenizer(path.read_bytes(), str(path)))) > n_ids:
        raise ValueError(f"{path} has {size} ids but the model only {n_ids}: it is another model's tokenizer")


def _save(folder: Path, shape: Shape, weights: Published, fused: bool) -> None:
    """Weights alone, in OLMo-core's format: the checkpoint's own folder is where it looks for those."""
    dtype = weights.read("model.norm.weight").dtype
    save_lazily(
        folder,
        {f"model.{name}": described(size, dtype) for name, size in shape.core().items()},
        lambda key: shape.from_published(key.removeprefix("model."), weights.read, fused),
    )

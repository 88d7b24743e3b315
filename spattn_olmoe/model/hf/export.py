"""A checkpoint as a folder that stands alone in transformers, written a layer at a time."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from ...files import complete_or_absent, inside
from ...json_files import read_json
from ...patterns import Pattern, build_pattern
from ...serving import modeling_spattn_olmoe
from ..checkpoint import Checkpoint
from ..stack_weights import require_weights
from .card import model_card
from .config import MODELING_FILE, hf_config
from .weights import Shape, same_bits, split

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What weights can be stored in: training keeps float32, and bfloat16 is what mixed precision computes in."""

TOLERANCE = 1e-4
"""Logits in float32 may differ by so much between OLMo-core and transformers: orders of sums differ."""

Draw = Callable[[Pattern, Path], object]


# ---- writing ---------------------------------------------------------------------------------------------------------


def export(
    checkpoint: Checkpoint, to: str | Path, *, dtype: str = "float32", draw: Draw | None = None
) -> dict[str, Any]:
    """Write a checkpoint as transformers reads it. The folder is complete or not there.

    :param to: a folder that does not exist yet.
    :param dtype: ``float32`` or ``bfloat16``, in which the weights are stored.
    :param draw: draws a pattern into a file, for the model card.
    :returns: its ``config.json``.
    :raises ValueError: ``to`` exists, the disk is too full, or the model has no place in transformers.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: must be {' or '.join(DTYPES)}")
    tokenizer = checkpoint.tokenizer()
    config = hf_config(
        checkpoint.model,
        max_length=checkpoint.sequence_length,
        eos_token_id=checkpoint.eos_token_id,
        pad_token_id=checkpoint.config["dataset"]["tokenizer"]["pad_token_id"],
        dtype=dtype,
    )
    shape = Shape.of(config)
    read = reader(checkpoint, shape)
    n_bytes = sum(torch.Size(s).numel() for s in shape.core().values()) * DTYPES[dtype].itemsize
    with complete_or_absent(to, n_bytes) as folder:
        write_weights(folder, shape, read, DTYPES[dtype])
        _write_settings(folder, config, tokenizer)
        pictures = _draw(folder, checkpoint, draw) if draw is not None else []
        (folder / "README.md").write_text(model_card(checkpoint, config, pictures))
    return config


def reader(checkpoint: Checkpoint, shape: Shape) -> Callable[[str], Tensor]:
    """Reads one weight of a checkpoint by v1's name, whichever stack trained it.

    :raises ValueError: the checkpoint's weights are not those of such a model, or cannot be read.
    """
    weights = checkpoint.weights()
    require_weights(weights.sizes, shape.core(), f"checkpoint {checkpoint.path}")
    return weights.read


def write_weights(folder: Path, shape: Shape, read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """One file for what precedes the layers, one a layer, one for what follows them; and the index."""
    groups: dict[str, list[str]] = {}
    for name in shape.core():
        groups.setdefault(split(name)[0] or name.partition(".")[0], []).append(name)
    where: dict[str, str] = {}
    total = 0
    for n, names in enumerate(groups.values(), start=1):
        file = f"model-{n:05d}-of-{len(groups):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= shape.to_published(name, read(name).to(dtype))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _write_settings(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    eos, pad = config["eos_token_id"], config["pad_token_id"]
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": eos, "pad_token_id": pad})
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    special = {"eos_token": tokenizer.id_to_token(eos), "pad_token": tokenizer.id_to_token(pad)}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # as in training: a special token's name in a text is text
    }
    _write_json(folder / "tokenizer_config.json", settings | {k: v for k, v in special.items() if v is not None})
    if "auto_map" in config:
        shutil.copyfile(modeling_spattn_olmoe.__file__, folder / MODELING_FILE)


def _draw(folder: Path, checkpoint: Checkpoint, draw: Draw) -> list[str]:
    """A picture of every pattern that some layer has."""
    patterns = list(dict.fromkeys(build_pattern(**layer) for layer in checkpoint.layers))
    names = [f"attention{n or ''}.png" for n in range(len(patterns))]
    for name, pattern in zip(names, patterns, strict=True):
        draw(pattern, folder / name)
    return names


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---- verifying -------------------------------------------------------------------------------------------------------


def verify(checkpoint: Checkpoint, folder: str | Path) -> dict[str, Any]:
    """Compare an export with its checkpoint: every tensor bit for bit, and the logits of a prompt as long as in training.

    :returns: how many tensors and tokens were compared, and the largest difference of a logit.
    :raises ValueError: something differs.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    shape = Shape.of(config)
    read, there = reader(checkpoint, shape), Published(folder)
    require_weights(there.shapes, shape.published(), str(folder))
    for name in shape.core():
        for published, tensor in shape.to_published(name, read(name).to(DTYPES[config["dtype"]])).items():
            if not same_bits(there.read(published), tensor):
                raise ValueError(f"--verify: {published} in {folder} is not the checkpoint's: export it again")
    T = checkpoint.sequence_length
    worst = _largest_difference(checkpoint, folder, T)
    if not worst <= TOLERANCE:  # a NaN is not
        raise ValueError(f"--verify: logits of {T} tokens differ by {worst:.2g}, more than {TOLERANCE:.0e}")
    return {"tensors": len(there.shapes), "tokens": T, "largest_difference": worst}


@torch.no_grad()
def _largest_difference(checkpoint: Checkpoint, folder: Path, T: int) -> float:
    """Of the logits of random tokens between OLMo-core and transformers, both in float32 on the stored weights."""
    ids = torch.randint(checkpoint.model.vocab_size, (1, T), generator=torch.Generator().manual_seed(0))
    config = read_config(folder / "config.json")
    theirs = _class_of(folder, config).from_pretrained(folder, dtype=torch.float32).eval()
    dtype = DTYPES[config["dtype"]]
    logits = theirs(ids).logits
    del theirs
    ours = checkpoint.load("cpu").model.float()
    for parameter in ours.parameters():
        parameter.copy_(parameter.to(dtype))
    return float((ours(ids) - logits).abs().max())


def _class_of(folder: Path, config: dict[str, Any]) -> Any:
    """The class that transformers would load: that of the folder's own code, imported from where it is.

    transformers copies such code into a cache at home, which a machine may not have.
    """
    from transformers import AutoModelForCausalLM

    if "auto_map" not in config:
        return AutoModelForCausalLM
    spec = importlib.util.spec_from_file_location("exported_modeling", folder / MODELING_FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, config["architectures"][0])


class Published:
    """The weights of a folder in transformers' format, sharded or not, read one tensor at a time.

    :raises ValueError: a file is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files: dict[str, Any] = {}
        self.where: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        index = self.folder / "model.safetensors.index.json"
        listed = read_json(index, {"weight_map": {str: str}})["weight_map"] if index.is_file() else None
        for file in sorted(set(listed.values())) if listed else ["model.safetensors"]:
            tensors = self._open(file)
            for name in tensors.keys():  # noqa: SIM118 - safetensors' files are no dictionaries
                self.where[name] = file
                described = tensors.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(described.get_shape()), described.get_dtype()
        if listed and (lost := sorted(listed.keys() - self.where.keys())):
            raise ValueError(f"{index} names {lost[0]}, which {listed[lost[0]]} does not hold: restore both")

    def read(self, name: str) -> Tensor:
        """One tensor by its name."""
        return self._open(self.where[name]).get_tensor(name)

    def _open(self, file: str) -> Any:
        if file not in self.files:
            path = inside(self.folder, file, links=True)  # the hub keeps files elsewhere, and links to them
            try:
                self.files[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise ValueError(f"{path} is missing: the weights must be safetensors, and complete") from None
            except Exception as error:  # the Rust side has a type of its own
                raise ValueError(f"{path} is damaged ({error}): restore it") from None
        return self.files[file]


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder in transformers' format.

    :raises ValueError: there is none, or it is damaged.
    """
    try:
        return read_json(path, dict)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: name a folder that transformers could load") from None

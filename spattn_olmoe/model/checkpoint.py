"""A checkpoint opened: what it says about itself is checked first, then its model and tokenizer are loaded."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from olmo_core.distributed.utils import get_world_size
from olmo_core.generate.generation_module import GenerationConfig, TransformerGenerationModule
from olmo_core.nn.transformer import TransformerConfig
from tokenizers import Tokenizer
from torch.distributed.checkpoint.api import CheckpointException

from ..data.config import TokenizerSection
from ..data.tokenizer import find_tokenizer, parse_tokenizer, vocab_size
from ..patterns import Pattern, build_pattern
from .checkpoint_files import resolve_checkpoint
from .fingerprint import FILE_NAME, Fingerprint
from .remedies import apply_remedies
from .section import layer_patterns, with_follows_input

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says about itself, before its weights are read.

    :param path: the checkpoint's own folder, ``.../stepN``.
    :param config: its ``config.json``.
    :param model: the model, with ``follows_input`` as asked for.
    :param layers: the attention pattern of every layer of ``model``.
    """

    path: str
    config: dict[str, Any]
    model: TransformerConfig
    layers: tuple[dict[str, Any], ...]

    @classmethod
    def open(cls, folder: str | Path, *, follows_input: bool | None = None) -> Checkpoint:
        """Find the checkpoint in a folder and compare its config with its ``attention.json``.

        :param follows_input: bands of the input's length or not, instead of what the checkpoint was trained with.
        :raises ValueError: there is none, it does not say what attention it has, or contradicts itself.
        """
        if follows_input not in (None, True, False):
            raise ValueError(f"follows_input={follows_input!r}: must be true or false")
        path = resolve_checkpoint(folder)
        config = read_checkpoint_config(path)
        try:
            model = TransformerConfig.from_dict(config["model"])
        except KeyError as error:
            raise ValueError(f"{path}/config.json has no {error}: it describes no model") from None
        _check_fingerprint(path, model)
        opened = cls(path, config, model, _layers(model))
        return opened if follows_input is None else opened.with_follows_input(follows_input)

    def with_follows_input(self, follows_input: bool) -> Checkpoint:
        """The same checkpoint, to be loaded with bands of the input's length or with bands as long as they are."""
        model = with_follows_input(self.model, follows_input)
        return replace(self, model=model, layers=_layers(model))

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        return self.config["dataset"]["sequence_length"]

    @property
    def eos_token_id(self) -> int:
        return self.config["dataset"]["tokenizer"]["eos_token_id"]

    @property
    def follows_input(self) -> bool:
        """Whether the mask of some layer depends on the length of its input."""
        return any(layer["follows_input"] for layer in self.layers)

    def tokenizer(self, override: str | Path | None = None) -> Tokenizer:
        """The checkpoint's tokenizer, or another ``tokenizer.json``.

        :raises ValueError: there is none, or it has ids that the model does not.
        """
        if override is None:
            try:
                tokenizer = load_tokenizer(self.path)
            except ValueError as error:
                raise ValueError(
                    f"{self.path} has no tokenizer.json, and: {error}; give the file with tokenizer=FILE"
                ) from None
        else:
            data, _ = find_tokenizer(TokenizerSection(identifier=str(override)))
            tokenizer = parse_tokenizer(data, str(override))
        if (size := vocab_size(tokenizer)) > self.model.vocab_size:
            raise ValueError(
                f"tokenizer of {self.path}: it has {size} ids but the model only {self.model.vocab_size}: "
                "give the one the model was trained with"
            )
        return tokenizer

    def load(self, device: str | None = None) -> TransformerGenerationModule:
        """The model with its weights.

        :param device: by default the GPU, where there is one, and on several ranks each one's own.
        :raises ValueError: files of the checkpoint are missing or cut off, or there is no such device.
        """
        try:
            return load_generator(self.path, _device(device) if device else None, model=self.model)
        except (CheckpointException, EOFError, pickle.UnpicklingError, OSError) as error:
            cause: BaseException = error
            if isinstance(error, CheckpointException):  # its own message is a list of ranks
                cause, _ = next(iter(error.failures.values()))
            raise ValueError(
                f"checkpoint {self.path} cannot be read, a file is missing, cut off or damaged "
                f"({type(cause).__name__}: {cause}): restore it, or name an older stepN"
            ) from error


def read_checkpoint_config(checkpoint: str | Path) -> dict[str, Any]:
    """The experiment config that a checkpoint carries."""
    path = Path(checkpoint) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint does not say what model it is") from None


def trained_patterns(folder: str | Path) -> tuple[list[Pattern], int]:
    """The pattern of every layer of a run's newest checkpoint, and its length of training; reads no weights.

    :raises ValueError: there is no checkpoint, or it does not say what attention it was trained with.
    """
    path = resolve_checkpoint(folder, verify=False)
    stated = Fingerprint.read(path)
    if stated is None:
        raise ValueError(f"checkpoint {path} does not say what attention it was trained with ({FILE_NAME} is missing)")
    length = read_checkpoint_config(path)["dataset"]["sequence_length"]
    return [build_pattern(**layer) for layer in stated.layers], length


def load_tokenizer(checkpoint: str | Path) -> Tokenizer:
    """The tokenizer that a checkpoint carries, or else the one that its config names: a file, or one on the hub."""
    own = Path(checkpoint) / TOKENIZER_FILE
    name = str(own) if own.is_file() else read_checkpoint_config(checkpoint)["dataset"]["tokenizer"]["identifier"]
    data, _ = find_tokenizer(TokenizerSection(identifier=name))
    return parse_tokenizer(data, name)


def load_generator(
    checkpoint: str, device: torch.device | None = None, *, model: TransformerConfig | None = None
) -> TransformerGenerationModule:
    """A generation module with a checkpoint's weights; token ids come from its ``config.json``.

    :param model: the model to load them into; by default the one that ``config.json`` describes.
    """
    apply_remedies()
    tokenizer = read_checkpoint_config(checkpoint)["dataset"]["tokenizer"]
    return TransformerGenerationModule.from_checkpoint(
        checkpoint,
        transformer_config=model,
        generation_config=GenerationConfig(
            pad_token_id=tokenizer["pad_token_id"], eos_token_id=tokenizer["eos_token_id"]
        ),
        device=device,
    )


def generate(
    checkpoint: str, prompt: str, *, max_new_tokens: int, temperature: float, seed: int, use_cache: bool = True
) -> str:
    """Continue a prompt.

    :param temperature: 0 takes the likeliest token each time; otherwise tokens are drawn, from ``seed``.
    """
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise ValueError("--prompt is empty: give at least one character")
    module = load_generator(checkpoint)
    torch.manual_seed(seed)
    with torch.no_grad():
        tokens, _, _ = module.generate_batch(
            torch.tensor([ids]),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature,
            use_cache=use_cache,
            log_timing=False,
        )
    return tokenizer.decode(tokens[0].tolist())


def _layers(model: TransformerConfig) -> tuple[dict[str, Any], ...]:
    return tuple(pattern.to_config() for pattern in layer_patterns(model))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: not a device; say cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}: there is no such GPU here; say cpu to do without")
    if device.index is not None and get_world_size() > 1:
        raise ValueError(f"device={name}: {get_world_size()} ranks cannot share it; leave it to each rank")
    return device


def _check_fingerprint(path: str, model: TransformerConfig) -> None:
    """Raise unless a checkpoint says what attention it was trained with, and its config says the same."""
    stated, described = Fingerprint.read(path), Fingerprint.of(model)
    if stated is None:
        raise ValueError(
            f"checkpoint {path} does not say what attention it was trained with ({FILE_NAME} is missing): "
            "restore that file from the run's folder"
        )
    if stated != described:
        raise ValueError(
            f"checkpoint {path} contradicts itself: {FILE_NAME} says {stated}, config.json {described}; restore both files"
        )

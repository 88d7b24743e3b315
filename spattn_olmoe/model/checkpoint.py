"""A checkpoint opened: what it records about itself is checked first, then its model and tokenizer are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from olmo_core.distributed.utils import get_world_size
from olmo_core.nn.transformer import TransformerConfig
from tokenizers import Tokenizer

from ..data.config import TokenizerSection
from ..data.tokenizer import find_tokenizer, parse_tokenizer, vocab_size
from ..json_files import read_json
from ..patterns import Pattern, build_pattern
from ..settings import first_line
from ..trust import check_classes
from .checkpoint_files import resolve_checkpoint
from .fingerprint import FILE_NAME, Fingerprint
from .finite import first_non_finite
from .remedies import apply_remedies
from .section import layer_patterns, with_follows_input
from .stack import Stack, stated_stack
from .stack_weights import StoredWeights
from .unpickling import reading

if TYPE_CHECKING:
    from olmo_core.generate.generation_module import TransformerGenerationModule

TOKENIZER_FILE = "tokenizer.json"

MOST_TOKENS = 4
"""A prompt with its continuation may be so many times as long as a sequence of training: attention without a cache, and
with one the prompt's, takes memory as its square."""

_CONFIG = {
    "model": dict,
    "dataset": {
        "sequence_length": int,
        "tokenizer": {"vocab_size": int, "eos_token_id": int, "pad_token_id": int, "identifier": (str, None)},
    },
}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint records about itself, before its weights are read.

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
        model = _model(config["model"], f"{path}/config.json")
        _check_fingerprint(path, model)
        stated_stack(config, f"{path}/config.json")  # is one of those there are
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
        """The id of the token that ends a document."""
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

    @property
    def stack(self) -> Stack:
        """Which of OLMo-core's stacks trained the weights. The model computes the same either way."""
        return Stack(self.config.get("stack", Stack.v1))

    def weights(self) -> StoredWeights:
        """The weights on disk, by v1's names.

        :raises ValueError: they are not of this model.
        """
        apply_remedies()  # one of them reads without running code
        return StoredWeights(self.path, self.stack, self.model)

    def load(self, device: str | None = None) -> TransformerGenerationModule:
        """The model with its weights.

        :param device: by default the GPU, where there is one, and on several ranks each one's own.
        :raises ValueError: files of the checkpoint are missing or cut off, ask for code or hold NaN, or there is no such
            device.
        """
        # Here, because it loads the compiler: seconds, which no training process needs.
        from olmo_core.generate.generation_module import GenerationConfig, TransformerGenerationModule

        apply_remedies()
        tokenizer = self.config["dataset"]["tokenizer"]
        where = _device(device) if device else None
        generation = GenerationConfig(pad_token_id=tokenizer["pad_token_id"], eos_token_id=tokenizer["eos_token_id"])
        if self.stack == Stack.ddp:
            module = TransformerGenerationModule(self.model.build(), generation, device=where)
            self.weights().copy_to(module.model)
        else:
            with reading(self.path):
                module = TransformerGenerationModule.from_checkpoint(
                    self.path, transformer_config=self.model, generation_config=generation, device=where
                )
        if (name := first_non_finite(module.model.named_parameters())) is not None:
            raise ValueError(f"checkpoint {self.path} holds weights that are not finite ({name}): name an older stepN")
        return module


def read_checkpoint_config(checkpoint: str | Path) -> dict[str, Any]:
    """The experiment config that a checkpoint carries."""
    path = Path(checkpoint) / "config.json"
    try:
        config = read_json(path, _CONFIG)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint does not say what model it is") from None
    length, tokenizer = config["dataset"]["sequence_length"], config["dataset"]["tokenizer"]
    if not 0 < length < 2**31:
        raise ValueError(f"{path}: dataset.sequence_length is {length}, no length of a sequence")
    for key in ("eos_token_id", "pad_token_id"):
        if not 0 <= tokenizer[key] < tokenizer["vocab_size"]:
            raise ValueError(
                f"{path}: dataset.tokenizer.{key} is {tokenizer[key]}, not below vocab_size {tokenizer['vocab_size']}"
            )
    return config


def trained_patterns(folder: str | Path) -> tuple[list[Pattern], int]:
    """The pattern of every layer of a run's newest checkpoint, and its length of training; reads no weights.

    :raises ValueError: there is no checkpoint, or it does not say what attention it was trained with.
    """
    path = resolve_checkpoint(folder, verify=False)
    stated = Fingerprint.read(path)
    if stated is None:
        raise ValueError(f"checkpoint {path} does not say what attention it was trained with ({FILE_NAME} is missing)")
    length = read_checkpoint_config(path)["dataset"]["sequence_length"]
    try:
        return [build_pattern(**layer) for layer in stated.layers], length
    except TypeError as error:  # an option of another kind than any of a type's
        raise ValueError(f"{path}/{FILE_NAME} is damaged ({error}): restore it") from None


def load_tokenizer(checkpoint: str | Path) -> Tokenizer:
    """The tokenizer that a checkpoint carries, or else the one that its config names: a file, or one on the hub."""
    own = Path(checkpoint) / TOKENIZER_FILE
    name = str(own) if own.is_file() else read_checkpoint_config(checkpoint)["dataset"]["tokenizer"]["identifier"]
    data, _ = find_tokenizer(TokenizerSection(identifier=name))
    return parse_tokenizer(data, name)


def generate(
    checkpoint: Checkpoint,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    use_cache: bool = True,
    device: str | None = None,
) -> str:
    """Continue a prompt.

    :param temperature: 0 takes the likeliest token each time; otherwise tokens are drawn, from ``seed``.
    :raises ValueError: an empty or endless prompt, or a number that cannot be meant.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("--prompt is no UTF-8 text") from None
    if not 0 <= temperature <= 1000:
        raise ValueError(f"--temperature {temperature}: must lie between 0 and 1000")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed {seed}: must lie between 0 and 2**63 - 1")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    tokenizer = checkpoint.tokenizer()
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise ValueError("--prompt is empty: give at least one character")
    most = MOST_TOKENS * checkpoint.sequence_length
    if len(ids) + max_new_tokens > most:
        raise ValueError(
            f"--prompt of {len(ids)} tokens with --max-new-tokens {max_new_tokens} is more than {most}, {MOST_TOKENS} times "
            f"the length that {checkpoint.path} was trained with: shorten one of them"
        )
    module = checkpoint.load(device)
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


def _model(config: dict[str, Any], where: str) -> TransformerConfig:
    """The model of a ``config.json``; nothing is imported for it that is not trusted.

    :raises ValueError: it names other classes, or does not describe a model.
    """
    try:
        check_classes(config, "model")
        return TransformerConfig.from_dict(config)
    except Exception as error:  # the decoder raises types of its own for values that fit no field
        raise ValueError(f"{where}: {first_line(error)}") from error


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
    """Raise unless a checkpoint records the attention that it was trained with, and its config agrees."""
    stated, described = Fingerprint.read(path), Fingerprint.of(model)
    if stated is None:
        raise ValueError(
            f"checkpoint {path} does not say what attention it was trained with ({FILE_NAME} is missing): "
            "restore that file from the run's folder"
        )
    if stated != described:
        raise ValueError(
            f"checkpoint {path} contradicts itself: {FILE_NAME} states {stated}, config.json {described}; restore both files"
        )

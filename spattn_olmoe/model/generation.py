"""Text from a checkpoint, through OLMo-core's generation and its KV cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from olmo_core.generate.generation_module import GenerationConfig, TransformerGenerationModule
from olmo_core.nn.transformer import TransformerConfig
from tokenizers import Tokenizer

from ..data.config import TokenizerSection
from ..data.tokenizer import find_tokenizer, parse_tokenizer
from .remedies import apply_remedies

TOKENIZER_FILE = "tokenizer.json"


def read_checkpoint_config(checkpoint: str | Path) -> dict[str, Any]:
    """The experiment config that a checkpoint carries."""
    path = Path(checkpoint) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint does not say what model it is") from None


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

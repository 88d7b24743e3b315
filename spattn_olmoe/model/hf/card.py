"""The model card of an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import __version__
from ...machine import describe
from ...serving.modeling_spattn_olmoe import SPAttnOlmoeConfig
from ...text import inline
from ..checkpoint import Checkpoint


def model_card(checkpoint: Checkpoint, config: dict[str, Any], pictures: Sequence[str]) -> str:
    """``README.md``: what the model attends, how to load it, what it was trained on, and where it came from."""
    own = config["model_type"] == SPAttnOlmoeConfig.model_type
    trust = ", trust_remote_code=True" if own else ""
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [olmoe, mixture-of-experts, "
        f"{'spattention' if own else 'dense'}]\n---",
        f"# {inline(str(checkpoint.config.get('name', 'OLMoE')))}",
        f"An OLMoE of {config['num_hidden_layers']} layers, {config['hidden_size']} wide, {config['num_experts']} experts of "
        f"which a token takes {config['num_experts_per_tok']}, trained on sequences of {checkpoint.sequence_length} tokens.",
        "## Attention",
        _attention(checkpoint),
        *(f"![which keys each head attends]({picture})" for picture in pictures),
    ]
    if own:
        parts.append(
            "`attention_rules` in `config.json` holds the distances of every head. Only the code beside the weights computes "
            "them: dense attention on these weights is another model, so every other `attn_implementation` is refused. "
            f"Distances from {checkpoint.sequence_length} on were not seen in training."
        )
    parts += [
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})\n```",
        "## Training",
        _training(checkpoint),
    ]
    return "\n\n".join(parts) + "\n"


def _attention(checkpoint: Checkpoint) -> str:
    layers: dict[str, list[int]] = {}
    for i, layer in enumerate(checkpoint.layers):
        options = ", ".join(f"{key}: {inline(str(value))}" for key, value in layer.items() if key != "name")
        layers.setdefault(f"`{layer['name']}` ({options})", []).append(i)
    return "\n".join(f"- layers {', '.join(map(str, numbers))}: {words}" for words, numbers in layers.items())


def _training(checkpoint: Checkpoint) -> str:
    dataset = checkpoint.config["dataset"]
    sources = ", ".join(inline(str(path)) for path in dataset.get("paths") or []) or "not recorded"
    tokenizer = str(dataset["tokenizer"].get("identifier"))
    if tokenizer.endswith(".json"):  # a file of the training machine: here it lies beside the weights
        tokenizer = Path(tokenizer).name
    commit = describe("cpu")["commit"] or "unknown"
    return "\n".join(
        [
            f"- data: {sources}; tokenizer {inline(tokenizer)}",
            f"- checkpoint: {inline(Path(checkpoint.path).name)}",
            f"- exported by spattn_olmoe {__version__}, commit {commit}",
        ]
    )

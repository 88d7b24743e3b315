"""What ``scripts/analyze_heads.py`` does: statistics of checkpoints' heads on held-out text, as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation.loss import HeldOut
from ..model.checkpoint import Checkpoint
from ..patterns import attention_name
from ..tables import table
from ..text import inlined
from .figures import save_study
from .heads import DIVERSITIES, heads_figure, measure_heads, summary

_TOKENS = 4096  # of a batch


def main(
    folders: Sequence[str], out: str | Path, *, data: str | None = None, sequences: int = 32, length: int | None = None
) -> str:
    """Measure the heads of checkpoints on the same text; write ``heads.json``, ``heads.md``, ``heads.png``.

    :param data: prepared data; by default the first checkpoint's own.
    :param length: tokens of an input; by default the first checkpoint's length of training.
    :returns: the table.
    :raises ValueError: arguments that cannot be honoured, or checkpoints of other tokens than the text's.
    """
    for name, value in (("--sequences", sequences), ("--length", length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    checkpoints = [Checkpoint.open(folder) for folder in folders]
    text = HeldOut.read(checkpoints[0], data)
    ids = cut(text, length or checkpoints[0].sequence_length, sequences)
    found: dict[str, dict[str, Any]] = {}
    for checkpoint in checkpoints:
        HeldOut.read(checkpoint, text.directory, 1)  # raises where the text is of another tokenizer
        layers = list(checkpoint.layers)
        attention = attention_name(layers, layers[0]["follows_input"])
        module = checkpoint.load()
        batches = (batch.to(module.device) for batch in ids.split(max(1, _TOKENS // ids.shape[1])))
        heads = summary(measure_heads(module.model.eval(), batches))
        name = attention if attention not in found else f"{attention} ({checkpoint.path})"
        found[name] = {"checkpoint": checkpoint.path, **heads}
    results = {"data": text.directory, "sequences": len(ids), "definitions": DIVERSITIES, "checkpoints": found}
    page = markdown(results)
    save_study("heads", results, page, heads_figure(found), Path(out))
    return page


def cut(text: HeldOut, length: int, sequences: int) -> torch.Tensor:
    """The first sequences of a text at another length, int64 ``(sequences, length)``.

    :raises ValueError: it holds fewer.
    """
    ids = torch.from_numpy(text.ids).flatten()
    if len(ids) < sequences * length:
        raise ValueError(
            f"--sequences {sequences}: {text.directory} holds {len(ids) // length} held-out sequences of {length} tokens"
        )
    return ids[: sequences * length].view(sequences, length)


def markdown(results: dict[str, Any]) -> str:
    """The table, and what its columns are."""
    results = inlined(results)
    head = ["", "mean entropy", *DIVERSITIES]
    body = []
    for name, found in results["checkpoints"].items():
        body.append([name, f"{found['entropy']:.4f}", *(f"{x:.4f}" for x in found["diversity"].values())])
    lines = [
        f"Attention heads on {results['sequences']} held-out sequences of {results['data']}: entropy in nats, over queries "
        "that have a key, mean over heads and layers; diversity of a layer's heads, mean over layers.",
        "",
        table(head, body),
        "",
        *(f"- `{name}`: {text}" for name, text in results["definitions"].items()),
    ]
    return "\n".join(lines) + "\n"

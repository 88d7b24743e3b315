"""What is measured on held-out text, while a run trains and once it is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.loss import HeldOut, summarise, token_losses
from ..metrics import METRICS_FILE, read_metrics
from ..model.checkpoint import Checkpoint
from ..patterns import Pattern, build_pattern
from ..settings import read

_BATCH = 16
_DIGITS = 6  # of losses in nats: far below what seeds differ by
_SHORT = (8, 4, 2)  # prompts of so small a part of the length of training
SHORTEST = 8


def in_loop(config: Path, overrides: Sequence[str], interval: int) -> list[str]:
    """Overrides that measure the loss on the validation split beside the training data, before the first step and at every
    ``interval``."""
    paths = [_validation(path) for path in read(config, overrides)["dataset"]["paths"]]
    evaluator = "trainer.callbacks.lm_evaluator"
    return [
        *(f"{evaluator}.enabled=true", f"{evaluator}.eval_on_startup=true", f"{evaluator}.eval_interval={interval}"),
        f"{evaluator}.eval_dataset.paths=[{','.join(paths)}]",
    ]


def _validation(path: str) -> str:
    """The held-out shards beside training shards. The folder keeps its name, which may be train-web; it may be a URL."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.replace("train-", "validation-")


def curve(folder: Path) -> dict[int, float]:
    """Held-out loss (nats a token) of a run's folder by step, 0 before the first, as :func:`in_loop` measures it.

    :raises ValueError: it was not measured while the run trained, or the folder is gone.
    """
    file = folder / METRICS_FILE
    found = {
        step: value
        for step, metrics in (read_metrics(folder) if file.is_file() else {}).items()
        for key, value in metrics.items()
        if key.startswith("eval/lm/") and key.endswith("/CE loss")
    }
    if not found:
        raise ValueError(
            f"{file} has no held-out losses: remove {folder} and the run's file in results/, and run again"
        )
    return found


def measure(folder: Path) -> dict[str, Any]:
    """Held-out losses of a checkpoint, or of a run's newest one.

    ``held_out``: loss in total and by length of context, with every sequence's own mean. ``short_prompts``: mean loss of
    every sequence's beginning, with bands that stay as in training and with bands that follow the input's length.
    ``dead_rows``: the share of (head, query) rows without a key, of whole sequences and of their documents apart.
    """
    checkpoint = Checkpoint.open(folder)
    text = HeldOut.read(checkpoint)
    losses = token_losses(checkpoint, text, batch_size=_BATCH, quiet=True)
    rows = summarise(losses)
    for row in rows:
        row["sequences"] = [round(x, _DIGITS) for x in row["sequences"]]
    patterns = [build_pattern(**layer) for layer in checkpoint.layers]
    return {
        "attention": list(checkpoint.layers),
        "held_out": {
            "ids": hashlib.sha256(np.ascontiguousarray(text.ids).tobytes()).hexdigest(),
            "sequences": len(text.ids),
            "length": text.ids.shape[1],
            "rows": rows,
        },
        "short_prompts": _short_prompts(checkpoint, patterns, text, losses),
        "dead_rows": _dead_rows(patterns[0], text.ids, checkpoint.eos_token_id),
    }


def _short_prompts(
    checkpoint: Checkpoint, patterns: list[Pattern], text: HeldOut, losses: np.ndarray
) -> list[dict[str, Any]]:
    """Losses of the beginnings of sequences; empty where the mask does not depend on the length of the input."""
    length = text.ids.shape[1]
    if all(same_mask(pattern, replace(pattern, follows_input=True), length // _SHORT[0]) for pattern in patterns):
        return []
    following = checkpoint.with_follows_input(True)
    found = []
    for T in (length // part for part in _SHORT):
        if T < SHORTEST:
            continue
        short = token_losses(following, HeldOut(text.directory, text.ids[:, :T]), batch_size=_BATCH, quiet=True)
        # With bands as in training a token's loss does not depend on what follows, and has been measured.
        pair = {"train": losses[:, : T - 1].mean(1), "input": short.mean(1)}
        found.append({"length": T, **{key: [round(x, _DIGITS) for x in values] for key, values in pair.items()}})
    return found


def same_mask(a: Pattern, b: Pattern, T: int) -> bool:
    """Whether two patterns allow the same pairs in inputs of ``T`` tokens, whatever those are."""
    a, b = a.at_length(T), b.at_length(T)
    if a.follows_content or b.follows_content:
        return a == b
    tables = a.table, b.table
    if None not in tables:
        return _clipped(a, T) == _clipped(b, T)
    return bool((a.dense_mask(T) == b.dense_mask(T)).all())


def _clipped(pattern: Pattern, T: int) -> list[list[tuple[int, int]]]:
    table = pattern.table
    assert table is not None
    return [[(lo, min(hi, T)) for lo, hi in head if lo < min(hi, T)] for head in table]


def _dead_rows(pattern: Pattern, ids: np.ndarray, eos: int) -> dict[str, float]:
    """Shares of dead rows: documents attending one another, and each document by itself."""
    total = pattern.n_heads * ids.size
    apart = sum(pattern.dead_rows(T) for row in ids for T in document_lengths(row, eos))
    return {"sequences": pattern.dead_rows(ids.shape[1]) * len(ids) / total, "documents": apart / total}


def document_lengths(ids: np.ndarray, eos: int) -> list[int]:
    """Lengths of the documents in a sequence; each ends with ``eos``, but for the last where it is cut off."""
    ends = np.flatnonzero(ids == eos) + 1
    edges = np.unique(np.concatenate([[0], ends, [len(ids)]]))
    return np.diff(edges).tolist()

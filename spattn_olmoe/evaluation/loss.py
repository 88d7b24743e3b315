"""Held-out loss: cross-entropy on the validation split, in total and by what sets tokens apart.

By *context*: how many tokens stand before a token. By *repeat*: how far back the pair of the token before it and itself stood
last, which a model can copy from there (:mod:`.repeats`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import ranks
from ..data.manifest import Manifest, verify
from ..model.checkpoint import TOKENIZER_FILE, Checkpoint
from ..tables import FIRST_CONTEXT, context_label, interval, p_value, plus_minus, table
from ..text import inlined
from . import statistics
from .compare import NO_DIFFERENCE
from .repeats import repeat_distances

_LARGEST = math.log(sys.float_info.max)
"""Losses above it have a perplexity that no float holds."""


@dataclass(frozen=True)
class HeldOut:
    """Validation sequences, cut as training cuts them: whole sequences, shard by shard.

    :param ids: int64 ``(sequences, length)``.
    """

    directory: str
    ids: np.ndarray

    @classmethod
    def read(
        cls,
        checkpoint: Checkpoint,
        data: str | Path | None = None,
        limit: int | None = None,
        length: int | None = None,
    ) -> HeldOut:
        """The validation split of a checkpoint's data, or of other prepared data.

        :param length: tokens of a sequence; by default that of training.
        :raises ValueError: it is not there, holds no whole sequence, or was made with another tokenizer.
        """
        length = length or checkpoint.sequence_length
        if length < 2:
            raise ValueError(f"max_length={length}: a loss needs sequences of at least 2 tokens")
        tokenizer, own = checkpoint.config["dataset"]["tokenizer"], Path(checkpoint.path) / TOKENIZER_FILE
        directory = Path(data) if data is not None else _own_data(checkpoint)
        manifest = verify(
            directory,
            vocab_size=tokenizer["vocab_size"],
            eos_token_id=tokenizer["eos_token_id"],
            tokenizer=own if own.is_file() else None,
        )
        parts = [_sequences(path, manifest, length) for path in manifest.validation_paths]
        ids = np.concatenate(parts) if parts else np.empty((0, length), dtype=np.int64)
        if not len(ids):
            raise ValueError(
                f"{directory}: the validation split holds no whole sequence of {length} tokens: prepare more"
            )
        return cls(str(directory), ids[:limit])


def _own_data(checkpoint: Checkpoint) -> Path:
    paths = checkpoint.config["dataset"].get("paths") or []
    if not paths:
        raise ValueError(f"{checkpoint.path}/config.json names no data: give it with --data DIR")
    folder = Path(paths[0]).parent
    if not folder.is_dir():
        raise ValueError(
            f"{checkpoint.path} was trained on {folder}, which is not here: give the prepared data with --data DIR"
        )
    return folder


def _sequences(path: str, manifest: Manifest, length: int) -> np.ndarray:
    ids = np.fromfile(path, dtype=manifest.dtype).astype(np.int64)
    return ids[: len(ids) // length * length].reshape(-1, length)


def buckets(length: int) -> list[tuple[int, int]]:
    """Half-open ranges of context lengths, each twice as long as the one before: ``[1, 16), [16, 32) ... [, length)``."""
    edges = [1]
    edge = FIRST_CONTEXT
    while edge < length:
        edges.append(edge)
        edge *= 2
    return list(zip(edges, [*edges[1:], length], strict=True))


def check_documents(checkpoint: Checkpoint) -> None:
    """Raise a ValueError where a token sees its own document only, which distances in a sequence do not know."""
    if checkpoint.config["dataset"].get("generate_doc_lengths"):
        raise ValueError(
            f"{checkpoint.path} was trained with dataset.generate_doc_lengths=true, where a token sees its own document "
            "only: what is measured by position or distance does not know documents"
        )


def token_losses(
    checkpoint: Checkpoint, held_out: HeldOut, *, batch_size: int, device: str | None = None, quiet: bool = False
) -> np.ndarray:
    """Cross-entropy in nats of every token but the first: ``(sequences, length - 1)``, context lengths 1 to length - 1."""
    check_documents(checkpoint)
    module = checkpoint.load(device)

    @torch.inference_mode()
    def compute(start: int) -> list[np.ndarray]:
        ids = torch.from_numpy(held_out.ids[start : start + batch_size]).to(module.device)
        logits = module.model_forward(ids)[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return list(loss.view(len(ids), -1).double().cpu().numpy())

    starts = range(0, len(held_out.ids), batch_size)
    name = Path(checkpoint.path).parent.name
    return np.stack(list(ranks.share_out(starts, compute, description=name, quiet=quiet)))


def by_context(ids: np.ndarray) -> np.ndarray:
    """How many tokens stand before each token but the first: ``(sequences, length - 1)``."""
    return np.broadcast_to(np.arange(1, ids.shape[1]), (len(ids), ids.shape[1] - 1))


GROUPINGS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "context": ("tokens of context", by_context),
    "repeat": ("tokens back to the repeat", repeat_distances),
}
"""What ``--by`` takes: the heading of its column, and the number of every token but the first that it is grouped by."""


def summarise(losses: np.ndarray, numbers: np.ndarray | None = None, by: str = "context") -> list[dict[str, Any]]:
    """Of all tokens and of each group: mean loss, its standard error over sequences, perplexity, each sequence's mean.

    A sequence without a token of a group has no mean there; a group without a token has no row.

    :param losses: ``(sequences, length - 1)``.
    :param numbers: what tokens are grouped by, of the same shape, from one of :data:`GROUPINGS`; by default the context.
    """
    length = losses.shape[1] + 1
    numbers = by_context(np.empty((len(losses), length))) if numbers is None else numbers
    groups = [(span, (span[0] <= numbers) & (numbers < span[1])) for span in [(0, 1), *buckets(length)]]
    rows: list[dict[str, Any]] = []
    for (lo, hi), chosen in [((1, length), np.ones_like(numbers, dtype=bool)), *groups]:
        counts = chosen.sum(1)
        if not counts.any():
            continue
        means = np.where(chosen, losses, 0).sum(1)[counts > 0] / counts[counts > 0]
        value = float(means.mean())
        rows.append(
            {
                by: [lo, hi],
                "tokens": int(counts.sum()),
                "loss": value,
                "stderr": statistics.mean_stderr(means),
                "perplexity": math.exp(value) if value < _LARGEST else math.inf,
                "sequences": means.tolist(),
            }
        )
    return rows


def differences(a: list[dict[str, Any]], b: list[dict[str, Any]], by: str = "context") -> list[dict[str, Any]]:
    """Paired differences B minus A of two summaries over the same sequences; a lower loss is better."""
    rows: list[dict[str, Any]] = []
    for x, y in zip(a, b, strict=True):
        d = np.asarray(y["sequences"]) - np.asarray(x["sequences"])
        rows.append(
            {
                by: x[by],
                "difference": float(d.mean()),
                "stderr": statistics.mean_stderr(d),
                "interval": list(statistics.bootstrap_interval(d)),
                "p": statistics.sign_flip(d),
            }
        )
    for row, adjusted in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
        row["p_adjusted"] = adjusted
        lower = "B is lower" if row["difference"] < 0 else "A is lower"
        row["verdict"] = lower if adjusted < statistics.LEVEL else NO_DIFFERENCE
    return rows


def markdown(results: dict[str, Any]) -> str:
    """Losses of all checkpoints side by side, then each one's paired differences from the first."""
    results = inlined(results)
    runs = results["checkpoints"]
    by = results["by"]
    heading = GROUPINGS[by][0]
    head = [heading, *(f"{chr(65 + i)}: {run['attention_name']}" for i, run in enumerate(runs))]
    body = [[_label(row[by]), *(_loss(run["loss"][i]) for run in runs)] for i, row in enumerate(runs[0]["loss"])]
    if by == "repeat":  # how much text the rows are of: far repeats are few
        head.insert(1, "tokens")
        for line, row in zip(body, runs[0]["loss"], strict=True):
            line.insert(1, f"{row['tokens']:,}")
    total = ["perplexity, total", *([""] if by == "repeat" else [])]
    body.append([*total, *(f"{run['loss'][0]['perplexity']:.3f}" for run in runs)])
    text = [
        f"Held-out loss in nats per token, mean +- standard error over {results['sequences']} sequences of "
        f"{results['length']} tokens of {results['data']}",
        "",
        *(
            f"- {chr(65 + i)}: {run['checkpoint']}, follows_input={str(run['follows_input']).lower()}"
            for i, run in enumerate(runs)
        ),
        "",
        table(head, body, "l"),
    ]
    for i, run in enumerate(runs[1:], 1):
        letter = chr(65 + i)
        rows = [
            [
                _label(row[by]),
                f"{row['difference']:+.4f}",
                interval(row["interval"]),
                p_value(row["p_adjusted"]),
                row["verdict"].replace("B is", f"{letter} is"),
            ]
            for row in run["difference_from_first"]
        ]
        head = [heading, f"{letter} - A", "95 % interval", "p (Holm)", ""]
        text += ["", f"{letter} against A, paired over sequences:", "", table(head, rows, "l")]
    return "\n".join(text) + "\n"


def _label(span: Sequence[int]) -> str:
    return "no repeat" if tuple(span) == (0, 1) else context_label(span)


def _loss(row: dict[str, Any]) -> str:
    return plus_minus(row["loss"], row["stderr"])

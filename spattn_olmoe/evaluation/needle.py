"""A needle in held-out text: does a number that was written down earlier reach the place where it is asked for?

Into every held-out sequence go a line ``key: number`` and, at its end, the same key again; scored is the number after it. The
score is a *gain*: how many nats more likely the number is than where the line had held another one, all else equal. So a
model that answers badly still shows whether the line reaches it, and one that cannot see it gains exactly nothing.

Scores are by the distance from the last token of the question to the first of the number, which is what a head has to span,
at three places of every head's band. They are not averaged over distances: a mask is right at one and blind at the next.
Needles in text: Kamradt (2023), and RULER (arXiv 2404.06654).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from .. import ranks
from ..model.checkpoint import Checkpoint
from ..patterns.bands import band
from ..tables import plus_minus, table
from ..text import inlined
from . import statistics
from .loss import HeldOut

KEYS = ("Riga", "Oslo", "Lima", "Baku", "Cairo", "Delhi", "Hanoi", "Quito")
PLACES = (0.1, 0.5, 0.9)
"""Where in a band a needle lies, as parts of its width."""


@dataclass(frozen=True)
class Needle:
    """What goes into one sequence, in tokens.

    :param line: before the number; ``after``: after it. :param question: at the end of the text.
    :param number: the number that is asked for, and ``other``, as long, the one that the line holds in comparison.
    """

    line: list[int]
    after: list[int]
    question: list[int]
    number: list[int]
    other: list[int]

    def text(self, ids: np.ndarray, distance: int, number: list[int]) -> list[int]:
        """``ids`` with the needle, as long as before: the question's last token stands ``distance`` after the number's first."""
        last = len(ids) - len(self.number) - 1  # of the question
        first = last - distance - len(self.line)
        written = [*self.line, *number, *self.after]
        rest = last + 1 - len(self.question) - first - len(written)
        if first < 0 or rest < 0:
            raise ValueError(f"a needle {distance} tokens back does not fit into {len(ids)}")
        text = [*ids[:first], *written, *ids[first : first + rest], *self.question, *self.number]
        assert len(text) == len(ids)
        return text

    @property
    def nearest(self) -> int:
        """The smallest distance at which the line and the question do not overlap."""
        return len(self.number) + len(self.after) + len(self.question) - 1

    def farthest(self, length: int) -> int:
        """The largest distance in a text of so many tokens."""
        return length - len(self.number) - 1 - len(self.line)


def needles(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[Needle]:
    """``count`` needles, the same for every model with this tokenizer."""
    generator = np.random.default_rng(seed)
    made: list[Needle] = []
    while len(made) < count:
        key = KEYS[len(made) % len(KEYS)]
        number, other = (_encode(tokenizer, f" {n}") for n in generator.integers(1000, 10000, 2))
        if number != other and len(number) == len(other):
            asked = _encode(tokenizer, f"\n{key}:")
            made.append(Needle(asked, _encode(tokenizer, ".\n"), asked, number, other))
    return made


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def places(n_heads: int, band_length: int, made: list[Needle], length: int) -> list[tuple[int, float, int]]:
    """Head, part of its band, and distance, of every place where all needles fit.

    :raises ValueError: there is none.
    """
    low, high = max(n.nearest for n in made), min(n.farthest(length) for n in made)
    found: dict[int, tuple[int, float, int]] = {}
    for h in range(n_heads):
        start, width = band(n_heads, band_length, h)
        for part in PLACES:
            distance = start + int(part * width)
            if low <= distance <= high:
                found.setdefault(distance, (h, part, distance))
    if not found:
        raise ValueError(f"--needle: sequences of {length} tokens are too short for a line and a question about it")
    return list(found.values())


def gains(
    checkpoint: Checkpoint,
    held_out: HeldOut,
    made: list[Needle],
    distances: list[int],
    *,
    batch_size: int,
    device: str | None = None,
    quiet: bool = False,
) -> np.ndarray:
    """Nats that each sequence's number gains by having been written down: ``(sequences, distances)``."""
    module = checkpoint.load(device)

    @torch.inference_mode()
    def log_likelihoods(texts: list[list[int]], n_numbers: list[int]) -> list[float]:
        ids = torch.tensor(texts, device=module.device)
        logprobs = module.model_forward(ids)[:, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0].double()
        return [float(row[-n:].sum()) for row, n in zip(chosen, n_numbers, strict=True)]

    def compute(batch: list[tuple[int, int]]) -> list[float]:
        found = []
        for which in ("number", "other"):
            texts = [made[s].text(held_out.ids[s], d, getattr(made[s], which)) for s, d in batch]
            found.append(log_likelihoods(texts, [len(made[s].number) for s, _ in batch]))
        return [written - other for written, other in zip(*found, strict=True)]

    asked = [(s, d) for s in range(len(held_out.ids)) for d in distances]
    batches = [asked[i : i + batch_size] for i in range(0, len(asked), batch_size)]
    results = ranks.share_out(batches, compute, description="needles", quiet=quiet)
    return np.array(list(results)).reshape(len(held_out.ids), len(distances))


def summarise(found: np.ndarray, where: list[tuple[int, float, int]]) -> list[dict[str, Any]]:
    """A row for each distance: mean gain, its standard error and interval over sequences, each sequence's gain."""
    return [
        {
            "head": h,
            "part": part,
            "distance": distance,
            "gain": float(column.mean()),
            "stderr": statistics.mean_stderr(column),
            "interval": list(statistics.bootstrap_interval(column)) if len(column) > 1 else None,
            "sequences": column.tolist(),
        }
        for (h, part, distance), column in zip(where, found.T, strict=True)
    ]


def markdown(results: dict[str, Any]) -> str:
    """Gains of all checkpoints side by side, a row for each distance."""
    results = inlined(results)
    runs = results["checkpoints"]
    head = [
        "distance",
        "band of head",
        "part of it",
        *(f"{chr(65 + i)}: {r['attention_name']}" for i, r in enumerate(runs)),
    ]
    body = [
        [str(row["distance"]), str(row["head"]), f"{row['part']:g}", *(_gain(run["needle"][i]) for run in runs)]
        for i, row in enumerate(runs[0]["needle"])
    ]
    lines = [
        f"Needles: nats that a number gains by having been written down so many tokens before, mean +- standard error over "
        f"{results['sequences']} sequences of {results['length']} tokens of {results['data']}. Bands of {results['n_heads']} "
        f"heads over {results['band_length']} distances.",
        "",
        *(f"- {chr(65 + i)}: {run['checkpoint']}" for i, run in enumerate(runs)),
        "",
        table(head, body, "r"),
    ]
    return "\n".join(lines) + "\n"


def _gain(row: dict[str, Any]) -> str:
    return plus_minus(row["gain"], row["stderr"])

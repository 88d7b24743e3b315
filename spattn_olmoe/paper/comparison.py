"""Variants beside one another: means over seeds, and differences paired over seeds and held-out sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation import statistics
from ..evaluation.statistics import Crossed
from ..patterns import build_pattern
from .held_out import same_mask
from .runs import REFERENCE

Result = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The results of all runs of one model.

    :param results: by variant, in the order of seeds; all variants have the same seeds and held-out sequences.
    """

    model: str
    results: dict[str, list[Result]]

    @classmethod
    def of(cls, results: Sequence[Result]) -> list[Comparison]:
        """A comparison for each model among results.

        :raises ValueError: variants that have other seeds or other held-out sequences than the rest.
        """
        found: dict[str, dict[str, list[Result]]] = {}
        for result in sorted(results, key=lambda r: r["seed"]):
            found.setdefault(result["model"], {}).setdefault(result["variant"], []).append(result)
        for model, variants in found.items():
            seeds = {name: [r["seed"] for r in rs] for name, rs in variants.items()}
            text = {r["held_out"]["ids"] for rs in variants.values() for r in rs}
            if len({tuple(s) for s in seeds.values()}) > 1 or len(text) > 1:
                raise ValueError(
                    f"{model}: variants have different seeds ({seeds}) or held-out sequences: not comparable"
                )
        return [cls(model, variants) for model, variants in found.items()]

    @property
    def reference(self) -> str:
        """The variant that the others are compared with."""
        return REFERENCE if REFERENCE in self.results else next(iter(self.results))

    @property
    def seeds(self) -> int:
        """Seeds of each variant."""
        return len(next(iter(self.results.values())))

    @property
    def contexts(self) -> list[list[int]]:
        """Ranges of tokens of context, all of them first."""
        return [row["context"] for row in next(iter(self.results.values()))[0]["held_out"]["rows"]]

    def losses(self, variant: str, context: int = 0) -> np.ndarray:
        """Mean held-out loss of each seed and sequence, nats a token, ``(seeds, sequences)``."""
        return np.array([r["held_out"]["rows"][context]["sequences"] for r in self.results[variant]])

    def difference(self, variant: str, other: str | None = None, context: int = 0) -> Crossed:
        """A variant's held-out loss less another's (by default the reference's)."""
        return statistics.crossed(self.losses(variant, context) - self.losses(other or self.reference, context))

    def differences(self) -> dict[str, tuple[Crossed, float]]:
        """Every other variant's difference from the reference, and its p after Holm."""
        found = {name: self.difference(name) for name in self.results if name != self.reference}
        adjusted = statistics.holm([d.p for d in found.values()])
        return {name: (d, p) for (name, d), p in zip(found.items(), adjusted, strict=True)}

    def order(self, printed: Sequence[str]) -> list[tuple[str, str, Crossed, float]]:
        """Neighbours of an order from best to worst: both, the loss of the second less the first's, and p after Holm."""
        pairs = list(itertools.pairwise(printed))
        found = [self.difference(b, a) for a, b in pairs]
        adjusted = statistics.holm([d.p for d in found])
        return [(a, b, d, p) for (a, b), d, p in zip(pairs, found, adjusted, strict=True)]

    def twins(self) -> list[tuple[str, str, float]]:
        """Pairs of variants that have the same masks, with the largest difference of any loss of theirs."""
        found = []
        for a, b in itertools.combinations(self.results, 2):
            first, second = self.results[a][0], self.results[b][0]
            layers = zip(first["attention"], second["attention"], strict=True)
            length = first["held_out"]["length"]
            if all(same_mask(build_pattern(**x), build_pattern(**y), length) for x, y in layers):
                x, y = (np.array([r["training_loss"] for r in self.results[name]]) for name in (a, b))
                found.append((a, b, float(max(np.abs(x - y).max(), np.abs(self.losses(a) - self.losses(b)).max()))))
        return found

    def short_prompts(self, variant: str) -> list[tuple[int, float, float, Crossed]]:
        """By length of the prompt: mean loss with bands as in training, as the input is long, and the latter less the former."""
        found = []
        for rows in zip(*(r["short_prompts"] for r in self.results[variant]), strict=True):
            train, follows = (np.array([row[key] for row in rows]) for key in ("train", "input"))
            means = float(train.mean()), float(follows.mean())
            found.append((rows[0]["length"], *means, statistics.crossed(follows - train)))
        return found

"""Training a small model on a task, and what it recalls at each distance."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.transformer import Transformer, TransformerConfig
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...files import replace_file
from ...model import with_attention
from .tasks import IGNORED, Task

BANDS = 8
"""Ranges of distance that recall is reported by: those of eight equally wide bands, whatever the model's heads."""

PHASES = 4
"""Parts of a band that recall is reported by, nearest first: an average over a band hides where inside it recall fails."""

_HELD_OUT = 2**31 - 1  # a seed that no run has


@dataclass(frozen=True)
class Setting:
    """What is the same for all attention types of a comparison.

    The model is OLMo-core's transformer with pre-norm blocks, QK-norm and RoPE as in OLMoE, and a dense feed-forward in
    place of its experts: which expert a token gets would be one more thing to learn, and is not what is asked.

    :param steps: optimiser steps; ``eval_every``: steps between two measurements; ``eval_sequences``: fresh sequences of one.
    :param lr: peak of AdamW's learning rate; it rises over ``warmup`` steps and falls to a tenth along a cosine.
    """

    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 8
    hidden: int = 128
    batch: int = 32
    steps: int = 1000
    warmup: int = 50
    lr: float = 3e-3
    weight_decay: float = 0.1
    eval_every: int = 100
    eval_sequences: int = 512

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            whole = key not in ("lr", "weight_decay")
            kind = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < 2**31:
                raise ValueError(f"{key}={value!r}: must be a {'whole ' if whole else ''}number of at least 0")
            if not value and key not in ("warmup", "weight_decay"):
                raise ValueError(f"{key}={value!r}: must be more than 0")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(f"d_model={self.d_model}: must be a multiple of twice n_heads={self.n_heads}")

    def learning_rate(self, step: int) -> float:
        """Of step 1, 2, ..."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def build_config(setting: Setting, task: Task) -> TransformerConfig:
    """The model of a comparison before it is given an attention type."""
    return TransformerConfig.llama_like(
        d_model=setting.d_model,
        vocab_size=task.vocab_size,
        n_layers=setting.n_layers,
        n_heads=setting.n_heads,
        qk_norm=True,
        rope_theta=10_000,
        feed_forward=FeedForwardConfig(hidden_size=setting.hidden, bias=False),
    )


def build_model(
    setting: Setting, task: Task, attention: Mapping[str, Any], seed: int, device: str = "cpu"
) -> Transformer:
    """A model with one attention section; the same weights for every type at the same seed."""
    dense = build_config(setting, task)
    dense.init_seed = seed
    model = with_attention(dense, band_length=task.length, **attention).build(init_device=device)
    model.init_weights(max_seq_len=task.length, device=torch.device(device))
    return model


def train(
    setting: Setting,
    task: Task,
    attention: Mapping[str, Any],
    seed: int,
    *,
    state: Path | None = None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Train one model; its measurements over the steps.

    :param state: where the run keeps itself at every measurement, so that it can resume after an interruption.
    :returns: one entry per measurement: ``step``, ``loss`` (mean over the steps since the last), and what
        :func:`measure` gives.
    """
    model = build_model(setting, task, attention, seed, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.lr, betas=(0.9, 0.95), weight_decay=setting.weight_decay, fused=True
    )
    curve: list[dict[str, Any]] = []
    if state is not None and state.exists():
        try:
            saved = torch.load(state, weights_only=True, map_location=device)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            curve = saved["curve"]
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f"{state} is damaged ({type(error).__name__}): remove it") from error
    held_out = task.batch(_HELD_OUT, 0, setting.eval_sequences)
    losses: list[float] = []
    for step in range(curve[-1]["step"] + 1 if curve else 1, setting.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = setting.learning_rate(step)
        losses.append(_step(model, optimizer, task.batch(seed, step, setting.batch)))
        if step % setting.eval_every == 0 or step == setting.steps:
            curve.append(
                {"step": step, "loss": float(np.mean(losses)), **measure(model, task, held_out, device=device)}
            )
            losses.clear()
            if state is not None:
                _save(state, model, optimizer, curve)
    return curve


def _step(model: Transformer, optimizer: torch.optim.Optimizer, batch: tuple[np.ndarray, ...]) -> float:
    device = next(model.parameters()).device
    ids, labels = (torch.from_numpy(array).to(device) for array in batch[:2])
    loss = cross_entropy(model(ids).float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _save(state: Path, model: Transformer, optimizer: torch.optim.Optimizer, curve: list[dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}, buffer)
    state.parent.mkdir(parents=True, exist_ok=True)
    replace_file(state, buffer.getvalue())


@torch.no_grad()
def measure(
    model: Callable[[Tensor], Tensor],
    task: Task,
    held_out: tuple[np.ndarray, ...],
    at_once: int = 64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Accuracy and loss on fresh sequences, in total, by band of distance, and by phase inside the band.

    ``bands[b]`` and ``phases[p]`` are ``{"accuracy", "loss", "count"}``; accuracy counts the answers that are the most
    likely of all tokens. A cell that no answer falls into has None for both.
    """
    ids, labels, distances = held_out
    right, loss = [], []
    for start in range(0, len(ids), at_once):
        logits = model(torch.from_numpy(ids[start : start + at_once]).to(device)).float().cpu()
        target = torch.from_numpy(labels[start : start + at_once])
        asked = target != IGNORED
        right.append((logits[asked].argmax(-1) == target[asked]).numpy())
        loss.append(cross_entropy(logits[asked], target[asked], reduction="none").numpy())
    hit, nats, far = np.concatenate(right), np.concatenate(loss).astype(np.float64), distances[labels != IGNORED]
    band = np.minimum(far * BANDS // task.length, BANDS - 1)
    phase = far * BANDS * PHASES // task.length % PHASES
    return {
        **_cell(hit, nats),
        "bands": [_cell(hit[band == b], nats[band == b]) for b in range(BANDS)],
        "phases": [_cell(hit[phase == p], nats[phase == p]) for p in range(PHASES)],
    }


def _cell(hit: np.ndarray, nats: np.ndarray) -> dict[str, Any]:
    if not len(hit):
        return {"accuracy": None, "loss": None, "count": 0}
    return {"accuracy": float(hit.mean()), "loss": float(nats.mean()), "count": len(hit)}

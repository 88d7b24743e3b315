"""Runs side by side on one HTML page that needs no network: curves, masks, and what differs in their configs.

Runs of one attention type that differ in their seeds alone are drawn as one line with a band. What has not been measured
is left out: loss by position comes from ``evaluate.py --loss``, entropy of heads from ``analyze_heads.py``, recall from
``reproduce.py recall``.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from ..json_files import read_json
from ..metrics import METRICS_FILE, read_metrics
from ..model.fingerprint import FILE_NAME, Fingerprint
from ..patterns import Pattern, build_pattern
from ..patterns.variants import mask_name
from . import masks
from .loss_curves import LOSS

_STEP = re.compile(r"step(\d+)")
_SEEDS = ("init_seed", "seed")
_PLACES = (
    "trainer.save_folder",
    "trainer.work_dir",
    "dataset.work_dir",
    "data_loader.work_dir",
    "name",
    "trainer.callbacks",
)
"""Parts of a config that make no other experiment: where it is kept, and what it is called."""

_COLOURS = (
    "#1b4f9c",
    "#c2410c",
    "#15803d",
    "#7e22ce",
    "#b45309",
    "#0e7490",
    "#be123c",
    "#4d7c0f",
    "#475569",
    "#a21caf",
)


@dataclass(frozen=True)
class RunData:
    """What a run's folder tells, read as text: nothing of it is executed."""

    folder: Path
    metrics: dict[int, dict[str, float]]
    layers: list[dict[str, Any]]
    config: dict[str, Any]
    loss_by_position: list[dict[str, Any]] = field(default_factory=list)
    heads: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> RunData:
        """A run by its folder.

        :raises ValueError: it is not the folder of a run, or one of its files is damaged.
        """
        root = Path(folder)
        if not (root / METRICS_FILE).is_file():
            raise ValueError(f"{root / METRICS_FILE} does not exist: {root} is not the folder of a run")
        steps = sorted(
            root.glob("step*"), key=lambda path: int(found[1]) if (found := _STEP.fullmatch(path.name)) else -1
        )
        newest = steps[-1] if steps else root
        config = _json(newest / "config.json") or {}
        losses = _json(newest / "evaluation" / "loss.json", _LOSSES) or {}
        mine = [own for own in losses.get("checkpoints", []) if Path(own["checkpoint"]).resolve() == newest.resolve()]
        fingerprint = Fingerprint.read(str(root)) or Fingerprint.read(str(newest))
        if fingerprint is None:
            raise ValueError(f"{root / FILE_NAME} does not exist: the run's attention type is not known")
        return cls(
            root,
            read_metrics(root),
            list(fingerprint.layers),
            _flat(config),
            mine[0]["loss"] if mine else [],
            _json(root / "heads.json", {"checkpoints": {str: {"entropy": float}}}),
        )

    @property
    def attention(self) -> str:
        """Its masks' names, those of all layers where they differ."""
        names = []
        for layer in self.layers:
            options = {k: v for k, v in layer.items() if k not in ("name", "n_heads", "band_length", "head_order")}
            name = mask_name(layer["name"], options)
            if name not in names:
                names.append(name)
        return " + ".join(names)

    @property
    def patterns(self) -> list[Pattern]:
        """The different masks of its layers."""
        try:
            return list(dict.fromkeys(build_pattern(**layer) for layer in self.layers))
        except TypeError as error:  # an option of another kind than any of a type's
            raise ValueError(f"{self.folder / FILE_NAME} is damaged ({error}): restore it") from None

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of a step; None before the first checkpoint, which is what states it."""
        size = self.config.get("data_loader.global_batch_size")
        return size if isinstance(size, int) and size > 0 else None

    def series(self, wanted: Callable[[str], bool]) -> tuple[list[int], list[float]]:
        """Steps and values of the first metric that is wanted."""
        points = [
            (step, next((v for key, v in metrics.items() if wanted(key)), None))
            for step, metrics in self.metrics.items()
        ]
        there = [(x, y) for x, y in points if isinstance(y, (int, float))]
        return [x for x, _ in there], [float(y) for _, y in there]

    def experiment(self) -> dict[str, Any]:
        """Its config without seeds and places."""
        return {
            key: value
            for key, value in self.config.items()
            if key.rpartition(".")[2] not in _SEEDS and not any(f"{key}.".startswith(f"{place}.") for place in _PLACES)
        }


_LOSSES = {"checkpoints": [{"checkpoint": str, "loss": [{"context": [int], "loss": float}]}]}
_RECALL = {"types": {str: {"seeds": {str: {"curve": [{"bands": [{"accuracy": (float, None)}]}]}}}}}


def _json(path: Path, shape: Any = dict) -> dict[str, Any] | None:
    return read_json(path, shape) if path.is_file() else None


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    out: dict[str, Any] = {}
    for key, value in config.items():
        out.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return out


def write(folders: Sequence[str | Path], out: str | Path, *, recall: str | Path | None = None) -> Path:
    """Read the runs and write the page.

    :param recall: ``recall.json`` of ``reproduce.py recall``.
    :raises ValueError: a folder is no run's, or a file is damaged.
    """
    runs = [RunData.read(folder) for folder in folders]
    groups = group(runs)
    sections = [
        ("Runs", _table(_HEAD, (_row(run) for run in runs))),
        ("Training loss", _curves(groups, lambda key: key == LOSS, "nats per token")),
        ("Held-out loss", _curves(groups, _is_held_out, "nats per token")),
        ("Held-out loss by position", _positions(groups)),
        ("Recall by distance", _recall(recall)),
        ("Speed", _curves(groups, _is_speed, "tokens per second")),
        ("Memory", _curves(groups, _is_memory, "GiB")),
        ("Entropy of heads", _heads(groups)),
        ("Masks", _masks(runs)),
        ("What differs in the configs", _differences(runs)),
    ]
    body = "\n".join(f"<h2>{title}</h2>\n{content}" for title, content in sections if content)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PAGE.replace("{scripts}", get_plotlyjs()).replace("{body}", body))
    return path


def group(runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    """Runs that differ in seeds alone, together; by a name that tells the groups apart."""
    found: list[list[RunData]] = []
    for run in runs:
        for own in found:
            if own[0].attention == run.attention and own[0].experiment() == run.experiment():
                own.append(run)
                break
        else:
            found.append([run])
    alike: dict[str, list[list[RunData]]] = {}
    for own in found:
        alike.setdefault(own[0].attention, []).append(own)
    return {
        f"{name} ({label})" if label else name: own
        for name, groups in alike.items()
        for label, own in zip(_short([own[0].folder for own in groups]), groups, strict=True)
    }


def _short(folders: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells them apart, which for a single one is nothing."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    n = 0
    while len({own[-n:] if n else () for own in parts}) < len(parts):
        n += 1
    return [str(Path(*own[-n:])) if n else "" for own in parts]


def _is_held_out(key: str) -> bool:
    return key.startswith("eval/lm/") and key.endswith("CE loss")


def _is_speed(key: str) -> bool:
    return key == "throughput/device/TPS"


def _is_memory(key: str) -> bool:
    return key.startswith("gpu_memory/peak reserved")


# ---- figures ---------------------------------------------------------------------------------------------------------


def _curves(groups: dict[str, list[RunData]], wanted: Callable[[str], bool], unit: str) -> str:
    figure = go.Figure()
    in_tokens = all(run.tokens_per_step for runs in groups.values() for run in runs)
    for index, (name, runs) in enumerate(groups.items()):
        series = [run.series(wanted) for run in runs]
        common = sorted(set.intersection(*(set(x) for x, _ in series)))
        if common:
            points = [dict(zip(x, y, strict=True)) for x, y in series]
            values = np.array([[own[at] for at in common] for own in points])
            step = (runs[0].tokens_per_step or 1) if in_tokens else 1
            _line(figure, [at * step for at in common], values, name, _COLOURS[index % len(_COLOURS)])
    figure.update_layout(xaxis_title="tokens" if in_tokens else "steps", yaxis_title=unit)
    return _html(figure)


def _line(figure: go.Figure, x: Sequence[Any], values: np.ndarray, name: str, colour: str) -> None:
    """The mean over runs; with several, a band from the least to the most."""
    mode = "lines" if len(x) > 1 else "markers"
    label = escape(name) + (f", {len(values)} seeds" if len(values) > 1 else "")
    if len(values) > 1:
        edge = [*values.max(0), *values.min(0)[::-1]]
        figure.add_scatter(
            x=[*x, *x[::-1]], y=edge, fill="toself", fillcolor=colour, opacity=0.15, line_width=0, hoverinfo="skip",
            showlegend=False, legendgroup=label,
        )  # fmt: skip
    figure.add_scatter(
        x=list(x), y=values.mean(0).tolist(), name=label, mode=mode, line_color=colour, legendgroup=label
    )


def _positions(groups: dict[str, list[RunData]]) -> str:
    figure = go.Figure()
    for index, (name, runs) in enumerate(groups.items()):
        rows = [run.loss_by_position[1:] for run in runs if run.loss_by_position]
        if rows:
            contexts = [[tuple(row["context"]) for row in own] for own in rows]
            if any(own != contexts[0] for own in contexts) or any(len(context) != 2 for context in contexts[0]):
                raise ValueError(f"{name}: its loss.json has other ranges of context than another seed's")
            values = np.array([[row["loss"] for row in own] for own in rows])
            labels = [f"{lo} to {hi - 1}" for lo, hi in contexts[0]]
            _line(figure, labels, values, name, _COLOURS[index % len(_COLOURS)])
    figure.update_layout(xaxis_title="tokens of context", yaxis_title="nats per token")
    return _html(figure)


def _recall(path: str | Path | None) -> str:
    if path is None:
        return ""
    summary = _json(Path(path), _RECALL)
    if summary is None:
        raise ValueError(f"{path}: does not exist")
    figure = go.Figure()
    for index, (name, own) in enumerate(summary["types"].items()):
        ends = [seed["curve"][-1]["bands"] for seed in own["seeds"].values() if seed["curve"]]
        if not ends or not ends[0] or len({len(bands) for bands in ends}) > 1:
            raise ValueError(f"{path}: {name} has no seed, or seeds of other bands")
        values = np.array([[cell["accuracy"] for cell in bands] for bands in ends], float)
        mean = values.mean(0)
        spread = {"array": (values.max(0) - mean).tolist(), "arrayminus": (mean - values.min(0)).tolist()}
        figure.add_bar(
            x=[f"band {b}" for b in range(values.shape[1])], y=mean.tolist(), name=escape(name), error_y=spread,
            marker_color=_COLOURS[index % len(_COLOURS)],
        )  # fmt: skip
    figure.update_layout(yaxis_title="accuracy", barmode="group")
    return _html(figure)


def _heads(groups: dict[str, list[RunData]]) -> str:
    rows = [
        (name, f"{found['entropy']:.4f}")
        for runs in groups.values()
        for run in runs
        if run.heads
        for name, found in run.heads["checkpoints"].items()
    ]
    return _table(("checkpoint", "mean entropy (nats)"), dict.fromkeys(rows)) if rows else ""


def _html(figure: go.Figure) -> str:
    """A figure as a fragment, empty where nothing is drawn. Its id is fixed by its place, so that pages repeat."""
    if not figure.data:
        return ""
    figure.update_layout(template="plotly_white", height=420, margin={"t": 20, "r": 20}, hovermode="x unified")
    return to_html(figure, include_plotlyjs=False, full_html=False, default_width="100%")


def _masks(runs: Sequence[RunData]) -> str:
    patterns = dict.fromkeys(pattern for run in runs for pattern in run.patterns)
    images = []
    for pattern in patterns:
        buffer = io.BytesIO()
        masks.draw(pattern).savefig(buffer, format="png", dpi=72)
        data = base64.b64encode(buffer.getvalue()).decode()
        images.append(f'<img alt="{escape(str(pattern), quote=True)}" src="data:image/png;base64,{data}">')
    return "\n".join(images)


# ---- tables ----------------------------------------------------------------------------------------------------------

_HEAD = ("run", "attention", "steps", "tokens", "training loss", "held-out loss", "tokens/s (median)")


def _row(run: RunData) -> tuple[str, ...]:
    steps = max(run.metrics, default=0)
    _, losses = run.series(lambda key: key == LOSS)
    _, held_out = run.series(_is_held_out)
    _, speed = run.series(_is_speed)
    return (
        str(run.folder),
        run.attention,
        f"{steps:,}",
        f"{steps * run.tokens_per_step:,}" if run.tokens_per_step else "",
        f"{losses[-1]:.4f}" if losses else "",
        f"{held_out[-1]:.4f}" if held_out else "",
        f"{np.median(speed):,.0f}" if speed else "",
    )


def _differences(runs: Sequence[RunData]) -> str:
    keys = sorted(set().union(*(run.config for run in runs)))
    different = [key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1]
    rows = [(key, *(json.dumps(run.config.get(key)) for run in runs)) for key in different]
    return _table(("key", *(str(run.folder) for run in runs)), rows) if rows else "<p>Nothing.</p>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Runs side by side</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1f2933; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #d9e2ec; padding: 0.25rem 0.75rem; text-align: left; }
img { max-width: 100%; }
</style>
<script>{scripts}</script>
</head>
<body>
<h1>Runs side by side</h1>
{body}
</body>
</html>
"""

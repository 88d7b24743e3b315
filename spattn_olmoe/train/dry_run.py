"""What a run would be, before it costs anything: the ``--dry-run`` of ``scripts/train.py``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import yaml
from olmo_core.train.common import DurationUnit
from rich.console import Console
from rich.table import Table

from ..model.flops import flops_per_token
from ..model.section import layer_patterns, unread_options
from ..model.stack import Stack
from ..patterns import Pattern, attention_name, causal_pairs, variant_of
from ..patterns.head_order import imbalance
from ..settings import first_line
from .config import ExperimentConfig
from .shards import data_tokens


def dry_run(config: ExperimentConfig, console: Console | None = None) -> None:
    """Print what a run computes, as tables. Builds the model on the meta device only."""
    console = console or Console()
    model = config.model_with_attention()
    patterns = list(layer_patterns(model))
    console.print(run_table(config))
    console.print(
        attention_table(
            patterns, config.sequence_length, unread_options(config.attention), ranks=config.ranks_per_layer
        )
    )


def resolved(config: ExperimentConfig) -> str:
    """The whole config with every default in it, as YAML."""
    plain = json.loads(json.dumps(config.as_config_dict()))  # enums become the text they stand for
    return yaml.safe_dump(plain, sort_keys=False)


def in_a_line(config: ExperimentConfig) -> str:
    """What a run trains, on what, and where to: for the head of its output."""
    model, T = config.model_with_attention(), config.sequence_length
    patterns = list(layer_patterns(model))
    share = sum(p.attended_pairs(T) for p in patterns) / sum(p.n_heads * causal_pairs(T) for p in patterns)
    mask = attention_name([p.to_config() for p in patterns], any(p.follows_input for p in patterns))
    return (
        f"{config.name}: {short(model.num_params)} parameters, {short(model.num_active_params)} active; "
        f"{mask} attends {share:.1%} of dense's pairs; {tokens(config)} tokens, {epochs(config)}; "
        f"everything goes to {config.trainer.save_folder}"
    )


def run_table(config: ExperimentConfig) -> Table:
    """Parameters, FLOPs and tokens of a run."""
    model = config.model_with_attention()
    T = config.sequence_length
    flops = flops_per_token(model.build(init_device="meta"), T)
    table = Table("", "", title=config.name, show_header=False, min_width=100)
    table.add_row("parameters", f"{model.num_params:,} ({short(model.num_params)})")
    table.add_row("active parameters", f"{model.num_active_params:,} ({short(model.num_active_params)})")
    table.add_row("FLOPs per token", f"{flops.total:,} (as if attention were dense: {flops.dense:,})")
    table.add_row(
        "attention's share of them",
        f"{flops.attention / flops.total:.1%}, projections not counted (dense: "
        f"{(flops.dense - flops.total + flops.attention) / flops.dense:.1%})",
    )
    table.add_row("tokens", tokens(config))
    table.add_row("data", epochs(config))
    for row in stack_rows(config):
        table.add_row(*row)
    table.add_row("save folder", config.trainer.save_folder)
    return table


def stack_rows(config: ExperimentConfig) -> list[tuple[str, str]]:
    """How the stack ``ddp`` differs from v1; nothing for v1."""
    if config.stack != Stack.ddp:
        return []
    block, ep = config.model.block, config.ddp.ep
    moe = getattr(block, "feed_forward_moe", None)
    layers = config.model.n_layers if moe is not None and moe.scale_loss_by_num_layers else 1
    weights = [
        f"{name} {value / layers:.3g}"
        for name, value in (
            ("load balancing", moe.lb_loss_weight if moe is not None else None),
            ("router z", moe.z_loss_weight if moe is not None else None),
        )
        if value is not None
    ]
    if config.train_module.ep_config is None:
        exchange = "none: every token reaches its experts"
    elif config.ddp.may_drop_tokens:
        exchange = (
            f"{ep.path}: MAY DROP TOKENS of a rank that is sent more than {ep.capacity_factor} times its even share "
            "(ddp.ep.capacity_factor); sync_1d drops none"
        )
    else:
        exchange = f"{ep.path}: every token reaches its experts"
    return [
        ("stack", "ddp (OLMoDDP): bfloat16, float32 masters; see docs/olmo_ddp.md"),
        (
            "losses of a layer's router",
            ", ".join(weights) + (f": the config's over {layers} layers" if layers > 1 else ""),
        ),
        ("expert parallelism", exchange),
    ]


def attention_table(patterns: list[Pattern], T: int, ignored: tuple[str, ...], *, ranks: int = 1) -> Table:
    """Each attention pattern of a model: options, attended pairs and dead rows for inputs of ``T`` tokens.

    :param ranks: how many ranks share the heads of a layer.
    """
    kinds = Counter(patterns)
    table = Table("attention", *(variant_of(p.name, p.options).name for p in kinds), min_width=100)
    dense = {pattern: pattern.n_heads * causal_pairs(T) for pattern in kinds}
    rows: dict[str, Callable[[Pattern], str]] = {
        "layers": lambda p: str(kinds[p]),
        "options": lambda p: ", ".join(f"{key}={value}" for key, value in p.options.items()),
        "band length N": lambda p: f"{p.band_length:,}",
        f"attended pairs at T={T:,}": lambda p: (
            f"{p.attended_pairs(T):,} of {dense[p]:,} ({p.attended_pairs(T) / dense[p]:.2%})"
            + (" expected of random content, at most all: FLOPs are computed from it" if p.follows_content else "")
        ),
        "dead rows": lambda p: f"{p.dead_rows(T):,} of {p.n_heads * T:,} ({p.dead_rows(T) / (p.n_heads * T):.2%})",
    }
    if ranks > 1:
        rows[f"busiest of {ranks} ranks"] = lambda p: (
            f"{imbalance(p.attended_pairs_per_head(T), ranks):.3f} times the mean of their pairs"
        )
    for name, value in rows.items():
        table.add_row(name, *(value(pattern) for pattern in kinds))
    table.caption = (
        f"{patterns[0].n_heads} heads a layer. A dead row is a (head, query) without any key: its output is zero. "
        "Documents are not considered." + (f" Not read by this type: {', '.join(ignored)}." if ignored else "")
    )
    return table


def tokens(config: ExperimentConfig) -> str:
    """The length of a run in words."""
    duration, batch = config.trainer.max_duration, config.data_loader.global_batch_size
    if duration.unit == DurationUnit.steps:
        return f"{duration.value:,} steps x {batch:,} = {short(duration.value * batch)}"
    if duration.unit == DurationUnit.tokens:
        return f"{short(duration.value)} in steps of {batch:,}"
    return f"{duration.value} epochs in steps of {batch:,}"


def epochs(config: ExperimentConfig) -> str:
    """How often a run sees its data, in words: a run that has too few goes through them again, and nobody else says so."""
    try:
        there = data_tokens(config)
    except (ValueError, OSError) as error:
        return f"none yet: {first_line(error)}"
    duration, batch = config.trainer.max_duration, config.data_loader.global_batch_size
    if there is None:
        return "as many epochs as that is: the files have no manifest"
    if duration.unit == DurationUnit.epochs:
        return f"epochs of {short(there)} tokens"
    if there < batch:
        return f"{short(there)} tokens, less than one batch: the run will be refused"
    seen = duration.value * (batch if duration.unit == DurationUnit.steps else 1)
    return f"{seen / (there // batch * batch):.2f} epochs of {short(there)} tokens"


def short(n: int) -> str:
    """A count in words: 6.92 B."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= factor:
            return f"{n / factor:.2f} {unit}"
    return str(n)

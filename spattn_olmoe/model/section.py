"""The ``attention:`` section of a config, and a model config with that attention in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerConfig

from ..errors import nearest
from ..patterns import Pattern, available_patterns, build_pattern, pattern_options
from ..patterns.head_order import BALANCED, NATURAL
from .mixer import PatternAttentionConfig

BASELINE = "standard"
"""The type of layers that ``attention.layers`` leaves out."""

AUTO = "auto"
"""The value of ``attention.head_order`` that leaves it to the layout, or to the checkpoint that a run goes on from."""

_SECTION = ("type", "band_length", "impl", "layers")


@dataclass(frozen=True)
class AttentionPlan:
    """An ``attention:`` section, checked.

    :param type: attention type.
    :param options: the options that this type reads.
    :param ignored: options that the section states and only other types read.
    :param band_length: band length ``N``.
    :param impl: how attention is computed.
    :param layers: the layers that have this type; None means all.
    """

    type: str
    options: dict[str, Any]
    ignored: tuple[str, ...]
    band_length: int
    impl: str
    layers: tuple[int, ...] | None

    def pattern(self, n_heads: int) -> Pattern:
        """The pattern at a number of heads."""
        return build_pattern(self.type, n_heads=n_heads, band_length=self.band_length, **self.options)


def plan_attention(section: Mapping[str, Any], *, band_length: int, ranks: int = 1) -> AttentionPlan:
    """Check an ``attention:`` section.

    Keys are ``type``, ``band_length`` (band length, by default the length of training), ``impl``, ``layers`` and the
    options of any attention type: those of other types are allowed and not read, so that one base config serves all.
    ``head_order: auto`` is ``balanced`` where several ranks share a layer's heads and ``natural`` elsewhere.

    :param ranks: ranks that share the heads: the degrees of tensor and context parallelism, multiplied.

    :raises ValueError: a key that no type knows, or a value that does not fit.
    """
    type_ = section.get("type", BASELINE)
    if not isinstance(type_, str):
        raise ValueError(f"attention.type={type_!r}: must be a name (known: {', '.join(available_patterns())})")
    reads = pattern_options(type_)
    by_other_types = {option for name in available_patterns() for option in pattern_options(name)}
    known = {*_SECTION, *reads, *by_other_types}
    for key in section:
        if key not in known:
            raise ValueError(
                f"attention.{key} is not a key of the attention section{nearest(str(key), known)} "
                f"(known: {', '.join(sorted(known))})"
            )
    options = {key: section[key] for key in reads if section.get(key) is not None}
    if options.get("head_order", AUTO) == AUTO:
        options["head_order"] = BALANCED if ranks > 1 else NATURAL
    ignored = tuple(sorted(key for key in section if key not in (*_SECTION, *reads)))
    N = section.get("band_length")
    return AttentionPlan(
        type=type_,
        options=options,
        ignored=ignored,
        band_length=band_length if N is None else N,
        impl=section.get("impl") or "auto",
        layers=_layers(section.get("layers")),
    )


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == "all":
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        raise ValueError(f"attention.layers={value!r}: must be 'all' or a list of layer numbers such as [0,2]")
    return tuple(sorted(set(value)))


def with_attention(model: TransformerConfig, *, band_length: int, **section: Any) -> TransformerConfig:
    """A copy of a model config that attends as an ``attention:`` section says.

    :param band_length: band length ``N``: the sequence length of training.
    :param section: ``type``, ``impl``, ``layers`` and options, as in the YAML: ``type="spattention", local_sharing=True``.
    :raises ValueError: the section is wrong, or the model has no OLMo-core attention to replace.
    """
    return attach(model, plan_attention(section, band_length=band_length))


def attach(model: TransformerConfig, plan: AttentionPlan) -> TransformerConfig:
    """:func:`with_attention` for a section that has been checked."""
    block = model.block
    if not isinstance(block, TransformerBlockConfig):
        raise ValueError("model.block must be one block for all layers: named blocks are not supported")
    chosen = range(model.n_layers) if plan.layers is None else plan.layers
    for layer in chosen:
        if not 0 <= layer < model.n_layers:
            raise ValueError(f"attention.layers has {layer} but the model has layers 0 to {model.n_layers - 1}")

    baseline = replace(plan, type=BASELINE, options={k: v for k, v in plan.options.items() if k == "follows_input"})
    model = copy.deepcopy(model)
    overrides = dict(model.block_overrides or {})
    for layer, own in overrides.items():
        overrides[layer] = _with_mixer(own, plan if layer in chosen else baseline, model.d_model)
    for layer in range(model.n_layers):
        if layer not in chosen and layer not in overrides:
            overrides[layer] = _with_mixer(block, baseline, model.d_model)
    return replace(model, block=_with_mixer(block, plan, model.d_model), block_overrides=overrides or None)


def _with_mixer(block: TransformerBlockConfig, plan: AttentionPlan, d_model: int) -> TransformerBlockConfig:
    dense = block.sequence_mixer
    if not isinstance(dense, AttentionConfig):
        raise ValueError(
            f"model.block.sequence_mixer is a {type(dense).__name__}: attention types replace OLMo-core's attention only"
        )
    if dense.head_dim is None and d_model % dense.n_heads:
        raise ValueError(
            f"model.d_model={d_model} must be a multiple of model.block.sequence_mixer.n_heads={dense.n_heads}"
        )
    shared = {f.name: copy.deepcopy(getattr(dense, f.name)) for f in fields(AttentionConfig)}
    mixer = PatternAttentionConfig(
        **shared, pattern=plan.type, pattern_options=dict(plan.options), band_length=plan.band_length, impl=plan.impl
    )
    mixer.validate()
    pattern = mixer.build_pattern()
    if (
        "head_order" in mixer.pattern_options
    ):  # the permutation: checkpoints must not depend on what "balanced" makes of it
        mixer.pattern_options["head_order"] = pattern.to_config()["head_order"]
    out = copy.deepcopy(block)
    out.sequence_mixer = mixer
    return out


def with_follows_input(model: TransformerConfig, follows_input: bool) -> TransformerConfig:
    """A copy of a model config with patterns, whose bands follow the input's length, or do not.

    :raises ValueError: a layer has no pattern.
    """
    model = copy.deepcopy(model)
    assert isinstance(model.block, TransformerBlockConfig)
    for block in (model.block, *(model.block_overrides or {}).values()):
        if isinstance(block.sequence_mixer, PatternAttentionConfig):
            block.sequence_mixer.pattern_options["follows_input"] = follows_input
    for pattern in layer_patterns(model):
        assert pattern.follows_input == follows_input
    return model


def layer_patterns(model: TransformerConfig) -> Iterator[Pattern]:
    """The pattern of every layer of a model config that has them."""
    assert isinstance(model.block, TransformerBlockConfig)
    for layer in range(model.n_layers):
        block = (model.block_overrides or {}).get(layer, model.block)
        mixer = block.sequence_mixer
        if not isinstance(mixer, PatternAttentionConfig):
            raise ValueError(f"layer {layer} has no attention pattern but a {type(mixer).__name__}")
        yield mixer.build_pattern()

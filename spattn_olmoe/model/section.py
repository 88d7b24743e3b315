"""The ``attention:`` section of a config, and a model config with that attention in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerConfig

from ..errors import nearest
from ..patterns import Pattern, available_patterns, pattern_options
from ..patterns.head_order import BALANCED, NATURAL
from .mixer import PatternAttentionConfig, stored

BASELINE = "standard"
"""The type of layers that ``attention.layers`` leaves out."""

AUTO = "auto"
"""The value of ``attention.head_order`` that leaves it to the layout, or to the checkpoint that a run resumes from."""

HYBRIDS: dict[str, Callable[[int, int], Sequence[int]]] = {
    "dense_first": lambda n, quarter: range(quarter),
    "dense_last": lambda n, quarter: range(n - quarter, n),
    "dense_interleaved": lambda n, quarter: range(min(3, n - 1), n, 4),
}
"""Values of ``attention.layers`` that keep a quarter of the layers dense, at least one: which ones, of ``n`` layers.

Retrieval is reported to live in a few dense layers (S2-Attention, arXiv 2407.17678), so hybrids are the usual remedy."""

_SECTION = ("type", "band_length", "impl", "layers")


def attach(
    model: TransformerConfig, section: Mapping[str, Any], *, band_length: int, ranks: int = 1
) -> TransformerConfig:
    """A copy of a model config that attends as an ``attention:`` section states.

    Keys are ``type``, ``band_length``, ``impl``, ``layers`` and the options of any attention type: those of other types
    are allowed and not read (:func:`unread_options`), so that one base config serves all. ``head_order: auto`` is
    ``balanced`` where several ranks share a layer's heads and ``natural`` elsewhere.

    :param band_length: the band length ``N`` where the section states none: the sequence length of training.
    :param ranks: ranks that share the heads: the degrees of tensor and context parallelism, multiplied.
    :raises ValueError: a key that no type knows, a value that does not fit, or a model without an OLMo-core
        attention to replace.
    """
    check_section(section)
    block = model.block
    if not isinstance(block, TransformerBlockConfig):
        raise ValueError("model.block must be one block for all layers: named blocks are not supported")
    chosen = _layers(section.get("layers"), model.n_layers)
    # Layers that are not chosen share everything that is not the type's own: length, rule and implementation.
    shared = {key: section.get(key) for key in ("band_length", "follows_input", "impl")}

    def attending(block: TransformerBlockConfig, *, is_chosen: bool) -> TransformerBlockConfig:
        mixer = mixer_config(
            block.sequence_mixer,
            section if is_chosen else {**shared, "type": BASELINE},
            d_model=model.d_model,
            band_length=band_length,
            ranks=ranks,
        )
        return replace(copy.deepcopy(block), sequence_mixer=mixer)

    overrides = {
        layer: attending(own, is_chosen=layer in chosen) for layer, own in (model.block_overrides or {}).items()
    }
    for layer in range(model.n_layers):
        if layer not in chosen and layer not in overrides:
            overrides[layer] = attending(block, is_chosen=False)
    return replace(copy.deepcopy(model), block=attending(block, is_chosen=True), block_overrides=overrides or None)


def with_attention(model: TransformerConfig, *, band_length: int, **section: Any) -> TransformerConfig:
    """:func:`attach` for Python: ``with_attention(model, band_length=4096, type="spattention", local_sharing=True)``."""
    return attach(model, section, band_length=band_length)


def mixer_config(
    dense: SequenceMixerConfig, section: Mapping[str, Any], *, d_model: int, band_length: int, ranks: int = 1
) -> PatternAttentionConfig:
    """The mixer of a section: a layer's own attention with the section's pattern in it. Parameters as :func:`attach`.

    The pattern is stored as it was built, ``balanced`` and defaults spelled out, so that old checkpoints stay valid if
    :func:`.balanced_order` or a default changes.
    """
    if not isinstance(dense, AttentionConfig):
        raise ValueError(
            f"model.block.sequence_mixer is a {type(dense).__name__}: attention types replace OLMo-core's attention only"
        )
    if dense.head_dim is None and d_model % dense.n_heads:
        raise ValueError(
            f"model.d_model={d_model} must be a multiple of model.block.sequence_mixer.n_heads={dense.n_heads}"
        )
    name = section.get("type", BASELINE)
    options = {key: section[key] for key in pattern_options(name) if section.get(key) is not None}
    if options.get("head_order", AUTO) == AUTO:
        options["head_order"] = BALANCED if ranks > 1 else NATURAL
    stated = section.get("band_length")
    mixer = PatternAttentionConfig(
        **{f.name: copy.deepcopy(getattr(dense, f.name)) for f in fields(AttentionConfig)},
        pattern={"name": name, "band_length": band_length if stated is None else stated, **options},
        impl="auto" if section.get("impl") is None else section["impl"],
    )
    mixer.validate()
    return replace(mixer, pattern=stored(mixer.build_pattern()))


def check_section(section: Mapping[str, Any]) -> None:
    """Raise a ValueError for a key that no type knows, naming the nearest, and for an unknown type."""
    name = section.get("type", BASELINE)
    if not isinstance(name, str):
        raise ValueError(f"attention.type={name!r}: must be a name (known: {', '.join(available_patterns())})")
    reads = pattern_options(name)
    known = {*_SECTION, *reads, *(option for other in available_patterns() for option in pattern_options(other))}
    for key in section:
        if key not in known:
            raise ValueError(
                f"attention.{key} is not a key of the attention section{nearest(str(key), known)} "
                f"(known: {', '.join(sorted(known))})"
            )


def unread_options(section: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that a section states and only types other than its own read."""
    reads = pattern_options(section.get("type", BASELINE))
    return tuple(sorted(key for key in section if key not in (*_SECTION, *reads)))


def _layers(value: Any, n_layers: int) -> Sequence[int]:
    """The layers that ``attention.layers`` chooses."""
    if value is None or value == "all":
        return range(n_layers)
    if isinstance(value, str) and value in HYBRIDS:
        dense = HYBRIDS[value](n_layers, max(1, n_layers // 4))
        return [layer for layer in range(n_layers) if layer not in dense]
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        near = nearest(value, ["all", *HYBRIDS]) if isinstance(value, str) else ""
        raise ValueError(
            f"attention.layers={value!r}: must be 'all', a hybrid ({', '.join(HYBRIDS)}) or a list of layer numbers such as "
            f"[0,2]{near}"
        )
    for layer in value:
        if not 0 <= layer < n_layers:
            raise ValueError(f"attention.layers has {layer} but the model has layers 0 to {n_layers - 1}")
    return value


def with_follows_input(model: TransformerConfig, follows_input: bool) -> TransformerConfig:
    """A copy of a model config with patterns, whose bands follow the input's length, or do not.

    :raises ValueError: a layer has no pattern.
    """
    model = copy.deepcopy(model)
    assert isinstance(model.block, TransformerBlockConfig)
    for block in (model.block, *(model.block_overrides or {}).values()):
        if isinstance(block.sequence_mixer, PatternAttentionConfig):
            block.sequence_mixer.pattern["follows_input"] = follows_input
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

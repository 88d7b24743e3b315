"""The ``attention:`` section, and model configs with it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from olmo_core.nn.transformer import TransformerConfig

from benchmarks.tiny import HEADS, T, tiny
from spattn_olmoe import build_pattern
from spattn_olmoe.model import PatternAttentionConfig, apply_remedies, attach, with_attention
from spattn_olmoe.model.fingerprint import Fingerprint
from spattn_olmoe.model.section import layer_patterns, unread_options


@pytest.fixture(scope="module")
def model():
    return tiny("model.n_layers=4").model


def names(model) -> list[str]:
    return [pattern.name for pattern in layer_patterns(model)]


def refused(call, *said: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


# ---- model configs ---------------------------------------------------------------------------------------------------


def test_every_layer_gets_the_type_its_options_and_the_band_length(model):
    ours = with_attention(model, band_length=48, type="spattention", local_sharing=True, impl="reference")
    expected = build_pattern("spattention", n_heads=HEADS, band_length=48, local_sharing=True)
    assert list(layer_patterns(ours)) == [expected] * 4
    built = ours.build(init_device="meta")
    assert [built.blocks[str(i)].attention.pattern for i in range(4)] == [expected] * 4
    assert built.blocks["0"].attention.backend.impl == "reference"
    assert ours.num_params == model.num_params
    assert ours.num_active_params == model.num_active_params


def test_the_model_given_stays_as_it_is(model):
    before = copy.deepcopy(model)
    with_attention(model, band_length=T, type="eball", layers=[1])
    assert model == before


def test_the_rest_of_the_mixer_stays(model):
    model = copy.deepcopy(model)
    model.block.sequence_mixer.clip_qkv = 7.5
    model.block.sequence_mixer.n_kv_heads = 2
    mixer = with_attention(model, band_length=T, type="eball").block.sequence_mixer
    assert isinstance(mixer, PatternAttentionConfig)
    assert (mixer.clip_qkv, mixer.n_kv_heads) == (7.5, 2)
    assert mixer.rope == model.block.sequence_mixer.rope
    assert mixer.qk_norm == model.block.sequence_mixer.qk_norm


def test_layers_that_are_not_listed_are_standard(model):
    ours = with_attention(model, band_length=T, type="gbhalf", layers=[3, 1, 3])
    assert names(ours) == ["standard", "gbhalf", "standard", "gbhalf"]
    built = ours.build(init_device="meta")
    assert [built.blocks[str(i)].attention.pattern.name for i in range(4)] == names(ours)


def test_no_layers_is_a_dense_model(model):
    assert names(with_attention(model, band_length=T, type="gbhalf", layers=[])) == ["standard"] * 4


def test_layers_that_are_not_listed_keep_the_band_length_rule(model):
    ours = with_attention(model, band_length=T, type="eball", layers=[0], follows_input=True)
    assert {pattern.follows_input for pattern in layer_patterns(ours)} == {True}


def test_blocks_of_their_own_keep_what_is_theirs(model):
    model = copy.deepcopy(model)
    own = copy.deepcopy(model.block)
    own.sequence_mixer.n_heads = 8
    other = copy.deepcopy(model.block)
    other.feed_forward_moe.hidden_size = 64
    model.block_overrides = {1: own, 2: other}
    ours = with_attention(model, band_length=T, type="eball", layers=[0, 1])
    patterns = list(layer_patterns(ours))
    assert [p.name for p in patterns] == ["eball", "eball", "standard", "standard"]
    assert [p.n_heads for p in patterns] == [4, 8, 4, 4]
    assert ours.block_overrides[2].feed_forward_moe.hidden_size == 64
    assert ours.num_params == model.num_params


def test_a_second_type_replaces_the_first(model):
    first = with_attention(model, band_length=T, type="eball", layers=[1])
    second = with_attention(first, band_length=64, type="reformer")
    assert list(layer_patterns(second)) == [build_pattern("reformer", n_heads=HEADS, band_length=64)] * 4


def test_it_attaches_to_olmo_cores_own_preset():
    apply_remedies()
    preset = TransformerConfig.olmoe_1B_7B(vocab_size=128, n_layers=2, d_model=64, n_heads=4)
    ours = with_attention(preset, band_length=16, type="spattention", local_sharing=True)
    assert {p.name for p in layer_patterns(ours)} == {"spattention"}
    assert ours.num_params == preset.num_params


def test_layer_patterns_wants_patterns(model):
    refused(lambda: list(layer_patterns(model)), "layer 0 has no attention pattern", "AttentionConfig")


REFUSED_MODELS = {
    "layer that is not there": ({"layers": [0, 4]}, ["attention.layers has 4", "0 to 3"]),
    "negative layer": ({"layers": [-1]}, ["attention.layers has -1", "0 to 3"]),
    "more heads than tokens": ({"band_length": 3}, ["n_heads=4", "band_length=3"]),
    "band length of zero": ({"band_length": 0}, ["attention.band_length=0", "at least 1"]),
    "implementation": ({"impl": "quick"}, ["attention.impl='quick'", "reference"]),
    "value of an option": ({"local_sharing": "yes"}, ["attention.local_sharing='yes'", "true or false"]),
}


@pytest.mark.parametrize(("section", "said"), REFUSED_MODELS.values(), ids=REFUSED_MODELS.keys())
def test_what_does_not_fit_the_model_is_refused(model, section, said):
    refused(lambda: with_attention(model, **{"type": "spattention", "band_length": T, **section}), *said)


def test_heads_that_do_not_divide_the_width_are_refused(model):
    odd = copy.deepcopy(model)
    odd.d_model = 30
    refused(lambda: with_attention(odd, band_length=T, type="eball"), "model.d_model=30", "n_heads=4", "multiple")


def test_dropout_is_refused_before_anything_is_built(model):
    dropping = copy.deepcopy(model)
    dropping.block.sequence_mixer.dropout = 0.1
    refused(lambda: with_attention(dropping, band_length=T), "dropout=0.1", "set it to 0")


def test_named_blocks_are_refused(model):
    named = copy.deepcopy(model)
    named.block, named.block_pattern = {"a": model.block}, ["a"]
    refused(lambda: with_attention(named, band_length=T, type="eball"), "model.block", "named blocks are not supported")


# ---- the section -----------------------------------------------------------------------------------------------------


def mixer_of(model, section: dict) -> PatternAttentionConfig:
    return attach(model, section, band_length=T).block.sequence_mixer


def test_options_of_other_types_are_told_apart(model):
    section = {"type": "eball", "local_sharing": True, "follows_input": False, "layers": "all"}
    assert unread_options(section) == ("local_sharing",)
    eball = build_pattern("eball", n_heads=HEADS, band_length=T)
    mixer = mixer_of(model, section)
    assert mixer.build_pattern() == eball
    assert {**mixer.pattern, "n_heads": HEADS} == eball.to_config()
    assert mixer.pattern == {"name": "eball", "band_length": T, "follows_input": False, "head_order": "natural"}
    assert unread_options({**section, "type": "spattention"}) == ()


def test_defaults_are_dense_attention_of_the_training_length(model):
    mixer = mixer_of(model, {})
    assert (mixer.pattern["name"], mixer.pattern["band_length"], mixer.impl) == ("standard", T, "auto")
    assert names(attach(model, {}, band_length=T)) == ["standard"] * 4
    nothing = dict.fromkeys(("band_length", "impl", "layers", "follows_input"))
    assert attach(model, nothing, band_length=T) == attach(model, {}, band_length=T)


def test_the_band_length_may_be_stated(model):
    assert mixer_of(model, {"type": "eball", "band_length": 512}).build_pattern().band_length == 512


def test_a_saved_pattern_is_the_fingerprints(model):
    """config.json and attention.json of a checkpoint hold the same keys and values."""
    ours = with_attention(model, band_length=T, type="spattention", head_order="balanced", layers=[2])
    layers = Fingerprint.of(ours).layers
    for layer, block in enumerate([*[ours.block_overrides[0]] * 2, ours.block, ours.block_overrides[3]]):
        assert {**block.sequence_mixer.pattern, "n_heads": HEADS} == layers[layer]
    assert isinstance(layers[2]["head_order"], list)


REFUSED_SECTIONS = {
    "unknown key": ({"type": "spattention", "local_shring": True}, ["attention.local_shring", "'local_sharing'"]),
    "far from any key": ({"zzz": 1}, ["attention.zzz", "known:", "local_sharing"]),
    "unknown type": ({"type": "spatention"}, ["attention.type='spatention'", "'spattention'", "known:", "reformer"]),
    "type of the wrong kind": ({"type": 3}, ["attention.type=3", "must be a name"]),
    "layers by word": ({"layers": "odd"}, ["attention.layers='odd'", "'all'", "[0,2]"]),
    "layers by fraction": ({"layers": [0.5]}, ["attention.layers=[0.5]"]),
    "layers by truth": ({"layers": [True]}, ["attention.layers=[True]"]),
    "one layer alone": ({"layers": 1}, ["attention.layers=1"]),
}


@pytest.mark.parametrize(("section", "said"), REFUSED_SECTIONS.values(), ids=REFUSED_SECTIONS.keys())
def test_a_wrong_section_is_refused_with_what_would_be_right(model, section, said):
    refused(lambda: attach(model, section, band_length=T), *said)


@pytest.mark.parametrize("band_length", ["long", 1.5, True])
def test_a_band_length_of_the_wrong_kind_is_refused(model, band_length):
    refused(
        lambda: with_attention(model, type="eball", band_length=band_length), f"attention.band_length={band_length!r}"
    )


@pytest.mark.parametrize(
    ("word", "n_layers", "dense"),
    [
        ("dense_first", 16, [0, 1, 2, 3]),
        ("dense_last", 16, [12, 13, 14, 15]),
        ("dense_interleaved", 16, [3, 7, 11, 15]),
        ("dense_interleaved", 6, [3]),
        ("dense_interleaved", 2, [1]),
        ("dense_first", 2, [0]),
    ],
)
def test_a_hybrid_keeps_a_quarter_of_the_layers_dense(model, word, n_layers, dense):
    ours = with_attention(replace(model, n_layers=n_layers), band_length=T, type="eball", layers=word)
    names = [pattern.name for pattern in layer_patterns(ours)]
    assert [layer for layer, name in enumerate(names) if name == "standard"] == dense


def test_an_unknown_hybrid_names_the_nearest(model):
    with pytest.raises(ValueError, match=r"attention\.layers='dense_end': .*did you mean 'dense_"):
        with_attention(model, band_length=T, type="eball", layers="dense_end")

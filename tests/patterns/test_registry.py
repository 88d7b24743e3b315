"""Patterns as values, and attention types by name."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from mask_oracle import MASKS, build

from spattn_olmoe import available_patterns, build_pattern, trust
from spattn_olmoe.patterns import (
    MAX_INTERVALS,
    VARIANTS,
    Pattern,
    find_variant,
    pattern_class,
    pattern_options,
    register_pattern,
    registry,
)

TYPES = sorted({variant.type for variant in VARIANTS.values()})

EXTERNAL = textwrap.dedent(
    """
    from dataclasses import dataclass

    from spattn_olmoe.patterns import Pattern, register_pattern


    @register_pattern("every_third")
    @dataclass(frozen=True)
    class EveryThird(Pattern):
        first: int = 0

        def allows(self, h, q_idx, kv_idx):
            return ((q_idx - kv_idx) % 3 == self.first) & (h >= 0)
    """
)


@pytest.fixture
def registry_copy(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def external_module(tmp_path, monkeypatch, registry_copy):
    """The name of an importable module, outside of the package, that defines the type ``every_third``."""
    (tmp_path / "somebodys_masks.py").write_text(EXTERNAL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "_trusted", {*trust._trusted, "somebodys_masks"})
    yield "somebodys_masks"
    sys.modules.pop("somebodys_masks", None)


def build_all(**options):
    return [build(mask, 4, 18, **options) for mask in MASKS]


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("follows_input", [False, True])
def test_patterns_are_values(follows_input):
    patterns, again = build_all(follows_input=follows_input), build_all(follows_input=follows_input)
    assert patterns == again
    assert [hash(p) for p in patterns] == [hash(p) for p in again]
    assert len(set(patterns)) == len(MASKS)  # no two masks are equal


def test_options_heads_and_length_tell_patterns_apart():
    base = build_pattern("spattention", n_heads=4, band_length=18)
    assert base != build_pattern("spattention", n_heads=4, band_length=18, local_sharing=True)
    assert base != build_pattern("spattention", n_heads=4, band_length=18, follows_input=True)
    assert base != build_pattern("spattention", n_heads=3, band_length=18)
    assert base != build_pattern("spattention", n_heads=4, band_length=19)


@pytest.mark.parametrize("mask", MASKS)
def test_copies_are_equal_and_patterns_are_frozen(mask):
    pattern = build(mask, 4, 18)
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert copy.deepcopy(pattern) == pattern
    with pytest.raises(FrozenInstanceError):
        pattern.n_heads = 5


@pytest.mark.parametrize("mask", MASKS)
def test_a_pattern_is_rebuilt_from_its_config(mask):
    pattern = build(mask, 4, 18, follows_input=True)
    config = pattern.to_config()
    assert config["name"] == find_variant(mask).type == pattern.full_name()
    assert build_pattern(**config) == pattern


def test_repr_states_type_and_options():
    text = repr(build_pattern("spattention", n_heads=8, band_length=1024, local_sharing=True))
    assert (
        text
        == "SPAttention(n_heads=8, band_length=1024, follows_input=False, head_order='natural', local_sharing=True)"
    )


def test_band_length_train_keeps_and_input_follows():
    train = build_pattern("eball", n_heads=4, band_length=16)
    assert train.at_length(40) is train
    follows = build_pattern("eball", n_heads=4, band_length=16, follows_input=True)
    assert follows.at_length(16) is follows
    assert follows.at_length(40).band_length == 40


# ---- names -------------------------------------------------------------------------------------------------------


def test_the_types_of_this_package_are_there():
    assert set(TYPES) <= set(available_patterns())
    assert list(available_patterns()) == sorted(available_patterns())
    assert len(TYPES) == 10
    assert all(pattern_class(name).name == name for name in TYPES)


def test_options_of_a_type():
    common = {"follows_input": False, "head_order": "natural"}
    assert pattern_options("spattention") == {**common, "local_sharing": False}
    assert pattern_options("eball") == common


@pytest.mark.parametrize(
    ("name", "meant"), [("spatention", "spattention"), ("SPAttention", "spattention"), ("ebal", "eball")]
)
def test_unknown_type_names_the_nearest(name, meant):
    with pytest.raises(ValueError, match=f"attention.type='{name}' .*did you mean '{meant}'.*known: .*standard"):
        build_pattern(name, n_heads=2, band_length=8)


def test_unknown_type_like_no_other_lists_the_known_ones():
    with pytest.raises(ValueError, match="known: bigbird, eball") as error:
        build_pattern("zzz", n_heads=2, band_length=8)
    assert "did you mean" not in str(error.value)


def test_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match=r"attention\.local_shring .*'spattention'; did you mean 'local_sharing'"):
        build_pattern("spattention", n_heads=2, band_length=8, local_shring=True)


def test_option_of_another_type_is_unknown():
    with pytest.raises(ValueError, match=r"attention\.local_sharing is not an option of type 'eball'"):
        build_pattern("eball", n_heads=2, band_length=8, local_sharing=True)


@pytest.mark.parametrize("mask", MASKS)
def test_more_heads_than_tokens_is_an_error(mask):
    build(mask, 8, 8)
    with pytest.raises(ValueError, match="n_heads=9 is more than the band length band_length=8"):
        build(mask, 9, 8)


@pytest.mark.parametrize("bad", [0, -1, 2.0, "8", True, None])
@pytest.mark.parametrize("key", ["n_heads", "band_length"])
def test_heads_and_length_are_positive_whole_numbers(key, bad):
    with pytest.raises(ValueError, match=f"attention.{key}={bad!r}: must be a whole number"):
        build_pattern("standard", **{"n_heads": 8, "band_length": 8, key: bad})


def test_option_values_are_checked():
    with pytest.raises(ValueError, match=r"attention\.follows_input='test': must be true or false"):
        build_pattern("eball", n_heads=2, band_length=8, follows_input="test")
    with pytest.raises(ValueError, match=r"attention\.local_sharing='yes': must be true or false"):
        build_pattern("spattention", n_heads=2, band_length=8, local_sharing="yes")


# ---- types from elsewhere ----------------------------------------------------------------------------------------


def test_a_type_of_another_module_is_found_by_its_dotted_name(external_module):
    pattern = build_pattern(f"{external_module}.every_third", n_heads=2, band_length=9, first=1)
    assert pattern.dense_mask()[1, 8].nonzero().flatten().tolist() == [1, 4, 7]
    assert pattern.name == "every_third"
    assert pattern.attended_pairs() == int(pattern.dense_mask().sum())
    assert pattern.dead_rows() == 2  # the first query of both heads
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert build_pattern(**pattern.to_config()) == pattern


def test_config_of_such_a_type_rebuilds_it_in_a_process_that_has_not_imported_it(external_module, tmp_path):
    """As a checkpoint's config does."""
    config = build_pattern(f"{external_module}.every_third", n_heads=2, band_length=9, first=1).to_config()
    trusting = f"from spattn_olmoe.trust import trust; trust({external_module!r})"
    code = f"{trusting}; from spattn_olmoe import build_pattern; print(build_pattern(**{config!r}))"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert (
        done.stdout.decode().strip()
        == "EveryThird(n_heads=2, band_length=9, follows_input=False, head_order='natural', first=1)"
    )


@pytest.mark.parametrize("name", ["no_such_module.mask", ".eball", "eball."])
def test_a_module_that_cannot_be_imported_is_named(name, monkeypatch):
    monkeypatch.setattr(trust, "_trusted", {name.rpartition(".")[0]})
    with pytest.raises(ValueError, match=f"attention.type='{name}': cannot import"):
        build_pattern(name, n_heads=2, band_length=8)


def test_a_type_is_looked_for_in_the_module_that_was_named(external_module):
    with pytest.raises(ValueError, match=r"'somebodys_masks\.every_thrd' .*did you mean 'every_third'"):
        build_pattern(f"{external_module}.every_thrd", n_heads=2, band_length=8)


def test_a_dotted_name_never_means_a_type_of_another_module(external_module):
    with pytest.raises(ValueError, match=r"'somebodys_masks' has no 'eball', which is spattn_olmoe\.patterns\.bands's"):
        build_pattern(f"{external_module}.eball", n_heads=2, band_length=8)
    assert build_pattern("spattn_olmoe.patterns.bands.eball", n_heads=2, band_length=8).name == "eball"


def test_a_taken_name_is_refused_even_to_a_class_of_the_same_name(registry_copy):
    @dataclass(frozen=True)
    class Standard(Pattern):
        def allows(self, h, q_idx, kv_idx):
            return q_idx == kv_idx

    Standard.__qualname__ = "Standard"
    with pytest.raises(ValueError, match=r"'standard' is already taken by spattn_olmoe\.patterns\.bands\.Standard"):
        register_pattern("standard")(Standard)
    assert pattern_class("standard") is not Standard


# ---- intervals of a new type -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stripes(Pattern):
    """A pattern with the intervals it is told; only a test would."""

    stripes: tuple = ()

    def allows(self, h, q_idx, kv_idx):
        d = q_idx - kv_idx
        return torch.stack([(lo <= d) & (d < hi) for lo, hi in self.stripes]).any(0) & (h >= 0)

    def head_intervals(self, h):
        return list(self.stripes)


def test_more_intervals_than_kernels_take_is_an_error():
    assert MAX_INTERVALS == 2
    pattern = Stripes(n_heads=2, band_length=20, stripes=((0, 2), (5, 6), (9, 12)))
    with pytest.raises(ValueError, match="head 0 has 3 distance intervals, more than 2: state such a mask with allows"):
        _ = pattern.intervals


def test_overlapping_neighbouring_and_empty_intervals_are_merged():
    pattern = Stripes(n_heads=1, band_length=20, stripes=((7, 9), (3, 3), (0, 2), (2, 4), (8, 12), (-5, 1), (6, 2)))
    assert pattern.intervals.tolist() == [[[0, 4], [7, 12]]]
    assert pattern.attended_pairs(10) == int(pattern.dense_mask(10).sum())


def test_distances_beyond_the_input_do_not_count():
    pattern = Stripes(n_heads=3, band_length=20, stripes=((6, 9), (30, 40)))
    assert pattern.attended_pairs(8) == int(pattern.dense_mask(8).sum()) == 3 * (2 + 1)
    assert pattern.dead_rows(8) == 3 * 6
    assert pattern.dead_rows(4) == 3 * 4

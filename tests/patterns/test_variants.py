"""Named masks: each is a type with options, and every word is one mask."""

import pytest

from spattn_olmoe.patterns import available_patterns, pattern_options
from spattn_olmoe.patterns.variants import VARIANTS, available_variants, find_variant, mask_name, variant_of


def test_every_type_has_a_mask_and_no_mask_two_names():
    assert {variant.type for variant in VARIANTS.values()} <= set(available_patterns())
    built = [variant.build(4, 32) for variant in VARIANTS.values()]
    assert len(set(built)) == len(VARIANTS)
    assert {find_variant(name).type for name in available_variants()} == set(available_patterns())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_pattern_is_known_by_the_name_that_it_was_built_by(name):
    pattern = find_variant(name).build(4, 32)
    assert variant_of(pattern.name, pattern.options) == VARIANTS[name]
    assert mask_name(pattern.name, pattern.options) == name
    assert mask_name(pattern.name, VARIANTS[name].options) == name


def test_options_beyond_a_name_are_printed():
    shared = VARIANTS["sharing"].build(4, 32, follows_input=True, head_order=[3, 2, 1, 0])
    assert mask_name(shared.name, shared.options) == "sharing follows_input=true head_order=(3, 2, 1, 0)"
    lsh = VARIANTS["reformer_lsh"].build(4, 32, n_hashes=2)
    assert mask_name(lsh.name, lsh.options) == "reformer_lsh n_hashes=2"
    assert (
        mask_name("elsewhere.windows", {"width": 3, "follows_input": False}) == "windows width=3"
    )  # a result of a type that is not here


def test_command_lines_say_all_that_a_mask_is():
    assert VARIANTS["exclusive"].overrides == ("attention.type=spattention", "attention.local_sharing=false")
    assert VARIANTS["reformer_lsh"].overrides == ("attention.type=reformer", "attention.buckets=lsh")
    assert VARIANTS["dense"].overrides == ("attention.type=standard",)
    for variant in VARIANTS.values():
        assert set(variant.options) <= set(pattern_options(variant.type))


def test_a_type_of_one_mask_is_a_name_of_it():
    assert find_variant("standard") is VARIANTS["dense"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sharng", "'sharng' is not a mask; did you mean 'sharing'"),
        ("bigbird_seed", "did you mean 'bigbird_seeded'"),
        ("spattention", "'spattention' is a type of several masks: name one of exclusive, sharing"),
        ("nowhere.mask", "would import 'nowhere', .* say --trust nowhere"),
    ],
)
def test_other_words_are_refused_with_the_nearest_name(name, message):
    with pytest.raises(ValueError, match=message):
        find_variant(name)

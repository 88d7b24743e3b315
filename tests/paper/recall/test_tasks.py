"""The tasks: an answer lies where the distance says, places and numbers are as stated, and batches repeat."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spattn_olmoe.paper.recall.tasks import IGNORED, TASKS, build_task

SMALL = {
    "one_hop": {"length": 64, "pairs": 4, "keys": 5, "values": 3, "fillers": 2},
    "two_hop": {"length": 64, "pairs": 6, "vocab": 40},
    "copying": {"length": 40, "span": 5, "symbols": 4},
    "selective_copying": {"length": 40, "tokens": 6, "symbols": 4},
}
ASKED = {"one_hop": 4, "two_hop": 6, "copying": 5, "selective_copying": 6}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TASKS)), st.integers(0, 2**31 - 1), st.integers(0, 10**6))
def test_the_answer_lies_where_the_distance_says(name, seed, index):
    task = build_task(name, **SMALL[name])
    ids, labels, distances = task.batch(seed, index, 3)
    assert ids.min() >= 0 and ids.max() < task.vocab_size
    row, place = np.nonzero(labels != IGNORED)
    assert len(place) == 3 * ASKED[name] and (distances[labels == IGNORED] == 0).all()
    distance = distances[row, place]
    assert (distance > 0).all() and (distance <= place).all()
    assert (ids[row, place - distance] == labels[row, place]).all()
    again = task.batch(seed, index, 3)
    assert all((a == b).all() for a, b in zip((ids, labels, distances), again, strict=True))


def test_one_hop_asks_each_key_once_and_at_every_distance_alike():
    task = build_task("one_hop")
    ids, labels, distances = task.batch(0, 0, 2000)
    keys = ids[labels != IGNORED].reshape(2000, 8) - 256
    assert all(len(set(row)) == 8 for row in keys.tolist()) and keys.min() >= 0 and keys.max() < 16
    assert (labels[labels != IGNORED].reshape(2000, 8) // 16 == keys).all()
    counts = np.bincount(distances[distances > 0] * 8 // 256, minlength=8)
    assert counts.sum() == 16_000 and abs(counts[1:] / 16_000 - 1 / 8).max() < 0.02


def test_two_hop_finds_the_key_one_place_before_its_value():
    ids, labels, distances = build_task("two_hop", **SMALL["two_hop"]).batch(1, 2, 50)
    row, place = np.nonzero(labels != IGNORED)
    assert (ids[row, place - distances[row, place] - 1] == ids[row, place]).all()
    assert (place % 2 == 0).all() and (labels[row, place] >= 20).all() and (ids[row, place] < 20).all()


def test_the_published_places_of_two_hop_lie_close_behind_the_pairs():
    near, uniform = (build_task("two_hop", pairs=8, power=power).batch(0, 0, 500) for power in (1, 100))
    assert near.distances[near.distances > 0].mean() < 0.7 * uniform.distances[uniform.distances > 0].mean()


def test_copying_has_one_distance_a_sequence_after_the_marker():
    ids, labels, distances = build_task("copying").batch(0, 0, 200)
    for row in range(200):
        places = np.nonzero(labels[row] != IGNORED)[0]
        assert (np.diff(places) == 1).all() and len(set(distances[row, places])) == 1
        assert ids[row, places[0]] == 16 and (ids[row] == 16).sum() == 1


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("onehop", {}, "did you mean 'one_hop'"),
        ("one_hop", {"pair": 3}, "did you mean 'pairs'"),
        ("one_hop", {"pairs": 17}, "pairs=17: more than keys=16"),
        ("one_hop", {"length": 24}, "pairs=8: must be at most a quarter of length=24"),
        ("one_hop", {"values": 0}, "values=0: must be a whole number of at least 1"),
        ("two_hop", {"vocab": 16, "pairs": 8}, "vocab=16: too small for pairs=8, at least 18"),
        ("two_hop", {"length": 30, "pairs": 8}, "pairs=8: more than the 7 places that length=30 leaves"),
        ("copying", {"length": 16, "span": 8}, "span=8: two spans and a marker do not fit length=16"),
        ("selective_copying", {"length": 12, "tokens": 6}, "tokens=6: they do not fit twice into length=12"),
    ],
)
def test_bad_options_are_one_line(name, options, said):
    with pytest.raises(ValueError) as caught:
        build_task(name, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)

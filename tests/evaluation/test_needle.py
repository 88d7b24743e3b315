"""Needles in text: where they stand, and that exactly those are seen that the mask lets through."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spattn_olmoe import build_pattern
from spattn_olmoe.evaluation import loss, needle
from spattn_olmoe.model.checkpoint import Checkpoint

NEEDLE = needle.Needle(line=[1, 2], after=[3], question=[4, 5], number=[6, 7], other=[8, 9])


@given(st.integers(0, 40))
def test_the_question_stands_so_far_behind_the_number(distance):
    ids = np.arange(100, 130)
    if not NEEDLE.nearest <= distance <= NEEDLE.farthest(30):
        with pytest.raises(ValueError, match="does not fit"):
            NEEDLE.text(ids, distance, NEEDLE.number)
        return
    text = NEEDLE.text(ids, distance, NEEDLE.number)
    assert len(text) == 30 and text[-4:] == [4, 5, 6, 7]
    assert 27 - text.index(6) == distance
    start = text.index(6) - 2
    assert text[start : start + 5] == [1, 2, 6, 7, 3]
    assert [x for x in text if x >= 100] == list(range(100, 121))  # the text is whole, but for its end
    other = NEEDLE.text(ids, distance, NEEDLE.other)
    assert [i for i in range(30) if text[i] != other[i]] == [start + 2, start + 3]  # the question asks the same


def test_places_lie_in_every_band_where_needles_fit():
    where = needle.places(4, 64, [NEEDLE], 64)
    assert [(h, part) for h, part, _ in where][-1] == (3, 0.5)  # 0.9 of the last band is 62, and 59 fit
    assert all(h * 16 <= distance < (h + 1) * 16 and 4 <= distance <= 59 for h, _, distance in where)
    with pytest.raises(ValueError, match="sequences of 8 tokens are too short"):
        needle.places(4, 64, [NEEDLE], 8)


def test_a_gain_is_what_two_texts_give_and_zero_where_the_mask_does_not_reach(checkpoint_of, held_out_data):
    checkpoint = Checkpoint.open(checkpoint_of("sliding_window"))
    held_out = loss.HeldOut.read(checkpoint, held_out_data, limit=2)
    made = [NEEDLE, needle.Needle(line=[11], after=[12], question=[13], number=[14, 15], other=[16, 17])]
    distances = list(range(max(n.nearest for n in made), min(n.farthest(32) for n in made) + 1, 2))
    found = needle.gains(checkpoint, held_out, made, distances, batch_size=3, quiet=True)
    module = checkpoint.load()
    step = build_pattern("sliding_window", 4, 32).dense_mask(32).any(0).float() + torch.eye(32)
    reaches = step @ step > 0  # two layers
    seen = []
    for s, row in enumerate(found):
        n = len(made[s].number)
        for gain, distance in zip(row, distances, strict=True):
            texts = [torch.tensor(made[s].text(held_out.ids[s], distance, x)) for x in (made[s].number, made[s].other)]
            expected = []
            for text in texts:
                logprobs = module.model_forward(text[None])[0].log_softmax(-1)
                expected.append(sum(float(logprobs[t - 1, text[t]]) for t in range(32 - n, 32)))
            assert gain == pytest.approx(expected[0] - expected[1], abs=1e-5)
            (differ,) = torch.where(texts[0] != texts[1])
            seen.append(bool(reaches[31 - n : 31, differ].any()))
            assert (gain != 0) == seen[-1]
    assert set(seen) == {True, False}


def test_from_the_command_line(checkpoint_of, evaluate_command, held_out_data, tmp_path):
    folders = [checkpoint_of("standard"), checkpoint_of("gbhalf")]
    words = ["--checkpoint", *folders, "--data", str(held_out_data), "--limit", "5", "--out", str(tmp_path)]
    code, out, _ = evaluate_command(*words, "--needle")
    assert code == 0
    results = json.loads((tmp_path / "needle.json").read_text())
    assert [run["attention_name"] for run in results["checkpoints"]] == ["dense", "gbhalf"]
    rows = results["checkpoints"][1]["needle"]
    assert all(len(row["sequences"]) == 5 and row["gain"] == pytest.approx(np.mean(row["sequences"])) for row in rows)
    assert (tmp_path / "needle.md").read_text() in out and "| distance | band of head |" in out
    code, _, err = evaluate_command(*words, "--needle", "--loss")
    assert code == 2 and len(err.splitlines()) == 1 and "--loss takes no --suite" in err

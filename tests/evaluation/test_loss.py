"""Held-out loss against the model's own, by position and paired."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spattn_olmoe.data import Manifest
from spattn_olmoe.evaluation import loss
from spattn_olmoe.evaluation.repeats import repeat_distances
from spattn_olmoe.files import hash_file
from spattn_olmoe.json_files import to_json
from spattn_olmoe.model.checkpoint import Checkpoint


def test_losses_are_the_models_own_for_any_batch_size(checkpoint_of, held_out_data):
    checkpoint = Checkpoint.open(checkpoint_of("spattention", local_sharing=True))
    held_out = loss.HeldOut.read(checkpoint, held_out_data, limit=7)
    assert held_out.ids.shape == (7, 32)
    (path, *_) = Manifest.load(held_out_data).validation_paths
    assert held_out.ids.ravel().tolist() == np.fromfile(path, dtype=np.uint16)[: 7 * 32].tolist()
    losses = loss.token_losses(checkpoint, held_out, batch_size=3)
    module = checkpoint.load()
    for row, ids in zip(losses, held_out.ids, strict=True):
        logprobs = module.model_forward(torch.from_numpy(ids)[None])[0].log_softmax(-1)
        expected = [-float(logprobs[i, ids[i + 1]]) for i in range(31)]
        assert row == pytest.approx(expected, abs=1e-5)


def test_data_of_another_tokenizer_are_refused_whatever_its_size(checkpoint_of, held_out_data, tmp_path):
    checkpoint, other = Checkpoint.open(checkpoint_of("standard")), tmp_path / "data"
    shutil.copytree(held_out_data, other)
    content = json.loads((other / "tokenizer.json").read_bytes())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    manifest = Manifest.load(other)
    stated = replace(manifest.tokenizer, sha256=hash_file(other / "tokenizer.json").hexdigest())
    replace(manifest, tokenizer=stated).save()
    loss.HeldOut.read(checkpoint, held_out_data)
    with pytest.raises(ValueError, match=rf"{other}: .*another tokenizer than that of {checkpoint.path}; prepare"):
        loss.HeldOut.read(checkpoint, other)


def test_sequences_may_be_longer_than_in_training(checkpoint_of, held_out_data):
    """What a model does beyond its length, before and after it is continued there."""
    checkpoint = Checkpoint.open(checkpoint_of("eball"))
    with pytest.raises(ValueError, match="max_length=1: a loss needs sequences of at least 2 tokens"):
        loss.HeldOut.read(checkpoint, held_out_data, length=1)
    held_out = loss.HeldOut.read(checkpoint, held_out_data, limit=2, length=80)
    usual = loss.HeldOut.read(checkpoint, held_out_data, limit=5)
    assert held_out.ids.shape == (2, 80) and held_out.ids.ravel().tolist() == usual.ids.ravel().tolist()
    losses = loss.token_losses(checkpoint, held_out, batch_size=2)
    assert losses[0, :31] == pytest.approx(loss.token_losses(checkpoint, usual, batch_size=5)[0], abs=1e-5)
    assert losses.shape == (2, 79) and [row["context"] for row in loss.summarise(losses)][-1] == [64, 80]


@pytest.mark.parametrize("length", [2, 16, 17, 32, 33, 1000, 4096])
def test_buckets_hold_every_context_length_once(length):
    found = [context for lo, hi in loss.buckets(length) for context in range(lo, hi)]
    assert found == list(range(1, length))


def test_summary_and_paired_differences_of_constructed_losses():
    generator = np.random.default_rng(0)
    a = np.tile(np.arange(1.0, 32.0), (50, 1)) + generator.normal(
        0, 1, (50, 1)
    )  # sequences differ far more than models
    b = a + np.where(np.arange(1, 32) < 16, 0.0, 0.05) + generator.normal(0, 0.01, (50, 1))
    x, y = loss.summarise(a), loss.summarise(b)
    assert [row["context"] for row in x] == [[1, 32], [1, 16], [16, 32]]
    assert x[1]["loss"] == pytest.approx(a[:, :15].mean()) and x[2]["loss"] == pytest.approx(a[:, 15:].mean())
    assert x[0]["stderr"] == pytest.approx(a.mean(1).std(ddof=1) / 50**0.5)
    assert x[0]["perplexity"] == pytest.approx(np.exp(a.mean()))
    total, near, far = loss.differences(x, y)
    assert (total["verdict"], far["verdict"]) == ("A is lower", "A is lower")
    assert near["verdict"] == "no difference can be seen"
    assert far["interval"][0] < 0.05 < far["interval"][1] and far["stderr"] < 0.01
    assert loss.differences(y, x)[2]["verdict"] == "B is lower"


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3))
def test_repeat_distances_are_those_of_a_search_backwards(rows):
    expected = [[next((d for d in range(1, t) if row[t - d - 1 : t - d + 1] == row[t - 1 : t + 1]), 0) for t in range(1, 9)]
                for row in rows]  # fmt: skip
    assert repeat_distances(np.array(rows)).tolist() == expected


def test_losses_by_repeat_of_constructed_losses():
    """Tokens that repeat cost 1, others 3; one sequence has no repeat at all."""
    ids = np.stack([np.tile(np.arange(20), 2), np.arange(40)])
    numbers = repeat_distances(ids)
    losses = np.where(numbers > 0, 1.0, 3.0)
    total, new, far = loss.summarise(losses, numbers, "repeat")
    assert [row["repeat"] for row in (total, new, far)] == [[1, 40], [0, 1], [16, 32]]
    assert (total["tokens"], new["tokens"], far["tokens"]) == (78, 59, 19)
    assert (new["loss"], far["loss"], len(far["sequences"])) == (3.0, 1.0, 1)
    assert total["loss"] == pytest.approx((losses.mean(1)).mean())


def test_the_command_groups_by_repeat(checkpoint_of, evaluate_command, held_out_data, tmp_path):
    folders = [checkpoint_of("standard"), checkpoint_of("gbhalf")]
    words = ["--checkpoint", *folders, "--loss", "--by", "repeat", "--limit", "20", "--data", str(held_out_data)]
    code, out, _ = evaluate_command(*words, "--out", str(tmp_path))
    assert code == 0
    results = json.loads((tmp_path / "loss_by_repeat.json").read_text())
    assert results["by"] == "repeat"
    rows = results["checkpoints"][0]["loss"]
    assert rows[0]["tokens"] == 20 * 31 == sum(row["tokens"] for row in rows[1:])
    assert "| tokens back to the repeat | tokens | A: dense | B: gbhalf |" in out and "no repeat" in out
    assert (tmp_path / "loss_by_repeat.md").read_text() in out


def test_documents_that_do_not_see_each_other_are_refused(checkpoint_of, held_out_data):
    checkpoint = Checkpoint.open(checkpoint_of("standard"))
    held_out = loss.HeldOut.read(checkpoint, held_out_data, limit=1)
    checkpoint.config["dataset"]["generate_doc_lengths"] = True
    with pytest.raises(Exception, match="generate_doc_lengths=true"):
        loss.token_losses(checkpoint, held_out, batch_size=1)


def test_several_checkpoints_from_the_command_line(checkpoint_of, evaluate_command, held_out_data, tmp_path):
    folders = [checkpoint_of("standard"), checkpoint_of("gbhalf")]
    code, out, _ = evaluate_command(
        "--checkpoint", *folders, "--loss", "--limit", "20", "--data", str(held_out_data), "--out", str(tmp_path)
    )
    assert code == 0
    results = json.loads((tmp_path / "loss.json").read_text())
    assert [run["attention_name"] for run in results["checkpoints"]] == ["dense", "gbhalf"]
    assert results["sequences"] == 20
    assert "B against A, paired over sequences" in out
    assert (tmp_path / "loss.md").read_text() in out


def test_data_without_a_validation_split_is_refused(checkpoint_of, tiny_data):
    with pytest.raises(ValueError, match="the validation split holds no whole sequence of 32 tokens"):
        loss.HeldOut.read(Checkpoint.open(checkpoint_of("standard")))


def test_losses_beyond_the_largest_perplexity_are_shown():
    rows = loss.summarise(np.full((3, 63), 800.0))
    assert rows[0]["loss"] == 800.0 and rows[0]["perplexity"] == float("inf")
    assert json.loads(to_json(rows))[0]["perplexity"] is None

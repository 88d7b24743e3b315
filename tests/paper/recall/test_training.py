"""Training on a task: it learns, it is interrupted without a trace, and it is measured by distance."""

import numpy as np
import pytest
import torch

from spattn_olmoe.paper.recall import study
from spattn_olmoe.paper.recall.report import markdown, plot, summarise, write
from spattn_olmoe.paper.recall.tasks import IGNORED, build_task
from spattn_olmoe.paper.recall.training import Setting, build_model, measure, train

TASK = build_task("one_hop", length=32, pairs=4, keys=4, values=4, fillers=2)
TINY = Setting(d_model=32, n_heads=4, hidden=32, batch=16, steps=4, warmup=1, eval_every=2, eval_sequences=8)


def test_the_same_seed_gives_every_type_the_same_weights():
    a, b = (build_model(TINY, TASK, {"type": name}, 3).state_dict() for name in ("standard", "eball"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    other = build_model(TINY, TASK, {"type": "eball"}, 4).state_dict()
    assert not torch.equal(other["embeddings.weight"], b["embeddings.weight"])


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, monkeypatch):
    whole = train(TINY, TASK, {"type": "eball"}, 0)
    state, done = tmp_path / "run.pt", 0

    def stop(*args):
        nonlocal done
        done += 1
        if done == 4:
            raise KeyboardInterrupt
        return batch(*args)

    batch = type(TASK).batch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(TASK), "batch", lambda self, *args: stop(self, *args))
        train(TINY, TASK, {"type": "eball"}, 0, state=state)
    assert state.exists()
    assert train(TINY, TASK, {"type": "eball"}, 0, state=state) == whole


def test_a_model_that_knows_is_right_at_every_distance():
    ids, labels, distances = TASK.batch(0, 0, 64)
    answers = {tuple(row): torch.from_numpy(label) for row, label in zip(ids.tolist(), labels, strict=True)}

    def knows(x):
        target = torch.stack([answers[tuple(row)] for row in x.tolist()])
        return 20.0 * torch.nn.functional.one_hot(target.clamp(min=0), TASK.vocab_size)

    found = measure(knows, TASK, (ids, labels, distances))
    assert found["accuracy"] == 1 and found["count"] == 256
    assert [cell["count"] for cell in found["bands"]] == np.bincount(
        distances[labels != IGNORED] // 4, minlength=8
    ).tolist()
    assert sum(cell["count"] for cell in found["phases"]) == 256
    assert all(cell["accuracy"] == 1 for cell in found["bands"])


def test_a_small_task_is_learnt():
    task = build_task("one_hop", length=16, pairs=2, keys=2, values=2, fillers=1)
    setting = Setting(
        d_model=32, n_layers=1, n_heads=2, hidden=32, batch=32, steps=150, warmup=10, lr=1e-2, eval_every=150
    )
    (end,) = train(setting, task, {"type": "standard"}, 0)
    assert end["accuracy"] > 0.95


def test_a_study_is_resumed_and_equal_masks_are_one_run(tmp_path):
    setting = Setting(d_model=32, n_heads=4, hidden=32, batch=4, steps=2, warmup=1, eval_every=1, eval_sequences=4)
    jobs = study.plan_jobs("recall", ["exclusive", "eball", "dense"], 1, setting, {"length": 64})
    assert jobs[0].key == jobs[1].key != jobs[2].key
    lines: list[str] = []
    results = study.run_jobs(jobs, tmp_path, workers=1, say=lines.append)
    assert [r["name"] for r in results] == ["exclusive", "eball", "dense"] and results[0]["curve"] == results[1][
        "curve"
    ]
    study.run_jobs(jobs, tmp_path, workers=1, say=lines.append)
    assert (
        lines[0] == "2 models to train, 0 are there already" and lines[-1] == "0 models to train, 2 are there already"
    )
    summary = summarise(results)
    for path in write("recall", summary, tmp_path):
        assert path.stat().st_size > 1000
    assert "| eball |" in markdown("recall", summary) and len(plot(summary).axes) == 3


def test_the_picture_shows_that_nothing_is_right_apart_from_that_nothing_was_asked(tmp_path):
    setting = Setting(d_model=32, n_heads=4, hidden=32, batch=4, steps=1, warmup=0, eval_every=1, eval_sequences=4)
    jobs = study.plan_jobs("recall", ["dense"], 1, setting, {"length": 64})
    summary = summarise(study.run_jobs(jobs, tmp_path, workers=1, say=str))
    bands = summary["types"]["dense"]["seeds"]["0"]["curve"][-1]["bands"]
    for band, accuracy in zip(bands, [0.0, None, 0.5, *[1.0] * 5], strict=True):
        band["accuracy"] = accuracy
    by_distance = plot(summary).axes[1]
    assert [text.get_text() for text in by_distance.texts] == ["0.00", "nan", "0.50", *["1.00"] * 5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps=0: must be more than 0"),
        ({"lr": float("nan")}, "lr=nan: must be a number of at least 0"),
        ({"d_model": 20}, "d_model=20: must be a multiple of twice n_heads=8"),
        ({"batch": 1.5}, "batch=1.5: must be a whole number of at least 0"),
    ],
)
def test_bad_settings_are_one_line(changes, said):
    with pytest.raises(ValueError, match=said):
        Setting(**changes)

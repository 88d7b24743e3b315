"""The metrics file of a run, read back."""

from __future__ import annotations

import json

import pytest

from spattn_olmoe.metrics import METRICS_FILE, keep_steps, read_metrics


def lines(*steps):
    return "".join(json.dumps({"step": step, "time": 0.0, "a": float(step)}) + "\n" for step in steps)


def test_metrics_of_a_step_are_put_together_in_order(tmp_path):
    parts = [{"step": 2, "a": 1.0}, {"step": 1, "a": 0.5}, {"step": 2, "b": 3.0}, {"step": 2, "a": 2.0}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(part) + "\n" for part in parts))
    metrics = read_metrics(tmp_path)
    assert metrics == {1: {"a": 0.5}, 2: {"a": 2.0, "b": 3.0}}
    assert list(metrics) == [1, 2]


@pytest.mark.parametrize("broken", ['{"step": 3, "a"', "\n", "[]\n", '{"a": 1}\n', "3\n", '{"step": null}\n'])
def test_a_line_that_was_cut_off_is_passed_over(tmp_path, broken):
    (tmp_path / METRICS_FILE).write_text(lines(1, 2) + broken)
    assert list(read_metrics(tmp_path)) == [1, 2]
    keep_steps(tmp_path / METRICS_FILE, up_to=5)
    assert (tmp_path / METRICS_FILE).read_text() == lines(1, 2)


def test_lines_of_steps_that_come_again_are_dropped(tmp_path):
    file = tmp_path / METRICS_FILE
    file.write_text(lines(1, 2, 3, 2, 4))
    keep_steps(file, up_to=2)
    assert file.read_text() == lines(1, 2, 2)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_without_a_file_there_is_nothing_to_keep(tmp_path):
    keep_steps(tmp_path / METRICS_FILE, up_to=2)
    assert list(tmp_path.iterdir()) == []

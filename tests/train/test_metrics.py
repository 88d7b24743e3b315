"""The metrics file of a run, as it is written."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from spattn_olmoe.metrics import METRICS_FILE, read_metrics
from spattn_olmoe.train.metrics import MetricsFile


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    callback = MetricsFile()
    callback._trainer = SimpleNamespace(save_folder=str(tmp_path), work_dir=tmp_path)
    callback.log_metrics(3, {"loss": float("nan"), "norm": float("inf"), "lr": 0.5})
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert (found["loss"], found["norm"], found["lr"]) == (None, None, 0.5)
    assert np.isnan(read_metrics(tmp_path)[3]["loss"])

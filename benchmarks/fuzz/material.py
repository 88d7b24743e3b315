"""What inputs are made from: one good example of every kind of file."""

from __future__ import annotations

import gzip
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from benchmarks.tiny import TINY
from benchmarks.tiny_run import prepare_tiny_data, run_training, write_tiny_yaml
from spattn_olmoe.evaluation.results import FORMAT

from .guard import CANARY


@dataclass(frozen=True)
class Material:
    """Good files.

    :param yaml: an experiment.
    :param data: prepared token shards.
    :param checkpoint: a checkpoint of it.
    :param published: a dense model in transformers' format, of the config that :data:`PUBLISHED` makes.
    """

    yaml: Path
    data: Path
    checkpoint: Path
    published: Path

    @classmethod
    def make(cls, folder: Path) -> Material:
        """Prepare a corpus and train a few steps."""
        data = prepare_tiny_data(folder)
        yaml = write_tiny_yaml(folder / "tiny.yaml", data)
        done = run_training(yaml, f"trainer.save_folder={folder}/run", cwd=folder)
        assert done.returncode == 0, done.stderr
        return cls(yaml, data, folder / "run/step12", published_model(folder))


N = 48
PUBLISHED = (*TINY, "model.d_model=64", f"dataset.sequence_length={N}")
"""Words that make the shipped base config that of :attr:`Material.published`."""


def published_model(folder: Path) -> Path:
    """A dense model of random weights in transformers' format."""
    from benchmarks.tiny_checkpoint import write_checkpoint
    from spattn_olmoe.model.checkpoint import Checkpoint
    from spattn_olmoe.model.hf.export import export

    write_checkpoint(folder / "dense/step1", {"type": "standard"})
    export(Checkpoint.open(folder / "dense/step1"), folder / "published")
    return folder / "published"


def hidden(path: Path) -> None:
    """A source that is more, or something else, than it seems: by its name."""
    if path.name == "pipe.jsonl":
        os.mkfifo(path)
    elif path.name == "link.jsonl":
        path.symlink_to("/dev/zero")
    elif path.name == "t.parquet":
        column = pa.array(["x" * 2**23] * 200).dictionary_encode()
        pq.write_table(pa.table({"text": column}), path)
    elif path.name == "deep.jsonl":
        path.write_text("[" * 10**6 + "\n" + '{"text": ' * 10**5 + "\n")
    elif path.name == "wide.jsonl":
        path.write_text(json.dumps({"text": "x", **{f"k{i}": 10**400 for i in range(2000)}}) + "\n")
    elif path.suffix == ".zst":
        zeros = zstandard.ZstdCompressor(level=1).compressobj()
        block = b"\n" * 2**24
        with path.open("wb") as file:
            for _ in range(60):
                file.write(zeros.compress(block))
            file.write(zeros.flush())
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(b'{"text": "' + bytes(2**27) + b'"}\n', 9))


def sources(folder: Path) -> None:
    """A small corpus in every format, and a module that no command may import."""
    lines = "".join(json.dumps({"text": f"document {i} " * 20, "id": i}) + "\n" for i in range(40)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    (folder / "a.txt").write_bytes(b"first\n\nsecond\r\n\r\nthird\n")
    (folder / "path").mkdir()
    (folder / f"path/{CANARY}.py").write_text("raise SystemExit('a stranger ran code')\n")


def results() -> dict[str, Any]:
    """A results file of ``scripts/evaluate.py`` with one task of two questions."""
    score = {"value": 0.5, "stderr": 0.5, "n": 2, "chance": 0.5}
    return {
        "format": FORMAT,
        "suite": "tasks",
        "columns": [{"label": "copa", "task": "copa", "num_fewshot": None, "metric": "acc"}],
        "checkpoint": "runs/a/step1",
        "attention": [{"name": "spattention", "n_heads": 4, "band_length": 32, "follows_input": False}],
        "follows_input": False,
        "max_length": 32,
        "truncated_requests": 0,
        "offline": True,
        "data": {"copa": "x"},
        "limit": None,
        "batch_size": 1,
        "device": "cpu",
        "ranks": 1,
        "versions": {"python": "3"},
        "measurements": {
            "copa": {
                "task": "copa",
                "num_fewshot": None,
                "metrics": {"acc": score},
                "questions": {"copa": {"doc_hash": ["a", "b"], "acc": [0.0, 1.0]}},
            }
        },
    }


def preload() -> None:
    """Import what the commands import, once for all forks."""
    import lm_eval.api.model  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import olmo_core.generate.generation_module
    import olmo_core.train  # noqa: F401

    import spattn_olmoe.cluster.kubernetes
    import spattn_olmoe.cluster.launch
    import spattn_olmoe.cluster.report
    import spattn_olmoe.cluster.slurm
    import spattn_olmoe.data
    import spattn_olmoe.evaluation.evaluate
    import spattn_olmoe.evaluation.model
    import spattn_olmoe.model.hf.export
    import spattn_olmoe.model.hf.importing
    import spattn_olmoe.paper.analyze_heads
    import spattn_olmoe.paper.loss_curves
    import spattn_olmoe.paper.masks
    import spattn_olmoe.paper.page
    import spattn_olmoe.paper.reproduce
    import spattn_olmoe.train.faults
    import spattn_olmoe.train.run

    spattn_olmoe.cluster.node.PROBE = 2**22  # bytes to measure a disk by: 64 times less than else
    sys.dont_write_bytecode = True

"""Checkpoints of every kind of mask, from one short training run: attention has no parameters of its own."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest

from benchmarks.tiny_run import ROOT
from spattn_olmoe import build_pattern
from spattn_olmoe.data import DataConfig, SourceConfig, TokenizerSection, prepare
from spattn_olmoe.errors import user_errors
from spattn_olmoe.evaluation import evaluate
from spattn_olmoe.model.checkpoint_files import write_checksums


@pytest.fixture(scope="session")
def checkpoint_of(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``checkpoint_of(type, **options)``: the trained weights under another attention type."""
    made: dict[str, str] = {}

    def make(type: str, **options: object) -> str:
        key = json.dumps([type, options], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(type) / "step12"
            shutil.copytree(trained, folder)
            config = json.loads((folder / "config.json").read_text())
            mixer = config["model"]["block"]["sequence_mixer"]
            mixer["pattern"] = {"name": type, "band_length": mixer["pattern"]["band_length"], **options}
            (folder / "config.json").write_text(json.dumps(config))
            fingerprint = json.loads((folder / "attention.json").read_text())
            pattern = build_pattern(type, n_heads=4, band_length=32, **options)
            fingerprint["layers"] = [pattern.to_config()] * len(fingerprint["layers"])
            (folder / "attention.json").write_text(json.dumps(fingerprint))
            write_checksums(folder, rank=0, ranks=1)
            made[key] = str(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def held_out_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with a validation split of whole batches of two, in the tokens of ``tiny_data``.

    Pythons differ in the pages of their manuals, and OLMo-core leaves out a batch that is not full.
    """
    folder = tmp_path_factory.mktemp("held_out")
    for share in (0.2, 0.22, 0.24, 0.26, 0.28):
        manifest = prepare(
            DataConfig(
                output=str(folder / f"shards-{share}"),
                sources=[SourceConfig(paths=[str(tiny_data.parent / "corpus.jsonl")])],
                tokenizer=TokenizerSection(identifier=str(tiny_data / "tokenizer.json")),
                sequence_length=32,
                validation_share=share,
            )
        )
        if manifest.count("validation").documents % 2 == 0:
            return manifest.directory
    raise AssertionError("every share gives an odd number of documents")


@pytest.fixture
def evaluate_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``scripts/evaluate.py`` in this process: exit code, output and errors."""
    parse = runpy.run_path(str(ROOT / "scripts/evaluate.py"))["parse"]

    def command(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = 0
        try:
            with user_errors():
                evaluate.main(parse(list(words)))
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return command

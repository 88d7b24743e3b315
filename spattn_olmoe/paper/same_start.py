"""What a run starts from, written down by the run itself: initial weights, order of data, data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from olmo_core.data import NumpyDataLoaderBase
from olmo_core.distributed.utils import all_gather_object, get_full_tensor, get_rank
from olmo_core.train.callbacks import Callback

from ..files import replace_file
from ..json_files import read_json
from ..train.config import ExperimentConfig
from ..train.parts import model_parts
from ..train.shards import data_files, stated_hashes

FILE_NAME = "start.json"
PARTS = ("weights", "order", "data")


@dataclass
class StartRecord(Callback):
    """Writes ``start.json`` into the run's folder before the first step: SHA-256 of

    - ``weights``: names, shapes and values of all parameters;
    - ``order``: the shuffled sequences of the first epoch, with what later epochs and batches follow from;
    - ``data``: the shards' own hashes, as their manifests state them.
    """

    def pre_epoch(self) -> None:
        if self.step > 0:
            return
        weights = hash_weights(model_parts(self.trainer.train_module))
        if get_rank() == 0:
            loader = self.trainer.data_loader
            assert isinstance(loader, NumpyDataLoaderBase)
            start = {
                "weights": weights,
                "order": _hash_order(loader),
                "data": _hash_data(map(str, loader.dataset.paths)),
            }
            replace_file(Path(self.trainer.save_folder) / FILE_NAME, (json.dumps(start, indent=1) + "\n").encode())


def hash_weights(parts: Iterable[torch.nn.Module]) -> str:
    """SHA-256 of a model's parameters, whole also where FSDP or tensor parallelism shares them out. All ranks must call it.

    In the stack ``ddp`` ranks have experts and pipeline stages of their own. The hash is then of what each of them holds: it is
    another one under another layout, as first weights are.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(item for part in parts for item in part.named_parameters()):
        full = get_full_tensor(parameter.detach()).float().cpu().contiguous()
        digest.update(f"{name} {tuple(full.shape)}\n".encode())
        digest.update(full.numpy().tobytes())
    ranks = all_gather_object(digest.hexdigest())
    return ranks[0] if len(set(ranks)) == 1 else hashlib.sha256("\n".join(ranks).encode()).hexdigest()


def _hash_order(loader: NumpyDataLoaderBase) -> str:
    length = loader.dataset.max_sequence_length
    digest = hashlib.sha256(f"seed {loader.seed}, batch {loader.global_batch_size}, length {length}\n".encode())
    digest.update(np.ascontiguousarray(loader.get_global_indices()).tobytes())
    return digest.hexdigest()


def _hash_data(paths: Iterable[str]) -> str:
    files = list(paths)
    known = stated_hashes(files)
    shards = [known[path] for path in sorted(map(Path, files), key=lambda path: (path.parent, path.name))]
    return hashlib.sha256("\n".join(shards).encode()).hexdigest()


def check_same_data(config: ExperimentConfig, start: Mapping[str, Any], done: Path) -> None:
    """Raise unless what was done before was done on the data that lie there now. Data that are gone are not asked for.

    :param start: its record.
    :param done: where it lies.
    """
    try:
        files = data_files(config.dataset)
    except ValueError:
        return
    if start["data"] != (now := _hash_data(files)):
        raise ValueError(
            f"{done}: was trained on other text than dataset.paths={config.dataset.paths} holds now (SHA-256 of the shards' "
            f"{start['data'][:12]}, now {now[:12]}): restore the data, or remove {done} and the run's folder to train again"
        )


def read_start(folder: Path) -> dict[str, str]:
    """The record of a run.

    :raises ValueError: there is none.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing: this run was not started by scripts/reproduce.py; remove {folder}")
    return read_json(path, dict.fromkeys(PARTS, str))


def check_same_start(results: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless all variants of a model and seed started from the same weights, order and data.

    :param results: results of runs, as :func:`spattn_olmoe.paper.train_and_evaluate.result_of` writes them.
    :raises ValueError: which two runs differ, and in what.
    """
    first: dict[tuple[str, int], Mapping[str, Any]] = {}
    for result in results:
        other = first.setdefault((result["model"], result["seed"]), result)
        for part in PARTS:
            if result["start"][part] != other["start"][part]:
                raise ValueError(
                    f"{result['run']} and {other['run']} started from different {part} ({result['start'][part][:12]} and "
                    f"{other['start'][part][:12]}): they cannot be compared; remove both folders and run again"
                )

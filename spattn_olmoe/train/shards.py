"""A run's token shards: the files, whether they are there and agree with the config, and whether they are unchanged."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import numpy as np
from olmo_core.data import NumpyDatasetConfig
from olmo_core.distributed.utils import broadcast_object, get_rank
from olmo_core.io import is_url

from ..data.manifest import Manifest, verify, verify_shard
from ..data.tokenizer import parse_tokenizer
from ..data.writer import Shard
from ..files import matching
from ..json_files import read_json
from ..model.checkpoint import TOKENIZER_FILE
from ..model.fingerprint import FILE_NAME as FINGERPRINT_FILE
from ..ranks import first_problem
from .config import ExperimentConfig
from .evaluators import held_out_datasets

log = logging.getLogger(__name__)

DATA_FILE = "data.json"


def data_files(dataset: NumpyDatasetConfig, key: str = "dataset") -> list[str]:
    """The files of a dataset, patterns expanded.

    :param key: where the dataset stands in the config.
    :raises ValueError: there are none.
    """
    if not dataset.paths:
        if dataset.mix is not None or getattr(dataset, "source_mixture_config", None) is not None:
            return []
        raise ValueError(
            f"{key}.paths is not set: name the token shards, such as {key}.paths=[data/dclm/train-*.bin]; "
            "scripts/prepare_data.py makes them"
        )
    files: list[str] = []
    for path in dataset.paths:
        if is_url(path):
            files.append(path)
            continue
        found = [str(p) for p in matching(path)] if dataset.expand_glob else [path] if Path(path).is_file() else []
        if not found:
            without = "" if key == "dataset" else f"; or set {key.rpartition('.')[0]}.enabled=false"
            raise ValueError(f"{key}.paths: {path} does not exist; scripts/prepare_data.py makes token shards{without}")
        files += found
    return files


def tokenizer_file(config: ExperimentConfig) -> dict[str, str]:
    """The tokenizer that the data's manifest names, by the name under which checkpoints carry it; empty without one."""
    folders = _folders(data_files(config.dataset))
    if not folders:
        return {}
    path = Manifest.load(folders[0]).tokenizer_path
    data = path.read_bytes()
    parse_tokenizer(data, str(path))  # whatever else lies there is copied nowhere
    return {TOKENIZER_FILE: data.decode("utf-8")}


def _folders(files: Iterable[str]) -> list[Path]:
    """The local folders that hold data files, each with its manifest."""
    return sorted({Path(file).parent for file in files if not is_url(file)})


def check_data(config: ExperimentConfig) -> None:
    """Raise unless the data, held-out data too, are there and agree with the config, as far as sizes and a few ids tell.

    All must be of one tokenizer, that of the first folder, which checkpoints carry.
    """
    T = config.sequence_length
    tokenizer: Path | None = None
    verified: set[Path] = set()
    for key, dataset, length in [
        ("dataset", config.dataset, T),
        *((key, dataset, None) for key, dataset in held_out_datasets(config.trainer)),
    ]:
        for folder in _folders(data_files(dataset, key)):
            if folder in verified and dataset.tokenizer == config.dataset.tokenizer:
                continue
            manifest = verify(
                folder,
                vocab_size=dataset.tokenizer.vocab_size,
                eos_token_id=dataset.tokenizer.eos_token_id,
                dtype=np.dtype(dataset.get_dtype()).name,
                tokenizer=tokenizer,
                sequence_length=length,
            )
            tokenizer = tokenizer or manifest.tokenizer_path
            verified.add(folder)
    _check_batch(config)


def data_tokens(config: ExperimentConfig) -> int | None:
    """Tokens of all whole sequences of a run's data, as manifests count them; None where files have no manifest.

    :raises ValueError: there are no data.
    """
    files, T = [Path(file) for file in data_files(config.dataset)], config.sequence_length
    known = {folder / shard.path: shard.tokens for folder in _folders(map(str, files)) for shard in _shards(folder)}
    if not files or any(path not in known for path in files):
        return None  # the data loader counts them later
    return sum(known[path] // T * T for path in files)


def _check_batch(config: ExperimentConfig) -> None:
    """Raise where all data together are less than one batch: epochs without a step would follow each other for ever."""
    tokens = data_tokens(config)
    if tokens is not None and tokens < config.data_loader.global_batch_size:
        raise ValueError(
            f"data_loader.global_batch_size={config.data_loader.global_batch_size} (tokens) is more than the {tokens} tokens of "
            f"all whole sequences of dataset.paths: lower it or prepare more text"
        )


def _shards(folder: Path) -> list[Shard]:
    return Manifest.load(folder).shards


def shard_hashes(config: ExperimentConfig) -> list[list[str]]:
    """Name and SHA-256 of a run's data files, in order, as their manifests say; every checkpoint carries them."""
    files = data_files(config.dataset)
    known = stated_hashes(files)
    paths = [Path(file) for file in files if not is_url(file)]
    return [[path.name, known.get(path, "unknown to the manifest")] for path in paths]


def stated_hashes(files: list[str]) -> dict[Path, str]:
    """SHA-256 of all shards beside local data files, as their manifests say."""
    return {folder / shard.path: shard.sha256 for folder in _folders(files) for shard in Manifest.load(folder).shards}


def verify_shards(config: ExperimentConfig, checkpoint: str | None, *, everything: bool) -> None:
    """Compare shards with their SHA-256, the work shared by all ranks, which call it together.

    :param checkpoint: read the shards that have changed since it was saved: a replaced file need not have another size.
    :param everything: read all of them.
    :raises ValueError: one differs.
    """
    # One rank looks: all must have the same list, and thousands need not ask for the same times.
    shards = broadcast_object(_to_verify(config, checkpoint, everything) if get_rank() == 0 else [])
    if shards:
        log.info("Comparing %d data shards with their SHA-256...", len(shards))
    if problem := first_problem(shards, _shard_problem):
        raise ValueError(problem)


def _to_verify(config: ExperimentConfig, checkpoint: str | None, everything: bool) -> list[tuple[Manifest, Shard]]:
    since = Path(checkpoint, FINGERPRINT_FILE) if checkpoint is not None and not is_url(checkpoint) else None
    saved = since.stat().st_ctime if since is not None and since.exists() else None
    datasets = {"dataset": config.dataset, **dict(held_out_datasets(config.trainer))}
    files = [file for key, dataset in datasets.items() for file in data_files(dataset, key)]
    return [
        (manifest, shard)
        for manifest in map(Manifest.load, _folders(files))
        for shard in manifest.shards
        if everything or (saved is not None and (manifest.directory / shard.path).stat().st_ctime > saved)
    ]


def _shard_problem(item: tuple[Manifest, Shard]) -> str | None:
    try:
        verify_shard(*item)
    except ValueError as error:
        return str(error)
    return None


def check_same_data(config: ExperimentConfig, checkpoint: str) -> None:
    """Raise unless a checkpoint was trained on the shards that this run reads."""
    path = Path(checkpoint, DATA_FILE)
    if getattr(config.data_loader, "ignore_fingerprint_mismatch", False) or not path.exists():
        return
    there, here = read_json(path, [[str]]), shard_hashes(config)
    if there == here:
        return
    if any(len(shard) != 2 for shard in there):
        raise ValueError(f"{path} is damaged: restore it")
    before, now = next(pair for pair in zip_longest(there, here) if pair[0] != pair[1])
    raise ValueError(
        f"dataset.paths: checkpoint {checkpoint} was trained on {_named(before)} where there is {_named(now)} now: restore the "
        "data, or set data_loader.ignore_fingerprint_mismatch=true to continue with other text"
    )


def _named(shard: list[str] | None) -> str:
    return f"{shard[0]} (SHA-256 {shard[1]})" if shard is not None else "nothing"

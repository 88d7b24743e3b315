"""From a config to a run: check what can be checked before it costs anything, build, resume or start, train."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from typing import Any

import torch
from olmo_core.distributed.utils import broadcast_object, get_rank
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.io import is_url
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerConfig
from olmo_core.train import LoadStrategy, Trainer, prepare_training_environment
from olmo_core.train.callbacks import ConfigSaverCallback, ConsoleLoggerCallback, SpeedMonitorCallback
from olmo_core.train.common import DurationUnit
from olmo_core.utils import seed_all

from ..lock import Lock
from ..model.checkpoint_files import Checksums, find_checkpoint
from ..model.fingerprint import FILE_NAME as FINGERPRINT_FILE
from ..model.fingerprint import Fingerprint, check_checkpoint
from ..model.remedies import apply_remedies
from ..model.section import AUTO, BASELINE, layer_patterns
from ..model.stack import Stack, require_stack
from ..model.unpickling import reading
from ..patterns.head_order import NATURAL
from ..ranks import launched
from . import ddp, output
from .allocator import keep_freed_memory
from .checkpoints import CheckpointFiles, is_own
from .config import ExperimentConfig
from .dry_run import in_a_line
from .evaluators import check_evaluators, check_not_empty, held_out_datasets, label_all_files
from .faults import ShieldDataWorkers, SkipNonFinite, survive_evaluations
from .finite import find_non_finite
from .layout import check_layout
from .metrics import MetricsFile, run_folder
from .progress import Progress, Throughput
from .resume import keep_seeds, options_of_the_config
from .shards import DATA_FILE, check_data, check_same_data, data_files, shard_hashes, tokenizer_file, verify_shards
from .watch import Heartbeat, Stragglers

log = logging.getLogger(__name__)


def prepare(config: ExperimentConfig, *, verify_data: bool = False, verbose: bool = False) -> Trainer:
    """Everything up to the first step. Call it once per process; then ``trainer.fit()`` trains, or resumes training.

    :param verify_data: also compare the data's hashes with the manifest's, which reads all of it.
    :param verbose: show all messages, OLMo-core's too, and not only write them to ``train.log``.
    :raises ValueError: the config, the data or the checkpoint does not fit; nothing but the lock has been written
        then.
    :raises ValueError: another run writes the save folder.
    """
    check(config)
    check_layout(config, *launched())
    if config.stack == Stack.ddp:
        ddp.check_machine(config)
    check_data(config)
    if (there := config.trainer.load_path) is not None and not is_url(there) and not os.path.isdir(there):
        raise ValueError(f"trainer.load_path={there}: there is no such folder")
    output.begin(verbose=verbose)
    apply_remedies()
    if not torch.cuda.is_available():
        keep_freed_memory()
    prepare_training_environment(
        seed=config.init_seed, backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    )
    claim(config.trainer.save_folder)
    checkpoint = checkpoint_to_load(config)
    config = check_resume(config, checkpoint)
    verify_shards(config, checkpoint, everything=verify_data)
    log.info(in_a_line(config))
    trainer = build_trainer(config)
    passed_over: list[str] = []
    output.open_log(run_folder(trainer))
    while checkpoint is not None:
        load(trainer, checkpoint)
        if (problem := find_non_finite(trainer.train_module)) is None:
            break
        log.warning("%s is passed over: its %s is not finite", checkpoint, problem)
        passed_over.append(checkpoint)
        checkpoint = checkpoint_to_load(config, passing_over=passed_over)
        if checkpoint is None:
            raise ValueError(
                f"no checkpoint to resume from is finite: {', '.join(passed_over)}; start in another folder"
            )
    if checkpoint is not None:
        keep_seeds(trainer, checkpoint)
    check_work_left(trainer)
    return trainer


def check_work_left(trainer: Trainer) -> None:
    """Raise where there is nothing to train on, or a run is already past its own end.

    :raises ValueError: the data is smaller than a batch, or ``trainer.max_duration`` less than what was trained.
    """
    loader = trainer.data_loader
    if loader.total_batches == 0:
        raise ValueError(
            f"data_loader.global_batch_size={loader.global_batch_size} (tokens) is more than the data holds in whole sequences: "
            "lower it or prepare more text"
        )
    end, step, tokens = trainer.max_duration, trainer.global_step, trainer.global_train_tokens_seen
    done = {DurationUnit.steps: step, DurationUnit.tokens: tokens}.get(end.unit)
    if done is not None and end.value < done:
        raise ValueError(
            f"trainer.max_duration.value={end.value} {end.unit}: the checkpoint is at {done} already: raise it, or give the run "
            "another trainer.save_folder"
        )


def claim(folder: str) -> None:
    """Lock the save folder of a run until this process ends. All ranks call it together.

    :raises ValueError: on every rank, where another run writes the folder.
    """
    error = None
    if get_rank() == 0:
        if is_url(folder):
            log.warning("nothing keeps a second run from writing %s too: only folders have a lock", folder)
        else:
            try:
                Lock(folder)
            except (ValueError, OSError) as raised:
                error = str(raised)
    if (error := broadcast_object(error)) is not None:
        raise ValueError(error)


def build_trainer(config: ExperimentConfig) -> Trainer:
    """The trainer of a run, with everything attached. The process group must exist."""
    # Weights are drawn by the train module, on every rank alike: nothing may draw between the seed and them.
    seed_all(config.init_seed)
    model_config = config.model_with_attention()
    of_ddp = config.stack == Stack.ddp
    built = ddp.model(config) if of_ddp else model_config
    model = built.build(init_device="meta")  # sharding comes first, so that no rank ever holds the whole model
    train_module = (ddp.train_module(config) if of_ddp else config.train_module).build(model)
    dataset = config.dataset.build()
    data_loader = config.data_loader.build(dataset, dp_process_group=train_module.dp_process_group)
    trainer_config = config.trainer.copy()  # the config that is saved must be the user's, without what is added here
    for name, callback in {
        "console_logger": Progress(metrics_log_interval=trainer_config.metrics_collect_interval),
        "speed_monitor": Throughput(),
        "metrics_file": MetricsFile(),
        "config_saver": ConfigSaverCallback(),
        "heartbeat": Heartbeat(),
        "stragglers": Stragglers(),
    }.items():
        if not _has(trainer_config.callbacks.values(), type(callback)):
            trainer_config.callbacks.setdefault(name, callback)
    # What it takes to load a checkpoint by itself, and to refuse one of another attention type or other data.
    files = {
        FINGERPRINT_FILE: Fingerprint.of(model_config).to_json(),
        DATA_FILE: json.dumps(shard_hashes(config), indent=1),
        **tokenizer_file(config),
    }
    trainer_config.callbacks["checkpoint_files"] = CheckpointFiles(files)
    trainer_config.callbacks["checksums"] = Checksums()
    trainer_config.callbacks["shield_data_workers"] = ShieldDataWorkers()
    label_all_files(
        trainer_config, {key: data_files(held_out, key) for key, held_out in held_out_datasets(trainer_config)}
    )
    trainer = trainer_config.build(train_module, data_loader)
    if of_ddp:
        ddp.save_synchronously(trainer)
    check_not_empty(trainer)
    survive_evaluations(trainer)
    # The saver's config is what a checkpoint is rebuilt from, so it has the patterns in its model, not the section alone.
    saver = next(c for c in trainer.callbacks.values() if isinstance(c, ConfigSaverCallback))
    saver.config = config.replace(model=model_config).as_config_dict()
    return trainer


def _has(callbacks: Any, kind: type) -> bool:
    """Whether a callback of a kind is configured: our own classes stand in for OLMo-core's, and the other way round."""
    bases = (ConsoleLoggerCallback, SpeedMonitorCallback)
    wanted = next((base for base in bases if issubclass(kind, base)), kind)
    return any(isinstance(callback, wanted) for callback in callbacks)


# ---- checks ----------------------------------------------------------------------------------------------------------


def check(config: ExperimentConfig) -> None:
    """Raise a ValueError for what can be seen from the config alone, on any machine."""
    model = config.model_with_attention()
    T, module = config.sequence_length, config.train_module
    if module.max_sequence_length < T:
        raise ValueError(
            f"train_module.max_sequence_length={module.max_sequence_length} is less than dataset.sequence_length={T}: raise it"
        )
    if module.rank_microbatch_size % T:
        raise ValueError(
            f"train_module.rank_microbatch_size={module.rank_microbatch_size} (tokens) must be a multiple of "
            f"dataset.sequence_length={T}"
        )
    if config.data_loader.global_batch_size % T:
        raise ValueError(
            f"data_loader.global_batch_size={config.data_loader.global_batch_size} (tokens) must be a multiple of "
            f"dataset.sequence_length={T}"
        )
    skipping = any(isinstance(c, SkipNonFinite) and c.enabled for c in config.trainer.callbacks.values())
    if skipping and module.max_grad_norm is None:
        raise ValueError(
            "train_module.max_grad_norm is not set, and bad steps are known by the gradient's norm: set it (1.0e9 never clips), "
            "or trainer.callbacks.skip_non_finite.enabled=false"
        )
    for key, folder in (("save_folder", config.trainer.save_folder), ("load_path", config.trainer.load_path)):
        if folder is not None and (not folder.strip() or "\0" in folder or len(folder) > 4096):
            raise ValueError(f"trainer.{key}={folder[:40]!r}: must name a folder")
    for key in ("eos_token_id", "pad_token_id"):
        if getattr(config.dataset.tokenizer, key) >= config.dataset.tokenizer.vocab_size:
            raise ValueError(
                f"dataset.tokenizer.{key}={getattr(config.dataset.tokenizer, key)}: must be below "
                f"dataset.tokenizer.vocab_size={config.dataset.tokenizer.vocab_size}"
            )
    _check_experts(model)
    vocabulary = config.dataset.tokenizer.vocab_size
    if vocabulary > config.model.vocab_size:
        raise ValueError(
            f"dataset.tokenizer.vocab_size={vocabulary} is more than model.vocab_size={config.model.vocab_size}: "
            f"set model.vocab_size to at least {config.dataset.tokenizer.padded_vocab_size()}"
        )
    check_evaluators(config.trainer, module, list(layer_patterns(model)))
    if config.stack == Stack.ddp:
        ddp.check(config)


def _check_experts(model: TransformerConfig) -> None:
    """Raise where a token is to be sent to more experts than there are."""
    assert isinstance(model.block, TransformerBlockConfig)  # attach() refuses others
    for block in (model.block, *(model.block_overrides or {}).values()):
        moe = block.feed_forward_moe
        if moe is not None and moe.router.top_k > moe.num_experts:
            raise ValueError(
                f"model.block.feed_forward_moe.router.top_k={moe.router.top_k} is more than num_experts={moe.num_experts}: "
                "lower it"
            )


# ---- the checkpoint to resume from ------------------------------------------------------------------------------------


def checkpoint_to_load(
    config: ExperimentConfig, *, verify: bool = True, passing_over: Collection[str] = ()
) -> str | None:
    """The checkpoint to load: the newest intact one of the save folder, else of ``trainer.load_path``.

    All ranks call it together. ``verify`` and ``passing_over`` as in :func:`.find_checkpoint`.

    :raises ValueError: ``trainer.load_path`` holds none, and the save folder neither.
    """
    trainer = config.trainer
    if trainer.no_checkpoints or trainer.load_strategy == LoadStrategy.never:
        return None
    for folder in (trainer.save_folder, trainer.load_path):
        if folder is None:
            continue
        if (found := find_checkpoint(folder, verify=verify, passing_over=passing_over)) is not None:
            return found
    if trainer.load_path is not None and not passing_over:
        raise ValueError(
            f"trainer.load_path={trainer.load_path}: neither a complete checkpoint nor a folder of checkpoints (stepN/)"
        )
    return None


def check_resume(config: ExperimentConfig, checkpoint: str | None) -> ExperimentConfig:
    """Raise unless a checkpoint has this config's attention, shape and data. All ranks call it together.

    :returns: the config, with the checkpoint's order of heads where it is left open.
    """
    error = changed = None
    if checkpoint is not None and get_rank() == 0:
        try:
            require_stack(checkpoint, config.stack)
            config = with_order_of(config, checkpoint)
            changed = check_checkpoint(
                checkpoint, config.model_with_attention(), allow_attention_change=config.allow_attention_change
            )
            if is_own(config.trainer.save_folder, checkpoint):
                check_same_data(config, checkpoint)
        except (ValueError, OLMoConfigurationError) as raised:
            error = str(raised)
    error, changed, attention = broadcast_object((error, changed, config.attention))
    if error is not None:
        raise ValueError(error)
    if changed is not None:
        log.warning("allow_attention_change=true: %s", changed)
    return config.replace(attention=attention)


def with_order_of(config: ExperimentConfig, checkpoint: str | None) -> ExperimentConfig:
    """A config whose ``attention.head_order: auto`` is what a checkpoint of its attention type has.

    The order is part of the function that a model computes, so a run keeps it under any layout.
    """
    fingerprint = Fingerprint.read(checkpoint) if checkpoint is not None else None
    if fingerprint is None or config.attention.get("head_order", AUTO) not in (AUTO, None):
        return config
    orders = (
        layer.get("head_order", NATURAL)
        for layer in fingerprint.layers
        if layer["name"] == config.attention.get("type", BASELINE)
    )
    order = next(orders, AUTO)
    return config.replace(attention={**config.attention, "head_order": order})


def load(trainer: Trainer, checkpoint: str) -> None:
    """Load the checkpoint that was found intact, before the trainer would look for one by itself."""
    own = is_own(trainer.save_folder, checkpoint)
    if own and trainer.load_path is not None:
        log.warning("trainer.load_path=%s is passed over: the run resumes from %s", trainer.load_path, checkpoint)
    log.info("resuming from %s", checkpoint)
    whole = True if own else None  # as Trainer.fit: all of a run's own state, else as the trainer is configured
    with reading(checkpoint), options_of_the_config(trainer):
        trainer.load_checkpoint(checkpoint, load_trainer_state=whole, load_optim_state=whole)

"""From a config to a run: check what can be checked before it costs anything, build, resume or start, train."""

from __future__ import annotations

import json
import logging
import os
from fnmatch import fnmatch
from typing import Any

import torch
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.distributed.utils import broadcast_object, get_rank
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.io import is_url, normalize_path
from olmo_core.nn.transformer import TransformerActivationCheckpointingMode, TransformerBlockConfig
from olmo_core.train import LoadStrategy, Trainer, prepare_training_environment
from olmo_core.train.callbacks import ConfigSaverCallback, ConsoleLoggerCallback, SpeedMonitorCallback
from olmo_core.train.train_module import TransformerTrainModuleConfig
from olmo_core.utils import seed_all

from ..lock import Lock
from ..model.checkpoint_files import Checksums, find_checkpoint
from ..model.fingerprint import FILE_NAME as FINGERPRINT_FILE
from ..model.fingerprint import Fingerprint, check_checkpoint
from ..model.mixer import PatternAttentionConfig
from ..model.remedies import apply_remedies
from ..model.section import AUTO, layer_patterns
from ..patterns.head_order import NATURAL
from .checkpoints import CheckpointFiles
from .config import ExperimentConfig
from .evaluators import check_evaluators, check_not_empty, held_out_datasets, label_all_files
from .faults import ShieldDataWorkers, SkipNonFinite, survive_evaluations
from .metrics import MetricsFile
from .progress import Progress, Throughput
from .shards import DATA_FILE, check_data, check_same_data, data_files, shard_hashes, tokenizer_file, verify_shards

log = logging.getLogger(__name__)


def prepare(config: ExperimentConfig, *, verify_data: bool = False) -> Trainer:
    """Everything up to the first step. Call it once per process; then ``trainer.fit()`` trains, or goes on training.

    :param verify_data: also compare the data's hashes with the manifest's, which reads all of it.
    :raises ValueError: the config, the data or the checkpoint does not fit; nothing but the lock has been written
        then.
    :raises ValueError: another run writes the save folder.
    """
    check(config)
    check_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_data(config)
    apply_remedies()
    prepare_training_environment(
        seed=config.init_seed, backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    )
    claim(config.trainer.save_folder)
    checkpoint = checkpoint_to_load(config)
    config = check_resume(config, checkpoint)
    verify_shards(config, checkpoint, everything=verify_data)
    trainer = build_trainer(config)
    if checkpoint is not None:
        load(trainer, checkpoint)
    return trainer


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
    seed_all(config.init_seed)
    model_config = config.model_with_attention()
    model = model_config.build(init_device="meta")
    train_module = config.train_module.build(model)
    dataset = config.dataset.build()
    data_loader = config.data_loader.build(dataset, dp_process_group=train_module.dp_process_group)
    trainer_config = config.trainer.copy()
    for name, callback in {
        "console_logger": Progress(metrics_log_interval=trainer_config.metrics_collect_interval),
        "speed_monitor": Throughput(),
        "metrics_file": MetricsFile(),
        "config_saver": ConfigSaverCallback(),
    }.items():
        if not _has(trainer_config.callbacks.values(), type(callback)):
            trainer_config.callbacks.setdefault(name, callback)
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
    check_not_empty(trainer)
    survive_evaluations(trainer)
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
    vocabulary = config.dataset.tokenizer.vocab_size
    if vocabulary > config.model.vocab_size:
        raise ValueError(
            f"dataset.tokenizer.vocab_size={vocabulary} is more than model.vocab_size={config.model.vocab_size}: "
            f"set model.vocab_size to at least {config.dataset.tokenizer.padded_vocab_size()}"
        )
    check_evaluators(config.trainer, module, list(layer_patterns(model)))


def check_layout(config: ExperimentConfig, world_size: int) -> None:
    """Raise unless the parallel layout fits a number of ranks."""
    module, T = config.train_module, config.sequence_length
    if module.pp_config is not None:
        raise ValueError(
            "train_module.pp_config: OLMo-core 3.0.0's pipelines train no model with this train module (its stages reject the "
            "loss that it hands them): leave it unset and use fsdp or hsdp, with tp_config or cp_config"
        )
    degree = 1
    for name in ("tp_config", "cp_config"):
        part = getattr(module, name)
        if part is None:
            continue
        if part.degree < 1 or world_size % (degree * part.degree):
            raise ValueError(
                f"train_module.{name}.degree={part.degree} does not divide the {world_size // degree} ranks there are for it: "
                f"start a multiple of {degree * part.degree} ranks or lower the degree"
            )
        degree *= part.degree
    parallel = any(x is not None for x in (module.tp_config, module.cp_config, module.ep_config))
    if world_size > 1 and module.dp_config is None:
        raise ValueError(
            f"train_module.dp_config is not set but {world_size} ranks were started: each would train a model of its own; "
            "set train_module.dp_config.name=fsdp"
        )
    dp = module.dp_config
    if dp is not None and dp.name == DataParallelType.ddp and module.tp_config is not None:
        raise ValueError(
            "train_module.dp_config.name=ddp with tp_config trains nothing in OLMo-core 3.0.0 (the gradient norm is 0): use fsdp"
        )
    if parallel and dp is None:
        raise ValueError("train_module.dp_config must be set with any other parallelism: set its name to fsdp")
    ranks = world_size // degree
    _check_shards(config)
    _check_data_parallel(module, ranks)
    _check_recomputation(config)
    if config.data_loader.global_batch_size % (ranks * T):
        raise ValueError(
            f"data_loader.global_batch_size={config.data_loader.global_batch_size} (tokens) must be a multiple of "
            f"{ranks} data-parallel ranks x {T} tokens = {ranks * T}"
        )
    per_rank = config.data_loader.global_batch_size // ranks
    if per_rank % module.rank_microbatch_size:
        raise ValueError(
            f"train_module.rank_microbatch_size={module.rank_microbatch_size} (tokens) must divide the {per_rank} tokens "
            f"that each of {ranks} data-parallel ranks takes of a batch; set it to {per_rank} or a divisor"
        )


def _check_shards(config: ExperimentConfig) -> None:
    """Raise where tensor, context or expert parallelism would have to cut a head, a token or an expert."""
    module = config.train_module
    if module.cp_config is not None and module.cp_config.ring is not None:
        raise ValueError(
            "train_module.cp_config.ring knows only the causal mask: use Ulysses, train_module.cp_config.uly={} without ring"
        )
    model = config.model_with_attention()
    assert isinstance(model.block, TransformerBlockConfig)  # attach() refuses others
    blocks = [model.block, *(model.block_overrides or {}).values()]
    tp = module.tp_config.degree if module.tp_config is not None else 1
    cp = module.cp_config.degree if module.cp_config is not None else 1
    ep = module.ep_config.degree if module.ep_config is not None else 1
    sequence, heads, experts = [("dataset.sequence_length", config.sequence_length)], [], []
    for block in blocks:
        mixer, moe = block.sequence_mixer, block.feed_forward_moe
        assert isinstance(mixer, PatternAttentionConfig)
        heads += [("n_heads", mixer.n_heads), ("n_kv_heads", mixer.n_kv_heads or mixer.n_heads)]
        experts += [("num_experts", moe.num_experts)] if moe is not None else []
    both = f"tp_config.degree={tp} x cp_config.degree={cp}" if tp > 1 < cp else ""
    for degree, name, parts in (
        (tp * cp, both or (f"cp_config.degree={cp}" if cp > 1 else f"tp_config.degree={tp}"), heads + sequence),
        (tp, f"tp_config.degree={tp}", experts),
        (ep, f"ep_config.degree={ep}", experts),
    ):
        for key, size in parts:
            if size % degree:
                raise ValueError(f"train_module.{name} does not divide {key}={size}: lower the degree")


def _check_data_parallel(module: TransformerTrainModuleConfig, ranks: int) -> None:
    """Raise unless ``ranks`` data-parallel ranks can be the replicas, shards and expert groups that are asked for."""
    dp, ep = module.dp_config, module.ep_config
    hsdp = dp is not None and dp.name == DataParallelType.hsdp
    if dp is not None and hsdp:
        for key in ("shard_degree", "num_replicas"):
            part = getattr(dp, key)
            if part is not None and (part < 1 or ranks % part):
                raise ValueError(
                    f"train_module.dp_config.{key}={part} does not divide the {ranks} data-parallel ranks: "
                    "set it to a divisor of them"
                )
    if ep is None:
        return
    for other in ("tp_config", "cp_config"):
        if getattr(module, other) is not None:
            raise ValueError(
                f"train_module.ep_config with {other} does not work in OLMo-core 3.0.0: leave one of them unset"
            )
    if dp is None or not hsdp or dp.shard_degree != ep.degree:
        found = f"name={dp.name} and shard_degree={dp.shard_degree}" if dp is not None else "none"
        raise ValueError(
            f"train_module.ep_config.degree={ep.degree} needs train_module.dp_config.name=hsdp and "
            f"train_module.dp_config.shard_degree={ep.degree}, not {found}"
        )


def _check_recomputation(config: ExperimentConfig) -> None:
    """Raise unless activation checkpointing leaves a mixture of experts and context parallelism intact."""
    module, Mode = config.train_module, TransformerActivationCheckpointingMode
    ac = module.ac_config
    if ac is None:
        return
    instead = "use mode=selected_modules with modules=[blocks.*.feed_forward_moe.experts,blocks.*.attention]"
    if ac.mode == Mode.budget and not module.compile_model:
        raise ValueError(
            f"train_module.ac_config.mode=budget does nothing without train_module.compile_model=true: set it, or {instead}"
        )
    if ac.mode in (Mode.full, Mode.selected_blocks, Mode.selected_ops):
        raise ValueError(
            f"train_module.ac_config.mode={ac.mode} runs the router again in the backward pass, which counts its losses "
            f"twice in OLMo-core 3.0.0: {instead}"
        )
    for layer in range(config.model.n_layers):
        for part in ("", ".feed_forward_moe", ".feed_forward_moe.router"):
            if any(fnmatch(f"blocks.{layer}{part}", pattern) for pattern in ac.modules or ()):
                raise ValueError(
                    f"train_module.ac_config.modules={ac.modules} matches blocks.{layer}{part} and with it the router, whose "
                    "losses would be counted twice: name the experts and the attention, "
                    "modules=[blocks.*.feed_forward_moe.experts,blocks.*.attention]"
                )
        if module.cp_config is not None and any(fnmatch(f"blocks.{layer}.attention", p) for p in ac.modules or ()):
            raise ValueError(
                f"train_module.ac_config.modules={ac.modules} matches blocks.{layer}.attention, which OLMo-core 3.0.0 cannot "
                "recompute under cp_config: leave it out"
            )


# ---- the checkpoint to go on from ------------------------------------------------------------------------------------


def checkpoint_to_load(config: ExperimentConfig, *, verify: bool = True) -> str | None:
    """The checkpoint to load: the newest intact one of the save folder, else of ``trainer.load_path``.

    All ranks call it together. ``verify`` as in :func:`.find_checkpoint`.
    """
    trainer = config.trainer
    if trainer.no_checkpoints or trainer.load_strategy == LoadStrategy.never:
        return None
    for folder in (trainer.save_folder, trainer.load_path):
        if folder is not None and (found := find_checkpoint(folder, verify=verify)) is not None:
            return found
    return None


def check_resume(config: ExperimentConfig, checkpoint: str | None) -> ExperimentConfig:
    """Raise unless a checkpoint has this config's attention, shape and data. All ranks call it together.

    :returns: the config, with the checkpoint's order of heads where it is left open.
    """
    error = changed = None
    if checkpoint is not None and get_rank() == 0:
        try:
            config = with_order_of(config, checkpoint)
            changed = check_checkpoint(
                checkpoint, config.model_with_attention(), allow_attention_change=config.allow_attention_change
            )
            if _is_own(config.trainer.save_folder, checkpoint):
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

    The order is part of the function that a model computes, so a run goes on with it under any layout.
    """
    fingerprint = Fingerprint.read(checkpoint) if checkpoint is not None else None
    if fingerprint is None or config.attention.get("head_order", AUTO) not in (AUTO, None):
        return config
    orders = (layer.get("head_order", NATURAL) for layer in fingerprint.layers if layer["name"] == config.plan().type)
    order = next(orders, AUTO)
    return config.replace(attention={**config.attention, "head_order": order})


def load(trainer: Trainer, checkpoint: str) -> None:
    """Load the checkpoint that was found intact, before the trainer would look for one by itself."""
    own = _is_own(trainer.save_folder, checkpoint)
    if own and trainer.load_path is not None:
        log.warning("trainer.load_path=%s is passed over: the run goes on from %s", trainer.load_path, checkpoint)
    whole = True if own else None  # as Trainer.fit: all of a run's own state, else as the trainer is configured
    trainer.load_checkpoint(checkpoint, load_trainer_state=whole, load_optim_state=whole)


def _is_own(save_folder: str, checkpoint: str) -> bool:
    """Whether a checkpoint is one of the run's own."""
    return str(checkpoint).startswith(str(normalize_path(save_folder)).rstrip("/") + "/")

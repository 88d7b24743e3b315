"""Complete checkpoints of the tiny model with random weights. Benchmarks and tests share them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from olmo_core.distributed.checkpoint import save_model_and_optim_state
from olmo_core.nn.transformer import Transformer, TransformerConfig

from spattn_olmoe.model import apply_remedies, with_attention
from spattn_olmoe.model.checkpoint_files import write_checksums
from spattn_olmoe.model.fingerprint import FILE_NAME, Fingerprint
from spattn_olmoe.train import ExperimentConfig

from .tiny import tiny, write_data

N = 48
"""Band length and length of training."""


def write_checkpoint(
    folder: Path, section: dict[str, Any], n_kv_heads: int | None = None, d_model: int = 64
) -> Transformer:
    """A complete checkpoint of random weights, large enough for attention to matter. Returns its model."""
    apply_remedies()
    data = write_data(folder.parent / "data")
    experiment = tiny(
        f"model.d_model={d_model}",
        f"dataset.sequence_length={N}",
        f"dataset.tokenizer.identifier={data}/tokenizer.json",
        f"model.block.sequence_mixer.n_kv_heads={'null' if n_kv_heads is None else n_kv_heads}",
    )
    base = experiment.model
    config = with_attention(base, band_length=N, **section)
    model = config.build().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or parameter.numel() > 64:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            else:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    save(folder, experiment, config, model)
    return model


def save(folder: Path, experiment: ExperimentConfig, config: TransformerConfig, model: Transformer) -> None:
    """Write the weights of an experiment's model as a complete checkpoint of no steps; checksums are of all that is there."""
    save_model_and_optim_state(folder / "model_and_optim", model)
    (folder / "train").mkdir()
    torch.save({}, folder / "train" / "rank0.pt")
    (folder / ".metadata.json").write_text('{"version": "3"}')
    (folder / "config.json").write_text(json.dumps(experiment.replace(model=config).as_config_dict()))
    (folder / FILE_NAME).write_text(Fingerprint.of(config).to_json())
    write_checksums(folder, rank=0, ranks=1)

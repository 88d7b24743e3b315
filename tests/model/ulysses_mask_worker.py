"""Probes a model whose sequence two ranks share by Ulysses. torchrun ulysses_mask_worker.py OUT.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SCRIPT = Path(__file__)


def main() -> None:
    import torch
    import torch.distributed as dist
    from olmo_core.distributed.utils import get_rank, get_world_size
    from olmo_core.nn.attention.ring import UlyssesContextParallelStyle
    from olmo_core.train import prepare_training_environment, teardown_training_environment
    from torch.distributed import init_device_mesh

    from benchmarks.tiny import HEADS, VOCAB, tiny
    from spattn_olmoe.model import apply_remedies, with_attention
    from spattn_olmoe.model.section import layer_patterns
    from tests.model.mask_probe import only_head, probes, wrong_pairs

    apply_remedies()
    prepare_training_environment(seed=0, backend="gloo")
    torch.manual_seed(0)
    config = with_attention(tiny("model.d_model=64").model, band_length=48, type="spattention", layers=[1])
    model = config.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 if parameter.dim() > 1 or parameter.numel() > 64 else 1)
    mesh = init_device_mesh("cpu", (get_world_size(),), mesh_dim_names=("cp",))
    model.apply_cp(mesh["cp"], uly=UlyssesContextParallelStyle())
    blocks = [block.attention for block in model.blocks.values()]
    ids = torch.randint(2, VOCAB, (1, 40))

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens)  # of this rank's part of the sequence
        assert logits.shape[1] == tokens.shape[1] // get_world_size()
        parts = [torch.empty_like(logits) for _ in range(get_world_size())]
        dist.all_gather(parts, logits.contiguous())
        return torch.cat(parts, dim=1)

    def probe() -> list[str]:
        originals, wrong = [block.w_out.weight.detach().clone() for block in blocks], []
        patterns = list(layer_patterns(config))
        for layer, head in probes(patterns):
            for block, kept in zip(blocks, only_head(originals, layer, head, HEADS), strict=True):
                block.w_out.weight.data.copy_(kept)
            wrong += wrong_pairs(logits_of, ids, patterns[layer], head)
        for block, original in zip(blocks, originals, strict=True):
            block.w_out.weight.data.copy_(original)
        return wrong

    found = {"correct": probe()}
    for block in blocks:  # as if every rank held the first heads
        block.backend.head_offset = -get_rank() * (HEADS // get_world_size())
    found["heads forgotten"] = probe()
    if get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    teardown_training_environment()


if __name__ == "__main__":
    main()

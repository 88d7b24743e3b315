"""A random "published" OLMoE comes in and goes out again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeForCausalLM

from benchmarks.tiny import BASE, TINY, VOCAB, tiny
from benchmarks.tiny_checkpoint import N
from spattn_olmoe.model.checkpoint import Checkpoint
from spattn_olmoe.model.hf.export import Published, export
from spattn_olmoe.model.hf.importing import import_published


def bring_in(source: Path, to: Path, *overrides: str):
    experiment = tiny("model.d_model=64", f"dataset.sequence_length={N}", *overrides)
    import_published(source, to, experiment.as_config_dict(), experiment.model, yaml="tiny.yaml")
    return Checkpoint.open(to)


@pytest.fixture(scope="session")
def published(exported, tmp_path_factory) -> Path:
    """bfloat16 in several files, one tensor an expert, with the config of 2024."""
    pair = exported({"type": "standard"})
    folder = tmp_path_factory.mktemp("published") / "OLMoE"
    export(pair.checkpoint, folder, dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    for key in ("rms_norm_eps", "rope_parameters", "bos_token_id"):
        del config[key]
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_logits_are_exactly_those_of_transformers(published, tmp_path):
    checkpoint = bring_in(published, tmp_path / "imported")
    assert {layer["name"] for layer in checkpoint.layers} == {"standard"}
    ids = torch.randint(2, VOCAB, (2, 40), generator=torch.Generator().manual_seed(2))
    theirs = OlmoeForCausalLM.from_pretrained(published, dtype=torch.float32, attn_implementation="sdpa").eval()
    logits = theirs(ids).logits
    assert logits.abs().max() > 1
    assert torch.equal(checkpoint.load("cpu").model(ids), logits)


def test_in_and_out_again_is_bit_for_bit(published, tmp_path):
    export(bring_in(published, tmp_path / "imported"), tmp_path / "again", dtype="bfloat16")
    a, b = Published(published), Published(tmp_path / "again")
    assert a.shapes == b.shapes
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.shapes)


def test_fused_experts_in_one_file_are_the_same(published, tmp_path):
    model = OlmoeForCausalLM.from_pretrained(published, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    shutil.copy(published / "tokenizer.json", tmp_path / "fused")
    assert "model.layers.0.mlp.experts.down_proj" in Published(tmp_path / "fused").shapes
    states = []
    for n, source in enumerate((published, tmp_path / "fused")):
        states.append(bring_in(source, tmp_path / f"imported{n}").load("cpu").model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def change_weights(folder: Path, change) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != file.name} | dict.fromkeys(
        tensors, file.name
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


GATE = "model.layers.0.mlp.gate.weight"


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def cut(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])


WRONG = {
    "a weight is missing": (lambda f: change_weights(f, lambda t: t.pop(GATE)), f"lacks the weight {GATE}"),
    "a weight too many": (
        lambda f: change_weights(f, lambda t: t.update(x=torch.zeros(1))),
        "has a weight that the model does not: x",
    ),
    "another shape": (
        lambda f: change_weights(f, lambda t: t.update({GATE: t[GATE][:-1].clone()})),
        f"{GATE} has shape (3, 64)",
    ),
    "another dtype": (
        lambda f: change_weights(f, lambda t: t.update({GATE: t[GATE].float()})),
        f"{GATE} is F32 but model.norm.weight is BF16",
    ),
    "another architecture": (
        lambda f: change_config(f, model_type="mixtral"),
        "model_type='mixtral' is another architecture: only 'olmoe' can be imported",
    ),
    "rope that is no mapping": (
        lambda f: change_config(f, rope_parameters="1e4"),
        "config.json: rope_parameters is '1e4', not a mapping or null",
    ),
    "a length that is no number": (
        lambda f: change_config(f, max_position_embeddings="4k"),
        "config.json: max_position_embeddings is '4k', not a whole number",
    ),
    "another model": (lambda f: change_config(f, hidden_size=32), "hidden_size=32 but"),
    "a damaged file": (cut, "is damaged"),
    "a lost file": (
        lambda f: min(f.glob("*.safetensors")).unlink(),
        "is missing: the weights must be safetensors, and complete",
    ),
    "no folder": (shutil.rmtree, "there is no such folder"),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_imported_is_refused_in_one_line(published, tmp_path, refusal, change, said):
    shutil.copytree(published, tmp_path / "wrong")
    change(tmp_path / "wrong")
    assert said in refusal(*words(tmp_path / "wrong", tmp_path / "imported"))
    assert not (tmp_path / "imported").exists()


def test_a_folder_that_exists_or_has_no_room_is_refused_in_one_line(published, tmp_path, refusal, monkeypatch):
    (tmp_path / "imported").write_text("mine")
    assert "exists: name a folder that does not" in refusal(*words(published, tmp_path / "imported"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    assert "are needed, 1e-09 GB are free" in refusal(*words(published, tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]


def words(source: Path, to: Path) -> list[object]:
    shape = ("model.d_model=64", f"dataset.sequence_length={N}")
    return ["import_hf.py", "--from", source, "--to", to, "--config", BASE, *TINY, *shape]

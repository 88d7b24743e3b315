"""Exports as a stranger's machine reads them, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks.tiny import VOCAB
from benchmarks.tiny_run import ROOT
from spattn_olmoe.model.checkpoint import Checkpoint
from spattn_olmoe.model.hf import export as exporting
from spattn_olmoe.model.hf.export import Published, export, verify

SHARED = {"type": "spattention", "local_sharing": True}

ALONE = """
import importlib.util, sys
found = [name for name in ("spattn_olmoe", "olmo_core", "datasets", "sklearn") if importlib.util.find_spec(name)]
assert not found, found
import torch
from transformers import AutoModelForCausalLM
folder, ids, out, root = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, out)
sys.path.append(root)
import spattn_olmoe.serving.vllm_plugin
"""


def link_installed(to: Path, *names: str) -> None:
    """Make a folder hold these distributions and all that they require, as if nothing else were installed."""
    to.mkdir()
    left, seen = list(names), set()
    while left:
        found = distribution(left.pop())
        if found.metadata["Name"] in seen:
            continue
        seen.add(found.metadata["Name"])
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (to / top).exists():
                (to / top).symlink_to(found.locate_file(top))
        needed = map(Requirement, found.requires or ())
        left += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]


@torch.no_grad()
def test_it_stands_alone_and_serving_needs_no_olmo_core(exported, tmp_path):
    """Where torch and transformers are installed and nothing else; then this package beside them, without OLMo-core."""
    pair = exported(SHARED)
    ids = torch.randint(2, VOCAB, (2, 60), generator=torch.Generator().manual_seed(2))
    torch.save(ids, tmp_path / "ids.pt")
    link_installed(tmp_path / "site", "torch", "transformers")
    files = [pair.folder, tmp_path / "ids.pt", tmp_path / "logits.pt", ROOT]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-S", "-c", ALONE, *map(str, files)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), pair.native(ids), atol=1e-5, rtol=1e-5)


def test_tokens_are_those_of_training(exported):
    pair = exported(SHARED)
    tokenizer = AutoTokenizer.from_pretrained(pair.folder)
    text = "w5 w6 w0 w63"  # w0 is the end of a document by name, and text here
    assert tokenizer(text).input_ids == pair.checkpoint.tokenizer().encode(text, add_special_tokens=False).ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 1, 48)


def test_verify_finds_nothing_and_then_a_changed_bit(exported, tmp_path):
    pair = exported(SHARED)
    found = verify(pair.checkpoint, pair.folder)
    assert found["tensors"] == len(Published(pair.folder).shapes)
    assert found["tokens"] == 48
    assert found["largest_difference"] < 1e-5
    shutil.copytree(pair.folder, tmp_path / "changed")
    file = sorted((tmp_path / "changed").glob("*.safetensors"))[1]
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(torch.int32).flatten()[0] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"--verify: {name}"):
        verify(pair.checkpoint, tmp_path / "changed")


def test_bfloat16_is_the_rounded_weights(exported, tmp_path):
    pair = exported(SHARED)
    export(pair.checkpoint, tmp_path / "bf16", dtype="bfloat16")
    full, half = Published(pair.folder), Published(tmp_path / "bf16")
    assert all(torch.equal(half.read(name), full.read(name).bfloat16()) for name in full.shapes)
    assert verify(pair.checkpoint, tmp_path / "bf16")["largest_difference"] < 1e-4
    (tmp_path / "by hand").mkdir()
    assert (tmp_path / "bf16").stat().st_mode == (tmp_path / "by hand").stat().st_mode  # not a temporary folder's


def test_a_dense_model_is_plain_olmoe(exported):
    pair = exported({"type": "standard"})
    assert (pair.config["model_type"], pair.config["architectures"]) == ("olmoe", ["OlmoeForCausalLM"])
    assert not list(pair.folder.glob("*.py"))
    assert verify(pair.checkpoint, pair.folder)["largest_difference"] < 1e-5


def test_the_card_has_pictures_and_attention(exported, tmp_path):
    pair = exported({"type": "spattention", "layers": [1]})
    export(pair.checkpoint, tmp_path / "out", draw=lambda pattern, path: path.write_text(pattern.name))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- layers 0: `standard`" in card and "- layers 1: `spattention`" in card
    assert "(attention.png)" in card and "(attention1.png)" in card
    assert (tmp_path / "out" / "attention1.png").read_text() == "spattention"


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_the_command_refuses_in_one_line(exported, tmp_path, refusal):
    checkpoint, to = exported(SHARED).checkpoint.path, tmp_path / "out"
    shutil.copytree(checkpoint, tmp_path / "damaged")
    file = next((tmp_path / "damaged" / "model_and_optim").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1000])
    shutil.copytree(checkpoint, tmp_path / "unchecked")
    shutil.rmtree(tmp_path / "unchecked" / "checksums")
    file = next((tmp_path / "unchecked" / "model_and_optim").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1000])
    for words, said in (
        (("--checkpoint", checkpoint, "--to", exported(SHARED).folder), "exists: name a folder that does not"),
        (("--checkpoint", checkpoint, "--to", to, "--dtype", "fp8"), "--dtype fp8: must be float32 or bfloat16"),
        (("--checkpoint", tmp_path, "--to", to), "neither a complete checkpoint"),
        (("--checkpoint", tmp_path / "damaged", "--to", to), "is damaged"),
        (("--checkpoint", tmp_path / "unchecked", "--to", to), "is missing, cut off or damaged ("),
        (("--checkpoint", checkpoint, "--to", ""), "--to is empty: leave it out, or give it a value"),
        (("--checkpoint", checkpoint, "--to="), "--to is empty: leave it out, or give it a value"),
    ):
        assert said in refusal("export_hf.py", *words)
    assert not to.exists()


def test_a_full_disk_leaves_nothing(exported, tmp_path, monkeypatch, refusal):
    words = ("export_hf.py", "--checkpoint", exported(SHARED).checkpoint.path, "--to", tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    assert "are needed, 1e-09 GB are free: name another disk" in refusal(*words)
    monkeypatch.undo()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    assert "no space is left on the disk; nothing was kept" in refusal(*words)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_named(exported, tmp_path):
    pair = exported(SHARED)
    shutil.copytree(pair.checkpoint.path, tmp_path / "step1")
    config = json.loads((tmp_path / "step1" / "config.json").read_text())
    config["model"]["block"]["feed_forward_moe"]["hidden_size"] = 64
    (tmp_path / "step1" / "config.json").write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "step1" / "checksums")
    with pytest.raises(ValueError, match=r"w1 has shape \(128, 64\) but the config asks for \(256, 64\)"):
        export(Checkpoint.open(tmp_path / "step1"), tmp_path / "out")

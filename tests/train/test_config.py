"""Experiments in YAML: bases, overrides, keys, the shipped configs, and what a dry run prints."""

from __future__ import annotations

import io
import json
import re

import pytest
import yaml
from olmo_core.optim import AdamWConfig, CosWithWarmup
from olmo_core.train.callbacks import CheckpointerCallback
from rich.console import Console

from benchmarks.tiny import BASE, ROOT, TINY, T, tiny
from spattn_olmoe.model.flops import flops_per_token
from spattn_olmoe.model.section import layer_patterns
from spattn_olmoe.patterns import available_patterns, variant_of
from spattn_olmoe.settings import read
from spattn_olmoe.train import load_experiment
from spattn_olmoe.train.config import decode_experiment
from spattn_olmoe.train.dry_run import dry_run, resolved
from spattn_olmoe.train.run import check
from spattn_olmoe.train.wandb import WandB

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
TYPES = {"spattn": "spattention"}  # where a file's name is not the type's


def refused(call, *said):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_chain_of_bases_is_merged_from_the_bottom(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, top="extends: deep/middle.yaml\na: {x: 3}\n")
    write(
        tmp_path / "deep",
        middle="extends: bottom.yaml\na: {y: 2, z: [9]}\n",
        bottom="a: {x: 1, y: 1, z: [1, 2]}\nb: 4\n",
    )
    assert read(tmp_path / "top.yaml") == {"a": {"x": 3, "y": 2, "z": [9]}, "b": 4}


def test_the_command_line_comes_last_and_interpolation_after_it(tmp_path):
    write(tmp_path, top="extends: base.yaml\nname: top\n", base="name: base\nfolder: runs/${name}-${a.x}\na: {x: 1}\n")
    assert read(tmp_path / "top.yaml") == {"name": "top", "folder": "runs/top-1", "a": {"x": 1}}
    overridden = read(tmp_path / "top.yaml", ["a.x=2", "name=mine", "a.new=[1,2]"])
    assert overridden == {"name": "mine", "folder": "runs/mine-2", "a": {"x": 2, "new": [1, 2]}}


def test_an_override_is_what_yaml_makes_of_it(tmp_path):
    write(tmp_path, top="a: 1\n")
    values = read(tmp_path / "top.yaml", ["b=true", "c=1e-4", "d=null", "e=text", "f=[0,2]", "g={h: 1}", "i=a=b"])
    assert values == {"a": 1, "b": True, "c": 1e-4, "d": None, "e": "text", "f": [0, 2], "g": {"h": 1}, "i": "a=b"}


FILES = {
    "itself": ({"top": "extends: top.yaml\n"}, ["extends itself", "top.yaml -> top.yaml"]),
    "a cycle": (
        {"top": "extends: one.yaml\n", "one": "extends: two.yaml\n", "two": "extends: one.yaml\n"},
        ["extends itself", "one.yaml -> two.yaml -> one.yaml"],
    ),
    "a base that is missing": ({"top": "extends: gone.yaml\n"}, ["gone.yaml", "top.yaml extends", "does not exist"]),
    "a file that is missing": ({}, ["top.yaml does not exist"]),
    "no YAML": ({"top": "a: [1\nb: {"}, ["top.yaml is not valid YAML"]),
    "a key twice": ({"top": "a: 1\na: 2\n"}, ["top.yaml is not valid YAML"]),
    "a list": ({"top": "- 1\n- 2\n"}, ["top.yaml must hold a mapping"]),
    "an interpolation to nowhere": ({"top": "a: ${nothing.here}\n"}, ["top.yaml", "nothing.here"]),
    "a base that is no name": ({"top": "extends: [a.yaml]\n"}, ["top.yaml", "extends"]),
}


@pytest.mark.parametrize(("files", "said"), FILES.values(), ids=FILES.keys())
def test_files_that_cannot_be_read_are_named(tmp_path, files, said):
    write(tmp_path, **files)
    refused(lambda: read(tmp_path / "top.yaml"), *said)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "top.yaml").write_bytes(b"\xff\xfe\x00a")
    refused(lambda: read(tmp_path / "top.yaml"), "top.yaml is not valid YAML")


@pytest.mark.parametrize("argument", ["attention.type", "--name=x", "attention.type:eball"])
def test_an_argument_that_is_no_override_is_refused(argument):
    refused(lambda: load_experiment(BASE, [argument]), repr(argument), "key=value")


# ---- keys and values -------------------------------------------------------------------------------------------------

UNKNOWN = {
    "trainr.save_folder=x": ["trainr", "ExperimentConfig", "'trainer'"],
    "nmae=x": ["nmae", "'name'"],
    "model.d_modle=64": ["model.d_modle", "'d_model'"],
    "model.block.layer_nrom.eps=1": ["model.block.layer_nrom", "'layer_norm'"],
    "model.block.layer_norm.epsi=1": ["model.block.layer_norm.epsi", "'eps'"],
    "model.block.sequence_mixer.nheads=4": ["model.block.sequence_mixer.nheads", "'n_heads'"],
    "model.block.sequence_mixer.rope.thta=1": ["model.block.sequence_mixer.rope.thta", "'theta'"],
    "model.block.feed_forward_moe.router.topk=2": ["model.block.feed_forward_moe.router.topk", "'top_k'"],
    "dataset.sequence_lenght=8": ["dataset.sequence_lenght", "'sequence_length'"],
    "dataset.tokenizer.vocabsize=8": ["dataset.tokenizer.vocabsize", "'vocab_size'"],
    "data_loader.global_batchsize=8": ["data_loader.global_batchsize", "'global_batch_size'"],
    "train_module.optim.weight_decai=0": ["train_module.optim.weight_decai", "'weight_decay'"],
    "train_module.scheduler.warmpu=1": ["train_module.scheduler.warmpu", "'warmup'"],
    "train_module.dp_config.nme=fsdp": ["train_module.dp_config.nme", "'name'"],
    "train_module.cp_config.degre=2": ["train_module.cp_config.degre", "'degree'"],
    "trainer.max_duration.vlaue=3": ["trainer.max_duration.vlaue", "'value'"],
    "trainer.callbacks.checkpointer.save_intervl=3": ["trainer.callbacks.checkpointer.save_intervl", "'save_interval'"],
    "trainer.callbacks.wandb.mod=offline": ["trainer.callbacks.wandb.mod", "'mode'"],
}


@pytest.mark.parametrize(("override", "said"), UNKNOWN.items(), ids=UNKNOWN.keys())
def test_an_unknown_key_is_met_with_the_nearest(override, said):
    refused(lambda: tiny(override), *said)


def test_an_unknown_attention_key_is_met_with_the_nearest():
    refused(lambda: check(tiny("attention.local_shring=true")), "attention.local_shring", "'local_sharing'")


WRONG = {
    "model.d_model=wide": ["model.d_model='wide'", "whole number"],
    "model.d_model=64.5": ["model.d_model=64.5", "whole number"],
    "model.n_layers=true": ["model.n_layers=True", "whole number"],
    "model.dtype=float31": ["model.dtype='float31'", "float32"],
    "model.block.name=meo": ["model.block.name='meo'", "moe"],
    "train_module.compile_model=maybe": ["train_module.compile_model='maybe'", "true or false"],
    "train_module.optim.lr=fast": ["train_module.optim.lr='fast'", "number"],
    "train_module.dp_config.name=fspd": ["train_module.dp_config.name='fspd'", "fsdp"],
    "train_module.optim.betas=0.9": ["train_module.optim.betas=0.9", "a list"],
    "trainer.save_folder=3": ["trainer.save_folder=3", "text"],
    "trainer.max_duration.unit=stpes": ["trainer.max_duration.unit='stpes'", "steps"],
    "train_module.optim.type=adamv": ["train_module.optim.type='adamv'", "'adam'", "known:", "adamw"],
    "train_module.scheduler.type=cosine": ["train_module.scheduler.type='cosine'", "cos_with_warmup"],
    "model.block.sequence_mixer.type=atention": ["model.block.sequence_mixer.type='atention'", "'attention'"],
    "trainer.callbacks.x._CLASS_=olmo_core.train.callbacks.Gone": ["trainer.callbacks.x._CLASS_", "no such class"],
    "trainer.callbacks.x._CLASS_=nowhere.Gone": ["trainer.callbacks.x._CLASS_='nowhere.Gone'", "--trust nowhere"],
    "trainer.callbacks.x._CLASS_=olmo_core.utils.generate_uuid": ["trainer.callbacks.x._CLASS_", "not a config class"],
    "trainer.callbacks.wandb.mode=onlin": ["trainer.callbacks.wandb.mode='onlin'", "offline"],
    "trainer.callbacks.wandb.enabled=2": ["trainer.callbacks.wandb.enabled=2", "true or false"],
    "model=3": ["model=3", "a mapping"],
    "model.block.layer_norm=rms": ["model.block.layer_norm='rms'", "a mapping"],
    "dataset.paths=data.bin": ["dataset.paths='data.bin'", "a list"],
    "trainer.load_path=[1]": ["trainer.load_path"],
}


@pytest.mark.parametrize(("override", "said"), WRONG.items(), ids=WRONG.keys())
def test_a_wrong_value_is_met_with_what_would_be_right(override, said):
    refused(lambda: tiny(override), *said)


def test_a_key_that_must_be_stated_is_named():
    refused(lambda: load_experiment(BASE, [x for x in TINY if "d_model" not in x]), "model.d_model")


def test_a_section_that_is_missing_is_named():
    data = read(BASE, TINY)
    del data["data_loader"]
    refused(lambda: decode_experiment(data), "data_loader")


def test_values_arrive_where_they_belong():
    config = tiny("train_module.optim.lr=3e-3", "trainer.callbacks.wandb.mode=offline", "attention.layers=[1]")
    assert isinstance(config.train_module.optim, AdamWConfig)
    assert config.train_module.optim.lr == 3e-3
    assert tuple(config.train_module.optim.betas) == (0.9, 0.95)
    assert isinstance(config.train_module.scheduler, CosWithWarmup)
    assert isinstance(config.trainer.callbacks["checkpointer"], CheckpointerCallback)
    assert isinstance(config.trainer.callbacks["wandb"], WandB)
    assert config.trainer.callbacks["wandb"].mode == "offline"
    assert [p.name for p in layer_patterns(config.model_with_attention())] == ["standard", "standard"]
    assert config.train_module.max_sequence_length == config.sequence_length == T


def test_a_config_survives_a_dictionary_and_json():
    config = tiny("attention.type=spattention")
    again = decode_experiment(json.loads(json.dumps(config.as_config_dict())))
    assert again.as_config_dict() == config.as_config_dict()
    assert again.model_with_attention() == config.model_with_attention()


CHECKED = {
    "a module for shorter sequences": (["train_module.max_sequence_length=16"], ["max_sequence_length=16", "=32"]),
    "half a sequence at a time": (["train_module.rank_microbatch_size=48"], ["rank_microbatch_size=48", "=32"]),
    "a batch of half sequences": (["data_loader.global_batch_size=48"], ["global_batch_size=48", "=32"]),
    "more ids than rows": (["dataset.tokenizer.vocab_size=65"], ["vocab_size=65", "model.vocab_size=64", "128"]),
    "an unknown type": (["attention.type=spatention"], ["attention.type='spatention'", "'spattention'"]),
    "heads and width": (["model.d_model=30"], ["model.d_model=30", "n_heads=4"]),
    "dropout": (["model.block.sequence_mixer.dropout=0.1"], ["dropout=0.1"]),
}


@pytest.mark.parametrize(("overrides", "said"), CHECKED.values(), ids=CHECKED.keys())
def test_what_cannot_be_trained_is_refused_on_any_machine(overrides, said):
    refused(lambda: check(tiny(*overrides)), *said)


# ---- the shipped configs ---------------------------------------------------------------------------------------------


CONTINUED = ["1b7b_from_olmoe.yaml", "1b7b_spattn_16k.yaml", "1b7b_spattn_64k.yaml"]
"""Train on from weights that are there, with a schedule of their own."""


NEW_STACK = ("1b7b_spattn_ddp.yaml", "quickstart_ddp.yaml")
"""The same run in OLMo-core's new stack."""


def test_there_are_twenty_one():
    assert len(CONFIGS) == 21
    assert {*CONTINUED, *NEW_STACK} < set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_loads_and_passes_its_checks(name):
    config = load_experiment(ROOT / "configs" / name)
    check(config)
    type_ = (
        "spattention"
        if name in ("quickstart.yaml", *CONTINUED, *NEW_STACK)
        else name.removesuffix(".yaml").partition("_")[2]
    )
    assert {p.name for p in layer_patterns(config.model_with_attention())} == {TYPES.get(type_, type_)}


SIZES = {"1b7b": ("6.92", "1.28"), "0p25b1p75b": ("1.75", "0.34"), "table2": ("1.75", "0.34")}


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("quickstart")])
def test_a_shipped_config_has_the_published_parameters(name):
    model = load_experiment(ROOT / "configs" / name).model_with_attention()
    counted = tuple(f"{n / 1e9:.2f}" for n in (model.num_params, model.num_active_params))
    assert counted == SIZES[name.partition("_")[0]]
    built = model.build(init_device="meta")
    assert sum(p.numel() for p in built.parameters()) == model.num_params


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("quickstart.yaml", *CONTINUED, *NEW_STACK)])
def test_a_shipped_config_differs_from_its_base_in_the_attention_type_only(name):
    base = ROOT / "configs" / "base" / f"{name.partition('_')[0]}.yaml"
    ours, theirs = (without_type(read(path)) for path in (ROOT / "configs" / name, base))
    assert ours == theirs


@pytest.mark.parametrize("name", NEW_STACK)
def test_a_config_of_the_new_stack_differs_from_its_base_in_the_stack_only(name):
    ours = read(ROOT / "configs" / name)
    theirs = read(ROOT / "configs" / name.replace("_ddp", ""))
    dp = ours["train_module"]["dp_config"]
    assert (ours["stack"], dp["name"], dp["param_dtype"]) == ("ddp", "ddp", "bfloat16")
    for key in ("attention", "model", "dataset", "data_loader"):
        assert json.loads(json.dumps(ours[key]).replace(ours["name"], theirs["name"])) == theirs[key], key
    microbatches = [config["train_module"].pop("rank_microbatch_size") for config in (ours, theirs)]
    assert microbatches[1] % microbatches[0] == 0
    for config in (ours, theirs):
        del config["train_module"]["dp_config"]
    assert json.loads(json.dumps(ours["train_module"]).replace(ours["name"], theirs["name"])) == theirs["train_module"]


def without_type(data):
    """A config without its attention type, and without that type in the names that are made of it."""
    type_ = data["attention"].pop("type")
    return json.loads(json.dumps(data).replace(f"-{type_}", "-"))


@pytest.mark.parametrize("type_", [name for name in available_patterns() if name != "spattention"])
def test_the_type_is_swapped_by_one_word(type_):
    config = load_experiment(ROOT / "configs" / "1b7b_spattn.yaml", [f"attention.type={type_}"])
    check(config)
    assert {p.name for p in layer_patterns(config.model_with_attention())} == {type_}
    assert config.trainer.save_folder == f"runs/1b7b-{type_}"


# ---- dry run ---------------------------------------------------------------------------------------------------------


def printed(config) -> str:
    out = io.StringIO()
    dry_run(config, Console(file=out, width=200, color_system=None))
    return out.getvalue()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dry_run_says_what_the_run_costs(name):
    config = load_experiment(ROOT / "configs" / name)
    model, length = config.model_with_attention(), config.sequence_length
    text = printed(config)
    in_one_line = " ".join(text.split())
    pattern = next(iter(layer_patterns(model)))
    dense = pattern.n_heads * length * (length + 1) // 2
    flops = flops_per_token(model.build(init_device="meta"), length)
    for words in (
        f"{model.num_params:,}",
        f"{model.num_active_params:,}",
        f"{flops.total:,} (as if attention were dense: {flops.dense:,})",
        f"attended pairs at T={length:,}",
        f"{pattern.attended_pairs(length):,} of {dense:,}",
        f"{pattern.dead_rows(length):,} of {pattern.n_heads * length:,}",
        config.trainer.save_folder,
    ):
        assert words in text
    assert ("Not read by this type: local_sharing" in in_one_line) == (pattern.name != "spattention")
    mask = variant_of(pattern.name, pattern.options).name
    assert re.search(rf"attention .* {mask}\b", text) and len(text.splitlines()) <= 60


def test_the_resolved_config_has_the_defaults_too():
    config = yaml.safe_load(resolved(tiny("attention.type=eball")))
    assert config["attention"]["type"] == "eball" and config["trainer"]["hard_stop"] is None
    assert config["data_loader"]["num_workers"] == 0


@pytest.mark.parametrize("type_", ["spattention", "gbhalf", "reformer"])
def test_a_dry_runs_figures_are_those_of_the_mask(type_):
    config = tiny(f"attention.type={type_}", "attention.layers=[1]")
    text = printed(config)
    masks = [pattern.dense_mask(T) for pattern in layer_patterns(config.model_with_attention())]
    for mask in masks:
        assert re.search(rf"\b{int(mask.sum()):,} of ", text)
        assert re.search(rf"\b{int((~mask.any(-1)).sum())} of {mask.shape[0] * T}\b", text)
    mask = variant_of(type_, config.attention).name
    assert re.search(rf"attention .* dense .* {mask}", text)


def test_a_dry_run_needs_no_data_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed(tiny())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("duration", "said"),
    [
        (["value=3", "unit=steps"], "3 steps x 128 = 384"),
        (["value=2000000", "unit=tokens"], "2.00 M in steps of 128"),
        (["value=2", "unit=epochs"], "2 epochs in steps of 128"),
    ],
)
def test_a_dry_run_says_how_long(duration, said):
    assert said in printed(tiny(*(f"trainer.max_duration.{x}" for x in duration)))


def test_a_dry_run_says_how_often_the_data_are_seen(tiny_data):
    """By hand: what the manifest counts, cut to whole sequences of every shard and whole batches."""
    shards = json.loads((tiny_data / "manifest.json").read_text())["shards"]
    batches = sum(s["tokens"] // T for s in shards if "train" in s["path"]) // 4
    data = f"dataset.paths=[{tiny_data}/train-*.bin]"
    for duration, times in (
        (["value=300", "unit=steps"], 300 / batches),
        (["value=640000", "unit=tokens"], 5000 / batches),
    ):
        said = printed(tiny(data, *(f"trainer.max_duration.{x}" for x in duration)))
        assert f"{times:.2f} epochs of " in said, said
    assert "less than one batch" in printed(tiny(data, f"data_loader.global_batch_size={T * 4 * (batches + 1)}"))
    assert "none yet: dataset.paths: data/dclm/" in printed(load_experiment(ROOT / "configs/1b7b_spattn.yaml"))

"""Generation through the KV cache is generation without it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from olmo_core.distributed.checkpoint import save_model_and_optim_state
from olmo_core.generate.generation_module import GenerationConfig, TransformerGenerationModule

from benchmarks.tiny import PAD, VOCAB, tiny, write_data
from spattn_olmoe.model import apply_remedies, with_attention
from spattn_olmoe.model.checkpoint import Checkpoint, generate, load_tokenizer, read_checkpoint_config
from spattn_olmoe.model.checkpoint_files import resolve_checkpoint
from spattn_olmoe.model.fingerprint import Fingerprint
from spattn_olmoe.patterns import available_variants, find_variant

N, PROMPT, NEW = 40, 12, 20
MASKS = list(map(find_variant, available_variants()))
SMALL = {"bigbird_seeded": {"block_size": 3}, "reformer_lsh": {"n_hashes": 2}}  # options for prompts this short
SECTIONS = {
    **{mask.name: {"type": mask.type, **mask.options, **SMALL.get(mask.name, {})} for mask in MASKS},
    "reordered bands": {"type": "spattention", "head_order": "balanced"},
    "layers differ": {"type": "reformer", "layers": [1]},
}
each_section = pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())


def random_model(section, **mixer):
    apply_remedies()
    base = copy.deepcopy(tiny().model)
    for key, value in mixer.items():
        setattr(base.block.sequence_mixer, key, value)
    config = with_attention(base, band_length=N, **section)
    model = config.build().eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 1))
    return config, model


def generator_of(section, **mixer) -> TransformerGenerationModule:
    _, model = random_model(section, **mixer)
    never = VOCAB  # nothing ends before its length
    asked = GenerationConfig(pad_token_id=PAD, eos_token_id=never, do_sample=False, max_new_tokens=NEW)
    return TransformerGenerationModule(model, asked, device=torch.device("cpu"))


def prompts(B=2, T=PROMPT):
    return torch.randint(2, VOCAB, (B, T), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def greedy(module, ids, use_cache, mask=None):
    tokens, logits, _ = module.generate_batch(
        ids,
        attention_mask=mask,
        use_cache=use_cache,
        return_logits=True,
        completions_only=True,
        temperature=0.0,
        log_timing=False,
    )
    return tokens, logits


@each_section
@pytest.mark.parametrize("mixer", [{}, {"n_kv_heads": 2}], ids=["all heads", "shared key heads"])
def test_cached_is_uncached(section, mixer):
    module = generator_of(section, **mixer)
    with_cache, cached_logits = greedy(module, prompts(), use_cache=True)
    without, logits = greedy(module, prompts(), use_cache=False)
    assert with_cache.shape == (2, NEW)
    assert torch.equal(with_cache, without)
    torch.testing.assert_close(cached_logits, logits, atol=2e-5, rtol=1e-5)


def test_the_cache_is_really_used():
    module = generator_of({"type": "spattention"})
    lengths = []
    backend = module.model.blocks["0"].attention.backend
    backend.register_forward_pre_hook(lambda _, args: lengths.append(args[0][0].shape[1]))
    greedy(module, prompts(), use_cache=True)
    assert lengths[0] == PROMPT
    assert set(lengths[1:]) == {1}
    lengths.clear()
    greedy(module, prompts(), use_cache=False)
    assert lengths[-1] == PROMPT + NEW - 1


# Not LSH: it hashes after RoPE, so padding, which shifts positions, moves vectors to other buckets (docs/masks.md).
@pytest.mark.parametrize("section", [s for name, s in SECTIONS.items() if name != "reformer_lsh"])
def test_a_padded_prompt_goes_on_as_if_it_were_alone(section):
    module = generator_of(section)
    ids, mask = prompts(), torch.ones(2, PROMPT, dtype=torch.bool)
    ids[1, :5], mask[1, :5] = PAD, False
    tokens, logits = greedy(module, ids, True, mask)
    alone, alone_logits = greedy(module, ids[1:, 5:], use_cache=False)
    torch.testing.assert_close(logits[1:], alone_logits, atol=2e-5, rtol=1e-5)
    assert torch.equal(tokens[1:], alone)
    other, other_logits = greedy(module, ids[:1], use_cache=False)
    torch.testing.assert_close(logits[:1], other_logits, atol=2e-5, rtol=1e-5)
    assert torch.equal(tokens[:1], other)


def test_a_second_batch_finds_an_empty_cache():
    module = generator_of({"type": "spattention"})
    first, _ = greedy(module, prompts(), use_cache=True)
    greedy(module, prompts(B=1, T=5), use_cache=True)
    again, _ = greedy(module, prompts(), use_cache=True)
    assert torch.equal(first, again)


def test_the_cache_has_the_dtype_of_the_weights():
    module = generator_of({"type": "spattention"})
    module.model.to(torch.float64)
    module.model.blocks["0"].attention.init_kv_cache_manager(1, 8)
    assert module.model.blocks["0"].attention.kv_cache_manager.k_cache.dtype == torch.float64


def test_bands_of_the_input_have_no_cache():
    module = generator_of({"type": "eball", "follows_input": True})
    with pytest.raises(ValueError, match="use_cache=false"):
        greedy(module, prompts(), use_cache=True)


def test_bands_of_the_input_generate_without_a_cache():
    tokens, _ = greedy(generator_of({"type": "eball", "follows_input": True}), prompts(), use_cache=False)
    assert tokens.shape == (2, NEW)


# ---- from a checkpoint -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run's folder with checkpoints of steps 2 and 10, and one that was never finished."""
    folder = tmp_path_factory.mktemp("run")
    data = write_data(folder / "data")
    config, model = random_model({"type": "spattention", "local_sharing": True})
    saved = tiny(f"dataset.tokenizer.identifier={data}/tokenizer.json").replace(model=config)
    for step in (2, 10):
        path = folder / f"step{step}"
        save_model_and_optim_state(path / "model_and_optim", model)
        (path / "train").mkdir()
        torch.save({}, path / "train" / "rank0.pt")
        (path / ".metadata.json").write_text('{"version": "3"}')
        (path / "config.json").write_text(json.dumps(saved.as_config_dict()))
        (path / "attention.json").write_text(Fingerprint.of(config).to_json())
    (folder / "step20").mkdir()
    return folder


def test_a_run_stands_for_its_newest_complete_checkpoint(run_folder):
    newest = str(run_folder / "step10")
    assert resolve_checkpoint(run_folder) == newest
    assert resolve_checkpoint(newest) == newest
    assert resolve_checkpoint(run_folder / "step2") == str(run_folder / "step2")


@pytest.mark.parametrize("where", ["nowhere", "step20", "data"])
def test_a_folder_without_checkpoints_is_refused(run_folder, where):
    with pytest.raises(ValueError) as caught:
        resolve_checkpoint(run_folder / where)
    assert f"--checkpoint {run_folder / where}" in str(caught.value)
    assert "stepN/" in str(caught.value)


def test_a_checkpoint_without_its_config_is_refused(run_folder):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        read_checkpoint_config(run_folder / "step20")


def test_model_and_attention_come_from_the_checkpoint(run_folder):
    module = Checkpoint.open(run_folder).load()
    _, model = random_model({"type": "spattention", "local_sharing": True})
    attention = module.model.blocks["1"].attention
    assert attention.pattern == model.blocks["1"].attention.pattern
    assert attention.pattern.band_length == N
    with torch.no_grad():
        torch.testing.assert_close(module.model(prompts()), model(prompts()), atol=1e-6, rtol=1e-6)


def test_text_goes_on_with_and_without_a_cache(run_folder):
    checkpoint = Checkpoint.open(run_folder)
    asked = {"max_new_tokens": 8, "seed": 0}
    prompt = "w5 w6 w7 w8"
    cached = generate(checkpoint, prompt, temperature=0.0, **asked)
    assert cached.startswith(prompt)
    assert len(cached.split()) > 4
    assert generate(checkpoint, prompt, temperature=0.0, use_cache=False, **asked) == cached
    drawn = generate(checkpoint, prompt, temperature=2.0, **asked)
    assert generate(checkpoint, prompt, temperature=2.0, **asked) == drawn
    assert generate(checkpoint, prompt, temperature=2.0, max_new_tokens=8, seed=1) != drawn


def test_an_empty_prompt_is_refused(run_folder):
    with pytest.raises(ValueError, match="--prompt is empty"):
        generate(Checkpoint.open(run_folder), " ", max_new_tokens=1, temperature=0.0, seed=0)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"prompt": "w5 " * 500}, "--prompt of 500 tokens"),
        ({"max_new_tokens": 10**9}, "--max-new-tokens 1000000000"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"seed": -1}, "--seed -1"),
        ({"prompt": "caf\udce9"}, "--prompt is no UTF-8"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(run_folder, asked, words):
    usual = {"prompt": "w5", "max_new_tokens": 1, "temperature": 0.0, "seed": 0}
    with pytest.raises(ValueError, match=words):
        generate(Checkpoint.open(run_folder), **{**usual, **asked})


def test_a_tokenizer_that_is_gone_is_named(run_folder, tmp_path):
    config = read_checkpoint_config(run_folder / "step10")
    config["dataset"]["tokenizer"]["identifier"] = str(tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no such file"):
        load_tokenizer(tmp_path)


def test_a_checkpoints_own_tokenizer_comes_before_the_one_it_was_trained_with(run_folder, tmp_path):
    config = read_checkpoint_config(run_folder / "step10")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).encode("w5").ids == [5]
    own = Path(config["dataset"]["tokenizer"]["identifier"]).read_text().replace('"w5"', '"moved"')
    (tmp_path / "tokenizer.json").write_text(own)
    assert load_tokenizer(tmp_path).encode("moved").ids == [5]

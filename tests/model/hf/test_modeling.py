"""The exported model, read as its user reads it, against the native one and against itself alone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    OlmoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from benchmarks.tiny import PAD, VOCAB
from benchmarks.tiny_checkpoint import N
from spattn_olmoe import build_pattern
from spattn_olmoe.model.hf.rules import rule_of
from spattn_olmoe.patterns import VARIANTS
from spattn_olmoe.serving import modeling_spattn_olmoe as modeling

SECTIONS = {
    **{name: VARIANTS[name].section for name in ("exclusive", "sharing", "gbhalf", "sliding_window", "longformer")},
    **{name: VARIANTS[name].section for name in ("bigbird", "reformer")},
    "reordered bands": {"type": "spattention", "head_order": "balanced"},
    "layers differ": {"type": "spattention", "local_sharing": True, "layers": [1]},
}
ALONE, PACKAGE = "alone", "with the package"
CASES = [(name, ALONE) for name in SECTIONS]
CASES += [(name, PACKAGE) for name in ("exclusive", "reordered bands", "layers differ")]
each_case = pytest.mark.parametrize(
    ("section", "computed"),
    [(SECTIONS[name], where) for name, where in CASES],
    ids=map(", ".join, CASES),
    indirect=["computed"],
)
either_way = pytest.mark.parametrize("computed", [ALONE, PACKAGE], indirect=True)
BANDS = SECTIONS["sharing"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def computed(request, monkeypatch):
    """Attention as a machine without spattn_olmoe computes it, and as one with it does."""
    if request.param == ALONE:
        monkeypatch.setattr(modeling, "_package_attention", lambda *_: None)
        monkeypatch.setattr(modeling, "MASK_CELLS", 2000)  # a few queries at a time
    return request.param


@pytest.fixture
def load(exported):
    """The exported model of a section under the package's own copy of the modeling file, and the native one."""

    def make(section, n_kv_heads=None):
        pair = exported(section, n_kv_heads)
        return modeling.SPAttnOlmoeForCausalLM.from_pretrained(pair.folder).eval(), pair.native

    return make


def tokens(B=2, T=60):
    return torch.randint(2, VOCAB, (B, T), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["dense", "exclusive", "sharing", "longformer", "bigbird", "reformer", "gbhalf"])
@pytest.mark.parametrize("band_length", [4, 5, 33, 100, 1031])
def test_a_rule_is_its_patterns_mask_at_any_length(name, band_length):
    pattern = VARIANTS[name].build(4, band_length)
    T = min(2 * band_length + 3, 600)
    h, i = torch.arange(4)[:, None, None], torch.arange(T)
    rule = rule_of(pattern)
    assert torch.equal(rule.allows(h, i[:, None], i), pattern.dense_mask(T))
    assert modeling.AttentionRule.from_config(rule.to_config()) == rule


@torch.no_grad()
@either_way
def test_heads_that_share_keys(load, computed):
    model, native = load(SECTIONS["layers differ"], n_kv_heads=2)
    torch.testing.assert_close(model(tokens()).logits, native(tokens()), **CLOSE)


@torch.no_grad()
@each_case
def test_logits_are_native(load, section, computed):
    model, native = load(section)
    expected = native(tokens())
    torch.testing.assert_close(model(tokens()).logits, expected, **CLOSE)
    dense = OlmoeForCausalLM(modeling.OlmoeConfig(**dense_config(model))).eval()
    dense.load_state_dict(model.state_dict())
    assert (dense(tokens()).logits - expected).abs().max() > 0.1


def dense_config(model):
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_experts")
    return {key: getattr(model.config, key) for key in (*keys, "num_key_value_heads", "num_experts_per_tok")}


@torch.no_grad()
@each_case
def test_padding_on_either_side_is_as_if_it_were_not_there(load, section, computed):
    model, native = load(section)
    ids, mask = tokens(), torch.ones(2, 60, dtype=torch.long)
    for pads, real in ((slice(0, 7), slice(7, 60)), (slice(50, 60), slice(0, 50))):
        padded, valid = ids.clone(), mask.clone()
        padded[1, pads], valid[1, pads] = PAD, 0
        logits = model(padded, attention_mask=valid).logits
        torch.testing.assert_close(logits[1, real], native(ids[1:, real])[0], **CLOSE)
        torch.testing.assert_close(logits[0], native(ids[:1])[0], **CLOSE)


@torch.no_grad()
@each_case
def test_packed_documents_do_not_see_each_other(load, section, computed):
    model, native = load(section)
    ids, lengths = tokens(B=1), (25, 1, 34)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    logits = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([native(document) for document in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(logits, alone, **CLOSE)


@torch.no_grad()
@either_way
def test_padding_within_a_sequence_is_as_if_it_were_not_there(load, computed):
    model, native = load(BANDS)
    ids, mask = tokens(B=1), torch.ones(1, 60, dtype=torch.long)
    mask[0, 20:25] = 0
    real = mask[0].bool()
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(logits[:, real], native(ids[:, real]), **CLOSE)


GREEDY = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@torch.no_grad()
@pytest.mark.parametrize("name", ["sharing", "layers differ", "longformer", "reformer"])
@pytest.mark.parametrize("cache", [{"cache_implementation": "static"}, {}], ids=["static", "dynamic"])
def test_generation_with_a_cache_is_native_generation_without(load, name, cache):
    model, native = load(SECTIONS[name])
    ids, mask = tokens(T=25), torch.ones(2, 25, dtype=torch.long)
    ids[1, :7], mask[1, :7] = PAD, 0
    asked = GREEDY | {"attention_mask": mask, "min_new_tokens": 30}
    found = model.generate(ids, **asked, **cache)
    for row, start in ((0, 0), (1, 7)):
        expected = ids[row : row + 1, start:]
        logits = []
        for _ in range(30):
            logits.append(
                native(expected)[0, -1].index_fill(0, torch.tensor(model.generation_config.eos_token_id), -torch.inf)
            )
            expected = torch.cat([expected, logits[-1].argmax()[None, None]], dim=1)
        assert torch.equal(found.sequences[row, start:], expected[0])
        got = torch.stack([step[row] for step in found.logits])
        finite = torch.stack(logits).isfinite()
        torch.testing.assert_close(got[finite], torch.stack(logits)[finite], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["layers differ", "bigbird"])
def test_beams_and_prompt_lookup(load, name):
    model, _ = load(SECTIONS[name])
    asked = {"max_new_tokens": 30, "do_sample": False}
    ids = tokens(B=1, T=10).repeat(1, 3)
    beams = model.generate(ids, num_beams=3, **asked)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **asked))
    plain = model.generate(ids, **asked)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **asked), plain)


def rows_alone(native):
    """Two rows of different length, and the loss and a gradient of training on each by itself."""
    rows = [tokens()[0], tokens()[1, :33]]
    sums = [torch.nn.functional.cross_entropy(native(row[None])[0, :-1], row[1:], reduction="sum") for row in rows]
    loss = sum(sums) / sum(len(row) - 1 for row in rows)
    (gradient,) = torch.autograd.grad(loss, native.blocks["0"].attention.w_q.weight)
    return rows, loss, gradient


@either_way
def test_training_on_right_padded_rows_is_training_on_each_alone(load, computed):
    model, native = load(BANDS)
    rows, expected, gradient = rows_alone(native)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    model.train()
    loss = model(ids, attention_mask=real, labels=ids.masked_fill(real == 0, -100)).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, gradient, atol=1e-6, rtol=1e-4)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@either_way
def test_a_step_of_transformers_trainer(exported, load, computed, tmp_path):
    model, native = load(BANDS)
    rows, expected, gradient = rows_alone(native)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    tokenizer = AutoTokenizer.from_pretrained(exported(BANDS).folder)
    args = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=len(rows),
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row.tolist()} for row in rows],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),  # pads on the right
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)
    torch.testing.assert_close(before - weight, gradient, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_flex_attention_computes_the_same():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 4, T, 8, generator=generator) for T in (60, 70, 70))
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1, :9] = False
    places = modeling.token_places(2, 60, 70, 10, modeling_causal, mask)
    for name in ("spattention", "bigbird", "reformer"):
        rule = rule_of(build_pattern(name, n_heads=4, band_length=N))
        expected = modeling.by_sdpa(q, k, v, places, rule, 0.3)
        torch.testing.assert_close(modeling.by_flex(q, k, v, places, rule, 0.3), expected, **CLOSE)
        assert modeling.by_flex(q, k, v, places, rule, 0.3).shape == expected.shape


def modeling_causal(batch, head, query, key):
    return key <= query


@torch.no_grad()
def test_a_compiled_step_of_decoding(load):
    from transformers import StaticCache

    model, native = load(BANDS)
    ids = tokens(B=1, T=31)
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :30], past_key_values=cache)
    step = torch.compile(model, backend="eager")(ids[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(step[:, -1], native(ids)[:, -1], **CLOSE)


def test_saved_and_read_again_bit_for_bit(exported, tmp_path):
    pair = exported(SECTIONS["layers differ"])
    model = AutoModelForCausalLM.from_pretrained(pair.folder, trust_remote_code=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert again.config.attention_rules == model.config.attention_rules


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "implementation", ["sdpa", "eager", "flash_attention_2", "flex_attention", "vllm", "paged|sdpa"]
)
def test_another_attention_is_refused(exported, load, implementation):
    folder = exported(BANDS).folder
    with pytest.raises(ValueError, match=r"would be dense|attn_implementation"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation=implementation)
    model, _ = load(BANDS)
    with pytest.raises((ValueError, ImportError)):
        model.set_attn_implementation(implementation)
    for name in ("_attn_implementation", "_attn_implementation_internal"):
        with pytest.raises(ValueError, match="would be dense"):
            setattr(model.config, name, implementation)
    assert model.config._attn_implementation == modeling.IMPLEMENTATION


def test_without_trust_or_as_plain_olmoe_it_is_refused(exported):
    folder = exported(BANDS).folder
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    with pytest.raises(Exception, match="load it with trust_remote_code=True"):
        OlmoeForCausalLM.from_pretrained(folder)


def test_masks_dropout_and_weights_of_the_users_own_are_refused(load):
    model, _ = load(BANDS)
    with pytest.raises(ValueError, match=r"attention_mask \(batch, length\)"):
        model(tokens(), attention_mask=torch.ones(2, 1, 60, 60, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_dropout"):
        modeling.SPAttnOlmoeConfig.from_dict(model.config.to_dict() | {"attention_dropout": 0.1})
    with pytest.raises(ValueError, match=r"attention_rules has 1 layers"):
        config = modeling.SPAttnOlmoeConfig.from_dict(model.config.to_dict())
        config.attention_rules = config.attention_rules[:1]
        modeling.SPAttnOlmoeForCausalLM(config)

"""The exported model, read as its user reads it, against the native one and against itself alone."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
from spattn_olmoe.model.hf.rules import rule_of
from spattn_olmoe.patterns import VARIANTS
from spattn_olmoe.serving import modeling_spattn_olmoe as modeling

SECTIONS = {
    **{name: VARIANTS[name].section for name in ("exclusive", "sharing", "gbhalf", "sliding_window", "longformer")},
    **{name: VARIANTS[name].section for name in ("bigbird", "reformer", "exclusive_sinks")},
    "reordered bands": {"type": "spattention", "head_order": "balanced"},
    "layers differ": {"type": "spattention", "local_sharing": True, "layers": [1]},
}
FLEX = ("exclusive", "sharing", "exclusive_sinks", "bigbird", "reformer", "longformer", "gbhalf")
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


@pytest.mark.parametrize("name", [*FLEX, "dense", "sharing_sinks"])
@pytest.mark.parametrize("band_length", [4, 5, 33, 100, 1031])
def test_a_rule_is_its_patterns_mask_at_any_length(name, band_length):
    pattern = VARIANTS[name].build(4, band_length, head_order=(2, 0, 3, 1))
    T = min(2 * band_length + 3, 600)
    h, i = torch.arange(4)[:, None, None], torch.arange(T)
    rule = rule_of(pattern)
    assert torch.equal(rule.on("cpu")(h, i[:, None], i), pattern.dense_mask(T))
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


PACKED = torch.cat([torch.arange(n) for n in (25, 1, 34)])[None]


@pytest.mark.parametrize("how", ["default", "training", "the inner model", "by place", "compiled"])
def test_packed_documents_need_no_word_about_the_cache(load, how):
    model, native = load(BANDS)
    ids = tokens(B=1)
    alone = torch.cat([native(document) for document in ids.split((25, 1, 34), dim=1)], dim=1)
    if how == "training":
        logits = model.train()(ids, position_ids=PACKED, labels=ids).logits
    elif how == "the inner model":
        logits = model.lm_head(model.model(ids, position_ids=PACKED).last_hidden_state)
    elif how == "by place":
        logits = model.lm_head(model.model(ids, None, PACKED).last_hidden_state)
    elif how == "compiled":
        logits = torch.compile(model, backend="eager")(ids, position_ids=PACKED).logits
    else:
        logits = model(ids, position_ids=PACKED).logits
    torch.testing.assert_close(logits, alone, **CLOSE)


@torch.no_grad()
def test_positions_that_go_on_keep_their_cache(load):
    from transformers import DynamicCache

    model, native = load(BANDS)
    ids, positions = tokens(B=1), torch.arange(60)[None]
    first = model(ids[:, :40], position_ids=positions[:, :40])
    cache = first.past_key_values
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 40
    rest = model(ids[:, 40:], position_ids=positions[:, 40:], past_key_values=cache).logits
    torch.testing.assert_close(rest, native(ids)[:, 40:], **CLOSE)


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


def places_of(kind, T, S):
    """Places as transformers asks for them: a prompt, one after others in a cache, padded on the left, or packed."""
    mask, documents = torch.ones(2, S, dtype=torch.bool), torch.zeros(2, S, dtype=torch.long)
    if kind == "padded":
        mask[1, :9] = False
    if kind == "packed":
        documents = (torch.arange(S) >= torch.tensor([[S // 3], [S // 2]])).long()
    return modeling.token_places(
        2, T, S, S - T, lambda b, h, i, j: (j <= i) & (documents[b, i] == documents[b, j]), mask
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_flex_attention_computes_the_same(kind):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 4, T, 8, generator=generator) for T in (60, 70, 70))
    places = places_of(kind, 60, 70)
    for name in FLEX:
        rule = rule_of(VARIANTS[name].build(4, N))
        expected = modeling.by_sdpa(q, k, v, places, rule, 0.3)
        torch.testing.assert_close(modeling.by_flex(q, k, v, places, rule, 0.3), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize(("T", "S"), [(70, 70), (33, 100), (17, 64)])
def test_blocks_that_are_skipped_hold_no_pair_and_full_ones_every_pair(kind, T, S, monkeypatch):
    monkeypatch.setattr(modeling, "BLOCK", 8)
    places = places_of(kind, T, S)
    q_document, q_place, k_document, k_place = (x[:, None] for x in modeling._split(places, T))
    for name in FLEX:
        rule = rule_of(VARIANTS[name].build(4, N))
        some, every = modeling._blocks(places, rule, T)
        h = torch.arange(4)[:, None, None]
        mask = rule.on("cpu")(h, q_place[..., None], k_place[:, :, None])
        mask = mask & (q_document[..., None] == k_document[:, :, None])
        rows, columns = (torch.arange(n).split(8) for n in (T, S))
        blocks = [[mask[:, :, i][..., j] for j in columns] for i in rows]
        held = torch.stack([torch.stack([block.any((-2, -1)) for block in row], -1) for row in blocks], -2)
        full = torch.stack([torch.stack([block.all((-2, -1)) for block in row], -1) for row in blocks], -2)
        assert not (held & ~some).any() and not (every & ~full).any()
        if kind == "plain" and not rule.period:  # no block too many
            assert torch.equal(some, held) and (torch.equal(every, full) or rule.global_tokens)


@torch.no_grad()
def test_flex_attention_is_compiled_whole_and_once_for_all_bands(monkeypatch):
    """Traced as on CUDA. A limit of recompilations would end in a mask of all pairs, or in an error."""
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, backend=counter, fullgraph=True)
    monkeypatch.setattr(modeling, "_flex", lambda _: compiled)
    generator = torch.Generator().manual_seed(3)
    for T in (60, 90, 300, 450):
        q, k, v = (torch.randn(2, 4, T, 8, generator=generator) for _ in range(3))
        for name in ("exclusive", "gbhalf"):
            rule, places = rule_of(VARIANTS[name].build(4, N)), places_of("packed", T, T)
            expected = modeling.by_sdpa(q, k, v, places, rule, 0.3)
            torch.testing.assert_close(modeling.by_flex(q, k, v, places, rule, 0.3), expected, **CLOSE)
    assert counter.frame_count <= 3  # for one length, for all of one block, and for all


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and not func.is_view]
        self.numel = max([self.numel, *made])
        return out


@torch.no_grad()
@pytest.mark.parametrize("name", ["exclusive", "bigbird", "longformer"])
def test_a_long_prompt_as_on_cuda_makes_no_mask_of_all_pairs(name, monkeypatch):
    """On tensors without values: those of a CPU, since PyTorch without CUDA indexes no others."""
    T, D, given = 4096, 64, []
    monkeypatch.setattr(modeling, "_by_package", lambda *_: None)
    monkeypatch.setattr(modeling, "_suits_flex", lambda _: True)
    monkeypatch.setattr(modeling, "_flex", lambda device: lambda q, *_, **options: given.append(options) or q.clone())
    rule = rule_of(VARIANTS[name].build(4, T))
    module = torch.nn.Module()
    module.__dict__["attention_rule"] = rule
    monkeypatch.setattr(modeling, "_made_tables", modeling._made_tables.__wrapped__)  # keeps none without values
    with FakeTensorMode(), Largest() as largest:
        q, k, v = (torch.empty(1, 4, T, D) for _ in range(3))
        places = modeling.token_places(1, T, T, 0, modeling_causal)
        out, _ = modeling.attend(module, q, k, v, places)
    assert out.shape == (1, T, 4, D)
    assert given[0]["block_mask"].shape == (1, 4, T, T)
    assert largest.numel == q.numel()


def test_flex_attention_is_for_prompts_on_cuda():
    with FakeTensorMode():
        suits = {
            (device, T, D): modeling._suits_flex(torch.empty(1, 4, T, D, device=device))
            for device in ("cuda", "cpu")
            for T in (1, 16, 17)
            for D in (8, 16)
        }
    assert [call for call, suited in suits.items() if suited] == [("cuda", 17, 16)]


def modeling_causal(batch, head, query, key):
    return key <= query


@torch.no_grad()
def test_a_compiled_step_of_decoding(load):
    from transformers import StaticCache

    model, native = load(SECTIONS["layers differ"])
    ids = tokens(B=1, T=31)
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :30], past_key_values=cache)
    made = []

    def backend(graph, _):
        made.extend(node.target for node in graph.graph.nodes)
        return graph

    step = torch.compile(model, backend=backend)(ids[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(step[:, -1], native(ids)[:, -1], **CLOSE)
    assert torch.nn.functional.scaled_dot_product_attention in made
    assert torch.tensor not in made  # no table of distances is made again, and copied to the GPU, in every step


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


def test_packed_documents_with_a_cache_or_other_arguments_are_refused(load):
    from transformers import DynamicCache

    model, _ = load(BANDS)
    ids = tokens(B=1)
    with pytest.raises(
        ValueError, match=r"^use_cache=True is given beside position_ids of packed documents.*leave it out"
    ):
        model(ids, position_ids=PACKED, use_cache=True)
    with pytest.raises(ValueError, match=r"^a cache is given beside position_ids of packed documents.*leave it out"):
        model(ids, position_ids=PACKED, past_key_values=DynamicCache(config=model.config))
    ends = torch.tensor([0, 25, 26, 60], dtype=torch.int32)
    for word in ({"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}, {"max_length_q": 34, "max_length_k": 34}):
        with pytest.raises(ValueError, match=f"^{next(iter(word))} is given: .*position_ids that begin again in each"):
            model(ids, position_ids=PACKED, **word)


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

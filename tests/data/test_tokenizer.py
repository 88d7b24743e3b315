from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from corpora import ROOT, read_ids, write_jsonl
from tokenizers import Tokenizer

from spattn_olmoe.data import DataConfig, TokenizerSection, prepare, train_tokenizer
from spattn_olmoe.data.tokenizer import find_tokenizer, parse_tokenizer, sha256, vocab_size

NEOX = "allenai/gpt-neox-olmo-dolma-v1_5"
Make = Callable[..., DataConfig]


def test_training_gives_the_same_bytes_in_every_process(documents: list[str], tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(documents), encoding="utf-8")
    program = (
        "import sys; from pathlib import Path; from spattn_olmoe.data import train_tokenizer; "
        "train_tokenizer([Path(sys.argv[1])], 1000, sys.argv[2])"
    )
    for name in ("a.json", "b.json"):
        command = [sys.executable, "-c", program, str(tmp_path / "corpus.txt"), str(tmp_path / name)]
        subprocess.run(command, check=True, cwd=ROOT)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    tokenizer = Tokenizer.from_file(str(tmp_path / "a.json"))
    assert tokenizer.get_vocab_size() == 1000
    assert [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|padding|>")] == [0, 1]
    text = "ünïcode, 漢字 and 🙂 come back\n\tas they were"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(("size", "words"), [(257, "at least 258"), (60_000, "the text yields only")])
def test_vocabularies_that_cannot_be_trained_are_refused(
    size: int, words: str, documents: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        train_tokenizer(documents[:20], size, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("identifier", [NEOX, "tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"])
def test_the_wheel_has_the_tokenizer_of_olmoe(identifier: str) -> None:
    pytest.importorskip("olmo_eval")
    data, origin = find_tokenizer(TokenizerSection(identifier=identifier))
    tokenizer = parse_tokenizer(data, identifier)
    assert origin == "wheel" and vocab_size(tokenizer) == 50_280
    assert tokenizer.token_to_id("<|endoftext|>") == 50_279 and tokenizer.token_to_id("<|padding|>") == 1


def test_shards_of_olmoes_tokenizer(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    pytest.importorskip("olmo_eval")
    config = make_config(write_jsonl(tmp_path / "a.jsonl", documents), tokenizer=TokenizerSection(identifier=NEOX))
    manifest = prepare(config)
    record = manifest.tokenizer
    assert (record.vocab_size, record.eos_token_id, record.pad_token_id) == (50_280, 50_279, 1)
    assert manifest.dtype == "uint16"
    reference = Tokenizer.from_file(str(manifest.tokenizer_path))
    wanted = [i for text in documents for i in [*reference.encode(text).ids, 50_279]]
    assert read_ids(manifest.train_paths) == wanted


def test_a_vocabulary_beyond_uint16_takes_uint32(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(documents, 600, tmp_path / "t.json")
    tokenizer.add_tokens([f"<extra {i}>" for i in range(66_000)])
    tokenizer.save(str(tmp_path / "large.json"))
    section = TokenizerSection(identifier=str(tmp_path / "large.json"))
    path = write_jsonl(tmp_path / "a.jsonl", ["a text with <extra 65999> in it"])
    manifest = prepare(make_config(path, tokenizer=section))
    assert manifest.dtype == "uint32" and 66_599 in read_ids(manifest.train_paths, "uint32")
    with pytest.raises(ValueError, match=r"dtype=uint16: .* the tokenizer has 66600; use uint32"):
        prepare(make_config(path, tokenizer=section, dtype="uint16", output="other"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"identifier": "nowhere.json"}, "no such file"),
        ({"identifier": "broken.json"}, "no valid tokenizer.json"),
        ({"identifier": "bare.json"}, "has no '<|endoftext|>'"),
        ({"identifier": "bare.json", "eos_token_id": 256}, "has no such id"),
        ({"identifier": "bare.json", "eos_token_id": 3}, "has no '<|padding|>'"),
    ],
)
def test_tokenizers_that_will_not_do_are_refused(
    options: dict, words: str, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    Tokenizer(models.BPE(alphabet, [])).save("bare.json")
    path = write_jsonl(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(ValueError) as error:
        prepare(make_config(path, tokenizer=TokenizerSection(**options)))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_end_of_document_that_texts_can_forge_is_refused(
    tokenizer_file: Path, make_config: Make, tmp_path: Path
) -> None:
    content = json.loads(tokenizer_file.read_bytes())
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "plain.json").write_text(json.dumps(content))
    path = write_jsonl(tmp_path / "a.jsonl", ["Write <|endoftext|> between two texts", "A second document."])
    with pytest.raises(ValueError, match=r'eos_token_id=0: a text with .* "special": true'):
        prepare(make_config(path, tokenizer=TokenizerSection(identifier=str(tmp_path / "plain.json"))))


def test_a_tokenizer_is_trained_on_the_sources(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    section = TokenizerSection(train_vocab_size=500)
    config = make_config(write_jsonl(tmp_path / "a.jsonl", documents), tokenizer=section)
    manifest = prepare(config)
    assert manifest.tokenizer.vocab_size == 500 and manifest.tokenizer.origin == "trained"
    assert prepare(config).tokenizer == manifest.tokenizer
    config.tokenizer.train_vocab_size = 501
    with pytest.raises(ValueError, match=r"expected 501, found 500"):
        prepare(config)
    config.tokenizer = TokenizerSection(train_vocab_size=500, train_bytes=2**20)
    with pytest.raises(ValueError, match=r"tokenizer.train_bytes: expected 1048576, found 67108864"):
        prepare(config)


def test_an_earlier_versions_trained_tokenizer_is_taken_as_it_is(
    documents: list[str], make_config: Make, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    config = make_config(path, tokenizer=TokenizerSection(train_vocab_size=500))
    manifest = prepare(config)
    del manifest.options["tokenizer"]["train_bytes"]  # which it did not write down
    manifest.save()
    assert prepare(config) == manifest


@pytest.mark.parametrize("trained", [False, True])
def test_another_tokenizer_is_not_left_beside_new_shards(
    trained: bool, documents: list[str], make_config: Make, tmp_path: Path
) -> None:
    if trained:
        first = second = TokenizerSection(train_vocab_size=500)
    else:
        for name in ("first", "second"):
            train_tokenizer(documents[:100] if name == "first" else documents[100:], 500, tmp_path / f"{name}.json")
        first, second = (TokenizerSection(identifier=str(tmp_path / f"{name}.json")) for name in ("first", "second"))
    prepare(make_config(write_jsonl(tmp_path / "a.jsonl", documents[:100]), tokenizer=first))
    for path in (tmp_path / "out").iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    other = make_config(write_jsonl(tmp_path / "b.jsonl", documents[100:]), tokenizer=second)
    with pytest.raises(ValueError, match=r"out/tokenizer\.json: is another tokenizer .* delete it or choose") as error:
        prepare(other)
    assert "\n" not in str(error.value)
    (tmp_path / "out" / "tokenizer.json").unlink()
    manifest = prepare(other)
    assert sha256((tmp_path / "out" / "tokenizer.json").read_bytes()) == manifest.tokenizer.sha256


def test_a_tokenizer_is_not_trained_part_by_part(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    train_tokenizer(documents, 500, tmp_path / "out" / "tokenizer.json")
    for i in range(2):
        write_jsonl(tmp_path / f"{i}.jsonl", documents)
    config = make_config(tmp_path / "*.jsonl", tokenizer=TokenizerSection(train_vocab_size=500), part="0/2")
    with pytest.raises(ValueError, match=r"train_vocab_size: cannot be used with parts"):
        prepare(config)

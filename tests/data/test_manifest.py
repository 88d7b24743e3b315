"""What training refuses, and what it reads: shards, manifests, parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpora import folder_bytes, read_ids, write_jsonl
from olmo_core.data import NumpyFSLDataset
from olmo_core.data.types import NumpyUIntTypes
from tokenizers import Tokenizer

from benchmarks.tiny import tiny, write_data
from spattn_olmoe.data import DataConfig, Manifest, SourceConfig, prepare, train_tokenizer, verify
from spattn_olmoe.data.inspection import decode, document, histogram
from spattn_olmoe.data.parts import merge
from spattn_olmoe.data.summary import warnings
from spattn_olmoe.data.tokenizer import sha256
from spattn_olmoe.train.shards import check_data

Make = Callable[..., DataConfig]
Encode = Callable[..., list[int]]


@pytest.fixture(scope="module")
def prepared(documents: list[str], tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of several shards in both splits; copy it before damaging it."""
    from spattn_olmoe.data import TokenizerSection

    folder = tmp_path_factory.mktemp("prepared")
    config = DataConfig(
        output=str(folder / "out"),
        sources=[SourceConfig(paths=[str(write_jsonl(folder / "a.jsonl", documents))])],
        tokenizer=TokenizerSection(identifier=str(tokenizer_file)),
        validation_share=0.2,
        shard_bytes=50_000,
        sequence_length=512,
        workers=2,
    )
    return prepare(config).directory


@pytest.fixture
def shards(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "shards"))


def test_the_manifest_counts_what_is_there(prepared: Path, documents: list[str]) -> None:
    manifest = verify(prepared, vocab_size=600, eos_token_id=0, dtype="uint16", sequence_length=64, hashes=True)
    assert len(manifest.train_paths) >= 2 and len(manifest.validation_paths) >= 1
    for shard in manifest.shards:
        ids = read_ids([str(prepared / shard.path)])
        assert len(ids) == shard.tokens <= 25_000 and ids.count(0) == shard.documents and ids[-1] == 0
    assert manifest.count("train").documents + manifest.count("validation").documents == len(documents)
    s = manifest.statistics
    assert s["tokens"] == manifest.train_tokens + manifest.validation_tokens and sum(s["lengths"]) == len(documents)
    lengths = [len(document(manifest, "train", n)) + 1 for n in range(manifest.count("train").documents)]
    lengths += [len(document(manifest, "validation", n)) + 1 for n in range(manifest.count("validation").documents)]
    assert s["longer_than_sequence_length"] == sum(length > 512 for length in lengths) > 0
    assert s["lengths"][8] == sum(256 <= length < 512 for length in lengths)
    assert Manifest.load(prepared) == manifest


def test_olmo_core_reads_the_shards(prepared: Path, documents: list[str], encode: Encode) -> None:
    manifest = verify(prepared, sequence_length=256)
    dtype: NumpyUIntTypes = np.uint16
    dataset = NumpyFSLDataset(
        *manifest.train_paths,
        sequence_length=256,
        pad_token_id=manifest.tokenizer.pad_token_id,
        eos_token_id=manifest.tokenizer.eos_token_id,
        vocab_size=manifest.tokenizer.vocab_size,
        dtype=dtype,
    )
    dataset.prepare()
    wanted: list[int] = []
    for path in manifest.train_paths:  # a shard's last tokens that fill no sequence are left out
        ids = read_ids([path])
        wanted += ids[: len(ids) // 256 * 256]
    assert len(dataset) == len(wanted) // 256 > 20
    assert [int(i) for n in range(len(dataset)) for i in dataset[n]["input_ids"]] == wanted
    everything = encode(documents)
    assert len(everything) == manifest.train_tokens + manifest.validation_tokens


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"vocab_size": 50_280}, ["vocab_size", "50280", "600"]),
        ({"eos_token_id": 50_279}, ["eos_token_id", "50279", "0"]),
        ({"dtype": "uint32"}, ["dtype", "uint32", "uint16"]),
        ({"sequence_length": 30_000}, ["sequence_length=30000", "nothing to train on"]),
    ],
)
def test_what_a_run_does_not_expect_is_refused(prepared: Path, expected: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        verify(prepared, **expected)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


def _save_with_header(path: Path) -> None:
    ids = np.fromfile(path, dtype=np.uint16)
    with open(path, "wb") as file:
        np.save(file, ids)


def _flip_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _put_id(value: int, place: int) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        ids = np.fromfile(path, dtype=np.uint16)
        ids[place] = value
        ids.tofile(path)

    return put


@pytest.mark.parametrize(
    ("damage", "hashes", "words"),
    [
        (Path.unlink, False, "No such file"),
        (lambda path: path.write_bytes(b""), False, "found 0"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-2]),
            False,
            r"expected \d+ bytes \(\d+ uint16 tokens\), found",
        ),
        (_save_with_header, False, "found an np.save file"),
        (_put_id(600, 0), False, "expected ids below vocab_size=600, found 600"),
        (_put_id(65_535, -1), False, "expected ids below vocab_size=600, found 65535"),
        (_put_id(601, 10_000), True, "expected ids below vocab_size=600, found 601"),
        (_flip_middle, True, "expected SHA-256"),
    ],
)
def test_damaged_shards_are_refused(shards: Path, damage: Callable, hashes: bool, words: str) -> None:
    damage(shards / "train-00001.bin")
    with pytest.raises(ValueError, match=rf"train-00001\.bin: expected .*{words.removeprefix('expected ')}"):
        verify(shards, hashes=hashes)


def test_a_tokenizer_that_was_replaced_is_seen_without_hashes(shards: Path, documents: list[str]) -> None:
    train_tokenizer(documents[:120], 600, shards / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected SHA-256"):
        verify(shards)


def test_another_tokenizer_of_the_same_size_is_refused(prepared: Path, documents: list[str], tmp_path: Path) -> None:
    own, other, copied = prepared / "tokenizer.json", tmp_path / "other" / "tokenizer.json", tmp_path / "copied.json"
    train_tokenizer(documents[:100], 600, other)
    copied.write_text(json.dumps(json.loads(own.read_bytes())))  # other bytes, the same ids
    for tokenizer in (own, copied):
        verify(prepared, vocab_size=600, eos_token_id=0, tokenizer=tokenizer)
    with pytest.raises(ValueError) as error:
        verify(prepared, vocab_size=600, eos_token_id=0, tokenizer=other)
    assert all(str(folder) in str(error.value) for folder in (prepared, other.parent)) and "\n" not in str(error.value)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_data_of_a_run_are_of_one_tokenizer(held_out: bool, tmp_path: Path) -> None:
    first, second = write_data(tmp_path / "a"), write_data(tmp_path / "b", seed=1)
    paths = [f"{first}/train-*.bin", f"{second}/train-*.bin"]
    key = "trainer.callbacks.lm_evaluator"
    overrides = [f"dataset.paths=[{', '.join(paths[: 1 if held_out else 2])}]"]
    if held_out:
        overrides += [
            f"{key}.enabled=true",
            f"{key}.eval_dataset.paths=[{paths[1]}]",
            f"{key}.eval_dataset.dtype=uint16",
        ]
    check_data(tiny(*overrides))
    words = (second / "tokenizer.json").read_text().replace('"w5"', '"other"')
    (second / "tokenizer.json").write_text(words)
    manifest = Manifest.load(second)
    replace(manifest, tokenizer=replace(manifest.tokenizer, sha256=sha256(words.encode()))).save()
    with pytest.raises(ValueError, match=rf"{second}: .*another tokenizer than that of {first}; prepare") as error:
        check_data(tiny(*overrides))
    assert "\n" not in str(error.value)


def test_damage_in_the_middle_is_only_seen_with_hashes(shards: Path) -> None:
    _flip_middle(shards / "train-00000.bin")
    verify(shards)
    with pytest.raises(ValueError, match="SHA-256"):
        verify(shards, hashes=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "found none; prepare the corpus with"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "no valid JSON"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": "other"}'), "found 'other'"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "found no such file"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "expected SHA-256"),
    ],
)
def test_a_folder_that_is_no_corpus_is_refused(shards: Path, change: Callable, words: str) -> None:
    change(shards)
    with pytest.raises(ValueError, match=words):
        verify(shards, hashes=True)


def test_documents_are_decoded(prepared: Path, documents: list[str], tokenizer_file: Path) -> None:
    manifest = Manifest.load(prepared)
    texts = [decode(manifest, document(manifest, "train", n)) for n in range(manifest.count("train").documents)]
    held_out = [
        decode(manifest, document(manifest, "validation", n)) for n in range(manifest.count("validation").documents)
    ]
    assert sorted(texts + held_out) == sorted(documents) and set(texts).isdisjoint(held_out)
    with pytest.raises(ValueError, match="expected document 999"):
        document(manifest, "train", 999)
    assert histogram(manifest.statistics["lengths"]).row_count > 1


def test_only_a_document_longer_than_a_shard_is_split(
    documents: list[str], make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    long = "".join(documents[:20])
    texts = [documents[20], long, documents[21]]
    manifest = prepare(make_config(write_jsonl(tmp_path / "a.jsonl", texts), shard_bytes=8192))
    assert read_ids(manifest.train_paths) == encode(texts)
    assert [shard.documents for shard in manifest.shards][:2] == [1, 0]
    assert all(shard.tokens == 4096 for shard in manifest.shards[1:-1])
    for number, text in enumerate(texts):
        assert document(manifest, "train", number).tolist() == encode([text])[:-1]
    verify(manifest.directory, hashes=True)


def test_max_tokens_stops_behind_the_document_that_reaches_it(
    documents: list[str], make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    ids = encode(documents)
    manifest = prepare(make_config(write_jsonl(tmp_path / "a.jsonl", documents), max_tokens=5000))
    found = read_ids(manifest.train_paths)
    assert len(found) >= 5000 and found == ids[: len(found)] and 0 not in found[4999:-1] and found[-1] == 0
    written = documents[: manifest.count("train").documents]
    assert manifest.statistics["text_bytes"] == sum(len(text.encode()) for text in written)


def test_weights_are_shares_of_the_tokens(
    documents: list[str], make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spattn_olmoe.data.readers.CHUNK_BYTES", 20_000)
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", documents * 6) for i in range(2)]
    sources = [SourceConfig(paths=[str(path)], weight=weight) for path, weight in zip(paths, (3.0, 1.0), strict=True)]
    kept = prepare(make_config(sources=sources, when_exhausted="stop", output="kept"))
    assert kept.sources[0]["tokens"] / kept.statistics["tokens"] == pytest.approx(0.75, abs=0.03)
    assert list(warnings(kept)) == []
    everything = prepare(make_config(sources=sources, output="all"))
    assert [source["documents"] for source in everything.sources] == [len(documents) * 6] * 2
    assert ["a source was exhausted" in line for line in warnings(everything)] == [True, True]


def test_parts_together_are_the_whole(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    for i in range(6):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", documents[i * 40 : (i + 1) * 40])
    options = {"validation_share": 0.2, "output": "parts"}
    whole = prepare(make_config(tmp_path / "in" / "*.jsonl", **{**options, "output": "whole"}))
    for i in range(3):
        if i:
            with pytest.raises(ValueError, match=f"expected 3 parts, found {i}; missing: "):
                merge(tmp_path / "parts")
        prepare(make_config(tmp_path / "in" / "*.jsonl", **options, part=f"{i}/3"))
    merged = merge(tmp_path / "parts", hashes=True)
    assert verify(tmp_path / "parts", hashes=True) == merged
    for split in ("train", "validation"):
        tokens = {name: m.count(split).tokens for name, m in (("whole", whole), ("merged", merged))}
        assert tokens["whole"] == tokens["merged"]
        found = [
            sorted(decode(m, document(m, split, n)) for n in range(m.count(split).documents)) for m in (whole, merged)
        ]
        assert found[0] == found[1] and found[0]
    assert merged.statistics == whole.statistics
    shutil.rmtree(tmp_path / "parts" / "part-0002-of-0003")
    prepare(make_config(tmp_path / "in" / "*.jsonl", **options, part="2/3", seed=1))
    with pytest.raises(ValueError, match="other options: seed: expected 0, found 1"):
        merge(tmp_path / "parts")


def _forget_listing(folder: Path) -> None:
    """A part as earlier versions wrote it."""
    content = json.loads((folder / "manifest.json").read_text())
    for source in content["options"]["sources"]:
        del source["files_of_all_parts"]
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize("known", [True, False], ids=["listing known", "earlier version"])
def test_parts_that_found_other_files_are_not_merged(
    known: bool, documents: list[str], make_config: Make, tmp_path: Path
) -> None:
    def files(n: int) -> Path:
        for i in range(n):
            write_jsonl(tmp_path / "in" / f"{i}.jsonl", documents[i * 20 : (i + 1) * 20])
        return tmp_path / "in" / "*.jsonl"

    first = prepare(make_config(files(3), part="0/2"))
    second = prepare(make_config(files(7), part="1/2"))
    listings = [[name for name, _size in m.options["sources"][0]["files"]] for m in (first, second)]
    assert set(listings[0]) & set(listings[1])  # one is doubled, and others are in neither part
    if not known:
        _forget_listing(second.directory)
    with pytest.raises(ValueError, match=r"part-0001-of-0002: sources\[0\]: .*part-0000-of-0002.*prepare") as error:
        merge(tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "manifest.json").exists()


def test_parts_whose_listings_are_unknown_are_merged_and_resumed(
    documents: list[str], make_config: Make, tmp_path: Path
) -> None:
    for i in range(4):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", documents[i * 20 : (i + 1) * 20])
    config = make_config(tmp_path / "in" / "*.jsonl", part="1/2")
    prepare(make_config(tmp_path / "in" / "*.jsonl", part="0/2"))
    _forget_listing(prepare(config).directory)
    assert prepare(config).count("train").documents == 40
    assert merge(tmp_path / "out").count("train").documents == 80
    write_jsonl(tmp_path / "in" / "later.jsonl", documents[-20:])
    with pytest.raises(ValueError, match=r"sources\[0\]\.files"):  # its own, or those of all
        prepare(make_config(tmp_path / "in" / "*.jsonl", part="0/2"))


def test_more_parts_than_files_are_refused(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 files, too few for 2 parts"):
        prepare(make_config(write_jsonl(tmp_path / "a.jsonl", documents), part="0/2"))


def test_the_seed_orders_the_files_and_nothing_else(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    for i in range(8):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", documents[i * 30 : (i + 1) * 30])
    found = {
        name: prepare(make_config(tmp_path / "in" / "*.jsonl", output=name, **options))
        for name, options in {"a": {}, "b": {"seed": 1}, "c": {"shuffle_files": False}}.items()
    }
    ids = {name: read_ids(manifest.train_paths) for name, manifest in found.items()}
    assert ids["a"] != ids["b"] != ids["c"] and sorted(ids["a"]) == sorted(ids["b"]) == sorted(ids["c"])
    again = prepare(make_config(tmp_path / "in" / "*.jsonl", output="again", workers=3))
    assert folder_bytes(again.directory)["train-00000.bin"] == folder_bytes(found["a"].directory)["train-00000.bin"]


def test_the_manifest_is_json_without_dates_or_machine_paths(prepared: Path) -> None:
    content = json.loads((prepared / "manifest.json").read_text())
    assert content["format"] == "spattn_olmoe shards 1"
    assert content["options"]["sources"][0]["files"][0][0] == "a.jsonl"


def test_the_wheels_tokenizer_file_is_the_one_beside_the_shards(prepared: Path, tokenizer_file: Path) -> None:
    beside = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    assert beside.get_vocab() == Tokenizer.from_file(str(tokenizer_file)).get_vocab()

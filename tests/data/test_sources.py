"""Every kind of source, good and bad, through ``prepare``."""

from __future__ import annotations

import base64
import functools
import gzip
import http.server
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpora import read_ids, rejects, write_jsonl

from spattn_olmoe.data import DataConfig, SourceConfig, prepare
from spattn_olmoe.data.chunks import Chunk, Position
from spattn_olmoe.data.encode import is_validation
from spattn_olmoe.data.sources import HubSource
from spattn_olmoe.data.summary import warnings

Make = Callable[..., DataConfig]
Encode = Callable[..., list[int]]


def write_as(kind: str, folder: Path, texts: list[str]) -> Path:
    """The texts in one file (or, for plain text, one file each) of some kind; returns the glob that matches it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": t, "meta": {"n": i}}) + "\n" for i, t in enumerate(texts)).encode()
    path = folder / f"a.{kind}"
    if kind in ("jsonl", "json"):
        path.write_bytes(lines)
    elif kind in ("jsonl.gz", "json.gz"):
        path.write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))  # two members are one file
    elif kind == "jsonl.zst":
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines[:1000]) + compress(lines[1000:]))  # and so are two frames
    elif kind == "parquet":
        pq.write_table(
            pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=70, write_page_checksum=True
        )
    elif kind == "txt":
        for i, text in enumerate(texts):
            (folder / f"{i:04d}.txt").write_text(text, encoding="utf-8", newline="")
        return folder / "*.txt"
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "json.gz", "jsonl.zst", "parquet", "txt"])
def test_every_format_gives_each_documents_ids_and_an_eos(
    kind: str, documents: list[str], make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    manifest = prepare(make_config(write_as(kind, tmp_path / "in", documents), shuffle_files=False))
    assert read_ids(manifest.train_paths) == encode(documents)
    assert manifest.count("train").documents == len(documents)
    assert rejects(manifest.directory) == []


def test_text_files_are_split_at_a_separator(
    documents: list[str], make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    texts = [text.strip("\r\n") for text in documents]
    (tmp_path / "all.txt").write_text("\n<|doc|>\n".join(texts) + "\n<|doc|>\n", encoding="utf-8", newline="")
    source = SourceConfig(paths=[str(tmp_path / "all.txt")], separator="<|doc|>")
    assert read_ids(prepare(make_config(sources=[source])).train_paths) == encode(texts)


@pytest.mark.parametrize("separator", [None, "<|doc|>"])
@pytest.mark.parametrize("ending", ["txt", "txt.zst"])
def test_text_files_of_the_hub_are_documents_as_local_ones_are(
    ending: str, separator: str | None, make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    texts = [f"story {i}, its first line\nand its second" for i in range(40)]
    content = (f"\n{separator}\n" if separator else "\n").join(texts).encode()
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / f"a.{ending}").write_bytes(
        zstandard.ZstdCompressor().compress(content) if ending == "txt.zst" else content
    )
    source = SourceConfig(hub=str(tmp_path / "hub"), separator=separator)
    manifest = prepare(make_config(sources=[source]))
    assert read_ids(manifest.train_paths) == encode(texts if separator else [content.decode()])


def test_what_else_the_hub_would_give_line_by_line_is_refused(make_config: Make, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt.bz2"):
        (tmp_path / name).write_bytes(b"two lines\nof a document")
    source = SourceConfig(hub="text", data_files=[str(tmp_path / "*.*")])
    with pytest.raises(ValueError, match=r"sources\[0\]\.data_files: .*c\.txt\.bz2 is no \.txt") as error:
        prepare(make_config(sources=[source]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_hub_datasets_stream_through_datasets(
    kind: str, documents: list[str], make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    write_as(kind, tmp_path / "hub" / "one", documents[:100])
    write_as(kind, tmp_path / "hub" / "two", documents[100:])
    write_as(kind, tmp_path / "hub" / "unwanted", ["not asked for"])
    source = SourceConfig(hub=str(tmp_path / "hub"), data_files=[f"one/*.{kind}", f"two/*.{kind}"])
    manifest = prepare(make_config(sources=[source], shuffle_files=False))
    assert read_ids(manifest.train_paths) == encode(documents)
    assert [name for name, _ in manifest.options["sources"][0]["files"]] == [f"one/a.{kind}", f"two/a.{kind}"]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server over ``tmp_path / "web"``."""
    (tmp_path / "web").mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(tmp_path / "web"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_file_is_streamed_over_the_network_and_its_loss_is_one_line(
    web: str,
    documents: list[str],
    make_config: Make,
    encode: Encode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_as("jsonl", tmp_path / "web" / "one", documents[:120])
    second = write_as("jsonl.zst", tmp_path / "web" / "two", documents[120:])
    # `json` is the builder of a hub dataset of JSON lines, and addresses are what its file names resolve to
    source = SourceConfig(hub="json", data_files=[f"{web}/one/a.jsonl", f"{web}/two/a.jsonl.zst"])
    config = make_config(sources=[source], shuffle_files=False)
    read = HubSource.read

    def read_until_it_is_gone(self: HubSource, index: int, start: Position) -> Iterator[Chunk]:
        if index == 1:
            second.rename(tmp_path / "away")
        return read(self, index, start)

    with monkeypatch.context() as patch:
        patch.setattr(HubSource, "read", read_until_it_is_gone)
        with pytest.raises(ValueError, match=r"sources\[0\]\.hub='json'.*run the same command again") as error:
            prepare(config)
    assert "\n" not in str(error.value)
    (tmp_path / "away").rename(second)
    assert read_ids(prepare(config).train_paths) == encode(documents)


def test_no_network_is_one_line(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"sources\[0\]\.hub='nobody/nothing'.*network") as error:
        prepare(make_config(sources=[SourceConfig(hub="nobody/nothing")]))
    assert "\n" not in str(error.value)


def test_a_split_that_is_not_there_is_refused(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    write_as("jsonl", tmp_path / "hub", documents)
    with pytest.raises(ValueError, match=r"sources\[0\]\.split='test'.*has train"):
        prepare(make_config(sources=[SourceConfig(hub=str(tmp_path / "hub"), split="test")]))


GOOD = json.dumps({"text": "a sound document"}).encode()
BAD_LINES = {
    b'{"text": "half a': "malformed JSON",
    b'{"txt": "x"}': "no field 'text' (has 'txt')",
    b'{"text": 3}': "field 'text' is int",
    b'{"text": null}': "field 'text' is NoneType",
    b'["text"]': "no JSON object but list",
    b'{"text": ""}': "empty document",
    b'{"text": " \\n\\t"}': "empty document",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "\\ud800"}': "not Unicode",
    b'{"text": "' + b"long " * 4000 + b'"}': "more than max_document_bytes=10000",
    b"[" * 100_000: "malformed JSON",
}


@pytest.mark.parametrize("hub", [False, True], ids=["local", "hub"])
def test_every_bad_line_is_rejected_with_its_number_and_reason(
    hub: bool, make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    lines = [line for bad in BAD_LINES for line in (GOOD, bad)] + [GOOD, b"", b"\r"]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    source = (
        SourceConfig(hub=str(tmp_path), data_files=["*.jsonl"])
        if hub
        else SourceConfig(paths=[str(tmp_path / "bad.jsonl")])
    )
    config = make_config(sources=[source], max_document_bytes=10_000, max_reject_share=0.6)
    manifest = prepare(config)
    assert read_ids(manifest.train_paths) == encode(["a sound document"] * (len(BAD_LINES) + 1))
    found = rejects(manifest.directory)
    assert [(r["file"], r["number"]) for r in found] == [("bad.jsonl", 2 * i + 2) for i in range(len(BAD_LINES))]
    for reject, reason in zip(found, BAD_LINES.values(), strict=True):
        assert reason in reject["reason"], reject
    assert manifest.statistics["rejects"] == len(BAD_LINES)


def test_a_text_file_of_windows_is_split_at_the_same_separator(
    make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(b"first text\r\nstill first\r\n\r\nsecond text\r\n\r\nthird\r\n")
    source = SourceConfig(paths=[str(tmp_path / "a.txt")], separator="\n\n")
    manifest = prepare(make_config(sources=[source]))
    assert manifest.count("train").documents == 3
    assert read_ids(manifest.train_paths) == encode(["first text\r\nstill first", "second text", "third"])


def test_an_integer_of_5000_digits_beside_the_text_is_no_matter(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a text", "id": ' + "7" * 5000 + "}\n")
    assert prepare(make_config(tmp_path / "a.jsonl")).count("train").documents == 1


def test_a_name_with_brackets_is_that_file_before_it_is_a_pattern(
    documents: list[str], make_config: Make, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "wiki[en]" / "a.jsonl", documents)
    assert prepare(make_config(path)).count("train").documents == len(documents)


def test_pipes_and_devices_are_refused(make_config: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    os.symlink("/dev/zero", tmp_path / "b.jsonl")
    for name in ("a", "b"):
        with pytest.raises(ValueError, match="is a pipe or a device"):
            prepare(make_config(tmp_path / f"{name}.jsonl"))


def test_a_line_too_long_for_memory_is_skipped_without_being_held(
    documents: list[str], make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents[:50])
    with open(path, "ab") as file:
        file.write(b'{"text": "' + b"x" * 3_000_000 + b'"}\n')
    with open(path, "ab") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in documents[50:]).encode())
    manifest = prepare(make_config(path, max_document_bytes=100_000))
    assert read_ids(manifest.train_paths) == encode(documents)
    assert [(r["number"], r["reason"]) for r in rejects(manifest.directory)] == [(51, "longer than 400000 bytes")]
    assert list(warnings(manifest)) == []  # the file was read to its end


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_an_archive_cut_off_within_a_line_too_long_is_told(
    kind: str, documents: list[str], make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    noise = base64.b64encode(random.Random(0).randbytes(3_000_000)).decode()
    path = write_as(kind, tmp_path, [*documents[:100], noise, *documents[100:]])
    path.write_bytes(path.read_bytes()[:-300_000])
    manifest = prepare(make_config(path, max_document_bytes=100_000, max_reject_share=0.5))
    assert read_ids(manifest.train_paths) == encode(documents[:100])
    found = [(r["number"], r["reason"]) for r in rejects(manifest.directory)]
    assert found == [
        (101, "longer than 400000 bytes"),
        (102, f"truncated {'gzip' if kind == 'jsonl.gz' else 'zstd'} archive"),
    ]
    assert ["could not be read to their end" in line for line in warnings(manifest)] == [True]


@pytest.mark.parametrize(
    ("hub", "kind"),
    [(False, "jsonl.gz"), (False, "jsonl.zst"), (False, "parquet"), (True, "jsonl.gz"), (True, "jsonl.zst")],
)
@pytest.mark.parametrize("damage", ["truncated", "corrupt", "other kind", "empty"])
def test_a_damaged_archive_is_rejected_and_the_other_files_are_read(
    hub: bool, kind: str, damage: str, documents: list[str], make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    path = write_as(kind, tmp_path / "1", documents[:120])
    whole = path.read_bytes()
    middle = 3 * len(whole) // 4  # inside the texts, whatever the format
    damaged = {
        "truncated": whole[:middle],
        "corrupt": whole[:middle] + bytes(b ^ 0xA5 for b in whole[middle : middle + 64]) + whole[middle + 64 :],
        "other kind": b"this is no archive at all, whatever its name says\n" * 10,
        "empty": b"",  # as a failed download leaves it
    }
    path.write_bytes(damaged[damage])
    sound = write_as(kind, tmp_path / "2", documents[120:])
    options: dict[str, Any] = {"shuffle_files": False, "max_reject_share": 0.5}
    if hub:
        source = SourceConfig(hub=str(tmp_path), data_files=[f"{i}/a.{kind}" for i in (1, 2)])
        manifest = prepare(make_config(sources=[source], **options))
    else:
        manifest = prepare(make_config(path, sound, **options))
    ids, end = read_ids(manifest.train_paths), encode(documents[120:])
    assert ids[len(ids) - len(end) :] == end
    # whatever came through of the damaged file are its first documents, whole; only gzip's checksum stands at its very
    # end, so that garbage may come through in front of it
    through = manifest.count("train").documents - 120
    if (kind, damage) != ("jsonl.gz", "corrupt"):
        assert ids[: len(ids) - len(end)] == encode(documents[:through])
    found = rejects(manifest.directory)
    assert {reject["file"] for reject in found} == {path.relative_to(tmp_path).as_posix()}
    assert any(word in found[-1]["reason"] for word in ("gzip", "zstd", "Parquet", "archive")), found
    assert manifest.sources[0]["broken_files"] == 1


def test_a_truncated_archive_of_another_kind_is_told_as_well(make_config: Make, tmp_path: Path) -> None:
    lines = "text\n" + "".join(f"text {i * 7919 % 99_991} of many\n" for i in range(60_000))
    whole = zstandard.ZstdCompressor().compress(lines.encode())
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.csv.zst").write_bytes(whole[: len(whole) // 2])
    manifest = prepare(make_config(sources=[SourceConfig(hub=str(tmp_path / "hub"))]))
    assert [r["reason"] for r in rejects(manifest.directory)] == ["truncated zstd archive"]
    assert manifest.sources[0]["broken_files"] == 1


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"body": ["x", "y"]}, "no column 'text' (has body)"),
        ({"text": [1, 2]}, "column 'text' is int64, no text"),
        ({"text": ["sound", None]}, "'text' is null"),
        ({"text": pa.array([b"sound", b"caf\xe9"])}, "not UTF-8"),
    ],
)
def test_bad_tables_are_rejected(table: dict, reason: str, make_config: Make, tmp_path: Path) -> None:
    good, bad = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": ["one", "two"]}), good)
    pq.write_table(pa.table(table), bad)
    manifest = prepare(make_config(good, bad, max_reject_share=0.5))
    assert [(r["file"], r["reason"][: len(reason)]) for r in rejects(manifest.directory)] == [("b.parquet", reason)]


def test_a_file_that_is_no_utf8_or_empty_is_rejected(make_config: Make, tmp_path: Path) -> None:
    for name, content in (("a", b"good"), ("b", b"caf\xe9"), ("c", b"")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    manifest = prepare(make_config(tmp_path / "*.txt", max_reject_share=0.7, shuffle_files=False))
    assert [(r["file"], r["reason"][:14]) for r in rejects(manifest.directory)] == [
        ("b.txt", "not UTF-8: une"),
        ("c.txt", "empty document"),
    ]


def test_too_many_rejects_stop_the_run_and_a_larger_share_lets_it_go_on(
    make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD] * 90 + [b"{"] * 10) + b"\n")
    with pytest.raises(ValueError, match=r"max_reject_share=0.01: 10 of 100 documents .*a\.jsonl:100 \(malformed"):
        prepare(make_config(path))
    manifest = prepare(make_config(path, max_reject_share=0.1))
    assert read_ids(manifest.train_paths) == encode(["a sound document"] * 90)
    assert len(rejects(manifest.directory)) == 10


def test_nothing_but_rejects_is_no_corpus(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    with pytest.raises(ValueError, match="hold no documents"):
        prepare(make_config(tmp_path / "a.jsonl", max_reject_share=1.0))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("nowhere/*.jsonl", "no file matches"), ("a.csv", "unknown kind"), ("a.parquet.gz", "unknown kind")],
)
def test_paths_that_cannot_be_meant_are_refused(pattern: str, words: str, make_config: Make, tmp_path: Path) -> None:
    for name in ("a.csv", "a.parquet.gz"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=rf"sources\[0\]\.paths: .*{words}"):
        prepare(make_config(tmp_path / pattern))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_one_line(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    path.chmod(0)
    with pytest.raises(ValueError, match="no permission to read"):
        prepare(make_config(path))


def test_an_output_that_cannot_be_made_is_one_line(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"output: .*file/out: Not a directory"):
        prepare(make_config(write_jsonl(tmp_path / "a.jsonl", documents), output="file/out"))


def test_special_tokens_in_a_text_are_text(make_config: Make, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["before <|endoftext|> after", "<|padding|>"])
    ids = read_ids(prepare(make_config(path)).train_paths)
    assert ids.count(0) == 2 and ids[-1] == 0 and 1 not in ids


def test_validation_depends_on_the_text_alone_and_grows_with_its_share(
    documents: list[str], make_config: Make, encode: Encode, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*documents, *documents[:20]])  # with duplicates
    manifest = prepare(make_config(path, validation_share=0.2))
    held_out = [text for text in [*documents, *documents[:20]] if is_validation(text.encode(), 0.2)]
    rest = [text for text in [*documents, *documents[:20]] if not is_validation(text.encode(), 0.2)]
    assert 20 < len(held_out) < 90 and not set(held_out) & set(rest)
    assert read_ids(manifest.validation_paths) == encode(held_out)
    assert read_ids(manifest.train_paths) == encode(rest)
    assert all(is_validation(text.encode(), 0.3) for text in held_out)

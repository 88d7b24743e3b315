"""The one reader of YAML and key=value words: its grammar, and one line for whatever it cannot read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from spattn_olmoe.data import load_config
from spattn_olmoe.evaluation.evaluate import read_options
from spattn_olmoe.settings import parse, read, read_as


@dataclass
class Source:
    paths: list[str] = field(default_factory=list)
    weight: float = 1.0


@dataclass
class Corpus:
    sources: list[Source] = field(default_factory=list)
    limit: int | None = 5


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("sources: [{paths: [a]}]\n")
    return path


GRAMMAR = {
    "limit=null": {"limit": None},
    "limit=": {"limit": None},
    "limit=1e-4": {"limit": 1e-4},
    "limit=yes": {"limit": "yes"},
    "limit=TRUE": {"limit": True},
    "limit=a=b": {"limit": "a=b"},
    "limit.deep.er=[1, {x: null}]": {"limit": {"deep": {"er": [1, {"x": None}]}}},
    "sources[0].paths[0]=b": {"sources": [{"paths": ["b"]}]},
    "sources[0].weight=2": {"sources": [{"paths": ["a"], "weight": 2}]},
    "sources=[]": {"sources": []},
}


@pytest.mark.parametrize(("word", "said"), GRAMMAR.items(), ids=GRAMMAR)
def test_a_word_is_yaml_with_dots_and_indices_in_its_key(file, word, said):
    assert read(file, [word]) == {"sources": [{"paths": ["a"]}], **said}


def test_words_without_a_file_have_the_same_grammar():
    assert parse(["a=1e-4", "b.c=[1]", "d=null", "b.e=yes"]) == {"a": 1e-4, "b": {"c": [1], "e": "yes"}, "d": None}


def test_a_schema_has_defaults_and_types(file):
    assert read_as(Corpus, file, ["sources[0].weight=2"]) == Corpus([Source(["a"], 2.0)], 5)
    assert read_as(Corpus, file, ["limit=null"]).limit is None
    for word, said in {"limit=many": "limit", "sources[0].wieght=2": "did you mean 'weight'?"}.items():
        with pytest.raises(ValueError, match=said.replace("?", r"\?")) as caught:
            read_as(Corpus, file, [word])
        assert "\n" not in str(caught.value) and word in str(caught.value)


NO_YAML = {
    "a bracket in a name": "sources[0].paths=[/x/wiki[en]/a.jsonl]",
    "an open quote": 'limit="',
    "an open interpolation": "limit=${",
    "an interpolation to nowhere": "limit=${nowhere}",
    "too deep": "limit=" + "[" * 5000,
    "a number without end": "limit=" + "9" * 5000,
    "a list as a key": "limit={[1]: 2}",
    "a Python object": "limit=!!python/object/apply:os.getcwd []",
    "a zero byte": "limit=\0",
    "an index that is not there": "sources[7].weight=1",
    "a key of dots": "a..b=1",
    "an open index": "sources[0=1",
    "no key": "=1",
    "no value": "limit",
}


@pytest.mark.parametrize("word", NO_YAML.values(), ids=NO_YAML)
@pytest.mark.parametrize("reader", [read, lambda file, words: read_as(Corpus, file, words)], ids=["plain", "schema"])
def test_a_word_that_cannot_be_read_is_one_line(file, reader, word):
    with pytest.raises(ValueError) as caught:
        reader(file, [word])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_every_command_refuses_such_a_word_alike(file):
    for call in (lambda word: load_config(file, [word]), lambda word: read_options([word])):
        with pytest.raises(ValueError, match="is no YAML"):
            call("tokenizer=[/x/wiki[en]/a.jsonl]")


NO_FILE = {
    "a number": (b"3", "must hold a mapping"),
    "plain text": (b"hello world\n", "must hold a mapping"),
    "a list": (b"- 1\n", "must hold a mapping"),
    "two documents": (b"a: 1\n---\nb: 2\n", "is not valid YAML"),
    "a key twice": (b"a: 1\na: 2\n", "duplicate key a, line 2"),
    "too deep": (b"a: " + b"[" * 5000, "nested too deeply"),
    "bytes": (b"\xff\xfe\x00", "is not valid YAML"),
    "a null as a key": (b"null: 1\n", "is not valid YAML"),
}


@pytest.mark.parametrize(("content", "said"), NO_FILE.values(), ids=NO_FILE)
def test_a_file_that_cannot_be_read_is_one_line(file, content, said):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        read(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_word_below_a_reference_changes_that_section_alone(file):
    file.write_text("a: {size: 1, id: 7}\nb: {own: '${a}'}")
    assert read(file, ["b.own.size=2"]) == {"a": {"size": 1, "id": 7}, "b": {"own": {"size": 2, "id": 7}}}


def test_what_is_read_in_threads_at_once_is_bounded_each_by_itself(tmp_path):
    """References that one reader has followed do not count for another, whichever ends first."""
    file = tmp_path / "many.yaml"
    file.write_text("a: x\nb: [" + ", ".join(["'${a}'"] * 900) + "]\n")
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: read(file), range(12)):
            assert found["b"] == ["x"] * 900
    assert read(file)["a"] == "x"

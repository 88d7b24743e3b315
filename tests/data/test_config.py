from pathlib import Path

import pytest

from spattn_olmoe.data import load_config

ROOT = Path(__file__).parents[2]
MINIMAL = "output: out\nsources: [{paths: [a.jsonl]}]\ntokenizer: {identifier: t.json}\n"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_yaml_overrides_in_this_order(config_file: Path) -> None:
    config = load_config(config_file, ["seed=7", "sources[0].field=content", "max_tokens=1000"])
    assert (config.seed, config.sources[0].field, config.max_tokens) == (7, "content", 1000)
    assert config.shard_bytes == 2**30 and config.sources[0].paths == ["a.jsonl"]


def test_extends_takes_the_base_first(config_file: Path) -> None:
    child = config_file.with_name("child.yaml")
    child.write_text("extends: c.yaml\nseed: 3\n")
    config = load_config(child)
    assert (config.seed, config.output) == (3, "out")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    assert config.sources and config.output
    for source in config.sources:
        assert not source.hub or source.revision, "a hub source is pinned"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("shard_byte=1", ["shard_byte", "'shard_bytes'"]),
        ("sources[0].feild=x", ["feild", "'field'"]),
        ("tokenizer.identifer=x", ["identifer", "'identifier'"]),
        ("seed=many", ["seed", "many"]),
        ("seed", ["'seed' is no key=value"]),
        ("dtype=int8", ["dtype", "'int8'", "uint16"]),
        ("part=3/3", ["part", "3/3"]),
        ("validation_share=1.5", ["validation_share=1.5", "between 0 and 1"]),
        ("sources[0].weight=0", ["sources[0].weight", "above 0"]),
        ("sources[0].hub=x", ["sources[0]", "not both"]),
        ("sources=[]", ["sources", "none given"]),
        ("tokenizer.train_vocab_size=300", ["tokenizer", "either"]),
        ("max_tokens=0", ["max_tokens=0", "above 0"]),
        ("when_exhausted=wait", ["when_exhausted", "continue, stop"]),
    ],
)
def test_wrong_values_are_refused_in_one_line(config_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_config(config_file, [override])
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (MINIMAL + "outptu: x\n", ["outptu", "'output'"]),
        (MINIMAL.replace("paths", "path"), ["sources", "path", "'paths'"]),
        ("a: [", ["is not valid YAML"]),
        ("- 1\n", ["must hold a mapping"]),
        (MINIMAL.replace("output: out\n", ""), ["output"]),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        load_config(path)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")

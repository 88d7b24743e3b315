"""Files of strangers: names stay in their folder, JSON has a structure, text is text, YAML is bounded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spattn_olmoe import trust
from spattn_olmoe.errors import Parser, user_errors, whole
from spattn_olmoe.files import inside, matching
from spattn_olmoe.json_files import check_shape, parse_json, read_json, to_json
from spattn_olmoe.settings import read
from spattn_olmoe.text import figure_text, inline, inlined, visible
from spattn_olmoe.train.ranges import check_ranges

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize(
    "name", ["../secret", "a/../../secret", "/etc/passwd", "", "a\0b", "out", "pipe", "folder/out"]
)
def test_names_that_lead_out_or_name_no_file_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "data"
    (folder / "folder").mkdir(parents=True)
    os.symlink("../secret", folder / "out")
    os.symlink("../../secret", folder / "folder/out")
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError):
        inside(folder, name)


def test_names_inside_are_files_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data/part").mkdir(parents=True)
    (tmp_path / "data/part/a.bin").write_text("x")
    os.symlink(tmp_path / "data", tmp_path / "link")
    assert inside(tmp_path / "link", "part/a.bin").read_text() == "x"
    assert inside(tmp_path / "data", "not-there-yet").name == "not-there-yet"


def test_a_name_is_itself_before_it_is_a_pattern(tmp_path: Path) -> None:
    for name in ("a[1].bin", "a1.bin"):
        (tmp_path / name).write_text("")
    assert matching(f"{tmp_path}/a[1].bin") == [tmp_path / "a[1].bin"]
    assert matching(f"{tmp_path}/a[12].bin") == [tmp_path / "a1.bin"]
    assert matching("null\0byte") == []


@pytest.mark.parametrize(
    "text",
    ["{", "[" * 100_000, "[" * 200 + "]" * 200, '{"a": ' + "7" * 5000 + "}", "\udce9", '{"n": 1.5}', "[1]", "null"],
)
def test_json_that_is_none_or_has_another_structure_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as refused:
        read_json(path, {"n": int})
    assert str(path) in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="no regular file"):
        read_json(tmp_path / "a.json")


@given(JSON)
def test_what_is_written_is_json_whatever_it_holds(value: object) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert parse_json(to_json(value), "x") is not ... and json.loads(to_json(value), parse_constant=refuse) is not ...


@given(JSON)
def test_a_shape_is_met_or_a_value_error(value: object) -> None:
    shape = {"a": [int], "b": (str, None), "c": {str: float}}
    try:
        check_shape(value, shape, "x")
    except ValueError as error:
        assert str(error).startswith("x: ")
    else:
        assert isinstance(value, dict) and {"a", "b", "c"} <= value.keys()


@given(st.text())
def test_text_in_a_line_stays_in_it(text: str) -> None:
    shown = inline(text)
    assert len(shown.splitlines()) <= 1 and "\x1b" not in shown and shown.count("|") == shown.count("\\|")
    assert inlined({text: [text]}) == {shown: [shown]}
    assert "\x1b" not in visible(text) and figure_text("$x^{$") == r"\$x^{\$"


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{key}: &{key} [{','.join([f'*{before}'] * 10)}]\n" for before, key in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "text", [ALIASES, "a: &a [*a]\n", "a: " + "[" * 200 + "]" * 200], ids=["bomb", "endless", "deep"]
)
def test_yaml_that_grows_is_refused_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"aliases|nested too deeply"):
        read(tmp_path / "a.yaml")


def doubling(line: str) -> str:
    """YAML of thirty lines, each of which refers to the one before."""
    return "n0: a0\na0: xx\n" + "".join(line.format(i=i, j=i - 1) + "\n" for i in range(1, 31))


@pytest.mark.parametrize(
    "text",
    [
        doubling("a{i}: ${{a{j}}}${{a{j}}}"),
        doubling("a{i}: {{x: '${{a{j}}}', y: '${{a{j}}}'}}"),
        doubling("n{i}: a{i}\na{i}: ${{${{n{j}}}}}${{${{n{j}}}}}"),
        doubling("a{i}: '${{oc.select:a{j}}}${{oc.select:a{j}}}'"),
        "a: x\nb: '" + "${a}" * 3000 + "'",
        "a: " + "x" * 10**6 + "\nb: '" + "${a}" * 9 + "'",
    ],
    ids=["text", "mapping", "nested", "resolver", "many", "long"],
)
def test_references_that_double_are_refused_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match="references"):
        read(tmp_path / "a.yaml")


def test_an_integer_beyond_all_floats_is_no_number() -> None:
    with pytest.raises(ValueError, match="a is 1000"):
        check_shape({"a": 10**400}, {"a": float}, "x")
    with pytest.raises(ValueError, match=r"a=1000.*must lie between"):
        check_ranges({"a": 10**400})


@pytest.mark.parametrize("text", ["0", "-1", "nan", "2.5", " ", "9" * 5000, "x"])
def test_a_number_of_the_command_line_is_bounded_and_refused_in_one_line(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser()
    parser.add_argument("--n", type=whole(1, 4))
    assert parser.parse_args(["--n", "4"]).n == 4
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--n", text])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "must be a whole number from 1 to 4" in err


def test_an_error_writes_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), user_errors():
        raise ValueError("a\x1b[31mred\nb")
    assert capsys.readouterr().err == "error: a[31mred b\n"


@pytest.mark.parametrize(
    "text", ["a: ${oc.env:SECRET}", "a: ${oc.${b}:SECRET}\nb: env", "a: ${oc.env:NONE,${oc.env:SECRET}}"]
)
def test_the_environment_is_read_only_when_asked(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match="--trust env") as refused:
        read(tmp_path / "a.yaml")
    assert "hunter2" not in str(refused.value)
    monkeypatch.setattr(trust, "_trusted", {*trust._trusted, trust.ENVIRONMENT})
    assert read(tmp_path / "a.yaml")["a"] == "hunter2"


def test_only_trusted_modules_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spattn_olmoe import build_pattern

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "masks_of_mine.py").write_text(
        "from spattn_olmoe.patterns.registry import pattern_class, register_pattern\n"
        "@register_pattern('mine')\nclass Mine(pattern_class('standard')): pass\n"
    )
    with pytest.raises(ValueError, match="--trust masks_of_mine"):
        build_pattern("masks_of_mine.mine", n_heads=2, band_length=8)
    monkeypatch.setattr(trust, "_trusted", {*trust._trusted, "masks_of_mine"})
    assert build_pattern("masks_of_mine.mine", n_heads=2, band_length=8).n_heads == 2

"""A corpus that every CPython has on board: python scripts/quickstart_corpus.py FOLDER

The language reference (``pydoc_data.topics``), the licence, and the standard library's docstrings laid out much as
``help()`` does, in ``.jsonl`` files of ``{"text": ..., "id": ...}``. It is read from the library's source files,
without running any, so the same interpreter always gives the same bytes. With ``--sources`` the source files themselves take
the docstrings' place: several times as much text.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from spattn_olmoe.errors import Parser, user_errors
from spattn_olmoe.files import complete_or_absent, replace_file

_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data", "lib2to3"}
_SHORTEST = 80
"""Characters: shorter docstrings say little."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def write_stdlib_corpus(folder: str | os.PathLike[str], sources: bool = False) -> list[Path]:
    """Write the corpus, without duplicates and in an order of its own.

    :param sources: source files in place of their docstrings. Never both: what one holds out the other would show.

    :returns: the files, a few MB together.
    :raises ValueError: the interpreter came without the sources of its library, or the folder cannot be written.
    """
    target, library = Path(folder), Path(sysconfig.get_path("stdlib"))
    seen: set[bytes] = set()
    files: dict[str, bytes] = {}
    try:
        main = ("sources", _sources(library)) if sources else ("docstrings", _docstrings(library))
        for name, documents in (("reference", _reference(library)), main):
            lines = [json.dumps({"text": text, "id": i}) for i, text in documents if _is_new(text, seen)]
            if lines:
                files[f"{name}.jsonl"] = ("\n".join(lines) + "\n").encode()
        if not files:
            raise ValueError(f"{library}: holds no Python sources; use an interpreter that has its standard library")
        _write(target, files)
    except OSError as error:
        raise ValueError(f"{error.filename or target}: {error.strerror}") from error
    return [target / name for name in files]


def _write(target: Path, files: dict[str, bytes]) -> None:
    """All files or none: whoever finds one takes it for the whole corpus."""
    if target.is_dir() and any(target.iterdir()):  # another corpus, or what the user keeps there
        for name, data in files.items():
            replace_file(target / name, data)
        return
    with complete_or_absent(target.resolve(), sum(map(len, files.values())), key="folder") as aside:
        for name, data in files.items():
            replace_file(aside / name, data)


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    new = len(text) >= _SHORTEST and digest not in seen
    seen.add(digest)
    return new


def _reference(library: Path) -> Iterator[tuple[str, str]]:
    """The topics of ``help()``, and the licence."""
    tree = _parse(library / "pydoc_data" / "topics.py")
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                match key, value:
                    case ast.Constant(value=str(topic)), ast.Constant(value=str(text)):
                        yield f"topics/{topic}", text
    licence = library / "LICENSE.txt"
    if licence.is_file():
        yield "LICENSE.txt", licence.read_text(encoding="utf-8")


def _modules(library: Path) -> Iterator[tuple[str, Path, ast.Module]]:
    """The name, file and syntax tree of every module."""
    for path in sorted(library.rglob("*.py")):
        inner = path.relative_to(library)
        tree = None if _SKIPPED & set(inner.parts) else _parse(path)
        if tree is not None:
            yield ".".join(inner.with_suffix("").parts).removesuffix(".__init__"), path, tree


def _sources(library: Path) -> Iterator[tuple[str, str]]:
    """Every file, cut where a function or class begins: documents of about the length of a sequence."""
    for module, path, tree in _modules(library):
        with tokenize.open(path) as file:  # in the encoding that it states
            lines = file.readlines()
        definitions = [node for node in tree.body if isinstance(node, Definition)]
        starts = [min(n.lineno for n in (node, *node.decorator_list)) - 1 for node in definitions]
        for start, end in itertools.pairwise([0, *starts, len(lines)]):
            yield f"{module}:{start + 1}", "".join(lines[start:end])


def _docstrings(library: Path) -> Iterator[tuple[str, str]]:
    """A document for each module's own docstring, each function's, and each class's with its methods'."""
    for module, _, tree in _modules(library):
        if own := ast.get_docstring(tree):
            yield module, f"module {module}\n\n{own}"
        for node in tree.body:
            if isinstance(node, Definition):
                text = _help(node, f"{module}.{node.name}")
                if text:
                    yield f"{module}.{node.name}", text


def _help(node: Definition, name: str) -> str:
    """A definition's heading and docstring with those of everything in it; empty where nothing is documented."""
    own = ast.get_docstring(node)
    inner = [_help(n, n.name) for n in node.body if isinstance(n, Definition)] if isinstance(node, ast.ClassDef) else []
    inner = [text for text in inner if text]
    if not own and not inner:
        return ""
    parts = [own or "", *inner]
    return _heading(node, name) + "\n" + "\n\n".join(_indented(part) for part in parts if part)


def _heading(node: Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


def _parse(path: Path) -> ast.Module | None:
    """A source file's syntax tree; None for one that is missing or (as some test data is) no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", help="where to write the .jsonl files")
    parser.add_argument("--sources", action="store_true", help="source files in place of their docstrings")
    args = parser.parse_args()
    with user_errors():
        files = write_stdlib_corpus(args.folder, args.sources)
    for path in files:
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

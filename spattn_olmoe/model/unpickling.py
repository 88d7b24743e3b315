"""Reading what PyTorch pickles, without running what a pickle asks for.

A pickle is a program: it names functions and calls them. Checkpoints hold three kinds, and each needs few names: the index
``.metadata`` the classes of :mod:`torch.distributed.checkpoint.metadata`, a tensor those that ``torch.load`` allows with
``weights_only=True``, and a rank's state those and NumPy's arrays, for random states. Any other name is refused.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from olmo_core.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, MetadataIndex

_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "olmo_core.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}
_STATE_CLASSES: list[Any] = [
    np.array(0).__reduce__()[0],  # NumPy's function that makes an array, whatever its module is called
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    type(np.dtype(np.uint64)),
    type(np.dtype(np.int64)),
    type(np.dtype(np.float64)),
]


class UnsafeFileError(ValueError):
    """A file asks for code that no checkpoint needs."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickle the member of an enum
            return _enum_member
        if name not in _INDEX_CLASSES.get(module, ()):
            raise UnsafeFileError(f".metadata asks for {module}.{name}, which no index of a checkpoint needs")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: Any) -> Any:
    """``getattr`` of an index: a member of the only enum there, and nothing else."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise UnsafeFileError(
            f".metadata asks for the attribute {name!r} of {kind!r}, which no index of a checkpoint needs"
        )
    return _MEM_FORMAT_ENCODING[name]


def read_index(file: IO[bytes]) -> Metadata:
    """The index of a checkpoint, its ``.metadata``, as ``pickle.load`` gives it.

    :raises UnsafeFileError: it asks for other classes than an index has, or names files outside its folder.
    :raises ValueError: it is no index.
    """
    try:
        index = _IndexUnpickler(file).load()
    except UnsafeFileError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f".metadata is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise ValueError(".metadata is damaged (no index of tensors)")
    for key, place in index.storage_data.items():
        if not isinstance(key, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise ValueError(".metadata is damaged (no index of tensors)")
        path = PurePosixPath(place.relative_path)
        if path.is_absolute() or len(path.parts) != 1 or path.parts[0] == "..":
            raise UnsafeFileError(f".metadata names {str(path)!r}, which is not in its own folder")
    return index


def load_tensor(file: Any, map_location: Any = None, **_options: Any) -> Any:
    """``torch.load`` that builds tensors and plain values only, whatever it is asked for.

    :raises UnsafeFileError: the file asks for something else.
    """
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(error) from None


def load_state(file: Any, map_location: Any = None, **_options: Any) -> Any:
    """:func:`load_tensor` for ``train/rankN.pt``, which holds the state of NumPy's random numbers too."""
    with torch.serialization.safe_globals(_STATE_CLASSES):
        return load_tensor(file, map_location)


def check_plain(data: io.BytesIO) -> None:
    """Raise unless what ``torch.save`` wrote there are plain values; leaves ``data`` at its start."""
    load_tensor(data)
    data.seek(0)


def _refusal(error: pickle.UnpicklingError) -> ValueError:
    text = str(error)
    if "Unsupported" in text or "weights_only" in text.lower() or "TorchScript" in text:
        wanted = text.partition("GLOBAL ")[2].split(" ")[0] or "code"
        return UnsafeFileError(f"a file asks for {wanted}, which no checkpoint needs")
    return ValueError(f"a file is damaged ({text.splitlines()[0] if text else 'UnpicklingError'})")


@contextlib.contextmanager
def reading(checkpoint: str) -> Iterator[None]:
    """Turn whatever goes wrong in reading a checkpoint's weights and state into one line that names it.

    :raises ValueError: files are missing, cut off, damaged, of other shapes, or ask for code.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is none of the former
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:  # its own message is a list of ranks
            cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, UnsafeFileError):
            raise ValueError(f"checkpoint {checkpoint} is not loaded: {cause}") from error
        # OLMo-core hands on a traceback as text, whose last line is the error
        text = (str(cause).strip().splitlines() or [""])[-1]
        raise ValueError(
            f"checkpoint {checkpoint} cannot be read, a file is missing, cut off or damaged "
            f"({type(cause).__name__}: {text}): restore it, or name an older stepN"
        ) from error

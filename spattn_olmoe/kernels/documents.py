"""Documents packed into one sequence: a pair of tokens may attend each other only within one document."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def check_cu_doc_lens(cu_doc_lens: Tensor, B: int, T: int, device: torch.device) -> None:
    """Raise a ValueError unless these are the cumulative lengths of documents that fill ``B`` rows of ``T`` tokens.

    OLMo-core's convention: one-dimensional integers, first 0, last ``B * T``, over the rows laid end to end. On an
    accelerator the values are checked there, without waiting for them; within a compiled graph they are not.
    """
    if cu_doc_lens.ndim != 1 or cu_doc_lens.numel() < 2 or cu_doc_lens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_doc_lens must be a one-dimensional int32 tensor of at least two entries, "
            f"not {cu_doc_lens.dtype} of shape {tuple(cu_doc_lens.shape)}"
        )
    if cu_doc_lens.device != device:
        raise ValueError(f"cu_doc_lens is on {cu_doc_lens.device} but q is on {device}: move it there")
    if torch.compiler.is_compiling():
        return
    fits = (cu_doc_lens[0] == 0) & (cu_doc_lens[-1] == B * T) & (cu_doc_lens[1:] >= cu_doc_lens[:-1]).all()
    if device.type == "cpu":
        if not fits:
            raise ValueError(
                f"cu_doc_lens must rise from 0 to batch * length = {B} * {T} = {B * T}, "
                f"but goes from {int(cu_doc_lens[0])} to {int(cu_doc_lens[-1])}"
            )
    else:
        torch._assert_async(fits, f"cu_doc_lens must rise from 0 to batch * length = {B * T}")


def document_starts(cu_doc_lens: Tensor, B: int, T: int) -> Tensor:
    """For every token the position in its row at which its document starts, int32 ``(B, T)``.

    A document that runs over the end of a row starts anew in the next one: rows never attend each other.
    """
    token = torch.arange(B * T, device=cu_doc_lens.device, dtype=cu_doc_lens.dtype)
    document = torch.searchsorted(cu_doc_lens, token, right=True) - 1
    start = cu_doc_lens[document].view(B, T)
    row = torch.arange(B, device=start.device, dtype=start.dtype)[:, None] * T
    return torch.clamp(start - row, min=0).to(torch.int32)


def document_bounds(cu_doc_lens: Tensor, B: int, T: int) -> tuple[Tensor, Tensor]:
    """For every token where in its row its document starts, and the position after its end: int32 ``(B, T)`` each.

    Made once per ``cu_doc_lens`` and shared by all layers; under torch.compile part of the graph.
    """
    if torch.compiler.is_compiling() or cu_doc_lens.is_inference():  # nothing to know a change by
        return _document_bounds(cu_doc_lens, B, T)
    known = _bounds.setdefault(cu_doc_lens, {})
    key = (B, T, cu_doc_lens._version)
    if key not in known:
        known[key] = _document_bounds(cu_doc_lens, B, T)
    return known[key]


_bounds: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _document_bounds(cu_doc_lens: Tensor, B: int, T: int) -> tuple[Tensor, Tensor]:
    token = torch.arange(B * T, device=cu_doc_lens.device, dtype=cu_doc_lens.dtype)
    document = torch.searchsorted(cu_doc_lens, token, right=True)
    row = torch.arange(B, device=token.device, dtype=token.dtype)[:, None] * T
    start = torch.clamp(cu_doc_lens[document - 1].view(B, T) - row, min=0)
    end = torch.clamp(cu_doc_lens[document].view(B, T) - row, max=T)
    return start.to(torch.int32), end.to(torch.int32)


def document_spans(cu_doc_lens: Tensor, B: int, T: int) -> list[tuple[int, int, int]]:
    """The documents as ``(row, start, stop)``, positions within the row; empty ones left out. Reads the values."""
    spans = []
    bounds = cu_doc_lens.tolist()
    for start, stop in itertools.pairwise(bounds):
        while start < stop:
            row, offset = divmod(start, T)
            length = min(stop - start, T - offset)
            spans.append((row, offset, offset + length))
            start += length
    return spans

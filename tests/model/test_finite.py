"""A NaN anywhere is found, and large numbers are no NaN."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from spattn_olmoe.model.finite import first_non_finite

NUMBERS = st.lists(st.floats(width=16), min_size=0, max_size=8)


@given(st.lists(NUMBERS, max_size=4), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_the_first_that_is_not_finite_is_named(rows: list[list[float]], dtype: torch.dtype) -> None:
    named = [("steps", torch.tensor([3])), *((str(i), torch.tensor(row, dtype=dtype)) for i, row in enumerate(rows))]
    expected = next((str(i) for i, row in enumerate(rows) if not all(map(math.isfinite, row))), None)
    assert first_non_finite(named) == expected


def test_numbers_whose_sum_overflows_are_finite() -> None:
    large = torch.full((9,), 3e38)
    assert first_non_finite([("large", large)]) is None
    large[3] = math.nan
    assert first_non_finite([("large", large)]) == "large"

"""Which tokens of a text repeat an earlier pair of tokens, and how far back: what a model can copy.

A token repeats where it and the token before it stood next to each other earlier in the sequence. A model that finds the
earlier place can copy what followed, which is what induction heads do (Olsson et al., arXiv 2209.11895). The loss of such
tokens by the distance of the repeat shows what a mask lets a model find; losses by position average over it.
"""

from __future__ import annotations

import numpy as np


def repeat_distances(ids: np.ndarray) -> np.ndarray:
    """How many tokens back the pair (token before, token) stood last; 0 where it did not.

    :param ids: int64 ``(sequences, length)``.
    :return: int64 ``(sequences, length - 1)``, for every token but the first.
    """
    pairs = ids[:, :-1] * (int(ids.max(initial=0)) + 1) + ids[:, 1:]
    order = np.argsort(pairs, axis=1, kind="stable")  # equal pairs stand together, in the order of the text
    ordered = np.take_along_axis(pairs, order, 1)
    distances = np.zeros_like(pairs)
    again = np.diff(order, axis=1) * (ordered[:, 1:] == ordered[:, :-1])
    np.put_along_axis(distances, order[:, 1:], again, 1)
    return distances

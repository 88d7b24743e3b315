"""Ranks agree on the step at which a signal ends the run.

OLMo-core asks all ranks in a thread of its own whether the run is cancelled, and reads the answer without waiting for
it. A rank that reads it one step before another stops there and saves, while the other enters the next step: their
collectives no longer match, and the run hangs. Here every rank waits for the answer.
"""

from __future__ import annotations

from olmo_core.train import Trainer

from .release import require_tested_release

stock_check_if_canceled = Trainer.check_if_canceled


def apply() -> None:
    """Make ``Trainer.check_if_canceled`` return when the answer is known."""
    require_tested_release(__name__)
    Trainer.check_if_canceled = check_if_canceled  # type: ignore[method-assign]


def check_if_canceled(self: Trainer) -> None:
    """Ask all ranks whether the run is cancelled; :attr:`Trainer.is_canceled` has the answer."""
    if self.async_bookkeeping and self.bookkeeping_device.type == "cpu" and self.bookkeeping_pg is not None:
        # In the thread of all other bookkeeping, whose collectives come in the same order on every rank.
        self.single_thread_pool.submit(self._check_if_canceled).result()
    else:
        self._check_if_canceled()

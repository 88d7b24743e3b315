"""How a user's error is reported: as one line, with the nearest known word where a word is unknown."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known word nearest to this one, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the process with one line and exit code 2 for an error that its user can mend.

    Those are ValueError and OLMoConfigurationError, and files that are not there or not allowed. Anything else is a
    defect and keeps its traceback.
    """
    # OLMo-core looks for kernels that nothing here uses, and warns where they are not installed.
    logging.getLogger("olmo_core.nn.attention.te_attn_api").setLevel(logging.ERROR)
    try:
        yield
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        _end(str(error), 2)
    except Exception as error:
        if type(error).__name__ not in (
            "OLMoConfigurationError",
            "OLMoEnvironmentError",
        ):  # without importing OLMo-core
            raise
        _end(str(error), 2)


def quiet() -> None:
    """Let OLMo-core speak of warnings only: for commands whose output is what they print."""
    from olmo_core.utils import prepare_cli_environment

    logging.getLogger("olmo_core").setLevel(logging.ERROR)
    prepare_cli_environment()  # until then OLMo-core prints what it would log
    for name in ("olmo_core", "spattn_olmoe"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Grouped GEMM not available")  # it is done without, see olmo/remedies
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process loads a checkpoint alone


def _end(message: str, code: int) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)

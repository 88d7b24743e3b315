"""User errors: how they are raised (``ValueError``), worded (the nearest known word) and printed (one line, status 2)."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from .text import visible

EXTRAS = {"lm_eval": "eval", "olmo_eval": "eval", "transformers": "hf", "safetensors": "hf", "wandb": "wandb"}
"""Packages that a command may need and an installation may lack, and the extra that has them."""

_INTERRUPTED = 128 + signal.SIGINT
_RANK_0_FAILS_WITHIN = 15.0
"""Seconds that the other ranks wait: how far apart ranks start on a busy machine."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known word nearest to this one, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Report a user error as one line and exit with status 2.

    User errors are ValueError, OLMo-core's errors of configuration and environment, files that cannot be opened or
    written, and extras that are not installed. Anything else is a defect and keeps its traceback.
    """
    # OLMo-core looks for kernels that nothing here uses, and warns where they are not installed.
    logging.getLogger("olmo_core.nn.attention.te_attn_api").setLevel(logging.ERROR)
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted", _INTERRUPTED)
    except Exception as error:
        line = _of_user(error)
        if line is None:
            raise
        fail(line)


def fail(message: str, status: int = 2) -> NoReturn:
    """End the process with one line on standard error, which rank 0 prints where it fails too.

    A launcher ends all ranks when the first of them has ended. So the others leave it to rank 0 to be that one: had they
    imported a little faster, it would be ended before its line is out. What they alone have met, they print themselves.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        if status == _INTERRUPTED:  # as all ranks are, at the same moment
            sys.exit(status)
        with contextlib.suppress(ValueError):  # outside the main thread
            for number in (signal.SIGTERM, signal.SIGINT):  # how a rank is ended: there is nothing left to save
                signal.signal(number, signal.SIG_DFL)
        time.sleep(_RANK_0_FAILS_WITHIN)
        message = f"rank {rank}: {message}"
    # Threads that were at work, as those that read a checkpoint, may meet the end of the process, and would print how.
    threading.excepthook = lambda _: None
    print(f"error: {' '.join(visible(message).split())}", file=sys.stderr, flush=True)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """The parser of every script: its help is the script's docstring, its errors are one line as all others."""

    def __init__(self, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but an empty option is an error: most often it is a variable of the shell that is not set."""
        words = sys.argv[1:] if args is None else list(args)
        for i, word in enumerate(words):
            option = word.partition("=")[0] if word.endswith("=") else words[i - 1] if i and not word else ""
            if option.startswith("--"):
                self.error(f"{option} is empty: leave it out, or give it a value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} ({self.prog} --help explains)")


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of a command line's option: a whole number, both bounds included."""
    return _bounded(int, low, high, "a whole number")


def real(low: float, high: float) -> Callable[[str], float]:
    """The type of a command line's option: a finite number, both bounds included."""
    return _bounded(float, low, high, "a number")


def _bounded(kind: type[Any], low: float, high: float, name: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):  # among them Python's own limit to the digits of a number
            value = None
        if value is None or not low <= value <= high:  # a NaN is not
            raise argparse.ArgumentTypeError(f"{text[:40]!r} must be {name} from {low} to {high}")
        return value

    return read


def quiet() -> None:
    """Let OLMo-core speak of warnings only: for commands whose output is what they print."""
    from olmo_core.utils import prepare_cli_environment

    logging.getLogger("olmo_core").setLevel(logging.ERROR)
    prepare_cli_environment()  # until then OLMo-core prints what it would log
    for name in ("olmo_core", "spattn_olmoe"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Grouped GEMM not available")  # the loop is ours, see model/remedies
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process loads a checkpoint alone


def _of_user(error: Exception) -> str | None:
    """What to tell of a user error; None of anything else."""
    if isinstance(error, ModuleNotFoundError):
        package = str(error.name).partition(".")[0]
        extra = EXTRAS.get(package)
        return extra and f'{package} is not installed: pip install -c constraints.txt -e ".[{extra}]"'
    if isinstance(error, OSError):  # of a named file, or of a full disk, which names none
        known = isinstance(error, (FileNotFoundError, PermissionError)) or error.errno == errno.ENOSPC
        users = known or error.filename is not None
    else:  # OLMo-core's by name, without importing it
        by_name = ("OLMoConfigurationError", "OLMoEnvironmentError")
        users = isinstance(error, ValueError) or type(error).__name__ in by_name
    return str(error) if users else None

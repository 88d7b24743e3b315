"""Where the messages of a run go: everything to ``train.log`` in its folder, what a person needs to the screen.

The screen gets this package's own messages and everybody's warnings and errors, and with ``--verbose`` all that the file
gets. In a terminal, one :data:`console` prints them all, so that a progress bar stays below them.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import re
import sys
from pathlib import Path

from olmo_core.utils import setup_logging
from rich.console import Console
from rich.text import Text

log = logging.getLogger(__name__)

LOG_FILE = "train.log"

console = Console()

NORMAL = re.compile(
    r"Will skip setting env var|Overriding env var"
    r"|No checkpoint found in save folder .* will train from scratch"
    r"|Grouped GEMM not available"
    r"|DTensor random operators may not have complete support on cpu device mesh"
    r"|Skipping EP-MP high-priority group creation because backend is 'gloo'"
    r"|Restoring data loading state with a different data seed"  # keep_seeds() names it
    r"|FutureWarning: `?torch\.distributed\.[\w.]+`? is deprecated"
)
"""Warnings of libraries about what is as it should be here: they go to the file alone."""


def in_terminal() -> bool:
    """Whether a person watches: a progress bar would be redrawn, not pile up in a file."""
    return sys.stdout.isatty() and not console.is_dumb_terminal


class Screen(logging.Handler):
    """Prints what a person needs: our own messages, and all warnings and errors, those of other ranks with their rank.

    A record with ``on_screen=False`` is for the file alone.
    """

    def __init__(self, *, rank: int = 0, verbose: bool = False) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(message)s"))
        self.rank, self.verbose = rank, verbose

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            return self.verbose or not NORMAL.search(record.getMessage())
        own = record.name.startswith("spattn_olmoe") and getattr(record, "on_screen", True)
        return self.rank == 0 and (self.verbose or own)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            rank = f"rank {self.rank}: " if self.rank else ""
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            style = "red" if record.levelno >= logging.ERROR else "yellow" if level else ""
            console.print(Text(f"{rank}{level}{self.format(record)}", style), soft_wrap=True)
        except Exception:
            self.handleError(record)


class LogFile(logging.FileHandler):
    """The file of a run's messages. A disk that is full ends the file, not the run."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        logging.getLogger().removeHandler(self)
        log.warning("%s gets no more messages: %s: %s", self.baseFilename, type(error).__name__, error)


_until_there_is_a_folder = logging.handlers.MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1)


def begin(*, verbose: bool = False) -> None:
    """Set up the messages of a process, before OLMo-core does; :func:`open_log` names the file that they go to."""
    setup_logging()  # so that OLMo-core takes logging for set up, and leaves the handlers below alone
    rank = int(os.environ.get("RANK", "0"))
    handlers: list[logging.Handler] = [Screen(rank=rank, verbose=verbose)]
    if rank == 0:
        handlers.append(_until_there_is_a_folder)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


def open_log(folder: Path) -> None:
    """Write the messages so far, and all that follow, to ``train.log`` in a folder. Only the first rank has a file."""
    root = logging.getLogger()
    if _until_there_is_a_folder in root.handlers:
        file = LogFile(folder / LOG_FILE)
        root.removeHandler(_until_there_is_a_folder)
        _until_there_is_a_folder.setTarget(file)
        _until_there_is_a_folder.flush()
        root.addHandler(file)

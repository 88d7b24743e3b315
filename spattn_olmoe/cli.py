"""What the command lines share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the process with one line and exit code 2 for an error that its user can mend.

    Those are ValueError and OLMoConfigurationError, and files that are not there or not allowed. Anything else is a
    defect and keeps its traceback.
    """
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


def _end(message: str, code: int) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)

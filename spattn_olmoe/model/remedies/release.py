"""The release of OLMo-core that the remedies know."""

from __future__ import annotations

from olmo_core.version import VERSION

TESTED_RELEASE = "3.0.0"


def require_tested_release(what: str) -> None:
    """Raise unless OLMo-core is the release that ``what`` was written against."""
    if VERSION != TESTED_RELEASE:
        raise ValueError(
            f"{what} was written against ai2-olmo-core {TESTED_RELEASE} but {VERSION} is installed: "
            f"pip install ai2-olmo-core=={TESTED_RELEASE}"
        )

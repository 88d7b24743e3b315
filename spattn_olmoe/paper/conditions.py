"""What a report says of how its results were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def conditions(machines: Sequence[dict[str, Any]]) -> list[str]:
    """Where results were made: a line for each machine, commit and command among them."""
    lines = []
    for machine in machines:
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        changed = " with changes" if machine["changed"] else ""
        lines.append(
            f"- {machine['device']}, {machine['cores']} CPU cores, {versions}, commit `{str(machine['commit'])[:12]}`{changed}, "
            f"`{machine['command']}`"
        )
    return ["Made on:", "", *dict.fromkeys(lines)]

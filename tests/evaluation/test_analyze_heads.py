"""``scripts/analyze_heads.py`` on real checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spattn_olmoe.paper import analyze_heads


def test_checkpoints_side_by_side(checkpoint_of, held_out_data: Path, tmp_path: Path):
    folders = [checkpoint_of("standard"), checkpoint_of("eball")]
    text = analyze_heads.main(folders, tmp_path / "heads", data=str(held_out_data), sequences=4, length=16)
    assert text == (tmp_path / "heads" / "heads.md").read_text()
    assert (tmp_path / "heads" / "heads.png").stat().st_size > 1000
    found = json.loads((tmp_path / "heads" / "heads.json").read_text())
    standard, exclusive = found["checkpoints"].values()
    assert (found["sequences"], standard["length"], len(standard["layers"])) == (4, 16, 2)
    assert f"| eball | {exclusive['entropy']:.4f} |" in text
    assert exclusive["diversity"]["cosine_distance"] == pytest.approx(1)  # no two heads attend one key
    # Bands of 8: head 0 and 1 of 4 have keys within 16 tokens, the others none.
    for layer in exclusive["layers"]:
        assert [x is None for x in layer["entropy"]] == [False, False, True, True]
        assert 0 <= layer["distance"][0] < 8 <= layer["distance"][1] < 16


@pytest.mark.parametrize(
    ("given", "needle"),
    [({"sequences": 0}, "--sequences 0"), ({"length": 0}, "--length 0"), ({"sequences": 10**6}, "held-out")],
)
def test_what_cannot_be_honoured_is_said(given, needle, checkpoint_of, held_out_data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=needle):
        analyze_heads.main([checkpoint_of("standard")], tmp_path, data=str(held_out_data), **given)

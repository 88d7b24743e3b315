"""Chunks: what they hold, and that a reader started again at any chunk's end goes on as if it had never stopped."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spattn_olmoe.data import readers
from spattn_olmoe.data.chunks import BrokenFileError, Chunk, Position
from spattn_olmoe.data.documents import texts
from spattn_olmoe.data.mixture import LAG, Mixture

LONGEST = 60


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_BYTES", 100)
        patch.setattr(readers, "CHUNK_DOCUMENTS", 5)
        yield


def read(path: Path, start: Position = Position(), separator: str | None = None) -> list[Chunk]:  # noqa: B008
    return list(readers.read_file(path, "f", start, field="text", separator=separator, max_document_bytes=LONGEST // 4))


@settings(deadline=None, max_examples=150)
@given(
    lines=st.lists(st.binary(max_size=400).map(lambda b: b.replace(b"\n", b"")), max_size=30),
    final_newline=st.booleans(),
    read_bytes=st.integers(4, 300),
    compressed=st.booleans(),
)
def test_lines_come_whole_once_and_the_same_from_every_restart(
    lines: list[bytes], final_newline: bool, read_bytes: int, compressed: bool
) -> None:
    content = b"\n".join(lines) + (b"\n" if final_newline and lines else b"")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", read_bytes)
        path = Path(folder) / ("a.jsonl.zst" if compressed else "a.jsonl")
        path.write_bytes(zstandard.ZstdCompressor().compress(content) if compressed else content)
        chunks = read(path)
        found = {
            chunk.first + i: line
            for chunk in chunks
            for i, line in enumerate(bytes(chunk.payload).removesuffix(b"\n").split(b"\n"))  # type: ignore[arg-type]
            if chunk.payload
        }
        skipped = {reject.number for chunk in chunks for reject in chunk.rejects}
        for number, line in enumerate(content.split(b"\n"), start=1):
            if number in skipped:
                assert len(line) > LONGEST // 2 and number not in found
            elif number in found:
                assert found[number] == line
            else:  # only blank ones at the end of the file
                assert not b"".join(content.split(b"\n")[number - 1 :]).strip()
        patch.setattr(readers, "READ_BYTES", 64)
        for i, chunk in enumerate(chunks):
            assert [without_share(c) for c in read(path, chunk.end)] == [without_share(c) for c in chunks[i + 1 :]]


def without_share(chunk: Chunk) -> tuple[object, ...]:
    return chunk.kind, chunk.payload, chunk.first, chunk.end, chunk.rejects, chunk.broken


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="|\r\n"), min_size=1, max_size=12), max_size=40)
)
@example([" ", " "])
def test_separated_texts_come_back(pieces: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes("\n||\n".join(pieces).encode())
        chunks = read(path, separator="||")
        found = [item for chunk in chunks for item in texts(chunk, field="", separator="||", max_document_bytes=1000)]
    wanted = [piece.removeprefix("\ufeff") if i == 0 else piece for i, piece in enumerate(pieces)]
    if wanted and not wanted[-1].encode().strip():
        wanted.pop()  # what a file ends with after its last separator is no document; a blank one between two is counted
    assert [item.text if isinstance(item, tuple) else None for item in found] == [
        piece if piece and not piece.isspace() else None for piece in wanted
    ]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_bomb_is_given_up_before_it_costs_much(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"bomb.{kind}"
    with gzip.open(path, "wb", 9) if kind == "jsonl.gz" else zstandard.open(path, "wb") as file:
        for _ in range(32):
            file.write(bytes(2**22))
    pieces: list[int] = []
    with pytest.raises(BrokenFileError, match="decompresses to more than 500 times its size"):
        for data, _share in readers.byte_chunks(path, 0):
            pieces.append(len(data))
    assert max(pieces, default=0) <= 2**25 and sum(pieces) <= 2**24


def test_a_table_of_one_long_entry_many_times_over_is_read_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_BATCH_BYTES", 2**25)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["x" * 2**20] * 200).dictionary_encode()}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    held = [pa.total_allocated_bytes() for _cell in readers.parquet_cells(path, "text", 0)]
    assert len(held) == 200 and max(held) < 2**27  # of 200 MB of text


@given(
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 5000), min_size=4, max_size=4),
    windows=st.tuples(st.integers(1, LAG - 1), st.integers(1, LAG - 1)),
    stop=st.integers(0, 600),
)
@settings(deadline=None, max_examples=40)
def test_a_mixture_depends_neither_on_timing_nor_on_interruptions(
    weights: list[float], sizes: list[int], windows: tuple[int, int], stop: int
) -> None:
    def draw(mixture: Mixture, window: int, n: int, counted: list[int]) -> list[int]:
        order: list[int] = []
        while len(counted) < n:
            while len(order) - len(counted) < window:
                order.append(mixture.choose(range(len(weights))))
                mixture.drawn(order[-1])
            source = order[len(counted)]
            counted.append(source)
            mixture.counted(source, sizes[source])
        return counted

    straight = draw(Mixture(weights), windows[0], 700, [])
    interrupted = Mixture(weights)
    first = draw(interrupted, windows[1], stop, [])
    resumed = draw(Mixture(weights, interrupted.state()), windows[0], 700 - stop, [])
    assert first + resumed == straight


def test_a_mixture_keeps_to_its_weights() -> None:
    mixture, tokens, sizes = Mixture([3.0, 1.0]), [0, 0], [50, 1000]
    for _ in range(20_000):
        source = mixture.choose([0, 1])
        mixture.drawn(source)
        mixture.counted(source, sizes[source])
        tokens[source] += sizes[source]
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.02)

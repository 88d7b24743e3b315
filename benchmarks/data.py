"""Text to shards, against its rivals.

    python scripts/benchmark.py data corpus/jsonl/*.jsonl.zst --tokenizer tokenizer.json --dolma dolma/bin/dolma \\
        --datatrove datatrove/bin/python

Four ways to tokenise the same files, one after the other, several rounds: ``encode_batch`` of tokenizers alone with the
texts in memory and all cores (only those calls are timed), scripts/prepare_data.py, the dolma toolkit and datatrove
(start to end, as their command lines run). The rivals need a Python each that has them:

    python -m venv dolma && dolma/bin/pip install dolma backports.zstd
    python -m venv datatrove && datatrove/bin/pip install 'datatrove[processing,io]' tokenizers orjson
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard
from tokenizers import Tokenizer

from benchmarks.usage import Usage
from spattn_olmoe import machine
from spattn_olmoe.data.chunks import Position
from spattn_olmoe.data.readers import read_file

ROOT = Path(__file__).parents[1]
EOS_TOKEN, EOS_ID, PAD_ID = "<|endoftext|>", 50_279, 1  # of allenai/gpt-neox-olmo-dolma-v1_5
_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    source, output, tokenizer, eos, tasks, workers = sys.argv[1:7]
    steps = [
        JsonlReader(source, glob_pattern="*.jsonl.zst"),
        DocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token=eos, shuffle_documents=False),
    ]
    LocalPipelineExecutor(steps, tasks=int(tasks), workers=int(workers), logging_dir=output + "/logs").run()
"""


def timed(command: list[str], output: Path, tokens: Callable[[Path], int]) -> dict[str, Any]:
    """Run a command: wall and CPU seconds, the most memory of all its processes together, and the tokens it wrote."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        usage = Usage(process.pid)
        status = process.wait()
        seconds = time.monotonic() - begun
        usage.stop()
        if status:
            log.seek(0)
            raise SystemExit(f"{command[:3]} failed:\n{log.read().decode()[-2000:]}")
    written = tokens(output)
    shutil.rmtree(output)
    return {
        "seconds": seconds,
        "cpu_seconds": sum(usage.cpu_seconds.values()),
        "peak_memory_mib": usage.mib,
        "tokens": written,
    }


def encode_batch_alone(files: list[Path], tokenizer: Path) -> dict[str, Any]:
    """Only the calls of ``encode_batch``, on texts in memory, 1,000 at a time."""
    reference = Tokenizer.from_file(str(tokenizer))
    seconds = cpu = 0.0
    tokens = text_bytes = 0
    for path in files:
        texts = read_texts(path)
        text_bytes += sum(len(text.encode()) for text in texts)
        for i in range(0, len(texts), 1000):
            before, begun = time.process_time(), time.monotonic()
            encodings = reference.encode_batch(texts[i : i + 1000], add_special_tokens=False)
            seconds += time.monotonic() - begun
            cpu += time.process_time() - before
            tokens += sum(len(encoding) + 1 for encoding in encodings)
    return {"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens, "text_bytes": text_bytes}


def reader_alone(files: list[Path]) -> float:
    """CPU seconds of the one process that reads, without anyone tokenising: it bounds how many cores it can feed."""
    begun = time.process_time()
    for path in files:
        chunks = read_file(path, path.name, Position(), field="text", separator=None, max_document_bytes=2**24)
        assert sum(len(chunk.payload) for chunk in chunks)
    return time.process_time() - begun


def shortened(path: Path, target: Path, n_bytes: int) -> Path:
    """A file's first lines, up to ``n_bytes`` of them: files of equal size share out evenly among any workers."""
    with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as lines, zstandard.open(target, "wb") as short:
        for line in lines:
            data = line.encode()
            n_bytes -= len(data)
            if n_bytes < 0:
                break
            short.write(data)
    return target


def read_texts(path: Path) -> list[str]:
    with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line)["text"] for line in file]


def contenders(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What runs in a round, by name."""
    source, output, workers = folder / "in", folder / "out", str(args.workers)
    config = folder / "config.yaml"
    config.write_text(json.dumps({
        "output": str(output),
        "sources": [{"paths": [f"{source}/*.jsonl.zst"]}],
        "tokenizer": {"identifier": str(args.tokenizer), "eos_token_id": EOS_ID, "pad_token_id": PAD_ID},
        "workers": args.workers,
    }))  # fmt: skip
    script = folder / "datatrove_run.py"
    script.write_text(_DATATROVE)
    ours = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--config", str(config)]
    dolma = [
        str(args.dolma), "tokens", "--documents", f"{source}/*.jsonl.zst", "--destination", str(output),
        "--tokenizer.name_or_path", str(args.tokenizer), "--tokenizer.eos_token_id", str(EOS_ID),
        "--tokenizer.pad_token_id", str(PAD_ID), "--dtype", "uint16", "--processes", workers, "--seed", "0",
    ]  # fmt: skip
    datatrove = [
        str(args.datatrove), str(script), str(source), str(output), str(args.tokenizer), EOS_TOKEN,
        str(len(args.files)), workers,
    ]  # fmt: skip

    def files(pattern: str) -> Callable[[Path], int]:
        return lambda out: sum(path.stat().st_size for path in out.rglob(pattern)) // 2

    return {
        "tokenizers.encode_batch alone": lambda: encode_batch_alone(args.files, args.tokenizer),
        "spattn_olmoe": lambda: timed(ours, output, files("train-*.bin")),
        "dolma": lambda: timed(dolma, output, files("*.npy")),
        "datatrove": lambda: timed(datatrove, output, files("*.ds")),
    }


def rival_versions(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    pythons = {"dolma": args.dolma.with_name("python"), "datatrove": args.datatrove}
    return {
        name: json.loads(subprocess.check_output([str(python), "-c", code, name, "tokenizers"]))
        for name, python in pythons.items()
    }


def race(args: argparse.Namespace) -> dict[str, Any]:
    """All contenders, round by round, so that whatever else the machine does falls on all of them."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        (folder / "in").mkdir()
        args.files = [shortened(path, folder / "in" / path.name, args.megabytes * 10**6) for path in args.files]
        runs: dict[str, list[dict[str, Any]]] = {}
        for number in range(args.rounds):
            for name, run in contenders(args, folder).items():
                runs.setdefault(name, []).append({**run(), "load_average_after": os.getloadavg()[0]})
                print(number, name, {k: round(v, 1) for k, v in runs[name][-1].items()}, flush=True)
        reader = reader_alone(args.files)
    text_bytes = runs["tokenizers.encode_batch alone"][0]["text_bytes"]
    return {
        "text_bytes": text_bytes,
        "runs": runs,
        "table": table(runs, text_bytes),
        "reader_megabytes_per_cpu_second": round(text_bytes / 1e6 / reader, 1),
    }


def table(runs: dict[str, list[dict[str, Any]]], text_bytes: int) -> dict[str, dict[str, float]]:
    """Medians, and how they compare with ``encode_batch`` alone; CPU seconds depend least on the machine's other work."""
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in ("seconds", "cpu_seconds")}
        for name, found in runs.items()
    }
    base = medians["tokenizers.encode_batch alone"]
    return {
        name: {
            "megabytes_per_second": round(text_bytes / 1e6 / median["seconds"], 3),
            "tokens_per_second": round(runs[name][0]["tokens"] / median["seconds"]),
            "tokens_per_cpu_second": round(runs[name][0]["tokens"] / median["cpu_seconds"]),
            "megabytes_per_cpu_second": round(text_bytes / 1e6 / median["cpu_seconds"], 3),
            "speed_relative_to_encode_batch": round(base["seconds"] / median["seconds"], 3),
            "per_cpu_second_relative_to_encode_batch": round(base["cpu_seconds"] / median["cpu_seconds"], 3),
            "peak_memory_mib": max(run.get("peak_memory_mib", 0) for run in runs[name]),
        }
        for name, median in medians.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines, compressed with zstd")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of gpt-neox-olmo-dolma-v1_5")
    parser.add_argument("--dolma", type=Path, required=True, help="the command `dolma`")
    parser.add_argument("--datatrove", type=Path, required=True, help="a Python that has datatrove")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--megabytes", type=int, default=100, help="take only so much of each file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where to put the shards while they are made")
    parser.add_argument("--results", type=Path, default=machine.results_folder("cpu") / "data.json")


def run(args: argparse.Namespace) -> int:
    args.tokenizer = args.tokenizer.resolve()
    record = machine.describe("cpu")
    record["rivals"] = rival_versions(args)
    record["files"] = {path.name: path.stat().st_size for path in args.files}
    record["result"] = race(args)
    machine.write_json(args.results, record)
    print(json.dumps(record["result"]["table"], indent=1))
    counts = {name: runs[0]["tokens"] for name, runs in record["result"]["runs"].items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the contenders' tokens differ: {counts}")
    return 0

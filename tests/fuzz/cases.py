"""Inputs by number: the same number is the same command on the same files, wherever it runs."""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spattn_olmoe.train.ranges import RANGES

from .guard import CANARY
from .material import Material, results, sources

VALUES = [
    "", "null", "true", "[]", "{}", "0", "-1", "1", "2.5", ".nan", ".inf", "-.inf", "1e400", "1e12", str(10**12), str(2**63),
    "9" * 30, "7" * 5000, "word", "'a b'", "a/../b", "/nonexistent/x", "../x", "~", "\x1b[31mred", "a\nb", "'\\0'", "é漢🙂",
    "[1,2]", "{a: 1}", "{_CLASS_: evilmod.X}", "{_CLASS_: subprocess.Popen, args: [id]}", "${oc.env:HOME}", "${nothing}",
    "${name}", "!!python/object/apply:os.system ['id']", "*alias", "&a [*a]", "evilmod.x", "os.system", "%s%n", "<script>", "a|b",
]  # fmt: skip
JSON_VALUES: list[Any] = [
    None, True, 0, -1, 1, 2.5, float("nan"), float("inf"), 10**12, 2**63, 10**400, "", "word", "../../secret", "/etc/passwd",
    "evilmod.x", "a\nb", "\x1b[31m", "<script>|", [], {}, [1], {"a": 1}, [[[[]]]], {"_CLASS_": "evilmod.X"},
    {"_CLASS_": "subprocess.Popen", "args": ["id"]},
]  # fmt: skip
KEYS = [
    *(key.replace("model.*", "model.block").replace("*_config", "tp_config").replace("*", "dataset") for key in RANGES),
    "attention.type", "attention.impl", "attention.layers", "attention.head_order", "attention.local_sharing", "attention.x",
    "model.block", "model.block.sequence_mixer.n_heads", "model.block.feed_forward_moe.num_experts", "model.nothing",
    "model.block.feed_forward_moe.router.top_k", "dataset.paths", "dataset._CLASS_", "trainer.save_folder", "trainer.load_path",
    "trainer.callbacks.x._CLASS_", "trainer.callbacks.x", "train_module.ac_config.mode", "train_module.dp_config.name", "name",
    "train_module.scheduler.type", "train_module.optim.type", "trainer.max_duration.unit", "extends", "trainer", "",
]  # fmt: skip
DATA_KEYS = [
    "output", "sources", "sources[0].paths", "sources[0].field", "sources[0].separator", "sources[0].weight", "dtype", "part",
    "tokenizer.identifier", "tokenizer.train_vocab_size", "tokenizer.eos_token_id", "shard_bytes", "validation_share", "workers",
    "max_tokens", "sequence_length", "max_document_bytes", "max_reject_share", "when_exhausted", "seed", "extends",
]  # fmt: skip

Case = tuple[list[str], Path]
Maker = Callable[[random.Random, Material, Path], list[str]]


def make(number: int, material: Material, folder: Path) -> list[str]:
    """The command of one input; its files are written into ``folder``."""
    generator = random.Random(number)
    folder.mkdir(parents=True)
    sources(folder)
    return MAKERS[number % len(MAKERS)](generator, material, folder)


def _mutated_bytes(g: random.Random, data: bytes) -> bytes:
    if not data or g.random() < 0.1:
        return b""
    out = bytearray(data)
    for _ in range(g.randrange(1, 5)):
        at = g.randrange(len(out))
        kind = g.randrange(4)
        if kind == 0:
            out[at] ^= 1 << g.randrange(8)
        elif kind == 1:
            del out[at : at + g.randrange(1, 40)]
        elif kind == 2:
            out[at:at] = g.choice([b"\0", b"\xff\xfe", b"[" * 3000, b"9" * 5000, b"\n\n", b"{"])
        else:
            out = out[: max(1, at)]
        if not out:
            break
    return bytes(out)


def _mutated_json(g: random.Random, value: Any) -> str:
    """The value with one or two places exchanged, dropped or added to; now and then what is no JSON."""
    if g.random() < 0.1:
        return _mutated_bytes(g, json.dumps(value).encode()).decode(errors="replace")
    if g.random() < 0.05:
        return "[" * 5000 + "]" * 5000
    value = copy.deepcopy(value)
    for _ in range(g.randrange(1, 3)):
        places = list(_places(value))
        if not places:
            break
        holder, key = g.choice(places)
        if isinstance(holder, dict) and g.random() < 0.25:
            del holder[key]
        elif isinstance(holder, dict) and g.random() < 0.1:
            holder[g.choice(["x", "_CLASS_", "name"])] = g.choice(JSON_VALUES)
        else:
            holder[key] = g.choice(JSON_VALUES)
    return json.dumps(value)


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _word(g: random.Random, keys: list[str]) -> str:
    return f"{g.choice(keys)}={g.choice(VALUES)}".replace("\0", "")


def _train_words(g: random.Random, m: Material, folder: Path) -> list[str]:
    words = [_word(g, KEYS) for _ in range(g.randrange(1, 3))]
    return ["train.py", "--config", str(m.yaml), g.choice(["--dry-run", "--show"]), *words]


def _train_yaml(g: random.Random, m: Material, folder: Path) -> list[str]:
    (folder / "a.yaml").write_bytes(_mutated_bytes(g, m.yaml.read_bytes()))
    return ["train.py", "--config", "a.yaml", "--dry-run"]


def _plan(g: random.Random, m: Material, folder: Path) -> list[str]:
    gpus = g.choice(["0", "-1", "1", "3", "10000000000000", "x", "2.5", "9" * 4000])
    return ["plan.py", "--config", str(m.yaml), "--gpus", gpus, "--gpu", g.choice(["h100", "", "x"]), _word(g, KEYS)]


def _prepare(g: random.Random, m: Material, folder: Path) -> list[str]:
    name = g.choice(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
    if g.random() < 0.7:
        (folder / name).write_bytes(_mutated_bytes(g, (folder / name).read_bytes()))
    text = (
        f'output: out\nworkers: 1\nsources: [{{paths: [{name}], separator: "\\n\\n"}}]\n'
        f"tokenizer: {{identifier: '{m.data}/tokenizer.json'}}\n"
    )
    (folder / "d.yaml").write_bytes(_mutated_bytes(g, text.encode()) if g.random() < 0.3 else text.encode())
    words = [f"{g.choice(DATA_KEYS)}={g.choice(VALUES)}"] if g.random() < 0.6 else []
    return ["prepare_data.py", "--config", "d.yaml", "max_reject_share=0", *words]


def _inspect(g: random.Random, m: Material, folder: Path) -> list[str]:
    shutil.copytree(m.data, folder / "shards")
    name = g.choice(["manifest.json", "manifest.json", "manifest.json", "tokenizer.json"])
    content = json.loads((folder / "shards" / name).read_text())
    (folder / "shards" / name).write_text(_mutated_json(g, content))
    extra = g.choice(
        [[], ["--hashes"], ["--documents", g.choice(["-1", "0", "99999999", "x"])], ["--split", "validation"]]
    )
    return ["inspect_data.py", "shards", *extra]


def _checkpoint(g: random.Random, m: Material, folder: Path) -> str:
    """A copy of the checkpoint with one file changed; its checksums are left out, or made right."""
    from spattn_olmoe.model.checkpoint_files import write_checksums

    copied = folder / "run/step12"
    shutil.copytree(m.checkpoint, copied)
    name = g.choice(
        ["config.json"] * 4 + ["attention.json"] * 2 + ["tokenizer.json", ".metadata.json", "data", "index", "sums"]
    )
    if name == "sums":
        path = copied / "checksums/rank0.json"
        path.write_text(_mutated_json(g, json.loads(path.read_text())))
        return "run"
    if name == "data":
        path = g.choice(sorted((copied / "model_and_optim").glob("*.distcp")))
        path.write_bytes(_mutated_bytes(g, path.read_bytes()))
    elif name == "index":
        path = copied / "model_and_optim/.metadata"
        path.write_bytes(g.choice([_mutated_bytes(g, path.read_bytes()), pickle.dumps(_Canary())]))
    else:
        path = copied / name
        path.write_text(_mutated_json(g, json.loads(path.read_text())))
    if g.random() < 0.5:
        write_checksums(copied, rank=0, ranks=1)
    else:
        shutil.rmtree(copied / "checksums")
    return g.choice(["run", "run/step12"])


class _Canary:
    """Unpickled, it imports what must not be imported."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, (CANARY,)


def _generate(g: random.Random, m: Material, folder: Path) -> list[str]:
    words = ["--prompt", g.choice(["if", "", "é漢", "x " * 20_000, "\udce9"]), "--max-new-tokens"]
    words += [g.choice(["1", "2", "0", "-1", "1000000000", "x"])]
    if g.random() < 0.5:
        words += [g.choice(["--temperature", "--seed"]), g.choice(["0", "-1", "nan", "inf", "1e30", "9" * 30])]
    where = _checkpoint(g, m, folder) if g.random() < 0.7 else str(m.checkpoint)
    return ["generate.py", "--checkpoint", where, *words]


def _heads(g: random.Random, m: Material, folder: Path) -> list[str]:
    numbers = [g.choice(["--sequences", "--length"]), g.choice(["0", "-1", "1", "9" * 12, "x"])]
    words = ["--checkpoint", _checkpoint(g, m, folder), "--data", str(m.data), "--out", "heads"]
    return ["analyze_heads.py", *words, *numbers]


def _evaluate(g: random.Random, m: Material, folder: Path) -> list[str]:
    words = [
        g.choice(["--limit", "--batch-size"]),
        g.choice(["0", "-1", "1", "x"]),
        f"max_length={g.choice(VALUES[:12])}",
    ]
    where = _checkpoint(g, m, folder)
    return ["evaluate.py", "--checkpoint", where, "--loss", "--data", str(m.data), *words[: 2 + g.randrange(2)]]


def _compare(g: random.Random, m: Material, folder: Path) -> list[str]:
    (folder / "a.json").write_text(json.dumps(results()))
    (folder / "b.json").write_text(_mutated_json(g, results()))
    return ["evaluate.py", "--compare", "a.json", "b.json", "--out", "out"]


def _draw(g: random.Random, m: Material, folder: Path) -> list[str]:
    numbers = ["0", "-1", "2", "5000", "9" * 30, "x"]
    words = ["--heads", g.choice(["2", *numbers]), "--band-length", g.choice(["64", *numbers])]
    option = f"{g.choice(['local_sharing', 'n_heads', 'name', 'buckets', 'window', 'x'])}={g.choice(VALUES)}"
    name = g.choice(["spattention", "eball", "reformer", "evilmod.x", "os.x", "", "\x1b[31m"])
    out = g.choice(["m.png", "", ".", "/dev/full", "a/b.svg", "x.txt"])
    return ["draw_masks.py", "--type", name, *words, "--out", out, option.replace("\0", "")]


def _plot(g: random.Random, m: Material, folder: Path) -> list[str]:
    name = g.choice(["r", "$x^{$", "_x", "[red]", "a b"])
    (folder / name).mkdir()
    lines = (m.checkpoint.parent / "metrics.jsonl").read_text().splitlines()
    at = g.randrange(len(lines))
    lines[at] = _mutated_json(g, json.loads(lines[at]))
    (folder / name / "metrics.jsonl").write_text("\n".join(lines))
    return ["plot_loss.py", name, "--out", g.choice(["l.png", "l.svg", "", "/dev/full", "x"])]


MAKERS: tuple[Maker, ...] = (
    _train_words, _train_yaml, _plan, _prepare, _inspect, _generate, _train_words, _heads, _compare, _draw, _plot, _evaluate,
    _train_words, _inspect, _generate, _compare,
)  # fmt: skip

"""Values and changes that nobody means."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from spattn_olmoe.train.ranges import RANGES

VALUES = [
    "", "null", "true", "[]", "{}", "0", "-1", "1", "2.5", ".nan", ".inf", "-.inf", "1e400", "1e12", str(10**12), str(2**63),
    "9" * 30, "7" * 5000, "word", "'a b'", "a/../b", "/nonexistent/x", "../x", "~", "\x1b[31mred", "a\nb", "'\\0'", "é漢🙂",
    "[1,2]", "{a: 1}", "{_CLASS_: evilmod.X}", "{_CLASS_: subprocess.Popen, args: [id]}", "${oc.env:HOME}", "${nothing}",
    "${name}", "[/red]", "--", "=", "!!python/object/apply:os.system ['id']", "*alias",
    "&a [*a]", "evilmod.x", "os.system", "%s%n", "</script><b>", "a|b",
]  # fmt: skip
JSON_VALUES: list[Any] = [
    None, True, 0, -1, 1, 2.5, float("nan"), float("inf"), 10**12, 2**63, 10**400, "", "word", "../../secret", "/etc/passwd",
    "evilmod.x", "a\nb", "\x1b[31m", "</script><b>|", [], {}, [1], {"a": 1}, [[[[]]]], {"_CLASS_": "evilmod.X"},
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


def mutated_bytes(g: random.Random, data: bytes) -> bytes:
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


def mutated_json(g: random.Random, value: Any) -> str:
    """The value with one or two places exchanged, dropped or added to; now and then what is no JSON."""
    if g.random() < 0.1:
        return mutated_bytes(g, json.dumps(value).encode()).decode(errors="replace")
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

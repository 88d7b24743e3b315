"""Exported models under another release of transformers than this project's. benchmarks/exported.sh runs it all.

``native`` computes logits and greedy tokens with OLMo-core, ``check`` compares transformers with them where neither
OLMo-core nor this package can be imported, ``result`` writes down what it found.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

TOLERANCE, NEW = 1e-4, 12

RESULT = Path("benchmarks/results/cpu/exported.json")


def models(work: Path) -> list[Path]:
    return sorted(path.parent for path in work.glob("*/exported"))


@torch.no_grad()
def native(work: Path) -> None:
    """Logits of every prompt, and the likeliest continuation of the last one."""
    from spattn_olmoe.errors import quiet
    from spattn_olmoe.model.checkpoint import Checkpoint

    quiet()
    prompts = json.loads((work / "prompts.json").read_text())
    for folder in models(work):
        model = Checkpoint.open(folder / "step1").load("cpu").model
        ids = torch.tensor([prompts[-1]])
        for _ in range(NEW):
            logits = model(ids)[0, -1].index_fill(0, torch.tensor([0]), -torch.inf)  # no end of text
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        torch.save({"logits": [model(torch.tensor([p]))[0] for p in prompts], "greedy": ids[0]}, folder / "native.pt")


@torch.no_grad()
def differences(model: Any, prompts: list[list[int]], expected: dict[str, Any]) -> dict[str, float]:
    """The largest difference of a logit from the native ones, by how the prompts were given."""

    def worst(pairs: Any) -> float:
        return max(float((a - b).abs().max()) for a, b in pairs)

    alone, T = expected["logits"], max(map(len, prompts))
    found = {"alone": worst((model(torch.tensor([p])).logits[0], e) for p, e in zip(prompts, alone, strict=True))}
    for side in ("left", "right"):
        pads = [[1] * (T - len(p)) for p in prompts]
        rows = [pad + p if side == "left" else p + pad for p, pad in zip(prompts, pads, strict=True)]
        parts = [slice(T - len(p), T) if side == "left" else slice(0, len(p)) for p in prompts]
        mask = torch.zeros(len(prompts), T, dtype=torch.long)
        for row, part in zip(mask, parts, strict=True):
            row[part] = 1
        logits = model(torch.tensor(rows), attention_mask=mask).logits
        found[f"padded on the {side}"] = worst((logits[i, part], alone[i]) for i, part in enumerate(parts))
    positions = torch.cat([torch.arange(len(p)) for p in prompts])[None]
    packed = model(
        torch.tensor([[token for p in prompts for token in p]]), position_ids=positions, use_cache=False
    ).logits[0]
    return found | {"packed": worst([(packed, torch.cat(alone))])}


@torch.no_grad()
def generations(model: Any, prompt: list[int], expected: torch.Tensor) -> dict[str, bool]:
    """Whether every way of generating gives what it must."""
    ids, asked = torch.tensor([prompt]), {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    ways: dict[str, dict[str, Any]] = {
        "dynamic cache": {},
        "static cache": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
    }
    found = {way: torch.equal(model.generate(ids, **asked, **options)[0], expected) for way, options in ways.items()}
    lookup = model.generate(ids, prompt_lookup_num_tokens=3, **asked)[0]
    beams = [model.generate(ids, num_beams=3, use_cache=cache, **asked) for cache in (True, False)]
    return found | {"prompt lookup": torch.equal(lookup, expected), "beams as without a cache": torch.equal(*beams)}


def refusals(folder: Path) -> dict[str, bool]:
    """Whether all that would be dense is refused."""
    from transformers import AutoModelForCausalLM, OlmoeForCausalLM

    def refused(load: Any, **options: Any) -> bool:
        try:
            load(folder, **options)
        except Exception as error:  # each has a type of its own
            return "dense" in str(error) or "trust_remote_code" in str(error)
        return False

    trusted = {"trust_remote_code": True}
    found = {
        f"attn_implementation={name}": refused(
            AutoModelForCausalLM.from_pretrained, attn_implementation=name, **trusted
        )
        for name in ("sdpa", "eager", "flex_attention")
    }
    found["without trust"] = refused(AutoModelForCausalLM.from_pretrained, trust_remote_code=False)
    return found | {"as OlmoeForCausalLM": refused(OlmoeForCausalLM.from_pretrained)}


def check(work: Path) -> None:
    """Everything above for every model, and a model saved and read again."""
    import transformers

    for package in ("spattn_olmoe", "olmo_core"):
        assert importlib.util.find_spec(package) is None, f"{package} can be imported: this would show nothing"
    prompts = json.loads((work / "prompts.json").read_text())
    rows = []
    for folder in models(work):
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder / "exported", trust_remote_code=True).eval()
        expected = torch.load(folder / "native.pt")
        model.save_pretrained(folder / "again")
        again = load(folder / "again", trust_remote_code=True).state_dict()
        own = model.config.model_type == "spattn_olmoe"
        row = {
            "model": folder.name,
            "differences": differences(model, prompts, expected),
            "as_native": generations(model, prompts[-1], expected["greedy"]),
            "saved_bit_for_bit": all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items()),
            "refused": refusals(folder / "exported") if own else {},
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    (work / "exported.json").write_text(json.dumps({"transformers": transformers.__version__, "models": rows}))


def result(work: Path) -> None:
    """Write the result file, and fail where a model differs."""
    from spattn_olmoe import machine

    found = json.loads((work / "exported.json").read_text())
    machine.write_json(
        RESULT, {"machine": machine.describe("cpu") | {"command": "bash benchmarks/exported.sh"}, **found}
    )
    for row in found["models"]:
        true = [*row["as_native"].values(), *row["refused"].values(), row["saved_bit_for_bit"]]
        if not all(true) or max(row["differences"].values()) > TOLERANCE:
            raise SystemExit(f"{row['model']} is not the native model: see {RESULT}")


STEPS = {"native": native, "check": check, "result": result}

if __name__ == "__main__":
    step, work = sys.argv[1:]
    STEPS[step](Path(work))

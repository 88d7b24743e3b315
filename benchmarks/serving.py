"""vLLM against the native model: greedy tokens and log-probabilities of exported models. benchmarks/serving.sh runs it all.

Three steps, because vLLM lives in an environment of its own: ``prepare`` writes checkpoints of random weights, exports them
and draws prompts longer than the widest band; ``serve`` runs vLLM; ``compare`` computes the same natively and writes the
result. Prompts are served as one batch, with chunked prefill and prefix caching and without.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.exported import models
from spattn_olmoe.patterns import VARIANTS

NEW, TOLERANCE = 16, 1e-4
PROMPTS = (150, 140, 97, 150, 20)  # tokens; the fourth shares the first one's beginning
MODELS: dict[str, dict[str, Any]] = {
    **{name: VARIANTS[name].section for name in ("dense", "exclusive", "sharing", "longformer", "bigbird")},
    "layers_differ": {"type": "spattention", "layers": [1]},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "one batch": {"enable_prefix_caching": False, "enable_chunked_prefill": False, "max_num_batched_tokens": 1024},
    "chunks of 64 tokens, prefixes kept": {
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 64,
    },
}

RESULT = Path("benchmarks/results/cpu/serving.json")


def prepare(work: Path) -> None:
    """Checkpoints of random weights, their exports, and the prompts."""
    import torch

    from benchmarks.tiny import EOS, PAD, VOCAB
    from benchmarks.tiny_checkpoint import write_checkpoint
    from spattn_olmoe.errors import quiet
    from spattn_olmoe.model.checkpoint import Checkpoint
    from spattn_olmoe.model.hf.export import export

    quiet()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(max(EOS, PAD) + 1, VOCAB, (n,), generator=generator).tolist() for n in PROMPTS]
    prompts[3][:100] = prompts[0][:100]
    (work / "prompts.json").write_text(json.dumps(prompts))
    for name, section in MODELS.items():
        folder = work / name
        write_checkpoint(folder / "step1", section, n_kv_heads=2, d_model=128)  # vLLM's heads are 32 wide or more
        export(Checkpoint.open(folder / "step1"), folder / "exported")


def serve(work: Path) -> None:
    """Tokens and log-probabilities of all models and settings by vLLM. Needs no OLMo-core."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process imports vLLM once
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    import vllm
    from vllm import LLM, SamplingParams

    prompts = json.loads((work / "prompts.json").read_text())
    asked = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    found: dict[str, Any] = {"vllm": vllm.__version__, "runs": []}
    for folder in models(work):
        for setting, options in SETTINGS.items():
            llm = LLM(
                model=str(folder / "exported"),
                trust_remote_code=True,
                dtype="float32",
                enforce_eager=True,
                max_model_len=256,
                max_num_seqs=8,
                seed=0,
                hf_overrides={"max_position_embeddings": 256},
                **options,
            )
            if options["enable_prefix_caching"]:
                llm.generate([{"prompt_token_ids": prompts[0]}], SamplingParams(temperature=0, max_tokens=1))
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked)
            answers = [answer(output) for output in outputs]
            found["runs"].append({"model": folder.name, "setting": setting, "answers": answers})
            del llm
    (work / "served.json").write_text(json.dumps(found))


def answer(output: Any) -> dict[str, Any]:
    """New tokens, and log-probabilities of the prompt's tokens from the second on and of the new ones."""
    (completion,) = output.outputs
    new = list(completion.token_ids)
    ids = list(output.prompt_token_ids)
    prompt = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    return {"tokens": new, "logprobs": prompt + [s[t].logprob for s, t in zip(completion.logprobs, new, strict=True)]}


def compare(work: Path) -> None:
    """The native model's tokens and log-probabilities against vLLM's, into a result file."""
    import torch

    from benchmarks.tiny_checkpoint import N
    from spattn_olmoe import machine
    from spattn_olmoe.errors import quiet
    from spattn_olmoe.model.checkpoint import Checkpoint

    quiet()
    prompts = json.loads((work / "prompts.json").read_text())
    served = json.loads((work / "served.json").read_text())
    rows = []
    for run in served["runs"]:
        model = Checkpoint.open(work / run["model"] / "step1").load("cpu").model
        same, worst = True, 0.0
        for ids, theirs in zip(prompts, run["answers"], strict=True):
            whole = torch.tensor([ids + theirs["tokens"]])
            with torch.no_grad():
                logprobs = model(whole).float().log_softmax(-1)[0, :-1]
            greedy = logprobs[len(ids) - 1 :].argmax(-1).tolist()
            ours = logprobs.gather(1, whole[0, 1:, None])[:, 0]
            same &= greedy == theirs["tokens"]
            worst = max(worst, float((ours - torch.tensor(theirs["logprobs"])).abs().max()))
        rows.append(
            {"model": run["model"], "setting": run["setting"], "same_tokens": same, "logprob_difference": worst}
        )
        print(f"{run['model']:16} {run['setting']:36} same tokens: {same}  log-probabilities within {worst:.1e}")
    about = machine.describe("cpu") | {"command": "bash benchmarks/serving.sh"}
    result = {
        "machine": about,
        "vllm": served["vllm"],
        "prompts": PROMPTS,
        "band_length": N,
        "new_tokens": NEW,
        "runs": rows,
    }
    machine.write_json(RESULT, result)
    if not all(row["same_tokens"] and row["logprob_difference"] < TOLERANCE for row in rows):
        raise SystemExit(f"vLLM and the native model differ by more than {TOLERANCE}: see {RESULT}")


STEPS = {"prepare": prepare, "serve": serve, "compare": compare}

if __name__ == "__main__":
    step, work = sys.argv[1:]
    STEPS[step](Path(work))

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

N, VOCAB, HEADS, NEW, TOLERANCE = 128, 512, 4, 16, 1e-4
PROMPTS = (150, 140, 97, 150, 20)  # tokens; the fourth shares the first one's beginning
MODELS: dict[str, dict[str, Any]] = {
    "exclusive bands": {"type": "spattention"},
    "shared bands": {"type": "spattention", "local_sharing": True},
    "layers differ": {"type": "spattention", "layers": [1]},
    "longformer": {"type": "longformer"},
    "bigbird": {"type": "bigbird"},
    "dense": {"type": "standard"},
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


def folder_of(work: Path, name: str) -> Path:
    return work / name.replace(" ", "-")


def prepare(work: Path) -> None:
    """Checkpoints of random weights, their exports, and the prompts."""
    import torch

    from spattn_olmoe.errors import quiet
    from spattn_olmoe.model.checkpoint import Checkpoint
    from spattn_olmoe.model.hf.export import export
    from spattn_olmoe.train.config import load_experiment

    quiet()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in PROMPTS]
    prompts[3][:100] = prompts[0][:100]
    (work / "prompts.json").write_text(json.dumps(prompts))
    for name, section in MODELS.items():
        experiment = load_experiment("configs/quickstart.yaml", overrides(section, work))
        write_checkpoint(folder_of(work, name) / "step1", experiment)
        export(Checkpoint.open(folder_of(work, name) / "step1"), folder_of(work, name) / "exported")


def overrides(section: dict[str, Any], work: Path) -> list[str]:
    """The quickstart's model, smaller, with heads of 32: the smallest that vLLM has on a CPU."""
    model = (
        *("model.d_model=128", "model.n_layers=2", f"model.vocab_size={VOCAB}", f"dataset.sequence_length={N}"),
        *(f"model.block.sequence_mixer.n_heads={HEADS}", "model.block.sequence_mixer.n_kv_heads=2"),
        *(f"dataset.tokenizer.vocab_size={VOCAB}", f"dataset.tokenizer.identifier={work}/tokenizer.json"),
    )
    layers = {"attention.local_sharing": False} | {f"attention.{key}": value for key, value in section.items()}
    return [*model, *(f"{key}={json.dumps(value)}" for key, value in layers.items())]


def write_checkpoint(folder: Path, experiment: Any) -> None:
    """A complete checkpoint whose random weights are large enough for attention to matter."""
    import torch
    from olmo_core.distributed.checkpoint import save_model_and_optim_state

    from spattn_olmoe.data.tokenizer import train_tokenizer
    from spattn_olmoe.model import apply_remedies
    from spattn_olmoe.model.checkpoint_files import write_checksums
    from spattn_olmoe.model.fingerprint import FILE_NAME, Fingerprint

    apply_remedies()
    config = experiment.model_with_attention()
    model = config.build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise * 0.1 if "norm" in name else noise * 0.15)
    save_model_and_optim_state(folder, model)
    (folder / "config.json").write_text(json.dumps(experiment.replace(model=config).as_config_dict()))
    (folder / FILE_NAME).write_text(Fingerprint.of(config).to_json())
    train_tokenizer([Path(__file__).read_text()], 300, folder / "tokenizer.json")
    write_checksums(folder, rank=0, ranks=1)


def serve(work: Path) -> None:
    """Tokens and log-probabilities of all models and settings by vLLM. Needs no OLMo-core."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process imports vLLM once
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    import vllm
    from vllm import LLM, SamplingParams

    prompts = json.loads((work / "prompts.json").read_text())
    asked = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    found: dict[str, Any] = {"vllm": vllm.__version__, "runs": []}
    for name in MODELS:
        for setting, options in SETTINGS.items():
            llm = LLM(
                model=str(folder_of(work, name) / "exported"),
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
            found["runs"].append({"model": name, "setting": setting, "answers": answers})
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

    from spattn_olmoe import machine
    from spattn_olmoe.errors import quiet
    from spattn_olmoe.model.checkpoint import Checkpoint

    quiet()
    prompts = json.loads((work / "prompts.json").read_text())
    served = json.loads((work / "served.json").read_text())
    rows = []
    for run in served["runs"]:
        model = Checkpoint.open(folder_of(work, run["model"]) / "step1").load("cpu").model
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

"""One training setup, measured in a process of its own: python -m benchmarks.training_step JOB.json RESULT.json

The step is the one of ``scripts/train.py``: OLMo-core's train module as the configs describe it (FSDP of one rank, bfloat16
on a GPU), the remedies with the grouped matrix product, clipping and AdamW. Data loading and logging are not in it:
tokens are random.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spattn_olmoe.commands import ROOT

SYNCHRONISING = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    *("aten::item", "aten::_local_scalar_dense", "aten::nonzero"),
)
"""What a host waits in, by its name in a profile; copies to the host are counted beside it."""
MULTIPLICATIONS = ("aten::_grouped_mm", "aten::mm", "aten::addmm", "aten::bmm")


@dataclass(frozen=True)
class Job:
    """One setup.

    :param config: an experiment of ``configs/``; ``overrides`` on top of it.
    :param sequences: sequences of ``N`` tokens in a microbatch; ``microbatches`` of them make a step.
    :param steps: timed steps, after two that are not.
    """

    config: str
    N: int
    overrides: tuple[str, ...]
    sequences: int
    microbatches: int
    steps: int
    device: str
    profile: bool = True


def run(job: Job) -> dict[str, Any]:
    """Times, memory and counts of a job."""
    from spattn_olmoe.train import load_experiment

    tokens = job.sequences * job.N
    config = load_experiment(
        ROOT / "configs" / job.config,
        [
            *job.overrides,
            f"dataset.sequence_length={job.N}",
            f"train_module.rank_microbatch_size={tokens}",
            f"data_loader.global_batch_size={tokens * job.microbatches}",
        ],
    )
    with one_rank(config.init_seed, job.device):
        return _measure(job, config)


@contextmanager
def one_rank(seed: int, device: str) -> Iterator[None]:
    """The process as ``scripts/train.py`` has it on one rank, with as many threads as it had before."""
    from olmo_core.train import prepare_training_environment, teardown_training_environment

    from spattn_olmoe.model import apply_remedies
    from spattn_olmoe.train.allocator import keep_freed_memory

    threads = torch.get_num_threads()
    apply_remedies()
    if device == "cpu":
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    prepare_training_environment(seed=seed, backend=backend, shared_filesystem=True)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        teardown_training_environment()


def _measure(job: Job, config: Any) -> dict[str, Any]:
    from spattn_olmoe.machine import peak_flops
    from spattn_olmoe.model.flops import flops_per_token

    device = torch.device(job.device)
    model_config = config.model_with_attention()
    flops = flops_per_token(model_config.build(init_device="meta"), job.N)
    mixer = model_config.block.sequence_mixer
    head_dim = mixer.head_dim or model_config.d_model // mixer.n_heads
    pattern = mixer.build_pattern()
    dtype = torch.bfloat16 if job.device == "cuda" else torch.float32
    shape = job.sequences, job.N, mixer.n_heads, mixer.n_kv_heads or mixer.n_heads, head_dim
    kernel, attention_ms = _attention(job, pattern, shape, dtype)
    if kernel == "ours dense":
        mixer.impl = "triton"

    generator = torch.Generator().manual_seed(0)
    shape_of_ids = job.microbatches, job.sequences, job.N
    ids = torch.randint(0, config.dataset.tokenizer.vocab_size, shape_of_ids, generator=generator).to(device)
    tokens = ids.numel()
    step = build_step(config, model_config, ids)

    losses = [float(step()) for _ in range(2)]  # compiles, allocates Adam's moments, fills caches
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [_seconds(step, job.device) for _ in range(job.steps)]
    losses.append(float(step()))
    peak = torch.cuda.max_memory_allocated() if job.device == "cuda" else _peak_resident()
    median = statistics.median(seconds)
    peak_rate = peak_flops(device)
    launched = model_config.n_layers * job.microbatches
    result: dict[str, Any] = {
        "layers": model_config.n_layers,
        "parameters": model_config.num_params,
        "clock": clock(job.device),
        "tokens": tokens,
        "microbatches": job.microbatches,
        "ms": median * 1e3,
        "slowest_ms": max(seconds) * 1e3,
        "tokens_per_second": tokens / median,
        "flops_per_token": asdict(flops),
        "mfu": flops.total * tokens / median / peak_rate if peak_rate else None,
        "mfu_as_if_dense": flops.dense * tokens / median / peak_rate if peak_rate else None,
        "peak": peak,
        "attention_kernel": kernel,
        "attention_ms": attention_ms,
        "attention_share": attention_ms * launched / (median * 1e3),
        "losses": losses,
    }
    if job.profile:
        result["profile"] = profile_counts(step, job.device) | {
            "layers_run": launched,
            "experts": model_config.block.feed_forward_moe.num_experts,
        }
        result["profile"] |= judge(result["profile"])
    return result


def build_step(config: Any, model_config: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One optimiser step as a call, which returns its loss.

    :param config: an experiment, whose train module is built around ``model_config``.
    :param ids: ``(microbatches, sequences, N)`` tokens, on the device.
    """
    module = config.train_module.build(model_config.build(init_device="meta"))
    module._set_model_mode("train")
    labels = torch.nn.functional.pad(ids[..., 1:], (0, 1), value=-100)
    microbatches, tokens = len(ids), ids.numel()

    def step() -> torch.Tensor:
        total = torch.zeros((), device=ids.device)
        for i, (x, y) in enumerate(zip(ids, labels, strict=True)):
            with module._train_microbatch_context(i, microbatches):
                _, loss, ce_loss, _ = module.model_forward(
                    x,
                    labels=y,
                    ignore_index=-100,
                    loss_reduction="sum",
                    loss_div_factor=tokens,
                    return_logits=False,
                )
                total += ce_loss.detach()
                loss.backward()
        module.model.post_batch()
        module.model.reset_auxiliary_metrics()
        module._clip_grad_norm(module.max_grad_norm)
        module.optim.step()
        module.model.post_optim_step()
        module.zero_grads()
        return total

    return step


def _attention(job: Job, pattern: Any, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[str, float]:
    """The kernel that this model's attention takes, and the ms of one layer's attention, forward and backward.

    For dense attention on a GPU the fastest of SDPA's kernels and ours; the others are then switched off.
    """
    from benchmarks import contenders, timing
    from spattn_olmoe import attention
    from spattn_olmoe.kernels import Facts, choose

    B, N, H, G, D = shape
    q, k, v = (torch.randn(B, N, h, D, device=job.device, dtype=dtype, requires_grad=True) for h in (H, G, G))
    d_out = torch.randn_like(q)
    calls: dict[str, timing.Call] = {}
    found: dict[str, contenders.Attend] = {}
    if job.device == "cuda" and pattern.name == "standard" and G == H:
        dense, _ = contenders.dense("cuda", N, H)
        found = {name: dense[name] for name in ("sdpa flash", "sdpa cudnn", "ours dense")}
    else:
        name = choose(Facts(job.device, pattern, N, dtype=dtype, head_dim=D))
        found = {name: lambda q, k, v: attention(q, k, v, pattern)}
    for name, attend in found.items():

        def call(attend: contenders.Attend = attend) -> object:
            return torch.autograd.grad(attend(q, k, v), (q, k, v), d_out)

        try:
            call()
        except RuntimeError as error:  # a kernel that this GPU has not: one of the others serves
            if len(found) == 1:
                raise
            print(f"{name}: {str(error)[:200]}", file=sys.stderr)
            continue
        calls[name] = call
    if not calls:
        raise ValueError("no dense attention kernel runs on this GPU")
    if job.device == "cpu":  # by the clock of the steps
        return _only_call(calls, job.device)
    times = timing.take_turns(calls, job.device, seconds=1.0)
    best = min(times, key=lambda name: times[name].ms)
    if best.startswith("sdpa "):
        torch.backends.cuda.enable_flash_sdp(best == "sdpa flash")
        torch.backends.cuda.enable_cudnn_sdp(best == "sdpa cudnn")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    return best, times[best].ms


def _only_call(calls: dict[str, Callable[[], object]], device: str) -> tuple[str, float]:
    """The only call there is, and its median ms of five."""
    ((name, call),) = calls.items()
    call()
    return name, statistics.median(_seconds(call, device) for _ in range(5)) * 1e3


def clock(device: str) -> str:
    """What times are read from: on one CPU thread the processor time of the process, which other jobs do not lengthen."""
    return "processor time" if device == "cpu" and torch.get_num_threads() == 1 else "wall time"


def _seconds(step: Callable[[], object], device: str) -> float:
    now = time.process_time if clock(device) == "processor time" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = now()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return now() - start


def _peak_resident() -> int:
    """The most memory that this process has held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def profile_counts(step: Callable[[], object], device: str) -> dict[str, Any]:
    """How often one step waits for the device, copies to the host and multiplies matrices."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        step()
    counts = Counter({event.key: event.count for event in profiler.key_averages()})
    to_host = sum(n for name, n in counts.items() if name.startswith("Memcpy DtoH"))
    return {
        "waits": {name: counts[name] for name in SYNCHRONISING if counts[name]},
        "copies_to_host": to_host,
        "products": {name: counts[name] for name in MULTIPLICATIONS if counts[name]},
    }


def judge(profile: dict[str, Any]) -> dict[str, bool]:
    """Whether the host waits once a layer or more, and whether experts are multiplied one by one.

    A loop over experts makes at least one product an expert and layer; waits of a step, not of its layers, stay below
    the number of layers. ``aten::item`` is left out: it is counted again as ``aten::_local_scalar_dense``.
    """
    layers = profile["layers_run"]
    waits = sum(n for name, n in profile["waits"].items() if name.startswith("cuda"))
    plain = sum(n for name, n in profile["products"].items() if name != "aten::_grouped_mm")
    return {
        "waits_in_every_layer": max(waits, profile["copies_to_host"]) >= layers,
        "loops_over_experts": plain >= layers * profile["experts"],
    }


def main() -> int:
    job_file, result_file = map(Path, sys.argv[1:])
    data = json.loads(job_file.read_text())
    job = Job(**data | {"overrides": tuple(data["overrides"])})
    try:
        result = run(job)
    except torch.OutOfMemoryError as error:
        result = {"out_of_memory": str(error).split("\n")[0][:200]}
    except Exception as error:  # a setup that does not run is a result too
        result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        result_file.write_text(json.dumps(result))
        raise
    result_file.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every layout that is let through, by the number of ranks: what ``test_parallel.py`` and the ``parallel`` benchmark train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tiny import BASE, TINY, T, on_ranks, run_overrides, tiny, write_data, write_json
from benchmarks.tiny_checkpoint import save
from spattn_olmoe.model import apply_remedies
from spattn_olmoe.model.checkpoint import Checkpoint
from spattn_olmoe.model.convert import convert
from spattn_olmoe.model.stack import Stack
from spattn_olmoe.patterns import VARIANTS

WORKER = Path(__file__).with_name("parallel_worker.py")

SMOOTH = (
    "model.block.feed_forward_moe.lb_loss_granularity=instance",  # the default is another loss for every layout
    "train_module.optim.eps=1.0e-3",  # Adam's quotients of tiny gradients do not blow rounding up
    "attention.head_order=balanced",  # of one rank too, whose default is another
    "trainer.max_duration.value=5",
)

FSDP: tuple[str, ...] = ()
DDP = ("train_module.dp_config.name=ddp",)


def hsdp(shard_degree: int) -> tuple[str, ...]:
    return "train_module.dp_config.name=hsdp", f"train_module.dp_config.shard_degree={shard_degree}"


def tp(degree: int) -> tuple[str, ...]:
    return (f"train_module.tp_config.degree={degree}",)


def ulysses(degree: int) -> tuple[str, ...]:
    return f"train_module.cp_config.degree={degree}", "train_module.cp_config.uly={}"


def ep(degree: int) -> tuple[str, ...]:
    return *hsdp(degree), f"train_module.ep_config.degree={degree}"


def recomputing(mode: str, *more: str) -> tuple[str, ...]:
    return (f"train_module.ac_config.mode={mode}", *(f"train_module.ac_config.{item}" for item in more))


EXPERTS = recomputing("selected_modules", "modules=[blocks.*.feed_forward_moe.experts]")
MODULES = recomputing("selected_modules", "modules=[blocks.*.attention,blocks.*.feed_forward_moe.experts]")

PIPELINE = ("train_module.pp_config.degree=2",)

LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "fsdp": FSDP,
        "fsdp, recomputing modules": MODULES,
    },
    2: {
        "fsdp": FSDP,
        "hsdp": hsdp(2),
        "hsdp of replicas": hsdp(1),
        "ddp": DDP,
        "hsdp+ep": ep(2),
        "fsdp+tp": tp(2),
        "hsdp+tp": (*hsdp(1), *tp(2)),
        "fsdp+ulysses": ulysses(2),
        "hsdp+ulysses": (*hsdp(1), *ulysses(2)),
        "ddp+ulysses": (*DDP, *ulysses(2)),
        "hsdp+ep, recomputing modules": (*ep(2), *MODULES),
        "fsdp+tp, recomputing modules": (*tp(2), *MODULES),
        "fsdp+ulysses, recomputing experts": (*ulysses(2), *EXPERTS),
    },
    4: {
        "fsdp": FSDP,
        "hsdp 2x2": hsdp(2),
        "ddp": DDP,
        "hsdp+ep 2x2": ep(2),
        "hsdp+ep 1x4": ep(4),
        "fsdp+tp 2x2": tp(2),
        "fsdp+tp 1x4": tp(4),
        "hsdp+tp 2x2": (*hsdp(2), *tp(2)),
        "fsdp+ulysses 2x2": ulysses(2),
        "fsdp+ulysses 1x4": ulysses(4),
        "hsdp+ulysses 2x2": (*hsdp(2), *ulysses(2)),
        "ddp+ulysses 2x2": (*DDP, *ulysses(2)),
        "fsdp+ulysses+tp 1x2x2": (*ulysses(2), *tp(2)),
        "hsdp+ulysses+tp 1x2x2": (*hsdp(1), *ulysses(2), *tp(2)),
    },
}
"""A product such as 2x2 is data-parallel ranks times the degrees of the rest, in the order of the names."""

DDP_STACK = ("stack=ddp", *DDP, "train_module.dp_config.param_dtype=bfloat16")
FOUR_LAYERS = "model.n_layers=4"


def experts(degree: int) -> tuple[str, ...]:
    return (f"train_module.ep_config.degree={degree}",)


def pipeline(schedule: str) -> tuple[str, ...]:
    return "train_module.pp_config.degree=2", f"train_module.pp_config.schedule={schedule}"


V = pipeline("Custom1F1BV")

DDP_LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "ddp": (),
        "ddp, recomputing blocks": ("ddp.recompute_each_block=true",),
    },
    2: {
        "ddp": (),
        "ddp+ep": experts(2),
        "ddp+ulysses": ulysses(2),
        "ddp+ep+ulysses": (*experts(2), *ulysses(2)),
        "ddp+ep, recomputing blocks": (*experts(2), "ddp.recompute_each_block=true"),
        "pipeline": pipeline("CustomInterleaved1F1B"),
        "pipeline, V": V,
        "pipeline, V, recomputing blocks": (*V, "ddp.recompute_each_block=true"),
    },
    4: {
        "ddp": (),
        "ddp+ep 2x2": experts(2),
        "ddp+ep 1x4": experts(4),
        "ddp+ulysses 2x2": ulysses(2),
        "ddp+ep+ulysses, experts over 2": (*experts(2), *ulysses(2)),
        "ddp+ep+ulysses, experts over 4": (*experts(4), *ulysses(2)),
        "pipeline+ddp 2x2": pipeline("CustomInterleaved1F1B"),
        "pipeline+ddp 2x2, V": V,
        "pipeline+ep 2x2": (*pipeline("CustomInterleaved1F1B"), *experts(2)),
        "pipeline+ep 2x2, V": (*V, *experts(2)),
        "pipeline+ulysses 2x2": (*pipeline("CustomInterleaved1F1B"), *ulysses(2)),
        "pipeline+ulysses 2x2, V": (*V, *ulysses(2)),
        "pipeline+ep+ulysses, V": (*V, *experts(2), *ulysses(2)),
    },
}
"""Layouts of the stack ``ddp``, by the number of ranks. Experts lie on the ranks of data and context parallelism."""

IN_BFLOAT16 = {
    1: ("ddp",),
    2: ("ddp", "ddp+ep", "ddp+ulysses", "pipeline", "pipeline, V"),
    4: (
        *("ddp+ep 2x2", "ddp+ulysses 2x2", "ddp+ep+ulysses, experts over 2"),
        *("pipeline+ddp 2x2", "pipeline+ep 2x2", "pipeline+ulysses 2x2", "pipeline+ep+ulysses, V"),
    ),
}
"""Those that are also trained in bfloat16: pipelines, and what of them is rounding by itself."""


def rounded(layout: str) -> str:
    """The name of a layout's run in bfloat16."""
    return f"{layout}, bfloat16"


KEYS = ("loss", "gradient norm", "load-balancing loss")
Curve = list[list[float]]


def train(folder: Path, n_ranks: int, runs: dict[str, dict[str, Any]], *, timeout: float = 400) -> dict[str, Curve]:
    """:data:`KEYS` of each step of each run, trained one after the other in one launch.

    :param runs: by name: ``overrides`` of the tiny experiment, and optionally ``forget``, whether ranks are made to forget
        which heads they hold, ``ddp_in_float32``, and ``save_folder``, without which nothing is saved.
    """
    data = write_data(folder / "data")
    tasks = []
    for i, (name, run) in enumerate(runs.items()):
        where = run_overrides(Path(run.get("save_folder", folder / str(i))), data)
        nothing = [] if "save_folder" in run else ["trainer.no_checkpoints=true"]
        overrides = [*TINY, *SMOOTH, *nothing, *where, *run["overrides"]]
        options = {key: run.get(key, False) for key in ("forget", "ddp_in_float32")}
        tasks.append({"name": name, "base": str(BASE), "overrides": overrides, **options})
    write_json(folder / "runs.json", tasks)
    on_ranks(n_ranks, WORKER, str(folder / "runs.json"), str(folder / "out.json"), timeout=timeout)
    return json.loads((folder / "out.json").read_text())


def same_weights(folder: Path, overrides: Sequence[str]) -> dict[Stack, Path]:
    """A tiny model's random weights as a checkpoint of each stack.

    New weights will not do: a model that guesses shows little of what it is made of.
    """
    apply_remedies()
    config = tiny(*SMOOTH, *overrides, f"dataset.tokenizer.identifier={write_data(folder / 'data')}/tokenizer.json")
    described = config.model_with_attention()
    model, generator = described.build(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.dim() > 1 else 1.0, 0.1, generator=generator)
    v1, ddp = (folder / stack / "step0" for stack in (Stack.v1, Stack.ddp))
    save(v1, config, described, model)
    convert(Checkpoint.open(v1), ddp, Stack.ddp)
    return {Stack.v1: v1, Stack.ddp: ddp}


class BothStacks:
    """A model trained in the stack ``ddp`` and in v1, from the same weights over the same batches.

    In float32, which shows differences to rounding, and as :data:`IN_BFLOAT16` in what the new stack computes in.
    """

    def __init__(self, folder: Path, *overrides: str):
        self.folder = folder
        self.runs: dict[tuple[int, str], Path] = {}
        """Where each was trained, by number of ranks and name."""
        self._overrides = (
            *VARIANTS["sharing"].overrides,
            FOUR_LAYERS,
            "trainer.load_trainer_state=false",
            "trainer.callbacks.checkpointer.enabled=false",  # no_checkpoints would load none either
            *overrides,
        )
        self._start = same_weights(folder / "start", self._overrides)

    def train(
        self, n_ranks: int, float32: Sequence[str], bfloat16: Sequence[str] = (), *, timeout: float = 400
    ) -> dict[str, Curve]:
        """Curves of :data:`DDP_LAYOUTS` by name: of ``float32`` by the layout's, of ``bfloat16`` by :func:`rounded` of it.

        On one rank also ``v1``.
        """
        layouts = DDP_LAYOUTS[n_ranks]
        runs = {name: self._of_ddp(layouts[name], float32=True) for name in float32}
        runs |= {rounded(name): self._of_ddp(layouts[name], float32=False) for name in bfloat16}
        if n_ranks == 1:
            runs["v1"] = {"overrides": [*self._overrides, f"trainer.load_path={self._start[Stack.v1]}"]}
        folder = self.folder / f"ranks{n_ranks}"
        for i, (name, run) in enumerate(runs.items()):
            self.runs[n_ranks, name] = folder / f"run{i}"
            run["save_folder"] = str(folder / f"run{i}")
        return train(folder, n_ranks, runs, timeout=timeout)

    def _of_ddp(self, layout: Sequence[str], *, float32: bool) -> dict[str, Any]:
        start = f"trainer.load_path={self._start[Stack.ddp]}"
        return {"overrides": [*self._overrides, *DDP_STACK, *layout, start], "ddp_in_float32": float32}


def difference(one: Curve, other: Curve) -> list[float]:
    """The largest relative difference over all steps, for each of :data:`KEYS`."""
    assert len(one) == len(other) > 0
    return [max(abs(x[i] - y[i]) / abs(x[i]) for x, y in zip(one, other, strict=True)) for i in range(len(KEYS))]


class Resumed:
    """Runs that are stopped and resume under another layout, to be trained in the launches of 1, 2, 4 and again 1 ranks.

    One goes from 1 rank to 2 to 4 to 1, two steps each; others leave it after two steps, on 2 ranks. Nothing states in which
    order they have their heads: they have that of the checkpoint.
    """

    COMMON = (*VARIANTS["exclusive"].overrides, "attention.head_order=auto", "trainer.max_duration.value=8")
    ALL = "1 rank, then 2 (fsdp), 4 (hsdp+tp 2x2) and 1"
    BRANCHES = ("fsdp", "ddp", "hsdp+ep", "fsdp+tp", "fsdp+ulysses")

    def __init__(self, folder: Path, branches: tuple[str, ...] = BRANCHES):
        self.folder = folder
        self.branches = branches

    def runs(self, n_ranks: int) -> dict[str, dict[str, Any]]:
        """What is trained on 1, then 2, then 4 ranks."""
        if n_ranks == 1:
            return {"unbroken": {"overrides": self.COMMON}, **self._all(2)}
        if n_ranks == 4:
            return self._all(6, *hsdp(2), *tp(2))
        branches = {
            self.branch(name): {
                "overrides": [*self.COMMON, *LAYOUTS[2][name], f"trainer.load_path={self.folder}/all/step2"],
                "save_folder": str(self.folder / name),
            }
            for name in self.branches
        }
        return {**branches, **self._all(4)}

    def last(self) -> dict[str, dict[str, Any]]:
        """What is trained on 1 rank after all others."""
        return self._all(8)

    def branch(self, name: str) -> str:
        return f"1 rank, then 2 ({name})"

    def _all(self, stop: int, *layout: str) -> dict[str, dict[str, Any]]:
        overrides = [*self.COMMON, *layout, f"trainer.hard_stop={{value: {stop}, unit: steps}}"]
        return {self.ALL: {"overrides": overrides, "save_folder": str(self.folder / "all")}}

    def differences(self, curves: dict[int, dict[str, Curve]], last: dict[str, Curve]) -> dict[str, list[float]]:
        """By run, how far it is from the unbroken one."""
        unbroken = curves[1]["unbroken"]
        branches = (self.branch(name) for name in self.branches)
        return {
            self.ALL: difference(unbroken, last[self.ALL]),
            **{name: difference(unbroken[2:], curves[2][name]) for name in branches},
        }


REFUSED: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp+tp": (2, (*DDP, *tp(2))),
    "fsdp+ep": (2, ("train_module.ep_config.degree=2",)),
    "hsdp+ep+tp": (4, (*ep(2), *tp(2))),
    "hsdp+ep+ulysses": (4, (*ep(2), *ulysses(2))),
    "fsdp+ring": (2, ("train_module.cp_config.degree=2", "train_module.cp_config.ring={}")),
    "fsdp+pipeline": (2, PIPELINE),
    "fsdp+pipeline+tp": (4, (*PIPELINE, *tp(2))),
    "hsdp+pipeline": (4, (*PIPELINE, *hsdp(2))),
    "recomputing everything": (1, recomputing("full")),
    "recomputing blocks": (1, recomputing("selected_blocks", "block_interval=2")),
    "recomputing ops": (1, recomputing("selected_ops")),
    "recomputing routers": (1, recomputing("selected_modules", "modules=[blocks.*.feed_forward_moe*]")),
    "recomputing within a budget": (1, recomputing("budget", "activation_memory_budget=0.5")),
    "fsdp+ulysses, recomputing attention": (2, (*ulysses(2), *MODULES)),
}
"""What OLMo-core cannot do, or not rightly: number of ranks and overrides. ``check_layout`` gives the reasons."""

MICROBATCH = f"train_module.rank_microbatch_size={2 * T}"

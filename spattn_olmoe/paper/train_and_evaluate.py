"""Train and evaluate the runs of a table. What is finished is not done again; what was interrupted resumes.

A run trains in a process of its own, through ``scripts/train.py``, in a folder that its config's hash names. Its result is
one JSON file, written once the run is trained and evaluated.
"""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..commands import environment, relative, script_command, train_command
from ..data import prepare
from ..files import replace_file
from ..json_files import read_json
from ..lock import flock
from ..machine import default_device, describe
from ..metrics import METRICS_FILE, read_metrics
from ..model.checkpoint_files import find_checkpoint
from . import held_out
from .loss_curves import LOSS
from .runs import Run, Scale, data_config, steps_of
from .same_start import check_same_data, check_same_start, read_start

FORMAT = "spattn_olmoe reproduction run 1"
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT)
"""Exit statuses of a training that was told to stop."""
Say = Callable[[str], None]


def run_command(run: Run, scale: Scale, *, to_run: bool = False) -> list[str]:
    """The command that trains a run: one process, or one for each GPU of the machine at the paper's scale."""
    ranks = "gpu" if scale.config is None else None
    return train_command(run.config if to_run else relative(run.config), run.overrides, ranks, to_run=to_run)


def suite_command(run: Run, scale: Scale, table: str, *, to_run: bool = False) -> list[str] | None:
    """The command that gives a run its lm-eval scores; None at a scale without."""
    file = suite_file(run, scale, table)
    if file is None:
        return None
    limit = [] if scale.suite_limit is None else ["--limit", str(scale.suite_limit)]
    words = ["--checkpoint", str(run.folder), "--suite", file.stem, *limit, "--out", str(file.parent)]
    return script_command("evaluate", words, to_run=to_run)


def suite_file(run: Run, scale: Scale, table: str) -> Path | None:
    """Where a run's lm-eval scores lie; None at a scale without."""
    if scale.suite is None:
        return None
    return run.folder / "evaluation" / f"{table if scale.suite == 'table' else scale.suite}.json"


CORPORA: dict[str, list[str]] = {"corpus": [], "sources": ["--sources"]}
"""Folders of text that scripts/quickstart_corpus.py writes, and with which options."""


def prepare_data(scale: Scale, say: Say) -> None:
    """Prepare a scale's text where it is not prepared yet."""
    config = data_config(scale)
    for source in config.sources:
        folder = Path(source.paths[0]).parent if source.paths else None
        if folder and folder.name in CORPORA and not any(folder.glob("*.jsonl")):
            command = script_command("quickstart_corpus", [str(folder), *CORPORA[folder.name]], to_run=True)
            subprocess.run(command, env=environment(), check=True)
    manifest = prepare(config)
    say(f"data: {config.output}, {manifest.train_tokens:,} tokens, {manifest.validation_tokens:,} held out")


def run_all(
    runs: Sequence[Run],
    scale: Scale,
    table: str,
    *,
    out: Path,
    jobs: int,
    say: Say,
) -> list[dict[str, Any]]:
    """Train and evaluate all runs that are not finished; the results of all, in the order of ``runs``.

    :param jobs: runs that train at the same time. They do not know of one another, so it changes no result.
    :raises ValueError: training failed or was stopped, the data have changed since a run was finished, or runs that are to
        be compared did not start alike.
    """
    results: dict[str, dict[str, Any]] = {run.name: done for run in runs if (done := _read_result(out, run))}
    for number, run in enumerate(runs, 1):
        if run.name in results:
            check_same_data(run.experiment(), results[run.name]["start"], result_file(out, run))
            say(f"[{number}/{len(runs)}] {_line(results[run.name])}, done before")
    waiting = [run for run in runs if run.name not in results]
    for run in waiting:
        if result_file(out, run).exists():
            say(f"{result_file(out, run)} is of another config and will be replaced")
    children: list[subprocess.Popen[bytes]] = []
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            futures = {pool.submit(_train, run, scale, children, stop, say): run for run in waiting}
            for future in as_completed(futures):
                run, how = futures[future], future.result()
                result = result_of(run, describe(default_device()))
                _write_result(out, run, result)
                results[run.name] = result
                say(f"[{runs.index(run) + 1}/{len(runs)}] {_line(result)}{how}")
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()  # it saves a checkpoint first
            raise
    found = [results[run.name] for run in runs]
    check_same_start(found)
    for run in runs:
        _scores(run, scale, table)
    return found


def _line(result: dict[str, Any]) -> str:
    return f"{result['run']}: {result['steps']} steps, held-out loss {result['held_out']['rows'][0]['loss']:.4f}"


# ---- training --------------------------------------------------------------------------------------------------------


def _train(run: Run, scale: Scale, children: list[subprocess.Popen[bytes]], stop: threading.Event, say: Say) -> str:
    """Bring a run to its last step; in words, where it was resumed."""
    config = run.experiment()
    steps = steps_of(config)
    run.folder.mkdir(parents=True, exist_ok=True)
    with only_one(run.folder, say) as lock:
        before = trained_steps(run.folder)
        if before >= steps:
            check_same_data(config, read_start(run.folder), run.folder)  # of one that goes on the training itself asks
            return ", trained before"
        if stop.is_set():
            return ""
        command, env = run_command(run, scale, to_run=True), environment()
        if not scale.needs_gpu:
            env |= {"OMP_NUM_THREADS": "1"}  # the same sums in the same order, however many cores there are
        log = run.folder / "train.log"
        with open(log, "ab") as file:
            # The child holds the lock too: should this process be killed, nobody else trains there before it ends.
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, pass_fds=[lock])
            children.append(child)
            code = child.wait()
        if code and code not in STOPPED:
            raise ValueError(f"{run.name}: training ended with exit code {code}: {_last_error(log)}")
        if (done := trained_steps(run.folder)) < steps:
            raise ValueError(f"{run.name}: stopped after {done} of {steps} steps: run the same command again to resume")
        return f", resumed at step {before}" if before else ""


def trained_steps(folder: Path) -> int:
    """The step of a run's newest complete checkpoint; 0 where there is none. Read from its name: nothing is hashed."""
    found = find_checkpoint(folder, verify=False)
    return int(re.fullmatch(r"step(\d+)", Path(found).name)[1]) if found else 0  # type: ignore[index]


@contextmanager
def only_one(folder: Path, say: Say) -> Iterator[int]:
    """Hold a run's folder, waiting for whoever trains there; a file descriptor that holds it as long as it is open."""
    with open(folder / "reproduction.lock", "w") as file:  # "lock" is the training's own
        if flock(file.fileno()) is False:  # where there are no locks, the training's own still keeps others out
            say(f"{folder} is being trained by another process: waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    stated = [line for line in lines if line.startswith("error: ")]
    return f"{(stated or lines or ['it printed nothing'])[-1].removeprefix('error: ')} ({log})"


# ---- results ---------------------------------------------------------------------------------------------------------


def result_of(run: Run, machine: dict[str, Any]) -> dict[str, Any]:
    """Everything that tables and plots need of a trained run."""
    metrics = read_metrics(run.folder)
    curve = {step: values[LOSS] for step, values in metrics.items() if LOSS in values}
    config = run.experiment()
    if missing := sorted(set(range(1, steps_of(config) + 1)) - set(curve)):
        raise ValueError(f"{run.folder / METRICS_FILE} lacks step {missing[0]}: remove {run.folder} and run again")
    return {
        "format": FORMAT,
        "run": run.name,
        "model": run.model,
        "variant": run.variant,
        "seed": run.seed,
        "key": run.key,
        "config": relative(run.config),
        "overrides": [item for item in run.overrides if not item.startswith("trainer.save_folder=")],
        "steps": len(curve),
        "tokens": len(curve) * config.data_loader.global_batch_size,
        "parameters": config.model.num_params,
        "start": read_start(run.folder),
        "training_loss": [round(loss, 6) for loss in curve.values()],
        # The last step's or none: of a run's folder an older one would do, where the newest is damaged.
        **held_out.measure(run.folder / f"step{trained_steps(run.folder)}"),
        "machine": machine,
    }


def result_file(out: Path, run: Run) -> Path:
    """Where a run's result lies."""
    return out / "results" / f"{run.name}.json"


def _read_result(out: Path, run: Run) -> dict[str, Any] | None:
    """The result of a run, if it is finished and of this very config."""
    try:
        result = read_json(result_file(out, run), dict)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}: it is damaged, remove it") from None
    return result if result.get("format") == FORMAT and result.get("key") == run.key else None


def _write_result(out: Path, run: Run, result: dict[str, Any]) -> None:
    path = result_file(out, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    replace_file(path, f"{{\n{lines}\n}}\n".encode())


def _scores(run: Run, scale: Scale, table: str) -> None:
    """A run's lm-eval scores, where the scale has them and they are not there yet."""
    file, command = suite_file(run, scale, table), suite_command(run, scale, table, to_run=True)
    if file is None or command is None or file.is_file():
        return
    done = subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(f"{run.name}: {' '.join(command)} ended with exit code {done.returncode}")


def check_device(scale: Scale) -> None:
    """Raise where a scale cannot run on this machine."""
    if scale.needs_gpu and not torch.cuda.is_available():
        raise ValueError(
            f"--scale {scale.name}: needs a GPU and there is none here: add --dry-run to see what it would launch, "
            "or use --scale cpu"
        )

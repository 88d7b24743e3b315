"""What ``scripts/evaluate.py`` does."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import nearest
from ..settings import parse

if TYPE_CHECKING:
    from ..model.checkpoint import Checkpoint
    from .loss import HeldOut

_OPTIONS = ("offline", "follows_input", "max_length", "tokenizer", "device")
_TRUE_OR_FALSE = ("offline", "follows_input")
LOSS_FORMAT = "spattn_olmoe held-out loss 2"
NEEDLE_FORMAT = "spattn_olmoe needle 1"


def main(args: argparse.Namespace) -> None:
    """One of: a comparison of two results, held-out loss, or a suite.

    :raises ValueError: arguments that do not fit together, or cannot be honoured.
    """
    checkpoints = [word for word in args.checkpoint if not _is_option(word)]
    options = read_options([*(word for word in args.checkpoint if _is_option(word)), *args.options])
    _check(args, checkpoints, options)
    for name, level in (("lm_eval", logging.ERROR), ("datasets", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    if args.compare:
        _compare(args)
        return
    from .. import ranks

    with ranks.together():
        if args.loss:
            _loss(args, checkpoints, options)
        elif args.needle:
            _needle(args, checkpoints, options)
        else:
            _suite(args, checkpoints[0], options)


def _is_option(word: str) -> bool:
    return "=" in word and not os.path.exists(word)


def read_options(words: list[str]) -> dict[str, Any]:
    """``key=value`` words as typed values.

    :raises ValueError: a word of another form, an unknown key, or a value of the wrong type.
    """
    options: dict[str, Any] = {}
    for word in words:
        ((key, value),) = parse([word]).items()
        if key not in _OPTIONS:
            raise ValueError(f"{word}: not an option{nearest(key, _OPTIONS)} (known: {', '.join(_OPTIONS)})")
        if key in _TRUE_OR_FALSE and not isinstance(value, bool):
            raise ValueError(f"{word}: must be true or false")
        if key == "max_length" and (type(value) is not int or value < 1):
            raise ValueError(f"{word}: must be a whole number of at least 1")
        if key in ("tokenizer", "device") and not isinstance(value, str):
            raise ValueError(f"{word}: must be text")
        options[key] = value
    return options


def _check(args: argparse.Namespace, checkpoints: list[str], options: dict[str, Any]) -> None:
    if args.compare and (checkpoints or args.loss or args.needle or args.suite or args.tasks):
        raise ValueError("--compare takes two results files and nothing else but --out")
    if args.compare:
        return
    if not checkpoints:
        raise ValueError("name a checkpoint with --checkpoint DIR, or two results with --compare A.json B.json")
    if args.by and not args.loss:
        raise ValueError(f"--by {args.by}: only --loss groups tokens")
    if args.loss or args.needle:
        what = "--loss" if args.loss else "--needle"
        if args.suite or args.tasks or (args.loss and args.needle):
            raise ValueError(
                f"{what} takes no --suite, no --tasks and no other measure: evaluate those in a call of their own"
            )
        for key in ("offline", "tokenizer"):
            if key in options:
                raise ValueError(f"{key}={options[key]}: {what} reads prepared tokens and has no use for it")
        return
    if len(checkpoints) > 1:
        raise ValueError(
            f"--checkpoint names {len(checkpoints)}: only --loss and --needle take several; evaluate one and --compare"
        )
    if args.data:
        raise ValueError(f"--data {args.data}: only --loss and --needle read prepared data")
    if args.suite and args.tasks:
        raise ValueError("--suite and --tasks exclude each other: give one")
    if args.num_fewshot is not None and not args.tasks:
        raise ValueError("--num-fewshot goes with --tasks: a suite's columns have their own")


def _suite(args: argparse.Namespace, checkpoint: str, options: dict[str, Any]) -> None:
    from ..model.checkpoint import Checkpoint
    from .suites import find_suite, suite_of_tasks

    names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    suite = suite_of_tasks(names, args.num_fewshot) if args.tasks else find_suite(args.suite or "table1")
    opened = Checkpoint.open(checkpoint, follows_input=options.pop("follows_input", None))
    offline = options.pop("offline", True)
    if offline:  # before anything imports datasets, which decides once
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from . import report, scores
    from .results import writable_folder, write, writing_to

    folder = writable_folder(args.out or Path(opened.path) / "evaluation")
    with scores.task_manager(suite, offline) as manager:
        from .model import SPAttnLM

        lm = SPAttnLM(opened, batch_size=args.batch_size, **options)
        results = scores.evaluate(lm, suite, manager, from_wheel=offline, limit=args.limit)
    if results is None:
        return
    stem = folder / suite.name
    print(report.markdown(results))
    with writing_to(folder):
        write(results, stem.with_name(f"{stem.name}.json"))
        print(*[stem.with_name(f"{stem.name}.json"), *report.write_tables(results, stem)], sep="\n")


def _compare(args: argparse.Namespace) -> None:
    from .compare import compare
    from .report import comparison_markdown
    from .results import read, writable_folder, writing_to

    a, b = (read(path) for path in args.compare)
    text = comparison_markdown(a, b, compare(a, b))
    print(text)
    if args.out:
        path = writable_folder(args.out) / "comparison.md"
        with writing_to(path.parent):
            path.write_text(text)
        print(path)


def _loss(args: argparse.Namespace, folders: list[str], options: dict[str, Any]) -> None:
    from . import loss

    checkpoints, held_out, folder = _paired(args, folders, options)
    by = args.by or "context"
    numbers = loss.GROUPINGS[by][1](held_out.ids)
    runs: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        losses = loss.token_losses(checkpoint, held_out, batch_size=args.batch_size, device=options.get("device"))
        run = {**_described(checkpoint), "loss": loss.summarise(losses, numbers, by)}
        if runs:
            run["difference_from_first"] = loss.differences(runs[0]["loss"], run["loss"], by)
        runs.append(run)
    results = {"format": LOSS_FORMAT, "by": by, **_text_described(held_out, options), "checkpoints": runs}
    _write(results, loss.markdown, folder, "loss" if by == "context" else f"loss_by_{by}")


def _needle(args: argparse.Namespace, folders: list[str], options: dict[str, Any]) -> None:
    from . import needle

    checkpoints, held_out, folder = _paired(args, folders, options)
    first = checkpoints[0].layers[0]
    made = needle.needles(checkpoints[0].tokenizer(), len(held_out.ids))
    where = needle.places(first["n_heads"], first["band_length"], made, held_out.ids.shape[1])
    distances = [distance for *_, distance in where]
    runs: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        found = needle.gains(
            checkpoint, held_out, made, distances, batch_size=args.batch_size, device=options.get("device")
        )
        runs.append({**_described(checkpoint), "needle": needle.summarise(found, where)})
    results = {"format": NEEDLE_FORMAT, "n_heads": first["n_heads"], "band_length": first["band_length"]}
    results |= {**_text_described(held_out, options), "checkpoints": runs}
    _write(results, needle.markdown, folder, "needle")


def _paired(
    args: argparse.Namespace, folders: list[str], options: dict[str, Any]
) -> tuple[list[Checkpoint], HeldOut, Path]:
    """The checkpoints, the held-out text that all of them read, and the folder of the results."""
    import numpy as np

    from ..model.checkpoint import Checkpoint
    from .loss import HeldOut, check_documents
    from .results import writable_folder

    checkpoints = [Checkpoint.open(folder, follows_input=options.get("follows_input")) for folder in folders]
    folder = writable_folder(args.out or Path(checkpoints[0].path) / "evaluation")
    text = args.data, args.limit, options.get("max_length")
    held_out = HeldOut.read(checkpoints[0], *text)
    for checkpoint in checkpoints:
        check_documents(checkpoint)
    for checkpoint in checkpoints[1:]:
        other = HeldOut.read(checkpoint, *text)
        if not np.array_equal(other.ids, held_out.ids):
            raise ValueError(
                f"{checkpoint.path} has other held-out sequences than {checkpoints[0].path}: losses over different text, "
                "tokens or lengths cannot be paired; give one set with --data DIR, and one length with max_length=N"
            )
    return checkpoints, held_out, folder


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    from ..patterns import attention_name

    layers, follows_input = list(checkpoint.layers), checkpoint.layers[0]["follows_input"]
    name = attention_name(layers, follows_input)
    return {
        "attention": layers,
        "follows_input": follows_input,
        "checkpoint": checkpoint.path,
        "attention_name": name,
    }


def _text_described(held_out: HeldOut, options: dict[str, Any]) -> dict[str, Any]:
    from ..machine import default_device, describe

    return {
        "data": held_out.directory,
        "sequences": len(held_out.ids),
        "length": held_out.ids.shape[1],
        "machine": describe(options.get("device") or default_device()),
    }


def _write(results: dict[str, Any], markdown: Callable[[dict[str, Any]], str], folder: Path, stem: str) -> None:
    """Print results and write them as ``stem.json`` and ``stem.md``, on rank 0."""
    from olmo_core.distributed.utils import get_rank

    from .results import write, writing_to

    if get_rank() != 0:
        return
    text = markdown(results)
    print(text)
    with writing_to(folder):
        write(results, folder / f"{stem}.json")
        (folder / f"{stem}.md").write_text(text)
    print(folder / f"{stem}.json", folder / f"{stem}.md", sep="\n")

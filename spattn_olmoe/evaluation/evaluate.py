"""What ``scripts/evaluate.py`` does."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from ..errors import nearest
from ..settings import parse

_OPTIONS = ("offline", "follows_input", "max_length", "tokenizer", "device")
_TRUE_OR_FALSE = ("offline", "follows_input")
LOSS_FORMAT = "spattn_olmoe held-out loss 2"


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
    if args.compare and (checkpoints or args.loss or args.suite or args.tasks):
        raise ValueError("--compare takes two results files and nothing else but --out")
    if args.compare:
        return
    if not checkpoints:
        raise ValueError("name a checkpoint with --checkpoint DIR, or two results with --compare A.json B.json")
    if args.loss:
        if args.suite or args.tasks:
            raise ValueError("--loss takes no --suite and no --tasks: evaluate those in a call of their own")
        for key in ("offline", "max_length", "tokenizer"):
            if key in options:
                raise ValueError(f"{key}={options[key]}: --loss reads prepared tokens and has no use for it")
        return
    if len(checkpoints) > 1:
        raise ValueError(
            f"--checkpoint names {len(checkpoints)}: only --loss takes several; evaluate one and --compare"
        )
    if args.data:
        raise ValueError(f"--data {args.data}: only --loss reads prepared data")
    if args.by:
        raise ValueError(f"--by {args.by}: only --loss groups tokens")
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

    folder = scores.writable_folder(args.out or Path(opened.path) / "evaluation")
    with scores.task_manager(suite, offline) as manager:
        from .model import SPAttnLM

        lm = SPAttnLM(opened, batch_size=args.batch_size, **options)
        results = scores.evaluate(lm, suite, manager, from_wheel=offline, limit=args.limit)
    if results is None:
        return
    stem = folder / suite.name
    print(report.markdown(results))
    with scores.writing_to(folder):
        scores.write(results, stem.with_name(f"{stem.name}.json"))
        print(*[stem.with_name(f"{stem.name}.json"), *report.write_tables(results, stem)], sep="\n")


def _compare(args: argparse.Namespace) -> None:
    from .compare import compare
    from .report import comparison_markdown
    from .scores import read, writable_folder, writing_to

    a, b = (read(path) for path in args.compare)
    text = comparison_markdown(a, b, compare(a, b))
    print(text)
    if args.out:
        path = writable_folder(args.out) / "comparison.md"
        with writing_to(path.parent):
            path.write_text(text)
        print(path)


def _loss(args: argparse.Namespace, folders: list[str], options: dict[str, Any]) -> None:
    import numpy as np
    from olmo_core.distributed.utils import get_rank

    from ..machine import default_device, describe
    from ..model.checkpoint import Checkpoint
    from ..patterns import attention_name
    from . import loss
    from .scores import writable_folder, write, writing_to

    checkpoints = [Checkpoint.open(folder, follows_input=options.get("follows_input")) for folder in folders]
    folder = writable_folder(args.out or Path(checkpoints[0].path) / "evaluation")
    held_out = loss.HeldOut.read(checkpoints[0], args.data, args.limit)
    for checkpoint in checkpoints[1:]:
        other = loss.HeldOut.read(checkpoint, args.data, args.limit)
        if not np.array_equal(other.ids, held_out.ids):
            raise ValueError(
                f"{checkpoint.path} has other held-out sequences than {checkpoints[0].path}: losses over different text, "
                "tokens or lengths cannot be paired; give one set with --data DIR"
            )
    by = args.by or "context"
    numbers = loss.GROUPINGS[by][1](held_out.ids)
    runs: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        losses = loss.token_losses(checkpoint, held_out, batch_size=args.batch_size, device=options.get("device"))
        rows = loss.summarise(losses, numbers, by)
        run = {"attention": list(checkpoint.layers), "follows_input": checkpoint.layers[0]["follows_input"]}
        run |= {
            "checkpoint": checkpoint.path,
            "attention_name": attention_name(run["attention"], run["follows_input"]),
            "loss": rows,
        }
        if runs:
            run["difference_from_first"] = loss.differences(runs[0]["loss"], rows, by)
        runs.append(run)
    if get_rank() != 0:
        return
    results = {
        "format": LOSS_FORMAT,
        "by": by,
        "data": held_out.directory,
        "sequences": len(held_out.ids),
        "length": held_out.ids.shape[1],
        "machine": describe(options.get("device") or default_device()),
        "checkpoints": runs,
    }
    text = loss.markdown(results)
    print(text)
    with writing_to(folder):
        stem = "loss" if by == "context" else f"loss_by_{by}"
        write(results, folder / f"{stem}.json")
        (folder / f"{stem}.md").write_text(text)
    print(folder / f"{stem}.json", folder / f"{stem}.md", sep="\n")

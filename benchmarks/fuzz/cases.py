"""Inputs by number: the same number is the same command on the same files, wherever it runs."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tiny import BASE, ROOT

from .guard import CANARY
from .material import PUBLISHED, Material, hidden, results, sources
from .mutations import DATA_KEYS, KEYS, VALUES, mutated_bytes, mutated_json

Case = tuple[list[str], Path]
Maker = Callable[[random.Random, Material, Path], list[str]]


def make(number: int, material: Material, folder: Path) -> list[str]:
    """The command of one input; its files are written into ``folder``."""
    generator = random.Random(number)
    folder.mkdir(parents=True)
    sources(folder)
    return MAKERS[number % len(MAKERS)](generator, material, folder)


def _word(g: random.Random, keys: list[str]) -> str:
    return f"{g.choice(keys)}={g.choice(VALUES)}".replace("\0", "")


def _train_words(g: random.Random, m: Material, folder: Path) -> list[str]:
    words = [_word(g, KEYS) for _ in range(g.randrange(1, 3))]
    return ["train.py", "--config", str(m.yaml), g.choice(["--dry-run", "--show"]), *words]


def _train_yaml(g: random.Random, m: Material, folder: Path) -> list[str]:
    (folder / "a.yaml").write_bytes(mutated_bytes(g, m.yaml.read_bytes()))
    return ["train.py", "--config", "a.yaml", "--dry-run"]


def _plan(g: random.Random, m: Material, folder: Path) -> list[str]:
    gpus = g.choice(["0", "-1", "1", "3", "10000000000000", "x", "2.5", "9" * 4000])
    return ["plan.py", "--config", str(m.yaml), "--gpus", gpus, "--gpu", g.choice(["h100", "", "x"]), _word(g, KEYS)]


def _prepare(g: random.Random, m: Material, folder: Path) -> list[str]:
    name = g.choice(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
    if g.random() < 0.7:
        (folder / name).write_bytes(mutated_bytes(g, (folder / name).read_bytes()))
    text = (
        f'output: out\nworkers: 1\nsources: [{{paths: [{name}], separator: "\\n\\n"}}]\n'
        f"tokenizer: {{identifier: '{m.data}/tokenizer.json'}}\n"
    )
    (folder / "d.yaml").write_bytes(mutated_bytes(g, text.encode()) if g.random() < 0.3 else text.encode())
    words = [f"{g.choice(DATA_KEYS)}={g.choice(VALUES)}"] if g.random() < 0.6 else []
    return ["prepare_data.py", "--config", "d.yaml", "max_reject_share=0", *words]


def _inspect(g: random.Random, m: Material, folder: Path) -> list[str]:
    shutil.copytree(m.data, folder / "shards")
    name = g.choice(["manifest.json", "manifest.json", "manifest.json", "tokenizer.json"])
    content = json.loads((folder / "shards" / name).read_text())
    (folder / "shards" / name).write_text(mutated_json(g, content))
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
        path.write_text(mutated_json(g, json.loads(path.read_text())))
        return "run"
    if name == "data":
        path = g.choice(sorted((copied / "model_and_optim").glob("*.distcp")))
        path.write_bytes(mutated_bytes(g, path.read_bytes()))
    elif name == "index":
        path = copied / "model_and_optim/.metadata"
        path.write_bytes(g.choice([mutated_bytes(g, path.read_bytes()), pickle.dumps(_Canary())]))
    else:
        path = copied / name
        path.write_text(mutated_json(g, json.loads(path.read_text())))
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
    (folder / "b.json").write_text(mutated_json(g, results()))
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
    lines[at] = mutated_json(g, json.loads(lines[at]))
    (folder / name / "metrics.jsonl").write_text("\n".join(lines))
    return ["plot_loss.py", name, "--out", g.choice(["l.png", "l.svg", "", "/dev/full", "x"])]


def _train(g: random.Random, m: Material, folder: Path) -> list[str]:
    """Training itself, two steps of it: what is accepted must end in a model."""
    key = g.choice(
        [key for key in KEYS if key.partition(".")[0] in ("model", "train_module", "trainer", "attention", "dataset")]
    )
    words = [f"{key}={g.choice(VALUES)}".replace("\0", ""), "data_loader.num_workers=0"]
    return ["train.py", "--config", str(m.yaml), "trainer.save_folder=run", "trainer.max_duration.value=2", *words]


def _check_env(g: random.Random, m: Material, folder: Path) -> list[str]:
    words = [_word(g, KEYS) for _ in range(g.randrange(1, 3))]
    more = g.choice([[], ["--min-bandwidth", g.choice(["nan", "-1", "x", "1e400", "0"])], ["--failed-nodes", "a/b"]])
    return ["check_env.py", "--config", str(m.yaml), *more, *words]


def _launch(g: random.Random, m: Material, folder: Path) -> list[str]:
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "configs").symlink_to(ROOT / "configs")
    name = g.choice(["slurm", "kubernetes"])
    text = (ROOT / f"configs/cluster/example_{name}.yaml").read_bytes()
    lines = text.decode().splitlines()
    at = g.randrange(len(lines))
    lines[at] = f"{lines[at].partition(':')[0]}: {g.choice(VALUES)}"
    (folder / "c.yaml").write_bytes(g.choice([mutated_bytes(g, text), "\n".join(lines).encode(errors="replace")]))
    more = g.choice(
        [[], ["--types", g.choice(["eball,standard", "", "evilmod.x", ",,", "\x1b[31m"])], [_word(g, KEYS)]]
    )
    return ["launch.py", "--cluster", "c.yaml", "--config", str(m.yaml), "--print", *more]


def _reproduce(g: random.Random, m: Material, folder: Path) -> list[str]:
    target = g.choice(
        ["table1", "table2", "table3", "appendix_a", "recall", "copying", "figure1", "throughput", "x", ""]
    )
    words = ["--out", g.choice(["out", "", "/dev/full", "a.jsonl"]), *g.choice([[], ["--dry-run"]])]
    words += g.choice(
        [["--seeds", g.choice(["0", "-1", "x", "9" * 30, "2"])], ["--jobs", "-1"], ["--variants", g.choice(VALUES)]]
    )
    if target != "figure1":
        (folder / "a.yaml").write_bytes(mutated_bytes(g, m.yaml.read_bytes()))
        words += ["--dry-run", *g.choice([["--config", "a.yaml"], ["--config", str(m.yaml)], []])]
        words += g.choice(
            [[_word(g, KEYS)], [_word(g, ["steps", "length", "lr", "batch", "vocabulary", "d_model", "x"])]]
        )
    return ["reproduce.py", target, *words]


def _page(g: random.Random, m: Material, folder: Path) -> list[str]:
    """Two runs on a page, one of which has a file changed."""
    for name in ("a", "b"):
        (folder / name / "step12").mkdir(parents=True)
        for file in ("metrics.jsonl", "attention.json"):
            shutil.copyfile(m.checkpoint.parent / file, folder / name / file)
        shutil.copyfile(m.checkpoint / "config.json", folder / name / "step12/config.json")
    loss = {"checkpoint": "b/step12", "loss": [{"context": [1, 32], "loss": 2.0, "stderr": 0.1}]}
    (folder / "b/step12/evaluation").mkdir()
    (folder / "b/step12/evaluation/loss.json").write_text(json.dumps({"checkpoints": [loss]}))
    recall = {"types": {"eball": {"seeds": {"0": {"curve": [{"bands": [{"accuracy": 0.5}, {"accuracy": None}]}]}}}}}
    (folder / "recall.json").write_text(json.dumps(recall))
    path = folder / g.choice(
        ["b/metrics.jsonl", "b/attention.json", "b/step12/config.json", "b/step12/evaluation/loss.json", "recall.json"]
    )
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        at = g.randrange(len(lines))
        lines[at] = mutated_json(g, json.loads(lines[at]))
        path.write_text("\n".join(lines))
    else:
        path.write_text(mutated_json(g, json.loads(path.read_text())))
    more = ["--recall", "recall.json"] if path.stem == "recall" else []
    return ["compare.py", "a", "b", "--out", g.choice(["p.html", "p.html", "", "/dev/full", "a"]), *more]


def _export(g: random.Random, m: Material, folder: Path) -> list[str]:
    where = _checkpoint(g, m, folder) if g.random() < 0.8 else str(m.checkpoint)
    more = g.choice([[], ["--verify"], ["--dtype", g.choice(["bfloat16", "float16", "x", ""])]])
    return [
        "export_hf.py",
        "--checkpoint",
        where,
        "--to",
        g.choice(["out", "out", "", "a.jsonl", "path", "/dev/full/x"]),
        *more,
    ]


def _import(g: random.Random, m: Material, folder: Path) -> list[str]:
    shutil.copytree(m.published, folder / "hf")
    name = g.choice(["config.json", "config.json", "tokenizer.json", "model.safetensors.index.json", "weights"])
    path = g.choice(sorted((folder / "hf").glob("*.safetensors"))) if name == "weights" else folder / "hf" / name
    data = path.read_bytes()
    if name == "weights":
        path.write_bytes(mutated_bytes(g, data))
    elif name.endswith("index.json") and g.random() < 0.5:
        content = json.loads(data)
        place = g.choice(["../a.jsonl", "/dev/zero", "config.json", "path", "", "x\0"])
        content["weight_map"][g.choice(sorted(content["weight_map"]))] = place
        path.write_text(json.dumps(content))
    else:
        path.write_text(mutated_json(g, json.loads(data)), errors="replace")
    words = [] if g.random() < 0.8 else [_word(g, KEYS)]
    return ["import_hf.py", "--from", "hf", "--to", "out", "--config", str(BASE), *PUBLISHED, *words]


def _suite(g: random.Random, m: Material, folder: Path) -> list[str]:
    where = _checkpoint(g, m, folder) if g.random() < 0.5 else str(m.checkpoint)
    tasks = g.choice(["copa", "copa", "sciq", "", ",", "x", "../x", "mmlu", "\x1b[31m"])
    number = g.choice(
        [["--num-fewshot", g.choice(["-1", "x", "99999", "1"])], [f"max_length={g.choice(VALUES[:14])}"], []]
    )
    option = g.choice(
        [[], [f"device={g.choice(VALUES)}"], [f"tokenizer={g.choice(VALUES)}"], [f"follows_input={g.choice(VALUES)}"]]
    )
    words = [*number, *option, "--limit", "1", "--out", g.choice(["out", "", "a.jsonl"])]
    return [
        "evaluate.py",
        "--checkpoint",
        where,
        *g.choice([["--tasks", tasks], ["--suite", tasks]]),
        *(w.replace("\0", "") for w in words),
    ]


def _others(g: random.Random, m: Material, folder: Path) -> list[str]:
    """Scripts whose arguments are all their input."""
    benchmark = ["attention", "soak", "memory", "gpu", "training", "evaluation", "parallel", "tune", "x", ""]
    return g.choice(
        [
            [
                "benchmark.py",
                g.choice(benchmark),
                f"--{g.choice(['steps', 'seconds', 'x', 'limit'])}",
                g.choice(["x", "", "\x1b[31m"]),
            ],
            ["quickstart_corpus.py", g.choice(["a.jsonl", "/dev/full", "/dev/full/x"])],
        ]
    )


def _data(g: random.Random, m: Material, folder: Path) -> list[str]:
    """What archives, tables and names may hide."""
    name = g.choice(
        [
            "bomb.jsonl.zst",
            "bomb.jsonl.gz",
            "pipe.jsonl",
            "t.parquet",
            "link.jsonl",
            "deep.jsonl",
            "wide.jsonl",
            "no.json",
        ]
    )
    hidden(folder / name)
    tokenizer = f"{{identifier: '{m.data}/tokenizer.json'}}"
    (folder / "d.yaml").write_text(f"output: out\nworkers: 1\nsources: [{{paths: [{name}]}}]\ntokenizer: {tokenizer}\n")
    return ["prepare_data.py", "--config", "d.yaml", f"max_reject_share={g.choice(['0', '1'])}"]


MAKERS: tuple[Maker, ...] = (
    _train_words, _train_yaml, _plan, _prepare, _inspect, _generate, _train, _heads, _compare, _draw, _plot, _evaluate,
    _train_words, _check_env, _launch, _reproduce, _page, _export, _import, _suite, _others, _data, _inspect, _prepare,
)  # fmt: skip

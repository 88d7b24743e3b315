"""The one command for a GPU: its parts end, are stopped, fail and go on; and loss curves are compared."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, loss_curves  # noqa: E402
from benchmarks.gpu import Part  # noqa: E402
from spattn_olmoe import machine  # noqa: E402


@pytest.fixture
def code(monkeypatch):
    """What :func:`machine.describe` finds of the code, whatever state this checkout is in; a test may change it."""
    code = {"commit": "a" * 40, "changed": False}
    here = machine.describe("cpu")
    monkeypatch.setattr(machine, "describe", lambda device: here | code)
    return code


def python(code):
    return ("-c", code)


def test_parts_end_are_stopped_fail_and_are_taken_up_again(tmp_path, code, capsys):
    flag = tmp_path / "flag"
    parts = {
        "good": Part("prints", 60, (python("print('one')"), python("print('two')"))),
        "bad": Part("fails once", 60, (python(f"import os; os.path.exists({str(flag)!r}) or exit(3)"),)),
        "slow": Part("takes long", 1, (python("import time; time.sleep(60)"),)),
    }
    assert gpu.session(parts, tmp_path) == 1
    ended = json.loads((tmp_path / "session.json").read_text())
    assert ended["good"]["ended"] == "well" and ended["good"]["machine"]["commit"]
    assert ended["bad"]["ended"].startswith("with exit status 3 of python -c")
    assert ended["slow"]["ended"] == "by its limit of 1 s"
    log = (tmp_path / "good.log").read_text()
    assert log.index("one") < log.index("$ python -c print('two')") < log.rindex("two")
    flag.touch()
    (tmp_path / "good.log").unlink()
    del parts["slow"]
    assert gpu.session(parts, tmp_path) == 0
    assert not (tmp_path / "good.log").exists()  # not run again
    assert "good: done on" in capsys.readouterr().out
    assert gpu.session(parts, tmp_path, again=True) == 0 and (tmp_path / "good.log").exists()
    assert gpu.session({"other": parts["good"]}, tmp_path, minutes=0) == 1
    assert "not begun" in capsys.readouterr().out


def runs(tmp_path):
    """How often a part is run by two sessions more."""
    count = tmp_path / "count"
    parts = {"good": Part("counts", 60, (python(f"open({str(count)!r}, 'a').write('1')"),))}
    before = len(count.read_text()) if count.exists() else 0
    assert gpu.session(parts, tmp_path) == gpu.session(parts, tmp_path) == 0
    return len(count.read_text()) - before


def test_a_part_is_done_only_at_a_commit_that_is_known_and_without_changes(tmp_path, code):
    assert runs(tmp_path) == 1
    assert runs(tmp_path) == 0
    code["commit"] = "b" * 40
    assert runs(tmp_path) == 1
    code["changed"] = True
    assert runs(tmp_path) == 2
    code["changed"] = False
    assert runs(tmp_path) == 1  # what ran with changes counts for nothing
    code |= {"commit": None, "changed": None}  # a copy without its repository
    assert runs(tmp_path) == 2
    code["commit"] = "c" * 40  # such a copy, whose commit the environment names
    assert runs(tmp_path) == 1


def test_commands_that_do_not_need_one_another_are_all_run_and_not_run_again(tmp_path, code):
    flag = tmp_path / "flag"
    commands = (
        python(f"import os; print('first'); os.path.exists({str(flag)!r}) or exit(3)"),
        python("print('second')"),
    )
    parts = {"apart": Part("fails once", 60, commands, apart=True)}
    assert gpu.session(parts, tmp_path) == 1
    ended = json.loads((tmp_path / "session.json").read_text())["apart"]
    assert ended["ended"].startswith("with exit status 3") and ended["done"] == [list(commands[1])]
    flag.touch()
    assert gpu.session(parts, tmp_path) == 0
    log = (tmp_path / "apart.log").read_text()
    assert log.count("\nsecond\n") == 1 and log.count("\nfirst\n") == 2
    code["commit"] = "b" * 40
    assert gpu.session(parts, tmp_path) == 0
    assert (tmp_path / "apart.log").read_text().count("\nsecond\n") == 1


def test_a_session_that_is_killed_leaves_what_has_ended(tmp_path, code, monkeypatch):
    def killed(command, *args, **options):
        if "print('second')" in command:
            raise KeyboardInterrupt
        return run(command, *args, **options)

    run = gpu.limited.run
    monkeypatch.setattr(gpu.limited, "run", killed)
    parts = {"apart": Part("is killed", 60, (python("print('first')"), python("print('second')")), apart=True)}
    with pytest.raises(KeyboardInterrupt):
        gpu.session(parts, tmp_path)
    ended = json.loads((tmp_path / "session.json").read_text())["apart"]
    assert ended["ended"] == "before its last command" and ended["done"] == [["-c", "print('first')"]]


def test_what_comes_first_fits_into_one_call_and_nothing_else_eats_it_whole():
    names = list(gpu.PARTS)
    assert names[:3] == ["gate", "attention-quick", "training-quick"]
    assert gpu.PARTS["gate"].seconds + gpu.PARTS["attention-quick"].seconds <= 9 * 60
    for part in gpu.PARTS.values():
        assert part.apart or part.seconds < 9 * 60 or all("--missing" in command for command in part.commands)


def test_results_go_to_the_folder_that_is_asked_for(tmp_path, code, capsys):
    show = "import sys; print(sys.argv[1:])"
    assert gpu.session({"shows": Part("shows", 60, (("-c", show, "--out", gpu.OUT),))}, tmp_path / "new") == 0
    assert f"results go to {tmp_path / 'new'}\n" in capsys.readouterr().out
    assert f"['--out', '{tmp_path / 'new'}']" in (tmp_path / "new/shows.log").read_text()


def test_every_command_of_every_part_is_one_that_there_is():
    for part in gpu.PARTS.values():
        for command in part.commands:
            if command[0] == "-m":
                done = subprocess.run([sys.executable, "-c", f"import importlib.util as u; assert u.find_spec({command[1]!r})"], cwd=ROOT)  # fmt: skip  # noqa: E501
                assert done.returncode == 0, command
            else:
                assert (ROOT / command[0]).is_file(), command
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="name")
    for name in ("attention", "training", "tune"):
        module = __import__(f"benchmarks.{name}", fromlist=[name])
        module.add_arguments(commands.add_parser(name))
    ours = [c[1:] for part in gpu.PARTS.values() for c in part.commands if c[0] == "scripts/benchmark.py"]
    assert len(ours) == 10
    for line in ours:
        parser.parse_args(line)  # exits where it does not understand


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    with pytest.raises(ValueError, match="there is no GPU here"):
        gpu.run(parser.parse_args([]))
    assert gpu.run(parser.parse_args(["--dry-run", "--parts", "tune", "tests"])) == 0
    said = capsys.readouterr().out
    assert said.index("python -m pytest tests/gpu") < said.index("benchmark.py tune")


def write_run(folder, losses):
    folder.mkdir()
    lines = [json.dumps({"step": n + 1, "train/CE loss": loss}) for n, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_loss_curves_are_compared_with_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "results_folder", lambda device: tmp_path / "results")
    first = write_run(tmp_path / "reference", [4.0] * 20 + [2.0] * 20)
    other = write_run(tmp_path / "triton", [4.0] * 20 + [2.1] * 19 + [2.5])
    assert loss_curves.main([str(first), str(other)]) == 0
    (row,) = json.loads((tmp_path / "results/loss_curves.json").read_text())["rows"]
    assert row["steps"] == 40 and row["largest_distance"] == pytest.approx(0.5)
    assert row["mean_distance"] == pytest.approx((19 * 0.1 + 0.5) / 40)
    assert (row["end"], row["end_of_reference"]) == (pytest.approx(2.12), pytest.approx(2.0))
    assert (tmp_path / "results/loss_curves.png").stat().st_size > 1000
    assert loss_curves.main([str(first), str(other), "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere/loss_curves.json").exists()
    assert "triton: loss 2.1200 at the end, reference 2.0000" in capsys.readouterr().out
    short = write_run(tmp_path / "short", [4.0])
    for wrong, said in ((short, "has other steps than"), (tmp_path, "is not the folder of a run")):
        with pytest.raises(SystemExit) as stopped:
            loss_curves.main([str(first), str(wrong)])
        assert stopped.value.code == 2 and said in capsys.readouterr().err

"""Mask pictures: every pixel is the share of allowed pairs, and the command that draws them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from spattn_olmoe import build_pattern
from spattn_olmoe.model.fingerprint import _SHAPE, Fingerprint
from spattn_olmoe.model.section import layer_patterns
from spattn_olmoe.paper import masks
from spattn_olmoe.paper.masks import allowed_share
from spattn_olmoe.patterns import VARIANTS, Pattern
from spattn_olmoe.train import load_experiment

ROOT = Path(__file__).resolve().parents[2]


def shares_of(dense: np.ndarray, pixels: int) -> np.ndarray:
    """The mean of the mask in every pixel, pixel by pixel."""
    T = len(dense)
    P = min(pixels, T)
    edges = [n * T // P for n in range(P + 1)]
    rows = [[dense[a:b, c:d].mean() for c, d in zip(edges, edges[1:])] for a, b in zip(edges, edges[1:])]  # noqa: B905, RUF007
    return np.array(rows)


@pytest.mark.parametrize(("T", "pixels"), [(60, 60), (60, 13), (60, 1), (7, 30), (95, 32)])
@pytest.mark.parametrize("mask", [mask for mask in VARIANTS if mask != "reformer_lsh"])
def test_a_pixel_is_the_share_of_allowed_pairs(mask, T, pixels):
    pattern = VARIANTS[mask].build(4, 60)
    dense = pattern.dense_mask(T).numpy()
    for head in (0, 2, 3):
        shares = masks.allowed_share(pattern, head, T, pixels)
        np.testing.assert_allclose(shares, shares_of(dense[head], pixels), rtol=0, atol=1e-14)
    np.testing.assert_allclose(masks.causal_share(T, pixels), shares_of(np.tri(T), pixels), rtol=0, atol=1e-14)


def test_rows_are_counted_a_few_at_a_time(monkeypatch):
    pattern = build_pattern("bigbird", n_heads=2, band_length=90)
    whole = masks.allowed_share(pattern, 1, 90, 4)
    monkeypatch.setattr(masks, "_MASK_CELLS", 270)
    assert np.array_equal(masks.allowed_share(pattern, 1, 90, 4), whole)


def test_a_long_mask_is_drawn_without_building_it(monkeypatch):
    monkeypatch.setattr(Pattern, "mask_mod", property(lambda self: pytest.fail("pairs were looked at")))
    N = 131072
    pattern = build_pattern("spattention", n_heads=16, band_length=N, local_sharing=True)
    share = sum(masks.allowed_share(pattern, h, N, 1).item() for h in range(16))
    assert share * N * N == pytest.approx(pattern.attended_pairs(), rel=1e-12)


def test_band_length_input_is_drawn_at_the_inputs_length():
    follows = build_pattern("eball", n_heads=4, band_length=64, follows_input=True)
    as_built = build_pattern("eball", n_heads=4, band_length=20)
    assert np.array_equal(masks.allowed_share(follows, 2, 20), masks.allowed_share(as_built, 2, 20))


def test_distances_in_words():
    shared = build_pattern("spattention", n_heads=8, band_length=1024, local_sharing=True)
    assert masks.distances(shared, 0, 1024) == "d = 0-128"
    assert masks.distances(shared, 1, 1024) == "d = 0-255"
    assert masks.distances(shared, 3, 1024) == "d = 0-128, 384-511"
    assert masks.distances(shared, 3, 385) == "d = 0-128, 384"
    bands = build_pattern("eball", n_heads=8, band_length=1024)
    assert masks.distances(bands, 7, 200) == "no key"
    assert masks.distances(build_pattern("standard", n_heads=8, band_length=1024), 0, 50) == "d = 0-49"
    assert masks.distances(build_pattern("longformer", n_heads=1, band_length=4), 0, 4) == "100 % of causal pairs"


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_figure_1_is_the_papers():
    expected = [f"Head {h}\nd = {128 * h}-{128 * h + 127}" for h in range(8)]
    assert titles(masks.figure_1()) == expected


def test_figure_2_is_the_papers():
    assert titles(masks.figure_2()) == [
        "(a) Sliding window, head 3\nd = 0-128",
        "(b) EBALL, head 3\nd = 384-511",
        "(c) GBHALF, head 3\nd = 384-447",
    ]


@pytest.mark.parametrize("n_heads", [1, 3, 8, 11, 16])
def test_all_heads_are_drawn_side_by_side(n_heads):
    figure = masks.draw(build_pattern("gbhalf", n_heads=n_heads, band_length=64))
    assert [title.splitlines()[0] for title in titles(figure)] == [f"Head {h}" for h in range(n_heads)]
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(0 < box.x0 < box.x1 < 1 and 0 < box.y0 < box.y1 < 1 for box in boxes)
    assert all(a.x1 < b.x0 or b.y1 < a.y0 for a, b in zip(boxes, boxes[1:], strict=False))  # noqa: RUF007


def test_what_is_drawn_is_the_mask():
    """Colours at the corners and in the band of head 1 of EBALL at 1024 tokens."""
    figure = masks.draw(build_pattern("eball", n_heads=2, band_length=1024))
    image = figure.axes[1].images[0].get_array()
    side = masks.PIXELS
    assert image.shape == (side, side, 3)
    np.testing.assert_allclose(image[-1, 0], masks._ALLOWED)
    np.testing.assert_allclose(image[0, -1], masks._FUTURE)
    np.testing.assert_allclose(image[side // 4, 0], masks._NOT_ALLOWED)


def test_the_overview_has_a_row_for_every_named_mask():
    assert len(masks.overview(n_heads=4, band_length=32, heads=(0, 3)).axes) == len(VARIANTS) * 2


# ---- the command -------------------------------------------------------------------------------------------------


def draw(*args, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "draw_masks.py"), *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_command_draws_a_type_with_its_options(tmp_path):
    shape = ("--heads", "4", "--band-length", "64", "--length", "50")
    done = draw("--type", "spattention", *shape, "local_sharing=true", "--out", "new/masks.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "new/masks.png\n"
    expected = masks.draw(build_pattern("spattention", n_heads=4, band_length=64, local_sharing=True), 50)
    masks.save(expected, tmp_path / "expected.png")
    assert np.array_equal(imread(tmp_path / "new/masks.png"), imread(tmp_path / "expected.png"))


@pytest.mark.parametrize("words", ["--type sharing", "--type spattention local_sharing=true"])
def test_a_mask_is_drawn_by_its_name_or_by_type_and_options(words, script, tmp_path):
    script.main([*words.split(), "--heads", "2", "--band-length", "16", "--out", str(tmp_path / "x.png")])
    masks.save(masks.draw(VARIANTS["sharing"].build(2, 16)), tmp_path / "expected.png")
    assert np.array_equal(imread(tmp_path / "x.png"), imread(tmp_path / "expected.png"))


@pytest.fixture(scope="module")
def script():
    """The command's ``main``, in this process: a new one takes seconds to import PyTorch."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("draw_masks", ROOT / "scripts" / "draw_masks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--type spatention", "did you mean 'spattention'"),
        ("--type sharng", "did you mean 'sharing'"),
        ("--type sharing local_sharing=false", "attention.local_sharing=False is not 'sharing'"),
        ("--type eball local_sharing=true", "attention.local_sharing is not an option of type 'eball'"),
        ("--type eball --heads 9 --band-length 8", "n_heads=9 is more than the band length band_length=8"),
        ("--type eball --heads 0", "--heads: '0' must be a whole number from 1 to 512"),
        ("--type eball --heads two", "--heads: 'two' must be a whole number"),
        ("--type eball --length 0", "--length: '0' must be a whole number from 1"),
        ("--type eball band", "'band' is no key=value"),
        ("--type spattention local_sharing=2", "attention.local_sharing=2: must be true or false"),
        ("--figure 3", "--figure: invalid choice"),
        ("--figure 1 --heads 4", "--heads goes with --type"),
        ("--overview local_sharing=true", "local_sharing=true goes with --type"),
        ("--overview --figure 1", "not allowed with"),
        ("--type eball band=[a", "is no YAML"),
        ("--checkpoint nowhere", "--checkpoint nowhere: neither a complete checkpoint nor a folder"),
        ("--checkpoint nowhere local_sharing=true", "local_sharing=true goes with --type"),
        ("--config configs/quickstart.yaml attention.local_shring=true", "did you mean 'local_sharing'"),
        ("--config nowhere.yaml", "does not exist"),
        ("", "one of the arguments --config --checkpoint --type --figure --overview is required"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(args, message, script, tmp_path, capsys):
    out = tmp_path / "x.png"
    try:
        code = script.main([*args.split(), "--out", str(out)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert not said.out
    assert not out.exists()


RUNS = {
    "options": (["attention.type=bigbird", "attention.random_links=seeded"], 1),
    "another shape": (["dataset.sequence_length=64", "model.block.sequence_mixer.n_heads=4"], 1),
    "layers that differ": (["attention.type=eball", "attention.layers=[1]"], 2),
}


@pytest.mark.parametrize(("words", "kinds"), RUNS.values(), ids=RUNS)
def test_a_config_is_drawn_as_it_would_be_trained(words, kinds, script, monkeypatch, tmp_path):
    config = load_experiment(ROOT / "configs/quickstart.yaml", words)
    wanted = list(layer_patterns(config.model_with_attention()))
    drawn = []
    monkeypatch.setattr(
        masks, "allowed_share", lambda *args, **more: drawn.append(args) or allowed_share(*args, **more)
    )
    script.main(["--config", str(ROOT / "configs/quickstart.yaml"), *words, "--out", str(tmp_path / "x.png")])
    assert {pattern for pattern, *_ in drawn} == set(wanted) and len(set(wanted)) == kinds
    assert {T for _, _, T, *_ in drawn} == {config.sequence_length}
    assert imread(tmp_path / "x.png").std() > 0


def test_a_checkpoint_is_drawn_as_it_was_trained(tmp_path, script, monkeypatch):
    layers = [build_pattern("eball", n_heads=4, band_length=32), build_pattern("standard", n_heads=4, band_length=32)]
    folder = tmp_path / "run" / "step2"
    (folder / "model_and_optim").mkdir(parents=True)
    (folder / "model_and_optim" / ".metadata").touch()
    (folder / "train").mkdir()
    (folder / "train" / "rank0.pt").touch()
    (folder / ".metadata.json").write_text('{"version": "3"}')
    tokenizer = {"vocab_size": 8, "eos_token_id": 0, "pad_token_id": 0, "identifier": None}
    config = {"model": {}, "dataset": {"sequence_length": 24, "tokenizer": tokenizer}}
    (folder / "config.json").write_text(json.dumps(config))
    shape = {**dict.fromkeys(_SHAPE, 4), "n_layers": len(layers)}
    (folder / "attention.json").write_text(Fingerprint(tuple(p.to_config() for p in layers), shape).to_json())
    drawn = []
    monkeypatch.setattr(
        masks, "allowed_share", lambda *args, **more: drawn.append(args) or allowed_share(*args, **more)
    )
    script.main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "x.png")])
    assert {(pattern, T) for pattern, _, T, *_ in drawn} == {(layer, 24) for layer in layers}


def test_a_picture_that_cannot_be_written_is_one_line(script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    small = ["--type", "eball", "--heads", "2", "--band-length", "8", "--out"]
    for name in ("file/x.png", "x.nonsense"):
        with pytest.raises(SystemExit) as stop:
            script.main([*small, str(tmp_path / name)])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("error: ")


@pytest.mark.parametrize("name", ["figure1", "figure2", "masks_overview"])
def test_committed_pictures_are_what_the_package_draws(name, tmp_path):
    """Up to the anti-aliasing of another machine's fonts; another matplotlib draws text and edges too differently."""
    with Image.open(ROOT / "docs" / "images" / f"{name}.png") as picture:
        drawn_by = picture.info["Software"]
    if f"version{matplotlib.__version__}," not in drawn_by:
        pytest.skip(f"drawn by {drawn_by.split(',')[0]}, and this is {matplotlib.__version__}")
    make = {"figure1": masks.figure_1, "figure2": masks.figure_2, "masks_overview": masks.overview}[name]
    drawn = imread(masks.save(make(), tmp_path / "now.png"))
    committed = imread(ROOT / "docs" / "images" / f"{name}.png")
    assert drawn.shape == committed.shape
    assert (np.abs(drawn - committed).max(-1) > 0.05).mean() < 0.01
    assert (ROOT / "docs" / "images" / f"{name}.png").stat().st_size < 400_000

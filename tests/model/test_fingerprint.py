"""What a checkpoint says of its attention, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks.tiny import HEADS, T, tiny
from spattn_olmoe.model import with_attention
from spattn_olmoe.model.fingerprint import FILE_NAME, Fingerprint, check_checkpoint


def model(base=None, band_length=T, **section):
    return with_attention(base or tiny().model, band_length=band_length, **{"type": "spattention", **section})


def saved(folder, model_config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text(Fingerprint.of(model_config).to_json())
    return str(folder)


def refused(checkpoint, here, *said, allow=False):
    with pytest.raises(ValueError) as caught:
        check_checkpoint(checkpoint, here, allow_attention_change=allow)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


def test_a_fingerprint_names_every_layers_pattern_and_the_shape():
    fingerprint = Fingerprint.of(model(layers=[1], local_sharing=True))
    assert [layer["name"] for layer in fingerprint.layers] == ["standard", "spattention"]
    options = {"follows_input": False, "head_order": "natural", "local_sharing": True}
    expected = {"name": "spattention", "n_heads": HEADS, "band_length": T, **options}
    assert fingerprint.layers[1] == expected
    assert fingerprint.shape == {"d_model": 32, "n_layers": 2, "vocab_size": 64}


def test_what_is_written_is_read_back_equal(tmp_path):
    here = model(layers=[1], local_sharing=True)
    assert Fingerprint.read(saved(tmp_path, here)) == Fingerprint.of(here)


@pytest.mark.parametrize("allow", [False, True])
def test_an_equal_model_passes_without_a_word(tmp_path, allow):
    checkpoint = saved(tmp_path, model(local_sharing=True))
    assert check_checkpoint(checkpoint, model(local_sharing=True), allow_attention_change=allow) is None


def test_how_attention_is_computed_is_no_difference(tmp_path):
    checkpoint = saved(tmp_path, model(impl="reference"))
    assert check_checkpoint(checkpoint, model(impl="cpu"), allow_attention_change=False) is None


DIFFERENCES = {
    "type": ({}, {"type": "eball"}, ["'spattention'", "'eball'", "layer 0"]),
    "option": ({"local_sharing": False}, {"local_sharing": True}, ["local_sharing", "layer 0"]),
    "band length": ({"band_length": 32}, {"band_length": 64}, ["'band_length': 32", "'band_length': 64"]),
    "band length's rule": ({}, {"follows_input": True}, ["False", "True"]),
    "order of heads": ({}, {"head_order": "balanced"}, ["'natural'", "[0, 3, 1, 2]"]),
    "one layer": ({}, {"layers": [0]}, ["layer 1", "'standard'"]),
}


@pytest.mark.parametrize(("there", "here", "said"), DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_other_attention_is_refused_unless_allowed(tmp_path, there, here, said):
    checkpoint = saved(tmp_path, model(**there))
    refused(checkpoint, model(**here), *said, checkpoint, "allow_attention_change=true", "trainer.save_folder")
    change = check_checkpoint(checkpoint, model(**here), allow_attention_change=True)
    assert change is not None
    for words in said:
        assert words in change


def test_other_heads_are_refused(tmp_path):
    base = copy.deepcopy(tiny().model)
    base.block.sequence_mixer.n_heads = 8
    refused(saved(tmp_path, model()), model(base), "'n_heads': 4", "'n_heads': 8")


@pytest.mark.parametrize(("key", "value"), [("d_model", 64), ("n_layers", 3), ("vocab_size", 128)])
@pytest.mark.parametrize("allow", [False, True])
def test_another_shape_is_refused_even_if_attention_may_change(tmp_path, key, value, allow):
    other = tiny(f"model.{key}={value}").model
    here = getattr(tiny().model, key)
    refused(
        saved(tmp_path, model(other)), model(), f"model.{key}={value}", str(here), "trainer.save_folder", allow=allow
    )


def test_a_checkpoint_that_does_not_say_is_refused_unless_allowed(tmp_path):
    checkpoint = tmp_path / "run" / "step3"
    checkpoint.mkdir(parents=True)
    refused(str(checkpoint), model(), FILE_NAME, "missing", "allow_attention_change=true")
    said = check_checkpoint(str(checkpoint), model(), allow_attention_change=True)
    assert said is not None
    assert FILE_NAME in said


@pytest.mark.parametrize(
    "text", ['{"layers": [', "{}", '{"layers": 3, "shape": {}}', "[]", '{"layers": [], "shape": 3}', "\x00\xff"]
)
@pytest.mark.parametrize("allow", [False, True])
def test_a_damaged_file_is_refused_with_its_name(tmp_path, text, allow):
    (tmp_path / FILE_NAME).write_text(text)
    refused(str(tmp_path), model(), str(tmp_path / FILE_NAME), "damaged", allow=allow)


def test_a_file_that_is_not_text_is_damaged(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00\x80")
    refused(str(tmp_path), model(), "damaged")


@pytest.mark.parametrize("key", ["d_model", "n_layers", "vocab_size"])
def test_a_shape_without_one_of_its_numbers_is_damage(tmp_path, key):
    data = json.loads(Fingerprint.of(model()).to_json())
    del data["shape"][key]
    (tmp_path / FILE_NAME).write_text(json.dumps(data))
    refused(str(tmp_path), model(), "damaged", key)


def test_the_file_that_is_damaged_is_the_one_named(tmp_path):
    (tmp_path / FILE_NAME).write_text("")
    (tmp_path / "step3").mkdir()
    refused(str(tmp_path / "step3"), model(), f"{tmp_path}/{FILE_NAME} is damaged")


def test_fewer_layers_than_the_shape_says_is_damage(tmp_path):
    data = json.loads(Fingerprint.of(model()).to_json())
    data["layers"].pop()
    (tmp_path / FILE_NAME).write_text(json.dumps(data))
    refused(str(tmp_path), model(), str(tmp_path / FILE_NAME), "damaged")


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_checkpoint_without_a_file_is_judged_by_its_run(tmp_path, slash):
    saved(tmp_path / "run", model(type="eball"))
    checkpoint = tmp_path / "run" / "step3"
    checkpoint.mkdir()
    assert check_checkpoint(f"{checkpoint}{slash}", model(type="eball"), allow_attention_change=False) is None
    refused(f"{checkpoint}{slash}", model(), "'eball'", "'spattention'")


def test_a_checkpoints_own_file_comes_before_its_runs(tmp_path):
    saved(tmp_path / "run", model(type="eball"))
    checkpoint = saved(tmp_path / "run" / "step3", model(type="gbhalf"))
    assert check_checkpoint(checkpoint, model(type="gbhalf"), allow_attention_change=False) is None
    refused(checkpoint, model(type="eball"), "'gbhalf'")


def test_a_file_from_before_an_option_existed_means_its_default(tmp_path):
    written = json.loads(Fingerprint.of(model()).to_json())
    for layer in written["layers"]:
        del layer["head_order"]
    (tmp_path / FILE_NAME).write_text(json.dumps(written))
    assert check_checkpoint(str(tmp_path), model(), allow_attention_change=False) is None
    refused(str(tmp_path), model(head_order="balanced"), "[0, 3, 1, 2]")

import pickle

import pytest

from shoal import presets
from shoal.config import ModelConfig, Preset, TrainConfig, dump, load, read_file
from shoal.errors import ConfigError, QueueFullError, RequestError, ShoalError


@pytest.mark.parametrize("name", presets.NAMES)
def test_presets_survive_their_plain_values(name):
    preset = presets.get(name)
    assert load(Preset, dump(preset)) == preset


def test_a_misspelt_key_is_refused_with_the_nearest_one():
    values = dump(presets.get("test").model)
    values["windw"] = values.pop("window")
    with pytest.raises(ConfigError, match=r"unknown key model.windw: .*did you mean 'window'\?"):
        load(ModelConfig, values, "model")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("window", "16", "model.window: got '16'; allowed: int"),
        ("window", True, "model.window: got True; allowed: int"),
        ("mix_mode", "learned", "model.mix_mode: got 'learned'; allowed: fixed, per_head"),
        ("local_weight", 1.5, "model.local_weight: got 1.5; allowed: 0 to 1"),
    ],
)
def test_a_wrong_value_is_named(key, value, message):
    with pytest.raises(ConfigError, match=message):
        load(ModelConfig, dump(presets.get("test").model) | {key: value}, "model")


def test_a_missing_key_is_named():
    values = dump(presets.get("test").model)
    del values["heads"]
    with pytest.raises(ConfigError, match=r"missing key heads: set heads"):
        load(ModelConfig, values)


def test_unknown_preset_and_bad_training_values():
    with pytest.raises(ConfigError, match=r"preset: got 'tny'.*did you mean 'tiny'"):
        presets.get("tny")
    with pytest.raises(ConfigError, match=r"train.learning_rate"):
        TrainConfig(learning_rate=0)
    with pytest.raises(ConfigError, match=r"warmup"):
        TrainConfig(warmup=0.7, decay=0.7)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "\x00"])
def test_files_that_are_no_configs(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_file(path)
    with pytest.raises(ConfigError, match="cannot read config"):
        read_file(tmp_path / "absent.yaml")


def test_errors_say_what_got_allowed_and_what_to_do():
    error = ShoalError("port", got=80, allowed=[8000, 8001], do="choose another")
    assert str(error) == "port: got 80; allowed: 8000, 8001; choose another"


def test_errors_keep_their_class_between_processes():
    error = pickle.loads(pickle.dumps(QueueFullError("full", param="queue", got=9, do="retry")))
    assert isinstance(error, QueueFullError) and isinstance(error, RequestError)
    assert (str(error), error.param, error.status) == ("full: got 9; retry", "queue", 429)

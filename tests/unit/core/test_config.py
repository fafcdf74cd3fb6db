import math
import pickle

import pytest

from shoal import presets
from shoal.config import AUTO, FULL, ModelConfig, Preset, TrainConfig, dump, load, read_file
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


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": math.nan},
        {"clip": math.inf},
        {"warmup": 1.5, "decay": -1.0},
        {"min_lr_ratio": -0.1},
        {"weight_decay": -1.0},
        {"betas": (0.9, 1.0)},
        {"exit_weights": (0.1, -0.2, 1.0)},
        {"patch_weight": math.nan},
    ],
    ids=str,
)
def test_training_values_that_cannot_work_are_named(change):
    with pytest.raises(ConfigError, match=f"train.{next(iter(change))}"):
        TrainConfig(**change)


@pytest.mark.parametrize("change", [{"rope_theta": -1.0}, {"norm_eps": 0.0}, {"norm_eps": math.nan}], ids=str)
def test_model_values_that_cannot_work_are_named(change):
    with pytest.raises(ConfigError, match=f"model.{next(iter(change))}"):
        load(ModelConfig, dump(presets.get("test").model) | change)


def test_a_truth_value_is_no_depth():
    with pytest.raises(ConfigError, match="depth: got True"):
        presets.get("test").model.depth(True)


def test_a_request_s_depth_is_an_exit_its_layers_or_left_to_the_router():
    model = presets.get("test").model
    assert [model.asked(depth) for depth in ("shallow", 2, FULL, AUTO)] == [1, 2, 4, None]
    for auto, allowed in ((True, "auto, shallow"), (False, "shallow")):
        for depth in ("deepest", 3, 0, True, *(() if auto else (AUTO,))):
            with pytest.raises(RequestError, match=f"depth: got {depth!r}; allowed: {allowed}, middle, full, 1, 2, 4"):
                model.asked(depth, auto=auto)


def test_a_key_that_is_no_name_is_refused():
    with pytest.raises(ConfigError, match=r"unknown key train\.1"):
        load(TrainConfig, {1: 2}, "train")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "seed: 1\nmix: a\nseed: 2\n"),
        ("c.yaml", "a: {seed: 1, seed: 2}\n"),
        ("c.json", '{"seed": 1, "seed": 2}'),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="key 'seed' is given twice"):
        read_file(tmp_path / name)


def test_a_broken_file_says_where(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 1\nmix: [text\n")
    with pytest.raises(ConfigError, match=r"c\.yaml is not valid yaml: got .* in line 3"):
        read_file(tmp_path / "c.yaml")
    (tmp_path / "base.yaml").write_text("base: &b {seed: 1}\nrun: {<<: *b, mix: a}\n")
    assert read_file(tmp_path / "base.yaml")["run"] == {"seed": 1, "mix": "a"}


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

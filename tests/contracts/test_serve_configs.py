"""Every Serve config that is shipped loads strictly and says when to use it and what it costs; a slip is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray")

from shoal import config, quickstart
from shoal.api.serve_args import ServeArgs, parse_replicas
from shoal.errors import ConfigError
from shoal.on_ray.serve import SERVE_SETTINGS
from shoal.on_ray.serve_config import IMPORT_PATH, load_serve_config, serve_config

FOLDER = Path(__file__).parents[2] / "serve_configs"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_explains_itself(path: Path) -> None:
    deploy = load_serve_config(path)
    assert [application.import_path for application in deploy.applications] == [IMPORT_PATH]
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    heads = [line.removeprefix("# ").partition(":")[0] for line in comments]
    assert [head for head in heads if not head.startswith(" ")] == ["When", "Cost", "Use"]


def test_the_local_config_stays_on_this_machine() -> None:
    deploy = load_serve_config(FOLDER / "local.yaml", port=9000, model="some/model")
    assert (deploy.http_options.host, deploy.http_options.port) == ("127.0.0.1", 9000)
    args = deploy.applications[0].args
    assert (args["model"], args["min_replicas"], args["max_replicas"]) == ("some/model", 1, 2)


def test_the_quickstart_serves_as_the_local_config_says() -> None:
    """It is written twice, since an installed package has no such file."""
    of_file = load_serve_config(FOLDER / "local.yaml", port=9000, model="a/model")
    of_quickstart = serve_config(replace(quickstart.SERVED, model="a/model"), port=9000)
    assert of_quickstart.http_options == of_file.http_options
    assert of_quickstart.proxy_location == of_file.proxy_location
    (one,), (other,) = of_quickstart.applications, of_file.applications
    assert config.load(ServeArgs, one.args) == config.load(ServeArgs, other.args)
    assert one.model_dump(exclude={"args"}) == other.model_dump(exclude={"args"})


def test_the_cluster_s_config_sets_what_shoal_serve_sets_by_itself() -> None:
    options = load_serve_config(FOLDER / "cluster.yaml").controller_options
    assert options is not None and options.runtime_env == {"env_vars": SERVE_SETTINGS}


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("http_options:", "http_option:", r"unknown key http_option.*did you mean 'http_options'\?"),
        ("  port:", "  prot:", r"unknown key http_options\.prot.*did you mean 'port'\?"),
        ("route_prefix:", "route_prefx:", r"applications\[0\]\.route_prefx.*did you mean 'route_prefix'\?"),
        ("min_replicas:", "min_replica:", r"args\.min_replica.*did you mean 'min_replicas'\?"),
        ("max_replicas: 2", "max_replicas: 0", "args.max_replicas"),
        ("min_replicas: 1", "min_replicas: one", "args.min_replicas"),
        ("port: 8000", "port: x", "http_options.port"),
    ],
)
def test_a_slip_is_refused_by_name(tmp_path: Path, right: str, wrong: str, says: str) -> None:
    text = (FOLDER / "local.yaml").read_text(encoding="utf-8")
    assert right in text
    path = tmp_path / "slip.yaml"
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    with pytest.raises(ConfigError, match=says) as caught:
        load_serve_config(path)
    assert "\n" not in str(caught.value)


def test_a_deployment_that_the_application_does_not_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slip.yaml"
    text = (FOLDER / "cluster.yaml").read_text(encoding="utf-8").replace("name: Gateway", "name: Gatewy")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'Gateway'"):
        load_serve_config(path)


def several(tmp_path: Path, more: str = "") -> Path:
    """The local config for two models, with `more` at its end."""
    path = tmp_path / "several.yaml"
    text = (FOLDER / "local.yaml").read_text(encoding="utf-8")
    path.write_text(text + "      models: {base: a/base, int8: a/int8}\n" + more, encoding="utf-8")
    return path


def test_several_models_have_a_deployment_each(tmp_path: Path) -> None:
    weights = "    deployments: [{name: EngineReplica-int8, user_config: {model: a/newer}}]\n"
    deploy = load_serve_config(several(tmp_path, weights))
    assert deploy.applications[0].args["models"] == {"base": "a/base", "int8": "a/int8"}
    args = ServeArgs(models={"base": "a/base", "int8": "a/int8"})
    assert args.deployments() == {"EngineReplica-base": "a/base", "EngineReplica-int8": "a/int8"}
    assert ServeArgs(model="a").deployments() == {"EngineReplica": "a"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("    deployments: [{name: EngineReplica}]\n", "did you mean 'EngineReplica-"),
        ("    deployments: [{name: EngineReplica-int8, user_config: {modle: a}}]\n", "did you mean 'model'"),
        ("    deployments: [{name: Gateway, user_config: {model: a}}]\n", "only engines"),
        ("      model: a/third\n", "args.model and args.models"),
        ("      name: fish\n", "args.model and args.models"),
    ],
)
def test_a_slip_among_several_models_is_refused_by_name(tmp_path: Path, more: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_serve_config(several(tmp_path, more))


@pytest.mark.parametrize("name", ["", "a b", "../up", "x" * 65])
def test_a_model_s_name_is_one_word(name: str) -> None:
    with pytest.raises(ConfigError, match=r"args\.models: name"):
        ServeArgs(models={name: "a"})


def test_replicas_on_the_command_line() -> None:
    assert parse_replicas("2") == {"min_replicas": 2, "max_replicas": 2}
    assert parse_replicas("0:4") == {"min_replicas": 0, "max_replicas": 4}
    for text in ("", "a", "1:", "2:x"):
        with pytest.raises(ConfigError, match="replicas"):
            parse_replicas(text)
    args = ServeArgs(model="m", **parse_replicas("1:3"))
    assert serve_config(args).applications[0].args["max_replicas"] == 3

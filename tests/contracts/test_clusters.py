"""The files of clusters/ load where they are meant to be loaded, and a misspelt key in any of them is found.

Ray's own schema closes only some of its objects, EC2 is asked much later, and Kubernetes prunes what it does not know.
"""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import yaml

from shoal.on_ray.serve_config import check_serve_config
from shoal.scale import GPUS, training

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
FIELDS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "kuberay_fields.yaml").read_text())
TYPES = {"string": str, "integer": int, "boolean": bool}


def aws() -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "aws-gpu.yaml").read_text())


def kuberay() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTERS / "kuberay.yaml").read_text()))


def check_aws(cluster: dict[str, Any]) -> None:
    """Raises when `ray up` or EC2 would refuse the file, or would not know a key of it."""
    schema = json.loads(resources.files("ray.autoscaler").joinpath("ray-schema.json").read_text())
    jsonschema.validate(cluster, closed(schema))
    run_instances = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node in cluster["available_node_types"].items():
        # Ray adds the counts
        given = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(given, run_instances)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"


def closed(schema: Any) -> Any:
    """`schema` with every object that lists its properties closed to others."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        inner["additionalProperties"] = False
    return inner


def unknown(value: Any, kind: Any, path: str) -> list[str]:
    """What of `value` is not as `kind` of kuberay_fields.yaml says."""
    if isinstance(kind, str) and kind in FIELDS:
        kind = FIELDS[kind]
    if isinstance(kind, str):
        fits = isinstance(value, TYPES[kind]) and (kind != "integer" or not isinstance(value, bool))
        return [] if fits else [f"{path}: {value!r} is not a {kind}"]
    if isinstance(kind, list):
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [fault for at, item in enumerate(value) for fault in unknown(item, kind[0], f"{path}[{at}]")]
    if not isinstance(value, dict):
        return [f"{path}: not an object"]
    faults = []
    for key, item in value.items():
        if key in kind or "*" in kind:
            faults += unknown(item, kind.get(key, kind.get("*")), f"{path}.{key}")
        else:
            faults.append(f"{path}.{key} is unknown")
    return faults


def test_ray_up_and_ec2_know_every_key_of_the_aws_cluster() -> None:
    check_aws(aws())


def test_the_aws_cluster_is_careful() -> None:
    """What Ray's own defaults for AWS are not: they open the dashboard to all, and give the head full rights."""
    cluster = aws()
    (head,) = (line for line in cluster["head_start_ray_commands"] if "--head" in line)
    assert "--dashboard-host=127.0.0.1" in head
    for line in [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]:
        assert "ray start" not in line or "RAY_AUTH_MODE=token" in line
    assert any("ray[data,default,serve,train]==2.60.*" in line for line in cluster["setup_commands"])
    nodes = cluster["available_node_types"]
    assert all(n["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for n in nodes.values())
    profiles = {name: node["node_config"]["IamInstanceProfile"]["Name"] for name, node in nodes.items()}
    assert profiles["head"] != profiles["gpu"]
    assert nodes["gpu"]["min_workers"] == 0 and cluster["idle_timeout_minutes"] > 0
    assert nodes["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    (rule,) = cluster["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert all(r["CidrIp"].endswith("/32") for r in rule["IpRanges"])


def test_pods_have_a_bound_on_what_they_keep() -> None:
    cluster, service = kuberay()
    for spec in (cluster["spec"], service["spec"]["rayClusterConfig"]):
        for pod in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (container,) = pod["template"]["spec"]["containers"]
            assert "SHOAL_CACHE_BYTES" in {of["name"] for of in container["env"]}


def test_kuberay_knows_every_field_of_the_manifests() -> None:
    manifests = kuberay()
    assert [m["kind"] for m in manifests] == ["RayCluster", "RayService"]
    for manifest in manifests:
        assert manifest["apiVersion"] == "ray.io/v1"
        assert unknown(manifest, manifest["kind"], manifest["kind"]) == []


def test_the_service_serves_what_the_serve_config_for_clusters_says() -> None:
    service = kuberay()[1]
    inner = yaml.safe_load(service["spec"]["serveConfigV2"])
    check_serve_config(inner, "serveConfigV2")
    (given,) = (application["args"] for application in inner["applications"])
    mounts = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    for path in (given["model"], given["api_keys"]):
        assert any(path.startswith(mount["mountPath"] + "/") for mount in mounts)
    outer = yaml.safe_load((ROOT / "serve_configs" / "cluster.yaml").read_text())
    outer["applications"][0]["args"]["model"] = given["model"]
    assert inner == outer


def test_every_node_runs_the_same_ray_with_a_token() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    cluster, service = kuberay()
    for spec in (cluster["spec"], service["spec"]["rayClusterConfig"]):
        assert spec["rayVersion"] == pinned[1]
        assert spec["authOptions"]["mode"] == "token"
        pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        assert len({c["image"] for pod in pods for c in pod["template"]["spec"]["containers"]}) == 1
    assert f"rayproject/ray:{pinned[1]}-" in (ROOT / "Dockerfile").read_text()


def test_the_local_file_is_a_runtime_environment() -> None:
    values = yaml.safe_load((CLUSTERS / "local.yaml").read_text())
    assert set(values) == {"env_vars"}
    assert (ROOT / values["env_vars"]["PYTHONPATH"] / "shoal" / "__init__.py").is_file()
    assert all(isinstance(value, str) for value in values["env_vars"].values())


def test_a_job_that_is_stopped_has_the_time_of_an_update_and_a_checkpoint() -> None:
    """Of `7b` on 8 GPUs, where Ray gives 3 seconds. What the supervisor of a job reads is its environment: the head's, or the
    job's own."""
    longest = training("7b", 8, GPUS["h100"], utilisation=0.1, disk=2e9)
    name, least = "RAY_JOB_STOP_WAIT_TIME_S", longest.compute + longest.exchange + longest.checkpoint
    local = yaml.safe_load((CLUSTERS / "local.yaml").read_text())["env_vars"][name]
    (command,) = [line for line in aws()["head_start_ray_commands"] if "ray start --head" in line]
    found = re.search(rf"\b{name}=(\d+) ", command)
    (head,) = kuberay()[0]["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    pod = {each["name"]: each["value"] for each in head["env"]}[name]
    assert found and min(map(int, (local, found[1], pod))) > least

"""Room on the machine, and a Ray of our own that nobody else can reach."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import ray

from shoal.errors import ResourceError
from shoal.machine import need_disk, need_free_port, need_memory
from shoal.on_ray import resources
from shoal.on_ray.resources import local_ray

MUCH = 10**18


def test_room_that_there_is_passes_and_room_that_there_is_not_is_one_line(tmp_path: Path) -> None:
    need_disk(tmp_path / "not" / "yet", 1)
    need_memory(1)
    for ask in (lambda: need_disk(tmp_path / "not" / "yet", MUCH), lambda: need_memory(MUCH)):
        with pytest.raises(ResourceError, match=r"got '[\d.]+ GiB'; allowed: at least") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_port_in_use_is_told_and_one_just_closed_is_free() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with (
            socket.create_connection(("127.0.0.1", port)),
            pytest.raises(ResourceError, match=f"port {port} of 127.0.0.1"),
        ):
            need_free_port("127.0.0.1", port)
        server.accept()[0].close()
    need_free_port("127.0.0.1", port)


def test_a_temporary_folder_too_deep_for_sockets_is_told_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(ResourceError, match="set TMPDIR to a shorter path"), local_ray():
        raise AssertionError("it started")
    assert not list(deep.iterdir())


@pytest.mark.smoke
@pytest.mark.ray
@pytest.mark.drill
def test_our_own_ray_listens_on_loopback_alone_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    environment = dict(os.environ)
    others = set(psutil.Process().children(recursive=True))  # a test before this one may keep a server of forks
    with local_ray():
        assert ray.cluster_resources()["CPU"] >= 4
        with local_ray():  # the one that runs is used, and not ended
            pass
        assert ray.get(ray.remote(_worker).remote()) == "1"
        processes = list(set(psutil.Process().children(recursive=True)) - others)
        pids = {process.pid for process in processes}
        hosts = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in pids}
        assert hosts <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"} and hosts
        folder = Path(ray._private.worker._global_node.get_session_dir_path()).parent
    assert not ray.is_initialized() and not folder.exists()
    psutil.wait_procs(processes, timeout=60)
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == environment.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")


def _worker() -> str | None:
    import shoal.data.parts  # noqa: F401  a worker finds the package wherever the driver was started

    return os.environ.get("OMP_NUM_THREADS")


def test_a_cluster_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # but it does not listen
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.raises(ResourceError, match=r"no Ray cluster at RAY_ADDRESS=127\.0\.0\.1:\d+"), local_ray():
            raise AssertionError("it connected")
    assert not ray.is_initialized()


def test_a_server_that_is_no_ray_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and says nothing: Ray went on trying for more than three minutes."""
    monkeypatch.setattr(resources, "ANSWER_SECONDS", 1.0)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(ResourceError, match="something that is no Ray"), local_ray():
            raise AssertionError("it connected")
    assert not ray.is_initialized()


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.drill
def test_a_ray_on_loopback_is_joined_from_a_shell_that_knows_nothing_of_it() -> None:
    """By its address alone; it looked for the node of this machine's other address."""
    script = (
        "import ray\nfrom shoal.on_ray.resources import local_ray\nwith local_ray(): print(len(ray.nodes()), 'node')"
    )
    env = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    env |= {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    joined = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=150)
    assert joined.stdout == "1 node\n", joined.stderr

"""Strangers must not reach the ports of Ray, unless the operator says so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from shoal.errors import ResourceError
from shoal.on_ray import ports


@pytest.mark.parametrize(
    ("token", "interface", "node", "refused"),
    [
        (False, "10.0.0.4", "10.0.0.4", None),
        (False, "fe80::1%eth0", "127.0.0.1", None),
        (False, "02:42:ac:11:00:02", "192.168.1.2", None),
        (False, "8.8.8.8", "10.0.0.4", "8.8.8.8"),
        (False, "10.0.0.4", "2001:4860:4860::8888", "2001:4860:4860::8888"),
        (True, "8.8.8.8", "8.8.8.8", None),
    ],
)
def test_a_ray_without_a_token_needs_private_addresses(
    monkeypatch: pytest.MonkeyPatch, token: bool, interface: str, node: str, refused: str | None
) -> None:
    monkeypatch.setattr(ports, "is_token_auth_enabled", lambda: token)
    monkeypatch.setattr(ports.psutil, "net_if_addrs", lambda: {"eth0": [SimpleNamespace(address=interface)]})
    monkeypatch.setattr(ports.ray, "nodes", lambda: [{"NodeManagerAddress": node, "Alive": True}])
    if refused is None:
        return ports.need_closed_ports()
    with pytest.raises(ResourceError, match=rf"{refused}.*--allow-public-ray"):
        ports.need_closed_ports()

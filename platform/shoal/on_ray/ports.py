"""Whether strangers can reach the ports of Ray: whoever can, runs code there.

Ray Serve's replicas take pickled requests on a port of every network interface, and Ray gives no way to bind it. Ray's token
authentication closes this port and Ray's own: a local Ray has it by default, a cluster where `RAY_AUTH_MODE=token` is set.
"""

from __future__ import annotations

import ipaddress

import psutil
import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled

from shoal.errors import ResourceError


def need_closed_ports() -> None:
    """Raises ResourceError where the Ray that is joined has no token authentication and a node has a public address."""
    if is_token_auth_enabled():  # the same for the whole cluster: Ray refuses processes of another mode
        return
    if public := _public_addresses():
        raise ResourceError(
            "Ray Serve would run code for whoever reaches its ports: this Ray has no token authentication",
            got=f"nodes at {', '.join(public)}",
            allowed="private addresses alone",
            do="start Ray with RAY_AUTH_MODE=token, or give --allow-public-ray",
        )


def _public_addresses() -> list[str]:
    """Those of this machine's interfaces and of the cluster's nodes that the internet may reach, in order."""
    ours = [address.address for several in psutil.net_if_addrs().values() for address in several]
    nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return sorted({address for address in [*ours, *nodes] if _is_public(address)})


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_global  # an IPv6 address may name its interface
    except ValueError:  # the address of a network card
        return False

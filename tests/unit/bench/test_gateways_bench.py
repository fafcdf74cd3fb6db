"""What `shoal bench gateways` says of several gateways beside one."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gateways import compared


def row(tokens: float, **cpu: float) -> dict[str, Any]:
    return {"tokens_per_s": tokens, "cpu": cpu}


def test_what_two_cores_permit_is_told_from_what_two_gateways_carry() -> None:
    """By the figures of the log: 1.66 was carried beside other work, where two idle cores would have carried 1.06 times; each
    on a core of its own two gateways carry 1.98 times, on 3.7 cores."""
    rows = {
        "1": row(2254, gateway=0.201, proxy=0.100, replica=0.052, clients=0.034),
        "2": row(3745, gateway=0.203, proxy=0.092, replica=0.055, clients=0.029),
        "2, limited": row(3000, gateway=0.4, proxy=0.1, replica=0.1, clients=0.1),
    }
    (found,) = compared(rows, 2).values()
    assert found["carried"] == pytest.approx(3745 / 2254)
    assert found["permitted"] == pytest.approx((2 / 0.379) / (1 / 0.201)) == pytest.approx(1.06, abs=0.01)
    assert found["by_cpu"] == pytest.approx(2 * 0.201 / 0.203) and found["cores"] == pytest.approx(2 / 0.203 * 0.379)
    (four,) = compared(rows, 4).values()
    assert four["permitted"] == pytest.approx(found["by_cpu"])
    assert compared({"2": rows["2"]}, 2) == {}


def test_a_proxy_that_is_full_bounds_what_gateways_carry() -> None:
    one = row(1000, gateway=0.2, proxy=0.1, replica=0.0, clients=0.0)
    found = compared({"1": one, "4": {**one, "tokens_per_s": 2000}}, 64)["4"]
    assert found["permitted"] == found["by_cpu"] == pytest.approx(2.0)

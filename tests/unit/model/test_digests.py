"""The sha256 that an adapter knows its base by: written out, since with another all adapters of before would be refused."""

from __future__ import annotations

import hashlib

import torch

from shoal.model.digests import digest


def test_it_is_of_names_types_shapes_and_values_by_name() -> None:
    found = digest({
        "b": torch.tensor([[1.0, -2.0], [0.5, 0.0]]).T,  # as it is read, not as it lies
        "a": torch.tensor([1.0, -2.0], dtype=torch.bfloat16, requires_grad=True),
        "c": torch.tensor(7, dtype=torch.int8),
    })  # fmt: skip
    by_hand = (
        b"a torch.bfloat16 (2,)\n" + bytes.fromhex("803f00c0")
        + b"b torch.float32 (2, 2)\n" + bytes.fromhex("0000803f 0000003f 000000c0 00000000")
        + b"c torch.int8 ()\n\x07"
    )  # fmt: skip
    assert found == hashlib.sha256(by_hand).hexdigest()

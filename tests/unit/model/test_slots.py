"""What a slot of K/V memory gives back; that the loops store and read the same: test_fused.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.model import slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_come_back_as_they_were(dtype):
    k, v = torch.randn(2, 5, 3, 8).to(dtype).unbind(0)
    stored = slots.encode(k, v, dtype)
    assert stored.shape[-1] == slots.width(8, dtype) and stored.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(slots.decode(stored, dtype), (k, v), strict=True))


def test_no_number_of_a_model_in_bf16_changes_its_sign():
    """Divided in bf16, the largest of a token can come out as level 128, which int8 makes -128."""
    both = torch.randn(2, 4000, 1, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    for was, found in zip(both, slots.decode(slots.encode(*both, torch.int8), torch.bfloat16), strict=True):
        assert ((found - was).abs() <= was.abs().amax(-1, keepdim=True) / 127).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([4, 24, 64]),
    st.sampled_from([-30, -6, 0, 6, 30]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_levels_come_back_within_half_a_step_of_their_own_scale(seed, dim, size, dtype):
    """Key and value, and every token and head, have scales of their own: a large one does not blur its neighbours."""
    g = torch.Generator().manual_seed(seed)
    both = torch.randn(2, 6, 3, dim, generator=g, dtype=torch.float64).to(dtype)
    both[0] *= 10.0**size
    both[:, 1] *= 1000
    stored = slots.encode(*both, torch.int8)
    assert stored.shape == (6, 3, slots.width(dim, torch.int8)) and stored.dtype == torch.int8
    for was, found in zip(both, slots.decode(stored, dtype), strict=True):
        assert found.dtype == dtype
        step = was.abs().amax(-1, keepdim=True) / slots.TOP
        assert ((found - was).abs() <= 0.505 * step).all(), "half a step, which bfloat16 may make 1/128 longer"


def test_zeros_stay_zero_and_what_is_not_a_number_stays_so():
    k, v = torch.zeros(3, 8), torch.randn(3, 8)
    k[1, 2], v[2, 0] = torch.nan, torch.inf
    keys, values = slots.decode(slots.encode(k, v, torch.int8), torch.float32)
    assert (keys[0] == 0).all() and (keys[2] == 0).all() and values[:2].isfinite().all()
    assert keys[1].isnan().all() and values[2].isnan().all()


def test_a_scale_that_bfloat16_holds_stays_and_any_other_is_the_next_above():
    """With a scale of one whole levels are the numbers themselves."""
    whole = torch.arange(-127.0, 128)
    longer = whole * (1 + 2**-9)  # whose scale lies a quarter of the way between two of bfloat16
    stored = slots.encode(whole, longer, torch.int8)
    assert stored[-4:].view(torch.bfloat16).tolist() == [1.0, 1 + 2**-7]
    keys, values = slots.decode(stored, torch.float32)
    assert torch.equal(keys, whole) and values.max() == 126 * (1 + 2**-7)


def test_another_kind_is_refused():
    assert (
        slots.stored_as("auto", torch.float64) == torch.float64 and slots.stored_as("int8", torch.float64) == torch.int8
    )
    with pytest.raises(ConfigError, match=r"kv_cache_dtype: got 'fp8'; allowed: auto, int8"):
        slots.stored_as("fp8", torch.float32)

"""Sizes on the host are what Triton's own functions make of them."""

import triton
from hypothesis import given
from hypothesis import strategies as st

from qtts_compile.kernels.sizes import cdiv, next_power_of_2

numbers = st.integers(1, 2**40)


@given(numbers, numbers)
def test_cdiv_is_tritons(n, divisor):
    assert cdiv(n, divisor) == triton.cdiv(n, divisor)
    assert cdiv(0, divisor) == 0


@given(numbers)
def test_next_power_of_2_is_tritons(n):
    assert next_power_of_2(n) == triton.next_power_of_2(n)
    assert next_power_of_2(next_power_of_2(n)) == next_power_of_2(n)

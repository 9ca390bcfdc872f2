# pyright: reportCallIssue=false
# It does not know how many tensors the unpacked buffers are.

from typing import Any

import pytest
import torch
from buffers import FORMATS, Buffers, assert_same_codes, poisoned
from device_assert import assert_trips
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, dtypes, layouts, random_tensor, seeds

from qtts_compile.kernels.turboquant.format import Format
from qtts_compile.kernels.turboquant.write import quantized_kv_write, quantized_kv_write_reference, quantized_kv_write_triton

S = 9


def int64(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


@st.composite
def positions(draw) -> list[int]:
    """Draw up to 5 distinct slots, permuted, some of them counted from the end."""
    slots = draw(st.lists(st.integers(0, S - 1), max_size=5, unique=True))
    return [slot - S if draw(st.booleans()) else slot for slot in slots]


@given(
    st.sampled_from(FORMATS), st.integers(1, 2), st.sampled_from([1, 3, 4]), st.sampled_from([32, 64, 128]), positions(),
    st.integers(0, 3), st.integers(0, 4), st.integers(-1, S), st.lists(st.integers(0, 4), min_size=2, max_size=2),
    dtypes, layouts, st.sampled_from(["contiguous", "transposed", "sliced"]), st.booleans(), seeds,
)  # fmt: skip
def test_kernel_equals_reference(
    device, format, batch, heads, width, slots, sinks, window, last, starts, dtype, layout, buffer_layout, strided, seed
):
    k, v = (random_tensor(seed + i, (batch, heads, len(slots), width), dtype, device, layout) for i in (0, 1))
    k[..., :1, 3] *= 50
    v[:, :, 1:2] = 0
    buffers = poisoned(format, batch, heads, S, width, sinks + window, dtype, device, buffer_layout)
    expected = buffers.clone()
    position, start = int64(slots, device), int64(starts[:batch], device)
    if strided:
        position, start = position.repeat_interleave(2)[::2], start.repeat_interleave(2)[::2]
    quantized_kv_write_reference(k, v, *expected, position, int64([last], device), start, sinks, format)
    quantized_kv_write_triton(k, v, *buffers, position, int64([last], device), start, sinks, format)
    parsed = Format.parse(format)
    for x, actual, codes, bits in ((k, buffers.k_codes, expected.k_codes, parsed.k_bits), (v, buffers.v_codes, expected.v_codes, parsed.v_bits)):
        assert_same_codes(actual[:, :, position], codes[:, :, position], x, bits)
        untouched = [slot for slot in range(S) if slot not in slots and slot - S not in slots]
        assert (actual[:, :, untouched] == 165).all()
    torch.testing.assert_close(buffers.scales, expected.scales, rtol=2**-10, atol=2**-24, equal_nan=True)
    torch.testing.assert_close(buffers.kept, expected.kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format", FORMATS)
def test_which_tokens_are_kept(device, format):
    # Left padding of 0 and 3 slots, 2 sinks, a window of 3, and two tokens of padding at the right, beyond slot 6.
    k, v = (random_tensor(i, (2, 2, S, 32), torch.float32, device) for i in (0, 1))
    buffers = poisoned(format, 2, 2, S, 32, 5, torch.float32, device)
    quantized_kv_write_triton(k, v, *buffers, torch.arange(S, device=device), int64([6], device), int64([0, 3], device), 2, format)
    for side, x in enumerate((k, v)):
        for row, tokens in enumerate(([0, 1, 6, 4, 5], [3, 4, 6, 4, 5])):
            assert torch.equal(buffers.kept[side, row], x[row][:, tokens])
    # The next token takes the place of the oldest of the window, and no sink's.
    kept = buffers.kept.clone()
    quantized_kv_write_triton(v[:, :, :1], k[:, :, :1], *buffers, int64([7], device), int64([7], device), int64([0, 3], device), 2, format)
    kept[0, :, :, 3], kept[1, :, :, 3] = v[:, :, 0], k[:, :, 0]
    assert torch.equal(buffers.kept, kept)


def test_writes_nothing_around_the_cache(device):
    memory = poisoned("int3", 2, 2, S + 2, 32, 6, torch.float16, device)
    before = memory.clone()
    inner = Buffers(*(tensor.narrow(-2 if tensor.dim() > 4 or tensor.dtype == torch.uint8 else -1, 1, tensor.shape[2] - 2) for tensor in memory[:3]),
                    memory.kept[..., 1:5, :])  # fmt: skip
    k = random_tensor(0, (2, 2, S, 32), torch.float16, device)
    quantized_kv_write_triton(
        k, k, *inner._replace(scales=memory.scales[..., 1:-1]), torch.arange(S, device=device), int64([8], device), int64([0, 0], device), 1, "int3"
    )
    for tensor, dim in ((memory.k_codes, 2), (memory.v_codes, 2), (memory.scales, 3), (memory.kept, 3)):
        edges = torch.tensor([0, tensor.shape[dim] - 1], device=device)
        original = before[[t is tensor for t in memory].index(True)]
        torch.testing.assert_close(tensor.index_select(dim, edges), original.index_select(dim, edges), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("slot", [S, -S - 1, 2**40])
def test_out_of_range_writes_nothing(slot):
    # On the CPU only: on a GPU the device-side assert would end the CUDA context of the whole test run.
    buffers = poisoned("int4", 1, 1, S, 32, 4, torch.float32, "cpu")
    before = buffers.clone()
    quantized_kv_write_triton(
        torch.ones(1, 1, 1, 32), torch.ones(1, 1, 1, 32), *buffers, int64([slot], "cpu"), int64([slot], "cpu"), int64([0], "cpu"), 2, "int4"
    )
    for actual, expected in zip(buffers, before):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 2, 0, 32), (0, 2, 1, 32), (1, 0, 1, 32)])
def test_nothing_to_write(device, shape):
    batch, heads, tokens, width = shape
    buffers = poisoned("int4", batch, heads, S, width, 2, torch.float32, device)
    position, last, start = (torch.zeros(n, dtype=torch.int64, device=device) for n in (tokens, 1, batch))
    for write in (quantized_kv_write_triton, quantized_kv_write):
        write(torch.zeros(shape, device=device), torch.zeros(shape, device=device), *buffers, position, last, start, 1, "int4")
    assert (buffers.k_codes == 165).all() and buffers.scales.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(device, dtype, format):
    k, v = (random_tensor(i, (2, 3, 2, 32), dtype, device, "transposed") for i in (0, 1))
    buffers = Buffers(*(tensor.zero_() for tensor in poisoned(format, 2, 3, S, 32, 3, dtype, device)))
    arguments = (k, v, *buffers, int64([3, -1], device), int64([8], device), int64([0, 3], device), 1, format)
    torch.library.opcheck(torch.ops.qtts.quantized_kv_write.default, arguments)


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("format", FORMATS)
def test_what_no_scale_fits_is_refused_before_a_write(name, value, format):
    arguments = valid_arguments() | {"format": format}
    arguments.update(poisoned(format, 1, 1, 4, 32, 2, torch.float32, "cpu")._asdict())
    before = arguments["k_codes"].clone()
    arguments[name][0, 0, 0, 5] = value
    way = "keep this cache in bf16" if value == 1e30 else "look for where the model leaves the range of its dtype"
    with pytest.raises(ValueError, match=rf"at \(0, 0, 0\) has the largest magnitude.*: {way}"):
        quantized_kv_write(**arguments)
    assert torch.equal(arguments["k_codes"], before) and arguments["kept"].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "1e30"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_no_scale_fits_trips_the_device_side_assert(value, format):
    setup = f"""
from qtts_compile.kernels.turboquant.format import Format
from qtts_compile.kernels.turboquant.write import quantized_kv_write
torch.set_default_device("cuda")
bytes = [Format.parse({format!r}).key_bytes(32), Format.parse({format!r}).value_bytes(32)]
codes = [torch.zeros(1, 1, 4, each, dtype=torch.uint8) for each in bytes]
zero, k = torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, 1, 32)
buffers = *codes, torch.zeros(2, 1, 1, 4, dtype=torch.float16), torch.zeros(2, 1, 1, 2, 32)
"""
    call = f"quantized_kv_write(k, k, *buffers, zero, zero, zero, 1, {format!r})"
    assert_trips(setup, call, f"k[..., 5] = {value}", "a key or value is not finite")


def valid_arguments() -> dict[str, Any]:
    buffers = poisoned("int4", 1, 1, 4, 32, 2, torch.float32, "cpu")
    zero = int64([0], "cpu")
    return dict(
        k=torch.ones(1, 1, 1, 32), v=torch.ones(1, 1, 1, 32), **buffers._asdict(), position=zero, last=zero, start=zero, sinks=1, format="int4"
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(format="bf16"), ValueError, "one of int4, k4v3, int3, fp8, got 'bf16'"),
        (dict(format="int3"), ValueError, r"k_codes must have the shape \(1, 1, 4, 12\), got \(1, 1, 4, 16\)"),
        (dict(k=torch.ones(1, 1, 1, 32).half()), TypeError, "k must have the dtype of kept"),
        (dict(v=torch.ones(1, 1, 2, 32)), ValueError, r"v must have the shape \(1, 1, 1, 32\), got \(1, 1, 2, 32\)"),
        (dict(kept=torch.ones(2, 1, 1, 2, 32).int()), TypeError, "kept must be .*int32"),
        (dict(kept=torch.ones(2, 1, 1, 2, 24)), ValueError, "power of two from 32 on, got 24"),
        (dict(kept=torch.ones(1, 1, 2, 32)), ValueError, r"kept must have the shape \[2, B, H, sinks \+ window, D\]"),
        (dict(k_codes=torch.ones(1, 1, 4, 8)), TypeError, "k_codes must be uint8, got torch.float32"),
        (dict(k_codes=torch.ones(1, 4, 8).byte()), ValueError, r"k_codes must have the shape \[B, H, S, 16\]"),
        (dict(v_codes=torch.ones(1, 1, 4, 32).byte()[..., ::2]), ValueError, "v_codes must have a last stride of 1"),
        (dict(scales=torch.ones(2, 1, 1, 4)), TypeError, "scales must be float16, got torch.float32"),
        (dict(scales=torch.ones(1, 1, 1, 4).half()), ValueError, r"scales must have the shape \(2, 1, 1, 4\)"),
        (dict(position=torch.tensor([0]).int()), TypeError, "position must be int64, got torch.int32"),
        (dict(position=torch.tensor(0)), ValueError, r"position must have the shape \[T\]"),
        (dict(position=torch.tensor([0]).to("meta")), ValueError, "position must be on"),
        (dict(last=torch.tensor(0)), ValueError, r"last must have the shape \(1,\), got \(\)"),
        (dict(last=torch.tensor([0]).int()), TypeError, "last must be int64"),
        (dict(start=torch.tensor([0, 0])), ValueError, r"start must have the shape \(1,\), got \(2,\)"),
        (dict(sinks=3), ValueError, "sinks must be from 0 to the 2 tokens that kept has room for, got 3"),
        (dict(sinks=-1), ValueError, "sinks must be .* got -1"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        quantized_kv_write(**(valid_arguments() | changes))


def test_out_of_range_is_an_error_on_the_cpu():
    arguments = valid_arguments()
    arguments["position"] = torch.tensor([4])
    with pytest.raises(IndexError):
        quantized_kv_write(**arguments)

# pyright: reportCallIssue=false
# It does not know how many tensors the unpacked buffers are.

import pytest
import torch
from buffers import FORMATS, Buffers, poisoned
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, dtypes, random_tensor, seeds

from qtts_compile.kernels.turboquant.format import Format
from qtts_compile.kernels.turboquant.read import quantized_kv_read, quantized_kv_read_reference, quantized_kv_read_triton
from qtts_compile.kernels.turboquant.write import quantized_kv_write

S = 21
WORST = {3: 0.35, 4: 0.2, 8: 0.05}  # the relative error of no vector below


def int64(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def random_buffers(format: str, batch: int, heads: int, width: int, n_kept: int, dtype: torch.dtype, device: str, layout: str, seed: int) -> Buffers:
    """Return a cache in which every byte was drawn, with finite scales; of e4m3 bits those of NaN are left out."""
    generator = torch.Generator().manual_seed(seed)
    buffers = poisoned(format, batch, heads, S, width, n_kept, dtype, device, layout)
    for tensor in buffers:
        if tensor.dtype == torch.uint8:
            drawn = torch.randint(256, tensor.shape, generator=generator)
            tensor.copy_(torch.where(drawn & 0x7F == 0x7F, 0, drawn) if format == "fp8" else drawn)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return buffers


@given(
    st.sampled_from(FORMATS), st.integers(1, 2), st.sampled_from([1, 3]), st.sampled_from([32, 64, 128]), st.integers(0, 3), st.integers(0, 5),
    st.integers(-1, S), st.lists(st.integers(0, 6), min_size=2, max_size=2), dtypes, st.sampled_from(["contiguous", "transposed", "sliced"]), seeds,
)  # fmt: skip
def test_kernel_equals_reference(device, format, batch, heads, width, sinks, window, last, starts, dtype, layout, seed):
    buffers = random_buffers(format, batch, heads, width, sinks + window, dtype, device, layout, seed)
    arguments = (*buffers, int64([last], device), int64(starts[:batch], device), sinks, format)
    for actual, expected in zip(quantized_kv_read_triton(*arguments), quantized_kv_read_reference(*arguments)):
        assert actual.shape == (batch, heads, S, width) and actual.dtype == dtype and actual.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_reads_what_was_written(device, format, dtype):
    # A prompt of 9 tokens after left padding of 0 and 2, with 3 slots of right padding, then one token at a time.
    sinks, window, starts = 2, 4, [0, 2]
    k, v = (random_tensor(i, (2, 3, S, 64), dtype, device) for i in (0, 1))
    buffers = Buffers(*(tensor.zero_() for tensor in poisoned(format, 2, 3, S, 64, sinks + window, dtype, device)))
    parsed = Format.parse(format)
    start = int64(starts, device)
    for first, end, last in ((0, 12, 8), *((slot, slot + 1, slot) for slot in range(9, 18))):
        position = torch.arange(first, end, device=device)
        quantized_kv_write(k[:, :, first:end], v[:, :, first:end], *buffers, position, int64([last], device), start, sinks, format)
        for x, out, bits in zip((k, v), quantized_kv_read(*buffers, int64([last], device), start, sinks, format), (parsed.k_bits, parsed.v_bits)):
            for row in range(2):
                exact = [*range(starts[row], starts[row] + sinks), *range(last - window + 1, last + 1)]
                assert torch.equal(out[row][:, exact], x[row][:, exact])
                decoded = [slot for slot in range(last + 1) if slot not in exact]
                error = (out[row][:, decoded].float() - x[row][:, decoded].float()).norm(dim=-1) / x[row][:, decoded].float().norm(dim=-1)
                assert (error > 1e-3).all() and (error < WORST[bits]).all()
            assert (out[:, :, max(end, 12) :] == 0).all()


@pytest.mark.parametrize("shape", [(0, 2, 4), (1, 0, 4), (1, 2, 0)])
def test_nothing_to_read(device, shape):
    buffers = poisoned("int4", *shape, 32, 2, torch.float32, device)
    arguments = (*buffers, int64([0], device), torch.zeros(shape[0], dtype=torch.int64, device=device), 1, "int4")
    for read in (quantized_kv_read, quantized_kv_read_triton):
        assert [out.shape for out in read(*arguments)] == [(*shape, 32)] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(device, dtype, format):
    buffers = random_buffers(format, 2, 3, 32, 3, dtype, device, "transposed", 0)
    arguments = (*buffers, int64([8], device), int64([0, 3], device), 1, format)
    torch.library.opcheck(torch.ops.qtts.quantized_kv_read.default, arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(format="int2"), ValueError, "one of int4, k4v3, int3, fp8, got 'int2'"),
        (dict(v_codes=torch.ones(1, 1, 3, 8).byte()), ValueError, r"v_codes must have the shape \(1, 1, 4, 16\), got \(1, 1, 3, 8\)"),
        (dict(start=torch.tensor([0.0])), TypeError, "start must be int64, got torch.float32"),
        (dict(last=torch.tensor([0]).to("meta")), ValueError, "last must be on the device of kept"),
        (dict(sinks=3), ValueError, "sinks must be from 0 to the 2"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    zero = int64([0], "cpu")
    buffers = poisoned("int4", 1, 1, 4, 32, 2, torch.float32, "cpu")
    arguments = dict(**buffers._asdict(), last=zero, start=zero, sinks=1, format="int4")
    with pytest.raises(error, match=message):
        quantized_kv_read(**(arguments | changes))

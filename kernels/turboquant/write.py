"""Quantisation of new keys and values into a KV cache, in place."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options, and do not know its tuples.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_like, check_rank, check_shape
from qtts_compile.kernels.kv_write import assert_in_cache, cache_row
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.rows import with_unit_stride
from qtts_compile.kernels.turboquant.codec import quantize
from qtts_compile.kernels.turboquant.encode import REFUSED, encode_row, is_storable, store_codes
from qtts_compile.kernels.turboquant.format import Format
from qtts_compile.kernels.turboquant.kept import check_buffers, find_kept, kept_rows


def quantized_kv_write(
    k: torch.Tensor, v: torch.Tensor, k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor,
    position: torch.Tensor, last: torch.Tensor, start: torch.Tensor, sinks: int, format: str,
) -> None:  # fmt: skip
    """Quantise ``k`` and ``v`` ``[B, H, T, D]`` into the slots ``position`` ``[T]`` of a cache, and keep the protected tokens as they are.

    The cache is ``k_codes`` and ``v_codes``, uint8 ``[B, H, S, bytes]`` of the ``format`` (see :class:`Format`), ``scales``, float16
    ``[2, B, H, S]`` of keys and of values, and ``kept`` ``[2, B, H, sinks + window, D]`` of the dtype of ``k``. Every token is quantised
    (``codec.quantize``; keys are unbiased). Tokens at most at slot ``last`` (int64 ``[1]``) may be kept beside that: the first ``sinks`` of
    each row of the batch, counted from slot ``start[b]`` (int64 ``[B]``) on, which left padding precedes, and the ``window`` newest, of which
    slot s is at ``sinks + s % window``. What is beyond ``last``, the padding of a prompt, is not kept.

    ``position`` is int64, distinct, and counts from the end when negative. One outside ``[-S, S)`` raises ``IndexError`` on the CPU; on the
    GPU it is not written and trips a device-side assert.

    Raises ``TypeError`` for a wrong dtype, and ``ValueError`` for shapes that do not match, an unknown ``format``, a D that is not a power of
    two from 32 on, ``sinks`` that ``kept`` has no room for, different devices or a buffer whose last stride is not 1. Vectors that
    ``codec.quantize`` refuses raise ``ValueError`` on the CPU, before anything is written, and trip a device-side assert on the GPU.
    """
    torch.ops.qtts.quantized_kv_write.default(k, v, k_codes, v_codes, scales, kept, position, last, start, sinks, format)


def quantized_kv_write_reference(
    k: torch.Tensor, v: torch.Tensor, k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor,
    position: torch.Tensor, last: torch.Tensor, start: torch.Tensor, sinks: int, format: str,
) -> None:  # fmt: skip
    """Compute :func:`quantized_kv_write` in plain PyTorch."""
    parsed = Format.parse(format)
    encoded = quantize(k, parsed.k_bits, unbiased=True), quantize(v, parsed.v_bits, unbiased=False)
    slots = torch.where(position < 0, position + k_codes.shape[2], position)
    rows = kept_rows(slots, last, start, sinks, kept.shape[3] - sinks)
    for side, (x, codes) in enumerate(((k, k_codes), (v, v_codes))):
        codes[:, :, position], scales[side][:, :, position] = encoded[side]
        for row in rows:
            batch, token = (row >= 0).nonzero(as_tuple=True)
            kept[side, batch, :, row[batch, token]] = x[batch, :, token]


def check_quantized_kv_write(
    k: torch.Tensor, v: torch.Tensor, k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor,
    position: torch.Tensor, last: torch.Tensor, start: torch.Tensor, sinks: int, format: str,
) -> None:  # fmt: skip
    """Raise ``TypeError`` or ``ValueError`` unless :func:`quantized_kv_write` accepts the arguments."""
    check_buffers(k_codes, v_codes, scales, kept, last, start, sinks, format)
    check_rank("position", position, "T")
    if position.dtype != torch.int64:
        raise TypeError(f"position must be int64, got {position.dtype}; convert it with .long()")
    for name, tensor in (("k", k), ("v", v)):
        check_like(name, tensor, "kept", kept)
        check_shape(name, tensor, *kept.shape[1:3], position.shape[0], kept.shape[4])
    check_like("position", position, "last", last)


@triton.jit
def write_vector(
    x, is_key, Codes_ptr, Scale_ptr, Kept_ptr, kept_stride, writable, slot, last, start,
    BITS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Write a key or value ``x`` ``[D]`` to the codes and the scale at the pointers, and to the kept tokens of the head from ``Kept_ptr`` on."""
    columns = tl.arange(0, x.shape[0])
    is_sink, is_recent = find_kept(slot, last, start, SINKS, WINDOW)
    if SINKS > 0:
        tl.store(Kept_ptr + (slot - start) * kept_stride + columns, x, mask=writable & is_sink)
    if WINDOW > 0:
        tl.store(Kept_ptr + (SINKS + slot % WINDOW) * kept_stride + columns, x, mask=writable & is_recent)
    codes, scale = encode_row(x.to(tl.float32), is_key, BITS)
    store_codes(Codes_ptr, codes, writable, BITS)
    tl.store(Scale_ptr, scale.to(tl.float16), mask=writable)
    tl.device_assert(is_storable(scale), REFUSED)


@triton.jit
def _quantized_kv_write_kernel(
    K_ptr, V_ptr, K_codes_ptr, V_codes_ptr, Scales_ptr, Kept_ptr, Position_ptr, Last_ptr, Start_ptr, T, S,
    k_strides, v_strides, k_codes_strides, v_codes_strides, scales_strides, kept_strides, stride_position, stride_start,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // T).to(tl.int64)
    token = (tl.program_id(0) % T).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot, in_cache = cache_row(Position_ptr, token, stride_position, S)
    assert_in_cache(in_cache)
    last = tl.load(Last_ptr)
    start = tl.load(Start_ptr + batch * stride_start)
    Scales_ptr += batch * scales_strides[1] + head * scales_strides[2] + slot * scales_strides[3]
    Kept_ptr += batch * kept_strides[1] + head * kept_strides[2]
    columns = tl.arange(0, D)
    if tl.program_id(2) == 0:
        k = tl.load(K_ptr + batch * k_strides[0] + head * k_strides[1] + token * k_strides[2] + columns)
        K_codes_ptr += batch * k_codes_strides[0] + head * k_codes_strides[1] + slot * k_codes_strides[2]
        write_vector(k, True, K_codes_ptr, Scales_ptr, Kept_ptr, kept_strides[3], in_cache, slot, last, start, K_BITS, SINKS, WINDOW)
    else:
        v = tl.load(V_ptr + batch * v_strides[0] + head * v_strides[1] + token * v_strides[2] + columns)
        V_codes_ptr += batch * v_codes_strides[0] + head * v_codes_strides[1] + slot * v_codes_strides[2]
        Scales_ptr += scales_strides[0]
        Kept_ptr += kept_strides[0]
        write_vector(v, False, V_codes_ptr, Scales_ptr, Kept_ptr, kept_strides[3], in_cache, slot, last, start, V_BITS, SINKS, WINDOW)


def quantized_kv_write_triton(
    k: torch.Tensor, v: torch.Tensor, k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor,
    position: torch.Tensor, last: torch.Tensor, start: torch.Tensor, sinks: int, format: str,
) -> None:  # fmt: skip
    """Launch the kernel of :func:`quantized_kv_write`."""
    if k.numel() == 0:
        return
    parsed = Format.parse(format)
    k, v = with_unit_stride(k), with_unit_stride(v)
    batch, heads, tokens, width = k.shape
    _quantized_kv_write_kernel[(batch * tokens, heads, 2)](
        k, v, k_codes, v_codes, scales, kept, position, last, start, tokens, k_codes.shape[2],
        k.stride(), v.stride(), k_codes.stride(), v_codes.stride(), scales.stride(), kept.stride(), position.stride(0), start.stride(0),
        D=width, K_BITS=parsed.k_bits, V_BITS=parsed.v_bits, SINKS=sinks, WINDOW=kept.shape[3] - sinks,
        num_warps=1, debug=True, sanitize_overflow=False,
    )  # fmt: skip


def quantized_kv_write_fake(*_: object) -> None:
    """Allocate nothing: :func:`quantized_kv_write` has no result."""


define_op(
    "quantized_kv_write(Tensor k, Tensor v, Tensor(a!) k_codes, Tensor(b!) v_codes, Tensor(c!) scales, Tensor(d!) kept, "
    "Tensor position, Tensor last, Tensor start, int sinks, str format) -> ()",
    check=check_quantized_kv_write,
    cuda=quantized_kv_write_triton,
    cpu=quantized_kv_write_reference,
    fake=quantized_kv_write_fake,
)

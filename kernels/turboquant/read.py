"""Dense keys and values of a quantised KV cache, for attention that cannot read packed ones."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options, and do not know its tuples.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.sizes import cdiv
from qtts_compile.kernels.turboquant.codec import dequantize
from qtts_compile.kernels.turboquant.decode import decode_words, load_words, words_of
from qtts_compile.kernels.turboquant.format import Format
from qtts_compile.kernels.turboquant.kept import check_buffers, find_kept, kept_rows
from qtts_compile.kernels.turboquant.rotation import unrotate_rows


def quantized_kv_read(
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, last: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the keys and the values, contiguous ``[B, H, S, D]`` of the dtype of ``kept``, of a cache that ``quantized_kv_write`` wrote.

    The arguments are those of :func:`quantized_kv_write`. Tokens that ``kept`` has for this ``last``
    and ``start`` are exact; the others are decoded in float32 and rounded once. Slots beyond ``last`` hold what was written there, zeros where
    nothing was and the buffers were zero.

    The ``window`` slots up to ``last``, and the sinks, must have been written with no larger ``last``: a cache cannot be read as of an
    earlier token, because newer ones took the places of its window.

    Raises ``TypeError`` or ``ValueError`` as :func:`quantized_kv_write` does.
    """
    return torch.ops.qtts.quantized_kv_read.default(k_codes, v_codes, scales, kept, last, start, sinks, format)


def quantized_kv_read_reference(
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, last: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Compute :func:`quantized_kv_read` in plain PyTorch."""
    parsed = Format.parse(format)
    outputs = quantized_kv_read_fake(k_codes, v_codes, scales, kept)
    rows = kept_rows(torch.arange(k_codes.shape[2], device=kept.device), last, start, sinks, kept.shape[3] - sinks)
    for side, (out, codes, bits) in enumerate(zip(outputs, (k_codes, v_codes), (parsed.k_bits, parsed.v_bits), strict=True)):
        out.copy_(dequantize(codes, scales[side], bits))
        for row in reversed(rows):  # a sink that is recent too is read as a sink
            batch, slot = (row >= 0).nonzero(as_tuple=True)
            out[batch, :, slot] = kept[side, batch, :, row[batch, slot]]
    return outputs


def check_quantized_kv_read(
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, last: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str,
) -> None:  # fmt: skip
    """Raise ``TypeError`` or ``ValueError`` unless :func:`quantized_kv_read` accepts the arguments."""
    check_buffers(k_codes, v_codes, scales, kept, last, start, sinks, format)


@triton.jit
def _read_vectors(
    Codes_ptr, Scales_ptr, Kept_ptr, Out_ptr, kept_stride, in_bounds, kept_row, is_kept,
    D: tl.constexpr, BITS: tl.constexpr, HAS_KEPT: tl.constexpr,
):  # fmt: skip
    """Decode the slots whose codes and scales are at the pointers ``[N, 1]``, and store them at ``Out_ptr`` ``[N, 1]``."""
    columns = tl.arange(0, D)[None, :]
    scale = tl.load(Scales_ptr, mask=in_bounds, other=0.0).to(tl.float32)
    words = load_words(Codes_ptr, tl.arange(0, words_of(D, BITS))[None, :], in_bounds, D, BITS, (1, 4))
    x = tl.reshape(decode_words(words, BITS, tl.float32), [Codes_ptr.shape[0], D]) * scale
    if BITS < 8:
        x = unrotate_rows(x)
    x = x.to(Out_ptr.dtype.element_ty)
    if HAS_KEPT:
        x = tl.where(is_kept, tl.load(Kept_ptr + kept_row * kept_stride + columns, mask=in_bounds & is_kept, other=0.0), x)
    tl.store(Out_ptr + columns, x, mask=in_bounds)


@triton.jit
def _quantized_kv_read_kernel(
    K_codes_ptr, V_codes_ptr, Scales_ptr, Kept_ptr, Last_ptr, Start_ptr, K_ptr, V_ptr, H, S,
    k_codes_strides, v_codes_strides, scales_strides, kept_strides, stride_start,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    slots = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    in_bounds = slots < S
    start = tl.load(Start_ptr + batch * stride_start)
    is_sink, is_recent = find_kept(slots, tl.load(Last_ptr), start, SINKS, WINDOW)
    kept_row = tl.where(is_sink, slots - start, SINKS + slots % WINDOW if WINDOW > 0 else 0)
    is_kept = is_sink | is_recent
    HAS_KEPT: tl.constexpr = SINKS + WINDOW > 0
    Scales_ptr += batch * scales_strides[1] + head * scales_strides[2] + slots * scales_strides[3]
    Kept_ptr += batch * kept_strides[1] + head * kept_strides[2]
    out_offset = (tl.program_id(0).to(tl.int64) * S + slots) * D
    if tl.program_id(2) == 0:
        _read_vectors(
            K_codes_ptr + batch * k_codes_strides[0] + head * k_codes_strides[1] + slots * k_codes_strides[2],
            Scales_ptr, Kept_ptr, K_ptr + out_offset, kept_strides[3], in_bounds, kept_row, is_kept, D, K_BITS, HAS_KEPT,
        )  # fmt: skip
    else:
        _read_vectors(
            V_codes_ptr + batch * v_codes_strides[0] + head * v_codes_strides[1] + slots * v_codes_strides[2],
            Scales_ptr + scales_strides[0], Kept_ptr + kept_strides[0],
            V_ptr + out_offset, kept_strides[3], in_bounds, kept_row, is_kept, D, V_BITS, HAS_KEPT,
        )  # fmt: skip


def quantized_kv_read_triton(
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, last: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch the kernel of :func:`quantized_kv_read`."""
    k, v = quantized_kv_read_fake(k_codes, v_codes, scales, kept)
    if k.numel() == 0:
        return k, v
    parsed = Format.parse(format)
    batch, heads, slots, width = k.shape
    block_n = max(1, 2048 // width)
    _quantized_kv_read_kernel[(batch * heads, cdiv(slots, block_n), 2)](
        k_codes, v_codes, scales, kept, last, start, k, v, heads, slots,
        k_codes.stride(), v_codes.stride(), scales.stride(), kept.stride(), start.stride(0),
        D=width, K_BITS=parsed.k_bits, V_BITS=parsed.v_bits, SINKS=sinks, WINDOW=kept.shape[3] - sinks, BLOCK_N=block_n,
        num_warps=4, sanitize_overflow=False,
    )  # fmt: skip
    return k, v


def quantized_kv_read_fake(
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the results of :func:`quantized_kv_read`."""
    shape = *k_codes.shape[:3], kept.shape[4]
    return torch.empty(shape, dtype=kept.dtype, device=kept.device), torch.empty(shape, dtype=kept.dtype, device=kept.device)


define_op(
    "quantized_kv_read(Tensor k_codes, Tensor v_codes, Tensor scales, Tensor kept, Tensor last, Tensor start, int sinks, str format) "
    "-> (Tensor, Tensor)",
    check=check_quantized_kv_read,
    cuda=quantized_kv_read_triton,
    cpu=quantized_kv_read_reference,
    fake=quantized_kv_read_fake,
)

"""Which tokens a quantised KV cache also keeps as they are: attention sinks (arXiv 2309.17453) and the most recent ones."""

# pyright: reportReturnType=false
# Triton's stubs do not know its tensors.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_device, check_float_dtype, check_shape
from qtts_compile.kernels.turboquant.format import Format

CODE_ALIGNMENT = 4  # bytes: codes are read in words


def kept_rows(slots: torch.Tensor, last: torch.Tensor, start: torch.Tensor, sinks: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each row of a batch and each of the int64 ``slots`` ``[N]`` where ``kept`` has it as a sink and as a recent token.

    Both are int64 ``[B, N]`` with -1 for "not there". Slot s is sink s - ``start[b]`` if that is in ``[0, sinks)`` and recent, at the place
    ``sinks + s % window``, if it is in ``(last - window, last]``. Slots beyond ``last`` are neither.
    """
    counts = slots <= last
    sink = slots - start[:, None]
    is_sink = (sink >= 0) & (sink < sinks) & counts
    is_recent = ((slots > last - window) & counts).expand_as(sink)
    return torch.where(is_sink, sink, -1), torch.where(is_recent, sinks + slots % max(window, 1), -1)


def check_buffers(
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, last: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str, name_of_last: str = "last",
) -> None:  # fmt: skip
    """Raise ``TypeError`` or ``ValueError`` unless these are the buffers of one quantised cache, on one device."""
    parsed = Format.parse(format)
    check_float_dtype("kept", kept)
    if kept.dim() != 5 or kept.shape[0] != 2:
        raise ValueError(f"kept must have the shape [2, B, H, sinks + window, D], got {tuple(kept.shape)}")
    _, batch, heads, n_kept, head_dim = kept.shape
    if not 0 <= sinks <= n_kept:
        raise ValueError(f"sinks must be from 0 to the {n_kept} tokens that kept has room for, got {sinks}")
    if k_codes.dim() != 4:
        raise ValueError(f"k_codes must have the shape [B, H, S, {parsed.key_bytes(head_dim)}], got {tuple(k_codes.shape)}")
    slots = k_codes.shape[2]
    for name, tensor, dtype, shape in (
        ("k_codes", k_codes, torch.uint8, (batch, heads, slots, parsed.key_bytes(head_dim))),
        ("v_codes", v_codes, torch.uint8, (batch, heads, slots, parsed.value_bytes(head_dim))),
        ("scales", scales, torch.float16, (2, batch, heads, slots)),
        (name_of_last, last, torch.int64, (1,)),
        ("start", start, torch.int64, (batch,)),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
        check_shape(name, tensor, *shape)
        check_device(name, tensor, "kept", kept)
    for name, tensor in (("k_codes", k_codes), ("v_codes", v_codes), ("kept", kept)):
        if tensor.stride(-1) != 1 and tensor.numel():
            raise ValueError(f"{name} must have a last stride of 1, got the strides {tensor.stride()}")
    for name, tensor in (("k_codes", k_codes), ("v_codes", v_codes)):
        if tensor.numel() and any(size % CODE_ALIGNMENT for size in (tensor.storage_offset(), *tensor.stride()[:3])):
            raise ValueError(
                f"the rows of {name} must begin at multiples of {CODE_ALIGNMENT} bytes of its storage, got the strides {tensor.stride()} and the"
                f" offset {tensor.storage_offset()}: slice whole rows"
            )


@triton.jit
def find_kept(slot, last, start, SINKS: tl.constexpr, WINDOW: tl.constexpr):
    """Return whether a slot is a sink and whether it is recent; where the two are kept is for the caller to say."""
    sink = slot - start
    return (sink >= 0) & (sink < SINKS) & (slot <= last), (slot > last - WINDOW) & (slot <= last)

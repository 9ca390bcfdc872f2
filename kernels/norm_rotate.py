"""Normalise and rotate (RoPE) the head of one token in a program's registers, with the rounding of eager PyTorch, for kernels to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Triton's stubs do not know its static loops and tuples.

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from qtts_compile.kernels.interpreted import IS_INTERPRETED
from qtts_compile.kernels.rotary import select_axis


@triton.jit
def load_weight(W_ptr, columns, partners, D: tl.constexpr):
    """Load the weight of a norm at the columns of a head and at their partners; without a norm there is none."""
    if W_ptr is None:
        return ()
    else:
        return tl.load(W_ptr + columns, mask=columns < D, other=0.0), tl.load(W_ptr + partners, mask=columns < D, other=0.0)


@triton.jit
def load_angles(
    Cos_ptr, Sin_ptr, stride_axis, columns, D: tl.constexpr,
    HAS_SECTIONS: tl.constexpr, IS_INTERLEAVED: tl.constexpr, AXIS_1: tl.constexpr, AXIS_2: tl.constexpr, STAYS: tl.constexpr = False,
):  # fmt: skip
    """Request the cosines and sines of a token's heads ``[D]``; for ``STAYS`` see flash_decoding's ``load_mask``."""
    frequency = columns % (D // 2)
    offsets = frequency if IS_INTERLEAVED else columns
    if HAS_SECTIONS:
        offsets += select_axis(frequency, IS_INTERLEAVED, AXIS_1, AXIS_2).to(tl.int64) * stride_axis
    cos = tl.load(Cos_ptr + offsets, mask=columns < D, other=0.0, volatile=STAYS)
    return cos, tl.load(Sin_ptr + offsets, mask=columns < D, other=0.0, volatile=STAYS)


@triton.jit
def _product(x, y):
    """Multiply without joining a later addition (FMA), which would leave out the rounding in between."""
    if IS_INTERPRETED:
        return x * y
    else:
        return libdevice.mul_rn(x, y)


@triton.jit
def load_head(X_ptr, in_bounds, columns, partners, STAYS: tl.constexpr = False):
    """Request the head ``[D]`` at ``X_ptr``: its columns, and for each its partner, half a head away; for ``STAYS`` see ``load_mask``."""
    return tl.load(X_ptr + columns, mask=in_bounds, other=0.0, volatile=STAYS), tl.load(X_ptr + partners, mask=in_bounds, other=0.0, volatile=STAYS)


@triton.jit
def norm_rotate(head, weight, eps, angles, D: tl.constexpr):
    """Normalise and rotate a head from :func:`load_head`.

    What was loaded for it is converted here and not before: a conversion waits for what it converts, and all that stands behind it with it.
    """
    dtype: tl.constexpr = head[0].dtype
    x, partner = head[0].to(tl.float32), head[1].to(tl.float32)
    if len(weight) > 0:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        x = (weight[0].to(tl.float32) * (x * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        partner = (weight[1].to(tl.float32) * (partner * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    cos, sin = angles[0].to(tl.float32), angles[1].to(tl.float32)
    sin = tl.where(tl.arange(0, x.shape[0]) < D // 2, -sin, sin)
    return (_product(x, cos).to(dtype).to(tl.float32) + _product(partner, sin).to(dtype).to(tl.float32)).to(dtype)

"""A few numbers on their way to the host, copied by a kernel."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_shape
from qtts_compile.kernels.sizes import cdiv, next_power_of_2

MAX_BLOCK = 1024


def copy_to_host(source: torch.Tensor, host: torch.Tensor) -> None:
    """Set ``host`` to ``source``, both contiguous and of one shape and dtype, once the current stream of ``source``'s GPU comes to it.

    The host may read it after an event that is recorded in the stream later. ``host`` is pinned memory, which a kernel writes to: between the kernels
    of a CUDA graph a transfer by the copy engine takes some 4 us longer (NVIDIA H100), as what surrounds it waits for it. A ``source`` on the CPU is
    copied at once.

    Raises ``TypeError`` for two dtypes and ``ValueError`` for two shapes, a tensor that is not contiguous, or a ``host`` that is not on the CPU or,
    for a ``source`` on a GPU, not pinned.
    """
    if host.dtype != source.dtype:
        raise TypeError(f"host must be {source.dtype} as source, got {host.dtype}")
    check_shape("host", host, *source.shape)
    if not (source.is_contiguous() and host.is_contiguous()):
        raise ValueError(f"source and host must be contiguous, got the strides {source.stride()} and {host.stride()}")
    if host.device.type != "cpu" or source.is_cuda and not host.is_pinned() and host.numel() > 0:  # empty memory never is
        raise ValueError(f"host must be pinned memory of the CPU, got {host.device}; allocate it with pin_memory=True")
    if source.is_cuda:
        copy_to_host_triton(source, host)
    else:
        host.copy_(source)


@triton.jit
def _copy_kernel(Source_ptr, Host_ptr, N, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Host_ptr + places, tl.load(Source_ptr + places, mask=places < N), mask=places < N)


def copy_to_host_triton(source: torch.Tensor, host: torch.Tensor) -> None:
    """Launch the kernel of :func:`copy_to_host`."""
    if count := source.numel():
        block = min(MAX_BLOCK, next_power_of_2(count))
        _copy_kernel[(cdiv(count, block),)](source, host, count, BLOCK=block, num_warps=1)

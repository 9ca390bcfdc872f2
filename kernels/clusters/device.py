"""What a GPU must be for kernels of thread block clusters, and how its multiprocessors divide their memory for them."""

import ctypes
import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
import triton

CTAS = 16  # of a cluster: more than the 8 that every GPU with clusters must have room for
WARPS = 4  # of a CTA
HOPPER = (9, 0)
# Of a multiprocessor's memory this much is to be shared memory, the rest L1 cache. By itself the driver takes what as many CTAs as fit would need. If
# that is not what the kernels before and after have, a multiprocessor divides its memory anew, which waits until it is empty: 12 us a layer.
SHARED_PERCENT = 58
CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT

log = logging.getLogger(__name__)
_HAVE_ROOM: dict[torch.device, bool] = {}
_DIVIDED: weakref.WeakSet[Any] = weakref.WeakSet()


@functools.cache
def has_clusters(device: torch.device) -> bool:
    """Tell whether a GPU is of the kind on which kernels of clusters were tested."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER


def have_room(device: torch.device, compile_kernel: Callable[[], Any]) -> bool:
    """Tell whether a GPU has as many multiprocessors side by side as a cluster needs; a part of one (MIG) may not. A kernel is asked, the first."""
    if device not in _HAVE_ROOM:
        kernel = compile_kernel()
        kernel.run  # loads it  # noqa: B018
        driver: Any = triton.runtime.driver.active
        clusters = driver.utils.cuOccupancyMaxActiveClusters(kernel.function, kernel.metadata.shared, CTAS)
        _HAVE_ROOM[device] = clusters > 0
        if not clusters:
            log.warning("%s has no room for a cluster of %d thread blocks: kernels without clusters are used", device, CTAS)
    return _HAVE_ROOM[device]


def divide_memory(kernel: Any) -> None:
    """Have multiprocessors divide their memory for a compiled and loaded kernel as for those beside it; nothing is done for one that was given."""
    if kernel in _DIVIDED:
        return
    _DIVIDED.add(kernel)
    if error := _cuda().cuFuncSetAttribute(ctypes.c_void_p(kernel.function), CARVEOUT, SHARED_PERCENT):
        log.warning("CUDA refuses to divide a multiprocessor's memory for %s (error %d): it is slower", kernel.metadata.name, error)


@functools.cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")

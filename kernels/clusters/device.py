"""What a GPU must be for kernels of thread block clusters."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import triton

CTAS = 16  # of a cluster: more than the 8 that every GPU with clusters must have room for
WARPS = 4  # of a CTA
HOPPER = (9, 0)

log = logging.getLogger(__name__)
_HAVE_ROOM: dict[torch.device, bool] = {}


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

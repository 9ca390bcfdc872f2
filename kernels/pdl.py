"""Programmatic dependent launch: kernels that start, and request their parameters, while the kernel before them still runs.

Each kernel that is launched so announces itself before it waits, and waits in every program, so that the end of one implies the end of all before it.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def has_pdl(device: torch.device) -> bool:
    """Tell whether a kernel on ``device`` may start before its predecessor has ended (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl_options(device: torch.device) -> dict[str, bool]:
    """Return what a launch is given by which its kernel starts early, where it can: the constant that it reads, and Triton's launch option."""
    pdl = has_pdl(device)
    return {"HAS_PDL": pdl, "launch_pdl": pdl}


@triton.jit
def announce(HAS_PDL: tl.constexpr):
    """Let the next kernel start once every program of this one has, to request its weights meanwhile."""
    if HAS_PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(HAS_PDL: tl.constexpr):
    """Wait until all earlier kernels have ended. Before that, a program writes nothing, and reads only what no kernel that announces itself writes.

    Those are parameters, positions, and the settings and numbers of draws: a kernel of another package has ended, as it does not announce itself,
    when the one after it begins.
    """
    if HAS_PDL:
        gdc_wait()

"""Weights for the kernels behind, brought to L2 while attention leaves memory idle, for kernels of clusters to use.

The kernel behind has all its weights in flight by then, and there is no room on the multiprocessors for the one behind that, which would request its
own, until the CTAs of this one leave.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# Gluon's types do not know its tensors' operators.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.memory import N_CTAS
from qtts_compile.kernels.ptx.global_memory import prefetch_bytes


@gluon.jit
def prefetch_share(First_ptr, Second_ptr, k_head, rank, bytes, is_time):
    """Prefetch a CTA's share of the beginning of two weights, so many ``bytes`` of each, if it ``is_time``."""
    offset = (k_head.to(gl.int64) * N_CTAS + rank) * bytes
    bytes = gl.where(is_time, bytes, 0)
    prefetch_bytes(First_ptr.to(gl.int64) + offset, bytes)
    prefetch_bytes(Second_ptr.to(gl.int64) + offset, bytes)

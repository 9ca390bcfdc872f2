"""Instructions for Gluon kernels of thread block clusters: programs ("CTAs") that run together and write into each other's shared memory (PTX ISA).

Memory is used by address, and barriers are of the kind ``mbarrier`` with one phase, which bytes complete: who sends data into another CTA needs no
fence, and who waits for it no barrier. All CTAs of a cluster hold the same tensors, as far as Gluon knows.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Gluon's types do not know its tensors' operators.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from qtts_compile.kernels.clusters.memory import memory_layout
from qtts_compile.kernels.ptx.shared_memory import address_of_memory


@gluon.jit
def allocate(BYTES: gl.constexpr):
    """Return all the shared memory of a kernel, to be kept alive to its end, and the address at which it begins."""
    layout: gl.constexpr = memory_layout()
    memory = gl.allocate_shared_memory(gl.int64, [BYTES // 8, 1], layout)
    mbarrier.init(memory.index(31), 1)  # of no use, but that Triton declares the memory
    return memory, address_of_memory()


@gluon.jit
def cluster_rank():
    """Return the number of this CTA in its cluster."""
    return gl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def prepare_barriers(address):
    """Make two barriers, at ``address`` and 8 bytes after it, each complete when as many bytes have arrived as :func:`expect_bytes` says."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .u32 t;
        mov.u32 t, %tid.x;
        setp.eq.u32 p, t, 0;
        @p mbarrier.init.shared::cta.b64 [$1], 1;
        @p mbarrier.init.shared::cta.b64 [$1+8], 1;
        @p fence.mbarrier_init.release.cluster;
        mov.u32 $0, 0;
        }""",
        "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def expect_bytes(address, bytes):
    """Say once how many bytes complete the barrier at ``address``; some may have arrived."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .u32 t; .reg .u64 s;
        mov.u32 t, %tid.x;
        setp.eq.u32 p, t, 0;
        @p mbarrier.arrive.expect_tx.shared::cta.b64 s, [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,r,r", [address, bytes], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def arrive_at_cluster():
    """Tell the cluster that this CTA's barriers are ready, which the fence behind their initialisation has published."""
    gl.inline_asm_elementwise("barrier.cluster.arrive.relaxed.aligned; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_cluster():
    """Wait until all CTAs of the cluster have arrived."""
    gl.inline_asm_elementwise("barrier.cluster.wait.acquire.aligned; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_bytes(address):
    """Wait until the barrier at ``address`` is complete."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred done;
        again:
        mbarrier.try_wait.parity.shared::cta.b64 done, [$1], 0;
        @!done bra again;
        mov.u32 $0, 0;
        }""",
        "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def request_bytes(target, Source_ptr, bytes, barrier):
    """Copy from global to shared memory, a multiple of 16 bytes, in the background."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .u32 t;
        mov.u32 t, %tid.x;
        setp.eq.u32 p, t, 0;
        @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$2], $3, [$4];
        mov.u32 $0, 0;
        }""",
        "=r,r,l,r,r", [target, Source_ptr.to(gl.int64), bytes, barrier], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip

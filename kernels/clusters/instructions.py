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

from qtts_compile.kernels import pdl
from qtts_compile.kernels.clusters.memory import memory_layout

announce, wait_for_inputs = gluon.jit(pdl.announce.fn), gluon.jit(pdl.wait_for_inputs.fn)


@gluon.jit
def allocate(BYTES: gl.constexpr):
    """Return all the shared memory of a kernel, to be kept alive to its end, and the address at which it begins."""
    layout: gl.constexpr = memory_layout()
    memory = gl.allocate_shared_memory(gl.int64, [BYTES // 8, 1], layout)
    mbarrier.init(memory.index(31), 1)  # of no use, but that Triton declares the memory
    return memory, gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)


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
def wait_for_cta():
    """Wait for all warps of the CTA."""
    gl.inline_asm_elementwise("bar.sync 0; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


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


@gluon.jit
def prefetch_bytes(address, bytes):
    """Bring a multiple of 16 bytes of global memory to L2, in the background; 0 bring nothing."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .u32 t;
        mov.u32 t, %tid.x;
        setp.eq.u32 p, t, 0;
        setp.gt.and.s32 p, $2, 0, p;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [address, bytes], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_global_half(pointers, is_loaded):
    """Load 16 bits at each pointer into a word, as :func:`load_global_2` does."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.u16 $0, [$1]; }",
        "=&r,l,r", [pointers.to(gl.int64), is_loaded], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_global_byte(pointers, is_loaded):
    """Load a byte at each pointer into a word, as :func:`load_global_2` does."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.u8 $0, [$1]; }",
        "=&r,l,r", [pointers.to(gl.int64), is_loaded], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_global_2(pointers, is_loaded):
    """Load two words that follow each other at each pointer where ``is_loaded``, an int32, is not zero, and zeros elsewhere."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; @p ld.global.v2.b32 {$0, $1}, [$2]; }",
        "=&r,=&r,l,r", [pointers.to(gl.int64), is_loaded], dtype=(gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_global_4(pointers, is_loaded):
    """Load four words that follow each other, as :func:`load_global_2` does."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.s32 p, $5, 0;
        mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
        @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
        }""",
        "=&r,=&r,=&r,=&r,l,r", [pointers.to(gl.int64), is_loaded], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_shared(addresses):
    """Load a word of 32 bits at each address."""
    return gl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [addresses], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_shared_byte(addresses):
    """Load a byte at each address."""
    return gl.inline_asm_elementwise("ld.shared.u8 $0, [$1];", "=r,r", [addresses], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_shared_half(addresses):
    """Load a bfloat16 at each address, as float32."""
    words = gl.inline_asm_elementwise("ld.shared.u16 $0, [$1];", "=r,r", [addresses], dtype=gl.int32, is_pure=False, pack=1)
    return (words << 16).to(gl.float32, bitcast=True)


@gluon.jit
def load_shared_2(addresses):
    """Load words at addresses of which each thread has pairs that follow each other."""
    return gl.inline_asm_elementwise("ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r,r", [addresses], dtype=gl.int32, is_pure=False, pack=2)


@gluon.jit
def load_shared_4(addresses):
    """Load words at addresses of which each thread has fours that follow each other."""
    return gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r,r,r,r", [addresses], dtype=gl.int32, is_pure=False, pack=4
    )


@gluon.jit
def load_shared_2_each(addresses):
    """Load two words that follow each other at each address."""
    return gl.inline_asm_elementwise("ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", [addresses], dtype=(gl.int32, gl.int32), is_pure=False, pack=1)


@gluon.jit
def load_shared_4_each(addresses):
    """Load four words that follow each other at each address."""
    return gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [addresses],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_shared(addresses, words, is_stored):
    """Store words of 32 bits where ``is_stored``, an int32, is not zero."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.u32 $0, 0; }",
        "=r,r,r,r", [addresses, words, is_stored], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_floats(addresses):
    """Load a float32 at each address."""
    return load_shared(addresses).to(gl.float32, bitcast=True)


@gluon.jit
def load_floats_2(addresses):
    """Load two float32 that follow each other at each address."""
    first, second = load_shared_2_each(addresses)
    return first.to(gl.float32, bitcast=True), second.to(gl.float32, bitcast=True)


@gluon.jit
def load_floats_4(addresses):
    """Load four float32 that follow each other at each address."""
    words, floats = load_shared_4_each(addresses), ()
    for i in gl.static_range(4):
        floats = floats + (words[i].to(gl.float32, bitcast=True),)
    return floats


@gluon.jit
def store_floats(addresses, values):
    """Store a float32 at each address."""
    store_shared(addresses, values.to(gl.int32, bitcast=True), addresses * 0 + 1)


@gluon.jit
def store_shared_2(addresses, values):
    """Store float32 at addresses of which each thread has pairs that follow each other."""
    gl.inline_asm_elementwise(
        "{ st.shared.v2.f32 [$2], {$4, $5}; mov.u32 $0, 0; mov.u32 $1, 0; }",
        "=r,=r,r,r,f,f", [addresses, values], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def store_shared_2_each(addresses, first, second):
    """Store two float32 that follow each other at each address."""
    gl.inline_asm_elementwise(
        "{ st.shared.v2.f32 [$1], {$2, $3}; mov.u32 $0, 0; }", "=r,r,f,f", [addresses, first, second], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def store_of_thread(address, values):
    """Store the one float32 that each thread has, one after the other."""
    gl.inline_asm_elementwise(
        "{ .reg .u32 t; mov.u32 t, %tid.x; mad.lo.u32 t, t, 4, $1; st.shared.f32 [t], $2; mov.u32 $0, 0; }",
        "=r,r,f", [address, values], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_global(pointers, words, is_stored):
    """Store words, from whichever CTA: ``gl.store`` lets the first of a cluster store what all hold alike."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r", [pointers.to(gl.int64), words, is_stored], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_global_byte(pointers, words, is_stored):
    """Store the lowest bytes of words, as :func:`store_global` does."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b8 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r", [pointers.to(gl.int64), words, is_stored], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_global_float16(pointers, values, is_stored):
    """Round float32 to float16 and store it, as :func:`store_global` does."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b16 half; setp.ne.s32 p, $3, 0; cvt.rn.f16.f32 half, $2; @p st.global.b16 [$1], half; mov.u32 $0, 0; }",
        "=r,l,f,r", [pointers.to(gl.int64), values, is_stored], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def as_words(pointer):
    """Return a pointer to words of 32 bits."""
    return pointer.to(gl.pointer_type(gl.int32))

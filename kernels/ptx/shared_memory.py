"""Shared memory by address, and the barrier of those who share it, for Gluon kernels (PTX ISA)."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Gluon's types do not know its tensors' operators.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def address_of_memory():
    """Return the address of the shared memory that the kernel declares."""
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def wait_for_cta():
    """Wait for all warps of the CTA."""
    gl.inline_asm_elementwise("bar.sync 0; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


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
def load_shared_2_pairs(addresses):
    """Load two pairs of words that follow each other at the address that each thread has twice."""
    return gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4]; // $5",
        "=r,=r,=r,=r,r,r", [addresses], dtype=(gl.int32, gl.int32), is_pure=False, pack=2,
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
def store_shared_2_pairs(addresses, first, second):
    """Store two pairs of words as :func:`load_shared_2_pairs` loads them."""
    gl.inline_asm_elementwise(
        "{ st.shared.v4.b32 [$2], {$4, $5, $6, $7}; mov.u32 $0, 0; mov.u32 $1, 0; } // $3",
        "=r,=r,r,r,r,r,r,r", [addresses, first, second], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def store_of_thread(address, values):
    """Store the one float32 that each thread has, one after the other."""
    gl.inline_asm_elementwise(
        "{ .reg .u32 t; mov.u32 t, %tid.x; mad.lo.u32 t, t, 4, $1; st.shared.f32 [t], $2; mov.u32 $0, 0; }",
        "=r,r,f", [address, values], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip

"""Words, bytes and halves of global memory, for Gluon kernels (PTX ISA)."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Gluon's types do not know its tensors' operators.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _load_one(kind: str) -> str:
    """Return PTX that loads a number into a word, or zeros."""
    return f"{{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.{kind} $0, [$1]; }}"


LOAD_BYTE, LOAD_HALF, LOAD_WORD = gl.constexpr(_load_one("u8")), gl.constexpr(_load_one("u16")), gl.constexpr(_load_one("b32"))


@gluon.jit
def as_words(pointer):
    """Return a pointer to words of 32 bits."""
    return pointer.to(gl.pointer_type(gl.int32))


@gluon.jit
def load_global_half(pointers, is_loaded):
    """Load 16 bits at each pointer into a word, as :func:`load_global_2` does."""
    return gl.inline_asm_elementwise(LOAD_HALF, "=&r,l,r", [pointers.to(gl.int64), is_loaded], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_global_byte(pointers, is_loaded):
    """Load a byte at each pointer into a word, as :func:`load_global_2` does."""
    return gl.inline_asm_elementwise(LOAD_BYTE, "=&r,l,r", [pointers.to(gl.int64), is_loaded], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_global_1(pointers, is_loaded):
    """Load a word at each pointer, as :func:`load_global_2` does."""
    return gl.inline_asm_elementwise(LOAD_WORD, "=&r,l,r", [pointers.to(gl.int64), is_loaded], dtype=gl.int32, is_pure=False, pack=1)


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

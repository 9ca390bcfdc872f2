"""Words of 32 bits that hold two bfloat16 or float16, or eight codes of a cache, and products of matrices of them, for Gluon kernels (PTX ISA)."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.turboquant import decode
from qtts_compile.kernels.turboquant.levels import TO_BFLOAT16_3, TO_BFLOAT16_4

codes_of_planes = gluon.jit(decode.codes_of_planes.fn)


@gluon.jit
def low(words):
    """Return the first of two bfloat16, as float32."""
    return (words << 16).to(gl.float32, bitcast=True)


@gluon.jit
def high(words):
    """Return the second of two bfloat16, as float32."""
    return (words & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def low_float16(words):
    """Return the first of two float16, as float32."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 half, other; mov.b32 {half, other}, $1; cvt.f32.f16 $0, half; }", "=f,r", [words], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def levels_of_codes(codes, BITS: gl.constexpr):
    """Return the levels of words of eight codes of 3 or 4 bits, each in its nibble, as four words of two bfloat16."""
    assembly: gl.constexpr = TO_BFLOAT16_4 if BITS == 4 else TO_BFLOAT16_3
    return gl.inline_asm_elementwise(assembly, "=&r,=&r,=&r,=&r,r", [codes], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1)


@gluon.jit
def numbers_of_bytes(words):
    """Return words of four e4m3 as two words of two bfloat16, which hold them exactly."""
    # A byte's exponent and mantissa, shifted to the places of those of bfloat16, stand for 2 ** -120 of it, whether it is subnormal or not.
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 x, y, sign, zeros;
        prmt.b32 x, $2, 0, 0x1404;
        prmt.b32 y, $2, 0, 0x3424;
        mov.b32 zeros, 0x80008000;
        and.b32 sign, x, 0x80008000; and.b32 x, x, 0x7F007F00; shr.b32 x, x, 4; or.b32 x, x, sign;
        and.b32 sign, y, 0x80008000; and.b32 y, y, 0x7F007F00; shr.b32 y, y, 4; or.b32 y, y, sign;
        mov.b32 sign, 0x7B807B80;
        fma.rn.bf16x2 $0, x, sign, zeros;
        fma.rn.bf16x2 $1, y, sign, zeros;
        }""",
        "=&r,=&r,r", [words], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def pack(first, second):
    """Round pairs of float32 to words of two bfloat16."""
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [first, second], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def multiply_pairs(first, second):
    """Multiply words of two bfloat16, each product rounded once; bfloat16 has no multiplication of its own before Hopper."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 zeros; mov.b32 zeros, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zeros; }",  # negative zeros, which change no product's sign
        "=r,r,r", [first, second], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def transpose_pairs(words):
    """Exchange, in pairs of words of two bfloat16, the second of the first word with the first of the second."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;", "=&r,=&r,r,r", [words], dtype=gl.int32, is_pure=True, pack=2
    )


@gluon.jit
def add_product(first, second, a_first, a_second, b):
    """Add the product of matrices [16, 16] and [16, 8] of bfloat16, two pairs of words of a lane and one, to one of float32, two pairs of a lane."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};",
        "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r", [first, second, a_first, a_second, b], dtype=(gl.float32, gl.float32), is_pure=True, pack=2,
    )  # fmt: skip

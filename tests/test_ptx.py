"""The machine that runs what Triton compiles (tests/ptx), on PTX written by hand."""

import pytest
import torch

from tests.ptx.machine import DeviceAssert, Machine
from tests.ptx.memory import Memory
from tests.ptx.program import parse

KERNEL = """
.version 8.7
.visible .entry kernel(
	.param .u64 x,
	.param .u32 n
)
{
	.reg .pred 	%p<9>;
	mov.u32 	%r1, %tid.x;
	ld.param.b64 	%rd1, [x];
	ld.param.b32 	%r2, [n];
	mad.wide.u32 	%rd2, %r1, 4, %rd1;
	setp.lt.s32 	%p1, %r1, %r2;
	mov.b32 	%r3, 0f00000000;
	@%p1 ld.global.b32 { %r3 }, [ %rd2 + 0 ];
	BODY
	@%p1 st.global.b32 [ %rd2 + 0 ], { %r3 };
	ret;
}
// -- End function
"""
SUM = "\n".join(f"shfl.sync.bfly.b32 %r4, %r3, {step}, 31, -1;\nadd.f32 %r3, %r3, %r4;" for step in (16, 8, 4, 2, 1))
TWICE = """
	mov.b32 %r5, 0;
$L__BB0_1:
	add.f32 %r3, %r3, %r3; // doubled
	add.s32 %r5, %r5, 1;
	setp.lt.s32 %p2, %r5, 2;
	@%p2 bra $L__BB0_1;
"""


def run(body: str, x: torch.Tensor, n: int, warps: int = 1, start: int = 0) -> torch.Tensor:
    """Run the kernel with a body that changes each lane's ``%r3``, of which the first ``n`` are those of ``x`` from ``start`` on."""
    program = parse(KERNEL.replace("BODY", body))
    Machine(program, warps, {"x": x.data_ptr() + 4 * start, "n": n}, Memory([x]), {}).run()
    return x


def test_lanes_shuffle_within_their_warp_and_those_out_of_bounds_store_nothing():
    x = torch.arange(64.0)
    assert run(SUM, x.clone(), 40, warps=2).tolist() == [sum(range(32))] * 32 + [sum(range(32, 40))] * 8 + list(range(40, 64))


def test_a_loop_ends_when_its_condition_does():
    assert run(TWICE, torch.arange(32.0), 32).tolist() == [4.0 * i for i in range(32)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("bfe.s32 %r3, -16, 3, 4;", -2),
        ("shr.s32 %r3, -16, 40;", -1),
        ("shr.u32 %r3, -16, 40;", 0),
        ("prmt.b32 %r3, 0x11223344, 0x55667788, 0x7604U;", 0x55664488),
        ("lop3.b32 %r3, 12, 10, 7, 0xEA;", (12 & 10) | 7),
        ("div.s32 %r3, -7, 2;", -3),
        ("cvt.rzi.s32.f32 %r3, 0fC0200000;", -2),
        ("mul.wide.s16 %r3, -300, 300;", -90000),
        ("mul.hi.u16 %r3, 40000, 1639;", 40000 * 1639 >> 16),
        ("max.s16x2 %r3, 0x0001FFFF, 0xFFFF0002;", 0x00010002),
    ],
)
def test_whole_numbers(body, expected):
    assert run(body, torch.zeros(32, dtype=torch.int32), 32)[0] == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("max.f32 %r3, 0f7FC00000, 0f3F800000;", 1.0),
        ("fma.rn.f32 %r3, 0f40000000, 0f40400000, 0f3F800000;", 7.0),
        ("ex2.approx.ftz.f32 %r3, 0f40400000;", 8.0),
    ],
)
def test_fractions(body, expected):
    assert run(body, torch.zeros(32), 32)[0] == expected


def test_bfloat16_is_rounded_to_even():
    packed = run("cvt.rn.bf16x2.f32 %r3, 0f3F808000, 0f3F818000;", torch.zeros(32), 32)
    assert packed[:1].view(torch.bfloat16).tolist() == [1.015625, 1.0]


def test_nan_compares_true_where_a_comparison_is_unordered():
    for name, expected in (("lt", 0.0), ("ltu", 1.0), ("ne", 0.0), ("neu", 1.0)):
        body = f"setp.{name}.f32 %p3, 0f7FC00000, 0f3F800000;\nselp.f32 %r3, 0f3F800000, 0f00000000, %p3;"
        assert run(body, torch.zeros(32), 32)[0] == expected


def test_memory_that_no_tensor_has_is_refused():
    with pytest.raises(IndexError, match="4 bytes at .* are in no tensor of the launch"):
        run("", torch.zeros(32), 32, start=1)
    with pytest.raises(IndexError, match="is not a multiple of 4 bytes"):
        run("add.s64 %rd2, %rd2, 2;", torch.zeros(64), 32)


def test_what_the_machine_cannot_do_is_said():
    with pytest.raises(NotImplementedError, match="lanes part at"):
        run("@%p1 bra $L__BB0_1;\n$L__BB0_1:", torch.zeros(32), 5)
    with pytest.raises(NotImplementedError, match="tanh.approx.f32"):
        run("tanh.approx.f32 %r3, %r3;", torch.zeros(32), 32)
    with pytest.raises(DeviceAssert):
        run("call.uni __assertfail, (param0);", torch.zeros(32), 32)

"""The machines for a cluster of CTAs (tests/ptx/cluster.py), on PTX written by hand."""

import random

import pytest
import torch

from tests.ptx.cluster import Cluster
from tests.ptx.mbarrier import ClusterError
from tests.ptx.memory import Memory
from tests.ptx.program import parse

KERNEL = """
.visible .entry kernel(
	.param .u64 x
)
{
	ld.param.b64 	%rd1, [x];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%rank, %cluster_ctarank;
	setp.eq.u32 	%p1, %r1, 0;
	setp.eq.u32 	%p2, %rank, 0;
	setp.ne.u32 	%p3, %rank, 0;
	and.pred 	%p4, %p1, %p3;
	mad.wide.u32 	%rd2, %rank, 64, %rd1;
	BODY
	ret;
}
// -- End function
"""
MEET = "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;"
SEND_TO_FIRST = """
	mad.lo.u32 %r2, %rank, 4, 64;
	mapa.shared::cluster.u32 %r3, %r2, 0;
	mapa.shared::cluster.u32 %r4, 0, 0;
	@%p1 st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r3], %rank, [%r4];
"""
MODES = [(None, False), (None, True), *((seed, is_late) for seed in range(5) for is_late in (False, True))]
modes = pytest.mark.parametrize(("seed", "is_late"), MODES)


def prepare(expected):
    return f"@%p1 mbarrier.init.shared::cta.b64 [0], 1;\n@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [0], {expected};"


def wait(parity):
    return f"{{\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 %done, [0], {parity};\n@!%done bra again;\n}}"


def copy(to, start, count):
    return f"@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{to}], [%rd2 + {start}], {count}, [0];"


def store(at):
    return f"ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [{at}];\n@%p1 st.global.v4.b32 [%rd2], {{%r5, %r6, %r7, %r8}};"


def in_first(*body):
    return "\n".join(["@%p3 bra $end;", *body, "$end:"])


def run(*body, x=None, ctas=4, warps=1, seed=None, is_late=False):
    """Run a cluster whose CTAs have 16 of the words of ``x`` each, from ``%rd2`` on."""
    x = torch.arange(16 * ctas, dtype=torch.int32) if x is None else x
    program = parse(KERNEL.replace("BODY", "\n".join(body)))
    order = None if seed is None else random.Random(seed)
    Cluster(program, ctas, warps, {"x": x.data_ptr()}, Memory([x]), {}, 256, order, is_late).run()
    return x.view(ctas, 16).tolist()


@modes
def test_bytes_arrive_before_a_wait_for_them_is_over(seed, is_late):
    first, *others = run(
        prepare(16),
        MEET,
        SEND_TO_FIRST,
        in_first(wait(0), store(64)),
        warps=2,
        seed=seed,
        is_late=is_late,
    )
    assert first[:4] == [0, 1, 2, 3] and others[0][:4] == [16, 17, 18, 19]


@modes
def test_copies_from_global_memory_arrive_in_any_order(seed, is_late):
    copies = copy(64, 16, 16), copy(80, 32, 32)
    assert [row[:4] for row in run(prepare(48), *copies, "bar.sync 0;", wait(0), store(80), warps=2, seed=seed, is_late=is_late)] == [
        [16 * rank + i for i in range(8, 12)] for rank in range(4)
    ]


@modes
def test_phases_follow_each_other(seed, is_late):
    """Each CTA doubles what it got and sends it on to the next, four times."""
    step = """
	add.u32 %next, %rank, 1;
	and.b32 %next, %next, 3;
	mapa.shared::cluster.u32 %to, 64, %next;
	mapa.shared::cluster.u32 %bar, 0, %next;
	mov.u32 %value, 1;
	mov.u32 %round, 0;
$round:
	add.u32 %value, %value, %value;
	@%p1 st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%to], %value, [%bar];
	and.b32 %parity, %round, 1;
	WAIT
	ld.shared.b32 %value, [64];
	@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [0], 4;
""".replace("WAIT", wait("%parity"))
    end = f"add.u32 %round, %round, 1;\nsetp.lt.u32 %p5, %round, 4;\n{MEET}\n@%p5 bra $round;\n@%p1 st.global.b32 [%rd2], %value;"
    assert [row[0] for row in run(prepare(4), MEET, step, end, seed=seed, is_late=is_late)] == [16] * 4


def test_lanes_part_and_meet_again():
    body = "@%p1 bra $skip;\nadd.u32 %r1, %r1, 100;\n$skip:\nshfl.sync.idx.b32 %r9, %r1, 7, 31, -1;\n@%p1 st.global.b32 [%rd2], %r9;"
    assert [row[0] for row in run(body)] == [107] * 4


def test_labels_of_inline_assembly_repeat():
    count = "mov.u32 %r9, 0;\n" + "{\nagain:\nadd.u32 %r9, %r9, 1;\nsetp.lt.u32 p, %r9, LIMIT;\n@p bra again;\n}\n" * 2
    body = count.replace("LIMIT", "5", 1).replace("LIMIT", "9") + "@%p1 st.global.b32 [%rd2], %r9;"
    assert [row[0] for row in run(body)] == [9] * 4


def test_a_barrier_that_is_missing_is_found():
    """Warps that run one after the other may read before another has written."""
    body = "setp.eq.u32 %p5, %r1, 32;\n@%p5 st.shared.b32 [64], 7;\nBARRIER\nld.shared.b32 %r9, [64];\n@%p1 st.global.b32 [%rd2], %r9;"

    def results(barrier):
        return {row[0] for seed in range(5) for row in run(body.replace("BARRIER", barrier), warps=2, seed=seed)}

    assert results("bar.sync 0;") == {7}
    assert results("") == {7, -1}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([wait(0)], "try_wait.* no barrier was initialised at 0x0 of CTA 0"),
        ([SEND_TO_FIRST], "st.async.*of CTA 0: no barrier was initialised at 0x0 of CTA 0"),
        ([prepare(4), prepare(4)], "is initialised twice"),
        (
            [prepare(4), MEET, SEND_TO_FIRST.replace("mapa.shared::cluster.u32 %r4, 0, 0", "mov.u32 %r4, 0")],
            "of CTA 3: bytes for CTA 0 are counted by a barrier of CTA 3",
        ),
        ([prepare(12), MEET, SEND_TO_FIRST, MEET], "4 more bytes than expected"),
        ([prepare(16), copy(64, 0, 24)], "24 is not a multiple of 16 bytes"),
        (["@%p1 mbarrier.init.shared::cta.b64 [0], 1;\n@%p1 mbarrier.arrive.shared::cta.b64 _, [0], 2;"], "more arrivals than 1"),
        ([MEET.splitlines()[0] * 2], "arrives again before it has waited"),
        ([MEET.splitlines()[1]], "waits and has not arrived"),
        (["mapa.shared::cluster.u32 %r3, 0, 4;"], "4 is no CTA of the cluster"),
        (
            ["setp.lt.u32 %p5, %r1, 8;\n@%p5 bra $end;\nbar.sync 0;\n$end:"],
            "CTA 0, 24 lanes from 8 on: bar.sync 0, which 24 of 32 lanes have reached",
        ),
        (["@%p4 bra $end;\n", *MEET.splitlines(), "$end:"], r"CTA 1, 31 lanes from 1 on: barrier.cluster.arrive.*, which 31 of 32 lanes"),
        (
            [prepare(12), wait(0)],
            "CTA 3, 32 lanes from 0 on: mbarrier.try_wait.* for the barrier at 0x0: phase 0, 0 arrivals and 12 bytes to come",
        ),
    ],
)
def test_misuse_is_an_error(body, message):
    with pytest.raises(ClusterError, match=message):
        run(*body)


def test_copies_lie_at_multiples_of_16_bytes():
    for to, start in ((72, 0), (64, 8)):
        with pytest.raises(IndexError, match="16"):
            run(prepare(16), copy(to, start, 16))


def test_what_a_cta_reads_of_its_own_ends_where_its_shared_memory_does():
    with pytest.raises(IndexError, match="4 bytes at 0x100 are not in the 256 bytes from 0x0 on"):
        run("ld.shared.b32 %r9, [256];")
    with pytest.raises(IndexError, match="4 bytes at 0x1000000 are not"):  # those of another are reached by ld.shared::cluster
        run("mapa.shared::cluster.u32 %r3, 0, 0;\nld.shared.b32 %r9, [%r3];")


@pytest.mark.parametrize("seed", [None, *range(5)])
def test_a_cta_must_not_exit_while_others_may_send_to_it(seed):
    """The first does not wait for what the others send: what comes late finds it gone."""
    with pytest.raises(ClusterError, match="bytes come to CTA 0, which has exited"):
        run(prepare(16), MEET, "@%p2 bra $end;", SEND_TO_FIRST, "$end:", seed=seed, is_late=True)


def test_a_barrier_of_the_cluster_at_the_end_does_not_wait_for_those_that_have_exited():
    for seed in (None, *range(5)):
        run(in_first(MEET), seed=seed)


@modes
def test_a_barrier_of_the_cluster_at_the_end_does_not_wait_for_bytes(seed, is_late):
    """Triton 3.8 puts one there. What nobody waits for may come too late all the same."""
    body = prepare(16), MEET, SEND_TO_FIRST, MEET
    if is_late:
        with pytest.raises(ClusterError, match="has exited"):
            run(*body, seed=seed, is_late=is_late)
    else:
        run(*body, seed=seed, is_late=is_late)


def prefetch(start, count):
    return f"@%p1 cp.async.bulk.prefetch.L2.global [%rd2 + {start}], {count};"


def test_a_prefetch_reads_within_the_tensors_of_the_launch_and_changes_nothing():
    assert run(prefetch(16, 48)) == run()
    with pytest.raises(IndexError, match="are in no tensor of the launch"):
        run(prefetch(16, 256))
    with pytest.raises(IndexError, match="is not a multiple of 16 bytes"):
        run(prefetch(8, 16))
    with pytest.raises(ClusterError, match="24 is not a multiple of 16 bytes"):
        run(prefetch(16, 24))

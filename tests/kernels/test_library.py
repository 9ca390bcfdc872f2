import pytest
import torch
from device_assert import assert_trips

from qtts_compile.kernels import (  # noqa: F401
    add_rms_norm,
    decode_attention,
    kv_write,
    linear_add,
    norm_linears,
    norm_swiglu,
    qk_norm_rope_attention,
    qk_norm_rope_kv_write,
    rms_norm,
    rotary,
    sample,
    swiglu,
)
from qtts_compile.kernels.library import register_lowerings
from qtts_compile.patterns import catalogue

OPS = [*dict.fromkeys(catalogue.OPS.values()), "sample"]


@pytest.mark.parametrize("name", OPS)
def test_every_float_eps_has_a_tensor_overload(name):
    packet = getattr(torch.ops.qtts, name)
    has_eps = "eps" in str(packet.default._schema)
    assert packet.overloads() == (["default", "tensor_eps"] if has_eps else ["default"])
    for overload in packet.overloads():
        op = getattr(packet, overload)
        assert torch.Tag.pt2_compliant_tag in op.tags
        eps = [argument for argument in op._schema.arguments if argument.name.endswith("eps")]
        assert {str(argument.type) for argument in eps} <= {"float" if overload == "default" else "Tensor"}


def test_inductor_has_a_lowering_for_every_op():
    from torch._inductor.lowering import lowerings

    register_lowerings()
    register_lowerings()
    for name in OPS:
        packet = getattr(torch.ops.qtts, name)
        assert all(getattr(packet, overload) in lowerings for overload in packet.overloads())


def test_bad_input_fails_when_traced_too():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match=r"weight must have the shape \(8,\), got \(4,\)"):
        rms_norm.rms_norm(torch.ones(2, 8), torch.ones(4), 1e-6)


def test_compiles_with_inductor(device):
    weight = torch.rand(32, device=device)

    def step(x, cache, position):
        kv_write.kv_write(cache, x, position)
        return rms_norm.rms_norm(cache[:, :, :4] * 2, weight, 1e-6)

    register_lowerings()
    x, position = torch.randn(1, 2, 1, 32, device=device), torch.tensor([3], device=device)
    eager_cache, compiled_cache = torch.ones(1, 2, 8, 32, device=device), torch.ones(1, 2, 8, 32, device=device)
    expected = step(x, eager_cache, position)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x, compiled_cache, position), expected)
    assert torch.equal(compiled_cache, eager_cache)


@pytest.mark.gpu
@pytest.mark.parametrize("joined", [False, True])
def test_a_decode_step_replays_as_a_cuda_graph(joined):
    q, k, v = (torch.randn(1, 1, heads, 128, device="cuda").bfloat16().transpose(1, 2) for heads in (16, 8, 8))
    cos, sin = (torch.rand(1, 1, 128, device="cuda").bfloat16() for _ in range(2))
    weight = torch.rand(128, device="cuda").bfloat16()
    k_cache, v_cache = (torch.zeros(1, 8, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = torch.zeros(1, 1, 1, 2048, dtype=torch.bool, device="cuda")
    position = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step():
        mask.index_fill_(3, position, True)
        arguments = q, k, v, weight, weight, 1e-6, 1e-6, cos, sin, [], False, k_cache, v_cache, position
        if joined:
            return qk_norm_rope_attention.qk_norm_rope_attention(*arguments, mask, 128**-0.5)
        rotated = qk_norm_rope_kv_write.qk_norm_rope_kv_write(*arguments)
        return decode_attention.decode_attention(rotated, k_cache, v_cache, mask, 128**-0.5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for row in (0, 1, 700):
        position.fill_(row)
        q.normal_()
        expected = step()
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_a_position_out_of_range_trips_the_device_side_assert():
    setup = """
from qtts_compile.kernels.kv_write import kv_write
cache, src, position = torch.zeros(1, 1, 4, 8, device="cuda"), torch.ones(1, 1, 1, 8, device="cuda"), torch.tensor([3], device="cuda")
"""
    assert_trips(setup, "kv_write(cache, src, position)", "position += 1", "position is out of range")

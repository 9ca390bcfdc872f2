import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import random_tensor, seeds

from qtts_compile.kernels.copy_to_host import copy_to_host, copy_to_host_triton


def pair(device, shape, dtype=torch.int64, seed=0):
    """Return numbers on a device and memory of the host that holds others."""
    source = (random_tensor(seed, shape, torch.float32, device) * 1000).to(dtype)
    return source, torch.full(shape, 99, dtype=dtype, pin_memory=device == "cuda")


def arrive(device):
    """Wait as the host does that reads what was copied."""
    if device == "cuda":
        event = torch.cuda.Event()
        event.record()
        event.synchronize()


@given(st.lists(st.sampled_from([0, 1, 2, 3, 31, 700]), max_size=2), st.sampled_from([torch.int64, torch.int32, torch.bool, torch.float32]), seeds)
def test_copies_all(device, shape, dtype, seed):
    for copy in copy_to_host, copy_to_host_triton:
        source, host = pair(device, shape, dtype, seed)
        copy(source, host)
        arrive(device)
        assert torch.equal(host, source.cpu())


def test_writes_nothing_around_it(device):
    source, memory = pair(device, (5,))[0], pair(device, (9,))[1]
    copy_to_host_triton(source, memory[2:7])
    arrive(device)
    assert memory.tolist() == [99, 99, *source.tolist(), 99, 99]


@pytest.mark.gpu
def test_a_cuda_graph_copies_what_is_there_when_it_is_replayed():
    source, host = pair("cuda", (2, 3))
    copy_to_host(source, host)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        source += 1
        copy_to_host(source, host)
    for _ in range(3):
        graph.replay()
        arrive("cuda")
        assert torch.equal(host, source.cpu())


@pytest.mark.parametrize(
    ("host", "error", "says"),
    [
        (torch.zeros(2, 3), TypeError, "int64"),
        (torch.zeros(3, 2, dtype=torch.int64), ValueError, "host"),
        (torch.zeros(3, 2, dtype=torch.int64).T, ValueError, "contiguous"),
        (torch.zeros(2, 3, dtype=torch.int64, device="meta"), ValueError, "pin_memory=True"),
    ],
)
def test_refuses(host, error, says):
    with pytest.raises(error, match=says):
        copy_to_host(torch.zeros(2, 3, dtype=torch.int64), host)


@pytest.mark.gpu
def test_refuses_memory_that_is_not_pinned():
    with pytest.raises(ValueError, match="pin_memory=True"):
        copy_to_host(torch.zeros(2, device="cuda"), torch.zeros(2))

"""Where there is no Hopper GPU, the two kernels that stand in for that of clusters run; ``-p tests.ptx.plugin`` runs its PTX on the CPU."""

# pyright: reportCallIssue=false, reportArgumentType=false
# Arguments are cut from lists, whose lengths pyright takes for unknown.

import logging
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, EVERY_OPCHECK, assert_accurate, dtypes, poisoned_memory, random_tensor, seeds
from test_decode_attention import make_mask, softmax_attention
from test_norm_linears import oracle as linear_oracle
from test_qk_norm_rope_attention import positions
from test_qk_norm_rope_kv_write import oracle as head_oracle
from test_qk_norm_rope_kv_write import variants

from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.norm_linears import norm_linears_reference
from qtts_compile.kernels.norm_qkv import PREFETCHED, prefetch_arguments
from qtts_compile.kernels.norm_qkv_attention import _is_served, norm_qkv_attention, norm_qkv_attention_reference, norm_qkv_attention_triton
from qtts_compile.kernels.qk_norm_rope_kv_write import qk_norm_rope_kv_write_reference
from qtts_compile.kernels.rotary import as_angles

MROPE = (128, [24, 20, 20], True)
CACHES = slice(12, 14)
POSITION, MASK = 14, 15


def projections(seed, heads, width, hidden, dtype, device, normed=True) -> list[Any]:
    """Return a row, the weight of its norm, and those of queries, keys and values."""
    x = random_tensor(seed, (1, 1, hidden), dtype, device)
    weights = [random_tensor(seed + i, (n * width, hidden), dtype, device) * hidden**-0.5 for i, n in ((1, heads[0]), (2, heads[1]), (3, heads[1]))]
    return [x, random_tensor(seed + 4, (hidden,), dtype, device) if normed else None, weights]


def make_arguments(
    seed, heads, slots, position, variant, dtype, device, hidden=64, mask_kind="bool", norms=(True, True, True), cache_layout="contiguous"
) -> list[Any]:  # fmt: skip
    width, sections, interleaved = variant
    projected = projections(seed, heads, width, hidden, dtype, device, norms[0])
    q_norm, k_norm = (random_tensor(seed + i, (width,), dtype, device) if norm else None for i, norm in zip((5, 6), norms[1:]))
    theta = random_tensor(seed + 7, (*((3,) if sections else ()), 1, 1, width), torch.float32, device)
    caches = [random_tensor(seed + i, (1, heads[1], slots, width), dtype, device, cache_layout) for i in (8, 9)]
    mask = make_mask(mask_kind, seed + 10, 1, heads[0], 1, slots, torch.float32, device)
    angles = theta.cos().to(dtype), theta.sin().to(dtype), sections, interleaved
    place = torch.tensor([position], device=device)
    return [*projected, 1e-6, q_norm, k_norm, 1e-6, 1e-5, *angles, *caches, place, mask, width**-0.5]


# The last argument of these operators.
BAD_PREFETCH = (
    (-1, lambda weights: weights[:1], ValueError, "prefetch must be two weights or None, got 1"),
    (-1, lambda weights: [weights[0], weights[1][:5]], ValueError, r"prefetch\[1\] must have the shape"),
    (-1, lambda weights: [weight[:, ::2] for weight in weights], ValueError, r"prefetch\[0\] must be contiguous on cpu, got strides \(512, 2\)"),
    (-1, lambda weights: [weight.to("meta") for weight in weights], ValueError, r"prefetch\[0\] must be contiguous on cpu, .* on meta"),
)


def heads_of(results, width):
    return [result.view(1, -1, 1, width) for result in results]


def check(arguments, launch=norm_qkv_attention_triton):
    """Assert that results are as accurate as those of models, and that nothing of the caches changes but the row at the position."""
    x, norm, weights, eps, q_norm, k_norm, q_eps, k_eps, *angles, k_cache, v_cache, position, mask, scale = arguments[:17]
    width = k_cache.shape[3]
    q, k, v = heads_of(norm_linears_reference(x, norm, weights, [None] * 3, eps), width)
    k_model, v_model = k_cache.clone(), v_cache.clone()
    q_model = qk_norm_rope_kv_write_reference(q, k, v, q_norm, k_norm, q_eps, k_eps, *angles, k_model, v_model, position)
    q_exact, k_new, v_new = heads_of(linear_oracle(x, norm, weights, [None] * 3), width)
    q_exact, k_new = head_oracle(q_exact, q_norm, q_eps, *angles), head_oracle(k_new, k_norm, k_eps, *angles)
    before = [cache.clone() for cache in (k_cache, v_cache)]
    exact = [cache.double() for cache in before]
    for cache, new in zip(exact, (k_new, v_new)):
        cache[:, :, position] = new
    with poisoned_memory():
        out = launch(*arguments)
    assert out.is_contiguous()
    assert_accurate(out, softmax_attention(q_exact, *exact, mask, scale), softmax_attention(q_model, k_model, v_model, mask, scale))
    for cache, whole, model, old in zip((k_cache, v_cache), exact, (k_model, v_model), before):
        assert_accurate(cache[:, :, position], whole[:, :, position], model[:, :, position])
        written = cache.clone()
        written[:, :, position] = old[:, :, position]
        assert torch.equal(written.nan_to_num(), old.nan_to_num())
    return out


@given(
    st.sampled_from([(1, 1), (4, 2), (2, 2), (6, 2)]), st.sampled_from([1, 9, 32, 70]).flatmap(lambda s: st.tuples(st.just(s), positions(s, 1))),
    variants, dtypes, st.sampled_from(["none", "bool", "additive", "per_head"]), st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(["contiguous", "sliced"]), seeds,
)  # fmt: skip
def test_kernels_that_stand_in_are_as_accurate_as_eager(device, heads, place, variant, dtype, mask_kind, norms, cache_layout, seed):
    slots, (position,) = place
    check(make_arguments(seed, heads, slots, position, variant, dtype, device, 64, mask_kind, norms, cache_layout))


# What Qwen3-TTS has, and the kernel of clusters serves.
@pytest.mark.parametrize(("hidden", "slots", "position"), [(1024, 16, 7), (1024, 256, -1), (2048, 256, 100), (512, 48, 16)])
@pytest.mark.parametrize("variant", [MROPE, (128, [24, 20, 20], False), (128, [], False)], ids=["interleaved", "concatenated", "single"])
@pytest.mark.parametrize("kind", ["none", "bool"])
def test_sizes_of_the_model(device, hidden, slots, position, variant, kind):
    check(make_arguments(0, (2, 1), slots, position, variant, torch.bfloat16, device, hidden, kind))


@pytest.mark.parametrize(("hidden", "slots", "position"), [(512, 272, 100), (2048, 512, -1), (512, 512, 0), (512, 2048, 1999)])
@pytest.mark.parametrize("kind", ["none", "bool", "causal"])
def test_more_slots_than_a_cluster_shares(device, hidden, slots, position, kind):
    """Also where a CTA has more tiles than it requests at once, and where slots behind the new token count."""
    arguments = make_arguments(0, (2, 1), slots, position, MROPE, torch.bfloat16, device, hidden, "bool" if kind == "causal" else kind)
    if kind == "causal":
        arguments[MASK] &= torch.arange(slots, device=device) <= position % slots
    check(arguments)


@settings(max_examples=8)
@given(
    st.sampled_from([16, 32, 80]).flatmap(lambda s: st.tuples(st.just(s), positions(s, 1))), st.sampled_from([[], [24, 20, 20], [10, 30, 24]]),
    st.booleans(), st.sampled_from(["none", "bool", "left_padded"]), seeds,
)  # fmt: skip
def test_any_place_in_a_cache_that_clusters_serve(device, place, sections, interleaved, mask_kind, seed):
    slots, (position,) = place
    variant = 128, sections, interleaved and bool(sections)
    check(make_arguments(seed, (2, 1), slots, position, variant, torch.bfloat16, device, 512, mask_kind))


@pytest.mark.parametrize("slots", [16, 96, 512])
def test_what_the_mask_excludes_may_hold_anything(device, slots):
    """Also the row that the new key and value replace, and what the mask excludes of those."""
    for is_new_read in (True, False):
        arguments = make_arguments(0, (2, 1), slots, slots // 2, MROPE, torch.bfloat16, device, 512)
        arguments[MASK][..., slots - 4 :] = False
        arguments[MASK][..., slots // 2] = is_new_read
        expected = check(arguments)
        for cache in arguments[CACHES]:
            cache[:, :, ~arguments[MASK].flatten()] = float("nan")
            cache[:, :, slots // 2] = float("nan")
        assert torch.equal(norm_qkv_attention_triton(*arguments), expected)


@pytest.mark.parametrize("slots", [16, 96, 288])
def test_heads_that_read_different_keys(device, slots):
    """Each of two heads gives the key of the other a weight that float32 rounds to zero."""
    arguments = make_arguments(0, (2, 1), slots, slots // 2, MROPE, torch.bfloat16, device, 512, "none")
    x, norm, weights, eps, q_norm, k_norm, q_eps, k_eps, *angles, k_cache, v_cache, position, _, _ = arguments
    heads = heads_of(norm_linears_reference(x, norm, weights, [None] * 3, eps), 128)
    q = qk_norm_rope_kv_write_reference(*heads, q_norm, k_norm, q_eps, k_eps, *angles, k_cache.clone(), v_cache.clone(), position)[0, :, 0]
    k_cache[0, 0, 3], k_cache[0, 0, 5] = 60 * (q[0] - q[1]), 60 * (q[1] - q[0])
    out = check(arguments)
    torch.testing.assert_close(out[0, :, 0], v_cache[0, 0, [3, 5]], rtol=0, atol=0)


@pytest.mark.parametrize("slots", [16, 96, 512])
def test_without_a_key_the_result_is_zero(device, slots):
    arguments = make_arguments(0, (4, 2), slots, 3, MROPE, torch.bfloat16, device, 512)
    arguments[MASK] = torch.zeros(1, 1, 1, slots, dtype=torch.bool, device=device)
    with poisoned_memory():
        assert (norm_qkv_attention_triton(*arguments) == 0).all()


@pytest.mark.parametrize("live", [[3], [90], [50], [3, 50, 90], [49, 52]], ids=str)
@pytest.mark.parametrize("slots", [96, 512])
def test_tiles_of_which_nothing_counts(device, slots, live):
    """Before the new token, which is at slot 50, and behind it; its own need not count either. They are left out, and some are never read."""
    arguments = make_arguments(0, (4, 2), slots, 50, MROPE, torch.bfloat16, device, 512)
    arguments[MASK] = torch.zeros(1, 1, 1, slots, dtype=torch.bool, device=device)
    arguments[MASK][..., live] = True
    expected = check(arguments)
    for cache in arguments[CACHES]:
        cache[:, :, ~arguments[MASK].flatten()] = float("nan")
    assert torch.equal(norm_qkv_attention_triton(*arguments), expected)


def test_the_first_slots_of_a_longer_cache(device):
    arguments = make_arguments(0, (4, 2), 512, 200, MROPE, torch.bfloat16, device, 512)
    whole = arguments[CACHES]
    before = [cache.clone() for cache in whole]
    arguments[CACHES], arguments[MASK] = [cache[:, :, :256] for cache in whole], arguments[MASK][..., :256]
    check(arguments)
    for cache, old in zip(whole, before):
        assert torch.equal(cache[:, :, 256:], old[:, :, 256:])


@pytest.mark.parametrize("slots", [48, 288])
def test_every_step_reads_what_the_last_wrote(device, slots):
    """Also by a kernel that may have started before."""
    arguments = make_arguments(0, (2, 1), slots, 0, MROPE, torch.bfloat16, device, 512)
    models = [cache.clone() for cache in arguments[CACHES]]
    for position in range(13, 18):
        arguments[0] = random_tensor(position, (1, 1, 512), torch.bfloat16, device)
        arguments[POSITION] = torch.tensor([position], device=device)
        arguments[MASK] = (torch.arange(slots, device=device) <= position).view(1, 1, 1, slots)
        found = norm_qkv_attention_triton(*arguments)
        expected = norm_qkv_attention_reference(*arguments[:12], *models, *arguments[14:])
        torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item())


def weights_to_prefetch(device, columns=512):
    return [torch.zeros(96, columns, dtype=torch.bfloat16, device=device) for _ in range(2)]


@pytest.mark.parametrize("slots", [16, 48, 288, 2064])
def test_what_is_prefetched_changes_nothing(device, slots):
    """Also where it is later, as a CTA has more tiles than it requests at once. The PTX simulator refuses what lies outside of the weights."""
    arguments = make_arguments(0, (4, 2), slots, slots - 3, MROPE, torch.bfloat16, device, 512)
    expected = check(arguments)
    assert torch.equal(check([*arguments, weights_to_prefetch(device)]), expected)


def test_what_is_prefetched_of_two_weights():
    """Shares of 16 CTAs for each key head: of small weights all but what is left over from 16 bytes, and nothing that does not lie at 16 bytes."""
    x, small, large = torch.zeros(1), weights_to_prefetch("cpu"), torch.zeros(3, 2**20, dtype=torch.bfloat16)
    assert prefetch_arguments(small, x, 2) == (*small, 96 * 512 * 2 // 32)
    assert prefetch_arguments(weights_to_prefetch("cpu", 509), x, 2)[2] == 96 * 509 * 2 // 32 // 16 * 16
    assert prefetch_arguments([large, large], x, 8)[2] * 2 * 8 * 16 == PREFETCHED
    assert prefetch_arguments([small[0], moved(small[1])], x, 2)[2] == prefetch_arguments(None, x, 2)[2] == 0


def is_served(arguments):
    x, norm, weights, _, q_norm, k_norm, _, _, *angles, k_cache, v_cache, _, mask, _ = arguments
    return _is_served(x, norm, weights, q_norm, k_norm, as_angles(*angles), k_cache, v_cache, mask)


def moved(tensor):
    """Return a copy two bytes off where it would lie by itself."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {0: moved},
        {1: lambda _: None},
        {2: lambda weights: [*weights[:2], moved(weights[2])]},
        {2: lambda weights: [weight[:, ::2].repeat_interleave(2, 1).T.contiguous().T for weight in weights]},
        {2: lambda weights: [weights[1], *weights[1:]]},
        {4: lambda _: None},
        {8: moved},
        {12: lambda cache: cache.transpose(1, 2).contiguous().transpose(1, 2)},
        {12: moved},
        {12: lambda cache: cache[:, :, :40], 13: lambda cache: cache[:, :, :40], 15: lambda mask: mask[..., :40]},
        {15: lambda mask: mask.float()},
        {15: lambda mask: mask.expand(1, 4, 1, 48).contiguous()},
        {15: lambda mask: mask.repeat_interleave(2, -1)[..., ::2]},
    ],
)
def test_what_the_kernel_of_clusters_is_not_made_for(change):
    """It is launched for the first of these alone."""
    arguments = make_arguments(0, (4, 2), 48, 20, MROPE, torch.bfloat16, "cpu", 512)
    for place, function in change.items():
        arguments[place] = function(arguments[place])
    with mock.patch.object(clusters, "has_clusters", lambda device: True):
        assert is_served(arguments) == (not change)
    assert not is_served(arguments) or clusters.has_clusters(arguments[0].device)


@pytest.mark.parametrize("room", [0, 7])
def test_a_gpu_without_room_for_a_cluster_is_told_of_once(room, caplog):
    kernel = SimpleNamespace(run=None, function=1, metadata=SimpleNamespace(shared=2))
    driver = SimpleNamespace(utils=SimpleNamespace(cuOccupancyMaxActiveClusters=mock.Mock(return_value=room)))
    with (
        mock.patch.object(clusters.triton.runtime.driver, "_active", driver),
        mock.patch.dict(clusters._HAVE_ROOM, clear=True),
        caplog.at_level(logging.WARNING),
    ):
        assert [clusters.have_room(torch.device("cpu"), lambda: kernel) for _ in range(2)] == [room > 0] * 2
    driver.utils.cuOccupancyMaxActiveClusters.assert_called_once_with(1, 2, 16)
    assert ["no room for a cluster of 16" in message for message in caplog.messages] == [True] * (room == 0)


@given(dtypes, seeds)
def test_reference_is_as_accurate_as_eager(device, dtype, seed):
    check(make_arguments(seed, (4, 2), 17, 11, (40, [], False), dtype, device), norm_qkv_attention_reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    for variant, norms, kind in (((40, [], False), (True, True, True), "bool"), ((80, [16, 12, 12], True), (False, False, True), "none")):
        arguments = make_arguments(0, (4, 2), 17, 3, variant, dtype, device, 64, kind, norms)
        torch.library.opcheck(torch.ops.qtts.norm_qkv_attention.default, tuple(arguments), test_utils=EVERY_OPCHECK)
        arguments.append(weights_to_prefetch(device))
        for place in (3, 6, 7):
            arguments[place] = torch.tensor(arguments[place], dtype=torch.float64)
        torch.library.opcheck(torch.ops.qtts.norm_qkv_attention.tensor_eps, tuple(arguments), test_utils=EVERY_OPCHECK)


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x.expand(2, 1, 64), ValueError, "x must have one row"),
        (1, lambda norm: norm[:5], ValueError, "weight must have the shape"),
        (2, lambda weights: weights[:2], ValueError, "weights must be those of queries, keys and values, got 2"),
        (2, lambda weights: [weights[0][:30], *weights[1:]], ValueError, r"weights\[0\] must be \[H D, K\] of heads as wide as the cache's, 40"),
        (2, lambda weights: [weights[0].half(), *weights[1:]], TypeError, r"weights\[0\] must have the dtype of x"),
        (4, lambda weight: weight[:3], ValueError, "q_weight must have the shape"),
        (8, lambda cos: cos[..., :3], ValueError, "cos must have the shape"),
        (12, lambda cache: cache[0], ValueError, "k_cache"),
        (12, lambda cache: cache.repeat(1, 1, 500, 1), ValueError, "k_cache must have 1 to 8192 slots"),
        (13, lambda cache: cache.half(), TypeError, "v_cache"),
        (14, lambda position: position.int(), TypeError, "position must be int64"),
        (15, lambda mask: mask.long(), TypeError, "mask must be bool or floating"),
        *BAD_PREFETCH,
    ],
)
def test_bad_input(place, change, error, message):
    arguments = [*make_arguments(0, (4, 2), 17, 3, (40, [], False), torch.float32, "cpu"), weights_to_prefetch("cpu")]
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message):
        norm_qkv_attention(*arguments)

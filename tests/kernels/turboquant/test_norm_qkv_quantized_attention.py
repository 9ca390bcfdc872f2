"""Where there is no Hopper GPU, the kernels that stand in for that of clusters run; ``-p tests.ptx.plugin`` runs its PTX on the CPU."""

# pyright: reportCallIssue=false
# Arguments are cut from lists, whose lengths pyright takes for unknown.

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from buffers import FORMATS, Buffers
from device_assert import assert_trips
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import dtypes, poisoned_memory, random_tensor, seeds
from test_decode_attention import MASKS
from test_norm_linears import oracle as linear_oracle
from test_norm_qkv_attention import MROPE, heads_of, projections, weights_to_prefetch
from test_qk_norm_rope_attention import positions
from test_qk_norm_rope_quantized_attention import VARIANTS, check_step, in_dtype, in_float64
from test_qk_norm_rope_quantized_attention import make_arguments as attention_arguments

from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.norm_linears import norm_linears_reference
from qtts_compile.kernels.norm_qkv_quantized_attention import (
    _is_served,
    norm_qkv_quantized_attention,
    norm_qkv_quantized_attention_triton,
)
from qtts_compile.kernels.rotary import as_angles

K_CODES, V_CODES, SCALES, KEPT, POSITION, START, SINKS, FORMAT, MASK = range(12, 21)


def make_arguments(
    seed, format, heads, slots, position, variant, dtype, device, hidden=64, sinks=2, window=5, start=0, mask_kind="causal",
    norms=(True, True, True), cache_layout="contiguous",
) -> list[Any]:  # fmt: skip
    """Return arguments with a cache whose slots are all quantised, and whose tokens before ``position`` are kept as they should."""
    projected = projections(seed, heads, variant[0], hidden, dtype, device, norms[0])
    drawn = mask_kind if mask_kind in MASKS else "bool"
    arguments = attention_arguments(
        seed + 10, format, 1, heads, slots, position, variant, dtype, device, sinks, window, (start,), drawn, cache_layout=cache_layout,
        q_norm=norms[1], k_norm=norms[2],
    )  # fmt: skip
    arguments = [*projected, 1e-6, *arguments[3:]]
    if mask_kind in ("causal", "causal_with_gaps"):
        slot = torch.arange(slots, device=device)
        counts = (slot >= start) & (slot <= position % slots)
        arguments[MASK] = counts.expand(1, 1, 1, slots).contiguous() & (arguments[MASK] | (mask_kind == "causal"))
    return arguments


def served_arguments(
    seed, slots, position, device, variant=MROPE, hidden=512, sinks=4, window=20, start=0, mask_kind="causal", heads=(2, 1), format="int4"
):
    """Return arguments of the sizes of Qwen3-TTS, for which the kernel of clusters is launched where it can be."""
    arguments = make_arguments(seed, format, heads, slots, position, variant, torch.bfloat16, device, hidden, sinks, window, start, mask_kind)
    with mock.patch.object(clusters, "has_clusters", lambda device: True):
        assert is_served(arguments)
    return arguments


def is_served(arguments):
    x, norm, weights, _, q_norm, k_norm, _, _, *angles = arguments[:K_CODES]
    *buffers, _, _, sinks, format, mask, _ = arguments[K_CODES:]
    return _is_served(x, norm, weights, q_norm, k_norm, as_angles(*angles), *buffers, sinks, format, mask)


def check(arguments, launch=norm_qkv_quantized_attention_triton):
    """Assert that results are as accurate as those of models, and that of the cache nothing changes but what holds the new token."""
    x, norm, weights, eps, *rest = arguments[:K_CODES]
    width = arguments[KEPT].shape[4]
    model = heads_of(norm_linears_reference(x, norm, weights, [None] * 3, eps), width)
    exact = heads_of(linear_oracle(x, norm, weights, [None] * 3), width)
    out, _ = check_step(partial(launch, *arguments), arguments[K_CODES:], in_dtype(*model, *rest), in_float64(*exact, *rest))
    assert out.is_contiguous()
    return out


@given(
    st.sampled_from(FORMATS), st.sampled_from([(1, 1), (4, 2), (2, 2), (6, 2)]),
    st.sampled_from([9, 33, 70]).flatmap(lambda s: st.tuples(st.just(s), positions(s, 1))), st.sampled_from(VARIANTS), dtypes,
    st.integers(0, 3), st.integers(1, 20), st.integers(0, 9), st.sampled_from([*MASKS, "causal", "causal_with_gaps"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()), st.sampled_from(["contiguous", "transposed", "sliced"]), seeds,
)  # fmt: skip
def test_kernels_that_stand_in_are_as_accurate_as_eager(
    device, format, heads, place, variant, dtype, sinks, window, start, mask_kind, norms, cache_layout, seed
):
    slots, (position,) = place
    check(make_arguments(seed, format, heads, slots, position, variant, dtype, device, 64, sinks, window, start, mask_kind, norms, cache_layout))


@pytest.mark.parametrize(("hidden", "slots", "position"), [(1024, 256, 130), (2048, 288, -1), (512, 512, 470), (1024, 16, 7)])
@pytest.mark.parametrize("variant", [MROPE, (128, [24, 20, 20], False), (128, [], False)], ids=["interleaved", "concatenated", "single"])
def test_sizes_of_the_model(device, hidden, slots, position, variant):
    check(served_arguments(0, slots, position, device, variant, hidden, 4, 64))


@pytest.mark.parametrize("format", ["int3", "k4v3", "fp8"])
@pytest.mark.parametrize(
    ("slots", "position", "start", "mask_kind"), [(96, 80, 3, "causal"), (528, 500, 0, "causal_with_gaps"), (4096, 3000, 7, "bool")]
)
def test_other_codes(device, format, slots, position, start, mask_kind):
    check(served_arguments(0, slots, position, device, start=start, mask_kind=mask_kind, format=format))


@settings(max_examples=8)
@given(
    st.sampled_from([16, 80, 272, 528]).flatmap(lambda s: st.tuples(st.just(s), positions(s, 1))), st.sampled_from([0, 1, 4, 16]),
    st.sampled_from([16, 19, 64, 240]), st.sampled_from([0, 3, 15, 40]), st.sampled_from(["causal", "causal_with_gaps"]), seeds,
)  # fmt: skip
def test_any_place_in_a_cache_that_clusters_serve(device, place, sinks, window, start, mask_kind, seed):
    slots, (position,) = place
    check(served_arguments(seed, slots, position, device, sinks=sinks, window=window, start=start, mask_kind=mask_kind))


@pytest.mark.parametrize("mask_kind", ["causal_with_gaps", "bool"])
def test_more_tiles_than_are_requested_at_once(device, mask_kind):
    check(served_arguments(0, 4096, 3000, device, sinks=4, window=64, start=7, mask_kind=mask_kind))


@pytest.mark.parametrize(("slots", "position"), [(48, 40), (512, 300), (2064, 2060)])
def test_what_is_prefetched_changes_nothing(device, slots, position):
    """Also where it is later, as a CTA has more tiles than it requests at once. The PTX simulator refuses what lies outside of the weights."""
    results = []
    for prefetch in (None, weights_to_prefetch(device)):
        arguments = served_arguments(0, slots, position, device, start=3)
        results.append((norm_qkv_quantized_attention_triton(*arguments, prefetch), *arguments[K_CODES : KEPT + 1]))
    assert all(torch.equal(*both) for both in zip(*results))


def test_without_a_mask_all_slots_count(device):
    check(served_arguments(0, 96, 95, device, mask_kind="none"))


@pytest.mark.parametrize("mask_kind", ["none", "bool"])
def test_slots_behind_the_new_token_count_where_the_mask_does_not_exclude_them(device, mask_kind):
    check(served_arguments(0, 96, 50, device, mask_kind=mask_kind))


@pytest.mark.parametrize(("position", "start"), [(23, 0), (24, 0), (40, 17), (41, 17), (42, 17), (30, 17)])
def test_sinks_may_lie_just_before_the_window(device, position, start):
    """Codes count only where a token is neither: from the first of these positions to the next there is one more of them, but no sooner."""
    check(served_arguments(0, 96, position, device, start=start, mask_kind="causal"))
    if start:  # slots before the start count if the mask says so
        check(served_arguments(0, 96, position, device, start=start, mask_kind="bool"))


@pytest.mark.parametrize("start", [0, 3])
def test_the_first_token_is_all_that_counts(device, start):
    arguments = served_arguments(0, 48, start, device, start=start)
    expected = check(arguments)
    for tensor in arguments[SCALES : KEPT + 1]:
        tensor.fill_(float("nan"))
    assert torch.equal(norm_qkv_quantized_attention_triton(*arguments), expected)


def test_every_step_reads_what_the_last_wrote(device):
    """Also by a kernel that may have started before, and where the places of recent tokens are used anew."""
    arguments = served_arguments(0, 48, 30, device, sinks=2, window=16, start=12)
    for position in range(30, 34):
        arguments[0] = random_tensor(position, (1, 1, 512), torch.bfloat16, device)
        arguments[POSITION] = torch.tensor([position], device=device)
        arguments[MASK][..., position] = True
        check(arguments)


@pytest.mark.parametrize("slots", [16, 96])
def test_what_the_mask_excludes_may_hold_anything(device, slots):
    """Also what the new key and value replace, and what the mask excludes of those."""
    position = slots - 6
    for is_new_read in (True, False):
        arguments = served_arguments(0, slots, position, device, sinks=2, window=16, mask_kind="causal_with_gaps")
        arguments[MASK][..., position] = is_new_read
        expected = check(arguments)
        excluded = ~arguments[MASK].flatten()
        excluded[position] = True
        arguments[K_CODES][:, :, excluded], arguments[V_CODES][:, :, excluded] = 90, 91
        arguments[SCALES][..., excluded] = float("nan")
        recent = torch.arange(position - 15, position + 1, device=device).clamp(min=0)
        arguments[KEPT][:, :, :, 2 + recent[excluded[recent]] % 16] = float("nan")
        arguments[KEPT][:, :, :, :2][:, :, :, excluded[:2]] = float("nan")
        assert torch.equal(norm_qkv_quantized_attention_triton(*arguments), expected)


@pytest.mark.parametrize("slots", [16, 96])
def test_without_a_key_the_result_is_zero(device, slots):
    arguments = served_arguments(0, slots, 12, device)
    arguments[MASK] = torch.zeros(1, 1, 1, slots, dtype=torch.bool, device=device)
    with poisoned_memory():
        assert (norm_qkv_quantized_attention_triton(*arguments) == 0).all()


def test_the_first_slots_of_a_longer_cache(device):
    arguments = served_arguments(0, 512, 200, device, heads=(4, 2))
    whole = Buffers(*arguments[K_CODES:POSITION])
    before = whole.clone()
    parts = Buffers(whole.k_codes[:, :, :256], whole.v_codes[:, :, :256], whole.scales[..., :256], whole.kept)
    arguments[K_CODES:POSITION], arguments[MASK] = parts, arguments[MASK][..., :256]
    check(arguments)
    for now, old in zip(whole[:2], before[:2]):
        assert torch.equal(now[:, :, 256:], old[:, :, 256:])
    assert torch.equal(whole.scales[..., 256:], before.scales[..., 256:])


@pytest.mark.parametrize("position", [48, 1000, -49])
def test_out_of_range_is_neither_written_nor_an_error_of_memory(position):
    # On the CPU only: on a GPU the device-side assert would end the CUDA context of the whole test run.
    arguments = served_arguments(0, 48, 20, "cpu")
    arguments[POSITION] = torch.tensor([position])
    before = Buffers(*arguments[K_CODES:POSITION]).clone()
    norm_qkv_quantized_attention_triton(*arguments)
    for now, old in zip(arguments[K_CODES:POSITION], before):
        assert torch.equal(now.nan_to_num(7.0), old.nan_to_num(7.0))
    with pytest.raises(IndexError):
        norm_qkv_quantized_attention(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_what_no_scale_fits_trips_the_device_side_assert(format):
    setup = f"""
from test_norm_qkv_quantized_attention import norm_qkv_quantized_attention_triton, served_arguments
arguments = served_arguments(0, 48, 20, "cuda", format={format!r})
"""
    call, spoil = "norm_qkv_quantized_attention_triton(*arguments)", 'arguments[0][..., 5] = float("nan")'
    assert_trips(setup, call, spoil, "a key or value is not finite")

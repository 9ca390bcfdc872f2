"""Where there is no Hopper GPU, the kernels of one text stand in for that of clusters; ``-p tests.ptx.plugin`` runs its PTX on the CPU."""

# pyright: reportCallIssue=false
# Arguments are cut from lists, whose lengths pyright takes for unknown.

from typing import Any
from unittest import mock

import pytest
import torch
from buffers import FORMATS, Buffers
from device_assert import assert_trips
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heads_attention import MROPE, VARIANTS, with_parts
from test_norm_qkv_attention import moved
from test_norm_qkv_quantized_attention_op import UNSERVED_CACHES
from test_qk_norm_rope_attention import positions
from test_qk_norm_rope_quantized_attention import check, make_arguments

from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.flash_decoding_launch import expand_mask
from qtts_compile.kernels.heads_attention import serves_codes
from qtts_compile.kernels.qk_norm_rope_quantized_attention import qk_norm_rope_quantized_attention_triton
from qtts_compile.kernels.rotary import as_angles

K, V = 1, 2
K_CODES, V_CODES, SCALES, KEPT, POSITION, START, SINKS, FORMAT, MASK = range(11, 20)


def arguments_of(
    texts, slots, position, kind="causal", seed=0, variant=MROPE, device="cpu", sinks=4, window=20, starts=(0, 7, 3, 1, 40), key_heads=1,
    format="int4",
) -> list[Any]:  # fmt: skip
    """Return arguments; texts begin at different slots, and those before that do not count if the mask is "causal"."""
    arguments = make_arguments(
        seed, format, texts, (2 * key_heads, key_heads), slots, position, variant, torch.bfloat16, device, sinks, window, starts,
        "bool" if kind.startswith("causal") else kind,
    )  # fmt: skip
    if kind.startswith("causal"):
        slot = torch.arange(slots, device=device)
        counts = ((slot >= arguments[START][:, None]) & (slot <= position % slots)).view(texts, 1, 1, slots)
        arguments[MASK] = counts & arguments[MASK] if kind == "causal_with_gaps" else counts
    return arguments


@pytest.mark.parametrize(("texts", "parts"), [(2, 1), (2, 8), (2, 4), (3, 2), (5, 1)])
@pytest.mark.parametrize("kind", ["none", "causal"])
def test_parts_of_clusters(device, texts, parts, kind):
    """Also where the last cluster has fewer texts than it has room for."""
    with_parts(parts, check, arguments_of(texts, 144, 130, kind, device=device))


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_heads(device, variant):
    with_parts(2, check, arguments_of(3, 80, 70, "bool", variant=VARIANTS[variant], device=device, key_heads=2))


@pytest.mark.parametrize(("window", "parts"), [(64, 1), (64, 4), (236, 2), (16, 8)])
@pytest.mark.parametrize("position", [3, 271])
def test_kept_tokens_of_several_tiles(device, window, parts, position):
    with_parts(parts, check, arguments_of(2, 272, position, device=device, window=window))


@pytest.mark.parametrize(("slots", "position", "parts"), [(1040, 1000, 1), (2064, 2000, 2), (4112, 60, 2)])
@pytest.mark.parametrize("kind", ["none", "bool", "causal"])
def test_more_tiles_than_are_requested_at_once(device, slots, position, parts, kind):
    with_parts(parts, check, arguments_of(2, slots, position, kind, device=device))


@pytest.mark.parametrize("format", ["int3", "k4v3", "fp8"])
@pytest.mark.parametrize(("slots", "position", "parts", "kind"), [(96, 80, 2, "causal"), (528, 500, 1, "bool"), (2064, 2000, 8, "causal_with_gaps")])
def test_other_codes(device, format, slots, position, parts, kind):
    with_parts(parts, check, arguments_of(2, slots, position, kind, device=device, format=format))


@settings(max_examples=8)
@given(
    st.sampled_from([16, 80, 272]).flatmap(lambda s: st.tuples(st.just(s), positions(s, 1))), st.integers(2, 5), st.sampled_from([1, 2, 4]),
    st.sampled_from([0, 1, 4, 16]), st.sampled_from([16, 19, 64]), st.sampled_from(["causal", "causal_with_gaps", "bool", "none"]),
    st.integers(0, 2**16),
)  # fmt: skip
def test_any_place(device, place, texts, parts, sinks, window, kind, seed):
    slots, (position,) = place
    with_parts(parts, check, arguments_of(texts, slots, position, kind, seed, device=device, sinks=sinks, window=window))


@pytest.mark.parametrize(("position", "start"), [(24, 0), (40, 17), (41, 17), (42, 17), (16, 17)])
def test_sinks_may_lie_just_before_the_window(device, position, start):
    """Codes count only where a token is neither: from the first of these positions to the next there is one more of them, but no sooner."""
    with_parts(2, check, arguments_of(2, 96, position, device=device, starts=(start, 0)))


def test_every_step_reads_what_the_last_wrote(device):
    """Also by a kernel that may have started before, and where the places of recent tokens are used anew."""
    arguments = arguments_of(3, 48, 30, device=device, sinks=2, window=16, starts=(12, 0, 31))
    for position in range(30, 34):
        arguments[:3] = arguments_of(3, 48, 30, seed=position, device=device, sinks=2, window=16)[:3]
        arguments[POSITION] = torch.tensor([position], device=device)
        arguments[MASK][..., position] = True
        with_parts(2, check, arguments)


@pytest.mark.parametrize(("slots", "parts"), [(16, 1), (96, 2), (96, 8)])
def test_what_the_mask_excludes_may_hold_anything(device, slots, parts):
    """Also what the new key and value replace, and what the mask excludes of those."""
    position = slots - 6
    for is_new_read in (True, False):
        arguments = arguments_of(2, slots, position, "causal_with_gaps", device=device, sinks=2, window=16, starts=(0, 0))
        arguments[MASK] = arguments[MASK][1:].repeat(2, 1, 1, 1)
        arguments[MASK][..., position] = is_new_read
        expected = with_parts(parts, check, arguments)
        excluded = ~arguments[MASK][0].flatten()
        excluded[position] = True
        arguments[K_CODES][:, :, excluded], arguments[V_CODES][:, :, excluded] = 90, 91
        arguments[SCALES][..., excluded] = float("nan")
        recent = torch.arange(position - 15, position + 1, device=device).clamp(min=0)
        arguments[KEPT][:, :, :, 2 + recent[excluded[recent]] % 16] = float("nan")
        arguments[KEPT][:, :, :, :2][:, :, :, excluded[:2]] = float("nan")
        assert torch.equal(with_parts(parts, qk_norm_rope_quantized_attention_triton, *arguments), expected)


@pytest.mark.parametrize("live", [[], [3], [20], [90], [3, 90]], ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_slots_before_and_behind_of_one_text(device, live, parts):
    """The other's mask is empty, and so is its result."""
    arguments = arguments_of(2, 96, 50, device=device)
    arguments[MASK] = torch.zeros(2, 1, 1, 96, dtype=torch.bool, device=device)
    arguments[MASK][1, ..., live] = True
    assert (with_parts(parts, check, arguments)[0] == 0).all()


def test_the_first_slots_of_a_longer_cache(device):
    arguments = arguments_of(2, 256, 100, device=device, key_heads=2)
    whole = Buffers(*arguments[K_CODES:POSITION])
    before = whole.clone()
    arguments[K_CODES:POSITION] = Buffers(whole.k_codes[:, :, :128], whole.v_codes[:, :, :128], whole.scales[..., :128], whole.kept)
    arguments[MASK] = arguments[MASK][..., :128]
    with_parts(2, check, arguments)
    for now, old in zip(whole[:2], before[:2]):
        assert torch.equal(now[:, :, 128:], old[:, :, 128:])
    assert torch.equal(whole.scales[..., 128:].nan_to_num(7.0), before.scales[..., 128:].nan_to_num(7.0))


@pytest.mark.gpu
@pytest.mark.parametrize(("texts", "parts"), [(2, 4), (16, 1), (32, 0)])
@pytest.mark.parametrize("spoiled", ["K", "V"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_no_scale_fits_trips_the_device_side_assert(format, spoiled, texts, parts):
    """Of one text, by the kernel of clusters and with 0 parts by those of one block, which alone are launched where there are no clusters."""
    setup = f"""
from test_coded_heads_attention import K, V, arguments_of, qk_norm_rope_quantized_attention_triton, with_parts
arguments = arguments_of({texts}, 48, 20, device="cuda", starts=[0] * {texts}, format={format!r})
"""
    call, spoil = f"with_parts({parts}, qk_norm_rope_quantized_attention_triton, *arguments)", f'arguments[{spoiled}][-1, 0, 0, 5] = float("nan")'
    assert_trips(setup, call, spoil, "a key or value is not finite")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {0: moved},
        {3: lambda _: None},
        *({K_CODES + place: function for place, function in change.items()} for change in UNSERVED_CACHES),
        {MASK: lambda mask: mask.float()},
        {MASK: lambda mask: mask.expand(3, 4, 1, 48).contiguous()},
    ],
)
def test_what_the_kernel_of_clusters_is_not_made_for(change):
    """It is launched for the first of these alone."""
    arguments = arguments_of(3, 48, 20, key_heads=2)
    for place, function in change.items():
        arguments[place] = function(arguments[place])
    q, k, v, q_weight, k_weight, _, _, *angles = arguments[:K_CODES]
    *buffers, _, _, sinks, format, mask, _ = arguments[K_CODES:]
    mask = expand_mask(mask, q, 48)
    with mock.patch.object(clusters, "has_clusters", lambda device: True):
        assert serves_codes(q, k, v, q_weight, k_weight, as_angles(*angles), *buffers, sinks, format, mask) == (not change)

"""Where there is no Hopper GPU, the kernels of one text stand in for that of clusters; ``-p tests.ptx.plugin`` runs its PTX on the CPU."""

import ctypes
import logging
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import random_tensor
from test_norm_qkv_attention import moved
from test_qk_norm_rope_attention import check, make_arguments, positions

from qtts_compile.kernels import heads_attention
from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.flash_decoding_launch import expand_mask
from qtts_compile.kernels.heads_attention import PARTS, PARTS_OF_CODES, choose_parts, serves
from qtts_compile.kernels.qk_norm_rope_attention import qk_norm_rope_attention_reference, qk_norm_rope_attention_triton
from qtts_compile.kernels.rotary import as_angles

MROPE = (128, [24, 20, 20], True)
VARIANTS = {"interleaved": MROPE, "concatenated": (128, [24, 20, 20], False), "single": (128, [], False)}
CACHES = slice(11, 13)
POSITION, MASK = 13, 14


def arguments_of(texts, key_heads, slots, position, kind="causal", seed=0, variant=MROPE, device="cpu") -> list[Any]:
    """Return arguments; the mask may be "causal" and begin later in some texts, whose first slots are padding."""
    is_causal = kind == "causal"
    arguments = make_arguments(
        seed, texts, (2 * key_heads, key_heads), slots, [position], variant, torch.bfloat16, device, "none" if is_causal else kind
    )
    if is_causal:
        slot, padding = torch.arange(slots, device=device), 5 * torch.arange(texts, device=device)
        arguments[MASK] = ((slot >= padding[:, None]) & (slot <= position % slots)).view(texts, 1, 1, slots)
    return arguments


def with_parts(parts, function, *arguments):
    """Call with so many parts where there are clusters."""
    device = arguments[0][0].device if isinstance(arguments[0], list) else arguments[0].device
    return function(*arguments, **({"parts": parts} if clusters.has_clusters(device) else {}))


@pytest.mark.parametrize(("texts", "parts"), [(2, 1), (2, 8), (2, 4), (3, 2), (5, 1), (2, 16)])
@pytest.mark.parametrize("kind", ["none", "causal"])
def test_parts_of_clusters(device, texts, parts, kind):
    """Also where the last cluster has fewer texts than it has room for."""
    with_parts(parts, check, arguments_of(texts, 1, 80, 70, kind, device=device))


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_heads(device, variant):
    with_parts(2, check, arguments_of(3, 2, 32, 20, "bool", variant=VARIANTS[variant], device=device))


@pytest.mark.parametrize(("slots", "position"), [(16, 0), (16, 15), (48, -1), (48, 16), (272, 0), (272, 128), (272, -1), (272, -100)])
@pytest.mark.parametrize("parts", [1, 4])
def test_where_the_new_token_is(device, slots, position, parts):
    with_parts(parts, check, arguments_of(2, 1, slots, position, device=device))


@pytest.mark.parametrize(("slots", "position", "parts"), [(528, 300, 1), (2080, 1999, 8), (4112, 60, 2)])
@pytest.mark.parametrize("kind", ["none", "bool", "causal"])
def test_more_tiles_than_warps(device, slots, position, parts, kind):
    with_parts(parts, check, arguments_of(2, 1, slots, position, kind, device=device))


@settings(max_examples=8)
@given(
    st.sampled_from([16, 32, 144]).flatmap(lambda s: st.tuples(st.just(s), positions(s, 1))), st.integers(2, 5), st.sampled_from([1, 2, 4]),
    st.sampled_from(["none", "bool", "left_padded", "causal"]), st.sampled_from(sorted(VARIANTS)), st.integers(0, 2**16),
)  # fmt: skip
def test_any_place(device, place, texts, parts, kind, variant, seed):
    slots, (position,) = place
    with_parts(parts, check, arguments_of(texts, 1, slots, position, kind, seed, VARIANTS[variant], device))


def test_one_mask_for_all_texts(device):
    arguments = arguments_of(3, 1, 48, 20, "bool", device=device)
    arguments[MASK] = arguments[MASK][:1]
    with_parts(2, check, arguments)


@pytest.mark.parametrize(("slots", "parts"), [(16, 1), (96, 2), (512, 8)])
def test_what_the_mask_excludes_may_hold_anything(device, slots, parts):
    """Also the row that the new key and value replace, and what the mask excludes of those."""
    for is_new_read in (True, False):
        arguments = arguments_of(2, 1, slots, slots // 2, "bool", device=device)
        arguments[MASK][..., slots - 4 :] = False
        arguments[MASK][..., slots // 2] = is_new_read
        expected = with_parts(parts, check, arguments)
        for cache in arguments[CACHES]:
            cache.masked_fill_(~arguments[MASK].view(2, 1, slots, 1), float("nan"))
            cache[:, :, slots // 2] = float("nan")
        assert torch.equal(with_parts(parts, qk_norm_rope_attention_triton, *arguments), expected)


@pytest.mark.parametrize("live", [[3], [90], [50], [64], [3, 50, 90], [47, 49]], ids=str)
@pytest.mark.parametrize(("slots", "position", "parts"), [(96, 48, 1), (2576, 50, 4)])
def test_slots_before_and_behind_of_one_text(device, live, slots, position, parts):
    """The other's mask is empty, and so is its result."""
    arguments = arguments_of(2, 1, slots, position, device=device)
    arguments[MASK] = torch.zeros(2, 1, 1, slots, dtype=torch.bool, device=device)
    arguments[MASK][1, ..., [slots - 96 + slot if slot > 50 else slot for slot in live]] = True
    assert (with_parts(parts, check, arguments)[0] == 0).all()


@pytest.mark.parametrize("slots", [48, 288])
def test_every_step_reads_what_the_last_wrote(device, slots):
    """Also by a kernel that may have started before."""
    arguments = arguments_of(3, 1, slots, 0, device=device)
    models = [cache.clone() for cache in arguments[CACHES]]
    for position in range(13, 18):
        arguments[:3] = arguments_of(3, 1, slots, 0, seed=position, device=device)[:3]
        arguments[POSITION] = torch.tensor([position], device=device)
        arguments[MASK] = (torch.arange(slots, device=device) <= position).view(1, 1, 1, slots)
        found = with_parts(2, qk_norm_rope_attention_triton, *arguments)
        expected = qk_norm_rope_attention_reference(*arguments[:11], *models, *arguments[13:])
        torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item())


def test_parts_of_longer_tensors(device):
    """Heads as a projection of all three leaves them, and the first slots of a longer cache."""
    arguments = arguments_of(3, 1, 96, 40, "bool", device=device)
    whole = random_tensor(7, (3, 1, 4, 128), torch.bfloat16, device).transpose(1, 2)
    arguments[:3] = whole[:, :2], whole[:, 2:3], whole[:, 3:]
    caches = arguments[CACHES]
    before = [cache.clone() for cache in caches]
    arguments[CACHES], arguments[MASK] = [cache[:, :, :64] for cache in caches], arguments[MASK][..., :64]
    with_parts(4, check, arguments)
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[:, :, 64:], old[:, :, 64:])


def test_parts_that_do_not_serve_are_refused(device):
    arguments = arguments_of(2, 1, 40, 20, device=device)
    with pytest.raises(ValueError, match="parts=2: kernels of clusters do not serve these arguments on .*; leave it out"):
        qk_norm_rope_attention_triton(*arguments, parts=2)


@pytest.mark.parametrize("parts", [-1, 3, 32])
def test_parts_that_a_cluster_does_not_have_are_refused(monkeypatch, parts):
    monkeypatch.setattr(clusters, "has_clusters", lambda device: True)
    with pytest.raises(ValueError, match=f"parts={parts}: give one of 1, 2, 4, 8, 16"):
        qk_norm_rope_attention_triton(*arguments_of(2, 1, 32, 20), parts=parts)


@pytest.mark.parametrize(
    ("texts", "slots", "parts"),
    [(2, 240, None), (2, 256, 4), (2, 1024, 16), (4, 2048, 8), (8, 256, 4), (8, 4112, 8), (16, 2048, 2), (17, 2048, None), (32, 256, None)],
)
def test_as_many_parts_are_chosen_as_keep_the_gpu_busy(texts, slots, parts):
    assert choose_parts(8 * texts, slots, PARTS) == parts
    assert choose_parts(8 * texts, slots, PARTS_OF_CODES) == (parts and min(parts, 8))


@pytest.mark.parametrize("slots", [256, 1040])
def test_chosen_where_nothing_is_asked_for(device, slots):
    """The GPU then divides its memory for the kernel as it is told to."""
    with mock.patch.object(clusters, "divide_memory", wraps=clusters.divide_memory) as divide:
        check(arguments_of(3, 2, slots, 200, device=device))
    assert divide.called == clusters.has_clusters(torch.device(device))
    for call in divide.call_args_list:
        percent = ctypes.c_int()
        assert clusters._cuda().cuFuncGetAttribute(ctypes.byref(percent), clusters.CARVEOUT, ctypes.c_void_p(call.args[0].function)) == 0
        assert percent.value == clusters.SHARED_PERCENT


@pytest.mark.parametrize(("given", "has_room"), [({"n_splits": 2}, True), ({"parts": 0}, True), ({}, False)])
def test_kernels_of_one_block_where_they_are_asked_for_or_there_is_no_room(device, given, has_room):
    with mock.patch.object(heads_attention, "launch", return_value=None) as launch, mock.patch.object(clusters, "has_clusters", lambda device: True):
        check(arguments_of(2, 1, 256, 20, device=device), **given)
    assert launch.called == (not has_room)


@pytest.mark.parametrize("error", [0, 1])
def test_memory_is_divided_once_for_each_kernel(error, caplog):
    kernels = [mock.Mock(function=place) for place in (1, 2)]
    driver = mock.Mock()
    driver.cuFuncSetAttribute.return_value = error
    with mock.patch.object(clusters, "_cuda", lambda: driver), caplog.at_level(logging.WARNING):
        for kernel in kernels * 2:
            clusters.divide_memory(kernel)
    assert [call.args[0].value for call in driver.cuFuncSetAttribute.call_args_list] == [1, 2]
    assert [message.count("slower") for message in caplog.messages] == [1] * 2 * error


@pytest.mark.parametrize(
    "change",
    [
        {},
        {0: moved},
        {1: lambda k: k.repeat(1, 2, 1, 1)},
        {2: lambda v: torch.cat([v.flatten(1), v.flatten(1)[:, :3]], 1)[:, :256].view(3, 2, 1, 128)},
        {3: lambda _: None},
        {4: moved},
        {7: moved},
        {11: lambda cache: cache.transpose(1, 2).contiguous().transpose(1, 2)},
        {12: moved},
        {11: lambda cache: cache[:, :, :40], 12: lambda cache: cache[:, :, :40], MASK: lambda mask: mask[..., :40]},
        {0: lambda q: q[:1], 1: lambda k: k[:1], 2: lambda v: v[:1], 11: lambda c: c[:1], 12: lambda c: c[:1], MASK: lambda mask: mask[:1]},
        {MASK: lambda mask: mask.float()},
        {MASK: lambda mask: mask.expand(3, 4, 1, 48).contiguous()},
        {MASK: lambda mask: mask.repeat_interleave(2, -1)[..., ::2]},
        {MASK: lambda mask: torch.cat([mask, mask[..., :5]], -1)[..., :48]},
    ],
)
def test_what_the_kernel_of_clusters_is_not_made_for(change):
    """It is launched for the first of these alone."""
    arguments = arguments_of(3, 2, 48, 20)
    for place, function in change.items():
        arguments[place] = function(arguments[place])
    q, k, v, q_weight, k_weight, _, _, *angles, k_cache, v_cache, _, mask, _ = arguments
    mask = expand_mask(mask, q, k_cache.shape[2])
    with mock.patch.object(clusters, "has_clusters", lambda device: True):
        assert serves(q, k, v, q_weight, k_weight, as_angles(*angles), (k_cache, v_cache), mask) == (not change)

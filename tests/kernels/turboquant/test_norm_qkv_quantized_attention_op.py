"""The op ``norm_qkv_quantized_attention``: which kernel it launches, what its reference computes, how it is recorded, and what it refuses."""

from unittest import mock

import pytest
import torch
from buffers import FORMATS
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, EVERY_OPCHECK, dtypes, seeds
from test_norm_qkv_attention import BAD_PREFETCH, MROPE, moved, weights_to_prefetch
from test_norm_qkv_quantized_attention import (
    FORMAT,
    K_CODES,
    KEPT,
    MASK,
    POSITION,
    SCALES,
    SINKS,
    START,
    V_CODES,
    check,
    is_served,
    make_arguments,
)

from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.norm_qkv_quantized_attention import norm_qkv_quantized_attention, norm_qkv_quantized_attention_reference

# What is changed of a cache of int4 codes with 48 slots, 4 sinks and a window of 20, by places after that of the codes of keys.
UNSERVED_CACHES = [
    {0: moved},
    {1: lambda codes: codes.transpose(1, 2).contiguous().transpose(1, 2)},
    {2: moved},
    {2: lambda scales: scales.repeat_interleave(2, -1)[..., ::2]},
    {2: lambda scales: torch.cat([scales, scales[..., :4]], -1)[..., :48]},
    {3: moved},
    {3: lambda kept: kept.transpose(2, 3).contiguous().transpose(2, 3)},
    {3: lambda kept: kept[:, :, :, :19]},
    {3: lambda kept: kept.repeat(1, 1, 1, 11, 1)},
    {SINKS - K_CODES: lambda _: 17, 3: lambda kept: kept.repeat(1, 1, 1, 2, 1)},
    *({FORMAT - K_CODES: lambda _, format=format: format} for format in ("int3", "k4v3", "fp8")),
]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {0: moved},
        {1: lambda _: None},
        {2: lambda weights: [weights[1], *weights[1:]]},
        {5: lambda _: None},
        *({K_CODES + place: function for place, function in change.items()} for change in UNSERVED_CACHES),
        {MASK: lambda mask: mask.float()},
        {MASK: lambda mask: mask.expand(1, 4, 1, 48).contiguous()},
        {
            **{place: lambda codes: codes[:, :, :40].contiguous() for place in (K_CODES, V_CODES)},
            **{place: lambda tensor: tensor[..., :40].contiguous() for place in (SCALES, MASK)},
        },
    ],
)
def test_what_the_kernel_of_clusters_is_not_made_for(change):
    """It is launched for the first of these alone."""
    arguments = make_arguments(0, "int4", (4, 2), 48, 20, MROPE, torch.bfloat16, "cpu", 512, 4, 20)
    for place, function in change.items():
        arguments[place] = function(arguments[place])
    with mock.patch.object(clusters, "has_clusters", lambda device: True):
        assert is_served(arguments) == (not change)
    assert not is_served(arguments) or clusters.has_clusters(arguments[0].device)


@given(st.sampled_from(FORMATS), dtypes, seeds)
def test_reference_is_as_accurate_as_eager(device, format, dtype, seed):
    check(make_arguments(seed, format, (4, 2), 17, 11, (32, [], False), dtype, device, start=3), norm_qkv_quantized_attention_reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["int4", "k4v3"])
def test_opcheck(device, format, dtype):
    for variant, norms, kind in (((32, [], False), (True, True, True), "bool"), ((64, [12, 10, 10], True), (False, False, True), "none")):
        arguments = make_arguments(0, format, (4, 2), 17, 3, variant, dtype, device, mask_kind=kind, norms=norms)
        torch.library.opcheck(torch.ops.qtts.norm_qkv_quantized_attention.default, tuple(arguments), test_utils=EVERY_OPCHECK)
        arguments.append(weights_to_prefetch(device))
        for place in (3, 6, 7):
            arguments[place] = torch.tensor(arguments[place], dtype=torch.float64)
        torch.library.opcheck(torch.ops.qtts.norm_qkv_quantized_attention.tensor_eps, tuple(arguments), test_utils=EVERY_OPCHECK)


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x.expand(2, 1, 64), ValueError, "x must have one row, .*call norm_linears and qk_norm_rope_quantized_attention for more"),
        (1, lambda norm: norm[:5], ValueError, "weight must have the shape"),
        (2, lambda weights: weights[:2], ValueError, "weights must be those of queries, keys and values, got 2"),
        (2, lambda weights: [weights[0][:30], *weights[1:]], ValueError, r"weights\[0\] must be \[H D, K\] of heads as wide as the cache's, 32"),
        (2, lambda weights: [weights[0].half(), *weights[1:]], TypeError, r"weights\[0\] must have the dtype of x"),
        (4, lambda weight: weight[:3], ValueError, "q_weight must have the shape"),
        (8, lambda cos: cos[..., :3], ValueError, "cos must have the shape"),
        (K_CODES, lambda codes: codes[0], ValueError, "k_codes must have the shape"),
        (
            K_CODES,
            lambda codes: codes.repeat(1, 1, 500, 1),
            ValueError,
            "k_codes must have 1 to 8192 slots, .*call norm_linears and qk_norm_rope_quantized_attention for more",
        ),
        (V_CODES, lambda codes: codes[..., :4], ValueError, "v_codes must have the shape"),
        (SCALES, lambda scales: scales.float(), TypeError, "scales must be float16"),
        (KEPT, lambda kept: kept[0], ValueError, r"kept must have the shape \[2, 1, Hk, sinks \+ window, D\]"),
        (KEPT, lambda kept: kept[:, :, :, :2], ValueError, "kept must have room for the new token beside its 2 sinks"),
        (POSITION, lambda position: position.int(), TypeError, "position must be int64"),
        (START, lambda start: start.repeat(2), ValueError, "start must have the shape"),
        (SINKS, lambda _: -1, ValueError, "sinks must be from 0"),
        (FORMAT, lambda _: "int5", ValueError, "got 'int5'"),
        (MASK, lambda mask: mask.long(), TypeError, "mask must be bool or floating"),
        *BAD_PREFETCH,
    ],
)
def test_bad_input(place, change, error, message):
    arguments = [*make_arguments(0, "int4", (4, 2), 17, 3, (32, [], False), torch.float32, "cpu"), weights_to_prefetch("cpu")]
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message):
        norm_qkv_quantized_attention(*arguments)

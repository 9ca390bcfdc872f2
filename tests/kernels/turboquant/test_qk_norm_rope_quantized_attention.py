# pyright: reportCallIssue=false, reportArgumentType=false
# Arguments are cut from lists, whose lengths pyright takes for unknown.

from functools import partial
from typing import Any

import pytest
import torch
from buffers import FORMATS, Buffers, assert_same_codes, poisoned
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, EVERY_OPCHECK, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, seeds
from test_decode_attention import MASKS, make_mask, softmax_attention
from test_qk_norm_rope_kv_write import oracle

from qtts_compile.kernels import flash_decoding_launch
from qtts_compile.kernels.qk_norm_rope_attention import qk_norm_rope_attention
from qtts_compile.kernels.qk_norm_rope_quantized_attention import (
    _choose_parts,
    qk_norm_rope_quantized_attention,
    qk_norm_rope_quantized_attention_triton,
)
from qtts_compile.kernels.rms_norm import rms_norm_reference
from qtts_compile.kernels.rotary import rotary_reference
from qtts_compile.kernels.turboquant.codebook import codebook
from qtts_compile.kernels.turboquant.codec import dequantize, quantize, unpack
from qtts_compile.kernels.turboquant.format import E4M3_BITS, Format
from qtts_compile.kernels.turboquant.kept import kept_rows
from qtts_compile.kernels.turboquant.rotation import rotate
from qtts_compile.kernels.turboquant.write import quantized_kv_write_reference

VARIANTS = [(32, [], False), (64, [], False), (128, [24, 20, 20], True), (32, [8, 4, 4], False)]
FIRST_BUFFER, POSITION = 11, 15


def make_arguments(
    seed, format, batch, heads, slots, position, variant, dtype, device, sinks=2, window=5, starts=(0, 0, 0), mask_kind="bool",
    mask_dtype=torch.float32, layout="transposed", cache_layout="contiguous", q_norm=True, k_norm=True,
) -> list[Any]:  # fmt: skip
    """Return arguments with a cache whose slots are all quantised, and whose tokens before ``position`` are kept as they should."""
    width, sections, interleaved = variant
    q = random_tensor(seed, (batch, heads[0], 1, width), dtype, device, layout)
    k, v = (random_tensor(seed + i, (batch, heads[1], 1, width), dtype, device, layout) for i in (1, 2))
    weights = [random_tensor(seed + i, (width,), dtype, device) if norm else None for i, norm in ((3, q_norm), (4, k_norm))]
    theta = random_tensor(seed + 5, (*((3,) if sections else ()), batch, 1, width), torch.float32, device)
    buffers = poisoned(format, batch, heads[1], slots, width, sinks + window, dtype, device, cache_layout)
    start = torch.tensor(starts[:batch], dtype=torch.int64, device=device)
    old = [random_tensor(seed + i, (batch, heads[1], slots, width), dtype, device) for i in (6, 7)]
    every, last = torch.arange(slots, device=device), torch.tensor([position % slots - 1], device=device)
    quantized_kv_write_reference(*old, *buffers, every, last, start, sinks, format)
    mask = make_mask(mask_kind, seed + 8, batch, heads[0], 1, slots, mask_dtype, device)
    angles = theta.cos().to(dtype), theta.sin().to(dtype), sections, interleaved
    rest = torch.tensor([position], device=device), start, sinks, format, mask, width**-0.5
    return [q, k, v, *weights, 1e-6, 1e-5, *angles, *buffers, *rest]


def decoded(codes: torch.Tensor, scales: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Return what codes stand for, in float64."""
    if bits == E4M3_BITS:
        return dequantize(codes, scales, bits).double()
    rotation = rotate(torch.eye(width, device=codes.device)).sign().double().T * width**-0.5
    positive = torch.tensor(codebook(bits).levels[2 ** (bits - 1) :], dtype=torch.float64, device=codes.device)
    return torch.cat((positive, -positive))[unpack(codes, bits).int()] * scales.double().unsqueeze(-1) @ rotation


def dense(buffers: Buffers, slot: int, start: torch.Tensor, sinks: int, format: str, new: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return keys and values in float64: decoded, or as they were kept when the token at ``slot`` came, which is ``new``."""
    parsed, results = Format.parse(format), []
    width, slots = buffers.kept.shape[4], torch.arange(buffers.k_codes.shape[2], device=start.device)
    rows = kept_rows(slots, torch.tensor([slot], device=start.device), start, sinks, buffers.kept.shape[3] - sinks)
    for side, (codes, bits) in enumerate(((buffers.k_codes, parsed.k_bits), (buffers.v_codes, parsed.v_bits))):
        x = decoded(codes, buffers.scales[side], bits, width)
        for row in reversed(rows):
            batch, place = (row >= 0).nonzero(as_tuple=True)
            x[batch, :, place] = buffers.kept[side, batch, :, row[batch, place]].double()
        x[:, :, slot] = new[side].double()[:, :, 0]
        results.append(x)
    return results


def in_dtype(q, k, v, q_weight, k_weight, q_eps, k_eps, *angles) -> list[torch.Tensor]:
    """Return a token's queries, key and value as a model hands them to attention."""
    normed = (x if weight is None else rms_norm_reference(x, weight, eps) for x, weight, eps in ((q, q_weight, q_eps), (k, k_weight, k_eps)))
    return [*(rotary_reference(x, *angles) for x in normed), v]


def in_float64(q, k, v, q_weight, k_weight, q_eps, k_eps, *angles) -> list[torch.Tensor]:
    """Return the same without rounding."""
    return [oracle(q, q_weight, q_eps, *angles), oracle(k, k_weight, k_eps, *angles), v.double()]


def check_step(run, rest, model, exact):
    """Assert that the result of a step is as accurate as a model's, and that the new token alone is written, as ``quantize`` says.

    ``run`` is the step, ``rest`` are its arguments from the buffers on, and ``model`` and ``exact`` its queries, key and value. Returns the
    result, and the key and the value that are kept.
    """
    buffers, (position, start, sinks, format, mask, scale) = Buffers(*rest[:4]), rest[4:]
    before, slot = buffers.clone(), int(position) % buffers.k_codes.shape[2]
    exact_cache = dense(before, slot, start, sinks, format, exact[1:])
    model_cache = [x.to(model[0].dtype) for x in dense(before, slot, start, sinks, format, model[1:])]
    with poisoned_memory():
        out = run()
    assert out.transpose(1, 2).is_contiguous()
    assert_accurate(out, softmax_attention(exact[0], *exact_cache, mask, scale), softmax_attention(model[0], *model_cache, mask, scale))
    recent = sinks + slot % (buffers.kept.shape[3] - sinks)
    written = buffers.kept[:, :, :, recent : recent + 1]
    parsed = Format.parse(format)
    for side, (codes, bits) in enumerate(((buffers.k_codes, parsed.k_bits), (buffers.v_codes, parsed.v_bits))):
        assert_accurate(written[side], exact[1 + side], model[1 + side])
        expected_codes, expected_scales = quantize(written[side], bits, unbiased=side == 0)
        assert_same_codes(codes[:, :, slot : slot + 1], expected_codes, written[side], bits)
        torch.testing.assert_close(buffers.scales[side, :, :, slot : slot + 1], expected_scales, rtol=2e-3, atol=0)
    for batch, first in enumerate(start.tolist()):
        if 0 <= slot - first < sinks:
            assert torch.equal(buffers.kept[:, batch, :, slot - first], written[:, batch, :, 0])
            before.kept[:, batch, :, slot - first] = written[:, batch, :, 0]
    before.kept[:, :, :, recent] = buffers.kept[:, :, :, recent]
    before.k_codes[:, :, slot], before.v_codes[:, :, slot] = buffers.k_codes[:, :, slot], buffers.v_codes[:, :, slot]
    before.scales[:, :, :, slot] = buffers.scales[:, :, :, slot]
    for name, actual, expected in zip(Buffers._fields, buffers, before):
        assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0)), f"{name} changed elsewhere"
    return out, written


def check(arguments, **launch):
    given, rest = arguments[:FIRST_BUFFER], arguments[FIRST_BUFFER:]
    run = partial(qk_norm_rope_quantized_attention_triton, *arguments, **launch)
    out, written = check_step(run, rest, in_dtype(*given), in_float64(*given))
    assert torch.equal(written[1], arguments[2])
    return out


@given(
    st.sampled_from(FORMATS), st.integers(1, 3), st.sampled_from([(1, 1), (4, 2), (2, 2), (6, 2)]), st.sampled_from([9, 33, 70]),
    st.integers(-70, 69), st.sampled_from(VARIANTS), dtypes, st.integers(0, 3), st.integers(1, 20),
    st.lists(st.integers(0, 9), min_size=3, max_size=3), st.sampled_from(MASKS), layouts,
    st.sampled_from(["contiguous", "transposed", "sliced"]), st.booleans(), st.booleans(),
    st.sampled_from([None, 1, 2, 5]), st.sampled_from([None, 1, 2]), seeds,
)  # fmt: skip
def test_kernel_is_as_accurate_as_eager(
    device, format, batch, heads, slots, position, variant, dtype, sinks, window, starts, mask_kind, layout, cache_layout, q_norm, k_norm, n_splits,
    block_m, seed,
):  # fmt: skip
    position = max(-slots, min(position, slots - 1))
    arguments = make_arguments(
        seed, format, batch, heads, slots, position, variant, dtype, device, sinks, window, starts, mask_kind, dtype, layout, cache_layout,
        q_norm, k_norm,
    )  # fmt: skip
    check(arguments, n_splits=n_splits, block_m=block_m)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("kind", "n_splits", "dtype"), [("none", 1, torch.bfloat16), ("left_padded", 3, torch.float16), ("additive", 20, torch.bfloat16)]
)
def test_long_cache(device, format, kind, n_splits, dtype):
    arguments = make_arguments(0, format, 1, (4, 2), 300, 280, (128, [], False), dtype, device, 4, 64, mask_kind=kind, mask_dtype=dtype)
    check(arguments, n_splits=n_splits)


@pytest.mark.parametrize(
    ("format", "kind", "block_m"), [("int4", "left_padded", None), ("int3", "none", 1), ("k4v3", "additive", 2), ("fp8", "none", 4)]
)
@pytest.mark.parametrize("multiprocessors", [1, 200])
def test_programs_of_one_row_where_all_have_room(device, format, kind, block_m, multiprocessors, monkeypatch):
    monkeypatch.setattr(flash_decoding_launch, "_sm_count", lambda device: multiprocessors)
    arguments = make_arguments(
        1, format, 2, (6, 2), 150, 140, (64, [], False), torch.bfloat16, device, 3, 37, mask_kind=kind, mask_dtype=torch.bfloat16
    )
    check(arguments, block_m=block_m)


@pytest.mark.parametrize(
    ("batch", "kept_tiles", "block_m", "chosen"),
    [(1, 5, 2, (5, 1)), (2, 5, 2, (5, 1)), (3, 5, 2, (3, 2)), (32, 5, 2, (3, 2)), (1, 40, 1, (8, 1)), (64, 1, 2, (1, 2))],
)
def test_programs_share_the_kept_tokens_as_they_have_room(batch, kept_tiles, block_m, chosen, monkeypatch):
    monkeypatch.setattr(flash_decoding_launch, "_sm_count", lambda device: 132)
    assert _choose_parts(kept_tiles, (8 * batch, 52), block_m, torch.device("cpu")) == chosen


@pytest.mark.parametrize("launch", [{"block_n": 16}, {"block_n": 32}, {"block_n": 64, "num_warps": 2}, {"block_n": 32, "num_warps": 4, "block_m": 1}])
def test_launches(device, launch):
    arguments = make_arguments(0, "int4", 1, (4, 2), 300, 299, (128, [24, 20, 20], True), torch.bfloat16, device, 4, 64, mask_kind="left_padded")
    check(arguments, n_splits=2, **launch)


@pytest.mark.parametrize("launch", [{"block_m": 16}, {"block_n": 8}])
def test_a_launch_that_the_tensor_cores_cannot_take_is_refused(device, launch):
    arguments = make_arguments(0, "int4", 1, (4, 2), 33, 20, (64, [], False), torch.float32, device)
    with pytest.raises(ValueError, match="block_m must be at most 8 and block_n at least 16"):
        qk_norm_rope_quantized_attention_triton(*arguments, **launch)


def test_a_window_as_large_as_the_cache_gives_dense_attention(device):
    dense_caches = [torch.zeros(2, 2, 40, 64, device=device) for _ in range(2)]
    buffers = Buffers(*(x.zero_() for x in poisoned("int3", 2, 2, 40, 64, 40, torch.float32, device)))
    start = torch.zeros(2, dtype=torch.int64, device=device)
    for position in range(0, 40, 3):
        arguments = make_arguments(position, "int3", 2, (4, 2), 40, position, (64, [], False), torch.float32, device)
        place, mask = (
            arguments[POSITION],
            (torch.arange(40, device=device) <= position)[None, None, None] & (torch.arange(40, device=device) % 3 == 0),
        )
        expected = qk_norm_rope_attention(*arguments[:FIRST_BUFFER], *dense_caches, place, mask, 0.125)
        out = qk_norm_rope_quantized_attention(*arguments[:FIRST_BUFFER], *buffers, place, start, 0, "int3", mask, 0.125)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(device, format, dtype):
    arguments = make_arguments(0, format, 2, (4, 2), 33, 20, (64, [], False), dtype, device)
    torch.library.opcheck(torch.ops.qtts.qk_norm_rope_quantized_attention.default, tuple(arguments), test_utils=EVERY_OPCHECK)


def test_no_queries(device):
    q, k, v, *rest = make_arguments(0, "int4", 1, (4, 2), 33, 20, (64, [], False), torch.float32, device)
    weights, angles, start = rest[:4], [table[:0] for table in rest[4:6]], rest[13]
    buffers = poisoned("int4", 0, 2, 33, 64, 7, torch.float32, device)
    arguments = [q[:0], k[:0], v[:0], *weights, *angles, *rest[6:8], *buffers, rest[12], start[:0], *rest[14:16], None, 0.1]
    for attention in (qk_norm_rope_quantized_attention, qk_norm_rope_quantized_attention_triton):
        assert attention(*arguments).shape == (0, 4, 1, 64)


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda q: q.repeat(1, 1, 2, 1), ValueError, "cos must have the shape|position must have|k must have the shape"),
        (2, lambda v: v.half(), TypeError, "src must have the dtype of v_cache"),
        (3, lambda w: w.repeat_interleave(2)[::2], ValueError, "q_weight must be contiguous, got the stride 2"),
        (11, lambda codes: codes[:, :, :4], ValueError, r"v_codes must have the shape \(1, 2, 4, 32\)"),
        (11, lambda codes: codes.repeat(1, 1, 1, 2)[..., 2:34], ValueError, "the rows of k_codes must begin at multiples of 4 bytes"),
        (14, lambda kept: kept[:, :, :, :2], ValueError, "kept must have room for the new token beside its 2 sinks"),
        (15, lambda position: position.int(), TypeError, "position must be int64"),
        (18, lambda _: "int5", ValueError, "got 'int5'"),
        (19, lambda mask: mask.long(), TypeError, "mask must be bool or floating, got torch.int64"),
        (19, lambda mask: mask[..., :5], ValueError, r"broadcast to \(1, 4, 1, 33\)"),
    ],
)
def test_bad_input(place, change, error, message):
    arguments = make_arguments(0, "int4", 1, (4, 2), 33, 20, (64, [], False), torch.float32, "cpu")
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message):
        qk_norm_rope_quantized_attention(*arguments)

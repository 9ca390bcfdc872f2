import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, seeds

from qtts_compile.kernels import flash_decoding_launch
from qtts_compile.kernels.decode_attention import decode_attention, decode_attention_reference, decode_attention_triton
from qtts_compile.kernels.flash_decoding_launch import choose_splits, plan_launch, plan_looks

MASKS = ["none", "bool", "additive", "lowest", "left_padded", "sliding_window", "per_head", "one_row_excluded"]


def make_mask(kind: str, seed: int, batch: int, heads: int, tokens: int, keys: int, dtype: torch.dtype, device: str) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(keys)
    if kind == "none":
        return None
    if kind == "left_padded":
        padding = torch.randint(0, keys, (batch, 1, 1, 1), generator=generator)
        return (columns >= padding).expand(batch, 1, tokens, keys).to(device)
    if kind == "sliding_window":
        newest = keys - tokens + torch.arange(tokens)[:, None]
        return ((columns <= newest) & (columns > newest - 7))[None, None].to(device)
    heads = heads if kind == "per_head" else 1
    attend = torch.rand(batch, heads, tokens, keys, generator=generator) < 0.4
    attend[..., keys // 2] = True
    if kind == "one_row_excluded":
        attend[:, :, 0] = False
    if kind in ("bool", "per_head"):
        return attend.to(device)
    excluded = torch.finfo(dtype).min if kind == "lowest" else float("-inf")
    values = torch.randn(attend.shape, generator=generator).masked_fill(~attend, excluded)
    return values.to(device, dtype)


def excluding(attend: torch.Tensor, excluded: float | str) -> torch.Tensor:
    """Return the mask that attends where ``attend`` does: itself if what it excludes is False, else float32 with that or the "lowest" value."""
    if excluded is False:
        return attend
    value = torch.finfo(torch.float32).min if excluded == "lowest" else float(excluded)
    return torch.zeros(attend.shape, device=attend.device).masked_fill(~attend, value)


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Compute attention as models spell it, in the dtype of ``q``; rows without a key give zeros."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is None:
        return scores.softmax(-1) @ v
    mask = mask.expand(scores.shape)
    attend = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    if mask.dtype != torch.bool:
        scores = scores + mask.to(scores.dtype)
    return scores.masked_fill(~attend, float("-inf")).softmax(-1).nan_to_num(0.0) @ v


def check(q, k, v, mask, n_splits=None, block_m=None):
    scale = q.shape[-1] ** -0.5
    with poisoned_memory():
        out = decode_attention_triton(q, k, v, mask, scale, n_splits, block_m=block_m)
    oracle = softmax_attention(q.double(), k.double(), v.double(), mask, scale)
    assert_accurate(out, oracle, softmax_attention(q, k, v, mask, scale))
    batch, heads, tokens, width = q.shape
    assert out.transpose(1, 2).is_contiguous()
    return out


@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (1, 2), (2, 2), (1, 4), (2, 8)]), st.integers(1, 5), st.sampled_from([1, 17, 32, 70, 150]),
    st.sampled_from([40, 80, 96, 128]), dtypes, st.sampled_from(MASKS), dtypes, layouts, layouts, st.sampled_from([None, 1, 2, 5]),
    st.sampled_from([None, 1, 2]), seeds,
)  # fmt: skip
def test_kernel_is_as_accurate_as_eager(
    device, batch, heads, tokens, keys, width, dtype, mask_kind, mask_dtype, q_layout, kv_layout, n_splits, block_m, seed
):
    k_heads, group = heads
    q = random_tensor(seed, (batch, k_heads * group, tokens, width), dtype, device, q_layout)
    k = random_tensor(seed + 1, (batch, k_heads, keys, width), dtype, device, kv_layout)
    v = random_tensor(seed + 2, (batch, k_heads, keys, width), dtype, device, kv_layout)
    mask = make_mask(mask_kind, seed + 3, batch, k_heads * group, tokens, keys, mask_dtype, device)
    check(q, k, v, mask, n_splits, block_m)


@given(st.sampled_from(MASKS), dtypes, seeds)
def test_reference_is_as_accurate_as_eager(device, mask_kind, dtype, seed):
    q = random_tensor(seed, (2, 4, 3, 40), dtype, device, "transposed")
    k, v = (random_tensor(seed + i, (2, 2, 17, 40), dtype, device) for i in (1, 2))
    mask = make_mask(mask_kind, seed, 2, 4, 3, 17, dtype, device)
    oracle = softmax_attention(q.double(), k.double(), v.double(), mask, 0.2)
    assert_accurate(decode_attention_reference(q, k, v, mask, 0.2), oracle, softmax_attention(q, k, v, mask, 0.2))


@pytest.mark.parametrize("n_splits", [1, 3, 64])
@pytest.mark.parametrize("kind", ["none", "left_padded", "additive"])
def test_long_cache(device, kind, n_splits):
    q = random_tensor(0, (1, 4, 1, 64), torch.bfloat16, device, "transposed")
    k, v = (random_tensor(seed, (1, 2, 1000, 64), torch.bfloat16, device) for seed in (1, 2))
    check(q, k, v, make_mask(kind, 3, 1, 4, 1, 1000, torch.bfloat16, device), n_splits)


@pytest.mark.parametrize("excluded", [False, float("-inf"), "lowest"])
@pytest.mark.parametrize("n_splits", [1, 4])
def test_what_the_mask_excludes_may_hold_anything(device, excluded, n_splits):
    k, v = (random_tensor(seed, (1, 2, 300, 64), torch.float32, device) for seed in (1, 2))
    q = random_tensor(0, (1, 4, 2, 64), torch.float32, device)
    mask = torch.ones(1, 1, 1, 300, dtype=torch.bool, device=device)
    mask[..., 100:] = False
    mask = excluding(mask, excluded)
    expected = check(q, k, v, mask, n_splits)
    k[:, :, 100:] = float("nan")
    v[:, :, 100:] = float("nan")
    assert torch.equal(decode_attention_triton(q, k, v, mask, 64**-0.5, n_splits), expected)


@pytest.mark.parametrize("n_splits", [1, 2])
def test_rows_without_a_key_give_zeros(device, n_splits):
    q, k, v = (random_tensor(seed, (1, 2, keys, 40), torch.float32, device) for seed, keys in ((0, 2), (1, 70), (2, 70)))
    mask = torch.zeros(1, 1, 2, 70, dtype=torch.bool, device=device)
    mask[:, :, 1, 5] = True
    with poisoned_memory():
        out = decode_attention_triton(q, k, v, mask, 1.0, n_splits)
    assert (out[:, :, 0] == 0).all()
    torch.testing.assert_close(out[:, :, 1], v[:, :, 5])


def test_nan_in_the_mask_is_not_hidden(device):
    q, k, v = (random_tensor(seed, (1, 1, keys, 40), torch.float32, device) for seed, keys in ((0, 1), (1, 5), (2, 5)))
    mask = torch.full((1, 1, 1, 5), float("nan"), device=device)
    assert decode_attention_triton(q, k, v, mask, 1.0).isnan().all()


def test_large_scores_do_not_overflow(device):
    q, k, v = (1e3 * random_tensor(seed, (1, 2, keys, 40), torch.float32, device) for seed, keys in ((0, 2), (1, 70), (2, 70)))
    assert decode_attention_triton(q, k, v, None, 1.0, 2).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 1, 40), (1, 4, 0, 40)])
def test_no_queries(device, shape):
    k = torch.ones(shape[0], 2, 5, 40, device=device)
    assert decode_attention_triton(torch.empty(shape, device=device), k, k, None, 1.0).shape == shape


def test_splits_fill_the_gpu_and_no_more():
    assert choose_splits(1, 8, 132) == choose_splits(2, 8, 132) == 1
    assert choose_splits(10, 8, 132) == 10
    assert choose_splits(1024, 8, 132) == 64
    assert choose_splits(1000, 8, 132) == 63  # of 16 tiles each, as of 64 the largest
    assert choose_splits(1000, 64, 132) == 33
    assert choose_splits(1000, 10000, 132) == 1


@pytest.mark.parametrize(("tiles", "looks"), [(1, (1, 1)), (5, (1, 8)), (9, (1, 16)), (16, (1, 16)), (17, (4, 8)), (64, (8, 8))])
def test_one_look_sees_more_tiles_than_one_of_several(tiles, looks):
    assert plan_looks(tiles) == looks


@pytest.mark.parametrize(("batch", "tokens", "block_m"), [(1, 1, 1), (1, 2, 2), (2, 1, 1), (8, 1, 2), (8, 2, 4)])
def test_a_query_head_has_programs_of_its_own_where_all_have_room(batch, tokens, block_m, monkeypatch):
    monkeypatch.setattr(flash_decoding_launch, "_sm_count", lambda device: 132)
    q, cache = torch.empty(batch, 16, tokens, 128), torch.empty(batch, 8, 2048, 128)
    assert plan_launch(q, cache, None, None, None, None, None).options["BLOCK_M"] == block_m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_opcheck(device, dtype, layout, kind):
    q = random_tensor(0, (2, 4, 3, 40), dtype, device, layout)
    k, v = (random_tensor(seed, (2, 2, 17, 40), dtype, device, layout) for seed in (1, 2))
    mask = make_mask(kind, 3, 2, 4, 3, 17, torch.float32, device)
    torch.library.opcheck(torch.ops.qtts.decode_attention.default, (q, k, v, mask, 0.2))


Q = torch.ones(1, 4, 1, 8)
K = torch.ones(1, 2, 5, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "error", "message"),
    [
        (Q.double(), K, K, None, TypeError, "q must be .*float64"),
        (Q, K.half(), K, None, TypeError, "k must have the dtype of q"),
        (Q, K, K.to("meta"), None, ValueError, "v must be on the device of q"),
        (Q[0], K, K, None, ValueError, r"q must have the shape \[B, Hq, T, D\]"),
        (Q, K[0], K, None, ValueError, r"k must have the shape \[B, Hk, S, D\]"),
        (Q, K.expand(2, 2, 5, 8), K, None, ValueError, r"k must have the shape \(1, 2, 5, 8\)"),
        (Q, K, K[:, :, :4], None, ValueError, r"v must have the shape \(1, 2, 5, 8\), got \(1, 2, 4, 8\)"),
        (Q, K[:, :, :0], K[:, :, :0], None, ValueError, "S > 0 keys"),
        (Q[:, :3], K, K, None, ValueError, "head count that divides q's 3"),
        (Q, K, K, torch.ones(1, 1, 1, 5, dtype=torch.int64), TypeError, "mask must be bool or floating, got torch.int64"),
        (Q, K, K, torch.ones(1, 5, dtype=torch.bool), ValueError, r"mask must have the shape \[B, Hq, T, S\]"),
        (Q, K, K, torch.ones(1, 1, 1, 6, dtype=torch.bool), ValueError, r"broadcast to \(1, 4, 1, 5\).*got \(1, 1, 1, 6\)"),
        (Q, K, K, torch.ones(1, 2, 1, 5, dtype=torch.bool), ValueError, r"broadcast to \(1, 4, 1, 5\).*got \(1, 2, 1, 5\)"),
    ],
)  # fmt: skip
def test_bad_input(q, k, v, mask, error, message):
    with pytest.raises(error, match=message):
        decode_attention(q, k, v, mask, 1.0)

"""Draw of one token a row: repetition penalty, blocked tokens, temperature, top-k, top-p, all in one launch and without sorting."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options, and do not know its loops.

from typing import Any

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_device, check_float_dtype, check_rank, check_shape
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.pdl import announce, pdl_options, wait_for_inputs
from qtts_compile.kernels.philox import uniform, uniform_reference
from qtts_compile.kernels.rows import with_unit_stride
from qtts_compile.kernels.sizes import next_power_of_2

MAX_V = 16384
MIN_BLOCK = 32


def sample(
    logits: torch.Tensor,
    controls: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    seen: torch.Tensor | None = None,
    blocked: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return one token a row, int64 ``[B]``, for ``logits`` ``[B, V]``, as transformers' processors and a multinomial draw choose it.

    ``controls`` is float32 ``[5]``: do_sample (0 or 1), temperature, top_k (0: off), top_p (1: off), repetition_penalty (1: off). It is read
    on the device, so that a CUDA graph replays with other settings. In float32 and in this order:

    - logits that ``seen`` (bool ``[B, V]``) marks are divided by repetition_penalty if positive and multiplied by it if not;
    - tokens that ``blocked`` (bool ``[B, V]``) marks are never chosen;
    - greedy: the largest logit wins, the lowest token on a tie. The steps below are for sampling only;
    - logits are divided by temperature;
    - top-k keeps the logits that are not below the k-th largest;
    - top-p drops the least probable tokens whose probabilities add up to at most 1 - top_p, but never all; of equals it drops the lower first
      (transformers: any);
    - token v is drawn with its probability among those kept, as the one whose logit, before the division, plus temperature times -log(-log(u)) is
      largest (Gumbel, 1954).

    The uniform number u of token v depends on nothing but its row's ``seed`` (int64 ``[B]``) and the number of the draw, ``offset`` (int64
    ``[1]``): it is word v % 4 of Philox-4x32-10 (Salmon et al., 2011) with the key ``seed`` and the counter (v // 4, offset). A row is thus
    served alike alone and in any batch; a caller that wants another draw changes ``offset``.

    ``controls``, ``seed`` and ``offset`` must be at rest: on a GPU of compute capability 9.0 or later they are read before earlier kernels of this
    package in the stream have ended.

    Raises ``TypeError`` for a wrong dtype and ``ValueError`` for shapes that do not match, a V outside [1, 16384] or different devices. A
    row whose largest logit is not finite (NaN, or everything blocked) or a temperature that is not positive while sampling is a
    ``ValueError`` on the CPU and trips a device-side assert on the GPU.
    """
    return torch.ops.qtts.sample.default(logits, controls, seed, offset, seen, blocked)


def sample_reference(
    logits: torch.Tensor,
    controls: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    seen: torch.Tensor | None,
    blocked: torch.Tensor | None,
) -> torch.Tensor:
    """Compute :func:`sample` in plain PyTorch."""
    do_sample, temperature, top_k, top_p, penalty = controls.tolist()
    width = logits.shape[1]
    x = logits.float()
    if seen is not None:
        x = torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x)
    if blocked is not None:
        x = x.masked_fill(blocked, float("-inf"))
    if do_sample and not temperature > 0:
        raise ValueError(f"temperature must be positive while sampling, got {temperature}; set do_sample to 0 for greedy decoding")
    largest = x.amax(-1)
    if not largest.isfinite().all():
        row = int(largest.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"each row must have a finite largest logit among the tokens not blocked, got {largest[row].item()} in row {row}")
    if not do_sample:
        return x.argmax(-1)
    scores = x / temperature
    if 1 <= top_k < width:
        kth = scores.topk(int(top_k)).values[:, -1:]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    if top_p < 1:
        ascending, tokens = scores.sort(dim=-1, stable=True)
        is_dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        is_dropped[:, -1] = False
        scores = scores.masked_fill(is_dropped.scatter(1, tokens, is_dropped), float("-inf"))
    noise = -temperature * (-uniform_reference(seed, offset, width).log()).log()
    return (x + noise).masked_fill(scores == float("-inf"), float("-inf")).argmax(-1)


def check_sample(
    logits: torch.Tensor,
    controls: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    seen: torch.Tensor | None,
    blocked: torch.Tensor | None,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`sample` accepts the arguments."""
    check_float_dtype("logits", logits)
    check_rank("logits", logits, "B, V")
    batch, width = logits.shape
    if not 0 < width <= MAX_V:
        raise ValueError(f"logits must have the shape [B, V] with 0 < V <= {MAX_V}, got {tuple(logits.shape)}")
    for name, tensor, dtype, shape in (
        ("controls", controls, torch.float32, (5,)),
        ("seed", seed, torch.int64, (batch,)),
        ("offset", offset, torch.int64, (1,)),
        ("seen", seen, torch.bool, (batch, width)),
        ("blocked", blocked, torch.bool, (batch, width)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
        check_shape(name, tensor, *shape)
        check_device(name, tensor, "logits", logits)


@triton.jit
def _sortable(x, SHIFT: tl.constexpr):
    """Map float32 to uint32 keys of the same order, less ``SHIFT`` low bits that carry nothing."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True) >> SHIFT


@triton.jit
def _kth_largest(x, k, SHIFT: tl.constexpr):
    """Return the ``k``-th largest entry of ``x`` ``[BLOCK]``, of which there are at least k."""
    keys = _sortable(x, SHIFT)
    low = tl.full([], 0, tl.uint32)
    high = tl.max(keys, axis=0) + 1
    # k keys are at least low, and fewer at least high. Each round counts from four thresholds upwards, in one reduction.
    while high - low > 1:
        stride = (high - low + 4) // 5
        above_12 = tl.join((keys >= low + stride).to(tl.int32), (keys >= low + 2 * stride).to(tl.int32))
        above_34 = tl.join((keys >= low + 3 * stride).to(tl.int32), (keys >= low + 4 * stride).to(tl.int32))
        counts = tl.sum(tl.join(above_12, above_34), axis=0)
        low += tl.sum(tl.sum((counts >= k).to(tl.uint32), axis=0), axis=0) * stride
        high = tl.minimum(high, low + stride)
    return tl.min(tl.where(keys >= low, x, float("inf")), axis=0)


@triton.jit
def _load_logits(Logits_ptr, Seen_ptr, Blocked_ptr, columns, V, penalty):
    """Load the logits of a row at ``columns``, a number or many, as float32, penalised where seen, and -inf where blocked or beyond V."""
    in_row = columns < V
    x = tl.load(Logits_ptr + columns, mask=in_row, other=1.0).to(tl.float32)  # a division of what is not finite takes longer, for all
    if Seen_ptr is not None:
        is_seen = tl.load(Seen_ptr + columns, mask=in_row, other=0).to(tl.int1)
        x = tl.where(is_seen, tl.where(x > 0, tl.div_rn(x, penalty), x * penalty), x)
    if Blocked_ptr is not None:
        in_row &= tl.load(Blocked_ptr + columns, mask=in_row, other=1) == 0
    return tl.where(in_row, x, float("-inf"))


@triton.jit
def draw_token(
    Logits_ptr, Controls_ptr, Seed_ptr, Offset_ptr, Seen_ptr, Blocked_ptr, V, strides, row,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    """Wait for the logits and return the token, int32, that :func:`sample` draws from row ``row``, int64, of them.

    A winner of the race that the filters drop shows that all tokens ranked below it are dropped too, and the race is run again among the others:
    not often, as what is dropped is improbable, while the filters' thresholds would take a search. ``strides`` are those of the rows of logits,
    seeds, ``seen`` and ``blocked``.
    """
    Logits_ptr += row * strides[0]
    if Seen_ptr is not None:
        Seen_ptr += row * strides[2]
    if Blocked_ptr is not None:
        Blocked_ptr += row * strides[3]
    columns = tl.arange(0, BLOCK)
    do_sample = tl.load(Controls_ptr) != 0
    temperature = tl.load(Controls_ptr + 1)
    top_k = tl.load(Controls_ptr + 2)
    top_p = tl.load(Controls_ptr + 3)
    penalty = tl.load(Controls_ptr + 4)
    k = tl.where((top_k >= 1) & (top_k < V), top_k, V).to(tl.int32)
    noise = tl.zeros([BLOCK], tl.float32)
    if do_sample:  # under a condition, or ptxas moves it behind the wait
        noise = -temperature * tl.log(-tl.log(uniform(tl.load(Seed_ptr + row * strides[1]), tl.load(Offset_ptr), BLOCK)))
    wait_for_inputs(HAS_PDL)
    x = _load_logits(Logits_ptr, Seen_ptr, Blocked_ptr, columns, V, penalty)
    # Comparisons would pass over a NaN; an infinity ends in the assert.
    score = tl.where(x == x, x + noise, float("inf"))
    # Ranks are those of the quotients, which may tie where float32 logits differ. In half precision they do not.
    if SHIFT == 0:
        if do_sample:
            x = tl.div_rn(x, temperature)
    weights = tl.zeros([BLOCK], tl.float32)
    target = 0.0
    has_top_p = do_sample & (top_p < 1.0)
    if has_top_p:
        z = x
        if SHIFT > 0:
            z = tl.div_rn(x, temperature)
        weights = tl.exp(z - tl.max(z, axis=0))
        weights = tl.where(x >= _kth_largest(x, k, SHIFT), weights, 0.0)
        # Not 0, which no entries at all would reach.
        target = tl.maximum(top_p * tl.sum(weights, axis=0), 1e-30)
    best, token = tl.max(score, axis=0, return_indices=True)
    is_dropped = do_sample & (temperature > 0)  # without a temperature there is no winner, and no end to this
    while is_dropped:
        chosen = _load_logits(Logits_ptr, Seen_ptr, Blocked_ptr, token, V, penalty)
        if SHIFT == 0:
            chosen = tl.div_rn(chosen, temperature)
        outranks = x > chosen
        is_dropped = tl.sum(outranks.to(tl.int32), axis=0) >= k
        if has_top_p:
            outranks |= (x == chosen) & (columns > token)
            is_dropped |= tl.sum(tl.where(outranks, weights, 0.0), axis=0) >= target
        if is_dropped:
            score = tl.where(outranks, score, float("-inf"))
            best, token = tl.max(score, axis=0, return_indices=True)
    is_valid = (best > float("-inf")) & (best < float("inf")) & ((temperature > 0) | (do_sample == 0))
    tl.device_assert(is_valid, "sample: a row's largest logit is not finite, or the temperature is not positive")
    return token


@triton.jit
def _sample_kernel(
    Logits_ptr, Controls_ptr, Seed_ptr, Offset_ptr, Seen_ptr, Blocked_ptr, V, strides, Token_ptr,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    row = tl.program_id(0).to(tl.int64)
    token = draw_token(Logits_ptr, Controls_ptr, Seed_ptr, Offset_ptr, Seen_ptr, Blocked_ptr, V, strides, row, BLOCK, SHIFT, HAS_PDL)
    tl.store(Token_ptr + row, token.to(tl.int64))


def draw_arguments(
    logits: torch.Tensor,
    controls: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    seen: torch.Tensor | None,
    blocked: torch.Tensor | None,
    num_warps: int | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments and launch options that a kernel needs for :func:`draw_token`; ``num_warps`` overrides what is chosen from V."""
    width = logits.shape[1]
    logits = with_unit_stride(logits)
    seen, blocked = (None if mask is None else with_unit_stride(mask) for mask in (seen, blocked))
    block = max(MIN_BLOCK, next_power_of_2(width))
    # A penalised logit has the bits of a float32.
    shift = 0 if seen is not None else {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[logits.dtype]
    strides = logits.stride(0), seed.stride(0), *(0 if mask is None else mask.stride(0) for mask in (seen, blocked))
    options = dict(BLOCK=block, SHIFT=shift, num_warps=num_warps or max(1, min(16, block // 256)), debug=True, sanitize_overflow=False)
    return (logits, controls.contiguous(), seed, offset, seen, blocked, width, strides), options | pdl_options(logits.device)


def sample_triton(
    logits: torch.Tensor, controls: torch.Tensor, seed: torch.Tensor, offset: torch.Tensor, seen: torch.Tensor | None,
    blocked: torch.Tensor | None, num_warps: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel of :func:`sample`; ``num_warps`` overrides what is chosen from V."""
    tokens = sample_fake(logits, controls, seed, offset, seen, blocked)
    if tokens.numel() > 0:
        arguments, options = draw_arguments(logits, controls, seed, offset, seen, blocked, num_warps)
        _sample_kernel[(logits.shape[0],)](*arguments, tokens, **options)
    return tokens


def sample_fake(
    logits: torch.Tensor,
    controls: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    seen: torch.Tensor | None,
    blocked: torch.Tensor | None,
) -> torch.Tensor:
    """Allocate the result of :func:`sample`."""
    return torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)


define_op(
    "sample(Tensor logits, Tensor controls, Tensor seed, Tensor offset, Tensor? seen, Tensor? blocked) -> Tensor",
    check=check_sample,
    cuda=sample_triton,
    cpu=sample_reference,
    fake=sample_fake,
)

"""What quantisation does to attention over random keys that are easy, and over those with what makes keys hard, by queries of either kind."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bench.forced import decoded, is_kept
from qtts_compile.kernels.turboquant.format import Format
from qtts_compile.turboquant_cache import Protect

HEADS, TOKENS, WIDTH = 8, 2048, 128
CLEAR = 0.25  # standard deviations of the scores by which a key leads where the choice is no near tie
MEAN, OUTLIER, OUTLIERS = 1.0, 10.0, (3, 40, 77, 126)  # in standard deviations; channels
QUERIES_TOO = ", queries too"  # of a kind of which queries are what keys are
KEYS = {  # mean of all channels, factor of some
    "gaussian": (0.0, 1.0),
    "shifted": (MEAN, 1.0),
    "outlier": (0.0, OUTLIER),
    "shifted outlier": (MEAN, OUTLIER),
}
KINDS = (*KEYS, *(name + QUERIES_TOO for name in KEYS if name != "gaussian"))


def draw(kind: str, heads: int, tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of one of :data:`KINDS`, float32 ``[heads, tokens, 128]``."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, heads, tokens, WIDTH, generator=generator, device=device)
    mean, factor = KEYS[kind.removesuffix(QUERIES_TOO)]
    for x in (q, k) if kind.endswith(QUERIES_TOO) else (k,):
        x[..., OUTLIERS] *= factor
        x += mean
    return q, k, v


def measure(states: tuple[Tensor, Tensor, Tensor], name: str, protect: Protect) -> dict[str, float]:
    """Compare attention over the newest token's view of a cache of format ``name`` with attention over keys and values as they are.

    Of every query: the cosine of the outputs, the KL divergence of the weights, and whether the same key has the largest, of all queries
    and of those whose best key leads clearly: of thousands of random keys some are always nearly as good as the best.
    """
    q, k, v = states
    parsed, slots = Format.parse(name), torch.arange(k.shape[1], device=k.device)
    kept = is_kept(slots, k.shape[1] - 1, protect)[:, None]
    k_seen = torch.where(kept, k, decoded(k, parsed.k_bits, unbiased=True))
    v_seen = torch.where(kept, v, decoded(v, parsed.v_bits, unbiased=False))
    exact, seen = ((q @ keys.mT * WIDTH**-0.5).log_softmax(-1) for keys in (k, k_seen))
    divergence = (exact.exp() * (exact - seen)).sum(-1)
    first, second = exact.topk(2).values.unbind(-1)
    same, clear = exact.argmax(-1) == seen.argmax(-1), first - second > CLEAR * exact.std(-1)
    return {
        "cosine": cosine_similarity(exact.exp() @ v, seen.exp() @ v_seen, dim=-1).mean().item(),
        "kl": divergence.mean().item(),
        "kl_p99": divergence.flatten().quantile(0.99).item(),
        "top1": same.float().mean().item(),
        "top1_clear": same[clear].float().mean().item(),
    }

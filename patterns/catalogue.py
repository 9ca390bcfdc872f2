"""Every rewrite, in the order in which it is tried: longest spelling first, then the fusions, largest region first,
and last what is given back to Inductor."""

from __future__ import annotations

import importlib

from qtts_compile.patterns.fuse import (
    add_rms_norm,
    embedding_linear,
    inline_swiglu,
    linear_add,
    norm_linears,
    norm_qkv_attention,
    norm_qkv_quantized_attention,
    norm_swiglu,
    qk_norm_rope_attention,
    qk_norm_rope_kv_write,
    qk_norm_rope_quantized_attention,
    rotary_qk,
    sample_embedding,
)
from qtts_compile.patterns.lift import attention, kv_write, rms_norm, rotary, swiglu

LIFT = (
    attention.PATTERN,
    attention.ENABLE_GQA,
    kv_write.PATTERN,
    rotary.INTERLEAVED,
    rotary.CONCATENATED,
    rotary.SINGLE,
    rms_norm.PATTERN,
    swiglu.PATTERN,
)
FUSE = (
    qk_norm_rope_kv_write,
    qk_norm_rope_attention,
    qk_norm_rope_quantized_attention,
    norm_swiglu,
    linear_add,
    embedding_linear,
    sample_embedding,
    norm_linears,
    norm_qkv_attention,
    norm_qkv_quantized_attention,
    add_rms_norm,
    rotary_qk,
    inline_swiglu,
)

# The op that a rewrite leaves in the graph; importing a kernel's module registers its op.
OPS = {
    "rms_norm": "rms_norm",
    "add_rms_norm": "add_rms_norm",
    "swiglu": "swiglu",
    "rotary": "rotary",
    "rotary_qk": "rotary_qk",
    "kv_write": "kv_write",
    "attention": "decode_attention",
    "qk_norm_rope_kv_write": "qk_norm_rope_kv_write",
    "qk_norm_rope_attention": "qk_norm_rope_attention",
    "qk_norm_rope_quantized_attention": "qk_norm_rope_quantized_attention",
    "norm_linears": "norm_linears",
    "norm_qkv_attention": "norm_qkv_attention",
    "norm_qkv_quantized_attention": "norm_qkv_quantized_attention",
    "norm_swiglu": "norm_swiglu",
    "linear_add": "linear_add",
    "embedding_linear": "embedding_linear",
    "sample_embedding": "sample_embedding",
}
for _module in dict.fromkeys(OPS.values()):
    importlib.import_module(f"qtts_compile.kernels.{_module.removesuffix('_qk')}")

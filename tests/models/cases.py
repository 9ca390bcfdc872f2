"""Decoder stacks by structure: sizes, norms, rotary layout and biases."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from .weights import randomise

Family = Literal["talker", "predictor", "qwen3", "qwen2", "llama"]
RopeLayout = Literal["single", "interleaved", "concatenated"]

QKV = ("q_proj", "k_proj", "v_proj")
GROUPS = 6  # codes of a frame; a published model has 16, and runs its predictor once for each but the first


@dataclass(frozen=True)
class ModelCase:
    """Describe one decoder stack; ``build`` makes it."""

    name: str
    family: Family
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_layout: RopeLayout = "single"
    sections: tuple[int, ...] = ()
    biased: tuple[str, ...] = ()
    rope_theta: float = 10_000.0

    @property
    def qk_norm(self) -> bool:
        return self.family in ("talker", "predictor", "qwen3")

    @property
    def rope_axes(self) -> int:
        return len(self.sections) or 1

    @property
    def attention_bias(self) -> bool:
        return bool(self.biased)

    def config(self, **overrides: Any) -> Any:
        """Return a fresh configuration object of this structure, with a small vocabulary; ``overrides`` replace or add its fields."""
        sizes: dict[str, Any] = dict(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            vocab_size=128,
            max_position_embeddings=32768,
        )
        if self.family != "qwen2":  # whose biases on Q, K and V are not an option
            sizes["attention_bias"] = self.attention_bias
        if self.family in ("qwen3", "qwen2", "llama"):
            import transformers

            classes = {"qwen3": transformers.Qwen3Config, "qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}
            config: Any = classes[self.family](**sizes | overrides)
            # transformers 5 moves it to rope_parameters, but importing qwen-tts-hf registers a default rotary embedding that reads it here.
            config.rope_theta = self.rope_theta
            return config
        from qwen_tts.core.models.configuration_qwen3_tts import Qwen3TTSTalkerCodePredictorConfig, Qwen3TTSTalkerConfig

        sizes["num_code_groups"] = GROUPS
        if self.family == "predictor":
            return Qwen3TTSTalkerCodePredictorConfig(**sizes | overrides)
        rope = dict(interleaved=self.rope_layout == "interleaved", mrope_section=list(self.sections), rope_type="default", type="default")
        sizes |= dict(rope_scaling=rope, text_hidden_size=self.hidden, text_vocab_size=128)
        return Qwen3TTSTalkerConfig(**sizes | overrides)

    def construct(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """Return the stack with the library's own initial weights, in eval mode, without gradients, attention by SDPA."""
        config = self.config()
        options: dict[str, Any] = dict(dtype=dtype, attn_implementation="sdpa")
        if self.family == "predictor":
            options["embedding_dim"] = self.hidden
        with torch.device(device):
            return _stack_class(self.family)._from_config(config, **options).eval().requires_grad_(False)

    def build(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> nn.Module:
        """Return the stack with random weights drawn from ``seed`` (see ``weights.randomise``)."""
        model = self.construct(dtype, device)
        randomise(model, seed)
        return model


def _stack_class(family: Family) -> Any:
    if family in ("talker", "predictor"):
        from qwen_tts.core.models import modeling_qwen3_tts as qwen_tts

        return qwen_tts.Qwen3TTSTalkerModel if family == "talker" else qwen_tts.Qwen3TTSTalkerCodePredictorModel
    import transformers

    return {"qwen3": transformers.Qwen3Model, "qwen2": transformers.Qwen2Model, "llama": transformers.LlamaModel}[family]


_TALKER = ModelCase(
    "talker-1.7b",
    "talker",
    layers=3,
    hidden=128,
    intermediate=384,
    heads=4,
    kv_heads=2,
    head_dim=32,
    rope_layout="interleaved",
    sections=(8, 4, 4),
)
_PREDICTOR = ModelCase("predictor", "predictor", layers=2, hidden=64, intermediate=192, heads=4, kv_heads=2, head_dim=32)
_PLAIN = replace(_PREDICTOR, intermediate=160)

CASES: list[ModelCase] = [
    _TALKER,
    replace(_TALKER, name="talker-0.6b", hidden=64, intermediate=192),
    _PREDICTOR,
    replace(_TALKER, name="talker-concatenated", rope_layout="concatenated"),
    replace(_TALKER, name="talker-odd", layers=5, hidden=72, intermediate=200, heads=6, kv_heads=2, head_dim=40, sections=(8, 6, 6)),
    replace(_TALKER, name="talker-bias", hidden=96, biased=(*QKV, "o_proj")),
    replace(_PLAIN, name="qwen3", family="qwen3"),
    replace(_PLAIN, name="llama", family="llama", heads=8, head_dim=8),
    replace(_PLAIN, name="qwen2", family="qwen2", biased=QKV),
]


def case(name: str) -> ModelCase:
    """Return the case of this name."""
    for candidate in CASES:
        if candidate.name == name:
            return candidate
    raise ValueError(f"no model case {name!r}; there are {', '.join(c.name for c in CASES)}")


def published(size: Literal["0.6b", "1.7b"], part: Literal["talker", "predictor"] = "talker") -> ModelCase:
    """Return the structure of a published Qwen3-TTS-12Hz checkpoint at full size; the predictor is the same in both sizes.

    The embedding tables, which the stack does not read when it is given ``inputs_embeds``, stay small.
    """
    widths = {"0.6b": (1024, 3072), "1.7b": (2048, 6144)}
    if size not in widths:
        raise ValueError(f"no published size {size!r}; there are {', '.join(widths)}")
    common: dict[str, Any] = dict(heads=16, kv_heads=8, head_dim=128, rope_theta=1e6)
    if part == "predictor":
        return ModelCase(f"{size}-predictor", "predictor", layers=5, hidden=1024, intermediate=3072, **common)
    if part != "talker":
        raise ValueError(f"no part {part!r}; there are talker, predictor")
    hidden, intermediate = widths[size]
    return ModelCase(
        f"{size}-talker",
        "talker",
        layers=28,
        hidden=hidden,
        intermediate=intermediate,
        rope_layout="interleaved",
        sections=(24, 20, 20),
        **common,
    )

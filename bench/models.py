"""Whole Qwen3-TTS models with random weights at the published shapes, in memory and as checkpoint directories.

No weights are downloaded: speed does not depend on them. The text tokenizer is the embedded model's, in a text vocabulary of the published size.
"""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from qtts_compile import demo_config
from qtts_compile.demo_model import GAINS, cached_checkpoint
from qtts_compile.environment import import_qwen_tts
from qtts_compile.turboquant_cache import Protect

Size = Literal["0.6b", "1.7b", "tiny"]
SPEAKER, LANGUAGE = "vivian", "english"

TINY_PROTECT = Protect(first_layers=1, last_layers=1, sinks=2, window=8)  # by default its short prompts would have no codes

_ATTENTION = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
_PREDICTOR = _ATTENTION | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 5,
    "layer_types": ["full_attention"] * 5,
    "max_window_layers": 28,
    "vocab_size": 2048,
}
_TALKER = _ATTENTION | {
    "num_hidden_layers": 28,
    "text_hidden_size": 2048,
    "text_vocab_size": 151936,
    "rope_scaling": {"interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default", "type": "default"},
}
_WIDTHS = {"0.6b": {"hidden_size": 1024, "intermediate_size": 3072}, "1.7b": {"hidden_size": 2048, "intermediate_size": 6144}}
_CODEC_DECODER = {
    "latent_dim": 1024,
    "codebook_dim": 512,
    "decoder_dim": 1536,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 8,
    "semantic_codebook_size": 4096,
    "vector_quantization_hidden_dimension": 512,
}
_CODEC_ENCODER = {
    "codebook_dim": 256,
    "codebook_size": 2048,
    "head_dim": 64,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_filters": 64,
    "num_hidden_layers": 8,
    "num_quantizers": 32,
    "upsample_groups": 512,
    "vector_quantization_hidden_dimension": 256,
}


def model_config(size: Size) -> dict[str, Any]:
    """Return ``config.json`` of a published CustomVoice model, with the embedded tokenizer's token ids."""
    config = demo_config.model_config("custom_voice")
    if size != "tiny":
        config["talker_config"] |= _TALKER | _WIDTHS[size]
        config["talker_config"]["code_predictor_config"] |= _PREDICTOR
        config["tts_model_size"] = {"0.6b": "0b6", "1.7b": "1b7"}[size]
    return config


def codec_config(size: Size) -> dict[str, Any]:
    """Return ``speech_tokenizer/config.json`` of the published 12 Hz tokenizer."""
    config = demo_config.codec_config()
    if size != "tiny":
        config["decoder_config"] |= _CODEC_DECODER
        config["encoder_config"] |= _CODEC_ENCODER
    return config


def build(size: Size, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """Return a ``Qwen3TTSModel`` whose weights, drawn on ``device`` from ``seed``, are the same in every process on one kind of device."""
    import_qwen_tts()
    from qwen_tts import Qwen3TTSModel

    tts: Any = Qwen3TTSModel.from_pretrained(str(cached_checkpoint("custom_voice")), dtype=dtype, device_map=device)
    tokenizer: Any = tts.model.speech_tokenizer
    if size != "tiny":
        generate_config = tts.model.generate_config
        tokenizer.model, tts.model = (_construct(*part, dtype, device) for part in _parts(size))
        tokenizer.config = tokenizer.model.config
        tts.model.load_speech_tokenizer(tokenizer)
        tts.model.load_generate_config(generate_config)
    for module in (tts.model, tokenizer.model):
        randomise(module, seed)
        module.eval().requires_grad_(False)
    return tts


def protection(size: Size, kv_cache: str) -> Protect | None:
    """Return what a cache keeps as it is, for ``TTS``: of published sizes the defaults."""
    return TINY_PROTECT if size == "tiny" and kv_cache != "bf16" else None


def parameters(size: Size) -> dict[str, int]:
    """Return how many parameters the speech tokenizer and the model have."""
    import_qwen_tts()
    parts = [_construct(*part, torch.bfloat16, "meta") for part in _parts(size)]
    return {name: sum(tensor.numel() for tensor in part.parameters()) for name, part in zip(("speech tokenizer", "model"), parts)}


def write_checkpoint(directory: Path, size: Size, device: str) -> Path:
    """Write a bfloat16 checkpoint that ``Qwen3TTSModel.from_pretrained`` loads, unless ``directory`` holds it already."""
    from safetensors.torch import save_file

    if (directory / "complete").exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(cached_checkpoint("custom_voice"), directory)
    tts = build(size, device, torch.bfloat16)
    for folder, config, module in (
        (directory, model_config(size), tts.model),
        (directory / "speech_tokenizer", codec_config(size), tts.model.speech_tokenizer.model),
    ):
        (folder / "config.json").write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    (directory / "complete").touch()
    return directory


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Draw weights that neither fade nor explode on their way through: each matrix and convolution keeps the variance of its input."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "embed" in name:
            parameter.normal_(generator=generator)
        elif parameter.ndim > 1:
            parameter.normal_(std=GAINS.get(name, 1.0) * parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.02, generator=generator)


def _parts(size: Size) -> list[tuple[Any, Any]]:
    """Return classes and configurations of the speech tokenizer and of the model."""
    from qwen_tts.core.models import Qwen3TTSConfig, Qwen3TTSForConditionalGeneration
    from qwen_tts.core.tokenizer_12hz.configuration_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Config
    from qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Model

    # The configuration classes write into the dictionaries they are given.
    return [
        (Qwen3TTSTokenizerV2Model, Qwen3TTSTokenizerV2Config(**deepcopy(codec_config(size)))),
        (Qwen3TTSForConditionalGeneration, Qwen3TTSConfig(**deepcopy(model_config(size)))),
    ]


def _construct(model: Any, config: Any, dtype: torch.dtype, device: str) -> Any:
    with torch.device(device):
        return model._from_config(config, dtype=dtype, attn_implementation="sdpa")

"""The files of the embedded model's checkpoint: the published structure with small sizes."""

from typing import Any, Literal, get_args

Kind = Literal["custom_voice", "voice_design", "base"]
KINDS: tuple[Kind, ...] = get_args(Kind)

TALKER_HIDDEN = 96
WORDS = ("assistant", "user")  # qwen_tts counts on one token for each role name
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>")

LANGUAGES = {
    "chinese": 2055,
    "english": 2050,
    "german": 2053,
    "italian": 2070,
    "portuguese": 2071,
    "spanish": 2054,
    "japanese": 2058,
    "korean": 2064,
    "french": 2061,
    "russian": 2069,
}
DIALECTS = {"beijing_dialect": 2074, "sichuan_dialect": 2062}
SPEAKERS = {
    "serena": 3066,
    "vivian": 3065,
    "uncle_fu": 3010,
    "ryan": 3061,
    "aiden": 2861,
    "ono_anna": 2873,
    "sohee": 2864,
    "eric": 2875,
    "dylan": 2878,
}
SPEAKER_DIALECTS = {"eric": "sichuan_dialect", "dylan": "beijing_dialect"}


def _byte_level_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary of all 256 bytes plus `WORDS`, and the merges that build each word letter by letter."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    # GPT-2's byte alphabet: a printable byte stands for itself, the n-th other one for the character 256 + n.
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    merges = list(dict.fromkeys((word[:end], word[end]) for word in WORDS for end in range(1, len(word))))
    tokens = alphabet + [left + right for left, right in merges]
    return {token: index for index, token in enumerate(tokens)}, merges


VOCABULARY, MERGES = _byte_level_bpe()
SPECIAL_IDS = {token: len(VOCABULARY) + index for index, token in enumerate(SPECIAL_TOKENS)}


def model_config(kind: Kind) -> dict[str, Any]:
    """Return ``config.json``."""
    named_voices = kind == "custom_voice"
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "attention_bias": False, "attention_dropout": 0}
    block = attention | {"hidden_act": "silu", "rms_norm_eps": 1e-06, "rope_theta": 1000000, "use_cache": True, "num_code_groups": 16}
    code_predictor = block | {
        "model_type": "qwen3_tts_talker_code_predictor",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention"] * 3,
        "max_position_embeddings": 65536,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 512,
    }
    talker = block | {
        "model_type": "qwen3_tts_talker",
        "hidden_size": TALKER_HIDDEN,
        "intermediate_size": 288,
        "num_hidden_layers": 4,
        "max_position_embeddings": 32768,
        "position_id_per_seconds": 13,
        "rope_scaling": {"interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default", "type": "default"},
        "sliding_window": None,
        "use_sliding_window": False,
        "text_hidden_size": 64,
        "text_vocab_size": len(VOCABULARY) + len(SPECIAL_IDS),
        "vocab_size": 3072,
        "codec_pad_id": 2148,
        "codec_bos_id": 2149,
        "codec_eos_token_id": 2150,
        "codec_think_id": 2154,
        "codec_nothink_id": 2155,
        "codec_think_bos_id": 2156,
        "codec_think_eos_id": 2157,
        "codec_language_id": LANGUAGES | DIALECTS if named_voices else LANGUAGES,
        "spk_id": SPEAKERS if named_voices else {},
        "spk_is_dialect": {name: SPEAKER_DIALECTS.get(name, False) for name in SPEAKERS} if named_voices else {},
        "code_predictor_config": code_predictor,
    }
    speaker_encoder = {
        "enc_dim": TALKER_HIDDEN,
        "enc_channels": [32, 32, 32, 32, 96],
        "enc_attention_channels": 16,
        "enc_se_channels": 16,
        "sample_rate": 24000,
    }
    return {
        "architectures": ["Qwen3TTSForConditionalGeneration"],
        "model_type": "qwen3_tts",
        "tokenizer_type": "qwen3_tts_tokenizer_12hz",
        "tts_model_size": "tiny",
        "tts_model_type": kind,
        "assistant_token_id": VOCABULARY["assistant"],
        "im_start_token_id": SPECIAL_IDS["<|im_start|>"],
        "im_end_token_id": SPECIAL_IDS["<|im_end|>"],
        "tts_pad_token_id": SPECIAL_IDS["<tts_pad>"],
        "tts_bos_token_id": SPECIAL_IDS["<tts_text_bos>"],
        "tts_eos_token_id": SPECIAL_IDS["<tts_text_eod>"],
        "talker_config": talker,
    } | ({"speaker_encoder_config": speaker_encoder} if kind == "base" else {})


def codec_config() -> dict[str, Any]:
    """Return ``speech_tokenizer/config.json``: 24 kHz, 1920 samples a frame, as published."""
    decoder = {
        "latent_dim": 32,
        "codebook_dim": 32,
        "codebook_size": 2048,
        "decoder_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "num_quantizers": 16,
        "num_semantic_quantizers": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000,
        "sliding_window": 72,
        "layer_scale_initial_scale": 0.01,
        "max_position_embeddings": 8000,
        "upsample_rates": [8, 5, 4, 3],
        "upsampling_ratios": [2, 2],
        "vector_quantization_hidden_dimension": 32,
    }
    encoder = {
        "_frame_rate": 12.5,
        "audio_channels": 1,
        "codebook_dim": 16,
        "codebook_size": 512,
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_filters": 4,
        "num_hidden_layers": 2,
        "num_quantizers": 16,
        "num_semantic_quantizers": 1,
        "sampling_rate": 24000,
        "upsample_groups": 32,
        "upsampling_ratios": [8, 6, 5, 4],
        "use_cache": False,
        "vector_quantization_hidden_dimension": 16,
    }
    return {
        "architectures": ["Qwen3TTSTokenizerV2Model"],
        "model_type": "qwen3_tts_tokenizer_12hz",
        "encoder_valid_num_quantizers": 16,
        "input_sample_rate": 24000,
        "output_sample_rate": 24000,
        "encode_downsample_rate": 1920,
        "decode_upsample_rate": 1920,
        "encoder_config": encoder,
        "decoder_config": decoder,
    }


def codec_preprocessor_config() -> dict[str, Any]:
    """Return ``speech_tokenizer/preprocessor_config.json``."""
    return {
        "feature_extractor_type": "EncodecFeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": 24000,
    }


def generation_config() -> dict[str, Any]:
    """Return ``generation_config.json``: the published sampling, shorter."""
    sampling = {"temperature": 0.9, "top_p": 1.0, "top_k": 50}
    subtalker = {f"subtalker_{name}": value for name, value in sampling.items()}
    return {"do_sample": True, "repetition_penalty": 1.05, "subtalker_dosample": True, "max_new_tokens": 256} | sampling | subtalker


def tokenizer_config() -> dict[str, Any]:
    """Return ``tokenizer_config.json``."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(index): {"content": token} | plain for token, index in SPECIAL_IDS.items()},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "split_special_tokens": False,
        "model_max_length": 131072,
    }

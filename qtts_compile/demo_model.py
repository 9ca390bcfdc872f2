"""The embedded model: a tiny Qwen3-TTS checkpoint with random weights, in the published directory format."""

import hashlib
import json
import shutil
import tempfile
import zlib
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from qtts_compile import demo_config, user_cache
from qtts_compile.demo_config import KINDS, Kind
from qtts_compile.environment import import_qwen_tts

GAINS = {"decoder.decoder.6.conv.weight": 0.01}  # the codec's last convolution: a waveform within [-1, 1]


def cached_checkpoint(kind: Kind = "custom_voice", seed: int = 0) -> Path:
    """Return the demo checkpoint from the cache, building it first where it is missing.

    The cache is :func:`qtts_compile.user_cache.folder`.
    """
    recipe = hashlib.sha256(b"".join(Path(path).read_bytes() for path in (__file__, demo_config.__file__))).hexdigest()[:12]
    directory = user_cache.folder() / f"demo-{kind}-seed{seed}-{recipe}"
    return directory if directory.is_dir() else build_checkpoint(directory, kind=kind, seed=seed)


def build_checkpoint(directory: str | Path, *, kind: Kind = "custom_voice", seed: int = 0) -> Path:
    """Write a tiny checkpoint that ``qwen_tts.Qwen3TTSModel.from_pretrained`` loads, and return its directory.

    The structure, the codec vocabulary of 3072 and the codec's special ids are the published ones; layers, widths and the text
    vocabulary are small. The codec turns each frame of 16 codes into 1920 samples at 24 kHz. Weights are float32, random, and
    the same bytes for the same ``seed``, so the audio is noise. ``directory`` appears complete or not at all.

    Raises ValueError for an unknown ``kind`` and FileExistsError where ``directory`` exists and is not empty.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of checkpoint {kind!r}: choose one of {', '.join(KINDS)}")
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and is not empty: choose another directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=directory.name, dir=directory.parent))
    try:
        _write_files(staging, kind, seed)
        staging.chmod(0o755)
        try:
            staging.rename(directory)
        except OSError:
            if not (directory / "config.json").is_file():  # unless another process has just built the same
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def _write_files(directory: Path, kind: Kind, seed: int) -> None:
    import_qwen_tts()
    from qwen_tts.core.models import Qwen3TTSConfig, Qwen3TTSForConditionalGeneration
    from qwen_tts.core.tokenizer_12hz.configuration_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Config
    from qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Model

    config, codec_config = demo_config.model_config(kind), demo_config.codec_config()
    codec = directory / "speech_tokenizer"
    codec.mkdir()
    for path, content in {
        directory / "config.json": config,
        directory / "generation_config.json": demo_config.generation_config(),
        directory / "preprocessor_config.json": {"padding_side": "left", "processor_class": "Qwen3TTSProcessor"},
        directory / "tokenizer_config.json": demo_config.tokenizer_config(),
        directory / "vocab.json": demo_config.VOCABULARY,
        codec / "config.json": codec_config,
        codec / "preprocessor_config.json": demo_config.codec_preprocessor_config(),
    }.items():
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in demo_config.MERGES)
    (directory / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    # The configuration classes write into the dictionaries they are given.
    _write_weights(directory, Qwen3TTSForConditionalGeneration(Qwen3TTSConfig(**deepcopy(config))), seed)
    _write_weights(codec, Qwen3TTSTokenizerV2Model(Qwen3TTSTokenizerV2Config(**deepcopy(codec_config))), seed)


def _write_weights(directory: Path, model: torch.nn.Module, seed: int) -> None:
    from safetensors.torch import save_file

    tensors = {name: _random_tensor(name, tensor, seed) for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _random_tensor(name: str, initial: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw a weight large enough that signals neither fade nor explode, so that greedy codes vary from frame to frame.

    Each tensor has its own stream, so that a change to one leaves the others alone. Scales (codebook usage, layer scale, Snake)
    keep the value that the class gives them.
    """
    noise = torch.from_numpy(np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(initial.shape, dtype=np.float32))
    if "embed" in name:
        return noise
    if initial.dim() >= 2:
        return noise * GAINS.get(name, 1.0) / initial[0].numel() ** 0.5
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if name.endswith(".bias"):
        return 0.02 * noise
    return initial.float().contiguous()

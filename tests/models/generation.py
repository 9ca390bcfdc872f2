"""A whole talker with its code predictor, and its own ``generate`` loop run greedily."""

from typing import Any, Literal

import torch
from torch import nn

from .cases import case
from .weights import randomise

CODES = 64  # entries of every codebook; the talker's vocabulary has as many special tokens above them
END_OF_SPEECH = CODES + 6
SEED = 13  # inputs on which every greedy choice of 32 frames wins by 7e-4 or more, in both transformers lines (test_models.py)


def build_talker(
    size: Literal["0.6b", "1.7b"] = "1.7b", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> Any:
    """Return ``Qwen3TTSTalkerForConditionalGeneration`` with the structure of a published size at the sizes of its model cases.

    As published, the 1.7B projects the talker's width down to the predictor's, and the 0.6B has one width for both.
    """
    from qwen_tts.core.models.modeling_qwen3_tts import Qwen3TTSTalkerForConditionalGeneration

    predictor = case("predictor").config(vocab_size=CODES)
    config = case(f"talker-{size}").config(code_predictor_config=predictor, vocab_size=2 * CODES, codec_eos_token_id=END_OF_SPEECH)
    with torch.device(device):
        talker = Qwen3TTSTalkerForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    randomise(talker, seed)
    return talker.eval().requires_grad_(False)


def generation_inputs(talker: nn.Module, frames: int, lengths: list[int], seed: int = SEED) -> dict[str, Any]:
    """Return the arguments of ``talker.generate`` for exactly ``frames`` greedy frames.

    ``lengths`` are the prompt lengths of the rows, padded at the left. The trailing text ends halfway, after which the talker is fed the
    padding embedding. A row's prompt and text depend on its index and ``seed`` alone.
    """
    config: Any = talker.config
    parameter = next(talker.parameters())
    width, text = max(lengths), (frames + 1) // 2
    prompt = torch.zeros(len(lengths), width, config.hidden_size)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    trailing = torch.empty(len(lengths), text, config.hidden_size)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        prompt[row, width - length :] = torch.randn(length, config.hidden_size, generator=generator)
        mask[row, width - length :] = 1
        trailing[row] = torch.randn(text, config.hidden_size, generator=generator)
    pad = torch.randn(1, 1, config.hidden_size, generator=torch.Generator().manual_seed(1000 * seed + 999))
    return dict(
        inputs_embeds=prompt.to(parameter),
        attention_mask=mask.to(parameter.device),
        trailing_text_hidden=trailing.to(parameter),
        tts_pad_embed=pad.to(parameter),
        max_new_tokens=frames + 1,  # a frame's codes are complete one talker step after its first
        min_new_tokens=frames + 1,
        do_sample=False,
        subtalker_dosample=False,
        repetition_penalty=1.05,
        eos_token_id=config.codec_eos_token_id,
        pad_token_id=config.codec_eos_token_id,
        suppress_tokens=[i for i in range(config.vocab_size // 2, config.vocab_size) if i != config.codec_eos_token_id],
        output_hidden_states=True,
        return_dict_in_generate=True,
    )


@torch.no_grad()
def generate_codes(talker: Any, frames: int, lengths: list[int] | None = None, seed: int = SEED, **overrides: Any) -> torch.Tensor:
    """Return the codes ``[B, frames, GROUPS]`` of greedy generation.

    ``lengths`` are as in ``generation_inputs``, by default one prompt of 9; ``overrides`` replace arguments of ``talker.generate``.
    """
    result = talker.generate(**generation_inputs(talker, frames, lengths or [9], seed) | overrides)
    return torch.stack([hidden[-1] for hidden in result.hidden_states if hidden[-1] is not None], dim=1)

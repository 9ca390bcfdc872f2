"""What the speech tokenizer's decoder refuses: layers that cannot be streamed, decoders of other kinds, wrong codes and numbers."""

import copy

import pytest
import torch
from test_codec import build, codes_of
from torch import nn

from qtts_compile.codec import Codec
from qtts_compile.environment import import_qwen_tts
from qtts_compile.launcher import Launcher
from qtts_compile.streaming_decoder import StreamingDecoder


def changed(change):
    """Return a decoder in which ``change`` has altered a layer."""
    decoder = copy.deepcopy(build().decoder)
    change(decoder)
    return decoder


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(4, 4, 3, padding=1)


REFUSED = {
    "stride": (lambda d: setattr(d.pre_conv.conv, "stride", (2,)), r"pre_conv .*stride=\(2,\).*of stride 1"),
    "lookahead": (lambda d: setattr(d.pre_conv, "padding", 1), "pre_conv .*padded by 1 on the left.*2 here"),
    "symmetric padding": (lambda d: setattr(d.pre_conv.conv, "padding", (1,)), "pre_conv .*only a causal convolution"),
    "unpadded": (lambda d: delattr(d.pre_conv, "padding"), "pre_conv .*padded by None"),
    "transposed lookahead": (lambda d: setattr(d.decoder[1].block[1], "left_pad", 1), r"decoder\.1\.block\.1 .*cut by 1 on the left and 3"),
    "transposed kernel": (lambda d: setattr(d.decoder[1].block[1].conv, "kernel_size", (7,)), "multiple of the stride"),
    "bare convolution": (lambda d: d.upsample.append(Bare()), r"upsample\.1\.layer .*cannot be told"),
    "recurrent layer": (lambda d: d.upsample.append(nn.Sequential(nn.LSTM(4, 4))), r"upsample\.1\.0 .*cannot be told"),
    "full attention": (
        lambda d: [setattr(layer.self_attn, "sliding_window", None) for layer in d.pre_transformer.layers],
        "one finite sliding window",
    ),
    "two windows": (lambda d: setattr(d.pre_transformer.layers[0].self_attn, "sliding_window", 9), r"pre_transformer: attention windows \[5, 9\]"),
    "rotary angles": (lambda d: setattr(d.pre_transformer.rotary_emb, "rope_type", "dynamic"), "rope_type 'dynamic'.*length of the whole stream"),
    "other upsampling": (lambda d: setattr(d, "total_upsample", 24), "declares 24 samples a frame.*make 12"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_cannot_be_streamed_is_named(name):
    change, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        StreamingDecoder(changed(change))


def test_a_decoder_of_another_kind_is_refused():
    import_qwen_tts()
    from qwen_tts.core.tokenizer_25hz.configuration_qwen3_tts_tokenizer_v1 import Qwen3TTSTokenizerV1DecoderConfig
    from qwen_tts.core.tokenizer_25hz.modeling_qwen3_tts_tokenizer_v1 import Qwen3TTSTokenizerV1Decoder

    with torch.device("meta"):
        diffusion = Qwen3TTSTokenizerV1Decoder(Qwen3TTSTokenizerV1DecoderConfig())
    with pytest.raises(TypeError, match="Qwen3TTSTokenizerV1Decoder decodes from code, conditioning, reference_mel.*25 Hz"):
        StreamingDecoder(diffusion)
    with pytest.raises(TypeError, match="Identity holds 0 transformers"):
        StreamingDecoder(nn.Identity())
    for wrong in (nn.Identity(), "tokenizer", None):
        with pytest.raises(TypeError, match=f"{type(wrong).__name__} is no speech tokenizer.*tts.model.speech_tokenizer"):
            Codec(wrong)


def test_wrong_arguments():
    model = build()
    codec, codes = Codec(model), codes_of(model, 4)[0].T
    for call in (codec.push, codec.decode, lambda wrong: codec.decode(codes, context=wrong)):
        with pytest.raises(TypeError, match=r"torch.int32.*codes.long\(\)"):
            call(codes.int())
        with pytest.raises(ValueError, match=r"codes \(3, 4\) on cpu: \(frames, 3\)"):
            call(codes.T)
        with pytest.raises(ValueError, match=r"codes \(1, 4, 3\)"):
            call(codes[None])
        with pytest.raises(ValueError, match="on meta.*on cpu is needed"):
            call(codes.to("meta"))
    with pytest.raises(ValueError, match="name a mode"):
        Launcher(torch.device("cpu"), options={"strict": True})
    with pytest.raises(ValueError, match="batch=0"):
        StreamingDecoder(model.decoder, batch=0)
    for wrong in (codes, codes_of(model, 4, batch=2)):
        with pytest.raises(ValueError, match=r"\(1, codebooks, frames\) is needed"):
            StreamingDecoder(model.decoder)(wrong)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((1, "2"), TypeError, r"sizes\[1\]='2': give a whole number, of type int"),
        ((1, 2.5), TypeError, r"sizes\[1\]=2.5: give a whole number, of type int"),
        ((True, 2), TypeError, r"sizes\[0\]=True: give a whole number, of type int"),
        (4, TypeError, "sizes=4: give a tuple or list of whole numbers"),
        ((0, 1), ValueError, r"sizes\[0\]=0: give 1 or more"),
        ((2, 4), ValueError, r"sizes=\(2, 4\): 1 is needed among them"),
        ((), ValueError, r"sizes=\(\): 1 is needed among them"),
    ],
)
def test_wrong_sizes(sizes, error, message):
    with pytest.raises(error, match=message):
        Codec(build(), sizes=sizes)

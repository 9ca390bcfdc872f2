"""The speech tokenizer's decoder with state: any split of the codes gives the waveform of the model's own whole decode."""

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtts_compile import demo_model
from qtts_compile.codec import Codec
from qtts_compile.demo_config import codec_config
from qtts_compile.environment import import_qwen_tts
from qtts_compile.streaming_decoder import Stateful, StreamingDecoder

QUANTIZERS = 3
SMALL = {
    "num_quantizers": QUANTIZERS,
    "codebook_size": 64,
    "decoder_dim": 32,
    "num_hidden_layers": 2,
    "sliding_window": 5,
    "upsample_rates": [3, 2],
    "upsampling_ratios": [2],
}
SMALLEST = SMALL | {"decoder_dim": 16, "num_hidden_layers": 1, "upsample_rates": [2]}
VARIANTS = {
    "published": {},
    "small": SMALL,
    "one upsampling": SMALL | {"upsample_rates": [4], "upsampling_ratios": [1], "decoder_dim": 8},
    "no transposed overlap": SMALL | {"upsample_rates": [], "upsampling_ratios": [3, 2]},
    "window of one frame": SMALL | {"sliding_window": 1},
    "grouped attention": SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3},
}


@functools.cache
def build(name="small", dtype=torch.float32):
    """Return a tokenizer model with random weights whose waveform is neither silent nor clipped. Tests must not change it."""
    import_qwen_tts()
    from qwen_tts.core.tokenizer_12hz.configuration_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Config
    from qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Model

    config = codec_config()
    config["decoder_config"] |= VARIANTS[name] if name in VARIANTS else SMALLEST
    model: Any = Qwen3TTSTokenizerV2Model(Qwen3TTSTokenizerV2Config(**config)).eval()
    model.to(dtype)
    weights = {key: demo_model._random_tensor(key, tensor, 0) for key, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    with torch.no_grad():
        last = model.decoder.decoder[-1].conv
        last.weight.mul_(1e-3)  # far from being clipped
        last.weight.mul_(0.1 / model.decoder(codes_of(model, 29)).std())
    model.config.decode_upsample_rate = int(model.decoder.total_upsample)
    return model


def codes_of(model, frames, batch=1, seed=0):
    config = model.decoder.config
    return torch.randint(config.codebook_size, (batch, config.num_quantizers, frames), generator=torch.Generator().manual_seed(seed))


def whole(model, codes):
    with torch.no_grad():
        waveform = model.decoder(codes)[:, 0]
    assert waveform.std() > 0.05 and (waveform.abs() == 1).double().mean() < 0.2
    return waveform


def chunks(codes, sizes):
    """Split along the frames, going through ``sizes`` again and again."""
    start = 0
    while start < codes.shape[-1]:
        for size in sizes:
            yield codes[..., start : start + size]
            start += size
            if start >= codes.shape[-1]:
                return


def stream(decoder, codes, sizes):
    return torch.cat([decoder(chunk) for chunk in chunks(codes, sizes)], 1)


def push(codec, codes, sizes):
    return torch.cat([codec.push(chunk.T) for chunk in chunks(codes.T, sizes)])


def close(actual, expected, atol=1e-4):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=0)


@given(name=st.sampled_from([name for name in VARIANTS if name != "published"]), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_any_split_gives_the_whole_waveform(name, sizes):
    model = build(name)
    codes = codes_of(model, 29)
    close(stream(StreamingDecoder(model.decoder), codes, sizes), whole(model, codes))


@pytest.mark.parametrize("name", VARIANTS)
def test_in_double_precision_only_rounding_differs(name):
    model = build(name, torch.float64)
    codes = codes_of(model, 20)
    waveform = stream(StreamingDecoder(model.decoder), codes, [1, 1, 2, 5])
    assert waveform.dtype == torch.float64
    close(waveform, whole(model, codes), atol=1e-10)


@pytest.mark.parametrize(("name", "frames"), [("small", 400), ("published", 200)])
def test_streams_longer_than_the_window(name, frames):
    model = build(name)
    assert frames > 2 * model.decoder.config.sliding_window
    codes = codes_of(model, frames)
    close(stream(StreamingDecoder(model.decoder), codes, [1, 2, 4, 8, 16, 32]), whole(model, codes))


def test_rows_of_a_batch_are_streams_of_their_own():
    model = build()
    codes = codes_of(model, 17, batch=3)
    together = stream(StreamingDecoder(model.decoder, batch=3), codes, [2, 7])
    close(together, torch.cat([whole(model, row[None]) for row in codes]))


def test_half_precision_is_no_worse_than_the_model_s_own():
    exact, rounded = build("published"), build("published", torch.bfloat16)
    codes = codes_of(exact, 12)
    expected = whole(exact, codes)
    errors = [(w - expected).pow(2).mean().sqrt() for w in (stream(StreamingDecoder(rounded.decoder), codes, [1, 4]), whole(rounded, codes))]
    assert errors[0] < 1.2 * errors[1] < 0.2 * expected.std()


def test_reset_begins_anew():
    model = build()
    decoder, codes = StreamingDecoder(model.decoder), codes_of(model, 9)
    stream(decoder, codes_of(model, 31, seed=1), [7])
    decoder.reset()
    close(stream(decoder, codes, [4]), whole(model, codes))


def test_two_streams_of_one_model_share_weights_and_no_state():
    model = build()
    codecs, codes = [Codec(model), Codec(model)], [codes_of(model, 12, seed=seed) for seed in range(2)]
    waveforms = [[], []]
    for start in range(0, 12, 3):
        for codec, row, waveform in zip(codecs, codes, waveforms):
            waveform.append(codec.push(row[0, :, start : start + 3].T))
    for row, waveform in zip(codes, waveforms):
        close(torch.cat(waveform), whole(model, row)[0])


def test_the_model_is_left_as_it_was():
    model = copy.deepcopy(build())
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    modules, codes = dict(model.named_modules()), codes_of(model, 6)
    expected = whole(model, codes)
    model.decoder.train()
    decoder = StreamingDecoder(model.decoder)
    stream(decoder, codes, [2])
    assert model.decoder.training and not decoder.decoder.training
    model.eval()
    assert torch.equal(whole(model, codes), expected)
    assert dict(model.named_modules()) == modules
    assert all(tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1]) for name, tensor in model.state_dict().items())


def test_no_weight_is_stored_twice():
    model = build()
    decoder = StreamingDecoder(model.decoder)
    own = {tensor.data_ptr() for tensor in (*model.decoder.parameters(), *model.decoder.buffers())}
    state = {buffer.data_ptr() for module in decoder.modules() if isinstance(module, Stateful) for buffer in module.buffers(recurse=False)}
    held = {tensor.data_ptr() for tensor in (*decoder.parameters(), *decoder.buffers())}
    assert len(list(decoder.parameters())) == len(list(model.decoder.parameters()))
    assert held <= own | state and not own & state


def test_a_model_with_eager_attention_keeps_it():
    model = copy.deepcopy(build())
    model.decoder.config._attn_implementation = "eager"
    codes = codes_of(model, 13)
    close(stream(StreamingDecoder(model.decoder), codes, [4, 1]), whole(model, codes))
    assert model.decoder.pre_transformer.config._attn_implementation == "eager"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("built_in", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_of_any_gradient_mode(mode, built_in):
    model = build()
    codes = codes_of(model, 10)
    with built_in():
        codec = Codec(model)
    with mode():
        waveforms = [codec.push(chunk.T) for chunk in chunks(codes[0], [3])]
    assert not any(waveform.requires_grad or waveform.is_inference() for waveform in waveforms)
    close(torch.cat(waveforms), whole(model, codes)[0])
    close(stream(StreamingDecoder(model.decoder), codes, [3]), whole(model, codes))


def test_push_decode_and_context():
    model = build()
    codes = codes_of(model, 23)
    expected, codec = whole(model, codes)[0], Codec(model, sizes=(1, 4))
    rows, per_frame = codes[0].T, codec.samples_per_frame
    assert per_frame == 12 and codec.sample_rate == 24000
    close(push(codec, rows, [5, 1]), expected)
    for _ in range(2):  # whatever state the calls before left
        close(codec.decode(rows), expected)
        close(codec.decode(rows[7:], context=rows[:7]), expected[7 * per_frame :])
        close(codec.decode(rows[7:], context=rows[:0]), whole(model, codes[..., 7:])[0])
    close(codec.push(rows), expected)
    codec.reset()
    close(codec.push(rows), expected)
    assert codec.push(rows[:0]).shape == codec.decode(rows[:0]).shape == (0,)


def test_a_tokenizer_its_model_and_a_bare_decoder():
    model = build()
    tokenizer = type("Tokenizer", (), {"model": model})()
    codes = codes_of(model, 3)[0].T
    waveforms = [Codec(holder).decode(codes) for holder in (tokenizer, model, model.decoder)]
    assert torch.equal(waveforms[0], waveforms[1]) and torch.equal(waveforms[0], waveforms[2])
    assert Codec(model.decoder).sample_rate is None


def test_the_waveform_is_float32_in_memory_of_its_own():
    model = build(dtype=torch.bfloat16)
    codec, codes = Codec(model), codes_of(model, 8)[0].T
    first = codec.push(codes)
    assert first.dtype == torch.float32 and first.is_contiguous()
    kept = first.clone()
    codec.push(codes.flip(0))
    assert torch.equal(first, kept)

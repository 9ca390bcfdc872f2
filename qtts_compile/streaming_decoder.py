"""A speech tokenizer's decoder over a stream of codes: a chunk costs its own frames only, and any split gives the same waveform.

The decoder is causal, so all that a chunk needs of the past is the end of each convolution's input and the last keys and values of the
sliding-window attention. The model's own forward() runs over a copy of its module tree in which the layers that look back, found by their
structure, are replaced by layers that keep that state in buffers. The copy shares every parameter with the model.

The replaced convolutions hold activations as [B, T, C] in memory, which the model sees as [B, C, T]: tensor cores read that layout without
a transposition.
"""

import copy
import inspect
import math
from typing import Any

import torch
from torch import nn

from qtts_compile.stacks import PROJECTIONS, find_stacks


class Stateful(nn.Module):
    """A layer whose own buffers are the state of a stream; all zeros begin a new one."""


class StreamingDecoder(nn.Module):
    """Turn codes into a waveform chunk by chunk.

    State is written in place and nothing is read back to the host, so that a call compiles into one graph and replays as a CUDA graph.

    Args:
        decoder: causal decoder whose forward() takes codes [B, Q, F] and returns [B, 1, F * samples_per_frame], as that of Qwen3-TTS's 12 Hz
            speech tokenizer. It is not changed.
        batch: number of streams decoded side by side.

    Raises:
        TypeError: ``decoder`` does not decode from codes alone, or holds no or several transformers.
        ValueError: a layer in it looks ahead, skips, or looks back without limit.
    """

    def __init__(self, decoder: nn.Module, batch: int = 1) -> None:
        super().__init__()
        if batch < 1:
            raise ValueError(f"batch={batch}: at least 1 stream is needed")
        _check_forward(decoder)
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
        with torch.inference_mode(False), torch.no_grad():  # state created in inference mode could not be written outside it
            self.decoder = copy.deepcopy(decoder, shared).eval()
            _replace_convolutions(self.decoder, batch)
            _replace_transformer(self.decoder, batch)
        self.batch = batch
        self.samples_per_frame = math.prod(module.stride for module in self.modules() if isinstance(module, CausalTransposedConv))
        declared = getattr(decoder, "total_upsample", self.samples_per_frame)
        if declared != self.samples_per_frame:
            raise ValueError(
                f"{type(decoder).__name__} declares {declared} samples a frame, but its transposed convolutions make {self.samples_per_frame}: "
                "part of its upsampling is of a kind that cannot be streamed"
            )

    def reset(self) -> None:
        """Begin a new stream: forget the frames decoded so far."""
        states = [buffer for module in self.modules() if isinstance(module, Stateful) for buffer in module.buffers(recurse=False)]
        for dtype in {state.dtype for state in states}:  # one launch for all tensors of a dtype
            torch._foreach_zero_([state for state in states if state.dtype == dtype])  # pyright: ignore[reportPrivateImportUsage]

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode the next frames of each stream.

        Args:
            codes: int64 [batch, Q, F].

        Returns:
            Samples in [-1, 1], [batch, F * samples_per_frame], in the decoder's dtype.

        Raises:
            ValueError: wrong shape.
        """
        if codes.dim() != 3 or codes.shape[0] != self.batch:
            raise ValueError(f"codes of shape {tuple(codes.shape)}: ({self.batch}, codebooks, frames) is needed")
        with torch.no_grad():
            return self.decoder(codes).squeeze(1)


class CausalConv(Stateful):
    """A convolution of stride 1 over its last inputs and the new ones."""

    history: torch.Tensor

    def __init__(self, conv: nn.Conv1d, batch: int) -> None:
        super().__init__()
        self.conv = conv
        lookback = conv.dilation[0] * (conv.kernel_size[0] - 1)
        self.register_buffer("history", conv.weight.new_zeros(batch, lookback, conv.in_channels), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        conv, new, dilation = self.conv, hidden.transpose(1, 2), self.conv.dilation[0]
        batch, steps, channels = new.shape
        # In two dimensions, because conv1d would first copy the window to [B, C, T].
        if dilation == 1:
            window = _extend(self.history, new, 1)
            image, weight = window.transpose(1, 2).unsqueeze(2), conv.weight.unsqueeze(2)
            return nn.functional.conv2d(image, weight, conv.bias, groups=conv.groups).squeeze(2)
        # Rows of ``dilation`` steps: every tap reads one column. cuDNN runs long dilated convolutions 500 times slower (H200, cuDNN 9). Two rows
        # more than steps fill keep what is compiled for any number of steps free of special cases.
        window = _extend(self.history, new, 1, new.new_zeros(batch, 2 * dilation, channels))
        rows = steps // dilation + 1 + conv.kernel_size[0]
        image, weight = window[:, : rows * dilation].unflatten(1, (rows, dilation)).permute(0, 3, 1, 2), conv.weight.unsqueeze(3)
        return nn.functional.conv2d(image, weight, conv.bias, groups=conv.groups).flatten(2)[:, :, :steps]


class PointwiseConv(nn.Module):
    """A convolution of width 1, as the matrix product that it is."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.transpose(1, 2), self.conv.weight[:, :, 0], self.conv.bias).transpose(1, 2)


class CausalTransposedConv(Stateful):
    """A transposed convolution cut off where the next input would begin to contribute.

    One matrix product makes what each input contributes to its own samples and to those of the ``overlap`` inputs after it; the
    contributions are then added up. The weight is read as it lies, and the sum fuses with what follows.
    """

    history: torch.Tensor

    def __init__(self, conv: nn.ConvTranspose1d, batch: int) -> None:
        super().__init__()
        self.conv = conv
        self.stride = conv.stride[0]
        self.overlap = conv.kernel_size[0] // self.stride - 1
        self.register_buffer("history", conv.weight.new_zeros(batch, self.overlap, conv.in_channels), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, _, steps = hidden.shape
        window = _extend(self.history, hidden.transpose(1, 2), 1)
        contributions = (window @ self.conv.weight.flatten(1)).unflatten(2, (self.conv.out_channels, self.overlap + 1, self.stride))
        samples = contributions[:, self.overlap :, :, 0]
        for delay in range(1, self.overlap + 1):
            samples = samples + contributions[:, self.overlap - delay :, :, delay].narrow(1, 0, steps)
        if self.conv.bias is not None:
            samples = samples + self.conv.bias[:, None]
        return samples.transpose(2, 3).reshape(batch, steps * self.stride, self.conv.out_channels).transpose(1, 2)


class KeyValueWindow(Stateful):
    """The keys and values [batch, heads, span, head_dim] that one layer's next queries can still see."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, attention: Any, batch: int, span: int) -> None:
        super().__init__()
        width, weight = attention.head_dim, attention.k_proj.weight
        heads = attention.k_proj.out_features // width
        self.register_buffer("keys", weight.new_zeros(batch, heads, span, width), persistent=False)
        self.register_buffer("values", weight.new_zeros(batch, heads, span, width), persistent=False)


class SlidingWindowCache(nn.Module):
    """What the attention layers are given as ``past_key_values``."""

    def __init__(self, attentions: list[Any], batch: int, span: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KeyValueWindow(attention, batch, span) for attention in attentions)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        layer: Any = self.layers[layer_idx]
        return _extend(layer.keys, keys, 2), _extend(layer.values, values, 2)


class SlidingWindowTransformer(Stateful):
    """The decoder's transformer, whose queries see ``window`` frames, their own included."""

    position: torch.Tensor

    def __init__(self, transformer: nn.Module, batch: int, window: int) -> None:
        super().__init__()
        attentions: list[Any] = [module for module in transformer.modules() if _is_attention(module)]
        for module in transformer.modules():
            if config := getattr(module, "config", None):
                config._attn_implementation = "sdpa"  # takes a boolean mask; the copy's own config, so the model keeps its choice
        self.transformer = transformer
        self.window = window
        self.cache = SlidingWindowCache(attentions, batch, window - 1)
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64, device=attentions[0].k_proj.weight.device), persistent=False)

    def forward(self, inputs_embeds: torch.Tensor) -> Any:
        frames, past = inputs_embeds.shape[1], self.window - 1
        query = torch.arange(frames, device=inputs_embeds.device)
        key = torch.arange(frames + past, device=inputs_embeds.device) - past
        distance = query[:, None] - key
        mask = (distance >= 0) & (distance < self.window) & (self.position + key >= 0)  # before the stream's begin there are no keys
        positions = self.position + query
        output = self.transformer(
            inputs_embeds=inputs_embeds,
            attention_mask={"sliding_attention": mask[None, None]},
            position_ids=positions[None],
            cache_position=positions,
            past_key_values=self.cache,
            use_cache=False,
        )
        self.position.add_(frames)
        return output


def _extend(history: torch.Tensor, new: torch.Tensor, dim: int, *after: torch.Tensor) -> torch.Tensor:
    """Return ``history``, ``new`` and ``after`` along ``dim``, and keep the end of the first two as the history of the next call."""
    window = torch.cat([history, new, *after], dim)
    history.copy_(window.narrow(dim, new.shape[dim], history.shape[dim]))
    return window


def _check_forward(decoder: nn.Module) -> None:
    required = [p.name for p in inspect.signature(decoder.forward).parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(required) != 1:
        raise TypeError(
            f"{type(decoder).__name__} decodes from {', '.join(required) or 'nothing'}: only a decoder of codes alone, as the 12 Hz speech "
            "tokenizer's, can be streamed; for the 25 Hz one use speech_tokenizer.decode()"
        )


def _replace_convolutions(parent: nn.Module, batch: int, path: str = "") -> None:
    for name, child in parent.named_children():
        where = f"{path}.{name}".lstrip(".")
        conv = getattr(child, "conv", None)
        if isinstance(conv, nn.Conv1d):
            _check_causal(where, conv, left=getattr(child, "padding", None))
            pointwise = conv.kernel_size == (1,) and conv.groups == 1
            setattr(parent, name, PointwiseConv(conv) if pointwise else CausalConv(conv, batch))
        elif isinstance(conv, nn.ConvTranspose1d):
            _check_causal_transposed(where, conv, cut=(getattr(child, "left_pad", None), getattr(child, "right_pad", None)))
            setattr(parent, name, CausalTransposedConv(conv, batch))
        elif isinstance(child, (nn.modules.conv._ConvNd, nn.RNNBase)) and getattr(child, "kernel_size", None) != (1,):
            raise ValueError(f"{where} ({child}): whether it is causal cannot be told, as no module around it holds it as `conv` and pads its input")
        else:
            _replace_convolutions(child, batch, where)


def _check_causal(where: str, conv: nn.Conv1d, left: int | None) -> None:
    lookback = conv.dilation[0] * (conv.kernel_size[0] - 1)
    if conv.stride != (1,) or conv.padding != (0,) or left != lookback:
        raise ValueError(
            f"{where} ({conv}, input padded by {left} on the left): only a causal convolution can be streamed, of stride 1 and "
            f"with all its padding, {lookback} here, on the left"
        )


def _check_causal_transposed(where: str, conv: nn.ConvTranspose1d, cut: tuple[int | None, int | None]) -> None:
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    plain = conv.padding == (0,) and conv.output_padding == (0,) and conv.dilation == (1,) and conv.groups == 1
    if not plain or kernel % stride or cut != (0, kernel - stride):
        raise ValueError(
            f"{where} ({conv}, output cut by {cut[0]} on the left and {cut[1]} on the right): only a causal transposed convolution can be streamed, "
            f"of a kernel that is a multiple of the stride, in one group, undilated and cut on the right only, by kernel - stride = {kernel - stride}"
        )


def _replace_transformer(decoder: nn.Module, batch: int) -> None:
    stacks = list(find_stacks(decoder))
    if len(stacks) != 1 or stacks[0].module is decoder:
        raise TypeError(f"{type(decoder).__name__} holds {len(stacks)} transformers; a decoder with one, as the 12 Hz speech tokenizer's, is needed")
    path, transformer = stacks[0].name, stacks[0].module
    windows = {getattr(module, "sliding_window", None) for module in transformer.modules() if _is_attention(module)}
    window = next(iter(windows))
    if len(windows) > 1 or not isinstance(window, int):
        raise ValueError(f"{path}: attention windows {sorted(windows, key=str)}: to be streamed, all layers must share one finite sliding window")
    for module in transformer.modules():
        if (rope := getattr(module, "rope_type", "default")) in ("dynamic", "longrope"):
            raise ValueError(
                f"{path}: rope_type {rope!r} turns by angles that depend on the length of the whole stream, which is not known before its end"
            )
    parent, _, name = path.rpartition(".")
    setattr(decoder.get_submodule(parent), name, SlidingWindowTransformer(transformer, batch, window))


def _is_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in PROJECTIONS)

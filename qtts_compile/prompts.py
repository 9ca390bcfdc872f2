"""Read a call of ``Qwen3TTSModel.generate_...`` up to the point where its talker would start to generate.

The installed qwen_tts builds the prompt itself, whatever release it is: its methods run on shallow copies of the user's objects, on which
``talker.generate`` notes what it is called with and goes no further. The copies share every module; the user's objects are not touched.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtts_compile.engine import PromptInputs
from qtts_compile.sampling import Settings


@dataclass(frozen=True)
class Call:
    """What a call asks for.

    Attributes:
        inputs: the prompt, one row a text.
        settings: how codes are chosen.
        references: for each text the codes int64 ``[frames, groups]`` of the recording that its speech goes on from, or None.
    """

    inputs: PromptInputs
    settings: Settings
    references: list[Tensor | None]


@torch.inference_mode()
def read_call(tts: Any, method: str, arguments: Mapping[str, Any]) -> Call:
    """Return what ``tts.method(**arguments)`` asks for, ``tts`` being a ``Qwen3TTSModel``.

    ``do_sample=False`` without ``subtalker_dosample`` is greedy for every codebook. An instruction that the model cannot take is warned of.

    Raises:
        TypeError: an argument that qwen_tts would drop without a word, or a text that is not a string.
        ValueError: an empty text; a sampling setting out of range; whatever qwen_tts itself refuses.
    """
    check_texts(arguments["text"])
    if arguments.get("do_sample") is False and arguments.get("subtalker_dosample") is None:
        arguments = {**arguments, "subtalker_dosample": False}
    prompt, given = _intercept(tts, method, arguments)
    inputs = PromptInputs(*(prompt.pop(name) for name in ("inputs_embeds", "attention_mask", "trailing_text_hidden", "tts_pad_embed")))
    _check_nothing_dropped(given.pop("dropped"), prompt)
    if _any(arguments.get("instruct")) and not _any(given.get("instruct_ids")):
        size = tts.model.tts_model_size
        warnings.warn(f"instruct is left out: a model of size {size!r} takes no instruction; use a 1.7B one", stacklevel=2)
    references = (given.get("voice_clone_prompt") or {}).get("ref_code") or [None] * len(inputs.embeds)
    device = inputs.embeds.device
    return Call(inputs, Settings.of(prompt), [None if codes is None else codes.to(device, torch.long) for codes in references])


def check_texts(text: Any) -> int:
    """Return the number of texts, of which none may be empty."""
    texts = text if isinstance(text, list) else [text]
    for item in texts:
        if not isinstance(item, str):
            raise TypeError(f"text={item!r}: give a string, or a list of strings for a batch")
    if not texts or not all(item.strip() for item in texts):
        raise ValueError(f"text={text!r}: there is nothing to speak; every text needs a character that is not a space")
    return len(texts)


class _Reached(BaseException):
    """The talker would start to generate now. No Exception, so that no handler on the way takes it for a fault."""


def _intercept(tts: Any, method: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that ``tts.method(**arguments)`` hands to its talker's ``generate``, and those to its model's.

    The latter come by the names of that method's parameters, and under "dropped" what it has no parameter for.
    """
    talker, model, view = copy.copy(tts.model.talker), copy.copy(tts.model), copy.copy(tts)
    model._modules = {**model._modules, "talker": talker}
    model.config = _QuickConfig(model.config, talker_config=_QuickConfig(model.config.talker_config))
    view.model = model
    generate, signature = model.generate, inspect.signature(model.generate)
    others = next((name for name, parameter in signature.parameters.items() if parameter.kind == parameter.VAR_KEYWORD), "")
    to_talker: dict[str, Any] = {}
    to_model: dict[str, Any] = {}

    def generate_until_talker(*args: Any, **kwargs: Any) -> Any:
        to_model.update(signature.bind(*args, **kwargs).arguments)
        to_model["dropped"] = to_model.pop(others, {})
        return generate(*args, **kwargs)

    def stop(**kwargs: Any) -> None:
        to_talker.update(kwargs)
        raise _Reached

    model.generate, talker.generate = generate_until_talker, stop
    try:
        getattr(view, method)(**arguments)
    except _Reached:
        return to_talker, to_model
    raise RuntimeError(f"{type(tts).__name__}.{method} never called talker.generate: this release of qwen_tts generates in a way that is not known")


def _check_nothing_dropped(candidates: Mapping[str, Any], to_talker: Mapping[str, Any]) -> None:
    dropped = [name for name, value in candidates.items() if name not in to_talker or to_talker[name] is not value]
    if dropped:
        raise TypeError(
            f"{', '.join(sorted(dropped))}: qwen_tts does not use such an argument and would say nothing; leave it out or check its spelling"
        )


def _any(values: Any) -> bool:
    return any(value is not None and value != "" for value in (values if isinstance(values, list) else [values]))


class _QuickConfig:
    """A configuration's values as plain attributes: qwen_tts reads them two thousand times a prompt, which takes 1 to 2 ms from the real one."""

    def __init__(self, config: Any, **replaced: Any) -> None:
        vars(self).update(vars(config), **replaced)
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

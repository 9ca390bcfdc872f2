"""Registration of the ``qtts::`` custom operators with PyTorch's dispatcher."""

import re
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("qtts", "FRAGMENT")
_OVERLOADS: list[torch._ops.OpOverload] = []
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define_op(
    schema: str,
    *,
    check: Callable[..., None],
    cuda: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Define ``qtts::<schema>`` and return its default overload.

    ``check`` validates the arguments and runs before each of the three implementations, so that a bad call fails alike when it is traced
    and when it runs. ``cuda`` launches the Triton kernel, ``cpu`` is the plain-PyTorch reference, ``fake`` allocates outputs with the
    real shapes, dtypes and strides.

    A schema with arguments ``float ...eps`` also gets the overload ``tensor_eps``, in which they are 0-d CPU tensors: Dynamo turns module
    floats into graph inputs when it compiles with ``dynamic=True``.
    """
    name = schema[: schema.index("(")]
    _implement(schema, name, check, cuda, cpu, fake)
    tensor_schema = re.sub(r"\bfloat (\w*eps)\b", r"Tensor \1", schema)
    if tensor_schema != schema:
        _implement(
            tensor_schema.replace(name, f"{name}.tensor_eps", 1),
            f"{name}.tensor_eps",
            check,
            _with_float_eps(cuda, schema),
            _with_float_eps(cpu, schema),
            fake,
        )
    return getattr(torch.ops.qtts, name).default


def register_lowerings() -> None:
    """Tell Inductor to call every defined operator as it is; without this it logs each as an implicit fallback."""
    from torch._inductor.lowering import lowerings, make_fallback  # costs seconds: only for who compiles

    for op in _OVERLOADS:
        if op not in lowerings:
            make_fallback(op, warn=False)


def _implement(schema: str, name: str, check: Callable, cuda: Callable, cpu: Callable, fake: Callable) -> None:
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, _checked(check, _on_device(cuda)), "CUDA")
    _LIBRARY.impl(name, _checked(check, cpu), "CPU")
    torch.library.register_fake(f"qtts::{name}", _checked(check, fake), lib=_LIBRARY)
    packet, _, overload = name.partition(".")
    _OVERLOADS.append(getattr(getattr(torch.ops.qtts, packet), overload or "default"))


def _checked(check: Callable, function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        check(*args)
        return function(*args)

    return call


def _on_device(launcher: Callable) -> Callable:
    """Triton launches on the current device, which need not be the tensors'."""

    def call(*args: Any) -> Any:
        device = args[0].device
        if device.index == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device(device):
            return launcher(*args)

    return call


def _with_float_eps(function: Callable, schema: str) -> Callable:
    arguments = torch._C.parse_schema(f"qtts::{schema}").arguments
    places = [place for place, argument in enumerate(arguments) if argument.name.endswith("eps")]

    def call(*args: Any) -> Any:
        values = list(args)
        for place in places:
            values[place] = float(values[place])
        return function(*values)

    return call

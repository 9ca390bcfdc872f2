"""Argument checks shared by the operators; each raises an error that names what it got."""

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_float_dtype(name: str, tensor: torch.Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is bfloat16, float16 or float32."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {tensor.dtype}; convert it with .to(...)")


def check_like(name: str, tensor: torch.Tensor, reference_name: str, reference: torch.Tensor) -> None:
    """Raise unless ``tensor`` has the dtype (``TypeError``) and the device (``ValueError``) of ``reference``."""
    if tensor.dtype != reference.dtype:
        raise TypeError(f"{name} must have the dtype of {reference_name}, {reference.dtype}, got {tensor.dtype}")
    check_device(name, tensor, reference_name, reference)


def check_device(name: str, tensor: torch.Tensor, reference_name: str, reference: torch.Tensor) -> None:
    """Raise ``ValueError`` unless both tensors are on one device."""
    if tensor.device != reference.device:
        raise ValueError(f"{name} must be on the device of {reference_name}, {reference.device}, got {tensor.device}")


def check_rank(name: str, tensor: torch.Tensor, dims: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` has as many dimensions as ``dims`` names, for example ``"B, H, T, D"``."""
    if tensor.dim() != dims.count(",") + 1:
        raise ValueError(f"{name} must have the shape [{dims}], got {tuple(tensor.shape)}")


def check_shape(name: str, tensor: torch.Tensor, *shape: int) -> None:
    """Raise ``ValueError`` unless ``tensor`` has exactly this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")

"""Random weights under which a rewrite that takes the wrong tensor shows in the output."""

import torch
from torch import nn


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Fill every parameter in place from ``seed``.

    Matrices keep the variance of their input (std ``fan_in ** -0.5``), embeddings have unit variance, biases are small, and norm weights
    are uniform in [0.5, 1.5], so that no two norms are alike. Values are drawn in fp32 on the parameter's device and then rounded: builds
    in different dtypes on one kind of device hold the same model.
    """
    generators = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            device = parameter.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
            values = torch.empty(parameter.shape, device=device, dtype=torch.float32)
            if isinstance(module, nn.Embedding):
                values.normal_(generator=generator)
            elif name == "bias":
                values.normal_(std=0.2, generator=generator)
            elif parameter.ndim == 1:
                values.uniform_(0.5, 1.5, generator=generator)
            else:
                values.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            parameter.copy_(values)

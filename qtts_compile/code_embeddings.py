"""What the code predictor reads of the codes that it chose itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CodeEmbeddings:
    """For each codebook after the first a table ``[V, H']`` of its codes' embeddings, behind the projection to the predictor's width.

    A frame then looks up what it would have to multiply anew. Without a projection the tables are the embeddings' own; with one they take memory
    beside it: 15 tables of 2048 x 1024 at the 1.7B model's shapes, 63 MB or 1.5% of its weights.

    Args:
        predictor: the code predictor, whose children ``small_to_mtp_projection`` and ``get_input_embeddings()`` are what these names say.

    Attributes:
        tables: one a codebook.
    """

    def __init__(self, predictor: Any) -> None:
        self._projection, self._embeddings = predictor.small_to_mtp_projection, list(predictor.get_input_embeddings())
        self._are_plain = all(_is_plain(embedding, nn.Embedding) and embedding.max_norm is None for embedding in self._embeddings)
        self._are_own = self._are_plain and _is_plain(self._projection, nn.Identity)
        self._codes = torch.arange(predictor.config.vocab_size, device=next(predictor.parameters()).device)
        with torch.inference_mode(False), torch.no_grad():
            self.tables: list[Tensor] = [embedding.weight.detach() if self._are_own else self._project(embedding) for embedding in self._embeddings]

    def refresh(self) -> None:
        """Compute the tables again, in place: weights may have changed since."""
        if self._are_own:
            return
        bias = self._projection.bias if self._are_plain and _is_plain(self._projection, nn.Linear) else None
        for table, embedding in zip(self.tables, self._embeddings):
            if bias is not None:  # what the modules do, in one launch: the first audio waits for it
                torch.addmm(bias, embedding.weight[: len(self._codes)], self._projection.weight.T, out=table)
            else:
                table.copy_(self._project(embedding))

    def _project(self, embedding: nn.Module) -> Tensor:
        return self._projection(embedding(self._codes))


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a module is of this very class and nothing is hooked to it."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks

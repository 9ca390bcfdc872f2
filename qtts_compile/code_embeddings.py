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
        self._are_own = isinstance(self._projection, nn.Identity) and all(map(_is_plain, self._embeddings))
        weight = next(predictor.parameters())
        self._codes = torch.arange(predictor.config.vocab_size, device=weight.device)
        with torch.inference_mode(False), torch.no_grad():
            self.tables: list[Tensor] = [embedding.weight.detach() if self._are_own else self._project(embedding) for embedding in self._embeddings]

    def refresh(self) -> None:
        """Compute the tables again, in place: weights may have changed since."""
        if not self._are_own:
            for table, embedding in zip(self.tables, self._embeddings):
                table.copy_(self._project(embedding))

    def _project(self, embedding: nn.Module) -> Tensor:
        return self._projection(embedding(self._codes))


def _is_plain(embedding: nn.Module) -> bool:
    """Tell whether a module does nothing but look up rows of its weight."""
    return type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding._forward_hooks and not embedding._forward_pre_hooks

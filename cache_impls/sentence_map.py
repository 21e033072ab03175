"""Where the sentences of a running text end, for every row of a batch.

Shapes: B batch, N tokens seen, Q new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_ext.cache_impls.sentences import is_boundary


BLOCK = 32  # tokens of a sentence where no marks are known


class SentenceMap:
    """Cuts the text at its marks, and where none comes for `longest` tokens.

    Args:
        boundary_ids (`Tensor`, *optional*): ids that end a sentence; without them every sentence has `BLOCK` tokens.
        longest (`int`): tokens after which a sentence ends anyway.
    """

    def __init__(self, boundary_ids: Tensor | None, longest: int):
        self.boundary_ids = boundary_ids
        self.longest = longest if boundary_ids is not None else min(longest, BLOCK)
        self.ends: Any = None  # boolean (B, N)
        self._open: Any = None  # what `open_length` said of these, for the layers that ask the same

    @property
    def length(self) -> int:
        return 0 if self.ends is None else self.ends.shape[1]

    def extend(self, count: int, batch: int, device: torch.device, ids: Tensor | None, real: Tensor | None) -> None:
        """Takes `count` more tokens in.

        Args:
            ids (`Tensor`, *optional*): `(B, Q)`; `None` where only embeddings are known.
            real (`Tensor`, *optional*): boolean `(B, Q)`; padding belongs to no sentence.
        """
        if ids is None or self.boundary_ids is None:
            marks = torch.zeros(batch, count, dtype=torch.bool, device=device)
        else:
            marks = is_boundary(ids, self.boundary_ids.to(device))
        longest = self.longest if ids is not None else min(self.longest, BLOCK)
        if real is not None:
            marks = marks | ~real
        places = torch.arange(count, device=device)
        before = -self.open_length(batch, device)[:, None]
        starts = torch.where(pad(marks, (1, 0))[:, :-1], places, before.expand(-1, count))
        starts = starts.cummax(dim=1).values if count else starts
        ends = marks | ((places - starts + 1) % longest == 0)
        self.ends = ends if self.ends is None else torch.cat([self.ends, ends], dim=1)
        self._open = None

    def reach(self, length: int, batch: int, device: torch.device) -> None:
        """Takes tokens that no hook has seen in as blocks, up to `length` of all."""
        if self.length < length:
            self.extend(length - self.length, batch, device, None, None)

    def open_length(self, batch: int, device: torch.device) -> Tensor:
        """Tokens of the sentence that has not ended yet, `(B,)`."""
        if self.ends is None or self.length == 0:
            return torch.zeros(batch, dtype=torch.long, device=device)
        if self._open is None:
            tail = self.ends[:, -min(self.longest, self.length) :]
            newest_end = tail.flip(1).long().argmax(1)
            self._open = torch.where(tail.any(1), newest_end, tail.shape[1])
        return self._open

    def numbers(self, start: int = 0) -> Tensor:
        """Which sentence each token from `start` on belongs to, `(B, N - start)`, counted from 0."""
        counted = self.ends.long().cumsum(1)
        return pad(counted, (1, 0))[:, :-1][:, start:]

    def crop(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        if self.ends is not None:
            self.ends, self._open = self.ends[:, :length], None

    def reorder(self, index: Tensor) -> None:
        """Keeps the batch rows `index` names, in its order."""
        if self.ends is not None:
            self.ends, self._open = self.ends[index.to(self.ends.device)], None

    def tensors(self) -> list[Tensor]:
        """Everything kept alive."""
        return [tensor for tensor in (self.ends, self.boundary_ids, self._open) if tensor is not None]

    def reset(self) -> None:
        self.ends, self._open = None, None

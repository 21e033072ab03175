"""Rows of keys or values kept where the model does not compute: in the memory of the host, or in a file.

A retrieval cache attends to a small, changing part of its tokens; the rest can wait elsewhere. Rows lie in chunks of
`CHUNK` tokens, `(C, B, K, CHUNK, D)`, so that growing appends to the end of the storage, and a file grows without being
rewritten. The file has no name: the operating system frees it when the process ends, however it ends.

Shapes: B batch, K key/value heads, N tokens, M chosen tokens, D head dim, C chunks.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from typing import Any

import torch
from torch import Tensor

from hf_ext.errors import CacheStateError, ConfigError


CHUNK = 32  # tokens
GROWTH = 8  # full storage grows by one part in this many


class OffloadedRows:
    """Growing rows `(B, K, N, D)` on the CPU, read by `gather`.

    Args:
        rows (`Tensor`): `(B, K, N, D)`, the first ones; what is read comes back to their device.
        folder (`str`, *optional*): a folder for a file that holds them; otherwise they are in memory, pinned if the model
            is on an accelerator.

    Raises:
        `CacheStateError`: the file cannot grow, because the disk is full for example.
        `ConfigError`: `folder` is not one that can be written to.
    """

    def __init__(self, rows: Tensor, folder: str | None = None):
        self.device, self.folder = rows.device, folder
        self.pinned = folder is None and rows.device.type != "cpu"
        self.length = 0
        self._file = None if folder is None else open_unnamed(folder)
        self.data = self._allocate(rows, 0)
        self.append(rows)

    @property
    def row_bytes(self) -> int:
        """Bytes one token takes, over batch and heads."""
        _, batch, heads, _, dim = self.data.shape
        return batch * heads * dim * self.data.element_size()

    def flat(self, places: Tensor) -> Tensor:
        """Numbers of the rows at `places` `(B, K, M)`, in the storage seen as one long list."""
        _, batch, heads, _, _ = self.data.shape
        lane = torch.arange(batch * heads, device=places.device).view(batch, heads, 1)
        return (places // CHUNK * (batch * heads) + lane) * CHUNK + places % CHUNK

    def append(self, rows: Tensor) -> None:
        start, count = self.length, rows.shape[2]
        chunks = -(-(start + count) // CHUNK)
        if chunks > len(self.data):
            self.data = self._allocate(rows, chunks)
        if count == 0:
            return
        places = torch.arange(start, start + count).expand(*rows.shape[:2], -1)
        self._list().index_copy_(0, self.flat(places).flatten(), rows.cpu().reshape(-1, rows.shape[3]))
        self.length += count

    def gather(self, places: Tensor) -> Tensor:
        """The rows at `places` `(B, K, M)`, `(B, K, M, D)`, where the model computes."""
        index = self.flat(places.cpu()).flatten()
        rows = self._list()
        if self.pinned:
            staged = torch.empty(len(index), rows.shape[1], dtype=rows.dtype, pin_memory=True)
            torch.index_select(rows, 0, index, out=staged)
            found = staged.to(self.device, non_blocking=True)
        else:
            found = rows.index_select(0, index).to(self.device)
        return found.view(*places.shape, self.data.shape[-1])

    def rows(self) -> Tensor:
        """All rows, `(B, K, N, D)`, where the model computes."""
        chunks, batch, heads, _, dim = self.data.shape
        return self.data.permute(1, 2, 0, 3, 4).reshape(batch, heads, -1, dim)[:, :, : self.length].to(self.device)

    def reorder(self, index: Tensor) -> None:
        """Keeps the batch rows `index` names, in its order."""
        index = index.cpu()
        if index.shape[0] == self.data.shape[1] and bool((index == torch.arange(len(index))).all()):
            return
        self._replace(self.rows().index_select(0, index.to(self.device)))

    def _replace(self, rows: Tensor) -> None:
        self.__dict__.update(OffloadedRows(rows, self.folder).__dict__)

    def _list(self) -> Tensor:
        return self.data.view(-1, self.data.shape[-1])

    def _allocate(self, rows: Tensor, chunks: int) -> Tensor:
        """Storage of at least `chunks` chunks that holds what the present one does."""
        chunks += chunks // GROWTH
        shape = (chunks, rows.shape[0], rows.shape[1], CHUNK, rows.shape[3])
        if chunks == 0 or self._file is None:
            data = torch.empty(shape, dtype=rows.dtype, pin_memory=self.pinned and chunks > 0)
            if self.length:
                data[: len(self.data)] = self.data
            return data
        count = math.prod(shape)
        mapped = map_file(self._file, count * rows.element_size(), self.folder)
        return torch.frombuffer(mapped, dtype=rows.dtype, count=count).view(shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedRows:
        memo[id(self)] = duplicate = OffloadedRows(self.rows(), self.folder)
        return duplicate


def open_unnamed(folder: str) -> Any:
    """A file without a name in `folder`.

    Raises:
        `ConfigError`: there is no such folder, or nothing can be written there.
    """
    try:
        return tempfile.TemporaryFile(dir=folder, prefix="hf_ext_")
    except OSError as error:
        raise ConfigError(
            f"offload_dir={folder!r} must be an existing folder that can be written to: {error.strerror}."
        ) from error


def map_file(file: Any, size: int, folder: str | None) -> mmap.mmap:
    """The first `size` bytes of the file in memory; the disk space is reserved before anything is written."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            os.truncate(file.fileno(), size)
        return mmap.mmap(file.fileno(), size)
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise CacheStateError(
            f"offload_dir={folder!r} cannot hold {size:,} bytes for one layer: {why}. The cache is incomplete; free space "
            "or choose another folder, then call reset() on it."
        ) from error

"""A checksum of tensors, numbers and texts in plain containers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def content_sha256(value: Any) -> str:
    """SHA-256 of tensors, numbers and texts in plain containers, down to every bit.

    >>> content_sha256({"a": [1, 2.0]}) == content_sha256({"a": [1, 2]})
    False
    """
    digest = hashlib.sha256()
    _feed(digest.update, value)
    return digest.hexdigest()


def _feed(update: Callable[[Any], Any], value: Any) -> None:
    if isinstance(value, Mapping):
        update(f"mapping {len(value)}\n".encode())
        for key, item in value.items():
            _feed(update, key)
            _feed(update, item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        update(f"{type(value).__name__} {len(value)}\n".encode())
        for item in value:
            _feed(update, item)
    elif isinstance(value, Tensor):
        update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
        update(_bytes(value))
    else:
        update(f"{type(value).__name__} {value!r}\n".encode())


def _bytes(tensor: Tensor) -> bytes | memoryview:
    if tensor.layout is not torch.strided:
        return repr(tensor.tolist() if not tensor.is_sparse else tensor.to_dense().tolist()).encode()
    plain = tensor.detach().cpu().contiguous().flatten()
    content: Any = plain.view(torch.uint8).numpy()
    return memoryview(content) if plain.numel() else b""

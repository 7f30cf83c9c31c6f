"""Operators that torchvision asks for where its compiled part does not load beside the torch that is installed."""

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare_operators() -> None:
    """Makes torchvision importable; no peer uses the operators themselves."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for schema in _SCHEMAS:
            _LIBRARY.define(schema)

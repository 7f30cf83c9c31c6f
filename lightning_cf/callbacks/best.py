"""Scores that were taken before a partition do not count against those after it."""

from __future__ import annotations

import math

import torch

from lightning_cf.lightning_api import ModelCheckpoint, Trainer


def discount_scores(trainer: Trainer) -> None:
    """Counts the checkpoints that were kept so far for their scores as the worst: any later one is better.

    A checkpoint from before a partition scores well, since nothing is cut yet, and does not hold the task's claim. It
    stays on disk, and the best one, until a later one takes its place.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.best_k_models:
            worst = math.inf if callback.mode == "min" else -math.inf
            kept = callback.best_k_models
            callback.best_k_models = {path: torch.tensor(worst, device=score.device) for path, score in kept.items()}
            callback.kth_value = torch.tensor(worst)
            callback.best_model_score = callback.best_k_models.get(callback.best_model_path)

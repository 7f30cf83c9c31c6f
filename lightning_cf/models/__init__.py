"""What the command line trains: small networks, and a LightningModule that trains any classifier."""

from lightning_cf.models.classifier import Classifier
from lightning_cf.models.networks import CNN, MLP, ResidualBlock, ResNet

__all__ = ["CNN", "MLP", "Classifier", "ResNet", "ResidualBlock"]

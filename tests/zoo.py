"""Networks of the timm package, small and with random weights, for a check that nobody tuned by hand.

timm imports torchvision for its data pipelines, which no network needs: where it is absent, stand-ins take its place.
"""

import enum
import importlib.util
import sys
import types
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec

import torch
from torch import nn


class _StandIn(types.ModuleType):
    """A module that has a class of every name."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _stand_in_for_torchvision():
    names = "transforms transforms.functional transforms.v2 datasets datasets.utils ops ops.misc models"
    names = ["torchvision", *(f"torchvision.{name}" for name in [*names.split(), "models.feature_extraction", "io"])]
    for name in names:
        module = sys.modules[name] = _StandIn(name)
        module.__spec__ = ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    modes = enum.Enum(
        "InterpolationMode", {m.upper(): m for m in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")}
    )
    for name in ("torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name].InterpolationMode = modes
    return names


def available():
    """Whether timm is installed."""
    return importlib.util.find_spec("timm") is not None


def load():
    """timm, imported without torchvision where that is absent."""
    names = [] if importlib.util.find_spec("torchvision") else _stand_in_for_torchvision()
    try:
        import timm
    finally:
        for name in names:  # nobody else is to take them for the real ones
            del sys.modules[name]
    return timm


@dataclass(frozen=True)
class Config:
    """A network of timm by its name, with what makes it small."""

    name: str
    size: int = 64
    options: dict = field(default_factory=dict)

    @property
    def quick(self):
        """Whether it is checked in every run of the tests."""
        return self.name in QUICK


def configs():
    small = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    return [
        *(Config(name, 32, {"layers": [1, 1, 1, 1]}) for name in RESNETS),
        *(Config(name, 64) for name in PLAIN),
        *(Config(name, 32, small) for name in ("convnext_atto", "convnextv2_atto")),
        *(Config(name, 32, vit) for name in VITS),
        Config("densenet121", 64, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
        Config("mixer_s32_224", 64, {"img_size": 64}),
        Config("resmlp_12_224", 64, {"img_size": 64}),
        Config("gmlp_ti16_224", 64, {"img_size": 64}),
        Config("gcresnet33ts", 64),
        Config("lambda_resnet26t", 64),
        Config("cspresnet50", 64),
        Config(
            "swin_tiny_patch4_window7_224",
            32,
            {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
        ),
        Config(
            "swinv2_tiny_window8_256",
            32,
            {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
        ),
        Config("poolformer_s12", 64),
        Config("caformer_s18", 64),
        Config("cait_xxs24_224", 32, {**vit, "depth": 2}),
        Config("xcit_nano_12_p8_224", 32, {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}),
        Config("focalnet_tiny_srf", 64),
        Config(
            "sequencer2d_s",
            32,
            {"img_size": 32, "layers": (1, 1, 1, 1), "embed_dims": (16, 24, 24, 24), "hidden_sizes": (8, 8, 8, 8)},
        ),
        Config("pit_ti_224", 64, {"img_size": 64}),
        Config(
            "twins_svt_small",
            64,
            {"img_size": 64, "embed_dims": (16, 24, 32, 48), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 4)},
        ),
        Config("pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}),
        Config("coatnet_pico_rw_224", 64, {"img_size": 64}),
        Config("inception_v3", 96),
    ]


REFUSED = {"nf_resnet26", "nfnet_l0", "eca_nfnet_l0", "resnetv2_50x1_bit"}  # weights are standardised
QUICK = {
    "resnet18", "mobilenetv3_small_050", "convnextv2_atto", "densenet121",
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224",
}  # fmt: skip

RESNETS = (
    "resnet18", "resnet50", "resnet50d", "resnext50_32x4d", "wide_resnet50_2", "seresnet18", "ecaresnet50t",
    "resnetaa50", "resnest14d", "res2net50_26w_4s", "skresnet18",
)  # fmt: skip
VITS = (
    "vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224",
    "vit_relpos_small_patch16_224", "vit_base_patch16_rpn_224", "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
)  # fmt: skip
PLAIN = (
    "vgg11", "vgg11_bn", "xception41", "mobilenetv2_035", "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035", "mnasnet_small", "efficientnet_b0", "efficientnet_lite0", "tf_efficientnetv2_b0",
    "tinynet_e", "ghostnet_050", "ghostnetv2_100", "regnetx_002", "regnety_002", "hrnet_w18_small", "dla46_c", "dpn48b",
    "selecsls42", "hardcorenas_a", "repvgg_a0", "mobileone_s0", "fbnetc_100", "semnasnet_050", "lcnet_035",
    "edgenext_xx_small", "mobilevit_xxs", "mobilevitv2_050", "fastvit_t8",
    "vovnet39a", "ese_vovnet19b_slim", "rexnet_100", "starnet_s050", "inception_next_atto", "repvit_m0_9", "rdnet_tiny",
    "darknet17", "cs3darknet_s", "nf_resnet26", "nfnet_l0", "resnetv2_50", "resnetv2_50x1_bit", "mambaout_femto",
    "efficientvit_b0", "efficientvit_m0", "tresnet_m", "gernet_s", "spnasnet_100", "shvit_s1",
    "eca_nfnet_l0", "davit_tiny",
)  # fmt: skip


def build(config):
    """The network with random weights, in eval mode, and four inputs."""
    timm = load()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(config.name, num_classes=10, **config.options)
        for module in network.modules():
            redraw(module)
        x = torch.randn(4, 3, config.size, config.size)
        calibrate(network, x)
        return network.eval(), x


@torch.no_grad()
def redraw(module):
    """Random weights of a size that keeps activations and gradients alive, where initial ones may be zero."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim > 1:
            fan_in = parameter[0].numel() if "token" not in name and "pos" not in name else 1
            parameter.normal_(std=max(1, fan_in) ** -0.5)
        elif "bias" in name:
            parameter.normal_(std=0.1)
        else:
            parameter.uniform_(0.5, 1.5)


@torch.no_grad()
def calibrate(network, x):
    """Running statistics near those of the data."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
    network.train()(x)
    for norm in norms:
        norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(0.5 + torch.rand_like(norm.running_var)).clamp_min_(1e-2)

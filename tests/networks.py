"""Small networks that move, join and split their units in many ways; each with an input of four samples."""

import torch
from torch import nn
from torch.nn import functional

from lightning_cf.models import CNN, MLP, ResNet


class Wired(nn.Module):
    """Named layers, and a function of them and the inputs as forward pass."""

    def __init__(self, wire, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.wire = wire

    def forward(self, *inputs):
        return self.wire(self, *inputs)


class BareWeights(nn.Module):
    """A hidden layer without a module of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 9))
        self.bias = nn.Parameter(torch.randn(9))
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        return self.head(torch.relu(x @ self.weight + self.bias))


class BareHead(nn.Module):
    """Outputs without a module of their own."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(6, 5)
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        return functional.linear(torch.relu(self.hidden(x)), self.weight)


class InPlaceBias(nn.Module):
    """A bias that is added in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5, bias=False)
        self.bias = nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.layer(x)
        hidden += self.bias
        return self.head(torch.relu(hidden))


class FixedFeatures(nn.Module):
    """A layer of a trained weight and one of a buffer, added."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(6, 5)
        self.register_buffer("fixed", torch.randn(5, 6))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.relu(self.left(x) + functional.linear(x, self.fixed)))


def trained(norms):
    """Gives norms statistics and affine values like those of a trained network."""
    for norm in norms.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return norms


def flat():
    return torch.randn(4, 6)


def image():
    return torch.randn(4, 3, 8, 8)


def mlp():
    return MLP(shape=(6,), classes=3, hidden=(8, 8)), flat()


def mlp_norm():
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(7, 3)), flat()


def cnn():
    return CNN(shape=(3, 8, 8), classes=3, channels=(5, 6), hidden=7), image()


def resnet():
    return ResNet(shape=(3, 8, 8), classes=3, channels=(5, 6), blocks=2), image()


def grouped():
    convs = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), image()


def transposed():
    convs = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, stride=2), nn.ReLU(), nn.Conv2d(6, 5, 1)
    return nn.Sequential(*convs, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(20, 3)), image()


def transposed_grouped():
    convs = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 5, 1)
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)), image()


def padded_shortcut():
    def wire(net, x):
        x = torch.relu(net.stem(x))
        y = net.conv(x) + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))
        return net.head(torch.relu(y).mean(dim=(2, 3)))

    layers = {
        "stem": nn.Conv2d(3, 4, 3, padding=1),
        "conv": nn.Conv2d(4, 7, 3, 2, padding=1),
        "head": nn.Linear(7, 3),
    }
    return Wired(wire, **layers), image()


def concatenated():
    def wire(net, x):
        joined = torch.cat([torch.relu(net.left(x)), net.right(x).tanh()], dim=1)
        return net.head(functional.max_pool2d(joined, 2).flatten(1))

    layers = {"left": nn.Conv2d(3, 4, 1), "right": nn.Conv2d(3, 5, 3, padding=1), "head": nn.Linear(9 * 16, 3)}
    return Wired(wire, **layers), image()


def in_place():
    def wire(net, x):
        x = net.first(x).relu_()
        x += 1
        x[:, 2:4].mul_(2)
        x[:, :3] += net.second(x[:, 3:])
        return net.head(x.tanh_())

    return Wired(wire, first=nn.Linear(6, 8), second=nn.Linear(5, 3), head=nn.Linear(8, 3)), flat()


def preallocated():
    def wire(net, x):
        both = torch.zeros(len(x), 9)
        both[:, :5] = torch.relu(net.left(x))
        both[:, 5:] = net.right(x)
        return net.head(both)

    return Wired(wire, left=nn.Linear(6, 5), right=nn.Linear(6, 4), head=nn.Linear(9, 3)), flat()


def accumulated():
    def wire(net, x):
        both = torch.zeros(len(x), 9)
        both[:, :5] += torch.relu(net.left(x))
        both[:, 5:].add_(net.right(x))
        return net.head(both)

    return Wired(wire, left=nn.Linear(6, 5), right=nn.Linear(6, 4), head=nn.Linear(9, 3)), flat()


def averaged():
    def wire(net, x):
        return net.head(torch.relu(net.first(x)).view(len(x), 5, 2).mean(2))

    return Wired(wire, first=nn.Linear(6, 10), head=nn.Linear(5, 3)), flat()


def gated():
    def wire(net, x):
        value, gate = net.first(x).chunk(2, dim=1)
        return net.head(value * gate.sigmoid())

    return Wired(wire, first=nn.Linear(6, 10), head=nn.Linear(5, 3)), flat()


def hard_gated():
    def wire(net, x):
        return net.head(net.right(x) * (net.left(x) > 0).float())

    return Wired(wire, left=nn.Linear(6, 5), right=nn.Linear(6, 5), head=nn.Linear(5, 3)), flat()


def masked():
    def wire(net, x):
        return net.head(net.right(x).masked_fill((net.left(x) > 0).flip(1), 0))

    return Wired(wire, left=nn.Linear(6, 5), right=nn.Linear(6, 5), head=nn.Linear(5, 3)), flat()


def rounded():
    def wire(net, x):
        return net.head((100 * net.first(x)).int().roll(2, 1).float())

    return Wired(wire, first=nn.Linear(6, 5), head=nn.Linear(5, 3)), flat()


def shuffled():
    def wire(net, x):
        x = net.first(x).relu().view(len(x), 2, 4, 6, 6).transpose(1, 2).reshape(len(x), 8, 6, 6)
        return net.head(net.second(x.roll(3, dims=1).flip(1)).sum((2, 3)))

    layers = {"first": nn.Conv2d(3, 8, 3), "second": nn.Conv2d(8, 6, 3, groups=2), "head": nn.Linear(6, 3)}
    return Wired(wire, **layers), image()


def tokens():
    def wire(net, x):
        x = torch.relu(net.embed(x))
        x = x + net.mlp(x)
        return net.head(x.mean(1))

    mlp = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
    return Wired(wire, embed=nn.Linear(6, 5), mlp=mlp, head=nn.Linear(5, 3)), torch.randn(4, 9, 6)


def conv1d():
    convs = nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(5, 4, 2), nn.AvgPool1d(2)
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(4 * 2, 3)), torch.randn(4, 2, 12)


def conv3d():
    convs = nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 3, 2)
    return nn.Sequential(*convs, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 3)), torch.randn(4, 1, 5, 5, 5)


def conv_head():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1)), image()


def two_inputs():
    def wire(net, x, y):
        return net.head(torch.relu(net.left(x)) + torch.relu(net.right(y)))

    return Wired(wire, left=nn.Linear(6, 5), right=nn.Linear(7, 5), head=nn.Linear(5, 3)), (flat(), torch.randn(4, 7))


def shared_by_sum():
    def wire(net, x, y):
        return net.head(torch.relu(net.encoder(x)) + torch.relu(net.encoder(y)))

    return Wired(wire, encoder=nn.Linear(6, 5), head=nn.Linear(5, 3)), (flat(), flat())


def shared_by_concatenation():
    def wire(net, x, y):
        return net.head(torch.cat([torch.relu(net.encoder(x)), torch.relu(net.encoder(y))], dim=1))

    return Wired(wire, encoder=nn.Linear(6, 5), head=nn.Linear(10, 3)), (flat(), flat())


def shared_in_a_row():
    def wire(net, x):
        return net.head(torch.relu(net.layer(torch.relu(net.layer(x)))))

    return Wired(wire, layer=nn.Linear(6, 6), head=nn.Linear(6, 3)), flat()


def shared_transposed():
    def wire(net, x):
        return net.head(functional.linear(torch.relu(net.layer(x)), net.layer.weight.T))

    return Wired(wire, layer=nn.Linear(6, 5), head=nn.Linear(6, 3)), flat()


def reordered():
    def wire(net, x):
        x = torch.relu(net.first(x))
        x = torch.index_select(x, 1, torch.tensor([4, 2, 0, 1, 3])) + x[:, [1, 0, 2, 4, 3]]
        return net.head(x[:, torch.tensor([True, False, True, True, True])])

    return Wired(wire, first=nn.Linear(6, 5), head=nn.Linear(4, 3)), flat()


def bare_weights():
    return BareWeights(), flat()


def bare_head():
    return BareHead(), flat()


def one_unit():
    return nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 1)), flat()


NETWORKS = [
    mlp,
    mlp_norm,
    cnn,
    resnet,
    grouped,
    transposed,
    transposed_grouped,
    padded_shortcut,
    concatenated,
    in_place,
    preallocated,
    accumulated,
    averaged,
    gated,
    hard_gated,
    masked,
    rounded,
    shuffled,
    tokens,
    conv1d,
    conv3d,
    conv_head,
    two_inputs,
    shared_by_sum,
    shared_by_concatenation,
    shared_in_a_row,
    shared_transposed,
    reordered,
    bare_weights,
    bare_head,
    one_unit,
]


def build(make):
    """A network with its input, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, example = make()
        return trained(network), example

"""Small networks of the kinds that people use, for images of 1 x 8 x 8 with ten classes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from networks import Wired
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

WIDTH = 32


@dataclass(frozen=True)
class Architecture:
    """A network and what it takes.

    Attributes:
        name: what people call it.
        build: makes it with random weights.
        inputs: what it takes, from a batch of images; a tuple for several inputs.
        epochs: of each task, LEARN and INVARIANCE half each.
        exclude: layers that the first task is to own whole.
        refused: part of the error where exact isolation cannot hold.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Tensor], Any] = lambda x: x
    epochs: int = 12
    exclude: tuple[str, ...] = ()
    refused: str | None = None


# What the networks take


def flat(x):
    return x.flatten(1)


def rows(x):
    """Eight tokens of eight pixels."""
    return x[:, 0]


def words(x):
    """Sixteen whole numbers from 0 to 16: every fourth pixel's brightness, apart for each place."""
    x = F.avg_pool2d(x, 2).flatten(1)
    low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    return ((x - low) / (high - low) * 15.9).long() + 16 * torch.arange(16)


def signal(x):
    return x.flatten(2)


def volume(x):
    return x.reshape(-1, 1, 4, 4, 4)


def twice(x):
    return x, x.mT


# Perceptrons


def mlp(*between, width=WIDTH, depth=2):
    """Linear layers with modules between them, each made by a function of the width."""
    layers = [nn.Linear(64, width)]
    for _ in range(depth - 1):
        layers += [*(make(width) for make in between), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, *(make(width) for make in between), nn.ReLU(), nn.Linear(width, 10))


def functional(wire, **layers):
    return lambda: Wired(wire, **{name: make() for name, make in layers.items()})


def linear(inputs=WIDTH, outputs=WIDTH, **options):
    return lambda: nn.Linear(inputs, outputs, **options)


def head(inputs=WIDTH):
    return linear(inputs, 10)


# Convolutions


def conv(inputs, outputs, size=3, **options):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def classify(*layers, width=WIDTH, pool=2):
    """Layers of channels, pooled, and a head."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(pool), nn.Flatten(), nn.Linear(width * pool**2, 10))


def normed_cnn(norm):
    return classify(
        *(nn.Conv2d(1, 24, 3, padding=1), norm(24), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, WIDTH, 3, padding=1), norm(WIDTH), nn.ReLU()),
    )


class Residual(nn.Module):
    """A block of layers beside a shortcut."""

    def __init__(self, block, shortcut=None, after=None):
        super().__init__()
        self.block, self.shortcut, self.after = block, shortcut or nn.Identity(), after or nn.Identity()

    def forward(self, x):
        return self.after(self.block(x) + self.shortcut(x))


def resnet():
    def block(inputs, outputs, stride):
        plain = stride == 1 and inputs == outputs
        body = nn.Sequential(
            conv(inputs, outputs, stride=stride), nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        )
        side = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        return Residual(body, None if plain else side, nn.ReLU())

    return classify(conv(1, 24), block(24, 24, 1), block(24, WIDTH, 2), block(WIDTH, WIDTH, 1))


def preactivation():
    def block(width, inner):
        return Residual(
            nn.Sequential(
                *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, inner, 1)),
                *(nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, inner, 3, padding=1)),
                *(nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, width, 1)),
            )
        )

    return classify(nn.Conv2d(1, WIDTH, 3, 2, 1), block(WIDTH, 20), block(WIDTH, 20), nn.BatchNorm2d(WIDTH), nn.ReLU())


class Concatenating(nn.Module):
    """Branches side by side; with ``dense``, beside what they read."""

    def __init__(self, *branches, dense=False):
        super().__init__()
        self.branches, self.dense = nn.ModuleList(branches), dense

    def forward(self, x):
        return torch.cat([*([x] if self.dense else []), *(branch(x) for branch in self.branches)], dim=1)


def densenet():
    def layer(inputs):
        return Concatenating(
            nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 16, 3, padding=1)), dense=True
        )

    transition = nn.Sequential(nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 20, 1), nn.AvgPool2d(2))
    return classify(
        nn.Conv2d(1, 16, 3, padding=1), layer(16), layer(32), transition, layer(20), layer(36), width=52, pool=1
    )


def inception():
    def block(inputs):
        pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inputs, 16, 1))
        return Concatenating(
            conv(inputs, 16, 1), nn.Sequential(conv(inputs, 16, 1), conv(16, 20)), conv(inputs, 16, 5), pooled
        )

    return classify(conv(1, 16, stride=2), block(16), block(68), width=68)


def mobile():
    def block(width, wide):
        return Residual(
            nn.Sequential(
                *(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
                *(nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()),
                *(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)),
            )
        )

    return classify(conv(1, 24, stride=2), block(24, 48), block(24, 48), width=24)


def shuffled():
    grouped = conv(WIDTH, WIDTH, 1, groups=4), nn.ChannelShuffle(4), conv(WIDTH, WIDTH, groups=4)
    return classify(conv(1, WIDTH, stride=2), *grouped, conv(WIDTH, WIDTH, 1, groups=4))


class SqueezeExcite(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, 16, 1), nn.Conv2d(16, width, 1)

    def forward(self, x):
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


def squeeze_excite():
    return classify(conv(1, 24, stride=2), SqueezeExcite(24), conv(24, WIDTH), SqueezeExcite(WIDTH))


class UNet(nn.Module):
    def __init__(self, up):
        super().__init__()
        self.first, self.down, self.up = conv(1, 20), conv(20, WIDTH, stride=2), up
        self.last, self.out = conv(40, 24), nn.Conv2d(24, 10, 1)

    def forward(self, x):
        first = self.first(x)
        joined = self.last(torch.cat([first, self.up(self.down(first))], dim=1))
        return self.out(joined).amax((2, 3))


def upsampling():
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), conv(WIDTH, 20, 1))


class ECA(nn.Module):
    """A gate for each channel, from its neighbours in the order of channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]


class GRN(nn.Module):
    """Global response normalisation."""

    def __init__(self, width):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(1, width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x):
        size = x.norm(dim=(2, 3), keepdim=True)
        return self.gamma * x * size / (size.mean(dim=1, keepdim=True) + 1e-6) + self.beta + x


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class ChannelsLast(nn.Module):
    """A module over the last axis, for images."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.movedim(1, -1)).movedim(-1, 1)


class Scale(nn.Module):
    """A factor for each channel, small at first."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x):
        return x * self.gamma


def convnext():
    def block():
        inner = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH), Scale(WIDTH))
        return Residual(nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), ChannelsLast(inner)))

    return classify(nn.Conv2d(1, WIDTH, 2, 2), ChannelsLast(nn.LayerNorm(WIDTH)), block(), block())


# Transformers


class Attention(nn.Module):
    """Self-attention with one layer for queries, keys and values."""

    def __init__(self, width, heads, *, causal=False, norm=nn.Identity):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query_norm, self.key_norm = norm(width // heads), norm(width // heads)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.query_norm(q), self.key_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(x.transpose(1, 2).reshape(batch, tokens, width))


def block(width, heads=4, **options):
    feed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, **options))
    return nn.Sequential(Residual(attention), Residual(feed))


class ViT(nn.Module):
    def __init__(self, width=WIDTH, attend=block):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(attend(width), attend(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class WindowAttention(nn.Module):
    """Attention within windows of 2 x 2, shifted by one, with a learned bias for each relative position."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(0.1 * torch.randn(9, heads))
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None, :] + 1).permute(1, 2, 0)
        self.register_buffer("index", apart[..., 0] * 3 + apart[..., 1])

    def forward(self, x):
        batch, side, _, width = x.shape
        x = x.roll((-1, -1), dims=(1, 2)).reshape(batch, side // 2, 2, side // 2, 2, width).transpose(2, 3)
        x = x.reshape(-1, 4, width)
        q, k, v = self.qkv(x).reshape(len(x), 4, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].permute(2, 0, 1)
        scores = (q @ k.mT) * (width // self.heads) ** -0.5 + bias
        x = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), 4, width))
        x = x.reshape(batch, side // 2, side // 2, 2, 2, width).transpose(2, 3).reshape(batch, side, side, width)
        return x.roll((1, 1), dims=(1, 2))


def swin():
    feed = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
    attention = nn.Sequential(nn.LayerNorm(WIDTH), WindowAttention(WIDTH, 4))
    blocks = nn.Sequential(Residual(attention), Residual(feed), nn.LayerNorm(WIDTH))
    return classify(nn.Conv2d(1, WIDTH, 2, 2), ChannelsLast(blocks))


class Transposed(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.mT).mT


def mixer():
    tokens = Transposed(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
    channels = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
    return nn.Sequential(
        nn.Linear(8, WIDTH),
        Residual(nn.Sequential(nn.LayerNorm(WIDTH), tokens)),
        Residual(channels),
        nn.Flatten(),
        nn.Linear(8 * WIDTH, 10),
    )


def encoder(norm_first):
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.1, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(8, WIDTH), Position(8, WIDTH), encoder, nn.Flatten(), nn.Linear(8 * WIDTH, 10))


class Position(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.position = nn.Parameter(0.1 * torch.randn(tokens, width))

    def forward(self, x):
        return x + self.position


def multihead(net, x):
    x = net.embed(x)
    x = x + net.attention(x, x, x, need_weights=False)[0]
    return net.head(F.relu(net.feed(x)).flatten(1))


class Decoder(nn.Module):
    """Predicts from the mean over tokens; its second embedding reads with the weights of the first."""

    def __init__(self):
        super().__init__()
        self.words, self.position = nn.Embedding(256, WIDTH), nn.Parameter(0.1 * torch.randn(16, WIDTH))
        self.blocks = block(WIDTH, causal=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(256, 10)

    def forward(self, x):
        x = self.norm(self.blocks(self.words(x) + self.position)).mean(1)
        return self.head(F.relu(F.linear(x, self.words.weight)))


class GPT(nn.Module):
    """Predicts from the last token."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(256, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.Sequential(block(WIDTH, causal=True), block(WIDTH, causal=True))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x):
        x = self.words(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(x))[:, -1])


class Llama(nn.Module):
    """Rotary positions, fewer keys than queries, gated feed-forward layers, RMSNorm; predicts from the mean."""

    def __init__(self, width=WIDTH, heads=8):
        super().__init__()
        self.words, self.heads = nn.Embedding(256, width), heads
        self.q, self.kv, self.o = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.gate, self.up, self.down = nn.Linear(width, 48), nn.Linear(width, 48), nn.Linear(48, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.head = nn.Linear(width, 10)

    def rotated(self, x):
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[-2])[:, None] * 100.0 ** (-torch.arange(half) / half)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)

    def forward(self, x):
        x = self.words(x)
        y = self.norms[0](x)
        q = self.q(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, self.heads // 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norms[2](x).mean(1))


def encoder_decoder(net, x):
    x = net.embed(x)
    return net.head(net.transformer(x, net.query.expand(len(x), -1, -1)).flatten(1))


def cells(net, x):
    h = c = x.new_zeros(len(x), WIDTH)
    for token in x.unbind(1):
        h, c = net.cell(token, (h, c))
    return net.head(h)


def wavenet(net, x):
    x, skip = net.first(x), 0
    for at, (value, gate) in enumerate(zip(net.values, net.gates, strict=True)):
        y = F.pad(x, (2 * 2**at, 0))
        y = value(y).tanh() * gate(y).sigmoid()
        x, skip = x + net.mixers[at](y), skip + net.skips[at](y)
    return net.head(F.adaptive_max_pool1d(F.relu(skip), 4).flatten(1))


def modules(count, make):
    return lambda: nn.ModuleList(make(at) for at in range(count))


def pyramid(net, x):
    a = F.relu(net.first(x))
    b = F.relu(net.second(a))
    low = net.low(b)
    high = net.high(a) + F.interpolate(low, size=a.shape[2:], mode="nearest")
    return net.head(torch.cat([F.relu(y).amax((2, 3)) for y in (low, high)], dim=1))


def graph(net, x):
    """Rows of an image as nodes, each beside its neighbours."""
    near = torch.eye(8) + torch.eye(8).roll(1, 0) + torch.eye(8).roll(-1, 0)
    return net.head(F.relu(near @ net.second(F.relu(near @ net.first(x)))).flatten(1) / 8)


def query_pooling(net, x):
    x = F.relu(net.position(net.embed(x)))
    query, keys, values = (
        x.unflatten(2, (8, -1)).transpose(1, 2) for x in (net.query.expand(len(x), -1, -1), net.keys(x), net.values(x))
    )
    return net.head(F.relu(F.scaled_dot_product_attention(query, keys, values)).flatten(1))


# Other ways to compute


def recurrent(kind):
    return functional(
        lambda net, x: net.head(net.layer(x)[0].flatten(1)),
        layer=lambda: kind(8, WIDTH, batch_first=True),
        head=head(8 * WIDTH),
    )


def highway(net, x):
    x = F.relu(net.first(x))
    gate = net.gate(x).sigmoid()
    return net.head(gate * F.relu(net.inner(x)) + (1 - gate) * x)


def used_twice(net, x):
    x = F.relu(net.first(x))
    x = x + F.relu(net.layer(x))
    return net.head(x + F.relu(net.layer(x)))


def tied_autoencoder(net, x):
    code = F.relu(net.layer(x))
    return net.head(torch.cat([code, F.relu(F.linear(code, net.layer.weight.T))], dim=1))


def low_rank(net, x):
    x = F.relu(net.first(x))
    return net.head(F.relu(net.second(x) + x @ net.down.T @ net.up.T))


def unpooling(net, x):
    pooled, places = F.max_pool2d(F.relu(net.first(x)), 2, return_indices=True)
    return net.head(F.adaptive_max_pool2d(F.relu(net.second(F.max_unpool2d(pooled, places, 2))), 2).flatten(1))


def pixels(net, x):
    x = F.pixel_shuffle(F.relu(net.wide(F.pixel_unshuffle(x, 2))), 2)
    return net.head(F.relu(net.last(F.pixel_unshuffle(x, 2))).mean((2, 3)))


def padded():
    modes = "reflect", "replicate", "circular"
    convs = (nn.Conv2d(1 if mode == "reflect" else 24, 24, 3, padding=1, padding_mode=mode) for mode in modes)
    return classify(*(module for conv in convs for module in (conv, nn.ReLU())), width=24)


def cosine(net, x):
    return 10 * F.linear(F.normalize(F.relu(net.first(x)), dim=1), F.normalize(net.head.weight, dim=1))


class ByHand(nn.Module):
    """RMSNorm as the published LLaMA has it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        dtype, x = x.dtype, x.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)


def inline_norm(net, x):
    x = F.gelu(net.first(x))
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return net.head(x + F.gelu(net.second(normed)))


def messages(net, x):
    """A graph network: each image a graph whose nodes are its pixels and whose edges join neighbours."""
    cells = torch.arange(64).reshape(8, 8)
    pairs = [(cells[:, 1:], cells[:, :-1]), (cells[1:], cells[:-1])]
    edges = torch.cat([torch.stack([a.flatten(), b.flatten()]) for a, b in [*pairs, *((b, a) for a, b in pairs)]], 1)
    x = x.flatten(1)[..., None]
    for layer in (net.first, net.second):
        x = F.relu(layer(x))
        x = x + x.new_zeros(x.shape).index_add(1, edges[1], x[:, edges[0]]) / 4
    return net.head(F.relu(net.last(x.reshape(len(x), 4, 16, -1).mean(2).flatten(1))))


def branching(net, x):
    x, bright = F.relu(net.first(x)), bool(x[0].mean() > 100)
    return net.head(F.relu((net.bright if bright else net.dark)(x)))


def remembering(net, x):
    x = F.relu(net.first(x))
    net.mean.lerp_(x.detach().mean(0), 0.1)
    return net.head(F.relu(net.second(x - net.mean)))


def reading(net, x):
    x = F.relu(net.first(x))
    return net.head(F.relu(net.second(x)) * (1 + x[:, :4].abs().max().item()))


def weight_norm(make):
    return lambda *args, **options: parametrizations.weight_norm(make(*args, **options))


def backbone():
    return nn.Sequential(
        nn.Sequential(conv(1, 24), conv(24, 24, stride=2)),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10)),
    )


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 48)
        self.heads = nn.ModuleDict({"low": nn.Linear(48, 4), "high": nn.Linear(48, 6)})

    def forward(self, x):
        x = F.relu(self.hidden(x))
        return torch.cat([head(x) for head in self.heads.values()], dim=1)


def parameter(*shape):
    return lambda: nn.Parameter(torch.randn(*shape) * 0.2)


ARCHITECTURES = [
    Architecture("deep MLP", lambda: mlp(depth=6, width=48), flat),
    Architecture("MLP with BatchNorm", lambda: mlp(nn.BatchNorm1d), flat),
    Architecture("MLP with LayerNorm", lambda: mlp(nn.LayerNorm), flat),
    Architecture("MLP with RMSNorm", lambda: mlp(nn.RMSNorm), flat),
    Architecture("MLP with norms written by hand", lambda: mlp(ByHand), flat),
    Architecture(
        "a norm in the middle of a forward pass",
        functional(inline_norm, first=linear(64, WIDTH), second=linear(WIDTH, WIDTH), head=head(WIDTH)),
        flat,
    ),
    Architecture("MLP with dropout", lambda: mlp(lambda width: nn.Dropout(0.2), width=48), flat),
    Architecture(
        "MLP with PReLU, one slope and a slope a unit",
        lambda: nn.Sequential(
            *(nn.Linear(64, WIDTH), nn.PReLU(), nn.Linear(WIDTH, WIDTH), nn.PReLU(WIDTH), nn.Linear(WIDTH, 10))
        ),
        flat,
    ),
    Architecture(
        "lazy layers",
        lambda: nn.Sequential(nn.LazyLinear(48), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10)),
        flat,
    ),
    Architecture(
        "lazy convolutions",
        lambda: nn.Sequential(
            *(nn.LazyConv2d(24, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(WIDTH, 3, 2), nn.ReLU()),
            *(nn.Flatten(), nn.LazyLinear(10)),
        ),
    ),
    Architecture(
        "VGG", lambda: classify(conv(1, 24), conv(24, 24), nn.MaxPool2d(2), conv(24, WIDTH), nn.Dropout2d(0.1))
    ),
    Architecture("ResNet", resnet),
    Architecture("pre-activation ResNet with bottlenecks", preactivation),
    Architecture("DenseNet", densenet),
    Architecture("Inception", inception),
    Architecture("MobileNet (depthwise separable)", mobile),
    Architecture("grouped convolutions, channels shuffled", shuffled),
    Architecture("squeeze-and-excite", squeeze_excite),
    Architecture("U-Net, transposed convolutions", lambda: UNet(nn.ConvTranspose2d(WIDTH, 20, 2, 2))),
    Architecture("U-Net, bilinear upsampling", lambda: UNet(upsampling())),
    Architecture("ConvNeXt", convnext),
    Architecture("CNN with GroupNorm", lambda: normed_cnn(lambda width: nn.GroupNorm(4, width))),
    Architecture("CNN with InstanceNorm", lambda: normed_cnn(lambda width: nn.InstanceNorm2d(width, affine=True))),
    Architecture(
        "CNN with InstanceNorm, running statistics",
        lambda: normed_cnn(lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True)),
    ),
    Architecture(
        "1-D convolutions",
        lambda: nn.Sequential(
            *(nn.Conv1d(1, 24, 5, 2), nn.BatchNorm1d(24), nn.ReLU(), nn.Conv1d(24, WIDTH, 5, 2), nn.ReLU()),
            *(nn.AdaptiveMaxPool1d(4), nn.Flatten(), nn.Linear(4 * WIDTH, 10)),
        ),
        signal,
    ),
    Architecture(
        "3-D convolutions",
        lambda: nn.Sequential(
            *(nn.Conv3d(1, 24, 2), nn.BatchNorm3d(24), nn.ReLU(), nn.Conv3d(24, WIDTH, 2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(8 * WIDTH, 10)),
        ),
        volume,
    ),
    Architecture("padding by reflection, replication, wrapping", padded),
    Architecture(
        "pixel shuffle and unshuffle",
        functional(
            pixels, wide=lambda: nn.Conv2d(4, 96, 3, padding=1), last=lambda: nn.Conv2d(96, 48, 1), head=head(48)
        ),
    ),
    Architecture(
        "max unpooling",
        functional(
            unpooling,
            first=lambda: nn.Conv2d(1, 24, 3, padding=1),
            second=lambda: nn.Conv2d(24, WIDTH, 3),
            head=head(4 * WIDTH),
        ),
    ),
    Architecture("Transformer encoder, norm last", lambda: encoder(False), rows),
    Architecture("Transformer encoder, norm first", lambda: encoder(True), rows),
    Architecture("ViT", ViT, epochs=24),
    Architecture(
        "ViT, queries and keys normalised in each head",
        lambda: ViT(attend=lambda width: block(width, norm=nn.RMSNorm)),
        epochs=24,
    ),
    Architecture("Swin", swin),
    Architecture("MLP-Mixer", mixer, rows),
    Architecture(
        "nn.MultiheadAttention",
        functional(
            multihead,
            embed=linear(8, WIDTH),
            attention=lambda: nn.MultiheadAttention(WIDTH, 4, batch_first=True),
            feed=linear(),
            head=head(8 * WIDTH),
        ),
        rows,
    ),
    Architecture("Transformer decoder, tied embedding", Decoder, words),
    Architecture("causal Transformer, last token (GPT)", GPT, words, epochs=24),
    Architecture("rotary, grouped-query, SwiGLU, RMSNorm (LLaMA)", Llama, words, epochs=16),
    Architecture(
        "nn.Transformer with a learned query",
        functional(
            encoder_decoder,
            embed=lambda: nn.Sequential(nn.Linear(8, WIDTH), Position(8, WIDTH)),
            transformer=lambda: nn.Transformer(WIDTH, 4, 1, 1, 48, 0.0, batch_first=True),
            query=parameter(1, 4, WIDTH),
            head=head(4 * WIDTH),
        ),
        rows,
    ),
    Architecture(
        "attention pooling by a learned query",
        functional(
            query_pooling,
            embed=linear(8, WIDTH),
            position=lambda: Position(8, WIDTH),
            query=parameter(1, 4, WIDTH),
            keys=linear(),
            values=linear(WIDTH, 64),
            head=head(4 * 64),
        ),
        rows,
        epochs=24,
    ),
    Architecture(
        "Embedding",
        lambda: nn.Sequential(nn.Embedding(256, 24), nn.Flatten(), nn.Linear(384, 48), nn.ReLU(), nn.Linear(48, 10)),
        words,
    ),
    Architecture("LSTM", recurrent(nn.LSTM), rows),
    Architecture("GRU", recurrent(nn.GRU), rows),
    Architecture(
        "bidirectional LSTM of two layers",
        functional(
            lambda net, x: net.head(net.layer(x)[0].flatten(1)),
            layer=lambda: nn.LSTM(8, 24, 2, batch_first=True, bidirectional=True),
            head=head(8 * 48),
        ),
        rows,
    ),
    Architecture(
        "LSTMCell in a loop", functional(cells, cell=lambda: nn.LSTMCell(8, WIDTH), head=head()), rows, epochs=24
    ),
    Architecture(
        "gated dilated convolutions (WaveNet)",
        functional(
            wavenet,
            first=lambda: nn.Conv1d(8, WIDTH, 1),
            values=modules(2, lambda at: nn.Conv1d(WIDTH, 24, 3, dilation=2**at)),
            gates=modules(2, lambda at: nn.Conv1d(WIDTH, 24, 3, dilation=2**at)),
            mixers=modules(2, lambda at: nn.Conv1d(24, WIDTH, 1)),
            skips=modules(2, lambda at: nn.Conv1d(24, 40, 1)),
            head=head(160),
        ),
        rows,
    ),
    Architecture(
        "feature pyramid",
        functional(
            pyramid,
            first=lambda: nn.Conv2d(1, 24, 3),
            second=lambda: nn.Conv2d(24, WIDTH, 3, 2),
            low=lambda: nn.Conv2d(WIDTH, 48, 1),
            high=lambda: nn.Conv2d(24, 48, 1),
            head=head(96),
        ),
    ),
    Architecture("graph convolutions", functional(graph, first=linear(8), second=linear(), head=head(8 * WIDTH)), rows),
    Architecture(
        "weight_norm (parametrized)",
        lambda: nn.Sequential(
            *(weight_norm(nn.Conv2d)(1, 24, 3), nn.ReLU(), nn.Flatten()),
            *(weight_norm(nn.Linear)(864, 48), nn.ReLU(), nn.Linear(48, 10)),
        ),
    ),
    Architecture(
        "a layer used twice",
        functional(
            used_twice,
            first=linear(64, 48),
            layer=linear(48, 48),
            head=head(48),
        ),
        flat,
    ),
    Architecture(
        "weights tied to their transpose", functional(tied_autoencoder, layer=linear(64, 48), head=head(112)), flat
    ),
    Architecture("several heads (ModuleDict)", Heads, flat),
    Architecture(
        "two heads, their outputs added up",
        functional(
            lambda net, x: net.wide(F.relu(net.hidden(x))) + net.deep(x),
            hidden=linear(64, 48),
            wide=head(48),
            deep=linear(64, 10),
        ),
        flat,
    ),
    Architecture(
        "several inputs",
        functional(
            lambda net, x, y: net.head(F.relu(torch.cat([net.left(flat(x)), net.right(flat(y))], dim=1))),
            left=linear(64),
            right=linear(64, 24),
            head=head(WIDTH + 24),
        ),
        twice,
    ),
    Architecture("backbone that the first task keeps (exclude=)", backbone, exclude=("0",)),
    Architecture(
        "gated linear units",
        functional(lambda net, x: net.head(F.glu(net.first(x))), first=linear(64, 96), head=head(48)),
        flat,
    ),
    Architecture(
        "highway",
        functional(highway, first=linear(64, 48), gate=linear(48, 48), inner=linear(48, 48), head=head(48)),
        flat,
    ),
    Architecture(
        "maxout",
        functional(
            lambda net, x: net.head(net.first(x).unflatten(1, (48, 2)).amax(2)), first=linear(64, 96), head=head(48)
        ),
        flat,
    ),
    Architecture(
        "low-rank adapter",
        functional(
            low_rank,
            first=linear(64, 48),
            second=linear(48, 48),
            down=parameter(16, 48),
            up=parameter(48, 16),
            head=head(48),
        ),
        flat,
    ),
    Architecture(
        "bilinear layer",
        functional(
            lambda net, x: net.head(F.relu(net.both(F.relu(net.first(x)), x[:, :8]))),
            first=linear(64, 24),
            both=lambda: nn.Bilinear(24, 8, 48),
            head=head(48),
        ),
        flat,
    ),
    Architecture(
        "spectral_norm",
        lambda: nn.Sequential(
            *(parametrizations.spectral_norm(nn.Linear(64, 48)), nn.ReLU()),
            *(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)),
        ),
        flat,
    ),
    Architecture("efficient channel attention (ECA)", lambda: classify(conv(1, 24, stride=2), ECA(), conv(24, WIDTH))),
    Architecture(
        "global response normalisation",
        lambda: classify(conv(1, 24, stride=2), GRN(24), conv(24, WIDTH)),
    ),
    Architecture(
        "local response normalisation",
        lambda: classify(nn.Conv2d(1, 24, 3), nn.ReLU(), nn.LocalResponseNorm(3), conv(24, WIDTH)),
    ),
    Architecture(
        "features scaled to length one",
        functional(cosine, first=linear(64, 96), head=linear(96, 10, bias=False)),
        flat,
        refused="no layer to partition",
    ),
    Architecture(
        "weight standardisation",
        lambda: classify(conv(1, 24, stride=2), StandardisedConv(24, WIDTH, 3), nn.ReLU()),
        refused="claimed units of layer",
    ),
    Architecture(
        "graph network, messages added up",
        functional(messages, first=linear(1, 24), second=linear(24, 24), last=linear(96, 48), head=head(48)),
    ),
    Architecture(
        "a layer chosen by the input in Python",
        functional(branching, first=linear(64, 48), bright=linear(48, 48), dark=linear(48, 48), head=head(48)),
        flat,
        refused="reads the network's input into Python",
    ),
    Architecture(
        "an average that the forward pass keeps",
        functional(
            remembering,
            first=linear(64, 48),
            second=linear(48, 48),
            mean=lambda: nn.Buffer(torch.zeros(48)),
            head=head(48),
        ),
        flat,
        refused="writes 'network.net.mean' in the forward pass",
    ),
    Architecture(
        "a value read into Python",
        functional(reading, first=linear(64, 48), second=linear(48, 48), head=head(48)),
        flat,
        refused="reads values of units",
    ),
]

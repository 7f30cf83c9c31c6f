import networks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import build
from torch import nn
from torch.nn import functional

from lightning_cf.errors import ContinualError
from lightning_cf.network.output_heads import grow_head, head_of
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.output_view import OutputView

LOWEST = torch.finfo(torch.float32).min


@st.composite
def views(draw, width=5, columns=7):
    """Pairs (class, column): distinct classes, distinct columns."""
    size = draw(st.integers(1, width))
    classes = draw(st.permutations(range(width)))[:size]
    return list(zip(classes, draw(st.permutations(range(columns)))[:size], strict=True))


def head():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 7)


@given(views())
def test_classes_show_their_columns_and_the_rest_the_lowest_number(pairs):
    layer, x = head(), torch.randn(4, 3)
    plain = layer(x)
    with OutputView(layer, width=5, views=[pairs]):
        shown = layer(x)
    assert shown.shape == (4, 5)
    for label in range(5):
        expected = plain[:, dict(pairs)[label]] if label in dict(pairs) else torch.full((4,), LOWEST)
        assert torch.equal(shown[:, label], expected)


@given(st.lists(views(), min_size=1, max_size=3), st.data())
def test_each_sample_may_have_a_view_of_its_own(several, data):
    layer, x = head(), torch.randn(6, 3)
    chosen = data.draw(st.lists(st.integers(0, len(several) - 1), min_size=6, max_size=6))
    with OutputView(layer, width=5, views=several) as view:
        view.mix(torch.tensor(chosen))
        shown = layer(x)
    for sample, number in enumerate(chosen):
        with OutputView(layer, width=5, views=[several[number]]):
            torch.testing.assert_close(shown[sample], layer(x)[sample])


@given(views(), st.data())
def test_cross_entropy_over_the_view_is_that_over_the_own_columns(pairs, data):
    layer, x = head(), torch.randn(4, 3, requires_grad=True)
    positions = torch.tensor(data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=4, max_size=4)))
    labels, columns = (torch.tensor(part) for part in zip(*pairs, strict=True))
    with OutputView(layer, width=5, views=[pairs]):
        loss = functional.cross_entropy(layer(x), labels[positions])
    own = functional.cross_entropy(layer(x)[:, columns], positions)
    torch.testing.assert_close(loss, own)
    for a, b in zip(*(torch.autograd.grad(value, [x, *layer.parameters()]) for value in (loss, own)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masked_outputs_are_finite_in_every_precision(dtype):
    layer = head().to(dtype)
    with OutputView(layer, width=5, views=[[(0, 0)]]):
        shown = layer(torch.ones(1, 3, dtype=dtype))
    assert shown.dtype == dtype
    assert shown[0, 1] == torch.finfo(dtype).min
    assert functional.log_softmax(shown.float(), dim=1)[0, 0] == 0


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_columns_of_a_convolution_are_its_channels(dims):
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](2, 4, 1)
    x = torch.randn(3, 2, *[5] * dims)
    plain = layer(x)
    with OutputView(layer, width=3, views=[[(0, 3), (2, 1)], [(1, 0)]]) as view:
        shown = layer(x)
        assert torch.equal(shown[:, 0], plain[:, 3])
        assert torch.equal(shown[:, 2], plain[:, 1])
        assert (shown[:, 1] == LOWEST).all()
        view.mix(torch.tensor([0, 1, 0]))
        mixed = layer(x)
    assert torch.equal(mixed[[0, 2]], shown[[0, 2]])
    assert torch.equal(mixed[1, 1], plain[1, 0])
    assert (mixed[1, [0, 2]] == LOWEST).all()


def test_columns_of_a_linear_layer_lie_on_the_last_axis():
    layer, x = head(), torch.randn(2, 5, 3)
    with OutputView(layer, width=2, views=[[(0, 6), (1, 2)], [(1, 1)]]) as view:
        assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias)[..., [6, 2]])
        view.mix(torch.tensor([0, 1]))
        assert (layer(x)[1, :, 0] == LOWEST).all()


def test_the_view_ends_with_its_block_and_with_an_exception():
    layer, x = head(), torch.ones(1, 3)
    with pytest.raises(KeyError), OutputView(layer, width=2, views=[[(0, 0)]]):
        raise KeyError
    assert layer(x).shape == (1, 7)
    assert not layer._forward_hooks


# The head itself


@pytest.mark.parametrize(("make", "kind"), [(networks.mlp, nn.Linear), (networks.conv_head, nn.Conv2d)])
def test_the_head_is_found(make, kind):
    network, example = build(make)
    layer = head_of(network, trace(network, example))
    assert isinstance(layer, kind)
    assert layer is list(network.children())[-1]


def test_other_heads_are_refused():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.ConvTranspose2d(2, 3, 1))
    with pytest.raises(ContinualError, match=r"head '2' is a ConvTranspose2d; .*MaskedGradientCallback\(mask_outputs="):
        head_of(network, trace(network, torch.ones(1, 1, 2, 2)))


def test_a_head_without_a_module_is_refused():
    network = networks.BareHead()
    with pytest.raises(ContinualError, match=r"is a parameter of no layer; .* need a Linear or a convolution\."):
        head_of(network, trace(network, networks.flat()))


HEADS = {
    "linear": lambda: nn.Linear(3, 4),
    "linear without bias": lambda: nn.Linear(3, 4, bias=False),
    "double": lambda: nn.Linear(3, 4).double(),
    "frozen": lambda: nn.Linear(3, 4).requires_grad_(False),
    "conv1d": lambda: nn.Conv1d(3, 4, 3),
    "conv2d": lambda: nn.Conv2d(3, 4, (1, 3), stride=2, padding=1, dilation=2),
    "conv3d without bias": lambda: nn.Conv3d(3, 4, 1, bias=False),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_grown_head_keeps_its_rows_bitwise(kind):
    layer = HEADS[kind]()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    grow_head(layer, 6)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter[:4], before[name])
        assert len(parameter) == 6
        assert (parameter[4:] != 0).any()
        assert parameter.dtype == before[name].dtype
        assert parameter.requires_grad == (kind != "frozen")
    assert set(before) == set(layer.state_dict())


def test_a_grown_head_computes_the_new_columns_too():
    layer, x = nn.Conv2d(2, 4, 3, padding=1), torch.randn(2, 2, 5, 5)
    before = layer(x)
    grow_head(layer, 7)
    assert (layer.out_channels, layer(x).shape) == (7, (2, 7, 5, 5))
    torch.testing.assert_close(layer(x)[:, :4], before)
    linear = nn.Linear(3, 2)
    grow_head(linear, 3)
    assert linear.out_features == 3


def test_a_grouped_head_is_not_grown():
    layer = nn.Conv1d(2, 4, 1, groups=2)
    with pytest.raises(ContinualError, match="group"):
        grow_head(layer, 6)
    assert layer.out_channels == 4


@pytest.mark.parametrize("columns", [4, 3])
def test_a_head_never_shrinks(columns):
    layer = nn.Linear(3, 4)
    weight = layer.weight
    grow_head(layer, columns)
    assert layer.weight is weight

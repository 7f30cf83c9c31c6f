import random
import warnings
from contextlib import nullcontext

import networks
import numpy as np
import pytest
import torch
from learning import fit, tasks, three
from networks import NETWORKS, Wired, build
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn import functional as F

from lightning_cf import Classifier
from lightning_cf.errors import StructureError, StructureWarning
from lightning_cf.exactness.check import check_exact, trainable_share
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.ledger import NeuronLedger


def check(network, example, whole=()):
    structure = trace(network, example)
    ledger = NeuronLedger.for_structure(structure)
    ledger.whole = list(whole)
    check_exact(network, structure, ledger, example)


@pytest.mark.parametrize("make", NETWORKS)
def test_networks_that_keep_units_apart_pass_and_stay_as_they_were(make):
    network, example = build(make)
    before = {name: tensor.clone() for name, tensor in named_tensors(network).items()}
    check(network, example)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(network).items())


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / std, self.bias)


def standardised_network():
    convs = nn.Conv2d(3, 8, 3), nn.ReLU(), StandardisedConv(8, 8, 3), nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def test_weights_that_refill_their_zeros_are_refused():
    message = (
        r"claimed units of layer '2' \(StandardisedConv\) change .* until 'aten\.div' in module '2' changes"
        r" '2\.weight'\. Use isolation='perturb', or exclude=\['2'\]"
    )
    with pytest.raises(StructureError, match=message):
        check(standardised_network(), networks.image())


def test_nothing_is_refused_where_the_first_task_owns_the_layers():
    check(standardised_network(), networks.image(), whole=("0", "2"))


def reader(net, x):
    return net.head(net.second(x) * net.first(x)[0, 0].item())


def reading_network():
    return Wired(reader, first=nn.Linear(6, 5), second=nn.Linear(6, 4), head=nn.Linear(4, 3))


def test_values_read_into_python_are_refused_by_module_and_operation():
    network = nn.Sequential(nn.Identity(), reading_network())
    message = (
        r"module '1' reads values of units of '1\.first' into Python \('aten\._local_scalar_dense'.*"
        r"isolation='perturb', or exclude=\['1\.first'\]"
    )
    with pytest.raises(StructureError, match=message):
        check(network, networks.flat())


def test_values_read_from_layers_of_the_first_task_are_fine():
    check(reading_network(), networks.flat(), whole=("first",))


def test_a_tensor_that_left_the_networks_sight_is_found_by_trying():
    def wire(net, x):
        return net.head(torch.from_numpy(np.from_dlpack(net.first(x).detach()).copy()))

    with pytest.raises(StructureError, match="cannot hold"):
        check(Wired(wire, first=nn.Linear(6, 5), head=nn.Linear(5, 3)), networks.flat())


def test_a_layer_of_which_one_unit_is_left_is_warned_of():
    network = nn.Sequential(nn.Linear(6, 5), nn.Softmax(1), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    message = r"'aten\._softmax' in module '1' mixes units: 5 units of '0' share one fate\. Of '0' one unit is left"
    with pytest.warns(StructureWarning, match=message):
        check(network, networks.flat())


def test_an_operation_without_a_rule_is_warned_of():
    def wire(net, x):
        first = net.first(x)[:, None]
        return net.head(torch.cat([torch.cdist(first[..., :2], first[..., 2:4]), first], dim=2).flatten(1))

    network = Wired(wire, first=nn.Linear(6, 8), head=nn.Linear(9, 3))
    with pytest.warns(StructureWarning, match=r"'aten\._cdist_forward' .* cannot be followed: 2 units of 'first'"):
        check(network, networks.flat())


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: nn.functional.dropout(x, 0.5, True),
        lambda x: x * random.random(),
        lambda x: x * np.random.rand(),
        lambda x: x + torch.from_numpy(np.random.randn(*x.shape)).float(),
    ],
    ids=["torch", "python", "numpy", "noise"],
)
def test_a_network_that_draws_random_numbers_is_no_leak(draw):
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    network[1].register_forward_hook(lambda layer, inputs, output: draw(output))
    check(network, networks.flat())


@pytest.mark.filterwarnings("ignore::lightning_cf.errors.StructureWarning")
@pytest.mark.parametrize(
    ("decide", "operation"),
    [
        (lambda z: bool((z.detach().numpy() > 2).any()), r"Tensor\.numpy"),
        (lambda z: max(z.flatten().tolist()) > 2, r"Tensor\.tolist"),
        (lambda z: len(torch.nonzero(z > 2)) > 0, r"aten\.nonzero"),
        (lambda z: z.masked_select(z > 2).numel() > 0, r"aten\.masked_select"),
        (lambda z: len(z[z > 2]) > 0, r"aten\.index"),
        (lambda z: len(z.unique()) > 99, r"aten\._unique2"),
    ],
    ids=["numpy", "tolist", "nonzero", "masked_select", "index", "unique"],
)
def test_values_that_reach_python_in_other_ways_are_refused_too(decide, operation):
    def wire(net, x):
        z = net.first(x).relu()
        return net.head(net.second(z if decide(z) else 2 * z).relu())

    network = Wired(wire, first=nn.Linear(6, 5), second=nn.Linear(5, 4), head=nn.Linear(4, 3))
    with pytest.raises(StructureError, match=rf"reads values of units of 'first' into Python \('{operation}'"):
        check(network, torch.randn(4, 6))


READERS = {
    "item": lambda z: z.detach().norm().item(),
    "float": lambda z: float(z.detach().mean()),
    "numpy": lambda z: z.detach().cpu().numpy().sum(),
    "tolist": lambda z: sum(z.detach().flatten().tolist()),
    "asarray": lambda z: np.asarray(z.detach()).max(),
    "if": lambda z: 1 if z.sum() > 0 else 2,
}


@pytest.mark.filterwarnings("ignore::lightning_cf.errors.StructureWarning")
@pytest.mark.parametrize("read", READERS)
def test_values_that_are_only_looked_at_bind_nothing(read):
    """As for a log, or importances that a model keeps of its last batch."""

    class Looks(Wired):
        seen = None

    def wire(net, x):
        z = net.first(x).relu()
        net.seen = READERS[read](z)
        return net.head(net.second(z).relu())

    network = Looks(wire, first=nn.Linear(6, 5), second=nn.Linear(5, 4), head=nn.Linear(4, 3)).eval()
    with pytest.warns(StructureWarning, match="every output stayed the same"):
        check(network, torch.randn(4, 6))


@pytest.mark.filterwarnings("ignore::lightning_cf.errors.StructureWarning")
@pytest.mark.parametrize(
    "decide",
    [
        lambda z, read: z * 2 if read > 1e4 else z,  # no sample of the batch gets there
        lambda z, read: z * 2 if read < -1e4 else z,
        lambda z, read: z + 0 * read,
        lambda z, read: z[:, : 4 - int(read > 1e5)],
        lambda z, read: torch.tensor([float(read)]) + z,
    ],
)
def test_values_that_decide_for_other_numbers_are_refused(decide):
    def wire(net, x):
        z = net.first(x).relu()
        return net.head(decide(net.second(z), z.detach().sum().item()))

    network = Wired(wire, first=nn.Linear(6, 5), second=nn.Linear(5, 4), head=nn.Linear(4, 3))
    with pytest.raises(StructureError, match="reads values of units of 'first' into Python"):
        check(network, torch.randn(4, 6))


def test_a_mask_of_the_input_reads_nothing():
    def wire(net, x):
        z = net.first(x).relu()
        return net.head(z + torch.zeros_like(z).index_put((x[:, 0] > 0,), net.second(z[x[:, 0] > 0])))

    network = Wired(wire, first=nn.Linear(6, 5), second=nn.Linear(5, 5), head=nn.Linear(5, 3))
    assert not trace(network, torch.randn(4, 6)).reads


def test_experts_without_a_token_are_traced():
    def wire(net, x):
        z, chosen = net.first(x).relu(), torch.zeros(len(x), dtype=torch.long)
        out = torch.zeros_like(z)
        for number, expert in enumerate(net.experts):
            where = torch.where(chosen == number)[0]
            out = out.index_add(0, where, expert(z[where]))
        return net.head(out)

    experts = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
    network = Wired(wire, first=nn.Linear(6, 5), experts=experts, head=nn.Linear(5, 3))
    assert {"experts.0.weight", "experts.1.weight"} <= set(trace(network, torch.randn(4, 6)).entries)


@pytest.mark.parametrize(
    ("mix", "leaks"), [(lambda g: g, False), (lambda g: g + g.flip(0), True)], ids=["plain", "mixed"]
)
def test_complex_parameters_are_probed_too(mix, leaks):
    def wire(net, x):
        return net.head((net.first(x) * mix(net.gains)).real.relu())

    gains = nn.Parameter(torch.randn(6, dtype=torch.cfloat))
    network = Wired(wire, first=nn.Linear(6, 6), gains=gains, head=nn.Linear(6, 3))
    if leaks:
        with pytest.raises(StructureError, match="isolation='exact' cannot hold"):
            check(network, torch.randn(4, 6))
    else:
        check(network, torch.randn(4, 6))


def test_a_refusal_names_a_weight_of_no_layer_and_its_operation():
    def wire(net, x):
        return net.head(torch.nn.functional.linear(net.first(x).relu(), net.weight.exp()).relu())

    network = Wired(wire, first=nn.Linear(6, 5), weight=nn.Parameter(torch.randn(5, 5)), head=nn.Linear(5, 3))
    message = r"'aten\.exp' in module 'forward' changes 'weight'.* exclude=\['first', 'weight'\]"
    with pytest.raises(StructureError, match=message):
        check(network, torch.randn(4, 6))


def test_a_layer_that_the_input_chooses_and_that_did_not_run_is_refused():
    def wire(net, x):
        z = net.first(x).relu()
        return net.head((net.a if x[0, 0] < 5 else net.b)(z))

    network = Wired(wire, first=nn.Linear(6, 5), a=nn.Linear(5, 5), b=nn.Linear(5, 5), head=nn.Linear(5, 3))
    message = (
        r"module 'forward' reads the network's input into Python \('aten\._local_scalar_dense'.*'b' did not run"
        r".*isolation='perturb'"
    )
    with pytest.raises(StructureError, match=message):
        check(network, torch.randn(16, 6))


def test_a_number_of_the_input_that_is_only_looked_at_leaves_a_layer_that_never_runs_alone():
    class Looked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.spare, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            self.largest = x.max().item()  # to be shown in a report
            return self.c(self.a(x).relu())

    with pytest.warns(StructureWarning, match=r"every output stayed the same, and 'spare' did not run either"):
        check(Looked(), torch.randn(6, 4))


@pytest.mark.parametrize("kind", [2, 7, 16])
def test_a_number_of_the_input_that_names_a_kind_decides(kind):
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.other, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            first = self.other if int(x[0, -1]) == kind else self.a
            return self.c(first(x).relu())

    with pytest.raises(StructureError, match="'other' did not run for the samples"):
        check(Kinds(), torch.zeros(6, 4))


def test_another_way_through_the_layers_that_a_later_sample_takes_is_refused():
    def wire(net, x):
        z = net.first(x).relu()
        return net.head(net.b(net.a(z).relu()) if x[0, 0] < 5 else net.a(net.b(z).relu()))

    network = Wired(wire, first=nn.Linear(6, 5), a=nn.Linear(5, 5), b=nn.Linear(5, 5), head=nn.Linear(5, 3))
    x = torch.randn(16, 6)
    x[10, 0] = 9
    with pytest.raises(StructureError, match=r"samples 10 and 11 of the first batch go another way"):
        check(network, x)


def silent(network, example):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(network, example)


def two_layers(wire):
    return Wired(wire, first=nn.Linear(6, 5), a=nn.Linear(5, 5), b=nn.Linear(5, 5), head=nn.Linear(5, 3))


def test_a_look_at_the_input_that_raises_or_goes_the_same_way_is_no_matter():
    def wire(net, x):
        some = x[x[:, 0] > -9]  # a shape that the input decides, before the value that is read
        if bool(some.isnan().any()):
            raise ValueError
        mask = None if (x > -9).all() else x > -9  # as attention masks are left out where they mask nothing
        z = net.a(net.first(x).relu())
        return net.head(net.b(z if mask is None else z.masked_fill(~mask[:, :5], 0.0)))

    silent(two_layers(wire), torch.randn(20, 6))


def test_an_if_on_the_input_that_leads_another_way_is_warned_of_though_no_sample_took_it():
    def wire(net, x):
        z = net.first(x).relu()
        return net.head(net.b(net.a(z).relu()) if x.max() < 99 else net.a(net.b(z).relu()))

    with pytest.warns(
        StructureWarning, match=r"16 samples took the same way .* where it decides otherwise.*torch\.where"
    ):
        check(two_layers(wire), torch.randn(20, 6))


def test_a_number_read_from_the_input_is_warned_of_with_what_to_do():
    def wire(net, x):
        scale = 2.0 if x.abs().max().item() < 99 else 1.0
        return net.head(scale * net.first(x).relu())

    with pytest.warns(
        StructureWarning, match=r"16 samples took the same way .*an if on a tensor .* is followed both ways"
    ):
        check(Wired(wire, first=nn.Linear(6, 5), head=nn.Linear(5, 3)), torch.randn(20, 6))


# What later tasks can train


class Interpolating(nn.Module):
    """A block of a forecaster that resizes over its features."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return nn.functional.interpolate(self.layer(x)[:, None], scale_factor=0.5, mode="linear")[:, 0].repeat(1, 2)


def forecaster():
    return nn.Sequential(
        nn.Linear(6, 8), Interpolating(8), Interpolating(8), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3)
    )


def parts(network, example):
    structure = trace(network, example)
    ledger = NeuronLedger.for_structure(structure)
    ledger.whole = [group.name for group in structure.groups if group.size == 1]
    return structure, ledger


def test_the_share_that_later_tasks_can_train_is_counted():
    network, x = forecaster(), torch.randn(4, 6)
    free = (6 + 1) * 8 + (8 + 1) * 10 + (10 + 1) * 3  # the first and the last hidden layer, and the outputs
    share = free / sum(p.numel() for p in network.parameters())
    assert trainable_share(network, *parts(network, x)) == pytest.approx(share)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert trainable_share(plain, *parts(plain, x)) == 1.0
    plain[0].weight.requires_grad_(False)  # trained by nobody
    assert trainable_share(plain, *parts(plain, x)) == 1.0


def test_it_is_said_once_where_operations_mix_units():
    network, x = forecaster(), torch.randn(4, 6)
    structure, ledger = parts(network, x)
    said = set()
    with pytest.warns(StructureWarning) as found:
        check_exact(network, structure, ledger, x, said=said)
    (message,) = (str(warning.message) for warning in found)
    assert message.startswith(
        f"Later tasks can train {trainable_share(network, structure, ledger):.1%} of the parameters."
    )
    assert "'aten.upsample_linear1d' in module '1' mixes units" in message and "isolation='perturb'" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_exact(network, structure, ledger, x, said=said)


def test_less_than_min_trainable_is_refused():
    network, x = forecaster(), torch.randn(4, 6)
    with pytest.raises(StructureError, match=r"can train 55\.4% .* less than min_trainable=0\.6.*upsample_linear1d"):
        check_exact(network, *parts(network, x), x, least=0.6)
    with pytest.warns(StructureWarning):
        check_exact(network, *parts(network, x), x, least=0.5)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    structure, ledger = parts(plain, x)
    ledger.whole = ["0", "2"]
    with pytest.raises(StructureError, match="exclude= leave to the first task"):
        check_exact(plain, structure, ledger, x, least=0.5)


def test_through_the_callbacks_it_is_said_once_over_several_fits():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Interpolating(8), nn.Linear(8, 10), nn.ReLU())
            self.head = nn.Linear(10, 10)

        def forward(self, x):
            return self.head(self.body(x))

    module = Classifier(Net(), cosine=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):  # LEARN and INVARIANCE in fits of their own
            fit(module, tasks()[0], three(after=1.0), epochs=1)
    assert sum(isinstance(warning.message, StructureWarning) for warning in found) == 1
    with pytest.raises(StructureError, match=r"min_trainable=0\.95"):
        fit(Classifier(Net(), cosine=False), tasks()[0], three(min_trainable=0.95), epochs=1)


@pytest.mark.parametrize(
    ("write", "operation"),
    [
        (lambda net, z: net.mean.mul_(0.9).add_(0.1 * z.mean(0)), "aten.add_"),
        (lambda net, z: setattr(net, "mean", 0.9 * net.mean + 0.1 * z.mean(0)), "aten.add"),
    ],
    ids=["in place", "anew"],
)
def test_state_that_the_forward_pass_writes_is_refused_by_operation_and_put_back(write, operation):
    def wire(net, x):
        z = net.first(x).relu()
        write(net, z)
        return net.head(z - net.mean)

    mean = nn.Buffer(torch.zeros(5))
    network = Wired(wire, first=nn.Linear(6, 5), mean=mean, head=nn.Linear(5, 3))
    with pytest.raises(StructureError, match=rf"'{operation}' in module 'forward' writes 'mean'.*isolation='perturb'"):
        check(network, torch.randn(16, 6))
    assert network.mean is mean and not mean.any()


class Keeps(nn.Module):
    """Carries its state over to the next batch of the same size."""

    def __init__(self):
        super().__init__()
        self.cell, self.head, self.state = nn.GRUCell(6, 5), nn.Linear(5, 3), None

    def forward(self, x):
        self.state = self.cell(x, self.state if self.state is not None and len(self.state) == len(x) else None).detach()
        return self.head(self.state)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head, self.generator = nn.Linear(6, 5), nn.Linear(5, 3), torch.Generator()

    def forward(self, x):
        return self.head(self.first(x + 0.01 * torch.randn(x.shape, generator=self.generator)))


def quantised():
    return FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8)


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (Keeps, r"module 'forward': it keeps a state"),
        (Noisy, r"module 'forward': it keeps a state between passes, draws from a generator of its own"),
        (lambda: nn.Sequential(Noisy(), nn.ReLU(), nn.Linear(3, 3)), r"module '0': it keeps"),
        # Which takes its first batch as it is, so that a second pass over that alone would show nothing.
        (
            lambda: nn.Sequential(quantised(), nn.Linear(6, 3)),
            r"module '0': 'aten\.copy_' in module '0\..*' writes '0\.",
        ),
        (lambda: nn.Sequential(nn.Linear(6, 5), quantised(), nn.Linear(5, 3)), r"module '1': 'aten\.copy_'"),
    ],
    ids=["state", "generator", "generator within", "quantised", "quantised units"],
)
def test_other_outputs_for_the_same_input_are_refused_with_that_reason(make, place):
    network = make()
    before = {name: tensor.clone() for name, tensor in named_tensors(network).items()}
    message = rf"in eval mode \w+ gives other outputs for the same input and the same weights, first in {place}"
    with pytest.raises(StructureError, match=message + r".*isolation='perturb'\.$"):
        check(network, torch.randn(16, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(network).items())


@pytest.mark.filterwarnings("ignore:.*no claim within the budget")
@pytest.mark.parametrize("isolation", ["exact", "perturb"])
def test_quantisation_aware_training_is_refused_before_the_first_step_and_may_be_perturbed(isolation):
    layers = nn.Linear(64, 16), nn.ReLU(), quantised(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
    module = Classifier(nn.Sequential(nn.Flatten(), quantised(), *layers))
    before = [p.clone() for p in module.parameters()]
    refused = pytest.raises(StructureError, match="gives other outputs") if isolation == "exact" else nullcontext()
    with refused:
        fit(module, tasks()[0], three(isolation=isolation), epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True)) is (isolation == "exact")


def test_a_counter_in_the_forward_pass_is_no_leak():
    def wire(net, x):
        net.calls += 1
        return net.head(net.first(x).relu())

    check(
        Wired(wire, first=nn.Linear(6, 5), calls=nn.Buffer(torch.zeros(())), head=nn.Linear(5, 3)), torch.randn(16, 6)
    )


@pytest.mark.parametrize(
    ("wire", "operation"),
    [
        (
            lambda net, x: net.head(net.layer(torch.from_numpy(np.from_dlpack(net.first(x).detach()).copy()))),
            r"'aten\.addmm' in module 'layer'",
        ),
        (lambda net, x: net.head(net.layer(net.first(x)) * (net.gain + net.gain.flip(0))), r"'aten\.mul' in module 'f"),
        (
            lambda net, x: net.head(
                nn.functional.linear(net.first(x), net.layer.weight - net.layer.weight.mean(1)[:, None])
            ),
            r"'aten\.mm' in module 'forward'",
        ),
    ],
    ids=["past the tracer", "a parameter and its mirror image", "rows less their mean"],
)
def test_what_trying_finds_is_named_by_operation(wire, operation):
    network = Wired(
        wire,
        first=nn.Linear(6, 6),
        layer=nn.Linear(6, 6, bias=True),
        gain=nn.Parameter(torch.randn(6)),
        head=nn.Linear(6, 3),
    )
    with pytest.raises(StructureError, match=rf"first in the results of {operation}.*isolation='perturb', or exclude"):
        check(network, torch.randn(4, 6))


@pytest.mark.parametrize(
    "how", [lambda x: F.one_hot(x, 10), lambda x: F.one_hot(x, num_classes=10)], ids=["place", "name"]
)
def test_what_one_hot_looks_at_of_its_input_decides_nothing(how):
    """It looks whether the numbers are those of classes; without their count they decide how many there are."""
    layers = {"first": nn.Linear(10, 8), "head": nn.Linear(8, 3)}
    x = torch.randint(0, 10, (16, 5))
    net = Wired(lambda net, x: net.head(torch.relu(net.first(how(x).float().mean(1)))), **layers)
    assert trace(net, x).branches == ()
    net = Wired(lambda net, x: net.head(torch.relu(net.first(F.one_hot(x).float()[..., :10].mean(1)))), **layers)
    assert trace(net, torch.arange(10).expand(16, 10)).branches

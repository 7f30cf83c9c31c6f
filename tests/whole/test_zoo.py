"""Exactness on many networks that nobody tuned by hand: random weights, a random half of the units owned."""

import zlib

import architecture_table
import pytest
import torch
import zoo
from architectures import ARCHITECTURES
from halves import cut, half_owned
from torch.func import functional_call

from lightning_cf.errors import StructureError
from lightning_cf.exactness.check import check_exact
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE
from lightning_cf.ownership.owner_aware_norms import make_owner_aware

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_cf.errors.StructureWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]


def exactness(network, example, draws):
    """How far owned outputs move when everything free does, relative to their size; None where that is refused."""
    inputs = example if isinstance(example, tuple) else (example,)
    try:
        structure = trace(network, example)
        ledger = NeuronLedger.for_structure(structure)
        ledger.whole = [group.name for group in structure.groups if group.size == 1]
        check_exact(network, structure, ledger, example)
    except StructureError:
        return None
    worst = 0.0
    for seed in range(draws):
        ledger = half_owned(structure, seed)
        columns = torch.arange(len(ledger.outputs))
        ledger.outputs = torch.where(columns % 2 == 0, FREE, columns // 2 % 2)
        owner, owned = ledger.owner_of_units(structure), ledger.outputs >= 0
        tensors = cut(network, structure, ledger)
        make_owner_aware(network, ledger.norm_owners())
        with torch.no_grad():
            before = functional_call(network, tensors, inputs)
            after = functional_call(network, shaken(structure, tensors, owner == FREE, seed), inputs)
        make_owner_aware(network, {})
        assert before.isfinite().all()
        assert not torch.equal(after[:, ~owned], before[:, ~owned])
        difference = (after - before)[:, owned].abs().max() / before[:, owned].abs().max()
        worst = max(worst, float(difference))
    return worst


def shaken(structure, tensors, free, seed):
    """Other weights of a usual size in all entries that are free wherever they are used."""
    generator, result = torch.Generator().manual_seed(seed), dict(tensors)
    for name, uses in structure.entries.items():
        tensor = tensors[name]
        if not tensor.is_floating_point():
            continue
        movable = torch.ones(tensor.shape, dtype=torch.bool)
        for use in uses:
            movable &= torch.cat([free, torch.tensor([False])])[use.target].expand(movable.shape)
        size = max(1, tensor[0].numel()) ** -0.5 if tensor.ndim > 1 else 0.3
        noise = size * torch.randn(tensor.shape, generator=generator)
        if uses[0].role in ("scale", "statistic"):
            noise = noise.abs() + 0.5
        result[name] = torch.where(movable, noise, tensor)
    return result


def check(name, network, example, refused, draws):
    found = exactness(network, example, draws)
    assert (found is None) == refused, name
    assert found is None or found == 0.0, name


@pytest.mark.parametrize("name", [architecture.name for architecture in ARCHITECTURES])
def test_what_is_owned_stays_bitwise_on_every_architecture(name):
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        network, images = architecture.build(), torch.randn(4, 1, 8, 8)
        example = architecture.inputs(images)
        with torch.no_grad():
            network(*example) if isinstance(example, tuple) else network(example)  # lazy layers
        for module in network.modules():
            zoo.redraw(module)
    refused = architecture.refused is not None and "no layer to partition" not in architecture.refused
    check(name, network.eval(), example, refused, draws=3)


TIMM = zoo.configs() if zoo.available() else []


@pytest.mark.skipif(not zoo.available(), reason="timm is not installed")
@pytest.mark.parametrize(
    "name",
    [pytest.param(c.name, marks=[] if c.quick else [pytest.mark.slow]) for c in TIMM],
)
def test_what_is_owned_stays_bitwise_on_networks_of_timm(name):
    config = next(c for c in TIMM if c.name == name)
    check(name, *zoo.build(config), name in zoo.REFUSED, draws=1)


def test_the_documentation_counts_them():
    text = " ".join(architecture_table.PATH.read_text().split())
    refused = sum(1 for a in ARCHITECTURES if a.refused and "no layer to partition" not in a.refused)
    count = len(ARCHITECTURES)
    assert (
        f"Of {count} networks of this table, three draws each, {count - refused} are bitwise exact and {refused} are"
        in text
    )
    if zoo.available():
        count, refused = len(TIMM), len(zoo.REFUSED)
        assert f"of {count} networks of the timm library" in text
        assert f"{count - refused} are bitwise exact and {refused} are refused" in text

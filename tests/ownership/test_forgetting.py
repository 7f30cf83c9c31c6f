"""Which units of a task that leaves are needed: those that lead, by entries that are not zero, to a later task."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import NO_UNIT
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.forgetting import take_out
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.levels import FREE

SIZES, TASKS = (4, 6, 5, 8), 4


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def owned(owners):
    """A network whose units belong to tasks, each of which has two outputs; nothing reads what came later."""
    net = network()
    structure = trace(net, torch.randn(3, SIZES[0]))
    ledger = NeuronLedger.for_structure(structure)
    for number in range(TASKS):
        ledger.begin(f"t{number}", outputs=[2 * number, 2 * number + 1])
        ledger.seal()
    given = iter(owners)
    for name, owner in ledger.owners.items():
        ledger.owners[name] = torch.tensor([next(given) for _ in owner])
    return net, structure, ledger


def edges(structure, tensors, owner):
    """Pairs of units of which the second reads the first."""
    found = set()
    for name, tensor in tensors.items():
        for use in structure.entries.get(name, ()):
            source, target = (x.expand(tensor.shape).flatten().tolist() for x in (use.source, use.target))
            values = tensor.detach().flatten().tolist()
            found |= {(s, t) for s, t, v in zip(source, target, values, strict=True) if v and NO_UNIT not in (s, t)}
    return {(s, t) for s, t in found if owner[t] != FREE and owner[s] != FREE and owner[s] <= owner[t]}


def leads_to_later(unit, pairs, owner, gone, number):
    """Plain search: from unit to unit, through those of tasks that are gone."""
    seen, open_ = set(), [unit]
    while open_:
        now = open_.pop()
        for source, target in pairs:
            if source == now and target not in seen:
                if owner[target] not in gone:
                    return True
                seen.add(target)
                open_.append(target)
    return False


@given(
    st.lists(st.integers(-1, TASKS - 1), min_size=11, max_size=11),
    st.lists(st.booleans(), min_size=24 + 30 + 40, max_size=24 + 30 + 40),
    st.permutations(range(TASKS)),
)
def test_what_stays_is_what_a_plain_search_finds(owners, kept, order):
    net, structure, ledger = owned(owners)
    mask = iter(kept)
    with torch.no_grad():
        for layer in (net[0], net[2], net[4]):
            layer.weight *= torch.tensor([next(mask) for _ in range(layer.weight.numel())]).view_as(layer.weight)
        for name, uses in structure.entries.items():
            net.get_parameter(name)[ledger.cut(structure, uses).expand(net.get_parameter(name).shape)] = 0.0
    tensors, gone = named_tensors(net), set()
    for number in order[:-1]:
        gone.add(number)
        owner = ledger.owner_of_units(structure).tolist()
        pairs = edges(structure, tensors, owner)
        hidden = range(sum(SIZES[1:-1]))
        loose = [unit for unit in hidden if owner[unit] in gone]
        needed = {unit for unit in loose if leads_to_later(unit, pairs, owner, gone, number)}
        freed = take_out(ledger, structure, f"t{number}", tensors)
        after = ledger.owner_of_units(structure).tolist()
        assert {unit for unit in loose if after[unit] != FREE} == needed
        assert all(after[unit] == owner[unit] for unit in hidden if unit not in loose)
        assert sum(freed.values()) == len(loose) - len(needed)
        assert f"t{number}" not in ledger.reserved
    take_out(ledger, structure, f"t{order[-1]}", tensors)
    assert ledger.tasks == []
    assert set(ledger.owner_of_units(structure).tolist()) == {FREE}


def test_a_norm_by_owners_keeps_what_it_takes_into_account():
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 4))
    structure = trace(net, torch.randn(3, 4))
    ledger = NeuronLedger.for_structure(structure)
    for number in range(2):
        ledger.begin(f"t{number}", outputs=[2 * number, 2 * number + 1])
        ledger.seal()
    (name,) = ledger.owners
    ledger.owners[name] = torch.tensor([0, 0, 0, 1, 1, -1])
    with torch.no_grad():
        net[3].weight.zero_()
    before = ledger.norm_owners()
    assert take_out(ledger, structure, "t0", named_tensors(net)) == {name: 0}
    assert all(torch.equal(before[path], owners) for path, owners in ledger.norm_owners().items())
    assert take_out(ledger, structure, "t1", named_tensors(net)) == {name: 5}


def test_a_norm_of_the_input_holds_no_unit():
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    structure = trace(net, torch.randn(3, 4))
    ledger = NeuronLedger.for_structure(structure)
    for number in range(2):
        ledger.begin(f"t{number}", outputs=[2 * number, 2 * number + 1])
        ledger.seal()
    assert sum(take_out(ledger, structure, "t0", named_tensors(net)).values()) == 0

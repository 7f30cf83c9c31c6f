import io

import numpy as np
import pytest
import torch
from torch import nn

from lightning_cf.errors import CapacityError, ContinualError
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import Entries
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.ledger_state import CHECKPOINT_KEY
from lightning_cf.ownership.levels import FREE


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 6))


@pytest.fixture
def net():
    return network()


@pytest.fixture
def structure(net):
    return trace(net, torch.ones(1, 3))


@pytest.fixture
def ledger(structure):
    return NeuronLedger.for_structure(structure)


def learn(ledger, name, classes, first=(), second=()):
    """Begins a task and claims the units named."""
    ledger.reserve(name, classes)
    ledger.begin(name, classes)
    claim(ledger, first, second)


def claim(ledger, first, second):
    marked = {"0": torch.zeros(4, dtype=torch.bool), "3": torch.zeros(2, dtype=torch.bool)}
    for group, units in zip(marked, (first, second), strict=True):
        marked[group][list(units)] = True
    ledger.claim(marked)


def test_at_first_every_unit_is_free(ledger):
    assert {name: owner.tolist() for name, owner in ledger.owners.items()} == {"0": [FREE] * 4, "3": [FREE] * 2}
    assert ledger.outputs.tolist() == [FREE] * 6
    assert (ledger.width, ledger.head, ledger.current) == (6, "5", None)
    assert ledger.capacity() == {"0": 1.0, "3": 1.0}


# Outputs


def test_reserved_outputs_belong_to_one_task(ledger):
    ledger.reserve("a", [0, 1])
    ledger.reserve("a", [0, 2])
    ledger.reserve("b", [1])
    with pytest.raises(ContinualError, match=r"Task 'c' and task 'a' both have output 2\. .*outputs=\[\.\.\.\]"):
        ledger.reserve("c", [3, 2])
    assert ledger.reserved == {"a": [0, 2], "b": [1]}


def test_outputs_that_the_head_lacks_are_refused(ledger):
    with pytest.raises(
        ContinualError, match=r"'a' needs output 6, but the output head has 6 columns \(0 to 5\)\. Widen the head"
    ):
        ledger.reserve("a", [0, 6])
    assert ledger.reserved == {}


NO_OUTPUTS = [
    ([], r"Task 'b': outputs=\[\] leaves it no output; name the columns"),
    ([2, 2], r"Task 'b': outputs must differ from one another, got \[2, 2\]; name each column once"),
    ([2, -1], r"Task 'b': outputs must be whole numbers from 0 on, got -1; columns count from 0"),
    ([2.0], r"Task 'b': outputs must be whole numbers, got 2.0. Name columns of the head, such as \[0, 1\]"),
    (torch.tensor([True, False]), "Task 'b': outputs must be whole numbers, got True"),
    (["2"], "Task 'b': outputs must be whole numbers, got '2'"),
    (2, "Task 'b': outputs must be a list of columns, got 2"),
]


@pytest.mark.parametrize(("outputs", "message"), NO_OUTPUTS)
def test_outputs_that_name_no_columns_are_refused_and_leave_the_task_before_as_it_is(ledger, outputs, message):
    learn(ledger, "a", [0])
    for ask in (ledger.reserve, lambda name, columns: ledger.begin(name, outputs=columns)):
        with pytest.raises(ContinualError, match=message):
            ask("b", outputs)
    assert ledger.reserved == {"a": [0]}
    assert ledger.current.phase == "invariance"


@pytest.mark.parametrize("outputs", [np.arange(2), torch.arange(2), [np.int64(0), torch.tensor(1)], range(2)])
def test_outputs_may_be_numbers_of_other_libraries(ledger, outputs):
    assert ledger.begin("a", outputs=outputs).outputs == [0, 1]
    assert all(type(column) is int for column in ledger.reserved["a"])


@pytest.mark.parametrize("name", [None, 3, "", "  ", "a\nb", ["a"]])
def test_a_task_has_a_name_that_can_be_read(ledger, name):
    for ask in (lambda: ledger.begin(name, outputs=[0]), lambda: ledger.reserve(name, [0])):
        with pytest.raises(ContinualError, match=r"NeuronLedger.*: name must be "):
            ask()
    assert ledger.tasks == []


def test_the_current_task_cannot_go_on_with_other_outputs(ledger):
    task = ledger.begin("a", outputs=[0, 1])
    message = (
        r"Task 'a' was begun with outputs \[0, 1\], which stay its own.* with \[.*Call begin\('a'\) without outputs="
    )
    for ask in (lambda: ledger.begin("a", outputs=[2, 3]), lambda: ledger.reserve("a", [1, 0])):
        with pytest.raises(ContinualError, match=message):
            ask()
    assert ledger.outputs_of("a") == task.outputs == [0, 1]
    assert ledger.begin("a", outputs=[0, 1]) is ledger.begin("a") is task


def test_one_output_for_two_classes_gets_the_way_that_works():
    """``tests/whole/test_kinds.py`` trains a head of single outputs so."""
    ledger = NeuronLedger.for_structure(
        trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.ones(1, 3))
    )
    with pytest.raises(ContinualError, match=r"needs output 1, .* 1 columns.* outputs=\[0\].*metric=.*BinaryAccuracy"):
        ledger.reserve("a", [0, 1])


def test_new_outputs_come_last_and_are_free(ledger):
    ledger.reserve("a", [5])
    ledger.begin("a", [5])
    revision = ledger.revision
    assert ledger.add_outputs(2) == [6, 7]
    assert ledger.outputs.tolist() == [FREE] * 5 + [0, FREE, FREE]
    assert ledger.width == 6
    assert ledger.revision > revision


# Phases


def test_a_task_goes_from_learn_to_invariance_to_sealed(ledger):
    ledger.reserve("a", [0, 1])
    task = ledger.begin("a", [0, 1])
    assert (task.name, task.classes, task.outputs, task.phase) == ("a", [0, 1], [0, 1], "learn")
    assert ledger.outputs.tolist() == [0, 0, FREE, FREE, FREE, FREE]
    assert ledger.begin("a", [0, 1]) is task is ledger.current
    claim(ledger, [1], [0])
    assert task.phase == "invariance"
    assert ledger.begin("a", [0, 1]) is task
    ledger.seal()
    assert task.phase == "sealed"
    assert ledger.current is None
    assert ledger.index("a") == 0
    assert ledger.knows("a")


def test_a_sealed_task_cannot_begin_again(ledger):
    learn(ledger, "a", [0])
    ledger.seal()
    with pytest.raises(ContinualError, match="Task 'a' was learned before and its units are sealed; give new data a"):
        ledger.begin("a", [0])


def test_an_earlier_task_cannot_begin_again_while_another_is_current(ledger):
    learn(ledger, "a", [0], [0], [0])
    ledger.reserve("b", [1])
    ledger.begin("b", [1])
    with pytest.raises(ContinualError, match="Task 'a' was learned before"):
        ledger.begin("a", [0])


def test_a_task_after_one_without_a_partition_is_refused(ledger):
    ledger.reserve("a", [0])
    ledger.reserve("b", [1])
    ledger.begin("a", [0])
    with pytest.raises(ContinualError, match=r"'b' cannot start: task 'a' was never partitioned.*Fit 'a' again.*after"):
        ledger.begin("b", [1])
    assert [task.name for task in ledger.tasks] == ["a"]


def test_the_next_task_seals_the_one_before(ledger):
    learn(ledger, "a", [0], [0], [0])
    ledger.reserve("b", [1])
    ledger.begin("b", [1])
    assert [task.phase for task in ledger.tasks] == ["sealed", "learn"]


def test_a_task_without_a_free_unit_is_refused(ledger):
    learn(ledger, "a", [0], [0, 1, 2], [0])
    learn(ledger, "b", [1], [3], [])
    ledger.reserve("c", [2])
    with pytest.raises(CapacityError) as error:
        ledger.begin("c", [2])
    for part in ("Task 'c'", "'0'", "4 of 4 owned", "3 by 'a', 1 by 'b'", "Lower max_claim", "widen the layer"):
        assert part in str(error.value)
    assert not ledger.knows("c")


def test_an_unknown_task_has_no_number(ledger):
    with pytest.raises(KeyError, match="a"):
        ledger.index("a")


def test_every_step_counts_as_a_revision(ledger):
    ledger.reserve("a", [0])
    revisions = [ledger.revision]
    for step in (lambda: ledger.begin("a", [0]), lambda: claim(ledger, [0], [0]), ledger.seal):
        step()
        revisions.append(ledger.revision)
    assert revisions == sorted(set(revisions))


# Claims


def test_a_claim_takes_free_units_only(ledger):
    learn(ledger, "a", [0], [0, 1], [0])
    learn(ledger, "b", [1], [1, 2], [0, 1])
    assert {name: owner.tolist() for name, owner in ledger.owners.items()} == {"0": [0, 0, 1, FREE], "3": [0, 1]}
    assert ledger.capacity() == {"0": 0.25, "3": 0.0}


def test_a_later_claim_of_the_same_task_replaces_the_first(ledger):
    learn(ledger, "a", [0], [0, 1], [0])
    claim(ledger, [1], [1])
    assert {name: owner.tolist() for name, owner in ledger.owners.items()} == {
        "0": [FREE, 0, FREE, FREE],
        "3": [FREE, 0],
    }


# Masks


def frozen(ledger, structure, net):
    masks = ledger.frozen(structure, named_tensors(net))
    return {name: masks[name].expand(tensor.shape) for name, tensor in named_tensors(net).items()}


@pytest.mark.parametrize("isolation", ["exact", "perturb"])
def test_the_first_task_moves_everything_but_other_outputs(ledger, structure, net, isolation):
    ledger.isolation = isolation
    ledger.reserve("a", [1, 4])
    ledger.begin("a", [1, 4])
    masks = frozen(ledger, structure, net)
    assert [name for name, mask in masks.items() if mask.any()] == ["5.weight", "5.bias"]
    for name in ("5.weight", "5.bias"):
        assert masks[name].reshape(6, -1).all(dim=1).tolist() == [True, False, True, True, False, True]
        assert masks[name].reshape(6, -1).any(dim=1).tolist() == [True, False, True, True, False, True]


def test_nothing_moves_before_a_task_and_after_its_seal(ledger, structure, net):
    assert all(mask.all() for mask in frozen(ledger, structure, net).values())
    learn(ledger, "a", [0], [0], [0])
    ledger.seal()
    assert all(mask.all() for mask in frozen(ledger, structure, net).values())


@pytest.mark.parametrize("isolation", ["exact", "perturb"])
def test_in_learn_free_units_and_own_outputs_move(ledger, structure, net, isolation):
    ledger.isolation = isolation
    learn(ledger, "a", [0], [1, 2], [0])
    ledger.reserve("b", [1])
    ledger.begin("b", [1])
    masks = frozen(ledger, structure, net)
    owned = torch.tensor([False, True, True, False])
    for name in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(masks[name], owned)
    assert torch.equal(masks["0.weight"], owned[:, None].expand(4, 3))
    assert masks["1.num_batches_tracked"].item() is True
    assert masks["3.weight"].tolist() == [[True] * 4, [False] * 4]
    assert masks["5.weight"].tolist() == [[True, True], [False, False], *[[True, True]] * 4]


@pytest.mark.parametrize("isolation", ["exact", "perturb"])
def test_in_invariance_claimed_units_and_own_outputs_move(ledger, structure, net, isolation):
    ledger.isolation = isolation
    learn(ledger, "a", [0], [1, 2], [0])
    masks = frozen(ledger, structure, net)
    assert masks["0.weight"][:, 0].tolist() == [True, False, False, True]
    from_free = isolation == "exact"
    assert masks["3.weight"].tolist() == [[from_free, False, False, from_free], [True] * 4]
    assert masks["5.weight"].tolist() == [[False, from_free], *[[True, True]] * 5]


def test_a_later_task_reads_earlier_units_and_not_the_other_way(ledger, structure):
    learn(ledger, "a", [0], [0], [0])
    learn(ledger, "b", [1], [1, 2], [1])
    cut = ledger.cut(structure, structure.entries["3.weight"])
    assert cut.tolist() == [[False, True, True, True], [False, False, False, True]]
    head = ledger.cut(structure, structure.entries["5.weight"])
    assert head.tolist() == [[False, True], [False, False], *[[False, False]] * 4]


def test_while_a_task_learns_only_earlier_claims_are_cut(ledger, structure):
    learn(ledger, "a", [0], [0], [0])
    ledger.reserve("b", [1])
    ledger.begin("b", [1])
    assert ledger.cut(structure, structure.entries["3.weight"]).tolist() == [[False, True, True, True], [False] * 4]
    head = ledger.cut(structure, structure.entries["5.weight"])
    assert head.tolist() == [[False, True], *[[False, False]] * 5]


def test_an_input_is_never_cut(ledger, structure):
    learn(ledger, "a", [0], [0], [0])
    assert not ledger.cut(structure, structure.entries["0.weight"]).any()


def test_a_tensor_used_twice_is_frozen_where_any_use_is(ledger, structure, net):
    learn(ledger, "a", [0], [1], [0])
    first, head, none = structure.groups[0].first, structure.head.first, torch.full((1, 1), -1)
    one = Entries(torch.tensor([[first + 1], [first + 1]]), none, "weight")
    other = Entries(torch.tensor([[head], [first]]), none, "weight")
    for uses in [(one, other), (other, one)]:
        structure.entries["3.weight"] = uses
        assert frozen(ledger, structure, net)["3.weight"][:, 0].tolist() == [False, True]


def test_a_tensor_without_units_moves_with_the_first_task_only(ledger, structure):
    extra = {"scale": torch.ones(2, 3)}
    ledger.reserve("a", [0])
    ledger.begin("a", [0])
    assert not ledger.frozen(structure, extra)["scale"].any()
    claim(ledger, [0], [0])
    assert not ledger.frozen(structure, extra)["scale"].any()
    ledger.reserve("b", [1])
    ledger.begin("b", [1])
    assert ledger.frozen(structure, extra)["scale"].expand(2, 3).all()


def test_another_network_is_refused(ledger):
    other = trace(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 6)), torch.ones(1, 3))
    with pytest.raises(ContinualError, match=r"made for another network: it knows units \{'0': 4, '3': 2\} and 6"):
        ledger.owner_of_units(other)


def test_another_head_is_refused(ledger):
    net = network()
    net[5] = nn.Linear(2, 7)
    with pytest.raises(ContinualError, match=r"and 6 outputs, the network has \{'0': 4, '3': 2\} and 7"):
        ledger.owner_of_units(trace(net, torch.ones(1, 3)))


# Persistence


def test_the_state_comes_back_from_a_file_without_pickled_code(ledger, structure):
    ledger.isolation = "perturb"
    learn(ledger, "a", [0, 1], [0], [0])
    learn(ledger, "b", [2], [2], [])
    ledger.reserve("c", [5])
    ledger.records.append({"task": "a", "layer": "0", "claimed": 1, "threshold": 0.5})
    file = io.BytesIO()
    torch.save(ledger.state_dict(), file)
    file.seek(0)
    loaded = NeuronLedger.from_state_dict(torch.load(file, weights_only=True))
    assert loaded.tasks == ledger.tasks
    assert loaded.current == ledger.current
    assert torch.equal(loaded.owner_of_units(structure), ledger.owner_of_units(structure))
    for name in ("width", "head", "reserved", "isolation", "records"):
        assert getattr(loaded, name) == getattr(ledger, name)


def test_the_state_is_a_copy(ledger):
    learn(ledger, "a", [0], [0], [0])
    state = ledger.state_dict()
    copies = [NeuronLedger.from_state_dict(state) for _ in range(2)]
    learn(ledger, "b", [1], [1], [1])
    learn(copies[0], "c", [2], [2], [1])
    assert [task["name"] for task in state["tasks"]] == [task.name for task in copies[1].tasks] == ["a"]
    assert state["owners"]["0"].tolist() == copies[1].owners["0"].tolist() == [0, FREE, FREE, FREE]
    assert state["reserved"] == copies[1].reserved == {"a": [0]}
    assert state["tasks"][0]["phase"] == "invariance"


def test_a_checkpoint_holds_the_ledger_or_says_so(ledger, tmp_path):
    learn(ledger, "a", [0], [0], [0])
    torch.save({CHECKPOINT_KEY: ledger.state_dict()}, tmp_path / "with.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "without.ckpt")
    assert NeuronLedger.from_checkpoint(tmp_path / "with.ckpt").tasks == ledger.tasks
    with pytest.raises(ContinualError, match=r"without\.ckpt holds no ledger: it was written without lightning_cf's"):
        NeuronLedger.from_checkpoint(str(tmp_path / "without.ckpt"))

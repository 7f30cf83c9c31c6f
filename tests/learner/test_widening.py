"""Heads that gain columns between tasks: widened by the user, or grown for class numbers that are new."""

import copy
from functools import cache

import pytest
import torch
from learning import fit, images, own_logits, quiet_trainer, tasks, three, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import (
    Classifier,
    ContinualError,
    ContinualModule,
    LedgerWarning,
    MaskedGradientCallback,
    NeuronLedger,
    StructureWarning,
    Task,
    TaskInferenceCallback,
    keep_ledger,
)
from lightning_cf.data import permuted_tasks
from lightning_cf.learner.keeping import state_of
from lightning_cf.models import MLP

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
]


class Small(Classifier):
    """A head of as many columns as classes are known."""

    def __init__(self, classes=2):
        super().__init__(MLP(shape=(1, 8, 8), classes=classes, hidden=(32, 32)))
        self.save_hyperparameters()


def small(classes=2):
    torch.manual_seed(0)
    return Small(classes)


@cache
def once(wrap):
    module = ContinualModule(small()) if wrap else small()
    fit(module, tasks(1)[0], three(max_claim=0.3), epochs=2)
    return module


def learned(wrap=False):
    """A module of two columns that learned the classes 0 and 1."""
    return copy.deepcopy(once(wrap))


def wider(head, columns, *, copied=True):
    """A new layer with more columns, with the old rows copied."""
    new = copy.deepcopy(head)
    made = nn.Linear(1, 1) if isinstance(head, nn.Linear) else None
    new.weight = nn.Parameter(torch.randn(columns, *head.weight.shape[1:]) * 0.1)
    new.bias = nn.Parameter(torch.zeros(columns))
    if made is None:
        new.out_channels = columns
    else:
        new.out_features = columns
    if copied:
        new.weight.data[: len(head.weight)] = head.weight.data
        new.bias.data[: len(head.bias)] = head.bias.data
    return new


def widen(module, columns, **how):
    module.network[-1] = wider(module.network[-1], columns, **how)


@pytest.mark.parametrize(("way", "wrap"), [("new layer", False), ("new parameters", True)])
def test_a_head_that_the_user_widened_is_taken_as_it_is(way, wrap):
    module, (first, second, third) = learned(wrap), tasks(3)
    if way == "new layer":
        widen(module, 6)
    else:
        new = wider(module.network[-1], 6)
        module.network[-1].weight, module.network[-1].bias = new.weight, new.bias
    logits, rows = own_logits(module, first), module.network[-1].weight[4:].clone()
    for task in (second, third):
        fit(module, task, three(max_claim=0.3), epochs=2)
    assert torch.equal(own_logits(module, first), logits)
    ledger = state_of(module).ledger
    assert ledger.outputs.tolist() == [0, 0, 1, 1, 2, 2]
    assert [ledger.outputs_of(task.name) for task in (first, second, third)] == [[0, 1], [2, 3], [4, 5]]
    assert not torch.equal(module.network[-1].weight[4:], rows)


@pytest.mark.parametrize("wrap", [False, True])
def test_rows_that_were_not_copied_are_refused_by_name(wrap):
    module, (_, second) = learned(wrap), tasks(2)
    widen(module, 4)
    module.network[-1].weight.data[1] *= 1 + 1e-6  # every bit counts
    before = weights(module)
    with pytest.raises(
        ContinualError, match=r"'network\.5' was widened, but rows that task '0-1' owns.*5\.weight' differ"
    ):
        fit(module, second, three(), epochs=2)
    assert all(torch.equal(before[name], x) for name, x in weights(module).items())


def test_a_head_that_lost_columns_is_refused():
    module, (first, second) = small(4), tasks(2)
    fit(module, first, three(), epochs=2)
    module.network[-1] = nn.Linear(32, 2)
    with pytest.raises(ContinualError, match=r"'network\.5' has 2 columns, but the module's ledger knows 4"):
        fit(module, second, three(), epochs=2)


def test_a_plain_module_that_is_built_wider_takes_up_an_older_ledger(tmp_path):
    module, (first, second) = small(), tasks(2)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="first")
    fit(module, first, [*three(), keep], epochs=2, enable_checkpointing=True)
    other = small(4)
    state = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]
    for name in ("network.5.weight", "network.5.bias"):
        state[name] = torch.cat([state[name], other.state_dict()[name][2:]])
    other.load_state_dict(state)
    keep_ledger(other, NeuronLedger.from_checkpoint(tmp_path / "first.ckpt"))
    fit(other, second, three(), epochs=2)
    assert state_of(other).ledger.outputs.tolist() == [0, 0, 1, 1]
    # The head of four computes the columns of the first task as the one of two did, but for rounding.
    torch.testing.assert_close(own_logits(other, first), own_logits(module, first), rtol=1e-5, atol=1e-5)


# New class numbers


def test_new_class_numbers_get_columns_of_their_own_number():
    module, (first, second, third) = ContinualModule(small()), tasks(3)
    assert module.add_task(first) == [0, 1]
    assert module.add_task(third) == [4, 5]
    assert module.add_task(second) == [2, 3]  # the columns between were there already
    assert module.network[-1].out_features == 6
    for task in (first, second, third):
        fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback("statistics")], epochs=2)
    found = module.predict(torch.cat([next(iter(task.test_dataloader()))[0] for task in (first, second, third)]))
    assert found.probabilities.shape[1] == 7
    assert set(found.classes.tolist()) <= {-1, *range(6)}
    assert [module.outputs_of(task) for task in ("0-1", second, "4-5")] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ContinualError, match=r"for a task '6-7'; known tasks: '0-1', '4-5', '2-3'\."):
        module.outputs_of("6-7")


class Counts(Small):
    """Counts on the columns that it was made with, as forecasters do that read what they said before."""

    def forward(self, x):
        said = super().forward(x)
        return said + torch.zeros(len(x), 2).copy_(said)


def test_a_network_that_cannot_run_with_more_columns_is_refused_and_stays_as_it_was():
    torch.manual_seed(0)
    module, (first, second) = ContinualModule(Counts()), tasks(2)
    fit(module, first, three(max_claim=0.3), epochs=2)
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    with pytest.raises(
        ContinualError, match=r"ContinualCounts cannot run with 4 of them: .*return a head of its own alone"
    ):
        fit(module, second, three(), epochs=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.named_parameters())
    assert module.network[-1].out_features == 2
    assert len(own_logits(module, first)) > 0  # and it still runs


def test_a_fit_grows_the_head_for_new_class_numbers_by_itself():
    module, (first, second) = learned(wrap=True), tasks(2)
    before = own_logits(module, first)
    module.add_task(second)
    torch.testing.assert_close(own_logits(module, first), before, rtol=1e-5, atol=1e-5)
    logits = own_logits(module, first)
    fit(module, second, three(), epochs=2)
    assert torch.equal(own_logits(module, first), logits)
    assert module.network[-1].out_features == 4


def test_new_class_numbers_behind_classes_that_returned_are_seen_at_their_labels():
    module, (first, second) = ContinualModule(small()), tasks(2)
    again = Task("again", first.data, classes=[0, 1])
    assert [module.add_task(task) for task in (first, again, second)] == [[0, 1], [2, 3], [4, 5]]
    mixed = Task("mixed", first.data, classes=[0, 7])
    assert module.add_task(mixed) == [6, 7]
    state = state_of(module)
    assert state.ledger.width == 8
    x = torch.randn(3, 1, 8, 8)
    raw = module.network(x)
    for task, labels in ((first, [0, 1]), (again, [0, 1]), (second, [2, 3]), (mixed, [0, 7])):
        with state.showing(module, [task]):
            shown = module(x)
        assert shown.shape == (3, 8)
        assert torch.equal(shown[:, labels], raw[:, module.outputs_of(task)])
        assert int((shown[0] > -1e30).sum()) == 2


def test_columns_that_the_user_added_behind_grown_ones_are_used_for_new_class_numbers():
    module, (first, second) = ContinualModule(small()), tasks(2)
    module.add_task(first)
    module.add_task(Task("again", first.data, classes=[0, 1]))
    widen(module, 6)
    assert module.add_task(second) == [4, 5]
    assert module.network[-1].out_features == 6


def test_explicit_outputs_beyond_the_head_stay_an_error():
    module, (first, *_) = ContinualModule(small()), tasks()
    with pytest.raises(ContinualError, match=r"'far' needs output 6, but the output head has 2 columns"):
        module.add_task(Task("far", first.data, outputs=[6, 7]))


# Checkpoints of grown heads


def grown(folder):
    module, (first, second, third) = ContinualModule(small()), tasks(3)
    for task in (first, second):
        keep = ModelCheckpoint(dirpath=folder, filename=task.name, save_last=True)
        fit(module, task, [*three(max_claim=0.3), keep], epochs=2, enable_checkpointing=True)
    return module, first, second, third


def test_a_grown_head_comes_back_from_its_checkpoint(tmp_path):
    module, first, second, third = grown(tmp_path)
    other = type(module).load_from_checkpoint(tmp_path / "2-3.ckpt", weights_only=True)
    assert other.network[-1].out_features == 4
    copied = ContinualModule(small())
    copied.load_state_dict(module.state_dict())
    logits = [own_logits(module, task) for task in (first, second)]
    for loaded in (other, copied):
        fit(loaded, third, three(), epochs=2)
        assert loaded.network[-1].out_features == 6
        for task, before in zip((first, second), logits, strict=True):
            torch.testing.assert_close(own_logits(loaded, task), before, rtol=1e-5, atol=1e-5)
    plain = Small.load_from_checkpoint(tmp_path / "2-3.ckpt", weights_only=True, classes=4)
    assert torch.equal(plain.network[-1].weight, module.network[-1].weight)


def test_a_fit_in_a_new_process_goes_on_with_a_grown_head(tmp_path):
    class Fail(ModelCheckpoint):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                raise KeyError("power cut")

    module, (first, second) = learned(wrap=True), tasks(2)
    with pytest.raises(KeyError):
        fit(module, second, [*three(), Fail(dirpath=tmp_path, filename="cut")], epochs=4, enable_checkpointing=True)
    other = ContinualModule(small())
    quiet_trainer(max_epochs=4, callbacks=three()).fit(
        other, datamodule=second, ckpt_path=tmp_path / "cut.ckpt", weights_only=True
    )
    assert [(entry.name, entry.phase) for entry in other.ledger.tasks] == [("0-1", "sealed"), ("2-3", "sealed")]
    assert torch.equal(own_logits(other, first), own_logits(module, first))


def test_an_evaluation_of_a_checkpoint_with_a_smaller_head_leaves_the_grown_one(tmp_path):
    module, first, _, third = grown(tmp_path)
    before = weights(module)
    with pytest.warns(LedgerWarning, match=r"0-1\.ckpt' holds nothing of task '2-3'"):
        quiet_trainer(callbacks=three()).predict(
            module, dataloaders=first.test_dataloader(), ckpt_path=tmp_path / "0-1.ckpt"
        )
    assert before.keys() == weights(module).keys()
    assert all(torch.equal(before[name], x) for name, x in weights(module).items())
    fit(module, third, three(), epochs=2)


# Other kinds of heads


class TwoHeads(Classifier):
    """Two heads side by side over one body."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()))
        self.a, self.b = nn.Linear(32, 2), nn.Linear(32, 2)

    def forward(self, x):
        h = self.network(x)
        return torch.cat([self.a(h), self.b(h)], dim=1)


def test_columns_that_shift_keep_their_owners():
    torch.manual_seed(0)
    module, (first, second) = TwoHeads(), tasks(2)
    for task in (first, second):
        fit(module, task, three(), epochs=2)
    logits = [own_logits(module, task) for task in (first, second)]
    module.a = wider(module.a, 4)
    third = Task("4-5", tasks(3)[2].data, outputs=[2, 3], evaluate=lambda n, b: (n(b[0])[:, 2:4], b[1] % 2))
    module.training_step = lambda batch, batch_idx: functional.cross_entropy(module(batch[0])[:, 2:4], batch[1] % 2)
    fit(module, third, three(), epochs=2)
    ledger = state_of(module).ledger
    assert ledger.outputs.tolist() == [0, 0, 2, 2, 1, 1]
    assert ledger.reserved == {"0-1": [0, 1], "2-3": [4, 5], "4-5": [2, 3]}
    for task, before in zip((first, second), logits, strict=True):
        torch.testing.assert_close(own_logits(module, task), before, rtol=1e-5, atol=1e-5)


class Pixels(Classifier):
    """Gives a map of logits."""

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])


def pixels(classes):
    """Which pixels are bright, as labels of their own for each task."""
    generator = torch.Generator().manual_seed(classes[0])
    x = torch.randn(96, 1, 4, 4, generator=generator)
    y = torch.where(x[:, 0] > 0, classes[1], classes[0])
    loaders = {stage: DataLoader(TensorDataset(x, y), batch_size=32) for stage in ("train", "val", "test")}
    return Task(f"pixels {classes[0]}", loaders, classes=classes)


@pytest.mark.parametrize("by", ["user", "module"])
def test_a_convolution_is_widened_too(by):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 2, 1))
    module = Pixels(net) if by == "user" else ContinualModule(Pixels(net))
    first, second = pixels([0, 1]), pixels([2, 3])
    fit(module, first, three(), epochs=2)
    if by == "user":
        widen(module, 4)
    else:
        module.add_task(second)
    logits = own_logits(module, first)
    fit(module, second, three(), epochs=2)
    assert torch.equal(own_logits(module, first), logits)
    assert module.network[-1].out_channels == 4
    assert state_of(module).ledger.outputs.tolist() == [0, 0, 1, 1]


# Heads of other libraries' classes


class GraphLinear(nn.Module):
    """Made like torch_geometric.nn.Linear: no nn.Linear, but an ordinary (out, in) matrix."""

    def __init__(self, in_channels, out_channels, bias=True):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.weight_initializer = None
        self.reset_parameters()

    def reset_parameters(self):
        nn.Linear.reset_parameters(self)  # as torch_geometric's does by default

    def forward(self, x):
        return functional.linear(x, self.weight, self.bias)


class Turned(GraphLinear):
    """Gives its columns in another order than its rows stand."""

    def forward(self, x):
        return super().forward(x).flip(1)


class Transposed(nn.Module):
    """Made like the Conv1D of GPT-2: its weight is (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) * 0.1), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Counting(GraphLinear):
    """Keeps the number of its columns under a name that nobody knows."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.answers = self.out_channels

    def forward(self, x):
        return super().forward(x).reshape(len(x), self.answers)


def foreign(kind, columns, layer=GraphLinear, **options):
    torch.manual_seed(0)
    return Classifier(nn.Sequential(nn.Flatten(), layer(64, 40), nn.ReLU(), kind(40, columns, **options)))


@pytest.mark.parametrize(("wrap", "bias"), [(False, True), (True, False)])
def test_a_head_is_known_by_its_weight_not_by_its_class(wrap, bias):
    found = []
    for kind in (nn.Linear, GraphLinear):
        module, sequence = foreign(kind, 10, kind, bias=bias), tasks(2)
        module = ContinualModule(module) if wrap else module
        logits = []
        for task in sequence:
            torch.manual_seed(1)
            fit(module, task, three(), epochs=2)
            logits.append(own_logits(module, task))
        assert torch.equal(own_logits(module, sequence[0]), logits[0])
        found.append(weights(module))
    assert all(torch.equal(found[0][name], x) for name, x in found[1].items())


def test_a_foreign_head_grows():
    module, sequence = ContinualModule(foreign(GraphLinear, 10)), permuted_tasks(images(), count=2, batch_size=32)
    for task in sequence:
        module.add_task(task)
    assert module.network[-1].out_channels == 20
    for task in sequence:
        fit(module, task, [*three(max_claim=0.5), TaskInferenceCallback("statistics")], epochs=2)
    assert module.outputs_of(sequence[1]) == list(range(10, 20))
    x, _ = next(iter(sequence[0].test_dataloader()))
    assert module.predict(x).classes.shape == (len(x),)


@pytest.mark.parametrize(("kind", "says"), [(Transposed, "'nf'"), (Counting, "'answers'")])
def test_a_foreign_head_of_which_too_little_is_known_is_masked_but_does_not_grow(kind, says):
    module, (first, second) = ContinualModule(foreign(kind, 4)), tasks(2)
    for task in (first, second):
        fit(module, task, three(), epochs=2)
    assert state_of(module).ledger.outputs.tolist() == [0, 0, 1, 1]
    with pytest.raises(ContinualError, match=rf"is a {kind.__name__}, to which no outputs can be added.*{says}"):
        module.add_task(tasks(3)[2])


def test_a_foreign_head_that_gives_something_else_than_its_rows_is_refused():
    module, (first, *_) = foreign(Turned, 4), tasks(2)
    with pytest.raises(ContinualError, match=r"'network\.3' is a Turned, which gives something else than one column"):
        fit(module, first, three(), epochs=1)
    fit(module, first, [*three()[:2], MaskedGradientCallback(mask_outputs=False)], epochs=1)


class Apart(Classifier):
    """A function reads its output layer's weight; the layer itself does not run."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU()))
        self.head = nn.Linear(40, 10)

    def forward(self, x):
        return nn.functional.linear(self.network(x), self.head.weight, self.head.bias)


@pytest.mark.filterwarnings("ignore:.*and so it is with random weights")
def test_a_head_that_does_not_run_itself_is_told_where_it_cannot_mask():
    module = Apart()
    with pytest.warns(
        StructureWarning, match=r"not masked: the output layer 'head' does not run itself.*self\.head\(x\)"
    ):
        fit(module, tasks(2)[0], three(), epochs=2)


def test_a_head_that_does_not_run_itself_shows_no_class_at_another_column():
    """Training would move what the first task owns, and scores would read it."""
    module, sequence = ContinualModule(Apart()), permuted_tasks(images(), count=2, batch_size=32)
    for task in sequence:
        module.add_task(task)
    with pytest.warns(StructureWarning):  # the first one's are where they are, and it is not inferred
        fit(module, sequence[0], three(max_claim=0.5), epochs=2)
    with pytest.raises(ContinualError, match=r"No column can be shown as another class: the output layer 'head'"):
        fit(module, sequence[1], three(max_claim=0.5), epochs=2)

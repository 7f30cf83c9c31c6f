import copy
import pickle

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_cf.errors import ContinualError, DataWarning
from lightning_cf.tasks.holdout import PartSampler
from lightning_cf.tasks.task import Task

HOOKS = ["prepare_data", "setup", "teardown", "val_dataloader", "test_dataloader", "predict_dataloader"]
HOOKS += ["transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer", "on_exception"]
HOOKS += ["state_dict", "load_state_dict"]


def numbered(size=40):
    """Samples whose input is their number."""
    return TensorDataset(torch.arange(size).float()[:, None], torch.arange(size) % 2)


def loader(**options):
    return DataLoader(numbered(), **({"batch_size": 8, "shuffle": True} | options))


def seen(batches):
    return [int(x) for batch, _ in batches for x in batch]


class Data(LightningDataModule):
    """A training loader and a log of the calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(f"setup {stage} {self.trainer is not None}")

    def train_dataloader(self):
        return loader()


class Validated(Data):
    """One more with a validation loader."""

    def val_dataloader(self):
        return loader(shuffle=False)


class Unused(LightningModule):
    """Doubles its input."""

    def forward(self, x):
        return 2 * x


# Data


@pytest.mark.parametrize("shuffle", [True, False])
def test_without_validation_data_some_training_data_is_held_out(shuffle):
    task = Task("a", {"train": loader(shuffle=shuffle)}, classes=[0, 1], holdout=0.25)
    train, held = seen(task.train_dataloader()), seen(task.judging_batches())
    assert not task.has_validation
    assert sorted(train + held) == list(range(40))
    assert len(held) == 10
    assert held == sorted(held)
    assert (train == sorted(train)) != shuffle
    assert sorted(train) == sorted(seen(task.train_dataloader()))
    assert held == seen(task.judging_batches())


def test_what_is_held_out_depends_on_the_task():
    held = [seen(Task(name, {"train": loader()}, classes=[0, 1]).judging_batches()) for name in ("a", "a", "b")]
    assert held[0] == held[1] != held[2]


@pytest.mark.parametrize("data", [Validated, lambda: {"train": loader(), "val": loader(shuffle=False)}])
def test_with_validation_data_nothing_is_held_out(data):
    task = Task("a", data(), classes=[0, 1])
    assert task.has_validation
    assert sorted(seen(task.train_dataloader())) == list(range(40))
    assert seen(task.judging_batches()) == list(range(40))


def test_the_first_of_several_validation_loaders_judges_where_labels_do_not_tell():
    one, two = loader(shuffle=False), loader()
    with pytest.warns(DataWarning, match=r"Task 'a' has 2 val loaders, and no labels tell .* scored on loader 0\."):
        judging = Task("a", {"train": loader(), "val": [one, two]}, classes=[0, 1]).judging_batches()
    assert judging.loader is one


def test_the_loader_is_kept_but_for_its_data():
    def collate(samples):
        return [torch.stack(part) for part in zip(*samples, strict=True)]

    plain = loader(drop_last=True, collate_fn=collate, generator=torch.Generator().manual_seed(0))
    task = Task("a", {"train": plain}, classes=[0, 1])
    train, held = task.train_dataloader(), task.judging_batches()
    for name in ("dataset", "batch_size", "collate_fn", "num_workers", "drop_last", "generator", "pin_memory"):
        assert getattr(train, name) is getattr(plain, name)
    assert isinstance(held.loader.sampler, PartSampler)
    assert held.loader.dataset is plain.dataset
    assert held.loader.drop_last is False


def weighted():
    return loader(shuffle=False, sampler=WeightedRandomSampler([1.0] * 40, 40))


def batch_sampled():
    return DataLoader(numbered(), batch_sampler=BatchSampler(SequentialSampler(range(40)), 8, drop_last=False))


@pytest.mark.parametrize(
    ("train", "holdout"),
    [(weighted, 0.1), (batch_sampled, 0.1), (lambda: list(loader()), 0.1), (loader, 0.0), (loader, 0.02)],
    ids=["own sampler", "own batch sampler", "no loader", "no share", "less than one"],
)
def test_where_nothing_can_be_held_out_the_training_data_judges(train, holdout):
    plain = train()
    task = Task("a", {"train": plain}, classes=[0, 1], holdout=holdout)
    assert task.train_dataloader() is plain
    assert task.judging_batches().loader is plain


def test_a_sampler_of_few_samples_is_kept():
    few = RandomSampler(numbered(), num_samples=16)
    task = Task("a", {"train": loader(shuffle=False, sampler=few)}, classes=[0, 1])
    assert len(seen(task.train_dataloader())) <= 16


def test_all_data_cannot_be_held_out():
    with pytest.raises(ContinualError, match="Task 'a'"):
        Task("a", {"train": loader()}, classes=[0, 1], holdout=1.0).check_data()


# Datamodule


@pytest.mark.parametrize(
    ("data", "overridden"),
    [
        (Data(), {"prepare_data", "setup"}),
        (Validated(), {"prepare_data", "setup", "val_dataloader"}),
        ({"train": []}, set()),
        ({"train": [], "test": [], "predict": []}, {"test_dataloader", "predict_dataloader"}),
    ],
    ids=["data", "validated", "loaders", "more loaders"],
)
def test_only_hooks_that_the_data_overrides_are_passed_on(data, overridden):
    task = Task("a", data, classes=[0])
    assert {hook for hook in HOOKS if is_overridden(hook, task, parent=LightningDataModule)} == overridden
    assert overridden == {hook for hook in HOOKS if hook in vars(task)}
    assert is_overridden("train_dataloader", task, parent=LightningDataModule)


def test_loaders_are_given_by_stage():
    loaders = {"train": loader(shuffle=False), "val": [1], "test": [2], "predict": [3]}
    task = Task("a", loaders, classes=[0, 1])
    assert task.train_dataloader() is loaders["train"]
    assert task.val_dataloader() == [1]
    assert task.test_dataloader() == [2]
    assert task.predict_dataloader() == [3]


def test_the_data_gets_the_trainer_and_its_calls():
    data = Validated()
    task = Task("a", data, classes=[0])
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    task.trainer = trainer
    task.prepare_data()
    task.setup("fit")
    assert data.trainer is trainer
    assert data.calls == ["prepare_data", "setup fit True"]


def test_a_batch_is_scored_as_the_task_says():
    x, y = torch.ones(2, 1), torch.zeros(2)
    predictions, target = Task("a", {"train": []}, classes=[0]).evaluate(Unused(), (x, y))
    assert torch.equal(predictions, 2 * x)
    assert target is y
    own = Task("a", {"train": []}, classes=[0], evaluate=lambda module, batch: (module(batch["x"]), batch["y"]))
    assert own.evaluate(Unused(), {"x": x, "y": y})[1] is y


# Refusals


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_task_needs_a_name(name):
    with pytest.raises(ContinualError, match=f"A task needs a name, got {name!r}"):
        Task(name, {"train": []}, classes=[0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("columns", [[], [-1], [0, 1.5], ["0"], [True]])
@pytest.mark.parametrize("what", ["classes", "outputs"])
def test_columns_are_whole_numbers(what, columns):
    with pytest.raises(ContinualError) as error:
        Task("a", {"train": []}, **{what: columns})
    assert str(error.value) == f"Task 'a': {what} must be whole numbers from 0 on, got {columns}."


@pytest.mark.parametrize("what", ["classes", "outputs"])
def test_columns_differ(what):
    with pytest.raises(ContinualError, match=rf"Task 'a': {what} must differ from one another, got \[1, 2, 1\]"):
        Task("a", {"train": []}, **{what: [1, 2, 1]})


def test_a_task_needs_classes_or_outputs():
    with pytest.raises(ContinualError, match=r"Task 'a' needs classes=\[...\] or outputs=\[...\]"):
        Task("a", {"train": []})


def test_each_class_has_an_output():
    with pytest.raises(
        ContinualError, match=r"'a' has 2 classes \[0, 1\] but 1 outputs \[3\]; give one output a class"
    ):
        Task("a", {"train": []}, classes=[0, 1], outputs=[3])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("holdout", [-0.1, 1.1, "0.1", None, True])
def test_the_share_held_out_is_a_share(holdout):
    with pytest.raises(ContinualError, match=rf"Task 'a': holdout must be a share in \[0, 1\], got {holdout!r}"):
        Task("a", {"train": []}, classes=[0], holdout=holdout)


@pytest.mark.parametrize("stages", [["val"], ["train", "validation"], []])
def test_stages_have_names(stages):
    with pytest.raises(ContinualError, match=r"Task 'a': data must be a LightningDataModule or loaders by stage.*got"):
        Task("a", dict.fromkeys(stages, ()), classes=[0])


@pytest.mark.parametrize(
    "batches", [[], DataLoader(numbered(4), batch_size=8, drop_last=True)], ids=["none", "dropped"]
)
def test_a_task_without_training_data_is_refused(batches):
    with pytest.raises(ContinualError, match=r"Task 'a' has no training data: .* Check the data set's length"):
        Task("a", {"train": batches}, classes=[0, 1], holdout=0.0).check_data()


def test_labels_outside_the_classes_are_refused():
    task = Task("a", {"train": loader(shuffle=False)}, classes=[0, 2])
    with pytest.raises(
        ContinualError, match=r"Task 'a' declares classes \[0, 2\], but its data holds label 1; correct"
    ):
        task.check_data()


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2, 1), torch.tensor([0, 1])),
        (torch.ones(2, 1), torch.tensor([7.0, 8.0])),
        (torch.ones(2, 1), torch.tensor([[7, 7], [8, 8]])),
        {"x": torch.ones(2, 1)},
        (torch.ones(2, 1),),
    ],
    ids=["labels", "numbers", "grid", "mapping", "inputs"],
)
def test_the_first_batch_is_returned_and_only_labels_are_checked(batch):
    assert Task("a", {"train": [batch]}, classes=[0, 1]).check_data() is batch


def test_a_task_with_outputs_only_may_have_any_labels():
    Task("a", {"train": loader()}, outputs=[5]).check_data()


# What the task does not have is its data's


class Sized(Data):
    def __init__(self):
        super().__init__()
        self.batch_size, self.prepare_data_per_node = 4, False
        self.save_hyperparameters({"folder": "here"})

    @property
    def words(self):
        return ["one", "two"]


def test_attributes_of_the_data_are_read_and_written_through_the_task():
    data = Sized()
    task = Task("a", data, classes=[0, 1])
    assert (task.batch_size, task.words, task.hparams["folder"]) == (4, ["one", "two"], "here")
    task.batch_size = 8
    task.note = "mine"
    assert (data.batch_size, task.batch_size, task.note, hasattr(data, "note")) == (8, 8, "mine", False)
    assert task.prepare_data_per_node is False
    with pytest.raises(AttributeError, match="'Sized' object has no attribute 'nothing'"):
        _ = task.nothing


def test_what_both_have_is_the_tasks_own():
    data = Sized()
    data.name = "theirs"
    task = Task("a", data, classes=[0, 1])
    assert (task.name, data.name) == ("a", "theirs")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_task_is_copied_with_its_data(copied):
    task = Task("a", Sized(), classes=[0, 1])
    other = copied(task)
    assert (other.name, other.batch_size) == ("a", 4)
    other.batch_size = 2
    assert (other.data.batch_size, task.batch_size) == (2, 4)


@pytest.mark.parametrize(
    ("predictions", "target", "expected"),
    [
        ((6, 3), (6,), ((6, 3), (6,))),
        ((2, 3, 4, 4), (2, 4, 4), ((2, 3, 4, 4), (2, 4, 4))),
        ((2, 5, 7), (2, 5), ((10, 7), (10,))),
        ((10, 7), (2, 5), ((10, 7), (10,))),
        ((6, 3), (6, 3), ((6, 3), (6, 3))),
    ],
    ids=["classes", "pixels", "tokens", "tokens in a row", "labels"],
)
def test_predictions_and_targets_are_laid_out_as_metrics_take_them(predictions, target, expected):
    module = Unused()
    module.forward = lambda x: torch.zeros(predictions)
    found = Task("a", Data(), classes=[0]).evaluate(module, (torch.zeros(1), torch.zeros(target, dtype=torch.long)))
    assert tuple(tuple(x.shape) for x in found) == expected


def test_a_forward_pass_of_two_arguments_gets_both():
    module = Unused()
    module.forward = lambda x, y: torch.stack([x, y])
    x, y = torch.zeros(3), torch.ones(3)
    predictions, target = Task("a", Data(), classes=[0]).evaluate(module, (x, y))
    assert predictions.tolist() == [[0] * 3, [1] * 3]
    assert target is y

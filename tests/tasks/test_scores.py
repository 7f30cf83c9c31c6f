"""No partition is judged by a number that means nothing."""

from functools import partial

import numpy as np
import pytest
import torch
from learning import quiet_trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchmetrics import MeanMetric, MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy
from toys import Net, fit, loader, numbers

from lightning_cf import ContinualModule, SequentialTaskRunner, Task, TaskInferenceCallback
from lightning_cf.callbacks.label_watch import LabelWatch
from lightning_cf.errors import ContinualError, DataWarning
from lightning_cf.learner.keeping import state_of
from lightning_cf.tasks.evaluation import constant_predictor, evaluate, judge
from lightning_cf.tasks.scoring_check import check_scoring
from lightning_cf.tasks.targets import one_hot_labels


def of(x, y, batch_size=16):
    return DataLoader(TensorDataset(x, y), batch_size)


def targets(change, size=64, classes=(0, 1)):
    x, y = numbers(size, classes)
    return of(x, change(y))


def soft_loss(logits, target):
    return F.binary_cross_entropy_with_logits(logits.clamp(-50, 50), target.float())


def one_hot(y):
    return F.one_hot(y, 4)


def changed(at, value, change=lambda y: y):
    """Data with one number or label changed."""
    x, y = numbers()
    y = change(y)
    if isinstance(value, float) and y.dtype == torch.int64:
        x[at] = value
    else:
        y[at] = value
    return of(x, y)


# One-hot rows are labels


@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.uint8])
def test_one_hot_targets_are_judged_as_labels_are(kind):
    found = []
    for change in (lambda y: y, lambda y: one_hot(y).to(kind)):
        loss = soft_loss if found else lambda logits, y: soft_loss(logits, one_hot(y))
        task = Task("a", {"train": targets(change), "val": targets(change)}, classes=[0, 1])
        net = ContinualModule(Net(loss=loss))
        fit(net, task, max_epochs=2)
        records = [(r["accuracy"], r["ablation_accuracy"], r["claimed"]) for r in state_of(net).ledger.records]
        with state_of(net).showing(net, [task]):
            shown = state_of(net).showing(net, [task])
            found.append((records, constant_predictor(net, task, task.judging_batches(), shown=shown)))
    assert found[0] == found[1]
    assert found[0][0][0][0] > 0


@pytest.mark.parametrize("strategy", ["auto", "all"])
def test_tasks_with_one_hot_targets_are_inferred(strategy):
    task = Task("a", {"train": targets(one_hot), "val": targets(one_hot)}, classes=[0, 1])
    net = ContinualModule(Net(loss=soft_loss))
    three = [TaskInferenceCallback(strategy)]
    fit(net, task, three, max_epochs=1)
    fit(net, task, three, max_epochs=1)
    assert [known["name"] for known in net.ledger.inference["tasks"]] == ["a"]


def test_only_rows_of_a_single_one_are_one_hot():
    rows = torch.eye(3)
    assert one_hot_labels(rows).tolist() == [0, 1, 2]
    for other in (rows * 2, rows * 0, rows + rows.flip(0), rows[:, :1], rows[0], rows.bool() | True):
        assert one_hot_labels(other) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda y: 0.9 * one_hot(y) + 0.025,
        lambda y: one_hot(y).float() + one_hot((y + 1) % 4),
        lambda y: y.float(),
        lambda y: torch.where(torch.arange(64)[:, None] < 20, one_hot(y), one_hot(y) + one_hot((y + 1) % 4)),
    ],
    ids=["soft", "multi-label", "numbers", "multi-label later"],
)
def test_targets_that_are_no_labels_need_a_metric(change):
    data = targets(change)
    net = Net(loss=lambda logits, y: logits.clamp(-1, 1).sum())
    with pytest.raises(ContinualError, match=r"Task 'a'.* the default metric counts right classes.*metric=\.\.\."):
        fit(net, Task("a", {"train": data, "val": data}, classes=[0, 1]))
    assert net.steps == 0


def sigmoid(module, batch):
    return module(batch[0]).sigmoid(), batch[1]


def test_multi_label_targets_are_judged_by_their_metric():
    data = targets(lambda y: one_hot(y) + one_hot((y + 1) % 4))
    metric = MultilabelAccuracy(4)
    task = Task("a", {"train": data, "val": data}, outputs=[0, 1, 2, 3], metric=metric, evaluate=sigmoid)
    net = fit(Net(loss=soft_loss), task)
    assert state_of(net).ledger.records[0]["accuracy"] > 0


# Which loader is this task's


@pytest.mark.parametrize("together", [list, lambda pair: dict(zip(("old", "new"), pair, strict=True)), CombinedLoader])
def test_of_several_validation_loaders_that_of_the_task_judges(together):
    old, new = loader(classes=(2, 3)), loader(classes=(0, 1))
    val = together([old, new]) if together is not CombinedLoader else CombinedLoader([old, new], "sequential")
    task = Task("a", {"train": loader(), "val": val}, classes=[0, 1])
    assert {int(label) for _, y in task.judging_batches() for label in y} == {0, 1}
    fit(Net(), task)
    assert task.task_loaders.place == 1


def test_of_several_test_loaders_too(tmp_path):
    tests = [loader(classes=(2, 3)), loader(classes=(0, 1))]
    task = Task("a", {"train": loader(), "val": loader(), "test": tests}, classes=[0, 1])
    run = SequentialTaskRunner(Net(), [task], trainer=quiet_trainer, root=tmp_path)
    run.start()
    assert {int(label) for _, y in run.scoring_batches(task) for label in y} == {0, 1}


def test_several_validation_loaders_none_of_which_is_the_tasks_are_refused():
    val = [loader(classes=(0, 2)), loader(classes=(2, 3))]
    net = Net()
    with pytest.raises(ContinualError, match="none of its 2 val loaders is of these alone: label 2 in loader 0"):
        fit(net, Task("a", {"train": loader(), "val": val}, classes=[0, 1]))
    assert net.steps == 0


def test_hooks_hear_of_which_loader_a_batch_is():
    class Told(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.told.add(dataloader_idx)
            return batch

    task = Task("a", {"train": loader(), "val": [loader(classes=(2, 3)), loader()]}, classes=[0, 1])
    net = Told()
    net.told = set()
    evaluate(net, task, task.judging_batches())
    assert net.told == {1}


# Labels of other tasks


@pytest.mark.parametrize("stage", ["val", "test"])
def test_labels_of_other_tasks_are_named_before_training(stage, tmp_path):
    other = of(*numbers(64, (0, 1, 2)))
    task = Task("a", {"train": loader(), stage: other}, classes=[0, 1])
    net = Net()
    run = SequentialTaskRunner(net, [task], trainer=quiet_trainer, epochs=1, root=tmp_path)
    with pytest.raises(ContinualError, match=r"Task 'a' declares classes \[0, 1\], but batch 0 of .* holds label 2"):
        run.run()
    assert net.steps == 0


def test_one_in_a_later_validation_batch_too():
    net = Net()
    with pytest.raises(ContinualError, match="but batch 2 of its judging data holds label 3"):
        fit(net, Task("a", {"train": loader(), "val": changed(40, 3)}, classes=[0, 1]))
    assert net.steps == 0


@pytest.mark.parametrize("change", [lambda y: y, one_hot])
def test_one_in_a_later_training_batch_stops_the_fit_at_that_batch(change):
    value = 3 if change is not one_hot else torch.tensor([0, 0, 0, 1])
    net = Net(loss=F.cross_entropy if change is not one_hot else lambda z, y: z.clamp(-9, 9).sum())
    train = changed(40, value, lambda y: change(y).float() if change is one_hot else y)
    with pytest.raises(ContinualError, match=r"batch 2 of its training data holds label 3; correct classes"):
        fit(net, Task("a", {"train": train, "val": loader()}, classes=[0, 1]))
    assert net.steps == 2


class Rows(Dataset):
    """Samples as mappings."""

    def __init__(self, labels, classes=(0, 1)):
        self.x, self.y = numbers(64, classes)[0], labels

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


def rows(change=lambda y: y, classes=(0, 1)):
    return DataLoader(Rows(change(numbers(64, classes)[1]), classes), 16)


class RowsNet(Net):
    def training_step(self, batch, batch_idx):
        self.steps += 1
        return F.cross_entropy(self(batch["x"]), batch["labels"])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass


def score_rows(module, batch, change=lambda logits, dim: logits):
    return change(module(batch["x"]), 1), batch["labels"]


def sigmoid_of(logits, dim):
    return logits.sigmoid()


def other(y):
    return torch.where(torch.arange(64) < 40, y, 3)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (rows(), rows(other), "batch 2 of its judging data holds label 3, for which its predictions .* hold no output"),
        (rows(other), rows(), "batch 2 of its training data holds label 3; correct"),
        (rows(lambda y: y + 2), rows(), "but its data holds label 2; correct"),
    ],
    ids=["validation", "training", "all of training"],
)
@pytest.mark.parametrize(
    "score",
    [score_rows, *(partial(score_rows, change=change) for change in (torch.softmax, torch.log_softmax, sigmoid_of))],
    ids=["numbers", "softmax", "log_softmax", "sigmoid"],
)
def test_labels_of_other_tasks_are_named_in_batches_that_are_no_pairs_too(train, val, message, score):
    net = RowsNet()
    with pytest.raises(ContinualError, match=message):
        fit(net, Task("a", {"train": train, "val": val}, classes=[0, 1], evaluate=score))
    assert net.steps == 2 * ("batch 2 of its training" in message)


def either(module, batch):
    """Takes pairs and mappings."""
    return score_rows(module, batch) if isinstance(batch, dict) else (module(batch[0]), batch[1])


def turned(module, batch):
    """Takes pairs, and what has the labels elsewhere than these."""
    return module(batch[0]), batch[-1]


def triples(labels):
    x = numbers(64)[0]
    return DataLoader(TensorDataset(x, torch.zeros_like(labels), labels), 16)


@pytest.mark.parametrize(
    ("val", "score"),
    [(rows(other), either), (triples(other(numbers(64)[1])), turned)],
    ids=["mappings", "triples"],
)
def test_labels_of_other_tasks_are_named_where_validation_batches_are_not_like_training_batches(val, score):
    net = Net()
    net.validation_step = None
    with pytest.raises(ContinualError, match="batch 2 of its judging data holds label 3, for which its predictions"):
        fit(net, Task("a", {"train": loader(), "val": val}, classes=[0, 1], evaluate=score))
    assert net.steps == 0


@pytest.mark.parametrize("at", [2, 150])
def test_batches_that_evaluate_does_not_take_are_said(at, tmp_path):
    """Before training, where they are among those that are looked at."""
    batches = [{"x": x, "labels": y} for x, y in loader(16 * 160)]
    del batches[at]["labels"]
    net, message = Net(), "Task 'a' cannot be scored: its evaluate says: KeyError 'labels'"
    net.validation_step = None
    with pytest.raises(ContinualError, match=message):
        fit(net, Task("a", {"train": loader(), "val": batches}, classes=[0, 1], evaluate=either))
    assert (net.steps == 0) is (at == 2)


def test_of_several_validation_loaders_of_mappings_that_of_the_task_judges():
    val = [DataLoader([], 16), rows(classes=(2, 3)), rows()]
    task = Task("a", {"train": rows(), "val": val}, classes=[0, 1], evaluate=score_rows)
    fit(RowsNet(), task)
    assert task.task_loaders.opened["val"].judges == (2,)


@pytest.mark.parametrize("method", ["finetune", "joint"])
@pytest.mark.parametrize("kind", ["pairs", "mappings"])
def test_baselines_name_labels_of_other_tasks_too(method, kind, tmp_path):
    if kind == "pairs":
        net, task = Net(), Task("a", {"train": targets(other), "val": loader()}, classes=[0, 1])
    else:
        net, task = RowsNet(), Task("a", {"train": rows(other), "val": rows()}, classes=[0, 1], evaluate=score_rows)
    run = SequentialTaskRunner(net, [task], trainer=quiet_trainer, epochs=1, method=method, root=tmp_path)
    with pytest.raises(ContinualError, match=r"Task 'a' declares classes \[0, 1\], but .* training data holds label 3"):
        run.run()


@pytest.mark.parametrize("stage", ["train", "val"])
def test_labels_in_a_column_are_labels(stage):
    given = {"train": targets(lambda y: y[:, None]), "val": targets(lambda y: y[:, None])}
    net = Net(loss=lambda logits, y: F.cross_entropy(logits, y.squeeze(1)))
    fit(net, Task("a", given, classes=[0, 1]))
    with pytest.raises(ContinualError, match=r"batch 2 of its (training|judging) data holds label 3; correct classes"):
        fit(net, Task("b", given | {stage: targets(lambda y: other(y)[:, None])}, classes=[0, 1], outputs=[2, 3]))


@pytest.mark.parametrize("score", [None, lambda net, batch: (net(batch[0]), batch[1])], ids=["default", "own"])
def test_data_of_which_no_label_counts_are_refused(score):
    nothing, net = targets(lambda y: y * 0 - 100), Net()
    with pytest.raises(ContinualError, match=r"all labels of .* are left out \(-100\)"):
        fit(net, Task("a", {"train": loader(), "val": nothing}, classes=[0, 1], evaluate=score))
    assert net.steps == 0
    later = DataLoader(ConcatDataset([nothing.dataset, loader().dataset]), 16)
    assert fit(net, Task("a", {"train": loader(), "val": later}, classes=[0, 1], evaluate=score)).steps == 4


def test_an_evaluate_whose_labels_have_no_column_is_refused():
    data = loader(classes=(2, 3))
    task = Task("a", {"train": data, "val": data}, classes=[2, 3], evaluate=lambda net, b: (net(b[0])[:, 2:4], b[1]))
    net = Net()
    with pytest.raises(ContinualError, match="holds label 2, for which its predictions of 2 columns hold no output"):
        fit(net, task)
    assert net.steps == 0


def test_whether_predictions_depend_on_the_network_is_tried_on_weights_that_are_put_back():
    net = Net()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    data = of(*numbers())
    task = Task("a", {"train": data, "val": data}, classes=[0, 1], evaluate=lambda net, b: (decided(net, b), b[1]))
    check_scoring(net, task)  # that a class is decided, not scored, is no matter
    task = Task("a", {"train": data, "val": data}, classes=[0, 1], evaluate=lambda net, b: (0 * net(b[0]), b[1]))
    with pytest.raises(ContinualError, match="predicts the same whatever the network's weights are"):
        check_scoring(net, task)
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


def decided(net, batch):
    return F.one_hot(net(batch[0]).argmax(1), net(batch[0]).shape[1]).float()


@pytest.mark.parametrize(
    ("found", "kind"), [(None, "a NoneType"), ({}, "a dict"), ((1, 2, 3), "3 things"), (torch.ones(2), "a Tensor")]
)
def test_an_evaluate_that_gives_no_pair_is_refused_by_what_it_gives(found, kind):
    task = Task("a", {"train": loader(), "val": loader()}, classes=[0, 1], evaluate=lambda net, batch: found)
    with pytest.raises(ContinualError, match=f"Task 'a': its evaluate gives {kind}, not two tensors"):
        fit(Net(), task)


def test_labels_on_another_device_are_looked_at_without_waiting():
    task = Task("a", {"train": loader()}, classes=[0, 1])
    watch = LabelWatch(Net(), task)
    for number, labels in enumerate(([0, 1], [1, -100], [1, 5], [7, 0])):
        watch._note(torch.tensor(labels), number)
    with pytest.raises(ContinualError, match="batch 2 of its training data holds label 5"):
        watch.settle()
    watch.settle()


class Unlabelled(Net):
    def __init__(self, ignored):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(ignore_index=ignored)
        self.loss = self.criterion


def test_labels_that_count_for_nothing_may_be_there():
    fit(Net(), Task("a", {"train": changed(slice(40, 44), -100), "val": changed(40, -100)}, classes=[0, 1]))
    data = changed(slice(40, 44), 99)
    metric = MulticlassAccuracy(4, average="micro", ignore_index=99)
    fit(Unlabelled(99), Task("a", {"train": data, "val": data}, classes=[0, 1], metric=metric))


def test_what_is_left_out_does_not_count():
    task = Task("a", {"train": loader()}, classes=[0, 1], evaluate=lambda module, batch: batch)
    predictions = torch.eye(4)[[0, 1, 0]]
    assert evaluate(Net(), task, [(predictions, torch.tensor([0, 1, -100]))]) == 1.0
    predictions[2] = torch.nan
    assert evaluate(Net(), task, [(predictions, torch.tensor([0, 1, -100]))]) == 1.0


class Pixels(Net):
    def forward(self, x):
        return self.net(x).unsqueeze(-1).expand(-1, -1, 3)


@pytest.mark.parametrize("void", [-100, 255])
def test_void_pixels_are_said_unless_the_metric_leaves_them_out(void):
    x, y = numbers()
    y = y[:, None].repeat(1, 3)
    y[:, 2] = void
    task = Task("a", {"train": of(x, y), "val": of(x, y)}, classes=[0, 1])
    net = Pixels()
    if void == -100:
        assert 0 <= evaluate(net, task, task.judging_batches()) <= 1
        return
    with pytest.warns(DataWarning, match=r"holds label 255, which counts as wrong.*ignore_index=255"):
        evaluate(net, task, task.judging_batches())
    own = MulticlassAccuracy(4, average="micro", ignore_index=255)
    evaluate(net, Task("a", {"train": of(x, y), "val": of(x, y)}, classes=[0, 1], metric=own), [(x, y)])


def test_void_pixels_are_said_once_a_task(recwarn):
    x, y = numbers()
    y = y[:, None].repeat(1, 3)
    y[:, 2] = 255
    task = Task("a", {"train": of(x, y), "val": of(x, y)}, classes=[0, 1])
    net = Pixels()
    for _ in range(3):
        evaluate(net, task, task.judging_batches())
    assert sum("holds label 255" in str(each.message) for each in recwarn) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"metric": MulticlassAccuracy(4, top_k=2)},
        {
            "metric": MulticlassAccuracy(4),
            "evaluate": lambda net, batch: (net(batch[0])[:, :2].argmax(1), batch[1] + 2),
        },
    ],
    ids=["top k of k", "other numbers"],
)
def test_a_score_that_random_weights_have_too_is_said(options):
    task = Task("a", {"train": loader(), "val": loader()}, classes=[0, 1], **options)
    with pytest.warns(DataWarning, match=r"Task 'a': its MulticlassAccuracy is [01] on .* and so it is with random"):
        fit(Net(), task)


def test_a_metric_that_tells_networks_apart_is_not_warned_of(recwarn):
    fit(Net(), Task("a", {"train": loader(), "val": loader()}, classes=[0, 1]), max_epochs=3)
    assert not [each for each in recwarn if issubclass(each.category, DataWarning)]


@pytest.mark.parametrize(("size", "batch"), [(64, 16), (6000, 1400)])
def test_judging_data_of_one_class_are_said(size, batch):
    x, y = numbers(size)
    order = y.argsort(stable=True)
    task = Task("a", {"train": loader(), "val": of(x[order], y[order], batch)}, classes=[0, 1])
    told = rf"but the {2 * batch} samples that judge its partition are all of class 0: the others"
    with pytest.warns(DataWarning, match=told):
        fit(Net(), task, limit_val_batches=2, max_epochs=1)


@pytest.mark.parametrize("change", [lambda y: y, lambda y: F.one_hot(y, 4).float()], ids=["labels", "one-hot"])
def test_classes_that_a_validation_set_lacks_are_said(change):
    x, y = numbers(64, classes=(0, 1, 2))
    task = Task("a", {"train": of(x, change(y), 16), "val": of(x[y < 2], change(y)[y < 2], 16)}, classes=[0, 1, 2])
    with pytest.warns(DataWarning, match=r"has 3 classes, but the \d+ samples that .* are none of classes 2: these"):
        fit(Net(), task, max_epochs=1)


def test_rare_classes_that_nothing_is_held_out_of_are_none_to_be_told(recwarn):
    x, y = numbers(64, classes=(0, 1))
    y[0] = 2
    fit(Net(), Task("a", {"train": of(x, y, 16)}, classes=[0, 1, 2]), max_epochs=1)
    assert not [each for each in recwarn if "count for nothing" in str(each.message)]


def test_an_evaluate_may_number_labels_anew():
    data = loader(classes=(2, 3))
    task = Task(
        "a", {"train": data, "val": data}, classes=[2, 3], evaluate=lambda net, b: (net(b[0])[:, 2:4], b[1] - 2)
    )
    net = fit(Net(), task)
    shown = state_of(net).showing(net, [task])
    assert constant_predictor(net, task, task.judging_batches(), shown=shown) == 0.5


# Numbers that are none


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [3, 40])
def test_validation_data_that_are_not_finite_are_named_before_training(value, at):
    net = Net()
    named = f"predictions for batch {at // 16} of its judging data are NaN or infinite.*batch itself"
    with pytest.raises(ContinualError, match=named):
        fit(net, Task("a", {"train": loader(), "val": changed(at, value)}, classes=[0, 1]))
    assert net.steps == 0


def test_predictions_that_are_not_finite_are_never_scored():
    task = Task(
        "a", {"train": loader(), "val": loader()}, classes=[0, 1], evaluate=lambda net, b: (net(b[0]) / 0, b[1])
    )
    with pytest.raises(
        ContinualError, match=r"Task 'a': predictions for batch 0 of its judging data are NaN or infinite"
    ):
        fit(Net(), task)


def test_outputs_that_are_masked_with_infinity_are_scored():
    def masked(module, batch):
        return module(batch[0]).masked_fill(torch.tensor([False, False, True, True]), -torch.inf), batch[1]

    fit(Net(), Task("a", {"train": loader(), "val": loader()}, classes=[0, 1], evaluate=masked))


def test_targets_that_are_not_finite_are_named():
    x, y = numbers()
    y = y.float()[:, None].repeat(1, 4)
    y[20] = torch.nan
    task = Task("a", {"train": of(x, y), "val": of(x, y)}, outputs=[0, 1, 2, 3], metric=MeanSquaredError())
    with pytest.raises(ContinualError, match="targets of batch 1 of the data that it is scored on are NaN or infinite"):
        evaluate(Net(), task, task.judging_batches())


# Metrics


class NoNumber(Metric):
    higher_is_better = True

    def update(self, predictions, target):
        pass

    def compute(self):
        return torch.tensor(torch.nan)


class Raises(NoNumber):
    def compute(self):
        raise RuntimeError("no.")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (MulticlassAccuracy(4, average=None), r"its metric MulticlassAccuracy gives a tensor of shape \[4\], but"),
        (NoNumber(), r"its NoNumber is nan on the data that judges its partition"),
        (Raises(), r"Task 'a' cannot be scored: no. That is what its metric says"),
    ],
)
def test_metrics_that_give_no_single_number_are_refused_before_training(metric, message):
    net = Net()
    with pytest.raises(ContinualError, match=message):
        fit(net, Task("a", {"train": loader(), "val": loader()}, classes=[0, 1], metric=metric))
    assert net.steps == 0


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, lambda value: np.array([value])])
def test_a_metric_may_give_a_number_of_numpy(kind):
    class OfNumpy(MulticlassAccuracy):
        def compute(self):
            return kind(float(super().compute()))

    task = Task("a", {"train": loader(), "val": loader()}, classes=[0, 1], metric=OfNumpy(4))
    assert 0 <= evaluate(Net(), task, task.judging_batches()) <= 1


def test_a_metric_without_a_direction_is_said():
    task = Task(
        "a",
        {"train": loader(), "val": loader()},
        classes=[0, 1],
        metric=MeanMetric(),
        evaluate=lambda net, b: (net(b[0]).softmax(1)[:, 0], torch.ones(len(b[1]))),
    )
    with pytest.warns(DataWarning, match="Task 'a': MeanMetric does not say whether higher is better; it is taken"):
        fit(Net(), task)


@pytest.mark.parametrize(
    "predictions",
    [lambda z: z[:, 0], lambda z: z[:3], lambda z: (z, z), lambda z: z[:, :, None]],
    ids=["one number a sample", "another number of samples", "a tuple", "another axis"],
)
def test_predictions_that_fit_no_targets_are_refused_before_training(predictions):
    net = Net()
    own = lambda module, batch: (predictions(module(batch[0])), batch[1])  # noqa: E731
    task = Task("a", {"train": loader(), "val": loader()}, classes=[0, 1], evaluate=own)
    with pytest.raises(ContinualError, match="Task 'a'"):
        fit(net, task)
    assert net.steps == 0


# Batches that hold no samples


def without(left_out, nothing):
    """A loader whose collate_fn leaves samples out that it cannot read, of which a batch may be made."""

    def collate(samples):
        kept = [(x, y) for at, x, y in samples if int(at) not in left_out]
        return tuple(map(torch.stack, zip(*kept, strict=True))) if kept else nothing

    return DataLoader(TensorDataset(torch.arange(64), *numbers(64)), 16, collate_fn=collate)


class Lenient(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if len(batch[0]) else None

    def validation_step(self, batch, batch_idx):
        pass


@pytest.fixture(params=[None, (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))], ids=["None", "empty"])
def nothing(request):
    return request.param


@pytest.mark.parametrize("at", [0, 16, 48])
def test_a_batch_without_samples_counts_nothing(at, nothing):
    given = without(range(at, at + 16), nothing)
    held = DataLoader(Subset(TensorDataset(*numbers(64)), [i for i in range(64) if not at <= i < at + 16]), 16)
    found = []
    for data in (given, held):
        task, net = Task("a", {"train": loader(), "val": data, "test": data}, classes=[0, 1]), Lenient()
        fit(net, task)
        with state_of(net).showing(net, [task]):
            found.append((judge(net, task), evaluate(net, task, task.task_loaders.testing()), net(numbers()[0])))
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("at", [0, 16, 48])
def test_a_training_batch_without_samples_is_passed_over(at, nothing, tmp_path):
    task = Task("a", {"train": without(range(at, at + 16), nothing), "val": loader(), "test": loader()}, classes=[0, 1])
    net = Lenient()
    SequentialTaskRunner(net, [task], trainer=quiet_trainer, epochs=1, invariance_epochs=1, root=tmp_path).run()
    assert net.steps == 6


@pytest.mark.parametrize(
    ("stage", "message"), [("val", "no batch came of its judging data"), ("train", "has no training data")]
)
def test_data_of_empty_batches_alone_are_refused(stage, message, nothing):
    net = Lenient()
    with pytest.raises(ContinualError, match=message):
        fit(net, Task("a", {"train": loader(), "val": loader(), stage: without(range(64), nothing)}, classes=[0, 1]))
    assert net.steps == 0


class Numbered(Net):
    """Learns labels as it numbers them itself."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.loss(self(batch[0]), self.number(batch[1]))

    validation_step = None


def from_hundred(y):
    return y - 100


def in_place(y):
    return y.sub_(100)


def fives(y):
    return y.div(5, rounding_mode="floor")


@pytest.mark.parametrize(
    ("number", "change"),
    [(from_hundred, lambda y: y + 100), (in_place, lambda y: y + 100), (fives, lambda y: 7 * y)],
)
@pytest.mark.filterwarnings("error::lightning_cf.errors.DataWarning")
def test_labels_that_evaluate_numbers_anew_are_classes_by_their_new_numbers(number, change):
    x, y = numbers(64)
    data = TensorDataset(x, change(y))
    loaders = {stage: DataLoader(data, 16) for stage in ("train", "val")}
    task = Task("a", loaders, classes=[0, 1], evaluate=lambda net, batch: (net(batch[0]), number(batch[1])))
    net = Numbered(number)
    fit(net, task, max_epochs=3)
    assert (net(x)[:, :2].argmax(1) == y).float().mean() > 0.9


def test_a_training_step_that_does_not_number_labels_as_evaluate_does_is_told():
    x, y = numbers(64)
    loaders = {stage: DataLoader(TensorDataset(x, y + 2 * (y == 1)), 16) for stage in ("train", "val")}
    task = Task("a", loaders, classes=[0, 1], evaluate=lambda net, batch: (net(batch[0]), batch[1].clamp(max=1)))
    with pytest.raises(ContinualError, match=r"infinite. The batch holds label 3, which evaluate= makes a class"):
        fit(Net(), task)


def test_a_label_that_evaluate_makes_no_class_is_refused():
    data = TensorDataset(numbers(64)[0], numbers(64)[1] + 100)
    loaders = {stage: DataLoader(data, 16) for stage in ("train", "val")}
    task = Task("a", loaders, classes=[0, 1], evaluate=lambda net, batch: (net(batch[0]), batch[1] - 99))
    with pytest.raises(ContinualError, match=r"declares classes \[0, 1\], but its data holds label 10[01]; correct"):
        fit(Net(), task)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32])
def test_labels_without_a_sign_are_scored(dtype):
    data = TensorDataset(numbers(64)[0], numbers(64)[1].to(dtype))
    loaders = {stage: DataLoader(data, 16) for stage in ("train", "val")}
    fit(Numbered(torch.Tensor.long), Task("a", loaders, classes=[0, 1]), max_epochs=1)

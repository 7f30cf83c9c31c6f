"""Task inference in projects as people have them: their loops, data, layers and names."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from clouds import INPUTS, Net, clouds, learned, loaders, pair, points
from learning import classifier, fit, quiet_trainer, tasks, three
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset, default_collate
from torchmetrics import MeanSquaredError
from views import labels, view

from lightning_cf import (
    Classifier,
    ContinualError,
    ContinualModule,
    MaskedGradientCallback,
    SequentialTaskRunner,
    Task,
    TaskInferenceCallback,
)
from lightning_cf.learner.inferring import inference_of
from lightning_cf.learner.keeping import state_of
from lightning_cf.sequence.joint import JointTask
from lightning_cf.task_inference import STRATEGIES
from lightning_cf.task_inference.statistics import LocalSubspaces, Mahalanobis
from lightning_cf.task_inference.strategies import Strategy

pytestmark = pytest.mark.filterwarnings("ignore")


def right(module, classes, **options):
    x, y = points(classes, seed=5)
    return float((module.predict(x, **options).classes == y).float().mean())


def flat(known):
    """All that is kept of a task alone."""
    fitted = {f"{name}.{key}": value for name, kept in known.fitted.items() for key, value in kept.items()}
    return {**fitted, **known.calibration}


@pytest.mark.parametrize("beside", [[], ["subspaces"]], ids=["alone", "subspaces"])
def test_the_wrapper_alone_knows_every_task_that_was_fitted(beside):
    """Its partition comes at a fit's end, so no fit seals a task: the next one does."""
    module, sequence = ContinualModule(Net(64)), pair()
    for task in sequence:
        module.add_task(task)
    ours = [TaskInferenceCallback(name) for name in beside]
    fit(module, sequence[0], ours, 8)
    assert [known.name for known in inference_of(module.ledger).tasks] == ["a"]
    assert right(module, [0, 1]) > 0.9
    first = flat(inference_of(module.ledger).tasks[0])
    fit(module, sequence[1], ours, 8)
    assert [known.name for known in inference_of(module.ledger).tasks] == ["a", "b"]
    assert right(module, [7, 3]) > 0.4  # 0 where the task is not known; 0.70 to 0.98 over four seeds
    again = flat(inference_of(module.ledger).tasks[0])
    assert all(torch.equal(again[key], value) for key, value in first.items())
    before = flat(inference_of(module.ledger).tasks[1])
    fit(module, sequence[1], ours, 4)  # its INVARIANCE, after which the seal keeps it anew
    after = inference_of(module.ledger)
    assert [known.name for known in after.tasks] == ["a", "b"]
    assert module.ledger.tasks[1].phase == "sealed"
    now = flat(after.tasks[1])  # what all tasks share was added to once, when it was claimed
    assert all(torch.equal(now[name], value) for name, value in before.items()) == (not beside)


def test_a_head_trains_on_after_a_partition_at_a_fit_s_end():
    module, (task, _) = ContinualModule(Net()), pair()
    module.add_task(task)
    callbacks = [*three(after=1.0), TaskInferenceCallback("reconstruction_logits")]
    fit(module, task, callbacks, 4)
    inference = inference_of(module.ledger)
    assert inference.tasks[0].fitted.keys() == {"reconstruction_logits"}
    assert inference.training.keys() == {"reconstruction"}
    fit(module, task, [*three(after=1.0), TaskInferenceCallback("reconstruction_logits")], 4)
    assert inference_of(module.ledger).training == {}
    assert right(module, [0, 1]) > 0.8


@pytest.mark.parametrize("strategy", ["subspaces", "mahalanobis", "auto"])
def test_scores_do_not_lose_precision_in_a_forward_pass_of_half(strategy):
    module = learned(Net(), pair(), strategy, precision="bf16-mixed")
    x, y = points([7, 3], seed=5)
    loader = DataLoader(TensorDataset(x, y), 200)
    (found,) = quiet_trainer(precision="bf16-mixed").predict(module, dataloaders=loader)
    assert abs(float((found.classes == y).float().mean()) - right(module, [7, 3])) < 0.1
    assert found.probabilities.dtype == torch.float32


def test_few_units_have_scores_beside_their_directions():
    strategy, seen = LocalSubspaces(), view(hidden=(3, 2))
    fitted = strategy.fit(seen, labels(), 2, seen)
    scores = strategy.score(fitted, seen)
    assert float(scores.std()) > 0.01  # not what rounding leaves of a space that is kept whole
    one = view(samples=21, hidden=(3, 2))
    alone = torch.tensor([1] + [0] * 20)
    fitted = strategy.fit(one, alone, 2, one)
    assert float(strategy.score(fitted, view(seed=4, hidden=(3, 2))).amax()) < 0


@pytest.mark.parametrize("strategy", [LocalSubspaces(), Mahalanobis()])
def test_a_class_without_samples_is_left_out(strategy):
    seen = view()
    fitted = strategy.fit(seen, torch.zeros(40, dtype=torch.long), 2, seen)
    assert bool(strategy.score(fitted, seen).isfinite().all())


def test_data_that_come_class_by_class_are_read_on(monkeypatch):
    monkeypatch.setattr("lightning_cf.learner.inferring.SAMPLES", 64)
    x, y = points([0, 1])
    order = y.argsort(stable=True)
    loader = DataLoader(TensorDataset(x[order], y[order]), 16)
    task = Task("a", {"train": loader, "val": loader}, classes=[0, 1])
    module = learned(Net(), [task], "mahalanobis")
    (known,) = inference_of(module.ledger).tasks
    assert len(known.fitted["mahalanobis"]["means"]) == 2
    assert right(module, [0, 1]) > 0.9


def test_a_predict_of_the_user_s_own_stays():
    class Own(Net):
        def predict(self, x):
            return self(x).argmax(1)

        def training_step(self, batch, batch_idx):
            self.predict(batch[0])
            return super().training_step(batch, batch_idx)

    module = learned(Own(), pair()[:1], "subspaces", epochs=2)
    x, _ = points([0, 1])
    assert torch.equal(module.predict(x), module(x).argmax(1))
    assert module.predict_any(x).probabilities.shape == (len(x), 11)
    (found, *_) = quiet_trainer().predict(module, dataloaders=DataLoader(x, 50))
    assert found.probabilities.shape == (50, 11)


def test_layers_may_be_called_by_name():
    class Named(Net):
        def forward(self, x):
            return self.c(input=F.relu(self.b(input=F.relu(self.a(input=x)))))

    assert right(learned(Named(), pair()), [7, 3]) > 0.7


@pytest.mark.parametrize("strategy", ["auto", "statistics"])
def test_layers_may_read_several_rows_a_sample(strategy):
    class Rows(Net):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 16)
            self.c = nn.Linear(48, 10)

        def forward(self, x):
            rows = F.relu(self.b(F.relu(self.a(x.reshape(-1, 4)))))
            return self.c(rows.reshape(len(x), -1))

    module = learned(Rows(), pair(), strategy, epochs=2)
    x, _ = points([0, 1], seed=5)
    both = module.predict(x)
    torch.testing.assert_close(module.predict(x[:1]).scores, both.scores[:1], rtol=1e-3, atol=1e-3)


def numbers(name="numbers", outputs=(4, 5), width=2):
    """A task of numbers."""
    x = points([0, 1])[0]
    return Task(
        name,
        loaders(x, x[:, :width]),
        outputs=list(outputs),
        metric=MeanSquaredError(),
        evaluate=lambda module, batch: (module(batch[0])[:, list(outputs)[:width]], batch[1]),
    )


class Mixed(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self(x)[:, 4 : 4 + y.shape[1]], y) if y.ndim > 1 else F.cross_entropy(self(x), y)


def run(module, sequence, root, **options):
    options = {"epochs": 4, "invariance_epochs": 3, **options}
    return SequentialTaskRunner(module, sequence, trainer=quiet_trainer, root=root, **options).run()


@pytest.mark.parametrize("width", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_tasks_of_numbers_among_tasks_of_classes_do_not_count(tmp_path, width):
    sequence = [clouds("a", [0, 1]), numbers(outputs=range(4, 4 + width), width=width), clouds("b", [7, 3])]
    module = Mixed()
    result = run(module, sequence, tmp_path)
    found = result.class_incremental
    assert len(found["accuracy_matrix"][-1]) == 2
    assert found["average_accuracy"] > 0.6
    assert result.strategies[found["strategy"]].as_dict()["none_auroc"][-1] is None
    x, _ = points([7, 3], seed=5)
    assert set(module.predict(x).tasks.tolist()) <= {-1, 0, 2}  # positions in the sequence


def test_a_first_task_of_numbers_does_not_stop_inference(tmp_path):
    module = Mixed()
    run(module, [numbers(), clouds("a", [0, 1]), clouds("b", [7, 3])], tmp_path)
    assert [known.name for known in inference_of(module.ledger).tasks] == ["a", "b"]
    x, _ = points([7, 3], seed=5)
    assert float((module.predict(x).tasks == 2).float().mean()) > 0.6


class Heads(LightningModule):
    """A head a task, which ``forward`` does not run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(INPUTS, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.heads = nn.ModuleDict({"a": nn.Linear(32, 2), "b": nn.Linear(32, 2)})

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        name = self.trainer.datamodule.name
        return F.cross_entropy(self.heads[name](self(batch[0])), batch[1])

    configure_optimizers = Net.configure_optimizers


@pytest.mark.parametrize("method", ["partition", "finetune"])
def test_heads_that_only_their_task_runs_say_nothing_of_tasks(tmp_path, method):
    def task(name, classes, outputs):
        x, y = points(classes)
        evaluate = lambda module, batch: (module.heads[name](module(batch[0])), batch[1])  # noqa: E731
        return Task(name, loaders(x, (y == classes[1]).long()), classes=[0, 1], outputs=outputs, evaluate=evaluate)

    masking = MaskedGradientCallback(mask_outputs=False)
    result = run(
        Heads(), [task("a", [0, 1], [0, 1]), task("b", [7, 3], [2, 3])], tmp_path, masking=masking, method=method
    )
    assert result.strategies == {}
    assert result.accuracy.average > 0.8


def test_the_head_trains_under_a_backward_pass_of_the_user_s_own():
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            super().training_step(batch, batch_idx).backward()
            optimizer.step()

    module = learned(Manual(), pair()[:1])
    (known,) = inference_of(module.ledger).tasks
    assert float(known.fitted["reconstruction_logits"]["code"].abs().max()) > 0.01  # it starts at zero


def test_auto_takes_no_head_where_batches_have_no_labels_to_train_it_on():
    x, y = points([0, 1])
    soft = 0.9 * F.one_hot(y, 10) + 0.05 * F.one_hot(torch.tensor([0, 1]), 10).sum(0)  # one-hot targets are labels
    task = Task(
        "a",
        loaders(x, soft),
        classes=[0, 1],
        evaluate=lambda module, batch: (module(batch[0]), batch[1].argmax(1)),
    )

    class Soft(Net):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never trained")
        module = learned(Soft(), [task])
    assert inference_of(module.ledger).strategies == ("lda", "lda_units")


def test_the_runner_takes_a_strategy_of_one_s_own(tmp_path, monkeypatch):
    class Sure(Strategy):
        name = "sure"

        def score(self, fitted, view):
            return view.logits.log_softmax(1).amax(1)

    monkeypatch.setitem(STRATEGIES, "sure", Sure())  # taken out again when the test ends
    result = run(Net(), pair(), tmp_path, task_inference=Sure())
    assert result.class_incremental["strategy"] == "sure"


def test_a_trainer_predicts_for_networks_of_two_inputs():
    class Two(Net):
        def forward(self, x, z):
            return super().forward(torch.cat([x, z], dim=1))

        def training_step(self, batch, batch_idx):
            (x, z), y = batch
            return F.cross_entropy(self(x, z), y)

    x, y = points([0, 1])
    halves = [((a[:6], a[6:]), b) for a, b in zip(x, y, strict=True)]
    loader = DataLoader(halves, 16)
    task = Task(
        "a",
        {"train": loader, "val": loader},
        classes=[0, 1],
        evaluate=lambda module, batch: (module(*batch[0]), batch[1]),
    )
    module = learned(Two(), [task], "energy", epochs=4)
    found = quiet_trainer().predict(module, dataloaders=DataLoader(halves, 200))
    assert torch.equal(found[0].probabilities, module.predict((x[:, :6], x[:, 6:])).probabilities)


class Pair(Net):
    """Takes one argument that holds two tensors."""

    def forward(self, pair, mode=None):
        return super().forward(torch.cat(list(pair), dim=1))


class Required(Pair):
    def forward(self, pair):
        return super().forward(pair)


class Optional(Net):
    """Takes two arguments, or one."""

    def forward(self, x, z=None):
        return super().forward(torch.cat([x, torch.zeros_like(x) if z is None else z], dim=1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(*batch[0]), batch[1])


def collated(samples, kind):
    x, y = default_collate(samples)
    return kind(x), y


@pytest.mark.parametrize("collate", [list, tuple])
@pytest.mark.parametrize(
    ("net", "evaluate"),
    [
        (Pair, None),
        (Required, None),
        (Required, lambda module, batch: (module(batch[0]), batch[1])),
        (Optional, lambda module, batch: (module(*batch[0]), batch[1])),
    ],
    ids=["one of two", "one", "one by evaluate", "several"],
)
def test_an_input_of_several_tensors_is_predicted_as_it_was_fitted(net, evaluate, collate):
    x, y = points([0, 1])
    halves = [((a[:6], a[6:]), b) for a, b in zip(x, y, strict=True)]
    loader = DataLoader(halves, 100, collate_fn=partial(collated, kind=collate))
    task = Task("a", {"train": loader, "val": loader}, classes=[0, 1], evaluate=evaluate)
    module = learned(net(), [task], "energy", epochs=4)
    found = quiet_trainer().predict(module, dataloaders=loader)
    alone, other = module.predict((x[:100, :6], x[:100, 6:])), module.predict([x[:100, :6], x[:100, 6:]])
    assert float((alone.classes == y[:100]).float().mean()) > 0.9
    assert torch.equal(found[0].probabilities, alone.probabilities)
    assert torch.equal(other.probabilities, alone.probabilities)
    assert inference_of(module.ledger).nested == (net is not Optional)


def test_a_module_that_learned_numbers_alone_predicts_as_lightning_does():
    class Rows(Mixed):
        def forward(self, x):
            return super().forward(x[0] if isinstance(x, list) else x)

    module = learned(Rows(), [numbers()], epochs=2)
    x, _ = points([0, 1])
    (found,) = quiet_trainer().predict(module, dataloaders=DataLoader(x, 200))
    torch.testing.assert_close(found, module(x))


def test_a_wrapped_module_is_copied_and_pickled():
    module, sequence = ContinualModule(classifier()), tasks(2)
    for task in sequence:
        module.add_task(task)
    for task in sequence:
        fit(module, task, [], 2)
    x, _ = next(iter(sequence[0].test_dataloader()))
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(other) is type(module)
        assert isinstance(other, Classifier)
        assert torch.equal(other.predict(x).probabilities, module.predict(x).probabilities)
        assert state_of(other).ledger is not state_of(module).ledger


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*points([0, 1]), strict=True)


@pytest.mark.parametrize("kind", ["sampler", "stream"])
def test_joint_training_refuses_what_it_cannot_draw_from(kind):
    data = TensorDataset(*points([0, 1]))
    batches = partial(DataLoader, data, batch_sampler=BatchSampler(RandomSampler(data), 16, drop_last=False))
    loader = batches() if kind == "sampler" else DataLoader(Stream(), 16)
    task = Task("a", {"train": loader, "val": loaders(*points([0, 1]))["val"]}, classes=[0, 1])
    with pytest.raises(ContinualError, match=r"method='joint' .* task 'a'"):
        JointTask([task], None)


def test_a_forward_pass_that_leaves_a_head_out_predicts_nothing():
    class Two(Heads):
        short = False

        def forward(self, x):
            h = self.body(x)
            return self.heads["a"](h) if self.short else torch.cat([self.heads["a"](h), self.heads["b"](h)], dim=1)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    def task(name, outputs):
        x, y = points([0, 1], seed=outputs[0])
        return Task(name, loaders(x, y + outputs[0]), classes=outputs)

    module = learned(Two(), [task("a", [0, 1]), task("b", [2, 3])], "energy", epochs=3)
    x, _ = points([0, 1])
    assert module.predict(x).probabilities.shape == (200, 5)
    module.short = True
    with pytest.raises(ContinualError, match=r"'heads\.b' does not run in the forward pass"):
        module.predict(x)

"""Task inference on live modules: what is trained beside the network, what is kept, and what is predicted."""

import warnings
from functools import partial

import pytest
import torch
from learning import classifier, fit, images, inferred, quiet_trainer, tasks, three
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_cf import (
    Classifier,
    ContinualError,
    ContinualModule,
    PartitionCallback,
    Prediction,
    SequentialTaskRunner,
    Task,
    TaskInferenceCallback,
)
from lightning_cf.data import permuted_tasks
from lightning_cf.learner.inferring import inference_of, view_of
from lightning_cf.learner.keeping import state_of
from lightning_cf.learner.predicting import predict_any
from lightning_cf.models import CNN, MLP
from lightning_cf.network.forward import named_tensors
from lightning_cf.task_inference import STRATEGIES, Sites, Strategy, View, read
from lightning_cf.task_inference.cumulative import Cumulative
from lightning_cf.task_inference.reconstruction import Reconstruction
from lightning_cf.task_inference.trained import changes_input
from lightning_cf.tasks.contexts import seeded
from lightning_cf.utilities.randomness import keyed_generator

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
    pytest.mark.filterwarnings("ignore:.*and so it is with random weights"),
]


def learned(strategy="auto", count=3, network="mlp", epochs=6, sequence=None, module=None, **options):
    """A ContinualModule after some tasks, and the tasks."""
    module = ContinualModule(module or classifier(network))
    sequence = sequence or tasks(count)
    for task in sequence:
        module.add_task(task)
    for task in sequence:
        fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback(strategy)], epochs, **options)
    return module, sequence


@pytest.fixture(scope="module")
def every():
    """After each of three tasks: what is kept of the first one, and its scores of a fixed batch."""
    module, sequence, seen = ContinualModule(classifier()), tasks(), []
    x = torch.cat([batch[0] for task in sequence for batch in task.test_dataloader()])
    for task in sequence:
        fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback("all")], 8)
        inference = inference_of(module.ledger)
        readout = inference.read(module, module, x)
        scores = {name: inference.infer(readout, name).scores[:, 0] for name in inference.strategies}
        seen.append((inference.tasks[0], scores))
    return module, sequence, seen


def test_all_that_the_network_allows_is_fitted(every):
    module, _, _ = every
    inference = inference_of(module.ledger)
    assert set(inference.strategies) == set(STRATEGIES)
    assert inference.training == {}


def over_rows():
    """A linear layer that reads the rows of an image one by one."""
    return nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 16), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


def parametrised():
    """Linear layers whose weights are computed."""
    first, second = (nn.utils.parametrizations.weight_norm(nn.Linear(n, 12)) for n in (64, 12))
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(12, 10))


@pytest.mark.parametrize("make", [over_rows, parametrised])
def test_networks_that_no_head_leads_back_through_have_statistics(make):
    module = ContinualModule(Classifier(make(), optimizer=partial(torch.optim.Adam, lr=0.003)))
    for task in tasks(2):
        fit(module, task, [*three(), TaskInferenceCallback("auto")], 2)
    assert set(inference_of(module.ledger).strategies) in ({"lda", "lda_units"}, {"lda", "energy"})
    assert len(module.predict(torch.rand(5, 1, 8, 8)).classes) == 5


@pytest.mark.parametrize("name", sorted(name for name, s in STRATEGIES.items() if not isinstance(s, Cumulative)))
def test_what_is_kept_of_a_task_and_its_scores_stay_bitwise_when_later_tasks_come(every, name):
    _, _, seen = every
    first, scores = seen[0]
    for known, later in seen[1:]:
        assert known.fitted[name].keys() == first.fitted[name].keys()
        assert all(torch.equal(known.fitted[name][key], value) for key, value in first.fitted[name].items())
        assert torch.equal(known.calibration[name], first.calibration[name])
        assert torch.equal(later[name], scores[name])


def test_predictions_name_class_task_and_none(every):
    module, sequence, _ = every
    x, y = next(iter(sequence[1].test_dataloader()))
    found = module.predict(x)
    assert found.classes.shape == found.tasks.shape == found.scores.shape == y.shape
    assert found.probabilities.shape == (len(y), 11)
    torch.testing.assert_close(found.probabilities.sum(dim=1), torch.ones(len(y)))
    assert float((found.classes == y).float().mean()) > 0.7
    assert float((found.tasks == 1).float().mean()) > 0.7
    assert torch.equal(found.classes == -1, found.tasks == -1)
    assert not found.probabilities.requires_grad
    assert float(module.predict(100 * torch.rand(50, 1, 8, 8)).probabilities[:, -1].mean()) > 0.9
    assert float((module.predict(100 * torch.rand(50, 1, 8, 8)).classes == -1).float().mean()) > 0.9


def test_other_strategies_predict_on_request(every):
    module, sequence, _ = every
    x, _ = next(iter(sequence[0].test_dataloader()))
    a, b = module.predict(x), module.predict(x, strategy="plain")
    assert not torch.equal(a.probabilities, b.probabilities)
    with pytest.raises(ContinualError, match="was not fitted when the tasks were sealed"):
        module.predict(x, strategy="magic")


def test_a_trainer_predicts(every):
    module, sequence, _ = every
    loader = sequence[2].test_dataloader()
    found = quiet_trainer(callbacks=[]).predict(module, dataloaders=loader)
    expected = module.predict(next(iter(loader))[0])
    assert torch.equal(found[0].classes, expected.classes)
    assert torch.equal(found[0].probabilities, expected.probabilities)


def test_a_loaded_module_predicts_bitwise_the_same(every, tmp_path):
    module, sequence, _ = every
    x, _ = next(iter(sequence[1].test_dataloader()))
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = ContinualModule(classifier(seed=5))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for a, b in zip(other.predict(x), module.predict(x), strict=True):
        assert torch.equal(a, b)


class OwnWay(Classifier):
    def predict_step(self, batch, batch_idx):
        return "mine"


def test_a_predict_step_of_the_users_stays():
    module = OwnWay(MLP(shape=(1, 8, 8), classes=10, hidden=(16,)))
    module, (task,) = learned("energy", count=1, module=module, epochs=2)
    assert quiet_trainer(callbacks=[]).predict(module, dataloaders=task.test_dataloader())[0] == "mine"


def test_nothing_learned_predicts_nothing():
    with pytest.raises(ContinualError, match="knows no task that it could infer: seal one first"):
        ContinualModule(classifier()).predict(torch.zeros(1, 1, 8, 8))


def test_callbacks_alone_predict_too():
    module, task = classifier(), tasks()[0]
    fit(module, task, [*three(), TaskInferenceCallback()], 8)
    x, y = next(iter(task.test_dataloader()))
    assert float((predict_any(module, x).classes == y).float().mean()) > 0.8


def test_statistics_leave_training_as_it_is():
    found = []
    for callbacks in ([], [TaskInferenceCallback("statistics")]):
        module = classifier()
        for task in tasks(2):
            torch.manual_seed(1)
            fit(module, task, [*three(), *callbacks], 2)
        found.append(named_tensors(module))
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())
    assert set(inference_of(state_of(module).ledger).strategies) == {"lda", "lda_units"}


@pytest.mark.parametrize("network", ["cnn", "resnet"])
def test_networks_without_a_linear_first_layer_are_inferred_by_statistics(network):
    module, sequence = learned("auto", count=2, network=network, epochs=1)
    assert set(inference_of(module.ledger).strategies) == {"lda", "lda_units"}
    assert module.predict(next(iter(sequence[0].test_dataloader()))[0]).classes.ndim == 1


def test_domains_have_outputs_of_their_own_and_predictions_name_the_class():
    module, sequence = learned("auto", sequence=permuted_tasks(images(), count=2), epochs=6)
    for number, task in enumerate(sequence):
        x, y = next(iter(task.test_dataloader()))
        found = module.predict(x)
        assert found.probabilities.shape[1] == 11
        assert float((found.tasks == number).float().mean()) > 0.8
        assert float((found.classes == y).float().mean()) > 0.6


# The head in training


class Own(LightningModule):
    """Adds the head's loss by itself: what the callback is to do on any module."""

    def __init__(self, heads=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.network = MLP(shape=(1, 8, 8), classes=10, hidden=(12, 10))
        self.options = options

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Own):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


def still():
    """A task whose batches come in one order."""
    data = images().train.of_classes([0, 1])
    loader = DataLoader(TensorDataset(data.images, data.labels), 32)
    return Task("still", {"train": loader, "val": loader}, classes=[0, 1])


def one_step(module, task, callback, **options):
    """The weights after one batch of LEARN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callbacks = [*three(after=1.0)[1:], *([] if callback is None else [callback])]
        quiet_trainer(max_steps=1, callbacks=callbacks, **options).fit(module, datamodule=task)
    return {name: tensor.detach().clone() for name, tensor in named_tensors(module).items()}


def expected_step(task, weight, batches=1):
    """The same step with the head's loss written out."""
    module = Own()
    fit_free = Own()
    one_step(
        fit_free, task, TaskInferenceCallback("reconstruction_logits", weight=weight)
    )  # for its structure and ledger
    state = state_of(fit_free)
    sites = Sites.of(module, state.structure, state.ledger, task.name)
    head = inference_of(state.ledger)
    with seeded(0, task.name, "task inference"):
        found = view_of(module, task, sites, task.train_dataloader(), 2000)
    strategy = STRATEGIES[head.strategies[0]]
    assert isinstance(strategy, Reconstruction)
    fitted = strategy.begin(*found, 2, head.unit, keyed_generator(0, task.name, "task inference"))
    loader = iter(task.train_dataloader())
    for _ in range(batches):
        x, y = next(loader)
        readout = read(module, [sites], lambda x=x: setattr(module, "logits", module(x)), keep_graph=True)
        shown = module.logits.masked_fill(~torch.isin(torch.arange(10), torch.tensor(task.classes)), torch.finfo().min)
        loss = F.cross_entropy(shown, y) + weight * strategy.loss(fitted, View.of(readout, sites), y - task.classes[0])
        (loss / batches).backward()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("network.5"):
                parameter.grad[2:] = 0
            parameter -= 0.1 * parameter.grad
    return {name: tensor.detach() for name, tensor in named_tensors(module).items()}


@pytest.mark.parametrize("kind", [Own, Manual])
@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_the_heads_loss_joins_the_modules_own_in_any_loop(kind, weight):
    task = still()
    found = one_step(kind(), task, TaskInferenceCallback("reconstruction_logits", weight=weight))
    expected = expected_step(task, weight)
    plain = one_step(kind(), task, None)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(plain[name], tensor, atol=1e-4) for name, tensor in expected.items())


def test_accumulated_gradients_have_the_heads_share():
    task = still()
    found = one_step(Own(), task, TaskInferenceCallback("reconstruction_logits", weight=2.0), accumulate_grad_batches=2)
    for name, tensor in expected_step(task, 2.0, batches=2).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"gradient_clip_val": 0.1}]
)
def test_heads_train_under_other_settings(options):
    module, sequence = learned("auto", count=2, epochs=10, **options)
    found = [module.predict(next(iter(task.test_dataloader()))[0]).tasks for task in sequence]
    assert float((found[0] == 0).float().mean()) > 0.6
    assert float((found[1] == 1).float().mean()) > 0.6


def test_hooks_go_when_a_fit_ends_or_fails():
    class Failing(Own):
        def on_train_batch_end(self, *args):
            if self.global_step == 3:
                raise RuntimeError("stop")

    for kind in (Own, Failing):
        module = kind()
        hooks = [len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules()]
        with pytest.raises(RuntimeError) if kind is Failing else warnings.catch_warnings():
            fit(module, tasks()[0], [*three(), TaskInferenceCallback()], 2)
        assert [len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules()] == hooks
        assert state_of(module).collect is None


def test_a_head_that_no_batch_trains_says_so():
    class Twice(Own):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(torch.cat([x, x])), torch.cat([y, y]))

    with pytest.warns(UserWarning, match="the head of reconstruction was never trained"):
        fit(Twice(), tasks()[0], [*three(after=1.0), TaskInferenceCallback()], 1)


def regression():
    x = torch.randn(64, 1, 8, 8)
    loader = DataLoader(TensorDataset(x, x.flatten(1)[:, :2]), 16)
    data = {"train": loader, "val": loader}
    return Task(
        "numbers",
        data,
        outputs=[0, 1],
        metric=MeanSquaredError(),
        evaluate=lambda module, batch: (module(batch[0])[:, :2], batch[1]),
    )


class Regression(Own):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0])[:, :2], batch[1])


@pytest.mark.filterwarnings("ignore")
def test_tasks_without_classes_are_left_alone_or_refused():
    module, task = Regression(), regression()
    fit(module, task, [*three(), TaskInferenceCallback()], 2)
    assert inference_of(state_of(module).ledger).tasks == []
    with pytest.raises(ContinualError, match=r"task_inference=energy: task 'numbers' has no classes.*=auto"):
        fit(Regression(), task, [*three(), TaskInferenceCallback("energy")], 2)
    with pytest.raises(ContinualError, match="task_inference=all: task 'numbers' has no classes"):
        fit(Regression(), task, [*three(), TaskInferenceCallback("all")], 2)


def test_a_strategy_that_the_network_does_not_allow_is_refused_before_training():
    module = Classifier(CNN(shape=(1, 8, 8), classes=10, channels=(8, 8), hidden=8))
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ContinualError, match=r"task_inference=reconstruction: it needs a first layer that is linear"):
        fit(module, tasks()[0], [*three(), TaskInferenceCallback("reconstruction")], 2)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_the_runner_refuses_it_when_it_starts_and_leaves_the_folder_to_others(tmp_path):
    def start(strategy):
        module = classifier("cnn")
        before = [p.clone() for p in module.parameters()]
        runner = SequentialTaskRunner(
            module,
            tasks(),
            trainer=quiet_trainer,
            epochs=1,
            invariance_epochs=1,
            task_inference=strategy,
            root=tmp_path,
        )
        try:
            runner.start()
        finally:
            assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        return runner

    with pytest.raises(ContinualError, match=r"task_inference=first_layer: it needs a first layer that is linear"):
        start("first_layer")
    assert start("subspaces").state.ledger.tasks == []
    runner = start("auto")  # nothing was learned with the one before
    runner.phase("baseline", runner.score)
    with pytest.raises(ContinualError, match="holds a run with task_inference"):
        start("subspaces")


@pytest.mark.parametrize("options", [{"strategy": "magic"}, {"weight": 0}, {"lr": -1.0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ContinualError, match=f"task_inference: {next(iter(options))} must be"):
        TaskInferenceCallback(**options)


class Margin(Strategy):
    """How far the best output of a task lies above the second, with a scale that is fitted."""

    name = "margin"

    def fit(self, view, labels, classes, held_out):
        return {"scale": view.logits.std()}

    def score(self, fitted, view):
        best = view.logits.topk(2, dim=1).values
        return (best[:, 0] - best[:, 1]) / fitted["scale"]


def test_a_strategy_of_one_s_own_is_fitted_predicts_and_comes_back_from_a_checkpoint(tmp_path, monkeypatch):
    module, sequence = ContinualModule(classifier()), tasks(2)
    monkeypatch.setitem(STRATEGIES, "margin", Margin())  # and taken out when the test ends
    for task in sequence:
        module.add_task(task)
    for task in sequence:
        fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback(Margin())], 4)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    x, _ = next(iter(sequence[0].test_dataloader()))
    found = module.predict(x)
    assert inference_of(module.ledger).strategies == ("margin",)
    assert set(found.classes.tolist()) <= {0, 1, 2, 3, -1}
    assert [known.fitted["margin"].keys() for known in inference_of(module.ledger).tasks] == [{"scale"}, {"scale"}]
    again = ContinualModule(classifier())
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.predict(x).probabilities, found.probabilities)
    monkeypatch.delitem(STRATEGIES, "margin")
    with pytest.raises(ContinualError, match="a strategy of your own has to be registered first"):
        again.predict(x)


# In the runner


def sequence_runner(root, **options):
    options = {"trainer": quiet_trainer, "epochs": 4, "invariance_epochs": 3, **options}
    return SequentialTaskRunner(classifier(), tasks(), root=root, **options)


def test_the_runner_scores_every_strategy_after_every_task(tmp_path):
    result = sequence_runner(tmp_path, task_inference="unchanged").run()
    assert set(result.strategies) == {name for name, strategy in STRATEGIES.items() if not changes_input(strategy)}
    document = result.class_incremental
    assert document["strategy"] == next(iter(result.strategies))
    assert document["network_parameters"] == sum(p.numel() for p in classifier().parameters())
    for name, scores in result.strategies.items():
        found = scores.as_dict()
        matrix = torch.tensor(found["accuracy_matrix"])
        assert matrix.shape == (3, 3)
        assert float(matrix.triu(1).abs().max()) == 0.0  # classes that were not yet seen are never told
        assert found["average_accuracy"] == pytest.approx(float(matrix[-1].mean()))
        assert found["none_auroc"][-1] is None
        named = found["task_incremental_matrix"][-1]
        for right, by_name in zip(matrix[-1].tolist(), named, strict=True):
            assert right <= by_name + 1e-6  # who names the task takes no right class away
        assert [len(row) for row in found["task_incremental_matrix"]] == [1, 2, 3]
        assert found["task_incremental_accuracy"] == pytest.approx(sum(named) / 3)
        if not isinstance(STRATEGIES[name], Cumulative):  # which say something of a task's classes themselves
            assert named == pytest.approx(result.accuracy.matrix[-1].tolist())
        assert len(found["none_auroc_in_turn"]) == 3
        assert found["none_auroc_in_turn"][-1] == pytest.approx(found["none_auroc"][-2], abs=1e-3)  # the last one again
        assert found["none_auroc_mean"] == pytest.approx(sum(found["none_auroc_in_turn"]) / 3)
        assert all(0 <= value <= 1 for value in found["none_auroc"][:-1])
    # A class that is right is one of the right task's.
    for right, told in zip(document["accuracy_matrix"][-1], document["task_accuracy_matrix"][-1], strict=True):
        assert right <= told + 1e-6
    # The head alone against chance: three tasks of two classes.
    assert document["average_accuracy"] > 0.6
    assert document["stored_floats"] > 0


def test_several_strategies_are_scored_and_the_first_one_predicts(tmp_path):
    runner = sequence_runner(tmp_path, task_inference=["subspaces", Margin()], epochs=1, invariance_epochs=1)
    runner.start()
    runner.phase("baseline", runner.score)
    runner.lock.release()
    runner = sequence_runner(tmp_path, task_inference=["subspaces", Margin()], epochs=1, invariance_epochs=1)
    result = runner.run()  # which goes on
    assert list(result.strategies) == ["subspaces", "margin"]
    assert result.class_incremental["strategy"] == "subspaces"


def test_without_partitions_the_highest_of_all_outputs_decides(tmp_path):
    runner = sequence_runner(tmp_path, method="finetune")
    document = runner.run().class_incremental
    assert document["strategy"] == "joint"
    highest = []
    for task in runner.tasks:
        pairs = [(runner.module(x)[:, :6].argmax(dim=1), y) for x, y in task.test_dataloader()]
        highest.append(float((torch.cat([p for p, _ in pairs]) == torch.cat([y for _, y in pairs])).double().mean()))
    assert document["accuracy_matrix"][2] == pytest.approx(highest)


@pytest.mark.slow
def test_a_run_that_stopped_between_phases_goes_on_bitwise(tmp_path):
    trainer = partial(quiet_trainer, limit_train_batches=3)
    make = partial(sequence_runner, trainer=trainer, epochs=2, invariance_epochs=1)
    whole = make(tmp_path / "whole").run()
    for stop in range(2, 12, 3):
        first = make(tmp_path / str(stop))
        phase = first.phase

        def until(name, step, phase=phase, first=first, stop=stop):
            if len(first.progress.finished) == stop:
                raise KeyboardInterrupt
            phase(name, step)

        first.phase = until
        with pytest.raises(KeyboardInterrupt):
            first.run()
        again = make(tmp_path / str(stop)).run()
        assert again.weights_sha256 == whole.weights_sha256
        assert again.class_incremental == whole.class_incremental


def test_another_strategy_is_another_run(tmp_path):
    first = sequence_runner(tmp_path, task_inference="energy")
    first.start()
    first.phase("baseline", first.score)
    with pytest.raises(ContinualError, match="holds a run with task_inference"):
        sequence_runner(tmp_path, task_inference="plain").start()


def test_partitions_during_training_begin_the_head_anew():
    module = ContinualModule(classifier())
    task = tasks()[0]
    callbacks = [PartitionCallback(every_n_epochs=2), *three()[1:], TaskInferenceCallback()]
    fit(module, task, callbacks, 6)
    (known,) = inference_of(module.ledger).tasks
    own = sum(int(site.own.sum()) for site in known.sites.hidden)
    assert known.fitted["reconstruction_logits"]["encoder"].shape[1] == own


def test_optimisers_that_skip_steps_leave_the_head_alone():
    """No step of the module's, no step of the head's."""
    module, task = Own(), tasks()[0]
    callback = TaskInferenceCallback()
    steps = []
    original = torch.optim.Adam.step

    def counted(self, *args, **kwargs):
        steps.append(1)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", counted)
        trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=[*three(after=1.0), callback])
        trainer.fit(module, datamodule=task)
    assert len(steps) == trainer.global_step


def test_a_module_of_parametrised_outputs_is_left_alone():
    head = nn.utils.parametrizations.weight_norm(nn.Linear(12, 10))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), head)
    module = Classifier(net, optimizer=partial(torch.optim.Adam, lr=0.003))
    fit(module, tasks()[0], [*three(), TaskInferenceCallback()], 2)
    assert inference_of(state_of(module).ledger).strategies == ()


BAD = {"nan": float("nan"), "inf": float("inf"), "too large": 3e38}


def test_where_it_is_known_to_be_one_of_some_tasks_it_is_none_of_the_others(every):
    module, sequence, _ = every
    inference, task = inference_of(module.ledger), sequence[1]
    x, _ = next(iter(task.test_dataloader()))
    with torch.no_grad():
        readout = inference.read(module, module, x, alone=True)
    for strategy in inference.strategies:
        everyone = module.predict_any(x, strategy)
        for a, b in zip(
            everyone, module.predict_any(x, strategy, among=[t.name for t in inference.tasks]), strict=True
        ):
            torch.testing.assert_close(a, b)
        named = module.predict(x, strategy, among=task.name)
        assert set(named.tasks.tolist()) <= {1, -1}
        own = inference.infer(readout, strategy).classes[:, 1]
        assert torch.equal(named.classes, torch.where(named.tasks < 0, -1, own)), strategy
        torch.testing.assert_close(named.probabilities.sum(dim=1), torch.ones(len(x)))
        others = [c for t in inference.tasks if t.name != task.name for c in t.classes]
        assert float(named.probabilities[:, others].max()) == 0
        scores = inference.infer(readout, strategy).scores
        two = module.predict(x, strategy, among=(task.name, sequence[0].name))
        torch.testing.assert_close(two.scores, scores[:, :2].amax(dim=1))
        # What it may be besides none is no less likely than before.
        assert bool((two.probabilities[:, -1] >= everyone.probabilities[:, -1] - 1e-6).all())
    for wrong in ("nothing", ["nothing"], [], 3, [task.name, None]):
        with pytest.raises(ContinualError, match="among: must name tasks that can be inferred"):
            module.predict(x, among=wrong)


@pytest.mark.parametrize("value", BAD)
def test_rows_that_are_not_finite_are_none_and_the_others_are_bitwise_as_without(every, value):
    module, sequence, _ = every
    x = torch.cat([next(iter(task.test_dataloader()))[0][:8] for task in sequence[:2]])
    bad = x.clone()
    for row, pixel, sign in ((2, 5, 1), (9, 0, -1)):
        bad[row].view(-1)[pixel] = sign * BAD[value]
    bad[15] = BAD[value]
    rows = torch.zeros(16, dtype=torch.bool)
    rows[[2, 9, 15]] = True
    for strategy in inference_of(module.ledger).strategies:
        expected, found = module.predict_any(x, strategy), module.predict_any(bad, strategy)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a[~rows], b[~rows]), strategy
        assert bool(found.probabilities.isfinite().all())
        if value == "too large":
            continue  # finite, and where nothing overflows, an input like any other
        alone = module.predict_any(bad[rows], strategy)
        for some in (Prediction(*(part[rows] for part in found)), alone):
            assert some.classes.tolist() == some.tasks.tolist() == [-1] * 3, strategy
            assert (some.probabilities[:, -1] == 1).all()
            assert (some.probabilities[:, :-1] == 0).all()


class Jointly(nn.Module):
    """Scales a batch by its largest number, so that one row reaches all others."""

    def __init__(self):
        super().__init__()
        self.net = MLP(shape=(1, 8, 8), classes=10, hidden=(32, 32))

    def forward(self, x):
        return self.net(x / x.abs().max())


class Gated(nn.Module):
    """A recurrent network, whose gates make infinite numbers finite."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.lstm(x.squeeze(1))[0].mean(1))


class Filling(nn.Module):
    """Takes what is missing for zero."""

    def __init__(self):
        super().__init__()
        self.net = MLP(shape=(1, 8, 8), classes=10, hidden=(32, 32))

    def forward(self, x):
        return self.net(x.nan_to_num())


@pytest.fixture(scope="module", params=[Jointly, Gated, Filling])
def doing(request):
    """One of these networks after a task."""
    return inferred(Classifier(request.param()), tasks(1), "energy", epochs=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_network_may_do_with_such_rows_what_it_wants(doing, value):
    module, network = doing, type(doing.network)
    x = next(iter(tasks(1)[0].test_dataloader()))[0][:8].clone()
    clean = x.clone()
    clean[3] = x[0]
    x[3].view(-1)[9] = BAD[value]
    expected, found = module.predict_any(clean), module.predict_any(x)
    rows = torch.arange(8) == 3
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[~rows], b[~rows])
    if network is not Filling:
        assert found.classes[3] == found.tasks[3] == -1
        assert found.probabilities[3, -1] == 1
    elif value == "nan":
        filled = module.predict_any(x.nan_to_num())
        assert all(torch.equal(a, b) for a, b in zip(filled, found, strict=True))

import json
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from learning import classifier, images, own_logits, quiet_trainer, tasks, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from lightning_cf import (
    CapacityError,
    Classifier,
    ContinualError,
    InvarianceCallback,
    PartitionCallback,
    SequentialTaskRunner,
    StructureError,
    Task,
)
from lightning_cf.data import permuted_tasks
from lightning_cf.models import MLP
from lightning_cf.state import state_of
from lightning_cf.steps import synchronise, weights_sha256

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within the budget")


def runner(root, *, module=None, sequence=None, **options):
    options = {"trainer": quiet_trainer, "epochs": 5, "invariance_epochs": 3, **options}
    return SequentialTaskRunner(module or classifier(), sequence or tasks(), root=root, **options)


def test_exact_isolation_forgets_nothing_and_learns_everything(tmp_path):
    result = runner(tmp_path).run()
    assert result.accuracy.forgetting == 0.0
    assert result.accuracy.average > 0.95
    assert result.accuracy.matrix.shape == (3, 3)
    for task in range(3):
        column = result.accuracy.matrix[task:, task]
        assert bool((column == column[0]).all())
    assert all(0 < share < 1 for shares in result.capacity.values() for share in shares)
    assert all(shares == sorted(shares, reverse=True) for shares in result.capacity.values())
    assert {record["task"] for record in result.partition} == {"0-1", "2-3", "4-5"}
    assert all(0.4 < score < 0.6 for score in result.constant_predictor)
    assert math.isclose(result.accuracy.initial.mean(), 0.5, abs_tol=0.2)


def test_classes_that_return_keep_every_bit_of_their_logits(tmp_path):
    sequence = permuted_tasks(images(), count=3, batch_size=32)
    after = []

    class Keep(Callback):
        def on_fit_start(self, trainer, pl_module):
            done = [task for task in sequence if pl_module.ledger.knows(task.name)][:-1] if state_of(pl_module) else []
            after.append({task.name: own_logits(pl_module, task) for task in done})

    module = classifier()
    result = runner(tmp_path, module=module, sequence=sequence, callbacks=[Keep()]).run()
    assert result.accuracy.forgetting == 0.0
    assert module.network[-1].out_features == 30
    assert after[-1].keys() == {"permutation-0", "permutation-1"}
    for found in after:
        assert all(
            torch.equal(logits, own_logits(module, t)) for t in sequence if (logits := found.get(t.name)) is not None
        )


def test_perturbation_alone_keeps_more_than_fine_tuning(tmp_path):
    sequence = partial(permuted_tasks, images(), count=3, batch_size=32)
    averages = {}
    for name, options in {"perturb": {"isolation": "perturb"}, "finetune": {"method": "finetune"}}.items():
        result = runner(tmp_path / name, sequence=sequence(), epochs=6, invariance_epochs=4, **options).run()
        averages[name] = result.accuracy.forgetting
    assert averages["finetune"] > 0.05
    assert averages["perturb"] < averages["finetune"]


def test_joint_training_scores_every_task(tmp_path):
    result = runner(tmp_path, method="joint", sequence=permuted_tasks(images(), count=3, batch_size=32)).run()
    assert result.accuracy.matrix.shape == (1, 3)
    assert result.accuracy.average > 0.85
    assert result.accuracy.forgetting == 0.0


@pytest.mark.parametrize("isolation", ["exact", "perturb"])
def test_a_run_that_was_interrupted_ends_with_the_weights_of_one_that_was_not(tmp_path, isolation):
    class PowerCut(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.datamodule.name == "2-3" and pl_module.ledger.tasks[-1].phase == "invariance":
                raise RuntimeError("power cut")

    whole = runner(tmp_path / "whole", isolation=isolation).run()
    with pytest.raises(RuntimeError, match="power cut"):
        runner(tmp_path / "cut", isolation=isolation, callbacks=[PowerCut()]).run()
    fits = []

    class Count(Callback):
        def on_fit_start(self, trainer, pl_module):
            fits.append(trainer.datamodule.name)

    resumed = runner(tmp_path / "cut", isolation=isolation, callbacks=[Count()], module=classifier(seed=8)).run()
    assert fits == ["2-3", "4-5", "4-5"]
    assert resumed.weights_sha256 == whole.weights_sha256
    assert torch.equal(resumed.accuracy.matrix, whole.accuracy.matrix)
    again = runner(tmp_path / "cut", isolation=isolation, callbacks=[Count()]).run()
    assert len(fits) == 3
    assert again.weights_sha256 == whole.weights_sha256


def test_a_folder_holds_one_run(tmp_path):
    runner(tmp_path, sequence=tasks(1)).run()
    with pytest.raises(ContinualError, match="holds a run with epochs=5, not 6"):
        runner(tmp_path, sequence=tasks(1), epochs=6).run()


def test_the_seed_decides_everything_and_the_global_generator_stays(tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    module = classifier()
    torch.manual_seed(11)
    first = runner(tmp_path / "a", module=module, sequence=tasks(2)).run()
    assert torch.equal(torch.rand(3), expected)
    torch.rand(100)
    assert runner(tmp_path / "b", sequence=tasks(2)).run().weights_sha256 == first.weights_sha256
    assert runner(tmp_path / "c", sequence=tasks(2), seed=1).run().weights_sha256 != first.weights_sha256


def test_the_users_callbacks_are_copied_for_every_phase(tmp_path):
    stop = EarlyStopping("train_loss", patience=0, min_delta=-1e9, check_on_train_epoch_end=True)
    seen = []

    class Watch(Callback):
        def on_fit_end(self, trainer, pl_module):
            names = [type(callback).__name__ for callback in trainer.callbacks]
            seen.append((trainer.current_epoch, names.index("EarlyStopping") < names.index("MaskedGradientCallback")))

    runner(tmp_path, trainer=partial(quiet_trainer, callbacks=[stop]), callbacks=[Watch()], sequence=tasks(2)).run()
    assert seen == [(5, True), (3, True)] * 2
    assert stop.stopped_epoch == 0


@pytest.mark.parametrize("left_out", ["partition", "invariance", "masking"])
def test_each_step_can_be_left_out(tmp_path, left_out):
    result = runner(tmp_path, sequence=tasks(2), **{left_out: None}).run()
    assert result.accuracy.matrix.shape == (2, 2)
    assert bool(result.partition) == (left_out != "partition")
    if left_out == "invariance":
        assert result.accuracy.forgetting == 0.0


def test_the_stages_of_each_task_are_scored(tmp_path):
    result = runner(tmp_path, sequence=tasks(2)).run()
    assert {task: list(stages) for task, stages in result.stages.items()} == {
        "0-1": ["learned", "partitioned", "retrained"],
        "2-3": ["learned", "partitioned", "retrained"],
    }
    assert result.stages["2-3"]["retrained"] == float(result.accuracy.matrix[1, 1])


def test_results_are_json_with_every_key(tmp_path):
    result = runner(tmp_path, sequence=tasks(2)).run()
    document = json.loads(json.dumps(result.as_dict(compare={"other": result}, seed=0, config={"a": 1})))
    assert {
        *("tasks", "accuracy_matrix", "average_accuracy", "forgetting", "backward_transfer", "forward_transfer"),
        *("capacity", "partition", "constant_predictor", "compare", "weights_sha256", "seconds", "versions"),
        *("seed", "config"),
    } <= set(document)
    keys = {"task", "layer", "units", "claimed", "redundant", "threshold", "ablation_accuracy"}
    assert all(keys <= set(record) for record in document["partition"])


def test_hash_follows_every_bit():
    module = classifier()
    before = weights_sha256(module)
    with torch.no_grad():
        module.network[1].bias[3] += 1e-8
    assert weights_sha256(module) != before


@pytest.mark.parametrize("differ", [False, True])
def test_processes_with_different_networks_are_found_out(monkeypatch, unchecked, differ):
    def gather(hashes, own):
        hashes[:] = [own, "another" if differ else own]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(broadcast=lambda value: value))
    with pytest.raises(ContinualError, match="different networks") if differ else nullcontext():
        synchronise(trainer, classifier("cnn"))


# What bad input gets: an error before anything trains


class Never(Callback):
    def on_train_start(self, trainer, pl_module):
        raise AssertionError("trained before the error")


def empty(name):
    loader = torch.utils.data.DataLoader([])
    return Task(name, {"train": loader, "test": loader}, classes=[2, 3])


def untraceable():
    layers = [torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 10)]
    return Classifier(torch.nn.Sequential(*layers))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sequence": []}, ContinualError, "tasks is empty"),
        ({"sequence": [*tasks(1), *tasks(1)]}, ContinualError, "two tasks are called '0-1'"),
        ({"sequence": [tasks(1)[0], empty("void")]}, ContinualError, "Task 'void' has no training data"),
        ({"sequence": [tasks(1)[0], "two"]}, ContinualError, "must be Task objects, got a str"),
        (
            {"sequence": [tasks(1)[0], Task("odd", tasks(2)[1].data, classes=[4, 5])]},
            ContinualError,
            r"'odd' declares classes \[4, 5\], but its data holds label 2",
        ),
        (
            {"sequence": [tasks(1)[0], Task("same", tasks(2)[1].data, classes=[2, 3], outputs=[1, 2])]},
            ContinualError,
            "Task 'same' and task '0-1' both have output 1",
        ),
        (
            {"sequence": [tasks(1)[0], Task("beyond", tasks(2)[1].data, classes=[2, 3], outputs=[2, 10])]},
            ContinualError,
            "'beyond' needs output 10, but the output head has 10 columns",
        ),
        ({"epochs": 0}, ContinualError, "epochs must be a whole number of at least 1, got 0"),
        ({"invariance_epochs": -1}, ContinualError, "invariance_epochs must be .* got -1"),
        ({"isolation": "none"}, ContinualError, "isolation must be one of exact, perturb, got 'none'"),
        ({"method": "magic"}, ContinualError, "method must be one of partition, finetune, joint, got 'magic'"),
        ({"trainer": partial(quiet_trainer, max_epochs=3)}, ContinualError, "the trainer sets max_epochs=3"),
        ({"module": untraceable()}, StructureError, r"'aten.native_layer_norm' in module 'network.2'"),
        (
            {"module": Classifier(MLP(shape=(1, 8, 8), classes=10, hidden=(2,)))},
            CapacityError,
            "'network.1' has 2 units for 3 tasks",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_trains(tmp_path, unchecked, options, error, message):
    sequence = options.pop("sequence", None)
    with pytest.raises(error, match=message):
        SequentialTaskRunner(
            options.pop("module", None) or classifier(),
            tasks() if sequence is None else sequence,
            root=tmp_path,
            **{"trainer": quiet_trainer, "callbacks": [Never()], **options},
        ).run()


@pytest.mark.parametrize(
    "make",
    [
        partial(PartitionCallback, tolerance=2),
        partial(PartitionCallback, min_claim=0),
        partial(PartitionCallback, max_claim=1.5),
        partial(PartitionCallback, reserve_tasks=0),
        partial(PartitionCallback, min_claim=0.5, max_claim=0.1),
        partial(InvarianceCallback, every_n_steps=0),
    ],
)
def test_shares_and_counts_have_their_ranges(make, unchecked):
    (value,) = list(make.keywords.values())[-1:]
    with pytest.raises(ContinualError, match=str(value)):
        make()


def test_capacity_is_kept_for_the_tasks_to_come(tmp_path):
    result = runner(
        tmp_path, epochs=1, invariance_epochs=1, partition=PartitionCallback(max_claim=1.0, min_claim=1.0)
    ).run()
    claimed = {r["task"]: r["claimed"] for r in result.partition if r["layer"] == "network.1"}
    assert claimed == {"0-1": 46, "2-3": 1, "4-5": 1}
    assert weights(classifier()).keys() == weights(classifier(seed=1)).keys()

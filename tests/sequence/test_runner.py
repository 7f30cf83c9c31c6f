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
from networks import Wired
from torch import nn

from lightning_cf import (
    CapacityError,
    Classifier,
    ContinualError,
    InvarianceCallback,
    LearnedSubspace,
    MaskedGradientCallback,
    NeuronLedger,
    PartitionCallback,
    PartitionRecord,
    RunWarning,
    SequentialTaskRunner,
    StructureError,
    Task,
)
from lightning_cf.data import permuted_tasks
from lightning_cf.learner.keeping import state_of
from lightning_cf.learner.steps import synchronise, weights_sha256
from lightning_cf.models import MLP
from lightning_cf.ownership.levels import FREE
from lightning_cf.tasks.evaluation import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within the budget")


SHORT = {"epochs": 1, "invariance_epochs": 1}


def runner(root, *, module=None, sequence=None, **options):
    """Tasks are not inferred unless a test says so: the heads would take most of the time."""
    options = {"trainer": quiet_trainer, "epochs": 5, "invariance_epochs": 3, "task_inference": None, **options}
    return SequentialTaskRunner(module or classifier(), sequence or tasks(), root=root, **options)


def test_exact_isolation_forgets_nothing_and_learns_everything(tmp_path):
    result = runner(tmp_path, task_inference="auto").run()
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
    sequence = permuted_tasks(images(), count=3, batch_size=128)
    after = []

    class Keep(Callback):
        def on_fit_start(self, trainer, pl_module):
            done = [task for task in sequence if pl_module.ledger.knows(task.name)][:-1] if state_of(pl_module) else []
            after.append({task.name: own_logits(pl_module, task) for task in done})

    module = classifier()
    result = runner(tmp_path, module=module, sequence=sequence, callbacks=[Keep()], **SHORT).run()
    assert result.accuracy.forgetting == 0.0
    assert module.network[-1].out_features == 30
    assert after[-1].keys() == {"permutation-0", "permutation-1"}
    for found in after:
        assert all(
            torch.equal(logits, own_logits(module, t)) for t in sequence if (logits := found.get(t.name)) is not None
        )


def test_perturbation_alone_keeps_more_than_fine_tuning(tmp_path):
    sequence = partial(permuted_tasks, images(), count=3)
    averages = {}
    for name, options in {"perturb": {"isolation": "perturb"}, "finetune": {"method": "finetune"}}.items():
        result = runner(tmp_path / name, sequence=sequence(), epochs=4, invariance_epochs=3, **options).run()
        averages[name] = result.accuracy.forgetting
    assert averages["finetune"] > 0.05
    assert averages["perturb"] < averages["finetune"]


def test_joint_training_scores_every_task(tmp_path):
    result = runner(tmp_path, method="joint", sequence=permuted_tasks(images(), count=3)).run()
    assert result.accuracy.matrix.shape == (1, 3)
    assert result.accuracy.average > 0.85
    assert result.accuracy.forgetting == 0.0


def test_joint_training_over_all_outputs_compares_them(tmp_path):
    make = partial(runner, method="joint", task_inference="auto")
    together = make(tmp_path / "all", masking=MaskedGradientCallback(mask_outputs=False)).run()
    apart = make(tmp_path / "own").run()
    scores = [result.strategies["joint"].as_dict()["average_accuracy"] for result in (together, apart)]
    assert scores[0] > 0.93 > scores[1]
    assert together.accuracy.average == pytest.approx(scores[0])  # with no view of one task, both ask the same


def test_options_are_chosen_on_validation_data(tmp_path):
    class Strange(type(tasks()[0].data)):
        def test_dataloader(self):
            raise AssertionError("test data were asked for")

    def sequence():
        found = tasks(2)
        for task in found:
            task.data.__class__ = Strange
        return [Task(task.name, task.data, classes=task.classes) for task in found]

    options = {**SHORT, "score_on": "validation", "task_inference": "auto"}
    run = runner(tmp_path, sequence=sequence(), **options)
    result = run.run()
    for task, score in zip(run.tasks, result.accuracy.matrix[-1].tolist(), strict=True):
        with state_of(run.module).showing(run.module, [task]):
            assert score == evaluate(run.module, task, task.judging_batches())
    with pytest.raises(AssertionError, match="test data"):
        runner(tmp_path / "test", sequence=sequence(), **{**options, "score_on": "test"}).run()


@pytest.mark.parametrize(
    "options",
    [
        {"isolation": "exact", "task_inference": "auto"},
        {"isolation": "perturb", "invariance": InvarianceCallback(subspace=LearnedSubspace(dimensions=4, steps=7))},
        {"partition": PartitionCallback(measure="update", representative="random")},
    ],
    ids=["exact", "learned", "update"],
)
def test_a_run_that_was_interrupted_ends_with_the_weights_of_one_that_was_not(tmp_path, options):
    class PowerCut(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.datamodule.name == "2-3" and pl_module.ledger.tasks[-1].phase == "invariance":
                raise RuntimeError("power cut")

    trainer = partial(quiet_trainer, limit_train_batches=3)
    make = partial(runner, epochs=2, invariance_epochs=2, trainer=trainer, **options)
    whole = make(tmp_path / "whole").run()
    with pytest.raises(RuntimeError, match="power cut"):
        make(tmp_path / "cut", callbacks=[PowerCut()]).run()
    fits = []

    class Count(Callback):
        def on_fit_start(self, trainer, pl_module):
            fits.append(trainer.datamodule.name)

    second = make(tmp_path / "cut", callbacks=[Count()], module=classifier(seed=8))
    with pytest.warns(RunWarning, match="came with other weights than the run .* the run's own are used"):
        second.start()
    resumed = second.run()
    assert fits == ["2-3", "4-5", "4-5"]
    assert resumed.weights_sha256 == whole.weights_sha256
    assert torch.equal(resumed.accuracy.matrix, whole.accuracy.matrix)
    again = make(tmp_path / "cut", callbacks=[Count()]).run()
    assert len(fits) == 3
    assert again.weights_sha256 == whole.weights_sha256


def test_a_folder_holds_one_run(tmp_path):
    runner(tmp_path, sequence=tasks(1), **SHORT).run()
    with pytest.raises(ContinualError, match="holds a run with epochs=1, not 2"):
        runner(tmp_path, sequence=tasks(1), **{**SHORT, "epochs": 2}).run()


def test_the_seed_decides_everything_and_the_global_generator_stays(tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    module = classifier()
    torch.manual_seed(11)
    make = partial(runner, sequence=tasks(2), task_inference="auto", **SHORT)
    first = make(tmp_path / "a", module=module).run()
    assert torch.equal(torch.rand(3), expected)
    torch.rand(100)
    assert make(tmp_path / "b").run().weights_sha256 == first.weights_sha256
    assert make(tmp_path / "c", seed=1).run().weights_sha256 != first.weights_sha256


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


@pytest.mark.parametrize("left_out", ["partition", "invariance", "masking", "task_inference"])
def test_each_step_can_be_left_out(tmp_path, left_out):
    result = runner(tmp_path, sequence=tasks(2), **{"task_inference": "auto", left_out: None}).run()
    assert result.accuracy.matrix.shape == (2, 2)
    assert bool(result.partition) == (left_out != "partition")
    assert float(result.accuracy.matrix.diagonal().min()) > 0.85
    assert (result.class_incremental is None) == (left_out == "task_inference")
    if left_out == "invariance":
        assert result.accuracy.forgetting == 0.0


def test_the_stages_of_each_task_are_scored(tmp_path):
    result = runner(tmp_path, sequence=tasks(2), **SHORT).run()
    assert {task: list(stages) for task, stages in result.stages.items()} == {
        "0-1": ["learned", "partitioned", "retrained"],
        "2-3": ["learned", "partitioned", "retrained"],
    }
    assert result.stages["2-3"]["retrained"] == float(result.accuracy.matrix[1, 1])


def test_results_are_json_with_every_key(tmp_path):
    result = runner(tmp_path, sequence=tasks(2), task_inference="auto", **SHORT).run()
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
    def wire(net, x):
        x = torch.relu(net.first(x.flatten(1)))
        return net.head(torch.relu(net.second(x)) * float(x[0, 0]))

    layers = {"first": nn.Linear(64, 12), "second": nn.Linear(12, 12), "head": nn.Linear(12, 10)}
    return Classifier(Wired(wire, **layers))


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
        ({"score_on": "train"}, ContinualError, "score_on must be one of test, validation, got 'train'"),
        ({"trainer": partial(quiet_trainer, max_epochs=3)}, ContinualError, "the trainer sets max_epochs=3"),
        (
            {"module": untraceable()},
            StructureError,
            "module 'network' reads values of units of 'network.first' into Python",
        ),
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
        partial(PartitionCallback, tolerance=-2),
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


def test_a_run_killed_before_a_partition_still_knows_the_weights_at_the_tasks_start(tmp_path, monkeypatch):
    make = partial(runner, sequence=tasks(2), partition=PartitionCallback(measure="update"), **SHORT)
    whole = make(tmp_path / "whole").run()
    step = PartitionCallback.partition_task

    def cut(self, trainer, module, task):
        if task.name == "2-3":
            raise RuntimeError("power cut")
        step(self, trainer, module, task)

    monkeypatch.setattr(PartitionCallback, "partition_task", cut)
    with pytest.raises(RuntimeError, match="power cut"):
        make(tmp_path / "cut").run()
    monkeypatch.setattr(PartitionCallback, "partition_task", step)
    assert make(tmp_path / "cut").run().weights_sha256 == whole.weights_sha256


def test_a_second_call_after_an_error_ends_with_the_weights_of_an_undisturbed_run(tmp_path):
    make = partial(runner, sequence=tasks(2), task_inference="auto", **SHORT)
    whole = make(tmp_path / "whole").run()

    class Once(Callback):
        failed = False

        def on_train_epoch_end(self, trainer, pl_module):
            if not Once.failed and trainer.datamodule.name == "2-3":
                Once.failed = True
                raise RuntimeError("interrupted")

    again = make(tmp_path / "again", callbacks=[Once()])
    with pytest.raises(RuntimeError, match="interrupted"):
        again.run()
    assert again.run().weights_sha256 == whole.weights_sha256


class Silent:
    """A perturbation without a text of its own."""

    def __call__(self, vectors, generator):
        return 0 * vectors


def test_a_run_with_a_perturbation_of_ones_own_is_taken_up_again(tmp_path):
    for _ in range(2):
        runner(tmp_path, sequence=tasks(1), invariance=InvarianceCallback(perturbation=Silent()), **SHORT).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": True, "partition": PartitionCallback(measure="update")}, "measure='update' .* pretrained"),
        ({"masking": MaskedGradientCallback(subspace=LearnedSubspace())}, "nothing learns it"),
    ],
)
def test_options_that_need_one_another_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(ContinualError, match=message):
        runner(tmp_path, **options)


# A module that was trained before


class Phases(Callback):
    """Which tasks were fitted, in which phase."""

    def __init__(self, seen):
        self.seen = seen

    def on_fit_start(self, trainer, pl_module):
        self.seen.append((trainer.datamodule.name, pl_module.ledger.tasks[-1].phase))

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("given", ["memory", "checkpoint", "state_dict"])
def test_a_first_task_that_was_learned_before_is_not_learned_again(tmp_path, given):
    trained, (first, *_) = classifier(), tasks()
    trainer = quiet_trainer(max_epochs=6)
    trainer.fit(trained, datamodule=first)
    learned = weights(trained)
    if given == "memory":
        module, pretrained = trained, True
    else:
        module, pretrained = classifier(seed=5), tmp_path / "trained.pt"
        if given == "checkpoint":
            trainer.save_checkpoint(pretrained)
        else:
            torch.save(trained.state_dict(), pretrained)
    seen = []
    run = runner(tmp_path / "run", module=module, sequence=tasks(2), callbacks=[Phases(seen)], pretrained=pretrained)
    run.start()
    for name, tensor in weights(run.module).items():
        assert torch.equal(tensor, learned[name])
    result = run.run()
    assert seen == [("0-1", "invariance"), ("2-3", "learn"), ("2-3", "invariance")]
    assert result.accuracy.initial[0] > 0.95
    assert result.accuracy.forgetting == 0.0
    assert float(result.accuracy.matrix[-1].min()) > 0.9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"pretrained='.*' is no file"),
        ({"network.1.weight": torch.zeros(48, 64)}, r"does not fit the module: 5 names .* such as 'network.1.bias'"),
        ({"network.1.weight": torch.zeros(2, 2)}, "does not fit the module"),
        ("text", "is no checkpoint that torch.load reads"),
        ({"state_dict": {}, "lightning_cf": {"tasks": [{"name": "zero"}]}}, r"a ledger of its own \(tasks zero\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_training(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    if content == "text":
        path.write_text(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ContinualError, match=message):
        runner(tmp_path / "run", pretrained=path, callbacks=[Never()]).run()


def test_the_runner_partitions_during_training(tmp_path):
    seen = []
    partition = PartitionCallback(every_n_epochs=2)
    result = runner(tmp_path, sequence=tasks(2), partition=partition, epochs=4, callbacks=[Phases(seen)]).run()
    assert seen == [("0-1", "learn"), ("2-3", "learn")]  # one fit a task, of 4 + 3 epochs
    assert [len(record["claims"]) for record in result.partition] == [3] * 4
    assert result.accuracy.forgetting == 0.0
    shares = [shares[0] for shares in result.capacity.values()]
    assert all(share >= 0.5 for share in shares)  # room is kept for the second task
    assert partition.tasks_left == 1  # the runner works on copies


def test_a_share_of_the_fit_is_the_runners_business():
    with pytest.raises(ContinualError, match=r"the partition has after=0.5; epochs=5 and invariance_epochs=3 decide"):
        runner("nowhere", partition=PartitionCallback(after=0.5))


# What a run leaves beside each task's checkpoint


@pytest.mark.parametrize("isolation", ["exact", "perturb"])
def test_each_task_leaves_a_checkpoint_and_a_record_of_its_partition(tmp_path, isolation):
    module, sequence = classifier(), tasks(2)
    result = runner(tmp_path, module=module, sequence=sequence, isolation=isolation, **SHORT).run()
    for position, task in enumerate(sequence):
        folder = tmp_path / "tasks" / f"{position:02d}-{task.name}"
        ledger = NeuronLedger.from_checkpoint(folder / "checkpoint.ckpt")
        assert [entry.phase for entry in ledger.tasks] == ["sealed"] * (position + 1)
        record = PartitionRecord.load(folder)
        assert (record.task, record.position, record.isolation) == (task.name, position, isolation)
        assert record.constraints["threshold"] == "auto"
        assert [layer.name for layer in record.layers] == ["network.1", "network.3"]
        for layer in record.layers:
            owned = (ledger.owners[layer.name] == position).nonzero().flatten()
            assert torch.equal(layer.non_redundant, owned)
            assert torch.equal(layer.owner, torch.where(layer.owner == FREE, FREE, ledger.owners[layer.name]))
            assert record.constraints["budget"][layer.name] >= len(owned)
            found = next(r for r in result.partition if (r["task"], r["layer"]) == (task.name, layer.name))
            assert (found["claimed"], found["redundant"]) == (len(layer.non_redundant), len(layer.redundant))
            assert layer.similarity is None
            # After INVARIANCE: the weights of claimed units as the checkpoint has them.
            checkpoint = torch.load(folder / "checkpoint.ckpt", weights_only=True)
            weight = checkpoint["state_dict"][f"{layer.name}.weight"][owned]
            vectors = layer.magnitude_after[:, None] * layer.direction_after
            torch.testing.assert_close(vectors[owned].float(), weight, rtol=1e-5, atol=1e-6)
    plain = classifier(seed=9)
    plain.load_state_dict(checkpoint["state_dict"])
    for name, tensor in weights(module).items():
        assert torch.equal(plain.state_dict()[name], tensor)


def test_similarities_are_recorded_on_request(tmp_path):
    runner(tmp_path, sequence=tasks(2), partition=PartitionCallback(similarity_matrix=True), **SHORT).run()
    for folder in ("00-0-1", "01-2-3"):
        for layer in PartitionRecord.load(tmp_path / "tasks" / folder).layers:
            assert layer.similarity is not None
            units = layer.candidates
            cosine = layer.direction[units] @ layer.direction[units].T
            distance = layer.bias[units][:, None] - layer.bias[units]
            stored = layer.similarity.tile(slice(None), slice(None))
            torch.testing.assert_close(stored, cosine - distance**2, rtol=0, atol=1e-5)


def test_callbacks_alone_record_where_they_are_told(tmp_path):
    module, (first, second, _) = classifier(), tasks()
    for task in (first, second):
        callbacks = [PartitionCallback(after=0.5, records=tmp_path), InvarianceCallback(), MaskedGradientCallback()]
        quiet_trainer(max_epochs=4, callbacks=callbacks).fit(module, datamodule=task)
    names = [PartitionRecord.load(folder).task for folder in sorted(tmp_path.iterdir())]
    assert names == ["0-1", "2-3"]
    for layer in PartitionRecord.load(tmp_path / "01-2-3").layers:
        assert layer.magnitude_after is not None
        assert bool((layer.representative == -1).any())  # what the first task owns took no part


def test_a_record_of_several_partitions_is_about_all_units_of_the_first(tmp_path):
    module, (first, *_) = classifier(), tasks()
    options = {"threshold": 0.3, "max_claim": 0.5, "measure": "activation", "records": tmp_path}
    callbacks = [PartitionCallback(every_n_epochs=2, **options), InvarianceCallback(), MaskedGradientCallback()]
    quiet_trainer(max_epochs=8, callbacks=callbacks).fit(module, datamodule=first)
    ledger = state_of(module).ledger
    assert any(r["claims"][0] > r["claims"][-1] for r in ledger.records)
    for layer in PartitionRecord.load(tmp_path / "00-0-1").layers:
        assert len(layer.candidates) == 48
        assert torch.equal(layer.non_redundant, (ledger.owners[layer.name] == 0).nonzero().flatten())
        assert torch.equal(layer.redundant, (ledger.owners[layer.name] == FREE).nonzero().flatten())

"""When a task is partitioned: after a share of the fit, at its start, again and again, or below a bound."""

import itertools

import pytest
import torch
from learning import classifier, fit, own_logits, quiet_trainer, score, tasks, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cf import (
    ContinualError,
    InvarianceCallback,
    MaskedGradientCallback,
    NeuronLedger,
    PartitionCallback,
)
from lightning_cf.learner.keeping import state_of
from lightning_cf.partition.cost import PartitionWarning
from lightning_cf.tasks.evaluation import evaluate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
    pytest.mark.filterwarnings("ignore:.*finds too little redundancy"),
]


class Watch(Callback):
    """Notes the current task's claimed units and phase after each batch."""

    def __init__(self):
        self.claims, self.phases, self.steps = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ledger = state_of(pl_module).ledger
        task = len(ledger.tasks) - 1
        owners = ledger.owners.items()
        self.claims.append({name: frozenset((o == task).nonzero().flatten().tolist()) for name, o in owners})
        self.phases.append(ledger.tasks[-1].phase)
        self.steps.append(trainer.global_step)

    def changes(self):
        """Steps after which the claim differs from the one before."""
        pairs = zip(self.steps, self.claims, [{}, *self.claims], strict=False)
        return [step for step, now, before in pairs if before and now != before]


def three(**options):
    invariance = options.pop("invariance", None) or InvarianceCallback()
    return [PartitionCallback(**options), invariance, MaskedGradientCallback()]


def record(module, key):
    return [r[key] for r in state_of(module).ledger.records if r["task"] == state_of(module).ledger.tasks[-1].name]


@pytest.fixture
def seals(monkeypatch):
    """How often each task was sealed."""
    from lightning_cf.ownership.ledger import NeuronLedger

    names, seal = [], NeuronLedger.seal

    def counted(self):
        names.append(self.tasks[-1].name)
        seal(self)

    monkeypatch.setattr(NeuronLedger, "seal", counted)
    return names


@pytest.mark.parametrize("isolation", ["exact", "perturb"])
@pytest.mark.parametrize("threshold", ["auto", 0.2])
def test_every_two_epochs_over_eight_claims_never_grow_and_are_sealed_once(isolation, threshold, seals):
    module, (first, second, _) = classifier(), tasks()
    for task in (first, second):
        watch, epochs = Watch(), len(task.train_dataloader())
        tolerance = 0.02
        options = {"isolation": isolation, "threshold": threshold, "tolerance": tolerance, "max_claim": 0.4}
        fit(module, task, [*three(every_n_epochs=2, **options), watch], epochs=8)
        assert watch.phases == ["learn"] * 2 * epochs + ["invariance"] * 6 * epochs
        claimed = [c for c, phase in zip(watch.claims, watch.phases, strict=True) if phase == "invariance"]
        for before, after in itertools.pairwise(claimed):
            assert all(after[name] <= before[name] for name in after)
        assert set(watch.changes()) <= {2 * epochs + 1, 4 * epochs + 1, 6 * epochs + 1}
        claims = record(module, "claims")
        assert all(len(counts) == 3 for counts in claims)
        assert all(counts == sorted(counts, reverse=True) for counts in claims)
        assert claims == [[len(c[name]) for c in claimed[:: 2 * epochs]] for name in claimed[0]]
        with state_of(module).showing(module, [task]):
            assert evaluate(module, task, task.judging_batches()) >= max(record(module, "accuracy")) - tolerance
    assert seals == [first.name, second.name]


def test_a_later_partition_claims_fewer_units_where_fewer_carry_the_task():
    module, (task, *_) = classifier(), tasks()
    fit(module, task, three(every_n_epochs=2, threshold=0.3, max_claim=0.5, measure="activation"), epochs=8)
    assert any(counts[-1] < counts[0] for counts in record(module, "claims"))


def test_released_units_are_free_and_cut_off():
    module, (first, second, _) = classifier(), tasks()
    fit(module, first, three(every_n_epochs=2, threshold=0.3, max_claim=0.5, measure="activation"), epochs=8)
    logits = own_logits(module, first)
    fit(module, second, three(), epochs=4)
    assert torch.equal(own_logits(module, first), logits)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_every_n_steps_counts_optimiser_steps(accumulate):
    module, (task, *_) = classifier(), tasks()
    watch = Watch()
    fit(module, task, [watch, *three(every_n_steps=5)], epochs=6, accumulate_grad_batches=accumulate)
    learn = [step for step, phase in zip(watch.steps, watch.phases, strict=True) if phase == "learn"]
    assert max(learn) == 5
    assert "invariance" in watch.phases
    total = watch.steps[-1]
    # The partition at the fit's last step would leave no INVARIANCE, so it is left out.
    assert all(len(counts) == (total - 1) // 5 for counts in record(module, "claims"))


def test_the_order_of_callbacks_does_not_matter_for_partitions_within_an_epoch():
    results = []
    for order in itertools.permutations(range(3)):
        module, (task, *_) = classifier(), tasks()
        torch.manual_seed(1)
        callbacks = three(every_n_steps=7, isolation="perturb", threshold=0.3)
        fit(module, task, [callbacks[i] for i in order], epochs=5)
        results.append(weights(module))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], tensor) for name, tensor in other.items())


def test_the_first_partition_waits_for_a_low_loss():
    module, (task, *_) = classifier(), tasks()
    losses, watch = [], Watch()

    class Losses(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            losses.append(float(trainer.callback_metrics["train_loss"]))

    fit(module, task, [Losses(), watch, *three(when_below=0.1)], epochs=12)
    low = next(i for i, loss in enumerate(losses) if loss < 0.1)
    batches = len(task.train_dataloader())
    assert 0 < low < 11
    assert watch.phases.index("invariance") == (low + 1) * batches
    assert all(len(counts) == 1 for counts in record(module, "claims"))


def test_a_loss_that_stays_high_leaves_the_task_unpartitioned():
    module, (first, second, _) = classifier(), tasks()
    with pytest.warns(PartitionWarning, match=r"before its partition was due \(when_below=-1.0\)"):
        fit(module, first, three(when_below=-1.0), epochs=2)
    assert state_of(module).ledger.tasks[-1].phase == "learn"
    with pytest.raises(ContinualError, match="never partitioned"):
        fit(module, second, three(), epochs=1)


def test_a_value_that_is_not_logged_is_named_with_those_that_are():
    with pytest.raises(ContinualError, match=r"monitor='val_los', which was not logged; logged is .*train_loss"):
        fit(classifier(), tasks()[0], three(when_below=0.1, monitor="val_los"), epochs=2)


def test_a_bound_within_a_schedule_is_looked_at_when_the_schedule_says():
    module, (task, *_) = classifier(), tasks()
    watch = Watch()
    fit(module, task, [watch, *three(every_n_epochs=3, when_below=1e9)], epochs=9)
    assert watch.phases.index("invariance") == 3 * len(task.train_dataloader())


def test_a_module_that_was_trained_before_is_partitioned_before_the_first_step():
    trained, (first, second, _) = classifier(), tasks()
    fit(trained, first, [], epochs=6)
    plain = weights(trained)
    watch = Watch()
    fit(trained, first, [*three(after=0.0), watch], epochs=3)
    assert set(watch.phases) == {"invariance"}
    assert [entry.phase for entry in state_of(trained).ledger.tasks] == ["sealed"]
    assert not all(torch.equal(plain[name], tensor) for name, tensor in weights(trained).items())
    assert score(trained, first) > 0.95
    logits = own_logits(trained, first)
    fit(trained, second, three(after=0.5), epochs=6)
    assert torch.equal(own_logits(trained, first), logits)
    assert score(trained, second) > 0.9


class StopAfter(Callback):
    """Stops the fit at the end of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.should_stop = True


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("options", [{"every_n_epochs": 4}, {"after": 0.5}, {"when_below": 1e9}], ids=str)
def test_a_fit_that_is_stopped_as_it_partitions_leaves_invariance_to_a_second_fit(options, first, tmp_path):
    module, (task, *_) = classifier(), tasks()
    stop = StopAfter(0 if "when_below" in options else 3)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="end", save_last=False)
    callbacks = [stop, *three(**options)] if first else [*three(**options), stop]
    if first and "after" in options:  # the stop comes before the partition is due
        with pytest.warns(PartitionWarning, match="before its partition was due"):
            fit(module, task, [*callbacks, keep], epochs=8, enable_checkpointing=True)
        assert state_of(module).ledger.tasks[-1].phase == "learn"
        return
    fit(module, task, [*callbacks, keep], epochs=8, enable_checkpointing=True)
    assert state_of(module).ledger.tasks[-1].phase == "invariance"
    if first:
        assert NeuronLedger.from_checkpoint(tmp_path / "end.ckpt").tasks[-1].phase == "invariance"
    watch = Watch()
    fit(module, task, [*three(), watch], epochs=2)
    assert set(watch.phases) == {"invariance"}
    assert state_of(module).ledger.tasks[-1].phase == "sealed"


@pytest.mark.parametrize("options", [{}, {"after": 0.0}, {"every_n_steps": 8}])
def test_a_trainer_that_counts_steps_needs_no_number_of_epochs(options):
    module, (task, *_) = classifier(), tasks()
    fit(module, task, three(**options), epochs=-1, max_steps=20)
    assert state_of(module).ledger.tasks[-1].phase == ("sealed" if options else "invariance")


def test_a_share_of_no_epochs_is_refused_by_their_number():
    with pytest.raises(ContinualError, match="the Trainer has max_epochs=0, which allows none; raise it"):
        fit(classifier(), tasks()[0], three(after=0.5), epochs=0)


def test_a_share_of_nothing_is_refused_before_training():
    message = r"after=0.5 is a share of the fit's epochs or steps, but the Trainer has neither max_epochs nor max_steps"
    with pytest.raises(ContinualError, match=message):
        fit(classifier(), tasks()[0], three(after=0.5), epochs=-1, max_time={"seconds": 5})


@pytest.mark.parametrize(("after", "step"), [(0.5, 10), (0.3, 6), (0.98, 20)])
def test_a_share_of_steps_where_their_number_is_all_that_is_given(after, step):
    class Noting(PartitionCallback):
        def partition_task(self, trainer, module, task):
            super().partition_task(trainer, module, task)
            steps.append(trainer.global_step)

    steps, module = [], classifier()
    ours = [Noting(after=after), InvarianceCallback(), MaskedGradientCallback()]
    fit(module, tasks()[0], ours, epochs=-1, max_steps=20)
    assert steps == [step]
    assert state_of(module).ledger.tasks[-1].phase == ("sealed" if step < 20 else "invariance")


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 4}])
def test_a_value_of_the_validation_is_waited_for(options):
    class Validated(type(classifier())):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    module, (task, *_) = classifier(), tasks()
    module.__class__ = Validated
    watch = Watch()
    callbacks = three(when_below=100.0, monitor="val_loss", **options)
    fit(module, task, [*callbacks, watch], epochs=6, check_val_every_n_epoch=2, num_sanity_val_steps=0)
    assert watch.phases.index("invariance") >= 2 * len(task.train_dataloader())
    with pytest.raises(ContinualError, match="monitor='val_los', which was not logged"):
        fit(classifier(), task, three(when_below=0.1, monitor="val_los", **options), epochs=3)


def test_a_claim_partitioned_again_after_a_resume_knows_the_weights_at_the_start(tmp_path):
    module, (task, *_) = classifier(), tasks()
    options = {"every_n_epochs": 2, "measure": "update", "threshold": 0.3, "max_claim": 0.5}
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(module, task, [*three(**options), keep], epochs=6, enable_checkpointing=True)
    other = classifier(seed=3)
    trainer = quiet_trainer(max_epochs=6, callbacks=three(**options))
    trainer.fit(other, datamodule=task, ckpt_path=str(tmp_path / "epoch=2.ckpt"))
    assert [len(counts) for counts in record(other, "claims")] == [2, 2]


def test_a_trained_task_has_no_update_to_measure():
    with pytest.raises(ContinualError, match=r"measure=.update. .* after=0 does not have"):
        PartitionCallback(after=0, measure="update")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a whole number of at least 1, got 0"),
        ({"every_n_epochs": 1.5}, "every_n_epochs must be a whole number of at least 1, got 1.5"),
        ({"every_n_steps": 2, "every_n_epochs": 2}, "contradict each other"),
        ({"after": 0.5, "every_n_epochs": 2}, r"after=0.5 and every_n_epochs=2 contradict"),
        ({"when_below": float("nan")}, "when_below must be a finite number, got nan"),
        ({"clusters": "tree"}, "clusters must be one of leader, components, got 'tree'"),
        ({"representative": "first"}, "representative must be one of magnitude, random, got 'first'"),
        ({"layers": "network.1"}, "layers must be a list of layer names, got the string"),
    ],
)
def test_schedules_and_choices_that_cannot_be_are_refused(options, message, unchecked):
    with pytest.raises(ContinualError, match=message):
        PartitionCallback(**options)

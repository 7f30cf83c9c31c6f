import itertools
import warnings

import pytest
import torch
from learning import classifier, fit, own_logits, quiet_trainer, score, tasks, three, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_cf import (
    Ablate,
    ContinualError,
    InvarianceCallback,
    MaskedGradientCallback,
    NeuronLedger,
    Noise,
    PartitionCallback,
    Resample,
    Task,
)
from lightning_cf.learner.keeping import keep_ledger, state_of
from lightning_cf.network.forward import named_tensors
from lightning_cf.ownership.levels import FREE
from lightning_cf.partition.cost import PartitionWarning

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within the budget")

# Phases


def test_one_fit_learns_partitions_and_seals():
    module, (task, *_) = classifier(), tasks()
    phases = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            phases.append(state_of(pl_module).ledger.tasks[-1].phase)

    fit(module, task, [*three(after=0.6), Watch()], epochs=5)
    assert phases == ["learn"] * 3 + ["invariance"] * 2
    ledger = state_of(module).ledger
    assert [entry.phase for entry in ledger.tasks] == ["sealed"]
    assert all(0 < share < 1 for share in ledger.capacity().values())


def test_a_partition_at_the_end_leaves_invariance_to_a_second_fit():
    module, (task, *_) = classifier(), tasks()
    fit(module, task, three(after=1.0), epochs=3)
    ledger = state_of(module).ledger
    assert ledger.tasks[-1].phase == "invariance"
    claimed = {name: (owner == 0).clone() for name, owner in ledger.owners.items()}
    before = weights(module)
    fit(module, task, three(after=1.0), epochs=2)
    assert ledger.tasks[-1].phase == "sealed"
    for name, owner in ledger.owners.items():
        assert torch.equal(owner == 0, claimed[name])
    rows = claimed["network.1"]
    assert not torch.equal(module.network[1].weight[rows], before["network.1.weight"][rows])


def test_an_earlier_task_is_an_error():
    module, (first, second, _) = classifier(), tasks()
    fit(module, first, three(), epochs=2)
    fit(module, second, three(), epochs=2)
    with pytest.raises(ContinualError, match="'0-1' was learned before"):
        fit(module, first, three(), epochs=2)


def test_a_fit_that_stops_before_its_partition_warns_and_blocks_the_next_task():
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    module, (first, second, _) = classifier(), tasks()
    with pytest.warns(PartitionWarning, match="'0-1': the fit ended before its partition"):
        fit(module, first, [*three(after=0.9), Stop()], epochs=10)
    with pytest.raises(ContinualError, match="'2-3' cannot start: task '0-1' was never partitioned"):
        fit(module, second, three(), epochs=2)
    fit(module, first, three(), epochs=2)
    fit(module, second, three(), epochs=2)


def test_early_stopping_with_a_partition_at_the_end_partitions():
    module, (task, *_) = classifier(), tasks()
    stop = EarlyStopping("train_loss", patience=1, min_delta=1e9, check_on_train_epoch_end=True)
    trainer = fit(module, task, [*three(after=1.0), stop], epochs=20)
    assert trainer.current_epoch < 19
    assert state_of(module).ledger.tasks[-1].phase == "invariance"


# What bad input gets


def test_data_that_is_no_task_is_refused():
    with pytest.raises(ContinualError, match="wrap the data in a Task"):
        fit(classifier(), tasks()[0].data, three(), epochs=1)


def test_overlapping_outputs_are_refused_by_name():
    module, (first, *_) = classifier(), tasks()
    fit(module, first, three(), epochs=2)
    before = weights(module)
    with pytest.raises(ContinualError, match=r"'again' and task '0-1' both have output 0.*outputs="):
        fit(module, Task("again", first.data, classes=[0, 1]), three(), epochs=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(module).items())


def test_a_class_without_a_column_is_refused():
    with pytest.raises(ContinualError, match=r"'big' needs output 12, but the output head has 10 columns"):
        fit(classifier(), Task("big", tasks()[0].data, classes=[0, 1], outputs=[11, 12][::-1]), three(), epochs=1)


def test_exhausted_capacity_names_layer_owners_and_way_out():
    module, sequence = classifier(), tasks()
    fit(module, sequence[0], three(max_claim=1.0, min_claim=1.0), epochs=2)
    with pytest.raises(ContinualError, match=r"no free unit is left in 'network.1' \(48 of 48 owned: 48 by '0-1'\)"):
        fit(module, sequence[1], three(), epochs=2)


def test_one_network_keeps_to_one_isolation():
    module, (first, second, _) = classifier(), tasks()
    fit(module, first, three(isolation="exact"), epochs=2)
    with pytest.raises(ContinualError, match="isolation='perturb'"):
        fit(module, second, three(isolation="perturb"), epochs=2)


def test_spawned_processes_are_refused():
    trainer = quiet_trainer(max_epochs=1, callbacks=three(), strategy="ddp_fork", devices=1)
    with pytest.raises(ContinualError, match="Use strategy='ddp'"):
        trainer.callbacks[0].setup(trainer, classifier(), "fit")


@pytest.mark.parametrize("bad", [{"threshold": 1.5}, {"threshold": "otto"}, {"measure": "size"}, {"isolation": "some"}])
@pytest.mark.parametrize("more", [{}, {"after": 0.0}])
def test_options_out_of_range_are_refused_at_once(bad, more, unchecked):
    with pytest.raises(ContinualError, match=r"partition: .*got"):
        PartitionCallback(**bad, **more)


def test_a_fixed_threshold_that_finds_nothing_is_capped_and_says_what_it_saw():
    module, (task, *_) = classifier(), tasks()
    with pytest.warns(PartitionWarning, match=r"threshold=0.95.*capped to 9 .*median -?\d.*largest") as caught:
        fit(module, task, three(threshold=0.95, max_claim=0.2), epochs=2)
    assert len([w for w in caught if w.category is PartitionWarning]) == 1
    assert all(int((owner == 0).sum()) == 9 for owner in state_of(module).ledger.owners.values())


def test_an_unknown_layer_is_refused_before_training():
    with pytest.raises(ContinualError, match=r"exclude names 'network.9'.*network.1, network.3"):
        fit(classifier(), tasks()[0], three(exclude=["network.9"]), epochs=1)


def test_an_excluded_layer_belongs_to_the_first_task():
    module, (first, second, _) = classifier(), tasks()
    fit(module, first, three(exclude=["network.1"]), epochs=6)
    logits, before = own_logits(module, first), weights(module)
    fit(module, second, three(exclude=["network.1"]), epochs=8)
    assert torch.equal(module.network[1].weight, before["network.1.weight"])
    assert torch.equal(own_logits(module, first), logits)
    assert list(state_of(module).ledger.capacity()) == ["network.3"]
    assert score(module, second) > 0.7


# The ledger travels


def test_the_ledger_is_in_every_checkpoint(tmp_path):
    module, (first, *_) = classifier(), tasks()
    keep = ModelCheckpoint(dirpath=tmp_path, filename="end", save_last=False)
    fit(module, first, [*three(), keep], epochs=4, enable_checkpointing=True)
    ledger = NeuronLedger.from_checkpoint(tmp_path / "end.ckpt")
    assert [entry.name for entry in ledger.tasks] == ["0-1"]
    for name, owner in state_of(module).ledger.owners.items():
        assert torch.equal(ledger.owners[name], owner)
    plain = classifier(seed=5)
    plain.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"])


def test_a_fit_resumed_from_a_checkpoint_knows_its_ledger(tmp_path):
    module, (first, second, third) = classifier(), tasks()
    fit(module, first, three(), epochs=4)
    first_logits = own_logits(module, first)

    class Fail(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 4:
                raise RuntimeError("power cut")

    keep = ModelCheckpoint(dirpath=tmp_path, filename="end")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, second, [*three(), keep, Fail()], epochs=6, enable_checkpointing=True)
    other = classifier(seed=9)
    trainer = quiet_trainer(max_epochs=6, callbacks=three())
    trainer.fit(other, datamodule=second, ckpt_path=str(tmp_path / "end.ckpt"))
    ledger = state_of(other).ledger
    assert [(entry.name, entry.phase) for entry in ledger.tasks] == [("0-1", "sealed"), ("2-3", "sealed")]
    assert torch.equal(own_logits(other, first), first_logits)
    fit(other, third, three(), epochs=4)
    assert torch.equal(own_logits(other, first), first_logits)


@pytest.mark.filterwarnings("ignore:.*finds too little redundancy")
def test_a_resumed_fit_knows_the_weights_at_the_tasks_start(tmp_path):
    update = {"measure": "update", "threshold": 0.3, "after": 0.75}

    class Fail(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("power cut")

    module, (first, *_) = classifier(), tasks()
    start = weights(module)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="end")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, first, [*three(**update), keep, Fail()], epochs=4, enable_checkpointing=True)
    kept = torch.load(tmp_path / "end.ckpt", weights_only=True)["lightning_cf_start"]
    assert all(torch.equal(kept[name], tensor) for name, tensor in start.items())
    other = classifier(seed=7)
    trainer = quiet_trainer(max_epochs=4, callbacks=three(**update))
    trainer.fit(other, datamodule=first, ckpt_path=str(tmp_path / "end.ckpt"))
    assert state_of(other).ledger.tasks[-1].phase == "sealed"


def test_update_without_the_weights_at_the_start_is_refused():
    module, (first, *_) = classifier(), tasks()
    fit(module, first, [MaskedGradientCallback()], epochs=2)
    callback = PartitionCallback(measure="update")
    with pytest.raises(ContinualError, match="weights at the task's start, which nothing kept"):
        callback.partition_task(quiet_trainer(), module, first)


# The three together and alone


def test_the_order_in_the_list_does_not_matter():
    results = []
    for order in itertools.permutations(range(3)):
        module = classifier()
        for task in tasks(2):
            torch.manual_seed(1)
            callbacks = three(isolation="perturb")
            fit(module, task, [callbacks[i] for i in order], epochs=2)
        results.append(weights(module))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], tensor) for name, tensor in other.items())


def hooks(module):
    found = [child._forward_hooks for child in module.modules()]
    return [h for h in found if h] + [p for p in module.parameters() if p._post_accumulate_grad_hooks]


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left_behind(fails):
    class Fail(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if fails and trainer.global_step == 8:
                raise KeyError("in the middle")

    module, sequence = classifier("cnn"), tasks(2)
    fit(module, sequence[0], three(), epochs=4)
    callbacks = [*three(), Fail()]
    if fails:
        with pytest.raises(KeyError):
            fit(module, sequence[1], callbacks, epochs=4)
    else:
        fit(module, sequence[1], callbacks, epochs=4)
    assert hooks(module) == []
    assert module(torch.zeros(2, 1, 8, 8)).isfinite().all()


def test_without_masking_everything_moves():
    module, (first, second, _) = classifier(), tasks()
    fit(module, first, three(), epochs=4)
    before = own_logits(module, first)
    fit(module, second, three()[:2], epochs=4)
    assert not torch.equal(own_logits(module, first), before)


# Measures and perturbations


@pytest.mark.parametrize(
    ("network", "measure"),
    [
        pytest.param(network, measure, marks=[pytest.mark.slow] if network == "resnet" and measure != "weight" else [])
        for network in ("mlp", "cnn", "resnet")
        for measure in ("weight", "update", "activation")
    ],
)
def test_every_measure_partitions_every_kind_of_network(network, measure):
    module, (task, *_) = classifier(network), tasks()
    fit(module, task, three(measure=measure), epochs=6)
    assert all(0 < share < 1 for share in state_of(module).ledger.capacity().values())
    assert score(module, task) > 0.9


def test_folding_keeps_what_cutting_alone_loses():
    scores = {}
    for fold in (True, False):
        module, (task, *_) = classifier("cnn"), tasks()
        fit(module, task, three(after=1.0, fold=fold, max_claim=0.1, min_claim=0.1), epochs=6)
        scores[fold] = state_of(module).ledger.records[0]["ablation_accuracy"]
    assert scores[True] > scores[False] + 0.2  # 0.91 to 0.96 and 0.5 over three seeds


class Spy(Callback):
    """Weights of the redundant units in each training step."""

    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        state = state_of(pl_module)
        if state.ledger.tasks[-1].phase == "invariance":
            redundant = state.ledger.owners["network.1"] == FREE
            self.seen.append(pl_module.network[1].weight.detach()[redundant].clone())


@pytest.mark.parametrize("perturbation", [Resample(), Noise(0.5), Ablate()])
def test_perturbations_last_a_step_and_leave_nothing_behind(perturbation):
    module, (task, *_) = classifier(), tasks()
    fit(module, task, three(isolation="perturb", after=1.0), epochs=3)
    before = {name: tensor.clone() for name, tensor in named_tensors(module).items()}
    spy = Spy()
    callbacks = [PartitionCallback(isolation="perturb"), InvarianceCallback(perturbation=perturbation), spy]
    fit(module, task, [*callbacks, MaskedGradientCallback()], epochs=1)
    redundant = state_of(module).ledger.owners["network.1"] == FREE
    base = before["network.1.weight"][redundant]
    assert len(spy.seen) > 2
    assert all(not torch.equal(seen, base) for seen in spy.seen)
    if not isinstance(perturbation, Ablate):
        assert not torch.equal(spy.seen[0], spy.seen[1])
    assert torch.equal(module.network[1].weight[redundant], base)
    assert not torch.equal(module.network[1].weight[~redundant], before["network.1.weight"][~redundant])


def test_a_perturbation_is_held_for_every_n_steps():
    module, (task, *_) = classifier(), tasks()
    fit(module, task, three(isolation="perturb", after=1.0), epochs=2)
    spy = Spy()
    callbacks = [
        PartitionCallback(isolation="perturb"),
        InvarianceCallback(perturbation=Resample(), every_n_steps=3),
        spy,
    ]
    fit(module, task, [*callbacks, MaskedGradientCallback()], epochs=1)
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(spy.seen)]
    assert changes[:5] == [False, False, True, False, False]


def test_another_ledger_is_a_change_that_masks_notice():
    module, (first, *_) = classifier(), tasks()
    fit(module, first, three(), epochs=2)
    state = state_of(module)
    for _ in range(2):
        before = state.ledger.revision
        keep_ledger(module, NeuronLedger.from_state_dict(state.ledger.state_dict()))
        assert state.ledger.revision > before


# Steps left out


@pytest.mark.parametrize(
    "kept", [k for n in (1, 2, 3) for k in itertools.permutations(("P", "I", "M"), n)], ids="".join
)
def test_each_callback_works_alone_and_with_any_other_in_any_order(kept):
    module, (first, second, _) = classifier(), tasks()
    make = {
        "P": lambda: PartitionCallback(after=0.5, isolation="perturb"),
        "I": lambda: InvarianceCallback(perturbation=Resample()),
        "M": MaskedGradientCallback,
    }
    spies = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for task in (first, second):
            spies.append(Spy())
            before = weights(module)
            fit(module, task, [*(make[name]() for name in kept), spies[-1]], epochs=2)
    ledger = state_of(module).ledger
    assert [entry.name for entry in ledger.tasks] == [first.name, second.name]
    unprotected = [w for w in caught if "nothing protects it from task '2-3'" in str(w.message)]
    assert len(unprotected) == ("P" not in kept)
    # What each does when it is there, and does not when it is not.
    claimed = {name: owner == 0 for name, owner in ledger.owners.items()}
    assert all(bool(mask.any()) == ("P" in kept) for mask in claimed.values())
    held = torch.equal(module.network[1].weight[claimed["network.1"]], before["network.1.weight"][claimed["network.1"]])
    assert held == ("M" in kept or "P" not in kept)
    outputs = before["network.5.weight"][:2]
    assert torch.equal(module.network[5].weight[:2], outputs) == ("M" in kept)
    redundant_move = any(not torch.equal(a, b) for a, b in itertools.pairwise(spies[0].seen))
    assert redundant_move == ("P" in kept and ("I" in kept or "M" not in kept))
    assert not hooks(module)

"""When the redundant units are perturbed, how, and in which sub-space; what later tasks' steps may change."""

from functools import partial

import pytest
import torch
from learning import classifier, fit, score, tasks, weights
from lightning.pytorch import Callback

from lightning_cf import (
    Ablate,
    Classifier,
    ContinualError,
    GivenSubspace,
    InvarianceCallback,
    LearnedSubspace,
    MaskedGradientCallback,
    Mixture,
    Noise,
    PartitionCallback,
    RandomSubspace,
    Resample,
    Rotation,
    TaskInferenceCallback,
)
from lightning_cf.invariance.disturbance import Disturbance
from lightning_cf.learner.keeping import state_of
from lightning_cf.models import MLP
from lightning_cf.network.forward import named_tensors
from lightning_cf.ownership.levels import FREE
from lightning_cf.partition.options import PartitionOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within the budget")

ADAMW = partial(torch.optim.AdamW, lr=0.003, weight_decay=0.1)


def three(invariance=None, masking=None, **partition):
    options = {"after": 0.5, "isolation": "perturb", "max_claim": 0.3, **partition}
    return [PartitionCallback(**options), invariance or InvarianceCallback(), masking or MaskedGradientCallback()]


def redundant(module):
    """Incoming vectors of the redundant units, all layers."""
    state, tensors = state_of(module), named_tensors(module)
    return {g.name: g.weights(tensors)[state.ledger.owners[g.name] == FREE].clone() for g in state.structure.groups}


class Watch(Callback):
    """What the network holds while a batch of INVARIANCE is computed, and between batches."""

    def __init__(self):
        self.during, self.between = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if state_of(pl_module).ledger.tasks[-1].phase == "invariance":
            self.during.append(redundant(pl_module))

    def on_train_epoch_end(self, trainer, pl_module):
        if state_of(pl_module).ledger.tasks[-1].phase == "invariance" and self.during:
            self.between.append(redundant(pl_module))


def runs(draws):
    """Lengths of the runs of equal draws."""
    lengths = []
    for before, now in zip([None, *draws], draws, strict=False):
        if before is not None and all(torch.equal(before[name], now[name]) for name in now):
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths


class Batches(Callback):
    """The redundant units after each batch's forward pass."""

    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        if state_of(pl_module).ledger.tasks[-1].phase == "invariance":
            self.seen.append(redundant(pl_module))


@pytest.mark.parametrize(
    ("every", "accumulate", "expected"),
    [
        ({}, 1, 1),
        ({}, 2, 2),  # a step is two batches
        ({"every_n_steps": 3}, 1, 3),
        ({"every_n_steps": 3}, 2, 6),
        ({"every_n_batches": 3}, 1, 3),
        ({"every_n_batches": 3}, 2, 3),
        ({"every_n_epochs": 1}, 1, 6),
        ({"every_n_epochs": 2}, 1, 12),
    ],
)
def test_a_draw_is_held_for_so_many_steps_batches_or_epochs(every, accumulate, expected):
    module, (task, *_) = classifier(), tasks()
    assert len(task.train_dataloader()) == 6
    seen = Batches()
    callbacks = [*three(InvarianceCallback(perturbation=Resample(), **every)), seen]
    fit(module, task, callbacks, epochs=12, accumulate_grad_batches=accumulate)
    lengths = runs(seen.seen)
    assert sum(lengths) == 36
    assert set(lengths) == {expected}


def test_validation_and_the_end_see_the_undisturbed_network():
    module, (task, *_) = classifier(), tasks()
    watch = Watch()
    fit(module, task, [*three(InvarianceCallback(perturbation=Resample())), watch], epochs=6)
    base = redundant(module)
    assert watch.during
    assert watch.between
    for during in watch.during:
        assert all(not torch.equal(during[name], base[name]) for name in base)
    for between in watch.between:
        assert all(torch.equal(between[name], base[name]) for name in base)


def test_draws_depend_on_seed_task_and_step_alone():
    class Draw(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if state_of(pl_module).ledger.tasks[-1].phase == "invariance":
                torch.rand(3)

    seen = {}
    for name, seed, more in (("a", 0, []), ("b", 0, [Draw()]), ("c", 1, [])):
        module, (task, *_) = classifier(), tasks()
        torch.manual_seed(7)
        seen[name] = Batches()
        invariance = InvarianceCallback(perturbation=Noise(), seed=seed)
        fit(module, task, [*more, *three(invariance), seen[name]], epochs=4)
    for name, equal in (("b", True), ("c", False)):
        for expected, drawn in zip(seen["a"].seen, seen[name].seen, strict=True):
            assert all(torch.equal(expected[layer], drawn[layer]) == equal for layer in drawn)


class TwoSteps(Classifier):
    """Two optimiser steps a batch, each with a forward pass of its own."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            x, y = batch
            optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self(x), y))
            optimizer.step()

    def configure_optimizers(self):
        layers = [self.network[1], self.network[3], self.network[5]]
        return [torch.optim.AdamW([*layers[0].parameters(), *layers[2].parameters()], lr=0.003),
                torch.optim.AdamW(layers[1].parameters(), lr=0.003)]  # fmt: skip


@pytest.mark.parametrize("order", [1, -1])
def test_every_forward_pass_of_a_batch_sees_its_draw(order):
    module, (task, *_) = classifier(), tasks()
    module.__class__ = TwoSteps
    module.automatic_optimization = False
    seen = []

    def watch(layer, inputs):
        state = state_of(module)
        if module.training and state.ledger.tasks and state.ledger.tasks[-1].phase == "invariance":
            seen.append(redundant(module)["network.1"])

    module.network[1].register_forward_pre_hook(watch)
    fit(module, task, three(InvarianceCallback(perturbation=Resample()))[::order], epochs=4)
    base = redundant(module)["network.1"]
    assert len(seen) == 24
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, base)
    assert not torch.equal(seen[0], seen[2])


class Judge(Callback):
    """A network of a callback's own, with an optimiser that the module has nothing to do with."""

    def on_fit_start(self, trainer, pl_module):
        self.network = torch.nn.Linear(3, 3)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1)
        self.steps = 0

    def step(self):
        self.network(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()
        self.steps += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.step()

    def on_validation_end(self, trainer, pl_module):
        self.step()


class AsTheyStand(Callback):
    """The redundant units when a batch of INVARIANCE starts, before anything perturbs them; stands first."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if state_of(pl_module).ledger.tasks[-1].phase == "invariance":
            self.seen.append(redundant(pl_module))


BESIDE = {
    "a head": lambda: [TaskInferenceCallback("reconstruction")],
    "a network of a callback's own": lambda: [Judge()],
}


@pytest.mark.parametrize("turn", [0, 2])
@pytest.mark.parametrize("beside", BESIDE)
def test_optimisers_that_step_something_else_leave_redundant_units_as_they_were(beside, turn):
    module, (task, *_) = classifier(), tasks()
    ours = [*three(InvarianceCallback(perturbation=Resample())), *BESIDE[beside]()]
    ours = [*ours[turn:], *ours[:turn]]
    seen = AsTheyStand()
    fit(module, task, [seen, *ours], epochs=4)
    assert len(seen.seen) == 12
    for vectors in [*seen.seen, redundant(module)]:
        assert all(torch.equal(vectors[name], seen.seen[0][name]) for name in vectors)
    assert all(callback.steps >= 24 for callback in ours if isinstance(callback, Judge))


def test_a_step_after_the_perturbation_is_over_puts_back_what_was_there_before_it():
    class Late(Callback):
        """Steps the module's own optimiser once more, when everything else of the batch is over."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.optimizers[0].step()

    module, (task, *_) = classifier(optimizer=ADAMW), tasks()
    seen = AsTheyStand()
    fit(module, task, [seen, *three(InvarianceCallback(perturbation=Resample())), Late()], epochs=4)
    for vectors in [*seen.seen, redundant(module)]:
        assert all(torch.equal(vectors[name], seen.seen[0][name]) for name in vectors)


def test_a_checkpoint_of_any_moment_holds_the_undisturbed_network(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    module, (task, *_) = classifier(), tasks()
    fit(module, task, [Save(), *three(InvarianceCallback(perturbation=Resample()))], epochs=4)
    free = state_of(module).ledger.owners["network.1"] == FREE
    base = redundant(module)["network.1"]
    saved = [torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")]
    saved = [c["state_dict"] for c in saved if c["lightning_cf"]["tasks"][-1]["phase"] == "invariance"]
    assert len(saved) == 12
    assert all(torch.equal(weights["network.1.weight"][free], base) for weights in saved)


def test_two_counts_contradict_each_other():
    with pytest.raises(ContinualError, match="every_n_steps=2 and every_n_epochs=3 contradict"):
        InvarianceCallback(every_n_steps=2, every_n_epochs=3)


@pytest.mark.parametrize("unit", ["steps", "batches", "epochs"])
def test_a_count_of_nothing_is_refused(unit, unchecked):
    with pytest.raises(ContinualError, match=f"every_n_{unit} must be a whole number of at least 1, got 0"):
        InvarianceCallback(**{f"every_n_{unit}": 0})


# Sub-spaces of the perturbation


@pytest.mark.parametrize("perturbation", [Resample(), Rotation(degrees=60.0), Noise(), Ablate()], ids=str)
def test_perturbations_stay_in_their_sub_space(perturbation):
    module, (task, *_) = classifier(), tasks()
    subspace, seen = RandomSubspace(dimensions=5), Batches()
    fit(module, task, [*three(InvarianceCallback(perturbation=perturbation, subspace=subspace)), seen], epochs=4)
    base = redundant(module)
    assert seen.seen
    for during in seen.seen:
        for name, vectors in during.items():
            basis = subspace.basis(name, vectors.shape[1], {})
            moved = vectors - base[name]
            assert (moved - moved @ basis @ basis.T).abs().max() <= 1e-6 * vectors.abs().max()
            assert moved.norm() > 1e-3


# Sub-spaces of training


@pytest.mark.parametrize("optimizer", [ADAMW, partial(torch.optim.SGD, lr=0.05, momentum=0.9)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("network", ["mlp", "cnn", pytest.param("resnet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("isolation", ["exact", "perturb"])
def test_later_tasks_move_free_units_in_the_sub_space_only(network, optimizer, isolation):
    module, (first, second, _) = classifier(network, optimizer), tasks()
    subspace = RandomSubspace(dimensions=0.25)
    masking = partial(MaskedGradientCallback, subspace=subspace)
    fit(module, first, three(masking=masking(), isolation=isolation), epochs=2)
    state = state_of(module)
    before = {g.name: g.weights(named_tensors(module)).clone() for g in state.structure.groups}
    shifts = {g.name: g.biases(named_tensors(module)).clone() for g in state.structure.groups}
    free = {name: owner == FREE for name, owner in state.ledger.owners.items()}
    fit(module, second, three(masking=masking(), isolation=isolation, after=1.0, fold=False), epochs=1)
    for group in state.structure.groups:
        vectors = group.weights(named_tensors(module))
        units = free[group.name]
        if isolation == "exact":  # the cut changes what is claimed
            units = units & (state.ledger.owners[group.name] == FREE)
        moved = (vectors - before[group.name])[units]
        basis = subspace.basis(group.name, vectors.shape[1], {})
        assert moved.norm() > 1e-3
        assert (moved - moved @ basis @ basis.T).norm() <= 1e-5 * moved.norm()
        assert torch.equal(group.biases(named_tensors(module))[units], shifts[group.name][units])
        assert torch.equal(vectors[~free[group.name]], before[group.name][~free[group.name]])


def test_the_first_task_trains_in_every_direction():
    free, held = classifier(), classifier()
    for module, subspace in ((free, None), (held, RandomSubspace(2))):
        torch.manual_seed(3)
        fit(module, tasks()[0], three(masking=MaskedGradientCallback(subspace=subspace)), epochs=4)
    assert all(torch.equal(a, b) for a, b in zip(weights(free).values(), weights(held).values(), strict=True))


def test_a_given_sub_space_holds_the_layers_it_names():
    module, (first, second, _) = classifier(), tasks()
    given = GivenSubspace({"network.1": torch.eye(64)[:, 10:20]})
    fit(module, first, three(), epochs=4)
    before = weights(module)
    fit(module, second, three(masking=MaskedGradientCallback(subspace=given), after=1.0), epochs=3)
    moved = (weights(module)["network.1.weight"] - before["network.1.weight"]).abs().sum(dim=0)
    assert not moved[:10].any()
    assert not moved[20:].any()
    assert bool((moved[10:20] > 0).any())
    assert not torch.equal(weights(module)["network.3.bias"], before["network.3.bias"])


def test_a_given_layer_that_is_not_there_is_named():
    given = GivenSubspace({"network.7": torch.eye(64)})
    with pytest.raises(ContinualError, match=r"a basis for 'network.7'.*network.1, network.3"):
        fit(classifier(), tasks()[0], three(InvarianceCallback(subspace=given)), epochs=2)


def test_a_given_basis_of_the_wrong_length_is_named():
    given = GivenSubspace({"network.1": torch.eye(63)})
    with pytest.raises(ContinualError, match=r"basis of 'network.1' has 63 rows, but weight vectors there have 64"):
        fit(classifier(), tasks()[0], three(InvarianceCallback(subspace=given)), epochs=2)


# Learned sub-spaces


def test_what_is_learned_holds_the_perturbation_and_then_the_next_tasks_steps():
    module, (first, second, _) = classifier("mlp", ADAMW), tasks()
    subspace, seen = LearnedSubspace(dimensions=6, steps=7), Batches()

    def held(**options):
        invariance = InvarianceCallback(perturbation=Resample(), subspace=subspace)
        return three(invariance, MaskedGradientCallback(subspace=subspace), **options)

    fit(module, first, [*held(), seen], epochs=8)
    state = state_of(module)
    directions = {name: basis.clone() for name, basis in state.ledger.directions.items()}
    assert {name: basis.shape[1] for name, basis in directions.items()} == {"network.1": 6, "network.3": 6}
    for basis in directions.values():
        torch.testing.assert_close(basis.T @ basis, torch.eye(6), atol=1e-5, rtol=0)
    base = redundant(module)
    moved = torch.cat([during["network.1"] - base["network.1"] for during in seen.seen])
    assert torch.linalg.matrix_rank(moved) < 64  # a few refreshed sub-spaces of six dimensions, never all 64
    last = seen.seen[-1]["network.1"] - base["network.1"]
    assert torch.linalg.matrix_rank(last, rtol=1e-4) <= 6
    before = {g.name: g.weights(named_tensors(module)).clone() for g in state.structure.groups}
    free = {name: owner == FREE for name, owner in state.ledger.owners.items()}
    fit(module, second, held(after=1.0), epochs=3)
    for group in state.structure.groups:
        step = (group.weights(named_tensors(module)) - before[group.name])[free[group.name]]
        basis = directions[group.name]
        assert step.norm() > 1e-3
        assert (step - step @ basis @ basis.T).norm() <= 1e-5 * step.norm()


def test_directions_are_those_of_the_redundant_units_gradients():
    """Against the singular vectors of all gradients, kept whole."""
    module, (task, *_) = classifier(), tasks()
    collected = {"network.1": [], "network.3": []}

    class Gradients(Callback):
        def on_fit_start(self, trainer, pl_module):
            for name, kept in collected.items():
                pl_module.get_submodule(name).weight.register_hook(lambda g, kept=kept: kept.append(g.clone()))

    subspace = LearnedSubspace(dimensions=3, steps=14)
    callbacks = three(InvarianceCallback(subspace=subspace), after=1.0)
    fit(module, task, [*callbacks, Gradients()], epochs=4)
    for name, basis in state_of(module).ledger.directions.items():
        units = state_of(module).ledger.owners[name] >= FREE  # in LEARN all units were free
        gradients = torch.cat([gradient[units] for gradient in collected[name][-14:]])
        _, s, vh = torch.linalg.svd(gradients.double(), full_matrices=False)
        held = (gradients.double() @ basis.double()).norm() / gradients.norm()
        best = (s[:3].norm() / s.norm()).item()
        assert held > 0.93 * best
        assert abs(float(vh[0] @ basis.double()[:, 0])) > 0.9


def test_a_rising_loss_leaves_the_learned_sub_space_alone():
    learned = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            state = state_of(pl_module)
            if state.ledger.tasks[-1].phase == "invariance" and state.ledger.directions:
                learned.append({name: basis.clone() for name, basis in state.ledger.directions.items()})

    class Worse(Callback):
        """Reports a loss that rises."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            outputs["loss"] = torch.tensor(float(trainer.global_step))

    module, (task, *_) = classifier(), tasks()
    subspace = LearnedSubspace(dimensions=3, steps=7)
    callbacks = partial(three, InvarianceCallback(subspace=subspace, perturbation=Noise()))
    fit(module, task, [Worse(), *callbacks(), Keep()], epochs=8)
    assert len(learned) >= 3
    for later in learned[1:]:
        assert all(torch.equal(later[name], learned[0][name]) for name in later)
    learned.clear()
    fit(classifier(), task, [*callbacks(), Keep()], epochs=8)
    assert any(not torch.equal(later[name], learned[0][name]) for later in learned[1:] for name in later)


def test_training_in_a_sub_space_that_nothing_learned_is_refused():
    module, (first, second, _) = classifier(), tasks()
    masking = MaskedGradientCallback(subspace=LearnedSubspace())
    fit(module, first, three(masking=masking), epochs=2)
    with pytest.raises(ContinualError, match="Give InvarianceCallback the same subspace"):
        fit(module, second, three(masking=masking), epochs=2)


def test_learned_sub_spaces_travel_in_checkpoints_and_no_hook_stays(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_cf import NeuronLedger

    module, (first, *_) = classifier(), tasks()
    keep = ModelCheckpoint(dirpath=tmp_path, filename="end")
    subspace = LearnedSubspace(dimensions=4, steps=7)
    fit(module, first, [*three(InvarianceCallback(subspace=subspace)), keep], epochs=6, enable_checkpointing=True)
    found = NeuronLedger.from_checkpoint(tmp_path / "end.ckpt").directions
    now = state_of(module).ledger.directions
    assert found.keys() == now.keys() == {"network.1", "network.3"}
    assert all(torch.equal(found[name], now[name]) for name in found)
    assert not any(parameter._backward_hooks for parameter in module.parameters())


# What it is for: a smaller sub-space keeps more, and lets less be learned


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_tiny_sub_space_keeps_the_first_task_and_slows_the_second(seed):
    kept, learned = {}, {}
    for name, subspace in (("tiny", RandomSubspace(dimensions=1)), ("all", None)):
        module, (first, second, _) = classifier(seed=seed), tasks()
        torch.manual_seed(seed)
        fit(module, first, three(max_claim=0.3), epochs=6)
        before = score(module, first)
        fit(module, second, three(masking=MaskedGradientCallback(subspace=subspace), after=1.0), epochs=4)
        kept[name], learned[name] = before - score(module, first), score(module, second)
    assert kept["tiny"] <= kept["all"]
    assert learned["tiny"] <= learned["all"] + 0.02


# What INVARIANCE is for


@torch.no_grad()
def cost_of_resampling(module, task, draws=8):
    """What resampling the redundant units costs in the task's test score, mean over some draws."""
    state, undisturbed, losses = state_of(module), score(module, task), []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        disturbance = Disturbance(module, state.structure, state.ledger, Resample(), generator)
        losses.append(undisturbed - score(module, task))
        disturbance.undo()
    assert score(module, task) == undisturbed
    return sum(losses) / draws


@pytest.mark.parametrize("perturbation", [None, Mixture([Ablate(), Resample()])], ids=["default", "mixture"])
@pytest.mark.parametrize("which", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_resampling_redundant_units_costs_at_most_the_tolerance_after_invariance(perturbation, which):
    torch.manual_seed(0)
    network = MLP(shape=(1, 8, 8), classes=10, hidden=(200, 200))
    module, task = Classifier(network, optimizer=partial(torch.optim.Adam, lr=0.002), cosine=False), tasks(5)[which]
    costs, tolerance = [], PartitionOptions().tolerance
    for epochs in (8, 12):  # LEARN, then INVARIANCE
        invariance = InvarianceCallback(perturbation=perturbation)
        fit(module, task, [PartitionCallback(isolation="perturb"), invariance, MaskedGradientCallback()], epochs=epochs)
        costs.append(cost_of_resampling(module, task))
    before, after = costs
    assert before > 5 * tolerance
    assert after <= tolerance
    assert score(module, task) > 0.97

"""Scores that say whose task an input is: each against a slow plain reference."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from views import labels, view

from lightning_cf import ContinualError
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.task_inference import STRATEGIES, Sites, Strategy, TaskInference, View, read, register
from lightning_cf.task_inference.autoencoder import InputAutoencoder
from lightning_cf.task_inference.combined import Sum
from lightning_cf.task_inference.neither import Neither
from lightning_cf.task_inference.reconstruction import Reconstruction
from lightning_cf.task_inference.rotations import Rotations
from lightning_cf.task_inference.statistics import InputSubspaces, LocalSubspaces, Mahalanobis, _local, _residual
from lightning_cf.task_inference.strategies import ON_TRIAL
from lightning_cf.task_inference.trained import trained_heads
from lightning_cf.task_inference.variants import ROTATIONS, VARIANTS


@given(
    tasks=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    name=st.sampled_from(sorted(STRATEGIES)),
)
@settings(max_examples=60, deadline=None)
def test_probabilities_are_a_distribution_over_tasks_and_none(tasks, seed, name):
    g = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(7, tasks, generator=g)
    mean, spread = torch.randn(tasks, generator=g), torch.rand(tasks, generator=g) + 0.1
    found = STRATEGIES[name].probabilities(scores, spread, mean - 2 * spread)
    assert found.shape == (7, tasks + 1)
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.sum(dim=1), torch.ones(7))
    assert torch.equal(found[:, :-1].argmax(dim=1), scores.argmax(dim=1))


def test_plain_is_a_sigmoid_for_one_task_and_a_softmax_with_neither_for_more():
    scores, rest = torch.tensor([[2.0], [-1.0]]), torch.zeros(1)
    found = STRATEGIES["plain"].probabilities(scores, rest + 1, rest)
    torch.testing.assert_close(found[:, 0], scores[:, 0].sigmoid())
    scores = torch.tensor([[2.0, -1.0, 0.5]])
    found = STRATEGIES["plain"].probabilities(scores, rest, rest)
    torch.testing.assert_close(found, torch.tensor([[2.0, -1.0, 0.5, 0.0]]).softmax(dim=1))


def test_scores_of_outputs():
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    seen = View(None, (), logits)
    assert float(STRATEGIES["energy"].score({}, seen)) == pytest.approx(float(np.log(np.exp([2.0, 0.0, -1.0]).sum())))
    p = float(logits.softmax(dim=1).max())
    assert float(STRATEGIES["max_softmax"].score({}, seen)) == pytest.approx(float(np.log(p / (1 - p))), rel=1e-5)
    assert float(STRATEGIES["joint"].score({}, seen)) == 2.0
    assert float(STRATEGIES["max_softmax"].score({}, View(None, (), logits[:, :1]))) == 2.0


def test_mahalanobis_equals_the_reference_where_all_directions_are_kept():
    seen, strategy = view(), Mahalanobis(rank=100)
    fitted = strategy.fit(seen, labels(), 2, seen)
    x = torch.cat(seen.hidden, dim=1).double().numpy()
    y = labels().numpy()
    means = np.stack([x[y == label].mean(0) for label in (0, 1)])
    centred = x - means[y]
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    # One direction, the least, stands for all that lies beside the others.
    inverse = vectors @ np.diag(1 / np.maximum(values, values.mean() * 1e-4)) @ vectors.T
    distance = np.stack([np.einsum("ni,ij,nj->n", x - m, inverse, x - m) for m in means]).min(0)
    np.testing.assert_allclose(-strategy.score(fitted, seen).numpy(), distance, rtol=1e-3, atol=1e-3)


def test_the_first_layer_counts_before_its_activation():
    seen = replace(view(), before=view(seed=1).hidden)
    alone = replace(seen, hidden=(), before=seen.before[:1])
    first, whole = STRATEGIES["first_layer"], Mahalanobis()
    found = first.score(first.fit(seen, labels(), 2, seen), seen)
    assert torch.equal(found, whole.score(whole.fit(alone, labels(), 2, alone), alone))


@pytest.mark.parametrize("before", [False, True])
def test_local_sub_spaces_equal_the_reference(before):
    seen, strategy = view(), LocalSubspaces(clusters=1, rank=3)
    if before:
        seen = replace(seen, before=tuple(x - 1 for x in seen.hidden[::-1]))
    fitted = strategy.fit(seen, labels(), 2, seen)
    x = torch.cat(seen.before or seen.hidden, dim=1).double().numpy() / fitted["scale"].double().numpy()
    y, found = labels().numpy(), []
    for label in (0, 1):
        own = x[y == label]
        centred = x - own.mean(0)
        _, _, axes = np.linalg.svd(own - own.mean(0))
        found.append((centred**2).sum(1) - ((centred @ axes[:3].T) ** 2).sum(1))
    np.testing.assert_allclose(-strategy.score(fitted, seen).numpy(), np.min(found, axis=0), rtol=1e-3, atol=1e-3)


def test_clusters_follow_what_lies_apart():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = torch.cat([c + 0.1 * torch.randn(60, 2, generator=torch.Generator().manual_seed(1)) for c in centres])
    seen = View(x, (), torch.zeros(180, 1))
    fitted = InputSubspaces(clusters=3, rank=1).fit(seen, torch.zeros(180, dtype=torch.long), 1, seen)
    nearest = torch.cdist(centres, fitted["centres"]).amin(dim=1)
    assert float(nearest.max()) < 0.2


def residual(fitted, seen, label):
    """The formulas of ``Reconstruction``, a sample at a time."""
    found = []
    for n in range(len(seen.inputs)):
        h = torch.cat([x[n] for x in seen.hidden])
        z = h @ fitted["encoder"][label] + fitted["code"][label]
        u = z @ fitted["decoder"][label] + fitted["top"][label]
        u = torch.where(u > 0, u, 0.1 * u)
        v = u @ seen.chain[1] + fitted["below"][label]
        v = torch.where(v > 0, v, 0.1 * v)
        y = v @ seen.chain[0] + fitted["mean"][label]
        found.append(((seen.inputs[n] - y) ** 2).mean() / fitted["unit"])
    return torch.stack(found)


def begun(seen, **options):
    strategy = Reconstruction(**options)
    fitted = strategy.begin(seen, labels(), 2, 2.0, torch.Generator().manual_seed(3))
    return strategy, {
        name: value + 0.1 * torch.randn(value.shape) for name, value in fitted.items() if name != "unit"
    } | {"unit": fitted["unit"]}


def test_reconstruction_equals_the_formulas():
    torch.manual_seed(0)
    seen = view()
    strategy, fitted = begun(seen)
    found = torch.stack([residual(fitted, seen, label) for label in (0, 1)], dim=1)
    torch.testing.assert_close(strategy.score(fitted, seen), -found.amin(dim=1).log(), rtol=1e-4, atol=1e-5)
    own = found.gather(1, labels()[:, None]).mean()
    torch.testing.assert_close(strategy.loss(fitted, seen, labels()), own, rtol=1e-4, atol=1e-5)
    with_logits = found - 0.5 * seen.logits.log_softmax(dim=1)
    both = Reconstruction("both", logits=0.5).score(fitted, seen)
    torch.testing.assert_close(both, -with_logits.amin(dim=1).log(), rtol=1e-4, atol=1e-5)


def test_a_head_starts_at_the_mean_of_each_class():
    seen = view()
    fitted = Reconstruction().begin(seen, labels(), 2, 1.0, torch.Generator())
    for label in (0, 1):
        torch.testing.assert_close(fitted["mean"][label], seen.inputs[labels() == label].mean(dim=0))


def turned(classes=2):
    """A view with views of strange and of rotated inputs; only some of the units are the task's own."""
    names = ["strange", *VARIANTS]
    others = {name: view(9 if name == "strange" else 40, classes=classes, seed=n + 1) for n, name in enumerate(names)}
    own = (torch.tensor([True, False, True, True, False]), torch.tensor([False, True, True, False]))
    others = {name: replace(other, own=own) for name, other in others.items()}
    return replace(view(classes=classes), own=own, others=others)


def linear(fitted, seen, n):
    """The outputs of a head for one sample."""
    h = torch.cat([hidden[n][own] for hidden, own in zip(seen.hidden, seen.own, strict=True)])
    return (h[:, None] * fitted["weight"]).sum(dim=0) + fitted["bias"]


def drawn(strategy, seen, classes):
    fitted = strategy.begin(seen, labels(), classes, 1.0, torch.Generator())
    assert all(bool((value == 0).all()) for value in fitted.values())
    g = torch.Generator().manual_seed(4)
    return {name: torch.randn(value.shape, generator=g) for name, value in fitted.items()}


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_neither_equals_the_formulas(classes):
    strategy, seen = Neither(), turned(classes)
    fitted = drawn(strategy, seen, classes)
    assert fitted["weight"].shape == (5, 1)
    odds, losses = [], []
    for n in range(40):
        known, none = seen.logits[n].exp().sum(), linear(fitted, seen, n).exp()[0]
        odds.append((known / none).log())
        losses.append(-(seen.logits[n, n % classes].exp() / (known + none)).log())
    torch.testing.assert_close(strategy.score(fitted, seen), torch.stack(odds), rtol=1e-4, atol=1e-5)
    strange, missed = seen.others["strange"], []
    for n in range(9):
        known, none = strange.logits[n].exp().sum(), linear(fitted, strange, n).exp()[0]
        missed.append(-(none / (known + none)).log())
    expected = (torch.stack(losses).mean() + torch.stack(missed).mean()) / 2
    target = labels(classes=classes)
    torch.testing.assert_close(strategy.loss(fitted, seen, target), expected, rtol=1e-4, atol=1e-5)
    without = replace(seen, others={"strange": strange.part(slice(0))})
    torch.testing.assert_close(strategy.loss(fitted, without, target), torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_rotations_equal_the_formulas(classes):
    strategy, once, seen = Rotations(), Rotations("once", ensemble=False), turned(classes)
    fitted = drawn(strategy, seen, classes)
    assert fitted["weight"].shape == (5, 4 * classes)
    views = [seen, *(seen.others[name] for name in VARIANTS)]
    logs = torch.stack([torch.stack([linear(fitted, v, n).log_softmax(0) for v in views]) for n in range(40)])
    found = [[logs[n, range(4), range(4 * c, 4 * c + 4)].mean() for c in range(classes)] for n in range(40)]
    expected = torch.tensor(found).amax(dim=1)
    torch.testing.assert_close(strategy.score(fitted, seen), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(once.score(fitted, seen), logs[:, 0, ::4].amax(dim=1), rtol=1e-4, atol=1e-5)
    own = torch.stack([-logs[n, k, 4 * (n % classes) + k] for n in range(40) for k in range(4)]).mean()
    torch.testing.assert_close(strategy.loss(fitted, seen, labels(classes=classes)), own, rtol=1e-4, atol=1e-5)


def test_a_sum_keeps_the_head_of_a_part_and_wants_what_the_part_wants():
    seen = turned()
    both = Sum("both", [Rotations(), Mahalanobis()])
    fitted = drawn(Rotations(), seen, 2)
    kept = both.keep(seen, labels(), 2, seen, {"rotations": fitted})
    assert both.variants == tuple(ROTATIONS)
    assert both.needs == "square"
    assert torch.equal(kept["rotations.weight"], fitted["weight"])
    a, b = Rotations().score(fitted, seen), Mahalanobis().score(Mahalanobis().fit(seen, labels(), 2, seen), seen)
    expected = (a - a.mean()) / a.std(correction=0) + (b - b.mean()) / b.std(correction=0)
    torch.testing.assert_close(both.score(kept, seen), expected, rtol=1e-4, atol=1e-4)
    assert [head.head for head in trained_heads([both, *STRATEGIES.values()])] == [
        "rotations",
        "reconstruction",
        "neither",
    ]


def test_a_little_of_a_statistic_joins_the_head_s_score_as_it_is():
    seen, head = view(), Reconstruction("reconstruction_logits", 0.02)
    _, fitted = begun(seen)
    kept = STRATEGIES["reconstruction_subspaces"].keep(seen, labels(), 2, seen, {"reconstruction": fitted})
    aid = LocalSubspaces()
    own = aid.score(aid.fit(seen, labels(), 2, seen), seen)
    expected = head.score(fitted, seen) + 0.1 * (own - own.mean()) / own.std(correction=0)
    found = STRATEGIES["reconstruction_subspaces"]
    torch.testing.assert_close(found.score(kept, seen), expected, rtol=1e-4, atol=1e-4)
    assert found.raw
    assert [h.head for h in trained_heads([found])] == ["reconstruction"]
    scores, spread = torch.randn(5, 3), torch.rand(3) + 0.1
    assert torch.equal(found.probabilities(scores, spread, spread), head.probabilities(scores, spread, spread))


class Margin(Strategy):
    """A user's own: how far the best output of a task lies above the second."""

    name = "margin"

    def score(self, fitted, view):
        best = view.logits.topk(2, dim=1).values
        return best[:, 0] - best[:, 1]


@pytest.mark.parametrize("name", ["energy", "auto", "", None])
def test_a_strategy_of_one_s_own_needs_a_name_of_its_own(name, monkeypatch):
    monkeypatch.setattr(Margin, "name", name)
    with pytest.raises(ContinualError, match="task_inference: Margin needs a name of its own, got"):
        register(Margin())


def test_a_strategy_of_one_s_own_needs_what_there_is(monkeypatch):
    monkeypatch.setattr(Margin, "needs", "magic", raising=False)
    with pytest.raises(ContinualError, match="task_inference: margin: needs must be one of"):
        register(Margin())
    assert "margin" not in STRATEGIES


def test_views_of_changed_inputs_are_cut_and_joined_with_the_view():
    seen = turned()
    seen = replace(seen, others={name: other for name, other in seen.others.items() if name != "strange"})
    parts = [seen.part(torch.arange(40) < 15), seen.part(slice(15, 40))]
    again = View.joined(parts)
    for one, other in zip(again.others.values(), seen.others.values(), strict=True):
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.hidden[1], other.hidden[1])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def owned(structure, owners, *, phase="invariance"):
    """A ledger with a task for each number among the owners."""
    ledger = NeuronLedger.for_structure(structure)
    for number in range(1 + max(max(o) for o in owners)):
        ledger.reserve(f"t{number}", [2 * number, 2 * number + 1])
        ledger.begin(f"t{number}", [2 * number, 2 * number + 1])
        ledger.tasks[-1].phase = "sealed"
    ledger.tasks[-1].phase = phase
    for group, owner in zip(structure.groups, owners, strict=True):
        ledger.owners[group.name] = torch.tensor(owner)
    return ledger


def test_a_task_sees_its_own_units_and_earlier_ones():
    net, x = network(), torch.randn(3, 1, 3, 3)
    structure = trace(net, x)
    ledger = owned(structure, [[0, 1, -1, 1, 0, -1], [1, 0, -1, 1, 0]])
    first, second = (Sites.of(net, structure, ledger, name) for name in ("t0", "t1"))
    assert first.inputs == "1.weight"
    assert [site.columns.tolist() for site in first.hidden] == [[0, 4], [1, 4]]
    assert [site.columns.tolist() for site in second.hidden] == [[0, 1, 3, 4], [0, 1, 3, 4]]
    assert [site.own.tolist() for site in second.hidden] == [[False, True, True, False], [True, False, True, False]]
    assert [(link.weight, link.rows.tolist()) for link in second.chain] == [
        ("1.weight", [0, 1, 3, 4]),
        ("3.weight", [0, 3]),
    ]
    assert second.chain[1].columns.tolist() == [0, 1, 3, 4]
    assert second.outputs.tolist() == [2, 3]
    readout = read(net, [second], lambda: net(x))
    seen = View.of(readout, second)
    assert torch.equal(seen.inputs, x.flatten(1))
    assert torch.equal(seen.hidden[0], net[1](x.flatten(1)).relu()[:, [0, 1, 3, 4]])
    assert torch.equal(seen.logits, net(x)[:, 2:])
    assert torch.equal(seen.chain[1], net[3].weight[[0, 3]][:, [0, 1, 3, 4]])
    assert torch.equal(seen.before[0], net[1](x.flatten(1))[:, [0, 1, 3, 4]])
    assert torch.equal(seen.before[1], net[3](net[1](x.flatten(1)).relu())[:, [0, 1, 3, 4]])
    again = Sites.from_state_dict(second.state_dict())
    assert torch.equal(View.of(readout, again).before[1], seen.before[1])
    assert again.state_dict().keys() == second.state_dict().keys()
    assert torch.equal(View.of(readout, again).hidden[1], seen.hidden[1])


def test_a_partition_takes_rows_away_from_a_head_and_changes_none():
    net, x = network(), torch.randn(12, 1, 3, 3)
    structure = trace(net, x)
    before = Sites.of(net, structure, owned(structure, [[0] + [-1] * 5, [0] + [-1] * 4]), "t0")
    ledger = owned(structure, [[0, 1, -1, 1, -1, -1], [1, 0, -1, 1, -1]])
    ledger.tasks[-1].phase = "learn"
    ledger.owners = {group.name: torch.tensor([0, *[-1] * (group.size - 1)]) for group in structure.groups}
    learning = Sites.of(net, structure, ledger, "t1")
    assert [site.own.sum() for site in learning.hidden] == [5, 4]
    after = Sites.of(net, structure, owned(structure, [[0, 1, -1, 1, -1, -1], [0, -1, 1, 1, -1]]), "t1")
    strategy = Reconstruction()
    seen = View.of(read(net, [learning], lambda: net(x)), learning)
    fitted = strategy.begin(seen, labels(12), 2, 1.0, torch.Generator().manual_seed(0))
    fitted["below"], fitted["top"] = torch.randn(2, 6), torch.randn(2, 4)
    narrowed = strategy.narrowed(fitted, learning, after)
    kept = [0, 2, 6, 7]  # of the own units 1 to 5 and 1 to 4: 1 and 3, and 2 and 3
    assert torch.equal(narrowed["encoder"], fitted["encoder"][:, kept])
    assert torch.equal(narrowed["decoder"], fitted["decoder"][:, :, [1, 2]])
    assert torch.equal(narrowed["top"], fitted["top"][:, [1, 2]])
    assert torch.equal(narrowed["below"], fitted["below"][:, [0, 1, 3]])
    assert before.chain
    linear = {"weight": torch.randn(9, 3), "bias": torch.randn(3)}
    less = Rotations().narrowed(linear, learning, after)
    assert torch.equal(less["weight"], linear["weight"][kept])
    assert torch.equal(less["bias"], linear["bias"])


def test_no_head_goes_back_through_layers_that_are_not_linear():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    structure = trace(net, torch.randn(2, 1, 3, 3))
    sites = Sites.of(net, structure, owned(structure, [[0] * 4, [0] * 5]), "t0")
    assert sites.chain == ()
    assert sites.inputs == "0.weight"
    assert len(sites.hidden) == 2


def test_units_are_seen_before_their_activation_where_one_linear_layer_computes_them():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner = nn.Conv2d(1, 4, 3), nn.Linear(4, 6)
            self.more, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.conv(x).relu().flatten(1)
            x = self.inner(x).relu()
            return self.head((x + self.more(x)).relu())

    net, x = Residual(), torch.randn(5, 1, 3, 3)
    structure = trace(net, x)
    ledger = owned(structure, [[0] * 4, [0, 0, -1, 0, -1, 0]])
    sites = Sites.of(net, structure, ledger, "t0")
    assert [site.producer for site in sites.hidden] == [None, None]  # a convolution; a sum of two layers
    seen = View.of(read(net, [sites], lambda: net(x)), sites)
    assert all(map(torch.equal, seen.before, seen.hidden))
    one = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    structure = trace(one, torch.randn(2, 4))
    sites = Sites.of(one, structure, owned(structure, [[0, 0, -1, 0, -1, 0]]), "t0")
    tokens = torch.randn(3, 7, 4)
    seen = View.of(read(one, [sites], lambda: one(tokens)), sites)  # of many tokens, the mean of what is read
    torch.testing.assert_close(seen.before[0], one[0](tokens).tanh().mean(dim=1)[:, [0, 1, 3, 5]])


def test_tokens_and_positions_count_by_their_mean():
    net = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Conv1d(4, 3, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    x = torch.randn(3, 2, 7)
    structure = trace(net, x)
    sites = Sites.of(net, structure, owned(structure, [[0] * 4]), "t0")
    seen = View.of(read(net, [sites], lambda: net(x)), sites)
    torch.testing.assert_close(seen.hidden[0], net[0](x).relu().mean(dim=2))
    torch.testing.assert_close(seen.logits, net(x)[:, :2])


def test_unknown_strategies_are_refused():
    with pytest.raises(ContinualError, match=r"must be one of auto, .*, all, plain, .*; got 'magic'; .* registered"):
        TaskInference(("magic",))


def test_an_autoencoder_gives_its_own_inputs_back_and_draws_nothing_from_the_global_stream():
    g = torch.Generator().manual_seed(0)
    near, far = (torch.randn(200, 2, generator=g) @ torch.randn(2, 12, generator=g) for _ in range(2))
    seen, strategy = View(near, (), torch.zeros(200, 2)), InputAutoencoder(width=8, steps=300)
    before = torch.get_rng_state()
    fitted = strategy.fit(seen, labels(200), 2, seen)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    with torch.no_grad():
        again = strategy.fit(seen, labels(200), 2, seen)
    assert all(torch.equal(again[name], value) for name, value in fitted.items())
    assert not any(value.requires_grad for value in fitted.values())
    code = ((near - fitted["mean"]) @ fitted["encoder"] + fitted["code"]).clamp_min(0)
    residual = (near - (code @ fitted["decoder"] + fitted["mean"])).square().mean(dim=1)
    torch.testing.assert_close(strategy.score(fitted, seen), -residual)
    assert float(residual.mean()) < 0.2 * float(near.var())
    assert float(strategy.score(fitted, View(far, (), seen.logits)).mean()) < -4 * float(residual.mean())


def test_an_autoencoder_on_trial_takes_one_step_and_trains_in_full_afterwards():
    seen, strategy = View(torch.randn(20, 6), (), torch.zeros(20, 2)), InputAutoencoder(width=4, steps=40)
    whole = strategy.fit(seen, labels(20), 2, seen)
    token = ON_TRIAL.set(True)
    tried, (one,) = strategy.fit(seen, labels(20), 2, seen), [InputAutoencoder(width=4, steps=1)]
    ON_TRIAL.reset(token)
    first, again = (each.fit(seen, labels(20), 2, seen) for each in (one, strategy))
    for name, value in whole.items():
        assert torch.equal(tried[name], first[name])
        assert torch.equal(again[name], value)
        assert name == "mean" or not torch.equal(tried[name], value)


@pytest.mark.parametrize("seed", range(3))
def test_of_features_that_vary_in_a_few_directions_half_are_kept_so_that_the_rest_is_no_rounding(seed):
    generator = torch.Generator().manual_seed(seed)
    spanning = torch.randn(4, 16, generator=generator)  # as 16 units of a linear layer on four values
    x, others = (torch.randn(64, 4, generator=generator) @ spanning for _ in range(2))
    fitted = _local(x, torch.arange(64) % 2, 2, 1, 8)
    assert fitted["directions"].shape == (2, 16, 2)
    found = _residual(others, fitted)
    exact = _residual(others.double(), {name: value.double() for name, value in fitted.items()})
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(
        found, torch.cat([_residual(other[None], fitted) for other in others]), rtol=1e-3, atol=0
    )
    assert bool((found > 1e-5).all())


def test_units_that_never_vary_are_one_cluster_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = _local(torch.ones(64, 6), torch.arange(64) % 2, 2, 2, 4)
    assert bool((_residual(torch.ones(3, 6), fitted) == 0).all())
    assert bool((_residual(torch.zeros(3, 6), fitted) > 0).all())

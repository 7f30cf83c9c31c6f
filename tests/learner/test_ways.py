"""Tasks that run one network in ways of their own: stems, bodies, heads and adapters by the task's name."""

import copy
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from learning import fit, images, judged, predictions, quiet_trainer, three
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_cf import (
    Classifier,
    ContinualError,
    ContinualModule,
    ContinualWarning,
    InvarianceCallback,
    LearnedSubspace,
    MaskedGradientCallback,
    NeuronLedger,
    PartitionCallback,
    SequentialTaskRunner,
    StructureWarning,
    Task,
    TaskInferenceCallback,
)
from lightning_cf.data import split_tasks
from lightning_cf.errors import FrozenWarning, StructureError
from lightning_cf.exactness.check import check_exact
from lightning_cf.exactness.probe import probe
from lightning_cf.learner.keeping import keep_ledger, state_for, state_of
from lightning_cf.models import MLP
from lightning_cf.network.forward import named_tensors
from lightning_cf.ownership.fresh_start import reinitialise_free
from lightning_cf.ownership.levels import FREE
from lightning_cf.ownership.owner_aware_norms import make_owner_aware
from lightning_cf.partition.folding import cut_claimed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
    pytest.mark.filterwarnings("ignore:.*cannot be inferred"),
    pytest.mark.filterwarnings("ignore:.*No task is inferred"),
    pytest.mark.filterwarnings("ignore:.*have no `validation_step`"),
]

NAMES = "abc"


class Wired(LightningModule):
    """Layers, and a function of them, a task's name and an input."""

    def __init__(self, wire, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.wire = wire

    def run_as(self, name, x):
        return self.wire(self, name, x)

    def training_step(self, batch, batch_idx):
        name = self.trainer.datamodule.name
        out = self.run_as(name, batch[0])
        return F.cross_entropy(out, batch[1] % 2 if out.shape[1] == 2 else batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.004)


def each(make):
    return nn.ModuleDict({name: make() for name in NAMES})


def stem(inputs=64, outputs=32):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs), nn.ReLU())


def deep():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 32), nn.ReLU())


def convolved():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


class LowRank(nn.Module):
    """What a LoRA adapter adds to a layer's output."""

    def __init__(self, inputs, outputs, rank=4):
        super().__init__()
        self.a, self.b = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.b(self.a(x))


class Bottleneck(nn.Module):
    def __init__(self, width, rank=8):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return x + self.up(torch.relu(self.down(x)))


def stems(make=stem, outputs=10):
    def wire(m, name, x):
        return m.head(torch.relu(m.body(m.stems[name](x))))

    return Wired(wire, stems=each(make), body=nn.Linear(32, 32), head=nn.Linear(32, outputs))


def one_hidden_layer():
    return Wired(lambda m, name, x: m.head(m.stems[name](x)), stems=each(stem), head=nn.Linear(32, 10))


def widths():
    wide = {"a": 64, "b": 32, "c": 48}

    def wire(m, name, x):
        return m.head(torch.relu(m.body(m.stems[name](x.flatten(1)[:, : wide[name]]))))

    made = nn.ModuleDict({name: stem(width) for name, width in wide.items()})
    return Wired(wire, stems=made, body=nn.Linear(32, 32), head=nn.Linear(32, 10))


def everything():
    def wire(m, name, x):
        return m.heads[name](torch.relu(m.bodies["bc" if name in "bc" else "a"](m.stems[name](x))))

    bodies = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("a", "bc")})
    return Wired(wire, stems=each(stem), bodies=bodies, heads=each(partial(nn.Linear, 32, 2)))


def between(make, names=NAMES):
    """Adapters between two shared layers, for some tasks."""

    def wire(m, name, x):
        x = torch.relu(m.first(x.flatten(1)))
        return m.head(torch.relu(m.second(m.adapters[name](x) if name in m.adapters else x)))

    adapters = nn.ModuleDict({name: make() for name in names})
    return Wired(wire, first=nn.Linear(64, 40), second=nn.Linear(40, 40), adapters=adapters, head=nn.Linear(40, 10))


def before():
    """Adapters of the input, for some tasks."""

    def wire(m, name, x):
        x = x.flatten(1)
        x = m.adapters[name](x) if name in m.adapters else x
        return m.head(torch.relu(m.second(torch.relu(m.first(x)))))

    adapters = nn.ModuleDict({"b": nn.Linear(64, 64), "c": Bottleneck(64)})
    return Wired(wire, first=nn.Linear(64, 40), second=nn.Linear(40, 40), adapters=adapters, head=nn.Linear(40, 10))


def low_rank(held=False):
    def wire(m, name, x):
        x = x.flatten(1)
        return m.head(torch.relu(m.second(torch.relu(m.first(x) + m.adapters[name](x)))))

    adapters = each(partial(LowRank, 64, 40))
    module = Wired(wire, first=nn.Linear(64, 40), second=nn.Linear(40, 40), adapters=adapters, head=nn.Linear(40, 10))
    module.first.requires_grad_(not held)
    return module


def low_rank_weights():
    """W + B A, as a weight."""

    def wire(m, name, x):
        weight = m.first.weight + m.adapters[name].b.weight @ m.adapters[name].a.weight
        return m.head(torch.relu(m.second(torch.relu(F.linear(x.flatten(1), weight, m.first.bias)))))

    adapters = each(partial(LowRank, 64, 40))
    return Wired(wire, first=nn.Linear(64, 40), second=nn.Linear(40, 40), adapters=adapters, head=nn.Linear(40, 10))


def images_into_features():
    def wire(m, name, x):
        return m.head(torch.relu(m.body(m.stems[name](x).flatten(1))))

    return Wired(wire, stems=each(convolved), body=nn.Linear(512, 32), head=nn.Linear(32, 10))


def images_into_images():
    def wire(m, name, x):
        return m.head(torch.relu(m.body(m.stems[name](x))).mean((2, 3)))

    return Wired(wire, stems=each(convolved), body=nn.Conv2d(8, 48, 3), head=nn.Linear(48, 10))


def normed(norm, own=True):
    """A norm behind a shared layer, for each task; or one behind stems of their own."""

    def wire(m, name, x):
        x = m.norms[name](m.first(x.flatten(1))) if own else m.norm(m.stems[name](x))
        return m.head(torch.relu(m.second(torch.relu(x))))

    shared = {"first": nn.Linear(64, 40), "norms": each(partial(norm, 40))}
    fed = {"stems": each(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 40))), "norm": norm(40)}
    return Wired(wire, **(shared if own else fed), second=nn.Linear(40, 40), head=nn.Linear(40, 10))


def skipping():
    """One task leaves a shared layer out."""

    def wire(m, name, x):
        x = torch.relu(m.first(x.flatten(1)))
        return m.head(torch.relu(m.third(x if name == "b" else torch.relu(m.second(x)))))

    layers = {name: nn.Linear(40, 40) for name in ("second", "third")}
    return Wired(wire, first=nn.Linear(64, 40), **layers, head=nn.Linear(40, 10))


def sliced():
    """All stems in one parameter."""

    def wire(m, name, x):
        return m.head(torch.relu(m.body(torch.relu(x.flatten(1) @ m.weights[NAMES.index(name)]))))

    module = Wired(wire, body=nn.Linear(32, 32), head=nn.Linear(32, 10))
    module.weights = nn.Parameter(torch.randn(3, 64, 32) / 8)
    return module


def scaled():
    """Features scaled by numbers of the task's own."""

    def wire(m, name, x):
        return m.head(torch.relu(m.second(torch.relu(m.first(x.flatten(1))) * m.scales[name])))

    scales = nn.ParameterDict({name: torch.ones(40) for name in NAMES})
    return Wired(wire, first=nn.Linear(64, 40), second=nn.Linear(40, 40), scales=scales, head=nn.Linear(40, 10))


def gated():
    """Features behind gates of the task's own, the rows of one table."""

    def wire(m, name, x):
        gates = torch.sigmoid(m.gates.weight[NAMES.index(name)])
        return m.head(torch.relu(m.second(torch.relu(m.first(x.flatten(1))))) * gates)

    layers = {"first": nn.Linear(64, 40), "second": nn.Linear(40, 40), "head": nn.Linear(40, 10)}
    return Wired(wire, gates=nn.Embedding(3, 40), **layers)


def two_share():
    """The third task runs the first one's stem."""

    def wire(m, name, x):
        return m.head(torch.relu(m.body(m.stems["b" if name == "b" else "a"](x))))

    made = nn.ModuleDict({name: stem() for name in "ab"})
    return Wired(wire, stems=made, body=nn.Linear(32, 32), head=nn.Linear(32, 10))


NETWORKS = {
    "stems": stems,
    "one hidden layer": one_hidden_layer,
    "stems, bodies and heads": everything,
    "adapters of the input": before,
    "LoRA": low_rank,
    "LayerNorm over stems": partial(normed, nn.LayerNorm, own=False),
    "gates in one table": gated,
}
MORE = {
    "bottlenecks": partial(between, partial(Bottleneck, 40)),
    "BatchNorm a task": partial(normed, nn.BatchNorm1d),
    "a layer left out": skipping,
    "stems in one parameter": sliced,
    "two share a stem": two_share,
    "deep stems": partial(stems, deep),
    "stems of different width": widths,
    "a bottleneck for one": partial(between, partial(Bottleneck, 40), "b"),
    "adapters that replace": partial(between, partial(nn.Linear, 40, 40), "bc"),
    "LoRA on a held layer": partial(low_rank, held=True),
    "LoRA in the weight": low_rank_weights,
    "convolutions, flattened": images_into_features,
    "convolutions": images_into_images,
    "BatchNorm over stems": partial(normed, nn.BatchNorm1d, own=False),
    "LayerNorm a task": partial(normed, nn.LayerNorm),
    "scales": scaled,
}
ALL = {**NETWORKS, **MORE}


def sequence(network="", order=(0, 1, 2)):
    """Pairs of digits, each task run as its name says."""
    own = network == "stems, bodies and heads"

    def evaluate(name):
        if own:
            return lambda module, batch: (module.run_as(name, batch[0]), batch[1] % 2)
        return lambda module, batch: (module.run_as(name, batch[0]), batch[1])

    found = split_tasks(images(), batch_size=32)
    return [
        Task(NAMES[n], found[n].data, classes=None if own else found[n].classes, evaluate=evaluate(NAMES[n]))
        for n in order
    ]


def learn(module, tasks, epochs=5, callbacks=(), **options):
    """Fits task after task; that nothing had to be put back, and what each task predicted right after its fit."""
    logits = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", FrozenWarning)
        for task in tasks:
            quiet_trainer(max_epochs=epochs, callbacks=[*three(**options), *callbacks]).fit(module, datamodule=task)
            logits.append(predictions(module, task))
    return logits


def check(module, tasks, logits):
    for task, before in zip(tasks, logits, strict=True):
        assert torch.equal(predictions(module, task), before), task.name
        assert judged(module, task) > 0.8, task.name  # chance is 0.5


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
@pytest.mark.filterwarnings("ignore::lightning_cf.StructureWarning")
def test_each_way_stays_bitwise_and_the_next_one_learns(name):
    torch.manual_seed(0)
    module, tasks = ALL[name](), sequence(name)
    check(module, tasks, learn(module, tasks, epochs=8))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ALL if name != "LoRA in the weight"])
def test_nothing_that_may_move_reaches_an_earlier_way(name):
    """Random weights for training, and random claims: each way goes on to give what it gave, and is not cut off."""
    torch.manual_seed(0)
    module, tasks = ALL[name]().eval(), sequence(name)
    parameters = dict(module.named_parameters())
    x, y = next(iter(tasks[0].judging_batches()))
    found = []
    for task in tasks:
        state = state_for(module, task)
        ledger = state.ledger
        ledger.reserve(task.name, state.meet(module, task))
        structure = state.structure
        ledger.begin(task.name, [], structure)
        for key, held in ledger.frozen(structure, parameters).items():
            parameters[key].copy_(torch.where(held, parameters[key], torch.randn(parameters[key].shape) * 0.3))
        needed = ledger.needed(structure, parameters)
        ran = {group.name for group in structure.groups_on(structure.way_of(task.name))}
        claims = {
            group.name: ((torch.rand(group.size) < 0.4) | needed[group.units]) & torch.tensor(group.name in ran)
            for group in structure.groups
        }
        ledger.claim(claims)
        make_owner_aware(module, ledger.norm_owners())
        cut_claimed(module, structure, ledger)
        probe(module, structure, ledger, state.example, state.forward)
        ledger.seal()
        columns = [0, 1] if len(module.run_as(task.name, x)[0]) == 2 else ledger.reserved[task.name]
        found.append((columns, task.evaluate(module, (x, y))[0][:, columns]))
        reinitialise_free(module, structure, ledger, task.name)
        for earlier, (columns, outputs) in zip(tasks, found, strict=False):
            now = earlier.evaluate(module, (x, y))[0][:, columns]
            assert torch.equal(now, outputs), (task.name, earlier.name)
            assert float(now.std(dim=0).min()) > 0


@pytest.mark.parametrize("order", [pytest.param((0, 1, 2), marks=pytest.mark.slow), (1, 0, 2)])
def test_a_forward_pass_with_a_default_task(order):
    class Default(Wired):
        def forward(self, x, name="a"):
            return self.run_as(name, x)

    torch.manual_seed(0)
    given = stems()
    module, tasks = Default(given.wire, **dict(given.named_children())), sequence(order=order)
    check(module, tasks, learn(module, tasks, epochs=8))
    # What forward runs without a name is not run for others: they claim none of it.
    owner = state_of(module).ledger.owners["stems.a.1"]
    assert set(owner.tolist()) == {FREE, order.index(0)}


@pytest.mark.parametrize(
    "make", [stems, pytest.param(partial(between, partial(Bottleneck, 40)), marks=pytest.mark.slow)]
)
def test_a_forward_pass_that_gives_every_tasks_outputs(make):
    class Every(Wired):
        def forward(self, x):
            return {name: self.run_as(name, x) for name in NAMES}

    torch.manual_seed(0)
    given = make()
    module = Every(given.wire, **dict(given.named_children()))
    tasks = [
        Task(t.name, t.data, classes=t.classes, evaluate=lambda m, b, name=t.name: (m(b[0])[name], b[1]))
        for t in sequence()
    ]
    check(module, tasks, learn(module, tasks, epochs=8))


class Switched(Wired):
    """Runs the stem that an attribute names, or that it is told."""

    active = "a"

    def forward(self, x, name=None):
        return self.run_as(name or self.active, x)


def test_a_stem_that_an_attribute_chooses_is_refused_before_training_with_a_way_out():
    torch.manual_seed(0)
    given = stems()
    module, tasks = Switched(given.wire, **dict(given.named_children())), sequence()[:2]
    learn(module, [Task("a", tasks[0].data, classes=[0, 1])])
    before = {name: tensor.clone() for name, tensor in named_tensors(module).items()}
    module.active = "b"
    with pytest.raises(ContinualError, match=r"earlier tasks run Switched is another one now\. .* by .* an attribute"):
        learn(module, [Task("b", tasks[1].data, classes=[2, 3])], epochs=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(module).items())
    module.active, logits = "a", predictions(module, tasks[0])
    told = Task("b", tasks[1].data, classes=[2, 3], evaluate=lambda m, batch: (m(batch[0], "b"), batch[1]))
    check(module, [tasks[0], told], [logits, *learn(module, [told], epochs=8)])


class ByWidth(Wired):
    """Chooses a stem by the width of its input."""

    def forward(self, x):
        return self.run_as({64: "a", 48: "b", 32: "c"}[x.shape[1]], x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_forward_pass_that_goes_by_its_input_is_followed_for_each_task():
    torch.manual_seed(0)
    made = nn.ModuleDict({name: stem(width) for name, width in zip(NAMES, (64, 48, 32), strict=True)})
    module = ByWidth(stems().wire, stems=made, body=nn.Linear(32, 32), head=nn.Linear(32, 10))
    tasks = []
    for task, width in zip(split_tasks(images(), batch_size=32), (64, 48, 32), strict=False):
        parts = {"train": list(task.train_dataloader()), "val": list(task.judging_batches())}
        narrow = {
            stage: TensorDataset(torch.cat([x.flatten(1)[:, :width] for x, _ in part]), torch.cat([y for _, y in part]))
            for stage, part in parts.items()
        }
        loaders = {stage: DataLoader(data, 32) for stage, data in narrow.items()}
        tasks.append(Task(NAMES[len(tasks)], loaders, classes=task.classes))
    check(module, tasks, learn(module, tasks, epochs=8))


@pytest.mark.parametrize("isolation", ["exact", pytest.param("perturb", marks=pytest.mark.slow)])
def test_the_runner_with_task_inference_of_its_choice(isolation, tmp_path):
    torch.manual_seed(0)
    runner = SequentialTaskRunner(
        stems(), sequence(), trainer=quiet_trainer, epochs=5, invariance_epochs=3, isolation=isolation, root=tmp_path
    )
    with pytest.warns(StructureWarning, match="^No task is inferred: 'body.weight' runs for task 'b' as it does not"):
        result = runner.run()
    assert min(result.accuracy.matrix.diag()) > 0.8
    if isolation == "exact":
        assert result.accuracy.forgetting == 0
    assert result.class_incremental is None


def test_joint_training_is_refused_where_a_training_step_asks_for_its_task(tmp_path):
    runner = SequentialTaskRunner(stems(), sequence(), trainer=quiet_trainer, method="joint", epochs=1, root=tmp_path)
    with pytest.raises(ContinualError, match=r"method='joint' trains on .* of ContinualWired cannot take .*: KeyError"):
        runner.run()


def test_a_strategy_that_cannot_see_every_way_is_refused_before_training(tmp_path):
    runner = SequentialTaskRunner(
        stems(), sequence(), trainer=quiet_trainer, task_inference="subspaces", epochs=1, root=tmp_path
    )
    before = {name: tensor.clone() for name, tensor in named_tensors(runner.module).items()}
    with (
        pytest.warns(StructureWarning, match="No task is inferred"),
        pytest.raises(ContinualError, match=r"task_inference=subspaces: 'body\.weight' runs for task 'b'"),
    ):
        runner.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(runner.module).items())


def test_a_later_task_with_a_way_of_its_own_is_not_inferred():
    torch.manual_seed(0)
    module, tasks = stems(), sequence()[:2]
    learn(module, tasks[:1], epochs=1, callbacks=[TaskInferenceCallback("statistics")])
    with pytest.warns(ContinualWarning) as told:
        learn(module, tasks[1:], epochs=1, callbacks=[TaskInferenceCallback("statistics")])
    (said,) = [str(found.message) for found in told if "inferred" in str(found.message)]
    assert said.startswith("Task 'b' cannot be inferred: 'body.weight' runs for it as it does not for earlier tasks")
    inference = state_of(module).ledger.inference
    assert [known["name"] for known in inference["tasks"]] == ["a"]


@pytest.mark.parametrize("make", [stems, two_share])
def test_another_process_must_know_every_way(make, tmp_path):
    torch.manual_seed(0)
    module, keep = make(), ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    for task in sequence()[:2]:
        quiet_trainer(max_epochs=3, callbacks=[*three(), keep], enable_checkpointing=True).fit(module, datamodule=task)
    before = [predictions(module, task) for task in sequence()[:2]]
    path = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)

    def loaded():
        other = make()
        other.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        keep_ledger(other, NeuronLedger.from_checkpoint(path))
        return ContinualModule(other)

    tasks = sequence()
    for known in (tasks[:1], tasks[1:2]):
        other = loaded()
        for task in known:
            other.add_task(task)
        with pytest.raises(ContinualError, match=r"add_task\(task\)"):
            learn(other, tasks[2:], epochs=1)
    other = loaded()
    for task in tasks[:2]:
        other.add_task(task)
    learn(other, tasks[2:], epochs=1)
    assert all(torch.equal(predictions(other, t), outputs) for t, outputs in zip(tasks, before, strict=False))


def test_a_way_that_cannot_be_isolated_is_refused_before_it_trains():
    class Standardised(nn.Linear):
        def forward(self, x):
            mean = self.weight.mean(dim=1, keepdim=True)
            return F.linear(x, (self.weight - mean) / self.weight.std(dim=1, keepdim=True), self.bias)

    torch.manual_seed(0)
    module, tasks = stems(deep), sequence()[:2]
    module.stems["b"][3] = Standardised(40, 32)
    learn(module, tasks[:1], epochs=1)
    before = {name: tensor.clone() for name, tensor in named_tensors(module).items()}
    with pytest.raises(StructureError, match=r"cannot hold: .*stems\.b"):
        learn(module, tasks[1:], epochs=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(module).items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning_cf.StructureWarning")
def test_a_learned_sub_space_is_one_of_what_the_tasks_way_reads():
    torch.manual_seed(0)
    module, tasks, subspace = between(partial(Bottleneck, 40)), sequence(), LearnedSubspace(dimensions=0.3)
    ours = [InvarianceCallback(subspace=subspace), MaskedGradientCallback(subspace=subspace)]
    logits = []
    for task in tasks:
        callbacks = [PartitionCallback(after=0.5), *ours]
        quiet_trainer(max_epochs=4, callbacks=callbacks).fit(module, datamodule=task)
        logits.append(predictions(module, task))
    check(module, tasks, logits)


def test_a_head_that_reads_an_earlier_tasks_outputs_is_refused_with_what_it_may_read():
    def wire(m, name, x):
        hidden = torch.relu(m.body(x.flatten(1)))
        return m.heads[name](hidden + (m.mix(m.heads["a"](hidden)) if name == "b" else 0))

    heads = nn.ModuleDict({name: nn.Linear(32, 10) for name in "ab"})
    module = Wired(wire, body=nn.Linear(64, 32), mix=nn.Linear(10, 32), heads=heads)
    tasks = sequence("stems, bodies and heads")
    learn(module, tasks[:1], epochs=1)
    with pytest.raises(
        ContinualError, match=r"Task 'b' reads what the output layer 'heads\.a' .* reads, the units before"
    ):
        learn(module, tasks[1:2], epochs=1)


def joining():
    """Two layers of tasks of their own, which a third task's way adds up."""

    def wire(m, name, x):
        x = x.flatten(1)
        return m.head(torch.relu({"a": m.first, "b": m.second, "c": lambda x: m.first(x) + m.second(x)}[name](x)))

    return Wired(wire, first=nn.Linear(64, 32), second=nn.Linear(64, 32), head=nn.Linear(32, 10))


def test_a_way_that_joins_what_tasks_own_is_refused_by_name_with_a_way_out_that_works():
    torch.manual_seed(0)
    module, tasks = joining(), sequence()
    learn(module, tasks[:2], epochs=1)
    with pytest.raises(ContinualError, match=r"Task 'c' .* joins units .* 'first', 'second' .*add_task\(task\)"):
        learn(module, tasks[2:], epochs=1)
    module = ContinualModule(joining())
    for task in tasks:
        module.add_task(task)
    check(module, tasks, learn(module, tasks, epochs=8))


def test_ways_that_were_known_together_are_met_again_one_by_one(tmp_path):
    torch.manual_seed(0)
    module, keep, tasks = ContinualModule(joining()), ModelCheckpoint(dirpath=tmp_path, filename="last"), sequence()
    for task in tasks:
        module.add_task(task)
    for task in tasks[:2]:
        quiet_trainer(max_epochs=2, callbacks=[*three(), keep], enable_checkpointing=True).fit(module, datamodule=task)
    before = [predictions(module, task) for task in tasks[:2]]
    other = joining()
    other.load_state_dict(torch.load(keep.best_model_path, weights_only=True)["state_dict"])
    keep_ledger(other, NeuronLedger.from_checkpoint(keep.best_model_path))
    other = ContinualModule(other)
    for task in tasks:
        other.add_task(task)
    learn(other, tasks[2:], epochs=1)
    assert all(torch.equal(predictions(other, t), outputs) for t, outputs in zip(tasks, before, strict=False))


def test_a_stem_that_the_user_holds_is_left_whole_to_its_task():
    torch.manual_seed(0)
    module, tasks = stems(), sequence()[:2]
    module.stems["b"].requires_grad_(False)
    before = module.stems["b"][1].weight.clone()
    learn(module, tasks, epochs=2)
    ledger = state_of(module).ledger
    assert ledger.whole == ["stems.b.1"]
    assert ledger.owners["stems.b.1"].tolist() == [1] * 32
    assert torch.equal(module.stems["b"][1].weight, before)


def test_who_gave_evaluate_is_not_advised_to_give_it():
    def evaluate(module, batch):
        raise RuntimeError("no such layer")

    task = Task("a", sequence()[0].data, classes=[0, 1], evaluate=evaluate)
    with pytest.raises(ContinualError, match=r"no such layer That is what its evaluate= says; let it run the module"):
        state_for(stems(), task)


@pytest.mark.parametrize("evaluate", [None, lambda module, batch: (module(batch[0]), batch[1])])
def test_a_network_of_a_fixed_batch_size_is_told_so_with_a_way_out(evaluate):
    class Recurrent(Wired):
        def forward(self, x):
            state = torch.zeros(1, self.size or len(x), 16)
            return self.head(self.layer(x.flatten(1, 2), (state, state))[0][:, -1])

    module = Recurrent(None, layer=nn.LSTM(8, 16, batch_first=True), head=nn.Linear(16, 10))
    given = split_tasks(images(), batch_size=32)[0]
    task = Task("a", given.data, classes=given.classes, **({} if evaluate is None else {"evaluate": evaluate}))
    module.size = 32
    with pytest.raises(
        ContinualError, match=r"its first batch of 32 samples, but not on 2 .* torch\.zeros\(1, len\(x\), 16\)"
    ):
        state_for(module, task)
    module.size = None
    state = state_for(module, task)
    check_exact(module, state.structure, state.ledger, state.example, state.forward)


# What is computed beside the predictions


def beside(computed):
    def evaluate(module, batch):
        out = module(batch[0])
        module.kept = computed(out.detach(), batch[1])
        return out, batch[1]

    return evaluate


BESIDE = {
    "nearest neighbours": lambda out, y: torch.cdist(out, out).fill_diagonal_(9e9).argmin(dim=1),
    "accuracy": lambda out, y: (out.argmax(dim=1) == y).float().mean(),
    "accuracy as a number": lambda out, y: (out.argmax(dim=1) == y).float().mean().item(),
    "torchmetrics": lambda out, y: multiclass_accuracy(out, y, num_classes=10),
    "entropy": lambda out, y: -(out.softmax(dim=1) * out.log_softmax(dim=1)).sum(dim=1).mean(),
    "differences": lambda out, y: (out[:, :1] - out).abs() + out.norm(),
    "correlation": lambda out, y: torch.corrcoef(out.T),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_does_not_reach_the_predictions_binds_no_units(name):
    torch.manual_seed(0)
    module = Classifier(MLP(shape=(1, 8, 8), classes=10, hidden=(32, 32)))
    (task, *_) = split_tasks(images(), batch_size=32)
    plain = state_for(Classifier(MLP(shape=(1, 8, 8), classes=10, hidden=(32, 32))), task)
    state = state_for(module, Task("a", task.data, classes=task.classes, evaluate=beside(BESIDE[name])))
    assert not state.structure.mixings
    assert not state.mixed
    assert [(g.name, g.size) for g in state.structure.groups] == [(g.name, g.size) for g in plain.structure.groups]
    check_exact(module, state.structure, state.ledger, state.example, state.forward)


def test_what_reaches_the_predictions_still_binds_them():
    module = Classifier(MLP(shape=(1, 8, 8), classes=10, hidden=(32, 32)))
    (task, *_) = split_tasks(images(), batch_size=32)

    def evaluate(module, batch):
        layers = list(module.network)
        hidden = nn.Sequential(*layers[:4])(batch[0])
        return nn.Sequential(*layers[4:])(hidden * torch.cdist(hidden, hidden).mean()), batch[1]

    state = state_for(module, Task("a", task.data, classes=task.classes, evaluate=evaluate))
    assert any("cdist" in found.operation for found in state.structure.mixings)


# A head a task, with labels of its own


def heads(*widths, joined=False):
    """A body and a head a task; ``forward`` gives all of them where they are joined."""

    class Headed(Wired):
        def forward(self, x):
            hidden = torch.relu(self.body(x.flatten(1)))
            return torch.cat([head(hidden) for head in self.heads.values()], dim=1) if joined else hidden

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(*self.trainer.datamodule.evaluate(self, batch))

    torch.manual_seed(0)
    made = nn.ModuleDict({name: nn.Linear(40, width) for name, width in zip(NAMES, widths, strict=False)})
    return Headed(None, body=nn.Linear(64, 40), heads=made)


def own_head(name, less=0, **declared):
    """A task that runs the head of its name; its labels are ``less`` smaller than the digits."""

    def evaluate(module, batch):
        return module.heads[name](torch.relu(module.body(batch[0].flatten(1)))), batch[1]

    data = split_tasks(images(), batch_size=32)[NAMES.index(name)].data
    x, y = map(torch.cat, zip(*data.train_dataloader(), strict=True))
    pairs = TensorDataset(x, y - less)
    loaders = {stage: DataLoader(pairs, 32, stage == "train") for stage in ("train", "val", "test")}
    return Task(name, loaders, **{"evaluate": evaluate, **declared})


@pytest.mark.parametrize(
    ("widths", "declared", "columns"),
    [
        ((2, 2), {"less": 2, "classes": [0, 1]}, [2, 3]),
        ((2, 2), {"less": 2, "classes": [0, 1], "outputs": [2, 3]}, [2, 3]),
        ((2, 3), {"less": 1, "classes": [1, 2]}, [3, 4]),
        ((3, 3), {"less": 2, "classes": [1, 0]}, [4, 3]),
        ((10, 10), {"classes": [2, 3]}, [12, 13]),
    ],
)
@pytest.mark.parametrize("wrap", [lambda module: module, ContinualModule], ids=["plain", "wrapped"])
@pytest.mark.filterwarnings("ignore:.*No output layer ran in the forward pass")
def test_classes_count_within_the_head_that_a_task_runs(widths, declared, columns, wrap):
    module, tasks = wrap(heads(*widths)), [own_head("a", classes=[0, 1]), own_head("b", **declared)]
    learn(module, tasks[:1], epochs=4)
    before = predictions(module, tasks[0])
    learn(module, tasks[1:], epochs=8)
    assert state_of(module).ledger.reserved == {"a": [0, 1], "b": columns}
    assert torch.equal(predictions(module, tasks[0])[:, :2], before[:, :2])
    assert judged(module, tasks[1]) > 0.8


def test_classes_that_a_head_has_not_are_refused_with_a_way_out():
    module, apart = heads(10, 2), {"evaluate": lambda m, b: (m.heads["b"](m(b[0])), b[1] - 2)}
    learn(module, [own_head("a", classes=[0, 1])], epochs=1)
    with pytest.raises(ContinualError, match=r"classes=\[2, 3\], which are outputs of another head: .* 10 to 11"):
        learn(module, [own_head("b", classes=[2, 3], **apart)], epochs=1)
    learn(module, [own_head("b", **apart)], epochs=1)


def test_heads_that_are_joined_lead_from_advice_to_advice_to_what_works():
    module, all_heads = heads(2, 2, joined=True), {"evaluate": lambda m, b: (m(b[0]), b[1])}
    learn(module, [own_head("a", classes=[0, 1], **all_heads)], epochs=1)
    second, again = {"less": 2, "classes": [0, 1]}, partial(copy.deepcopy, module)
    with pytest.raises(ContinualError, match=r"both have output 0\. Give one of them outputs=\[\.\.\.\] of its own"):
        learn(again(), [own_head("b", **second, **all_heads)], epochs=1)
    with pytest.raises(ContinualError, match=r"Let evaluate= return the task's own head alone, in which its classes"):
        learn(again(), [own_head("b", **second, outputs=[2, 3], **all_heads)], epochs=1)
    with pytest.raises(ContinualError, match=r"Let evaluate= of each task return a head of its own alone"):
        learn(ContinualModule(again()), [own_head("b", **second, **all_heads)], epochs=1)
    learn(module, [own_head("b", **second)], epochs=1)
    assert state_of(module).ledger.outputs_of("b") == [2, 3]


def test_a_run_of_tasks_with_heads_of_their_own(tmp_path):
    tasks = [own_head("a", classes=[0, 1]), own_head("b", less=2, classes=[0, 1])]
    result = SequentialTaskRunner(
        heads(2, 2), tasks, trainer=quiet_trainer, epochs=4, invariance_epochs=2, root=tmp_path, task_inference=None
    ).run()
    assert result.accuracy.forgetting == 0
    assert result.accuracy.average > 0.8


def test_outputs_that_are_products_with_an_embedding_are_refused_by_name():
    def wire(m, name, x):
        words = (x.flatten(1) * 3).long().clamp(0, 9)
        return F.linear(torch.relu(m.bodies[name](m.words(words).mean(1))), m.words.weight)

    module = Wired(wire, words=nn.Embedding(10, 24), bodies=each(partial(nn.Linear, 24, 24)))
    with pytest.raises(
        ContinualError, match=r"output head 'words' is a Embedding, which gives something else than one"
    ):
        learn(module, sequence()[:1], epochs=1)


class Nodes(LightningModule):
    """Graph convolutions over a graph that is a batch whole: features, adjacency, labels, and which nodes count."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 10)

    def forward(self, x, near):
        hidden = (near @ self.second((near @ self.first(x)).relu())).relu()
        return self.head(hidden)

    def training_step(self, batch, batch_idx):
        x, near, labels, chosen = batch
        return nn.functional.cross_entropy(self(x, near)[chosen], labels[chosen])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def graph(classes, *, sparse):
    labels = torch.arange(60) % 4
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(4, 12, generator=g)[labels] + torch.randn(60, 12, generator=g)
    near = torch.eye(60) + (torch.rand(60, 60, generator=g) < 0.1) * (labels[:, None] == labels)
    near = near / near.sum(1, keepdim=True)
    whole = (x, near.to_sparse() if sparse else near, labels, torch.isin(labels, torch.tensor(classes)))
    return DataLoader([whole], batch_size=None)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(("sparse", "wrap"), [(False, False), (True, False), (False, True)])
def test_a_graph_that_is_a_batch_whole_is_learned(sparse, wrap):
    """No samples can be cut out of it: what is near what would be another thing."""
    module, before = Nodes(), None
    module = ContinualModule(module) if wrap else module
    evaluate = lambda net, batch: (net(batch[0], batch[1])[batch[3]], batch[2][batch[3]])  # noqa: E731
    for name, classes in (("a", [0, 1]), ("b", [2, 3])):
        loader = graph(classes, sparse=sparse)
        task = Task(name, {"train": loader, "val": loader}, classes=classes, evaluate=evaluate)
        says = pytest.warns(StructureWarning, match=r"scores 30 of 60 rows") if wrap else nullcontext()
        with says:
            fit(module, task, three(), epochs=30)
        x, near, labels, chosen = loader.dataset[0]
        logits = module.eval()(*graph([0, 1], sparse=sparse).dataset[0][:2])
        own = module(x, near)[chosen][:, classes].argmax(1) + classes[0]
        assert float((own == labels[chosen]).float().mean()) > 0.8
        before = logits[:, :2] if before is None else before
        assert torch.equal(logits[:, :2], before)

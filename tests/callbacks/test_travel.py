"""What copies, pickles, checkpoints and exports of a module hold, in a fit and after it: the network, not our hooks."""

import copy
import gc
import io
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from clouds import INPUTS, clouds, loaders, points
from learning import fit, quiet_trainer, three
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_cf import (
    ContinualModule,
    NeuronLedger,
    SequentialTaskRunner,
    Task,
    TaskInferenceCallback,
)
from lightning_cf.learner.keeping import keep_ledger, ledger_of
from lightning_cf.network.forward import eval_mode
from lightning_cf.utilities.hooks import Hook

pytestmark = pytest.mark.filterwarnings("ignore")


class Plain(LightningModule):
    """Keeps its network among its hyper-parameters, as a well-known template does."""

    def __init__(self, net):
        super().__init__()
        self.save_hyperparameters()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.003)


def network(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 24), nn.ReLU(), nn.Linear(24, 24), norm(24), nn.ReLU(), nn.Linear(24, 10))


def sequence(**options):
    return [clouds("a", [0, 1], **options), clouds("b", [7, 3], **options)]


X = points([0, 1, 7, 3], count=40, seed=5)[0]


@torch.no_grad()
def bare(module):
    """What the weights compute, with every hook of the layers taken away meanwhile."""
    with eval_mode(module):
        x = X
        for layer in module.net if isinstance(module, Plain) else module:
            x = type(layer).forward(layer, x)
    return x


def plain(module):
    with torch.no_grad(), eval_mode(module):
        return module(X)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


def exported(module):
    with eval_mode(module):
        return torch.export.export(module, (X,)).module()(X)


def traced(module):
    with eval_mode(module):
        return torch.jit.trace(module, X, check_trace=False)(X)


class Copies(Callback):
    """Copies the module, and its network, at many moments of a fit, in every way; keeps what did not come out right."""

    def __init__(self, trace=False):
        self.wrong, self.count, self.trace = [], 0, trace

    def look(self, moment, module):
        expected = bare(module)
        shown = plain(module)
        for name, way in WAYS.items():
            for what, part in (("module", module), ("network", module.net)):
                self.count += 1
                if not torch.equal(plain(way(part)), expected):
                    self.wrong.append((moment, name, what))
        if self.trace:
            for way in (exported, traced):
                found = way(module.net)
                if not torch.allclose(found, expected, atol=1e-5):
                    self.wrong.append((moment, way.__name__))
        if not torch.equal(plain(module), shown):
            self.wrong.append((moment, "the module itself"))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 2:
            self.look("batch", module)

    def on_validation_end(self, trainer, module):
        self.look("validation", module)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.look("checkpoint", module)


@pytest.mark.parametrize("strategy", ["reconstruction_logits", pytest.param("neither", marks=pytest.mark.slow)])
def test_copies_made_in_a_fit_compute_what_the_weights_compute(strategy, tmp_path):
    module, copies = Plain(network()), []
    for task in sequence():
        copies.append(Copies())
        callbacks = [*three(max_claim=0.3), TaskInferenceCallback(strategy), copies[-1]]
        trainer = quiet_trainer(
            max_epochs=2,
            callbacks=[*callbacks, ModelCheckpoint(tmp_path / task.name)],
            enable_checkpointing=True,
            limit_train_batches=4,
        )
        trainer.fit(module, datamodule=task)
    assert [found.wrong for found in copies] == [[], []]
    assert min(found.count for found in copies) >= 30
    last = Copies(trace=True)
    last.look("after", module)
    assert last.wrong == []


def test_exports_and_traces_in_a_fit_hold_the_network_alone():
    class Exports(Copies):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                expected = bare(module)
                self.count += 1
                for way in (exported, traced):
                    if not torch.allclose(way(module.net), expected, atol=1e-5):
                        self.wrong.append(way.__name__)

        on_validation_end = Callback.on_validation_end
        on_save_checkpoint = Callback.on_save_checkpoint

    module, found = Plain(network()), Exports()
    fit(module, sequence()[0], [*three(), TaskInferenceCallback(), found], 1, limit_train_batches=2)
    assert (found.wrong, found.count) == ([], 1)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_written_in_a_fit_loads_by_the_plain_class_without_a_mask(tmp_path, weights_only):
    module = Plain(network())
    for task in sequence():
        keep = ModelCheckpoint(tmp_path / task.name, save_top_k=-1, save_weights_only=weights_only)
        fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback(), keep], 2, enable_checkpointing=True)
        for path in (tmp_path / task.name).glob("*.ckpt"):
            again = Plain.load_from_checkpoint(path, weights_only=False)
            assert torch.equal(plain(again), bare(again))
            assert float(plain(again).min()) > -1e6
        assert torch.equal(plain(again), plain(module))


def test_a_runner_s_module_that_keeps_its_network_writes_checkpoints(tmp_path):
    class Keeps(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / f"{trainer.datamodule.name}.ckpt")

    module = Plain(network())
    SequentialTaskRunner(
        module,
        sequence(),
        trainer=quiet_trainer,
        epochs=1,
        invariance_epochs=1,
        callbacks=[Keeps()],
        root=tmp_path / "run",
    ).run()
    for name in ("a", "b"):
        again = Plain.load_from_checkpoint(tmp_path / f"{name}.ckpt", weights_only=False)
        assert torch.equal(plain(again), bare(again))
    paths = sorted((tmp_path / "run" / "tasks").glob("*/checkpoint.ckpt"))
    assert torch.equal(plain(Plain.load_from_checkpoint(paths[-1], weights_only=False)), plain(module))


def test_a_network_stored_in_a_fit_loads_where_this_package_is_not(tmp_path):
    class Stores(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            torch.save(module.net, tmp_path / "net.pt")
            torch.save(bare(module), tmp_path / "expected.pt")

    fit(Plain(network()), sequence()[0], [*three(), TaskInferenceCallback(), Stores()], 1, limit_train_batches=2)
    torch.save(X, tmp_path / "x.pt")
    code = (
        "import sys; sys.modules['lightning_cf'] = None\n"
        "import torch\n"
        "net, x, y = (torch.load(n, weights_only=False) for n in ('net.pt', 'x.pt', 'expected.pt'))\n"
        "assert torch.equal(net.eval()(x), y)\n"
        "assert len(torch.export.export(net, (x,)).module()(x)) == len(y)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_norms_by_owners_compute_the_same_in_copies():
    module, found = Plain(network(nn.LayerNorm)), []

    class Norms(Callback):
        def on_validation_end(self, trainer, module):
            expected = bare(module)
            found.extend(torch.equal(plain(way(module.net)), expected) for way in WAYS.values())

    for task in sequence():
        fit(module, task, [*three(max_claim=0.3), Norms()], 4, limit_train_batches=2)
    assert len(found) >= 24
    assert all(found)
    assert type(module.net[3]).__name__ == "OwnerAwareLayerNorm"


def local(evaluate):
    """Tasks with an ``evaluate`` that no pickle can name."""
    return sequence(evaluate=(lambda module, batch: (module(batch[0]), batch[1])) if evaluate else None)


@pytest.mark.parametrize(("evaluate", "wrapped"), [(False, False), (True, False), (True, True)])
def test_modules_are_copied_and_pickled_after_any_fit_with_their_ledger(evaluate, wrapped):
    module = Plain(network())
    module = ContinualModule(module) if wrapped else module
    first, _ = local(evaluate)
    if wrapped:
        module.add_task(first)
    fit(module, first, [*three(max_claim=0.3), TaskInferenceCallback()], 2)
    for way in WAYS.values():
        other, (_, second) = way(module), local(evaluate)
        assert torch.equal(plain(other), plain(module))
        ledger, kept = ledger_of(module), ledger_of(other)
        assert kept is not ledger
        assert [task.name for task in kept.tasks] == ["a"]
        assert all(torch.equal(kept.owners[name], owner) for name, owner in ledger.owners.items())
        before = plain(other)[:, :2]
        fit(other, second, [*three(max_claim=0.3), TaskInferenceCallback()], 1)  # it goes on where the first one stood
        assert [task.name for task in ledger_of(other).tasks] == ["a", "b"]
        assert torch.equal(plain(other)[:, :2], before)
        assert torch.equal(plain(module)[:, :2], before)
        assert len(ledger_of(module).tasks) == 1


def in_a_process(module):
    return plain(module)


@pytest.mark.slow
def test_modules_go_to_other_processes():
    module = Plain(network())
    fit(module, local(True)[0], [*three(), TaskInferenceCallback()], 1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (found,) = pool.map(in_a_process, [module])
    assert torch.equal(found, plain(module))


def test_a_ledger_that_waits_travels_as_plain_data(tmp_path):
    module = Plain(network())
    fit(module, sequence()[0], three(), 2)
    fresh = Plain(network())
    keep_ledger(fresh, NeuronLedger.from_state_dict(ledger_of(module).state_dict()))
    for way in WAYS.values():
        assert [task.name for task in ledger_of(way(fresh)).tasks] == ["a"]


def tensors_in(value, path=""):
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors_in(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from tensors_in(inner, f"{path}.{number}")


def test_what_is_kept_to_infer_tasks_has_no_history_and_memory_of_its_own():
    module = Plain(network())
    for task in sequence():
        fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback("all")], 1)
    found = dict(tensors_in(ledger_of(module).inference))
    assert len(found) > 100
    for path, tensor in found.items():
        assert not tensor.requires_grad and tensor.is_contiguous(), path
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, path


def test_averages_are_copied_in_a_fit():
    """Of the weights alone: neither the mask on the head nor what keeps owned entries still is in it."""
    found = []

    class Stores(Callback):
        def on_train_epoch_end(self, trainer, module):
            average = next(c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))._average_model
            other = copy.deepcopy(average)  # to pickle one is refused by torch itself
            other.update_parameters(module)
            found.append(torch.equal(plain(other.module), bare(other.module)))
            found.append(int(other.n_averaged) == int(average.n_averaged) + 1)

    module = Plain(network())
    for task in sequence():
        fit(module, task, [EMAWeightAveraging(), *three(max_claim=0.3), Stores()], 2)
    assert found == [True] * 8


def test_hooks_are_a_call_that_does_nothing_once_they_travelled():
    for way in WAYS.values():
        assert way(Hook(lambda *_: 1 / 0))(1, 2, 3) is None


# What lives longer than its phase


@pytest.fixture
def anew():
    """What was alive before the test is not looked through: all that was imported, each time."""
    gc.collect()
    gc.freeze()


def held(least):
    """Bytes of all tensors of some size that are alive."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.numel() >= least:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())


def small(number):
    x, _ = points([2 * number % 10, (2 * number + 1) % 10], count=32, seed=number)
    return Task(f"t{number}", loaders(x, torch.arange(32) % 2 + 2 * number), classes=[2 * number, 2 * number + 1])


def wide():
    torch.manual_seed(0)
    return Plain(nn.Sequential(nn.Linear(INPUTS, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 16)))


LARGE = 500  # entries: every weight, its averages in an optimiser, and no data of a task


@pytest.mark.slow
@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("method", ["partition", "finetune"])
def test_a_run_holds_no_more_memory_after_eight_tasks_than_after_two(method, tmp_path):
    module, tasks, after = wide(), [small(number) for number in range(8)], {}
    runner = SequentialTaskRunner(
        module,
        tasks,
        trainer=quiet_trainer,
        epochs=1,
        invariance_epochs=1,
        method=method,
        task_inference=None,  # what is kept of each task to infer it by is meant to stay
        root=tmp_path,
    )
    fit = runner.fit

    def measured(task, epochs, ours):
        fit(task, epochs, ours)
        after[task.name] = held(LARGE)

    runner.fit = measured
    runner.run()
    assert len(after) == 8
    assert max(list(after.values())[2:]) <= after["t1"]


@pytest.mark.usefixtures("anew")
def test_fits_of_one_s_own_hold_no_more_memory_after_eight_tasks_than_after_two():
    module, tasks, after = ContinualModule(wide()), [small(number) for number in range(8)], []
    for task in tasks:
        module.add_task(task)
    for task in tasks:
        fit(module, task, [*three(max_claim=0.1), TaskInferenceCallback("energy")], 2)
        assert task.trainer is not None  # the last fit's is there to look at
        after.append(held(LARGE))
    assert max(after[2:]) <= after[1]
    assert [task.trainer for task in tasks[:-1]] == [None] * 7


def test_tasks_that_share_a_datamodule_let_only_the_old_trainer_go():
    module, shared = Plain(network()), sequence()[0].data
    first = Task("a", shared, classes=[0, 1])
    second = Task("b", shared, outputs=[2, 3], classes=[0, 1])
    seen = []

    class Sees(Callback):
        def on_train_start(self, trainer, module):
            seen.append((shared.trainer is trainer, trainer.datamodule.trainer is trainer, first.trainer is trainer))

    fit(module, first, [*three(max_claim=0.3), Sees()], 2)
    fit(module, second, [*three(max_claim=0.3), Sees()], 2)
    assert seen == [(True, True, True), (True, True, False)]

"""LightningModules of Lightning's own demos: with the three callbacks they learn two tasks.

They are as they stand, but for the LSTM's size: four layers of 512 units with a rate of 20 learn, or do not, as the
processor rounds; two of 128 units do in each case, in a twentieth of the time.
"""

import pytest
import torch
from learning import fit, judged, predictions, three
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel, RandomDataset
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_cf import Task
from lightning_cf.learner.keeping import state_of

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = 20


def language(number):
    """Sentences of ten words of its own, in which each word decides the next."""
    generator = torch.Generator().manual_seed(number)
    follower = torch.randperm(10, generator=generator)
    sentence = [torch.randint(10, (160,), generator=generator)]
    for _ in range(12):
        sentence.append(follower[sentence[-1]])
    sentences = torch.stack(sentence, dim=1) + 10 * number
    return TensorDataset(sentences[:, :-1].contiguous(), sentences[:, 1:].contiguous())


def languages(**options):
    return [
        Task(
            f"language {number}",
            {
                "train": DataLoader(language(number), 8, shuffle=True, drop_last=True),
                "val": DataLoader(language(number), 40),
            },
            classes=list(range(10 * number, 10 * number + 10)),
            **options,
        )
        for number in (0, 1)
    ]


def lstm():
    module = LightningLSTM(WORDS)
    module.model = SimpleLSTM(WORDS, ninp=128, nhid=128, nlayers=2)
    return module


def by_states(module, batch):
    """The LSTM demo hands its states on by itself while it trains; here each sentence starts anew."""
    predictions, _ = module.model(batch[0], module.model.init_hidden(len(batch[0])))
    return predictions, batch[1].flatten()


def numbers():
    def own(column):
        return lambda module, batch: (module(batch)[:, [column]], torch.ones(len(batch), 1))

    return [
        Task(
            f"number {column}",
            {stage: DataLoader(RandomDataset(32, 64), 8) for stage in ("train", "val")},
            outputs=[column],
            evaluate=own(column),
            metric=MeanSquaredError(),
        )
        for column in (0, 1)
    ]


@pytest.mark.parametrize(
    ("make", "sequence", "epochs", "options", "good"),
    [
        pytest.param(
            lambda: LightningTransformer(WORDS),
            languages,
            8,
            {},
            lambda s: s > 0.9,
            id="LightningTransformer",
            marks=[pytest.mark.slow],
        ),
        pytest.param(
            lstm,
            lambda: languages(evaluate=by_states),
            12,
            {"gradient_clip_val": 0.25},
            lambda s: s > 0.9,
            id="LightningLSTM",
            marks=[pytest.mark.slow],
        ),
        pytest.param(BoringModel, numbers, 4, {}, lambda s: s < 0.5, id="BoringModel"),
        pytest.param(ManualOptimBoringModel, numbers, 4, {}, lambda s: s < 0.5, id="ManualOptimBoringModel"),
    ],
)
def test_demos_learn_two_tasks_and_forget_nothing(make, sequence, epochs, options, good, monkeypatch):
    for demo in (LightningTransformer, LightningLSTM):
        monkeypatch.setattr(demo, "prepare_data", lambda self: None)  # it would download a text
    torch.manual_seed(0)
    module, tasks = make(), sequence()
    scores, before = [], []
    for task in tasks:
        fit(module, task, three(), epochs=epochs, **options)
        scores.append(judged(module, task))
        before.append(predictions(module, task))
    assert all(map(good, scores)), scores
    for task, learned, seen in zip(tasks, scores, before, strict=True):
        assert judged(module, task) == learned
        assert torch.equal(predictions(module, task), seen)
    assert [entry.phase for entry in state_of(module).ledger.tasks] == ["sealed", "sealed"]

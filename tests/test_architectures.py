"""Three tasks on networks of many kinds; writes and checks the table in ``docs/architectures.md``."""

import warnings
from functools import partial

import pytest
import torch
from architecture_table import row_of, table_row
from architectures import ARCHITECTURES
from learning import fit, own_logits, score, tasks, three
from torch import nn

from lightning_cf import Classifier, StructureError
from lightning_cf.errors import StructureWarning
from lightning_cf.ledger import FREE
from lightning_cf.state import state_of
from lightning_cf.structure import named_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
    pytest.mark.filterwarnings("ignore::lightning_cf.errors.StructureWarning"),
]

EPOCHS = 12
CONSTANT = 0.5
"""The constant predictor's accuracy on two classes."""


class Adapted(nn.Module):
    """A network for images that gives it what it takes."""

    def __init__(self, architecture):
        super().__init__()
        self.network = architecture.build()
        self.inputs = architecture.inputs

    def forward(self, x):
        given = self.inputs(x)
        return self.network(*given) if isinstance(given, tuple) else self.network(given)


def classifier(architecture):
    torch.manual_seed(0)
    return Classifier(
        Adapted(architecture), optimizer=partial(torch.optim.AdamW, lr=0.003, weight_decay=0.1), cosine=False
    )


def learn(module, isolation, epochs=EPOCHS):
    """Three tasks one after another; each one's logits right after it, and how many free weights moved meanwhile."""
    sequence, after, moved = tasks(), [], []
    for task in sequence:
        before = {name: tensor.detach().clone() for name, tensor in named_tensors(module).items()}
        fit(module, task, three(max_claim=0.3, isolation=isolation), epochs=epochs)
        moved.append(
            sum(int((t != before[name]).sum()) for name, t in named_tensors(module).items() if before[name].ndim)
        )
        after.append(own_logits(module, task))
    return sequence, after, moved


@pytest.mark.parametrize("name", [a.name for a in ARCHITECTURES if not a.refused])
def test_three_tasks_stay_bitwise_what_they_were(name, record_property):
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    module = classifier(architecture)
    sequence, after, moved = learn(module, "exact")
    scores = []
    for task, logits in zip(sequence, after, strict=True):
        assert torch.equal(own_logits(module, task), logits), task.name
        scores.append(score(module, task))
    assert min(scores) >= CONSTANT + 0.3, scores
    assert min(moved) > 200, moved
    state = state_of(module)
    assert any(bool((owner == FREE).any()) for owner in state.ledger.owners.values())
    record_property("architecture", row_of(name, module, scores))
    assert table_row(name) == row_of(name, module, scores), "run pytest --write-tables"

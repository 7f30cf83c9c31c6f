"""Classifiers over all tasks that look at the network's own units: frozen ones, a pretrained part's among them."""

from functools import partial

import pytest
import torch
from clouds import INPUTS, Net, clouds, points
from learning import fit, three
from torch import nn

from lightning_cf import Classifier, ContinualError, ContinualModule, TaskInferenceCallback
from lightning_cf.learner.inferring import inference_of
from lightning_cf.task_inference.accumulated import Accumulated
from lightning_cf.task_inference.features import Pretrained

pytestmark = pytest.mark.filterwarnings("ignore:.*and so it is with random weights", "ignore:.*no claim within")


def learned(module, strategy, options=None, **partition):
    module, sequence = ContinualModule(module), [clouds("a", [0, 1]), clouds("b", [7, 3]), clouds("c", [2, 5])]
    for task in sequence:
        module.add_task(task)
    for task in sequence:
        callback = TaskInferenceCallback(strategy, **(options or {}))
        fit(module, task, [*three(max_claim=0.3, **partition), callback], 4)
    return module


def right(module):
    x, y = points([0, 1, 7, 3, 2, 5], count=600, seed=5)
    return float((module.predict(x).probabilities[:, :-1].argmax(dim=1) == y).float().mean())


def test_units_of_the_first_task_tell_all_tasks_apart():
    assert right(learned(Net(256), "lda_units")) > 0.9


def test_what_may_be_kept_within_the_network_takes_it_where_all_else_stands_beside():
    module = learned(Net(64), "statistics", {"keep": "within"})
    assert set(inference_of(module.ledger).strategies) == {"lda_units", "subspaces"}


@pytest.mark.parametrize("order", [1, -1])
def test_units_that_move_cannot_be_looked_at(order):
    callbacks = [*three(isolation="perturb"), TaskInferenceCallback(Accumulated("units_of_mine", within=True))]
    with pytest.raises(ContinualError, match="units_of_mine: it needs hidden units that stay what they are, as under"):
        fit(ContinualModule(Net()), clouds("a", [0, 1]), callbacks[::order], 1)


@pytest.mark.parametrize("held", [False, True], ids=["left whole", "held by the user"])
def test_a_pretrained_part_is_looked_at_at_every_depth(held):
    torch.manual_seed(3)
    body = nn.Sequential(nn.Linear(INPUTS, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU())
    network = nn.Sequential(body, nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 10))
    body.requires_grad_(not held)
    module = Classifier(network, optimizer=partial(torch.optim.Adam, lr=0.003))
    features = Accumulated(f"pretrained_{held}", features=Pretrained())
    module = learned(module, features, exclude=["network.0"])
    assert len(inference_of(module.ledger).shared[features.name]["centre"]) == 40 + 24
    assert right(module) > 0.9

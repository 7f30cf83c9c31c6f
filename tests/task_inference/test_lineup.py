"""All tasks at once give, to the last bit, what one after another gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cf.task_inference import TaskInference
from lightning_cf.task_inference.cumulative import pooled
from lightning_cf.task_inference.known import Known
from lightning_cf.task_inference.lineup import Lineup
from lightning_cf.task_inference.readout import Readout
from lightning_cf.task_inference.sites import Sites

SIZES = st.one_of(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.builds(lambda tasks, classes: [classes] * tasks, st.integers(1, 6), st.integers(1, 20)),
)


def known(sizes, seed=0, classes=None):
    """Tasks of so many classes, whose columns lie anywhere, known by their highest output."""
    columns = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed)).split(sizes)
    calibration = {"joint": torch.tensor([0.0, 1.0, 0.0])}
    return [
        Known(
            str(n),
            classes or own.tolist(),
            Sites(None, (), {"head": torch.arange(sum(sizes))}, own),
            {"joint": {}},
            calibration,
        )
        for n, own in enumerate(columns)
    ]


def shown(sizes, batch, seed):
    outputs = torch.randn(batch, sum(sizes), generator=torch.Generator().manual_seed(seed))
    return Readout(None, {}, outputs * 10, {})


@given(SIZES, st.integers(1, 5), st.integers(0, 99))
def test_probabilities_and_classes_are_those_of_each_task_by_itself(sizes, batch, seed):
    tasks, seen = known(sizes, seed), shown(sizes, batch, seed)
    found = TaskInference(("joint",), tasks).infer(seen)
    own = [seen.outputs[:, task.sites.outputs] for task in tasks]
    assert torch.equal(found.within, torch.cat([x.softmax(dim=1) for x in own], dim=1))
    labels = [torch.tensor(task.classes)[x.argmax(dim=1)] for task, x in zip(tasks, own, strict=True)]
    assert torch.equal(found.classes, torch.stack(labels, dim=1))


@given(SIZES, st.integers(1, 5), st.integers(0, 99))
def test_sums_over_classes_and_pools_are_those_of_each_task_by_itself(sizes, batch, seed):
    lineup = Lineup.of(known(sizes), torch.device("cpu"))
    logits, others = (shown(sizes, batch, seed + n).outputs for n in range(2))
    pairs = zip(logits.split(sizes, dim=1), others.split(sizes, dim=1), strict=True)
    assert torch.equal(lineup.each(pooled, logits, others), torch.cat([pooled(*pair) for pair in pairs], dim=1))
    apart = torch.stack([part.logsumexp(dim=1) for part in logits.split(sizes, dim=1)], dim=1)
    assert torch.equal(lineup.reduced(lambda x: x.logsumexp(dim=-1), logits), apart)


@given(SIZES, st.integers(1, 5), st.integers(0, 99))
def test_predictions_add_up_what_each_task_says_of_a_class(sizes, batch, seed):
    tasks, seen = known(sizes, seed), shown(sizes, batch, seed)
    inference = TaskInference(("joint",), tasks)
    found, inferred = inference.predict(seen, sum(sizes)), inference.infer(seen)
    expected = torch.zeros(batch, sum(sizes) + 1)
    expected[:, -1] = inferred.probabilities[:, -1]
    for number, (task, within) in enumerate(zip(tasks, inferred.within.split(sizes, dim=1), strict=True)):
        expected.index_add_(1, torch.tensor(task.classes), inferred.probabilities[:, number : number + 1] * within)
    assert torch.equal(found.probabilities, expected)


def test_tasks_of_the_same_classes_share_their_probability():
    tasks = known([2, 2], classes=[0, 1])
    found = TaskInference(("joint",), tasks).predict(shown([2, 2], 3, 0), 2)
    assert found.probabilities.shape == (3, 3)
    torch.testing.assert_close(found.probabilities.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    "change", [lambda tasks: [*tasks, *known([3], 1)], lambda tasks: tasks[::-1], lambda tasks: tasks[:1]]
)
def test_a_lineup_is_that_of_the_tasks_of_now(change):
    inference = TaskInference(("joint",), known([2, 3]))
    before = inference.lineup(torch.device("cpu"))
    assert inference.lineup(torch.device("cpu")) is before
    inference.tasks = change(inference.tasks)
    assert inference.lineup(torch.device("cpu")).sizes == tuple(len(task.classes) for task in inference.tasks)

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cf.sequence.accuracy_matrix import (
    AccuracyMatrix,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    mean_forgetting,
)


@st.composite
def sequences(draw):
    """Scores at initialisation, and those after each of some tasks."""
    tasks = draw(st.integers(1, 6))
    row = st.lists(st.floats(-1, 1, width=32), min_size=tasks, max_size=tasks)
    return draw(row), draw(st.lists(row, min_size=tasks, max_size=tasks))


def mean(numbers):
    return sum(numbers) / len(numbers) if numbers else 0.0


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


@given(sequences())
def test_functions_equal_loops(sequence):
    initial, r = sequence
    tasks = len(r)
    forgotten = [max(r[i][j] for i in range(j, tasks)) - r[-1][j] for j in range(tasks)]
    assert average_accuracy(tensor(r)) == pytest.approx(mean([r[-1][j] for j in range(tasks)]))
    assert forgetting(tensor(r)).tolist() == pytest.approx(forgotten)
    assert mean_forgetting(tensor(r)) == pytest.approx(mean(forgotten[:-1]))
    assert backward_transfer(tensor(r)) == pytest.approx(mean([r[-1][j] - r[j][j] for j in range(tasks - 1)]))
    ahead = [r[j - 1][j] - initial[j] for j in range(1, tasks)]
    assert forward_transfer(tensor(r), tensor(initial)) == pytest.approx(mean(ahead))


@given(sequences())
def test_the_matrix_gives_what_the_functions_give(sequence):
    initial, r = sequence
    accuracy = AccuracyMatrix(len(r))
    for row in (initial, *r):
        accuracy.update(row)
    assert accuracy.sequential
    assert torch.equal(accuracy.matrix, tensor(r))
    assert torch.equal(accuracy.initial, tensor(initial))
    assert accuracy.forgetting_per_task == forgetting(tensor(r)).tolist()
    assert accuracy.compute() == {
        "average_accuracy": average_accuracy(tensor(r)),
        "forgetting": mean_forgetting(tensor(r)),
        "backward_transfer": backward_transfer(tensor(r)),
        "forward_transfer": forward_transfer(tensor(r), tensor(initial)),
    }


@given(sequences())
def test_forgetting_is_never_negative(sequence):
    assert (forgetting(tensor(sequence[1])) >= 0).all()


def test_nothing_is_forgotten_where_nothing_changed():
    accuracy = AccuracyMatrix(2)
    for row in ([0.5, 0.5], [1.0, 0.5], [1.0, 0.75]):
        accuracy.update(row)
    assert accuracy.compute() == {
        "average_accuracy": 0.875,
        "forgetting": 0.0,
        "backward_transfer": 0.0,
        "forward_transfer": 0.0,
    }


def test_joint_training_has_an_average_only():
    accuracy = AccuracyMatrix(3)
    accuracy.update([0.1, 0.2, 0.3])
    accuracy.update([0.7, 0.8, 0.9])
    assert not accuracy.sequential
    assert accuracy.average == pytest.approx(0.8)
    assert (accuracy.forgetting, accuracy.backward_transfer, accuracy.forward_transfer) == (0.0, 0.0, 0.0)
    assert accuracy.forgetting_per_task == [0.0, 0.0, 0.0]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="a row holds 3 scores, got 2"):
        AccuracyMatrix(3).update([0.5, 0.5])


def test_a_reset_matrix_is_empty():
    accuracy = AccuracyMatrix(1)
    accuracy.update([0.5])
    accuracy.reset()
    assert accuracy.rows == []

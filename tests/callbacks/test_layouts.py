"""Networks that pass sparse and nested tensors between their layers, and batches whose input is sparse."""

import pytest
import torch
from clouds import Net, points
from learning import fit, inferred, own_logits, three
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cf import DivergenceError, Task
from lightning_cf.network.finite import not_finite

pytestmark = pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR|no claim within the budget)")


class Layout(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


class Between(Net):
    """Its first layer's inputs go through another layout, which a layer of its own gives."""

    def __init__(self, change):
        super().__init__()
        self.layout = Layout(change)

    def forward(self, x):
        return super().forward(self.layout(x * (x > 0)).to_dense())


class Padded(Net):
    """A Transformer whose encoder makes nested tensors of what is padded, in eval mode."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(3, 16), nn.Linear(16, 10)
        self.b = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1)

    def forward(self, x):
        x = x.view(-1, 4, 3)
        return self.c(self.b(self.a(x), src_key_padding_mask=x.abs().sum(2) == 0).mean(1))


class Sparse(Net):
    def forward(self, x):
        return super().forward(x.to_dense())


def loader(classes, change):
    def collate(samples):
        x, y = map(torch.stack, zip(*samples, strict=True))
        return change(x), y

    x, y = points(classes, 64)
    x[::3, 9:] = 0  # the last of four tokens is padding
    return DataLoader(TensorDataset(x, y), 16, collate_fn=collate)


def task(name, classes, change):
    data = loader(classes, change)
    return Task(name, {"train": data, "val": data, "test": data}, classes=classes)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (Padded, lambda x: x),
        (lambda: Between(torch.Tensor.to_sparse), lambda x: x),
        (lambda: Between(torch.Tensor.to_sparse_csr), lambda x: x),
        (Sparse, torch.Tensor.to_sparse),
    ],
    ids=["nested", "sparse", "compressed", "sparse inputs"],
)
def test_what_a_task_owns_stays_bitwise(make, change):
    net, first = make(), task("a", [0, 1], change)
    fit(net, first, three(), epochs=2)
    before = own_logits(net, first)
    fit(net, task("b", [2, 3], change), three(), epochs=2)
    assert torch.equal(own_logits(net, first), before)


def test_tasks_of_sparse_inputs_are_inferred_by_the_networks_units():
    module = inferred(
        Sparse(), [task(name, c, torch.Tensor.to_sparse) for name, c in (("a", [0, 1]), ("b", [2, 3]))], "energy"
    )
    x = points([0, 1, 2, 3], 24)[0]
    expected = module.predict_any(x)
    assert all(torch.equal(a, b) for a, b in zip(module.predict_any(x.to_sparse()), expected, strict=True))
    x[2, 5] = torch.nan
    found, rows = module.predict_any(x.to_sparse()), torch.arange(24) == 2
    assert found.classes[2] == -1
    assert torch.equal(found.classes[~rows], expected.classes[~rows])


def test_numbers_are_looked_at_in_every_layout():
    fine, bad = torch.eye(4), torch.eye(4).index_fill(0, torch.tensor(2), torch.inf)
    layouts = {
        "plain": lambda x: x,
        "sparse": torch.Tensor.to_sparse,
        "compressed": torch.Tensor.to_sparse_csr,
        "blocks": lambda x: x.to_sparse_bsr((2, 2)),
        "nested": lambda x: torch.nested.nested_tensor(list(x)),
        "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        "mkldnn": torch.Tensor.to_mkldnn,
    }
    assert not not_finite({name: change(fine) for name, change in layouts.items()})
    assert not_finite({name: change(bad) for name, change in layouts.items()}) == list(layouts)


def test_a_sparse_batch_that_is_not_finite_is_said_to_hold_it():
    def spoiled(x):
        return x.index_fill(0, torch.tensor(3), torch.nan).to_sparse()

    data = {"train": loader([0, 1], spoiled), "val": loader([0, 1], torch.Tensor.to_sparse)}
    with pytest.raises(DivergenceError, match=r"step 1 .* its batch holds numbers that are not finite"):
        fit(Sparse(), Task("a", data, classes=[0, 1]), three())

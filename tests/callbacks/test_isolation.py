from functools import partial

import pytest
import torch
from learning import classifier, fit, own_logits, score, tasks, three
from torch import nn

from lightning_cf import Classifier, ContinualModule, NeuronLedger, keep_ledger
from lightning_cf.callbacks import MaskedGradientCallback
from lightning_cf.learner.keeping import state_of
from lightning_cf.network.forward import named_tensors
from lightning_cf.ownership.freezing import Freezer
from lightning_cf.ownership.levels import FREE

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within the budget")

OPTIMIZERS = {
    "sgd": (partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3), {}),
    "adam": (partial(torch.optim.Adam, lr=0.003), {}),
    "adamw-clipped": (partial(torch.optim.AdamW, lr=0.003, weight_decay=0.1), {"gradient_clip_val": 1.0}),
}


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [
        *[("mlp", optimizer) for optimizer in OPTIMIZERS],
        ("cnn", "sgd"),
        pytest.param("cnn", "adam", marks=pytest.mark.slow),
        pytest.param("resnet", "adamw-clipped", marks=pytest.mark.slow),
    ],
)
def test_logits_right_after_a_task_are_the_logits_after_the_last(network, optimizer):
    make, options = OPTIMIZERS[optimizer]
    module, sequence = classifier(network, make), tasks()
    after, moved = [], []
    for task in sequence:
        before = {name: tensor.clone() for name, tensor in named_tensors(module).items()}
        fit(module, task, three(max_claim=0.3), epochs=12, **options)
        moved.append(sum(int((tensor != before[name]).sum()) for name, tensor in named_tensors(module).items()))
        after.append(own_logits(module, task))
    for task, logits in zip(sequence, after, strict=True):
        assert torch.equal(own_logits(module, task), logits), task.name
        assert score(module, task) >= 0.9, task.name
    assert all(count > 1000 for count in moved)


@pytest.mark.parametrize("network", ["mlp", "cnn", "resnet"])
def test_owned_entries_stay_and_free_ones_move(network):
    module, (first, second, _) = classifier(network), tasks()
    fit(module, first, three(), epochs=2)
    state = state_of(module)
    owner = state.ledger.owner_of_units(state.structure)
    before = {name: tensor.clone() for name, tensor in named_tensors(module).items()}
    fit(module, second, three(), epochs=2)
    for name, uses in state.structure.entries.items():
        tensor = named_tensors(module)[name]
        owned = torch.stack([(owner[use.target] == 0).expand(tensor.shape) for use in uses]).any(dim=0)
        assert torch.equal(tensor[owned], before[name][owned]), name
        assert not torch.equal(tensor[~owned], before[name][~owned]), name


def test_outputs_learn_from_free_units():
    module, (task, *_) = classifier(), tasks()
    head = module.network[-1].weight
    before = head.detach().clone()
    fit(module, task, [MaskedGradientCallback()], epochs=1)
    assert float((head[:2] != before[:2]).any(dim=0).float().mean()) > 0.5  # the others are silent on this data
    assert torch.equal(head[2:], before[2:])


@pytest.mark.parametrize("network", ["cnn", "resnet"])
def test_owned_norm_channels_are_normalised_alike_in_training_and_inference(network):
    module, (first, second, _) = classifier(network), tasks()
    fit(module, first, three(max_claim=0.4))
    state = state_of(module)
    state.ledger.reserve(second.name, second.classes)
    state.ledger.begin(second.name, second.classes)
    masks = state.ledger.frozen(state.structure, named_tensors(module))
    owner = state.ledger.owner_of_units(state.structure)
    seen = 0
    with Freezer(module, masks).attach([]):
        for name, norm in module.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                (use,) = state.structure.entries[f"{name}.running_mean"]
                owned = owner[use.target] != FREE
                shifted = 3 + 5 * torch.randn(8, norm.num_features, 4, 4)
                trained, inferred = norm.train()(shifted), norm.eval()(shifted)
                assert torch.equal(trained[:, owned], inferred[:, owned])
                assert not torch.equal(trained[:, ~owned], inferred[:, ~owned])
                seen += int(owned.sum())
    assert seen > 0


def test_norms_by_owners_come_back_with_the_ledger(tmp_path):
    def network():
        hidden = nn.Linear(64, 48), nn.LayerNorm(48), nn.ReLU()
        return Classifier(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(48, 10)), optimizer=torch.optim.Adam)

    module, (task, *_), path = network(), tasks(), tmp_path / "task.ckpt"
    trainer = fit(module, task, three())
    trainer.save_checkpoint(path)
    x = next(iter(task.test_dataloader()))[0]
    wanted = module.eval()(x)
    loaded = network().eval()
    loaded.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert not torch.equal(loaded(x), wanted)
    keep_ledger(loaded, NeuronLedger.from_checkpoint(path))
    assert torch.equal(loaded(x), wanted)
    wrapped = ContinualModule(network()).eval()
    checkpoint = torch.load(path, weights_only=True)
    wrapped.on_load_checkpoint(checkpoint)
    wrapped.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(wrapped(x), wanted)

"""Three tasks on networks of many kinds; ``pytest tests/whole/test_architectures.py --write-tables`` writes a table."""

import architecture_table
import pytest
import torch
from adapted import classifier
from architectures import ARCHITECTURES
from learning import fit, own_logits, score, tasks, three

from lightning_cf import ContinualError
from lightning_cf.learner.forgetting import forget_task
from lightning_cf.learner.keeping import state_of
from lightning_cf.network.forward import named_tensors
from lightning_cf.ownership.levels import FREE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
    pytest.mark.filterwarnings("ignore::lightning_cf.errors.StructureWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:Plan failed"),
    pytest.mark.filterwarnings("ignore:.*in the forward pass, which belongs to earlier tasks"),
]

CONSTANT = 0.5
"""The constant predictor's accuracy on a task of two classes, to a few hundredths."""

WORKING = {a.name: a for a in ARCHITECTURES if a.refused is None}
SLOW = {
    "Inception", "DenseNet", "pre-activation ResNet with bottlenecks", "squeeze-and-excite", "ConvNeXt",
    "grouped convolutions, channels shuffled", "padding by reflection, replication, wrapping",
    "U-Net, bilinear upsampling", "Transformer decoder, tied embedding",
    "pixel shuffle and unshuffle", "max unpooling", "Transformer encoder, norm last", "ViT", "Swin", "MLP-Mixer",
    "causal Transformer, last token (GPT)", "nn.Transformer with a learned query",
    "attention pooling by a learned query", "bidirectional LSTM of two layers", "LSTMCell in a loop",
    "gated dilated convolutions (WaveNet)", "feature pyramid", "graph convolutions", "local response normalisation",
    "ViT, queries and keys normalised in each head", "MobileNet (depthwise separable)",
    "rotary, grouped-query, SwiGLU, RMSNorm (LLaMA)",
    "CNN with InstanceNorm, running statistics", "global response normalisation", "MLP with RMSNorm",
    "VGG", "Transformer encoder, norm first", "U-Net, transposed convolutions", "MLP with norms written by hand",
    "LSTM", "maxout", "gated linear units", "deep MLP", "CNN with InstanceNorm", "two heads, their outputs added up",
    "efficient channel attention (ECA)", "3-D convolutions", "ResNet", "CNN with GroupNorm", "1-D convolutions",
    "lazy convolutions", "MLP with dropout", "highway", "spectral_norm", "MLP with LayerNorm",
}  # fmt: skip
"""Left to .ci/run."""
REFUSED = {a.name: a for a in ARCHITECTURES if a.refused is not None}


def callbacks(architecture, **options):
    exclude = [f"network.net.{layer}" for layer in architecture.exclude]
    return three(max_claim=0.3, exclude=exclude, **options)


@torch.no_grad()
def outputs(module, task):
    """What the network returns on a task's test data, while it shows that task's outputs."""
    module.eval()
    with state_of(module).showing(module, [task]):
        return torch.cat([module(x) for x, _ in task.test_dataloader()])


def test_what_is_slow_exists():
    assert set(WORKING) >= SLOW


def forget_one(module, seen):
    """The second of three tasks is forgotten on purpose, then the last: what the others compute stays."""
    first, second, last = tasks()
    forget_task(module, second)
    for task, shown in ((first, seen[0]), (last, seen[2])):
        assert torch.equal(outputs(module, task), shown), task.name
    held = {group: int((owner > 0).sum()) for group, owner in state_of(module).ledger.owners.items()}
    assert forget_task(module, last.name) == held  # nobody is left to read them
    assert torch.equal(outputs(module, first), seen[0])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in WORKING])
def test_three_tasks_stay_bitwise_what_they_were(name, record_property):
    architecture, after, seen, scores = WORKING[name], [], [], []
    module = classifier(architecture)
    for number, task in enumerate(tasks()):
        before = {name: tensor.detach().clone() for name, tensor in named_tensors(module).items()} if number else {}
        fit(module, task, callbacks(architecture), epochs=architecture.epochs)
        after.append(own_logits(module, task))
        seen.append(outputs(module, task))
        scores.append(score(module, task))
        moved = sum(int((tensor != named_tensors(module)[name]).sum()) for name, tensor in before.items())
        assert moved > 500 or not number, task.name
    for task, logits, shown in zip(tasks(), after, seen, strict=True):
        assert torch.equal(own_logits(module, task), logits), task.name
        assert torch.equal(outputs(module, task), shown), task.name
    assert min(scores) >= CONSTANT + 0.3, scores
    state = state_of(module)
    free = {group: float((owner == FREE).double().mean()) for group, owner in state.ledger.owners.items()}
    assert all(share > 0 for group, share in free.items() if group not in state.ledger.whole), free
    row = architecture_table.working(name, module, scores)
    forget_one(module, seen)
    record_property("architecture", row)
    assert architecture_table.documented(name) == row[:-1], "the table is stale: pytest ... --write-tables"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_isolated_is_refused_before_training_and_learns_under_perturb(name, record_property):
    architecture = REFUSED[name]
    module = classifier(architecture)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ContinualError, match=architecture.refused) as refusal:
        fit(module, tasks()[0], callbacks(architecture), epochs=2)
    assert "isolation='perturb'" in str(refusal.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    module, scores = classifier(architecture), []
    for task in tasks():
        fit(module, task, callbacks(architecture, isolation="perturb"), epochs=architecture.epochs)
        scores.append(score(module, task))
    assert min(scores) >= CONSTANT + 0.3, scores
    row = architecture_table.refused(name, module, architecture.refused, scores)
    record_property("architecture", row)
    assert architecture_table.documented(name) == row[:-1], "the table is stale: pytest ... --write-tables"

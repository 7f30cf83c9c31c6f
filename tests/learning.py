"""Small real tasks and fits that several tests share."""

import warnings
from functools import cache, partial

import torch
from lightning.pytorch import Trainer

from lightning_cf import (
    Classifier,
    ContinualModule,
    InvarianceCallback,
    MaskedGradientCallback,
    PartitionCallback,
    TaskInferenceCallback,
)
from lightning_cf.data import digits, split_tasks
from lightning_cf.learner.keeping import state_of
from lightning_cf.models import CNN, MLP, ResNet
from lightning_cf.network.forward import eval_mode
from lightning_cf.network.output_heads import heads_of
from lightning_cf.tasks.evaluation import evaluate

quiet_trainer = partial(
    Trainer,
    accelerator="cpu",
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
    logger=False,
)

NETWORKS = {
    "mlp": partial(MLP, shape=(1, 8, 8), classes=10, hidden=(48, 48)),
    "cnn": partial(CNN, shape=(1, 8, 8), classes=10, channels=(16, 24), hidden=32),
    "resnet": partial(ResNet, shape=(1, 8, 8), classes=10, channels=(24, 32)),
}


@cache
def images():
    return digits()


def tasks(count=3, **options):
    return split_tasks(images(), batch_size=32, **options)[:count]


def classifier(network="mlp", optimizer=None, seed=0):
    torch.manual_seed(seed)
    optimizer = optimizer or partial(torch.optim.Adam, lr=0.003)
    return Classifier(NETWORKS[network](), optimizer=optimizer, cosine=False)


def three(**partition):
    return [PartitionCallback(**{"after": 0.5, **partition}), InvarianceCallback(), MaskedGradientCallback()]


def fit(module, task, callbacks, epochs=6, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks, **options)
        trainer.fit(module, datamodule=task)
    return trainer


def inferred(module, sequence, strategy, epochs=6, **options):
    """A ContinualModule after some tasks, whose inference was kept."""
    module = ContinualModule(module)
    for task in sequence:
        module.add_task(task)
    for task in sequence:
        fit(module, task, [*three(max_claim=0.3), TaskInferenceCallback(strategy)], epochs, **options)
    return module


@torch.no_grad()
def own_logits(module, task):
    """Raw logits of the task's columns on its test data."""
    module.eval()
    state, raw = state_of(module), {}
    heads = heads_of(module, state.structure)
    hooks = [
        head.register_forward_hook(lambda layer, inputs, output: raw[layer].append(output), prepend=True)
        for head in heads
    ]
    raw |= {head: [] for head in heads}
    for x, _ in task.test_dataloader():
        module(x)
    for hook in hooks:
        hook.remove()
    columns = torch.cat(list(heads.values()))
    return torch.cat([torch.cat(raw[head]) for head in heads], dim=1)[:, columns.argsort()][
        :, state.ledger.reserved[task.name]
    ]


def score(module, task):
    with state_of(module).showing(module, [task]):
        return evaluate(module, task, task.test_dataloader())


@torch.no_grad()
def predictions(module, task):
    """What the task is scored on, over the data that judges partitions."""
    with eval_mode(module), state_of(module).showing(module, [task]):
        return torch.cat([task.evaluate(module, batch)[0] for batch in task.judging_batches()])


def judged(module, task):
    """The score on that data."""
    with state_of(module).showing(module, [task]):
        return evaluate(module, task, task.judging_batches())


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items() if "_extra" not in name}

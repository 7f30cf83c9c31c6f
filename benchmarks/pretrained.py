"""A pretrained part of the network tells classes apart that it never saw: CIFAR-10, pre-trained on classes 0 to 4."""

import logging
import warnings
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

import torch
from cifar import JUDGING, Network, augmented, images
from common import QUIET, markdown, percent, write_section
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

TASKS = ((5, 6), (7, 8, 9))


class Body(nn.Module):
    """Everything of the network but its output layer."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.convolutions, self.hidden = network.convolutions, network.hidden

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.47) / 0.25
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))


def pretrained(x: Tensor, y: Tensor, epochs: int) -> Body:
    """Learns the first five classes in a plain loop."""
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.004, weight_decay=0.001)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, total_steps=epochs * (len(x) // 100))
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(100)[: len(x) // 100]:
            loss = F.cross_entropy(network(augmented(x[chosen])), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return Body(network)


def run(options: Namespace, seed: int) -> dict[str, float]:
    """Accuracies over classes 5 to 9, nobody naming the task; and how far the classifier is from one fitted at once."""
    from lightning.pytorch import Trainer

    import lightning_cf as cf
    from lightning_cf.learner.accumulating import training_of
    from lightning_cf.learner.inferring import inference_of
    from lightning_cf.task_inference.accumulated import Accumulated
    from lightning_cf.task_inference.cumulative import in_full
    from lightning_cf.task_inference.features import Pretrained

    torch.manual_seed(seed)
    (x, y), (test_x, test_y) = images(options.data_dir / "train.npz"), images(options.data_dir / "test.npz")
    held_x, held_y, x, y = x[-JUDGING:], y[-JUDGING:], x[: options.limit], y[: options.limit]
    body = pretrained(x[y < 5], y[y < 5], options.epochs)
    network = nn.Sequential(body, nn.Linear(128, 100), nn.ReLU(), nn.Linear(100, 10))

    def loader(x: Tensor, y: Tensor, classes: tuple[int, ...], **how: bool) -> DataLoader:
        chosen = torch.isin(y, torch.tensor(classes))
        return DataLoader(TensorDataset(x[chosen], y[chosen]), 100, **how)

    tasks = []
    for classes in TASKS:
        parts = {"train": loader(x, y, classes, shuffle=True), "val": loader(held_x, held_y, classes)}
        tasks.append(cf.Task(f"{classes}", {**parts, "test": loader(test_x, test_y, classes)}, classes=classes))
    strategy = Accumulated("depths", features=Pretrained(2, mirrored=True))
    module = cf.Classifier(network, optimizer=partial(torch.optim.Adam, lr=0.002))
    result = cf.SequentialTaskRunner(
        module,
        tasks,
        trainer=partial(Trainer, **QUIET),
        epochs=5,
        invariance_epochs=5,
        partition=cf.PartitionCallback(exclude=["network.0"]),
        task_inference=cf.TaskInferenceCallback(strategy, budget=3_000_000),
        seed=seed,
        root=options.runs / "pretrained" / f"{options.limit}-{seed}",
    ).run()
    inference = inference_of(module.ledger)
    shared, sites = inference.shared["depths"], inference.tasks[0].sites
    columns = torch.arange(5, 10)

    def read(x: Tensor):
        return inference.read(module, module, x, "depths", alone=True)

    @torch.no_grad()
    def told(kept: dict[str, Tensor]) -> Tensor:
        found = []
        for part in test_x[test_y > 4].split(500):
            with in_full(seen := read(part)):
                found.append(strategy.outputs(kept, seen, sites, columns))
        return torch.cat(found)

    sums = {name: value for name, value in shared.items() if not name.startswith("sums.")}
    batches = [each for task in tasks for each in training_of(module, task, inference)(sites)]
    for number in torch.randperm(len(batches)).tolist():  # those of all tasks, in any order
        seen, labels = batches[number]
        with in_full(seen):
            sums = strategy.add(sums, seen, sites, labels)
    # With a covariance that is all but the identity.
    nearest = Accumulated("nearest", features=strategy.features, shrinkage=1e6)
    outputs, others, right = told(shared), told(strategy.close(sums)), test_y[test_y > 4] - 5
    return {
        "task": result.accuracy.average,
        "lda": accuracy(outputs, right),
        "at once": accuracy(others, right),
        "apart": float((outputs - others).abs().max() / outputs.abs().max()),
        "nearest": accuracy(told(nearest.close(sums)), right),
        "last": accuracy(nearest_mean(body, x[y > 4], y[y > 4] - 5, test_x[test_y > 4]), right),
        "floats": inference.stored_floats("depths"),
    }


@torch.no_grad()
def nearest_mean(body: Body, x: Tensor, y: Tensor, test_x: Tensor) -> Tensor:
    """How near each test image lies to the mean of each class, in the last hidden layer's units as they are."""
    units, seen = (torch.cat([body(part) for part in rows.split(500)]) for rows in (x, test_x))
    return -torch.cdist(seen, torch.stack([units[y == label].mean(dim=0) for label in range(5)]))


def accuracy(outputs: Tensor, right: Tensor) -> float:
    return float((outputs.argmax(1) == right).float().mean())


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds train.npz and test.npz")
    parser.add_argument("--limit", type=int, default=8000, help="of the training images, half of which pre-train")
    parser.add_argument("--epochs", type=int, default=30, help="of pre-training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = [run(options, seed) for seed in options.seeds]
    rows = [
        ["task-incremental", percent([f["task"] for f in found])],
        ["`lda` over the pretrained part's units, task after task", percent([f["lda"] for f in found])],
        ["the same, all tasks at once", percent([f["at once"] for f in found])],
        ["largest difference of an output, as a share of the largest", f"{max(f['apart'] for f in found):.1e}"],
        ["nearest class mean of the same features, standardised", percent([f["nearest"] for f in found])],
        ["nearest class mean of the last hidden layer's units", percent([f["last"] for f in found])],
        ["numbers kept", f"{found[0]['floats']}"],
    ]
    write_section("pretrained", markdown(["classes 5 to 9", "%"], rows))


if __name__ == "__main__":
    main()

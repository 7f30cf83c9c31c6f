"""Two tasks, one after another, in a training loop of one's own: no Lightning, any optimiser."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_cf.functional as cf


def digits(classes):
    """Batches to train on, and images and labels held out."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    mine = torch.isin(y, torch.tensor(classes))
    x, y = x[mine], y[mine]
    return DataLoader(TensorDataset(x[200:], y[200:]), batch_size=32, shuffle=True), (x[:200], y[:200])


def fit(net, batches, columns, epochs):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.003)
    net.train()
    for _ in range(epochs):
        for x, y in batches:
            loss = F.cross_entropy(net(x)[:, columns], y - columns[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()


def accuracy(net, data, columns):
    x, y = data
    return (net(x)[:, columns].argmax(1) == y - columns[0]).float().mean().item()


def main():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    tasks = {"zero to four": [0, 1, 2, 3, 4], "five to nine": [5, 6, 7, 8, 9]}
    example = torch.rand(16, 64)

    units = cf.trace(net, example)  # who computes and who reads each weight
    ledger = cf.new_ledger(units)  # who owns which unit
    cf.check(net, units, ledger, example)  # can isolation be exact on this network?
    seen = []
    for name, columns in tasks.items():
        train, val = digits(columns)
        ledger.begin(name, outputs=columns)
        with cf.hold(net, units, ledger):
            fit(net, train, columns, epochs=10)
        cf.claim(net, units, ledger, batches=train, score=lambda v=val, c=columns: accuracy(net, v, c))
        with cf.hold(net, units, ledger):
            fit(net, train, columns, epochs=5)
        cf.seal(net, units, ledger)
        seen.append((columns, val, net(val[0])[:, columns]))
        print(f"{name}: {accuracy(net, val, columns):.3f}; free: {min(ledger.capacity().values()):.0%}")

    columns, val, before = seen[0]
    print("outputs of the first task bitwise the same:", torch.equal(net(val[0])[:, columns], before))


if __name__ == "__main__":
    main()

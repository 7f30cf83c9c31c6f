"""Two tasks in a loop of Lightning Fabric: the method works on the module, Fabric on the loop."""

import torch
from lightning.fabric import Fabric
from plain_loop import accuracy, digits
from torch import nn
from torch.nn import functional as F

import lightning_cf.functional as cf


def fit(fabric, net, batches, columns, epochs):
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.003))
    loader = fabric.setup_dataloaders(batches)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x)[:, columns], y - columns[0]))
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()


def main():
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    example = torch.rand(16, 64)

    units = cf.trace(net, example)
    ledger = cf.new_ledger(units)
    cf.check(net, units, ledger, example)
    seen = []
    for name, columns in {"zero to four": [0, 1, 2, 3, 4], "five to nine": [5, 6, 7, 8, 9]}.items():
        train, val = digits(columns)
        ledger.begin(name, outputs=columns)
        with cf.hold(net, units, ledger):
            fit(fabric, net, train, columns, epochs=10)
        cf.claim(net, units, ledger, batches=train, score=lambda v=val, c=columns: accuracy(net, v, c))
        with cf.hold(net, units, ledger):
            fit(fabric, net, train, columns, epochs=5)
        cf.seal(net, units, ledger)
        seen.append((columns, val, net(val[0])[:, columns]))
        print(f"{name}: {accuracy(net, val, columns):.3f}; free: {min(ledger.capacity().values()):.0%}")

    columns, val, before = seen[0]
    print("outputs of the first task bitwise the same:", torch.equal(net(val[0])[:, columns], before))


if __name__ == "__main__":
    main()

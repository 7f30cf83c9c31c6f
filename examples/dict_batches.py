"""A loop over batches that are dicts, with a model that takes them as keywords and returns logits and loss in one."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

import lightning_cf.functional as cf

WORDS, LENGTH, PADDING = 50, 12, 0


class Encoder(nn.Module):
    """A small Transformer, called and answering as those of the transformers library are."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 64, padding_idx=PADDING)
        self.layer = nn.TransformerEncoderLayer(64, 8, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.classifier = nn.Linear(64, 4)

    def forward(self, input_ids, attention_mask, labels=None):
        hidden = self.layer(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        weights = attention_mask.unsqueeze(-1)
        logits = self.classifier((hidden * weights).sum(1) / weights.sum(1))
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


def sentences(first, second, labels, seed):
    """Batches in which words of one half of a range stand for one label, those of the other half for the other."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(24):
        label = torch.randint(2, (16,), generator=generator)
        low = torch.where(label == 0, first, second)[:, None]
        words = low + torch.randint(5, (16, LENGTH), generator=generator)
        length = torch.randint(4, LENGTH + 1, (16, 1), generator=generator)
        mask = (torch.arange(LENGTH) < length).long()
        batches.append({"input_ids": words * mask, "attention_mask": mask, "labels": torch.tensor(labels)[label]})
    return batches


def run(model, batch):
    """How the method is to run the model on a batch."""
    return model(batch["input_ids"], batch["attention_mask"]).logits


def fit(model, batches, epochs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def accuracy(model, batches):
    right = [(run(model, batch).argmax(1) == batch["labels"]).float().mean() for batch in batches]
    return torch.stack(right).mean().item()


def main():
    torch.manual_seed(0)
    model, tasks = Encoder(), {"fruit": (1, 6, [0, 1]), "tools": (11, 16, [2, 3])}
    example = sentences(1, 6, [0, 1], seed=9)[0]

    units = cf.trace(model, example, run)
    ledger = cf.new_ledger(units)
    cf.check(model, units, ledger, example, run)
    seen = []
    for name, (first, second, labels) in tasks.items():
        train, val = (sentences(first, second, labels, seed) for seed in (0, 1))
        ledger.begin(name, outputs=labels)
        with cf.show(model, units, ledger):  # the model's own loss is over all labels
            with cf.hold(model, units, ledger):
                fit(model, train, epochs=4)
            cf.claim(
                model, units, ledger, batches=train, score=lambda v=val: accuracy(model, v), forward=run, tasks_left=2
            )
            with cf.hold(model, units, ledger):
                fit(model, train, epochs=2)
            cf.seal(model, units, ledger)
            print(f"{name}: {accuracy(model, val):.3f}; free: {min(ledger.capacity().values()):.0%}")
        model.eval()
        seen.append((labels, val[0], run(model, val[0])[:, labels]))
        model.train()

    labels, batch, before = seen[0]
    model.eval()
    print("outputs of the first task bitwise the same:", torch.equal(run(model, batch)[:, labels], before))


if __name__ == "__main__":
    main()

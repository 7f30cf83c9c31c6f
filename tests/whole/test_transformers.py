"""Three tasks on the transformers library's own classes, tiny and with random weights; nothing is fetched.

They run as users run them: batches are dicts, a module wraps the model, options are the defaults.
"""

import importlib.util
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from architectures import words
from learning import fit, score, tasks, three
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, Dataset

from lightning_cf import (
    ContinualError,
    StructureWarning,
    Task,
)
from lightning_cf.learner.keeping import state_of
from lightning_cf.network.forward import named_tensors

INSTALLED = importlib.util.find_spec("transformers") is not None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="transformers is not there: make transformers"),
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
]

LEARNED = 0.65
"""A constant answer scores 0.5, or less where every word is one."""

WORDS, PLACES, START, END, ANSWERS = 290, 16, 1, 2, 280


@dataclass(frozen=True)
class Tiny:
    """A model of the library.

    Attributes:
        name: of its class.
        config: of its configuration's class.
        options: what makes it small, beside what all have.
        reads: ``"text"``, ``"images"``, or ``"pairs"`` for a text that is answered by one.
    """

    name: str
    config: str
    options: dict = field(default_factory=dict)
    reads: str = "text"

    def build(self):
        """The model with random weights."""
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        sizes = (
            {"image_size": 8, "patch_size": 2, "num_channels": 1} if self.reads == "images" else {"vocab_size": WORDS}
        )
        labels = {} if self.reads == "pairs" else {"num_labels": 6}
        drawn = {} if self.config == "T5Config" else {"initializer_range": 0.1}  # so that a few epochs do
        special = {} if self.reads == "images" else {"pad_token_id": 0, "bos_token_id": START, "eos_token_id": END}
        config = getattr(transformers, self.config)(**sizes, **labels, **special, **drawn, **self.options)
        return getattr(transformers, self.name)(config)


WIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
VIT = {name: size for name, size in WIDE.items() if name != "max_position_embeddings"}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 8,
    "decoder_start_token_id": START,
}
SDPA, EAGER = {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}
MODELS = [
    Tiny("BertForSequenceClassification", "BertConfig", WIDE | SDPA),
    Tiny("BertForSequenceClassification", "BertConfig", WIDE | EAGER),
    Tiny(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 8, "hidden_dim": 48, "max_position_embeddings": 32},
    ),
    Tiny("GPT2ForSequenceClassification", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 32}),
    Tiny("LlamaForSequenceClassification", "LlamaConfig", WIDE | {"num_key_value_heads": 4} | SDPA),
    Tiny("LlamaForSequenceClassification", "LlamaConfig", WIDE | {"num_key_value_heads": 4} | EAGER),
    Tiny("Qwen2ForSequenceClassification", "Qwen2Config", WIDE | {"num_key_value_heads": 4}),
    Tiny("T5ForSequenceClassification", "T5Config", T5),
    Tiny("ViTForImageClassification", "ViTConfig", VIT, reads="images"),
]


class Examples(Dataset):
    """Images as what a model reads: dicts."""

    def __init__(self, images, reads):
        self.images, self.reads = images, reads

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        if self.reads == "images":
            return {"pixel_values": image, "labels": label}
        text = 3 + words(image[None])[0, : PLACES - index % 3]  # of several lengths
        text = torch.nn.functional.pad(torch.cat([text, torch.tensor([END])]), (0, index % 3))
        found = {"input_ids": text, "attention_mask": (text > 0).long(), "labels": label}
        return found if self.reads != "pairs" else found | {"labels": label[None] + ANSWERS}


class Wrapped(LightningModule):
    """What people write around a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.003)


def classify(module, batch):
    """Predictions and targets; of a text that is answered, of its one word."""
    target = batch["labels"]
    if target.ndim == 1:
        return module(**{name: x for name, x in batch.items() if name != "labels"}).logits, target
    start = torch.full_like(target, START)
    return module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=start).logits[
        :, 0
    ], target[:, 0]


def sequence(reads):
    """Three tasks of two digits each."""
    found = []
    for task in tasks():
        loaders = {
            part: DataLoader(
                Examples(getattr(task, f"{part}_dataloader")().dataset, reads), 32, shuffle=part == "train"
            )
            for part in ("train", "val", "test")
        }
        classes = [label + ANSWERS for label in task.classes] if reads == "pairs" else task.classes
        found.append(Task(task.name, loaders, classes=classes, evaluate=classify))
    return found


@torch.no_grad()
def logits(module, task):
    """The task's own outputs on its test data."""
    module.eval()
    found = torch.cat([task.evaluate(module, batch)[0] for batch in task.test_dataloader()])
    return found[:, state_of(module).ledger.reserved[task.name]]


def marked(tiny):
    kind = tiny.options.get("attn_implementation", "")
    return pytest.param(tiny, id=f"{tiny.name}{kind}")


@pytest.mark.parametrize("tiny", [marked(tiny) for tiny in MODELS])
def test_three_tasks_stay_bitwise_what_they_were(tiny):
    module, after, scores = Wrapped(tiny.build()), [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error", StructureWarning)  # there would be nothing that a user could do
        for number, task in enumerate(sequence(tiny.reads)):
            before = {name: x.detach().clone() for name, x in named_tensors(module).items()} if number else {}
            fit(module, task, three(), epochs=8)
            after.append(logits(module, task))
            scores.append(score(module, task))
            assert sum(int((x != named_tensors(module)[name]).sum()) for name, x in before.items()) > 500 or not number
    for task, values in zip(sequence(tiny.reads), after, strict=True):
        assert torch.equal(logits(module, task), values), task.name
    assert min(scores) >= LEARNED, scores
    ledger = state_of(module).ledger
    assert ledger.whole == []
    assert all(bool((owner == task).any()) for owner in ledger.owners.values() for task in range(3))


def test_an_embedding_that_is_the_output_head_too_is_refused_by_name_with_the_way_out():
    tiny = Tiny("T5ForConditionalGeneration", "T5Config", T5, reads="pairs")
    with pytest.raises(ContinualError, match=r"'model.shared' .*mask_outputs=False"):
        fit(Wrapped(tiny.build()), sequence("pairs")[0], three(), epochs=2)

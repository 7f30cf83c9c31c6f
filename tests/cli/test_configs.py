"""Every file under conf/ composes, and every option has a key that a sweep can name."""

import inspect
from functools import partial
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_cf import InvarianceCallback, MaskedGradientCallback, PartitionCallback, TaskInferenceCallback
from lightning_cf.cli.main import VERSION_BASE
from lightning_cf.invariance.perturbations import Perturbation
from lightning_cf.partition.options import PartitionKeywords

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
NEEDED = {
    ("tasks", "split_mnist"): ["data_dir=somewhere"],
    ("tasks", "permuted_mnist"): ["data_dir=somewhere"],
    ("experiment", "class_incremental"): ["data_dir=somewhere"],
    ("experiment", "split_mnist"): ["data_dir=somewhere"],
    ("invariance", "default"): ["invariance.perturbation={_target_:lightning_cf.Ablate}"],
    ("subspace", "given"): ["subspace.bases=bases.pt"],
}
DECIDED_ELSEWHERE = {"after", "isolation", "ledger", "records", "seed", "options"}


def composed(*overrides):
    with hydra.initialize_config_dir(str(CONF), **VERSION_BASE):
        return hydra.compose("config", overrides=list(overrides))


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=["=".join(choice) for choice in CHOICES])
def test_every_choice_composes_and_makes_what_it_says(group, choice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"network.1": torch.eye(64)[:, :4]}, "bases.pt")
    config = composed(f"{group}={choice}", *NEEDED.get((group, choice), []))
    assert not OmegaConf.missing_keys(config)
    kinds = {
        "partition": PartitionCallback,
        "invariance": InvarianceCallback,
        "masking": MaskedGradientCallback,
        "task_inference": TaskInferenceCallback,
    }
    callbacks = [instantiate(config[name], _convert_="all") for name in kinds]
    _, invariance, masking, _ = callbacks
    for name, made in zip(kinds, callbacks, strict=True):
        assert (made is None) if (group, choice) == (name, "none") else isinstance(made, kinds[name])
    if choice != "none":
        assert isinstance(invariance.perturbation, Perturbation)
        assert str(invariance.subspace) == str(masking.subspace)
        assert (masking.subspace is None) == (group != "subspace")
    instantiate(config.model)
    assert isinstance(instantiate(config.trainer), partial)


@pytest.mark.parametrize(
    ("name", "callback", "more"),
    [
        ("partition", PartitionCallback, PartitionKeywords.__annotations__),
        ("invariance", InvarianceCallback, {}),
        ("masking", MaskedGradientCallback, {}),
        ("task_inference", TaskInferenceCallback, {}),
    ],
)
def test_every_option_of_the_callbacks_has_a_key(name, callback, more):
    options = {*inspect.signature(callback).parameters, *more} - DECIDED_ELSEWHERE
    assert set(composed()[name]) - {"_target_"} == options


def test_the_configured_defaults_are_the_packages_own():
    config = composed()
    partition, invariance = PartitionCallback(), InvarianceCallback()
    assert instantiate(config.partition).settings() == partition.settings()
    assert instantiate(config.invariance).settings() == invariance.settings()
    assert instantiate(config.masking).settings() == MaskedGradientCallback().settings()
    assert instantiate(config.task_inference).settings() == TaskInferenceCallback().settings()


def measure(a, bias_a, b, bias_b):
    return -torch.cdist(a, b)


def test_a_measure_of_ones_own_is_named_by_its_path():
    path = "{_target_:hydra.utils.get_method,path:torch.nn.functional.cosine_embedding_loss}"
    callback = instantiate(composed(f"partition.measure={path}", "partition.threshold=-3.5").partition)
    assert callback.options.measure is torch.nn.functional.cosine_embedding_loss
    assert callback.settings()["measure"] == "torch.nn.functional.cosine_embedding_loss"
    assert PartitionCallback(measure=measure).settings()["measure"] == f"{__name__}.measure"

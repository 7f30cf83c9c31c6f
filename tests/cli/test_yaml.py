"""Public constructors can be configured by what reads annotations, such as jsonargparse and so LightningCLI."""

import inspect
import typing
from collections.abc import Callable

import pytest
import torch

import lightning_cf

PUBLIC = [getattr(lightning_cf, name) for name in lightning_cf.__all__]
CLASSES = [made for made in PUBLIC if inspect.isclass(made) and not issubclass(made, (Exception, Warning))]


def parts(annotation):
    """An annotation, and what it consists of."""
    yield annotation
    for part in typing.get_args(annotation):
        for inner in part if isinstance(part, list) else [part]:
            yield from parts(inner)


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.__name__)
def test_what_a_constructor_calls_returns_no_class_to_be_made(made):
    """A parser takes the class that a callable returns for the one that a configuration has to name."""
    for name, hint in typing.get_type_hints(made.__init__).items():
        for part in parts(hint):
            returned = None
            if typing.get_origin(part) is Callable and typing.get_args(part):
                returned = typing.get_args(part)[-1]
            elif inspect.isclass(part) and getattr(part, "_is_protocol", False) and "__call__" in vars(part):
                returned = typing.get_type_hints(part.__call__)["return"]
            assert not hasattr(returned, "dim_str"), f"{made.__name__}: {name}: {part} returns {returned}"


def measure(a, bias_a, b, bias_b):
    return -torch.cdist(a, b)


CONFIGURED = [
    ("InvarianceCallback", {"perturbation": {"class_path": "lightning_cf.Noise", "init_args": {"scale": 2.0}}}),
    ("InvarianceCallback", {"perturbation": {"class_path": "lightning_cf.Rotation"}}),
    (
        "InvarianceCallback",
        {
            "perturbation": {
                "class_path": "lightning_cf.Mixture",
                "init_args": {"perturbations": [{"class_path": "lightning_cf.Noise"}], "weights": [1.0]},
            }
        },
    ),
    (
        "MaskedGradientCallback",
        {"subspace": {"class_path": "lightning_cf.RandomSubspace", "init_args": {"dimensions": 0.5}}},
    ),
    ("PartitionCallback", {"measure": "test_yaml.measure", "threshold": -0.5, "every_n_steps": 3}),
    ("PartitionCallback", {"measure": "weight", "threshold": "auto", "exclude": ["network.1"]}),
    ("TaskInferenceCallback", {"strategy": "auto"}),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:")  # of jsonargparse about itself
@pytest.mark.parametrize(("name", "options"), CONFIGURED)
def test_a_parser_of_annotations_makes_the_callbacks(name, options):
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(lightning_cf, name), "callback")
    made = parser.instantiate_classes(parser.parse_object({"callback": options})).callback
    assert type(made) is getattr(lightning_cf, name)
    for option, value in options.items():
        if isinstance(value, dict):
            assert value["class_path"].endswith(f".{type(getattr(made, option)).__name__}")

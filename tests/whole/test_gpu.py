"""What must hold on a GPU as on a CPU; left out where there is none."""

import json
import sys
from functools import partial

import pytest
import torch
from learning import NETWORKS, classifier, fit, own_logits, quiet_trainer, tasks, three

from lightning_cf import ContinualModule, SequentialTaskRunner, TaskInferenceCallback
from lightning_cf.cli.main import main
from lightning_cf.learner.inferring import inference_of
from lightning_cf.partition.clusters import partition_into
from lightning_cf.partition.similarity import Similarity

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
]


def logits_on_gpu(module, task):
    moves = module.register_forward_pre_hook(lambda module, given: tuple(x.to(module.device) for x in given))
    found = own_logits(module.cuda(), task)
    moves.remove()
    return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("network", NETWORKS)
def test_logits_of_an_earlier_task_and_what_is_kept_of_it_stay_bitwise(network, precision):
    module, sequence, seen = ContinualModule(classifier(network)), tasks(), []
    for task in sequence:
        module.add_task(task)
    for task in sequence:
        callbacks = [*three(max_claim=0.3), TaskInferenceCallback("auto")]
        fit(module, task, callbacks, 2, accelerator="gpu", precision=precision)
        seen.append((logits_on_gpu(module, sequence[0]), inference_of(module.ledger).tasks[0].fitted))
    first, fitted = seen[0]
    for logits, later in seen[1:]:
        assert torch.equal(logits, first)
        assert all(torch.equal(later[name][key], fitted[name][key]) for name in fitted for key in fitted[name])


def run_on(accelerator, root):
    make = partial(quiet_trainer, accelerator=accelerator)
    runner = SequentialTaskRunner(classifier(), tasks(), trainer=make, epochs=8, invariance_epochs=6, root=root)
    return runner, runner.run()


def test_a_sequence_forgets_nothing_and_what_it_learned_predicts_the_same_on_a_cpu(tmp_path):
    runner, result = run_on("gpu", tmp_path)
    assert result.accuracy.forgetting == 0
    assert result.accuracy.average > 0.9
    x, _ = next(iter(tasks()[0].test_dataloader()))
    there = runner.module.cuda().predict(x.cuda())
    assert there.classes.is_cuda
    runner, again = run_on("cpu", tmp_path)  # takes up the finished run
    assert torch.equal(again.accuracy.matrix, result.accuracy.matrix)
    here = runner.module.cpu().predict(x)
    torch.testing.assert_close(there.probabilities.cpu(), here.probabilities, atol=1e-3, rtol=1e-3)


def test_the_command_line_trains_there_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-cf", f"run={tmp_path / 'run'}", "compare=false", "epochs=3"])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    main()
    assert torch.cuda.max_memory_allocated() > before
    assert json.loads((tmp_path / "run" / "result.json").read_text())["forgetting"] == 0


def test_a_layer_there_is_partitioned_as_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(512, 64, generator=generator)
    vectors[256:] = vectors[:256] + 0.01 * torch.randn(256, 64, generator=generator)
    bias = torch.zeros(512)
    here = partition_into(Similarity(vectors, bias), 256)
    there = partition_into(Similarity(vectors.cuda(), bias.cuda()), 256)
    assert torch.equal(there.cluster.cpu(), here.cluster)

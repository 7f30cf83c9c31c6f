"""What a module counts in plain attributes goes on where a run goes on."""

import pytest
import torch
from runs import Net, net, run_of
from torch import nn

from lightning_cf.sequence.attributes import attributes_of, changed, put


class Counting(Net):
    """Its loss hangs on how many steps it took, which it counts itself; one of them in a layer."""

    def __init__(self):
        super().__init__()
        self.steps, self.left, self.label = 0, None, "new"

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.body[0].seen = self.steps
        if self.steps == self.left:
            raise RuntimeError("stopped")
        return super().training_step(batch, batch_idx) * (1 + self.steps)


@pytest.mark.filterwarnings("ignore:.*no claim within", "ignore:.*was not learned")
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    def run(folder, left=None):
        module = net(kind=Counting)
        module.left = left
        run_of(tmp_path / folder, module=module).run()
        return module

    whole = run("whole")
    with pytest.raises(RuntimeError, match="stopped"):
        run("parts", left=7)
    parts = run("parts")
    assert parts.steps == parts.body[0].seen == whole.steps and parts.left is None
    assert all(torch.equal(x, y) for x, y in zip(parts.parameters(), whole.parameters(), strict=True))


def test_only_what_changed_is_kept_and_put_back():
    module, other = (nn.Sequential(nn.Linear(1, 1), nn.Dropout()) for _ in range(2))
    before = attributes_of(module)
    assert changed(module, before) == {}
    module.eval()
    module[1].p, module[0].rate, module.values, module._own = 0.25, float("nan"), [1], 3
    found = changed(module, before)
    assert found.keys() == {"0", "1"} and found["1"] == {"p": 0.25} and found["0"].keys() == {"rate"}
    module[0].rate = float("nan")
    assert changed(module, {**before, "0": {**before["0"], "rate": float("nan")}}) == {"1": {"p": 0.25}}
    put(other, {**found, "gone": {"x": 1}})
    assert other[1].p == 0.25 and other.training

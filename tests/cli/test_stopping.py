"""SIGTERM and SIGINT at any moment: the status, a line that says how to go on, and bitwise the same end afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import count

import pytest
import torch
from commands import here
from lightning.pytorch.callbacks import Callback

import lightning_cf.cli.main
from lightning_cf import MaskedGradientCallback, SequentialTaskRunner
from lightning_cf.cli import sweep
from lightning_cf.cli.stopping import Stopped, check_stopped, ended_by_signals, stoppable

SMALL = ["epochs=1", "invariance_epochs=1", "model.network.hidden=[20]", "compare=false", "tasks.order=[0,1,2,3]"]
SMALL += ["task_inference=none", "partition.threshold=0.5"]
SLOW = pytest.mark.slow
SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.fixture(autouse=True)
def _heard():
    """SIGINT is heard whatever went before: a background job ignores it, and so does Lightning after a Ctrl+C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # where the handler runs


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_signal_before_anything_is_known_ends_with_its_status_and_one_line(number, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-cf", "epochs=3", "run=there", "+a=b c"])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, ended_by_signals():
        send(number)
    assert ended.value.code == status
    name = signal.Signals(number).name
    assert (
        capsys.readouterr().err == f"lightning-cf: stopped by {name}; lightning-cf epochs=3 '+a=b c' starts it again\n"
    )
    assert signal.getsignal(number) is before


def test_a_signal_after_a_fit_in_a_group_of_one_process_ends_as_ever(monkeypatch, tmp_path):
    """Nobody else waits, so that the process ends as others do: what stands behind the command in it still runs."""
    monkeypatch.setattr(sys, "argv", ["lightning-cf"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    with pytest.raises(SystemExit) as ended, ended_by_signals():
        send(signal.SIGTERM)
    assert ended.value.code == 143


def test_what_swallows_the_signal_is_asked_again_and_further_ones_are_left_alone():
    with stoppable():
        with pytest.raises(Stopped):
            send(signal.SIGTERM)
        send(signal.SIGINT)
        with pytest.raises(Stopped) as again:
            check_stopped()
    assert again.value.code == 143
    check_stopped()  # nothing is left of it


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_listens_before_it_loads_torch():
    code = "import sys, lightning_cf.__main__; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-cf", *SMALL, f"run={folder}"])
        lightning_cf.cli.main.main()
    return json.loads((folder / "result.json").read_text())["weights_sha256"]


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param((lightning_cf.cli.main, "_checked", 1), signal.SIGTERM, id="start-up"),
        pytest.param((MaskedGradientCallback, "on_train_batch_end", 15), signal.SIGTERM, id="training"),
        pytest.param((MaskedGradientCallback, "on_before_optimizer_step", 15), signal.SIGINT, id="step", marks=SLOW),
        pytest.param((MaskedGradientCallback, "on_fit_end", 3), signal.SIGTERM, id="end of a fit", marks=SLOW),
        pytest.param((SequentialTaskRunner, "score", 2), signal.SIGINT, id="scoring", marks=SLOW),
        pytest.param((SequentialTaskRunner, "seal", 2), signal.SIGTERM, id="seal", marks=SLOW),
        pytest.param((lightning_cf.cli.main, "write_pictures", 1), signal.SIGINT, id="pictures"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_run_that_is_stopped_goes_on_and_ends_bitwise_the_same(moment, number, whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        owner, name, at = moment
        original, calls = getattr(owner, name), count(1)

        def interrupted(*arguments, **options):
            if next(calls) == at:
                send(number)
            return original(*arguments, **options)

        patch.setattr(owner, name, interrupted)
        status, _, errors = here(patch, capsys, f"run={folder}", *SMALL)
    assert status == 128 + number
    told = [line for line in errors.splitlines() if line.startswith("lightning-cf: stopped")]
    assert len(told) == 1, errors
    assert f"stopped by {signal.Signals(number).name}; lightning-cf run={folder} epochs=1" in told[0]
    assert "goes on after the last finished phase" in told[0]
    assert "Traceback" not in errors
    assert (folder / "result.json").exists() == (moment[1] == "write_pictures")
    again, _, errors = here(monkeypatch, capsys, f"run={folder}", *SMALL)
    assert again == 0, errors
    assert json.loads((folder / "result.json").read_text())["weights_sha256"] == whole


@pytest.mark.usefixtures("unchecked")
def test_a_runner_that_lightning_stops_leaves_the_status_of_a_terminated_process(tmp_path):
    """Without the command line SIGTERM is Lightning's, whose own status would be 0."""
    from small_project import net, quiet, task

    class Terminate(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            send(signal.SIGTERM)

    runner = SequentialTaskRunner(
        net(), [task()], trainer=quiet, epochs=1, invariance_epochs=1, root=tmp_path, callbacks=[Terminate()]
    )
    with pytest.raises(SystemExit) as ended:
        runner.run()
    assert ended.value.code == 143
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"]["finished"] == ["baseline"]


PYTHON = [sys.executable, "-c"]


def test_a_job_that_is_terminated_has_the_status_of_a_shell():
    kill = "import os, signal; os.kill(os.getpid(), signal.{})"
    assert sweep._status([*PYTHON, kill.format("SIGTERM")], dict(os.environ)) == 143
    assert sweep._status([*PYTHON, kill.format("SIGKILL")], dict(os.environ)) == 137


def test_a_sweep_that_is_stopped_ends_its_job(tmp_path):
    code = f"""
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / "ended")!r}, "w").close(), os._exit(143)))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(600)
"""
    with stoppable(), pytest.raises(Stopped):
        sweep._status([*PYTHON, code], dict(os.environ))
    assert (tmp_path / "ended").exists()


@pytest.mark.usefixtures("unchecked")
def test_a_sweep_goes_on_after_a_job_that_was_terminated(tmp_path, monkeypatch, capsys):
    scores = {
        "average_accuracy": 0.5,
        "forgetting": 0.0,
        "backward_transfer": 0.0,
        "weights_sha256": "",
        "capacity": {},
    }

    def status(command, environment):
        folder = next(x for x in command if x.startswith("run=")).removeprefix("run=").strip("'")
        if folder.endswith("0"):
            return 143
        with open(f"{folder}/result.json", "w") as file:
            json.dump(scores, file)
        return 0

    monkeypatch.setattr(sweep, "_status", status)
    ended, out, errors = here(monkeypatch, capsys, "-m", "seed=0,1", f"run={tmp_path / 'sweep'}")
    assert ended == 1
    assert "lightning-cf: job 0 was stopped by SIGTERM; the sweep goes on" in errors
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [job["status"] for job in jobs] == [143, 0]
    assert "failed" in out and "0.5000" in out


@pytest.mark.slow
def test_all_processes_of_a_distributed_run_end_with_the_first(tmp_path):
    psutil = pytest.importorskip("psutil")
    line = [sys.executable, "-m", "lightning_cf", f"run={tmp_path}", "trainer=ddp", "devices=2", "compare=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    until = time.monotonic() + 300
    while process.poll() is None and not (tmp_path / "exact" / "state.pt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    others = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert errors.count("stopped by SIGTERM") == 1
    assert "Traceback" not in errors
    assert others and not psutil.wait_procs(others, timeout=60)[1]

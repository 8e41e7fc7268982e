"""Asked to stop, a run saves and leaves with the right code; run again, it ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from accelerate import Accelerator

from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.checkpoint import list_checkpoints, verify
from pytorch_accelerated.distributed import PeriodicAgreement
from tests.preempted_script import EVAL_EVERY, NUM_EPOCHS, UPDATES_IN_EPOCH, Case
from tests.support import run_processes

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "tests" / "preempted_script.py")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
PATIENCE = 90.0  # seconds until something is taken to hang; the machine may be busy
NUM_UPDATES = NUM_EPOCHS * UPDATES_IN_EPOCH
CODES = {"SIGTERM": 143, "SIGINT": 130}
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
TORCHRUN += ["--rdzv_endpoint", "localhost:0"]
TWO_PROCESSES = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
TWO_PROCESSES += ["--dynamo_backend", "no", "--main_process_port", "0"]
ONE_PROCESS = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Return what ``condition`` returns once that is true."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found


class Started:
    """A process that does what a case says, and those that it has started."""

    def __init__(self, case: Case, output: Path) -> None:
        self.case = case
        self.output = output
        self.offset = len(output.read_bytes()) if output.exists() else 0
        self.pid = 0

    def text(self) -> str:
        return self.output.read_bytes()[self.offset :].decode() if self.output.exists() else ""

    def exit_code(self, patience: float) -> int | None:
        raise NotImplementedError

    def family(self) -> list[psutil.Process]:
        """Return all processes that it has started, itself included, that are there."""
        raise NotImplementedError

    def wait_for(self, line: str) -> None:
        def is_there() -> bool:
            if f"{line}\n" in self.text():
                return True
            assert self.exit_code(0) is None or f"{line}\n" in self.text(), f"no {line!r} in:\n{self.text()}"
            return False

        try:
            until(is_there, line)
        except AssertionError:
            raise AssertionError(f"no {line!r} in:\n{self.text()}") from None

    def reach(self, moment: str) -> None:
        self.wait_for(f"reached {moment}")

    def go_on(self, moment: str) -> None:
        (Path(self.case.directory) / f"go {moment}").touch()

    def send(self, *names: str, pid: int | None = None) -> None:
        for name in names:
            os.kill(self.pid if pid is None else pid, getattr(signal, name))

    def send_at(self, moment: str, *names: str) -> None:
        """Send signals while it waits at a moment, and let it go on."""
        self.reach(moment)
        self.send(*names)
        self.go_on(moment)

    def send_to_all(self, name: str) -> None:
        os.killpg(os.getpgid(self.pid), getattr(signal, name))

    def finish(self, patience: float = PATIENCE) -> int:
        """Wait for the end, and for that of all processes it has started; return the exit code."""
        code = self.exit_code(patience)
        assert code is not None, f"it hangs:\n{self.text()}"
        until(lambda: not self.family(), "it has left processes behind", 20)
        return code

    def clean_up(self) -> None:
        for process in self.family():
            process.kill()


class Forked(Started):
    """A process forked from one that has imported everything."""

    def __init__(
        self, server: Server, case: Case, environment: dict[str, str] | None = None, name: str = "out"
    ) -> None:
        super().__init__(case, Path(case.directory) / name)
        self.server = server
        request = {"case": dataclasses.asdict(case), "environment": environment or {}, "output": str(self.output)}
        self.pid = int(server.ask(request))

    def exit_code(self, patience: float) -> int | None:
        answer = self.server.ask({"pid": self.pid, "timeout": patience})
        return None if answer == "None" else int(answer)

    def family(self) -> list[psutil.Process]:
        return [process for process in running() if session_of(process) == self.pid]


class Launched(Started):
    """A process of a command of its own."""

    def __init__(self, case: Case, *launcher: str) -> None:
        super().__init__(case, Path(case.directory) / "out")
        command = [*(launcher or (sys.executable,)), SCRIPT, json.dumps(dataclasses.asdict(case))]
        environment = os.environ | ENVIRONMENT | {"PREEMPTED_CASE": case.directory}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def exit_code(self, patience: float) -> int | None:
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return None

    def family(self) -> list[psutil.Process]:
        return [
            process for process in running() if environment_of(process).get("PREEMPTED_CASE") == self.case.directory
        ]

    def rank(self, number: int) -> int:
        """Return the process id of a rank."""
        return int((Path(self.case.directory) / f"pid.{number}").read_text())


class Server:
    """A process that forks others; see ``preempted_script.serve``."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
            cwd=ROOT,
        )

    def ask(self, request: dict[str, Any]) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


def running() -> list[psutil.Process]:
    def is_running(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if is_running(process)]


def session_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


class Scene:
    """Start processes for a test, and end what is left of them."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.started: list[Started] = []

    def case(self, *moments: str, **fields: Any) -> Case:
        options = {"save_dir": str(self.directory / "checkpoints")} | fields.pop("options", {})
        return Case(str(self.directory), moments=moments, options=options, **({"in_full": False} | fields))

    def fork(self, case: Case) -> Forked:
        return self._keep(Forked(self.server, case))

    def fork_two(self, case: Case) -> list[Forked]:
        """Start two processes that know of each other, as a launcher would."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [places | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [
            self._keep(Forked(self.server, case, environment, f"out{rank}")) for rank, environment in enumerate(ranks)
        ]

    def launch(self, case: Case, *launcher: str) -> Launched:
        return self._keep(Launched(dataclasses.replace(case, in_full=True), *launcher))

    def _keep(self, started: Any) -> Any:
        self.started.append(started)
        return started

    def checkpoints(self, name: str = "checkpoints") -> list[int]:
        """Return the updates of the checkpoints, oldest first; all are whole, and nothing else lies around."""
        directory = self.directory / name
        paths = list_checkpoints(directory)
        assert sorted(directory.iterdir()) == sorted(paths)
        for path in paths:
            verify(path)
        return [int(path.name.rsplit("-", 1)[1]) for path in reversed(paths)]

    def result(self, rank: int = 0) -> Any:
        return json.loads((self.directory / f"result.{rank}").read_text())

    def run_two_again(self, case: Case) -> list[Any]:
        """Run the same command in two processes to its end, and return what came out."""
        assert not list(self.directory.glob("result.*")), "the run was interrupted, and has a result"
        processes = self.fork_two(case)
        assert [process.finish() for process in processes] == [0, 0], processes[0].text() + processes[1].text()
        assert "Resuming from" in processes[0].text()
        return [self.result(rank) for rank in range(2)]

    def run_again(self, case: Case) -> Any:
        """Run the same command again to its end, and return what came out."""
        assert not list(self.directory.glob("result.*")), "the run was interrupted, and has a result"
        process = self.fork(case)
        assert process.finish() == 0, process.text()
        assert "Resuming from" in process.text()
        return self.result()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def scene(server: Server, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(server, tmp_path)
    yield scene
    for process in scene.started:
        process.clean_up()


@pytest.fixture(scope="module")
def expected(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an uninterrupted run gives."""
    scene = Scene(server, tmp_path_factory.mktemp("uninterrupted"))
    process = scene.fork(scene.case())
    assert process.finish() == 0, process.text()
    return scene.result()


@pytest.fixture(scope="module")
def expected_of_two(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an uninterrupted run of two processes gives on each."""
    scene = Scene(server, tmp_path_factory.mktemp("uninterrupted"))
    processes = scene.fork_two(scene.case(num_processes=2))
    assert [process.finish() for process in processes] == [0, 0], [process.text() for process in processes]
    return [scene.result(rank) for rank in range(2)]


# --------------------------------------------------------------------------------------------------------------------
# Exit codes
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_run_with_its_code_and_the_same_command_goes_on(
    name: str, scene: Scene, expected: Any
) -> None:
    case = scene.case("update 7", in_full=True)
    process = scene.fork(case)
    process.send_at("update 7", name)
    assert process.finish() == CODES[name]
    assert scene.checkpoints() == [7]
    assert f"{name}: saved" in process.text()
    assert f"leaving with exit code {CODES[name]}. train(resume_from='latest') goes on from there." in process.text()
    assert "Traceback" not in process.text()
    assert "on_exception" not in process.text()
    assert scene.run_again(case) == expected
    assert scene.checkpoints() == [7, NUM_UPDATES]


def test_a_run_that_is_finished_ends_with_code_zero_and_is_not_run_again(scene: Scene, expected: Any) -> None:
    case = scene.case()
    for _ in range(2):
        process = scene.fork(case)
        assert process.finish() == 0
        assert scene.result() == expected
        assert scene.checkpoints() == [NUM_UPDATES]


@pytest.mark.parametrize("is_saved", [False, True])
def test_an_exception_ends_with_code_one_and_the_state_is_saved_only_if_that_was_asked_for(
    is_saved: bool, scene: Scene, expected: Any
) -> None:
    case = scene.case(action="fail", options={"save_on_exception": is_saved}, in_full=True)
    process = scene.fork(case)
    assert process.finish() == 1
    assert "ZeroDivisionError: a bug of the user" in process.text()
    assert "on_exception ZeroDivisionError" in process.text()
    assert scene.checkpoints() == ([7] if is_saved else [])
    if is_saved:
        assert scene.run_again(case) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "fail"])
def test_codes_of_a_python_that_was_started_alone(name: str, scene: Scene, expected: Any) -> None:
    case = scene.case("update 7", action="fail" if name == "fail" else "train")
    process = scene.launch(case)
    if name != "fail":
        process.reach("update 7")
    if name in CODES:
        process.send(name)
    process.go_on("update 7")
    assert process.finish() == CODES.get(name, 1)
    if name == "SIGTERM":
        assert scene.run_again(case) == expected
    elif name == "SIGINT":
        again = scene.launch(case)
        assert again.finish() == 0
        assert scene.result() == expected


def test_sigusr1_saves_and_the_run_goes_on(scene: Scene, expected: Any) -> None:
    process = scene.fork(scene.case("update 7", "update 9"))
    for number in (7, 9):
        process.send_at(f"update {number}", "SIGUSR1")
    assert process.finish() == 0
    assert scene.checkpoints() == [7, 9, NUM_UPDATES]
    assert scene.result() == expected


@pytest.mark.parametrize("as_timedelta", [False, True])
def test_the_time_budget_ends_the_run_as_sigterm_does(as_timedelta: bool, scene: Scene, expected: Any) -> None:
    budget = {"time_budget": 1e-3, "as_timedelta": as_timedelta}
    process = scene.fork(scene.case(options=budget))
    assert process.finish() == 143
    assert scene.checkpoints() == [1]
    assert "time budget: saved" in process.text()
    again = scene.fork(scene.case(options=budget))
    assert again.finish() == 143
    assert scene.checkpoints() == [1, 2]
    assert scene.run_again(scene.case()) == expected


def test_a_time_budget_that_is_not_used_up_changes_nothing(scene: Scene, expected: Any) -> None:
    process = scene.fork(scene.case(options={"time_budget": 600.0}))
    assert process.finish() == 0
    assert scene.result() == expected


@pytest.mark.parametrize("budget", [0, -1.0])
def test_a_time_budget_must_be_above_zero(budget: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="time_budget must be above 0 seconds, or None, got"):
        SaveTrainingStateCallback(tmp_path, time_budget=budget)


# --------------------------------------------------------------------------------------------------------------------
# The moment at which the signal comes
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_while_a_sample_is_fetched(num_workers: int, scene: Scene, expected: Any) -> None:
    case = scene.case("item 2 17", num_workers=num_workers)
    process = scene.fork(case)
    process.send_at("item 2 17", "SIGTERM")
    assert process.finish() == 143
    [update] = scene.checkpoints()
    assert UPDATES_IN_EPOCH <= update < 2 * UPDATES_IN_EPOCH
    assert scene.run_again(case) == expected


def test_in_the_middle_of_an_accumulation_window_which_is_completed(scene: Scene, expected: Any) -> None:
    case = scene.case("step 20")  # the second batch of the second window of epoch 2
    process = scene.fork(case)
    process.send_at("step 20", "SIGTERM")
    assert process.finish() == 143
    assert scene.checkpoints() == [UPDATES_IN_EPOCH + 2]
    assert scene.run_again(case) == expected


@pytest.mark.parametrize(
    ("update", "before", "num_workers"), [(UPDATES_IN_EPOCH, 10, 0), (2 * EVAL_EVERY, 20, 2), (NUM_UPDATES, 50, 0)]
)
def test_an_evaluation_is_left_at_once_and_begun_anew(
    update: int, before: int, num_workers: int, scene: Scene, expected: Any
) -> None:
    """At the end of an epoch, within one, and at the end of the run; ten batches each."""
    moment = f"evaluating {update} 3"
    case = scene.case(moment, num_workers=num_workers)
    process = scene.fork(case)
    process.send_at(moment, "SIGTERM")
    assert process.finish() == 143
    assert f"on_train_run_end TrainingInterrupted updates {update} evaluated {before + 4}\n" in process.text()
    assert scene.checkpoints() == [update]
    assert scene.run_again(case) == expected


@pytest.mark.parametrize("asynchronous", [False, True])
def test_further_signals_while_a_checkpoint_is_saved_harm_nothing(
    asynchronous: bool, scene: Scene, expected: Any
) -> None:
    case = scene.case(
        "saving 5", "update 7", "saving 7", options={"save_every_n_updates": 5, "asynchronous": asynchronous}
    )
    process = scene.fork(case)
    process.send_at("saving 5", "SIGUSR1", "SIGUSR1", "SIGUSR1")
    process.send_at("update 7", "SIGTERM")
    process.send_at("saving 7", "SIGTERM", "SIGINT", "SIGUSR1", "SIGTERM", "SIGINT")
    assert process.finish() == 143
    assert scene.checkpoints() == [5, 6, 7]
    assert scene.run_again(case) == expected


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_while_a_checkpoint_is_written(asynchronous: bool, scene: Scene, expected: Any) -> None:
    case = scene.case(
        "writing", "update 6", action="write slowly", options={"save_every_n_updates": 5, "asynchronous": asynchronous}
    )
    process = scene.fork(case)
    process.reach("writing")
    if asynchronous:  # training goes on meanwhile
        process.reach("update 6")
    process.send("SIGTERM", "SIGTERM")
    process.go_on("update 6")
    process.go_on("writing")
    assert process.finish() == 143
    assert scene.checkpoints() == [5, 6]
    assert scene.run_again(case) == expected


def test_a_signal_at_the_moment_at_which_another_checkpoint_is_due(scene: Scene, expected: Any) -> None:
    case = scene.case(f"update {NUM_UPDATES // 2}", action="decay")
    process = scene.fork(case)
    process.send_at(f"update {NUM_UPDATES // 2}", "SIGTERM")
    assert process.finish() == 143
    scene.run_again(case)
    assert scene.checkpoints() == [NUM_UPDATES // 2, NUM_UPDATES]
    assert scene.checkpoints("before decay") == [NUM_UPDATES // 2]


def test_a_signal_after_the_last_update_is_not_lost_on_the_rest_of_the_script(scene: Scene) -> None:
    """Once the end of the first of two runs is saved, nothing asks any more; the second must not go on for hours."""
    (scene.directory / "second").mkdir()
    case = scene.case("end", action="twice")
    process = scene.fork(case)
    process.send_at("end", "SIGTERM")
    assert process.finish() in (143, -signal.SIGTERM), process.text()
    assert not (scene.directory / "second" / "result.0").exists()
    assert scene.checkpoints() == [NUM_UPDATES]


# --------------------------------------------------------------------------------------------------------------------
# Workers, and what is left behind
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_all_processes_leaves_the_workers_alive(
    name: str, persistent: bool, scene: Scene, expected: Any
) -> None:
    case = scene.case("step 20", num_workers=2, persistent=persistent)
    process = scene.fork(case)
    process.reach("step 20")
    workers = {member.pid for member in process.family()} - {process.pid}
    assert len(workers) >= 2
    process.send_to_all(name)
    process.send_to_all(name)
    if name == "SIGUSR1":
        process.go_on("step 20")
        assert process.finish() == 0, process.text()
        assert scene.checkpoints() == [UPDATES_IN_EPOCH + 2, NUM_UPDATES]
        assert scene.result() == expected
        return
    process.go_on("step 20")
    assert process.finish() == CODES[name], process.text()
    assert scene.checkpoints() == [UPDATES_IN_EPOCH + 2]
    assert scene.run_again(case) == expected


@pytest.mark.slow
def test_workers_that_were_spawned_outlive_a_signal_to_all(scene: Scene, expected: Any) -> None:
    case = scene.case("step 20", num_workers=1, persistent=True, context="spawn")
    process = scene.fork(case)
    process.reach("step 20")
    process.send_to_all("SIGTERM")
    process.go_on("step 20")
    assert process.finish() == 143, process.text()
    assert scene.checkpoints() == [UPDATES_IN_EPOCH + 2]
    assert scene.run_again(dataclasses.replace(case, context=None)) == expected


@pytest.mark.slow
def test_workers_that_were_spawned_and_have_not_begun_outlive_a_signal_to_all(scene: Scene, expected: Any) -> None:
    """They take seconds to import torch, in which a signal may well come."""
    case = scene.case(action="signal spawned workers", num_workers=1, persistent=True, context="spawn")
    process = scene.fork(case)
    assert process.finish() == 143, process.text()
    assert len(scene.checkpoints()) == 1
    assert scene.run_again(dataclasses.replace(case, context=None, action="train")) == expected


def test_workers_that_have_not_begun_outlive_a_signal_to_all(scene: Scene, expected: Any) -> None:
    """A worker is forked, and gets the signal before ``worker_init_fn`` is called."""
    case = scene.case(action="signal new workers", num_workers=2)
    process = scene.fork(case)
    assert process.finish() == 143, process.text()
    assert len(scene.checkpoints()) == 1
    assert scene.run_again(case) == expected


def test_a_run_with_persistent_workers_ends_as_soon_as_it_is_finished(scene: Scene, expected: Any) -> None:
    process = scene.fork(scene.case(num_workers=2, persistent=True, in_full=True))
    process.wait_for("finished")
    begin = time.monotonic()
    assert process.finish() == 0
    assert time.monotonic() - begin < 4.5  # torch gives workers that do not end 5 seconds
    assert scene.result() == expected


@pytest.mark.slow
def test_workers_end_when_the_main_process_was_killed(scene: Scene, expected: Any) -> None:
    case = scene.case("update 7", num_workers=2, persistent=True, options={"save_every_n_updates": 5})
    process = scene.fork(case)
    process.send_at("update 7", "SIGKILL")
    assert process.finish() == -signal.SIGKILL
    assert scene.checkpoints() == [5]
    assert scene.run_again(case) == expected


@pytest.mark.parametrize("persistent", [False, True])
def test_an_interrupted_run_does_not_wait_for_a_worker_that_hangs(persistent: bool, scene: Scene) -> None:
    """A worker that waits in a library for ever runs no handler of Python, and must go nevertheless."""
    case = scene.case(
        "stuck 2 14", "update 7", num_workers=1, persistent=persistent, in_full=True
    )  # the first three batches are there
    process = scene.fork(case)
    process.reach("update 7")
    process.reach("stuck 2 14")
    process.send("SIGTERM")
    process.go_on("update 7")
    assert process.finish(30) == 143, process.text()
    assert scene.checkpoints() == [7]


def test_the_first_ctrl_c_is_answered_at_once_and_the_third_ends_a_step_that_hangs(scene: Scene) -> None:
    case = scene.case("step 14", action="train", in_full=True)
    process = scene.fork(case)
    process.reach("step 14")  # it waits for a word that nobody says
    process.send("SIGINT")
    process.wait_for(
        "SIGINT: the run saves its state after this update and stops. Twice more, and it stops at once, without saving."
    )
    process.send("SIGINT")
    time.sleep(0.5)
    assert process.family() != []
    process.send("SIGINT")
    assert process.finish(30) in (-signal.SIGINT, 130), process.text()
    assert "KeyboardInterrupt: at once, without saving, as SIGINT came three times" in process.text()
    assert process.text().count("the run saves its state after this update") == 1
    assert scene.checkpoints() == []


def test_the_interpreter_leaves_while_a_daemon_thread_trains_with_workers(scene: Scene) -> None:
    case = scene.case("leaving", "step 20", action="daemon thread", num_workers=2, in_full=True)
    process = scene.fork(case)
    process.reach("leaving")
    process.reach("step 20")
    process.go_on("leaving")
    assert process.finish(20) == 0, process.text()


# --------------------------------------------------------------------------------------------------------------------
# Handlers of the user
# --------------------------------------------------------------------------------------------------------------------


def test_handlers_of_the_user_are_called_and_are_there_afterwards(scene: Scene, expected: Any) -> None:
    """Also after an interruption and after an exception."""
    case = scene.case("update 7", action="handlers")
    process = scene.fork(case)
    process.reach("update 7")
    process.send("SIGUSR1")
    process.wait_for("the user's handler got SIGUSR1")
    process.send("SIGINT")
    process.wait_for("the user's handler got SIGINT")
    process.send("SIGTERM")
    process.wait_for("the user's handler got SIGTERM")
    process.go_on("update 7")
    assert process.finish() == 130
    assert "handlers are as before\n" in process.text()
    failing = scene.fork(scene.case(action="handlers, fail"))
    assert failing.finish() == 0
    assert "on_exception ZeroDivisionError" in failing.text()
    assert "handlers are as before\n" in failing.text()
    assert scene.checkpoints() == [7]
    again = scene.fork(case)
    assert again.finish() == 0
    assert "in the run: ['is', 'is', 'is'] [True, True, True]\n" in again.text()
    assert "handlers are as before\n" in again.text()
    assert scene.result() == expected


def test_a_signal_during_the_handler_of_another_is_not_lost(scene: Scene, expected: Any) -> None:
    case = scene.case("update 7", "handling", action="slow handler")
    process = scene.fork(case)
    process.reach("update 7")
    process.send("SIGUSR1")
    process.send_at("handling", "SIGTERM")
    process.go_on("update 7")
    assert process.finish() == 143, process.text()
    assert scene.checkpoints() == [7]
    assert scene.run_again(case) == expected


def test_a_handler_of_the_user_is_called_once_for_a_signal_after_the_last_update(scene: Scene, expected: Any) -> None:
    process = scene.fork(scene.case("end", action="handlers"))
    process.send_at("end", "SIGTERM")
    process.finish()
    assert process.text().count("the user's handler got SIGTERM\n") == 1
    assert "handlers are as before\n" in process.text()
    assert scene.checkpoints() == [NUM_UPDATES]


def test_signals_that_were_ignored_stay_ignored(scene: Scene, expected: Any) -> None:
    process = scene.fork(scene.case("update 7", action="ignored"))
    process.send_at("update 7", "SIGTERM", "SIGINT", "SIGUSR1")
    assert process.finish() == 0
    assert "in the run: ['not', 'not', 'not'] [False, False, False]\n" in process.text()
    assert "handlers are as before\n" in process.text()
    assert scene.checkpoints() == [NUM_UPDATES]
    assert scene.result() == expected


def test_without_the_callback_handlers_are_never_touched(scene: Scene, expected: Any) -> None:
    process = scene.fork(scene.case("update 7", action="handlers, unwatched", num_workers=2))
    process.reach("update 7")
    process.send("SIGTERM", "SIGINT", "SIGUSR1")
    process.wait_for("the user's handler got SIGUSR1")
    process.go_on("update 7")
    assert process.finish() == 0
    assert "in the run: ['not', 'not', 'not'] [True, True, True]\n" in process.text()
    assert "handlers are as before\n" in process.text()
    assert scene.result() == expected


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_without_the_callback_a_signal_to_all_ends_all(name: str, scene: Scene) -> None:
    """After SIGTERM the workers need the seconds that torch gives them."""
    case = scene.case("update 7", num_workers=2, persistent=True, action="plain")
    process = scene.fork(case)
    process.reach("update 7")
    process.send_to_all(name)
    assert process.finish() == -getattr(signal, name)


def test_in_another_thread_a_line_says_that_signals_do_not_reach_it(scene: Scene, expected: Any) -> None:
    process = scene.fork(scene.case(action="thread"))
    assert process.finish() == 0
    assert "train() runs in another thread than the main one, so signals do not reach it." in process.text()
    assert "untouched True\n" in process.text()
    assert scene.result() == expected
    assert scene.checkpoints() == [NUM_UPDATES]


def test_two_callbacks_that_save_leave_the_handlers_as_they_were(scene: Scene, expected: Any) -> None:
    """Also for the second run of the trainer, in which a signal comes."""
    case = scene.case("update 14", action="two savers")
    process = scene.fork(case)
    process.send_at("update 14", "SIGTERM")
    assert process.finish() == 143, process.text()
    assert process.text().count("the user's handler got SIGTERM\n") == 1
    assert "between the runs [True, True, True]\n" in process.text()
    assert "handlers are as before\n" in process.text()
    assert scene.checkpoints("others") == [2 * UPDATES_IN_EPOCH]
    assert scene.checkpoints() == [2 * UPDATES_IN_EPOCH, 14]
    (scene.directory / "result.0").unlink()  # of the first run
    assert scene.run_again(dataclasses.replace(case, action="train")) == expected


def test_a_handler_that_was_set_during_a_run_and_calls_the_one_before_does_no_harm_in_the_next(
    scene: Scene, expected: Any
) -> None:
    case = scene.case("update 14", action="chained")
    process = scene.fork(case)
    process.send_at("update 14", "SIGTERM")
    assert process.finish() == 143, process.text()
    assert process.text().count("the user's handler got SIGTERM\n") == 1
    assert scene.checkpoints() == [2 * UPDATES_IN_EPOCH, 14]
    (scene.directory / "result.0").unlink()  # of the first run
    assert scene.run_again(dataclasses.replace(case, action="train")) == expected


def test_a_handler_that_leaves_does_not_cost_the_state_of_the_run(scene: Scene, expected: Any) -> None:
    """``signal.signal(SIGTERM, lambda *_: sys.exit(143))`` is in many scripts."""
    case = scene.case("update 7", action="raising handler")
    process = scene.fork(case)
    process.send_at("update 7", "SIGTERM")
    assert process.finish() == 143
    assert scene.checkpoints() == [7]
    assert scene.run_again(case) == expected


# --------------------------------------------------------------------------------------------------------------------
# The exception
# --------------------------------------------------------------------------------------------------------------------


def test_training_interrupted_is_no_failure(scene: Scene) -> None:
    case = scene.case("update 7", action="look")
    process = scene.fork(case)
    process.send_at("update 7", "SIGINT")
    assert process.finish() == 130
    lines = process.text().splitlines()
    assert "on_train_run_end TrainingInterrupted updates 7 evaluated 20" in lines
    assert "caught SIGINT 130 True PosixPath True" in lines
    assert "running False" in lines
    assert not [line for line in lines if line.startswith("on_exception") or "as an Exception" in line]


def test_training_interrupted_survives_the_way_to_another_process(scene: Scene) -> None:
    case = scene.case("update 7", action="copy")
    process = scene.fork(case)
    process.send_at("update 7", "SIGTERM")
    assert process.finish() == 143, process.text()
    assert "copied SIGTERM 143 True" in process.text()


def test_a_trainer_with_the_callback_can_evaluate_before_it_trains(scene: Scene) -> None:
    process = scene.fork(scene.case(action="evaluate"))
    assert process.finish() == 0, process.text()
    assert "evaluated ['evaluation_accuracy', 'evaluation_loss']" in process.text()


# --------------------------------------------------------------------------------------------------------------------
# At a prompt
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saves_on_exception", [False, True])
def test_ctrl_c_at_a_prompt_gives_it_back_and_the_same_trainer_goes_on(
    saves_on_exception: bool, scene: Scene, expected: Any
) -> None:
    case = scene.case("update 7", "update 14", action="prompt", options={"save_on_exception": saves_on_exception})
    process = scene.fork(case)
    for number in (7, 14):
        process.send_at(f"update {number}", "SIGINT")
    assert process.finish() == 0, process.text()
    saved = re.findall(r"KeyboardInterrupt: saved (\S+)", process.text())
    assert [path.rsplit("-", 1)[1] for path in saved] == ["7", "14"]
    assert "SIGINT: saved" in process.text()
    assert "giving the prompt back" in process.text()
    assert scene.result() == expected
    assert scene.checkpoints() == [7, 14, NUM_UPDATES]


def test_sigterm_at_a_prompt_leaves(scene: Scene) -> None:
    case = scene.case("update 7", action="prompt")
    process = scene.fork(case)
    process.send_at("update 7", "SIGTERM")
    assert process.finish() == 143
    assert scene.checkpoints() == [7]


def test_processes_forked_during_a_run_handle_signals_as_if_there_was_none(scene: Scene, expected: Any) -> None:
    process = scene.fork(scene.case(action="child"))
    assert process.finish() == 0
    codes = [int(code) for code in re.findall("child ended (-?[0-9]+)", process.text())]
    assert codes == [-signal.SIGTERM, 77, -signal.SIGUSR1]
    assert scene.checkpoints() == [NUM_UPDATES]
    assert scene.result() == expected


def test_a_process_forked_during_a_run_that_trains_as_well_saves_its_own_state(scene: Scene, expected: Any) -> None:
    (scene.directory / "second").mkdir()
    process = scene.fork(scene.case(action="train in child"))
    assert process.finish() == 0, process.text()
    assert "child ended 143\n" in process.text()
    assert scene.checkpoints("second/checkpoints") == [3]
    assert scene.checkpoints() == [NUM_UPDATES]
    assert scene.result() == expected


# --------------------------------------------------------------------------------------------------------------------
# Two processes
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "name"), [(0, "SIGINT"), (1, "SIGTERM")])
def test_a_signal_to_one_of_two_ends_both(rank: int, name: str, scene: Scene, expected_of_two: Any) -> None:
    """With slow updates, at most two of them later."""
    case = scene.case("update 4", rank=rank, num_processes=2, pause=0.5)
    processes = scene.fork_two(case)
    processes[rank].reach("update 4")
    processes[rank].send(name)
    processes[rank].go_on("update 4")
    assert [process.finish() for process in processes] == [CODES[name]] * 2
    [update] = scene.checkpoints()
    assert 4 <= update <= 6
    assert scene.run_two_again(dataclasses.replace(case, pause=0.0)) == expected_of_two


def test_two_processes_with_fast_updates_agree_within_a_second(scene: Scene) -> None:
    long_epochs = {"num_samples": 6400, "num_eval_samples": 4, "eval_every": 10**9}  # at their beginnings they ask
    case = scene.case("update 130", rank=1, num_processes=2, **long_epochs)
    processes = scene.fork_two(case)
    processes[1].reach("update 130")
    processes[1].send("SIGTERM")
    processes[1].go_on("update 130")
    begin = time.monotonic()
    assert [process.finish() for process in processes] == [143, 143]
    assert time.monotonic() - begin < 10  # in which it also saves, and two processes end
    [update] = scene.checkpoints()
    assert 130 <= update <= 130 + 256


def seconds_until_agreement() -> float:
    """Return how long slow calls go on without an exchange once there have been a thousand fast ones."""
    agreement = PeriodicAgreement(Accelerator())
    number = 0
    while agreement.ask(0) is None or number < 1000:
        number += 1
    begin = time.monotonic()
    while agreement.ask(0) is None:
        time.sleep(0.05)
    return time.monotonic() - begin


@pytest.mark.slow
def test_two_processes_whose_updates_become_slow_agree_within_seconds() -> None:
    """As when the storage of the data stalls, which must not use up the time that schedulers give."""
    assert max(run_processes(seconds_until_agreement, 2)) < 5


def test_sigusr1_to_one_of_two_saves_once(scene: Scene, expected_of_two: Any) -> None:
    case = scene.case("update 7", rank=1, num_processes=2)
    processes = scene.fork_two(case)
    processes[1].reach("update 7")
    processes[1].send("SIGUSR1")
    processes[1].go_on("update 7")
    assert [process.finish() for process in processes] == [0, 0]
    [update, last] = scene.checkpoints()
    assert 7 <= update < last == NUM_UPDATES
    assert [scene.result(number) for number in range(2)] == expected_of_two


def test_a_signal_to_one_of_two_during_an_evaluation_ends_it(scene: Scene, expected_of_two: Any) -> None:
    moment = f"evaluating {UPDATES_IN_EPOCH} 3"
    case = scene.case(moment, rank=1, num_processes=2)
    processes = scene.fork_two(case)
    processes[1].reach(moment)
    processes[1].send("SIGTERM")
    processes[1].go_on(moment)
    assert [process.finish() for process in processes] == [143, 143]
    [update] = scene.checkpoints()
    assert update >= UPDATES_IN_EPOCH
    assert scene.run_two_again(case) == expected_of_two


@pytest.mark.slow
@pytest.mark.parametrize(("target", "name"), [(0, "SIGTERM"), (1, "SIGINT"), (None, "SIGTERM")])
def test_torchrun(target: int | None, name: str, scene: Scene, expected_of_two: Any) -> None:
    """A signal to one rank, or to the launcher, which signals the process groups of its ranks; its code is always 1."""
    case = scene.case("update 7", rank=target or 0, num_processes=2, num_workers=2)
    process = scene.launch(case, *TORCHRUN)
    process.reach("update 7")
    process.send(name, pid=None if target is None else process.rank(target))
    process.go_on("update 7")
    assert process.finish() == 1, process.text()
    [update] = scene.checkpoints()
    assert 7 <= update < NUM_UPDATES
    assert process.text().count(f"{name}: saved") == 1
    if target is not None:
        assert scene.run_two_again(case) == expected_of_two
        return
    again = scene.launch(case, *TORCHRUN)
    assert again.finish() == 0, again.text()
    assert "Resuming from" in again.text()
    assert [scene.result(rank) for rank in range(2)] == expected_of_two


@pytest.mark.slow
def test_accelerate_launch_with_two_processes(scene: Scene, expected_of_two: Any) -> None:
    case = scene.case("update 7", rank=1, num_processes=2)
    process = scene.launch(case, *ACCELERATE, *TWO_PROCESSES)
    process.send_at("update 7", "SIGTERM")
    assert process.finish() != 0, process.text()
    assert len(scene.checkpoints()) == 1
    assert scene.run_two_again(case) == expected_of_two


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("SIGTERM", []), ("SIGKILL", []), ("SIGKILL", ["-X", "faulthandler", "-W", "ignore"])]
)
def test_accelerate_launch_that_dies_and_leaves_its_child_behind(
    name: str, options: list[str], scene: Scene, expected: Any
) -> None:
    """Also where the launcher's interpreter was given options."""
    case = scene.case("update 7")
    launcher = [sys.executable, *options, *ACCELERATE[1:], *ONE_PROCESS]
    process = scene.launch(case, *launcher)
    process.reach("update 7")
    child = process.rank(0)
    assert psutil.Process(child).ppid() == process.pid
    process.send(name)
    assert process.exit_code(PATIENCE) not in (None, 0)
    assert psutil.pid_exists(child)
    process.go_on("update 7")
    process.finish()
    assert "launcher gone: saved" in process.text()
    assert scene.checkpoints() == [7]
    if name == "SIGTERM":
        again = scene.launch(case, *launcher)
        assert again.finish() == 0, again.text()
        assert scene.result() == expected


@pytest.mark.slow
def test_a_script_of_the_user_called_launch_may_leave_its_child_alone(scene: Scene, expected: Any) -> None:
    """It starts a training run in the background, and ends."""
    script = scene.directory / "launch.py"
    script.write_text(
        "import subprocess, sys, time, pathlib\n"
        "subprocess.Popen([sys.executable, *sys.argv[1:]])\n"
        f"while not pathlib.Path({str(scene.directory / 'reached update 7')!r}).exists(): time.sleep(0.01)\n"
    )
    process = scene.launch(scene.case("update 7"), sys.executable, str(script))
    process.reach("update 7")
    assert process.exit_code(PATIENCE) == 0
    process.go_on("update 7")
    process.finish()
    assert "launcher gone" not in process.text()
    assert scene.result() == expected


# --------------------------------------------------------------------------------------------------------------------
# Notebooks and prompts
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_interrupting_the_kernel_of_a_notebook(scene: Scene, expected: Any) -> None:
    from jupyter_client.manager import KernelManager

    case = scene.case("update 7", num_workers=2)
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=os.environ | ENVIRONMENT, cwd=str(ROOT))
    client = manager.blocking_client()
    client.start_channels()

    def execute(code: str, expressions: dict[str, str] | None = None) -> str:
        return client.execute(code, user_expressions=expressions or {}, store_history=False)

    def reply(to: str) -> dict[str, Any]:
        while True:
            message = client.get_shell_msg(timeout=PATIENCE)
            if message["parent_header"]["msg_id"] == to:
                return message["content"]

    try:
        client.wait_for_ready(timeout=PATIENCE)
        first = execute(
            "import json\nfrom tests.preempted_script import *\n"
            f"case = Case(**json.loads({json.dumps(dataclasses.asdict(case))!r}))\n"
            "trainer = make_trainer(case)\n"
            "train(trainer, case)\n"
        )
        until(lambda: (scene.directory / "reached update 7").exists(), "the run does not reach update 7")
        manager.interrupt_kernel()
        (scene.directory / "go update 7").touch()
        content = reply(first)
        assert content["status"] == "error"
        assert content["ename"] == "KeyboardInterrupt"
        assert re.fullmatch(r"saved \S+update-7", content["evalue"])
        assert scene.checkpoints() == [7]
        second = execute(
            "loss = trainer.evaluate(Noisy(case, 8, 2))['evaluation_loss']\nbefore = trainer.num_updates\n"
            "train(trainer, case)",
            {"before": "before", "after": "trainer.num_updates", "loss": "loss > 0"},
        )
        content = reply(second)
        assert content["status"] == "ok", content
        found = {name: value["data"]["text/plain"] for name, value in content["user_expressions"].items()}
        assert found == {"before": "7", "after": str(NUM_UPDATES), "loss": "True"}
        assert scene.result() == expected
        third = execute(f"Path({str(scene.directory / 'third')!r}).touch()\nwhile True: pass")
        until(lambda: (scene.directory / "third").exists(), "the cell does not begin")
        manager.interrupt_kernel()
        assert reply(third)["ename"] == "KeyboardInterrupt"  # handlers are as before
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_ctrl_c_in_an_interactive_python(scene: Scene, expected: Any) -> None:
    import pexpect

    case = scene.case("update 7", num_workers=2, persistent=True)
    shell = pexpect.spawn(
        sys.executable,
        ["-i", "-q", "-c", "import json; from tests.preempted_script import *"],
        env=os.environ | ENVIRONMENT | {"TERM": "dumb"},
        cwd=str(ROOT),
        timeout=PATIENCE,
        encoding="utf-8",
        echo=False,
        dimensions=(50, 2000),
    )
    try:
        shell.expect_exact(">>> ")
        (scene.directory / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
        shell.sendline(f"case = Case(**json.load(open({str(scene.directory / 'case.json')!r})))")
        shell.expect_exact(">>> ")
        shell.sendline("trainer = make_trainer(case)")
        shell.expect_exact(">>> ")
        shell.sendline("train(trainer, case)")
        shell.expect_exact("reached update 7")
        shell.sendintr()
        shell.sendintr()
        (scene.directory / "go update 7").touch()
        shell.expect(r"KeyboardInterrupt: saved \S+update-(\d+)")
        update = int(shell.match[1])
        shell.expect_exact(">>> ")
        shell.sendline("trainer.num_updates, trainer.is_training_run")
        shell.expect_exact(f"({update}, False)")
        shell.expect_exact(">>> ")
        shell.sendline("train(trainer, case)")
        shell.expect_exact("finished")
        shell.expect_exact(">>> ")
        shell.sendeof()
        shell.expect(pexpect.EOF)
        shell.wait()
        assert shell.exitstatus == 0
        assert scene.checkpoints() == [update, NUM_UPDATES]
        assert scene.result() == expected
    finally:
        shell.close(force=True)

"""Messages to real servers on this machine, what goes wrong with them, and commands at the end of a run."""

from __future__ import annotations

import copy
import http.server
import json
import pickle
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LambdaCallback, SaveTrainingStateCallback
from pytorch_accelerated.callbacks.notifications import (
    CommandAtEndCallback,
    MetricThreshold,
    Notification,
    NotificationCallback,
    Smtp,
    Webhook,
)
from pytorch_accelerated.callbacks.progress import SummaryCallback
from pytorch_accelerated.errors import StopTrainingError, TrainingInterrupted
from tests.support import make_data, make_mlp, run_processes

PASSWORD = "correct horse"


def make_trainer(*callbacks: Any, **kwargs: Any) -> Trainer:
    return Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), callbacks, seed=0, **kwargs)


def raises_at(update: int, error: BaseException) -> LambdaCallback:
    def fail(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == update:
            raise error

    return LambdaCallback(on_train_update_end=fail)


class Collect:
    """A channel that keeps what it is to send."""

    def __init__(self) -> None:
        self.sent: list[Notification] = []

    def send(self, notification: Notification) -> None:
        self.sent.append(notification)

    @property
    def events(self) -> list[str]:
        return [notification.event for notification in self.sent]


# --------------------------------------------------------------------------------------------------------------------
# Servers
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def mail_server(**kwargs: Any) -> Iterator[Any]:
    from aiosmtpd.controller import Controller
    from aiosmtpd.smtp import AuthResult

    class Keep:
        def __init__(self) -> None:
            self.mails: list[Any] = []
            self.log_ins: list[Any] = []

        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            self.mails.append((envelope.rcpt_tos, message_from_bytes(envelope.content, policy=policy.default)))
            return "250 OK"

        def log_in(self, server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> Any:
            self.log_ins.append((data.login, data.password))
            return AuthResult(success=data.password == PASSWORD.encode(), handled=False)

    keep = Keep()
    kwargs |= {"authenticator": keep.log_in, "auth_require_tls": False}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The controller connects to itself, with a certificate that is made out to the name.
    controller: Any = Controller(
        keep, hostname="localhost" if "ssl_context" in kwargs else "127.0.0.1", port=port, **kwargs
    )  # type: ignore[no-untyped-call]
    controller.start()
    try:
        yield keep, port
    finally:
        controller.stop()


@contextmanager
def web_server(code: int = 200, location: str | None = None) -> Iterator[Any]:
    bodies: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append((self.path, self.headers.get("Authorization"), json.loads(body)))
            self.send_response(code)
            if location is not None:
                self.send_header("Location", location)
            self.end_headers()

        def do_GET(self) -> None:
            bodies.append((self.path, self.headers.get("Authorization"), None))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield bodies, server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def silent_server() -> Iterator[int]:
    """Accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --------------------------------------------------------------------------------------------------------------------
# Channels
# --------------------------------------------------------------------------------------------------------------------


def test_a_mail_tells_of_the_end_with_the_summary() -> None:
    with mail_server() as (server, port):
        smtp = Smtp("127.0.0.1", "me@here", ["you@there", "her@there"], port=port, security="none")
        make_trainer(NotificationCallback(smtp, run_name="digits\nthird")).train(make_data(32), 2, make_data(8))
    [(recipients, mail)] = server.mails
    assert recipients == ["you@there", "her@there"] and mail["To"] == "you@there, her@there"
    assert mail["Subject"] == "digits third: training has finished" and mail["From"] == "me@here"
    lines = mail.get_content().splitlines()
    assert lines[0].startswith("Summary: 2 epochs, 8 updates, 64 samples in")
    assert any(line.split()[:1] == ["eval_loss_epoch"] for line in lines)


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_password_logs_in_and_is_seen_nowhere(
    by_environment: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAIL_PASSWORD", PASSWORD)
    secret = {"password_env": "MAIL_PASSWORD"} if by_environment else {"password": PASSWORD}
    with mail_server() as (server, port):
        smtp = Smtp("127.0.0.1", "me@here", "you@there", port, "none", user="me", **secret)  # type: ignore[arg-type]
        callback = NotificationCallback(smtp)
        make_trainer(callback, SummaryCallback).train(make_data(8), 1)
        assert server.log_ins[0] == (b"me", PASSWORD.encode()) and len(server.mails) == 1
        monkeypatch.setenv("MAIL_PASSWORD", "wrong")
        if by_environment:
            make_trainer(callback).train(make_data(8), 1)
            out = capsys.readouterr().out
            assert "SMTPAuthenticationError" in out and "wrong" not in out
    seen = capsys.readouterr().out + repr(smtp) + repr(vars(smtp)) + repr(callback) + str(callback.state_dict())
    assert PASSWORD not in seen
    assert vars(copy.deepcopy(smtp))["_password"].get() == ("wrong" if by_environment else PASSWORD)
    with pytest.raises(TypeError, match="not to be pickled"):
        pickle.dumps(smtp)


class Talkative(Webhook):
    def send(self, notification: Notification) -> None:
        raise OSError(f"cannot reach {self._read_url()}")


def test_what_an_error_says_has_no_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    callback = NotificationCallback(Talkative("https://hooks.there/secret"), run_name="x")
    make_trainer(callback).train(make_data(8), 1)
    assert capsys.readouterr().out == (
        "NotificationCallback: Webhook(hooks.there) could not send 'x: training has finished': "
        "OSError: cannot reach ***\n"
    )


def test_encryption_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with mail_server() as (server, port):  # which has none
        make_trainer(NotificationCallback(Smtp("127.0.0.1", "me@here", "you@there", port))).train(make_data(8), 1)
        tls = Smtp("127.0.0.1", "me@here", "you@there", port, "tls")
        make_trainer(NotificationCallback(tls)).train(make_data(8), 1)
    assert server.mails == []
    first, second = capsys.readouterr().out.splitlines()
    assert "SMTPNotSupportedError: STARTTLS" in first and "SSL" in second


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"recipients": []}, "needs recipients"),
        ({"user": "me"}, "both a user and a password"),
        ({"password": "x"}, "both a user and a password"),
        ({"user": "me", "password": "x", "password_env": "X"}, "not both"),
        ({"user": "me", "password": "x", "security": "none"}, "unencrypted"),
        ({"security": "ssl"}, "security must be"),
        ({"timeout_seconds": 0}, "timeout_seconds must be above 0"),
    ],
)
def test_settings_of_mail_that_make_no_sense_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Smtp(**{"host": "mail.there", "sender": "me@here", "recipients": "you@there"} | arguments)


def test_a_webhook_gets_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with web_server() as (bodies, port):
        url = f"http://127.0.0.1:{port}/services/secret"
        monkeypatch.setenv("HOOK", url)
        own = Webhook(
            url_env="HOOK", format=lambda notification: {"loss": notification.metrics["train_loss_epoch"]},
            headers={"Authorization": "Bearer x"},
        )  # fmt: skip
        callback = NotificationCallback([Webhook(url), own], run_name="digits")
        trainer = make_trainer(callback, run_dir=tmp_path, trackers=[])
        history = trainer.train(make_data(8), 1)
    (path, no_header, payload), (_, header, own_payload) = sorted(bodies, key=lambda body: "loss" in body[2])
    assert path == "/services/secret" and no_header is None and header == "Bearer x"
    assert list(payload) == ["text"]
    assert payload["text"].startswith("*digits: training has finished*\n```Summary: 1 epoch, 1 updates")
    assert f"Run directory: {tmp_path / '1'}```" in payload["text"]
    assert own_payload == {"loss": history.get_latest_metric("train_loss_epoch")}


@pytest.mark.parametrize("url", ["file:///etc/passwd", "hooks.there/x", ""])
def test_a_webhook_needs_a_web_address(url: str) -> None:
    with pytest.raises(ValueError, match="must begin with https"):
        Webhook(url)
    with pytest.raises(ValueError, match="needs a url"):
        Webhook()


# --------------------------------------------------------------------------------------------------------------------
# What goes wrong
# --------------------------------------------------------------------------------------------------------------------


def test_a_message_that_cannot_be_sent_is_said_once_and_fails_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ValueError, match="the environment variable NOT_SET, which is to hold the url, is not set"):
        Webhook(url_env="NOT_SET")  # at once, and not when the message is to be sent
    with web_server(code=500) as (bodies, port):
        channels = [
            Webhook(f"http://127.0.0.1:{port}/secret"),
            Webhook(f"http://127.0.0.1:{free_port()}/secret"),
            Smtp("127.0.0.1", "me@here", "you@there", port=free_port(), security="none"),
            Webhook(f"http://127.0.0.1:{port}/secret", format=lambda notification: {1, 2}),
        ]
        make_trainer(NotificationCallback(channels, run_name="x")).train(make_data(32), 1)
    assert len(bodies) == 1
    lines = sorted(capsys.readouterr().out.splitlines())
    expected = [
        "NotificationCallback: Smtp(127.0.0.1:PORT) could not send 'x: training has finished': ConnectionRefusedError",
        "NotificationCallback: Webhook(127.0.0.1) could not send 'x: training has finished': HTTPError: HTTP Error 500",
        "NotificationCallback: Webhook(127.0.0.1) could not send 'x: training has finished': TypeError: Object of type",
        "NotificationCallback: Webhook(127.0.0.1) could not send 'x: training has finished': URLError: <urlopen error",
    ]
    expected[0] = expected[0].replace("PORT", str(channels[2].port))  # type: ignore[union-attr]
    assert len(lines) == 4 and all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines
    assert not any("secret" in line for line in lines)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_webhook_that_has_moved_is_said_and_not_followed(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """What comes of following is a request without the message, which has the headers."""
    with web_server() as (stolen, other), web_server(code, f"http://localhost:{other}/there") as (bodies, port):
        hook = Webhook(f"http://127.0.0.1:{port}/secret", headers={"Authorization": "Bearer x"})
        make_trainer(NotificationCallback(hook, run_name="x")).train(make_data(8), 1)
    assert stolen == [] and len(bodies) == 1
    [line] = capsys.readouterr().out.splitlines()
    start = "NotificationCallback: Webhook(127.0.0.1) could not send 'x: training has finished': HTTPError: HTTP Error"
    assert line.startswith(f"{start} {code}"), line
    assert "secret" not in line and "Bearer" not in line


@pytest.mark.parametrize("kind", ["smtp", "webhook"])
def test_a_server_that_never_answers_does_not_hold_up_the_run(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with silent_server() as port:
        channel: Any = Webhook(f"http://127.0.0.1:{port}/", timeout_seconds=30)
        if kind == "smtp":
            channel = Smtp("127.0.0.1", "me@here", "you@there", port, "none", timeout_seconds=30)
        other = Collect()
        callback = NotificationCallback([channel, other], on=["begin", "end"], timeout_seconds=0.3)
        start = time.monotonic()
        make_trainer(callback).train(make_data(32), 2)
        assert time.monotonic() - start < 5
        assert other.events == ["begin", "end"]  # no channel waits for another
        [line] = capsys.readouterr().out.splitlines()
        assert line == f"NotificationCallback: {channel!r} has not sent everything within 0.3 s; going on."
        channel.timeout_seconds = 0.2  # with a shorter patience it is said what happened
        make_trainer(NotificationCallback(channel)).train(make_data(8), 1)
        assert re_search("could not send .*: (TimeoutError|URLError|SMTPServerDisconnected)", capsys.readouterr().out)


def re_search(pattern: str, text: str) -> bool:
    import re

    return re.search(pattern, text) is not None


def test_a_failure_during_the_run_is_said_during_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    callback = NotificationCallback(Webhook(f"http://127.0.0.1:{free_port()}/"), on=["begin"], run_name="x")
    wait = LambdaCallback(on_train_update_end=lambda trainer, **_: time.sleep(0.1))
    announce = LambdaCallback(on_train_epoch_begin=lambda trainer, **_: trainer.print(trainer.current_epoch))
    make_trainer(callback, wait, announce).train(make_data(24), 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1" and "could not send 'x: training has begun'" in lines[1] and lines[2:] == ["2", "3"]


# --------------------------------------------------------------------------------------------------------------------
# Moments
# --------------------------------------------------------------------------------------------------------------------


def test_a_failure_is_told_with_what_where_and_the_summary() -> None:
    channel = Collect()
    with pytest.raises(ZeroDivisionError, match="planted"):
        make_trainer(NotificationCallback(channel), raises_at(3, ZeroDivisionError("planted"))).train(make_data(32), 2)
    [told] = channel.sent
    assert told.event == "failure" and told.subject.endswith(": training has failed: ZeroDivisionError")
    first, where, note, summary = told.text.splitlines()[:4]
    assert first == "ZeroDivisionError: planted"
    assert where.startswith(f"raised at {__file__}:") and where.endswith("in fail")
    assert "while training, process 0 of 1, epoch 1, 3 updates made" in note
    assert summary.startswith("Summary: 0 epochs and a part of one, 3 updates")


def test_an_end_by_stop_training_error_is_an_end() -> None:
    channel = Collect()
    make_trainer(NotificationCallback(channel), raises_at(3, StopTrainingError("enough"))).train(make_data(32), 2)
    [told] = channel.sent
    assert told.event == "end" and told.text.startswith("Stopped early: enough\nSummary: ")


@pytest.mark.parametrize("on, events", [((), []), (("interruption",), ["interruption"] * 2)])
def test_interruptions_are_told_if_asked_for(on: Any, events: list[str], tmp_path: Path) -> None:
    channel = Collect()
    callbacks = (
        NotificationCallback(channel, on=["end", "failure", *on]),
        SaveTrainingStateCallback(tmp_path, time_budget=1e-9),
    )
    with pytest.raises(TrainingInterrupted):
        make_trainer(*callbacks).train(make_data(32), 2)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks[0], raises_at(2, KeyboardInterrupt())).train(make_data(32), 2)
    assert channel.events == events


def test_a_callback_that_fails_at_the_end_of_a_run_is_a_failure() -> None:
    channel = Collect()
    fail = LambdaCallback(on_train_run_end=lambda trainer, **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_trainer(NotificationCallback(channel), fail).train(make_data(8), 1)
    assert channel.events[-1] == "failure" and channel.events.count("failure") == 1


def test_evaluations_that_fail_on_their_own_are_no_run() -> None:
    channel = Collect()
    fail = LambdaCallback(on_eval_step_end=lambda trainer, **_: 1 / 0)
    trainer = make_trainer(NotificationCallback(channel), fail)
    trainer.train(make_data(8), 1)
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate(make_data(8))
    assert channel.events == ["end"]


def test_a_threshold_tells_once_for_each_crossing() -> None:
    channel = Collect()
    values = [0.5, 0.95, 0.97, float("nan"), 0.98, 0.2, 0.91, 0.1]

    def record(trainer: Trainer, **kwargs: Any) -> None:
        trainer.run_history.update_metric("eval_accuracy", values[trainer.current_epoch - 1])

    thresholds = [MetricThreshold("eval_accuracy", above=0.9), MetricThreshold("eval_accuracy", below=0.15)]
    callback = NotificationCallback(channel, on=(), thresholds=thresholds, run_name="x")
    make_trainer(LambdaCallback(on_train_epoch_end=record), callback).train(make_data(8), 8)
    assert [(told.subject, told.current_epoch) for told in channel.sent] == [
        ("x: eval_accuracy is above 0.9: 0.95", 2),
        ("x: eval_accuracy is above 0.9: 0.91", 7),
        ("x: eval_accuracy is below 0.15: 0.1", 8),
    ]
    assert channel.sent[0].metrics["eval_accuracy"] == 0.95 and "Summary: " in channel.sent[0].text


def test_values_within_an_epoch_are_seen_and_a_resumed_run_does_not_tell_again(tmp_path: Path) -> None:
    channel = Collect()

    def record(trainer: Trainer, **kwargs: Any) -> None:
        trainer.run_history.update_metric("peak", 10.0 if trainer.num_updates == 2 else 20.0)

    def make() -> Trainer:
        threshold = MetricThreshold("peak", above=15)
        callback = NotificationCallback(channel, on=(), thresholds=threshold)
        saver = SaveTrainingStateCallback(tmp_path)
        return make_trainer(LambdaCallback(on_train_update_end=record), callback, saver)

    make().train(make_data(32), 1)
    assert len(channel.sent) == 2  # 20, 10, 20, 20: crossed twice
    make().train(make_data(32), 3, resume_from="latest")
    assert len(channel.sent) == 2
    make().train(make_data(32), 1)
    assert len(channel.sent) == 4


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_mail_goes_encrypted(security: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2 -subj /CN=localhost "
        "-addext subjectAltName=DNS:localhost",
        shell=True,
        check=True,
        capture_output=True,
    )
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(certificate, key)
    with mail_server(**{"tls_context" if security == "starttls" else "ssl_context": server_side}) as (server, port):
        trusting = ssl.create_default_context(cafile=str(certificate))
        smtp = Smtp("localhost", "me@here", "you@there", port, security, "me", PASSWORD, context=trusting)
        make_trainer(NotificationCallback(smtp)).train(make_data(8), 1)
        assert len(server.mails) == 1 and server.log_ins == [(b"me", PASSWORD.encode())]
        smtp.context = None  # the certificate is not one that Python trusts
        make_trainer(NotificationCallback(smtp)).train(make_data(8), 1)
        assert len(server.mails) == 1 and "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().out


def test_a_metric_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    callback = NotificationCallback(Collect(), on=(), thresholds=MetricThreshold("eval_loss_epok", below=1))
    make_trainer(callback).train(make_data(8), 3, make_data(8))
    [line] = capsys.readouterr().out.splitlines()
    assert "'eval_loss_epok', below=1) watches what the first epoch did not record. Did you mean" in line


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: MetricThreshold("a"), ValueError, "one of them"),
        (lambda: MetricThreshold("a", 1, 2), ValueError, "one of them"),
        (lambda: NotificationCallback(Smtp), TypeError, "must have a method send"),
        (lambda: NotificationCallback("https://x"), TypeError, "must have a method send"),
        (lambda: NotificationCallback([], thresholds=["a"]), TypeError, "must be MetricThreshold"),
        (lambda: NotificationCallback([], on=("finish",)), ValueError, "on='finish' is no moment"),
        (lambda: CommandAtEndCallback("shutdown"), TypeError, "must be a list"),
        (lambda: CommandAtEndCallback([]), ValueError, "command is empty"),
        (lambda: CommandAtEndCallback(["true"], on="begin"), ValueError, "on='begin' is no moment"),
        (lambda: CommandAtEndCallback(["true"], timeout_seconds=0), ValueError, "timeout_seconds"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# --------------------------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------------------------


def tell_facts(path: Path) -> list[str]:
    script = (
        "import os, sys, pathlib; "
        f"open({str(path)!r}, 'a').write(' '.join(os.environ['PT_ACC_' + n] or '-' for n in "
        "('OUTCOME', 'RUN_DIR', 'NUM_UPDATES')) + '\\n'); print('done,', 'well'); sys.exit(3)"
    )
    return [sys.executable, "-c", script]


def test_a_command_runs_after_everything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[bool] = []
    facts = tmp_path / "facts"
    look = LambdaCallback(on_train_run_end=lambda trainer, **_: seen.append(facts.exists()))
    command = CommandAtEndCallback(tell_facts(facts))
    make_trainer(command, SummaryCallback, look, run_dir=tmp_path / "runs", trackers=[]).train(make_data(32), 1)
    assert seen == [False] and facts.read_text() == f"finished {tmp_path}/runs/1 4\n"
    lines = capsys.readouterr().out.splitlines()
    # The first says where the run directory is.
    assert lines[1].startswith("Summary: ") and lines[-1].endswith("ended with exit code 3: done, well")


def test_a_command_runs_after_the_ends_that_it_is_meant_for(tmp_path: Path) -> None:
    def outcomes(on: Any) -> list[str]:
        facts = tmp_path / f"facts {on}"
        command = CommandAtEndCallback(tell_facts(facts), **({} if on is None else {"on": on}))
        make_trainer(command, raises_at(2, StopTrainingError("enough"))).train(make_data(32), 1)
        for error in (RuntimeError("enough"), KeyboardInterrupt()):
            with pytest.raises(type(error)):
                make_trainer(command, raises_at(2, error)).train(make_data(32), 1)
        saver = SaveTrainingStateCallback(tmp_path / f"saved {on}", time_budget=1e-9)
        with pytest.raises(TrainingInterrupted):
            make_trainer(command, saver).train(make_data(32), 1)
        with pytest.raises(ZeroDivisionError):
            make_trainer(command, LambdaCallback(on_train_run_end=lambda trainer, **_: 1 / 0)).train(make_data(8), 1)
        return [line.split()[0] for line in facts.read_text().splitlines()]

    assert outcomes(None) == ["finished", "failed", "failed"]
    assert outcomes(("failure",)) == ["failed", "failed"]
    assert outcomes(("interruption",)) == ["interrupted", "interrupted"]


def test_a_command_that_goes_wrong_fails_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="there is no program 'no-such-program'"):
        make_trainer(CommandAtEndCallback(["no-such-program"])).train(make_data(8), 1)
    make_trainer(CommandAtEndCallback(["sleep", "60"], timeout_seconds=0.2)).train(make_data(8), 1)
    assert "'sleep 60', was killed after 0.2 s." in capsys.readouterr().out
    program = tmp_path / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    make_trainer(CommandAtEndCallback([program])).train(make_data(8), 1)
    assert "could not be run: FileNotFoundError" in capsys.readouterr().out
    make_trainer(CommandAtEndCallback([sys.executable, "-c", "print('x' * 5000)"])).train(make_data(8), 1)
    out = capsys.readouterr().out
    assert "ended with exit code 0: ...xxx" in out and len(out) < 2200


class FileChannel:
    def __init__(self, path: str) -> None:
        self.path = path

    def send(self, notification: Notification) -> None:
        with open(self.path, "a") as file:
            file.write(notification.event + "\n")


def _train(directory: str, num_updates_until_failure: int) -> str | None:
    threshold = MetricThreshold("train_loss_epoch", below=100)
    trainer = make_trainer(
        NotificationCallback(FileChannel(f"{directory}/sent"), thresholds=threshold),
        CommandAtEndCallback(tell_facts(Path(directory, "facts"))),
        raises_at(num_updates_until_failure, RuntimeError("planted")),
    )
    try:
        trainer.train(make_data(32), 2)
    except Exception as error:
        return type(error).__name__
    return None


@pytest.mark.parametrize("update, failure", [(99, None), (3, "RuntimeError")])
def test_two_processes_send_one_message_and_run_one_command(update: int, failure: str | None, tmp_path: Path) -> None:
    assert run_processes(_train, 2, str(tmp_path), update) == [failure] * 2
    events = ["failure"] if failure else ["end"]
    assert (tmp_path / "sent").read_text().split() == ["threshold", *events]
    outcome = "failed - 3" if failure else "finished - 4"
    assert (tmp_path / "facts").read_text() == f"{outcome}\n"

"""Tell people, or another program, how a run goes: messages by e-mail and webhook, and a command at its end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import queue
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.progress import RunSummary
from pytorch_accelerated.errors import did_you_mean, outcome_of
from pytorch_accelerated.metrics_log import is_number

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

Moment = Literal["begin", "end", "failure", "interruption"]

_MOMENTS = ("begin", "end", "failure", "interruption")
_MOMENT_OF = {"finished": "end", "failed": "failure", "interrupted": "interruption"}
_MAX_MESSAGE = 2000  # characters of an exception's message, or of a command's output


@dataclasses.dataclass(frozen=True)
class Notification:
    """Hold what is to be told."""

    event: str
    """``begin``, ``end``, ``failure``, ``interruption`` or ``threshold``."""
    subject: str
    """One line."""
    text: str
    """The rest, as lines."""
    run_dir: str | None
    """The run directory, where there is one."""
    num_updates: int
    """Updates made so far."""
    current_epoch: int
    """The epoch in progress."""
    metrics: Mapping[str, float]
    """The newest value of each metric that is a number."""


class Channel(Protocol):
    """Send notifications somewhere: any object with this method will do."""

    def send(self, notification: Notification) -> None:
        """Send it, or raise. Called in a thread of its own, one notification at a time."""


class _Secret:
    """Hold what is not to be printed, recorded or pickled by mistake."""

    def __init__(self, what: str, value: str | None, env: str | None) -> None:
        if value is not None and env is not None:
            raise ValueError(f"{what} is given as an argument or as an environment variable ({what}_env), not both.")
        self._what, self._value, self._env = what, value, env
        self.get()  # better refused now than when the message is to be sent, days later

    def __repr__(self) -> str:
        return f"<{self._what} from {self._env}>" if self._env else f"<{self._what}>"

    def __reduce__(self) -> Any:
        raise TypeError(f"the {self._what} of a channel is not to be pickled; give it as an environment variable.")

    def __deepcopy__(self, memo: Any) -> _Secret:
        return self

    def get(self) -> str | None:
        if self._env is None:
            return self._value
        if self._env not in os.environ:
            raise ValueError(f"the environment variable {self._env}, which is to hold the {self._what}, is not set.")
        return os.environ[self._env]


class Smtp:
    """Send notifications by e-mail."""

    def __init__(
        self,
        host: str,
        sender: str,
        recipients: str | Sequence[str],
        port: int | None = None,
        security: Literal["starttls", "tls", "none"] = "starttls",
        user: str | None = None,
        password: str | None = None,
        password_env: str | None = None,
        timeout_seconds: float = 10.0,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Take the server and the addresses.

        Args:
            host: the server that takes mail.
            sender: address that the mail comes from.
            recipients: address, or addresses, that it goes to.
            port: None for the usual one: 587 with STARTTLS, 465 with TLS, 25 without.
            security: ``"starttls"`` begins in the clear and goes on encrypted, ``"tls"`` is encrypted from the first,
                ``"none"`` never is. The certificate of the server is checked.
            user: to log in with; None for no log-in.
            password: of the user; never printed, recorded or pickled.
            password_env: name of an environment variable that holds it, instead.
            timeout_seconds: for each answer of the server.
            context: settings of TLS; None for Python's defaults.

        Raises:
            ValueError: if there is nobody to send to, a log-in would not be encrypted, or only one of user and password
                is there.
        """
        self.recipients = [recipients] if isinstance(recipients, str) else list(recipients)
        if not self.recipients:
            raise ValueError("Smtp needs recipients.")
        if security not in ("starttls", "tls", "none"):
            raise ValueError(f"security must be 'starttls', 'tls' or 'none', got {security!r}.")
        if (user is None) != (password is None and password_env is None):
            raise ValueError("Smtp needs both a user and a password (or password_env), or neither.")
        if user is not None and security == "none" and host not in ("localhost", "127.0.0.1", "::1"):
            raise ValueError("Smtp would send the password unencrypted: use security='starttls' or 'tls'.")
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be above 0, got {timeout_seconds}.")
        self.host, self.sender, self.security, self.user = host, sender, security, user
        self.port = port if port is not None else {"starttls": 587, "tls": 465, "none": 25}[security]
        self.timeout_seconds = timeout_seconds
        self.context = context
        self._password = _Secret("password", password, password_env)

    def __repr__(self) -> str:
        return f"Smtp({self.host}:{self.port})"

    def send(self, notification: Notification) -> None:
        """Send an e-mail. Raises OSError or smtplib.SMTPException if the server does not take it."""
        import smtplib  # with email a dozen modules, which few runs need
        from email.message import EmailMessage

        mail = EmailMessage()
        mail["Subject"] = " ".join(notification.subject.split())
        mail["From"], mail["To"] = self.sender, ", ".join(self.recipients)
        mail.set_content(notification.text + "\n")
        context = self.context
        if context is None and self.security != "none":
            context = ssl.create_default_context()
        server: smtplib.SMTP
        if self.security == "tls":
            server = smtplib.SMTP_SSL(self.host, self.port, timeout=self.timeout_seconds, context=context)
        else:
            server = smtplib.SMTP(self.host, self.port, timeout=self.timeout_seconds)
        with server:
            if self.security == "starttls":
                server.starttls(context=context)
            if self.user is not None and (password := self._password.get()) is not None:
                server.login(self.user, password)
            server.send_message(mail)


class Webhook:
    """Send notifications as JSON to a URL, by default in the form that Slack and those like it take."""

    def __init__(
        self,
        url: str | None = None,
        url_env: str | None = None,
        format: Callable[[Notification], Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_seconds: float = 10.0,
    ) -> None:
        """Take where to send what.

        Args:
            url: ``https://...``. As it often is a password in itself, only its host is ever printed.
            url_env: name of an environment variable that holds the URL, instead.
            format: returns what is sent, as JSON; None for ``{"text": subject and text}``.
            headers: more headers, such as ``{"Authorization": ...}``; never printed.
            timeout_seconds: for connecting, and for each part of the answer.

        Raises:
            ValueError: if there is no URL, or it is not one of http or https.
        """
        if url is None and url_env is None:
            raise ValueError("Webhook needs a url, or url_env with the name of an environment variable.")
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be above 0, got {timeout_seconds}.")
        self._url = _Secret("url", url, url_env)
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self.format = format if format is not None else as_slack_text
        self.timeout_seconds = timeout_seconds
        if url is not None:
            self._read_url()

    def __repr__(self) -> str:
        try:
            return f"Webhook({urllib.parse.urlsplit(self._read_url()).hostname})"
        except ValueError:
            return f"Webhook({self._url!r})"

    def send(self, notification: Notification) -> None:
        """Send a POST request. Raises OSError if it is not accepted, or answered with another address."""
        body = json.dumps(self.format(notification)).encode()
        request = urllib.request.Request(self._read_url(), body, self._headers, method="POST")
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(request, timeout=self.timeout_seconds) as answer:  # other codes than 2xx raise
            answer.read(1)

    def _read_url(self) -> str:
        url = self._url.get() or ""
        if urllib.parse.urlsplit(url).scheme not in ("http", "https") or not urllib.parse.urlsplit(url).hostname:
            raise ValueError("the url of a Webhook must begin with https:// or http:// and have a host.")
        return url


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes an error of an answer that names another address.

    urllib would go there without the message, and with the headers, which may hold a password, whatever host it is.
    """

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def as_slack_text(notification: Notification) -> dict[str, str]:
    """Return what Slack's incoming webhooks, and those compatible with them, take."""
    return {"text": f"*{notification.subject}*\n```{notification.text}```"}


class MetricThreshold:
    """Say when a metric is worth a message: when a value is above, or below, a number and the one before was not."""

    def __init__(self, metric: str, above: float | None = None, below: float | None = None) -> None:
        """Take the name of the metric in the run history, and one of the two limits.

        Raises:
            ValueError: if there is not exactly one limit.
        """
        if (above is None) == (below is None):
            raise ValueError(f"MetricThreshold({metric!r}) needs above=... or below=..., one of them.")
        self.metric, self.above, self.below = metric, above, below

    def __repr__(self) -> str:
        limit = f"above={self.above:g}" if self.above is not None else f"below={self.below:g}"
        return f"MetricThreshold({self.metric!r}, {limit})"

    def describe(self) -> str:
        """Return it in words."""
        return f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"

    def is_crossed_by(self, value: float) -> bool:
        """Return whether a value is beyond the limit."""
        return value > self.above if self.above is not None else value < self.below  # type: ignore[operator]


class NotificationCallback(TrainerCallback):
    """Send messages when a training run ends, fails, or a metric crosses a threshold; with the summary of the run.

    Messages are sent by a thread, so that training does not wait for a server. What could not be sent is said where
    the next epoch ends, and never ends or fails the run. At its end the run waits ``timeout_seconds`` for what is left
    to be sent. Thresholds are looked at where epochs and evaluations end, and see every value recorded since. Main
    process only. A process that is killed cannot say so.
    """

    order = 30  # after all that the summary tells of

    def __init__(
        self,
        channels: Channel | Iterable[Channel],
        on: Iterable[Moment] = ("end", "failure"),
        thresholds: MetricThreshold | Iterable[MetricThreshold] = (),
        run_name: str | None = None,
        timeout_seconds: float = 30.0,
    ) -> None:
        """Take where to send what.

        Args:
            channels: ``Smtp``, ``Webhook``, or any object with a method ``send(notification)``.
            on: ``"begin"``, ``"end"`` (also early), ``"failure"``, and ``"interruption"``: the run was asked to stop
                and has saved its state, or somebody pressed Ctrl-C.
            thresholds: of metrics. Each tells once when it is crossed, and again only after it was crossed back.
            run_name: how messages call the run; None for the run directory, or else the script, with the host.
            timeout_seconds: how long the end of the run waits for messages to be sent.

        Raises:
            TypeError: if a channel has no method ``send``, or a threshold is none.
            ValueError: if there is no such moment.
        """
        self.channels: list[Channel] = list(channels) if isinstance(channels, Iterable) else [channels]
        for channel in self.channels:
            if isinstance(channel, type) or not callable(getattr(channel, "send", None)):
                raise TypeError(f"a channel must have a method send(notification), as Smtp(...) has, got {channel!r}.")
        self.thresholds = [thresholds] if isinstance(thresholds, MetricThreshold) else list(thresholds)
        for threshold in self.thresholds:
            if not isinstance(threshold, MetricThreshold):
                raise TypeError(f"thresholds must be MetricThreshold(...), got {threshold!r}.")
        self.on = _check_moments(on, _MOMENTS)
        self.run_name = run_name
        self.timeout_seconds = timeout_seconds
        self._is_crossed = [False] * len(self.thresholds)
        self._num_seen: dict[str, int] = {}
        self._summary: RunSummary | None = None
        self._trainer: weakref.ref[Trainer] | None = None
        self._outbox: _Outbox | None = None
        self._end = _RunEnd()
        self._stop_message: str | None = None
        self._is_first_epoch = True

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin to watch."""
        self._summary, self._stop_message, self._is_first_epoch = RunSummary(trainer), None, True
        self._trainer = weakref.ref(trainer)
        for number, threshold in enumerate(self.thresholds):
            values = _numbers(_values(trainer, threshold.metric))  # of an earlier run
            self._is_crossed[number] = bool(values) and threshold.is_crossed_by(values[-1])
        self._note_seen(trainer)
        if trainer.accelerator.is_main_process and "begin" in self.on:
            self._notify(trainer, "begin", "training has begun", [])

    def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Say so if a metric that is watched has not appeared in the first epoch."""
        is_first, self._is_first_epoch = self._is_first_epoch, False
        if is_first or trainer.current_epoch != trainer.training_run.first_epoch + 2:
            return
        names = trainer.run_history.get_metric_names()
        for threshold in self.thresholds:
            if threshold.metric not in names:
                hint = did_you_mean(threshold.metric, names)
                trainer.print(f"{threshold!r} watches what the first epoch did not record.{hint}")

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the metrics, and say what could not be sent."""
        if not trainer.accelerator.is_main_process or not trainer.is_training_run:
            return
        self._look_at_thresholds(trainer)
        self._tell_failures(trainer)

    def on_eval_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Stop the clock of training."""
        if self._summary is not None:
            self._summary.begin_evaluation()

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the metrics, and say what could not be sent."""
        if self._summary is not None:
            self._summary.end_evaluation()
        self.on_train_epoch_end(trainer)

    def on_stop_training_error(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Note why the run ends early."""
        self._stop_message = str(exception) if exception is not None else None

    def on_exception(self, trainer: Trainer, exception: BaseException, **kwargs: Any) -> None:
        """Tell of a callback that failed when the run had ended; other failures are told at the end."""
        if self._end.is_late_failure(trainer) and trainer.accelerator.is_main_process:
            self._tell_end(trainer, exception)

    def on_train_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Tell how the run ended, and wait for what is left to be sent."""
        self._end.note(trainer, exception)
        if trainer.accelerator.is_main_process:
            if exception is None:
                self._look_at_thresholds(trainer)
            self._tell_end(trainer, exception)

    def state_dict(self) -> dict[str, Any]:
        """Return which thresholds are crossed, once that of all values so far is told."""
        trainer = None if self._trainer is None else self._trainer()
        if not self.thresholds or trainer is None:
            return {}
        self._look_at_thresholds(trainer)
        thresholds = [repr(threshold) for threshold in self.thresholds]
        return {"is_crossed": dict(zip(thresholds, self._is_crossed, strict=True)), "num_seen": dict(self._num_seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up which thresholds are crossed; they are not told again."""
        crossed = state_dict["is_crossed"]
        self._is_crossed = [crossed.get(repr(threshold), False) for threshold in self.thresholds]
        self._num_seen |= state_dict["num_seen"]

    def _tell_end(self, trainer: Trainer, exception: BaseException | None) -> None:
        moment = _MOMENT_OF[outcome_of(exception)]
        if moment in self.on:
            what = {"end": "training has finished", "interruption": "training was interrupted"}.get(moment, "")
            lines = [f"Stopped early: {self._stop_message}"] if self._stop_message and exception is None else []
            if moment == "failure":
                assert exception is not None, "there is one"
                what, lines = f"training has failed: {type(exception).__name__}", _describe_failure(exception)
            self._notify(trainer, moment, what, lines)
        if self._outbox is not None:
            outbox, self._outbox = self._outbox, None
            outbox.close(self.timeout_seconds)
            self._tell_failures(trainer, outbox)

    def _look_at_thresholds(self, trainer: Trainer) -> None:
        for number, threshold in enumerate(self.thresholds):
            for value in _numbers(_values(trainer, threshold.metric)[self._num_seen.get(threshold.metric, 0) :]):
                was_crossed, self._is_crossed[number] = self._is_crossed[number], threshold.is_crossed_by(value)
                if self._is_crossed[number] and not was_crossed:
                    what = f"{threshold.metric} is {threshold.describe()}: {value:.6g}"
                    self._notify(trainer, "threshold", what, [])
        self._note_seen(trainer)  # once all have looked: two thresholds may watch one metric

    def _note_seen(self, trainer: Trainer) -> None:
        self._num_seen = {threshold.metric: len(_values(trainer, threshold.metric)) for threshold in self.thresholds}

    def _notify(self, trainer: Trainer, event: str, what: str, lines: list[str]) -> None:
        """Hand a message to the thread that sends it. Whatever goes wrong is said, and is not raised."""
        try:
            directory = trainer.run_dir
            name = self.run_name or f"{directory or Path(sys.argv[0]).name or 'run'} on {socket.gethostname()}"
            if self._summary is not None and event != "begin":
                lines = [*lines, self._summary.describe(trainer)]
            history = trainer.run_history
            latest = {metric: history.get_latest_metric(metric) for metric in history.get_metric_names()}
            metrics = {metric: value for metric, value in latest.items() if isinstance(value, int | float)}
            notification = Notification(
                event,
                f"{name}: {what}",
                "\n".join(lines) or what,
                None if directory is None else str(directory),
                trainer.num_updates,
                trainer.current_epoch,
                metrics,
            )
            if self._outbox is None:
                self._outbox = _Outbox(self.channels)
            self._outbox.put(notification)
        except Exception as error:  # a message is not worth a run
            trainer.print(f"NotificationCallback could not make a message: {type(error).__name__}: {error}")

    def _tell_failures(self, trainer: Trainer, outbox: _Outbox | None = None) -> None:
        outbox = outbox or self._outbox
        while outbox is not None and outbox.failures:
            trainer.print(f"NotificationCallback: {outbox.failures.pop(0)}")


class _Outbox:
    """Send notifications in a thread for each channel, so that none waits for another, nor the training for any."""

    def __init__(self, channels: Iterable[Channel]) -> None:
        self.failures: list[str] = []
        self._queues: list[queue.SimpleQueue[Notification | None]] = []
        self._threads: list[threading.Thread] = []
        self._channels = list(channels)
        for channel in self._channels:
            messages: queue.SimpleQueue[Notification | None] = queue.SimpleQueue()
            # A daemon: a server that never answers must not keep the process alive.
            thread = threading.Thread(target=self._send, args=(channel, messages), name="notifications", daemon=True)
            thread.start()
            self._queues.append(messages)
            self._threads.append(thread)

    def put(self, notification: Notification) -> None:
        for messages in self._queues:
            messages.put(notification)

    def close(self, timeout_seconds: float) -> None:
        """Wait for what is left to be sent."""
        for messages in self._queues:
            messages.put(None)
        deadline = time.monotonic() + timeout_seconds
        for channel, thread in zip(self._channels, self._threads, strict=True):
            thread.join(max(deadline - time.monotonic(), 0.0))
            if thread.is_alive():
                self.failures.append(f"{channel!r} has not sent everything within {timeout_seconds:g} s; going on.")

    def _send(self, channel: Channel, messages: queue.SimpleQueue[Notification | None]) -> None:
        while (notification := messages.get()) is not None:
            try:
                channel.send(notification)
            except Exception as error:  # said on the training's thread, where it does not meet a progress bar
                text = _without_secrets(str(error), channel)[:300]
                name = type(error).__name__
                self.failures.append(f"{channel!r} could not send {notification.subject!r}: {name}: {text}")


class CommandAtEndCallback(TrainerCallback):
    """Run a command when a training run has ended, such as one that shuts the machine down.

    It runs on the main process, after all other callbacks: everything is saved by then. With several processes, and
    where nothing failed, it waits for all of them to have come so far. The lines of a script after ``train()`` come
    later: leave them time, as with ``["sudo", "shutdown", "-h", "+5"]``. What it prints and its exit code are printed;
    whatever it does never fails the run.

    The environment of the command has ``PT_ACC_OUTCOME`` (``finished``, ``failed`` or ``interrupted``),
    ``PT_ACC_RUN_DIR`` (empty where there is none) and ``PT_ACC_NUM_UPDATES``. A run in which another callback fails at
    the end, as in a last save, has failed. Nothing runs if ``train`` fails before the run begins, or the process is
    killed.
    """

    order = 40

    def __init__(
        self,
        command: Sequence[str],
        on: Iterable[Moment] = ("end", "failure"),
        timeout_seconds: float = 60.0,
    ) -> None:
        """Take the command.

        Args:
            command: the program and its arguments; there is no shell.
            on: ``"end"`` (also early), ``"failure"``, and ``"interruption"``: the run was asked to stop and will be
                resumed, or somebody pressed Ctrl-C.
            timeout_seconds: after which the command is killed.

        Raises:
            TypeError: if the command is no list of strings.
            ValueError: if it is empty, or there is no such moment.
        """
        if isinstance(command, str | Path) or not all(isinstance(part, str | Path) for part in command):
            raise TypeError(f"command must be a list, such as ['sudo', 'shutdown', '-h', '+5'], got {command!r}.")
        if not command:
            raise ValueError("command is empty.")
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be above 0, got {timeout_seconds}.")
        self.command = [str(part) for part in command]
        self.on = _check_moments(on, _MOMENTS[1:])
        self.timeout_seconds = timeout_seconds
        self._end = _RunEnd()

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that there is such a program. Raises ValueError if not, on the main process."""
        if trainer.accelerator.is_main_process and shutil.which(self.command[0]) is None:
            raise ValueError(f"CommandAtEndCallback: there is no program {self.command[0]!r} to run at the end.")

    def on_exception(self, trainer: Trainer, exception: BaseException, **kwargs: Any) -> None:
        """Run the command if a callback failed when the run had ended, and that was not known yet."""
        if self._end.is_late_failure(trainer) and "end" not in self.on:
            self._run(trainer, exception)

    def on_train_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Run the command, if it is to run after such an end."""
        self._end.note(trainer, exception)
        if exception is None:
            trainer.accelerator.wait_for_everyone()  # the others may be writing yet
        self._run(trainer, exception)

    def _run(self, trainer: Trainer, exception: BaseException | None) -> None:
        outcome = outcome_of(exception)
        if _MOMENT_OF[outcome] not in self.on or not trainer.accelerator.is_main_process:
            return
        facts = {
            "PT_ACC_OUTCOME": outcome,
            "PT_ACC_RUN_DIR": str(trainer.run_dir or ""),
            "PT_ACC_NUM_UPDATES": str(trainer.num_updates),
        }
        sys.stdout.flush()
        what = f"Command at the end, {' '.join(self.command)!r},"
        try:
            done = subprocess.run(
                self.command,
                env=os.environ | facts,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=self.timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            trainer.print(f"{what} was killed after {self.timeout_seconds:g} s.")
        except OSError as error:
            trainer.print(f"{what} could not be run: {type(error).__name__}: {error}")
        else:
            output = done.stdout.decode(errors="replace").strip()
            output = f"...{output[-_MAX_MESSAGE:]}" if len(output) > _MAX_MESSAGE else output
            trainer.print(f"{what} ended with exit code {done.returncode}{': ' if output else '.'}{output}")


class _RunEnd:
    """Know whether a run has been heard to end well."""

    def __init__(self) -> None:
        self._run: weakref.ref[Any] | None = None

    def note(self, trainer: Trainer, exception: BaseException | None) -> None:
        self._run = weakref.ref(trainer.training_run) if exception is None else None

    def is_late_failure(self, trainer: Trainer) -> bool:
        """Return whether an exception comes after the end of its run, from a callback that failed there."""
        return trainer.is_training_run and self._run is not None and self._run() is trainer.training_run


def _check_moments(on: Iterable[Moment], known: Sequence[str]) -> frozenset[str]:
    moments = frozenset([on] if isinstance(on, str) else on)
    if unknown := sorted(moments - set(known)):
        raise ValueError(f"on={unknown[0]!r} is no moment; there are {', '.join(known)}.")
    return moments


def _describe_failure(exception: BaseException) -> list[str]:
    """Return type and message of an exception, where it was raised, and the notes of what the run was doing."""
    lines = [f"{type(exception).__name__}: {str(exception)[:_MAX_MESSAGE]}"]
    if frames := traceback.extract_tb(exception.__traceback__):
        lines.append(f"raised at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}")
    return lines + [str(note)[:_MAX_MESSAGE] for note in getattr(exception, "__notes__", ())]


def _values(trainer: Trainer, metric: str) -> list[Any]:
    history = trainer.run_history
    return history.get_metric_values(metric) if metric in history.get_metric_names() else []


def _numbers(values: Iterable[Any]) -> list[float]:
    return [value for value in values if is_number(value) and not math.isnan(value)]


def _without_secrets(text: str, channel: Channel) -> str:
    for value in vars(channel).values() if hasattr(channel, "__dict__") else ():
        try:
            secret = value.get() if isinstance(value, _Secret) else None
        except ValueError:  # the environment variable is not set, which is what the text says
            continue
        if secret:
            text = text.replace(secret, "***")
    return text

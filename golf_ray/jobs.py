"""Commands that run on a cluster by themselves, as Ray jobs: submitted, followed, stopped.

A job is a `golf-ray` command that the cluster's head runs; it goes on when whoever submitted it
has gone. Everything goes over HTTP to the head's dashboard, so that no Ray process runs here. Which
commands may be submitted is the command line's business.

Invariant: whatever cannot be reached or is not there is one line within bounded time.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from golf_ray.errors import ClusterError, GolfRayError

DEFAULT_URL = "http://127.0.0.1:8265"
PROBE_TIMEOUT_S = 10.0
STOP_WITHIN_S = 20.0
"""Ray asks a job to end, waits 3 s, and then kills it."""
POLL_S = 0.5
SEND_TRIES = 3
"""For each of which Ray itself waits 10 s."""
NO_AGENT = "No available agent"
LOST_TRIES = 5
"""Connections that may break, one after the other without a line, while a job is followed."""
PACKAGES = ("golf_ray", "trainers", "evaluators", "search_spaces")
NOT_FOUND = 127
"""A shell's exit status for a program that it does not know."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_LOUD = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that tell each step on standard error."""
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """One job as the cluster has it."""

    job: str
    """Its id, by which it is asked for."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    command: str
    message: str
    """Ray's word on it; for a failure the end of its output."""
    exit_status: int | None
    began_unix_s: float | None
    ended_unix_s: float | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ENDED

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Jobs:
    """The jobs of one cluster.

    Args:
        address: URL of the dashboard, or its host:port; None for RAY_API_SERVER_ADDRESS, and
            for this machine's where that is not set.

    Raises:
        ClusterError: nothing answers there, or no Ray dashboard, or it wants another token.
    """

    def __init__(self, address: str | None = None) -> None:
        self.url = dashboard_url(address)
        _require_dashboard(self.url)
        from ray.job_submission import JobSubmissionClient

        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.WARNING)
        with _without(_OVERRIDING), self._explained("the cluster"):
            self._client = JobSubmissionClient(self.url)

    def submit(
        self,
        argv: Sequence[str],
        *,
        name: str | None = None,
        folder: str | None = None,
        ship: bool = False,
    ) -> str:
        """Have the cluster run `golf-ray ARGV`.

        Args:
            name: the job's id; None makes one of the verb and the time.
            folder: of the head, that it runs in; None for one of Ray's.
            ship: run this installation's source there, and not what the cluster has installed.

        Returns:
            The job's id.

        Raises:
            ClusterError: there is a job of that name, or the cluster refuses.
        """
        job = name or f"golf-{argv[0]}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        if name is not None and any(state.job == name for state in self.all()):
            raise ClusterError(f"there is a job {name} at {self.url}", "choose another --name")
        with self._explained(job), source_folder(ship) as source:
            self._send(
                entrypoint=entrypoint(argv, folder=folder, ship=ship),
                submission_id=job,
                runtime_env=None if source is None else {"working_dir": source},
                metadata={"golf_ray": shlex.join(argv)},
            )
        return job

    def _send(self, **request: Any) -> None:
        """A head that has just started answers some seconds before it takes jobs."""
        for left in reversed(range(SEND_TRIES)):
            try:
                self._client.submit_job(**request)
            except RuntimeError as error:
                if NO_AGENT not in str(error):
                    raise
                if not left:
                    raise ClusterError(
                        f"the cluster at {self.url} takes no jobs: its head has no dashboard agent",
                        "try again in a minute; else see dashboard_agent.log on the head: its port "
                        "(52365 by default) may be in use, see 'ray start --help'",
                    ) from None
            else:
                return

    def state(self, job: str) -> JobState:
        """How a job is.

        Raises:
            ClusterError: there is none of that id.
        """
        with self._explained(job):
            return _state(self._client.get_job_info(job))

    def all(self) -> list[JobState]:
        """All jobs that were submitted, the newest first."""
        with self._explained("the list of jobs"):
            found = [_state(job) for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda state: -(state.began_unix_s or 0.0))

    def stop(self, job: str) -> JobState:
        """End a job and wait until it has ended; one that has ended stays as it is.

        Raises:
            ClusterError: there is none of that id, or it does not end.
        """
        with self._explained(job):
            self._client.stop_job(job)
        deadline_s = time.monotonic() + STOP_WITHIN_S
        while not (state := self.state(job)).has_ended:
            if time.monotonic() > deadline_s:
                raise ClusterError(
                    f"job {job} has not ended {STOP_WITHIN_S:g} s after it was told to",
                    "see 'ray status' on the cluster's head",
                )
            time.sleep(POLL_S)
        return state

    def logs(self, job: str) -> str:
        """What a job has printed so far.

        Raises:
            ClusterError: there is none of that id.
        """
        self.state(job)
        with self._explained(job):
            return str(self._client.get_job_logs(job))

    def follow(self, job: str, write: Callable[[str], None]) -> JobState:
        """Hand on what a job prints, from its beginning, until it has ended.

        A connection that breaks is made anew, and nothing is handed on twice.

        Raises:
            ClusterError: there is none of that id, or the cluster is not reached again.
        """
        self.state(job)
        written, lost = 0, 0
        while True:
            before = written
            written = asyncio.run(self._tail(job, written, write))
            state = self.state(job)
            if state.has_ended:
                rest = self.logs(job)[written:]
                if rest:
                    write(rest)
                return state
            lost = 0 if written > before else lost + 1
            if lost == LOST_TRIES:
                raise ClusterError(
                    f"the output of job {job} cannot be followed at {self.url}",
                    f"the job is {state.status.lower()}; see 'golf-ray submit --logs {job}'",
                )
            time.sleep(POLL_S)

    async def _tail(self, job: str, skip: int, write: Callable[[str], None]) -> int:
        """Characters seen in all, after those that were seen before; ends where it breaks."""
        from aiohttp import ClientError

        seen = 0
        try:
            async for text in self._client.tail_job_logs(job):
                fresh = text[max(0, skip - seen) :]
                seen += len(text)
                if fresh:
                    write(fresh)
        except (RuntimeError, OSError, ClientError):
            # What was seen counts.
            pass
        return max(seen, skip)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Ray's errors as one line."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise _unauthorized(self.url) from None
        except (RuntimeError, OSError, ValueError) as error:
            if isinstance(error, GolfRayError):
                raise
            text = " ".join(str(error).split())
            if "status code 404" in text or "does not exist" in text:
                raise ClusterError(
                    f"there is no job {what} at {self.url}",
                    "list them with 'golf-ray submit --list'",
                ) from None
            if "already exists" in text:
                raise ClusterError(
                    f"there is a job {what} at {self.url}", "choose another --name"
                ) from None
            raise ClusterError(
                f"{self.url} failed when asked about {what} ({text[-200:]})",
                "see that the cluster is healthy with 'ray status' on its head",
            ) from None


def require_success(state: JobState) -> None:
    """See that a job that has ended did so well.

    Raises:
        GolfRayError: it failed or was stopped.
    """
    if state.status == "SUCCEEDED":
        return
    if state.exit_status == NOT_FOUND:
        raise GolfRayError(
            f"job {state.job} failed: the cluster's head does not know the command",
            "install golf-ray there, or submit with --ship",
        )
    ended = f" with exit status {state.exit_status}" if state.exit_status else ""
    raise GolfRayError(
        f"job {state.job} {state.status.lower()}{ended}",
        f"see 'golf-ray submit --logs {state.job}'",
    )


def entrypoint(argv: Sequence[str], *, folder: str | None = None, ship: bool = False) -> str:
    """The shell's line for a golf-ray command.

    A shipped package brings no program of its own; -P has Python not look for it in the folder
    that it runs in, which may be another checkout.
    """
    program = ["python", "-P", "-m", "golf_ray"] if ship else ["golf-ray"]
    line = shlex.join([*program, *argv])
    return line if folder is None else f"cd {shlex.quote(folder)} && exec {line}"


@contextlib.contextmanager
def source_folder(ship: bool) -> Iterator[str | None]:
    """A folder with this installation's packages and nothing else; None where none is to be sent.

    Ray takes it as the job's working folder. As modules they would lose, on workers, to a checkout
    in the folder that the head runs jobs in.
    """
    if not ship:
        yield None
        return
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="golf-ray-source-") as folder:
        for package in PACKAGES:
            leave = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(root / package, Path(folder) / package, ignore=leave)
        yield folder


# Reaching a dashboard ---------------------------------------------------------------------------


def dashboard_url(address: str | None) -> str:
    """The URL that an address means.

    Raises:
        ClusterError: it is none of a dashboard.
    """
    if address is None or address == "auto":
        address = os.environ.get(_OVERRIDING[0]) or DEFAULT_URL
    url = address if "://" in address else f"http://{address}"
    parts = urllib.parse.urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("http", "https") or not parts.hostname or (
        port is None and "://" not in address
    ):  # fmt: skip
        raise ClusterError(
            f"--address {address} is no dashboard's",
            "give its URL, such as http://head:8265",
        )
    return url.rstrip("/")


def _require_dashboard(url: str) -> None:
    """See that a Ray dashboard answers: Ray's own client waits without end."""
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=PROBE_TIMEOUT_S) as answer:
            found = json.loads(answer.read(1 << 16))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            # It is there, and Ray's client sends a token where there is one.
            return
        raise _no_dashboard(url) from None
    except http.client.HTTPException:
        raise _no_dashboard(url) from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        text = str(getattr(reason, "strerror", None) or reason).lower()
        raise ClusterError(
            f"no cluster's dashboard can be reached at {url} ({text})",
            "check the URL and the firewall; the head must have been started with a dashboard "
            "(ray[default], --dashboard-host 0.0.0.0), or forward its port: ssh -L 8265:...",
        ) from None
    except (OSError, ValueError):
        raise _no_dashboard(url) from None
    if not isinstance(found, dict) or "ray_version" not in found:
        raise _no_dashboard(url)


def _no_dashboard(url: str) -> ClusterError:
    return ClusterError(
        f"what answers at {url} is no Ray dashboard",
        "give the dashboard's URL; its port is 8265 by default, that of the cluster itself 6379",
    )


def _unauthorized(url: str) -> ClusterError:
    return ClusterError(
        f"the cluster at {url} asks for its token",
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN; 'ray get-auth-token' on the head prints it",
    )


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Ray's client lets these variables win over what it is given."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _state(details: Any) -> JobState:
    return JobState(
        job=details.submission_id or details.job_id or "",
        status=str(getattr(details.status, "value", details.status)),
        command=details.entrypoint,
        message=details.message or "",
        exit_status=details.driver_exit_code,
        began_unix_s=None if details.start_time is None else details.start_time / 1000,
        ended_unix_s=None if not details.end_time else details.end_time / 1000,
    )

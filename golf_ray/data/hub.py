"""One data-set repository of a Hugging Face hub: what files it has, and how to get one.

The only module that uses huggingface_hub. It asks the one address it was given; telemetry is off,
and where an address is given, the user's token stays here. A transfer that breaks is taken up
where it broke, by the hub client; a process that ended begins its last file anew. Which files make
a data set is the business of `golf_ray.data.fetch`.

Invariant: a file that `download` returns has the size and the hash that the repository states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from golf_ray.data.manifest import file_sha256
from golf_ray.errors import DataError, GolfRayError
from golf_ray.records import storage_error

_TIMEOUT_S: Final = 30.0
_READ_BYTES: Final = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """One file of a repository."""

    path: str
    """Path inside the repository."""
    num_bytes: int
    sha256: str | None
    """Of a large file."""
    blob_sha1: str
    """Git's name of a small file's content."""

    def same_as(self, path: Path) -> bool:
        """Whether a local file has this very content."""
        try:
            if path.stat().st_size != self.num_bytes:
                return False
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror})", "check the file") from None
        if self.sha256 is not None:
            return file_sha256(path) == self.sha256
        # Git's identifier of a file, not a safeguard: hence SHA-1.
        digest = hashlib.sha1(b"blob %d\0" % self.num_bytes, usedforsecurity=False)
        with open(path, "rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
        return digest.hexdigest() == self.blob_sha1


class HubRepo:
    """A data-set repository at one revision.

    Args:
        repo: `owner/name`.
        endpoint: address of the hub; None for the client's own, which HF_ENDPOINT sets.
        revision: branch, tag or commit.

    Raises:
        DataError: huggingface_hub is not installed.
    """

    def __init__(self, repo: str, *, endpoint: str | None = None, revision: str = "main") -> None:
        try:
            import huggingface_hub
        except ImportError:
            raise DataError(
                "fetching needs huggingface_hub", "pip install huggingface_hub"
            ) from None
        self._hub: Any = huggingface_hub
        self.repo = repo
        self.revision = revision
        self.endpoint = (endpoint or str(huggingface_hub.constants.ENDPOINT)).rstrip("/")
        # A token belongs to the hub that it was made for, not to any address on a command line.
        self._token = None if endpoint is None else False

    def files(self) -> list[RemoteFile]:
        """Every file of the repository; `revision` becomes the commit that they are of.

        Raises:
            DataError: the hub cannot be reached, or has no such repository or revision.
        """
        api = self._hub.HfApi(endpoint=self.endpoint, token=self._token)
        with self._asking("the list of files"):
            try:
                info = api.dataset_info(self.repo, revision=self.revision, timeout=_TIMEOUT_S)
                self.revision = str(info.sha)
                tree = api.list_repo_tree(
                    self.repo, recursive=True, revision=self.revision, repo_type="dataset"
                )
                return [
                    RemoteFile(
                        path=entry.path,
                        num_bytes=entry.size if entry.lfs is None else entry.lfs.size,
                        sha256=None if entry.lfs is None else entry.lfs.sha256,
                        blob_sha1=entry.blob_id,
                    )
                    for entry in tree
                    if isinstance(entry, self._hub.hf_api.RepoFile)
                ]
            except (KeyError, TypeError, UnicodeDecodeError):
                raise self._no_hub() from None
            except ValueError as error:
                # Among them what the client makes of a name that cannot be one.
                if isinstance(error, self._hub.errors.HFValidationError):
                    raise DataError(f"'{self.repo}' is no repository name", "give owner/name"
                                    ) from None  # fmt: skip
                if isinstance(error, OSError):
                    raise
                raise self._no_hub() from None

    def download(self, file: RemoteFile, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        """Fetch one file below a folder.

        Args:
            on_bytes: called with the number of further bytes.

        Raises:
            DataError: the hub cannot be reached, or gave something else than it stated.
            StorageError: the folder cannot be written or has no space left.
        """
        with self._asking(file.path):
            path = Path(
                self._hub.hf_hub_download(
                    self.repo,
                    file.path,
                    repo_type="dataset",
                    revision=self.revision,
                    local_dir=folder,
                    endpoint=self.endpoint,
                    token=self._token,
                    tqdm_class=_bar_class(on_bytes),
                )
            )
        if not file.same_as(path):
            path.unlink(missing_ok=True)
            raise DataError(
                f"{file.path} of {self.repo} arrived with another content than the hub states",
                "fetch again; if it happens again, the hub's file is damaged",
            )
        return path

    def _no_hub(self) -> DataError:
        return DataError(
            f"{self.endpoint} does not answer like a Hugging Face hub", "check the address"
        )

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Quiet while the hub is asked, and its errors as one line each."""
        constants, logging = self._hub.constants, self._hub.logging
        telemetry, verbosity = constants.HF_HUB_DISABLE_TELEMETRY, logging.get_verbosity()
        # With telemetry the client asks its default hub for a list, whatever the address given.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        logging.set_verbosity_error()
        try:
            yield
        except GolfRayError:
            raise
        except (OSError, self._hub.errors.HTTPError) as error:
            raise self._explained(error, what) from None
        finally:
            constants.HF_HUB_DISABLE_TELEMETRY = telemetry
            logging.set_verbosity(verbosity)

    def _explained(self, error: Exception, what: str) -> GolfRayError:
        errors, place = self._hub.errors, f"{self.repo} at {self.endpoint}"
        if isinstance(error, errors.GatedRepoError):
            return DataError(f"{place} asks for permission", "get it there, then 'hf auth login'")
        if isinstance(error, errors.RepositoryNotFoundError):
            return DataError(f"there is no data-set repository {place}", "check --repo")
        if isinstance(error, errors.RevisionNotFoundError):
            return DataError(f"{place} has no revision '{self.revision}'", "check the revision")
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return DataError(f"{place} has no file {what}", "check the repository")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return DataError("the hub client is in offline mode", "unset HF_HUB_OFFLINE")
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            return DataError(f"{self.endpoint} answered {status} when asked for {what} of "
                             f"{self.repo}", "try again later")  # fmt: skip
        if isinstance(error, (errors.HTTPError, errors.LocalEntryNotFoundError)):
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split()) or type(cause).__name__
            return DataError(f"{self.endpoint} cannot be reached for {what} ({reason})",
                             "check the network and the address, then fetch again")  # fmt: skip
        assert isinstance(error, OSError)
        if error.errno is None:
            return DataError(f"{what} of {self.repo} did not arrive whole", "fetch again")
        return storage_error(Path(error.filename or what), error)


def _bar_class(on_bytes: Callable[[int], None]) -> type[Any]:
    """The hub client reports through a class of progress bars: one that shows nothing."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg,misc,unused-ignore]
        def __init__(self, *args: Any, **keywords: Any) -> None:
            keywords["disable"] = True
            super().__init__(*args, **keywords)

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire, which `update` counts again when they are written."""

        def set_transfer_postfix_str(self, *args: Any, **keywords: Any) -> None:
            """Nothing is shown."""

    return Bar

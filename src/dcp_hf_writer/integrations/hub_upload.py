"""Upload files to the HuggingFace hub in one commit; needs the extra `hub`."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CheckpointError, ConfigError, WriteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CARD_NAME = "README.md"
"""The model card of a repository."""

_FORBIDDEN = frozenset({401, 403, 404})


@dataclass(frozen=True, slots=True)
class HubTarget:
    """Where an upload goes."""

    repo: str
    """Repository: `name` or `owner/name`."""
    revision: str = "main"
    """Branch; made if it is not there."""
    is_private: bool = False
    """Whether a repository that has to be made is private."""
    endpoint: str | None = None
    """URL of the hub; `None` takes `HF_ENDPOINT`, or huggingface.co."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A finished upload."""

    repo: str
    """Repository with its owner."""
    url: str
    """URL of the commit."""
    commit: str
    """Id of the commit."""


class Hub:
    """The hub, through huggingface_hub. It finds the user's token itself."""

    def __init__(self, target: HubTarget, *, shows_progress: bool) -> None:
        """Connect to nothing yet.

        Raises:
            ConfigError: If huggingface_hub is missing, or refuses the name of the repository.
        """
        try:
            # The module gets its attribute `utils` only by an import of it.
            import huggingface_hub.utils  # noqa: PLC0415 - optional
        except ModuleNotFoundError as error:
            raise ConfigError(
                "push needs huggingface_hub",
                found=f"{error.name} is not installed",
                hint="pip install 'dcp-hf-writer[hub]'",
            ) from error
        utils: Any = huggingface_hub.utils
        try:
            utils.validate_repo_id(target.repo)
        except ValueError as error:
            raise ConfigError(
                "REPO is no name of a repository",
                expected="name, or owner/name",
                found=repr(target.repo),
            ) from error
        if not shows_progress:
            utils.disable_progress_bars()
        self._target = target
        self._add: Any = huggingface_hub.CommitOperationAdd
        self._api: Any = huggingface_hub.HfApi(endpoint=target.endpoint)

    def prepare(self) -> str:
        """Make the repository and the branch if they are missing; return the name with its owner.

        Raises:
            WriteError: If the hub refuses, or does not answer.
        """
        target = self._target
        with self._errors():
            made = self._api.create_repo(target.repo, private=target.is_private, exist_ok=True)
            repo = str(made.repo_id)
            if target.revision != "main":
                self._api.create_branch(repo, branch=target.revision, exist_ok=True)
        return repo

    def has(self, repo: str, name: str) -> bool:
        """Whether the branch has a file.

        Raises:
            WriteError: If the hub refuses, or does not answer.
        """
        with self._errors():
            return bool(self._api.file_exists(repo, name, revision=self._target.revision))

    def upload(self, repo: str, files: Mapping[str, str | bytes], *, message: str) -> Uploaded:
        """Upload files in one commit: a reader sees all of them or none.

        Args:
            repo: What `prepare` returned.
            files: Content, or path of a local file, by name in the repository.
            message: Title of the commit.

        Raises:
            WriteError: If the hub refuses, or does not answer.
        """
        adds = [self._add(path_in_repo=name, path_or_fileobj=one) for name, one in files.items()]
        with self._errors():
            done = self._api.create_commit(
                repo, adds, commit_message=message, revision=self._target.revision
            )
        return Uploaded(repo, str(done.commit_url), str(done.oid))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            response = _response_of(error)
            status = getattr(response, "status_code", None)
            hint = "check the address and the network, then push again; nothing was published"
            if status in _FORBIDDEN:
                hint = "log in with `hf auth login` or set HF_TOKEN; the token must have the right "
                hint += "to write to this repository"
            raise WriteError(
                "the hub did not take the upload",
                path=f"{self._api.endpoint}/{self._target.repo}",
                found=_text_of(error, status),
                hint=hint,
            ) from error


def _response_of(error: BaseException) -> Any:
    """Return the hub's response in an error or in what caused it; `None` without one."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if response is not None:
            return response
        cause = cause.__cause__
    return None


def _text_of(error: BaseException, status: int | None) -> str:
    says = getattr(error, "server_message", None)
    if status is not None:
        return f"HTTP {status}" + (f": {says}" if says else "")
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"

"""The conversation with the Hub: login, repository, one commit, and what to do when it says no."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefalign.hub.staging import PublishError


def check_login() -> None:
    """Fail early, before weights are loaded: offline mode, no token, a wrong token, no connection.

    Raises:
        PublishError: one of these, with what to do.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        raise PublishError("HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or add --dry-run.")
    if get_token() is None:
        raise PublishError(
            "no Hugging Face token: set HF_TOKEN or run `hf auth login` (a token with write access), or add --dry-run."
        )
    try:
        HfApi().whoami()
    except Exception as error:
        raise _explain(error, "the login") from error


def upload(staged: Path, repo_id: str, *, repo_type: str, private: bool, replace: Sequence[str]) -> str:
    """Create the repository if need be and push the folder as one commit; older weights or shards are removed."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        public = not api.repo_info(repo_id, repo_type=repo_type).private
    except Exception as error:
        raise _explain(error, repo_id) from error
    if private and public:
        raise PublishError(f"--private was asked, but {repo_id} exists and is public. Make it private on the Hub, or give "
                           "another name.")  # fmt: skip
    try:
        commit = api.upload_folder(repo_id=repo_id, folder_path=staged, repo_type=repo_type, delete_patterns=list(replace),
                                   commit_message="prefalign publish")  # fmt: skip
    except Exception as error:
        raise _explain(error, repo_id) from error
    return str(commit.commit_url)


def _explain(error: Exception, what: str) -> PublishError:
    """Turn an error of the Hub's client into a message that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    end = "Nothing was published."
    if status == 401:
        return PublishError(f"the Hub does not accept the token (401, {what}). It is wrong, expired or revoked: make one "
                            f"with write access and set HF_TOKEN, or run `hf auth login`. {end}")  # fmt: skip
    if status == 403:
        return PublishError(f"the token may not write to {what} (403). Use a token with write access and a namespace that "
                            f"is yours. {end}")  # fmt: skip
    if status in (409, 412):
        return PublishError(f"{what} changed while this was being pushed ({status}). Look at the repository and run the "
                            f"command again. {end}")  # fmt: skip
    if isinstance(error, HfHubHTTPError) and status is not None:
        said = f" ({error.server_message})" if error.server_message else ""
        return PublishError(f"the Hub answered {status} for {what}{said}. If it is 429 or 5xx, wait and run the command "
                            f"again. {end}")  # fmt: skip
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2") or isinstance(error, OSError):
        return PublishError(f"cannot reach the Hub at {constants.ENDPOINT} ({type(error).__name__}). Check the network and "
                            f"HF_ENDPOINT and run the command again, or add --dry-run. {end}")  # fmt: skip
    return PublishError(f"{type(error).__name__} while publishing {what}: {error} {end}")

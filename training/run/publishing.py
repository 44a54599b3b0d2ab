"""The Hub repository of a run's result: it is made before training, so that hours of work do not end at a wrong name
or a missing permission, and the result is uploaded to it afterwards."""

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from run.arguments import RunArguments


HUB_ERRORS = HfHubHTTPError.__bases__  # of an answer, of the connection, and of the operating system


def make_repository(run: RunArguments) -> str:
    """
    Make the repository of the result, unless there is one, and check that the token may write to it.

    Returns:
        The repository's full name, `user/name`.

    Raises:
        ValueError: If there is no token, or the Hub refuses; the message says why.
    """
    if run.hub_token is None and get_token() is None:
        raise ValueError("--push_to_hub needs a token that may write: run `hf auth login`, or pass --hub_token")
    api = HfApi(token=run.hub_token)
    try:
        repo_id = api.create_repo(run.repo_name, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
    except HUB_ERRORS as error:
        raise ValueError(f"--push_to_hub cannot write to the repository '{run.repo_name}': {error}") from error
    return repo_id


def publish(names: list[str], repo_id: str, run: RunArguments) -> None:
    """
    Upload what was written and the validation videos, but nothing else of the run's folder.

    Raises:
        OSError: If the upload fails; the message says that the result is on the disk.
    """
    patterns = [pattern for name in names for pattern in (name, f"{name}/*")] + ["validation/*"]
    try:
        HfApi(token=run.hub_token).upload_folder(
            repo_id=repo_id, folder_path=run.output, allow_patterns=patterns, commit_message="Result of training"
        )
    except HUB_ERRORS as error:
        raise OSError(f"The result is in '{run.output}', but could not be uploaded to '{repo_id}': {error}") from error

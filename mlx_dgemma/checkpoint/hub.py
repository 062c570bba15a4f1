"""From what a user types to a folder of files: built-in name, path or hub id."""

import re
import sys
from functools import partial
from pathlib import Path

from ..errors import HubError
from ..files.opening import user_path

ASSETS = Path(__file__).parent.parent / "assets"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COPIES = ["*/*"]  # in other formats
WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "LICENSE", "NOTICE"]


def built_in() -> list[str]:
    """Return the names of the checkpoints that come with the package."""
    return sorted(config.parent.name for config in ASSETS.glob("*/config.json"))


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a model; download it if it is a hub id.

    Raises HubError when there is no such model, or when a revision is asked of what
    has none.
    """
    if not isinstance(path_or_id, str | Path) or not str(path_or_id).strip():
        raise HubError(
            f"the model is {path_or_id!r}; give a folder, a hub id or a built-in name "
            f"({', '.join(built_in())})"
        )
    name, path = str(path_or_id), user_path(path_or_id)
    try:
        if path.is_file():
            raise HubError(f"{path}: is a file; give the model's folder")
        local = path if path.is_dir() else None
    except OSError as error:
        raise HubError(f"{name}: {error.strerror}") from None
    if local is None and name in built_in():
        local = ASSETS / name
    if local is not None:
        if revision is not None:
            raise HubError(f"{name}: is no hub id, so it has no revision {revision!r}")
        return local
    if not HUB_ID.fullmatch(name):
        raise HubError(
            f"{name}: no such folder, and neither a hub id (owner/name) nor built in "
            f"({', '.join(built_in())})"
        )
    owner = name.partition("/")[0]
    if Path(owner).is_dir():
        raise HubError(f"{name}: no such folder in {owner}, which is here")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    # imported here: 0.3 s that a local model need not pay
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import httpx

    try:
        _announce(name, revision)
        folder = snapshot_download(
            name, revision=revision, allow_patterns=WANTED, ignore_patterns=COPIES
        )
        return Path(folder)
    except LocalEntryNotFoundError:
        why = "the hub cannot be reached"
        if is_offline_mode():
            why = "--offline or HF_HUB_OFFLINE is on"
        raise HubError(f"{name}: not downloaded before, and {why}") from None
    except HFValidationError as error:
        raise HubError(f"{name}: neither a folder nor a hub id ({error})") from None
    except (httpx.HTTPError, OSError) as error:
        raise HubError(f"{name}: the hub refused ({_first_line(error)})") from None


def _announce(name: str, revision: str | None) -> None:
    """Say on stderr what will be fetched, where the hub will draw its bars."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import filter_repo_objects, httpx

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except (OfflineModeIsEnabled, httpx.TransportError):
        return  # what was downloaded before will do
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = filter_repo_objects(files, allow_patterns=WANTED, ignore_patterns=COPIES)
    known = partial(try_to_load_from_cache, name, revision=info.sha)
    if missing := [file for file in wanted if not isinstance(known(file), str)]:
        size = sum(files[file] for file in missing) / 1e9
        what = f"{len(missing)} files of {size:.1f} GB come from the hub"
        print(f"{name} is no folder here: {what}", file=sys.stderr)


def upload(folder: Path, repo: str) -> None:
    """Put a model folder on the hub. Raises HubError with the hub's answer."""
    from huggingface_hub import create_repo, upload_folder
    from huggingface_hub.utils import httpx

    try:
        create_repo(repo, exist_ok=True)
        upload_folder(repo_id=repo, folder_path=folder)
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise HubError(
            f"{repo}: upload failed ({_first_line(error)}); {folder} is kept"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

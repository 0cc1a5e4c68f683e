"""Everything we ask of the hub: which commit, which files, their bytes, and what its refusals mean.

huggingface_hub supplies endpoint, token, HTTP client and listing; it is imported when something is asked. The transfer
of content is ours, because huggingface_hub compares sizes but no hashes, and newer versions delete a partial file when
its download ends: a weight file can be 50 GB, and a lost connection should cost the seconds since, not hours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_export.configs.errors import CheckpointError, ConfigError, Gemma4Error
from gemma4_export.configs.output import naming
from gemma4_export.exporter.hub_cache import COMMIT, HubFile, ModelCache, hash_into, mismatch

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0  # for an answer to begin and between two pieces of a file, not for a whole file
_RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0)  # between failures in a row; bytes that arrive start the count again
_RETRY_STATUS = (408, 429, 500, 502, 503, 504)


class HubUnreachableError(Exception):
    """The hub gave no answer, as opposed to a refusal: what lies in the cache may serve instead."""


def open_cache(hub_id: str) -> ModelCache:
    """The cache folder of a model; nothing is created.

    Raises:
        ConfigError: ``hub_id`` cannot be a model's id.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        hf_hub_url(hub_id, "config.json")  # for its checks of the id
    except HFValidationError as error:
        raise ConfigError(
            f"{hub_id!r} is no model id", hint="a model id reads ORGANISATION/NAME; --checkpoint takes a local folder"
        ) from error
    return ModelCache(Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=hub_id, repo_type="model"))


def is_offline() -> bool:
    """Whether the user forbids connections (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def list_files(hub_id: str, revision: str) -> tuple[str, dict[str, HubFile]]:
    """The commit that ``revision`` means now, and the files in its top folder by name.

    Raises:
        HubUnreachableError: no connection, or the hub is down.
        ConfigError, CheckpointError: the hub refuses, or what answers is no hub.
    """
    from huggingface_hub import HfApi

    with _asking(hub_id, revision):
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
        if info.sha is None or not COMMIT.fullmatch(info.sha) or info.siblings is None:
            raise ValueError(f"commit {info.sha} of {revision}")
        files: dict[str, HubFile] = {}
        for entry in info.siblings:
            if "/" not in entry.rfilename:
                size, digest = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, entry.blob_id)
                if size is None or digest is None:
                    raise ValueError(f"no size or hash of {entry.rfilename}")
                files[entry.rfilename] = HubFile(name=entry.rfilename, bytes=size, digest=digest)
        return info.sha, files


def transfer(hub_id: str, commit: str, file: HubFile, partial: Path, advance: Callable[[int], None]) -> None:
    """Append to ``partial`` what it lacks of ``file``, through lost connections, until its hash is the hub's.

    Args:
        advance: called with the bytes that are there and new; negative when a server without ranges starts over.
    Raises:
        CheckpointError: the connection stays lost (``partial`` is kept), or the hash is wrong (it is deleted).
        ConfigError: the hub refuses.
    """
    hasher, waits = file.hasher(), [*_RETRY_WAITS_S]
    with partial.open("ab") as out:
        done = out.tell()
        if done > file.bytes:
            out.truncate(0)
            done = 0
        hash_into(hasher, partial, done, advance)
        furthest = done
        while done < file.bytes:
            start, cause = done, "the answer ended early"
            try:
                with _stream(hub_id, commit, file, start) as response:
                    if response.status_code == 416:  # the hub's file ends before ``start``: the comparison below tells
                        break
                    if start and response.status_code != 206:  # ranges are not served: from the beginning, then
                        out.truncate(0)
                        advance(-start)
                        hasher, start, done = file.hasher(), 0, 0
                    for piece in response.iter_bytes():
                        with naming(partial):
                            out.write(piece)
                        hasher.update(piece)
                        done += len(piece)
                        advance(len(piece))
                        if done > file.bytes:
                            break
            except HubUnreachableError as error:
                cause = str(error)
            if done >= file.bytes:
                break
            if done > furthest:  # not "> start": starting over again and again would never end
                furthest, waits = done, [*_RETRY_WAITS_S]
            if not waits:
                raise CheckpointError(
                    f"{file.name}: the connection was lost after {done} of {file.bytes} bytes ({cause})",
                    hint="run the same command again: it continues at that byte",
                )
            _log.warning("%s: %s after %d of %d bytes; trying again", file.name, cause, done, file.bytes)
            time.sleep(waits.pop(0))
        out.flush()
        os.fsync(out.fileno())  # the record that this hash was right must not outlive the content in a power cut
    if done != file.bytes or hasher.hexdigest() != file.digest:
        partial.unlink()
        raise mismatch(file, f"{hasher.name} {file.digest} and {file.bytes} bytes", f"{hasher.hexdigest()} and {done}")


@contextlib.contextmanager
def _stream(hub_id: str, commit: str, file: HubFile, start: int) -> Iterator[Any]:
    """The answer to a request for a file from byte ``start`` on: 200 whole, 206 the rest, 416 there is no such byte."""
    from huggingface_hub import constants, get_session, get_token, hf_hub_url, hf_raise_for_status

    # Compressed, a range of the answer would be no range of the file.
    headers = {"Accept-Encoding": "identity", "User-Agent": "gemma4-export"}
    if start:
        headers["Range"] = f"bytes={start}-"
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token:
        headers["Authorization"] = f"Bearer {token}"  # the client drops it when the hub redirects to its storage
    url = hf_hub_url(hub_id, file.name, revision=commit)
    with _asking(hub_id, commit), get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        if response.status_code != 416:
            hf_raise_for_status(response)
        yield response


@contextlib.contextmanager
def _asking(hub_id: str, revision: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into our errors."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    # The base of what the client raises: httpx.HTTPError under huggingface_hub 1.x, httpx2.HTTPError under 2.x.
    http_error = HfHubHTTPError.__bases__[0]
    assert issubclass(http_error, Exception)
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code not in _RETRY_STATUS:
            raise _refusal(error, hub_id, revision) from error
        raise HubUnreachableError(f"{constants.ENDPOINT} answers HTTP {error.response.status_code}") from error
    except http_error as error:
        raise HubUnreachableError(f"the connection to {constants.ENDPOINT} failed ({_one_line(error)})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{hub_id}: {constants.ENDPOINT} answers, but not as a hub does ({_one_line(error)})",
            hint="check HF_ENDPOINT and the proxy; a network that wants a sign-in page answers like this too",
        ) from error


def _refusal(error: HfHubHTTPError, hub_id: str, revision: str) -> Gemma4Error:
    """What the hub refused, with its own sentence, and what to type."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RevisionNotFoundError

    status, page = error.response.status_code, f"{constants.ENDPOINT}/{hub_id}"
    said = f"HTTP {status}: {_one_line(error.server_message or 'no reason given')}"
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(f"{hub_id}: no revision {revision} ({said})", hint=f"{page} lists branches and tags")
    if isinstance(error, RemoteEntryNotFoundError):
        return CheckpointError(
            f"{hub_id}: the hub lists {error.response.url.path} and does not have it ({said})", hint="try again later"
        )
    if isinstance(error, GatedRepoError) or status == 403:
        licence = f"accept its licence at {page}"
        if status == 401:
            hint = f"{licence}, then run hf auth login (or set HF_TOKEN) and the same command again"
        else:
            hint = f"{licence} as the user that hf auth whoami names; fine-grained tokens must allow gated models"
        return ConfigError(f"{hub_id}: the hub does not let this account read it ({said})", hint=hint)
    if status == 401 and error.response.headers.get("X-Error-Code") != "RepoNotFound":
        return ConfigError(
            f"{hub_id}: the hub refuses the token ({said})", hint="run hf auth login with a new one, or unset HF_TOKEN"
        )
    if status in (401, 404):
        return ConfigError(
            f"{hub_id}: the hub has no such model, or it is private ({said})",
            hint=f"check the spelling at {page}; for a private model run hf auth login",
        )
    return CheckpointError(f"{hub_id}: the hub refuses ({said})", hint=f"see whether {page} opens, then try again")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""What a machine or the hub refuses, in one line that says what to do.

Libraries tell in many sentences that a repository is not there, and some tell it in those of another error; the first
error of the chain knows.
"""

import errno
import re
from collections.abc import Iterator

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError


REPOSITORY = re.compile(
    r"(?:https?://[^/\s]+/(?:api/models/)?|^)([\w.-]+/[\w.-]*\w)"
    r"(?:/(?:resolve|revision|tree)/|\.?(?: Please|$)| is not a local| does not appear)"
)
# A library's sentence about a file on this machine -> ours.
SENTENCES = {
    r"Unable to load weights from checkpoint file for '.*' at '(.*)'": (
        r"\1 must be the whole weights of a model, but is cut off or something else; copy or download it again."
    ),
    r"Error no file named (\S+) found in directory (.*?)\.?$": (
        r"\2 must be a whole model in diffusers format, but a folder in it lacks \1; copy or download it again."
    ),
    r"It looks like the config file at '(.*)' is not a valid JSON file": (
        r"\1 must be valid JSON, but is cut off or something else; copy or download it again."
    ),
}


class DataError(ValueError):
    """What is wrong with data that are read while a run goes on: their fault and not ours."""

    def __init__(self, message: str) -> None:
        # Of one that comes from a data loader's worker, torch gives the traceback, which ends with the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


REFUSALS = (ValueError, OSError, SafetensorError, HTTPError)
"""What ends a command with one line; any other exception is a fault of ours."""


def describe_refusal(error: Exception) -> str:
    """The message of an error in one line, with the file or the repository that it is about."""
    if isinstance(error, OSError | HTTPError | HFValidationError):
        said = _describe_hub(error) or _describe_file(error)
        if said:
            return said
    return " ".join(str(error).split()) or type(error).__name__


def _describe_file(error: Exception) -> str | None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}; make room, and run the same command again."
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    for sentence, ours in SENTENCES.items():
        if found := re.search(sentence, str(error)):
            return found.expand(ours)
    return None


def _describe_hub(error: Exception) -> str | None:
    """What became of a question to the hub; None if none was asked, or it was answered."""
    chain = list(_chain(error))
    name = next((found[1] for each in chain if (found := REPOSITORY.search(str(each)))), "the model")
    kinds = tuple(map(type, chain))

    def has(*wanted: type[BaseException]) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    if has(HFValidationError):
        said = next(str(each) for each in chain if isinstance(each, HFValidationError))
        named = re.search(r"'([^']*)'\.?(?: Use|$)", said)
        return (
            f"{named[1] if named else 'the model'} must be a folder on this machine or the name of a repository, "
            "USER/NAME, but is neither; correct it."
        )
    if has(GatedRepoError):
        return (
            f"{name} must be open to you, but has terms: accept them on its page of the hub, then run "
            "`hf auth login`, or set HF_TOKEN."
        )
    if has(RepositoryNotFoundError):
        return (
            f"{name} must be a folder on this machine or a repository of the hub that you may read, but is neither; "
            "correct the name, or, if it is private, run `hf auth login`."
        )
    if has(RevisionNotFoundError):
        return f"--revision must be a branch, a tag or a commit of {name}, but the hub knows none of that name."
    if has(OfflineModeIsEnabled):
        return f"{name} is not on this machine, and HF_HUB_OFFLINE is set; unset it, or {_elsewhere(name)}"
    if has(LocalEntryNotFoundError) or (has(HTTPError) and not has(HfHubHTTPError)):
        return f"{name} is not on this machine, and the hub is out of reach; mend the network, or {_elsewhere(name)}"
    if has(EntryNotFoundError):
        return f"{name} must be a whole model in diffusers format, but lacks a file: {' '.join(str(error).split())}"
    return None


def _elsewhere(name: str) -> str:
    known = name if "/" in name else "NAME"
    return f"download it on another machine (hf download {known} --local-dir FOLDER) and give the folder."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or in the handling of, the last first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)

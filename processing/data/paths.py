"""Decides whether a name given by a user is a local path or an id on the Hugging Face Hub.

A source or a model may be given as either. The rule is the same everywhere, so that a mistyped path raises an error at
once instead of a failed download later.
"""

from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


# Endings of data files. A name with one of them is a path, although the Hub would accept it as an id.
DATA_FILE_SUFFIXES = (".arrow", ".csv", ".gz", ".jinja", ".json", ".jsonl", ".parquet", ".tar", ".txt")


def is_hub_id(name: str) -> bool:
    """
    Whether a name can be the id of a repository on the Hub (`gpt2`, `microsoft/phi-2`).

    The check is local: that the repository exists is not known. A name that exists on this disk is a path.

    Args:
        name (`str`): a model or data set as the user gave it.
    """
    if Path(name).suffix.lower() in DATA_FILE_SUFFIXES or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def names_local_path(source: str) -> bool:
    """
    Whether a name can only be a local path, which need not exist.

    True of existing paths, absolute paths, paths that begin with `.` or `~`, paths of more than two parts, names with
    the ending of a data file, glob patterns and URLs. The caller raises if such a path does not exist.

    Args:
        source (`str`): a model or data set as the user gave it.
    """
    return not is_hub_id(source)

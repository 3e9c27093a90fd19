"""Shares a checkpoint on the Hub: selects the files to upload and checks that they name no local path.

The stock Trainer uploads all of `output_dir`, with the images of the samples, the lists of bad rows and a pickle of
the arguments. So the scripts upload only the files that [`published_files`] lists, after the last one is written.
"""

import json
import logging
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from jnana.modeling import BASE_REFERENCE
from jnana.processing.data.paths import is_hub_id

from .cards import set_name_in_usage


logger = logging.getLogger(__name__)

PUBLISHED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    BASE_REFERENCE,
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "*.py",
    "README.md",
    "loss_curve.png",
)
# Any text may be an entry of a vocabulary, so these files are not searched for paths.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")


def published_files(folder: str | Path) -> list[Path]:
    """The files of a checkpoint that are uploaded: weights, configs, processor, code, card; sorted by name.

    Raises:
        ValueError: if the directory holds no complete checkpoint.
    """
    folder = Path(folder)
    files = [file for file in sorted(folder.glob("*")) if file.is_file()]
    files = [file for file in files if any(fnmatch(file.name, pattern) for pattern in PUBLISHED)]
    names = {file.name for file in files}
    if not any(name.endswith(".safetensors") for name in names) or not names & {"config.json", "adapter_config.json"}:
        raise ValueError(
            f"{str(folder)!r} holds no finished checkpoint (no weights or no config); give the output_dir of a run "
            "that ended, or its subdirectory `merged`"
        )
    if "tokenizer.json" not in names and "tokenizer_config.json" not in names:
        raise ValueError(f"{str(folder)!r} holds weights without a tokenizer; give the output_dir of a run that ended")
    return files


def check_published(folder: str | Path) -> None:
    """Check that others can load a checkpoint, and that its files name no directory of this machine.

    Raises:
        ValueError: naming the file, the path in it, and the remedy.
    """
    folder = Path(folder).resolve()
    reference = folder / BASE_REFERENCE
    if reference.is_file():
        content = json.loads(reference.read_text(encoding="utf-8"))
        local = {key: content["names"][key] for key in content["relative_paths"]}
        check_base_is_shared(local, f"{reference} says that the adapter needs")
    for file in published_files(folder):
        if file.suffix not in (".json", ".py", ".md", ".jinja") or file.name in VOCABULARIES:
            continue
        text = file.read_text(encoding="utf-8")
        values = json_texts(json.loads(text)) if file.suffix == ".json" else [("", text)]
        for name, value in values:
            path = local_path_in(value, folder)
            if path is not None:
                where = f"{file}, {name}" if name else str(file)
                raise ValueError(f"{where} names {path!r}, a directory of this machine; remove it before sharing")


def local_path_in(text: str, folder: Path, others: bool = True) -> str | None:
    """The first path in `text` that lies in a directory of this machine.

    These are home, the working directory, `folder`, and with `others` every existing directory of at least two levels
    (`/x/y`; code names `/proc/self` and the like).
    """
    homes = {path for path in (Path.home(), Path.cwd(), folder) if len(path.parts) > 1}
    for found in re.findall(r"(?:~|[A-Za-z]:)?[/\\][\w.\-/\\]*[\w\-]", text):
        candidate = Path(found).expanduser()
        for path in (candidate, *candidate.parents):
            if path in homes or (others and path.is_absolute() and len(path.parts) > 2 and path.exists()):
                return str(candidate)
    return None


def json_texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, each after its keys joined by dots."""
    if isinstance(value, str):
        yield name, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from json_texts(child, f"{name}.{key}" if name else str(key))


def check_base_is_shared(names: dict[str, str], subject: str) -> None:
    """Check that the models an adapter needs are on the Hub.

    Args:
        names (`dict[str, str]`): The models, as in the adapter's base reference.
        subject (`str`): The beginning of the error message.

    Raises:
        ValueError: naming the model and the remedies.
    """
    for key, name in names.items():
        if not is_hub_id(name):
            raise ValueError(
                f"{subject} {key} {name!r}, a directory that only this machine has. Share it first (`python "
                "run_push.py FOLDER NAME/MODEL`) and train from its Hub id or give that as base_model_id, or set "
                "merge_adapter: true without push_to_hub and share `merged`, which needs no base"
            )


def check_push(args: TrainingArguments, reference: dict[str, Any] | None = None) -> None:
    """Check, before anything is loaded, that others can use the checkpoint that this run would push.

    Args:
        args (`TrainingArguments`): Of the run.
        reference (`dict`, *optional*): The base reference of the adapter that is trained (see `base_reference`).

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    if not args.push_to_hub:
        return
    if args.hub_strategy != HubStrategy.END:
        raise ValueError(
            f"hub_strategy is {HubStrategy(args.hub_strategy).value!r}, with which the Trainer uploads everything in "
            "output_dir, samples and a pickle of the arguments included; leave it out: the run is pushed when it ends"
        )
    if reference is not None:
        base_id = reference.get("base_model_id")
        names = reference["names"] if base_id is None else {"model": base_id}
        check_base_is_shared(names, "push_to_hub is true, but the adapter would need")


def check_private(repo_id: str, is_private: bool | None, wanted: bool | None) -> None:
    """Raise a `ValueError` if a repository is public and a private one is wanted: a push doesn't change that."""
    if wanted and is_private is False:
        raise ValueError(
            f"{repo_id!r} exists and is public, and a private one was asked for; make it private in its settings on "
            "the Hub, or give another name"
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Upload a complete checkpoint in one commit; a missing repository is created.

    The card's code is changed to load the model from `repo_id`, in the local `README.md` too.

    Args:
        folder (`str` or `Path`): An `output_dir`, or its `merged`.
        repo_id (`str`): `NAME/MODEL` on the Hub.
        token, private, revision: As in `huggingface_hub`.

    Returns:
        `str`: The repository's id.

    Raises:
        ValueError: as [`published_files`], [`check_published`] and [`check_private`].
    """
    check_published(folder)
    names = [file.name for file in published_files(folder)]
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private:
        check_private(repo_id, api.model_info(repo_id).private, private)
    if (Path(folder) / "README.md").is_file():
        set_name_in_usage(Path(folder) / "README.md", repo_id)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=names,
        commit_message=f"Upload {len(names)} files of a Jnana checkpoint",
        revision=revision,
    )
    logger.info(f"pushed to {repo_id}: {', '.join(names)}")
    return repo_id

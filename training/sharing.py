"""Sharing a checkpoint on the Hub: which files go, and that nothing of this machine goes with them.

The stock Trainer uploads `output_dir` as it stands: pictures of the samples, lists of bad rows and a pickle of the
arguments among it. So the scripts upload by themselves what [`published_files`] lists, after the last file is written.
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
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")  # any text may be an entry of these


def published_files(folder: str | Path) -> list[Path]:
    """The files of a checkpoint that are for others: weights, configs, processor, code, card; sorted by name.

    Raises:
        ValueError: if the folder is not a complete checkpoint.
    """
    folder = Path(folder)
    files = [file for file in sorted(folder.glob("*")) if file.is_file()]
    files = [file for file in files if any(fnmatch(file.name, pattern) for pattern in PUBLISHED)]
    names = {file.name for file in files}
    if not any(name.endswith(".safetensors") for name in names) or not names & {"config.json", "adapter_config.json"}:
        raise ValueError(
            f"{str(folder)!r} holds no finished checkpoint (no weights or no config); give the output_dir of a run "
            "that ended, or its sub-folder `merged`"
        )
    if "tokenizer.json" not in names and "tokenizer_config.json" not in names:
        raise ValueError(f"{str(folder)!r} holds weights without a tokenizer; give the output_dir of a run that ended")
    return files


def check_published(folder: str | Path) -> None:
    """Refuse to share a checkpoint that others could not load, or that tells of this machine's folders.

    Raises:
        ValueError: naming the file, what it says, and the remedy.
    """
    folder = Path(folder).resolve()
    reference = folder / BASE_REFERENCE
    if reference.is_file():
        content = json.loads(reference.read_text(encoding="utf-8"))
        local = {key: content["names"][key] for key in content["relative_paths"]}
        check_base_is_shared(local, f"{reference} says that the adapter rests on")
    for file in published_files(folder):
        if file.suffix not in (".json", ".py", ".md", ".jinja") or file.name in VOCABULARIES:
            continue
        text = file.read_text(encoding="utf-8")
        values = json_texts(json.loads(text)) if file.suffix == ".json" else [("", text)]
        for name, value in values:
            path = folder_of_this_machine(value, folder)
            if path is not None:
                where = f"{file}, {name}" if name else str(file)
                raise ValueError(f"{where} names {path!r}, a folder of this machine; take it out before sharing")


def folder_of_this_machine(text: str, folder: Path) -> str | None:
    """A path within `text` that lies in a folder of this machine: `/x/y` at least, home, the working one, `folder`."""
    homes = {place for place in (Path.home(), Path.cwd(), folder) if len(place.parts) > 1}
    for path in re.findall(r"(?:~|[A-Za-z]:)?[/\\][\w.\-/\\]*[\w\-]", text):
        candidate = Path(path).expanduser()
        for place in (candidate, *candidate.parents):
            if place in homes or (place.is_absolute() and len(place.parts) > 2 and place.exists()):
                return str(candidate)
    return None


def json_texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text within a JSON value, with the way to it."""
    if isinstance(value, str):
        yield name, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from json_texts(child, f"{name}.{key}" if name else str(key))


def check_base_is_shared(names: dict[str, str], subject: str) -> None:
    """Refuse an adapter whose base only this machine has.

    Args:
        names (`dict[str, str]`): What the adapter rests on, as in its base reference.
        subject (`str`): How the error begins.

    Raises:
        ValueError: naming the base and the two remedies.
    """
    for key, name in names.items():
        if Path(name).is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise ValueError(
                f"{subject} {key} {name!r}, a folder that others do not have. Share that folder first "
                "(`python run_push.py FOLDER NAME/MODEL`) and train from its Hub id or name that as base_model_id, or "
                "set merge_adapter: true without push_to_hub and share `merged`, which needs no base"
            )


def check_push(args: TrainingArguments, base_names: dict[str, str] | None = None) -> None:
    """Check, before anything is loaded, that what this run would push can be used by others.

    Args:
        args (`TrainingArguments`): Of the run.
        base_names (`dict[str, str]`, *optional*): What an adapter trained here will rest on.

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
    check_base_is_shared(base_names or {}, "push_to_hub is true, but the adapter would rest on")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Upload a finished checkpoint in one commit; the repository is made where there is none.

    Args:
        folder (`str` or `Path`): An `output_dir`, or its `merged`.
        repo_id (`str`): `NAME/MODEL` on the Hub.
        token, private, revision: As in `huggingface_hub`.

    Returns:
        `str`: The repository's id.

    Raises:
        ValueError: as [`published_files`] and [`check_published`].
    """
    check_published(folder)
    names = [file.name for file in published_files(folder)]
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=names,
        commit_message=f"Upload {len(names)} files of a Jnana checkpoint",
        revision=revision,
    )
    logger.info(f"pushed to {repo_id}: {', '.join(names)}")
    return repo_id

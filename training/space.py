"""A Gradio Space that shows one model: the chat page as four files.

`run_push.py --space` uploads what [`write_space`] writes. A Space installs `requirements.txt` before its own files are
there, so this package can't be named in it: its wheel lies beside `app.py`, which unpacks it and runs `jnana.app`.
"""

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from packaging.requirements import Requirement
from packaging.version import Version

import jnana

from .sharing import check_private, local_path_in


logger = logging.getLogger(__name__)

SDK = "gradio"  # its version is named in README.md, not in requirements.txt
EXTRA = "app"
TEXTS = (".py", ".yaml", ".yml", ".json", ".md", ".txt", ".jinja", ".js", ".css")  # searched for paths, in the wheel
SETUPTOOLS = Version("77")  # pyproject.toml asks for it

README = """\
---
title: "{title}"
emoji: 💬
colorFrom: indigo
colorTo: gray
sdk: gradio
sdk_version: {sdk_version}
python_version: "{python_version}"
app_file: app.py
models:
- {model}
---

The chat page of [{model}](https://huggingface.co/{model}), made by `run_push.py --space` of jnana {version}. The
variable `JNANA_MODEL` names another model, the secret `HF_TOKEN` opens a private one, and the secret `JNANA_LOGIN`
(`name:password`) closes the page.
"""

APP = '''\
"""The chat page of {model}; options and variables as those of jnana's app.py. JNANA_MODEL names another model."""

import os
import sys
import tempfile
import zipfile
from pathlib import Path


def main() -> None:
    os.environ.setdefault("JNANA_MODEL", "{model}")
    with tempfile.TemporaryDirectory(prefix="jnana-package-") as package:
        with zipfile.ZipFile(Path(__file__).with_name("{wheel}")) as wheel:
            wheel.extractall(package)
        sys.path.insert(0, package)
        from jnana import app

        app.main(sys.argv[1:])


if __name__ == "__main__":
    main()
'''


def build_wheel(folder: Path) -> Path:
    """
    The wheel of the clone that runs, made of the files that git tracks: a Space is public, so what only lies there
    (recipes, images, scripts that were never committed) is left out.

    Args:
        folder (`Path`): Where it is written.

    Raises:
        ValueError: If an installed package runs, git doesn't list the clone's files, or pip fails.
    """
    root = Path(jnana.__file__).resolve().parents[1]
    if not (root / "setup.cfg").is_file():
        raise ValueError(
            f"--space uploads the wheel of this package, which is built in a clone, and {root} is none; give the file "
            "that it was installed from as --wheel"
        )
    files = tracked_files(root)
    try:  # with the setuptools that is here, pip needs no network
        isolated = Version(metadata.version("setuptools")) < SETUPTOOLS
    except metadata.PackageNotFoundError:
        isolated = True
    # pip builds in the source directory and leaves files there, so it gets a copy
    with tempfile.TemporaryDirectory(prefix="jnana-source-") as source:
        for name in files:
            target = Path(source) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, target)
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--disable-pip-version-check"]
        command += ([] if isolated else ["--no-build-isolation"]) + ["-w", str(folder), source]
        done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("jnana-*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ValueError(
            f"--space can't build the wheel of this package: {(done.stderr or done.stdout).strip()[-500:]}; build it "
            "elsewhere (`pip wheel --no-deps .`) and give it as --wheel"
        )
    return wheels[0]


def tracked_files(root: Path) -> list[str]:
    """
    The files of a clone that git tracks and that are there, relative to it.

    Raises:
        ValueError: If `root` is not the top of a git clone, or there is no git.
    """
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, encoding="utf-8")
        names, reason = done.stdout.split("\0"), done.stderr.strip()
    except FileNotFoundError:
        names, reason = [], "there is no git"
    if "setup.cfg" not in names:
        raise ValueError(
            f"--space uploads only files that git tracks, and git doesn't list those of {root} "
            f"({reason or 'setup.cfg is not tracked'}); build the wheel elsewhere (`pip wheel --no-deps .`) and give "
            "it as --wheel"
        )
    return [name for name in names if name and (root / name).is_file()]


def check_wheel(wheel: Path) -> None:
    """Raise a `ValueError` if a text in a wheel names a home, this directory or the clone."""
    root = Path(jnana.__file__).resolve().parents[1]
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(TEXTS):
                continue
            text = archive.read(name).decode("utf-8", errors="replace")
            path = local_path_in(text, root, others=False)
            if path is not None:
                raise ValueError(
                    f"{name} in {wheel.name} names {path!r}, a directory of this machine; remove it, or give another "
                    "--wheel"
                )


def requirements_of(wheel: Path) -> list[str]:
    """What a wheel of this package requires for the chat page, but for Gradio, which a Space has by `sdk_version`."""
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith(".dist-info/METADATA")), None)
        text = "" if name is None else archive.read(name).decode("utf-8")
    message = Parser().parsestr(text)
    if message["Name"] != "jnana":
        raise ValueError(
            f"--wheel {str(wheel)!r} is not a wheel of jnana (its metadata has the name {message['Name']!r})"
        )
    required = [Requirement(line) for line in message.get_all("Requires-Dist", [])]
    extras, kept = {"", EXTRA}, {}
    for requirement in required:  # `jnana[train]` inside the extra
        if requirement.name == "jnana" and requirement.marker and requirement.marker.evaluate({"extra": EXTRA}):
            extras |= requirement.extras
    for requirement in required:
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
        if wanted and requirement.name not in ("jnana", SDK):
            kept[requirement.name] = f"{requirement.name}{requirement.specifier}"
    return sorted(kept.values())


def write_space(folder: str | Path, model_id: str, title: str, wheel: str | Path | None = None) -> list[str]:
    """
    Write the files of a Space.

    Args:
        folder (`str` or `Path`): An empty directory.
        model_id (`str`): Hub id of the model that the page shows unless `JNANA_MODEL` names another.
        title (`str`): The Space's title.
        wheel (`str` or `Path`, *optional*): Of this package; by default it is built from the clone that runs.

    Returns:
        `list[str]`: The names of the files: `README.md`, `app.py`, the wheel, `requirements.txt`.

    Raises:
        ValueError: If there is no wheel, Gradio is not installed here, or a file names a directory of this machine.
    """
    folder = Path(folder)
    try:
        sdk_version = metadata.version(SDK)
    except metadata.PackageNotFoundError:
        raise ValueError(
            "--space gives the Space the Gradio of this environment, and none is installed: `pip install 'jnana[app]'`"
        ) from None
    if wheel is None:
        wheel = build_wheel(folder)
    elif Path(wheel).is_file():
        wheel = Path(shutil.copy(wheel, folder))
    else:
        raise ValueError(f"--wheel {str(wheel)!r} does not exist; give the wheel of this package")
    texts = {
        "README.md": README.format(
            title=title,
            model=model_id,
            sdk_version=sdk_version,
            python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
            version=jnana.__version__,
        ),
        "app.py": APP.format(model=model_id, wheel=wheel.name),
        "requirements.txt": "\n".join([*requirements_of(wheel), ""]),
    }
    check_wheel(wheel)
    for name, text in texts.items():
        path = local_path_in(text, folder)
        if path is not None:
            raise ValueError(
                f"{name} of the Space names {path!r}, a directory of this machine; give the model's Hub id"
            )
        (folder / name).write_text(text, encoding="utf-8")
    return sorted([*texts, wheel.name])


def check_space(
    space_id: str, model_id: str, *, pushed: bool, token: str | None = None, private: bool | None = None
) -> None:
    """
    Check on the Hub, before anything is uploaded, that a Space may be made or replaced and can show its model.

    Args:
        space_id (`str`): `NAME/SPACE` on the Hub.
        model_id (`str`): `NAME/MODEL` on the Hub.
        pushed (`bool`): Whether the model is pushed next, so that it need not be there yet.
        token, private: As in `huggingface_hub`.

    Raises:
        ValueError: If the model is missing, or private under a public Space; if the Space is another's page, or public
            where a private one is asked for.
    """
    api = HfApi(token=token)
    try:
        hidden = bool(api.model_info(model_id).private)
    except RepositoryNotFoundError:
        if not pushed:
            raise ValueError(
                f"there is no model {model_id!r} on the Hub (or your token can't read it); give an id that is there, "
                "or the directory of a run, NAME/MODEL and --space"
            ) from None
        hidden = False
    try:
        space = api.space_info(space_id)
    except RepositoryNotFoundError:
        space = None
    if space is not None:
        if not any(fnmatch(file.rfilename, "jnana-*.whl") for file in space.siblings or []):
            raise ValueError(
                f"the Space {space_id!r} exists and holds no jnana-*.whl, so it was not made by --space; give another "
                "name, or delete it first"
            )
        check_private(space_id, space.private, private)
    if hidden and not (private if space is None else space.private):
        raise ValueError(
            f"{model_id!r} is private and the Space {space_id!r} would show it to everyone; give --private (an "
            "existing Space is made private in its settings)"
        )


def upload_space(
    folder: str | Path,
    names: list[str],
    space_id: str,
    model_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
) -> str:
    """
    Make a Space of the files that [`write_space`] wrote, or replace its files, in one commit.

    Args:
        folder (`str` or `Path`): Where they are.
        names (`list[str]`): Their names.
        space_id, model_id, token, private: See [`check_space`].

    Returns:
        `str`: The Space's id.
    """
    api = HfApi(token=token)
    space_id = api.create_repo(space_id, repo_type="space", space_sdk=SDK, private=private, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=space_id,
        repo_type="space",
        folder_path=folder,
        allow_patterns=names,
        delete_patterns=["jnana-*.whl"],  # of an earlier version
        commit_message=f"The chat page of {model_id}",
    )
    logger.info(f"pushed to the Space {space_id}: {', '.join(names)}")
    return space_id

"""A Gradio Space that shows one model: the chat page as four files.

`run_push.py --space` uploads what [`write_space`] writes. A Space installs `requirements.txt` before its own files are
there, so this package can't be named in it: its wheel lies beside `app.py`, which unpacks it and runs `jnana.app`.
"""

import configparser
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from huggingface_hub import HfApi
from packaging.requirements import Requirement
from packaging.version import Version

import jnana

from .sharing import local_path_in


logger = logging.getLogger(__name__)

SDK = "gradio"  # its version is named in README.md, not in requirements.txt
EXTRA = "app"
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")  # beside the code
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
    The wheel of the clone that runs.

    Args:
        folder (`Path`): Where it is written.

    Raises:
        ValueError: If an installed package runs, or pip fails.
    """
    root = Path(jnana.__file__).resolve().parents[1]
    if not (root / "setup.cfg").is_file():
        raise ValueError(
            f"--space uploads the wheel of this package, which is built in a clone, and {root} is none; give the file "
            "that it was installed from as --wheel"
        )
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    rooms = [line.split("=")[1].strip() for line in setup["options"]["package_dir"].strip().splitlines()]
    try:  # with the setuptools that is here, pip needs no network
        isolated = Version(metadata.version("setuptools")) < SETUPTOOLS
    except metadata.PackageNotFoundError:
        isolated = True
    # pip builds in the source directory and leaves files there, so it gets a copy
    with tempfile.TemporaryDirectory(prefix="jnana-source-") as source:
        for room in rooms:
            shutil.copytree(root / room, Path(source) / room, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (
            *root.glob("*.py"),
            *(root / name for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")),
        ):
            shutil.copy(file, source)
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
    for name, text in texts.items():
        path = local_path_in(text, folder)
        if path is not None:
            raise ValueError(
                f"{name} of the Space names {path!r}, a directory of this machine; give the model's Hub id"
            )
        (folder / name).write_text(text, encoding="utf-8")
    return sorted([*texts, wheel.name])


def push_space(
    space_id: str, model_id: str, *, token: str | None = None, private: bool | None = None, wheel: str | None = None
) -> str:
    """
    Make a Space that shows a model, or replace its files, in one commit.

    Args:
        space_id (`str`): `NAME/SPACE` on the Hub.
        model_id (`str`): `NAME/MODEL` on the Hub.
        token, private: As in `huggingface_hub`.
        wheel (`str`, *optional*): See [`write_space`].

    Returns:
        `str`: The Space's id.

    Raises:
        ValueError: as [`write_space`].
    """
    with tempfile.TemporaryDirectory(prefix="jnana-space-") as folder:
        names = write_space(folder, model_id, space_id.split("/")[-1], wheel)
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

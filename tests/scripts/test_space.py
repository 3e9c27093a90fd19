"""A Space: four files, that start the chat page in an environment and a directory that know nothing of the clone."""

import base64
import configparser
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types
import urllib.request
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from packaging.requirements import Requirement
from PIL import Image

from jnana import run_push
from jnana.chat import ChatSession
from jnana.training import space
from jnana.training.loading import load_model
from tests.app.conftest import wait_for_address
from tests.export.models import save_model
from tests.scripts.hub import LocalHub
from tests.scripts.launching import ROOT
from tests.scripts.test_push import run_with_hub


pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")

MODEL, SPACE = "someone/chess", "me/chess-chat"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> Path:
    """What `run_push.py` uploads, written where a Space has it; and what it prints."""
    hub, folder = LocalHub(), tmp_path_factory.mktemp("space")
    hub.files |= {"jnana-0.1-py3-none-any.whl": b"of an earlier version", "requirements.txt": b"torch"}
    try:
        printed = run_with_hub(hub, folder / "me", str(ROOT / "run_push.py"), MODEL, "--space", SPACE)
    finally:
        hub.close()
    assert [created["type"] for created in hub.created] == ["space"] and hub.created[0]["sdk"] == "gradio"
    assert hub.commits == [f"The chat page of {MODEL}"]
    files = folder / "files"
    files.mkdir()
    for name, content in hub.files.items():
        (files / name).write_bytes(content)
    last = printed.splitlines()[-1]
    assert last == f"pushed to the Space {SPACE}: {', '.join(sorted(hub.files))}"
    return files


def test_what_is_uploaded(pushed):
    wheel = f"jnana-{metadata.version('jnana')}-py3-none-any.whl"
    assert sorted(path.name for path in pushed.iterdir()) == ["README.md", "app.py", wheel, "requirements.txt"]
    readme = (pushed / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(readme.split("---\n")[1])
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["models"] == [MODEL]
    assert front["sdk_version"] == metadata.version("gradio") and front["title"] == "chess-chat"
    assert (
        len(front["title"]) <= 30 and front["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    )
    for name in ("README.md", "app.py", "requirements.txt"):
        assert str(Path.home()) not in (pushed / name).read_text(encoding="utf-8")
        assert str(ROOT) not in (pushed / name).read_text(encoding="utf-8")
    with zipfile.ZipFile(pushed / wheel) as archive:
        names = archive.namelist()
    assert {"jnana/app.py", "jnana/chat/page.js", "jnana/processing/chat_templates/jnana.jinja"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"jnana", wheel.removesuffix("-py3-none-any.whl") + ".dist-info"}


def test_its_requirements_are_those_of_setup_cfg(pushed):
    """All that the page needs but Gradio; each is what is installed here, with which the page starts below."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    blocks = (setup["options"]["install_requires"], extras["train"], extras["app"])
    needed = {
        line for block in blocks for line in block.split("\n") if line and not line.startswith(("jnana", "gradio"))
    }
    found = [Requirement(line) for line in (pushed / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    expected = {(r.name, r.specifier) for r in map(Requirement, needed)}
    assert {(requirement.name, requirement.specifier) for requirement in found} == expected
    assert all(requirement.specifier.contains(metadata.version(requirement.name), True) for requirement in found)


@pytest.fixture
def interpreter(tmp_path) -> str:
    """A fresh environment: the packages of this one, without the clone that is installed in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(f"{metadata.distribution('gradio').locate_file('')}\n")
    return str(tmp_path / "env" / "bin" / "python")


@pytest.fixture
def plain_words(tmp_path) -> str:
    """A model that writes plain words, so that its answer is equal after it travelled as text."""
    path = save_model(tmp_path / "pair", vision_feature_layer=-2)
    model, processor = load_model(path)
    texts = [processor.tokenizer.decode([number]) for number in range(model.config.text_config.vocab_size)]
    model.generation_config.suppress_tokens = [
        number for number, text in enumerate(texts) if not (text.isascii() and text.strip().isalpha())
    ]
    model.save_pretrained(path)
    return path


def test_it_starts_from_its_files_alone(pushed, interpreter, plain_words, tmp_path):
    """In an environment without this package; JNANA_MODEL names a directory instead of the model's Hub id."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JNANA", "PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "HF_HOME": str(tmp_path / "hf")}
    found = subprocess.run(
        [interpreter, "-c", "import jnana"], cwd=pushed, env=environment, capture_output=True, text=True
    )
    assert "No module named 'jnana'" in found.stderr
    (tmp_path / "tmp").mkdir()
    environment |= {"JNANA_MODEL": plain_words, "TMPDIR": str(tmp_path / "tmp")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["GRADIO_SERVER_PORT"] = str(free.getsockname()[1])
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [interpreter, "app.py", "--api"], cwd=pushed, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    image = Image.new("RGB", (30, 24), "red")
    try:
        address = wait_for_address(process, log).rstrip("/")
        with urllib.request.urlopen(address) as page:
            assert b"Jnana" in page.read()
        file = io.BytesIO()
        image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this?"}]
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 8,
        }
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            answer = json.load(reply)["choices"][0]["message"]["content"]
    finally:
        process.terminate()
        process.wait(timeout=60)
    expected = list(ChatSession(*load_model(plain_words)).ask("what is this?", [image], max_new_tokens=8))[-1]
    assert answer == expected and answer
    assert str(ROOT) not in log.read_text()
    assert list((tmp_path / "tmp").glob("jnana-*")) == []  # the unpacked package is gone, too


class TestRefused:
    @pytest.fixture(autouse=True)
    def no_upload(self, monkeypatch):
        monkeypatch.setattr(run_push, "push_folder", lambda *arguments, **options: pytest.fail("the model was pushed"))

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["./outputs/sft"], r"repo_id is not set; give where '\./outputs/sft' is pushed to"),
            (["./outputs/sft", "--space", SPACE], r"repo_id '\./outputs/sft' is not an id on the Hub"),
            (["sft", MODEL, "--space", "chat"], "--space 'chat' is not an id on the Hub; a Space needs NAME/MODEL"),
            (["sft", MODEL, "--wheel", "x.whl"], "--wheel is for a Space"),
            (["sft", MODEL, "--space", SPACE, "--revision", "b"], "--revision can't be combined with --space"),
            (["sft", MODEL, "--space", SPACE, "--wheel", "nowhere.whl"], "--wheel 'nowhere.whl' does not exist"),
            ([MODEL, "--space", SPACE, "--wheel", "nowhere.whl"], "--wheel 'nowhere.whl' does not exist"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            run_push.main(arguments)

    def test_another_wheel(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "other-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("other-1.0.dist-info/METADATA", "Name: other\nVersion: 1.0\n")
        (tmp_path / "space").mkdir()
        with pytest.raises(ValueError, match=r"is not a wheel of jnana \(its metadata has the name 'other'\)"):
            space.write_space(tmp_path / "space", MODEL, "chat", tmp_path / "other-1.0-py3-none-any.whl")

    def test_an_installed_package_builds_no_wheel(self, tmp_path, monkeypatch):
        monkeypatch.setattr(space.jnana, "__file__", str(tmp_path / "site-packages" / "jnana" / "__init__.py"))
        with pytest.raises(ValueError, match="is built in a clone, and .*site-packages is none; .* --wheel"):
            space.build_wheel(tmp_path)

    def test_without_gradio(self, tmp_path, monkeypatch):
        def absent(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(space.metadata, "version", absent)
        with pytest.raises(ValueError, match=r"none is installed: `pip install 'jnana\[app\]'`"):
            space.write_space(tmp_path, MODEL, "chat")

    def test_a_path_of_this_machine(self, tmp_path, monkeypatch):
        monkeypatch.setattr(space, "build_wheel", lambda folder: tmp_path / "jnana.whl")
        monkeypatch.setattr(space, "requirements_of", lambda wheel: [])
        monkeypatch.setattr(space, "check_wheel", lambda wheel: None)
        with pytest.raises(ValueError, match=r"README.md of the Space names .* a directory of this machine"):
            space.write_space(tmp_path, str(tmp_path), "chat")


def test_the_wheel_holds_only_what_git_tracks(tmp_path, monkeypatch):
    """A private recipe, a picture and a script that were never added stay here; what is no clone raises."""
    clone = tmp_path / "clone"
    files = [name for name in space.tracked_files(ROOT) if not name.startswith("tests/")]
    for name in files:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    monkeypatch.setattr(space.jnana, "__file__", str(clone / "jnana" / "__init__.py"))
    (tmp_path / "wheel").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(ValueError, match="uploads only files that git tracks.* --wheel"):
        space.build_wheel(tmp_path / "wheel")
    for command in (["init", "--quiet"], ["add", "--force", "."]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    for name in ("recipes/private.yaml", "chat/examples/private.png", "run_private.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("secret: 1\n" if name.endswith("yaml") else "secret = 1\n")
    with zipfile.ZipFile(space.build_wheel(tmp_path / "wheel")) as archive:
        names = archive.namelist()
    assert "jnana/run_sft.py" in names and [name for name in names if "private" in name] == []


def test_a_path_in_the_wheel(tmp_path):
    """A text of the wheel that names the clone is refused; `/proc` and the like are no directories of a person."""
    for text, refused in ((f"x = '{ROOT}/data'", True), ("x = '/proc/self/status'", False)):
        wheel = tmp_path / "jnana-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("jnana/x.py", text)
        if refused:
            with pytest.raises(ValueError, match="jnana/x.py in jnana-1-py3-none-any.whl names .*; remove it"):
                space.check_wheel(wheel)
        else:
            space.check_wheel(wheel)


class TestWhatIsOnTheHub:
    """Existing repositories (`None`: missing): what --space refuses before anything is uploaded."""

    @pytest.fixture
    def order(self, monkeypatch):
        done: list[str] = []
        monkeypatch.setattr(run_push, "write_space", lambda *arguments: done.append("write") or ["app.py"])
        monkeypatch.setattr(run_push, "push_folder", lambda folder, name, **options: done.append("model") or name)
        monkeypatch.setattr(run_push, "upload_space", lambda *arguments, **options: done.append("space"))
        return done

    @staticmethod
    def hub(monkeypatch, model, page, files=("jnana-0.1-py3-none-any.whl",)):
        def info(private, name):
            if private is None:
                response = types.SimpleNamespace(headers={}, request=None, status_code=404)
                raise RepositoryNotFoundError(name, response=response)
            return types.SimpleNamespace(
                private=private, siblings=[types.SimpleNamespace(rfilename=file) for file in files]
            )

        monkeypatch.setattr(HfApi, "model_info", lambda self, name: info(model, name))
        monkeypatch.setattr(HfApi, "space_info", lambda self, name: info(page, name))

    @pytest.mark.parametrize(
        "arguments, model, page, files, message",
        [
            ([MODEL], None, None, (), f"there is no model '{MODEL}' on the Hub"),
            (["sft", MODEL], None, False, ("app.py",), r"exists and holds no jnana-\*\.whl"),
            (["sft", MODEL, "--private"], None, False, ("jnana-0.1-py3-none-any.whl",), "exists and is public"),
            ([MODEL], True, None, (), "is private and the Space .* would show it to everyone; give --private"),
        ],
    )
    def test_refused(self, order, monkeypatch, arguments, model, page, files, message):
        self.hub(monkeypatch, model, page, files)
        with pytest.raises(ValueError, match=message):
            run_push.main([*arguments, "--space", SPACE])
        assert order == ["write"]

    @pytest.mark.parametrize(
        "arguments, model, page",
        [(["sft", MODEL], None, None), (["sft", MODEL], False, False), (["sft", MODEL, "--private"], True, None)],
    )
    def test_the_model_is_uploaded_after_the_files_are_written(self, order, monkeypatch, arguments, model, page):
        self.hub(monkeypatch, model, page)
        run_push.main([*arguments, "--space", SPACE])
        assert order == ["write", "model", "space"]


def test_the_page_in_the_docs_names_the_files():
    section = (ROOT / "docs" / "app.md").read_text(encoding="utf-8").split("## On Spaces")[1]
    assert "python run_push.py" in section and "--space" in section
    assert all(re.search(rf"`{re.escape(name)}`", section) for name in ("README.md", "app.py", "requirements.txt"))

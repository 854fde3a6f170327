"""Packages are installed whole or not at all, are never edited, and one small file says which version runs."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node.demo.packages import WEIGHTS_FILE, ct_package
from dicom_node.errors import EngineError, PackageError
from dicom_node.models import importing, library
from dicom_node.models.enabling import disable_model, enable_model, remove_model
from dicom_node.models.importing import Imported, import_package
from dicom_node.models.library import PIN, Library
from dicom_node.models.registry import find_package

Write = Callable[[Path, dict[str, Any]], Path]


@pytest.fixture
def installed(tmp_path: Path) -> Library:
    """An empty library, whose folder does not exist yet."""
    return Library(tmp_path / "data" / "models")


@pytest.fixture
def packed(tmp_path: Path, write_package: Write) -> Callable[..., Path]:
    """Write a package whose weights nobody runs: `packed(version, content)`."""

    def write(version: str = "1.0.0", content: bytes = b"weights", model_id: str = "spleen") -> Path:
        folder = tmp_path / f"{model_id}-{version}-{hashlib.sha256(content).hexdigest()[:8]}"
        manifest = ct_package(hashlib.sha256(content).hexdigest()) | {"id": model_id, "version": version}
        manifest.pop("metrics", None)
        write_package(folder, manifest)
        (folder / WEIGHTS_FILE).write_bytes(content)
        return folder

    return write


def add(installed: Library, folder: Path, **more: Any) -> Imported:
    return import_package(installed, folder, self_test=None, **more)


def hidden(installed: Library) -> list[str]:
    """Work under way, or what is left of it."""
    return sorted(path.name for path in installed.root.glob(".*") if path.name not in (".lock", ".state.json"))


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- import


def test_the_first_version_is_enabled_and_found_by_its_id(installed: Library, packed: Callable[..., Path]) -> None:
    imported = add(installed, packed())
    assert (imported.new, imported.enabled, imported.pin.self_test) == (True, True, "not run")
    folder = installed.folder("spleen", "1.0.0")
    assert sorted(path.name for path in folder.iterdir()) == sorted(["model.yaml", PIN, WEIGHTS_FILE])
    for name in ("spleen", "spleen@1.0.0"):
        package = find_package(name, installed.root)
        assert package.folder == folder
        package.check_weights()
    assert hidden(installed) == []


def test_the_same_content_again_changes_nothing(installed: Library, packed: Callable[..., Path]) -> None:
    add(installed, packed())
    before = everything(installed.root)
    again = add(installed, packed())
    assert (again.new, again.enabled) == (False, True)
    assert everything(installed.root) == before


def test_other_comments_make_no_other_package(installed: Library, packed: Callable[..., Path]) -> None:
    add(installed, packed())
    folder = packed()
    with (folder / "model.yaml").open("a") as file:
        file.write("# reviewed\n")
    assert not add(installed, folder).new


def test_other_content_under_the_same_version_is_refused(installed: Library, packed: Callable[..., Path]) -> None:
    add(installed, packed())
    before = everything(installed.root)
    with pytest.raises(PackageError, match=r"spleen@1\.0\.0 is installed with other content; bump the version"):
        add(installed, packed(content=b"others"))
    assert everything(installed.root) == before
    assert hidden(installed) == []


def test_a_later_version_waits_until_it_is_enabled(installed: Library, packed: Callable[..., Path]) -> None:
    add(installed, packed())
    assert not add(installed, packed("1.1.0", b"new")).enabled
    assert find_package("spleen", installed.root).manifest.version == "1.0.0"
    assert enable_model(installed, "spleen@1.1.0") == "1.1.0"
    assert find_package("spleen", installed.root).manifest.version == "1.1.0"
    assert add(installed, packed("1.2.0", b"newer"), enable=True).enabled
    assert find_package("spleen", installed.root).manifest.version == "1.2.0"


def test_weights_that_are_not_those_of_the_manifest_are_not_installed(
    installed: Library, packed: Callable[..., Path]
) -> None:
    folder = packed()
    (folder / WEIGHTS_FILE).write_bytes(b"tampered")
    with pytest.raises(PackageError, match=r"sha256 is [0-9a-f]{16}\.\.\., model\.yaml says"):
        add(installed, folder)
    assert installed.ids() == () and hidden(installed) == []


def test_a_package_that_fails_its_self_test_is_not_installed(installed: Library, packed: Callable[..., Path]) -> None:
    def fails(package: Any) -> None:
        assert package.folder.is_relative_to(installed.root)  # what would be installed is what is tested
        raise EngineError("self-test: the network has 3 outputs, the package names 4")

    with pytest.raises(EngineError, match="3 outputs"):
        import_package(installed, packed(), self_test=fails)
    assert installed.ids() == () and hidden(installed) == []


def test_links_and_pipes_are_not_followed_out_of_the_package(
    tmp_path: Path, installed: Library, packed: Callable[..., Path]
) -> None:
    folder = packed()
    outside = tmp_path / "outside"
    (folder / WEIGHTS_FILE).rename(outside)
    (folder / WEIGHTS_FILE).symlink_to(outside)
    with pytest.raises(PackageError, match="leads out of the package folder"):
        add(installed, folder)
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)
    with pytest.raises(PackageError, match="no regular file"):
        add(installed, folder)
    with pytest.raises(PackageError, match="no regular file"):
        find_package(str(folder)).check_weights()


@pytest.mark.parametrize(
    ("model_id", "version", "says"),
    [
        ("demo-ct-abdomen", "9.0.0", "ships with the node"),
        (".hidden", "1.0.0", "begins with a dot"),
        ("spleen", "..1", "begins with a dot"),
    ],
)
def test_ids_that_would_hide_another_model_or_a_folder_are_refused(
    model_id: str, version: str, says: str, installed: Library, packed: Callable[..., Path]
) -> None:
    with pytest.raises(PackageError, match=says):
        add(installed, packed(version, model_id=model_id))
    assert installed.ids() == () and hidden(installed) == []


def test_a_zip_is_installed_like_its_folder(tmp_path: Path, installed: Library, packed: Callable[..., Path]) -> None:
    folder, path = packed(), tmp_path / "package.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"spleen/{file.name}")
    assert add(installed, path).new
    assert not add(installed, folder).new
    assert hidden(installed) == []


def test_a_zip_that_leaves_its_folder_installs_nothing(tmp_path: Path, installed: Library) -> None:
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil", b"x")
    with pytest.raises(PackageError, match="leads out of the folder"):
        add(installed, path)
    assert not list(tmp_path.rglob("evil")) and hidden(installed) == []


def test_the_manifest_itself_means_its_folder(installed: Library, packed: Callable[..., Path]) -> None:
    assert add(installed, packed() / "model.yaml").package.manifest.id == "spleen"


def test_what_is_no_package_says_what_one_is(tmp_path: Path, installed: Library) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path, says in (("nowhere", "no such folder or file"), ("notes.txt", "no model package is recognised")):
        with pytest.raises(PackageError, match=says):
            add(installed, tmp_path / path)


# --- what happens to a package after its import


def test_a_manifest_that_was_edited_after_the_import_is_refused(
    installed: Library, packed: Callable[..., Path]
) -> None:
    folder = add(installed, packed()).package.folder
    text = (folder / "model.yaml").read_text()
    (folder / "model.yaml").write_text(text.replace("precision: auto", "precision: fp32") + "manufacturer: someone\n")
    with pytest.raises(PackageError, match=r"model\.yaml is not the imported one"):
        find_package("spleen", installed.root)
    with pytest.raises(PackageError, match="installed with other content"):
        add(installed, packed(content=b"other weights"))
    assert add(installed, packed()).new  # what was imported mends it
    assert "someone" not in (folder / "model.yaml").read_text()


def test_weights_that_were_damaged_are_told_by_check_and_mended_by_another_import(
    installed: Library, packed: Callable[..., Path]
) -> None:
    folder = add(installed, packed()).package.folder
    (folder / WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(PackageError, match="sha256 is"):
        find_package("spleen", installed.root).check_weights()
    with pytest.raises(PackageError, match="sha256 is"):
        enable_model(installed, "spleen@1.0.0")
    again = add(installed, packed())
    assert again.new and again.enabled
    find_package("spleen", installed.root).check_weights()


# --- enable, disable, remove


def test_a_disabled_model_is_not_found_until_it_is_enabled(installed: Library, packed: Callable[..., Path]) -> None:
    add(installed, packed())
    for name, shown in (("spleen", "spleen"), ("demo-ct-abdomen", "demo-ct-abdomen")):
        disable_model(installed, name)
        with pytest.raises(PackageError, match=f"model '{shown}' is disabled; 'dicom-node models enable"):
            find_package(name, installed.root)
        enable_model(installed, name)
        assert find_package(name, installed.root).manifest.id == name
    disable_model(installed, "spleen")
    with pytest.raises(PackageError, match="is disabled"):
        find_package("spleen@1.0.0", installed.root)


def test_an_import_does_not_switch_a_disabled_model_on(installed: Library, packed: Callable[..., Path]) -> None:
    add(installed, packed())
    disable_model(installed, "spleen")
    add(installed, packed("2.0.0", b"new"))
    assert installed.state().of("spleen").disabled


def test_the_enabled_version_is_not_removed_by_mistake(installed: Library, packed: Callable[..., Path]) -> None:
    add(installed, packed())
    add(installed, packed("2.0.0", b"new"))
    with pytest.raises(PackageError, match=r"spleen@1\.0\.0 is enabled; .* or say --force"):
        remove_model(installed, "spleen@1.0.0", engines={})
    with pytest.raises(PackageError, match=r"what engines\.ct\.model \('spleen'\) means"):
        remove_model(installed, "spleen@1.0.0", engines={"ct": "spleen"}, force=True)
    with pytest.raises(PackageError, match=r"what engines\.ct\.model \('spleen@2\.0\.0'\) means"):
        remove_model(installed, "spleen@2.0.0", engines={"ct": "spleen@2.0.0"})
    assert remove_model(installed, "spleen@2.0.0", engines={"ct": "spleen"}) == ("2.0.0",)
    assert remove_model(installed, "spleen", engines={}, force=True) == ("1.0.0",)
    assert installed.ids() == () and installed.state().models == {}
    assert sorted(path.name for path in installed.root.iterdir()) == [".lock", ".state.json"]


def test_without_an_enabled_version_the_id_alone_means_nothing(installed: Library, packed: Callable[..., Path]) -> None:
    add(installed, packed())
    add(installed, packed("2.0.0", b"new"))
    remove_model(installed, "spleen@1.0.0", engines={}, force=True)
    with pytest.raises(PackageError, match=r"no version of model 'spleen' is enabled \(installed: 2\.0\.0\)"):
        find_package("spleen", installed.root)
    assert find_package("spleen@2.0.0", installed.root).manifest.version == "2.0.0"
    assert enable_model(installed, "spleen") == "2.0.0"


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (
            lambda lib: enable_model(lib, "spleen@7"),
            r"spleen@7 is not installed \(installed versions of spleen: 1.0.0\)",
        ),
        (lambda lib: enable_model(lib, "liver"), r"no model 'liver' is installed \(installed: spleen\)"),
        (lambda lib: enable_model(lib, "../spleen"), "expected ID or ID@VERSION"),
        (lambda lib: enable_model(lib, "demo-ct-abdomen@7"), "is version .*, not '7'"),
        (lambda lib: disable_model(lib, "spleen@1.0.0"), "write 'dicom-node models disable spleen'"),
        (lambda lib: disable_model(lib, "liver"), "no model 'liver'"),
        (lambda lib: remove_model(lib, "spleen@7", engines={}), r"spleen@7 is not installed"),
        (lambda lib: remove_model(lib, "demo-ct-abdomen", engines={}), "ships with the node"),
        (lambda lib: find_package("spleen@7", lib.root), "spleen@7 is not installed"),
        (lambda lib: find_package("liver", lib.root), r"nor an installed one \(spleen\)"),
    ],
)
def test_a_wrong_name_is_told_with_what_there_is(
    act: Callable[[Library], Any], says: str, installed: Library, packed: Callable[..., Path]
) -> None:
    add(installed, packed())
    before = everything(installed.root)
    with pytest.raises(PackageError, match=says):
        act(installed)
    assert everything(installed.root) == before


def test_a_damaged_state_file_is_told_and_not_overwritten(installed: Library, packed: Callable[..., Path]) -> None:
    add(installed, packed())
    (installed.root / ".state.json").write_text('{"schema": 1, "models": {"spleen": {"enabled": 7}}}')
    for act in (lambda: find_package("spleen", installed.root), lambda: enable_model(installed, "spleen@1.0.0")):
        with pytest.raises(PackageError, match=r"\.state\.json: damaged \(models\.spleen\.enabled"):
            act()


# --- cut off, out of room, at the same time


@pytest.mark.parametrize("call", ["replace", "rename", "fsync"])
def test_a_full_disk_leaves_nothing_behind(
    call: str, installed: Library, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(installed, packed(model_id="other"))
    before = everything(installed.root)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = packed()
    with monkeypatch.context() as patched:
        match call:
            case "replace":
                patched.setattr(library.os, "replace", full)
            case "rename":
                patched.setattr(Path, "rename", full)
            case _:
                patched.setattr(importing.os, "fsync", full)
        with pytest.raises(PackageError, match=r"No space left on device; nothing was changed: make room"):
            add(installed, folder)
    assert hidden(installed) == []
    if call == "replace":  # the package is there, whole, but nothing says yet that it is enabled
        assert installed.versions("spleen") == ("1.0.0",)
        assert installed.state().of("spleen").enabled is None
    else:
        assert everything(installed.root) == before
    assert add(installed, folder).enabled


def test_a_limit_of_the_system_on_file_sizes_leaves_nothing_behind(
    installed: Library, packed: Callable[..., Path]
) -> None:
    folder = packed(content=b"w" * 400_000)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from dicom_node.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["models", "import", str(folder), "--no-self-test", "--data-dir", str(installed.root.parent)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "File too large; nothing was changed" in done.stderr and done.stderr.count("\n") == 1
    assert installed.ids() == () and hidden(installed) == []


KILLED = """
import sys, time
from pathlib import Path
from dicom_node.models.importing import import_package
from dicom_node.models.library import Library
def tested(package):
    print("testing", flush=True)
    time.sleep(60)
import_package(Library(Path(sys.argv[1])), Path(sys.argv[2]), self_test=tested)
"""


def test_an_import_that_was_killed_leaves_a_hidden_folder_that_the_next_command_deletes(
    installed: Library, packed: Callable[..., Path]
) -> None:
    folder = packed()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(installed.root), str(folder)], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"testing\n"
        assert len(hidden(installed)) == 1
        add(installed, packed(model_id="other"))  # another command meanwhile leaves the living one alone
        assert len(hidden(installed)) == 1
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=10)
    assert len(hidden(installed)) == 1 and installed.ids() == ("other",)
    assert add(installed, folder).new
    assert hidden(installed) == []


KILLED_ANYWHERE = """
import os, signal, sys
from pathlib import Path
from dicom_node.models import enabling, importing, library
from dicom_node.models.importing import import_package
from dicom_node.models.library import Library

def kill_at(number):
    calls = 0
    for name in ("fsync", "rename", "replace", "mkdir"):
        def counted(*arguments, _real=getattr(os, name), **more):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return _real(*arguments, **more)
        setattr(os, name, counted)

root, old, new = (Path(text) for text in sys.argv[1:])
for number in range(1, 100):
    lib = Library(root / str(number))
    import_package(lib, old, self_test=None)
    child = os.fork()
    if child == 0:
        kill_at(number)
        import_package(lib, new, self_test=None, enable=True)
        enabling.remove_model(lib, "spleen@1.0.0", engines={})
        os._exit(0)
    done = os.waitpid(child, 0)[1] == 0
    for name in lib.versions("spleen"):  # whatever is there is whole
        lib.load("spleen", name).check_weights()
    meant = lib.enabled("spleen")
    assert meant in lib.versions("spleen"), (number, meant)
    again = import_package(lib, new, self_test=None, enable=True)
    assert again.enabled
    left = [path.name for path in lib.root.glob(".*") if path.name not in (".lock", ".state.json")]
    assert not left, (number, left)
    if done:
        print(number)
        break
"""


def test_whatever_the_moment_of_a_kill_the_enabled_version_is_there_and_whole(
    tmp_path: Path, packed: Callable[..., Path]
) -> None:
    arguments = [str(tmp_path / "roots"), str(packed()), str(packed("2.0.0", b"new"))]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_ANYWHERE, *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 15  # moments tried


def test_two_imports_of_the_same_package_at_once_install_it_once(
    installed: Library, packed: Callable[..., Path]
) -> None:
    folder, together = packed(), threading.Barrier(4)
    outcomes: list[bool] = []

    def run() -> None:
        outcomes.append(import_package(installed, folder, self_test=lambda _: together.wait(10) and None).new)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(outcomes) == [False, False, False, True]
    assert hidden(installed) == []


def test_a_command_does_not_wait_for_ever_for_another(
    installed: Library, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(installed, packed())
    monkeypatch.setattr(library, "_LOCK_S", 0.1)
    with (installed.root / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(PackageError, match="another 'dicom-node models' command is at work"):
            disable_model(installed, "spleen")


def test_a_version_in_use_is_not_removed(
    installed: Library, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = add(installed, packed()).package
    monkeypatch.setattr(library, "_JOB_S", 0.1)
    with installed.held(package.folder) as there:
        assert there
        with pytest.raises(PackageError, match=r"spleen@1\.0\.0 is at work in a job"):
            remove_model(installed, "spleen@1.0.0", engines={}, force=True)
        package.check_weights()
        assert installed.enabled("spleen") == "1.0.0"
    remove_model(installed, "spleen@1.0.0", engines={}, force=True)
    with installed.held(package.folder) as there:
        assert not there


def test_the_state_file_is_plain_and_pins_are_complete(installed: Library, packed: Callable[..., Path]) -> None:
    folder = add(installed, packed()).package.folder
    assert json.loads((installed.root / ".state.json").read_text()) == {
        "schema": 1,
        "models": {"spleen": {"enabled": "1.0.0", "disabled": False}},
    }
    pin = json.loads((folder / PIN).read_text())
    assert pin["files"][WEIGHTS_FILE] == hashlib.sha256(b"weights").hexdigest()
    assert pin["files"]["model.yaml"] == hashlib.sha256((folder / "model.yaml").read_bytes()).hexdigest()

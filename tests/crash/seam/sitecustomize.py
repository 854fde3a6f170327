"""Kills processes of a node at named points; Python loads this by itself where PYTHONPATH names its folder.

The node has no code for this. In a process of a node that was started with TEST_KILL_FOLDER, two classes are changed
when they are imported: the calls of `store.fs.RealFileSystem`, and COMMIT on the connections of `store.database`. Each
is a point, twice: before and after. Its name says who did what for whom, so new commit points name themselves:

    node:service:after commit Jobs.lease_job       node:receiver:before link_path FolderSpool._name_for_now

`TEST_KILL_FOLDER/seen` lists the points as they are passed. The process that passes the one written in `armed` renames
that file to `fired`, which only one can, and kills itself with SIGKILL.

TEST_KILL_WALL_S in the folder's file `wall` moves what the process takes for the wall clock by so many seconds.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import os
import signal
import sqlite3
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

FOLDER = os.environ.get("TEST_KILL_FOLDER", "")
FS_CALLS = ("link", "link_path", "fsync", "fsync_dir", "fdatasync", "syncfs", "rename", "unlink")
QUIET = ("Service._checks",)  # a look whether the catalog can be written, which writes nothing

_committing = threading.local()


def _role() -> str:
    if "dicom_node.process" in sys.orig_argv:
        return sys.orig_argv[-1]
    return "supervisor" if "serve" in sys.orig_argv else ""


ROLE = _role()


def _pass(point: str) -> None:
    name = f"{os.environ.get('TEST_KILL_NODE', 'node')}:{ROLE}:{point}"
    fd = os.open(f"{FOLDER}/seen", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{name}\n".encode())
    finally:
        os.close(fd)
    try:
        with open(f"{FOLDER}/armed") as file:
            armed = file.read()
        if armed != name:
            return
        os.rename(f"{FOLDER}/armed", f"{FOLDER}/fired")
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _name_of(fn: Any) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return str(getattr(fn, "__qualname__", type(fn).__name__)).split(".<locals>")[0]


class _Connection(sqlite3.Connection):
    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        with _commit_of(sql == "COMMIT"):
            return super().execute(sql, *parameters)

    def executemany(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        with _commit_of(not self.in_transaction):  # a transaction of its own
            return super().executemany(sql, *parameters)


@contextlib.contextmanager
def _commit_of(commits: bool) -> Iterator[None]:
    names = getattr(_committing, "names", ()) if commits else ()
    for name in names:
        _pass(f"before commit {name}")
    yield
    for name in names:
        _pass(f"after commit {name}")


def _change_database(module: types.ModuleType) -> None:
    changed = types.SimpleNamespace(**vars(sqlite3))
    changed.connect = functools.partial(sqlite3.connect, factory=_Connection)
    module.sqlite3 = changed  # type: ignore[attr-defined]
    commit = module.Database._commit

    def named(self: Any, connection: sqlite3.Connection, batch: Sequence[Any]) -> None:
        names = dict.fromkeys(_name_of(piece.fn) for piece in batch)
        _committing.names = [name for name in names if not name.startswith(QUIET)]
        try:
            commit(self, connection, batch)
        finally:
            _committing.names = ()

    module.Database._commit = named


def _caller(frame: types.FrameType | None) -> str:
    """Who asked, whoever watches the calls on their way."""
    while frame is not None and frame.f_code.co_qualname.startswith("WatchedFileSystem."):
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_qualname.split(".<locals>")[0]


def _change_fs(module: types.ModuleType) -> None:
    def around(call: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def passed(self: Any, *arguments: Any, **named: Any) -> Any:
            caller = _caller(sys._getframe(1))
            _pass(f"before {call} {caller}")
            value = inner(self, *arguments, **named)
            _pass(f"after {call} {caller}")
            return value

        return passed

    for call in FS_CALLS:
        setattr(module.RealFileSystem, call, around(call, getattr(module.RealFileSystem, call)))


def _change_supervisor(module: types.ModuleType) -> None:
    module.BACKOFF_MAX_S = 0.3  # type: ignore[attr-defined]  # it waits longer for what dies again and again


def _moved_clock() -> type:
    import datetime as real

    class Moved(real.datetime):
        @classmethod
        def now(cls, tz: real.tzinfo | None = None) -> real.datetime:  # type: ignore[override]
            offset_s = 0.0
            with contextlib.suppress(FileNotFoundError, ValueError), open(f"{FOLDER}/wall") as file:
                offset_s = float(file.read())
            return real.datetime.now(tz) + real.timedelta(seconds=offset_s)

    return Moved


def _change_clock(module: types.ModuleType) -> None:
    module.datetime = _moved_clock()  # type: ignore[attr-defined]


CHANGES: dict[str, Callable[[types.ModuleType], None]] = {
    "dicom_node.store.database": _change_database,
    "dicom_node.store.fs": _change_fs,
    "dicom_node.supervisor": _change_supervisor,
    "dicom_node.clock": _change_clock,
    "dicom_node.node": _change_clock,
    "apscheduler.schedulers.base": _change_clock,
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in CHANGES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and spec.loader is not None:
            load, loader = spec.loader.exec_module, spec.loader

            def load_and_change(module: types.ModuleType) -> None:
                load(module)
                CHANGES[name](module)

            loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


if FOLDER and ROLE:
    sys.meta_path.insert(0, _Finder())

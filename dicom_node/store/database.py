"""One SQLite file shared by several processes, without the traps.

* Connections are our own: a sqlite-utils `Database(path)` may not cross threads. Readers are lent one each.
* Every writer in every process takes `catalog.lock` (flock, bounded wait) *before* BEGIN IMMEDIATE and holds it
  through COMMIT: SQLite's own busy handler is unfair to the point of starvation.
* Group commit: one writer thread per process runs whatever is queued in one transaction, each piece in a savepoint,
  so a failing piece takes only itself back.
* WAL with `synchronous=FULL`: a transaction that `write` returned from survives a power cut.

This file knows no table; `store.migrations` does.
"""

from __future__ import annotations

import fcntl
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dicom_node.errors import CatalogBusy, NodeError, StorageError

__all__ = ["Database"]

T = TypeVar("T")
Write = Callable[[sqlite3.Connection], T]

GROUP_MAX = 64  # writes per transaction: bounds how long readers of the lock wait
LOCK_WAIT_S = 10.0
READERS_KEPT = 4  # idle connections; more are opened when needed and closed after


class Database:
    """A SQLite file. `write(fn)` runs `fn(connection)` in a durable transaction; `read()` lends a reader."""

    def __init__(self, path: Path, *, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self.path = path
        self._lock_wait_s = lock_wait_s
        self._lock_fd = os.open(path.with_name("catalog.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._queue: queue.Queue[tuple[Write[Any], Future[Any]] | None] = queue.Queue(maxsize=4096)
        self._idle_readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue(maxsize=READERS_KEPT)
        self._closed = False
        self._writer = threading.Thread(target=self._run, name="catalog-writer", daemon=True)
        self._writer.start()

    # --- writing

    def write(self, fn: Write[T], timeout_s: float = 60.0) -> T:
        """Run `fn` in a transaction and return its value once the transaction is durable.

        What `fn` raises is raised here and undoes only its own changes. Raises CatalogBusy when the lock was not had or
        the transaction not done in time (it may then still be done), StorageError when SQLite cannot write (disk full,
        I/O error). `fn` may be run on another thread, and must not call `write`.
        """
        if self._closed:
            raise StorageError("the catalog is closed")
        future: Future[T] = Future()
        try:
            self._queue.put((fn, future), timeout=timeout_s)
            return future.result(timeout=timeout_s)
        except (TimeoutError, queue.Full) as exc:
            if future.done() and not future.cancelled():
                raise  # raised by `fn` itself
            future.cancel()  # skipped if it has not begun
            raise CatalogBusy(f"the catalog did not take a change within {timeout_s:g} s") from exc

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        while (first := self._queue.get()) is not None:
            batch = [first]
            stop = False
            while len(batch) < GROUP_MAX:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    stop = True
                    break
                batch.append(item)
            try:
                connection = connection or self._connect(readonly=False)
                self._commit(connection, batch)
            except Exception as exc:  # noqa: BLE001 - the writer must live; every waiter gets the error
                error = _mapped(exc)
                for _, future in batch:
                    with suppress(InvalidStateError):  # its waiter has given up, maybe at this very moment
                        future.set_exception(error)
            if stop:
                break
        if connection is not None:
            connection.close()

    def _commit(self, connection: sqlite3.Connection, batch: list[tuple[Write[Any], Future[Any]]]) -> None:
        results: list[tuple[Future[Any], Any, BaseException | None]] = []
        with self._locked():
            connection.execute("BEGIN IMMEDIATE")
            try:
                for fn, future in batch:
                    if future.set_running_or_notify_cancel():
                        results.append(_in_savepoint(connection, fn, future))
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        for future, value, error in results:
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        deadline = time.monotonic() + self._lock_wait_s
        pause = 0.0002
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise CatalogBusy(
                        f"the catalog lock was not had in {self._lock_wait_s:g} s; another process holds it"
                    ) from None
                time.sleep(pause)
                pause = min(pause * 1.5, 0.005)
        try:
            yield
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    # --- reading

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A reader of this thread's own for the block, in autocommit: fetch what is needed at once, keep no cursor.

        Readers are lent from a pool, for threads come and go with every association.
        """
        if self._closed:
            raise StorageError("the catalog is closed")
        try:
            connection = self._idle_readers.get_nowait()
        except queue.Empty:
            connection = self._connect(readonly=True)
        try:
            yield connection
        except sqlite3.Error as exc:
            raise _mapped(exc) from exc
        finally:
            self._give_back(connection)

    def _give_back(self, connection: sqlite3.Connection) -> None:
        try:
            if not self._closed:
                self._idle_readers.put_nowait(connection)
                return
        except queue.Full:
            pass
        connection.close()

    def _connect(self, *, readonly: bool) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=5.0)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA busy_timeout=5000")
        if readonly:
            connection.execute("PRAGMA query_only=ON")
        return connection

    def close(self) -> None:
        """Finish what is queued and close everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._writer.join(timeout=30.0)
        with suppress(queue.Empty):
            while True:
                self._idle_readers.get_nowait().close()
        os.close(self._lock_fd)


def _in_savepoint(
    connection: sqlite3.Connection, fn: Write[Any], future: Future[Any]
) -> tuple[Future[Any], Any, BaseException | None]:
    connection.execute("SAVEPOINT piece")
    try:
        value = fn(connection)
    except Exception as exc:
        if not connection.in_transaction:
            raise  # SQLite itself rolled everything back (disk full ...): nothing of the batch happened
        connection.execute("ROLLBACK TO piece")
        connection.execute("RELEASE piece")
        return future, None, _mapped(exc)
    connection.execute("RELEASE piece")
    return future, value, None


def _mapped(exc: BaseException) -> BaseException:
    """SQLite's own failures become StorageError; everything else stays what it is."""
    if isinstance(exc, sqlite3.OperationalError) and not isinstance(exc, NodeError):
        return StorageError(f"the catalog cannot be written or read: {exc}")
    return exc

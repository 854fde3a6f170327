"""One SQLite file shared by several processes, without the traps.

* Connections are our own: a sqlite-utils `Database(path)` may not cross threads. Readers are lent one each.
* Every writer in every process takes `catalog.lock` (`store.turns`, bounded wait) *before* BEGIN IMMEDIATE and holds it
  through COMMIT: SQLite's own busy handler is unfair to the point of starvation.
* Group commit without a writer thread: whoever finds nobody writing writes, and takes along whatever others have queued
  by then, in one transaction, each piece in a savepoint, so that a failing piece takes only itself back. A thread of
  its own would cost every object two turns of the interpreter's lock. What is done by one statement needs no savepoint,
  for SQLite does a statement wholly or not at all: `quick`.
* WAL with `synchronous=FULL`: a transaction that `write` returned from survives a power cut, unless its caller says
  that something else (the intake journal) answers for it.

This file knows no table; `store.migrations` does.
"""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dicom_node.errors import CatalogBusy, NodeError, StorageError
from dicom_node.store.damage import damaged, is_damage
from dicom_node.store.turns import Turns

__all__ = ["Database", "StepWatch"]

T = TypeVar("T")
Write = Callable[[sqlite3.Connection], T]
Quick = Callable[[sqlite3.Connection], T | None]

GROUP_MAX = 64  # writes per transaction: bounds how long readers of the lock wait
LOCK_WAIT_S = 10.0
QUEUED_MAX = 4096
_NOBODY, _SOMEBODY = 0, -1  # no thread has such a number
READERS_KEPT = 4  # idle connections; more are opened when needed and closed after
WAL_SMALL = 8 * 1024**2  # bytes above which `tidy` writes the WAL back
WAL_LARGE = 32 * 1024**2  # bytes above which writers must wait for that
TIDY_S = 0.25
_WAL_PAGES = 16_384  # 64 MiB: a committing writer writes the WAL back itself only where nobody tidies


class StepWatch(Protocol):
    """`pressure.Pressure`, as far as commits go."""

    def begin(self) -> float:
        """A step begins that somebody waits for."""
        ...

    def end(self, step: str, began: float) -> None:
        """It is durable."""
        ...

    def failed(self, step: str, exc: BaseException) -> None:
        """It is not, or what it was for has failed."""
        ...


class _Piece:
    """One write: waiting, then running, then done; or given up by its thread while it waited."""

    __slots__ = ("done", "durable", "error", "fn", "quick", "running", "turn", "value")

    def __init__(self, fn: Write[Any], durable: bool, quick: Quick[Any] | None) -> None:
        self.fn = fn
        self.quick = quick
        self.durable = durable
        self.running = self.done = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.turn = threading.Lock()  # released when it is done, or when its thread is to write
        self.turn.acquire()


class Database:
    """A SQLite file. `write(fn)` runs `fn(connection)` in a durable transaction; `read()` lends a reader."""

    def __init__(
        self,
        path: Path,
        *,
        lock_wait_s: float = LOCK_WAIT_S,
        watch: StepWatch | None = None,
        prepare: Callable[[sqlite3.Connection], object] | None = None,
    ) -> None:
        """`watch` is told how durable commits go. `prepare` is given each connection that `write` is to hand out, once:
        for what lives no longer than the connection does.
        """
        self.path = path
        self._prepare = prepare
        self._watch = watch
        self._wal = f"{os.path.realpath(path)}-wal"  # SQLite keeps it beside the file itself, not beside a link
        self._lock_wait_s = lock_wait_s
        self._turns = Turns(path.with_name("catalog.lock"), lock_wait_s)
        self._guard = threading.Lock()
        self._waiting: deque[_Piece] = deque()
        self._writer = _NOBODY  # the thread that writes, or is about to
        self._connection: sqlite3.Connection | None = None
        self._idle_readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue(maxsize=READERS_KEPT)
        self._durable = True  # how the writing connection stands
        self._behind = False  # transactions were committed that no sync followed
        self._tidier: sqlite3.Connection | None = None
        self._tidy_turns = Turns(path.with_name("catalog.lock"), lock_wait_s)  # its thread's own
        self._keeper: threading.Thread | None = None
        self._ending = threading.Event()
        self._closed = False

    # --- writing

    def write(self, fn: Write[T], timeout_s: float = 60.0, *, durable: bool = True, quick: Quick[T] | None = None) -> T:
        """Run `fn` in a transaction and return its value once the transaction is durable.

        Not `durable`: it survives the end of every process but not a power cut, until `sync` or any later durable one.

        What `fn` raises is raised here and undoes only its own changes. Raises CatalogBusy when the lock was not had or
        the transaction not done in time (it may then still be done), StorageError when SQLite cannot write (disk full,
        I/O error). `fn` may be run on another thread, and must not call `write`.

        `quick` is tried before `fn`: it does the same by one statement that changes something, the last it runs, and
        returns the value, or it changes nothing and returns None, and `fn` is run. What it raises is as what `fn` does.
        """
        me, piece = threading.get_ident(), _Piece(fn, durable, quick)
        with self._guard:
            if self._closed:
                raise StorageError("the catalog is closed")
            if self._writer == me:
                raise StorageError("a change to the catalog was asked for within another one")
            if len(self._waiting) >= QUEUED_MAX:
                raise CatalogBusy(f"{QUEUED_MAX} changes to the catalog wait already")
            self._waiting.append(piece)
            writes = not self._writer
            if writes:
                self._writer = me
        if not writes and not piece.turn.acquire(timeout=timeout_s):
            self._give_up(piece, timeout_s)
        if not piece.done:
            self._write_along(piece)
        if piece.error is not None:
            raise piece.error
        return piece.value  # type: ignore[no-any-return]

    def _give_up(self, piece: _Piece, timeout_s: float) -> None:
        """Raises CatalogBusy, unless it is this thread's turn, or all is done, at the very last moment."""
        with self._guard:
            if not piece.turn.acquire(blocking=False):
                if not piece.running:
                    self._waiting.remove(piece)
                raise CatalogBusy(f"the catalog did not take a change within {timeout_s:g} s")

    def _write_along(self, mine: _Piece) -> None:
        """Write this piece and what waits with it; whoever waits first after that goes on."""
        with self._guard:
            self._writer = threading.get_ident()
            batch = [self._waiting.popleft() for _ in range(min(GROUP_MAX, len(self._waiting)))]
            for piece in batch:
                piece.running = True
        failure: BaseException | None = StorageError("the thread that wrote was ended")
        try:
            self._connection = self._connection or self._writing()
            self._commit_as_asked(self._connection, batch)
            failure = None
        except Exception as exc:  # noqa: BLE001 - every waiter gets the error, this one too
            failure = _mapped(exc)
            if self._watch is not None:
                self._watch.failed("catalog", exc)
        finally:
            with self._guard:
                for piece in batch:
                    piece.error = failure or piece.error
                    piece.done = True
                    if piece is not mine:
                        piece.turn.release()
                self._writer = _NOBODY
                if self._waiting:
                    self._writer = _SOMEBODY  # until that thread has woken
                    self._waiting[0].turn.release()

    def _commit_as_asked(self, connection: sqlite3.Connection, batch: Sequence[_Piece]) -> None:
        durable = any(piece.durable for piece in batch)
        self._set_durable(connection, durable)
        before = connection.total_changes
        self._commit(connection, batch)
        if not durable:
            self._behind = True
        elif self._behind:
            # nothing changed, nothing written, nothing synced; what was found must be durable all the same
            if connection.total_changes == before or any(piece.error for piece in batch):
                try:
                    self.sync()
                except OSError as exc:
                    raise StorageError(f"the catalog cannot be synced: {exc.strerror}") from exc
            self._behind = False

    def _set_durable(self, connection: sqlite3.Connection, durable: bool) -> None:
        if durable is not self._durable:
            connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._durable = durable

    def _commit(self, connection: sqlite3.Connection, batch: Sequence[_Piece]) -> None:
        alone = batch[0] if len(batch) == 1 else None
        with self._turns.taken():
            before = connection.total_changes
            try:
                if alone is not None and not alone.durable and _done_quickly(connection, alone):
                    return  # one statement is a transaction of its own
                connection.execute("BEGIN IMMEDIATE")
                if alone is None:
                    for piece in batch:
                        _among_others(connection, piece)
                elif not (alone.durable and _done_quickly(connection, alone)):
                    alone.value = alone.fn(connection)
                self._make_durable(connection, connection.total_changes != before)
            except BaseException:
                self._roll_back(connection)
                raise

    def _make_durable(self, connection: sqlite3.Connection, changed: bool) -> None:
        began = self._watch.begin() if self._watch is not None and self._durable and changed else None
        connection.execute("COMMIT")
        if began is not None and self._watch is not None:
            self._watch.end("catalog", began)

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        """What cannot even be rolled back, on a disk that fails, must not stand in the way of the next transaction."""
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            pass
        if connection.in_transaction:
            connection.close()
            self._connection, self._durable = None, True

    def sync(self) -> None:
        """Make every transaction durable that `write` has returned from. Raises OSError."""
        try:
            fd = os.open(self._wal, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # all of it is in the database itself, which SQLite synced
            return
        try:
            os.fsync(fd)
        except OSError as exc:
            if self._watch is not None:
                self._watch.failed("catalog", exc)
            raise
        finally:
            os.close(fd)

    def tidy(self) -> None:
        """Write a WAL that has grown back into the database, so that no commit has to: that takes two syncs.

        Writers go on meanwhile; only a large one is brought to its end under the lock. Raises StorageError,
        CatalogBusy.
        """
        try:
            size = os.stat(self._wal).st_size
        except OSError:
            return
        if size < WAL_SMALL:
            return
        if self._tidier is None:
            self._tidier = self._connect(readonly=False)
            self._tidier.execute("PRAGMA busy_timeout=50")  # a reader in the way: the next time then
        try:
            _, pages, done = self._tidier.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if size > WAL_LARGE or pages == done:
                # nobody appends: what little came since is written too, and the WAL begins anew
                with self._tidy_turns.taken():
                    self._tidier.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as exc:
            raise _mapped(exc) from exc

    def keep_tidy(self) -> None:
        """Call `tidy` again and again, on a thread of its own, until `close`."""
        self._keeper = threading.Thread(target=self._tidy_on, name="catalog-keeper", daemon=True)
        self._keeper.start()

    def _tidy_on(self) -> None:
        while not self._ending.wait(TIDY_S):
            with suppress(NodeError):  # a commit will say what is wrong
                self.tidy()

    def checkpoint(self) -> None:
        """Write all transactions into the database file, synced. Raises StorageError, CatalogBusy."""
        turns = Turns(self.path.with_name("catalog.lock"), self._lock_wait_s)
        try:
            busy = self._checkpointed(turns)
        finally:
            turns.close()
        if busy:
            raise CatalogBusy("a reader keeps the catalog from being written back")

    def _checkpointed(self, turns: Turns) -> bool:
        with turns.taken():
            connection = self._connect(readonly=False)
            try:
                busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.Error as exc:
                raise _mapped(exc) from exc
            finally:
                connection.close()
        return bool(busy)

    # --- reading

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A reader of this thread's own for the block, in autocommit: fetch what is needed at once, keep no cursor.

        Readers are lent from a pool, for threads come and go with every association.
        """
        connection = self._reader()
        try:
            yield connection
        except sqlite3.Error as exc:
            raise _mapped(exc) from exc
        finally:
            self._give_back(connection)

    def rows(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All that one statement finds, as plain tuples: what `read` is for, with fewer steps."""
        connection = self._reader()
        try:
            cursor = connection.cursor()
            cursor.row_factory = None
            return cursor.execute(sql, parameters).fetchall()
        except sqlite3.Error as exc:
            raise _mapped(exc) from exc
        finally:
            self._give_back(connection)

    def _reader(self) -> sqlite3.Connection:
        if self._closed:
            raise StorageError("the catalog is closed")
        try:
            return self._idle_readers.get_nowait()
        except queue.Empty:
            return self._connect(readonly=True)

    def warm_up(self) -> None:
        """Open the readers that are kept, so that the first who ask need not wait and no descriptor comes later."""
        readers = [self._connect(readonly=True) for _ in range(READERS_KEPT)]
        for connection in readers:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # SQLite opens its files at first use
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
        connection.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
        connection.execute("PRAGMA busy_timeout=5000")
        if readonly:
            connection.execute("PRAGMA query_only=ON")
        return connection

    def _writing(self) -> sqlite3.Connection:
        connection = self._connect(readonly=False)
        if self._prepare is not None:
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        return connection

    def close(self) -> None:
        """Finish what is queued and close everything. Idempotent."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
        self._ending.set()
        if self._keeper is not None:
            self._keeper.join(30.0)
        deadline = time.monotonic() + 30.0
        while self._writer and time.monotonic() < deadline:
            time.sleep(0.005)
        for connection in (self._connection, self._tidier):
            if connection is not None:
                connection.close()
        with suppress(queue.Empty):
            while True:
                self._idle_readers.get_nowait().close()
        self._turns.close()
        self._tidy_turns.close()


def _done_quickly(connection: sqlite3.Connection, piece: _Piece) -> bool:
    piece.value = None if piece.quick is None else piece.quick(connection)
    return piece.value is not None


def _among_others(connection: sqlite3.Connection, piece: _Piece) -> None:
    """Run one piece of several: when it fails, only its own changes are taken back."""
    saved = False
    try:
        if _done_quickly(connection, piece):
            return
        connection.execute("SAVEPOINT piece")
        saved = True
        piece.value = piece.fn(connection)
    except Exception as exc:
        if not connection.in_transaction:
            raise  # SQLite itself rolled everything back (disk full ...): nothing of the batch happened
        if saved:
            connection.execute("ROLLBACK TO piece")
            connection.execute("RELEASE piece")
        piece.error = _mapped(exc)
        return
    connection.execute("RELEASE piece")


def _mapped(exc: BaseException) -> BaseException:
    """SQLite's own failures become StorageError; everything else stays what it is."""
    if is_damage(exc):
        return damaged(exc)
    if isinstance(exc, sqlite3.OperationalError) and not isinstance(exc, NodeError):
        return StorageError(f"the catalog cannot be written or read: {exc}")
    return exc

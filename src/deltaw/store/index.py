"""The index of a registry: names, versions, labels and their history, in SQLite or (by URL) another database.

SQLAlchemy Core, nothing that only SQLite understands but the settings of its connections. Every change is one
transaction: on SQLite BEGIN IMMEDIATE, elsewhere a row lock on `deltaw_meta`, so that writers come one after another.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    select,
)
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from deltaw.errors import RegistryError, WorkFailed

BUSY_S = 60
_MEND = "Restore it from a copy; objects/ is untouched."
_SHARE = "Whoever uses a registry must be able to write to its folder, also to read."
_SPACE = "Is there space left? Free some and run again."
_TODO = {  # what to do about SQLite's own sentences
    "malformed": _MEND, "not a database": _MEND, "unable to open": _SHARE, "readonly": _SHARE, "is full": _SPACE,
    "disk I/O error": _SPACE, "is locked": f"Another process has held it for {BUSY_S} s: run again.",
}  # fmt: skip
TABLES = MetaData()
_ID = String(64)
_NAME = String(100)
_LABEL = String(32)
_WHEN = String(20)

meta = Table("deltaw_meta", TABLES, Column("key", String(32), primary_key=True), Column("value", Text, nullable=False))
bases = Table(  # fingerprints: many adapters share one
    "deltaw_bases", TABLES,
    Column("id", _ID, primary_key=True), Column("name", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
)  # fmt: skip
adapters = Table(
    "deltaw_adapters", TABLES,
    Column("id", _ID, primary_key=True), Column("manifest", _ID, nullable=False),
    Column("method", String(32), nullable=False), Column("n_parameters", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False), Column("base", _ID, ForeignKey("deltaw_bases.id")),
)  # fmt: skip
names = Table(  # stays when its versions go, so that no number is given twice
    "deltaw_names", TABLES, Column("name", _NAME, primary_key=True), Column("last_version", Integer, nullable=False)
)
versions = Table(
    "deltaw_versions", TABLES,
    Column("name", _NAME, ForeignKey("deltaw_names.name"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("adapter", _ID, ForeignKey("deltaw_adapters.id"), nullable=False, index=True),
    Column("added", _WHEN, nullable=False), Column("provenance", Text, nullable=False),
)  # fmt: skip
_VERSION = ("deltaw_versions.name", "deltaw_versions.version")
parents = Table(
    "deltaw_parents", TABLES,
    Column("name", _NAME, primary_key=True), Column("version", Integer, primary_key=True, autoincrement=False),
    Column("parent", _ID, primary_key=True, index=True),
    ForeignKeyConstraint(["name", "version"], _VERSION),
)  # fmt: skip
labels = Table(
    "deltaw_labels", TABLES,
    Column("name", _NAME, primary_key=True), Column("label", _LABEL, primary_key=True),
    Column("version", Integer, nullable=False),
    ForeignKeyConstraint(["name", "version"], _VERSION),
)  # fmt: skip
moves = Table(  # of labels, in order; a rollback undoes the newest that is not undone
    "deltaw_moves", TABLES,
    Column("seq", Integer, primary_key=True), Column("name", _NAME, nullable=False, index=True),
    Column("label", _LABEL, nullable=False), Column("action", String(16), nullable=False),
    Column("version", Integer), Column("before", Integer), Column("at", _WHEN, nullable=False),
    Column("undone", Boolean, nullable=False),
)  # fmt: skip
gates = Table(
    "deltaw_gates", TABLES,
    Column("seq", Integer, primary_key=True), Column("name", _NAME, nullable=False),
    Column("version", Integer, nullable=False), Column("label", _LABEL, nullable=False),
    Column("command", Text, nullable=False), Column("value", Float, nullable=False),
    Column("against", Integer), Column("against_value", Float), Column("min_gain", Float), Column("min_value", Float),
    Column("passed", Boolean, nullable=False), Column("at", _WHEN, nullable=False),
    ForeignKeyConstraint(["name", "version"], _VERSION),
)  # fmt: skip


class Index:
    """A database with the tables above.

    url  SQLAlchemy's; "sqlite:///FILE" or, for example, "postgresql+psycopg://USER@HOST/DATABASE"
    """

    def __init__(self, url: str | URL) -> None:
        """Raises RegistryError: no URL, or its driver is not installed."""
        try:
            self.engine: Engine = create_engine(url, poolclass=NullPool)  # no connection outlives a call or a fork
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as problem:
            raise RegistryError(
                f"The index cannot be opened: {problem}. Check the URL, or install its driver."
            ) from None
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self.shown = make_url(url).render_as_string(hide_password=True)
        if self.is_sqlite:
            event.listen(self.engine, "connect", _settings)
            event.listen(self.engine, "begin", _begin)

    def create(self, token: str) -> str:
        """Make the tables that are missing; returns the registry's token (`token` if there was none)."""
        with self._explained():
            if self.is_sqlite:
                with self.engine.connect() as db:
                    db.connection.cursor().execute("PRAGMA journal_mode = WAL")  # kept in the file
            TABLES.create_all(self.engine)
            with self.engine.begin() as db:
                found = db.scalar(select(meta.c.value).where(meta.c.key == "token"))
                if found is None:
                    db.execute(insert(meta), [{"key": "token", "value": token}, {"key": "format", "value": "1"}])
        return found or token

    def token(self) -> str | None:
        """The token of the registry that this index belongs to; None when it has no tables."""
        with self._explained():
            if not self.engine.dialect.has_table(db := self.engine.connect(), meta.name):
                db.close()
                return None
            with db:
                return db.scalar(select(meta.c.value).where(meta.c.key == "token"))

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view of the tables; SQLite's transactions are that by themselves."""
        level = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self._explained(), self.engine.connect().execution_options(**level) as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that no other writer overlaps; it commits when the block ends well."""
        with self._explained(), self.engine.connect().execution_options(deltaw_writes=True) as db, db.begin():
            db.execute(select(meta.c.value).where(meta.c.key == "token").with_for_update())
            yield db

    def integrity(self) -> str | None:
        """What SQLite finds wrong with its file; None when it finds nothing, or the database is another one."""
        if not self.is_sqlite:
            return None
        with self.reading() as db:
            found = [row[0] for row in db.exec_driver_sql("PRAGMA integrity_check")]
        return None if found == ["ok"] else "; ".join(found[:3])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (DatabaseError, InterfaceError, sqlite3.Error) as problem:  # the last: from a pragma of our own
            cause = str(getattr(problem, "orig", None) or problem).splitlines()[0]
            todo = next((f" {what}" for sign, what in _TODO.items() if sign in cause), "")
            raise WorkFailed(f"The registry's index ({self.shown}) failed: {cause}.{todo}") from problem


def now() -> str:
    """The time, UTC, as in 2026-11-22T16:10:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def sqlite_url(root: Path) -> URL:
    """The URL of the index that lies in a registry's own folder."""
    return URL.create("sqlite", database=str(root / "index.sqlite"))


def _settings(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    cursor = connection.cursor()
    for pragma in (f"busy_timeout = {BUSY_S * 1000}", "synchronous = FULL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(db: Connection) -> None:
    writes = db.get_execution_options().get("deltaw_writes")
    db.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

"""Experiments and what was done to them, in one SQLite file: a state and the entry that explains it, or neither.

A process may die between any two writes. State and audit entry are one transaction, on disk before `save` returns, so
that a restart goes on where the last move ended, and no move is without its who and why.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from leanserve.contracts import Json
from leanserve.errors import StartupError

VERSION = 1
SCHEMA = f"""
create table experiment (name text primary key, state text not null, saved_at real not null);
create table audit (
    number integer primary key autoincrement, at real not null, experiment text not null, who text not null,
    action text not null, before text not null, after text not null
);
pragma user_version = {VERSION};
"""
MOST_EXPERIMENTS = 100
MOST_ENTRIES = 10_000


class AuditEntry(NamedTuple):
    """One thing that was done: when (seconds since the epoch), by whom, what, and the values before and after."""

    at: float
    who: str
    action: str
    before: Json
    after: Json


class ExperimentStore:
    """The last `MOST_EXPERIMENTS` experiments and `MOST_ENTRIES` audit entries. One thread."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        Raises:
            StartupError: it is no store of experiments, is damaged, is of another version, or cannot be written.
        """
        try:
            self._connection = _opened(path)
        except sqlite3.Error as error:
            raise StartupError(f"{path}: {error}; move the file away, and experiments start anew") from error

    def save(self, name: str, state: Json, entry: AuditEntry) -> None:
        """Keep the state of an experiment and the entry that explains it, both or neither."""
        before, after = json.dumps(entry.before, allow_nan=False), json.dumps(entry.after, allow_nan=False)
        with self._connection as transaction:
            transaction.execute(
                "insert or replace into experiment values (?, ?, ?)",
                (name, json.dumps(state, allow_nan=False), entry.at),
            )
            transaction.execute(
                "insert into audit (at, experiment, who, action, before, after) values (?, ?, ?, ?, ?, ?)",
                (entry.at, name, entry.who, entry.action, before, after),
            )
            _forget_the_oldest(transaction)

    def keep(self, name: str, state: Json, at: float) -> None:
        """Keep the state of an experiment to which nothing was done: its evidence has grown."""
        with self._connection as transaction:
            transaction.execute(
                "insert or replace into experiment values (?, ?, ?)", (name, json.dumps(state, allow_nan=False), at)
            )
            _forget_the_oldest(transaction)

    def load(self, name: str) -> Json | None:
        """The state that was saved last."""
        row = self._connection.execute("select state from experiment where name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    @property
    def names(self) -> list[str]:
        """All experiments, the last saved first."""
        rows = self._connection.execute("select name from experiment order by saved_at desc, rowid desc")
        return [name for (name,) in rows]

    def audit(self, name: str, most: int = 100) -> list[AuditEntry]:
        """The last entries of an experiment, the newest first."""
        rows = self._connection.execute(
            "select at, who, action, before, after from audit where experiment = ? order by number desc limit ?",
            (name, most),
        )
        return [
            AuditEntry(at, who, action, json.loads(before), json.loads(after))
            for at, who, action, before, after in rows
        ]

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _opened(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path)
    try:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        version = connection.execute("pragma user_version").fetchone()[0]
        if version == 0:
            connection.executescript(f"begin; {SCHEMA} commit;")
        elif version != VERSION:
            raise sqlite3.DatabaseError(f"the store is of version {version}, and this leanserve reads {VERSION}")
    except BaseException:
        connection.close()
        raise
    return connection


def _forget_the_oldest(transaction: sqlite3.Connection) -> None:
    transaction.execute("delete from audit where number <= (select max(number) from audit) - ?", (MOST_ENTRIES,))
    transaction.execute(
        "delete from experiment where name not in"
        " (select name from experiment order by saved_at desc, rowid desc limit ?)",
        (MOST_EXPERIMENTS,),
    )

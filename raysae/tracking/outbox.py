"""What is to be tracked, kept on disk in a SQLite file until it is sent. The file knows nothing of MLflow.

Metrics are keyed (run, key, step). The first write wins and keeps its time stamp. So steps replayed after a restart
change nothing.

Rows stay after they are sent. The file is the study's whole log, and can be sent again to another server.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

UNSENT, SENT, REFUSED = 0, 1, 2  # The server will never take what is refused
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"
STUDY = ""  # Run name of the study itself. An SAE's run is named after the SAE.

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, run_id TEXT, started INTEGER NOT NULL, ended INTEGER, status TEXT NOT NULL,
    state INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS metrics (
    run TEXT, key TEXT, step INTEGER, value REAL NOT NULL, time INTEGER NOT NULL, state INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (run, key, step));
CREATE TABLE IF NOT EXISTS params (
    run TEXT, key TEXT, value TEXT NOT NULL, state INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (run, key));
CREATE TABLE IF NOT EXISTS tags (
    run TEXT, key TEXT, value TEXT NOT NULL, state INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (run, key));
CREATE TABLE IF NOT EXISTS artifacts (
    run TEXT, path TEXT, artifact_path TEXT, state INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (run, path, artifact_path));
CREATE INDEX IF NOT EXISTS unsent_metrics ON metrics (run, time) WHERE state = 0;
"""
CONTENT = ("metrics", "params", "tags", "artifacts")
REFUSED_NAMED = 5  # Refused entries that a sentence names


class Run(NamedTuple):
    run: str
    run_id: str | None  # MLflow's id, once the run exists there
    started: int  # Milliseconds since 1970, as every time in this file
    ended: int | None
    status: str
    state: int


class Metric(NamedTuple):
    key: str
    step: int
    value: float
    time: int


def refusal(outbox: Outbox) -> str | None:
    """A sentence on what the server will never take, or None where there is nothing.

    It tells how much that is and names the first few entries.
    """
    refused = outbox.refused()
    if not refused:
        return None
    names, count = list(refused), sum(refused.values())
    more = f" and {len(names) - REFUSED_NAMED} more" if len(names) > REFUSED_NAMED else ""
    shown = ", ".join(names[:REFUSED_NAMED]) + more
    entries = "entry" if count == 1 else "entries"
    return f"MLflow has refused {count} {entries} for good, kept in {outbox.path} alone: {shown}"


class Outbox:
    """The outbox at `path`, created with its folder where missing.

    Several threads may use it. Each has a connection of its own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._db.executescript(SCHEMA)

    @property
    def _db(self) -> sqlite3.Connection:
        if not hasattr(self._local, "db"):
            # Only close() crosses threads.
            db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode=WAL")
            # The data survives the death of the process. A power cut may cost the last moments.
            db.execute("PRAGMA synchronous=NORMAL")
            self._local.db = db
            self._connections.append(db)
        return self._local.db

    def close(self) -> None:
        for db in self._connections:
            db.close()

    def _many(self, statement: str, rows: Iterable[tuple]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(statement, rows)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # ------------------------------------------------------------ writing

    def meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: str) -> None:
        self._db.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value)
        )

    def start(self, run: str, time: int) -> None:
        """Opens the run, or opens it again unless it has finished."""
        self._db.execute(
            "INSERT INTO runs (run, started, status) VALUES (?, ?, ?) "
            "ON CONFLICT (run) DO UPDATE SET status = excluded.status, ended = NULL, state = 0 "
            "WHERE status NOT IN ('RUNNING', 'FINISHED')",
            (run, time, RUNNING),
        )

    def end(self, run: str, status: str, time: int) -> None:
        """Closes the run.

        The study's end also closes the SAEs' runs that are still open. They end as KILLED, or as FAILED where the study
        failed.
        """
        self._db.execute("UPDATE runs SET status = ?, ended = ?, state = 0 WHERE run = ?", (status, time, run))
        if run == STUDY:
            others = FAILED if status == FAILED else KILLED
            self._db.execute(
                "UPDATE runs SET status = ?, ended = ?, state = 0 WHERE run != ? AND status = ?",
                (others, time, STUDY, RUNNING),
            )

    def add_metrics(self, run: str, values: Mapping[str, float], step: int, time: int) -> None:
        self._many(
            "INSERT INTO metrics (run, key, step, value, time) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            [(run, key, step, float(value), time) for key, value in values.items()],
        )

    def add_params(self, run: str, params: Mapping[str, str]) -> None:
        """Adds parameters. The first value of each stays, because MLflow refuses to change one."""
        self._many(
            "INSERT INTO params (run, key, value) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            [(run, *item) for item in params.items()],
        )

    def add_tags(self, run: str, tags: Mapping[str, str]) -> None:
        self._many(
            "INSERT INTO tags (run, key, value) VALUES (?, ?, ?) "
            "ON CONFLICT DO UPDATE SET value = excluded.value, state = 0 WHERE value != excluded.value",
            [(run, *item) for item in tags.items()],
        )

    def add_artifact(self, run: str, path: str, artifact_path: str) -> None:
        """Adds a file or folder. Adding it again sends it again, as it then is."""
        self._db.execute(
            "INSERT INTO artifacts VALUES (?, ?, ?, 0) ON CONFLICT DO UPDATE SET state = 0", (run, path, artifact_path)
        )

    def last_time(self) -> int:
        """When the study last gave a sign of life: its last metric, or the last start of a run."""
        return self._db.execute(
            "SELECT max(time) FROM (SELECT max(time) AS time FROM metrics UNION SELECT max(started) FROM runs)"
        ).fetchone()[0]

    # ------------------------------------------------------------ sending

    def runs(self) -> list[Run]:
        """Every run, the study first."""
        return [
            Run(*row)
            for row in self._db.execute(
                "SELECT run, run_id, started, ended, status, state FROM runs ORDER BY run != '', rowid"
            )
        ]

    def unsent(self) -> int:
        """How many numbers, parameters, tags, artifacts, starts and ends of runs wait to be sent."""
        return sum(
            self._db.execute(f"SELECT count(*) FROM {table} WHERE state = 0").fetchone()[0]
            for table in ("runs", *CONTENT)
        )

    def refused(self) -> dict[str, int]:
        """How many entries the server will never take, by name.

        An example is `{"metrics fvu of a": 20, "artifacts /x/y.png of the study": 1}`.
        """
        columns = {"runs": "'start or end'", "artifacts": "path"}
        found = {}
        for table in ("runs", *CONTENT):
            selected = f"SELECT {columns.get(table, 'key')} AS name, run, count(*) FROM {table}"
            query = f"{selected} WHERE state = {REFUSED} GROUP BY name, run"
            found |= {f"{table} {name} of {run or 'the study'}": count for name, run, count in self._db.execute(query)}
        return found

    def unsent_runs(self) -> set[str]:
        query = " UNION ".join(f"SELECT run FROM {table} WHERE state = 0" for table in ("runs", *CONTENT))
        return {row[0] for row in self._db.execute(query)}

    def unsent_metrics(self, run: str, limit: int) -> list[Metric]:
        query = (
            "SELECT key, step, value, time FROM metrics WHERE run = ? AND state = 0 ORDER BY time, step, key LIMIT ?"
        )
        return [Metric(*row) for row in self._db.execute(query, (run, limit))]

    def unsent_pairs(self, table: str, run: str, limit: int) -> list[tuple[str, str]]:
        """Unsent pairs of the run, in the order in which they were added.

        They are (key, value) of params and tags, and (path, artifact path) of artifacts.
        """
        columns = "path, artifact_path" if table == "artifacts" else "key, value"
        return self._db.execute(
            f"SELECT {columns} FROM {table} WHERE run = ? AND state = 0 ORDER BY rowid LIMIT ?", (run, limit)
        ).fetchall()

    def mark_metrics(self, run: str, metrics: Iterable[Metric], state: int) -> None:
        rows = [(state, run, metric.key, metric.step) for metric in metrics]
        self._many("UPDATE metrics SET state = ? WHERE run = ? AND key = ? AND step = ?", rows)

    def mark_pairs(self, table: str, run: str, pairs: Iterable[tuple[str, str]], state: int) -> None:
        """Marks pairs as `state`. A tag whose value changed while the old one was being sent stays unsent."""
        first, second = ("path", "artifact_path") if table == "artifacts" else ("key", "value")
        self._many(
            f"UPDATE {table} SET state = ? WHERE run = ? AND {first} = ? AND {second} = ?",
            [(state, run, *pair) for pair in pairs],
        )

    def mark_run(self, run: Run, state: int) -> None:
        """Marks the run as `state`.

        A run that was opened or closed while its former status was being sent stays unsent.
        """
        self._db.execute(
            "UPDATE runs SET state = ? WHERE run = ? AND status = ? AND ended IS ?",
            (state, run.run, run.status, run.ended),
        )

    def set_run_id(self, run: str, run_id: str) -> None:
        self._db.execute("UPDATE runs SET run_id = ? WHERE run = ?", (run_id, run))

    def forget(self, run: str) -> None:
        """Makes everything of the run unsent again and forgets its MLflow run.

        The server has lost it, or another server is to have it.
        """
        self._db.execute("UPDATE runs SET run_id = NULL, state = 0 WHERE run = ?", (run,))
        for table in CONTENT:
            self._db.execute(f"UPDATE {table} SET state = 0 WHERE run = ?", (run,))

"""URLs of databases, and the files of SQLite's.

In such a URL `%xx` stands for a character and `?` ends the path. Here, and nowhere else, a path becomes a URL and back.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

from raysae.borders import border
from raysae.config import UserError
from raysae.storage import check_folder, local_path
from raysae.tracking.tags import STUDY_TAG

SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)([^?]*)(.*)", re.DOTALL)  # Scheme, path, options
HEAD = b"SQLite format 3\0"  # First bytes of every SQLite file


def database_url(file: Path) -> str:
    """The URL of a SQLite file.

    A quoted path gets another scheme of the same meaning. With the first one, MLflow makes a folder named as in the
    URL.
    """
    path = str(file).replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{path}" if path == str(file) else f"sqlite+pysqlite:///{path}"


def database_file(uri: str) -> Path | None:
    """The file of a SQLite URL, or None for any other tracking URI.

    Raises:
        UserError: the path begins with `~`, and there is no such home folder.
    """
    found = SQLITE.fullmatch(uri)
    return local_path("tracking.uri", unquote(found[2])) if found else None


def absolute(uri: str, base: Path | None = None) -> str:
    """A tracking URI whose file has its full path, so that the data goes to one file from whatever folder it is sent.

    Args:
        base: the folder that a relative path begins at. None: the present one.
    """
    file = database_file(uri)
    if file is None:
        return uri
    return database_url((base or Path.cwd()) / file) + SQLITE.fullmatch(uri)[3]


def check_database(uri: str) -> None:
    """Check that a sweep could track to this database. A server need not answer now: it may come back.

    Raises:
        UserError: the path is not quoted, the file is no database or cannot be written, or a driver is missing.
    """
    file = database_file("sqlite:///" if uri == "sqlite://" else uri)
    if file is None:
        if not uri.startswith(("http", "databricks")):
            from sqlalchemy.engine import make_url

            with border("tracking.uri", uri, "whose driver cannot be loaded", "install it, or give sqlite:///FILE"):
                make_url(uri).get_dialect().import_dbapi()
        return
    literal = Path(uri.partition(":///")[2])
    if file.name in ("", ":memory:"):
        raise UserError(f"tracking.uri is {uri}, which names no file: give sqlite:///FILE")
    if literal != file and literal.parent.is_dir() and not file.parent.is_dir():
        raise UserError(
            f"tracking.uri is {uri}, which names the file {file}: in a URL write %25 for % and %3F for ?, "
            f"here {database_url(literal)}"
        )
    check_folder("tracking.uri", uri, file.parent)
    if not file.exists():
        return
    fault, instead = "which cannot be used", "name another file as sqlite:///FILE"
    with border("tracking.uri", uri, fault, instead), file.open("r+b") as database:
        if database.read(len(HEAD)) not in (HEAD, b""):
            raise UserError(f"tracking.uri is {uri}, which is no SQLite file: {instead}")


def refuse_unknown(uri: str, which: str | None) -> None:
    """Look for a study or run in a SQLite file by its tables alone, because MLflow's import takes seconds.

    A table that is not as in MLflow 3 tells nothing. Then MLflow has to say.

    Raises:
        UserError: there is no such file, or it holds neither a study nor a run of this name.
    """
    file = database_file(absolute(uri))
    if file is None:
        return
    if not file.is_file():
        raise UserError(
            f"tracking.uri is {uri}: there is no such database. Train SAEs first, or name the database of your sweeps."
        )
    if which is None:
        return
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            studies = database.execute("SELECT DISTINCT value FROM tags WHERE key = ?", (STUDY_TAG,)).fetchall()
            runs = database.execute("SELECT run_uuid FROM runs WHERE run_uuid = ?", (which,)).fetchall()
    except sqlite3.Error:
        return
    if (which,) not in studies and not runs:
        raise unknown(uri, which)


def unknown(uri: str, which: str) -> UserError:
    """The error for a sweep that is not in MLflow."""
    return UserError(f"sweep is {which}, which is neither a run id nor a study with saved SAEs in {uri}")

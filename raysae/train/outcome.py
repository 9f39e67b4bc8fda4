"""What a finished SAE leaves behind: a folder with its files and `outcome.json`.

`outcome.json` is written last. It says how the SAE ended and holds every report.

All files have checksums. If one is damaged, the SAE counts as not ended. It is trained anew, and comes out the same.
"""

from __future__ import annotations

import logging
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from raysae.config import UserError
from raysae.sae.base import SAE
from raysae.sae.files import load_sae, save_sae
from raysae.storage import PARTIAL, inside, open_location, sealed, unsealed, write_atomically

log = logging.getLogger(__name__)

FILE = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """How an SAE ended: `done`, `stopped` (early, by the scheduler) or `failed`.

    `message` says why it is not done. `mean` is the mean of the raw rows it was trained on, `(d,)`. Ablation puts it in
    place of activations.
    """

    state: str
    tokens: int
    mean: list[float]
    message: str | None = None
    reports: list[dict] = field(default_factory=list)
    saved: bool = False  # Whether the SAE's files are there


class Outcomes:
    """The folder of one study's ended SAEs, local or any URL fsspec knows: `<folder>/<name>/`."""

    def __init__(self, folder: str) -> None:
        self.files, self.folder = open_location("output", str(folder))

    def save(self, name: str, outcome: Outcome, sae: SAE | None = None, metadata: dict | None = None) -> None:
        """Write the `sae`, if there is one, in SAELens's format, then the outcome.

        The outcome comes last, because a folder without one counts for nothing.
        """
        folder = f"{self.folder}/{name}"
        for leftover in inside(self.files, folder, f".*{PARTIAL}"):  # Files of a process that died while it wrote here
            with suppress(FileNotFoundError):  # A process given up for dead may still run and finish it first
                self.files.rm_file(leftover)
        if sae is not None:
            with tempfile.TemporaryDirectory() as temporary:
                save_sae(sae, temporary, metadata or {})
                for path in sorted(Path(temporary).iterdir()):
                    write_atomically(self.files, f"{folder}/{path.name}", path.read_bytes())
        write_atomically(self.files, f"{folder}/{FILE}", sealed(asdict(replace(outcome, saved=sae is not None))))

    def load(self, name: str) -> Outcome | None:
        """How the SAE `name` ended, or None where it has not.

        A damaged file in its folder also gives None, and a warning names it.
        """
        folder = f"{self.folder}/{name}"
        self.files.invalidate_cache()
        if not self.files.exists(f"{folder}/{FILE}"):
            return None
        try:
            outcome = Outcome(**unsealed(self.files.cat_file(f"{folder}/{FILE}"), f"{folder}/{FILE}"))
            if outcome.saved:
                load_sae(folder if isinstance(self.files, LocalFileSystem) else self.files.unstrip_protocol(folder))
        except UserError as error:
            log.warning("%s. %s is trained anew.", error, name)
            return None
        return outcome

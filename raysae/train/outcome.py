"""What a finished SAE leaves behind: a folder with the SAE's files and, written last, `outcome.json`: how it ended and every report.

All files have checksums. Where one is damaged the SAE counts as not ended: it is trained anew, and comes out the same.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from raysae.config import UserError
from raysae.sae.base import SAE
from raysae.sae.files import load_sae, save_sae
from raysae.storage import PARTIAL, sealed, unsealed, write_atomically

log = logging.getLogger(__name__)

FILE = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """How an SAE ended: `done`, `stopped` (early, by the scheduler) or `failed`; `message` says why where it is not done.

    `mean` is that of the raw rows it was trained on, `(d,)`: what ablation puts in place of activations.
    """

    state: str
    tokens: int
    mean: list[float]
    message: str | None = None
    reports: list[dict] = field(default_factory=list)
    saved: bool = False  # whether the SAE's files are there


class Outcomes:
    """The folder of one study's ended SAEs, local or any URL fsspec knows: `<folder>/<name>/`."""

    def __init__(self, folder: str) -> None:
        self.files, self.folder = fsspec.core.url_to_fs(str(folder))

    def save(self, name: str, outcome: Outcome, sae: SAE | None = None, metadata: dict | None = None) -> None:
        """Write the `sae` (where there is one) in SAELens's format, then the outcome: a folder without one counts for nothing."""
        folder = f"{self.folder}/{name}"
        for leftover in self.files.glob(f"{folder}/.*{PARTIAL}"):  # of a process that died while it wrote here
            self.files.rm_file(leftover)
        if sae is not None:
            with tempfile.TemporaryDirectory() as temporary:
                save_sae(sae, temporary, metadata or {})
                for path in sorted(Path(temporary).iterdir()):
                    write_atomically(self.files, f"{folder}/{path.name}", path.read_bytes())
        write_atomically(self.files, f"{folder}/{FILE}", sealed(asdict(replace(outcome, saved=sae is not None))))

    def load(self, name: str) -> Outcome | None:
        """How the SAE `name` ended; None where it has not, or where something in its folder is damaged: that is named in a warning."""
        folder = f"{self.folder}/{name}"
        self.files.invalidate_cache()
        if not self.files.exists(f"{folder}/{FILE}"):
            return None
        try:
            outcome = Outcome(**unsealed(self.files.cat_file(f"{folder}/{FILE}"), f"{folder}/{FILE}"))
            if outcome.saved:
                load_sae(folder if isinstance(self.files, LocalFileSystem) else self.files.unstrip_protocol(folder))
        except UserError as error:
            log.warning("%s; %s is trained anew", error, name)
            return None
        return outcome

"""What a finished SAE leaves behind: a folder with the SAE's files and, written last, `outcome.json`: how it ended and every report."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import fsspec

from raysae.sae.base import SAE
from raysae.sae.files import save_sae
from raysae.train.checkpoint import write_atomically

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


class Outcomes:
    """The folder of one study's ended SAEs, local or any URL fsspec knows: `<folder>/<name>/`."""

    def __init__(self, folder: str) -> None:
        self.files, self.folder = fsspec.core.url_to_fs(str(folder))

    def save(self, name: str, outcome: Outcome, sae: SAE | None = None, metadata: dict | None = None) -> None:
        """Write the `sae` (where there is one) in SAELens's format, then the outcome: a folder without one counts for nothing."""
        folder = f"{self.folder}/{name}"
        if sae is not None:
            with tempfile.TemporaryDirectory() as temporary:
                save_sae(sae, temporary, metadata or {})
                for path in sorted(Path(temporary).iterdir()):
                    write_atomically(self.files, f"{folder}/{path.name}", path.read_bytes())
        write_atomically(self.files, f"{folder}/{FILE}", json.dumps(asdict(outcome)).encode())

    def load(self, name: str) -> Outcome | None:
        """How the SAE `name` ended; None where it has not."""
        path = f"{self.folder}/{name}/{FILE}"
        self.files.invalidate_cache()
        return Outcome(**json.loads(self.files.cat_file(path))) if self.files.exists(path) else None

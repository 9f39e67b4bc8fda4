"""The SAEs under analysis: those of a sweep, which MLflow finds, or any that the user names, in any known format."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from raysae.analysis.lab.tasks import device
from raysae.borders import border
from raysae.config import AnalysisConfig, SAEConfig, UserError, digest, error_kind
from raysae.knobs import from_flat
from raysae.sae.base import SAE
from raysae.sae.files import OWN
from raysae.sae.importers import FILES, NamedSAE, folder_of, load_any
from raysae.sae.origins import UNKNOWN, Origin
from raysae.storage import file_system
from raysae.tracking.find import TrackedSAE, find_saes


@dataclass(frozen=True)
class Subject:
    """An SAE under analysis.

    Args:
        name: differs from the names of the lab's other SAEs.
        where: its folder, file or URL.
        hook_point: what it was trained on.
        width: latents.
        content: a digest of its files.
        run_id: its run in MLflow. None for an SAE that MLflow does not know.
        params: the run's parameters, or hook point, width and place.
        metrics: the run's metrics.
        d_in: width of the activations that it takes. None for an SAE of a sweep.
        origin: what its files say of its activations.
    """

    name: str
    where: str
    hook_point: str
    width: int
    content: str
    run_id: str | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    d_in: int | None = None
    origin: Origin = UNKNOWN

    @property
    def config(self) -> SAEConfig:
        """The knobs that a sweep trained it with."""
        return from_flat(SAEConfig, self.params)

    def load(self) -> SAE:
        """The folded SAE, on the GPU that Ray has given this process, if any."""
        return load_any(self.where, self.hook_point).sae.to(device())


def find(config: AnalysisConfig) -> list[tuple[str, TrackedSAE | None]]:
    """Where the SAEs are, and what MLflow knows of them.

    Raises:
        UserError: there is no such sweep or SAE.
    """
    if not config.sae:
        return [(str(tracked.folder), tracked) for tracked in find_saes(config.tracking, config.sweep)]
    found: list[tuple[str, TrackedSAE | None]] = []
    for name in config.sae:
        path = os.path.expanduser(name)
        if "://" in name or os.path.exists(path):
            found.append((name if "://" in name else os.path.realpath(path), None))
        else:
            try:
                found += [(str(tracked.folder), tracked) for tracked in find_saes(config.tracking, name)]
            except UserError as error:
                raise UserError(f"--sae {name} is neither a file or folder, nor in MLflow: {error}") from None
    return found


def _loaded(where: str, given: str | None) -> NamedSAE:
    """The SAE at the hook point that its files name. The hook point `given` counts where they name none."""
    with border("sae", where, "which cannot be loaded", "name a folder, file or URL of a saved or public SAE"):
        try:
            return load_any(where)
        except UserError:
            if given is None:
                raise
            return load_any(where, given)


def subjects_of(config: AnalysisConfig, found: Sequence[tuple[str, TrackedSAE | None]]) -> tuple[Subject, ...]:
    """The SAEs found that are of the hook points in `config`, each with a name of its own.

    Raises:
        UserError: an SAE was trained on an error, or none is of these hook points.
    """
    subjects: dict[str, Subject] = {}
    known: set[str] = set()
    given = config.hook_points[0] if len(config.hook_points) == 1 and config.sae else None
    for where, tracked in found:
        if tracked:
            hook_point, width, name = tracked.hook_point, tracked.width, tracked.name
            d_in, origin = None, UNKNOWN
        else:
            loaded = _loaded(where, given)
            hook_point, width, name = loaded.sae.config.hook_point, loaded.sae.n, loaded.name
            d_in, origin = loaded.sae.d_in, loaded.origin
        known.add(hook_point)
        if config.hook_points and hook_point not in config.hook_points:
            continue
        if error_kind(hook_point)[0]:
            raise UserError(
                f"{name} was trained on an error, {hook_point}, and analyses take SAEs of activations. "
                "Compare such SAEs with jobs/error_saes.py."
            )
        while name in subjects:
            name += "+"
        params = tracked.params if tracked else {"hook_point": hook_point, "width": str(width), "where": where}
        run_id, metrics = (tracked.run_id, tracked.metrics) if tracked else (None, {})
        content = content_of(where)
        subjects[name] = Subject(name, where, hook_point, width, content, run_id, params, metrics, d_in, origin)
    if not subjects:
        there = sorted(known)
        others = f", there are some of {', '.join(there)}" if there else ""
        raise UserError(f"hook_points is {', '.join(config.hook_points)}: no SAE is of it{others}")
    return tuple(subjects.values())


def content_of(where: str) -> str:
    """A digest that tells an SAE's files from others.

    It is that of our own description, which has the files' checksums. Files without one count by name, size and time.
    Among them is the file that `where` names, whatever its name.
    """
    files, path = file_system(where)
    whole = files.isdir(path)
    folder = path if whole else folder_of(PurePosixPath(path))
    if files.exists(f"{folder}/{OWN}"):
        return hashlib.sha256(files.cat_file(f"{folder}/{OWN}")).hexdigest()[:16]
    paths = dict.fromkeys([*(f"{folder}/{name}" for name in FILES), *([] if whole else [path])])
    facts = [files.info(file) for file in paths if files.exists(file)]
    return digest([[str(fact.get(key)) for key in ("name", "size", "mtime", "ETag", "LastModified")] for fact in facts])

"""Loads autoencoders that others have trained. `load_any` tells the layout by the files in a folder (`layouts`).

A loaded SAE reconstructs as its owner's code does, up to rounding. If the encoder takes x itself, W_enc·b_dec goes into
b_enc. Norms of decoder rows move into the encoder, so W_dec's rows have norm 1. A TopK keeps its norms, because moving
them would change which latents it selects. The exception is a TopK of SAELens that ranks with the norms already.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from raysae.config import ARCHITECTURES, SAEConfig, TrainConfig, UserError
from raysae.sae.architectures import build
from raysae.sae.base import SAE
from raysae.sae.files import CONFIG, OWN, WEIGHTS, load_sae
from raysae.sae.layouts import (
    DICTIONARY,
    DICTIONARY_CONFIG,
    GEMMA_2,
    GEMMA_3,
    LLAMA_SCOPE,
    LLAMA_SCOPE_CONFIG,
    READERS,
    SPARSIFY,
    Parts,
    Source,
    openai,
)
from raysae.sae.origins import Origin
from raysae.storage import file_system, local_path

FILES = (
    OWN, CONFIG, WEIGHTS, SPARSIFY, GEMMA_2, GEMMA_3, DICTIONARY, DICTIONARY_CONFIG, LLAMA_SCOPE_CONFIG, LLAMA_SCOPE,
)  # fmt: skip
FOLDERS = {PurePosixPath(name).parts[0] for name in FILES if "/" in name}  # Folders inside an SAE's folder


class NamedSAE(NamedTuple):
    """A folded autoencoder for raw activations, a name that tells it from others, and what its files say.

    The name is safe as a file name.
    """

    name: str
    sae: SAE
    origin: Origin


def load_any(where: str | Path, hook_point: str | None = None) -> NamedSAE:
    """Loads the autoencoder in a folder.

    Args:
        where: A folder, or a file in it. Local, or a URL (s3://…, hf://…).
        hook_point: Where its activations come from, e.g. `resid_post.3`. It overrides what the files say. It is needed
            if they say nothing.

    Raises:
        UserError: There is nothing at `where`, or no SAE, or no known hook point. Or raysae lacks its architecture. Or
            tensors are missing, damaged, or of shapes that do not fit each other.
    """
    where = str(where)
    if "://" in where:
        with tempfile.TemporaryDirectory() as folder:
            file = _fetch(where, Path(folder))
            return _load(Source(Path(folder), where, _places(where.split("://")[1])), file, hook_point)
    path = local_path("sae", where)
    if not path.exists():
        raise UserError(f"{where}: there is no such file or folder")
    file = path.name if path.is_file() else None
    return _load(Source(folder_of(path) if file else path, where, _places(path.resolve())), file, hook_point)


def folder_of(file: Path | PurePosixPath) -> Path | PurePosixPath:
    """The SAE's folder of a file in it."""
    return file.parent.parent if file.parent.name in FOLDERS else file.parent


def _fetch(url: str, folder: Path) -> str | None:
    """Copies an SAE's files to `folder`. Returns the name of the file that the URL names, None where it is a folder."""
    files, path = file_system(url)
    at = PurePosixPath(path)
    file = None if files.isdir(path) else at.name
    source = at if file is None else folder_of(at)
    for name in {*FILES, *([file] if file else [])}:
        if files.exists(str(source / name)):
            (folder / name).parent.mkdir(exist_ok=True)
            files.get_file(str(source / name), str(folder / name))
    return file


def _places(path: str | Path) -> tuple[str, ...]:
    known = {*(PurePosixPath(name).name for name in FILES), *FOLDERS, "/"}
    return tuple(part for part in PurePosixPath(path).parts if part not in known)


def _load(source: Source, file: str | None, hook_point: str | None) -> NamedSAE:
    """Reads the SAE in the source's folder. `file` is the name of the file in it that the user named, if any."""
    has = {name for name in FILES if (source.folder / name).exists()}
    if OWN in has:
        sae = load_sae(source.folder)
        model = source.section(source.optional_json(CONFIG), "metadata").get("model_name")
        if hook_point is not None:
            sae.config = sae.config.model_copy(update={"hook_point": hook_point})
        return NamedSAE(sae.config.name, sae, Origin(sae.config.hook_point, model=model))
    if file and file.endswith(".pt") and file != DICTIONARY:
        parts = openai(source, file)
        return NamedSAE(_name(source.places[-3:]), _assemble(parts, source.where, hook_point), parts.origin)
    for needed, read, depth in READERS:
        if needed <= has:
            parts = read(source)
            return NamedSAE(_name(source.places[-depth:]), _assemble(parts, source.where, hook_point), parts.origin)
    raise UserError(
        f"{source.where} is not a saved SAE. Name a folder that has {OWN} (raysae), {CONFIG} and {WEIGHTS} (SAELens), "
        f"{CONFIG} and {SPARSIFY} (sparsify), {GEMMA_2} or {GEMMA_3} (Gemma Scope), {DICTIONARY} and "
        f"{DICTIONARY_CONFIG} (dictionary_learning), {LLAMA_SCOPE_CONFIG} and {LLAMA_SCOPE} (Llama Scope), or a file "
        "N.pt of OpenAI's"
    )


def _name(places: tuple[str, ...]) -> str:
    return "_".join(re.sub(r"[^\w.-]", "-", place) for place in places).removesuffix(".pt")


@torch.no_grad()
def _assemble(parts: Parts, where: str, hook_point: str | None) -> SAE:
    missing = [parts.names[name] for name, tensor in parts.tensors.items() if tensor is None]
    if missing:
        raise UserError(
            f"{where} lacks the tensor{'s' * (len(missing) > 1)} {', '.join(missing)}, "
            f"which {parts.architecture} SAEs have"
        )
    tensors = {name: tensor.double() for name, tensor in parts.tensors.items()}
    _check_shapes(tensors, parts.names, where)
    hook_point = hook_point or parts.origin.hook_point
    if hook_point is None:
        raise UserError(
            f"{where} does not say where its activations come from, or raysae does not know the place: "
            "name its hook point, e.g. resid_post.3"
        )
    n, d = tensors["W_dec"].shape
    by_k = ARCHITECTURES[parts.architecture].level == "k"
    if by_k and (not isinstance(parts.k, int) or not 0 < parts.k <= n):
        raise UserError(
            f"{where}: k is {parts.k}, but a {parts.architecture} SAE of {n} latents needs a number from 1 to {n}"
        )
    # A learning rate and a coefficient must be given. They belong to training and have no use here.
    level = ARCHITECTURES[parts.architecture].pick(k=parts.k, sparsity=0)
    config = SAEConfig(architecture=parts.architecture, hook_point=hook_point, width=n, learning_rate=1, **level)
    sae = build(config, d, TrainConfig()).requires_grad_(False).double()  # Rounding happens once, at the end
    sae.restore(tensors)
    if not parts.subtracts_b_dec:
        sae.subtract_b_dec_()
    sae.W_enc.mul_(parts.input_factor)
    sae.W_dec.div_(parts.input_factor)
    sae.b_dec.div_(parts.input_factor)
    if not by_k or parts.by_decoder_norm:
        sae.unit_decoder_rows_()
    return sae.float()


def _check_shapes(tensors: dict[str, Tensor], names: Mapping[str, str], where: str) -> None:
    if tensors["W_dec"].ndim != 2:
        raise UserError(f"{where}: {names['W_dec']} has {tensors['W_dec'].ndim} dimensions, but a decoder has 2")
    n, d = tensors["W_dec"].shape
    for name, tensor in tensors.items():
        shape = {"W_enc": (n, d), "W_dec": (n, d), "b_dec": (d,)}.get(name, (n,))
        if tuple(tensor.shape) != shape:
            found = " × ".join(map(str, tensor.shape)) or "a single number"
            raise UserError(
                f"{where}: {names[name]} is {found}, which does not fit a decoder of {n} latents and {d} dimensions"
            )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {names[name]} has numbers that are not finite")

"""Language models in .gguf files, the format of llama.cpp.

A file is unpacked once, by transformers' loader, into a folder of safetensors, configuration and tokenizer. Everything
else reads that folder. Quantised weights become bfloat16, others keep their format. transformers knows fewer
architectures in this format than llama.cpp does.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from raysae.borders import border
from raysae.config import UserError, digest
from raysae.processes import apart
from raysae.storage import local_path

UNPACKED = Path("~/.cache/raysae/models")
PLAIN_FORMATS = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}  # gguf names them so


def unpacked(file: Path) -> Path:
    """The folder of the model in a .gguf file. It is made now if it is not there, or if the file has changed.

    Raises:
        UserError: there is no such file, transformers cannot load it, or a package or the home folder is missing.
    """
    if not file.is_file():
        raise UserError(f"model.name is '{file}': there is no such file")
    if missing := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
        raise UserError(
            f"model.name is '{file}', and .gguf files need the package {missing[0]}: pip install 'raysae[gguf]'"
        )
    about = file.stat()
    key = [str(file.resolve()), about.st_size, about.st_mtime_ns, version("transformers"), version("gguf")]
    folder = local_path("the folder for unpacked .gguf files", str(UNPACKED)) / f"{file.stem}-{digest(key)}"
    if not folder.is_dir():
        print(f"Unpacking {file.name} once, to {folder}", file=sys.stderr, flush=True)
        apart(unpack, file, folder)
    return folder


def unpack(file: Path, folder: Path) -> None:
    """Write the model of a .gguf file to `folder`, which appears whole or not at all.

    Raises:
        UserError: transformers cannot load the file.
    """
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    try:
        with border("model.name", f"'{file}'", f"which cannot be unpacked to {folder}"):
            part.mkdir(parents=True)
            _write(file, part)
            if not folder.is_dir():  # Another process may have been faster
                os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(file: Path, folder: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    formats = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    dtype = PLAIN_FORMATS.get(formats.pop(), "bfloat16") if len(formats) == 1 else "bfloat16"
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
    tensors: dict[int, str] = {}  # Tied weights are one tensor under several names: the first is saved
    for name, tensor in model.state_dict().items():
        tensors.setdefault(tensor.data_ptr(), name)
    state = {name: model.state_dict()[name].contiguous() for name in tensors.values()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)

"""The per-token table of an SAE: one Parquet file, a row per token, read back as a pandas DataFrame.

token, position, context: the token's id, its position and its context's index.
token_loss: nats, of the prediction made at the position, of the next token. NaN at a context's last position. The
    column is absent where the loss was not recorded.
x_norm, error_norm, linear_norm, nonlinear_norm: ‖x‖², ‖e‖², ‖ê‖², ‖ε‖².
l0: number of active latents.
latents, values: lists, sparse. They hold the indices of the active latents and how active they are.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raysae.analysis.instruments.activations import Activations, Chunk, encoded
from raysae.analysis.instruments.regression import Linear
from raysae.config import UserError
from raysae.sae.base import SAE, Codes


@torch.no_grad()
def write_per_token(
    activations: Activations,
    hook_point: str,
    sae: SAE,
    probe: Linear,
    path: str | Path,
    split: str = "C",
    latents: bool = True,
) -> Path:
    """Writes the table of the folded `sae` and its `probe` (x → ê) to `path`.

    Each chunk becomes a row group. The file appears whole or not at all. `latents` adds the columns latents and values.

    Raises:
        UserError: the split has no rows.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    writer = None
    try:
        for chunk in activations.chunks(split):
            table = _table(chunk, hook_point, sae, probe, latents)
            writer = writer or pq.ParquetWriter(part, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is None:
            raise UserError(f"split {split} of the activations has no rows: there is no per-token table to write")
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def read_per_token(path: str | Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Reads the table, or some of its columns.

    Raises:
        UserError: there is no file at `path`.
    """
    try:
        return pd.read_parquet(path, columns=None if columns is None else list(columns))
    except FileNotFoundError:
        raise UserError(f"the per-token table {path} does not exist: jobs/per_token_scaling.py writes it") from None


def _table(chunk: Chunk, hook_point: str, sae: SAE, probe: Linear, latents: bool) -> pa.Table:
    x = chunk.x[hook_point]
    reconstruction, counts, indices, values = [], [], [], []
    for _, codes in encoded(sae, x):
        reconstruction.append(sae.decode(codes).double().to(x.device))
        count, index, value = _active(codes)
        counts.append(count)
        indices.append(index)
        values.append(value)
    l0 = np.concatenate(counts)
    e = x.double() - torch.cat(reconstruction)
    linear = probe(x)
    columns: dict[str, object] = {
        "token": chunk.token.int(),
        "position": chunk.position.int(),
        "context": chunk.context.int(),
    }
    if chunk.token_loss is not None:
        columns["token_loss"] = chunk.token_loss
    for name, part in (("x", x.double()), ("error", e), ("linear", linear), ("nonlinear", e - linear)):
        columns[f"{name}_norm"] = part.square().sum(1).float()
    columns = {name: column.numpy() for name, column in columns.items()} | {"l0": l0.astype(np.int32)}
    if latents:
        offsets = pa.array(np.concatenate([[0], np.cumsum(l0)]), pa.int32())
        columns["latents"] = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(indices).astype(np.int32)))
        columns["values"] = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values).astype(np.float32)))
    return pa.table(columns)


def _active(codes: Codes | Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many latents are active on each row, (b,), and their indices and values.

    Indices and values come row after row, with indices ascending within a row.
    """
    if isinstance(codes, Codes):
        indices, order = codes.indices.sort(1)
        values = codes.values.gather(1, order)
    else:
        values, indices = codes, torch.arange(codes.shape[1], device=codes.device).expand(codes.shape)
    active = values > 0
    return active.sum(1).cpu().numpy(), indices[active].cpu().numpy(), values[active].cpu().numpy()

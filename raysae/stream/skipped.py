"""The shards that a study goes without: written down before anyone passes over one, so that every SAE of it skips the same ones, whatever restarts.

What that means for positions: nothing moves. A global row stays step × batch, and the rows of a skipped shard keep their numbers; a step whose batch
has such a row in it trains no SAE, and counts as done. So SAEs of the same study stay in step, and a schedule ends where it would have ended.
"""

from __future__ import annotations

import fsspec

from raysae.config import UserError
from raysae.storage import sealed, unsealed, write_atomically

FILE = "skipped.json"  # in the study's folder
SHARE = 0.1  # of a stream's shards at most, or one: where more are bad it is not the text that should go


class Skipped:
    """Per stream the shards that are skipped, each with its reason and contexts; kept in `file`, a path or URL, if one is given. UserError: it is
    damaged; SAEs would then not skip what those before them have skipped."""

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.shards: dict[str, dict[str, dict]] = {}  # stream → shard (JSON has no other keys than strings) → {reason, contexts}
        if file:
            files, path = fsspec.core.url_to_fs(file)
            if files.exists(path):
                try:
                    self.shards = unsealed(files.cat_file(path), file)
                except UserError as error:
                    raise UserError(f"{error}; put back a copy of it, or begin a new study: which shards this one skips is not known") from error

    def of(self, stream: str) -> set[int]:
        return {int(shard) for shard in self.shards.get(stream, {})}

    def add(self, stream: str, shard: int, shards: int, reason: str, contexts: list[int]) -> bool:
        """Skip a shard of a stream of `shards`; False, and nothing is done, where too many are skipped already.

        UserError, and nothing is done: it cannot be written down.
        """
        if len(self.of(stream)) >= max(1, SHARE * shards):
            return False
        shards_of = self.shards.get(stream, {}) | {str(shard): {"reason": reason, "contexts": contexts}}
        skipped = self.shards | {stream: shards_of}
        if self.file:
            files, path = fsspec.core.url_to_fs(self.file)
            write_atomically(files, path, sealed(skipped))
        self.shards = skipped  # not before it is on disk
        return True

"""The shards that a study goes without.

A skipped shard is written down before anyone passes over it. So every SAE of the study skips the same shards, whatever
restarts.

Positions do not move. A global row stays step × batch size, and the rows of a skipped shard keep their numbers. A step
whose batch has such a row trains no SAE and counts as done. So SAEs of the same study stay in step, and a schedule ends
where it would have ended.
"""

from __future__ import annotations

from raysae.config import UserError
from raysae.storage import open_location, sealed, unsealed, write_atomically

FILE = "skipped.json"  # Name of the file in the study's folder
SHARE = 0.1  # Largest share of a stream's shards to skip, or one shard. If more are bad, the text is not at fault


class Skipped:
    """The skipped shards of each stream, each with its reason and contexts.

    They are kept in `file`, a path or URL, if one is given.

    Raises:
        UserError: the file is damaged. SAEs would then not skip what those before them have skipped.
    """

    def __init__(self, file: str | None) -> None:
        self.file = file
        # Stream → shard → {reason, contexts}. Shards are strings, because JSON has no other keys
        self.shards: dict[str, dict[str, dict]] = {}
        if file:
            files, path = open_location("output", file)
            if files.exists(path):
                try:
                    self.shards = unsealed(files.cat_file(path), file)
                except UserError as error:
                    raise UserError(
                        f"{error}, so the skipped shards are unknown. Put back a copy of it, or begin a new study"
                    ) from error

    def of(self, stream: str) -> set[int]:
        return {int(shard) for shard in self.shards.get(stream, {})}

    def add(self, stream: str, shard: int, shards: int, reason: str, contexts: list[int]) -> bool:
        """Skip a shard of a stream that has `shards` shards.

        Returns:
            whether the shard is skipped. Nothing is done if too many are skipped already.

        Raises:
            UserError: it cannot be written down. Nothing is done then either.
        """
        if len(self.of(stream)) >= max(1, SHARE * shards):
            return False
        shards_of = self.shards.get(stream, {}) | {str(shard): {"reason": reason, "contexts": contexts}}
        skipped = self.shards | {stream: shards_of}
        if self.file:
            files, path = open_location("output", self.file)
            write_atomically(files, path, sealed(skipped))
        self.shards = skipped  # Not before it is on disk
        return True

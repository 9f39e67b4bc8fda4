"""The tracking database of `tests/tracking`."""

from tests.tracking.conftest import migrated, tracking

__all__ = ["migrated", "tracking"]

from __future__ import annotations

import pytest

from raysae.lm import architecture


@pytest.fixture(scope="session")
def _found_modules(tmp_path_factory):
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(autouse=True)
def _no_modules_of_the_users(_found_modules, monkeypatch):
    """Searches of these tests are kept among themselves, not in the user's folder."""
    monkeypatch.setattr(architecture, "CACHE", str(_found_modules))

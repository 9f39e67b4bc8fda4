"""How SAEs are shared out over banks."""

import pytest

from raysae.config import SAEConfig
from raysae.sweep.preflight import cost, pack

WIDTH = {"resid_post.1": 64, "mlp_out.1": 64}


def grid(hook: str, widths: list[int]) -> list[SAEConfig]:
    return [SAEConfig(hook_point=hook, width=w, k=8, learning_rate=1e-3) for w in widths]


def test_every_sae_is_in_exactly_one_bank_of_its_hook_point() -> None:
    saes = tuple(grid("resid_post.1", [64, 128, 256, 512]) + grid("mlp_out.1", [64, 128]))
    for banks in range(1, 9):
        packed = pack(saes, banks, WIDTH)
        assert sorted(s.name for b in packed for s in b.saes) == sorted(s.name for s in saes)
        assert all(s.hook_point == b.hook_point for b in packed for s in b.saes)
        assert len(packed) == min(max(banks, 2), len(saes))  # a bank per hook point at least, never an empty one
        assert len({b.name for b in packed}) == len(packed)


def test_banks_are_of_near_equal_predicted_cost() -> None:
    saes = tuple(grid("resid_post.1", [8192, 4096, 4096, 2048, 2048, 2048, 2048, 1024, 512, 256]))
    loads = [sum(cost(s, 64) for s in bank.saes) for bank in pack(saes, 3, WIDTH)]
    assert max(loads) <= 1.1 * sum(loads) / 3


def test_an_sae_too_large_for_company_is_alone() -> None:
    packed = pack(tuple(grid("resid_post.1", [2**20, 1024, 1024, 512])), 2, WIDTH)
    assert sorted(len(bank.saes) for bank in packed) == [1, 3]


@pytest.mark.parametrize("banks", [1, 2, 3])
def test_packing_is_deterministic(banks: int) -> None:
    saes = tuple(grid("resid_post.1", [256, 512, 1024, 2048]))
    assert pack(saes, banks, WIDTH) == pack(saes, banks, WIDTH)

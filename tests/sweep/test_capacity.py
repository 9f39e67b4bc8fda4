"""How bank plans deal out SAEs, and what the cluster check refuses."""

from types import SimpleNamespace

import pytest

from raysae.config import ResourcesConfig, SAEConfig, SweepConfig, UserError
from raysae.sweep import capacity
from raysae.sweep.capacity import cost, pack

WIDTH = {"resid_post.1": 64, "mlp_out.1": 64}


def grid(hook: str, widths: list[int]) -> list[SAEConfig]:
    return [SAEConfig(hook_point=hook, width=w, k=8, learning_rate=1e-3) for w in widths]


def test_every_sae_is_in_exactly_one_bank_of_its_hook_point() -> None:
    saes = tuple(grid("resid_post.1", [64, 128, 256, 512]) + grid("mlp_out.1", [64, 128]))
    for banks in range(1, 9):
        packed = pack(saes, banks, WIDTH)
        assert sorted(s.name for b in packed for s in b.saes) == sorted(s.name for s in saes)
        assert all(s.hook_point == b.hook_point for b in packed for s in b.saes)
        # Each hook point has a bank, and no bank is empty
        assert len(packed) == min(max(banks, 2), len(saes))
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


class FakeRay:
    """Stands for `ray` in `check_cluster`: a cluster of machines with so many CPUs each."""

    def __init__(self, *machines: float) -> None:
        self.machines = machines

    def nodes(self) -> list[dict]:
        return [
            {"Alive": True, "NodeManagerHostname": f"m{i}", "Resources": {"CPU": cpus}}
            for i, cpus in enumerate(self.machines)
        ]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": sum(self.machines)}


def banks_on(
    monkeypatch: pytest.MonkeyPatch,
    machines: tuple[float, ...],
    limits: dict[str, float] | None = None,
    **resources: object,
) -> int:
    monkeypatch.setattr(capacity, "ray", FakeRay(*machines))
    monkeypatch.setattr(capacity, "growth_limits", lambda: limits or {})
    output = "s3://bucket/runs" if resources.pop("remote", False) else "runs"
    config = SweepConfig(output=output, resources=ResourcesConfig(**resources))
    return capacity.check_cluster(
        SimpleNamespace(config=config, saes=grid("resid_post.1", [64, 128, 256, 512]), hook_points=["resid_post.1"])
    )


def test_a_bank_per_core(monkeypatch: pytest.MonkeyPatch) -> None:
    assert banks_on(monkeypatch, (2,)) == 2
    assert banks_on(monkeypatch, (2, 2), remote=True) == 4
    assert banks_on(monkeypatch, (64,)) == 4  # No more banks than SAEs
    assert banks_on(monkeypatch, (2,), banks=1) == 1


@pytest.mark.parametrize(
    ("machines", "resources", "message"),
    [
        (
            (2, 2),
            {},
            "output is the local folder 'runs' but the cluster has 2 machines. Name storage that all of them reach",
        ),
        ((2,), {"limits": {"CPU": 64}}, "output is the local folder 'runs' but the cluster grows by further machines"),
        ((2,), {"trainer_gpus": 1}, "resources.trainer_gpus is 1 but this Ray cluster has no GPU"),
        ((2,), {"trainer_cpus": 1}, "the sweep needs 2.25 CPUs .* and the cluster can have 2"),
        (
            (2,),
            {"trainer_cpus": 4, "limits": {"CPU": 8}, "remote": True, "banks": 4},
            "the sweep needs 16.25 CPUs .* and the cluster can have 8",
        ),
        (
            (1, 1),
            {"producer_cpus": 1.5, "remote": True},
            "resources.producer_cpus is 1.5 but no machine of the cluster has more than 1 CPUs",
        ),
        (
            (1, 1),
            {"trainer_cpus": 0.6, "banks": 2, "producer_cpus": 0.6, "remote": True},
            "do not fit on machines of 1, 1 CPUs",
        ),
    ],
)
def test_what_the_cluster_can_never_give(
    monkeypatch: pytest.MonkeyPatch, machines: tuple, resources: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        banks_on(monkeypatch, machines, **resources)


def test_a_shared_folder_is_storage_for_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert banks_on(monkeypatch, (2, 2), shared_storage=True) == 4

"""The main job, end to end: the small real language model, real Ray and real MLflow."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raysae.commands.parse import parse
from raysae.config import SweepConfig
from raysae.sae.files import load_sae
from raysae.study.plan import plan
from tests.integration.job import arguments, run, start


def runs_of(folder: Path) -> pd.DataFrame:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("raysae")
    found = client.search_runs([experiment.experiment_id])
    return pd.DataFrame(
        [
            {"name": r.info.run_name, "status": r.info.status, "id": r.info.run_id, **r.data.params, **r.data.metrics}
            for r in found
        ]
    )


@pytest.fixture(scope="module")
def swept(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    done = run(arguments(shared_data, folder))
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    assert done.stderr == "", "a good run says nothing on stderr"
    assert "(raylet)" not in done.stdout, "no call was cut off by the end of its actor"
    return folder


def test_fvu_falls_with_width_and_with_k(swept: Path) -> None:
    table = pd.read_csv(swept / "runs/test/summary/summary.csv").set_index(["width", "k"])
    assert len(table) == 4
    assert (table["status"] == "done").all()
    fvu = table["fvu"]
    assert fvu[512, 8] < fvu[128, 8]
    assert fvu[512, 16] < fvu[128, 16]
    assert fvu[128, 16] < fvu[128, 8]
    assert fvu[512, 16] < fvu[512, 8] < 0.5
    assert np.allclose(table["l0"], table.index.get_level_values("k"), rtol=0.01)
    assert (table["ce_recovered"] > 0.5).all()
    assert (table["kl"] > 0).all()


def test_contexts_forwarded_are_those_needed(swept: Path) -> None:
    # 118 steps of 1,024 rows take 4 shards of 256 contexts × 120 rows
    assert "1,024 contexts forwarded for training (1,024 needed" in (swept / "stdout").read_text().replace("\n", " ")


def test_mlflow_holds_every_sae_under_the_study(swept: Path) -> None:
    runs, client = runs_of(swept).set_index("name"), mlflow.MlflowClient(f"sqlite:///{swept}/mlflow.db")
    assert len(runs) == 5
    assert (runs["status"] == "FINISHED").all()
    table = pd.read_csv(swept / "runs/test/summary/summary.csv").set_index("name")
    for name, row in table.iterrows():
        assert runs.loc[name, "fvu"] == pytest.approx(row["fvu"], abs=1e-12)
        assert runs.loc[name, "ce_recovered"] == pytest.approx(row["ce_recovered"], abs=1e-12)
        assert runs.loc[name, "width"] == str(row["width"])
        history = client.get_metric_history(runs.loc[name, "id"], "fvu")
        assert [m.step for m in history] == sorted({m.step for m in history})  # Steps are tokens seen, none twice
        assert len(history) == 4
        assert history[-1].step == 118 * 1024
        # Interim reports read fewer rows, on which more latents look dead
        (dead,) = client.get_metric_history(runs.loc[name, "id"], "dead_fraction")
        interim = client.get_metric_history(runs.loc[name, "id"], "interim/dead_fraction")
        assert (dead.value, dead.step) == (pytest.approx(row["dead_fraction"], abs=1e-12), 118 * 1024)
        assert [m.step for m in interim] == [m.step for m in history[:-1]]


def test_saved_saes_reconstruct_raw_activations_as_reported(swept: Path, shared_data: Path) -> None:
    """Held-out contexts go through plain transformers. Neither the stream nor the loop takes part."""
    settled = plan(parse(SweepConfig, arguments(shared_data, swept / "plan"), "")[0])
    lm = AutoModelForCausalLM.from_pretrained(settled.config.model.name, dtype=torch.float32)
    with torch.no_grad():
        # Activations after block 2
        hidden = lm(torch.from_numpy(settled.contexts["evaluation"][:400]), output_hidden_states=True).hidden_states[3]
        x = hidden[:, settled.evaluation.skip_positions :].flatten(0, 1).double()
        for name, row in pd.read_csv(swept / "runs/test/summary/summary.csv").set_index("name").iterrows():
            sae = load_sae(swept / "runs/test/saes" / name)
            error = x - sae(x.float()).double()
            fvu = error.square().sum() / (x - x.mean(0)).square().sum()
            assert float(fvu) == pytest.approx(row["fvu"], rel=0.03), name  # Other held-out rows, equally many
            norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-5, rtol=0)


def test_resuming_after_the_driver_was_killed_gives_the_same_bits(
    swept: Path, shared_data: Path, tmp_path: Path
) -> None:
    process = start(arguments(shared_data, tmp_path, train__checkpoint_seconds=0.2))
    checkpoints = tmp_path / "runs/test/checkpoints"
    give_up = time.monotonic() + 240
    while len(list(checkpoints.glob("*/*.safetensors"))) < 4 and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    killed_early = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert killed_early, process.stderr.read()
    time.sleep(3)  # Ray's processes end after their driver
    resumed = run(["--output", str(tmp_path / "runs"), "--resume", "test"])
    assert resumed.returncode == 0, resumed.stderr
    for folder in sorted((swept / "runs/test/saes").iterdir()):
        ours, theirs = (
            load_file(root / folder.name / "sae_weights.safetensors")
            for root in (swept / "runs/test/saes", tmp_path / "runs/test/saes")
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs), folder.name
    runs = runs_of(tmp_path)
    assert len(runs) == 5
    assert (runs["status"] == "FINISHED").all()
    left = runs.set_index("name")[["fvu", "l0", "ce_recovered", "kl"]].dropna().sort_index()
    right = runs_of(swept).set_index("name")[["fvu", "l0", "ce_recovered", "kl"]].dropna().sort_index()
    pd.testing.assert_frame_equal(left, right)


def test_an_sae_that_diverges_is_named_and_the_others_go_on(shared_data: Path, tmp_path: Path) -> None:
    done = run(arguments(shared_data, tmp_path, widths="128", k="8", learning_rates="1e-3,1e30", train__tokens=60_000))
    assert done.returncode == 1
    table = pd.read_csv(tmp_path / "runs/test/summary/summary.csv").set_index("learning_rate")
    assert table.loc[1e-3, "status"] == "done"
    assert table.loc[1e30, "status"] == "failed"
    assert "topk_w128_k8_resid_post.2_lr1e+30_s0" in table.loc[1e30, "reason"]
    assert " at step " in table.loc[1e30, "reason"]
    assert "lr1e+30" in done.stdout
    assert sorted(runs_of(tmp_path)["status"]) == ["FAILED", "FINISHED", "FINISHED"]


def test_ctrl_c_leaves_checkpoints_and_closed_runs(shared_data: Path, tmp_path: Path) -> None:
    process = start(arguments(shared_data, tmp_path, train__tokens=10_000_000, train__reports=1000, stream__epochs=8))
    # Training has begun
    assert any("best FVU" in line for line in process.stdout), process.stderr.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "(raylet)" not in out + err
    assert "--resume test" in err
    assert "Traceback" not in err
    assert len(list((tmp_path / "runs/test/checkpoints").glob("*/*.safetensors"))) >= 4
    assert (runs_of(tmp_path)["status"] == "KILLED").all()


def test_asha_stops_the_worse_saes_early(shared_data: Path, tmp_path: Path) -> None:
    done = run(
        arguments(shared_data, tmp_path, widths="64,128,512,1024", k="4,16", scheduler="asha", train__tokens=200_000)
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "runs/test/summary/summary.csv")
    stopped, finished = table[table["status"] == "stopped"], table[table["status"] == "done"]
    assert len(stopped) >= 1
    assert len(finished) >= 1
    assert stopped["tokens"].max() < finished["tokens"].min()
    assert finished["fvu"].min() < stopped["fvu"].min()
    rungs = pd.read_json(tmp_path / "runs/test/rungs.jsonl", lines=True)
    assert set(rungs.loc[rungs["decision"] == "STOP", "sae"]) >= set(stopped["name"])
    assert set(rungs["sae"]) == set(table["name"])
    config = json.loads((tmp_path / "runs/test/saes" / stopped.iloc[0]["name"] / "cfg.json").read_text())
    assert config["d_sae"] == stopped.iloc[0]["width"]

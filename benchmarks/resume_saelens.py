"""Kill and resume, side by side with SAELens.

.venv/bin/python benchmarks/resume_saelens.py

It runs raysae, then SAELens in .venv-peers (`make test-saelens` creates it). It measures how far the resumed SAE's
weights are from an undisturbed run's. It also shows what SIGTERM leaves on disk.

Both train one TopK SAE on the same contexts of the same language model. Width, k, batch, learning rate and number of
steps are the same. Each process has one thread. raysae runs as its users run it, `jobs/scaling_sweep.py` on a Ray of
its own. Each is run

- undisturbed, twice. The second run shows what the runs differ by without any fault.
- killed with SIGKILL at the step of a checkpoint past the middle, and resumed from it. raysae goes first. SAELens then
  writes its checkpoint at the very step where raysae's had been written. It uses its own `SAETrainer.save_checkpoint`,
  and is killed right there.
- stopped with SIGTERM past the middle, as a cluster's scheduler does, and resumed from what that left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SAELENS = REPOSITORY / ".venv-peers" / "bin" / "python"
WIDTH, K, BATCH, STEPS, RATE, LAYER, CONTEXT = 256, 16, 1024, 120, 1e-3, 2, 64
NAME = f"topk_w{WIDTH}_k{K}_resid_post.{LAYER}_lr{RATE:g}_s0"
STUDY = "study"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "160",
}


# ---------------------------------------------------------------- raysae


def start_raysae(folder: Path, resume: bool = False) -> subprocess.Popen:
    knobs = {
        "stream.context_length": CONTEXT, "stream.cache": "off", "stream.threads": 1,
        "hook_points": f"resid_post.{LAYER}", "widths": WIDTH, "k": K, "learning_rates": RATE, "train.batch": BATCH,
        "train.tokens": STEPS * BATCH, "train.threads": 1, "train.checkpoint_seconds": 0.5, "train.reports": 2,
        "evaluation.rows": 20_000, "evaluation.predicted_tokens": 0, "study": STUDY,
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
    }  # fmt: skip
    words = (
        ["--resume", STUDY] if resume else [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
    )
    command = [sys.executable, str(REPOSITORY / "jobs" / "scaling_sweep.py"), "--output", str(folder), *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def checkpointed_step(folder: Path) -> int:
    """Steps in the newest checkpoint of the study in `folder`, or 0 where there is none."""
    paths = sorted((folder / STUDY / "checkpoints" / NAME).glob("*.safetensors"))
    if not paths:
        return 0
    try:
        with paths[-1].open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except FileNotFoundError:  # A newer one has replaced it meanwhile
        return checkpointed_step(folder)
    return json.loads(header["__metadata__"]["raysae"])["header"]["member"]["steps_done"]


def raysae(folder: Path, strike: signal.Signals | None = None) -> dict:
    """Weights of a run in `folder`. A signal strikes it at a checkpoint past the middle, and it is resumed.

    The result also has the step and what the signal left.
    """
    folder.mkdir(parents=True)
    process, found = start_raysae(folder), {}
    if strike:
        while checkpointed_step(folder) <= STEPS // 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(strike)
        process.wait()
        time.sleep(3)  # Ray's processes follow their driver
        found = {
            "step": checkpointed_step(folder),
            "left": files_in(folder / STUDY / "checkpoints"),
            "saes": files_in(folder / STUDY / "saes"),
        }
        process = start_raysae(folder, resume=True)
    if process.wait() != 0:
        sys.exit(f"raysae failed in {folder}")
    return found | {"weights": folder / STUDY / "saes" / NAME / "sae_weights.safetensors"}


def files_in(folder: Path) -> list[str]:
    return sorted(
        f"{path.relative_to(folder)} ({path.stat().st_size:,} bytes)" for path in folder.rglob("*") if path.is_file()
    )


# ---------------------------------------------------------------- SAELens: functions that run in its environment


def train_with_saelens(plan: dict) -> None:
    """One run, as `plan` says.

    - `folder`: where it writes.
    - `resume`: a checkpoint's folder.
    - `checkpoint_at`: a step at which it saves and kills itself with SIGKILL.
    - `say_at`: a step at which it prints a line.
    """
    import numpy as np
    import torch
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    finish_step = SAETrainer._checkpoint_if_needed

    def watched(trainer: SAETrainer) -> None:
        finish_step(trainer)
        step = trainer.n_training_steps + 1
        if step == plan.get("checkpoint_at"):
            # Between two steps, as the trainer does it. The counter of steps is raised after this.
            trainer.save_checkpoint(str(trainer.n_training_samples))
            os.kill(os.getpid(), signal.SIGKILL)
        if step == plan.get("say_at"):
            print("now", flush=True)

    SAETrainer._checkpoint_if_needed = watched
    folder = plan["folder"]
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=plan["d"], d_sae=WIDTH, k=K, normalize_activations="expected_average_only_in"),
        model_name=plan["model"], model_class_name="AutoModelForCausalLM", hook_name=f"model.layers.{LAYER}",
        dataset_path="contexts", is_dataset_tokenized=True, streaming=False, context_size=CONTEXT, prepend_bos=False,
        training_tokens=STEPS * BATCH, train_batch_size_tokens=BATCH, n_batches_in_buffer=16,
        store_batch_size_prompts=32, n_batches_for_norm_estimate=8, lr=RATE, seed=0, device="cpu",
        logger=LoggingConfig(log_to_wandb=False), checkpoint_path=f"{folder}/checkpoints",
        output_path=f"{folder}/output", resume_from_checkpoint=plan.get("resume"), verbose=False,
    )  # fmt: skip
    contexts = Dataset.from_dict({"tokens": np.load(plan["contexts"], allow_pickle=False).tolist()})
    LanguageModelSAETrainingRunner(config, override_dataset=contexts).run()


def start_saelens(plan: dict) -> subprocess.Popen:
    log = Path(plan["folder"]).with_suffix(".log").open("a")
    command = [str(SAELENS), __file__, "train", json.dumps(plan)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True)


def saelens(plan: dict, strike: signal.Signals | None = None, step: int = 0) -> dict:
    """As `raysae`. `weights` is None where what the signal left cannot be resumed from."""
    folder, found = Path(plan["folder"]), {}
    folder.mkdir(parents=True)
    process = start_saelens(plan | ({"checkpoint_at": step} if strike == signal.SIGKILL else {"say_at": step}))
    if strike:
        if strike != signal.SIGKILL:
            process.stdout.readline()
            process.send_signal(strike)
        process.communicate()
        checkpoints = sorted(
            path for path in (folder / "checkpoints").rglob("*") if path.is_dir() and any(path.glob("*.safetensors"))
        )
        found = {"step": step, "left": files_in(folder / "checkpoints"), "saes": files_in(folder / "output")}
        if not checkpoints:
            return found | {"weights": None}
        process = start_saelens(plan | {"resume": str(checkpoints[-1])})
    process.communicate()
    if process.returncode != 0:
        if strike:
            return found | {"weights": None}
        sys.exit(f"SAELens failed: see {folder.with_suffix('.log')}")
    return found | {"weights": folder / "output" / "sae_weights.safetensors"}


# ---------------------------------------------------------------- the comparison


def difference(one: Path, other: Path | None) -> float | None:
    """The largest difference of any weight."""
    from safetensors.numpy import load_file

    if other is None:
        return None
    left, right = load_file(one), load_file(other)
    return max(float(abs(left[key] - right[key]).max()) for key in left)


def largest(one: Path) -> float:
    from safetensors.numpy import load_file

    return max(float(abs(weights).max()) for weights in load_file(one).values())


def plan_for_saelens(folder: Path) -> dict:
    """The contexts that raysae's stream reads, in its order, and the model."""
    import numpy as np

    from raysae.config import SweepConfig
    from raysae.study.plan import plan

    config = SweepConfig.model_validate({"stream": {"context_length": CONTEXT}, "hook_points": [f"resid_post.{LAYER}"]})
    settled = plan(config)
    order = np.concatenate([settled.training.contexts_of(shard) for shard in range(settled.training.shards)])
    np.save(folder / "contexts.npy", settled.contexts["train"][order])
    return {"model": settled.facts.folder_or_name, "d": settled.facts.d_model, "contexts": str(folder / "contexts.npy")}


def main() -> None:
    if not SAELENS.exists():
        sys.exit(f"{SAELENS} is not there: `make test-saelens` creates the environment")
    with tempfile.TemporaryDirectory(prefix="resume") as scratch:
        folder = Path(scratch)
        theirs = plan_for_saelens(folder)
        killed = raysae(folder / "raysae-killed", signal.SIGKILL)
        runs = {
            "raysae": {
                "undisturbed": raysae(folder / "raysae"),
                "undisturbed again": raysae(folder / "raysae-again"),
                "SIGKILL": killed,
                "SIGTERM": raysae(folder / "raysae-term", signal.SIGTERM),
            },
            "SAELens": {
                "undisturbed": saelens(theirs | {"folder": str(folder / "saelens")}),
                "undisturbed again": saelens(theirs | {"folder": str(folder / "saelens-again")}),
                "SIGKILL": saelens(theirs | {"folder": str(folder / "saelens-killed")}, signal.SIGKILL, killed["step"]),
                "SIGTERM": saelens(theirs | {"folder": str(folder / "saelens-term")}, signal.SIGTERM, killed["step"]),
            },
        }
        for system, results in runs.items():
            base = results["undisturbed"]["weights"]
            print(f"\n{system}: largest weight {largest(base):.3g}")
            for name, run in results.items():
                if name == "undisturbed":
                    continue
                apart = difference(base, run["weights"])
                at = f" at step {run['step']} of {STEPS}, resumed" if "step" in run else ""
                print(
                    f"  {name}{at}: "
                    + ("cannot be resumed" if apart is None else f"largest difference of weights {apart:.3g}")
                )
                if name == "SIGTERM":
                    print(f"    left on disk: {'; '.join(run['left'] + run['saes']) or 'nothing'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_with_saelens(json.loads(sys.argv[2]))
    else:
        main()

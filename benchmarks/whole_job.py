"""The whole job, from text to evaluated SAEs: eight SAEs of the embedded language model, ours against SAELens' multi-SAE runner and sparsify.

    python benchmarks/whole_job.py [--peers .venv-peers/bin/python] [--tokens 524288] [--repeats 1] [--json FILE]

Widths 512, 1,024, 2,048 and 4,096 with k = 16 and 32 at the middle layer, batch 4,096, contexts of 128 tokens. All train with Adam on the same
contexts in float32 with two threads. Ours runs as users run it, start-up, tokenisation (nothing cached), evaluations, tracking and figures included.
The peers are given token ids; SAELens trains all eight in one run and evaluates them with its own `run_evals`, sparsify has one run per SAE (its
trainer takes one width) and no evaluation. Told are wall time and the largest sum of the proportional set sizes of all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
WIDTHS, KS, LAYER, BATCH, CONTEXT, RATE = (512, 1024, 2048, 4096), (16, 32), 2, 4096, 128, 1e-3
EVALUATED = 65_536  # tokens
ENVIRONMENT = {
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "SPARSIFY_DISABLE_TRITON": "1",  # it finds Triton, which has nothing to run on without a GPU
}


def ours(folder: Path, tokens: int) -> list[str]:
    knobs = {
        "hook_points": f"resid_post.{LAYER}", "widths": ",".join(map(str, WIDTHS)), "k": ",".join(map(str, KS)), "learning_rates": RATE,
        "train.tokens": tokens, "train.batch": BATCH, "stream.context_length": CONTEXT, "stream.cache": "off", "text.cache": folder / "tokens",
        "evaluation.rows": EVALUATED, "evaluation.predicted_tokens": EVALUATED, "output": folder / "runs", "study": "bench",
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
    }  # fmt: skip
    words = [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
    return [sys.executable, str(REPOSITORY / "jobs" / "scaling_sweep.py"), *words]


def contexts(path: Path, tokens: int) -> None:
    """The contexts of our sweep, (contexts, CONTEXT) int32, in `path`; as many as a peer needs that skips no positions."""
    import numpy as np

    from raysae.config import SweepConfig
    from raysae.sweep.preflight import plan

    knobs = {"stream": {"context_length": CONTEXT}, "hook_points": [f"resid_post.{LAYER}"], "train": {"tokens": tokens}}
    made = plan(SweepConfig.model_validate(knobs)).contexts["train"]
    np.save(path, made[np.arange(min(len(made.tokens), -(-(tokens + EVALUATED) // CONTEXT) + 64))])


# ---------------------------------------------------------------- in the peers' environment


def saelens(folder: str, tokens: int, model: str) -> None:
    import numpy as np
    from datasets import Dataset
    from sae_lens import LoggingConfig, TopKTrainingSAEConfig
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
    from sae_lens.training.activation_scaler import ActivationScaler

    saes = {
        f"{n}-{k}": TopKTrainingSAEConfig(
            d_in=256, d_sae=n, k=k, normalize_activations="expected_average_only_in", use_sparse_activations=True, rescale_acts_by_decoder_norm=False
        )
        for n in WIDTHS
        for k in KS
    }
    config = MultiSAETrainingRunnerConfig(
        saes=saes, hook_names=f"model.layers.{LAYER}", model_name=model, model_class_name="AutoModelForCausalLM", dataset_path="contexts",
        streaming=False, context_size=CONTEXT, prepend_bos=False, training_tokens=tokens, train_batch_size_tokens=BATCH, n_batches_in_buffer=128,
        store_batch_size_prompts=32, n_batches_for_norm_estimate=8, lr=RATE, lr_warm_up_steps=tokens // BATCH // 20, seed=0, device="cpu",
        logger=LoggingConfig(log_to_wandb=False), checkpoint_path=None, output_path=f"{folder}/output",
    )  # fmt: skip
    dataset = Dataset.from_dict({"tokens": np.load(f"{folder}/contexts.npy").tolist()})
    runner = MultiSAETrainingRunner(config, override_dataset=dataset)
    evaluation = EvalConfig(
        batch_size_prompts=32, n_eval_reconstruction_batches=EVALUATED // (32 * CONTEXT), compute_ce_loss=True, compute_kl=True,
        n_eval_sparsity_variance_batches=EVALUATED // (32 * CONTEXT), compute_sparsity_metrics=True, compute_variance_metrics=True,
    )  # fmt: skip
    for name, sae in runner.run().items():
        metrics, _ = run_evals(sae, runner.activations_store, runner.model, ActivationScaler(), evaluation)  # the scale is folded in already
        print(name, metrics, flush=True)


def sparsify(folder: str, tokens: int, model: str) -> None:
    import numpy as np
    import torch
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from transformers import AutoModelForCausalLM

    dataset = Dataset.from_dict({"input_ids": np.load(f"{folder}/contexts.npy")[: tokens // CONTEXT].tolist()}).with_format("torch")
    for n in WIDTHS:
        for k in KS:
            lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            config = TrainConfig(
                SparseCoderConfig(num_latents=n, k=k), batch_size=BATCH // CONTEXT, optimizer="adam", lr=RATE, hookpoints=[f"layers.{LAYER}"],
                lr_warmup_steps=tokens // BATCH // 20, log_to_wandb=False, save_dir=f"{folder}/sparsify", run_name=f"{n}-{k}", save_every=10**9,
            )  # fmt: skip
            Trainer(config, dataset, lm).fit()


# ---------------------------------------------------------------- the comparison


def run(command: list[str], log: Path) -> dict[str, float]:
    """Wall seconds and peak memory of a command and all that it starts."""
    from one_pass import peak_memory

    mark = f"RAYSAE_BENCHMARK={uuid.uuid4().hex}"
    with log.open("w") as out, peak_memory(mark.encode()) as memory:
        began = time.perf_counter()
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT | dict([mark.split("=")])).returncode
        seconds = time.perf_counter() - began
    if code:
        raise SystemExit(f"{' '.join(command[:4])} … failed:\n{log.read_text()[-3000:]}")
    return {"seconds": seconds, "gib": memory[0] / 2**30}


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] in ("saelens", "sparsify"):
        {"saelens": saelens, "sparsify": sparsify}[sys.argv[1]](sys.argv[2], int(sys.argv[3]), sys.argv[4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=str(REPOSITORY / ".venv-peers" / "bin" / "python"))
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from raysae.lm.facts import EMBEDDED

    found: dict[str, list[dict[str, float]]] = {"raysae": [], "saelens": [], "sparsify": []}
    with tempfile.TemporaryDirectory() as scratch:
        contexts(Path(scratch) / "contexts.npy", options.tokens)
        for repeat in range(options.repeats):
            for side, results in found.items():
                folder = Path(scratch) / f"{side}-{repeat}"
                folder.mkdir()
                (folder / "contexts.npy").symlink_to(Path(scratch) / "contexts.npy")
                command = ours(folder, options.tokens)
                if side != "raysae":
                    command = [options.peers, __file__, side, str(folder), str(options.tokens), str(EMBEDDED)]
                results.append(run(command, folder / "log"))
                print(f"{side:10} {results[-1]['seconds']:7.1f} s   {results[-1]['gib']:5.2f} GiB", flush=True)
    medians = {side: {key: statistics.median(result[key] for result in results) for key in ("seconds", "gib")} for side, results in found.items()}
    for side in ("saelens", "sparsify"):
        ratios = {key: medians[side][key] / medians["raysae"][key] for key in ("seconds", "gib")}
        print(f"{side}: {ratios['seconds']:.2f} × our wall time, {ratios['gib']:.2f} × our memory")
    if options.json:
        options.json.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()

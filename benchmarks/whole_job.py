"""The whole job, from text to eight evaluated SAEs of the embedded language model, ours against two peers.

    python benchmarks/whole_job.py [--peers .venv-peers/bin/python] [--tokens 524288] [--repeats 1] [--against sparsify]
                                   [--json FILE]

The peers are SAELens' multi-SAE runner and sparsify.

Widths are 512, 1,024, 2,048 and 4,096 with k = 16 and 32, at the middle layer. The batch is 4,096. Contexts have 128
tokens. All train with Adam on the same contexts, in float32 and with two threads. AuxK is off. It is idle in the peers
for so few steps.

- Ours runs as users run it, with start-up, tokenisation (nothing cached), evaluations, tracking and figures.
- The peers are given token ids. SAELens trains all eight in one run and evaluates them with its own `run_evals`.
- sparsify has one run per SAE, because its trainer takes one width. It evaluates nothing. So raysae's functions read
  and evaluate its SAEs in a process of their own. They take as many rows and tokens as ours. Both times are told.

Each side has the allocator that `steps.py` found best for its TopK step (d256 n4096). Trying them on whole jobs would
take hours.

The output has wall time, and the largest sum of the proportional set sizes of all processes. With `--repeats` the sides
take turns, and the ratios are taken in every turn.

Afterwards raysae's importers read the SAEs of the last turn, and all are evaluated alike. The result is the mean FVU of
each side's eight on held-out rows. As in our training, none are from the first eight positions of a context.
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
from typing import TYPE_CHECKING

from options import at_least, writable
from steps import ALLOCATORS, NO_TRITON, PEERS, refuse_other_torch, spread

if TYPE_CHECKING:
    from raysae.config import SweepConfig

REPOSITORY = Path(__file__).parents[1]
WIDTHS, KS, LAYER, BATCH, CONTEXT, RATE = (512, 1024, 2048, 4096), (16, 32), 2, 4096, 128, 1e-3
EVALUATED = 65_536  # Tokens to evaluate on
ENVIRONMENT = {
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    **NO_TRITON,
}
STEPS_ROW = "topk-d256-n4096"  # Row of steps.py
PEER_SIDES = ("saelens", "sparsify")
STEP_SIDES = {"raysae": "raysae", "saelens": "saelens_sparse", "sparsify": "sparsify"}  # Names of the sides in steps.py
SAVED = {
    "raysae": "runs/bench/saes/*/cfg.json",
    "saelens": "output/*/cfg.json",
    "sparsify": "sparsify/*/layers.*/cfg.json",
}


def ours(folder: Path, tokens: int) -> list[str]:
    knobs = {
        "hook_points": f"resid_post.{LAYER}", "widths": ",".join(map(str, WIDTHS)), "k": ",".join(map(str, KS)),
        "learning_rates": RATE, "train.tokens": tokens, "train.batch": BATCH, "train.aux_coefficient": 0,
        "stream.context_length": CONTEXT, "stream.cache": "off", "text.cache": folder / "tokens",
        "evaluation.rows": EVALUATED, "evaluation.predicted_tokens": EVALUATED, "output": folder / "runs",
        "study": "bench", "tracking.uri": f"sqlite:///{folder}/mlflow.db",
    }  # fmt: skip
    words = [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
    return [sys.executable, str(REPOSITORY / "jobs" / "scaling_sweep.py"), *words]


def stream(tokens: int) -> SweepConfig:
    """A config with the stream of our sweep."""
    from raysae.config import SweepConfig

    return SweepConfig.model_validate(
        {"stream": {"context_length": CONTEXT}, "hook_points": [f"resid_post.{LAYER}"], "train": {"tokens": tokens}}
    )


def contexts(path: Path, tokens: int) -> None:
    """Writes the contexts of our sweep, (contexts, CONTEXT) int32, to `path`.

    There are as many as a peer needs that skips no positions.
    """
    import numpy as np

    from raysae.study.plan import plan

    made = plan(stream(tokens)).contexts["train"]
    np.save(path, made[np.arange(min(len(made.tokens), -(-(tokens + EVALUATED) // CONTEXT) + 64))])


def evaluate(side: str, folder: Path, tokens: int, in_model: bool = False) -> float:
    """Mean FVU of a side's eight SAEs on EVALUATED held-out rows or a few more.

    `in_model` also computes cross-entropy and KL on as many tokens.
    """
    import numpy as np
    import torch

    from raysae.lm.model import LanguageModel
    from raysae.lm.patched_loss import downstream_metrics
    from raysae.sae.importers import load_any
    from raysae.stream.blocks import as_tensor
    from raysae.stream.shard import ShardMaker
    from raysae.study.plan import plan
    from raysae.train.evaluation import HeldOut, reconstruction_metrics

    settled = plan(stream(tokens))
    (hook,), spec = settled.hook_points, settled.evaluation
    lm = LanguageModel.load(settled.config.model)
    maker = ShardMaker(lm, settled.contexts["evaluation"], spec, [hook], settled.config.stream.block_mib)
    shards = range(-(-EVALUATED // spec.rows_per_shard))
    rows = [as_tensor(block, spec.dtype) for shard in shards for block in maker.make(shard)[1][hook]]
    saes = {str(path.parent): load_any(path.parent, hook).sae for path in folder.glob(SAVED[side])}
    assert len(saes) == len(WIDTHS) * len(KS), f"{folder} has {len(saes)} SAEs"
    held_out = HeldOut(lambda: rows, settled.widths[hook])
    fvu = statistics.mean(reconstruction_metrics(sae, rows, held_out).fvu for sae in saes.values())
    if in_model:
        contexts = settled.contexts["evaluation"][np.arange(-(-EVALUATED // (CONTEXT - 1 - spec.skip_positions)))]
        downstream_metrics(
            lm, torch.from_numpy(contexts), hook, saes, torch.cat(rows).mean(0), spec.skip_positions
        ).finish()
    return fvu


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
            d_in=256,
            d_sae=n,
            k=k,
            normalize_activations="expected_average_only_in",
            use_sparse_activations=True,
            rescale_acts_by_decoder_norm=False,
        )
        for n in WIDTHS
        for k in KS
    }
    config = MultiSAETrainingRunnerConfig(
        saes=saes, hook_names=f"model.layers.{LAYER}", model_name=model, model_class_name="AutoModelForCausalLM",
        dataset_path="contexts", streaming=False, context_size=CONTEXT, prepend_bos=False, training_tokens=tokens,
        train_batch_size_tokens=BATCH, n_batches_in_buffer=128, store_batch_size_prompts=32,
        n_batches_for_norm_estimate=8, lr=RATE, lr_warm_up_steps=tokens // BATCH // 20, seed=0, device="cpu",
        logger=LoggingConfig(log_to_wandb=False), checkpoint_path=None, output_path=f"{folder}/output",
    )  # fmt: skip
    dataset = Dataset.from_dict({"tokens": np.load(f"{folder}/contexts.npy").tolist()})
    runner = MultiSAETrainingRunner(config, override_dataset=dataset)
    evaluation = EvalConfig(
        batch_size_prompts=32, n_eval_reconstruction_batches=EVALUATED // (32 * CONTEXT), compute_ce_loss=True,
        compute_kl=True, n_eval_sparsity_variance_batches=EVALUATED // (32 * CONTEXT), compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )  # fmt: skip
    for name, sae in runner.run().items():
        # The scale is folded in already.
        metrics, _ = run_evals(sae, runner.activations_store, runner.model, ActivationScaler(), evaluation)
        print(name, metrics, flush=True)


def sparsify(folder: str, tokens: int, model: str) -> None:
    import numpy as np
    import torch
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from transformers import AutoModelForCausalLM

    dataset = Dataset.from_dict(
        {"input_ids": np.load(f"{folder}/contexts.npy")[: tokens // CONTEXT].tolist()}
    ).with_format("torch")
    for n in WIDTHS:
        for k in KS:
            lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            config = TrainConfig(
                SparseCoderConfig(num_latents=n, k=k), batch_size=BATCH // CONTEXT, optimizer="adam", lr=RATE,
                hookpoints=[f"layers.{LAYER}"], lr_warmup_steps=tokens // BATCH // 20, log_to_wandb=False,
                save_dir=f"{folder}/sparsify", run_name=f"{n}-{k}", save_every=10**9,
            )  # fmt: skip
            Trainer(config, dataset, lm).fit()


# ---------------------------------------------------------------- the comparison


def best_allocators(path: Path) -> dict[str, str]:
    """Side → the allocator that suits its TopK step best."""
    try:
        rows = {row["name"]: row for row in json.loads(path.read_text())}
        return {side: rows[STEPS_ROW]["sides"][name]["allocator"] for side, name in STEP_SIDES.items()}
    except (OSError, ValueError, LookupError, TypeError):
        sys.exit(
            f"error: {path} has no {STEPS_ROW}, which says each side's best allocator: "
            f"run steps.py --only {STEPS_ROW} --json {path} first"
        )


def run(command: list[str], allocator: str, log: Path) -> dict[str, float]:
    """Wall seconds and peak memory of a command and all that it starts."""
    from one_pass import peak_memory

    mark = f"RAYSAE_BENCHMARK={uuid.uuid4().hex}"
    with log.open("w") as out, peak_memory(mark.encode()) as memory:
        began = time.perf_counter()
        environment = os.environ | ENVIRONMENT | ALLOCATORS[allocator] | dict([mark.split("=")])
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment).returncode
        seconds = time.perf_counter() - began
    if code:
        raise SystemExit(f"{' '.join(command[:4])} … failed:\n{log.read_text()[-3000:]}")
    return {"seconds": seconds, "gib": memory[0] / 2**30}


def job(argv: list[str]) -> None:
    if len(argv) > 2 and argv[0] == "evaluate":
        print(evaluate("sparsify", Path(argv[1]), int(argv[2]), in_model=True))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=str(PEERS))
    parser.add_argument("--tokens", type=at_least(BATCH), default=524_288)
    parser.add_argument("--repeats", type=at_least(1), default=1)
    parser.add_argument(
        "--against", nargs="+", choices=PEER_SIDES, default=list(PEER_SIDES), help="Peers that take part."
    )
    parser.add_argument(
        "--steps",
        type=Path,
        default=REPOSITORY / "build" / "bench" / "steps.json",
        help="File that steps.py has written.",
    )
    parser.add_argument("--json", type=writable, metavar="FILE")
    options = parser.parse_args(argv)
    refuse_other_torch(options.peers)
    allocators = best_allocators(options.steps)
    from raysae.lm.facts import EMBEDDED

    found: dict[str, list[dict[str, float]]] = {side: [] for side in ("raysae", *options.against)}
    with tempfile.TemporaryDirectory() as scratch:
        contexts(Path(scratch) / "contexts.npy", options.tokens)
        for _ in range(options.repeats):
            folders = {side: Path(tempfile.mkdtemp(prefix=side, dir=scratch)) for side in found}
            for side, folder in folders.items():
                (folder / "contexts.npy").symlink_to(Path(scratch) / "contexts.npy")
                command = ours(folder, options.tokens)
                if side != "raysae":
                    command = [options.peers, __file__, side, str(folder), str(options.tokens), str(EMBEDDED)]
                result = run(command, allocators[side], folder / "log")
                result["own_seconds"], note = result["seconds"], ""  # Seconds of its own library alone
                if side == "sparsify":
                    after = run(
                        [sys.executable, __file__, "evaluate", str(folder), str(options.tokens)],
                        allocators["raysae"],
                        folder / "log",
                    )
                    result["seconds"] += after["seconds"]
                    note = f", of these {after['seconds']:.1f} s evaluated by raysae"
                found[side].append(result)
                print(
                    ("{:10} {seconds:7.1f} s   {gib:5.2f} GiB   {}" + note).format(side, allocators[side], **result),
                    flush=True,
                )
        fvu = {side: evaluate(side, folder, options.tokens) for side, folder in folders.items()}
    keys = ("seconds", "own_seconds", "gib")
    sides = {
        side: {key: spread(result[key] for result in results) for key in keys}
        | {"fvu": fvu[side], "allocator": allocators[side]}
        for side, results in found.items()
    }
    for side in options.against:
        for key in keys:
            sides[side][f"{key}_ratio"] = spread(
                theirs[key] / our[key] for our, theirs in zip(found["raysae"], found[side], strict=True)
            )
        told = "{median:.2f} × ({least:.2f} to {greatest:.2f})"
        print(
            f"{side}: {told.format(**sides[side]['seconds_ratio'])} our wall time, "
            f"{told.format(**sides[side]['gib_ratio'])} our memory"
        )
    print("mean FVU: " + ", ".join(f"{side} {value:.4f}" for side, value in fvu.items()))
    if options.json:
        options.json.write_text(json.dumps(sides, indent=1))


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] in PEER_SIDES:  # The peers' environment has no raysae
        {"saelens": saelens, "sparsify": sparsify}[sys.argv[1]](sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        from raysae.commands.parse import main

        main(job)

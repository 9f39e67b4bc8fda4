"""One side of `steps.py`: training steps of raysae or of a peer, as many as a line on standard input says.

    python benchmarks/step_worker.py SIDE ARCHITECTURE D N K BATCH [DEVICE]
    python benchmarks/step_worker.py torch                           which torch this environment has

It prints a line of JSON per line read. A number of steps gives {"seconds": …}. `memory` gives {"bytes": …}. That is the
peak of the steps so far, less the memory before the first one, gradients and Adam's moments. On a CPU it is resident
memory, on a GPU allocated memory.

The script runs in the peers' environment too. So it imports nothing but torch and what SIDE needs.

Every side does what its own trainer does in a step:

- forward, backward and gradient clipping
- removal of the parallel gradient and unit decoder rows, where it has them
- Adam and the learning-rate schedule
- the count of latents that fired

No latent is dead here, so AuxK is idle on all sides. Logging is off where a trainer leaves it out by itself.

ReLU, JumpReLU and the tied autoencoder begin with thresholds (or biases) that k latents per row exceed on average. That
is how trained ones have them. Random weights would give half of all latents, or an eighth for our JumpReLU.

The schedules are long. So every measured step lies at the beginning of the learning rate's warm-up. That is a twentieth
of all steps on every side. Penalties have none. All sides step in the main thread. In a sweep, raysae has a thread of
its own for that.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable

import torch

BATCHES = 4  # Different batches, taken in turn
STEPS = 10**6  # Length of the schedules
GROUP_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)  # Shares of Matryoshka's groups, on all sides
WARMUP = STEPS // 20  # Length of the learning rate's warm-up
Step = Callable[[int, torch.Tensor], object]  # (number of the step, batch (b, d))


def level(pre_activations: torch.Tensor, k: int) -> float:
    """The value that k of each row of pre-activations (rows, n) exceed, on average."""
    return pre_activations.flatten().kthvalue(pre_activations.numel() - len(pre_activations) * k).values.item()


def kind_of(row: str) -> tuple[str, bool]:
    """Architecture of a row, and whether its biases leave k latents active. "-start": they do not."""
    return row.removesuffix("-start"), not row.endswith("-start")


def raysae(architecture: str, d: int, n: int, k: int, batch: int, device: str) -> tuple[Step, list[torch.nn.Parameter]]:
    from raysae.config import ARCHITECTURES, SAEConfig, TrainConfig
    from raysae.determinism import be_deterministic
    from raysae.train.bank import Bank

    architecture, trained = kind_of(architecture)
    sparsity = ARCHITECTURES[architecture].pick(k=k, sparsity=0.01)
    config = SAEConfig(
        architecture=architecture, width=n, hook_point="resid_post.0", learning_rate=2e-4, seed=0, **sparsity
    )
    train = TrainConfig(
        batch=batch,
        tokens=STEPS * batch,
        warmup=WARMUP / STEPS,
        sparsity_warmup=0,
        aux_coefficient=0,
        jumprelu_unit="sum",
    )
    if device == "cuda":
        be_deterministic()
    bank = Bank(d, train, device)
    member = bank.add(config.name, config)
    rows = torch.randn(batch, d, device=device)
    member.initialise(rows)
    with torch.no_grad():
        if architecture == "jumprelu":
            member.sae.threshold.fill_(level(member.sae.pre_activations(rows[:256] / member.scale).T, k))
            member.sae.log_threshold.copy_(member.sae.threshold.log())
        elif architecture in ("relu", "tied"):
            member.sae.b_enc.fill_(-level(member.sae.pre_activations(rows[:256] / member.scale).T, k))
        elif architecture == "gated" and trained:
            bias = -level(member.sae.pre_activations(rows[:256] / member.scale).T, k)
            member.sae.b_gate.fill_(bias)
            member.sae.b_mag.fill_(bias)

    def step(number: int, x: torch.Tensor) -> None:
        assert bank.step(x, number * batch) == [member], f"step {number} trained nothing"
        assert not member.failed, member.failed

    return step, list(member.parameters.values())


def sparsify(
    architecture: str, d: int, n: int, k: int, batch: int, device: str
) -> tuple[Step, list[torch.nn.Parameter]]:
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    assert architecture == "topk"
    sae = SparseCoder(d, SparseCoderConfig(num_latents=n, k=k), device, dtype=torch.float32)
    optimizer = torch.optim.Adam([{"params": sae.parameters(), "lr": 2e-4}])
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    quiet, fired = torch.zeros(n, dtype=torch.long, device=device), torch.zeros(n, dtype=torch.bool, device=device)

    # The step of sparsify's Trainer.fit with loss_fn="fvu", AuxK and logging off.
    def step(number: int, x: torch.Tensor) -> None:
        if number == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x=x, y=x, dead_mask=None)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        quiet.add_(len(x))
        quiet[fired] = 0
        fired.zero_()

    return step, list(sae.parameters())


def saelens(
    architecture: str, d: int, n: int, k: int, batch: int, device: str, sparse: bool = False
) -> tuple[Step, list[torch.nn.Parameter]]:
    from sae_lens import (
        BatchTopKTrainingSAEConfig,
        GatedTrainingSAEConfig,
        JumpReLUTrainingSAEConfig,
        LoggingConfig,
        MatryoshkaBatchTopKTrainingSAEConfig,
        StandardTrainingSAEConfig,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import TrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

    architecture, trained = kind_of(architecture)
    common = {"d_in": d, "d_sae": n, "dtype": "float32", "device": device}
    config = {
        "topk": lambda: TopKTrainingSAEConfig(
            k=k, use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse, **common
        ),
        "batchtopk": lambda: BatchTopKTrainingSAEConfig(k=k, **common),
        "jumprelu": lambda: JumpReLUTrainingSAEConfig(**common),
        "relu": lambda: StandardTrainingSAEConfig(**common),
        "gated": lambda: GatedTrainingSAEConfig(**common),
        "matryoshka": lambda: MatryoshkaBatchTopKTrainingSAEConfig(
            k=k, matryoshka_widths=[int(n * share) for share in itertools.accumulate(GROUP_SHARES)], **common
        ),
    }[architecture]()
    sae = TrainingSAE.from_dict(config.to_dict())
    if architecture == "jumprelu":
        sae.threshold.data.fill_(level(torch.randn(256, d, device=device) @ sae.W_enc.data, k))
    elif architecture == "relu":
        sae.b_enc.data.fill_(-level(torch.randn(256, d, device=device) @ sae.W_enc.data, k))
    elif architecture == "gated" and trained:
        bias = -level(torch.randn(256, d, device=device) @ sae.W_enc.data, k)
        sae.b_gate.data.fill_(bias)
        sae.b_mag.data.fill_(bias)
    trainer_config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=STEPS * batch,
        device=device, autocast=device == "cuda", lr=2e-4, lr_end=2e-5, lr_scheduler_name="constant",
        lr_warm_up_steps=WARMUP, adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=STEPS // 5, n_restart_cycles=1,
        train_batch_size_samples=batch, dead_feature_window=10**9, feature_sampling_window=10**9,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(trainer_config, sae, iter(()))

    def step(number: int, x: torch.Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step, list(sae.parameters())


def saelens_sparse(*sizes: int | str) -> tuple[Step, list[torch.nn.Parameter]]:
    return saelens(*sizes, sparse=True)


def dictionary_learning(
    architecture: str, d: int, n: int, k: int, batch: int, device: str
) -> tuple[Step, list[torch.nn.Parameter]]:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    architecture, trained = kind_of(architecture)
    kind = {
        "topk": TopKTrainer, "batchtopk": BatchTopKTrainer, "matryoshka": MatryoshkaBatchTopKTrainer,
        "jumprelu": JumpReluTrainer, "relu": StandardTrainer, "gated": GatedSAETrainer,
    }[architecture]  # fmt: skip
    sparse = {"k": k} if architecture in ("topk", "batchtopk", "matryoshka") else {"sparsity_warmup_steps": None}
    own = {"relu": {"resample_steps": None}, "matryoshka": {"group_fractions": list(GROUP_SHARES)}}.get(
        architecture, {}
    )
    trainer = kind(
        steps=STEPS,
        activation_dim=d,
        dict_size=n,
        layer=0,
        lm_name="none",
        lr=2e-4,
        warmup_steps=WARMUP,
        device=device,
        seed=0,
        **sparse,
        **own,
    )
    if architecture == "jumprelu":
        trainer.ae.threshold.data.fill_(level(torch.randn(256, d, device=device) @ trainer.ae.W_enc.data, k))
    elif architecture == "relu":
        trainer.ae.encoder.bias.data.fill_(
            -level(torch.randn(256, d, device=device) @ trainer.ae.encoder.weight.data.T, k)
        )
    elif architecture == "gated" and trained:
        bias = -level(torch.randn(256, d, device=device) @ trainer.ae.encoder.weight.data.T, k)
        trainer.ae.gate_bias.data.fill_(bias)
        trainer.ae.mag_bias.data.fill_(bias)
    return trainer.update, list(trainer.ae.parameters())


SIDES = {f.__name__: f for f in (raysae, sparsify, saelens, saelens_sparse, dictionary_learning)}


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes. VmHWM is the peak since it was last reset."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def main() -> None:
    if sys.argv[1:] == ["torch"]:
        print(torch.__version__)
        return
    side, architecture, *sizes = sys.argv[1:7]
    d, n, k, batch = map(int, sizes)
    device = (*sys.argv[7:], "cpu")[0]
    answers, sys.stdout = sys.stdout, sys.stderr  # What a peer prints must not come between the answers
    torch.manual_seed(0)
    batches = [torch.randn(batch, d, device=device) for _ in range(BATCHES)]
    step, parameters = SIDES[side](architecture, d, n, k, batch, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Reset the peak
    done = 0
    for line in sys.stdin:
        if line.strip() == "memory":
            kept = 3 * sum(p.numel() * p.element_size() for p in parameters)  # Gradients and Adam's two moments
            answer = {
                "bytes": (torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")) - before - kept
            }
        else:
            began = time.perf_counter()
            for _ in range(int(line)):
                step(done, batches[done % BATCHES])
                done += 1
            if device == "cuda":
                torch.cuda.synchronize()
            answer = {"seconds": time.perf_counter() - began}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

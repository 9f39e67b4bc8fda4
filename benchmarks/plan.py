"""What a sweep will cost, from a model of the cost per token that is fitted to measurements.

    python benchmarks/plan.py --measure    measure this machine first (some minutes, quiet) into build/bench/cost.json
    python benchmarks/plan.py              Gemma 2 9B, 7 widths to 2^20 × 6 sparsities, 4 billion tokens, H100s, a week
    python benchmarks/plan.py --device here --model embedded --layer 2 --widths 256,512 --k 8,16 --tokens 1e6 --hours 1

`--model` is a config.json, its folder, or a name on the hub. No weights are read. Three costs are fitted by
non-negative least squares:

    language model, s per token          a₁ · operations + a₂ · d
    an SAE's step, s per token           b₁ · 2·d·n + b₂ · n + b₃ · k·d + b₄ · d·n / batch + b₅ / batch
    the queue, s per block and consumer  c₁ + c₂ / blocks per shard        (docs/cost.md)

- b₁ is the dense encoder product.
- b₂ is the selection of the k largest.
- b₃ is the sparse products.
- b₄ is Adam and the decoder's norms.
- b₅ is what a step costs however small.

`--device here` is this machine. For GPUs the b are read off profiles of TopK steps on an H200 (docs/cost.md). On others
b₁ scales with the data sheet's rate of matrix products. b₂ to b₄ scale with the memory's bandwidth. The language model
has not been measured on a GPU. a₁ goes by the rate of matrix products, of which `--efficiency` is reached. a₂ goes by
the bandwidth.

All SAEs train in one pass. So a device holds its SAEs (weights, gradients, Adam's moments) all the time. It takes a
step of each per batch. SAEs are put on devices largest first. Each goes on the first with hours and memory left for it.
The plan has that number of devices. An SAE is never split.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # A job's processes set this too. Importing torch reads it.

import numpy as np
from options import at_least, fraction, numbers, positive, writable
from scipy.optimize import nnls

REPOSITORY = Path(__file__).parents[1]
MEASURED = REPOSITORY / "build" / "bench" / "cost.json"
STEPS = [  # Each is d, n, k, batch
    (256, 1024, 16, 1024), (256, 1024, 64, 4096), (256, 4096, 32, 512), (256, 4096, 32, 4096), (256, 4096, 128, 4096),
    (256, 16384, 32, 4096), (512, 8192, 32, 2048), (768, 4096, 32, 4096), (768, 16384, 64, 2048),
]  # fmt: skip
ON_H200 = 1 / 790e12, 1.1e-12, 0.95e-12, 2.9e-11, 7e-4  # b₁ … b₅ on an H200, with AuxK idle
QUEUE = 41e-6, 1137e-6  # c₁ and c₂ in seconds, fitted to docs/cost.md
USABLE = 0.9  # Share of a device's memory for its SAEs. Batches and what a step allocates take the rest.
TAKEN = 5  # Attempts whose median is taken


@dataclass(frozen=True)
class Device:
    """Rates at their best, and the memory.

    They are operations per second of matrix products, and bytes per second of memory, bus from the host, and network.
    """

    matmul: float  # In bfloat16
    memory: float
    bus: float
    network: float
    room: float  # Bytes of memory


# Vendors' data sheets: dense bfloat16, PCIe 4 or 5, a 200 or 400 Gbit/s port per GPU.
DEVICES = {
    "a100": Device(312e12, 2.0e12, 32e9, 25e9, 80e9),
    "h100": Device(989e12, 3.35e12, 64e9, 50e9, 80e9),
    "h200": Device(989e12, 4.8e12, 64e9, 50e9, 141e9),
}


# ---------------------------------------------------------------- the model


@dataclass(frozen=True)
class Lm:
    """A language model up to and with a layer: operations per token, and d.

    The operations are products with weights, and attention at a context length.
    """

    operations: float
    d: int


def language_model(name: str, layer: int | None, context: int) -> tuple[Lm, int]:
    """The model that a config.json describes, up to `layer`, and that layer. Without a layer it is the middle one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from raysae.lm.facts import EMBEDDED
    from raysae.lm.layout import MODULES_OF

    path = EMBEDDED if name == "embedded" else Path(name)
    try:
        config = (
            AutoConfig.for_model(**json.loads(path.read_text()))
            if path.is_file()
            else AutoConfig.from_pretrained(path if path.exists() else name)
        )
        if config.model_type not in MODULES_OF:
            raise ValueError(f"its type is {config.model_type}, reckoned with are {', '.join(MODULES_OF)}")
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
    except Exception as error:  # transformers raises many kinds of errors on a file that is something else
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(
            f"error: model is {name!r}: name the config.json of a language model, its folder "
            f"or a model on the hub ({reason})"
        ) from None
    layer = layers // 2 - 1 if layer is None else layer
    if not 0 <= layer < layers:
        raise SystemExit(f"error: layer is {layer}: {name} has the layers 0 to {layers - 1}")
    blocks = whole.get_submodule(MODULES_OF[config.model_type].blocks)
    weights = sum(p.numel() for block in blocks[: layer + 1] for p in block.parameters())
    of_heads = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Lm(2 * weights + 2 * context * of_heads * (layer + 1), config.hidden_size), layer


def of_lm(lm: Lm) -> list[float]:
    return [lm.operations, lm.d]


def of_step(d: int, n: int, k: int, batch: int) -> list[float]:
    return [2 * d * n, n, k * d, d * n / batch, 1 / batch]


def fit(features: list[list[float]], seconds: list[float]) -> np.ndarray:
    """Coefficients ≥ 0 that minimise the relative squares."""
    relative = np.array(features) / np.array(seconds)[:, None]
    scale = relative.max(0)
    found, _ = nnls(relative / scale, np.ones(len(seconds)))
    return found / scale


def errors_of(features: list[list[float]], seconds: list[float]) -> tuple[float, float]:
    """The largest relative errors of the fit and of predictions.

    Each prediction is for a measurement that its fit was made without.
    """
    whole = fit(features, seconds)
    others = [fit(features[:i] + features[i + 1 :], seconds[:i] + seconds[i + 1 :]) for i in range(len(seconds))]
    within = np.array(features) @ whole / seconds - 1
    without = np.sum(np.array(features) * others, axis=1) / seconds - 1
    return float(np.abs(within).max()), float(np.abs(without).max())


# ---------------------------------------------------------------- measuring this machine


def measure(path: Path) -> None:
    import torch
    from step_worker import raysae

    from raysae.config import SweepConfig
    from raysae.lm.model import LanguageModel
    from raysae.stream.shard import ShardMaker
    from raysae.study.plan import plan

    def seconds_of(call: Callable[[], object]) -> float:
        times = []
        for _ in range(1 + TAKEN):  # The first is a warm-up
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    threads = torch.get_num_threads()
    a, b, out = torch.randn(4096, 2048), torch.randn(2048, 4096), torch.empty(4096, 4096)
    source, target = torch.randn(2**26), torch.empty(2**26)
    found = {
        "threads": threads,
        "matmul": 2 * 4096 * 2048 * 4096 / seconds_of(lambda: torch.mm(a, b, out=out)),
        "memory": 2 * 4 * 2**26 / seconds_of(lambda: target.copy_(source)),
        "lm": [], "steps": [],
    }  # fmt: skip
    for layer in range(4):
        hook_point = f"resid_post.{layer}"
        settled = plan(SweepConfig(hook_points=[hook_point]))
        maker = ShardMaker(
            LanguageModel.load(settled.config.model),
            settled.contexts["train"],
            settled.training,
            [hook_point],
            settled.config.stream.block_mib,
        )
        tokens = settled.training.shard_contexts * settled.training.context_length
        lm, _ = language_model("embedded", layer, settled.training.context_length)
        with torch.inference_mode():
            found["lm"].append(
                {"features": of_lm(lm), "seconds": seconds_of(lambda maker=maker: maker.make(0)) / tokens}
            )
        print(f"language model to layer {layer}: {1 / found['lm'][-1]['seconds']:,.0f} tokens/s", flush=True)
    for sizes in STEPS:
        *_, batch = sizes
        step, _ = raysae("topk", *sizes, "cpu")
        x = torch.randn(batch, sizes[0])
        numbers = iter(range(100))
        seconds = seconds_of(lambda step=step, x=x, numbers=numbers: step(next(numbers), x)) / batch
        found["steps"].append({"sizes": sizes, "seconds": seconds})
        print("steps with d{} n{} k{} batch {}:".format(*sizes), f"{1 / seconds:,.0f} tokens/s", flush=True)
    path.write_text(json.dumps(found, indent=1))


def read(path: Path) -> dict:
    """What `measure` has written."""
    if not path.exists():
        sys.exit(f"error: {path} is not there: begin with --measure")
    try:
        measured = json.loads(path.read_text())
        rates = [measured[key] for key in ("threads", "matmul", "memory")]
        for device in (None, *DEVICES.values()):
            fitted(measured, device, 1.0)
        if not min(rates) > 0:
            raise ValueError("rates must be above 0")
    except (OSError, ValueError, LookupError, TypeError, RuntimeError):
        sys.exit(f"error: {path} is not what --measure writes: name its file, or measure anew")
    return measured


@dataclass(frozen=True)
class Cost:
    """The fitted model on a device: seconds per token."""

    lm: np.ndarray
    step: np.ndarray

    def of_lm(self, lm: Lm) -> float:
        return float(self.lm @ of_lm(lm))

    def of_step(self, *sizes: int) -> float:
        return float(self.step @ of_step(*sizes))


def fitted(measured: dict, device: Device | None, efficiency: float) -> tuple[Cost, list[tuple[float, float]]]:
    """The cost on `device`, and the errors of the fits of language model and step.

    None is the device that was measured.
    """
    lm = [row["features"] for row in measured["lm"]], [row["seconds"] for row in measured["lm"]]
    step = [of_step(*row["sizes"]) for row in measured["steps"]], [row["seconds"] for row in measured["steps"]]
    cost = Cost(fit(*lm), fit(*step))
    if device:
        cost.lm[:] = 1 / (efficiency * device.matmul), measured["memory"] / device.memory * cost.lm[1]
        known = DEVICES["h200"]
        product, *others, least = ON_H200
        cost.step[:] = known.matmul / device.matmul * product, *(known.memory / device.memory * np.array(others)), least
    return cost, [errors_of(*lm), errors_of(*step)]


# ---------------------------------------------------------------- the plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="Measure this machine first.")
    parser.add_argument(
        "--measured", type=Path, default=MEASURED, metavar="FILE", help="File that --measure writes and plans read."
    )
    parser.add_argument("--model", default=str(REPOSITORY / "benchmarks" / "gemma-2-9b.json"))
    parser.add_argument("--layer", type=int, help="Hook point resid_post.LAYER. The default is the middle layer.")
    parser.add_argument("--widths", type=numbers, default=",".join(str(2**i) for i in range(14, 21)))
    parser.add_argument("--k", type=numbers, default="20,40,60,80,100,120")
    parser.add_argument("--tokens", type=positive, default=4e9, help="Tokens that each SAE is trained on.")
    parser.add_argument("--batch", type=at_least(1), default=4096)
    parser.add_argument("--context", type=at_least(1), default=1024)
    parser.add_argument(
        "--skip",
        type=at_least(0),
        help="Positions at the beginning of a context that nothing is trained on. The default is a sweep's.",
    )
    parser.add_argument("--block-mib", type=positive, default=32)
    parser.add_argument("--shard-contexts", type=at_least(1), default=256)
    parser.add_argument("--device", choices=["here", *DEVICES], default="h100")
    parser.add_argument(
        "--efficiency",
        type=fraction,
        default=0.4,
        help="Share of a GPU's matrix product rate that the language model reaches. This is an assumption.",
    )
    parser.add_argument("--hours", type=positive, default=168, help="Hours that the sweep may take.")
    options = parser.parse_args()
    if max(options.k) > min(options.widths):
        parser.error(
            f"argument --k: {max(options.k)} is more than the {min(options.widths)} latents of the smallest of --widths"
        )
    if options.skip is None:
        from raysae.study.plan import LONG_CONTEXT, SKIPPED, SKIPPED_LONG

        options.skip = SKIPPED_LONG if options.context >= LONG_CONTEXT else SKIPPED
    if options.skip > options.context - 2:
        parser.error(
            f"argument --context: {options.context} is too short: of it {options.skip} positions are skipped (--skip), "
            "and two must be left"
        )
    lm, layer = language_model(options.model, options.layer, options.context)
    if options.measure:
        MEASURED.parent.mkdir(parents=True, exist_ok=True)
        try:
            writable(str(options.measured))
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --measured: {error}")
        measure(options.measured)
    measured = read(options.measured)
    here = Device(
        measured["matmul"],
        measured["memory"],
        math.inf,
        math.inf,
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
    device = DEVICES.get(options.device)
    cost, errors = fitted(measured, device, options.efficiency)
    print(tell(options, lm, layer, cost, device or here, errors, measured))


def devices_for(loads: list[tuple[float, ...]]) -> list[np.ndarray]:
    """How full each device is, in shares of its hours and its memory, with the SAEs' `loads` on them.

    SAEs are placed largest first, each on the first device that has room. One that is more than a device can take has
    one of its own.
    """
    devices: list[np.ndarray] = []
    for load in sorted(loads, key=max, reverse=True):
        free = next((device for device in devices if (device + load <= 1).all()), None)
        if free is None:
            devices.append(np.array(load))
        else:
            free += load
    return devices


def counted(number: str, noun: str) -> str:
    return f"{number} {noun}{'' if number == '1' else 's'}"


def tell(
    options: argparse.Namespace,
    lm: Lm,
    layer: int,
    cost: Cost,
    device: Device,
    errors: list[tuple[float, float]],
    measured: dict,
) -> str:
    used = (options.context - options.skip) / options.context
    widths, ks = options.widths, options.k
    steps = {(n, k): cost.of_step(lm.d, n, k, options.batch) for n in widths for k in ks}  # Seconds per token
    state = {n: 2 * lm.d * n * (4 + 4 + 8) for n in widths}  # Weights, gradients and Adam's moments in float32
    seconds = 3600 * options.hours
    passes, training = options.tokens / used * cost.of_lm(lm), options.tokens * sum(steps.values())
    producers = math.ceil(passes / seconds)
    room = USABLE * device.room
    full = devices_for([(options.tokens * step / seconds, state[n] / room) for (n, _), step in steps.items()])
    trainers = f"the fullest of {counted(str(len(full)), 'device')}"
    hours = counted(f"{options.hours:g}", "hour")
    rate = options.tokens / seconds  # Tokens per second of the stream
    item = 4 if options.device == "here" else 2
    blocks = math.ceil(
        options.shard_contexts * (options.context - options.skip) * lm.d * item / (options.block_mib * 2**20)
    )
    delivered = rate * lm.d * item / (options.block_mib * 2**20) * len(full)
    saturation = {
        f"language model ({counted(str(producers), 'device')})": passes / seconds / producers,
        f"training ({trainers})": max(spent for spent, _ in full),
        f"trainers' usable memory ({trainers})": max(memory for _, memory in full),
        "bus from host to trainer": rate * lm.d * item / device.bus,
        "network into a trainer": rate * lm.d * item / device.network,
        "network out of a producer": rate * lm.d * item / producers * len(full) / device.network,
        f"queue ({counted(str(len(full)), 'consumer')}, {counted(str(blocks), 'block')} a shard)": delivered
        * (QUEUE[0] + QUEUE[1] / blocks),
    }
    store = options.tokens * lm.d * item
    off = [f"{within:.0%} at most, {without:.0%} for what they were not fitted to" for within, without in errors]
    lines = [
        f"Measured with {counted(str(measured['threads']), 'thread')}, {measured['matmul'] / 1e9:,.0f} GFLOP/s, "
        f"{measured['memory'] / 1e9:.1f} GB/s.",
        f"The fits are off by {off[0]} (language model), and by {off[1]} (step)."
        if options.device == "here"
        else "An SAE's step is reckoned by profiles on an H200 with AuxK idle: "
        "with an eighth of the latents dead one took 1.6 times as long.",
        f"{Path(options.model).stem} up to layer {layer}: d = {lm.d}, {lm.operations / 1e9:,.2f} GFLOP per token, "
        f"{used / cost.of_lm(lm):,.0f} activations/s per device",
        f"{counted(str(len(steps)), 'SAE')} on {options.tokens:,.0f} tokens each, batch {options.batch:,}; "
        "a device trains one at",
        *(
            f"  n = {n:>9,}: {len(ks) / sum(steps[n, k] for k in ks):>10,.0f} tokens/s; "
            f"weights, gradients and Adam take {state[n] / 1e9:,.1f} GB"
            for n in widths
        ),
        f"In {hours}: {producers} {options.device} for the language model, {len(full)} for the SAEs "
        f"({passes / 3600:,.1f} and {training / 3600:,.1f} device hours), a stream of {rate:,.0f} tokens/s",
        f"All activations, if they are kept: {store / 1e12:,.2f} TB per hook point",
        "How full each part is, the fullest first:",
        *(f"  {share:7.1%}  {name}" for name, share in sorted(saturation.items(), key=lambda item: -item[1])),
    ]
    for what, refused in {
        f"do not fit into a device's usable {room / 1e9:.0f} GB": {n for n in widths if state[n] > room},
        f"take more than {hours} on a device": {n for (n, _), step in steps.items() if options.tokens * step > seconds},
    }.items():
        if refused:
            lines.append(
                f"SAEs of width {', '.join(f'{n:,}' for n in sorted(refused))} {what}: "
                "raysae does not split an SAE, this plan cannot be."
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Tokens per second of a producer against a bare forward pass.

    python benchmarks/producer.py [--model embedded] [--hook-point resid_post.2] [--threads 2] [--repeats 7]
                                  [--json FILE]

The producer makes whole shards, as in a sweep. It does forward pass, capture, permutation and blocks. The bare pass is
transformers' own model without hooks, cut off behind the same layer. It has the same contexts. The two take turns. The
ratio is taken in every turn, and the output has its median, least and greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # A job's processes set this too. Importing torch reads it.

import torch
from options import at_least, writable
from steps import spread

from raysae.commands.parse import main
from raysae.config import SweepConfig, UserError
from raysae.lm.model import LanguageModel
from raysae.stream.shard import ShardMaker
from raysae.study.plan import plan


@torch.inference_mode()
def job(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--hook-point", default="resid_post.2")
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--repeats", type=at_least(1), default=7)
    parser.add_argument("--json", type=writable, metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    settled = plan(SweepConfig.model_validate({"model": {"name": options.model}, "hook_points": [options.hook_point]}))
    spec, contexts = settled.training, settled.contexts["train"]
    maker = ShardMaker(
        LanguageModel.load(settled.config.model), contexts, spec, [options.hook_point], settled.config.stream.block_mib
    )
    bare = LanguageModel.load(settled.config.model).model.base_model
    if not hasattr(bare, "layers"):
        raise UserError(
            f"--model is {options.model!r}, whose layers are not in `layers`, so the bare pass cannot be cut off. "
            "Name a model that has them there."
        )
    bare.layers = bare.layers[: int(options.hook_point.split(".")[1]) + 1]
    bare.norm = torch.nn.Identity()
    batches = torch.from_numpy(contexts[spec.contexts_of(0)]).split(spec.batch_contexts)

    def forward() -> None:
        for batch in batches:
            bare(input_ids=batch, use_cache=False)

    seconds = {"producer": [], "bare": []}
    for repeat in range(options.repeats + 1):
        for name, call in (("producer", lambda: maker.make(0)), ("bare", forward)):
            began = time.perf_counter()
            call()
            if repeat:  # The first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    tokens = spec.shard_contexts * spec.context_length
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    ratio = spread(bare / producer for producer, bare in zip(seconds["producer"], seconds["bare"], strict=True))
    print("producer {producer:,.0f} tokens/s, bare forward pass {bare:,.0f} tokens/s: ".format(**rates), end="")
    print("{median:.3f} ({least:.3f} to {greatest:.3f})".format(**ratio))
    if options.json:
        options.json.write_text(json.dumps({**rates, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main(job)

"""Train the language model and tokenizer that ship in `raysae/lm/embedded/`.

    python scripts/train_embedded_lm.py --data ../shared/data --work build/embedded_lm

Everything is held out by document. `validation_head.txt` and every story that the pronoun test quotes are never trained
on. Ten books and one Python file in fifty are kept for evaluation.

The run checkpoints every `--every` steps. Called again with the same `--work`, it resumes from its last checkpoint. A
larger `--tokens` continues from there. `--export` writes the package's copy (fp16). It prints the numbers of the
README.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256
VOCABULARY = 4096
# Shares of training contexts, before and after SECOND_STAGE tokens. There are only 0.75M tokens of stories, and by then
# the model has seen each three times. Dropout keeps it from learning them by heart.
MIXTURES = {"stories": (0.35, 0.50), "prose": (0.25, 0.30), "python": (0.40, 0.20)}
DROPOUTS = (0.0, 0.1)
SECOND_STAGE = 6_144_000
HELD_OUT_BOOKS = 10
EXPORT = Path(__file__).parents[1] / "raysae" / "lm" / "embedded"


# ---------------------------------------------------------------- corpus


def stories(data: Path) -> tuple[list[str], list[str]]:
    """Training stories, and the held-out text: the whole official validation file.

    A training story is dropped when the pronoun test quotes it: it begins with an item's prefix. It is also dropped
    when the validation file contains its first 80 characters.
    """
    folder = data / "text" / "tinystories"
    validation = (folder / "validation_head.txt").read_text()
    items = [json.loads(line) for line in (data / "eval/tinystories_pronoun/pronoun.jsonl").open()]
    quoted = tuple(item["prefix"].strip() for item in items)
    kept, seen = [], set()
    for name in ("train_head.txt", "train_v1_head.txt"):
        for story in (folder / name).read_text().split("<|endoftext|>"):
            story = story.strip()
            head = story[:80]
            if len(story) < 100 or head in seen or head in validation or story.startswith(quoted):
                continue
            seen.add(head)
            kept.append(story)
    return kept, [validation]


def books(data: Path) -> tuple[list[str], list[str]]:
    """Books ordered by the hash of their title. The first ten are held out."""
    texts = []
    for shard in sorted((data / "text" / "classic-books").glob("*.jsonl.xz")):
        with lzma.open(shard, "rt") as lines:
            texts += [(r["title"], r["text"]) for r in map(json.loads, lines)]
    texts.sort(key=lambda t: hashlib.sha256(t[0].encode()).hexdigest())
    return [t for _, t in texts[HELD_OUT_BOOKS:]], [t for _, t in texts[:HELD_OUT_BOOKS]]


def python_sources() -> tuple[list[str], list[str]]:
    """Standard library and installed packages of the running interpreter.

    One file in fifty is held out by the hash of its path.
    """
    roots = [Path(sysconfig.get_paths()["stdlib"]), Path(sysconfig.get_paths()["purelib"])]
    train, held_out, seen = [], [], set()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            relative = str(path.relative_to(root))
            if root == roots[0] and "site-packages" in relative:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            digest = hashlib.sha256(text.encode()).hexdigest()
            if not 300 <= len(text) <= 300_000 or digest in seen:
                continue
            seen.add(digest)
            bucket = int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 50
            (held_out if bucket == 0 else train).append(text)
    return train, held_out


def train_tokenizer(corpus: dict[str, list[str]], rng: np.random.Generator) -> Tokenizer:
    """Byte-level BPE on 6 MB of each kind of text.

    Digits stand alone. Runs of spaces (Python's indentation) may merge.
    """
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n[ \t]*|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample = []
    for texts in corpus.values():
        budget = 6_000_000
        for i in rng.permutation(len(texts)):
            piece = texts[i][:100_000]
            sample.append(piece)
            budget -= len(piece)
            if budget < 0:
                break
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def prepare(data: Path, work: Path) -> None:
    """Tokenise everything once into `work`.

    Each kind has one uint16 stream, its document starts, and the held-out documents.
    """
    if (work / "corpus.json").exists():
        return
    rng = np.random.default_rng(0)
    split = {"stories": stories(data), "prose": books(data), "python": python_sources()}
    tokenizer = train_tokenizer({k: v[0] for k, v in split.items()}, rng)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )
    fast.save_pretrained(work / "tokenizer")
    separator = tokenizer.encode("\n\n").ids
    summary = {}
    for kind, (train, held_out) in split.items():
        order = rng.permutation(len(train))
        budget, chosen = 45_000_000, []  # Bytes, more than any run here reads
        for i in order:
            chosen.append(train[i])
            budget -= len(train[i])
            if budget < 0:
                break
        ids, starts = [], [0]
        for encoding in tokenizer.encode_batch(chosen):
            ids.append(np.array(encoding.ids + separator, np.uint16))
            starts.append(starts[-1] + len(ids[-1]))
        np.save(work / f"{kind}.npy", np.concatenate(ids))
        np.save(work / f"{kind}_starts.npy", np.array(starts[:-1]))
        (work / f"{kind}_held_out.json").write_text(json.dumps(held_out))
        summary[kind] = {"documents": len(chosen), "tokens": starts[-1], "held_out_documents": len(held_out)}
        print(kind, summary[kind], flush=True)
    (work / "corpus.json").write_text(json.dumps(summary))


class Contexts:
    """Training contexts `(b, CONTEXT)`, BOS first. Batch i is a function of (seed, i).

    Half begin at a document's start, half anywhere.
    """

    def __init__(self, work: Path):
        self.streams = {k: np.load(work / f"{k}.npy", mmap_mode="r") for k in MIXTURES}
        self.starts = {k: np.load(work / f"{k}_starts.npy") for k in MIXTURES}

    def batch(self, step: int, size: int) -> torch.Tensor:
        rng = np.random.default_rng([17, step])
        rows = []
        shares = [share[stage(step * size * CONTEXT)] for share in MIXTURES.values()]
        for kind in rng.choice(list(MIXTURES), size, p=shares):
            stream, starts = self.streams[kind], self.starts[kind]
            last = len(stream) - CONTEXT
            at = rng.choice(starts) if rng.random() < 0.5 else rng.integers(last)
            at = min(at, last)
            rows.append(np.concatenate([[0], stream[at : at + CONTEXT - 1]]))
        return torch.from_numpy(np.stack(rows).astype(np.int64))


# ---------------------------------------------------------------- model and training


def stage(tokens: int) -> int:
    return int(tokens >= SECOND_STAGE)


def add_dropout(model: LlamaForCausalLM) -> None:
    """While training, drop the share `model.dropout` of what attention and MLPs add to the residual stream."""
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp):
            module.register_forward_hook(lambda module, _, output: F.dropout(output, model.dropout, module.training))


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=1, pad_token_id=1, rms_norm_eps=1e-5,
        )
    )  # fmt: skip


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on the embedding and the norms.

    This makes about twice the progress per token of AdamW alone.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def schedule(tokens: int, total: int) -> float:
    """Warm-up over 0.4M tokens, constant, linear to zero over the last 40 %."""
    return min(1.0, tokens / 400_000, max(0.0, total - tokens) / (0.4 * total))


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(args: argparse.Namespace, work: Path, device: str) -> None:
    contexts, model = Contexts(work), build().to(device)
    opts, compiled_loss = optimizers(model), torch.compile(loss_of)  # Compiling gains 15 % on a CPU
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    step, checkpoint = 0, work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(opts, state["optimizers"], strict=True):
            o.load_state_dict(s)
        step = state["step"]
        print(f"resumed at step {step}", flush=True)
    add_dropout(model)
    per_step, began, first, running = args.batch * CONTEXT, time.time(), step, 0.0
    while step * per_step < args.tokens:
        factor = schedule(step * per_step + per_step, args.tokens)
        for o, lrs in zip(opts, base, strict=True):
            for group, lr in zip(o.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        model.dropout = DROPOUTS[stage(step * per_step)]
        batch = contexts.batch(step, args.batch).to(device)
        pieces = batch.split(args.micro)
        for piece in pieces:
            loss = compiled_loss(model, piece) * (len(piece) / args.batch)
            loss.backward()
            running += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad()
        step += 1
        if step % 50 == 0:
            rate = (step - first) * per_step / (time.time() - began)
            print(
                f"step {step} tokens {step * per_step / 1e6:.2f}M loss {running / 50:.3f} "
                f"lr {factor:.3f} {rate:.0f} tokens/s",
                flush=True,
            )
            running = 0.0
        if step % args.every == 0 or step * per_step >= args.tokens:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "step": step}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            if step * per_step <= 0.6 * args.tokens:  # The last state before the decay, where a longer run would resume
                os.link(checkpoint, checkpoint.with_suffix(".new"))
                os.replace(checkpoint.with_suffix(".new"), work / "before_decay.pt")


# ---------------------------------------------------------------- evaluation and export


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[str], limit: int = 400
) -> tuple[float, int]:
    """Bits per byte: Σ loss in bits / Σ bytes of the predicted tokens. The second number is the bytes.

    Contexts have CONTEXT tokens with BOS, evenly spaced over the held-out documents.
    """
    windows = []
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        windows += [ids[i : i + CONTEXT - 1] for i in range(0, len(ids), CONTEXT - 1)]
    windows = windows[:: max(1, math.ceil(len(windows) / limit))]
    bits = size = 0.0
    for ids in windows:
        tokens = torch.tensor([[0, *ids]], device=model.device)
        bits += loss_of(model, tokens).item() * len(ids) / math.log(2)
        size += len(tokenizer.decode(ids).encode())
    return bits / size, int(size)


@torch.no_grad()
def pronoun_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path, source: str
) -> tuple[int, int]:
    """Items of `source` whose right pronoun's first token gets the higher logit, and all items, as numbers."""
    right = total = 0
    for line in (data / "eval/tinystories_pronoun/pronoun.jsonl").open():
        item = json.loads(line)
        if item["source"] != source:
            continue
        good, bad = (tokenizer(item[k], add_special_tokens=False)["input_ids"] for k in ("good", "bad"))
        ids = tokenizer(item["prefix"], add_special_tokens=False)["input_ids"][-(CONTEXT - 1) :]
        logits = model(torch.tensor([[0, *ids]], device=model.device)).logits[0, -1]
        right += bool(logits[good[0]] > logits[bad[0]])
        total += 1
    return right, total


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    torch.manual_seed(0)
    ids = torch.tensor([[0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=90,
        do_sample=True,
        temperature=0.6,
        top_k=40,
        eos_token_id=None,
    )
    return tokenizer.decode(out[0, 1:])


def evaluate(args: argparse.Namespace, work: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    from scipy.stats import binomtest

    model.eval()
    for kind in MIXTURES:
        value, size = bits_per_byte(model, tokenizer, json.loads((work / f"{kind}_held_out.json").read_text()))
        print(f"{kind:8s} {value:.3f} bits per byte over {size} held-out bytes")
    right, total = pronoun_accuracy(model, tokenizer, Path(args.data), "validation_head.txt")
    interval = binomtest(right, total).proportion_ci(method="wilson")
    print(f"pronoun {right}/{total} = {right / total:.3f}, 95 % interval [{interval.low:.3f}, {interval.high:.3f}]")
    for prompt in (
        "Once upon a time, there was a little girl named Lily.",
        "It was a dark night, and the old man",
        "def read_file(path):\n",
    ):
        print("-----\n" + sample(model, tokenizer, prompt))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="Folder with text/ and eval/.")
    parser.add_argument("--work", default="build/embedded_lm", help="Folder for tokens and checkpoints.")
    parser.add_argument("--tokens", type=int, default=10_500_000, help="Tokens to train on in all.")
    parser.add_argument("--batch", type=int, default=16, help="Contexts per step.")
    parser.add_argument("--micro", type=int, default=4, help="Contexts per backward pass, few enough for the cache.")
    parser.add_argument("--every", type=int, default=100, help="Steps between checkpoints.")
    parser.add_argument(
        "--export",
        action="store_true",
        help="Evaluate the checkpoint and write it into the package instead of training.",
    )
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare(Path(args.data), work)
    if not args.export:
        train(args, work, device)
        return
    model = build()
    state = torch.load(work / "checkpoint.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    model = model.half().float()  # fp16 is what ships, so measure that
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    print(f"checkpoint at step {state['step']}")
    model.half().save_pretrained(EXPORT)
    tokenizer.save_pretrained(EXPORT)
    evaluate(
        args,
        work,
        LlamaForCausalLM.from_pretrained(EXPORT, dtype=torch.float32),
        PreTrainedTokenizerFast.from_pretrained(EXPORT),
    )


if __name__ == "__main__":
    main()

"""A small trained teacher over a large real vocabulary, and its scores of documents that it never saw.

No weights are fetched: a Qwen2 of about 20M parameters (97 % of them the embedding) is trained with the Qwen2.5
tokenizer of CDM_REAL_DATA on its instruction data, then scores held-out documents through `cdm.teacher`. Both are kept
in outputs/benchmarks/. Run alone it prints what was learned: `python -m benchmarks.teacher_152k`.

Legend: B sequences of a batch, N tokens, D hidden size, V vocabulary, C candidates of the sampled softmax.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from cdm.records import Document, Message, ScoredDocument
from cdm.shards import read_scores, write_scores
from cdm.teacher import CannotScore, TeacherScorer, render
from cdm.tokenizers import Tokenizer, load_tokenizer

FOLDER = Path("outputs/benchmarks/teacher-152k")
SOURCES = (
    *("gsm8k_train", "p3_sample", "math_test", "cot_ecqa", "cot_aqua", "cot_strategyqa", "dolly_dev1000"),
    *("sni_eval1694", "mbpp", "selfinst_seed175", "selfinst_user_oriented252", "glaive_toolcall_en"),
)
HELD_OUT = 16  # one document in so many
STEPS, BATCH, LENGTH = 400, 16, 256
FREQUENT, SAMPLED = 4096, 2048  # candidates: the training data's most frequent ids, and a sample of all others
TOP_K, TOKENS, PART = 100, 110_000, "train-00000.parquet"
MAX_LENGTH = 512


def real_data() -> Path:
    folder = os.environ.get("CDM_REAL_DATA")
    if not folder:
        raise SystemExit("CDM_REAL_DATA must name the folder with tokenizers/qwen2.5 and instructions/")
    return Path(folder)


def documents(held_out: bool) -> Iterator[Document]:
    """The documents of all sources, in the order of a hash of their text, training or held-out ones."""
    found = {}
    for source in SOURCES:
        with gzip.open(real_data() / "instructions" / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                key = hashlib.sha256(f"{row['prompt']}\0{row['response']}".encode()).hexdigest()[:32]
                if row["response"].strip() and (int(key, 16) % HELD_OUT == 0) == held_out:
                    found[key] = Document(key, (Message("user", row["prompt"]),), row["response"])
    return iter(sorted(found.values(), key=lambda document: document.id[::-1]))


# --- training ----------------------------------------------------------------------------------------------------


def train(folder: Path) -> None:
    """Write the model: `STEPS` steps of a sampled softmax over the training documents, each read at most once."""
    tokenizer = load_tokenizer(str(real_data() / "tokenizers" / "qwen2.5"))
    batches = _batches(tokenizer)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        )
    )  # fmt: skip
    frequent = torch.from_numpy(np.bincount(batches.ravel(), minlength=tokenizer.vocab_size).argsort()[::-1].copy())
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _rate)
    began, mean = time.process_time(), math.nan
    for step, batch in enumerate(torch.from_numpy(batches)):
        loss = _sampled_loss(model, batch, frequent)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        mean = loss.item() if step == 0 else 0.8 * mean + 0.2 * loss.item()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: sampled loss {mean:.3f}, {time.process_time() - began:.0f} CPU seconds", flush=True)
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.hf.save_pretrained(unfinished)
    unfinished.rename(folder)


def _batches(tokenizer: Tokenizer) -> np.ndarray:
    """Documents as this model's own prompts and responses, one after the other: [STEPS, B, N + 1]."""
    stream: list[int] = []
    for document in documents(held_out=False):
        try:
            one = render(tokenizer, document, MAX_LENGTH)
        except CannotScore:
            continue
        stream += [*one.prompt_ids, *one.ids.tolist()]
        if len(stream) >= STEPS * BATCH * (LENGTH + 1):
            break
    sequences = np.array(stream[: len(stream) // (LENGTH + 1) * (LENGTH + 1)]).reshape(-1, LENGTH + 1)
    order = np.random.default_rng(0).permutation(np.resize(np.arange(len(sequences)), STEPS * BATCH))
    return sequences[order].reshape(STEPS, BATCH, LENGTH + 1)


def _rate(step: int) -> float:
    return min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))


def _sampled_loss(model: Qwen2ForCausalLM, batch: Tensor, frequent: Tensor) -> Tensor:
    """Cross-entropy [B, N + 1] -> [] over the frequent ids, and a sample that stands for all the others.

    A rare target competes in its own row only, beside what the sample stands for.
    """
    hidden = model.model(input_ids=batch[:, :-1]).last_hidden_state.flatten(0, 1)
    targets = batch[:, 1:].reshape(-1)
    rare = frequent[FREQUENT:]
    sample = rare[torch.randperm(len(rare))[:SAMPLED]]
    weight = model.lm_head.weight
    logits = hidden @ weight[torch.cat([frequent[:FREQUENT], sample])].T
    logits = torch.cat([logits[:, :FREQUENT], logits[:, FREQUENT:] + math.log(len(rare) / SAMPLED)], 1)
    place = torch.full((model.config.vocab_size,), -1)
    place[frequent[:FREQUENT]] = torch.arange(FREQUENT)
    at = place[targets]
    own = (hidden * weight[targets]).sum(1)
    rest = torch.logsumexp(logits, 1)
    total = torch.where(at >= 0, rest, torch.logaddexp(rest, own))
    return (total - own).mean()


# --- scores ------------------------------------------------------------------------------------------------------


def model_folder() -> Path:
    """The trained model, made first where it is not there."""
    if not FOLDER.exists():
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        train(FOLDER)
    return FOLDER


def scored_documents() -> list[ScoredDocument]:
    """About TOKENS tokens of held-out responses, scored with top TOP_K in float32; kept as a shard part."""
    folder = f"{FOLDER}-scores"
    if not (Path(folder) / PART).exists():
        engine = {"type": "transformers", "dtype": "float32", "batch_tokens": 4096}
        scorer = TeacherScorer(str(model_folder()), engine=engine, top_k=TOP_K, max_length=MAX_LENGTH)
        chosen, size = [], 0
        for document in documents(held_out=True):
            size += len(document.response.encode())
            chosen.append(document)
            if size > 3.3 * TOKENS:
                break
        scored, _ = scorer(chosen)
        write_scores(folder, PART, scored, quarantined=[], identity={"k": TOP_K})
    return read_scores(folder, PART)


def perplexity(scored: list[ScoredDocument]) -> float:
    """Of the held-out responses, over the whole vocabulary."""
    return float(np.exp(-np.concatenate([document.logp_t for document in scored]).astype(np.float64).mean()))


def describe(scored: list[ScoredDocument]) -> str:
    """A line: size, perplexity, and how peaked the rows are."""
    tokens = sum(len(document.ids_t) for document in scored)
    entropy = np.concatenate([document.entropy_t for document in scored])
    logp = np.concatenate([document.topk_logp_t for document in scored]).astype(np.float32)
    best, kept = np.exp(logp[:, 0]), np.exp(logp[:, :64]).sum(1)
    return (
        f"{tokens:,} held-out tokens, perplexity {perplexity(scored):.1f}; entropy {entropy.mean():.2f} nats, best "
        f"{best.mean():.2f} (median {np.median(best):.2f}), mass of the top 64 {kept.mean():.3f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(describe(scored_documents()))

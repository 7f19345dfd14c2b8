"""Scoring speed of every way to a teacher's top k, side by side: `python -m benchmarks.teacher`.

One teacher (Qwen2's architecture, 256 wide, 4 layers, a vocabulary of 8,000, random weights: speed does not depend on
them), the same documents, one thread, interleaved repetitions. Rates are response tokens per second. The prompts are a
line long, because vLLM's own log-probabilities also cover the prompt, and nothing but the response is wanted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}

import numpy as np
import torch

from benchmarks.table import finish, machine, show
from cdm.config_corpus import PythonPackages
from cdm.config_models import Pretrain
from cdm.corpus import read_documents, write_corpus
from cdm.engines import TransformersEngine, VllmEngine, _hidden
from cdm.logit_rows import TokenRows
from cdm.models import build_model
from cdm.records import Document, Message
from cdm.teacher import render
from cdm.tokenizers import load_tokenizer

TOP_K = 100
MAX_LENGTH = 1024
BATCH_TOKENS = 8192
PACKAGES = ["argparse", "asyncio", "ctypes", "email", "http", "logging", "multiprocessing", "numpy", "unittest"]
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "layers": 4, "heads": 4, "kv_heads": 2, "context": 2048}
VLLM: dict[str, Any] = {
    "dtype": "bfloat16",
    "tensor_parallel_size": 1,
    "gpu_memory_utilization": 0.4,
    "kv_cache_gib": 0.25,
    "max_num_batched_tokens": BATCH_TOKENS,
}


@dataclass(frozen=True)
class Texts:
    """What every way scores: whole sequences, and where each one's response starts."""

    sequences: list[list[int]]
    starts: list[int]

    @property
    def tokens(self) -> int:
        return sum(len(ids) - start for ids, start in zip(self.sequences, self.starts, strict=True))

    def head(self, n: int) -> Texts:
        return Texts(self.sequences[:n], self.starts[:n])


Way = Callable[[Texts], float | None]  # gives the mean log-probability of the response tokens, where it knows it


def main(documents: int, repetitions: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = make_teacher(folder)
        texts = read_texts(folder, model, documents)
        ways = {**vllm_ways(model), **transformers_ways(model)}
        known = {name: way(texts.head(8)) for name, way in ways.items()}  # compiles, and must agree
        check_agreement([mean for mean in known.values() if mean is not None])
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(repetitions):
            for name, way in ways.items():
                seconds[name].append(timed(way, texts))
    report(texts, seconds)


def report(texts: Texts, seconds: dict[str, list[tuple[float, float]]]) -> None:
    cpu, wall = (
        {name: texts.tokens / statistics.median(pair[i] for pair in pairs) for name, pairs in seconds.items()}
        for i in (0, 1)
    )
    ours = cpu["vllm, this project's rows"]
    rows = [[name, f"{rate:,.0f}", f"{wall[name]:,.0f}", f"{ours / rate:.2f}"] for name, rate in cpu.items()]
    title = f"{len(texts.sequences)} documents, {texts.tokens:,} response tokens, k = {TOP_K}; {machine()}, one thread"
    show(title, ["way", "tokens/CPU s", "tokens/s", "ours is x times"], rows)
    finish(
        {
            "tokens_per_cpu_s": ours,
            "tokens_per_s": wall["vllm, this project's rows"],
            "speedup_vs_stock": ours / cpu["vllm, prompt_logprobs as they come"],
            "speedup_vs_flat": ours / cpu["vllm, flat_logprobs without text"],
            "share_of_forward": ours / cpu["vllm, prompts alone, no log-probabilities"],
            "share_of_transformers": ours / cpu["transformers, forward and top-k alone"],
            "transformers_engine_share": cpu["transformers, this project's rows"]
            / cpu["transformers, forward and top-k alone"],
        }
    )


def timed(way: Way, texts: Texts) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    way(texts)
    return time.process_time() - cpu, time.perf_counter() - wall


def check_agreement(means: Sequence[float]) -> None:
    if max(means) - min(means) > 0.02:  # nats; bfloat16 makes a hundredth
        raise ValueError(f"the ways do not score the same thing: mean log-probabilities {means}")


# --- the teacher and its texts -----------------------------------------------------------------------------------


def make_teacher(folder: str) -> str:
    corpus = PythonPackages(type="python_packages", packages=PACKAGES, min_response_bytes=800, max_response_bytes=4000)
    write_corpus(corpus, f"{folder}/corpus")
    section = Pretrain.model_validate(
        {
            "type": "pretrain", "name": "teacher", "architecture": "qwen2", **SHAPE,
            "tokenizer": {"type": "byte_level_bpe", "vocab_size": 8000}, "training": {"steps": 0},
        }
    )  # fmt: skip
    build_model(section, f"{folder}/corpus", f"{folder}/model", seed=0)
    return f"{folder}/model"


def read_texts(folder: str, model: str, documents: int) -> Texts:
    tokenizer = load_tokenizer(model)
    names = sorted(path.name for path in Path(folder, "corpus").glob("train-*.parquet"))
    found = [document for name in names for document in read_documents(f"{folder}/corpus", name)][:documents]
    prompt = (Message("user", "Write a function."),)
    rendered = [render(tokenizer, Document(one.id, prompt, one.response), MAX_LENGTH) for one in found]
    return Texts([[*r.prompt_ids, *r.ids.tolist()] for r in rendered], [len(r.prompt_ids) for r in rendered])


def mean_logp(rows: Sequence[TokenRows | None]) -> float:
    return float(np.concatenate([one.logp for one in rows if one is not None]).mean())


# --- vLLM --------------------------------------------------------------------------------------------------------


def vllm_ways(model: str) -> dict[str, Way]:
    """Ours, and what vLLM gives by itself from a second engine with the same settings."""
    engine = VllmEngine(model, revision=None, top_k=TOP_K, max_length=MAX_LENGTH, **VLLM)
    from vllm import LLM

    with _hidden("llvmlite.binding.ffi"):
        llm = LLM(
            model, dtype="bfloat16", max_model_len=MAX_LENGTH, max_num_batched_tokens=BATCH_TOKENS, max_logprobs=TOP_K,
            enforce_eager=not torch.cuda.is_available(), enable_prefix_caching=False, seed=0, **memory(),
        )  # fmt: skip
    return {
        "vllm, prompt_logprobs as they come": lambda texts: stock(llm, texts, {}),
        "vllm, flat_logprobs without text": lambda texts: stock(
            llm, texts, {"flat_logprobs": True, "detokenize": False}
        ),
        "vllm, this project's rows": lambda texts: mean_logp(engine.token_rows(texts.sequences, texts.starts)),
        "vllm, prompts alone, no log-probabilities": lambda texts: _forget(generate(llm, texts, {"detokenize": False})),
    }


def _forget(outputs: list[Any]) -> None:
    """Prompts alone tell no log-probability."""


def memory() -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"gpu_memory_utilization": VLLM["gpu_memory_utilization"]}
    return {"kv_cache_memory_bytes": int(VLLM["kv_cache_gib"] * 2**30)}


def generate(llm: Any, texts: Texts, options: dict[str, Any]) -> list[Any]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids[:-1]} for ids in texts.sequences]
    outputs: list[Any] = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0, **options), use_tqdm=False)
    return outputs


def stock(llm: Any, texts: Texts, options: dict[str, Any]) -> float:
    """vLLM's own objects; entry i is the distribution of token i, so the last token's is not among them."""
    outputs = generate(llm, texts, options | {"prompt_logprobs": TOP_K})
    total = count = 0.0
    for output, ids, start in zip(outputs, texts.sequences, texts.starts, strict=True):
        for i in range(start, len(ids) - 1):
            total += output.prompt_logprobs[i][ids[i]].logprob
            count += 1
    return total / count


# --- transformers ------------------------------------------------------------------------------------------------


def transformers_ways(model: str) -> dict[str, Way]:
    from transformers import AutoModelForCausalLM

    engine = TransformersEngine(
        model, revision=None, top_k=TOP_K, max_length=MAX_LENGTH, dtype="bfloat16", batch_tokens=BATCH_TOKENS
    )
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval().to(engine.device)
    return {
        "transformers, this project's rows": lambda texts: mean_logp(engine.token_rows(texts.sequences, texts.starts)),
        "transformers, forward and top-k alone": lambda texts: forward_and_top_k(plain, texts),
    }


@torch.inference_mode()
def forward_and_top_k(model: Any, texts: Texts) -> float:
    """What a careful script does: like lengths together, the head in blocks, no entropy."""
    order = sorted(range(len(texts.sequences)), key=lambda i: len(texts.sequences[i]))
    size = max(1, BATCH_TOKENS // max(map(len, texts.sequences)))
    logps = []
    for at in range(0, len(order), size):
        batch = [torch.tensor(texts.sequences[i]) for i in order[at : at + size]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        starts = [texts.starts[i] for i in order[at : at + size]]
        flat = torch.cat(
            [hidden[b, start - 1 : len(one) - 1] for b, (one, start) in enumerate(zip(batch, starts, strict=True))]
        )
        own = torch.cat([one[start:] for one, start in zip(batch, starts, strict=True)]).to(model.device)
        for rows, wanted in zip(flat.split(1024), own.split(1024), strict=True):
            logits = model.lm_head(rows).float()
            norm = logits.logsumexp(-1)
            top = logits.topk(TOP_K)
            _ = ((top.values - norm[:, None]).cpu().numpy(), top.indices.cpu().numpy())
            logps.append(logits.gather(1, wanted[:, None])[:, 0] - norm)
    return float(torch.cat(logps).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=3)
    main(**vars(parser.parse_args()))

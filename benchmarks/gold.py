"""One epoch of Hugging Face TRL's GOLDTrainer against one that reads cached scores, of the same models and documents.

    CDM_REAL_DATA=FOLDER python -m benchmarks.gold

TRL comes from benchmarks/requirements.txt, in a folder of its own. Two tiny models: a student with GPT-2's tokenizer
and a teacher with Qwen2.5's, V = 151,936. Both train on the same documents, as many a step: every document has the same
number of the student's tokens. One thread each, in a process of its own; CPU seconds between the end of the first step
and that of the last but one. GOLDTrainer runs the teacher in every step, ours ran it once: that time is printed apart.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import runs
from benchmarks.losses import INSTALL, PEERS
from benchmarks.memory import in_fresh_process
from benchmarks.table import finish, machine, show
from cdm.checkpoints import FolderCheckpoints
from cdm.config_models import Optimisation
from cdm.student import train
from cdm.tokenizers import Tokenizer, load_tokenizer

LENGTH = 192  # tokens of a document, prompt included
LEAST = 96  # of them of the response
BATCH = 2  # documents a step
STEPS = 12  # an epoch

Pairs = list[tuple[str, str]]


def measure() -> dict[str, float]:
    """Tokens a CPU second of both, their ratio, and the CPU seconds of scoring. Raises ValueError without TRL."""
    if not (PEERS / "trl").is_dir():
        raise ValueError(f"{PEERS} does not hold TRL; install it there: {INSTALL}")
    root = Path(tempfile.mkdtemp())
    student, teacher = runs.models(root, hidden=64)
    pairs = equal_pairs(load_tokenizer(student), BATCH * STEPS + runs.VALIDATION)
    ours, scoring = in_fresh_process(cached, root, student, teacher, pairs)
    theirs = in_fresh_process(gold, root, student, teacher, pairs[: BATCH * STEPS])
    tokens = BATCH * LENGTH * (STEPS - 2)
    return {
        "cdm_tokens_a_cpu_second": tokens / ours,
        "gold_tokens_a_cpu_second": tokens / theirs,
        "over_gold": theirs / ours,
        "scoring_s": scoring,
    }


def equal_pairs(tokenizer: Tokenizer, count: int) -> Pairs:
    """Prompts and the beginnings of their responses: LENGTH tokens together, with the end of turn."""
    found: Pairs = []
    for prompt, response in runs.dolly():
        (document,) = runs.documents([(prompt, response)])
        room = LENGTH - 1 - len(tokenizer.encode_prompt(document.prompt))
        ids = tokenizer.encode_with_ends(response)[0]
        cut = tokenizer.hf.decode(ids[:room]) if LEAST <= room <= len(ids) else ""
        apart, joined = tokenizer.encode_with_ends(cut)[0], tokenizer.encode_with_ends(f"{prompt}\n{cut}")[0]
        if cut and len(apart) == room and len(joined) == LENGTH - 1:  # TRL reads prompt and response as one text
            found.append((prompt, cut))
        if len(found) == count:
            return found
    raise ValueError(f"{len(found)} documents of {LENGTH} tokens, {count} are needed")


class Clock:
    """CPU seconds at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        self.ends.append(time.process_time())

    @property
    def seconds(self) -> float:
        """The first step compiles, the last may validate."""
        assert len(self.ends) == STEPS
        return self.ends[-2] - self.ends[0]


def cached(root: Path, student: str, teacher: str, pairs: Pairs) -> tuple[float, float]:
    """CPU seconds of the steps of `cdm.student.train`, and of scoring and aligning."""
    runs.group_of_one()
    optimisation = Optimisation(
        steps=STEPS, batch_tokens=BATCH * LENGTH, micro_batch_tokens=BATCH * LENGTH, precision="float32",
        max_length=LENGTH, warmup_steps=1, checkpoint_every=STEPS, validate_every=STEPS,
    )  # fmt: skip
    start = time.process_time()
    job = runs.training_job(root, student, teacher, runs.documents(pairs), optimisation)
    scoring, clock = time.process_time() - start, Clock()
    train(job, FolderCheckpoints(str(root / "checkpoints")), lambda step, metrics: clock.tick())
    return clock.seconds, scoring


def gold(root: Path, student: str, teacher: str, pairs: Pairs) -> float:
    """CPU seconds of the steps of GOLDTrainer with its hybrid loss and the correct merging of probabilities."""
    torch.set_num_threads(1)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    sys.path.append(str(PEERS))
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    clock = Clock()

    class Ticks(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            clock.tick()

    asked = GOLDConfig(
        output_dir=str(root / "gold"), num_train_epochs=1, per_device_train_batch_size=BATCH, max_length=LENGTH,
        use_cpu=True, bf16=False, gradient_checkpointing=False, learning_rate=1e-4, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, lmbda=0.0, use_uld_loss=True,
        uld_use_hybrid_loss=True, uld_token_merge_strategy="bayesian", uld_skip_student_eos=False,
        uld_skip_teacher_eos=False, teacher_tokenizer_name_or_path=teacher,
    )  # fmt: skip
    texts = [{"prompt": f"{prompt}\n", "completion": response} for prompt, response in pairs]
    trainer = GOLDTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        args=asked,
        train_dataset=Dataset.from_list(texts),
        processing_class=load_tokenizer(student).hf,  # AutoTokenizer would read GPT-2's in a qwen2 folder as Qwen2's
        callbacks=[Ticks()],
    )
    lengths = {len(ids) for ids in trainer.train_dataset["input_ids"]}
    assert lengths == {LENGTH}, lengths
    trainer.train()
    return clock.seconds


def main() -> None:
    figures = measure()
    rows = [
        ["TRL 1.16, GOLDTrainer", f"{figures['gold_tokens_a_cpu_second']:,.0f}"],
        ["cdm, cached scores", f"{figures['cdm_tokens_a_cpu_second']:,.0f}"],
        ["ratio", f"{figures['over_gold']:,.1f}"],
    ]
    title = f"{STEPS} steps of {BATCH} x {LENGTH} tokens, teacher V = {runs.ROWS_T:,}; one thread, {machine()}"
    show(title, ["epoch", "tokens a CPU second"], rows)
    print(f"scored and aligned once before: {figures['scoring_s']:.1f} s\n")
    finish(figures)


if __name__ == "__main__":
    main()

"""Which of several ids with the same bytes a map names: `CDM_REAL_DATA=FOLDER python -m benchmarks.twins`.

Real responses in Qwen2.5's tokens, and students with byte fallback. "Never emitted" are tokens whose lowest twin is a
byte of byte fallback although the student's own texts hold another id; such an id gets the teacher's mass for nothing.
"""

from __future__ import annotations

import numpy as np

from benchmarks import rows
from benchmarks.table import finish, machine, real_data, show
from cdm.images import exact_map
from cdm.tokenizers import load_tokenizer

TEACHER = "qwen2.5"
STUDENTS = ("llama2", "phi-3", "mistral-v3", "gemma")
TEXTS = 400


def main() -> None:
    folder = real_data()
    texts = rows.corpus(folder / "instructions")[:TEXTS]
    teacher = load_tokenizer(str(folder / "tokenizers" / TEACHER))
    ids = np.concatenate([teacher.encode_with_ends(text)[0] for text in texts])
    lines, figures = [], {}
    for name in STUDENTS:
        student = load_tokenizer(str(folder / "tokenizers" / name))
        lowest, emitted = exact_map(student, teacher), exact_map(student, teacher, "emitted")
        exact, never = (lowest[ids] >= 0).mean(), (lowest[ids] != emitted[ids]).mean()
        lines.append([name, f"{exact:.1%}", f"{never:.1%}"])
        figures[f"never_emitted_{name}"] = float(never)
    title = f"{len(ids):,} tokens of {TEACHER} in {len(texts)} responses; {machine()}"
    show(title, ["student", "have an exact twin", "whose lowest twin is never emitted"], lines)
    finish(figures)


if __name__ == "__main__":
    main()

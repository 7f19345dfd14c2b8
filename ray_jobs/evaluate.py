"""Ray tasks around `cdm.evaluation`: one a model, all on the same held-out documents.

`python -m ray_jobs.evaluate CONFIG` runs a config up to its table of results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import ray

from cdm.config import StudentPool, TeacherPool
from cdm.config_models import AnyEngine, TransformersEngine
from cdm.evaluation import completions, evaluate_student, evaluate_teacher, held_out, sample_prompts
from cdm.mappings import mappings_that_fired
from cdm.records import EvalReport
from cdm.tokenizers import load_tokenizer
from ray_jobs.cluster import use_cpus

MAPPED = 64  # documents whose dynamic mappings are counted


@dataclass(frozen=True)
class EvaluationJob:
    """What every model is measured on. teacher: folder or hub name and revision of the first one.

    teacher_dtype: of its weights when it completes prompts; None: it is too large for one worker and does not.
    maps: of the students whose dynamic mappings are counted, by name: the first teacher's map and the top k.
    """

    corpus: str
    aligned: str
    shards: tuple[str, ...]
    teacher: tuple[str, str | None]
    teacher_dtype: str | None
    documents: int
    samples: int
    sample_tokens: int
    micro_batch_tokens: int
    maps: Mapping[str, tuple[str, int]]


def evaluate(
    job: EvaluationJob,
    teacher: str,
    students: Mapping[str, tuple[str, str | None]],
    pool: StudentPool,
    on_progress: Callable[[int], None],
    teacher_pool: TeacherPool | None = None,
) -> list[EvalReport]:
    """The teacher's report and one a student (folder or hub name, revision), in the order given.

    teacher_pool: where the teacher completes the prompts too.
    """
    task = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, resources=pool.custom or None)(_evaluate_one)
    pending = [task.remote(job, name, *model, pool.cpus) for name, model in students.items()]
    samples: tuple[dict[str, str], ...] = ()
    if job.samples and job.teacher_dtype is not None and teacher_pool is not None:
        cpus, gpus, custom = teacher_pool.cpus, teacher_pool.gpus, teacher_pool.custom or None
        completing = ray.remote(num_cpus=cpus, num_gpus=gpus, resources=custom)(_complete_teacher)
        samples = ray.get(completing.remote(job, cpus))
    report = evaluate_teacher(teacher, held_out(job.aligned, job.shards, job.documents))
    reports = [replace(report, samples=samples)]
    for done, one in enumerate(pending):
        reports.append(ray.get(one))
        on_progress(done + 2)
    return reports


def completing_dtype(engine: AnyEngine) -> str | None:
    """Of a teacher that completes prompts without its engine, whose start a few completions do not pay."""
    alone = isinstance(engine, TransformersEngine) or engine.tensor_parallel_size == 1
    return engine.dtype if alone else None


def _complete_teacher(job: EvaluationJob, cpus: float) -> tuple[dict[str, str], ...]:
    use_cpus(cpus)
    path, revision = job.teacher
    prompts = sample_prompts(job.corpus, held_out(job.aligned, job.shards, job.samples), job.samples)
    assert job.teacher_dtype is not None
    return completions(path, revision=revision, dtype=job.teacher_dtype, prompts=prompts, tokens=job.sample_tokens)


def _evaluate_one(job: EvaluationJob, name: str, folder: str, revision: str | None, cpus: float) -> EvalReport:
    use_cpus(cpus)
    rows = held_out(job.aligned, job.shards, job.documents)
    tokenizer_t = load_tokenizer(job.teacher[0], revision=job.teacher[1])
    report = evaluate_student(
        name,
        folder,
        rows,
        revision=revision,
        tokenizer_t=tokenizer_t,
        micro_batch_tokens=job.micro_batch_tokens,
        prompts=sample_prompts(job.corpus, rows, job.samples),
        sample_tokens=job.sample_tokens,
    )
    if name not in job.maps:
        return report
    map_path, top_k = job.maps[name]
    options = {"top_k": top_k, "micro_batch_tokens": job.micro_batch_tokens}
    found = mappings_that_fired(folder, rows[:MAPPED], map_path=map_path, tokenizer_t=tokenizer_t, **options)
    return replace(report, mappings=found)


if __name__ == "__main__":
    from ray_jobs.pipeline import main

    main("evaluate")

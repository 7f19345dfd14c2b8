"""Every stage of a config, in order, each with its own cache: corpus, models, scores, alignment, students, evaluation.

A stage whose output is whole is not run again; its folder's name is the digest of what was asked and of what it was
made from, so a changed config is a new folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from cdm import parts
from cdm.checkpoints import Metrics
from cdm.config import Config, storage_path
from cdm.config_methods import AnyMethod, Cdm, MinEdit, SameTokenizer, Sft, label
from cdm.config_models import Generation, Pretrain, Student, Teacher, TransformersEngine
from cdm.corpus import corpus_identity, read_documents, split_parts, with_all_splits, write_corpus
from cdm.export import read_about
from cdm.grouping import AlignmentMethod
from cdm.journal import FOLDER, Journal, Series, closing, run_series
from cdm.models import build_model, model_identity
from cdm.preflight import SAMPLE, check_coverage, coverage, say_mass
from cdm.progress import StageView, skipped
from cdm.records import EvalReport
from cdm.report import checkpoints
from cdm.student import TrainingJob
from cdm.tracking import Experiment
from cdm.vocab_map import vocab_map_file
from ray_jobs.align import Sides, align
from ray_jobs.evaluate import EvaluationJob, completing_dtype, evaluate
from ray_jobs.generate import generate, generation_identity
from ray_jobs.runs import Model, open_top_run, short, what_is_asked
from ray_jobs.score import score
from ray_jobs.train import run_training

BEFORE = "student before"


class Pipeline:
    """One config's stages. Each is a cached property: asking for the last one runs all that it needs."""

    def __init__(self, config: Config, run: Journal | None = None) -> None:
        """`run` is the run that the stages' runs hang below; default: the pipeline run of this config."""
        self.config = config
        self.experiment = Experiment(config)
        self.run = run or open_top_run(self.experiment, config, "pipeline", short(what_is_asked(config)))

    def folder(self, *names: str) -> str:
        return storage_path(self.config, *names)

    @contextmanager
    def _timed(self, name: str, title: str, unit: str, total: int | None = None) -> Iterator[StageView]:
        """The view of a stage without a run of its own; the run above learns its seconds, for `cdm plan`."""
        began, metric = time.monotonic(), f"seconds.{name}"
        with StageView(title, unit, total) as view:
            yield view
        self.run.metrics(self.run.last_steps.get(metric, -1) + 1, {metric: time.monotonic() - began})

    # --- corpus

    @cached_property
    def source(self) -> str:
        """The folder of what the config's `corpus` section holds; models of type pretrain are made from it."""
        replace = None if self.config.generation is None else self.config.generation.replace
        folder = self.folder("corpus", short(corpus_identity(self.config.corpus, replace)))
        if parts.is_finished(folder):
            skipped("corpus", folder)
            return folder
        with self._timed("corpus", "corpus", "documents") as view:
            manifest = write_corpus(self.config.corpus, folder, view.update, replace=replace)
            view.update(manifest.rows)
        return folder

    @cached_property
    def source_manifest(self) -> parts.Manifest:
        return with_all_splits(self.source)

    @cached_property
    def corpus(self) -> str:
        """The folder of the documents that are scored and taught, in which every response is there."""
        return self.source if self.config.generation is None else self._generated(self.config.generation)

    @cached_property
    def corpus_manifest(self) -> parts.Manifest:
        return with_all_splits(self.corpus)

    def _generated(self, section: Generation) -> str:
        model = self.model(self.config.generator)
        identity = generation_identity(self.config, model.path, model.identity, self.source_manifest.fingerprint)
        folder = self.folder("corpus", f"generated-{short(identity)}")
        if parts.is_finished(folder):
            skipped(f"generate {model.name}", folder)
            return folder
        run = self.experiment.run("generate", f"generate {model.name}", short(identity), self.run.ref)
        run.params(section.model_dump(mode="json"))
        total = self.source_manifest.rows
        with closing(run), StageView(f"generate {model.name}", "documents", total) as view:
            manifest, rate = generate(
                self.config,
                identity,
                model_path=model.path,
                source_folder=self.source,
                generated_folder=folder,
                on_progress=lambda done, note: view.update(done, note),
            )
            run.tags({"cdm.corpus": folder, "cdm.fingerprint": manifest.fingerprint})
            run.metrics(0, {**{k: float(v) for k, v in manifest.meta["counts"].items()}, "tokens_a_second": rate})
        return folder

    # --- models

    def model(self, section: Teacher | Student) -> Model:
        asked = section.model
        if not isinstance(asked, Pretrain):
            return Model(asked.name, asked.name, asked.revision, model_identity(asked.name, asked.revision))
        seed = self.config.student_seed if isinstance(section, Student) else self.config.seed
        identity = short(asked, self.source_manifest.fingerprint, seed)
        path = self.folder("models", f"{asked.name}-{identity}")
        if Path(path).exists():
            skipped(f"pretrain {asked.name}", path)
        else:
            self._pretrain(asked, path, identity, seed)
        return Model(asked.name, path, None, model_identity(path, None))

    def _pretrain(self, asked: Pretrain, path: str, identity: str, seed: int) -> None:
        if asked.training.steps and not self.source_manifest.meta["response_bytes"]:
            raise ValueError(f"{asked.name}: a model of type pretrain learns from responses; the corpus has none")
        initial = path if asked.training.steps == 0 else f"{path}.initial"
        if not Path(initial).exists():
            with self._timed("initialise", f"initialise {asked.name}", "models", 1) as view:
                build_model(asked, self.source, initial, seed=seed)
                view.update(1)
        if asked.training.steps:
            untrained = Model(asked.name, initial, None, identity)
            aligned = self.align(self.source, untrained, (), asked.training.max_length)
            job = TrainingJob(
                model=initial, revision=None, tokenizer=initial, optimisation=asked.training, method=Sft(type="sft"),
                aligned=aligned, shards=(), maps=(), weights=(),
                seed=seed, export=path, targets="all",
            )  # fmt: skip
            self._train(f"pretrain {asked.name}", job, identity)

    @cached_property
    def teachers(self) -> list[Model]:
        return [self.model(teacher) for teacher in self.config.teachers]

    @cached_property
    def student(self) -> Model:
        return self.model(self.config.student)

    # --- scores

    @cached_property
    def shards(self) -> tuple[str, ...]:
        pairs = list(zip(self.config.teachers, self.teachers, strict=True))
        for section, model in pairs:
            self._check_coverage(section, model)
        return tuple(self._scored(section, model) for section, model in pairs)

    def _check_coverage(self, section: Teacher, model: Model) -> None:
        documents = read_documents(self.corpus, split_parts(self.corpus_manifest, "train")[0])[:SAMPLE]
        lengths = {"max_length_s": self.config.student.max_length, "max_length_t": section.max_length}
        found = coverage(documents, self.student.tokenizer, model.tokenizer, **lengths)
        check_coverage(found, self.config.student.min_coverage, model.name)

    def _scored(self, section: Teacher, model: Model) -> str:
        engine = section.engine
        asked = (model.identity, engine.type, engine.dtype, section.top_k, section.top_mass, section.max_length)
        identity = short(asked, self.corpus_manifest.fingerprint)
        folder = self.folder("shards", f"{Path(model.name).name}-{identity}")
        if parts.is_finished(folder):
            skipped(f"score {model.name}", folder)
            return folder
        run = self.experiment.run("score", f"score {model.name}", identity, self.run.ref)
        run.params(section.model_dump(mode="json"))
        run.dataset("corpus", self.corpus_manifest.fingerprint, self.corpus, "scoring")
        total, nodes = self.corpus_manifest.rows, set[str]()
        with closing(run), StageView(f"score {model.name}", "documents", total) as view:
            manifest = score(
                section,
                model_path=model.path,
                model_identity=model.identity,
                corpus_folder=self.corpus,
                shards_folder=folder,
                pool=self.config.resources.teacher,
                on_progress=lambda done, note: view.update(done, note),
                on_speed=lambda tokens, seconds: run.metrics(0, {"tokens_scored": tokens, "seconds_scored": seconds}),
                on_node=nodes.add,
            )
            run.tags({"cdm.shards": folder, "cdm.fingerprint": manifest.fingerprint})
            run.tags({"cdm.nodes": ", ".join(sorted(nodes))})
            run.metrics(0, {k: float(v) for k, v in manifest.meta.items() if isinstance(v, int | float)})
        return folder

    # --- alignment

    def align(
        self,
        corpus: str,
        student: Model,
        shards: tuple[str, ...],
        max_length: int,
        method: AlignmentMethod = "exact",
    ) -> str:
        """The folder of a corpus tokenised for a student, and aligned with the scores in `shards`."""
        manifest = parts.read_manifest(corpus)
        entropies = self.entropies if method == "dtw" else None
        meta = {
            "corpus": manifest.fingerprint,
            "shards": [parts.read_manifest(folder).fingerprint for folder in shards],
            "tokenizer_s": student.tokenizer.fingerprint,
            "max_length": max_length,
            "method": method,
            "entropies": None if entropies is None else parts.read_manifest(entropies).fingerprint,
        }
        teachers = tuple((model.path, model.revision) for model in self.teachers) if method != "exact" else ()
        sides = Sides((student.path, student.revision), teachers, method, entropies)
        folder = self.folder("aligned", short(meta))
        if parts.is_finished(folder):
            skipped("align", folder)
            return folder
        with self._timed("align", "align", "parts", len(manifest.parts)) as view:
            align(corpus, shards, sides, folder, max_length=max_length, meta=meta, on_progress=view.update)
        return folder

    def aligned(self, method: AnyMethod) -> str:
        """The student's and the teachers' tokens in the groups that a method asks for."""
        how = "exact" if isinstance(method, Sft) else method.align
        return self.align(self.corpus, self.student, self.shards, self.config.student.max_length, how)

    @cached_property
    def entropies(self) -> str:
        """The student scored on the corpus as a teacher is: `dtw` weighs its tokens by their entropies."""
        asked = self.config.student
        engine = TransformersEngine(type="transformers", dtype="float32")
        # What the student cannot read is left out of the alignment, and counted there; `min_coverage` is its limit.
        limits = {"max_length": asked.max_length, "max_quarantined_share": 1.0}
        section = Teacher(model=asked.model, engine=engine, top_k=1, **limits)
        return self._scored(section, self.student)

    def maps(self, method: AnyMethod) -> tuple[str | None, ...]:
        """A file a teacher; None where teacher and student share the tokenizer."""
        student = self.student.tokenizer
        found: list[str | None] = []
        for model in self.teachers:
            teacher = model.tokenizer
            if teacher.vocabulary == student.vocabulary:
                found.append(None)
                continue
            if isinstance(method, SameTokenizer):
                raise ValueError(
                    f"method.type: {method.type} needs a teacher with the student's own tokenizer, and "
                    f"{model.name} has another; choose cdm or another method for two tokenizers"
                )
            threshold, protect = 0.0, True  # most methods read the exact part alone
            if isinstance(method, Cdm | MinEdit):
                threshold, protect = method.threshold, method.protect
            unmatched = method.unmatched if isinstance(method, Cdm) else "spelling"
            file = vocab_map_file(student, teacher, threshold, protect, self.folder("maps"), unmatched)
            found.append(str(file))
        return tuple(found)

    # --- students

    def job(self, method: AnyMethod) -> TrainingJob:
        """What training with this method is asked, with all that it reads made; its student's name has its identity."""
        optimisation = self.config.student
        weights = tuple(teacher.weight for teacher in self.config.teachers)
        folder = self.aligned(method)
        aligned = parts.read_manifest(folder).fingerprint
        steps = optimisation.model_dump(mode="json", exclude={"model", "min_coverage", "seed"})
        identity = short(self.student.identity, aligned, method, steps, weights, self.config.student_seed)
        return TrainingJob(
            model=self.student.path, revision=self.student.revision, tokenizer=self.student.path,
            optimisation=optimisation, method=method, aligned=folder, shards=self.shards,
            maps=self.maps(method), weights=weights, seed=self.config.student_seed,
            export=self.folder("students", f"{self.config.name}-{method.type}-{identity}"),
            lora=optimisation.lora, freeze_embeddings=optimisation.freeze_embeddings,
            documents=optimisation.max_documents,
        )  # fmt: skip

    def trained(self, method: AnyMethod) -> str:
        """The folder of the student that this method trains."""
        job = self.job(method)
        if Path(job.export).exists():
            skipped(f"train {label(method)}", job.export)
        else:
            say_mass(job.aligned, job.shards, job.maps, [model.name for model in self.teachers])
            self._train(f"train {label(method)}", job, job.export.rpartition("-")[2])
        return job.export

    def training_run(self, title: str, job: TrainingJob, identity: str) -> Journal:
        """The run of a training, with what it was asked and what it reads."""
        run = self.experiment.run("train", title, identity, self.run.ref)
        run.params({"method": job.method.model_dump(mode="json"), "student": job.optimisation.model_dump(mode="json")})
        tags = {"cdm.method": job.method.type, "cdm.export": job.export, "cdm.aligned": job.aligned}
        run.tags(tags | {"cdm.from": job.model, "cdm.scores": ", ".join(job.shards)})
        for folder in (job.aligned, *job.shards):
            run.dataset(Path(folder).name, parts.read_manifest(folder).fingerprint, folder, "training")
        return run

    def _train(self, title: str, job: TrainingJob, identity: str) -> None:
        run = self.training_run(title, job, identity)
        Path(job.export).parent.mkdir(parents=True, exist_ok=True)
        folder, name = self.folder("runs"), f"{job.method.type}-{identity}"
        with closing(run), StageView(title, "steps", job.optimisation.steps) as view:
            nodes = run_training(
                job,
                self.config.resources.student,
                folder=folder,
                name=name,
                run=run.ref,
                on_metrics=lambda step, metrics: view.update(step, _metrics_note(metrics)),
            )
            run.tags({"cdm.nodes": ", ".join(nodes)})
            view.update(read_about(job.export)["steps"])
            run.table("checkpoints", checkpoints(f"{folder}/{name}", run_series(run.ref.folder)))

    # --- evaluation

    @cached_property
    def students(self) -> dict[str, str]:
        """The folder of the student before, and of each that is trained, by the name that the table gives it."""
        found = {BEFORE: self.student.path}
        for method in [*self.config.baselines, self.config.method]:
            found[f"student, {label(method)}"] = self.trained(method)
        return found

    def _counted_maps(self) -> dict[str, tuple[str, int]]:
        """The students whose dynamic mappings are counted: name -> the first teacher's map, the top k."""
        methods = [one for one in [*self.config.baselines, self.config.method] if isinstance(one, Cdm)]
        found = {f"student, {label(method)}": (self.maps(method)[0], method.top_k) for method in methods}
        return {name: (path, top_k) for name, (path, top_k) in found.items() if path is not None}

    @cached_property
    def runs(self) -> dict[str, Series]:
        """The metrics of each training run of this config that has a log, the method's last."""
        methods = [*self.config.baselines, self.config.method]
        identities = {label(method): self.job(method).export.rpartition("-")[2] for method in methods}
        found = {name: run_series(self.folder(FOLDER, f"train-{identity}")) for name, identity in identities.items()}
        return {name: series for name, series in found.items() if series}

    def evaluation_job(self) -> EvaluationJob:
        """What every model of this config is measured on."""
        asked, teacher = self.config.evaluation, self.teachers[0]
        aligned = self.align(self.corpus, self.student, self.shards, self.config.student.max_length)
        return EvaluationJob(
            corpus=self.corpus, aligned=aligned, shards=self.shards, teacher=(teacher.path, teacher.revision),
            teacher_dtype=completing_dtype(self.config.teachers[0].engine),
            documents=asked.documents, samples=asked.samples, sample_tokens=asked.sample_tokens,
            micro_batch_tokens=self.config.student.micro_batch_tokens, maps={},
        )  # fmt: skip

    @cached_property
    def reports(self) -> list[EvalReport]:
        """The teacher, the student before, and each trained student, on the same documents."""
        students, job = self.students, self.evaluation_job()
        names = {name: Path(folder).name for name, folder in students.items()}
        identity = short(
            self.config.evaluation, parts.read_manifest(job.aligned).fingerprint, names, self.teachers[0].identity
        )
        file = Path(self.folder("reports", f"{identity}.json"))
        if file.exists():
            skipped("evaluate", str(file))
            return [EvalReport(**report) for report in json.loads(file.read_text(encoding="utf-8"))]
        job, pool = replace(job, maps=self._counted_maps()), self.config.resources.student
        folders: dict[str, tuple[str, str | None]] = {name: (folder, None) for name, folder in students.items()}
        if BEFORE in folders:
            folders[BEFORE] = (self.student.path, self.student.revision)
        run = self.experiment.run("evaluate", "evaluate", identity, self.run.ref)
        with closing(run), StageView("evaluate", "models", len(students) + 1) as view:
            name, pool_t = f"teacher, {self.teachers[0].name}", self.config.resources.teacher
            reports = evaluate(job, name, folders, pool, on_progress=view.update, teacher_pool=pool_t)
        write_text(file, json.dumps([asdict(report) for report in reports], indent=1))
        return reports


def _metrics_note(metrics: Metrics) -> str:
    shown = [f"{name} {metrics[name]:.3f}" for name in ("loss", "ce", "kd") if name in metrics]
    return ", ".join([*shown, f"{metrics['tokens_a_second']:,.0f} tokens/s"])


def write_text(file: Path, text: str) -> None:
    """Whole or not at all."""
    parts.write_bytes(str(file.parent), file.name, text.encode())

"""Every shipped config is read; everything that is wrong with a config is said at once, in the user's words."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm.config import Config, ConfigError, digest, load_config, parse_config, storage_path
from cdm.config_methods import Sft

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

HERE = {"type": "jsonl", "path": __file__}

SMALL: dict[str, Any] = {
    "name": "small",
    "corpus": {"type": "python_packages"},
    "teachers": [{"model": "org/teacher", "engine": {"type": "transformers"}}],
    "student": {"model": {"name": "org/student", "revision": "abc"}, "steps": 10},
    "method": {"type": "cdm"},
    "baselines": [{"type": "sft"}],
}
PRETRAIN = {
    "type": "pretrain",
    "name": "tiny",
    "architecture": "llama",
    "tokenizer": {"type": "sentencepiece_bpe", "vocab_size": 512},
    "hidden_size": 64,
    "intermediate_size": 128,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "training": {"steps": 0},
}
MISSING = object()


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """SMALL with values put at dotted keys, or taken away."""
    values = copy.deepcopy(SMALL)
    for key, value in changes:
        *parents, last = [int(name) if name.isdecimal() else name for name in key.split(".")]
        node: Any = values
        for name in parents:
            node = node.setdefault(name, {}) if isinstance(node, dict) else node[name]
        if value is MISSING:
            del node[last]
        else:
            node[last] = value
    return values


def problems(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_config(values)
    assert str(raised.value).splitlines() == raised.value.problems, "one problem a line"
    return raised.value.problems


# --- what is shipped ---------------------------------------------------------------------------------------------


def test_there_are_configs() -> None:
    assert {"demo", "phi3-qwen2", "qwen2-opt", "llama3-gemma2", "dual-teacher"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem, "runs of two configs are told apart by name"
    assert parse_config(config.model_dump(mode="json")) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_consistent(path: Path) -> None:
    """What the schema cannot say: a method reads no more than the shards hold, a student no more than was scored."""
    config = load_config(path)
    for teacher in config.teachers:
        assert config.student.max_length <= teacher.max_length
        for method in (config.method, *config.baselines):
            assert isinstance(method, Sft) or method.top_k <= teacher.top_k
    assert config.student.micro_batch_tokens <= config.student.batch_tokens


def test_a_model_by_its_name_is_a_pretrained_one() -> None:
    config = parse_config(SMALL)
    assert config.teachers[0].model.model_dump() == {"type": "pretrained", "name": "org/teacher", "revision": None}
    assert config.student.model.model_dump() == {"type": "pretrained", "name": "org/student", "revision": "abc"}


def test_the_first_teacher_generates_unless_another_model_is_named() -> None:
    first = parse_config(changed(("generation", {}))).generator
    assert first == parse_config(SMALL).teachers[0]
    engine = {"type": "vllm", "dtype": "float16"}
    other = parse_config(changed(("generation", {"model": "org/other", "engine": engine}))).generator
    assert (other.model.name, other.engine.dtype, other.max_length) == ("org/other", "float16", first.max_length)


def test_values_do_not_change_after_reading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config(SMALL).student.steps = 3  # type: ignore[misc]


# --- what is wrong -----------------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any, str]] = [
    # an unknown key: at the top, nested, in a variant of a union, in a list, in a variant within a list
    ("sede", 1, "sede: unknown key; did you mean seed?"),
    ("student.learning_rte", 1, "student.learning_rte: unknown key; did you mean learning_rate?"),
    ("resources.student.gpu", 1, "resources.student.gpu: unknown key; did you mean gpus?"),
    ("method.treshold", 0.3, "method.treshold: unknown key; did you mean threshold?"),
    ("corpus.package", [], "corpus.package: unknown key; did you mean packages?"),
    ("teachers.0.topk", 5, "teachers.0.topk: unknown key; did you mean top_k?"),
    ("baselines.0.alpha", 0.5, "baselines.0.alpha: unknown key; known here: type"),
    ("student.model.nam", "x", "student.model.nam: unknown key; did you mean name?"),
    (
        "evaluation.model",
        "x",
        "evaluation.model: unknown key; known here: documents, samples, sample_tokens, tasks, engine, "
        "max_length, harness, harness_limit",
    ),
    # a wrong type
    ("seed", "four", "seed: expected a whole number, got 'four'"),
    ("seed", 0.5, "seed: expected a whole number, got 0.5"),
    ("name", 3, "name: expected text, got 3"),
    ("name", None, "name: expected text, got nothing"),
    ("method.dual", "perhaps", "method.dual: expected true or false, got 'perhaps'"),
    ("method.temperature", "hot", "method.temperature: expected a number, got 'hot'"),
    ("corpus.packages", "numpy", "corpus.packages: expected a list, got 'numpy'"),
    ("corpus.packages", ["os", 7], "corpus.packages.1: expected text, got 7"),
    ("resources.student", {"workers": 2, "min_workers": 3}, "resources.student: min_workers 3 exceeds workers, 2"),
    ("resources.teacher.custom", [], "resources.teacher.custom: expected a mapping of keys, got []"),
    ("resources.teacher.custom", {"npu": "x"}, "resources.teacher.custom.npu: expected a number, got 'x'"),
    ("student", None, "student: expected a mapping of keys, got nothing"),
    ("student.model", 3, "student.model: expected a mapping of keys, got 3"),
    ("method", "cdm", "method: expected a mapping of keys, got 'cdm'"),
    ("baselines.0", "sft", "baselines.0: expected a mapping of keys, got 'sft'"),
    ("teachers", {"model": "org/teacher"}, "teachers: expected a list, got {'model': 'org/teacher'}"),
    ("name", ["n" * 80], f"name: expected text, got ['{'n' * 55}..."),
    # missing
    ("name", MISSING, "name: missing"),
    ("student.steps", MISSING, "student.steps: missing"),
    ("teachers.0.model", MISSING, "teachers.0.model: missing"),
    ("student.model.name", MISSING, "student.model.name: missing"),
    ("teachers", [], "teachers: expected at least 1, got 0"),
    # the tag of a union
    ("method.type", "cmd", "method.type: 'cmd' is not known; one of "),
    ("method.type", MISSING, "method.type: missing"),
    ("baselines.0.type", 3, "baselines.0.type: 3 is not known; one of "),
    ("corpus.type", "csv", "corpus.type: 'csv' is not known; one of python_packages, jsonl, parquet, huggingface"),
    ("teachers.0.engine.type", "tgi", "teachers.0.engine.type: 'tgi' is not known; one of vllm, transformers"),
    ("student.model.type", "x", "student.model.type: 'x' is not known; one of pretrain, pretrained"),
    # a literal, a range, a relation
    ("student.precision", "fp16", "student.precision: 'fp16' is not known; one of float32, bfloat16"),
    ("method.alpha", 1.5, "method.alpha: must be less than or equal to 1, got 1.5"),
    ("method.temperature", 0, "method.temperature: must be greater than 0, got 0"),
    ("student.learning_rate", float("nan"), "student.learning_rate: must be a finite number, got nan"),
    ("student.steps", -1, "student.steps: must be greater than or equal to 0, got -1"),
    ("corpus.test_share", 0.99, "corpus: validation_share + test_share leave nothing to train on"),
    # how the student is trained
    ("student.best", {"metric": "loss"}, "student.best.metric: 'loss' is not known; one of validation_bits_per_byte, "),
    ("student.best", {"metric": "validation_kd"}, "config: student.best.metric: sft has no validation_kd; take "),
    ("student.best", {"patience": 3}, "student.best.metric: missing"),
    ("student.lora", {"rank": 0}, "student.lora.rank: must be greater than 0, got 0"),
    ("student.lora", {"targets": "q_proj"}, "student.lora.targets: expected a list, got 'q_proj'"),
    ("student.lora", {"r": 8}, "student.lora.r: unknown key; known here: "),
    ("student.max_skipped", 0, "student.max_skipped: must be greater than 0, got 0"),
    # a path
    ("corpus", {"type": "jsonl", "path": "/no/where"}, "corpus.path: no such file or folder: /no/where"),
    ("teachers.0.model", "./nowhere", "teachers.0.model.name: no such file or folder: ./nowhere"),
    # responses that are generated
    ("generation", {"sample": 2}, "generation.sample: unknown key; did you mean samples?"),
    ("generation", {"temperature": -1}, "generation.temperature: must be greater than or equal to 0, got -1"),
    ("generation", {"top_p": 0}, "generation.top_p: must be greater than 0, got 0"),
    ("generation", {"stop": "\n"}, "generation.stop: expected a list, got '\\n'"),
    ("generation", {"replace": "some"}, "generation.replace: 'some' is not known; one of missing, all"),
    ("generation", {"model": "./nowhere"}, "generation.model.name: no such file or folder: ./nowhere"),
    ("generation", {"engine": {"type": "tgi"}}, "generation.engine.type: 'tgi' is not known; one of "),
    (
        "generation",
        {"check": {"type": "run"}},
        "generation.check.type: 'run' is not known; one of final_number, function",
    ),
    (
        "generation",
        {"check": {"type": "function", "name": "checks.passes"}},
        "generation.check.name: expected module:function, got 'checks.passes'",
    ),
    (
        "generation",
        {"check": {"type": "final_number", "reference": "answer"}},
        "config: generation.check.reference: 'answer' is not in corpus.metadata",
    ),
    (
        "generation",
        {"temperature": 0, "samples": 4},
        "generation: temperature 0 gives the same response 4 times; set samples to 1",
    ),
    (
        "evaluation",
        {"tasks": [{"type": "final_number", "name": "g", "data": HERE, "max_tokens": 600}], "max_length": 600},
        "config: evaluation.tasks.0.max_tokens 600 leaves no room for a prompt: evaluation.max_length is 600",
    ),
    (
        "generation",
        {"max_tokens": 2048},
        "config: generation.max_tokens 2048 leaves no room for a prompt: max_length is 2048",
    ),
    ("generation", {"model": PRETRAIN}, "config: generation.max_length 2048 exceeds the model's context, 1024"),
    (
        "corpus",
        {"type": "parquet", "path": "s3://bucket/prompts", "response": None},
        "config: corpus.response is null and there is no `generation` that would write responses",
    ),
    # inside a model that is to be made
    ("student.model", PRETRAIN | {"heads": 3}, "student.model: hidden_size must be a multiple of heads, and heads of"),
    (
        "student.model",
        PRETRAIN | {"training": {"steps": 1, "model": 1}},
        "student.model.training.model: unknown key; known here: steps, ",
    ),
    (
        "student.model",
        PRETRAIN | {"training": {"steps": 1, "best": {"metric": "validation_kd"}}},
        "student.model: training.best.metric: validation_kd needs a teacher; there is none here",
    ),
    (
        "student.model",
        PRETRAIN | {"tokenizer": {"type": "wordpiece", "vocab_size": 512}},
        "student.model.tokenizer.type: 'wordpiece' is not known; one of byte_level_bpe, sentencepiece_bpe",
    ),
]


@pytest.mark.parametrize(("key", "value", "line"), WRONG, ids=[line for _, _, line in WRONG])
def test_one_fault_is_one_line(key: str, value: Any, line: str) -> None:
    found = problems(changed((key, value)))
    assert len(found) == 1
    assert found[0].startswith(line) if line.endswith((" ", "of")) else found[0] == line


def test_the_small_config_and_its_model_are_not_at_fault() -> None:
    parse_config(SMALL)
    parse_config(changed(("student.model", PRETRAIN)))


def test_a_name_of_the_papers_is_no_reason_to_guess() -> None:
    (line,) = problems(changed(("method.theta", 0.3)))
    assert line.startswith("method.theta: unknown key; known here: ") and "threshold" in line and "mean" not in line


def test_all_faults_are_said_at_once() -> None:
    values = changed(
        ("nmae", "x"),
        ("seed", "four"),
        ("corpus", {"type": "jsonl", "path": "/no/where", "responce": "answer"}),
        ("teachers.0.engine.type", "tgi"),
        ("student.steps", MISSING),
        ("student.learning_rate", -1),
        ("baselines.0.alpha", 1),
    )
    assert sorted(problems(values)) == [
        "baselines.0.alpha: unknown key; known here: type",
        "corpus.path: no such file or folder: /no/where",
        "corpus.responce: unknown key; did you mean response?",
        "nmae: unknown key; did you mean name?",
        "seed: expected a whole number, got 'four'",
        "student.learning_rate: must be greater than 0, got -1",
        "student.steps: missing",
        "teachers.0.engine.type: 'tgi' is not known; one of vllm, transformers",
    ]


def test_known_keys_are_those_of_the_variant() -> None:
    (line,) = problems(changed(("teachers.0.engine.tensor_parallel", 2)))
    assert line == "teachers.0.engine.tensor_parallel: unknown key; known here: type, dtype, batch_tokens"


# --- the file ----------------------------------------------------------------------------------------------------


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def file_problems(file: Path, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(file, overrides)
    return raised.value.problems


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: [1,\n", ":2: not valid YAML: "),
        ("name: a\nseed: 1\nname: b\n", ":3: not valid YAML: name stands here twice"),
        ("student:\n  steps: 1\n  steps: 2\n", ":3: not valid YAML: steps stands here twice"),
        ("- name: a\n", ": expected a mapping of keys at the top level"),
        ("", ": expected a mapping of keys at the top level"),
        ("name: !!python/object/apply:os.getcwd []\n", ":1: not valid YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_config(text: str, line: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    (found,) = file_problems(file)
    assert found.startswith(f"{file}{line}") and "\n" not in found


def test_no_file_a_folder_and_other_bytes(tmp_path: Path) -> None:
    assert file_problems(tmp_path / "none.yaml") == [f"{tmp_path}/none.yaml: no such config file"]
    assert file_problems(tmp_path) == [f"{tmp_path}: a folder, expected a YAML file"]
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\n")
    (found,) = file_problems(tmp_path / "run.yaml")
    assert found.startswith(f"{tmp_path}/run.yaml: not valid YAML: 'utf-8' codec can't decode")


def test_merge_keys_are_no_repetition(tmp_path: Path) -> None:
    text = yaml.safe_dump(changed(("baselines", MISSING)))
    text += "baselines:\n- &one {type: cdm, alpha: 0.25}\n- {<<: *one, dual: false}\n"
    baselines = load_config(written(tmp_path, text)).baselines
    assert [method.model_dump()["dual"] for method in baselines] == [True, False]
    assert [method.model_dump()["alpha"] for method in baselines] == [0.25, 0.25]


# --- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_reach_sections_lists_and_new_sections(tmp_path: Path) -> None:
    file = written(tmp_path, yaml.safe_dump(SMALL))
    overrides = [
        "student.learning_rate=1e-3",
        "teachers.0.top_k=7",
        "evaluation.samples=0",
        "method={type: sft}",
        "baselines=[]",
    ]
    config = load_config(file, [*overrides, "corpus.packages=[os, re]", "seed=1", "seed=2"])
    assert (config.student.learning_rate, config.teachers[0].top_k, config.evaluation.samples) == (1e-3, 7, 0)
    assert config.method.type == "sft" and config.corpus.model_dump()["packages"] == ["os", "re"]
    assert config.seed == 2, "the last one counts"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed", "--set seed: expected KEY=VALUE, for instance student.learning_rate=1e-4"),
        ("=3", "--set =3: expected KEY=VALUE, for instance student.learning_rate=1e-4"),
        ("name=[", "--set name: not a YAML value: ["),
        ("name.first=x", "--set name.first: name is a value, it has no keys below it"),
        (
            "student.model.name.x=1",
            "--set student.model.name.x: student.model.name is a value, it has no keys below it",
        ),
        ("teachers.1.top_k=5", "--set teachers.1.top_k: 1 is no position of the list (0 to 0)"),
        ("teachers.first.top_k=5", "--set teachers.first.top_k: first is no position of the list (0 to 0)"),
        ("teachers.-1=5", "--set teachers.-1: -1 is no position of the list (0 to 0)"),
        ("student.stepz=5", "student.stepz: unknown key; did you mean steps?"),
        ("student.steps=", "student.steps: expected a whole number, got nothing"),
    ],
)
def test_a_wrong_override(override: str, line: str, tmp_path: Path) -> None:
    assert file_problems(written(tmp_path, yaml.safe_dump(SMALL)), [override]) == [line]


def test_faults_of_overrides_and_of_the_file_are_said_together(tmp_path: Path) -> None:
    file = written(tmp_path, yaml.safe_dump(changed(("sede", 1))))
    assert file_problems(file, ["seed", "teachers.4.top_k=1", "method.alpha=2"]) == [
        "--set seed: expected KEY=VALUE, for instance student.learning_rate=1e-4",
        "--set teachers.4.top_k: 4 is no position of the list (0 to 0)",
        "method.alpha: must be less than or equal to 1, got 2",
        "sede: unknown key; did you mean seed?",
    ]


# --- identity ----------------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any, order: random.Random) -> Any:
    """The same value with the keys of every mapping in another order."""
    if isinstance(value, dict):
        items = [(key, shuffled(item, order)) for key, item in value.items()]
        return dict(order.sample(items, len(items)))
    return [shuffled(item, order) for item in value] if isinstance(value, list) else value


@settings(deadline=None)
@given(PLAIN, st.randoms(use_true_random=False))
def test_the_order_of_keys_is_no_part_of_an_identity(value: Any, order: random.Random) -> None:
    assert digest(value) == digest(shuffled(value, order))


@settings(deadline=None)
@given(PLAIN, PLAIN)
def test_different_values_have_different_identities(one: Any, other: Any) -> None:
    assert (digest(one) == digest(other)) == (canonical(one) == canonical(other))


def canonical(value: Any) -> Any:
    """Equality that tells 1 from 1.0 and True, as JSON does."""
    if isinstance(value, dict):
        return {"keys": {key: canonical(item) for key, item in value.items()}}
    if isinstance(value, list):
        return [canonical(item) for item in value]
    return (type(value).__name__, repr(value))


def test_an_identity_is_the_same_in_every_version_and_process() -> None:
    assert digest({"b": 1, "a": "ü"}, None) == "b69ff64e0687e6eed603c7192fc7b448db8f1823678d65017200b92f113aa994"
    assert digest([1], 2) != digest(1, [2]) != digest([1, 2])


@settings(deadline=None)
@given(st.permutations(list(SMALL)))
def test_a_section_is_its_values(keys: list[str]) -> None:
    config = parse_config({key: SMALL[key] for key in keys})
    assert digest(config) == digest(parse_config(SMALL)) == digest(config.model_dump(mode="json"))
    assert digest(config.student) != digest(config.teachers[0])


@pytest.mark.parametrize("key", ["student.steps", "method.top_k", "seed", "evaluation.samples"])
def test_every_value_counts(key: str) -> None:
    assert digest(parse_config(changed((key, 77)))) != digest(parse_config(SMALL))


def test_storage_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_path(parse_config(SMALL), "shards", "x") == f"{tmp_path}/outputs/shards/x"
    with pytest.raises(ConfigError, match="storage: must be a folder that every node mounts, not a URL"):
        parse_config(changed(("storage", "s3://bucket/run/")))


def test_the_schema_knows_every_section() -> None:
    schema = Config.model_json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False

"""The config's `corpus` section: where documents come from (layer 0)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cdm.config_types import ExistingPath, HubOrFolder, Positive, Split, Strict


class Corpus(Strict):
    max_documents: Positive | None = Field(None, description="keep the first so many, in the order of their ids")
    min_response_bytes: Positive = 1
    max_response_bytes: Positive = Field(16_384, description="longer responses are left out, and counted")
    validation_share: Split = 0.02
    test_share: Split = 0.02
    part_documents: Positive = Field(256, description="documents a part; a part is the unit of work and of restart")

    @model_validator(mode="after")
    def _some_training_data(self) -> Corpus:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share leave nothing to train on")
        return self


class PythonPackages(Corpus):
    """Each documented function of the Python packages on the machine: signature and docstring -> source."""

    type: Literal["python_packages"]
    packages: list[str] | None = Field(None, description="import names; default: standard library, then all installed")


class Fields(Corpus):
    """Where the texts are: a prompt and a response column, or one column of chat messages."""

    prompt: str = "prompt"
    response: str | None = Field("response", description="null where there is no such column: `generation` writes all")
    messages: str | None = Field(
        None, description="a column of {role, content} turns; the last assistant one is taught"
    )
    system: str | None = Field(None, description="a system message put before every prompt")
    metadata: list[str] = Field(default_factory=list, description="further columns, kept with each document")


class JsonlFiles(Strict):
    type: Literal["jsonl"]
    path: ExistingPath = Field(description="a file or a folder of *.jsonl / *.jsonl.gz")


class ParquetFiles(Strict):
    type: Literal["parquet"]
    path: ExistingPath = Field(description="a file, a folder or a URL")


class Dataset(Strict):
    type: Literal["huggingface"]
    name: HubOrFolder = Field(description="any name or local folder that `datasets.load_dataset` takes")
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


AnyRows = Annotated[JsonlFiles | ParquetFiles | Dataset, Field(discriminator="type")]


class Jsonl(JsonlFiles, Fields):
    pass


class ParquetCorpus(ParquetFiles, Fields):
    pass


class HuggingFace(Dataset, Fields):
    pass


AnyCorpus = Annotated[PythonPackages | Jsonl | ParquetCorpus | HuggingFace, Field(discriminator="type")]

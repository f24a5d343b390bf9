"""One score of one run: a row of the leaderboard."""

from pydantic import BaseModel, ConfigDict, Field


class Row(BaseModel):
    """A model's score by one metric of one task, with its evaluation and its costs."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    rank: int | None = Field(None, description="rank among the rows of the same evaluation and metric; ties share it")
    rank_low: int | None = Field(
        None, description="best rank that the documents do not exclude, by paired tests; main metric with samples only"
    )
    rank_high: int | None = Field(None, description="worst rank that they do not exclude")
    model: str = Field(description="checkpoint, with its revision if one was given")
    method: str | None = Field(description="quantization method; null for models of other packages")
    scheme: str | None = Field(description="bit widths of weights and activations; null for models of other packages")
    task: str = Field(description="lmms-eval's name of the task")
    metric: str = Field(description="lmms-eval's name of the metric")
    main: bool = Field(description="whether it is the task's first metric")
    value: float = Field(description="the metric over all documents, as lmms-eval gives it")
    percent: bool = Field(False, description="whether it is a share between 0 and 1, shown in percent")
    stderr: float | None = Field(description="its standard error by lmms-eval, for independent documents")
    wilson_low: float | None = Field(
        None,
        description="lower end of Wilson's 95 % interval, for shares with few right or few wrong documents",
    )
    wilson_high: float | None = Field(None, description="its upper end")
    higher_is_better: bool = Field(description="whether the highest value ranks first")
    difference: float | None = Field(None, description="value minus that of the same model in full precision")
    documents: int = Field(description="number of documents evaluated")
    documents_total: int = Field(description="number of documents of the task")
    evaluation: str | None = Field(
        None, description="hash of task, data, split, prompt and documents; only rows that share it are ranked together"
    )
    notes: tuple[str, ...] = Field((), description="why a row is listed apart or has no rank")
    apart: bool = Field(False, description="whether it is on stand-in data or on a part of the documents")
    dataset: str | None = Field(description="hub id of the data set")
    dataset_config: str | None = Field(description="its configuration")
    split: str | None = Field(description="its split")
    data: str | None = Field(description="commit of the hub data set, or content hash of a local copy")
    protocol: str = Field(description="hash of prompt, generation arguments, system prompt, offset and task version")
    samples_digest: str | None = Field(description="hash of ids, targets and prompts in the samples file")
    weight_bits: float | None = Field(None, description="effective bits of a decoder weight, scales included")
    activation_bits: float | None = Field(None, description="bits of a decoder Linear's input")
    vision_weight_bits: float | None = Field(None, description="effective bits of a vision tower weight")
    vision_activation_bits: float | None = Field(None, description="bits of a vision tower Linear's input")
    packed_bytes: int | None = Field(None, description="size of the model: weights packed, everything else in 16 bits")
    weight_bytes: int | None = Field(None, description="bytes of the run's weights; null if low bits are simulated")
    peak_memory_bytes: int | None = Field(None, description="peak memory of the run; null if low bits are simulated")
    tokens_per_second: float | None = Field(
        None, description="generated tokens per second of generation; null if low bits are simulated"
    )
    search_seconds: float | None = Field(None, description="seconds that the search of the plan took")
    backend: str | None = Field(None, description="arithmetic; 'reference' simulates: weights are rounded, not packed")
    dtype: str | None = Field(None, description="compute type")
    device: str | None = Field(None, description="device it ran on")
    calibration: str | None = Field(None, description="source of the calibration documents")
    seed: int | None = Field(None, description="seed of the draw of calibration documents")
    options: str | None = Field(None, description="options of the method")
    arguments: str | None = Field(None, description="model arguments of lmms-eval, for models of other packages")
    plan_hash: str | None = Field(None, description="SHA-256 of the plan")
    model_fingerprint: str | None = Field(None, description="SHA-256 of the checkpoint")
    versions: str | None = Field(None, description="versions of the packages that affect results")
    commit: str | None = Field(None, description="commit of this package's source, if known")
    date: str | None = Field(None, description="start of the run, in lmms-eval's format")
    run: str = Field(description="hash of the results file")
    file: str = Field(description="the results file, relative to the leaderboard's folder")
    samples: str | None = Field(None, description="the samples file, relative to the leaderboard's folder")

"""One score of one run: a row of the leaderboard."""

from pydantic import BaseModel, ConfigDict, Field


class Row(BaseModel):
    """A model's score by one metric of one task, with what it was measured on and what it cost."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    rank: int | None = Field(None, description="place among the rows of the same evaluation and metric; ties share it")
    rank_low: int | None = Field(
        None, description="best place that the documents do not exclude, by paired tests; main metric with samples only"
    )
    rank_high: int | None = Field(None, description="worst place that they do not exclude")
    model: str = Field(description="checkpoint, with its revision where one was named")
    method: str | None = Field(description="quantization method; null for models of other packages")
    scheme: str | None = Field(description="bit widths of weights and activations; null for models of other packages")
    task: str = Field(description="lmms-eval's name of the task")
    metric: str = Field(description="lmms-eval's name of the metric")
    main: bool = Field(description="whether it is the task's first metric; others break it down, or add to it")
    value: float = Field(description="the metric over all documents, as lmms-eval gives it")
    percent: bool = Field(False, description="whether it is known to be a share, from 0 to 1, and shown in percent")
    stderr: float | None = Field(description="its standard error by lmms-eval, which takes documents as independent")
    wilson_low: float | None = Field(
        None,
        description="lower end of Wilson's 95 % interval, where a score is a share with few documents right, or wrong",
    )
    wilson_high: float | None = Field(None, description="its upper end")
    higher_is_better: bool = Field(description="which values rank first")
    difference: float | None = Field(None, description="value minus that of the same model in full precision")
    documents: int = Field(description="documents evaluated")
    documents_total: int = Field(description="documents that the task has")
    evaluation: str | None = Field(
        None, description="names task, data, split, prompt and documents; only rows that share it are ranked together"
    )
    notes: tuple[str, ...] = Field((), description="why a row stands apart or has no rank")
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
    packed_bytes: int | None = Field(None, description="size of the model: weights packed, all else in 16 bits")
    weight_bytes: int | None = Field(None, description="bytes that the run's weights took; null where it simulates")
    peak_memory_bytes: int | None = Field(None, description="peak memory of the run; null where it simulates")
    tokens_per_second: float | None = Field(
        None, description="generated tokens by the time that generating took; null where the run simulates"
    )
    search_seconds: float | None = Field(None, description="seconds that finding the quantization took")
    backend: str | None = Field(None, description="arithmetic; 'reference' simulates: weights are rounded, not packed")
    dtype: str | None = Field(None, description="compute type")
    device: str | None = Field(None, description="what it ran on")
    calibration: str | None = Field(None, description="source of the calibration documents")
    seed: int | None = Field(None, description="of the draw of calibration documents")
    options: str | None = Field(None, description="options of the method")
    arguments: str | None = Field(None, description="model arguments of lmms-eval, for models of other packages")
    plan_hash: str | None = Field(None, description="SHA-256 of the plan")
    model_fingerprint: str | None = Field(None, description="SHA-256 of the checkpoint")
    versions: str | None = Field(None, description="of the packages that compute")
    commit: str | None = Field(None, description="of this package's source, where it is known")
    date: str | None = Field(None, description="when lmms-eval began, as it writes it")
    run: str = Field(description="hash of the results file")
    file: str = Field(description="the results file, from the leaderboard's folder")
    samples: str | None = Field(None, description="the samples file, from the leaderboard's folder")

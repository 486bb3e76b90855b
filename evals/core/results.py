"""evaluation.json: the results for a run's weights. Tasks add to it; it starts over when the weights change."""

import json
from collections.abc import Mapping
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from skipcoder.errors import UserError
from skipcoder.files import write_atomically
from skipcoder.records import checked
from skipcoder.trainer.run.run import Run

FILE = "evaluation.json"
Interval = list[float]
"""[low, high], 95 %."""
Result = dict[str, Any]
"""What an evaluation found of one run, on its way into `Evaluation`; a plain dict, for its numbers for each k or N."""


BY_DOCUMENT = "by_document"
"""Key of a result's numbers by document (stats/pairs.py), which are compared between runs and not recorded."""


class Histogram(TypedDict):
    """How many latents fire how often."""

    log10_edges: list[float]
    latents: list[int]


class Cost(TypedDict):
    """What splicing costs at some positions of a row: nats of cross-entropy, and KL divergence."""

    first: int
    last: int
    ce: float
    kl: float


class SideResult(TypedDict):
    """What a crosscoder does on one of its sides (core/by_side.py)."""

    hookpoint: str
    side: str
    fvu: float
    fvu_ci: Interval | None
    norm_share: float | None
    exclusive: int
    from_earlier: NotRequired[float]
    """Of a cross-layer transcoder: earlier layers' share of what latents write there."""


class ProbedDataset(TypedDict):
    """Sparse probing of one data set; further keys hold the numbers for each k."""

    dataset: str
    train: int
    test: int
    dense_x: float
    dense_y: float


class AbsorbedLetter(TypedDict):
    """Absorption of one letter."""

    letter: str
    probe_f1: float
    words: int
    full: float
    fraction: float
    split: list[int]


class Evaluation(TypedDict, total=False):
    """Results of the tasks that were asked for. Further keys hold numbers for each k or N (`probing_k5`, `tpp_20`),
    intervals (`KEY_ci`) and times (`TASK_seconds`)."""

    weights: str
    """Fingerprint of the weights that the results are for."""
    # core: reconstruction
    n: int
    documents: int
    fvu: float
    fvu_ci: Interval | None
    explained_variance: float
    fvu_per_dim: float
    flat_dims: int
    cosine: float
    l2_ratio: float
    relative_reconstruction_bias: float | None
    l0: float
    l1: float
    mse: float
    l2_norm_in: float
    l2_norm_out: float
    explained_variance_legacy: float
    dead_fraction: float
    dense_fraction: float
    density_histogram: Histogram
    sides: list[SideResult]
    # core: cross-entropy
    ce_tokens: int
    ce_rows: int
    ce_documents: int
    ce_clean: float
    ce_spliced: float
    ce_increase: float
    ce_increase_ci: Interval | None
    ce_zero: float
    ce_mean: float
    kl_spliced: float
    kl_spliced_ci: Interval | None
    kl_zero: float
    kl_mean: float
    ce_recovered_zero: float | None
    ce_recovered_mean: float | None
    kl_recovered_zero: float | None
    kl_recovered_mean: float | None
    by_position: list[Cost]
    evaluation_seconds: float
    # probing
    probing_details: list[ProbedDataset]
    # absorption
    absorption_space: str
    absorption_words: int
    absorption_letters: int
    absorption_unsplit_letters: int
    absorption_probe_f1: float | None
    absorption_full: float | None
    absorption_fraction: float | None
    split_latents: float | None
    absorption_details: list[AbsorbedLetter]
    # tpp, scr, ravel
    tpp_texts: int
    tpp_classes: list[str]
    scr_texts: int
    scr_accuracy_biased: float
    scr_accuracy_oracle: float
    ravel_cause: float | None
    ravel_isolation: float | None
    ravel_disentangle: float | None


_OTHER_PREFIXES = {
    "absorption": ("split_latents",),
    "evaluation": ("ce_", "kl_", "fvu", "documents", "by_position", "sides"),
}
"""Beginnings of keys of a task's results that are not its name; core's time is `evaluation_seconds`."""


def read(run: Run) -> Evaluation:
    """The results for these weights, {} if there are none; UserError where the file is damaged."""
    file, remedy = run.path / FILE, "delete it and evaluate the run again"
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); {remedy}") from None
    evaluation = checked(Evaluation, found, str(file), remedy)
    return evaluation if evaluation.get("weights") == run.weights else {}


def record(run: Run, result: Mapping[str, Any]) -> Evaluation:
    """Add results to those for the run's weights, and return them all. Those of a task replace all of its earlier ones,
    which may have been made with other settings, or be what kept it from giving any."""
    tasks = [key.removesuffix("_seconds") for key in result if key.endswith("_seconds")]
    gone = tuple(prefix for task in tasks for prefix in (f"{task}_", *_OTHER_PREFIXES.get(task, ())))
    before = {key: value for key, value in read(run).items() if not key.startswith(gone)}
    found = cast(Evaluation, {**before, **result, "weights": run.weights})
    write_atomically(run.path / FILE, json.dumps(found, indent=2).encode())
    return found

"""The one table of metrics, behind the printed lines, the report, model cards, Parquet and docs/evaluation.md.

`KEY` is the name in evaluation.json and in every row of a table; `KEY_ci`, where there is one, its 95 % interval.
"""

from dataclasses import dataclass
from typing import Any, Literal

from skipcoder.evals.stats.intervals import LEAST

Row = dict[str, Any]
"""A row of a table: summary, evaluation and interpretation of one run side by side."""


@dataclass(frozen=True)
class Metric:
    """One number that is reported of a coder."""

    key: str
    title: str
    """Full title, as in a model card."""
    short: str
    """Title at the head of a column."""
    unit: str = ""
    """"": a share or another number without a unit."""
    better: Literal["lower", "higher", ""] = ""
    """"": neither is better by itself."""
    interval: bool = False
    """`KEY_ci` stands beside it."""
    baseline: str = ""
    """Key of the number to compare it with, in the same row."""
    line: str = ""
    """Its name in the line that is printed for a run; "": it is not printed."""
    card: bool = False
    """Model cards show it."""
    table: bool = True
    """The report's tables show it."""
    figure: str = ""
    """Title of the report's figure of it against L0; "": no figure."""
    caption: str = ""
    """Caption of that figure."""


METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            "fvu", "FVU", "FVU", better="lower", interval=True, line="FVU", card=True,
            figure="FVU", caption="Lower is better; the mean predictor has 1.",
        ),
        Metric("fvu_per_dim", "FVU, mean over dimensions", "FVU per dim", better="lower", card=True),
        Metric("l0", "L0", "L0", unit="latents", card=True),
        Metric("cosine", "cosine similarity", "cosine", better="higher", card=True),
        Metric("dead_fraction", "latents that never fire", "dead", better="lower", line="dead", card=True),
        Metric(
            "ce_clean", "cross-entropy, model as it is (nats)", "CE", unit="nats", line="CE", card=True, table=False
        ),
        Metric(
            "ce_increase", "cross-entropy, increase with the coder spliced in (nats)", "CE increase", unit="nats",
            better="lower", interval=True, line="increase", card=True, figure="Cross-entropy: what splicing costs",
            caption="Nats above the untouched model.",
        ),
        Metric(
            "kl_spliced", "KL divergence from the model as it is (nats)", "KL", unit="nats", better="lower",
            interval=True, line="KL", card=True, figure="KL divergence", caption="Nats; 0 is the untouched model.",
        ),
        Metric(
            "ce_spliced", "cross-entropy, coder spliced in", "CE spliced", unit="nats", better="lower",
            baseline="ce_clean", card=True, table=False,
        ),
        Metric("ce_zero", "cross-entropy, MLP zeroed", "CE zeroed", unit="nats", card=True, table=False),
        Metric(
            "ce_recovered_zero", "cross-entropy recovered, against zero", "recovered (zero)", better="higher",
            interval=True, line="recovered", card=True, figure="Cross-entropy recovered",
            caption="Share of what zeroing the MLP costs, where that clearly costs; 1 is the untouched model.",
        ),
        Metric("ce_recovered_mean", "against the mean", "recovered (mean)", better="higher", interval=True, card=True),
        Metric("ce_skip_only", "cross-entropy, skip alone", "CE skip only", unit="nats", better="lower"),
        Metric(
            "probing_k1", "sparse probing, one latent", "probing k=1", better="higher", interval=True,
            baseline="probing_dense_y", line="probing k=1", card=True, figure="Sparse probing, one latent",
            caption="Accuracy on test texts; the dotted line is a dense probe on the MLP's output.",
        ),
        Metric(
            "probing_k5", "sparse probing, five latents", "probing k=5", better="higher", interval=True,
            baseline="probing_dense_y",
        ),
        Metric(
            "probing_gain_k5", "sparse probing, five latents, less those of a random coder on the same side",
            "probing gain k=5", better="higher", interval=True,
        ),
        Metric(
            "absorption_full", "feature absorption", "absorption", better="lower", interval=True, line="absorption",
            card=True, figure="Feature absorption",
            caption="Share of words whose first letter is fully absorbed; lower is better.",
        ),
        Metric("absorption_fraction", "absorbed fraction", "absorbed fraction", better="lower", interval=True),
        Metric("split_latents", "latents that a letter is split into", "split latents", unit="latents"),
        Metric("tpp_20", "targeted probe perturbation, 20 latents", "TPP 20", interval=True, line="TPP 20"),
        Metric("scr_20", "spurious correlation removal, 20 latents", "SCR 20", interval=True, line="SCR 20"),
        Metric("ravel_disentangle", "RAVEL, disentanglement", "RAVEL", better="higher", interval=True, line="RAVEL"),
        Metric(
            "contextfree_token", "R² of activations from the token alone", "R² by token", interval=True,
            baseline="contextfree_token_shuffled", line="by token",
        ),
        Metric(
            "contextfree_triple", "R² of activations from three tokens", "R² by three tokens", interval=True,
            baseline="contextfree_triple_shuffled", line="by three",
        ),
        Metric(
            "contextfree_entropy", "entropy of a latent's tokens", "token entropy", unit="bits", interval=True,
            baseline="contextfree_entropy_shuffled",
        ),
        Metric(
            "shared_latents", "latents that two seeds share", "shared by seeds", better="higher",
            figure="Latents that two seeds share", caption="Matched one to one; cosine of at least 0.7.",
        ),
        Metric(
            "detection", "detection, balanced accuracy", "detection", better="higher", interval=True, card=True
        ),
        Metric("fuzzing", "fuzzing, balanced accuracy", "fuzzing", better="higher", interval=True, card=True),
        Metric("seconds", "time in training, of all that shared it", "train s", unit="s", better="lower"),
    )
}  # fmt: skip
"""The metrics by key, in the order in which they are shown."""


def interval_of(row: Row, key: str) -> tuple[float, float] | None:
    """The interval of a metric in a row, if it has one."""
    ends = row.get(f"{key}_ci")
    return (ends[0], ends[1]) if ends else None


def printed(row: Row) -> str:
    """One line about a run."""
    facts = []
    for metric in METRICS.values():
        if metric.line and metric.key in row:
            value = row[metric.key]
            facts.append(f"{metric.line} {'-' if value is None else f'{value:.3f}'}")
    return f"{row.get('run', '')} {row['kind']} k={row['k']}  {'  '.join(facts)}".strip()


def why_no_intervals(row: Row) -> list[str]:
    """What keeps a row from having intervals, and what to do."""
    said = []
    for count, key, of, remedy in (
        ("documents", "fvu_ci", "FVU", "capture more text"),
        ("ce_documents", "ce_increase_ci", "cross-entropy and KL", "set a larger ce_tokens, or capture more text"),
    ):
        if count in row and row.get(key) is None:
            said.append(
                f"no interval for {of}: {row[count]} documents count as fewer than {LEAST} of equal size; {remedy}"
            )
    return said


def documented() -> str:
    """The table of docs/evaluation.md."""
    lines = ["| key | metric | unit | better | interval | compare with |", "|---|---|---|---|---|---|"]
    for m in METRICS.values():
        interval, baseline = "yes" if m.interval else "", f"`{m.baseline}`" if m.baseline else ""
        lines.append(f"| `{m.key}` | {m.title} | {m.unit} | {m.better} | {interval} | {baseline} |")
    return "\n".join(lines)

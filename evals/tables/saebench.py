"""Results in SAEBench's JSON form (sae-bench 0.6), for its plots and tables; tests validate them with its own classes.

The numbers are ours: SAEBench has no definition for transcoders, and for an SAE its explained variance is wrong (it
changes with the scale of activations), as is its mse (with the batch size). `eval_result_unstructured` names the space.
"""

import json
import time
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipcoder.evals.tables.metrics import Row
from skipcoder.trainer.run.run import Run

COMMIT = "not SAEBench: skipcoder " + version("skipcoder")
_NS = (2, 5, 10, 20, 50, 100, 500)


def write(run: Run, row: Row, folder: Path) -> list[Path]:
    """Write one file for each evaluation that `row` holds: FOLDER/EVAL/RUN_eval_results.json."""
    wrote = []
    for name, (metrics, details) in results(run, row).items():
        file = folder / name / f"{'_'.join(run.path.parts[-3:]).strip('/')}_eval_results.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "eval_type_id": name,
            "eval_config": {"model_name": run.summary["model"]},
            "eval_id": str(uuid.uuid4()),
            "datetime_epoch_millis": int(time.time() * 1000),
            "eval_result_metrics": metrics,
            "eval_result_details": details,
            "sae_bench_commit_hash": COMMIT,
            "sae_lens_id": run.path.name,
            "sae_lens_release_id": "skipcoder",
            "sae_lens_version": None,
            "sae_cfg_dict": _description(run),
            "eval_result_unstructured": {
                "read": run.coder.meta["read"],
                "write": run.coder.meta["write"],
                "by": COMMIT,
            },
        }
        file.write_text(json.dumps(content, indent=2))
        wrote.append(file)
    return wrote


def results(run: Run, row: Row) -> dict[str, tuple[dict[str, Any], list[Row]]]:
    """{evaluation: (metrics by category, details)} for the evaluations that `row` holds."""
    found: dict[str, tuple[dict[str, Any], list[Row]]] = {}
    if "fvu" in row:
        found["core"] = _core(run, row), []
    if row.get("absorption_full") is not None:
        found["absorption"] = _absorption(row)
    if "probing_details" in row:
        found["sparse_probing"] = _probing(row)
    for name in ("scr", "tpp"):
        if f"{name}_2" in row:
            found[name] = _erasure(row, name)
    if "ravel_cause" in row:
        names = {"disentanglement_score": "disentangle", "cause_score": "cause", "isolation_score": "isolation"}
        found["ravel"] = {"ravel": {key: row[f"ravel_{ours}"] for key, ours in names.items()}}, []
    return found


def _core(run: Run, row: Row) -> dict[str, Any]:
    return {
        "model_behavior_preservation": {
            "kl_div_score": _number(row["kl_recovered_zero"]),
            "kl_div_with_ablation": row["kl_zero"],
            "kl_div_with_sae": row["kl_spliced"],
        },
        "model_performance_preservation": {
            "ce_loss_score": _number(row["ce_recovered_zero"]),
            "ce_loss_with_ablation": row["ce_zero"],
            "ce_loss_with_sae": row["ce_spliced"],
            "ce_loss_without_sae": row["ce_clean"],
        },
        "reconstruction_quality": {
            "explained_variance": row["explained_variance"],
            "explained_variance_legacy": row["explained_variance_legacy"],
            "mse": row["mse"],
            "cossim": row["cosine"],
        },
        "shrinkage": {
            "l2_norm_in": row["l2_norm_in"],
            "l2_norm_out": row["l2_norm_out"],
            "l2_ratio": row["l2_ratio"],
            "relative_reconstruction_bias": _number(row["relative_reconstruction_bias"]),
        },
        "sparsity": {"l0": row["l0"], "l1": row["l1"]},
        "token_stats": {
            "total_tokens_eval_reconstruction": row["ce_tokens"],
            "total_tokens_eval_sparsity_variance": row["n"],
        },
        "misc_metrics": {
            **{key: row[key] for key in ("freq_over_1_percent", "freq_over_10_percent")},
            **{
                f"normalized_{key}": row[f"normalized_{key}"] for key in ("freq_over_1_percent", "freq_over_10_percent")
            },
            "average_max_encoder_cosine_sim": mean_max_cosine(run.coder.W_enc),
            "average_max_decoder_cosine_sim": mean_max_cosine(run.coder.W_dec),
            "frac_alive": 1 - row["dead_fraction"],
        },
    }


def _absorption(row: Row) -> tuple[dict[str, Any], list[Row]]:
    letters = row["absorption_details"]
    columns = {"absorption_fraction_score": "fraction", "full_absorption_score": "full"}
    values = {key: [letter[ours] for letter in letters] for key, ours in columns.items()}
    values["num_split_features"] = [len(letter["split"]) for letter in letters]
    mean = {f"mean_{key}": float(np.mean(column)) for key, column in values.items()}
    mean |= {f"std_dev_{key}": float(np.std(column)) for key, column in values.items()}
    details = [
        {
            "first_letter": letter["letter"],
            "mean_absorption_fraction": letter["fraction"],
            "full_absorption_rate": letter["full"],
            "num_full_absorption": round(letter["full"] * letter["words"]),
            "num_probe_true_positives": letter["words"],
            "num_split_features": len(letter["split"]),
        }
        for letter in letters
    ]
    return {"mean": mean}, details


def _probing(row: Row) -> tuple[dict[str, Any], list[Row]]:
    details = row["probing_details"]
    ks = [k for k in (1, 2, 5, 10, 20, 50, 100) if f"k{k}" in details[0]]

    def columns(of: Row, prefix: str) -> dict[str, Any]:
        llm = {"llm_test_accuracy": of[f"{prefix}dense_y"]}
        llm |= {f"llm_top_{k}_test_accuracy": of[f"{prefix}y_dims_k{k}"] for k in ks}
        sae = {"sae_test_accuracy": None} | {f"sae_top_{k}_test_accuracy": of[f"{prefix}k{k}"] for k in ks}
        return {"llm": llm, "sae": sae}

    return columns(row, "probing_"), [
        {"dataset_name": one["dataset"], **columns(one, "")["llm"], **columns(one, "")["sae"]} for one in details
    ]


def _erasure(row: Row, name: str) -> tuple[dict[str, Any], list[Row]]:
    if name == "scr":
        metrics = {f"scr_metric_threshold_{n}": row.get(f"scr_{n}") for n in _NS}
        return {"scr_metrics": metrics}, [{"dataset_name": "skipcoder", **metrics}]
    metrics = {f"tpp_threshold_{n}_total_metric": row.get(f"tpp_{n}") for n in _NS}
    return {"tpp_metrics": metrics}, [{"dataset_name": "skipcoder", **metrics}]


def mean_max_cosine(W_MD: Tensor, rows: int = 2048) -> float:
    """Mean over the rows of the largest cosine with another row."""
    W = torch.nn.functional.normalize(W_MD.detach().float(), dim=1)
    total = 0.0
    for start in range(0, len(W), rows):
        cosine = W[start : start + rows] @ W.T
        cosine[torch.arange(len(cosine)), start + torch.arange(len(cosine))] = -1
        total += float(cosine.max(1).values.sum())
    return total / len(W)


def _description(run: Run) -> dict[str, Any]:
    coder = run.coder
    return {
        "architecture": coder.cfg.kind, "d_in": coder.d_in, "d_out": coder.d_out, "d_sae": coder.cfg.width,
        "k": coder.cfg.k, "activation_fn": coder.cfg.activation, "model_name": run.summary["model"],
        "hook_name": coder.meta["read"]["module"], "hook_name_out": coder.meta["write"]["module"],
        "training_tokens": run.summary["train_tokens"],
    }  # fmt: skip


def _number(value: float | None) -> float:
    """SAEBench writes -1 for a missing value."""
    return -1.0 if value is None else value

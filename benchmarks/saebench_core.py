"""The numbers of sae-bench 0.6's core evaluation beside ours, of one SAE on the same rows of text and the same weights.

    pip install --no-deps --target DIR sae-bench sae-lens transformer-lens==3.9.0 einops jaxtyping wadler-lindig \
        beartype==0.14.1 openai tabulate seaborn loguru fancy-einsum better-abc simple-parsing docstring-parser nltk \
        plotly plotly-express typeguard sentencepiece tenacity narwhals distro jiter sniffio python-dotenv
    PYTHONPATH=DIR python benchmarks/saebench_core.py --run DIR [--rows 32]

The run: an SAE of an MLP's output in a Llama. sae-bench wants numpy 1 and other versions than ours; without its
requirements it runs beside ours. Both evaluate all positions, in float32.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from skipcoder.evals.core.evaluator import Evaluator
from skipcoder.evals.core.metrics import ReconstructionMetrics, Targets
from skipcoder.evals.core.passes import Part, ablation, token_losses
from skipcoder.evals.tables.saebench_adapter import SaeBenchSAE
from skipcoder.pipeline.model.hookpoints import Hookpoint
from skipcoder.pipeline.model.hooks import capture
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.run.run import Run

BATCH = 4
WRONG = {
    "explained_variance": "theirs changes with the scale of activations",
    "mse": "theirs is divided by the tokens of a batch once more, ours by the dimensions",
}


class Rows:
    """What sae-bench asks for tokens."""

    def __init__(self, tokens_BT: torch.Tensor) -> None:
        self.tokens_BT, self.context_size, self.next = tokens_BT, tokens_BT.shape[1], 0

    def get_batch_tokens(self, rows: int) -> torch.Tensor:
        """The next rows."""
        self.next += rows
        return self.tokens_BT[self.next - rows : self.next]

    def reset_input_dataset(self) -> None:
        """From the beginning."""
        self.next = 0


def hooked(lm: Any) -> Any:
    """The same Llama in TransformerLens."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    c = lm.config
    rope = getattr(c, "rope_parameters", None) or {}
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_ctx=1024, d_head=c.hidden_size // c.num_attention_heads,
        n_heads=c.num_attention_heads, n_key_value_heads=c.num_key_value_heads, d_mlp=c.intermediate_size,
        act_fn="silu", d_vocab=c.vocab_size, eps=c.rms_norm_eps, normalization_type="RMS", final_rms=True,
        positional_embedding_type="rotary", rotary_adjacent_pairs=False, gated_mlp=True, dtype=torch.float32,
        rotary_dim=c.hidden_size // c.num_attention_heads, rotary_base=int(rope.get("rope_theta", 10000)), device="cpu",
    )  # fmt: skip
    model = HookedTransformer(cfg)
    model.load_and_process_state_dict(
        convert_llama_weights(lm, cfg), fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    return model


@torch.no_grad()
def ours(lm: Any, run: Run, tokens_BT: torch.Tensor) -> dict[str, float]:
    """Our numbers under sae-bench's names."""
    write = run.write_site
    targets = Targets([run.coder.d_out])
    metrics = ReconstructionMetrics(run.coder.cfg.width, targets)
    for tokens in tokens_BT.split(BATCH):
        ((_, y),) = capture(lm.base_model, [Hookpoint("it", write.module, write.module)], tokens).values()
        out = run.coder(y)
        metrics.update(targets.add(y), out.y_hat, out.values, out.indices)
    found = metrics.result()
    parts = {
        "sae": [Part(write, write, lambda x: run.coder(x).y_hat)],
        "zero": [Part(write, write, ablation(torch.zeros(run.coder.d_out)))],
    }
    losses = token_losses(lm, tokens_BT, BATCH, parts)
    ce = {key: float(value.ce_BT.mean()) for key, value in losses.items()}
    kl = {key: float(value.kl_BT.mean()) for key, value in losses.items()}
    return {
        "kl_div_score": 1 - kl["sae"] / kl["zero"], "kl_div_with_ablation": kl["zero"], "kl_div_with_sae": kl["sae"],
        "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce[None]), "ce_loss_with_ablation": ce["zero"],
        "ce_loss_with_sae": ce["sae"], "ce_loss_without_sae": ce[None], "cossim": found["cosine"],
        **{key: found[key] for key in ("explained_variance", "explained_variance_legacy", "mse", "l2_norm_in")},
        **{key: found[key] for key in ("l2_norm_out", "l2_ratio", "relative_reconstruction_bias", "l0", "l1")},
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals

    run = Run.open(args.run)
    store = ActivationStore.open(run.store_path)
    evaluator = Evaluator(store, args.rows * store.context, BATCH, "cpu")
    lm = evaluator.model.float()
    tokens_BT = evaluator.tokens_BT
    model = hooked(lm)
    with torch.no_grad():
        gap = (model(tokens_BT[:1]) - lm(tokens_BT[:1]).logits).abs().max()
    print(f"largest difference of the two models' logits: {gap:.1e}")
    layer = int(run.write_site.module.split(".")[1])
    sae = SaeBenchSAE(run.coder, store.attrs["model"]["name"], f"blocks.{layer}.hook_mlp_out", layer)
    batches = len(tokens_BT) // BATCH
    config = CoreEvalConfig(
        model_name=store.attrs["model"]["name"], batch_size_prompts=BATCH, n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches, compute_kl=True, compute_ce_loss=True, compute_l2_norms=True,
        compute_sparsity_metrics=True, compute_variance_metrics=True, context_size=store.context,
    )  # fmt: skip
    with torch.no_grad():
        theirs, _ = run_evals(sae, Rows(tokens_BT), model, config)
    flat = {key: float(value) for part in theirs.values() for key, value in part.items()}
    mine = ours(lm, run, tokens_BT[: batches * BATCH])
    print(f"{'':32} {'sae-bench':>12} {'ours':>12} {'relative':>10}")
    worst = 0.0
    for key, value in mine.items():
        relative = abs(value - flat[key]) / max(abs(flat[key]), 1e-12)
        note = WRONG.get(key, "")
        worst = max(worst, 0 if note else relative)
        print(f"{key:32} {flat[key]:12.6f} {value:12.6f} {relative:10.1e}  {note}")
    print(f"largest relative difference where theirs is right: {worst:.1e}")
    if args.json:
        args.json.write_text(json.dumps({key: [flat[key], mine[key]] for key in mine}, indent=2))


if __name__ == "__main__":
    main()

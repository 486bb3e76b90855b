"""circuit-tracer's own attribution of a case of test_circuit_tracer.py, in an environment that has it:

    python in_circuit_tracer.py FOLDER [LATENTS]

FOLDER/model is a transformers model with its tokenizer, FOLDER/coders transcoders, FOLDER/ids.json the prompt's tokens.
Writes FOLDER/theirs.npz, and says how long the attribution took; LATENTS: to follow at most.
"""

import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import yaml
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.frontend.graph_models import Model
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.utils.hf_utils import load_transcoders
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, cpu = Path(sys.argv[1]), torch.device("cpu")
config = yaml.safe_load((folder / "coders" / "config.yaml").read_text())
count = len(list((folder / "coders").glob("layer_*.safetensors")))
files = [str(folder / "coders" / f"layer_{i}.safetensors") for i in range(count)]
transcoders = load_transcoders(
    config | {"transcoders": files, "repo_id": "", "scan": "case"}, device=cpu, lazy_decoder=False
)
if transcoders.skip_connection:
    # At the first position it takes latents and errors to be nothing, but lets skips act. Ours leaves MLPs there as
    # they are, skips too, so they are switched off here.
    skip = transcoders.compute_skip
    transcoders.compute_skip = lambda layer, x: torch.cat([0 * x[:, :1], skip(layer, x)[:, 1:]], 1)
with patch("transformer_lens.loading_from_pretrained.get_official_model_name", str):  # it knows no local folders
    model = ReplacementModel.from_pretrained_and_transcoders(
        str(folder / "model"),
        transcoders,
        tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
        device=cpu,
        dtype=torch.float32,
        hf_model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
    )
ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
most = int(sys.argv[2]) if len(sys.argv) > 2 else None
begun = time.perf_counter()
graph = attribute(ids, model, max_n_logits=10, desired_logit_prob=0.95, batch_size=64, max_feature_nodes=most)
print(f"attribution took {time.perf_counter() - begun:.3f} s")
assert graph.input_tokens.tolist() == ids.tolist()
if (folder / "graph.json").exists():
    Model.model_validate_json((folder / "graph.json").read_text())  # raises for a field of another type
pruned = prune_graph(graph, 0.8, 0.98)
np.savez(
    folder / "theirs.npz",
    latents=graph.active_features[graph.selected_features].numpy(),
    activations=graph.activation_values[graph.selected_features].numpy(),
    logits=graph.logit_token_ids.numpy(),
    edges=graph.adjacency_matrix.numpy(),
    scores=np.array([float(score) for score in compute_graph_scores(graph)]),
    kept=np.array([int(pruned.node_mask.sum()), int(pruned.edge_mask.sum())]),
)

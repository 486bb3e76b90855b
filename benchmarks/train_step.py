"""One whole training step on CPU, ours beside other libraries', interleaved in one run.

    python benchmarks/train_step.py --peers DIR --json OUT

Each contender is a process of its own that makes one step when asked; the parent asks them in turn, so that noise hits
all alike, and takes medians. A step is forward, loss, backward, clipping where the library clips, Adam, and the
library's bookkeeping of dead latents. SAELens and dictionary_learning have no transcoder: they train their SAE.

DIR holds what `pip install --no-deps --target` makes of each peer, so that nothing of theirs enters our environment:
    DIR/sparsify  eai-sparsify==1.3.3 einops natsort schedulefree simple-parsing docstring-parser accelerate
    DIR/saelens   sae-lens==6.54.12 einops jaxtyping wadler-lindig transformer-lens ... (see --help of pip)
    DIR/dl        dictionary-learning==0.1.0 einops
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

SHAPE = {"n": 4096, "d": 576, "m": 18432, "k": 32}
PEERS = {"sparsify": "sparsify", "saelens": "saelens", "dictionary_learning": "dl"}
CONTENDERS = ("gemm_bf16", "ours_float32", "ours_bfloat16", "ours_scout", *PEERS)


def pair(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same inputs and targets for everyone."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=g)
    return x, torch.relu(x @ torch.randn(d, d, generator=g) / d**0.5)


def gemm_bf16(n: int, d: int, m: int, k: int) -> Callable[[], float]:
    """The bare encoder GEMM, the part no exact encoder can leave out."""
    x, W = pair(n, d)[0].bfloat16(), torch.randn(m, d).bfloat16()
    return lambda: float((x @ W.T)[0, 0])


def ours(n: int, d: int, m: int, k: int, mode: str) -> Callable[[], float]:
    """A transcoder step of the trainer."""
    from skipcoder.pipeline.store.stats import Moments
    from skipcoder.trainer.config import CoderConfig, EncodeConfig, EncodeMode, Kind, TrainConfig
    from skipcoder.trainer.step.learner import Learner

    x, y = pair(n, d)
    cfg = TrainConfig(coder=CoderConfig(kind=Kind.transcoder, k=k, width=m), encode=EncodeConfig(mode=EncodeMode(mode)))
    learner = Learner(cfg, Moments.of(x), Moments.of(y), 1000, "cpu")
    return lambda: float(learner.step(x, y, n)["fvu"])


def sparsify(n: int, d: int, m: int, k: int) -> Callable[[], float]:
    """eai-sparsify's coder and Adam, as its trainer drives them for loss_fn=fvu."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton path has no CPU driver
    from sparsify import SparseCoder, SparseCoderConfig

    x, y = pair(n, d)
    coder = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k, transcode=True), "cpu", dtype=torch.float32)
    coder.b_dec.data = y.mean(0)
    optimiser = torch.optim.Adam(coder.parameters(), lr=2e-4 / (m / 2**14) ** 0.5)
    since_fired = torch.zeros(m, dtype=torch.long)

    def step() -> float:
        out = coder(x, y)
        fired = torch.zeros(m, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        since_fired.add_(n)
        since_fired[fired] = 0
        return float(out.fvu)

    return step


def saelens(n: int, d: int, m: int, k: int) -> Callable[[], float]:
    """SAELens' own trainer on its TopK SAE."""
    _stub("wandb", log=lambda *a, **k: None)
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x, _ = pair(n, d)
    cfg = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=10**9, device="cpu",
        autocast=False, lr=3e-4, lr_end=3e-5, lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9,
        adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=n, dead_feature_window=1000,
        feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=10,
    )  # fmt: skip
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=m, k=k))
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))

    def step() -> float:
        loss = trainer.step(x).loss.item()
        trainer.n_training_steps += 1
        return loss

    return step


def dictionary_learning(n: int, d: int, m: int, k: int) -> Callable[[], float]:
    """dictionary_learning's TopK trainer."""
    for name, attributes in {
        "nnsight": {"LanguageModel": object},
        "wandb": {},
        "circuitsvis": {},
        "umap": {"UMAP": object},
    }.items():
        _stub(name, **attributes)
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    trainer = TopKTrainer(
        steps=100_000, activation_dim=d, dict_size=m, k=k, layer=0, lm_name="none", dict_class=AutoEncoderTopK,
        lr=3e-4, warmup_steps=1, device="cpu", seed=0,
    )  # fmt: skip
    x, steps = pair(n, d)[0], iter(range(10**6))
    return lambda: float(trainer.update(next(steps), x))


def _stub(name: str, **attributes: object) -> None:
    """An empty module in the place of a tracker or tracer that the step does not use."""
    import types
    from importlib.machinery import ModuleSpec

    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(attributes)
    sys.modules.setdefault(name, module)


def serve(contender: str, shape: dict[str, int], threads: int) -> None:
    """A contender's process: one step for every line on stdin; its seconds and loss on stdout."""
    torch.set_num_threads(threads)
    if contender.startswith("ours_"):
        step = ours(**shape, mode=contender.removeprefix("ours_"))
    else:
        step = globals()[contender](**shape)
    for _ in sys.stdin:
        begun = time.perf_counter()
        loss = step()
        print(f"RESULT {time.perf_counter() - begun} {loss}", flush=True)


def start(contender: str, peers: Path | None, threads: int, shape: dict[str, int]) -> subprocess.Popen[str]:
    """Start a contender; a peer finds its own packages first."""
    environment = dict(os.environ)
    if contender in PEERS:
        assert peers is not None
        environment["PYTHONPATH"] = str((peers / PEERS[contender]).resolve())
    command = [sys.executable, __file__, "--serve", contender, "--threads", str(threads), "--shape", json.dumps(shape)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(process: subprocess.Popen[str]) -> list[float]:
    """Seconds of one step, its loss, and what else the process says of it."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("RESULT"):
            return [float(number) for number in line.split()[1:]]
    raise RuntimeError("a contender died")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="where the peers are installed; without it only ours are timed")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", type=json.loads, default=SHAPE)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.shape, args.threads)
        return
    names = [c for c in CONTENDERS if c not in PEERS or (args.peers and (args.peers / PEERS[c]).is_dir())]
    processes = {name: start(name, args.peers, args.threads, args.shape) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(args.rounds + 2):  # two rounds warm up
        for name in names:
            took = ask(processes[name])[0]
            if i >= 2:
                seconds[name].append(took)
    for process in processes.values():
        process.kill()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    against = ("ours_scout", "ours_bfloat16", "ours_float32", "gemm_bf16")
    print(f"{'contender':22}{'median s':>10}" + "".join(f"{'/ ' + name:>16}" for name in against))
    for name, value in median.items():
        print(f"{name:22}{value:10.3f}" + "".join(f"{value / median[other]:16.2f}" for other in against))
    if args.json:
        facts = {
            "shape": args.shape,
            "threads": args.threads,
            "seconds": seconds,
            "median": median,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": _cpu(),
            "skipcoder": importlib.metadata.version("skipcoder"),
        }
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()

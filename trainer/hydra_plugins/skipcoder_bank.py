"""Hydra's launcher `bank`: the jobs of a sweep that read the same stream are trained together, in one pass.

Every Hydra application in this environment imports this module, so it imports nothing heavy; the work is done in
`skipcoder.trainer.bank.sweep`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from skipcoder.settings import typed


@dataclass
class BankLauncherConf:
    """The `hydra.launcher.*` settings of a sweep."""

    _target_: str = "hydra_plugins.skipcoder_bank.BankLauncher"
    ray: bool | None = None
    """Whether to run banks as Ray tasks; null: if there are several GPUs, or an address."""
    address: str | None = None
    """An existing Ray cluster (`auto` or an address); null: start one of our own."""
    memory_gib: float | None = None
    """Memory that one bank may use; null: what is free on the device."""
    gpus_per_coder: int | None = None
    """GPUs that train one coder together, each with a Ray task; null: train.shards. More share the tokens."""


ConfigStore.instance().store(group="hydra/launcher", name="bank", node=BankLauncherConf, provider="skipcoder")


class BankLauncher(Launcher):
    """Gives each job its own folder and configuration, as any launcher does, but trains all jobs together."""

    def __init__(
        self, ray: bool | None, address: str | None, memory_gib: float | None, gpus_per_coder: int | None
    ) -> None:
        self.ray, self.address, self.memory_gib, self.gpus_per_coder = ray, address, memory_gib, gpus_per_coder

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `launch` needs; Hydra calls this first."""
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Record each job's configuration, train all, and return their validation FVUs (for sweepers that optimise;
        of a set of coders the mean)."""
        setup_globals()
        from skipcoder.trainer.bank.bank import Job
        from skipcoder.trainer.bank.plan import Settings
        from skipcoder.trainer.bank.sweep import Failure, report, report_failures, run_sweep, spread
        from skipcoder.trainer.config import TrainConfig
        from skipcoder.trainer.run.build import check

        sets: list[list[Job]] = []  # of each job of Hydra's

        def record(cfg: DictConfig) -> None:
            config = typed(cfg, TrainConfig)
            check(config)
            sets.append(spread(Job(config, Path(HydraConfig.get().runtime.output_dir))))

        returns = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = str(number), number
            one = run_job(
                hydra_context=self.context, task_function=record, config=config, job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir", configure_logging=False,
            )  # fmt: skip
            if one.status is JobStatus.FAILED:  # before anything is trained
                report_failures([Failure(" ".join(overrides), one._return_value, "")])
            returns.append(one)
        settings = Settings(self.ray, self.address, self.memory_gib, self.gpus_per_coder)
        outcomes = run_sweep([job for jobs in sets for job in jobs], settings)
        report(outcomes)
        found = {o.directory: o.summary.get("validation_fvu") for o in outcomes if o.summary is not None}
        for one, jobs in zip(returns, sets, strict=True):
            fvus = [fvu for _, directory in jobs if (fvu := found[directory]) is not None]
            one.return_value = sum(fvus) / len(fvus) if fvus else None
            one.status = JobStatus.COMPLETED
        return returns

"""A bank: any number of coders on one stream of batches. Each batch is read, decoded and moved once.

Coders of different hookpoints may share a stream, which then reads what any of them needs; each looks at its own.
A member takes the batches that it would take alone, in the same order, and shares nothing else with the others, so its
result is the same to the bit. Members may be at different steps (one was added later, another interrupted earlier): the
stream begins at the step of the member furthest behind, and the others wait for their next batch.
"""

import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from skipcoder.errors import UserError
from skipcoder.files import explained
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import memory
from skipcoder.trainer.bank.live_table import live_table
from skipcoder.trainer.bank.member import Member
from skipcoder.trainer.config import TrainConfig
from skipcoder.trainer.data.batch import Batch, Column
from skipcoder.trainer.data.ranks import Ranks
from skipcoder.trainer.data.stream import ActivationStream, Position
from skipcoder.trainer.run.build import check, hookpoints, make_stream, open_store, token_filter, used
from skipcoder.trainer.run.device import pick_device
from skipcoder.trainer.run.run import Summary


class Job(NamedTuple):
    """A coder to train, and the directory of its run."""

    cfg: TrainConfig
    directory: Path


class Outcome(NamedTuple):
    """What became of one run."""

    directory: Path
    summary: Summary | None
    """None if the run failed."""
    error: Exception | None = None
    trace: str = ""
    """The traceback of an unforeseen error."""


def train(cfg: TrainConfig, directory: Path) -> Summary:
    """Train one coder and return its summary; a finished run returns its summary at once."""
    (outcome,) = train_bank([(cfg, directory)])
    if outcome.error is not None:
        if outcome.trace:
            outcome.error.add_note(outcome.trace)
        raise outcome.error
    assert outcome.summary is not None
    return outcome.summary


def stream_key(cfg: TrainConfig, names: Sequence[str]) -> tuple[Any, ...]:
    """Return what the members of a bank must have in common; `names`: of the coder's hookpoints. They may differ where
    neither the number of chunks that are shuffled together nor the tokens that are left out depend on them."""
    stream = str(vars(cfg.stream))
    loop = cfg.train
    machine = loop.device, loop.threads, loop.shards
    free = cfg.stream.pool_chunks is not None and cfg.stream.max_norm is None
    place = cfg.store.path, cfg.store.other, None if free else tuple(names)
    return *place, loop.batch_tokens, loop.eval_tokens, stream, machine


def train_bank(jobs: Sequence[tuple[TrainConfig, Path]]) -> list[Outcome]:
    """Train all jobs, which share a stream, to the end. A job that fails is dropped; the others go on.

    After an interruption every member can be resumed.
    """
    refuse_shared_directories(jobs)
    outcomes: dict[Path, Outcome] = {}
    waiting: list[Member] = []
    store: ActivationStore | None = None
    for cfg, directory in jobs:
        with _failing(outcomes, directory):
            check(cfg)
            store = open_store(cfg) if store is None else store
            cfg.store.path = str(store.place)
            hookpoints(cfg, store)
            member = Member(cfg, directory)
            if member.summary is not None:
                print(f"{directory}: finished before, nothing to do")
                outcomes[directory] = Outcome(directory, member.summary)
            else:
                waiting.append(member)
    if waiting and store is not None:
        assert len({stream_key(member.cfg, hookpoints(member.cfg, store)) for member in waiting}) == 1
        open_ends = [member.directory for member in waiting]
        try:
            with _failing(outcomes, *open_ends):
                _train(waiting, store, outcomes)
        finally:  # also after an interruption
            for member in waiting:
                member.release()
    return [outcomes[directory] for _, directory in jobs]


def refuse_shared_directories(jobs: Sequence[tuple[TrainConfig, Path]]) -> None:
    """Raise UserError if two jobs would write into one directory."""
    places = [directory.resolve() for _, directory in jobs]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{places.count(place)} jobs would write to {place}; let hydra.sweep.subdir differ by job")


def _train(members: list[Member], store: ActivationStore, outcomes: dict[Path, Outcome]) -> None:
    cfg = members[0].cfg
    ranks = Ranks.join(cfg.train.shards)
    device = pick_device(cfg.train.device)
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    every = store.rows * store.context
    with ranks.together():
        if ranks.is_main:  # finds what is too long, and keeps it for the others
            long = token_filter(cfg, store).long
            if long is not None:
                print(f"stream.max_norm={cfg.stream.max_norm:g} leaves out {len(long):,} of {every:,} tokens")
    of_member = [(member.cfg, hookpoints(member.cfg, store)) for member in members]
    names = list(dict.fromkeys(name for _, some in of_member for name in some))
    columns = {column for one in of_member for column in used(*one)}
    stream = make_stream(cfg, store, device, ranks, names, columns)
    positions: dict[int, Position | None] = {}
    for member in members:
        with _failing(outcomes, member.directory):
            check(member.cfg, ranks.size)
            with ranks.together():
                one = memory.refuse_too_large(member.cfg, store, memory.free_bytes(device), device)
            if member.cfg.coder.over_layers:
                print(f"{member.directory}: {memory.decoders(member.cfg, store, one)}")
            position = member.start(store, stream, device, ranks)
            positions[member.learner.step_number] = position
    if not positions:
        return
    begin = min(positions)
    stream.load_state_dict(positions[begin] or stream.beginning())
    begun = [member for member in members if member.directory not in outcomes]
    for member in begun:
        member.bank_coders = len(begun)
    by_hookpoints = {tuple(member.hookpoints): member for member in begun}
    held_out = {names: _held_out(member, store, device, columns) for names, member in by_hookpoints.items()}
    _loop(begun, begin, stream, held_out, outcomes, ranks)


def _loop(
    members: list[Member],
    step: int,
    stream: ActivationStream,
    held_out: Mapping[tuple[str, ...], Batch | None],
    outcomes: dict[Path, Outcome],
    ranks: Ranks,
) -> None:
    """Take batches until every member has made all of its steps."""
    table = live_table(members, outcomes) if ranks.is_main else nullcontext(lambda: None)
    with table as show, closing(iter(stream)) as batches, _stopping() as asked_to_stop:
        members = _unfinished(members, outcomes)
        while members:
            begun = time.perf_counter()
            batch = next(batches)
            read_ms = 1e3 * (time.perf_counter() - begun)
            taking = [member for member in members if member.learner.step_number == step]
            step += 1
            for member in taking:
                with _failing(outcomes, member.directory, alone=ranks.size == 1):
                    member.step(batch, read_ms, held_out[tuple(member.hookpoints)])
            stopping = ranks.any(asked_to_stop())
            for member in taking:
                if member.directory in outcomes:
                    continue
                if member.finished or stopping or step % member.cfg.train.save_every == 0:
                    with _failing(outcomes, member.directory):
                        member.save(stream.state_dict())
            if stopping:
                raise KeyboardInterrupt
            members = _unfinished(members, outcomes)
            show()


def _unfinished(members: list[Member], outcomes: dict[Path, Outcome]) -> list[Member]:
    """Return the members still in training; write the summaries of those that have finished."""
    for member in members:
        if member.directory not in outcomes and member.finished:
            with _failing(outcomes, member.directory):
                outcomes[member.directory] = Outcome(member.directory, member.finish())
        if member.directory in outcomes:
            member.release(finished=outcomes[member.directory].error is None)
    return [member for member in members if member.directory not in outcomes]


def _held_out(member: Member, store: ActivationStore, device: str, columns: Collection[Column]) -> Batch | None:
    """Return the first eval_tokens validation tokens in a fixed order, with the member's hookpoints."""
    cfg, names, tokens = member.cfg, member.hookpoints, member.cfg.train.eval_tokens
    if not tokens:
        return None
    kept = token_filter(cfg, store)
    stream = ActivationStream(
        store, names, tokens, split="validation", filter=kept, epochs=1, device=device, columns=columns
    )
    return next(iter(stream), None)


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Delay Ctrl-C, SIGTERM and SIGHUP (a lost connection) to the end of a step, so that what is saved is whole; a
    second Ctrl-C acts at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # cannot handle signals
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _failing(outcomes: dict[Path, Outcome], *directories: Path, alone: bool = True) -> Iterator[None]:
    """Make an exception the outcome of these runs (where they have none yet) rather than the end of the others; unless
    `alone`, only one that all processes raise."""
    try:
        yield
    except Exception as error:
        if not alone and not isinstance(error, UserError):
            raise
        fault: Exception = error
        if isinstance(error, OSError) and (message := explained(error)) is not None:
            fault = UserError(message)
        trace = "" if isinstance(fault, UserError) else traceback.format_exc()
        # Tracebacks hold frames, and frames hold the tensors of the whole bank.
        fault = fault.with_traceback(None)
        fault.__context__ = fault.__cause__ = None
        for directory in directories:
            outcomes.setdefault(directory, Outcome(directory, None, fault, trace))

"""The whole command against judges whose answers are known, on latents whose meaning is known."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from skipcoder.errors import UserError
from skipcoder.evals.config import ExamplesConfig, InterpretConfig, JudgeConfig, Scorer
from skipcoder.evals.explain import simulation
from skipcoder.evals.explain.intervention import Steering
from skipcoder.evals.explain.scores import over_latents
from skipcoder.evals.export.export import export
from skipcoder.evals.interpret import interpret
from skipcoder.evals.latents.examples import ExampleMaker
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.formats.config import ExportConfig, Target
from skipcoder.trainer.run.run import Run
from tests.evals.explain.conftest import LATENTS, frequent_words
from tests.evals.explain.judging import Oracle
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow

RARE = 10
EXAMPLES = ExamplesConfig(window=8, train=4, test=5)


def teach(oracle: Oracle, run: Path, store: ActivationStore) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(store.attrs["model"]["id"])
    strings = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in range(400)]
    planted = {strings[word].strip(): word for word in frequent_words(LatentIndex(Run.open(run), store))}
    for window in ExampleMaker(LatentIndex(Run.open(run), store), EXAMPLES).tokens_WT:
        # A planted latent is one token: the same letters in another token are another matter.
        tokens, text = {int(t) for t in window}, tokenizer.decode(window.tolist())
        held = {word for word, token in planted.items() if token in tokens}
        held |= {
            word
            for long in re.findall(r"[^\W_]{4,}", text)
            for word in (long, long.lower(), long.upper(), long.title())
        }
        oracle.holds[text.replace("<<", "\u2039\u2039").replace(">>", "\u203a\u203a")] = held


def asked(run: Path, url: str, **more: Any) -> InterpretConfig:
    judge = JudgeConfig(base_url=url, model="oracle", timeout=1.0, attempts=8, price_in=1.0, price_out=10.0)
    return InterpretConfig(
        run=str(run), which=[*range(LATENTS), RARE], examples=EXAMPLES, judge=judge, pages=False, **more
    )


def outcome(run: Path) -> dict[str, Any]:
    return json.loads((run / "interpretation" / "summary.json").read_text())


@pytest.fixture
def fresh(planted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(planted, tmp_path / "run"))


@pytest.mark.parametrize(("mood", "accuracy", "auroc"), [("honest", 1, 1), ("inverted", 0, 0), ("constant", 0.5, 0.5)])
def test_oracles_score_what_they_must(
    fresh: Path, store: ActivationStore, mood: str, accuracy: float, auroc: float, capsys: pytest.CaptureFixture
) -> None:
    oracle = Oracle(mood)
    teach(oracle, fresh, store)
    with oracle.serving() as url:
        interpret(asked(fresh, url))
    found = outcome(fresh)
    for scorer in ("detection", "fuzzing"):
        assert found[scorer]["balanced_accuracy"] == accuracy
        assert found[scorer]["auroc"] == auroc
        assert found[scorer]["latents"] == LATENTS and found[scorer]["failed"] == 0
        assert found[scorer]["balanced_accuracy_ci"] is None  # of fewer than 20 latents
    assert found["calibration"]["balanced_accuracy"] == accuracy
    assert found["calibration"]["usable"] == (mood == "honest")
    assert ("unusable" in capsys.readouterr().out) == (mood != "honest")
    if mood == "honest":  # another latent's explanation is worth little
        assert found["shuffled_explanations"]["balanced_accuracy"] < 0.8
    assert found["latents"] == LATENTS + 1 and found["too_few_examples"] == 1
    record = json.loads((fresh / "interpretation" / "latents" / f"{RARE:08d}.json").read_text())
    assert record["explanation"] is None and "different windows; 9 are needed" in record["problem"]


def test_explanations_name_the_planted_words(fresh: Path, store: ActivationStore) -> None:
    oracle = Oracle()
    teach(oracle, fresh, store)
    with oracle.serving() as url:
        interpret(asked(fresh, url))
    tokenizer: Any = AutoTokenizer.from_pretrained(store.attrs["model"]["id"])
    for latent, word in enumerate(frequent_words(LatentIndex(Run.open(fresh), store))):
        record = json.loads((fresh / "interpretation" / "latents" / f"{latent:08d}.json").read_text())
        assert record["explanation"] == f"The word {tokenizer.decode([word]).strip()!r}."


def test_a_server_in_trouble_changes_no_score_and_a_second_run_asks_nothing(
    fresh: Path, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    oracle = Oracle(faults=0.4)
    teach(oracle, fresh, store)
    with oracle.serving() as url:
        interpret(asked(fresh, url))
        found, requests = outcome(fresh), oracle.requests.copy()
        assert all(requests[fault] > 1 for fault in Oracle.FAULTS)
        assert found["use"]["retries"] > 5 and found["use"]["unreadable"] > 2
        for scorer in ("detection", "fuzzing"):
            score = found[scorer]
            assert score["balanced_accuracy"] == 1
            # What got no answer in the end is counted, and nothing else is.
            answered = sum(
                json.loads(file.read_text())["scores"][scorer]["n"]
                for file in (fresh / "interpretation" / "latents").glob("*.json")
                if json.loads(file.read_text())["scores"]
            )
            assert answered + score["failed"] == 10 * found["explained"]
        oracle.faults = 0
        interpret(asked(fresh, url))  # asks again what failed, and nothing else
        assert outcome(fresh)["use"]["failures"] == 0
        assert outcome(fresh)["explained"] == LATENTS and outcome(fresh)["detection"]["failed"] == 0
        before = oracle.requests["all"]
        interpret(asked(fresh, url))
        assert oracle.requests["all"] == before and outcome(fresh)["use"]["requests"] == 0
    assert oracle.keys == {"Bearer secret-key"}
    for file in [*fresh.rglob("*.json"), fresh.parent / "judge.sqlite"]:
        assert b"secret-key" not in file.read_bytes()


def test_a_key_that_a_server_repeats_is_not_repeated(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Echo(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(401)
            self.end_headers()
            self.wfile.write(f"{'x' * 185} {self.headers['Authorization']} is no key".encode())

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=r"does not answer: HTTP 401: x+ Bearer") as caught:
            interpret(asked(fresh, f"http://127.0.0.1:{server.server_port}/v1"))
        server.shutdown()
    assert "sec" not in str(caught.value)


def test_servers_without_schemas_or_probabilities(fresh: Path, store: ActivationStore) -> None:
    oracle = Oracle(logprobs=False, schemas=False)
    teach(oracle, fresh, store)
    with oracle.serving() as url:
        interpret(asked(fresh, url))
    found = outcome(fresh)
    assert found["detection"]["balanced_accuracy"] == 1 and found["detection"]["auroc"] is None
    assert found["use"]["failures"] == 0
    use = found["use"]
    assert use["cost"] == pytest.approx((use["prompt_tokens"] * 1.0 + use["completion_tokens"] * 10.0) / 1e6)


def test_pages_without_a_judge_and_delphis_form(store: ActivationStore, tmp_path: Path) -> None:
    """delphi's files hold every firing once, in the order of the text, and tile the latents."""
    training.train(config(store), tmp_path / "run")
    interpret(InterpretConfig(run=str(tmp_path / "run"), examples=EXAMPLES))
    assert (tmp_path / "run" / "features" / "index.html").exists()
    index = LatentIndex(Run.open(tmp_path / "run"), store)
    run = ExportConfig(run=str(tmp_path / "run"), format=Target.delphi, out=str(tmp_path / "delphi"))
    folder = export(run, [tmp_path / "run"]) / "layers.1.mlp"
    files = sorted(folder.glob("*.safetensors"), key=lambda file: int(file.stem.split("_")[0]))
    ends = [tuple(map(int, file.stem.split("_"))) for file in files]
    assert ends[0][0] == 0 and ends[-1][1] == 63 and all(a[1] + 1 == b[0] for a, b in pairwise(ends)) and len(ends) == 5
    for file, (first, last) in zip(files, ends, strict=True):
        content = load_file(file)
        assert content["locations"].dtype == np.uint16 and content["activations"].dtype == np.float16
        assert (content["tokens"] == index.tokens).all() and content["tokens"].dtype == np.int64
        for latent in range(first, last + 1):
            mine = content["locations"][:, 2] == latent - first
            place = content["locations"][mine].astype(np.int64)
            assert (place[:, 0] * store.context + place[:, 1] == index.of(latent).position).all()
            assert (content["activations"][mine] == index.of(latent).value.astype(np.float16)).all()
    described = json.loads((folder / "config.json").read_text())
    assert described["cache_ctx_len"] == store.context and described["n_splits"] == 5


def test_embeddings_of_an_oracle_rank_the_windows(fresh: Path, store: ActivationStore) -> None:
    oracle = Oracle()
    teach(oracle, fresh, store)
    with oracle.serving() as url:
        interpret(asked(fresh, url, scorers=[Scorer.embedding]))
        found = outcome(fresh)
        assert found["embedding"]["auroc"] == 1 and found["embedding"]["balanced_accuracy"] is None
        before = oracle.requests["all"]
        interpret(asked(fresh, url, scorers=[Scorer.embedding]))
        assert oracle.requests["all"] == before


def test_simulation_reads_what_the_judge_would_have_said(fresh: Path, store: ActivationStore) -> None:
    oracle = Oracle()
    teach(oracle, fresh, store)
    with oracle.serving() as url:
        interpret(asked(fresh, url, scorers=[Scorer.simulation]))
    found = outcome(fresh)["simulation"]
    assert found["latents"] == LATENTS and found["failed"] == 0
    assert found["correlation"] > 0.8  # activations are 1 to 7 where the oracle always says 8
    oracle.logprobs = False  # as most servers: nothing is scored, and that is said
    with oracle.serving() as url:
        interpret(asked(fresh, url, scorers=[Scorer.simulation]))
    found = outcome(fresh)
    assert found["simulation"]["correlation"] is None and found["simulation"]["failed"] == 10 * LATENTS
    assert found["problems"] == {"the server gives no log-probabilities of prompts": 10 * LATENTS}


def test_steered_continuations_are_told_from_plain_ones(fresh: Path, store: ActivationStore, lm: Any) -> None:
    """Decoder rows that raise one token's logit: the oracle looks for that token. The strength is the same in nats for
    rows of any length, and nothing changes before the prompt's end."""
    run = Run.open(fresh)
    tokenizer: Any = AutoTokenizer.from_pretrained(store.attrs["model"]["id"])
    unembed = lm.get_output_embeddings().weight.float() * lm.base_model.norm.weight.float()
    run.coder.W_dec[:] = 100 * unembed[300]
    run.coder.save(fresh / "checkpoint")
    index = LatentIndex(Run.open(fresh), store)
    (index.folder / "identity.json").write_text(json.dumps(index.identity()))
    oracle = Oracle()
    teach(oracle, fresh, store)
    oracle.pushed = tokenizer.decode([300])
    with oracle.serving() as url:
        interpret(asked(fresh, url, scorers=[Scorer.intervention]))
    found = outcome(fresh)["intervention"]
    assert found["latents"] == LATENTS and found["failed"] == 0 and found["balanced_accuracy"] > 0.8
    steering = Steering(lm, index.run)
    prompts = [[5, 9, 30, 77], [8, 3, 99, 12, 61, 7]]
    short, long = (steering.strength(prompts, factor * unembed[300]) * factor for factor in (0.1, 10.0))
    assert short == pytest.approx(long, rel=0.2)
    plain, steered = (steering._next(prompts, vector).log_softmax(-1) for vector in (None, long * unembed[300]))
    assert float((plain.exp() * (plain - steered)).sum(-1).mean()) == pytest.approx(0.5, rel=0.15)
    assert steering.continued(prompts, 0 * unembed[300]) == steering.continued(prompts, None)


def test_guesses_are_means_over_what_the_judge_weighs() -> None:
    tab = {"1": {"decoded_token": "\t", "logprob": 0.0}}
    half = {str(i): {"decoded_token": t, "logprob": float(np.log(0.5))} for i, t in enumerate(("unknown", " 10", "4"))}
    none = {"1": {"decoded_token": "unknown", "logprob": 0.0}}
    assert simulation.guesses([None, tab, half, tab, none], 2) == [7.0, 0.0]
    assert simulation.guesses([None, tab, half], 2) is None
    line = simulation.prompt("x", ["a\n", "b"]).splitlines()[-2:]
    assert line == ["a\\n\tunknown", "b\tunknown"]


def test_no_server(fresh: Path) -> None:
    cfg = asked(fresh, "http://127.0.0.1:9/v1")
    cfg.judge.attempts = 1
    with pytest.raises(UserError, match=r"the judge at http://127.0.0.1:9/v1 does not answer: ConnectError"):
        interpret(cfg)


def test_means_over_latents_have_intervals_from_twenty_on() -> None:
    scores = [{"failed": 0, "balanced_accuracy": 0.5 + 0.01 * i, "f1": None, "auroc": None} for i in range(25)]
    found, few = over_latents(scores), over_latents(scores[:19])
    assert found["balanced_accuracy"] == pytest.approx(0.62)
    # t(0.975, 24) = 2.0639, and the deviation of 0 to 24 is 7.3598
    half = 2.0639 * 0.073598 / 5
    assert found["balanced_accuracy_ci"] == pytest.approx([0.62 - half, 0.62 + half], abs=1e-5)
    assert few["balanced_accuracy_ci"] is None and few["balanced_accuracy_latents"] == 19
    assert found["f1"] is None and found["f1_ci"] is None

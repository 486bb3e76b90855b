"""What the report's figures draw."""

import itertools
import json
import math

from skipcoder.evals.tables import figures, report


def test_figures_show_the_l0_that_was_measured() -> None:
    rows = [
        {"kind": "transcoder", "width": 64, "k": k, "l0": l0, "fvu": fvu}
        for k, l0, fvu in ((16, 17.3, 0.2), (8, 8.0, 0.3))
    ]
    (line,) = figures.against_l0(rows, "fvu")["data"]
    assert (line["x"], line["y"]) == ([8.0, 17.3], [0.3, 0.2])


def test_what_no_line_may_join_is_not_joined() -> None:
    rows = [
        {"kind": "sae", "width": 64, "k": k, "l0": k, "fvu": 0.1, "train_tokens": tokens, "configuration": f"{k}{rate}"}
        for k, tokens, rate in ((8, 100, 1), (16, 100, 1), (8, 200, 1), (16, 200, 1))
    ]
    one, two = figures.against_l0(rows, "fvu")["data"]
    assert (one["name"], two["name"]) == ("sae 100 tokens", "sae 200 tokens") and len(one["x"]) == 2
    rows = [row | {"train_tokens": 100, "configuration": i} for i, row in enumerate(rows)]  # differ in a rate, say
    assert len(figures.against_l0(rows, "fvu")["data"]) == 4


def test_numbers_that_json_lacks_leave_the_page_whole() -> None:
    found = report._finite([{"y": [math.nan, 1.0, (math.inf, 2)]}])
    assert json.dumps(found, allow_nan=False) and found == [{"y": [None, 1.0, [None, 2]]}]


def test_no_two_lines_look_alike() -> None:
    """By name, and by colour and dashes, whatever it is that differs."""
    choices = {
        "kind": ("transcoder", "sae"), "k": (16, 32), "width": (64, 128), "activation": ("topk", "batchtopk"),
        "hookpoint": ("layers.1.mlp", "layers.2.mlp"), "seed": (0, 1),
    }  # fmt: skip
    every = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    for rows in (every, every[:1], [every[0] | {"run": f"sweep/{i}", "k": 16} for i in range(2)]):
        looks = figures.looks(rows)
        assert len({look["name"] for look in looks}) == len(rows)
    seen = {(look["line"]["color"], look["line"]["dash"]) for look in figures.looks(every)}
    assert len(seen) == len(every)
    assert figures.looks(every)[-1]["name"] == "sae k=32 width 128 batchtopk layers.2.mlp seed 1"
    assert figures.looks(every[:2])[0]["name"] == "transcoder seed 0"  # only what differs

"""Training runs and plans over HTTP: what is told of them, and what hostile folders and names come to."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from consilium.config import io
from consilium.config.attention import GQA
from consilium.recipes.catalogue import recipe
from consilium.records.loads import HEADER_FILE, LOADS_FILE
from consilium.records.metrics import METRICS_FILE
from consilium.records.run import SUMMARY_FILE
from consilium.serving.pages import Shown, page_app
from consilium.serving.watching import LARGEST
from report.run_folders import Kind, MakeRun, make_run
from serving.served import serving

__all__ = ["make_run"]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(page_app(Shown(runs=tmp_path, place=tmp_path)), raise_server_exceptions=False) as found:
        yield found


def said(client: TestClient, path: str, status: int = 400) -> str:
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def test_runs_are_listed_with_their_states(client: TestClient, make_run: MakeRun, tmp_path: Path) -> None:
    make_run("first", Kind())
    (tmp_path / "more").mkdir()
    make_run("more/second", Kind(ended=False))
    old = make_run("old", Kind(ended=False))
    for path in old.rglob("*"):
        os.utime(path, (1e9, 1e9))
    runs = client.get("/page/runs").json()["runs"]
    assert {(run["name"], run["state"]) for run in runs} == {
        ("first", "finished"),
        ("more/second", "running"),
        ("old", "stopped"),
    }
    assert runs[-1]["name"] == "old"
    assert {run["model"] for run in runs} == {"deepseek-v3:tiny"}


def test_a_run_is_told_in_pictures_and_sentences(client: TestClient, make_run: MakeRun) -> None:
    make_run("first", Kind(dead=(2,), bias=0.1))
    found = client.get("/page/runs/first").json()
    assert found["state"] == "finished"
    titles = [chart["title"] for chart in found["charts"]]
    assert {"training loss", "held-out bits per byte", "router entropy", "bias spread"} <= set(titles)
    assert "gradient norm" not in titles, "nobody recorded one"
    assert all(chart["svg"].startswith("<svg") for chart in found["charts"])
    assert [len(one["pictures"]) for one in found["loads"]] == [2]
    assert "2 of 8 experts are dead" in found["balance"][0]
    assert found["samples"][0]["prompt"] == "def f(x):"


def test_two_runs_lie_over_each_other(client: TestClient, make_run: MakeRun) -> None:
    make_run("first", Kind())
    make_run("second", Kind(ended=False))
    found = client.get("/page/runs/first", params={"beside": "second"}).json()
    loss = next(chart["svg"] for chart in found["charts"] if chart["title"] == "training loss")
    assert "first" in loss
    assert "second" in loss
    assert [one["run"] for one in found["loads"]] == ["first", "second"]


def test_nothing_is_sent_again_before_something_changed(client: TestClient, make_run: MakeRun) -> None:
    run = make_run("first", Kind(ended=False))
    mark = client.get("/page/runs/first").headers["etag"]
    same = client.get("/page/runs/first", headers={"If-None-Match": mark})
    assert (same.status_code, same.content) == (304, b"")
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 21, "tokens": 2100, "train/loss": 2.5}\n')
    grown = client.get("/page/runs/first", headers={"If-None-Match": mark})
    assert grown.status_code == 200
    assert grown.json()["state"] == "not finished, at step 21"


def test_a_line_that_is_half_written_is_left_out(client: TestClient, make_run: MakeRun) -> None:
    run = make_run("first", Kind(ended=False))
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 21, "tok')
    with (run / LOADS_FILE).open("ab") as file:
        file.write(b"\x15\0\0")
    found = client.get("/page/runs/first").json()
    assert found["state"] == "not finished, at step 20"
    assert found["alarms"] == [], "a line that is being written is no alarm"


def test_alarms_are_told_in_words(client: TestClient, make_run: MakeRun) -> None:
    run = make_run("first", Kind(ended=False))
    lines = [
        {"step": 21, "tokens": 1, "train/spike": 1, "train/loss": 9},
        {"step": 22, "tokens": 2, "train/loss": None, "moe/dropped_frac": 0.25},
    ]
    with (run / METRICS_FILE).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    spike, bad, dropped = client.get("/page/runs/first").json()["alarms"]
    assert "first in step 21" in spike
    assert "not a number at the end, first in step 22" in bad
    assert "25.0% of the copies" in dropped


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../first",
        "%2e%2e/first",
        "first%2f..",
        "/etc",
        "first%00",
        "first/checkpoints",
        "x" * 5000,
        "~",
        "",
    ],
)
def test_a_name_that_is_not_listed_is_never_a_path(name: str, make_run: MakeRun, tmp_path: Path) -> None:
    make_run("first", Kind())
    (tmp_path / "inside").mkdir()
    make_run("inside/own", Kind())
    with TestClient(page_app(Shown(runs=tmp_path / "inside"))) as client:
        assert client.get(f"/page/runs/{name}").status_code in {307, 404}
        assert client.get("/page/runs/own", params={"beside": "../first"}).status_code == 404


def test_a_link_out_of_the_folder_is_not_followed(make_run: MakeRun, tmp_path: Path) -> None:
    outside = make_run("outside", Kind())
    runs = tmp_path / "runs"
    (runs / "own").mkdir(parents=True)
    (runs / "own" / "config.yaml").write_text("steps: 1\n")
    (runs / "own" / METRICS_FILE).symlink_to(outside / METRICS_FILE)
    (runs / "linked").symlink_to(outside)
    with TestClient(page_app(Shown(runs=runs))) as client:
        assert [run["name"] for run in client.get("/page/runs").json()["runs"]] == ["own"]
        assert "leads out of" in said(client, "/page/runs/own")
        assert "no run" in said(client, "/page/runs/linked", 404)


def _cut(run: Path) -> None:
    text = (run / METRICS_FILE).read_text().splitlines(keepends=True)
    (run / METRICS_FILE).write_text("".join([*text[:3], "{not json}\n", *text[3:]]))


def _huge(run: Path) -> None:
    with (run / METRICS_FILE).open("ab") as file:
        file.truncate(LARGEST[METRICS_FILE] + 1)


def _pipe(run: Path) -> None:
    (run / METRICS_FILE).unlink()
    os.mkfifo(run / METRICS_FILE)


def _folder(run: Path) -> None:
    (run / METRICS_FILE).unlink()
    (run / METRICS_FILE).mkdir()


def _loop(run: Path) -> None:
    (run / METRICS_FILE).unlink()
    (run / METRICS_FILE).symlink_to(METRICS_FILE)


def _experts(run: Path) -> None:
    header = json.loads((run / HEADER_FILE).read_text()) | {"experts": 2**40}
    (run / HEADER_FILE).write_text(json.dumps(header))


def _header(run: Path) -> None:
    (run / HEADER_FILE).write_text("[" * 10_000)


def _summary(run: Path) -> None:
    (run / SUMMARY_FILE).write_bytes(b"\xff\xfe")


HARM = {
    _cut: "line 4 is not a record",
    _huge: "more than the 33,554,432 that are read here",
    _pipe: "no ordinary file",
    _folder: "no ordinary file",
    _loop: "cannot look at",
    _experts: "more than 131,072 experts",
    _header: "damaged",
    _summary: "damaged",
}


@pytest.mark.parametrize(("harm", "told"), HARM.items(), ids=[harm.__name__[1:] for harm in HARM])
def test_a_harmed_run_is_a_sentence_and_the_others_are_shown(
    harm: Callable[[Path], None], told: str, client: TestClient, make_run: MakeRun
) -> None:
    make_run("good", Kind())
    harm(make_run("harmed", Kind()))
    assert {run["name"] for run in client.get("/page/runs").json()["runs"]} == {"good", "harmed"}
    assert told in said(client, "/page/runs/harmed")
    assert client.get("/page/runs/good").status_code == 200


def test_text_of_a_run_cannot_be_markup(client: TestClient, make_run: MakeRun) -> None:
    run = make_run("<script>alert(1)</script>".replace("/", "_"), Kind(ended=False))
    line = {"step": 21, "tokens": 1, "val/bits_per_byte": 1.0, "val/bits_per_byte/<img src=x onerror=y>": 1.0}
    with (run / METRICS_FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")
    name = client.get("/page/runs").json()["runs"][0]["name"]
    make_run("other", Kind())
    found = client.get(f"/page/runs/{name}", params={"beside": "other"}).json()
    drawn = "".join(chart["svg"] for chart in found["charts"])
    assert "&lt;script&gt;" in drawn
    assert not re.search(r"<script|<img", drawn)


def test_a_folder_that_is_a_run_and_one_that_is_not_there(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("first", Kind())
    with TestClient(page_app(Shown(runs=run))) as client:
        assert [found["name"] for found in client.get("/page/runs").json()["runs"]] == ["first"]
        assert client.get("/page/runs/first").status_code == 200
    with TestClient(page_app(Shown(runs=tmp_path / "later"))) as client:
        assert client.get("/page/runs").json()["runs"] == []
    with TestClient(page_app(Shown())) as client:
        assert client.get("/page/runs").json() == {"folder": None, "runs": []}
        assert client.get("/page/about").json()["model"] is None


def test_a_key_opens_runs_and_plans_and_the_files_need_none() -> None:
    with serving(keys=("secret",)) as server, server.http() as client:
        for path in ("/page/about", "/page/runs", "/page/runs/first"):
            assert client.get(path).status_code == 401
        assert client.post("/page/plan", json={"model": "mixtral"}).status_code == 401
        assert client.get("/train.js").status_code == 200
        opened = client.get("/page/about", headers={"Authorization": "Bearer secret"}).json()
        assert opened["model"] == {"name": "small", "length": 2048}
        assert "deepseek-v3:671b" in opened["recipes"]


def planned(client: TestClient, **asked: Any) -> dict[str, Any]:
    answer = client.post("/page/plan", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_plan_is_the_planners(client: TestClient) -> None:
    found = planned(client, model="mixtral:8x7b", processes=8)
    assert found["plan"]["parameters"]["total"] == 46_702_792_704
    assert found["own"] == {"length": 32768, "experts": 8, "experts_per_token": 2}
    assert "All 8 experts" in found["sentence"]
    assert [table["title"] for table in found["tables"]][-1] == "sent between 8 processes"


def test_sliders_change_what_they_say(client: TestClient) -> None:
    asked = {"model": "mixtral:8x7b", "context": 1024}
    plain = planned(client, **asked)
    more = planned(client, **asked, experts=16)["plan"]["parameters"]
    assert more["active"] == pytest.approx(plain["plan"]["parameters"]["active"], rel=1e-4)
    assert more["total"] > 1.9 * plain["plan"]["parameters"]["total"]
    three = planned(client, **asked, experts_per_token=3)["plan"]["parameters"]
    assert three["total"] == plain["plan"]["parameters"]["total"]
    assert three["active"] > plain["plan"]["parameters"]["active"]
    small = planned(client, **asked, dtype="int4")
    assert small["serving"]["weight_bytes"] * 4 == plain["serving"]["weight_bytes"]
    many = planned(client, **asked, batch=64)
    assert many["serving"]["cache_bytes"] == 64 * plain["serving"]["cache_bytes"]
    assert plain["tokens_per_second"] < many["tokens_per_second"] < 64 * plain["tokens_per_second"]


def test_generating_reads_what_one_token_uses_and_its_cache(client: TestClient) -> None:
    """2 x 12.88 B less the rows of the input embedding that are not read, and 4 GiB of cache."""
    found = planned(client, model="mixtral:8x7b", gigabytes_per_second=100.0)
    read = 2 * found["plan"]["parameters"]["active_without_input_embedding"] + 32768 * 131_072
    assert found["tokens_per_second"] == pytest.approx(100e9 / read, rel=1e-3)


def test_layers_with_a_window_read_no_further(client: TestClient, tmp_path: Path) -> None:
    model = recipe("mixtral:tiny")
    assert isinstance(model.attention, GQA)
    near = dataclasses.replace(model, attention=dataclasses.replace(model.attention, window=16))
    (tmp_path / "near.yaml").write_text(io.to_yaml(near))
    (tmp_path / "far.yaml").write_text(io.to_yaml(model))
    speed = {
        (name, context): planned(client, model=name, context=context)["tokens_per_second"]
        for name in ("near.yaml", "far.yaml")
        for context in (16, 512)
    }
    assert speed["near.yaml", 16] == speed["near.yaml", 512] == speed["far.yaml", 16] > speed["far.yaml", 512]


def test_a_folder_below_is_planned(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.yaml").write_text(io.to_yaml(recipe("switch:tiny")))
    assert planned(client, model="own")["plan"] == planned(client, model="switch:tiny")["plan"]
    assert planned(client, model=f"{tmp_path}/own/config.yaml")["own"]["experts"] == 16


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"model": "mixtrall"}, "mixtral"),
        ({"model": "mixtral:9x9b"}, "8x7b"),
        ({"model": "../x"}, "lies outside"),
        ({"model": "/etc"}, "lies outside"),
        ({"model": "/etc/passwd"}, "lies outside"),
        ({"model": "out"}, "lies outside"),
        ({"model": "linked"}, "no ordinary file"),
        ({"model": "huge.yaml"}, "too many for a configuration"),
        ({"model": "layers.yaml"}, "less than or equal to 10000"),
        ({"model": "experts.yaml"}, "more than 65,536 experts"),
        ({"model": "depth.yaml"}, "more than 65,536 experts"),
        ({"model": "notes.txt"}, "is no model"),
        ({"model": "no/such"}, "there is no"),
        ({"model": "a\x00b"}, "there is no"),
        ({"model": ""}, "model"),
        ({"model": "mixtral", "context": 10**9}, "exceeds the model's length"),
        ({"model": "mixtral", "experts": 1}, "impossible"),
        ({"model": "mixtral", "experts_per_token": 1}, "gives the router no gradient"),
        ({"model": "mixtral", "experts": 8, "experts_per_token": 9}, "impossible"),
        ({"model": "deepseek-v3", "experts": 255}, "divisible"),
        ({"model": "mixtral", "experts": 10, "processes": 4}, "evenly"),
        ({"model": "mixtral", "batch": 0}, "batch"),
        ({"model": "mixtral", "dtype": "int2"}, "dtype"),
        ({"model": "expert-choice", "experts_per_token": 3}, "no fixed number"),
        ({"model": "mixtral", "layers": 3}, "unknown field"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_planned_is_a_sentence(
    asked: dict[str, Any], told: str, client: TestClient, tmp_path: Path
) -> None:
    (tmp_path / "out").symlink_to("/etc")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.yaml").symlink_to("/etc/passwd")
    (tmp_path / "huge.yaml").write_bytes(b"#" * 2**21)
    (tmp_path / "notes.txt").write_text("hello")
    text = io.to_yaml(recipe("mixtral:tiny"))
    for key in ("layers", "experts", "depth"):
        found, times = re.subn(rf"\b{key}: \d+$", f"{key}: 999999999999", text, flags=re.MULTILINE)
        assert times == 1, key
        (tmp_path / f"{key}.yaml").write_text(found)
    answer = client.post("/page/plan", json=asked)
    assert answer.status_code == 400, answer.text
    assert told in answer.json()["error"]["message"]

"""What a server tells of itself: metrics, readiness, and nothing of what it was asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import consilium.serving as serving_package
from serving.served import Server, serving

COMPLETIONS = "/v1/completions"
CONTROL = {"prompt": [1, 70, 71], "max_tokens": 30, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


NAMES = [
    "consilium:e2e_request_latency_seconds",
    "consilium:generation_tokens",
    "consilium:inter_token_latency_seconds",
    "consilium:kv_cache_usage_perc",
    "consilium:num_requests_running",
    "consilium:num_requests_waiting",
    "consilium:prefix_cache_hits",
    "consilium:prefix_cache_queries",
    "consilium:prompt_tokens",
    "consilium:request_refused",
    "consilium:request_success",
    "consilium:spec_decode_num_accepted_tokens",
    "consilium:spec_decode_num_draft_tokens",
    "consilium:time_to_first_token_seconds",
    "consilium_expert_entropy",
    "consilium_expert_imbalance",
    "consilium_expert_tokens",
]
"""Dashboards ask for these."""


def test_metrics_have_their_names_and_count_what_happened() -> None:
    with serving() as server, server.http() as client:
        client.post(COMPLETIONS, json=CONTROL)
        client.post(COMPLETIONS, json=CONTROL | {"n": 0})
        text = client.get("/metrics").text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    told = sorted(line.split()[2] for line in text.splitlines() if line.startswith("# TYPE"))
    assert sorted({re.sub("_(total|created)$", "", name) for name in told}) == NAMES
    assert found['consilium:generation_tokens_total{model_name="small"}'] == "30.0"
    assert found['consilium:prompt_tokens_total{model_name="small"}'] == "3.0"
    assert found['consilium:request_success_total{finished_reason="length",model_name="small"}'] == "1.0"
    assert found['consilium:request_refused_total{model_name="small",status="400"}'] == "1.0"
    layer = [
        float(value)
        for name, value in found.items()
        if name.startswith("consilium_expert_tokens_total{expert") and 'layer="1"' in name
    ]
    assert sum(layer) == 2 * (3 + 29), "two experts a token; the last token is not computed"


def test_a_server_that_stops_refuses_what_comes_and_ends_what_runs(server: Server) -> None:
    server.gate.draining = True
    try:
        answer = server.http().post(COMPLETIONS, json=CONTROL)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert server.http().get("/health").status_code == 200
        assert server.http().get("/ready").status_code == 503
    finally:
        server.gate.draining = False
    assert server.http().get("/ready").status_code == 200


def test_nothing_of_a_request_is_logged(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "correct horse battery staple"
    with server.http() as client:
        client.post(COMPLETIONS, json={"prompt": secret, "max_tokens": 1})
        client.post(COMPLETIONS, json={"prompt": secret, "max_tokens": -1, secret: secret})
        client.get(f"/{secret}")
    told = "".join((caplog.text, *capfd.readouterr()))
    assert "horse" not in told


def test_the_server_fetches_nothing() -> None:
    """Nothing in the package can ask another server for anything."""
    sources = [path.read_text() for path in Path(serving_package.__file__).parent.glob("*.py")]
    clients = r"^\s*(import|from) (httpx|requests|urllib|aiohttp|http\.client|socketserver)"
    assert len(sources) > 8
    assert not any(re.search(clients, source, re.MULTILINE) for source in sources)


def refers(value: Any) -> Iterator[str]:
    """All references in a document."""
    match value:
        case {"$ref": str() as name, **rest}:
            yield name
            yield from refers(rest)
        case dict():
            for one in value.values():
                yield from refers(one)
        case list():
            for one in value:
                yield from refers(one)


def test_the_description_of_the_server_is_whole(server: Server) -> None:
    found = server.http().get("/openapi.json").json()
    names = set(refers(found))
    assert {name.rpartition("/")[2] for name in names} <= found["components"]["schemas"].keys()
    assert len(names) > 10

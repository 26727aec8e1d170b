"""The dashboard and the table of metrics in docs/, against what a real server tells."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import ROOT, Process
from tests.waiting import wait_until

Metrics = dict[str, set[str]]
"""The labels by the names of samples."""

_NAME = re.compile(r"\b(?:blastdoor|http_server|process)_[a-z_]+\b")
_SELECTED = re.compile(r"\b((?:blastdoor|http_server|process)_[a-z_]+)\{([^}]*)\}")
_BY = re.compile(r"\bby \(([^)]*)\)")


@pytest.fixture(scope="module")
def metrics() -> Iterator[Metrics]:
    """Those of a server of two fronts that has had all kinds of requests."""
    options = "--fronts=2", "--workers=2", "--queue-timeout=0.3", "--port=0", "--admin=127.0.0.1:0"
    with Process("tests.handlers:app", *options) as served:
        for target in ("hello", "raise", "die", "stream?count=2&pause=0.01"):
            requests.get(f"{served.url}/{target}", timeout=20)
        with pytest.raises(requests.RequestException):
            _ = requests.get(f"{served.url}/die?late=1", timeout=20).content
        held = [requests.get(f"{served.url}/endless", stream=True, timeout=20) for _ in range(2)]
        wait_until(lambda: requests.get(f"{served.url}/hello", timeout=20).status_code == 503)
        for response in held:
            response.close()
        found: Metrics = {}

        def told() -> bool:
            text = requests.get(f"{served.admin}/-/metrics", timeout=20).text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    found.setdefault(sample.name, set()).update(sample.labels)
            return "blastdoor_jobs_refused_total" in found and "blastdoor_worker_ends_total" in found

        wait_until(told)
        yield found


def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / "grafana.json").read_text())
    return found


def expressions() -> list[str]:
    return [target["expr"] for panel in board()["panels"] for target in panel["targets"]]


def test_the_dashboard_s_metrics_are_real(metrics: Metrics) -> None:
    """G9, G10: each metric that the dashboard asks for is there, with the labels that it asks for."""
    for expression in expressions():
        names = _NAME.findall(expression)
        assert names, expression
        for name in names:
            assert name in metrics, expression
        for name, selectors in _SELECTED.findall(expression):
            wanted = set(re.findall(r"(\w+)(?:=~|!=|=)", selectors)) - {"job"}  # that one is Prometheus' own
            assert wanted <= metrics[name], expression
        for labels in _BY.findall(expression):
            assert set(labels.split(", ")) <= set().union(*(metrics[name] for name in names)), expression
    variables = [variable["definition"] for variable in board()["templating"]["list"] if variable["type"] == "query"]
    for name, label in re.findall(r"label_values\((\w+).*?, (\w+)\)", " ".join(variables)):
        assert label == "job" or label in metrics[name]


def test_the_dashboard_shows_all() -> None:
    """G9: no two panels have one place or one number, legends name labels that are there, variables are used."""
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own
        for target in panel["targets"]:
            named = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            grouped = ", ".join(_BY.findall(target["expr"]))
            assert all(name in grouped for name in named), panel["title"]
            assert all('job=~"$job"' in selectors for _, selectors in _SELECTED.findall(target["expr"]))


def test_the_table_of_metrics_is_whole(metrics: Metrics) -> None:
    """G9: docs/observing.md names all metrics that are blastdoor's or a server's, and no others."""
    text = Path(ROOT / "docs" / "observing.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    named = {name for name in _NAME.findall(text) if not name.startswith("process_")}
    own = {name for name in metrics if not name.startswith(("process_", "python_")) and not name.endswith("_created")}
    assert named == {re.sub("_(bucket|count|sum)$", "", name) for name in own}

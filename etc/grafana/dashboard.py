"""Grafana's JSON of the panels in panels.py: `python etc/grafana/dashboard.py > etc/grafana/fd-dp.json`.

`make docs` runs this. The JSON has fifty lines per panel; panels.py has what differs between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from panels import ROWS, STATES, Panel

#: Schema of Grafana 11; later versions upgrade it when they load it.
SCHEMA_VERSION = 39
COLUMNS, HEIGHT = 24, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    return {
        "title": "fd-dp",
        "uid": "fd-dp",
        "description": "Replicas, router and daemon of one fd-dp, scraped with etc/prometheus.yml.",
        "tags": ["fd-dp"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasources(), _replicas()]},
        "panels": list(_placed()),
    }


def _datasources() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _replicas() -> dict[str, Any]:
    return {
        "name": "replica",
        "label": "Replica",
        "type": "query",
        "datasource": DATASOURCE,
        "query": "label_values(fastdeploy:requests_number_total, replica)",
        "refresh": 2,
        "sort": 3,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _placed() -> Iterator[dict[str, Any]]:
    """Return the panels with their positions, from left to right, row by row."""
    number = y = 0
    for title, panels in ROWS.items():
        number += 1
        yield {"id": number, "type": "row", "title": title, "panels": [], "gridPos": _place(0, y, COLUMNS, 1)}
        x, y = 0, y + 1
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + HEIGHT
            number += 1
            yield {"id": number, "gridPos": _place(x, y, panel.width, HEIGHT), **_panel(panel)}
            x += panel.width
        y += HEIGHT


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel) -> dict[str, Any]:
    defaults, options = _appearance(panel)
    return {
        "title": panel.title,
        "description": panel.help,
        "type": panel.kind,
        "datasource": DATASOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "editorMode": "code",
                "expr": expression,
                "legendFormat": legend,
                # The current value, or its course.
                "instant": panel.kind in ("stat", "bargauge"),
                "range": panel.kind not in ("stat", "bargauge"),
            }
            for index, (legend, expression) in enumerate(panel.queries.items())
        ],
        "fieldConfig": {"defaults": {"unit": panel.unit, **defaults}, "overrides": []},
        "options": options,
    }


def _appearance(panel: Panel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the field defaults and the options of this kind of panel."""
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    match panel.kind:
        case "stat":
            return {}, {"reduceOptions": last, "colorMode": "value", "graphMode": "none", "textMode": "auto"}
        case "bargauge":
            return {"min": 0}, {"reduceOptions": last, "orientation": "horizontal", "displayMode": "basic"}
        case "state-timeline":
            names = {
                str(code): {"index": code, "text": state, "color": color}
                for code, (state, color) in enumerate(STATES.items())
            }
            mappings = [{"type": "value", "options": names}]
            return {"mappings": mappings, "custom": {"fillOpacity": 70, "lineWidth": 0}}, {
                "mergeValues": True,
                "showValue": "auto",
                "rowHeight": 0.9,
                "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False},
                "tooltip": {"mode": "single", "sort": "none"},
            }
        case _:
            drawn: dict[str, Any] = {
                "drawStyle": "line",
                "lineWidth": 1,
                "fillOpacity": 8,
                "showPoints": "never",
            }
            drawn["stacking"] = {"mode": "normal" if panel.stacked else "none", "group": "A"}
            return {"min": 0, "custom": drawn}, {
                "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))

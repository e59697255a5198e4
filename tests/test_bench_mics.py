"""The tables of MiCS beside ZeRO-3 show measured times and the predictions of the formulas."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.mics import (
    ALONE,
    AUTO,
    LEVELS,
    MICS,
    RINGS,
    SETTINGS,
    draw,
    machine_of,
    predict_bytes,
    predict_step,
    report,
)

LINKS = SETTINGS[0]


def record(nodes: int, mics: float, zero: float) -> dict[str, Any]:
    """Steps on so many nodes, three rounds."""
    times = {MICS: mics, AUTO: 2 * zero, RINGS: zero, ALONE: 0.5}
    found = {title: {"seconds": [0.9 * s, s, 1.1 * s], "sent": [2e6] * 3} for title, s in times.items()}
    return {"what": LINKS.name, "nodes": nodes, "per_node": 2, "rate": LINKS.rate, "found": found}


def test_predictions_add_the_links_time_to_that_of_the_machine_alone() -> None:
    """8 MiB in layers of 1 MiB, four micro-steps; 8 nodes of two ranks at 0.95 of 1 Gbit/s and 61 us a round."""
    measured, model, layer = record(8, 1.0, 3.0), float(8 << 20), float(1 << 20)
    beta = machine_of(8, "1gbit").inter.beta
    assert beta == pytest.approx(8e6 / 1e9 / 0.95)
    second = 2 * 7 * 61 + 2 * 7 / 8 * model * beta
    assert predict_step(MICS, measured) == pytest.approx(0.5 + 1e-6 * second)
    ring = 15 * 61 + 15 / 16 * layer * beta
    assert predict_step(RINGS, measured) == pytest.approx(0.5 + 1e-6 * ring * (3 * 4 * 8 + 1))
    levels = 7 * 61 + 14 / 16 * layer * beta
    assert predict_step(LEVELS, measured) == pytest.approx(1e-6 * levels * (3 * 4 * 8 + 1))
    assert predict_bytes(MICS, measured) == 2 * 7 / 8 * model
    assert predict_bytes(RINGS, measured) == 3 * 4 * 15 / 16 * model


def test_the_report_has_a_row_a_way_and_its_ratios(tmp_path: Any) -> None:
    gathers = {title: {"16384": [s, s]} for title, s in (("two levels", 1e-3), ("flat ring", 2e-3), ("native", 3e-3))}
    records = [record(2, 0.8, 1.6), record(8, 1.0, 3.0), {"what": "gathers", "nodes": 4, "found": gathers}]
    records.append({"what": "scatters", "nodes": 4, "found": gathers})
    said = report(records)
    assert "| 8 | ZeRO-3, auto | **6000** (5400–6600) |  |  |" in said
    assert "| 8 | ZeRO-3, rings | **3000** (2700–3300) |" in said
    assert "**3.00×** (3.00–3.00) | 53.3% |" in said
    assert "8 nodes: MiCS is 3.00× as fast as ZeRO-3, rings, the fastest of them." in said
    assert "**1.00×**" not in said
    assert said.count("| 4 | 16,384 | **1000** (1000–1000) |") == 2
    assert "| 2.00 | 3.00 |" in said
    assert "| ZeRO-3 (fitted) |" in said
    draw(records, tmp_path / "steps.svg")
    assert (tmp_path / "steps.svg").read_text().count("<svg ") == 1

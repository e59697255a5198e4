"""Time to accuracy: the figures that are computed from the runs."""

from __future__ import annotations

from typing import Any

from benchmarks.training import epoch_times, table, time_to_accuracy


def run(method: str, accuracies: list[float], first: float = 9.0, seed: int = 0) -> dict[str, Any]:
    """Passes of two steps that take 4 s, except the first, which loads compiled code."""
    times = [first, *[4.0] * (len(accuracies) - 1)]
    epochs = [
        {"accuracy": a, "compute_s": t / 4, "communication_s": t / 2, "step_s": t / 4, "wire_bytes": 100}
        for a, t in zip(accuracies, times, strict=True)
    ]
    return {"shape": "4 x 2", "method": method, "seed": seed, "steps_an_epoch": 2, "epochs": epochs}


def test_the_first_pass_counts_as_long_as_the_second() -> None:
    assert epoch_times(run("dense", [0.1, 0.2, 0.3])) == [4.0, 4.0, 4.0]
    assert epoch_times(run("dense", [0.1])) == [9.0]


def test_a_goal_is_reached_at_the_end_of_a_pass_or_never() -> None:
    found = run("dense", [0.1, 0.2, 0.3])
    assert [time_to_accuracy(found, goal) for goal in (0.05, 0.2, 0.25, 0.4)] == [4.0, 8.0, 12.0, None]


def test_a_table_compares_with_dense_and_marks_methods_that_miss_the_goal() -> None:
    slow, never = run("gtc", [0.1, 0.1, 0.295]), run("bmuf", [0.1, 0.1, 0.1])
    lines = table([run("dense", [0.1, 0.3, 0.3]), slow, never], "4 x 2").splitlines()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[4:]}
    assert rows["dense"] == ["30.00%", "100", "1000.00", "2000.00", "8.00", "1.00"]
    assert rows["gtc"] == ["29.50%", "100", "1000.00", "2000.00", "12.00", "0.67"]
    assert rows["bmuf"][-2:] == ["not reached", ""]

"""The tables are those of OSU and nccl-tests, byte for byte, and programs that parse those parse ours."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from benchmarks import collectives
from hpccomm import ArgumentError
from hpccomm.bench import flags, nccl, nccl_flags, osu, plot, report
from hpccomm.bench.cases import CASES
from hpccomm.bench.loop import Row, percentile
from hpccomm.commands.bench import Printer, parse_command

ROW = Row(
    collective="allreduce",
    algorithm="auto",
    datatype="float32",
    bytes=8,
    ranks=4,
    nodes=1,
    iterations=1000,
    min_us=1.234,
    avg_us=2.345,
    max_us=13.456,
    p50_us=2.0,
    p99_us=9.999,
    algbw_GBps=0.0034,
    busbw_GBps=0.0051,
    validated=True,
    predicted_us=None,
    tails=(2.0, 9.999),
)


def table(collective: str, algorithms: list[str], rows: list[Row], **wanted: Any) -> list[str]:
    columns = osu.columns_of(collective, algorithms, osu.ColumnOptions(**wanted))
    return [osu.header(columns), osu.line(columns, rows)]


# --- OSU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collective", "title"),
    [
        ("allreduce", "# OSU MPI Allreduce Latency Test v7.4"),
        ("reduce", "# OSU MPI Reduce Latency Test v7.4"),
        ("bcast", "# OSU MPI Broadcast Latency Test v7.4"),
        ("reduce_scatter", "# OSU MPI Reduce_scatter Latency Test v7.4"),
        ("reduce_scatter_block", "# OSU MPI Reduce_scatter_block Latency Test v7.4"),
        ("allgather", "# OSU MPI Allgather Latency Test v7.4"),
        ("allgatherv", "# OSU MPI Allgatherv Latency Test v7.4"),
        ("alltoall", "# OSU MPI All-to-All Personalized Exchange Latency Test v7.4"),
        ("alltoallv", "# OSU MPI All-to-Allv Personalized Exchange Latency Test v7.4"),
        ("gather", "# OSU MPI Gather Latency Test v7.4"),
        ("gatherv", "# OSU MPI Gatherv Latency Test v7.4"),
        ("scatter", "# OSU MPI Scatter Latency Test v7.4"),
        ("scatterv", "# OSU MPI Scatterv Latency Test v7.4"),
        ("barrier", "# OSU MPI Barrier Latency Test v7.4"),
        ("latency", "# OSU MPI Latency Test v7.4"),
        ("bw", "# OSU MPI Bandwidth Test v7.4"),
        ("bibw", "# OSU MPI Bi-Directional Bandwidth Test v7.4"),
    ],
)
def test_every_benchmark_has_osus_title(collective: str, title: str) -> None:
    assert osu.title(collective) == title


def test_every_benchmark_is_in_the_list_of_titles() -> None:
    assert len(CASES) == 17


def test_the_plain_table() -> None:
    assert osu.datatype_line("mpi_float") == "# Datatype: MPI_FLOAT."
    assert table("allreduce", ["auto"], [ROW]) == [
        "# Size         Avg Latency(us)",
        "8                         2.35",
    ]


def test_the_full_table_with_validation_and_percentiles() -> None:
    header, line = table("allreduce", ["auto"], [ROW], full=True, check=True, percentiles=(50, 99))
    assert header == (
        "# Size         Avg Latency(us)     Min Latency(us)     Max Latency(us)  Iterations"
        "          Validation    P50 Tail Lat(us)    P99 Tail Lat(us)"
    )
    assert line == (
        "8                         2.35                1.23               13.46        1000"
        "                Pass                2.00               10.00"
    )
    failed = table("allreduce", ["auto"], [replace(ROW, validated=False)], check=True)[1]
    assert failed == "8                         2.35                Fail"


def test_a_barrier_has_no_sizes() -> None:
    row = replace(ROW, collective="barrier", bytes=0)
    assert table("barrier", ["auto"], [row]) == ["# Avg Latency(us)", "             2.35"]
    assert table("barrier", ["auto"], [row], full=True) == [
        "# Avg Latency(us)     Min Latency(us)     Max Latency(us)  Iterations",
        "             2.35                1.23               13.46        1000",
    ]


def test_bandwidth_is_in_millions_of_bytes() -> None:
    row = replace(ROW, collective="bw", bytes=1000, avg_us=0.5, algbw_GBps=2.0, tails=(0.25,))
    assert table("bw", ["native"], [row], percentiles=(99,)) == [
        "# Size        Bandwidth (MB/s)   P99 Tail BW(MB/s)",
        "1000                   2000.00             4000.00",
    ]


def test_bandwidths_of_several_algorithms_are_medians_too() -> None:
    row = replace(ROW, collective="bw", bytes=1000, avg_us=0.5, p50_us=0.5, algbw_GBps=2.0)
    header, line = table("bw", ["native", "auto"], [row, replace(row, avg_us=1.0, p50_us=0.4, algbw_GBps=1.0)])
    assert re.split(r"\s{2,}", header)[1:] == ["native P50(MB/s)", "auto P50(MB/s)", "native/auto"]
    assert line.split() == ["1000", "2000.00", "2500.00", "1.25"]


def test_times_on_new_arrays_have_columns_of_their_own() -> None:
    new = replace(ROW, new_avg_us=5.0, new_p50_us=4.0, new_call_avg_us=3.0, new_call_p50_us=2.5)
    header, line = table("allreduce", ["auto"], [new], new_arrays=True)
    assert header == "# Size         Avg Latency(us)      New Arrays(us)  New, Call Only(us)"
    assert line.split() == ["8", "2.35", "5.00", "3.00"]
    native = replace(new, p50_us=6.0, new_p50_us=2.0, new_call_p50_us=1.0)
    header, line = table("allreduce", ["native", "auto"], [native, new], new_arrays=True)
    assert re.split(r"\s{2,}", header)[1:] == [
        *("native P50(us)", "native New Arrays(us)", "native New, Call Only(us)"),
        *("auto P50(us)", "auto New Arrays(us)", "auto New, Call Only(us)"),
        *("native/auto", "native/auto New Arrays", "native/auto New, Call Only"),
    ]
    assert line.split() == ["8", *("6.00", "2.00", "1.00"), *("2.00", "4.00", "2.50"), *("3.00", "0.50", "0.40")]


def test_large_sizes_keep_a_space_before_the_number() -> None:
    line = table("allreduce", ["auto"], [replace(ROW, bytes=1 << 30, avg_us=1234567.891)])[1]
    assert line == "1073741824          1234567.89"


def test_several_algorithms_are_columns_and_native_is_the_yardstick() -> None:
    rows = [replace(ROW, algorithm="native", p50_us=8.0), replace(ROW, algorithm="ring", p50_us=16.0), ROW]
    header, line = table("allreduce", ["native", "ring", "auto"], rows, check=True)
    titles = re.split(r"\s{2,}", header)
    assert titles == [
        "# Size",
        "native P50(us)",
        "ring P50(us)",
        "auto P50(us)",
        "native/ring",
        "native/auto",
        "Validation",
    ]
    assert line.split() == ["8", "8.00", "16.00", "2.00", "0.50", "4.00", "Pass"]
    assert len(header) == len(line)
    assert "native/" not in table("allreduce", ["ring", "auto"], rows[1:])[0]


def test_columns_with_long_names_are_separated() -> None:
    header, line = table("allreduce", ["native", "hierarchical"], [ROW, ROW], full=True, percentiles=(50, 99))
    assert len(re.split(r"\s{2,}", header)) == len(line.split()) == 1 + 2 * 6 + 1 + 1


def test_percentiles_are_osus_and_never_out_of_bounds() -> None:
    import numpy as np

    samples = np.arange(1000.0)[::-1] + 1
    assert [percentile(samples, p) for p in (1, 50, 99, 100)] == [10, 500, 990, 1000]
    assert percentile(np.array([3.0]), 50) == 3.0
    assert percentile(np.array([3.0, 1.0]), 0) == 1.0


def test_the_failure_line() -> None:
    assert osu.failure("osu_reduce", 64) == (
        "DATA VALIDATION ERROR: osu_reduce exited with status 1 on message size 64."
    )


def test_repeats_are_osus() -> None:
    assert CASES["allreduce"].repeats.counts(8192) == (1000, 100)
    assert CASES["allreduce"].repeats.counts(8193) == (100, 10)
    assert CASES["latency"].repeats.counts(1) == (10000, 100)
    assert CASES["latency"].repeats.counts(1 << 20) == (1000, 10)
    assert CASES["bw"].repeats.counts(1) == (100, 10)
    assert CASES["bibw"].repeats.counts(1 << 20) == (20, 2)


# --- nccl-tests ------------------------------------------------------------------------------------


def nccl_output(least: float | None = None, wrong: int = 0) -> list[str]:
    run = nccl.Run("hpccomm bench allreduce auto", 8, 8, 2, 5, 20, True)
    place = nccl.Place(0, 123, "n001", "AMD EPYC")
    inside = replace(ROW, in_place=True, wrong=wrong, validated=wrong == 0, busbw_GBps=0.0153)
    lines = [*nccl.preamble(run, "hpccomm"), nccl.device_line(place), *nccl.header()]
    return [*lines, nccl.line(ROW, inside, 0), *nccl.footer(run, [ROW, inside], least)]


def test_the_table_of_nccl_tests() -> None:
    assert nccl_output() == [
        "# nccl-tests version 2.19.6 (its format; measured by hpccomm)",
        "# Collective test starting: hpccomm bench allreduce auto",
        "# nThread 1 nGpus 0 minBytes 8 maxBytes 8 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1 "
        "validation: 1 graph: 0 unalign: 0",
        "#",
        "# Using devices",
        "#  Rank  0 Group  0 Pid    123 on       n001 device  0 [host] AMD EPYC",
        "#",
        "#                                                    "
        "          out-of-place                       in-place          ",
        "#       size         count      type   redop    root  "
        "   time   algbw   busbw  #wrong     time   algbw   busbw  #wrong ",
        "#        (B)    (elements)                            "
        "   (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)         ",
        "           8             2     float     sum      -1  "
        "   2.35    0.00    0.01       0     2.35    0.00    0.02       0",
        "# Out of bounds values : 0 OK",
        "# Avg bus bandwidth    : 0.0102 ",
        "#",
        "# Collective test concluded: hpccomm bench allreduce auto",
    ]


def test_bandwidth_is_judged_only_against_a_required_one() -> None:
    assert "# Avg bus bandwidth    : 0.0102 OK" in nccl_output(least=0.011)
    assert "# Avg bus bandwidth    : 0.0102 FAILED" in nccl_output(least=0.012)
    assert "# Out of bounds values : 1 FAILED" in nccl_output(wrong=3)


@pytest.mark.parametrize(
    ("collective", "size", "count", "op", "root"),
    [
        ("allreduce", "64", "16", "sum", "-1"),
        ("bcast", "64", "16", "none", "2"),
        ("reduce", "64", "16", "sum", "2"),
        ("allgather", "64", "4", "none", "-1"),
        ("alltoall", "64", "4", "none", "-1"),
        ("reduce_scatter", "64", "4", "sum", "-1"),
        ("gather", "64", "4", "none", "2"),
    ],
)
def test_size_is_the_whole_and_count_one_ranks_share(
    collective: str, size: str, count: str, op: str, root: str
) -> None:
    row = replace(ROW, collective=collective, bytes=64)
    words = nccl.line(row, row, 2).split()
    assert words[:5] == [size, count, "float", op, root]
    assert len(words) == 13


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [
        (1.234, 7, "1.23"),
        (99999.5, 7, "99999.5"),
        (1234567.8, 7, "1234568"),
        (12345678.0, 7, "1.2e+07"),
        (0, 6, "0.00"),
    ],
)
def test_numbers_fit(value: float, width: int, text: str) -> None:
    assert nccl.fit_number(value, width) == text


def test_an_unchecked_row_still_has_thirteen_words() -> None:
    row = replace(ROW, validated=None)
    assert nccl.line(row, row, 0).split().count("N/A") == 2
    assert len(nccl.line(row, row, 0).split()) == 13


# --- programs that read them -----------------------------------------------------------------------


def reframe(text: str, size: int) -> tuple[bool, float]:
    """hpctestlib's OSU benchmarks: what is found, and whether it counts as right."""
    found = re.search(rf"^{size}\s+(\S+)", text, re.MULTILINE)
    assert found
    return bool(re.search(rf"^{size}.*Pass", text, re.MULTILINE)), float(found[1])


def collectives_tuning(text: str, columns: int) -> list[list[float]]:
    """ompi-collectives-tuning: two lines and comments, then nothing but rows of so many numbers."""
    lines = text.splitlines()[2:]
    while lines[0].startswith("#"):
        lines = lines[1:]
    assert all(len(line.split()) == columns for line in lines)
    return [[float(word) for word in line.split()] for line in lines]


def superbench(text: str) -> dict[int, float]:
    """SuperBench's nccl-bw: bus bandwidth by size, columns counted from the end."""
    lines = text.splitlines()
    start = next(k for k, line in enumerate(lines) if "out-of-place" in line)
    end = next(k for k, line in enumerate(lines) if "Out of bounds values" in line)
    names = next(line[1:].split() for line in lines[start:end] if "time" in line and "busbw" in line)
    rows = [line.split() for line in lines[start + 4 - 1 : end]]
    place = names.index("busbw") - len(names)
    assert place == -6
    assert all(len(words) > 10 for words in rows)
    return {int(words[names.index("size")]): float(words[place]) for words in rows}


def flagperf(text: str) -> float:
    """FlagPerf: the last word of one line."""
    return float(next(line for line in text.splitlines() if "# Avg bus bandwidth" in line).split()[-1])


def osu_text(collective: str, rows: list[Row], **wanted: Any) -> str:
    columns = osu.columns_of(collective, ["auto"], osu.ColumnOptions(**wanted))
    comment = [] if collective == "barrier" else [osu.datatype_line("mpi_float")]
    head = ["", osu.title(collective), *comment, osu.header(columns)]
    return "\n".join([*head, *(osu.line(columns, [row]) for row in rows)]) + "\n"


def test_reframe_reads_the_latency() -> None:
    rows = [replace(ROW, bytes=4), ROW, replace(ROW, bytes=80)]
    assert reframe(osu_text("allreduce", rows, check=True), 8) == (True, 2.35)


def test_ompi_collectives_tuning_reads_two_columns_and_one_of_a_barrier() -> None:
    assert collectives_tuning(osu_text("allreduce", [ROW, replace(ROW, bytes=16)]), 2) == [[8, 2.35], [16, 2.35]]
    assert collectives_tuning(osu_text("barrier", [replace(ROW, collective="barrier")]), 1) == [[2.35]]


def test_superbench_and_flagperf_read_the_bus_bandwidth() -> None:
    text = "\n".join(nccl_output())
    assert superbench(text) == {8: 0.01}
    assert flagperf(text) == 0.0102


# --- flags -----------------------------------------------------------------------------------------


def parse_line(line: str) -> flags.BenchArguments:
    collective, *words = line.split()
    return flags.parse_flags(collective, words)


@pytest.mark.parametrize(
    ("line", "first", "last"),
    [
        ("allreduce", 1, 1 << 20),
        ("allreduce -m 64", 1, 64),
        ("allreduce -m 4:67108864", 4, 1 << 26),
        ("allreduce -m 1024:", 1024, 1 << 20),
        ("allreduce -m :16", 1, 16),
        ("allreduce --message-size=5:23", 5, 20),
        ("latency", 0, 1 << 22),
        ("bw", 1, 1 << 22),
        ("bibw -m 64Ki:1Mi", 1 << 16, 1 << 20),
        ("barrier", 0, 0),
        ("allreduce --format nccl", 32 << 20, 32 << 20),
        ("allreduce --format nccl -b 8 -e 128M -f 2", 8, 128 << 20),
        ("allreduce -b 8 -e 128M -f 2 -g 1", 8, 128 << 20),
        ("allreduce -m 4:64M", 4, 64 << 20),
        ("allreduce -m 1K:64KB", 1024, 65536),
        ("allreduce -m 3:5", 4, 4),
        ("allreduce -T mpi_char -m 3:5", 3, 3),
        ("allgather --format nccl --min-bytes 1K --maxbytes 64K --step-factor 4", 1024, 65536),
    ],
)
def test_sizes(line: str, first: int, last: int) -> None:
    sizes = parse_line(line).sizes
    assert (sizes[0], sizes[-1]) == (first, last)
    assert all(b in (2 * a, 4 * a, 1) for a, b in pairwise(sizes))


def test_a_flag_with_an_attached_value_leaves_the_next_word_alone() -> None:
    assert parse_line("allreduce").columns.percentiles == ()
    assert parse_line("allreduce -z -f").columns.percentiles == (50, 90, 99)
    assert parse_line("allreduce -z10,100 -i 5").columns.percentiles == (10, 100)
    reframes = parse_line("osu_bw".removeprefix("osu_") + " -m 4194304 -x 10 -i 1000 -c D D")
    assert reframes.options.check
    assert "host memory" in reframes.warning
    assert parse_line("latency -c -z H H").warning == ""


def test_datatypes_are_osus_words() -> None:
    assert parse_line("allreduce").datatypes == ("mpi_float",)
    assert parse_line("latency").datatypes == ("mpi_char",)
    assert parse_line("allreduce -T MPI_CHAR -T mpi_double").datatypes == ("mpi_char", "mpi_double")
    assert parse_line("bcast -T all").datatypes == ("mpi_char", "mpi_int", "mpi_float")


def test_flags_reach_the_loop() -> None:
    options = parse_line("reduce -i 7 -x 0 -c -u 2 -l -k rotate --registered").options
    assert (options.iterations, options.warmup, options.check_warmup) == (7, 0, 2)
    assert (options.check, options.in_place, options.root, options.registered) == (True, True, None, True)
    assert (options.whole, options.seconds, options.streaming, options.bare_native) == (False, None, False, True)
    assert parse_line("bcast -k fixed:3").options.root == 3
    assert parse_line("bw -W 16").options.window == 16
    streaming = parse_line("allreduce --format nccl").options
    assert (streaming.whole, streaming.streaming, streaming.check) == (True, True, True)
    assert (streaming.iterations, streaming.warmup) == (20, 5)


def test_new_arrays_and_first_calls_are_measured_on_demand() -> None:
    plain, full = parse_line("allreduce"), parse_line("allreduce --new-arrays --cold")
    assert (plain.options.new_arrays, plain.columns.new_arrays, plain.cold) == (False, False, False)
    assert (full.options.new_arrays, full.columns.new_arrays, full.cold) == (True, True, True)
    assert parse_line("latency --cold --algorithm all").cold


def test_messages_are_measured_on_the_communicator_or_on_plain_mpi4py() -> None:
    assert parse_line("latency").algorithms == ("auto",)
    assert parse_line("bw --algorithm native,auto").algorithms == ("native", "auto")


def test_times_of_single_calls_are_collected_only_on_demand() -> None:
    assert parse_line("allreduce").options.percentiles == ()
    assert parse_line("allreduce -z99").options.percentiles == (99,)
    assert parse_line("allreduce --json out.json").options.percentiles
    assert parse_line("allreduce --algorithm native,ring").options.percentiles


OTHER_FLAGS = {
    "-G": "hpccomm plot",
    "-D vect:2:4": "-D vect:2:4: derived datatypes",
    "-P PAPI_TOT_CYC:out": "perf stat",
    "-r GPU": "leave it out",
    "--buffer cupy": "on a device with -d cuda",
    "--device gpu": "on a device with -d cuda",
    "--pickle": "lower-case methods are not measured",
    "-t 4": "non-blocking",
    "-b multiple": "one buffer",
}
OTHER_NCCL_FLAGS = {
    "-g 2": "-g 2: a rank is one process with one buffer: start more ranks with hpccomm-run -n",
    "-t 4": "hpccomm-run -n",
    "-o prod": "only sums",
    "-m 8": "one by one",
    "-N 0": "repeat the command",
    "-a 3": "means over the ranks",
    "-G 1": "CUDA graphs",
    "-d bfloat16": "use one of int8, int32, float, double, half, all",
    "-r last": "the number of a rank, or all",
    "-r 1": "-r does not apply",
}


@pytest.mark.parametrize(
    "line",
    [
        "-b 8 -e 64 -f 2 -g 1 -t 1 -o sum -d float -n 20 -w 5 -m 1 -N 1 -a 1 -p 0 -c 1 -z 0 -G 0 -C 0 -R 0 -T 60",
        "--minbytes 8 --maxbytes 64 --stepfactor 2 --ngpus 1 --nthreads 1 --op sum --datatype float --iters 20 "
        "--warmup_iters 5 --agg_iters 1 --run_cycles 1 --average 1 --parallel_init 0 --check 1 --blocking 1 "
        "--cudagraph 0 --report_cputime 0 --local_register 0 --timeout 60 --output_file out.json",
    ],
)
def test_every_flag_of_nccl_tests_is_read(line: str) -> None:
    found = parse_line(f"allreduce {line}")
    assert (found.nccl, found.sizes, found.datatypes) == (True, (8, 16, 32, 64), ("mpi_float",))
    assert (found.options.iterations, found.options.warmup, found.options.check) == (20, 5, True)


def test_nccl_tests_flags_mean_what_they_mean_there() -> None:
    found = parse_line("bcast -b 1K -e 4K -i 1K -n 7 -w 0 -c 0 -d all -r all -R 1 -J out.json")
    assert found.sizes == (1024, 2048, 3072, 4096)
    assert found.datatypes == ("mpi_char", "mpi_int", "mpi_float", "mpi_double", "half")
    assert (found.options.iterations, found.options.warmup, found.options.check) == (7, 0, False)
    assert (found.options.root, found.options.registered, found.json) == (None, True, "out.json")
    assert parse_line("allreduce -b 8 -e 3M").sizes == (8, 8 + (1 << 20), 8 + (2 << 20))  # steps of 1 MiB, as there


NCCL, OSU, OMB_PY = "nccl-tests", "OSU", "OMB-Py"
COMMON_LINES: list[tuple[str, str, str | tuple[str, int, int]]] = [
    # as people write them in issues, papers and job scripts, after the launcher's own words
    (NCCL, "./build/all_reduce_perf -b 8 -e 128M -f 2 -g 1", ("allreduce", 8, 128 << 20)),
    (NCCL, "./build/all_reduce_perf -b 8 -e 1G -f 2 -g 1", ("allreduce", 8, 1 << 30)),
    (NCCL, "all_reduce_perf -b 32 -f 2 -e 8G", ("allreduce", 32, 8 << 30)),
    (NCCL, "all_reduce_perf -b1K -e1G -f2 -g1 -t1 -n10", ("allreduce", 1 << 10, 1 << 30)),
    (NCCL, "/home/me/nccl-tests/build/all_reduce_perf -b 1250M -e 1250M -g 1", ("allreduce", 1250 << 20, 1250 << 20)),
    (NCCL, "all_reduce_perf_mpi -b 512M -e 8G -f 2 -g 1", ("allreduce", 512 << 20, 8 << 30)),
    (NCCL, "all_reduce_perf -t 1 -g 1 -b 2M -e 32M -d float -o sum", ("allreduce", 2 << 20, 32 << 20)),
    (NCCL, "./all_gather_perf -b 1M -e 64M -f 2 -g 1 -n 20 -w 5 -c 1", ("allgather", 1 << 20, 64 << 20)),
    (NCCL, "reduce_scatter_perf -b 8 -e 128M -f 2 -g 1 -a 1", ("reduce_scatter_block", 8, 128 << 20)),
    (NCCL, "alltoall_perf -b 128K -e 1M -f 2 -c 0 -G 0", ("alltoall", 128 << 10, 1 << 20)),
    (NCCL, "all_reduce_perf -b 8 -e 128M -f 128 -g 2", "-g 2: a rank is one process with one buffer: start more ranks"),
    (NCCL, "all_reduce_perf -b 8 -e 8G -f 2 -g 1 -c 0 -G 1", "-G 1: CUDA graphs are not captured: leave it out"),
    (NCCL, "sendrecv_perf -b 8 -e 128M -f 2 -g 1", "sendrecv_perf has no counterpart here: use one of all_reduce_perf"),
    (OSU, "osu_latency", ("latency", 0, 4 << 20)),
    (OSU, "osu_bw", ("bw", 1, 4 << 20)),
    (OSU, "./osu_allreduce -m 65536:65536 -i 1000", ("allreduce", 65536, 65536)),
    (OSU, "osu_allreduce --full --type mpi_float", ("allreduce", 1, 1 << 20)),
    (OSU, "osu_allreduce -m 4:1048576 -i 1000 -x 200 -f", ("allreduce", 4, 1 << 20)),
    (OSU, "/opt/osu/mpi/collective/osu_allreduce -m 33554432 -f -r cpu", ("allreduce", 1, 32 << 20)),
    (OSU, "/opt/osu-micro-benchmarks/mpi/collective/osu_alltoallv -m 64:64", ("alltoallv", 64, 64)),
    (OSU, "osu_latency -m 4194304 -x 10 -i 1000 -c D D", ("latency", 0, 4 << 20)),
    (OSU, "osu_bw -d cuda D D", ("bw", 1, 4 << 20)),
    (OSU, "osu_bcast -m :65536 -z -u 3 -c", ("bcast", 1, 65536)),
    (OSU, "osu_alltoall -m 1:1M -M 1G", ("alltoall", 4, 1 << 20)),
    (OSU, "osu_barrier -i 1000", ("barrier", 0, 0)),
    (OSU, "osu_mbw_mr", "there is no benchmark 'mbw_mr': use one of allreduce"),
    (OSU, "osu_allreduce -m 4194304:", "no size from 4194304 to 1048576 bytes: give -m MIN:MAX"),
    (OMB_PY, "run.py --benchmark latency --buffer numpy", ("latency", 0, 4 << 20)),
    (OMB_PY, "run.py --benchmark allreduce --buffer numpy", ("allreduce", 1, 1 << 20)),
    (OMB_PY, "python/run.py --benchmark=bw", ("bw", 1, 4 << 20)),
    (OMB_PY, "run.py", ("latency", 0, 4 << 20)),
    (OMB_PY, "run.py --buffer bytearray --benchmark bcast --min 4 --max 65536", ("bcast", 4, 65536)),
    (OMB_PY, "run.py --benchmark allgather --max 1048576 --iterations 100 --skip 10", ("allgather", 1, 1 << 20)),
    (OMB_PY, "run.py --benchmark reduce_scatter --device cpu", ("reduce_scatter", 1, 1 << 20)),
    (OMB_PY, "osu_alltoall.py --buffer numpy -i 100 -x 10", ("alltoall", 1, 1 << 20)),
    (OMB_PY, "run.py --benchmark barrier", ("barrier", 0, 0)),
    (OMB_PY, "run.py --benchmark bibw --min 8 --max 8", ("bibw", 8, 8)),
    (
        OMB_PY,
        "run.py --benchmark latency --buffer cupy",
        "--buffer cupy: arrays are NumPy's, or lie on a device with -d",
    ),
    (OMB_PY, "run.py --benchmark", "--benchmark needs a value behind it"),
    (OMB_PY, "run.py --benchmark allredcue", "did you mean allreduce?"),
    (OMB_PY, "run.py --benchmark allreduce --pickle", "--pickle: lower-case methods are not measured: leave it out"),
]


def test_at_least_ten_lines_of_each_family_run() -> None:
    runs = [family for family, _, meaning in COMMON_LINES if not isinstance(meaning, str)]
    assert all(runs.count(family) >= 10 for family in (NCCL, OSU, OMB_PY))


@pytest.mark.parametrize(("family", "line", "meaning"), COMMON_LINES, ids=[line for _, line, _ in COMMON_LINES])
def test_the_lines_that_people_know_by_heart_are_read_or_answered_in_one(
    family: str, line: str, meaning: str | tuple[str, int, int]
) -> None:
    program, *words = line.split()
    args = Namespace(help=False, collective=program, flags=words)
    if isinstance(meaning, str):
        with pytest.raises(ArgumentError) as error:
            parse_command(args, Printer(False))
        assert meaning in str(error.value)
        assert "\n" not in str(error.value)
        return
    found = parse_command(args, Printer(False))
    assert found is not None
    collective, first, last = meaning
    assert (found.collective, found.nccl) == (collective, family == NCCL)
    assert (found.sizes[0], found.sizes[-1]) == (first, last)


@pytest.mark.parametrize(
    ("program", "collective"),
    [
        ("./build/all_reduce_perf", "allreduce"),
        ("all_gather_perf", "allgather"),
        ("broadcast_perf", "bcast"),
        ("/opt/bin/reduce_scatter_perf", "reduce_scatter_block"),
        ("allreduce", ""),
        ("osu_allreduce", ""),
    ],
)
def test_programs_of_nccl_tests_are_known(program: str, collective: str) -> None:
    assert nccl_flags.find_program(program) == collective


def test_a_program_without_a_counterpart_is_refused_with_the_others() -> None:
    with pytest.raises(ArgumentError, match="hypercube_perf has no counterpart here: use one of all_reduce_perf"):
        nccl_flags.find_program("hypercube_perf")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("allreduce -m 8:4", "there is no size from 8 to 4 bytes"),
        ("allreduce -m :", "give -m MIN:MAX"),
        ("allreduce -m many", "no size"),
        ("allreduce -i 0", "give 1 or more"),
        ("allreduce -x -1", "no whole number: give 0 or more"),
        ("allreduce -z101", "percentiles"),
        ("allreduce -z1,2,3,4,5,6", "percentiles"),
        ("allreduce -T mpi_quad", "mpi_float"),
        ("allreduce -k fixed:0", "no root"),
        ("reduce -k somewhere", "fixed:R or rotate"),
        ("allreduce -W 5", "bw and bibw"),
        ("bcast -l", "-l"),
        ("barrier -c", "no data to check"),
        ("latency -f", "for collectives"),
        ("latency --new-arrays", "ordinary arrays"),
        ("barrier --new-arrays", "ordinary arrays"),
        ("allreduce --new-arrays --registered", "ordinary arrays"),
        ("allreduce --new-arrays --format nccl", "unrecognized arguments: --new-arrays"),
        ("allreduce --algorith ring", "did you mean --algorithm?"),
        ("allreduce -m 1:3", "an element has 4 bytes: give a maximum of that or more"),
        *((f"allreduce {flag}", words) for flag, words in OTHER_FLAGS.items()),
        ("allreduce --cold --algorithm ring", "native and auto"),
        ("allreduce --cold -d cuda", "in host memory"),
        ("bw --format nccl", "that move data"),
        *((f"allreduce -b 8 -e 64 {flag}", words) for flag, words in OTHER_NCCL_FLAGS.items()),
        ("allreduce --format nccl -b 8 -e 4", "a minimum up to the maximum"),
        ("allreduce -b 0 -e 64", "a minimum up to the maximum"),
        ("allreduce -b 8 -e 16G -i 8", "gives 2,147,483,648 sizes: give a larger step, or a factor with -f"),
        ("allreduce D D", "D D is no placement"),
        ("allreduce -d rocm", "host memory"),
        ("allreduce -Q", "unrecognized"),
    ],
)
def test_flags_that_do_not_apply_are_refused_with_a_remedy(line: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(words)):
        parse_line(line)


def test_buffers_on_a_device_are_for_collectives_that_take_them() -> None:
    assert parse_line("allreduce -d cuda").options.on_device
    assert parse_line("latency -d cuda D D").warning == ""
    assert parse_line("latency -d cuda H H").warning == "H H with -d cuda: the buffers are on the device"
    with pytest.raises(ArgumentError, match="gather: -d cuda: this collective takes no arrays on a device"):
        parse_line("gather -d cuda")
    with pytest.raises(ArgumentError, match="--registered is for collectives of host memory"):
        parse_line("allreduce -d cuda --registered")


# --- files and pictures ----------------------------------------------------------------------------

KEYS = (
    *("collective", "algorithm", "datatype", "bytes", "ranks", "nodes", "iterations", "min_us", "avg_us", "max_us"),
    *("p50_us", "p99_us", "algbw_GBps", "busbw_GBps", "validated", "predicted_us"),
)
WHERE = {
    "machine": {"ranks": "4 ranks on one node (n001)", "processor": "AMD"},
    "mpi": "Open MPI",
    "command": "hpccomm bench",
}


def write_rows(tmp_path: Any, name: str, rows: list[Row]) -> str:
    path = tmp_path / f"{name}.json"
    path.write_text(report.text(WHERE, rows))
    return str(path)


def test_a_file_is_json_with_a_record_a_row() -> None:
    found = json.loads(report.text(WHERE, [ROW, replace(ROW, bytes=16)]))
    assert set(found) == {*WHERE, "rows"}
    assert [row["bytes"] for row in found["rows"]] == [8, 16]
    assert tuple(found["rows"][0])[: len(KEYS)] == KEYS
    assert json.loads(report.text(WHERE, []))["rows"] == []


def test_labels_name_the_fields_in_which_lines_differ(tmp_path: Any) -> None:
    rows = [
        replace(ROW, algorithm=name, bytes=size, p50_us=us * size)
        for size in (8, 16)
        for name, us in (("native", 2.0), ("ring", 1.0))
    ]
    one = {"one": plot.read(write_rows(tmp_path, "one", rows))}
    native, ring = plot.lines(one)
    assert (native.label, ring.label) == ("native", "ring")
    assert (ring.sizes, ring.us, ring.ratio, native.ratio) == ([8, 16], [8.0, 16.0], [2.0, 2.0], [])
    two = {
        **one,
        "other": plot.read(write_rows(tmp_path, "other", [replace(row, in_place=True) for row in rows[1::2]])),
    }
    assert [line.label for line in plot.lines(two)] == ["native, one", "ring, one", "ring, other"]
    assert plot.lines(two)[2].ratio == []


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_is_drawn(tmp_path: Any, ending: str) -> None:
    pytest.importorskip("matplotlib")
    rows = [replace(ROW, algorithm=name, bytes=4 << k) for k in range(10) for name in ("native", "auto", "ring")]
    out = tmp_path / f"out.{ending}"
    plot.draw([write_rows(tmp_path, "a", rows), write_rows(tmp_path, "b", rows[1::3])], str(out))
    assert out.stat().st_size > 1000


@pytest.mark.parametrize("text", ["", "{}", '{"rows": []}', '{"rows": [{"bytes": 4}]}', "[1]"])
def test_a_file_without_measurements_is_refused(tmp_path: Any, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ArgumentError, match="holds no measurements"):
        plot.draw([str(path)], str(tmp_path / "x.png"))
    with pytest.raises(ArgumentError, match="holds no measurements"):
        plot.draw([str(tmp_path / "missing.json")], str(tmp_path / "x.png"))


# --- the table of every collective ----------------------------------------------------------------


def test_bandwidth_counts_the_bytes_that_ranks_must_at_least_read_or_write() -> None:
    def launch(case: str, ranks: int) -> dict[str, Any]:
        rows = [("native", 8, 4.0), ("auto", 8, 2.0), ("native", 1 << 24, 16777.216), ("auto", 1 << 24, 1677.7216)]
        shape = {"collective": case, "ranks": ranks}
        return {"rows": [{**shape, "algorithm": name, "bytes": size, "p50_us": us} for name, size, us in rows]}

    three, five = ({case: [launch(case, ranks)] * 2 for case in ("bcast", "reduce")} for ranks in (3, 5))
    assert "| 8 | **2.00** (2.00–2.00) | **2.00** (2.00–2.00) |" in collectives.ratio_table(three)
    # three ranks: two copies; three vectors read and one written
    assert "| 16777216 | native | 4 | 4 |" in collectives.speed_table(three)
    assert "| 16777216 | auto | 40 | 40 |" in collectives.speed_table(three)
    assert "| 16777216 | auto | 80 | 60 |" in collectives.speed_table(five)


def test_the_tables_of_collectives_have_new_arrays_and_first_calls() -> None:
    rows = [
        {"algorithm": name, "bytes": 8, "p50_us": 1.0, "new_p50_us": us}
        for name, us in (("native", 6.0), ("auto", 2.0))
    ]
    cold = [
        {"algorithm": "native", "process_us": 50.0, "communicator_us": 20.0},
        {"algorithm": "auto", "process_us": 9000.0, "communicator_us": 400.0},
    ]
    found = {"bcast": [{"rows": rows, "cold": cold}], "reduce": [{"rows": rows}]}  # an older file has no first calls
    assert "| 8 | **3.00** (3.00–3.00) | **3.00** (3.00–3.00) |" in collectives.ratio_table(found, "new_p50_us")
    lines = collectives.first_call_table(found).splitlines()
    assert lines[2] == "| first call of the process, native | **0.05** (0.05–0.05) |  |"
    assert lines[5] == "| first call of a new communicator, auto | **0.4** (0.4–0.4) |  |"

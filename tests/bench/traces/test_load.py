"""From a path to a job: what a file is, what is wrong with it, which files of a folder are ranks."""

import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import samples

from bench.traces import recognise
from bench.traces.events import Kind
from bench.traces.load import is_trace, load
from bench.traces.readers.source import PIECE

REAL = Path(__file__).parents[4] / "shared" / "traces"


def refused(path):
    """The one line that says why the path cannot be loaded."""
    with pytest.raises(ValueError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def file(folder, data, name="trace.json"):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_a_file_is_known_by_its_content_whatever_it_is_called(tmp_path, name):
    path = file(tmp_path, samples.SAMPLES[name][1](), "no-suffix")
    assert is_trace(path)
    assert len(load(path).traces[0].events) > 0


def test_benchmark_results_are_no_trace_and_have_their_own_commands(tmp_path):
    path = file(tmp_path, samples.benchmarks())
    assert not is_trace(path)
    assert "perflab report" in refused(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (gzip.compress(b"", mtime=0), "empty once unzipped"),
        (b"hello, this is text", "begins with 'hello, this is t'"),
        (b'{"a": 1}', "keys: a"),
        (b"[1, 2, 3]", "not of trace events"),
        (b"PK\x03\x04" + bytes(50), "zip archive"),
        (b"\x28\xb5\x2f\xfd" + bytes(50), "zstd"),
        (b"SQLite format 3\x00" + bytes(100), "SQLite"),
        (b"\x7b\xa9\x03" + bytes(50), "cProfile"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, data, said):
    assert said in refused(file(tmp_path, data))


def test_what_is_no_file_is_named(tmp_path):
    assert "not there" in refused(tmp_path / "nowhere.json")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "link that leads nowhere" in refused(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer without end
    assert "no ordinary file" in refused(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path):
    path = samples.write(tmp_path, "kineto")
    path.chmod(0)
    assert "Permission denied" in refused(path)


def test_a_truncated_archive_says_where_it_ends(tmp_path):
    whole = samples.zipped(samples.kineto_gpu(steps=400))
    message = refused(file(tmp_path, whole[: len(whole) // 2]))
    assert "truncated" in message
    assert "unzipped byte" in message


def test_a_damaged_archive_is_a_report_and_a_folder_called_gzip_makes_none(tmp_path):
    whole = samples.zipped(samples.kineto_gpu(steps=400))
    assert is_trace(file(tmp_path, whole[:20]))
    (tmp_path / "gzip").mkdir()
    assert not is_trace(file(tmp_path / "gzip", samples.benchmarks(), "results.json"))


@pytest.mark.parametrize("begin", [b"[", b" [ {}, {},\n"])
def test_a_bare_list_is_known_by_its_first_event_whatever_that_begins_with(tmp_path, begin):
    event = samples.slice_("aten::mm", "cpu_op", 1, 1, 5, 3, **{"Input Dims": [[1]], "text": "x" * 600_000})
    path = file(tmp_path, begin + json.dumps(event, sort_keys=True).encode() + b"]")
    assert len(load(path).traces[0].events) == 1


def test_a_large_json_is_searched_once(tmp_path, monkeypatch):
    """Piece by piece, also where the mark lies on the border of two."""
    searched = []

    class Search:
        def search(self, text, *bounds):
            searched.append(len(text))
            return chrome.search(text, *bounds)

    chrome = recognise._CHROME
    monkeypatch.setattr(recognise, "_CHROME", Search())
    before = b'{"a": "' + b"x" * (4 * PIECE - 7 - 3 - 8) + b'", '
    path = file(tmp_path, before + b'"traceEvents": []}')
    assert recognise.recognise(path) == "chrome"
    assert len(searched) == 5
    assert sum(searched) < path.stat().st_size + 5 * 200
    path = file(tmp_path, before[:-2] + b"}")
    assert "no report known here (keys: a)" in refused(path)


@pytest.mark.parametrize(("value", "known"), [(8, 8), (10**12, -1), ("8", 8), (-3, -1), (None, -1)])
def test_a_number_of_ranks_that_can_be_none_is_unknown(tmp_path, value, known):
    document = {"schemaVersion": 1, "traceEvents": [], "distributedInfo": {"rank": 0, "world_size": value}}
    assert load(file(tmp_path, document)).traces[0].world_size == known


def test_half_a_json_says_where_and_reports_nothing_of_it(tmp_path):
    whole = samples.kineto_gpu(steps=400)
    message = refused(file(tmp_path, whole[: len(whole) // 2]))
    assert f"at byte {len(whole) // 2}" in message
    assert "whole events" in message


def test_an_object_that_is_not_closed_behind_its_events(tmp_path):
    whole = samples.kineto_gpu()
    assert "does not close the object" in refused(file(tmp_path, whole.rstrip()[:-1]))


def test_no_json_in_the_middle_says_at_which_byte(tmp_path):
    whole = samples.kineto_gpu(steps=400)
    middle = whole.index(b'"ph"', len(whole) // 2)
    message = refused(file(tmp_path, whole[:middle] + b'!"ph"' + whole[middle + 4 :]))
    at = int(message.rsplit(" ", 1)[1])
    assert abs(at - middle) < 10


@pytest.mark.parametrize("text", [b'{"traceEvents": []}', b"[]", b'{"traceEvents":[{}]}'])
def test_a_trace_without_events_says_that_nothing_was_recorded(tmp_path, text):
    (trace,) = load(file(tmp_path, text)).traces
    assert len(trace.events) == 0
    assert any("nothing was recorded" in note for note in trace.notes)


def test_a_list_may_lack_its_closing_bracket(tmp_path):
    path = file(tmp_path, samples.py_spy().rstrip()[:-1] + b",\n")
    (trace,) = load(path).traces
    assert len(trace.events) == 2
    assert trace.notes == ["the list of events is not closed; the format allows that"]


def bad_events(*events):
    good = samples.slice_("good", "cpu_op", 1, 1, 10, 5)
    return {"schemaVersion": 1, "traceEvents": [good, *events, good]}


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (samples.slice_("x", "cpu_op", 1, 1, 10, -5), "slices of negative duration"),
        ({"ph": "X", "name": "x", "cat": "cpu_op", "ts": 5}, "slices without a valid duration"),
        ({"ph": "X", "name": "x", "cat": "cpu_op", "dur": 5}, "slices without a valid start"),
        (samples.slice_("x", "cpu_op", 1, 1, float("nan"), 5), "slices without a valid start"),
        (samples.slice_("x", "cpu_op", 1, 1, 5, float("inf")), "slices without a valid duration"),
        (samples.slice_("x", "cpu_op", 1, 1, 1e300, 5), "slices without a valid start"),
        (samples.slice_("x", "cpu_op", 1, 1, 5, 9.1e12), "slices longer than 104 days"),
        (samples.slice_("x", "cpu_op", 1, 1, 4e15, 5), "slices more than 52 days from the others"),
        (samples.slice_("x", "cpu_op", 1, 1, [5], 5), "slices without a valid start"),
        ({"ph": "B", "name": "x", "ts": 5, "pid": 1, "tid": 1}, "slices without an end"),
        ({"ph": "E", "ts": 5, "pid": 1, "tid": 1}, "ends of slices that have no beginning"),
        ({"ph": "C", "name": "x", "ts": 5}, "counter samples"),
        ({"ph": "?"}, "events of an unknown phase"),
        ("a string", "events that are no objects"),
        (None, "events that are no objects"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_counted(tmp_path, event, reason):
    (trace,) = load(file(tmp_path, bad_events(event))).traces
    assert [trace.names[name] for name in trace.events.name] == ["good", "good"]
    assert trace.dropped[reason] == 1
    assert (trace.events.start.tolist(), trace.events.duration.tolist()) == ([0, 0], [5000, 5000])


def test_numbers_in_strings_are_numbers_and_a_wrong_field_costs_only_itself(tmp_path):
    strings = samples.slice_("kernel", "kernel", "0", "7", "12", "3.5", correlation="77", device="0")
    wrong = samples.slice_("kernel", "kernel", 0, 7, 20, 3, correlation={"a": 1})
    (trace,) = load(file(tmp_path, bad_events(strings, wrong))).traces
    kernels = trace.events.select(trace.events.kind == Kind.KERNEL)
    assert kernels.start.tolist() == [2000, 10_000]
    assert kernels.duration.tolist() == [3500, 3000]
    assert kernels.correlation.tolist() == [77, -1]
    assert trace.dropped["fields of a wrong type"] == 1


def test_bytes_that_are_no_utf8_and_half_a_surrogate_pair_stay_printable(tmp_path):
    text = json.dumps(bad_events(samples.slice_("b\ud800d", "cpu_op", 1, 1, 20, 1))).encode()
    (trace,) = load(file(tmp_path, text.replace(b'"good"', b'"g\xff\xfed"', 1))).traces
    assert len(trace.events) == 3
    for name in trace.names:
        name.encode()
    assert any("not strict JSON" in note for note in trace.notes)


def test_events_that_hold_long_lists_of_objects_are_read_too(tmp_path, monkeypatch):
    """Nearly every "},{" lies inside one; the whole file is larger than an event may be."""
    monkeypatch.setattr("bench.traces.readers.chrome_stream.LARGEST", 3 << 20)
    monkeypatch.setattr("bench.traces.readers.chrome_stream._SUSPECT", 2 << 20)
    lists = {"frames": [{"line": line} for line in range(1000)]}
    events = [samples.slice_("a", "cpu_op", 1, 1, n, 1, **lists) for n in range(300)]
    path = file(tmp_path, {"traceEvents": events, "schemaVersion": 1})
    assert path.stat().st_size > 4 << 20
    (trace,) = load(path).traces
    assert (len(trace.events), trace.notes) == (300, [])


def test_brackets_nested_without_end_are_refused(tmp_path):
    deep = b'{"traceEvents":[{"ph":"X","args":' + b"[" * 200_000 + b"]" * 200_000 + b"}]}"
    assert "nested" in refused(file(tmp_path, deep))


def test_times_since_1970_keep_their_nanoseconds(tmp_path):
    start = 1_700_000_000_000_000
    events = [
        f'{{"ph":"X","name":"a","cat":"cpu_op","ts":{start}.{n:03},"dur":0.001}}' for n in range(0, 999, 37)
    ]
    text = '{"schemaVersion":1,"traceEvents":[' + ",".join(events) + "]}"
    (trace,) = load(file(tmp_path, text.encode())).traces
    assert trace.origin_ns == start * 1000
    assert trace.events.start.tolist() == list(range(0, 999, 37))


def test_parts_are_cut_between_events_also_where_braces_stand_in_names_and_lists(tmp_path):
    """A megabyte ends everywhere in this file: in names that look like JSON, in lists of objects."""
    tricky = {"a": [{"x": 1}, {"y": "}, {"}], "b": "},\n  {"}
    events = [
        {**samples.slice_(f'n{n % 7}}}, {{"ph', "cpu_op", 1, 1, n, 1), "args": tricky} for n in range(20_000)
    ]
    before, after = (
        {"note": '"traceEvents": [', "deeper": {"traceEvents": [{}]}},
        {"z": [{}, {"traceEvents": [1]}]},
    )
    path = file(tmp_path, before | {"traceEvents": events} | after)
    assert path.stat().st_size > 2 << 20
    (trace,) = load(path).traces
    assert len(trace.events) == 20_000
    assert trace.events.start.tolist() == [n * 1000 for n in range(20_000)]
    assert len(trace.names) == 7


@pytest.mark.parametrize(
    ("repeated", "said"),
    [
        (b" " * (1 << 20), "no end of an event within 64 MiB"),
        (b'{"ph":"i","name":"' + b"a" * (1 << 20) + b'"},', "expands to more than 400 times its size"),
    ],
)
def test_an_archive_that_expands_without_end_is_stopped(tmp_path, repeated, said):
    """Members of an archive may follow one another: 400 MB from 400 kB, with less memory than that."""
    path = file(tmp_path, gzip.compress(b'{"traceEvents":[') + 400 * gzip.compress(repeated), "bomb.json.gz")
    code = (  # ru_maxrss would be that of the process that started this one, where it is larger
        "import sys; from bench.traces.load import load\n"
        "try: load(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(peak.split()[1]) >> 10)"
    )
    limit = 2 << 30
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    message, peak_mb = done.stdout.strip().split("\n")
    assert said in message
    assert str(path) in message
    assert int(peak_mb) < 300


def test_slices_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    path = samples.write(tmp_path, "kineto")
    monkeypatch.setattr("bench.traces.readers.columns.memory_budget", lambda: 1000)
    assert "do not fit into the memory" in refused(path)


class TestFolders:
    def test_ranks_are_in_order_and_a_broken_one_does_not_hide_the_others(self, tmp_path):
        for rank in (2, 0):
            file(tmp_path, samples.kineto_gpu(rank=rank), f"host_{9 - rank}.json")
        file(tmp_path, b"", "rank1.json")
        job = load(tmp_path)
        assert [trace.rank for trace in job.traces] == [0, 2]
        ((path, why),) = job.failures
        assert path.endswith("rank1.json")
        assert "empty" in why

    def test_ranks_come_from_names_where_files_do_not_say(self, tmp_path):
        for name in ("a_rank10.json", "a_rank2.json"):
            file(tmp_path, samples.viztracer(), name)
        assert [trace.rank for trace in load(tmp_path).traces] == [2, 10]

    def test_else_from_the_order_of_names_and_that_is_said(self, tmp_path):
        for name in ("b.json", "a.json"):
            file(tmp_path, samples.viztracer(), name)
        job = load(tmp_path)
        assert [Path(trace.source).name for trace in job.traces] == ["a.json", "b.json"]
        assert [trace.rank for trace in job.traces] == [0, 1]
        assert any("in order of their names" in note for note in job.notes)

    def test_a_rank_that_is_there_twice_and_ranks_that_are_missing_are_said(self, tmp_path):
        for name in ("a.json", "b.json"):
            file(tmp_path, samples.kineto_gpu(rank=1), name)
        notes = " ".join(load(tmp_path).notes)
        assert "rank 1 is there 2 times: a.json, b.json" in notes
        assert "1 of 2 ranks are there" in notes

    def test_what_is_no_report_is_left_out_and_said(self, tmp_path):
        file(tmp_path, samples.kineto_gpu())
        file(tmp_path, b"notes", "README.md")
        file(tmp_path, samples.benchmarks(), "results.json")
        file(tmp_path, {"hidden": 8, "dropout": float("nan")}, "config.json")
        file(tmp_path, [1, 2, 3], "numbers.json")
        job = load(tmp_path)
        assert len(job.traces) == 1
        assert not job.failures
        assert any("README.md, config.json, numbers.json and 1 more" in note for note in job.notes)

    @pytest.mark.parametrize("text", ["[null, 1]", "[{}, {}]", "[{} , {}, 3]"])
    def test_a_list_of_anything_else_is_no_broken_report(self, tmp_path, text):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(recognise.SomethingElse, match="not of trace events"):
            recognise.recognise(tmp_path / "list.json")

    def test_what_is_cut_off_is_a_broken_report(self, tmp_path):
        file(tmp_path, samples.kineto_gpu())
        file(tmp_path, b'{"hidden": 8, "dro', "config.json")
        file(tmp_path, b'[{"name": "x", "ca', "list.json")
        assert [Path(path).name for path, _ in load(tmp_path).failures] == ["config.json", "list.json"]

    def test_jax_writes_one_recording_in_three_forms(self, tmp_path):
        below = tmp_path / "plugins" / "profile" / "2026_11_26_21_30_05"
        below.mkdir(parents=True)
        samples.write(below, "xplane")
        samples.write(below, "jax json")
        file(below, samples.jax_json(), "perfetto_trace.json.gz")
        job = load(tmp_path)
        assert [Path(trace.source).name for trace in job.traces] == ["vm.xplane.pb"]
        assert any("left out: perfetto_trace.json.gz, vm.trace.json.gz" in note for note in job.notes)

    def test_of_dated_recordings_the_newest_is_taken_and_that_is_said(self, tmp_path):
        for day in ("2026_11_26_21_30_05", "2026_11_27_01_00_00"):
            (tmp_path / day).mkdir()
            samples.write(tmp_path / day, "jax json")
        job = load(tmp_path)
        assert "2026_11_27" in job.traces[0].source
        assert any("newest of 2" in note for note in job.notes)

    def test_a_folder_for_each_rank_is_one_job(self, tmp_path):
        for rank in (0, 1):
            (tmp_path / f"rank{rank}").mkdir()
            file(tmp_path / f"rank{rank}", samples.kineto_gpu(rank=rank))
        assert [trace.rank for trace in load(tmp_path).traces] == [0, 1]

    def test_folders_of_several_jobs_are_not_mixed(self, tmp_path):
        for job in ("before", "after"):
            (tmp_path / job).mkdir()
            for rank in (0, 1):
                file(tmp_path / job, samples.kineto_gpu(rank=rank), f"rank{rank}.json")
        assert "name one of its subfolders (after, before)" in refused(tmp_path)

    def test_a_folder_without_reports_says_so(self, tmp_path):
        assert "holds no profiler report" in refused(tmp_path)
        assert not is_trace(tmp_path)
        (tmp_path / "loop").symlink_to(tmp_path)  # not followed
        assert "holds no profiler report" in refused(tmp_path)

    def test_a_folder_of_broken_reports_says_what_is_wrong(self, tmp_path):
        file(tmp_path, b"", "rank0.json")
        assert "rank0.json is empty" in refused(tmp_path)


def real_traces():
    return sorted(p for p in REAL.rglob("*") if p.suffix in (".gz", ".pb")) if REAL.exists() else []


class Marked(msgspec.Struct):
    ph: str = ""


class Document(msgspec.Struct):
    traceEvents: list[Marked]


@pytest.mark.skipif(not real_traces(), reason="the real traces are not beside the project (../shared/traces)")
def test_every_real_trace_is_read_and_all_of_its_events_are_accounted_for():
    for path in real_traces():
        (trace,) = load(path).traces
        assert len(trace.events) > 0, path
        assert not trace.unclassified, path
        if path.suffix == ".gz":
            events = msgspec.json.decode(gzip.decompress(path.read_bytes()), type=Document).traceEvents
            labels = sum(event.ph == "M" for event in events)
            read = len(trace.events) + sum(trace.dropped.values()) + len(trace.memory.time) + labels
            assert read == len(events), path

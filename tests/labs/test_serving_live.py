"""The serving lab on real Ray actors: same tokens, a killed process, load, and the command with Ctrl-C."""

import asyncio
import concurrent.futures
import gc
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest
from kept import Kept
from serving_workers import Witness

from labs.lab import find
from labs.serving import LAB, actors, calibrating, fleet, live
from labs.serving.config import Config
from labs.serving.engine import Shape
from labs.serving.layout import POLICIES
from labs.serving.model import load_of
from labs.serving.request import Request
from labs.serving.trace import arrivals

pytestmark = pytest.mark.ray
TINY = Config(width=64, layers=2, context=256, blocks=64, rate=40.0, prompt=48, output=8, requests=8)


@pytest.fixture(scope="module")
def started(two_ray_workers):
    """(the workers, whether the collector still looks at what was there before they were)."""
    assert TINY.workers == two_ray_workers.workers
    before = Witness()
    assert before.looked_at
    yield fleet.fleet(TINY, Kept()), before.looked_at
    fleet.shut_down()


@pytest.fixture(scope="module")
def workers(started):
    return started[0]


def run_twice(address, config=TINY):
    recorder = Kept()
    step = find(LAB, config, address).setup(config, recorder)
    return step(), step(), recorder.values


def test_every_policy_serves_the_same_load_with_the_same_tokens(workers):
    outputs, again = {}, {}
    for policy in POLICIES:
        address = f"live/{policy}"
        outputs[address], again[address], values = run_twice(address)
        assert len(values["ttft_s"]) == TINY.requests  # the first call is in no figure
        assert values["little_off_fraction"][-1] < 0.05
        assert (values["handed_B"][-1] > 0) == (policy == "disaggregated")
        assert values["itl_max_s"][-1] >= values["itl_p99_s"][-1] >= values["itl_p50_s"][-1] > 0
    checks = LAB.check(TINY, outputs)
    assert len(checks) == 2 * len(POLICIES)
    assert [check for check in checks if not check.passed] == []
    for found in (outputs, again):
        tokens = [each["tokens"] for each in found.values()]
        assert tokens[0] == tokens[1] == tokens[2]
    assert outputs["live/chunked"]["tokens"] != again["live/chunked"]["tokens"]  # another block of load


def test_the_collector_stops_nobody_who_is_served(started, monkeypatch):
    """Neither to look at what was there before, nor at the reports that are kept meanwhile."""
    workers, looked_at = started
    assert not looked_at
    enabled = []
    submit = workers.service.submit

    def watched(request):
        enabled.append(gc.isenabled())
        return submit(request)

    monkeypatch.setattr(workers.service, "submit", watched)
    workers.serve(TINY.layout("chunked"), arrivals(load_of(TINY), 4))
    assert enabled == [False] * 4
    assert gc.isenabled()


def test_the_proof_sees_a_wrong_token_a_missing_request_and_a_leak(workers):
    right = run_twice("neighbours/together")[0]
    assert all(check.passed for check in LAB.check(TINY, {"neighbours/together": right}))
    number, tokens = next(iter(right["tokens"].items()))
    for wrong in (
        {**right, "tokens": {**right["tokens"], number: [*tokens[:-1], (tokens[-1] + 1) % 256]}},
        {**right, "tokens": {**right["tokens"], number: tokens[:-1]}},
        {**right, "tokens": {key: row for key, row in right["tokens"].items() if key != number}},
        {**right, "leaked": 1},
    ):
        assert not all(check.passed for check in LAB.check(TINY, {"neighbours/together": wrong}))


def test_a_round_in_which_sequences_never_met_records_no_step(workers, monkeypatch):
    monkeypatch.setattr(live, "_decode_steps", lambda block: [])
    first, second, values = run_twice("neighbours/alone")
    assert "round_decode_step_s" not in values
    assert first["tokens"] == second["tokens"] != {}


async def tokens_of(service, worker=None, sent=None):
    """(tokens of six requests, the process that was sent a signal once some of them were there)."""

    async def one(request):
        return [token.token async for token, _ in service.submit(request)]

    requests = [Request(number, tuple(range(number, number + 40)), 60) for number in range(6)]
    found, process = [asyncio.ensure_future(one(request)) for request in requests], None
    if worker is not None:
        process = await service.workers[worker].process()
        while service.counters.tokens < 12:
            await asyncio.sleep(0.001)
        os.kill(process, sent)
    return await asyncio.gather(*found), process


def test_a_killed_process_is_replaced_and_its_requests_finish_with_the_same_tokens(workers):
    service = workers.service
    workers.run(service.change(TINY.layout("disaggregated")))
    expected, _ = workers.run(tokens_of(service), 60)
    workers.run(service.change(TINY.layout("disaggregated")))
    assert workers.run(tokens_of(service, 1, signal.SIGKILL), 60)[0] == expected
    assert service.counters.lost_workers == 1
    assert service.counters.retried > 0
    wait_for_all_workers(service)
    assert workers.run(service.held(), 30) == 0


def test_a_process_that_is_stopped_is_replaced_and_its_requests_finish(workers, monkeypatch):
    """It neither ends nor answers; and nobody posts it anything that would be left unanswered."""
    monkeypatch.setattr(actors, "CALL_S", 1.0)
    service = workers.service
    workers.run(service.change(TINY.layout("chunked")))
    expected, _ = workers.run(tokens_of(service), 60)
    workers.run(service.change(TINY.layout("chunked")))
    tokens, process = workers.run(tokens_of(service, 0, signal.SIGSTOP), 60)
    assert tokens == expected
    assert service.counters.lost_workers == 1
    wait_for_all_workers(service)
    end = time.monotonic() + 30
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "waited 30 s for the process to end"
        time.sleep(0.05)


@pytest.mark.proof
def test_a_report_that_cannot_be_read_is_the_end_of_its_worker(workers, monkeypatch):
    service = workers.service
    loads, spoiled = actors.pickle.loads, []

    def spoil(content):
        if not spoiled and service.counters.tokens > 3:
            spoiled.append(content)
            raise AttributeError("no such class here")
        return loads(content)

    workers.run(service.change(TINY.layout("chunked")))
    expected = workers.run(tokens_of(service), 60)
    workers.run(service.change(TINY.layout("chunked")))
    monkeypatch.setattr(actors.pickle, "loads", spoil)
    assert workers.run(tokens_of(service), 60) == expected
    assert spoiled
    assert service.counters.lost_workers == 1
    wait_for_all_workers(service)


def wait_for_all_workers(service):
    end = time.monotonic() + 30
    while not all(service.dispatcher.alive):
        assert time.monotonic() < end, "waited 30 s for the worker's successor"
        time.sleep(0.05)


def test_calibration_finds_costs_and_is_refused_on_a_busy_host(workers):
    """Costs are seconds, none negative; what is predicted with them is of the right size."""
    found = calibrating.fitted(calibrating.run_blocks(workers, TINY))
    assert min(vars(found.costs).values()) >= 0
    for shape in (Shape(prompts=1, new=32, pairs=32 * 33 // 2), Shape(decodes=1, context=32)):
        assert 1e-5 < found.costs.seconds(shape) < 0.2  # some of its terms may be lost in what else runs here
    assert found.wires.submit > 0
    assert found.wires.travel > 0
    assert calibrating.best_chunk(TINY, found) in (32, 64, 128, 256)
    others = max(1, psutil.cpu_count() // 3)
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        refused, blocks = calibrating.calibrate(workers, TINY)
    finally:
        for each in spinning:
            each.kill()
            each.wait()
    assert isinstance(refused, str)
    assert "of the cores" in refused
    assert not blocks


@pytest.mark.proof
def test_what_is_not_finished_is_the_exit_status():
    """A second Ctrl-C does not wait for it; who asked is told."""
    command = [sys.executable, "-m", "bench.cli", "serve", "--workers", "1", "--port", "0"]
    command += ["--blocks", "1024", "--set", "width=64", "--set", "layers=2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        url = process.stdout.readline().split()[2]
        body = json.dumps({"prompt": ["hello"] * 16, "max_tokens": 1000, "temperature": 0}).encode()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(status_of, urllib.request.Request(url, body))
            metrics = url.removesuffix("/v1/completions") + "/metrics"
            end = time.monotonic() + 30
            while "requests_in_house 16" not in urllib.request.urlopen(metrics, timeout=30).read().decode():
                assert time.monotonic() < end, "waited 30 s for the requests to arrive"
            for _ in range(2):
                os.kill(process.pid, signal.SIGINT)
                time.sleep(0.1)
            assert process.wait(30) == 1
            assert answer.result(30) != 200
    finally:
        if process.poll() is None:
            process.kill()
        process.stdout.close()
        process.wait(10)


def status_of(request):
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_the_command_serves_and_leaves_nothing_behind_after_ctrl_c():
    command = [sys.executable, "-m", "bench.cli", "serve", "--workers", "1", "--port", "0"]
    command += ["--blocks", "64", "--set", "width=64", "--set", "layers=2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    family = []
    try:
        line = process.stdout.readline()
        assert line.startswith("perflab serve: http://127.0.0.1:"), line + process.stdout.read()
        url = line.split()[2]
        body = json.dumps({"prompt": "hello", "max_tokens": 6, "temperature": 0}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 6
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(30) == 0
        assert process.stdout.read() == ""
        _, left = psutil.wait_procs(family, timeout=10)
        assert [each.name() for each in left if each.is_running()] == []
    finally:
        for each in [psutil.Process(process.pid), *family] if process.poll() is None else family:
            if each.is_running():
                each.kill()
        process.stdout.close()
        process.wait(10)

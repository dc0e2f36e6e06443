"""The serving lab's service: accepted is finished, whatever happens to workers; its endpoint as a client sees
it."""

import asyncio
import concurrent.futures
import http.client
import json
import pickle
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving_workers import MODEL, Served, SlowWorker, ThreadWorker, Witness, layout, service_of

from labs.serving import actors
from labs.serving import serve as serving
from labs.serving.actors import LostHandOver, LostWorker
from labs.serving.completion_text import Text
from labs.serving.dispatch import Dispatcher, Overloaded
from labs.serving.request import HandOver, Request, Token
from labs.serving.serve import bound, options_of
from labs.serving.service import ATTEMPTS, STARTS, Closing, Unfinished
from labs.serving.worker import Add, Receive, Reset

PROMPTS = [tuple((7 * n + k) % 256 for k in range(10 + 9 * n)) for n in range(6)]


@pytest.fixture(scope="module", autouse=True)
def loaded_kernel():
    """Threads of one process must not load a compiled kernel all at once; a worker's process has one
    engine."""
    from labs.serving.paged import PagedGPT
    from labs.serving.policies import Running, Work
    from labs.serving.weights import serving_model

    executor = PagedGPT(serving_model(MODEL.width, MODEL.layers, MODEL.context), 1, 4)
    executor.run([Work(Running(Request(0, (1,), 1), 0.0, [1], blocks=[0]), 0, 1)])


@pytest.fixture(scope="module")
def expected():
    """What the model writes for each prompt, 30 tokens, one prompt at a time."""
    import torch

    from labs.serving.weights import serving_model

    model = serving_model(MODEL.width, MODEL.layers, MODEL.context)
    return [model.generate(torch.tensor([p]), 30)[0, len(p) :].tolist() for p in PROMPTS]


async def served(service, output=30):
    """All prompts at once; each one's tokens."""

    async def one(number, prompt):
        stream = service.submit(Request(number, prompt, output))
        return [token.token async for token, _ in stream]

    return await asyncio.wait_for(asyncio.gather(*(one(n, p) for n, p in enumerate(PROMPTS))), 60)


def run(work):
    return asyncio.run(work)


# --- the service -------------------------------------------------------------------------------------


def test_every_layout_writes_the_same(expected):
    async def all_of_them():
        async with service_of(layout("prefill_first", workers=3)) as service:
            found = [await served(service)]
            for policy, prefill in (("chunked", 1), ("disaggregated", 1), ("disaggregated", 2)):
                await service.change(layout(policy, workers=3, prefill=prefill))
                found.append(await served(service))
                assert service.counters.finished == len(PROMPTS)
                assert await service.held() == 0
                assert service.counters.hand_overs == (len(PROMPTS) if policy == "disaggregated" else 0)
            return found

    assert run(all_of_them()) == [expected] * 4


@pytest.mark.parametrize(("policy", "victim"), [("chunked", 0), ("disaggregated", 0), ("disaggregated", 1)])
def test_a_lost_workers_requests_are_finished_elsewhere_with_the_same_tokens(policy, victim, expected):
    async def with_a_loss():
        async with service_of(layout(policy), start=SlowWorker) as service:

            async def kill():
                # One that only reads is soon done with these prompts: it is lost at once, the others on the
                # way.
                reads = policy == "disaggregated" and victim == 0
                while service.counters.accepted < len(PROMPTS) or (
                    not reads and service.counters.tokens < 20
                ):
                    await asyncio.sleep(0)
                service.workers[victim].kill()

            killing = asyncio.ensure_future(kill())
            found = await served(service)
            await killing
            assert service.counters.lost_workers == 1
            assert service.counters.retried > 0
            assert service.counters.finished == len(PROMPTS)
            return found

    assert run(with_a_loss()) == expected


def test_keys_that_are_lost_on_their_way_are_computed_again(expected):
    class Losing(ThreadWorker):
        losses = 2

        def __init__(self):
            super().__init__()
            self.worker.fetch = self.fetched

        def fetched(self, sent):
            if Losing.losses:
                Losing.losses -= 1
                raise LostHandOver("its sender is gone")
            return sent

    async def with_losses():
        async with service_of(layout("disaggregated"), start=Losing) as service:
            found = await served(service)
            assert service.counters.retried > 0
            assert service.counters.hand_overs > len(PROMPTS)
            assert await service.held() == 0
            return found

    assert run(with_losses()) == expected


def test_a_worker_that_cannot_be_started_ends_every_stream_with_a_reason():
    class Doomed(ThreadWorker):
        made = 0

        def __init__(self):
            super().__init__()
            Doomed.made += 1
            if Doomed.made > 1:
                self.kill()

    async def doomed():
        async with service_of(layout(workers=1), start=Doomed) as service:
            stream = service.submit(Request(0, PROMPTS[0], 200))
            service.workers[0].kill()
            with pytest.raises(Closing, match="was started 5 times and lost each time"):
                await asyncio.wait_for(anext(aiter(stream)), 30)
            with pytest.raises(Closing):
                service.submit(Request(1, PROMPTS[0], 2))

    run(doomed())


@pytest.mark.parametrize("error", [LostWorker("no answer for 60 s"), ValueError("cannot be sent")])
def test_a_worker_that_does_not_take_a_message_is_replaced(error, expected):
    """Nobody else knows what was in it."""

    class Deaf(ThreadWorker):
        refuses = 1

        async def put(self, messages):
            if Deaf.refuses and any(isinstance(each, Add) for each in messages):
                Deaf.refuses -= 1
                raise error
            await super().put(messages)

    async def with_a_loss():
        async with service_of(layout(), start=Deaf) as service:
            found = await served(service)
            assert service.counters.lost_workers == 1
            return found

    assert run(with_a_loss()) == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_messages_come_over_the_workers_socket_and_one_that_cannot_be_read_ends_it(expected):
    """Its end is what the service hears of; the process of an actor says in its log why."""
    secret = b"s" * actors.SECRET_BYTES
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(30)
        actor = actors.WorkerActor(MODEL, time.perf_counter, listening.getsockname(), secret)
        connection, _ = listening.accept()
    with connection, connection.makefile("rb") as stream:
        connection.settimeout(30)
        assert stream.read(len(secret)) == secret
        messages = [Reset(layout(), "both", 7), Add(Request(0, PROMPTS[0], 30))]
        connection.sendall(actors._framed(messages[:1]) + actors._framed(messages[1:]))
        tokens = []
        while len(tokens) < 30:
            (size,) = actors._SIZE.unpack(stream.read(actors._SIZE.size))
            report = pickle.loads(stream.read(size))
            assert report.generation == 7
            tokens += [event.token for event in report.events]
        assert tokens == expected[0]
        assert actor.held(2) == 0
        with ThreadPoolExecutor(1) as pool:  # what was sent may not have come yet
            held = pool.submit(actor.held, 3)
            with pytest.raises(TimeoutError):
                held.result(0.1)
            connection.sendall(actors._framed([]))
            assert held.result(30) == 0
        connection.sendall(actors._SIZE.pack(3) + b"no!")
        assert stream.read() == b""


def test_a_role_that_nobody_can_fill_ends_every_stream_with_a_reason():
    class Failing(ThreadWorker):
        """Those that write (the second and all later ones) are lost with the first hand-over."""

        made = 0

        def __init__(self):
            super().__init__()
            Failing.made += 1
            self.writes = Failing.made > 1

        async def put(self, messages):
            if self.writes and any(isinstance(each, Receive) for each in messages):
                self.kill()
            await super().put(messages)

    async def failing():
        async with service_of(layout("disaggregated"), start=Failing) as service:
            for number in range(2 * STARTS):
                with pytest.raises((Closing, Unfinished)):
                    async for _ in service.submit(Request(number, PROMPTS[0], 30)):
                        pass
                if service.failure is not None:
                    break
            assert "was started 5 times and lost each time" in str(service.failure)
            assert service.dispatcher.alive == [True, False]

    run(asyncio.wait_for(failing(), 60))


@pytest.mark.alone
def test_a_request_that_kills_its_workers_is_given_up_and_the_others_are_served(expected):
    poison = 66

    class Mortal(ThreadWorker):
        async def put(self, messages):
            if any(isinstance(each, Add) and each.request.number == poison for each in messages):
                self.kill()
            await super().put(messages)

    async def poisoned():
        async with service_of(layout(workers=3), start=Mortal) as service:
            doomed = service.submit(Request(poison, PROMPTS[0], 30))
            found = await served(service)
            with pytest.raises(Unfinished, match=f"was lost with a worker {ATTEMPTS} times"):
                async for _ in doomed:
                    pass
            assert service.counters.failed == 1
            assert await served(service) == found
            assert all(service.dispatcher.alive)
            return found

    assert run(asyncio.wait_for(poisoned(), 60)) == expected


def test_a_worker_may_be_lost_any_number_of_times_if_it_works_in_between(expected):
    async def often():
        async with service_of(layout(workers=1)) as service:
            for _ in range(STARTS + 2):
                service.workers[0].kill()
                assert await served(service) == expected
            return service.counters.lost_workers

    assert run(asyncio.wait_for(often(), 90)) == STARTS + 2


def test_a_full_house_refuses_and_loses_nothing(expected):
    async def crowded():
        async with service_of(layout(), limit=len(PROMPTS)) as service:
            found = asyncio.ensure_future(served(service))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for number in range(100, 120):
                with pytest.raises(Overloaded, match="6 requests are being served already"):
                    service.submit(Request(number, PROMPTS[0], 3))
            assert service.counters.refused == 20
            return await found

    assert run(crowded()) == expected


def test_closing_finishes_what_was_accepted_and_then_refuses():
    async def closing():
        async with service_of(layout()) as service:
            found = asyncio.ensure_future(served(service))
            while service.counters.tokens < 3:
                await asyncio.sleep(0.001)
            assert await service.close(30.0) == 0
            with pytest.raises(Closing, match="is shutting down"):
                service.submit(Request(99, PROMPTS[0], 1))
            return await found

    assert all(len(tokens) == 30 for tokens in run(closing()))


def test_what_does_not_fit_is_refused_before_it_is_accepted():
    async def too_long():
        async with service_of(layout(blocks=16)) as service:
            with pytest.raises(ValueError, match="room for 65 tokens of keys and values; the cache has 64"):
                service.submit(Request(0, (1,) * 60, 6))
            assert service.counters.accepted == 0

    run(too_long())


# --- the dispatcher ----------------------------------------------------------------------------------


def test_the_least_loaded_worker_is_chosen():
    dispatcher = Dispatcher(["both", "both"], 10)
    assert [dispatcher.submit(Request(n, (1,) * size, 2)) for n, size in enumerate((90, 10, 10, 10))] == [
        0,
        1,
        1,
        1,
    ]
    dispatcher.token(Token(0, 5, 0))  # read: only one more is to be written
    assert dispatcher.submit(Request(9, (1,), 2)) == 0


def test_tokens_count_once_and_in_their_place():
    dispatcher = Dispatcher(["prefill", "decode"], 10)
    assert dispatcher.submit(Request(0, (1, 2), 3)) == 0
    assert dispatcher.token(Token(0, 9, 0))
    assert not dispatcher.token(Token(0, 9, 0))  # once more, from a worker that was lost
    assert dispatcher.hand_over(HandOver(Request(0, (1, 2, 9), 3, written=1), None, 0)) == 1
    assert dispatcher.lost(1) == [0]
    worker, rest = dispatcher.retry(0)
    assert (worker, rest.prompt, rest.written, rest.total) == (0, (1, 2, 9), 1, 5)
    assert dispatcher.token(Token(0, 8, 1))
    assert dispatcher.token(Token(0, 7, 2, "length"))
    assert not dispatcher.requests
    assert not dispatcher.token(Token(0, 7, 3))


# --- the endpoint ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint():
    one = Served(layout(blocks=128), limit=300)
    yield one
    one.close()


def post(endpoint, body, key="", wait_s=60):
    """(status, parsed answer)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(endpoint.url + "/v1/completions", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=wait_s) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def text_of(tokens):
    return bytes(tokens).decode(errors="replace")


def test_openais_own_client_can_call_it(endpoint, expected):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=endpoint.url + "/v1", api_key="none", max_retries=0, timeout=60)
    assert [each.id for each in client.models.list()] == ["model"]
    whole = client.completions.create(model="model", prompt=list(PROMPTS[1]), max_tokens=30, temperature=0)
    assert whole.choices[0].text == text_of(expected[1])
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPTS[1]), 30)
    chunks = list(
        client.completions.create(
            model="model",
            prompt=[list(p) for p in PROMPTS[:3]],
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [""] * 3
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [text_of(tokens) for tokens in expected[:3]]
    assert chunks[-1].usage.completion_tokens == 90
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.completions.create(model="other", prompt="x")
    client.close()


def test_noise_is_the_seeds(endpoint):
    texts = [
        post(endpoint, {"prompt": "abc", "temperature": 1.5, "seed": seed, "max_tokens": 20})[1]["choices"][
            0
        ]["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    asked = {"prompt": "abc", "temperature": 1.5, "max_tokens": 20}
    assert post(endpoint, asked)[1]["choices"] != post(endpoint, asked)[1]["choices"]  # of no seed: any


def test_the_least_temperature_takes_the_likeliest(endpoint):
    texts = [
        post(endpoint, {"prompt": "abc", "temperature": value, "max_tokens": 20})[1]["choices"][0]["text"]
        for value in (0, 1e-40)
    ]
    assert texts[0] == texts[1]


def test_a_stop_sequence_ends_the_text_before_it(endpoint, expected):
    tokens = expected[2]
    stop = bytes(tokens[10:12])
    if any(byte > 127 for byte in stop):  # the API takes stops as text
        place = next(i for i in range(3, 30) if tokens[i] < 128)
        stop = bytes(tokens[place : place + 1])
    status, answer = post(
        endpoint, {"prompt": list(PROMPTS[2]), "max_tokens": 30, "temperature": 0, "stop": stop.decode()}
    )
    assert status == 200
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == bytes(tokens)[: bytes(tokens).index(stop)].decode(errors="replace")
    endpoint.wait_until_empty()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "the body is no JSON"),
        (b"\xff\xfe", 400, "the body is no JSON"),
        (b"[1]", 400, "must be an object"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({}, 400, "prompt must be a string"),
        ({"prompt": 5}, 400, "prompt must be a string"),
        ({"prompt": [1, 256]}, 400, "from 0 to 255"),
        ({"prompt": ["a"] * 17}, 400, "17 prompts in one request"),
        ({"prompt": "x" * 10**6}, 400, "a prompt of 1000000 tokens and 16 more need room for"),
        ({"prompt": "x" * 300}, 400, "315 tokens of keys and values; the model's context has 256"),
        (b'{"prompt": "' + b"x" * (5 * 2**20) + b'"}', 413, "more than 4194304 bytes"),
        ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens=-1 must be a whole number"),
        ({"prompt": "x", "max_tokens": True}, 400, "max_tokens=True"),
        ({"prompt": "x", "max_tokens": 10**6}, 400, "need room for 1000000 tokens"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature=-1"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "temperature=nan"),
        ({"prompt": "x", "n": 2}, 400, "n=2 is not supported"),
        ({"prompt": "x", "stop": ["a"] * 5}, 400, "at most 4"),
        ({"prompt": "x", "stop": ""}, 400, "1 to 64 bytes"),
        ({"prompt": "x", "stream": "yes"}, 400, "must be true or false"),
        ({"prompt": "x", "model": "other"}, 404, "there is no model 'other'"),
    ],
    ids=range(22),
)
def test_wrong_requests_are_answered_with_what_is_wrong(endpoint, body, status, message):
    found, answer = post(endpoint, body)
    assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
    assert message in answer["error"]["message"]


def test_one_of_several_prompts_that_does_not_fit_takes_none_with_it(endpoint):
    status, _ = post(endpoint, {"prompt": ["ok", "x" * 5000]})
    assert status == 400
    endpoint.wait_until_empty()


@pytest.fixture
def slow():
    one = Served(layout(blocks=128), start=SlowWorker)
    yield one
    one.close()


def test_a_client_that_hangs_up_frees_its_blocks_and_the_others_are_served(slow, expected):
    body = json.dumps({"prompt": "x" * 100, "max_tokens": 150, "temperature": 0, "stream": True})
    silent = json.dumps({"prompt": "y" * 100, "max_tokens": 150, "temperature": 0})
    for text, streamed in ((body, True), (body, True), (silent, False)):
        client = socket.create_connection(("127.0.0.1", slow.port), timeout=30)
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
            % (len(text), text.encode())
        )
        if streamed:
            assert b"200 OK" in client.recv(100)
        else:
            time.sleep(0.05)
        client.close()
    _, answer = post(slow, {"prompt": list(PROMPTS[0]), "max_tokens": 30, "temperature": 0})
    assert answer["choices"][0]["text"] == text_of(expected[0])
    slow.wait_until_empty()
    assert slow.service.counters.aborted == 3


@pytest.fixture
def small():
    one = Served(layout(blocks=128), limit=8, start=SlowWorker)
    yield one
    one.close()


def test_500_connections_at_once_get_an_answer_each_and_nothing_is_lost(small):
    """8 may be in the house: all others are told to come again, none is lost or forgotten."""
    body = json.dumps({"prompt": "hello", "max_tokens": 2, "temperature": 0})
    connections = []
    try:
        for _ in range(500):
            connection = http.client.HTTPConnection("127.0.0.1", small.port, timeout=60)
            connection.request("POST", "/v1/completions", body)
            connections.append(connection)
        answers = []
        for connection in connections:
            answer = connection.getresponse()
            content = json.loads(answer.read())
            answers.append((answer.status, content))
            if answer.status == 429:
                assert answer.headers["Retry-After"] == "1"
    finally:
        for connection in connections:
            connection.close()
    served = [content for status, content in answers if status == 200]
    assert {status for status, _ in answers} == {200, 429}
    assert len({content["choices"][0]["text"] for content in served}) == 1
    assert small.service.counters.finished == len(served) >= 8
    assert small.service.counters.refused == 500 - len(served)
    small.wait_until_empty()


def test_more_prompts_than_are_ever_served_at_a_time_are_refused_for_good(small):
    status, answer = post(small, {"prompt": ["x"] * 9})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert "9 prompts in one request; 8 are served at a time" in answer["error"]["message"]
    assert post(small, {"prompt": ["x"] * 8, "max_tokens": 1})[0] == 200


def test_a_request_that_is_given_up_is_answered_with_503_and_a_reason():
    class Mortal(ThreadWorker):
        async def put(self, messages):
            if any(isinstance(each, Add) and len(each.request.prompt) == 13 for each in messages):
                self.kill()
            await super().put(messages)

    one = Served(layout(workers=2), start=Mortal)
    try:
        status, answer = post(one, {"prompt": "x" * 13})
        assert status == 503
        assert "it was lost with a worker 5 times" in answer["error"]["message"]
        assert post(one, {"prompt": "x"})[0] == 200
    finally:
        one.close()


def metrics(endpoint):
    with urllib.request.urlopen(endpoint.url + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_metrics_lose_no_digits_and_say_when_nothing_is_held(slow):
    slow.service.counters.handed_bytes = 12_345_678_901
    assert metrics(slow)["perflab_handed_over_bytes_total"] == "12345678901"
    held = [f'perflab_cache_held_ratio{{worker="{index}"}}' for index in (0, 1)]
    client = socket.create_connection(("127.0.0.1", slow.port), timeout=30)
    body = json.dumps({"prompt": "x" * 100, "max_tokens": 100, "stream": True}).encode()
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    assert b"200 OK" in client.recv(100)
    until(lambda: sum(float(metrics(slow)[name]) for name in held) > 0)
    client.close()  # what it held is given back without a step
    until(lambda: [metrics(slow)[name] for name in held] == ["0.0", "0.0"])
    assert post(slow, {"prompt": "y", "max_tokens": 2})[0] == 200
    until(lambda: [metrics(slow)[name] for name in held] == ["0.0", "0.0"])


def until(holds, wait_s=20.0):
    end = time.monotonic() + wait_s
    while not holds():
        assert time.monotonic() < end, f"waited {wait_s:g} s"
        time.sleep(0.05)


def test_a_key_is_asked_for_and_overload_is_429():
    one = Served(layout(workers=1), limit=1, api_key="secret")
    try:
        assert post(one, {"prompt": "x"})[0] == 401
        assert post(one, {"prompt": "x"}, key="wrong")[0] == 401
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = {"prompt": "x", "max_tokens": 60, "temperature": 0}
            found = list(pool.map(lambda _: post(one, asked, key="secret"), range(4)))
        statuses = sorted(status for status, _ in found)
        assert statuses[0] == 200
        assert statuses[-1] == 429
        with urllib.request.urlopen(one.url + "/health", timeout=30) as answer:  # needs none
            assert json.loads(answer.read()) == {"status": "ok", "workers": 1, "alive": 1}
        with urllib.request.urlopen(one.url + "/metrics", timeout=30) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            lines = answer.read().decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert float(values["perflab_requests_refused_total"]) == statuses.count(429)
        assert float(values["perflab_requests_finished_total"]) == statuses.count(200)
        assert float(values['perflab_worker_up{worker="0"}']) == 1
        kinds = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
        assert {name.partition("{")[0] for name in values} == set(kinds)
        assert all((kind == "counter") == name.endswith("_total") for name, kind in kinds.items())
    finally:
        one.close()


@pytest.mark.parametrize("text", ["plain", "caf\u00e9 \u2603 \U0001f600!", "a\ufffdb"])
def test_bytes_become_whole_characters(text):
    one = Text([])
    assert "".join([one.feed(byte) for byte in text.encode()]) + one.end() == text


def test_what_may_begin_a_stop_is_held_back():
    one = Text([b"END", b"NOW"])
    assert [one.feed(byte) for byte in b"aENxEN"] == ["a", "", "", "ENx", "", ""]
    assert not one.stopped
    assert one.feed(ord("D")) == ""
    assert one.stopped
    other = Text([b"END"])
    assert [other.feed(byte) for byte in b"EN"] == ["", ""]
    assert other.end() == "EN"


# --- the command -------------------------------------------------------------------------------------

COUNTS = dict(workers=None, prefill=None, decode=None, budget=None, blocks=64)


@pytest.mark.parametrize(
    ("policy", "counts", "settings", "more", "message"),
    [
        ("chunkd", {}, {}, {}, "there is no policy 'chunkd'; did you mean 'chunked'"),
        ("chunked", {"workers": 0}, {}, {}, "workers=0 must be at least 1"),
        ("disaggregated", {"decode": 0}, {}, {}, "--prefill 1 --decode 0: each must be at least 1"),
        ("chunked", {"blocks": 0}, {}, {}, "blocks=0 must be at least 1"),
        ("chunked", {}, {"widht": "64"}, {}, "has no setting 'widht'; did you mean 'width'"),
        ("chunked", {}, {"width": "100"}, {}, "width=100 is no multiple of 64"),
        ("chunked", {}, {"layers": "-1"}, {}, "layers=-1 must be a whole number"),
        ("chunked", {}, {}, {"port": 70000}, "port=70000 is no port"),
        ("chunked", {}, {}, {"limit": 0}, "limit=0 requests"),
        ("chunked", {"budget": 0}, {}, {}, "budget=0 must be at least 1"),
        ("chunked", {"prefill": 1}, {}, {}, "--prefill says nothing under --policy chunked; give --workers"),
        ("chunked", {"decode": 1}, {}, {}, "--decode says nothing under --policy chunked; give --workers"),
        ("disaggregated", {"workers": 3}, {}, {}, "--workers says nothing .*; give --prefill and --decode"),
        ("chunked", {"blocks": 10**8}, {}, {}, "need about .* GiB; .* GiB are free"),
        ("chunked", {}, {"width": "640000"}, {}, "need about .* GiB; .* GiB are free"),
    ],
)
def test_options_that_cannot_be_are_refused(policy, counts, settings, more, message):
    rest = {"host": "127.0.0.1", "port": 8000, "api_key": "", "limit": 8} | more
    with pytest.raises(ValueError, match=message):
        options_of(policy, COUNTS | counts, settings, **rest)


def test_the_command_says_what_is_wrong_in_one_line_and_exits_with_2(in_process):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        for options, message in (
            (
                ["--policy", "disaggregated", "--prefill", "0"],
                "--prefill 0 --decode 1: each must be at least 1",
            ),
            (["--blocks", "100000000"], "2 workers with width=256, layers=4 and 100000000 blocks need"),
            (["--port", taken], f"cannot listen on 127.0.0.1 port {taken}: it is taken"),
        ):
            status, out, err = in_process("serve", *options)
            assert (status, out) == (2, "")
            assert err.startswith("perflab: ")
            assert message in err
            assert err.count("\n") == 1


def test_a_signal_ends_the_wait_for_workers():
    async def forever(ended):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def stopped():
        stopping, ended = [], []
        waiting = asyncio.ensure_future(serving._unless(stopping, forever(ended)))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        stopping.append(2)
        await asyncio.wait_for(waiting, 5)
        return ended

    async def failing():
        raise LostWorker("gone")

    assert run(stopped()) == [True]
    with pytest.raises(LostWorker, match="gone"):
        run(serving._unless([], failing()))


def test_workers_that_cannot_start_are_one_line(monkeypatch):
    class Gone(ThreadWorker):
        async def process(self):
            raise LostWorker("its process has ended")

    monkeypatch.setattr("labs.serving.actors.Actor", lambda model, now: Gone())
    with pytest.raises(ValueError, match="started: its process has ended"):
        serve_here()


def serve_here():
    """The command's server, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    options = options_of("chunked", COUNTS, {}, "127.0.0.1", 0, "", 8)
    try:
        with socket.socket() as listening:
            run(serving._serve(options, listening, time.perf_counter, time.time))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_servers_collector_does_not_look_at_what_was_there_before_it_serves(monkeypatch):
    class Enough(Exception):
        pass

    async def ready(service):
        pass  # the workers know no layout: in threads, each would tell this process's collector

    def endpoint(*arguments):
        raise Enough("it would serve now")

    before = Witness()
    assert before.looked_at
    monkeypatch.setattr("labs.serving.actors.Actor", lambda model, now: ThreadWorker())
    monkeypatch.setattr("labs.serving.service.Service.ready", ready)
    monkeypatch.setattr("labs.serving.endpoint.Endpoint", endpoint)
    with pytest.raises(Enough):
        serve_here()
    assert not before.looked_at


def test_a_port_that_is_taken_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1 port {port}: it is taken"):
            bound("127.0.0.1", port)

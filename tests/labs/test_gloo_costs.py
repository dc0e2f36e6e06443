"""What a collective costs over gloo: each operation's parts, by hand."""

import pytest
from stated import GLOO, machine

from labs import gloo_costs
from labs.bottlenecks import Config
from labs.bottlenecks.model import OTHER_PARAMETERS, PARAMETERS_OF_BLOCK, seconds

SIZE = 2**20
COPYING = 1 / 32e9  # s/B of the stated machine's caches
HANDING = 2 * GLOO["thread_switch_s"]


def message(size: float) -> float:
    return GLOO["gloo_message_s"] + size * GLOO["gloo_s_per_byte"]


def exchange(size: float) -> float:
    return GLOO["gloo_exchange_s"] + size * GLOO["gloo_exchange_s_per_byte"]


@pytest.mark.parametrize(
    ("operation", "ranks", "expected"),
    [
        ("broadcast", 4, 2 * message(SIZE)),
        ("scatter", 4, message(3 / 4 * SIZE) + SIZE / 2 * COPYING),
        ("gather", 4, message(3 / 4 * SIZE) + 5 / 2 * SIZE * COPYING),
        ("reduce", 2, exchange(SIZE / 2) + message(SIZE / 2)),
        ("reduce", 4, 3 * exchange(SIZE / 4) + message(3 / 4 * SIZE)),
        ("all_reduce", 2, 2 * exchange(SIZE / 2)),
        ("all_reduce", 4, 6 * exchange(SIZE / 4)),
        ("reduce_scatter", 2, 2 * exchange(SIZE / 2) + 3 * SIZE * COPYING),
        ("all_gather", 2, exchange(SIZE / 2) + 4 * SIZE * COPYING),
        ("all_to_all", 4, exchange(3 / 4 * SIZE) + SIZE / 2 * COPYING),
    ],
)
def test_each_operation_is_its_messages_hand_overs_and_copies(operation, ranks, expected):
    found = gloo_costs.seconds(machine(**GLOO), operation, SIZE, ranks)
    assert found == pytest.approx(HANDING + expected)


def test_without_bytes_it_is_latency():
    assert gloo_costs.seconds(machine(**GLOO), "reduce_scatter", 0.0, 2) == pytest.approx(
        HANDING + 2 * exchange(0)
    )


def test_the_link_is_said_in_microseconds_and_nanoseconds_a_byte():
    said = str(gloo_costs.link(machine(**GLOO)))
    assert said == "100 us + 0.5 ns/B a message and 200 us + 0.8 ns/B an exchange"


def test_gradients_exchanged_one_by_one_cost_each_ones_latency():
    config, host = Config(layers=2, sequences=4), machine(**GLOO, packed_exp_s=1e-10)
    one = seconds(config, host, "communication/fixed").fault
    many = seconds(config, host, "communication/fault").fault
    tensors, pieces = 2 * PARAMETERS_OF_BLOCK + OTHER_PARAMETERS, 2
    latency = HANDING + 2 * exchange(0)
    assert many == pytest.approx(pieces * (one + (tensors - 1) * latency))

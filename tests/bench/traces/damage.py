"""Damage for reports: of their bytes, and of the values in them while the file stays whole."""

import copy
import gzip
import json
import marshal
import sqlite3
import tempfile
from pathlib import Path

import samples

WHOLE = {name: make() for name, (_, make) in samples.SAMPLES.items()}

# What a value may become: every type of JSON, the limits of numbers, half a surrogate pair, nesting.
VALUES = [
    *(None, True, -1, 0, 0.5, -1e308, float("nan"), float("inf"), 2**63, -(2**63), 10**30, 1 << 53),
    *(
        "",
        "5",
        "nan",
        "<script>",
        "\ud800",
        "\0\x1b[31m",
        "M",
        "E",
        "B",
        [],
        {},
        [[]],
        [{"a": [1]}],
        {"a": {"b": []}},
    ),
]


def flip(data, chance):
    position = chance.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << chance.randrange(8)]) + data[position + 1 :]


def cut(data, chance):
    return data[: chance.randrange(len(data))]


def delete(data, chance):
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.randrange(1, 64) :]


def splice(data, chance):
    other = WHOLE[chance.choice(list(WHOLE))]
    start, at = chance.randrange(len(other)), chance.randrange(len(data))
    return data[:at] + other[start : start + chance.randrange(1, 512)] + data[at:]


def repeat(data, chance):
    start = chance.randrange(len(data))
    return data[: start + 200] + data[start:]


def nest(data, chance):
    at = chance.randrange(len(data))
    return data[:at] + b"[" * 3000 + data[at:]


def of_bytes(data, chance):
    """One to three damages; of a zipped file, half the time inside the archive."""
    inside = data[:2] == b"\x1f\x8b" and chance.random() < 0.5
    if inside:
        data = gzip.decompress(data)
    for _ in range(chance.randrange(1, 4)):
        if data:
            data = chance.choice((flip, flip, cut, delete, splice, repeat, nest))(data, chance)
    return samples.zipped(data) if inside else data


def of_values(data, chance):
    """One to four values become others, or go; the file can still be decoded."""
    if data[:2] == b"\x1f\x8b":
        return samples.zipped(of_values(gzip.decompress(data), chance))
    if data[:6] == b"SQLite":
        return _of_rows(data, chance)
    if data[:1] in b"{[" and data[1:2] not in b"()\xa8\xa9":
        document = json.loads(data)
        for _ in range(chance.randrange(1, 5)):
            _change(document, chance)
        return json.dumps(document).encode()
    try:
        profile = marshal.loads(data)
    except (ValueError, EOFError, TypeError):
        return flip(data, chance)
    key = chance.choice(list(profile))
    value = list(profile[key])
    value[chance.randrange(len(value))] = copy.deepcopy(chance.choice(VALUES))
    profile[key] = tuple(value)
    return marshal.dumps(profile)


def _change(document, chance):
    """Walk down to a random value and change it there."""
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return
        key = chance.choice(keys)
        below = place[key]
        if not isinstance(below, dict | list) or not below or chance.random() < 0.1:
            break
        place = below
    change = chance.random()
    if change < 0.7:
        place[key] = copy.deepcopy(chance.choice(VALUES))  # or it could be put into itself
    elif change < 0.85:
        del place[key]
    elif isinstance(place, list):
        place.insert(key, below)
    else:
        place[str(chance.choice(("ts", "dur", "name", "args", "ph", "cat", "x")))] = below


def _of_rows(data, chance):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.sqlite"
        path.write_bytes(data)
        base = sqlite3.connect(path)
        tables = [row[0] for row in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for _ in range(chance.randrange(1, 4)):
            table = chance.choice(tables)
            column = chance.choice([row[1] for row in base.execute(f"PRAGMA table_info({table})")])
            if chance.random() < 0.3:
                name = chance.choice(("gone", column.upper(), "a b"))
                statement, values = f"ALTER TABLE {table} RENAME COLUMN {column} TO '{name}'", ()
            else:
                value = chance.choice((-1, 0, 2**62, -(2**63), 1.5, 1e300, "x", b"\xff\x00", "5"))
                statement, values = f"UPDATE {table} SET {column} = ?", (value,)
            try:
                base.execute(statement, values)
            except sqlite3.Error:
                continue  # a key, or a name that is taken
        base.commit()
        base.close()
        return path.read_bytes()

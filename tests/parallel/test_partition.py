"""Partitions cover a dimension, keep units whole, and give back what they took."""

import pytest
import torch

from parallel.context import zigzag
from parallel.partition import Partition, concatenated, split, split_heads

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@hypothesis.given(units=st.integers(0, 40), parts=st.integers(1, 9), unit=st.integers(1, 5))
def test_split_is_tensor_split_of_units(units, parts, unit):
    partition = split(units * unit, parts, unit)
    pieces = torch.arange(units * unit).view(units, unit).tensor_split(parts)
    assert [partition.take(torch.arange(units * unit), r).tolist() for r in range(parts)] == [
        piece.flatten().tolist() for piece in pieces
    ]
    assert partition.even == (units % parts == 0)
    assert not partition.replicated


@hypothesis.given(
    group=st.integers(1, 6), kv_heads=st.integers(1, 6), dim=st.integers(1, 3), parts=st.integers(1, 9)
)
def test_every_query_head_has_its_key_head(group, kv_heads, dim, parts):
    heads = group * kv_heads
    try:
        query, key = split_heads(heads, kv_heads, dim, parts)
    except ValueError:
        most_sharing = -(-parts // kv_heads)
        assert kv_heads < parts
        assert most_sharing > group
        return
    owner = torch.arange(kv_heads).repeat_interleave(group * dim)  # key head of each query feature
    kept = torch.arange(kv_heads).repeat_interleave(dim)
    for rank in range(parts):
        queries, keys = query.take(owner, rank), key.take(kept, rank)
        # The model computes on local heads: the i-th key head serves the i-th group of query heads.
        local_heads, local_keys = len(queries) // dim, len(keys) // dim
        if local_heads:
            assert local_heads % local_keys == 0
            assert torch.equal(
                keys.view(-1, dim)[:, 0].repeat_interleave(local_heads // local_keys),
                queries.view(-1, dim)[:, 0],
            )
    assert sum(query.sizes) == heads * dim
    assert key.replicated == (kv_heads < parts)


@hypothesis.given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4), parts=st.integers(1, 5))
def test_what_is_taken_is_put_back(sizes, parts):
    partition = concatenated([split(size, parts) for size in sizes])
    whole = torch.arange(2 * partition.size).view(2, partition.size)
    shards = [partition.take(whole, rank, 1) for rank in range(parts)]
    assert torch.equal(partition.place(shards, 1), whole)
    assert [shard.shape[1] for shard in shards] == partition.sizes


@hypothesis.given(length=st.integers(0, 200), world=st.integers(1, 9))
def test_zigzag_balances_causal_work(length, world):
    partition = zigzag(length, world)
    positions = [p for pieces in partition.ranges for start, stop in pieces for p in range(start, stop)]
    assert sorted(positions) == list(range(length))
    work = [sum(p + 1 for start, stop in pieces for p in range(start, stop)) for pieces in partition.ranges]
    if length % (2 * world) == 0:
        assert len(set(work)) == 1
    assert max(work) - min(work) <= 2 * (length + 1)  # chunks differ by one position each


def test_what_is_no_partition_is_refused():
    with pytest.raises(ValueError, match="no rank holds element 3 of 6"):
        Partition(6, (((0, 3),), ((4, 6),)))
    with pytest.raises(ValueError, match=r"holds \[4, 7\) of a dimension of 6"):
        Partition(6, (((0, 4),), ((4, 7),)))
    with pytest.raises(ValueError, match="no multiple of the unit"):
        split(7, 2, 2)
    with pytest.raises(ValueError, match="no multiple of 2 key-value heads"):
        split_heads(3, 2, 8, 2)
    with pytest.raises(ValueError, match="has 5 elements; the partition is of 6"):
        split(6, 2).take(torch.zeros(5), 0)
    with pytest.raises(ValueError, match=r"over \[2, 3\] ranks do not join"):
        concatenated([split(6, 2), split(6, 3)])

"""The memory for keys and values, in blocks that sequences share where they begin with the same tokens.

A block holds the keys and values of ``block_size`` tokens. What it holds depends on these tokens and all
before them, so a full block is known by its tokens and the block before it; comparing them exactly, link by
link, a wrong hit cannot be. A block that nobody holds keeps its content until its place is needed, the
longest unused first.

Sources: Kwon et al. 2023, "PagedAttention", sections 4.1 and 4.4 (blocks, sharing); Zheng et al. 2023,
"SGLang", section 3 (least recently used prefixes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Content = tuple[int, tuple[int, ...]]
"""(what comes before: the serial number of that content, 0 at the beginning; the tokens of the block)."""


class BlockPool:
    """Which block is held by how many sequences, and which content it has. Blocks are numbers from 0."""

    def __init__(self, blocks: int, block_size: int) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(f"blocks={blocks} of block_size={block_size} tokens: both must be at least 1")
        self.blocks, self.block_size = blocks, block_size
        self._holders = [0] * blocks
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(blocks))
        self._known: dict[Content, tuple[int, int]] = {}  # content -> (its block, its serial number)
        self._content: dict[int, Content] = {}  # block -> content
        self._serial = 0

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def held(self) -> int:
        return self.blocks - len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-tokens // self.block_size)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The blocks of the longest known beginning of ``tokens``, whole blocks only; not yet held."""
        found, before = [], 0
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            known = self._known.get((before, tuple(tokens[start : start + self.block_size])))
            if known is None:
                break
            block, before = known
            found.append(block)
        return found

    def hold(self, shared: Sequence[int], fresh: int) -> list[int] | None:
        """Holds the blocks ``shared`` and ``fresh`` more; None, and nothing held, where there are too few."""
        if fresh > len(self._free) - sum(1 for block in shared if not self._holders[block]):
            return None
        for block in shared:
            self._free.pop(block, None)
            self._holders[block] += 1
        taken = list(shared)
        for _ in range(fresh):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """One holder fewer of each. ValueError: of a block that nobody holds."""
        for block in reversed(blocks):  # the end of a sequence is the first to be overwritten
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is released, and nobody holds it")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None

    def publish(self, blocks: Sequence[int], tokens: Sequence[int], known: int, filled: int) -> None:
        """The first ``filled`` of ``blocks`` are full of ``tokens`` from now on; the first ``known`` were.

        Where another block has the same content already, that one stays the one to be shared.
        """
        if known >= filled:
            return
        before = self._serial_of(blocks[known - 1]) if known else 0
        for index in range(known, filled):
            content = (before, tuple(tokens[index * self.block_size : (index + 1) * self.block_size]))
            if content not in self._known:
                self._serial += 1
                self._known[content] = (blocks[index], self._serial)
            self._content[blocks[index]] = content
            before = self._known[content][1]

    def _serial_of(self, block: int) -> int:
        content = self._content[block]
        if (
            content not in self._known
        ):  # the block it was shared from has been overwritten: this one takes over
            self._serial += 1
            self._known[content] = (block, self._serial)
        return self._known[content][1]

    def _forget(self, block: int) -> None:
        content = self._content.pop(block, None)
        if content is not None and self._known.get(content, (None, 0))[0] == block:
            del self._known[content]

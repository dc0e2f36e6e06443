"""Steps that run on every rank of a world, their clock, and the worlds of a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bench.world.controller import World
from labs.lab import Variant


class WorldStep:
    """A step that runs on every rank of a world: a lab's variant, or, with lab="", what the importable
    function ``package.module:function`` returns."""

    def __init__(self, world: World, lab: str, settings: dict[str, Any], address: str) -> None:
        self._world, self._address = world, address
        world.set_up(lab, settings, address)

    def __call__(self) -> Any:
        return self._world.call(self._address)

    def sample(self, iterations: int) -> float:
        return self._world.sample(self._address, iterations)

    def profile(self, steps: int, folder: str) -> None:
        self._world.profile(self._address, steps, folder)

    @property
    def recorded(self) -> dict[str, list[float]]:
        """What rank 0 recorded in its setup and its last call or sample."""
        return self._world.recorded.get(self._address, {})

    @property
    def texts(self) -> dict[str, str]:
        """The texts that rank 0 kept."""
        return self._world.texts.get(self._address, {})

    def close(self) -> None:
        self._world.tear_down(self._address)


class WorldClock:
    """Times a WorldStep inside its ranks: the command's way there and back is not part of it."""

    # A sample lasts at least this long: ranks leave the barrier before it some 0.1 to 1 ms apart, and a small
    # collective of some 10 us would be that wait.
    least_seconds = 10e-3

    def sample(self, step: Callable[[], object], iterations: int) -> float:
        assert isinstance(step, WorldStep)
        return step.sample(iterations)

    def wait(self, output: object) -> None:
        return


class Worlds:
    """Worlds by size, started when first needed and kept until ``close``."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def of_size(self, size: int) -> World:
        """A world that answers; a new one where the last is broken. Ranks that torchrun started are the only
        ones of their job: their broken world stays, and says so at each command."""
        last = self._worlds.get(size)
        if last is not None and last.broken and not last.joined:
            self._worlds.pop(size).close()
        if size not in self._worlds:
            self._worlds[size] = World(size)
        return self._worlds[size]

    def step(self, lab: str, config: Any, variant: Variant) -> WorldStep:
        return WorldStep(self.of_size(variant.processes), lab, asdict(config), variant.address)

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()
        self._worlds.clear()

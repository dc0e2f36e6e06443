"""torch on one thread: small work is done before a second one has woken up."""

from __future__ import annotations

from labs.lab import Step


def one_thread(step: Step) -> Step:
    """The step with ``torch.set_num_threads(1)`` while it runs (0.2 us); other steps keep theirs."""
    import torch

    def alone() -> object:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return step()
        finally:
            torch.set_num_threads(threads)

    return alone

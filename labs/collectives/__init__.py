"""What is gather and scatter and when would we use these? How can asynchronous layers reduce compute time?

Answer. By who has what, and who needs what.

  gather          each has a part, one needs all: metrics and results, to the rank that writes them
  scatter         one has it, each needs another part: data, from the rank that reads it
  broadcast       one has it, all need it: initial weights
  reduce          each has a whole, one needs the sum: a loss for the log
  all-reduce      each has a whole, all need the sum: DDP's gradients
  all-gather      each has a part, all need the whole: FSDP's parameters
  reduce-scatter  each has a whole, each needs a part of the sum: FSDP's gradients
  all-to-all      each has something for each: tokens to experts, Ulysses' sequence to heads

A layer whose collective is asynchronous computes on while the bytes travel: a step then takes the longer of
compute and communication, and not their sum.

Formulas (``model.py``), for p ranks, n bytes of the whole vector, a seconds a message, b seconds a byte (of
an exchange where all ranks send at once, which costs more than a message on cores that do both):

  all-reduce (ring)                        2 (p-1) a + 2 (p-1)/p n b
  all-gather, reduce-scatter, all-to-all   (p-1) a + (p-1)/p n b
  gather, scatter                          ceil(log2 p) a + (p-1)/p n b, all on the root's link
  broadcast, reduce                        ceil(log2 p) (a + n b)
  L layers of compute c, communication k   L (c + k) if waited for at once; c + (L-1) max(c, k) + k if not

Sources: Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH",
sections 3 to 4.5; Chan, Heimlich, Purkayastha, van de Geijn 2007, "Collective communication: theory,
practice, and experience"; Patarasuk, Yuan 2009, "Bandwidth optimal all-reduce algorithms"; Li et al. 2020,
"PyTorch Distributed", section 3.2.3 (overlap of computation and communication).
"""

from __future__ import annotations

from labs.collectives.claims import CLAIMS
from labs.collectives.config import Config
from labs.collectives.derived import derive
from labs.collectives.figures import figure
from labs.collectives.model import memory_bytes, predict
from labs.collectives.proof import check
from labs.collectives.ways import variants
from labs.lab import Lab

__all__ = ["LAB", "Config"]

LAB = Lab(
    name="collectives",
    question=(
        "What is gather and scatter and when would we use these? "
        "How can asynchronous layers reduce compute time?"
    ),
    answer=(
        "Gather brings every rank's part to one rank (metrics, results); scatter hands one rank's parts out "
        "(data). Where all need the outcome: broadcast for initial weights, all-reduce for DDP's gradients, "
        "all-gather for FSDP's parameters, reduce-scatter for its gradients, all-to-all for experts and "
        "Ulysses; reduce where one rank needs the sum. A layer whose collective is asynchronous computes on "
        "while the bytes travel, so that a step takes the longer of the two and not their sum."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    derive=derive,
    seconds=14.0,
    sources=(
        "Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH, 2005",
        "Chan, Heimlich, Purkayastha, van de Geijn: Collective communication, 2007",
        "Patarasuk, Yuan: Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009",
        "Li et al.: PyTorch Distributed: experiences on accelerating data parallel training, 2020",
    ),
)

"""The training of ``labs.train`` on a cluster: Ray places the ranks, and starts them again after a loss.

    python -m labs.cluster --ranks 2 --strategy fsdp --steps 20 --checkpoint kept

It is what ``torchrun -m labs.train`` runs, rank by rank: the same options, the same collectives, the same
checkpoints, so that a run may begin under one launcher and go on under the other. What differs is who starts
the ranks. torchrun is started by hand on every machine; Ray is told once how many ranks there are, and finds
the machines, also others after one is lost.
"""

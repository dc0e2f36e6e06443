"""Worlds of processes that stay alive between rounds, so that multi-process variants are timed without
starting processes in every round.

The controller (``controller``: the process that measures) writes commands into a ``TCPStore``; every rank of
the world sits in ``rank.serve`` and answers (``protocol`` says how). A variant is addressed by (lab,
settings, ``group/name``): no closure crosses a process (``steps``). A sample begins behind a barrier, and
its time is the slowest rank's.

The ranks are started by torch's own launcher agent, or, under ``torchrun -m labs.X``, are the processes that
torchrun started (``torchrun.join``). Every wait has a time-out that says who waits for whom.
"""

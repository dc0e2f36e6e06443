"""What is an example of multi-fidelity hyperparameter optimisation? How can we make this faster?

Answer. Successive halving: train all configurations a little, the best 1/eta of them eta times as much, and
so on. Hyperband hedges where the first rung should be; ASHA promotes without waiting for a rung to fill;
population based training lets the worst take over from the best. Each can only know what its first rung
knows, and early losses may rank configurations the wrong way round: halving by them then misses the best,
synchronous or not, and curves that are drawn on to the end find it. Faster in wall time: workers that stay
warm, and trials of one shape in one vmapped step. Not much faster: promotion that waits for nobody, which
keeps workers busier where jobs are late and has them train more trials; cheaper steps, whose calls cost as
much. Fewer steps are the fidelity that saves time.

Formulas:
  rungs         r, eta r, eta^2 r, ... R steps; rung k has floor(n / eta^k) trials
  Hyperband     bracket s of s_max = log_eta(R / r): ceil((s_max + 1) / (s + 1) eta^s) trials from R / eta^s
  ASHA          a trial of rung k goes on when it is among the best floor(|rung k| / eta) there
  curve         loss(t) = end + scale t^-power (``extrapolation.py``)
  regret        a search's best loss less full random search's, over the same configurations
  search        the scheduler itself on a simulated clock (``model.py``)

Sources: Jamieson and Talwalkar 2016 (successive halving); Li et al. 2018, "Hyperband"; Li et al. 2020, "A
System for Massively Parallel Hyperparameter Tuning" (ASHA); Jaderberg et al. 2017, "Population Based Training
of Neural Networks"; Domhan et al. 2015, "Speeding Up Automatic Hyperparameter Optimization of Deep Neural
Networks by Extrapolation of Learning Curves"; Bergstra and Bengio 2012 (random search); Liaw et al. 2018
(Ray Tune).
"""

from __future__ import annotations

from labs.lab import Lab
from labs.tuning.claims import CLAIMS
from labs.tuning.config import Config
from labs.tuning.figures import figure
from labs.tuning.model import memory_bytes, predict
from labs.tuning.proof import check
from labs.tuning.ways import variants

__all__ = ["LAB", "Config"]

LAB = Lab(
    name="tuning",
    question=(
        "What is an example of multi-fidelity hyperparameter optimisation? How can we make this faster?"
    ),
    answer=(
        "Successive halving: train all configurations a little and send the best on to more, rung by rung; "
        "Hyperband hedges over first rungs, ASHA promotes without waiting. A search can only know what its "
        "first rung knows: early losses may rank the wrong way round, and halving by them misses the best, "
        "which extrapolated curves find. Faster: those curves, warm workers, trials of one shape in one "
        "vmapped step. Promotion that waits for nobody keeps workers busier and trains more trials; cheaper "
        "steps of a small model save little, fewer steps much."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    seconds=8.0,
    sources=(
        "Jamieson, Talwalkar: Non-stochastic Best Arm Identification, AISTATS 2016",
        "Li et al.: Hyperband, JMLR 2018; A System for Massively Parallel Hyperparameter Tuning, MLSys 2020",
        "Jaderberg et al.: Population Based Training of Neural Networks, 2017",
        "Domhan et al.: Extrapolation of Learning Curves, IJCAI 2015",
    ),
)

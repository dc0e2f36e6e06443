"""How might we reduce latency or storage at the cost of quality?

Answer. One token of a large model takes as long as its weights take to be read, so that fewer bytes are both
less storage and less time: fewer bits a weight (bfloat16, int8, int4), fewer weights (whole heads and
neurons, thin factors, a distilled student), or fewer of them read (early exit). int8 costs almost no quality,
int4 a little, removing half of the model much, of which training wins some back. Speculative decoding is
faster at no cost in quality at all, and zeros in random places save storage but no time. A prompt is another
matter: arithmetic is its limit.

Formulas (``model.py``, ``sizes.py``), for W weights in matrices:
  file      W times bytes of a weight + scales, masks, and what stays float32
  a token   bytes read / bandwidth + 2 W slots / vector peak where weights are widened, else the larger of
              both; + calls
  a prompt  max(2 W tokens parts / rate of the library's thin products, bytes read / bandwidth) + packing of
              integers; parts: 3 of bfloat16 for integers with AMX, else 1
  a round   k draft tokens + one pass of the large model, for (1 - a^(k+1)) / (1 - a) tokens

Quality is measured on a GPT that ``make model`` trained (a shorter training where it has not run, which
decides nothing about quality), as bits per byte of held-out files of the standard library; speed on a
gigabyte of random weights, so that memory is measured.

Sources: Dettmers et al. 2022, "LLM.int8()"; Frantar et al. 2022, "GPTQ"; Sheng et al. 2023, "FlexGen"; Han et
al. 2015 (pruning); Michel et al. 2019 (heads); Hu et al. 2021, "LoRA"; Hinton et al. 2015 (distillation);
Leviathan et al. 2023 (speculative decoding); Schuster et al. 2022, "CALM" (early exit).
"""

from __future__ import annotations

from labs.lab import Lab
from labs.precision.claims import CLAIMS
from labs.precision.config import Config
from labs.precision.figures import figure
from labs.precision.model import memory_bytes, predict
from labs.precision.proof import check
from labs.precision.ways import variants

__all__ = ["LAB", "Config"]

LAB = Lab(
    name="precision",
    question="How might we reduce latency or storage at the cost of quality?",
    answer=(
        "Read fewer bytes a token: fewer bits a weight, fewer weights, or fewer of them visited. int8 costs "
        "almost no quality, int4 a little, half of the model much, of which training wins some back. "
        "Speculative decoding costs none. Zeros in random places save storage and no time; a prompt is "
        "limited by arithmetic, and small weights do not help it."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    seconds=20.0,
    sources=(
        "Dettmers et al.: LLM.int8(), 2022; Frantar et al.: GPTQ, 2022; Sheng et al.: FlexGen, 2023",
        "Han et al.: Learning both Weights and Connections, 2015; Michel et al.: Are Sixteen Heads, 2019",
        "Hu et al.: LoRA, 2021; Hinton, Vinyals, Dean: Distilling the Knowledge, 2015",
        "Leviathan, Kalman, Matias: Speculative Decoding, 2023; Schuster et al.: CALM, 2022",
    ),
)

"""Name the ways attention has been sped up.

Answer. By not storing the scores (fused, online softmax), by not computing those that are masked (causal
skip, sliding window), by sharing keys and values between heads (GQA, MQA), by keeping them between tokens (KV
cache) and by storing them in pages and in fewer bits. The first changes what memory is moved and not the
result; the second changes how much is computed; the last three change what a new token has to read.

Formulas (``model.py``), for H heads, L queries, S keys, D numbers a head:
  pairs     L S; causal L (L + 1) / 2; window of W keys L W - W (W - 1) / 2; whole tiles add (``tiles``)
  compute   pairs H 4 D FLOPs / the library's rate for products of a tile + their softmax, in instructions
  naive     compute + the scores' trips to memory, 4 bytes each, at the bandwidth of that working set
  a token   compute + bytes of keys and values / read bandwidth
  each      + calls

Sources: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao, Fu, Ermon, Rudra, Ré
2022, "FlashAttention", section 3.1; Dao 2023, "FlashAttention-2", section 3; Shazeer 2019, "Fast Transformer
Decoding: One Write-Head is All You Need"; Ainslie et al. 2023, "GQA", section 2; Beltagy, Peters, Cohan 2020,
"Longformer", section 3.1 (sliding window); Kwon et al. 2023, "PagedAttention", section 4.
"""

from __future__ import annotations

from labs.attention.claims import CLAIMS
from labs.attention.config import Config
from labs.attention.figures import figure
from labs.attention.model import memory_bytes, predict
from labs.attention.proof import check
from labs.attention.ways import variants
from labs.lab import Lab

__all__ = ["LAB", "Config"]

LAB = Lab(
    name="attention",
    question="Name the ways attention has been sped up.",
    answer=(
        "Do not store the scores (fused, online softmax); do not compute those that are masked (causal skip, "
        "sliding window); share keys and values between heads (GQA, MQA); keep them between tokens (KV "
        "cache), in pages and in fewer bits. Fusing saves memory traffic, skipping saves arithmetic, and "
        "sharing, caching and quantising save what each new token has to read."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    columns=("default", "tuned"),
    seconds=12.0,
    sources=(
        "Dao, Fu, Ermon, Rudra, Ré: FlashAttention, 2022; Dao: FlashAttention-2, 2023",
        "Milakov, Gimelshein: Online normalizer calculation for softmax, 2018",
        "Shazeer: Fast Transformer Decoding, 2019; Ainslie et al.: GQA, 2023",
        "Beltagy, Peters, Cohan: Longformer, 2020; Kwon et al.: PagedAttention, 2023",
    ),
)

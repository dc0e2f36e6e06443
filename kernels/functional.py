"""torch's own operations, as they are before anybody puts ours in their place.

``torch.nn.functional.relu = kernels.relu`` is how a model is given our kernels. Where ours leave a tensor
to torch, they must not find themselves under torch's name: all fall-backs go through here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

cross_entropy = F.cross_entropy
elu = F.elu
gelu = F.gelu
layer_norm = F.layer_norm
leaky_relu = F.leaky_relu
linear = F.linear
linear_cross_entropy = getattr(F, "linear_cross_entropy", None)  # torch 2.13
relu = F.relu
rms_norm = F.rms_norm
scaled_dot_product_attention = F.scaled_dot_product_attention
sigmoid = torch.sigmoid
silu = F.silu
softmax = F.softmax
softplus = F.softplus
tanh = torch.tanh

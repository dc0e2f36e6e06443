"""Optimizers at any hyperparameters: as accurate as torch's."""

import pytest
import torch
from test_optimizer import EVERY, assert_as_accurate_as_torch

pytest.importorskip("hypothesis")  # a GPU machine may lack it
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("every_size")

small = st.floats(0.0, 0.2)
decay = st.sampled_from([0.0, 0.001, 0.1])
share = st.floats(0.05, 0.95)
HYPERPARAMETERS = {
    "SGD": {"lr": small, "momentum": share, "dampening": st.floats(0, 1), "weight_decay": decay},
    "Adagrad": {"lr": small, "lr_decay": small, "weight_decay": decay},
    "RMSprop": {"lr": small, "alpha": share, "momentum": share, "weight_decay": decay},
    "Adadelta": {"lr": share, "rho": share, "weight_decay": decay},
    "Adam": {"lr": small, "betas": st.tuples(share, share), "weight_decay": decay, "amsgrad": st.just(True)},
    "AdamW": {"lr": small, "betas": st.tuples(share, share), "weight_decay": decay},
}


@EVERY
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_hyperparameters(name, data):
    options = data.draw(st.fixed_dictionaries({**HYPERPARAMETERS[name], "maximize": st.booleans()}))
    if name == "RMSprop":
        options["centered"] = True
    assert_as_accurate_as_torch(name, options, torch.float32)

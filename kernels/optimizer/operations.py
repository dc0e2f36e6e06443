"""The rules as torch operations on lists of tensors, mutated in place: one call updates a whole model.

``perflab::adam_`` and the others take tensors of one dtype on one device in each list, of one shape at each
index; a list of states is empty where the options need none. ``lr`` is a tensor of one element, so that a
schedule changes no compiled graph.
"""

from __future__ import annotations

from typing import Any

from kernels.op import register
from kernels.optimizer import cpu


def _nothing(*arguments: Any, **options: Any) -> None:
    """Everything is updated in place: there is no output to describe."""


def _register(schema: str) -> Any:
    name = schema.split("(", 1)[0]
    return register(
        f"{schema} -> ()", cpu=getattr(cpu, name), cuda=f"kernels.optimizer.gpu:{name}", fake=_nothing
    )


sgd_ = _register(
    "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool maximize, bool first)"
)
adagrad_ = _register(
    "adagrad_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state_sums, Tensor(c!)[] state_steps, "
    "Tensor lr, float lr_decay, float weight_decay, float eps, bool maximize)"
)
rmsprop_ = _register(
    "rmsprop_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs, "
    "Tensor(d!)[] momentum_buffers, Tensor(e!)[] state_steps, Tensor lr, float alpha, float eps, "
    "float weight_decay, float momentum, bool maximize)"
)
adadelta_ = _register(
    "adadelta_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] acc_deltas, "
    "Tensor(d!)[] state_steps, Tensor lr, float rho, float eps, float weight_decay, bool maximize)"
)
adam_ = _register(
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, Tensor lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled_weight_decay, bool maximize)"
)

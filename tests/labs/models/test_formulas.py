"""Every formula against a counter, over the options: parameters, matrix FLOPs, bytes that autograd keeps."""

import pytest
import torch
import torch.nn.functional as F
from model_options import ALL, SAMPLE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from labs.models.configuration import EncoderDecoderConfig, GPTConfig
from labs.models.encoder_decoder import EncoderDecoder
from labs.models.formulas import (
    activation_bytes,
    activation_bytes_of_pair,
    flops_per_pair,
    flops_per_token,
    parameters,
)
from labs.models.gpt import GPT


def gpt(options):
    sizes = {"width": 16, "heads": 4, "hidden": 20, "layers": 2, "context": 10, "vocabulary": 11}
    return GPTConfig(**sizes | options)


def pairs(options):
    sizes = {"width": 16, "heads": 4, "hidden": 20, "encoder_layers": 1, "decoder_layers": 3, "context": 10}
    tied = options.get("tied", True)
    vocabularies = {"source_vocabulary": 11, "target_vocabulary": 11 if tied else 13}
    return EncoderDecoderConfig(**sizes | vocabularies | options)


def kept_bytes(model, run, inputs):
    """Distinct storages that autograd keeps, other than parameters and inputs."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *inputs)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def count_parameters(options):
    for model, config in ((GPT, gpt(options)), (EncoderDecoder, pairs(options))):
        assert parameters(config) == sum(one.numel() for one in model(config).parameters()), (model, options)


def count_flops(options):
    for backward in (False, True):
        source, target = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
        for model, inputs, expected in (
            (GPT(gpt(options)), (target,), 2 * 7 * flops_per_token(gpt(options), 7, backward)),
            (
                EncoderDecoder(pairs(options)),
                (source, target),
                2 * flops_per_pair(pairs(options), 6, 7, backward),
            ),
        ):
            # torch's counter does not know the CPU's fused attention; written out, it is two products.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                result = model(*inputs)
                if backward:
                    result.sum().backward()
            assert counter.get_total_flops() == expected, (type(model), backward, options)


def count_activations(options, dtype, dropout):
    source, target = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    wanted = torch.zeros(3 * 7, dtype=torch.long)
    one, two = gpt({**options, "dropout": dropout}), pairs({**options, "dropout": dropout})
    for loss in (True, False):
        for model, inputs, expected in (
            (GPT(one), (target,), activation_bytes(one, 3, 7, dtype, loss)),
            (EncoderDecoder(two), (source, target), activation_bytes_of_pair(two, 3, 6, 7, dtype, loss)),
        ):
            model.to(dtype)

            def run(model=model, inputs=inputs, loss=loss):
                logits = model(*inputs)
                return F.cross_entropy(logits.flatten(0, 1), wanted) if loss else logits

            counted = kept_bytes(model, run, (*inputs, wanted))
            assert counted == expected, (type(model), loss, options)


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("options", SAMPLE[:6], ids=lambda options: "-".join(map(str, options.values())))
def test_counters(options):
    count_parameters(options)
    count_flops(options)
    for dtype, dropout in ((torch.float32, 0.0), (torch.bfloat16, 0.1)):
        count_activations(options, dtype, dropout)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_activations_of_every_dtype(norm):
    for dtype in DTYPES:
        for dropout in (0.0, 0.1):
            count_activations({"norm": norm}, dtype, dropout)


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_counters_of_all_options():
    for index, options in enumerate(ALL):
        count_parameters(options)
        count_activations(options, DTYPES[index % 3], 0.1 * (index % 2))
        if index % 5 == 0:  # the counter is slow, and norms and bias have no matrix products
            count_flops(options)


def test_final_norm_is_counted():
    for final in (True, False):
        count_parameters_of = pairs({"final_norm": final})
        model = EncoderDecoder(count_parameters_of)
        assert parameters(count_parameters_of) == sum(one.numel() for one in model.parameters())


def test_known_models():
    """GPT-2 small has 124,439,808 parameters; Llama 3.1 8B has 8,030,261,248."""
    gpt2 = GPTConfig(width=768, heads=12, layers=12, context=1024, vocabulary=50257)
    assert parameters(gpt2) == 124_439_808
    llama = GPTConfig(
        width=4096, heads=32, kv_heads=8, layers=32, hidden=14336, context=131072, vocabulary=128256,
        positions="rotary", norm="rms", activation="swiglu", bias=False, tied=False,
    )  # fmt: skip
    assert parameters(llama) == 8_030_261_248


def test_kernels_have_no_formula():
    with pytest.raises(ValueError, match="the formula is for"):
        activation_bytes(gpt({"functional": "kernels"}), 1, 4)

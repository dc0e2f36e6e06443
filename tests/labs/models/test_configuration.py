"""What is wrong with a configuration is said when it is stated."""

import pytest

from labs.models.configuration import EncoderDecoderConfig, GPTConfig, RotaryScaling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30}, "heads=4 does not divide width=30; choose a divisor or state head_dim"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4.*1, 2, 4 would"),
        ({"kv_heads": 8}, "kv_heads=8 does not divide heads=4"),
        ({"kv_heads": 0}, "kv_heads=0 is not a whole number of at least 1"),
        ({"layers": 0}, "layers=0 is not a whole number"),
        ({"layers": 1.5}, "layers=1.5 is not a whole number"),
        ({"vocabulary": -1}, "vocabulary=-1 is not a whole number"),
        ({"context": 0}, "context=0"),
        ({"norm": "batch"}, "norm='batch' is not one of 'layer', 'rms'"),
        ({"norm_position": "middle"}, "norm_position='middle' is not one of 'pre', 'post'"),
        ({"activation": "tanh"}, "activation='tanh' is not one of 'gelu', 'gelu_tanh', 'relu', 'swiglu'"),
        ({"positions": "alibi"}, "positions='alibi' is not one of 'learned', 'rotary', 'sinusoidal'"),
        ({"initialization": "zeros"}, "'gpt2', 'xavier', 'kaiming'"),
        ({"functional": "numpy"}, "functional='numpy' is not one of 'torch.nn.functional', 'kernels'"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability from 0 to below 1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"norm_epsilon": -1.0}, "norm_epsilon=-1.0 must be at least 0"),
        ({"rotary_base": 1.0}, "rotary_base=1.0 above 1"),
        ({"positions": "rotary", "head_dim": 5}, "5 numbers cannot be rotated in pairs.*even head_dim"),
        ({"positions": "sinusoidal", "width": 27, "heads": 1}, "width=27 is odd"),
        ({"rotary_scaling": RotaryScaling(2.0)}, "rotary_scaling needs positions='rotary', not 'learned'"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)


def test_bad_vocabularies_and_scaling():
    with pytest.raises(ValueError, match=r"tied embeddings need one vocabulary.*tied=False"):
        EncoderDecoderConfig(source_vocabulary=10, target_vocabulary=11)
    assert not EncoderDecoderConfig(source_vocabulary=10, target_vocabulary=11, tied=False).tied
    with pytest.raises(ValueError, match=r"factor=0.5"):
        RotaryScaling(0.5)
    with pytest.raises(ValueError, match=r"low_frequency_factor=4.0 must lie between 0 and high_frequency"):
        RotaryScaling(2.0, 4.0, 4.0)


def test_defaults():
    config = GPTConfig(width=96)
    assert (config.key_heads, config.size_of_head, config.size_of_hidden) == (4, 24, 384)
    assert GPTConfig(width=96, activation="swiglu").size_of_hidden == 256
    assert GPTConfig(width=100, activation="swiglu").size_of_hidden == 272  # 266.7, up to a multiple of 8
    assert GPTConfig(width=96, heads=5, head_dim=8).size_of_head == 8

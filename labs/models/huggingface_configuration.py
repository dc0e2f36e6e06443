"""The configuration of a GPT-2 or Llama checkpoint, from the config.json that Hugging Face stores with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from labs.models.configuration import Activation, GPTConfig, RotaryScaling


def read_configuration(path: str | Path) -> GPTConfig:
    """The configuration of the GPT that a checkpoint's config.json describes, without dropout.

    ValueError: a model other than GPT-2 or Llama, or an option that ``GPT`` has not.
    """
    file = Path(path) / "config.json"
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a configuration: {error}") from error
    readers = {"gpt2": _gpt2_configuration, "llama": _llama_configuration}
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind not in readers:
        raise ValueError(f"{file} is of model_type {kind!r}; what can be loaded is 'gpt2' and 'llama'")
    try:
        return readers[kind](settings)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}, which a {kind} model needs") from error


def _gpt2_configuration(settings: dict[str, Any]) -> GPTConfig:
    _expect(
        settings, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    return GPTConfig(
        vocabulary=settings["vocab_size"],
        context=settings["n_positions"],
        width=settings["n_embd"],
        layers=settings["n_layer"],
        heads=settings["n_head"],
        hidden=settings.get("n_inner"),
        activation=_activation(settings.get("activation_function", "gelu_new")),
        norm_epsilon=settings.get("layer_norm_epsilon", 1e-5),
        tied=settings.get("tie_word_embeddings", True),
    )


def _llama_configuration(settings: dict[str, Any]) -> GPTConfig:
    _expect(settings, hidden_act="silu", partial_rotary_factor=1.0)
    bias = settings.get("attention_bias", False)
    _expect(settings, mlp_bias=bias)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    return GPTConfig(
        vocabulary=settings["vocab_size"],
        context=settings.get("max_position_embeddings", 2048),
        width=settings["hidden_size"],
        layers=settings["num_hidden_layers"],
        heads=settings["num_attention_heads"],
        kv_heads=settings.get("num_key_value_heads"),
        head_dim=settings.get("head_dim"),
        hidden=settings["intermediate_size"],
        positions="rotary",
        rotary_base=rope.get("rope_theta", settings.get("rope_theta", 10_000.0)),
        rotary_scaling=_rotary_scaling(rope),
        norm="rms",
        norm_epsilon=settings.get("rms_norm_eps", 1e-6),
        activation="swiglu",
        bias=bias,
        tied=settings.get("tie_word_embeddings", False),
    )


def _expect(settings: dict[str, Any], **values: object) -> None:
    """ValueError where a setting is given, and is not the one that the GPT has."""
    for name, value in values.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]!r} is not supported; only {value!r} is")


def _activation(name: str) -> Activation:
    known: dict[str, Activation] = {
        "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
    }  # fmt: skip
    if name not in known:
        raise ValueError(f"activation_function={name!r} is not supported; {', '.join(known)} are")
    return known[name]


def _rotary_scaling(rope: dict[str, Any]) -> RotaryScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RotaryScaling(rope["factor"])
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return RotaryScaling(rope["factor"], low, high, rope["original_max_position_embeddings"])
    raise ValueError(f"rope_type={kind!r} is not supported; 'default', 'linear' and 'llama3' are")

"""GPT-2 and Llama checkpoints as Hugging Face stores them: safetensors and config.json in a folder.

  config = configuration("path/to/checkpoint")
  model = GPT(config)
  load_huggingface(model, "path/to/checkpoint")

Nothing is unpickled and nothing is downloaded. GPT-2's checkpoints hold matrices as (inputs, outputs), and query,
key and value in one; Llama's are (outputs, inputs), with heads laid out for rotation of pairs (j, j + dim / 2).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from labs.models.configuration import Activation, GPTConfig, RotaryScaling
from labs.models.gpt import GPT

FREE = {"dropout", "initialization", "functional"}
"""Settings of a model that its checkpoint has no say in."""

IGNORED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
"""Ends of names of tensors that are no parameters: masks and frequencies of old checkpoints."""


def configuration(path: str | Path) -> GPTConfig:
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


# --- weights -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a parameter lies in a checkpoint: a tensor, there transposed perhaps, or a part of its last axis."""

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1


def load_huggingface(model: GPT, path: str | Path) -> None:
    """Copies a checkpoint into the parameters of ``model``, in their dtype and on their device.

    path: a folder with config.json and model.safetensors (or its shards and their index), or a .safetensors
    file. Of a folder the configuration must be the model's too; of a file without one only names and shapes
    can be compared, which do not show rotary base or epsilon.

    ValueError, with the model as it was: a file that is missing or unreadable, another configuration, a
    parameter that is missing or of another shape, a tensor that the model has no place for.
    """
    if not isinstance(model, GPT):
        raise TypeError(f"load_huggingface fills a GPT, not a {type(model).__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device; model.to_empty(device=...) gives it memory first")
    files = _files(Path(path))
    if (files[0].parent / "config.json").exists():
        _compare(model.config, configuration(files[0].parent))
    with ExitStack() as opened:
        tensors: dict[str, Any] = {}
        for file in files:
            tensors |= _names(opened, file)
        prefix = "transformer." if "transformer.wte.weight" in tensors else ""
        gpt2 = f"{prefix}wte.weight" in tensors
        sources = dict(_gpt2_sources(model, prefix) if gpt2 else _llama_sources(model))
        _check_names(sources, tensors, model)
        loaded = {name: _read(source, tensors) for name, source in sources.items()}
    parameters = dict(model.named_parameters())
    wrong = [
        f"{name} is {tuple(parameters[name].shape)}, in the checkpoint {tuple(tensor.shape)}"
        for name, tensor in loaded.items()
        if parameters[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{path} is of another size than the model: {'; '.join(wrong)}")
    with torch.no_grad():
        for name, tensor in loaded.items():
            parameters[name].copy_(tensor)


def _files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    if path.suffix == ".safetensors" or not path.is_dir():
        if not path.is_file():
            raise ValueError(f"there is no {path}; a checkpoint is a folder or a .safetensors file")
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index with a weight_map: {error!r}") from error
        files = [path / Path(str(shard)).name for shard in shards]  # never outside the folder
    else:
        files = [path / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(
            f"{path} lacks {', '.join(missing) or 'any shard'}; pickled checkpoints are not read"
        )
    return files


def _names(opened: ExitStack, file: Path) -> dict[str, Any]:
    """Tensor name -> the open file it is in; the tensors are read one by one."""
    from safetensors import SafetensorError, safe_open

    try:
        handle = opened.enter_context(safe_open(file, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    return dict.fromkeys(handle.keys(), handle)


def _compare(config: GPTConfig, stored: GPTConfig) -> None:
    def meaning(one: GPTConfig, name: str) -> object:
        resolved = {"kv_heads": "key_heads", "head_dim": "size_of_head", "hidden": "size_of_hidden"}
        return getattr(one, resolved.get(name, name))

    # Rotary positions need no table: the model may allow fewer or more tokens than the checkpoint says.
    free = FREE | ({"context"} if config.positions == "rotary" else {"rotary_base", "rotary_scaling"})
    names = [field.name for field in fields(config) if field.name not in free]
    different = [
        f"{name}={meaning(config, name)!r} is {meaning(stored, name)!r} there"
        for name in names
        if meaning(config, name) != meaning(stored, name)
    ]
    if different:
        raise ValueError(
            f"the model is not the checkpoint's: {', '.join(different)}; build it with GPT(configuration(path))"
        )


def _gpt2_sources(model: GPT, prefix: str) -> Iterator[tuple[str, Source]]:
    """Parameter name -> where it lies in a GPT-2 checkpoint."""
    blocks = {
        "attention_norm": "ln_1", "attention.output": "attn.c_proj", "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj",
    }  # fmt: skip
    single = {"embedding.tokens": "wte", "embedding.positions": "wpe", "norm": "ln_f"}
    joined = ("attention.query", "attention.key", "attention.value")
    for name, _ in model.named_parameters():
        block, inside, kind = _parts(name)
        matrix = kind == "weight" and "norm" not in inside
        if block is None:
            yield name, Source("lm_head.weight" if inside == "head" else f"{prefix}{single[inside]}.{kind}")
        elif inside in joined:
            there = f"{prefix}h.{block}.attn.c_attn.{kind}"
            yield name, Source(there, matrix, joined.index(inside), len(joined))
        else:
            yield name, Source(f"{prefix}h.{block}.{blocks[inside]}.{kind}", matrix)


def _llama_sources(model: GPT) -> Iterator[tuple[str, Source]]:
    """Parameter name -> where it lies in a Llama checkpoint."""
    blocks = {
        "attention_norm": "input_layernorm", "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj", "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    }  # fmt: skip
    single = {"embedding.tokens": "embed_tokens", "norm": "norm"}
    for name, _ in model.named_parameters():
        block, inside, kind = _parts(name)
        if inside == "head":
            yield name, Source("lm_head.weight")
        elif block is None:
            yield name, Source(f"model.{single.get(inside, inside)}.{kind}")
        else:
            yield name, Source(f"model.layers.{block}.{blocks[inside]}.{kind}")


def _parts(name: str) -> tuple[str | None, str, str]:
    """Of blocks.3.attention.query.weight: ("3", "attention.query", "weight"); of norm.bias: (None, ...)."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return None, module, kind
    _, block, inside = module.split(".", 2)
    return block, inside, kind


def _check_names(sources: dict[str, Source], tensors: dict[str, Any], model: GPT) -> None:
    wanted = {source.name for source in sources.values()}
    missing = sorted(wanted - tensors.keys())
    extra = sorted(name for name in tensors.keys() - wanted if not name.endswith(IGNORED))
    if "lm_head.weight" in extra and model.config.tied:
        table = sources["embedding.tokens.weight"].name
        if not missing and torch.equal(_tensor(tensors, "lm_head.weight"), _tensor(tensors, table)):
            extra.remove("lm_head.weight")  # the same matrix, stored twice
    if missing or extra:
        raise ValueError(
            f"the checkpoint does not fit the model: it lacks {_some(missing)} and has {_some(extra)} besides"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def _tensor(tensors: dict[str, Any], name: str) -> torch.Tensor:
    return tensors[name].get_tensor(name)


def _read(source: Source, tensors: dict[str, Any]) -> torch.Tensor:
    tensor = _tensor(tensors, source.name)
    if source.parts > 1:
        if tensor.shape[-1] % source.parts:
            raise ValueError(f"{source.name} of {tuple(tensor.shape)} is not {source.parts} equal parts")
        tensor = tensor.chunk(source.parts, -1)[source.part]
    return tensor.T if source.transposed else tensor

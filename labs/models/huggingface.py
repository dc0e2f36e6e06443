"""The weights of GPT-2 and Llama checkpoints as Hugging Face stores them: safetensors in a folder.

  config = read_configuration("path/to/checkpoint")  # of labs.models.huggingface_configuration
  model = GPT(config)
  load_huggingface(model, "path/to/checkpoint")

Nothing is unpickled and nothing is downloaded. GPT-2's checkpoints hold matrices as (inputs, outputs), and
query, key and value in one; Llama's are (outputs, inputs), their heads laid out for the rotation of pairs
(j, j + dim / 2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from labs.models.configuration import GPTConfig
from labs.models.gpt import GPT
from labs.models.huggingface_configuration import read_configuration

FREE = {"dropout", "initialization", "functional"}
"""Settings of a model that its checkpoint has no say in."""

IGNORED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
"""Ends of names of tensors that are no parameters: masks and frequencies of old checkpoints."""


@dataclass(frozen=True)
class Layout:
    """How a family of checkpoints names what the GPT has.

    outside: module -> its name there; blocks: the same inside block {}. joined: where query, key and value
    are one matrix, its name. transposed: matrices of blocks are (inputs, outputs).
    """

    outside: Mapping[str, str]
    block: str
    inside: Mapping[str, str]
    joined: str = ""
    transposed: bool = False


GPT2 = Layout(
    outside={"embedding.tokens": "wte", "embedding.positions": "wpe", "norm": "ln_f", "head": "lm_head"},
    block="h.{}.",
    inside={
        "attention_norm": "ln_1",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    },
    joined="attn.c_attn",
    transposed=True,
)
LLAMA = Layout(
    outside={"embedding.tokens": "embed_tokens", "norm": "norm", "head": "lm_head"},
    block="layers.{}.",
    inside={
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    },
)

QUERY_KEY_VALUE = ("attention.query", "attention.key", "attention.value")


@dataclass(frozen=True)
class Source:
    """Where a parameter lies in a checkpoint: in a tensor, or one of three parts of its last axis; there
    transposed perhaps."""

    name: str
    transposed: bool = False
    part: int | None = None


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
        _compare(model.config, read_configuration(files[0].parent))
    with ExitStack() as opened:
        tensors: dict[str, Any] = {}
        for file in files:
            tensors |= _names(opened, file)
        old = any(name.endswith("wte.weight") for name in tensors)
        layout, prefix = (GPT2, "transformer.") if old else (LLAMA, "model.")
        if not any(name.startswith(prefix) for name in tensors):
            prefix = ""  # of the model without its head, as GPT-2 itself was published
        sources = _sources(model, layout, prefix)
        _check_names(sources, tensors, model)
        parameters = dict(model.named_parameters())
        shapes = {name: _shape(source, tensors) for name, source in sources.items()}
        wrong = [
            f"{name} is {tuple(parameters[name].shape)}, in the checkpoint {shape}"
            for name, shape in shapes.items()
            if parameters[name].shape != shape
        ]
        if wrong:
            raise ValueError(f"{path} is of another size than the model: {'; '.join(wrong)}")
        with torch.no_grad():
            for name, source in sources.items():  # one at a time: the checkpoint may fill half the memory
                parameters[name].copy_(_read(source, tensors))


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
    """Tensor name -> the open file it is in."""
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
            f"the model is not the checkpoint's: {', '.join(different)}; GPT(read_configuration(path)) is"
        )


def _sources(model: GPT, layout: Layout, prefix: str) -> dict[str, Source]:
    """Parameter name -> where it lies. What the layout has no name for keeps its own, and will be missing."""
    found = {}
    for name, _ in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if not module.startswith("blocks."):
            there = layout.outside.get(module, module)
            found[name] = Source(f"{'' if module == 'head' else prefix}{there}.{kind}")
            continue
        _, index, inside = module.split(".", 2)
        transposed = layout.transposed and kind == "weight" and not inside.endswith("norm")
        part = QUERY_KEY_VALUE.index(inside) if layout.joined and inside in QUERY_KEY_VALUE else None
        there = layout.inside.get(inside, inside) if part is None else layout.joined
        found[name] = Source(f"{prefix}{layout.block.format(index)}{there}.{kind}", transposed, part)
    return found


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


def _shape(source: Source, tensors: dict[str, Any]) -> tuple[int, ...]:
    """What ``_read`` will return has this shape; nothing but the file's header is read."""
    shape = list(tensors[source.name].get_slice(source.name).get_shape())
    if source.part is not None:
        if shape[-1] % 3:
            raise ValueError(f"{source.name} of {tuple(shape)} is not query, key and value")
        shape[-1] //= 3
    return tuple(reversed(shape) if source.transposed else shape)


def _read(source: Source, tensors: dict[str, Any]) -> torch.Tensor:
    tensor = _tensor(tensors, source.name)
    if source.part is not None:
        tensor = tensor.chunk(3, -1)[source.part]
    return tensor.T if source.transposed else tensor

"""Checkpoints under Hugging Face's names give the logits of a plain forward pass under those names.

The references below are GPT-2's and Llama's forward passes as transformers has them, on a dictionary of
tensors: Conv1D matrices, rotation by halves, keys repeated for their group of queries.
"""

import json
import math

import pytest
import torch

from labs.models.configuration import GPTConfig
from labs.models.gpt import GPT
from labs.models.huggingface import load_huggingface
from labs.models.huggingface_configuration import read_configuration

safetensors = pytest.importorskip("safetensors.torch", reason="checkpoints are read with safetensors")

GPT2 = {
    "model_type": "gpt2", "vocab_size": 23, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-3, "n_inner": None,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 23, "max_position_embeddings": 16, "hidden_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    "intermediate_size": 20, "hidden_act": "silu", "rms_norm_eps": 1e-3, "rope_theta": 100.0,
    "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip


def draw(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}


def gpt2_tensors(prefix="transformer."):
    width, shapes = 12, {"wte.weight": (23, 12), "wpe.weight": (16, 12)}
    for block in range(2):
        for name, inputs, outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes |= {f"h.{block}.{name}.weight": (inputs, outputs), f"h.{block}.{name}.bias": (outputs,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{block}.{name}.weight": (width,), f"h.{block}.{name}.bias": (width,)}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    return draw({prefix + name: shape for name, shape in shapes.items()})


def gpt2_forward(tensors, tokens, prefix="transformer."):
    def get(name):
        return tensors[prefix + name].double()

    def conv1d(x, name):
        return x @ get(name + ".weight") + get(name + ".bias")

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-3).sqrt() * get(name + ".weight") + get(name + ".bias")

    def gelu_new(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    batch, length = tokens.shape
    x = get("wte.weight")[tokens] + get("wpe.weight")[:length]
    for block in range(2):
        states = conv1d(layer_norm(x, f"h.{block}.ln_1"), f"h.{block}.attn.c_attn")
        heads = (part.view(batch, length, 3, 4).transpose(1, 2) for part in states.split(12, -1))
        x = x + conv1d(attention(*heads), f"h.{block}.attn.c_proj")
        hidden = gelu_new(conv1d(layer_norm(x, f"h.{block}.ln_2"), f"h.{block}.mlp.c_fc"))
        x = x + conv1d(hidden, f"h.{block}.mlp.c_proj")
    return layer_norm(x, "ln_f") @ get("wte.weight").T


def attention(query, key, value):
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def llama_tensors(biases=False, head=True):
    shapes = {"model.embed_tokens.weight": (23, 12)}
    for block in range(2):
        layers = {
            "self_attn.q_proj": (24, 12), "self_attn.k_proj": (12, 12), "self_attn.v_proj": (12, 12),
            "self_attn.o_proj": (12, 24), "mlp.gate_proj": (20, 12), "mlp.up_proj": (20, 12),
            "mlp.down_proj": (12, 20),
        }  # fmt: skip
        for name, shape in layers.items():
            shapes[f"model.layers.{block}.{name}.weight"] = shape
            if biases:
                shapes[f"model.layers.{block}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{block}.{name}.weight"] = (12,)
    shapes["model.norm.weight"] = (12,)
    return draw(shapes | ({"lm_head.weight": (23, 12)} if head else {}))


def llama_frequencies(settings):
    frequencies = 100.0 ** -(torch.arange(0, 6, 2).double() / 6)
    rope = settings["rope_scaling"]
    if rope is None:
        return frequencies
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (8 / wavelengths - 1.0) / (4.0 - 1.0)
    between = (1 - smooth) * frequencies / 8.0 + smooth * frequencies
    scaled = torch.where(wavelengths > 8 / 1.0, frequencies / 8.0, between)
    return torch.where(wavelengths < 8 / 4.0, frequencies, scaled)


def llama_forward(tensors, tokens, settings):
    def linear(x, name):
        bias = tensors.get(f"{name}.bias")
        return x @ tensors[f"{name}.weight"].double().T + (0 if bias is None else bias.double())

    def rms_norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * tensors[f"{name}.weight"].double()

    def rotate_half(x):
        return torch.cat((-x[..., 3:], x[..., :3]), -1)

    batch, length = tokens.shape
    angles = torch.outer(torch.arange(length).double(), llama_frequencies(settings))
    angles = torch.cat((angles, angles), -1)

    def heads(x, count, turned):
        x = x.view(batch, length, count, 6).transpose(1, 2)
        if turned:
            x = x * angles.cos() + rotate_half(x) * angles.sin()
        return x.repeat_interleave(4 // count, 1)

    table = tensors["model.embed_tokens.weight"].double()
    x = table[tokens]
    for block in range(2):
        name = f"model.layers.{block}"
        states = rms_norm(x, f"{name}.input_layernorm")
        attended = attention(
            heads(linear(states, f"{name}.self_attn.q_proj"), 4, True),
            heads(linear(states, f"{name}.self_attn.k_proj"), 2, True),
            heads(linear(states, f"{name}.self_attn.v_proj"), 2, False),
        )
        x = x + linear(attended, f"{name}.self_attn.o_proj")
        states = rms_norm(x, f"{name}.post_attention_layernorm")
        gate, up = linear(states, f"{name}.mlp.gate_proj"), linear(states, f"{name}.mlp.up_proj")
        x = x + linear(gate * gate.sigmoid() * up, f"{name}.mlp.down_proj")
    head = tensors.get("lm_head.weight")
    return rms_norm(x, "model.norm") @ (table if head is None else head.double()).T


def write(folder, settings, tensors, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        safetensors.save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    places = {name: names[index % shards] for index, name in enumerate(tensors)}
    for file in names:
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        safetensors.save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def logits(path):
    model = GPT(read_configuration(path)).double()
    load_huggingface(model, path)
    return model(TOKENS)


TOKENS = torch.randint(23, (2, 11), generator=torch.Generator().manual_seed(4))
NEAR = {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2(tmp_path, prefix):
    """With the masks and the second copy of the table that old checkpoints hold."""
    tensors = gpt2_tensors(prefix)
    old = {f"{prefix}h.{block}.attn.bias": torch.ones(1, 1, 16, 16) for block in range(2)}
    old |= {f"{prefix}h.1.attn.masked_bias": torch.tensor(-1e4)}
    old |= {"lm_head.weight": tensors[f"{prefix}wte.weight"].clone()}
    expected = gpt2_forward(tensors, TOKENS, prefix)
    torch.testing.assert_close(logits(write(tmp_path, GPT2, tensors | old)), expected, **NEAR)
    torch.testing.assert_close(logits(write(tmp_path, GPT2, tensors)), expected, **NEAR)


@pytest.mark.parametrize(
    ("changes", "shards"),
    [
        ({}, 1),
        ({"rope_scaling": LLAMA3}, 3),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 1),
        ({"tie_word_embeddings": True}, 2),
        ({"attention_bias": True, "mlp_bias": True}, 1),
    ],
    ids=["plain", "llama3-sharded", "linear", "tied-sharded", "biased"],
)
def test_llama(tmp_path, changes, shards):
    settings = LLAMA | changes
    tensors = llama_tensors(settings["attention_bias"], not settings["tie_word_embeddings"])
    path = write(tmp_path, settings, tensors, shards)
    torch.testing.assert_close(logits(path), llama_forward(tensors, TOKENS, settings), **NEAR)


def test_newer_spelling_of_rotary_settings(tmp_path):
    older = read_configuration(write(tmp_path, LLAMA | {"rope_scaling": LLAMA3}, {}))
    settings = {name: value for name, value in LLAMA.items() if not name.startswith("rope")}
    settings["rope_parameters"] = LLAMA3 | {"rope_theta": 100.0}
    assert read_configuration(write(tmp_path, settings, {})) == older


def test_dtype_and_device_stay_the_models(tmp_path):
    tensors = llama_tensors()
    path = write(tmp_path, LLAMA, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    model = GPT(read_configuration(path))
    load_huggingface(model, path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    rounded = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    expected = llama_forward(rounded, TOKENS, LLAMA)
    torch.testing.assert_close(model(TOKENS).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_file_by_itself(tmp_path):
    """Without config.json the model's own configuration is believed."""
    tensors = gpt2_tensors()
    safetensors.save_file(tensors, tmp_path / "weights.safetensors")
    config = GPTConfig(
        vocabulary=23, context=16, width=12, layers=2, heads=3, activation="gelu_tanh", norm_epsilon=1e-3
    )
    model = GPT(config).double()
    load_huggingface(model, tmp_path / "weights.safetensors")
    torch.testing.assert_close(model(TOKENS), gpt2_forward(tensors, TOKENS), **NEAR)


def refused(model, path, message):
    """ValueError with ``message``, and not a parameter changed."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_huggingface(model, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_does_not_fit(tmp_path):
    tensors, path = llama_tensors(), tmp_path
    write(path, LLAMA, tensors)
    config = read_configuration(path)
    other = GPT(GPTConfig(vocabulary=23, width=12, layers=2, heads=4, context=16))
    refused(other, path, r"not the checkpoint's: kv_heads|head_dim=3 is 6 there")
    file = path / "model.safetensors"
    (path / "config.json").unlink()
    refused(other, path, r"lacks .*and 13 more and has .*besides")
    shorter = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    safetensors.save_file(shorter, file)
    refused(GPT(config), path, r"it lacks model.norm.weight and has nothing besides")
    safetensors.save_file(tensors | {"model.layers.0.extra": torch.ones(2)}, file)
    refused(GPT(config), path, r"it lacks nothing and has model.layers.0.extra besides")
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors.save_file(tensors | {name: torch.ones(21, 12)}, file)
    refused(GPT(config), path, r"blocks.1.feed_forward.up.weight is \(20, 12\), in the checkpoint \(21, 12\)")
    separate = tensors | {"lm_head.weight": torch.ones(23, 12)}
    safetensors.save_file(separate, file)
    tied = GPTConfig(**{**config.__dict__, "tied": True})
    refused(GPT(tied), path, "has lm_head.weight besides")
    safetensors.save_file(llama_tensors(head=False), file)
    refused(GPT(config), path, "it lacks lm_head.weight")
    safetensors.save_file(gpt2_tensors() | {"transformer.h.0.attn.c_attn.weight": torch.ones(12, 35)}, file)
    gpt2 = GPTConfig(vocabulary=23, context=16, width=12, layers=2, heads=3)
    refused(GPT(gpt2), path, r"\(12, 35\) is not query, key and value")


def test_what_cannot_be_read(tmp_path):
    path = write(tmp_path / "checkpoint", LLAMA, llama_tensors())
    model = GPT(read_configuration(path))
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    refused(model, path, "not a whole safetensors file")
    file.write_bytes(b"PK\x03\x04 a pickle perhaps")
    refused(model, path, "not a whole safetensors file")
    file.unlink()
    refused(model, path, r"lacks model.safetensors; pickled checkpoints are not read")
    safetensors.save_file(llama_tensors(), tmp_path / "elsewhere.safetensors")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    refused(model, path, r"lacks elsewhere.safetensors")  # nothing outside the folder is opened
    (path / "model.safetensors.index.json").write_text("[]")
    refused(model, path, "not an index with a weight_map")
    refused(model, path / "nothing", "there is no")
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        load_huggingface(GPT(GPTConfig()), path)
    with pytest.raises(TypeError, match="fills a GPT, not a Linear"):
        load_huggingface(torch.nn.Linear(1, 1), path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert'; what can be loaded is 'gpt2' and 'llama'"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu' is"),
        (LLAMA | {"attention_bias": True}, "mlp_bias=False is not supported; only True is"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2 | {"activation_function": "swish"}, "activation_function='swish' is not supported; gelu"),
        ({"model_type": "gpt2"}, "lacks 'vocab_size', which a gpt2 model needs"),
        ([], "model_type None"),
    ],
)
def test_bad_configurations(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        read_configuration(write(tmp_path, settings, {}))


def test_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as a configuration"):
        read_configuration(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a configuration"):
        read_configuration(tmp_path)

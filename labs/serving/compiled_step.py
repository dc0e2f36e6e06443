"""The compiled bodies of a step that only decodes; ``labs.serving.compiled`` says why and calls it.

The formulas of ``labs.models`` (RMSNorm, rotary positions, SwiGLU, attention), written for rows of float32.
Memory is given by address; numba compiles each small function once.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kernels.compiled_once import address, compiled_once, floats_at
from kernels.simd import exp_float32, exp_nonpositive_float32, full_width, maximum
from kernels.threads import chunked
from kernels.tiles import PANEL, ROWS, VECTORS, multiply

f32 = np.float32
SUM = ("contract", "reassoc", "nsz")
_inline = njit(error_model="numpy", fastmath=set(SUM), forceinline=True)


@_inline
def _product(target, target_row, source, source_row, packed, panels, depth, rows, fresh):
    """target = source times the packed matrix, or added to it; rows: a multiple of ``ROWS``."""
    for panel in range(panels):
        for row in range(0, rows, ROWS):
            multiply(
                target + 4 * (row * target_row + panel * PANEL),
                target_row,
                source + 4 * row * source_row,
                source_row,
                1,
                packed + 4 * panel * depth * PANEL,
                PANEL,
                0,
                depth,
                VECTORS,
                fresh,
            )


@compiled_once(floats=("epsilon",), fastmath=SUM)
def _normalize(target, source, weight, count, epsilon):
    """x / sqrt(mean(x * x) + epsilon) * weight, of one row."""
    full_width()
    out, x, w = floats_at(target, count), floats_at(source, count), floats_at(weight, count)
    total = f32(0)
    for i in range(count):
        total += x[i] * x[i]
    scale = f32(1) / np.sqrt(total / f32(count) + epsilon)
    for i in range(count):
        out[i] = x[i] * scale * w[i]


@compiled_once()
def _rotate(target, source, cosine, sine, pairs):
    """Pairs (j, j + pairs) of a head turned by the angles of its position."""
    full_width()
    out, x = floats_at(target, 2 * pairs), floats_at(source, 2 * pairs)
    c, s = floats_at(cosine, pairs), floats_at(sine, pairs)
    for i in range(pairs):
        first, second = x[i], x[i + pairs]
        out[i] = first * c[i] - second * s[i]
        out[i + pairs] = second * c[i] + first * s[i]


@compiled_once()
def _copy(target, source, count):
    full_width()
    out, x = floats_at(target, count), floats_at(source, count)
    for i in range(count):
        out[i] = x[i]


@compiled_once()
def _swiglu(target, gate, up, count):
    """silu(gate) * up, of one row."""
    full_width()
    out, g, u = floats_at(target, count), floats_at(gate, count), floats_at(up, count)
    for i in range(count):
        out[i] = g[i] / (f32(1) + exp_float32(-g[i])) * u[i]


@compiled_once(floats=("scale",), fastmath=SUM)
def _scores(target, query, keys, count, dim, scale):
    """scale times the products of a query with ``count`` keys that lie behind each other."""
    full_width()
    out, q, k = floats_at(target, count), floats_at(query, dim), floats_at(keys, count * dim)
    whole = count - count % 4
    for j in range(0, whole, 4):
        a, b, c, d = f32(0), f32(0), f32(0), f32(0)
        at = j * dim
        for i in range(dim):
            a += q[i] * k[at + i]
            b += q[i] * k[at + dim + i]
            c += q[i] * k[at + 2 * dim + i]
            d += q[i] * k[at + 3 * dim + i]
        out[j], out[j + 1], out[j + 2], out[j + 3] = a * scale, b * scale, c * scale, d * scale
    for j in range(whole, count):
        a = f32(0)
        for i in range(dim):
            a += q[i] * k[j * dim + i]
        out[j] = a * scale


@compiled_once(fastmath=SUM)
def _softmax(scores, count):
    full_width()
    x = floats_at(scores, count)
    top = x[0]
    for j in range(count):
        top = maximum(top, x[j])
    total = f32(0)
    for j in range(count):
        weight = exp_nonpositive_float32(x[j] - top)
        x[j] = weight
        total += weight
    share = f32(1) / total
    for j in range(count):
        x[j] *= share


@compiled_once()
def _weigh(target, weights, values, count, dim):
    """Adds ``count`` values that lie behind each other, each times its weight."""
    full_width()
    out, w, v = floats_at(target, dim), floats_at(weights, count), floats_at(values, count * dim)
    whole = count - count % 4
    for j in range(0, whole, 4):
        a, b, c, d = w[j], w[j + 1], w[j + 2], w[j + 3]
        at = j * dim
        for i in range(dim):
            out[i] += a * v[at + i] + b * v[at + dim + i] + c * v[at + 2 * dim + i] + d * v[at + 3 * dim + i]
    for j in range(whole, count):
        for i in range(dim):
            out[i] += w[j] * v[j * dim + i]


@chunked
def step(
    chunk,
    tokens,
    positions,
    table,
    cache,
    embedding,
    norms,
    qkv,
    output,
    gate_up,
    down,
    head,
    cosines,
    sines,
    epsilon,
    x,
    y,
    wide,
    scores,
    logits,
):
    """tokens, positions: (sequences,). table: (sequences, blocks). cache: (blocks, layers, 2, heads,
    block_size, head_dim). norms: (2 layers + 1, width). Matrices: (layers, panels, depth, PANEL). x, y, wide,
    logits: a row a sequence, and rows to the next multiple of ``ROWS``."""
    sequences, rows = tokens.size, x.shape[0]
    _, layers, _, heads, size, dim = cache.shape
    width, room = x.shape[1], wide.shape[1]
    hidden = gate_up.shape[1] // 2 * PANEL
    depth = down.shape[2]
    scale = f32(1 / np.sqrt(dim))
    epsilon = f32(epsilon)
    for row in range(sequences):
        _copy(address(x, row * width), address(embedding, tokens[row] * width), width)
    for layer in range(layers):
        for row in range(sequences):
            at, weight = row * width, address(norms, 2 * layer * width)
            _normalize(address(y, row * y.shape[1]), address(x, at), weight, width, epsilon)
        matrix = address(qkv, layer * qkv[0].size)
        _product(address(wide, 0), room, address(y, 0), y.shape[1], matrix, qkv.shape[1], width, rows, True)
        for row in range(sequences):
            position = positions[row]
            own = ((table[row, position // size] * layers + layer) * 2 * heads * size + position % size) * dim
            angle = position * (dim // 2)
            for h in range(heads):
                query = address(wide, row * room + h * dim)
                cosine, sine = address(cosines, angle), address(sines, angle)
                _rotate(query, query, cosine, sine, dim // 2)
                key = address(wide, row * room + width + h * dim)
                _rotate(address(cache, own + h * size * dim), key, cosine, sine, dim // 2)
                value = address(wide, row * room + 2 * width + h * dim)
                _copy(address(cache, own + (heads + h) * size * dim), value, dim)
                for first in range(0, position + 1, size):
                    block = (table[row, first // size] * layers + layer) * 2 * heads + h
                    count = min(size, position + 1 - first)
                    keys = address(cache, block * size * dim)
                    _scores(address(scores, first), query, keys, count, dim, scale)
                _softmax(address(scores, 0), position + 1)
                attended = y[row, h * dim : h * dim + dim]
                for i in range(dim):
                    attended[i] = f32(0)
                for first in range(0, position + 1, size):
                    block = (table[row, first // size] * layers + layer) * 2 * heads + heads + h
                    count = min(size, position + 1 - first)
                    values = address(cache, block * size * dim)
                    place = address(y, row * y.shape[1] + h * dim)
                    _weigh(place, address(scores, first), values, count, dim)
        matrix = address(output, layer * output[0].size)
        _product(address(x, 0), width, address(y, 0), y.shape[1], matrix, output.shape[1], width, rows, False)
        for row in range(sequences):
            at, weight = row * width, address(norms, (2 * layer + 1) * width)
            _normalize(address(y, row * y.shape[1]), address(x, at), weight, width, epsilon)
        matrix = address(gate_up, layer * gate_up[0].size)
        _product(
            address(wide, 0), room, address(y, 0), y.shape[1], matrix, gate_up.shape[1], width, rows, True
        )
        for row in range(sequences):
            gate, up = address(wide, row * room), address(wide, row * room + hidden)
            _swiglu(address(y, row * y.shape[1]), gate, up, depth)
        matrix = address(down, layer * down[0].size)
        _product(address(x, 0), width, address(y, 0), y.shape[1], matrix, down.shape[1], depth, rows, False)
    for row in range(sequences):
        at, weight = row * width, address(norms, 2 * layers * width)
        _normalize(address(y, row * y.shape[1]), address(x, at), weight, width, epsilon)
    columns = logits.shape[1]
    _product(
        address(logits, 0),
        columns,
        address(y, 0),
        y.shape[1],
        address(head, 0),
        head.shape[1],
        width,
        rows,
        True,
    )

// The way back from packing.py: base64 -> LEB128 -> numbers (exact below 2^53).

function unpack(text) {
  const bytes = atob(text);
  const out = new Float64Array(bytes.length);
  let count = 0, value = 0, weight = 1;
  for (let i = 0; i < bytes.length; i++) {
    const byte = bytes.charCodeAt(i);
    value += (byte & 127) * weight;
    if (byte > 127) {
      weight *= 128;
    } else {
      out[count++] = value;
      value = 0;
      weight = 1;
    }
  }
  return out.slice(0, count);
}

function unpackSigned(text) {
  const out = unpack(text);
  for (let i = 0; i < out.length; i++) out[i] = out[i] % 2 ? -(out[i] + 1) / 2 : out[i] / 2;
  return out;
}

function pageData(id) {
  const block = document.getElementById(id);
  return block ? JSON.parse(block.textContent) : null;
}

// First index in [low, high) whose value is at least `bound`; values rise.
function lowerBound(values, bound, low, high) {
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < bound) low = middle + 1;
    else high = middle;
  }
  return low;
}

// What the timeline and the flame graph share: colours of the page's theme, sharp canvases, numbers with units.

const KIND_VARIABLES = {
  operator: "--c5", function: "--c4", runtime: "--c6", synchronization: "--c3", kernel: "--c0", copy: "--c2",
  set: "--c2", communication: "--c1", annotation: "--k-annotation", step: "--k-step", wait: "--c3",
  unclassified: "--alarm",
};
const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const LETTER = letterWidth(); // pixels a letter of FONT is wide, about
const SHADES = 4; // of a kind's colour, so that neighbours of one kind are told apart by name

function letterWidth() {
  const context = document.createElement("canvas").getContext("2d");
  const sample = "aten::convolution_backward ncclKernel_AllReduce";
  context.font = FONT;
  return context.measureText(sample).width / sample.length * 1.09;
}

function rgb(hex) {
  const number = parseInt(hex.trim().slice(1), 16);
  return [number >> 16, (number >> 8) & 255, number & 255];
}

function mix(one, other, share) {
  return one.map((part, i) => Math.round(part + (other[i] - part) * share));
}

function css(colour, alpha) {
  return alpha === undefined ? `rgb(${colour})` : `rgba(${colour},${alpha})`;
}

function luminance(colour) {
  const [red, green, blue] = colour.map((part) => (part /= 255) <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

// Black or white, whichever is read better on this colour.
function inkOn(colour) {
  return luminance(colour) > 0.179 ? "#10161d" : "#ffffff";
}

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => rgb(style.getPropertyValue(name));
  const theme = { kinds: {} };
  for (const name of ["paper", "ink", "soft", "grid", "edge", "alarm", "c0", "c1", "page"]) theme[name] = value("--" + name);
  for (const [kind, variable] of Object.entries(KIND_VARIABLES)) {
    theme.kinds[kind] = [];
    for (let shade = 0; shade < SHADES; shade++) {
      const colour = mix(value(variable), theme.paper, shade * 0.11);
      theme.kinds[kind].push({ colour, fill: css(colour), ink: inkOn(colour) });
    }
  }
  return theme;
}

function onThemeChange(redraw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

// Sets the canvas to its size on the screen; returns its context in CSS pixels, already cleared.
function prepare(canvas, width, height) {
  const ratio = Math.min(3, window.devicePixelRatio || 1);
  const [w, h] = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d", { alpha: false });
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.font = FONT;
  context.textBaseline = "middle";
  return context;
}

function fitted(text, pixels) {
  const letters = Math.floor(pixels / LETTER);
  return text.length <= letters ? text : letters < 3 ? "" : text.slice(0, letters - 1) + "…";
}

// 1234567 -> "1.23 ms"; the same digits and units as everywhere in perflab.
function duration(ns) {
  const [number, unit] = scaled(ns, [["ns", 1], ["us", 1e3], ["ms", 1e6], ["s", 1e9]]);
  return ns ? `${Math.abs(number) >= 999.5 ? Math.round(number) : number.toPrecision(3)} ${unit}` : "0 s";
}

function bytes(count) {
  const [number, unit] = scaled(count, [["B", 1], ["KiB", 1024], ["MiB", 1024 ** 2], ["GiB", 1024 ** 3], ["TiB", 1024 ** 4]]);
  return `${Number.isInteger(number) ? number : number.toPrecision(number >= 1000 ? 4 : 3)} ${unit}`;
}

// The number and the largest unit in which it is at least 1, after rounding: 999.96 us is 1.00 ms.
function scaled(value, units) {
  let [unit, factor] = units[0];
  for (const [name, size] of units) {
    if (Number((Math.abs(value) / size).toPrecision(4)) >= 1) [unit, factor] = [name, size];
  }
  return [value / factor, unit];
}

function count(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}

// Element with text; never with HTML, because names come from strangers.
function element(tag, text, attributes) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  return made;
}

function factList(pairs) {
  const list = element("dl", undefined, { class: "facts" });
  for (const [name, value] of pairs) {
    const line = element("div");
    line.append(element("dt", name), value instanceof Node ? value : element("dd", value));
    list.append(line);
  }
  return list;
}

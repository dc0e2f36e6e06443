// A call tree as a flame graph (the callers on top), and the difference of two as one.

const FRAME = 19;

class FlameView {
  constructor(root, data, names) {
    this.root = root;
    this.names = names;
    this.canvas = root.querySelector("canvas");
    this.viewport = root.querySelector(".viewport");
    this.said = root.querySelector(".selected");
    this.search = root.querySelector("input[type=search]");
    this.answer = root.querySelector(".found");
    this.tip = root.querySelector(".tip");
    this.tree = { parent: unpack(data.parent), name: unpack(data.name), kind: unpack(data.kind), calls: unpack(data.calls), kinds: data.kinds };
    this.difference = "base_host" in data;
    this.unit = data.unit;
    // Without a choice (one place has all the time) that place is what widths are of.
    this.only = (data.weights[0] || "host").replace(/^(base|new)_/, "");
    this.own = {};
    for (const weight of this.difference ? ["base_host", "base_device", "new_host", "new_device"] : ["host", "device"]) this.own[weight] = unpack(data[weight]);
    this.total = {};
    for (const [weight, own] of Object.entries(this.own)) this.total[weight] = this.sums(own);
    this.theme = readTheme();
    this.focus = -1;
    this.selected = -1;
    this.found = null;
    this.listen();
    this.weigh();
  }

  // A parent stands before its children: one walk backwards adds everything up.
  sums(own) {
    const total = Float64Array.from(own);
    const { parent } = this.tree;
    for (let i = total.length - 1; i >= 0; i--) if (parent[i]) total[parent[i] - 1] += total[i];
    return total;
  }

  listen() {
    this.root.querySelectorAll("select").forEach((choice) => choice.addEventListener("change", () => this.weigh()));
    new ResizeObserver(() => this.redraw()).observe(this.viewport);
    onThemeChange(() => { this.theme = readTheme(); this.redraw(); });
    this.canvas.addEventListener("click", (event) => this.zoom(this.at(event.offsetX, event.offsetY)));
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    this.viewport.addEventListener("keydown", (event) => this.key(event));
    this.search.addEventListener("input", () => this.find());
    this.root.querySelector("[data-do=whole]").addEventListener("click", () => this.zoom(-1));
  }

  // Chooses what widths mean, and lays all frames out for it.
  weigh() {
    const place = this.root.querySelector("select[name=place]");
    const width = this.root.querySelector("select[name=width]");
    this.place = place ? place.value : this.only;
    let own = this.own[this.place];
    if (this.difference) {
      const [base, now] = [this.own["base_" + this.place], this.own["new_" + this.place]];
      own = width.value === "base" ? base : width.value === "new" ? now : base.map((value, i) => Math.max(value, now[i]));
    }
    this.weight = this.sums(own);
    this.arrange();
    if (this.focus >= 0 && !this.weight[this.focus]) this.focus = -1;
    this.find();
    this.say(this.focus);
    this.redraw();
  }

  // left[i], in units of the weight: children stand side by side below their parent, the largest first.
  arrange() {
    const { parent } = this.tree;
    const size = parent.length;
    const children = Array.from({ length: size + 1 }, () => []);
    for (let i = 0; i < size; i++) if (this.weight[i] > 0) children[parent[i]].push(i);
    this.left = new Float64Array(size);
    this.depth = new Uint16Array(size);
    this.whole = 0;
    for (const list of children) list.sort((one, other) => this.weight[other] - this.weight[one]);
    for (const top of children[0]) {
      this.left[top] = this.whole;
      this.whole += this.weight[top];
    }
    const waiting = [...children[0]];
    for (let at = 0; at < waiting.length; at++) {
      let x = this.left[waiting[at]];
      for (const child of children[waiting[at] + 1]) {
        this.left[child] = x;
        this.depth[child] = this.depth[waiting[at]] + 1;
        x += this.weight[child];
        waiting.push(child);
      }
    }
    this.order = waiting; // from the top down, only frames with a width
    this.children = children;
  }

  redraw() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.pending = false;
    const width = this.viewport.clientWidth;
    const from = this.focus < 0 ? 0 : this.left[this.focus];
    const scale = width / Math.max(1, this.focus < 0 ? this.whole : this.weight[this.focus]);
    const above = this.focus < 0 ? 0 : this.depth[this.focus];
    const boxes = [];
    let deepest = 0;
    for (const i of this.order) {
      let x = (this.left[i] - from) * scale, w = this.weight[i] * scale;
      const caller = this.depth[i] < above;
      if (caller ? !(this.left[i] <= from && this.left[i] + this.weight[i] > from) : x + w < 0.5 || x > width) continue;
      if (caller) [x, w] = [0, width];
      if (w < 0.4) continue;
      boxes.push([i, Math.max(0, x), Math.min(w, width - Math.max(0, x)), caller]);
      deepest = Math.max(deepest, this.depth[i]);
    }
    const height = (deepest + 1) * FRAME + 2;
    this.canvas.style.height = `${height}px`;
    const context = prepare(this.canvas, width, height);
    context.fillStyle = css(this.theme.paper);
    context.fillRect(0, 0, width, height);
    for (const [i, x, w, caller] of boxes) this.drawFrame(context, i, x, w, caller);
    this.boxes = boxes;
  }

  drawFrame(context, i, x, w, caller) {
    const y = this.depth[i] * FRAME;
    const { colour, ink } = this.colourOf(i);
    context.globalAlpha = this.found && !this.found[this.tree.name[i]] ? 0.2 : caller ? 0.55 : 1;
    context.fillStyle = css(colour);
    context.fillRect(x, y, w > 2 ? w - 1 : Math.max(w, 0.5), FRAME - 1);
    if (w > 26) {
      context.fillStyle = caller || context.globalAlpha < 0.5 ? css(this.theme.ink) : ink;
      context.fillText(fitted(this.names[this.tree.name[i]], w - 8), x + 4, y + FRAME / 2);
    }
    context.globalAlpha = 1;
    if (i === this.selected) {
      context.strokeStyle = css(this.theme.ink);
      context.lineWidth = 2;
      context.strokeRect(x + 1, y + 1, Math.max(2, w - 3), FRAME - 3);
    }
  }

  // By kind; in a difference from blue (shorter) over grey to red (longer), full at half or double.
  colourOf(i) {
    if (!this.difference) return this.theme.kinds[this.tree.kinds[this.tree.kind[i]]][this.tree.name[i] % SHADES];
    const [base, now] = [this.total["base_" + this.place][i], this.total["new_" + this.place][i]];
    const change = Math.max(-1, Math.min(1, Math.log2((now + 1) / (base + 1))));
    const colour = mix(mix(this.theme.paper, this.theme.ink, 0.17), change > 0 ? this.theme.alarm : this.theme.c0, Math.sqrt(Math.abs(change)));
    return { colour, ink: inkOn(colour) };
  }

  at(x, y) {
    const box = this.boxes.find(([i, left, width]) => x >= left && x < left + Math.max(1, width) && Math.floor(y / FRAME) === this.depth[i]);
    return box ? box[0] : -1;
  }

  hover(event) {
    const i = this.at(event.offsetX, event.offsetY);
    this.tip.hidden = i < 0;
    this.canvas.style.cursor = i < 0 ? "" : "pointer";
    if (i < 0) return;
    this.tip.textContent = `${this.names[this.tree.name[i]].slice(0, 160)} · ${this.figures(i).map((pair) => pair.join(" ")).slice(0, 3).join(" · ")}`;
    const x = event.offsetX + 12;
    this.tip.style.left = `${Math.max(0, Math.min(x, this.viewport.clientWidth - this.tip.offsetWidth - 4))}px`;
    this.tip.style.top = `${event.offsetY - this.viewport.scrollTop + 18}px`;
  }

  zoom(i) {
    this.focus = i;
    this.selected = i;
    this.say(i);
    this.redraw();
  }

  select(i) {
    if (i === undefined || i < 0) return;
    this.selected = i;
    this.say(i);
    this.viewport.scrollTop = Math.max(0, this.depth[i] * FRAME - this.viewport.clientHeight / 2);
    this.redraw();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const here = this.selected;
    const above = here < 0 ? 0 : this.tree.parent[here];
    const siblings = this.children[above];
    const place = siblings.indexOf(here);
    const actions = {
      ArrowDown: () => this.select(here < 0 ? this.order[0] : this.children[here + 1][0]),
      ArrowUp: () => this.select(above - 1),
      ArrowRight: () => this.select(siblings[place + 1]),
      ArrowLeft: () => this.select(siblings[place - 1]),
      Enter: () => here >= 0 && this.zoom(here),
      Escape: () => this.zoom(-1),
      "/": () => this.search.focus(),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  // A length: nanoseconds, or what the report counts instead.
  amount(value) {
    if (!this.unit) return duration(value);
    return this.unit === "none" ? value.toLocaleString("en") : `${value.toLocaleString("en")} ${this.unit}`;
  }

  figures(i) {
    const share = (value, of) => `${(100 * value / Math.max(1, of)).toPrecision(3)} %`;
    if (this.difference) {
      const [base, now] = [this.total["base_" + this.place][i], this.total["new_" + this.place][i]];
      return [["base", `${duration(base)} a step`], ["new", `${duration(now)} a step`],
        ["change", `${now > base ? "+" : now < base ? "−" : ""}${duration(Math.abs(now - base))}${base ? ` (${now >= base ? "+" : "−"}${share(Math.abs(now - base), base)})` : ""}`]];
    }
    return [["in all", `${this.amount(this.weight[i])} (${share(this.weight[i], this.whole)})`],
      ["itself", this.amount(this.own[this.place][i])], ["calls", this.tree.calls[i].toLocaleString("en")],
      ["kind", this.tree.kinds[this.tree.kind[i]]]];
  }

  say(i) {
    this.said.textContent = "";
    if (i < 0) {
      this.said.append(element("p", "Click a frame to zoom into it and to see its figures.", { class: "soft" }));
      return;
    }
    this.said.append(element("p", this.names[this.tree.name[i]], { class: "slice-name" }), factList(this.figures(i)));
  }

  find() {
    const wanted = this.search.value.trim().toLowerCase();
    this.found = wanted ? Uint8Array.from(this.names, (name) => name.toLowerCase().includes(wanted)) : null;
    this.answer.textContent = this.found ? this.foundText() : "";
    this.redraw();
  }

  // Time under all frames found, each moment once: a frame below another one found is already in it.
  foundText() {
    let time = 0, frames = 0;
    const covered = new Uint8Array(this.weight.length);
    for (const i of this.order) {
      const above = this.tree.parent[i];
      const hit = this.found[this.tree.name[i]];
      frames += hit;
      if (hit && !(above && covered[above - 1])) time += this.weight[i];
      covered[i] = hit || (above && covered[above - 1]) ? 1 : 0;
    }
    return frames ? `${count(frames, "frame")}, ${this.amount(time)} (${(100 * time / Math.max(1, this.whole)).toPrecision(3)} %)` : "nothing has this in its name";
  }
}

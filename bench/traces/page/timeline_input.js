// The timeline under mouse, fingers and keys: what moves the window, what selects a slice, what is said of it.

class TimelineView {
  constructor(root, model) {
    this.root = root;
    this.model = model;
    this.viewport = root.querySelector(".viewport");
    this.canvas = root.querySelector("canvas");
    this.spacer = root.querySelector(".spacer");
    this.tip = root.querySelector(".tip");
    this.details = root.querySelector(".selected");
    this.answer = root.querySelector(".found");
    this.search = root.querySelector("input[type=search]");
    this.table = root.querySelector(".in-view");
    this.theme = readTheme();
    const margin = model.last * 0.005;
    Object.assign(this, { start: -margin, end: model.last + margin, selected: -1, found: null, pending: false });
    this.pointers = new Map();
    this.listen();
    this.relayout();
    this.describe(-1);
    this.draw();
    root.dataset.firstPaint = Math.round(performance.now());
  }

  relayout() {
    layOut(this.model);
    this.viewport.style.height = `min(${this.model.height + AXIS + 10}px, ${innerWidth > 720 ? "max(62vh, 320px)" : "60vh"})`;
    this.spacer.style.height = `${Math.max(0, this.model.height + AXIS + 6 - this.viewport.clientHeight)}px`;
    this.redraw();
  }

  redraw() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.pending = false;
    this.width = this.viewport.clientWidth;
    this.height = this.viewport.clientHeight;
    this.scroll = this.viewport.scrollTop;
    this.scale = this.width / (this.end - this.start);
    drawTimeline(this.model, this, this.canvas, this.theme);
    this.root.dataset.view = `${Math.round(this.start)} ${Math.round(this.end)}`;
    if (this.table.open) {
      clearTimeout(this.later);
      this.later = setTimeout(() => this.fillTable(), 200);
    }
  }

  // Moves the window to these times, kept inside the recording and never below 20 ns.
  show(start, end) {
    const whole = this.model.last * 1.01;
    const length = Math.min(whole, Math.max(20, end - start));
    const middle = (start + end) / 2;
    const first = Math.max(-this.model.last * 0.005, Math.min(middle - length / 2, this.model.last * 1.005 - length));
    [this.start, this.end] = [first, first + length];
    this.redraw();
  }

  whole() {
    this.show(-this.model.last * 0.005, this.model.last * 1.005);
  }

  zoom(factor, x) {
    const at = this.start + (x === undefined ? this.width / 2 : x) / this.scale;
    const length = Math.min(this.model.last * 1.01, Math.max(20, (this.end - this.start) * factor));
    const share = (at - this.start) / (this.end - this.start);
    this.show(at - share * length, at + (1 - share) * length);
  }

  pan(pixels) {
    const time = pixels * (this.end - this.start) / this.width;
    this.show(this.start + time, this.end + time);
  }

  listen() {
    const { viewport, root } = this;
    new ResizeObserver(() => this.relayout()).observe(viewport);
    onThemeChange(() => { this.theme = readTheme(); this.redraw(); });
    viewport.addEventListener("scroll", () => this.redraw());
    viewport.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    viewport.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("pointerdown", (event) => this.press(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    this.canvas.addEventListener("pointerup", (event) => this.release(event));
    this.canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    this.canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    this.canvas.addEventListener("dblclick", () => this.zoomTo(this.selected));
    this.search.addEventListener("input", () => this.find());
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.walk(event.shiftKey ? -1 : 1);
      if (event.key === "Escape") { this.search.value = ""; this.find(); }
    });
    root.querySelector(".tools").addEventListener("click", (event) => this.pressed(event.target.dataset.do));
    this.table.addEventListener("toggle", () => this.table.open && this.fillTable());
  }

  pressed(name) {
    if (name === "in") this.zoom(0.5);
    if (name === "out") this.zoom(2);
    if (name === "whole") this.whole();
    if (name === "next") this.walk(1);
    if (name === "previous") this.walk(-1);
  }

  // Like maps inside a page: a bare wheel scrolls, with Ctrl or Cmd (and so a touchpad's pinch) it zooms.
  wheel(event) {
    const unit = event.deltaMode === 1 ? 16 : event.deltaMode === 2 ? 400 : 1;
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      this.zoom(1.0025 ** (Math.max(-300, Math.min(300, event.deltaY * unit))), event.offsetX);
    } else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      this.pan((event.deltaX || event.deltaY) * unit);
    }
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = this.width / 6;
    const actions = {
      w: () => this.zoom(0.7), s: () => this.zoom(1 / 0.7), "+": () => this.zoom(0.7), "-": () => this.zoom(1 / 0.7),
      a: () => this.pan(-step), d: () => this.pan(step), ArrowLeft: () => this.pan(-step), ArrowRight: () => this.pan(step),
      0: () => this.whole(), f: () => this.zoomTo(this.selected), Enter: () => this.zoomTo(this.selected),
      ",": () => this.neighbour(-1), ".": () => this.neighbour(1), Escape: () => this.select(-1),
      "/": () => this.search.focus(),
    };
    const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  press(event) {
    this.pointers.set(event.pointerId, { x: event.offsetX, y: event.offsetY });
    this.canvas.setPointerCapture(event.pointerId);
    this.moved = this.pointers.size > 1 ? 99 : 0;
    this.spread = 0;
  }

  move(event) {
    const last = this.pointers.get(event.pointerId);
    const [x, y] = [event.offsetX, event.offsetY];
    if (!last) return this.hover(x, y);
    const [dx, dy] = [x - last.x, y - last.y];
    this.moved += Math.abs(dx) + Math.abs(dy);
    this.pointers.set(event.pointerId, { x, y });
    if (this.pointers.size === 2) {
      const [one, other] = [...this.pointers.values()];
      const spread = Math.max(10, Math.abs(one.x - other.x));
      if (this.spread) this.zoom(this.spread / spread, (one.x + other.x) / 2);
      this.spread = spread;
    } else if (this.moved > 3) {
      this.tip.hidden = true;
      this.pan(-dx);
      if (event.pointerType === "mouse") this.viewport.scrollTop -= dy;
    }
  }

  release(event) {
    const still = this.moved <= (event.pointerType === "mouse" ? 3 : 10); // a finger trembles
    if (this.pointers.delete(event.pointerId) && still) this.click(event.offsetX, event.offsetY);
  }

  at(x, y) {
    const height = y - AXIS + this.scroll;
    const item = y < AXIS ? undefined : this.model.items.find((one) => height >= one.y && height < one.y + one.height);
    if (!item || item.type !== "row") return { item, slice: -1 };
    return { item, slice: sliceAt(this.model, item.row, this.start + x / this.scale, 3 / this.scale) };
  }

  click(x, y) {
    const { item, slice } = this.at(x, y);
    const folded = item && (item.type === "lane" ? item.lane : item.type === "group" ? item.group : null);
    if (folded) {
      folded.open = !folded.open;
      this.relayout();
    } else {
      this.select(slice);
    }
  }

  hover(x, y) {
    const { slice } = this.at(x, y);
    this.tip.hidden = slice < 0;
    this.canvas.style.cursor = slice < 0 ? "" : "pointer";
    if (slice < 0) return;
    this.tip.textContent = `${fitted(this.model.names[this.model.name[slice]], 480)} · ${duration(this.model.length[slice])}`;
    this.tip.style.left = `${Math.max(0, Math.min(x + 12, this.width - this.tip.offsetWidth - 4))}px`;
    this.tip.style.top = `${Math.min(y + 16, this.height - 30)}px`;
  }

  zoomTo(slice) {
    if (slice < 0) return;
    const length = Math.max(this.model.length[slice], 10);
    this.show(this.model.start[slice] - length * 0.6, this.model.end[slice] + length * 0.6);
  }

  // Selects a slice and brings it into view; -1 selects none.
  select(slice, bring) {
    this.selected = slice;
    this.describe(slice);
    if (slice >= 0 && bring) this.bring(slice);
    this.redraw();
  }

  bring(slice) {
    const row = rowOf(this.model, slice);
    if (!row.lane.open && row.depth > 0 || !row.lane.group.open) {
      row.lane.open = row.lane.group.open = true;
      this.relayout();
    }
    const top = topOf(this.model, row);
    const { scrollTop, clientHeight } = this.viewport;
    if (top < scrollTop || top > scrollTop + clientHeight - AXIS - 2 * ROW) this.viewport.scrollTop = top - clientHeight / 2;
    const [start, end] = [this.model.start[slice], this.model.end[slice]];
    const length = this.end - this.start;
    if (start < this.start || end > this.end || (end - start) * this.scale < 4) {
      const wide = Math.max((end - start) * 4, Math.min(length, Math.max(end - start, 1) * 60));
      this.show((start + end) / 2 - wide / 2, (start + end) / 2 + wide / 2);
    }
  }

  neighbour(by) {
    if (this.selected < 0) return;
    const row = rowOf(this.model, this.selected);
    const next = this.selected + by;
    if (next >= row.first && next < row.last) this.select(next, true);
  }

  find() {
    this.found = findNames(this.model, this.search.value);
    this.answer.textContent = !this.found ? "" : !this.found.slices ? "nothing has this in its name"
      : `${count(this.found.slices, "slice")} of ${count(this.found.names, "name")}, ${duration(this.found.time)} in sum`;
    this.redraw();
  }

  walk(by) {
    if (!this.found || !this.found.slices) return;
    const order = foundInOrder(this.model, this.found);
    const here = this.selected >= 0 ? order.indexOf(this.selected) : -1;
    const next = here < 0 ? (by > 0 ? 0 : order.length - 1) : (here + by + order.length) % order.length;
    this.select(order[next], true);
  }
}

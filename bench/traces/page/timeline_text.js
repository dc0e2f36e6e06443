// The timeline in words: the slice that is selected, and the slices in view as a table.

Object.assign(TimelineView.prototype, {
  describe(slice) {
    const { model, details } = this;
    details.textContent = "";
    if (slice < 0) {
      details.append(element("p", "Click a slice to see what it is, when it ran and what launched it.", { class: "soft" }));
      return;
    }
    const lane = rowOf(model, slice).lane;
    const facts = [
      ["duration", duration(model.length[slice])],
      ["start", duration(model.start[slice])],
      ["kind", model.kinds[model.kind[slice]]],
      ["lane", [lane.group.name, lane.name].filter(Boolean).join(", ")],
    ];
    const step = lane.group.steps.find(([, from, to]) => model.start[slice] >= from && model.start[slice] < to);
    if (step) facts.push(["step", model.names[step[0]]]);
    if (model.shape[slice]) facts.push(["shape", model.names[model.shape[slice] - 1]]);
    if (model.bytes[slice] > 0) facts.push(["bytes", bytes(model.bytes[slice] - 1)]);
    if (model.launch[slice]) facts.push(["launched by", this.goTo(model.launch[slice] - 1)]);
    const [same, time] = this.sameName(slice);
    if (same > 1) facts.push(["of this name", `${same.toLocaleString("en")} drawn, ${duration(time)} in sum, ${duration(time / same)} on average`]);
    details.append(element("p", model.names[model.name[slice]], { class: "slice-name" }), factList(facts));
  },

  goTo(slice) {
    const place = element("dd");
    const button = element("button", this.model.names[this.model.name[slice]].slice(0, 80), { type: "button", class: "link" });
    button.addEventListener("click", () => this.select(slice, true));
    const earlier = this.model.start[this.selected] - this.model.start[slice];
    place.append(button, ` ${duration(earlier)} before`);
    return place;
  },

  sameName(slice) {
    const { model } = this;
    let same = 0, time = 0;
    for (let i = 0; i < model.total; i++) {
      if (model.name[i] === model.name[slice]) {
        same++;
        time += model.length[i];
      }
    }
    return [same, time];
  },

  fillTable() {
    const { model } = this;
    const { all, slices } = longestInView(model, this.start, this.end, 60);
    const place = this.table.querySelector(".rows");
    const said = `${count(all, "slice")} in view, from ${duration(Math.max(0, this.start))} to ${duration(Math.min(model.last, this.end))}`;
    this.table.querySelector("p").textContent = all > slices.length ? `${said}; the ${slices.length} longest:` : `${said}.`;
    const table = element("table");
    const head = element("tr");
    for (const name of ["name", "duration", "start", "kind", "lane"]) {
      head.append(element("th", name, { scope: "col", class: name === "duration" || name === "start" ? "n" : "" }));
    }
    const body = element("tbody");
    for (const slice of slices) {
      const line = element("tr");
      const name = element("th", undefined, { scope: "row" });
      const button = element("button", model.names[model.name[slice]], { type: "button", class: "link" });
      button.addEventListener("click", () => this.select(slice, true));
      name.append(button);
      const lane = rowOf(model, slice).lane;
      line.append(name, element("td", duration(model.length[slice]), { class: "n" }),
        element("td", duration(model.start[slice]), { class: "n" }), element("td", model.kinds[model.kind[slice]]),
        element("td", [lane.group.name, lane.name].filter(Boolean).join(", ")));
      body.append(line);
    }
    const top = element("thead");
    top.append(head);
    table.append(top, body);
    place.replaceChildren(table);
  },
});

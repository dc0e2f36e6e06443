// The slices of a page as columns, and where each lane and row lies, in pixels from the top.

const ROW = 16, LANE_LABEL = 18, GROUP_LABEL = 24, STEP_ROW = 17, GAP = 7;

function timelineModel(data, names) {
  const start = unpackSigned(data.start);
  const length = unpack(data.duration);
  const total = start.length;
  const end = new Float64Array(total);
  const reach = new Float64Array(total); // the latest end so far in the row: rounded ends may lie before earlier ones
  const busy = new Float64Array(total + 1); // sum of the durations before a slice: how much of a pixel is filled
  for (let i = 0; i < total; i++) {
    if (i) start[i] += start[i - 1];
    end[i] = start[i] + length[i];
    busy[i + 1] = busy[i] + length[i];
  }
  const model = {
    names, start, end, length, reach, busy, total,
    name: unpack(data.name), kind: unpack(data.kind), shape: unpack(data.shape),
    bytes: unpack(data.bytes), launch: unpack(data.launch),
    kinds: data.kinds, groups: [], lanes: [], rows: [], first: 0, last: 1,
  };
  let next = 0;
  for (const group of data.groups) {
    const made = { ...group, open: true, lanes: [] };
    for (const lane of group.lanes) {
      const entry = { ...lane, group: made, open: true, rows: [] };
      for (const slices of lane.rows) {
        if (slices) {
          entry.rows.push(model.rows.length);
          for (let i = next; i < next + slices; i++) reach[i] = Math.max(end[i], i > next ? reach[i - 1] : 0);
          model.rows.push({ lane: entry, first: next, last: next + slices, depth: entry.rows.length - 1 });
        }
        next += slices;
      }
      made.lanes.push(entry);
      model.lanes.push(entry);
    }
    model.groups.push(made);
  }
  model.rowFirst = Float64Array.from(model.rows, (row) => row.first);
  model.last = 0;
  for (const value of end) if (value > model.last) model.last = value;
  for (const group of model.groups) for (const step of group.steps) model.last = Math.max(model.last, step[2]);
  model.last = Math.max(model.last, 1);
  // Of many ranks each lane shows its first row: all of them fit on a screen and one can be opened.
  if (model.groups.length > 2) for (const lane of model.lanes) lane.open = lane.rows.length <= 2;
  layOut(model);
  return model;
}

function layOut(model) {
  const items = [];
  let y = 0;
  for (const group of model.groups) {
    if (group.name) {
      items.push({ type: "group", group, y, height: GROUP_LABEL });
      y += GROUP_LABEL;
    }
    group.top = y;
    if (!group.open) continue;
    if (group.steps.length) {
      items.push({ type: "steps", group, y, height: STEP_ROW });
      y += STEP_ROW + 2;
    }
    for (const lane of group.lanes) {
      items.push({ type: "lane", lane, y, height: LANE_LABEL });
      y += LANE_LABEL;
      for (const row of lane.open ? lane.rows : lane.rows.slice(0, 1)) {
        items.push({ type: "row", row: model.rows[row], y, height: ROW });
        y += ROW;
      }
      y += GAP;
    }
    group.bottom = y;
  }
  model.items = items;
  model.height = y;
}

// The row a slice stands on.
function rowOf(model, slice) {
  return model.rows[lowerBound(model.rowFirst, slice + 1, 0, model.rows.length) - 1];
}

// Pixels from the top of a row, or -1 when its lane or its rank is closed.
function topOf(model, row) {
  const item = model.items.find((one) => one.row === row);
  return item ? item.y : -1;
}

// The slice at a time of a row, or the one nearest to it within `slack` nanoseconds; -1: none.
function sliceAt(model, row, time, slack) {
  const index = lowerBound(model.reach, time, row.first, row.last);
  let best = -1, nearest = slack;
  for (const slice of [index - 1, index, index + 1]) {
    if (slice < row.first || slice >= row.last) continue;
    const distance = Math.max(model.start[slice] - time, time - model.end[slice], 0);
    if (distance <= nearest) [best, nearest] = [slice, distance];
  }
  return best;
}

// Names that contain the words, and how many of their slices stand before each (for merged pixels).
function findNames(model, words) {
  const wanted = words.trim().toLowerCase();
  if (!wanted) return null;
  const named = new Uint8Array(model.names.length);
  model.names.forEach((name, i) => { named[i] = name.toLowerCase().includes(wanted) ? 1 : 0; });
  const before = new Uint32Array(model.total + 1);
  let time = 0;
  const used = new Set();
  for (let i = 0; i < model.total; i++) {
    const hit = named[model.name[i]];
    before[i + 1] = before[i] + hit;
    if (hit) {
      time += model.length[i];
      used.add(model.name[i]);
    }
  }
  return { named, before, slices: before[model.total], names: used.size, time, order: null };
}

// Indices of the slices found, in order of time (made when they are first walked through).
function foundInOrder(model, found) {
  if (!found.order) {
    const order = [];
    for (let i = 0; i < model.total; i++) if (found.named[model.name[i]]) order.push(i);
    found.order = order.sort((one, other) => model.start[one] - model.start[other]);
  }
  return found.order;
}

function longestInView(model, from, to, most) {
  const inside = [];
  for (const item of model.items) {
    if (item.type !== "row") continue;
    const { first, last } = item.row;
    for (let i = lowerBound(model.reach, from, first, last); i < last && model.start[i] < to; i++) inside.push(i);
  }
  const all = inside.length;
  inside.sort((one, other) => model.length[other] - model.length[one]);
  return { all, slices: inside.slice(0, most) };
}

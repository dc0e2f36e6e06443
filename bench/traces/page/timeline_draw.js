// One frame of the timeline. Only what is in view is touched: slices are found by bisection, and those that
// begin in the same pixel are drawn as one column, as dark as the pixel is busy.

const AXIS = 24;

function drawTimeline(model, view, canvas, theme) {
  const width = view.width, height = view.height;
  const context = prepare(canvas, width, height);
  context.fillStyle = css(theme.paper);
  context.fillRect(0, 0, width, height);
  const ticks = drawGrid(context, view, theme);
  for (const item of model.items) {
    const y = item.y + AXIS - view.scroll;
    if (y + item.height < AXIS || y > height) continue;
    if (item.type === "row") drawRow(context, model, view, theme, item.row, y);
    else if (item.type === "lane") drawLabel(context, view, theme, item.lane, y, item.lane.name, item.lane.rows.length);
    else if (item.type === "group") drawGroup(context, view, theme, item.group, y);
    else drawSteps(context, model, view, theme, item.group, y);
  }
  drawSelection(context, model, view, theme);
  drawAxis(context, view, theme, ticks);
}

function drawGrid(context, view, theme) {
  const wanted = (view.end - view.start) / Math.max(2, view.width / 110);
  const power = 10 ** Math.floor(Math.log10(wanted));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= wanted);
  const ticks = [];
  for (let i = Math.ceil(view.start / step); i * step <= view.end; i++) ticks.push(i * step);
  context.fillStyle = css(theme.grid);
  for (const tick of ticks) context.fillRect(Math.round((tick - view.start) * view.scale), AXIS, 1, view.height);
  return { ticks, step };
}

function drawAxis(context, view, theme, { ticks, step }) {
  context.fillStyle = css(theme.paper);
  context.fillRect(0, 0, view.width, AXIS);
  context.fillStyle = css(theme.edge);
  context.fillRect(0, AXIS - 1, view.width, 1);
  context.fillStyle = css(theme.soft);
  const [unit, factor] = step >= 1e9 ? ["s", 1e9] : step >= 1e6 ? ["ms", 1e6] : step >= 1e3 ? ["us", 1e3] : ["ns", 1];
  for (const tick of ticks) {
    const x = Math.round((tick - view.start) * view.scale);
    const text = `${(Math.round(tick / factor * 1000) / 1000 || 0).toLocaleString("en")} ${unit}`;
    context.fillStyle = css(theme.edge);
    context.fillRect(x, AXIS - 6, 1, 6);
    context.fillStyle = css(theme.soft);
    if (x + text.length * LETTER < view.width) context.fillText(text, x + 4, 11);
  }
}

function drawGroup(context, view, theme, group, y) {
  context.fillStyle = css(mix(theme.paper, theme.ink, 0.07));
  context.fillRect(0, y + 1, view.width, GROUP_LABEL - 3);
  context.fillStyle = css(theme.ink);
  context.font = "600 " + FONT;
  context.fillText(fitted(`${group.open ? "▾" : "▸"} ${group.name}`, view.width - 12), 6, y + 12);
  context.font = FONT;
}

function drawLabel(context, view, theme, lane, y, text, rows) {
  const folded = rows > 1 ? (lane.open ? "▾ " : "▸ ") : "";
  const more = rows > 1 && !lane.open ? `  (${rows} rows)` : "";
  context.fillStyle = css(theme.soft);
  context.fillText(fitted(folded + text + more, view.width - 8), 6, y + 10);
}

function drawSteps(context, model, view, theme, group, y) {
  group.steps.forEach(([name, from, to], i) => {
    const x0 = Math.max(-1, (from - view.start) * view.scale), x1 = Math.min(view.width + 1, (to - view.start) * view.scale);
    if (x1 < 0 || x0 > view.width) return;
    context.fillStyle = css(mix(theme.paper, theme.ink, i % 2 ? 0.16 : 0.1));
    context.fillRect(x0, y, Math.max(1, x1 - x0), STEP_ROW - 2);
    context.fillStyle = css(mix(theme.grid, theme.ink, 0.25));
    context.fillRect(x0, y, 1, (group.bottom - group.top));
    if (x1 - x0 > 30) {
      context.fillStyle = css(theme.ink);
      context.fillText(fitted(model.names[name], x1 - x0 - 8), x0 + 5, y + 8);
    }
  });
}

function drawRow(context, model, view, theme, row, y) {
  const { start, end, reach, name, kind, busy, kinds } = model;
  const { start: from, end: to, scale, width, found } = view;
  const height = ROW - 2;
  let i = lowerBound(reach, from, row.first, row.last);
  while (i < row.last && start[i] < to) {
    const x0 = (start[i] - from) * scale, x1 = (end[i] - from) * scale;
    const shade = theme.kinds[kinds[kind[i]]][name[i] % SHADES];
    if (x1 - x0 >= 1.5) {
      const left = Math.max(-2, x0), right = Math.min(width + 2, x1);
      const dimmed = found && !found.named[name[i]];
      context.globalAlpha = dimmed ? 0.22 : 1;
      context.fillStyle = shade.fill;
      context.fillRect(left, y, Math.max(1, right - left - (x1 - x0 > 4 ? 1 : 0)), height);
      const room = right - Math.max(left, 0);
      if (room > 24 && !dimmed) {
        context.fillStyle = shade.ink;
        context.fillText(fitted(model.names[name[i]], room - 7), Math.max(left, 0) + 4, y + height / 2 + 0.5);
      }
      i++;
      continue;
    }
    // All that begin in this pixel, but a wide one among them is drawn by itself.
    const pixel = Math.floor(x0);
    let next = lowerBound(start, from + (pixel + 1) / scale, i + 1, row.last);
    if (next - i > 1 && (end[next - 1] - start[next - 1]) * scale >= 1.5) next--;
    const filled = Math.min(1, (busy[next] - busy[i]) * scale);
    const hit = found && found.before[next] > found.before[i];
    context.globalAlpha = found && !hit ? 0.15 : hit ? 1 : 0.25 + 0.75 * filled;
    context.fillStyle = shade.fill;
    context.fillRect(pixel, y, 1, height);
    i = next;
  }
  context.globalAlpha = 1;
}

function drawSelection(context, model, view, theme) {
  const slice = view.selected;
  if (slice < 0) return;
  const box = boxOf(model, view, slice);
  if (!box) return;
  context.strokeStyle = css(theme.ink);
  context.lineWidth = 2;
  context.strokeRect(box.left + 0.5, box.y, Math.max(2, box.right - box.left - 1), ROW - 2);
  const launcher = model.launch[slice] - 1;
  const origin = launcher >= 0 ? boxOf(model, view, launcher) : null;
  if (!origin) return;
  context.lineWidth = 1.5;
  context.strokeRect(origin.left + 0.5, origin.y, Math.max(2, origin.right - origin.left - 1), ROW - 2);
  context.beginPath();
  context.moveTo(origin.right, origin.y + ROW / 2);
  const bend = Math.max(20, Math.abs(box.left - origin.right) / 2);
  context.bezierCurveTo(origin.right + bend, origin.y + ROW / 2, box.left - bend, box.y + ROW / 2, box.left, box.y + ROW / 2);
  context.stroke();
}

function boxOf(model, view, slice) {
  const top = topOf(model, rowOf(model, slice));
  if (top < 0) return null;
  return {
    left: Math.max(-4, Math.min(view.width + 4, (model.start[slice] - view.start) * view.scale)),
    right: Math.max(-3, Math.min(view.width + 5, (model.end[slice] - view.start) * view.scale)),
    y: top + AXIS - view.scroll,
  };
}

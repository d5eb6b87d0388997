// The relevance of the current segment, where predict.py --explain computed it.

const explained = new Map(); // index of a segment: what is known of it
for (const [number, { steps, values, interval, stretch }] of Object.entries(data.relevance ?? {})) {
  let time = 0; // steps: milliseconds from one frame to the next, the first from the start
  const times = steps.map(step => (time += step) / 1000);
  // values: from -1000 to 1000, relative to the largest of the segment
  explained.set(Number(number), { times, values, interval, stretch });
}
let shownRelevance = -1; // index of the segment in the lane

// What the lane says about a segment, in words.
function describeRelevance(number) {
  if (number < 0) return "";
  const { start, end, label } = segments[number];
  const name = nameOf(label), found = explained.get(number);
  const where = `${name} from ${clock(start, 1)} to ${clock(end, 1)}`;
  if (labels[label] === "uncertain") return `${where}: there is no label to explain.`;
  if (isMark(label)) return `${where}: the model was not shown this.`;
  if (!found) return `${where}: nothing was looked at.`;
  const { times, interval, stretch } = found, seen = times.length * interval;
  const part = seen < 0.9 * (end - start)
    ? ` Looked at: ${seen.toFixed(1)} of ${(end - start).toFixed(1)}\u00a0s, evenly spread.` : "";
  const others = corrections.has(number) ? " This is about the label of the model, not about yours." : "";
  let text = "no frame speaks for this label.";
  if (stretch) {
    const [from, to, fraction, standsOut] = stretch;
    text = standsOut
      ? `most of the relevance comes from ${clock(from, 1)} to ${clock(to, 1)} (${percent(fraction)}).`
      : "the relevance is spread over the segment, no part of it stands out.";
  }
  return `${where}: ${text}${part}${others}`;
}

function showRelevance(number) {
  if (!$("relevance")) return;
  shownRelevance = number;
  const text = describeRelevance(number);
  $("relevance-text").textContent = text;
  $("relevance").setAttribute("aria-label", text);
  $("zoom-segment").disabled = number < 0;
  redraw();
}

function zoomToSegment() {
  if (!$("relevance") || shownRelevance < 0) return;
  const { times = [], interval = 0 } = explained.get(shownRelevance) ?? {};
  const { start, end } = segments[shownRelevance];
  const from = Math.min(start, times[0] ?? start); // a window may reach beyond a short segment
  const to = Math.max(end, (times.at(-1) ?? end) + interval);
  setView(from - 0.05 * (to - from), to + 0.05 * (to - from));
}

// Bars to above the zero line speak for the label; outlined bars to below speak against it.
function drawRelevance() {
  if (!$("relevance")) return;
  const { ctx, width, height } = prepare($("relevance"));
  const found = explained.get(shownRelevance);
  if (!found) return;
  const { times, values, interval, stretch } = found, scale = width / (view.to - view.from);
  const wide = interval * scale, gap = wide > 4 ? 1 : 0, top = 8;
  const zero = values.some(value => value < 0) ? (height + top) / 2 : height - 3;
  const unit = (zero - top - 2) / 1000;
  const left = time => (time - view.from) * scale;
  ctx.fillStyle = themed("--note-page"); // what was looked at
  for (const time of times) ctx.fillRect(left(time), top, wide + 0.5, height - top);
  ctx.fillStyle = ctx.strokeStyle = themed("--a");
  values.forEach((value, i) => {
    if (value > 0) ctx.fillRect(left(times[i]), zero - value * unit, Math.max(1, wide - gap), value * unit);
  });
  ctx.fillStyle = ctx.strokeStyle = themed("--b");
  values.forEach((value, i) => {
    if (value >= 0) return;
    if (wide > 4) ctx.strokeRect(left(times[i]) + 0.5, zero, wide - gap - 1, -value * unit);
    else ctx.fillRect(left(times[i]), zero, Math.max(1, wide), -value * unit);
  });
  ctx.fillStyle = themed("--soft");
  const last = times.at(-1) + interval;
  ctx.fillRect(left(times[0]), zero - 0.5, (last - times[0]) * scale, 1);
  if (stretch?.[3]) {
    ctx.fillStyle = themed("--ink");
    ctx.fillRect(left(stretch[0]), 1, Math.max(3, (stretch[1] - stretch[0]) * scale), 4);
  }
}

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
  if (number < 0) return "There is no segment here.";
  const { start, end, label } = segments[number];
  const where = `${nameOf(label)} from ${clock(start, 1)} to ${clock(end, 1)}`;
  if (labels[label] === "uncertain") return `${where}: there is no label to explain.`;
  if (isMark(label)) return `${where}: the model was not shown this.`;
  if (!explained.has(number)) return `${where}: nothing was looked at.`;
  const { stretch } = explained.get(number);
  if (!stretch) return `${where}: no frame speaks for this label.`;
  const [from, to, fraction, standsOut] = stretch;
  if (!standsOut) return `${where}: the relevance is spread, no part of it stands out.`;
  return `${where}: most of the relevance comes from ${clock(from, 1)} to ${clock(to, 1)} (${percent(fraction)}).`;
}

// What was looked at, and which label was explained, where that needs to be told.
function qualifyRelevance(number) {
  if (!explained.has(number)) return "";
  const { start, end } = segments[number], { times, interval } = explained.get(number);
  const seconds = value => `${value.toFixed(1)}\u00a0s`, seen = times.length * interval;
  const texts = [];
  if (seen < 0.9 * (end - start)) {
    texts.push(`Looked at: ${seconds(seen)} of its ${seconds(end - start)}, evenly spread.`);
  }
  if (times[0] < start - interval || times.at(-1) > end + interval) {
    texts.push(`The model sees ${seconds(seen)} at once, more than this segment.`);
  }
  if (corrections.has(number)) texts.push("This is about the model’s label, not about yours.");
  return texts.join(" ");
}

function showRelevance(number) {
  if (!$("relevance")) return;
  shownRelevance = number;
  const text = describeRelevance(number);
  $("relevance-text").textContent = text;
  $("relevance-more").textContent = qualifyRelevance(number);
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
  const highest = Math.max(0, ...values), lowest = Math.min(0, ...values);
  const unit = (height - top - 4) / (highest - lowest || 1), zero = Math.round(top + 2 + highest * unit);
  const left = time => (time - view.from) * scale;
  const isLast = i => i === times.length - 1 || times[i + 1] - times[i] > 1.5 * interval;
  ctx.fillStyle = themed("--note-page"); // what was looked at
  times.forEach((_, i) => {
    if (!isLast(i)) return;
    let first = i;
    while (first && !isLast(first - 1)) first -= 1;
    ctx.fillRect(left(times[first]), top, (times[i] - times[first] + interval) * scale, height - top);
  });
  ctx.fillStyle = ctx.strokeStyle = themed("--a");
  values.forEach((value, i) => {
    if (value > 0) ctx.fillRect(left(times[i]), zero - value * unit, Math.max(1, wide - gap), value * unit);
  });
  ctx.fillStyle = ctx.strokeStyle = themed("--b");
  values.forEach((value, i) => {
    const depth = Math.round(-value * unit);
    if (depth < 1) return;
    const x = Math.round(left(times[i])), room = Math.round(wide - gap);
    if (wide > 4) ctx.strokeRect(x + 0.5, zero + 0.5, room - 1, depth); // of sharp lines
    else ctx.fillRect(x, zero, Math.max(1, room), depth);
  });
  ctx.fillStyle = themed("--soft");
  const last = times.at(-1) + interval;
  ctx.fillRect(left(times[0]), zero, (last - times[0]) * scale, 1);
  if (stretch?.[3]) {
    ctx.fillStyle = themed("--ink");
    ctx.fillRect(left(stretch[0]), 1, Math.max(3, (stretch[1] - stretch[0]) * scale), 4);
  }
}

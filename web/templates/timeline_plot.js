// The plots: the whole video, the part in view, and one curve per class.

const AXIS_STEPS = [0.1, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600];
const SMALLEST_VIEW = Math.min(duration, 2); // seconds
const view = { from: 0, to: duration };
const laneOf = new Map(); // index of a class: its row of the plot
let onSeek = () => {};
let drawing = 0;

function makeCurves() {
  for (let label = 0; label < data.classes; label++) {
    const row = $("track-template").content.cloneNode(true).firstElementChild;
    dress(row.querySelector(".chip"), label);
    write(row.querySelector(".name"), nameOf(label));
    row.querySelector("canvas").setAttribute("aria-label",
      `Probability of ${nameOf(label)} over time; the value at the cursor is shown beside it`);
    $("curves").append(row);
    laneOf.set(label, row);
  }
}

const laneWidth = () => $("actions").clientWidth || 1;
const xOf = time => (time - view.from) / (view.to - view.from) * laneWidth();

function timeAt(clientX, canvas, from, to) {
  const { left, width } = canvas.getBoundingClientRect();
  return Math.min(to, Math.max(from, from + (clientX - left) / (width || 1) * (to - from)));
}

function setView(from, to) {
  const span = Math.min(duration, Math.max(SMALLEST_VIEW, to - from));
  view.from = Math.min(duration - span, Math.max(0, from));
  view.to = view.from + span;
  redraw();
}

function zoom(factor, around) {
  const span = Math.min(duration, Math.max(SMALLEST_VIEW, (view.to - view.from) * factor));
  const fraction = (around - view.from) / (view.to - view.from);
  setView(around - fraction * span, around + (1 - fraction) * span);
}

function pan(seconds) {
  setView(view.from + seconds, view.to + seconds);
}

// Move the view to a time, unless it is in view.
function reveal(time) {
  const span = view.to - view.from;
  if (time < view.from || time > view.to) setView(time - 0.15 * span, time + 0.85 * span);
}

// Draw at the next animation frame, once, however often this is called.
function redraw() {
  drawing ||= requestAnimationFrame(draw);
}

function draw() {
  drawing = 0;
  drawSegments($("overview"), 0, duration, false);
  drawSegments($("actions"), view.from, view.to, true);
  drawRelevance();
  drawAxis();
  for (const [label, row] of laneOf) {
    row.hidden = !shownLabels.has(label);
    if (!row.hidden) drawCurve(row.querySelector("canvas"), label);
  }
  const whole = view.to - view.from >= duration;
  $("window").style.left = `${100 * view.from / duration}%`;
  $("window").style.width = `${100 * (view.to - view.from) / duration}%`;
  $("window").hidden = whole;
  $("zoom-out").disabled = $("zoom-whole").disabled = whole;
  $("zoom-in").disabled = view.to - view.from <= SMALLEST_VIEW;
  $("range").textContent = whole ? "" : `Shown: ${clock(view.from)} to ${clock(view.to)}`;
  placeHeads();
}

function prepare(canvas) {
  const width = canvas.clientWidth, height = canvas.clientHeight;
  const sharpness = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * sharpness); // this clears it too
  canvas.height = Math.round(height * sharpness);
  const ctx = canvas.getContext("2d");
  ctx.scale(sharpness, sharpness);
  return { ctx, width, height };
}

const themed = name => getComputedStyle(document.body).getPropertyValue(name).trim();

function drawSegments(canvas, from, to, named) {
  const { ctx, width, height } = prepare(canvas);
  const scale = width / (to - from), ink = themed("--ink");
  ctx.font = `600 13px ${getComputedStyle(document.body).fontFamily}`;
  ctx.textBaseline = "middle";
  for (let i = Math.max(0, segmentAt(from)); i < segments.length && segments[i].start < to; i++) {
    const label = labelOf(i), style = styles[label];
    const left = Math.max(0, (segments[i].start - from) * scale);
    const wide = Math.min(width, (segments[i].end - from) * scale) - left;
    const seen = shownLabels.has(label);
    ctx.globalAlpha = seen ? 1 : 0.14;
    ctx.fillStyle = style.fill;
    ctx.fillRect(left, 0, wide > 4 ? wide - 1 : wide, height); // with a gap between wide segments
    if (corrections.has(i)) {
      ctx.fillStyle = ink;
      ctx.fillRect(left, height - 4, Math.max(2, wide - 1), 4);
    }
    if (!named || !seen || wide < 24) continue;
    const text = nameOf(label), room = ctx.measureText(text).width;
    if (room + 14 > wide) continue;
    ctx.fillStyle = style.colour; // a plain background where there is a pattern
    ctx.fillRect(left + 3, height / 2 - 9, room + 8, 18);
    ctx.fillStyle = style.ink;
    ctx.fillText(text, left + 7, height / 2 + 0.5);
  }
}

function drawAxis() {
  const { ctx, width } = prepare($("axis"));
  const perPixel = (view.to - view.from) / width;
  const step = AXIS_STEPS.find(seconds => seconds / perPixel >= 76) ?? AXIS_STEPS.at(-1);
  ctx.fillStyle = ctx.strokeStyle = themed("--soft");
  ctx.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  for (let n = Math.ceil(view.from / step); n * step <= view.to; n++) {
    const x = (n * step - view.from) / perPixel;
    ctx.fillRect(Math.min(x, width - 1), 0, 1, 5);
    const text = clock(n * step, step < 1 ? 1 : 0), room = ctx.measureText(text).width;
    ctx.fillText(text, Math.min(width - room, Math.max(0, x - room / 2)), 17);
  }
}

// A column of pixels shows the mean of its bins, and in a paler colour the largest of them: a short
// peak stays visible in a view of hours.
function drawCurve(canvas, label) {
  const { ctx, width, height } = prepare(canvas);
  const first = label * bins, perPixel = (view.to - view.from) / duration * bins / width;
  const start = view.from / duration * bins;
  const means = new Path2D(), peaks = new Path2D(), edge = new Path2D();
  let joined = false;
  const y = value => height - 1 - value / 254 * (height - 3);
  for (let x = 0; x < width; x++) {
    const from = Math.floor(start + x * perPixel);
    const to = Math.min(bins, Math.max(from + 1, Math.floor(start + (x + 1) * perPixel)));
    let sum = 0, count = 0, peak = 0;
    for (let bin = from; bin < to; bin++) {
      const value = curves[first + bin];
      if (value === NO_PREDICTION) continue;
      sum += value;
      count += 1;
      if (value > peak) peak = value;
    }
    if (!count) {
      joined = false;
      continue;
    }
    means.rect(x, y(sum / count), 1, height - y(sum / count));
    peaks.rect(x, y(peak), 1, height - y(peak));
    if (joined) edge.lineTo(x + 0.5, y(sum / count));
    else edge.moveTo(x, y(sum / count));
    joined = true;
  }
  ctx.fillStyle = styles[label].colour;
  ctx.globalAlpha = 0.3;
  ctx.fill(peaks);
  ctx.globalAlpha = 1;
  ctx.fillStyle = styles[label].fill;
  ctx.fill(means);
  ctx.strokeStyle = themed("--soft"); // pale colours need an outline
  ctx.stroke(edge);
}

function placeHeads() {
  const time = position();
  $("tracks").classList.toggle("elsewhere", time < view.from || time > view.to);
  $("tracks").style.setProperty("--at", (time - view.from) / (view.to - view.from));
  $("whole").style.setProperty("--at", time / duration);
}

function showValues(time) {
  for (const [label, row] of laneOf) {
    row.querySelector(".value").textContent = percent(probabilityAt(label, time));
  }
}

let hovered = null; // seconds
function hover(time) {
  hovered = time;
  showValues(time ?? position());
  const tip = $("tip"), number = time === null ? -1 : segmentAt(time);
  tip.hidden = number < 0;
  if (tip.hidden) return;
  const { confidence } = segments[number];
  const sure = corrections.has(number) ? "corrected" : confidence === null ? "" : percent(confidence);
  tip.textContent = `${clock(time, 1)}  ${nameOf(labelOf(number))}  ${sure}`.trim();
  const edge = laneWidth() - tip.offsetWidth;
  tip.style.transform = `translateX(${Math.max(0, Math.min(edge, xOf(time) + 8))}px)`;
}

// A click jumps to a time, dragging moves along, two fingers zoom.
function listen(area, canvasOf, seconds) {
  const pointers = new Map();
  let moved = false, began = 0;
  area.addEventListener("pointerdown", event => {
    if (event.button || !canvasOf(event)) return;
    area.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event.clientX);
    moved = pointers.size > 1;
    began = event.clientX;
  });
  area.addEventListener("pointermove", event => {
    const before = pointers.get(event.pointerId);
    if (before === undefined) return;
    const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, x]) => x);
    pointers.set(event.pointerId, event.clientX);
    if (others.length) { // the time between the fingers stays in its place
      const apart = x => Math.max(8, Math.abs(x - others[0]));
      const middle = timeAt((before + others[0]) / 2, $("actions"), view.from, view.to);
      zoom(apart(before) / apart(event.clientX), middle);
      pan((before - event.clientX) / 2 * (view.to - view.from) / laneWidth());
    } else {
      moved ||= Math.abs(event.clientX - began) > 4;
      if (moved) pan((event.clientX - before) * seconds());
    }
  });
  const end = event => {
    if (!pointers.delete(event.pointerId) || moved || event.type !== "pointerup") return;
    onSeek(area === $("whole") ? timeAt(event.clientX, $("overview"), 0, duration)
      : timeAt(event.clientX, $("actions"), view.from, view.to));
  };
  area.addEventListener("pointerup", end);
  area.addEventListener("pointercancel", end);
}

function listenToPlot(seek) {
  onSeek = seek;
  const canvasOf = event => event.target.closest("canvas, #slider");
  listen($("whole"), canvasOf, () => duration / laneWidth());
  listen($("tracks"), canvasOf, () => (view.from - view.to) / laneWidth());
  $("tracks").addEventListener("pointermove", event => {
    hover(canvasOf(event) && timeAt(event.clientX, $("actions"), view.from, view.to));
  });
  $("tracks").addEventListener("pointerleave", () => hover(null));
  $("tracks").addEventListener("wheel", event => {
    const middle = timeAt(event.clientX, $("actions"), view.from, view.to);
    const along = event.deltaX || (event.shiftKey ? event.deltaY : 0);
    if (event.ctrlKey || event.metaKey) zoom(1.002 ** Math.max(-300, Math.min(300, event.deltaY)), middle);
    else if (along) pan(along * (view.to - view.from) / laneWidth());
    else return; // the page scrolls
    event.preventDefault();
  }, { passive: false });
  new ResizeObserver(redraw).observe($("tracks"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

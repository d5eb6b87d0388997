// The charts of the last two minutes: a strip of predictions, its legend, and one lane per class.

export const MARKS = {
  // Labels that are not classes (NON_CLASS_LABELS in timeline/segments.py). They have a symbol and a
  // pattern, because a colour alone is not enough.
  uncertain: { name: "uncertain", symbol: "?", colour: "--warn" },
  unreadable: { name: "unreadable", symbol: "×", colour: "--alert" },
  out_of_body: { name: "out of body", symbol: "–", colour: "--soft" },
};
const FIXED_COLOURS = 8; // --class-0 to --class-7 in live.css
const AXIS = 20; // height in pixels of the times below a chart
const GAP = 3; // longer times without a prediction (in seconds) are left blank, unless all are that long

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The colour of a class by its index, in the current colour scheme. */
export function classColour(number) {
  if (number < FIXED_COLOURS) return css(`--class-${number}`);
  return `hsl(${(number * 137.5) % 360} ${css("--more-classes")})`; // the golden angle
}

/** Runs of one label, oldest first: {label, start, end}. A prediction covers the time before it. */
export function runsOf(predictions) {
  const { usual, gap } = stepsOf(predictions);
  const runs = [];
  predictions.forEach(([time, label], i) => {
    const step = i ? time - predictions[i - 1][0] : 0;
    const start = step > gap ? time - usual : time - step;
    const last = runs.at(-1);
    if (last && last.label === label && last.end === start) last.end = time;
    else runs.push({ label, start, end: time });
  });
  return runs;
}

/** The usual seconds between predictions, and the seconds from which on they are a gap. */
function stepsOf(predictions) {
  const steps = predictions.slice(1).map(([time], i) => time - predictions[i][0]);
  const usual = steps.sort((a, b) => a - b)[steps.length >> 1] ?? 0;
  return { usual, gap: Math.max(GAP, 3 * usual) };
}

/** Draw the predictions as coloured runs on a time axis; the newest one is at the right end. */
export function drawStrip(canvas, predictions, classes, span, end) {
  const { pen, width, height } = prepare(canvas, canvas.clientHeight);
  const now = predictions.length ? predictions.at(-1)[0] : 0;
  const x = (time) => width * (1 - (now - time) / span);
  pen.fillStyle = css("--grid");
  pen.fillRect(0, 0, width, height - AXIS);
  for (const run of runsOf(predictions)) {
    const left = Math.max(0, x(run.start));
    const right = x(run.end);
    if (right > left) paint(pen, run.label, classes, left, right - left, height - AXIS);
  }
  drawAxis(pen, width, height, span, end);
}

/** Draw the sample of a label for the legend. */
export function drawSwatch(canvas, label, classes) {
  const { pen, width, height } = prepare(canvas, 20);
  paint(pen, label, classes, 0, width, height, true);
}

/** Draw the probability of each class over time, one lane per class, with its name above. */
export function drawLanes(canvas, predictions, classes, span, end) {
  const lane = Math.min(46, 14000 / classes.length); // the height of a canvas is limited
  const caption = lane > 32 ? 20 : 0;
  const { pen, width, height } = prepare(canvas, lane * classes.length + AXIS);
  const now = predictions.length ? predictions.at(-1)[0] : 0;
  const x = (time) => width * (1 - (now - time) / span);
  const { gap } = stepsOf(predictions);
  pen.font = "12px system-ui, sans-serif";
  pen.textBaseline = "middle";
  classes.forEach((name, number) => {
    const floor = lane * (number + 1) - 1;
    pen.fillStyle = css("--grid");
    pen.fillRect(0, floor, width, 1);
    pen.fillStyle = classColour(number);
    pen.beginPath();
    let before = null; // time of the previous prediction; null: there is a gap
    for (const [time, , probabilities] of predictions) {
      const known = probabilities.length > 0;
      if (before !== null && !(known && time - before <= gap)) {
        pen.lineTo(x(before), floor);
        before = null;
      }
      if (!known) continue;
      if (before === null) pen.moveTo(x(time), floor);
      pen.lineTo(x(time), floor - ((lane - caption - 2) * probabilities[number]) / 1000);
      before = time;
    }
    if (before !== null) pen.lineTo(x(before), floor);
    pen.fill();
    pen.fillStyle = css("--ink");
    if (caption) pen.fillText(shorten(pen, `${number + 1} ${name}`, width), 0, floor - lane + 14);
  });
  drawAxis(pen, width, height, span, end);
}

function prepare(canvas, height) {
  const width = canvas.clientWidth;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale); // this clears it
  canvas.height = Math.round(height * scale);
  if (canvas.id === "lanes") canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  return { pen, width, height };
}

function paint(pen, label, classes, left, width, height, isSwatch = false) {
  const number = classes.indexOf(label);
  const mark = MARKS[label] ?? { name: label, symbol: "", colour: "--hatch" };
  pen.save();
  pen.beginPath();
  pen.rect(left, 0, width, height);
  pen.clip();
  if (number < 0) {
    hatch(pen, label, css(mark.colour), left, width, height);
  } else {
    pen.fillStyle = classColour(number);
    pen.fillRect(left, 0, width, height);
    pen.fillStyle = css("--surface"); // separates neighbours
    if (!isSwatch && width > 3) pen.fillRect(left + width - 1, 0, 1, height);
  }
  const short = number < 0 ? mark.symbol : `${number + 1}`;
  const long = number < 0 ? mark.name : `${number + 1} ${label}`;
  pen.font = "600 12px system-ui, sans-serif";
  pen.textBaseline = "middle";
  const fits = (text) => pen.measureText(text).width + 10 <= width;
  const text = !isSwatch && fits(long) ? long : fits(short) ? short : "";
  const wide = pen.measureText(text).width;
  const start = left + (width - wide) / 2;
  if (text && number < 0) {
    pen.fillStyle = css("--surface"); // over the pattern
    pen.fillRect(start - 4, height / 2 - 9, wide + 8, 18);
  }
  pen.fillStyle = css(number < 0 ? "--ink" : "--on-class");
  pen.fillText(text, start, height / 2 + 0.5);
  pen.restore();
}

/** Draw stripes; crossed ones for `unreadable`, dots for `out_of_body`. */
function hatch(pen, label, colour, left, width, height) {
  pen.fillStyle = css("--surface");
  pen.fillRect(left, 0, width, height);
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = 1.5;
  pen.beginPath();
  for (let x = left - height; x < left + width; x += 9) {
    if (label === "out_of_body") {
      for (let y = 3; y < height; y += 7) pen.rect(x, y, 3, 3);
      continue;
    }
    pen.moveTo(x, height);
    pen.lineTo(x + height, 0);
    if (label === "unreadable") {
      pen.moveTo(x, 0);
      pen.lineTo(x + height, height);
    }
  }
  if (label === "out_of_body") pen.fill();
  else pen.stroke();
  pen.strokeRect(left + 0.75, 0.75, width - 1.5, height - 1.5);
}

function shorten(pen, text, width) {
  let shown = text;
  while (shown.length > 2 && pen.measureText(shown).width > width) shown = `${shown.slice(0, -2)}…`;
  return shown;
}

/** Draw an axis of the time before the newest prediction; `end` is the word for its right end. */
function drawAxis(pen, width, height, span, end) {
  pen.font = "12px system-ui, sans-serif";
  pen.textBaseline = "alphabetic";
  pen.fillStyle = css("--soft");
  for (let back = 0; back <= span; back += 30) {
    const text = back ? `−${Math.floor(back / 60)}:${String(back % 60).padStart(2, "0")}` : end;
    const wide = pen.measureText(text).width;
    const x = width * (1 - back / span);
    pen.fillRect(Math.min(width - 1, x), height - AXIS, 1, 5);
    pen.fillText(text, Math.max(0, Math.min(width - wide, x - wide / 2)), height - 2);
  }
}

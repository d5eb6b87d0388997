// The data of the page: what timeline_page.py wrote into it, and the corrections made here.

const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const { duration, labels, bins } = data; // labels: all classes, then the marks
const segments = data.segments.map(([start, end, label, confidence]) => (
  { start, end, label, confidence })); // times in seconds; a label is an index into labels
const NO_PREDICTION = 255;
const curves = Uint8Array.from(atob(data.curves), c => c.charCodeAt(0)); // one class after the other

const isMark = label => data.marks.includes(labels[label]);
const nameOf = label => isMark(label) ? labels[label].replaceAll("_", " ") : labels[label];

let corrections = new Map(); // index of a segment: its label
const steps = []; // the corrections before each change, for undo
let exported = state();

const labelOf = number => corrections.get(number) ?? segments[number].label;
const isExported = () => exported === state();

function state() {
  return JSON.stringify([...corrections].sort((a, b) => a[0] - b[0]));
}

function correct(number, label) {
  steps.push(new Map(corrections));
  if (label === segments[number].label) corrections.delete(number);
  else corrections.set(number, label);
}

function correctNone() {
  steps.push(corrections);
  corrections = new Map();
}

function undo() {
  corrections = steps.pop() ?? corrections;
}

// Index of the last segment that starts at or before a time, -1: none. The times of a player are
// off by some ns.
function segmentAt(time) {
  let low = 0, high = segments.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (segments[middle].start <= time + 0.0005) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

// The probability of a label, 0 to 1, or null where there is no prediction.
function probabilityAt(label, time) {
  if (!bins) return null;
  const bin = Math.min(bins - 1, Math.floor(time / duration * bins));
  const value = curves[label * bins + bin];
  return value === NO_PREDICTION ? null : value / 254;
}

// The corrected timeline as CSV (RFC 4180), which clips/annotations.py reads: the column video says
// which video it is of, whatever the file is called later. A label that a spreadsheet would compute
// as a formula gets an apostrophe, as in `harmless` of utils/tables.py.
function toCsv() {
  const isNumber = text => /^[+-]/.test(text) && !isNaN(text);
  const harmless = text => /^'*[=+\-@\t\r\n]/.test(text) && !isNumber(text) ? `'${text}` : text;
  const quote = label => {
    const text = harmless(label);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const rows = segments.map(({ start, end, label, confidence }, number) => {
    const corrected = corrections.has(number);
    const sure = corrected || confidence === null ? "" : confidence.toFixed(4);
    return [start.toFixed(3), end.toFixed(3), quote(labels[labelOf(number)]), sure,
      corrected ? quote(labels[label]) : "", quote(data.video)].join(",");
  });
  return ["start,end,label,confidence,corrected_from,video", ...rows, ""].join("\r\n");
}

function exportCsv() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([toCsv()], { type: "text/csv" }));
  link.download = "timeline_corrected.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // a phone may first ask for the folder
  exported = state();
}

// Seconds as h:mm:ss, or as m:ss in a video below an hour; with decimals if asked for.
function clock(seconds, decimals = 0) {
  const unit = 10 ** decimals;
  const ticks = decimals ? Math.round(seconds * unit) : Math.floor(seconds + 0.0005);
  const minutes = Math.floor(ticks / unit / 60);
  const rest = (ticks / unit - 60 * minutes).toFixed(decimals).padStart(decimals ? 3 + decimals : 2, "0");
  if (duration < 3600) return `${minutes}:${rest}`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest}`;
}

// Write a name into an element; lines may break between its words, as in web/templating.py.
function write(element, text) {
  const words = text.split(/(?<=\p{Ll})(?=\p{Lu})|(?<=[_/.-])(?=[\p{L}\p{N}_])/u);
  const parts = words.flatMap(word => word.match(/\S{21}/u) ? word.match(/[^]{1,12}/gu) : [word]);
  element.replaceChildren(...parts.flatMap((part, i) => i ? [document.createElement("wbr"), part] : [part]));
}

const percent = (fraction, decimals = 0) =>
  fraction === null ? "–" : `${(100 * fraction).toFixed(decimals)}\u00a0%`;

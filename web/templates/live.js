// The live page: it asks the server for updates, shows them, and tells how old they are.

import { MARKS, classColour, drawLanes, drawStrip, drawSwatch, runsOf } from "./live_charts.js";

const OLD = 2; // seconds after which the newest prediction is shown as old
const SILENT = 5000; // milliseconds without a message of the server, which sends one per second
const FIRST_WAIT = 500; // milliseconds before the first new attempt; each further one waits twice as long
const LONGEST_WAIT = 10000;

const parts = JSON.parse(document.body.dataset.classes); // of each name; a line may break between them
const classes = parts.map((name) => name.join(""));
const span = Number(document.body.dataset.window);
const $ = (id) => document.getElementById(id);

const news = {
  predictions: [], // [time, label, thousandths of each class], oldest first
  next: 0, // number of predictions so far
  state: "", // message of the server
  hidden: false,
  cameAt: null, // when the newest snapshot came, by the clock of this browser; null: none yet
};
const line = { socket: null, open: false, heardAt: 0, retryAt: null, wait: FIRST_WAIT };

// The connection -------------------------------------------------------------------------------

function connect() {
  const address = new URL(document.body.dataset.feed, location.href);
  address.protocol = address.protocol.replace("http", "ws");
  const socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  line.socket = socket;
  line.heardAt = performance.now();
  socket.onopen = () => {
    line.heardAt = performance.now();
    socket.send(String(news.next));
  };
  socket.onmessage = async (event) => {
    if (socket !== line.socket) return;
    Object.assign(line, { open: true, retryAt: null, wait: FIRST_WAIT });
    line.heardAt = performance.now();
    await receive(event.data);
    if (socket.readyState === WebSocket.OPEN) socket.send(String(news.next)); // ask for the next message
  };
  socket.onclose = () => lose(socket);
}

function lose(socket) {
  if (socket !== line.socket) return;
  Object.assign(line, { socket: null, open: false });
  socket.close();
  if (news.state !== "ended") {
    line.retryAt = performance.now() + line.wait;
    line.wait = Math.min(2 * line.wait, LONGEST_WAIT);
  }
  render();
}

function watch() {
  const now = performance.now();
  if (line.socket && now - line.heardAt > SILENT) lose(line.socket);
  else if (!line.socket && line.retryAt !== null && now >= line.retryAt) connect();
  render();
}

/** Read a message: length of the JSON, JSON, and a JPEG if there is a new frame. */
async function receive(data) {
  const length = new DataView(data).getUint32(0);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  news.predictions.push(...head.predictions);
  // The server drops old predictions, and all of them where time jumps back; so does the page.
  news.predictions.splice(0, news.predictions.length - (head.next - head.first));
  news.next = head.next;
  news.state = head.state;
  news.hidden = head.hidden;
  news.cameAt = head.age === null ? null : performance.now() - 1000 * head.age;
  if (head.hidden) $("image").hidden = true;
  else if (data.byteLength > 4 + length) await drawFrame(new Uint8Array(data, 4 + length));
  render();
}

async function drawFrame(jpeg) {
  const image = await createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }));
  const canvas = $("image");
  if (canvas.width !== image.width || canvas.height !== image.height) {
    canvas.width = image.width;
    canvas.height = image.height;
    $("frame").style.aspectRatio = `${image.width} / ${image.height}`;
  }
  canvas.getContext("2d").drawImage(image, 0, 0);
  image.close();
  canvas.hidden = false;
}

// The page -------------------------------------------------------------------------------------

/** The state of the page: its kind (for the style), a text, and a detail that changes each second. */
function pageState() {
  const age = news.cameAt === null ? 0 : (performance.now() - news.cameAt) / 1000;
  const silence = age > OLD ? `no news for ${Math.floor(age)}\u00a0s` : "";
  if (news.state === "ended") return ["ended", "Ended", ""];
  if (line.retryAt !== null) {
    const seconds = Math.ceil((line.retryAt - performance.now()) / 1000);
    return ["lost", "Connection lost", seconds > 0 ? `trying again in ${seconds}\u00a0s` : "trying again"];
  }
  if (!line.open) return ["waiting", "Connecting", ""];
  if (news.cameAt === null) return ["waiting", "Waiting for the first prediction", ""];
  if (news.state) return ["note", news.state, silence];
  if (silence) return ["stale", "Not live", silence];
  return ["live", "Live", ""];
}

let asked = false;

/** Show everything at the next animation frame. */
function render() {
  if (!asked) requestAnimationFrame(show);
  asked = true;
}

function show() {
  asked = false;
  const [kind, text, extra] = pageState();
  const detail = extra && `: ${extra}`;
  $("state").dataset.kind = kind;
  write("state-word", text);
  write("state-detail", detail);
  const isOld = kind !== "live" && news.cameAt !== null;
  $("frame").classList.toggle("old", isOld);
  $("overlay").hidden = !isOld;
  write("overlay", text + detail);
  const [time, label, probabilities] = news.predictions.at(-1) ?? [null, "", []];
  const noFrame = label === "out_of_body" ? "frame hidden: out of body" : "no frame";
  write("placeholder", news.hidden ? noFrame : "no frame yet");
  $("placeholder").hidden = !$("image").hidden;
  showPrediction(label, probabilities, isOld);
  showBars(label, probabilities);
  write("clock", time === null ? "" : `Video time ${clock(time)}`);
  const end = isOld ? "last" : "now";
  drawStrip($("strip"), news.predictions, classes, span, end);
  showLegend();
  if ($("curves").open) drawLanes($("lanes"), news.predictions, classes, span, end);
}

function showPrediction(label, probabilities, isOld) {
  const card = document.querySelector(".prediction");
  const mark = MARKS[label];
  const number = classes.indexOf(label);
  card.classList.toggle("old", isOld);
  write("prediction-title", isOld ? "Last prediction" : "Prediction now");
  write("prediction", mark?.name ?? (label || "–")); // read aloud, so it is written only when it changes
  $("symbol").hidden = !label;
  write("symbol", mark?.symbol ?? String(number + 1));
  if (mark) card.dataset.mark = label;
  else delete card.dataset.mark;
  const colour = mark ? `var(${mark.colour})` : number < 0 ? "var(--rule)" : classColour(number);
  card.style.setProperty("--prediction", colour);
  const words = partsOf($("prediction").textContent).flatMap((part) => part.split(/\s/));
  card.style.setProperty("--longest", Math.max(...words.map((word) => word.length)));
  write("detail", describe(label, probabilities));
}

function describe(label, probabilities) {
  if (!label) return "No prediction yet.";
  if (label === "unreadable") return "The video cannot be read here.";
  if (label === "out_of_body") return "The camera is outside the body.";
  if (!probabilities.length) return "";
  if (label !== "uncertain") return `Probability ${percent(probabilities[classes.indexOf(label)])}`;
  const likeliest = probabilities.indexOf(Math.max(...probabilities));
  return `Not sure enough to predict. Likeliest: ${classes[likeliest]}, ${percent(probabilities[likeliest])}`;
}

const rows = classes.map((name, number) => {
  const cells = {};
  const row = document.createElement("li");
  for (const cell of ["number", "name", "value", "track"]) {
    cells[cell] = row.appendChild(document.createElement("span"));
    cells[cell].className = cell;
  }
  cells.bar = cells.track.appendChild(document.createElement("div"));
  cells.bar.className = "bar";
  cells.number.textContent = number + 1;
  cells.name.append(...breakable(name));
  $("bars").append(row);
  return { row, ...cells };
});
if (classes.length > 12) {
  $("bars").className = "many"; // the list scrolls, by keyboard too
  $("bars").tabIndex = 0;
}

function showBars(label, probabilities) {
  rows.forEach(({ row, value, bar }, number) => {
    row.classList.toggle("now", label === classes[number]);
    const text = probabilities.length ? percent(probabilities[number]) : "–";
    if (value.textContent !== text) value.textContent = text;
    bar.style.transform = `scaleX(${(probabilities[number] ?? 0) / 1000})`;
  });
}

let legend = "";

function showLegend(again = false) {
  const runs = runsOf(news.predictions);
  const seconds = new Map();
  for (const { label, start, end } of runs) {
    seconds.set(label, (seconds.get(label) ?? 0) + end - start);
  }
  const labels = [...classes, ...Object.keys(MARKS)].filter((label) => seconds.has(label));
  const name = (label) => MARKS[label]?.name ?? label;
  const totals = labels.map((label) => `${name(label)} ${Math.round(seconds.get(label))} s`);
  $("strip").setAttribute("aria-label", totals.join(", ") || "No predictions yet");
  if (legend === JSON.stringify(labels) && !again) return;
  legend = JSON.stringify(labels);
  $("legend").replaceChildren(
    ...labels.map((label) => {
      const item = document.createElement("li");
      const text = item.appendChild(document.createElement("span"));
      text.append(...breakable(name(label)));
      item.prepend(document.createElement("canvas"));
      return item;
    }),
  );
  [...$("legend").children].forEach((item, i) => drawSwatch(item.firstChild, labels[i], classes));
}

function paintAgain() {
  rows.forEach(({ row }, number) => row.style.setProperty("--own", classColour(number)));
  showLegend(true);
  render();
}

function write(id, text) {
  if ($(id).textContent !== text) $(id).replaceChildren(...breakable(text));
}

function partsOf(text) {
  return parts[classes.indexOf(text)] ?? [text];
}

/** A text as nodes. If it is the name of a class, a line may break between its parts. */
function breakable(text) {
  return partsOf(text).flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part]));
}

function percent(thousandths) {
  return thousandths === undefined ? "–" : `${Math.round(thousandths / 10)}\u00a0%`;
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return parts.map((part, i) => (i ? String(part).padStart(2, "0") : part)).join(":");
}

paintAgain();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintAgain);
$("curves").addEventListener("toggle", render);
new ResizeObserver(render).observe($("strip"));
setInterval(watch, 250);
connect();

// The player, the keyboard, and the update of the page after each change.

const video = $("video"); // null: there is no video
let playable = Boolean(video);
let cursor = 0; // position in seconds when no video can be played

const position = () => playable ? Math.min(duration, video.currentTime) : cursor;

function seek(time) {
  cursor = Math.min(duration, Math.max(0, time));
  if (playable) video.currentTime = cursor;
  reveal(cursor);
  follow(true);
}

// Go to the next shown segment in a direction; back: first to the start of the current one.
function step(direction) {
  const now = position(), here = segmentAt(now);
  let number = here + direction;
  const slack = playable && !video.paused ? 1 : 0.1; // seconds
  if (direction < 0 && here >= 0 && now - segments[here].start > slack) number = here;
  while (segments[number] && !shownLabels.has(labelOf(number))) number += direction;
  if (segments[number]) seek(segments[number].start);
}

let current = {}; // segment and label that are shown

// Show the position of the video. `moved`: a person chose it, so the list scrolls there too.
function follow(moved) {
  const time = position(), number = segmentAt(time);
  $("clock").textContent = `${clock(time)} of ${clock(duration)}`;
  placeHeads();
  if (hovered === null) showValues(time);
  const label = number < 0 ? null : labelOf(number);
  const isNew = number !== current.number || label !== current.label;
  if (isNew) showCurrent(number, label);
  if (isNew || moved) {
    $("slider").setAttribute("aria-valuenow", time.toFixed(1));
    $("slider").setAttribute("aria-valuetext", `${clock(time)}, ${$("now").textContent}`);
    // The list does not scroll away while somebody uses it.
    markRow(number, moved || !$("list").matches(":hover, :focus-within"));
  }
}

function showCurrent(number, label) {
  current = { number, label };
  showRelevance(number);
  $("now-chip").hidden = number < 0;
  $("now").textContent = number < 0 ? "No prediction" : nameOf(label);
  if (number < 0) return;
  dress($("now-chip"), label);
  const { confidence } = segments[number];
  if (corrections.has(number)) $("now").textContent += ", corrected";
  else if (confidence !== null) $("now").textContent += `, ${percent(confidence)} sure`;
}

function changed() {
  showTotals();
  showList();
  redraw();
  current = {};
  follow(false);
  showSaved();
}

function showSaved() {
  const count = corrections.size;
  const words = `${count} ${count === 1 ? "segment" : "segments"} corrected`;
  $("saved").textContent = count ? `${words}${isExported() ? ", exported." : ", not exported yet."}`
    : isExported() ? "" : "Corrections were undone since the last export.";
  $("undo").disabled = !steps.length;
  $("reset").disabled = !count;
}

function play() {
  if (!playable) return;
  if (video.paused) video.play().catch(() => {}); // an error event gives the reason
  else video.pause();
}

function cannotPlay() {
  cursor = position();
  playable = false;
  video.hidden = true;
  $("missing").hidden = false;
  follow(false);
}

function listenToVideo() {
  let before = 0;
  const frame = () => {
    const time = position();
    if (before <= view.to && time > view.to) reveal(time); // unless another part is in view
    before = time;
    follow(false);
    if (!video.paused && playable) requestAnimationFrame(frame);
  };
  video.addEventListener("play", frame);
  for (const name of ["timeupdate", "seeking", "seeked"]) {
    video.addEventListener(name, () => playable && follow(false));
  }
  video.addEventListener("error", cannotPlay);
  // A file of which only the sound can be played has no width.
  video.addEventListener("loadedmetadata", () => video.videoWidth || cannotPlay());
  if (video.error || video.networkState === HTMLMediaElement.NETWORK_NO_SOURCE) cannotPlay();
}

const middle = () => {
  const now = position();
  return now >= view.from && now <= view.to ? now : (view.from + view.to) / 2;
};
const zoomIn = () => zoom(0.5, middle());
const zoomOut = () => zoom(2, middle());
const zoomWhole = () => setView(0, duration);
const back = () => step(-1);
const on = () => step(1);
const KEYS = {
  p: back, "[": back, ArrowLeft: back, n: on, "]": on, ArrowRight: on, " ": play,
  "+": zoomIn, "=": zoomIn, "-": zoomOut, _: zoomOut, 0: zoomWhole,
  ...(data.relevance && { z: zoomToSegment }),
};

function onKey(event) {
  const { key, target } = event;
  if ((event.ctrlKey || event.metaKey) && key === "z") {
    undo();
    changed();
    event.preventDefault();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (target.closest("select, textarea, input:not([type=checkbox])")) return;
  const plain = key.length === 1 ? key.toLowerCase() : key; // Caps Lock may be on
  const onSlider = target === $("slider");
  if (onSlider && key === "Home") seek(0);
  else if (onSlider && key === "End") seek(duration);
  else if (!onSlider && !$("shortcuts").checked) return;
  else if (key === " " && target.closest("button, input, summary, video")) return;
  else if (key.startsWith("Arrow") && target.closest("video")) return;
  else if (event.shiftKey && key === "ArrowLeft") seek(position() - 1);
  else if (event.shiftKey && key === "ArrowRight") seek(position() + 1);
  else if (Object.hasOwn(KEYS, plain)) KEYS[plain]();
  else return;
  event.preventDefault();
}

$("zoom-segment")?.addEventListener("click", zoomToSegment);
makeCurves();
makeTotals(changed);
listenToPlot(seek);
listenToList(seek, changed);
if (video) listenToVideo();
document.addEventListener("keydown", onKey);
for (const [id, act] of Object.entries({
  previous: back, next: on, "zoom-in": zoomIn, "zoom-out": zoomOut, "zoom-whole": zoomWhole,
  undo: () => { undo(); changed(); },
  reset: () => { correctNone(); changed(); },
  export: () => { exportCsv(); showSaved(); },
})) $(id).addEventListener("click", act);
addEventListener("beforeunload", event => {
  if (!isExported()) event.preventDefault();
});
changed();

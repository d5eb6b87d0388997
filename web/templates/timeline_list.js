// The table of actions with totals and check boxes, and the list of segments.

const shownLabels = new Set(labels.keys());
const totalOf = new Map(); // index of a label: its row of totals
const rows = new Map(); // index of a segment: its row, if it is on the screen
let listed = []; // indices of the segments in the list
let currentRow = -1;

function makeTotals(changed) {
  labels.forEach((_, label) => {
    const row = $("total-template").content.cloneNode(true).firstElementChild;
    dress(row.querySelector(".chip"), label);
    write(row.querySelector(".name"), nameOf(label));
    row.querySelector("input").addEventListener("change", event => {
      if (event.target.checked) shownLabels.add(label);
      else shownLabels.delete(label);
      changed();
    });
    $("totals-body").append(row);
    totalOf.set(label, row);
  });
  $("show-all").addEventListener("click", () => {
    labels.forEach((_, label) => shownLabels.add(label));
    changed();
  });
  $("hide-all").addEventListener("click", () => {
    shownLabels.clear();
    changed();
  });
}

function showTotals() {
  const counts = new Map();
  segments.forEach(({ start, end }, number) => {
    const [count, time] = counts.get(labelOf(number)) ?? [0, 0];
    counts.set(labelOf(number), [count + 1, time + end - start]);
  });
  for (const [label, row] of totalOf) {
    const [count, time] = counts.get(label) ?? [0, 0];
    row.hidden = !count && isMark(label);
    row.querySelector("input").checked = shownLabels.has(label);
    row.querySelector(".count").textContent = count;
    row.querySelector(".time").textContent = clock(time, duration < 3600 ? 1 : 0);
    row.querySelector(".share").textContent = percent(time / duration, 1);
  }
}

function showList() {
  listed = [...segments.keys()].filter(number => shownLabels.has(labelOf(number)));
  $("none").hidden = listed.length > 0;
  $("list").hidden = !listed.length;
  $("list").setAttribute("aria-rowcount", listed.length + 1);
  for (const [number, row] of rows) {
    if (shownLabels.has(labelOf(number))) fillRow(row, number);
    else dropRow(number);
  }
  placeRows();
}

// Thousands of rows would make the page slow: only those in view exist, each at its position.
function placeRows(everything = false) {
  const height = rowHeight(), box = $("list");
  $("rows").style.height = `${listed.length * height}px`;
  const first = everything ? 0 : Math.max(0, Math.floor(box.scrollTop / height) - 6);
  const last = everything ? listed.length : first + Math.ceil(box.clientHeight / height) + 12;
  const wanted = new Set(listed.slice(first, last));
  for (const [number, row] of rows) { // a row with the focus stays
    if (!wanted.has(number) && !row.contains(document.activeElement)) dropRow(number);
  }
  let next = $("rows").firstElementChild;
  listed.forEach((number, position) => {
    let row = rows.get(number);
    if (!row && !(position >= first && position < last)) return;
    if (row) next = row.nextElementSibling;
    else {
      row = makeRow(number);
      $("rows").insertBefore(row, next);
    }
    row.style.top = `${position * height}px`;
    row.setAttribute("aria-rowindex", position + 2);
  });
}

const rowHeight = () => parseFloat(getComputedStyle($("list")).getPropertyValue("--row"));

function dropRow(number) {
  rows.get(number).remove();
  rows.delete(number);
}

function makeRow(number) {
  const row = $("row-template").content.cloneNode(true).firstElementChild;
  const { start, end } = segments[number];
  row.dataset.number = number;
  row.querySelector(".number").textContent = number + 1;
  row.querySelector(".go").textContent = clock(start, 1);
  row.querySelector(".go").setAttribute("aria-label", `Go to segment ${number + 1}, ${clock(start, 1)}`);
  row.querySelector(".end").textContent = clock(end, 1);
  row.querySelector(".lasts").textContent = `${(end - start).toFixed(1)}\u00a0s`;
  const choice = row.querySelector("select");
  choice.setAttribute("aria-label", `Label of segment ${number + 1}`);
  labels.forEach((_, label) => choice.add(new Option(nameOf(label), label)));
  row.classList.toggle("current", number === currentRow);
  rows.set(number, row);
  fillRow(row, number);
  return row;
}

function fillRow(row, number) {
  const label = labelOf(number), { label: before, confidence } = segments[number];
  const corrected = corrections.has(number);
  dress(row.querySelector(".chip"), label);
  row.querySelector("select").value = label;
  row.querySelector(".value").textContent = corrected ? "" : percent(confidence);
  row.classList.toggle("corrected", corrected);
  row.querySelector(".restore").hidden = !corrected;
  row.querySelector(".restore").title = `Back to ${nameOf(before)}`;
  row.querySelector(".restore").textContent = nameOf(before);
}

// Mark the row of the segment that is played; scroll to it if `bring`.
function markRow(number, bring) {
  rows.get(currentRow)?.classList.remove("current");
  rows.get(currentRow)?.removeAttribute("aria-current");
  currentRow = number;
  const position = listed.indexOf(number), box = $("list");
  if (bring && position >= 0) {
    const height = rowHeight(), top = position * height;
    const head = box.firstElementChild.offsetHeight;
    const isVisible = top >= box.scrollTop && top + height <= box.scrollTop + box.clientHeight - head;
    if (!isVisible) box.scrollTop = top - (box.clientHeight - head) / 3;
    placeRows();
  }
  rows.get(number)?.classList.add("current");
  rows.get(number)?.setAttribute("aria-current", "true");
}

function listenToList(seek, changed) {
  const numberOf = event => Number(event.target.closest("[data-number]")?.dataset.number ?? -1);
  $("list").addEventListener("scroll", () => placeRows(), { passive: true });
  $("rows").addEventListener("click", event => {
    const number = numberOf(event);
    if (number < 0 || event.target.closest("select")) return;
    if (event.target.closest(".restore")) change(number, segments[number].label);
    else seek(segments[number].start);
  });
  $("rows").addEventListener("change", event => {
    change(numberOf(event), Number(event.target.value));
  });
  const change = (number, label) => {
    correct(number, label);
    shownLabels.add(label); // otherwise the row would disappear at once
    changed();
    rows.get(number)?.querySelector("select").focus({ preventScroll: true });
  };
  new ResizeObserver(() => placeRows()).observe($("list"));
  addEventListener("beforeprint", () => placeRows(true));
  addEventListener("afterprint", () => placeRows());
}

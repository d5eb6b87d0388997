// The order of the clips, and which of them are shown.

const $ = id => document.getElementById(id);
const list = $("list");
const clips = [...list.children]; // in their original order
const buttons = [...document.querySelectorAll("[data-show]")];

const confidence = clip => Number(clip.dataset.confidence);
const falling = (a, b) => confidence(b) - confidence(a);

// Clips with this outcome first, the most confident first among them and among the others.
const first = outcome => (a, b) =>
  (b.dataset.outcome === outcome) - (a.dataset.outcome === outcome) || falling(a, b);

const orders = {
  original: () => 0, // sorting is stable
  high: falling,
  low: (a, b) => falling(b, a),
  wrong: first("wrong"),
  right: first("right"),
};

function update() {
  const pressed = buttons.find(button => button.getAttribute("aria-pressed") === "true");
  const outcome = pressed ? pressed.dataset.show : "all";
  let shown = 0;
  for (const clip of [...clips].sort(orders[$("order").value])) {
    clip.hidden = outcome !== "all" && clip.dataset.outcome !== outcome;
    shown += !clip.hidden;
    list.append(clip);
  }
  $("none").hidden = shown > 0;
  $("shown").textContent = `${shown} of ${clips.length} clips shown`;
}

if ($("tools")) {
  $("tools").hidden = false;
  $("order").addEventListener("change", update);
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      update();
    });
  }
  update(); // a browser may remember the choice of an earlier visit
}

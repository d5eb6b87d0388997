// The style of each label: a colour, and a pattern where the colour alone is not unique.

// Okabe and Ito, https://jfly.uni-koeln.de/color: distinct for every kind of colour vision.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"];
const PATTERNS = ["plain", "bars", "columns", "squares"]; // one per round through the colours
const SHADES = [0, 0.5, -0.45]; // towards white or black, when the patterns are used up as well
const MARKS = {
  uncertain: ["#c3c9d1", "diagonals"],
  unreadable: ["#3d4650", "crosses"],
  out_of_body: ["#8a939e", "dots"],
};
const TILE = 12; // pixels

const styles = makeStyles();

function makeStyles() {
  let count = 0;
  return labels.map((name, label) => {
    const round = Math.floor(count / COLOURS.length);
    let colour, pattern;
    if (isMark(label)) [colour, pattern] = MARKS[name];
    else {
      colour = shade(COLOURS[count % COLOURS.length], SHADES[Math.floor(round / 4) % SHADES.length]);
      pattern = PATTERNS[round % PATTERNS.length];
      count += 1;
    }
    const ink = lightness(colour) > 0.18 ? "#000000" : "#ffffff"; // both contrasts are at least 4.5
    const tile = drawTile(colour, ink, pattern);
    const fill = pattern === "plain" ? colour : tile.getContext("2d").createPattern(tile, "repeat");
    if (pattern !== "plain") fill.setTransform(new DOMMatrix().scale(0.5));
    return { colour, ink, fill, image: `url(${tile.toDataURL()})` };
  });
}

function channels(colour) {
  return [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
}

function shade(colour, amount) {
  const target = amount > 0 ? 255 : 0;
  const mixed = channels(colour).map(c => Math.round(c + (target - c) * Math.abs(amount)));
  return "#" + mixed.map(c => c.toString(16).padStart(2, "0")).join("");
}

// Relative luminance (WCAG 2).
function lightness(colour) {
  const [r, g, b] = channels(colour).map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// A tile of the pattern, drawn at twice its size for sharp screens.
function drawTile(colour, ink, pattern) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 2 * TILE;
  const ctx = canvas.getContext("2d");
  ctx.scale(2, 2);
  ctx.fillStyle = colour;
  ctx.fillRect(0, 0, TILE, TILE);
  ctx.globalAlpha = 0.7;
  ctx.fillStyle = ctx.strokeStyle = ink;
  ctx.lineWidth = 1.5;
  const half = TILE / 2;
  const line = (x, y, right, down) => {
    ctx.beginPath();
    ctx.moveTo(x, y);
    ctx.lineTo(x + right, y + down);
    ctx.stroke();
  };
  for (const at of [0, half]) {
    if (pattern === "bars") ctx.fillRect(0, at + 2, TILE, 1.5);
    if (pattern === "columns") ctx.fillRect(at + 2, 0, 1.5, TILE);
    if (pattern === "squares") ctx.fillRect(at + 1, at + 1, 3, 3);
    if (pattern === "dots") {
      ctx.beginPath();
      ctx.arc(at + half / 2, at + half / 2, 1.4, 0, 7);
      ctx.fill();
    }
  }
  if (pattern === "diagonals" || pattern === "crosses") {
    for (const at of [-half, 0, half, TILE]) line(at - half, TILE + half, 2 * TILE, -2 * TILE);
  }
  if (pattern === "crosses") {
    for (const at of [-half, 0, half, TILE]) line(at - half, -half, 2 * TILE, 2 * TILE);
  }
  return canvas;
}

function dress(chip, label) {
  chip.style.backgroundImage = styles[label].image;
}

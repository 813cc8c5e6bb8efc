// ---- colours: the same scale as in the pictures for papers; gain is positive and blue

let limit = 1; // nats of gain or loss at which colours end

/** How far a gain is from the paper's colour towards an end of the scale: 0 to 1. */
function share(gain, end) {
  return Math.min(Math.abs(gain) / end, 1) ** data.power;
}

/** The smallest round number that is not below `size`. */
function roundEnd(size) {
  const power = 10 ** Math.floor(Math.log10(Math.max(size, 0.01)) + 1e-9);
  const ends = [...data.round_ends, 10].map((end) => Number((end * power).toPrecision(3)));
  return ends.find((end) => end >= size * (1 - 1e-9)) ?? ends[ends.length - 1];
}

/** How many of the file's words gain or lose so many steps (1 / data.scale nats), summed up. */
const withinSteps = new Uint32Array(65536);

function countSizes() {
  withinSteps.fill(0);
  for (let row = 0; row < words.length; row++) withinSteps[Math.abs(mine[row] - other[row])] += 1;
  for (let steps = 1; steps < withinSteps.length; steps++) withinSteps[steps] += withinSteps[steps - 1];
}

/** The range that colours have unless another is asked for, in the unit. */
function usualRange() {
  const number = Math.ceil(words.length * data.percentile / 100);
  const steps = withinSteps.findIndex((within) => within >= number);
  return roundEnd(steps / data.scale * inUnit(1));
}

function setLimit() {
  limit = (view.range ?? usualRange()) / inUnit(1);
}

/** Share of the file's words whose gain or loss is within the range. */
function withinRange() {
  return withinSteps[Math.min(65535, Math.floor(limit * data.scale + 1e-6))] / words.length;
}

const SHADES = 100; // of each colour: finer than screens show

/** A class for every shade: words of one shade share their style, which is quick to work out. */
function makeShades() {
  const sheet = new CSSStyleSheet(), rules = [];
  for (const [letter, end] of [["b", "--better"], ["r", "--worse"]]) {
    for (let i = 1; i <= SHADES; i++) rules.push(`.${letter}${i} { background-color: color-mix(in srgb, var(${end}) ${100 * i / SHADES}%, var(--paper)); }`);
  }
  sheet.replaceSync(rules.join(""));
  document.adoptedStyleSheets = [sheet];
}

/** Give a word's element the colour of its gain, and a line where that is large. */
function colourWord(node, gain) {
  const shade = gain === 0 ? 0 : Math.max(1, Math.round(SHADES * share(gain, limit)));
  const large = Math.abs(gain) >= limit * data.underlined;
  const names = (gain > 0 ? "b" : "r") + shade + (!large ? "" : gain > 0 ? " line" : " lose");
  if (names === node.shade) return;
  if (node.shade) node.classList.remove(...node.shade.split(" "));
  node.classList.add(...names.split(" "));
  node.shade = names;
}

/** The same colour as numbers, for what is drawn: [red, green, blue]. */
function colourOf(gain, end, dark) {
  const zero = dark ? [22, 23, 26] : [255, 255, 255];
  const light = gain > 0 ? data.colours.better : data.colours.worse;
  const deep = gain > 0 ? [33, 102, 172] : [178, 24, 43];
  const s = share(gain, end), to = dark ? deep : light;
  return zero.map((z, i) => Math.round(z + s * (to[i] - z)));
}

const isDark = () => document.documentElement.hasAttribute("data-dark");

// ---- the legend
function rangeSteps() {
  const usual = usualRange(), steps = [];
  for (const power of [0.01, 0.1, 1, 10]) for (const end of data.round_ends) steps.push(Number((end * power).toPrecision(3)));
  const around = steps.filter((step) => step >= usual / 16 && step <= usual * 8);
  return [...new Set([...around, usual, inUnit(limit)].map((x) => Number(x.toPrecision(6))))].sort((a, b) => a - b);
}

const plainSigned = (x) => (x > 0 ? "+" : MINUS) + Number(Math.abs(x).toPrecision(3));

function drawLegend() {
  const stops = [];
  for (let i = -20; i <= 20; i++) {
    const end = i > 0 ? "var(--better)" : "var(--worse)";
    stops.push(`color-mix(in srgb, ${end} ${(100 * share(i / 20, 1)).toFixed(1)}%, var(--paper))`);
  }
  const ends = inUnit(limit), digits = ends >= 3 ? 1 : 2;
  $("scale").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  $("scale").setAttribute("aria-label", `Colours from red, ${fixed(ends, digits)} ${view.unit} lost, over none, to blue, ${fixed(ends, digits)} ${view.unit} gained`);
  $("ticks").replaceChildren(...[-1, -0.5, 0, 0.5, 1].map((at) => {
    const tick = make("span", {}, at === 0 ? "0" : plainSigned(at * ends));
    tick.style.left = 50 * (at + 1) + "%";
    return tick;
  }));
  for (const node of document.querySelectorAll(".unit")) node.textContent = view.unit;
  const steps = rangeSteps();
  $("limit").max = steps.length - 1;
  $("limit").value = steps.findIndex((step) => step >= ends * (1 - 1e-5));
  $("limit").steps = steps;
  $("limit").setAttribute("aria-valuetext", `colours end at ${Number(ends.toPrecision(3))} ${view.unit}`);
  $("limit-text").textContent = `±${Number(ends.toPrecision(3))} ${view.unit}`;
  const from = `${Number((ends * data.underlined).toPrecision(3))} ${view.unit}`, within = 100 * withinRange();
  $("legend-note").replaceChildren(
    `Blue: predicted better by ${ruleNamed(view.rule).label} than by ${ruleNamed(view.against).label}, underlined from ${from}. Red: worse`,
    make("span", { class: "dotted" }, `, with a dotted line from ${from}`),
    `. ${within.toFixed(within > 99.5 && within < 100 ? 1 : 0)} % of this file’s words are within the range.`,
  );
}

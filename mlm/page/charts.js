// ---- charts of the panel: a word's occurrences, and the gain by position

/** Round steps for an axis from `low` to `high`. */
function axisSteps(low, high, most = 4) {
  const rough = Math.max(high - low, 1e-6) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= rough);
  const steps = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + 1e-9 * step; at++) steps.push(Number((at * step).toPrecision(6)));
  return steps;
}

function addAxis(chart, frame, steps, y, digits = null) {
  const places = digits ?? Math.max(0, ...steps.map((v) => (String(v).split(".")[1] || "").length));
  for (const v of steps) {
    chart.append(makeSvg("line", { x1: frame.left, x2: frame.right, y1: y(v), y2: y(v), stroke: v === 0 ? "var(--faint)" : "var(--line)" }));
    chart.append(makeSvg("text", { x: frame.left - 5, y: y(v) + 4, "text-anchor": "end" }, fixed(v, places)));
  }
}

/** The word's loss at every occurrence, under both rules of the pair: a key and a chart. */
function occurrenceChart(all, at) {
  const frame = { left: 30, right: 316, top: 8, bottom: 118 };
  const names = [...new Set([view.against, view.rule])];
  const series = names.map((name) => all.map((place) => inUnit(lossAt(name, place))));
  const high = Math.max(0.1, ...series.map((values) => values.reduce((a, b) => Math.max(a, b), 0)));
  const x = (i) => frame.left + 8 + (frame.right - frame.left - 16) * (all.length === 1 ? 0.5 : i / (all.length - 1));
  const steps = axisSteps(0, high * 1.04), y = (v) => frame.bottom - (frame.bottom - frame.top) * v / (high * 1.04);
  const chart = makeSvg("svg", { class: "chart", viewBox: "0 0 322 146", role: "img", "aria-label": occurrenceLabel(all, series, names) });
  addAxis(chart, frame, steps, y);
  chart.append(makeSvg("line", { x1: x(at), x2: x(at), y1: frame.top, y2: frame.bottom, stroke: "var(--focus)", "stroke-width": 1.5 }));
  for (const [i, name] of names.entries()) addSeries(chart, series[i].map((v, k) => [x(k), y(v)]), name, at);
  for (const i of tickPlaces(all.length)) chart.append(makeSvg("text", { x: x(i), y: 131, "text-anchor": "middle", class: i === at ? "strong" : "" }, i + 1));
  chart.append(makeSvg("text", { x: (frame.left + frame.right) / 2, y: 144, "text-anchor": "middle" }, "occurrence in this article"));
  chart.addEventListener("click", (event) => {
    const box = chart.getBoundingClientRect(), along = (event.clientX - box.left) * 322 / box.width;
    const share = (along - frame.left - 8) / (frame.right - frame.left - 16);
    pin(all[Math.max(0, Math.min(all.length - 1, Math.round(share * (all.length - 1))))]);
  });
  chart.style.cursor = "pointer";
  return [keyOf(names), chart];
}

/** What the axis measures, and the line of each rule. */
function keyOf(names) {
  const rules = names.map((name) => {
    const line = make("i", name === view.rule ? { class: "bold" } : {});
    line.style.borderColor = lineColour(name);
    return make("span", {}, line, ruleNamed(name).label);
  });
  return make("div", { class: "key", "aria-hidden": "true" }, make("span", {}, `loss, ${view.unit}`), make("div", {}, ...rules));
}

function occurrenceLabel(all, series, names) {
  const told = names.map((name, i) => `${ruleNamed(name).label}: ${series[i].slice(0, 12).map((v) => fixed(v, 1)).join(", ")}`);
  return `Loss in ${view.unit} at each of ${all.length} occurrences. ${told.join(". ")}`;
}

/** A colour of a rule that can be seen on both papers. */
function lineColour(name) {
  return name === "static" || ruleNamed(name).colour === "#000000" ? "var(--ink)" : `color-mix(in srgb, ${ruleNamed(name).colour} var(--rule-share), white)`;
}

function addSeries(chart, points, name, at) {
  const stroke = lineColour(name), bold = name === view.rule;
  chart.append(makeSvg("polyline", { points: points.map((p) => p.join(",")).join(" "), fill: "none", stroke, "stroke-width": bold ? 2.6 : 1.5, "stroke-linejoin": "round" }));
  const dots = points.length <= 40 ? points.map((p, i) => [p, i]) : [[points[at], at]];
  for (const [[cx, cy], i] of dots) {
    chart.append(makeSvg("circle", { cx, cy, r: i === at ? 4.2 : bold ? 2.8 : 2.2, fill: stroke, class: "point" }));
  }
}

/** Which occurrences get a number under the axis. */
function tickPlaces(number) {
  if (number <= 12) return Array.from({ length: number }, (_, i) => i);
  const step = axisSteps(1, number, 6), places = step.map((n) => n - 1).filter((i) => Number.isInteger(i) && i > 0 && i < number - number / 9);
  return [0, ...places, number - 1];
}

// ---- the gain by position, for every rule
const CURVE = { left: 34, right: 346, top: 8, bottom: 138 };
const alongCurve = (place) => CURVE.left + (CURVE.right - CURVE.left) * place / Math.max(article().words - 1, 1);
const SMOOTHED = 9; // windows of the running mean

/** Mean gains of a rule in windows of words, smoothed over neighbours: [[place, gain], …]. */
function gainCurve(name) {
  const { start, words: length } = article(), width = Math.max(10, Math.ceil(length / 80));
  const windows = [];
  for (let from = 0; from < length; from += width) {
    const to = Math.min(from + width, length);
    windows.push({ middle: (from + to - 1) / 2, sum: gainOf(name, start + from, start + to), n: to - from });
  }
  const half = (SMOOTHED - 1) / 2;
  return windows.map(({ middle }, i) => {
    const near = windows.slice(Math.max(0, i - half), i + half + 1);
    const sum = near.reduce((s, w) => s + w.sum, 0), n = near.reduce((s, w) => s + w.n, 0);
    return [middle, inUnit(sum / n)];
  });
}

function drawCurve() {
  const names = [...protocols.get(view.protocol).rules.keys()].filter((name) => name !== view.against);
  const curves = new Map(names.map((name) => [name, gainCurve(name)]));
  const values = [...curves.values()].flat().map(([, v]) => v);
  let low = Math.min(0, ...values), high = Math.max(0, ...values);
  if (high - low < 0.02) { low -= 0.01; high += 0.01; }
  const y = (v) => CURVE.bottom - (CURVE.bottom - CURVE.top) * (v - low) / (high - low);
  const chart = makeSvg("svg", { class: "chart", viewBox: "0 0 352 168", "aria-hidden": "true" });
  addAxis(chart, CURVE, axisSteps(low, high), y);
  const ends = [[CURVE.left, "1", "start"], [CURVE.right, count(article().words), "end"]];
  for (const [x, text, anchor] of ends) chart.append(makeSvg("text", { x, y: 153, "text-anchor": anchor }, text));
  chart.append(makeSvg("text", { x: (CURVE.left + CURVE.right) / 2, y: 165, "text-anchor": "middle" }, "word of the article"));
  for (const name of [...names.filter((n) => n !== view.rule), view.rule]) if (curves.has(name)) addCurve(chart, curves.get(name), name, y);
  chart.append(makeSvg("line", { id: "curve-here", y1: CURVE.top, y2: CURVE.bottom, stroke: "var(--focus)", "stroke-width": 1.5 }));
  $("curve").replaceChildren(chart);
  const width = Math.max(10, Math.ceil(article().words / 80));
  $("curve-note").textContent = `Over ${ruleNamed(view.against).label}, means of about ${count(Math.min(article().words, width * SMOOTHED))} words. The line is where you are.`;
  drawCurveKey(names);
}

function addCurve(chart, points, name, y) {
  const bold = name === view.rule, at = ([place, v]) => `${alongCurve(place).toFixed(1)},${y(v).toFixed(1)}`;
  if (points.length === 1) chart.append(makeSvg("circle", { cx: alongCurve(points[0][0]), cy: y(points[0][1]), r: 3, fill: lineColour(name) }));
  chart.append(makeSvg("polyline", { points: points.map(at).join(" "), fill: "none", stroke: lineColour(name), "stroke-width": bold ? 3 : 1.2, "stroke-linejoin": "round", opacity: bold ? 1 : 0.75 }));
}

/** The rules of the curves, as buttons that choose them. */
function drawCurveKey(names) {
  $("curve-key").replaceChildren(...names.map((name) => {
    const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = lineColour(name);
    const button = make("button", { type: "button", "aria-pressed": String(name === view.rule), title: ruleNamed(name).about }, swatch, ruleNamed(name).label);
    button.addEventListener("click", () => show({ rule: name }));
    return button;
  }));
}

// ---- the strip: the whole article as a band of colours, with where one is

const stripShare = (place) => place / Math.max(article().words - 1, 1);

/** Mean gain of each column of the strip. */
function stripGains(columns) {
  const { start, words: length } = article();
  return Array.from({ length: columns }, (_, i) => {
    const from = Math.floor(i * length / columns), to = Math.max(from + 1, Math.floor((i + 1) * length / columns));
    return gainOf(view.rule, start + from, start + to) / (to - from);
  });
}

function drawStrip() {
  const columns = Math.min(article().words, 400), canvas = $("heat"), dark = isDark();
  const gains = stripGains(columns);
  const sorted = gains.map(Math.abs).sort((a, b) => a - b);
  const end = Math.max(sorted[Math.floor((sorted.length - 1) * data.percentile / 100)], 0.01);
  canvas.width = columns;
  const pen = canvas.getContext("2d");
  for (const [i, gain] of gains.entries()) {
    pen.fillStyle = `rgb(${colourOf(gain, end, dark)})`;
    pen.fillRect(i, 0, 1, 1);
  }
  $("strip").title = `Mean gain along the article, ${count(Math.ceil(article().words / columns))} words a column; colours end at ±${amount(end)} ${view.unit}. Click to go there.`;
  $("strip").setAttribute("aria-valuemax", article().words);
  drawMarks();
}

/** The chosen word's occurrences below, hits of the search above. */
function drawMarks() {
  const mark = (place, name) => {
    const node = make("i", { class: name });
    node.style.left = 100 * stripShare(place) + "%";
    return node;
  };
  const chosen = chosenPlace(), same = chosen < 0 ? [] : occurrences.get(wordAt(chosen)) || [];
  const nodes = [...thinned(same).map((p) => mark(p, "same")), ...thinned(hits).map((p) => mark(p, "hit"))];
  if (chosen >= 0) nodes.push(mark(chosen, "here"));
  $("marks").replaceChildren(...nodes);
}

/** At most 600 of the places: more cannot be told apart. */
function thinned(places) {
  const step = Math.ceil(places.length / 600);
  return step <= 1 ? places : places.filter((_, i) => i % step === 0);
}

let sought = -1; // the place that a slider went to, as long as the window shows it

/** The chosen word, the place that was sought, or else the first one in the window. */
function placeNow(from, to) {
  if (view.pinned >= 0) return view.pinned;
  const shown = sought < 0 ? -1 : nearestShown(sought);
  return shown >= from && shown <= to ? sought : from;
}

function nearestShown(place) {
  const after = nextShown(place, 1);
  return after >= 0 ? after : nextShown(place, -1);
}

/** Where the window and the chosen word are, on the strip and on the curve. */
function drawPlace() {
  if (!blocks.length) return;
  const [from, to] = view.table ? [tablePage * TABLE_ROWS, tablePage * TABLE_ROWS] : placesInWindow();
  $("window").style.left = 100 * stripShare(from) + "%";
  $("window").style.width = Math.max(0, 100 * (stripShare(to) - stripShare(from))) + "%";
  const here = view.table ? from : placeNow(from, to);
  for (const id of ["strip", "curve"]) {
    $(id).setAttribute("aria-valuenow", here + 1);
    $(id).setAttribute("aria-valuetext", `word ${count(here + 1)} of ${count(article().words)}, ${spelled(wordAt(here))}`);
  }
  $("curve").setAttribute("aria-valuemax", article().words);
  const line = $("curve-here");
  if (line) for (const end of ["x1", "x2"]) line.setAttribute(end, alongCurve(here));
}

/** Bring a place to the middle of the window. */
function goTo(place) {
  const at = Math.max(0, Math.min(article().words - 1, Math.round(place)));
  if (view.table) { tablePage = Math.floor(at / TABLE_ROWS); showTable(); drawPlace(); return; }
  const near = nearestShown(at);
  sought = at;
  if (near >= 0) spanAt(near).scrollIntoView({ block: "center" });
  windowMoved();
  drawPlace();
}

const SLIDER_STEPS = { ArrowRight: 0.01, ArrowUp: 0.01, ArrowLeft: -0.01, ArrowDown: -0.01, PageUp: 0.1, PageDown: -0.1 };

/** The strip and the curve are sliders: `share` maps a pointer's place to 0 … 1. */
function makeSlider(node, share) {
  const move = (place) => {
    show({ pinned: -1, over: -1 });
    goTo(place);
  };
  node.addEventListener("keydown", (event) => {
    const last = article().words - 1, from = Number(node.getAttribute("aria-valuenow")) - 1;
    let to = null;
    if (event.key in SLIDER_STEPS) to = from + Math.sign(SLIDER_STEPS[event.key]) * Math.max(1, Math.round(Math.abs(SLIDER_STEPS[event.key]) * last));
    if (event.key === "Home") to = 0;
    if (event.key === "End") to = last;
    if (to === null) return;
    event.preventDefault();
    event.stopPropagation();
    move(to);
  });
  node.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    node.setPointerCapture(event.pointerId);
    move(share(event) * (article().words - 1));
  });
  node.addEventListener("pointermove", (event) => {
    if (node.hasPointerCapture(event.pointerId)) move(share(event) * (article().words - 1));
  });
}

function shareOfStrip(event) {
  const box = $("strip").getBoundingClientRect();
  return Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
}

function shareOfCurve(event) {
  const box = $("curve").getBoundingClientRect(), x = (event.clientX - box.left) * 352 / box.width;
  return Math.max(0, Math.min(1, (x - CURVE.left) / (CURVE.right - CURVE.left)));
}

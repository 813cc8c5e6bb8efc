// ---- the panel: the largest gains and losses, the articles; the table of words

const LARGEST = 12; // words that are listed on each side
let extremes = { gain: [], loss: [] }; // places, the largest first

/** The words on show that gain and lose most. */
function findExtremes() {
  const steps = gainSteps();
  for (let place = 0; place < steps.length; place++) if (blockAt[place] < 0) steps[place] = 0;
  extremes = { gain: largest(steps, 1), loss: largest(steps, -1) };
}

/** Places of the largest values times `sign`, in order, as far as they are above 0.005 nats. */
function largest(steps, sign) {
  const found = [];
  let least = 0.005 * data.scale; // what the next one must exceed
  for (let place = 0; place < steps.length; place++) {
    const value = sign * steps[place];
    if (value <= least) continue;
    let at = found.length;
    while (at > 0 && sign * steps[found[at - 1]] < value) at--;
    found.splice(at, 0, place);
    found.length = Math.min(found.length, LARGEST);
    if (found.length === LARGEST) least = sign * steps[found[LARGEST - 1]];
  }
  return found;
}

function drawExtremes() {
  for (const [id, kind] of [["gains", "gain"], ["losses", "loss"]]) {
    $(id).replaceChildren(...extremes[kind].map((place) => {
      const button = make("button", { type: "button", class: "row" },
        make("span", { class: "label" }, spelled(wordAt(place))), make("span", { class: "value" }, change(gainAt(place), 1)));
      button.place = place;
      button.addEventListener("click", () => pin(place));
      return make("li", {}, button);
    }));
    if (!extremes[kind].length) $(id).append(make("li", { class: "label" }, "none"));
  }
  markExtremes();
}

function markExtremes() {
  for (const button of document.querySelectorAll("#gains button, #losses button")) {
    button.setAttribute("aria-current", String(button.place === view.pinned));
  }
}

/** Go along the list of the largest gains or losses, by size. */
function stepExtreme(kind, step) {
  const list = extremes[kind], at = list.indexOf(view.pinned);
  if (!list.length) return;
  pin(list[at < 0 ? (step > 0 ? 0 : list.length - 1) : (at + step + list.length) % list.length]);
}

/** A bar for every article: the mean gain per word under the chosen pair. */
function drawBars() {
  const gains = data.articles.map(({ start, words: length }) => gainOf(view.rule, start, start + length) / length);
  const low = Math.min(0, ...gains), span = Math.max(0, ...gains) - low || 1;
  $("bars").style.setProperty("--zero", 100 * -low / span + "%");
  $("bars").replaceChildren(...data.articles.map(({ letter, title }, place) => {
    const bar = make("i", gains[place] < 0 ? { class: "negative" } : {});
    bar.style.left = 100 * (Math.min(0, gains[place]) - low) / span + "%";
    bar.style.width = 100 * Math.abs(gains[place]) / span + "%";
    const button = make("button", { type: "button", class: "row", "aria-current": String(place === view.article), title },
      make("span", { class: "letter" }, letter), make("span", { class: "label" }, title),
      make("span", { class: "bar", "aria-hidden": "true" }, bar), make("span", { class: "value" }, change(gains[place], 2)));
    button.addEventListener("click", () => openArticle(place));
    return make("li", {}, button);
  }));
}

function openArticle(place) {
  if (place < 0 || place >= data.articles.length) return;
  tablePage = 0;
  show({ article: place, pinned: -1, over: -1 });
  const current = $("bars").querySelector('[aria-current="true"]');
  if (current) $("bars").scrollTop = current.offsetTop - $("bars").offsetTop - 60;
}

function drawPanel() {
  drawLegend();
  drawExtremes();
  drawCurve();
  drawBars();
  $("print-title").textContent = `${data.heading}, ${data.split} split · ${article().letter}. ${article().title} · ${ruleNamed(view.rule).label} against ${ruleNamed(view.against).label}, protocol ${view.protocol}`;
}

// ---- the words as a table, for those who read with their ears
const TABLE_ROWS = 200;
let tablePage = 0;

function showTable() {
  $("text").hidden = view.table;
  $("hidden-note").hidden = view.table;
  $("table").hidden = !view.table;
  if (!view.table) { $("table").replaceChildren(); return; }
  const length = article().words, pages = Math.ceil(length / TABLE_ROWS);
  tablePage = Math.max(0, Math.min(pages - 1, tablePage));
  const from = tablePage * TABLE_ROWS, to = Math.min(length, from + TABLE_ROWS);
  const head = ["word", "place", ...[view.rule, view.against].map((name) => `${ruleNamed(name).label}, ${view.unit}`), `gain, ${view.unit}`];
  const rows = [];
  for (let place = from; place < to; place++) {
    rows.push([spelled(wordAt(place)), count(place + 1), ...[view.rule, view.against].map((name) => amount(lossAt(name, place))), change(gainAt(place))]);
  }
  const table = tableOf(head, rows);
  table.prepend(make("caption", { class: "aloud" }, `${article().title}, words ${from + 1} to ${to}`));
  $("table").replaceChildren(tablePager(pages, from, to), table);
}

function tablePager(pages, from, to) {
  const button = (label, page) => {
    const node = make("button", { type: "button" }, label);
    node.disabled = page < 0 || page >= pages;
    node.addEventListener("click", () => {
      tablePage = page;
      showTable();
      window.scrollTo(0, 0);
      drawPlace();
      for (const other of $("table").querySelectorAll("button")) if (other.textContent === label && !other.disabled) other.focus();
    });
    return node;
  };
  return make("div", { class: "pager" }, button("Previous words", tablePage - 1), button("Next words", tablePage + 1), make("span", {}, `words ${count(from + 1)} to ${count(to)} of ${count(article().words)}`));
}

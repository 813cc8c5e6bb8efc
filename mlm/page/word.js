// ---- the chosen word: pinned by a click, or previewed under the pointer

const chosenPlace = () => (view.over >= 0 ? view.over : view.pinned);

/** Choose a word until Escape; bring it into sight and tell it to those who listen. */
function pin(place) {
  if (!isShown(place)) return;
  show({ pinned: place, over: -1 });
  bringIntoSight(place);
  $("aloud").textContent = toldAloud(place);
}

/** Scroll if the header, the window's end or the sheet of a phone hides a word. */
function bringIntoSight(place) {
  const box = spanAt(place).getBoundingClientRect(), top = $("top").getBoundingClientRect().bottom;
  const low = window.innerHeight - (isPhone() ? $("panel").offsetHeight : 0);
  if (box.top >= top + 10 && box.bottom <= low - 10) return;
  window.scrollBy(0, (box.top + box.bottom) / 2 - (top + low) / 2);
}

function unpin() {
  show({ pinned: -1, over: -1 });
}

const isPhone = () => window.matchMedia("(max-width: 52rem)").matches;

/** Mark a word's element, if it has one: chosen, another occurrence of that, found by the search. */
function markPlace(place) {
  const node = spans[place];
  if (!node) return;
  const on = place === view.pinned;
  node.classList.toggle("on", on);
  node.classList.toggle("same", !on && view.pinned >= 0 && wordAt(place) === wordAt(view.pinned));
  node.classList.toggle("hit", isHit.has(place));
}

let markedWord = -1; // the word whose occurrences are marked
function markWord() {
  const word = view.pinned >= 0 ? wordAt(view.pinned) : -1;
  for (const each of new Set([markedWord, word])) for (const place of occurrences.get(each) || []) markPlace(place);
  markedWord = word;
}

function showWord() {
  const place = chosenPlace();
  if (view.over < 0) markWord();
  drawMarks();
  showHits();
  const parts = place < 0 ? articleSummary() : wordSummary(place);
  $("word").replaceChildren(...parts);
  $("sheet-text").replaceChildren(...sheetText(place));
  markExtremes();
}

/** What the panel shows while no word is chosen. */
function articleSummary() {
  const { title, start, words: length, of } = article();
  const gain = gainOf(view.rule, start, start + length) / length;
  const rules = [...new Set([view.rule, view.against])];
  const rows = rules.map((name) => {
    const own = meanLoss(name);
    return [ruleNamed(name).label, amount(own, 3), count(Number(Math.exp(own).toFixed(1)))];
  });
  return [
    make("div", { class: "name" }, title),
    make("p", { class: "place" }, `Article ${article().letter} · ${count(of)} words`),
    make("p", { class: "lead" }, make("b", {}, `${change(gain, 3)} ${view.unit} per word`), ` gained by ${ruleNamed(view.rule).label} over ${ruleNamed(view.against).label}.`),
    tableOf(["", `${view.unit} per word`, "perplexity"], rows),
    make("h3", {}, "When a word comes back"),
    tableOf(["", "words", `${view.unit} gained per word`], noveltyRows()),
    make("p", {}, "Point at a word to see its losses; click to keep it, and to see what happens each time it comes back."),
  ];
}

/** Words new to the article and words seen before: how many, and what they gain. */
function noveltyRows() {
  const isNew = new Uint8Array(article().words), sums = [0, 0], counts = [0, 0];
  const steps = gainSteps();
  for (const places of occurrences.values()) isNew[places[0]] = 1;
  for (let place = 0; place < steps.length; place++) {
    sums[isNew[place]] += steps[place];
    counts[isNew[place]] += 1;
  }
  const row = (name, i) => [name, count(counts[i]), counts[i] ? change(sums[i] / data.scale / counts[i], 3) : ""];
  return [row("new to the article", 1), row("seen before", 0)];
}

function meanLoss(name) {
  const { start, words: length } = article(), losses = ruleNamed(name).losses;
  let sum = 0;
  for (let row = start; row < start + length; row++) sum += losses[row];
  return sum / data.scale / length;
}

/** A small table: its rows begin with their names. `marked` is the number of a bold row. */
function tableOf(head, rows, bold = []) {
  const table = make("table");
  if (head.length) table.append(make("thead", {}, make("tr", {}, ...head.map((cell) => (cell ? make("th", { scope: "col" }, cell) : make("td"))))));
  const body = make("tbody");
  for (const [i, [name, ...cells]] of rows.entries()) {
    const row = make("tr", bold.includes(i) ? { class: "chosen" } : {});
    row.append(make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, cell)));
    body.append(row);
  }
  table.append(body);
  return table;
}

function wordSummary(place) {
  const word = wordAt(place), all = occurrences.get(word), at = all.indexOf(place), gain = gainAt(place);
  const label = spelled(word) + (word === data.eos ? " line end" : "");
  const names = [...protocols.get(view.protocol).rules.keys()];
  const rows = names.map((name) => {
    const own = lossAt(name, place);
    return [ruleNamed(name).label, amount(own), name === view.against ? "" : change(lossAt(view.against, place) - own)];
  });
  const bold = names.flatMap((name, i) => (name === view.rule || name === view.against ? [i] : []));
  const times = all.length === 1 ? "its only occurrence here" : `${ordinal(at + 1)} of ${count(all.length)} occurrences`;
  const parts = [
    make("div", { class: "title" }, make("div", { class: "name" }, label), letGo()),
    make("p", { class: "place" }, `word ${count(place + 1)} of ${count(article().words)} · ${times}`),
    make("p", { class: "lead" }, make("b", {}, `${change(gain)} ${view.unit}`), `: ${timesLikely(gain)} under ${ruleNamed(view.rule).label} ${Math.abs(gain) < 0.005 || gain > 0 ? "as" : "than"} under ${ruleNamed(view.against).label}`),
  ];
  if (all.length > 1) parts.push(...occurrenceChart(all, at), occurrenceSteps(all, at));
  parts.push(make("h3", {}, "Losses, all rules"), tableOf(["", view.unit, "gained"], rows, bold));
  return [...parts, ...expected(article().start + place)];
}

/** What ends the choice of a word; while one is only previewed, how to keep it. */
function letGo() {
  if (view.pinned < 0 || view.over >= 0) return make("span", { class: "place" }, "click to keep");
  const button = make("button", { type: "button", class: "icon", "aria-label": "Let the word go", title: "Esc" }, "×");
  button.addEventListener("click", () => { unpin(); $("text").focus({ preventScroll: true }); });
  return button;
}

/** Buttons from one occurrence to the next. */
function occurrenceSteps(all, at) {
  const button = (label, to, text) => {
    const node = make("button", { type: "button", "aria-label": label, class: "icon" }, text);
    node.disabled = to < 0 || to >= all.length;
    node.addEventListener("click", () => { pin(all[to]); focusStep(label); });
    return node;
  };
  return make("div", { class: "steps" }, button("Previous occurrence", at - 1, "‹"), button("Next occurrence", at + 1, "›"));
}

function focusStep(label) {
  const node = $("word").querySelector(`button[aria-label="${label}"]`);
  if (node && !node.disabled) node.focus(); else $("text").focus({ preventScroll: true });
}

/** A piece, with dots before one that goes on with a word. */
function spelledPiece(piece) {
  return piece.startsWith(" ") ? piece.slice(1) : `…${piece}`;
}

/** What the model expected there, where it is stored. */
function expected(row) {
  const place = evidence ? evidence.place.get(row) : undefined;
  if (place === undefined) return [];
  const rule = ruleNamed(evidence.rule), label = rule ? rule.label : evidence.rule;
  const own = listed(evidence.own, place).filter((piece) => piece >= 0);
  const facts = ["before", "after"].map((name, i) => {
    const time = evidence.times[i];
    return [name, count(time.rank[place]), amount(time.entropy[place])];
  });
  const likeliest = evidence.times.map((time) => {
    const chances = listed(time.probability, place);
    return listed(time.best, place).map((piece, i) => {
      const text = piece < 0 ? "" : `${spelledPiece(evidence.pieces[piece])} ${fixed(100 * chances[i], 1)} %`;
      return piece === own[0] ? make("b", {}, text) : text; // the piece that came
    });
  });
  const rows = likeliest[0].map((before, i) => [String(i + 1), before, likeliest[1][i] || ""]);
  return [
    make("h3", {}, `Expected there (${label}, protocol ${evidence.protocol})`),
    make("p", {}, `Pieces: ${own.map((piece) => evidence.pieces[piece].trimStart()).join(" · ")}`),
    tableOf(["first piece", "rank", `entropy, ${view.unit}`], facts),
    tableOf(["", "before", "after"], rows),
  ];
}

function sheetText(place) {
  if (place < 0) {
    const { start, words: length } = article();
    return [`${change(gainOf(view.rule, start, start + length) / length, 3)} ${view.unit} per word gained here`];
  }
  const all = occurrences.get(wordAt(place));
  return [make("b", {}, spelled(wordAt(place))), ` ${change(gainAt(place))} ${view.unit} · ${all.indexOf(place) + 1} of ${count(all.length)}`];
}

function toldAloud(place) {
  const gain = gainAt(place), all = occurrences.get(wordAt(place));
  const losses = [view.rule, view.against].map((name) => `${ruleNamed(name).label} ${amount(lossAt(name, place))}`);
  return `${spelled(wordAt(place))}, word ${place + 1}, occurrence ${all.indexOf(place) + 1} of ${all.length}, gain ${change(gain)} ${view.unit}, ${losses.join(", ")}`;
}

/** Go to the next or previous occurrence of the chosen word. */
function stepOccurrence(step) {
  const place = chosenPlace();
  if (place < 0) return;
  const all = occurrences.get(wordAt(place)), next = all[all.indexOf(place) + step];
  if (next !== undefined) pin(next);
}

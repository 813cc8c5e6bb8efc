// ---- the text: blocks of words, coloured where they are seen

let blocks = []; // { node, places, … }: a paragraph or a heading
let blockAt = new Int32Array(0); // by place: the number of its block; -1 = hidden markup
let spans = []; // by place: the word's element, made when its block comes near the window
let stamp = 0; // grows with every change of colours; a block remembers which it has

const JOINED = new Map([["@-@", "-"], ["@,@", ","], ["@.@", "."]]);

/** The places of an article, line by line. */
function linesOf({ words: length }) {
  const lines = [];
  let line = [];
  for (let place = 0; place < length; place++) {
    line.push(place);
    if (wordAt(place) === data.eos) { lines.push(line); line = []; }
  }
  if (line.length) lines.push(line);
  return lines;
}

/** The level of a heading line ` = = X = = `; 0 for any other line. */
function headingLevel(line) {
  if (spelled(wordAt(line[0])) !== "=") return 0;
  const text = line.map((place) => spelled(wordAt(place))).filter((word) => word !== "↵");
  if (text.length < 3) return 0;
  let level = 0;
  while (level < 6 && 2 * level + 2 < text.length && text[level] === "=" && text[text.length - 1 - level] === "=") level++;
  return level;
}

/** Whether a word of a line is markup that readers need not see. */
function isMarkup(place, line, level) {
  if (wordAt(place) === data.eos) return true;
  const at = place - line[0], ends = wordAt(line[line.length - 1]) === data.eos ? 1 : 0;
  return level > 0 && (at < level || at >= line.length - ends - level);
}

function layText() {
  const nodes = [];
  spans = new Array(article().words);
  blockAt = new Int32Array(article().words).fill(-1);
  blocks = [];
  watcher.disconnect();
  for (const line of linesOf(article())) {
    const level = headingLevel(line);
    const seen = view.markup ? line : line.filter((place) => !isMarkup(place, line, level));
    if (!seen.length) continue;
    const node = level
      ? make("div", { class: `heading level${level}`, role: "heading", "aria-level": Math.min(level + 1, 6), dir: "auto" })
      : make("p", { dir: "auto" });
    const block = { node, places: seen, line, level, stamp: -1, near: false };
    for (const place of seen) blockAt[place] = blocks.length;
    node.textContent = plainText(seen);
    node.block = block;
    blocks.push(block);
    nodes.push(node);
  }
  $("text").replaceChildren(...nodes);
  for (const block of blocks) watcher.observe(block.node);
  windowMoved();
  const missing = article().of - article().words;
  if (missing > 0) $("text").append(make("p", {}, `… cut here: ${count(missing)} further words of this article are not in this file.`));
  $("hidden-note").textContent = view.markup ? "" : "Not shown, though every loss counts: line ends, and the = of headings. Settings show them.";
}

/** What joins its neighbours in place of `@-@`, unless markup is shown. */
const jointOf = (word) => (view.markup ? undefined : JOINED.get(word));

/** Words with the spaces between them: [text, joint or not, space before it or not]. */
function* spacedWords(places) {
  let glued = true;
  for (const place of places) {
    const word = spelled(wordAt(place)), joint = jointOf(word);
    yield [place, joint ?? word, !glued && joint === undefined];
    glued = joint !== undefined;
  }
}

function plainText(places) {
  let text = "";
  for (const [, word, spaced] of spacedWords(places)) text += spaced ? " " + word : word;
  return text;
}

/** Give every word of a block an element of its own. */
function fillBlock(block) {
  const nodes = [];
  for (const [place, word, spaced] of spacedWords(block.places)) {
    const span = document.createElement("span");
    span.className = "w";
    if (view.markup && isMarkup(place, block.line, block.level)) span.classList.add("sign");
    if (wordAt(place) === data.eos) span.classList.add("end");
    span.textContent = word;
    span.place = place;
    spans[place] = span;
    if (spaced) nodes.push(" ");
    nodes.push(span);
  }
  block.node.replaceChildren(...nodes);
  for (const place of block.places) markPlace(place);
}

/** The element of a word on show. */
function spanAt(place) {
  if (!spans[place]) fillBlock(blocks[blockAt[place]]);
  return spans[place];
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.block.near = entry.isIntersecting;
    if (entry.isIntersecting) paintBlock(entry.target.block);
  }
}, { rootMargin: "100% 0%" });

function paintBlock(block) {
  if (block.stamp === stamp) return;
  block.stamp = stamp;
  for (const place of block.places) colourWord(spanAt(place), gainAt(place));
}

/** Colour what is near the screen now; the rest follows when it comes near. */
function paint() {
  stamp += 1;
  for (const block of blocks) if (block.near) paintBlock(block);
}

function paintAll() {
  for (const block of blocks) paintBlock(block);
}

// ---- places on the screen
const isShown = (place) => place >= 0 && place < blockAt.length && blockAt[place] >= 0;

/** The nearest place with a word on show, from `place` on in the direction of `step`; -1 = none. */
function nextShown(place, step) {
  let at = place;
  while (at >= 0 && at < blockAt.length && !isShown(at)) at += step;
  return isShown(at) ? at : -1;
}

/** The place on the next or previous line of the screen that is nearest to where `place` is. */
function onNextLine(place, step) {
  const box = spanAt(place).getBoundingClientRect();
  const centre = (box.left + box.right) / 2;
  let best = -1, nearest = Infinity, line = null;
  for (let at = nextShown(place + step, step); at >= 0; at = nextShown(at + step, step)) {
    const here = spanAt(at).getBoundingClientRect();
    if (Math.abs(here.top - box.top) < box.height / 2) continue;
    if (line !== null && Math.abs(here.top - line) > box.height / 2) break;
    line = line ?? here.top;
    const off = Math.abs((here.left + here.right) / 2 - centre);
    if (off < nearest) { nearest = off; best = at; }
  }
  return best;
}

let inWindow = null; // what `placesInWindow` found; null = text or window have moved since

function windowMoved() {
  inWindow = null;
}

/** The first and the last place that the window shows. Found once, because it waits for a layout. */
function placesInWindow() {
  return (inWindow ??= findInWindow());
}

function findInWindow() {
  const top = $("top").getBoundingClientRect().bottom, bottom = window.innerHeight;
  const first = firstBlock((box) => box.bottom > top), after = firstBlock((box) => box.top >= bottom);
  if (first >= blocks.length) return [blockAt.length - 1, blockAt.length - 1];
  const from = firstPlace(blocks[first], (box) => box.bottom > top);
  const last = blocks[Math.max(first, after - 1)];
  const to = firstPlace(last, (box) => box.top >= bottom);
  return [from ?? blocks[first].places[0], to ?? last.places[last.places.length - 1]];
}

function firstBlock(test) {
  let low = 0, high = blocks.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (test(blocks[middle].node.getBoundingClientRect())) high = middle; else low = middle + 1;
  }
  return low;
}

function firstPlace(block, test) {
  let low = 0, high = block.places.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (test(spanAt(block.places[middle]).getBoundingClientRect())) high = middle; else low = middle + 1;
  }
  return block.places[low];
}

// ---- search
let hits = []; // places of the first words of what was found
let isHit = new Set();

/** Words of the query must follow each other; the last may be the beginning of a word. */
function findHits() {
  const wanted = view.query.toLowerCase().split(/\s+/).filter(Boolean);
  const before = hits;
  hits = [];
  if ($("search").value !== view.query) $("search").value = view.query;
  if (wanted.length) {
    const lower = lowerVocabulary();
    const { start, words: length } = article();
    const found = rowsWith(wanted, lower, start, start + length);
    hits = found.map((row) => row - start).filter(isShown);
  }
  isHit = new Set(hits);
  for (const place of [...before, ...hits]) markPlace(place);
  drawMarks();
  showHits();
}

let lowered = null;
function lowerVocabulary() {
  lowered = lowered || data.vocabulary.map((word) => word.toLowerCase());
  return lowered;
}

function rowsWith(wanted, lower, from, to) {
  const last = wanted.length - 1, found = [];
  const fits = (row, i) => (i < last ? lower[words[row]] === wanted[i] : lower[words[row]].includes(wanted[i]));
  for (let row = from; row + last < to; row++) {
    if (fits(row, 0) && wanted.every((_, i) => i === 0 || fits(row + i, i))) found.push(row);
  }
  return found;
}

function showHits() {
  const at = hits.indexOf(view.pinned);
  $("hits").textContent = !view.query ? "" : !hits.length ? "none here" : at < 0 ? `${count(hits.length)} here` : `${count(at + 1)} of ${count(hits.length)}`;
}

/** Go to the next hit after the chosen word; past the last one, to the next article that has one. */
function nextHit(step) {
  const from = view.pinned, next = step > 0 ? hits.find((place) => place > from) : hits.findLast((place) => from < 0 || place < from);
  if (next !== undefined) { pin(next); return; }
  const wanted = view.query.toLowerCase().split(/\s+/).filter(Boolean), all = data.articles.length;
  for (let i = 1; i <= all && wanted.length; i++) {
    const other = (view.article + step * i + all * i) % all;
    const { start, words: length } = data.articles[other];
    const found = rowsWith(wanted, lowerVocabulary(), start, start + length);
    if (!found.length) continue;
    if (other !== view.article) show({ article: other, pinned: -1, over: -1 });
    if (hits.length) pin(step > 0 ? hits[0] : hits[hits.length - 1]);
    return;
  }
}

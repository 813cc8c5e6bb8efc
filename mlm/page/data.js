// ---- what the file holds: words, losses, and how to ask for them

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const BITS = Math.LOG2E; // bits in a nat

/** Numbers from base64, by the browser itself where it can. */
function unpack(text, Kind) {
  if (Uint8Array.fromBase64) return new Kind(Uint8Array.fromBase64(text).buffer);
  const signs = atob(text), bytes = new Uint8Array(signs.length);
  for (let i = 0; i < signs.length; i++) bytes[i] = signs.charCodeAt(i);
  return new Kind(bytes.buffer);
}

/** A rule whose losses are unpacked when they are first asked for. */
function unpackedLate(rule) {
  let losses = null;
  return { ...rule, get losses() { return (losses ??= unpack(rule.losses, Uint16Array)); } };
}

const words = unpack(data.words, Uint32Array); // numbers in data.vocabulary
const protocols = new Map(data.protocols.map((protocol) => [protocol.name, {
  pairs: protocol.pairs,
  rules: new Map(protocol.rules.map((rule) => [rule.name, unpackedLate(rule)])),
}]));
const PROTOCOL_MEANING = {
  article: "weights start anew at each article",
  stream: "one long text, nothing reset",
};

const evidence = data.top_k === null ? null : unpackEvidence(data.top_k);

function unpackEvidence(packed) {
  const lists = (of, Kind) => ({ width: of.width, values: unpack(of.values, Kind) });
  const times = ["before", "after"].map((time) => ({
    rank: unpack(packed["rank_" + time], Uint32Array),
    entropy: unpack(packed["entropy_" + time], Float32Array),
    best: lists(packed["best_" + time], Int32Array),
    probability: lists(packed["probability_" + time], Float32Array),
  }));
  const rows = unpack(packed.rows, Uint32Array);
  return {
    rule: packed.rule,
    protocol: packed.protocol,
    pieces: packed.pieces,
    place: new Map(Array.from(rows, (row, place) => [row, place])),
    own: lists(packed.own, Int32Array),
    times,
  };
}

/** The pieces and probabilities that row `place` of a rectangle holds. */
function listed(rectangle, place) {
  const from = place * rectangle.width;
  return Array.from(rectangle.values.subarray(from, from + rectangle.width));
}

/** Positions of every word of the article on show, by the word's number. */
let occurrences = new Map();

function countOccurrences() {
  occurrences = new Map();
  const { start, words: length } = article();
  for (let place = 0; place < length; place++) {
    const word = words[start + place], places = occurrences.get(word);
    if (places) places.push(place); else occurrences.set(word, [place]);
  }
}

const article = () => data.articles[view.article];
const wordAt = (place) => words[article().start + place];
const ruleNamed = (name) => protocols.get(view.protocol).rules.get(name);

/** Nats that a rule pays for the word at a place of the article. */
function lossAt(name, place) {
  return ruleNamed(name).losses[article().start + place] / data.scale;
}

/** The losses of the chosen pair. */
let mine = new Uint16Array(0), other = new Uint16Array(0);

function choosePair() {
  mine = ruleNamed(view.rule).losses;
  other = ruleNamed(view.against).losses;
  countSizes();
}

/** Nats that the chosen rule gains on the word at a place: positive = predicted better. */
function gainAt(place) {
  const row = data.articles[view.article].start + place;
  return (other[row] - mine[row]) / data.scale;
}

/** The same for every word of the article, in steps of 1 / data.scale nats. */
function gainSteps() {
  const { start, words: length } = article(), steps = new Int32Array(length);
  const high = other, low = mine; // local: read 300,000 times
  for (let place = 0; place < length; place++) steps[place] = high[start + place] - low[start + place];
  return steps;
}

/** Nats gained in all by a rule on some rows of the file. */
function gainOf(name, from, to) {
  const losses = ruleNamed(name).losses, against = other;
  let sum = 0;
  for (let row = from; row < to; row++) sum += against[row] - losses[row];
  return sum / data.scale;
}

// ---- numbers and words as readers write them
const MINUS = "−";
const fixed = (x, digits) => x.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", MINUS);
const signed = (x, digits = 2) => (Number(x.toFixed(digits)) > 0 ? "+" : "") + fixed(x, digits);
const grouped = new Intl.NumberFormat("en");
const count = (n) => grouped.format(n);
const inUnit = (nats) => (view.unit === "bits" ? nats * BITS : nats);
const amount = (nats, digits = 2) => fixed(inUnit(nats), digits);
const change = (nats, digits = 2) => signed(inUnit(nats), digits);

function spelled(word) {
  return word === data.eos ? "↵" : data.vocabulary[word];
}

function ordinal(n) {
  const tail = n % 100 > 10 && n % 100 < 14 ? 0 : n % 10;
  return n + (["th", "st", "nd", "rd"][tail] || "th");
}

/** How likely the rule finds a word, beside the other: “2.4 times more likely”. */
function timesLikely(gain) {
  if (Math.abs(gain) < 0.005) return "as likely";
  const times = Math.exp(Math.abs(gain));
  const shown = times < 10 ? times.toFixed(2) : times < 1e6 ? count(Math.round(times)) : times.toExponential(1);
  return `${shown} times ${gain > 0 ? "as" : "less"} likely`;
}

// ---- elements
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const SVG = "http://www.w3.org/2000/svg";
function makeSvg(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

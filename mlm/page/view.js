// ---- what is on show: one value, kept in the page's address

const view = {
  article: 0,
  protocol: data.protocols[0].name,
  rule: data.protocols[0].pairs[0][0],
  against: data.protocols[0].pairs[0][1],
  unit: "nats",
  range: null, // where colours end, in the unit; null = round(95th percentile)
  pinned: -1, // place of the word that was chosen; -1 = none
  over: -1, // place of the word under the pointer
  markup: false,
  spaces: false,
  table: false,
  theme: "auto",
  query: "",
};

const SHOWN_IN_ADDRESS = ["protocol", "rule", "against", "unit", "theme"];

function addressOf() {
  const parts = new URLSearchParams();
  parts.set("article", view.article + 1);
  if (view.pinned >= 0) parts.set("word", view.pinned + 1);
  for (const name of SHOWN_IN_ADDRESS) {
    if (!(name === "theme" && view.theme === "auto")) parts.set(name, view[name]);
  }
  if (view.range !== null) parts.set("range", view.range);
  for (const name of ["markup", "spaces", "table"]) if (view[name]) parts.set(name, "1");
  if (view.query) parts.set("search", view.query);
  return "#" + parts;
}

function keepAddress() {
  const address = addressOf();
  if (address === location.hash) return;
  try {
    history.replaceState(null, "", address);
  } catch { /* a frame without an address of its own (a notebook) */ }
}

/** A whole number from 1 to `most`, as a place from 0; otherwise null. */
function placeIn(text, most) {
  const number = Number(text);
  return Number.isInteger(number) && number >= 1 && number <= most ? number - 1 : null;
}

/** The view that an address asks for; what it does not know, or asks wrongly, stays as it is. */
function viewOf(address) {
  const parts = new URLSearchParams(address.replace(/^#/, ""));
  const asked = { ...view, pinned: -1, query: parts.get("search") || "" };
  asked.article = placeIn(parts.get("article"), data.articles.length) ?? view.article;
  asked.pinned = placeIn(parts.get("word"), data.articles[asked.article].words) ?? -1;
  if (protocols.has(parts.get("protocol"))) asked.protocol = parts.get("protocol");
  const { pairs, rules } = protocols.get(asked.protocol);
  for (const [place, name] of ["rule", "against"].entries()) {
    if (rules.has(parts.get(name))) asked[name] = parts.get(name);
    else if (!rules.has(asked[name])) asked[name] = pairs[0][place];
  }
  if (["nats", "bits"].includes(parts.get("unit"))) asked.unit = parts.get("unit");
  if (["auto", "light", "dark"].includes(parts.get("theme"))) asked.theme = parts.get("theme");
  const range = Number(parts.get("range"));
  asked.range = range > 0 && Number.isFinite(range) ? range : null;
  for (const name of ["markup", "spaces", "table"]) asked[name] = parts.get(name) === "1";
  return asked;
}

/** Show something else: only the parts that depend on what has changed are drawn again, or all. */
function show(changes, all = false) {
  const before = { ...view };
  Object.assign(view, changes);
  const changed = (...names) => all || names.some((name) => view[name] !== before[name]);
  if (changed("article")) countOccurrences();
  if (changed("theme")) setTheme();
  if (changed("article", "markup")) layText();
  if (changed("protocol", "rule", "against")) choosePair();
  if (changed("protocol", "rule", "against", "unit", "range")) setLimit();
  if (changed("article", "markup", "protocol", "rule", "against", "unit", "range")) paint();
  if (changed("article", "query", "markup")) findHits();
  if (changed("spaces")) $("text").classList.toggle("spaces", view.spaces);
  if (changed("table", "article", "protocol", "rule", "against", "unit", "markup")) showTable();
  if (changed("article", "markup", "protocol", "rule", "against")) findExtremes();
  if (changed("article", "protocol", "rule", "against", "unit", "markup", "range", "theme")) {
    showControls();
    drawPanel();
    drawStrip();
  }
  if (changed("article", "pinned", "over", "protocol", "rule", "against", "unit", "markup")) showWord();
  if (changed("article") && view.pinned < 0) { window.scrollTo(0, 0); windowMoved(); }
  if (changed("article", "pinned", "protocol", "rule", "against", "unit", "markup", "table", "theme")) drawPlace();
  keepAddress();
}

function setTheme() {
  const dark = view.theme === "dark" || (view.theme === "auto" && systemDark.matches);
  document.documentElement.toggleAttribute("data-dark", dark);
}
const systemDark = window.matchMedia("(prefers-color-scheme: dark)");

// ---- the controls above the text
function fill(select, entries, value) {
  select.replaceChildren(...entries.map(([name, label, title]) => {
    const option = make("option", { value: name }, label);
    if (title) option.title = title;
    return option;
  }));
  select.value = value;
}

/** A row of buttons of which one is pressed. */
function fillButtons(node, entries, chosen, choose) {
  node.replaceChildren(...entries.map(([name, label, title]) => {
    const button = make("button", { type: "button", "aria-pressed": String(name === chosen), title: title || label }, label);
    button.dataset.name = name;
    button.addEventListener("click", () => choose(name));
    return button;
  }));
}

function showControls() {
  const { pairs, rules } = protocols.get(view.protocol);
  const entries = [...rules.values()].map((rule) => [rule.name, rule.label, rule.about]);
  fill($("rule"), entries, view.rule);
  fill($("against"), entries, view.against);
  const names = [...protocols.keys()].map((name) => [name, name, PROTOCOL_MEANING[name]]);
  fillButtons($("protocols"), names, view.protocol, chooseProtocol);
  const openings = pairs.map(([rule, against]) => [
    `${rule} ${against}`, `vs ${rules.get(against).label.replace(" dynamic evaluation", "")}`,
    `${rules.get(rule).label} against ${rules.get(against).label}`,
  ]);
  fillButtons($("openings"), openings, `${view.rule} ${view.against}`, (pair) => {
    const [rule, against] = pair.split(" ");
    show({ rule, against });
  });
  $("article").value = String(view.article);
  $("previous-article").disabled = view.article === 0;
  $("next-article").disabled = view.article === data.articles.length - 1;
  for (const name of ["unit", "theme"]) $(name).value = view[name];
  for (const name of ["markup", "spaces"]) $(name).checked = view[name];
  $("table-view").setAttribute("aria-pressed", String(view.table));
  showMeaning();
  showNotices();
}

function chooseProtocol(protocol) {
  const { pairs, rules } = protocols.get(protocol);
  const kept = rules.has(view.rule) && rules.has(view.against);
  show({ protocol, rule: kept ? view.rule : pairs[0][0], against: kept ? view.against : pairs[0][1] });
  for (const button of $("protocols").children) if (button.dataset.name === protocol) button.focus();
}

/** What the chosen rules and the protocol are, where their names stand. */
function showMeaning() {
  const parts = [...new Set([view.rule, view.against])].map(ruleNamed).filter((rule) => rule.about);
  $("about").replaceChildren(...parts.map((rule) => make("span", {}, make("b", {}, rule.label), `: ${rule.about}`)));
  $("protocol-about").textContent = PROTOCOL_MEANING[view.protocol] || "";
}

function showNotices() {
  const left = data.all_words - words.length;
  $("left-out").hidden = left === 0;
  $("left-out").textContent = `${count(left)} of ${count(data.all_words)} words are not in this file, which holds the first ${count(words.length)}: ${count(data.articles.length)} of ${count(data.all_articles)} articles here, the last one possibly cut. Draw it with --page-words ${data.all_words} to have them all.`;
  const same = view.rule === view.against;
  $("same").hidden = !same;
  $("same").textContent = same ? `The rule is compared with itself (${ruleNamed(view.rule).label}), so nothing is gained or lost anywhere. Choose two different rules.` : "";
}

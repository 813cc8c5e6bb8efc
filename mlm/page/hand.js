// ---- the hand: pointer, keys, controls; and the first drawing

function onPointer() {
  const text = $("text");
  text.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return;
    const place = event.target.place;
    if (place !== undefined && place !== view.over) show({ over: place });
  });
  text.addEventListener("pointerleave", () => { if (view.over >= 0) show({ over: -1 }); });
  text.addEventListener("click", (event) => {
    if (event.target.place === undefined || !window.getSelection().isCollapsed) return;
    pin(event.target.place);
  });
}

// ---- keys
const LETTERS = {
  n: () => stepOccurrence(1),
  p: () => stepOccurrence(-1),
  g: () => stepExtreme("gain", 1),
  G: () => stepExtreme("loss", 1),
  "/": () => openSearch(),
};

function openSearch() {
  if (isPhone()) openSettings(true);
  $("search").focus();
  $("search").select();
}

/** Whether a key belongs to the control that has the focus. */
function isTyping(node) {
  return node.matches("input, select, textarea");
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (event.key === "Escape") { escape(event.target); return; }
  if (isTyping(event.target)) return;
  if (event.key in LETTERS && $("shortcuts").checked) {
    event.preventDefault();
    LETTERS[event.key]();
    return;
  }
  if (event.key.startsWith("Arrow") && !view.table) onArrow(event);
}

/** Arrows move the chosen word; without one they scroll, unless the text has the focus. */
function onArrow(event) {
  const inText = $("text").contains(event.target);
  if (!inText && (view.pinned < 0 || event.target.closest("#panel, #top"))) return;
  event.preventDefault();
  if (!isShown(view.pinned)) { windowMoved(); pin(nextShown(placesInWindow()[0], 1)); return; }
  const step = event.key === "ArrowRight" || event.key === "ArrowDown" ? 1 : -1;
  const across = event.key === "ArrowRight" || event.key === "ArrowLeft";
  pin(across ? nextShown(view.pinned + step, step) : onNextLine(view.pinned, step));
}

/** Let go of one thing: the open sheet, the settings, the search, the word. */
function escape(target) {
  if (target === $("search") && view.query) { show({ query: "" }); return; }
  if (target === $("search")) { $("text").focus({ preventScroll: true }); return; }
  if ($("panel").classList.contains("up") && isPhone()) { openSheet(false); return; }
  if (view.pinned >= 0) { unpin(); return; }
  if (!$("settings").hidden) { openSettings(false); $("settings-button").focus(); }
}

// ---- controls
function openSettings(open) {
  $("settings").hidden = !open;
  document.body.classList.toggle("open", open);
  $("settings-button").setAttribute("aria-expanded", String(open));
}

function openSheet(open) {
  $("panel").classList.toggle("up", open);
  $("sheet").setAttribute("aria-expanded", String(open));
  if (open && isShown(view.pinned)) bringIntoSight(view.pinned);
}

function onControls() {
  const on = (id, event, act) => $(id).addEventListener(event, act);
  on("article", "change", () => openArticle(Number($("article").value)));
  on("previous-article", "click", () => openArticle(view.article - 1));
  on("next-article", "click", () => openArticle(view.article + 1));
  for (const name of ["rule", "against", "theme"]) on(name, "change", () => show({ [name]: $(name).value }));
  on("unit", "change", () => show({ unit: $("unit").value, range: null }));
  for (const name of ["markup", "spaces"]) on(name, "change", () => show({ [name]: $(name).checked }));
  on("limit", "input", () => show({ range: $("limit").steps[Number($("limit").value)] }));
  on("search", "input", () => show({ query: $("search").value.trim() }));
  on("search", "keydown", (event) => {
    if (event.key === "Enter") { event.preventDefault(); nextHit(event.shiftKey ? -1 : 1); }
  });
  on("controls", "submit", (event) => event.preventDefault());
  on("settings-button", "click", () => openSettings($("settings").hidden));
  on("sheet", "click", () => openSheet(!$("panel").classList.contains("up")));
  on("table-view", "click", () => { tablePage = Math.floor(Math.max(view.pinned, 0) / TABLE_ROWS); show({ table: !view.table }); showControls(); });
  on("copy", "click", copyTsv);
  on("save-png", "click", savePng);
  on("save-svg", "click", saveSvg);
  for (const [kind, name] of [["gain", "gain"], ["loss", "loss"]]) {
    on(`previous-${name}`, "click", () => stepExtreme(kind, -1));
    on(`next-${name}`, "click", () => stepExtreme(kind, 1));
  }
  makeSlider($("strip"), shareOfStrip);
  makeSlider($("curve"), shareOfCurve);
}

/** The panel stays below the header, however high that is. */
function measure() {
  document.documentElement.style.setProperty("--head", $("top").offsetHeight + "px");
  onScroll();
}

let waiting = false;
function onScroll() {
  windowMoved();
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; drawPlace(); });
}

function onWindow() {
  document.addEventListener("keydown", onKey);
  window.addEventListener("scroll", onScroll, { passive: true });
  window.addEventListener("resize", onScroll);
  new ResizeObserver(measure).observe($("top"));
  window.addEventListener("hashchange", () => { if (location.hash !== addressOf()) { show(viewOf(location.hash)); showControls(); if (view.pinned >= 0) pin(view.pinned); } });
  window.addEventListener("beforeprint", paintAll);
  systemDark.addEventListener("change", () => { setTheme(); drawStrip(); });
}

/** The first drawing: everything changes from nothing. */
function begin() {
  makeShades();
  fill($("article"), data.articles.map((a, i) => [String(i), `${a.letter}. ${a.title} (${count(a.of)} words)`]), "0");
  onPointer();
  onControls();
  onWindow();
  const first = viewOf(location.hash);
  show({ ...first, pinned: -1 }, true);
  if (first.pinned >= 0) pin(first.pinned);
}
begin();

// ---- taking something along: words as TSV, the view as PNG and SVG

function tell(text) {
  $("done").textContent = text;
}

/** Places of the words that are selected; all of the article where none is. */
function selectedPlaces() {
  const chosen = window.getSelection(), all = [];
  if (chosen.rangeCount && !chosen.isCollapsed) {
    const range = chosen.getRangeAt(0);
    for (const block of blocks) {
      if (!range.intersectsNode(block.node)) continue;
      all.push(...block.places.filter((place) => range.intersectsNode(spanAt(place))));
    }
  }
  return all.length ? all : Array.from({ length: article().words }, (_, place) => place);
}

function tsvOf(places) {
  const names = [...new Set([view.rule, view.against])];
  const escape = (text) => text.replace(/[\\\t\n\r]/g, (c) => ({ "\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r" })[c]);
  const head = ["article", "place", "word", ...names.map((name) => `${name} (${view.unit})`), `gain (${view.unit})`];
  const plain = (nats) => String(Number(inUnit(nats).toFixed(4)));
  const rows = places.map((place) => [
    escape(article().title), place + 1, escape(wordAt(place) === data.eos ? "<eos>" : data.vocabulary[wordAt(place)]),
    ...names.map((name) => plain(lossAt(name, place))), plain(gainAt(place)),
  ]);
  return [head, ...rows].map((row) => row.join("\t") + "\n").join("");
}

/** Copy through the copy event: it needs no permission, and works in a file. */
function copyTsv() {
  const places = selectedPlaces(), text = tsvOf(places);
  const put = (event) => { event.clipboardData.setData("text/plain", text); event.preventDefault(); };
  document.addEventListener("copy", put, { once: true });
  const copied = document.execCommand("copy");
  document.removeEventListener("copy", put);
  tell(copied ? `${count(places.length)} words copied` : "the browser does not let this page copy");
}

function download(blob, ending) {
  const link = make("a", { href: URL.createObjectURL(blob), download: `words-${article().letter}-${view.rule}-${view.against}.${ending}` });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  tell(`saved ${link.download}`);
}

/** What the window shows of the text, as rectangles, lines and words to draw. */
function sceneOf() {
  windowMoved();
  const [from, to] = placesInWindow(), frame = $("text").getBoundingClientRect();
  const top = spanAt(from).getBoundingClientRect().top, shapes = [], dark = isDark();
  const head = 58, pad = 24, ink = dark ? "#e9eaee" : "#1b1c1f", word = dark ? "#ffffff" : "#000000";
  let height = 0;
  for (let place = from; place <= to; place++) {
    if (!isShown(place)) continue;
    const node = spanAt(place), style = getComputedStyle(node), size = parseFloat(style.fontSize), gain = gainAt(place);
    for (const box of Array.from(node.getClientRects()).slice(0, 1)) {
      const x = pad + box.left - frame.left, y = head + box.top - top;
      shapes.push({ kind: "box", x, y, width: box.width, height: box.height, fill: `rgb(${colourOf(gain, limit, dark)})` });
      shapes.push({ kind: "text", x: x + size * 0.14, y: y + box.height * 0.74, text: node.textContent, size, bold: style.fontWeight >= 600, fill: word });
      if (gain >= limit * data.underlined) shapes.push({ kind: "box", x: x + 1, y: y + box.height * 0.9, width: box.width - 2, height: 1.5, fill: word });
      height = Math.max(height, y + box.height);
    }
  }
  const title = `${article().letter}. ${article().title} · ${ruleNamed(view.rule).label} against ${ruleNamed(view.against).label}, protocol ${view.protocol}`;
  shapes.push({ kind: "text", x: pad, y: 30, text: title, size: 13, bold: true, fill: ink });
  addLegend(shapes, pad, height + 22, dark, ink);
  return { width: frame.width + 2 * pad, height: height + 62, paper: dark ? "#16171a" : "#ffffff", shapes };
}

function addLegend(shapes, left, top, dark, ink) {
  const width = 240, steps = 60;
  for (let i = 0; i < steps; i++) {
    const gain = limit * (2 * (i + 0.5) / steps - 1);
    shapes.push({ kind: "box", x: left + width * i / steps, y: top, width: width / steps + 0.3, height: 9, fill: `rgb(${colourOf(gain, limit, dark)})` });
  }
  const end = Number(inUnit(limit).toPrecision(3));
  const label = (x, text) => shapes.push({ kind: "text", x, y: top + 23, text, size: 11, fill: ink });
  label(left, `${MINUS}${end}`);
  label(left + width / 2 - 3, "0");
  label(left + width - 16, `+${end}`);
  label(left + width + 16, `${view.unit} gained per word; underlined: from ${fixed(end * data.underlined, 2)}`);
}

const FONT = 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';

function svgOf(scene) {
  const svg = makeSvg("svg", { xmlns: SVG, width: scene.width, height: scene.height, viewBox: `0 0 ${scene.width} ${scene.height}`, "font-family": FONT });
  svg.append(makeSvg("rect", { width: scene.width, height: scene.height, fill: scene.paper }));
  for (const shape of scene.shapes) {
    if (shape.kind === "box") {
      svg.append(makeSvg("rect", { x: shape.x.toFixed(1), y: shape.y.toFixed(1), width: shape.width.toFixed(1), height: shape.height.toFixed(1), fill: shape.fill, rx: shape.height > 12 ? 3 : 0 }));
    } else {
      svg.append(makeSvg("text", { x: shape.x.toFixed(1), y: shape.y.toFixed(1), "font-size": shape.size, "font-weight": shape.bold ? 700 : 400, fill: shape.fill }, shape.text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, "□")));
    }
  }
  return new XMLSerializer().serializeToString(svg);
}

function saveSvg() {
  download(new Blob([svgOf(sceneOf())], { type: "image/svg+xml" }), "svg");
}

function savePng() {
  const scene = sceneOf(), canvas = document.createElement("canvas"), zoom = 2;
  canvas.width = Math.ceil(scene.width * zoom);
  canvas.height = Math.ceil(scene.height * zoom);
  const pen = canvas.getContext("2d");
  pen.scale(zoom, zoom);
  pen.fillStyle = scene.paper;
  pen.fillRect(0, 0, scene.width, scene.height);
  for (const shape of scene.shapes) {
    pen.fillStyle = shape.fill;
    if (shape.kind === "box") { pen.fillRect(shape.x, shape.y, shape.width, shape.height); continue; }
    pen.font = `${shape.bold ? 700 : 400} ${shape.size}px ${FONT}`;
    pen.fillText(shape.text, shape.x, shape.y);
  }
  canvas.toBlob((blob) => download(blob, "png"));
}

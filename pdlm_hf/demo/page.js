// Of the board: tools, marks, live captions, what is under the pointer. gradio gives element, trigger, props and watch.
const find = name => element.querySelector(name);
const stage = find(".stage"), image = find(".image"), pen = find(".pen"), tip = find(".tip"), bubbles = find(".bubbles");
const out = name => document.querySelector("#captions " + name);
const CROWDED = 12, NARROW = 480; // regions, pixels; beyond these only the list has captions
const THIN = 60; // pixels; an image's shorter side is shown no smaller, and scrolls
let tool = "box", view = null, labels = null, said = null, timer = null, stroke = null;

const act = (kind, more) => trigger('act', { kind, ...more });
const guide = () => {
  const count = view.regions.length, more = props.everything ? ", or find everything" : "";
  return count ? `${count} region${count === 1 ? "" : "s"}. Press to describe.` : `Mark regions with a box or the brush${more}.`;
};
function status(text) { if (out(".status")) out(".status").textContent = text; }

// ---------------------------------------------------------------- files

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ name: file.name, data: reader.result.split(",")[1] || "" });
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
async function upload(kind, files) {
  files = [...files];
  if (!files.length) return;
  if (files.reduce((sum, file) => sum + file.size, 0) > props.most) {
    status(`Too large: at most ${Math.floor(props.most / 2 ** 20)} MB at a time.`);
    return;
  }
  const sent = await Promise.all(files.map(read));
  act(kind, kind === "image" ? sent[0] : { files: sent });
}
for (const kind of ["image", "masks"]) {
  const input = find(kind === "image" ? ".image-file" : ".mask-file");
  input.addEventListener("change", () => { upload(kind, input.files); input.value = ""; });
  find(`[data-do=${kind}]`).addEventListener("click", () => input.click());
}
find(".drop").addEventListener("click", () => find(".image-file").click());
element.addEventListener("dragover", event => { event.preventDefault(); stage.classList.add("over"); });
element.addEventListener("dragleave", () => stage.classList.remove("over"));
element.addEventListener("drop", event => {
  event.preventDefault();
  stage.classList.remove("over");
  const files = [...event.dataTransfer.files];
  const masks = (view && files.length > 1) || files.every(file => /\.(json|txt)$/i.test(file.name));
  upload(masks ? "masks" : "image", files);
});
watch("file", () => {
  const file = props.file;
  if (!file) return;
  const bytes = Uint8Array.from(atob(file.data), letter => letter.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], { type: file.kind }));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

// ---------------------------------------------------------------- marks

function choose(name) {
  tool = name;
  for (const button of element.querySelectorAll("[data-tool]")) button.classList.toggle("on", button.dataset.tool === name);
  find(".brush-size").style.visibility = name === "brush" ? "visible" : "hidden";
}
for (const button of element.querySelectorAll("[data-tool]")) button.addEventListener("click", () => choose(button.dataset.tool));
find("[data-tool=click]").hidden = !props.clicks;
find("[data-do=everything]").hidden = !props.everything;
find("[data-do=everything]").addEventListener("click", () => {
  status(view ? "Looking for regions" : "Drop an image first, or take one of the examples.");
  if (view) act("everything");
});
window.addEventListener("pdlm-refused", () => view && status(guide()));
for (const kind of ["undo", "clear"]) find(`[data-do=${kind}]`).addEventListener("click", () => act(kind));

const place = event => {
  const frame = pen.getBoundingClientRect();
  const within = value => Math.min(1, Math.max(0, value));
  return [within((event.clientX - frame.left) / frame.width), within((event.clientY - frame.top) / frame.height)];
};
const radius = () => find(".brush-size").value / 1000;
function sketch() {
  pen.width = pen.clientWidth;
  pen.height = pen.clientHeight;
  if (!stroke) return;
  const ink = pen.getContext("2d"), at = ([x, y]) => [x * pen.width, y * pen.height];
  ink.strokeStyle = tool === "box" ? "#2563eb" : "rgba(37, 99, 235, .55)";
  if (tool === "box") {
    const [x0, y0] = at(stroke[0]), [x1, y1] = at(stroke[stroke.length - 1]);
    ink.lineWidth = 2;
    ink.strokeRect(x0, y0, x1 - x0, y1 - y0);
  } else {
    ink.lineWidth = 2 * radius() * pen.width;
    ink.lineCap = ink.lineJoin = "round";
    ink.beginPath();
    ink.moveTo(...at(stroke[0]));
    for (const point of stroke) ink.lineTo(...at(point));
    ink.stroke();
  }
}
pen.addEventListener("pointerdown", event => {
  if (!view || event.button !== 0) return;
  event.preventDefault();
  if (tool === "click") return act("click", { point: place(event) });
  try { pen.setPointerCapture(event.pointerId); } catch (error) { /* the pointer is gone already */ }
  stroke = [place(event)];
  hover(null);
});
pen.addEventListener("pointermove", event => {
  if (!stroke) return hover(event);
  stroke.push(place(event));
  sketch();
});
pen.addEventListener("pointerup", () => {
  if (!stroke) return;
  const [first, last] = [stroke[0], stroke[stroke.length - 1]];
  const wide = Math.abs(first[0] - last[0]) * pen.clientWidth, high = Math.abs(first[1] - last[1]) * pen.clientHeight;
  if (tool === "brush") act("brush", { points: stroke, radius: radius() });
  else if (wide > 3 && high > 3) act("box", { box: [...first, ...last] });
  stroke = null;
  sketch();
});
pen.addEventListener("pointercancel", () => { stroke = null; sketch(); });
pen.addEventListener("pointerleave", () => hover(null));

// ---------------------------------------------------------------- what is shown

function badge(k) {
  const node = document.createElement("b");
  node.textContent = k + 1;
  node.style.background = view.regions[k].colour;
  node.style.color = view.regions[k].ink;
  return node;
}
function make(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}
function hover(event, k = -1) {
  if (event && labels) {
    const [x, y] = place(event), column = Math.min(labels.width - 1, Math.floor(x * labels.width));
    k = labels.data[4 * (Math.min(labels.height - 1, Math.floor(y * labels.height)) * labels.width + column)] - 1;
    tip.style.left = `${100 * x}%`;
    tip.style.top = `${100 * y}%`;
    tip.classList.toggle("left", x > 0.5);
  }
  const known = view && k >= 0 && k < view.regions.length;
  tip.style.display = known && event ? "block" : "none";
  if (known && event) {
    const texts = said ? said.texts[k] : "not described yet";
    const score = said && said.scores ? `score ${said.scores[k].toFixed(2)}` : "";
    tip.replaceChildren(badge(k), make("span", texts), make("small", score));
  }
  const rows = out(".rows") ? out(".rows").children : [];
  for (let n = 0; n < rows.length; n++) rows[n].classList.toggle("on", n === k);
  for (let n = 0; n < bubbles.children.length; n++) bubbles.children[n].classList.toggle("on", n === k);
}
function show(texts) {
  bubbles.replaceChildren();
  const rows = view.regions.map((region, k) => {
    const row = document.createElement("li"), text = texts ? texts[k] || "" : "";
    row.append(badge(k), make("span", text));
    if (said && said.scores) {
      const score = make("small", said.scores[k].toFixed(2));
      score.title = "mean probability of the caption's words";
      row.append(score);
    }
    const remove = make("button", "\u00d7");
    remove.type = "button";
    remove.className = "delete";
    remove.title = remove.ariaLabel = `Delete region ${k + 1}`;
    remove.addEventListener("click", () => act("delete", { id: region.id }));
    row.append(remove);
    row.addEventListener("pointerenter", () => hover(null, k));
    row.addEventListener("pointerleave", () => hover(null));
    if (text && view.regions.length <= CROWDED && stage.clientWidth >= NARROW) {
      const bubble = make("div", text), [x, y, w, h] = region.box;
      const margin = Math.min(0.16, 155 / stage.clientWidth); // half of what page.css allows, and a little
      bubble.style.left = `${100 * Math.min(1 - margin, Math.max(margin, x + w / 2))}%`;
      bubble.style.top = `${100 * Math.min(0.94, y + h)}%`;
      bubble.style.borderColor = region.colour;
      bubbles.append(bubble);
    }
    return row;
  });
  out(".rows").replaceChildren(...rows);
  spread([...bubbles.children]);
}
function spread(boxes) { // within the image, and beside each other where they would overlap
  const frame = bubbles.getBoundingClientRect(), taken = [];
  for (const box of boxes.sort((a, b) => a.offsetTop - b.offsetTop)) {
    let shift = Math.min(0, frame.bottom - box.getBoundingClientRect().bottom);
    for (let tries = 0; tries < 20; tries++) {
      box.style.marginTop = `${shift}px`;
      const own = box.getBoundingClientRect();
      const other = taken.find(t => own.left < t.right && t.left < own.right && own.top < t.bottom && t.top < own.bottom);
      if (!other) break;
      const down = other.bottom - own.top + 2;
      shift += own.bottom + down > frame.bottom ? other.top - own.bottom - 2 : down;
    }
    taken.push(box.getBoundingClientRect());
  }
}
function replay(k) {
  const steps = [...said.drafts, said.texts], input = out(".replay input");
  input.max = said.drafts.length;
  input.value = k;
  out(".replay span").textContent = k < said.drafts.length ? `step ${k + 1} of ${said.drafts.length}` : "result";
  show(steps[k]);
}
function stop() { clearInterval(timer); timer = null; }
function wire() { // list and button may come later than the board
  const button = document.querySelector("#describe");
  if (!out(".replay") || !button) return setTimeout(wire, 50);
  button.addEventListener("click", () => view && view.regions.length && status("Waiting for the model"));
  window.addEventListener("pdlm-failed", () => view && status("No captions. Press to try again."));
  out(".replay input").addEventListener("input", event => { stop(); replay(Number(event.target.value)); });
  out(".replay button").addEventListener("click", () => {
    stop();
    let k = 0;
    replay(0);
    timer = setInterval(() => { replay(++k); if (k >= said.drafts.length) stop(); }, 180);
  });
}
watch("captions", () => {
  const news = props.captions;
  if (!view || !news || news.version !== view.version) return;
  stop();
  said = news;
  const end = Boolean(news.scores), count = news.texts.length;
  out(".replay").style.display = end && news.drafts.length ? "flex" : "none";
  element.dataset.step = end ? "end" : news.step;
  if (end) {
    const passes = news.passes === null ? "" : ` in ${news.passes} forward pass${news.passes === 1 ? "" : "es"}`;
    status(`${count} caption${count === 1 ? "" : "s"}${passes}, ${news.seconds.toFixed(2)} s`);
    replay(news.drafts.length);
  } else {
    status(`Writing ${count === 1 ? "the caption" : `all ${count} captions`}: step ${news.step}`);
    show(news.texts);
  }
});
watch("value", async () => {
  stop();
  view = props.value;
  said = labels = null;
  stage.classList.toggle("empty", !view);
  out(".replay").style.display = "none";
  find("[data-do=undo]").disabled = !view || !view.undo;
  if (!view) return;
  element.dataset.version = view.version;
  delete element.dataset.step;
  image.src = view.image;
  stage.style.aspectRatio = `${view.size[0]} / ${view.size[1]}`;
  stage.style.maxWidth = `calc(74vh * ${view.size[0] / view.size[1]})`;
  stage.style.minWidth = `${THIN * Math.max(1, view.size[0] / view.size[1])}px`;
  status(guide());
  show(null);
  const version = view.version, map = new Image();
  map.src = view.labels;
  await map.decode();
  const canvas = new OffscreenCanvas(map.width, map.height), ink = canvas.getContext("2d");
  ink.drawImage(map, 0, 0);
  if (view && view.version === version) labels = ink.getImageData(0, 0, map.width, map.height);
});

for (const [number, url] of props.examples.entries()) {
  const button = document.createElement("button"), thumbnail = document.createElement("img");
  button.type = "button";
  thumbnail.src = url;
  thumbnail.alt = `example ${number + 1}`;
  button.append(thumbnail);
  button.addEventListener("click", () => act("example", { number }));
  find(".examples").append(button);
}
choose("box");
wire();

// The board: the image with its regions, what is done to it, and what is said about it. gradio gives element, props
// and watch, and sends what `send` gets; the other modules get `board`, which holds what they share.
import { wireFiles } from "./files.js";
import { wireKeys, showSpots } from "./keys.js";
import { Labels } from "./labels.js";
import { List, make } from "./list.js";
import { wireMarks } from "./marks.js";

const THIN = 60; // pixels; an image's shorter side is shown no smaller, and scrolls
const PATIENCE = 2000; // milliseconds, after which no answer is waited for

// Sends one action at a time, so that each finds what the one before it has changed. Returns the function to act with.
function inOrder(send) {
  const waiting = [];
  let timer = null; // runs while an answer is awaited
  function next() {
    clearTimeout(timer);
    timer = waiting.length ? setTimeout(next, PATIENCE) : null;
    if (timer) send(waiting.shift());
  }
  for (const event of ["pdlm-answered", "pdlm-refused"]) window.addEventListener(event, next);
  return (kind, more) => {
    const action = { kind, ...more }, last = waiting.at(-1);
    if (kind === "nudge" && last?.kind === kind && last.id === action.id && last.resize === action.resize) {
      last.right += action.right;
      last.down += action.down;
    } else waiting.push(action);
    if (!timer) next();
  };
}

export function start(element, send, props, watch) {
  const find = name => element.querySelector(name);
  const list = document.querySelector("#captions .replay");
  if (!list || !document.querySelector("#describe")) { // they may come later than the board
    return setTimeout(start, 50, element, send, props, watch);
  }
  const board = {
    element, props, watch, find,
    view: null, // what the server shows: image, size, regions
    said: null, // captions or drafts of its regions
    labels: null, // pixels with the number of their region
    act: inOrder(send),
    guide() {
      const count = board.view.regions.length, more = props.everything ? ", or find everything" : "";
      if (!count) return `Mark regions with a box or the brush${more}.`;
      return `${count} region${count === 1 ? "" : "s"}. Press to describe.`;
    },
    // The number of the region under the pointer or in focus; -1 for none.
    point(k, quiet) {
      board.list.mark(k);
      board.marks.point(k, quiet);
    },
  };
  board.list = new List(board);
  board.marks = new Labels(board);
  board.status = (text, step) => board.list.status(text, step);
  wireFiles(board);
  wireMarks(board);
  wireKeys(board);
  wireActions(board);
  watch("captions", () => said(board));
  watch("value", () => viewed(board));
  showExamples(board);
  enable(board);
}

function wireActions(board) {
  for (const kind of ["undo", "clear"]) {
    board.find(`[data-do=${kind}]`).addEventListener("click", () => board.act(kind));
  }
  const everything = board.find("[data-do=everything]");
  everything.hidden = !board.props.everything;
  everything.addEventListener("click", () => {
    board.status("Looking for regions");
    board.act("everything");
  });
  board.find("[data-tool=click]").hidden = !board.props.clicks;
  window.addEventListener("pdlm-refused", () => board.view && board.status(board.guide()));
  window.addEventListener("pdlm-failed", () => board.view && board.status("No captions. Press to try again."));
  document.querySelector("#describe").addEventListener("click", () => board.status("Waiting for the model"));
  const compared = document.querySelector("#compare");
  document.querySelector("#compare-button").addEventListener("click", () => {
    const shown = new MutationObserver(() => { // what appears below the image is brought into view
      if (!compared.querySelector(".lanes")) return;
      shown.disconnect();
      compared.scrollIntoView({ block: "nearest" });
    });
    shown.observe(compared, { childList: true, subtree: true });
  });
}

function showExamples(board) {
  for (const [number, url] of board.props.examples.entries()) {
    const button = make("button", ""), thumbnail = make("img", "");
    button.type = "button";
    thumbnail.src = url;
    thumbnail.alt = `Example ${number + 1}`;
    button.append(thumbnail);
    button.addEventListener("click", () => board.act("example", { number }));
    board.find(".examples").append(button);
  }
}

// What can be pressed: nothing without an image, no description without regions, no file without captions.
function enable(board) {
  const { view, said } = board, marked = Boolean(view && view.regions.length);
  const on = {
    "[data-tool]": view, "[data-do=masks]": view, "[data-do=everything]": view, "[data-do=undo]": view && view.undo,
    "[data-do=clear]": marked, "#describe": marked, "#compare-button": marked, "#read-attributes": marked,
    "#save-coco": said && said.scores, "#save-image": said && said.scores, "#save-csv": marked,
  };
  for (const [name, value] of Object.entries(on)) {
    for (const button of document.querySelectorAll(name)) button.disabled = !value;
  }
}

function said(board) {
  const news = board.props.captions;
  if (!board.view || !news || news.version !== board.view.version) return;
  board.list.stop();
  board.said = news;
  const end = Boolean(news.scores), count = news.texts.length;
  board.element.dataset.step = end ? "end" : news.step;
  if (end) {
    const passes = news.passes === null ? "" : ` in ${news.passes} forward pass${news.passes === 1 ? "" : "es"}`;
    board.status(`${count} caption${count === 1 ? "" : "s"}${passes}, ${news.seconds.toFixed(2)} s`);
    board.list.replay(news.drafts.length);
    showSpots(board);
  } else {
    board.status(`Writing ${count === 1 ? "the caption" : `all ${count} captions`}`, `step ${news.step}`);
    board.show(news.texts);
  }
  enable(board);
}

async function viewed(board) {
  const { element, find, list } = board, view = board.props.value, stage = find(".stage");
  list.stop();
  board.view = view;
  board.said = board.labels = null;
  stage.classList.toggle("empty", !view);
  list.reset();
  enable(board);
  if (!view) return;
  element.dataset.version = view.version;
  delete element.dataset.step;
  const image = find(".image");
  image.src = view.image;
  image.alt = `The image with ${view.regions.length} outlined regions`;
  const [width, height] = view.size;
  stage.style.aspectRatio = `${width} / ${height}`;
  stage.style.maxWidth = `calc(62vh * ${width / height})`;
  stage.style.minWidth = `${THIN * Math.max(1, width / height)}px`;
  board.status(board.guide());
  board.show(null);
  showSpots(board);
  const pixels = await decode(view.labels);
  if (board.view && board.view.version === view.version) {
    board.labels = pixels;
    board.marks.forget();
  }
}

async function decode(url) {
  const map = new Image();
  map.src = url;
  await map.decode();
  const canvas = new OffscreenCanvas(map.width, map.height), ink = canvas.getContext("2d");
  ink.drawImage(map, 0, 0);
  return ink.getImageData(0, 0, map.width, map.height);
}

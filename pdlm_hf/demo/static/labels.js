// Captions beside the objects: each where no region is, as near to its own as there is room, with a line to it.
import { badge, make } from "./list.js";

const CROWDED = 12, NARROW = 480; // regions, pixels; beyond these only the list has captions
const CELL = 8; // pixels of the page; rooms are looked for in these steps
const GAP = 6; // pixels, at least, between a caption and regions or other captions
const TRIED = 1000; // of the nearest places, whether their line crosses something
const CROSSING = 30; // pixels that a caption would rather be further off than cross something for a step

export class Labels {
  constructor(board) {
    this.board = board;
    this.layer = board.find(".labels");
    this.pointed = -1;
    this.forget();
    new ResizeObserver(() => this.board.view && this.show(this.texts)).observe(board.find(".stage"));
  }

  // For other regions: where captions were is no longer of use.
  forget() {
    this.places = new Map();
    if (this.board.view) this.show(this.texts);
  }

  show(texts) {
    this.texts = texts;
    this.draw();
  }

  // Shows the caption of one region alone, with its score.
  point(k) {
    if (k === this.pointed) return;
    this.pointed = k;
    this.draw();
  }

  draw() {
    const { view, said } = this.board, { layer, texts } = this;
    layer.replaceChildren();
    if (!view) return;
    const alone = view.regions[this.pointed];
    if (alone) {
      const tip = make("div", "");
      const score = said && said.scores ? `score ${said.scores[this.pointed].toFixed(2)}` : "";
      tip.append(badge(alone, this.pointed), make("span", said ? said.texts[this.pointed] : "not described yet"));
      if (score) tip.append(make("small", score));
      tip.className = "tip";
      this.put([[this.pointed, tip]], true);
    } else if (texts && view.regions.length <= CROWDED && layer.clientWidth >= NARROW) {
      this.put(view.regions.map((region, k) => [k, make("div", texts[k] || "")]).filter(([k]) => texts[k]), false);
    }
  }

  // Puts captions where there is room; alone, only its own region is in the way, and it is shown in any case.
  put(nodes, alone) {
    const { view, labels } = this.board, { layer } = this;
    const frame = { width: layer.clientWidth, height: layer.clientHeight };
    const leaders = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    layer.append(leaders, ...nodes.map(([, node]) => node));
    const grid = labels && new Grid(labels, frame, alone ? nodes[0][0] + 1 : null), placed = new Map();
    const area = ([k]) => view.regions[k].box[2] * view.regions[k].box[3];
    for (const [k, node] of [...nodes].sort((a, b) => area(a) - area(b))) { // there is less room around small ones
      const size = { width: node.offsetWidth, height: node.offsetHeight }, own = boxOf(view.regions[k], frame);
      let place = grid && grid.room(size, k + 1, own, [...placed.values()], alone ? null : this.places.get(k));
      if (!place && alone) place = { x: GAP, y: Math.max(0, frame.height - size.height - GAP), ...size };
      if (!place) {
        node.remove();
        continue;
      }
      if (!alone) this.places.set(k, place);
      placed.set(k, place);
      Object.assign(node.style, { left: `${place.x}px`, top: `${place.y}px`, borderColor: view.regions[k].colour });
    }
    for (const [k] of nodes) {
      const place = placed.get(k);
      if (place && place.end) leaders.append(...leader(place, view.regions[k].colour));
    }
  }
}

function boxOf(region, frame) {
  const [x, y, width, height] = region.box;
  return { x: x * frame.width, y: y * frame.height, width: width * frame.width, height: height * frame.height };
}

// How far two rectangles are apart, in pixels; 0 where they touch.
function distance(a, b) {
  const across = Math.max(a.x - b.x - b.width, b.x - a.x - a.width, 0);
  return Math.hypot(across, Math.max(a.y - b.y - b.height, b.y - a.y - a.height, 0));
}

// The point of a rectangle that is nearest to a point.
function edge(place, [x, y]) {
  const within = (value, least, length) => Math.min(least + length, Math.max(least, value));
  return [within(x, place.x, place.width), within(y, place.y, place.height)];
}

function leader(place, colour) {
  const [x1, y1] = edge(place, place.end), [x2, y2] = place.end;
  return ["white", colour].map((stroke, k) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [name, value] of Object.entries({ x1, y1, x2, y2, stroke, "stroke-width": k ? 2 : 5 })) {
      line.setAttribute(name, value);
    }
    return line;
  });
}

// The regions of the image in cells of the page; `only` is the number of the one that counts, or null for all.
class Grid {
  constructor(labels, frame, only) {
    this.frame = frame;
    this.columns = Math.ceil(frame.width / CELL);
    this.rows = Math.ceil(frame.height / CELL);
    this.owners = new Uint8Array(this.columns * this.rows); // numbers of regions; 0: none
    for (let y = 0; y < labels.height; y += 2) {
      const row = Math.floor((y * frame.height) / labels.height / CELL) * this.columns;
      for (let x = 0; x < labels.width; x += 2) {
        const number = labels.data[4 * (y * labels.width + x)];
        if (number && (only === null || number === only)) {
          this.owners[row + Math.floor((x * frame.width) / labels.width / CELL)] = number;
        }
      }
    }
    this.sums = new Uint32Array((this.columns + 1) * (this.rows + 1)); // of the cells above and to the left
    for (let y = 0; y < this.rows; y++) {
      for (let x = 0, sum = 0; x < this.columns; x++) {
        sum += this.owners[y * this.columns + x] ? 1 : 0;
        this.sums[(y + 1) * (this.columns + 1) + x + 1] = this.sums[y * (this.columns + 1) + x + 1] + sum;
      }
    }
  }

  // Whether no region is in a rectangle, or within the gap around it.
  free({ x, y, width, height }) {
    const within = (value, most) => Math.min(most, Math.max(0, value)), wide = this.columns + 1, { sums } = this;
    const left = within(Math.floor((x - GAP) / CELL), this.columns);
    const right = within(Math.ceil((x + width + GAP) / CELL), this.columns);
    const top = wide * within(Math.floor((y - GAP) / CELL), this.rows);
    const bottom = wide * within(Math.ceil((y + height + GAP) / CELL), this.rows);
    return sums[bottom + right] + sums[top + left] === sums[bottom + left] + sums[top + right];
  }

  // Middles of the cells of a region.
  cells(number) {
    const found = [];
    this.owners.forEach((owner, k) => {
      if (owner === number) found.push([CELL * ((k % this.columns) + 0.5), CELL * (Math.floor(k / this.columns) + 0.5)]);
    });
    return found;
  }

  // The place of this size that is best for the caption of a region, with the end of its line; where it was before, if
  // that still is one. Null: there is no room.
  room(size, number, box, taken, before) {
    const fits = place => place.x + place.width <= this.frame.width && place.y + place.height <= this.frame.height
      && this.free(place) && taken.every(other => distance(place, other) >= GAP);
    const cells = this.cells(number), ended = place => ({ ...place, end: nearest(place, cells) });
    if (before && fits({ ...before, ...size })) return ended({ ...before, ...size });
    const middle = { x: box.x + box.width / 2, y: box.y + box.height / 2 }, found = [];
    for (let y = 0; y + size.height <= this.frame.height; y += CELL) {
      for (let x = 0; x + size.width <= this.frame.width; x += CELL) {
        const place = { x, y, ...size };
        const aside = Math.hypot(x + size.width / 2 - middle.x, y + size.height / 2 - middle.y);
        place.cost = distance(place, box) + aside / 10; // of two at the same distance, the one that is centred
        if (fits(place)) found.push(place);
      }
    }
    const near = found.sort((a, b) => a.cost - b.cost).slice(0, TRIED).map(ended);
    for (const place of near) place.cost += CROSSING * this.crossed(place, number, taken);
    return near.reduce((best, place) => (best && best.cost <= place.cost ? best : place), null);
  }

  // How many steps of a line lie on other regions, or on other captions.
  crossed(place, number, taken) {
    const [x, y] = edge(place, place.end), across = place.end[0] - x, down = place.end[1] - y;
    const steps = Math.ceil(Math.hypot(across, down) / CELL);
    let count = 0;
    for (let k = 0; k < steps; k++) {
      const point = { x: x + (across * k) / steps, y: y + (down * k) / steps, width: 0, height: 0 };
      const owner = this.owners[Math.floor(point.y / CELL) * this.columns + Math.floor(point.x / CELL)];
      if ((owner && owner !== number) || taken.some(other => !distance(point, other))) count++;
    }
    return count;
  }
}

// The one of some points that is nearest to a place; its own middle if there are none.
function nearest(place, points) {
  let best = [place.x + place.width / 2, place.y + place.height / 2], least = Infinity;
  for (const point of points) {
    const [x, y] = edge(place, point), far = Math.hypot(point[0] - x, point[1] - y);
    if (far < least) [best, least] = [point, far];
  }
  return best;
}

// The list beside the image: status, captions, and the denoising steps once more.

const PAUSE = 180; // milliseconds between the steps that are played again

export function make(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}

export function badge(region, k) {
  const node = make("b", k + 1);
  node.style.background = region.colour;
  node.style.color = region.ink;
  return node;
}

export class List {
  constructor(board) {
    this.board = board;
    this.timer = null;
    board.show = texts => { this.show(texts); board.marks.show(texts); };
    const slider = this.out(".replay input");
    slider.addEventListener("input", () => { this.stop(); this.replay(Number(slider.value)); });
    this.out(".replay button").addEventListener("click", () => this.play());
  }

  out(name) { return document.querySelector(`#captions ${name}`); }

  status(text, step = "") {
    const [line, beside] = this.out(".status").children;
    if (line.textContent !== text) line.textContent = text; // it is read out whenever it changes
    beside.textContent = step;
  }

  mark(k) {
    for (const [n, row] of [...this.out(".rows").children].entries()) row.classList.toggle("on", n === k);
  }

  show(texts) {
    this.out(".rows").replaceChildren(...this.board.view.regions.map((region, k) => this.row(region, k, texts)));
  }

  row(region, k, texts) {
    const { said } = this.board, row = make("li", "");
    const text = make("span", texts ? texts[k] || "" : "not described yet");
    text.classList.toggle("missing", !texts);
    row.append(badge(region, k), text);
    if (said && said.scores) {
      const score = make("small", said.scores[k].toFixed(2));
      score.title = "mean probability of the caption's words";
      row.append(score);
    }
    const remove = make("button", "\u00d7");
    remove.type = "button";
    remove.className = "delete";
    remove.title = remove.ariaLabel = `Delete region ${k + 1}`;
    remove.addEventListener("click", () => this.board.act("delete", { id: region.id }));
    row.append(remove);
    row.addEventListener("pointerenter", () => this.board.point(k));
    row.addEventListener("pointerleave", () => this.board.point(-1));
    return row;
  }

  // Shows the drafts after a step, or the result.
  replay(k) {
    const { said } = this.board, steps = [...said.drafts, said.texts], input = this.out(".replay input");
    this.out(".replay").style.display = said.drafts.length ? "flex" : "none";
    input.max = said.drafts.length;
    input.value = k;
    this.out(".replay span").textContent = k < said.drafts.length ? `step ${k + 1} of ${said.drafts.length}` : "result";
    this.board.show(steps[k]);
  }

  play() {
    this.stop();
    let k = 0;
    this.replay(0);
    this.timer = setInterval(() => {
      this.replay(++k);
      if (k >= this.board.said.drafts.length) this.stop();
    }, PAUSE);
  }

  stop() { clearInterval(this.timer); this.timer = null; }
  reset() { this.out(".replay").style.display = "none"; }
}
